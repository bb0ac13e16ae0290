"""Margins on top of the governors' own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.estimate.headroom import HeadroomFilter
from voltana_ctrl.laws import length_moments
from voltana_ctrl.types import Load, RequestBatch

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("2P2D", PROFILE)
SLO = Slo(ttft_s=0.6, itl_s=0.06)
OWN = (0.02, 0.035)


def finished(output_tok, ttft_s=0.1, itl_s=0.05):
    n = len(output_tok)
    return RequestBatch(
        request=np.arange(n), request_class=np.zeros(n), prompt_tok=np.full(n, 100.0),
        output_tok=np.asarray(output_tok, float), ttft_s=np.full(n, ttft_s),
        itl_s=np.full(n, itl_s), prefill_instance=np.zeros(n), decode_instance=np.full(n, 2.0),
    )  # fmt: skip


def after(batches, fleet=FLEET, **known):
    known = {"running_req": 100.0, "feasible": True} | known
    headroom = HeadroomFilter(fleet, SLO)
    memory = headroom.init()
    for batch in batches:
        memory = headroom.update(memory, batch, **known)
    return headroom, memory


@given(decoded=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_hand_off_margin_lets_as_many_miss_as_promised(decoded, seed):
    """Against the definition: T (1 + (u + j)/d) over the target for eight in a thousand."""
    rng = np.random.default_rng(seed)
    answers = rng.choice(decoded, 60_000)
    headroom, memory = after([finished(part + 1.0) for part in np.split(answers, 60)])
    margin_frac = headroom.hand_off_frac(memory)
    itl_s = SLO.itl_s / (1.0 + margin_frac) * (1.0 + (rng.random(answers.size) + 0.06) / answers)
    assert np.mean(itl_s > SLO.itl_s) == pytest.approx(0.0075, abs=0.0025)


@given(
    decoded=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    noise=st.floats(0.01, 0.3),
    handed_off=st.booleans(),
)
def test_noise_of_iterations_is_part_of_the_margin(decoded, noise, handed_off):
    """Against draws of ``T (1 + (u + j)/d + s Z / sqrt(d))``; without a hand-off no u and no j."""
    rng = np.random.default_rng(0)
    answers = rng.choice(decoded, 60_000)
    fleet = FLEET if handed_off else FleetSpec.parse("2C", PROFILE)
    headroom, memory = after([finished(part + 1.0) for part in np.split(answers, 60)], fleet=fleet)
    margin_frac = headroom.hand_off_frac(memory, noise)
    waits = (rng.random(answers.size) + 0.06) / answers if handed_off else 0.0
    noises = noise * rng.standard_normal(answers.size) / np.sqrt(answers)
    itl_s = SLO.itl_s / (1.0 + margin_frac) * (1.0 + waits + noises)
    assert 0.004 < np.mean(itl_s > SLO.itl_s) < 0.009


def test_long_answers_and_colocated_fleets_need_no_hand_off_margin():
    headroom, memory = after([finished(np.full(500, 200.0))] * 10)
    assert headroom.hand_off_frac(memory) < OWN[1]
    assert headroom.margins_frac(memory, OWN)[1] == OWN[1]
    headroom, memory = after(
        [finished(np.full(500, 5.0))] * 10, fleet=FleetSpec.parse("2C", PROFILE)
    )
    assert headroom.hand_off_frac(memory) == 0.0


def test_a_hand_off_that_fewer_miss_than_foreseen_is_given_back_in_part():
    short = np.full(1000, 8.0)
    headroom, memory = after([finished(short)] * 3)
    asked = headroom.hand_off_frac(memory)
    assert asked > OWN[1] + 0.02
    assert headroom.margins_frac(memory, OWN)[1] == pytest.approx(asked - 0.02)
    # Never less than is kept in any case, and what misses is added from there on.
    assert headroom.margins_frac(memory, (0.02, 1.0))[1] == 1.0
    memory = headroom.update(
        memory, finished(np.full(20, 8.0), itl_s=0.07), running_req=100.0, feasible=True
    )
    assert headroom.margins_frac(memory, OWN)[1] > asked + 0.05
    assert headroom.margins_frac(memory, OWN)[0] == OWN[0]


def test_a_colocated_fleet_that_hardly_misses_gives_back_some_of_its_margin():
    fleet = FleetSpec.parse("2C", PROFILE)
    headroom, memory = after([finished(np.full(500, 200.0))] * 20, fleet=fleet)
    assert headroom.margins_frac(memory, OWN) == pytest.approx([OWN[0], OWN[1] - 0.05])
    missed = finished(np.full(20, 200.0), ttft_s=0.7, itl_s=0.07)
    memory = headroom.update(memory, missed, running_req=100.0, feasible=True)
    ttft, itl = headroom.margins_frac(memory, OWN)
    # Twenty misses are worth 0.08; prompts had sunk by 0.02 and no more.
    assert itl == pytest.approx(OWN[1] + 0.03, abs=0.002)
    assert ttft == pytest.approx(OWN[0] + 0.06, abs=0.002)


def test_every_late_prompt_counts_and_is_forgotten_when_others_are_in_time():
    late, fine = finished([200.0], ttft_s=0.7), finished([200.0] * 100)
    headroom, memory = after([late])
    first = headroom.margins_frac(memory, OWN)[0]
    assert OWN[0] < first < OWN[0] + 0.005
    headroom, memory = after([late] * 10)
    tenth = headroom.margins_frac(memory, OWN)[0]
    assert tenth > 5.0 * (first - OWN[0])
    calm = headroom.update(memory, fine, running_req=0.0, feasible=True)
    assert OWN[0] <= headroom.margins_frac(calm, OWN)[0] < tenth


def test_what_was_in_time_for_long_counts_longer_where_clocks_spend_it():
    """What the integrator sinks it must climb again before it asks for a margin."""
    good = [finished([300.0] * 500)] * 20
    for spends, left in ((False, False), (True, True)):
        headroom, memory = after(good, spends=spends)
        assert headroom.spare_frac(memory) == 1.0
        memory = headroom.update(
            memory, finished([300.0] * 8, ttft_s=0.9), running_req=100.0, feasible=True,
            spends=spends,
        )  # fmt: skip
        assert (headroom.spare_frac(memory) > 0.0) is left
        assert headroom.margins_frac(memory, OWN)[0] >= OWN[0]


def test_misses_that_no_margin_could_avoid_are_not_held_against_the_future():
    missed = finished(np.full(500, 200.0), itl_s=0.1)
    headroom, memory = after([missed] * 20, feasible=False)
    assert headroom.margins_frac(memory, OWN)[1] == OWN[1]
    headroom, memory = after([missed] * 20)
    assert headroom.margins_frac(memory, OWN)[1] == 0.5 + OWN[1]
    # As high as outcomes under way can have pushed it, no higher.
    assert memory.tracked.raw_frac[1] == pytest.approx(0.5 + 0.004 * 101)


def test_what_is_late_in_an_overload_uses_up_what_may_be_and_asks_for_no_margin():
    good, late = [finished([300.0] * 500)] * 20, finished([300.0] * 50, ttft_s=0.9)
    headroom, memory = after(good, spends=True)
    memory = headroom.update(memory, late, running_req=100.0, feasible=False, spends=True)
    assert memory.tracked.raw_frac[0] == 0.0
    memory = headroom.update(memory, late, running_req=100.0, feasible=True, spends=True)
    asked = memory.tracked.raw_frac[0]
    assert asked > 0.1
    # A margin that was needed before is kept through it, whoever is in time.
    memory = headroom.update(memory, good[0], running_req=100.0, feasible=False, spends=True)
    assert memory.tracked.raw_frac[0] == asked


def test_one_promise_may_be_learnt_while_the_other_is_out_of_reach():
    missed = finished(np.full(500, 200.0), ttft_s=0.9, itl_s=0.1)
    headroom, memory = after([missed] * 20, feasible=np.array([False, True]))
    ttft, itl = headroom.margins_frac(memory, OWN)
    assert ttft == OWN[0]
    assert itl == 0.5 + OWN[1]


def test_overload_is_paid_for_only_where_it_buys_attainment():
    optimiser = TargetOptimiser(FLEET, SLO)
    rng = np.random.default_rng(0)
    lengths = length_moments(
        np.clip(120 * np.exp(1.2 * rng.standard_normal(50_000)), 4, 3000),
        np.clip(140 * np.exp(0.9 * rng.standard_normal(50_000)), 2, 1000),
    )
    halves = np.full(4, 0.5)
    extra = [
        optimiser.overload_frac(Load(arrival_req_s=rate, lengths=lengths), halves)
        for rate in (60.0, 90.0, 120.0)
    ]
    assert extra[0] == 0.0  # the promise is kept without
    assert 0.05 < extra[1] < 0.25  # some of the way
    assert extra[2] == 0.4  # at the top anyway
