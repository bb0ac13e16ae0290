"""What goes wrong in the plant: against its slow twin, and what must hold whatever happens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.naive_plant import NaivePlant, ecofreq_of
from tests.sim.test_plant import (
    REFERENCE,
    TIGHT,
    assert_empty,
    build,
    decisions,
    energies,
    fleets,
    ladders,
    plant_settings,
    reference_run,
    workloads,
)
from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.faults import ClockClamp, Failure, FaultSchedule, Slowdown, read_faults
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload

INSIDE = (layout.ROUTING, layout.QUEUED, layout.HANDOFF, layout.MOVING, layout.WAITING,
          layout.RUNNING)  # fmt: skip


@st.composite
def sleepy_fleets(draw) -> FleetSpec:
    """Fleets whose parked instances may sleep: cheaper, slow or costly to wake, or all of it."""
    return FleetSpec(
        tuple(
            dataclasses.replace(
                one,
                asleep_w=draw(st.sampled_from([None, 20.0])),
                wake_s=draw(st.sampled_from([0.0, 0.0, 0.15])),
                wake_j=draw(st.sampled_from([0.0, 7.0])),
            )
            for one in draw(fleets()).instances
        )
    )


# Ends of one fault are often those of another, or of a decision.
times_s = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), st.floats(0.0, 1.5))


@st.composite
def fault_lists(draw, fleet: FleetSpec, most: int = 4) -> list:
    faults = []
    for _ in range(draw(st.integers(0, most))):
        from_s = draw(times_s)
        span = {
            "instance": draw(st.sampled_from(fleet.ids)),
            "from_s": from_s,
            "until_s": from_s + draw(st.sampled_from([0.01, 0.1, 0.5, 2.0])),
        }
        kind = draw(st.sampled_from([Failure, Failure, Slowdown, ClockClamp]))
        if kind is Slowdown:
            span["slow_frac"] = draw(st.sampled_from([1.0, 1.3, 4.0]))
        elif kind is ClockClamp:
            span["clamp_mhz"] = draw(st.floats(210.0, 1500.0))
        faults.append(kind(**span))
    return faults


@st.composite
def scenes(draw):
    """As of the engine's tests, with sleep and faults."""
    fleet = draw(sleepy_fleets())
    settings, ladder = draw(plant_settings), draw(ladders)
    when_s = (0.0, *draw(st.lists(st.floats(0.05, 1.0), max_size=3).map(sorted)))
    orders = [(t_s, draw(decisions(fleet))) for t_s in when_s]
    return fleet, draw(workloads), settings, ladder, orders, draw(fault_lists(fleet))


# ---- the twin -----------------------------------------------------------------------------


@given(scene=scenes())
def test_agrees_with_the_twin(scene) -> None:
    fleet, workload, settings, ladder, orders, faults = scene
    plant = build(fleet, workload, settings, ladder, TIGHT, faults=faults)
    twin = NaivePlant(
        fleet,
        workload,
        actuation_s=settings.actuation_s,
        settle_s=settings.settle_s,
        decode_at_arrival=settings.decode_at_arrival,
        govern=None if ladder is None else ecofreq_of(ladder, TIGHT),
        idle_call_s=5.0,
        faults=faults,
    )
    for t_s, decision in orders:
        for one in (plant, twin):
            if t_s > 0.0:
                one.advance(t_s)
            one.apply(decision)
    for t_s in (1.2, 400.0):
        plant.advance(t_s)
        twin.advance(t_s)
        np.testing.assert_allclose(energies(plant), twin.energies(), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(plant.instances["kv_tok"], [i.kv for i in twin.instances])
        np.testing.assert_array_equal(plant.instances["alive"], [i.alive for i in twin.instances])
    rows = plant.requests
    for r in twin.requests:
        assert (rows["state"][r.number] == layout.DROPPED) == r.dropped
        assert rows["preemptions"][r.number] == r.preemptions
        assert rows["retries"][r.number] == r.retries
        if not r.dropped:
            assert rows["first_s"][r.number] == pytest.approx(r.first_s, rel=1e-9)
            assert rows["done_s"][r.number] == pytest.approx(r.done_s, rel=1e-9)
            assert rows["prefill_at"][r.number] == r.prefill_at
    for i, one in enumerate(twin.instances):
        inst = plant.instances[i]
        assert inst["iterations"] == one.iterations
        assert inst["clock_k"] == one.clock
        assert inst["lost_tok"] == one.lost
        assert inst["wakes"] == one.wakes
        assert inst["running_req_s"] == pytest.approx(one.running_req_s, rel=1e-9)
    assert_empty(plant)


# ---- what must hold whatever happens ------------------------------------------------------


def in_flight_tok(plant: Plant) -> int:
    """Output tokens made so far of what is neither done nor dropped."""
    rows = plant.requests[np.isin(plant.requests["state"], INSIDE)]
    made = rows["made_tok"].copy()
    running = rows["state"] == layout.RUNNING
    steps = plant.instances["step"][rows["decode_at"][running]]
    made[running] += steps - rows["join_step"][running]
    return int(made.sum())


@given(scene=scenes(), step_s=st.floats(0.01, 0.3))
def test_requests_tokens_and_energy_conserve(scene, step_s: float) -> None:
    fleet, workload, settings, ladder, orders, faults = scene
    plant = build(fleet, workload, settings, ladder, TIGHT, faults=faults)
    schedule = FaultSchedule(fleet, faults)
    plant.apply(orders[0][1])
    before_j = energies(plant)
    for k in range(12):
        plant.advance(step_s * k)
        alive, slow_frac, clamp_k = schedule.at(plant.now_s)
        inst, rows, state = plant.instances, plant.requests, plant.state()
        np.testing.assert_array_equal(state.alive, alive)
        np.testing.assert_array_equal(inst["slow_frac"], slow_frac)
        # Requests: each in one place, and none on the dead.
        which = rows["state"]
        arrived = (which != layout.FUTURE).sum()
        inside = np.isin(which, INSIDE).sum()
        gone = np.isin(which, [layout.DONE, layout.DROPPED]).sum()
        assert arrived == inside + gone
        for name in ("kv_tok", "running_req", "prefill_req", "wait_req", "iterating"):
            assert not inst[name][~alive].any(), name
        waiting, queued = which == layout.WAITING, which == layout.QUEUED
        assert (state.queue_req.sum()) == waiting.sum() + queued.sum()
        assert inst["running_req"].sum() == (which == layout.RUNNING).sum()
        np.testing.assert_array_equal(inst["wait_tok"].sum(), rows["prompt_tok"][waiting].sum())
        assert np.all(state.kv_used_tok <= fleet.kv_capacity_tok)
        # Tokens: what was made is with the client, under way or lost.
        done_tok = rows["output_tok"][which == layout.DONE].sum()
        assert inst["emitted_tok"].sum() == done_tok + in_flight_tok(plant) + inst["lost_tok"].sum()
        # Energy: never falls, its parts are all there is, and the dead draw none.
        after_j = energies(plant)
        assert np.all(after_j >= before_j)
        np.testing.assert_allclose(state.energy_j, after_j.sum(axis=1), rtol=1e-12)
        assert not state.power_w[~alive].any()
        before_j = after_j
        # Clocks: never above the clamp.
        clamp_mhz = [one.clocks_mhz[k] for one, k in zip(fleet.instances, clamp_k, strict=True)]
        assert np.all(state.freq_mhz <= clamp_mhz)
    plant.advance(500.0)  # every fault ends
    assert np.isin(plant.requests["state"], [layout.DONE, layout.DROPPED]).all()
    assert_empty(plant)
    done = plant.requests[plant.requests["state"] == layout.DONE]
    assert np.all(done["arrival_s"] < done["first_s"])
    assert np.all(done["first_s"] <= done["done_s"])
    inst = plant.instances
    assert inst["emitted_tok"].sum() == done["output_tok"].sum() + inst["lost_tok"].sum()
    assert plant.judged[1] == 0
    assert (inst["lost_tok"].sum() > 0) <= (plant.requests["retries"].sum() > 0)


@given(scene=scenes())
def test_equal_runs_and_runs_in_pieces_are_equal(scene) -> None:
    fleet, workload, settings, ladder, orders, faults = scene
    plants = [build(fleet, workload, settings, ladder, TIGHT, faults=faults) for _ in range(3)]
    for plant in plants:
        plant.apply(orders[0][1])
    for t_s in np.linspace(0.0, 3.0, 41):
        plants[2].advance(float(t_s))
        plants[2].state()
    for plant in plants:
        plant.advance(40.0)
        plant.state()
    first, again, pieces = plants
    assert first.requests.tobytes() == again.requests.tobytes()
    assert first.instances.tobytes() == again.instances.tobytes()
    for name in first.requests.dtype.names:
        np.testing.assert_array_equal(first.requests[name], pieces.requests[name])
    np.testing.assert_allclose(energies(first), energies(pieces), rtol=1e-12)


def test_no_faults_is_no_change() -> None:
    """Not one bit: a fault on nobody's time, and sleep that makes no difference."""
    plain = reference_run(until_s=10.0)
    spec = plain.fleet
    named = FleetSpec(
        tuple(dataclasses.replace(one, asleep_w=REFERENCE.idle_w) for one in spec.instances)
    )
    other = build(
        named, plain.workload, plain.settings, list(REFERENCE.clocks_mhz),
        faults=[Failure(instance="decode-0", from_s=1e6)],
    )  # fmt: skip
    other.apply(Decision.highest(named))
    for plant in (plain, other):
        plant.advance(30.0)
    assert plain.requests.tobytes() == other.requests.tobytes()
    np.testing.assert_array_equal(energies(plain), energies(other))


# ---- failures -----------------------------------------------------------------------------


def steady(fleet: str = "2P2D", **options) -> Plant:
    spec = options.pop("spec", None) or FleetSpec.parse(fleet, REFERENCE)
    rate_req_s = options.pop("rate_req_s", 20.0)
    workload = make_workload("sharegpt", rate_req_s=rate_req_s, duration_s=40.0, seed=0)
    plant = Plant(spec, workload, **options)
    plant.apply(Decision.highest(spec))
    return plant


@pytest.mark.parametrize("dead", ["prefill-1", "decode-0"])
def test_one_of_two_fails_and_comes_back(dead: str) -> None:
    plant = steady(rate_req_s=75.0, faults=[Failure(instance=dead, from_s=5.0, until_s=12.0)])
    i = plant.fleet.ids.index(dead)
    plant.advance(5.0 - 1e-9)
    rows = plant.requests
    there = rows["state"] == layout.RUNNING
    if i < 2:
        there = np.isin(rows["state"], [layout.QUEUED, layout.MOVING, layout.WAITING])
    there &= rows["prefill_at" if i < 2 else "decode_at"] == i
    assert there.any()
    plant.advance(5.0)
    state = plant.read().state
    assert not state.alive[i]
    assert state.power_w[i] == state.queue_req[i] == state.running_req[i] == 0.0
    energy_j, iterations = state.energy_j[i], plant.instances["iterations"][i]
    for t_s in np.arange(5.5, 12.0, 0.5):
        plant.advance(t_s)
        state = plant.read().state
        assert state.arrived_req[i] == 0
        assert state.energy_j[i] == energy_j
    assert plant.instances["iterations"][i] == iterations
    plant.advance(15.0)
    state = plant.read().state
    assert state.alive[i]
    assert state.arrived_req[i] > 0
    plant.advance(90.0)
    assert (plant.requests["state"] == layout.DONE).all()
    # Those that were there began anew, and nobody else.
    np.testing.assert_array_equal(plant.requests["retries"], there)


def test_a_client_keeps_its_first_token_and_waits_for_the_next() -> None:
    """One request of 200 tokens; its decode instance is gone half way and another goes on."""
    fleet = FleetSpec.parse("1P2D", REFERENCE)
    workload = Workload(
        name="one", arrival_s=[0.0], prompt_tok=[1000], output_tok=[200], duration_s=1.0
    )
    smooth = Plant(fleet, workload)
    smooth.advance(60.0)
    begun_s, ended_s = smooth.requests[["first_s", "done_s"]][0]
    half_s = 0.5 * (begun_s + ended_s)
    at = fleet.ids[smooth.requests["decode_at"][0]]
    plant = Plant(fleet, workload, faults=[Failure(instance=at, from_s=half_s)])
    plant.advance(60.0)
    r = plant.requests[0]
    assert r["retries"] == 1
    assert r["decode_at"] != smooth.requests["decode_at"][0]
    assert r["first_s"] == begun_s
    # The prompt is computed and travels once more, and all 200 tokens are made again.
    assert r["done_s"] == pytest.approx(half_s + ended_s, rel=1e-9)
    assert plant.instances["prefilled_tok"].sum() == 2000
    lost = plant.instances["lost_tok"].sum()
    assert 95 < lost < 105
    assert plant.instances["emitted_tok"].sum() == 200 + lost


def test_what_still_lies_at_prefill_is_only_routed_anew() -> None:
    """KV that is under way to the failed instance is sent once more, not computed again."""
    slow = dataclasses.replace(REFERENCE, link_latency_s=1.0)
    fleet = FleetSpec.parse("1P2D", slow)
    workload = Workload(
        name="one", arrival_s=[0.0], prompt_tok=[1000], output_tok=[20], duration_s=1.0
    )
    smooth = Plant(fleet, workload)
    smooth.advance(60.0)
    begun_s, ended_s = smooth.requests[["first_s", "done_s"]][0]
    at = fleet.ids[smooth.requests["decode_at"][0]]
    fails_s = begun_s + 0.4
    plant = Plant(fleet, workload, faults=[Failure(instance=at, from_s=fails_s)])
    plant.advance(60.0)
    r = plant.requests[0]
    assert r["retries"] == 0
    assert plant.instances["prefilled_tok"].sum() == 1000
    assert plant.instances["lost_tok"].sum() == 0
    assert r["done_s"] == pytest.approx(ended_s + 0.4, rel=1e-9)


def test_a_preempted_request_is_where_it_decodes() -> None:
    """It waits in a prefill queue of the decode instance; where it was prefilled matters not."""
    fleet = FleetSpec.parse("2P1D", dataclasses.replace(REFERENCE, kv_capacity_tok=400))
    workload = Workload(
        name="crowd",
        arrival_s=np.arange(12) * 0.02,
        prompt_tok=np.full(12, 60),
        output_tok=np.full(12, 150),
        duration_s=10.0,
    )
    smooth = Plant(fleet, workload)
    queued = made = np.zeros(12, dtype=bool)
    while not (queued & made).any():
        smooth.advance(smooth.now_s + 0.005)
        queued = smooth.requests["state"] == layout.QUEUED
        made = smooth.requests["made_tok"] > 0
    r = int(np.flatnonzero(queued & made)[0])
    fails_s, prefilled_at = smooth.now_s, int(smooth.requests["prefill_at"][r])
    for dead, retries in ((prefilled_at, 0), (2, 1)):
        fault = Failure(instance=fleet.ids[dead], from_s=fails_s, until_s=fails_s + 1.0)
        plant = Plant(fleet, workload, faults=[fault])
        plant.advance(200.0)
        assert (plant.requests["state"] == layout.DONE).all()
        assert plant.requests["retries"][r] == retries
        assert_empty(plant)


@pytest.mark.parametrize(
    ("dead", "tokens_before"),
    [(("prefill-0", "prefill-1"), 0), (("decode-0", "decode-1"), 1)],
)
@pytest.mark.parametrize("early", [False, True])
def test_while_a_phase_is_dead_requests_are_held_back(dead, tokens_before, early) -> None:
    plant = steady(
        settings=PlantSettings(decode_at_arrival=early),
        faults=[Failure(instance=one, from_s=0.0, until_s=10.0) for one in dead],
    )
    plant.advance(10.0 - 1e-9)
    assert (
        plant.instances["emitted_tok"].sum()
        == tokens_before
        * (plant.instances["prefilled_tok"].sum() > 0)
        * (plant.requests["made_tok"] > 0).sum()
    )
    assert (plant.instances["emitted_tok"].sum() > 0) == (tokens_before > 0 and not early)
    assert not plant.read().state.queue_req[~plant.state().alive].any()
    plant.advance(200.0)
    assert (plant.requests["state"] == layout.DONE).all()
    assert plant.requests["retries"].sum() == 0


def test_nobody_left_for_ever_keeps_all_in_flight() -> None:
    plant = steady("1P1D", faults=[Failure(instance="decode-0", from_s=5.0)])
    plant.advance(300.0)
    which = plant.requests["state"]
    assert not np.isin(which, [layout.RUNNING, layout.MOVING, layout.WAITING]).any()
    assert (which == layout.DONE).sum() > 10
    assert (which == layout.HANDOFF).sum() > 10
    assert plant.instances["iterating"].sum() == 0


# ---- slow-downs and clamps ----------------------------------------------------------------


def test_a_slowdown_acts_on_what_is_left_of_an_iteration() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = Workload(
        name="one", arrival_s=[0.0], prompt_tok=[8000], output_tok=[1], duration_s=1.0
    )
    smooth = Plant(fleet, workload)
    smooth.advance(10.0)
    took_s = smooth.requests["done_s"][0]
    third_s = took_s / 3.0
    slow = Slowdown(instance="prefill-0", slow_frac=2.0, from_s=third_s, until_s=2.0 * third_s)
    plant = Plant(fleet, workload, faults=[slow])
    plant.advance(10.0)
    # A third at pace, a sixth in the slow third, half at pace.
    assert plant.requests["done_s"][0] == pytest.approx(took_s * (2.0 / 3.0 + 0.5), rel=1e-9)
    busy_w = smooth.instances["prefill_j"][0] / smooth.instances["busy_s"][0]
    assert plant.instances["prefill_j"][0] == pytest.approx(
        busy_w * plant.instances["busy_s"][0], rel=1e-9
    )


def test_a_clamp_is_silent_and_shows_in_readings() -> None:
    plant = steady(
        faults=[ClockClamp(instance="decode-0", clamp_mhz=1000.0, from_s=4.0, until_s=8.0)]
    )
    sets = plant.instances["clock_sets"].copy()
    for t_s, expected_mhz in ((3.9, 1410.0), (4.0, 990.0), (7.9, 990.0), (8.0, 1410.0)):
        plant.advance(t_s)
        assert plant.state().freq_mhz[2] == expected_mhz
        assert plant.state().freq_mhz[3] == 1410.0
    np.testing.assert_array_equal(plant.instances["clock_sets"], sets)
    # A set above the clamp changes nothing, one below it does.
    again = steady(faults=[ClockClamp(instance="decode-0", clamp_mhz=1000.0, from_s=0.0)])
    for floor_mhz, expected_mhz in ((1200.0, 990.0), (600.0, 600.0)):
        again.apply(Decision.highest(again.fleet, floor_mhz=[1410.0, 1410.0, floor_mhz, 1410.0]))
        again.advance(again.now_s + 2.0)
        assert again.state().freq_mhz[2] == expected_mhz


def test_overlaps_multiply_and_take_the_lowest() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    schedule = FaultSchedule(fleet, [
        Slowdown(instance="decode-0", slow_frac=2.0, from_s=0.0, until_s=10.0),
        Slowdown(instance="decode-0", slow_frac=1.5, from_s=5.0),
        ClockClamp(instance="decode-0", clamp_mhz=900.0, from_s=5.0, until_s=7.0),
        ClockClamp(instance="decode-0", clamp_mhz=1200.0, from_s=6.0, until_s=8.0),
        Failure(instance="prefill-0", from_s=1.0, until_s=3.0),
        Failure(instance="prefill-0", from_s=2.0, until_s=4.0),
    ])  # fmt: skip
    assert schedule.edges_s == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
    ladder = fleet.instances[1].clocks_mhz
    for t_s, alive, slow_frac, clamp_mhz in (
        (0.0, True, 2.0, 1410.0), (1.0, False, 2.0, 1410.0), (3.5, False, 2.0, 1410.0),
        (4.0, True, 2.0, 1410.0), (6.5, True, 3.0, 900.0), (7.0, True, 3.0, 1200.0),
        (8.0, True, 3.0, 1410.0), (10.0, True, 1.5, 1410.0), (1e9, True, 1.5, 1410.0),
    ):  # fmt: skip
        lives, slow, clamp_k = schedule.at(t_s)
        assert lives.tolist() == [alive, True]
        assert slow.tolist() == [1.0, slow_frac]
        assert ladder[clamp_k[1]] == clamp_mhz
    assert schedule.saved_w(0.0, 10.0) == pytest.approx(REFERENCE.idle_w * 0.3)
    assert schedule.saved_w(2.0, 3.0) == pytest.approx(REFERENCE.idle_w)


# ---- sleep --------------------------------------------------------------------------------


def sleepy(wake_s: float = 2.0, wake_j: float = 500.0, asleep_w: float | None = 15.0) -> Plant:
    spec = FleetSpec.parse("1P2D", REFERENCE)
    fleet = FleetSpec(
        tuple(
            dataclasses.replace(one, asleep_w=asleep_w, wake_s=wake_s, wake_j=wake_j)
            for one in spec.instances
        )
    )
    return steady(spec=fleet)


def parking(plant: Plant, *active: bool) -> Decision:
    share = np.array(active, dtype=float)
    share[1:] /= share[1:].sum()
    return dataclasses.replace(Decision.highest(plant.fleet), active=active, route_frac=share)


def test_a_parked_instance_drains_sleeps_and_takes_its_time_to_wake() -> None:
    plant = sleepy()
    plant.advance(3.0)
    plant.apply(parking(plant, True, True, False))
    assert plant.state().running_req[2] > 0
    plant.advance(29.0)
    state = plant.read().state
    assert state.running_req[2] == 0
    assert state.power_w[2] == 15.0
    plant.apply(parking(plant, True, True, True))
    idle_j = plant.state().energy_j[2]
    for t_s, power_w in ((29.0, REFERENCE.idle_w + 250.0), (30.9, REFERENCE.idle_w + 250.0)):
        plant.advance(t_s)
        state = plant.read().state
        assert state.power_w[2] == power_w
        assert state.arrived_req[2] == 0  # the other is awake
    plant.advance(31.0)
    assert plant.state().energy_j[2] - idle_j == pytest.approx(2.0 * REFERENCE.idle_w + 500.0)
    plant.advance(32.0)
    assert plant.read().state.arrived_req[2] > 0
    assert plant.instances["wakes"].tolist() == [0, 0, 1]


def test_work_wakes_whom_it_comes_to() -> None:
    """Both parked, the awake one dies: the sleeping one is all there is, and wakes for it."""
    fleet = FleetSpec(
        tuple(
            dataclasses.replace(one, wake_s=2.0, wake_j=500.0, asleep_w=0.0)
            for one in FleetSpec.parse("1P2D", REFERENCE).instances
        )
    )
    plant = steady(spec=fleet, faults=[Failure(instance="decode-0", from_s=5.0)])
    plant.apply(parking(plant, True, True, False))
    plant.advance(5.0 - 1e-9)
    assert plant.state().power_w[2] == 0.0
    plant.advance(6.9)
    assert plant.state().queue_req[2] > 10
    assert plant.instances["decoded_tok"][2] == 0
    plant.advance(9.0)
    assert plant.instances["decoded_tok"][2] > 0
    assert plant.instances["wakes"].tolist() == [0, 0, 1]
    plant.advance(120.0)
    assert (plant.requests["state"] == layout.DONE).all()


def test_waking_at_once_costs_its_energy_at_once() -> None:
    plant = sleepy(wake_s=0.0, wake_j=40.0, asleep_w=None)
    plant.apply(parking(plant, True, True, False))
    plant.advance(1.0)
    assert plant.state().power_w[2] == REFERENCE.idle_w
    before_j = plant.state().energy_j[2]
    plant.apply(parking(plant, True, True, True))
    assert plant.state().energy_j[2] - before_j == pytest.approx(40.0)


# ---- what is refused ----------------------------------------------------------------------


def test_refuses_what_cannot_be() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    for kind, more in (
        (Failure, {}), (Slowdown, {"slow_frac": 2.0}), (ClockClamp, {"clamp_mhz": 900.0}),
    ):  # fmt: skip
        for span in (
            {"from_s": -1.0}, {"from_s": float("nan")}, {"from_s": float("inf")},
            {"from_s": 5.0, "until_s": 5.0}, {"from_s": 5.0, "until_s": 4.0},
            {"from_s": 5.0, "until_s": float("nan")}, {"from_s": True}, {"from_s": "1"},
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=rf"{kind.__name__}\.(from|until)_s"):
                kind(instance="decode-0", **more, **span)
        with pytest.raises(ConfigError, match=r"number 1.*prefill-0, decode-0.*'decode-7'"):
            Plant(
                fleet,
                make_workload("fixed", rate_req_s=1.0, duration_s=1.0, seed=0),
                faults=[kind(instance="decode-7", from_s=0.0, **more)],
            )
    for bad in (0.5, 0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="slow_frac"):
            Slowdown(instance="decode-0", from_s=0.0, slow_frac=bad)
    with pytest.raises(ConfigError, match="at least 210"):
        FaultSchedule(fleet, [ClockClamp(instance="decode-0", from_s=0.0, clamp_mhz=200.0)])
    with pytest.raises(ConfigError, match="expected Failure, Slowdown or ClockClamp"):
        FaultSchedule(fleet, ["decode-0"])


def test_refuses_sleep_that_makes_no_sense() -> None:
    one = FleetSpec.parse("1P1D", REFERENCE).instances[0]
    for name in ("asleep_w", "wake_s", "wake_j"):
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=name):
                dataclasses.replace(one, **{name: bad})
    with pytest.raises(ConfigError, match="at most 70, its idle_w, got 71"):
        dataclasses.replace(one, asleep_w=71.0)
    assert dataclasses.replace(one, idle_w=40.0).parked_w == 40.0
    assert dataclasses.replace(one, asleep_w=5.0).parked_w == 5.0


def test_reads_faults_and_names_what_does_not_fit(tmp_path) -> None:
    path = tmp_path / "faults.toml"
    path.write_text(
        "[[failure]]\ninstance = 'a'\nfrom_s = 1\nuntil_s = inf\n"
        "[[failure]]\ninstance = 'b'\nfrom_s = 2.5\nuntil_s = 3\n"
        "[[slowdown]]\ninstance = 'a'\nfrom_s = 1\nslow_frac = 2\n"
        "[[clock_clamp]]\ninstance = 'a'\nfrom_s = 1\nclamp_mhz = 900\n"
    )
    assert read_faults(path) == (
        Failure(instance="a", from_s=1),
        Failure(instance="b", from_s=2.5, until_s=3),
        Slowdown(instance="a", slow_frac=2, from_s=1),
        ClockClamp(instance="a", clamp_mhz=900, from_s=1),
    )
    for text, words in (
        ("", "got none"),
        ("[[crash]]\n", "'crash'"),
        ("failure = 1\n", "'failure'"),
        ("failure = []\n", "'failure'"),
        ("failure = [1]\n", "failure 1: expected a table"),
        ("[[failure]]\ninstance = 'a'\n", "failure 1: from_s: missing"),
        ("[[failure]]\ninstance = 1\nfrom_s = 1\n", "failure 1: instance: wrong type"),
        ("[[failure]]\ninstance = 'a'\nfrom_s = 'x'\n", "failure 1: from_s: wrong type"),
        ("[[failure]]\ninstance = 'a'\nfrom_s = 1\nslow_frac = 2\n", "'slow_frac'"),
        ("[[failure]\n", "expected TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            read_faults(path)
        assert "faults.toml" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_faults(tmp_path / "none.toml")


def test_what_died_is_sent_to_parked_ones_before_anybody_decides():
    fleet = FleetSpec.parse("3C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    plant = Plant(
        fleet,
        make_workload("sharegpt", rate_req_s=20.0, duration_s=30.0, seed=0),
        faults=[Failure(instance="colocated-0", from_s=10.0)],
    )
    plant.apply(
        dataclasses.replace(
            Decision.highest(fleet),
            active=np.array([True, True, False]),
            route_frac=np.array([0.5, 0.5, 0.0]),
        )
    )
    plant.advance(9.99)
    assert plant.state().running_req[2] == 0.0
    plant.advance(10.01)
    state = plant.state()
    assert state.queue_req[2] + state.running_req[2] > 20.0
    assert min(state.queue_req[1:]) > 10.0
