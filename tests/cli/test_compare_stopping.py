"""Ctrl-C, SIGTERM and SIGKILL end `compare` at once: what was done is kept, nobody stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# The bound is there at once; of mpc no run ends by itself while a test waits.
LONG = [
    "--rate", "5,20", "--duration", "6000", "--warmup", "0", "--policies", "bound,static-max,mpc",
    "--jobs", "2",
]  # fmt: skip
#: A second is promised; a machine with other work to do may take some more.
SOON_S = 6.0


@pytest.fixture
def begin(root, tmp_path):
    started = []

    def begin(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "voltana_ctrl.cli", "compare", "--json", "out.json", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Whoever runs the tests in the background may have Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def of_group(group):
    """Processes of a process group that are there and not only waited for."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, _, pgid = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgid) == group and state != "Z":
                    found.append(int(folder.name))
    return found


def wait_for(condition, what, limit_s=120.0):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)


def stop(process, number, whole_group=False):
    """Seconds until it has ended, and what it said."""
    begin_s = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, errors = process.communicate(timeout=60)
    return time.monotonic() - begin_s, out, errors


def rows_of(process):
    """Read the table up to its first row."""
    for line in process.stdout:
        if "bound" in line:
            return line
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_in_mid_run_it_ends_with_what_is_done(begin, tmp_path, number, status):
    process = begin(*LONG)
    assert "bound" in rows_of(process)
    took_s, _, errors = stop(process, number, whole_group=number == signal.SIGINT)
    assert process.returncode == status
    assert took_s < SOON_S
    assert "Traceback" not in errors
    assert "of 6 runs are done" in errors
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["complete"] is False
    assert found["runs_planned"] == 6
    assert 1 <= len(found["runs"]) < 6
    assert found["runs"][0]["policy"] == "bound"
    assert found["command"][:2] == ["voltana-ctrl", "compare"]
    wait_for(lambda: not of_group(process.pid), "somebody stays behind", 10.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_while_it_compiles_it_ends_with_nothing_done(begin, tmp_path, number):
    process = begin(*LONG, NUMBA_CACHE_DIR=str(tmp_path / "cold"))
    assert process.stderr.readline().startswith("compiling the simulator")
    took_s, _, errors = stop(process, number)
    assert process.returncode == 128 + number
    assert took_s < SOON_S
    assert "0 of 6 runs are done" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == []


def test_at_the_end_it_has_written_all_numbers(begin, tmp_path):
    quick = [
        "--rate",
        "5",
        "--duration",
        "10",
        "--policies",
        "static-max,bound",
        "--html",
        "o.html",
    ]
    process = begin(*quick)
    path = tmp_path / "out.json"
    wait_for(path.exists, "no numbers")
    stop(process, signal.SIGINT)
    assert process.returncode in (0, 130)
    assert json.loads(path.read_text())["complete"] is True
    assert not list(tmp_path.glob(".out.json*"))


def test_a_parent_that_is_killed_leaves_no_orphan(begin):
    process = begin(*LONG)
    rows_of(process)
    assert len(of_group(process.pid)) == 3
    stop(process, signal.SIGKILL)
    wait_for(lambda: not of_group(process.pid), "a worker stays for ever", 10.0)


def test_a_worker_that_is_killed_is_told_of(begin, tmp_path):
    process = begin(*LONG)
    rows_of(process)
    worker = max(of_group(process.pid))
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "a process was killed, perhaps for its memory: " in errors
    assert json.loads((tmp_path / "out.json").read_text())["complete"] is False


LATE = """from voltana_ctrl import Decision
class Late:
    period_s = 0.1
    def __init__(self, fleet, slo): self.fleet = fleet
    def init(self): return 0
    def decide(self, observation, memory):
        if observation.state.t_s > 5.0: raise TypeError("late")
        return Decision.highest(self.fleet, t_s=observation.state.t_s), memory
"""


def test_a_policy_that_fails_late_leaves_the_files_of_what_is_done(begin, tmp_path):
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    process = begin(
        "--fleet", "1P1D", "--rate", "4", "--duration", "10", "--warmup", "2", "--jobs", "1",
        "--policies", "static-max,static-1005,late:Late", "--csv", "out.csv",
    )  # fmt: skip
    _, told = process.communicate(timeout=300.0)
    assert process.returncode == 2
    assert "a run failed: 2 of 3 runs are done" in told
    assert "policy 'late:Late': TypeError: late" in told
    kept = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert (kept["complete"], kept["runs_planned"], len(kept["runs"])) == (False, 3, 2)
    assert len((tmp_path / "out.csv").read_text("utf-8").splitlines()) == 3
