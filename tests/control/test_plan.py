"""The plan: against brute force, the optimality conditions, and what it may never do."""

import dataclasses
import itertools

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from voltana_ctrl import ConfigError, FleetSpec, Slo, load_profile
from voltana_ctrl.control.plan import Planner
from voltana_ctrl.control.situation import STEPS_S, PlanStatus, Situation
from voltana_ctrl.control.supply import supply_of
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.laws import length_moments

DT_S = np.array(STEPS_S)
BEGIN_S = np.cumsum(DT_S) - DT_S
MIDDLE_S = BEGIN_S + 0.5 * DT_S
K = len(DT_S)
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])
SUPPLIES = TargetOptimiser(
    FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b")), Slo(ttft_s=0.6, itl_s=0.06)
).supplies(LENGTHS)


def planner(groups=2, wake_s=10.0, **settings):
    return Planner(
        list(range(groups)) if groups == 2 else [0] * groups,
        wake_s=[wake_s] * groups, wake_j=[200.0] * groups, idle_w=[60.0] * groups,
        parked_w=[20.0] * groups, **settings,
    )  # fmt: skip


PLANNER = planner()


def situation(rate=20.0, installed=(2.0, 2.0), awake=None, reserve=None, **what):
    arrival = np.broadcast_to(np.asarray(rate, dtype=np.float64), (K,))
    reserve = 1.2 * arrival if reserve is None else np.broadcast_to(reserve, (K,))
    told = {
        "supplies": SUPPLIES,
        "installed": np.array(installed),
        "awake": np.array(installed if awake is None else awake, dtype=np.float64),
        "draining": np.zeros(len(installed)),
        "waking_s": [np.zeros(0)] * len(installed),
        "backlog_req": 0.0,
        "decode_req_s": float(arrival[0]),
        "arrival_req_s": arrival,
        "reserve_req_s": np.stack([reserve, reserve]),
        "residence_s": 12.0,
        "budget_w": np.full(K, np.inf),
    }
    return Situation(**(told | what))


def test_few_are_kept_for_little_and_many_for_much():
    little, much = PLANNER.plan(situation(10.0)), PLANNER.plan(situation(70.0))
    assert little.status is much.status is PlanStatus.OK
    assert little.wanted(0.0).tolist() == [1.0, 1.0]
    assert much.wanted(0.0).tolist() == [2.0, 2.0]
    assert little.power_w[-1] < much.power_w[-1]


def test_what_takes_ten_seconds_to_wake_is_woken_ten_seconds_before():
    """A rise that is expected from 15 s on: neither at once nor too late."""
    rising = np.where(BEGIN_S >= 15.0, 70.0, 10.0)
    plan = PLANNER.plan(situation(rising, awake=(1.0, 1.0), reserve=rising, decode_req_s=10.0))
    on = plan.on[0]
    first = float(BEGIN_S[np.argmax(on > 1.01)])
    assert on[0] == pytest.approx(1.0)
    assert first == 4.0  # the last step that begins ten seconds before
    # Decode follows with its residence time, and is woken later.
    assert np.argmax(plan.on[1] > 1.01) >= np.argmax(on > 1.01)


def test_a_start_that_is_needed_now_is_made_now():
    plan = PLANNER.plan(situation(70.0, awake=(1.0, 1.0), decode_req_s=20.0))
    assert plan.wanted(0.0).tolist() == [2.0, 2.0]


def test_nobody_sleeps_for_longer_than_it_pays():
    """A lull as short as waking takes parks nobody; one of a minute and a half parks one."""
    for lull_s, stays in ((10.0, True), (90.0, False)):
        rate = np.where(lull_s > BEGIN_S, 10.0, 70.0)
        plan = PLANNER.plan(situation(rate, reserve=rate, decode_req_s=10.0))
        assert bool(plan.wanted(0.0)[0] == 2.0) is stays


def test_draining_ones_come_back_for_nothing():
    plan = PLANNER.plan(
        situation(70.0, awake=(1.0, 1.0), draining=np.array([1.0, 1.0]), reserve=70.0)
    )
    woken = PLANNER.plan(situation(70.0, awake=(1.0, 1.0), reserve=70.0))
    assert plan.wanted(0.0).tolist() == [2.0, 2.0]
    assert plan.objective_j < woken.objective_j


def test_who_wakes_already_is_counted_on():
    rate = np.where(BEGIN_S >= 4.0, 60.0, 20.0)
    plan = PLANNER.plan(
        situation(rate, awake=(1.0, 2.0), waking_s=[np.array([3.0]), np.zeros(0)], reserve=rate)
    )
    assert plan.objective_j == pytest.approx(plan.bound_j, rel=0.05)
    assert plan.wanted(0.0)[0] == 2.0


# Optimality


def brute_force_j(s, wake_s, wake_j=200.0, idle_w=60.0, parked_w=20.0):
    """Every path of one or two instances of one group over all steps, written out."""
    supply = s.supplies[0]
    best = np.inf
    for path in itertools.product((1.0, 2.0), repeat=K):
        on = np.array((2.0, *path))
        start, stop = np.maximum(np.diff(on), 0.0), np.maximum(-np.diff(on), 0.0)
        # Of the steps that are whole, nothing is rounded: here all but the last.
        serves = BEGIN_S[None, :] >= BEGIN_S[:, None] + wake_s
        serves[-1] = BEGIN_S[-1] + wake_s <= MIDDLE_S
        matured = start @ serves
        awake = 2.0 + matured - np.cumsum(stop)
        waking = np.cumsum(start) - matured
        if awake.min() < 0.0:
            continue
        drain = np.zeros(K)
        for k in range(K):
            kept = np.exp(-DT_S[k - 1] / supply.drain_s) * drain[k - 1] if k else 0.0
            drain[k] = kept + stop[k]
        load = s.arrival_req_s
        if np.any(load > supply.most_req_s * awake + 1e-9):
            continue
        power = np.max(supply.alpha_j_req[:, None] * load + supply.beta_w[:, None] * awake, axis=0)
        drawn = (
            power + parked_w * (2.0 - awake) + (idle_w - parked_w) * waking
            + (supply.drain_w - parked_w) * drain
        )  # fmt: skip
        short = np.maximum(s.reserve_req_s[0] - supply.most_req_s * awake, 0.0)
        within = (idle_w - parked_w) * wake_s * np.diag(serves)
        cost = DT_S @ drawn + (wake_j + within) @ start + 2000.0 * DT_S @ short
        best = min(best, float(cost))
    return best


@pytest.mark.parametrize("wake_s", [4.0, 10.0, 30.0])
@pytest.mark.parametrize("shape", ["low", "lull", "rise", "wave"])
def test_against_brute_force(wake_s, shape):
    rate = {
        "low": np.full(K, 12.0),
        "lull": np.where((BEGIN_S >= 4.0) & (BEGIN_S < 60.0), 5.0, 32.0),
        "rise": 10.0 + 0.25 * BEGIN_S,
        "wave": 20.0 + 15.0 * np.cos(2.0 * np.pi * BEGIN_S / 60.0),
    }[shape]
    one = planner(1, wake_s, whole_steps=K)
    s = dataclasses.replace(
        situation(rate, installed=(2.0,), supplies=SUPPLIES[1:]), reserve_req_s=1.3 * rate[None]
    )
    plan = one.plan(s)
    assert plan.status is PlanStatus.OK
    best_j = brute_force_j(s, wake_s)
    # The last step alone is not whole.
    assert plan.bound_j <= plan.objective_j * (1.0 + 1e-9)
    assert plan.objective_j <= 1.01 * best_j
    assert plan.objective_j >= 0.99 * best_j


@pytest.mark.parametrize("rate", [12.0, 40.0, 65.0])
@pytest.mark.parametrize("budget_w", [np.inf, 700.0])
def test_the_relaxation_meets_the_optimality_conditions(rate, budget_w):
    """Karush, Kuhn and Tucker on the matrices that CVXPY hands to the solver."""
    made = planner()
    made.plan(situation(35.0))  # so that parameters were changed in place
    plan = made.plan(situation(rate, budget_w=np.full(K, budget_w)))
    data, _, _ = made.relaxed.get_problem_data(cp.SCIPY)
    c, bounds = np.asarray(data["c"]), _bounds(data, len(data["c"]))
    found = linprog(c, A_eq=data["A"], b_eq=data["b"], A_ub=data["G"], b_ub=data["h"],
                    bounds=bounds)  # fmt: skip
    if found.status == 2:
        assert plan.status is PlanStatus.INFEASIBLE
        return
    x, equal, below = found.x, -found.eqlin.marginals, -found.ineqlin.marginals
    scale = np.abs(c).max()
    slack = data["h"] - data["G"] @ x
    assert np.abs(data["A"] @ x - data["b"]).max() < 1e-6
    assert slack.min() > -1e-6
    assert below.min() > -1e-6 * scale
    assert np.abs(below * slack).max() < 1e-6 * scale
    reduced = c + data["A"].T @ equal + data["G"].T @ below
    inside = (x > bounds[:, 0] + 1e-7) & (x < bounds[:, 1] - 1e-7)
    assert np.abs(reduced[inside]).max() < 1e-6 * scale
    assert reduced[x <= bounds[:, 0] + 1e-7].min() > -1e-6 * scale
    # Nothing else would be as cheap, and the planner's own answer costs as much.
    assert plan.bound_j == pytest.approx(c @ x, rel=1e-6)


def _bounds(data, n):
    low, high = (
        np.full(n, free) if data.get(key) is None else np.asarray(data[key], dtype=np.float64)
        for key, free in (("lower_bounds", -np.inf), ("upper_bounds", np.inf))
    )
    return np.stack([low, high], axis=1)


def test_prices_are_the_slope_of_the_cost():
    s = situation(30.0)
    plan = PLANNER.plan(s)
    for k in (0, 5, 9):
        slopes = []
        for step in (-0.01, 0.01):
            other = s.arrival_req_s.copy()
            other[k] += step
            moved = PLANNER.plan(dataclasses.replace(s, arrival_req_s=other))
            slopes.append((moved.bound_j - plan.bound_j) / (step * DT_S[k]))
        # At a kink of the cost any slope between the two is a price.
        assert slopes[0] - 0.02 <= plan.request_j[k] <= slopes[1] + 0.02


def test_a_watt_has_a_price_where_the_budget_binds():
    s = situation(65.0)
    free = PLANNER.plan(s)
    assert free.watt_frac.max() == pytest.approx(0.0, abs=1e-6)
    tight = dataclasses.replace(s, budget_w=np.full(K, 0.9 * free.power_w.max()))
    bound = PLANNER.plan(tight)
    assert bound.watt_frac.max() > 0.0
    assert bound.objective_j > free.objective_j


# What stays the same


def test_equal_groups_may_change_places():
    two = Planner([0, 0, 1], wake_s=[10.0] * 3, wake_j=[0.0] * 3, idle_w=[60.0] * 3,
                  parked_w=[20.0, 30.0, 20.0])  # fmt: skip
    swapped = Planner([0, 0, 1], wake_s=[10.0] * 3, wake_j=[0.0] * 3, idle_w=[60.0] * 3,
                      parked_w=[30.0, 20.0, 20.0])  # fmt: skip
    supplies = [SUPPLIES[0], SUPPLIES[0], SUPPLIES[1]]
    s = situation(30.0, installed=(2.0, 1.0, 2.0), supplies=supplies)
    t = situation(30.0, installed=(1.0, 2.0, 2.0), supplies=supplies)
    one, other = two.plan(s), swapped.plan(t)
    assert one.objective_j == pytest.approx(other.objective_j, rel=2e-3)
    assert one.on[[1, 0, 2], 0] == pytest.approx(other.on[:, 0])


@given(rate=st.floats(1.0, 60.0), times=st.sampled_from([4.0, 256.0]))
@settings(max_examples=10)
def test_a_larger_fleet_at_a_larger_load_costs_so_many_times_the_relaxation(rate, times):
    one = PLANNER.plan(situation(rate))
    many = PLANNER.plan(
        situation(rate * times, installed=(2.0 * times, 2.0 * times), decode_req_s=rate * times)
    )
    assert many.bound_j == pytest.approx(times * one.bound_j, rel=1e-5)
    # Whole numbers cost the less the more there are.
    assert many.objective_j / many.bound_j <= one.objective_j / one.bound_j * 1.002


# What a plan may never do


@example(
    rate=64.0, awake=(1, 2), backlog=20.0,
    # The simplex method of HiGHS gives this one up without a word.
    budget=[252.0, 472.0, 446.0, 100.0, 148.0, 844.0, 842.0, 477.0, 507.0, 557.0, 504.0, 779.0],
)  # fmt: skip
@given(
    rate=st.floats(0.0, 100.0),
    awake=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    budget=st.lists(st.floats(100.0, 2000.0), min_size=K, max_size=K),
    backlog=st.floats(0.0, 300.0),
)
@settings(max_examples=30)
def test_a_plan_that_may_be_applied_keeps_budget_and_counts(rate, awake, budget, backlog):
    s = situation(rate, awake=awake, budget_w=np.array(budget), backlog_req=backlog)
    plan = PLANNER.plan(s)
    if not plan.status.usable:
        assert plan.status is PlanStatus.INFEASIBLE
        assert plan.wanted(0.0) is None
        return
    assert np.all(plan.power_w <= np.array(budget) + 1e-4)
    assert np.all(plan.on >= -1e-6)
    assert np.all(plan.on <= s.installed[:, None] + 1e-6)


def test_a_budget_below_idle_power_has_no_plan():
    plan = PLANNER.plan(situation(20.0, budget_w=np.full(K, 50.0)))
    assert plan.status is PlanStatus.INFEASIBLE
    assert plan.wanted(0.0) is None


def test_announced_budgets_are_prepared_for():
    """What draws least under the cut is awake when it comes, though it takes time to wake."""
    rate = np.full(K, 30.0)
    free = PLANNER.plan(situation(rate))
    cut = np.where(BEGIN_S >= 20.0, 0.97 * free.power_w[-1], np.inf)
    plan = PLANNER.plan(situation(rate, budget_w=cut))
    assert plan.status.usable
    assert np.all(plan.power_w <= cut + 1e-4)


def test_an_endless_reserve_keeps_everybody():
    plan = PLANNER.plan(situation(5.0, reserve=np.inf))
    assert plan.status is PlanStatus.OK
    assert plan.wanted(0.0).tolist() == [2.0, 2.0]


def test_out_of_nodes_the_relaxation_is_rounded_up(monkeypatch):
    from voltana_ctrl.control import plan as module

    real = module._solved

    def stops(problem, limits=None):
        return real(problem) if limits is None else PlanStatus.FAILED

    monkeypatch.setattr(module, "_solved", stops)
    s = situation(np.where(BEGIN_S < 30.0, 25.0, 47.0))
    plan = planner().plan(s)
    assert plan.status is PlanStatus.ROUNDED
    whole = plan.on[:, 0]
    assert whole == pytest.approx(np.round(whole))
    assert np.all(plan.wanted(0.0) * [each.most_req_s for each in SUPPLIES] >= 30.0 - 1e-6)
    tight = dataclasses.replace(s, budget_w=plan.power_w - 1.0)
    assert planner().plan(tight).status in (PlanStatus.FAILED, PlanStatus.INFEASIBLE)


def test_a_solver_that_gives_up_is_no_plan(monkeypatch):
    def broken(self, *args, **options):
        raise cp.SolverError("out of luck")

    monkeypatch.setattr(cp.Problem, "solve", broken)
    plan = planner().plan(situation())
    assert plan.status is PlanStatus.FAILED
    assert plan.wanted(0.0) is None


def test_a_plan_holds_for_its_horizon_and_no_longer():
    plan = PLANNER.plan(situation(10.0))
    assert plan.wanted(119.0) is not None
    assert plan.wanted(120.0) is None


def test_an_empty_fleet_and_no_load_are_no_accident():
    assert PLANNER.plan(situation(0.0)).wanted(0.0).max() <= 1.0
    nobody = PLANNER.plan(situation(20.0, installed=(0.0, 0.0)))
    assert nobody.status.usable
    assert nobody.wanted(0.0).tolist() == [0.0, 0.0]


def test_colocated_instances_are_one_phase():
    supply = supply_of([5.0, 10.0, 15.0], [120.0, 200.0, 300.0], facets=6)
    both = Planner([0], wake_s=[10.0], wake_j=[0.0], idle_w=[60.0], parked_w=[20.0])
    s = dataclasses.replace(
        situation(20.0, installed=(4.0,), supplies=[supply]), reserve_req_s=np.full((1, K), 24.0)
    )
    assert both.plan(s).wanted(0.0).tolist() == [2.0]


@pytest.mark.parametrize("wrong", [{"max_nodes": 0}, {"limit_s": 0.0}, {"whole_steps": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        planner(**wrong)
