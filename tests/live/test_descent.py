"""Clocks come down step by step, and go up again where requests miss or the profile is wrong."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet
from voltana_ctrl import Decision, FleetState, Observation, Slo
from voltana_ctrl.control import StaticController
from voltana_ctrl.laws import decode_s, prefill_s
from voltana_ctrl.live.descent import Descent
from voltana_ctrl.types import IterationBatch, RequestBatch

SLO = Slo(ttft_s=0.6, itl_s=0.06)
DT_S = 0.1


def finished(n, itl_s, decode=1, ttft_s=0.2, output_tok=9.0):
    one = np.ones(n)
    return RequestBatch(
        request=np.arange(n), request_class=0 * one, prompt_tok=100 * one,
        output_tok=output_tok * one, ttft_s=ttft_s * one, itl_s=itl_s * one,
        prefill_instance=0 * one, decode_instance=decode * one,
    )  # fmt: skip


def passes(n, pace, clock_mhz=705.0, prefill_tok=0.0):
    one = fleet().instances[1]
    row = one.table[one.clocks_mhz == clock_mhz]
    wall_s = pace * float(decode_s(row, 64.0, 20_000.0)[0])
    ones = np.ones(n)
    return IterationBatch(
        instance=np.ones(n, np.int64), t_s=ones, wall_s=wall_s * ones, freq_mhz=clock_mhz * ones,
        batch_req=64 * ones, prefill_tok=prefill_tok * ones, kv_tok=2e4 * ones, energy_j=0 * ones,
    )  # fmt: skip


class Low(StaticController):
    """Asks for 705 MHz, and would allow any."""

    def _decide(self, observation, memory):
        floor_mhz = np.full(len(self.fleet), 705.0)
        return Decision.highest(self.fleet, floor_mhz=floor_mhz), memory


class Run:
    """A descent to 705 MHz on 1P1D, tick by tick."""

    def __init__(self, **settings):
        self.descent = Descent(Low(fleet(), 705), SLO, **settings)
        self.memory, self.t_s = self.descent.init(), 0.0

    def tick(self, seconds, done=None, made=None, **state):
        clocks = []
        for _ in range(round(seconds / DT_S)):
            self.t_s += DT_S
            seen = Observation(
                state=replace(FleetState.idle(2, t_s=self.t_s), **state),
                finished=done, iterations=made,
            )  # fmt: skip
            decision, self.memory = self.descent.decide(seen, self.memory)
            clocks.append(decision.freq_mhz.copy())
        return np.array(clocks)


class Lowered(Low):
    """Allows no more than 900 MHz."""

    def _decide(self, observation, memory):
        decision, memory = super()._decide(observation, memory)
        return replace(decision, freq_max_mhz=np.full(len(self.fleet), 900.0)), memory


@pytest.mark.parametrize("budgeted", [False, True])
def test_ceilings_of_a_policy_come_down_with_the_clock_and_those_of_a_budget_hold(budgeted):
    descent = Descent(Lowered(fleet(), 705), SLO, budgeted=budgeted)
    memory, most_mhz = descent.init(), []
    for k in range(120):
        seen = Observation(state=FleetState.idle(2, t_s=DT_S * k))
        decision, memory = descent.decide(seen, memory)
        assert np.all(decision.freq_mhz <= decision.freq_max_mhz)
        most_mhz.append(decision.freq_max_mhz.max())
    assert most_mhz[0] == (900.0 if budgeted else 1410.0)
    assert most_mhz[-1] == 900.0


def test_a_fixed_clock_is_never_exceeded():
    fixed = StaticController(fleet(), 705)
    descent = Descent(fixed, SLO)
    memory = descent.init()
    for k in range(5):
        seen = Observation(state=FleetState.idle(2, t_s=DT_S * k))
        decision, memory = descent.decide(seen, memory)
        assert np.all(decision.freq_max_mhz == 705.0)


def test_it_comes_down_one_step_at_a_time():
    clocks = Run().tick(15.0)
    assert clocks[0].tolist() == [1410.0, 1410.0]
    falls = -np.diff(clocks[:, 1])
    assert falls.max() <= 60.0 + 1e-9
    assert np.all(falls >= 0.0)
    assert np.flatnonzero(falls)[1] - np.flatnonzero(falls)[0] >= 3
    assert clocks[-1].tolist() == [705.0, 705.0]


def test_nothing_is_lowered_on_readings_that_are_old_or_of_the_dead():
    clocks = Run().tick(15.0, age_s=np.array([5.0, 0.0]), alive=np.array([True, False]))
    assert clocks[-1].tolist() == [1410.0, 1410.0]


def test_lasting_misses_return_one_instance_to_the_highest_clock_and_it_comes_down_again(caplog):
    run = Run()
    run.tick(15.0, done=finished(2, 0.03))
    with caplog.at_level(logging.WARNING):
        clocks = run.tick(8.0, done=finished(2, 0.09))
    assert clocks[-1].tolist() == [705.0, 1410.0]
    # A burst of misses is no reason; some seconds of them are.
    assert clocks[40, 1] == 705.0
    (told,) = caplog.messages
    assert "decode-0: back to the highest clock: requests miss" in told
    assert run.descent.notes(run.memory)["returned_to_highest"] == 1.0
    assert run.tick(4.0, done=finished(2, 0.03))[-1, 1] == 1410.0
    assert run.tick(30.0, done=finished(2, 0.03))[-1, 1] == 705.0


@pytest.mark.parametrize("burst_s", [0.2, 2.0])
def test_a_burst_of_misses_that_is_over_returns_nobody(burst_s):
    run = Run()
    run.tick(15.0, done=finished(2, 0.03))
    run.tick(burst_s, done=finished(30, 0.09))
    clocks = run.tick(60.0, done=finished(2, 0.03))
    assert (clocks[:, 1] == 705.0).all()
    assert run.descent.notes(run.memory)["returned_to_highest"] == 0.0


def test_a_burst_of_late_prompts_is_over_although_long_answers_tell_of_it_for_long():
    """A prompt is told of when its answer is done, those of one moment for as long as 20 s."""
    run = Run()
    run.tick(15.0, done=finished(2, 0.03))
    for k in range(round(20.0 / DT_S)):
        done = finished(2, 0.03, ttft_s=0.9, output_tok=1.0 + k * DT_S / 0.03)
        assert run.tick(DT_S, done=done)[-1].tolist() == [705.0, 705.0]
    clocks = run.tick(60.0, done=finished(2, 0.03))
    assert (clocks == 705.0).all()


def test_misses_that_the_promise_allows_change_nothing():
    run, random = Run(), np.random.default_rng(0)
    run.tick(15.0)
    for _ in range(600):
        missed = random.random() < 0.01
        assert run.tick(DT_S, done=finished(1, 0.09 if missed else 0.03))[-1, 1] == 705.0


def prefills(n, pace, clock_mhz=1410.0, tok=800.0):
    one = fleet().instances[0]
    row = one.table[one.clocks_mhz == clock_mhz]
    wall_s = pace * float(prefill_s(row, tok)[0])
    ones = np.ones(n)
    return IterationBatch(
        instance=np.zeros(n, np.int64), t_s=ones, wall_s=wall_s * ones, freq_mhz=clock_mhz * ones,
        batch_req=0 * ones, prefill_tok=tok * ones, kv_tok=0 * ones, energy_j=0 * ones,
    )  # fmt: skip


def by_profile(run, made, i):
    """Ticks at the clock that was asked for, as an engine that obeys makes them."""
    clock_mhz, clocks = 1410.0, []
    for _ in range(200):
        clocks.append(run.tick(DT_S, made=made(clock_mhz))[-1].copy())
        ladder = fleet().instances[i].clocks_mhz
        clock_mhz = float(ladder[np.searchsorted(ladder, clocks[-1][i])])
    return np.array(clocks)


@pytest.mark.parametrize(("pace", "believed"), [(1.0, True), (1.15, True), (1.25, False),
                                                (0.75, False)])  # fmt: skip
@pytest.mark.parametrize(("made", "phase", "i"), [(passes, 0, 1), (prefills, 1, 0)])
def test_a_profile_is_held_against_the_engine_before_anything_is_lowered(
    made, phase, i, pace, believed, caplog
):
    run = Run()
    with caplog.at_level(logging.WARNING):
        clocks = by_profile(run, lambda mhz: made(3, pace, clock_mhz=mhz), i)
    # Not a step before enough iterations were compared.
    assert (clocks[: 13 if made is passes else 5, i] == 1410.0).all()
    assert clocks[-1, i] == (705.0 if believed else 1410.0)
    assert clocks[-1, 1 - i] == 705.0
    if made is passes:
        assert run.memory.pace_frac[phase, i] == pytest.approx(pace, rel=1e-6)
    if not believed:
        assert (clocks[:, i] == 1410.0).all()  # refused, from the first tick on
        (told,) = caplog.messages
        assert f"take {run.memory.pace_frac[phase, i]:.2f} times what the profile" in told
        assert "voltana-ctrl fit" in told


def test_who_came_down_idle_is_at_the_highest_clock_while_its_profile_is_compared():
    run = Run()
    assert run.tick(15.0)[-1, 1] == 705.0
    clocks = run.tick(1.0, made=passes(3, 1.0))
    assert (clocks[:, 1] == 1410.0).all()
    assert run.tick(15.0, made=passes(3, 1.0))[-1, 1] == 705.0
    assert run.descent.notes(run.memory)["returned_to_highest"] == 0.0


def test_an_engine_that_drifts_is_brought_back_and_comes_down_when_it_is_well_again(caplog):
    run = Run()
    run.tick(15.0, made=passes(10, 1.0))
    with caplog.at_level(logging.WARNING):
        clocks = run.tick(10.0, made=passes(10, 1.25))
    assert clocks[-1, 1] == 1410.0
    assert "decode-0: its decode iterations take 1.2" in caplog.messages[0]
    with caplog.at_level(logging.WARNING):
        assert run.tick(40.0, made=passes(10, 1.0))[-1, 1] == 705.0
    assert "take the time that its profile says again" in caplog.messages[-1]


def test_a_pace_at_the_edge_of_the_band_is_told_of_once(caplog):
    run = Run()
    with caplog.at_level(logging.WARNING):
        for k in range(60):
            run.tick(1.0, made=passes(10, (1.17, 1.23)[k % 2]))
    assert len(caplog.messages) == 1
    assert run.memory.strange[0, 1]


def test_iterations_of_both_phases_or_at_a_clock_that_changes_are_no_witnesses():
    run = Run()
    run.tick(15.0, made=passes(10, 3.0, prefill_tok=500.0))
    for k in range(100):
        run.tick(DT_S, made=passes(1, 3.0, clock_mhz=(900.0, 705.0)[k % 2]))
    assert not run.memory.passes.any()


def test_why_a_clock_is_up_is_told_while_it_is(caplog):
    run = Run()
    assert run.descent.reasons() == {}
    run.tick(2.0)
    assert "it comes down step by step from its highest" in run.descent.reasons()["decode-0"]
    run.tick(1.0, made=passes(3, 1.0))
    told = run.descent.reasons()["decode-0"]
    assert "compared with its engine first, 29 of 40 decode iterations so far" in told
    run.tick(15.0, made=passes(3, 1.0))
    assert run.descent.reasons() == {}  # where the policy wants it
    run.tick(4.0, done=finished(2, 0.09))
    assert run.descent.reasons() == {}  # misses alone raise nothing yet
    run.tick(4.0, done=finished(2, 0.09))
    told = run.descent.reasons()["decode-0"]
    assert re.search(r"requests missed their promise.* comes down again step by step in \d s", told)
    drifts = Run()
    drifts.tick(10.0, made=passes(10, 1.25))
    assert (
        "decode iterations take 1.25 times what its profile says"
        in (drifts.descent.reasons()["decode-0"])
    )
