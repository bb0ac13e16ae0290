"""CPU clocks on a temporary tree that looks like the kernel's."""

import errno
import logging
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.fake_gpus import decision, fleet
from voltana_ctrl import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.backends.cpufreq import CpufreqBackend, CpuPolicy, cpu_policies, policies_of
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
        (policy / "related_cpus").write_text(f"{number} {number + 1}\n")
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


@contextmanager
def busy(monkeypatch, *names):
    """A kernel that refuses to set these policies, as it does while their CPUs are offline."""
    write_text = Path.write_text

    def write(path, *args, **options):
        if path.parent.name in names and path.name == "scaling_max_freq":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return write_text(path, *args, **options)

    with monkeypatch.context() as offline:
        offline.setattr(Path, "write_text", write)
        yield


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


def test_clock_that_cannot_be_written_is_denied(tree, monkeypatch):
    with busy(monkeypatch, "policy0"), pytest.raises(ActuationDenied, match=r"busy; run as root"):
        CpuPolicy(tree / "policy0").set(2_000_000)


def test_a_cpu_that_refuses_is_told_once_and_keeps_nothing_else_from_being_set(
    tree, monkeypatch, caplog
):
    with open_backend(tree) as backend:
        with busy(monkeypatch, "policy2"), caplog.at_level(logging.WARNING):
            for _ in range(3):
                backend.apply(limited(2000.0, 1200.0))
            assert ceilings_mhz(tree) == [2000.0, 3498.0, 3490.0]
            backend.clock.sleep_until_s(1.0)
            assert backend.read().state.freq_mhz.tolist() == [1005.0, 705.0]
        (line,) = caplog.messages
        assert "policy2" in line
        assert "its clock is not limited any more" in line
        backend.apply(limited(1900.0, 1200.0))  # it would take it now, and is left alone
        assert ceilings_mhz(tree) == [1900.0, 3498.0, 3490.0]
    assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


@pytest.mark.parametrize("asked_mhz", [1300.0, float("inf")])
def test_a_limit_that_could_not_be_lifted_is_lifted_as_soon_as_it_can_be(
    tree, monkeypatch, asked_mhz
):
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 1200.0))
        with busy(monkeypatch, "policy2"):
            backend.apply(limited(2000.0, asked_mhz))
            assert ceilings_mhz(tree) == [2000.0, 1200.0, 3490.0]
        backend.apply(decision(1005, 705))
        assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


def test_a_limit_that_could_not_be_lifted_is_given_back_at_the_end(tree, monkeypatch):
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 1200.0))
        with busy(monkeypatch, "policy2"):
            backend.apply(limited(2000.0, 1300.0))
    assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


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


def test_policies_are_found_by_their_cpus(tree):
    found = policies_of({"decode-0": (2, 3, 10, 11), "prefill-0": (0, 1)}, tree)
    assert {name: [folder.name for folder in folders] for name, folders in found.items()} == {
        "decode-0": ["policy2", "policy10"],
        "prefill-0": ["policy0"],
    }


@pytest.mark.parametrize(
    ("cpus", "message"),
    [
        ({"decode-0": (99,)}, r"decode-0: expected CPUs of this machine .*0 to 11\), got 99"),
        ({"decode-0": (0,)}, "policy0 clocks CPU 1, which nobody names"),
        ({"decode-0": (0,), "prefill-0": (1,)}, "policy0 clocks CPU 1, which prefill-0 names, too"),
    ],
)
def test_cpus_whose_clock_others_share_are_refused(tree, cpus, message):
    with pytest.raises(ConfigError, match=message):
        policies_of(cpus, tree)


def test_a_machine_without_cpu_clocks_is_refused_in_one_line(tree, tmp_path):
    with pytest.raises(ConfigError, match=r"the kernel shows no frequency policies .*leave engine"):
        policies_of({"decode-0": (0,)}, tmp_path / "absent")
    # A driver that has one clock, or shows policies without clocks.
    (tree / "policy0" / "cpuinfo_min_freq").write_text("3500000")
    with pytest.raises(ConfigError, match="policy0 cannot be set below its 3500 MHz"):
        policies_of({"decode-0": (0, 1)}, tree)
    (tree / "policy2" / "scaling_max_freq").unlink()
    with pytest.raises(ConfigError, match=r"policy2: expected .*scaling_max_freq"):
        policies_of({"decode-0": (2, 3)}, tree)


def test_policies_that_nobody_names_need_not_be_readable(tree):
    """One core that is taken offline, or has no clock, is no reason to refuse all engines."""
    (tree / "policy0" / "cpuinfo_min_freq").unlink()
    (tree / "policy2" / "related_cpus").unlink()
    assert policies_of({"decode-0": (10, 11)}, tree) == {"decode-0": (tree / "policy10",)}
    # Where it may be the one that was meant, the refusal says so.
    with pytest.raises(ConfigError, match=r"got 2; .*policy2/related_cpus cannot be read"):
        policies_of({"decode-0": (2, 3)}, tree)


def test_a_user_who_may_not_set_them_is_told(tree, monkeypatch):
    monkeypatch.setattr(CpuPolicy, "writable", property(lambda self: False))
    with pytest.raises(ConfigError, match="may not be set by this user; run as root"):
        policies_of({"decode-0": (2, 3)}, tree)


class Rounds(CpuPolicy):
    """A kernel whose next clock lies above the one that is asked for."""

    def _khz(self, name):
        khz = super()._khz(name)
        return 1_500_000 if khz == 1_200_000 else khz


def test_a_clock_that_the_kernel_rounds_up_is_not_left_behind(tree, monkeypatch, caplog):
    monkeypatch.setattr("voltana_ctrl.backends.cpufreq.CpuPolicy", Rounds)
    with open_backend(tree) as backend:
        backend.apply(limited(2000.0, 1200.0))
        assert "the kernel keeps 1500 MHz" in caplog.text
        # Neither the CPU of the other nor the GPUs wait for it.
        assert ceilings_mhz(tree) == [2000.0, 3498.0, 3490.0]
        backend.clock.sleep_until_s(1.0)
        assert backend.read().state.freq_mhz.tolist() == [1005.0, 705.0]
    assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


def test_a_clock_that_cannot_be_read_after_the_set_is_taken_back(tree, monkeypatch, caplog):
    with open_backend(tree) as backend:
        with monkeypatch.context() as broken:
            broken.setattr(CpuPolicy, "_khz", lambda self, name: int("torn"))
            backend.apply(limited(2000.0, 1200.0))
        assert "can neither be read nor put back" in caplog.text
        assert ceilings_mhz(tree) == [3500.0, 3498.0, 3490.0]


def test_nothing_is_set_once_another_thread_gave_it_back(tree):
    with open_backend(tree) as backend:
        backend._closed = True  # as a kill switch does while a decision is on its way
        backend._set_all([(backend._groups[0][0], 1_200_000)])
        assert ceilings_mhz(tree)[0] == 3500.0
        backend._closed = False
