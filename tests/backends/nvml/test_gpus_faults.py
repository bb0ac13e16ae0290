"""The fault matrix: each ends with the hardware given back."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_gpus import (
    Host,
    all_given_back,
    decision,
    fleet,
    machine,
    needs_compiler,
    open_backend,
    seconds_until,
)
from voltana_ctrl import (
    ActuationDenied,
    BackendError,
    Controller,
    ControlLoop,
    Decision,
    FleetState,
    Guard,
    Observation,
)
from voltana_ctrl.backends.replay import Recorder, ReplayBackend
from voltana_ctrl.types import Status

pytestmark = needs_compiler


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        yield fake
        assert all_given_back(fake), "the hardware was not given back"
        assert all(gpu.unsupported_sets == 0 for gpu in fake.gpus)


class Low(Controller):
    """Asks for low clocks, and for other ones each tick."""

    def init(self):
        return 0

    def _decide(self, observation, memory):
        clocks_mhz = np.array([705.0, 900.0]) + 15.0 * (memory % 2)
        return Decision.highest(
            self.fleet, t_s=observation.state.t_s, floor_mhz=clocks_mhz
        ), memory + 1


class Fault(Exception):
    """A bug in the host's or our code."""


class FailsAt:
    """Any part of a tick; works until its third call."""

    def __init__(self, inner=None):
        self.inner = inner
        self.calls = 0

    def count(self, *_args, **_kwargs):
        self.calls += 1
        if self.calls >= 3:
            raise Fault("third call")


def broken_loop(backend, step: str, *, raises: bool | None = None) -> ControlLoop:
    fails = FailsAt()
    controller, guard, router, observers = Low(fleet()), Guard(fleet()), None, []
    if step == "decide":

        class Breaks(Low):
            def _decide(self, observation, memory):
                fails.count()
                return super()._decide(observation, memory)

        controller = Breaks(fleet())
    elif step == "guard":

        class Doubts(Guard):
            def shield(self, proposed, observation, last):
                fails.count()
                return super().shield(proposed, observation, last)

        guard = Doubts(fleet())
    elif step == "publish":

        class Routes:
            route = staticmethod(lambda request, state: 0)
            update = staticmethod(fails.count)

        router = Routes()
    elif step == "record":

        class Watches:
            on_tick = staticmethod(fails.count)

        observers = [Watches()]
    return ControlLoop(backend, controller, guard, router, observers=observers, raises=raises)


@pytest.mark.parametrize("step", ["read", "decide", "guard", "apply", "publish", "record"])
def test_exception_in_a_step(fake, tmp_path, step):
    fails = FailsAt()

    def engine():
        if step == "read":
            fails.count()
        return Observation(state=FleetState.idle(2))

    backend = open_backend(fake, tmp_path, engine=engine)
    if step == "apply":
        backend._set = lambda order: fails.count()

    def three_ticks():
        with broken_loop(backend, step, raises=True) as loop:
            for _ in range(3):
                loop.tick()

    with pytest.raises(Fault, match="third call"):
        three_ticks()
    if step != "apply":
        assert fake.gpus[0].highest_lock_mhz >= 705


def test_a_controller_that_fails_on_hardware_is_replaced(fake, tmp_path):
    with broken_loop(open_backend(fake, tmp_path), "decide") as loop:
        for _ in range(2):
            loop.tick()
        until_s = time.monotonic() + 20.0
        while [gpu.lock_hi_mhz for gpu in fake.gpus] != [1410, 1410]:
            assert time.monotonic() < until_s
            loop.tick()
            time.sleep(0.05)
        assert loop.failures > 0
        assert loop.applied.status is Status.FAILED


def test_exception_in_the_loops_own_thread(fake, tmp_path):
    backend = open_backend(fake, tmp_path)
    loop = broken_loop(backend, "guard")
    loop.start()
    seconds_until(lambda: loop._failure is not None)
    # The thread has given the hardware back by itself; whoever stops the loop hears of it.
    seconds_until(lambda: all_given_back(fake), 2.0)
    with pytest.raises(BackendError, match="third call"):
        loop.stop()


def hang(fake, tmp_path, hang_s: float):
    with open_backend(fake, tmp_path, call_limit_s=0.05) as backend:
        loop = ControlLoop(backend, Low(fleet()))
        loop.tick()
        fake.gpus[0].hang_s = hang_s
        fake.gpus[0].hang_calls = 1
        begin_s = time.monotonic()
        slowest_s, oldest_s = 0.0, 0.0
        while time.monotonic() - begin_s < hang_s:
            tick_s = time.monotonic()
            oldest_s = max(oldest_s, loop.tick().observation.state.age_s.max())
            slowest_s = max(slowest_s, time.monotonic() - tick_s)
            time.sleep(0.02)
        # The loop goes on meanwhile, and says how old its readings are.
        assert slowest_s < 0.5 * hang_s
        assert oldest_s > 0.5 * hang_s

        # Afterwards the newest decision holds.
        def newest_is_set() -> bool:
            fresh = loop.tick().observation.state.age_s.max() < 0.1
            clocks_mhz = [gpu.lock_hi_mhz for gpu in fake.gpus]
            return fresh and clocks_mhz == loop.applied.freq_mhz.tolist()

        seconds_until(newest_is_set, 10.0)


def test_driver_call_that_hangs(fake, tmp_path):
    hang(fake, tmp_path, 1.0)


@pytest.mark.slow
def test_driver_call_that_hangs_five_seconds(fake, tmp_path):
    hang(fake, tmp_path, 5.0)


def test_closing_waits_for_a_call_that_hangs(fake, tmp_path):
    backend = open_backend(fake, tmp_path, call_limit_s=0.05)
    backend.apply(decision(705, 900))
    fake.gpus[1].hang_s, fake.gpus[1].hang_calls = 1.0, 1
    backend.apply(decision(720, 915))
    assert fake.gpus[1].lock_hi_mhz == 900  # it hangs in the driver
    backend.close()


def test_closing_does_not_wait_for_ever_and_gives_back_later(fake, tmp_path):
    backend = open_backend(fake, tmp_path, call_limit_s=0.05)
    backend.apply(decision(705, 900))
    fake.gpus[1].hang_s, fake.gpus[1].hang_calls = 1.0, 1
    backend.apply(decision(720, 915))
    with pytest.raises(BackendError, match="given back when it does"):
        backend.close(limit_s=0.1)
    # The call that hung set its clock after we gave up; it is undone all the same.
    seconds_until(lambda: fake.gpus[1].highest_lock_mhz == 915)
    seconds_until(lambda: all_given_back(fake))


def test_controller_killed_while_a_call_hangs(fake, tmp_path):
    body = (
        "backend = open_backend(call_limit_s=0.05)\n"
        "backend.apply(decision(705, 900))\n"
        "say('set')\n"
        "sys.stdin.readline()\n"
        "backend.apply(decision(720, 915))\n"
        "say('hangs')\n"
        "time.sleep(60)\n"
    )
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        fake.gpus[1].hang_s, fake.gpus[1].hang_calls = 5.0, 1
        host.process.stdin.write("\n")
        host.process.stdin.flush()
        host.expect("hangs")
        host.process.kill()
        assert seconds_until(lambda: all_given_back(fake)) < 2.0


def test_driver_that_never_answers_is_an_error(fake, tmp_path):
    backend = open_backend(fake, tmp_path, call_limit_s=0.02, hang_limit_s=0.1)
    backend.apply(decision(705, 900))
    fake.gpus[0].hang_s, fake.gpus[0].hang_calls = 0.5, 1
    backend.read()
    time.sleep(0.2)
    with pytest.raises(BackendError, match="has not answered"):
        backend.apply(decision(720, 915))
    backend.close()


def test_gpu_lost_and_found(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        loop = ControlLoop(backend, Low(fleet()))
        loop.tick()
        fake.gpus[1].lost = 1
        record = loop.tick()
        assert record.observation.state.alive.tolist() == [True, False]
        first, second = backend.capabilities
        assert first.failure is None
        assert f"GPU {fake.uuids[1]} (number 1): GPU is lost" in second.failure
        record = loop.tick()
        assert record.applied.active.tolist()[0] is True
        assert fake.gpus[0].lock_hi_mhz in (705, 720)
        # A reset takes the lock away; found again, it is set again.
        fake.gpus[1].lock_lo_mhz = fake.gpus[1].lock_hi_mhz = fake.gpus[1].lost = 0
        assert loop.tick().observation.state.alive.tolist() == [True, True]
        assert backend.capabilities[1].failure is None
        assert fake.gpus[1].lock_hi_mhz in (900, 915)


def test_gpu_lost_for_good_does_not_keep_the_others(fake, tmp_path):
    backend = open_backend(fake, tmp_path)
    backend.apply(decision(705, 900))
    fake.gpus[1].lost = 1
    with pytest.raises(ActuationDenied, match="GPU is lost"):
        backend._lease.close(watchdog_limit_s=0.2)
    assert fake.gpus[0].lock_hi_mhz == 0
    backend.close()
    fake.gpus[1].lost = 0  # reset by an operator: the watchdog is still there
    seconds_until(lambda: all_given_back(fake))


def test_permission_withdrawn_midway(fake, tmp_path):
    import os

    backend = open_backend(fake, tmp_path)
    with ControlLoop(backend, Low(fleet())) as loop:
        loop.tick()
        assert fake.gpus[0].lock_hi_mhz == 705
        for gpu in fake.gpus:
            gpu.deny_pid = os.getpid()
        with pytest.raises(ActuationDenied, match="no permission"):
            loop.tick()
        assert fake.gpus[0].lock_hi_mhz == 705


def test_energy_counter_resets(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        loop = ControlLoop(backend, Low(fleet()))
        energies_j = []
        for number in range(6):
            if number == 3:
                fake.gpus[0].energy_zero_j = fake.gpus[0].energy_j
            energies_j.append(loop.tick().observation.state.energy_j[0])
            time.sleep(0.02)
        gained_j = np.diff(energies_j)
        assert np.all(gained_j > 0.0)
        assert gained_j.max() < 400.0 * 0.5
        # At the first reading of a counter near zero its fall is the only thing to see.
        assert backend.capabilities[0].energy_restarts >= 1


def test_two_controllers_at_once(fake, tmp_path):
    with open_backend(fake, tmp_path) as first:
        first.apply(decision(705, 900))
        with pytest.raises(BackendError, match="another controller"):
            open_backend(fake, tmp_path)
        first.apply(decision(720, 900))
        assert fake.gpus[0].lock_hi_mhz == 720


def test_disk_full_for_the_log(fake, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    log = Recorder(tmp_path / "log.jsonl", fleet())
    log._file._file.close()
    log._file._file = Path("/dev/full").open("wb")  # noqa: SIM115
    with (
        open_backend(fake, tmp_path) as backend,
        ControlLoop(backend, Low(fleet()), observers=[log]) as loop,
    ):
        for _ in range(3):
            loop.tick()
        assert loop.ticks == 3
    assert log.failure is not None
    assert "No space left" in log.failure
    assert log.ticks == 0
    assert len(ReplayBackend(tmp_path / "log.jsonl")) == 0


def test_disk_full_for_the_lock_file(fake, tmp_path, monkeypatch):
    import errno
    import os

    backend = open_backend(fake, tmp_path)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BackendError, match="No space left"):
        backend.apply(decision(705, 900))
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]
    monkeypatch.undo()
    backend.close()


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0, -1e9])
def test_clock_skew(fake, tmp_path, step_s, monkeypatch):
    # The time of day jumps: nothing here may depend on it.
    shift_s = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift_s[0])
    with open_backend(fake, tmp_path) as backend, ControlLoop(backend, Low(fleet())) as loop:
        before = loop.tick().observation.state
        shift_s[0] = step_s
        after = loop.tick().observation.state
        assert 0.0 <= after.t_s - before.t_s < 5.0
        assert np.all(after.age_s < 5.0)
        assert np.all(after.energy_j >= before.energy_j)


def test_clock_of_the_host_that_goes_back(fake, tmp_path):
    # A host may bring its own time, which ought not to go back; if it does, energy still holds.
    now = iter(np.concatenate([np.linspace(10.0, 20.0, 40), np.linspace(5.0, 15.0, 400)]))
    with open_backend(fake, tmp_path, now_s=lambda: float(next(now))) as backend:
        states = []
        for _ in range(20):
            states.append(backend.read().state)
            backend.apply(decision(705, 900))
        energy_j = np.array([state.energy_j for state in states])
        assert np.all(np.diff(energy_j, axis=0) >= 0.0)
        assert all(np.all(state.age_s >= 0.0) for state in states)


def test_ceiling_is_never_passed_on_the_way(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        for ceiling_mhz in (1200.0, 600.0, 900.0):
            for gpu in fake.gpus:
                gpu.highest_lock_mhz = 0
            wish = replace(decision(1410, 1410), freq_max_mhz=np.full(2, 1410.0))
            wish = replace(
                wish, freq_mhz=np.full(2, ceiling_mhz), freq_max_mhz=np.full(2, ceiling_mhz)
            )
            backend.apply(wish)
            assert all(gpu.highest_lock_mhz <= ceiling_mhz for gpu in fake.gpus)
