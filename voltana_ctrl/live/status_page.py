"""The status page over HTTP: the page, the numbers behind it, and a stream of them.

On a loopback address everybody on the machine may look. Elsewhere the token is asked for once and
becomes a cookie that scripts cannot read, since a stream of events carries no bearer header.
Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from base64 import b64encode
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.live.status import StatusBoard

__all__ = ["StatusPage", "is_loopback", "page_app"]

_COOKIE = "voltana_ctrl"
_EVERY_S, _LOOK_S = 1.0, 0.25
_MOST_STREAMS, _MOST_FORM_BYTES = 64, 4096
_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>voltana-ctrl</title><link rel="icon" href="data:,"></head><body>
<form method="post" action="/login"><p><label>Token of this controller:
<input type="password" name="token" autocomplete="off" required autofocus></label>
<button>Look</button></p>%s</form></body></html>"""


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine alone.

    Parameters
    ----------
    host : str
        As given to listen on, or as a client names it.

    Examples
    --------
    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class StatusPage:
    """Routes of the page, for an application of Starlette.

    Parameters
    ----------
    board : StatusBoard
        Board whose status is shown.
    token : str, optional
        Token that people must show where the page is not on a loopback address; None opens it to
        whoever names a loopback address, so that no page of elsewhere can read it through a name
        of its own.
    secure : bool
        Whether it is served over HTTPS: the cookie then goes no other way.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.live.status import StatusBoard
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> page = StatusPage(StatusBoard(fleet, Slo(ttft_s=0.6, itl_s=0.06)))
    >>> [route.path for route in page.routes()]
    ['/', '/login', '/login', '/v1/status', '/v1/history', '/v1/events']
    """

    def __init__(
        self, board: StatusBoard, *, token: str | None = None, secure: bool = False
    ) -> None:
        self._board, self._token, self._secure = board, token, secure
        self._session = secrets.token_urlsafe(32)
        self._text = (files(__package__) / "status.html").read_text(encoding="utf-8")
        self._headers = {
            "Content-Security-Policy": _policy(self._text),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        self._streams = 0
        self._closed = False

    def close(self) -> None:
        """End all streams; may be called twice."""
        self._closed = True

    def routes(self) -> list[Any]:
        """Routes of Starlette.

        Returns
        -------
        list of starlette.routing.Route
            The page at ``/``, and what it reads from under ``/v1``.

        Raises
        ------
        ConfigError
            If starlette is not installed.
        """
        try:
            from starlette.routing import Route
        except ImportError as error:
            raise ConfigError(
                "status page: starlette is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        return [
            Route("/", self._page, methods=["GET"]),
            Route("/login", self._ask, methods=["GET"]),
            Route("/login", self._login, methods=["POST"]),
            Route("/v1/status", self._status, methods=["GET"]),
            Route("/v1/history", self._history, methods=["GET"]),
            Route("/v1/events", self._events, methods=["GET"]),
        ]

    def _may_look(self, request: Any) -> bool:
        if self._token is None:
            host = request.headers.get("host", "")
            name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
            return is_loopback(name)
        shown = request.headers.get("authorization", "")
        session = request.cookies.get(_COOKIE, "")
        return _same(shown, f"Bearer {self._token}") or _same(session, self._session)

    def _refused(self, status: int, message: str) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"error": message}, status_code=status, headers=self._headers)

    def _unknown(self) -> Any:
        if self._token is None:
            return self._refused(403, "expected a loopback address in the Host header")
        return self._refused(401, "expected the token: log in at /login, or show it as a bearer")

    async def _page(self, request: Any) -> Any:
        from starlette.responses import HTMLResponse, RedirectResponse

        if self._may_look(request):
            return HTMLResponse(self._text, headers=self._headers)
        if self._token is None:
            return self._unknown()
        return RedirectResponse("/login", status_code=303)

    async def _ask(self, _request: Any) -> Any:
        return self._form("")

    def _form(self, said: str, status: int = 200) -> Any:
        from starlette.responses import HTMLResponse

        headers = {**self._headers, "Content-Security-Policy": "default-src 'none';"
                   " img-src data:; form-action 'self'; frame-ancestors 'none'"}  # fmt: skip
        return HTMLResponse(_LOGIN % said, status_code=status, headers=headers)

    async def _login(self, request: Any) -> Any:
        from starlette.responses import RedirectResponse

        data = b""
        async for part in request.stream():
            data += part
            if len(data) > _MOST_FORM_BYTES:
                return self._refused(413, f"expected at most {_MOST_FORM_BYTES} bytes")
        told = parse_qs(data.decode("utf-8", errors="replace")).get("token", [""])[0]
        if self._token is not None and not _same(told.strip(), self._token):
            await asyncio.sleep(1.0)  # guessing is slow
            return self._form("<p>That is not the token.</p>", 401)
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(
            _COOKIE, self._session, httponly=True, samesite="strict", secure=self._secure
        )
        return answer

    async def _status(self, request: Any) -> Any:
        return await self._json(request, self._board.status)

    async def _history(self, request: Any) -> Any:
        return await self._json(request, self._board.history)

    async def _json(self, request: Any, told: Any) -> Any:
        from starlette.responses import JSONResponse

        if not self._may_look(request):
            return self._unknown()
        return JSONResponse(told(), headers=self._headers)

    async def _events(self, request: Any) -> Any:
        from starlette.responses import StreamingResponse

        if not self._may_look(request):
            return self._unknown()
        if self._streams >= _MOST_STREAMS:
            return self._refused(503, "too many look already; come again")
        return StreamingResponse(
            self._stream(), media_type="text/event-stream", headers=self._headers
        )

    async def _stream(self) -> Any:
        self._streams += 1
        try:
            while not self._closed:
                told = json.dumps(self._board.status(), separators=(",", ":"), allow_nan=False)
                yield f"data: {told}\n\n"
                for _ in range(round(_EVERY_S / _LOOK_S)):
                    if self._closed:
                        return
                    await asyncio.sleep(_LOOK_S)
        finally:
            self._streams -= 1


def page_app(page: StatusPage) -> Any:
    """ASGI application of the page alone, where it has a port of its own.

    Parameters
    ----------
    page : StatusPage
        The page.

    Returns
    -------
    starlette.applications.Starlette
        With the routes of the page.

    Raises
    ------
    ConfigError
        If starlette is not installed.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.live.status import StatusBoard
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> app = page_app(StatusPage(StatusBoard(fleet, Slo(ttft_s=0.6, itl_s=0.06))))
    >>> len(app.routes)
    6
    """
    routes = page.routes()
    from starlette.applications import Starlette

    return Starlette(routes=routes)


def _same(shown: str, expected: str) -> bool:
    return hmac.compare_digest(shown.encode(), expected.encode())


def _policy(text: str) -> str:
    """What the page may do: run its own script, and talk to whence it came."""
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
