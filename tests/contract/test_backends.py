"""One contract, every backend."""

import time

import pytest

from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler, open_backend
from voltana_ctrl import ControlLoop
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.backends.cpufreq import CpufreqBackend
from voltana_ctrl.backends.replay import Recorder, ReplayBackend
from voltana_ctrl.control import StaticController
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.testing import check_backend


def simulated():
    workload = make_workload("sharegpt", rate_req_s=20.0, duration_s=30.0, seed=1)
    return SimBackend(fleet(), workload=workload)


def advance(backend):
    backend.clock.sleep_until_s(backend.clock.now_s() + 0.5)


def test_sim():
    check_backend(simulated, wait=advance, claims=["clocks-read-back", "counts-since-read"])


def test_replay(tmp_path):
    path = tmp_path / "ticks.jsonl"
    with (
        Recorder(path, fleet()) as log,
        ControlLoop(simulated(), StaticController(fleet(), 1005), observers=[log]) as loop,
    ):
        loop.run(1.0)
    check_backend(lambda: ReplayBackend(path))


@needs_compiler
def test_nvml_on_the_fake(tmp_path):
    with machine(tmp_path) as fake:
        for gpu in fake.gpus:
            gpu.power_scale_frac = 0.5  # below the power cap, which would lower the clock
        check_backend(
            lambda: open_backend(fake, tmp_path),
            wait=lambda _: time.sleep(0.02),
            given_back=lambda: all_given_back(fake),
            claims=["clocks-read-back"],
        )
        assert all(gpu.sets > 0 and gpu.unsupported_sets == 0 for gpu in fake.gpus)
        assert list(tmp_path.glob("*.lock")) == []


@pytest.mark.parametrize("with_policies", [True, False])
def test_cpufreq(tmp_path, with_policies):
    policy = tmp_path / "policy0"
    policy.mkdir()
    for name in ("cpuinfo_min_freq", "cpuinfo_max_freq", "scaling_max_freq"):
        (policy / name).write_text("3000000")
    policies = {"decode-0": [policy]} if with_policies else {}
    check_backend(
        lambda: CpufreqBackend(simulated(), policies, lock_dir=tmp_path),
        wait=advance,
        given_back=lambda: (policy / "scaling_max_freq").read_text() == "3000000",
        claims=["clocks-read-back", "counts-since-read"],
    )
