"""Target layer: naive twins, brute force, a mixed-integer program, invariances, the plant."""

import dataclasses

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive_control
from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl._kernels import target as kernels
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.target import Load, TargetOptimiser
from voltana_ctrl.physics import length_moments

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
FLEET = FleetSpec.parse("2P2D", PROFILE)


def sharegpt():
    from voltana_ctrl.sim.workload import make_workload

    load = make_workload("sharegpt", rate_req_s=50.0, duration_s=400.0, seed=1)
    return length_moments(load.prompt_tok, load.output_tok)


LENGTHS = sharegpt()
OPTIMISER = TargetOptimiser(FLEET, SLO)


@pytest.mark.parametrize("arrival", [0.5, 10.0, 30.0, 45.0])
@pytest.mark.parametrize("floor_k", [0, 40, 80])
def test_station_against_the_naive_sum(arrival, floor_k):
    step_s, power_w, needed, prompt_s, prompt_w = OPTIMISER.station(FLEET.instances[2], LENGTHS)
    ours = kernels.station(
        step_s, power_w, needed, prompt_s, prompt_w, arrival, LENGTHS.output_tok - 1.0, 800,
        0.0597, floor_k, 60.0,
    )  # fmt: skip
    theirs = naive_control.station(
        step_s, power_w, needed, arrival, LENGTHS.output_tok - 1.0, 800, 0.0597, floor_k, 60.0
    )
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6, abs=1e-11)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-9)


@given(
    left=st.lists(st.floats(0.0, 100.0), min_size=9, max_size=9),
    right=st.lists(st.floats(0.0, 100.0), min_size=9, max_size=9),
)
def test_min_plus_against_the_double_loop(left, right):
    left, right = np.sort(left), np.sort(right)
    out, a, b = np.empty(9), np.empty(9, np.int64), np.empty(9, np.int64)
    kernels.min_plus(left, 1.0, right, 1.0, 1.0, out, a, b)
    # The kernel may take more than asked for; with costs that do not fall it never pays.
    assert out == pytest.approx(naive_control.min_plus(left, right))
    assert left[a] + right[b] == pytest.approx(out)


@pytest.mark.parametrize("rate", [10.0, 35.0, 42.0, 50.0, 65.0, 80.0])
def test_decode_split_against_brute_force(rate):
    decode = FLEET.instances[2]

    def curve(load):
        return float(OPTIMISER.curve(decode, np.array([load]), LENGTHS).power_w[0])

    best = naive_control.best_split(curve, 60.0, rate, 200)
    planned = OPTIMISER.plan(Load(arrival_req_s=rate, lengths=LENGTHS)).power_w[2:].sum()
    assert planned <= best * 1.01


@pytest.mark.parametrize("rate", [20.0, 60.0])
def test_against_a_mixed_integer_program(rate):
    fleet = FleetSpec.parse("1P3D", PROFILE)
    optimiser = TargetOptimiser(fleet, SLO)
    loads = rate * np.arange(1, 61) / 60
    power = optimiser.curve(fleet.instances[1], loads, LENGTHS).power_w
    able = np.isfinite(power)
    loads, power = np.append(loads[able], 0.0), np.append(power[able], 60.0)
    pick = cp.Variable((3, len(loads)), boolean=True)
    problem = cp.Problem(
        cp.Minimize(cp.sum(pick @ power)),
        [cp.sum(pick, axis=1) == 1, cp.sum(pick @ loads) >= rate * (1 - 1e-9)],
    )
    problem.solve(solver=cp.HIGHS)
    planned = optimiser.plan(Load(arrival_req_s=rate, lengths=LENGTHS))
    assert planned.power_w[1:].sum() == pytest.approx(problem.value, rel=0.01)


@given(rate=st.floats(0.0, 120.0))
@settings(max_examples=25)
def test_shares_are_shares_and_parked_get_none(rate):
    target = OPTIMISER.plan(Load(arrival_req_s=rate, lengths=LENGTHS))
    for members in (FLEET.prefill, FLEET.decode):
        assert target.route_frac[members].sum() == pytest.approx(1.0)
        assert target.active[members].any()
    assert np.all(target.route_frac[~target.active] == 0.0)
    assert np.all(np.isfinite(target.price_j_req))


def test_more_load_never_costs_less():
    powers = [
        OPTIMISER.plan(Load(arrival_req_s=rate, lengths=LENGTHS)).power_w.sum()
        for rate in np.arange(5.0, 85.0, 5.0)
    ]
    assert np.all(np.diff(powers) > 0.0)


def test_equal_instances_may_change_places():
    mixed = FleetSpec(
        (
            *FLEET.instances[:2],
            dataclasses.replace(FLEET.instances[2], kv_capacity_tok=60_000),
            FLEET.instances[3],
        )
    )
    swapped = FleetSpec((*mixed.instances[:2], mixed.instances[3], mixed.instances[2]))
    load = Load(arrival_req_s=30.0, lengths=LENGTHS)
    one = TargetOptimiser(mixed, SLO).plan(load)
    other = TargetOptimiser(swapped, SLO).plan(load)
    assert one.route_frac[[0, 1, 3, 2]] == pytest.approx(other.route_frac, abs=0.01)


def test_active_set_is_kept_unless_a_change_pays():
    load = Load(arrival_req_s=10.0, lengths=LENGTHS)
    everybody = np.ones(4, bool)
    held = TargetOptimiser(FLEET, SLO, wake_j=1e6).plan(load, active=everybody)
    assert held.active.all()
    moved = TargetOptimiser(FLEET, SLO, wake_j=0.0).plan(load, active=everybody)
    assert moved.active.sum() < 4


def test_the_dead_are_not_planned_with():
    usable = np.array([True, True, False, True])
    target = OPTIMISER.plan(Load(arrival_req_s=10.0, lengths=LENGTHS), usable=usable)
    assert not target.active[2]
    assert target.route_frac[3] == pytest.approx(1.0)


def test_beyond_capacity_everybody_helps():
    target = OPTIMISER.plan(Load(arrival_req_s=200.0, lengths=LENGTHS))
    assert not target.feasible
    assert target.active.all()
    assert target.floor_mhz[2:].min() > 1000.0


def test_predicted_power_and_batch_on_the_plant():
    """The governed station is what the plant does."""
    from voltana_ctrl.sim.engine import Plant, PlantSettings
    from voltana_ctrl.sim.workload import make_workload

    fleet = FleetSpec.parse("1P1D", PROFILE)
    load = make_workload("sharegpt", rate_req_s=25.0, duration_s=1300.0, seed=2)
    lengths = length_moments(load.prompt_tok, load.output_tok)
    target = TargetOptimiser(fleet, SLO).plan(Load(arrival_req_s=25.0, lengths=lengths))
    plant = Plant(fleet, load, PlantSettings(),
                  governors=[IterationGovernor(one, SLO) for one in fleet.instances])  # fmt: skip
    plant.apply(Decision.highest(fleet, floor_mhz=target.floor_mhz))
    plant.advance(100.0)
    start = plant.state().energy_j
    plant.advance(1300.0)
    mean_w = (plant.state().energy_j - start) / 1200.0
    assert mean_w[1] == pytest.approx(target.power_w[1], rel=0.02)
    assert mean_w[0] == pytest.approx(target.power_w[0], rel=0.06)


@given(rate=st.floats(1.0, 40.0))
@settings(max_examples=20)
def test_without_a_governor_the_clock_holds_the_tail(rate):
    """A static clock must be enough for the quantile, so it lies above the governed floor."""
    static = TargetOptimiser(FLEET, SLO, governed=False)
    one = FLEET.instances[2]
    loads = np.array([rate])
    slow = OPTIMISER.curve(one, loads, LENGTHS)
    fast = static.curve(one, loads, LENGTHS)
    assert fast.floor_row[0] >= slow.floor_row[0]
    if np.isfinite(fast.power_w[0]):
        assert fast.miss_frac[0] <= 0.01
