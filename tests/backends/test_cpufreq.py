"""CPU clocks on a temporary tree that looks like the kernel's."""

from dataclasses import replace

import pytest

from tests.helpers.fake_gpus import decision, fleet
from voltana_ctrl import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.backends.cpufreq import CpufreqBackend, CpuPolicy, cpu_policies
from voltana_ctrl.backends.nvml.watchdog import Watchdog
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Limits


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "cpufreq"
    for number in (0, 2, 10):
        policy = root / f"policy{number}"
        policy.mkdir(parents=True)
        for name, khz in (
            ("cpuinfo_min_freq", 800_000),
            ("cpuinfo_max_freq", 3_500_000),
            ("scaling_max_freq", 3_500_000 - 1000 * number),
        ):
            (policy / name).write_text(f"{khz}\n")
    return root


def open_backend(tree, policies=None):
    inner = SimBackend(fleet(), workload=make_workload("fixed", rate_req_s=1.0, duration_s=60.0))
    if policies is None:
        policies = {"prefill-0": [tree / "policy0"], "decode-0": [tree / "policy2"]}
    return CpufreqBackend(inner, policies, lock_dir=tree)


def ceilings_mhz(tree):
    return [policy.clock_mhz for policy in cpu_policies(tree)]


def limited(first_mhz, second_mhz):
    return decision(1005, 705, limits=Limits(cpu_mhz=[first_mhz, second_mhz]))


def test_policies_are_found_in_order(tree):
    assert [policy.name for policy in cpu_policies(tree)] == ["policy0", "policy2", "policy10"]
    assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


def test_clocks_are_set_and_given_back_as_found(tree):
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 1200.0))
        assert ceilings_mhz(tree) == [2000.0, 1200.0, 3490.0]
        assert backend.read().state.t_s == 0.0
    assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]
    assert list(tree.glob("*.lock")) == []


def test_the_rest_of_the_decision_reaches_the_plant(tree):
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 1200.0))
        backend.clock.sleep_until_s(1.0)
        assert backend.read().state.freq_mhz.tolist() == [1005.0, 705.0]


def test_without_limits_clocks_are_as_found(tree):
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 1200.0))
        backend.apply(decision(1005, 705))
        assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


def test_instances_without_a_policy_are_left_alone(tree):
    with open_backend(tree, {"decode-0": [tree / "policy2", tree / "policy10"]}) as backend:
        backend.apply(limited(900.0, 1200.0))
        assert ceilings_mhz(tree) == [3500.0, 1200.0, 1200.0]


@pytest.mark.parametrize("clock_mhz", [799.0, 3501.0])
def test_clock_out_of_range_is_refused_and_nothing_set(tree, clock_mhz):
    with open_backend(tree) as backend:
        with pytest.raises(ActuationDenied, match=r"policy2: expected 800\.\.3500 MHz"):
            backend.apply(limited(2000.0, clock_mhz))
        assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


def test_kernel_that_keeps_a_higher_clock_is_noticed(tree, monkeypatch):
    policy = CpuPolicy(tree / "policy0")
    monkeypatch.setattr(type(policy), "_khz", lambda self, name: 3_500_000)
    with pytest.raises(ActuationDenied, match="the kernel keeps 3500 MHz"):
        policy.set(1_000_000)


def test_clock_that_cannot_be_written_is_denied(tree):
    with open_backend(tree) as backend:
        for name in ("policy0", "policy2"):
            (tree / name / "scaling_max_freq").unlink()
            (tree / name / "scaling_max_freq").mkdir()  # not even root writes a folder
        with pytest.raises(ActuationDenied, match="run as root"):
            backend.apply(limited(2000.0, 1200.0))


def test_second_controller_is_refused(tree):
    with open_backend(tree), pytest.raises(BackendError, match="another controller"):
        open_backend(tree)


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"decode-9": []}, "got 'decode-9'"),
        ({"decode-0": ["policy7"]}, "expected cpuinfo_min_freq"),
        ({"prefill-0": ["policy0"], "decode-0": ["policy0"]}, "each policy once"),
    ],
)
def test_policies_must_fit(tree, policies, message):
    named = {name: [tree / folder for folder in folders] for name, folders in policies.items()}
    with pytest.raises(ConfigError, match=message):
        open_backend(tree, named)


def test_the_plant_is_closed_with_it(tree):
    backend = open_backend(tree)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.apply(decision(1005, 705))
    with pytest.raises(BackendError, match="closed"):
        backend.read()
    with pytest.raises(BackendError, match="closed"):
        backend._inner.apply(replace(decision(1005, 705)))


def test_nothing_is_lowered_while_the_watchdog_does_not_answer(tree, monkeypatch):
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 2000.0))
        with monkeypatch.context() as frozen:
            frozen.setattr(Watchdog, "answers", property(lambda self: False))
            backend.apply(limited(1200.0, 3000.0))
            assert ceilings_mhz(tree)[:2] == [2000.0, 3000.0]
        backend.apply(limited(1200.0, 3000.0))
        assert ceilings_mhz(tree)[:2] == [1200.0, 3000.0]
    assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]
