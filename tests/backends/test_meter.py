"""What is believed of a GPU's figures, whoever tells them, and how one stands in for another."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl.backends.meter import (
    FRESH_S,
    MOST_W,
    EnergyMeter,
    GpuMeter,
    GpuReading,
    InstanceMeter,
)

# Blank values of DCGM (FP64, INT32, INT64 of millijoules) and NVML's "not available" in milliwatts.
BLANKS = [140737488355328.0, 2147483632.0, 9.223372036854776e15, 4294967.295, -1.0, math.nan]


@pytest.mark.parametrize("blank", BLANKS)
def test_a_blank_value_is_no_power_no_clock_and_no_energy(blank):
    meter = GpuMeter(highest_w=800.0)
    meter.take(0.0, GpuReading(clock_mhz=1200.0, power_w=300.0, counter_j=5000.0))
    meter.take(1.0, GpuReading(clock_mhz=blank, power_w=blank, counter_j=blank))
    assert (meter.clock_mhz(1.0), meter.power_w(1.0)) == (1200.0, 300.0)
    assert meter.energy_j <= 800.0
    meter.take(2.0, GpuReading(clock_mhz=1185.0, power_w=310.0, counter_j=5610.0))
    assert (meter.clock_mhz(2.0), meter.power_w(2.0)) == (1185.0, 310.0)
    assert meter.energy_j == pytest.approx(610.0, abs=10.0)


def test_power_follows_from_the_counter_and_energy_from_power():
    only_counter, only_power = GpuMeter(), GpuMeter()
    for tick in range(51):
        t_s = 0.1 * tick
        only_counter.take(t_s, GpuReading(clock_mhz=1410.0, counter_j=7000.0 + 250.0 * t_s))
        only_power.take(t_s, GpuReading(clock_mhz=1410.0, power_w=250.0))
    assert only_counter.power_w(5.0) == pytest.approx(250.0)
    assert only_counter.energy_j == pytest.approx(1250.0)
    assert only_power.energy_j == pytest.approx(1250.0)


def test_one_poll_in_three_that_fails_costs_no_energy_and_no_life():
    meter, power_alone = GpuMeter(), GpuMeter()
    for tick in range(301):
        t_s = 0.1 * tick
        if tick % 3 == 1:
            meter.fail(t_s, "Unknown Error")
            power_alone.fail(t_s, "Unknown Error")
        else:
            meter.take(t_s, GpuReading(clock_mhz=1410.0, power_w=300.0, counter_j=300.0 * t_s))
            power_alone.take(t_s, GpuReading(clock_mhz=1410.0, power_w=300.0))
        assert meter.alive(t_s)
        assert meter.power_w(t_s) == 300.0
    assert meter.energy_j == pytest.approx(9000.0)
    assert power_alone.energy_j == pytest.approx(9000.0)


def test_a_gpu_that_fails_for_long_or_is_lost_is_not_alive():
    meter = GpuMeter()
    assert not meter.alive(0.0)  # nothing was ever heard
    meter.take(0.0, GpuReading(clock_mhz=1410.0))
    for t_s in (1.0, 2.0, 6.5):
        meter.fail(t_s, "Unknown Error")
    assert [meter.alive(t_s) for t_s in (1.0, 5.9, 6.5)] == [True, True, False]
    meter.take(7.0, GpuReading(clock_mhz=1410.0))
    assert meter.alive(7.0)
    meter.fail(7.1, "GPU is lost", lost=True)
    assert not meter.alive(7.1)


def test_every_figure_has_an_age_of_its_own():
    meter = GpuMeter()
    meter.take(0.0, GpuReading(clock_mhz=1410.0, power_w=300.0))
    for tick in range(1, 14):
        meter.take(float(tick), GpuReading(clock_mhz=1395.0, problems=("power: Unknown Error",)))
    assert meter.clock_mhz(13.0) == 1395.0
    assert meter.power_w(FRESH_S) == 300.0
    assert meter.power_w(13.0) is None
    assert meter.problem(13.0) == "power not told for 13 s (power: Unknown Error)"


def test_a_counter_that_is_told_seldom_is_no_jump():
    """DCGM exporter collects every 30 s as it comes; its page is read more often."""
    meter = EnergyMeter(highest_w=800.0)
    for tick in range(0, 2401):
        t_s = 0.05 * tick
        meter.add(t_s, 400.0, 1e6 + 400.0 * 30.0 * (t_s // 30.0))
    assert meter.energy_j == pytest.approx(400.0 * 120.0)
    assert meter.restarts == 0


def test_a_counter_that_stands_still_for_good_is_not_believed():
    meter = EnergyMeter(highest_w=800.0)
    for tick in range(0, 3601):
        meter.add(0.1 * tick, 400.0, 5000.0)
    assert 0.8 * 400.0 * 360.0 < meter.energy_j <= 400.0 * 360.0


def test_an_hour_of_silence_is_not_filled_in():
    meter = EnergyMeter(highest_w=800.0)
    meter.add(0.0, 400.0, None)
    assert meter.add(3600.0, 400.0, None) == 0.0
    assert meter.add(3601.0, 400.0, None) == pytest.approx(400.0)
    counted = EnergyMeter(highest_w=800.0)
    counted.add(0.0, 400.0, 0.0)
    assert counted.add(3600.0, 400.0, 1.4e6) == pytest.approx(1.4e6)


figures = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.floats(0.0, 2.0), figures, figures, figures), max_size=20))
def test_whatever_is_told_energy_never_falls_and_stays_within_what_can_be_drawn(steps):
    meter, t_s, before_j = GpuMeter(), 0.0, 0.0
    for span_s, clock_mhz, power_w, counter_j in steps:
        t_s += span_s
        meter.take(t_s, GpuReading(clock_mhz=clock_mhz, power_w=power_w, counter_j=counter_j))
        assert before_j <= meter.energy_j <= MOST_W * (t_s + 0.3 * len(steps))
        before_j = meter.energy_j
        assert meter.power_w(t_s) is None or 0.0 <= meter.power_w(t_s) <= MOST_W
        assert meter.clock_mhz(t_s) is None or 0.0 <= meter.clock_mhz(t_s) <= 10_000.0


def test_an_instance_is_told_where_all_its_gpus_are():
    gpus = [GpuMeter(), GpuMeter()]
    gpus[0].take(0.0, GpuReading(clock_mhz=1410.0, power_w=300.0))
    half = InstanceMeter.of(gpus, 0.0)
    assert (half.alive, half.clock_mhz, half.power_w) == (False, None, None)
    gpus[1].take(0.0, GpuReading(clock_mhz=1200.0, power_w=100.0))
    both = InstanceMeter.of(gpus, 2.0)
    assert (both.alive, both.clock_mhz, both.power_w, both.age_s) == (True, 1200.0, 400.0, 2.0)
    shared = InstanceMeter.of(gpus, 2.0, [0.5, 1.0])
    assert shared.power_w == 250.0
    assert np.isclose(shared.energy_j, 0.0)
