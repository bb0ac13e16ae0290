"""A live engine is measured over clocks; what it is comes out; the clocks always go back."""

import csv
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_gpus import all_given_back, machine, needs_compiler
from voltana_ctrl import load_profile
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.fit import fit_table, read_table
from voltana_ctrl.laws.iteration import at_clock, decode_s, prefill_s
from voltana_ctrl.profiling.client import LoadClient
from voltana_ctrl.profiling.engine import Engine, ProfileAborted
from voltana_ctrl.profiling.profiler import profile_engine
from voltana_ctrl.profiling.sweep import Sweep, plan_profile, spread_clocks

pytest.importorskip("httpx", reason="needs the server extra")

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
CLOCKS_MHZ = (705, 1410)
QUICK = Sweep(
    clocks_mhz=CLOCKS_MHZ,
    batches_req=(1, 4),
    contexts_tok=(64,),
    prompts_tok=(128,),
    steady_s=0.05,
    min_steps=4,
    settle_s=0.0,
    pause_s=0.0,
    sample_s=0.01,
    point_limit_s=20.0,
)


def plant(slower=1.0):
    """The reference without padding; decode so many times slower, its KV term ten times that."""
    table = REFERENCE.table.copy()
    for column in table.dtype.names:
        if column.startswith("decode") and not column.endswith("_w"):
            table[column] *= slower
    if slower > 1.0:  # so that short contexts show it
        table["decode_kv_s"] *= 10.0
        table["decode_kv_j"] *= 10.0
    return replace(REFERENCE, table=table, batch_steps=())


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path, gpus=2) as fake:
        for gpu in fake.gpus:
            gpu.cap_w = gpu.cap_default_w = 500.0  # what saturated prefill draws stays below
        yield fake


@pytest.fixture
def live(fake):
    with FakeEngine(plant(), fake.gpus[0]) as engine:
        yield engine


def engine_of(live, fake, **changes):
    return Engine(url=live.url, gpus=fake.uuids[:1], **changes)


def measure(live, fake, folder, sweep=QUICK, **settings):
    settings = {"lock_dir": folder, "library": fake.library, **settings}
    engine = settings.pop("engine", None) or engine_of(live, fake)
    return profile_engine(engine, sweep, folder / "table.csv", **settings)


def rows(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keys(path: Path):
    names = ("phase", "asked_mhz", "batch_req", "asked_tok")
    return [tuple(row[name] for name in names) for row in rows(path)]


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def stop_at(number):
    def on_progress(done, total, what):
        if done == number:
            raise KeyboardInterrupt

    return on_progress


# What is measured


@needs_compiler
def test_every_point_becomes_a_row_that_the_fit_reads(live, fake, tmp_path):
    told = []
    # Long enough that the few ms a busy machine takes between two readings do not count.
    longer = replace(QUICK, steady_s=0.25)
    run = measure(live, fake, tmp_path, longer, on_progress=lambda *told_: told.append(told_))
    assert (run.measured, run.skipped) == (8, 0)
    assert [done for done, _, _ in told] == list(range(9))
    table = read_table(tmp_path / "table.csv")
    assert table.phase == ("idle", "decode", "decode", "prefill") * 2
    assert np.all(table.freq_mhz == np.repeat(sorted(CLOCKS_MHZ, reverse=True), 4))
    decode = table.of("decode")
    assert np.all(decode.kv_tok >= decode.batch_req * 64)
    assert np.all(table.of("prefill").prefill_tok == 128)
    idle = table.of("idle")
    assert np.allclose(idle.energy_j / idle.wall_s, fake.gpus[0].idle_w, rtol=0.05)
    # No client sees an engine faster than it is, and half the clock is half as slow again.
    plant_s = decode_s(at_clock(plant(), decode.freq_mhz), decode.batch_req, decode.kv_tok)
    assert np.all(decode.wall_s > 0.85 * plant_s)
    assert plant_s[2] > 1.3 * plant_s[0]
    prefill = table.of("prefill")
    assert np.all(prefill.wall_s > prefill_s(at_clock(plant(), prefill.freq_mhz), 128))
    assert fake.gpus[0].sets > 0
    assert fake.gpus[1].sets == 0
    assert all_given_back(fake)


@needs_compiler
def test_without_clocks_nothing_is_set(live, fake, tmp_path):
    measure(live, fake, tmp_path, replace(QUICK, clocks_mhz=(), prompts_tok=(1024,)))
    assert fake.gpus[0].sets == 0
    busy = [row for row in rows(tmp_path / "table.csv") if row["phase"] != "idle"]
    assert [float(row["freq_mhz"]) for row in busy] == [1410.0] * 3
    assert not list(tmp_path.glob("*.lock"))


def test_without_a_gpu_times_alone_are_measured(tmp_path):
    out = tmp_path / "table.csv"
    with FakeEngine(plant()) as live:
        engine = Engine(url=live.url, freq_mhz=1410.0)
        profile_engine(engine, replace(QUICK, clocks_mhz=()), out)
    table = read_table(out)
    assert table.phase == ("decode", "decode", "prefill")
    assert np.all(np.isnan(table.energy_j))
    assert np.all(table.freq_mhz == 1410.0)


@needs_compiler
def test_the_phases_may_have_engines_of_their_own(fake, tmp_path):
    first, second = fake.gpus
    with FakeEngine(plant(), first) as prefill, FakeEngine(plant(), second) as decode:
        engine = Engine(
            url=prefill.url,
            decode_url=decode.url + "/v1",
            prefill_gpus=fake.uuids[:1],
            decode_gpus=fake.uuids[1:],
        )
        measure(None, fake, tmp_path, replace(QUICK, clocks_mhz=(705,)), engine=engine)
        assert prefill.requests > 3
        assert decode.requests == 2 + 1 + 4  # two probes, then a batch of one and one of four
    assert (first.sets > 0, second.sets > 0) == (True, True)
    assert all_given_back(fake)


def test_prompts_may_be_words_and_start_with_a_token_of_the_engine(tmp_path):
    out = tmp_path / "table.csv"
    sweep = replace(QUICK, clocks_mhz=(), batches_req=())
    with FakeEngine(plant(), extra_tok=1) as live:
        engine = Engine(url=live.url, freq_mhz=1410.0, words=True)
        profile_engine(engine, sweep, out)
    (row,) = rows(out)
    expected_s = plant().table[-1]["prefill_base_s"] + 128 * plant().table[-1]["prefill_tok_s"]
    assert float(row["prefill_tok"]) == 128
    assert expected_s <= float(row["wall_s"]) < 3 * expected_s + 0.02


@needs_compiler
@pytest.mark.slow
def test_what_the_engine_is_comes_out_of_the_fit(fake, tmp_path):
    truth = plant(slower=3.0)
    clocks_mhz = (510, 810, 1110, 1260, 1335, 1410)
    sweep = replace(
        QUICK,
        clocks_mhz=clocks_mhz,
        batches_req=(1, 4, 8),
        contexts_tok=(64, 1024),
        prompts_tok=(128, 512, 1536),
        steady_s=0.4,
        min_steps=8,
        pause_s=0.05,
        sample_s=0.05,
    )
    with FakeEngine(truth, fake.gpus[0]) as live:
        measure(live, fake, tmp_path, sweep)
    table = read_table(tmp_path / "table.csv")
    result = fit_table(table, batch_steps=((1, 1),))
    print(result.summary())
    decode, prefill = result.laws.decode, result.laws.prefill
    rows_at = truth.table[np.searchsorted(truth.clocks_mhz, clocks_mhz)]
    # Beyond the fit's own standard errors: what HTTP and the client add, at most 3 ms each way.
    for name, value, sd, slack in (
        ("decode_base_s", decode.base_s, decode.base_sd_s, 3e-3),
        ("decode_req_s", decode.req_s, decode.req_sd_s, 1e-4),
        ("decode_kv_s", decode.kv_s, decode.kv_sd_s, 2e-8),
        ("prefill_base_s", prefill.base_s, prefill.base_sd_s, 10e-3),
        ("prefill_tok_s", prefill.tok_s, prefill.tok_sd_s, 5e-6),
    ):
        error = np.abs(value - rows_at[name])
        print(name, np.round(value / np.maximum(rows_at[name], 1e-12) - 1.0, 4), sd)
        assert np.all(error <= 5 * sd + slack), name
    idle_w = result.idle_w
    assert idle_w == pytest.approx(fake.gpus[0].idle_w, rel=0.03)
    busy = table.of("decode")
    at = truth.table[np.searchsorted(truth.clocks_mhz, busy.freq_mhz)]
    power_w = at["decode_power_w"] + (
        at["decode_iter_j"] + at["decode_req_j"] * busy.batch_req + at["decode_kv_j"] * busy.kv_tok
    ) / (
        at["decode_base_s"] + at["decode_req_s"] * busy.batch_req + at["decode_kv_s"] * busy.kv_tok
    )
    off = busy.energy_j / busy.wall_s / power_w - 1.0
    print("decode power", off.round(3))
    assert np.all(np.abs(off) < 0.03)


# Interrupts


@needs_compiler
@pytest.mark.parametrize("at", [slowly(0), 3, slowly(7)])
def test_an_interrupted_profile_goes_on_where_it_stopped(live, fake, tmp_path, at):
    out = tmp_path / "table.csv"
    with pytest.raises(KeyboardInterrupt):
        measure(live, fake, tmp_path, on_progress=stop_at(at))
    assert all_given_back(fake)
    assert (len(keys(out)) if out.exists() else 0) == at
    assert plan_profile(QUICK, out).done == at
    run = measure(live, fake, tmp_path)
    assert (run.measured, run.skipped) == (8 - at, at)
    assert len(set(keys(out))) == len(keys(out)) == 8
    asked = [
        (point.phase, str(point.asked_mhz), str(point.batch_req), str(point.asked_tok))
        for point in QUICK.points()
    ]
    assert keys(out) == asked
    set_before = fake.gpus[0].sets
    assert measure(live, fake, tmp_path).measured == 0
    assert fake.gpus[0].sets == set_before


@needs_compiler
@pytest.mark.slow
def test_a_row_torn_by_a_power_cut_is_measured_again(live, fake, tmp_path):
    out = tmp_path / "table.csv"
    measure(live, fake, tmp_path)
    whole = out.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    out.write_bytes(whole[: last + 9])
    assert plan_profile(QUICK, out).done == 7
    assert measure(live, fake, tmp_path).measured == 1
    assert out.read_bytes()[:last] == whole[:last]
    assert len(read_table(out)) == 8


@needs_compiler
def test_a_table_of_something_else_is_left_alone(live, fake, tmp_path):
    out = tmp_path / "table.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"table\.csv: exists and is not a table"):
        measure(live, fake, tmp_path)
    assert out.read_text() == "a,b\n1,2\n"
    out.unlink()
    measure(live, fake, tmp_path, replace(QUICK, clocks_mhz=(1410,)))
    with pytest.raises(ConfigError, match="holds rows of model 'fake', not of 'other'"):
        measure(live, fake, tmp_path, engine=engine_of(live, fake, model="other"))
    times_only = Engine(url=live.url, freq_mhz=1410.0)
    with pytest.raises(ConfigError, match="holds rows with energy"):
        profile_engine(times_only, replace(QUICK, clocks_mhz=()), out)
    assert all_given_back(fake)


# Limits and failures: one error, and the clocks go back


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itl_limit_s": 1e-4}, "decode 1 x 64 tok at 1410 MHz: ITL .* above the limit"),
        slowly({"ttft_limit_s": 1e-4}, "prefill 1 x 128 tok at 1410 MHz: TTFT .* above the limit"),
        slowly({"output_tok": 6}, "a stream ended after . steady steps"),
        slowly({"cool_c": 30, "cool_limit_s": 0.05}, "40 C after 0.05 s of cooling"),
        slowly({"point_limit_s": 0.05, "steady_s": 5.0}, "not measured after point_limit_s"),
    ],
)
def test_a_limit_ends_the_profile(live, fake, tmp_path, changes, message):
    with pytest.raises(ProfileAborted, match=message):
        measure(live, fake, tmp_path, replace(QUICK, **changes))
    assert fake.gpus[0].sets > 0
    assert all_given_back(fake)


@needs_compiler
def test_points_slower_than_a_limit_are_left_out_and_the_rest_is_measured(live, fake, tmp_path):
    # At 1410 MHz a step takes 11 ms, at 705 about 18: all decode there is too slow, and after
    # one such point the larger batch is not even tried.
    told = []
    run = measure(
        live,
        fake,
        tmp_path,
        replace(QUICK, clocks_mhz=(210, 1410), itl_limit_s=0.022, steady_s=0.25),
        on_progress=lambda done, total, what: told.append((done, total)),
    )
    assert (run.measured, run.skipped, run.left_out) == (6, 0, 2)
    (note,) = [note for note in run.notes if "ITL" in note]
    assert "decode 1 x 64 tok at 210 MHz: ITL" in note
    assert "left out, with all that can be no faster" in note
    assert ", 2 left out as slower than the limits" in run.text()
    left = [(row["phase"], row["asked_mhz"]) for row in rows(tmp_path / "table.csv")]
    assert ("decode", "1410") in left
    assert ("prefill", "210") in left
    assert ("decode", "210") not in left
    assert told[-1] == (8, 8)
    assert all_given_back(fake)
    # They are missing from the table, so the same command tries them again.
    assert plan_profile(replace(QUICK, clocks_mhz=(210, 1410)), tmp_path / "table.csv").done == 6


@needs_compiler
@pytest.mark.slow
def test_points_that_are_too_slow_again_and_again_end_the_profile(live, fake, tmp_path):
    sweep = replace(
        QUICK,
        idle=False,
        batches_req=(6, 5, 4, 3),  # none is easier than the one before
        prompts_tok=(),
        clocks_mhz=(1410,),
        itl_limit_s=1e-3,
        breach_limit=3,
    )
    with pytest.raises(ProfileAborted, match=r"decode 4 x 64 .* \(3 points in a row\)"):
        measure(live, fake, tmp_path, sweep)
    assert live.requests >= 3
    assert all_given_back(fake)


@needs_compiler
def test_heat_ends_the_profile_within_a_point(live, fake, tmp_path):
    def heat_up(done, total, what):
        if done == 2:
            timer.start()

    timer = threading.Timer(0.1, lambda: setattr(fake.gpus[0], "temperature_c", 99.0))
    with pytest.raises(ProfileAborted, match="GPU at 99 C, above temperature_limit_c 85"):
        measure(live, fake, tmp_path, replace(QUICK, steady_s=0.3), on_progress=heat_up)
    timer.join()
    assert len(keys(tmp_path / "table.csv")) == 2
    assert all_given_back(fake)


@needs_compiler
def test_a_batch_that_the_engine_does_not_run_at_once_is_refused(fake, tmp_path):
    sweep = replace(QUICK, idle=False, batches_req=(4,), output_tok=30)
    with (
        FakeEngine(plant(), fake.gpus[0], max_batch=2) as live,
        pytest.raises(ProfileAborted, match="when 2 of 4 had begun"),
    ):
        measure(live, fake, tmp_path, sweep)
    assert all_given_back(fake)


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"fail_after": 4}, "completions: the engine answered 500: .*CUDA out of memory"),
        ({"break_after": 9}, "completions: the engine failed: .*engine died"),
        slowly({"port": 1}, "no answer .*is the engine up"),
    ],
)
def test_an_engine_that_fails_is_one_clear_error(live, fake, tmp_path, fault, message):
    for name, value in fault.items():
        setattr(live, name, value)
    with pytest.raises(BackendError, match=message) as caught:
        measure(live, fake, tmp_path, replace(QUICK, min_steps=30))
    assert "\n" not in str(caught.value)
    assert all_given_back(fake)
    if "fail_after" in fault:
        assert fake.gpus[0].sets > 0


@needs_compiler
@pytest.mark.slow
def test_an_engine_that_dies_midway_is_one_clear_error(live, fake, tmp_path):
    def die(done, total, what):
        if done == 3:
            live.__exit__()

    with pytest.raises(BackendError, match="no answer"):
        measure(live, fake, tmp_path, on_progress=die)
    assert len(keys(tmp_path / "table.csv")) == 3
    assert all_given_back(fake)


@needs_compiler
@pytest.mark.slow
def test_a_lost_gpu_ends_the_profile(live, fake, tmp_path):
    def lose(done, total, what):
        if done == 3:
            fake.gpus[0].lost = 1.0

    # The more urgent message wins: a lost GPU cannot be given back.
    with pytest.raises(BackendError, match=r"could not be given back: .* GPU is lost") as caught:
        measure(live, fake, tmp_path, on_progress=lose)
    lost = str(caught.value.__context__)
    assert f"GPU {fake.uuids[0]} (number 0): GPU is lost" in lost
    assert "reset the GPU" in lost
    assert len(keys(tmp_path / "table.csv")) == 3


@needs_compiler
def test_an_unsupported_clock_is_refused_before_anything_is_set(live, fake, tmp_path):
    with pytest.raises(ConfigError, match=r"does not support 1000 MHz; next to it 990 or 1005"):
        measure(live, fake, tmp_path, replace(QUICK, clocks_mhz=(705, 1000)))
    assert (fake.gpus[0].sets, live.requests) == (0, 0)


@needs_compiler
@pytest.mark.slow
def test_a_clamp_is_told(live, fake, tmp_path):
    fake.gpus[0].clamp_mhz = 1200.0
    run = measure(live, fake, tmp_path, replace(QUICK, idle=False))
    assert [note for note in run.notes if "ran at 1200 MHz" in note] == list(run.notes)
    assert len(run.notes) == 3
    assert "at 1410 MHz: ran at 1200 MHz" in run.text()


def test_tokens_that_come_in_lumps_are_refused(tmp_path):
    sweep = replace(QUICK, clocks_mhz=())
    with FakeEngine(plant(), tokens_per_chunk=4) as live:
        engine = Engine(url=live.url, freq_mhz=1410.0)
        with pytest.raises(ConfigError, match="8 tokens came in 2 chunks"):
            profile_engine(engine, sweep, tmp_path / "table.csv")


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    engine = Engine(url="http://127.0.0.1:1", freq_mhz=1410.0)
    with pytest.raises(ConfigError, match=r"pip install 'voltana-ctrl\[server\]'"):
        profile_engine(engine, replace(QUICK, clocks_mhz=()), tmp_path / "table.csv")


# The plan


def test_the_plan_touches_nothing_and_tells_what_is_left(tmp_path):
    plan = plan_profile(QUICK, tmp_path / "table.csv")
    assert plan.points == QUICK.points()
    assert plan.text().splitlines() == [
        "8 points to measure, 0 in the table already; about 0 min",
        "The engine must serve nobody else for so long: drain it first, so that only the profile's"
        " requests are in its batches",
        "1410 MHz: idle once; decode 1x64, 4x64; prefill 1x128",
        "705 MHz: idle once; decode 1x64, 4x64; prefill 1x128",
    ]
    assert list(tmp_path.iterdir()) == []
    long = replace(QUICK, steady_s=60.0)
    assert plan_profile(long, tmp_path / "table.csv").duration_s > 8 * 60.0


@pytest.mark.parametrize("clocks", [3, 5, 7, 12])
def test_clocks_are_spread_from_end_to_end(clocks):
    supported = range(210, 1411, 15)
    chosen = spread_clocks(supported, clocks)
    assert len(chosen) == clocks
    assert set(chosen) <= set(supported)
    assert (chosen[0], chosen[-1]) == (210, 1410)
    assert spread_clocks([300, 600], clocks) == (300, 600)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sweep(batches_req=(), prompts_tok=(), idle=False), "nothing to measure"),
        (lambda: Sweep(batches_req=(0,)), "batches_req: expected a whole number >= 1"),
        (lambda: Sweep(clocks_mhz=(705, 705)), "clocks_mhz: expected each value once"),
        (lambda: Sweep(steady_s=float("nan")), "steady_s: expected a number > 0"),
        (lambda: Sweep(itl_limit_s=0.0), "itl_limit_s: expected a number > 0"),
        (lambda: Engine(url="http://x"), "expected either gpus"),
        (lambda: Engine(url="http://x", gpus=("GPU-0",), freq_mhz=1.0), "expected either gpus"),
        (lambda: Engine(url="http://x", decode_gpus=("GPU-0",)), "both prefill and decode"),
        (lambda: Engine(url="http://x", gpus="GPU-0"), "expected a list of UUIDs"),
        (lambda: LoadClient("localhost:8000"), "expected an address such as"),
        (lambda: LoadClient("http://x", token_ids=(5, 5)), "0 <= lowest < highest"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
