"""Who serves, wakes, drains and sleeps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voltana_ctrl import FleetSpec, FleetState, load_profile
from voltana_ctrl.control.standby import Standby
from voltana_ctrl.control.supply import supply_of

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")


def sleepy(text="2P3D", wake_s=10.0):
    fleet = FleetSpec.parse(text, PROFILE)
    return FleetSpec(
        tuple(dataclasses.replace(one, asleep_w=20.0, wake_s=wake_s) for one in fleet.instances)
    )


FLEET = sleepy()
STANDBY = Standby(FLEET, [FLEET.prefill, FLEET.decode], [0, 1])
SUPPLIES = [supply_of([most], [100.0], facets=1) for most in (40.0, 25.0)]


def state(t_s=0.0, running=(0, 0, 0, 0, 0), alive=None):
    at = dataclasses.replace(
        FleetState.idle(5, t_s=t_s), running_req=np.array(running, dtype=np.float64)
    )
    return at if alive is None else dataclasses.replace(at, alive=np.array(alive))


def test_what_is_parked_drains_then_sleeps_and_takes_its_time_to_wake():
    memory = STANDBY.order(STANDBY.init(), state(), [1, 1])
    busy = state(1.0, (0, 0, 9, 9, 9))
    assert memory.on.tolist() == [True, False, True, False, False]
    assert STANDBY.look(memory, busy).asleep.tolist() == [False, True, False, False, False]
    memory = STANDBY.look(memory, state(2.0, (0, 0, 9, 9, 0)))
    assert memory.asleep.tolist() == [False, True, False, False, True]
    # What still drains is back at once, and is taken first.
    memory = STANDBY.order(memory, state(3.0, (0, 0, 9, 9, 0)), [1, 2])
    assert STANDBY.serving(memory, state(3.0)).tolist() == [True, False, True, True, False]
    memory = STANDBY.order(memory, state(4.0, (0, 0, 9, 9, 0)), [2, 3])
    assert memory.on.all()
    assert STANDBY.serving(memory, state(13.9)).tolist() == [True, False, True, True, False]
    assert STANDBY.serving(memory, state(14.0)).all()


def test_the_emptiest_is_parked():
    memory = STANDBY.order(STANDBY.init(), state(0.0, (0, 0, 30, 5, 40)), [2, 2])
    assert memory.on.tolist() == [True, True, True, False, True]


def test_what_wakes_is_stopped_before_what_serves():
    memory = STANDBY.look(STANDBY.order(STANDBY.init(), state(), [1, 1]), state())
    memory = STANDBY.order(memory, state(5.0), [1, 2])
    memory = STANDBY.order(memory, state(6.0), [1, 1])
    assert memory.on.tolist() == [True, False, True, False, False]


def test_another_takes_the_place_of_what_dies():
    memory = STANDBY.look(STANDBY.order(STANDBY.init(), state(), [1, 1]), state())
    dead = state(5.0, alive=[True, True, False, True, True])
    needed = STANDBY.enough(dead, SUPPLIES, lambda lead_s: np.array([10.0, 20.0]))
    memory = STANDBY.order(memory, dead, needed)
    assert memory.on.tolist() == [True, False, True, True, False]
    assert STANDBY.serving(memory, dead).tolist() == [True, False, False, False, False]
    assert STANDBY.serving(memory, dataclasses.replace(dead, t_s=15.0)).sum() == 2


@pytest.mark.parametrize(
    ("reserve", "needed"),
    [((0.0, 0.0), [1, 1]), ((40.0, 25.0), [1, 1]), ((41.0, 26.0), [2, 2]), ((1e9, 60.0), [2, 3]),
     ((np.inf, np.inf), [2, 3])],
)  # fmt: skip
def test_enough_holds_the_reserve_and_no_more(reserve, needed):
    found = STANDBY.enough(state(), SUPPLIES, lambda lead_s: np.array(reserve))
    assert found.tolist() == needed


@pytest.mark.parametrize(
    ("spare", "needed"), [(0.0, [1, 1]), (1.0, [2, 2]), (2.0, [2, 3]), (0.3, [2, 2])]
)
def test_so_many_more_are_on_as_may_be_lost(spare, needed):
    found = STANDBY.enough(state(), SUPPLIES, lambda lead_s: np.array([40.0, 25.0]), spare)
    assert found.tolist() == needed


@given(
    wanted=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=8),
    data=st.data(),
)
@settings(max_examples=50)
def test_as_many_are_on_as_were_ordered_and_the_dead_besides(wanted, data):
    memory = STANDBY.init()
    for k, counts in enumerate(wanted):
        alive = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
        running = data.draw(st.lists(st.integers(0, 3), min_size=5, max_size=5))
        now = state(float(k), running, alive)
        memory = STANDBY.order(STANDBY.look(memory, now), now, counts)
        for group, count in zip(STANDBY.groups, counts, strict=True):
            living = now.alive[group]
            assert memory.on[group][living].sum() == min(count, living.sum())
            assert memory.on[group][~living].all()
        assert not np.any(memory.asleep & memory.on)
