"""Arrival rate and lengths by Kalman filters; a short-horizon forecast with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from voltana_ctrl.checks import F64, count, fraction, freeze_fields, not_negative, positive


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KalmanState:
    """Estimate of a linear system's state.

    Parameters
    ----------
    mean : ndarray, shape (k,)
        Expected state, before the next measurement.
    covariance : ndarray, shape (k, k)
        Covariance of the error of `mean`.

    Examples
    --------
    >>> KalmanState(mean=[1.0], covariance=[[2.0]]).mean
    array([1.])
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        size = np.asarray(self.mean).size
        freeze_fields(self, ("mean",), (size,))
        freeze_fields(self, ("covariance",), (size, size))


def kalman_step(
    state: KalmanState,
    transition: np.ndarray,
    process: np.ndarray,
    output: np.ndarray,
    measured: np.ndarray | None,
    noise: np.ndarray,
) -> KalmanState:
    """One measurement (or none) and one step ahead of ``x+ = A x + w``, ``y = C x + v``.

    The covariance is updated in Joseph's form, which stays positive definite.

    Parameters
    ----------
    state : KalmanState
        Prediction for the time of the measurement.
    transition, process : ndarray, shape (k, k)
        A, and the covariance of w.
    output : ndarray, shape (m, k)
        C: what of the state is measured.
    measured : ndarray, shape (m,), optional
        y; None where nothing was measured.
    noise : ndarray, shape (m, m)
        Covariance of v.

    Returns
    -------
    KalmanState
        Prediction for the next step.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.estimate import KalmanState
    >>> one = np.eye(1)
    >>> state = KalmanState(mean=[0.0], covariance=[[1.0]])
    >>> kalman_step(state, one, 0 * one, one, np.array([2.0]), one).mean
    array([1.])
    """
    mean, covariance = state.mean, state.covariance
    if measured is not None:
        crossed = output @ covariance
        spread = crossed @ output.T + noise
        gain = np.linalg.solve(spread, crossed).T
        mean = mean + gain @ (measured - output @ mean)
        kept = np.eye(len(mean)) - gain @ output
        covariance = kept @ covariance @ kept.T + gain @ noise @ gain.T
    mean = transition @ mean
    covariance = transition @ covariance @ transition.T + process
    return KalmanState(mean=mean, covariance=0.5 * (covariance + covariance.T))


def _correct(mean: F64, covariance: F64, row: F64, value: float, noise: float) -> KalmanState:
    """:func:`kalman_step` for one number measured of a state that stays: no system to solve."""
    along = covariance @ row
    gain = along / (float(row @ along) + noise)
    kept = -gain[:, None] * row
    kept.flat[:: len(gain) + 1] += 1.0
    after = kept @ covariance @ kept.T + noise * (gain[:, None] * gain)
    return KalmanState(
        mean=mean + gain * (value - float(row @ mean)), covariance=0.5 * (after + after.T)
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrivalState:
    """What is known of the arrivals.

    Parameters
    ----------
    t_s : float
        Time of the latest update.
    rate : KalmanState
        Level [req/s], then cosine and sine amplitude per harmonic of the period.
    prompt, output : KalmanState
        Mean prompt and output length [tok].
    dispersion_frac : float
        Variance of counts over their mean: 1 for Poisson arrivals, more for bursty ones.
    surprise_frac : float
        How many standard deviations the latest count differed from what was expected; negative
        where fewer arrived.
    burst : bool
        Whether that was more than `burst_sigma_frac`, upwards or downwards.

    Examples
    --------
    >>> from voltana_ctrl.estimate import ArrivalEstimator
    >>> ArrivalEstimator().init().burst
    False
    """

    t_s: float
    rate: KalmanState
    prompt: KalmanState
    output: KalmanState
    dispersion_frac: float = 1.0
    surprise_frac: float = 0.0
    burst: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Requests per second over a horizon.

    Parameters
    ----------
    mean_req_s : float
        Expected rate.
    low_req_s, high_req_s : float
        Interval for the *count* of the horizon, divided by its length. It covers both the
        uncertainty of the rate and the randomness of the arrivals.

    Examples
    --------
    >>> Forecast(mean_req_s=5.0, low_req_s=3.0, high_req_s=7.0).high_req_s
    7.0
    """

    mean_req_s: float
    low_req_s: float
    high_req_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalEstimator:
    """Kalman filters for arrival rate, prompt length and output length.

    The rate is a level that walks at random, plus harmonics of `period_s` where given. A count
    over ``dt`` is Poisson-like: its rate has variance ``dispersion rate / dt``; the dispersion
    is learned. A count beyond `burst_sigma` is a burst: the level's variance is opened so far
    that the filter follows within a few updates. Lengths are local levels whose measurement,
    the mean over the finished requests, is the more certain the more there were.

    Parameters
    ----------
    rate_drift_req_s : float
        Standard deviation of the level after one second of walking, per square root of the
        rate: 0.1 lets a rate of 25 req/s move by 0.5 req/s.
    length_drift_frac : float
        Standard deviation of a mean length after one second of walking, relative to it.
    length_spread_frac : float
        Standard deviation of a single request's length over the mean length.
    period_s : float, optional
        Period of the load, 86,400 for a day; none by default.
    harmonics : int
        How many harmonics of the period are learned; without a period it does nothing.
    burst_sigma_frac : float
        Standardised innovation that counts as a burst.
    start_req_s, start_prompt_tok, start_output_tok : float
        Where the estimates start, with a spread as large as they are.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> estimator = ArrivalEstimator()
    >>> state = estimator.init()
    >>> for tick in range(1, 301):
    ...     state = estimator.update(state, t_s=0.1 * tick, arrived_req=tick % 2 * 4)
    >>> round(estimator.rate_req_s(state))
    20
    >>> forecast = estimator.forecast(state, horizon_s=5.0)
    >>> forecast.low_req_s < 20.0 < forecast.high_req_s
    True
    """

    rate_drift_req_s: float = 0.1
    length_drift_frac: float = 0.01
    length_spread_frac: float = 1.2
    period_s: float | None = None
    harmonics: int = 1
    burst_sigma_frac: float = 4.0
    start_req_s: float = 10.0
    start_prompt_tok: float = 300.0
    start_output_tok: float = 200.0

    def __post_init__(self) -> None:
        for name in (
            "rate_drift_req_s", "length_drift_frac", "length_spread_frac", "burst_sigma_frac",
            "start_req_s", "start_prompt_tok", "start_output_tok",
        ):  # fmt: skip
            positive(f"ArrivalEstimator.{name}", getattr(self, name))
        count("ArrivalEstimator.harmonics", self.harmonics)
        if self.period_s is not None:
            positive("ArrivalEstimator.period_s", self.period_s)

    @property
    def _size(self) -> int:
        return 1 if self.period_s is None else 1 + 2 * self.harmonics

    def init(self, *, t_s: float = 0.0) -> ArrivalState:
        """State before the first count, which covers the time from `t_s` on."""
        mean = np.zeros(self._size)
        mean[0] = self.start_req_s
        return ArrivalState(
            t_s=t_s,
            rate=KalmanState(mean=mean, covariance=self.start_req_s**2 * np.eye(self._size)),
            prompt=_level(self.start_prompt_tok),
            output=_level(self.start_output_tok),
        )

    def update(
        self,
        state: ArrivalState,
        *,
        t_s: float,
        arrived_req: float,
        arrived_tok: float = 0.0,
        finished_req: float = 0.0,
        finished_tok: float = 0.0,
    ) -> ArrivalState:
        """State after the counts since the last update.

        Parameters
        ----------
        state : ArrivalState
            What is known before this update; it is not changed.
        t_s : float
            Time of this update, later than that of the last one.
        arrived_req, arrived_tok : float
            Requests that arrived, and their prompt tokens.
        finished_req, finished_tok : float
            Requests that finished, and their output tokens.

        Raises
        ------
        ConfigError
            If time did not advance or a count is negative or not finite.
        """
        for name, value in (
            ("arrived_req", arrived_req), ("arrived_tok", arrived_tok),
            ("finished_req", finished_req), ("finished_tok", finished_tok),
        ):  # fmt: skip
            not_negative(f"ArrivalEstimator.update: {name}", value)
        dt_s = t_s - state.t_s
        positive("ArrivalEstimator.update: t_s, less that of the last update", dt_s)
        # The state is the one of the last update; walk to now, then measure.
        mean, covariance = state.rate.mean, state.rate.covariance + self._process(state, dt_s)
        row = self._output(t_s - 0.5 * dt_s)
        expected = float(row @ mean)
        per_count = max(expected, 1.0 / dt_s, 1e-9) / dt_s
        noise = state.dispersion_frac * per_count
        error = arrived_req / dt_s - expected
        own = float(row @ covariance @ row)
        surprise = error / (own + noise) ** 0.5
        burst = abs(surprise) > self.burst_sigma_frac
        if burst:
            covariance[0, 0] += error**2
            own = float(row @ covariance @ row)
        rate = _correct(mean, covariance, row, arrived_req / dt_s, noise)
        # Expected square of the error is noise plus the rate's own variance.
        seen = min(max((error**2 - own) / per_count, 0.0), 100.0)
        weight = min(1.0, dt_s / 30.0)
        dispersion = max(1.0, state.dispersion_frac + weight * (seen - state.dispersion_frac))
        return ArrivalState(
            t_s=t_s,
            rate=rate,
            prompt=self._length(state.prompt, dt_s, arrived_req, arrived_tok),
            output=self._length(state.output, dt_s, finished_req, finished_tok),
            dispersion_frac=dispersion,
            surprise_frac=surprise,
            burst=burst,
        )

    def rate_req_s(self, state: ArrivalState, *, t_s: float | None = None) -> float:
        """Arrival rate at a time, by default that of the latest update; never negative."""
        at_s = state.t_s if t_s is None else t_s
        return max(0.0, float(self._output(at_s) @ state.rate.mean))

    def lengths_tok(self, state: ArrivalState) -> tuple[float, float]:
        """Mean prompt length and mean output length [tok], each at least 1."""
        return max(1.0, float(state.prompt.mean[0])), max(1.0, float(state.output.mean[0]))

    def forecast(
        self, state: ArrivalState, *, horizon_s: float, coverage_frac: float = 0.9
    ) -> Forecast:
        """Rate of arrivals over the next `horizon_s`, with an interval for how many will come.

        Parameters
        ----------
        state : ArrivalState
            What the latest :meth:`update` returned; the horizon begins at its time.
        horizon_s : float
            Length of the horizon.
        coverage_frac : float
            Probability that the count lies in the interval.

        Returns
        -------
        Forecast
            The rate expected in the middle of the horizon, and bounds of the count over
            `horizon_s`, all in requests per second.

        Raises
        ------
        ConfigError
            If the horizon is not positive or the coverage not between 0 and 1.
        """
        positive("forecast: horizon_s", horizon_s)
        fraction("forecast: coverage_frac", coverage_frac)
        middle_s = state.t_s + 0.5 * horizon_s
        output = self._output(middle_s)
        mean = max(0.0, float(output @ state.rate.mean))
        # The mean of a random walk over the horizon has a third of its variance at the end.
        drift = self._process(state, horizon_s) / 3.0
        spread = float(output @ (state.rate.covariance + drift) @ output)
        spread += state.dispersion_frac * mean / horizon_s
        half = NormalDist().inv_cdf(0.5 + 0.5 * coverage_frac) * spread**0.5
        return Forecast(mean_req_s=mean, low_req_s=max(0.0, mean - half), high_req_s=mean + half)

    def _process(self, state: ArrivalState, dt_s: float) -> F64:
        level = max(float(state.rate.mean[0]), 1.0)
        process = np.zeros((self._size, self._size))
        process[0, 0] = self.rate_drift_req_s**2 * level * dt_s
        if self.period_s is not None:
            # Amplitudes change over periods, the level within them.
            np.fill_diagonal(process[1:, 1:], 0.1 * process[0, 0] * dt_s / self.period_s)
        return process

    def _output(self, t_s: float) -> F64:
        row = np.ones(self._size)
        if self.period_s is not None:
            angle = 2.0 * np.pi * t_s / self.period_s * np.arange(1, self.harmonics + 1)
            row[1::2] = np.cos(angle)
            row[2::2] = np.sin(angle)
        return row

    def _length(self, state: KalmanState, dt_s: float, n_req: float, n_tok: float) -> KalmanState:
        mean, variance = float(state.mean[0]), float(state.covariance[0, 0])
        scale = max(mean, 1.0)
        variance += (self.length_drift_frac * scale) ** 2 * dt_s
        if n_req > 0.0:
            noise = (self.length_spread_frac * scale) ** 2 / n_req
            gain = variance / (variance + noise)
            mean += gain * (n_tok / n_req - mean)
            variance = (1.0 - gain) ** 2 * variance + gain**2 * noise
        return KalmanState(mean=np.array([mean]), covariance=np.array([[variance]]))


def _level(start: float) -> KalmanState:
    return KalmanState(mean=np.array([start]), covariance=np.array([[start**2]]))
