"""Random interleavings of faults and ticks: nothing is left locked, nothing passes its ceiling.

The watchdog process is replaced by a double in this process that gets the same messages and
gives back from them alone, so that thousands of controllers can be killed in a minute; the real
one is killed for real in test_watchdog.py and test_gpus_faults.py.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.helpers.fake_gpus import decision, fleet, machine, needs_compiler, open_backend
from voltana_ctrl import ActuationDenied, BackendError, Controller, ControlLoop, Decision
from voltana_ctrl.backends.nvml import lease as lease_module
from voltana_ctrl.backends.nvml.giveback import give_back, record_from
from voltana_ctrl.backends.nvml.lockfile import remove_if_ours
from voltana_ctrl.testing import FakeNvml
from voltana_ctrl.types import Limits

pytestmark = [needs_compiler, pytest.mark.slow]

CLOCKS_MHZ = st.sampled_from(range(210, 1411, 15))
CAPS_W = st.sampled_from([100.0, 250.0, 400.0])
# Also what the driver would refuse: the guard must mend that.
WISHED_CAPS_W = st.sampled_from([50.0, 100.0, 250.0, 400.0, 900.0, np.inf])
WISHED_MEM_MHZ = st.sampled_from([700.0, 810.0, 1593.0, 2000.0, np.inf])
WHICH = st.integers(0, 1)
AS_NEW = {
    "cap_w": 400.0,
    "clamp_mhz": 0.0,
    "deny_pid": 0.0,
    "hang_calls": 0.0,
    "lock_hi_mhz": 0.0,
    "lock_lo_mhz": 0.0,
    "lost": 0.0,
    "mem_lock_hi_mhz": 0.0,
    "mem_lock_lo_mhz": 0.0,
    "unsupported_sets": 0.0,
}


class InProcessWatchdog:
    """Has only what the real one is told, and a privilege that nobody withdraws."""

    # Set by the test: the fake GPUs on which permission can be withdrawn from the controller.
    fake: FakeNvml
    answers = True

    def __init__(self, locks, *, idle_s, on_acted):
        self.locks = locks
        self.plan = []
        self.closed = False

    def arm(self, records):
        self.plan = [record.as_dict() for record in records]

    def seen(self):
        pass

    def close(self):
        self.closed = True

    def act(self) -> list[str]:
        denied = [gpu.deny_pid for gpu in self.fake.gpus]
        for gpu in self.fake.gpus:
            gpu.deny_pid = 0
        problems = give_back([record_from(values) for values in self.plan])
        for gpu, before in zip(self.fake.gpus, denied, strict=True):
            gpu.deny_pid = before
        return problems

    def abandon(self, limit_s):
        problems = self.act()
        self.closed = not problems
        for lock in self.locks if self.closed else ():
            remove_if_ours(lock.fd, lock.path)
        return problems


class Asked(Controller):
    """Asks for what the test put into it."""

    wish: Decision

    def init(self):
        return None

    def _decide(self, observation, memory):
        return self.wish, memory


class Machine(RuleBasedStateMachine):
    """A controller on two fake GPUs to which things happen."""

    # Set by the test; the same GPUs for all runs, as found at the start of each.
    fake: FakeNvml
    folder: Path

    def __init__(self):
        super().__init__()
        for gpu in self.fake.gpus:
            for name, value in AS_NEW.items():
                setattr(gpu, name, value)
        self.skew_s = 0.0

    def open(self):
        self.controller = Asked(fleet())
        self.backend = open_backend(self.fake, self.folder, call_limit_s=0.002, now_s=self.now_s)
        self.ordered = None
        apply = self.backend.apply

        def note(order):
            self.ordered = order
            apply(order)

        self.backend.apply = note
        self.loop = ControlLoop(self.backend, self.controller)
        self.watchdog = self.backend._lease.watchdog

    def now_s(self) -> float:
        return time.monotonic() + self.skew_s

    @initialize(cap_w=CAPS_W)
    def operator_has_a_cap(self, cap_w):
        self.found_w = cap_w
        for gpu in self.fake.gpus:
            gpu.cap_w = cap_w
        self.open()

    @rule(
        floors_mhz=st.tuples(CLOCKS_MHZ, CLOCKS_MHZ),
        ceilings_mhz=st.tuples(CLOCKS_MHZ, CLOCKS_MHZ),
        cap_w=st.one_of(st.none(), WISHED_CAPS_W),
        mem_mhz=st.one_of(st.none(), WISHED_MEM_MHZ),
        odd_mhz=st.sampled_from([0.0, 0.0, 7.0]),
        in_time=st.booleans(),
    )
    def tick(self, floors_mhz, ceilings_mhz, cap_w, mem_mhz, odd_mhz, in_time):
        # Off the ladder, too: the guard must mend that.
        ceiling_mhz = np.array(ceilings_mhz, dtype=float) + odd_mhz
        floor_mhz = np.minimum(np.array(floors_mhz, dtype=float) + odd_mhz, ceiling_mhz)
        limits = None
        if cap_w is not None or mem_mhz is not None:
            limits = Limits(
                power_cap_w=None if cap_w is None else np.full(2, cap_w),
                mem_mhz=None if mem_mhz is None else np.full(2, mem_mhz),
            )
        self.controller.wish = decision(
            210.0,
            210.0,
            freq_mhz=floor_mhz,
            freq_max_mhz=ceiling_mhz,
            limits=limits,
            t_s=max(0.0, self.now_s()),
        )
        if in_time:  # else the order of an earlier tick may be in the driver still
            self.backend._worker.run(lambda: None, limit_s=10.0)
            for gpu in self.fake.gpus:
                gpu.highest_lock_mhz = 0
        try:
            self.loop.tick()
        except ActuationDenied:
            assert any(gpu.deny_pid for gpu in self.fake.gpus)
        for gpu, ceiling in zip(self.fake.gpus, self.ordered.freq_max_mhz, strict=True):
            assert gpu.highest_lock_mhz <= ceiling or not in_time

    @rule(clock_mhz=st.one_of(CLOCKS_MHZ, st.floats(0.0, 2000.0)), which=WHICH)
    def governor_asks(self, clock_mhz, which):
        if clock_mhz % 15 or not 210 <= clock_mhz <= 1410:
            # The order of an earlier tick may be in the driver still.
            self.backend._worker.run(lambda: None, limit_s=10.0)
            before = self.fake.gpus[which].sets
            with pytest.raises(ActuationDenied, match="not a supported clock"):
                self.backend.set_clock(which, clock_mhz)
            assert self.fake.gpus[which].sets == before
            return
        try:
            self.backend.set_clock(which, clock_mhz)
        except ActuationDenied:
            assert self.denied(which)

    def denied(self, which):
        return self.fake.gpus[which].deny_pid != 0

    @rule(which=WHICH, lost=st.booleans())
    def lose_or_find(self, which, lost):
        gpu = self.fake.gpus[which]
        if gpu.lost and not lost:  # a reset takes locks away, not caps
            gpu.lock_lo_mhz = gpu.lock_hi_mhz = 0
        gpu.lost = lost

    @rule(which=WHICH, denied=st.booleans())
    def withdraw_or_grant(self, which, denied):
        self.fake.gpus[which].deny_pid = os.getpid() if denied else 0

    @rule(which=WHICH)
    def counter_restarts(self, which):
        self.fake.gpus[which].energy_zero_j = self.fake.gpus[which].energy_j

    @rule(which=WHICH, hang_s=st.sampled_from([0.001, 0.005]))
    def next_call_hangs(self, which, hang_s):
        self.fake.gpus[which].hang_s = hang_s
        self.fake.gpus[which].hang_calls = 1

    @rule(which=WHICH)
    def somebody_resets_the_lock(self, which):
        self.fake.gpus[which].lock_lo_mhz = self.fake.gpus[which].lock_hi_mhz = 0

    @rule(which=WHICH, clamp_mhz=st.sampled_from([0.0, 900.0]))
    def clamp(self, which, clamp_mhz):
        self.fake.gpus[which].clamp_mhz = clamp_mhz

    @rule(step_s=st.sampled_from([-100.0, 2.0, 100.0]))
    def clock_jumps(self, step_s):
        self.skew_s += step_s

    @rule()
    def watchdog_acts_on_a_frozen_controller(self):
        self.watchdog.act()
        self.backend._forget_sets()

    @precondition(lambda self: not any(gpu.lost for gpu in self.fake.gpus))
    @rule()
    def second_controller_comes(self):
        with pytest.raises(BackendError, match="another controller"):
            open_backend(self.fake, self.folder)

    @precondition(lambda self: not any(gpu.lost for gpu in self.fake.gpus))
    @rule(kill=st.booleans())
    def restart(self, kill):
        self.end(kill=kill)
        self.open()

    @invariant()
    def only_supported_clocks_were_asked_for(self):
        assert all(gpu.unsupported_sets == 0 for gpu in self.fake.gpus)

    @invariant()
    def no_cap_is_above_the_operators(self):
        assert all(gpu.cap_w <= self.found_w for gpu in self.fake.gpus)

    @invariant()
    def memory_clocks_are_supported_ones(self):
        assert all(gpu.mem_lock_hi_mhz in (0, 810, 1593) for gpu in self.fake.gpus)

    def end(self, *, kill: bool):
        """End the controller, and see that everything is as it was found."""
        for gpu in self.fake.gpus:
            gpu.hang_calls = 0
        if kill:
            self.kill()
        else:
            self.loop.__exit__(None, None, None)
            assert self.watchdog.closed
            assert list(self.folder.glob("*.lock")) == []
        for gpu in self.fake.gpus:
            assert gpu.lock_hi_mhz == 0, "left locked"
            assert gpu.mem_lock_hi_mhz == 0
            assert gpu.cap_w == self.found_w, "power cap not as found"

    def kill(self):
        """End it as SIGKILL does: no code of ours runs but the watchdog's."""
        backend = self.backend
        backend._generation += 1
        backend._worker.run(lambda: None, limit_s=10.0)  # a killed process makes no more calls
        backend._worker.stop()
        backend._closed = True
        assert self.watchdog.act() == []
        for lock in backend._lease._locks.values():
            lock.release()
        backend._nvml.close()

    def teardown(self):
        for gpu in self.fake.gpus:
            gpu.lost = 0
        self.end(kill=False)


def test_ten_thousand_interleavings(monkeypatch, tmp_path):
    monkeypatch.setattr(lease_module, "Watchdog", InProcessWatchdog)
    with machine(tmp_path) as fake:
        monkeypatch.setattr(InProcessWatchdog, "fake", fake, raising=False)
        monkeypatch.setattr(Machine, "fake", fake, raising=False)
        monkeypatch.setattr(Machine, "folder", tmp_path, raising=False)
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=10_000,
                stateful_step_count=8,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
