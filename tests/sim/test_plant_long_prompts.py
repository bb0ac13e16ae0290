"""Long prompts, reused prefixes and transfers: closed forms, and half an hour of Mooncake."""

import dataclasses

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.plant import Plant
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import Workload

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
LARGE = load_profile("a100-sxm-80gb/llama-3-70b-tp4")
PARTS = ("prefill", "decode", "idle", "transfer")


def run(workload: Workload, profile, fleet: str = "1P1D", until_s: float = 10_000.0) -> Plant:
    plant = Plant(FleetSpec.parse(fleet, profile), workload)
    plant.apply(Decision.highest(plant.fleet))
    plant.advance(until_s)
    plant.state()
    return plant


def ttft_s(plant: Plant) -> np.ndarray:
    return plant.requests["first_s"] - plant.requests["arrival_s"]


def one_request(prompt_tok: int, cached_tok: int = 0) -> Workload:
    return Workload(
        name="one",
        arrival_s=[0.0],
        prompt_tok=[prompt_tok],
        output_tok=[2],
        cached_tok=[cached_tok],
        duration_s=1.0,
    )


@pytest.mark.parametrize("cached_tok", [0, 30_000])
def test_a_long_prompt_in_chunks_costs_its_whole_attention_once(cached_tok: int) -> None:
    """100,000 tokens by 8,192: the squares of the chunks' ends telescope."""
    table = REFERENCE.table.copy()
    table["prefill_tok2_s"] = 2e-9
    profile = dataclasses.replace(REFERENCE, table=table)
    assert profile.prefill_budget_tok == 8192
    plant = run(one_request(100_000, cached_tok), profile)
    new_tok = 100_000 - cached_tok
    chunks = -(-new_tok // 8192)
    top = table[-1]
    expected_s = (
        chunks * top["prefill_base_s"]
        + top["prefill_tok_s"] * new_tok
        + 2e-9 * (100_000.0**2 - float(cached_tok) ** 2)
    )
    assert plant.instances["iterations"][0] == chunks
    assert plant.instances["prefilled_tok"][0] == new_tok
    np.testing.assert_allclose(ttft_s(plant), expected_s, rtol=1e-9)
    np.testing.assert_allclose(
        plant.instances["prefill_j"][0], expected_s * top["prefill_power_w"], rtol=1e-9
    )


def test_transfers_cost_their_energy_per_prompt_token() -> None:
    profile = dataclasses.replace(REFERENCE, transfer_j_per_tok=0.003)
    dear, free = run(one_request(5000), profile), run(one_request(5000), REFERENCE)
    np.testing.assert_allclose(dear.instances["transfer_j"], [15.0, 0.0], rtol=1e-12)
    assert free.instances["transfer_j"].sum() == 0.0
    for part in ("prefill", "decode", "idle"):
        np.testing.assert_array_equal(dear.instances[f"{part}_j"], free.instances[f"{part}_j"])


@pytest.mark.slow
def test_half_an_hour_of_mooncake_on_a_70b_model(shared_data) -> None:
    """12P8D carries it; without its cached tokens the same requests wait longer and cost more."""
    trace = read_trace(shared_data / "mooncake_fast25" / "conversation_first30min.jsonl.gz")
    assert trace.cached_tok.sum() > 0
    plant = run(trace, LARGE, "12P8D")
    cold = run(dataclasses.replace(trace, cached_tok=np.zeros(len(trace), int)), LARGE, "12P8D")
    for one in (plant, cold):
        inst, req = one.instances, one.requests
        states, counts = np.unique(req["state"], return_counts=True)
        assert set(states) <= {layout.DONE, layout.DROPPED}
        assert counts.sum() == len(trace)
        done = req["state"] == layout.DONE
        fits = trace.prompt_tok + trace.output_tok <= LARGE.kv_capacity_tok
        np.testing.assert_array_equal(done, fits)
        assert inst["emitted_tok"].sum() == trace.output_tok[done].sum()
        for name in ("kv_tok", "running_req", "prefill_req", "wait_req", "prefill_tok", "wait_tok"):
            assert not inst[name].any(), name
        energy_j = sum(inst[f"{part}_j"] for part in PARTS)
        np.testing.assert_allclose(one.read().state.energy_j, energy_j, rtol=1e-12)
    done = plant.requests["state"] == layout.DONE
    assert np.median(ttft_s(plant)[done]) < 10.0
    assert np.median(ttft_s(cold)[done]) > np.median(ttft_s(plant)[done])
    assert cold.instances["prefill_j"].sum() > plant.instances["prefill_j"].sum()
