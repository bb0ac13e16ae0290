"""Margins on top of the governors' own: for short answers, and for what requests missed.

A request of ``d`` decoded tokens waits, at the hand-off from prefill, for the iteration under
way to end: a part ``u`` of one, evenly spread. Its mean inter-token latency is then
``T (1 + u / d)``, so iterations of ``T = ITL / (1 + x)`` make a share

    ``mean over requests of max(0, 1 - x d)``

miss, whatever else goes well. Long answers hide the wait, short ones do not: the margin ``x``
at which that share is what the promise allows follows from the lengths of the answers that
finished. What is left over, from a profile that is wrong to prompts between the tokens of a
colocated instance, is integrated by :class:`voltana_ctrl.estimate.margin.MarginTracker`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, freeze_fields
from voltana_ctrl.estimate.margin import MarginState, MarginTracker
from voltana_ctrl.types import FleetSpec, RequestBatch, Slo

__all__ = ["HeadroomFilter", "HeadroomMemory"]

#: Decoded tokens from which on the hand-off is not told apart.
_LONG_TOK = 64
#: Finished requests that the lengths remember, and long ones believed before any finished:
#: those that finish first are the short ones.
_MEMORY_REQ = 2000.0
_PRIOR_REQ = 200.0
#: Outcomes come as many requests late as are running; larger steps would swing.
_STEP_FRAC = 0.004
#: Prefill misses come by whole batches; so many on top of the promise are no chance.
_RUN_OF_MISSES = 40
_MAX_FRAC = 0.5

_LENGTHS = np.arange(1.0, _LONG_TOK + 1.0)
_MISSING = np.maximum(0.0, 1.0 - _LENGTHS / _LENGTHS[:, None])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadroomMemory:
    """What the margins rest on.

    Parameters
    ----------
    tracked : MarginState
        The integrators.
    short_req : ndarray, shape (64,)
        Weighted requests by decoded tokens, 1 to 64 and more.

    Examples
    --------
    >>> memory = HeadroomMemory(tracked=MarginState(raw_frac=[0.0, 0.0]), short_req=[0.0] * 64)
    >>> float(memory.short_req.sum())
    0.0
    """

    tracked: MarginState
    short_req: F64

    def __post_init__(self) -> None:
        freeze_fields(self, ("short_req",), (_LONG_TOK,))


class HeadroomFilter:
    """Margins of TTFT and ITL from what finished.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet; a colocated one hands nothing off.
    slo : Slo
        Promises.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> filter = HeadroomFilter(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> filter.extra_frac(filter.init(), (0.02, 0.035))
    array([0., 0.])
    """

    def __init__(self, fleet: FleetSpec, slo: Slo) -> None:
        self._hands_off = not fleet.colocated
        self._miss_frac = 1.0 - slo.attainment
        # The governors hold the promise in the mean, so nothing is added until it is missed.
        self._tracker = MarginTracker(
            slo=slo, eta_frac=_STEP_FRAC, min_frac=0.0, max_frac=_MAX_FRAC, start_frac=0.0,
            set_point_frac=slo.attainment,
        )  # fmt: skip

    def init(self) -> HeadroomMemory:
        """Nothing finished yet."""
        short_req = np.zeros(_LONG_TOK)
        short_req[-1] = _PRIOR_REQ
        return HeadroomMemory(tracked=self._tracker.init(), short_req=short_req)

    def update(
        self,
        memory: HeadroomMemory,
        finished: RequestBatch,
        *,
        running_req: float,
        feasible: bool,
    ) -> HeadroomMemory:
        """Memory after these requests.

        Parameters
        ----------
        memory : HeadroomMemory
            Of the time before.
        finished : RequestBatch
            Their lengths and latencies.
        running_req : float
            Requests whose outcomes are on their way.
        feasible : bool
            Whether the promises can be kept. If not, misses say nothing about a margin.
        """
        if len(finished) == 0:
            return memory
        decoded = np.minimum(finished.output_tok - 1.0, _LONG_TOK).astype(np.int64)
        came = np.bincount(decoded, minlength=_LONG_TOK + 1)[1:]
        keep = float(np.exp(-len(finished) / _MEMORY_REQ))
        tracked = memory.tracked
        if feasible:
            tracked = self._tracker.update(tracked, finished)
            # As high as it can get where the largest margin is enough (see the proof in
            # `voltana_ctrl.estimate.margin`); beyond it would only remember an overload.
            most = _MAX_FRAC + _STEP_FRAC * (running_req + 1.0)
            tracked = MarginState(
                raw_frac=np.minimum(tracked.raw_frac, most),
                finished_req=tracked.finished_req,
                missed_req=tracked.missed_req,
            )
        return HeadroomMemory(tracked=tracked, short_req=keep * memory.short_req + came)

    def hand_off_frac(self, memory: HeadroomMemory) -> float:
        """ITL margin that the hand-off alone asks for.

        Parameters
        ----------
        memory : HeadroomMemory
            Of :meth:`update`.
        """
        if not self._hands_off:
            return 0.0
        # At x = 1/k; linear in x between these.
        missing = _MISSING @ memory.short_req / memory.short_req.sum()
        return float(np.interp(self._miss_frac, missing, 1.0 / _LENGTHS))

    def extra_frac(self, memory: HeadroomMemory, margin_frac: tuple[float, float]) -> F64:
        """Margins of TTFT and ITL on top of the governors' own, shape (2,), >= 0.

        Parameters
        ----------
        memory : HeadroomMemory
            Of :meth:`update`.
        margin_frac : tuple of float
            The governors' own.
        """
        ttft, itl = self._tracker.applied_frac(memory.tracked)
        hand_off = max(0.0, self.hand_off_frac(memory) - margin_frac[1])
        return np.array([max(0.0, ttft - _RUN_OF_MISSES * _STEP_FRAC), itl + hand_off])
