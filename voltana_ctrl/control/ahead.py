"""The controller that looks ahead, where waking takes time or work may wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.control.cascade import CascadeController, CascadeMemory
from voltana_ctrl.control.depth import planned_rest
from voltana_ctrl.control.lookahead import Lookahead, takes_time
from voltana_ctrl.estimate.forecast import OwnForecast
from voltana_ctrl.types import Decision, FleetSpec, Observation, PowerBudget, Slo, Steps

__all__ = ["MpcController"]


class MpcController(CascadeController):
    """The whole cascade: a look ahead where there is something to foresee, target, governors.

    Where some instance sleeps and needs longer than a target period to wake, a forecast and a
    model-predictive plan decide how many are awake
    (:class:`~voltana_ctrl.control.lookahead.Lookahead`); the target layer divides the load among
    them. Where who is parked is back at once and a deeper sleep takes longer, both are used: the
    plan decides who sleeps, and the target who of the others is parked.

    Where there are requests that may wait, the plan decides how fast they are let in: beside a
    reserve for the others, before their deadlines, within budgets as far as they are announced, and
    when energy costs least. Where nothing of this is so no problem is solved, and this is
    :class:`~voltana_ctrl.control.CascadeController`.

    Parameters
    ----------
    fleet, slo, **settings
        See :class:`~voltana_ctrl.control.CascadeController`.
    plan_period_s : float
        Time between two plans.
    beside : bool
        Whether plans are made in a thread beside the ticks, as a running fleet wants it; a
        simulation is the same every time without.
    forecast : callable, optional
        A host's own forecast: ``forecast(t_s, lead_s)`` gives the expected arrivals per second at
        these leads after that time. See :func:`voltana_ctrl.estimate.read_forecast` for a file.
    price, co2 : Steps, optional
        What energy costs per kWh, and grams of CO2 per kWh, known ahead. Of both, each counts
        relative to its mean.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = MpcController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> controller.looks_ahead  # its instances wake at once
    False
    >>> observation = Observation(state=FleetState.idle(4))
    >>> controller.decide(observation, controller.init())[0].route_frac
    array([0.5, 0.5, 0.5, 0.5])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        plan_period_s: float = 10.0,
        beside: bool = False,
        forecast: OwnForecast | None = None,
        price: Steps | None = None,
        co2: Steps | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(fleet, slo, **settings)
        positive("MpcController.plan_period_s", plan_period_s)
        #: Whether waking takes time, so that who is awake has to be foreseen.
        sleepy, self._sleep = planned_rest(self.fleet, self.target_period_s)
        self.looks_ahead = takes_time(sleepy, self.target_period_s)
        self._ahead = Lookahead(
            sleepy, slo, self._target, period_s=plan_period_s, beside=beside, own=forecast,
            price=price, co2=co2, wakes=self.looks_ahead,
        )  # fmt: skip

    def init(self) -> CascadeMemory:
        """Nothing seen, nothing planned; everybody on."""
        return replace(super().init(), ahead=self._ahead.init())

    def taken_over(self, memory: CascadeMemory) -> CascadeMemory:
        """Memory to go on with, of a controller of the same machines in other roles.

        Parameters
        ----------
        memory : CascadeMemory
            Memory of that controller after its last tick.
        """
        memory = super().taken_over(memory)
        if memory.ahead is None:
            return memory
        ahead = replace(memory.ahead, plan=None, plan_s=-np.inf, tried_s=-np.inf)
        return replace(memory, ahead=ahead)

    def notes(self, memory: CascadeMemory) -> dict[str, float]:
        """What observers of the loop may want to see; forecast, reserve and prices, too.

        Parameters
        ----------
        memory : CascadeMemory
            Memory after the last tick.
        """
        noted = super().notes(memory)
        if memory.ahead is not None and self._ahead.looks(memory.ahead):
            noted |= self._ahead.notes(memory.ahead)
        return noted

    def _decide(
        self, observation: Observation, memory: CascadeMemory
    ) -> tuple[Decision, CascadeMemory]:
        decision, memory = super()._decide(observation, memory)
        if memory.ahead is None:
            return decision, memory
        residence_s = self._ahead.residence_s(self._load.load(memory.load))
        admission = self._ahead.admission(
            memory.ahead, observation.state.t_s, residence_s, float(memory.held_frac.max())
        )
        if admission is None:
            return decision, memory
        return replace(decision, admission=admission), memory

    def _known_w(self, now_s: float) -> Callable[[float, float], float]:
        """Least that the fleet may draw between two times, as far as is known now."""
        budget = self._power_budget_w
        if isinstance(budget, PowerBudget):
            # What has been announced is known for good.
            return replace(budget.known(now_s), notice_s=np.inf).least_w

        def taken_as_known(from_s: float, until_s: float) -> float:
            return min(self._budget_w(from_s), self._budget_w(until_s))

        return taken_as_known

    def _look_ahead(
        self, observation: Observation, memory: CascadeMemory, *, due: bool
    ) -> tuple[CascadeMemory, bool]:
        if memory.ahead is None:
            return memory, False
        state = observation.state
        ahead = self._ahead.count(memory.ahead, observation)
        lost = memory.serving is not None and bool(np.any(memory.serving & ~state.alive))
        seen_s = memory.load.span_s
        if self._ahead.looks(ahead) and (due or lost) and seen_s >= self.target_period_s:
            load, known_w = self._load.load(memory.load), self._known_w(state.t_s)
            ahead = self._ahead.look(ahead, state, load, memory.belief, known_w)
        serving = self._ahead.serving(ahead, state)
        if serving is None:
            return replace(memory, ahead=ahead), False
        moved = memory.serving is None or not np.array_equal(serving, memory.serving)
        return replace(memory, ahead=ahead, serving=serving), moved
