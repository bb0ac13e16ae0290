"""A limit on the power of a fleet that may change over time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerBudget:
    """Steps of the power that a whole fleet may draw.

    Parameters
    ----------
    steps : tuple of (from_s, limit_w)
        Each limit holds from its time, on the loop's clock, until the next one's; times
        ascend and the first is 0. A simulated run starts at 0, its warm-up included.

    Raises
    ------
    ConfigError
        If there is no step, times do not ascend from 0, or a limit is not a number > 0.

    Examples
    --------
    >>> budget = PowerBudget(steps=((0.0, 1200.0), (60.0, 840.0)))
    >>> budget.at_w(59.9), budget.at_w(60.0), budget.least_w(10.0, 60.5)
    (1200.0, 840.0, 840.0)
    """

    steps: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        try:
            steps = tuple((from_s, limit_w) for from_s, limit_w in self.steps)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"PowerBudget.steps: expected pairs (from_s, limit_w), got {self.steps!r}"
            ) from error
        if not steps:
            raise ConfigError("PowerBudget.steps: expected at least one step, got none")
        for from_s, limit_w in steps:
            not_negative("PowerBudget: time of a step [s]", from_s)
            positive("PowerBudget: limit of a step [W]", limit_w)
        times_s = [from_s for from_s, _ in steps]
        if times_s[0] != 0.0:
            raise ConfigError(
                f"PowerBudget.steps: expected the first step at 0 s, got {times_s[0]:g} s; say"
                " what holds before it"
            )
        for before_s, after_s in pairwise(times_s):
            if not before_s < after_s:
                raise ConfigError(
                    f"PowerBudget.steps: expected ascending times, got {after_s:g} s after"
                    f" {before_s:g} s"
                )
        numbers = tuple((float(from_s), float(limit_w)) for from_s, limit_w in steps)
        object.__setattr__(self, "steps", numbers)

    @classmethod
    def parse(cls, text: str) -> PowerBudget:
        """Budget from ``0:1200,60:840``, in seconds and watts; ``1200`` is a constant one.

        Raises
        ------
        ConfigError
            Naming the step that does not fit.

        Examples
        --------
        >>> PowerBudget.parse("0:1200,60:840").steps
        ((0.0, 1200.0), (60.0, 840.0))
        >>> PowerBudget.parse("1200").steps
        ((0.0, 1200.0),)
        """
        if ":" not in text and "," not in text:
            try:
                return cls(steps=((0.0, float(text)),))
            except ValueError:
                raise ConfigError(
                    f"power-budget-w: expected watts such as 1200, or steps SECONDS:WATTS, got"
                    f" {text!r}"
                ) from None
        steps = []
        for part in text.split(","):
            from_s, colon, limit_w = part.partition(":")
            try:
                if not colon:
                    raise ValueError
                steps.append((float(from_s), float(limit_w)))
            except ValueError:
                raise ConfigError(
                    "power-budget-w: expected steps SECONDS:WATTS such as 0:1200,60:840, got"
                    f" {part!r}"
                ) from None
        return cls(steps=tuple(steps))

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
        """
        held = [limit_w for from_s, limit_w in self.steps if from_s <= t_s]
        return held[-1] if held else self.steps[0][1]

    def least_w(self, from_s: float, until_s: float) -> float:
        """Lowest limit between two times, both included: what a decision held so long must obey.

        Parameters
        ----------
        from_s, until_s : float
            Seconds on the loop's clock.
        """
        inside = [limit_w for t_s, limit_w in self.steps if from_s < t_s <= until_s]
        return min([self.at_w(from_s), *inside])
