"""Quantiles of output length by request class, learned as requests finish."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.checks import F64, I64, count, fraction, freeze_fields
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import RequestBatch

#: The whole numbers by which the host tells requests apart, one per request.
Keys = ArrayLike

#: Bins are of one token up to 16 and then grow by 6 %, which bounds the error of a quantile.
_EDGES_TOK = np.unique(np.round(np.concatenate([np.arange(17), 16.0 * 1.06 ** np.arange(1, 191)])))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClasses:
    """How requests are sorted into classes: by a number that the host gives, or by prompt length.

    Parameters
    ----------
    prompt_edges_tok : tuple of int
        Prompt lengths at which the next class begins; used where `host_classes` is 0.
    host_classes : int
        How many classes the host tells apart by the numbers 0, 1, ...; larger numbers count as the
        last class. With 0, the default, what the host says is ignored.

    Raises
    ------
    ConfigError
        If edges do not ascend.

    Examples
    --------
    >>> RequestClasses().of(request_class=[0, 0], prompt_tok=[30, 3000])
    array([0, 4])
    >>> RequestClasses(prompt_edges_tok=(64, 256)).names
    ['0-63', '64-255', '256-']
    >>> RequestClasses(host_classes=2).of(request_class=[1, 7], prompt_tok=[30, 3000])
    array([1, 1])
    """

    prompt_edges_tok: tuple[int, ...] = (64, 256, 1024, 2048, 8192)
    host_classes: int = 0

    def __post_init__(self) -> None:
        count("RequestClasses.host_classes", self.host_classes, minimum=0)
        before = 0
        for edge in self.prompt_edges_tok:
            count("RequestClasses.prompt_edges_tok", edge, minimum=before + 1)
            before = edge

    def __len__(self) -> int:
        return self.host_classes or len(self.prompt_edges_tok) + 1

    @property
    def names(self) -> list[str]:
        """What the classes are called: keys of the host, or ranges of prompt lengths."""
        if self.host_classes:
            return [str(key) for key in range(self.host_classes)]
        edges = (0, *self.prompt_edges_tok)
        return [*(f"{low}-{high - 1}" for low, high in pairwise(edges)), f"{edges[-1]}-"]

    def of(self, *, request_class: Keys, prompt_tok: ArrayLike) -> I64:
        """Class of each request.

        Parameters
        ----------
        request_class : array_like of int, shape (n,)
            The number that the host gave each request.
        prompt_tok : array_like, shape (n,)
            Prompt lengths.

        Returns
        -------
        ndarray of int, shape (n,)
            From 0 to below the number of classes.
        """
        if self.host_classes:
            keys: I64 = np.clip(np.asarray(request_class, np.int64), 0, self.host_classes - 1)
            return keys
        buckets: I64 = np.searchsorted(
            self.prompt_edges_tok, np.asarray(prompt_tok, np.float64), side="right"
        ).astype(np.int64)
        return buckets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthState:
    """Discounted counts of finished requests by class and output length.

    Parameters
    ----------
    weight_req : ndarray, shape (n_classes + 1, n_bins)
        Discounted counts; the last row is over all classes.

    Examples
    --------
    >>> from voltana_ctrl.estimate import LengthEstimator
    >>> LengthEstimator().init().weight_req.sum()
    np.float64(0.0)
    """

    weight_req: F64

    def __post_init__(self) -> None:
        freeze_fields(self, ("weight_req",), np.asarray(self.weight_req).shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthEstimator:
    """Online quantiles of output length by class.

    A histogram over bins of nearly constant ratio; a quantile is exact to a bin, 6 %. Each new
    request of a class discounts what was counted for it by ``1 / memory_req``. A class with fewer
    than `least_req` requests answers with all classes together.

    Parameters
    ----------
    classes : RequestClasses
        How requests are told apart.
    memory_req : float
        How many of its latest requests a class remembers, about.
    least_req : float
        A class with fewer (discounted) requests is not trusted by itself.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    A prompt of 100 tokens is of class 1, "64-255", whatever number the host gave.

    >>> from voltana_ctrl.types import RequestBatch
    >>> estimator = LengthEstimator()
    >>> done = RequestBatch(request=range(99), request_class=[0] * 99, prompt_tok=[100] * 99,
    ...     output_tok=range(1, 100), ttft_s=[0.1] * 99, itl_s=[0.03] * 99,
    ...     prefill_instance=[0] * 99, decode_instance=[1] * 99)
    >>> state = estimator.update(estimator.init(), done)
    >>> bool(abs(estimator.quantile_tok(state, 1, 0.5) - 50) < 3)
    True
    """

    classes: RequestClasses = field(default_factory=RequestClasses)
    memory_req: float = 2000.0
    least_req: float = 30.0

    def __post_init__(self) -> None:
        if not 1.0 < self.memory_req < np.inf:
            raise ConfigError(
                f"LengthEstimator.memory_req: expected a number > 1, got {self.memory_req}"
            )
        if not 1.0 <= self.least_req <= self.memory_req:
            raise ConfigError(
                f"LengthEstimator.least_req: expected 1 to memory_req, got {self.least_req}"
            )

    def init(self) -> LengthState:
        """Nothing seen."""
        return LengthState(weight_req=np.zeros((len(self.classes) + 1, len(_EDGES_TOK))))

    def update(self, state: LengthState, finished: RequestBatch) -> LengthState:
        """State after these requests.

        Parameters
        ----------
        state : LengthState
            What is known before this update; it is not changed.
        finished : RequestBatch
            Requests with their class and output length.

        Raises
        ------
        ShapeError
            If the state is of other classes.
        """
        if state.weight_req.shape[0] != len(self.classes) + 1:
            raise ShapeError(
                f"LengthEstimator.update: expected the state of {len(self.classes)} classes,"
                f" got {state.weight_req.shape[0] - 1}"
            )
        usable = np.isfinite(finished.output_tok) & (finished.output_tok >= 1.0)
        if not usable.any():
            return state
        key = self.classes.of(request_class=finished.request_class, prompt_tok=finished.prompt_tok)[
            usable
        ]
        bins = np.searchsorted(_EDGES_TOK, finished.output_tok[usable], side="right") - 1
        new = np.zeros_like(state.weight_req)
        np.add.at(new, (key, bins), 1.0)
        new[-1] = new[:-1].sum(axis=0)
        kept = (1.0 - 1.0 / self.memory_req) ** new.sum(axis=1, keepdims=True)
        return LengthState(weight_req=state.weight_req * kept + new)

    def quantile_tok(
        self, state: LengthState, request_class: int, quantile_frac: float, *, made_tok: float = 0.0
    ) -> float:
        """Output length [tok] that this fraction of a class does not exceed, to a bin.

        Parameters
        ----------
        state : LengthState
            What :meth:`update` returned.
        request_class : int
            See :meth:`RequestClasses.of`.
        quantile_frac : float
            Between 0 and 1.
        made_tok : float
            Tokens that the request has already: the quantile among those that got so far.

        Returns
        -------
        float
            Tokens, at least `made_tok` and at least 1; NaN before anything was seen.

        Raises
        ------
        ConfigError
            If the quantile is not between 0 and 1 or there is no such class.
        """
        fraction("quantile_frac", quantile_frac)
        if not 0 <= request_class < len(self.classes):
            raise ConfigError(
                f"request_class: expected 0 to {len(self.classes) - 1}, got {request_class}"
            )
        weight = state.weight_req[request_class]
        if weight.sum() < self.least_req:
            weight = state.weight_req[-1]
        if not weight.sum() > 0.0:
            return float("nan")
        weight = np.where(np.floor(made_tok) <= _EDGES_TOK, weight, 0.0)
        total = np.cumsum(weight)
        if not total[-1] > 0.0:
            return max(1.0, float(made_tok))  # longer than any seen: it may end now
        k = min(int(np.searchsorted(total, quantile_frac * total[-1])), len(total) - 1)
        return max(1.0, float(made_tok), _middle_tok(k))

    def mean_tok(self, state: LengthState, request_class: int) -> float:
        """Mean output length [tok] of a class; of all where it has too few; NaN before any."""
        weight = state.weight_req[request_class]
        if weight.sum() < self.least_req:
            weight = state.weight_req[-1]
        if not weight.sum() > 0.0:
            return float("nan")
        middles = np.array([_middle_tok(k) for k in range(len(weight))])
        return float(weight @ middles / weight.sum())


def _middle_tok(k: int) -> float:
    """Length that stands for a bin: the middle of the whole numbers in it."""
    if k + 1 == len(_EDGES_TOK):
        return float(_EDGES_TOK[k])
    return 0.5 * float(_EDGES_TOK[k] + _EDGES_TOK[k + 1] - 1.0)
