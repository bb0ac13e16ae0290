"""The eight L20 in our simulator: their load, and what they were set to over time."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np

from voltana_ctrl import Decision, FleetSpec
from voltana_ctrl.routing.baselines import shortest_router
from voltana_ctrl.sim.metrics import judged_latencies, snapshot
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload

FACTS = tomllib.loads((Path(__file__).parent / "l20.toml").read_text(encoding="utf-8"))
GPUS, BOOST_MHZ, PARKED_MHZ = FACTS["gpus"], 2520.0, FACTS["parked_mhz"]
SPAN_S, WARMUP_S = 300.0, 30.0
#: The guard of the source holds the highest clock for so long after the last risk.
GUARD_S = 30.0
SEEDS = 3
SUMS = ("prefill_j", "decode_j", "idle_j", "transfer_j")


def workload(name, rate_req_s, seed, span_s=SPAN_S):
    """Poisson arrivals with the published lengths."""
    rng = np.random.default_rng([seed, len(name)])
    lengths = FACTS["lengths"][name]
    n = rng.poisson(rate_req_s * span_s)

    def tok(kind):
        log_tok = np.interp(rng.random(n), lengths[f"{kind}_frac"], np.log(lengths[f"{kind}_tok"]))
        return np.maximum(1, np.rint(np.exp(log_tok))).astype(int)

    return Workload(
        name=name, arrival_s=np.sort(rng.uniform(0.0, span_s, n)), prompt_tok=tok("prompt"),
        output_tok=tok("output"), duration_s=span_s,
    )  # fmt: skip


def states(on, low_mhz, guarded, on_frac, mean_mhz):
    """Seconds, engines on and MHz one after another: all at boost, and a lower state.

    The controllers of the source begin with all engines at boost, and a guard raises all of them to
    boost for half a minute when a promise is at risk. Of the share of time at boost and of the
    clock below, the published share of engines on and mean clock fix both; where all stay on, the
    mean clock fixes the share.
    """
    if on < GPUS:
        boost_frac = (GPUS * on_frac - on) / (GPUS - on)
        all_mhz = GPUS * (mean_mhz - boost_frac * BOOST_MHZ) / (1.0 - boost_frac)
        low_mhz = (all_mhz - (GPUS - on) * PARKED_MHZ) / on
    else:
        boost_frac = (mean_mhz - low_mhz) / (BOOST_MHZ - low_mhz)
    if not guarded:
        return [(boost_frac * SPAN_S, GPUS, BOOST_MHZ), (SPAN_S, on, low_mhz)]
    turn = [(GUARD_S, GPUS, BOOST_MHZ), (GUARD_S / boost_frac - GUARD_S, on, low_mhz)]
    return turn * math.ceil(SPAN_S * boost_frac / GUARD_S)


def set_to(fleet, on, clock_mhz):
    """The decision that has the first `on` engines at these clocks, and the others parked."""
    active = np.arange(len(fleet)) < on
    ladder = fleet.instances[0].clocks_mhz
    asked = np.broadcast_to(clock_mhz, len(fleet))[:, None]
    nearest_mhz = ladder[np.abs(ladder - asked).argmin(axis=1)]
    decision = Decision.highest(fleet, ceiling_mhz=np.where(active, nearest_mhz, ladder[0]))
    if active.all():
        return decision
    return replace(decision, active=active, route_frac=active / active.sum())


def served(
    believed, data, rate_req_s, layout, on=None, clock_mhz=BOOST_MHZ, seeds=SEEDS, over_time=None
):
    """Watts, mean TTFT [ms], mean TPOT [ms], and requests per engine that was on.

    One setting is judged in its steady state; states over time from the beginning, as measured.
    """
    fleet = FleetSpec.parse(layout, believed)
    start_s = WARMUP_S if over_time is None else 0.0
    steps = over_time or [(SPAN_S, on or len(fleet), clock_mhz)]
    found = []
    for seed in range(seeds):
        plant = Plant(
            fleet,
            workload(data, rate_req_s, seed),
            PlantSettings(actuation_s=FACTS["clock_set_s"], settle_s=0.0),
            prefill_router=shortest_router(fleet, "prefill"),
            decode_router=None if fleet.colocated else shortest_router(fleet, "decode"),
            judged_s=(start_s, SPAN_S - start_s),
            seed=seed,
        )
        now_s, on_s, before = 0.0, 0.0, None
        for length_s, n_on, mhz in steps:
            plant.apply(set_to(fleet, n_on, mhz))
            if before is None:
                plant.advance(start_s)
                before = snapshot(plant)
            end_s = min(now_s + length_s, SPAN_S)
            on_s += n_on * (end_s - max(now_s, start_s))
            plant.advance(end_s)
            now_s = end_s
        after = snapshot(plant)
        gain = {name: (after[name] - before[name]).sum() for name in (*SUMS, "running_req_s")}
        plant.advance(SPAN_S + 60.0)
        ttft_s, itl_s = judged_latencies(plant)
        found.append(
            [
                sum(gain[name] for name in SUMS) / (SPAN_S - start_s),
                1e3 * np.nanmean(ttft_s),
                1e3 * np.nanmean(itl_s[itl_s > 0.0]),
                gain["running_req_s"] / on_s,
            ]
        )
    return np.mean(found, axis=0)


def served_static(believed, row):
    """The same of one row of the static settings; engines beside the layout are parked or idle."""
    data, rate_req_s, layout, mhz, others = row[:5]
    fleet = FleetSpec.parse(layout, believed)
    prefill = np.array([one.role == "prefill" for one in fleet.instances])
    found = served(believed, data, rate_req_s, layout, clock_mhz=np.where(prefill, mhz[0], mhz[-1]))
    rest_w = FACTS["parked_w" if others == "parked" else "idle_released_w"]
    return found + np.array([(GPUS - len(fleet)) * rest_w, 0.0, 0.0, 0.0])


def served_dynamic(believed, row):
    """The same of one row of clocks and engines under control."""
    return served(believed, row[0], row[1], "8C", over_time=states(*row[2:7]))
