"""What a fit found: laws, errors, and the profile that they make."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.files import whole_file
from voltana_ctrl.fit.heldout import HeldOut, Laws
from voltana_ctrl.fit.profile_file import profile_text
from voltana_ctrl.fit.tables import IterationTable
from voltana_ctrl.profiles.format import profile_from_laws
from voltana_ctrl.types import ActuatorPoint, Band, Profile

__all__ = ["FitResult", "foreign_lines"]

#: 90 % of a normal distribution lie within so many standard deviations.
_SD_OF_90 = 1.645


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitResult:
    """Laws of an instance with their errors; returned by :func:`fit_table`.

    Parameters
    ----------
    table : IterationTable
        What was measured.
    laws : Laws
        As a profile holds them.
    held_out : tuple of HeldOut
        Cross-validation of `laws`.
    idle_w : float or None
        Power of the idle rows, where the table has any.
    actuators : tuple of ActuatorPoint
        Measured points of other actuators beside those of clock locks; they go into the profile
        as they are.
    notes : tuple of str
        What was not identified, and what to measure for it.

    Examples
    --------
    >>> from voltana_ctrl.fit import IterationTable, Laws
    >>> empty = IterationTable(
    ...     phase=(), freq_mhz=[], batch_req=[], kv_tok=[], prefill_tok=[], square_tok2=[],
    ...     wall_s=[], energy_j=[])
    >>> laws = Laws(decode=None, prefill=None, power=None)
    >>> FitResult(table=empty, laws=laws, held_out=(), notes=("nothing measured",)).summary()
    'nothing measured'
    """

    table: IterationTable
    laws: Laws
    held_out: tuple[HeldOut, ...]
    idle_w: float | None = None
    actuators: tuple[ActuatorPoint, ...] = ()
    notes: tuple[str, ...] = ()

    def errors(self, phase: str, quantity: str, split: str) -> HeldOut | None:
        """One held-out error, None where it could not be had.

        Parameters
        ----------
        phase : {"decode", "prefill"}
            Phase of the rows.
        quantity : {"time", "energy"}
            What was predicted.
        split : {"batch", "clock"}
            What was held out.
        """
        for held in self.held_out:
            if (held.phase, held.quantity, held.split) == (phase, quantity, split):
                return held
        return None

    def band(self) -> Band:
        """How far a profile of these laws may be from the truth, for ``compare --uncertainty``.

        One standard deviation: what 90 % of held-out rows stay below, over 1.645. What tells of
        the response to the clock are the clocks held out.
        """

        def sd(phase: str, quantity: str, split: str) -> float:
            held = self.errors(phase, quantity, split)
            found = np.nan if held is None else held.p90_frac / _SD_OF_90
            return float(min(found, 0.99)) if np.isfinite(found) else 0.0

        both = ("decode", "prefill")
        return Band(
            decode_time_frac=sd("decode", "time", "batch"),
            prefill_time_frac=sd("prefill", "time", "batch"),
            clock_time_frac=max(sd(phase, "time", "clock") for phase in both),
            decode_power_frac=sd("decode", "energy", "batch"),
            prefill_power_frac=sd("prefill", "energy", "batch"),
            clock_power_frac=max(sd(phase, "energy", "clock") for phase in both),
        )

    def widening(self, phase: str) -> float:
        """What standard errors are multiplied by: errors held out over those of the fit itself.

        Rows of one clock or one batch err together, which the residuals of a fit do not show.

        Parameters
        ----------
        phase : {"decode", "prefill"}
            Phase whose law is asked about.

        Returns
        -------
        float
            At least 1.
        """
        rows = self.table.of(phase)
        held = self.errors(phase, "time", "batch")
        if held is None or len(rows) == 0:
            return 1.0
        inside = float(np.mean(np.abs(self.laws.time_s(rows) / rows.wall_s - 1.0)))
        return max(1.0, held.mape_frac / max(inside, 1e-9))

    def band_frac(self, phase: str, freq_mhz: float, batch_req: float | None = None) -> float:
        """Relative error of the predicted time to be expected at a clock.

        At a measured clock the error on held-out batches. Between measured clocks the larger
        of it and of the errors at the inner neighbours when they were held out themselves,
        which errs on the wide side: the gap was twice as large then.

        Parameters
        ----------
        phase : {"decode", "prefill"}
            Phase whose law is asked about.
        freq_mhz : float
            A clock within the measured range.
        batch_req : float, optional
            Requests in the batch. Beyond the largest measured one the error of that one, held
            out, is taken to grow in proportion to how far the batch lies beyond.

        Returns
        -------
        float
            Relative: 0.05 for 5 %; NaN where no batch could be held out.
        """
        inside = self._inside_frac(phase, freq_mhz)
        by_batch = self.errors(phase, "time", "batch")
        if batch_req is None or by_batch is None or len(by_batch.by) < 2:
            return inside
        below, largest = sorted(by_batch.by)[-2:]
        if batch_req <= largest:
            return inside
        return inside + by_batch.by[largest] * (batch_req - largest) / (largest - below)

    def _inside_frac(self, phase: str, freq_mhz: float) -> float:
        by_batch = self.errors(phase, "time", "batch")
        by_clock = self.errors(phase, "time", "clock")
        band = by_batch.mape_frac if by_batch else np.nan
        clocks = np.unique(self.table.of(phase).freq_mhz)
        if by_clock is None or np.any(clocks == freq_mhz):
            return band
        above = int(np.searchsorted(clocks, freq_mhz))
        beside = [float(clock) for clock in clocks[max(above - 1, 0) : above + 1]]
        return max([band, *(by_clock.by[clock] for clock in beside if clock in by_clock.by)])

    def summary(self) -> str:
        """Coefficients with standard errors, held-out errors and notes, as lines of text."""
        wider = {phase: self.widening(phase) for phase in ("decode", "prefill")}
        lines = [*_coefficient_lines(self.laws, wider)]
        for held in self.held_out:
            value, worst = held.worst
            lines.append(
                f"{held.phase} {held.quantity}, one {held.split} held out:"
                f" {held.mape_frac:.1%} mean, {worst:.1%} at {value:g} {held.unit},"
                f" R2 {held.r2_frac:.4f}; 90 % below {held.p90_frac:.1%}, which covers"
                f" {held.fold_coverage_frac:.0%} of what it has not seen"
            )
        return "\n".join([*lines, *self.notes])

    def to_toml(
        self,
        name: str,
        like: Profile,
        *,
        ladder_mhz: Iterable[float] | None = None,
        idle_w: float | None = None,
    ) -> str:
        """Text of a profile file that :func:`voltana_ctrl.load_profile` reads.

        Parameters
        ----------
        name : str
            Name of the profile, ``gpu/model``.
        like : Profile
            Profile that gives memory, transfer and what else no table of iterations tells.
        ladder_mhz : iterable of float, optional
            Supported clocks, within the measured range; default the clocks measured.
        idle_w : float, optional
            Idle power; default the idle rows, else that of `like`.

        Raises
        ------
        ConfigError
            If a phase or the energy was not measured, or a clock lies outside.
        """
        return profile_text(self, name, like, ladder_mhz, idle_w)

    def profile(
        self,
        name: str,
        like: Profile,
        *,
        ladder_mhz: Iterable[float] | None = None,
        idle_w: float | None = None,
    ) -> Profile:
        """Profile of the fitted laws; for the parameters see :meth:`to_toml`."""
        return profile_from_laws(
            tomllib.loads(self.to_toml(name, like, ladder_mhz=ladder_mhz, idle_w=idle_w))
        )

    def save(self, path: str | Path, name: str, like: Profile, **options: Any) -> None:
        """Write :meth:`to_toml` to a file; `options` as there.

        Raises
        ------
        ConfigError
            If it cannot be written; half a profile is never there.
        """
        text = self.to_toml(name, like, **options)
        with whole_file(path) as beside:
            beside.write_text(text, encoding="utf-8")


def foreign_lines(result: FitResult, name: str, like: Profile) -> list[str]:
    """What a profile takes from another that may not hold, in words; empty if nothing.

    Parameters
    ----------
    result : FitResult
        What was measured.
    name : str
        ``gpu/model`` of the new profile.
    like : Profile
        Profile that memory and transfer are taken from.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.fit import FitResult, IterationTable, Laws
    >>> empty = IterationTable(
    ...     phase=(), freq_mhz=[], batch_req=[], kv_tok=[], prefill_tok=[], square_tok2=[],
    ...     wall_s=[], energy_j=[])
    >>> result = FitResult(
    ...     table=empty, laws=Laws(decode=None, prefill=None, power=None), held_out=())
    >>> lines = foreign_lines(result, "a/qwen3-32b", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> print(lines[0].partition(";")[0])
    memory: 450000 KV tokens, 131072 bytes each, are of llama-3.1-8b, not of qwen3-32b
    """
    lines = []
    model, donor = (each.partition("/")[2] for each in (name, like.name))
    if model != donor:
        lines.append(
            f"memory: {like.kv_capacity_tok} KV tokens, {like.kv_bytes_per_tok:g} bytes each, are"
            f" of {donor}, not of {model}; name a profile of that model with --like, or set"
            " kv_capacity_tok and kv_bytes_per_tok in the file"
        )
    measured = result.table.of("decode").batch_req
    if len(measured) and measured.max() < like.max_batch:
        lines.append(
            f"max_batch: {measured.max():.0f}, the largest batch measured, not the"
            f" {like.max_batch} of {like.name}; measure larger ones to go beyond"
        )
    return lines


def _coefficient_lines(laws: Laws, wider: Mapping[str, float]) -> list[str]:
    lines = []
    if laws.batch_steps:
        lines.append(f"batch_steps = {[list(step) for step in laws.batch_steps]}")
    tables: list[tuple[str, Mapping[str, tuple[F64, F64]], F64]] = []
    if laws.decode is not None:
        law = laws.decode
        columns: dict[str, tuple[F64, F64]] = {
            "decode_base_s": (law.base_s, law.base_sd_s),
            "decode_req_s": (law.req_s, law.req_sd_s),
            "decode_kv_s": (law.kv_s, law.kv_sd_s),
        }
        tables.append((f"decode time ({law.form})", columns, law.clock_mhz))
    if laws.prefill is not None:
        fit = laws.prefill
        columns = {
            "prefill_base_s": (fit.base_s, fit.base_sd_s),
            "prefill_tok_s": (fit.tok_s, fit.tok_sd_s),
            "prefill_tok2_s": (fit.tok2_s, fit.tok2_sd_s),
        }
        tables.append(("prefill time", columns, fit.clock_mhz))
    for title, each, clocks in tables:
        lines.append(f"{title}, one standard error:")
        for k, clock in enumerate(clocks):
            scale = wider[title.partition(" ")[0]]
            cells = (f"{name} {v[k]:.4g} +- {scale * sd[k]:.2g}" for name, (v, sd) in each.items())
            lines.append(f"  {clock:g} MHz: " + ", ".join(cells))
    if laws.decode is not None and laws.decode.floor_s > 0.0:
        lines.append(f"decode_floor_s {laws.decode.floor_s:.4g} +- {laws.decode.floor_sd_s:.2g}")
    if laws.decode is not None and laws.decode.compute_s > 0.0:
        roof, clock = laws.decode, laws.decode.clock_mhz[-1]
        lines.append(
            f"decode_roof_s {roof.compute_s / clock:.4g} +- {roof.compute_sd_s / clock:.2g}"
            f" at {clock:g} MHz, as 1/f"
        )
    if laws.decode is not None and laws.decode.host_s > 0.0:
        lines.append(f"decode_host_s {laws.decode.host_s:.4g} +- {laws.decode.host_sd_s:.2g}")
    if laws.prefill is not None and laws.prefill.req_s > 0.0:
        lines.append(
            f"prefill_req_s {laws.prefill.req_s:.4g}"
            f" +- {wider['prefill'] * laws.prefill.req_sd_s:.2g}"
        )
    if laws.power is not None:
        power = laws.power
        for name, sd in power.sd.items():
            if np.isfinite(sd):
                lines.append(f"{name} {getattr(power, name):.4g} +- {sd:.2g}")
        if np.isfinite(power.cap_w):
            lines.append(f"power cap {power.cap_w:.4g} W from {power.capped_mhz:g} MHz up")
    return lines
