"""One GPU of a controller: what was read, what is set on it, what it turned out to do."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from voltana_ctrl.backends.meter import IDLE, POWER_CAP, GpuMeter, GpuReading
from voltana_ctrl.backends.nvml.driver import Gpu, GpuLost
from voltana_ctrl.backends.nvml.giveback import FoundGpu
from voltana_ctrl.errors import BackendError

__all__ = ["ClockSetter", "GpuCapability", "HeldGpu"]

# What explains a clock below its lock: power, hardware and thermal slowdowns, power brake.
_SLOWED = POWER_CAP | 0x8 | 0x20 | 0x40 | 0x80
_REPEATS = 3
_CALLS_KEPT = 256


class ClockSetter(Protocol):
    """Whoever carries out a clock set: the driver itself, or the privileged setter."""

    def lock_clock(self, lo_mhz: int, hi_mhz: int) -> None:
        """Hold the SM clock between two supported clocks."""

    def reset_clock(self) -> None:
        """Give the SM clock back to the driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCapability:
    """What one GPU turned out to do, as far as it was seen.

    Parameters
    ----------
    uuid, name : str
        UUID and name of the GPU.
    clamp_mhz : float or None
        Highest clock reached under a higher lock without an event reason: locks above are
        silently clamped. None if that was not seen.
    cap_inert : bool or None
        Whether a power cap below the power drawn had no effect; None if none was tried.
    energy_counter : bool
        Whether energy is counted by the board; else it is integrated from power.
    set_calls : int
        Clock sets that were timed, of late.
    set_call_s, set_call_p99_s : float
        Median and 99th percentile of the seconds that they took; 0 before the first. The clock
        settles after the call; the call alone is timed.
    locks_lost : int
        Times that a lock of ours was gone (reset by somebody else) and set again.
    energy_restarts : int
        Times that the energy counter restarted or jumped.
    failure : str or None
        Why it does not answer, and what to do; None while it does.

    Examples
    --------
    >>> GpuCapability(uuid="GPU-0", name="A100", energy_counter=True).clamp_mhz is None
    True
    """

    uuid: str
    name: str
    clamp_mhz: float | None = None
    cap_inert: bool | None = None
    energy_counter: bool
    set_calls: int = 0
    set_call_s: float = 0.0
    set_call_p99_s: float = 0.0
    locks_lost: int = 0
    energy_restarts: int = 0
    failure: str | None = None


class HeldGpu:
    """One GPU of ours.

    Parameters
    ----------
    gpu : Gpu
        For reading, and for memory clock and power cap.
    sets : ClockSetter
        For setting the SM clock.
    """

    def __init__(self, gpu: Gpu, sets: ClockSetter) -> None:
        self.gpu = gpu
        self.sets = sets
        self.clocks_mhz = frozenset(gpu.clocks_mhz)
        self.mem_clocks_mhz = frozenset(gpu.mem_clocks_mhz)
        self.found_cap_w = gpu.power_cap_w
        self.cap_range_w = gpu.power_cap_range_w
        ladder = sorted(self.clocks_mhz)
        self.step_mhz = min((b - a for a, b in pairwise(ladder)), default=15)
        self.meter = GpuMeter(highest_w=gpu.highest_w)
        self.failure: str | None = None
        self.lock_mhz: int | None = None
        self.mem_mhz: int | None = None
        self.cap_w: float | None = None
        self.touched = FoundGpu(uuid=gpu.uuid)
        self.calls_s: deque[float] = deque(maxlen=_CALLS_KEPT)
        self.set_s = 0.0
        self.clamp_mhz: float | None = None
        self.cap_inert: bool | None = None
        self.locks_lost = 0
        self._below = self._above = self._over_cap = 0

    def take(self, reading: GpuReading, t_s: float, settle_s: float) -> None:
        """Take a reading, and learn from it what the GPU makes of our settings."""
        self.failure = None
        self.meter.take(t_s, reading)
        if t_s - self.set_s >= settle_s:
            self._compare(reading)

    def _compare(self, reading: GpuReading) -> None:
        """What was asked against what is seen, once the clock has settled."""
        clock_mhz, reasons = reading.clock_mhz, reading.reasons
        if self.lock_mhz is not None and clock_mhz is not None:
            # Without reasons nobody can tell a clamp from heat, a cap or an idle GPU.
            free = reasons is not None and not reasons & (_SLOWED | IDLE)
            below = free and clock_mhz <= self.lock_mhz - self.step_mhz
            self._below = self._below + 1 if below else 0
            if self._below >= _REPEATS:
                self.clamp_mhz = clock_mhz
            elif self.clamp_mhz is not None and clock_mhz > self.clamp_mhz:
                self.clamp_mhz = None
            above = clock_mhz >= self.lock_mhz + self.step_mhz
            self._above = self._above + 1 if above else 0
            if self._above >= _REPEATS:
                self.lock_mhz, self._above = None, 0  # somebody reset it: the next apply sets it
                self.locks_lost += 1
        if self.cap_w is not None and reading.power_w is not None:
            over = reading.power_w > 1.05 * self.cap_w
            self._over_cap = self._over_cap + 1 if over else 0
            if self._over_cap >= _REPEATS:
                self.cap_inert = True
            elif reasons is not None and reasons & POWER_CAP:
                self.cap_inert = False

    def fail(self, error: BackendError, t_s: float) -> None:
        """Note that the GPU did not answer, and why.

        Once the driver says that it is gone, or it has never answered, or not for longer than
        :data:`~voltana_ctrl.backends.meter.FRESH_S`, what was set on it is taken for lost, so that
        the next apply sets it again.

        Parameters
        ----------
        error : BackendError
            What the driver said.
        t_s : float
            When, on the backend's clock.
        """
        self.failure = str(error)
        self.meter.fail(t_s, self.failure, lost=isinstance(error, GpuLost))
        if not self.meter.alive(t_s):
            self.forget_sets()

    def forget_sets(self) -> None:
        """What was set may be gone; the next apply sets it again."""
        self.lock_mhz = self.mem_mhz = self.cap_w = None

    @property
    def settable_cap_w(self) -> tuple[float, float]:
        """Lowest and highest power cap that we may set; the lowest above the highest if none."""
        if self.cap_range_w is None or self.found_cap_w is None:
            return np.inf, 0.0
        return self.cap_range_w[0], min(self.cap_range_w[1], self.found_cap_w)

    @property
    def capability(self) -> GpuCapability:
        """What it has shown so far."""
        calls_s = np.array(self.calls_s)
        return GpuCapability(
            uuid=self.gpu.uuid,
            name=self.gpu.name,
            clamp_mhz=self.clamp_mhz,
            cap_inert=self.cap_inert,
            energy_counter=self.meter.counts,
            set_calls=len(calls_s),
            set_call_s=float(np.median(calls_s)) if len(calls_s) else 0.0,
            set_call_p99_s=float(np.quantile(calls_s, 0.99)) if len(calls_s) else 0.0,
            locks_lost=self.locks_lost,
            energy_restarts=self.meter.restarts,
            failure=self.failure,
        )
