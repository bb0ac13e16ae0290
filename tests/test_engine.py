"""The plant: against its slow twin, and what must hold whatever happens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from naive_plant import NaivePlant, ecofreq_of

from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl._kernels import layout
from voltana_ctrl.control.governors import EcoFreqGovernor
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.routing import (
    fadr_router,
    least_queue_router,
    random_router,
    share_router,
    shortest_router,
    tile_aware_router,
)
from voltana_ctrl.sim.engine import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload
from voltana_ctrl.types import InstanceSpec, Limits, Role

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
PARTS = ("prefill", "decode", "idle", "transfer")


def odd_profile(**changes):
    """Profile with every term at work: attention, a time floor, slow and costly transfers."""
    table = REFERENCE.table[::16].copy()
    table["prefill_tok2_s"] = 3e-7 * 1410 / table["clock_mhz"]
    table["decode_floor_s"] = 0.0135
    values = {"table": table, "link_bytes_s": 2e8, "transfer_j_per_tok": 0.01} | changes
    return dataclasses.replace(REFERENCE, **values)


ODD = odd_profile()
ODD_DECODE_FIRST = odd_profile(first_token="decode")


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
    profile = draw(st.sampled_from([ODD, ODD_DECODE_FIRST]))
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


@st.composite
def scenes(draw):
    """Fleet, workload, settings, governor ladder or None, and decisions with their times."""
    fleet = draw(fleets())
    settings = PlantSettings(
        actuation_s=draw(st.sampled_from([0.0, 0.005, 0.04])),
        settle_s=draw(st.sampled_from([0.0, 0.02])),
        decode_at_arrival=draw(st.booleans()),
    )
    ladder = draw(st.sampled_from([None, None, list(ODD.clocks_mhz), list(ODD.clocks_mhz[2:])]))
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
