"""A request on its way, and what an engine says to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from voltana_ctrl.errors import BackendError
from voltana_ctrl.router.body import Asked, spliced
from voltana_ctrl.router.events import EventReader
from voltana_ctrl.router.ledger import Flight
from voltana_ctrl.router.paths import COMPLETIONS
from voltana_ctrl.serving.asgi import Share

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Answer", "Call", "RefusedAltered", "UpstreamFailed"]

Headers = Sequence[tuple[bytes, bytes]]
Comment = Callable[[Headers, bytes], Awaitable[None]]

_LINGER_S = 60.0


class UpstreamFailed(BackendError):
    """An engine failed a request of which the client has not seen a token.

    Parameters
    ----------
    message : str
        What happened; never text of the request.
    instances : tuple of int
        Indices of the instances that failed.
    down : bool
        Whether they may be gone, rather than have trouble with this request.
    answer : Answer, optional
        Their answer, where they gave one.
    is_late : bool
        Whether they gave none in time.
    is_absent : bool
        Whether nobody was there to take the request.
    is_unreachable : bool
        Whether no packet came back from where they are: their machine, or the way to it, is gone.

    Examples
    --------
    >>> UpstreamFailed("decode-0: refused the connection", (1,)).instances
    (1,)
    """

    def __init__(
        self,
        message: str,
        instances: tuple[int, ...],
        *,
        down: bool = False,
        answer: Answer | None = None,
        is_late: bool = False,
        is_absent: bool = False,
        is_unreachable: bool = False,
    ) -> None:
        super().__init__(message)
        self.instances = instances
        self.down = down
        self.answer = answer
        self.is_late = is_late
        self.is_absent = is_absent
        self.is_unreachable = is_unreachable


class RefusedAltered(UpstreamFailed):
    """An engine refused a request that the router had altered: it is sent as the client sent it."""


async def _say_nothing(headers: Headers, comment: bytes) -> None:
    """Keep comments of engines to ourselves."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A request as it is sent on.

    Parameters
    ----------
    path : str
        Path that the client called, such as ``/v1/completions``.
    asked : Asked
        Body of the request, read.
    headers : list of (bytes, bytes)
        Headers of the request, names in lower case.
    flight : Flight
        Where the request is, and how far.
    share : Share
        Its share of the memory for requests and answers.
    comment : callable
        Called with headers and comment where an engine keeps the connection alive before its first
        token.
    client_id : bytes or None
        How the client names the request.

    Examples
    --------
    >>> from voltana_ctrl.router import Flight
    >>> from voltana_ctrl.router.body import Asked
    >>> flight = Flight(id="a", prompt_tok=1, begin_s=0.0)
    >>> Call(path="/v1/completions", asked=Asked(content=b"{}"), headers=[], flight=flight).attempt
    0
    """

    path: str
    asked: Asked
    headers: Headers
    flight: Flight
    share: Share = field(default_factory=Share)
    comment: Comment = _say_nothing
    client_id: bytes | None = None
    attempt: int = field(default=0, init=False)
    # Whether nothing is to be changed any more, since an engine refused what was.
    plain: bool = field(default=False, init=False)
    # Why its decode engine is to prefill it.
    alone: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.alone = self.asked.alone

    @property
    def is_completion(self) -> bool:
        """Whether its body is one that the router hands over and whose usage it asks for."""
        return self.path in COMPLETIONS

    @property
    def request_id(self) -> str:
        """Id that engines are told: each attempt has its own, for the last may still run."""
        return self.flight.id if not self.attempt else f"{self.flight.id}-{self.attempt}"

    def content(self, extra: dict[str, Any] | None = None) -> bytes:
        """Body as it is sent to an engine, with the fields that the router adds.

        Parameters
        ----------
        extra : dict, optional
            Fields to add, besides the wish to be told the usage.

        Returns
        -------
        bytes
            JSON; as the client sent it where nothing is added.
        """
        added = dict(extra or {})
        if self.asked.options is not None and not self.plain:
            added["stream_options"] = self.asked.options
        return spliced(self.asked.content, added)


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """What an engine says: all of it, or its beginning up to the first token.

    Parameters
    ----------
    status : int
        Status of HTTP.
    headers : list of (bytes, bytes)
        Headers to pass on to the client.
    instance : int
        Index of the instance that says it.
    content : bytes
        The body, where it is whole.
    begun : list of bytes
        The first events of a stream.
    reader : EventReader, optional
        Reader of a stream; None where the answer is whole.
    response : aiohttp.ClientResponse, optional
        Where the rest of a stream comes from.
    companion : asyncio.Task, optional
        Request to another engine that belongs to it.

    Examples
    --------
    >>> Answer(status=200, headers=[], content=b"{}", instance=1).is_whole
    True
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    instance: int
    content: bytes = b""
    begun: list[bytes] = field(default_factory=list)
    reader: EventReader | None = None
    response: aiohttp.ClientResponse | None = None
    companion: asyncio.Task[Answer] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether `content` is all of it."""
        return self.reader is None

    async def events(self) -> AsyncIterator[list[bytes]]:
        """Yield the events of a stream, as many at once as came.

        Yields
        ------
        list of bytes
            Whole events, first those of `begun`; possibly none.

        Raises
        ------
        UpstreamFailed
            If the engine breaks off, or the stream ends without having told its end.
        """
        yield self.begun
        if self.reader is None or self.response is None:
            return
        import aiohttp

        try:
            async for chunk in self.response.content.iter_any():
                yield self.reader.take(chunk)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if not self.reader.is_whole:
                raise UpstreamFailed(
                    f"the engine broke off ({type(error).__name__})",
                    (self.instance,),
                    down=not isinstance(error, ValueError),
                ) from error
        if not (self.reader.is_whole or self.reader.has_failed):
            raise UpstreamFailed("the engine broke off (no end was told)", (self.instance,))

    def close(self, *, is_told: bool) -> None:
        """Hang up on whatever still speaks.

        Parameters
        ----------
        is_told : bool
            Whether all of it was told; a prefill engine may then still be about to say so.
        """
        if self.response is not None:
            self.response.close()
        if self.companion is None or self.companion.done():
            return
        if is_told:
            asyncio.get_running_loop().call_later(_LINGER_S, self.companion.cancel)
        else:
            self.companion.cancel()
