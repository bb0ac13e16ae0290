"""Clocks of the control loop: time of this process, and time of a simulated plant."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from voltana_ctrl.ports import Clock

__all__ = ["SimClock", "WallClock"]


class WallClock:
    """Monotonic time of this process.

    Examples
    --------
    >>> clock = WallClock()
    >>> clock.now_s() <= clock.now_s()
    True
    """

    def now_s(self) -> float:
        """Seconds on the monotonic clock."""
        return time.monotonic()

    def sleep_until_s(self, t_s: float) -> None:
        """Sleep until `t_s`; returns at once if it has passed."""
        time.sleep(max(0.0, t_s - time.monotonic()))


class _Advances(Protocol):
    @property
    def now_s(self) -> float: ...

    def advance(self, until_s: float) -> None: ...


class SimClock:
    """Time of a simulated plant; sleeping runs the plant.

    Parameters
    ----------
    plant : Plant or SimBackend
        Anything with `now_s` and `advance(until_s)`.

    Examples
    --------
    >>> class Still:
    ...     now_s = 0.0
    ...     def advance(self, until_s): self.now_s = until_s
    >>> clock = SimClock(Still())
    >>> clock.sleep_until_s(2.5)
    >>> clock.now_s()
    2.5
    """

    def __init__(self, plant: _Advances) -> None:
        self._plant = plant

    def now_s(self) -> float:
        """Simulated time."""
        return self._plant.now_s

    def sleep_until_s(self, t_s: float) -> None:
        """Run the plant until `t_s`."""
        self._plant.advance(t_s)


if TYPE_CHECKING:
    _: type[Clock] = WallClock
    _ = SimClock
