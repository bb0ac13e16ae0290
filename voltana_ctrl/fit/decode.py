"""Decode time against clock, batch and KV tokens.

``T = max(floor, base(f) + req(f) n + kv(f) K)`` with ``n`` the executed batch is the *line*.
The *roofline* bends it: once computing takes longer than streaming weights, it counts instead,

    T = max(floor, max(base + req n, G n / f) + kv K).

What the host does between two iterations no clock scales. It is claimed only where the table
measures it (`host_s`): times at any number of clocks leave open which part of the base it is.

Coefficients are non-negative and fall with the clock by construction: each is a sum of
non-negative increments from the highest clock down. Between clocks they are linear in ``1/f``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.robust import Estimate, estimate, falling, host_time, linear
from voltana_ctrl.fit.staircase import pad
from voltana_ctrl.fit.tables import IterationTable

__all__ = ["DecodeTime", "fit_decode_time"]

Form = Literal["line", "line+floor", "roofline", "roofline+floor"]
#: From simple to rich.
FORMS: tuple[Form, ...] = ("line", "line+floor", "roofline", "roofline+floor")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeTime:
    """Law of the decode iteration, at measured clocks, with one standard deviation each.

    Parameters
    ----------
    form : str
        ``line`` or ``roofline``, with or without ``+floor``.
    clock_mhz : ndarray, shape (m,)
        Measured clocks, ascending.
    base_s, req_s, kv_s : ndarray, shape (m,)
        Seconds per iteration, per executed request, per KV token.
    base_sd_s, req_sd_s, kv_sd_s : ndarray, shape (m,)
        Their standard deviations.
    floor_s, floor_sd_s : float
        Least time of an iteration, where the host launches slower than the GPU computes.
    compute_s, compute_sd_s : float
        Computing time of one request at 1 MHz; 0 in the line.
    host_s, host_sd_s : float
        Time of the host per iteration, at every clock, on top of the rest.

    Examples
    --------
    >>> import numpy as np
    >>> law = DecodeTime(
    ...     form="line", clock_mhz=np.array([700.0, 1400.0]), base_s=np.array([0.02, 0.01]),
    ...     req_s=np.array([2e-4, 1e-4]), kv_s=np.array([1e-7, 1e-7]),
    ...     base_sd_s=np.zeros(2), req_sd_s=np.zeros(2), kv_sd_s=np.zeros(2))
    >>> law.time_s([700, 1400, 1000], [10, 10, 10], [0, 0, 0]).round(4)
    array([0.022 , 0.011 , 0.0154])
    """

    form: Form
    clock_mhz: F64
    base_s: F64
    req_s: F64
    kv_s: F64
    base_sd_s: F64
    req_sd_s: F64
    kv_sd_s: F64
    floor_s: float = 0.0
    floor_sd_s: float = 0.0
    compute_s: float = 0.0
    compute_sd_s: float = 0.0
    host_s: float = 0.0
    host_sd_s: float = 0.0

    def at(self, freq_mhz: object) -> tuple[F64, F64, F64]:
        """Base, request and KV coefficients at any clock: linear in ``1/f``, level outside.

        Parameters
        ----------
        freq_mhz : array_like
            Clocks, any shape.

        Returns
        -------
        base_s, req_s, kv_s : ndarray
            Seconds per iteration, per executed request and per KV token, of the shape of
            `freq_mhz`.

        Examples
        --------
        >>> import numpy as np
        >>> flat = np.array([0.01])
        >>> law = DecodeTime(form="line", clock_mhz=np.array([1400.0]), base_s=flat, req_s=flat,
        ...                  kv_s=flat, base_sd_s=flat, req_sd_s=flat, kv_sd_s=flat)
        >>> law.at(1000.0)[0].item()
        0.01
        """
        period = 1.0 / np.asarray(freq_mhz, dtype=np.float64)
        known = 1.0 / self.clock_mhz[::-1]
        base, req, kv = (
            np.interp(period, known, values[::-1])
            for values in (self.base_s, self.req_s, self.kv_s)
        )
        return base, req, kv

    def time_s(self, freq_mhz: object, padded_req: object, kv_tok: object) -> F64:
        """Time of an iteration.

        Parameters
        ----------
        freq_mhz, padded_req, kv_tok : array_like
            Clock, executed batch, tokens in the KV cache.

        Returns
        -------
        ndarray
            Seconds.

        Examples
        --------
        >>> import numpy as np
        >>> flat = np.array([0.01])
        >>> law = DecodeTime(form="line", clock_mhz=np.array([1400.0]), base_s=flat, req_s=flat,
        ...                  kv_s=0 * flat, base_sd_s=flat, req_sd_s=flat, kv_sd_s=flat)
        >>> law.time_s(1400.0, 3, 100).item()
        0.04
        """
        freq = np.asarray(freq_mhz, dtype=np.float64)
        size = np.asarray(padded_req, dtype=np.float64)
        base, req, kv = self.at(freq)
        bent = np.maximum(base + req * size, self.compute_s * size / freq)
        time_s: F64 = np.maximum(self.floor_s, bent + kv * np.asarray(kv_tok, dtype=np.float64))
        return time_s + self.host_s


def fit_decode_time(
    table: IterationTable,
    form: Form = "line+floor",
    *,
    batch_steps: tuple[tuple[int, int], ...] = (),
    kv_s: float | None = None,
    near: DecodeTime | None = None,
) -> DecodeTime:
    """Robust regression of one form of the law on relative errors.

    Parameters
    ----------
    table : IterationTable
        Measured iterations; the decode rows count.
    form : {"line", "line+floor", "roofline", "roofline+floor"}
        Form of the law that is fitted.
    batch_steps : tuple of (upto_req, step_req)
        How batches are padded, see :class:`~voltana_ctrl.types.Profile`.
    kv_s : float, optional
        Known time per KV token at every clock, where the table cannot tell it.
    near : DecodeTime, optional
        Fit of a larger table of which this one is a fold: the search starts there too, and
        what the fold cannot support is not refused.

    Returns
    -------
    DecodeTime
        With standard deviations from the Jacobian.

    Raises
    ------
    ConfigError
        Naming the coefficient that the table cannot support, and what to measure.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> n = np.array([1.0, 8, 64, 1, 8, 64])
    >>> kv = n * np.array([100.0, 100, 100, 900, 900, 900])
    >>> zero = 0 * n
    >>> table = IterationTable(
    ...     phase=("decode",) * 6, freq_mhz=1410 + zero, batch_req=n, kv_tok=kv,
    ...     prefill_tok=zero, square_tok2=zero, wall_s=0.01 + 5e-5 * n + 8e-8 * kv,
    ...     energy_j=zero + 3)
    >>> law = fit_decode_time(table, "line")
    >>> law.base_s.round(6).item(), law.req_s.round(9).item(), law.kv_s.round(12).item()
    (0.01, 5e-05, 8e-08)
    """
    rows = table.of("decode")
    if len(rows) == 0:
        raise ConfigError("decode_time: the table has no decode rows; measure decode iterations")
    host_s, host_sd_s = host_time(rows.waited_s)
    if host_s > 0.0:
        rows = replace(rows, wall_s=np.maximum(rows.wall_s - host_s, 1e-9), host_s=None)
    problem = _Problem(rows, form, batch_steps, kv_s)
    if near is None:
        _check_supported(rows, known_kv=kv_s is not None)
        starts = problem.starts()
    else:
        # The line has one optimum; what bends may have several.
        starts = [problem.start_at(near), *(problem.starts()[:1] if form != "line" else ())]
    found = estimate(problem.residual, problem.jacobian, starts, problem.lower, problem.upper)
    return replace(problem.law(found), host_s=host_s, host_sd_s=host_sd_s)


def _check_supported(rows: IterationTable, *, known_kv: bool) -> None:
    for clock in np.unique(rows.freq_mhz):
        at = rows.freq_mhz == clock
        sizes = np.unique(rows.batch_req[at])
        where = f"at {clock:g} MHz"
        if len(sizes) < 3:
            raise ConfigError(
                f"decode_req_s: {len(sizes)} batch size(s) {where}; measure at least 3, up to the"
                " largest that is served"
            )
        if known_kv:
            continue
        design = np.stack([np.ones(int(at.sum())), rows.batch_req[at], rows.kv_tok[at]], axis=1)
        design /= rows.wall_s[at, None]
        design /= np.maximum(np.linalg.norm(design, axis=0), 1e-300)
        # The part of the KV column that base and requests do not explain.
        basis, _ = np.linalg.qr(design[:, :2])
        left = design[:, 2] - basis @ (basis.T @ design[:, 2])
        if not np.linalg.norm(left) > 0.05:
            raise ConfigError(
                f"decode_kv_s: KV tokens grow with the batch alone {where}; measure the same batch"
                " sizes at two contexts or more, at least 4x apart, or give the coefficient as"
                " --fix decode_kv_s=VALUE (in Python fixed={'decode_kv_s': ...})"
            )


class _Problem:
    """Parameters: increments of base, of req, of kv per clock, then compute and floor.

    All are times of the order of the iteration: requests and tokens are counted in their
    largest measured number, the clock in its lowest.
    """

    def __init__(
        self,
        rows: IterationTable,
        form: Form,
        batch_steps: tuple[tuple[int, int], ...],
        kv_s: float | None,
    ) -> None:
        self.form = form
        self.clocks, self.index = np.unique(rows.freq_mhz, return_inverse=True)
        self.m = len(self.clocks)
        size = pad(rows.batch_req, batch_steps)
        self.size_ref = float(size.max())
        self.kv_ref = max(float(rows.kv_tok.max()), 1.0)
        self.size = size / self.size_ref
        self.kv = rows.kv_tok / self.kv_ref
        self.period = self.clocks[0] / rows.freq_mhz
        self.wall_s = rows.wall_s
        m = self.m
        self.lower = np.zeros(3 * m + 2)
        self.upper = np.full(3 * m + 2, np.inf)
        if kv_s is not None:
            known = np.zeros(m)
            known[-1] = kv_s * self.kv_ref
            self.lower[2 * m : 3 * m] = self.upper[2 * m : 3 * m] = known
        if not form.startswith("roofline"):
            self.upper[3 * m] = 0.0
        if not form.endswith("+floor"):
            self.upper[3 * m + 1] = 0.0
        # Cumulative sum from above: value[k] = sum of increments[k:].
        self.above = self.index[:, None] <= np.arange(m)[None, :]

    def _parts(self, p: F64) -> tuple[F64, Bool]:
        """Time without the floor, and which rows compute longer than they stream."""
        m, i = self.m, self.index
        line = falling(p[:m])[i] + falling(p[m : 2 * m])[i] * self.size
        compute = p[3 * m] * self.size * self.period
        bent: F64 = np.maximum(line, compute) + falling(p[2 * m : 3 * m])[i] * self.kv
        return bent, compute > line

    def residual(self, p: F64) -> F64:
        time_s: F64 = np.maximum(self._parts(p)[0], p[-1])
        return np.log(np.maximum(time_s, 1e-12) / self.wall_s)

    def jacobian(self, p: F64) -> F64:
        m = self.m
        bent, computes = self._parts(p)
        line = self.above * ~computes[:, None]
        jac = np.zeros((len(bent), 3 * m + 2))
        jac[:, :m] = line
        jac[:, m : 2 * m] = line * self.size[:, None]
        jac[:, 2 * m : 3 * m] = self.above * self.kv[:, None]
        jac[:, 3 * m] = computes * self.size * self.period
        on_floor = bent < p[-1]
        jac[on_floor] = 0.0
        jac[on_floor, -1] = 1.0
        jac /= np.maximum(np.maximum(bent, p[-1]), 1e-12)[:, None]
        return jac

    def starts(self) -> list[F64]:
        m = self.m
        design = np.concatenate(
            [self.above, self.above * self.size[:, None], self.above * self.kv[:, None]], axis=1
        )
        start = np.concatenate([linear(design, self.wall_s), np.zeros(2)])
        # Off the bounds, where a trust-region step can begin.
        start[: 3 * m] = np.maximum(start[: 3 * m], 1e-4 * self.wall_s.min())
        starts = []
        floors = np.zeros(1)
        if self.form.endswith("+floor"):
            # A floor shows first at the highest clock; below all rows it would have no gradient.
            floors = np.quantile(self.wall_s[self.index == m - 1], (0.25, 0.75))
        roof = self.form.startswith("roofline")
        # A roof that covers no row would have no gradient either.
        for floor in floors:
            for part in (0.9, 0.5) if roof else (0.0,):
                each = start.copy()
                each[3 * m :] = part * self.wall_s.max(), floor
                if roof:
                    each[m : 2 * m] *= 0.2
                starts.append(each)
        return starts

    def start_at(self, law: DecodeTime) -> F64:
        base, req, kv = law.at(self.clocks)
        steps = [
            -np.diff(np.append(values, 0.0))
            for values in (base, req * self.size_ref, kv * self.kv_ref)
        ]
        compute = law.compute_s * self.size_ref / self.clocks[0]
        return np.concatenate([*steps, [compute, law.floor_s]])

    def law(self, found: Estimate) -> DecodeTime:
        m, p, covariance = self.m, found.values, found.covariance
        total = np.triu(np.ones((m, m)))

        def values(block: int, unit: float) -> tuple[F64, F64]:
            part = slice(block * m, (block + 1) * m)
            spread = total @ covariance[part, part] @ total.T
            return falling(p[part]) / unit, np.sqrt(np.maximum(np.diag(spread), 0.0)) / unit

        base_s, base_sd_s = values(0, 1.0)
        req_s, req_sd_s = values(1, self.size_ref)
        kv_s, kv_sd_s = values(2, self.kv_ref)
        law = DecodeTime(
            form=self.form,
            clock_mhz=self.clocks,
            base_s=base_s,
            req_s=req_s,
            kv_s=kv_s,
            base_sd_s=base_sd_s,
            req_sd_s=req_sd_s,
            kv_sd_s=kv_sd_s,
        )
        bent, computes = self._parts(p)
        roof_sd, floor_sd = np.sqrt(np.maximum(np.diag(covariance)[-2:], 0.0))
        # Below every row nothing says that they exist.
        if np.any(computes):
            per = self.clocks[0] / self.size_ref
            law = replace(law, compute_s=float(p[-2] * per), compute_sd_s=float(roof_sd * per))
        if np.any(bent < p[-1]):
            law = replace(law, floor_s=float(p[-1]), floor_sd_s=float(floor_sd))
        return law
