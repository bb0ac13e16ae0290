"""Protocols at the edges: what a host may bring, and what we call it with.

None of them has to be inherited from; an object with these methods will do. What some bring besides
is said here, too, and looked for once:

=========== ================== =====================================================================
who         may bring          what it is
=========== ================== =====================================================================
backend     ``clock``          a :class:`Clock`: its own time, as a simulated plant has
backend     ``limit_ranges``   what may be set besides the SM clock, for the guard
backend     ``acts``           whether decisions are in force, now; one that only watches says False
backend     ``problems()``     what is wrong with the readings of instances, in words, by their ids
backend     ``delay_s()``      measured time from asking for a clock until it runs, by ids
controller  ``period_s``       time between its decisions; 0.1 s without
controller  ``notes(memory)``  numbers that it wants seen in the records
router      ``phase``          "prefill" or "decode", which is what it is without
governor    ``believe(b, i)``  takes what a :class:`~voltana_ctrl.types.Belief` says of its instance
=========== ================== =====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import (
    Belief,
    Decision,
    FleetSpec,
    FleetState,
    LimitRanges,
    Observation,
    Request,
    TickRecord,
)

__all__ = [
    "Backend",
    "BackendExtras",
    "Clock",
    "ControllerExtras",
    "Governor",
    "Observer",
    "Predictor",
    "Router",
    "backend_extras",
    "believe_of",
    "controller_extras",
    "phase_of",
]

_PERIOD_S = 0.1
Phase = Literal["prefill", "decode"]


@runtime_checkable
class Backend(Protocol):
    """A plant: simulated, replayed, or hardware.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> workload = make_workload("sharegpt", rate_req_s=1.0, duration_s=9.0, seed=0)
    >>> isinstance(SimBackend(fleet, workload=workload), Backend)
    True
    """

    @property
    def spec(self) -> FleetSpec:
        """The fleet behind it."""

    def read(self) -> Observation:
        """State now, and the iterations and finished requests since the last read."""

    def apply(self, decision: Decision) -> None:
        """Carry out a decision; idempotent; raises ActuationDenied where it cannot."""

    def close(self) -> None:
        """Give the hardware back as it was found; may be called twice."""


@runtime_checkable
class Clock(Protocol):
    """The loop's time.

    Examples
    --------
    >>> from voltana_ctrl.clock import WallClock
    >>> isinstance(WallClock(), Clock)
    True
    """

    def now_s(self) -> float:
        """Seconds on a clock that never goes back."""

    def sleep_until_s(self, t_s: float) -> None:
        """Return at `t_s` or at once if that has passed."""


@runtime_checkable
class Predictor(Protocol):
    """Latency and power of one instance at (clock, load); pure."""

    def itl_s(self, freq_mhz: float, running_req: float, kv_used_tok: float) -> float:
        """Time [s] of a decode iteration."""

    def prefill_s(self, freq_mhz: float, new_tok: float) -> float:
        """Time [s] to prefill this many prompt tokens."""

    def power_w(self, freq_mhz: float, running_req: float, kv_used_tok: float) -> float:
        """Mean power [W] while decoding."""


@runtime_checkable
class Router(Protocol):
    """Picks the instance for a request.

    Examples
    --------
    >>> class First:
    ...     def route(self, request, state): return 0
    ...     def update(self, decision): pass
    >>> isinstance(First(), Router)
    True
    """

    def route(self, request: Request, state: FleetState) -> int:
        """Index in the fleet of the instance that the request goes to.

        It is one of the phase that this router serves.
        """

    def update(self, decision: Decision) -> None:
        """Take shares, active set and prices of the latest decision."""


@runtime_checkable
class Governor(Protocol):
    """Picks the clock of one instance before each of its iterations.

    Compiled governors carry a Numba function of the signature
    :data:`voltana_ctrl.kernels.choose.base.GOVERNOR_SIGNATURE` besides, so that the simulator can
    call them without Python.

    Examples
    --------
    >>> class Highest:
    ...     def step(self, running_req, kv_used_tok, waiting_tok, oldest_wait_s,
    ...              floor_mhz, ceiling_mhz):
    ...         return ceiling_mhz
    >>> isinstance(Highest(), Governor)
    True
    """

    def step(
        self,
        running_req: float,
        kv_used_tok: float,
        waiting_tok: float,
        oldest_wait_s: float,
        floor_mhz: float,
        ceiling_mhz: float,
    ) -> float:
        """Clock for the next iteration, in MHz."""


@runtime_checkable
class Observer(Protocol):
    """Sees every tick (metrics, log, tests).

    Examples
    --------
    >>> seen = []
    >>> class Keep:
    ...     def on_tick(self, record): seen.append(record)
    >>> isinstance(Keep(), Observer)
    True
    """

    def on_tick(self, record: TickRecord) -> None:
        """Look at one tick; it is called within the tick, so it must not raise or block."""


# What a host may bring besides


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendExtras:
    """What a backend brings besides the minimum.

    Parameters
    ----------
    clock : Clock, optional
        The backend's own time.
    limit_ranges : LimitRanges, optional
        What may be set besides the SM clock.
    acts, problems, delay_s : callable
        Without arguments. They tell whether decisions are in force; by the id of an instance why
        it does not answer; and by the id, in seconds, how late its clocks come.

    Examples
    --------
    >>> extras = BackendExtras(acts=lambda: True, problems=dict, delay_s=dict)
    >>> extras.clock is None, extras.problems()
    (True, {})
    """

    clock: Clock | None = None
    limit_ranges: LimitRanges | None = None
    acts: Callable[[], bool]
    problems: Callable[[], Mapping[str, str]]
    delay_s: Callable[[], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerExtras:
    """What a controller brings besides the minimum.

    Parameters
    ----------
    period_s : float
        Time between its decisions; 0.1 where the controller does not say.
    notes : callable
        Called with its memory; returns the numbers, by name, that it wants seen in the records.

    Examples
    --------
    >>> ControllerExtras(period_s=1.0, notes=lambda memory: {"ticks": memory}).notes(3.0)
    {'ticks': 3.0}
    """

    period_s: float
    notes: Callable[[Any], Mapping[str, float]]


def backend_extras(backend: object) -> BackendExtras:
    """Look once for what a backend brings besides the minimum.

    Parameters
    ----------
    backend : Backend
        Any object.

    Raises
    ------
    ConfigError
        If something of that name is there and is something else.

    Examples
    --------
    >>> class Watching:
    ...     acts = False
    >>> backend_extras(Watching()).acts()
    False
    """
    name = type(backend).__name__
    clock = getattr(backend, "clock", None)
    if clock is not None and not isinstance(clock, Clock):
        raise ConfigError(f"{name}.clock: expected now_s() and sleep_until_s(t_s), got {clock!r}")
    ranges = getattr(backend, "limit_ranges", None)
    if ranges is not None and not isinstance(ranges, LimitRanges):
        raise ConfigError(f"{name}.limit_ranges: expected LimitRanges, got {ranges!r}")
    switch: Any = backend
    asked = {key: getattr(backend, key, dict) for key in ("problems", "delay_s")}
    for key, method in asked.items():
        if not callable(method):
            raise ConfigError(f"{name}.{key}: expected a method without arguments, got {method!r}")
    return BackendExtras(
        clock=clock,
        limit_ranges=ranges,
        acts=(lambda: bool(switch.acts)) if hasattr(backend, "acts") else lambda: True,
        **asked,
    )


def _no_notes(_memory: Any) -> Mapping[str, float]:
    return {}


def controller_extras(controller: object) -> ControllerExtras:
    """Look once for what a controller brings besides the minimum.

    Parameters
    ----------
    controller : Controller
        Any object.

    Raises
    ------
    ConfigError
        If something of that name is there and is something else.

    Examples
    --------
    >>> controller_extras(object()).period_s
    0.1
    """
    name = type(controller).__name__
    notes = getattr(controller, "notes", None)
    if notes is not None and not callable(notes):
        raise ConfigError(f"{name}.notes: expected a method notes(memory), got {notes!r}")
    told = getattr(controller, "period_s", _PERIOD_S)
    try:
        period_s = float(told)
    except (TypeError, ValueError):
        period_s = math.nan
    if not 0.0 < period_s < math.inf:
        raise ConfigError(f"{name}.period_s: expected a number of seconds > 0, got {told!r}")
    return ControllerExtras(period_s=period_s, notes=notes or _no_notes)


def phase_of(router: object) -> Phase:
    """Phase that a router serves; on a colocated fleet it picks once, whatever it says.

    Parameters
    ----------
    router : Router
        Any object.

    Raises
    ------
    ConfigError
        If its `phase` is neither.

    Examples
    --------
    >>> phase_of(object())
    'decode'
    """
    phase = getattr(router, "phase", "decode")
    if phase not in ("prefill", "decode"):
        raise ConfigError(
            f"{type(router).__name__}.phase: expected 'prefill' or 'decode', got {phase!r}"
        )
    return "prefill" if phase == "prefill" else "decode"


def believe_of(governor: object) -> Callable[[Belief, int], None] | None:
    """Look once whether a governor takes what is believed about its instance.

    Parameters
    ----------
    governor : Governor
        Any object.

    Returns
    -------
    callable or None
        Its method ``believe(belief, i)``, where `i` is the number of its instance.

    Raises
    ------
    ConfigError
        If something of that name is there and cannot be called.

    Examples
    --------
    >>> believe_of(object()) is None
    True
    """
    believe: Callable[[Belief, int], None] | None = getattr(governor, "believe", None)
    if believe is not None and not callable(believe):
        raise ConfigError(
            f"{type(governor).__name__}.believe: expected a method believe(belief, i),"
            f" got {believe!r}"
        )
    return believe
