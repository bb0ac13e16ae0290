"""Looks ahead where waking takes time: forecast, reserve, plan, and who is on until the next look.

Two things keep instances on. The *reserve* is compared with what serves at every look, in closed
form: what may come in the time that waking takes must find capacity, so a shortage, a death or a
cut of the budget waits for no solver. The *plan* says how many more are worth their watts, and when
those that are not needed may go; it is made every few seconds, beside the tick where a fleet runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.checks import F64, Bool, positive
from voltana_ctrl.control.standby import Standby, StandbyMemory
from voltana_ctrl.control.supply import Supply
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.estimate.forecast import Forecaster, ForecastMemory, Outlook, OwnForecast
from voltana_ctrl.types import Belief, FleetSpec, FleetState, Load, Slo

if TYPE_CHECKING:
    from voltana_ctrl.control.plan import Plan, Planner, Situation

_LOG = logging.getLogger(__name__)

__all__ = ["Lookahead", "LookaheadMemory", "takes_time"]

#: Part of the misses that the promise allows which shortages may use up.
_SHORT_PART = 0.25
#: How far reserves are looked at [s].
_HORIZON_S = 120
#: Time in which what waits too long should be gone.
_CATCH_UP_S = 5.0


def takes_time(fleet: FleetSpec, period_s: float) -> bool:
    """Whether parking saves power that is not there again within one period.

    Where it is, nothing has to be foreseen: who is active follows the load.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    period_s : float
        Time between two targets.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> takes_time(FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b")), 1.0)
    False
    """
    return any(one.wake_s > period_s and one.parked_w < one.idle_w for one in fleet.instances)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookaheadMemory:
    """What a :class:`Lookahead` remembers.

    Parameters
    ----------
    forecast : ForecastMemory
        Behind the forecast.
    standby : StandbyMemory
        Who is on.
    plan : Plan, optional
        The last one that may be applied.
    plan_s : float
        When its situation was seen.
    tried_s : float
        When the last one was asked for.
    status : str
        How that ended, by the name of its status; empty before the first.
    budget_w, alive : float, int
        Budget and instances alive at the last look.
    """

    forecast: ForecastMemory
    standby: StandbyMemory
    plan: Plan | None = None
    plan_s: float = -np.inf
    tried_s: float = -np.inf
    status: str = ""
    budget_w: float = np.inf
    alive: int = 0


class Lookahead:
    """Who is on, from what is expected.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promises.
    target : TargetOptimiser
        Knows what an instance draws and can carry.
    period_s : float
        Time between two plans.
    beside : bool
        Whether plans are made in a thread beside the ticks; in simulation they are not, so that
        runs are the same every time.
    own : callable, optional
        A host's own forecast, see :class:`voltana_ctrl.estimate.Forecaster`.

    Raises
    ------
    ConfigError
        If the period is not positive.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> slo = Slo(ttft_s=0.6, itl_s=0.06)
    >>> ahead = Lookahead(fleet, slo, TargetOptimiser(fleet, slo))
    >>> ahead.init().standby.on
    array([ True,  True])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        target: TargetOptimiser,
        *,
        period_s: float = 10.0,
        beside: bool = False,
        own: OwnForecast | None = None,
    ) -> None:
        # Loads CVXPY, which nothing else does: where it is missing, that is said at the start.
        from voltana_ctrl.control import plan

        positive("Lookahead.period_s", period_s)
        self._programme = plan
        self._fleet = fleet
        self._slo = slo
        self._target = target
        self._period_s = period_s
        self._starts = np.array(fleet.prefill)
        phases = target.phases
        self._groups = [group for groups in phases for group in groups]
        self._phases = [k for k, groups in enumerate(phases) for _ in groups]
        self._standby = Standby(fleet, self._groups, self._phases)
        self._forecaster = Forecaster(short_frac=_SHORT_PART * (1.0 - slo.attainment), own=own)
        self._longest_s = max(one.wake_s for one in fleet.instances)
        self._planner: Planner | None = None
        self._thread = ThreadPoolExecutor(1, "voltana-plan") if beside else None
        #: The plan under way, and when its situation was seen; a cache, not memory.
        self._pending: tuple[Future[Plan], float] | None = None

    @property
    def planner(self) -> Planner:
        """The programme, stated at first use."""
        if self._planner is None:
            first = [self._fleet.instances[int(group[0])] for group in self._groups]
            self._planner = self._programme.Planner(
                self._phases,
                wake_s=[one.wake_s for one in first],
                wake_j=[one.wake_j for one in first],
                idle_w=[one.idle_w for one in first],
                parked_w=[one.parked_w for one in first],
                limit_s=None if self._thread is None else 1.0,
            )
        return self._planner

    def init(self) -> LookaheadMemory:
        """Nothing seen; everybody on."""
        return LookaheadMemory(forecast=self._forecaster.init(), standby=self._standby.init())

    def count(self, memory: LookaheadMemory, state: FleetState) -> LookaheadMemory:
        """Memory after counting what arrived and seeing who is empty; at every tick.

        Parameters
        ----------
        memory : LookaheadMemory
            Not changed.
        state : FleetState
            Of the fleet.
        """
        if memory.forecast.t_s >= state.t_s:
            return memory
        forecast = self._forecaster.update(
            memory.forecast,
            t_s=state.t_s,
            arrived_req=float(state.arrived_req[self._starts].sum()),
        )
        return replace(memory, forecast=forecast, standby=self._standby.look(memory.standby, state))

    def serving(self, memory: LookaheadMemory, state: FleetState) -> Bool:
        """Who can take new work now.

        Parameters
        ----------
        memory : LookaheadMemory
            What :meth:`count` returned.
        state : FleetState
            Of the fleet.
        """
        return self._standby.serving(memory.standby, state)

    def look(
        self,
        memory: LookaheadMemory,
        state: FleetState,
        load: Load,
        belief: Belief,
        budget_w: Callable[[float], float],
    ) -> LookaheadMemory:
        """Memory after deciding who is on.

        Parameters
        ----------
        memory : LookaheadMemory
            What :meth:`count` returned.
        state : FleetState
            Of the fleet.
        load : Load
            What arrives now; its lengths are taken for those of what will arrive.
        belief : Belief
            What was learnt about the instances.
        budget_w : callable
            Power that the fleet may draw at a time, as far as is known now.
        """
        supplies = self._target.supplies(load.lengths, belief)
        if supplies is None:
            # Nobody keeps the promises alone: nobody may rest.
            return self._ordered(memory, state, [len(group) for group in self._groups])
        outlook = self._forecaster.outlook(memory.forecast)
        residence_s = max(1.0, load.lengths.output_tok - 1.0) * self._slo.itl_s
        decode_req_s = self._decode_req_s(state, residence_s)
        backlog_req = max(
            0.0,
            float(state.queue_req[self._starts].sum()) - outlook.now_req_s * self._slo.ttft_s,
        )
        if self._fleet.colocated:
            backlog_req = 0.0
        reserve = self._reserve(outlook, decode_req_s, residence_s, backlog_req)
        # What must be there at any time until more could be woken.
        highest = np.maximum.accumulate(reserve, axis=1)
        needed = self._standby.enough(
            state, supplies, lambda lead_s: highest[:, _second(lead_s)], self._target.spare
        )
        on = np.array([np.count_nonzero(memory.standby.on[group]) for group in self._groups])
        now_w = budget_w(state.t_s)
        alive = int(np.count_nonzero(state.alive))
        event = bool(np.any(needed > on)) or now_w != memory.budget_w or alive != memory.alive
        memory = replace(memory, budget_w=now_w, alive=alive)
        if event or state.t_s - memory.tried_s >= self._period_s - 1e-9:
            situation = self._situation(
                memory, state, supplies, outlook, reserve, decode_req_s, backlog_req,
                residence_s, budget_w,
            )  # fmt: skip
            memory = self._asked(memory, situation, state.t_s)
        memory = self._answered(memory)
        wanted = None
        if memory.plan is not None:
            wanted = memory.plan.wanted(state.t_s - memory.plan_s)
        if wanted is None:
            # Nobody knows what may rest.
            wanted = np.array([len(group) for group in self._groups], dtype=np.float64)
        return self._ordered(memory, state, np.maximum(wanted, needed))

    def notes(self, memory: LookaheadMemory) -> dict[str, float]:
        """What observers may want to see: who is on, what is expected, and the plan's prices.

        The status of the last plan is the name of a note that is 1, such as ``plan_rounded``.

        Parameters
        ----------
        memory : LookaheadMemory
            Of the last tick.
        """
        outlook = self._forecaster.outlook(memory.forecast)
        noted = {
            "forecast_10s_req_s": float(outlook.mean_at([10.0])[0]),
            "reserve_10s_req_s": float(outlook.reserve_at([10.0])[0]),
            "on": float(np.count_nonzero(memory.standby.on)),
        }
        if memory.status:
            noted[f"plan_{memory.status.lower()}"] = 1.0
        if memory.plan is not None:
            noted |= {
                "price_request_now_j": float(memory.plan.request_j[0]),
                "price_request_later_j": float(memory.plan.request_j[-1]),
                "price_watt_frac": float(memory.plan.watt_frac[0]),
            }
        return {name: value for name, value in noted.items() if np.isfinite(value)}

    # What a plan starts from

    def _decode_req_s(self, state: FleetState, residence_s: float) -> float:
        """Arrivals that would keep the batches as they are, were iterations at their limit."""
        members = self._fleet.decode
        running_req = float((state.running_req + state.queue_req)[members].sum())
        return running_req / residence_s

    def _reserve(
        self,
        outlook: Outlook,
        decode_req_s: float,
        residence_s: float,
        backlog_req: float,
    ) -> F64:
        """Load that each phase must be able to carry, per second, shape (n_phases, seconds).

        Decode follows what arrives with its residence time, so that a burst in the queue is seen
        and one that is over is not forgotten too soon.
        """
        seconds = np.arange(_HORIZON_S + 1.0)
        arrives = outlook.reserve_at(seconds, ahead_s=self._longest_s)
        arrives[0] = max(arrives[0], outlook.now_req_s)
        arrives[: int(_CATCH_UP_S)] += backlog_req / _CATCH_UP_S
        paths = [arrives]
        if not self._fleet.colocated:
            follow = -np.expm1(-1.0 / residence_s)
            decode = np.empty_like(arrives)
            decode[0] = decode_req_s
            for k in range(1, len(decode)):
                unknown = np.isinf(arrives[k - 1]) or np.isinf(decode[k - 1])
                step = np.inf if unknown else follow * (arrives[k - 1] - decode[k - 1])
                decode[k] = decode[k - 1] + step
            paths.append(decode)
        return np.stack(paths)

    def _situation(
        self,
        memory: LookaheadMemory,
        state: FleetState,
        supplies: list[Supply],
        outlook: Outlook,
        reserve: F64,
        decode_req_s: float,
        backlog_req: float,
        residence_s: float,
        budget_w: Callable[[float], float],
    ) -> Situation:
        steps_s = np.array(self._programme.STEPS_S)
        end_s = np.cumsum(steps_s)
        begin_s = end_s - steps_s
        middle_s = 0.5 * (begin_s + end_s)
        standby, alive = memory.standby, state.alive
        serving = self._standby.serving(standby, state)
        waking = standby.on & alive & ~serving
        draining = ~standby.on & ~standby.asleep & alive

        def per_group(which: Bool) -> F64:
            return np.array([np.count_nonzero(which[group]) for group in self._groups], np.float64)

        return self._programme.Situation(
            supplies=supplies,
            installed=per_group(alive),
            awake=per_group(serving),
            draining=per_group(draining),
            waking_s=[standby.ready_s[group[waking[group]]] - state.t_s for group in self._groups],
            backlog_req=backlog_req,
            decode_req_s=decode_req_s,
            arrival_req_s=outlook.mean_at(middle_s),
            reserve_req_s=np.stack(
                [
                    reserve[:, _second(begin) : _second(end)].max(axis=1)
                    for begin, end in zip(begin_s, end_s, strict=True)
                ],
                axis=1,
            ),
            residence_s=residence_s,
            budget_w=np.array([budget_w(state.t_s + at_s) for at_s in begin_s]),
        )

    def _asked(self, memory: LookaheadMemory, situation: Situation, t_s: float) -> LookaheadMemory:
        """Have a plan made, here or beside the tick."""
        memory = replace(memory, tried_s=t_s)
        if self._thread is None:
            return self._taken(memory, self.planner.plan(situation), t_s)
        if self._pending is None:
            self._pending = self._thread.submit(self.planner.plan, situation), t_s
        return memory

    def _answered(self, memory: LookaheadMemory) -> LookaheadMemory:
        """Take the plan that was made beside the tick, if it is done."""
        if self._pending is None or not self._pending[0].done():
            return memory
        future, seen_s = self._pending
        self._pending = None
        error = future.exception()
        if error is not None:
            _LOG.error("the planner failed; the last plan holds for its horizon", exc_info=error)
            return replace(memory, status="FAILED")
        return self._taken(memory, future.result(), seen_s)

    def _taken(self, memory: LookaheadMemory, plan: Plan, seen_s: float) -> LookaheadMemory:
        """A plan that may not be applied leaves the last one, which holds for its horizon."""
        if plan.status.usable and not np.all(np.isfinite(plan.on)):
            _LOG.error("the planner returned no numbers; the last plan holds for its horizon")
            return replace(memory, status="FAILED")
        memory = replace(memory, status=plan.status.name)
        return replace(memory, plan=plan, plan_s=seen_s) if plan.status.usable else memory

    def _ordered(
        self, memory: LookaheadMemory, state: FleetState, wanted: F64 | list[int]
    ) -> LookaheadMemory:
        return replace(memory, standby=self._standby.order(memory.standby, state, wanted))


def _second(lead_s: float) -> int:
    return min(int(np.ceil(lead_s)), _HORIZON_S)
