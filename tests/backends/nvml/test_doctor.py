"""What the doctor says of machines with and without GPUs."""

import json
import sys

import pytest

from tests.helpers.fake_gpus import all_given_back, machine, needs_compiler, open_backend
from voltana_ctrl.backends.nvml.doctor import examine


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        yield fake


def look(fake, folder, **settings):
    return examine(
        library=fake.library,
        cpufreq=folder / "cpufreq",
        setter=folder / "setter.sock",
        lock_dir=folder,
        settle_s=0.0,
        **settings,
    )


def test_machine_without_a_gpu_says_so_in_one_line(tmp_path):
    report = examine(library=tmp_path / "libnvidia-ml.so.1", setter=tmp_path / "s")
    line = report.json()
    assert "\n" not in line
    told = json.loads(line)
    assert told["schema"] == "voltana-ctrl/doctor/1"
    assert told["gpus"] == []
    assert told["problem"].startswith("NVML: ")
    assert told["mends"] == ["name the driver library of this machine"]
    assert report.text().splitlines()[0].startswith("GPU: none: NVML: ")


def test_machine_without_a_driver_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("FAKE_NVML_STATE", raising=False)
    report = examine(setter=tmp_path / "s")
    if report.gpus:
        pytest.skip("this machine has GPUs")
    (mend,) = report.mends
    assert "install or load the driver" in mend
    assert f"mend: {mend}" in report.text()


def test_missing_binding_is_told_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    report = examine(setter=tmp_path / "s")
    assert report.problem == "NVML: nvidia-ml-py is not installed"
    assert report.mends == ("pip install 'voltana-ctrl[nvml]'",)
    assert json.loads(report.json())["mends"] == list(report.mends)


@needs_compiler
def test_a_lost_gpu_does_not_hide_the_others(fake, tmp_path):
    fake.gpus[0].lost = 1
    report = look(fake, tmp_path)
    assert [gpu.uuid for gpu in report.gpus] == [fake.uuids[1]]
    (mend,) = (each for each in report.mends if "lost" in each)
    assert "GPU number 0" in mend
    assert "reset the GPU" in mend
    fake.gpus[1].lost = 1
    report = look(fake, tmp_path)
    assert report.problem == "the driver answers, but no GPU does"
    assert len(report.mends) == 2


@needs_compiler
def test_it_lists_clocks_permission_and_clamp_and_gives_back(fake, tmp_path):
    fake.gpus[1].clamp_mhz = 1200
    for gpu in fake.gpus:
        gpu.power_scale_frac = 0.5
        gpu.set_s = 0.002
    told = json.loads(look(fake, tmp_path, actuate=True).json())
    first, second = told["gpus"]
    assert first["clocks_mhz"] == list(range(210, 1411, 15))
    assert [gpu["settable"] for gpu in told["gpus"]] == [True, True]
    assert [gpu["clamp_mhz"] for gpu in told["gpus"]] == [None, 1200.0]
    assert first["set_call_s"] >= 0.002
    assert second["power_cap_range_w"] == [100.0, 400.0]
    assert all_given_back(fake)
    assert list(tmp_path.glob("*.lock")) == []


@needs_compiler
def test_it_reads_only_unless_told_otherwise(fake, tmp_path):
    report = look(fake, tmp_path)
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]
    assert [gpu.settable for gpu in report.gpus] == [None, None]


@needs_compiler
def test_missing_permission_comes_with_its_mend(fake, tmp_path):
    for gpu in fake.gpus:
        gpu.deny_pid = -1
    report = look(fake, tmp_path, actuate=True)
    assert [gpu.settable for gpu in report.gpus] == [False, False]
    assert any("CAP_SYS_ADMIN" in mend for mend in report.gpus[0].mends)
    assert "mend: " in report.text()
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]


@needs_compiler
def test_lock_of_somebody_else_is_suspected(fake, tmp_path):
    fake.gpus[0].lock_lo_mhz = fake.gpus[0].lock_hi_mhz = 900
    report = look(fake, tmp_path)
    # The second is below its highest clock, too, but the driver says why: its power cap.
    assert report.gpus[1].clock_mhz < 1410.0
    assert [gpu.lock_suspected for gpu in report.gpus] == [True, False]
    assert "nvidia-smi --reset-gpu-clocks" in report.text()


@needs_compiler
def test_an_idle_gpu_at_a_low_clock_is_not_suspected(fake, tmp_path):
    fake.gpus[0].util_frac = 0
    report = look(fake, tmp_path)
    assert report.gpus[0].clock_mhz == 210.0
    assert not report.gpus[0].lock_suspected


@needs_compiler
@pytest.mark.parametrize(("field", "word"), [("mig", "MIG"), ("virtualization", "vGPU")])
def test_shared_gpus_are_left_alone(fake, tmp_path, field, word):
    setattr(fake.gpus[0], field, 2)
    report = look(fake, tmp_path, actuate=True)
    assert word in report.gpus[0].shared
    assert [gpu.sets > 0 for gpu in fake.gpus] == [False, True]


@needs_compiler
def test_gpus_of_a_running_controller_are_left_alone(fake, tmp_path):
    with open_backend(fake, tmp_path):
        report = look(fake, tmp_path, actuate=True)
    assert "process" in report.gpus[0].held_by
    assert "held by process" in report.text()
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]


@needs_compiler
def test_missing_counter_is_told(fake, tmp_path):
    fake.gpus[0].no_energy = 1
    assert [gpu.energy_counter for gpu in look(fake, tmp_path).gpus] == [False, True]


@needs_compiler
def test_cpu_policies_are_told(fake, tmp_path):
    policy = tmp_path / "cpufreq" / "policy0"
    policy.mkdir(parents=True)
    for name in ("cpuinfo_min_freq", "cpuinfo_max_freq", "scaling_max_freq"):
        (policy / name).write_text("3000000")
    report = look(fake, tmp_path)
    assert [cpu.highest_mhz for cpu in report.cpus] == [3000.0]
    assert "CPU clocks: 1 policies, 3000..3000 MHz" in report.text()
    # One whose CPUs are offline does not hide the others.
    (tmp_path / "cpufreq" / "policy1").mkdir()
    assert [cpu.name for cpu in look(fake, tmp_path).cpus] == ["policy0"]
