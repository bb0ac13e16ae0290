"""Clocks and powers of a whole fleet at a state: against twins, one instance at a time."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracles import naive_control
from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
from voltana_ctrl.control.assess import Assessment, Assessor
from voltana_ctrl.laws import length_moments, paced
from voltana_ctrl.types import Belief, Load

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
OTHER = load_profile("h100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])


def mixed():
    """Two cards, a short ladder and a small batch among them."""
    a, b, c, d = FleetSpec.parse("2P2D", PROFILE).instances
    e, f = FleetSpec.parse("1P1D", OTHER).instances
    return FleetSpec(
        (
            a,
            dataclasses.replace(b, clocks_mhz=PROFILE.clocks_mhz[5::7]),
            dataclasses.replace(c, max_batch=50, kv_capacity_tok=20_000),
            dataclasses.replace(d, clocks_mhz=PROFILE.clocks_mhz[:1]),
            dataclasses.replace(e, id="e"),
            dataclasses.replace(f, id="f"),
        )
    )


FLEETS = {"mixed": mixed(), "colocated": FleetSpec.parse("3C", PROFILE)}
ASSESSORS = {name: Assessor(fleet, SLO) for name, fleet in FLEETS.items()}


def with_pace(one, pace):
    table = paced(one.profile.table, *pace)
    return dataclasses.replace(one, profile=dataclasses.replace(one.profile, table=table))


@st.composite
def situations(draw):
    name = draw(st.sampled_from(sorted(FLEETS)))
    n = len(FLEETS[name])

    def each(low, high):
        return np.array(draw(st.lists(st.floats(low, high), min_size=n, max_size=n)))

    running = np.floor(each(0.0, 900.0))
    running[each(0.0, 1.0) < 0.3] = 0.0
    state = dataclasses.replace(
        FleetState.idle(n),
        running_req=running,
        queue_req=np.floor(each(0.0, 3.0)),
        kv_used_tok=running * each(1.0, 900.0),
        queue_tok=each(0.0, 9000.0),
        oldest_wait_s=each(0.0, 0.7),
        freq_mhz=each(0.0, 2200.0),
    )
    load = Load(arrival_req_s=draw(st.floats(0.0, 200.0)), lengths=LENGTHS)
    return name, state, load, each(0.0, 1.0)


@given(
    at=situations(),
    delay_s=st.floats(0.0, 0.3),
    burst=st.floats(0.0, 4.0),
    pace=st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)),
)
def test_needed_clocks_against_the_twin(at, delay_s, burst, pace):
    name, state, load, share = at
    fleet = FLEETS[name]
    typical_tok = LENGTHS.prompt_tok + LENGTHS.prompt_sd_tok**2 / LENGTHS.prompt_tok
    margin_frac = (0.02, 0.035)
    belief = dataclasses.replace(
        Belief.of_profiles(fleet, margin_frac=margin_frac, delay_s=delay_s),
        prefill_pace_frac=np.full(len(fleet), pace[0]),
        decode_pace_frac=np.full(len(fleet), pace[1]),
    )
    ours = ASSESSORS[name].clocks_mhz(state, load, share, belief, burst_sd_frac=burst)
    theirs = [
        naive_control.needed_mhz(
            with_pace(one, pace), state.running_req[i], state.kv_used_tok[i], state.queue_tok[i],
            state.oldest_wait_s[i], load.arrival_req_s * LENGTHS.prompt_tok * share[i],
            typical_tok, SLO, margin_frac, delay_s, burst,
        )
        for i, one in enumerate(fleet.instances)
    ]  # fmt: skip
    # Times that are equal may differ in their last bit, so that one is a clock above the other.
    for i, one in enumerate(fleet.instances):
        rows = np.searchsorted(one.clocks_mhz, [ours[i], theirs[i]])
        assert abs(int(rows[0]) - int(rows[1])) <= (pace != (1.0, 1.0))


@given(at=situations(), drains=st.booleans())
def test_thrifty_clocks_against_the_twin(at, drains):
    name, state, load, _ = at
    theirs = [
        naive_control.thrifty_mhz(
            one, running_req, kv_tok, LENGTHS.prompt_tok, 0.06, one.parked_w if drains else 0.0
        )
        for one, running_req, kv_tok in zip(
            FLEETS[name].instances, state.running_req, state.kv_used_tok, strict=True
        )
    ]
    ours = ASSESSORS[name].thrifty_mhz(state, load, drains=drains)
    np.testing.assert_array_equal(ours, theirs)


@given(at=situations(), active=st.lists(st.booleans(), min_size=6, max_size=6))
def test_worst_power_against_the_twin(at, active):
    name, state, load, _ = at
    active = np.array(active[: len(state)])
    ours = ASSESSORS[name].worst_power_w(state, load, active)
    for i, one in enumerate(FLEETS[name].instances):
        busy_req = state.running_req[i] + state.queue_req[i]
        theirs = naive_control.worst_power_w(
            one, busy_req, state.kv_used_tok[i], LENGTHS.prompt_tok, active[i]
        )
        assert ours[i, : len(theirs)] == pytest.approx(theirs)
        assert np.all(ours[i, len(theirs) :] == ours[i, len(theirs) - 1])


@given(at=situations(), dead=st.integers(0, 5))
def test_who_is_dead_and_empty_takes_nothing_of_a_budget(at, dead):
    name, state, load, _ = at
    n, dead = len(state), dead % len(state)
    alive, none = np.arange(n) != dead, np.where(np.arange(n) == dead, 0.0, 1.0)
    state = dataclasses.replace(
        state, alive=alive, running_req=none * state.running_req, queue_req=none * state.queue_req
    )
    worst_w = [
        Assessment(
            by=ASSESSORS[name], state=state, load=load, route_frac=np.ones(n), active=active,
            belief=Belief.of_profiles(FLEETS[name], margin_frac=(0.02, 0.035), delay_s=0.1),
        ).worst_w
        for active in (np.ones(n, bool), alive)
    ]  # fmt: skip
    np.testing.assert_array_equal(*worst_w)


@given(at=situations(), budget_w=st.floats(100.0, 3000.0))
def test_ceilings_keep_the_budget_and_waste_none(at, budget_w):
    """Every scale at which a clock changes, tried one after another."""
    name, state, load, wanted = at
    fleet, assessor = FLEETS[name], ASSESSORS[name]
    wanted = np.round(200.0 + 1200.0 * wanted, 2)  # none all but equal
    worst_w = assessor.worst_power_w(state, load, np.ones(len(fleet), bool))
    ceiling, kept = assessor.ceilings_mhz(worst_w, wanted, budget_w)

    def drawn_w(clocks):
        return sum(
            worst_w[i, int(np.searchsorted(one.clocks_mhz, clocks[i]))]
            for i, one in enumerate(fleet.instances)
        )

    best = None
    pairs = list(zip(fleet.instances, wanted, strict=True))
    for scale in sorted({clock / want for one, want in pairs for clock in one.clocks_mhz}):
        at_most = scale * wanted * (1.0 + 1e-6)
        clocks = [
            max([clock for clock in one.clocks_mhz if clock <= most], default=one.clocks_mhz[0])
            for one, most in zip(fleet.instances, at_most, strict=True)
        ]
        if drawn_w(clocks) <= budget_w:
            best = clocks
    assert kept == (best is not None)
    np.testing.assert_array_equal(ceiling, fleet.min_mhz if best is None else best)
    assert assessor.power_at_w(worst_w, ceiling).sum() == pytest.approx(drawn_w(ceiling))


def test_what_decode_leaves_is_shared_whatever_waits_at_prefill():
    """Ceilings that follow queues are always on the move, and who rises waits for who falls."""
    fleet = FleetSpec.parse("3P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    worst_w = np.array([one.table["prefill_power_w"] for one in fleet.instances])
    wanted = np.array([1410.0, 210.0, 900.0, 600.0, 600.0])
    ceiling, kept = Assessor(fleet, SLO).decode_first_mhz(worst_w, wanted, 1000.0)
    assert kept
    assert np.unique(ceiling[:3]).size == 1
    assert 600.0 < ceiling[0] < 1410.0
    # One step higher for all of them would be too much.
    rows = np.searchsorted(fleet.instances[0].clocks_mhz, ceiling)
    up = np.arange(5) < 3
    assert worst_w[np.arange(5), rows + up].sum() > 1000.0


@given(at=situations(), budget_w=st.floats(100.0, 3000.0))
@example(
    at=("mixed", FleetState.idle(6), Load(arrival_req_s=0.0, lengths=LENGTHS),
        np.array([0.0, 0.0, 0.41015625, 0.0, 0.0, 1.0])),
    budget_w=1418.0,
)  # fmt: skip
def test_decode_comes_first_under_a_budget(at, budget_w):
    name, state, load, wanted = at
    fleet, assessor = FLEETS[name], ASSESSORS[name]
    wanted = np.round(200.0 + 1200.0 * wanted, 2)  # none all but equal
    worst_w = assessor.worst_power_w(state, load, np.ones(len(fleet), bool))
    ceiling, kept = assessor.decode_first_mhz(worst_w, wanted, budget_w)
    drawn_w = assessor.power_at_w(worst_w, ceiling).sum()
    assert kept == (assessor.power_at_w(worst_w, fleet.min_mhz).sum() <= budget_w)
    assert drawn_w <= budget_w or np.array_equal(ceiling, fleet.min_mhz)
    decodes = np.array([one.role.decodes for one in fleet.instances])
    enough = np.minimum(wanted, fleet.max_mhz)
    lowest_mhz = np.where(decodes, wanted, fleet.min_mhz)
    if assessor.power_at_w(worst_w, lowest_mhz).sum() <= budget_w:
        assert np.all(ceiling[decodes] >= enough[decodes] - 1e-9)
    elif kept:
        # Nothing for prefill before decode has what it needs.
        assert np.array_equal(ceiling[~decodes], fleet.min_mhz[~decodes])
    # As fair to all as can be gives decode no more where it needs all; what prefill wants does
    # not count.
    wanted = np.where(decodes, wanted, fleet.max_mhz)
    equal, _ = assessor.ceilings_mhz(worst_w, wanted, budget_w)
    if np.any(equal[decodes] < enough[decodes] - 1e-9):
        assert np.all(ceiling[~decodes] <= equal[~decodes] + 1e-9)
