"""Passes of a model summed from kernels that were measured one by one (Vidur, aiconfigurator).

Without host overhead, output head and sampling.
"""

from pathlib import Path

import numpy as np
import pandas as pd

__all__ = [
    "all_reduce_s",
    "decode_kernels",
    "linear_ops_s",
    "prefill_kernels",
    "vidur_all_reduce_s",
]


def linear_ops_s(data: Path, model: str, tensor_parallel: int, layers: int) -> pd.Series:
    """Vidur: time of all linear operations of all layers, by tokens."""
    ops = pd.read_parquet(data / "vidur_profiles" / f"linear_ops_{model}.parquet")
    ops = ops[ops.num_tensor_parallel_workers == tensor_parallel].set_index("num_tokens")
    median = ops[[name for name in ops if name.endswith(".median") and ".emb." not in name]]
    median = median.fillna(0.0)
    # the residual is added twice per layer
    total_ms = median.sum(axis=1) + median["time_stats.add.median"]
    return (layers * total_ms * 1e-3).groupby(level=0).median()


def attention(data: Path, gpu: str, phase: str, heads: int, kv_heads: int) -> pd.DataFrame:
    """Return aiconfigurator attention of one layer in bf16."""
    path = data / "nvidia_aiconfigurator" / f"{gpu}_sxm_vllm-0.14.0_{phase}_attention.parquet"
    rows = pd.read_parquet(path)
    keep = (
        (rows.num_heads == heads)
        & (rows.num_key_value_heads == kv_heads)
        & (rows.attn_dtype == "bfloat16")
        & (rows.kv_cache_dtype == "bfloat16")
    )
    return rows[keep]


def all_reduce_s(data: Path, gpu: str, message_bytes: float) -> float:
    """Return the all-reduce of four cards in a captured graph (aiconfigurator)."""
    path = data / "nvidia_aiconfigurator" / f"{gpu}_sxm_vllm-0.14.0_custom_allreduce.parquet"
    rows = pd.read_parquet(path)
    rows = rows[(rows.num_gpus == 4) & (rows.backend == "vllm_graph")].sort_values("message_size")
    return float(np.interp(message_bytes, rows.message_size, rows.latency_ms)) * 1e-3


def vidur_all_reduce_s(data: Path, gpu: str, message_bytes: float) -> float:
    """Return the all-reduce of four cards of one node (Vidur)."""
    rows = pd.read_parquet(data / "vidur_profiles" / f"network_{gpu}_dgx_all_reduce.parquet")
    rows = rows[(rows.num_workers == 4) & (rows.devices_per_node == 4)]
    by_size = rows.groupby("size")["time_stats.all_reduce.median"].median()
    return float(np.interp(message_bytes, by_size.index, by_size.to_numpy())) * 1e-3


def prefill_kernels(
    data: Path, linear_s: pd.Series, gpu: str, layers: int, heads: tuple[int, int]
) -> dict[int, float]:
    """Time of one whole prompt from kernels, by prompt length."""
    rows = attention(data, gpu, "context", *heads)
    rows = rows[(rows.batch_size == 1) & (rows.step == 0)].set_index("isl").latency_ms
    lengths = [tok for tok in (128, 256, 512, 1024, 2048, 4096, 8192) if tok in rows.index]
    known = linear_s.index.to_numpy()
    lengths = [tok for tok in lengths if tok <= known.max()]
    return {
        tok: float(np.interp(tok, known, linear_s)) + layers * float(rows[tok]) * 1e-3
        for tok in lengths
    }


def decode_kernels(
    data: Path, linear_s: pd.Series, gpu: str, layers: int, heads: tuple[int, int]
) -> list[tuple[int, int, float]]:
    """Time of decode steps from kernels: (batch, KV tokens, seconds)."""
    rows = attention(data, gpu, "generation", *heads)
    rows = rows[rows.batch_size.isin([1, 8, 16, 32, 64, 128, 256]) & rows.step.between(100, 4100)]
    known = linear_s.index.to_numpy()
    return [
        (
            int(row.batch_size),
            int(row.batch_size * (row.step + 1)),
            float(np.interp(row.batch_size, known, linear_s)) + layers * row.latency_ms * 1e-3,
        )
        for row in rows.sort_values(["batch_size", "step"]).itertuples()
        if row.batch_size * (row.step + 1) < 450_000
    ]
