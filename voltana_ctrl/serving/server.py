"""An HTTP server with limits on what a client may hold: uvicorn, and errors in JSON."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.serving.asgi import ABORT, error_json

if TYPE_CHECKING:
    import uvicorn

__all__ = ["ServerThread", "bounded_server", "listen"]

# Longer than clients keep an idle connection, so that they close it and not we.
_KEEP_ALIVE_S = 75
_BACKLOG = 4096
# Least time between two words about the same lack of file descriptors.
_FULL_EVERY_S = 60.0
_log = logging.getLogger("voltana_ctrl")


def bounded_server(
    app: Any,
    *,
    what: str,
    host: str = "127.0.0.1",
    port: int = 0,
    header_bytes: int = 1 << 16,
    header_s: float = 10.0,
    stall_s: float = 30.0,
    connections: int = 8192,
    drain_s: float = 5.0,
    lifespan: bool = False,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    on_exit: Callable[[], None] | None = None,
) -> uvicorn.Server:
    """Server of an ASGI application; `run()` serves until SIGTERM or Ctrl-C.

    Parameters
    ----------
    app : ASGI application
        Application that is served.
    what : str
        What it is, for errors: `router`, `controller`.
    host, port
        Address and port to listen on; with port 0 any that is free. Sockets of :func:`listen` that
        `run` is given go first.
    header_bytes : int
        Bytes of the longest head of a request, that is its request line and headers.
    header_s : float
        Seconds that the head may take to come.
    stall_s : float
        Seconds that a client may take nothing of its answer before it is cut off.
    connections : int
        Connections at once, idle ones too, and never more than half of the files that this process
        may have open. A further one takes the place of the one that has gone the longest
        without a request; where each has one, it is told to come again (503).
    drain_s : float
        Seconds that requests may take to end once it stops.
    lifespan : bool
        Whether the application wants to be told of start and end.
    tls_cert, tls_key : Path, optional
        Certificate chain and its key, for HTTPS.
    on_exit : callable, optional
        Called when the end begins.

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
    >>> async def app(scope, receive, send): ...
    >>> bounded_server(app, what="controller").started
    False
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"{what}: uvicorn is not installed; pip install 'voltana-ctrl[server]'"
        ) from error
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError("tls: expected certificate and key, got one of them")

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if on_exit is not None:
                on_exit()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().set_exception_handler(_quiet_when_full(what))
            await super().startup(sockets=sockets)

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_bounded_protocol(header_bytes, header_s, stall_s, connections),
        ws="none",
        lifespan="on" if lifespan else "off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_s)),
        # A line over the limit is ours to refuse.
        h11_max_incomplete_event_size=2 * header_bytes,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    return Server(config)


def _quiet_when_full(what: str) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Handler of a loop's exceptions that says now and then that no descriptor is left.

    asyncio tries to accept as many connections as may wait, and would log each try at length.
    """
    said_s = -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said_s
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - said_s >= _FULL_EVERY_S:
            said_s = loop.time()
            _log.warning(
                "%s: no file descriptor is left, so that connections wait; raise the limit of"
                " open files (ulimit -n)",
                what,
            )

    return handle


def listen(host: str, port: int, *, what: str) -> list[socket.socket]:
    """Sockets that listen already, so that a port that is taken is found out before all else.

    Before a URL is printed, that is, and before a GPU is touched. Whoever asked closes them.

    Parameters
    ----------
    host : str
        Name or address; one socket for each address that it has.
    port : int
        0 to 65535; with 0 each address gets a port of its own that is free.
    what : str
        Who listens, for errors.

    Returns
    -------
    list of socket.socket
        One for each address of the host; `run` of a :func:`bounded_server` takes them.

    Raises
    ------
    ConfigError
        If the port is not within 0 to 65535, or the host is no name that can be looked up.
    BackendError
        If the host has no address, or one that cannot be listened on.

    Examples
    --------
    >>> sockets = listen("127.0.0.1", 0, what="router")
    >>> sockets[0].getsockname()[1] > 0
    True
    >>> for one in sockets:
    ...     one.close()
    """
    if not 0 <= port < 65536:  # the resolver would take the rest of it modulo 65536
        raise ConfigError(f"{what}: port: expected 0 to 65535, got {port}")
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            made.append(socket.create_server(address[:2], family=family, backlog=_BACKLOG))
    except UnicodeError as error:  # such as a part of more than 63 characters
        raise ConfigError(f"{what}: host: expected a name or an address, got {host!r}") from error
    except OSError as error:
        for one in made:
            one.close()
        raise BackendError(
            f"{what}: {host}:{port} cannot be listened on: {error.strerror}; choose another"
            " port or host"
        ) from error
    return made


class ServerThread:
    """Serves an application in a thread of its own.

    Parameters
    ----------
    app : ASGI application
        What is served.
    host : str
        Address to listen on.
    port : int
        0 for any that is free.
    what : str
        What is served, for errors: `controller`, `metrics`.
    tls_cert, tls_key : Path, optional
        Certificate chain and its key, for HTTPS.

    Attributes
    ----------
    port : int
        The port.

    Raises
    ------
    ConfigError
        If uvicorn is not installed.
    BackendError
        If it cannot listen there.

    Examples
    --------
    >>> async def app(scope, receive, send): ...
    >>> with ServerThread(app, what="page") as server:
    ...     server.port > 0
    True
    """

    def __init__(
        self,
        app: Any,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        what: str,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._server = bounded_server(app, what=what, tls_cert=tls_cert, tls_key=tls_key)
        self._sockets = listen(host, port, what=what)
        self.port = int(self._sockets[0].getsockname()[1])
        self._thread = threading.Thread(
            target=self._server.run,
            args=(self._sockets,),
            name=f"voltana-ctrl-{what}",
            daemon=True,
        )
        self._thread.start()
        begin_s = time.monotonic()
        while not self._server.started and time.monotonic() - begin_s < 10.0:
            if not self._thread.is_alive():
                raise BackendError(f"{what}: the HTTP server did not start")
            time.sleep(0.01)

    def close(self) -> None:
        """Stop serving; may be called twice."""
        self._server.should_exit = True
        self._thread.join(5.0)
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.close()

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _bounded_protocol(
    header_bytes: int, header_s: float, stall_s: float, connections: int
) -> type[asyncio.Protocol]:
    """Uvicorn's own HTTP protocol, with limits on a request's head, and errors in JSON."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY:
        connections = max(1, min(connections, allowed // 2))
    # Those that have no request under way, the first of which has had none for the longest.
    resting: dict[Any, None] = {}

    class Bounded(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_bytes = 0
            self._head_timer: asyncio.TimerHandle | None = None
            self._stall_timer: asyncio.TimerHandle | None = None
            self._inner: Any = self.app
            self.app: Any = self._abortable

        async def _abortable(self, scope: Any, receive: Any, send: Any) -> None:
            """The application, with a way to cut a connection whose client does not read."""
            scope.setdefault("extensions", {})[ABORT] = self.transport.abort
            await self._inner(scope, receive, send)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                if not resting:
                    self._refuse(503, "Service Unavailable", "too many connections; come again")
                    return
                longest = next(iter(resting))
                del resting[longest]
                longest._untime_head()
                longest.transport.abort()
            resting[self] = None
            self._time_head()

        def connection_lost(self, exc: Exception | None) -> None:
            resting.pop(self, None)
            self._untime_head()
            self._untime_stall()
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
                if not self.cycle.response_complete:
                    resting.pop(self, None)
            elif self._head_bytes > header_bytes and not self.transport.is_closing():
                self._refuse(431, "Request Header Fields Too Large", "the headers are too long")

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and self in self.connections:
                resting[self] = None

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._stall_timer is None:
                self._stall_timer = self.loop.call_later(stall_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._untime_stall()
            super().resume_writing()

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

        def _untime_stall(self) -> None:
            if self._stall_timer is not None:
                self._stall_timer.cancel()
                self._stall_timer = None

        def _too_slow(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(408, "Request Timeout", "the headers came too slowly")

        def _refuse(self, status: int, phrase: str, message: str) -> None:
            self._untime_head()
            cycle = self.cycle
            # Inside an answer an error would be read as part of it.
            if cycle is None or cycle.response_complete or not cycle.response_started:
                kind = "server_error" if status >= 500 else "invalid_request_error"
                content = error_json(status, kind, message)
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
