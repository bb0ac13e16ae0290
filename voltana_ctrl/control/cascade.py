"""The controller: estimate, target, and what the governors may do until the next tick.

Where there is something to foresee, :class:`~voltana_ctrl.control.MpcController` looks ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from voltana_ctrl.checks import F64, Bool, not_negative, positive
from voltana_ctrl.control.assess import Assessment, Assessor
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.budget import ceilings_within, target_within
from voltana_ctrl.control.depth import at_rest
from voltana_ctrl.control.lookahead import LookaheadMemory
from voltana_ctrl.control.losses import LossMemory, after
from voltana_ctrl.control.target import Target, TargetOptimiser
from voltana_ctrl.estimate.headroom import HeadroomFilter, HeadroomMemory
from voltana_ctrl.estimate.load import LoadFilter, LoadMemory
from voltana_ctrl.estimate.pace import PaceFilter, PaceMemory
from voltana_ctrl.estimate.regime import Regime, RegimeFilter, RegimeMemory
from voltana_ctrl.types import (
    DEPTHS,
    Belief,
    Decision,
    Depth,
    FleetSpec,
    FleetState,
    Load,
    Observation,
    PowerBudget,
    Slo,
    Status,
    Tuning,
)

__all__ = ["CascadeController", "CascadeMemory"]

#: A step of a budget is obeyed so long before the last decision before it is replaced.
_EFFECT_S = 0.1
#: How long it is remembered that a budget held an instance below the clock that it needs [s].
_HELD_MEMORY_S = 10.0
#: Under a budget decode lends prefill this part of the clock that it needs, for so long after what
#: waits at a prefill instance took this part of the TTFT promise at its ceiling. A burst is over in
#: seconds, and longer answers have that much to spare. Late first tokens fell most with these.
_LENT_FRAC, _LENT_S, _BURST_FRAC = 0.13, 0.2, 0.6
#: How far the ceiling of prefill comes down from its highest clock to the thrifty one, at most. At
#: 0.85 a bursty trace takes 1.5 % less still, but steady load near capacity misses the promise.
_LOWERED_FRAC = 0.6
#: Least TTFT margin where roles change: queues stand while an instance turns. It takes 0.2 % more
#: power than 0.02, and 0.3 points more of the first tokens are in time.
_TURNS_FRAC = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CascadeMemory:
    """What the controller remembers between ticks.

    Parameters
    ----------
    load : LoadMemory
        What the estimate of arrivals and lengths rests on.
    margin : HeadroomMemory
        Margins on top of the governors' own.
    regime : RegimeMemory
        What the verdict on the regime rests on.
    target : Target, optional
        The last target; None before the first.
    planned_s : float
        When it was planned.
    ahead : LookaheadMemory, optional
        Forecast, plan and who is on; None where nothing takes time.
    serving : ndarray of bool, shape (n,), optional
        Who could take new work when the target was planned, where that is decided ahead.
    ceiling_mhz : ndarray, shape (n,), optional
        Ceilings of the last decision.
    overload_frac : float
        ITL margin that still pays where the target is not feasible.
    losses : LossMemory
        Who was lost, and what that asks for.
    held_frac : ndarray, shape (2,)
        Share of the last 10 s in which a budget held some instance that prefills, and one that
        decodes, below the clock that it needs.
    held_s : ndarray, shape (2,)
        Time until which misses of TTFT and of ITL are those of a budget.
    lent_s : float
        Time until which decode lends prefill a part of its power under a budget.
    pace : PaceMemory
        What is known of pace, delay and highest clock of every instance.
    belief : Belief
        What governors and routers were told last.
    """

    load: LoadMemory
    margin: HeadroomMemory
    regime: RegimeMemory
    pace: PaceMemory
    belief: Belief
    target: Target | None = None
    planned_s: float = 0.0
    ahead: LookaheadMemory | None = None
    serving: Bool | None = None
    ceiling_mhz: F64 | None = None
    overload_frac: float = 0.0
    losses: LossMemory = field(default_factory=LossMemory)
    held_s: F64 = field(default_factory=lambda: np.full(2, -np.inf))
    held_frac: F64 = field(default_factory=lambda: np.zeros(2))
    lent_s: float = -np.inf


class CascadeController(Controller):
    """Target layer and governors: who is active follows the load, and nothing is foreseen.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    period_s : float
        Time between decisions.
    target_period_s : float
        Time between two targets.
    governed : bool
        Whether an :class:`IterationGovernor` runs on every instance. Without, the floor is the
        clock, and it answers to queues and batches at every tick.
    delay_s : float
        Time from asking for a clock until it runs.
    margin_frac : tuple of float, optional
        TTFT and ITL margin of the governors; more is added where requests miss. Those of the
        tuning if left out.
    power_budget_w : float, callable or PowerBudget, optional
        Power that the fleet may draw, or a function of the time that tells it; or its steps, each
        of them known from when it is announced.
    target : TargetOptimiser, optional
        The target layer; one with the settings above if left out.
    load : LoadFilter, optional
        Estimates what arrives; one with default settings if left out.
    measured_delay_s : callable
        Delays that machines have measured, by the id of the instance; they count in place of
        `delay_s` from then on.
    learnt : Belief, optional
        What an earlier run of the same fleet has learnt, to begin with; all but the delay.
    tuning : Tuning, optional
        What is chosen rather than derived; the defaults if left out.

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
        margin_frac: tuple[float, float] | None = None,
        power_budget_w: float | Callable[[float], float] | PowerBudget | None = None,
        target: TargetOptimiser | None = None,
        load: LoadFilter | None = None,
        measured_delay_s: Callable[[], Mapping[str, float]] = dict,
        learnt: Belief | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        positive(f"{type(self).__name__}.target_period_s", target_period_s)
        fleet, depth = at_rest(fleet, target_period_s)
        #: How deep each sleeps that is parked; None where all are parked and no more.
        self._depth = None if set(depth) == {"parked"} else depth
        #: How deep a plan lets some sleep, where who is awake may be parked besides.
        self._sleep: tuple[Depth, ...] | None = None
        super().__init__(fleet, period_s=period_s)
        not_negative(f"{type(self).__name__}.delay_s", delay_s)
        self.slo = slo
        self.target_period_s = target_period_s
        self.governed = governed
        self.delay_s = delay_s
        self._measured_delay_s = measured_delay_s
        self._learnt = learnt
        self._tuning = tuning = tuning or Tuning()
        turns = any(one.roles for one in fleet.instances)
        own_frac = tuning.margin_frac
        if turns:
            own_frac = (max(own_frac[0], _TURNS_FRAC), own_frac[1])
        self.margin_frac = margin_frac = margin_frac or own_frac
        self._power_budget_w = power_budget_w
        self._target = target or TargetOptimiser(
            fleet, slo, margin_frac=margin_frac, delay_s=delay_s, governed=governed, tuning=tuning,
            period_s=target_period_s,
        )  # fmt: skip
        self._load = load or LoadFilter(fleet, tuning=tuning)
        self._pace = PaceFilter(fleet, delay_s=delay_s)
        self._regime = RegimeFilter(fleet, tuning=tuning)
        self._spends = not (fleet.colocated or turns or power_budget_w is not None)
        self._margin = HeadroomFilter(fleet, slo, tuning)
        self._idle_w = sum(one.idle_w for one in fleet.instances)
        self._assessor = Assessor(fleet, slo)
        self._held_step = -np.expm1(-float(period_s) / _HELD_MEMORY_S)
        self._prefills = np.array([one.role.prefills for one in fleet.instances])
        # Put together anew at every access; asked for at every tick.
        self._prefill, self._decode = np.array(fleet.prefill), np.array(fleet.decode)
        self._min_mhz, self._max_mhz = fleet.min_mhz, fleet.max_mhz
        self._equal_frac = Decision.highest(fleet).route_frac

    def init(self) -> CascadeMemory:
        """Nothing seen, nothing planned."""
        learnt, added_frac = self._learnt, (0.0, 0.0)
        belief = Belief.of_profiles(self.fleet, margin_frac=self.margin_frac, delay_s=self.delay_s)
        if learnt is not None:
            belief = replace(learnt, delay_s=belief.delay_s)
            added_frac = (
                float(learnt.ttft_margin_frac.max()) - self.margin_frac[0],
                float(learnt.itl_margin_frac.max()) - self.margin_frac[1],
            )
        return CascadeMemory(
            load=self._load.init(),
            margin=self._margin.init(added_frac),
            regime=RegimeMemory(),
            pace=self._pace.init(learnt),
            belief=belief,
        )

    def estimate(self, memory: CascadeMemory) -> tuple[Load, float, bool]:
        """What arrives, how uncertain its rate is, and whether lengths are changing.

        Parameters
        ----------
        memory : CascadeMemory
            Memory after the last tick.

        Returns
        -------
        load, doubt_frac, changes
            Arrivals and lengths; the standard deviation of the arrival rate, relative to it;
            whether those that arrive have other prompts than those that finished.
        """
        known = self._load
        return known.load(memory.load), known.doubt_frac(memory.load), known.changes(memory.load)

    def taken_over(self, memory: CascadeMemory) -> CascadeMemory:
        """Memory to go on with, of a controller of the same machines in other roles.

        What was learnt stays; what was planned is planned anew.

        Parameters
        ----------
        memory : CascadeMemory
            Memory of that controller after its last tick.
        """
        return replace(memory, target=None, serving=None, overload_frac=0.0)

    def regime(self, memory: CascadeMemory) -> Regime:
        """Regime that the fleet is in, as far as is known.

        Parameters
        ----------
        memory : CascadeMemory
            Memory after the last tick.
        """
        return self._regime.regime(memory.regime)

    def notes(self, memory: CascadeMemory) -> dict[str, float]:
        """What observers of the loop may want to see: margins, pace, delay, and who is clamped.

        Parameters
        ----------
        memory : CascadeMemory
            Memory after the last tick.

        Returns
        -------
        dict
            Values by name; `clamped_ID_mhz` stands there only for instances that get less than
            their highest clock.
        """
        belief = memory.belief
        noted = {
            "margin_ttft_frac": float(belief.ttft_margin_frac.max()),
            "margin_itl_frac": float(belief.itl_margin_frac.max()),
            "delay_s": float(belief.delay_s.max()),
        }
        for phase, members in (("prefill", self._prefill), ("decode", self._decode)):
            pace = getattr(belief, f"{phase}_pace_frac")[members]
            noted[f"{phase}_pace_frac"] = float(pace.max())
        # Who does not get what it is asked for is named.
        for i in np.flatnonzero(belief.able_mhz < self._max_mhz):
            noted[f"clamped_{self.fleet.ids[i]}_mhz"] = float(belief.able_mhz[i])
        return noted

    def _decide(
        self, observation: Observation, memory: CascadeMemory
    ) -> tuple[Decision, CascadeMemory]:
        memory = self._look(observation, memory)
        state = observation.state
        memory = replace(memory, lent_s=self._lent_s(state, memory))
        decision, held = self._follow(state, memory)
        pace = self._pace.asked(memory.pace, decision, governed=self.governed)
        memory = replace(memory, ceiling_mhz=decision.freq_max_mhz, pace=pace)
        return decision, self._count_held(state, memory, held)

    def _count_held(self, state: FleetState, memory: CascadeMemory, held: Bool) -> CascadeMemory:
        """Memory with until when misses of TTFT and ITL are those of a budget.

        No margin makes an instance faster that is held below the clock that it needs: what is late
        there says nothing about margins, and they do not wind up.
        """
        phases = np.array([held[self._prefill].any(), held[self._decode].any()])
        held_frac = memory.held_frac + self._held_step * (phases - memory.held_frac)
        decoded_tok = max(0.0, self._load.load(memory.load).lengths.output_tok - 1.0)
        until_s = state.t_s + self.slo.ttft_s + 2.0 * decoded_tok * self.slo.itl_s
        held_s = np.where(held_frac > 0.5, until_s, memory.held_s)
        return replace(memory, held_s=held_s, held_frac=held_frac)

    def _look(self, observation: Observation, memory: CascadeMemory) -> CascadeMemory:
        """Update the estimates, and the target when it is due."""
        state = observation.state
        memory = replace(
            memory,
            load=self._load.update(observation, memory.load),
            margin=self._margin.update(
                memory.margin,
                observation.finished,
                running_req=float(state.running_req.sum()),
                feasible=(memory.target is None or memory.target.feasible)
                & (state.t_s >= memory.held_s),
                spends=self._spends_now(memory.belief),
            ),
            regime=self._regime.update(observation, memory.regime),
            pace=self._pace.update(
                memory.pace,
                observation,
                prompt_tok=self._load.load(memory.load).lengths.prompt_tok,
                measured_delay_s=self._measured_delay_s(),
            ),
        )
        was_alive = memory.losses.alive if memory.losses.alive.size else state.alive
        decoded_tok = max(0.0, self._load.load(memory.load).lengths.output_tok - 1.0)
        stays_s = self.slo.ttft_s + decoded_tok * self.slo.itl_s
        memory = replace(memory, losses=after(memory.losses, state, stays_s))
        due = memory.target is None or state.t_s - memory.planned_s >= self.target_period_s - 1e-9
        due = due or bool(np.any(state.alive != was_alive))
        memory, changed = self._believe(memory, margins_too=due)
        memory, moved = self._look_ahead(observation, memory, due=due)
        changed = changed or moved
        # Until a target period has been watched, and work has come, there is nothing to plan for.
        seen = memory.load.arrived_req > 0.0 or bool(state.running_req.any())
        if memory.load.span_s < self.target_period_s or not (due or changed) or not seen:
            return memory
        load, belief = self._load.load(memory.load), memory.belief
        # What waits longer than was promised has to be served besides what arrives, and what
        # crowds an instance must be kept from it.
        late_req = float(state.queue_req[self._prefill].sum())
        late_req -= load.arrival_req_s * self.slo.ttft_s
        behind_req = max(0.0, late_req) + self._assessor.crowded_req(state, memory.belief)
        if behind_req > 0.0:
            load = replace(
                load, arrival_req_s=load.arrival_req_s + behind_req / self._tuning.catch_up_s
            )
        # Everybody is active at first: parking must pay.
        active = np.ones(len(state), bool) if memory.target is None else memory.target.active
        usable, fixed = state.alive, memory.serving is not None and self._sleep is None
        if memory.serving is not None:
            usable = memory.serving
            active = usable if fixed else active & usable

        doubt_frac = self._tuning.doubt_sd_frac * self._load.doubt_frac(memory.load)
        forgone_j = np.zeros(2) if memory.target is None else memory.target.forgone_j
        # Nobody chose the set that a loss has left: who comes back ends it, without a wait.
        back = state.alive & ~was_alive
        is_back = [any(back[group].any() for group in groups) for groups in self._target.phases]
        forgone_j = np.where(is_back, np.inf, forgone_j[: len(is_back)])

        def plan(part: Load) -> Target:
            return self._target.plan(
                part, active=active, usable=usable, belief=belief, fixed=fixed,
                forgone_j=forgone_j,
                lasted_s=state.t_s - memory.planned_s,
                doubt_frac=min(1.0, doubt_frac),
                state=state,
            )  # fmt: skip

        target = target_within(self._budget_w(state.t_s), load, plan(load), plan)
        overload_frac = 0.0
        if not target.feasible:
            overload_frac = self._target.overload_frac(load, target.route_frac, belief, state)
        return replace(memory, target=target, planned_s=state.t_s, overload_frac=overload_frac)

    def _look_ahead(
        self, observation: Observation, memory: CascadeMemory, *, due: bool
    ) -> tuple[CascadeMemory, bool]:
        """Memory with who serves, where that is decided ahead, and whether it is another set."""
        del observation, due
        return memory, False

    def _believe(self, memory: CascadeMemory, *, margins_too: bool) -> tuple[CascadeMemory, bool]:
        """Memory with a new belief, if there is news, and whether any instance is another now.

        Governors keep what they believe as long as it is about right, and plans, too.
        """
        pace, tuning = memory.pace, self._tuning
        pace_frac, noise_frac = self._pace.pace_frac(pace), self._pace.noise_frac(pace)
        before = memory.belief
        ttft, itl = before.ttft_margin_frac, before.itl_margin_frac
        if margins_too:
            margins = self._margin.margins_frac(
                memory.margin, self.margin_frac, float(noise_frac[self._decode].mean())
            )
            margins[1] = max(margins[1], memory.losses.margin_frac(memory.load.t_s))
            if memory.target is not None and not memory.target.feasible:
                margins[1] = max(margins[1], self.margin_frac[1] + memory.overload_frac)
            ttft, itl = (np.full(len(self.fleet), margin) for margin in margins)
        now = {
            "ttft_margin_frac": ttft,
            "itl_margin_frac": itl,
            "delay_s": self._pace.delay_s(pace),
            "prefill_pace_frac": pace_frac[:, 0],
            "decode_pace_frac": pace_frac[:, 1],
            "able_mhz": self._pace.able_mhz(pace),
            "noise_frac": noise_frac,
        }

        def moved(name: str, news: float) -> bool:
            return bool(np.abs(now[name] - getattr(before, name)).max() > news)

        other = (
            moved("able_mhz", 0.0)
            or moved("prefill_pace_frac", tuning.pace_news_frac)
            or moved("decode_pace_frac", tuning.pace_news_frac)
            or moved("delay_s", tuning.delay_news_s)
        )
        told = other or any(
            moved(name, tuning.margin_news_frac)
            for name in ("ttft_margin_frac", "itl_margin_frac", "noise_frac")
        )
        return (replace(memory, belief=Belief(**now)), other) if told else (memory, False)

    def _budget_w(self, t_s: float) -> float:
        """What the fleet may draw until the next decision has taken effect."""
        budget = self._power_budget_w
        if budget is None:
            return np.inf
        if isinstance(budget, PowerBudget):
            return budget.least_w(t_s, t_s + float(self.period_s) + _EFFECT_S)
        return float(budget(t_s)) if callable(budget) else float(budget)

    def _follow(self, state: FleetState, memory: CascadeMemory) -> tuple[Decision, Bool]:
        """Decision that asks for the target and leaves the rest to governors, and who is held.

        Held is an instance that a budget keeps below the clock that it needs.
        """
        target, route_frac = memory.target, self._equal_frac
        active, price = np.ones(len(state), bool), np.zeros(len(state))
        if target is not None:
            route_frac, price = target.route_frac, target.price_j_req
            standby = None if memory.ahead is None else memory.ahead.standby
            active = target.active
            if standby is not None:
                # Those that wake are active, too, but have no share yet; of those awake all are
                # but who may be parked.
                serving = None if self._sleep is None else memory.serving
                active = standby.on if serving is None else active | (standby.on & ~serving)
        now = Assessment(
            by=self._assessor,
            state=state,
            load=self._load.load(memory.load),
            route_frac=route_frac,
            active=active,
            belief=memory.belief,
            hold_s=0.0 if self.governed else float(self.period_s),
        )
        floor = self._min_mhz if self.governed else self._max_mhz
        if target is not None:
            floor = self._floors(now, memory, target)
        floor = self._probed(now, floor)
        budget_w = self._budget_w(state.t_s)
        ceiling, status, held = self._max_mhz, Status.OK, np.zeros(len(state), bool)
        if np.isfinite(budget_w):
            wanted_mhz = now.needed_mhz
            if state.t_s < memory.lent_s:
                # What it lends is its own choice: the misses that it costs count for its margin.
                lent_mhz = (1.0 - _LENT_FRAC) * wanted_mhz
                wanted_mhz = np.where(self._prefills, wanted_mhz, lent_mhz)
            ceiling = ceilings_within(
                budget_w, now, wanted_mhz, memory.ceiling_mhz,
                prefills=self._prefills, max_mhz=self._max_mhz, governed=self.governed,
            )  # fmt: skip
            held = (ceiling < wanted_mhz) & state.alive & active
            # A burst that cannot be met by a higher clock must find no queue. Below the thrifty
            # clock a token takes no more energy at a higher one.
            hurries = self._prefills & active & (ceiling < now.thrifty_mhz)
            floor = np.where(hurries, ceiling, floor)
            if budget_w < self._idle_w:
                status = Status.INFEASIBLE
        ceiling = np.minimum(ceiling, self._prefill_ceilings(now, memory, floor))
        return Decision(
            t_s=state.t_s,
            freq_mhz=np.minimum(floor, ceiling),
            freq_max_mhz=ceiling,
            route_frac=route_frac,
            active=active,
            price_j_req=price,
            belief=memory.belief,
            depth=self._depths(memory),
            status=status,
        ), held

    def _prefill_ceilings(self, now: Assessment, memory: CascadeMemory, floor: F64) -> F64:
        """Ceilings of who only prefills where fewer first tokens are late than the promise allows.

        Above the thrifty clock the voltage rises, and a token takes up to a third more energy: what
        may be late is best late there. Misses raise the integrator of TTFT, and once what was in
        time before is used up, the ceiling. Nothing is held back where somebody waited as long as
        was promised or is clamped, where roles change, or where there is a budget.
        """
        late = now.state.alive & (now.state.oldest_wait_s > self.slo.ttft_s)
        if late.any() or not self._spends_now(now.belief):
            return self._max_mhz
        down_frac = _LOWERED_FRAC * self._margin.spare_frac(memory.margin)
        above_mhz = np.maximum(self._max_mhz - now.thrifty_mhz, 0.0)
        ceiling = np.maximum(self._max_mhz - down_frac * above_mhz, floor)
        return np.where(self._prefills, ceiling, self._max_mhz)

    def _spends_now(self, belief: Belief) -> bool:
        """Whether ceilings of prefill follow what may be late."""
        clamped = self._prefills & (belief.able_mhz < self._max_mhz)
        return self._spends and not clamped.any()

    def _depths(self, memory: CascadeMemory) -> tuple[Depth, ...] | None:
        """How deep each sleeps once it is parked and empty; None where all are parked at most."""
        standby = None if memory.ahead is None else memory.ahead.standby
        if self._sleep is None or standby is None:
            return self._depth
        awake = self._depth or (DEPTHS[0],) * len(self.fleet)
        return tuple(np.where(standby.on, awake, self._sleep).tolist())

    def _probed(self, now: Assessment, floor: F64) -> F64:
        """Floors; at times the highest clock of who is clamped, which tells whether it still is."""
        if now.state.t_s % self._tuning.probe_every_s >= self._tuning.probe_s:
            return floor
        return np.where(now.belief.able_mhz < self._max_mhz, self._max_mhz, floor)

    def _lent_s(self, state: FleetState, memory: CascadeMemory) -> float:
        """Time until which decode lends prefill a part of its power; nothing without a budget.

        Who does both has nobody to lend to.
        """
        ceiling = memory.ceiling_mhz
        if ceiling is None or self.fleet.colocated or not np.isfinite(self._budget_w(state.t_s)):
            return memory.lent_s
        waits_s = self._assessor.queued_s(state, ceiling, memory.belief)
        bursts = state.alive & (waits_s > _BURST_FRAC * self.slo.ttft_s)
        # Where all are late by far the load is more than the budget carries, and it is no burst.
        bursts &= state.oldest_wait_s < 2.0 * self.slo.ttft_s
        return state.t_s + _LENT_S if bursts.any() else memory.lent_s

    def _floors(self, now: Assessment, memory: CascadeMemory, target: Target) -> F64:
        floor = np.where(target.active, target.floor_mhz, self._min_mhz)
        drains = ~target.active & (now.state.running_req > 0.0)
        if drains.any():
            floor = np.where(drains, now.draining_mhz, floor)
        if not target.feasible:
            # Beyond what can be served the batch sets the clock, not a floor.
            floor[self._decode] = self._min_mhz[self._decode]
        if not self.governed:
            floor = np.maximum(floor, now.needed_mhz)
        if self.regime(memory) is not Regime.OPEN:
            floor = np.maximum(floor, now.thrifty_mhz)
        if now.state.t_s < memory.losses.hurries_s:
            floor[self._decode] = self._max_mhz[self._decode]
        return floor
