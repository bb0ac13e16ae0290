"""Open loop, capped batch and closed loop, each on a load made for it."""

import dataclasses

import pytest

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.control import CascadeController
from voltana_ctrl.estimate import Regime
from voltana_ctrl.experiment import Run
from voltana_ctrl.laws import decode_j, decode_s
from voltana_ctrl.policies import PolicyParts, find_policy

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
FLEET = FleetSpec.parse("2P2D", PROFILE)
SMALL = FleetSpec(tuple(dataclasses.replace(one, max_batch=16) for one in FLEET.instances))
SLO = Slo(ttft_s=0.6, itl_s=0.06)


class Watched(CascadeController):
    """Keeps the verdict of every tick."""

    def _decide(self, observation, memory):
        decision, memory = super()._decide(observation, memory)
        self.verdicts.append(self.regime(memory))
        return decision, memory


def simulate(fleet, **load):
    verdicts = []

    def build(fleet, slo, setup):
        parts = find_policy("cascade").build(fleet, slo, setup)
        controller = Watched(fleet, slo)
        controller.verdicts = verdicts
        fields = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
        return PolicyParts(**fields | {"controller": controller})

    policy = dataclasses.replace(find_policy("cascade"), build=build)
    figures = Run(
        policy=policy, fleet=fleet, slo=SLO, workload="sharegpt", duration_s=40.0, warmup_s=30.0,
        **load,
    ).simulate()  # fmt: skip
    return figures, verdicts[300:700]


def least_j_tok(running_req):
    """The minimum of the U-shaped curve: least decode energy per token at a fixed batch."""
    padded, kv_tok = PROFILE.padded_batch()[int(running_req)], 434.0 * running_req
    return min(
        float(decode_j(row, running_req, kv_tok, padded)) / running_req
        for row in PROFILE.table
        if decode_s(row, running_req, kv_tok, padded) <= SLO.itl_s
    )


def test_open_loop_is_named_and_draws_less_than_the_fixed_batch_optimum_would():
    figures, verdicts = simulate(FLEET, rate_req_s=20.0)
    assert set(verdicts) == {Regime.OPEN}
    # The clock does not set the token rate here, so it may lie far below that optimum's 1095 MHz.
    assert figures["mean_freq_decode_mhz"] < 800.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fleet", "load", "regime"),
    [
        (SMALL, {"rate_req_s": 20.0}, Regime.CAPPED),
        (FLEET, {"concurrency": 60}, Regime.CLOSED),
        (FLEET, {"concurrency": 240}, Regime.CLOSED),
    ],
    ids=["capped", "closed-60", "closed-240"],
)
def test_where_the_clock_sets_the_token_rate_energy_per_token_is_least(fleet, load, regime):
    figures, verdicts = simulate(fleet, **load)
    assert verdicts.count(regime) > 0.95 * len(verdicts)
    decode_j_tok = figures["energy_decode_j"] / figures["tokens_out"]
    # 1 %: batch and contexts are not the same in every iteration.
    assert decode_j_tok <= 1.01 * least_j_tok(figures["mean_batch"])
