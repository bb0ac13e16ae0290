"""Depths of sleep in the plant: power, time and energy of getting in and out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import DEPTHS, Rest

A100 = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
#: What-if values, all different.
LADDER = {
    "deep_parked": Rest(power_w=40.0, wake_s=0.5, wake_j=7.0),
    "asleep": Rest(power_w=30.0, wake_s=2.0, wake_j=50.0, enter_s=1.0),
    "off": Rest(power_w=10.0, wake_s=10.0, wake_j=900.0, enter_s=3.0),
}
NOTHING = Workload(name="none", arrival_s=[], prompt_tok=[], output_tok=[], duration_s=1.0)
# A clock that settles at once and costs nothing, so that energy can be told by hand.
AT_ONCE = PlantSettings(actuation_s=0.0, settle_s=0.0)


def plant_of(workload: Workload = NOTHING, **rests) -> Plant:
    spec = FleetSpec.parse("1P2D", A100)
    fleet = FleetSpec(tuple(replace(one, **(rests or LADDER)) for one in spec.instances))
    return Plant(fleet, workload, AT_ONCE)


def tell(plant: Plant, depth, *, active: bool = False) -> None:
    """Park the last instance, this deep, or wake it."""
    share = np.array([1.0, 1.0, 0.0]) if not active else np.array([1.0, 0.5, 0.5])
    plant.apply(
        replace(
            Decision.highest(plant.fleet, t_s=plant.now_s),
            active=[True, True, active],
            route_frac=share,
            depth=("parked", "parked", depth),
        )
    )


def last_j(plant: Plant, until_s: float) -> float:
    before_j = plant.state().energy_j[2]
    plant.advance(until_s)
    return float(plant.state().energy_j[2] - before_j)


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_depth_draws_and_wakes_as_it_says(depth) -> None:
    plant = plant_of()
    rest = plant.fleet.instances[2].rest(depth)
    tell(plant, depth)
    slept_s = 20.0 - rest.enter_s
    assert last_j(plant, 20.0) == pytest.approx(60.0 * rest.enter_s + rest.power_w * slept_s)
    assert plant.state().power_w[2] == rest.power_w
    assert plant.read().ready_s.tolist() == [0.0, 0.0, rest.wake_s]
    tell(plant, depth, active=True)
    # A fleet whose parking changes nothing has nobody to wake.
    assert plant.instances["wakes"].tolist() == [0, 0, 0 if depth == "parked" else 1]
    assert plant.read().ready_s[2] == rest.wake_s
    assert last_j(plant, 20.0 + rest.wake_s) == pytest.approx(60.0 * rest.wake_s + rest.wake_j)
    assert plant.read().ready_s[2] == 0.0
    assert last_j(plant, 40.0) == pytest.approx(60.0 * (20.0 - rest.wake_s))


def test_who_is_woken_while_it_falls_asleep_gets_there_first() -> None:
    plant = plant_of()
    tell(plant, "off")
    plant.advance(1.0)
    assert plant.read().ready_s[2] == 2.0 + 10.0
    tell(plant, "off", active=True)
    assert last_j(plant, 13.0) == pytest.approx(60.0 * 12.0 + 900.0)
    assert plant.read().ready_s[2] == 0.0
    assert plant.state().power_w[2] == 60.0


def test_it_sinks_deeper_at_once_and_comes_up_by_waking() -> None:
    plant = plant_of()
    tell(plant, "deep_parked")
    plant.advance(5.0)
    tell(plant, "off")
    assert last_j(plant, 10.0) == pytest.approx(40.0 * 3.0 + 10.0 * 2.0)
    assert plant.instances["wakes"][2] == 0
    tell(plant, "deep_parked")
    assert last_j(plant, 20.0) == pytest.approx(60.0 * 10.0 + 900.0)
    assert last_j(plant, 21.0) == pytest.approx(40.0)
    assert plant.instances["wakes"][2] == 1
    # To a depth that changes nothing: it is simply awake again.
    tell(plant, "parked")
    assert last_j(plant, 22.0) == pytest.approx(60.0 + 7.0)
    assert plant.read().ready_s[2] == 0.0


def test_work_wakes_it_from_any_depth() -> None:
    load = make_workload("fixed", rate_req_s=20.0, duration_s=30.0, seed=0)
    plant = plant_of(load)
    tell(plant, "off")
    plant.advance(5.0)
    fleet = plant.fleet
    share = np.array([1.0, 0.0, 1.0])
    plant.apply(replace(Decision.highest(fleet), active=[True, True, True], route_frac=share))
    plant.advance(14.9)
    assert plant.instances["decoded_tok"][2] == 0
    plant.advance(60.0)
    assert plant.instances["decoded_tok"][2] > 0
    assert (plant.requests["state"] == layout.DONE).all()


class Sleeper:
    """What an empty instance does, told once more: a list of spans at a power each."""

    def __init__(self, instance) -> None:
        self.instance = instance
        self.spans = []  # (until, watts) that are still to come; the last never ends
        self.depth = None  # asleep, or on its way there
        self.energy_j = 0.0
        self.rest_w = 60.0

    def tell(self, now_s: float, depth) -> None:
        moving_s = self.spans[-1][0] - now_s if self.spans else 0.0
        rest = self.instance.rest(depth or "parked")
        held = None if self.depth is None else DEPTHS.index(self.depth)
        if held is not None and (depth is None or DEPTHS.index(depth) < held):
            slept = self.instance.rest(self.depth)
            wake_s = moving_s + slept.wake_s
            self.depth, self.rest_w = None, 60.0
            if wake_s == 0.0:
                self.energy_j += slept.wake_j
                self.spans = []
            else:
                self.spans = [(now_s + wake_s, 60.0 + slept.wake_j / wake_s)]
            self.wanted = depth
        elif depth is None or (held is not None and (self.spans or DEPTHS.index(depth) == held)):
            self.wanted = depth
        else:
            self.wanted = depth
            if held is None and self.spans:
                return  # it wakes first
            if rest == Rest(power_w=60.0):
                return
            if rest.enter_s:
                self.spans = [(now_s + rest.enter_s, self.rest_w)]
            self.depth, self.rest_w = depth, rest.power_w

    def run(self, now_s: float, until_s: float) -> None:
        while now_s < until_s:
            if not self.spans:
                self.energy_j += self.rest_w * (until_s - now_s)
                return
            end_s, power_w = self.spans[0]
            step_s = min(end_s, until_s)
            self.energy_j += power_w * (step_s - now_s)
            now_s = step_s
            if now_s == end_s:
                self.spans = []
                if self.depth is None and self.wanted is not None:
                    self.tell(now_s, self.wanted)


@given(st.lists(st.tuples(st.floats(0.05, 4.0), st.sampled_from([*DEPTHS, None])), max_size=12))
def test_energy_is_power_times_time_and_every_wake_is_paid_for(steps) -> None:
    """An empty instance, told to sleep and wake in any order; None wakes it."""
    plant = plant_of()
    twin = Sleeper(plant.fleet.instances[2])
    for span_s, depth in [*steps, (30.0, None)]:
        now_s = plant.now_s
        tell(plant, depth or "parked", active=depth is None)
        twin.tell(now_s, depth)
        plant.advance(now_s + span_s)
        twin.run(now_s, now_s + span_s)
        assert plant.state().energy_j[2] == pytest.approx(twin.energy_j)
    assert plant.state().power_w[2] == 60.0
    assert plant.read().ready_s[2] == 0.0


@given(
    st.lists(st.tuples(st.floats(0.1, 3.0), st.sampled_from([*DEPTHS, None])), max_size=8),
    st.integers(0, 3),
)
def test_nobody_is_lost_whatever_is_told(steps, seed: int) -> None:
    load = make_workload("fixed", rate_req_s=15.0, duration_s=6.0, seed=seed)
    plant = plant_of(load)
    for span_s, depth in steps:
        tell(plant, depth or "parked", active=depth is None)
        plant.advance(plant.now_s + span_s)
    plant.advance(plant.now_s + 60.0)
    assert (plant.requests["state"] == layout.DONE).all()
    assert plant.instances["kv_tok"].tolist() == [0, 0, 0]
