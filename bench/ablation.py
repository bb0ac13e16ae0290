"""What each layer of the controller brings: alone, and left out.

    python bench/ablation.py [--duration 60] [--seeds 1]
    python bench/ablation.py --tuning [--duration 60] [--seeds 1]

All figures are simulated, on the reference scenario; prints the tables of docs/ablation.md. With
`--tuning`: what half and twice of each number of `voltana_ctrl.types.Tuning` does, in steady load,
in bursts, and where an instance slows down.
"""

import argparse
import dataclasses
import sys

import numpy as np

from voltana_ctrl import ConfigError, Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.control import CascadeController, IterationGovernor, Target
from voltana_ctrl.experiment import Run
from voltana_ctrl.policies import Policy, PolicyParts, find_policy
from voltana_ctrl.routing import PricedRouter
from voltana_ctrl.sim.faults import ClockClamp, Slowdown
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import PowerBudget, Tuning

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
COLOCATED = FleetSpec.parse("4C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
SLO = Slo(ttft_s=0.6, itl_s=0.06)
WARMUP_S = 30.0
LOADS_REQ_S = (20.0, 35.0, 65.0, 80.0)


class _EqualTarget:
    """In place of the target layer: everybody is active, with equal shares, at any clock."""

    margin_frac = (0.02, 0.035)

    def __init__(self, fleet):
        share = np.zeros(len(fleet))
        for members in (fleet.prefill, fleet.decode):
            share[members] = 1.0 / len(members)
        self._target = Target(
            active=np.ones(len(fleet), bool),
            route_frac=share,
            floor_mhz=fleet.min_mhz,
            power_w=np.zeros(len(fleet)),
            price_j_req=np.zeros(len(fleet)),
            feasible=True,
            forgone_j=np.zeros(2),
        )

    def plan(self, load, **known):
        del load, known
        return self._target


def policy(name, *, target=True, governors=True, router=True):
    """The cascade with some of its layers."""

    def build(fleet, slo, setup):
        settings = {"period_s": setup.tick_s, "delay_s": setup.delay_s, "governed": governors}
        if setup.power_budget is not None:
            settings["power_budget_w"] = setup.limit_w
        if not target:
            settings["target"] = _EqualTarget(fleet)
        controller = (
            CascadeController(fleet, slo, **settings) if target or (governors and router) else None
        )
        return PolicyParts(
            controller=controller,
            first=Decision.highest(fleet, floor_mhz=fleet.min_mhz if governors else None),
            governors=find_policy("cascade").build(fleet, slo, setup).governors
            if governors
            else None,
            prefill_router=PricedRouter(fleet, slo, "prefill") if router else None,
            decode_router=PricedRouter(fleet, slo) if router else None,
        )

    return Policy(name=name, summary="ablation", source="ours", build=build, knows_budget=True)


ABLATIONS = (
    find_policy("static-max"),
    policy("target only", governors=False, router=False),
    policy("governors only", target=False, router=False),
    policy("routers only", target=False, governors=False),
    policy("without target", target=False),
    policy("without governors", governors=False),
    policy("without routers", router=False),
    policy("all"),
)


def tuned(name, tuning):
    """The cascade with other numbers."""

    def build(fleet, slo, setup):
        parts = find_policy("cascade").build(fleet, slo, setup)
        settings = {"delay_s": setup.delay_s, "tuning": tuning}
        return dataclasses.replace(
            parts,
            controller=CascadeController(fleet, slo, period_s=setup.tick_s, **settings),
            governors=[IterationGovernor(one, slo, **settings) for one in fleet.instances],
        )

    return Policy(name=name, summary="ablation", source="ours", build=build)


def scaled(tuning, name, factor):
    """Tuning with one number multiplied."""
    value = getattr(tuning, name)
    if isinstance(value, tuple):
        return dataclasses.replace(tuning, **{name: tuple(factor * one for one in value)})
    return dataclasses.replace(tuning, **{name: factor * value})


def transients(duration_s, seed):
    """Loads that change, and a budget that does."""
    span_s = WARMUP_S + duration_s + 60.0
    cut_s, lift_s = WARMUP_S + duration_s / 6.0, WARMUP_S + duration_s / 2.0
    cut = PowerBudget(steps=((0.0, 5000.0), (cut_s, 526.0), (lift_s, 5000.0)))
    # A ramp in 24 steps; bursts of 5 s; halves of 20 s.
    ramp = [(0.0, 20.0)]
    ramp += [(WARMUP_S + k * duration_s / 24.0, 20.0 + 2.5 * k) for k in range(1, 25)]
    bursts = [(30.0 * k + t_s, rate) for k in range(40) for t_s, rate in ((0.0, 90.0), (5.0, 30.0))]
    wakes = [(40.0 * k + t_s, rate) for k in range(30) for t_s, rate in ((0.0, 15.0), (20.0, 60.0))]

    def stepped(steps):
        rate_steps = RateSteps(steps=tuple(steps))
        return make_workload("sharegpt", None, span_s, seed, rate_steps=rate_steps)

    return {
        "ramp 20 to 80 req/s": (stepped(ramp), None),
        "bursts: 90 req/s for 5 s in 30 s, else 30": (stepped(bursts), None),
        "wake-ups: 15 and 60 req/s, 20 s each": (stepped(wakes), None),
        "35 req/s, budget cut to 526 W": (make_workload("sharegpt", 35.0, span_s, seed), cut),
    }


def mean(which, workload, duration_s, seeds, rate_req_s=None, budget=None, fleet=FLEET, faults=()):
    """Watts, TTFT and ITL attainment in percent, requests finished."""
    runs = [
        Run(
            policy=which, fleet=fleet, slo=SLO, rate_req_s=rate_req_s, seed=seed,
            workload=workload(seed) if callable(workload) else workload,
            duration_s=duration_s, warmup_s=WARMUP_S, power_budget=budget, faults=faults,
        ).simulate()
        for seed in range(seeds)
    ]  # fmt: skip
    keys = ("mean_power_w", "ttft_attainment", "itl_attainment")
    return np.mean([[run[key] for key in keys] for run in runs], axis=0) * (1.0, 100.0, 100.0)


def tuning_scenes(duration_s, seed):
    """Name of each scene, with its load and what goes wrong in it."""
    slow = Slowdown(instance="decode-0", slow_frac=1.3, from_s=WARMUP_S)
    clamped = ClockClamp(instance="prefill-0", clamp_mhz=900.0, from_s=WARMUP_S)
    bursts = transients(duration_s, seed)["bursts: 90 req/s for 5 s in 30 s, else 30"][0]
    return {
        "20 req/s": {"workload": "sharegpt", "rate_req_s": 20.0},
        "35 req/s": {"workload": "sharegpt", "rate_req_s": 35.0},
        "65 req/s": {"workload": "sharegpt", "rate_req_s": 65.0},
        "overload": {"workload": "sharegpt", "rate_req_s": 95.0},
        "bursts": {"workload": bursts},
        "colocated": {"workload": "sharegpt", "rate_req_s": 20.0, "fleet": COLOCATED},
        "slow": {"workload": "sharegpt", "rate_req_s": 35.0, "faults": (slow,)},
        "clamped": {"workload": "sharegpt", "rate_req_s": 35.0, "faults": (clamped,)},
    }


def print_tuning(duration_s, seeds):
    """What each chosen number does, halved and doubled: in the scene where it does most."""
    names = list(tuning_scenes(duration_s, 0))

    def row(which):
        figures = []
        for name in names:
            scene = dict(tuning_scenes(duration_s, 0)[name])
            figures.append(mean(which, scene.pop("workload"), duration_s, seeds, **scene))
        return np.array(figures)

    usual = row(tuned("as it is", Tuning()))
    print(f"| | {' | '.join(names)} |\n|---|" + "---|" * len(names))
    cells = [f"{power_w:.0f}; {ttft:.1f} / {itl:.1f}" for power_w, ttft, itl in usual]
    print(f"| as it is | {' | '.join(cells)} |\n")
    print("| number | half: watts | points | twice: watts | points |\n|---|---|---|---|---|")
    for one in dataclasses.fields(Tuning):
        cells = []
        for factor in (0.5, 2.0):
            try:
                tuning = scaled(Tuning(), one.name, factor)
                changed = row(tuned(one.name, tuning))
            except ConfigError:  # twice as many misses as are promised
                cells += ["refused", ""]
                continue
            more = 100.0 * (changed[:, 0] / usual[:, 0] - 1.0)
            points = (changed[:, 1:] - usual[:, 1:]).min(axis=1)
            at, worst = int(np.argmax(np.abs(more))), int(np.argmin(points))
            cells.append(f"{more[at]:+.1f} % ({names[at]})" if abs(more[at]) >= 0.05 else "0")
            cells.append(f"{points[worst]:+.1f} ({names[worst]})" if points[worst] < -0.05 else "0")
        print(f"| `{one.name}` | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tuning", action="store_true", help="each chosen number")
    options = parser.parse_args()
    if options.tuning:
        print_tuning(options.duration, options.seeds)
        return 0
    print("| layers |" + "".join(f" {rate:g} req/s |" for rate in LOADS_REQ_S))
    print("|---|" + "---|" * len(LOADS_REQ_S), flush=True)
    for which in ABLATIONS:
        cells = []
        for rate in LOADS_REQ_S:
            power_w, ttft, itl = mean(which, "sharegpt", options.duration, options.seeds, rate)
            cells.append(f"{power_w:.0f}; {ttft:.1f} / {itl:.1f}")
        print(f"| {which.name} | {' | '.join(cells)} |", flush=True)
    print("\n| transient | governors alone | cascade | energy |\n|---|---|---|---|", flush=True)
    for name, (_, budget) in transients(options.duration, 0).items():
        both = [
            mean(
                find_policy(which),
                lambda seed, name=name: transients(options.duration, seed)[name][0],
                options.duration,
                options.seeds,
                budget=budget,
            )
            for which in ("governors", "cascade")
        ]
        told = [f"{power_w:.1f}; {ttft:.2f} / {itl:.2f}" for power_w, ttft, itl in both]
        change = 100.0 * (both[1][0] / both[0][0] - 1.0)
        print(f"| {name} | {' | '.join(told)} | {change:+.2f} % |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
