"""The laws together, and what they err by on rows they have not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.decode import DecodeTime, Form, fit_decode_time
from voltana_ctrl.fit.power import PowerLaw, fit_power
from voltana_ctrl.fit.prefill import PrefillTime, fit_prefill_time
from voltana_ctrl.fit.robust import folds
from voltana_ctrl.fit.staircase import pad
from voltana_ctrl.fit.tables import IterationTable

__all__ = ["FIXABLE", "HeldOut", "Laws", "fit_laws", "hold_out", "idle_power_w"]

#: Coefficients that may be given where a table cannot tell them, and their units.
FIXABLE = {
    "decode_kv_s": "seconds per KV token, at every clock",
    "prefill_tok2_s": "seconds per square prompt token, at every clock",
    "voltage_rise_frac": "relative rise of the voltage over 1 GHz above the knee",
    "voltage_knee_mhz": "clock above which the voltage rises",
}

#: Share of unseen rows that a band is to cover.
BAND_FRAC = 0.9

Split = Literal["batch", "clock"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Laws:
    """Fitted laws, by which the time and the energy of the rows of a table can be predicted.

    Parameters
    ----------
    decode : DecodeTime or None
        Time of decode iterations; None where the table has none.
    prefill : PrefillTime or None
        Time of prefill iterations; None where the table has none.
    power : PowerLaw or None
        Power and energy; None where no busy row of the table has an energy.
    batch_steps : tuple of (upto_req, step_req)
        Which batch sizes run: one above the bound before and up to `upto_req` runs as the next
        multiple of `step_req`, see :class:`~voltana_ctrl.types.Profile`.
    idle_w : float
        Watts that the GPU draws while it waits for the host; 0 where the table does not tell.

    Examples
    --------
    >>> Laws(decode=None, prefill=None, power=None).batch_steps
    ()
    """

    decode: DecodeTime | None
    prefill: PrefillTime | None
    power: PowerLaw | None
    batch_steps: tuple[tuple[int, int], ...] = ()
    idle_w: float = 0.0

    def waited_s(self, table: IterationTable) -> F64:
        """Predicted part of the time in which the GPU waits for the host.

        Parameters
        ----------
        table : IterationTable
            Loads and clocks.

        Returns
        -------
        ndarray, shape (n,)
            Seconds of each row.

        Examples
        --------
        >>> from voltana_ctrl.fit import IterationTable
        >>> table = IterationTable(
        ...     phase=("idle",), freq_mhz=[1410], batch_req=[0], kv_tok=[0], prefill_tok=[0],
        ...     square_tok2=[0], wall_s=[1.0], energy_j=[60.0])
        >>> Laws(decode=None, prefill=None, power=None).waited_s(table)
        array([0.])
        """
        waited_s = np.zeros(len(table))
        if self.decode is not None:
            waited_s[_is(table, "decode")] = self.decode.host_s
        if self.prefill is not None:
            prefill = _is(table, "prefill")
            waited_s[prefill] = self.prefill.req_s * table.batch_req[prefill]
        return waited_s

    def time_s(self, table: IterationTable) -> F64:
        """Predicted time of each row; NaN where there is no law.

        Parameters
        ----------
        table : IterationTable
            Loads and clocks.

        Returns
        -------
        ndarray, shape (n,)
            Seconds.

        Examples
        --------
        >>> from voltana_ctrl.fit import IterationTable
        >>> table = IterationTable(
        ...     phase=("idle",), freq_mhz=[1410], batch_req=[0], kv_tok=[0], prefill_tok=[0],
        ...     square_tok2=[0], wall_s=[1.0], energy_j=[60.0])
        >>> Laws(decode=None, prefill=None, power=None).time_s(table)
        array([nan])
        """
        time_s = np.full(len(table), np.nan)
        decode, prefill = _is(table, "decode"), _is(table, "prefill")
        if self.decode is not None:
            rows = table.rows(decode)
            size = pad(rows.batch_req, self.batch_steps)
            time_s[decode] = self.decode.time_s(rows.freq_mhz, size, rows.kv_tok)
        if self.prefill is not None:
            rows = table.rows(prefill)
            time_s[prefill] = self.prefill.time_s(
                rows.freq_mhz, rows.prefill_tok, rows.square_tok2, rows.batch_req
            )
        return time_s

    def energy_j(self, table: IterationTable) -> F64:
        """Predicted energy of each row, from its predicted time; NaN where there is no law.

        Parameters
        ----------
        table : IterationTable
            Loads and clocks.

        Returns
        -------
        ndarray, shape (n,)
            Joules.

        Examples
        --------
        >>> from voltana_ctrl.fit import IterationTable
        >>> table = IterationTable(
        ...     phase=("idle",), freq_mhz=[1410], batch_req=[0], kv_tok=[0], prefill_tok=[0],
        ...     square_tok2=[0], wall_s=[1.0], energy_j=[60.0])
        >>> Laws(decode=None, prefill=None, power=None).energy_j(table)
        array([nan])
        """
        energy_j = np.full(len(table), np.nan)
        if self.power is None:
            return energy_j
        waited_s, decode = self.waited_s(table), _is(table, "decode")
        time_s = self.time_s(table) - waited_s
        energy_j[:] = time_s * self.power.prefill_w(table.freq_mhz)
        rows = table.rows(decode)
        energy_j[decode] = self.power.decode_j(
            rows.freq_mhz, time_s[decode], rows.batch_req, rows.kv_tok
        )
        return energy_j + waited_s * self.idle_w


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Error of one quantity of one phase on rows that were held out of the fit.

    Parameters
    ----------
    phase : {"decode", "prefill"}
        Phase of the rows.
    quantity : {"time", "energy"}
        What was predicted.
    split : {"batch", "clock"}
        What was held out in turn: all rows of a batch size (of a number of tokens, where
        prefill was measured at fewer than three batch sizes), or all rows of an inner clock.
    mape_frac : float
        Mean absolute relative error over all held-out rows.
    unit : {"MHz", "requests", "tokens"}
        Unit of the held-out values.
    r2_frac : float
        Coefficient of determination of the same predictions.
    by : mapping of float to float
        Mean absolute relative error for each held-out value.
    p90_frac : float
        Absolute relative error that 90 % of unseen rows are to stay below, where the fit knows as
        much as where it was made. Where it knows less, as of a clock that is alone above the knee,
        the band is as many times wider as :meth:`voltana_ctrl.fit.PowerLaw.wider` says.
    fold_coverage_frac : float
        Share of the rows of each held-out value that stay below the band made of all *other*
        rows, on average: what it covers of values that it has not seen.
    coverage_low_frac, coverage_high_frac : float
        Between which shares that of all unseen values lies, given how few were held out (95 %,
        Clopper and Pearson; rows of one value err together and count as one).

    Examples
    --------
    >>> held = HeldOut(phase="decode", quantity="time", split="clock", unit="MHz",
    ...                mape_frac=0.05, r2_frac=0.99, by={450.0: 0.04, 690.0: 0.06})
    >>> held.worst
    (690.0, 0.06)
    """

    phase: str
    quantity: str
    split: Split
    unit: str
    mape_frac: float
    r2_frac: float
    by: Mapping[float, float]
    p90_frac: float = np.nan
    fold_coverage_frac: float = np.nan
    coverage_low_frac: float = np.nan
    coverage_high_frac: float = np.nan

    @property
    def worst(self) -> tuple[float, float]:
        """Held-out value with the largest error, and that error."""
        value = max(self.by, key=lambda each: self.by[each])
        return value, self.by[value]


def _is(table: IterationTable, phase: str) -> Bool:
    return np.array([each == phase for each in table.phase], dtype=bool)


def fit_laws(
    table: IterationTable,
    *,
    form: Form = "line",
    batch_steps: tuple[tuple[int, int], ...] = (),
    fixed: Mapping[str, float] | None = None,
    per_prompt: bool = False,
    near: Laws | None = None,
) -> Laws:
    """Fit all laws that the table has rows for.

    Parameters
    ----------
    table : IterationTable
        Measured iterations.
    form : {"line", "line+floor", "roofline", "roofline+floor"}
        Form of the decode time.
    batch_steps : tuple of (upto_req, step_req)
        Padding of the decode batch.
    fixed : mapping of str to float, optional
        Known coefficients, see `FIXABLE`.
    per_prompt : bool
        Let each prompt take time of the host.
    near : Laws, optional
        Fit of a larger table of which this one is a fold.

    Returns
    -------
    Laws
        None for each law that the table has no rows for.

    Raises
    ------
    ConfigError
        Naming the coefficient that the table cannot support, and what to measure; or if `fixed`
        names a coefficient that is not in `FIXABLE`.

    Examples
    --------
    >>> from voltana_ctrl.fit import IterationTable
    >>> one = IterationTable(
    ...     phase=("decode",), freq_mhz=[1410], batch_req=[1], kv_tok=[9], prefill_tok=[0],
    ...     square_tok2=[0], wall_s=[0.01], energy_j=[3.0])
    >>> fit_laws(one)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: decode_req_s: 1 batch size(s) at 1410 MHz; measure at ...
    """
    fixed = dict(fixed or {})
    for name in fixed:
        if name not in FIXABLE:
            raise ConfigError(f"fixed: expected any of {', '.join(FIXABLE)}, got {name!r}")
    decode = prefill = power = None
    if np.any(_is(table, "decode")):
        decode = fit_decode_time(
            table,
            form,
            batch_steps=batch_steps,
            kv_s=fixed.get("decode_kv_s"),
            near=near.decode if near else None,
        )
    if np.any(_is(table, "prefill")):
        prefill = fit_prefill_time(
            table,
            tok2_s=fixed.get("prefill_tok2_s"),
            per_prompt=per_prompt,
            fold=near is not None,
        )
    idle_w = idle_power_w(table) or 0.0
    laws = Laws(
        decode=decode, prefill=prefill, power=None, batch_steps=batch_steps, idle_w=idle_w
    )  # fmt: skip
    busy = table.rows(~_is(table, "idle"))
    if not np.all(np.isnan(busy.energy_j)):
        waited_s = laws.waited_s(busy)
        if np.any(waited_s):
            busy = replace(busy, energy_j=busy.energy_j - waited_s * idle_w)
        power = fit_power(
            busy,
            laws.time_s(busy) - waited_s,
            rise_frac=fixed.get("voltage_rise_frac"),
            knee_mhz=fixed.get("voltage_knee_mhz"),
            near=near.power if near else None,
        )
    return replace(laws, power=power)


def idle_power_w(table: IterationTable) -> float | None:
    """Median power of the idle rows, None if there are none.

    Parameters
    ----------
    table : IterationTable
        Measured iterations.

    Returns
    -------
    float or None
        Watts.

    Examples
    --------
    >>> from voltana_ctrl.fit import IterationTable
    >>> table = IterationTable(
    ...     phase=("idle",), freq_mhz=[1410], batch_req=[0], kv_tok=[0], prefill_tok=[0],
    ...     square_tok2=[0], wall_s=[2.0], energy_j=[120.0])
    >>> idle_power_w(table)
    60.0
    """
    idle = table.of("idle")
    return float(np.median(idle.energy_j / idle.wall_s)) if len(idle) else None


def hold_out(
    table: IterationTable,
    laws: Laws,
    phase: str,
    split: Split,
    *,
    fixed: Mapping[str, float] | None = None,
) -> tuple[HeldOut, ...]:
    """Cross-validate: hold out each batch size, or each inner clock, of one phase in turn.

    The padding is detected once, on the whole table.

    Parameters
    ----------
    table : IterationTable
        Measured iterations.
    laws : Laws
        Fit of the whole table.
    phase : {"decode", "prefill"}
        Phase whose rows are held out; those of the other phase stay.
    split : {"batch", "clock"}
        What is held out.
    fixed : mapping of str to float, optional
        As for :func:`fit_laws`.

    Returns
    -------
    tuple of HeldOut
        Of the time, and of the energy where there is any; empty if fewer than three values
        could be held out.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable, fit_laws
    >>> n = np.array([1.0, 8, 32, 64, 128])
    >>> zero = 0 * n
    >>> table = IterationTable(
    ...     phase=("decode",) * 5, freq_mhz=1410 + zero, batch_req=n, kv_tok=zero,
    ...     prefill_tok=zero, square_tok2=zero, wall_s=0.01 + 5e-5 * n, energy_j=zero + np.nan)
    >>> fixed = {"decode_kv_s": 0.0}
    >>> held, = hold_out(table, fit_laws(table, fixed=fixed), "decode", "batch", fixed=fixed)
    >>> held.mape_frac < 1e-3
    True
    """
    of_phase = _is(table, phase)
    if split == "clock":
        unit = "MHz"
        key, inner = table.freq_mhz, np.unique(table.freq_mhz[of_phase])[1:-1]
    else:
        key, unit = table.batch_req, "requests"
        if phase == "prefill" and len(np.unique(key[of_phase])) < 3:
            key, unit = table.prefill_tok, "tokens"
        inner = np.unique(key[of_phase])
    if len(inner) < (1 if split == "clock" else 3):
        return ()
    candidates = of_phase & np.isin(key, inner)
    time_s, energy_j = np.full((2, len(table)), np.nan)
    wider = np.ones((2, len(table)))
    form: Form = laws.decode.form if laws.decode is not None else "line"
    per_prompt = laws.prefill is not None and laws.prefill.req_s > 0.0
    for held, _ in folds(key[candidates]):
        out = candidates & np.isin(key, held)
        part = fit_laws(
            table.rows(~out),
            form=form,
            batch_steps=laws.batch_steps,
            fixed=fixed,
            per_prompt=per_prompt,
            near=laws,
        )
        time_s[out] = part.time_s(table.rows(out))
        energy_j[out] = part.energy_j(table.rows(out))
        if part.power is not None:
            rows = table.rows(out)
            wider[1, out] = part.power.wider(rows, part.time_s(rows) - part.waited_s(rows))
    pairs = (("time", time_s, table.wall_s), ("energy", energy_j, table.energy_j))
    return tuple(
        _held_out(phase, quantity, split, unit, predicted, measured, key, times)
        for (quantity, predicted, measured), times in zip(pairs, wider, strict=True)
        if np.any(np.isfinite(predicted / measured))
    )


def _held_out(
    phase: str,
    quantity: str,
    split: Split,
    unit: str,
    predicted: F64,
    measured: F64,
    key: F64,
    wider: F64,
) -> HeldOut:
    known = np.isfinite(predicted / measured)
    predicted, measured, key, wider = (
        each[known] for each in (predicted, measured, key, wider)
    )  # fmt: skip
    error = np.abs(predicted / measured - 1.0)
    left = np.sum((measured - predicted) ** 2)
    total = np.sum((measured - measured.mean()) ** 2)
    by = {float(value): float(error[key == value].mean()) for value in np.unique(key)}
    coverage = _coverage(error / wider, key)
    low, high = _interval(coverage, len(by))
    return HeldOut(
        phase=phase,
        quantity=quantity,
        split=split,
        unit=unit,
        mape_frac=float(error.mean()),
        r2_frac=float(1.0 - left / total) if total > 0.0 else np.nan,
        by=MappingProxyType(by),
        p90_frac=_band(error / wider, key),
        fold_coverage_frac=coverage,
        coverage_low_frac=low,
        coverage_high_frac=high,
    )


def _band(error: F64, key: F64) -> float:
    """Error that 90 % of the rows of a value that was not seen stay below.

    Rows of one value err together, so there are as many independent errors as values: their 90 %
    quantile is widened as Student's t with that many is wider than a normal distribution.
    """
    from scipy.stats import norm, t

    values = len(np.unique(key))
    quantile = float(np.quantile(error, BAND_FRAC))
    if values < 2:
        return quantile
    two_sided = (1.0 + BAND_FRAC) / 2.0
    few = np.sqrt(1.0 + 1.0 / values) * t.ppf(two_sided, values - 1) / norm.ppf(two_sided)
    return float(quantile * few)


def _coverage(error: F64, key: F64) -> float:
    """Mean over rows of whether each is within the quantile of the rows of all other values."""
    if len(np.unique(key)) < 3:
        return np.nan
    inside = np.zeros(len(error), dtype=bool)
    for value in np.unique(key):
        own = key == value
        inside[own] = error[own] <= _band(error[~own], key[~own])
    return float(inside.mean())


def _interval(share_frac: float, n: int) -> tuple[float, float]:
    """Clopper's and Pearson's 95 % interval of a share that was seen in `n` draws.

    Rows of a value are part inside, part outside: hits need not be a whole number.
    """
    from scipy.stats import beta

    if not np.isfinite(share_frac):
        return np.nan, np.nan
    hits = share_frac * n
    low = float(beta.ppf(0.025, hits, n - hits + 1.0)) if hits > 0.0 else 0.0
    high = float(beta.ppf(0.975, hits + 1.0, n - hits)) if hits < n else 1.0
    return low, high
