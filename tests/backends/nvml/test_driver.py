"""A driver that tells some things of a GPU and not others."""

import time

import pynvml
import pytest

from tests.backends.nvml.test_doctor import look
from tests.helpers.fake_gpus import (
    assignment,
    decision,
    fleet,
    machine,
    needs_compiler,
    open_backend,
)
from voltana_ctrl.backends.nvml.meters import GpuMeters
from voltana_ctrl.errors import BackendError
from voltana_ctrl.machine.meter import measure

pytestmark = needs_compiler

POWER = "nvmlDeviceGetPowerUsage"
ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
CLOCK = "nvmlDeviceGetClockInfo"
EVENTS = "nvmlDeviceGetCurrentClocksEventReasons"
THROTTLES = "nvmlDeviceGetCurrentClocksThrottleReasons"
NOT_SUPPORTED, UNKNOWN = pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_UNKNOWN
NO_FUNCTION = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        for gpu in fake.gpus:
            gpu.power_scale_frac = 0.5
        yield fake


def breaks(monkeypatch, name, code, every=1):
    """Let a getter fail at each `every`-th call."""
    right, calls = getattr(pynvml, name), [0]

    def getter(*arguments):
        calls[0] += 1
        if calls[0] % every == 0:
            raise pynvml.NVMLError(code)
        return right(*arguments)

    monkeypatch.setattr(pynvml, name, getter)


def meters(fake):
    return GpuMeters(fleet(), assignment(fleet(), fake), library=fake.library)


@pytest.mark.parametrize("opens", [meters, None], ids=["meters", "backend"])
@pytest.mark.parametrize("code", [NOT_SUPPORTED, UNKNOWN])
@pytest.mark.parametrize("name", [POWER, ENERGY, CLOCK, EVENTS])
def test_one_getter_that_fails_leaves_the_others(fake, tmp_path, monkeypatch, name, code, opens):
    breaks(monkeypatch, name, code)
    with opens(fake) if opens else open_backend(fake, tmp_path) as backend:
        begin = backend.read().state
        time.sleep(1.2)
        state = backend.read().state
        assert state.alive.all()
        assert (state.power_w > 50.0).all()  # from the counter, where it is not told
        assert (state.energy_j > 50.0).all()  # and the other way round
        assert (state.freq_mhz == 1410.0).all()  # the highest, where it is not told
        assert (state.age_s < 1.0).all()
        assert (begin.power_w > 0.0).all() == (name != POWER)
        word = {POWER: "power:", ENERGY: "energy:", CLOCK: "clock not told"}.get(name)
        assert all(word in said for said in backend.problems().values())
        assert (len(backend.problems()) == 2) == (word is not None)


@pytest.mark.parametrize("opens", [meters, None], ids=["meters", "backend"])
def test_a_bad_poll_now_and_then_is_no_death(fake, tmp_path, monkeypatch, opens):
    for name in (POWER, ENERGY, CLOCK):
        breaks(monkeypatch, name, UNKNOWN, every=3)
    with opens(fake) if opens else open_backend(fake, tmp_path) as backend:
        backend.read()
        for _ in range(12):
            state = backend.read().state
            assert state.alive.all()
            assert (state.power_w > 50.0).all()
            assert (state.freq_mhz == 1410.0).all()


def test_a_gpu_that_tells_nothing_for_long_is_not_alive(fake, monkeypatch):
    now_s = [100.0]
    with GpuMeters(
        fleet(), assignment(fleet(), fake), library=fake.library, now_s=lambda: now_s[0]
    ) as backend:
        assert backend.read().state.alive.all()
        for name in (POWER, ENERGY, CLOCK):
            breaks(monkeypatch, name, UNKNOWN)
        assert backend.read().state.alive.all()
        now_s[0] += 13.0
        state = backend.read().state
        assert not state.alive.any()
        assert (state.age_s == 13.0).all()
        assert (state.power_w == 0.0).all()  # 13 s ago is not now
        for said in backend.problems().values():
            assert said.startswith("clock not told for 13 s, power not told for 13 s (GPU")
            assert "Unknown Error" in said


def test_limits_that_cannot_be_read_do_not_hide_the_gpu(fake, tmp_path, monkeypatch):
    for name in ("PowerManagementLimit", "PowerManagementLimitConstraints", "Name", "Index",
                 "Temperature", "UtilizationRates", "PersistenceMode"):  # fmt: skip
        breaks(monkeypatch, f"nvmlDeviceGet{name}", UNKNOWN)
    with meters(fake) as backend:
        assert (backend.read().state.power_w > 0.0).all()
        assert backend.caps_w == {}
    with open_backend(fake, tmp_path) as backend:
        backend.apply(decision(1005.0, 705.0))
        assert backend.read().state.freq_mhz.tolist() == [1005.0, 705.0]
    report = look(fake, tmp_path)
    assert len(report.gpus) == 2
    text = report.text()
    for said in ("power cap: Unknown Error", "temperature: Unknown Error", "busy: not told"):
        assert said in text
    assert "persistence" not in "".join(report.gpus[0].mends)  # nobody knows that it is off


def test_the_doctor_names_what_is_not_told(fake, tmp_path, monkeypatch):
    breaks(monkeypatch, POWER, NOT_SUPPORTED)
    breaks(monkeypatch, "nvmlDeviceGetMigMode", UNKNOWN)
    report = look(fake, tmp_path)
    assert [gpu.power_w for gpu in report.gpus] == [None, None]
    text = report.text()
    assert "power: not told now" in text
    assert "not told: power: Not Supported" in text
    assert "it does not tell whether it is shared" in text
    breaks(monkeypatch, ENERGY, NOT_SUPPORTED)
    assert "energy: not told" in look(fake, tmp_path).text()


@pytest.mark.parametrize(
    ("name", "covers"),
    [("NVIDIA GH200 480GB", True), ("NVIDIA GB200", True), ("NVIDIA H100 80GB HBM3", False)],
)
def test_whoever_shows_joules_says_what_the_counter_of_a_module_covers(
    fake, tmp_path, monkeypatch, name, covers
):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: name)
    assert ("whole module" in look(fake, tmp_path).text()) == covers
    use = measure([], duration_s=0.3, library=fake.library)
    assert ("whole module" in use.text()) == covers
    with meters(fake) as read:
        assert bool(read.covers) == covers


@pytest.mark.parametrize("mig", [[0, 0], [1, 1]])
def test_power_of_a_card_in_slices_is_said_to_be_that_of_all_its_tenants(
    fake, tmp_path, monkeypatch, mig
):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", lambda _: mig)
    told = look(fake, tmp_path).text()
    assert ("all its tenants" in told) == bool(mig[0])
    use = measure([], duration_s=0.3, library=fake.library)
    assert ("all its tenants" in use.text()) == bool(mig[0])
    with meters(fake) as read:
        assert bool(read.covers) == bool(mig[0])


def clamped(fake, tmp_path):
    """What a GPU shows that silently keeps 1200 MHz under a lock of 1410."""
    fake.gpus[1].clamp_mhz = 1200
    with open_backend(fake, tmp_path, settle_s=0.0) as backend:
        for _ in range(5):
            backend.apply(decision(1410.0, 1410.0))
            backend.read()
        return backend.capabilities[1].clamp_mhz


def test_without_event_reasons_no_clamp_is_concluded(fake, tmp_path, monkeypatch):
    assert clamped(fake, tmp_path) == 1200.0
    breaks(monkeypatch, EVENTS, NO_FUNCTION)
    breaks(monkeypatch, THROTTLES, NO_FUNCTION)
    assert clamped(fake, tmp_path) is None
    report = look(fake, tmp_path, actuate=True)
    assert [gpu.clamp_mhz for gpu in report.gpus] == [None, None]
    assert [gpu.lock_suspected for gpu in report.gpus] == [False, False]
    assert report.gpus[0].limited_by is None
    assert "clock held down by: not told" in report.text()


def test_older_drivers_tell_their_reasons_by_another_name(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(pynvml, THROTTLES, getattr(pynvml, EVENTS))
    breaks(monkeypatch, EVENTS, NO_FUNCTION)
    fake.gpus[0].cap_w = 120.0
    report = look(fake, tmp_path)
    assert report.gpus[0].limited_by == ("power cap",)
    assert clamped(fake, tmp_path) == 1200.0


def test_a_lost_gpu_is_gone_at_once(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend, meters(fake) as watching:
        for each in (backend, watching):
            assert each.read().state.alive.all()
        fake.gpus[0].lost = 1
        for each in (backend, watching):
            assert each.read().state.alive.tolist() == [False, True]
            assert "lost" in each.problems()["prefill-0"]
        fake.gpus[0].lost = 0


def test_a_gpu_of_two_instances_is_counted_once(fake):
    uuid = fake.uuids[0]
    with (
        GpuMeters(fleet(), {"prefill-0": [uuid], "decode-0": [uuid]}, library=fake.library) as both,
        GpuMeters(fleet(), {"prefill-0": [uuid]}, library=fake.library) as one,
    ):
        for _ in range(2):
            shared, alone = both.read().state, one.read().state
        assert shared.power_w.sum() == pytest.approx(alone.power_w.sum())
        assert shared.energy_j[0] == shared.energy_j[1]


def test_nvml_blank_power_is_not_believed(fake, monkeypatch):
    monkeypatch.setattr(pynvml, POWER, lambda _: 0xFFFFFFFF)
    with meters(fake) as backend:
        backend.read()
        time.sleep(1.2)
        state = backend.read().state
        assert (state.power_w < 1000.0).all()
        assert (state.energy_j < 2000.0).all()


def test_profiling_needs_power_or_energy(fake, tmp_path, monkeypatch):
    from voltana_ctrl.profiling.gpus import ProfiledGpus

    breaks(monkeypatch, POWER, NOT_SUPPORTED)
    breaks(monkeypatch, ENERGY, NOT_SUPPORTED)
    with (
        ProfiledGpus([(fake.uuids[0],)], (), lock_dir=tmp_path, library=fake.library) as gpus,
        pytest.raises(BackendError, match=r"neither power nor energy can be read.*Not Supp"),
    ):
        gpus.look(0, None)
