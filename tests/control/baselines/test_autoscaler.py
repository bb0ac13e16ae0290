"""The autoscaler: counts by load and capacity, one more or less by latency in between."""

from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import ConfigError, FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control import AutoscalerController
from voltana_ctrl.experiment import Run
from voltana_ctrl.laws import prefill_s
from voltana_ctrl.sim.arrivals import Diurnal
from voltana_ctrl.testing import check_controller
from voltana_ctrl.types import RequestBatch

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
FLEET = FleetSpec.parse("4P4D", PROFILE)


def watched(autoscaler, rate_req_s, *, prompt_tok=500.0, answer_tok=200, until_s=180.0, **state):
    """Decision after a steady load, looked at every 5 s."""
    memory, decision = autoscaler.init(), None
    for t_s in np.arange(5.0, until_s + 1.0, 5.0):
        n = round(rate_req_s * 5.0)
        at, none = np.full(n, 4), np.zeros(n, int)
        finished = RequestBatch(
            request=none, request_class=none, prefill_instance=none, decode_instance=at,
            ttft_s=np.full(n, 0.2), itl_s=np.full(n, 0.03), prompt_tok=np.full(n, prompt_tok),
            output_tok=np.full(n, float(answer_tok)),
        )  # fmt: skip
        came = np.array([n, 0, 0, 0, 0, 0, 0, 0], np.float64)
        idle = replace(
            FleetState.idle(8, t_s=float(t_s)), arrived_req=came, arrived_tok=came * prompt_tok,
            **state,
        )  # fmt: skip
        decision, memory = autoscaler.decide(Observation(state=idle, finished=finished), memory)
    return decision


def test_counts_are_load_over_capacity_rounded_up() -> None:
    autoscaler = AutoscalerController(FLEET, SLO)
    able_req_s = 1.0 / float(prefill_s(FLEET.instances[0].table[-1], 500.0))
    for engines in (1, 2, 3):
        decision = watched(autoscaler, round(able_req_s * (engines - 0.5) * 5.0) / 5.0)
        assert np.count_nonzero(decision.active[:4]) == engines
        assert decision.active[4]
        assert decision.depth == ("off",) * 8
        assert np.all(decision.freq_mhz == FLEET.max_mhz)


def test_everybody_runs_until_an_interval_has_been_watched() -> None:
    assert watched(AutoscalerController(FLEET, SLO), 1.0, until_s=175.0).active.all()
    assert np.count_nonzero(watched(AutoscalerController(FLEET, SLO), 1.0).active) == 2


def test_one_more_where_all_would_be_late_and_back_when_there_is_room() -> None:
    autoscaler = AutoscalerController(FLEET, SLO)
    memory = autoscaler.init()
    counts = []
    for t_s, queue_tok in ((180.0, 0.0), (185.0, 1e5), (190.0, 1e5), (195.0, 0.0)):
        state = replace(FleetState.idle(8, t_s=t_s), queue_tok=np.full(8, queue_tok))
        decision, memory = autoscaler.decide(Observation(state=state), memory)
        counts.append(int(np.count_nonzero(decision.active[:4])))
    assert counts == [1, 2, 3, 2]


def test_the_dead_are_not_counted_on() -> None:
    alive = np.array([False, True, True, True, False, False, False, False])
    decision = watched(AutoscalerController(FLEET, SLO), 1.0, alive=alive)
    assert not decision.active[0]
    assert decision.active[1]
    # Where nobody of a phase lives everybody is asked.
    assert decision.active[4:].all()


def test_it_follows_the_law_of_controllers_and_refuses_bad_settings() -> None:
    check_controller(AutoscalerController, examples=3)
    with pytest.raises(ConfigError, match="interval_s"):
        AutoscalerController(FLEET, SLO, interval_s=0.0)


def test_engines_that_do_both_are_counted_once() -> None:
    fleet = FleetSpec.parse("8C", PROFILE)
    few, many = (watched(AutoscalerController(fleet, SLO), rate) for rate in (5.0, 60.0))
    assert 1 <= np.count_nonzero(few.active) < np.count_nonzero(many.active) <= 8


def test_a_day_costs_less_than_at_full_strength_and_breaks_the_promise() -> None:
    def run(policy):
        return Run(
            policy=policy, fleet=FLEET, slo=SLO, workload="sharegpt", rate_req_s=60.0,
            arrivals=Diurnal(swing_frac=0.9, period_s=400.0, peak_s=200.0), duration_s=400.0,
        ).simulate()  # fmt: skip

    scaled, full = run("autoscaler"), run("static-max")
    assert scaled["mean_power_w"] < 0.9 * full["mean_power_w"]
    assert scaled["requests_dropped"] == 0
    assert scaled["requests_completed"] == full["requests_completed"]
