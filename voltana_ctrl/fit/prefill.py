"""Prefill time against clock and prompt tokens, and the clocks at which a power cap holds it.

``T = base(f) + tok(f) (N + square Q)`` with ``N`` prompt tokens and ``Q`` the sum of
``end^2 - start^2`` over the prompts. Linear layers and attention both compute, so they share
``tok(f)``, which falls with the clock by construction and is linear in ``1/f`` between clocks;
launching does not hang on the clock and reading the weights does, hence ``base = b0 + b1/f``.
Each prompt may also take time of the host, ``req m``, at every clock: where the table measures it
(`host_s`), or where it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.robust import SCALE_FRAC, estimate, falling, host_time, linear
from voltana_ctrl.fit.tables import IterationTable

__all__ = ["PrefillTime", "capped_from_mhz", "fit_prefill_time", "prompts_take_time"]

# A clock that shortens saturated prefill by less than this part of what clocks below it do is
# not reached: the card is held by its power cap.
CAPPED_GAIN_FRAC = 2.0 / 3.0
# ... and its power is level with the highest clock's within this.
CAPPED_POWER_FRAC = 0.03
# What the criterion must gain before prompts are said to take time of their own, as for padding.
_CLAIMED = 10.0
# Iterations of this part of the largest and more compute all the time.
SATURATED_FRAC = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillTime:
    """Law of the prefill iteration, at measured clocks, with one standard deviation each.

    Parameters
    ----------
    clock_mhz : ndarray, shape (m,)
        Measured clocks, ascending.
    base_s, tok_s, tok2_s : ndarray, shape (m,)
        Seconds per iteration, per prompt token, per square token.
    base_sd_s, tok_sd_s, tok2_sd_s : ndarray, shape (m,)
        Their standard deviations.
    req_s, req_sd_s : float
        Time of the host per prompt, at every clock.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(2)
    >>> law = PrefillTime(
    ...     clock_mhz=np.array([700.0, 1400.0]), base_s=np.array([0.01, 0.01]),
    ...     tok_s=np.array([2e-4, 1e-4]), tok2_s=zero, base_sd_s=zero, tok_sd_s=zero,
    ...     tok2_sd_s=zero)
    >>> law.time_s([700, 1400], 1000, 0).round(3)
    array([0.21, 0.11])
    """

    clock_mhz: F64
    base_s: F64
    tok_s: F64
    tok2_s: F64
    base_sd_s: F64
    tok_sd_s: F64
    tok2_sd_s: F64
    req_s: float = 0.0
    req_sd_s: float = 0.0

    def at(self, freq_mhz: object) -> tuple[F64, F64, F64]:
        """Coefficients at any clock: linear in ``1/f``, level outside.

        Parameters
        ----------
        freq_mhz : array_like
            Clocks, any shape.

        Returns
        -------
        base_s, tok_s, tok2_s : ndarray
            Seconds per iteration, per prompt token and per square token, of the shape of
            `freq_mhz`.

        Examples
        --------
        >>> import numpy as np
        >>> one = np.array([1.0])
        >>> law = PrefillTime(clock_mhz=1400 * one, base_s=one, tok_s=one, tok2_s=one,
        ...                   base_sd_s=one, tok_sd_s=one, tok2_sd_s=one)
        >>> law.at(700.0)[0].item()
        1.0
        """
        period = 1.0 / np.asarray(freq_mhz, dtype=np.float64)
        known = 1.0 / self.clock_mhz[::-1]
        base, tok, tok2 = (
            np.interp(period, known, values[::-1])
            for values in (self.base_s, self.tok_s, self.tok2_s)
        )
        return base, tok, tok2

    def time_s(
        self,
        freq_mhz: object,
        prefill_tok: object,
        square_tok2: object,
        prompts_req: object = 1.0,
    ) -> F64:
        """Time of an iteration.

        Parameters
        ----------
        freq_mhz, prefill_tok, square_tok2, prompts_req : array_like
            Clock, prompt tokens, sum of ``end^2 - start^2``, prompts.

        Returns
        -------
        ndarray
            Seconds.

        Examples
        --------
        >>> import numpy as np
        >>> one = np.array([1.0])
        >>> law = PrefillTime(clock_mhz=1400 * one, base_s=one, tok_s=one, tok2_s=0 * one,
        ...                   base_sd_s=one, tok_sd_s=one, tok2_sd_s=one)
        >>> law.time_s(1400.0, 2, 4).item()
        3.0
        """
        base, tok, tok2 = self.at(freq_mhz)
        time_s: F64 = (
            base
            + tok * np.asarray(prefill_tok, dtype=np.float64)
            + tok2 * np.asarray(square_tok2, dtype=np.float64)
        )
        return time_s + self.req_s * np.asarray(prompts_req, dtype=np.float64)


def fit_prefill_time(
    table: IterationTable,
    *,
    tok2_s: float | None = None,
    per_prompt: bool = False,
    fold: bool = False,
) -> PrefillTime:
    """Robust regression on relative errors.

    Parameters
    ----------
    table : IterationTable
        Measured iterations; the prefill rows count.
    tok2_s : float, optional
        Known time per square token at every clock, where the table cannot tell it.
    per_prompt : bool
        Let each prompt take time of the host.
    fold : bool
        True for a fold of a cross-validation: what it cannot support is not refused.

    Returns
    -------
    PrefillTime
        With standard deviations from the Jacobian.

    Raises
    ------
    ConfigError
        Naming the coefficient that the table cannot support, and what to measure.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> tok = np.array([128.0, 512, 2048, 8192, 2048])
    >>> square = tok**2 / np.array([1, 1, 1, 1, 4])
    >>> zero = 0 * tok
    >>> table = IterationTable(
    ...     phase=("prefill",) * 5, freq_mhz=1410 + zero, batch_req=[1, 1, 1, 1, 4], kv_tok=zero,
    ...     prefill_tok=tok, square_tok2=square, wall_s=0.01 + 7e-5 * tok + 1e-9 * square,
    ...     energy_j=0.01 * tok + 3)
    >>> law = fit_prefill_time(table)
    >>> law.base_s.round(6).item(), law.tok_s.round(8).item(), law.tok2_s.round(11).item()
    (0.01, 7e-05, 1e-09)
    """
    rows = table.of("prefill")
    if len(rows) == 0:
        raise ConfigError("prefill_time: the table has no prefill rows; measure prefill iterations")
    if not fold:
        _check_supported(rows, known_tok2=tok2_s is not None)
    req_s, req_sd_s = host_time(rows.waited_s / rows.batch_req)
    if req_s == 0.0:
        return _Problem(rows, tok2_s, per_prompt).law()
    left_s = np.maximum(rows.wall_s - req_s * rows.batch_req, 1e-9)
    law = _Problem(replace(rows, wall_s=left_s, host_s=None), tok2_s, per_prompt=False).law()
    return replace(law, req_s=req_s, req_sd_s=req_sd_s)


def prompts_take_time(table: IterationTable, *, tok2_s: float | None = None) -> bool | None:
    """Whether prompts take time besides their tokens, by the Bayesian information criterion.

    Parameters
    ----------
    table : IterationTable
        Measured iterations; the prefill rows count.
    tok2_s : float, optional
        Known time per square token.

    Returns
    -------
    bool or None
        None if the table cannot tell: prompts follow their tokens and squares.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> tok = np.array([512.0, 2048, 8192, 2048, 2048, 8192, 8192])
    >>> prompts = np.array([1.0, 1, 1, 4, 16, 4, 64])
    >>> zero, square = 0 * tok, tok**2 / prompts
    >>> table = IterationTable(
    ...     phase=("prefill",) * 7, freq_mhz=1410 + zero, batch_req=prompts, kv_tok=zero,
    ...     prefill_tok=tok, square_tok2=square, energy_j=zero + np.nan,
    ...     wall_s=0.01 + 7e-5 * tok + 1e-9 * square + 0.013 * prompts)
    >>> prompts_take_time(table)
    True
    """
    rows = table.of("prefill")
    clocks = np.unique(rows.freq_mhz)
    columns = [np.ones(len(rows)), rows.square_tok2]
    columns += [rows.prefill_tok * (rows.freq_mhz == clock) for clock in clocks]
    columns += [clocks[0] / rows.freq_mhz] if len(clocks) > 1 else []
    design = np.stack([*columns, rows.batch_req], axis=1) / rows.wall_s[:, None]
    design /= np.maximum(np.linalg.norm(design, axis=0), 1e-300)
    basis, _ = np.linalg.qr(design[:, :-1])
    left = design[:, -1] - basis @ (basis.T @ design[:, -1])
    if len(rows) <= design.shape[1] or not np.linalg.norm(left) > 0.05:
        return None

    def error(per_prompt: bool) -> float:
        law = _Problem(rows, tok2_s, per_prompt).law()
        time_s = law.time_s(rows.freq_mhz, rows.prefill_tok, rows.square_tok2, rows.batch_req)
        # An outlier counts as three times the usual scatter at most.
        part = np.minimum(np.abs(time_s / rows.wall_s - 1.0), 3.0 * SCALE_FRAC)
        return float(part @ part)

    ratio = max(error(False), 1e-12) / max(error(True), 1e-12)
    return bool(len(rows) * np.log(ratio) - np.log(len(rows)) > _CLAIMED)


class _Problem:
    """Parameters: base, base over the relative clock, prompts, increments of tok per clock, square.

    The first ones are times of an iteration of the largest measured number of tokens or prompts.
    The square is a ratio to the tokens' time, or known in seconds.
    """

    def __init__(self, rows: IterationTable, tok2_s: float | None, per_prompt: bool) -> None:
        self.wall_s = rows.wall_s
        self.clocks, index = np.unique(rows.freq_mhz, return_inverse=True)
        self.m = len(self.clocks)
        self.tok_ref = float(rows.prefill_tok.max())
        self.square_ref = float(rows.square_tok2.max())
        self.known = 0.0 if tok2_s is None else tok2_s * rows.square_tok2
        self.free = tok2_s is None
        self.tok2_s = tok2_s
        self.tok = rows.prefill_tok / self.tok_ref
        self.square = rows.square_tok2 / self.square_ref
        self.above = index[:, None] <= np.arange(self.m)[None, :]
        # One clock does not tell the two parts of the base apart: the level one is enough.
        period = self.clocks[0] / rows.freq_mhz * (self.m > 1)
        self.per_prompt = per_prompt
        self.req_ref = float(rows.batch_req.max())
        prompts = rows.batch_req / self.req_ref * per_prompt
        self.base = np.stack([np.ones(len(rows)), period, prompts], axis=1)

    def _load(self, p: F64) -> F64:
        load: F64 = self.tok + p[-1] * self.square
        return load

    def _time_s(self, p: F64) -> F64:
        time_s = self.base @ p[:3] + (self.above @ p[3:-1]) * self._load(p) + self.known
        return np.maximum(time_s, 1e-12)

    def residual(self, p: F64) -> F64:
        return np.log(self._time_s(p) / self.wall_s)

    def jacobian(self, p: F64) -> F64:
        by_tok = self.above * self._load(p)[:, None]
        by_square = (self.above @ p[3:-1]) * self.square
        jac = np.concatenate([self.base, by_tok, by_square[:, None]], axis=1)
        jac /= self._time_s(p)[:, None]
        return jac

    def law(self) -> PrefillTime:
        design = np.concatenate([self.base, self.above * self.tok[:, None]], axis=1)
        start = np.append(np.maximum(linear(design, self.wall_s), 1e-4 * self.wall_s.min()), 0.01)
        lower, upper = np.zeros(self.m + 4), np.full(self.m + 4, np.inf)
        if self.m == 1:
            upper[1] = 0.0
        if not self.per_prompt:
            upper[2] = 0.0
        if not self.free:
            upper[-1] = 0.0
        found = estimate(self.residual, self.jacobian, [start], lower, upper)
        p, covariance = found.values, found.covariance
        period = self.clocks[0] / self.clocks * (self.m > 1)
        tok = falling(p[3:-1])
        total = np.triu(np.ones((self.m, self.m)))
        # Gradients of base, tok and tok2 at each clock, shape (m, m + 4).
        by_base = np.zeros((self.m, self.m + 4))
        by_base[:, 0], by_base[:, 1] = 1.0, period
        by_tok = np.zeros((self.m, self.m + 4))
        by_tok[:, 3:-1] = total
        by_tok2 = p[-1] * by_tok
        by_tok2[:, -1] = tok

        def sd(gradient: F64) -> F64:
            variance = np.einsum("ij,jk,ik->i", gradient, covariance, gradient)
            deviation: F64 = np.sqrt(np.maximum(variance, 0.0))
            return deviation

        square_unit = 1.0 / self.square_ref
        tok2_s = p[-1] * tok * square_unit
        return PrefillTime(
            clock_mhz=self.clocks,
            base_s=p[0] + p[1] * period,
            tok_s=tok / self.tok_ref,
            tok2_s=tok2_s if self.tok2_s is None else np.full(self.m, self.tok2_s),
            base_sd_s=sd(by_base),
            tok_sd_s=sd(by_tok) / self.tok_ref,
            tok2_sd_s=sd(by_tok2) * square_unit,
            req_s=float(p[2] / self.req_ref),
            req_sd_s=float(np.sqrt(max(covariance[2, 2], 0.0)) / self.req_ref),
        )


def _check_supported(rows: IterationTable, *, known_tok2: bool) -> None:
    for clock in np.unique(rows.freq_mhz):
        at = rows.freq_mhz == clock
        where = f"at {clock:g} MHz"
        loads = len(np.unique(rows.prefill_tok[at]))
        if loads < 3:
            raise ConfigError(
                f"prefill_tok_s: {loads} number(s) of prompt tokens {where}; measure at least 3,"
                " from one short prompt to the largest iteration"
            )
        if known_tok2:
            continue
        columns = [np.ones(int(at.sum())), rows.prefill_tok[at], rows.square_tok2[at]]
        design = np.stack(columns, axis=1) / rows.wall_s[at, None]
        design /= np.maximum(np.linalg.norm(design, axis=0), 1e-300)
        basis, _ = np.linalg.qr(design[:, :2])
        left = design[:, 2] - basis @ (basis.T @ design[:, 2])
        if not np.linalg.norm(left) > 0.05:
            raise ConfigError(
                f"prefill_tok2_s: the square of the prompts follows their tokens {where}; measure"
                " the same number of tokens as one long prompt and as several short ones, or give"
                " the coefficient by --fix prefill_tok2_s=VALUE"
                " (in Python fixed={'prefill_tok2_s': ...})"
            )


def capped_from_mhz(table: IterationTable) -> float:
    """Lowest measured clock that the power cap does not let the card reach; inf if none.

    Prefill computes, so its time falls almost as the clock rises. Where it stops falling at
    the top of the ladder while power is level, the cap holds the card at a lower clock.

    Parameters
    ----------
    table : IterationTable
        Prefill rows with energy; the larger loads count, those that every clock has.

    Returns
    -------
    float
        MHz.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> f = np.array([900.0, 1000, 1100, 1200, 1300, 1400])
    >>> zero = 0 * f
    >>> wall_s = 100 / np.minimum(f, 1210)
    >>> table = IterationTable(
    ...     phase=("prefill",) * 6, freq_mhz=f, batch_req=1 + zero, kv_tok=zero,
    ...     prefill_tok=1000 + zero, square_tok2=1e6 + zero, wall_s=wall_s,
    ...     energy_j=wall_s * np.minimum(400, 0.33 * f))
    >>> capped_from_mhz(table)
    1300.0
    """
    rows = table.of("prefill")
    rows = rows.rows(~np.isnan(rows.energy_j))
    if len(rows) == 0:
        return np.inf
    rows = rows.rows(rows.prefill_tok >= SATURATED_FRAC * rows.prefill_tok.max())
    clocks, at_clock = np.unique(rows.freq_mhz, return_inverse=True)
    loads = np.stack([rows.prefill_tok, rows.square_tok2], axis=1)
    _, at_load = np.unique(loads, axis=0, return_inverse=True)
    if len(clocks) < 4:
        return np.inf
    # Mean per load and clock, of the loads that every clock has.
    count = np.zeros((at_load.max() + 1, len(clocks)))
    log_s, log_w = np.zeros_like(count), np.zeros_like(count)
    place = (at_load.ravel(), at_clock)
    np.add.at(count, place, 1.0)
    np.add.at(log_s, place, np.log(rows.wall_s))
    np.add.at(log_w, place, np.log(rows.energy_j / rows.wall_s))
    whole = np.all(count > 0.0, axis=1)
    if not np.any(whole):
        return np.inf
    # Each load against itself; the median leaves out a load that was measured badly.
    log_s, log_w = log_s[whole] / count[whole], log_w[whole] / count[whole]
    gain = np.median(-np.diff(log_s, axis=1) / np.diff(np.log(clocks)), axis=0)
    power_frac = np.exp(np.median(log_w - log_w.max(axis=1, keepdims=True), axis=0))
    # Half of the ladder may be capped: what is usual shows in its lower half.
    enough = CAPPED_GAIN_FRAC * float(np.median(gain[: (len(gain) + 1) // 2]))
    level = power_frac >= (1.0 - CAPPED_POWER_FRAC) * power_frac.max()
    for k in range(1, len(clocks)):
        # The step onto this clock, and all from there to the top, gain too little.
        if level[k] and gain[k - 1] < enough and gain[k - 1 :].mean() < enough:
            return float(clocks[k])
    return np.inf
