"""How long a clock set takes is measured, and is what the controller plans with."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler, open_backend
from voltana_ctrl import (
    ConfigError,
    ControlLoop,
    FleetState,
    IterationGovernor,
    MpcController,
    Slo,
)
from voltana_ctrl.backends import DeadTime, measure_dead_time
from voltana_ctrl.control.assess import Assessor
from voltana_ctrl.laws import length_moments
from voltana_ctrl.types import Belief, Load

SLO = Slo(ttft_s=0.6, itl_s=0.06)


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        for gpu in fake.gpus:
            gpu.power_scale_frac = 0.5  # no cap binds
        yield fake


@needs_compiler
def test_measured_calls_are_the_delay_of_the_controller(fake, tmp_path):
    for gpu in fake.gpus:
        gpu.set_s = 0.02
    backend = open_backend(fake, tmp_path)
    dead = measure_dead_time(backend, repeats=2)
    assert np.all((dead.call_s >= 0.02) & (dead.call_s < 0.04))
    assert np.all(dead.settle_s < 0.02)  # the fake's clock is there at once
    # The sets of one machine follow one another: the last instance waits for both.
    delay_s = dead.delay_s()
    assert 0.04 <= delay_s < 0.1
    assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [1410, 1410]
    assert all(gpu.unsupported_sets == 0 for gpu in fake.gpus)
    controller = MpcController(fleet(), SLO, governed=False, delay_s=delay_s)
    assert controller.delay_s == controller._target.delay_s
    governor = IterationGovernor(fleet().instances[0], SLO, delay_s=delay_s)
    assert delay_s in governor.params
    with ControlLoop(backend, controller) as loop:
        assert loop.tick().applied.freq_mhz.tolist() == [1410.0, 1410.0]
    assert all_given_back(fake)


@needs_compiler
def test_a_longer_delay_asks_for_a_higher_clock(fake, tmp_path):
    """What is measured matters: the same queue needs more clock where setting it takes longer."""
    asked_mhz = []
    for set_s in (0.0, 0.05):
        for gpu in fake.gpus:
            gpu.set_s = set_s
        with open_backend(fake, tmp_path) as backend:
            delay_s = measure_dead_time(backend, repeats=1).delay_s()
        queue = replace(FleetState.idle(2), queue_tok=np.array([3500.0, 0.0]))
        load = Load(arrival_req_s=2.0, lengths=length_moments([240, 240], [200, 200]))
        belief = Belief.of_profiles(fleet(), margin_frac=(0.02, 0.035), delay_s=delay_s)
        clocks_mhz = Assessor(fleet(), SLO).clocks_mhz(queue, load, np.ones(2), belief)
        asked_mhz.append(clocks_mhz[0])
    assert asked_mhz[0] < asked_mhz[1]


@needs_compiler
def test_settling_that_is_hidden_is_assumed(fake, tmp_path):
    fake.gpus[1].clamp_mhz = 900.0
    with open_backend(fake, tmp_path) as backend:
        dead = measure_dead_time(backend, repeats=2, settle_limit_s=0.05)
    assert np.isnan(dead.settle_s).tolist() == [False, True]
    assert dead.delay_s(unseen_settle_s=0.3) == pytest.approx(0.3 + dead.call_s.sum())


@needs_compiler
def test_a_ceiling_is_kept(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        measure_dead_time(backend, repeats=1, ceiling_mhz=np.array([700.0, 100.0]))
        assert [gpu.highest_lock_mhz for gpu in fake.gpus] == [690, 210]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="expected a number >= 0"):
        DeadTime(call_s=[-1.0], settle_s=[0.0])
