"""How long after it is asked for a clock runs, measured on the machine for the control model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from voltana_ctrl.checks import F64, count, freeze_fields, not_negative, positive
from voltana_ctrl.types import FleetSpec, Observation

__all__ = ["DeadTime", "SetsClocks", "measure_dead_time"]


class SetsClocks(Protocol):
    """What is measured: a backend such as NvmlBackend."""

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""

    @property
    def actuation_s(self) -> F64:
        """Median seconds that setting an instance's clock takes, shape (n,)."""

    def read(self) -> Observation:
        """State now, of which the clocks are looked at."""

    def set_clock(self, instance: int, freq_mhz: float) -> None:
        """Set the clock of one instance."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeadTime:
    """Delays of one machine's clock sets.

    Parameters
    ----------
    call_s : ndarray, shape (n,)
        Median seconds that the driver calls take that set an instance's clock.
    settle_s : ndarray, shape (n,)
        Median seconds from their end until the clock is read back; NaN where it was not.

    Raises
    ------
    ConfigError, ShapeError
        If a duration is negative.

    Examples
    --------
    >>> import numpy as np
    >>> dead = DeadTime(call_s=[0.004, 0.005], settle_s=[0.03, np.nan])
    >>> round(dead.delay_s(), 3), round(dead.delay_s(unseen_settle_s=0.05), 3)
    (0.039, 0.059)
    """

    call_s: F64
    settle_s: F64

    def __post_init__(self) -> None:
        freeze_fields(self, ("call_s", "settle_s"), (np.asarray(self.call_s).size,))
        for value_s in (*self.call_s, *np.nan_to_num(self.settle_s)):
            not_negative("DeadTime", float(value_s))

    def delay_s(self, *, unseen_settle_s: float = 0.02) -> float:
        """Seconds from asking for new clocks until all of them run: `delay_s` of a controller.

        Sets of one machine follow one another, so that the last instance waits for all calls.

        Parameters
        ----------
        unseen_settle_s : float
            Settling time in seconds of instances whose clock was not seen to settle. Published
            figures lie between 1 and 500 ms.

        Returns
        -------
        float
            Sum of all calls, and the longest settling.
        """
        settle_s = np.where(np.isnan(self.settle_s), unseen_settle_s, self.settle_s)
        return float(self.call_s.sum() + settle_s.max())


def measure_dead_time(
    backend: SetsClocks,
    *,
    ceiling_mhz: F64 | None = None,
    repeats: int = 5,
    settle_limit_s: float = 0.5,
    now_s: Callable[[], float] = time.perf_counter,
) -> DeadTime:
    """Time clock sets, for the model of the controller, before it starts.

    Moves every instance a few times between its two highest clocks, which costs no latency, and
    leaves it at the highest. How the clock settles is seen only under load or where an idle GPU
    shows its lock; below a power cap or a clamp it is not.

    Parameters
    ----------
    backend : NvmlBackend
        Backend that is open to set clocks; a recorded or simulated plant needs no measuring.
    ceiling_mhz : ndarray, shape (n,), optional
        Highest clocks to set; the highest supported ones by default.
    repeats : int
        How often each instance is set down and up.
    settle_limit_s : float
        Seconds to watch for the clock after a set.
    now_s : callable
        Returns the seconds to measure with.

    Returns
    -------
    DeadTime
        Calls and settling of every instance.

    Raises
    ------
    ConfigError
        If a setting is outside its range.
    ActuationDenied, BackendError
        If a clock cannot be set.

    Examples
    --------
    >>> def start(fleet, gpus, slo):
    ...     from voltana_ctrl import ControlLoop, MpcController
    ...     from voltana_ctrl.backends import NvmlBackend
    ...     backend = NvmlBackend(fleet, gpus)
    ...     delay_s = measure_dead_time(backend).delay_s()
    ...     return ControlLoop(backend, MpcController(fleet, slo, governed=False, delay_s=delay_s))
    """
    count("measure_dead_time.repeats", repeats)
    positive("measure_dead_time.settle_limit_s", settle_limit_s)
    fleet = backend.spec
    ceiling = fleet.max_mhz if ceiling_mhz is None else np.asarray(ceiling_mhz, dtype=np.float64)
    settle_s = np.full(len(fleet), np.nan)
    for i, instance in enumerate(fleet.instances):
        clocks_mhz = instance.clocks_mhz[instance.clocks_mhz <= ceiling[i]]
        two_mhz = (clocks_mhz if clocks_mhz.size else instance.clocks_mhz[:1])[-2:]
        settle_s[i] = _settle_s(backend, i, np.tile(two_mhz, repeats), settle_limit_s, now_s)
    return DeadTime(call_s=backend.actuation_s, settle_s=settle_s)


def _settle_s(
    backend: SetsClocks,
    instance: int,
    clocks_mhz: F64,
    limit_s: float,
    now_s: Callable[[], float],
) -> float:
    """Set one clock after the other; median time until each is seen, NaN if one is not."""
    seen_s = []
    for mhz in clocks_mhz:
        backend.set_clock(instance, float(mhz))
        if np.nan in seen_s:
            continue  # a cap, a clamp or idleness hides it: no use watching again
        begin_s = now_s()
        while backend.read().state.freq_mhz[instance] != mhz and now_s() - begin_s < limit_s:
            pass
        span_s = now_s() - begin_s
        seen_s.append(span_s if span_s < limit_s else np.nan)
    return float(np.median(seen_s))
