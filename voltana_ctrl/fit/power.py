"""Power and energy: ``P0 + c g V2(g)`` under a cap, with ``g`` the clock in GHz.

Dynamic power is clock times voltage squared; the voltage is level up to a knee and rises
linearly above it, ``V2 = (1 + s max(0, g - knee))^2``. Both phases run on the same card, so
they share ``s`` and the knee:

    prefill power    P_p = min(cap, P0p + cp g V2)
    decode energy    E_d = T (P0d + cd g V2) + iter + req V2 n + kv V2 K
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.prefill import capped_from_mhz
from voltana_ctrl.fit.robust import Estimate, estimate, linear
from voltana_ctrl.fit.tables import IterationTable

__all__ = ["PowerLaw", "fit_power"]

# Distinct clocks below which a knee cannot be told from a straight line.
MIN_CLOCKS = 5
# Parameters in order; the two of the voltage come first.
_NAMES = (
    "rise_frac",
    "knee_mhz",
    "prefill_static_w",
    "prefill_dynamic_w",
    "decode_static_w",
    "decode_dynamic_w",
    "decode_iter_j",
    "decode_req_j",
    "decode_kv_j",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PowerLaw:
    """Power and energy coefficients of an instance, all its GPUs together.

    Parameters
    ----------
    rise_frac, knee_mhz : float
        Voltage: its relative rise over 1 GHz above the knee, and the knee.
    prefill_static_w, prefill_dynamic_w : float
        ``P0p``, and ``cp`` in watts at 1 GHz; NaN without prefill rows.
    decode_static_w, decode_dynamic_w : float
        ``P0d`` and ``cd``; NaN without decode rows.
    decode_iter_j, decode_req_j, decode_kv_j : float
        Joules per iteration, per request, per KV token.
    cap_w : float
        Power at which the card is held; inf where no clock reached it.
    capped_mhz : float
        Lowest measured clock at the cap, inf if none.
    sd : mapping of str to float
        Standard deviation of each fitted parameter.
    covariance : ndarray, shape (9, 9), optional
        Covariance of the fitted parameters, in the order above; none if they were not fitted.
    scatter_frac : float
        Relative standard deviation of the rows about the law.

    Examples
    --------
    >>> law = PowerLaw(
    ...     rise_frac=0.71, knee_mhz=1106.0, prefill_static_w=59.3, prefill_dynamic_w=197.3,
    ...     decode_static_w=78.0, decode_dynamic_w=57.0, decode_iter_j=0.76,
    ...     decode_req_j=0.0078, decode_kv_j=1.24e-5, cap_w=400.0, capped_mhz=1410.0, sd={})
    >>> law.prefill_w([1005, 1410]).round(1)
    array([257.6, 400. ])
    """

    rise_frac: float
    knee_mhz: float
    prefill_static_w: float
    prefill_dynamic_w: float
    decode_static_w: float
    decode_dynamic_w: float
    decode_iter_j: float
    decode_req_j: float
    decode_kv_j: float
    cap_w: float
    capped_mhz: float
    sd: dict[str, float]
    covariance: F64 | None = None
    scatter_frac: float = 0.0

    def voltage_square(self, freq_mhz: object) -> F64:
        """Square of the voltage relative to the one below the knee.

        Parameters
        ----------
        freq_mhz : array_like
            Clocks, any shape.

        Returns
        -------
        ndarray
            1 up to the knee.

        Examples
        --------
        >>> import numpy as np
        >>> nan = float("nan")
        >>> law = PowerLaw(
        ...     rise_frac=1.0, knee_mhz=1000.0, prefill_static_w=50.0, prefill_dynamic_w=200.0,
        ...     decode_static_w=nan, decode_dynamic_w=nan, decode_iter_j=nan, decode_req_j=nan,
        ...     decode_kv_j=nan, cap_w=np.inf, capped_mhz=np.inf, sd={})
        >>> law.voltage_square([900, 1500])
        array([1.  , 2.25])
        """
        g = np.asarray(freq_mhz, dtype=np.float64) / 1e3
        return _voltage_square(g, self.rise_frac, self.knee_mhz)

    def prefill_w(self, freq_mhz: object) -> F64:
        """Power of a prefill iteration.

        Parameters
        ----------
        freq_mhz : array_like
            Clocks, any shape.

        Returns
        -------
        ndarray
            Watts, never above the cap.

        Examples
        --------
        >>> import numpy as np
        >>> nan = float("nan")
        >>> law = PowerLaw(
        ...     rise_frac=0.0, knee_mhz=1000.0, prefill_static_w=50.0, prefill_dynamic_w=200.0,
        ...     decode_static_w=nan, decode_dynamic_w=nan, decode_iter_j=nan, decode_req_j=nan,
        ...     decode_kv_j=nan, cap_w=300.0, capped_mhz=np.inf, sd={})
        >>> law.prefill_w([1000, 1400])
        array([250., 300.])
        """
        g = np.asarray(freq_mhz, dtype=np.float64) / 1e3
        dynamic_w = self.prefill_dynamic_w * g * self.voltage_square(freq_mhz)
        power_w: F64 = np.minimum(self.cap_w, self.prefill_static_w + dynamic_w)
        return power_w

    def decode_j(self, freq_mhz: object, time_s: object, batch_req: object, kv_tok: object) -> F64:
        """Energy of a decode iteration.

        Parameters
        ----------
        freq_mhz, time_s, batch_req, kv_tok : array_like
            Clock, time of the iteration, requests, tokens in the KV cache.

        Returns
        -------
        ndarray
            Joules; the cap is not looked at.

        Examples
        --------
        >>> import numpy as np
        >>> nan = float("nan")
        >>> law = PowerLaw(
        ...     rise_frac=0.0, knee_mhz=1000.0, prefill_static_w=nan, prefill_dynamic_w=nan,
        ...     decode_static_w=80.0, decode_dynamic_w=50.0, decode_iter_j=1.0,
        ...     decode_req_j=0.01, decode_kv_j=0.0, cap_w=np.inf, capped_mhz=np.inf, sd={})
        >>> law.decode_j(1000.0, 0.01, 10, 0).round(3).item()
        2.4
        """
        g = np.asarray(freq_mhz, dtype=np.float64) / 1e3
        volt = self.voltage_square(freq_mhz)
        energy_j: F64 = (
            np.asarray(time_s, dtype=np.float64)
            * (self.decode_static_w + self.decode_dynamic_w * g * volt)
            + self.decode_iter_j
            + volt * self.decode_req_j * np.asarray(batch_req, dtype=np.float64)
            + volt * self.decode_kv_j * np.asarray(kv_tok, dtype=np.float64)
        )
        return energy_j

    def wider(self, table: IterationTable, time_s: F64) -> F64:
        """How many times wider an error of these energies is than that of rows that are well known.

        ``sqrt(1 + J C J' / s^2)``, as of any prediction by regression, with ``J`` the relative
        slopes of the energy by the parameters, ``C`` their covariance and ``s`` the scatter of the
        rows: next to 1 amid what was fitted, and large at a clock above the knee where no other one
        says how steeply the voltage rises.

        Parameters
        ----------
        table : IterationTable
            Loads and clocks.
        time_s : ndarray, shape (n,)
            Time of each row, without that of the host.

        Returns
        -------
        ndarray, shape (n,)
            1 where the law was not fitted.

        Examples
        --------
        >>> import numpy as np
        >>> from voltana_ctrl.fit import IterationTable, fit_power
        >>> f = np.arange(600.0, 1101.0, 50.0)
        >>> def at(f):
        ...     zero = 0 * f
        ...     return IterationTable(
        ...         phase=("prefill",) * len(f), freq_mhz=f, batch_req=1 + zero, kv_tok=zero,
        ...         prefill_tok=1000 + zero, square_tok2=1e6 + zero, wall_s=100 / f,
        ...         energy_j=(60 + 0.19 * f) * (1 + 0.01 * np.sin(f)) * 100 / f)
        >>> law, rows = fit_power(at(f)), at(np.array([850.0, 2500.0]))
        >>> amid, far = law.wider(rows, rows.wall_s)
        >>> bool(1.0 < amid < 1.2 < 1.5 < far)
        True
        """
        if self.covariance is None or not self.scatter_frac > 0.0:
            return np.ones(len(table))
        problem = _Problem(table, time_s, np.inf)
        voltage = np.array([self.rise_frac, self.knee_mhz])
        factors = np.nan_to_num([getattr(self, name) for name in _NAMES[2:]])
        design = problem.design(*voltage)
        slopes = []
        for step in np.diag(np.maximum(1e-4 * voltage, 1e-6)):
            apart = problem.design(*(voltage + step)) - problem.design(*(voltage - step))
            slopes.append(apart @ factors / (2.0 * step.sum()))
        jac = np.column_stack([*slopes, design]) / (design @ factors)[:, None]
        variance = np.einsum("ij,jk,ik->i", jac, self.covariance, jac)
        wider = np.ones(len(table))
        wider[problem.used] = np.sqrt(1.0 + np.maximum(variance, 0.0) / self.scatter_frac**2)
        return wider


def _voltage_square(g: F64, rise_frac: float, knee_mhz: float) -> F64:
    volt: F64 = 1.0 + rise_frac * np.maximum(0.0, g - knee_mhz / 1e3)
    return volt**2


def fit_power(
    table: IterationTable,
    time_s: F64 | None = None,
    *,
    rise_frac: float | None = None,
    knee_mhz: float | None = None,
    near: PowerLaw | None = None,
) -> PowerLaw:
    """Robust regression of the power of prefill and the energy of decode, one voltage for both.

    Rows at clocks that the power cap does not let the card reach say what the cap is and
    nothing else.

    Parameters
    ----------
    table : IterationTable
        Rows with energy count.
    time_s : ndarray, shape (n,), optional
        Time of each row that the laws are to be used with; default the measured.
    rise_frac, knee_mhz : float, optional
        Known voltage law, where the table cannot tell it. Give both or neither.
    near : PowerLaw, optional
        Fit of a larger table of which this one is a fold: the search starts there, and what
        the fold cannot support is not refused.

    Returns
    -------
    PowerLaw
        With standard deviations from the Jacobian.

    Raises
    ------
    ConfigError
        Naming the coefficient that the table cannot support, and what to measure.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> f = np.arange(600.0, 1401.0, 50.0)
    >>> g, zero = f / 1e3, 0 * f
    >>> power_w = 60 + 190 * g * (1 + 0.8 * np.maximum(0, g - 1.1)) ** 2
    >>> table = IterationTable(
    ...     phase=("prefill",) * len(f), freq_mhz=f, batch_req=1 + zero, kv_tok=zero,
    ...     prefill_tok=1000 + zero, square_tok2=1e6 + zero, wall_s=100 / f,
    ...     energy_j=power_w * 100 / f)
    >>> law = fit_power(table)
    >>> round(law.knee_mhz, 1), round(law.rise_frac, 3), round(law.prefill_static_w, 2)
    (1100.0, 0.8, 60.0)
    """
    time_s = table.wall_s if time_s is None else time_s
    if (rise_frac is None) != (knee_mhz is None):
        raise ConfigError(
            "voltage: expected both of rise_frac and knee_mhz, or neither, got"
            f" {rise_frac!r} and {knee_mhz!r}"
        )
    with_energy = ~np.isnan(table.energy_j)
    if not np.any(with_energy & (np.array(table.phase) != "idle")):
        raise ConfigError(
            "energy_j: no row has an energy or a power; measure with the energy counter of the GPU"
        )
    rows, time_s = table.rows(with_energy), time_s[with_energy]
    capped_mhz = near.capped_mhz if near is not None else capped_from_mhz(rows)
    problem = _Problem(rows, time_s, capped_mhz)
    # Which clocks are capped is the table's structure; how many watts that is, the fold tells.
    cap_w = problem.cap_w()
    if near is not None and np.isinf(cap_w):
        cap_w = near.cap_w
    if rise_frac is not None and knee_mhz is not None:
        known = (float(rise_frac), float(knee_mhz))
        starts, hold = [problem.start(*known)], True
    elif near is not None:
        starts = [problem.start(near.rise_frac, near.knee_mhz)]
        hold = near.rise_frac == 0.0
    else:
        problem.check_clocks()
        starts, hold = problem.search()
    found = problem.fit(starts, hold)
    values = dict(zip(_NAMES, (float(v) for v in found.values), strict=True))
    sd = np.sqrt(np.maximum(np.diag(found.covariance), 0.0))
    sds = {name: float(s) for name, s in zip(_NAMES, sd, strict=True)}
    for phase, present in (("prefill", problem.prefill), ("decode", problem.decode)):
        for name in _NAMES:
            if name.startswith(phase) and not np.any(present):
                values[name] = sds[name] = np.nan
    law = PowerLaw(
        **values,
        cap_w=cap_w,
        capped_mhz=capped_mhz,
        sd=sds,
        covariance=found.covariance,
        scatter_frac=found.scatter_frac,
    )
    if near is None and not hold:
        problem.check_knee(law)
    return law


class _Problem:
    def __init__(self, rows: IterationTable, time_s: F64, capped_mhz: float) -> None:
        phase = np.array(rows.phase)
        self.rows, self.time_s = rows, time_s
        self.capped: Bool = (phase == "prefill") & (rows.freq_mhz >= capped_mhz)
        self.decode: Bool = phase == "decode"
        self.prefill: Bool = (phase == "prefill") & ~self.capped
        self.used: Bool = self.decode | self.prefill
        self.g = rows.freq_mhz / 1e3
        self.energy_j = rows.energy_j

    def cap_w(self) -> float:
        """Median at capped clocks of the larger iterations: small ones do not reach the cap."""
        if not np.any(self.capped):
            return np.inf
        tok = self.rows.prefill_tok
        large = self.capped & (tok >= 0.5 * tok[self.capped].max())
        return float(np.median((self.energy_j / self.rows.wall_s)[large]))

    def design(self, rise_frac: float, knee_mhz: float) -> F64:
        """Columns of the seven coefficients, over the measured energy, rows that are used."""
        volt = _voltage_square(self.g, rise_frac, knee_mhz)
        dynamic = self.g * volt
        t, n, kv = self.time_s, self.rows.batch_req, self.rows.kv_tok
        p, d = self.prefill.astype(float), self.decode.astype(float)
        columns = [p * t, p * t * dynamic, d * t, d * t * dynamic, d, d * n * volt, d * kv * volt]
        return np.stack(columns, axis=1)[self.used]

    def start(self, rise_frac: float, knee_mhz: float) -> F64:
        solved = linear(self.design(rise_frac, knee_mhz), self.energy_j[self.used])
        return np.concatenate([[rise_frac, knee_mhz], solved])

    def _rss(self, start: F64) -> float:
        error = self.design(*start[:2]) @ start[2:] / self.energy_j[self.used] - 1.0
        return float(error @ error)

    def search(self) -> tuple[list[F64], bool]:
        """Starts, and whether the voltage is level: no knee lowers what is left enough."""
        g = self.g[self.used]
        flat = self.start(0.0, 1e3 * float(g.max()))
        knees = 1e3 * np.linspace(g.min(), g.max(), 16)[1:-1]
        grid = [self.start(s, knee) for knee in knees for s in (0.2, 0.4, 0.7, 1.1, 1.6)]
        best = min(grid, key=self._rss)
        n = len(g)
        # Two more parameters, by the Bayesian information criterion.
        left = max(self._rss(flat), 1e-300) / max(self._rss(best), 1e-300)
        if n * np.log(left) > 2.0 * np.log(n):
            return [best], False
        return [flat], True

    def fit(self, starts: list[F64], hold: bool) -> Estimate:
        energy_j = self.energy_j[self.used]
        unit = np.maximum(np.array([np.abs(start) for start in starts]).max(axis=0), 1e-12)
        lower = np.zeros(len(_NAMES))
        upper = np.full(len(_NAMES), np.inf)
        g = self.g[self.used]
        if hold:
            lower[:2] = upper[:2] = starts[0][:2] / unit[:2]
        else:
            lower[1], upper[1] = 1e3 * g.min() / unit[1], 1e3 * g.max() / unit[1]
            upper[0] = 20.0 / unit[0]
        for columns, present in ((slice(2, 4), self.prefill), (slice(4, 9), self.decode)):
            if not np.any(present):
                upper[columns] = 0.0

        def residual(p: F64) -> F64:
            values = p * unit
            error: F64 = self.design(*values[:2]) @ values[2:] / energy_j - 1.0
            return error

        scaled = [start / unit for start in starts]
        found = estimate(residual, None, scaled, lower, upper)
        return Estimate(
            values=found.values * unit,
            covariance=found.covariance * np.outer(unit, unit),
            cost=found.cost,
            scatter_frac=found.scatter_frac,
        )

    def check_clocks(self) -> None:
        clocks = np.unique(self.rows.freq_mhz[self.used])
        if len(clocks) < MIN_CLOCKS:
            raise ConfigError(
                f"voltage_knee_mhz: {len(clocks)} clock(s) below the power cap; measure at least"
                f" {MIN_CLOCKS}, two of them near the highest, or give the voltage law as"
                " --fix voltage_rise_frac=VALUE --fix voltage_knee_mhz=VALUE"
                " (in Python fixed={...})"
            )

    def check_knee(self, law: PowerLaw) -> None:
        clocks = np.unique(self.rows.freq_mhz[self.used])
        above = np.count_nonzero(clocks > law.knee_mhz)
        if above < 2:
            raise ConfigError(
                f"voltage_rise_frac: power bends upward between"
                f" {clocks[-2]:g} and {clocks[-1]:g} MHz, the last clock below the cap; measure"
                " two clocks or more above the bend, or give the voltage law as"
                " --fix voltage_rise_frac=VALUE --fix voltage_knee_mhz=VALUE"
                " (in Python fixed={...})"
            )
