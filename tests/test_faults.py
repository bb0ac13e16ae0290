"""What goes wrong in the plant: against its slow twin, and what must hold whatever happens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive_plant import NaivePlant, ecofreq_of
from test_engine import (
    ODD,
    REFERENCE,
    SLO,
    TIGHT,
    assert_empty,
    build,
    decisions,
    energies,
    fleets,
    reference_run,
    workloads,
)

from voltana_ctrl import Decision, FleetSpec
from voltana_ctrl._kernels import layout
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.engine import Plant, PlantSettings
from voltana_ctrl.sim.faults import ClockClamp, Failure, FaultSchedule, Slowdown, read_faults
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
    settings = PlantSettings(
        actuation_s=draw(st.sampled_from([0.0, 0.005, 0.04])),
        settle_s=draw(st.sampled_from([0.0, 0.02])),
        decode_at_arrival=draw(st.booleans()),
    )
    ladder = draw(st.sampled_from([None, None, list(ODD.clocks_mhz), list(ODD.clocks_mhz[2:])]))
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
