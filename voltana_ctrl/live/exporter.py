"""Prometheus metrics of a control loop, in a registry of their own.

Names follow the conventions of Prometheus: base units (seconds, joules, watts, hertz, ratios),
``_total`` on counters. Every label has few values, known at the start: instances of the fleet,
classes of requests, statuses, and kinds of interventions of the guard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import F64, Bool, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.estimate import EnergyLedger, RequestClasses
from voltana_ctrl.ports import Observer
from voltana_ctrl.serving.server import ServerThread
from voltana_ctrl.types import FleetSpec, FleetState, IterationBatch, Slo, Status, TickRecord

__all__ = ["Exporter"]

_HZ_PER_MHZ = 1e6
_TICK_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# Kinds of interventions of the guard; whatever else it may say one day is "other".
_KINDS = (
    "active set", "floor held by slew", "limits", "shares", "other",
    *(f"replaced: {status.name.lower()}" for status in Status),
)  # fmt: skip
_MOST_NOTES = 32
# Gauges per instance: name, what it is, field of the state or the applied decision, factor.
# What is decided and not carried out has names of its own, with "advised_" before.
_STATE = (
    ("power_watts", "Power drawn.", "power_w", 1.0),
    ("sm_clock_hertz", "SM clock as read.", "freq_mhz", _HZ_PER_MHZ),
    ("queue_tokens", "Prompt tokens that wait or are being prefilled.", "queue_tok", 1.0),
    ("queue_requests", "Requests that wait or are being prefilled.", "queue_req", 1.0),
    ("oldest_wait_seconds", "Age of the oldest of them.", "oldest_wait_s", 1.0),
    ("running_requests", "Requests that generate.", "running_req", 1.0),
    ("kv_cache_tokens", "Tokens in the KV cache.", "kv_used_tok", 1.0),
    ("reading_age_seconds", "Age of the readings.", "age_s", 1.0),
    ("up", "1 while the instance answers.", "alive", 1.0),
)
_OF_GPUS = ("power_w", "freq_mhz")
_APPLIED = (
    ("sm_clock_floor_hertz", "Lowest SM clock asked for.", "freq_mhz", _HZ_PER_MHZ),
    ("sm_clock_ceiling_hertz", "Highest SM clock allowed.", "freq_max_mhz", _HZ_PER_MHZ),
    ("route_ratio", "Share of new work of its phase.", "route_frac", 1.0),
    ("active", "1 while the instance takes new work.", "active", 1.0),
    (
        "price_joules", "Marginal energy of one more request; 0 where nobody here routes.",
        "price_j_req", 1.0,
    ),
)  # fmt: skip


class Exporter:
    """Observer that turns ticks into Prometheus metrics, all named ``voltana_ctrl_...``.

    Energy per output token is over the last `window_s`; energy per class of requests is
    charged by :class:`~voltana_ctrl.estimate.EnergyLedger` where engines tell their
    iterations, the energy of an instance between two ticks shared over them by time.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    slo : Slo, optional
        What attainment is judged by; it is not told without.
    classes : RequestClasses, optional
        Classes of requests; by prompt length if left out.
    window_s : float
        Seconds over which energy per token and attainment are taken.
    unread : collection of str
        Ids of instances whose GPUs nobody reads. There is no series of their clock, power and
        energy, and no energy per token while one of them is up. There is none of the power of an
        instance whose power cannot be read for the moment either.
    decides : bool
        False where nobody decides anything: there are no series of decisions per instance.
    in_engine : mapping of str to bool, optional
        By the id of an instance whether the governor inside its engine chooses its clock, before
        every iteration, or the node's agent does, at every tick; there is no series of the others.

    Raises
    ------
    ConfigError
        If prometheus-client is not installed or the window is not positive.

    Examples
    --------
    >>> from voltana_ctrl import ControlLoop, FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = SimBackend(fleet, workload=make_workload("fixed", rate_req_s=4.0, duration_s=9.0))
    >>> exporter = Exporter(fleet, slo=Slo(ttft_s=0.6, itl_s=0.06))
    >>> with ControlLoop(plant, StaticController(fleet, 1005), observers=[exporter]) as loop:
    ...     loop.run(5.0)
    >>> for line in exporter.page().decode().splitlines():
    ...     if line.startswith("voltana_ctrl_sm_clock_hertz"):
    ...         print(line)
    voltana_ctrl_sm_clock_hertz{role="prefill",serving_instance="prefill-0"} 1.005e+09
    voltana_ctrl_sm_clock_hertz{role="decode",serving_instance="decode-0"} 1.005e+09
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        slo: Slo | None = None,
        classes: RequestClasses | None = None,
        window_s: float = 60.0,
        unread: Collection[str] = (),
        decides: bool = True,
        in_engine: Mapping[str, bool] | None = None,
    ) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigError(
                "Exporter: prometheus-client is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        positive("Exporter.window_s", window_s)
        self._client: Any = prometheus_client
        self.registry = prometheus_client.CollectorRegistry()
        self._slo = slo
        self._classes = classes or RequestClasses()
        self._class_names = self._classes.names
        self._ledger = EnergyLedger(instances=len(fleet), classes=self._classes)
        self._ledger_state: Any = None
        self._window_s = window_s
        self._window: deque[tuple[float, float, F64, F64]] = deque()
        self._before: FleetState | None = None
        self._server: ServerThread | None = None
        self._labels = [(one.id, one.role.value) for one in fleet.instances]
        self._decides = decides
        self._unread = np.array([name in unread for name in fleet.ids])
        self._notes: dict[str, Any] = {}
        self._make()
        governed = self._gauge(
            "engine_governor_active",
            "1 where the governor inside the engine chooses the clock, 0 where the agent does.",
            ("serving_instance", "role"),
        )
        for name, role in self._labels:
            if in_engine is not None and name in in_engine:
                governed.labels(name, role).set(float(in_engine[name]))

    def _make(self) -> None:
        # `instance` is Prometheus' own label, of what it scrapes.
        by_instance = ("serving_instance", "role")
        gauge, counter = self._gauge, self._counter
        self._state = [(field, factor, gauge(name, text, by_instance))
                       for name, text, field, factor in _STATE]  # fmt: skip
        self._applied = {
            in_force: [(field, factor, gauge(prefix + name, text, by_instance))
                       for name, text, field, factor in _APPLIED]
            for in_force, prefix in ((True, ""), (False, "advised_"))
        }  # fmt: skip
        self._energy = counter("energy_joules", "Energy drawn.", by_instance)
        self._per_tok = gauge("energy_per_output_token_joules", "Energy per output token.")
        self._output = counter("output_tokens", "Tokens generated.", ("request_class",))
        self._prompt = counter("prompt_tokens", "Prompt tokens served.", ("request_class",))
        self._requests = counter("requests", "Requests finished.", ("request_class",))
        self._charged = counter(
            "request_energy_joules", "Energy charged to finished requests.", ("request_class",)
        )
        self._met = counter("requests_met", "Requests that met an objective.", ("objective",))
        self._attained = gauge(
            "attainment_ratio", "Fraction of requests that met an objective.", ("objective",)
        )
        self._promised = gauge("attainment_promise_ratio", "The fraction that is promised.")
        self._margin = gauge("margin_ratio", "Margin kept to an objective.", ("objective",))
        self._guard = counter("guard_interventions", "Decisions that the guard changed.", ("kind",))
        self._decisions = counter("decisions", "Decisions by the controller's status.", ("status",))
        self._status = gauge("decision_status", "1 for the status of the latest.", ("status",))
        self._ticks = counter("ticks", "Turns of the loop.")
        self._missed = counter("ticks_missed", "Turns left out because one took too long.")
        self._tick_s = self._histogram("tick_duration_seconds", "Time of a turn of the loop.")
        self._decide_s = self._histogram("decide_duration_seconds", "Time of a decision.")
        self._note = gauge("note", "Whatever else the controller tells.", ("name",))
        for kind in _KINDS:
            self._guard.labels(kind)
        for status in Status:
            self._decisions.labels(status.name.lower())
        for name in self._class_names:
            for metric in (self._output, self._prompt, self._requests, self._charged):
                metric.labels(name)
        if self._slo is not None:
            self._promised.set(self._slo.attainment)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
        return self._client.Gauge(f"voltana_ctrl_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
        return self._client.Counter(f"voltana_ctrl_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Any:
        return self._client.Histogram(
            f"voltana_ctrl_{name}", text, registry=self.registry, buckets=_TICK_BUCKETS_S
        )

    def on_tick(self, record: TickRecord) -> None:
        """Take one tick."""
        state, before = record.observation.state, self._before
        for field, factor, gauge in self._state:
            values, hidden = getattr(state, field), np.zeros(len(state), bool)
            if field in _OF_GPUS:
                hidden = self._unread
            if field == "power_w":
                gauge.clear()  # no GPU draws nothing: 0 W is power that nobody could read
                hidden = hidden | (values == 0.0)
            _set(gauge, self._labels, values, factor, hidden)
        if self._decides:
            self._take_decision(record)
        grown_j = np.zeros(len(state))
        if before is not None and before.t_s <= state.t_s:
            grown_j = np.maximum(0.0, state.energy_j - before.energy_j)
        self._before = state
        for labels, energy_j, unread in zip(self._labels, grown_j, self._unread, strict=True):
            if not unread:
                self._energy.labels(*labels).inc(float(energy_j))
        self._take_requests(record, grown_j)
        self._take_control(record)

    def _take_decision(self, record: TickRecord) -> None:
        for _, _, gauge in self._applied[not record.in_force]:
            gauge.clear()
        for field, factor, gauge in self._applied[record.in_force]:
            _set(gauge, self._labels, getattr(record.applied, field), factor)

    def _take_requests(self, record: TickRecord, grown_j: F64) -> None:
        finished, t_s = record.observation.finished, record.observation.state.t_s
        key = self._classes.of(request_class=finished.request_class, prompt_tok=finished.prompt_tok)
        for k in np.unique(key):
            ours, name = key == k, self._class_names[int(k)]
            self._requests.labels(name).inc(int(ours.sum()))
            self._output.labels(name).inc(float(finished.output_tok[ours].sum()))
            self._prompt.labels(name).inc(float(finished.prompt_tok[ours].sum()))
        self._charge(record, grown_j)
        # Without a router no request is told; iterations tell the tokens that they decoded.
        made_tok = np.array(
            [finished.output_tok.sum(), record.observation.iterations.batch_req.sum()]
        )
        judged = np.zeros(4)
        if self._slo is not None:
            met = (finished.ttft_s <= self._slo.ttft_s, finished.itl_s <= self._slo.itl_s)
            judged[:] = len(finished), met[0].sum(), met[1].sum(), (met[0] & met[1]).sum()
            for objective, value in zip(("ttft", "itl", "both"), judged[1:], strict=True):
                self._met.labels(objective).inc(float(value))
        window = self._window
        # What an instance drew that nobody reads is missing in the sum.
        missing = np.any(self._unread & record.observation.state.alive)
        spent_j = np.nan if missing else float(grown_j.sum())
        window.append((t_s, spent_j, made_tok, judged))
        while window and not t_s - self._window_s <= window[0][0] <= t_s:
            window.popleft()
        finished_tok, decoded_tok = sum((entry[2] for entry in window), np.zeros(2))
        tok = finished_tok if finished_tok > 0.0 else decoded_tok
        self._per_tok.set(sum(entry[1] for entry in window) / tok if tok > 0.0 else np.nan)
        total = sum((entry[3] for entry in window), np.zeros(4))
        for objective, value in zip(("ttft", "itl", "both"), total[1:], strict=True):
            self._attained.labels(objective).set(value / total[0] if total[0] > 0.0 else np.nan)

    def _charge(self, record: TickRecord, grown_j: F64) -> None:
        """Charge the energy of iterations to the classes of the requests that finished."""
        observation = record.observation
        state = self._ledger_state
        t_s = observation.state.t_s
        if state is None or state.past_s[-1] > t_s:
            state = self._ledger.init(t_s=t_s)
        self._ledger_state, cost = self._ledger.update(
            state,
            t_s=t_s,
            iterations=_with_energy(observation.iterations, grown_j),
            finished=observation.finished,
        )
        for k in np.unique(cost.request_class):
            ours = cost.request_class == k
            spent_j = float(cost.energy_j[ours].sum())
            self._charged.labels(self._class_names[int(k)]).inc(max(0.0, spent_j))

    def _take_control(self, record: TickRecord) -> None:
        for said in record.interventions:
            self._guard.labels(said if said in _KINDS else "other").inc()
        told = record.proposed.status
        self._decisions.labels(told.name.lower()).inc()
        for status in Status:
            self._status.labels(status.name.lower()).set(float(status is told))
        self._ticks.inc()
        self._missed.inc(record.missed)
        self._tick_s.observe(record.tick_s)
        self._decide_s.observe(record.decide_s)
        for name, value in record.notes.items():
            if name in ("margin_ttft_frac", "margin_itl_frac"):
                self._margin.labels(name.split("_")[1]).set(value)
            elif name in self._notes or len(self._notes) < _MOST_NOTES:
                self._notes.setdefault(name, self._note.labels(name)).set(value)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        page: bytes = self._client.generate_latest(self.registry)
        return page

    def asgi(self) -> Any:
        """ASGI application that serves the page, to be mounted in a server of one's own.

        Returns
        -------
        callable
            It answers every path with the page.
        """
        return self._client.make_asgi_app(self.registry)

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve the page in a thread of its own until :meth:`close`.

        Parameters
        ----------
        port : int
            0 for any that is free.
        host : str
            Address to listen on.

        Returns
        -------
        int
            The port that is listened on.

        Raises
        ------
        BackendError
            If the port is taken.
        """
        self._server = ServerThread(self.asgi(), host, port, what="metrics")
        return self._server.port

    def close(self) -> None:
        """Stop serving; may be called twice."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()


def _set(
    gauge: Any,
    labels: list[tuple[str, str]],
    values: Any,
    factor: float,
    hidden: Bool | None = None,
) -> None:
    for i, (names, value) in enumerate(zip(labels, values, strict=True)):
        if hidden is None or not hidden[i]:
            gauge.labels(*names).set(float(value) * factor)


def _with_energy(iterations: IterationBatch, grown_j: F64) -> IterationBatch:
    """Iterations with energy: their own, or what their instance drew, shared by time."""
    if len(iterations) == 0 or np.nansum(iterations.energy_j) > 0.0:
        return iterations
    total_s = np.zeros(len(grown_j))
    np.add.at(total_s, iterations.instance, iterations.wall_s)
    share = iterations.wall_s / np.maximum(total_s[iterations.instance], 1e-12)
    return replace(iterations, energy_j=share * grown_j[iterations.instance])


if TYPE_CHECKING:
    _: type[Observer] = Exporter
