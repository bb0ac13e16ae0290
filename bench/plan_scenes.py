"""Scenes for the plan: what happens, who runs, and what must be seen. See `planning.py`.

Sleep of 20 W with 10 or 30 s to wake is a what-if: nobody has measured it. The measured ones
bear the name of the machine.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import cvxpy as cp
import numpy as np

from voltana_ctrl import FleetSpec, Slo
from voltana_ctrl.control import MpcController, TargetOptimiser
from voltana_ctrl.control.lookahead import Lookahead
from voltana_ctrl.estimate.forecast import Forecaster
from voltana_ctrl.experiment import Run
from voltana_ctrl.laws import length_moments
from voltana_ctrl.policies import Policy, find_policy
from voltana_ctrl.sim.arrivals import Diurnal
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import PowerBudget, Rest, Steps

SLO = Slo(ttft_s=0.6, itl_s=0.06)
#: Time before the window, in which everybody may learn the load: one period of the diurnal one.
WARMUP_S = 300.0
#: Requests come until so long after the window, so that its last ones are judged under load.
GRACE_S = 61.0
TRACE = "azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
OPPONENTS = ("static-max", "static-best", "governors", "pack", "autoscaler")
DAY = Diurnal(swing_frac=0.9, period_s=300.0, peak_s=150.0)
DAY_REQ_S = 30.0
#: Share of the tokens that may wait.
DEFERRED_FRAC = 0.3
#: A budget is kept where it is in all samples but so many.
OVER_FRAC = 1e-3

Figures = dict[str, float]
#: Figures of one run, of the scene's own fleet and seed and of what ran before it.
Runs = Callable[["Case"], dict]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scene with one seed on one profile, and what has been found in it so far."""

    profile: object
    seed: int
    data: Path
    found: dict[str, Figures]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is run, in this order, and what must be seen.

    `ours` is the run that is judged, against `rival` where that keeps its promise and against the
    cheapest opponent that does where it does not, or where there is no rival.
    """

    must: str
    entries: dict[str, Runs]
    rival: str = ""
    most: float = 1.0
    ours: str = "mpc"
    #: Runs that are no opponents: our own in another setting, and what is only computed.
    beside: tuple[str, ...] = ()
    #: Whether a miss of all opponents is enough.
    misses_do: bool = False
    #: A judgement of its own, by seed, in place of a ratio: what is said, and whether it is good.
    judged: Callable[[dict[str, Figures]], tuple[str, bool]] | None = None
    slo: Slo = SLO


def asleep(fleet: str, profile: object, **how: object) -> FleetSpec:
    """A fleet with other sleep."""
    plain = FleetSpec.parse(fleet, profile)
    return FleetSpec(tuple(dataclasses.replace(one, **how) for one in plain.instances))


def run(case: Case, policy: str | Policy, **what: object) -> Figures:
    """Figures of one run, 300 s after the warm-up unless told otherwise."""
    settings = {"slo": SLO, "workload": "sharegpt", "duration_s": 300.0, "warmup_s": WARMUP_S}
    return Run(policy=policy, seed=case.seed, **{**settings, **what}).simulate()


def everybody(what: Callable[[Case], dict], *, opponents: tuple[str, ...] = OPPONENTS) -> dict:
    """Entries of `mpc` and the opponents on the same thing."""
    return {
        name: lambda case, name=name: run(case, name, **what(case)) for name in ("mpc", *opponents)
    }


# A diurnal load, and what could be known of it


def _day_req_s(t_s: float, lead_s: np.ndarray) -> np.ndarray:
    angle = 2.0 * np.pi * (t_s + np.asarray(lead_s) - DAY.peak_s) / DAY.period_s
    return DAY_REQ_S * (1.0 + DAY.swing_frac * np.cos(angle))


def told(forecast: Callable[[float, np.ndarray], np.ndarray]) -> Policy:
    """`mpc` that is given the true rate; wake times are obeyed, chance is not known."""

    def build(fleet, slo, setup):
        target = TargetOptimiser(fleet, slo, delay_s=setup.delay_s)
        controller = MpcController(
            fleet, slo, target=target, period_s=setup.tick_s, delay_s=setup.delay_s,
            forecast=forecast,
        )  # fmt: skip
        return dataclasses.replace(find_policy("mpc").build(fleet, slo, setup),
                                   controller=controller)  # fmt: skip

    return Policy(name="mpc, rate known", summary="", source="", build=build)


class _Level(Forecaster):
    """What comes is what came lately."""

    def _chosen(self, memory, told):  # noqa: ARG002  the parent asks so
        return np.full(len(memory.used), 1)


class _Bare(Forecaster):
    """Nothing is kept in reserve."""

    def outlook(self, memory):
        outlook = super().outlook(memory)
        return dataclasses.replace(outlook, reserve_req_s=outlook.mean_req_s)


class _Awake(Lookahead):
    """Nobody rests."""

    def look(self, memory, state, *_):
        return self._ordered(memory, state, [len(group) for group in self._groups])


def without(lever: str) -> Policy:
    """`mpc` without one of its levers: the only place where they are switched off."""

    def build(fleet, slo, setup):
        parts = find_policy("mpc").build(fleet, slo, setup)
        ahead = parts.controller._ahead
        if lever == "wake states":
            ahead.__class__ = _Awake
        else:
            ahead._forecaster.__class__ = {"forecast": _Level, "reserve": _Bare}[lever]
        return parts

    return Policy(
        name=f"mpc without {lever}", summary="", source="", build=build, knows_budget=True
    )


#: Scene in which each lever is left out, and the runs with and without it.
LEVERS = {
    "forecast": ("diurnal", "mpc", "mpc without forecast"),
    "reserve": ("diurnal", "mpc", "mpc without reserve"),
    "reserve, where the load jumps": ("steps", "mpc", "mpc without reserve"),
    "wake states": ("diurnal", "mpc", "mpc without wake states"),
    "roles": ("roles", "mpc", "mpc on 4P4D"),
    "notice": ("budget cut", "mpc", "mpc, no notice"),
    "deferral": ("price", "mpc", "mpc, at once"),
}


def lengths_of(workload: Workload):
    """Moments of the lengths of a workload's requests."""
    return length_moments(workload.prompt_tok, workload.output_tok)


def least_w(fleet: FleetSpec, lengths, rates_req_s: np.ndarray) -> float:
    """Mean power of the best whole counts at each rate; wake times and tails are ignored."""
    total = 0.0
    optimiser = TargetOptimiser(fleet, SLO)
    groups = [group for groups in optimiser.phases for group in groups]
    for group, supply in zip(groups, optimiser.supplies(lengths), strict=True):
        rest_w, n = fleet.instances[int(group[0])].parked_w, len(group)
        counts = np.arange(1, n + 1)[:, None]
        power_w = counts * np.max(
            supply.alpha_j_req[:, None, None] * rates_req_s / counts
            + supply.beta_w[:, None, None], axis=0,
        ) + (n - counts) * rest_w  # fmt: skip
        power_w[rates_req_s > counts * supply.most_req_s] = np.inf
        total += float(np.mean(power_w.min(axis=0)))
    return total


def _day(fleet: str, times: float, **how: object) -> dict:
    def what(case):
        return {
            "fleet": asleep(fleet, case.profile, **how), "rate_req_s": times * DAY_REQ_S,
            "arrivals": DAY,
        }  # fmt: skip

    return what


def _quasi_static(case: Case) -> Figures:
    fleet = asleep("2P2D", case.profile, asleep_w=20.0, wake_s=10.0)
    rates = _day_req_s(0.0, np.arange(0.0, DAY.period_s))
    lengths = lengths_of(make_workload("sharegpt", DAY_REQ_S, 1000.0, case.seed))
    return {"mean_power_w": least_w(fleet, lengths, rates)}


def _diurnal() -> Scene:
    what = _day("2P2D", 1.0, asleep_w=20.0, wake_s=10.0)
    levers = {
        left_out: lambda case, lever=lever: run(case, without(lever), **what(case))
        for lever, (scene, _, left_out) in LEVERS.items()
        if scene == "diurnal"
    }
    return Scene(
        must="holds, <= 0.92 of pack",
        rival="pack", most=0.92,
        beside=("mpc, rate known", "clairvoyant, no wake time", *levers),
        entries=everybody(what) | levers | {
            "mpc, rate known": lambda case: run(case, told(_day_req_s), **what(case)),
            "clairvoyant, no wake time": _quasi_static,
        },
    )  # fmt: skip


def _measured(fleet: str, times: float, pack: str, **how: object) -> Scene:
    return Scene(
        must="holds, cheapest of all",
        entries=everybody(_day(fleet, times, **how), opponents=(*OPPONENTS, pack)),
    )


#: L20, clocks of core and memory at their lowest; A100, engine stopped (arXiv 2605.23918).
L20 = {"idle_w": 67.0, "deep_parked": Rest(power_w=36.0, wake_s=0.03)}
A100 = {"idle_w": 80.0, "off": Rest(power_w=54.0, wake_s=40.0)}


# Steps, a steady load, a trace


def _steps(low: float, high: float, hold_s: float, **how: object) -> Callable[[Case], dict]:
    steps = RateSteps(steps=tuple((k * hold_s, (low, high)[k % 2]) for k in range(200)))

    def what(case):
        return {"fleet": asleep("2P2D", case.profile, **how), "rate_steps": steps}

    return what


def _jumps() -> Scene:
    what = _steps(10.0, 60.0, 100.0, asleep_w=20.0, wake_s=30.0)
    bare = "mpc without reserve"
    return Scene(
        must="holds, <= 1.005 of own governors all awake", rival="governors", most=1.005,
        beside=(bare,),
        entries=everybody(what) | {bare: lambda case: run(case, without("reserve"), **what(case))},
    )  # fmt: skip


def _trace(wake_s: float) -> Scene:
    def what(case):
        return {
            "fleet": asleep("2P2D", case.profile, asleep_w=20.0, wake_s=wake_s),
            "workload": read_trace(case.data / TRACE), "duration_s": 1500.0,
        }  # fmt: skip

    return Scene(must="holds where static-max does, cheapest of all", entries=everybody(what))


# A power budget that is cut


CUT_S, LIFT_S = WARMUP_S + 600.0, WARMUP_S + 1500.0
#: Half an hour after the cut, so that what waited then has the time that it was given.
CUT = {"duration_s": 3600.0, "fleet": "2P2D", "rate": 65.0, "deadline_s": 1800.0}


def kept(load: Workload, keep: np.ndarray) -> Workload:
    """Some of the requests of a workload without blocks."""
    names = ("arrival_s", "prompt_tok", "output_tok", "cached_tok", "request_class", "patience_s")
    parts = {name: getattr(load, name)[keep] for name in names}
    offsets = load.block_offset[: np.count_nonzero(keep) + 1]
    return dataclasses.replace(load, **parts, block_offset=offsets)


def _cut_requests(case: Case, *, all_of_them: bool = True) -> Workload:
    drawn = make_workload(
        "sharegpt", CUT["rate"], WARMUP_S + CUT["duration_s"] + GRACE_S, case.seed
    ).deferred(DEFERRED_FRAC, CUT["deadline_s"], seed=case.seed)
    return drawn if all_of_them else kept(drawn, np.isinf(drawn.patience_s))


def _cut_run(case: Case, policy: str, notice_s: float | None = None, **load: bool) -> Figures:
    budget = None
    if notice_s is not None:
        found = [case.found[name]["power_w"] for name in ("interactive alone", "everything")]
        steps = ((0.0, 1e4), (CUT_S, float(np.mean(found))), (LIFT_S, 1e4))
        budget = PowerBudget(steps=steps, notice_s=notice_s)
    # What a steady load draws is known sooner.
    duration_s = 600.0 if budget is None else CUT["duration_s"]
    return run(
        case, policy, fleet=FleetSpec.parse(CUT["fleet"], case.profile),
        workload=_cut_requests(case, **load), duration_s=duration_s, power_budget=budget,
    )  # fmt: skip


def _cut_judged(found: dict[str, Figures]) -> tuple[str, bool]:
    told_of = [
        f"{name}: {100 * each['ttft_attainment']:.2f} / {100 * each['itl_attainment']:.2f} %,"
        f" {each['deadline_missed']:.0f} deadlines missed, over budget in"
        f" {100 * each['over_budget_frac']:.2f} % of samples"
        for name, each in found.items()
        if name in ("mpc", "mpc, no notice")
    ]
    return "; ".join(told_of), holds(found["mpc"])


def _budget_cut() -> Scene:
    def cut(policy: str, notice_s: float = 600.0) -> Runs:
        return lambda case: _cut_run(case, policy, notice_s)

    return Scene(
        must="interactive holds, no deadline missed, budget kept in 99.9 % of samples",
        beside=("interactive alone", "everything", "mpc, no notice"), judged=_cut_judged,
        entries={
            "interactive alone": lambda case: _cut_run(case, "mpc", all_of_them=False),
            "everything": lambda case: _cut_run(case, "mpc"),
            "mpc": cut("mpc"), "mpc, no notice": cut("mpc", 0.0),
        } | {name: cut(name) for name in ("cascade", "static-budget", "pack", "gate")},
    )  # fmt: skip


# A price that changes


PRICE = {"duration_s": 14_400.0, "rate": 30.0, "block_s": 1800.0, "deadline_s": 3600.0}
#: The first block is dear, the next cheap; the window begins with a block.
_BLOCKS = tuple(
    (0.0 if k == 0 else WARMUP_S + k * PRICE["block_s"], k % 2 == 0)
    for k in range(int(PRICE["duration_s"] / PRICE["block_s"]) + 1)
)
COST = Steps(steps=tuple((from_s, 0.40 if dear else 0.20) for from_s, dear in _BLOCKS))
CO2 = Steps(steps=tuple((from_s, 600.0 if dear else 300.0) for from_s, dear in _BLOCKS))


def _priced(case: Case, policy: str | Policy, *, may_wait: bool = True) -> Figures:
    return run(
        case, policy, fleet=asleep("2P2D", case.profile, asleep_w=20.0, wake_s=10.0),
        rate_req_s=PRICE["rate"], duration_s=PRICE["duration_s"], price=COST, co2=CO2, tick_s=0.5,
        defer=(DEFERRED_FRAC, PRICE["deadline_s"]) if may_wait else None,
    )  # fmt: skip


def least_cost(case: Case, *, may_wait: bool) -> Figures:
    """The clairvoyant linear programme: what the window costs if rates and prices are known.

    Counts are not whole, nothing takes time to wake, and nobody drains.
    """
    fleet = asleep("2P2D", case.profile, asleep_w=20.0, wake_s=10.0)
    dt_s = 60.0
    steps = int(PRICE["duration_s"] / dt_s)
    at_s = WARMUP_S + dt_s * (np.arange(steps) + 0.5)
    price = np.array([COST.at(t_s) for t_s in at_s])
    lengths = lengths_of(make_workload("sharegpt", PRICE["rate"], 1000.0, case.seed))
    optimiser = TargetOptimiser(fleet, SLO)
    wait_req_s = DEFERRED_FRAC * PRICE["rate"]
    served = cp.Variable(steps, nonneg=True)
    load = PRICE["rate"] - wait_req_s + served
    came = wait_req_s * dt_s * np.arange(1, steps + 1)
    late = int(PRICE["deadline_s"] / dt_s) if may_wait else 0
    due = np.concatenate([np.zeros(late), came[: steps - late]])
    due[-1] = came[-1]
    done = dt_s * cp.cumsum(served)
    rules = [done <= came, done >= due]
    watts = 0.0
    groups = [group for groups in optimiser.phases for group in groups]
    for group, supply in zip(groups, optimiser.supplies(lengths), strict=True):
        awake, power = cp.Variable(steps, nonneg=True), cp.Variable(steps)
        rest_w, n = fleet.instances[int(group[0])].parked_w, len(group)
        rules += [awake >= 1, awake <= n, load <= supply.most_req_s * awake]
        rules += [
            power >= alpha * load + beta * awake
            for alpha, beta in zip(supply.alpha_j_req, supply.beta_w, strict=True)
        ]
        watts = watts + power + rest_w * (n - awake)
    cost = cp.Problem(cp.Minimize(price @ watts * dt_s / 3.6e6), rules)
    cost.solve(solver=cp.SCIPY)
    return {"mean_power_w": float(np.mean(watts.value)), "cost": float(cost.value)}


def _price_judged(found: dict[str, Figures]) -> tuple[str, bool]:
    off, ours, least, least_off = (
        found[name]["cost"] for name in ("mpc, at once", "mpc", "LP", "LP, at once")
    )
    # Work that waited from before the window is served in it: cost counts per token.
    ours *= found["mpc, at once"]["tokens"] / found["mpc"]["tokens"]
    gain, most = off - ours, off - least
    text = (
        f"cost {off:.3f} to {ours:.3f}, gain {100 * gain / off:.1f} %; LP {least:.3f}, gain"
        f" {100 * most / off:.1f} % (over LP at once {100 * (1 - least / least_off):.1f} %);"
        f" {found['mpc']['deadline_missed']:.0f} deadlines missed"
    )
    return text, gain >= 0.5 * most and holds(found["mpc"])


def _prices() -> Scene:
    return Scene(
        must="at least half of the gain of the clairvoyant LP, no deadline missed",
        beside=("mpc, at once", "LP", "LP, at once"), judged=_price_judged,
        entries={
            "mpc": lambda case: _priced(case, "mpc"),
            "mpc, at once": lambda case: _priced(case, "mpc", may_wait=False),
            "LP": lambda case: least_cost(case, may_wait=True),
            "LP, at once": lambda case: least_cost(case, may_wait=False),
            "governors": lambda case: _priced(case, "governors"),
            "gate": lambda case: _priced(case, "gate"),
        },
    )  # fmt: skip


# A mix of prompts and answers that shifts


#: Prompt and answer lengths; the first mix is heavy in prefill, the second in decode.
MIXES = ((2000, 60), (200, 400))
MIX_HOLD_S = 1200.0
MIX_WINDOW_S = 3.0 * MIX_HOLD_S
SPLITS = ("2P6D", "3P5D", "4P4D", "5P3D", "6P2D", "7P1D")


def _of_mix(mix: tuple[int, int], rate_req_s: float, from_s: float, until_s: float, rng) -> tuple:
    """Arrivals and lengths of a mix between two times."""
    n = rng.poisson(rate_req_s * (until_s - from_s))
    return np.sort(rng.uniform(from_s, until_s, n)), np.full(n, mix[0]), np.full(n, mix[1])


def _mixed(parts: list[tuple], total_s: float) -> Workload:
    arrival_s, prompt_tok, output_tok = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Workload(name="mixes", arrival_s=arrival_s, prompt_tok=prompt_tok,
                    output_tok=output_tok, duration_s=total_s)  # fmt: skip


@lru_cache
def mix_knees_req_s(profile: object) -> np.ndarray:
    """Largest load of each mix at which static-max holds on each split of eight, shape (2, 7)."""

    def carried(split, mix, rate_req_s):
        total_s = 30.0 + 300.0 + GRACE_S
        drawn = _of_mix(mix, rate_req_s, 0.0, total_s, np.random.default_rng(3))
        return holds(Run(
            policy="static-max", fleet=FleetSpec.parse(split, profile), slo=SLO,
            workload=_mixed([drawn], total_s), duration_s=300.0, warmup_s=30.0,
        ).simulate())  # fmt: skip

    knees = np.zeros((2, 7))
    for which, mix in enumerate(MIXES):
        for p in range(1, 8):
            low, high = 1.0, 200.0
            while high > 1.02 * low:
                middle = float(np.sqrt(low * high))
                able = carried(f"{p}P{8 - p}D", mix, middle)
                low, high = (middle, high) if able else (low, middle)
            knees[which, p - 1] = low
    return knees


def _mix_requests(case: Case, *, one_load: bool) -> Workload:
    """70 % of the knee: of the split that is better for a mix, or of the one best for both."""
    knees = mix_knees_req_s(case.profile)
    most = np.full(2, knees.min(axis=0).max()) if one_load else knees.max(axis=1)
    rng = np.random.default_rng([case.seed, 11])
    total_s = WARMUP_S + MIX_WINDOW_S + GRACE_S
    edges_s = [0.0, *(WARMUP_S + MIX_HOLD_S * k for k in (1, 2, 3)), total_s]
    return _mixed(
        [
            _of_mix(MIXES[k % 2], 0.7 * most[k % 2], from_s, until_s, rng)
            for k, (from_s, until_s) in enumerate(pairwise(edges_s))
        ],
        total_s,
    )


def _roles(*, one_load: bool = False) -> Scene:
    def on(fleet: str, policy: str, *, flexible: bool = False) -> Runs:
        def go(case):
            made = FleetSpec.parse(fleet, case.profile)
            return run(
                case, policy, fleet=made.flexible() if flexible else made,
                workload=_mix_requests(case, one_load=one_load), duration_s=MIX_WINDOW_S,
            )  # fmt: skip

        return go

    return Scene(
        must="holds, <= 0.95 of the best fixed split that holds, or fixed ones miss",
        most=0.95, misses_do=True,
        entries={name: on("4P4D", name, flexible=True) for name in ("mpc", "roles")}
        | {f"mpc on {split}": on(split, "mpc") for split in SPLITS},
    )  # fmt: skip


# The steady loads of the reference table, where nothing has to be foreseen


STEADY_REQ_S = (10, 20, 35, 50, 65, 80, 90, 100)


def _steady() -> Scene:
    def on(policy: str, rate_req_s: float) -> Runs:
        return lambda case: run(
            case, policy, fleet=FleetSpec.parse("2P2D", case.profile), rate_req_s=rate_req_s,
            duration_s=max(150.0, 5300.0 / rate_req_s), warmup_s=30.0,
        )  # fmt: skip

    names = [f"{policy} at {rate}" for policy in ("mpc", "cascade") for rate in STEADY_REQ_S]

    def judged(found):
        ratios = [
            found[f"mpc at {rate}"]["power_w"] / found[f"cascade at {rate}"]["power_w"]
            for rate in STEADY_REQ_S
        ]
        return f"at most {max(ratios):.4f} of cascade", max(ratios) <= 1.003

    return Scene(
        must="not dearer than cascade by more than 0.3 %",
        judged=judged, beside=tuple(names), ours=names[0],
        entries={name: on(name.split(" at ")[0], float(name.split(" at ")[1])) for name in names},
    )  # fmt: skip


def holds(figures: Figures, slo: Slo = SLO) -> bool:
    """Whether promises, deadlines and the budget were kept."""
    over, missed = (figures.get(key) or 0.0 for key in ("over_budget_frac", "deadline_missed"))
    kept_it = min(figures["ttft_attainment"], figures["itl_attainment"]) >= slo.attainment
    return kept_it and not missed > 0.0 and not over > OVER_FRAC


WHAT_IF = {"asleep_w": 20.0, "wake_s": 10.0}
SCENES: dict[str, Scene] = {
    "diurnal": _diurnal(),
    "diurnal x 8": Scene(
        must="holds, <= 0.82 of own governors all awake",
        entries=everybody(_day("16P16D", 8.0, **WHAT_IF)), rival="governors", most=0.82,
    ),
    "diurnal, L20-like": _measured("2P2D", 1.0, "pack-deep_parked", **L20),
    "diurnal x 8, L20-like": _measured("16P16D", 8.0, "pack-deep_parked", **L20),
    "diurnal, A100 engine off": _measured("2P2D", 1.0, "pack-off", **A100),
    "diurnal x 8, A100 engine off": _measured("16P16D", 8.0, "pack-off", **A100),
    "steps": _jumps(),
    "steady 28": Scene(
        must="holds, <= 0.92 of pack", rival="pack", most=0.92,
        entries=everybody(
            lambda case: {"fleet": asleep("2P2D", case.profile, **WHAT_IF), "rate_req_s": 28.0}
        ),
    ),
    "square, no sleep": Scene(
        must="holds, <= 0.94 of pack", rival="pack", most=0.94,
        entries=everybody(_steps(10.0, 60.0, 20.0)),
    ),
    "Azure conversations, wake 10 s": _trace(10.0),
    "Azure conversations, wake 30 s": _trace(30.0),
    "budget cut": _budget_cut(),
    "price": _prices(),
    "roles": _roles(),
    "roles, one load": _roles(one_load=True),
    "steady loads": _steady(),
}  # fmt: skip
