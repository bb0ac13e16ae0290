"""The plant: against its slow twin, and what must hold whatever happens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.naive_plant import NaivePlant, ecofreq_of
from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.kernels import layout
from voltana_ctrl.routing import (
    fadr_router,
    least_queue_router,
    random_router,
    share_router,
    shortest_router,
    tile_aware_router,
)
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload
from voltana_ctrl.types import InstanceSpec, Limits, Role

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
PARTS = ("prefill", "decode", "idle", "transfer")


def odd_profile(**changes):
    """Profile with every term at work: attention, floor and roof, slow and costly transfers."""
    table = REFERENCE.table[::16].copy()
    table["prefill_tok2_s"] = 3e-7 * 1410 / table["clock_mhz"]
    table["decode_floor_s"] = 0.0135
    table["decode_roof_s"] = table["decode_req_s"] + table["decode_base_s"] / 12
    values = {"table": table, "link_bytes_s": 2e8, "transfer_j_per_tok": 0.01} | changes
    return dataclasses.replace(REFERENCE, **values)


def with_every_term(profile):
    """The same with what a profile may leave out: host, idle power by clock, clock changes."""
    table = profile.table.copy()
    table["idle_w"] = 20.0 + 30.0 * table["clock_mhz"] / 1410.0
    table["decode_host_s"] = 0.002
    table["decode_roof_base_s"] = 0.001
    table["decode_tile_tok"] = 24.0
    table["prefill_req_s"] = 0.013
    table["prefill_beside_w"] = 25.0
    return dataclasses.replace(
        profile, table=table, idle_w=50.0, clock_stall_s=0.015, clock_change_j=0.7
    )


ODD = odd_profile()
ODD_DECODE_FIRST = odd_profile(first_token="decode")
ODD_WHOLE = with_every_term(ODD)


def small_workload(rows, clients=None) -> Workload:
    rows = sorted(rows)
    columns = list(zip(*rows, strict=True))
    prompt = np.array(columns[1])
    return Workload(
        name="small",
        arrival_s=np.zeros(len(rows)) if clients else np.array(columns[0]),
        prompt_tok=prompt,
        output_tok=np.array(columns[2]),
        cached_tok=np.minimum(np.array(columns[3]), prompt - 1),
        duration_s=np.inf if clients else 10.0,
        concurrency=clients,
    )


requests = st.tuples(
    st.floats(0.0, 1.5),
    st.integers(1, 60),
    st.one_of(st.integers(1, 30), st.integers(10, 30)),
    st.sampled_from([0, 0, 0, 7]),
)
workloads = st.builds(
    small_workload,
    st.lists(requests, min_size=1, max_size=25),
    st.sampled_from([None, None, 1, 4, 9]),
)


@st.composite
def fleets(draw) -> FleetSpec:
    roles = draw(
        st.sampled_from(
            [
                (Role.PREFILL, Role.DECODE),
                (Role.PREFILL, Role.DECODE, Role.DECODE),
                (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE),
                (Role.COLOCATED,),
                (Role.COLOCATED, Role.COLOCATED),
            ]
        )
    )
    profile = draw(st.sampled_from([ODD, ODD_DECODE_FIRST, ODD_WHOLE]))
    return FleetSpec(
        tuple(
            InstanceSpec(
                id=f"i{k}",
                role=role,
                profile=profile,
                kv_capacity_tok=draw(st.sampled_from([70, 100, 150, 5000])),
                max_batch=draw(st.integers(1, 9)),
                prefill_budget_tok=draw(st.sampled_from([4, 16, 64, 8192])),
                max_prefill_req=draw(st.sampled_from([1, 2, 1000])),
                node=draw(st.sampled_from(["one", "two"])),
            )
            for k, role in enumerate(roles)
        )
    )


@st.composite
def decisions(draw, fleet: FleetSpec) -> Decision:
    n = len(fleet)
    clocks = st.lists(st.sampled_from(list(ODD.clocks_mhz)), min_size=n, max_size=n)
    share = np.zeros(n)
    active = np.ones(n, bool)
    for members in {tuple(fleet.prefill), tuple(fleet.decode)}:
        parts = np.array([draw(st.integers(1, 4)) for _ in members], dtype=float)
        share[list(members)] = parts / parts.sum()
        if len(members) > 1 and draw(st.booleans()):
            active[members[0]] = False
    cap_w = draw(st.sampled_from([None, 90.0, 140.0, 250.0]))
    return Decision(
        t_s=0.0,
        freq_mhz=draw(clocks),
        freq_max_mhz=fleet.max_mhz,
        route_frac=share,
        active=active,
        price_j_req=np.zeros(n),
        limits=None if cap_w is None else Limits(power_cap_w=np.full(n, cap_w)),
    )


plant_settings = st.builds(
    PlantSettings,
    actuation_s=st.sampled_from([0.0, 0.005, 0.04]),
    settle_s=st.sampled_from([0.0, 0.02]),
    decode_at_arrival=st.booleans(),
)
ladders = st.sampled_from([None, None, list(ODD.clocks_mhz), list(ODD.clocks_mhz[2:])])


@st.composite
def scenes(draw):
    """Fleet, workload, settings, governor ladder or None, and decisions with their times."""
    fleet = draw(fleets())
    settings, ladder = draw(plant_settings), draw(ladders)
    when_s = (0.0, *draw(st.lists(st.floats(0.05, 1.0), max_size=2).map(sorted)))
    return fleet, draw(workloads), settings, ladder, [(t, draw(decisions(fleet))) for t in when_s]


def build(fleet, workload, settings, ladder, slo=SLO, **options) -> Plant:
    governors = None
    if ladder is not None:
        governors = [EcoFreqGovernor(one, slo, ladder_mhz=ladder) for one in fleet.instances]
    return Plant(fleet, workload, settings, governors=governors, **options)


def energies(plant: Plant) -> np.ndarray:
    plant.state()
    return np.stack([plant.instances[f"{part}_j"] for part in PARTS], axis=1)


def assert_empty(plant: Plant) -> None:
    """Nothing is left in any counter once everything is done."""
    inst = plant.instances
    for name in (
        "running_req", "kv_tok", "prefill_req", "prefill_tok", "prefilling_req", "wait_req",
        "wait_tok", "iterating", "listed", "prepared",
    ):  # fmt: skip
        assert not inst[name].any(), name
    for name in ("last_admitted", "prefill_head", "prefill_tail", "wait_head", "wait_tail"):
        assert (inst[name] == -1).all(), name
    assert plant._sim[0]["n_moving"] == 0


# ---- the twin -----------------------------------------------------------------------------

TIGHT = Slo(ttft_s=0.15, itl_s=0.018)  # so that governors change clocks


@given(scene=scenes())
def test_agrees_with_the_twin(scene) -> None:
    fleet, workload, settings, ladder, orders = scene
    plant = build(fleet, workload, settings, ladder, TIGHT)
    twin = NaivePlant(
        fleet,
        workload,
        actuation_s=settings.actuation_s,
        settle_s=settings.settle_s,
        decode_at_arrival=settings.decode_at_arrival,
        govern=None if ladder is None else ecofreq_of(ladder, TIGHT),
        idle_call_s=5.0,
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
    rows = plant.requests
    for r in twin.requests:
        assert (rows["state"][r.number] == layout.DROPPED) == r.dropped
        assert rows["preemptions"][r.number] == r.preemptions
        assert rows["arrival_s"][r.number] == pytest.approx(r.arrival_s, rel=1e-9)
        if not r.dropped:
            assert rows["first_s"][r.number] == pytest.approx(r.first_s, rel=1e-9)
            assert rows["done_s"][r.number] == pytest.approx(r.done_s, rel=1e-9)
            assert rows["prefill_at"][r.number] == r.prefill_at
    for i, one in enumerate(twin.instances):
        inst = plant.instances[i]
        assert inst["iterations"] == one.iterations
        assert inst["clock_k"] == one.clock
        assert inst["running_req_s"] == pytest.approx(one.running_req_s, rel=1e-9)
        assert one.most_kv <= fleet.instances[i].kv_capacity_tok
    assert_empty(plant)


# ---- conservation -------------------------------------------------------------------------


@given(scene=scenes(), step_s=st.floats(0.01, 0.3))
def test_counters_are_what_the_requests_say(scene, step_s: float) -> None:
    fleet, workload, settings, ladder, orders = scene
    plant = build(fleet, workload, settings, ladder, TIGHT)
    plant.apply(orders[0][1])
    before = energies(plant)
    for k in range(12):
        plant.advance(step_s * k)
        state, rows = plant.state(), plant.requests
        assert plant.now_s == step_s * k == state.t_s
        which = rows["state"]
        assert np.all(which[rows["arrival_s"] > plant.now_s] == layout.FUTURE)
        queued, running = which == layout.QUEUED, which == layout.RUNNING
        waiting = which == layout.WAITING
        n = len(fleet)
        where = np.where(running | waiting, rows["decode_at"], rows["prefill_at"])
        where[queued & (rows["made_tok"] > 0)] = rows["decode_at"][queued & (rows["made_tok"] > 0)]
        queue_tok = np.where(waiting, rows["prompt_tok"], rows["todo_tok"])

        def total(mask, weight=1, where=where, n=n):
            return np.bincount(where[mask], np.broadcast_to(weight, where.shape)[mask], minlength=n)

        np.testing.assert_array_equal(state.running_req, total(running))
        np.testing.assert_array_equal(state.queue_req, total(queued | waiting))
        np.testing.assert_array_equal(state.queue_tok, total(queued | waiting, queue_tok))
        assert np.all(state.kv_used_tok <= fleet.kv_capacity_tok)
        assert np.all(state.running_req <= [one.max_batch for one in fleet.instances])
        after = energies(plant)
        assert np.all(after >= before)
        np.testing.assert_allclose(state.energy_j, after.sum(axis=1), rtol=1e-12)
        before = after
    plant.advance(500.0)
    assert np.isin(plant.requests["state"], [layout.DONE, layout.DROPPED]).all()
    assert_empty(plant)
    done = plant.requests[plant.requests["state"] == layout.DONE]
    assert np.all(done["arrival_s"] < done["first_s"])
    assert np.all((done["first_s"] < done["done_s"]) | (done["output_tok"] <= 2))
    assert plant.instances["emitted_tok"].sum() == done["output_tok"].sum()
    assert plant.judged[1] == 0
    plant.state()
    idle_s = 500.0 - plant.instances["busy_s"]  # busy and idle are all the time there is
    idle_j = plant.instances["idle_j"]
    if fleet.instances[0].profile is not ODD_WHOLE:
        np.testing.assert_allclose(idle_j, REFERENCE.idle_w * idle_s)
        return
    # Idle at some clock or other, and what changing it took.
    assert np.all(idle_j >= ODD_WHOLE.table["idle_w"][0] * idle_s)
    changes_j = ODD_WHOLE.clock_change_j * plant.instances["clock_sets"]
    assert np.all(idle_j <= ODD_WHOLE.idle_w * idle_s + changes_j + 1e-6)


def reference_run(policy="eco", seed=0, rate=30.0, until_s=20.0, **options) -> Plant:
    fleet = FleetSpec.parse("2P2D", REFERENCE)
    workload = make_workload("sharegpt", rate_req_s=rate, duration_s=until_s, seed=seed)
    plant = build(
        fleet, workload, PlantSettings(log_iterations=200_000), None if policy == "static" else
        list(REFERENCE.clocks_mhz), seed=seed, **options
    )  # fmt: skip
    plant.apply(Decision.highest(fleet))
    return plant


def test_energy_is_the_integral_of_power() -> None:
    plant = reference_run()
    power_w = []
    step_s = 0.001
    for k in range(3000):
        plant.advance(step_s * k)
        power_w.append(plant.state().power_w)
    power_w = np.array(power_w)
    integral_j = (power_w[1:] + power_w[:-1]).sum(axis=0) * step_s / 2
    np.testing.assert_allclose(plant.state().energy_j, integral_j, rtol=5e-3)
    assert integral_j.sum() > 3.0 * 4 * 60.0 * 1.3


def test_log_holds_every_iteration_and_its_energy() -> None:
    plant = reference_run()
    rows = []
    for k in range(1, 40):
        plant.advance(k * 0.5)
        rows.append(plant.read().iterations)
    plant.advance(400.0)
    rows.append(plant.read().iterations)
    for i in range(4):
        inst = plant.instances[i]
        mine = [batch.instance == i for batch in rows]
        wall_s = sum(batch.wall_s[m].sum() for batch, m in zip(rows, mine, strict=True))
        energy_j = sum(batch.energy_j[m].sum() for batch, m in zip(rows, mine, strict=True))
        assert sum(m.sum() for m in mine) == inst["iterations"]
        assert wall_s == pytest.approx(inst["busy_s"])
        assert energy_j == pytest.approx(inst["prefill_j"] + inst["decode_j"])
        tok = sum(batch.prefill_tok[m].sum() for batch, m in zip(rows, mine, strict=True))
        assert tok == inst["prefilled_tok"]


def test_finished_requests_are_read_once() -> None:
    plant = reference_run()
    seen = []
    for k in range(1, 60):
        plant.advance(k * 1.0)
        batch = plant.read().finished
        seen.extend(batch.request)
        rows = plant.requests[batch.request]
        np.testing.assert_array_equal(batch.ttft_s, rows["first_s"] - rows["arrival_s"])
        gaps = batch.itl_s * np.maximum(rows["output_tok"] - 1, 1)
        np.testing.assert_allclose(gaps, rows["done_s"] - rows["first_s"])
    assert len(seen) == len(set(seen))
    done = plant.requests["state"] == layout.DONE
    assert sorted(seen) == list(np.flatnonzero(done))
    assert done.mean() > 0.95


def test_arrivals_are_counted_between_reads() -> None:
    plant = reference_run()
    for k in range(1, 10):
        plant.advance(float(k))
        counts = plant.read().state
        prompt = plant.requests["prompt_tok"]
        arrival_s = plant.requests["arrival_s"]
        new = (arrival_s > k - 1) & (arrival_s <= k)
        assert counts.arrived_req[:2].sum() == new.sum()
        assert counts.arrived_tok[:2].sum() == prompt[new].sum()


def test_cutting_the_run_into_pieces_changes_nothing() -> None:
    whole, pieces = reference_run(), reference_run()
    whole.advance(60.0)
    for t_s in np.random.default_rng(1).uniform(0.0, 60.0, 300).cumsum() / 150:
        pieces.advance(float(t_s))
        pieces.state()
    pieces.advance(60.0)
    for name in whole.requests.dtype.names:
        np.testing.assert_array_equal(whole.requests[name], pieces.requests[name])
    np.testing.assert_allclose(energies(whole), energies(pieces), rtol=1e-12)


def test_time_never_goes_back() -> None:
    plant = reference_run()
    plant.advance(3.0)
    plant.advance(2.0)
    assert plant.now_s == 3.0


# ---- determinism --------------------------------------------------------------------------


def noisy(seed: int) -> Plant:
    fleet = FleetSpec.parse("2P2D", REFERENCE)
    workload = make_workload("sharegpt", rate_req_s=30.0, duration_s=20.0, seed=0)
    plant = Plant(
        fleet,
        workload,
        PlantSettings(jitter_sd_frac=0.1, power_noise_sd_w=20.0),
        prefill_router=random_router(fleet, "prefill"),
        seed=seed,
    )
    plant.apply(Decision.highest(fleet))
    return plant


def test_same_seed_same_arrays_another_seed_others() -> None:
    first, again, other = noisy(3), noisy(3), noisy(4)
    for plant in (first, again, other):
        plant.advance(10.0)
    np.testing.assert_array_equal(first.state().power_w, again.state().power_w)
    assert np.any(first.state().power_w != other.state().power_w)
    for plant in (first, again, other):
        plant.advance(60.0)
    assert first.requests.tobytes() == again.requests.tobytes()
    assert first.instances.tobytes() == again.instances.tobytes()
    assert np.any(first.requests["prefill_at"] != other.requests["prefill_at"])
    assert np.any(first.requests["done_s"] != other.requests["done_s"])


def test_jitter_spreads_iterations_around_the_truth() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = Workload(
        name="one", arrival_s=[0.0], prompt_tok=[10], output_tok=[20_001], duration_s=1.0
    )
    walls_s = {}
    for sd_frac in (0.0, 0.2):
        plant = Plant(
            fleet, workload, PlantSettings(jitter_sd_frac=sd_frac, log_iterations=30_000), seed=5
        )
        plant.advance(1000.0)
        batch = plant.read().iterations
        walls_s[sd_frac] = batch.wall_s[batch.instance == 1]
    ratio = walls_s[0.2] / walls_s[0.0]
    assert ratio.mean() == pytest.approx(1.0, abs=4 * 0.2 / np.sqrt(20_000))
    assert np.log(ratio).std() == pytest.approx(0.2, rel=0.03)


def test_power_noise_is_on_the_reading_alone() -> None:
    plant = noisy(0)
    plant.advance(5.0)
    first, second = plant.state(), plant.state()
    assert np.all(first.power_w != second.power_w)
    np.testing.assert_array_equal(first.energy_j, second.energy_j)


# ---- clocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [("a", "a", "a", "a"), ("a", "b", "a", "b")])
def test_clock_sets_of_a_node_follow_one_another(nodes) -> None:
    fleet = FleetSpec(
        tuple(
            dataclasses.replace(one, node=node)
            for one, node in zip(FleetSpec.parse("2P2D", REFERENCE).instances, nodes, strict=True)
        )
    )
    workload = make_workload("sharegpt", rate_req_s=60.0, duration_s=5.0, seed=0)
    settings = PlantSettings(actuation_s=0.03, settle_s=0.0)
    plant = build(fleet, workload, settings, list(REFERENCE.clocks_mhz))
    calls: dict[str, set] = {node: set() for node in nodes}
    for k in range(1000):
        plant.advance(k * 0.01)
        for i in np.flatnonzero(plant.instances["call_end_s"] < 1e299):
            one = plant.instances[i]
            calls[nodes[i]].add((float(one["call_start_s"]), float(one["call_end_s"])))
    assert sum(map(len, calls.values())) == plant.instances["clock_sets"].sum() > 50
    for intervals in calls.values():
        ordered = np.array(sorted(intervals))
        np.testing.assert_allclose(ordered[:, 1] - ordered[:, 0], 0.03, rtol=1e-9)
        assert np.all(ordered[1:, 0] >= ordered[:-1, 1] - 1e-12)


def test_a_clock_set_is_a_pure_delay() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = make_workload("fixed", rate_req_s=1e-3, duration_s=100.0, seed=0)
    plant = Plant(fleet, workload, PlantSettings(actuation_s=0.01, settle_s=0.05))
    plant.apply(Decision.highest(fleet, floor_mhz=[210.0, 600.0]))
    for t_s, expected in (
        (0.0599, [1410.0, 1410.0]),
        (0.0601, [210.0, 1410.0]),
        (0.0699, [210.0, 1410.0]),  # the second call waited for the first
        (0.0701, [210.0, 600.0]),
    ):
        plant.advance(t_s)
        np.testing.assert_array_equal(plant.state().freq_mhz, expected)
    again = plant.instances["clock_sets"].copy()
    plant.apply(Decision.highest(fleet, floor_mhz=[201.0, 586.0]))  # the same after rounding up
    np.testing.assert_array_equal(plant.instances["clock_sets"], again)


def test_of_wishes_during_a_call_the_latest_counts() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = make_workload("fixed", rate_req_s=1e-3, duration_s=100.0, seed=0)
    plant = Plant(fleet, workload, PlantSettings(actuation_s=0.1, settle_s=0.0))
    for mhz in (300.0, 900.0, 600.0):
        plant.apply(Decision.highest(fleet, floor_mhz=[mhz, 1410.0]))
    seen = []
    for k in range(30):
        plant.advance(k * 0.01)
        seen.append(plant.state().freq_mhz[0])
    assert list(dict.fromkeys(seen)) == [1410.0, 300.0, 600.0]
    assert plant.instances["clock_sets"][0] == 2


@given(cap_w=st.floats(130.0, 400.0), when_s=st.floats(0.0, 4.0))
def test_power_caps_hold_at_once_and_readings_show_the_throttled_clock(cap_w, when_s) -> None:
    plant = reference_run("static")
    fleet = plant.fleet
    plant.advance(when_s)
    plant.apply(
        dataclasses.replace(Decision.highest(fleet), limits=Limits(power_cap_w=np.full(4, cap_w)))
    )
    lowest_mhz = np.full(4, 1410.0)
    for k in range(20):
        plant.advance(when_s + 0.1 * k)
        state = plant.state()
        assert np.all(state.power_w <= cap_w * (1 + 1e-12))
        lowest_mhz = np.minimum(lowest_mhz, state.freq_mhz)
    assert (lowest_mhz.min() < 1410.0) == (plant.instances["busy_mhz_s"].sum()
                                           < 1409.99 * plant.instances["busy_s"].sum())  # fmt: skip


def test_a_cap_ends_with_the_decision_that_had_it() -> None:
    plant = reference_run("static")
    highest = Decision.highest(plant.fleet)
    plant.apply(dataclasses.replace(highest, limits=Limits(power_cap_w=np.full(4, 100.0))))
    plant.advance(5.0)
    busy = plant.instances["iterating"] == 1
    assert busy.any()
    assert np.all(plant.state().freq_mhz[busy] < 1410.0)
    plant.apply(highest)
    np.testing.assert_array_equal(plant.state().freq_mhz, 1410.0)


def test_a_cap_below_the_lowest_clock_leaves_the_lowest_clock() -> None:
    plant = reference_run("static")
    plant.apply(
        dataclasses.replace(
            Decision.highest(plant.fleet), limits=Limits(power_cap_w=np.full(4, 10.0))
        )
    )
    plant.advance(5.0)
    state = plant.state()
    busy = plant.instances["iterating"] == 1
    assert busy.any()
    np.testing.assert_array_equal(state.freq_mhz[busy], 210.0)
    assert np.all(state.power_w > 10.0)


# ---- routing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        share_router,
        random_router,
        least_queue_router,
        shortest_router,
        tile_aware_router,
        lambda fleet, phase: fadr_router(fleet, phase, SLO, ladder_mhz=None),
    ],
)
def test_parked_instances_get_no_new_work(make) -> None:
    fleet = FleetSpec.parse("2P3D", REFERENCE)
    plant = Plant(
        fleet,
        make_workload("sharegpt", rate_req_s=30.0, duration_s=10.0, seed=0),
        PlantSettings(view_age_s=0.02),
        prefill_router=make(fleet, "prefill"),
        decode_router=make(fleet, "decode"),
    )
    everybody = Decision.highest(fleet)
    parked = dataclasses.replace(
        everybody, active=[True, False, False, True, True], route_frac=[1, 0, 0, 0.5, 0.5]
    )
    plant.apply(everybody)
    plant.advance(3.0)
    plant.apply(parked)
    plant.read()
    plant.advance(6.0)
    state = plant.read().state
    assert state.arrived_req[1] == state.arrived_req[2] == 0
    assert state.arrived_req[[0, 3, 4]].sum() > 100
    assert state.power_w[1] == REFERENCE.idle_w  # drained, idle
    plant.apply(dataclasses.replace(everybody, active=np.zeros(5, bool)))
    plant.advance(9.0)
    assert plant.read().state.arrived_req[:2].sum() > 50  # nobody active: anybody will do


def test_routers_see_a_state_of_the_age_that_is_set() -> None:
    from numba import njit

    from voltana_ctrl.kernels.route.base import ROUTER_SIGNATURE
    from voltana_ctrl.routing.base import CompiledRouter

    @njit([ROUTER_SIGNATURE])
    def note(tables, padded, params, memory, uniform, prompt_tok, view, members):
        memory[int(prompt_tok) % 10] = view[0, members[0]]
        return members[0]

    fleet = FleetSpec.parse("9P1D", REFERENCE)  # as many notes as instances
    workload = Workload(
        name="three", arrival_s=[0.1, 0.105, 0.125], prompt_tok=[5000, 3001, 2002],
        output_tok=[2, 2, 2], duration_s=1.0,
    )  # fmt: skip
    for age_s, noted in ((0.0, [0.0, 5000.0, 8001.0]), (0.01, [0.0, 0.0, 8001.0]),
                         (0.022, [0.0, 0.0, 5000.0]), (0.5, [0.0, 0.0, 0.0])):  # fmt: skip
        router = CompiledRouter(fleet, "prefill", note)
        plant = Plant(fleet, workload, PlantSettings(view_age_s=age_s), prefill_router=router)
        plant.advance(0.2)
        memory = plant._believed.prefill_memory
        np.testing.assert_array_equal(memory[:3], noted)


@pytest.mark.parametrize("fleet", ["1P1D", "2C"])
@pytest.mark.parametrize("clients", [None, 2])
def test_what_no_instance_could_ever_hold_is_dropped_at_once(fleet: str, clients) -> None:
    spec = FleetSpec.parse(fleet, dataclasses.replace(REFERENCE, kv_capacity_tok=1000))
    workload = Workload(
        name="big",
        arrival_s=[0.0] * 5,
        prompt_tok=[900, 100, 900, 1001, 900],
        output_tok=[101, 100, 100, 1, 101],
        duration_s=np.inf if clients else 1.0,
        concurrency=clients,
    )
    plant = Plant(spec, workload)
    plant.advance(100.0)
    dropped = plant.requests["state"] == layout.DROPPED
    np.testing.assert_array_equal(dropped, [True, False, False, True, True])
    assert plant.instances["prefilled_tok"].sum() == 1000  # no work was spent on them
    assert_empty(plant)
    assert plant.judged[1] == 0


# ---- closed loop --------------------------------------------------------------------------


@pytest.mark.parametrize("fleet", ["2P2D", "3C"])
@pytest.mark.parametrize("clients", [1, 7, 200])
def test_closed_loop_keeps_every_client_waiting_for_one_answer(fleet: str, clients: int) -> None:
    plant = Plant(
        FleetSpec.parse(fleet, REFERENCE),
        make_closed_loop("sharegpt", clients, clients * 100, seed=0),
    )
    for k in range(1, 200):
        plant.advance(k * 0.05)
        inside = ~np.isin(plant.requests["state"], [layout.FUTURE, layout.DONE])
        assert inside.sum() == clients
    assert (plant.requests["state"] == layout.DONE).sum() > clients


# ---- what is preempted --------------------------------------------------------------------


def test_a_preempted_request_is_recomputed_before_newcomers_are_admitted() -> None:
    fleet = FleetSpec.parse("2P1D", dataclasses.replace(REFERENCE, kv_capacity_tok=400))
    workload = Workload(
        name="crowd",
        arrival_s=np.arange(12) * 0.02,
        prompt_tok=np.full(12, 60),
        output_tok=np.full(12, 150),
        duration_s=10.0,
    )
    plant = Plant(fleet, workload)
    plant.advance(100.0)
    assert plant.requests["preemptions"].sum() > 0
    assert (plant.requests["state"] == layout.DONE).all()
    order = np.argsort(plant.requests["done_s"])
    np.testing.assert_array_equal(order, np.arange(12))  # equal requests leave as they came
    assert_empty(plant)


# ---- what is refused ----------------------------------------------------------------------


def test_refuses_what_does_not_fit() -> None:
    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = make_workload("sharegpt", rate_req_s=5.0, duration_s=5.0, seed=0)
    with pytest.raises(ConfigError, match="one per instance, 2, got 1"):
        Plant(fleet, workload, governors=[EcoFreqGovernor(fleet.instances[0], SLO)])
    with pytest.raises(ShapeError, match="2 instances, got one for 3"):
        Plant(fleet, workload).apply(Decision.highest(FleetSpec.parse("1P2D", REFERENCE)))
    for name in ("actuation_s", "settle_s", "view_age_s", "jitter_sd_frac", "power_noise_sd_w"):
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=name):
                PlantSettings(**{name: bad})


def test_admission_leaves_one_percent_of_the_cache_free() -> None:
    """In use + newcomer + one more for who runs: up to 990 of 1,000 tokens, and no more."""
    fleet = FleetSpec.parse("1P1D", dataclasses.replace(REFERENCE, kv_capacity_tok=1000))
    outcomes = []
    for prompt in range(475, 490):
        workload = Workload(
            name="two",
            arrival_s=[0.0, 0.001],
            prompt_tok=[500, prompt],
            output_tok=[200, 5],
            duration_s=1.0,
        )
        plant = Plant(fleet, workload)
        while plant.requests["state"][1] < layout.WAITING:
            plant.advance(plant.now_s + 1e-4)
        plant.advance(plant.instances["iter_end_s"][1])
        admitted = bool(plant.requests["state"][1] == layout.RUNNING)
        before_tok = plant.instances["kv_tok"][1] - (prompt + 1 if admitted else 0)
        assert admitted == (before_tok + prompt + 1 + 1 <= 990)
        outcomes.append(admitted)
    assert True in outcomes
    assert False in outcomes
