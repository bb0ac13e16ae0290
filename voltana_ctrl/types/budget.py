"""A limit on the power of a fleet that may change over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types.steps import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerBudget(Steps):
    """Steps of the power that a whole fleet may draw.

    Parameters
    ----------
    steps : tuple of (from_s, limit_w)
        Each limit holds from its time, on the loop's clock, until the next one's; times
        ascend and the first is 0. A simulated run starts at 0, its warm-up included.
    notice_s : float
        How long before its time a step is announced; infinite, as by default, where all of them
        are known from the start.

    Raises
    ------
    ConfigError
        If there is no step, times do not ascend from 0, a limit is not a number > 0, or the
        notice is negative.

    Examples
    --------
    >>> budget = PowerBudget(steps=((0.0, 1200.0), (60.0, 840.0)), notice_s=30.0)
    >>> budget.at_w(59.9), budget.at_w(60.0), budget.least_w(30.0, 60.5)
    (1200.0, 840.0, 840.0)
    >>> budget.known(29.0).steps, budget.known(30.0).steps
    (((0.0, 1200.0),), ((0.0, 1200.0), (60.0, 840.0)))
    """

    notice_s: float = np.inf

    _option: ClassVar[str] = "power-budget-w"
    _unit: ClassVar[str] = "WATTS"
    _example: ClassVar[str] = "0:1200,60:840"

    def __post_init__(self) -> None:
        Steps.__post_init__(self)
        if not self.notice_s >= 0.0:
            raise ConfigError(
                f"PowerBudget.notice_s: expected a number >= 0, got {self.notice_s!r}"
            )

    def _check_value(self, value: Any) -> None:
        positive("PowerBudget: limit of a step [W]", value)

    @property
    def lowest_w(self) -> float:
        """Lowest limit of all steps."""
        return min(limit_w for _, limit_w in self.steps)

    def at_w(self, t_s: float) -> float:
        """Limit at one time.

        Parameters
        ----------
        t_s : float
            Seconds on the loop's clock.

        Returns
        -------
        float
            Watts.
        """
        return self.at(t_s)

    def known(self, t_s: float) -> PowerBudget:
        """The budget as far as it has been announced at one time.

        Parameters
        ----------
        t_s : float
            Seconds on the loop's clock.

        Returns
        -------
        PowerBudget
            Steps that begin later than `t_s` plus the notice are left out.
        """
        told = tuple(
            (from_s, limit_w) for from_s, limit_w in self.steps if from_s - self.notice_s <= t_s
        )
        return PowerBudget(steps=told or self.steps[:1], notice_s=self.notice_s)

    def least_w(self, from_s: float, until_s: float) -> float:
        """Lowest limit between two times, both included: what a decision held so long must obey.

        Of the steps that have been announced at `from_s`.

        Parameters
        ----------
        from_s, until_s : float
            Seconds on the loop's clock.

        Returns
        -------
        float
            Watts.
        """
        soon_s = min(until_s, from_s + self.notice_s)
        inside = [limit_w for t_s, limit_w in self.steps if from_s < t_s <= soon_s]
        return min([self.at_w(from_s), *inside])
