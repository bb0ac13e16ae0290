import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import (
    BackendError,
    ConfigError,
    ControlLoop,
    Decision,
    FleetSpec,
    FleetState,
    Guard,
    Observation,
    WallClock,
    load_profile,
)
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control import Controller, StaticController
from voltana_ctrl.routing import share_router
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Status

FLEET = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))


class FakeClock:
    """Time that only moves when told; sleeping takes what it says."""

    def __init__(self):
        self.t_s = 0.0

    def now_s(self):
        return self.t_s

    def sleep_until_s(self, t_s):
        self.t_s = max(self.t_s, t_s)


class FakeBackend:
    def __init__(self):
        self.spec = FLEET
        self.applied = []
        self.closed = 0

    def read(self):
        return Observation(state=FleetState.idle(len(FLEET)))

    def apply(self, decision):
        self.applied.append(decision)

    def close(self):
        self.closed += 1


class Counting(Controller):
    def init(self):
        return 0

    def _decide(self, observation, memory):
        return Decision.highest(self.fleet, t_s=observation.state.t_s), memory + 1


def test_ticks_come_every_period_and_memory_goes_round():
    backend = FakeBackend()
    times_s = []
    clock = FakeClock()

    class Note:
        def on_tick(self, record):
            times_s.append(clock.now_s())

    loop = ControlLoop(backend, Counting(FLEET, period_s=0.25), clock=clock, observers=[Note()])
    loop.run(1.0)
    assert times_s == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert len(backend.applied) == loop.ticks == 4
    loop.run(2.0)
    assert times_s[4:] == pytest.approx([1.0, 1.25, 1.5, 1.75])


def test_missed_deadlines_are_skipped_and_counted_not_made_up_for():
    clock = FakeClock()
    missed = []

    class Slow(Counting):
        def _decide(self, observation, memory):
            if memory == 1:
                clock.t_s += 0.35
            return super()._decide(observation, memory)

    class Note:
        def on_tick(self, record):
            missed.append((round(clock.now_s(), 6), record.missed))

    loop = ControlLoop(FakeBackend(), Slow(FLEET, period_s=0.1), clock=clock, observers=[Note()])
    loop.run(0.8)
    # Tick 1 (due 0.1) ends at 0.45: the ones due at 0.2, 0.3, 0.4 are gone.
    assert [at for at, _ in missed] == pytest.approx([0.0, 0.45, 0.5, 0.6, 0.7])
    assert [count for _, count in missed] == [0, 0, 3, 0, 0]


def test_the_router_is_told_what_was_applied():
    router = share_router(FLEET, "decode")
    told = []
    router.update = told.append
    loop = ControlLoop(FakeBackend(), Counting(FLEET), router=router, clock=FakeClock())
    record = loop.tick()
    assert told == [record.applied]
    assert loop.applied is record.applied


def test_a_host_object_with_init_and_decide_is_enough():
    class Mine:
        def init(self):
            return None

        def decide(self, observation, memory):
            return Decision.highest(FLEET, t_s=observation.state.t_s), memory

    loop = ControlLoop(FakeBackend(), Mine(), clock=FakeClock())
    assert (loop.tick().applied.freq_mhz == 1410.0).all()


def test_what_cannot_decide_is_refused():
    with pytest.raises(ConfigError, match="without init"):
        ControlLoop(FakeBackend(), object())


def test_a_controller_that_fails_leaves_the_hardware_given_back():
    class Broken(Counting):
        def _decide(self, observation, memory):
            raise ZeroDivisionError

    backend = FakeBackend()
    with (
        pytest.raises(ZeroDivisionError),
        ControlLoop(backend, Broken(FLEET), clock=FakeClock(), raises=True) as loop,
    ):
        loop.tick()
    assert backend.closed == 1
    assert backend.applied == []


def test_a_controller_that_fails_is_replaced_counted_and_asked_again(caplog):
    class Hiccups(Counting):
        def _decide(self, observation, memory):
            if 2 <= memory < 20 and not self.well:
                raise OverflowError("1e300")
            return super()._decide(observation, memory)

    controller = Hiccups(FLEET)
    controller.well = False
    backend = FakeBackend()
    loop = ControlLoop(backend, controller, clock=FakeClock())
    records = [loop.tick() for _ in range(6)]
    assert [record.applied.status for record in records] == [Status.OK] * 2 + [Status.FAILED] * 4
    assert records[-1].interventions[0] == "replaced: failed"
    assert loop.failures == 4
    assert len(backend.applied) == 6
    assert sum("OverflowError: 1e300" in (r.exc_text or "") for r in caplog.records) == 4
    controller.well = True
    assert loop.tick().applied.status is Status.OK  # with the memory that it had
    assert loop.failures == 4


def test_a_controller_that_goes_on_failing_ends_at_the_highest_clock():
    class Broken(Controller):
        def init(self):
            return None

        def _decide(self, observation, memory):
            if observation.state.t_s > 1.0:
                raise ZeroDivisionError
            slow_mhz = np.full(len(FLEET), 705.0)
            return Decision.highest(FLEET, t_s=observation.state.t_s, floor_mhz=slow_mhz), memory

    workload = make_workload("sharegpt", rate_req_s=4.0, duration_s=10.0, seed=0)
    backend = SimBackend(FLEET, workload=workload)
    with pytest.raises(ZeroDivisionError):  # in a simulation a mistake is seen at once
        ControlLoop(backend, Broken(FLEET)).run(3.0)
    backend = SimBackend(FLEET, workload=workload)
    loop = ControlLoop(backend, Broken(FLEET), raises=False)
    loop.run(1.0)
    assert (loop.applied.freq_mhz == 705.0).all()
    loop.run(3.0)
    assert (loop.applied.freq_mhz == 1410.0).all()


def test_a_failed_tick_changes_no_memory():
    class Backend(FakeBackend):
        fail = True

        def apply(self, decision):
            if self.fail:
                raise BackendError("no")
            super().apply(decision)

    backend = Backend()
    seen = []

    class Remember(Counting):
        def _decide(self, observation, memory):
            seen.append(memory)
            return super()._decide(observation, memory)

    loop = ControlLoop(backend, Remember(FLEET), clock=FakeClock())
    with pytest.raises(BackendError):
        loop.tick()
    backend.fail = False
    loop.tick()
    loop.tick()
    assert seen == [0, 0, 1]


def test_a_thread_runs_until_stopped_and_gives_back_on_exit():
    backend = FakeBackend()
    with ControlLoop(backend, Counting(FLEET, period_s=0.005), clock=WallClock()) as loop:
        loop.start()
        with pytest.raises(ConfigError, match="runs already"):
            loop.start()
        deadline_s = time.monotonic() + 10.0
        while loop.ticks < 3 and time.monotonic() < deadline_s:
            time.sleep(0.005)
    assert loop.ticks >= 3
    assert backend.closed == 1
    assert all(thread.name != "voltana-ctrl" for thread in threading.enumerate())


def test_a_failure_in_the_thread_gives_back_at_once_and_is_raised_on_stop():
    class Broken(Counting):
        def _decide(self, observation, memory):
            raise ZeroDivisionError("boom")

    backend = FakeBackend()
    loop = ControlLoop(backend, Broken(FLEET, period_s=0.005), clock=WallClock(), raises=True)
    loop.start()
    deadline_s = time.monotonic() + 10.0
    while not backend.closed and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert backend.closed == 1
    with pytest.raises(BackendError, match="boom"):
        loop.stop()
    loop.stop()


def test_two_loops_in_one_process_do_not_mix():
    workload = make_workload("sharegpt", rate_req_s=4.0, duration_s=10.0, seed=0)
    slow = ControlLoop(SimBackend(FLEET, workload=workload), StaticController(FLEET, 210))
    fast = ControlLoop(SimBackend(FLEET, workload=workload), StaticController(FLEET))
    for end_s in (1.0, 2.0, 3.0):
        slow.run(end_s)
        fast.run(end_s)
    assert (slow.state.freq_mhz == 210.0).all()
    assert (fast.state.freq_mhz == 1410.0).all()


def test_the_sim_backend_is_given_back_at_its_highest_clock():
    workload = make_workload("sharegpt", rate_req_s=4.0, duration_s=10.0, seed=0)
    backend = SimBackend(FLEET, workload=workload)
    with ControlLoop(backend, StaticController(FLEET, 300), Guard(FLEET)) as loop:
        loop.run(2.0)
        assert (loop.state.freq_mhz == 300.0).all()
    backend.clock.sleep_until_s(2.1)
    assert (backend.read().state.freq_mhz == 1410.0).all()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.apply(Decision.highest(FLEET))


def test_controllers_are_checked_both_ways():
    class Wrong(Counting):
        def _decide(self, observation, memory):
            return memory, memory

    with pytest.raises(ConfigError, match="expected a Decision"):
        Wrong(FLEET).decide(Observation(state=FleetState.idle(3)), 0)
    with pytest.raises(ValueError, match="3 instances, got 2"):
        Counting(FLEET).decide(Observation(state=FleetState.idle(2)), 0)
    with pytest.raises(ConfigError, match="period_s"):
        Counting(FLEET, period_s=0.0)
    other = FleetSpec.parse("1P1D", FLEET.instances[0].profile)

    class Other(Counting):
        def _decide(self, observation, memory):
            return Decision.highest(other), memory

    with pytest.raises(ValueError, match="decision on 3"):
        Other(FLEET).decide(Observation(state=FleetState.idle(3)), 0)


def test_static_controller_raises_to_a_supported_clock_and_refuses_the_rest():
    decision, _ = StaticController(FLEET, 1000.0).decide(
        Observation(state=FleetState.idle(3)), None
    )
    assert np.array_equal(decision.freq_mhz, [1005.0] * 3)
    for freq_mhz in (100.0, 2000.0, float("nan")):
        with pytest.raises(ConfigError, match="210 to 1410"):
            StaticController(FLEET, freq_mhz)


def test_the_loop_of_the_interface_runs_as_written():
    from voltana_ctrl import MpcController, PricedRouter, Request, Slo

    fleet = FleetSpec.pd(prefill=2, decode=2, profile=FLEET.instances[0].profile)
    slo = Slo(ttft_s=0.6, itl_s=0.06)
    controller = MpcController(fleet, slo)
    router = PricedRouter(fleet, slo)
    workload = make_workload("sharegpt", rate_req_s=20.0, duration_s=20.0, seed=0)
    backend = SimBackend(fleet, workload=workload, seed=0)
    with ControlLoop(backend, controller, Guard(fleet), router) as loop:
        loop.start()
        deadline_s = time.monotonic() + 60.0
        while loop.ticks < 30 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert router.route(Request(prompt_tok=300), loop.state) in fleet.decode
    assert loop.ticks >= 30
    assert loop.state.energy_j.sum() > 0.0


def test_what_a_controller_that_failed_could_not_take_in_is_told_with_the_next():
    class Arrives(FakeBackend):
        def read(self):
            seen = super().read()
            return replace(seen, state=replace(seen.state, arrived_req=np.ones(len(FLEET))))

    class Sometimes(Counting):
        def _decide(self, observation, memory):
            told.append(observation.state.arrived_req[0])
            if 2 <= len(told) <= 4:
                raise RuntimeError("as a fault")
            return super()._decide(observation, memory)

    told = []
    loop = ControlLoop(Arrives(), Sometimes(FLEET), clock=FakeClock(), raises=False)
    records = [loop.tick() for _ in range(6)]
    # Three ticks failed; their arrivals come with the fifth, and are told once.
    assert told == [1.0, 1.0, 2.0, 3.0, 4.0, 1.0]
    assert loop.failures == 3
    # The record of a tick says what was read then, no more.
    assert {record.observation.state.arrived_req[0] for record in records} == {1.0}


@pytest.mark.parametrize("raises", [True, False])
def test_an_observer_that_fails_ends_no_control_on_hardware(raises, caplog):
    class Fails:
        def on_tick(self, record):
            raise OSError(24, "Too many open files")

    ticks = []

    class Note:
        def on_tick(self, record):
            ticks.append(record.number)

    controller = Counting(FLEET, period_s=0.1)
    loop = ControlLoop(FakeBackend(), controller, observers=[Fails(), Note()], raises=raises)
    if raises:
        with pytest.raises(OSError, match="Too many"):
            loop.tick()
        return
    for _ in range(3):
        loop.tick()
    assert ticks == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "Fails misses ticks" in caplog.text
