"""Connections to engines: a request is sent, and its answer read up to the first token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.router.body import usage_of
from voltana_ctrl.router.dialects import (
    dialect_of,
    dynamo_pinned,
    encoded,
    has_begun,
    kv_transfer_params,
    sglang_pair,
    vllm_prefill,
)
from voltana_ctrl.router.ledger import Flight, InFlight

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Answer", "Call", "Upstream", "UpstreamFailed"]

Headers = Sequence[tuple[bytes, bytes]]

#: Of one connection alone.
_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"content-length", b"date", b"server",
    )
)  # fmt: skip
#: Of an answer, besides: what the router says itself.
_OURS = _HOP_BY_HOP | {b"x-request-id", b"x-voltana-energy"}
#: Of a request, besides: the answer is read here, and the address is the engine's.
_NOT_FORWARDED = _HOP_BY_HOP | {b"host", b"expect", b"accept-encoding", b"x-request-id"}
# Engines close idle connections after 5 s by default; one that we close first is never sent into.
_KEEP_ALIVE_S = 3.0
_LINGER_S = 60.0


class UpstreamFailed(BackendError):
    """An engine failed a request of which the client has not seen a byte.

    Parameters
    ----------
    message : str
        What happened; never text of the request.
    instances : tuple of int
        Who failed.
    down : bool
        Whether they may be gone, rather than have trouble with this request.
    answer : Answer, optional
        What they said.

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
    ) -> None:
        super().__init__(message)
        self.instances = instances
        self.down = down
        self.answer = answer


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A request as the client sent it.

    Parameters
    ----------
    path : str
        Such as ``/v1/completions``.
    content : bytes
        Its body.
    body : dict
        The body, parsed.
    headers : list of (bytes, bytes)
        Its headers, names in lower case.
    stream : bool
        Whether it wants its tokens one by one.
    flight : Flight
        Where it is.

    Examples
    --------
    >>> flight = Flight(id="a", prompt_tok=1, begin_s=0.0)
    >>> Call(path="/v1/completions", content=b"{}", body={}, headers=[], stream=False,
    ...      flight=flight).attempt
    0
    """

    path: str
    content: bytes
    body: dict[str, Any]
    headers: Headers
    stream: bool
    flight: Flight
    attempt: int = field(default=0, init=False)

    @property
    def request_id(self) -> str:
        """Told to engines; a new one for each attempt, which may meet the last one there."""
        return self.flight.id if not self.attempt else f"{self.flight.id}-{self.attempt}"


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """What an engine says: all of it, or its beginning up to the first token.

    Parameters
    ----------
    status : int
        Of HTTP.
    headers : list of (bytes, bytes)
        Those to pass on.
    head : bytes
        The body so far.
    response : aiohttp.ClientResponse, optional
        Where the rest comes from; None where there is none.
    instance : int
        Who says it.
    companion : asyncio.Task, optional
        Request to another engine that belongs to it.

    Examples
    --------
    >>> Answer(status=200, headers=[], head=b"{}", instance=1).is_whole
    True
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    head: bytes
    instance: int
    response: aiohttp.ClientResponse | None = None
    companion: asyncio.Task[Answer] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether `head` is the whole body."""
        return self.response is None

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield the body from behind `head`, as it comes.

        Raises
        ------
        UpstreamFailed
            If the engine breaks off.
        """
        if self.response is None:
            return
        import aiohttp

        try:
            async for chunk in self.response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamFailed(
                f"the engine broke off ({type(error).__name__})", (self.instance,), down=True
            ) from error

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


class Upstream:
    """Connections to the engines of a fleet; an asynchronous context manager.

    Parameters
    ----------
    endpoints : sequence of Endpoint
        One per instance, in the order of the fleet.
    colocated : bool
        Whether each instance does both phases.
    connect_s : float
        Time for a connection to be made.
    api_key : str, optional
        Sent to engines as bearer token in place of the client's.
    pass_authorization : bool
        Whether the client's own token is passed on.

    Raises
    ------
    ConfigError
        If kinds are mixed, or an engine lacks what its kind needs.

    Examples
    --------
    >>> from voltana_ctrl.engines.endpoints import Endpoint
    >>> ends = [Endpoint(instance=f"colocated-{k}", kind="vllm", url=f"http://10.0.0.{k}:8000")
    ...         for k in (1, 2)]
    >>> Upstream(ends, colocated=True).kind
    'plain'
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        colocated: bool,
        connect_s: float = 5.0,
        api_key: str | None = None,
        pass_authorization: bool = True,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.kind = dialect_of(self.endpoints, colocated=colocated)
        self.sends_both = self.kind != "vllm"
        self._colocated = colocated
        self._connect_s = connect_s
        self._api_key = api_key
        self._dropped = _NOT_FORWARDED
        if api_key is not None or not pass_authorization:
            self._dropped = _NOT_FORWARDED | {b"authorization"}
        self._http: aiohttp.ClientSession | None = None
        self._lingering: set[asyncio.Task[Answer]] = set()

    async def __aenter__(self) -> Upstream:
        try:
            import aiohttp
        except ImportError as error:
            raise ConfigError(
                "router: aiohttp is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._lingering:
            task.cancel()
        if self._http is not None:
            await self._http.close()

    async def begin(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        """Send a request and wait for its first token, or for all of it if it does not stream.

        Parameters
        ----------
        call : Call
            The request.
        counts : InFlight
            Told where the request is.
        prefill : int
            Where to prefill, or where to send it if the fleet is colocated.
        pick_decode : callable
            Asked for the decode instance when it is needed.

        Raises
        ------
        UpstreamFailed
            If it may be sent to another instance.
        """
        counts.enter_prefill(call.flight, prefill)
        if self.kind == "vllm":
            return await self._vllm(call, counts, prefill, pick_decode)
        if self.kind == "sglang":
            return await self._sglang(call, counts, prefill, pick_decode)
        decode = pick_decode()
        content = call.content
        if self.kind == "dynamo":
            ends = None if self._colocated else self.endpoints[prefill], self.endpoints[decode]
            content = encoded(dynamo_pinned(call.body, *ends))
        if not self._colocated:
            counts.enter_decode(call.flight, decode)
        elif not call.stream:
            # Its first token does not show.
            counts.leave_prefill(call.flight)
            counts.enter_decode(call.flight, decode)
        try:
            answer = await self._open(decode, call, content)
        except UpstreamFailed as failed:
            # The frontend does not say which of the two it was.
            failed.instances = (prefill, decode) if self.kind == "dynamo" else failed.instances
            raise
        if self._colocated and call.stream:
            counts.leave_prefill(call.flight)
            counts.enter_decode(call.flight, decode)
        counts.leave_prefill(call.flight)
        return answer

    async def get(self, instance: int, path: str, headers: Headers = ()) -> Answer:
        """Ask one engine for a page.

        Parameters
        ----------
        instance : int
            Which.
        path : str
            Such as ``/v1/models``.
        headers : list of (bytes, bytes)
            Of the client.
        """
        return await self._whole(instance, "GET", path, None, self._headers(headers))

    async def _vllm(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        headers = self._headers(call.headers, call.request_id)
        made = await self._whole(
            prefill, "POST", call.path, encoded(vllm_prefill(call.body)), headers
        )
        counts.leave_prefill(call.flight)
        if made.status != 200:
            return made
        params = kv_transfer_params(made.head)
        decode = pick_decode()
        counts.enter_decode(call.flight, decode)
        # Without them the decode engine prefills for itself.
        content = call.content
        if params is not None:
            content = encoded({**call.body, "kv_transfer_params": params})
            # What was handed over is in the cache of the decode engine, which says so.
            call.flight.cached_tok = usage_of(made.head, stream=False).get("cached_tokens", 0)
        return await self._open(decode, call, content)

    async def _sglang(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        decode = pick_decode()
        counts.enter_decode(call.flight, decode)
        content = encoded(sglang_pair(call.body, self.endpoints[prefill]))
        headers = self._headers(call.headers, call.request_id)
        made = asyncio.ensure_future(self._whole(prefill, "POST", call.path, content, headers))
        opened = asyncio.ensure_future(self._open(decode, call, content))
        try:
            # If one fails the other waits in vain.
            await asyncio.wait({made, opened}, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done() and (made.result()).status != 200:
                opened.cancel()
                return made.result()
            answer = await opened
        except BaseException:
            made.cancel()
            opened.cancel()
            # Let them hang up; what they met is told by the one that failed first.
            await asyncio.gather(made, opened, return_exceptions=True)
            raise
        counts.leave_prefill(call.flight)
        answer.companion = made
        # It says a little later than decode that it is done, or never.
        self._lingering.add(made)
        made.add_done_callback(self._lingering.discard)
        made.add_done_callback(_look_away)
        return answer

    def _headers(self, headers: Headers, request_id: str | None = None) -> list[tuple[str, str]]:
        named = {
            part.strip().lower()
            for name, value in headers
            if name == b"connection"
            for part in value.split(b",")
        }
        kept = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name not in self._dropped and name not in named
        ]
        kept.append(("accept-encoding", "identity"))
        if request_id is not None:
            kept.append(("x-request-id", request_id))
        if self._api_key is not None:
            kept.append(("authorization", f"Bearer {self._api_key}"))
        return kept

    async def _send(
        self, instance: int, method: str, path: str, content: bytes | None, headers: Any
    ) -> aiohttp.ClientResponse:
        import aiohttp

        endpoint = self.endpoints[instance]
        if self._http is None:
            raise ConfigError("Upstream: not entered; use `async with`")
        try:
            return await self._http.request(
                method,
                endpoint.url + path,
                data=content,
                headers=headers,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise self._silence(instance, error) from error

    async def _whole(
        self, instance: int, method: str, path: str, content: bytes | None, headers: Any
    ) -> Answer:
        """Ask, and read all of the answer."""
        response = await self._send(instance, method, path, content, headers)
        return await self._read(instance, response)

    async def _open(self, instance: int, call: Call, content: bytes) -> Answer:
        """Ask, and read up to the first token of a stream."""
        headers = self._headers(call.headers, call.request_id)
        response = await self._send(instance, "POST", call.path, content, headers)
        streams = call.stream and response.content_type == "text/event-stream"
        if response.status != 200 or not streams:
            return await self._read(instance, response)
        import aiohttp

        head = b""
        try:
            async for chunk in response.content.iter_any():
                head += chunk
                begun = has_begun(head)
                if begun is None:
                    response.close()
                    raise UpstreamFailed(
                        f"{self._name(instance)}: failed in the stream", (instance,)
                    )
                if begun:
                    return Answer(
                        status=200,
                        headers=_passed_on(response),
                        head=head,
                        instance=instance,
                        response=response,
                    )
        except (aiohttp.ClientError, OSError) as error:
            response.close()
            raise self._silence(instance, error) from error
        except BaseException:
            response.close()
            raise
        if not head:
            raise UpstreamFailed(f"{self._name(instance)}: an empty stream", (instance,))
        return Answer(status=200, headers=_passed_on(response), head=head, instance=instance)

    async def _read(self, instance: int, response: aiohttp.ClientResponse) -> Answer:
        import aiohttp

        try:
            content = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._silence(instance, error) from error
        finally:
            response.close() if not response.content.at_eof() else response.release()
        answer = Answer(
            status=response.status, headers=_passed_on(response), head=content, instance=instance
        )
        if response.status >= 500:
            raise UpstreamFailed(
                f"{self._name(instance)}: status {response.status}",
                (instance,),
                down=response.status in (502, 503, 504),
                answer=answer,
            )
        return answer

    def _silence(self, instance: int, error: Exception) -> UpstreamFailed:
        return UpstreamFailed(
            f"{self._name(instance)}: no answer ({type(error).__name__})", (instance,), down=True
        )

    def _name(self, instance: int) -> str:
        return self.endpoints[instance].instance


def _passed_on(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower(), value) for name, value in response.raw_headers if name.lower() not in _OURS
    ]


def _look_away(task: asyncio.Task[Answer]) -> None:
    """Take note of an end that changes nothing any more."""
    if not task.cancelled():
        task.exception()
