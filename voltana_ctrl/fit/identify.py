"""From a table of measured iterations to a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.actuators import read_actuators
from voltana_ctrl.fit.decode import FORMS, Form, fit_decode_time
from voltana_ctrl.fit.heldout import HeldOut, Laws, fit_laws, hold_out, idle_power_w
from voltana_ctrl.fit.prefill import prompts_take_time
from voltana_ctrl.fit.result import FitResult
from voltana_ctrl.fit.staircase import detect_batch_steps
from voltana_ctrl.fit.tables import IterationTable, read_table
from voltana_ctrl.types import ActuatorPoint

__all__ = ["fit_table"]

# Clocks of a phase below which its response to the clock is a guess.
MIN_CLOCKS = 3
# A richer form of the law must lower the held-out error to this part of the simpler one's, and
# by more than a thousandth.
RICHER_PAYS_FRAC = 0.9
RICHER_GAIN_FRAC = 1e-3


def fit_table(
    table: str | Path | Sequence[str | Path] | IterationTable,
    *,
    where: Mapping[str, str] | None = None,
    gpus: int | None = None,
    freq_mhz: float | None = None,
    batch_steps: tuple[tuple[int, int], ...] | None = None,
    fixed: Mapping[str, float] | None = None,
) -> FitResult:
    """Identify an instance from a table of measured iterations.

    Parameters
    ----------
    table : str, Path, sequence of them, or IterationTable
        CSV or Parquet in a format of :func:`read_table`, or the table itself.
    where, gpus, freq_mhz
        See :func:`read_table`; for a file only.
    batch_steps : tuple of (upto_req, step_req), optional
        Padding of the decode batch, where it is known; detected by default.
    fixed : mapping of str to float, optional
        Coefficients that the table cannot tell and that are known otherwise: `decode_kv_s`,
        `prefill_tok2_s`, `voltage_rise_frac`, `voltage_knee_mhz`.

    Returns
    -------
    FitResult
        Laws, standard errors, held-out errors; its `profile` method makes a profile of them.

    Raises
    ------
    ConfigError
        Naming what the table lacks and what to measure.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> f, n, c = (a.ravel() for a in np.meshgrid(
    ...     [600.0, 800, 1000, 1200, 1300, 1400], [1.0, 8, 32, 64], [200.0, 2000]))
    >>> g, zero = f / 1e3, 0 * f
    >>> wall_s = 10e-3 / g + 1e-4 / g * n + 8e-8 * n * c
    >>> table = IterationTable(
    ...     phase=("decode",) * len(f), freq_mhz=f, batch_req=n, kv_tok=n * c,
    ...     prefill_tok=zero, square_tok2=zero, wall_s=wall_s,
    ...     energy_j=wall_s * (80 + 60 * g * (1 + 0.7 * np.maximum(0, g - 1.1)) ** 2) + 0.5)
    >>> result = fit_table(table)
    >>> result.laws.decode.base_s[[0, -1]].round(5)
    array([0.01667, 0.00714])
    >>> round(result.laws.power.decode_static_w, 1), round(result.laws.power.decode_iter_j, 2)
    (80.0, 0.5)
    """
    actuators: tuple[ActuatorPoint, ...] = ()
    if not isinstance(table, IterationTable):
        actuators = read_actuators(table, where)
        table = read_table(table, where=where, gpus=gpus, freq_mhz=freq_mhz)
    phases = [phase for phase in ("decode", "prefill") if phase in table.phase]
    if not phases:
        raise ConfigError("table.phase: no decode and no prefill rows; measure at least one")
    for phase in phases:
        _check_clocks(table.of(phase), phase)
    if np.any(table.waited_s > 0.0) and idle_power_w(table) is None:
        busy = table.rows(np.array([phase != "idle" for phase in table.phase]))
        if not np.all(np.isnan(busy.energy_j)):
            raise ConfigError(
                "table.host_s: no idle row tells what the GPU draws while it waits for the host;"
                " measure idle, with the model loaded"
            )
    notes = []
    if batch_steps is None and "decode" in phases:
        batch_steps = detect_batch_steps(table.of("decode"))
        if batch_steps is None:
            notes.append(
                "batch_steps: not identified, none claimed; measure batch sizes n and n + 1"
                " where the engine may pad, or give batch_steps"
            )
    per_prompt = _prompts(table, fixed, notes) if "prefill" in phases else False
    steps = batch_steps or ()
    by_form = _held_by_form(table, steps, fixed)
    laws = fit_laws(
        table, form=_simplest(by_form), batch_steps=steps, fixed=fixed, per_prompt=per_prompt
    )
    if laws.decode is not None and laws.decode.host_s == 0.0:
        notes.append(
            "decode_host_s: not identified, 0 taken; by these rows it may be anything up to"
            f" {1e3 * laws.decode.base_s[-1]:.1f} ms, the base at the highest clock: measure"
            " host_s, the part of wall_s in which the GPU waits"
        )
    held: list[HeldOut] = []
    for phase in phases:
        for split in ("batch", "clock"):
            held += hold_out(table, laws, phase, split, fixed=fixed)
    if laws.power is None:
        notes.append("energy_j: no energy measured, times only")
    elif laws.power.rise_frac == 0.0:
        notes.append("voltage: no knee found, power is a straight line in the clock")
    return FitResult(
        table=table,
        laws=laws,
        held_out=tuple(held),
        idle_w=idle_power_w(table),
        actuators=actuators,
        notes=tuple(notes),
    )


def _prompts(table: IterationTable, fixed: Mapping[str, float] | None, notes: list[str]) -> bool:
    """Whether prompts are let take time of the host; what is not claimed is noted, and why."""
    if np.any(table.of("prefill").waited_s > 0.0):
        return False  # measured, nothing to find
    found = prompts_take_time(table, tok2_s=(fixed or {}).get("prefill_tok2_s"))
    if found is None:
        notes.append(
            "prefill_req_s: not identified, 0 taken; measure the same tokens as one prompt and as"
            " several, at two numbers of tokens or more, or host_s"
        )
    with_energy = not np.all(np.isnan(table.of("prefill").energy_j))
    if found and with_energy and idle_power_w(table) is None:
        notes.append(
            "prefill_req_s: prompts take time besides their tokens, which is not claimed: no idle"
            " row tells what the GPU draws meanwhile; measure idle"
        )
        return False
    return bool(found)


def _check_clocks(rows: IterationTable, phase: str) -> None:
    clocks = np.unique(rows.freq_mhz)
    if len(clocks) < MIN_CLOCKS:
        shown = ", ".join(f"{clock:g}" for clock in clocks)
        raise ConfigError(
            f"freq_mhz: {phase} was measured at {len(clocks)} clock(s) only ({shown} MHz); a"
            f" profile needs {MIN_CLOCKS} or more for the times and 5 for the power: measure the"
            " lowest and the highest supported clock and some between, two of them near the top"
        )


def _held_by_form(
    table: IterationTable,
    steps: tuple[tuple[int, int], ...],
    fixed: Mapping[str, float] | None,
) -> dict[Form, HeldOut]:
    """Error on held-out batches of each form of the decode time that is worth a trial."""
    decode = table.of("decode")
    decode = replace(decode, energy_j=np.full(len(decode), np.nan))
    known_kv = (fixed or {}).get("decode_kv_s")
    held: dict[Form, HeldOut] = {}
    line = np.inf
    for form in FORMS if len(decode) else ():
        law = fit_decode_time(decode, form, batch_steps=steps, kv_s=known_kv)
        laws = Laws(decode=law, prefill=None, power=None, batch_steps=steps)
        error = float(np.mean(np.abs(laws.time_s(decode) / decode.wall_s - 1.0)))
        line = error if form == FORMS[0] else line
        if form != FORMS[0] and not _clearly_less(error, line):
            continue  # no better even on the rows that it was fitted to
        for outcome in hold_out(decode, laws, "decode", "batch", fixed=fixed):
            held[form] = outcome
    return held


def _simplest(held: Mapping[Form, HeldOut]) -> Form:
    """First form that no later one beats clearly."""
    best = FORMS[0]
    for form in FORMS:
        if form in held and _clearly_less(held[form].mape_frac, held[best].mape_frac):
            best = form
    return best


def _clearly_less(error_frac: float, than_frac: float) -> bool:
    return error_frac < min(RICHER_PAYS_FRAC * than_frac, than_frac - RICHER_GAIN_FRAC)
