"""How deep parked instances sleep: chosen, said, and cheaper on the plant."""

import dataclasses

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.control.depth import at_rest
from voltana_ctrl.experiment import Run
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
