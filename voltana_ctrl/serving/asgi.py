"""The ASGI side of the router: refusals as one JSON error each, bodies, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = ((b"content-type", b"application/json"),)
RETRY_AFTER = ((b"retry-after", b"1"),)
_CLOSE = ((b"connection", b"close"),)
# Of a request that is refused, what is read so that the client reads the refusal.
_DISCARD_BYTES = 1 << 20
_DISCARD_S = 0.5


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


#: Extension of ASGI by which our server lets an application cut a connection at once.
ABORT = "voltana_ctrl.abort"


class JsonErrors:
    """ASGI application around one handler; what it refuses is told in JSON."""

    def __init__(self, handle: Handler, told: Callable[[int], None]) -> None:
        self._handle = handle
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        more = True
        status = 0

        async def watched_receive() -> MutableMapping[str, Any]:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def watched_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._handle(scope, watched_receive, watched_send)
        except Refused as refused:
            headers = [*JSON, *refused.headers]
            content = error_json(refused.status, refused.kind, str(refused))
            if not more:
                await respond(watched_send, refused.status, headers, content)
            else:
                # Told at once; then its body is let in for a moment, since a client that is
                # cut off while it sends may not read what it was told.
                headers += _CLOSE
                await respond(watched_send, refused.status, headers, content, more=True)
                await _discard(watched_receive)
                await watched_send({"type": "http.response.body"})
        except ClientGone:
            status = 499
        finally:
            self._told(status)


async def _discard(receive: Receive) -> None:
    """Read what is left of a body, if it is short and quick."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while size <= _DISCARD_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                size += len(message.get("body", b""))


class ByteBudget:
    """Memory that all requests together may hold; the first of each request are always free.

    Parameters
    ----------
    limit_bytes : int
        Bytes that all requests together may hold.
    free_bytes : int
        Bytes of each request that are not counted, so that short ones pass while long ones fill
        the budget.

    Examples
    --------
    >>> budget = ByteBudget(1000, free_bytes=10)
    >>> one, other = budget.share(), budget.share()
    >>> one.grow(900), other.grow(200), other.grow(10)
    (True, False, True)
    >>> one.release()
    >>> other.grow(200)
    True
    """

    def __init__(self, limit_bytes: int, *, free_bytes: int = 1 << 14) -> None:
        self.limit_bytes = limit_bytes
        self.free_bytes = free_bytes
        self.held_bytes = 0

    def share(self) -> Share:
        """Give a new request its share, which holds nothing yet."""
        return Share(self)


class Share:
    """What one request holds of a budget; without a budget there is no limit.

    Parameters
    ----------
    budget : ByteBudget, optional
        Budget that all requests share.
    """

    def __init__(self, budget: ByteBudget | None = None) -> None:
        self._budget = budget
        self._bytes = 0
        self._counted_bytes = 0

    def grow(self, more_bytes: int) -> bool:
        """Hold so many bytes more, if they fit.

        Parameters
        ----------
        more_bytes : int
            Number of bytes.

        Returns
        -------
        bool
            False if they do not fit; then nothing more is held.
        """
        budget = self._budget
        if budget is None:
            return True
        counted = max(0, self._bytes + more_bytes - budget.free_bytes) - self._counted_bytes
        if counted and budget.held_bytes + counted > budget.limit_bytes:
            return False
        self._bytes += more_bytes
        self._counted_bytes += counted
        budget.held_bytes += counted
        return True

    def release(self) -> None:
        """Hold nothing any more."""
        if self._budget is not None:
            self._budget.held_bytes -= self._counted_bytes
        self._bytes = self._counted_bytes = 0


async def read_body(
    scope: Scope,
    receive: Receive,
    *,
    limit_bytes: int,
    limit_s: float,
    share: Share | None = None,
) -> bytes:
    """Read the body of a request.

    Parameters
    ----------
    scope, receive
        The request, as ASGI hands it to an application.
    limit_bytes : int
        Longest body.
    limit_s : float
        Seconds for all of it to arrive.
    share : Share, optional
        Where its bytes are counted; without, only `limit_bytes` counts.

    Returns
    -------
    bytes
        All of the body.

    Raises
    ------
    Refused
        If it is too long, too slow or encoded, or if there is no memory left for it.
    ClientGone
        If the client leaves.
    """
    too_long = Refused(413, "invalid_request_error", f"the body is over {limit_bytes} bytes")
    length = header(scope["headers"], b"content-length")
    if length is not None and (not length.isdigit() or int(length[:20]) > limit_bytes):
        raise too_long
    encoding = header(scope["headers"], b"content-encoding")
    if encoding not in (None, b"", b"identity"):
        raise Refused(415, "invalid_request_error", "content-encoding: expected none")
    share = share or Share()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limit_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > limit_bytes:
                    raise too_long
                if not share.grow(len(part)):
                    text = "no memory is left for long bodies; come again"
                    raise Refused(429, "rate_limit_error", text, RETRY_AFTER)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, "invalid_request_error", "the body came too slowly") from None
    finally:
        # A refusal that is on its way would keep them.
        parts.clear()


async def respond(
    send: Send, status: int, headers: Headers, content: bytes, *, more: bool = False
) -> None:
    """Send a whole answer; `more` leaves its end to the caller."""
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content, "more_body": more})


def header(headers: Headers, name: bytes) -> bytes | None:
    """First value of a header, by its name in lower case; None without it."""
    return next((value for key, value in headers if key == name), None)


def error_json(status: int, kind: str, message: str) -> bytes:
    """Body of an answer that tells an error, as clients of OpenAI's interface read it."""
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}
    ).encode()
