"""Readers of published measurements, told by their columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError

# Layers of Qwen3-32B, the model of the A800 sweep: its times and energies are per layer.
A800_LAYERS = 64


def numbers(rows: list[dict[str, str]], column: str, label: str) -> F64:
    """Return a column as finite numbers; an empty cell counts as not a number."""
    values = np.empty(len(rows))
    for row, cells in enumerate(rows):
        try:
            values[row] = float(cells[column])
        except ValueError as error:
            raise ConfigError(
                f"{label}: column {column!r}: expected a number, got {cells[column]!r} in row"
                f" {row + 1}"
            ) from error
    if not np.all(np.isfinite(values)):
        row = int(np.argmin(np.isfinite(values)))
        raise ConfigError(
            f"{label}: column {column!r}: expected a finite number, got {values[row]:g} in row"
            f" {row + 1}; drop the row or measure it again"
        )
    return values


def from_published(
    rows: list[dict[str, str]], label: str, freq_mhz: float | None
) -> dict[str, Any] | None:
    """Return the columns of an IterationTable if the format is one of the known, else None."""
    has = set(rows[0])
    if {"attn_us_per_layer", "ffn_us_per_layer", "step_ms_measured"} <= has:
        return _a800(rows, label)
    if {"instruction", "frequency", "time", "energy"} <= has:
        return _perseus(rows, label)
    if {"avg_batch_size", "median_itl_ms", "avg_power_watts"} <= has:
        return _mlenergy(rows, label, freq_mhz)
    return None


def one_value(rows: list[dict[str, str]], column: str, label: str) -> str:
    """Return the value that all rows share; refuse a table that mixes several."""
    values = sorted({row[column] for row in rows})
    if len(values) > 1:
        shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
        raise ConfigError(
            f"{label}: column {column!r} mixes {shown}; select one with --where {column}=VALUE"
            f" (in Python where={{{column!r}: ...}})"
        )
    return values[0]


def _a800(rows: list[dict[str, str]], label: str) -> dict[str, Any]:
    """Clock x batch sweep of Qwen3-32B on A800.

    The step time is the one without instrumentation; the energy belongs to the instrumented
    run of the same load. KV is read up to the position measured at.
    """
    gpus = int(one_value(rows, "tp", label))
    phase = tuple(row["phase"] for row in rows)
    decode = np.array([each == "decode" for each in phase])
    batch = numbers(rows, "batch", label)
    prompt = numbers(rows, "input_len", label)
    energy_mj = numbers(rows, "attn_mJ_per_layer", label) + numbers(rows, "ffn_mJ_per_layer", label)
    return {
        "phase": phase,
        "freq_mhz": numbers(rows, "sm_mhz", label),
        "batch_req": batch,
        "kv_tok": np.where(decode, batch * (prompt + numbers(rows, "output_pos", label)), 0.0),
        "prefill_tok": np.where(decode, 0.0, batch * prompt),
        "square_tok2": np.where(decode, 0.0, batch * prompt**2),
        "wall_s": numbers(rows, "step_ms_measured", label) / 1e3,
        "energy_j": energy_mj * A800_LAYERS / 1e3,
        "gpus": gpus,
    }


def _perseus(rows: list[dict[str, str]], label: str) -> dict[str, Any]:
    """Stage times against clock: a forward pass is a saturated prefill of unknown length."""
    forward = [row for row in rows if row["instruction"] == "forward"]
    if not forward:
        raise ConfigError(f"{label}: no rows with instruction 'forward'")
    one = np.ones(len(forward))
    return {
        "phase": ("prefill",) * len(forward),
        "freq_mhz": numbers(forward, "frequency", label),
        "batch_req": one,
        "kv_tok": 0.0 * one,
        "prefill_tok": one,
        "square_tok2": one,
        "wall_s": numbers(forward, "time", label),
        "energy_j": numbers(forward, "energy", label),
    }


def _mlenergy(rows: list[dict[str, str]], label: str, freq_mhz: float | None) -> dict[str, Any]:
    """Steady serving runs at boost clock: median ITL and mean power against running requests.

    Contexts are not told, so the time to read KV is inside the slope in requests.
    """
    if freq_mhz is None:
        raise ConfigError(
            f"{label}: ML.ENERGY runs have no clock column; say the boost clock, for example"
            " freq_mhz=1980 for H100 SXM"
        )
    for column in ("gpu_model", "model_id", "task"):
        one_value(rows, column, label)
    gpus = int(one_value(rows, "num_gpus", label))
    batch = numbers(rows, "avg_batch_size", label)
    wall_s = numbers(rows, "median_itl_ms", label) / 1e3
    return {
        "phase": ("decode",) * len(rows),
        "freq_mhz": np.full(len(rows), freq_mhz),
        "batch_req": batch,
        "kv_tok": 0.0 * batch,
        "prefill_tok": 0.0 * batch,
        "square_tok2": 0.0 * batch,
        "wall_s": wall_s,
        "energy_j": numbers(rows, "avg_power_watts", label) * wall_s,
        "gpus": gpus,
    }
