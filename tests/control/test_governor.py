"""The fast layer: against its twin, monotone, bounded, and what it does to tails."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import naive_control
from voltana_ctrl import ConfigError, FleetSpec, Slo, load_profile
from voltana_ctrl.control.governor import IterationGovernor, thrifty_row
from voltana_ctrl.kernels.choose.governor import squared_tok
from voltana_ctrl.laws import kv_transfer_s, prefill_s
from voltana_ctrl.types import Tuning

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("1P1D", PROFILE)
PREFILL, DECODE = FLEET.instances
SLO = Slo(ttft_s=0.6, itl_s=0.06)
CLOCKS = st.sampled_from(PROFILE.clocks_mhz.tolist())


def fresh(instance, **settings):
    return IterationGovernor(instance, SLO, **settings)


@given(n=st.integers(1, 1024), context=st.floats(10.0, 800.0), floor=CLOCKS, ceiling=CLOCKS)
def test_decode_against_the_twin(n, context, floor, ceiling):
    floor = min(floor, ceiling)
    got = fresh(DECODE).step(n, n * context, 0.0, 0.0, floor, ceiling, t_s=0.0)
    expected = naive_control.decode_clock(
        PROFILE.table, PROFILE.padded_batch(), n, n * context, 0.06 / 1.035, floor, ceiling
    )
    assert got == expected
    assert floor <= got <= ceiling


@given(
    waiting=st.floats(1.0, 20_000.0), more=st.floats(0.0, 5_000.0), wait=st.floats(0.0, 0.6),
    later=st.floats(0.0, 0.3), ceiling=CLOCKS,
)  # fmt: skip
def test_a_longer_queue_or_wait_never_lowers_the_clock(waiting, more, wait, later, ceiling):
    base = fresh(PREFILL).step(0, 0, waiting, wait, 210.0, ceiling, t_s=0.0)
    longer = fresh(PREFILL).step(0, 0, waiting + more, wait, 210.0, ceiling, t_s=0.0)
    older = fresh(PREFILL).step(0, 0, waiting, wait + later, 210.0, ceiling, t_s=0.0)
    assert longer >= base
    assert older >= base
    assert max(base, longer, older) <= ceiling


def test_raises_at_once_and_lowers_after_the_dwell():
    governor = fresh(DECODE, dwell_s=1.0)
    low = governor.step(10, 4e3, 0, 0.0, 210.0, 1410.0, t_s=0.0)
    high = governor.step(500, 2.2e5, 0, 0.0, 210.0, 1410.0, t_s=0.1)
    assert high > low
    assert governor.step(10, 4e3, 0, 0.0, 210.0, 1410.0, t_s=0.5) == high
    assert governor.step(10, 4e3, 0, 0.0, 210.0, 1410.0, t_s=1.2) == low


def test_a_ceiling_that_falls_is_obeyed_within_the_dwell():
    governor = fresh(DECODE, dwell_s=10.0)
    governor.step(500, 2.2e5, 0, 0.0, 210.0, 1410.0, t_s=0.0)
    assert governor.step(500, 2.2e5, 0, 0.0, 210.0, 600.0, t_s=0.1) == 600.0


def after_a_minute(delay_s, waiting_tok, oldest_wait_s):
    """Clock of a prefill instance at its lowest one for this queue, after a minute of arrivals."""
    governor = fresh(PREFILL, delay_s=delay_s)
    rng = np.random.default_rng(0)
    for t_s in np.arange(0.0, 60.0, 0.05):
        came_tok = 240.0 * rng.poisson(1.0)
        governor.step(0, 0.0, came_tok, 0.01, 210.0, 1410.0, t_s=t_s)
    governor.step(0, 0.0, 240.0, 0.0, 210.0, 210.0, t_s=60.0)
    return governor.step(0, 0.0, waiting_tok, oldest_wait_s, 210.0, 1410.0, t_s=60.05)


def test_slack_for_the_actuation_delay():
    """The same queue, known to be answered later, asks for a higher clock."""
    clocks_mhz = [after_a_minute(delay_s, 1000.0, 0.02) for delay_s in (0.0, 0.1, 0.2, 0.4)]
    assert clocks_mhz == sorted(set(clocks_mhz))


def test_no_clock_is_asked_for_that_comes_after_the_work_it_is_for():
    """Half a second of waiting is no reason for the ceiling where that comes 0.2 s later."""
    for waiting_tok in (500.0, 1000.0):
        late_mhz, at_once_mhz = (after_a_minute(s, waiting_tok, 0.45) for s in (0.2, 0.0))
        assert late_mhz <= at_once_mhz + 15.0 < 1000.0


def test_expected_arrivals_ask_for_a_higher_clock():
    busy, quiet = fresh(PREFILL), fresh(PREFILL)
    for k in range(200):
        busy.step(0, 0, 900.0 + 500.0 * (k % 2), 0.05, 210.0, 1410.0, t_s=0.1 * k)
        quiet.step(0, 0, 40.0, 0.05, 210.0, 1410.0, t_s=0.1 * k)
    late = (0, 0, 900.0, 0.05, 210.0, 1410.0)
    assert busy.step(*late, t_s=20.1) > quiet.step(*late, t_s=20.1)


def clocks_after(pause_s, *, rate_req_s=20.0, prompt_tok=800.0):
    """Clocks of the five seconds after a pause between two minutes of the same load."""
    governor, rng = fresh(PREFILL), np.random.default_rng(1)
    clocks, t_s = [], 0.0
    for gap_s in rng.exponential(1.0 / rate_req_s, int(120 * rate_req_s)):
        t_s += gap_s
        if t_s >= 60.0 and not clocks:
            t_s += pause_s
            clocks.append(np.nan)
        clock = governor.step(0, 0, prompt_tok, 0.0, 210.0, 1410.0, t_s=t_s)
        if clocks and t_s < 65.0 + pause_s:
            clocks.append(clock)
    return np.array(clocks[1:])


@pytest.mark.parametrize("pause_s", [2.0, 20.0, 60.0, 300.0])
def test_a_pause_in_which_nothing_was_sent_here_is_not_taken_for_bursts(pause_s):
    """Who was parked and is back runs as fast as who was never away."""
    away, there = clocks_after(pause_s), clocks_after(0.0)
    assert 600.0 < there.mean() < 900.0
    assert 0.6 * there.mean() < away.mean() < 1.1 * there.mean()
    assert away.max() < 1.35 * there.max()


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 30.0), st.floats(0.5, 30.0))
def test_whatever_came_first_is_forgotten(seed, before_req_s, rate_req_s):
    """No beginning leaves an estimate that a minute of another load does not mend."""
    rng = np.random.default_rng(seed)
    governors = fresh(PREFILL), fresh(PREFILL)
    t_s = 0.0
    for _ in range(rng.integers(2, 6)):
        t_s += rng.exponential(1.0 / before_req_s)
        governors[0].step(0, 0, rng.exponential(300.0), 0.0, 210.0, 1410.0, t_s=t_s)
    clocks = []
    end_s = t_s + 120.0 + 100.0 / rate_req_s
    while t_s < end_s:
        t_s += rng.exponential(1.0 / rate_req_s)
        tok = rng.exponential(300.0)
        clocks.append([one.step(0, 0, tok, 0.0, 210.0, 1410.0, t_s=t_s) for one in governors])
    last = np.array(clocks[-20:])
    np.testing.assert_allclose(last[:, 0], last[:, 1], rtol=0.1)


def test_a_load_that_falls_is_noticed_within_a_few_requests():
    """Gaps longer than chance explains are not left out for ever."""
    fell, always = fresh(PREFILL), fresh(PREFILL)
    for k in range(1200):
        fell.step(0, 0, 250.0, 0.0, 210.0, 1410.0, t_s=0.05 * k)
    clocks = [
        (
            fell.step(0, 0, 250.0, 0.0, 210.0, 1410.0, t_s=60.0 + 10.0 * k),
            always.step(0, 0, 250.0, 0.0, 210.0, 1410.0, t_s=60.0 + 10.0 * k),
        )
        for k in range(1, 31)
    ]
    assert clocks[-1][0] == clocks[-1][1]


def test_a_colocated_instance_makes_up_for_iterations_that_prompts_stretched():
    mixed = FleetSpec.parse("1C", PROFILE).instances[0]
    steps = {}
    for name, repay_tok in (("patient", 1e9), ("prompt", 32.0)):
        governor = fresh(mixed, tuning=Tuning(repay_tok=repay_tok), memory_s=1e-3)
        for t_s in np.arange(-6.0, 0.0, 0.05):  # arrivals are known by then
            governor.step(150, 6e4, 0.0, 0.0, 210.0, 1410.0, batch_tok=0.0, t_s=t_s)
        clock_of = [
            # One iteration of 0.3 s among steps of 50 ms.
            governor.step(150, 6e4, 0.0, 0.0, 210.0, 1410.0, batch_tok=0.0, t_s=t_s)
            for t_s in (0.0, 0.05, 0.35, *np.arange(0.4, 3.0, 0.05))
        ]
        steps[name] = np.array(clock_of)
    assert (steps["patient"] == steps["patient"][0]).all()
    assert steps["prompt"][2] > steps["patient"][2]
    # 0.24 s behind, 8 ms gained per token: made up within some 30 of them, and then no more.
    assert (steps["prompt"][3:20] > steps["patient"][0]).all()
    assert steps["prompt"][-1] == steps["patient"][0]
    # A decode instance has no prompts, so a late call is nobody's delay.
    decode = fresh(DECODE)
    assert decode.step(150, 6e4, 0.0, 0.0, 210.0, 1410.0, t_s=0.0) == decode.step(
        150, 6e4, 0.0, 0.0, 210.0, 1410.0, t_s=0.4
    )


def test_catching_up_goes_above_the_thrifty_clock_only_for_who_is_far_behind():
    mixed = FleetSpec.parse("1C", PROFILE).instances[0]
    thrifty_mhz = PROFILE.clocks_mhz[thrifty_row(PROFILE.table)]

    busy = (320, 1.3e5, 0.0, 0.0)

    def clock_after(stretched_s, floor_mhz=210.0):
        governor = fresh(mixed, memory_s=1e-3)
        for t_s in np.arange(-6.0, 0.01, 0.05):  # arrivals are known by then
            usual_mhz = governor.step(*busy, floor_mhz, 1410.0, batch_tok=0.0, t_s=t_s)
        late_mhz = governor.step(*busy, floor_mhz, 1410.0, batch_tok=0.0, t_s=stretched_s)
        return usual_mhz, late_mhz

    for stretched_s in (0.2, 0.25, 0.285):
        usual_mhz, late_mhz = clock_after(stretched_s)
        assert usual_mhz < late_mhz <= thrifty_mhz
    # Behind by seconds, no clock is too dear; nor where the floor leaves little else.
    assert clock_after(0.9)[1] == 1410.0
    assert clock_after(0.285, floor_mhz=1095.0)[1] > thrifty_mhz
    # Nor where the batch itself does, whatever the floor.
    busy = (420, 1.722e5, 0.0, 0.0)
    assert 0.9 * thrifty_mhz < clock_after(0.0)[0] < thrifty_mhz < clock_after(0.285)[1]


def test_until_arrivals_have_been_watched_prompts_have_the_thrifty_clock():
    governor = fresh(PREFILL)
    thrifty_mhz = PROFILE.clocks_mhz[thrifty_row(PROFILE.table)]
    clocks_mhz = np.array([
        governor.step(0, 0.0, 40.0, 0.01, 210.0, 1410.0, t_s=0.1 * k) for k in range(100)
    ])  # fmt: skip
    assert (clocks_mhz[:48] == thrifty_mhz).all()
    assert clocks_mhz[50:].max() < thrifty_mhz
    # A ceiling comes first, and nothing is asked for where nothing waits.
    assert fresh(PREFILL).step(0, 0.0, 40.0, 0.01, 210.0, 300.0, t_s=0.0) == 300.0
    assert fresh(PREFILL).step(0, 0.0, 0.0, 0.0, 210.0, 1410.0, batch_tok=0.0, t_s=0.0) == 210.0


def test_while_few_prompts_are_known_they_are_served_sooner():
    """The same queue asks for less once arrivals have been watched for a minute; where more
    requests may be late, for a few seconds.
    """

    def clock_after(watched_s, attainment=0.99):
        slo = dataclasses.replace(SLO, attainment=attainment)
        governor = IterationGovernor(PREFILL, slo)
        for t_s in np.arange(0.0, watched_s, 0.1):
            governor.step(0, 0.0, 250.0, 0.01, 210.0, 1410.0, t_s=t_s)
        return governor.step(0, 0.0, 1500.0, 0.2, 210.0, 1410.0, t_s=watched_s)

    first_mhz, then_mhz, known_mhz = (clock_after(watched_s) for watched_s in (6.0, 20.0, 60.0))
    assert first_mhz > then_mhz > known_mhz
    assert clock_after(20.0, 0.9) == clock_after(60.0, 0.9) < then_mhz
    assert clock_after(20.0, 0.999) >= then_mhz


def test_prompts_that_come_more_often_are_seen_within_seconds():
    mixed = FleetSpec.parse("1C", PROFILE).instances[0]
    # Nobody catches up, so that what is seen of prompts alone moves the clock.
    tuning = Tuning(repay_tok=1e9)

    def clock_after(rising_s):
        governor, ends_s = fresh(mixed, tuning=tuning), 60.0 + rising_s
        for k in range(round(ends_s / 0.05)):
            every = 10 if 0.05 * k < 60.0 else 3
            tok = 250.0 if k % every == 0 else 0.0
            governor.step(100, 4e4, tok, 0.0, 210.0, 1410.0, batch_tok=tok, t_s=0.05 * k)
        return governor.step(100, 4e4, 0.0, 0.0, 210.0, 1410.0, batch_tok=0.0, t_s=ends_s)

    before_mhz, soon_mhz, settled_mhz = clock_after(0.0), clock_after(6.0), clock_after(60.0)
    assert settled_mhz > before_mhz + 60.0
    assert soon_mhz >= before_mhz + 0.7 * (settled_mhz - before_mhz)


@given(
    before=st.integers(0, 50), behind=st.integers(0, 50), long_tok=st.integers(1, 200),
    typical=st.integers(1, 60), done_frac=st.floats(0.0, 1.0),
)  # fmt: skip
def test_squared_context_against_the_sum_over_tokens(before, behind, long_tok, typical, done_frac):
    done = int(done_frac * (before + long_tok + behind))
    left, ahead = before + long_tok + behind - done, before + long_tok - done
    own = sum(2 * at + 1 for at in range(min(long_tok, max(0, done - before)), long_tok))
    others = [max(0, before - done), min(behind, left)]
    expected = own + sum(tok * min(tok, typical) for tok in others)
    assert squared_tok(left, ahead, long_tok, typical) == expected


BIG = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3-70b-tp4")).instances[0]


def serve(prompt_tok):
    """Time and clocks of one prompt on an otherwise idle instance, part by part."""
    governor = IterationGovernor(BIG, Slo(ttft_s=30.0, itl_s=0.1), delay_s=0.0)
    done, t_s, clocks = 0.0, 0.0, []
    while done < prompt_tok:
        part = min(BIG.prefill_budget_tok, prompt_tok - done)
        clocks.append(governor.step(0, 0, prompt_tok - done, t_s, 210.0, 1410.0, t_s=t_s))
        row = BIG.table[np.searchsorted(BIG.clocks_mhz, clocks[-1])]
        t_s += float(prefill_s(row, part, (done + part) ** 2 - done**2))
        done += part
    return t_s, np.array(clocks)


@pytest.mark.parametrize("prompt_tok", [9_000, 30_000, 60_000, 75_000])
def test_a_long_prompt_is_done_in_time_at_a_steady_clock(prompt_tok):
    """The last parts of a long prompt take longest, which is known when it begins."""
    took_s, clocks = serve(prompt_tok)
    assert took_s <= 30.0
    # At its end room is made for what may arrive meanwhile.
    assert clocks[:-1].max() <= 1.1 * clocks[0]
    assert clocks[-1] <= 1.2 * clocks[0]


def test_a_prompt_that_no_clock_serves_in_time_takes_least_energy():
    took_s, clocks = serve(120_000)
    assert took_s > 30.0
    assert (clocks == 1095.0).all()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="margin_frac"):
        fresh(DECODE, margin_frac=(-2.0, 0.0))
    with pytest.raises(ConfigError, match="delay_s"):
        fresh(DECODE, delay_s=np.nan)


@pytest.mark.parametrize(("fleet", "waits"), [("1P1D", True), ("1C", False)])
def test_a_first_token_told_by_decode_leaves_prefill_less_time(fleet, waits):
    """Only where another instance tells it: a colocated one moves nothing."""
    slo = Slo(ttft_s=0.6, itl_s=0.06)
    told = [
        dataclasses.replace(PROFILE, first_token=phase) for phase in ("prefill", "decode")
    ]  # fmt: skip
    early, late = (
        IterationGovernor(FleetSpec.parse(fleet, profile).instances[0], slo).params
        for profile in told
    )
    moved_s = float(kv_transfer_s(PROFILE, PROFILE.prefill_budget_tok))
    assert early[0] - late[0] == (pytest.approx(moved_s + 2.0 * early[1]) if waits else 0.0)
