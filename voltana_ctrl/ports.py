"""Protocols at the edges: what a host may bring, and what we call it with.

None of them has to be inherited from; an object with these methods will do.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from voltana_ctrl.types import Decision, FleetSpec, FleetState, Observation, Request, TickRecord

__all__ = ["Backend", "Clock", "Governor", "Observer", "Predictor", "Router"]


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
        """State now, iterations and finished requests since the last read."""

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
    """Latency and power of one instance at (clock, load); pure.

    Examples
    --------
    >>> hasattr(Predictor, "itl_s")
    True
    """

    def itl_s(self, freq_mhz: float, running_req: float, kv_used_tok: float) -> float:
        """Time of a decode iteration."""

    def prefill_s(self, freq_mhz: float, new_tok: float) -> float:
        """Time to prefill this many prompt tokens."""

    def power_w(self, freq_mhz: float, running_req: float, kv_used_tok: float) -> float:
        """Mean power while decoding."""


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
        """Index of the instance, of the phase that this router serves."""

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
        """Look at one tick; must not raise or block."""
