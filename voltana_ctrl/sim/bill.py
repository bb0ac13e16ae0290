"""What the energy of a simulated run cost, in money and in carbon."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from voltana_ctrl.sim.metrics import drawn_j, snapshot
from voltana_ctrl.types import Steps

if TYPE_CHECKING:
    from voltana_ctrl.sim.plant import Plant

__all__ = ["Bill"]

_KWH_J = 3.6e6


class Bill:
    """Reads the energy of a plant where its price or its carbon changes.

    ``cost = sum over blocks of E [J] / 3.6e6 * price [per kWh]``, and likewise for carbon.

    Parameters
    ----------
    plant : Plant
        What is billed; it stands at `from_s`.
    price, co2 : Steps, optional
        Price per kWh, and grams of CO2 per kWh.
    from_s, until_s : float
        Edges of the window.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> from voltana_ctrl.types import Steps
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = Plant(fleet, make_workload("fixed", rate_req_s=2.0, duration_s=20.0, seed=0))
    >>> bill = Bill(plant, Steps.parse("0:0.2,5:0.4"), None, 0.0, 10.0)
    >>> for edge_s in bill.edges_s[1:]:
    ...     plant.advance(edge_s)
    ...     bill.take()
    >>> bill.figures()["cost"] > 0.0, bill.figures()["co2_g"] is None
    (True, True)
    """

    def __init__(
        self, plant: Plant, price: Steps | None, co2: Steps | None, from_s: float, until_s: float
    ) -> None:
        self._plant = plant
        self._signals = {"cost": price, "co2_g": co2}
        edges_s = {from_s, until_s}
        for signal in (price, co2):
            if signal is not None:
                edges_s |= set(signal.edges_s(from_s, until_s).tolist())
        #: Times to stop at and :meth:`take`, the first of them `from_s`, the last `until_s`.
        self.edges_s = sorted(edges_s)
        self._energy_j: list[float] = []
        self.take()

    def take(self) -> None:
        """Read the energy at the next edge."""
        self._energy_j.append(float(drawn_j(snapshot(self._plant)).sum()))

    def figures(self) -> dict[str, float | None]:
        """Cost and grams of CO2, as the JSON of ``compare`` names them; None without a price."""
        blocks = list(zip(pairwise(self.edges_s), pairwise(self._energy_j), strict=True))
        return {name: _sum(signal, blocks) for name, signal in self._signals.items()}


def _sum(
    signal: Steps | None, blocks: Sequence[tuple[tuple[float, float], tuple[float, float]]]
) -> float | None:
    if signal is None:
        return None
    return sum(
        (end_j - begin_j) / _KWH_J * signal.mean(*span_s) for span_s, (begin_j, end_j) in blocks
    )
