"""Margins on top of the governors' own: for short answers, and for what requests missed.

A request of ``d`` decoded tokens waits, at the hand-off from prefill, for the iteration under
way to end: a part ``u`` of one, evenly spread. Its mean inter-token latency is then
``T (1 + u / d)``, so iterations of ``T = ITL / (1 + x)`` make a share

    ``mean over requests of max(0, 1 - x d)``

miss, whatever else goes well. Long answers hide the wait, short ones do not: the margin ``x``
at which that share is what the promise allows follows from the lengths of the answers that
finished. What is left over, from a profile that is wrong to prompts between the tokens of a
colocated instance, is integrated by :class:`voltana_ctrl.margin.MarginTracker`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.control._groups import equal_groups
from voltana_ctrl.control.target import Load, TargetOptimiser, batch_limit_req
from voltana_ctrl.margin import MarginState, MarginTracker
from voltana_ctrl.types import FleetSpec, RequestBatch, Slo
from voltana_ctrl.types._check import F64, freeze_fields

__all__ = ["HeadroomFilter", "HeadroomMemory", "overload_frac"]

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
#: Power that is not worth a word.
_FREE_FRAC = 0.002

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
            # `voltana_ctrl.margin`); beyond it would only remember an overload.
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


def overload_frac(
    target: TargetOptimiser, load: Load, route_frac: F64, pace_frac: float = 1.0
) -> float:
    """ITL margin, on top of the governors' own, where not all promises can be kept.

    The least that serves in time as many of the requests, but for what the promise allows, as
    any would, and more where that is all but free: nothing is spent that buys no attainment.
    A margin, not a floor: it makes the clock rise with the batch, where a floor is high while
    the batch is small.

    Parameters
    ----------
    target : TargetOptimiser
        Whose fleet, promises and stations count.
    load : Load
        Arrivals and lengths.
    route_frac : ndarray, shape (n,)
        Share of the arrivals.
    pace_frac : float
        Decode iterations take so many times what profiles say.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.physics import length_moments
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> lengths = length_moments([240, 240], [200, 200])
    >>> [round(overload_frac(optimiser, Load(arrival_req_s=rate, lengths=lengths), np.ones(2)), 3)
    ...  for rate in (40.0, 49.0)]
    [0.0, 0.1]
    """
    # Loads Numba, which `import voltana_ctrl` must not.
    from voltana_ctrl._kernels.target import station

    fleet, slo, lengths = target.fleet, target.slo, load.lengths
    extra_frac = np.linspace(0.0, 0.4, 17)
    limit_s = slo.itl_s / (1.0 + 1.0 / max(1.0, lengths.output_tok - 1.0))
    most = 0.0
    for group in equal_groups(fleet, fleet.decode):
        i = int(group[np.argmax(route_frac[group])])
        instance = fleet.instances[i]
        step_s, power_w, _, prompt_s, prompt_w = target.station(instance, lengths, pace_frac)
        served, drawn_w = np.empty((2, len(extra_frac)))
        for k, extra in enumerate(extra_frac):
            fast = step_s <= slo.itl_s / (1.0 + target.margin_frac[1] + extra)
            needed = np.where(fast.any(axis=0), fast.argmax(axis=0), len(step_s) - 1)
            drawn_w[k], missed, _ = station(
                step_s, power_w, needed, prompt_s, prompt_w,
                load.arrival_req_s * route_frac[i], lengths.output_tok - 1.0,
                batch_limit_req(instance, lengths), limit_s, 0, instance.idle_w,
            )  # fmt: skip
            served[k] = 1.0 - missed
        least = int(np.argmax(served >= slo.attainment * served.max()))
        free = np.flatnonzero(drawn_w <= (1.0 + _FREE_FRAC) * drawn_w[least])[-1]
        most = max(most, extra_frac[max(free, least)])
    return float(most)
