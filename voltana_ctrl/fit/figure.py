"""Diagnostics of a fit, drawn on a Matplotlib figure that the caller brings."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.fit.result import FitResult

__all__ = ["draw_diagnostics"]


def draw_diagnostics(result: FitResult, figure: Any) -> None:
    """Draw what tells a good fit from a bad one.

    Relative residuals of the times against the load, measured and predicted power against the
    clock, and the held-out errors.

    Parameters
    ----------
    result : FitResult
        The fit.
    figure : matplotlib.figure.Figure
        Empty; eight by six inches or more.

    Examples
    --------
    >>> from matplotlib.figure import Figure  # doctest: +SKIP
    >>> from voltana_ctrl.fit import fit_table
    >>> figure = Figure(figsize=(10, 8))  # doctest: +SKIP
    >>> draw_diagnostics(fit_table("table.csv"), figure)  # doctest: +SKIP
    >>> figure.savefig("diagnostics.png")  # doctest: +SKIP
    """
    figure.set_layout_engine("constrained")
    (decode, prefill), (power, held) = figure.subplots(2, 2)
    _residuals(result, decode, "decode", "batch_req", "requests in the batch")
    _residuals(result, prefill, "prefill", "prefill_tok", "prompt tokens in the iteration")
    _power(result, power)
    _held_out(result, held)
    figure.suptitle(f"{result.table.source}: {len(result.table)} rows")


def _residuals(result: FitResult, axes: Any, phase: str, load: str, label: str) -> None:
    rows = result.table.of(phase)
    axes.set(title=f"{phase} time", xlabel=label, ylabel="predicted / measured - 1")
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    if len(rows) == 0:
        return
    error = result.laws.time_s(rows) / rows.wall_s - 1.0
    points = axes.scatter(getattr(rows, load), error, c=rows.freq_mhz, s=12, cmap="viridis")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.figure.colorbar(points, ax=axes, label="SM clock [MHz]")


def _power(result: FitResult, axes: Any) -> None:
    axes.set(title="power", xlabel="SM clock [MHz]", ylabel="energy / time [W]")
    predicted_j = result.laws.energy_j(result.table)
    for phase, colour in (("decode", "tab:blue"), ("prefill", "tab:orange")):
        at = np.array([each == phase for each in result.table.phase], dtype=bool)
        if not np.any(at):
            continue
        rows = result.table.rows(at)
        time_s = result.laws.time_s(rows)
        axes.plot(
            rows.freq_mhz, rows.energy_j / rows.wall_s, ".", color=colour, label=f"{phase} measured"
        )
        axes.plot(
            rows.freq_mhz + 8.0, predicted_j[at] / time_s, "_", color=colour, label=f"{phase} law"
        )
        axes.legend(fontsize="small")


def _held_out(result: FitResult, axes: Any) -> None:
    axes.set(title="error on held-out rows", ylabel="mean absolute relative error")
    labels = [f"{h.phase}\n{h.quantity}\n{h.split}" for h in result.held_out]
    position = np.arange(len(labels))
    axes.bar(position, [h.mape_frac for h in result.held_out], color="0.75")
    for x, held in zip(position, result.held_out, strict=True):
        axes.plot(np.full(len(held.by), x), list(held.by.values()), ".", color="tab:red")
    axes.set_xticks(position, labels, fontsize="x-small")
