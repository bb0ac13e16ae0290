"""What is believed about instances: refused where it cannot be, obeyed where it is told."""

from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, FleetState, Request, Slo, load_profile
from voltana_ctrl.control import IterationGovernor
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.kernels.choose.governor import ARRIVED_TOK, SPAN_S, WATCHED_S
from voltana_ctrl.ports import believe_of
from voltana_ctrl.routing import PricedRouter
from voltana_ctrl.sim.plant import Plant
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Belief

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
SLO = Slo(ttft_s=0.6, itl_s=0.06)
BELIEF = Belief.of_profiles(FLEET, margin_frac=(0.02, 0.035), delay_s=0.025)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ttft_margin_frac", -1.0),
        ("itl_margin_frac", np.nan),
        ("delay_s", -0.1),
        ("delay_s", np.inf),
        ("prefill_pace_frac", 0.0),
        ("decode_pace_frac", -2.0),
        ("able_mhz", 0.0),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"Belief.{name}: expected finite numbers"):
        replace(BELIEF, **{name: [1.0, 1.0, 1.0, value]})


def test_a_belief_is_about_all_instances_of_its_decision() -> None:
    with pytest.raises(ShapeError, match=r"Belief\.able_mhz"):
        replace(BELIEF, able_mhz=[1410.0])
    other = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    small = Belief.of_profiles(other, margin_frac=(0.0, 0.0), delay_s=0.0)
    with pytest.raises(ShapeError, match="about 4 instances, got one about 2"):
        replace(Decision.highest(FLEET), belief=small)


def test_a_governor_asks_for_the_clock_that_its_margins_and_pace_need() -> None:
    governor = IterationGovernor(FLEET.instances[2], SLO)

    def clock_mhz(**changes: float) -> float:
        told = {name: [1.0, 1.0, value, 1.0] for name, value in changes.items()}
        governor.believe(replace(BELIEF, **told), 2)
        return governor.step(80, 3.5e4, 0, 0.0, 210.0, 1410.0, t_s=0.0)

    usual = clock_mhz()
    # A margin of 20 % and a pace 20 % slower leave the same room for an iteration.
    assert clock_mhz(itl_margin_frac=1.035 * 1.2 - 1.0) == clock_mhz(decode_pace_frac=1.2) > usual
    assert clock_mhz(ttft_margin_frac=0.5) == usual  # nothing is prefilled here
    assert clock_mhz() == usual


def test_a_prefill_governor_reckons_with_pace_and_delay() -> None:
    governor = IterationGovernor(FLEET.instances[0], SLO)

    def clock_mhz(rate_tok_s: float = 0.0, **changes: float) -> float:
        told = {name: [value, 1.0, 1.0, 1.0] for name, value in changes.items()}
        governor.believe(replace(BELIEF, **told), 0)
        governor.memory[:] = 0.0
        governor.memory[0] = 1.0  # the lowest clock runs
        governor.memory[WATCHED_S] = 100.0  # nothing came for long
        governor.memory[SPAN_S], governor.memory[ARRIVED_TOK] = 10.0, 10.0 * rate_tok_s
        return governor.step(0, 0, 2000, 0.1, 210.0, 1410.0, t_s=0.0)

    usual = clock_mhz()
    assert usual < clock_mhz(prefill_pace_frac=1.3) <= 1410.0
    # The delay counts for what arrives meanwhile, not for what this clock is asked for.
    assert usual == clock_mhz(delay_s=0.2)
    assert clock_mhz(4000.0) < clock_mhz(4000.0, delay_s=0.2)
    assert usual < clock_mhz(ttft_margin_frac=0.3)


def test_the_plant_hands_it_to_governors_and_what_they_ask_for_is_logged() -> None:
    governors = [IterationGovernor(one, SLO) for one in FLEET.instances]
    workload = make_workload("sharegpt", rate_req_s=30.0, duration_s=20.0, seed=0)

    def clocks(pace: float) -> tuple[float, bool]:
        from voltana_ctrl.sim.plant import PlantSettings

        plant = Plant(FLEET, workload, PlantSettings(log_iterations=4096), governors=governors)
        belief = replace(BELIEF, decode_pace_frac=[1.0, 1.0, pace, pace])
        plant.apply(replace(Decision.highest(FLEET, floor_mhz=FLEET.min_mhz), belief=belief))
        plant.advance(15.0)
        ran = plant.read().iterations
        decodes = ran.instance >= 2
        # Nothing clamps: what was asked for runs within the delay of 25 ms.
        return float(ran.freq_mhz[decodes].mean()), bool((ran.asked_mhz[decodes] > 0.0).all())

    slow_mhz, told = clocks(1.3)
    usual_mhz, _ = clocks(1.0)
    assert told
    assert slow_mhz > 1.1 * usual_mhz


@pytest.mark.parametrize(("phase", "first", "second"), [("prefill", 0, 1), ("decode", 2, 3)])
def test_a_router_expects_of_an_instance_what_it_can_do(
    phase: str, first: int, second: int
) -> None:
    state = replace(
        FleetState.idle(4, freq_mhz=1410.0),
        queue_tok=[900.0, 1000.0, 0.0, 0.0],
        running_req=[0.0, 0.0, 200.0, 210.0],
        kv_used_tok=[0.0, 0.0, 8e4, 8e4],
    )
    for changes in ({}, {"able_mhz": 210.0}, {f"{phase}_pace_frac": 3.0}):
        router = PricedRouter(FLEET, SLO, phase)  # type: ignore[arg-type]
        told = {}
        for name, value in changes.items():
            told[name] = getattr(BELIEF, name).copy()
            told[name][first] = value
        router.update(replace(Decision.highest(FLEET), belief=replace(BELIEF, **told)))
        picked = router.route(Request(prompt_tok=100), state)
        assert picked == (second if changes else first)


def test_a_governor_without_it_is_left_alone_and_nonsense_is_refused() -> None:
    assert believe_of(object()) is None

    class Wrong:
        believe = 3

    with pytest.raises(
        ConfigError, match=r"Wrong\.believe: expected a method believe\(belief, i\)"
    ):
        believe_of(Wrong())
