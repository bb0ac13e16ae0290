import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import (
    ConfigError,
    Decision,
    FleetSpec,
    FleetState,
    Guard,
    Observation,
    Status,
    load_profile,
)

FLEET = FleetSpec.parse("2P3D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
N = len(FLEET)
CLOCKS_MHZ = FLEET.instances[0].clocks_mhz


def arrays(values):
    return st.lists(values, min_size=N, max_size=N)


@st.composite
def decisions(draw):
    ends = np.array(draw(arrays(st.tuples(st.floats(0.0, 3000.0), st.floats(0.0, 3000.0)))))
    return Decision(
        t_s=draw(st.floats(0.0, 10.0)),
        freq_mhz=ends.min(axis=1),
        freq_max_mhz=ends.max(axis=1),
        route_frac=draw(arrays(st.floats(0.0, 1.0))),
        active=draw(arrays(st.booleans())),
        price_j_req=np.zeros(N),
        status=draw(st.sampled_from(Status)),
    )


@st.composite
def observations(draw):
    return Observation(
        state=dataclasses.replace(
            FleetState.idle(N, t_s=draw(st.floats(10.0, 20.0))),
            alive=draw(arrays(st.booleans())),
            kv_used_tok=draw(arrays(st.floats(0.0, 450_000.0))),
            age_s=draw(arrays(st.floats(0.0, 5.0))),
        )
    )


guards = st.builds(lambda slew: Guard(FLEET, slew_mhz_s=slew), st.sampled_from([1.0, 300.0, 1e9]))
lasts = st.one_of(st.none(), decisions())


@given(guards, decisions(), observations(), lasts)
def test_what_passes_is_safe_to_apply(guard, proposed, observation, last):
    if last is not None:
        last = guard.shield(last, observation, None)
    applied = guard.shield(proposed, observation, last)
    assert np.isin(applied.freq_mhz, CLOCKS_MHZ).all()
    assert np.isin(applied.freq_max_mhz, CLOCKS_MHZ).all()
    assert (applied.freq_mhz <= applied.freq_max_mhz).all()
    for members in (FLEET.prefill, FLEET.decode):
        assert applied.route_frac[members].sum() == pytest.approx(1.0)
        assert applied.active[members].any()
        if observation.state.alive[members].any():
            assert (applied.route_frac[members][~observation.state.alive[members]] == 0.0).all()
        assert (applied.route_frac[members][~applied.active[members]] == 0.0).all()


@given(guards, decisions(), observations(), lasts)
def test_the_guard_is_idempotent_and_pure(guard, proposed, observation, last):
    once = guard.shield(proposed, observation, last)
    twice = guard.shield(once, observation, last)
    again = guard.shield(proposed, observation, last)
    for name in ("freq_mhz", "freq_max_mhz", "route_frac", "active"):
        assert np.allclose(getattr(once, name), getattr(twice, name), atol=1e-12)
        assert np.array_equal(getattr(once, name), getattr(again, name))
    assert once.status is twice.status


@given(decisions(), observations(), decisions())
def test_a_ceiling_falls_at_once_and_is_never_passed(proposed, observation, last):
    proposed = dataclasses.replace(proposed, status=Status.OK)
    fresh = dataclasses.replace(observation.state, age_s=np.zeros(N))
    applied = Guard(FLEET, slew_mhz_s=1.0).shield(proposed, Observation(state=fresh), last)
    reachable = np.maximum(proposed.freq_max_mhz, CLOCKS_MHZ[0])
    assert (applied.freq_max_mhz <= reachable).all()


@given(observations(), st.floats(0.0, 1.0))
def test_a_floor_falls_no_faster_than_the_slew(observation, span_s):
    fresh = dataclasses.replace(observation.state, age_s=np.zeros(N))
    last = Decision.highest(FLEET, t_s=fresh.t_s - span_s)
    wish = Decision.highest(FLEET, t_s=fresh.t_s, floor_mhz=np.full(N, 210.0))
    applied = Guard(FLEET, slew_mhz_s=300.0).shield(wish, Observation(state=fresh), last)
    assert (applied.freq_mhz >= 1410.0 - 300.0 * span_s - 1e-6).all()
    raised = Guard(FLEET, slew_mhz_s=300.0).shield(
        Decision.highest(FLEET, t_s=fresh.t_s), Observation(state=fresh), applied
    )
    assert (raised.freq_mhz == 1410.0).all(), "upward moves are never held back"


def shielded(proposed, *, t_s=10.0, age_s=0.0, last=None, **guard):
    state = dataclasses.replace(FleetState.idle(N, t_s=t_s), age_s=np.full(N, age_s))
    return Guard(FLEET, **guard).shield(proposed, Observation(state=state), last)


def test_a_plan_that_is_not_ok_is_held_then_replaced_under_the_last_ceiling():
    last = Decision.highest(FLEET, t_s=9.5, floor_mhz=np.full(N, 600.0), ceiling_mhz=[900.0] * N)
    failed = Decision.highest(FLEET, t_s=10.0, status=Status.INFEASIBLE)
    held = shielded(failed, t_s=10.0, last=last)
    assert (held.freq_mhz == 600.0).all()
    assert held.status is Status.INFEASIBLE
    replaced = shielded(failed, t_s=12.0, last=last)
    assert (replaced.freq_mhz == 900.0).all()
    assert replaced.route_frac[FLEET.decode].tolist() == pytest.approx([1 / 3] * 3)
    assert (shielded(failed).freq_mhz == 1410.0).all()


def test_what_is_held_is_held_so_long_and_no_longer():
    guard, last, clocks = Guard(FLEET, hold_s=1.0), None, []
    for tick in range(40):
        t_s = 0.1 * tick
        wish = Decision.highest(FLEET, t_s=t_s, floor_mhz=np.full(N, 705.0))
        if tick >= 10:  # readings stop
            wish = dataclasses.replace(wish, status=Status.STALE)
        last = guard.shield(wish, Observation(state=FleetState.idle(N, t_s=t_s)), last)
        clocks.append(last.freq_mhz[0])
    assert clocks[:19] == [705.0] * 19
    assert clocks[21:] == [1410.0] * 19


def test_a_ceiling_lowered_on_stale_readings_holds():
    last = Decision.highest(FLEET, t_s=9.5, ceiling_mhz=np.full(N, 1200.0))
    lowered = Decision.highest(FLEET, t_s=10.0, ceiling_mhz=np.full(N, 600.0))
    for t_s in (10.0, 30.0):
        applied = shielded(lowered, t_s=t_s, age_s=3.0, last=last)
        assert applied.status is Status.STALE
        assert (applied.freq_max_mhz == 600.0).all()
    raised = Decision.highest(FLEET, t_s=10.0, status=Status.INFEASIBLE)
    assert (shielded(raised, last=last).freq_max_mhz == 1200.0).all()


def test_stale_readings_are_not_acted_on():
    wish = Decision.highest(FLEET, t_s=10.0, floor_mhz=np.full(N, 210.0))
    assert shielded(wish, age_s=3.0).status is Status.STALE
    assert (shielded(wish, age_s=3.0).freq_mhz == 1410.0).all()
    assert shielded(wish, age_s=1.0).status is Status.OK


def test_a_full_instance_gets_no_new_work_while_another_is_left():
    kv_tok = np.array([0.0, 0.0, 449_000.0, 0.0, 0.0])
    state = dataclasses.replace(FleetState.idle(N), kv_used_tok=kv_tok)
    applied = Guard(FLEET).shield(Decision.highest(FLEET), Observation(state=state), None)
    assert applied.route_frac.tolist() == pytest.approx([0.5, 0.5, 0.0, 0.5, 0.5])
    assert applied.active.all()


def test_what_the_guard_changed_is_said():
    guard = Guard(FLEET)
    observation = Observation(state=FleetState.idle(N))
    quiet = Decision.highest(FLEET)
    assert guard.changes(quiet, guard.shield(quiet, observation, None)) == ()
    none = dataclasses.replace(quiet, active=np.zeros(N, bool))
    assert "active set" in guard.changes(none, guard.shield(none, observation, None))
    failed = dataclasses.replace(quiet, status=Status.DEADLINE)
    said = guard.changes(failed, guard.shield(failed, observation, None))
    assert said == ("replaced: deadline",)


@pytest.mark.parametrize("name", ["slew_mhz_s", "stale_s", "hold_s", "kv_full_frac"])
def test_settings_are_checked(name):
    with pytest.raises(ConfigError, match=name):
        Guard(FLEET, **{name: 0.0})
