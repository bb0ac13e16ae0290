"""The chosen numbers: refused where they are none, and obeyed where they are."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import ConfigError, FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control import CascadeController, IterationGovernor, TargetOptimiser
from voltana_ctrl.estimate.headroom import HeadroomFilter
from voltana_ctrl.estimate.load import LoadFilter
from voltana_ctrl.types import RequestBatch, Tuning

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
SLO = Slo(ttft_s=0.6, itl_s=0.06)
NUMBERS = [one.name for one in dataclasses.fields(Tuning) if one.name != "margin_frac"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much"])
def test_a_number_that_is_none_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError, match=rf"Tuning\.{name}"):
        Tuning(**{name: value})


@pytest.mark.parametrize("margin_frac", [(0.1,), (0.1, -1.0), (0.1, float("nan"))])
def test_margins_are_two_numbers_above_minus_one(margin_frac):
    with pytest.raises(ConfigError, match=r"Tuning\.margin_frac: expected two numbers > -1"):
        Tuning(margin_frac=margin_frac)


def test_every_layer_goes_by_the_tuning_of_its_controller():
    tuning = Tuning(margin_frac=(0.2, 0.3), rate_memory_s=3.0, hand_off_spare_frac=0.0)
    controller = CascadeController(FLEET, SLO, tuning=tuning)
    decision, _ = controller.decide(Observation(state=FleetState.idle(4)), controller.init())
    np.testing.assert_array_equal(decision.belief.ttft_margin_frac, 0.2)
    np.testing.assert_array_equal(decision.belief.itl_margin_frac, 0.3)
    assert TargetOptimiser(FLEET, SLO, tuning=tuning).margin_frac == (0.2, 0.3)
    governor = IterationGovernor(FLEET.instances[2], SLO, tuning=tuning)
    usual = IterationGovernor(FLEET.instances[2], SLO)
    state = (80, 3.5e4, 0, 0.0, 210.0, 1410.0)
    assert governor.step(*state) > usual.step(*state)


def test_a_longer_memory_forgets_less():
    def rate_req_s(tuning: Tuning) -> float:
        load = LoadFilter(FLEET, tuning=tuning)
        memory = load.init()
        for second in range(60):
            arrived_req = np.array([6.0, 6.0, 0.0, 0.0]) * (second < 30)
            state = replace(FleetState.idle(4), t_s=float(second), arrived_req=arrived_req)
            memory = load.update(Observation(state=state), memory)
        return load.load(memory).arrival_req_s

    assert rate_req_s(Tuning(rate_memory_s=5.0)) < rate_req_s(Tuning(rate_memory_s=40.0))


def test_a_larger_step_answers_a_miss_by_a_larger_margin():
    def itl_margin_frac(tuning: Tuning) -> float:
        headroom = HeadroomFilter(FLEET, SLO, tuning)
        missed = RequestBatch(
            request=[0], request_class=[0], prefill_instance=[0], decode_instance=[2],
            prompt_tok=[100.0], output_tok=[200.0], ttft_s=[0.1], itl_s=[0.1],
        )  # fmt: skip
        memory = headroom.update(headroom.init(), missed, running_req=1.0, feasible=True)
        return float(headroom.margins_frac(memory, (0.02, 0.035))[1])

    small, large = (itl_margin_frac(Tuning(miss_step_frac=step)) for step in (0.002, 0.008))
    assert 0.035 < small < large
