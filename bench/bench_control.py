"""How long the control path takes, in CPU time. Limits are asserted."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, Request, Slo, load_profile
from voltana_ctrl.control import MpcController
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.plan import Planner
from voltana_ctrl.control.situation import STEPS_S, Situation
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.laws import length_moments
from voltana_ctrl.routing.priced import PricedRouter
from voltana_ctrl.types import Load

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])
#: Asked of the median decision, CPU time.
LIMIT_S = {"2P2D": 3e-3, "16P48D": 20e-3, "64P192D": 60e-3, "256P768D": 250e-3}

pytestmark = pytest.mark.benchmark(timer=time.process_time)


def situation(text):
    """A fleet in the middle of its range, part of it parked, batches about in balance."""
    fleet = FleetSpec.parse(text, PROFILE)
    rate = min(20.0 * len(fleet.decode), 30.0 * len(fleet.prefill))
    load = Load(arrival_req_s=rate, lengths=LENGTHS)
    target = TargetOptimiser(fleet, SLO).plan(load)
    assert target.feasible
    running = target.route_frac * rate * (LENGTHS.output_tok - 1.0) * 0.058
    running[fleet.prefill] = 0.0
    state = dataclasses.replace(
        FleetState.idle(len(fleet)),
        running_req=running,
        kv_used_tok=running * LENGTHS.context_tok,
        freq_mhz=np.where(target.active, 700.0, 210.0),
    )
    return fleet, state, load, target


@pytest.mark.parametrize("ticks", ["all", "with a target"])
@pytest.mark.parametrize("text", LIMIT_S)
def test_decide(benchmark, text, ticks):
    """A whole decision; every tenth plans a target. Or only those that do."""
    fleet, state, load, _ = situation(text)
    controller = MpcController(fleet, SLO)
    memory = controller.init()
    period_s = 0.1 if ticks == "all" else 1.0
    arrived = np.zeros(len(fleet))
    arrived[fleet.prefill] = load.arrival_req_s * period_s / len(fleet.prefill)
    observations = iter(
        Observation(state=dataclasses.replace(state, t_s=period_s * k, arrived_req=arrived))
        for k in range(1, 1000)
    )

    def decide(observation):
        nonlocal memory
        _, memory = controller.decide(observation, memory)

    for _ in range(30):
        decide(next(observations))
    benchmark.pedantic(
        decide,
        setup=lambda: ((next(observations),), {}),
        rounds=200 if ticks == "all" else 40,
    )
    assert memory.target is not None
    if ticks == "all":
        assert benchmark.stats["median"] <= LIMIT_S[text]


@pytest.mark.parametrize("text", LIMIT_S)
def test_target(benchmark, text):
    fleet, _, load, target = situation(text)
    optimiser = TargetOptimiser(fleet, SLO)
    benchmark(optimiser.plan, load, active=target.active)


@pytest.mark.parametrize("n", [2, 32, 512])
def test_plan(benchmark, n):
    """Prices and whole counts, of fleets with n instances of each phase that wake in 10 s."""
    supplies = TargetOptimiser(FleetSpec.parse("2P2D", PROFILE), SLO).supplies(LENGTHS)
    planner = Planner([0, 1], wake_s=[10.0, 10.0], wake_j=[0.0, 0.0], idle_w=[60.0, 60.0],
                      parked_w=[20.0, 20.0])  # fmt: skip
    steps = len(STEPS_S)
    rates = itertools.cycle((0.3, 0.5, 0.7, 0.4))

    def situation_at(frac):
        rate = frac * 90.0 * n / 2.0
        return Situation(
            supplies=supplies, installed=np.full(2, float(n)), awake=np.full(2, float(n)),
            draining=np.zeros(2), waking_s=[np.zeros(0)] * 2, backlog_req=0.0, decode_req_s=rate,
            arrival_req_s=np.linspace(rate, 0.8 * rate, steps),
            reserve_req_s=np.full((2, steps), 1.2 * rate), residence_s=12.0,
            budget_w=np.full(steps, np.inf),
        )  # fmt: skip

    planner.plan(situation_at(0.5))  # compiled once
    benchmark.pedantic(planner.plan, setup=lambda: ((situation_at(next(rates)),), {}), rounds=40)
    assert benchmark.stats["median"] <= 60e-3


@pytest.mark.parametrize(("n", "limit_s"), [(8, 5e-6), (512, 65e-6)])
@pytest.mark.parametrize("scored", [False, True], ids=["plain", "host score"])
def test_route(benchmark, n, limit_s, scored):
    fleet = FleetSpec.parse(f"1P{n}D", PROFILE)
    router = PricedRouter(fleet, SLO)
    router.update(Decision.highest(fleet))
    ask = Request(prompt_tok=100, host_score=np.zeros(n + 1) if scored else None)
    benchmark.pedantic(router.route, (ask, FleetState.idle(n + 1)), rounds=50, iterations=2000)
    assert benchmark.stats["median"] <= limit_s


def test_governor_step(benchmark):
    governor = IterationGovernor(FleetSpec.parse("1P1D", PROFILE).instances[1], SLO)
    step = (300, 1.3e5, 0.0, 0.0, 210.0, 1410.0)
    benchmark.pedantic(governor.step, step, rounds=50, iterations=2000)
