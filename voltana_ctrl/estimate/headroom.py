"""Margins on top of the governors' own: for short answers, and for what requests missed.

A request of ``d`` decoded tokens waits, at the hand-off from prefill, for the iteration under
way to end: a part ``u`` of one, evenly spread. The iteration that it joins takes a part ``j``
longer, since the clock still is that of a smaller batch. Its mean inter-token latency is then
``T (1 + (u + j) / d)``, so iterations of ``T = ITL / (1 + x)`` make a share

    ``mean over requests of clip(1 + j - x d, 0, 1)``

miss, whatever else goes well. Where iteration times vary by a standard deviation ``s`` about what
is expected, the mean of ``d`` of them varies by ``s / sqrt(d)``, and the share is

    ``mean over requests of E[clip(1 + j - x d + sqrt(d) s Z, 0, 1)]``,   ``Z`` standard normal,

which is a difference of two unit normal losses ``L(z) = E[max(0, Z - z)]``. Long answers hide the
wait and the noise, short ones do not: the margin ``x`` at which that share is what the promise
allows follows from the lengths of the answers that finished. What is left over, from a profile that
is wrong to prompts between the tokens of a colocated instance, is integrated by
:class:`voltana_ctrl.estimate.margin.MarginTracker`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, Bool, freeze_fields
from voltana_ctrl.estimate.margin import MarginState, MarginTracker
from voltana_ctrl.types import FleetSpec, RequestBatch, Slo, Tuning

__all__ = ["HeadroomFilter", "HeadroomMemory"]

#: Decoded tokens from which on the hand-off is not told apart.
_LONG_TOK = 64
#: Finished requests that the lengths remember, and long ones believed before any finished:
#: those that finish first are the short ones.
_MEMORY_REQ = 2000.0
_PRIOR_REQ = 150.0

#: Where the integrator of TTFT lies so far below zero, all is spent that may be late; and how far
#: it sinks: what was in time for long counts against a burst of misses.
_SPENT_FRAC, _SUNK_FRAC = 0.02, 0.04

#: Part of an iteration that the one in which a request joins takes longer: it begins at the clock
#: that was asked for a smaller batch. Seen with answers of 1 to 9 tokens at 40 to 60 req/s.
_JOINED_FRAC = 0.06
_LENGTHS = np.arange(1.0, _LONG_TOK + 1.0)
#: Largest margin that the hand-off may ask for, and how exactly it is found.
_MOST_FRAC, _EXACT_FRAC = 4.0, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadroomMemory:
    """What the margins rest on.

    Parameters
    ----------
    tracked : MarginState
        The integrators of the margins, see :class:`voltana_ctrl.estimate.MarginTracker`.
    short_req : ndarray, shape (64,)
        Weighted requests by decoded tokens, 1 to 64 and more.

    Examples
    --------
    >>> from voltana_ctrl.estimate import MarginState
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
        Promised TTFT and ITL, and the share of requests that must meet each.
    tuning : Tuning, optional
        Step, set point and range of the margins; the defaults if left out.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> filter = HeadroomFilter(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> filter.margins_frac(filter.init(), (0.02, 0.035))
    array([0.02 , 0.035])
    """

    def __init__(self, fleet: FleetSpec, slo: Slo, tuning: Tuning | None = None) -> None:
        self._tuning = tuning = tuning or Tuning()
        self._hands_off = not fleet.colocated
        self._miss_frac = 1.0 - slo.attainment
        # The governors hold the promise in the mean, so nothing is added until it is missed.
        # How far the integrators may fall. The margin of TTFT never falls below its least, and what
        # its integrator has sunk it must climb again.
        spare_frac = tuning.hand_off_spare_frac
        beside_frac = 0.0 if self._hands_off else tuning.beside_spare_frac
        self._least_frac = np.array([-spare_frac, -max(spare_frac, beside_frac)])
        self._tracker = MarginTracker(
            slo=slo, eta_frac=tuning.miss_step_frac,
            min_frac=min(-_SUNK_FRAC, float(self._least_frac.min())),
            max_frac=tuning.max_margin_frac, start_frac=0.0,
            set_point_frac=1.0 - tuning.miss_frac * self._miss_frac,
        )  # fmt: skip

    def init(self, added_frac: tuple[float, float] = (0.0, 0.0)) -> HeadroomMemory:
        """Memory before anything has finished.

        Parameters
        ----------
        added_frac : tuple of float
            What an earlier run had to add to the margins of TTFT and ITL; begun with.
        """
        short_req = np.zeros(_LONG_TOK)
        short_req[-1] = _PRIOR_REQ
        tracked = MarginState(raw_frac=np.clip(added_frac, 0.0, self._tuning.max_margin_frac))
        return HeadroomMemory(tracked=tracked, short_req=short_req)

    def update(
        self,
        memory: HeadroomMemory,
        finished: RequestBatch,
        *,
        running_req: float,
        feasible: bool | Bool,
        spends: bool = False,
    ) -> HeadroomMemory:
        """Memory after these requests.

        Parameters
        ----------
        memory : HeadroomMemory
            Memory before this update.
        finished : RequestBatch
            Their lengths and latencies.
        running_req : float
            Requests whose outcomes are on their way.
        feasible : bool or ndarray of bool, shape (2,)
            Whether the promises can be kept, or each of TTFT and ITL. If not, misses say nothing
            about a margin: an integrator above zero stays, and one below does not rise above it.
        spends : bool
            Whether clocks follow :meth:`spare_frac`: the integrator of TTFT then sinks deeper.
        """
        if len(finished) == 0:
            return memory
        decoded = np.minimum(finished.output_tok - 1.0, _LONG_TOK).astype(np.int64)
        came = np.bincount(decoded, minlength=_LONG_TOK + 1)[1:]
        keep = float(np.exp(-len(finished) / _MEMORY_REQ))
        # As high as it can get where the largest margin is enough (see the proof in
        # `voltana_ctrl.estimate.margin`); beyond it would only remember an overload. Where the
        # promises cannot be kept misses say nothing about a margin, but below zero there is none:
        # they use up what may be late.
        tuning, before = self._tuning, memory.tracked.raw_frac
        tracked = self._tracker.update(memory.tracked, finished)
        highest_frac = tuning.max_margin_frac + tuning.miss_step_frac * (running_req + 1.0)
        most = np.where(feasible, highest_frac, 0.0)
        least = np.minimum(self._least_frac, [-_SUNK_FRAC if spends else 0.0, 0.0])
        raw_frac = np.clip(tracked.raw_frac, least, most)
        known = np.asarray(feasible) | (before < 0.0)
        tracked = replace(tracked, raw_frac=np.where(known, raw_frac, before))
        return HeadroomMemory(tracked=tracked, short_req=keep * memory.short_req + came)

    def spare_frac(self, memory: HeadroomMemory) -> float:
        """How much of what may be late is not: 0 where the integrator of TTFT is not below zero.

        It is 1 where the integrator lies 0.02 or more below.

        Parameters
        ----------
        memory : HeadroomMemory
            What :meth:`update` returned.

        Examples
        --------
        >>> from dataclasses import replace
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.estimate import MarginState
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> filter = HeadroomFilter(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> memory = filter.init()
        >>> low = replace(memory, tracked=MarginState(raw_frac=[-0.01, 0.0]))
        >>> filter.spare_frac(memory), filter.spare_frac(low)
        (0.0, 0.5)
        """
        return min(1.0, max(0.0, -float(memory.tracked.raw_frac[0]) / _SPENT_FRAC))

    def hand_off_frac(self, memory: HeadroomMemory, noise_frac: float = 0.0) -> float:
        """ITL margin that the hand-off and the noise of iteration times ask for by themselves.

        Parameters
        ----------
        memory : HeadroomMemory
            What :meth:`update` returned.
        noise_frac : float
            Standard deviation of an iteration's time about what is expected.

        Returns
        -------
        float
            Relative, such as 0.03 for 3 %.
        """
        if not (self._hands_off or noise_frac > 0.0):
            return 0.0
        seen = np.flatnonzero(memory.short_req)
        part, decoded = memory.short_req[seen] / memory.short_req.sum(), _LENGTHS[seen]
        sd = noise_frac * np.sqrt(decoded)

        def missing_frac(margin_frac: float) -> float:
            spare = margin_frac * decoded
            if self._hands_off:
                return float(_clipped_mean(1.0 + _JOINED_FRAC - spare, sd) @ part)
            # Nobody waits: a request misses where the mean of its iterations is too long.
            return float(_normal_below(-spare / sd) @ part)

        # It never rises with the margin.
        low, high = 0.0, _MOST_FRAC
        while high - low > _EXACT_FRAC:
            middle = (low + high) / 2.0
            if missing_frac(middle) > self._tuning.miss_frac * self._miss_frac:
                low = middle
            else:
                high = middle
        return high

    def margins_frac(
        self, memory: HeadroomMemory, least_frac: tuple[float, float], noise_frac: float = 0.0
    ) -> F64:
        """Margins of TTFT and ITL, shape (2,).

        Parameters
        ----------
        memory : HeadroomMemory
            What :meth:`update` returned.
        least_frac : tuple of float
            What is kept free in any case.
        noise_frac : float
            See :meth:`hand_off_frac`.

        Returns
        -------
        ndarray, shape (2,)
            Of TTFT and ITL, relative: a prediction times one plus the margin must be within the
            promise.
        """
        ttft, itl = self._tracker.applied_frac(memory.tracked)
        hand_off = self.hand_off_frac(memory, noise_frac)
        # The margin of TTFT never falls below its least: where queues are short for long nobody
        # misses whatever the margin, and the next burst would find it low.
        added = max(0.0, float(itl)) if self._hands_off else float(itl)
        itl_frac = max(least_frac[1] + added, hand_off + float(itl))
        return np.array([least_frac[0] + max(0.0, float(ttft)), itl_frac])


def _normal_below(z: F64) -> F64:
    """Share of a standard normal below z."""
    from scipy.special import ndtr

    below: F64 = ndtr(z)
    return below


def _loss(z: F64) -> F64:
    """Unit normal loss ``E[max(0, Z - z)] = phi(z) - z (1 - Phi(z))``."""
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    loss: F64 = np.maximum(0.0, density - z * (1.0 - _normal_below(z)))
    return loss


def _clipped_mean(mean: F64, sd: F64) -> F64:
    """``E[clip(mean + sd Z, 0, 1)]``."""
    sd = np.maximum(sd, 1e-6)
    clipped: F64 = sd * (_loss(-mean / sd) - _loss((1.0 - mean) / sd))
    return clipped
