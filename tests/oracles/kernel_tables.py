"""Iteration times put together from a table of kernel times (NVIDIA aiconfigurator).

A layer is four matrix products and one attention; an iteration is all layers and the output
layer. Norms, activations, sampling and the host are not in the tables, and not in the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, count
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.tables import IterationTable

__all__ = ["Transformer", "read_kernels"]

DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """Sizes of a dense model with grouped-query attention and a gated FFN.

    Parameters
    ----------
    layers, hidden, ffn, heads, kv_heads, head_dim, vocab : int
        As in the model's configuration file.

    Raises
    ------
    ConfigError
        If one is not a whole number >= 1.

    Examples
    --------
    >>> Transformer(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128,
    ...             vocab=128256).products()[0]
    (6144, 4096)
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def __post_init__(self) -> None:
        for field in fields(self):
            count(f"Transformer.{field.name}", getattr(self, field.name))

    def products(self) -> tuple[tuple[int, int], ...]:
        """Columns and depth of the matrix products of a layer: QKV, output, gate and up, down."""
        width = self.heads * self.head_dim
        return (
            (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            (self.hidden, width),
            (2 * self.ffn, self.hidden),
            (self.hidden, self.ffn),
        )


def read_kernels(
    folder: str | Path, system: str, model: Transformer, *, freq_mhz: float
) -> IterationTable:
    """Decode and prefill iterations of a model from the kernel tables of a system.

    Decode rows are one per batch size and KV length of the attention table, prefill rows one
    per batch size and prompt length; matrix products are interpolated between measured sizes.

    Parameters
    ----------
    folder : str or Path
        Holds ``<system>_gemm.parquet``, ``<system>_context_attention.parquet`` and
        ``<system>_generation_attention.parquet``.
    system : str
        For example ``a100_sxm_vllm-0.14.0``.
    model : Transformer
        Its head counts must be among those measured.
    freq_mhz : float
        The boost clock, at which all was measured.

    Returns
    -------
    IterationTable
        Without energies, of one clock: enough for the decode and the prefill time there.

    Raises
    ------
    ConfigError
        If a file cannot be read, or has no rows for the model.

    Examples
    --------
    >>> model = Transformer(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8,
    ...                     head_dim=128, vocab=128256)
    >>> read_kernels("nowhere", "a100", model, freq_mhz=1410)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: nowhere/a100_gemm.parquet: cannot be read: ...
    """
    folder = Path(folder)
    product_s, most = _products(folder / f"{system}_gemm.parquet")
    columns: list[list[float]] = []
    phases: list[str] = []
    for phase, kind in (("decode", "generation_attention"), ("prefill", "context_attention")):
        path = folder / f"{system}_{kind}.parquet"
        rows = _attention(path, model)
        batch, length = rows["batch_size"], rows["isl"]
        tok = batch if phase == "decode" else batch * length
        inside = tok <= most
        batch, length, tok = batch[inside], length[inside], tok[inside]
        each_s = sum(product_s(tok, *size) for size in model.products())
        attention_s = rows["latency_ms"][inside] / 1e3
        # The output layer runs once per sequence; wide ones in slices that were measured.
        slices = -(-model.vocab // 65536)
        output_s = slices * product_s(batch, model.vocab // slices, model.hidden)
        wall_s = model.layers * (each_s + attention_s) + output_s
        kv = batch * rows["step"][inside] if phase == "decode" else 0 * batch
        new = 0 * batch if phase == "decode" else tok
        columns += np.stack([batch, kv, new, new * length, wall_s], axis=1).tolist()
        phases += [phase] * len(batch)
    batch, kv, new, square, wall_s = np.array(columns).T
    return IterationTable(
        phase=tuple(phases),
        freq_mhz=np.full(len(phases), freq_mhz),
        batch_req=batch,
        kv_tok=kv,
        prefill_tok=new,
        square_tok2=square,
        wall_s=wall_s,
        energy_j=np.full(len(phases), np.nan),
        source=f"kernels of {system}",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow (pip install pyarrow)") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def _attention(path: Path, model: Transformer) -> dict[str, F64]:
    table = _read(path)
    # The tables write full multi-head attention as one KV head per head.
    match = (
        (table["num_heads"] == model.heads)
        & (table["num_key_value_heads"] == model.kv_heads)
        & (table["head_dim"] == model.head_dim)
        & (table["attn_dtype"] == DTYPE)
        & (table["kv_cache_dtype"] == DTYPE)
    )
    if not np.any(match):
        raise ConfigError(
            f"{path}: no {DTYPE} rows with {model.heads} heads, {model.kv_heads} KV heads and"
            f" head size {model.head_dim}; has heads {np.unique(table['num_heads'])} and KV heads"
            f" {np.unique(table['num_key_value_heads'])}"
        )
    names = ("batch_size", "isl", "step", "latency_ms")
    return {name: table[name][match].astype(np.float64) for name in names}


def _products(path: Path) -> tuple[Callable[..., F64], float]:
    """Time of a matrix product of any size, and the most rows that were measured."""
    from scipy.interpolate import RegularGridInterpolator

    table = _read(path)
    match = table["gemm_dtype"] == DTYPE
    sizes, places = zip(
        *(np.unique(table[name][match], return_inverse=True) for name in ("m", "n", "k")),
        strict=True,
    )
    grid = np.full([len(size) for size in sizes], np.nan)
    grid[places] = np.log(table["latency_ms"][match] / 1e3)
    # Times are nearly powers of the sizes: linear between the logarithms.
    log_s = RegularGridInterpolator([np.log(size) for size in sizes], grid)

    def product_s(rows: F64, columns: int, depth: int) -> F64:
        size = [np.log(np.broadcast_to(each, rows.shape)) for each in (rows, columns, depth)]
        time_s: F64 = np.exp(log_s(np.stack(size, axis=-1)))
        return time_s

    return product_s, float(sizes[0][-1])
