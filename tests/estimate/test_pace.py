"""Pace, delay and highest clock of every instance: what is learnt of them, and what is not."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control import IterationGovernor
from voltana_ctrl.estimate import PaceFilter
from voltana_ctrl.kernels.learn import pace as kernels
from voltana_ctrl.laws import decode_s, empty_tok, prefill_s
from voltana_ctrl.sim.faults import ClockClamp, Slowdown
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import IterationBatch

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
TILED = load_profile("l20/qwen2.5-7b")
FLEET = FleetSpec.parse("2P2D", PROFILE)
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def records(fleet, rows):
    """One record per (instance, clock, requests, KV tokens, prompt tokens, pace of both)."""
    walls, columns = [], list(zip(*rows, strict=True))
    for i, mhz, n, kv_tok, tok, prefill_pace, decode_pace in rows:
        one = fleet.instances[i]
        row = one.table[int(np.searchsorted(one.clocks_mhz, mhz))]
        size = float(one.profile.padded_batch(one.max_batch)[int(n)])
        step_s = decode_pace * float(decode_s(row, size, kv_tok, None, tok)) if n else 0.0
        chunk_s = float(prefill_s(row, tok)) if tok else 0.0
        if n and tok:
            # Tiles are shared, and what decodes pays for what is empty in them.
            chunk_s -= float(row["prefill_base_s"])
            chunk_s -= float(row["prefill_tok_s"] * empty_tok(row, tok))
        walls.append(step_s + prefill_pace * chunk_s)
    t_s = np.cumsum(walls)
    tok = np.array(columns[4], float)
    return IterationBatch(
        instance=columns[0], t_s=t_s, wall_s=walls, freq_mhz=columns[1], batch_req=columns[2],
        kv_tok=columns[3], prefill_tok=tok, energy_j=np.zeros(len(rows)), prefill_tok2=tok**2,
    )  # fmt: skip


def learnt(fleet, rows):
    paces = PaceFilter(fleet)
    observation = Observation(state=FleetState.idle(len(fleet)), iterations=records(fleet, rows))
    return paces, paces.update(paces.init(), observation)


@given(
    pace=st.floats(0.4, 4.0), mhz=st.sampled_from(list(PROFILE.clocks_mhz)),
    n=st.integers(1, 200), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None)
def test_a_steady_pace_is_found_at_any_clock_and_batch(pace, mhz, n, seed):
    rng = np.random.default_rng(seed)
    rows = [(3, mhz, n, float(rng.integers(n, 900 * n)), 0, 1.0, pace) for _ in range(60)]
    paces, memory = learnt(FLEET, rows)
    assert paces.pace_frac(memory)[3, 1] == pytest.approx(pace, rel=0.02)
    untouched = np.delete(paces.pace_frac(memory), 3, axis=0)
    np.testing.assert_array_equal(untouched, 1.0)


@given(
    prefill=st.floats(0.6, 2.0), decode=st.floats(0.6, 2.0), seed=st.integers(0, 99),
    profile=st.sampled_from([PROFILE, TILED]),
)  # fmt: skip
@settings(deadline=None)
def test_the_phases_of_a_colocated_instance_are_told_apart(prefill, decode, seed, profile):
    rng = np.random.default_rng(seed)
    fleet = FleetSpec.parse("1C", profile)
    rows = []
    for _ in range(200):
        n, tok = int(rng.integers(1, 100)), int(rng.integers(100, 3000)) * int(rng.random() < 0.5)
        rows.append((0, 1410.0, n, 400.0 * n, tok, prefill, decode))
    paces, memory = learnt(fleet, rows)
    assert paces.pace_frac(memory)[0] == pytest.approx([prefill, decode], rel=0.03)


def test_noise_is_measured_and_moves_the_pace_little():
    rng = np.random.default_rng(0)
    for sd in (0.02, 0.1, 0.3):
        factors = np.exp(sd * rng.standard_normal(800) - sd**2 / 2)
        rows = [(2, 900.0, 60, 2e4, 0, 1.0, factor) for factor in factors]
        paces, memory = learnt(FLEET, rows)
        assert paces.noise_frac(memory)[2] == pytest.approx(sd, rel=0.3)
        # Some twenty records are remembered.
        assert paces.pace_frac(memory)[2, 1] == pytest.approx(1.0, abs=sd * 0.7)


def test_a_change_is_believed_within_a_second_of_iterations():
    before = [(2, 900.0, 60, 2e4, 0, 1.0, 1.0)] * 200
    for records_after in (10, 20):
        rows = before + [(2, 900.0, 60, 2e4, 0, 1.0, 1.4)] * records_after
        paces, memory = learnt(FLEET, rows)
        assert paces.pace_frac(memory)[2, 1] == pytest.approx(1.4, rel=0.03)


def test_under_a_clock_that_changed_only_what_neither_explains_counts():
    """Times between those at the old and the new clock say nothing of the pace."""
    slow, fast = (float(decode_s(PROFILE.table[k], 60.0, 2e4)) for k in (10, 60))
    clocks = PROFILE.clocks_mhz[[10, 60]]
    wall_s = np.tile([(slow + 3 * fast) / 4, (3 * slow + fast) / 4], 100)
    k = np.ones(200)
    ran = IterationBatch(
        instance=2 * k, t_s=np.cumsum(wall_s), wall_s=wall_s, freq_mhz=np.tile(clocks, 100),
        batch_req=60 * k, prefill_tok=0 * k, kv_tok=2e4 * k, energy_j=0 * k,
    )  # fmt: skip
    paces = PaceFilter(FLEET)
    memory = paces.update(paces.init(), Observation(state=FleetState.idle(4), iterations=ran))
    assert paces.pace_frac(memory)[2, 1] == pytest.approx(1.0, abs=0.15)
    slower = dataclasses.replace(ran, wall_s=2.0 * slow * k, t_s=np.cumsum(2.0 * slow * k))
    memory = paces.update(memory, Observation(state=FleetState.idle(4), iterations=slower))
    assert paces.pace_frac(memory)[2, 1] > 1.8


@given(
    values=st.lists(
        st.tuples(*(st.sampled_from([0.0, -1.0, 1.0, np.nan, np.inf, 1e300, 5e-324]),) * 6),
        min_size=1, max_size=8,
    )
)  # fmt: skip
@settings(deadline=None)
def test_no_record_whatever_it_says_makes_a_pace_that_cannot_be(values):
    wall, mhz, n, tok, kv, asked = np.array(values).T
    k = np.ones(len(values))
    ran = IterationBatch(
        instance=np.arange(len(values)) - 2, t_s=k, wall_s=wall, freq_mhz=mhz, batch_req=n,
        prefill_tok=tok, kv_tok=kv, energy_j=0 * k, asked_mhz=asked, prefill_tok2=tok,
    )  # fmt: skip
    paces = PaceFilter(FLEET)
    memory = paces.update(paces.init(), Observation(state=FleetState.idle(4), iterations=ran))
    pace = paces.pace_frac(memory)
    assert np.all(np.isfinite(pace) & (pace > 0.0))
    assert np.all(np.isin(paces.able_mhz(memory), PROFILE.clocks_mhz))
    assert np.all(paces.delay_s(memory) >= 0.0)


def watched(*, fleet="2P2D", rate=45.0, until_s=20.0, governed=True, log=4096, faults=(),
            settings=None):  # fmt: skip
    """What a filter says of a plant after each second."""
    spec = FleetSpec.parse(fleet, PROFILE)
    settings = dataclasses.replace(settings or PlantSettings(), log_iterations=log)
    plant = Plant(
        spec,
        make_workload("sharegpt", rate, until_s + 5.0, 0),
        settings,
        governors=[IterationGovernor(one, SLO) for one in spec.instances] if governed else None,
        faults=faults,
    )
    rng = np.random.default_rng(0)
    floor = spec.min_mhz if governed else spec.max_mhz
    decision = Decision.highest(spec, floor_mhz=floor)
    plant.apply(decision)
    paces = PaceFilter(spec)
    memory, seen = paces.init(), []
    for tick in range(1, int(10 * until_s) + 1):
        plant.advance(tick / 10.0)
        memory = paces.update(memory, plant.read())
        if not governed and tick % 7 == 0:
            clocks = rng.choice(PROFILE.clocks_mhz[20:], len(spec))
            decision = dataclasses.replace(decision, freq_mhz=clocks)
            plant.apply(decision)
        memory = paces.asked(memory, decision, governed=governed)
        if tick % 10 == 0:
            seen.append(memory)
    return paces, seen


def test_a_plant_is_what_its_profile_says_and_is_believed_to_be():
    """Also while its clock goes to and fro, lower in between than at any reading."""
    for fleet, rate in (("2P2D", 45.0), ("2P2D", 55.0), ("2P2D", 60.0), ("3C", 35.0)):
        paces, seen = watched(fleet=fleet, rate=rate)
        for memory in seen[5:]:
            assert paces.pace_frac(memory) == pytest.approx(1.0, abs=0.05)
            assert paces.delay_s(memory) == pytest.approx(0.025)
            assert np.all(paces.able_mhz(memory) == 1410.0)


def test_one_slow_instance_is_found_and_forgotten():
    faults = [
        Slowdown(instance="decode-0", slow_frac=1.4, from_s=10.0, until_s=16.0),
        Slowdown(instance="prefill-1", slow_frac=1.6, from_s=10.0, until_s=16.0),
    ]
    paces, seen = watched(faults=faults, until_s=24.0)
    during, after = paces.pace_frac(seen[14]), paces.pace_frac(seen[23])
    assert during[2, 1] == pytest.approx(1.4, rel=0.03)
    assert during[1, 0] == pytest.approx(1.6, rel=0.1)
    assert np.delete(during.ravel(), [2, 5]) == pytest.approx(1.0, abs=0.03)
    assert after == pytest.approx(1.0, abs=0.06)
    # A decode instance iterates some thirty times a second.
    assert paces.pace_frac(seen[10])[2, 1] == pytest.approx(1.4, rel=0.05)


def test_a_clamped_clock_is_found_within_a_second_and_released():
    clamp = ClockClamp(instance="decode-0", clamp_mhz=300.0, from_s=10.0, until_s=15.0)
    paces, seen = watched(faults=[clamp])
    clamped = [paces.able_mhz(memory) for memory in seen]
    assert np.all(np.array(clamped)[:, [0, 1, 3]] == 1410.0)
    assert [able[2] for able in clamped[10:14]] == [300.0] * 4
    assert clamped[9][2] == clamped[-1][2] == 1410.0


@pytest.mark.parametrize("settle_s", [0.0, 0.02, 0.1, 0.2, 0.4])
def test_the_delay_is_found(settle_s):
    true_s = settle_s + 0.005
    paces, seen = watched(settings=PlantSettings(settle_s=settle_s), until_s=30.0)
    found_s = np.array([paces.delay_s(memory) for memory in seen[-15:]])
    # Iterations end every 20 to 60 ms, so a shorter delay than believed is not told from it.
    right = (found_s >= 0.7 * true_s) & (found_s <= max(0.025, 1.3 * true_s))
    # In four of five seconds at least: what one of them told may be off.
    assert np.all(right.mean(axis=0) >= 0.8)


def test_counts_of_tokens_say_it_where_no_iterations_are_told():
    faults = [Slowdown(instance="decode-0", slow_frac=1.4, from_s=0.0)]
    paces, seen = watched(log=0, faults=faults, until_s=30.0)
    pace = paces.pace_frac(seen[-1])
    assert pace[2, 1] == pytest.approx(1.4, rel=0.07)
    assert pace[3, 1] == pytest.approx(1.0, abs=0.05)
    faults = [Slowdown(instance="colocated-0", slow_frac=1.6, from_s=0.0)]
    paces, seen = watched(fleet="3C", rate=45.0, log=0, faults=faults, until_s=40.0)
    pace = paces.pace_frac(seen[-1])
    assert np.all(pace[0] > 1.25)
    assert np.all(pace[1:] < 1.25)


def test_a_clock_that_the_loop_sets_tells_its_delay_and_its_clamp():
    clamp = ClockClamp(instance="prefill-1", clamp_mhz=600.0, from_s=40.0)
    paces, seen = watched(
        governed=False, log=0, until_s=60.0, faults=[clamp], settings=PlantSettings(settle_s=0.3)
    )
    # Read ten times a second.
    assert paces.delay_s(seen[35])[[2, 3]] == pytest.approx(0.35, abs=0.1)
    assert paces.able_mhz(seen[35])[1] == 1410.0
    assert paces.able_mhz(seen[-1])[1] == 600.0


def test_the_filter_is_pure_and_its_kernel_keeps_its_covariance():
    _, memory = learnt(FLEET, [(2, 900.0, 60, 2e4, 0, 1.0, 1.2)] * 30)
    for name in ("known", "asks_s", "asks_k", "lag_miss_frac", "counted_s", "told"):
        assert not getattr(memory, name).flags.writeable
    known = np.empty(kernels.N_KNOWN)
    kernels.begin(known, 1410.0)
    rng = np.random.default_rng(0)
    for _ in range(5000):
        kernels.learn_pace(known, rng.random(), float(np.exp(rng.normal(0.0, 1.5))))
        p, both, d = known[[kernels.PREFILL_VAR, kernels.BOTH_VAR, kernels.DECODE_VAR]]
        assert p > 0.0
        assert d > 0.0
        assert both**2 <= p * d * (1.0 + 1e-9)
