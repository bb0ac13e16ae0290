"""Identification: what is simulated from a profile is found again; what cannot be is refused."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voltana_ctrl import load_profile
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit import (
    IterationTable,
    detect_batch_steps,
    draw_diagnostics,
    fit_decode_time,
    fit_laws,
    fit_power,
    fit_prefill_time,
    fit_table,
    hold_out,
)
from voltana_ctrl.fit.staircase import pad
from voltana_ctrl.laws.iteration import at_clock, decode_j, decode_s, prefill_j, prefill_s
from voltana_ctrl.profiles.format import profile_from_laws

REFERENCE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
EAGER = "a800-sxm-80gb/qwen3-32b"
CLOCKS_MHZ = (210.0, 450.0, 690.0, 930.0, 1170.0, 1290.0, 1410.0)
PAIRS = [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 120, 121, 128]
PROMPTS = [(128, 1), (512, 1), (2048, 1), (8192, 1), (2048, 4), (8192, 4), (4096, 16), (8192, 16)]


def simulate(profile, batches, noise_frac=0.0, seed=0, clocks=CLOCKS_MHZ, contexts=(200, 2000)):
    """Table of iterations of a profile, times and energies with independent relative noise."""
    rng = np.random.default_rng(seed)
    freq, size, context = (a.ravel() for a in np.meshgrid(clocks, batches, contexts))
    rows, kv = at_clock(profile, freq), size * context
    padded = profile.padded_batch(int(max(batches)))[size.astype(int)]
    freq_p, which = (a.ravel() for a in np.meshgrid(clocks, np.arange(len(PROMPTS))))
    tok, prompts = np.array(PROMPTS, dtype=float)[which.astype(int)].T
    rows_p, square = at_clock(profile, freq_p), tok**2 / prompts
    wall_s = np.append(decode_s(rows, size, kv, padded), prefill_s(rows_p, tok, square, prompts))
    energy_j = np.append(decode_j(rows, size, kv, padded), prefill_j(rows_p, tok, square, prompts))
    none, none_p = np.zeros(len(freq)), np.zeros(len(freq_p))
    return IterationTable(
        phase=("decode",) * len(freq) + ("prefill",) * len(freq_p),
        freq_mhz=np.append(freq, freq_p),
        batch_req=np.append(size, prompts),
        kv_tok=np.append(kv, none_p),
        prefill_tok=np.append(none, tok),
        square_tok2=np.append(none, square),
        wall_s=wall_s * (1.0 + noise_frac * rng.standard_normal(len(wall_s))),
        energy_j=energy_j * (1.0 + noise_frac * rng.standard_normal(len(wall_s))),
        gpus=profile.gpus,
    )


def decode_table(freq, size, kv, wall_s, energy_j=None):
    zero = np.zeros(len(size))
    return IterationTable(
        phase=("decode",) * len(size),
        freq_mhz=freq + zero,
        batch_req=size,
        kv_tok=kv + zero,
        prefill_tok=zero,
        square_tok2=zero,
        wall_s=wall_s,
        energy_j=zero + np.nan if energy_j is None else energy_j,
    )


def prefill_table(freq, tok, prompts, wall_s, energy_j=None):
    zero = np.zeros(len(tok))
    return IterationTable(
        phase=("prefill",) * len(tok),
        freq_mhz=freq + zero,
        batch_req=prompts + zero,
        kv_tok=zero,
        prefill_tok=tok,
        square_tok2=tok**2 / prompts,
        wall_s=wall_s,
        energy_j=zero + np.nan if energy_j is None else energy_j,
    )


def with_quadratic(profile):
    """The profile with an attention term, which the reference leaves out."""
    table = profile.table.copy()
    table["prefill_tok2_s"] = 3e-6 * table["prefill_tok_s"]
    return replace(profile, table=table)


def stated(laws):
    """Column -> (values, standard errors) at the measured clocks."""
    decode, prefill = laws.decode, laws.prefill
    return {
        "decode_base_s": (decode.base_s, decode.base_sd_s),
        "decode_req_s": (decode.req_s, decode.req_sd_s),
        "decode_kv_s": (decode.kv_s, decode.kv_sd_s),
        "prefill_base_s": (prefill.base_s, prefill.base_sd_s),
        "prefill_tok_s": (prefill.tok_s, prefill.tok_sd_s),
        "prefill_tok2_s": (prefill.tok2_s, prefill.tok2_sd_s),
    }


@pytest.fixture(scope="module")
def noisy():
    """Profile, table simulated from it with noise, and the fit of that table."""
    profile = with_quadratic(load_profile(REFERENCE))
    table = simulate(profile, PAIRS, 0.005, 2)
    return profile, table, fit_table(table)


# Round trip


@pytest.mark.parametrize(("name", "steps"), [(REFERENCE, ((128, 8),)), (EAGER, ())])
def test_a_profile_without_noise_is_found_again(tmp_path, name, steps):
    profile = load_profile(name)
    if name == REFERENCE:
        profile = with_quadratic(profile)
    result = fit_table(simulate(profile, PAIRS))
    assert result.laws.batch_steps == steps
    assert result.laws.decode.form == "line"
    path = tmp_path / "found.toml"
    result.save(path, "own/model", profile)
    found, true = load_profile(path), at_clock(profile, CLOCKS_MHZ)
    assert found.name == "own/model"
    assert found.status == "scaled"
    assert (found.idle_w, found.kv_capacity_tok) == (profile.idle_w, profile.kv_capacity_tok)
    for column in true.dtype.names:
        # The base and quadratic of the A800 profile follow a power of the clock and a cap, the
        # fitted form is b0 + b1 / f.
        loose = name == EAGER and column.startswith("prefill")
        np.testing.assert_allclose(
            found.table[column],
            true[column],
            rtol=0.03 if loose else 1e-3,
            atol=1e-9 if column == "prefill_tok2_s" else 1e-12,
            err_msg=column,
        )


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([0.005, 0.01, 0.02]))
def test_with_noise_it_is_found_within_the_stated_errors(seed, noise):
    profile = with_quadratic(load_profile(REFERENCE))
    table = simulate(profile, PAIRS, noise, seed)
    steps = detect_batch_steps(table.of("decode"))
    assert steps == ((128, 8),)
    laws = fit_laws(table, batch_steps=steps)
    true = at_clock(profile, CLOCKS_MHZ)
    for column, (values, sd) in stated(laws).items():
        # Five standard errors: 42 coefficients in each of many examples.
        assert np.all(np.abs(values - true[column]) <= 5.0 * sd), column
        assert np.all(sd > 0.0), column
        assert np.median(sd / true[column]) < (50 if "tok2" in column else 5) * noise, column
    power = laws.power
    expected = {
        "rise_frac": 0.71, "knee_mhz": 1106.0, "prefill_static_w": 59.3,
        "prefill_dynamic_w": 197.3, "decode_static_w": 78.0, "decode_dynamic_w": 57.0,
        "decode_iter_j": 0.76, "decode_req_j": 0.0078, "decode_kv_j": 1.24e-5,
    }  # fmt: skip
    for name, value in expected.items():
        assert abs(getattr(power, name) - value) <= 5.0 * power.sd[name], name
    assert power.capped_mhz == 1410.0
    assert power.cap_w == pytest.approx(400.0, rel=3 * noise)


def test_standard_errors_are_neither_boast_nor_alibi():
    profile = load_profile(REFERENCE)
    true = at_clock(profile, CLOCKS_MHZ)
    z = []
    for seed in range(25):
        decode = simulate(profile, PAIRS, 0.01, seed).of("decode")
        law = fit_decode_time(decode, "line", batch_steps=((128, 8),))
        z.append((law.base_s - true["decode_base_s"]) / law.base_sd_s)
        z.append((law.kv_s - true["decode_kv_s"]) / law.kv_sd_s)
    assert 0.7 < np.std(z) < 1.4


def test_outliers_do_not_move_the_fit():
    profile = load_profile(REFERENCE)
    table = simulate(profile, PAIRS, 0.01, 1).of("decode")
    wall_s = table.wall_s.copy()
    wall_s[::15] *= 4.0  # a garbage collector, another tenant
    spoilt = decode_table(table.freq_mhz, table.batch_req, table.kv_tok, wall_s)
    true = at_clock(profile, CLOCKS_MHZ)
    law = fit_decode_time(spoilt, "line", batch_steps=((128, 8),))
    np.testing.assert_allclose(law.base_s, true["decode_base_s"], rtol=0.03)


def test_a_launch_floor_is_found():
    profile = load_profile(REFERENCE)
    table = profile.table.copy()
    table["decode_floor_s"] = 0.018
    result = fit_table(simulate(replace(profile, table=table), PAIRS, 0.005, 3))
    assert result.laws.decode.form == "line+floor"
    assert abs(result.laws.decode.floor_s - 0.018) < 5 * result.laws.decode.floor_sd_s
    text = result.to_toml("own/model", profile)
    np.testing.assert_allclose(
        profile_from_laws(tomllib.loads(text)).table["decode_floor_s"], 0.018, rtol=0.01
    )


def test_a_bend_is_found_where_it_predicts_better():
    f, n, c = (a.ravel() for a in np.meshgrid(CLOCKS_MHZ, [1.0, 8, 32, 64, 128, 256], [300, 3000]))
    stream, compute = 10.0 / f + 2e-5 * n, 0.12 * n / f  # they cross at about 100 requests
    table = decode_table(f, n, n * c, np.maximum(stream, compute) + 2e-8 * n * c)
    result = fit_table(table)
    law = result.laws.decode
    assert law.form == "roofline"
    assert law.compute_s == pytest.approx(0.12, rel=1e-3)
    line, *_ = hold_out(table, fit_laws(table), "decode", "batch")
    assert result.errors("decode", "time", "batch").mape_frac < 0.5 * line.mape_frac
    assert "decode_roof_s 8.51" in result.summary()


def test_a_roof_returns_through_the_profile():
    profile = load_profile(REFERENCE)
    table = profile.table.copy()
    table["decode_roof_s"] = 0.35 / table["clock_mhz"]
    true = replace(profile, table=table)
    result = fit_table(simulate(true, PAIRS, 0.005, 4))
    assert abs(result.laws.decode.compute_s - 0.35) < 5 * result.laws.decode.compute_sd_s
    found = result.profile("own/model", profile, ladder_mhz=profile.clocks_mhz)
    np.testing.assert_allclose(found.table["decode_roof_s"], table["decode_roof_s"], rtol=0.01)


# Shape


@settings(max_examples=15)
@given(data=st.data(), form=st.sampled_from(["line", "line+floor", "roofline+floor"]))
def test_decode_law_is_monotone_whatever_is_measured(data, form):
    f, n, c = (a.ravel() for a in np.meshgrid([600.0, 900.0, 1400.0], [1.0, 9, 40, 90], [50, 900]))
    wall_s = np.array(data.draw(st.lists(st.floats(1e-3, 0.5), min_size=24, max_size=24)))
    near = fit_decode_time(decode_table(f, n, n * c, 1e-2 + 1e-5 * n + 1e-7 * n * c), form)
    law = fit_decode_time(decode_table(f, n, n * c, wall_s), form, near=near)
    grid = np.array([1.0, 2, 17, 64, 300])
    by_load = law.time_s(1000.0, grid, 100.0 * grid)
    assert np.all(np.diff(by_load) >= -1e-12)
    assert np.all(np.diff(law.time_s(1000.0, 8.0, 1e3 * grid)) >= -1e-12)
    ladder = np.linspace(600, 1400, 60)
    assert np.all(np.diff(law.time_s(ladder, 64.0, 6400.0)) <= 1e-12)
    assert np.all(by_load >= 0.0)
    assert np.all(np.isfinite(by_load))


@settings(max_examples=15)
@given(data=st.data())
def test_prefill_law_is_monotone_whatever_is_measured(data):
    f, tok = (a.ravel() for a in np.meshgrid([600.0, 900.0, 1400.0], [100.0, 400, 900, 2000]))
    prompts = np.where(tok > 300, 2.0, 1.0)
    wall_s = np.array(data.draw(st.lists(st.floats(1e-3, 1.0), min_size=12, max_size=12)))
    law = fit_prefill_time(prefill_table(f, tok, prompts, wall_s), fold=True)
    grid = np.array([1.0, 100, 1000, 5000])
    assert np.all(np.diff(law.time_s(1000.0, grid, grid**2)) >= -1e-12)
    assert np.all(np.diff(law.time_s(np.linspace(600, 1400, 60), 700.0, 4.9e5)) <= 1e-12)


# Staircase


@settings(max_examples=15)
@given(step=st.integers(1, 64), seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([0, 0.01]))
def test_one_step_size_is_detected(step, seed, noise):
    rng = np.random.default_rng(seed)
    edges = step * np.arange(1, max(129 // step, 5) + 1)
    n = np.repeat(np.unique(np.concatenate([[1], edges, edges + 1])), 3).astype(float)
    n = np.tile(n, 2)
    kv = n * rng.integers(100, 2000, len(n))
    wall_s = 0.01 + 2e-4 * np.ceil(n / step) * step + 8e-8 * kv
    wall_s *= 1.0 + noise * rng.standard_normal(len(n))
    found = detect_batch_steps(decode_table(np.repeat([700.0, 1400.0], len(n) // 2), n, kv, wall_s))
    np.testing.assert_array_equal(pad(n, found), np.ceil(n / step) * step)
    assert (found == ()) == (step == 1)


def test_regimes_of_steps_are_detected():
    true = ((8, 1), (128, 8), (512, 32))
    edges = [1, 2, 3, 4, 5, 6, 7, *range(8, 129, 8), *range(160, 513, 32)]
    n = np.unique([edge + more for edge in edges for more in (0, 1)]).astype(float)
    n = np.repeat(n[n <= 512], 2)
    rng = np.random.default_rng(0)
    wall_s = (0.01 + 1e-4 * pad(n, true)) * (1.0 + 0.002 * rng.standard_normal(len(n)))
    found = detect_batch_steps(decode_table(1400.0, n, 0.0, wall_s))
    every = np.arange(1, 513)
    np.testing.assert_array_equal(pad(every, found), pad(every, true))


def test_powers_of_two_cannot_tell_a_staircase():
    n = 2.0 ** np.arange(9)
    assert detect_batch_steps(decode_table(1400.0, n, 0.0, 0.01 + 1e-4 * n)) is None


def test_two_step_sizes_that_explain_alike_are_refused():
    # Only one boundary is measured: every step with a multiple between 40 and 41 and none
    # elsewhere among the sizes fits alike.
    n = np.array([31.0, 32, 33, 34, 35, 40, 41, 42, 43])
    wall_s = np.where(n <= 40, 0.02, 0.03)
    with pytest.raises(ConfigError, match=r"batch_steps: .*explain.*equally well; measure"):
        detect_batch_steps(decode_table(1400.0, np.repeat(n, 4), 0.0, np.repeat(wall_s, 4)))


# Power


def test_no_knee_is_claimed_on_a_straight_line():
    f = np.arange(600.0, 1401.0, 100.0)
    tok = np.full(len(f), 1000.0)
    noise = 1.0 + 0.005 * np.random.default_rng(0).standard_normal(len(f))
    law = fit_power(prefill_table(f, tok, 1.0, 100 / f, (60 + 0.2 * f) * 100 / f * noise))
    assert law.rise_frac == 0.0
    assert law.prefill_w(1000.0) == pytest.approx(260.0, rel=0.01)
    assert np.isinf(law.cap_w)


def test_a_known_voltage_law_is_kept_and_half_of_one_refused():
    f = np.array([600.0, 900.0, 1200.0])
    table = prefill_table(f, np.full(3, 1000.0), 1.0, 100 / f, (60 + 0.2 * f) * 100 / f)
    law = fit_power(table, rise_frac=0.7, knee_mhz=1100.0)
    assert (law.rise_frac, law.knee_mhz) == (0.7, 1100.0)
    with pytest.raises(ConfigError, match="both of rise_frac and knee_mhz"):
        fit_power(table, knee_mhz=1100.0)


# What a table cannot support


def test_what_the_table_cannot_support_is_refused_by_name():
    f, n = (a.ravel() for a in np.meshgrid(CLOCKS_MHZ, [1.0, 8, 64, 128]))
    one_context = decode_table(f, n, 200 * n, 10 / f + 1e-5 * n)
    with pytest.raises(ConfigError, match=r"decode_kv_s: .*210 MHz; measure .* two contexts"):
        fit_table(one_context)
    result = fit_table(one_context, fixed={"decode_kv_s": 0.0})
    assert np.all(result.laws.decode.kv_s == 0.0)
    two = np.isin(n, [1, 8])
    with pytest.raises(ConfigError, match=r"decode_req_s: 2 batch size.*measure at least 3"):
        fit_decode_time(one_context.rows(two))
    f, tok = (a.ravel() for a in np.meshgrid(CLOCKS_MHZ, [128.0, 512, 2048]))
    single = prefill_table(f, tok, tok / 128, 10 / f + 0.05 * tok / f)
    with pytest.raises(ConfigError, match=r"prefill_tok2_s: .*one long prompt and as several"):
        fit_table(single)
    assert fit_table(single, fixed={"prefill_tok2_s": 0.0}).laws.prefill is not None
    with pytest.raises(ConfigError, match=r"prefill_tok_s: 2 number\(s\) of prompt tokens"):
        fit_prefill_time(single.rows(tok < 2000))
    with pytest.raises(ConfigError, match=r"fixed: expected any of decode_kv_s.*'decode_kv'"):
        fit_table(single, fixed={"decode_kv": 0.0})


def test_too_few_clocks_are_refused():
    profile = with_quadratic(load_profile(REFERENCE))
    with pytest.raises(ConfigError, match=r"freq_mhz: decode was measured at 1 clock.*\(1410 MHz"):
        fit_table(simulate(profile, PAIRS, clocks=(1410.0,)))
    with pytest.raises(ConfigError, match=r"voltage_knee_mhz: 4 clock.*measure at least 5"):
        fit_laws(simulate(profile, [1, 8, 64], clocks=(210.0, 600.0, 900.0, 1200.0)))
    clocks = (210.0, 450.0, 690.0, 930.0, 1080.0, 1260.0)
    with pytest.raises(ConfigError, match=r"voltage_rise_frac: power bends .* 1080 and 1260"):
        fit_laws(simulate(profile, [1, 8, 64], clocks=clocks))


def test_a_profile_needs_both_phases_their_energy_and_measured_clocks(noisy):
    profile, table, result = noisy
    laws = replace(result.laws, prefill=None)
    with pytest.raises(ConfigError, match="prefill: the table has no prefill rows"):
        replace(result, laws=laws).to_toml("own/model", profile)
    silent = replace(table, energy_j=np.full(len(table), np.nan))
    times = fit_table(silent, batch_steps=((128, 8),))
    assert "energy_j: no energy measured, times only" in times.notes
    with pytest.raises(ConfigError, match="energy_j: a profile needs the energy of both"):
        times.to_toml("own/model", profile)
    with pytest.raises(ConfigError, match=r"ladder_mhz: expected clocks within 210..1410"):
        result.profile("own/model", profile, ladder_mhz=[150.0, 900.0])
    ladder = np.arange(210.0, 1411.0, 15.0)
    fine = result.profile("own/model", profile, ladder_mhz=ladder, idle_w=55.0)
    np.testing.assert_array_equal(fine.clocks_mhz, ladder)
    assert fine.idle_w == 55.0
    for column in ("decode_base_s", "prefill_tok_s"):
        assert np.all(np.diff(fine.table[column]) <= 0.0)


def test_idle_rows_give_the_idle_power():
    table = simulate(with_quadratic(load_profile(REFERENCE)), [1, 8, 64])
    idle = {
        name: np.append(getattr(table, name), value)
        for name, value in {
            "freq_mhz": 1410, "batch_req": 0, "kv_tok": 0, "prefill_tok": 0, "square_tok2": 0,
            "wall_s": 2.0, "energy_j": 124.0,
        }.items()
    }  # fmt: skip
    result = fit_table(replace(table, phase=(*table.phase, "idle"), host_s=None, **idle))
    assert result.idle_w == 62.0
    found = result.profile("own/model", load_profile(REFERENCE))
    assert found.idle_w == 62.0
    assert found.sources["power"]["status"] == "measured"


# What is reported


def test_the_band_widens_between_clocks_and_enters_the_profile(noisy, tmp_path):
    profile, _, result = noisy
    by_clock = result.errors("decode", "time", "clock")
    assert list(by_clock.by) == list(CLOCKS_MHZ[1:-1])
    at, between = (result.band_frac("decode", f) for f in (690.0, 600.0))
    assert between == max(at, by_clock.by[450.0], by_clock.by[690.0])
    error = result.profile("own/model", profile).sources["decode_time"]["error"]
    assert f"{by_clock.by[690.0]:.1%} at 690" in error
    assert "decode_base_s" in result.summary()
    assert result.errors("decode", "time", "prompt") is None

    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(10, 8))
    draw_diagnostics(result, figure)
    figure.savefig(tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").stat().st_size > 10_000


def with_idle(table, idle_w, host_s=None):
    """The table with one idle row, and what the GPU waited in the others."""
    more = {name: np.append(getattr(table, name), value) for name, value in {
        "freq_mhz": 1410.0, "batch_req": 0.0, "kv_tok": 0.0, "prefill_tok": 0.0,
        "square_tok2": 0.0, "wall_s": 1.0, "energy_j": idle_w,
    }.items()}  # fmt: skip
    waited = None if host_s is None else np.append(host_s, 0.0)
    return replace(table, phase=(*table.phase, "idle"), host_s=waited, **more)


def test_time_of_the_host_returns_with_its_energy_where_it_is_measured():
    """Times alone leave open which part of the base no clock scales; a measured wait tells."""
    serving = with_quadratic(load_profile("a100-sxm-80gb/llama-3.1-8b"))
    assert serving.table["decode_host_s"][0] == 1e-3
    # At 1290 MHz the cap of this profile binds before its time stops falling.
    table = simulate(serving, PAIRS, clocks=(210.0, 450.0, 690.0, 930.0, 1170.0, 1230.0, 1410.0))
    decode = np.array([phase == "decode" for phase in table.phase])
    waited = np.where(decode, 1e-3 * np.random.default_rng(0).normal(1.0, 0.1, len(decode)), 0.0)
    found = fit_table(with_idle(table, 70.0, waited))
    law = found.laws.decode
    assert abs(law.host_s - 1e-3) < 4.0 * law.host_sd_s < 1e-4
    assert "decode_host_s 0.001" in found.summary()
    assert found.laws.power.decode_static_w == pytest.approx(71.2, rel=0.01)
    again = found.profile("gpu/model", serving)
    for name in ("decode_base_s", "decode_host_s", "decode_power_w"):
        np.testing.assert_allclose(
            again.table[name], at_clock(serving, again.clocks_mhz)[name], rtol=0.03, err_msg=name
        )
    blind = fit_table(table)
    assert blind.laws.decode.host_s == 0.0
    assert any(note.startswith("decode_host_s: not identified") for note in blind.notes)
    with pytest.raises(ConfigError, match="host_s: no idle row"):
        fit_table(replace(table, host_s=waited))


@pytest.mark.parametrize("measured", [False, True])
def test_time_per_prompt_is_found(measured):
    """13 ms of the host for each prompt, from times alone and from measured waits."""
    profile = with_quadratic(load_profile(REFERENCE))
    rows = profile.table.copy()
    rows["prefill_req_s"] = 0.013
    profile = replace(profile, table=rows)
    table = simulate(profile, PAIRS, noise_frac=0.005)
    prefill = np.array([phase == "prefill" for phase in table.phase])
    waited = np.where(prefill, 0.013 * table.batch_req, 0.0) if measured else None
    law = fit_table(with_idle(table, 60.0, waited)).laws
    assert abs(law.prefill.req_s - 0.013) <= max(5.0 * law.prefill.req_sd_s, 1e-6)
    assert law.prefill.req_sd_s < 0.002
    assert law.power.prefill_static_w == pytest.approx(59.3, rel=0.1)
    if not measured:
        unknown = fit_table(table)
        assert unknown.laws.prefill.req_s == 0.0
        assert any("no idle row" in note for note in unknown.notes)


def test_no_time_per_prompt_is_made_up(noisy):
    table = noisy[1]
    assert fit_table(with_idle(table, 60.0)).laws.prefill.req_s == 0.0
