"""Energy of one GPU from a counter that may be missing, restart or jump."""

from __future__ import annotations

__all__ = ["EnergyMeter"]

# Counters advance in steps, up to this far behind the power they sum.
_COUNTER_LAG_S = 0.3


class EnergyMeter:
    """Sums energy from the driver's counter, and from power where the counter cannot be believed.

    The sum never falls. An interval over which the counter fell (the driver was reloaded, the
    GPU reset, the counter wrapped) or rose by more than the board can draw is integrated from
    power by the trapezoidal rule instead.

    Parameters
    ----------
    highest_w : float
        More than the board can draw, for telling a jump.

    Examples
    --------
    >>> meter = EnergyMeter(highest_w=800.0)
    >>> [meter.add(t_s, 100.0, counter_j)
    ...  for t_s, counter_j in ((0.0, 5000.0), (1.0, 5102.0), (2.0, 3.0), (3.0, 101.0))]
    [0.0, 102.0, 202.0, 300.0]
    """

    __slots__ = ("_counter_j", "_highest_w", "_power_w", "_t_s", "energy_j", "restarts")

    def __init__(self, *, highest_w: float) -> None:
        self.energy_j = 0.0
        self.restarts = 0
        self._highest_w = highest_w
        self._t_s: float | None = None
        self._power_w = 0.0
        self._counter_j: float | None = None

    def add(self, t_s: float, power_w: float, counter_j: float | None) -> float:
        """Take one reading.

        Parameters
        ----------
        t_s : float
            Time of the reading; one that is not later than the last adds no integrated power.
        power_w : float
            Power then.
        counter_j : float or None
            Energy counter then; None where there is none.

        Returns
        -------
        float
            Energy since the first reading, in joules.
        """
        if self._t_s is not None:
            span_s = max(0.0, t_s - self._t_s)
            integrated_j = 0.5 * (self._power_w + power_w) * span_s
            if counter_j is None or self._counter_j is None:
                self.energy_j += integrated_j
            else:
                counted_j = counter_j - self._counter_j
                if 0.0 <= counted_j <= self._highest_w * (span_s + _COUNTER_LAG_S):
                    self.energy_j += counted_j
                else:
                    self.energy_j += integrated_j
                    self.restarts += 1
        self._t_s = t_s if self._t_s is None else max(t_s, self._t_s)
        self._power_w = power_w
        self._counter_j = counter_j
        return self.energy_j
