"""A file of faults does to emulated engines what it does to simulated ones, at its times."""

import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from tests.helpers.fake_gpus import PROFILE, fleet, needs_compiler, seconds_until
from voltana_ctrl import ConfigError
from voltana_ctrl.cli.faults import fault_schedule, faults_played
from voltana_ctrl.errors import BackendError

FAULTS = """
[[failure]]
instance = "decode-0"
from_s = 0.2
until_s = 0.4

[[slowdown]]
instance = "decode-0"
slow_frac = 1.5
from_s = 0.1
until_s = 0.5

[[clock_clamp]]
instance = "prefill-0"
clamp_mhz = 1200.0
from_s = 0.1
until_s = 0.3
"""


class Engines:
    """Notes what is done to it, and when, at true speed."""

    def __init__(self, dilation):
        self.spec, self.done, self._dilation = fleet(), [], dilation
        self.settings = [SimpleNamespace(gpus=(0,)), SimpleNamespace(gpus=(1, 2))]
        self.fake = SimpleNamespace(gpus=[Gpu(self, k) for k in range(3)])
        self._begin_s = time.monotonic()

    def note(self, *what):
        self.done.append((round((time.monotonic() - self._begin_s) / self._dilation, 1), *what))

    def kill(self, i):
        self.note("kill", i)

    def restart(self, i):
        self.note("restart", i)

    def slow(self, i, slow_frac):
        self.note("slow", i, slow_frac)
        if slow_frac == 1.0:
            raise BackendError("gone")


class Gpu:
    def __init__(self, engines, k):
        object.__setattr__(self, "_told", (engines, k))

    def __setattr__(self, name, value):
        engines, k = self._told
        engines.note(name, k, float(value))


def written(folder, text=FAULTS):
    (folder / "faults.toml").write_text(text)
    return folder / "faults.toml"


def test_faults_come_and_go_at_their_times_stretched(tmp_path, capsys):
    engines = Engines(dilation=10.0)
    schedule = fault_schedule(written(tmp_path), "1P1D", PROFILE)
    with faults_played(engines, schedule, 10.0):
        seconds_until(lambda: len(engines.done) == 7, 30.0)
    assert engines.done == [
        (0.1, "clamp_mhz", 0, 1200.0), (0.1, "slow", 1, 1.5), (0.2, "kill", 1),
        (0.3, "clamp_mhz", 0, 0.0), (0.4, "restart", 1), (0.4, "slow", 1, 1.5),
        (0.5, "slow", 1, 1.0),
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "fault: decode-0: killed" in said
    assert "fault: decode-0: cannot be brought about: gone" in said


@pytest.mark.parametrize(
    "failure", [subprocess.TimeoutExpired("engine", 10.0), OSError("no more processes")]
)
def test_an_engine_that_does_not_end_or_start_does_not_end_the_rest(tmp_path, capsys, failure):
    class Stuck(Engines):
        def kill(self, i):
            super().kill(i)
            raise failure

        restart = kill

    engines = Stuck(dilation=10.0)
    with faults_played(engines, fault_schedule(written(tmp_path), "1P1D", PROFILE), 10.0):
        seconds_until(lambda: (0.5, "slow", 1, 1.0) in engines.done, 30.0)
    assert (0.3, "clamp_mhz", 0, 0.0) in engines.done
    said = capsys.readouterr().err
    assert said.count(f"fault: decode-0: cannot be brought about: {failure}") == 2


def test_the_end_does_not_wait_for_faults_that_are_still_to_come(tmp_path):
    later = written(tmp_path, '[[failure]]\ninstance = "decode-0"\nfrom_s = 900.0\n')
    engines, begin_s = Engines(dilation=1.0), time.monotonic()
    with faults_played(engines, fault_schedule(later, "1P1D", PROFILE), 1.0):
        pass
    assert time.monotonic() - begin_s < 30.0
    assert engines.done == []
    assert all(one.name != "voltana-ctrl-faults" for one in threading.enumerate())


def test_faults_of_nobody_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="expected an instance of the fleet"):
        fault_schedule(written(tmp_path), "2C", PROFILE)
    assert fault_schedule(None, "2C", PROFILE) is None


@needs_compiler
@pytest.mark.slow
def test_an_emulated_engine_takes_as_long_as_it_is_told():
    import httpx

    from voltana_ctrl.engines.emulated.fleet import EmulatedFleet

    with EmulatedFleet("1C", dilation=2.0) as running:

        def slow_frac():
            told = httpx.get(f"{running.urls[0]}/emulate", trust_env=False).json()
            return told["slow_frac"]

        assert slow_frac() == 1.0
        running.slow(0, 3.0)
        assert slow_frac() == 3.0
        running.kill(0)
        with pytest.raises(BackendError, match="emulate: colocated-0"):
            running.slow(0, 1.0)
