"""How deep parked instances sleep: chosen, said, and cheaper on the plant."""

import dataclasses

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.control.depth import at_rest, planned_rest
from voltana_ctrl.experiment import Run
from voltana_ctrl.policies import Policy, find_policy
from voltana_ctrl.types import Rest

SLO = Slo(ttft_s=0.6, itl_s=0.06)
PLAIN = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))


def sleepy(**how):
    return FleetSpec(tuple(dataclasses.replace(one, **how) for one in PLAIN.instances))


L20 = sleepy(idle_w=67.0, deep_parked=Rest(power_w=36.0, wake_s=0.03))


def test_the_deepest_that_is_there_again_within_a_period():
    assert set(at_rest(L20, 1.0)[1]) == {"deep_parked"}
    slow = sleepy(off=Rest(power_w=20.0, wake_s=40.0))
    assert at_rest(slow, 1.0) == (slow, ("parked",) * 4)
    both = sleepy(deep_parked=Rest(power_w=50.0, wake_s=0.1), asleep=Rest(power_w=30.0, wake_s=0.5))
    rested, depth = at_rest(both, 1.0)
    assert set(depth) == {"asleep"}
    assert rested.instances[0].parked_w == 30.0
    assert at_rest(both, 0.2)[1][0] == "deep_parked"


def test_a_plan_may_let_sleep_deeper_where_who_is_parked_is_back_at_once():
    stops = Rest(power_w=54.0, wake_s=40.0, wake_j=100.0, enter_s=5.0)
    planned, depth = planned_rest(sleepy(idle_w=80.0, off=stops), 1.0)
    one = planned.instances[0]
    assert set(depth) == {"off"}
    assert (one.parked_w, one.wake_s, one.wake_j) == (54.0, 45.0, 100.0)


@pytest.mark.parametrize(
    "how",
    [
        {"idle_w": 67.0, "deep_parked": Rest(power_w=36.0, wake_s=0.03)},
        {"idle_w": 60.0, "off": Rest(power_w=60.0, wake_s=40.0)},
        {"off": Rest(power_w=20.0, wake_s=120.0)},
        {"off": Rest(power_w=20.0, wake_s=40.0, wake_j=1e4)},
        {"asleep_w": 20.0, "wake_s": 10.0, "off": Rest(power_w=5.0, wake_s=40.0)},
    ],
    ids=["back at once", "saves nothing", "too long", "dear to wake", "parked is foreseen"],
)
def test_nothing_is_left_for_a_plan_to_choose(how):
    fleet = sleepy(**how)
    assert planned_rest(fleet, 1.0) == (fleet, None)


def test_of_two_sleeps_the_one_that_saves_most_within_two_minutes():
    def chosen(off_w):
        fleet = sleepy(
            idle_w=80.0,
            asleep=Rest(power_w=50.0, wake_s=10.0),
            off=Rest(power_w=off_w, wake_s=60.0),
        )
        return set(planned_rest(fleet, 1.0)[1])

    # 30 W for 110 s against 60 W, or 40 W, for 60 s.
    assert chosen(20.0) == {"off"}
    assert chosen(40.0) == {"asleep"}


def recorded(decisions):
    """`mpc` that keeps its decisions."""

    def build(fleet, slo, setup):
        parts = find_policy("mpc").build(fleet, slo, setup)
        decide = parts.controller.decide

        def kept(observation, memory):
            decision, memory = decide(observation, memory)
            decisions.append((observation.state, decision))
            return decision, memory

        object.__setattr__(parts.controller, "decide", kept)
        return parts

    return Policy(name="kept", summary="", source="", build=build)


def stopping(rate_req_s, *, stops):
    how = {"off": Rest(power_w=54.0, wake_s=5.0)} if stops else {}
    decisions = []
    figures = Run(
        policy=recorded(decisions), fleet=sleepy(idle_w=80.0, **how), slo=SLO,
        workload="sharegpt", rate_req_s=rate_req_s, duration_s=30.0, warmup_s=70.0,
    ).simulate()  # fmt: skip
    return figures, decisions


def test_who_is_not_needed_for_long_is_stopped():
    figures, decisions = stopping(10.0, stops=True)
    plain, _ = stopping(10.0, stops=False)
    assert min(figures["ttft_attainment"], figures["itl_attainment"]) >= 0.99
    assert figures["mean_power_w"] < plain["mean_power_w"] - 20.0
    _, last = decisions[-1]
    assert {"off", "parked"} == set(last.depth)
    for state, decision in decisions:
        off = np.array(decision.depth or ("parked",) * 4) == "off"
        assert not decision.active[off].any()
        assert not decision.route_frac[off].any()
        assert state.t_s > 1.0 or not off.any()


def test_where_all_are_needed_nobody_is_stopped_and_it_costs_nothing():
    figures, decisions = stopping(60.0, stops=True)
    plain, _ = stopping(60.0, stops=False)
    assert all("off" not in (decision.depth or ()) for _, decision in decisions)
    assert figures["mean_power_w"] <= 1.003 * plain["mean_power_w"]


def test_a_sleep_that_saves_nothing_and_one_that_is_foreseen_are_left():
    assert at_rest(sleepy(idle_w=60.0, deep_parked=Rest(power_w=60.0)), 1.0)[1][0] == "parked"
    foreseen = sleepy(asleep_w=20.0, wake_s=10.0, off=Rest(power_w=5.0, wake_s=0.1))
    assert at_rest(foreseen, 1.0)[1][0] == "parked"


def test_who_is_parked_draws_what_the_deep_sleep_does():
    figures = [
        Run(policy="mpc", fleet=fleet, slo=SLO, workload="sharegpt", rate_req_s=12.0,
            duration_s=40.0, warmup_s=20.0).simulate()
        for fleet in (L20, sleepy(idle_w=67.0, asleep_w=67.0))
    ]  # fmt: skip
    deep, shallow = figures
    assert min(deep["ttft_attainment"], deep["itl_attainment"]) >= 0.98
    assert deep["mean_power_w"] < shallow["mean_power_w"] - 20.0
