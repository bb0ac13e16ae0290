"""The controller: estimate, target, plan, and what the governors may do until the next tick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, Bool, not_negative, positive
from voltana_ctrl.control.assess import Assessor
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.budget import target_within
from voltana_ctrl.control.target import Target, TargetOptimiser
from voltana_ctrl.estimate.headroom import HeadroomFilter, HeadroomMemory
from voltana_ctrl.estimate.load import LoadFilter, LoadMemory
from voltana_ctrl.estimate.regime import Regime, RegimeFilter, RegimeMemory
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Load, Observation, Slo, Status

__all__ = ["CascadeController", "CascadeMemory", "MpcController"]

#: Time over which decoded tokens are compared with what profiles say, and the excess of the
#: iteration time from which on profiles are not believed.
_PACE_MEMORY_S = 10.0
_PACE_EXCESS_FRAC = 0.05
#: Time in which a backlog should be gone.
_CATCH_UP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CascadeMemory:
    """What the controller remembers between ticks.

    Parameters
    ----------
    load : LoadMemory
        Behind the estimate of arrivals and lengths.
    margin : HeadroomMemory
        Margins on top of the governors' own.
    regime : RegimeMemory
        Behind the verdict on the regime.
    target : Target, optional
        The last target; None before the first.
    planned_s : float
        When it was planned.
    plan : Plan, optional
        The last model-predictive plan.
    plan_s : float
        When it was made.
    price_j_req : ndarray, shape (n,), optional
        Smoothed prices.
    ceiling_mhz : ndarray, shape (n,), optional
        Ceilings of the last decision.
    overload_frac : float
        ITL margin that still pays where the target is not feasible.
    expected_tok, decoded_tok : float
        Tokens that profiles say were decoded, and that were; weighted.

    Examples
    --------
    >>> CascadeMemory.__slots__[0]
    'load'
    """

    load: LoadMemory
    margin: HeadroomMemory
    regime: RegimeMemory
    target: Target | None = None
    planned_s: float = 0.0
    plan: Any = None
    plan_s: float = -np.inf
    price_j_req: F64 | None = None
    ceiling_mhz: F64 | None = None
    overload_frac: float = 0.0
    expected_tok: float = 0.0
    decoded_tok: float = 0.0

    @property
    def pace_frac(self) -> float:
        """Iteration time over what profiles say; 1 until enough was seen, at most 3."""
        if self.decoded_tok < 1000.0:
            return 1.0
        return min(3.0, self.expected_tok / self.decoded_tok)

    @property
    def slower_frac(self) -> float:
        """Excess of the iteration time that is more than noise."""
        return self.pace_frac - 1.0 if self.pace_frac > 1.0 + _PACE_EXCESS_FRAC else 0.0


class CascadeController(Controller):
    """Target layer and governors, without the model-predictive layer between them.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promises.
    period_s : float
        Time between decisions.
    target_period_s : float
        Time between two targets.
    governed : bool
        Whether an :class:`IterationGovernor` runs on every instance. Without, the floor is the
        clock, and it answers to queues and batches at every tick.
    delay_s : float
        From asking for a clock until it runs.
    margin_frac : tuple of float
        TTFT and ITL margin of the governors; more is added where requests miss.
    power_budget_w : float or callable, optional
        Power that the fleet may draw, or a function of the time that tells it.
    target : TargetOptimiser, optional
        The target layer; one with these settings if left out.
    load : LoadFilter, optional
        Estimates what arrives; one with default settings if left out.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = CascadeController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> observation = Observation(state=FleetState.idle(4))
    >>> decision, memory = controller.decide(observation, controller.init())
    >>> decision.active, decision.freq_mhz
    (array([ True,  True,  True,  True]), array([210., 210., 210., 210.]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        period_s: float = 0.1,
        target_period_s: float = 1.0,
        governed: bool = True,
        delay_s: float = 0.025,
        margin_frac: tuple[float, float] = (0.02, 0.035),
        power_budget_w: float | Callable[[float], float] | None = None,
        target: TargetOptimiser | None = None,
        load: LoadFilter | None = None,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        positive(f"{type(self).__name__}.target_period_s", target_period_s)
        not_negative(f"{type(self).__name__}.delay_s", delay_s)
        self.slo = slo
        self.target_period_s = target_period_s
        self.governed = governed
        self.delay_s = delay_s
        self.margin_frac = margin_frac
        #: May be set while the controller runs.
        self.power_budget_w = power_budget_w
        self._target = target or TargetOptimiser(
            fleet, slo, margin_frac=margin_frac, delay_s=delay_s, governed=governed
        )
        self._load = load or LoadFilter(fleet)
        self._regime = RegimeFilter(fleet)
        self._margin = HeadroomFilter(fleet, slo)
        self._idle_w = sum(one.idle_w for one in fleet.instances)
        self._assessor = Assessor(fleet, slo)
        # Put together anew at every access; asked for at every tick.
        self._prefill, self._decode = np.array(fleet.prefill), np.array(fleet.decode)
        self._min_mhz, self._max_mhz = fleet.min_mhz, fleet.max_mhz
        self._equal_frac = Decision.highest(fleet).route_frac

    def init(self) -> CascadeMemory:
        """Nothing seen, nothing planned."""
        return CascadeMemory(
            load=self._load.init(), margin=self._margin.init(), regime=RegimeMemory()
        )

    def regime(self, memory: CascadeMemory) -> Regime:
        """Regime that the fleet is in, as far as is known.

        Parameters
        ----------
        memory : CascadeMemory
            Of the last tick.
        """
        return self._regime.regime(memory.regime)

    def notes(self, memory: CascadeMemory) -> dict[str, float]:
        """What observers of the loop may want to see: margins on TTFT and ITL, and the pace.

        Parameters
        ----------
        memory : CascadeMemory
            Of the last tick.
        """
        ttft, itl = self._margin.extra_frac(memory.margin, self.margin_frac)
        return {
            "margin_ttft_frac": self.margin_frac[0] + float(ttft),
            "margin_itl_frac": self.margin_frac[1] + float(itl),
            "pace_frac": memory.pace_frac,
        }

    def _decide(
        self, observation: Observation, memory: CascadeMemory
    ) -> tuple[Decision, CascadeMemory]:
        memory = self._look(observation, memory)
        return self._settle(observation.state, memory, None)

    def _settle(
        self, state: FleetState, memory: CascadeMemory, plan: Any
    ) -> tuple[Decision, CascadeMemory]:
        decision = self._follow(state, memory, plan)
        return decision, replace(memory, ceiling_mhz=decision.freq_max_mhz)

    def _look(self, observation: Observation, memory: CascadeMemory) -> CascadeMemory:
        """Update the estimates, and the target when it is due."""
        state = observation.state
        memory = self._pace(observation, memory)
        memory = replace(
            memory,
            load=self._load.update(observation, memory.load),
            margin=self._margin.update(
                memory.margin,
                observation.finished,
                running_req=float(state.running_req.sum()),
                feasible=memory.target is None or memory.target.feasible,
            ),
            regime=self._regime.update(observation, memory.regime),
        )
        due = memory.target is None or state.t_s - memory.planned_s >= self.target_period_s - 1e-9
        # Until a target period has been watched, and work has come, there is nothing to plan for.
        seen = memory.load.arrived_req > 0.0 or bool(state.running_req.any())
        if memory.load.span_s < self.target_period_s or not due or not seen:
            return memory
        load, pace_frac = self._load.load(memory.load), memory.slower_frac + 1.0
        # What waits longer than was promised has to be served besides what arrives.
        late_req = float(state.queue_req[self._prefill].sum())
        late_req -= load.arrival_req_s * self.slo.ttft_s
        if late_req > 0.0:
            load = replace(load, arrival_req_s=load.arrival_req_s + late_req / _CATCH_UP_S)
        # Everybody is active at first: parking must pay.
        active = np.ones(len(state), bool) if memory.target is None else memory.target.active

        def plan(part: Load) -> Target:
            return self._target.plan(part, active=active, usable=state.alive, pace_frac=pace_frac)

        target = target_within(self._budget_w(state.t_s), load, plan(load), plan)
        overload_frac = 0.0
        if not target.feasible:
            overload_frac = self._target.overload_frac(load, target.route_frac, pace_frac)
        return replace(memory, target=target, planned_s=state.t_s, overload_frac=overload_frac)

    def _pace(self, observation: Observation, memory: CascadeMemory) -> CascadeMemory:
        """Compare the tokens that were decoded since the last tick with what profiles say."""
        state, finished, before = observation.state, observation.finished, memory.load
        dt_s = state.t_s - before.t_s
        if before.t_s < 0.0 or dt_s <= 0.0 or self.fleet.colocated:
            return memory
        decode = self._decode
        held_tok = float(state.kv_used_tok[decode].sum() + state.queue_tok[decode].sum())
        decoded_tok = (
            held_tok
            - before.held_tok
            - float(state.arrived_tok[decode].sum())
            + float(finished.prompt_tok.sum() + finished.output_tok.sum())
        )
        keep = float(np.exp(-dt_s / _PACE_MEMORY_S))
        return replace(
            memory,
            expected_tok=keep * memory.expected_tok + dt_s * self._assessor.decoding_tok_s(state),
            decoded_tok=keep * memory.decoded_tok + decoded_tok,
        )

    def _budget_w(self, t_s: float) -> float:
        budget = self.power_budget_w
        if budget is None:
            return np.inf
        return float(budget(t_s)) if callable(budget) else float(budget)

    def _follow(self, state: FleetState, memory: CascadeMemory, plan: Any) -> Decision:
        """Decision that asks for the target, or the plan, and leaves the rest to governors."""
        fleet, target = self.fleet, memory.target
        load = self._load.load(memory.load)
        if target is None:
            route_frac = self._equal_frac
            active = np.ones(len(fleet), bool)
            floor = self._min_mhz if self.governed else self._max_mhz
            price = np.zeros(len(fleet))
        else:
            route_frac = target.route_frac if plan is None else plan.route_frac
            active = target.active
            floor = self._floors(state, memory, load, target)
            price = target.price_j_req if memory.price_j_req is None else memory.price_j_req
        budget_w = self._budget_w(state.t_s)
        ceiling, status = self._max_mhz, Status.OK
        if np.isfinite(budget_w):
            ceiling = self._ceilings(state, memory, load, route_frac, active, budget_w)
            if budget_w < self._idle_w:
                status = Status.INFEASIBLE
        return Decision(
            t_s=state.t_s,
            freq_mhz=np.minimum(floor, ceiling),
            freq_max_mhz=ceiling,
            route_frac=route_frac,
            active=active,
            price_j_req=price,
            status=status,
        )

    def _ceilings(
        self,
        state: FleetState,
        memory: CascadeMemory,
        load: Load,
        route_frac: F64,
        active: Bool,
        budget_w: float,
    ) -> F64:
        """Ceilings under the budget; nobody rises before those that must fall have fallen."""
        wanted = self._assessor.clocks_mhz(
            state, load, route_frac, margin_frac=self.margin_frac, delay_s=self.delay_s
        )
        worst_w = self._assessor.worst_power_w(state, load, active)
        ceiling, _ = self._assessor.decode_first_mhz(worst_w, wanted, budget_w)
        before = self._max_mhz if memory.ceiling_mhz is None else memory.ceiling_mhz
        # What may still run: the clock that is seen, and one asked for a moment ago.
        running = np.maximum(state.freq_mhz, np.where(before > ceiling, 0.0, before))
        held = np.maximum(ceiling, running)
        too_much = self._assessor.drawn_w(worst_w, held) > budget_w
        return np.minimum(ceiling, before) if too_much else ceiling

    def _floors(self, state: FleetState, memory: CascadeMemory, load: Load, target: Target) -> F64:
        floor = target.floor_mhz
        if not target.active.all():
            # What is parked rests when it is done, so what it has left costs least as if batch
            # and not arrivals were given.
            rest = self._assessor.thrifty_mhz(state, load, rests=True)
            floor = np.where(target.active, floor, rest)
        extra = self._margin.extra_frac(memory.margin, self.margin_frac)
        if not target.feasible:
            # Beyond what can be served the batch sets the clock, not a floor.
            floor = floor.copy()
            floor[self._decode] = self._min_mhz[self._decode]
            extra[1] = max(extra[1], memory.overload_frac)
        # The pace says so sooner than requests, which miss only when they are done.
        slower = memory.slower_frac
        if slower > 0.0:
            extra[0] = max(extra[0], slower)
            extra[1] += (1.0 + self.margin_frac[1] + extra[1]) * slower
        if not self.governed or extra.max() > 0.0:
            needed = self._assessor.clocks_mhz(
                state, load, target.route_frac,
                margin_frac=(
                    self.margin_frac[0] + float(extra[0]), self.margin_frac[1] + float(extra[1])
                ),
                delay_s=self.delay_s + (0.0 if self.governed else float(self.period_s)),
                # Governors keep room for bursts themselves.
                burst_sd_frac=0.0 if self.governed else 3.0,
            )  # fmt: skip
            missing = np.zeros(len(floor), bool)
            missing[self._prefill] = extra[0] > 0.0 or not self.governed
            missing[self._decode] |= extra[1] > 0.0 or not self.governed
            floor = np.where(missing, np.maximum(floor, needed), floor)
        if self.regime(memory) is not Regime.OPEN:
            floor = np.maximum(floor, self._assessor.thrifty_mhz(state, load))
        return floor


class MpcController(CascadeController):
    """The whole cascade: target, model-predictive plan towards it, governors.

    The plan shapes the shares through transients and prices requests. A plan that is not optimal
    is not used: what is left is the target, and under a budget ceilings that need no solver.

    Parameters
    ----------
    fleet, slo, **settings
        As of :class:`CascadeController`.
    plan_period_s : float
        Time between two plans.
    planner : Planner, optional
        The model-predictive layer; one with default settings if left out.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = MpcController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> observation = Observation(state=FleetState.idle(4))
    >>> controller.decide(observation, controller.init())[0].route_frac
    array([0.5, 0.5, 0.5, 0.5])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        plan_period_s: float = 0.5,
        planner: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__(fleet, slo, **settings)
        positive("MpcController.plan_period_s", plan_period_s)
        self.plan_period_s = plan_period_s
        self._planner = planner
        if planner is None and not fleet.colocated:
            # Loads CVXPY, which nothing else does.
            from voltana_ctrl.control.plan import Planner

            self._planner = Planner(fleet, slo, delay_s=self.delay_s, margin_frac=self.margin_frac)

    def _decide(
        self, observation: Observation, memory: CascadeMemory
    ) -> tuple[Decision, CascadeMemory]:
        memory = self._look(observation, memory)
        state = observation.state
        if memory.target is None or self._planner is None:
            return self._settle(state, memory, None)
        # A new target is planned for at once; the ceilings follow the budget at every tick.
        due = state.t_s - memory.plan_s >= self.plan_period_s - 1e-9
        if due or memory.planned_s > memory.plan_s:
            memory = self._plan(state, memory)
        return self._settle(state, memory, memory.plan)

    def _plan(self, state: FleetState, memory: CascadeMemory) -> CascadeMemory:
        target = memory.target
        if target is None:
            return memory
        plan = self._planner.plan(
            state, self._load.load(memory.load), target, budget_w=self._budget_w(state.t_s)
        )
        if plan.status is not Status.OK:
            return replace(memory, plan=None, plan_s=state.t_s)
        # The target prices a lasting request, the costate one more now.
        price = target.price_j_req + plan.price_j_req
        if memory.price_j_req is not None:
            price = memory.price_j_req + 0.2 * (price - memory.price_j_req)
        return replace(memory, plan=plan, plan_s=state.t_s, price_j_req=price)
