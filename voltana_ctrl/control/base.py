"""The one abstract class of this library: what every controller is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any, final

from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import Decision, FleetSpec, Observation

__all__ = ["Controller"]


class Controller(ABC):
    """Turns observations into decisions; all it remembers is passed in and out.

    Subclasses write :meth:`init` and :meth:`_decide`. Settings live on the object, anything
    that changes (filters, margins, counters) lives in the memory, so that a run can be
    replayed and two runs never mix.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet it controls.
    period_s : float or Fraction
        Time between decisions; kept as an exact fraction of whole microseconds.

    Raises
    ------
    ConfigError
        If the period is not at least a microsecond.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, load_profile
    >>> class Highest(Controller):
    ...     def init(self): return 0
    ...     def _decide(self, observation, memory):
    ...         return Decision.highest(self.fleet, t_s=observation.state.t_s), memory + 1
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = Highest(fleet)
    >>> decision, memory = controller.decide(Observation(state=FleetState.idle(2)), 0)
    >>> decision.freq_mhz, memory
    (array([1410., 1410.]), 1)
    """

    def __init__(self, fleet: FleetSpec, *, period_s: float | Fraction = 0.1) -> None:
        period_us = round(float(period_s) * 1e6) if 0.0 < float(period_s) < 1e9 else 0
        if period_us < 1:
            raise ConfigError(
                f"{type(self).__name__}.period_s: expected at least 1e-6 s, got {period_s}"
            )
        self.fleet = fleet
        self.period_s = Fraction(period_us, 1_000_000)

    @abstractmethod
    def init(self) -> Any:
        """Memory at the start."""

    @abstractmethod
    def _decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        """Decide; must not change `memory` in place."""

    @final
    def decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        """Decision for this tick, and the memory for the next.

        Raises
        ------
        ShapeError
            If observation or decision do not fit the fleet.
        ConfigError
            If the decision is not a Decision.
        """
        n = len(self.fleet)
        name = type(self).__name__
        if len(observation.state) != n:
            raise ShapeError(
                f"{name}.decide: expected the state of {n} instances, got {len(observation.state)}"
            )
        decision, after = self._decide(observation, memory)
        if not isinstance(decision, Decision):
            raise ConfigError(f"{name}._decide: expected a Decision, got {decision!r}")
        if len(decision) != n:
            raise ShapeError(
                f"{name}._decide: expected a decision on {n} instances, got {len(decision)}"
            )
        return decision, after
