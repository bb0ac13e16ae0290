"""One controller for the agents of many nodes: a plant whose parts report over HTTP."""

from __future__ import annotations

import contextlib
import hmac
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.live.orders import (
    MAX_BYTES,
    MessageRefused,
    NodeOrder,
    NodeReport,
    decode_report,
    encode_order,
)
from voltana_ctrl.ports import Backend
from voltana_ctrl.serving.server import bounded_server, listen
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    RequestBatch,
)

__all__ = ["HubBackend", "HubServer", "hub_app"]

_STATE = tuple(name for name in FleetState.__slots__ if name not in ("t_s", "alive", "age_s"))
_COUNTS = ("arrived_req", "arrived_tok")
_MOST_ROWS = 100_000


class HubBackend:
    """A fleet whose nodes report, and fetch their orders.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    silent_s : float
        An instance that nobody has reported for so long is not alive.
    valid_s : float
        How long an order holds without a newer one.
    now_s : callable
        Time that never goes back.

    Raises
    ------
    ConfigError
        If a time is not positive.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> hub = HubBackend(fleet)
    >>> report = NodeReport(node="n0", number=0, ids=("decode-0",),
    ...                     observation=Observation(state=FleetState.idle(1)))
    >>> hub.apply(Decision.highest(fleet, floor_mhz=[705.0, 705.0]))
    >>> hub.take(report).freq_mhz, hub.read().state.alive
    ({'decode-0': 705.0}, array([False,  True]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        silent_s: float = 2.0,
        valid_s: float = 1.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("HubBackend.silent_s", silent_s)
        positive("HubBackend.valid_s", valid_s)
        self._fleet = fleet
        self._silent_s, self._valid_s, self._now_s = silent_s, valid_s, now_s
        n = len(fleet)
        self._lock = threading.Lock()
        self._columns = {name: np.zeros(n) for name in _STATE}
        self._columns["freq_mhz"] = np.array(fleet.max_mhz)
        self._alive = np.zeros(n, bool)
        self._begin_s = now_s()
        self._read_s = np.full(n, -np.inf)
        self._nodes: list[str | None] = [None] * n
        self._iterations: list[IterationBatch] = []
        self._finished: list[RequestBatch] = []
        self._decision: Decision | None = None
        self._decided_s = 0.0
        self._number = -1
        self._released = False
        self._closed = False

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    def take(self, report: NodeReport) -> NodeOrder:
        """Take what a node reports, and answer with its order.

        Parameters
        ----------
        report : NodeReport
            Checked before.

        Raises
        ------
        MessageRefused
            If another node reports the same instances.
        BackendError
            If there is no order: nothing is decided yet, or any more.
        """
        where = [self._fleet.ids.index(name) for name in report.ids]
        state, t_s = report.observation.state, self._now_s()
        with self._lock:
            for i in where:
                if self._nodes[i] not in (None, report.node) and (
                    t_s - self._read_s[i] <= self._silent_s
                ):
                    raise MessageRefused(
                        f"{self._fleet.ids[i]}: node {self._nodes[i]} reports it, too; give each"
                        " instance one agent"
                    )
            for name, column in self._columns.items():
                told = getattr(state, name)
                column[where] = told + (column[where] if name in _COUNTS else 0.0)
            self._alive[where] = state.alive
            self._read_s[where] = t_s - state.age_s
            for i in where:
                self._nodes[i] = report.node
            for kept, batch in (
                (self._iterations, report.observation.iterations),
                (self._finished, report.observation.finished),
            ):
                if len(batch) and sum(map(len, kept)) < _MOST_ROWS:
                    kept.append(batch)  # type: ignore[arg-type]
            return self._order(report, where, t_s)

    def _order(self, report: NodeReport, where: list[int], t_s: float) -> NodeOrder:
        left_s = self._decided_s + self._valid_s - t_s
        if self._decision is None or self._released or left_s <= 0.0:
            raise BackendError("the controller has decided nothing, or nothing any more")
        decision = self._decision
        return NodeOrder(
            number=self._number,
            valid_s=left_s,
            freq_mhz={
                name: float(decision.freq_mhz[i]) for name, i in zip(report.ids, where, strict=True)
            },
            freq_max_mhz={
                name: float(decision.freq_max_mhz[i])
                for name, i in zip(report.ids, where, strict=True)
            },
        )

    def read(self) -> Observation:
        """State of all instances as reported; counts and records since the last read.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("HubBackend.read: the backend is closed; make a new one")
        t_s = self._now_s()
        with self._lock:
            heard = np.isfinite(self._read_s)
            age_s = t_s - np.where(heard, self._read_s, self._begin_s)
            state = FleetState(
                t_s=max(0.0, t_s),
                alive=self._alive & (t_s - self._read_s <= self._silent_s),
                age_s=np.maximum(age_s, 0.0),
                **self._columns,
            ).bounded(self._fleet)
            for name in _COUNTS:
                self._columns[name][:] = 0.0
            iterations, self._iterations = self._iterations, []
            finished, self._finished = self._finished, []
        return Observation(
            state=state,
            iterations=_joined(IterationBatch, iterations),
            finished=_joined(RequestBatch, finished),
        )

    def apply(self, decision: Decision) -> None:
        """Keep a decision for the nodes to fetch.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("HubBackend.apply: the backend is closed; make a new one")
        with self._lock:
            self._decision, self._decided_s = decision, self._now_s()
            self._number += 1

    @property
    def acts(self) -> bool:
        """Whether orders are given, now."""
        return not self._released

    def release(self) -> None:
        """Give no more orders: nodes go to their highest clocks under their ceilings."""
        self._released = True

    def close(self) -> None:
        """Give no more orders, and take no more reports in; may be called twice."""
        self._released = self._closed = True


def _joined(kind: Any, batches: list[Any]) -> Any:
    if not batches:
        return kind.empty()
    names = kind.__slots__
    return kind(**{name: np.concatenate([getattr(one, name) for one in batches]) for name in names})


def hub_app(hub: HubBackend, token: str) -> Any:
    """ASGI application that agents report to: POST ``/v1/report``, GET ``/v1/health``.

    Parameters
    ----------
    hub : HubBackend
        The fleet.
    token : str
        What agents must show as a bearer token.

    Raises
    ------
    ConfigError
        If starlette is not installed or the token is shorter than 16 characters.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
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
    if len(token) < 16:
        raise ConfigError(
            f"token: expected at least 16 characters, got {len(token)}; make one with"
            ' python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )

    def refused(status: int, message: str) -> Response:
        return JSONResponse({"error": message}, status_code=status)

    async def report(request: Request) -> Response:
        shown = request.headers.get("authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            return refused(401, "expected the bearer token of this controller")
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > MAX_BYTES:
                return refused(413, f"expected at most {MAX_BYTES} bytes")
        try:
            order = hub.take(decode_report(data, hub.spec))
            return Response(encode_order(order, hub.spec), media_type="application/json")
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
        ],
        exception_handlers={HTTPException: not_found},
    )


class HubServer:
    """Serves an application in a thread of its own.

    Parameters
    ----------
    app : ASGI application
        Of :func:`hub_app`.
    host : str
        Address to listen on.
    port : int
        0 for any that is free.
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
    >>> with HubServer(app) as server:
    ...     server.port > 0
    True
    """

    def __init__(
        self,
        app: Any,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._server = bounded_server(app, what="controller", tls_cert=tls_cert, tls_key=tls_key)
        self._sockets = listen(host, port, what="controller")
        self.port = int(self._sockets[0].getsockname()[1])
        self._thread = threading.Thread(
            target=self._server.run, args=(self._sockets,), name="voltana-ctrl-hub", daemon=True
        )
        self._thread.start()
        begin_s = time.monotonic()
        while not self._server.started and time.monotonic() - begin_s < 10.0:
            if not self._thread.is_alive():
                raise BackendError("controller: the HTTP server did not start")
            time.sleep(0.01)

    def close(self) -> None:
        """Stop serving; may be called twice."""
        self._server.should_exit = True
        self._thread.join(5.0)
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.close()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


if TYPE_CHECKING:
    _: type[Backend] = HubBackend
