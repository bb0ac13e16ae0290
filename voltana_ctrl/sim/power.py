"""Power of a simulated fleet, sampled, against its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.metrics import drawn_j, snapshot
from voltana_ctrl.types import FleetSpec, PowerBudget

if TYPE_CHECKING:
    from voltana_ctrl.sim.plant import Plant

__all__ = ["PowerMeter", "refuse_below_idle"]

#: Mean power is compared with the budget over samples of this length.
SAMPLE_S = 0.1


class PowerMeter:
    """Runs a plant with a stop at every 100 ms of its window, and reads the energy there.

    Stands before the plant wherever somebody advances it, such as a
    :class:`~voltana_ctrl.clock.SimClock`. Samples are means, from sums that are exact.

    Parameters
    ----------
    plant : Plant
        What is metered.
    budget : PowerBudget
        What it may draw.
    from_s, until_s : float
        Edges of the window.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, PowerBudget, load_profile
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = Plant(fleet, make_workload("sharegpt", rate_req_s=2.0, duration_s=20.0, seed=0))
    >>> meter = PowerMeter(plant, PowerBudget.parse("0:1000,5:125"), 0.0, 10.0)
    >>> meter.advance(10.0)
    >>> 0.4 < meter.over_budget_frac() < 0.6
    True
    """

    def __init__(self, plant: Plant, budget: PowerBudget, from_s: float, until_s: float) -> None:
        self._plant = plant
        self._budget = budget
        n_samples = max(1, round((until_s - from_s) / SAMPLE_S))
        self._edge_s = np.linspace(from_s, until_s, n_samples + 1)
        self._energy_j: list[float] = []

    @property
    def now_s(self) -> float:
        """Simulated time in seconds."""
        return self._plant.now_s

    def advance(self, until_s: float) -> None:
        """Run the plant until `until_s`.

        Parameters
        ----------
        until_s : float
            Simulated time to stop at.
        """
        for edge_s in self._edge_s[len(self._energy_j) :]:
            if edge_s > until_s:
                break
            self._plant.advance(float(edge_s))
            self._energy_j.append(float(drawn_j(snapshot(self._plant)).sum()))
        self._plant.advance(until_s)

    def over_budget_frac(self) -> float:
        """Share of the samples so far whose mean power is above the budget at their middle.

        NaN before the first sample of 100 ms is over.
        """
        edge_s = self._edge_s[: len(self._energy_j)]
        power_w = np.diff(self._energy_j) / np.diff(edge_s)
        middle_s = (edge_s[1:] + edge_s[:-1]) / 2.0
        limit_w = np.array([self._budget.at_w(float(t_s)) for t_s in middle_s])
        # A sum of joules is exact to its last digits only.
        return float(np.mean(power_w > limit_w * (1.0 + 1e-9)))


def refuse_below_idle(budget: PowerBudget, fleet: FleetSpec) -> None:
    """Refuse a budget that even an idle fleet exceeds.

    Parameters
    ----------
    budget : PowerBudget
        What the fleet may draw.
    fleet : FleetSpec
        The fleet.

    Raises
    ------
    ConfigError
        Naming the step.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, PowerBudget, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> refuse_below_idle(PowerBudget.parse("500"), fleet)
    """
    idle_w = sum(one.idle_w for one in fleet.instances)
    for from_s, limit_w in budget.steps:
        if limit_w < idle_w:
            raise ConfigError(
                f"power budget: expected at least {idle_w:g} W, which the fleet draws idle, got"
                f" {limit_w:g} W from {from_s:g} s; raise it or take instances out of the fleet"
            )
