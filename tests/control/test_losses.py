"""Who was lost, and who was only silent."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import FleetState
from voltana_ctrl.control import losses


@given(
    steps=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=12),
    held_req=st.integers(1, 80),
)
def test_who_was_silent_for_a_while_was_never_lost(steps, held_req):
    """An engine of which nothing is heard, and which then has all that it had, has lost nothing."""
    busy = replace(FleetState.idle(3), running_req=np.full(3, float(held_req)))
    memory = losses.after(losses.LossMemory(), busy, 30.0)
    for k, alive in enumerate(steps):
        seen = replace(busy, t_s=float(k), alive=np.array(alive))
        memory = losses.after(memory, seen, 30.0)
        assert (memory.lost_s > -np.inf) == (not all(alive))
    memory = losses.after(memory, replace(busy, t_s=20.0), 30.0)
    assert memory.lost_s == memory.hurries_s == -np.inf


def test_a_silence_takes_nothing_away_from_a_loss_before_it():
    busy = replace(FleetState.idle(3), running_req=np.full(3, 40.0))
    memory = losses.after(losses.LossMemory(), busy, 15.0)
    # Who comes back empty was lost; then nothing is heard of it once more.
    for t_s, alive, left in ((30.0, False, 1.0), (31.0, True, 0.0), (32.0, True, 1.0),
                             (33.0, False, 1.0), (34.0, True, 1.0)):  # fmt: skip
        seen = replace(busy, t_s=t_s, alive=np.array([True, alive, True]))
        seen = replace(seen, running_req=busy.running_req * [1.0, left, 1.0])
        memory = losses.after(memory, seen, 15.0)
    assert (memory.lost_s, memory.hurries_s) == (30.0, 45.0)


def test_who_comes_back_after_longer_than_a_request_stays_was_lost():
    """What runs there by then is new, however much it is."""
    busy = replace(FleetState.idle(2), running_req=np.ones(2))
    memory = losses.after(losses.LossMemory(), busy, 15.0)
    for t_s, alive in ((10.0, False), (24.0, False), (25.0, True)):
        seen = replace(busy, t_s=t_s, alive=np.array([True, alive]))
        memory = losses.after(memory, seen, 15.0)
    assert (memory.lost_s, memory.hurries_s) == (10.0, 25.0)
