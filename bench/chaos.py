"""Thousands of seeded mishaps in the simulator: what must hold at every tick, and at the end.

    python bench/chaos.py results.csv                 # resumes: scenarios in it are not repeated
    python bench/chaos.py results.csv --scenarios 2000 --jobs 2
    python bench/chaos.py --seed 17 --show            # one scenario, told and shrunk if it fails
    python bench/chaos.py results.csv --table         # the table of docs/safety.md, runs nothing

A scenario is a fleet, a load and one to three mishaps, drawn from its seed alone: telemetry lost,
late, doubled, out of order, frozen, scaled, NaN, absurd; clock sets lost, late, clamped; instances
dead, hung, slow, cold; bursts, other lengths, wrong profiles; a solver that fails, returns garbage
or is slow; a controller that raises, is slow, or is restarted; clocks that go back. In a third of
them, and in all whose solver is in trouble, parked instances sleep, take 2 to 10 s to wake, and the
load swings, so that there is something to plan. A fifth has a power budget, which falls on the way
in half of those, announced or not. All is simulated.

At every tick: the applied clocks are supported and floors lie at or below ceilings, shares are a
distribution per phase, the guard lets its own answer pass unchanged, energy does not fall, nothing
raises; power lies within the budget, save where a mishap keeps sets from the clocks or tells the
controller what is not so. At the end: no request is lost or counted twice. *Late* is a scenario in
which `mpc` keeps a promise (TTFT or ITL) for fewer requests than `static-max` under the same
mishaps (with a budget: than `static-budget`, whose own sets are never lost), by more than half a
point and two standard errors of the paired difference, and for less than the promised share by as
much. Requests that live within 5 s, and the delay of a clock or the time to wake, of a begin or end
of a mishap or a step of the budget do not count.
"""

import argparse
import csv
import dataclasses
import json
import sys
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from voltana_ctrl import FleetSpec, Guard, PowerBudget, Slo, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control.situation import PlanStatus
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.faults import ClockClamp, Failure, Slowdown
from voltana_ctrl.sim.metrics import judged_latencies
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import Decision, IterationBatch, Observation, RequestBatch

# The tables of docs/safety.md were made with the reference as first shipped.
PROFILE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
SLO = Slo(ttft_s=0.6, itl_s=0.06)
WARMUP_S, WINDOW_S, GRACE_S, TICK_S = 8.0, 60.0, 60.0, 0.25
#: How much longer is warmed up where instances sleep: forecasts learn from their own errors.
LEARNING_S = 60.0
DELAY_S = 0.025
RECOVERY_S = 5.0 + DELAY_S
WITHIN_FRAC = 0.005
#: Fleets, with a load that is easy and one that is near what they hold.
FLEETS = {"1P1D": (4, 18), "2P2D": (8, 40), "1P2D": (6, 18), "2C": (4, 16), "4C": (8, 34)}
#: The same for those whose instances sleep.
SLEEPERS = {"2P2D": (8, 40), "2P4D": (8, 40), "1P2D": (6, 18), "2C": (4, 16), "4C": (8, 34)}
ASLEEP_W = 20.0
TELEMETRY = ("lost", "late", "doubled", "disordered", "frozen", "scaled", "nan", "absurd", "back")
SETS = ("set-lost", "set-late", "clamped")
INSTANCES = ("dead", "hung", "slow", "cold")
LOAD = ("burst", "lengths", "profile")
SOLVER = ("solver-fails", "solver-garbage", "solver-slow")
CONTROL = (*SOLVER, "raises", "decide-slow", "restarted")
KINDS = (*TELEMETRY, *SETS, *INSTANCES, *LOAD, *CONTROL)
COLUMNS = ("seed", "fleet", "rate_req_s", "wake_s", "budget", "kinds", "judged", "mpc",
           "static_max", "discordant", "late", "broken")  # fmt: skip
#: Mishaps under which a budget cannot be kept: sets go astray, nobody decides, or what the
#: controller is told is not so.
BLIND = (*TELEMETRY, "set-lost", "set-late", "profile", "raises", "decide-slow", "restarted")
#: What is over a budget by less is within it: means over a tick, of iterations that jump.
OVER_FRAC = 0.02


@dataclass(frozen=True, kw_only=True)
class Mishap:
    """One thing that goes wrong, for a while."""

    kind: str
    from_s: float
    until_s: float
    instance: int = 0
    size: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A fleet, a load, and what goes wrong."""

    seed: int
    fleet: str
    rate_req_s: float
    mishaps: tuple[Mishap, ...]
    wake_s: float = 0.0  # none sleeps where it is 0
    swing_s: float = 0.0  # period with which the load swings; 0 where it does not
    budget: str = ""  # steps in watts; none where it is empty
    notice_s: float | None = None  # of a step; known from the start where it is None

    @property
    def warmup_s(self) -> float:
        """Time before what is judged."""
        return WARMUP_S + (LEARNING_S if self.wake_s else 0.0)

    @property
    def power_budget(self) -> PowerBudget | None:
        """The budget, if there is one."""
        if not self.budget:
            return None
        notice_s = np.inf if self.notice_s is None else self.notice_s
        return replace(PowerBudget.parse(self.budget), notice_s=notice_s)

    def spec(self) -> FleetSpec:
        """The fleet."""
        fleet = FleetSpec.parse(self.fleet, load_profile(PROFILE))
        if not self.wake_s:
            return fleet
        sleeps = {"asleep_w": ASLEEP_W, "wake_s": self.wake_s, "wake_j": 30.0 * self.wake_s}
        return FleetSpec(tuple(replace(one, **sleeps) for one in fleet.instances))

    def plain(self) -> str:
        """As one line, to be kept."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Scenario":
        """From such a line."""
        told = json.loads(text)
        told["mishaps"] = tuple(Mishap(**one) for one in told["mishaps"])
        return cls(**told)


def drawn(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = np.random.default_rng([seed, 16])
    fleet = str(rng.choice(list(FLEETS)))
    low, high = FLEETS[fleet]
    n = len(FleetSpec.parse(fleet, load_profile(PROFILE)))
    mishaps = []
    # Each seed has one kind in turn, so that every kind comes as often; the rest are drawn.
    for number in range(int(rng.choice((1, 1, 2, 3)))):
        kind = KINDS[seed % len(KINDS)] if number == 0 else str(rng.choice(KINDS))
        begin_s = float(np.round(rng.uniform(WARMUP_S + 2.0, WARMUP_S + 22.0), 2))
        lasts_s = float(np.round(rng.uniform(0.5, 12.0), 2))
        mishaps.append(
            Mishap(kind=kind, from_s=begin_s, until_s=begin_s + lasts_s,
                   instance=int(rng.integers(n)), size=float(np.round(rng.uniform(0.0, 1.0), 3)))
        )  # fmt: skip
    rate = float(np.round(rng.uniform(low, 0.7 * high), 1))
    scenario = Scenario(seed=seed, fleet=fleet, rate_req_s=rate, mishaps=tuple(mishaps))
    return _with_budget(_with_sleep(scenario))


def _with_sleep(scenario: Scenario) -> Scenario:
    rng = np.random.default_rng([scenario.seed, 19])
    if rng.random() > 1 / 3 and not any(one.kind in SOLVER for one in scenario.mishaps):
        return scenario
    fleet = str(rng.choice(list(SLEEPERS)))
    low, high = SLEEPERS[fleet]
    n = len(FleetSpec.parse(fleet, load_profile(PROFILE)))
    mishaps = tuple(
        replace(one, instance=one.instance % n, from_s=one.from_s + LEARNING_S,
                until_s=one.until_s + LEARNING_S)
        for one in scenario.mishaps
    )  # fmt: skip
    return replace(
        scenario, fleet=fleet, wake_s=float(rng.choice((2.0, 5.0, 10.0))), mishaps=mishaps,
        rate_req_s=float(np.round(rng.uniform(low, 0.7 * high), 1)),
        swing_s=float(np.round(rng.uniform(40.0, 120.0), 1)),
    )  # fmt: skip


def _with_budget(scenario: Scenario) -> Scenario:
    rng = np.random.default_rng([scenario.seed, 20])
    if rng.random() > 0.2:
        return scenario
    fleet = scenario.spec()
    most_w = sum(float(one.profile.table["prefill_power_w"][-1]) for one in fleet.instances)
    first_w = round(most_w * rng.uniform(0.6, 1.0))
    if rng.random() < 0.5:
        return replace(scenario, budget=f"0:{first_w}")
    fall_s = round(scenario.warmup_s + rng.uniform(4.0, 24.0), 2)
    then_w = round(max(0.45 * most_w, first_w * rng.uniform(0.6, 0.9)))
    notice_s = (None, 5.0, 0.0)[rng.integers(3)]
    return replace(scenario, budget=f"0:{first_w},{fall_s}:{then_w}", notice_s=notice_s)


def _of_plant(scenario: Scenario, fleet: FleetSpec) -> tuple:
    """What goes wrong inside the plant."""
    found = []
    for one in scenario.mishaps:
        name, span = fleet.ids[one.instance], {"from_s": one.from_s, "until_s": one.until_s}
        if one.kind == "dead":
            found.append(Failure(instance=name, **span))
        elif one.kind == "hung":
            hung_s = min(one.until_s, one.from_s + 4.0)
            found.append(Slowdown(instance=name, slow_frac=1e3, from_s=one.from_s, until_s=hung_s))
        elif one.kind == "slow":
            found.append(Slowdown(instance=name, slow_frac=1.1 + 0.9 * one.size, **span))
        elif one.kind == "cold":  # it comes back, and is slow until its caches are warm
            found.append(Failure(instance=name, from_s=one.from_s, until_s=one.from_s + 2.0))
            warm_s = max(one.until_s, one.from_s + 3.0)
            found.append(Slowdown(instance=name, slow_frac=1.0 + one.size,
                                  from_s=one.from_s + 2.0, until_s=warm_s))  # fmt: skip
        elif one.kind == "clamped":
            clock_mhz = float(fleet.instances[one.instance].clocks_mhz[int(40 + 35 * one.size)])
            found.append(ClockClamp(instance=name, clamp_mhz=clock_mhz, **span))
    return tuple(found)


def _requests(scenario: Scenario) -> Workload:
    total_s = scenario.warmup_s + WINDOW_S + GRACE_S
    base = make_workload("sharegpt", scenario.rate_req_s, total_s, scenario.seed)
    arrival_s = base.arrival_s
    prompt_tok, output_tok = base.prompt_tok.copy(), base.output_tok.copy()
    rng = np.random.default_rng([scenario.seed, 17])
    if scenario.swing_s:
        swing = 0.65 + 0.35 * np.cos(
            2.0 * np.pi * (arrival_s - scenario.warmup_s) / scenario.swing_s
        )
        stays = rng.random(len(arrival_s)) < swing
        arrival_s, prompt_tok, output_tok = (
            column[stays] for column in (arrival_s, prompt_tok, output_tok)
        )
    for one in scenario.mishaps:
        if one.kind == "burst":
            extra = rng.poisson(scenario.rate_req_s * min(one.until_s - one.from_s, 4.0))
            more_s = rng.uniform(one.from_s, min(one.until_s, one.from_s + 4.0), extra)
            which = rng.integers(len(arrival_s), size=extra)
            order = np.argsort(np.concatenate([arrival_s, more_s]), kind="stable")
            arrival_s = np.concatenate([arrival_s, more_s])[order]
            prompt_tok = np.concatenate([prompt_tok, prompt_tok[which]])[order]
            output_tok = np.concatenate([output_tok, output_tok[which]])[order]
        elif one.kind == "lengths":
            inside = (arrival_s >= one.from_s) & (arrival_s < one.until_s)
            factor = 0.4 + 1.4 * one.size
            prompt_tok[inside] = np.clip(prompt_tok[inside] * factor, 1, 8000)
            output_tok[inside] = np.clip(output_tok[inside] * factor, 1, 4000)
    return Workload(name="chaos", arrival_s=arrival_s, prompt_tok=prompt_tok,
                    output_tok=output_tok, duration_s=total_s)  # fmt: skip


def _believed(scenario: Scenario, fleet: FleetSpec) -> FleetSpec:
    """The fleet as a wrong profile makes it."""
    for one in scenario.mishaps:
        if one.kind == "profile":
            profile = fleet.instances[0].profile
            table = profile.table.copy()
            for name in table.dtype.names:
                if name.endswith("_s"):
                    table[name] *= 0.75 + 0.5 * one.size
            wrong = replace(profile, table=table)
            return FleetSpec(tuple(replace(each, profile=wrong) for each in fleet.instances))
    return fleet


class Chaos:
    """A simulated fleet whose telemetry and clock sets go wrong on the way."""

    def __init__(self, backend: SimBackend, mishaps: tuple[Mishap, ...], seed: int) -> None:
        self.backend, self.mishaps = backend, mishaps
        self.spec, self.clock = backend.spec, backend.clock
        self._rng = np.random.default_rng([seed, 18])
        self._seen: list[Observation] = []
        self._told: Observation | None = None
        self._held: Observation | None = None
        self._late: list[tuple[float, Decision]] = []

    def on(self, *kinds: str) -> list[Mishap]:
        """What is going wrong now."""
        now_s = self.backend.plant.now_s
        return [one for one in self.mishaps
                if one.kind in kinds and one.from_s <= now_s < one.until_s]  # fmt: skip

    def read(self) -> Observation:
        """What the controller is told."""
        seen = self.backend.read()
        self._seen = [*self._seen[-40:], seen]
        if self._held is not None:  # counts that came late are told once, later
            seen, self._held = seen.behind(self._held), None
        told = seen
        for one in self.on(*TELEMETRY):
            told = self._spoilt(told, one)
        self._told = told
        return told

    def _spoilt(self, told: Observation, one: Mishap) -> Observation:
        now_s, last = self.backend.plant.now_s, self._told or told
        state, n = told.state, len(self.spec)
        here = np.arange(n) == one.instance if one.size < 0.7 else np.ones(n, bool)
        if one.kind == "lost":
            age_s = np.maximum(0.0, now_s - last.state.t_s + last.state.age_s)
            held = {name: np.where(here, getattr(last.state, name), getattr(state, name))
                    for name in ("queue_tok", "queue_req", "oldest_wait_s", "running_req",
                                 "kv_used_tok", "power_w")}  # fmt: skip
            state = replace(state, age_s=np.where(here, age_s, state.age_s), **held)
            return Observation(state=state)
        if one.kind == "late":
            old = self._seen[max(0, len(self._seen) - 2 - int(6 * one.size))]
            age_s = np.full(n, max(0.0, now_s - old.state.t_s))
            state = replace(old.state, t_s=now_s, age_s=age_s)
            return replace(old, state=state)
        if one.kind == "doubled":
            twice = replace(state, arrived_req=2 * state.arrived_req,
                            arrived_tok=2 * state.arrived_tok)  # fmt: skip
            return Observation(state=twice, iterations=_rows(told.iterations, 2),
                               finished=_rows(told.finished, 2))  # fmt: skip
        if one.kind == "disordered" and len(self._seen) > 1 and self._rng.random() < 0.5:
            # The last one once more, in place of this one, which comes behind the next.
            self._held = told
            return self._seen[-2]
        if one.kind == "back":
            return replace(told, state=replace(state, t_s=max(0.0, state.t_s - 5.0 * one.size)))
        if one.kind == "frozen":
            held = {name: np.where(here, getattr(last.state, name), getattr(state, name))
                    for name in ("queue_tok", "queue_req", "oldest_wait_s", "running_req",
                                 "kv_used_tok", "power_w", "freq_mhz")}  # fmt: skip
            return replace(told, state=replace(state, **held))
        if one.kind == "scaled":
            factor = np.where(here, 0.1 + 5.0 * one.size, 1.0)
            names = ("queue_tok", "queue_req", "running_req", "kv_used_tok", "arrived_req",
                     "arrived_tok")  # fmt: skip
            scaled = {name: getattr(state, name) * factor for name in names}
            return replace(told, state=replace(state, **scaled).bounded(self.spec))
        if one.kind in ("nan", "absurd"):
            wrong = np.nan if one.kind == "nan" else 1e300
            iterations = _spoilt_rows(told.iterations, ("wall_s", "energy_j", "kv_tok"), wrong)
            finished = _spoilt_rows(told.finished, ("ttft_s", "itl_s"), wrong)
            if one.kind == "absurd":
                names = ("running_req", "kv_used_tok", "power_w", "arrived_req")
                most = {name: np.where(here, wrong, getattr(state, name)) for name in names}
                state = replace(state, **most).bounded(self.spec)
            else:  # a state with NaN cannot be made: who reads one keeps the last
                state = replace(state, alive=state.alive & ~here)
            return Observation(state=state, iterations=iterations, finished=finished)
        return told

    def apply(self, decision: Decision) -> None:
        """Carry out a decision, unless it is lost, or later."""
        now_s = self.backend.plant.now_s
        if self.on("set-lost"):
            return
        held = self.on("set-late")
        if held:
            self._late.append((now_s + 0.2 + 1.5 * held[0].size, decision))
            return
        self._late.clear()
        self.backend.apply(decision)

    def carry_out_late(self) -> None:
        """What is due of the sets that come late."""
        while self._late and self._late[0][0] <= self.backend.plant.now_s:
            self.backend.apply(self._late.pop(0)[1])

    def close(self) -> None:
        """Give the clocks back."""
        self.backend.close()


def _rows(batch, times: int):
    columns = {name: np.tile(getattr(batch, name), times) for name in type(batch).__slots__}
    return type(batch)(**columns)


def _spoilt_rows(batch: IterationBatch | RequestBatch, names: tuple[str, ...], wrong: float):
    columns = {name: np.array(getattr(batch, name)) for name in type(batch).__slots__}
    for name in names:
        columns[name][::2] = wrong
    return type(batch)(**columns)


class _Troubled:
    """A controller that raises, and whose solver is in trouble, while it is meant to."""

    def __init__(self, controller, chaos: Chaos) -> None:
        self._inner, self._chaos = controller, chaos
        self.period_s = controller.period_s
        ahead = getattr(controller, "_ahead", None)
        if ahead is not None:
            real = ahead.planner
            ahead.planner = lambda *a, **k: _TroubledPlanner(real(*a, **k), chaos)
            if any(one.kind in SOLVER for one in chaos.mishaps):
                ahead._thread = _Beside(chaos)

    def init(self):
        return self._inner.init()

    def decide(self, observation, memory):
        if self._chaos.on("raises"):
            raise ArithmeticError("as a mishap")
        return self._inner.decide(observation, memory)


class _TroubledPlanner:
    """A planner that fails in every way there is, and returns what is no plan."""

    def __init__(self, planner, chaos: Chaos) -> None:
        self._inner, self._chaos = planner, chaos

    def plan(self, situation):
        for one in self._chaos.on("solver-fails"):
            if one.size < 1 / 3:
                raise ArithmeticError("as a mishap")
            failed = PlanStatus.FAILED if one.size < 2 / 3 else PlanStatus.INFEASIBLE
            return self._inner._none(failed)
        plan = self._inner.plan(situation)
        for one in self._chaos.on("solver-garbage"):
            rng = np.random.default_rng(int(1e6 * self._chaos.backend.plant.now_s))
            garbage = rng.normal(0.0, 10.0 ** (6 * one.size), plan.on.shape)
            if one.size < 0.2:
                garbage = np.where(rng.random(plan.on.shape) < 0.5, np.nan, plan.on)
            elif one.size < 0.4:
                garbage = np.where(rng.random(plan.on.shape) < 0.5, 1e300, -np.inf)
            elif one.size < 0.6:
                garbage = np.zeros(plan.on.shape)
            return replace(plan, status=PlanStatus.OK, on=garbage)
        return plan


class _Beside:
    """The thread beside the ticks, on simulated time: slow where it is meant to be."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos

    def submit(self, function, *args):
        answer, plant = Future(), self._chaos.backend.plant
        try:
            answer.set_result(function(*args))
        except ArithmeticError as error:
            answer.set_exception(error)
        slow = self._chaos.on("solver-slow")
        due_s = plant.now_s + (40.0 * slow[0].size if slow else 0.0)
        answer.done = lambda: plant.now_s >= due_s
        return answer


@cache
def _planner(fleet: str, wake_s: float):
    """The programmes of a fleet, which take longer to state than to solve, filled as they are."""
    spec = Scenario(seed=0, fleet=fleet, rate_req_s=1.0, mishaps=(), wake_s=wake_s).spec()
    return find_policy("mpc").build(spec, SLO, PolicySetup()).controller._ahead._planners


@dataclass(frozen=True)
class Run:
    """What came of one policy in one scenario."""

    arrival_s: np.ndarray
    end_s: np.ndarray
    met: np.ndarray  # rows: TTFT, ITL
    broken: tuple[str, ...]


def run(scenario: Scenario, policy: str) -> Run:
    """One policy in one scenario; what did not hold, in words."""
    fleet = scenario.spec()
    believed = _believed(scenario, fleet)
    setup = PolicySetup(tick_s=TICK_S, delay_s=DELAY_S, power_budget=scenario.power_budget)
    parts = find_policy(policy).build(believed, SLO, setup)
    ahead = getattr(parts.controller, "_ahead", None)
    if ahead is not None:
        ahead._planners = _planner(scenario.fleet, scenario.wake_s)
    broken: list[str] = []
    backend = SimBackend(
        fleet, workload=_requests(scenario), seed=scenario.seed,
        settings=PlantSettings(log_iterations=0 if parts.controller is None else 4096),
        governors=parts.governors, prefill_router=parts.prefill_router,
        decode_router=parts.decode_router, believed=believed,
        judged_s=(scenario.warmup_s, scenario.warmup_s + WINDOW_S),
        faults=_of_plant(scenario, fleet),
    )  # fmt: skip
    plant = backend.plant
    plant.apply(parts.first or Decision.highest(fleet))
    end_s = scenario.warmup_s + WINDOW_S + GRACE_S
    if parts.controller is None:
        plant.advance(end_s)
    elif policy != "mpc":
        ControlLoop(backend, parts.controller, Guard(fleet)).run(end_s)
    else:
        chaos = Chaos(backend, scenario.mishaps, scenario.seed)
        _control(chaos, parts.controller, end_s, broken, scenario.power_budget)
    _conserved(plant, broken)
    ttft_s, itl_s = judged_latencies(plant)
    rows = plant.requests
    judged = rows["arrival_s"] >= scenario.warmup_s
    judged &= rows["arrival_s"] < scenario.warmup_s + WINDOW_S
    rows = rows[judged][: len(ttft_s)]
    with np.errstate(invalid="ignore"):
        met = np.stack([ttft_s <= SLO.ttft_s, itl_s <= SLO.itl_s])
    done_s = np.where(rows["done_s"] > 0.0, rows["done_s"], end_s)
    return Run(np.array(rows["arrival_s"]), done_s, met, tuple(dict.fromkeys(broken)))


def _control(chaos, controller, end_s, broken, budget) -> None:
    controller = _Troubled(controller, chaos)
    loop = None
    guard, energy_j, skip, plant = Guard(chaos.spec), 0.0, 0, chaos.backend.plant
    number = 0
    now_s = seen_s = 0.0
    while now_s < end_s and not (now_s > end_s - GRACE_S and plant.judged[1] == 0):
        # Behind the window only what is judged is waited for.
        number += 1 if now_s < end_s - GRACE_S else 4
        now_s = number * TICK_S
        chaos.clock.sleep_until_s(now_s)
        chaos.carry_out_late()
        now_j = float(plant.state().energy_j.sum())
        if now_j < energy_j - 1e-6:
            broken.append("energy fell")
        if budget is not None and _over(budget, (now_j - energy_j) / (now_s - seen_s), now_s):
            blind = any(one.kind == "profile" or (one.kind in BLIND
                        and one.from_s <= now_s < one.until_s + RECOVERY_S)
                        for one in chaos.mishaps)  # fmt: skip
            if not blind:
                broken.append("over the budget")
        energy_j, seen_s = now_j, now_s
        restarting = chaos.on("restarted")
        if restarting and now_s < restarting[0].from_s + 1.0:
            loop = None  # what it had learnt is gone, and nobody decides
            continue
        if chaos.on("decide-slow"):
            skip = (skip + 1) % 8  # a decision takes two seconds: the ticks in between are missed
            if skip != 1:
                continue
        if loop is None:
            loop = ControlLoop(chaos, controller, guard, raises=False)
        try:
            record = loop.tick()
        except Exception as error:  # noqa: BLE001  what is looked for
            broken.append(f"tick raised {type(error).__name__}: {str(error)[:120]}")
            return
        if not chaos.on("raises") and loop.failures:
            broken.append("the controller raised")
            loop.failures = 0
        elif chaos.on("raises"):
            loop.failures = 0
        broken += _wrong(record, chaos.spec, guard)


def _over(budget: PowerBudget, power_w: float, now_s: float) -> bool:
    """Whether the mean since the last tick was above what held in the second before."""
    if now_s < 2.0:
        return False
    before = [budget.at_w(now_s - lag_s) for lag_s in (0.0, TICK_S, TICK_S + 1.0)]
    return power_w > max(before) * (1.0 + OVER_FRAC)


def _wrong(record, spec: FleetSpec, guard: Guard) -> list[str]:
    """What does not hold of an applied decision."""
    applied, found = record.applied, []
    for name in ("freq_mhz", "freq_max_mhz"):
        clocks = zip(spec.instances, getattr(applied, name), strict=True)
        if any(mhz not in one.clocks_mhz for one, mhz in clocks):
            found.append(f"{name} is no supported clock")
    if np.any(applied.freq_mhz > applied.freq_max_mhz):
        found.append("a floor above its ceiling")
    for members in (spec.prefill, spec.decode):
        share = applied.route_frac[members]
        if np.any(share < 0.0) or abs(share.sum() - 1.0) > 1e-6:
            found.append("shares are no distribution")
        if not applied.active[members].any():
            found.append("nobody of a phase is active")
    alive = record.observation.state.alive
    if (
        alive.any()
        and np.any(applied.active & ~alive)
        and alive[spec.decode].any()
        and (alive[spec.prefill].any())
    ):
        found.append("a dead instance is given work")
    again = guard.shield(applied, record.observation, applied)
    same = np.array_equal(again.freq_mhz, applied.freq_mhz) and np.allclose(
        again.route_frac, applied.route_frac
    )
    if not same:
        found.append("the guard changes its own answer")
    return found


def _conserved(plant, broken: list[str]) -> None:
    rows = plant.requests
    done = plant._done[: int(plant._sim[0]["n_done"])]
    if len(np.unique(done)) != len(done):
        broken.append("a request ended twice")
    if np.any(rows["first_s"][done] < rows["arrival_s"][done] - 1e-9):
        broken.append("a token before its request")


@dataclass(frozen=True)
class Verdict:
    """How one scenario ended."""

    scenario: Scenario
    judged: int
    mpc: float
    static_max: float
    discordant: int
    late: bool
    broken: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return self.late or bool(self.broken)

    def row(self) -> dict:
        one = self.scenario
        return {
            "seed": one.seed, "fleet": one.fleet, "rate_req_s": one.rate_req_s,
            "wake_s": one.wake_s, "budget": one.budget,
            "kinds": " ".join(each.kind for each in one.mishaps), "judged": self.judged,
            "mpc": round(self.mpc, 5), "static_max": round(self.static_max, 5),
            "discordant": self.discordant, "late": int(self.late),
            "broken": "; ".join(self.broken),
        }  # fmt: skip


def judge(scenario: Scenario) -> Verdict:
    """Both policies in one scenario."""
    opponent = "static-budget" if scenario.budget else "static-max"
    ours, full = run(scenario, "mpc"), run(scenario, opponent)
    n = min(len(ours.arrival_s), len(full.arrival_s))
    counts = np.ones(n, bool)
    budget = scenario.power_budget
    steps_s = [] if budget is None else [from_s for from_s, _ in budget.steps[1:]]
    for one in (*scenario.mishaps, *steps_s):
        if isinstance(one, float):
            edges_s = (one,)
        elif one.kind == "profile":
            edges_s = (0.0,)
        elif one.kind == "cold":
            edges_s = (one.from_s, one.from_s + 2.0, max(one.until_s, one.from_s + 3.0))
        elif one.kind == "hung":
            edges_s = (one.from_s, min(one.until_s, one.from_s + 4.0))
        elif one.kind == "restarted":
            edges_s = (one.from_s, one.from_s + 1.0)
        else:
            edges_s = (one.from_s, one.until_s)
        for edge_s in edges_s:
            end_s = np.maximum(ours.end_s[:n], full.end_s[:n])
            until_s = edge_s + RECOVERY_S + scenario.wake_s
            counts &= ~((ours.arrival_s[:n] <= until_s) & (end_s >= edge_s))
    a, b = ours.met[:, :n][:, counts], full.met[:, :n][:, counts]
    judged, broken = int(counts.sum()), (*ours.broken, *full.broken)
    if judged == 0:
        return Verdict(scenario, 0, 1.0, 1.0, 0, False, broken)
    discordant = (a != b).sum(axis=1)
    kept, full_kept = a.mean(axis=1), b.mean(axis=1)
    room = WITHIN_FRAC + 2.0 * np.sqrt(discordant) / judged
    short = np.minimum(full_kept, SLO.attainment) - room - kept
    worse = int(np.argmin(kept - full_kept))
    return Verdict(scenario, judged, float(kept[worse]), float(full_kept[worse]),
                   int(discordant[worse]), bool(np.any(short > 0.0)), broken)  # fmt: skip


def shrunk(scenario: Scenario) -> Scenario:
    """The least of a scenario that still fails: fewer mishaps, then shorter ones."""
    smaller = True
    while smaller:
        smaller = False
        for k, one in enumerate(scenario.mishaps):
            rest = scenario.mishaps[:k], scenario.mishaps[k + 1 :]
            half = replace(one, until_s=0.5 * (one.from_s + one.until_s))
            for fewer in ((*rest[0], *rest[1]), (*rest[0], half, *rest[1])):
                if one.until_s - one.from_s < 1.0 and len(fewer) == len(scenario.mishaps):
                    continue
                candidate = replace(scenario, mishaps=fewer)
                if judge(candidate).failed:
                    scenario, smaller = candidate, True
                    break
            if smaller:
                break
    return scenario


def table(rows: list[dict]) -> str:
    """By kind: scenarios, what broke, what was late, the worst distance from static-max."""
    lines = [
        "| mishap | scenarios | broken | late | mpc % | static-max % | worst, points |",
        "|---|---|---|---|---|---|---|",
    ]
    parts = {kind: (lambda row, kind=kind: kind in row["kinds"].split()) for kind in KINDS}
    parts |= {
        "instances that sleep": lambda row: float(row["wake_s"]) > 0.0,
        "a power budget": lambda row: bool(row["budget"]),
        "a budget that falls": lambda row: "," in row["budget"],
        "all": lambda _: True,
    }
    for kind, belongs in parts.items():
        of = [row for row in rows if belongs(row)]
        if not of:
            continue
        judged = np.array([float(row["judged"]) for row in of])
        mpc, full = (np.array([float(row[name]) for row in of]) for name in ("mpc", "static_max"))
        weight = judged / max(judged.sum(), 1.0)
        worst = min((100 * (m - f) for m, f, j in zip(mpc, full, judged, strict=True) if j >= 100),
                    default=0.0)  # fmt: skip
        lines.append(
            f"| {kind} | {len(of)} | {sum(bool(row['broken']) for row in of)}"
            f" | {sum(row['late'] == '1' for row in of)} | {100 * weight @ mpc:.2f}"
            f" | {100 * weight @ full:.2f} | {worst:+.1f} |"
        )
    return "\n".join(lines)


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _row(seed: int) -> dict:
    return judge(drawn(seed)).row()


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing in the file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="CSV file, which is extended")
    parser.add_argument("--scenarios", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="one scenario")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="shrink it if it fails, and print it")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args(arguments)
    if asked.seed is not None:
        verdict = judge(drawn(asked.seed))
        print(verdict.row())
        if verdict.failed and asked.show:
            print(shrunk(verdict.scenario).plain())
        return int(verdict.failed)
    if asked.results is None:
        parser.error("expected a file, or --seed")
    if not asked.table:
        _campaign(asked.results, asked.scenarios, asked.jobs)
    rows = _read(asked.results)
    print(table(rows))
    failed = [row for row in rows if row["late"] == "1" or row["broken"]]
    for row in failed:
        print(f"seed {row['seed']}: {row}")
    said = Counter(text for row in rows for text in row["broken"].split("; ") if text)
    for text, times in said.most_common():
        print(f"{times} times: {text}")
    return int(bool(failed))


def _campaign(path: Path, scenarios: int, jobs: int) -> None:
    known = {int(row["seed"]) for row in _read(path)}
    wanted = [seed for seed in range(scenarios) if seed not in known]
    begin_s = time.perf_counter()
    with (
        path.open("a", newline="", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs) as pool,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        if not known:
            writer.writeheader()
        for done, one in enumerate(as_completed([pool.submit(_row, seed) for seed in wanted]), 1):
            writer.writerow(one.result())
            file.flush()
            if done % 50 == 0:
                print(f"{done} of {len(wanted)}, {time.perf_counter() - begin_s:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
