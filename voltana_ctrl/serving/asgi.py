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


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int, limit_s: float) -> bytes:
    """Read the body of a request.

    Raises
    ------
    Refused
        If it is too long, too slow or encoded.
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
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limit_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, "invalid_request_error", "the body came too slowly") from None


async def respond(
    send: Send, status: int, headers: Headers, content: bytes, *, more: bool = False
) -> None:
    """Send a whole answer; `more` leaves its end to the caller."""
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content, "more_body": more})


def header(headers: Headers, name: bytes) -> bytes | None:
    """First value of a header."""
    return next((value for key, value in headers if key == name), None)


def error_json(status: int, kind: str, message: str) -> bytes:
    """Error in the form that clients of OpenAI's interface read."""
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}
    ).encode()
