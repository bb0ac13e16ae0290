"""How long the control path takes, in CPU time; the same plan five ways.

`pytest bench/bench_control.py -s` prints objectives beside the times. Limits are asserted.
"""

import dataclasses
import time
import warnings

import cvxpy as cp
import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, Request, Slo, load_profile
from voltana_ctrl.control.cascade import MpcController
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.plan import Planner
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
    """A whole decision; every tenth plans a target, every fifth a plan. Or only those that do."""
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
    assert memory.plan is not None
    if ticks == "all":
        assert benchmark.stats["median"] <= LIMIT_S[text]


@pytest.mark.parametrize("text", LIMIT_S)
def test_target(benchmark, text):
    fleet, _, load, target = situation(text)
    optimiser = TargetOptimiser(fleet, SLO)
    benchmark(optimiser.plan, load, active=target.active)


@pytest.mark.parametrize("how", ["in place", "raw PIQP", "DPP with Clarabel", "rebuilt", "do-mpc"])
@pytest.mark.parametrize("text", ["2P2D", "16P16D", "16P48D"])
def test_plan(benchmark, text, how):
    """Ours; its solver alone; CVXPY's own path; CVXPY stated anew; do-mpc with IPOPT."""
    fleet, *case = situation(text)
    planner = Planner(fleet, SLO, solver="piqp")
    reference_j = planner.plan(*case).objective_j
    if how == "in place":
        objective_j = benchmark(planner.plan, *case).objective_j
    elif how == "raw PIQP":
        objective_j = benchmark(planner._compiled.solve, planner.values)[1]
    elif how == "DPP with Clarabel":
        other = Planner(fleet, SLO, solver="clarabel")
        other.plan(*case)  # canonicalised once
        objective_j = benchmark.pedantic(other.plan, case, rounds=10).objective_j
    elif how == "rebuilt":

        def rebuilt():
            fresh = Planner(fleet, SLO)
            fresh.set_parameters(*case)
            for parameter in fresh.problem.parameters():
                parameter.value = fresh.values[parameter.id]
            return fresh.problem.solve(solver=cp.CLARABEL, ignore_dpp=True)

        objective_j = benchmark.pedantic(rebuilt, rounds=3)
    else:
        objective_j = in_do_mpc(benchmark, planner)
    gap = abs(objective_j - reference_j) / abs(reference_j)
    print(f"\n{text} {how}: objective {objective_j:.6g} J, gap {gap:.1e}")
    assert gap <= 1e-4


def in_do_mpc(benchmark, planner):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its optional parts say that they are missing
        pytest.importorskip("do_mpc", reason="needs do-mpc: pip install do-mpc")
        import casadi
        from in_do_mpc import controller

        mpc, start = controller(planner)
        mpc.make_step(start)  # later steps start warm
        benchmark.pedantic(mpc.make_step, (start,), rounds=10)
    cost = casadi.Function(
        "cost", [casadi.vertcat(mpc.opt_x), casadi.vertcat(mpc.opt_p)], [mpc.nlp_obj]
    )
    return float(cost(mpc.opt_x_num, mpc.opt_p_num))


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
