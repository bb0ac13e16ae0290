"""Blocks of the policy and of the highest clock alternate in an order drawn per pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_gpus import fleet
from voltana_ctrl import ConfigError, FleetState, Observation, PowerBudget
from voltana_ctrl.control import StaticController
from voltana_ctrl.savings.switchback import (
    AGE_NOTE,
    BLOCK_NOTE,
    LENGTH_NOTE,
    POLICY_NOTE,
    SwitchbackController,
    at_policy,
)


def walk(controller, times_s):
    memory = controller.init()
    for t_s in times_s:
        observation = Observation(state=FleetState.idle(2, t_s=t_s))
        decision, memory = controller.decide(observation, memory)
        yield decision, controller.notes(memory)


@given(pair=st.integers(0, 10_000), seed=st.integers(0, 2**31))
def test_every_pair_holds_both(pair, seed):
    assert at_policy(2 * pair, seed) != at_policy(2 * pair + 1, seed)


def test_order_is_a_fair_coin():
    first = [at_policy(2 * pair, seed=0) for pair in range(4000)]
    assert abs(np.mean(first) - 0.5) < 0.03
    runs = np.mean(np.array(first[1:]) == np.array(first[:-1]))
    assert abs(runs - 0.5) < 0.03, "neighbouring pairs must not know of each other"


def test_clocks_and_marks_follow_the_blocks():
    controller = SwitchbackController(StaticController(fleet(), 1005), block_s=10.0, seed=3)
    times_s = 100.0 + np.arange(0.0, 200.0, 0.5)
    for t_s, (decision, notes) in zip(times_s, walk(controller, times_s), strict=True):
        block = int((t_s - 100.0) // 10.0)
        assert notes[BLOCK_NOTE] == block
        assert notes[POLICY_NOTE] == at_policy(block, 3)
        assert notes[LENGTH_NOTE] == 10.0
        assert notes[AGE_NOTE] == pytest.approx(t_s - 100.0 - 10.0 * block)
        assert decision.freq_mhz.tolist() == [1005.0 if notes[POLICY_NOTE] else 1410.0] * 2


def test_power_budget_holds_in_blocks_at_the_highest_clock():
    budget = PowerBudget.parse("500")
    controller = SwitchbackController(
        StaticController(fleet(), 705), block_s=10.0, power_budget=budget
    )
    highest = [
        decision.freq_max_mhz.max()
        for decision, notes in walk(controller, np.arange(0.0, 40.0, 1.0))
        if not notes[POLICY_NOTE]
    ]
    assert max(highest) < 1410.0


def test_notes_of_the_policy_stay():
    class Telling(StaticController):
        def notes(self, memory):
            return {"margin": 0.25}

    controller = SwitchbackController(Telling(fleet(), 1005), block_s=10.0)
    (_, notes), *_ = walk(controller, [0.0])
    assert notes["margin"] == 0.25


@pytest.mark.parametrize(("block_s", "seed"), [(0.5, 0), (0.0, 0), (float("nan"), 0), (60.0, -1)])
def test_what_cannot_be_a_switchback_is_refused(block_s, seed):
    with pytest.raises(ConfigError, match="SwitchbackController"):
        SwitchbackController(StaticController(fleet(), 1005), block_s=block_s, seed=seed)
