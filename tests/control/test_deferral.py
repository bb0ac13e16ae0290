"""Work that may wait: counted, planned beside the others, and let in whatever goes wrong."""

import dataclasses

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control import MpcController
from voltana_ctrl.control.deferral import Deferral
from voltana_ctrl.control.plan import Planner
from voltana_ctrl.control.situation import STEPS_S, PlanStatus, Situation, steps_to_s
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.experiment import Run
from voltana_ctrl.laws import length_moments
from voltana_ctrl.types import Backlog, PowerBudget, Steps

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("2P2D", PROFILE)
SLO = Slo(ttft_s=0.6, itl_s=0.06)
SUPPLIES = TargetOptimiser(FLEET, SLO).supplies(length_moments([100, 300, 320], [101, 301, 200]))
STEPS = steps_to_s(900.0)
PLANNER = Planner(
    [0, 1], wake_s=[0.0, 0.0], wake_j=[0.0, 0.0], idle_w=[60.0, 60.0], parked_w=[60.0, 60.0],
    steps_s=STEPS, defers=True, whole_steps=0,
)  # fmt: skip
DT_S, END_S, K = np.array(STEPS), PLANNER.end_s, len(STEPS)


def situation(rate=30.0, held=300.0, more=5.0, due=None, **what):
    come = held + more * END_S
    told = {
        "supplies": SUPPLIES, "installed": np.array([2.0, 2.0]), "awake": np.array([2.0, 2.0]),
        "draining": np.zeros(2), "waking_s": [np.zeros(0)] * 2, "backlog_req": 0.0,
        "decode_req_s": rate, "arrival_req_s": np.full(K, rate),
        "reserve_req_s": np.full((2, K), 1.2 * rate), "residence_s": 12.0,
        "budget_w": np.full(K, np.inf), "come_req": come,
        "due_req": np.zeros(K) if due is None else np.minimum(due, come),
        "let_in_req_s": more,
    }  # fmt: skip
    return Situation(**(told | what))


def let_in(plan):
    return np.cumsum(plan.let_in_req_s * DT_S)


# Counting


def test_what_is_held_and_will_come_is_due_in_time():
    deferral = Deferral()
    memory = deferral.init()
    deadlines = []
    for second in range(301):
        deadlines.append(second + 600.0)
        backlog = Backlog(deadline_s=deadlines, prompt_tok=[100.0] * len(deadlines),
                          arrived_req=1.0)  # fmt: skip
        memory = deferral.count(memory, float(second), backlog)
    assert memory.rate_req_s == pytest.approx(1.0, rel=0.01)
    assert memory.allowed_s == 600.0
    come, due = deferral.flows(memory, np.array([100.0, 200.0, 500.0, 600.0]), lead_s=100.0)
    assert come == pytest.approx([401.0, 501.0, 801.0, 901.0], rel=0.01)
    # The first is due 500 s after it came; the last of those held at 500 s; then what comes now.
    assert due == pytest.approx([0.0, 1.0, 301.0, 401.0], abs=2.0)


def test_without_work_that_may_wait_nothing_is_counted():
    deferral = Deferral()
    assert deferral.count(deferral.init(), 5.0, Backlog.empty()).t_s == -1.0


def test_the_steady_rate_that_keeps_all_deadlines():
    deferral = Deferral()
    backlog = Backlog(deadline_s=[130.0, 140.0, 1000.0], prompt_tok=[1.0] * 3, arrived_req=3.0)
    memory = deferral.count(deferral.init(), 0.0, backlog)
    assert deferral.pace_req_s(memory, lead_s=100.0) == pytest.approx(2.0 / 40.0)
    assert deferral.pace_req_s(memory, lead_s=500.0) == pytest.approx(2.0)  # overdue: in a second


# The programme


def test_a_steady_flow_is_let_in_as_it_comes():
    plan = PLANNER.plan(situation(held=0.0))
    assert plan.status is PlanStatus.OK
    assert plan.let_in_req_s == pytest.approx(5.0, abs=0.5)


def test_work_waits_for_the_cheap_hours():
    price = np.where(END_S <= 240.0, 4.0 / 3.0, 2.0 / 3.0)
    plan = PLANNER.plan(situation(price_frac=price))
    dear = END_S <= 240.0
    assert plan.let_in_req_s[dear].max() < 0.5
    assert plan.let_in_req_s[~dear].mean() > 5.0


def test_work_is_done_before_the_dear_hours():
    price = np.where(END_S <= 240.0, 2.0 / 3.0, 4.0 / 3.0)
    plan = PLANNER.plan(situation(price_frac=price, let_in_req_s=0.0))
    assert let_in(plan)[np.flatnonzero(END_S <= 240.0)[-1]] >= 0.9 * (300.0 + 5.0 * 240.0)


def test_an_announced_cut_is_filled_with_nothing_that_can_wait():
    everything = PLANNER.plan(situation(held=0.0)).power_w[-1]
    alone = PLANNER.plan(situation(held=0.0, more=0.0)).power_w[-1]
    cut = np.where((END_S > 240.0) & (END_S <= 480.0), 0.5 * (everything + alone), np.inf)
    plan = PLANNER.plan(situation(held=0.0, budget_w=cut))
    assert plan.status.usable
    inside = (END_S > 240.0) & (END_S <= 480.0)
    assert plan.let_in_req_s[inside].max() < 0.5
    assert plan.let_in_req_s[END_S > 480.0].max() > 5.0
    # It holds before, so that batches are small when the cut comes.
    assert plan.let_in_req_s[np.flatnonzero(inside)[0] - 1] < 5.0


def test_room_for_the_others_is_kept():
    most = 2.0 * min(each.most_req_s for each in SUPPLIES)
    due = np.where(END_S >= 600.0, 3000.0, 0.0)
    plan = PLANNER.plan(situation(held=3000.0, due=due))
    held, stay = 0.0, np.exp(-DT_S / 12.0)
    for k in range(K):
        held = stay[k] * held + (1.0 - stay[k]) * plan.let_in_req_s[k]
        assert held <= most - 36.0 + 1e-6  # decode follows what is let in
    assert let_in(plan)[np.searchsorted(END_S, 600.0)] >= 3000.0 - 1e-6


def test_the_reserve_is_lent_before_deadlines_are_missed_by_minutes():
    due = np.where(END_S >= 60.0, 3500.0, 0.0)
    plan = PLANNER.plan(situation(held=3500.0, due=due))
    calm = PLANNER.plan(situation(held=3500.0))
    first = END_S <= 60.0
    assert let_in(plan)[first][-1] > 1.05 * let_in(calm)[first][-1]


PATHS = st.lists(st.floats(0.0, 1.0), min_size=K, max_size=K)


@given(path=PATHS, dear=st.integers(1, K - 1))
@settings(max_examples=15)
def test_no_other_way_to_let_in_is_cheaper(path, dear):
    price = np.where(np.arange(K) < dear, 1.3, 0.7)
    s = situation(price_frac=price)
    best = PLANNER.plan(s)
    # Deadlines that force this path.
    forced = np.minimum.accumulate((s.come_req * np.array(path))[::-1])[::-1]
    other = PLANNER.plan(dataclasses.replace(s, come_req=forced, due_req=forced))
    dearest = 1.3 * sum(each.alpha_j_req.max() for each in SUPPLIES)
    left = dearest * (s.come_req[-1] - forced[-1])  # still held at the end
    held_j = 2e-4 * float((s.come_req - forced) @ DT_S)
    assert best.objective_j <= other.objective_j + left + held_j + 1e-3 * abs(best.objective_j)


@given(
    rate=st.floats(0.0, 90.0), held=st.floats(0.0, 5000.0), more=st.floats(0.0, 40.0),
    budget=st.lists(st.floats(250.0, 2000.0), min_size=K, max_size=K),
)  # fmt: skip
@settings(max_examples=25)
def test_a_plan_that_may_be_applied_keeps_budget_and_lets_in_who_is_there(rate, held, more, budget):
    s = situation(rate, held, more, due=0.5 * (held + more * END_S), budget_w=np.array(budget))
    plan = PLANNER.plan(s)
    if not plan.status.usable:
        # Scarcely above what the idle fleet draws HiGHS may give up without a proof.
        assert plan.status in (PlanStatus.INFEASIBLE, PlanStatus.FAILED)
        return
    assert np.all(plan.power_w <= np.array(budget) + 1e-4)
    assert np.all(plan.let_in_req_s >= -1e-6)
    assert np.all(let_in(plan) <= s.come_req + 1e-4)


@given(times=st.sampled_from([4.0, 256.0]))
@settings(max_examples=4)
def test_a_larger_fleet_lets_in_so_many_times_as_much(times):
    one = PLANNER.plan(situation())
    s = situation(30.0 * times, 300.0 * times, 5.0 * times,
                  installed=np.full(2, 2.0 * times), awake=np.full(2, 2.0 * times))  # fmt: skip
    many = PLANNER.plan(s)
    assert many.bound_j == pytest.approx(times * one.bound_j, rel=1e-4)


def test_a_backlog_leaves_room_beside_what_is_expected():
    """More is due than there is room for beside the reserve: prefill is not filled to the brim."""
    due = np.where(np.arange(K) >= K - 2, 5000.0 + 18.0 * END_S[K - 2], 0.0)
    plan = PLANNER.plan(
        situation(50.0, held=5000.0, more=18.0, due=due, let_in_req_s=20.0,
                  reserve_req_s=np.full((2, K), 1.15 * 50.0))
    )  # fmt: skip
    assert let_in(plan)[K - 2] == pytest.approx(due[-1], rel=0.01)
    most = 0.85 * 2.0 * SUPPLIES[0].most_req_s
    assert 50.0 + plan.let_in_req_s.max() <= most + 1e-6


def test_the_relaxation_meets_the_optimality_conditions():
    """Karush, Kuhn and Tucker, with all that belongs to work that may wait."""
    due = np.where(END_S >= 400.0, 900.0, 0.0)
    plan = PLANNER.plan(situation(60.0, due=due, budget_w=np.full(K, 950.0)))
    data, _, _ = PLANNER.relaxed.get_problem_data(cp.SCIPY)
    c = np.asarray(data["c"])
    bounds = np.stack([
        np.full(len(c), free) if data.get(key) is None else np.asarray(data[key], np.float64)
        for key, free in (("lower_bounds", -np.inf), ("upper_bounds", np.inf))
    ], axis=1)  # fmt: skip
    found = linprog(c, A_eq=data["A"], b_eq=data["b"], A_ub=data["G"], b_ub=data["h"],
                    bounds=bounds)  # fmt: skip
    x, equal, below = found.x, -found.eqlin.marginals, -found.ineqlin.marginals
    scale, slack = np.abs(c).max(), data["h"] - data["G"] @ found.x
    assert slack.min() > -1e-5
    assert below.min() > -1e-6 * scale
    assert np.abs(below * slack).max() < 1e-5 * scale
    reduced = c + data["A"].T @ equal + data["G"].T @ below
    inside = (x > bounds[:, 0] + 1e-7) & (x < bounds[:, 1] - 1e-7)
    assert np.abs(reduced[inside]).max() < 1e-6 * scale
    assert plan.bound_j == pytest.approx(found.fun, rel=1e-6, abs=1e-3)


# The controller


def driven(controller, seconds, *, rate=30.0, comes=1.0, deadline_s=600.0, alive=None):
    """Decisions on a fleet that is told: what may wait comes and is never let in."""
    memory, n = controller.init(), len(controller.fleet)
    arrived = np.where(np.isin(np.arange(n), controller.fleet.prefill), rate / 2.0, 0.0)
    deadlines, decisions = [], []
    for second in range(seconds):
        deadlines.append(second + deadline_s)
        state = dataclasses.replace(
            FleetState.idle(n, t_s=float(second)), arrived_req=arrived,
            running_req=np.where(arrived > 0.0, 0.0, 60.0),
        )  # fmt: skip
        if alive is not None:
            state = dataclasses.replace(state, alive=alive(second))
        backlog = Backlog(deadline_s=deadlines, prompt_tok=[200.0] * len(deadlines),
                          arrived_req=comes)  # fmt: skip
        decision, memory = controller.decide(Observation(state=state, backlog=backlog), memory)
        decisions.append(decision)
    return decisions, memory


def test_where_nothing_may_wait_nothing_is_said_of_admission():
    controller = MpcController(FLEET, SLO)
    decision, memory = controller.decide(Observation(state=FleetState.idle(4)), controller.init())
    assert decision.admission is None
    assert "held_req" not in controller.notes(memory)


def test_what_may_wait_is_let_in_once_the_load_is_known():
    controller = MpcController(FLEET, SLO)
    decisions, memory = driven(controller, 90)
    assert decisions[5].admission.rate_req_s < 0.8  # nobody knows what the others will do
    assert decisions[-1].admission.rate_req_s > 0.5
    assert memory.ahead.status == "OK"
    notes = controller.notes(memory)
    assert notes["held_req"] == 90.0
    assert "on" not in notes  # that follows the load
    assert {"price_request_now_j", "price_request_later_j", "price_watt_frac"} <= set(notes)


def test_a_cut_that_was_announced_is_kept_free_of_what_can_wait():
    budget = PowerBudget(steps=((0.0, 2000.0), (80.0, 420.0), (300.0, 2000.0)), notice_s=60.0)
    warned, _ = driven(MpcController(FLEET, SLO, power_budget_w=budget), 100)
    assert warned[79].admission.rate_req_s < 0.2
    unwarned, _ = driven(
        MpcController(FLEET, SLO, power_budget_w=dataclasses.replace(budget, notice_s=0.0)), 100
    )
    assert unwarned[75].admission.rate_req_s > 0.5  # nobody may know yet


def test_whoever_is_held_below_his_needs_comes_before_what_can_wait():
    controller = MpcController(FLEET, SLO)
    _, memory = driven(controller, 90)
    ahead, lookahead = memory.ahead, controller._ahead
    free = lookahead.admission(ahead, 89.0, 12.0)
    assert free.rate_req_s > 0.5
    assert lookahead.admission(ahead, 89.0, 12.0, 0.05).rate_req_s == 0.5 * free.rate_req_s
    assert lookahead.admission(ahead, 89.0, 12.0, 1.0).rate_req_s == 0.0
    # What is due is let in all the same: the first are, 120.6 s before their deadlines.
    due = dataclasses.replace(
        ahead, deferral=dataclasses.replace(
            ahead.deferral, deadline_s=ahead.deferral.deadline_s - 420.0
        )
    )  # fmt: skip
    assert 0.0 < lookahead.admission(due, 89.0, 12.0, 1.0).rate_req_s < free.rate_req_s


def test_a_budget_for_nobody_lets_in_nobody_but_the_last_chance():
    controller = MpcController(FLEET, SLO, power_budget_w=245.0)
    decisions, memory = driven(controller, 60)
    assert memory.ahead.status == "INFEASIBLE"
    assert controller.notes(memory)["plan_infeasible"] == 1.0
    assert decisions[-1].admission.rate_req_s == 0.0
    assert decisions[-1].admission.due_s > 10.0


def test_a_solver_that_fails_leaves_the_pace_that_keeps_deadlines(monkeypatch):
    def broken(self, *args, **options):
        raise cp.SolverError("out of luck")

    monkeypatch.setattr(cp.Problem, "solve", broken)
    decisions, memory = driven(MpcController(FLEET, SLO), 90)
    assert memory.ahead.status == "FAILED"
    assert 0.1 < decisions[-1].admission.rate_req_s < 2.0


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -5.0])
def test_a_planner_that_returns_no_rates_does_no_harm(monkeypatch, garbage):
    real = Planner.plan

    def absurd(self, situation):
        plan = real(self, situation)
        return dataclasses.replace(plan, let_in_req_s=np.full(len(plan.end_s), garbage))

    monkeypatch.setattr(Planner, "plan", absurd)
    decisions, _ = driven(MpcController(FLEET, SLO), 60)
    assert 0.0 <= decisions[-1].admission.rate_req_s < 2.0


def test_when_all_are_dead_admission_is_sane():
    decisions, _ = driven(
        MpcController(FLEET, SLO), 90, alive=lambda second: np.full(4, second < 60)
    )
    assert all(np.isfinite(each.admission.rate_req_s) for each in decisions[2:])


@pytest.mark.parametrize("price", ["0:0", "0:-1,50:0", "0:0.2,50:1e9"])
def test_absurd_prices_are_survived(price):
    decisions, memory = driven(MpcController(FLEET, SLO, price=Steps.parse(price)), 70)
    assert memory.ahead.status == "OK"
    assert np.isfinite(decisions[-1].admission.rate_req_s)


def test_a_grid_that_reaches_a_day_stays_small():
    assert steps_to_s(0.0) == STEPS_S
    assert sum(steps_to_s(86_400.0)) >= 86_400.0
    assert len(steps_to_s(1e9)) <= 80


def test_where_waking_takes_time_counts_are_whole_and_the_flow_stays():
    wakes = Planner(
        [0, 1], wake_s=[10.0, 10.0], wake_j=[0.0, 0.0], idle_w=[60.0, 60.0],
        parked_w=[20.0, 20.0], steps_s=STEPS, defers=True,
    )  # fmt: skip
    price = np.where(END_S <= 240.0, 4.0 / 3.0, 2.0 / 3.0)
    for rate in (10.0, 25.0, 40.0):
        plan = wakes.plan(situation(rate, price_frac=price))
        assert plan.status.usable
        near = plan.on[:, :6]
        assert near == pytest.approx(np.round(near), abs=1e-6)
        assert plan.bound_j <= plan.objective_j + 1e-6 * abs(plan.bound_j)
        assert plan.objective_j - plan.bound_j <= 0.01 * plan.power_w @ DT_S
        assert plan.let_in_req_s[END_S <= 240.0].max() < 0.5


@pytest.mark.slow
def test_the_dear_block_is_spared_on_the_plant():
    """Blocks of 150 s, one twice as dear as the other; half of the work may wait for 400 s."""
    steps = Steps(steps=tuple((150.0 * k, 0.4 if k % 2 == 0 else 0.2) for k in range(6)))
    figures = [
        Run(
            policy=policy, fleet=FLEET, slo=SLO, workload="sharegpt", rate_req_s=25.0,
            duration_s=600.0, warmup_s=150.0, price=steps, defer=(0.5, 400.0),
        ).simulate()
        for policy in ("mpc", "cascade")
    ]  # fmt: skip
    ours, at_once = figures
    assert ours["deadline_missed"] == 0
    assert min(ours["ttft_attainment"], ours["itl_attainment"]) >= 0.99
    # Per token: work that waited from before the window is served in it.
    per_token = [each["cost"] / each["tokens_out"] for each in (ours, at_once)]
    assert per_token[0] < 0.97 * per_token[1]


@pytest.mark.parametrize("moves_frac", [0.0, 0.5, 1.0])
def test_who_comes_later_is_due_as_deadlines_went(moves_frac):
    """With as much time as the others, or all at six: told by the deadlines of the newest."""
    deferral, memory = Deferral(), Deferral().init()
    rate, allowed_s, lead_s = 2.0, 1000.0, 100.0
    deadlines: list[float] = []
    for second in range(401):
        t_s = float(second)
        due_s = allowed_s + moves_frac * t_s
        deadlines += [due_s] * int(rate)
        backlog = Backlog(
            deadline_s=deadlines, prompt_tok=[100.0] * len(deadlines), arrived_req=rate
        )
        memory = deferral.count(memory, t_s, backlog)
    end_s = np.array([200.0, 400.0, 600.0, 900.0, 1500.0])
    come, due = deferral.flows(memory, end_s, lead_s=lead_s)
    # Whoever comes, counted one by one.
    later_s = np.arange(0.0, 1500.0, 0.5) + 0.25
    due_at_s = allowed_s + moves_frac * (400.0 + later_s) - lead_s - 400.0
    for k, end in enumerate(end_s):
        held = np.sum(np.array(deadlines) - 400.0 - lead_s <= end)
        expected = held + np.sum((due_at_s <= end) & (later_s <= end))
        assert due[k] == pytest.approx(min(expected, come[k]), rel=0.03, abs=20.0)
