r"""The margin that holds the promised attainment by itself.

A controller meets ``predicted (1 + margin) <= SLO``. Nobody tunes the margin: an online
quantile rule (adaptive conformal inference, Gibbs and Candes 2021, arXiv:2106.00170) moves it
at every finished request,

    ``u <- max(u + eta (miss - (1 - a')), margin_min)``,    applied: ``min(u, margin_max)``,

where ``miss`` is 1 if the request missed its target and ``a' = 1 - (1 - a) / 2`` lies above
the promise ``a``. The state ``u`` is not clipped above: outcomes are late, and an integrator
that forgets how often it missed while they were on their way settles below the promise.

**What is guaranteed.** Let no request that was decided at an applied margin of `margin_max`
miss, and let at most ``D`` other requests finish between the decision on a request and its own
end. Then over any ``T`` finished requests, whatever the errors of the predictor and in
whatever order,

    ``misses / T <= (1 - a') + (margin_max - margin_min + eta (D + 1)) / (eta T)``.

*Proof.* Number the outcomes ``t = 0 ... T - 1`` as they come in and write ``e = 1 - a'``. The
lower clip only raises ``u``, so ``u[t+1] >= u[t] + eta (miss[t] - e)``; summing,
``sum miss <= e T + (u[T] - u[0]) / eta``, and ``u[0] >= margin_min``. It is left to bound
``u[T]``. If ``u[T] <= margin_max`` nothing is to be shown. Otherwise let ``s`` be the last
index before ``T`` with ``u[s] <= margin_max`` (we start below). An outcome ``t`` belongs to a
decision made at some ``u[t - d]`` with ``d <= D``; for ``t >= s + 1 + D`` that is after ``s``,
hence at `margin_max`, hence no miss and ``u`` falls. Only the ``D + 1`` outcomes ``s ... s + D``
can raise it, each by less than ``eta``, so ``u[T] <= margin_max + eta (D + 1)``.

The bound is one-sided: a predictor that is always on the safe side leaves attainment above
target, and the margin at `margin_min`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.checks import F64, Bool, count, fraction, freeze_fields, positive
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import RequestBatch, Slo

__all__ = ["MarginState", "MarginTracker", "track"]

#: Whether each of some requests missed.
Outcomes = ArrayLike


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarginState:
    """Margins of one phase each: TTFT for prefill, ITL for decode.

    Parameters
    ----------
    raw_frac : ndarray, shape (2,)
        The integrators ``u`` of TTFT and ITL.
    finished_req, missed_req : ndarray, shape (2,)
        Requests judged so far, and how many missed.

    Examples
    --------
    >>> MarginState(raw_frac=[0.1, 0.1]).finished_req
    array([0., 0.])
    """

    raw_frac: F64
    finished_req: F64 = field(default_factory=lambda: np.zeros(2))
    missed_req: F64 = field(default_factory=lambda: np.zeros(2))

    def __post_init__(self) -> None:
        freeze_fields(self, ("raw_frac", "finished_req", "missed_req"), (2,))

    @property
    def attainment(self) -> F64:
        """Fraction of the finished requests that met TTFT and ITL; 1 before the first."""
        return 1.0 - self.missed_req / np.maximum(self.finished_req, 1.0)


def track(
    raw_frac: float, missed: Bool, *, eta_frac: float, miss_frac: float, min_frac: float
) -> float:
    """Integrator of a margin after these outcomes, taken in order.

    Parameters
    ----------
    raw_frac : float
        The integrator before.
    missed : ndarray of bool, shape (k,)
        Whether each request missed.
    eta_frac : float
        How far a miss raises the margin.
    miss_frac : float
        Fraction of misses at which it stands still, ``1 - a'``.
    min_frac : float
        It is clipped here after every outcome.

    Returns
    -------
    float
        The integrator afterwards, a relative margin, at least `min_frac`.

    Examples
    --------
    >>> import numpy as np
    >>> round(track(0.1, np.array([True, False]), eta_frac=0.01, miss_frac=0.005,
    ...             min_frac=-0.4), 4)
    0.1099
    """
    if len(missed) == 0:
        return raw_frac
    # A clipped sum is a reflected one: the free path plus all that the clip pushed back.
    path = np.cumsum(eta_frac * (np.asarray(missed, dtype=np.float64) - miss_frac))
    pushed = max(0.0, min_frac - raw_frac - float(path.min()))
    return raw_frac + float(path[-1]) + pushed


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginTracker:
    """Settings of the margins; pure: :meth:`update` takes a state and returns the next.

    Parameters
    ----------
    slo : Slo
        Targets and the promised attainment.
    eta_frac : float
        Step per miss, at most 0.01.
    min_frac, max_frac : float
        Range of the applied margin.
    start_frac : float
        Margin before the first outcome.
    set_point_frac : float, optional
        The fraction that is tracked, above the promise; half the allowed misses by default.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> from voltana_ctrl import RequestBatch, Slo
    >>> tracker = MarginTracker(slo=Slo(ttft_s=0.6, itl_s=0.06))
    >>> state = tracker.init()
    >>> late = RequestBatch(request=[0], request_class=[0], prompt_tok=[9], output_tok=[5],
    ...     ttft_s=[0.7], itl_s=[0.03], prefill_instance=[0], decode_instance=[1])
    >>> tracker.applied_frac(tracker.update(state, late)).round(4)
    array([0.11, 0.1 ])
    >>> round(tracker.bound_frac(finished_req=100_000, late_req=500), 3)
    0.011
    """

    slo: Slo
    eta_frac: float = 0.01
    min_frac: float = -0.4
    max_frac: float = 1.0
    start_frac: float = 0.1
    set_point_frac: float | None = None

    def __post_init__(self) -> None:
        positive("MarginTracker.eta_frac", self.eta_frac)
        if self.eta_frac > 0.01:
            raise ConfigError(
                f"MarginTracker.eta_frac: expected at most 0.01, got {self.eta_frac}; larger steps"
                " swing the clock with every miss"
            )
        if not -1.0 < self.min_frac <= self.start_frac <= self.max_frac < np.inf:
            raise ConfigError(
                "MarginTracker: expected -1 < min_frac <= start_frac <= max_frac, got"
                f" {self.min_frac}, {self.start_frac}, {self.max_frac}"
            )
        if self.set_point_frac is not None:
            fraction("MarginTracker.set_point_frac", self.set_point_frac)
            if self.set_point_frac < self.slo.attainment:
                raise ConfigError(
                    f"MarginTracker.set_point_frac: expected at least the promise"
                    f" {self.slo.attainment}, got {self.set_point_frac}"
                )

    @property
    def miss_frac(self) -> float:
        """Fraction of misses at which the margins stand still, ``1 - a'``."""
        if self.set_point_frac is not None:
            return 1.0 - self.set_point_frac
        return (1.0 - self.slo.attainment) / 2.0

    def init(self) -> MarginState:
        """Margins before the first outcome."""
        return MarginState(raw_frac=np.full(2, self.start_frac))

    def update(self, state: MarginState, finished: RequestBatch) -> MarginState:
        """Margins after these requests, in the order in which they finished.

        Parameters
        ----------
        state : MarginState
            What is known before this update; it is not changed.
        finished : RequestBatch
            Their TTFT and ITL; NaN is a miss. Those that might wait do not count.
        """
        promised = finished.deferred == 0
        if not promised.any():
            return state
        met = (finished.ttft_s <= self.slo.ttft_s, finished.itl_s <= self.slo.itl_s)
        return self.update_misses(state, ~met[0][promised], ~met[1][promised])

    def update_misses(
        self, state: MarginState, ttft_missed: Outcomes, itl_missed: Outcomes
    ) -> MarginState:
        """Margins after these outcomes, where the host judges the requests itself.

        Parameters
        ----------
        state : MarginState
            What is known before this update; it is not changed.
        ttft_missed, itl_missed : array_like of bool, shape (k,)
            Outcomes in order; may differ in length, since TTFT is known earlier.

        Raises
        ------
        ShapeError
            If outcomes are not a plain sequence.
        """
        outcomes = []
        for name, missed in (("ttft_missed", ttft_missed), ("itl_missed", itl_missed)):
            array = np.asarray(missed, dtype=bool)
            if array.ndim != 1:
                raise ShapeError(f"{name}: expected shape (k,), got {array.shape}")
            outcomes.append(array)
        raw = [
            track(
                float(before),
                missed,
                eta_frac=self.eta_frac,
                miss_frac=self.miss_frac,
                min_frac=self.min_frac,
            )
            for before, missed in zip(state.raw_frac, outcomes, strict=True)
        ]
        return MarginState(
            raw_frac=np.array(raw),
            finished_req=state.finished_req + [len(missed) for missed in outcomes],
            missed_req=state.missed_req + [missed.sum() for missed in outcomes],
        )

    def applied_frac(self, state: MarginState) -> F64:
        """Margins to plan with: of TTFT and ITL, shape (2,)."""
        return np.minimum(state.raw_frac, self.max_frac)

    def bound_frac(self, *, finished_req: int, late_req: int) -> float:
        """Largest possible fraction of misses, if no request that had the largest margin misses.

        The proof stands in the docstring of the module ``voltana_ctrl.estimate.margin``.

        Parameters
        ----------
        finished_req : int
            Requests, from the start, over which it holds.
        late_req : int
            At most so many others finish between a decision and its outcome.

        Returns
        -------
        float
            A fraction of the requests; over few of them it may exceed 1.
        """
        count("MarginTracker.bound_frac: finished_req", finished_req)
        count("MarginTracker.bound_frac: late_req", late_req, minimum=0)
        swing = self.max_frac - self.min_frac + self.eta_frac * (late_req + 1)
        return self.miss_frac + swing / (self.eta_frac * finished_req)
