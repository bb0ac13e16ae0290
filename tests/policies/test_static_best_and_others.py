"""Opponents that are put together from a load, or that arrange the machines anew."""

import dataclasses

import numpy as np
import pytest

from voltana_ctrl import ConfigError, FleetSpec, FleetState, Observation, Slo, compare, load_profile
from voltana_ctrl.control import ThroughputController
from voltana_ctrl.control.baselines.ecofreq import DEFAULT_LADDER_MHZ
from voltana_ctrl.experiment import Run
from voltana_ctrl.experiment.run import TRIAL_SEEDS
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.policies.static_best import static_best
from voltana_ctrl.sim.faults import ClockClamp
from voltana_ctrl.types import Load

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def run(policy, fleet="2P2D", rate=40.0, **what):
    return Run(
        policy=policy, fleet=FleetSpec.parse(fleet, PROFILE), slo=SLO, workload="sharegpt",
        rate_req_s=rate, duration_s=60.0, **what,
    ).simulate()  # fmt: skip


def worst(figures):
    return min(figures["ttft_attainment"], figures["itl_attainment"])


@pytest.mark.parametrize(("fleet", "rate"), [("2P2D", 12.0), ("2P2D", 50.0), ("4C", 30.0)])
def test_static_best_is_no_dearer_than_any_setting_by_hand_that_keeps_the_promise(fleet, rate):
    best = run("static-best", fleet, rate)
    assert best["policy"] == "static-best"
    assert "MHz" in best["choice"]
    assert worst(best) > 0.97  # other requests than those that it was chosen by
    by_hand = [run(f"static-{mhz}", fleet, rate) for mhz in (600, 750, 900, 1005, 1200)]
    kept = [one["mean_power_w"] for one in by_hand if worst(one) >= 0.99]
    assert kept
    assert best["mean_power_w"] < 1.01 * min(kept)


def test_static_best_parks_and_rearranges_where_that_is_cheaper():
    lonely = run("static-best", "2P2D", 5.0)
    assert "1 decode" in lonely["choice"]  # of two
    assert run("static-best", "4C", 40.0)["choice"].count("at") == 2  # P/D beats four mixed ones


class CountedTrials:
    """A promise that is kept from some clock on, and power that rises with it."""

    def __init__(self, load, needed_mhz):
        self.load, self.needed_mhz, self.tried = load, needed_mhz, []

    def run(self, policy):
        parts = policy.build(None, None, None)
        clocks_mhz = parts.first.freq_mhz[parts.first.active]
        self.tried.append(parts.choice)
        met = 1.0 if clocks_mhz.min() >= self.needed_mhz else 0.5
        power_w = float(clocks_mhz.sum())
        return [{"ttft_attainment": met, "itl_attainment": met, "over_budget_frac": None,
                 "energy_per_token_j": power_w, "mean_power_w": power_w}]  # fmt: skip


@pytest.mark.parametrize("needed_mhz", [900.0, 1410.0, 9999.0])
def test_no_setting_is_tried_twice_and_at_most_twenty_are(needed_mhz):
    from voltana_ctrl.laws import length_moments

    load = Load(arrival_req_s=40.0, lengths=length_moments([100, 400], [50, 350]))
    trials = CountedTrials(load, needed_mhz)
    fleet = FleetSpec.parse("3P3D", PROFILE)
    parts = static_best(fleet, SLO, PolicySetup(trials=trials))
    assert 1 <= len(trials.tried) <= 20
    assert len(set(trials.tried)) == len(trials.tried)
    working_mhz = parts.first.freq_mhz[parts.first.active]
    if needed_mhz > 1410.0:  # nothing helps: everybody at the highest
        assert parts.first.active.all()
        assert np.all(working_mhz == 1410.0)
    else:
        assert needed_mhz <= working_mhz.min() <= needed_mhz + 60.0


def test_trials_are_runs_on_requests_that_are_not_judged():
    assert not set(TRIAL_SEEDS) & set(range(10_000))
    with pytest.raises(ConfigError, match="trial runs"):
        find_policy("static-best").build(FleetSpec.parse("1P1D", PROFILE), SLO, PolicySetup())
    with pytest.raises(ConfigError, match="closed loop"):
        compare(fleet="1P1D", concurrency=4, duration_s=5.0, policies=["static-best"])


def test_faults_strike_the_same_machine_in_another_role():
    clamped = ClockClamp(instance="decode-0", clamp_mhz=450.0, from_s=0.0)
    free, held = run("ecoserve"), run("ecoserve", faults=(clamped,))
    assert held["mean_power_w"] < free["mean_power_w"]
    assert held["mean_freq_decode_mhz"] < free["mean_freq_decode_mhz"]


def test_ecoserve_never_mixes_the_phases_and_serves_everybody():
    from voltana_ctrl.backends import SimBackend
    from voltana_ctrl.sim.settings import PlantSettings
    from voltana_ctrl.sim.workload import make_workload

    fleet = FleetSpec.parse("3C", PROFILE)
    parts = find_policy("ecoserve").build(fleet, SLO, PolicySetup())
    for alternates in (True, False):
        backend = SimBackend(
            fleet,
            workload=make_workload("sharegpt", 25.0, 30.0, seed=1),
            settings=PlantSettings(alternates=alternates, log_iterations=100_000),
            prefill_router=parts.prefill_router,
        )
        backend.plant.advance(90.0)
        iterations = backend.read().iterations
        mixed = (iterations.prefill_tok > 0) & (iterations.batch_req > 0)
        assert np.any(iterations.prefill_tok > 0)
        assert np.any(iterations.batch_req > 0)
        assert np.any(mixed) != alternates
        assert np.all(backend.plant.requests["done_s"] > 0.0)
    figures = run("ecoserve", "4C", 40.0)
    assert worst(figures) > 0.99
    assert figures["mean_freq_decode_mhz"] == pytest.approx(1410.0)


def test_throughput_thresholds_count_five_seconds_and_raise_only_who_is_busy():
    fleet = FleetSpec.parse("2P2D", PROFILE)
    controller = ThroughputController(fleet, SLO, ladder_mhz=DEFAULT_LADDER_MHZ)
    memory = controller.init()
    raised = []
    for tick in range(120):
        t_s = 0.1 * tick
        arrived = np.array([3000.0 if t_s < 3.0 else 0.0, 50.0, 0.0, 0.0])
        state = dataclasses.replace(FleetState.idle(4, t_s=t_s), arrived_tok=arrived)
        decision, memory = controller.decide(Observation(state=state), memory)
        assert np.all(decision.freq_mhz[1:] == 210.0)
        raised.append(decision.freq_mhz[0] == 1410.0)
    assert not raised[5]
    assert raised[29]
    assert not raised[-1]
    assert len(memory.ticks) <= 51


def test_with_its_thresholds_voltanallm_runs_faster_where_much_arrives():
    busy = {name: run(name, rate=95.0) for name in ("voltanallm", "voltanallm-thresholds")}
    calm = {name: run(name, rate=10.0) for name in ("voltanallm", "voltanallm-thresholds")}
    assert calm["voltanallm"]["mean_power_w"] == pytest.approx(
        calm["voltanallm-thresholds"]["mean_power_w"], rel=1e-3
    )
    assert (
        busy["voltanallm-thresholds"]["mean_freq_decode_mhz"]
        >= (busy["voltanallm"]["mean_freq_decode_mhz"])
    )
    assert busy["voltanallm-thresholds"]["mean_power_w"] > busy["voltanallm"]["mean_power_w"]
