"""The HTTP side of a controller: where nodes and routers report."""

from __future__ import annotations

import hmac
import logging
import math
import time
from typing import Any

from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.messages import (
    LEAST_TOKEN,
    MAX_BYTES,
    MessageRefused,
    decode_report,
    encode_orders,
)
from voltana_ctrl.live.status_page import StatusPage

__all__ = ["hub_app"]

_log = logging.getLogger("voltana_ctrl")
_TELL_S = 60.0


def hub_app(hub: HubBackend, token: str, *, page: StatusPage | None = None) -> Any:
    """ASGI application that nodes and routers report to: POST ``/v1/report``, GET ``/v1/health``.

    Parameters
    ----------
    hub : HubBackend
        Backend that takes the reports.
    token : str
        Bearer token that nodes and routers must show.
    page : StatusPage, optional
        Status page to serve at ``/``, with its own paths.

    Returns
    -------
    starlette.applications.Starlette
        A report is answered with orders; with 401 without the token, 413 if it is too long, 422 if
        it is refused, and 503 while there are no orders.

    Raises
    ------
    ConfigError
        If starlette is not installed or the token is shorter than 16 characters.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.live import HubBackend
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> hub_app(HubBackend(fleet), "short")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: token: expected at least 16 characters, got 5; ...
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(
            "controller: starlette is not installed; pip install 'voltana-ctrl[server]'"
        ) from error
    if len(token) < LEAST_TOKEN:
        raise ConfigError(
            f"token: expected at least {LEAST_TOKEN} characters, got {len(token)}; make one with"
            ' python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )

    strangers = _Strangers()

    def refused(status: int, message: str) -> Response:
        return JSONResponse({"error": message}, status_code=status)

    async def report(request: Request) -> Response:
        shown = request.headers.get("authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            strangers.tell("unknown" if request.client is None else request.client.host)
            return refused(401, "expected the bearer token of this controller")
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > MAX_BYTES:
                return refused(413, f"expected at most {MAX_BYTES} bytes")
        try:
            orders = hub.take(decode_report(data, hub.spec))
            return Response(encode_orders(orders, hub.spec), media_type="application/json")
        except MessageRefused as error:
            return refused(422, str(error))
        except BackendError as error:
            return refused(503, str(error))

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def not_found(_request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return refused(status, getattr(error, "detail", "error"))

    return Starlette(
        routes=[
            Route("/v1/report", report, methods=["POST"]),
            Route("/v1/health", health, methods=["GET"]),
            *([] if page is None else page.routes()),
        ],
        exception_handlers={HTTPException: not_found},
    )


class _Strangers:
    """Logs whose reports are refused for their token, once a minute at most."""

    def __init__(self) -> None:
        self._refused, self._told_s = 0, -math.inf

    def tell(self, host: str) -> None:
        self._refused += 1
        if time.monotonic() - self._told_s >= _TELL_S:
            self._told_s = time.monotonic()
            _log.warning(
                "voltana-ctrl: a report from %s was refused, it shows another token than this"
                " controller's (refused so far: %d)", host, self._refused,
            )  # fmt: skip
