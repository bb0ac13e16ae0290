"""Linear models: python-control as oracle, closed forms at equilibrium, and the plant."""

import control
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from voltana_ctrl import ConfigError, load_profile
from voltana_ctrl.control.model import LinearModel, decode_model, prefill_model, zero_order_hold
from voltana_ctrl.laws import decode_equilibrium, decode_s, length_moments

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])


def served(k, arrival_req_s):
    """Whether this clock can serve this load at all."""
    at = decode_equilibrium(
        PROFILE.table[k], arrival_req_s, LENGTHS.output_tok, LENGTHS.context_tok
    )
    return bool(np.isfinite(at.running_req))


def at_equilibrium(row, arrival_req_s):
    at = decode_equilibrium(row, arrival_req_s, LENGTHS.output_tok, LENGTHS.context_tok)
    model = decode_model(
        PROFILE, float(row["clock_mhz"]), float(at.running_req), float(at.kv_tok), LENGTHS
    )
    return model, at


@given(k=st.integers(5, 80), arrival=st.floats(1.0, 15.0))
def test_dc_gain_is_the_closed_form_equilibrium(k, arrival):
    assume(served(k, arrival))
    row = PROFILE.table[k]
    model, at = at_equilibrium(row, arrival)
    expected = [float(at.running_req), float(at.kv_tok)]
    clock = [float(row["clock_mhz"])]
    assert model.steady(clock, [arrival]) == pytest.approx(expected, rel=1e-9)
    assert model.discrete(0.2).steady(clock, [arrival]) == pytest.approx(expected, rel=1e-6)


@given(k=st.integers(10, 80), arrival=st.floats(1.0, 15.0), dt_s=st.floats(0.05, 5.0))
def test_zero_order_hold_against_python_control(k, arrival, dt_s):
    assume(served(k, arrival))
    model, _ = at_equilibrium(PROFILE.table[k], arrival)
    ours = model.discrete(dt_s)
    theirs = control.c2d(model.to_control(), dt_s, method="zoh")
    assert ours.a == pytest.approx(theirs.A, rel=1e-8, abs=1e-10)
    assert np.hstack([ours.b, ours.e, ours.c[:, None]]) == pytest.approx(
        theirs.B, rel=1e-6, abs=1e-6
    )


def test_decode_is_stable_and_controllable():
    model, _ = at_equilibrium(PROFILE.table[40], 10.0)
    system = model.to_control()
    assert np.all(system.poles().real < 0.0)
    assert np.all(np.abs(model.discrete(0.2).to_control().poles()) < 1.0)
    assert np.linalg.matrix_rank(control.ctrb(system.A, system.B[:, :1])) == 2
    assert system.input_labels == ["freq_mhz", "arrival_req_s", "one"]


def test_faster_clock_and_fewer_arrivals_shrink_the_batch():
    model, _ = at_equilibrium(PROFILE.table[40], 10.0)
    gain = np.linalg.solve(-model.a, np.hstack([model.b, model.e]))
    assert np.all(gain[:, 0] < 0.0)
    assert np.all(gain[:, 1] > 0.0)


def test_prefill_is_an_integrator():
    model = prefill_model(0.5)
    assert model.to_control().poles() == pytest.approx([1.0])
    with pytest.raises(ConfigError, match="integrator"):
        model.steady([1.0], [1.0])
    with pytest.raises(ConfigError, match="continuous"):
        model.discrete(0.1)


def test_multi_step_prediction_on_the_plant():
    """Half a minute ahead from an empty fleet: the geometric approximation, quantified."""
    from voltana_ctrl import Decision, FleetSpec
    from voltana_ctrl.sim.plant import Plant, PlantSettings
    from voltana_ctrl.sim.workload import make_workload

    fleet = FleetSpec.parse("1P1D", PROFILE)
    load = make_workload("fixed", rate_req_s=10.0, duration_s=80.0, seed=3)
    lengths = length_moments(load.prompt_tok, load.output_tok)
    clock = np.array([1410.0, 705.0])
    plant = Plant(fleet, load, PlantSettings(actuation_s=0.0, settle_s=0.0))
    plant.apply(Decision.highest(fleet, floor_mhz=clock, ceiling_mhz=clock))
    plant.advance(30.0)
    at = plant.state()
    model = decode_model(
        PROFILE, 705.0, float(at.running_req[1]), float(at.kv_used_tok[1]), lengths
    ).discrete(1.0)
    x = np.array([at.running_req[1], at.kv_used_tok[1]])
    errors = []
    for second in range(1, 31):
        x = model.step(x, [705.0], [10.0])
        plant.advance(30.0 + second)
        errors.append(x[0] - plant.state().running_req[1])
    relative = np.sqrt(np.mean(np.square(errors))) / at.running_req[1]
    assert relative < 0.25, relative


@given(rate=st.floats(0.01, 20.0), drive=st.floats(-5.0, 5.0), dt_s=st.floats(0.01, 2.0))
def test_hold_of_a_first_order_lag(rate, drive, dt_s):
    a, forced = zero_order_hold(np.array([[[-rate]]]), np.array([[[drive]]]), dt_s)
    assert a.item() == pytest.approx(np.exp(-rate * dt_s), rel=1e-9)
    assert forced.item() == pytest.approx(drive * -np.expm1(-rate * dt_s) / rate, rel=1e-9)


def test_matrices_must_fit_their_names():
    with pytest.raises(ValueError, match=r"LinearModel\.b"):
        LinearModel(a=[[1.0]], b=[[1.0, 2.0]], e=[[1.0]], c=[0.0], dt_s=0.1, states=("x",),
                    inputs=("u",), disturbances=("w",))  # fmt: skip


def test_the_slope_at_a_clock_of_the_ladder_is_that_of_both_sides():
    """Where the memory begins to set the pace the two sides differ up to twofold."""
    for k in (20, 48, 60):
        at = [decode_equilibrium(PROFILE.table[j], 15.0, 200.0, 340.0) for j in (k - 1, k, k + 1)]
        model = decode_model(
            PROFILE, float(PROFILE.clocks_mhz[k]), at[1].running_req, at[1].kv_tok,
            length_moments([240, 240], [200, 200]),
        )  # fmt: skip

        def rate(j, at=at):
            step_s = decode_s(PROFILE.table[j], at[1].running_req, at[1].kv_tok)
            return -float(at[1].running_req) / 199.0 / float(step_s)

        span_mhz = PROFILE.clocks_mhz[k + 1] - PROFILE.clocks_mhz[k - 1]
        central = (rate(k + 1) - rate(k - 1)) / span_mhz
        np.testing.assert_allclose(model.b[0, 0], central, rtol=0.02)


def test_a_point_beyond_what_can_be_served_is_refused():
    with pytest.raises(ConfigError, match=r"decode_model\.running_req"):
        decode_model(PROFILE, 810.0, np.inf, np.inf, length_moments([240, 240], [200, 200]))
