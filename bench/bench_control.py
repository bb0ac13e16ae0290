"""How long the control path takes; the same programme four ways."""

import dataclasses

import cvxpy as cp
import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, Request, Slo, load_profile
from voltana_ctrl.control.cascade import MpcController
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.mpc import Planner
from voltana_ctrl.control.target import Load, TargetOptimiser
from voltana_ctrl.physics import length_moments
from voltana_ctrl.routing.priced import PricedRouter

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
LENGTHS = length_moments([100, 300, 320], [101, 301, 200])
FLEETS = ("2P2D", "16P48D", "64P192D", "256P768D")


def situation(text):
    fleet = FleetSpec.parse(text, PROFILE)
    rate = 20.0 * len(fleet.decode)
    load = Load(arrival_req_s=rate, lengths=LENGTHS)
    target = TargetOptimiser(fleet, SLO).plan(load)
    running = target.route_frac * rate * (LENGTHS.output_tok - 1.0) * 0.058
    running[fleet.prefill] = 0.0
    state = dataclasses.replace(
        FleetState.idle(len(fleet)),
        running_req=running,
        kv_used_tok=running * LENGTHS.context_tok,
        freq_mhz=np.where(target.active, 700.0, 210.0),
    )
    return fleet, state, load, target


@pytest.mark.parametrize("text", FLEETS)
def test_decide(benchmark, text):
    fleet, state, _, _ = situation(text)
    controller = MpcController(fleet, SLO)
    memory = controller.init()
    tick = [0]

    def decide():
        nonlocal memory
        tick[0] += 1
        now = dataclasses.replace(state, t_s=0.1 * tick[0], arrived_req=np.full(len(fleet), 2.0))
        _, memory = controller.decide(Observation(state=now), memory)

    for _ in range(30):
        decide()
    benchmark(decide)


@pytest.mark.parametrize("text", FLEETS)
def test_target(benchmark, text):
    fleet, _, load, _ = situation(text)
    optimiser = TargetOptimiser(fleet, SLO)
    benchmark(optimiser.plan, load)


@pytest.mark.parametrize("how", ["piqp", "piqp-solve-only", "dpp-clarabel", "rebuilt"])
@pytest.mark.parametrize("text", ["2P2D", "16P16D"])
def test_plan(benchmark, text, how):
    fleet, *case = situation(text)
    planner = Planner(fleet, SLO, solver="clarabel" if how == "dpp-clarabel" else None)
    reference = planner.plan(*case).objective_j
    if how == "piqp-solve-only":
        benchmark(planner._compiled.solve, planner.values)
    elif how == "rebuilt":

        def rebuilt():
            fresh = Planner(fleet, SLO)
            fresh.set_parameters(*case)
            for parameter in fresh.problem.parameters():
                parameter.value = fresh.values[parameter.id]
            return fresh.problem.solve(solver=cp.CLARABEL)

        objective = benchmark.pedantic(rebuilt, rounds=3)
        assert objective == pytest.approx(reference, rel=1e-4)
    else:
        benchmark(planner.plan, *case)


@pytest.mark.parametrize("n", [8, 512])
def test_route(benchmark, n):
    fleet = FleetSpec.parse(f"1P{n}D", PROFILE)
    router = PricedRouter(fleet, SLO)
    router.update(Decision.highest(fleet))
    benchmark(router.route, Request(prompt_tok=100), FleetState.idle(n + 1))


def test_governor_step(benchmark):
    governor = IterationGovernor(FleetSpec.parse("1P1D", PROFILE).instances[1], SLO)
    benchmark(governor.step, 300, 1.3e5, 0.0, 0.0, 210.0, 1410.0)
