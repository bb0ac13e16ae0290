"""No run that keeps its promise draws less than the lower bound."""

import dataclasses

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.sim.arrivals import Gamma, MarkovModulated, Poisson
from voltana_ctrl.sim.lower_bound import least_demand, lower_bound_w
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import Rest

POLICIES = (
    "static-max", "static-", "voltanallm", "voltanallm-jsq", "dualscale", "threshold", "pack",
    "cascade", "mpc",
)  # fmt: skip
PROFILES = ("a100-sxm-80gb/llama-3.1-8b", "h100-sxm-80gb/llama-3.1-8b", "l20/qwen2.5-7b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def scene(seed):
    """A random fleet, load, window, promise and policy; bursts, silences and cold starts."""
    rng = np.random.default_rng(seed)
    profile = load_profile(str(rng.choice(PROFILES)))
    if rng.random() < 0.3:
        profile = dataclasses.replace(profile, parked_w=0.4 * profile.idle_w)
    fleet = FleetSpec.parse(str(rng.choice(["1P1D", "2P2D", "1P3D", "2C", "4C"])), profile)
    rungs = profile.clocks_mhz[:: int(rng.integers(6, 12))]
    rungs = np.union1d(rungs, profile.clocks_mhz[-1:])
    fleet = FleetSpec(
        [dataclasses.replace(one, clocks_mhz=rungs) for one in fleet.instances]
    )  # fmt: skip
    arrivals = [
        Poisson(), Gamma(cv=3.0), Gamma(cv=0.3), MarkovModulated(high_s=2.0, low_s=6.0),
    ][rng.integers(4)]  # fmt: skip
    workload = make_workload(
        str(rng.choice(["sharegpt", "lmsys", "azure-conv", "azure-code", "fixed"])),
        rate_req_s=float(rng.uniform(0.3, 9.0)) * len(fleet) / 2.0, duration_s=110.0,
        seed=int(seed), arrivals=arrivals,
    )  # fmt: skip
    policy = str(rng.choice(POLICIES))
    if policy == "static-":
        policy += f"{rungs[len(rungs) // 2]:g}"
    return Run(
        policy=policy, fleet=fleet, workload=workload, seed=int(seed),
        slo=Slo(
            ttft_s=float(rng.choice([0.6, 1.5, 4.0])), itl_s=float(rng.choice([0.06, 0.1, 0.2])),
            attainment=float(rng.choice([0.8, 0.95, 0.99])),
        ),
        duration_s=float(rng.choice([3.0, 10.0, 40.0])), warmup_s=float(rng.choice([0.0, 5.0])),
    )  # fmt: skip


def richer(seed, traces=None):
    """A scene with what sleeps, turns, or waits, and of published traces where they are at hand."""
    run, rng = scene(seed), np.random.default_rng([seed, 1])
    kind = ["asleep", "roles", "deferred", "trace"][seed % 4]
    if kind == "asleep":
        deep = Rest(power_w=8.0, wake_s=float(rng.choice([0.5, 4.0])), wake_j=30.0, enter_s=0.2)
        profile = dataclasses.replace(run.fleet.instances[0].profile, off=deep)
        rungs = run.fleet.instances[0].clocks_mhz
        fleet = FleetSpec.parse(str(rng.choice(["2P2D", "1P3D", "4C"])), profile)
        fleet = FleetSpec([dataclasses.replace(one, clocks_mhz=rungs) for one in fleet.instances])
        return dataclasses.replace(run, fleet=fleet, policy=str(rng.choice(["pack-off", "mpc"])))
    if kind == "roles":
        fleet = FleetSpec.parse("2P2D", run.fleet.instances[0].profile).flexible()
        return dataclasses.replace(run, fleet=fleet, policy="roles")
    if kind == "deferred":
        policy = str(rng.choice(["gate", "mpc", "pack", "static-max"]))
        return dataclasses.replace(run, policy=policy, defer=(float(rng.uniform(0.1, 0.7)), 60.0))
    if traces is not None:
        trace = traces[int(rng.integers(len(traces)))].rescaled(float(rng.uniform(1.0, 8.0)))
        return dataclasses.replace(run, workload=trace.window(110.0, start_s=10.0 * (seed % 30)))
    return run


def kept_and_ratio(run):
    figures = run.simulate()
    met = [figures["ttft_attainment"], figures["itl_attainment"]]
    if None in met or min(met) < run.slo.attainment:
        return None
    window = run.warmup_s, run.warmup_s + run.duration_s
    load, _ = run._requests()  # those that may wait are known once they are drawn
    return figures["mean_power_w"] / lower_bound_w(run.fleet, load, *window, run.slo)


def check(seeds, least_kept, scene=scene):
    ratios = {seed: kept_and_ratio(scene(seed)) for seed in seeds}
    kept = {seed: ratio for seed, ratio in ratios.items() if ratio is not None}
    below = {seed: ratio for seed, ratio in kept.items() if ratio < 1.0 - 1e-7}
    assert below == {}
    assert len(kept) >= least_kept


def test_no_run_that_keeps_its_promise_is_below():
    check(range(30), 12)


@pytest.mark.slow
def test_no_run_of_a_hundred_is_below():
    check(range(100, 200), 40)


def test_no_run_with_sleep_roles_or_deferral_is_below():
    check(range(12), 4, richer)


@pytest.mark.slow
def test_no_run_of_thirty_with_sleep_roles_deferral_or_traces_is_below(shared_data):
    path = shared_data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz"
    trace = read_trace(path)
    check(range(1000, 1030), 10, lambda seed: richer(seed, [trace]))


@pytest.mark.external
def test_no_run_of_three_hundred_is_below():
    """By hand, since it takes minutes: ``pytest -m external tests/sim/test_lower_bound.py``."""
    check(range(200, 500), 150)


@pytest.mark.external
def test_no_run_of_three_hundred_that_sleep_turn_or_wait_is_below(shared_data):
    path = shared_data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz"
    trace = read_trace(path)
    check(range(2000, 2300), 100, lambda seed: richer(seed, [trace]))


def test_what_is_due_inside_the_window_is_demanded():
    fleet = FleetSpec.parse("1P1D", load_profile(PROFILES[0]))
    one = Workload(
        name="two", arrival_s=[1.0, 9.0], prompt_tok=[100, 200], output_tok=[11, 101],
        duration_s=20.0,
    )  # fmt: skip
    demand = least_demand(fleet, one, 0.0, 10.0, SLO)
    assert (demand.prompts_req, demand.prompt_tok, demand.prefills) == (2.0, 300.0, 2.0)
    # The second is due at 15.6 s, and 5.6 s are enough for all that it wants.
    np.testing.assert_allclose(demand.decode_tok, [10.0, 0.0])
    assert demand.context_tok[0] == sum(100 + i for i in range(1, 11))
    np.testing.assert_allclose(demand.decode_s, [0.6, 1.0])
    assert demand.may_miss_req == 0


def test_prompts_share_an_iteration_only_within_their_promise():
    fleet = FleetSpec.parse("1P1D", load_profile(PROFILES[0]))
    arrival_s = np.array([0.0, 0.3, 0.6, 0.61, 5.0])
    five = Workload(
        name="five", arrival_s=arrival_s, prompt_tok=np.full(5, 9), output_tok=np.ones(5, int),
        duration_s=9.0,
    )  # fmt: skip
    assert least_demand(fleet, five, 0.0, 9.0, SLO).prefills == 3.0


def test_an_idle_window_costs_rest():
    profile = dataclasses.replace(load_profile(PROFILES[0]), parked_w=25.0)
    none = Workload(name="none", arrival_s=[], prompt_tok=[], output_tok=[], duration_s=10.0)
    fleet = FleetSpec.parse("2P2D", profile)
    assert lower_bound_w(fleet, none, 0.0, 10.0, SLO) == pytest.approx(4 * 25.0)


def test_a_load_that_nobody_can_carry_has_none():
    fleet = FleetSpec.parse("1P1D", load_profile(PROFILES[0]))
    flood = make_workload("sharegpt", rate_req_s=200.0, duration_s=40.0, seed=0)
    assert lower_bound_w(fleet, flood, 0.0, 30.0, SLO) == np.inf
