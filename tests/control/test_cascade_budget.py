"""A budget that is cut by 30 % at one stroke, unannounced, against the worst-case ceiling."""

from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import (
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    RequestBatch,
    Slo,
    load_profile,
)
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import PowerBudget

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11"))
SLO = Slo(ttft_s=0.6, itl_s=0.06)
CUT_S, LIFT_S, END_S = 40.0, 80.0, 170.0
ACTUATION_S = 0.025


def drive(name, rate_req_s, limit_w, seed=0):
    """Power of every 100 ms, and arrivals with what became of them."""
    free_w = 5000.0
    steps = ((0.0, free_w), (CUT_S, limit_w), (LIFT_S, free_w))
    # `mpc` must not look ahead; the opponent may.
    budget = PowerBudget(steps=steps, notice_s=0.0 if name == "mpc" else np.inf)
    parts = find_policy(name).build(FLEET, SLO, PolicySetup(power_budget=budget))
    controller = parts.controller
    plant = Plant(
        FLEET,
        make_workload("sharegpt", rate_req_s, END_S + 30.0, seed),
        PlantSettings(),
        governors=parts.governors,
        prefill_router=parts.prefill_router,
        decode_router=parts.decode_router,
    )
    plant.apply(parts.first or Decision.highest(FLEET))
    memory, energy_j = controller.init(), []
    for k in range(round(END_S * 10.0) + 1):
        plant.advance(0.1 * k)
        observation = plant.read()
        energy_j.append(observation.state.energy_j.sum())
        decision, memory = controller.decide(observation, memory)
        plant.apply(decision)
    # Until the longest answer of the last that are judged is done.
    plant.advance(END_S + 90.0)
    return np.diff(energy_j) / 0.1, plant.requests


def attainment(rows, from_s, until_s):
    rows = rows[(rows["arrival_s"] >= from_s) & (rows["arrival_s"] < until_s)]
    ttft_s = np.where(rows["first_s"] >= 0.0, rows["first_s"] - rows["arrival_s"], np.inf)
    gaps = np.maximum(rows["output_tok"] - 1, 1)
    itl_s = np.where(rows["state"] == 7, (rows["done_s"] - rows["first_s"]) / gaps, np.inf)
    in_time = (ttft_s <= SLO.ttft_s, itl_s <= SLO.itl_s)
    return np.mean(in_time[0]), np.mean(in_time[1])


# 30 % below what `voltanallm` draws at that load; 577 and 866 W are needed to serve it in time.
@pytest.mark.slow
# At 35 req/s 1.1 % of the requests have their first token in time during the cut, and 2.5 % with
# the static budget: more than the point that is allowed, since ceilings wait for who prefills.
@pytest.mark.parametrize(
    ("rate_req_s", "limit_w"),
    [
        pytest.param(35.0, 0.7 * 751.0, marks=pytest.mark.xfail(strict=True)),
        (65.0, 0.7 * 923.0),
    ],
)
def test_a_cut_is_obeyed_served_best_and_forgotten(rate_req_s, limit_w):
    power_w, rows = drive("mpc", rate_req_s, limit_w)
    under = power_w[round((CUT_S + 1.0 + ACTUATION_S + 0.05) * 10.0) : round(LIFT_S * 10.0)]
    assert np.mean(under <= limit_w) >= 0.999
    assert under.mean() > 0.95 * limit_w  # what there is, is used
    static_w, static_rows = drive("static-budget", rate_req_s, limit_w)
    assert (static_w[round(CUT_S * 10.0) + 1 : round(LIFT_S * 10.0)] <= limit_w).all()

    def served(rows):
        done_s = rows["done_s"][rows["state"] == 7]
        return np.count_nonzero((done_s >= CUT_S) & (done_s < LIFT_S))

    assert served(rows) > 1.2 * served(static_rows)
    ours, theirs = (attainment(part, CUT_S, LIFT_S) for part in (rows, static_rows))
    assert ours[1] > theirs[1]
    # The queue grows under either, so of TTFT next to nothing is left to compare.
    assert ours[0] > theirs[0] - 0.01
    # Restored: once the backlog is gone, the promises are kept again.
    assert min(attainment(rows, END_S - 30.0, END_S)) >= 0.985
    assert power_w[-300:].max() > limit_w


def test_what_a_budget_makes_late_does_not_wind_up_a_margin():
    """Prefill is held below its needs: it runs at its ceiling, and lateness is not learnt from."""
    parts = find_policy("cascade").build(
        FLEET, SLO, PolicySetup(power_budget=PowerBudget.parse("0:5000,20:560"))
    )
    controller = parts.controller
    memory, idle = controller.init(), FleetState.idle(4)
    late = RequestBatch(
        request=np.arange(40), request_class=np.zeros(40), prompt_tok=np.full(40, 240.0),
        output_tok=np.full(40, 200.0), ttft_s=np.full(40, 0.9), itl_s=np.full(40, 0.05),
        prefill_instance=np.zeros(40), decode_instance=np.full(40, 2),
    )  # fmt: skip
    for tick in range(600):
        state = replace(
            idle, t_s=0.1 * tick, arrived_req=[2.5, 2.5, 0.0, 0.0],
            arrived_tok=[600.0, 600.0, 0.0, 0.0], queue_req=[8.0, 8.0, 0.0, 0.0],
            queue_tok=[2000.0, 2000.0, 0.0, 0.0], oldest_wait_s=[0.4, 0.4, 0.0, 0.0],
            running_req=[0.0, 0.0, 300.0, 300.0], kv_used_tok=[0.0, 0.0, 1.3e5, 1.3e5],
        )  # fmt: skip
        finished = late if tick >= 300 and tick % 10 == 0 else RequestBatch.empty()
        decision, memory = controller.decide(Observation(state=state, finished=finished), memory)
    assert memory.held_frac[0] > 0.9
    assert memory.belief.ttft_margin_frac.max() < 0.1
    ceiling, floor = decision.freq_max_mhz[:2], decision.freq_mhz[:2]
    assert np.all(ceiling < FLEET.max_mhz[:2])
    assert np.array_equal(floor, ceiling)


def ceilings_with(queue_tok, oldest_wait_s, budget):
    """Ceilings of four seconds under a budget, with so much waiting at each prefill instance."""
    parts = find_policy("cascade").build(
        FLEET, SLO, PolicySetup(power_budget=PowerBudget.parse(budget))
    )
    controller = parts.controller
    memory, idle = controller.init(), FleetState.idle(4)
    for tick in range(40):
        state = replace(
            idle, t_s=0.1 * tick, arrived_req=[2.5, 2.5, 0.0, 0.0],
            arrived_tok=[600.0, 600.0, 0.0, 0.0], queue_req=[8.0, 8.0, 0.0, 0.0],
            queue_tok=[queue_tok, queue_tok, 0.0, 0.0],
            oldest_wait_s=[oldest_wait_s, oldest_wait_s, 0.0, 0.0],
            running_req=[0.0, 0.0, 300.0, 300.0], kv_used_tok=[0.0, 0.0, 1.3e5, 1.3e5],
        )  # fmt: skip
        decision, memory = controller.decide(Observation(state=state), memory)
    return decision.freq_max_mhz, memory


def test_in_a_burst_decode_lends_prefill_some_of_a_tight_budget():
    """By an eighth, not without need, and not where the load is simply too high."""
    calm_mhz, _ = ceilings_with(500.0, 0.1, "0:850")
    burst_mhz, memory = ceilings_with(4000.0, 0.3, "0:850")
    assert np.all(burst_mhz[:2] > calm_mhz[:2])
    assert np.all(burst_mhz[2:] < calm_mhz[2:])
    assert np.all(burst_mhz[2:] > 0.85 * calm_mhz[2:])
    # It is its own choice, and what it makes late counts for its margin.
    assert memory.held_frac[1] < 0.05
    flooded_mhz, _ = ceilings_with(4000.0, 1.5, "0:850")
    assert np.all(flooded_mhz[2:] == calm_mhz[2:])
    free_mhz, memory = ceilings_with(4000.0, 0.3, "0:5000")
    assert np.all(free_mhz == FLEET.max_mhz)
