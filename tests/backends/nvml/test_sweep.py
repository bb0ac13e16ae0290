"""What the dead left changed is given back by whoever of us lives on the machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.backends.nvml.test_watchdog import LOCKED, alive
from tests.helpers.fake_gpus import Host, all_given_back, machine, needs_compiler, seconds_until
from voltana_ctrl.backends.nvml import sweep as module
from voltana_ctrl.backends.nvml.giveback import FoundFile
from voltana_ctrl.backends.nvml.lockfile import LockFile
from voltana_ctrl.backends.nvml.process import process_start
from voltana_ctrl.backends.nvml.sweep import Sweep


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        yield fake


@needs_compiler
def test_what_controller_and_watchdog_left_is_given_back_in_seconds(fake, tmp_path):
    with Sweep(tmp_path, every_s=0.1), Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        watchdog = int(host.expect("set"))
        host.send(signal.SIGSTOP)
        os.kill(watchdog, signal.SIGKILL)
        host.send(signal.SIGKILL)
        host.wait()
        seconds_until(lambda: all_given_back(fake))
        seconds_until(lambda: list(tmp_path.glob("*.lock")) == [])


@needs_compiler
def test_a_watchdog_that_is_frozen_does_not_keep_what_its_dead_controller_set(fake, tmp_path):
    with Sweep(tmp_path, every_s=0.1), Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        watchdog = int(host.expect("set"))
        os.kill(watchdog, signal.SIGSTOP)
        host.send(signal.SIGKILL)
        host.wait()
        try:
            seconds_until(lambda: all_given_back(fake))
            assert alive(watchdog)
        finally:
            os.kill(watchdog, signal.SIGCONT)
        seconds_until(lambda: not alive(watchdog))


@needs_compiler
def test_a_frozen_controller_without_a_watchdog_does_not_keep_what_it_set(fake, tmp_path):
    body = LOCKED + "while True:\n    backend.read(); time.sleep(0.02)"
    with Sweep(tmp_path, every_s=0.1), Host(fake, tmp_path, body) as host:
        watchdog = int(host.expect("set"))
        host.send(signal.SIGSTOP)
        os.kill(watchdog, signal.SIGKILL)
        seconds_until(lambda: all_given_back(fake))
        host.send(signal.SIGCONT)


def test_what_the_living_hold_is_left_alone(tmp_path):
    path = tmp_path / "scaling_max_freq"
    path.write_text("1000")
    held = LockFile("cpu0", folder=tmp_path)
    held.write(FoundFile(path=str(path), text="3000"))
    with Sweep(tmp_path, every_s=60.0, patience=1) as sweep:
        assert [sweep.look() for _ in range(3)] == [[], [], []]
    assert path.read_text() == "1000"
    held.release()


def test_a_dead_owner_is_given_time_in_which_its_watchdog_may_act(tmp_path):
    path = tmp_path / "scaling_max_freq"
    path.write_text("1000")
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    held = LockFile("cpu0", folder=tmp_path)
    record = FoundFile(path=str(path), text="3000").as_dict()
    owner = {"pid": dead.pid, "start": process_start(dead.pid), "command": "x"}
    os.pwrite(held.fd, json.dumps({"owner": owner, "give_back": record}).encode() + b"\n", 0)
    with Sweep(tmp_path, every_s=60.0, patience=3) as sweep:
        assert sweep.look() == []
        dead.kill()
        dead.wait()
        assert [sweep.look() for _ in range(3)] == [[], [], ["cpu0"]]
        assert path.read_text() == "3000"
        assert sweep.look() == []  # said once
    held.release()


def test_a_look_that_fails_is_not_the_last(tmp_path, monkeypatch):
    looks = []

    def look(self):
        looks.append(time.monotonic())
        raise RuntimeError("odd")

    monkeypatch.setattr(Sweep, "look", look)
    with Sweep(tmp_path, every_s=0.01):
        seconds_until(lambda: len(looks) > 2)


def test_what_is_given_back_late_is_told_once(tmp_path, monkeypatch, caplog):
    """At the first try the driver refuses, at the second it does not."""
    held = {("gpu-0", "dead"): object()}
    answers = [["gpu-0: refused"], [], [], ["gpu-0: refused"], []]
    monkeypatch.setattr(module, "restore_abandoned", lambda _: ([], []))
    monkeypatch.setattr(module, "left_by_the_lost", lambda _: dict(held))
    monkeypatch.setattr(module, "give_back", lambda _: answers.pop(0))
    sweep = Sweep(tmp_path, patience=2)
    assert [sweep.look() for _ in range(6)] == [[], [], ["gpu-0"], [], [], []]
    assert answers == []
    assert sum("given back" in said for said in caplog.messages) == 1
