"""What each layer of the controller brings: alone, and left out.

    python bench/ablation.py [--duration 60] [--seeds 1]

All figures are simulated, on the reference scenario; prints the tables of docs/ablation.md.
"""

import argparse
import dataclasses
import sys

import numpy as np

from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.control import CascadeController, Target
from voltana_ctrl.experiment import Run
from voltana_ctrl.policies import Policy, PolicyParts, find_policy
from voltana_ctrl.routing import PricedRouter
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import PowerBudget

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
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


def kept(load, keep):
    """Some of the requests of a workload."""
    return dataclasses.replace(
        load,
        arrival_s=load.arrival_s[keep],
        prompt_tok=load.prompt_tok[keep],
        output_tok=load.output_tok[keep],
        cached_tok=load.cached_tok[keep],
        request_class=load.request_class[keep],
        patience_s=load.patience_s[keep],
        block_offset=load.block_offset[: np.count_nonzero(keep) + 1],  # there are no blocks
    )


def thinned(rate_of, peak_req_s, duration_s, seed):
    """Poisson arrivals at a rate that changes in time."""
    load = make_workload("sharegpt", peak_req_s, duration_s, seed)
    draw = np.random.default_rng(seed + 1000).random(len(load)) * peak_req_s
    return kept(load, draw < rate_of(load.arrival_s))


def transients(duration_s, seed):
    """Loads that change, and a budget that does."""
    span_s = WARMUP_S + duration_s + 60.0
    cut_s, lift_s = WARMUP_S + duration_s / 6.0, WARMUP_S + duration_s / 2.0
    cut = PowerBudget(steps=((0.0, 5000.0), (cut_s, 526.0), (lift_s, 5000.0)))

    def ramp(t_s):
        return np.interp(t_s, [WARMUP_S, WARMUP_S + duration_s], [20.0, 80.0])

    def bursts(t_s):
        return np.where(t_s % 30.0 < 5.0, 90.0, 30.0)

    def wakes(t_s):
        return np.where(t_s % 40.0 < 20.0, 15.0, 60.0)

    return {
        "ramp 20 to 80 req/s": (thinned(ramp, 80.0, span_s, seed), None),
        "bursts: 90 req/s for 5 s in 30 s, else 30": (thinned(bursts, 90.0, span_s, seed), None),
        "wake-ups: 15 and 60 req/s, 20 s each": (thinned(wakes, 60.0, span_s, seed), None),
        "35 req/s, budget cut to 526 W": (make_workload("sharegpt", 35.0, span_s, seed), cut),
    }


def mean(which, workload, duration_s, seeds, rate_req_s=None, budget=None):
    """Watts, TTFT and ITL attainment in percent, requests finished."""
    runs = [
        Run(
            policy=which, fleet=FLEET, slo=SLO, rate_req_s=rate_req_s, seed=seed,
            workload=workload(seed) if callable(workload) else workload,
            duration_s=duration_s, warmup_s=WARMUP_S, power_budget=budget,
        ).simulate()
        for seed in range(seeds)
    ]  # fmt: skip
    keys = ("mean_power_w", "ttft_attainment", "itl_attainment")
    return np.mean([[run[key] for key in keys] for run in runs], axis=0) * (1.0, 100.0, 100.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
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
