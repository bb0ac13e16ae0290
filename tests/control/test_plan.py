"""The model-predictive layer: optimality, prices, budget; and the controller around it."""

import dataclasses

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import naive_control
from voltana_ctrl import ConfigError, Decision, FleetSpec, FleetState, Slo, Status, load_profile
from voltana_ctrl.control.cascade import CascadeController, MpcController
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.plan import Planner
from voltana_ctrl.control.slots import Slots
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.estimate.regime import Regime
from voltana_ctrl.laws import decode_equilibrium, length_moments
from voltana_ctrl.routing.priced import PricedRouter
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_closed_loop, make_workload
from voltana_ctrl.types import Load

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


@pytest.mark.parametrize(("rate", "budget_w"), [(20.0, np.inf), (50.0, np.inf), (65.0, 800.0)])
def test_solution_meets_the_optimality_conditions(rate, budget_w):
    """Karush-Kuhn-Tucker, on matrices that CVXPY builds anew at these parameters."""
    pytest.importorskip("piqp")
    planner = Planner(FLEET, SLO, solver="piqp")
    planner.plan(*situation(FLEET, 35.0))  # so that the matrices were updated in place
    assert planner.plan(*situation(FLEET, rate), budget_w=budget_w).status is Status.OK
    for parameter in planner.problem.parameters():
        parameter.value = planner.values[parameter.id]
    data, _, _ = planner.problem.get_problem_data(cp.PIQP)
    found = planner._compiled._solver.result
    x, up, down = found.x, found.z_u - found.z_l, found.z_bu - found.z_bl
    stationary = data["P"] @ x + data["q"] + data["A"].T @ found.y + data["F"].T @ up + down
    assert np.max(np.abs(stationary)) < 1e-7 * np.max(np.abs(found.y))
    assert np.max(np.abs(data["A"] @ x - data["b"])) < 1e-6
    slack = data["G"] - data["F"] @ x
    assert slack.min() > -1e-6
    assert np.all(x >= data["lower_bounds"] - 1e-6)
    assert np.all(x <= data["upper_bounds"] + 1e-6)
    for multiplier in (found.z_u, found.z_bl, found.z_bu):
        assert multiplier.min() >= 0.0
    assert np.max(np.abs(found.z_u * slack)) < 1e-5
    for multiplier, bound in (
        (found.z_bl, data["lower_bounds"]),
        (found.z_bu, data["upper_bounds"]),
    ):
        there = np.isfinite(bound)
        assert np.max(np.abs(multiplier[there] * (x - bound)[there])) < 1e-5
        assert np.all(multiplier[~there] == 0.0)


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


@pytest.mark.parametrize(("rate", "freq_mhz", "queue_tok"),
                         [(35.0, 900.0, 300.0), (30.0, 500.0, 4000.0)])  # fmt: skip
def test_against_brute_force(rate, freq_mhz, queue_tok):
    """Two decode instances, two steps: grids over all controls, in the problem written out."""
    fleet = FleetSpec.parse("1P2D", PROFILE)
    planner = Planner(fleet, SLO, horizon=2)
    case = situation(fleet, rate, 1.3, freq_mhz, queue_tok)
    state, load, target = case
    case = (state, load, dataclasses.replace(target, active=np.ones(3, bool)))
    plan = planner.plan(*case)
    assert plan.status is Status.OK
    prompts, requests = planner.values[planner._arrivals.id]
    controls = [getattr(planner, f"_{name}").value for name in ("f", "lam", "cap", "mu", "rate")]
    assert naive_control.plan_cost(planner, *(each[None] for each in controls)) == pytest.approx(
        plan.objective_j, rel=1e-5
    )
    sent = np.full((1, 2, 1), prompts)

    def decode(grid, cap, mu):
        f, first = grid[:, :4].reshape(-1, 2, 2), grid[:, 4:, None] * requests
        lam = np.concatenate([first, requests - first], axis=2)
        many = [np.broadcast_to(each, (len(grid), 2, 1)) for each in (cap, mu, sent)]
        return naive_control.plan_cost(planner, f, lam, *many)

    low, high = (float(each[0]) for each in planner._slots[1].clock_ghz)
    slow, fast = (float(each[0]) for each in (planner._slots[0].rate_min,
                                              planner._slots[0].rate_max))  # fmt: skip
    cap0 = float(planner.values[planner._p["cap0"].id][0])
    easy = np.full((1, 2, 1), fast), np.full((1, 2, 1), min(prompts, cap0))
    _, best = naive_control.zoomed_search(
        lambda grid: decode(grid, *easy), [low] * 4 + [0.0] * 2, [high] * 4 + [1.0] * 2, 5, 32
    )

    def prefill(grid):
        f = np.broadcast_to(best[:4].reshape(1, 2, 2), (len(grid), 2, 2))
        lam = requests * np.stack([best[4:], 1.0 - best[4:]], axis=1)[None]
        cap, mu = grid[:, :2, None], grid[:, 2:, None]
        return naive_control.plan_cost(planner, f, np.broadcast_to(lam, (len(grid), 2, 2)), cap,
                                       mu, np.broadcast_to(sent, (len(grid), 2, 1)))  # fmt: skip

    found, _ = naive_control.zoomed_search(prefill, [slow] * 2 + [0.0] * 2, [fast] * 4, 9, 32)
    # Nothing that was tried is better; the best of it is as good but for the grid.
    assert -1e-4 < (found - plan.objective_j) / abs(found) < 3e-4
    assert controls[0].ravel() == pytest.approx(best[:4], abs=0.05)


def test_parameters_alone_change_between_ticks():
    """A tick that follows others gives what a fresh problem gives."""
    used = Planner(FLEET, SLO)
    for rate in (20.0, 70.0):
        used.plan(*situation(FLEET, rate))
    case = situation(FLEET, 50.0)
    assert used.plan(*case).freq_mhz == pytest.approx(Planner(FLEET, SLO).plan(*case).freq_mhz,
                                                      abs=0.5)  # fmt: skip


@pytest.mark.parametrize("rate", [15.0, 30.0])
def test_stays_where_the_closed_form_says(rate):
    """At the equilibrium of its clock, the plan's model does not move."""
    fleet = FleetSpec.parse("1P1D", PROFILE)
    planner = Planner(fleet, SLO)
    row = PROFILE.table[30]
    at = decode_equilibrium(row, rate, LENGTHS.output_tok, LENGTHS.context_tok)
    state, load, target = situation(fleet, rate)
    state = dataclasses.replace(
        state,
        running_req=np.array([0.0, at.running_req]),
        kv_used_tok=np.array([0.0, at.kv_tok]),
        freq_mhz=np.full(2, row["clock_mhz"]),
    )
    planner.set_parameters(state, load, target)
    d = {name: planner.values[each.id] for name, each in planner._d.items()}
    n, m, f = d["n0"], d["m0"], d["f0"]
    after_n = d["a_nn"] * n + d["a_nm"] * m + d["b_n"] * f + d["e_n"] * rate + d["c_n"]
    after_m = d["a_mn"] * n + d["a_mm"] * m + d["b_m"] * f + d["e_m"] * rate + d["c_m"]
    assert after_n == pytest.approx(n, rel=1e-6)
    assert after_m == pytest.approx(m, rel=1e-6)


def unequal():
    plain = FleetSpec.parse("2P3D", PROFILE).instances
    coarse = dataclasses.replace(plain[3], clocks_mhz=PROFILE.clocks_mhz[::9])
    return FleetSpec((*plain[:3], coarse, plain[4]))


UNEQUAL = Planner(unequal(), SLO, horizon=3)
TWICE = Planner(FleetSpec.parse("4P4D", PROFILE), SLO)


@given(order=st.permutations(range(5)), rate=st.floats(30.0, 100.0), scale=st.floats(0.3, 1.2))
@settings(max_examples=5)
def test_any_order_of_the_instances(order, rate, scale):
    """Unequal ladders among them."""
    fleet = UNEQUAL.fleet
    state, load, target = situation(fleet, rate, scale)
    state = dataclasses.replace(state, freq_mhz=np.array([300.0, 700.0, 500.0, 520.0, 900.0]))
    target = dataclasses.replace(target, active=np.ones(5, bool))

    def shuffled(value, names):
        return dataclasses.replace(value, **{n: getattr(value, n)[list(order)] for n in names})

    one = UNEQUAL.plan(state, load, target)
    other = Planner(FleetSpec(tuple(fleet.instances[i] for i in order)), SLO, horizon=3).plan(
        shuffled(state, ("running_req", "kv_used_tok", "queue_tok", "freq_mhz")),
        load,
        shuffled(target, ("active", "route_frac", "floor_mhz", "power_w", "price_j_req")),
    )
    assert one.status is other.status is Status.OK
    assert other.objective_j == pytest.approx(one.objective_j, rel=1e-5, abs=1e-3)
    assert other.freq_mhz == pytest.approx(one.freq_mhz[list(order)], abs=16.0)
    assert other.route_frac == pytest.approx(one.route_frac[list(order)], abs=5e-3)


@given(rate=st.floats(20.0, 80.0), scale=st.floats(0.3, 1.2))
@settings(max_examples=10)
def test_twice_the_fleet_and_the_load(rate, scale):
    """Costs twice as much, at the same clocks."""
    state, load, target = situation(FLEET, rate, scale)
    repeat = np.repeat(np.arange(4), 2)

    def repeated(value, names):
        return dataclasses.replace(value, **{n: getattr(value, n)[repeat] for n in names})

    target = dataclasses.replace(target, active=np.ones(4, bool))
    one = PLANNER.plan(state, load, target)
    names = [field.name for field in dataclasses.fields(state) if field.name != "t_s"]
    many = repeated(target, ("active", "route_frac", "floor_mhz", "power_w", "price_j_req"))
    other = TWICE.plan(
        repeated(state, names),
        dataclasses.replace(load, arrival_req_s=2.0 * rate),
        dataclasses.replace(many, route_frac=many.route_frac / 2.0),
    )
    assert one.status is other.status is Status.OK
    assert other.objective_j == pytest.approx(2.0 * one.objective_j, rel=1e-4, abs=0.05)
    assert other.freq_mhz == pytest.approx(one.freq_mhz[repeat], abs=16.0)


def test_each_ladder_is_its_own():
    """Instances of one profile with unequal ladders are linearised each on its own."""
    fine, coarse = FLEET.instances[2], dataclasses.replace(
        FLEET.instances[3], clocks_mhz=PROFILE.clocks_mhz[[0, 80]]
    )  # fmt: skip
    at = np.array([300.0, 705.0, 705.0])
    for ends in ((coarse, fine), (fine, coarse)):
        slots = Slots(FleetSpec((FLEET.instances[0], *ends)), np.array([1, 2]))
        rows, slopes = slots.rows(at[1:])
        for k, one in enumerate(ends):
            for name in ("decode_base_s", "decode_power_w"):
                expected = np.interp(705.0, one.clocks_mhz, one.table[name])
                assert rows[name][k] == pytest.approx(expected)
        wide = coarse.table["decode_base_s"]
        k = ends.index(coarse)
        assert slopes["decode_base_s"][k] == pytest.approx((wide[1] - wide[0]) / 1200.0)


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
@settings(max_examples=6)
def test_queues_end_bounded_from_any_backlog(queue, rate, seed):
    """Closed-loop stability: constant load below capacity, whatever there was before."""
    load = make_workload("sharegpt", rate_req_s=rate, duration_s=150.0, seed=seed)
    arrival_s = load.arrival_s.copy()
    arrival_s[: min(queue, len(arrival_s))] = 0.0
    plant, _, _ = drive(
        MpcController(FLEET, SLO), dataclasses.replace(load, arrival_s=arrival_s), 150.0
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
