"""Machines that change between prefill and decode: when it pays, and what is handed on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voltana_ctrl import ConfigError, FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control import FlexibleController, MpcController, Split
from voltana_ctrl.experiment import Run
from voltana_ctrl.laws import length_moments
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.testing import check_controller
from voltana_ctrl.types import Load, Role

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
P, D = Role.PREFILL, Role.DECODE
FLEET = FleetSpec.parse("4P4D", PROFILE).flexible()
ROLES = (P,) * 4 + (D,) * 4
#: Heavy in prefill, heavy in decode.
HEAVY, LIGHT = length_moments([2000] * 2, [60] * 2), length_moments([200] * 2, [400] * 2)


def split(fleet=FLEET):
    return Split(fleet, SLO)


def state(running_req=0.0, **more):
    """Batches of so many at each decode instance."""
    running = np.array([0.0] * 4 + [running_req] * 4)
    return replace(
        FleetState.idle(8, freq_mhz=1410.0), running_req=running, kv_used_tok=400.0 * running,
        **more,
    )  # fmt: skip


def count(roles):
    return sum(role is P for role in roles)


def test_a_load_that_both_phases_carry_changes_nothing_at_once() -> None:
    _, (saves_w, change_j) = split().better(
        ROLES, state(40.0), Load(arrival_req_s=10.0, lengths=LIGHT)
    )
    # Whatever it would save, it has to pay for the change first.
    assert saves_w < 100.0
    assert change_j > 0.0 or saves_w == 0.0


def test_whoever_is_short_gets_machines_at_once() -> None:
    more, (_, change_j) = split().better(
        ROLES, state(20.0), Load(arrival_req_s=25.0, lengths=HEAVY)
    )
    assert count(more) > 4
    assert change_j == 0.0
    fewer, (_, change_j) = split().better(
        ROLES, state(700.0), Load(arrival_req_s=90.0, lengths=LIGHT)
    )
    assert count(fewer) < 4
    assert change_j == 0.0


def test_who_has_least_to_do_turns_and_who_is_leaving_is_taken_back_first() -> None:
    running = np.array([0.0, 0.0, 0.0, 0.0, 9.0, 1.0, 9.0, 9.0])
    at = replace(state(), running_req=running, kv_used_tok=2000.0 * running)
    more, _ = split().better(ROLES, at, Load(arrival_req_s=12.0, lengths=HEAVY))
    assert more[5] is P
    # The fourth still decodes: it was told to prefill a moment ago.
    running = np.array([0.0, 0.0, 0.0, 500.0, 520.0, 520.0, 520.0, 520.0])
    at = replace(state(), running_req=running, kv_used_tok=400.0 * running)
    fewer, _ = split().better(ROLES, at, Load(arrival_req_s=80.0, lengths=LIGHT))
    assert fewer[3] is D


def test_while_lengths_change_those_who_leave_decode_keep_their_batches() -> None:
    load = Load(arrival_req_s=25.0, lengths=HEAVY)
    crowd = state(150.0)
    known, _ = split().better(ROLES, crowd, load)
    changing, _ = split().better(ROLES, crowd, load, changes=True)
    assert count(changing) > count(known)


def test_those_for_good_stay_and_no_phase_is_left_alone() -> None:
    fixed = replace(FLEET.instances[4], roles=())
    fleet = FleetSpec((*FLEET.instances[:4], fixed, *FLEET.instances[5:]))
    more, _ = split(fleet).better(ROLES, state(1.0), Load(arrival_req_s=60.0, lengths=HEAVY))
    assert more[4] is D
    assert count(more) == 7
    alive = np.array([True] * 5 + [False] * 3)
    more, _ = split().better(
        ROLES, state(1.0, alive=alive), Load(arrival_req_s=60.0, lengths=HEAVY)
    )
    assert more[4] is D


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(0.1, 300.0), running=st.floats(0.0, 600.0), queue=st.floats(0.0, 900.0),
    dead=st.integers(0, 7), prompt=st.integers(10, 4000), answer=st.integers(2, 900),
    changes=st.booleans(),
)  # fmt: skip
def test_roles_are_always_such_as_the_fleet_can_have(
    rate, running, queue, dead, prompt, answer, changes
):
    alive = np.arange(8) != dead
    at = state(running, alive=alive, queue_req=np.full(8, queue), queue_tok=np.full(8, queue))
    lengths = length_moments([prompt] * 2, [answer] * 2)
    roles, (saves_w, change_j) = split().better(
        ROLES, at, Load(arrival_req_s=rate, lengths=lengths), doubt_frac=0.1, changes=changes
    )
    FLEET.check_roles(roles)
    assert roles[dead] is ROLES[dead]
    assert saves_w >= 0.0
    assert change_j >= 0.0


def make(fleet):
    return MpcController(fleet, SLO)


def test_it_follows_the_law_of_controllers_and_refuses_bad_settings() -> None:
    check_controller(
        lambda fleet, slo: FlexibleController(
            fleet.flexible() if not fleet.colocated else fleet, slo,
            lambda fixed: MpcController(fixed, slo),
        ),
        fleets=[FleetSpec.parse("2P2D", PROFILE)], examples=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="hold_s"):
        FlexibleController(FLEET, SLO, make, hold_s=0.0)


def test_what_was_learnt_is_handed_on() -> None:
    controller = FlexibleController(FLEET, SLO, make)
    memory = controller.init()
    # At the one that turns last.
    came = np.array([0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.0]) / 10.0
    for k in range(1, 60):
        at = state(700.0, t_s=0.1 * k, arrived_req=came, arrived_tok=200.0 * came)
        seen = Observation(state=at, roles=memory.roles)
        decision, memory = controller.decide(seen, memory)
    assert decision.roles == memory.roles
    assert count(memory.roles) < 4
    load, _, _ = controller._of(memory.roles).estimate(memory.inner)
    assert load.arrival_req_s == pytest.approx(100.0, rel=0.05)
    assert controller.notes(memory)["prefill_instances"] == count(memory.roles)


@pytest.mark.slow
def test_a_mix_that_shifts_is_served_by_roles_that_follow_and_by_no_fixed_ones() -> None:
    rng = np.random.default_rng(5)
    parts = []
    for k, (rate, prompt, answer) in enumerate(((30.0, 2000, 60), (90.0, 200, 400))):
        from_s, until_s = ((0.0, 180.0), (180.0, 400.0))[k]
        n = rng.poisson(rate * (until_s - from_s))
        at = np.sort(rng.uniform(from_s, until_s, n))
        parts.append((at, np.full(n, prompt), np.full(n, answer)))
    arrival_s, prompt, answer = (np.concatenate(each) for each in zip(*parts, strict=True))
    load = Workload(
        name="shifts", arrival_s=arrival_s, prompt_tok=prompt, output_tok=answer, duration_s=400.0
    )

    def worst(fleet, policy):
        figures = Run(
            policy=policy, fleet=fleet, slo=SLO, workload=load, duration_s=300.0, warmup_s=30.0
        ).simulate()
        return min(figures["ttft_attainment"], figures["itl_attainment"]), figures

    ours, figures = worst(FLEET, "mpc")
    assert ours > 0.97
    assert figures["role_changes"] >= 4
    for fixed in ("6P2D", "4P4D", "2P6D"):
        assert worst(FleetSpec.parse(fixed, PROFILE), "cascade")[0] < 0.9


def test_where_nobody_tells_what_machines_do_none_is_asked_to_turn() -> None:
    controller = FlexibleController(FLEET, SLO, make)
    memory = controller.init()
    came = np.array([0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0])
    for k in range(1, 60):
        at = state(700.0, t_s=0.1 * k, arrived_req=came, arrived_tok=200.0 * came)
        decision, memory = controller.decide(Observation(state=at), memory)
        assert decision.roles is None
    assert memory.roles == ROLES
