"""NvmlBackend against the fake driver: what it reads, sets, refuses and notices."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_gpus import (
    PROFILE,
    all_given_back,
    assignment,
    decision,
    fleet,
    machine,
    needs_compiler,
    open_backend,
)
from voltana_ctrl import (
    ActuationDenied,
    BackendError,
    ConfigError,
    FleetSpec,
    FleetState,
    InstanceSpec,
    Observation,
    Profile,
    Role,
    load_profile,
)
from voltana_ctrl.backends.meter import EnergyMeter
from voltana_ctrl.backends.nvml.driver import GpuLost, Nvml
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.backends.nvml.worker import Worker
from voltana_ctrl.types import Limits

pytestmark = needs_compiler


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        yield fake


@pytest.fixture
def backend(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        yield backend


class Time:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# The library in our units


def test_reading_is_in_watts_joules_and_megahertz(fake):
    gpu = fake.gpus[0]
    with Nvml(fake.library) as nvml:
        reading = nvml.gpus()[0].read()
    # 59.3 + 197.3 g V2 at 1.41 GHz is 472 W, which the 400 W cap lowers to a clock below.
    assert 385.0 < reading.power_w <= 400.0
    assert 1200.0 < reading.clock_mhz < 1410.0
    assert reading.limited_by == ("power cap",)
    assert reading.counter_j == pytest.approx(gpu.energy_j, abs=5.0)


def test_clocks_come_from_the_driver(fake):
    fake.gpus[1].max_mhz = 1980.0
    with Nvml(fake.library) as nvml:
        first, second = nvml.gpus()
        assert first.clocks_mhz == tuple(range(210, 1411, 15))
        assert second.clocks_mhz[-1] == 1980
        assert first.mem_clocks_mhz == (810, 1593)


def test_gpu_is_found_by_uuid_not_by_order(fake):
    with Nvml(fake.library) as nvml:
        assert nvml.gpu(fake.uuids[1]).uuid == fake.uuids[1]
        with pytest.raises(ConfigError, match=rf"no such GPU.*{fake.uuids[0]}"):
            nvml.gpu("GPU-unknown")
        with pytest.raises(ConfigError, match="MIG slice"):
            nvml.gpu("MIG-4e1d")


def test_lost_gpu_is_an_error_of_its_own(fake):
    with Nvml(fake.library) as nvml:
        gpu = nvml.gpus()[0]
        fake.gpus[0].lost = 1
        with pytest.raises(GpuLost, match=rf"{gpu.uuid} \(number 0\): .* reset the GPU"):
            gpu.read()


def test_missing_library_says_how_to_mend_it(tmp_path):
    with pytest.raises(BackendError, match="cannot be loaded"):
        Nvml(tmp_path / "libnvidia-ml.so.1")


# What does not fit is refused at construction, before anything is held


@pytest.mark.parametrize(
    ("field", "value", "reason"), [("mig", 1, "MIG is on"), ("virtualization", 2, "vGPU")]
)
def test_shared_gpus_are_refused_by_name(fake, tmp_path, field, value, reason):
    setattr(fake.gpus[1], field, value)
    with pytest.raises(ConfigError, match=rf"{fake.uuids[1]}.*{reason}"):
        open_backend(fake, tmp_path)
    assert list(tmp_path.glob("*.lock")) == []


def test_profile_of_another_gpu_is_refused(fake, tmp_path):
    fake.gpus[0].max_mhz = 1200.0
    with pytest.raises(ConfigError, match=r"supports 210\.\.1200 MHz, not 1215 MHz"):
        open_backend(fake, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode-0": []}, r"decode-0: expected a list of 1 GPU"),
        ({"decode-0": "GPU-1"}, r"decode-0: expected a list"),
        ({"decode-7": ["GPU-1"]}, r"got 'decode-7'"),
    ],
)
def test_assignment_must_fit_the_fleet(fake, tmp_path, change, message):
    gpus = {**assignment(fleet(), fake), **change}
    with pytest.raises(ConfigError, match=message):
        NvmlBackend(fleet(), gpus, lock_dir=tmp_path, library=fake.library)


def test_a_gpu_serves_one_instance(fake, tmp_path):
    gpus = {"prefill-0": [fake.uuids[0]], "decode-0": [fake.uuids[0]]}
    with pytest.raises(ConfigError, match="each GPU once"):
        NvmlBackend(fleet(), gpus, lock_dir=tmp_path, library=fake.library)


@pytest.mark.parametrize("lock_mhz", [(900, 210), (210, 1007)])
def test_restore_lock_must_be_supported(fake, tmp_path, lock_mhz):
    with pytest.raises(ConfigError, match="restore_lock_mhz"):
        open_backend(fake, tmp_path, restore_lock_mhz=lock_mhz)


# Setting


def test_clocks_are_locked_and_given_back(fake, backend):
    backend.apply(decision(1005, 705))
    assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [1005, 705]
    assert [gpu.lock_lo_mhz for gpu in fake.gpus] == [1005, 705]
    assert backend.read().state.freq_mhz.tolist() == [1005.0, 705.0]
    backend.close()
    assert all_given_back(fake)


def test_only_what_differs_is_set(fake, backend):
    backend.apply(decision(1005, 705))
    backend.apply(decision(1005, 705))
    assert [gpu.sets for gpu in fake.gpus] == [1, 1]
    backend.apply(decision(1005, 720))
    assert [gpu.sets for gpu in fake.gpus] == [1, 2]


@pytest.mark.parametrize("clock_mhz", [1000.0, 1425.0, 1005.5])
def test_unsupported_clock_is_refused_and_nothing_set(fake, backend, clock_mhz):
    wanted = replace(
        decision(1005, 705),
        freq_mhz=np.array([1005.0, clock_mhz]),
        freq_max_mhz=np.array([1410.0, 1425.0]),
    )
    with pytest.raises(ActuationDenied, match="not a supported clock"):
        backend.apply(wanted)
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]


def test_governor_sets_one_instance(fake, backend):
    backend.apply(decision(1005, 705))
    backend.set_clock(1, 900.0)
    assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [1005, 900]
    with pytest.raises(ActuationDenied):
        backend.set_clock(1, 901.0)


def test_lowering_comes_before_raising(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        backend.apply(decision(705, 1005))
        order = [one.held.gpu.uuid for one in backend._orders(decision(1005, 705))]
    assert order == [fake.uuids[1], fake.uuids[0]]


def test_instance_of_two_gpus_has_one_clock(fake, tmp_path):
    whole = load_profile(PROFILE)
    values = {name: getattr(whole, name) for name in Profile.__dataclass_fields__}
    pair = Profile(**{**values, "gpus": 2})
    spec = FleetSpec((InstanceSpec(id="both", role=Role.COLOCATED, profile=pair),))
    settings = {"lock_dir": tmp_path, "library": fake.library}
    with NvmlBackend(spec, {"both": fake.uuids}, **settings) as backend:
        wanted = replace(
            decision(705, 705),
            **{
                name: getattr(decision(705, 705), name)[:1]
                for name in ("freq_mhz", "freq_max_mhz", "route_frac", "active", "price_j_req")
            },
        )
        backend.apply(wanted)
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 705]
        fake.gpus[1].util_frac = 0.5
        state = backend.read().state
        assert state.freq_mhz.tolist() == [705.0]
        assert 60.0 + 60.0 < state.power_w[0] < 2 * 400.0
    assert all_given_back(fake)


def test_memory_clock_and_cap_are_actuators_of_their_own(fake, backend):
    limits = Limits(mem_mhz=[810, 1593], power_cap_w=[250.0, np.inf])
    backend.apply(decision(1005, 705, limits=limits))
    assert [gpu.mem_lock_hi_mhz for gpu in fake.gpus] == [810, 1593]
    assert [gpu.cap_w for gpu in fake.gpus] == [250, 400]
    backend.apply(decision(1005, 705))  # without limits they are as found
    assert [gpu.mem_lock_hi_mhz for gpu in fake.gpus] == [0, 0]
    assert [gpu.cap_w for gpu in fake.gpus] == [400, 400]
    assert fake.gpus[0].lock_hi_mhz == 1005


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(mem_mhz=[810, 900]), "memory clock 900 MHz: known are 810, 1593"),
        (Limits(power_cap_w=[300, 50]), r"power cap 50 W: expected 100\.\.400 W"),
        (Limits(cpu_mhz=[2000, 2000]), "CpufreqBackend"),
    ],
)
def test_limits_out_of_range_are_refused_and_nothing_set(fake, backend, limits, message):
    with pytest.raises(ActuationDenied, match=message):
        backend.apply(decision(1005, 705, limits=limits))
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]


def test_reading_only_sets_nothing_and_holds_nothing(fake, tmp_path):
    with open_backend(fake, tmp_path, actuate=False) as backend:
        backend.apply(decision(1005, 705))
        assert not backend.actuates
        assert list(tmp_path.glob("*.lock")) == []
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]


def test_no_permission_says_how_to_get_it_and_leaves_nothing_behind(fake, tmp_path):
    for gpu in fake.gpus:
        gpu.deny_pid = -1
    backend = open_backend(fake, tmp_path)
    with pytest.raises(
        ActuationDenied, match=r"run as root or with CAP_SYS_ADMIN.*voltana-ctrl setter"
    ):
        backend.apply(decision(1005, 705))
    # Nothing was set, so that closing has nothing to give back and nothing to fail at.
    backend.close()
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]
    assert list(tmp_path.glob("*.lock")) == []


def test_closed_backend_says_so(fake, backend):
    backend.close()
    backend.close()
    for use in (backend.read, lambda: backend.apply(decision(1005, 705))):
        with pytest.raises(BackendError, match="closed"):
            use()


# Giving back


def test_what_we_did_not_touch_stays_as_the_operator_set_it(fake, tmp_path):
    fake.gpus[0].mem_lock_hi_mhz = 810
    fake.gpus[1].lock_hi_mhz = 900
    fake.gpus[1].cap_w = 300
    with open_backend(fake, tmp_path) as backend:
        backend.set_clock(0, 1005.0)
    assert fake.gpus[0].lock_hi_mhz == 0
    assert fake.gpus[0].mem_lock_hi_mhz == 810
    assert fake.gpus[1].lock_hi_mhz == 900
    assert fake.gpus[1].cap_w == 300


def test_power_cap_goes_back_to_what_was_found(fake, tmp_path):
    fake.gpus[0].cap_w = 333
    with open_backend(fake, tmp_path) as backend:
        backend.apply(decision(1005, 705, limits=Limits(power_cap_w=[200, 200])))
        assert [gpu.cap_w for gpu in fake.gpus] == [200, 200]
    assert [gpu.cap_w for gpu in fake.gpus] == [333, 400]


def test_operators_lock_is_left_behind_where_asked_for(fake, tmp_path):
    with open_backend(fake, tmp_path, restore_lock_mhz=(210, 1200)) as backend:
        backend.apply(decision(1005, 705))
    assert [(gpu.lock_lo_mhz, gpu.lock_hi_mhz) for gpu in fake.gpus] == [(210, 1200)] * 2


# Noticing


def settled(backend, now, reads=5):
    for _ in range(reads):
        now.now_s += 1.0
        backend.read()
    return backend.capabilities


def test_silent_clamp_is_found_and_told(fake, tmp_path):
    now = Time()
    fake.gpus[0].power_scale_frac = fake.gpus[1].power_scale_frac = 0.5
    with open_backend(fake, tmp_path, now_s=now) as backend:
        backend.apply(decision(1410, 1410))
        assert [one.clamp_mhz for one in settled(backend, now)] == [None, None]
        fake.gpus[1].clamp_mhz = 1200
        assert [one.clamp_mhz for one in settled(backend, now)] == [None, 1200.0]


def test_clock_lowered_by_a_power_cap_is_not_a_clamp(fake, tmp_path):
    now = Time()
    with open_backend(fake, tmp_path, now_s=now) as backend:
        backend.apply(decision(1410, 1410))
        assert backend.read().state.freq_mhz[0] < 1410.0
        assert [one.clamp_mhz for one in settled(backend, now)] == [None, None]


def test_cap_without_effect_is_found_and_told(fake, tmp_path):
    now = Time()
    fake.gpus[1].cap_inert = 1
    with open_backend(fake, tmp_path, now_s=now) as backend:
        backend.apply(decision(1410, 1410, limits=Limits(power_cap_w=[200, 200])))
        assert [one.cap_inert for one in settled(backend, now)] == [False, True]


def test_lock_reset_by_somebody_else_is_set_again(fake, tmp_path):
    now = Time()
    with open_backend(fake, tmp_path, now_s=now) as backend:
        backend.apply(decision(705, 705))
        fake.gpus[0].lock_lo_mhz = fake.gpus[0].lock_hi_mhz = 0
        told = settled(backend, now)
        backend.apply(decision(705, 705))
        assert fake.gpus[0].lock_hi_mhz == 705
        assert [one.locks_lost for one in told] == [1, 0]


def test_set_calls_are_timed_for_the_model(fake, tmp_path):
    for gpu in fake.gpus:
        gpu.set_s = 0.004
    with open_backend(fake, tmp_path) as backend:
        for clock_mhz in (705, 720, 735):
            backend.apply(decision(clock_mhz, clock_mhz))
        assert backend.capabilities[0].set_calls == 3
        # What the machine adds on top depends on its load.
        assert np.all(backend.actuation_s >= 0.004)
        assert np.all(backend.actuation_s < 0.1)


def test_engine_brings_queues_and_driver_brings_power(fake, tmp_path):
    told = replace(FleetState.idle(2), queue_tok=np.array([700.0, 0.0]), alive=[True, False])

    with open_backend(fake, tmp_path, engine=lambda: Observation(state=told)) as backend:
        state = backend.read().state
    assert state.queue_tok.tolist() == [700.0, 0.0]
    assert state.alive.tolist() == [True, False]
    assert np.all(state.power_w > 60.0)


# Energy


def test_energy_follows_the_counter(fake, backend):
    before = [gpu.energy_j for gpu in fake.gpus]
    first = backend.read().state.energy_j
    time.sleep(0.2)
    gained_j = backend.read().state.energy_j - first
    after = [gpu.energy_j for gpu in fake.gpus]
    span_j = np.subtract(after, before)
    assert np.all(gained_j > 0.5 * span_j)
    assert np.all(gained_j <= span_j + 0.01)


@pytest.mark.parametrize("fault", ["no_energy", "energy_zero_j"])
def test_energy_without_a_counter_to_trust(fake, tmp_path, fault):
    now, gpu = Time(), fake.gpus[0]
    time.sleep(0.05)  # something must have been counted that can fall
    with open_backend(fake, tmp_path, now_s=now) as backend:
        first = backend.read().state
        now.now_s += 0.1
        setattr(gpu, fault, gpu.energy_j if fault == "energy_zero_j" else 1)
        second = backend.read().state
    mean_w = 0.5 * (first.power_w[0] + second.power_w[0])
    assert second.energy_j[0] - first.energy_j[0] == pytest.approx(0.1 * mean_w)


@given(
    steps=st.lists(
        st.tuples(
            st.floats(-1.0, 5.0),
            st.floats(0.0, 700.0),
            st.one_of(st.none(), st.floats(0.0, 1e7)),
        ),
        max_size=30,
    )
)
def test_energy_never_falls_and_stays_within_what_the_board_can_draw(steps):
    meter = EnergyMeter(highest_w=1400.0)
    t_s = latest_s = 1000.0
    before_j = meter.add(t_s, 100.0, 0.0)
    for step_s, power_w, counter_j in steps:
        t_s += step_s
        gained_s = max(0.0, t_s - latest_s)
        latest_s = max(latest_s, t_s)
        after_j = meter.add(t_s, power_w, counter_j)
        assert 0.0 <= after_j - before_j <= 1400.0 * (gained_s + 0.3) + 1e-6
        before_j = after_j


@given(powers_w=st.lists(st.floats(10.0, 700.0), min_size=2, max_size=30))
def test_energy_is_the_counters_where_it_counts(powers_w):
    meter = EnergyMeter(highest_w=1400.0)
    counter_j = 0.0
    for k, power_w in enumerate(powers_w):
        counter_j += power_w if k else 0.0
        total_j = meter.add(float(k), power_w, counter_j)
    assert total_j == pytest.approx(sum(powers_w[1:]))
    assert meter.restarts == 0


# The thread for driver calls


def test_worker_raises_what_the_job_raised():
    worker = Worker()

    def fail():
        raise GpuLost("gone")

    with pytest.raises(GpuLost, match="gone"):
        worker.run(fail, limit_s=1.0)
    assert worker.run(lambda: 7, limit_s=1.0) == 7
    worker.stop()


def test_memory_that_a_hanging_driver_has_not_set_is_not_taken_for_set(fake, backend, monkeypatch):
    def hang(*_, **__):
        raise TimeoutError

    assert backend.park_memory(1, True)
    assert fake.gpus[1].mem_lock_hi_mhz == 810.0
    with monkeypatch.context() as hanging:
        hanging.setattr(backend._worker, "run", hang)
        assert not backend.park_memory(1, False)
        backend.set_clock(1, 705.0)
    assert fake.gpus[1].mem_lock_hi_mhz == 810.0
    assert backend.park_memory(1, False)
    assert fake.gpus[1].mem_lock_hi_mhz == 0.0
    assert fake.gpus[0].mem_lock_hi_mhz == 0.0
