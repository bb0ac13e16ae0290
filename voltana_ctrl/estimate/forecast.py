"""What will arrive, and how far that may be wrong: a mean and a reserve per lead time.

Several simple forecasts run side by side: levels, trends and curves over memories of different
length, a season where its period is told, and whatever the host brings. Each is a discounted
regression (a polynomial of degree 0, 1 or 2) or a Kalman filter, and each is checked against what
came, per lead time; the one with the least error is used. Errors are counted in square roots of
rates, where the spread of Poisson counts is the same at every rate. No trend is drawn out further
than it has been seen, and what falls does so by shares, so that nothing falls below nothing.

How far a forecast may be wrong is learnt from its own past errors, each one's for itself. The
*reserve* is the rate
that is exceeded with at most the chance asked for, by two rules of which the larger counts: the
quantile of the errors seen, to which a small weight of the unknown is added (as conformal
prediction adds the weight of one), and the normal quantile of their root mean square, which is
larger while few were seen. Until enough has been watched, the unknown alone weighs more than the
chance allowed and the reserve is infinite: nobody knows yet what this load can do.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from voltana_ctrl.checks import F64, fraction, freeze_fields, not_negative, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.estimate.arrivals import ArrivalEstimator, ArrivalState

__all__ = ["ForecastMemory", "Forecaster", "Outlook", "OwnForecast", "read_forecast"]

#: Expected rates [req/s] at a time [s] and leads [s] after it.
OwnForecast = Callable[[float, F64], F64]

#: Time constants over which levels, trends and curves are fitted.
_LEVEL_S, _TREND_S, _CURVE_S = (4.0, 15.0, 60.0), (10.0, 25.0, 80.0), (15.0, 40.0)
#: The level that is used until one has been checked.
_FIRST = 1
#: Leads between which mean rates are forecast.
_CELLS_S = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0)
#: How long the choice between forecasts remembers their errors.
_CHOICE_S = 300.0
#: A host's own forecast is used unless its mean squared error is so many times the least.
_ABSURD = 4.0
#: A mean squared error that is none.
_RIGHT = 1e-6
#: Edges between which errors are counted, in square roots of requests per second.
_EDGES = np.concatenate([[0.0], 0.05 * 1.1 ** np.arange(110)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlook:
    """Expected arrivals, and the reserve that what may come asks for.

    Parameters
    ----------
    edges_s : ndarray, shape (n_cells + 1,)
        Leads (seconds from now) between which rates are means; the first is 0.
    now_req_s : float
        Arrival rate now.
    mean_req_s, reserve_req_s : ndarray, shape (n_cells,)
        Expected rate, and the rate that is exceeded with the chance asked for; infinite while
        that is not known.

    Examples
    --------
    >>> outlook = Outlook(edges_s=[0.0, 10.0, 30.0], now_req_s=4.0, mean_req_s=[5.0, 8.0],
    ...                   reserve_req_s=[7.0, 12.0])
    >>> outlook.mean_at([0.0, 5.0, 20.0, 90.0]), outlook.reserve_at([5.0, 20.0, 90.0])
    (array([4., 5., 8., 8.]), array([ 7., 12., 12.]))
    """

    edges_s: F64
    now_req_s: float
    mean_req_s: F64
    reserve_req_s: F64

    def __post_init__(self) -> None:
        cells = np.asarray(self.edges_s).size - 1
        freeze_fields(self, ("edges_s",), (cells + 1,))
        freeze_fields(self, ("mean_req_s",), (cells,))
        reserve = np.array(self.reserve_req_s, dtype=np.float64)
        reserve.flags.writeable = False
        object.__setattr__(self, "reserve_req_s", reserve)

    def mean_at(self, lead_s: F64 | list[float]) -> F64:
        """Expected rate at these leads; the last cell's beyond it.

        Parameters
        ----------
        lead_s : array_like, shape (n,)
            Seconds from now.

        Returns
        -------
        ndarray, shape (n,)
            Requests per second.
        """
        middle_s = 0.5 * (self.edges_s[1:] + self.edges_s[:-1])
        at: F64 = np.interp(lead_s, [0.0, *middle_s], [self.now_req_s, *self.mean_req_s])
        return at

    def reserve_at(self, lead_s: F64 | list[float], *, ahead_s: float = math.inf) -> F64:
        """Rate that capacity should be able to carry at these leads.

        The margin is that of the cell that begins at or before each, but of no lead longer than
        `ahead_s`: who can act within that time need not know today what comes later.

        Parameters
        ----------
        lead_s : array_like, shape (n,)
            Seconds from now.
        ahead_s : float
            Longest time that it takes to act.

        Returns
        -------
        ndarray, shape (n,)
            Requests per second, infinite where too little has been seen.
        """
        known_s = np.minimum(lead_s, ahead_s)
        cell = np.searchsorted(self.edges_s, known_s, side="right") - 1
        margin = np.sqrt(self.reserve_req_s) - np.sqrt(self.mean_req_s)
        margin = margin[np.clip(cell, 0, len(margin) - 1)]
        at: F64 = (np.sqrt(self.mean_at(lead_s)) + margin) ** 2
        return at


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForecastMemory:
    """What a :class:`Forecaster` remembers.

    Parameters
    ----------
    t_s : float
        Time of the last update; negative before the first.
    partial_req : float
        Requests since the last whole step.
    times_s, counts_req : ndarray, shape (n_steps + 1,)
        Times of the last steps and arrivals up to them, oldest first; NaN where there was none.
    sums : ndarray, shape (n_memories, 8)
        Discounted sums of 1, u, ... u^4, and of y, u y, u^2 y over steps, u seconds from now, y
        rate.
    issued_req_s : ndarray, shape (n_steps, n_cells, n_forecasts + 1)
        What was forecast at each of the last steps, the one used last; NaN where nothing was.
    squares : ndarray, shape (n_cells, n_forecasts, 2)
        Discounted squared errors of each forecast, and their weight.
    used : ndarray of int, shape (n_cells,)
        Number of the forecast that is used for each cell.
    tail : ndarray, shape (n_cells, n_forecasts, n_bins)
        Weight of the errors of each, in independent windows, by size.
    spread : ndarray, shape (n_cells, n_forecasts)
        Weighted sum of their squares.
    season : ArrivalState, optional
        State of the seasonal filter, where there is one.

    Examples
    --------
    >>> from voltana_ctrl.estimate import Forecaster
    >>> Forecaster().init().t_s
    -1.0
    """

    t_s: float
    partial_req: float
    times_s: F64
    counts_req: F64
    sums: np.ndarray
    issued_req_s: F64
    squares: np.ndarray
    used: np.ndarray
    tail: np.ndarray
    spread: np.ndarray
    season: ArrivalState | None = None


class Forecaster:
    """Forecasts arrivals and learns from its errors how much to keep in reserve.

    Deterministic: the same counts at the same times give the same outlook.

    Parameters
    ----------
    short_frac : float
        Chance that the reserve is exceeded: the share of time in which capacity held to it may
        be short.
    edges_s : sequence of float
        Leads between which mean rates are forecast, from 0 on, ascending.
    step_s : float
        Counts are taken over steps of this length; edges are multiples of it.
    unknown : float
        Weight of an error that nobody has seen, in windows as long as the lead: the reserve is
        infinite until ``unknown / short_frac`` of them have passed.
    memory_s : float
        How long errors are remembered.
    period_s : float, optional
        Period of the load, 86,400 for a day; a seasonal forecast then runs with the others.
    own : callable, optional
        A host's own forecast: ``own(t_s, lead_s)`` gives the expected rates at these leads after
        that time. It is used unless it is not finite, or clearly worse than the others.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> forecaster = Forecaster(short_frac=0.01, unknown=0.05)
    >>> memory = forecaster.init()
    >>> for second in range(101):
    ...     memory = forecaster.update(memory, t_s=float(second), arrived_req=20.0)
    >>> outlook = forecaster.outlook(memory)
    >>> outlook.mean_at([0.0, 30.0]).round(1)
    array([20., 20.])
    >>> outlook.reserve_at([5.0, 100.0])  # of long leads too little has been seen
    array([20., inf])
    """

    def __init__(
        self,
        *,
        short_frac: float = 0.0025,
        edges_s: tuple[float, ...] = _CELLS_S,
        step_s: float = 1.0,
        unknown: float = 0.01,
        memory_s: float = 14_400.0,
        period_s: float | None = None,
        own: OwnForecast | None = None,
    ) -> None:
        fraction("Forecaster.short_frac", short_frac)
        positive("Forecaster.step_s", step_s)
        positive("Forecaster.unknown", unknown)
        positive("Forecaster.memory_s", memory_s)
        edges = np.asarray(edges_s, dtype=np.float64)
        steps = np.rint(edges / step_s)
        if edges.size < 2 or edges[0] != 0.0 or not np.all(np.diff(steps) > 0.0):
            raise ConfigError(
                "Forecaster.edges_s: expected leads ascending from 0, at least one step of"
                f" {step_s:g} s apart, got {edges_s}"
            )
        self.edges_s = steps * step_s
        self.short_frac = short_frac
        self._step_s = step_s
        self._unknown = unknown
        self._memory_s = memory_s
        self._own = own
        self._season = None if period_s is None else ArrivalEstimator(period_s=period_s)
        self._ends = steps[1:].astype(np.int64)
        self._widths = np.diff(steps).astype(np.int64)
        self._middle_s = 0.5 * (self.edges_s[1:] + self.edges_s[:-1])
        self._taus_s = np.array([*_LEVEL_S, *_TREND_S, *_CURVE_S])
        degree = np.repeat([0, 1, 2], [len(_LEVEL_S), len(_TREND_S), len(_CURVE_S)])
        # Which powers a fit has, shape (n_memories, 3).
        self._has = np.arange(3) <= degree[:, None]
        # A trend goes on for as long as it is remembered.
        on_s = -self._taus_s * np.expm1(-self._middle_s[:, None] / self._taus_s)
        self._powers = on_s[:, :, None] ** np.arange(3)
        self._n = len(self._taus_s) + (period_s is not None) + (own is not None)
        self._normal = NormalDist().inv_cdf(1.0 - short_frac)

    def init(self) -> ForecastMemory:
        """Nothing seen yet."""
        steps, cells = int(self._ends[-1]), len(self._ends)
        return ForecastMemory(
            t_s=-1.0,
            partial_req=0.0,
            times_s=np.full(steps + 1, np.nan),
            counts_req=np.full(steps + 1, np.nan),
            sums=np.zeros((len(self._taus_s), 8)),
            issued_req_s=np.full((steps, cells, self._n), np.nan),
            squares=np.zeros((cells, self._n, 2)),
            used=np.full(cells, _FIRST),
            tail=np.zeros((cells, self._n, len(_EDGES) + 1)),
            spread=np.zeros((cells, self._n)),
            season=None if self._season is None else self._season.init(),
        )

    def update(self, memory: ForecastMemory, *, t_s: float, arrived_req: float) -> ForecastMemory:
        """Memory after these arrivals.

        Parameters
        ----------
        memory : ForecastMemory
            What is known before this update; it is not changed.
        t_s : float
            Time now.
        arrived_req : float
            Requests since the last update.

        Raises
        ------
        ConfigError
            If the count is negative or not finite.
        """
        not_negative("Forecaster.update: arrived_req", arrived_req)
        if memory.t_s < 0.0:
            # What arrived before the first look arrived in a time that nobody knows.
            times, counts = _pushed(memory.times_s, t_s), _pushed(memory.counts_req, 0.0)
            season = memory.season if memory.season is None else replace(memory.season, t_s=t_s)
            return replace(memory, t_s=t_s, times_s=times, counts_req=counts, season=season)
        memory = replace(memory, t_s=t_s, partial_req=memory.partial_req + arrived_req)
        if t_s - memory.times_s[-1] < self._step_s * (1.0 - 1e-6):
            return memory
        return self._stepped(memory)

    def _stepped(self, memory: ForecastMemory) -> ForecastMemory:
        """Take the step into account: check what was forecast for it, and forecast anew."""
        t_s, came_req = memory.t_s, memory.partial_req
        dt_s = t_s - float(memory.times_s[-1])
        rate = came_req / dt_s
        keep = np.exp(-dt_s / self._taus_s)
        # Everything moves back by dt; the new step lies half of it back.
        moved = _moved(dt_s)
        step = (-0.5 * dt_s) ** np.arange(5)
        sums = keep[:, None] * np.concatenate(
            [memory.sums[:, :5] @ moved, memory.sums[:, 5:] @ moved[:3, :3]], axis=1
        ) + np.concatenate([step, rate * step[:3]])
        season = memory.season
        if self._season is not None and season is not None:
            season = self._season.update(season, t_s=t_s, arrived_req=came_req)
        memory = replace(
            memory,
            partial_req=0.0,
            times_s=_pushed(memory.times_s, t_s),
            counts_req=_pushed(memory.counts_req, memory.counts_req[-1] + came_req),
            sums=sums,
            season=season,
        )
        memory = self._checked(memory)
        told = self._issue(memory)
        used = self._chosen(memory, told)
        return replace(memory, issued_req_s=_pushed(memory.issued_req_s, told), used=used)

    def _checked(self, memory: ForecastMemory) -> ForecastMemory:
        """Compare what came with what was forecast for it, in square roots."""
        squares = memory.squares * math.exp(-self._step_s / _CHOICE_S)
        kept = math.exp(-self._step_s / self._memory_s)
        tail, spread = memory.tail * kept, memory.spread * kept
        which = np.arange(self._n)
        for cell, (end, width) in enumerate(zip(self._ends, self._widths, strict=True)):
            told = memory.issued_req_s[-end, cell]
            said = np.isfinite(told)
            if not said.any():
                continue
            span_s = memory.times_s[-1] - memory.times_s[-1 - width]
            came = (memory.counts_req[-1] - memory.counts_req[-1 - width]) / span_s
            error = np.where(said, math.sqrt(came) - np.sqrt(told), 0.0)
            squares[cell, :, 0] += error**2
            squares[cell, :, 1] += said
            # Windows as long as the lead that overlap count as one.
            weight = said / max(end - width, width)
            tail[cell, which, np.searchsorted(_EDGES, error - 1e-9)] += weight
            spread[cell] += weight * error**2
        return replace(memory, squares=squares, tail=tail, spread=spread)

    def _issue(self, memory: ForecastMemory) -> F64:
        """What each forecast says of each cell, shape (n_cells, n_forecasts); NaN for nothing."""
        sums, has = memory.sums, self._has
        # Normal equations of the polynomials; powers that one has not are left out.
        square = np.where(
            has[:, :, None] & has[:, None, :], sums[:, np.add.outer(range(3), range(3))], 0.0
        )
        square += np.eye(3) * np.where(has, [0.0, 1e-9, 1e-9], 1.0)[:, :, None]
        fit = np.linalg.solve(square, np.where(has, sums[:, 5:], 0.0)[:, :, None])[:, :, 0]
        now = np.maximum(fit[:, 0], 1e-9)
        change = np.einsum("cmp,mp->cm", self._powers[:, :, 1:], fit[:, 1:])
        # What falls does so by shares.
        told = np.where(change < 0.0, now * np.exp(np.minimum(change, 0.0) / now), now + change)
        # A fit needs one memory of data more for each power.
        early = sums[:, 0] * self._step_s < -self._taus_s * np.expm1(1.0 - has.sum(axis=1))
        told[:, early] = np.nan
        if self._season is not None and memory.season is not None:
            season = [
                self._season.rate_req_s(memory.season, t_s=memory.t_s + middle_s)
                for middle_s in self._middle_s
            ]
            told = np.column_stack([told, season])
        if self._own is not None:
            told = np.column_stack([told, self._told_by_host(memory.t_s, fit[_FIRST, 0])])
        least: F64 = np.maximum(told, 0.0)
        return least

    def _chosen(self, memory: ForecastMemory, told: F64) -> np.ndarray:
        """Which is used for each cell: the host's unless absurd, or that of least error."""
        squared, weight = memory.squares[:, :, 0], memory.squares[:, :, 1]
        able = (weight > 0.0) & np.isfinite(told)
        mean_square = np.where(able, squared / np.maximum(weight, 1e-300), np.inf)
        least = self._n - (self._own is not None)
        # Nobody goes by one whose errors are not known yet, as long as those of others are.
        known = able & (self._allowed(memory.tail.sum(axis=2)) >= 0.0)
        some = known[:, :least].any(axis=1, keepdims=True)
        error = np.where(known | ~some, mean_square, np.inf)[:, :least]
        # Of those that are as good as right the simplest.
        best = np.argmin(np.maximum(error, _RIGHT), axis=1)
        used = np.where(able[:, :least].any(axis=1), best, _FIRST)
        if self._own is not None:
            limit = _ABSURD * mean_square[np.arange(len(used)), used] + 1e-12
            absurd = able[:, least] & (mean_square[:, least] > limit)
            used = np.where(absurd, used, least)
        return used

    def _told_by_host(self, t_s: float, otherwise_req_s: float) -> F64:
        """The host's own rates; where they are no numbers, the level."""
        own = self._own
        told = np.asarray(own(t_s, self._middle_s) if own else np.nan, dtype=np.float64)
        told = np.broadcast_to(told, self._middle_s.shape)
        return np.where(np.isfinite(told) & (told >= 0.0), told, otherwise_req_s)

    def outlook(self, memory: ForecastMemory) -> Outlook:
        """Mean and reserve of every cell from now on.

        Parameters
        ----------
        memory : ForecastMemory
            What :meth:`update` returned.

        Returns
        -------
        Outlook
            Leads count from the last update. Before the first forecast the mean is 0 and the
            reserve infinite.
        """
        cells = len(self._ends)
        mean = memory.issued_req_s[-1, np.arange(cells), memory.used]
        if np.isnan(mean).any():
            return Outlook(
                edges_s=self.edges_s, now_req_s=0.0, mean_req_s=np.zeros(cells),
                reserve_req_s=np.full(cells, np.inf),
            )  # fmt: skip
        s0, y0 = memory.sums[_FIRST, [0, 5]]
        root = np.sqrt(mean)
        return Outlook(
            edges_s=self.edges_s,
            now_req_s=float(y0 / s0),
            mean_req_s=mean,
            reserve_req_s=(root + self._margin(memory)) ** 2,
        )

    def _allowed(self, seen: F64) -> F64:
        """Weight of errors that may exceed the reserve, of so much that was seen."""
        return self.short_frac * (seen + self._unknown) - self._unknown

    def _margin(self, memory: ForecastMemory) -> F64:
        """What is added to the square root of the mean, shape (n_cells,)."""
        cells = np.arange(len(memory.used))
        tail, spread = memory.tail[cells, memory.used], memory.spread[cells, memory.used]
        seen = tail.sum(axis=1)
        # Weight of errors larger than each edge; the smallest edge with few enough above it.
        above = seen[:, None] - np.cumsum(tail[:, : len(_EDGES)], axis=1)
        allowed = self._allowed(seen)
        few = above <= allowed[:, None] + 1e-12
        quantile = np.where(
            (allowed >= 0.0) & few.any(axis=1), _EDGES[np.argmax(few, axis=1)], np.inf
        )
        rms = np.sqrt(spread / np.maximum(seen, 1e-300))
        margin: F64 = np.maximum(quantile, self._normal * rms)
        return margin


def read_forecast(path: str | Path) -> OwnForecast:
    r"""A host's own forecast from a CSV file with the columns ``t_s`` and ``req_s``.

    Between its rows rates are interpolated; before the first and after the last they stay.

    Parameters
    ----------
    path : str or Path
        The file; times ascend, on the clock of the run.

    Returns
    -------
    callable
        For :class:`Forecaster`.

    Raises
    ------
    ConfigError
        Naming file and row, if it cannot be read or does not fit.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "load.csv"
    ...     _ = path.write_text("t_s,req_s\n0,10\n100,30\n")
    ...     own = read_forecast(path)
    >>> own(40.0, np.array([0.0, 10.0, 500.0]))
    array([18., 20., 30.])
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"forecast {path}: cannot be read: {error}") from error
    times_s: list[float] = []
    rates_req_s: list[float] = []
    for number, row in enumerate(rows, start=2):
        try:
            if None in row:
                raise ValueError("more cells than columns")
            t_s, rate_req_s = float(row["t_s"]), float(row["req_s"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"forecast {path}, line {number}: expected numbers in columns t_s and req_s, got"
                f" {row}"
            ) from None
        if not (math.isfinite(t_s) and 0.0 <= rate_req_s < math.inf):
            raise ConfigError(
                f"forecast {path}, line {number}: expected a time and a rate of at least 0, got"
                f" {t_s} and {rate_req_s}"
            )
        if times_s and not t_s > times_s[-1]:
            raise ConfigError(
                f"forecast {path}, line {number}: expected a time after {times_s[-1]:g} s, got"
                f" {t_s:g} s; sort the file"
            )
        times_s.append(t_s)
        rates_req_s.append(rate_req_s)
    if not times_s:
        raise ConfigError(f"forecast {path}: expected at least one row of t_s,req_s, got none")

    return _Told(np.array(times_s), np.array(rates_req_s))


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """Rates of a file; no closure, so that it can be sent to other processes."""

    times_s: F64
    rates_req_s: F64

    def __call__(self, t_s: float, lead_s: F64) -> F64:
        told: F64 = np.interp(t_s + np.asarray(lead_s), self.times_s, self.rates_req_s)
        return told


def _moved(dt_s: float) -> F64:
    """What sums of powers of u become when every u has moved back by this: a binomial matrix."""
    return np.array(
        [
            [math.comb(k, j) * (-dt_s) ** (k - j) if j <= k else 0.0 for k in range(5)]
            for j in range(5)
        ]
    )


def _pushed(array: F64, newest: F64 | float) -> F64:
    """The array without its first entry, with this one at its end."""
    after = np.empty_like(array)
    after[:-1] = array[1:]
    after[-1] = newest
    return after
