"""The control loop: read, decide, guard, apply, publish, record, sleep."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from voltana_ctrl.clock import WallClock
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.guard import Guard
from voltana_ctrl.moved import forward
from voltana_ctrl.ports import (
    Backend,
    Clock,
    Observer,
    Router,
    backend_extras,
    controller_extras,
)
from voltana_ctrl.types import Decision, FleetState, Observation, Status, TickRecord

__all__ = ["ControlLoop"]

__getattr__ = forward(__name__)

_log = logging.getLogger(__name__)


class _Decides(Protocol):
    """What a policy is: a Controller, or the host's own object."""

    def init(self) -> Any: ...

    def decide(self, observation: Any, memory: Any) -> tuple[Decision, Any]: ...


class ControlLoop:
    """Runs a controller on a backend; gives the hardware back on the way out.

    Parameters
    ----------
    backend : Backend
        Simulated, replayed or real plant.
    controller : Controller or object with init/decide
        The policy; see :mod:`voltana_ctrl.ports` for what it may bring besides.
    guard : Guard, optional
        The veto; if left out one with default settings, and with what the backend says that
        other actuators may be set to.
    router : Router, optional
        Told every applied decision.
    clock : Clock, optional
        The backend's own if it has one, else the wall clock.
    observers : sequence of Observer
        Called with every TickRecord.
    raises : bool, optional
        Whether an error of the controller, or of an observer, ends the loop. Where it does not, an
        observer's is logged once; after the controller's the tick has a decision of status
        ``FAILED``, which the guard replaces, the error is logged and counted in `failures`, and
        the controller is asked again at the next tick, with the memory that it
        had. If left out, it does where the backend brings its own time (simulation and replay,
        where a mistake should be seen at once), and not on hardware.

    Raises
    ------
    ConfigError
        If the controller has no init/decide, or it or the backend bring something else under the
        name of something that they may bring.

    Examples
    --------
    >>> from voltana_ctrl import ControlLoop, FleetSpec, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> workload = make_workload("sharegpt", rate_req_s=2.0, duration_s=10.0, seed=0)
    >>> with ControlLoop(SimBackend(fleet, workload=workload),
    ...                  StaticController(fleet, 1005)) as loop:
    ...     loop.run(1.0)
    ...     loop.state.freq_mhz
    array([1005., 1005.])
    """

    def __init__(
        self,
        backend: Backend,
        controller: _Decides,
        guard: Guard | None = None,
        router: Router | None = None,
        *,
        clock: Clock | None = None,
        observers: Sequence[Observer] = (),
        raises: bool | None = None,
    ) -> None:
        for name in ("init", "decide"):
            if not callable(getattr(controller, name, None)):
                raise ConfigError(
                    f"ControlLoop: expected a controller with init() and decide(observation,"
                    f" memory), got {controller!r} without {name}"
                )
        self.backend = backend
        self.controller = controller
        brought, self._controller_extras = backend_extras(backend), controller_extras(controller)
        self.guard = guard or Guard(backend.spec, ranges=brought.limit_ranges)
        self.router = router
        self.clock: Clock = clock or brought.clock or WallClock()
        self._acts = brought.acts
        self.observers = tuple(observers)
        self.period_s = self._controller_extras.period_s
        self.ticks = 0
        self.interventions = 0
        self.failures = 0
        self._raises = brought.clock is not None if raises is None else raises
        self._memory = controller.init()
        self._applied: Decision | None = None
        self._state: FleetState | None = None
        self._missed = 0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._untaken: Observation | None = None
        self._failed: list[Observer] = []

    @property
    def state(self) -> FleetState:
        """State that the latest tick read, for routers; an idle fleet before the first."""
        return self._state or FleetState.idle(len(self.backend.spec))

    @property
    def applied(self) -> Decision | None:
        """Decision that the latest tick applied; None before the first."""
        return self._applied

    def tick(self) -> TickRecord:
        """Turn once: read, decide, guard, apply, tell the router, tell the observers.

        Returns
        -------
        TickRecord
            What the observers are told, too.
        """
        begin_s = time.perf_counter()
        observation = self.backend.read()
        decide_begin_s = time.perf_counter()
        proposed, memory = self._decide(observation)
        decide_s = time.perf_counter() - decide_begin_s
        applied = self.guard.shield(proposed, observation, self._applied)
        said = self.guard.changes(proposed, applied)
        self.backend.apply(applied)
        in_force = self._acts()
        if self.router is not None:
            self.router.update(applied)
        # Only now, so that a tick that failed half-way can be repeated.
        self._memory = memory
        self._applied = applied
        self._state = observation.state
        self.interventions += bool(said)
        record = TickRecord(
            number=self.ticks,
            observation=observation,
            proposed=proposed,
            applied=applied,
            in_force=in_force,
            interventions=said,
            decide_s=decide_s,
            tick_s=time.perf_counter() - begin_s,
            missed=self._missed,
            notes=self._controller_extras.notes(memory),
        )
        self.ticks += 1
        for observer in self.observers:
            try:
                observer.on_tick(record)
            except Exception:
                if self._raises:
                    raise
                self._misses(observer)
        return record

    def _misses(self, observer: Observer) -> None:
        """A page or a log that fails ends no control; it is said once of each."""
        if observer not in self._failed:
            self._failed.append(observer)
            _log.exception("voltana-ctrl: %s misses ticks", type(observer).__name__)

    def _decide(self, observation: Observation) -> tuple[Decision, Any]:
        """What the controller says; where it raises, a decision that the guard replaces.

        What it could not take in, such as who arrived, is told with the next observation: else it
        would take the time in which it failed for one without requests.
        """
        if self._untaken is not None:
            observation = observation.behind(self._untaken)
        try:
            answer = _understood(
                self.controller.decide(observation, self._memory), self.controller, observation
            )
            self._untaken = None
            return answer
        except Exception:
            if self._raises:
                raise
            self._untaken = observation
            self.failures += 1
            _log.exception("voltana-ctrl: the controller failed at tick %d", self.ticks)
            spec, t_s = self.backend.spec, observation.state.t_s
            return Decision.highest(spec, t_s=t_s, status=Status.FAILED), self._memory

    def run(self, until_s: float) -> None:
        """Tick every period until `until_s` on the loop's clock, or until :meth:`stop`.

        Missed deadlines are skipped and counted in the next record, never made up for.
        """
        start_s = self.clock.now_s()
        number = 0
        while not self._stopping.is_set():
            due_s = start_s + number * self.period_s
            if due_s >= until_s:
                break
            self.clock.sleep_until_s(due_s)
            if self._stopping.is_set():
                return
            self.tick()
            late = int((self.clock.now_s() - due_s) / self.period_s)
            self._missed = late
            number += 1 + late
        if not self._stopping.is_set():
            self.clock.sleep_until_s(until_s)

    def start(self) -> None:
        """Run in a thread of its own until :meth:`stop`.

        Raises
        ------
        ConfigError
            If it runs already.
        """
        if self._thread is not None:
            raise ConfigError("ControlLoop.start: it runs already; call stop() first")
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run_thread, name="voltana-ctrl", daemon=True)
        self._thread.start()

    def _run_thread(self) -> None:
        try:
            self.run(float("inf"))
        except BaseException as error:  # noqa: BLE001  handed to whoever calls stop()
            self._failure = error
            self.backend.close()

    def stop(self) -> None:
        """Stop the thread; raises what ended it, if it failed.

        Raises
        ------
        BackendError
            With the failure as its cause, if a tick failed.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise BackendError(f"the control loop stopped: {failure}") from failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self.backend.close()


def _understood(answer: Any, controller: object, observation: Observation) -> tuple[Decision, Any]:
    """What a controller returned, or how it should have been, in its own terms."""
    who = f"{type(controller).__name__}.decide"
    expected = "expected a pair (Decision, memory)"
    if isinstance(answer, Decision):
        raise ConfigError(f"{who}: {expected}, got the Decision alone; end it with `, memory`")
    if not (isinstance(answer, tuple) and len(answer) == 2):
        got = "nothing" if answer is None else type(answer).__name__
        raise ConfigError(f"{who}: {expected}, got {got}; end it with `return decision, memory`")
    decision, memory = answer
    if not isinstance(decision, Decision):
        raise ConfigError(
            f"{who}: {expected}, got {type(decision).__name__} for the Decision; begin with"
            " Decision.highest(fleet), and dataclasses.replace what differs"
        )
    instances = len(observation.state.freq_mhz)
    if len(decision.freq_mhz) != instances:
        raise ConfigError(
            f"{who}: expected a Decision for {instances} instances, got one for"
            f" {len(decision.freq_mhz)}"
        )
    return decision, memory
