"""The model-predictive layer: optimality, prices, budget; and the controller around it."""

import dataclasses
import itertools

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voltana_ctrl import ConfigError, Decision, FleetSpec, FleetState, Slo, Status, load_profile
from voltana_ctrl.control.cascade import CascadeController, MpcController
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.mpc import Planner
from voltana_ctrl.control.regime import Regime
from voltana_ctrl.control.target import Load, TargetOptimiser
from voltana_ctrl.physics import length_moments
from voltana_ctrl.routing.priced import PricedRouter
from voltana_ctrl.sim.engine import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_closed_loop, make_workload

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
FLEET = FleetSpec.parse("2P2D", PROFILE)
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])


def situation(fleet, rate, scale=1.0, freq_mhz=700.0, queue_tok=300.0):
    load = Load(arrival_req_s=rate, lengths=LENGTHS)
    target = TargetOptimiser(fleet, SLO).plan(load)
    n = len(fleet)
    running = np.zeros(n)
    flow = target.route_frac[fleet.decode] * rate
    running[fleet.decode] = scale * flow * (LENGTHS.output_tok - 1.0) * 0.058
    queue = np.zeros(n)
    queue[fleet.prefill] = queue_tok
    state = dataclasses.replace(
        FleetState.idle(n),
        running_req=running,
        kv_used_tok=running * LENGTHS.context_tok,
        queue_tok=queue,
        freq_mhz=np.where(target.active, freq_mhz, 210.0),
    )
    return state, load, target


PLANNER = Planner(FLEET, SLO)


@pytest.mark.parametrize("rate", [20.0, 50.0, 70.0])
def test_piqp_and_clarabel_agree(rate):
    pytest.importorskip("piqp")
    case = situation(FLEET, rate)
    ours = Planner(FLEET, SLO, solver="piqp").plan(*case)
    theirs = Planner(FLEET, SLO, solver="clarabel").plan(*case)
    assert ours.status is theirs.status is Status.OK
    assert ours.objective_j == pytest.approx(theirs.objective_j, rel=1e-4, abs=1e-2)
    assert ours.freq_mhz[2:] == pytest.approx(theirs.freq_mhz[2:], abs=1.0)
    assert ours.route_frac == pytest.approx(theirs.route_frac, abs=1e-3)
    assert ours.price_j_req == pytest.approx(theirs.price_j_req, abs=1e-2)


def test_solution_meets_the_optimality_conditions():
    """Feasibility, signs of the multipliers and complementary slackness (by Clarabel)."""
    pytest.importorskip("piqp")
    planner = Planner(FLEET, SLO, solver="piqp")
    planner.plan(*situation(FLEET, 50.0))
    data, _, _ = planner.problem.get_problem_data(cp.CLARABEL)
    planner._solve_cvxpy()
    for rule in planner.problem.constraints:
        violation = np.max(rule.violation())
        assert violation < 1e-3
        dual = np.asarray(rule.dual_value)
        if isinstance(rule, cp.constraints.Inequality):
            slack = np.asarray(rule.args[1].value - rule.args[0].value)
            assert np.all(dual >= -1e-4)
            assert np.max(np.abs(dual * slack)) < 0.05
    assert data["A"].shape[0] > 0


def test_prices_are_the_slope_of_the_cost():
    pytest.importorskip("piqp")
    planner = Planner(FLEET, SLO, horizon=1, solver="piqp")
    case = situation(FLEET, 50.0)
    planner.plan(*case)
    key = planner._d["c_n"].id
    exact = planner._solve_piqp()[3][0]
    base = planner.values[key]
    for j in range(2):
        costs = []
        for step in (0.01, -0.01):
            planner.values[key] = base + step * np.eye(2)[j]
            costs.append(planner._solve_piqp()[1])
        planner.values[key] = base
        assert -exact[j] == pytest.approx((costs[0] - costs[1]) / 0.02, rel=0.02, abs=1e-3)


def test_not_worse_than_a_grid_search():
    """Two decode instances, two steps: no clocks and shares on a grid do better."""
    planner = Planner(FLEET, SLO, horizon=2)
    planner.plan(*situation(FLEET, 50.0, freq_mhz=900.0))
    best = planner._solve_cvxpy()[1]
    extra = []
    grid_f, grid_lam = (0.5, 0.75, 1.0, 1.3), (0.3, 0.5, 0.7)
    arrivals = planner.values[planner._arrivals.id][1]
    found = np.inf
    f, lam = planner._f, planner._lam
    pick_f, pick_lam = cp.Parameter(f.shape), cp.Parameter(lam.shape)
    fixed = cp.Problem(
        planner.problem.objective,
        [*planner.problem.constraints, f == pick_f, lam == pick_lam, *extra],
    )
    for a, b, share in itertools.product(grid_f, grid_f, grid_lam):
        pick_f.value = np.array([[a, b], [a, b]])
        pick_lam.value = arrivals * np.array([[share, 1 - share]] * 2)
        fixed.solve(solver=cp.CLARABEL)
        if fixed.status == cp.OPTIMAL:
            found = min(found, fixed.value)
    assert np.isfinite(found)
    assert best <= found + 1e-3


def test_parameters_alone_change_between_ticks():
    """A tick that follows others gives what a fresh problem gives."""
    used = Planner(FLEET, SLO)
    for rate in (20.0, 70.0):
        used.plan(*situation(FLEET, rate))
    case = situation(FLEET, 50.0)
    assert used.plan(*case).freq_mhz == pytest.approx(Planner(FLEET, SLO).plan(*case).freq_mhz,
                                                      abs=0.5)  # fmt: skip


@given(rate=st.floats(45.0, 80.0), scale=st.floats(0.3, 1.2))
@settings(max_examples=15)
def test_equal_instances_may_change_places(rate, scale):
    state, load, target = situation(FLEET, rate, scale)
    swap = [0, 1, 3, 2]

    def swapped(value, names):
        return dataclasses.replace(value, **{n: getattr(value, n)[swap] for n in names})

    one = PLANNER.plan(state, load, target)
    other = PLANNER.plan(
        swapped(state, ("running_req", "kv_used_tok", "queue_tok", "freq_mhz")),
        load,
        swapped(target, ("active", "route_frac", "floor_mhz", "power_w", "price_j_req")),
    )
    assert one.status is other.status is Status.OK
    assert one.freq_mhz[swap] == pytest.approx(other.freq_mhz, abs=2.0)
    assert one.route_frac[swap] == pytest.approx(other.route_frac, abs=5e-3)


def test_parked_instances_get_no_work():
    case = situation(FLEET, 20.0)
    assert not case[2].active.all()
    plan = PLANNER.plan(*case)
    assert np.all(plan.route_frac[~case[2].active] == 0.0)
    assert plan.route_frac[FLEET.decode].sum() == pytest.approx(1.0)


def test_a_budget_is_hard_and_an_impossible_one_is_said_to_be():
    case = situation(FLEET, 65.0, freq_mhz=900.0)
    free, held = PLANNER.plan(*case), PLANNER.plan(*case, budget_w=800.0)
    assert held.status is Status.OK
    assert held.objective_j > free.objective_j
    assert PLANNER.plan(*case, budget_w=200.0).status is Status.INFEASIBLE


def test_running_out_of_iterations_is_no_plan():
    pytest.importorskip("piqp")
    plan = Planner(FLEET, SLO, max_iterations=2, solver="piqp").plan(*situation(FLEET, 50.0))
    assert plan.status is Status.DEADLINE


def test_large_fleets_are_planned_by_groups():
    fleet = FleetSpec.parse("64P64D", PROFILE)
    planner = Planner(fleet, SLO)
    plan = planner.plan(*situation(fleet, 2000.0))
    assert plan.status is Status.OK
    for members in (fleet.prefill, fleet.decode):
        assert plan.route_frac[members].sum() == pytest.approx(1.0)
    assert sum(variable.size for variable in planner.problem.variables()) < 1000


def test_colocated_fleets_are_refused():
    with pytest.raises(ConfigError, match="colocated"):
        Planner(FleetSpec.parse("2C", PROFILE), SLO)


# The controller on the plant


def drive(controller, load, until_s, fleet=FLEET, budget=None):
    """Run the loop; returns the plant, decisions and power every tick."""
    plant = Plant(
        fleet,
        load,
        PlantSettings(view_age_s=0.02),
        governors=[IterationGovernor(one, SLO) for one in fleet.instances],
        prefill_router=PricedRouter(fleet, SLO, "prefill"),
        decode_router=PricedRouter(fleet, SLO),
    )
    memory, seen = controller.init(), []
    for k in range(round(until_s * 10)):
        plant.advance(0.1 * k)
        observation = plant.read()
        if budget is not None:
            controller.power_budget_w = budget(0.1 * k)
        decision, memory = controller.decide(observation, memory)
        if decision.status is Status.OK:
            plant.apply(decision)
        seen.append((0.1 * k, decision, float(observation.state.power_w.sum())))
    return plant, memory, seen


def test_consolidates_at_low_load_and_keeps_the_promises():
    load = make_workload("sharegpt", rate_req_s=10.0, duration_s=40.0, seed=0)
    plant, _, seen = drive(MpcController(FLEET, SLO), load, 40.0)
    late = [decision for t_s, decision, _ in seen if t_s > 25.0]
    assert np.mean([decision.active[2:].sum() for decision in late]) < 1.2
    rows = plant.requests[plant.requests["state"] == 7]
    assert np.mean(rows["first_s"] - rows["arrival_s"] <= 0.6) > 0.99


def test_power_stays_under_a_budget_that_is_cut():
    load = make_workload("sharegpt", rate_req_s=35.0, duration_s=40.0, seed=0)

    def budget(t_s):
        return 900.0 if t_s < 20.0 else 500.0

    _, _, seen = drive(CascadeController(FLEET, SLO), load, 40.0, budget=budget)
    after = [power for t_s, _, power in seen if t_s > 21.0]
    assert np.mean(np.array(after) <= 500.0) >= 0.999
    assert np.max([power for t_s, _, power in seen if 10.0 < t_s < 20.0]) > 500.0


def test_budget_below_idle_is_reported():
    controller = MpcController(FLEET, SLO, power_budget_w=100.0)
    load = make_workload("sharegpt", rate_req_s=10.0, duration_s=5.0, seed=0)
    _, _, seen = drive(controller, load, 3.0)
    assert seen[-1][1].status is Status.INFEASIBLE


def test_regimes_are_told_apart():
    open_load = make_workload("sharegpt", rate_req_s=20.0, duration_s=20.0, seed=0)
    controller = CascadeController(FLEET, SLO)
    _, memory, _ = drive(controller, open_load, 20.0)
    assert controller.regime(memory) is Regime.OPEN
    closed = make_closed_loop("sharegpt", concurrency=60, requests=3000, seed=0)
    _, memory, seen = drive(controller, closed, 25.0)
    assert controller.regime(memory) is Regime.CLOSED
    assert seen[-1][1].freq_mhz[seen[-1][1].active].min() > 800.0
    small = FleetSpec(tuple(dataclasses.replace(one, max_batch=16) for one in FLEET.instances))
    controller = CascadeController(small, SLO)
    _, memory, _ = drive(controller, open_load, 20.0, fleet=small)
    assert controller.regime(memory) is Regime.CAPPED


@pytest.mark.slow
@given(queue=st.integers(0, 400), rate=st.floats(10.0, 75.0), seed=st.integers(0, 5))
@settings(max_examples=10)
def test_queues_end_bounded_from_any_backlog(queue, rate, seed):
    """Closed-loop stability: constant load below capacity, whatever there was before."""
    load = make_workload("sharegpt", rate_req_s=rate, duration_s=150.0, seed=seed)
    arrival_s = load.arrival_s.copy()
    arrival_s[: min(queue, len(arrival_s))] = 0.0
    plant, _, _ = drive(
        CascadeController(FLEET, SLO), dataclasses.replace(load, arrival_s=arrival_s), 150.0
    )
    state = plant.state()
    assert state.queue_tok.sum() < 0.6 * 4 * 14_000
    assert state.running_req.sum() < 2.0 * 0.06 * 203 * rate + 50


def test_decisions_do_not_depend_on_another_controller():
    load = make_workload("sharegpt", rate_req_s=20.0, duration_s=10.0, seed=0)
    first = drive(MpcController(FLEET, SLO), load, 5.0)[2]
    second = drive(MpcController(FLEET, SLO), load, 5.0)[2]
    for (_, one, _), (_, other, _) in zip(first, second, strict=True):
        assert isinstance(one, Decision)
        assert np.array_equal(one.route_frac, other.route_frac)
        assert np.array_equal(one.freq_mhz, other.freq_mhz)
