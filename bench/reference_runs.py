"""The runs that benchmarks time; no pytest here, whose memory is not to be counted."""

from pathlib import Path

from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.policies import find_policy
from voltana_ctrl.sim.plant import Plant, PlantSettings

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT.parent / "shared/data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def fleet() -> FleetSpec:
    return FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))


def voltanallm(workload) -> Plant:
    spec = fleet()
    parts = find_policy("voltanallm").build(spec, SLO, 0.1)
    plant = Plant(
        spec,
        workload,
        PlantSettings(view_age_s=parts.view_age_s),
        governors=parts.governors,
        prefill_router=parts.prefill_router,
        decode_router=parts.decode_router,
    )
    plant.apply(Decision.highest(spec))
    return plant
