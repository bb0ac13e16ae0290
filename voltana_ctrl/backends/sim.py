"""The simulated plant behind the backend port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from voltana_ctrl.clock import SimClock
from voltana_ctrl.errors import BackendError
from voltana_ctrl.ports import Backend
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import Decision, FleetSpec, Observation

__all__ = ["SimBackend"]


class SimBackend:
    """A simulated fleet that a control loop reads and writes like a real one.

    Parameters
    ----------
    fleet : FleetSpec
        Fleet that is simulated.
    workload : Workload
        Requests that arrive.
    seed : int
        Seed from which routing and noise are drawn.
    settings : PlantSettings, optional
        Delays of actuation and of readings, noise, iterations that are kept; the defaults if left
        out.
    **plant_options
        Passed to :class:`voltana_ctrl.sim.plant.Plant`: governors, routers, judged_s, faults.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> workload = make_workload("sharegpt", rate_req_s=2.0, duration_s=10.0, seed=0)
    >>> backend = SimBackend(fleet, workload=workload)
    >>> backend.apply(Decision.highest(fleet, floor_mhz=[600.0, 900.0]))
    >>> backend.clock.sleep_until_s(1.0)
    >>> backend.read().state.freq_mhz
    array([600., 900.])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        workload: Workload,
        seed: int = 0,
        settings: PlantSettings | None = None,
        **plant_options: Any,
    ) -> None:
        self.plant = Plant(fleet, workload, settings, seed=seed, **plant_options)
        self.clock = SimClock(self.plant)
        self._closed = False

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self.plant.fleet

    def read(self) -> Observation:
        """State now, iterations and finished requests since the last read."""
        return self.plant.read()

    def apply(self, decision: Decision) -> None:
        """Carry out a decision.

        Raises
        ------
        BackendError
            If the backend is closed.
        """
        if self._closed:
            raise BackendError("SimBackend.apply: the backend is closed; make a new one")
        self.plant.apply(decision)

    def close(self) -> None:
        """Give the clocks back: the highest, everybody active, equal shares."""
        if not self._closed:
            self._closed = True
            self.plant.apply(Decision.highest(self.plant.fleet, t_s=self.plant.now_s))


if TYPE_CHECKING:
    _: type[Backend] = SimBackend
