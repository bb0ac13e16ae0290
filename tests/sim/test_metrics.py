"""Figures of a run, counted again from the plant's own records."""

import dataclasses
import math

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.kernels import layout
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.metrics import run_figures, snapshot
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.25, itl_s=0.016)


def window_of(plant: Plant, from_s: float, until_s: float, end_s: float, slo=SLO):
    plant.advance(from_s)
    before = snapshot(plant)
    plant.advance(until_s)
    after = snapshot(plant)
    plant.advance(end_s)
    return run_figures(plant, before, after, until_s - from_s, slo), before, after


def busy_plant(rate=50.0, judged_s=(5.0, 25.0), **options) -> Plant:
    fleet = FleetSpec.parse("2P2D", REFERENCE)
    workload = make_workload("sharegpt", rate_req_s=rate, duration_s=40.0, seed=4)
    parts = find_policy("voltanallm").build(fleet, SLO, PolicySetup())
    plant = Plant(
        fleet, workload, PlantSettings(log_iterations=200_000), governors=parts.governors,
        judged_s=judged_s, **options,
    )  # fmt: skip
    plant.apply(Decision.highest(fleet))
    return plant


def test_figures_counted_again() -> None:
    plant = busy_plant()
    figures, _, _ = window_of(plant, 5.0, 25.0, 85.0)
    rows = plant.requests
    mine = rows[(rows["arrival_s"] >= 5.0) & (rows["arrival_s"] < 25.0)]
    ttft_s = mine["first_s"] - mine["arrival_s"]
    itl_s = [
        0.0 if r["output_tok"] == 1 else (r["done_s"] - r["first_s"]) / (r["output_tok"] - 1)
        for r in mine
    ]
    assert figures["requests_arrived"] == figures["requests_completed"] == len(mine)
    assert figures["requests_in_flight"] == figures["requests_dropped"] == 0
    met_ttft, met_itl = ttft_s <= SLO.ttft_s, np.array(itl_s) <= SLO.itl_s
    assert figures["ttft_attainment"] == met_ttft.mean()
    assert figures["itl_attainment"] == met_itl.mean()
    assert figures["slo_attainment"] == (met_ttft & met_itl).mean()
    assert 0.0 < figures["slo_attainment"] < 1.0
    assert figures["ttft_p50_s"] == pytest.approx(np.median(ttft_s))
    assert figures["ttft_p99_s"] == pytest.approx(np.quantile(ttft_s, 0.99))
    assert figures["itl_p99_s"] == pytest.approx(
        np.quantile([x for x, r in zip(itl_s, mine, strict=True) if r["output_tok"] > 1], 0.99)
    )
    assert figures["regime"] == "open_loop"


def test_window_figures_agree_with_the_iteration_log() -> None:
    plant = busy_plant()
    plant.advance(5.0)
    plant.read()
    before, start_j = snapshot(plant), plant.state().energy_j.sum()
    plant.advance(25.0)
    log, after = plant.read().iterations, snapshot(plant)
    figures = run_figures(plant, before, after, 20.0, SLO)
    assert figures["iterations"] == len(log.t_s)
    decodes = log.batch_req > 0
    assert figures["mean_batch"] == pytest.approx(log.batch_req[decodes].mean())
    assert figures["energy_j"] == pytest.approx(plant.state().energy_j.sum() - start_j)
    assert figures["mean_power_w"] == pytest.approx(figures["energy_j"] / 20.0)
    # Clock by time busy; iterations that straddle the edges of the window blur it a little.
    mine = log.instance >= 2
    mean_mhz = np.average(log.freq_mhz[mine], weights=log.wall_s[mine])
    assert figures["mean_freq_decode_mhz"] == pytest.approx(mean_mhz, rel=0.01)
    # Each iteration gives a token per running request; each finished prompt gives one.
    firsts = plant.requests["prefill_at"] >= 0
    assert figures["tokens_out"] >= log.batch_req.sum()
    assert figures["tokens_out"] <= log.batch_req.sum() + firsts.sum()
    assert figures["energy_per_token_j"] == pytest.approx(
        figures["energy_j"] / figures["tokens_out"]
    )


def test_parts_sum_and_windows_add_up() -> None:
    parts = ("energy_prefill_j", "energy_decode_j", "energy_idle_j", "energy_transfer_j")
    whole, _, _ = window_of(busy_plant(), 5.0, 25.0, 25.0)
    assert whole["energy_j"] == pytest.approx(sum(whole[part] for part in parts), rel=1e-12)
    first, _, _ = window_of(busy_plant(), 5.0, 15.0, 15.0)
    second, _, _ = window_of(busy_plant(), 15.0, 25.0, 25.0)
    for key in (*parts, "energy_j", "tokens_out", "iterations", "clock_changes"):
        assert first[key] + second[key] == pytest.approx(whole[key], rel=1e-9)


def test_what_is_unfinished_or_dropped_is_a_miss_and_all_are_counted() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = Workload(
        name="mixed",
        arrival_s=[0.0, 1.0, 1.5, 2.0, 9.0],
        prompt_tok=[100, 100, 460_000, 100, 100],
        output_tok=[10, 10, 1, 50_000, 10],
        duration_s=10.0,
    )
    plant = Plant(fleet, workload, judged_s=(0.5, 5.0))
    figures, _, _ = window_of(plant, 0.5, 5.0, 20.0, Slo(ttft_s=1.0, itl_s=1.0))
    assert figures["requests_arrived"] == 3
    assert figures["requests_completed"] == 1
    assert figures["requests_dropped"] == 1
    assert figures["requests_in_flight"] == 1
    assert figures["slo_attainment"] == figures["itl_attainment"] == pytest.approx(1 / 3)
    assert plant.judged == (3, 1)


def test_nothing_to_judge_is_none_and_never_zero() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = Workload(name="late", arrival_s=[50.0], prompt_tok=[9], output_tok=[9],
                        duration_s=60.0)  # fmt: skip
    figures, _, _ = window_of(Plant(fleet, workload, judged_s=(0.0, 10.0)), 0.0, 10.0, 10.0)
    for key in (
        "ttft_attainment", "itl_attainment", "slo_attainment", "ttft_p50_s", "ttft_p99_s",
        "itl_p50_s", "itl_p99_s", "energy_per_token_j", "mean_batch", "mean_freq_prefill_mhz",
        "mean_freq_decode_mhz",
    ):  # fmt: skip
        assert figures[key] is None, key
    assert figures["mean_power_w"] == pytest.approx(120.0)  # two idle instances
    assert figures["energy_idle_j"] == figures["energy_j"]
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, float))


def test_single_token_answers_have_no_gap_between_tokens() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = Workload(name="short", arrival_s=[1.0, 2.0], prompt_tok=[9, 9], output_tok=[1, 1],
                        duration_s=60.0)  # fmt: skip
    figures, _, _ = window_of(Plant(fleet, workload, judged_s=(0.0, 10.0)), 0.0, 10.0, 70.0)
    assert figures["itl_attainment"] == figures["slo_attainment"] == 1.0
    assert figures["itl_p50_s"] is figures["itl_p99_s"] is None
    assert figures["tokens_out"] == 2


@pytest.mark.parametrize(
    ("clients", "max_batch", "regime"),
    [(8, 64, "closed_loop"), (None, 8, "capped_batch"), (None, 900, "open_loop")],
)
def test_regime_is_told(clients, max_batch, regime) -> None:
    profile = dataclasses.replace(REFERENCE, max_batch=max_batch)
    fleet = FleetSpec.parse("1P1D", profile)
    workload = (
        make_closed_loop("sharegpt", clients, 2000, seed=0)
        if clients
        else make_workload("sharegpt", rate_req_s=15.0, duration_s=60.0, seed=0)
    )
    figures, _, _ = window_of(Plant(fleet, workload), 10.0, 50.0, 50.0)
    assert figures["regime"] == regime


def test_active_decode_counts_instances_that_take_work() -> None:
    plant = busy_plant()
    everybody = Decision.highest(plant.fleet)
    plant.advance(5.0)
    before = snapshot(plant)
    plant.advance(10.0)
    plant.apply(
        dataclasses.replace(
            everybody, active=[True, True, True, False], route_frac=[0.5, 0.5, 1, 0]
        )
    )
    plant.advance(25.0)
    figures = run_figures(plant, before, snapshot(plant), 20.0, SLO)
    assert figures["active_decode_mean"] == pytest.approx((2 * 5 + 1 * 15) / 20)


def test_judged_requests_are_counted_down_to_none() -> None:
    plant = busy_plant()
    judged, left = plant.judged
    inside = (plant.requests["arrival_s"] >= 5.0) & (plant.requests["arrival_s"] < 25.0)
    assert judged == left == inside.sum()
    plant.advance(500.0, stop_when_judged=True)
    assert plant.judged == (judged, 0)
    assert plant.now_s == plant.requests["done_s"][inside].max()
    assert np.any(plant.requests["state"] != layout.DONE)
