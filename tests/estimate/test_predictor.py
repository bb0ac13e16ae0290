import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracles.naive_predict import decode as naive_decode
from tests.oracles.naive_predict import prefill as naive_prefill
from tests.oracles.naive_predict import rls as naive_rls
from voltana_ctrl import Decision, FleetSpec, InstanceSpec, IterationBatch, Slo, load_profile
from voltana_ctrl.control.baselines.adaptive import AdaptiveController
from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.estimate import (
    FleetTables,
    InstancePredictor,
    OnlineLearner,
    predict_decode,
    predict_prefill,
)
from voltana_ctrl.kernels.learn import learner as learner_kernels
from voltana_ctrl.kernels.learn import predictor as kernels
from voltana_ctrl.kernels.learn import rls
from voltana_ctrl.ports import Predictor
from voltana_ctrl.routing import fadr_router, least_queue_router
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload

A100 = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
H100 = load_profile("h100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
FLEET = FleetSpec.parse("2P2D", A100)
TABLES = FleetTables.of(FLEET)

any_load = st.floats(allow_nan=False, allow_infinity=False)
loads = st.floats(0.0, 1e6)
clocks = st.floats(210.0, 1410.0)


def scaled(profile, time_frac):
    table = profile.table.copy()
    for name in table.dtype.names:
        if name.endswith("_s"):
            table[name] *= time_frac
    return dataclasses.replace(profile, table=table)


def fleet_believing(profile):
    """The reference fleet's clocks and limits under another profile."""
    return FleetSpec(
        tuple(
            dataclasses.replace(one, profile=profile, clocks_mhz=A100.clocks_mhz)
            for one in FLEET.instances
        )
    )


def roofed(profile, bend_req):
    table = profile.table.copy()
    table["decode_roof_s"] = table["decode_req_s"] + table["decode_base_s"] / bend_req
    return dataclasses.replace(profile, table=table)


ROOFED = roofed(A100, 100)
ROOFED_TABLES = FleetTables.of(fleet_believing(ROOFED))


# The predictor


@given(clocks, st.integers(1, 1024), st.floats(1.0, 450_000.0))
@example(1410.0, 1, 1.0)
@example(210.0, 1024, 450_000.0)
@example(217.5, 9, 5000.0)
def test_decode_matches_its_naive_twin(freq_mhz, running_req, kv_tok):
    got = predict_decode(TABLES, 2, freq_mhz, running_req, kv_tok)
    wanted = naive_decode(A100.table, A100.padded_batch(), freq_mhz, running_req, kv_tok)
    np.testing.assert_allclose([got.time_s, got.energy_j, got.power_w], wanted, rtol=1e-12)


@given(clocks, st.integers(1, 1024), st.floats(0.0, 450_000.0))
@example(1410.0, 96, 0.0)
@example(1410.0, 104, 0.0)
def test_decode_with_a_roof_matches_its_naive_twin(freq_mhz, running_req, kv_tok):
    got = predict_decode(ROOFED_TABLES, 2, freq_mhz, running_req, kv_tok)
    wanted = naive_decode(ROOFED.table, ROOFED.padded_batch(), freq_mhz, running_req, kv_tok)
    np.testing.assert_allclose([got.time_s, got.energy_j, got.power_w], wanted, rtol=1e-12)


@given(clocks, st.floats(1.0, 32_768.0), st.floats(0.0, 1e9))
def test_prefill_matches_its_naive_twin(freq_mhz, new_tok, square_tok2):
    fleet = FleetSpec.parse("1P1D", H100)
    got = predict_prefill(FleetTables.of(fleet), 0, freq_mhz, new_tok, square_tok2)
    wanted = naive_prefill(H100.table, freq_mhz, new_tok, square_tok2)
    np.testing.assert_allclose([got.time_s, got.energy_j, got.power_w], wanted, rtol=1e-12)


@given(any_load, any_load, any_load)
@example(float("nan"), float("nan"), float("nan"))
@example(float("inf"), float("inf"), float("inf"))
@example(-1.0, -1.0, -1.0)
def test_answers_are_finite_and_not_negative(freq_mhz, first, second):
    for answer in (
        predict_decode(TABLES, 2, freq_mhz, first, second),
        predict_prefill(TABLES, 0, freq_mhz, first, second),
    ):
        values = np.array([answer.time_s, answer.energy_j, answer.power_w])
        assert np.isfinite(values).all()
        assert (values >= 0.0).all()


@given(clocks, clocks, loads, loads, loads, loads)
def test_predictions_are_monotone(f1, f2, n1, n2, kv1, kv2):
    (slow, fast), (few, many), (short, long) = (
        sorted((f1, f2)),
        sorted((n1, n2)),
        sorted((kv1, kv2)),
    )
    base = predict_decode(TABLES, 2, slow, few, short)
    assert predict_decode(TABLES, 2, slow, many, long).time_s >= base.time_s
    assert predict_decode(TABLES, 2, slow, many, long).energy_j >= base.energy_j * (1 - 1e-12)
    faster = predict_decode(TABLES, 2, fast, few, short)
    assert faster.time_s <= base.time_s * (1 + 1e-12)
    assert faster.power_w >= base.power_w * (1 - 1e-12)
    prefill = predict_prefill(TABLES, 0, slow, few)
    assert predict_prefill(TABLES, 0, slow, many).time_s >= prefill.time_s
    assert predict_prefill(TABLES, 0, fast, few).time_s <= prefill.time_s * (1 + 1e-12)


def test_questions_broadcast():
    answer = predict_decode(TABLES, [[2], [3]], [210.0, 600.0, 1410.0], 10, 4000.0)
    assert answer.time_s.shape == (2, 3)
    np.testing.assert_array_equal(answer.time_s[0], answer.time_s[1])
    assert predict_decode(TABLES, 2, 1000.0, 1, 1).power_w.shape == ()


@pytest.mark.parametrize("instance", [4, -1, 0.5, [0, 9]])
def test_unknown_instances_are_refused(instance):
    with pytest.raises(ConfigError, match="expected whole numbers from 0 to 3"):
        predict_decode(TABLES, instance, 1000.0, 1, 1)


def test_single_predictor_is_the_port():
    predictor = InstancePredictor(TABLES, 2)
    assert isinstance(predictor, Predictor)
    answer = predict_decode(TABLES, 2, 900.0, 33, 9000.0)
    assert predictor.itl_s(900.0, 33, 9000.0) == answer.time_s
    assert predictor.power_w(900.0, 33, 9000.0) == answer.power_w
    assert predictor.prefill_s(900.0, 512) == predict_prefill(TABLES, 2, 900.0, 512).time_s


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"table": TABLES.table[:, :, 1:]}, ShapeError, "table"),
        ({"n_clocks": np.array([81, 81, 81])}, ShapeError, "table"),
        ({"n_clocks": np.array([81, 81, 81, 82])}, ShapeError, "n_clocks"),
        ({"table": np.nan * TABLES.table}, ConfigError, "table"),
        ({"table": -TABLES.table}, ConfigError, "table"),
    ],
)
def test_bad_tables_are_refused(change, error, names):
    fields = {name: getattr(TABLES, name) for name in FleetTables.__slots__}
    with pytest.raises(error, match=names):
        FleetTables(**{**fields, **change})


def test_nothing_is_compiled_in_the_loop():
    """Frozen, writable, integer and float input all reach the compiled signature."""
    compiled = [
        kernel
        for module in (kernels, learner_kernels, rls)
        for kernel in vars(module).values()
        if hasattr(kernel, "signatures")
    ]
    assert len(compiled) > 15
    learner = OnlineLearner(TABLES)
    state = learner.update(learner.init(), records_of(TABLES, 2, 20))
    predict_decode(learner.tables(state), [2, 3], 1000, 4, 5)
    predict_prefill(TABLES, 0, 1000.0, 4)
    InstancePredictor(TABLES, 1).itl_s(1000, 4, 5)
    assert {len(kernel.signatures) for kernel in compiled} == {1}


# Learning


def records_of(
    tables, instance, n, *, freq_mhz=None, slow_frac=1.0, seed=0, noise=0.0, most_req=300
):
    """Pure decode (instances 2, 3) or prefill records that obey `tables`."""
    random = np.random.default_rng(seed)
    decodes = instance >= 2
    req = random.integers(1, most_req, n).astype(float) if decodes else np.zeros(n)
    kv = req * random.uniform(200.0, 600.0, n)
    tok = np.zeros(n) if decodes else random.integers(10, 8000, n).astype(float)
    # Each clock for two iterations: the first of them is not used.
    clock = np.repeat(random.choice(A100.clocks_mhz, n // 2 + 1), 2)[:n]
    clock = clock if freq_mhz is None else np.full(n, float(freq_mhz))
    if decodes:
        answer = predict_decode(tables, instance, clock, req, kv)
    else:
        answer = predict_prefill(tables, instance, clock, tok)
    jitter = np.exp(noise * random.standard_normal(n))
    return IterationBatch(
        instance=np.full(n, instance),
        t_s=np.arange(n),
        wall_s=answer.time_s * slow_frac * jitter,
        freq_mhz=clock,
        batch_req=req,
        prefill_tok=tok,
        kv_tok=kv,
        energy_j=answer.energy_j * slow_frac * jitter,
    )


def error_frac(tables, truth, instance, clocks_mhz=A100.clocks_mhz):
    """Mean absolute error of time and of power over clocks and loads."""
    clock = np.array(clocks_mhz)[::10, None]
    n = np.array([1, 8, 30, 100, 250.0])
    if instance >= 2:
        args = (instance, clock, n, n * 400)
        got, wanted = predict_decode(tables, *args), predict_decode(truth, *args)
    else:
        args = (instance, clock, n * 30)
        got, wanted = predict_prefill(tables, *args), predict_prefill(truth, *args)
    return tuple(
        float(np.abs(getattr(got, name) / getattr(wanted, name) - 1).mean())
        for name in ("time_s", "power_w")
    )


@given(
    st.lists(st.floats(-1.0, 1.0), min_size=6, max_size=6),
    st.floats(0.1, 3.0),
    st.floats(0.8, 0.999),
)
def test_rls_matches_its_naive_twin(phi, target, forget):
    phi = np.array(phi)
    random = np.random.default_rng(3)
    root = random.normal(size=(6, 6))
    cov = root @ root.T + np.eye(6)
    theta = np.array([1.0, 0.0] * 3)
    if phi @ cov @ phi < 1e-3:
        phi[0] = 0.5
    wanted, wanted_cov = naive_rls(theta, cov, phi, target, forget)
    rls.keep_physical(wanted)
    got, got_cov = theta.copy(), cov.copy()
    error = rls.rls_step(got, got_cov, phi, target, forget, 1e9)
    assert error == pytest.approx(target - phi @ theta)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    ripple = rls.RIPPLE * np.eye(6)
    np.testing.assert_allclose(got_cov, wanted_cov + ripple, rtol=1e-6, atol=1e-8)


def test_rls_agrees_with_least_squares_when_nothing_is_forgotten():
    random = np.random.default_rng(0)
    truth = np.array([1.2, 0.1, 0.8, -0.05, 1.1, 0.02])
    phi = random.uniform(-1.0, 1.0, (500, 6))
    target = phi @ truth + 0.01 * random.standard_normal(500)
    theta, cov = np.array([1.0, 0.0] * 3), np.empty((6, 6))
    rls.restart(cov)
    for row, value in zip(phi, target, strict=True):
        rls.rls_step(theta, cov, row, value, 1.0 - 1e-12, 1e9)
    fitted, *_ = np.linalg.lstsq(phi, target, rcond=None)
    np.testing.assert_allclose(theta, fitted, atol=1e-4)


def test_covariance_does_not_wind_up_without_excitation():
    theta, cov = np.array([1.0, 0.0] * 3), np.empty((6, 6))
    rls.restart(cov)
    before = cov.copy()
    phi = np.array([0.5, 0.1, 0.3, 0.06, 0.2, 0.04])
    for _ in range(100_000):
        rls.rls_step(theta, cov, phi, 1.0, 0.98, 1.0)
    # Along phi it settles where a step forgets what it learns; across it stays what it was.
    assert phi @ cov @ phi == pytest.approx(0.02 / 0.98, rel=1e-3)
    across = np.linalg.svd(phi[None])[2][1:]
    assert np.linalg.eigvalsh(across @ (before - cov) @ across.T).min() > -0.2
    assert np.trace(cov) <= rls.MOST_TRACE


wild = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1e-300, 1e300, 1.0, 0.03, 1410.0, 210.0]),
)


@given(
    st.lists(st.tuples(st.integers(-1, 4), wild, wild, wild, wild, wild, wild), max_size=60),
    st.integers(0, 2**32 - 1),
)
def test_adversarial_records_leave_coefficients_physical(rows, seed):
    learner = OnlineLearner(TABLES)
    columns = list(zip(*rows, strict=True)) or [()] * 7
    names = ("instance", "wall_s", "freq_mhz", "batch_req", "prefill_tok", "kv_tok", "energy_j")
    bad = IterationBatch(t_s=np.zeros(len(rows)), **dict(zip(names, columns, strict=True)))
    state = learner.update(learner.init(), bad)
    # Believable but wrong in every direction.
    random = np.random.default_rng(seed)
    lies = records_of(TABLES, 2, 200, seed=seed % 1000)
    factor = np.exp(random.uniform(-3.0, 3.0, 200))
    lies = dataclasses.replace(lies, wall_s=lies.wall_s * factor, energy_j=lies.energy_j / factor)
    state = learner.update(state, lies)
    assert_physical(learner, state)
    state = learner.update(state, dataclasses.replace(lies, prefill_tok=random.permutation(200)))
    assert_physical(learner, state)


def assert_physical(learner, state):
    tables = learner.tables(state)
    ratio = tables.table[:, :, 1:] / np.where(
        learner.prior.table[:, :, 1:] > 0, learner.prior.table[:, :, 1:], 1.0
    )
    assert np.isfinite(tables.table).all()
    assert (tables.table >= 0.0).all()
    assert ratio.max() <= rls.FARTHEST * (1 + rls.STEEPEST) * 8  # 8: as times fall with f
    names = np.array(A100.table.dtype.names)
    times = np.flatnonzero(np.char.endswith(names, "_s"))
    assert (np.diff(tables.table[:, :, times], axis=1) <= 0.0).all()
    assert (np.diff(np.delete(tables.table, times, axis=2), axis=1) >= 0.0).all()
    for covariance in state.covariance.reshape(-1, 6, 6):
        np.testing.assert_array_equal(covariance, covariance.T)
        assert np.linalg.eigvalsh(covariance).min() > 0.0
        assert np.trace(covariance) <= rls.MOST_TRACE * (1 + 1e-9)


def test_covariance_stays_positive_definite_over_a_long_run():
    learner = OnlineLearner(TABLES)
    state = learner.init()
    for seed in range(20):
        state = learner.update(state, records_of(TABLES, 2, 5000, seed=seed, noise=0.05))
    assert_physical(learner, state)


def test_update_is_pure_and_deterministic():
    learner = OnlineLearner(TABLES)
    start = learner.init()
    copies = [getattr(start, name).copy() for name in start.__slots__]
    records = records_of(TABLES, 2, 100, slow_frac=1.2)
    once, again = learner.update(start, records), learner.update(start, records)
    halves = learner.update(start, take(records, slice(0, 50)))
    halves = learner.update(halves, take(records, slice(50, None)))
    for name, copy in zip(start.__slots__, copies, strict=True):
        np.testing.assert_array_equal(getattr(start, name), copy)
        np.testing.assert_array_equal(getattr(once, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(once, name), getattr(halves, name))
    with pytest.raises(ValueError, match="read-only"):
        once.terms_frac[0, 0, 0] = 2.0


def take(records, part):
    return IterationBatch(**{name: getattr(records, name)[part] for name in records.__slots__})


def test_instances_learn_apart():
    learner = OnlineLearner(TABLES)
    state = learner.update(learner.init(), records_of(TABLES, 2, 200, slow_frac=1.3))
    tables = learner.tables(state)
    for i in (0, 1, 3):
        np.testing.assert_allclose(tables.table[i], TABLES.table[i], rtol=1e-12)
    assert error_frac(tables, TABLES, 2)[0] > 0.25


@pytest.mark.parametrize("instance", [0, 2])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_another_gpu_is_learned(instance, noise):
    """To a tenth around the clocks in use; over the whole ladder its shape is not one tilt."""
    learner = OnlineLearner(FleetTables.of(fleet_believing(H100)))
    for freq_mhz, clocks_mhz, part in ((1005.0, [1005.0], 0.1), (None, A100.clocks_mhz, 0.5)):
        records = records_of(TABLES, instance, 2000, noise=noise, freq_mhz=freq_mhz)
        tables = learner.tables(learner.update(learner.init(), records))
        for wrong, right in zip(
            error_frac(learner.prior, TABLES, instance, clocks_mhz),
            error_frac(tables, TABLES, instance, clocks_mhz),
            strict=True,
        ):
            assert right < part * wrong + 0.2 * noise


def test_a_changed_tile_is_found():
    coarse = fleet_believing(dataclasses.replace(A100, batch_steps=((1024, 64),)))
    learner = OnlineLearner(TABLES)
    state = learner.update(learner.init(), records_of(FleetTables.of(coarse), 2, 1000, noise=0.02))
    assert learner.tile_req(state)[2] == 64
    assert learner.tile_req(state)[3] == 0
    assert learner.tables(state).padded_req[2, 65] == 128
    assert error_frac(learner.tables(state), FleetTables.of(coarse), 2)[0] < 0.01


def test_noise_alone_keeps_the_profile_and_raises_no_alarm():
    learner = OnlineLearner(TABLES)
    state = learner.update(learner.init(), records_of(TABLES, 2, 3000, noise=0.03))
    assert learner.alarms(state)[2, 1] == 0
    assert error_frac(learner.tables(state), TABLES, 2)[0] < 0.02
    assert learner.error_frac(state)[2, 1] == pytest.approx(0.024, abs=0.01)
    assert learner.widening_frac(state)[2, 1] == 0.0


def test_a_slow_down_raises_an_alarm_and_widens_until_it_is_learned():
    learner = OnlineLearner(TABLES)
    state = learner.update(learner.init(), records_of(TABLES, 2, 1000, noise=0.02))
    state = learner.update(state, records_of(TABLES, 2, 30, slow_frac=1.3, seed=1, noise=0.02))
    assert learner.alarms(state)[2, 1] >= 1
    assert learner.widening_frac(state)[2, 1] > 0.05
    state = learner.update(state, records_of(TABLES, 2, 600, slow_frac=1.3, seed=2, noise=0.02))
    assert learner.widening_frac(state)[2, 1] == 0.0
    slower = [
        1.3 if name.startswith("decode_") and name.endswith("_s") else 1.0
        for name in A100.table.dtype.names
    ]
    truth = dataclasses.replace(TABLES, table=TABLES.table * slower)
    assert error_frac(learner.tables(state), truth, 2)[0] < 0.02


def test_outliers_are_gated():
    learner = OnlineLearner(TABLES)
    clean = records_of(TABLES, 2, 1000, noise=0.01)
    wall_s = clean.wall_s.copy()
    wall_s[500::20] *= 10.0  # one in twenty: a pause of the engine
    state = learner.update(learner.init(), dataclasses.replace(clean, wall_s=wall_s))
    assert error_frac(learner.tables(state), TABLES, 2)[0] < 0.03


def test_records_across_a_clock_change_teach_only_what_is_certain():
    learner = OnlineLearner(TABLES)
    slow = predict_decode(TABLES, 2, 705.0, 50, 20_000).time_s
    fast = predict_decode(TABLES, 2, 1410.0, 50, 20_000).time_s

    def after(wall_s):
        k = np.ones(2)
        records = IterationBatch(
            instance=2 * k,
            t_s=k,
            wall_s=[slow, wall_s],
            freq_mhz=[705.0, 1410.0],
            batch_req=50 * k,
            prefill_tok=0 * k,
            kv_tok=20_000 * k,
            energy_j=0 * k,
        )
        state = learner.update(learner.init(), records)
        base = learner_kernels.DECODE_BASE_S
        return learner.tables(state).table[2, :, base] / TABLES.table[2, :, base]

    np.testing.assert_array_equal(after(0.5 * (slow + fast)), np.ones(81))
    assert after(1.2 * slow).min() > 1.0
    assert after(0.8 * fast).max() < 1.0


def mixed_of(n, *, decode_frac, prefill_frac, seed=0, noise=0.0):
    """Iterations of instance 2 that do both, each phase slower by its factor."""
    random = np.random.default_rng([seed, 1])  # not the stream of the batches
    decode = records_of(TABLES, 2, n, slow_frac=decode_frac, seed=seed)
    tok = random.integers(10, 2000, n).astype(float)
    chunk, none = (predict_prefill(TABLES, 2, decode.freq_mhz, t) for t in (tok, 0 * tok))
    jitter = np.exp(noise * random.standard_normal(n))
    return dataclasses.replace(
        decode,
        prefill_tok=tok,
        wall_s=jitter * (decode.wall_s + prefill_frac * (chunk.time_s - none.time_s)),
        energy_j=jitter * (decode.energy_j + prefill_frac * (chunk.energy_j - none.energy_j)),
    )


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize(("decode_frac", "prefill_frac"), [(1.3, 1.3), (1.0, 1.4), (0.7, 1.2)])
def test_mixed_iterations_teach_both_phases(decode_frac, prefill_frac, noise):
    learner = OnlineLearner(TABLES)
    records = mixed_of(600, decode_frac=decode_frac, prefill_frac=prefill_frac, noise=noise)
    state = learner.update(learner.init(), records)
    assert state.counts[2, learner_kernels.LEARNED] > 290  # the others follow a change of the clock
    tables = learner.tables(state)
    n_req = np.array([16, 80, 250])
    got, was = (predict_decode(of, 2, 1005.0, n_req, 400 * n_req).time_s for of in (tables, TABLES))
    # The decode part was never seen alone.
    assert np.abs(got / was / decode_frac - 1.0).mean() < 0.02 + noise
    per_tok = learner_kernels.PREFILL_TOK_S
    ratio = tables.table[2, :, per_tok] / TABLES.table[2, :, per_tok]
    assert ratio == pytest.approx(np.full(81, prefill_frac), rel=0.02 + noise)
    power = predict_decode(tables, 2, 1005.0, 80, 32e3).power_w
    assert power == pytest.approx(predict_decode(TABLES, 2, 1005.0, 80, 32e3).power_w, rel=0.05)
    assert learner.alarms(state)[2].sum() == 0 or noise == 0.0


def test_a_mixed_iteration_moves_each_phase_by_its_doubt():
    """The Kalman gain of both together, from one record."""
    learner = OnlineLearner(TABLES)
    record = mixed_of(1, decode_frac=1.05, prefill_frac=1.05)
    twice = IterationBatch(
        **{name: np.repeat(getattr(record, name), 2) for name in record.__slots__}
    )
    before = learner.init()
    after = learner.update(before, twice)
    k = int(np.flatnonzero(A100.clocks_mhz == record.freq_mhz[0])[0])
    row, x = A100.table[k], 2 * np.log(record.freq_mhz[0] / 210) / np.log(1410 / 210) - 1
    size = A100.padded_batch()[int(record.batch_req[0])]
    decode = [row["decode_base_s"], row["decode_req_s"] * size]
    decode.append(row["decode_kv_s"] * record.kv_tok[0])
    prefill = [0.0, row["prefill_tok_s"] * record.prefill_tok[0], 0.0]
    total_s = sum(decode) + sum(prefill)
    h_d, h_p = (np.kron(part, [1, x]) / total_s for part in (decode, prefill))
    cov = before.covariance[2, 0]
    spread = learner_kernels.MIXED + h_d @ cov @ h_d + h_p @ cov @ h_p
    error = record.wall_s[0] / total_s - 1.0
    start = np.array([1.0, 0.0] * 3)
    for model, h in ((0, h_d), (learner_kernels.PREFILL_TIME, h_p)):
        wanted = start + cov @ h * error / spread
        np.testing.assert_allclose(after.terms_frac[2, model], wanted, rtol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_colocated_instances_learn_a_slow_down(noise):
    fleet = FleetSpec.parse("2C", A100)
    plant = Plant(
        fleet,
        make_workload("sharegpt", rate_req_s=24.0, duration_s=40.0, seed=0),
        PlantSettings(log_iterations=8192, jitter_sd_frac=noise),
        prefill_router=least_queue_router(fleet, "prefill"),
        decode_router=fadr_router(fleet, "decode", SLO, ladder_mhz=None),
    )
    plant.apply(Decision.highest(fleet))
    plant.instances["slow_frac"] = 1.3
    learner = OnlineLearner(FleetTables.of(fleet))
    state = learner.init()
    mixed = 0
    for tick in range(1, 31):
        plant.advance(tick)
        it = plant.read().iterations
        mixed += np.count_nonzero((it.batch_req > 0) & (it.prefill_tok > 0))
        state = learner.update(state, it)
    assert mixed > 200
    row, was = learner.tables(state).rows(0)[-1], A100.table[-1]
    for n_req, tok in ((10, 0), (10, 400), (40, 1500)):
        took, prior = (
            of["decode_base_s"]
            + of["decode_req_s"] * n_req
            + of["decode_kv_s"] * 400 * n_req
            + of["prefill_tok_s"] * tok
            for of in (row, was)
        )
        assert took / prior == pytest.approx(1.3, rel=0.02)


def test_a_floor_moves_with_the_base():
    table = A100.table.copy()
    table["decode_floor_s"] = 0.03
    tables = FleetTables.of(fleet_believing(dataclasses.replace(A100, table=table)))
    learner = OnlineLearner(tables)
    records = records_of(tables, 2, 200, freq_mhz=1410.0, slow_frac=1.5, most_req=5)
    learned = learner.tables(learner.update(learner.init(), records))
    got = predict_decode(learned, 2, 1410.0, 2, 800).time_s
    assert got == pytest.approx(0.045, rel=1e-3)


def test_a_roof_moves_with_the_requests():
    learner = OnlineLearner(ROOFED_TABLES)
    records = records_of(ROOFED_TABLES, 2, 400, slow_frac=1.4)
    learned = learner.tables(learner.update(learner.init(), records))
    for n_req in (8, 300):
        got = predict_decode(learned, 2, 1005.0, n_req, 400 * n_req).time_s
        wanted = 1.4 * predict_decode(ROOFED_TABLES, 2, 1005.0, n_req, 400 * n_req).time_s
        assert got == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("forget", [0.0, 0.4, 1.0, float("nan")])
def test_forgetting_out_of_range_is_refused(forget):
    with pytest.raises(ConfigError, match=r"OnlineLearner\.forget"):
        OnlineLearner(TABLES, forget=forget)


def test_a_state_of_another_fleet_is_refused():
    other = OnlineLearner(FleetTables.of(FleetSpec.parse("1P1D", A100)))
    with pytest.raises(ShapeError, match="expected the state of 4 instances, got 2"):
        OnlineLearner(TABLES).update(other.init(), IterationBatch.empty())


# In the loop


def run_adaptive(
    *,
    phase="decode",
    believed=None,
    event=None,
    rate_req_s=50.0,
    until_s=90.0,
    seed=0,
    jitter=0.0,
    true=FLEET,
):
    """The adaptive policy on the reference fleet; errors of the tables in force, per tick."""
    controller = AdaptiveController(true, SLO, believed=believed)
    memory = controller.init()
    plant = Plant(
        true,
        make_workload("sharegpt", rate_req_s=rate_req_s, duration_s=until_s, seed=seed),
        PlantSettings(log_iterations=4096, jitter_sd_frac=jitter),
        governors=controller.governors,
        prefill_router=least_queue_router(true, "prefill"),
        decode_router=fadr_router(true, "decode", SLO, ladder_mhz=None),
        seed=seed,
    )
    plant.apply(Decision.highest(true, floor_mhz=true.min_mhz))
    tables = start = controller.learner.tables(memory.learned)
    errors = []
    for tick in range(1, round(until_s / 0.1) + 1):
        if event is not None:
            event(plant, 0.1 * tick)
        plant.advance(0.1 * tick)
        seen = plant.read()
        errors.append([phase_errors(one, seen.iterations, phase) for one in (tables, start)])
        decision, memory = controller.decide(seen, memory)
        plant.apply(decision)
        tables = controller.learner.tables(memory.learned)
    return errors, controller, memory, plant


def phase_errors(tables, it, phase):
    """Errors of iterations that follow another at the same clock."""
    errors = []
    for i in (0, 1) if phase == "prefill" else (2, 3):
        mine = np.flatnonzero(it.instance == i)
        same = mine[1:][np.diff(it.freq_mhz[mine]) == 0.0]
        freq_mhz, wall_s = it.freq_mhz[same], it.wall_s[same]
        if phase == "prefill":
            answer = predict_prefill(tables, i, freq_mhz, it.prefill_tok[same])
        else:
            answer = predict_decode(tables, i, freq_mhz, it.batch_req[same], it.kv_tok[same])
        errors.extend(np.abs(answer.time_s / wall_s - 1.0))
    return errors


def mean_error(errors, from_s, until_s, which):
    ticks = errors[round(from_s / 0.1) : round(until_s / 0.1)]
    return float(np.mean([error for tick in ticks for error in tick[which]]))


def slow_down(plant, t_s):
    plant.instances["slow_frac"] = 1.3 if t_s > 20.0 else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [0.0, 0.03])
@pytest.mark.parametrize(
    ("case", "phase"),
    [
        ("slow-down", "prefill"),
        ("slow-down", "decode"),
        ("another GPU", "prefill"),
        ("another GPU", "decode"),
        ("another tile", "decode"),
    ],
)
def test_nine_tenths_of_the_accuracy_are_back_within_a_minute(case, phase, jitter):
    floor = jitter * np.sqrt(2.0 / np.pi)  # mean error of the true law
    start_s = 20.0 if case == "slow-down" else 0.0
    options = {"event": slow_down} if case == "slow-down" else {}
    if case == "another GPU":
        options = {"believed": fleet_believing(H100)}
    if case == "another tile":
        coarse = dataclasses.replace(A100, batch_steps=((1024, 64),))
        options = {"believed": FLEET, "true": fleet_believing(coarse)}
    errors, *_ = run_adaptive(phase=phase, jitter=jitter, until_s=start_s + 65.0, **options)
    wrong = mean_error(errors, start_s + 0.1, start_s + 60, 1)
    right = mean_error(errors, start_s + 55, start_s + 65, 0)
    print(f"{case}, {phase}, noise {jitter}: wrong tables {wrong:.4f}, after 60 s {right:.4f}")
    assert wrong > floor + 0.01
    # A tenth of the noise floor: the sampling error of a mean over a hundred records.
    assert right - floor <= 0.1 * (wrong - floor) + 0.1 * floor


def test_a_wrong_profile_is_mended_in_the_loop():
    errors, controller, memory, plant = run_adaptive(
        believed=FleetSpec.parse("2P2D", scaled(A100, 0.75)), until_s=15.0
    )
    assert mean_error(errors, 0, 15, 1) == pytest.approx(0.25, abs=0.01)
    assert mean_error(errors, 10, 15, 0) < 0.01
    assert set(plant.instances["type"]) == {0, 1, 2, 3}
    assert controller.governors[2].rows["decode_base_s"][0] == pytest.approx(
        A100.table["decode_base_s"][0], rel=0.1
    )
    assert (controller.margin_frac(memory)[:, 1] >= memory.margins.raw_frac[1] - 1e-9).all()


def test_governors_with_tables_of_their_own_are_heeded_by_the_plant():
    """A wrong belief changes what the plant does; the same belief does not."""

    def energy_j(profile):
        plant = Plant(
            FLEET,
            make_workload("sharegpt", rate_req_s=20.0, duration_s=10.0, seed=0),
            governors=[
                EcoFreqGovernor(one, SLO, profile, ladder_mhz=None) for one in FLEET.instances
            ],
        )
        plant.advance(10.0)
        return float(plant.state().energy_j.sum())

    assert energy_j(A100) == energy_j(dataclasses.replace(A100))
    assert energy_j(scaled(A100, 1.5)) > energy_j(A100) > energy_j(scaled(A100, 0.5))


def test_instance_spec_is_used_for_believed_clocks():
    one = InstanceSpec(
        id="x", role=FLEET.instances[0].role, profile=H100, clocks_mhz=[210.0, 600.0]
    )
    rest = FLEET.instances[2]
    tables = FleetTables.of(FleetSpec((one, rest)))
    assert tables.n_clocks.tolist() == [2, 81]
    np.testing.assert_array_equal(tables.table[0, 2:], np.repeat(tables.table[0, 1:2], 79, axis=0))
