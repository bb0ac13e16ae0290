"""What an instance carries and draws: the hull, its facets, and how far the curve is from it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voltana_ctrl import ConfigError, FleetSpec, FleetState, Slo, load_profile
from voltana_ctrl.control.assess import Assessor
from voltana_ctrl.control.supply import FACETS, drain_of, lower_hull, supply_of
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.laws import batch_j, decode_s, length_moments
from voltana_ctrl.types import Load

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])


@given(st.lists(st.floats(-100.0, 100.0), min_size=2, max_size=30))
@settings(max_examples=50)
def test_the_hull_is_convex_and_below_every_point(y):
    x, y = np.arange(float(len(y))), np.array(y)
    corners = lower_hull(x, y)
    assert corners[0] == 0
    assert corners[-1] == len(x) - 1
    assert np.all(np.interp(x, x[corners], y[corners]) <= y + 1e-9)
    slopes = np.diff(y[corners]) / np.diff(x[corners])
    assert np.all(np.diff(slopes) > -1e-9)


@given(power=st.lists(st.floats(50.0, 400.0), min_size=1, max_size=40), n=st.integers(1, 8))
@settings(max_examples=50)
def test_facets_lie_on_the_hull_or_above_and_meet_it_at_both_ends(power, n):
    x, y = np.arange(1.0, len(power) + 1.0), np.sort(power)
    supply = supply_of(x, y, facets=n)
    slope = y[1] - y[0] if len(y) > 1 else 0.0
    xs, ys = np.append(0.0, x), np.append(max(0.0, y[0] - slope), y)
    corners = lower_hull(xs, ys)
    hull_w = np.interp(xs, xs[corners], ys[corners])
    told = np.array([supply.power_w(load) for load in xs])
    assert np.all(told >= hull_w - 1e-6)
    assert told[[0, -1]] == pytest.approx(hull_w[[0, -1]])
    assert supply.alpha_j_req.shape == supply.beta_w.shape == (n,)


def test_what_cannot_be_carried_is_left_out():
    supply = supply_of([1.0, 2.0, 3.0], [70.0, 80.0, np.inf], facets=2)
    assert supply.most_req_s == 2.0
    with pytest.raises(ConfigError, match="got none"):
        supply_of([1.0], [np.inf], facets=2)


@pytest.mark.parametrize(("fleet", "gap_frac"), [("2P2D", 0.015), ("2C", 0.045)])
def test_the_power_of_an_awake_instance_is_nearly_convex(fleet, gap_frac):
    """What makes the programme honest; the theory page quotes it."""
    supplies = TargetOptimiser(FleetSpec.parse(fleet, PROFILE), SLO).supplies(LENGTHS)
    for supply in supplies:
        assert supply.gap_w <= gap_frac * supply.power_w(supply.most_req_s)
        assert len(supply.beta_w) == FACETS


def test_facets_are_close_to_the_curve():
    fleet = FleetSpec.parse("2P2D", PROFILE)
    optimiser = TargetOptimiser(fleet, SLO)
    for supply, i in zip(optimiser.supplies(LENGTHS), (0, 2), strict=True):
        loads = np.linspace(0.05, 0.99, 40) * supply.most_req_s
        curve = optimiser.curve(fleet.instances[i], loads, LENGTHS).power_w
        told = np.array([supply.power_w(load) for load in loads])
        assert np.abs(told / curve - 1.0).max() < 0.03
        assert np.isinf(
            optimiser.curve(fleet.instances[i], np.array([1.02 * supply.most_req_s]), LENGTHS)
            .power_w
        ).all()  # fmt: skip


def test_a_promise_that_nobody_keeps_has_no_supply():
    optimiser = TargetOptimiser(FleetSpec.parse("1P1D", PROFILE), Slo(ttft_s=0.6, itl_s=0.001))
    assert optimiser.supplies(LENGTHS) is None


@pytest.mark.parametrize("n", [1, 7, 60])
def test_draining_takes_what_batches_that_fall_one_by_one_take(n):
    """Against answers of geometric length, iteration by iteration, at the clocks it goes by."""
    fleet = FleetSpec.parse("1P1D", PROFILE)
    decode, rng = fleet.instances[1], np.random.default_rng(0)
    assessor = Assessor(fleet, SLO)
    padded, load = PROFILE.padded_batch(), Load(arrival_req_s=1.0, lengths=LENGTHS)
    running = np.arange(n + 1.0)
    step_s, step_j = np.zeros(n + 1), np.zeros(n + 1)
    for k in range(1, n + 1):
        kv_tok = k * LENGTHS.context_tok
        state = dataclasses.replace(
            FleetState.idle(2), running_req=[0.0, float(k)], kv_used_tok=[0.0, kv_tok]
        )
        clock = assessor.thrifty_mhz(state, load, drains=True)[1]
        row = PROFILE.table[np.searchsorted(PROFILE.clocks_mhz, clock)]
        step_s[k] = decode_s(row, padded[k], kv_tok)
        step_j[k] = step_s[k] * row["decode_power_w"] + batch_j(row, k, kv_tok)
    left_tok = rng.geometric(1.0 / LENGTHS.output_tok, (4000, n))
    times, joules = [], []
    for one in np.sort(left_tok, axis=1):
        lasting = np.diff(one, prepend=0)  # iterations with so many left
        times.append(lasting @ step_s[running[:0:-1].astype(int)])
        joules.append(lasting @ step_j[running[:0:-1].astype(int)])
    time_s, energy_j = drain_of(decode, float(n), LENGTHS, SLO.itl_s)
    assert time_s == pytest.approx(np.mean(times), rel=0.1)
    assert energy_j == pytest.approx(np.mean(joules), rel=0.1)


def test_a_drain_is_not_charged_for_what_it_serves_twice():
    alone = supply_of([1.0, 2.0], [70.0, 80.0], facets=2, drain_s=10.0)
    serving = supply_of(
        [1.0, 2.0], [70.0, 80.0], facets=2, drain_s=10.0, drain_j=1500.0, drain_req=20.0
    )
    assert alone.drain_w == pytest.approx(61.0)  # next to no load
    assert serving.drain_w == pytest.approx((1500.0 - 20.0 * 10.0) / 10.0)
