"""Instances that change between prefill and decode: they drain, turn, and nobody is lost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import Decision, FleetSpec, Guard, Observation, Slo, load_profile
from voltana_ctrl.control import IterationGovernor, RoleController
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.kernels import layout
from voltana_ctrl.routing import least_queue_router, shortest_router
from voltana_ctrl.sim.faults import Failure
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import FleetState, Role

A100 = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
P, D = Role.PREFILL, Role.DECODE
AT_ONCE = PlantSettings(actuation_s=0.0, settle_s=0.0)


def flexible(text: str = "2P2D", *, turn_s: float = 0.5, **more) -> FleetSpec:
    fleet = FleetSpec.parse(text, A100).flexible()
    return FleetSpec(tuple(replace(one, turn_s=turn_s, **more) for one in fleet.instances))


def order(plant: Plant, *roles: Role) -> None:
    plant.apply(replace(Decision.highest(plant.fleet, t_s=plant.now_s), roles=roles))


def plant_of(rate_req_s: float = 20.0, span_s: float = 10.0, fleet=None, **more) -> Plant:
    load = make_workload("fixed", rate_req_s=rate_req_s, duration_s=span_s, seed=0)
    return Plant(fleet or flexible(), load, AT_ONCE, **more)


def test_a_decode_instance_drains_turns_and_prefills() -> None:
    plant = plant_of()
    plant.advance(4.0)
    order(plant, P, P, D, P)
    plant.read()
    running = int(plant.instances["running_req"][3])
    assert running > 0
    assert plant.roles == (P, P, D, D)
    decoded = int(plant.instances["decoded_tok"][3])
    plant.advance(4.2)
    # What runs goes on, and nothing new comes.
    assert plant.read().state.arrived_req[3] == 0.0
    assert plant.instances["decoded_tok"][3] > decoded
    while plant.instances["turning"][3] == 0:
        plant.advance(plant.now_s + 0.01)
    began_s = plant.now_s
    assert plant.instances["running_req"][3] == plant.instances["kv_tok"][3] == 0
    assert plant.read().ready_s[3] == pytest.approx(0.5, abs=0.011)
    assert plant.roles == (P, P, D, P)
    idle_j = plant.state().energy_j[3]
    plant.advance(began_s + 0.4)
    assert plant.instances["prefilled_tok"][3] == 0
    assert plant.state().energy_j[3] - idle_j == pytest.approx(0.4 * 60.0)
    plant.advance(60.0)
    assert plant.instances["prefilled_tok"][3] > 0
    assert plant.instances["role_changes"].tolist() == [0, 0, 0, 1]
    assert (plant.requests["state"] == layout.DONE).all()


def test_a_prefill_instance_keeps_its_kv_until_it_is_fetched() -> None:
    """Decode is full: what was prefilled waits where it is, and only then does it turn."""
    one = flexible("2P1D", turn_s=0.0)
    fleet = FleetSpec(tuple(replace(spec, max_batch=2) for spec in one.instances))
    plant = plant_of(10.0, 2.0, fleet)
    plant.advance(2.0)
    order(plant, P, D, D)
    held = int(plant.instances["kv_tok"][1])
    assert held > 0
    changed_s = None
    while changed_s is None:
        plant.advance(plant.now_s + 0.05)
        if plant.instances["role_changes"][1]:
            changed_s = plant.now_s
        else:
            assert plant.instances["prefills"][1] == 1
    moved = plant.requests["prefill_at"] == 1
    fetched = np.isin(plant.requests["state"][moved], (layout.RUNNING, layout.DONE))
    assert fetched.all()
    plant.advance(200.0)
    assert (plant.requests["state"] == layout.DONE).all()


def test_nobody_is_left_alone_and_a_change_may_be_taken_back() -> None:
    plant = plant_of(fleet=flexible("1P1D"))
    plant.advance(2.0)
    with pytest.raises(ConfigError, match="expected somebody to decode, got nobody"):
        order(plant, P, P)
    assert plant.instances["want_role"].tolist() == [0, 1]
    # Both change places under load: each goes on while there is nobody else.
    order(plant, D, P)
    plant.advance(3.0)
    order(plant, P, D)
    plant.advance(90.0)
    assert (plant.requests["state"] == layout.DONE).all()
    fixed = plant_of(fleet=FleetSpec.parse("1P1D", A100))
    with pytest.raises(ConfigError, match=r"prefill-0 is prefill for good.*roles = "):
        order(fixed, D, P)


def test_who_is_idle_turns_at_once_and_held_requests_find_it() -> None:
    plant = plant_of(5.0, 4.0, flexible("1P2D", turn_s=2.0))
    order(plant, D, P, D)
    # For two seconds nobody prefills: requests are held, and not refused.
    plant.advance(1.9)
    assert plant.read().state.arrived_req.sum() == 0.0
    plant.advance(60.0)
    assert (plant.requests["state"] == layout.DONE).all()
    assert (plant.requests["prefill_at"] == 1).all()
    assert plant.requests["first_s"].min() > 2.0


def test_flexible_and_never_told_is_as_fixed() -> None:
    served = []
    for fleet in (FleetSpec.parse("2P2D", A100), flexible()):
        governors = [IterationGovernor(one, SLO) for one in fleet.instances]
        plant = plant_of(
            30.0, 10.0, fleet, governors=governors,
            prefill_router=least_queue_router(fleet, "prefill"),
            decode_router=shortest_router(fleet, "decode"),
        )  # fmt: skip
        plant.advance(60.0)
        served.append((plant.requests["done_s"].tolist(), plant.state().energy_j.tolist()))
    assert served[0] == served[1]


@given(
    rows=st.lists(
        st.tuples(st.floats(0.0, 3.0), st.integers(1, 300), st.integers(1, 40)),
        min_size=1, max_size=30,
    ),
    steps=st.lists(
        st.tuples(st.floats(0.02, 0.8), st.lists(st.sampled_from([P, D]), min_size=4, max_size=4)),
        max_size=8,
    ),
    turn_s=st.sampled_from([0.0, 0.03, 0.7]),
    early=st.booleans(),
    fails=st.booleans(),
    sleeps=st.booleans(),
)  # fmt: skip
def test_nobody_is_lost_whatever_the_roles(rows, steps, turn_s, early, fails, sleeps) -> None:
    more = {"asleep_w": 20.0, "wake_s": 0.2, "wake_j": 5.0} if sleeps else {}
    fleet = flexible(turn_s=turn_s, kv_capacity_tok=400, max_batch=4, **more)
    rows = sorted(rows)
    load = Workload(
        name="few", arrival_s=[row[0] for row in rows], prompt_tok=[row[1] for row in rows],
        output_tok=[row[2] for row in rows], duration_s=4.0,
    )  # fmt: skip
    faults = [Failure(instance="decode-0", from_s=0.7, until_s=1.1)] if fails else []
    settings = replace(AT_ONCE, decode_at_arrival=early)
    plant = Plant(fleet, load, settings, faults=faults)
    for span_s, roles in steps:
        if len(set(roles)) == 2:
            wish = Decision.highest(fleet, t_s=plant.now_s)
            active = np.ones(4, bool)
            if sleeps:
                active[roles.index(D)] = roles.count(D) == 1
            plant.apply(replace(wish, roles=tuple(roles), active=active))
        plant.advance(plant.now_s + span_s)
        seen = plant.read()
        inst = plant.instances
        assert (inst["kv_tok"] >= 0).all()
        assert (inst["kv_tok"] <= inst["kv_capacity_tok"]).all()
        working = inst["turning"] == 0
        assert (inst["prefills"] + inst["decodes"] == working).all()
        assert [role is D for role in seen.roles] == inst["role"].tolist()
    plant.advance(plant.now_s + 300.0)
    assert np.isin(plant.requests["state"], (layout.DONE, layout.DROPPED)).all()
    for name in ("kv_tok", "prefill_req", "wait_req", "running_req"):
        assert (plant.instances[name] == 0).all(), name
    done = plant.requests[plant.requests["state"] == layout.DONE]
    assert (plant.instances["emitted_tok"].sum() - plant.instances["lost_tok"].sum()) == done[
        "output_tok"
    ].sum()


def test_the_rule_moves_machines_to_where_they_are_needed() -> None:
    """Long prompts and short answers on 2P4D: fixed roles miss TTFT, the rule keeps more of it."""
    from voltana_ctrl.policies import find_policy

    load = make_workload(
        "fixed", rate_req_s=18.0, duration_s=160.0, seed=0, prompt_tok=2000, output_tok=20
    )
    found = {}
    for name, fleet in (
        ("fixed", FleetSpec.parse("2P4D", A100)),
        ("flexible", flexible("2P4D", turn_s=0.03)),
    ):
        found[name] = Run(
            policy=find_policy("roles"), fleet=fleet, slo=SLO, workload=load, duration_s=60.0,
            warmup_s=40.0,
        ).simulate()  # fmt: skip
    assert found["fixed"]["role_changes"] is None
    assert found["fixed"]["ttft_attainment"] < 0.5
    assert found["flexible"]["ttft_attainment"] > 0.95
    assert found["flexible"]["mean_freq_decode_mhz"] is None
    assert found["flexible"]["requests_completed"] == found["flexible"]["requests_arrived"]


def test_the_guard_lets_through_what_leaves_nobody_out() -> None:
    fleet = flexible()
    guard = Guard(fleet)
    seen = Observation(state=FleetState.idle(4))
    wish = replace(Decision.highest(fleet), roles=(P, D, D, D))
    applied = guard.shield(wish, seen, None)
    assert applied.roles == (P, D, D, D)
    # Shares are those of the roles to come.
    assert applied.route_frac[0] == 1.0
    assert applied.route_frac[1:].sum() == pytest.approx(1.0)
    bad = guard.shield(replace(wish, roles=(P, P, P, P)), seen, None)
    assert bad.roles is None
    assert guard.changes(replace(wish, roles=(P, P, P, P)), bad)[0] == "roles"
    with pytest.raises(ShapeError, match=r"Decision\.roles"):
        replace(wish, roles=(P, D))
    with pytest.raises(ConfigError, match=r"roles: expected prefill and decode"):
        replace(fleet.instances[0], roles=(P,))
    with pytest.raises(ConfigError, match="colocated"):
        FleetSpec.parse("4C", A100).flexible()


def test_the_rule_holds_still_where_nothing_is_in_danger() -> None:
    fleet = flexible()
    rule = RoleController(fleet, SLO, hold_s=5.0)
    memory = rule.init()

    def roles(t_s: float, **state):
        nonlocal memory
        seen = Observation(state=replace(FleetState.idle(4, t_s=t_s), **state))
        decision, memory = rule.decide(seen, memory)
        return decision.roles

    crowd = {"queue_tok": [9e3, 9e3, 0.0, 0.0], "kv_used_tok": [0.0, 0.0, 50.0, 10.0]}
    assert roles(0.0) == (P, P, D, D)
    assert roles(1.0, **crowd) == (P, P, D, P)
    # One decode instance is left, which stays whatever happens.
    assert roles(9.0, **crowd) == (P, P, D, P)
    batch = {"running_req": [0.0, 0.0, 900.0, 0.0], "kv_used_tok": [3.0, 2.0, 4e5, 9.0]}
    assert roles(10.0, **batch) == (P, D, D, P)
    # The time since the last change is short.
    assert roles(12.0, **crowd) == (P, D, D, P)
