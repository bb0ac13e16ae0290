"""Ctrl-C and SIGTERM end a sweep, meter and profile: what was done is kept, nobody stays."""

import os
import signal
import subprocess
import sys

import pytest

from tests.cli.test_compare_stopping import SOON_S, of_group, stop, wait_for
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_gpus import PROFILE, all_given_back, machine, needs_compiler
from voltana_ctrl import load_profile

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])

SWEEP = """
import sys
from voltana_ctrl import compare
from voltana_ctrl.experiment import ResultStore
from voltana_ctrl.cli.workers import stop_on_sigterm, workers

if __name__ == "__main__":
    told = lambda done, total: print("done", done, flush=True)
    with stop_on_sigterm(), workers(2) as executor, ResultStore("store") as store:
        print("had", len(store), flush=True)
        found = compare(rates_req_s=[4.0], duration_s=2.0, warmup_s=0.0, seeds=int(sys.argv[1]),
                        policies=["static-max"], executor=executor, store=store, on_progress=told)
        print("runs", len(found.runs), flush=True)
"""


@pytest.fixture
def begin(root, tmp_path):
    started = []

    def begin(*command, **environment):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=tmp_path, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "80", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Whoever runs the tests in the background may have Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@SIGNALS
def test_a_sweep_that_is_stopped_keeps_what_is_done_and_goes_on(begin, tmp_path, number):
    pytest.importorskip("pyarrow", reason="needs the tables extra")
    (tmp_path / "sweep.py").write_text(SWEEP)
    process = begin("sweep.py", 2000)
    for line in process.stdout:
        if line.split() == ["done", "50"]:
            break
    took_s, _, _ = stop(process, number)
    assert process.returncode != 0
    assert took_s < SOON_S
    wait_for(lambda: not of_group(process.pid), "somebody stays behind", 10.0)
    again = begin("sweep.py", 60)
    out, errors = again.communicate(timeout=120)
    assert out.splitlines()[-1] == "runs 60", errors
    # Every run that was told of was kept.
    assert int(out.splitlines()[0].split()[1]) >= 50


@needs_compiler
@SIGNALS
@pytest.mark.parametrize("when", ["start", "mid-run"])
def test_meter_tells_what_it_has_measured(begin, tmp_path, number, when):
    with machine(tmp_path, gpus=1) as fake:
        env = {name: fake.env[name] for name in ("FAKE_NVML_STATE", "LD_LIBRARY_PATH")}
        process = begin("-m", "voltana_ctrl.cli", "meter", "--duration", 3600, **env)
        if when == "mid-run":
            assert process.stderr.readline().startswith("measuring for 3600 s")
        took_s, out, errors = stop(process, number)
    assert took_s < SOON_S
    assert "Traceback" not in errors
    if when == "mid-run":
        assert process.returncode == 0
        assert "W over" in out
    else:
        assert process.returncode in (128 + number, -number)


@pytest.mark.slow
@needs_compiler
@SIGNALS
def test_profile_keeps_its_points_and_gives_the_clock_back(begin, tmp_path, number):
    profile = load_profile(PROFILE)
    with machine(tmp_path, gpus=1) as fake, FakeEngine(profile, fake.gpus[0]) as engine:
        env = {name: fake.env[name] for name in ("FAKE_NVML_STATE", "LD_LIBRARY_PATH")}
        table = tmp_path / "table.csv"
        asked = [
            engine.url, "--gpu", fake.uuids[0], "--clocks", "705,1410", "--batches", "1,2,4,8",
            "--contexts", "64", "--prompts", "64", "--steady", "0.2", "--pause", "0",
            "--output-tok", "64", "--out", table, "--lock-dir", tmp_path / "locks",
        ]  # fmt: skip
        process = begin("-m", "voltana_ctrl.cli", "profile", *asked, **env)
        wait_for(lambda: table.exists() and len(table.read_text().splitlines()) > 2, "no points")
        took_s, _, errors = stop(process, number)
        assert process.returncode == 128 + number
        assert took_s < SOON_S
        assert "Traceback" not in errors
        assert all_given_back(fake)
        kept = table.read_text()
        again = begin("-m", "voltana_ctrl.cli", "profile", *asked, **env)
        _, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors
        assert table.read_text().startswith(kept)
        assert all_given_back(fake)
    wait_for(lambda: not of_group(process.pid), "somebody stays behind", 10.0)
