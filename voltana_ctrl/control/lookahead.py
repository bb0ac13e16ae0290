"""Looks ahead where waking takes time or work may wait: forecast, reserve, plan, and what follows.

Where waking takes time, two things keep instances on. The *reserve* is compared with what serves at
every look, in closed form: what may come in the time that waking takes must find capacity, so a
shortage, a death or a cut of the budget waits for no solver. The *plan* says how many more are
worth their watts, and when those that are not needed may go; it is made every few seconds, beside
the tick where a fleet runs.

Where work may wait, the plan says how fast it is let in: beside the reserve, before its deadlines,
within the budget as far as that is known, and when energy costs least. Without a plan it is let in
at the lowest steady rate that keeps the deadlines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import F64, Bool, positive
from voltana_ctrl.control.deferral import Deferral, DeferralMemory
from voltana_ctrl.control.situation import (
    STEPS_S,
    Plan,
    PlanStatus,
    Situation,
    steps_to_s,
)
from voltana_ctrl.control.standby import Standby, StandbyMemory
from voltana_ctrl.control.supply import Supply
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.estimate.forecast import Forecaster, ForecastMemory, Outlook, OwnForecast
from voltana_ctrl.types import (
    Admission,
    Belief,
    FleetSpec,
    FleetState,
    Load,
    Observation,
    Slo,
    Steps,
)

if TYPE_CHECKING:
    from voltana_ctrl.control.plan import Planner

_LOG = logging.getLogger(__name__)

__all__ = ["Lookahead", "LookaheadMemory", "takes_time"]

#: Part of the misses that the promise allows which shortages may use up.
_SHORT_PART = 0.25
#: How far reserves are looked at [s].
_HORIZON_S = 120
#: Where a budget holds instances below their needs for this share of the time, of the work that may
#: wait only what is due so soon [s] is let in.
_HELD_FRAC, _SOON_S = 0.1, 60.0


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
    >>> from voltana_ctrl import FleetSpec, load_profile
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
        What the forecast rests on.
    standby : StandbyMemory, optional
        Who is on; None where waking takes no time, and who is on follows the load.
    deferral : DeferralMemory
        What was seen of requests that may wait.
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
    standby: StandbyMemory | None
    deferral: DeferralMemory
    plan: Plan | None = None
    plan_s: float = -np.inf
    tried_s: float = -np.inf
    status: str = ""
    budget_w: float = np.inf
    alive: int = 0


class Lookahead:
    """Who is on, and what is let in of what may wait, from what is expected.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    target : TargetOptimiser
        Knows what an instance draws and can carry.
    period_s : float
        Time between two plans.
    beside : bool
        Whether plans are made in a thread beside the ticks; in simulation they are not, so that
        runs are the same every time.
    own : callable, optional
        A host's own forecast, see :class:`voltana_ctrl.estimate.Forecaster`.
    price, co2 : Steps, optional
        What energy costs per kWh, and grams of CO2 per kWh; of both, each counts relative to its
        mean.
    wakes : bool
        Whether it decides who is on.

    Raises
    ------
    ConfigError
        If the period is not positive.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.control import TargetOptimiser
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
        price: Steps | None = None,
        co2: Steps | None = None,
        wakes: bool = True,
    ) -> None:
        positive("Lookahead.period_s", period_s)
        if wakes:
            # Loads CVXPY, which nothing else does: where it is missing, that is said at the start.
            from voltana_ctrl.control import plan

            del plan
        self._wakes = wakes
        self._signals = [signal for signal in (price, co2) if signal is not None]
        self._deferral = Deferral()
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
        #: By what they reach and whether there is work that may wait; a cache, not memory.
        self._planners: dict[tuple[int, bool], Planner] = {}
        self._thread = ThreadPoolExecutor(1, "voltana-plan") if beside else None
        #: The plan under way, and when its situation was seen; a cache, not memory.
        self._pending: tuple[Future[Plan], float] | None = None
        #: The forecasts that the last outlook was of, and it; a cache, not memory.
        self._latest: tuple[F64, Outlook] | None = None

    def planner(self, steps_s: tuple[float, ...] = STEPS_S, *, defers: bool = False) -> Planner:
        """The optimisation problem for steps of these lengths; stated at first use and kept.

        Parameters
        ----------
        steps_s : tuple of float
            Lengths of its steps in seconds.
        defers : bool
            Whether there is work that may wait.
        """
        key = len(steps_s), defers
        if key not in self._planners:
            from voltana_ctrl.control.plan import Planner

            first = [self._fleet.instances[int(group[0])] for group in self._groups]
            self._planners[key] = Planner(
                self._phases,
                wake_s=[one.wake_s for one in first],
                wake_j=[one.wake_j for one in first],
                idle_w=[one.idle_w for one in first],
                parked_w=[one.parked_w for one in first],
                steps_s=steps_s,
                defers=defers,
                limit_s=None if self._thread is None else 1.0,
                **({} if self._wakes else {"whole_steps": 0}),
            )
        return self._planners[key]

    def init(self) -> LookaheadMemory:
        """Nothing seen; everybody on."""
        return LookaheadMemory(
            forecast=self._forecaster.init(),
            standby=self._standby.init() if self._wakes else None,
            deferral=self._deferral.init(),
        )

    def count(self, memory: LookaheadMemory, observation: Observation) -> LookaheadMemory:
        """Memory after counting what arrived and seeing who is empty; at every tick.

        Parameters
        ----------
        memory : LookaheadMemory
            What is known before this update; it is not changed.
        observation : Observation
            What was read from the fleet.
        """
        state, backlog = observation.state, observation.backlog
        if memory.forecast.t_s >= state.t_s:
            return memory
        deferral = self._deferral.count(memory.deferral, state.t_s, backlog)
        if not self._wakes and deferral.t_s < 0.0:
            return memory  # nothing to look ahead for
        # What was let in arrives at instances, too, but when was decided here.
        came_req = float(state.arrived_req[self._starts].sum()) - backlog.admitted_req
        forecast = self._forecaster.update(
            memory.forecast, t_s=state.t_s, arrived_req=max(0.0, came_req)
        )
        standby = memory.standby
        if standby is not None:
            standby = self._standby.look(standby, state)
        return replace(memory, forecast=forecast, standby=standby, deferral=deferral)

    def looks(self, memory: LookaheadMemory) -> bool:
        """Whether there is something to plan.

        Parameters
        ----------
        memory : LookaheadMemory
            What :meth:`count` returned.
        """
        return self._wakes or memory.deferral.t_s >= 0.0

    def serving(self, memory: LookaheadMemory, state: FleetState) -> Bool | None:
        """Who can take new work now; None where that is not decided ahead.

        Parameters
        ----------
        memory : LookaheadMemory
            What :meth:`count` returned.
        state : FleetState
            State of the fleet now.
        """
        if memory.standby is None:
            return None
        return self._standby.serving(memory.standby, state)

    def admission(
        self, memory: LookaheadMemory, t_s: float, residence_s: float, held_frac: float = 0.0
    ) -> Admission | None:
        """How what may wait is let in; None where there was none.

        Parameters
        ----------
        memory : LookaheadMemory
            What :meth:`look` returned.
        t_s : float
            Time now.
        residence_s : float
            Mean time of a request in decode.
        held_frac : float
            Share of the last seconds in which a budget held some instance below the clock that it
            needs.
        """
        if memory.deferral.t_s < 0.0:
            return None
        lead_s = self._deferral.lead_s(self._slo.ttft_s, residence_s)
        rate_req_s = self._deferral.pace_req_s(memory.deferral, lead_s=lead_s)
        step = None if memory.plan is None else memory.plan.step(t_s - memory.plan_s)
        if memory.status == PlanStatus.INFEASIBLE.name:
            rate_req_s = 0.0  # there is no power for those who cannot wait
        elif memory.plan is not None and step is not None:
            rate_req_s = max(0.0, float(memory.plan.let_in_req_s[step]))
        if held_frac > 0.0:
            # Those come first that are promised an answer soon; of the rest what is due comes in.
            _, due_req = self._deferral.flows(memory.deferral, np.array([_SOON_S]), lead_s=lead_s)
            beside_req_s = max(0.0, 1.0 - held_frac / _HELD_FRAC) * rate_req_s
            rate_req_s = min(rate_req_s, max(beside_req_s, float(due_req[0]) / _SOON_S))
        due_s = self._deferral.lead_s(self._slo.ttft_s, residence_s, last=True)
        return Admission(rate_req_s=rate_req_s, due_s=due_s)

    def residence_s(self, load: Load) -> float:
        """Mean time of a request in decode, were iterations at their limit.

        Parameters
        ----------
        load : Load
            Arrivals and their lengths.

        Returns
        -------
        float
            Seconds.
        """
        return max(1.0, load.lengths.output_tok - 1.0) * self._slo.itl_s

    def look(
        self,
        memory: LookaheadMemory,
        state: FleetState,
        load: Load,
        belief: Belief,
        budget_w: Callable[[float, float], float],
    ) -> LookaheadMemory:
        """Memory after deciding who is on, and planning what is let in.

        Parameters
        ----------
        memory : LookaheadMemory
            What :meth:`count` returned.
        state : FleetState
            State of the fleet now.
        load : Load
            What arrives now; its lengths are taken for those of what will arrive.
        belief : Belief
            What was learnt about the instances.
        budget_w : callable
            Least power that the fleet may draw between two times, as far as is known now.
        """
        supplies = self._target.supplies(load.lengths, belief)
        if supplies is None:
            # Nobody keeps the promises alone: nobody may rest.
            return self._ordered(memory, state, np.array([len(group) for group in self._groups]))
        outlook = self._outlook(memory.forecast)
        residence_s = self.residence_s(load)
        decode_req_s = self._decode_req_s(state, residence_s)
        backlog_req = max(
            0.0,
            float(state.queue_req[self._starts].sum()) - outlook.now_req_s * self._slo.ttft_s,
        )
        if self._fleet.colocated:
            backlog_req = 0.0
        reserve = self._reserve(outlook, decode_req_s, residence_s, backlog_req)
        standby, short, needed = memory.standby, False, np.zeros(len(self._groups))
        if standby is not None:
            # What must be there at any time until more could be woken.
            highest = np.maximum.accumulate(reserve, axis=1)
            needed = self._standby.enough(
                state, supplies, lambda lead_s: highest[:, _second(lead_s)], self._target.spare
            )
            on = np.array([np.count_nonzero(standby.on[group]) for group in self._groups])
            short = bool(np.any(needed > on))
        now_w = budget_w(state.t_s, state.t_s)
        alive = int(np.count_nonzero(state.alive))
        event = short or now_w != memory.budget_w or alive != memory.alive
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
            Memory after the last tick.
        """
        outlook = self._outlook(memory.forecast)
        noted = {
            "forecast_10s_req_s": float(outlook.mean_at([10.0])[0]),
            "reserve_10s_req_s": float(outlook.reserve_at([10.0])[0]),
        }
        if memory.standby is not None:
            noted["on"] = float(np.count_nonzero(memory.standby.on))
        if memory.deferral.t_s >= 0.0:
            noted["held_req"] = float(len(memory.deferral.deadline_s))
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

    def _outlook(self, forecast: ForecastMemory) -> Outlook:
        """Outlook of a forecast; it changes with its steps, and notes ask for it at every tick."""
        if self._latest is None or self._latest[0] is not forecast.issued_req_s:
            self._latest = forecast.issued_req_s, self._forecaster.outlook(forecast)
        return self._latest[1]

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
        catch_up_s = self._target.tuning.catch_up_s
        arrives[: max(1, int(catch_up_s))] += backlog_req / catch_up_s
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
        budget_w: Callable[[float, float], float],
    ) -> Situation:
        deferral, t_s, alive = memory.deferral, state.t_s, state.alive
        steps_s = np.array(steps_to_s(deferral.allowed_s))
        end_s = np.cumsum(steps_s)
        begin_s = end_s - steps_s
        middle_s = 0.5 * (begin_s + end_s)
        standby = memory.standby
        if standby is None:
            serving, waking, draining = alive, ~alive & False, ~alive & False
            ready_s = np.full(len(alive), t_s)
        else:
            serving = self._standby.serving(standby, state)
            waking = standby.on & alive & ~serving
            draining = ~standby.on & ~standby.asleep & alive
            ready_s = standby.ready_s
        waits: dict[str, Any] = {}
        if deferral.t_s >= 0.0:
            lead_s = self._deferral.lead_s(self._slo.ttft_s, residence_s)
            come, due = self._deferral.flows(deferral, end_s, lead_s=lead_s)
            step = None if memory.plan is None else memory.plan.step(t_s - memory.plan_s)
            last = 0.0 if memory.plan is None or step is None else memory.plan.let_in_req_s[step]
            waits = {
                "come_req": come, "due_req": due, "let_in_req_s": float(last),
            }  # fmt: skip

        def per_group(which: Bool) -> F64:
            return np.array([np.count_nonzero(which[group]) for group in self._groups], np.float64)

        return Situation(
            supplies=supplies,
            installed=per_group(alive),
            awake=per_group(serving),
            draining=per_group(draining),
            waking_s=[ready_s[group[waking[group]]] - t_s for group in self._groups],
            backlog_req=backlog_req,
            decode_req_s=decode_req_s,
            arrival_req_s=outlook.mean_at(middle_s),
            reserve_req_s=np.stack(
                [
                    reserve[:, _second(begin) : max(_second(end), _second(begin) + 1)].max(axis=1)
                    for begin, end in zip(begin_s, end_s, strict=True)
                ],
                axis=1,
            ),
            residence_s=residence_s,
            budget_w=np.array(
                [
                    budget_w(t_s + begin, t_s + end)
                    for begin, end in zip(begin_s, end_s, strict=True)
                ]
            ),
            price_frac=self._weights(t_s + begin_s, t_s + end_s),
            **waits,
        )

    def _weights(self, from_s: F64, until_s: F64) -> F64 | None:
        """What a joule counts in each step: relative to the mean of the horizon."""
        if not self._signals:
            return None
        weights = np.zeros(len(from_s))
        for signal in self._signals:
            mean = np.array(
                [signal.mean(a, b) for a, b in zip(from_s, until_s, strict=True)], np.float64
            )
            # Where energy is given away it costs nothing: nobody burns it.
            mean = np.maximum(mean, 0.0)
            over_all = float(mean @ (until_s - from_s)) / float(until_s[-1] - from_s[0])
            weights += mean / over_all if over_all > 0.0 else 1.0
        return weights / len(self._signals)

    def _asked(self, memory: LookaheadMemory, situation: Situation, t_s: float) -> LookaheadMemory:
        """Have a plan made, here or beside the tick."""
        memory = replace(memory, tried_s=t_s)
        defers = situation.come_req is not None
        steps_s = steps_to_s(memory.deferral.allowed_s)

        def made() -> Plan:
            return self.planner(steps_s, defers=defers).plan(situation)

        if self._thread is None:
            return self._taken(memory, made(), t_s)
        if self._pending is None:
            self._pending = self._thread.submit(made), t_s
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
        numbers = np.all(np.isfinite(plan.on)) and np.all(np.isfinite(plan.let_in_req_s))
        if plan.status.usable and not numbers:
            _LOG.error("the planner returned no numbers; the last plan holds for its horizon")
            return replace(memory, status="FAILED")
        memory = replace(memory, status=plan.status.name)
        return replace(memory, plan=plan, plan_s=seen_s) if plan.status.usable else memory

    def _ordered(
        self, memory: LookaheadMemory, state: FleetState, wanted: np.ndarray
    ) -> LookaheadMemory:
        if memory.standby is None:
            return memory
        return replace(memory, standby=self._standby.order(memory.standby, state, wanted))


def _second(lead_s: float) -> int:
    return min(int(np.ceil(lead_s)), _HORIZON_S)
