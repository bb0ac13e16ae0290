"""What may be late and is not: spent at the clocks of prefill at which it saves most."""

from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import (
    FleetSpec,
    FleetState,
    Observation,
    PowerBudget,
    RequestBatch,
    Slo,
    load_profile,
)
from voltana_ctrl.policies import PolicySetup, find_policy

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def _ceilings(*, late=(), waited_s=0.0, budget=None, fleet="2P2D", flood=False, turns=False):
    """Highest clocks of prefill after 2,400 requests of which these batches of 40 were late."""
    fleet = FleetSpec.parse(fleet, PROFILE)
    if turns:
        fleet = fleet.flexible()
    setup = PolicySetup(power_budget=budget and PowerBudget.parse(budget))
    controller = find_policy("cascade").build(fleet, SLO, setup).controller
    memory, idle, last = controller.init(), FleetState.idle(len(fleet)), len(fleet) - 1
    first = np.arange(len(fleet)) == 0
    for tick in range(90 if flood else 60):
        times = 40.0 if tick >= 60 else 1.0
        ttft_s = 0.9 if tick in late else 0.2
        finished = RequestBatch(
            request=np.arange(40), request_class=np.zeros(40), prompt_tok=np.full(40, 240.0),
            output_tok=np.full(40, 200.0), ttft_s=np.full(40, ttft_s), itl_s=np.full(40, 0.05),
            prefill_instance=np.zeros(40), decode_instance=np.full(40, last),
        )  # fmt: skip
        waits_s = waited_s if tick >= 59 else 0.0
        state = replace(
            idle, t_s=0.1 * tick, arrived_req=np.where(first, 4.0 * times, 0.0),
            arrived_tok=np.where(first, 960.0 * times, 0.0), queue_req=np.where(first, 1.0, 0.0),
            queue_tok=np.where(first, 240.0, 0.0), oldest_wait_s=np.where(first, waits_s, 0.0),
        )  # fmt: skip
        decision, memory = controller.decide(Observation(state=state, finished=finished), memory)
    return decision.freq_max_mhz[: max(1, len(fleet) // 2)], decision.freq_max_mhz[-1]


def test_what_may_be_late_is_spent_at_the_dearest_clocks_of_prefill():
    spent_mhz, decode_mhz = _ceilings()
    assert np.all(spent_mhz == pytest.approx(1410.0 - 0.6 * 300.0, abs=30.0))
    assert decode_mhz == 1410.0
    # Two in a hundred are late, or somebody is late now, or a budget may make some late.
    assert np.all(_ceilings(late=(58,))[0] == 1410.0)
    assert np.all(_ceilings(waited_s=0.7)[0] == 1410.0)
    # Or they are late while more comes than can be served in time, which teaches no margin.
    assert np.all(_ceilings(flood=True)[0] < 1410.0)
    assert np.all(_ceilings(flood=True, late=range(80, 90))[0] == 1410.0)
    assert np.all(_ceilings(budget="0:5000")[0] == 1410.0)
    assert np.all(_ceilings(fleet="4C")[0] == 1410.0)
    assert np.all(_ceilings(turns=True)[0] == 1410.0)
