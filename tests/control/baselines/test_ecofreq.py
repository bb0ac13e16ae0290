"""Governors against a plain statement of their rules, alone and in the plant."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.naive_plant import NaiveInstance, naive_ecofreq
from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.control.baselines.ecofreq import DEFAULT_LADDER_MHZ, EcoFreqGovernor
from voltana_ctrl.control.baselines.static import StaticController
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.kernels.choose.base import hold_floor
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
FLEET = FleetSpec.parse("1P1D", REFERENCE)
DECODE = FLEET.instances[1]
SLO = Slo(ttft_s=0.6, itl_s=0.06)
ROWS = [{name: float(row[name]) for name in row.dtype.names} for row in REFERENCE.table]
NAIVE = NaiveInstance(spec=DECODE, table=ROWS, clock=80, want=80)

ladders = st.sampled_from([list(DEFAULT_LADDER_MHZ), [1005.0, 1410.0], list(REFERENCE.clocks_mhz)])


@given(
    ladder=ladders,
    running=st.one_of(st.just(0), st.integers(1, 1024)),
    context=st.sampled_from([10, 430, 900]),
    batch_tok=st.one_of(st.just(0), st.integers(1, 8192)),
    behind_tok=st.sampled_from([0, 0, 0, 500]),
    oldest_s=st.floats(0.0, 0.7),
    margin=st.sampled_from([0.0, 0.35, -0.3]),
)
def test_ecofreq(ladder, running, context, batch_tok, behind_tok, oldest_s, margin) -> None:
    governor = EcoFreqGovernor(DECODE, SLO, ladder_mhz=ladder, margin_frac=margin)
    kv = running * context
    chosen = governor.step(
        running, kv, batch_tok + behind_tok, oldest_s, 210.0, 1410.0, batch_tok=batch_tok
    )
    tightened = Slo(ttft_s=SLO.ttft_s / (1 + margin), itl_s=SLO.itl_s / (1 + margin))
    expected = naive_ecofreq(
        NAIVE, ladder, tightened, running=running, kv=kv, waiting_tok=batch_tok + behind_tok,
        batch_tok=batch_tok, oldest_s=oldest_s,
    )  # fmt: skip
    assert chosen == expected


@given(running=st.integers(1, 800), oldest_s=st.floats(0.0, 0.6), tok=st.integers(1, 8000))
def test_ecofreq_is_monotone_in_what_presses(running, oldest_s, tok) -> None:
    governor = EcoFreqGovernor(DECODE, SLO, ladder_mhz=None)

    def step(n, waits_s, batch_tok):
        return governor.step(n, n * 400, batch_tok, waits_s, 0.0, 1410.0, batch_tok=batch_tok)

    assert step(running, 0.0, 0) <= step(running + 8, 0.0, 0)
    assert step(0, oldest_s, tok) <= step(0, oldest_s + 0.01, tok)
    assert step(0, oldest_s, tok) <= step(0, oldest_s, tok + 100)


def test_ecofreq_ladder_entries_are_raised_to_supported_clocks() -> None:
    one = dataclasses.replace(DECODE, clocks_mhz=[210.0, 900.0, 1200.0, 1410.0])
    governor = EcoFreqGovernor(one, SLO, ladder_mhz=[800.0, 1000.0, 3000.0])
    seen = {governor.step(n, n * 400, 0, 0.0, 0, 1410) for n in range(0, 1000, 20)}
    assert seen <= {900.0, 1200.0, 1410.0}
    assert {900.0, 1410.0} <= seen


@given(asked_mhz=st.floats(0.0, 2000.0))
def test_step_returns_a_supported_clock_at_or_above_what_is_needed(asked_mhz) -> None:
    clock_mhz = CompiledGovernor(DECODE, REFERENCE, hold_floor).step(1, 1, 0, 0, asked_mhz, 1410.0)
    assert clock_mhz in REFERENCE.clocks_mhz
    assert clock_mhz >= min(asked_mhz, 1410.0)
    assert clock_mhz - 15.0 < asked_mhz or clock_mhz == 210.0


def test_step_remembers_between_calls_and_takes_whole_numbers() -> None:
    from numba import njit

    from voltana_ctrl.kernels.choose.base import GOVERNOR_SIGNATURE

    @njit([GOVERNOR_SIGNATURE])
    def climb(rows, padded, params, memory, t_s, running_req, kv_tok, waiting_tok, batch_tok,
              oldest_wait_s, floor_mhz, ceiling_mhz):  # fmt: skip
        memory[0] += 1.0
        return params[0] + 15.0 * memory[0]

    governor = CompiledGovernor(DECODE, REFERENCE, climb, [300.0])
    assert [governor.step(1, 1, 1, 0, 0, 2000) for _ in range(3)] == [315.0, 330.0, 345.0]


def test_refuses_what_it_cannot_govern() -> None:
    short = dataclasses.replace(REFERENCE, table=REFERENCE.table[:10])
    with pytest.raises(ConfigError, match="does not know its clocks"):
        EcoFreqGovernor(DECODE, SLO, short)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="margin_frac"):
            EcoFreqGovernor(DECODE, SLO, margin_frac=bad)
    for bad_mhz in (200.0, 1411.0, float("nan")):
        with pytest.raises(ConfigError, match="210 to 1410 MHz"):
            StaticController(FLEET, bad_mhz)


# ---- in the plant -------------------------------------------------------------------------


@given(st.floats(210.0, 1410.0))
def test_static_rounds_up_and_holds(freq_mhz) -> None:
    controller = StaticController(FLEET, freq_mhz)
    at_rest = Observation(state=FleetState.idle(2))
    decision, _ = controller.decide(at_rest, controller.init())
    assert np.all(decision.freq_mhz >= freq_mhz)
    assert np.all(decision.freq_mhz - freq_mhz < 15.0)
    np.testing.assert_array_equal(decision.freq_mhz, decision.freq_max_mhz)
    assert decision.active.all()


def test_after_five_idle_seconds_ecofreq_goes_to_the_bottom_of_its_ladder() -> None:
    workload = make_workload("fixed", rate_req_s=1e-3, duration_s=100.0, seed=0)
    workload = dataclasses.replace(
        workload, arrival_s=[2.0], prompt_tok=[8000], output_tok=[3], cached_tok=[0],
        request_class=[0], block_offset=[0, 0], patience_s=None,
    )  # fmt: skip
    plant = Plant(
        FLEET,
        workload,
        PlantSettings(actuation_s=0.0, settle_s=0.0),
        governors=[EcoFreqGovernor(one, SLO) for one in FLEET.instances],
    )
    plant.apply(Decision.highest(FLEET))
    plant.advance(4.999)
    assert plant.state().freq_mhz[0] > 1005.0  # 8,000 tokens needed more
    left_s = plant.requests["first_s"][0]
    plant.advance(left_s + 4.99)
    assert plant.state().freq_mhz[0] > 1005.0
    plant.advance(left_s + 5.01)
    np.testing.assert_array_equal(plant.state().freq_mhz, 1005.0)


class Hosted:
    """A compiled governor that the plant cannot recognise: a user's own, in Python.

    The port does not tell how much of the queue the next iteration takes, so this is for
    instances whose iteration takes all of it or none.
    """

    def __init__(self, governor: CompiledGovernor, prefills: bool) -> None:
        self.governor, self.prefills, self.asked = governor, prefills, 0

    def step(self, running_req, kv_used_tok, waiting_tok, oldest_wait_s, floor_mhz, ceiling_mhz):
        self.asked += 1
        batch_tok = waiting_tok if self.prefills else 0.0
        return self.governor.step(
            running_req, kv_used_tok, waiting_tok, oldest_wait_s, floor_mhz, ceiling_mhz,
            batch_tok=batch_tok,
        )  # fmt: skip


@pytest.mark.parametrize("actuation_s", [0.0, 0.005])
def test_python_governors_decide_as_compiled_ones(actuation_s) -> None:
    fleet = FleetSpec.parse("2P2D", REFERENCE)
    # Prompts so short that one iteration takes the whole queue; no gap of five seconds.
    workload = make_workload(
        "fixed", rate_req_s=60.0, duration_s=6.0, seed=1, prompt_tok=100, output_tok=150
    )
    runs = []
    for kind in ("compiled", "python", "mixed"):
        governors = [EcoFreqGovernor(one, SLO, ladder_mhz=None) for one in fleet.instances]
        if kind != "compiled":
            wrapped = [
                Hosted(governor, one.role.prefills)
                for governor, one in zip(governors, fleet.instances, strict=True)
            ]
            # A compiled one among Python ones is asked with all that the plant knows.
            governors = wrapped if kind == "python" else [*wrapped[:3], governors[3]]
        settings = PlantSettings(actuation_s=actuation_s, settle_s=4 * actuation_s)
        plant = Plant(fleet, workload, settings, governors=governors)
        plant.apply(Decision.highest(fleet))
        plant.advance(6.0)
        runs.append(plant)
    compiled, *others = runs
    assert governors[0].asked >= compiled.instances["iterations"][0]
    assert compiled.instances["clock_sets"].min() > 3
    for other in others:
        assert (other.instances["governed"] == 2).all()
        for name in ("first_s", "done_s"):
            np.testing.assert_array_equal(compiled.requests[name], other.requests[name])
        np.testing.assert_array_equal(compiled.state().energy_j, other.state().energy_j)
        np.testing.assert_array_equal(
            compiled.instances["clock_sets"], other.instances["clock_sets"]
        )
