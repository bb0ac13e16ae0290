"""What a GPU tells of itself, from whatever source: clock, power and energy, each on its own.

NVML, DCGM exporter and engines that measure themselves are read through the same meter. It keeps
what a board can do and drops the rest (blank values, jumps, NaN), knows the age of each figure,
and takes one figure from another where that is possible: power from the energy counter, energy
from power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voltana_ctrl.checks import within

__all__ = [
    "FRESH_S",
    "IDLE",
    "MOST_COUNTED_J",
    "MOST_W",
    "POWER_CAP",
    "EnergyMeter",
    "GpuMeter",
    "GpuReading",
    "InstanceMeter",
]

#: No single board or module draws as much; for boards that do not tell their power limit.
MOST_W = 5000.0
#: A figure that is older is no longer told.
FRESH_S = 5.0
#: No counter comes as far in ten years.
MOST_COUNTED_J = 1e13
# No SM runs as fast.
_MOST_MHZ = 10_000.0
# Counters advance in steps, up to this far behind the power they sum.
_COUNTER_LAG_S = 0.3
# Power from a counter is a mean over at least so long: several steps of the counter.
_SPAN_S = 1.0
# Over a longer silence nobody knows what was drawn.
_LONGEST_GAP_S = 60.0

#: Bits of the clock event reasons (NVML API reference, nvmlClocksEventReasons).
IDLE = 0x1
POWER_CAP = 0x4
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One reading of one GPU; None where a figure was not told.

    Parameters
    ----------
    clock_mhz : float, optional
        SM clock now.
    power_w : float, optional
        Power of the board now.
    counter_j : float, optional
        Energy counter, in joules since the driver was loaded.
    reasons : int, optional
        Clock event reasons as bits. None is not "no reason": some drivers do not tell any.
    problems : tuple of str
        Why figures are missing, one each.

    Examples
    --------
    >>> GpuReading(clock_mhz=1410.0, power_w=300.0, reasons=4).limited_by
    ('power cap',)
    """

    clock_mhz: float | None = None
    power_w: float | None = None
    counter_j: float | None = None
    reasons: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def limited_by(self) -> tuple[str, ...] | None:
        """What holds the clock down, in words; None where it is not told."""
        if self.reasons is None:
            return None
        return tuple(word for bit, word in _REASONS.items() if self.reasons & bit)


class EnergyMeter:
    """Sums energy from a counter, and from power where the counter cannot be believed.

    The sum never falls. An interval over which the counter fell (the driver was reloaded, the
    GPU reset, the counter wrapped) or rose by more than the board can draw is integrated from
    power by the trapezoidal rule instead, and so is what follows on a minute in which the counter
    stood still and power was drawn. Where power is not told it follows from the counter,
    as a mean over a second or more. A silence of more than a minute without a counter adds
    nothing.

    Parameters
    ----------
    highest_w : float
        Watts that are never drawn: what is above is a jump or a blank value, and left out.

    Examples
    --------
    >>> meter = EnergyMeter(highest_w=800.0)
    >>> [meter.add(t_s, 100.0, counter_j)
    ...  for t_s, counter_j in ((0.0, 5000.0), (1.0, 5102.0), (2.0, 3.0), (3.0, 101.0))]
    [0.0, 102.0, 202.0, 300.0]
    >>> meter.add(4.0, None, 181.0), meter.power_w  # without power: from the counter
    (380.0, 80.0)
    """

    __slots__ = (
        "_counter_j", "_counter_s", "_from_j", "_from_s", "_highest_w", "_known_w", "_stuck",
        "_t_s", "energy_j", "power_w", "restarts",
    )  # fmt: skip

    def __init__(self, *, highest_w: float) -> None:
        self.energy_j = 0.0
        #: Power as told or derived last; None before the first.
        self.power_w: float | None = None
        self.restarts = 0
        self._highest_w = highest_w
        self._known_w: float | None = None
        self._stuck = False
        self._t_s: float | None = None
        self._counter_j: float | None = None
        self._counter_s = 0.0
        self._from_j: float | None = None
        self._from_s = 0.0

    def add(self, t_s: float, power_w: float | None, counter_j: float | None) -> float:
        """Take one reading.

        Parameters
        ----------
        t_s : float
            Time of the reading; one that is not later than the last adds no integrated power.
        power_w : float or None
            Power in watts then; None where it is not told.
        counter_j : float or None
            Energy counter in joules then; None where there is none.

        Returns
        -------
        float
            Energy since the first reading, in joules.
        """
        power_w = within(power_w, self._highest_w)
        counter_j = within(counter_j, MOST_COUNTED_J)
        if power_w is None and counter_j is None:
            return self.energy_j
        t_s = t_s if self._t_s is None else max(t_s, self._t_s)
        if counter_j is not None:
            self._derive(t_s, counter_j)
        if power_w is not None:
            self.power_w = power_w
        if self._t_s is not None:
            self._count(t_s, power_w, counter_j)
        self._t_s = t_s
        self._known_w = power_w
        # What power has been integrated over must not be counted once more; what stands still may
        # only be told seldom.
        if counter_j is None or counter_j != self._counter_j:
            self._counter_j, self._counter_s = counter_j, t_s
        return self.energy_j

    def _count(self, t_s: float, power_w: float | None, counter_j: float | None) -> None:
        if counter_j is not None and self._counter_j is not None:
            counted_j, since_s = counter_j - self._counter_j, t_s - self._counter_s
            was_stuck = self._stuck
            self._stuck = counted_j == 0.0 and bool(power_w) and since_s > _LONGEST_GAP_S
            if not (was_stuck or self._stuck):
                if 0.0 <= counted_j <= self._highest_w * (since_s + _COUNTER_LAG_S):
                    self.energy_j += counted_j
                    return
                self.restarts += 1
        span_s = t_s - (self._t_s or 0.0)
        if span_s > _LONGEST_GAP_S:
            return
        known_w = [each for each in (self._known_w, power_w) if each is not None]
        if not known_w and self.power_w is not None:
            known_w = [self.power_w]
        if known_w:
            self.energy_j += span_s * sum(known_w) / len(known_w)

    def _derive(self, t_s: float, counter_j: float) -> None:
        """Mean power between two values of the counter, a second or more apart."""
        span_s = t_s - self._from_s
        if self._from_j is not None and (counter_j == self._from_j or span_s < _SPAN_S):
            return
        if self._from_j is not None:
            mean_w = within((counter_j - self._from_j) / span_s, self._highest_w)
            self.power_w = self.power_w if mean_w is None else mean_w
        self._from_j, self._from_s = counter_j, t_s


class GpuMeter:
    """One GPU: its latest clock, power and energy, with their ages.

    Parameters
    ----------
    highest_w : float
        Watts that it never draws, see :class:`EnergyMeter`.

    Examples
    --------
    >>> meter = GpuMeter()
    >>> meter.take(0.0, GpuReading(clock_mhz=1410.0, power_w=1.4e14, counter_j=5000.0))
    >>> meter.take(1.0, GpuReading(power_w=None, counter_j=5250.0))
    >>> meter.clock_mhz(1.0), meter.power_w(1.0), meter.energy_j
    (1410.0, 250.0, 250.0)
    >>> meter.clock_mhz(9.0) is None, meter.age_s(9.0)
    (True, 8.0)
    """

    def __init__(self, *, highest_w: float = MOST_W) -> None:
        self._highest_w = highest_w
        self._energy = EnergyMeter(highest_w=highest_w)
        self._clock_mhz: float | None = None
        self._clock_s = self._power_s = 0.0
        self._failing_s: float | None = None
        self._heard = self._lost = False
        self._problem = ""
        #: Clock event reasons as last told; None where they are not.
        self.reasons: int | None = None
        #: Whether the latest reading had an energy counter.
        self.counts = False
        #: When something was told last.
        self.read_s = 0.0

    def take(self, t_s: float, reading: GpuReading) -> None:
        """Take one reading; what is missing in it keeps its last value, which grows old.

        Parameters
        ----------
        t_s : float
            Time at which it was read, in seconds.
        reading : GpuReading
            What the GPU told.
        """
        self.read_s, self._heard, self._lost, self._failing_s = t_s, True, False, None
        self._problem = "; ".join(reading.problems)
        self.reasons, self.counts = reading.reasons, reading.counter_j is not None
        clock_mhz = within(reading.clock_mhz, _MOST_MHZ)
        if clock_mhz is not None:
            self._clock_mhz, self._clock_s = clock_mhz, t_s
        self._energy.add(t_s, reading.power_w, reading.counter_j)
        if within(reading.power_w, self._highest_w) is not None or self.counts:
            self._power_s = t_s

    def fail(self, t_s: float, problem: str, *, lost: bool = False) -> None:
        """Note that nothing could be read.

        Parameters
        ----------
        t_s : float
            Time of the attempt in seconds.
        problem : str
            Why nothing could be read, in words.
        lost : bool
            Whether it is known to be gone; else it may be back at the next reading.
        """
        self._problem, self._lost = problem, lost
        if self._failing_s is None:
            self._failing_s = t_s

    def alive(self, t_s: float) -> bool:
        """Whether it answers: not lost, and not failing for longer than :data:`FRESH_S`."""
        failing = self._failing_s is not None and t_s - self._failing_s > FRESH_S
        return self._heard and not self._lost and not failing

    def age_s(self, t_s: float) -> float:
        """Seconds since anything was told."""
        return max(0.0, t_s - self.read_s)

    def clock_mhz(self, t_s: float) -> float | None:
        """SM clock in MHz; None where it was not told within :data:`FRESH_S`."""
        return self._clock_mhz if t_s - self._clock_s <= FRESH_S else None

    def power_w(self, t_s: float) -> float | None:
        """Power in watts, told or from the counter; None without either within :data:`FRESH_S`."""
        return self._energy.power_w if t_s - self._power_s <= FRESH_S else None

    @property
    def energy_j(self) -> float:
        """Joules since the first reading."""
        return self._energy.energy_j

    @property
    def restarts(self) -> int:
        """Times that the counter restarted or jumped."""
        return self._energy.restarts

    def problem(self, t_s: float) -> str:
        """What is wrong with the readings, in words; empty where nothing is."""
        figures = (
            ("clock", self.clock_mhz(t_s), self._clock_mhz, self._clock_s),
            ("power", self.power_w(t_s), self._energy.power_w, self._power_s),
        )
        missing = [
            f"{name} not told" + ("" if last is None else f" for {t_s - told_s:.0f} s")
            for name, now, last, told_s in figures
            if now is None
        ]
        said = f" ({self._problem})" if missing and self._problem else self._problem
        return ", ".join(missing) + said


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceMeter:
    """The GPUs of one instance together.

    Parameters
    ----------
    alive : bool
        Whether all of them answer.
    age_s : float
        Seconds since the GPU that was heard longest ago told anything.
    clock_mhz : float or None
        Lowest SM clock of them; None unless all tell theirs.
    power_w : float or None
        Sum of their power in watts; None unless all tell theirs.
    energy_j : float
        Sum of their joules since the first reading.
    problem : str
        What is wrong with the readings, in words; empty where nothing is.

    Examples
    --------
    >>> gpus = [GpuMeter(), GpuMeter()]
    >>> gpus[0].take(0.0, GpuReading(clock_mhz=1410.0, power_w=300.0))
    >>> gpus[1].take(0.0, GpuReading(clock_mhz=1200.0))
    >>> seen = InstanceMeter.of(gpus, 0.0)
    >>> seen.clock_mhz, seen.power_w, seen.problem
    (1200.0, None, 'power not told')
    """

    alive: bool
    age_s: float
    clock_mhz: float | None
    power_w: float | None
    energy_j: float
    problem: str

    @classmethod
    def of(
        cls, gpus: Sequence[GpuMeter], t_s: float, parts_frac: Sequence[float] | None = None
    ) -> InstanceMeter:
        """Sum over the GPUs of an instance.

        Parameters
        ----------
        gpus : sequence of GpuMeter
            Meters of the GPUs of the instance, at least one.
        t_s : float
            Time now, on the clock of the readings.
        parts_frac : sequence of float, optional
            Part of each GPU's power and energy that is this instance's; all of it without.

        Returns
        -------
        InstanceMeter
            As of `t_s`.
        """
        parts_frac = [1.0] * len(gpus) if parts_frac is None else parts_frac
        clocks_mhz = [each for gpu in gpus if (each := gpu.clock_mhz(t_s)) is not None]
        powers_w = [
            part * each
            for gpu, part in zip(gpus, parts_frac, strict=True)
            if (each := gpu.power_w(t_s)) is not None
        ]
        return cls(
            alive=all(gpu.alive(t_s) for gpu in gpus),
            age_s=max(gpu.age_s(t_s) for gpu in gpus),
            clock_mhz=min(clocks_mhz) if len(clocks_mhz) == len(gpus) else None,
            power_w=sum(powers_w) if len(powers_w) == len(gpus) else None,
            energy_j=sum(part * gpu.energy_j for gpu, part in zip(gpus, parts_frac, strict=True)),
            problem="; ".join(filter(None, (gpu.problem(t_s) for gpu in gpus))),
        )
