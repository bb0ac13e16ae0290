"""How each engine names what we read: one table per engine.

A :class:`Metric` is the name of a sample on a Prometheus page; of several for one field the
first that the page has counts. Names are those of vLLM 0.9 to 0.33, SGLang 0.4 to 0.5.23,
TensorRT-LLM 1.0 to 1.3 (as it serves them, and with the prefix ``trtllm:`` of older Dynamo),
Dynamo 1.6 and DCGM exporter 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DCGM", "HISTOGRAMS", "PAGES", "TABLES", "Metric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Where a number stands on a page.

    Parameters
    ----------
    names : tuple of str
        Samples that are added up; those that are missing count as 0 if one is there.
    mean : bool
        The mean over data-parallel ranks instead of the sum: for fractions, and for totals that
        every rank repeats.
    scale_frac : float
        Factor to the unit of the field.
    times : str
        Name of another sample to multiply with.
    label_product : tuple of str
        Take the product of these labels instead of the value, as information metrics have it.

    Examples
    --------
    >>> Metric(names=("vllm:num_requests_running",)).scale_frac
    1.0
    """

    names: tuple[str, ...]
    mean: bool = False
    scale_frac: float = 1.0
    times: str = ""
    label_product: tuple[str, ...] = ()


def _sum(*names: str) -> Metric:
    return Metric(names=names)


def _mean(name: str) -> Metric:
    return Metric(names=(name,), mean=True)


_Table = Mapping[str, tuple[Metric, ...]]

_VLLM: _Table = {
    "running_req": (_sum("vllm:num_requests_running"),),
    "queue_req": (_sum("vllm:num_requests_waiting"),),
    "kv_frac": (_mean("vllm:kv_cache_usage_perc"), _mean("vllm:gpu_cache_usage_perc")),
    # Blocks times their size is several times too much for models with layers of several kinds;
    # and of several data-parallel engines each row has the blocks of all, but its own tokens.
    "kv_capacity_tok": (
        Metric(names=("vllm:cache_config_info",), label_product=("kv_cache_size_tokens",)),
        Metric(
            names=("vllm:cache_config_info",),
            label_product=("num_gpu_blocks", "block_size"),
            mean=True,
        ),
    ),
    "prompt_tok": (_sum("vllm:prompt_tokens_total"),),
    "output_tok": (_sum("vllm:generation_tokens_total"),),
    "finished_req": (_sum("vllm:request_success_total"),),
}

_SGLANG: _Table = {
    "running_req": (_sum("sglang:num_running_reqs"),),
    # A prompt waits to meet its decode engine, a prefilled request for its memory and its KV.
    "queue_req": (
        _sum(
            "sglang:num_queue_reqs",
            "sglang:num_prefill_bootstrap_queue_reqs",
            "sglang:num_decode_prealloc_queue_reqs",
            "sglang:num_decode_transfer_queue_reqs",
        ),
    ),
    "kv_used_tok": (_sum("sglang:num_used_tokens"), _sum("sglang:decode_sum_seq_lens")),
    "kv_frac": (_mean("sglang:token_usage"),),
    "kv_capacity_tok": (_sum("sglang:max_total_num_tokens"),),
    "prompt_tok": (_sum("sglang:prompt_tokens_total"),),
    "output_tok": (_sum("sglang:generation_tokens_total"),),
    "finished_req": (_sum("sglang:num_requests_total"),),
}


def _trtllm(prefix: str) -> _Table:
    return {
        "running_req": (
            _sum(f"{prefix}num_generation_requests"),
            _sum(f"{prefix}num_requests_running"),
        ),
        "queue_req": (_sum(f"{prefix}num_requests_waiting"),),
        "kv_used_tok": (
            Metric(
                names=(f"{prefix}kv_cache_used_blocks",),
                times=f"{prefix}kv_cache_tokens_per_block",
            ),
        ),
        "kv_frac": (_mean(f"{prefix}kv_cache_utilization"),),
        "kv_capacity_tok": (
            Metric(
                names=(f"{prefix}kv_cache_max_blocks",),
                times=f"{prefix}kv_cache_tokens_per_block",
            ),
        ),
        "prompt_tok": (_sum(f"{prefix}prompt_tokens_total"),),
        "output_tok": (_sum(f"{prefix}generation_tokens_total"),),
        "finished_req": (_sum(f"{prefix}request_success_total"),),
    }


_DYNAMO_OWN: _Table = {
    "running_req": (_sum("dynamo_component_inflight_requests"),),
    "queue_req": (_sum("dynamo_work_handler_queue_depth"),),
    "queue_tok": (_sum("dynamo_frontend_worker_active_prefill_tokens"),),
    "kv_used_tok": (
        Metric(
            names=("dynamo_frontend_worker_active_decode_blocks",),
            times="dynamo_frontend_model_kv_cache_block_size",
        ),
    ),
    "kv_capacity_tok": (
        Metric(
            names=("dynamo_frontend_model_total_kv_blocks",),
            times="dynamo_frontend_model_kv_cache_block_size",
        ),
    ),
    "finished_req": (_sum("dynamo_component_requests_total"),),
}


def _first_of(*tables: _Table) -> _Table:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: tuple(m for table in tables for m in table.get(name, ())) for name in names}


_TRTLLM = _first_of(_trtllm("trtllm_"), _trtllm("trtllm:"))

#: Engine -> field -> where it stands. A Dynamo worker shows its engine's own metrics, too.
TABLES: Mapping[str, _Table] = MappingProxyType(
    {
        "vllm": _VLLM,
        "sglang": _SGLANG,
        "trtllm": _TRTLLM,
        "dynamo": _first_of(_VLLM, _SGLANG, _TRTLLM, _DYNAMO_OWN),
    }
)

#: Engine -> latency -> histograms that tell it, the first that the page has. `itl` is of requests,
#: `token_itl` of single tokens.
HISTOGRAMS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "vllm": {
            "ttft": ("vllm:time_to_first_token_seconds",),
            "itl": ("vllm:request_time_per_output_token_seconds",),
            "token_itl": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        },
        "sglang": {
            "ttft": ("sglang:time_to_first_token_seconds",),
            "itl": ("sglang:request_time_per_output_token_seconds",),
            "token_itl": (
                "sglang:inter_token_latency_seconds",
                "sglang:time_per_output_token_seconds",
            ),
        },
        # One count per request.
        "trtllm": {
            "ttft": ("trtllm_time_to_first_token_seconds", "trtllm:time_to_first_token_seconds"),
            "itl": ("trtllm_time_per_output_token_seconds", "trtllm:time_per_output_token_seconds"),
        },
    }
)

#: Pages of an engine besides the one that ``metrics_url`` names by default.
PAGES: Mapping[str, str] = MappingProxyType(
    {"trtllm": "/prometheus/metrics"}  # its /metrics are JSON, of iterations
)

#: DCGM exporter, per GPU (label ``UUID``): fields of a
#: :class:`~voltana_ctrl.backends.meter.GpuReading`.
DCGM: Mapping[str, Metric] = MappingProxyType(
    {
        "clock_mhz": _sum("DCGM_FI_DEV_SM_CLOCK"),
        "power_w": _sum("DCGM_FI_DEV_POWER_USAGE"),
        "counter_j": Metric(names=("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",), scale_frac=1e-3),  # mJ
    }
)
