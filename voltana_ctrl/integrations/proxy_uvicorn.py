"""The router as a process: uvicorn with limits on what arrives, and a graceful end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.integrations._proxy_asgi import error_json
from voltana_ctrl.integrations.proxy import Proxy

if TYPE_CHECKING:
    import uvicorn

__all__ = ["proxy_server"]

# Longer than clients keep an idle connection, so that they close it and not we.
_KEEP_ALIVE_S = 75


def proxy_server(
    proxy: Proxy,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> uvicorn.Server:
    """Server of a router; `run()` serves until SIGTERM or Ctrl-C, then lets requests end.

    Parameters
    ----------
    proxy : Proxy
        The router; its limits on headers and draining are enforced here.
    host, port
        Where to listen; port 0 for any.
    tls_cert, tls_key : Path, optional
        Certificate chain and its key, for HTTPS.

    Returns
    -------
    uvicorn.Server
        Not started.

    Raises
    ------
    ConfigError
        If uvicorn is missing, or one of certificate and key.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.integrations import Endpoint
    >>> fleet = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> engine = Endpoint(instance="colocated-0", kind="vllm", url="http://10.0.0.1:8000")
    >>> proxy_server(Proxy(fleet, [engine], policy="static-max"), port=0).started
    False
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            "router: uvicorn is not installed; pip install 'voltana-ctrl[server]'"
        ) from error
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError("tls: expected certificate and key, got one of them")
    limits = proxy.limits

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            proxy.is_draining = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        proxy,
        host=host,
        port=port,
        http=_bounded_protocol(limits.header_bytes, limits.header_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(limits.drain_s)),
        # A line over the limit is ours to refuse.
        h11_max_incomplete_event_size=2 * limits.header_bytes,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    return Server(config)


def _bounded_protocol(header_bytes: int, header_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's own HTTP protocol, with limits on a request's head, and errors in JSON."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Bounded(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_bytes = 0
            self._head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._time_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._untime_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if before is None or before.response_complete:
                self._head_bytes += len(data)
                if self._head_timer is None:
                    self._time_head()
            super().data_received(data)
            if self.cycle is not before:
                self._head_bytes = 0
                self._untime_head()
            elif self._head_bytes > header_bytes and not self.transport.is_closing():
                self._refuse(431, "Request Header Fields Too Large", "the headers are too long")

        def send_400_response(self, msg: str) -> None:
            if self._head_bytes > header_bytes:
                self._refuse(431, "Request Header Fields Too Large", "the headers are too long")
            else:
                self._refuse(400, "Bad Request", "this is not valid HTTP")
            del msg

        def _time_head(self) -> None:
            self._head_timer = self.loop.call_later(header_s, self._too_slow)

        def _untime_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(408, "Request Timeout", "the headers came too slowly")

        def _refuse(self, status: int, phrase: str, message: str) -> None:
            self._untime_head()
            cycle = self.cycle
            # Inside an answer an error would be read as part of it.
            if cycle is None or cycle.response_complete or not cycle.response_started:
                content = error_json(status, "invalid_request_error", message)
                head = (
                    f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
                )
                self.transport.write(head.encode() + content)
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
            self.transport.close()

    return Bounded
