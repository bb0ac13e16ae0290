"""One clock for the whole fleet: the highest, a given one, or what a power budget allows."""

from __future__ import annotations

from voltana_ctrl.checks import not_negative
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.budget import UniformCeiling
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import Decision, FleetSpec, Observation, PowerBudget
from voltana_ctrl.types.ladder import row_up

__all__ = ["StaticBudgetController", "StaticController"]


class StaticController(Controller):
    """Every instance at one clock, equal shares, everybody active.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    freq_mhz : float, optional
        The clock, raised to the next supported one per instance; each one's highest if left out.
    period_s : float
        Time between decisions.

    Raises
    ------
    ConfigError
        If the clock lies outside what every instance supports.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = StaticController(fleet, 1000)
    >>> controller.decide(Observation(state=FleetState.idle(2)), None)[0].freq_mhz
    array([1005., 1005.])
    """

    def __init__(
        self, fleet: FleetSpec, freq_mhz: float | None = None, *, period_s: float = 0.1
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        if freq_mhz is None:
            self._freq_mhz = fleet.max_mhz
            return
        low_mhz, high_mhz = fleet.min_mhz.max(), fleet.max_mhz.min()
        if not low_mhz <= freq_mhz <= high_mhz:
            raise ConfigError(
                f"StaticController.freq_mhz: expected {low_mhz:g} to {high_mhz:g} MHz, which all"
                f" instances support, got {freq_mhz:g}"
            )
        self._freq_mhz = fleet.max_mhz
        for i, instance in enumerate(fleet.instances):
            self._freq_mhz[i] = instance.clocks_mhz[row_up(instance.clocks_mhz, freq_mhz)]

    def init(self) -> None:
        """No memory."""

    def _decide(self, observation: Observation, memory: None) -> tuple[Decision, None]:
        return Decision.highest(
            self.fleet,
            t_s=observation.state.t_s,
            floor_mhz=self._freq_mhz,
            ceiling_mhz=self._freq_mhz,
        ), memory


class StaticBudgetController(Controller):
    """The highest uniform clock whose worst-case power stays within the budget.

    The worst case over all loads is taken from the profile, not the equilibrium at today's
    load: a limit that protects a breaker must hold through a burst, and no estimate is needed.
    The price is a clock lower than the load would allow. A lower step is obeyed `lead_s` early,
    so that the clocks are down when it begins.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    power_budget : PowerBudget, optional
        The budget; without one the highest clocks.
    governed : bool
        Whether governors choose clocks below the ceiling; without, everybody runs at it.
    period_s, lead_s : float
        Time between decisions; how long before a step the clocks are set.

    Raises
    ------
    ConfigError
        If a time is negative.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.types import PowerBudget
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = StaticBudgetController(fleet, PowerBudget.parse("0:1200,60:840"))
    >>> for t_s in (0.0, 59.9):
    ...     at_t = Observation(state=FleetState.idle(4, t_s=t_s))
    ...     float(controller.decide(at_t, None)[0].freq_mhz[0])
    1185.0
    765.0
    """

    def __init__(
        self,
        fleet: FleetSpec,
        power_budget: PowerBudget | None,
        *,
        governed: bool = False,
        period_s: float = 0.1,
        lead_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        not_negative("StaticBudgetController.lead_s", lead_s)
        self._budget = power_budget
        self._governed = governed
        self._lead_s = lead_s
        self._uniform = UniformCeiling(fleet)

    def init(self) -> None:
        """No memory."""

    def _decide(self, observation: Observation, memory: None) -> tuple[Decision, None]:
        t_s = observation.state.t_s
        ceiling_mhz = self.fleet.max_mhz
        if self._budget is not None:
            until_s = t_s + float(self.period_s) + self._lead_s
            ceiling_mhz = self._uniform.under(self._budget.least_w(t_s, until_s))
        floor_mhz = self.fleet.min_mhz if self._governed else ceiling_mhz
        return Decision.highest(
            self.fleet, t_s=t_s, floor_mhz=floor_mhz, ceiling_mhz=ceiling_mhz
        ), memory
