"""Which samples of a page are several engines, and which are one engine shown several times."""

import itertools

import pytest

from tests.engines.test_scrape import VLLM
from voltana_ctrl.engines.page import BadPage, read_dcgm_page, read_engine_page


def sglang(ranks, running_req=10.0):
    """Page of SGLang with a scheduler for each of these ranks, as its label sets have them."""
    lines = []
    for rank in ranks:
        labels = ",".join(f'{name}="{value}"' for name, value in rank.items())
        named = f'{{engine_type="unified",model_name="tiny",{labels}}}'
        lines += [
            f"sglang:num_running_reqs{named} {running_req}",
            f"sglang:num_queue_reqs{named} 3.0",
            f"sglang:num_used_tokens{named} 4000.0",
            f"sglang:max_total_num_tokens{named} 10000.0",
            f"sglang:token_usage{named} 0.4",
        ]
    return "\n".join(lines)


DATA_PARALLEL = [{"dp_rank": k, "tp_rank": k, "pp_rank": 0} for k in range(4)]
# Two groups of two tensor ranks each, every scheduler exporting.
GROUPS = [{"dp_rank": k // 2, "tp_rank": k, "pp_rank": 0} for k in range(4)]
CONTEXT_PARALLEL = [{"tp_rank": k, "pp_rank": 0} for k in range(8)]
CONTEXT_NAMED = [{"attn_cp_rank": k, "tp_rank": k, "pp_rank": 0} for k in range(8)]
EXPERTS = [{"tp_rank": k, "pp_rank": 0, "moe_ep_rank": k} for k in range(4)]
PIPELINE = [{"tp_rank": 0, "pp_rank": k} for k in range(2)]
# One rank that is not the first, as an engine shows it whose logging rank is another.
ODD = [{"tp_rank": 3, "pp_rank": 0}]


@pytest.mark.parametrize(
    ("ranks", "engines"),
    [
        (DATA_PARALLEL, 4), (GROUPS, 2), (CONTEXT_PARALLEL, 1), (CONTEXT_NAMED, 1),
        (EXPERTS, 1), (PIPELINE, 1), (ODD, 1),
    ],
    ids=["dp attention", "dp groups", "context", "context named", "experts", "pipeline", "odd"],
)  # fmt: skip
def test_ranks_that_differ_in_dp_add_and_others_are_copies(ranks, engines):
    told = read_engine_page("sglang", sglang(ranks))
    assert told["running_req"] == 10.0 * engines
    assert told["queue_req"] == 3.0 * engines
    assert told["kv_used_tok"] == 4000.0 * engines
    assert told["kv_capacity_tok"] == 10_000.0 * engines
    assert told["kv_frac"] == pytest.approx(0.4)


def test_the_order_of_samples_on_a_page_does_not_matter():
    for ranks in itertools.permutations(GROUPS):
        assert read_engine_page("sglang", sglang(ranks))["running_req"] == 20.0


def test_the_capacity_that_an_engine_tells_comes_before_the_one_of_blocks():
    """Hybrid models: num_gpu_blocks x block_size is four times what fits."""
    hybrid = VLLM.replace("@", ".0").replace(
        'num_gpu_blocks="1000"', 'kv_cache_size_tokens="4000",num_gpu_blocks="1000"'
    )
    assert read_engine_page("vllm", hybrid)["kv_capacity_tok"] == 8000.0
    # Told, but not known yet.
    unknown = hybrid.replace('tokens="4000"', 'tokens="None"')
    assert read_engine_page("vllm", unknown)["kv_capacity_tok"] == 16_000.0


def test_a_page_of_slices_alone_says_so():
    row = 'DCGM_FI_DEV_SM_CLOCK{{gpu="0",UUID="GPU-c",GPU_I_ID="{}"}} 900'
    with pytest.raises(BadPage, match="only MIG slices of GPU-c"):
        read_dcgm_page("\n".join(row.format(k) for k in (1, 2)))
    whole = read_dcgm_page('DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-c",GPU_I_ID=""} 900')
    assert whole["GPU-c"].clock_mhz == 900.0
