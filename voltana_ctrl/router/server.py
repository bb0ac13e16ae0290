"""The router as a process: a bounded server, and a graceful end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from voltana_ctrl.router.app import Proxy
from voltana_ctrl.serving.server import bounded_server

if TYPE_CHECKING:
    import uvicorn

__all__ = ["proxy_server"]


def proxy_server(
    proxy: Proxy,
    *,
    host: str = "127.0.0.1",
    port: int = 8790,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> uvicorn.Server:
    """Server of a router; `run()` serves until SIGTERM or Ctrl-C, then lets requests end.

    Parameters
    ----------
    proxy : Proxy
        The router; its limits on headers and draining are enforced here.
    host, port
        Address and port to listen on; with port 0 any that is free.
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
    >>> from voltana_ctrl.engines.endpoints import Endpoint
    >>> from voltana_ctrl.router import Proxy
    >>> fleet = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> engine = Endpoint(instance="colocated-0", kind="vllm", url="http://10.0.0.1:8000")
    >>> proxy_server(Proxy(fleet, [engine], policy="static-max"), port=0).started
    False
    """
    limits = proxy.limits

    def drain() -> None:
        proxy.is_draining = True

    return bounded_server(
        proxy,
        what="router",
        host=host,
        port=port,
        header_bytes=limits.header_bytes,
        header_s=limits.header_s,
        # The exchange counts whom it cuts off, and is first.
        stall_s=2.0 * limits.stall_s,
        connections=limits.connections,
        drain_s=limits.drain_s,
        lifespan=True,
        tls_cert=tls_cert,
        tls_key=tls_key,
        on_exit=drain,
    )
