"""Looking ahead on the plant: the promise under wake times, and who is on when things go wrong."""

import dataclasses
import pickle

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control import CascadeController, MpcController
from voltana_ctrl.control.lookahead import takes_time
from voltana_ctrl.estimate import read_forecast
from voltana_ctrl.experiment import Run
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.arrivals import Diurnal
from voltana_ctrl.sim.faults import Failure
from voltana_ctrl.types import Rest

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def sleepy(wake_s=10.0, asleep_w=20.0, text="2P2D"):
    fleet = FleetSpec.parse(text, PROFILE)
    return FleetSpec(
        tuple(dataclasses.replace(one, asleep_w=asleep_w, wake_s=wake_s) for one in fleet.instances)
    )


def run(policy, *, rate, duration_s, wake_s=10.0, **what):
    return Run(
        policy=policy, fleet=sleepy(wake_s), slo=SLO, workload="sharegpt", rate_req_s=rate,
        duration_s=duration_s, **what,
    ).simulate()  # fmt: skip


def worst(figures):
    return min(figures["ttft_attainment"], figures["itl_attainment"])


def test_where_nothing_takes_time_nothing_is_solved():
    """The same decisions as without a look ahead, to the last digit."""
    fleet = FleetSpec.parse("2P2D", PROFILE)
    assert not MpcController(fleet, SLO).looks_ahead
    assert not takes_time(sleepy(wake_s=0.03), 1.0)
    assert not takes_time(sleepy(asleep_w=60.0), 1.0)  # sleep that saves nothing
    figures = [
        Run(policy=policy, fleet=fleet, slo=SLO, workload="sharegpt", rate_req_s=30.0,
            duration_s=10.0, warmup_s=5.0).simulate()
        for policy in ("mpc", "cascade")
    ]  # fmt: skip
    assert figures[0]["energy_j"] == figures[1]["energy_j"]


def driven(controller, seconds, rate_req_s, *, alive=None, running=0.0):
    """Decisions on a fleet that is told, not simulated: so many arrivals, nothing else."""
    memory, n = controller.init(), len(controller.fleet)
    arrived = np.zeros(n)
    arrived[controller.fleet.prefill] = rate_req_s / len(controller.fleet.prefill)
    decisions = []
    for second in range(seconds):
        state = dataclasses.replace(
            FleetState.idle(n, t_s=float(second)), arrived_req=arrived,
            running_req=np.where(np.isin(np.arange(n), controller.fleet.decode), running, 0.0),
        )  # fmt: skip
        if alive is not None:
            state = dataclasses.replace(state, alive=alive(second))
        decision, memory = controller.decide(Observation(state=state), memory)
        decisions.append(decision)
    return decisions, memory


def test_everybody_stays_until_the_load_is_known_then_some_rest():
    decisions, memory = driven(MpcController(sleepy(), SLO), 90, 10.0, running=20.0)
    assert all(decision.active.all() for decision in decisions[:50])
    assert decisions[-1].active.tolist() == [True, False, True, False]
    assert memory.ahead.status == "OK"


def test_notes_are_of_the_memory_that_is_asked_about():
    controller = MpcController(sleepy(), SLO)
    _, slow = driven(controller, 70, 10.0, running=20.0)
    noted = controller.notes(slow)
    _, fast = driven(controller, 70, 30.0, running=20.0)
    assert controller.notes(fast)["forecast_10s_req_s"] > 2.0 * noted["forecast_10s_req_s"]
    assert controller.notes(slow) == noted


def test_who_was_stopped_wakes_as_parked_and_has_no_share_until_then():
    how = {"idle_w": 80.0, "off": Rest(power_w=54.0, wake_s=10.0)}
    plain = FleetSpec.parse("2P2D", PROFILE)
    fleet = FleetSpec(tuple(dataclasses.replace(one, **how) for one in plain.instances))

    def alive(second):
        return np.array([True, True, second < 80, True])

    decisions, _ = driven(MpcController(fleet, SLO), 100, 10.0, alive=alive)
    before, after, last = decisions[79], decisions[80], decisions[-1]
    assert before.depth == ("parked", "off", "parked", "off")
    assert before.active.tolist() == [True, False, True, False]
    assert after.depth[3] == "parked"
    assert after.active[3]
    assert after.route_frac[3] == 0.0
    assert last.route_frac[3] == 1.0


def test_what_wakes_is_active_but_has_no_share():
    def alive(second):
        return np.array([True, True, second < 80, True])

    decisions, _ = driven(MpcController(sleepy(), SLO), 95, 10.0, alive=alive, running=0.0)
    assert decisions[79].active.tolist() == [True, False, True, False]
    # At once: a death waits for no solver.
    assert decisions[80].active[3]
    late = decisions[-1]
    assert late.route_frac[3] == pytest.approx(1.0)
    assert late.route_frac[2] == 0.0


def test_when_all_are_dead_decisions_are_sane():
    def alive(second):
        return np.full(4, second < 70)

    decisions, _ = driven(MpcController(sleepy(), SLO), 90, 10.0, alive=alive)
    for decision in decisions[70:]:
        assert np.isfinite(decision.route_frac).all()
        assert decision.active.all()


def test_a_solver_that_fails_leaves_everybody_awake_in_the_end(monkeypatch):
    import cvxpy as cp

    def broken(self, *args, **options):
        raise cp.SolverError("out of luck")

    monkeypatch.setattr(cp.Problem, "solve", broken)
    controller = MpcController(sleepy(), SLO)
    decisions, memory = driven(controller, 90, 10.0)
    assert memory.ahead.status == "FAILED"
    assert controller.notes(memory)["plan_failed"] == 1.0
    assert decisions[-1].active.all()


@pytest.mark.parametrize("on", [np.nan, np.inf])
def test_a_solver_that_returns_no_numbers_has_failed(on, monkeypatch):
    from voltana_ctrl.control.plan import Planner

    real = Planner.plan

    def garbage(self, situation):
        plan = real(self, situation)
        return dataclasses.replace(plan, on=np.full(plan.on.shape, on))

    monkeypatch.setattr(Planner, "plan", garbage)
    decisions, memory = driven(MpcController(sleepy(), SLO), 90, 10.0)
    assert memory.ahead.status == "FAILED"
    assert decisions[-1].active.all()


def test_a_budget_below_idle_power_is_said_to_be_impossible():
    from voltana_ctrl.types import Status

    controller = MpcController(sleepy(), SLO, power_budget_w=50.0)
    decisions, _ = driven(controller, 5, 10.0)
    assert decisions[-1].status is Status.INFEASIBLE


@pytest.mark.parametrize("told", [np.nan, 1e12, 0.0])
def test_an_absurd_forecast_is_survived(told):
    controller = MpcController(
        sleepy(), SLO, forecast=lambda t_s, lead_s: np.full(len(lead_s), told)
    )
    decisions, _ = driven(controller, 75, 60.0, running=100.0)
    # What comes now is seen by whatever forecasts: both of each are needed for it.
    assert decisions[-1].active.all()


def test_a_thread_plans_beside_the_tick():
    controller = MpcController(sleepy(), SLO, beside=True)
    decisions, memory = driven(controller, 400, 10.0, running=20.0)
    assert memory.ahead.status in ("", "OK")
    assert len(decisions) == 400


@pytest.mark.slow
def test_the_promise_holds_on_a_steady_load_and_half_the_fleet_rests():
    ours, pack = (run(policy, rate=28.0, duration_s=300.0) for policy in ("mpc", "pack"))
    assert worst(ours) >= 0.99
    assert ours["mean_power_w"] <= 0.92 * pack["mean_power_w"]


@pytest.mark.slow
def test_the_promise_holds_on_a_load_that_swings():
    swing = Diurnal(swing_frac=0.9, period_s=300.0, peak_s=150.0)
    ours, pack = (
        run(policy, rate=30.0, duration_s=300.0, arrivals=swing) for policy in ("mpc", "pack")
    )
    assert worst(ours) >= 0.99
    assert ours["mean_power_w"] <= 0.97 * pack["mean_power_w"]


def test_cascade_is_what_it_was():
    assert not hasattr(CascadeController(sleepy(), SLO), "looks_ahead")
    assert CascadeController(sleepy(), SLO).init().ahead is None


def test_a_dead_prefill_instance_is_replaced(monkeypatch):
    figures = run(
        "mpc", rate=10.0, duration_s=60.0, warmup_s=70.0,
        faults=(Failure(instance="prefill-0", from_s=90.0, until_s=120.0),),
    )  # fmt: skip
    assert figures["requests_completed"] == figures["requests_arrived"]


def test_what_a_file_says_is_expected_by_whoever_is_told(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("t_s,req_s\n0,10\n124,10\n130,70\n", encoding="utf-8")
    told = find_policy("mpc").build(
        sleepy(), SLO, PolicySetup(forecast=pickle.loads(pickle.dumps(read_forecast(path))))
    )
    _, memory = driven(told.controller, 123, 10.0, running=20.0)
    assert told.controller.notes(memory)["forecast_10s_req_s"] > 50.0
    _, memory = driven(MpcController(sleepy(), SLO), 123, 10.0, running=20.0)
    assert MpcController(sleepy(), SLO).notes(memory)["forecast_10s_req_s"] < 15.0
