"""Controllers to compare against."""

from __future__ import annotations

from voltana_ctrl.control.base import Controller
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import Decision, FleetSpec, Observation

__all__ = ["StaticController"]


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
            self._freq_mhz[i] = instance.clocks_mhz[instance.clocks_mhz >= freq_mhz][0]

    def init(self) -> None:
        """No memory."""

    def _decide(self, observation: Observation, memory: None) -> tuple[Decision, None]:
        return Decision.highest(
            self.fleet,
            t_s=observation.state.t_s,
            floor_mhz=self._freq_mhz,
            ceiling_mhz=self._freq_mhz,
        ), memory
