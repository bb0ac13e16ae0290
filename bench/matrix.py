"""The breadth table: one factor at a time from the reference scenario, every baseline.

    python bench/matrix.py [--cells reference,lmsys] [--seeds 1] [--duration 300] > matrix.md

All figures are simulated. A cell is lost where a baseline is cheaper by more than 0.5 % and better
in attainment by more than 0.002.
"""

import argparse
import dataclasses
import sys
import time

import numpy as np

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.control import EcoFreqGovernor
from voltana_ctrl.control.cascade import CascadeController, MpcController
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.governors import DEFAULT_LADDER_MHZ
from voltana_ctrl.routing import (
    fadr_router,
    least_queue_router,
    random_router,
    shortest_router,
    tile_aware_router,
)
from voltana_ctrl.routing.priced import PricedRouter
from voltana_ctrl.sim.engine import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload

NAME = "a100-sxm-80gb/llama-3.1-8b"
POLICIES = ("mpc", "cascade", "voltanallm", "voltanallm-tile", "voltanallm-jsq",
            "voltanallm-full-ladder")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One factor changed; loads are fractions of the knee per decode instance."""

    fleet: str = "2P2D"
    profile: str = NAME
    workload: str = "sharegpt"
    knee_req_s: float = 90.0
    actuation_s: float = 0.005
    believed_pace_frac: float = 1.0


CELLS = {
    "reference": Cell(),
    "lmsys": Cell(workload="lmsys"),
    "azure-conv": Cell(workload="azure-conv", knee_req_s=30.0),
    "azure-code": Cell(workload="azure-code", knee_req_s=16.0),
    "4P4D": Cell(fleet="4P4D", knee_req_s=180.0),
    "8P24D": Cell(fleet="8P24D", knee_req_s=400.0),
    "4C": Cell(fleet="4C", knee_req_s=90.0),
    "actuation-50ms": Cell(actuation_s=0.05),
    "actuation-200ms": Cell(actuation_s=0.2),
    "profile-20%-fast": Cell(believed_pace_frac=0.8),
    "profile-20%-slow": Cell(believed_pace_frac=1.2),
}
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def believed(fleet, pace_frac):
    """The fleet with iteration times multiplied: what a wrong profile makes of it."""
    profile = fleet.instances[0].profile
    table = profile.table.copy()
    for name in table.dtype.names:
        if name.endswith("_s"):
            table[name] *= pace_frac
    wrong = dataclasses.replace(profile, table=table)
    return FleetSpec(tuple(dataclasses.replace(one, profile=wrong) for one in fleet.instances))


def parts(policy, fleet, thought, cell):
    """Controller, governors, prefill and decode router."""
    if policy in ("mpc", "cascade"):
        delay_s = cell.actuation_s + 0.02
        make = MpcController if policy == "mpc" else CascadeController
        return (
            make(thought, SLO, delay_s=delay_s),
            [IterationGovernor(one, SLO, delay_s=delay_s) for one in thought.instances],
            PricedRouter(thought, SLO, "prefill"),
            PricedRouter(thought, SLO),
        )
    ladder = None if policy.endswith("ladder") else DEFAULT_LADDER_MHZ
    decode = {
        "voltanallm-tile": lambda phase: tile_aware_router(fleet, phase),
        "voltanallm-jsq": lambda phase: shortest_router(fleet, phase),
    }.get(policy, lambda phase: fadr_router(thought, phase, SLO, ladder_mhz=ladder))
    spread = policy in ("voltanallm-jsq", "voltanallm-full-ladder")
    prefill = least_queue_router if spread else random_router
    return (
        None,
        [EcoFreqGovernor(one, SLO, ladder_mhz=ladder) for one in thought.instances],
        decode("prefill") if fleet.colocated else prefill(fleet, "prefill"),
        decode("decode"),
    )


def run(cell, policy, rate_req_s, seed, duration_s, warmup_s=30.0):
    """Mean power and the attainment of TTFT and ITL."""
    fleet = FleetSpec.parse(cell.fleet, load_profile(cell.profile))
    thought = fleet if cell.believed_pace_frac == 1.0 else believed(fleet, cell.believed_pace_frac)
    end_s = warmup_s + duration_s
    load = make_workload(cell.workload, rate_req_s, end_s + 60.0, seed)
    controller, governors, prefill, decode = parts(policy, fleet, thought, cell)
    plant = Plant(
        fleet,
        load,
        PlantSettings(actuation_s=cell.actuation_s, view_age_s=0.02),
        governors=governors,
        prefill_router=prefill,
        decode_router=decode,
        believed=thought,
        judged_s=(warmup_s, end_s),
        seed=seed,
    )
    memory = controller.init() if controller else None
    energy_j = {}
    for k in range(round((end_s + 30.0) * 10)):
        if k in (round(warmup_s * 10), round(end_s * 10)):
            plant.advance(0.1 * k)
            energy_j[k] = plant.state().energy_j.sum()
        if controller:
            plant.advance(0.1 * k)
            decision, memory = controller.decide(plant.read(), memory)
            plant.apply(decision)
    plant.advance(end_s + 60.0, stop_when_judged=True)
    rows = plant.requests
    rows = rows[(rows["arrival_s"] >= warmup_s) & (rows["arrival_s"] < end_s)]
    first, done = rows["first_s"] >= 0.0, rows["state"] == 7
    ttft = np.where(first, rows["first_s"] - rows["arrival_s"], np.inf)
    gaps = np.maximum(rows["output_tok"] - 1, 1)
    itl = np.where(done, (rows["done_s"] - rows["first_s"]) / gaps, np.inf)
    start, end = sorted(energy_j)
    return (
        (energy_j[end] - energy_j[start]) / duration_s,
        np.mean(ttft <= SLO.ttft_s),
        np.mean(itl <= SLO.itl_s),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--loads", default="0.25,0.5,0.75")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--duration", type=float, default=300.0)
    options = parser.parse_args()
    print("| cell | req/s | policy | W | TTFT | ITL |\n|---|---|---|---|---|---|", flush=True)
    lost, started_s = [], time.perf_counter()
    for name in options.cells.split(","):
        for part in map(float, options.loads.split(",")):
            rate = part * CELLS[name].knee_req_s
            results = {}
            for policy in options.policies.split(","):
                runs = [
                    run(CELLS[name], policy, rate, seed, options.duration)
                    for seed in range(options.seeds)
                ]
                watts, ttft, itl = results[policy] = np.mean(runs, axis=0)
                print(f"| {name} | {rate:g} | {policy} | {watts:.1f} | {ttft:.4f} | {itl:.4f} |",
                      flush=True)  # fmt: skip
            ours = results.get("mpc")
            for policy, theirs in results.items():
                better = ours is not None and (
                    theirs[0] < 0.995 * ours[0] and min(theirs[1:]) > min(ours[1:]) + 0.002
                )
                if better:
                    lost.append((name, rate, policy))
    print(f"\nSimulated, {time.perf_counter() - started_s:.0f} s. Lost cells: {lost or 'none'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
