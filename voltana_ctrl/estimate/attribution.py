"""Joules and seconds per request and per request class.

Every iteration's energy is shared over the tokens it made or read: decode energy equally over
the requests that decoded, prefill energy over prompt tokens. Hosts that know who was in an
iteration use :func:`share_iterations`, which is exact. Where only counts are known,
:class:`EnergyLedger` charges a finished request the mean price per token of its instances over
the time it ran there. What is spent is what was charged plus what is still open, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voltana_ctrl.checks import F64, I64, count, freeze_fields, positive
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.estimate.lengths import RequestClasses
from voltana_ctrl.types import IterationBatch, RequestBatch

#: Numbers of several units, and whole numbers that name iterations.
Mixed = NDArray[np.float64]
Indices = ArrayLike

# Running sums per instance: decode energy, decode energy per running request, decode steps,
# prefill energy, prompt tokens.
_DECODE_J, _SHARE_J, _STEPS, _PREFILL_J, _PREFILL_TOK = range(5)
# Sums per class.
_REQUESTS, _CLASS_PREFILL_J, _CLASS_DECODE_J, _TTFT_S, _ITL_S, _PROMPT_TOK, _OUTPUT_TOK = range(7)


def split_iterations(
    iterations: IterationBatch, prefill_frac: ArrayLike | None = None
) -> tuple[F64, F64]:
    """Energy of each iteration that is for decode, and that is for prefill.

    Parameters
    ----------
    iterations : IterationBatch
        Iterations with their energy; NaN and negative count as 0.
    prefill_frac : array_like, shape (k,), optional
        Part of each *mixed* iteration that is prefill, as predicted; by tokens if left out.

    Returns
    -------
    decode_j, prefill_j : ndarray, shape (k,)
        Joules; their sum is the energy of the iteration.

    Raises
    ------
    ShapeError
        If `prefill_frac` does not fit.

    Examples
    --------
    >>> from voltana_ctrl import IterationBatch
    >>> both = IterationBatch(instance=[0], t_s=[1.0], wall_s=[0.1], freq_mhz=[1410.0],
    ...     batch_req=[10], prefill_tok=[30], kv_tok=[0], energy_j=[40.0])
    >>> split_iterations(both)
    (array([10.]), array([30.]))
    """
    energy_j = np.where(iterations.energy_j > 0.0, iterations.energy_j, 0.0)
    decode, prefill = iterations.batch_req, iterations.prefill_tok
    by_token = prefill / np.maximum(decode + prefill, 1e-300)
    part = by_token if prefill_frac is None else np.asarray(prefill_frac, dtype=np.float64)
    if part.shape != energy_j.shape:
        raise ShapeError(f"prefill_frac: expected shape {energy_j.shape}, got {part.shape}")
    part = np.where(prefill > 0.0, np.where(decode > 0.0, np.clip(part, 0.0, 1.0), 1.0), 0.0)
    prefill_j = energy_j * part
    return energy_j - prefill_j, prefill_j


def share_iterations(energy_j: ArrayLike, iteration: Indices, n_tok: ArrayLike) -> F64:
    """Energy of each participation of a request in an iteration.

    Parameters
    ----------
    energy_j : array_like, shape (k,)
        Energy of the iterations of one phase.
    iteration : array_like of int, shape (m,)
        Index in `energy_j` of the iteration of each participation.
    n_tok : array_like, shape (m,)
        Tokens the request made or read in it.

    Returns
    -------
    ndarray, shape (m,)
        Sums over an iteration to its energy, if it had a token at all.

    Raises
    ------
    ShapeError
        If shapes do not agree, or an iteration is not there.

    Examples
    --------
    >>> share_iterations([12.0, 5.0], [0, 0, 1], [1, 2, 1])
    array([4., 8., 5.])
    """
    energy = np.asarray(energy_j, dtype=np.float64)
    which = np.asarray(iteration, dtype=np.int64)
    tokens = np.asarray(n_tok, dtype=np.float64)
    if energy.ndim != 1 or which.ndim != 1 or which.shape != tokens.shape:
        raise ShapeError(
            "share_iterations: expected energies (k,), iterations (m,) and tokens (m,), got"
            f" {energy.shape}, {which.shape}, {tokens.shape}"
        )
    if which.size and not (which.min() >= 0 and which.max() < energy.size):
        raise ShapeError(f"share_iterations: expected iterations 0 to {energy.size - 1}")
    total = np.bincount(which, weights=tokens, minlength=energy.size)
    share: F64 = energy[which] * tokens / np.where(total > 0.0, total, 1.0)[which]
    return share


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestCost:
    """What finished requests cost.

    Parameters
    ----------
    request, request_class : ndarray of int, shape (k,)
        The host's number, and the class as :class:`RequestClasses` counts it.
    prefill_j, decode_j : ndarray, shape (k,)
        Energy of each request in either phase.

    Examples
    --------
    >>> RequestCost(request=[7], request_class=[0], prefill_j=[3.0], decode_j=[9.0]).energy_j
    array([12.])
    """

    request: I64
    request_class: I64
    prefill_j: F64
    decode_j: F64

    def __post_init__(self) -> None:
        shape = (np.asarray(self.request).size,)
        freeze_fields(self, ("request", "request_class"), shape, np.int64)
        freeze_fields(self, ("prefill_j", "decode_j"), shape)

    @property
    def energy_j(self) -> F64:
        """Prefill and decode together, shape (k,)."""
        total: F64 = self.prefill_j + self.decode_j
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LedgerState:
    """Running sums, their recent past, and what was charged per class.

    Parameters
    ----------
    past_s : ndarray, shape (h,)
        Times of the rows of `past`; the last row is now.
    past : ndarray, shape (h, n, 5)
        Running sums per instance: energy of decode, the same per request of the batch, decode
        iterations, energy of prefill, prompt tokens.
    charged : ndarray, shape (n_classes, 7)
        Requests, prefill and decode energy, TTFT, ITL, prompt and output tokens, summed.

    Examples
    --------
    >>> from voltana_ctrl.estimate import EnergyLedger
    >>> EnergyLedger(instances=2).init().past.shape
    (1, 2, 5)
    """

    past_s: F64
    past: Mixed
    charged: Mixed

    def __post_init__(self) -> None:
        for name in self.__slots__:
            getattr(self, name).flags.writeable = False

    @property
    def spent_j(self) -> float:
        """Energy of all iterations so far."""
        return float(self.past[-1, :, [_DECODE_J, _PREFILL_J]].sum())

    @property
    def charged_j(self) -> float:
        """Energy charged to finished requests."""
        return float(self.charged[:, [_CLASS_PREFILL_J, _CLASS_DECODE_J]].sum())

    @property
    def open_j(self) -> float:
        """Energy of requests still running, and what rounding of times left over."""
        return self.spent_j - self.charged_j

    def per_class(self) -> dict[str, F64]:
        """Means per class: requests, energy, latencies; each of shape (n_classes,).

        Returns
        -------
        dict
            `finished_req`; `energy_j_req` and `energy_j_tok`, joules per request and per output
            token; `ttft_s` and `itl_s`.

        Examples
        --------
        >>> from voltana_ctrl.estimate import EnergyLedger
        >>> sorted(EnergyLedger(instances=2).init().per_class())
        ['energy_j_req', 'energy_j_tok', 'finished_req', 'itl_s', 'ttft_s']
        """
        finished = self.charged[:, _REQUESTS]
        energy_j = self.charged[:, _CLASS_PREFILL_J] + self.charged[:, _CLASS_DECODE_J]
        each = np.maximum(finished, 1.0)
        return {
            "finished_req": finished.copy(),
            "energy_j_req": energy_j / each,
            "energy_j_tok": energy_j / np.maximum(self.charged[:, _OUTPUT_TOK], 1.0),
            "ttft_s": self.charged[:, _TTFT_S] / each,
            "itl_s": self.charged[:, _ITL_S] / each,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyLedger:
    """Charges finished requests from iteration counts; pure.

    A request that made ``o`` tokens on instance j over its last ``itl (o - 1)`` seconds is
    charged ``o - 1`` times j's mean energy per request and step over that time, and its prompt
    tokens at the mean energy per prompt token of its prefill instance while it was there.

    Parameters
    ----------
    instances : int
        How many the fleet has.
    classes : RequestClasses
        How requests are told apart.
    sample_s, keep_s : float
        Running sums are kept every `sample_s` for `keep_s`; longer requests are charged the
        mean of what is kept.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> from voltana_ctrl import IterationBatch, RequestBatch
    >>> ledger = EnergyLedger(instances=2)
    >>> ran = IterationBatch(instance=[0, 1], t_s=[0.1, 0.2], wall_s=[0.1, 0.1],
    ...     freq_mhz=[1410.0] * 2, batch_req=[0, 1], prefill_tok=[50, 0], kv_tok=[0, 51],
    ...     energy_j=[20.0, 30.0])
    >>> done = RequestBatch(request=[7], request_class=[0], prompt_tok=[50], output_tok=[2],
    ...     ttft_s=[0.1], itl_s=[0.1], prefill_instance=[0], decode_instance=[1])
    >>> state, cost = ledger.update(ledger.init(), t_s=0.2, iterations=ran, finished=done)
    >>> cost.prefill_j, cost.decode_j, state.open_j
    (array([20.]), array([30.]), 0.0)
    """

    instances: int
    classes: RequestClasses = field(default_factory=RequestClasses)
    sample_s: float = 1.0
    keep_s: float = 300.0

    def __post_init__(self) -> None:
        count("EnergyLedger.instances", self.instances)
        positive("EnergyLedger.sample_s", self.sample_s)
        if not self.sample_s <= self.keep_s < np.inf:
            raise ConfigError(
                f"EnergyLedger.keep_s: expected at least sample_s, {self.sample_s}, got"
                f" {self.keep_s}"
            )

    def init(self, *, t_s: float = 0.0) -> LedgerState:
        """Nothing spent."""
        return LedgerState(
            past_s=np.array([float(t_s)]),
            past=np.zeros((1, self.instances, 5)),
            charged=np.zeros((len(self.classes), 7)),
        )

    def update(
        self,
        state: LedgerState,
        *,
        t_s: float,
        iterations: IterationBatch,
        finished: RequestBatch,
        prefill_frac: ArrayLike | None = None,
    ) -> tuple[LedgerState, RequestCost]:
        """State after these records, and what the finished requests cost.

        Parameters
        ----------
        state : LedgerState
            What is known before this update; it is not changed.
        t_s : float
            Time now, at or after the latest update.
        iterations : IterationBatch
            Iterations since the last update; rows of unknown instances are left out.
        finished : RequestBatch
            Requests that finished since the last update.
        prefill_frac : array_like, shape (k,), optional
            Part of each mixed iteration that is prefill, see :func:`split_iterations`.

        Returns
        -------
        state, cost
            What to pass in next, and the energy of each request in `finished`, in its order.

        Raises
        ------
        ConfigError
            If time went back.
        """
        if not state.past_s[-1] <= t_s < np.inf:
            raise ConfigError(f"EnergyLedger.update: expected t_s >= {state.past_s[-1]}, got {t_s}")
        past_s, past = self._advance(state, t_s, self._sums(iterations, prefill_frac))
        key = self.classes.of(request_class=finished.request_class, prompt_tok=finished.prompt_tok)
        prefill_j, decode_j = _charge(past_s, past, finished)
        charged = state.charged.copy()
        columns = (
            np.ones(len(finished)), prefill_j, decode_j, finished.ttft_s, finished.itl_s,
            finished.prompt_tok, finished.output_tok,
        )  # fmt: skip
        for column, values in enumerate(columns):
            np.add.at(charged[:, column], key, np.where(np.isfinite(values), values, 0.0))
        cost = RequestCost(
            request=finished.request, request_class=key, prefill_j=prefill_j, decode_j=decode_j
        )
        return LedgerState(past_s=past_s, past=past, charged=charged), cost

    def _sums(self, iterations: IterationBatch, prefill_frac: ArrayLike | None) -> F64:
        decode_j, prefill_j = split_iterations(iterations, prefill_frac)
        known = (iterations.instance >= 0) & (iterations.instance < self.instances)
        steps = (iterations.batch_req > 0.0).astype(np.float64)
        columns = (
            decode_j, decode_j / np.maximum(iterations.batch_req, 1.0), steps,
            prefill_j, np.maximum(iterations.prefill_tok, 0.0),
        )  # fmt: skip
        sums = np.zeros((self.instances, 5))
        for column, values in enumerate(columns):
            finite = np.where(np.isfinite(values), values, 0.0)
            np.add.at(sums[:, column], iterations.instance[known], finite[known])
        return sums

    def _advance(self, state: LedgerState, t_s: float, new: F64) -> tuple[F64, F64]:
        """Running sums with now as their last row; the row before it only if it is a sample."""
        keep = len(state.past_s)
        if keep > 1 and state.past_s[-1] - state.past_s[-2] < self.sample_s:
            keep -= 1
        first = int(np.searchsorted(state.past_s[:keep], t_s - self.keep_s))
        first = min(first, keep - 1)
        return (
            np.append(state.past_s[first:keep], t_s),
            np.concatenate([state.past[first:keep], (state.past[-1] + new)[None]]),
        )


def _charge(past_s: F64, past: F64, finished: RequestBatch) -> tuple[F64, F64]:
    """Prefill and decode energy of each finished request."""
    prefill_j, decode_j = np.zeros(len(finished)), np.zeros(len(finished))
    n = past.shape[1]
    for r in range(len(finished)):
        made_tok = max(float(finished.output_tok[r]) - 1.0, 0.0)
        first_s = past_s[-1] - finished.itl_s[r] * made_tok
        where = int(finished.prefill_instance[r])
        if 0 <= where < n:
            price = _price(past_s, past[:, where], _PREFILL_J, _PREFILL_TOK,
                           first_s - finished.ttft_s[r], first_s)  # fmt: skip
            prefill_j[r] = price * finished.prompt_tok[r]
        where = int(finished.decode_instance[r])
        if 0 <= where < n and made_tok > 0.0:
            price = _price(past_s, past[:, where], _SHARE_J, _STEPS, first_s, past_s[-1])
            decode_j[r] = price * made_tok
    return prefill_j, decode_j


def _price(past_s: F64, sums: F64, energy: int, units: int, from_s: float, to_s: float) -> float:
    """Energy per unit between two times; over all that is kept where nothing ran between."""
    for start_s, end_s in ((from_s, to_s), (past_s[0], past_s[-1])):
        ends = np.array([start_s, end_s])
        spent_j = np.diff(np.interp(ends, past_s, sums[:, energy]))[0]
        done = np.diff(np.interp(ends, past_s, sums[:, units]))[0]
        if done > 1e-9:
            return float(spent_j / done)
    return 0.0
