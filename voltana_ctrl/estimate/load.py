"""What arrives, estimated from what is observed: the seam between estimators and the target.

Exponentially weighted: arrivals over time, lengths over finished requests. Those that finish
first are the short ones, so the mean output is the flow of decoded tokens, those of unfinished
requests included, over the flow of finished requests: the maximum-likelihood mean of censored
exponential lifetimes, and without bias in steady state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, freeze_fields
from voltana_ctrl.types import FleetSpec, Lengths, Load, Observation, Tuning

__all__ = ["LoadFilter", "LoadMemory"]

#: Prompts of arrivals are others than those that finished if the two means differ by more than so
#: many standard deviations and by this share, of so many that arrived and so many that finished.
_OTHER_SD, _OTHER_FRAC, _TELLING_REQ, _KNOWN_REQ = 5.0, 0.25, 50.0, 200.0

#: Moments kept per request of l prompt and d decoded tokens:
#: 1, l, l^2, d, d (l + d/2), d (l^2 + l d + d^2/3).
_N_MOMENTS = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadMemory:
    """Sums behind the estimate.

    Parameters
    ----------
    t_s : float
        Time of the last observation; negative before the first.
    span_s, arrived_req : float
        Time that the rate rests on and the requests that arrived in it, weighted.
    moments : ndarray, shape (6,)
        Weighted sums over finished requests: how many, prompt lengths, their squares, decoded
        tokens, and the two sums that the mean and the spread of the context follow from.
    unfinished_tok : float
        Weighted sum of the growth of what running requests have decoded so far.
    held_tok : float
        Tokens held by or on the way to decode instances at the last observation.
    steady_span_s, steady_req : float
        The same as `span_s` and `arrived_req`, with the longer memory.
    surprise_req2 : float
        Squared difference of arrivals from what was expected, weighted as `arrived_req`.
    arrived_tok : float
        Prompt tokens that arrived, weighted as `arrived_req`.

    Examples
    --------
    >>> LoadMemory(t_s=-1.0, span_s=0.0, arrived_req=0.0, moments=[0.0] * 6,
    ...            unfinished_tok=0.0, held_tok=0.0).span_s
    0.0
    """

    t_s: float
    span_s: float
    arrived_req: float
    moments: np.ndarray
    unfinished_tok: float
    held_tok: float
    steady_span_s: float = 0.0
    steady_req: float = 0.0
    surprise_req2: float = 0.0
    arrived_tok: float = 0.0

    def __post_init__(self) -> None:
        freeze_fields(self, ("moments",), (_N_MOMENTS,))


class LoadFilter:
    """Exponentially weighted estimate of arrivals and lengths.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet; arrivals are counted where requests start.
    tuning : Tuning, optional
        Time constants, and when the rate has changed; the defaults if left out.
    prior_tok : tuple of float
        Prompt and output lengths believed before any request finished.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> filter = LoadFilter(fleet)
    >>> memory = filter.update(Observation(state=FleetState.idle(2)), filter.init())
    >>> filter.load(memory).arrival_req_s
    0.0
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        tuning: Tuning | None = None,
        prior_tok: tuple[float, float] = (256.0, 256.0),
    ) -> None:
        self._tuning = tuning = tuning or Tuning()
        self._start = np.array(fleet.prefill)
        self._decode = np.array(fleet.decode)
        self._decodes = np.array([one.role.decodes for one in fleet.instances])
        prompt_tok, output_tok = prior_tok
        prior = _moments(np.array([prompt_tok]), np.array([output_tok]))
        self._prior = tuning.length_prior_req * prior

    def init(self) -> LoadMemory:
        """Nothing seen yet."""
        return LoadMemory(
            t_s=-1.0,
            span_s=0.0,
            arrived_req=0.0,
            moments=np.zeros(_N_MOMENTS),
            unfinished_tok=0.0,
            held_tok=0.0,
        )

    def update(self, observation: Observation, memory: LoadMemory) -> LoadMemory:
        """Memory after this observation.

        Parameters
        ----------
        observation : Observation
            What was read.
        memory : LoadMemory
            Memory before this update.
        """
        state, finished = observation.state, observation.finished
        span_s, arrived_req = memory.span_s, memory.arrived_req
        steady_span_s, steady_req = memory.steady_span_s, memory.steady_req
        surprise_req2, arrived_tok = memory.surprise_req2, memory.arrived_tok
        if memory.t_s >= 0.0 and state.t_s > memory.t_s:
            dt_s = state.t_s - memory.t_s
            keep = float(np.exp(-dt_s / self._tuning.rate_memory_s))
            came_req = float(state.arrived_req[self._start].sum())
            expected_req = dt_s * arrived_req / span_s if span_s > 0.0 else came_req
            surprise_req2 = keep * surprise_req2 + (came_req - expected_req) ** 2
            span_s = keep * span_s + dt_s
            arrived_req = keep * arrived_req + came_req
            arrived_tok = keep * arrived_tok + float(state.arrived_tok[self._start].sum())
            keep = float(np.exp(-dt_s / self._tuning.steady_memory_s))
            steady_span_s = keep * steady_span_s + dt_s
            steady_req = keep * steady_req + came_req
            rate_req_s = arrived_req / span_s
            risen_req_s = rate_req_s - steady_req / steady_span_s
            sd_req_s = self._sd_req_s(rate_req_s, arrived_req, surprise_req2, span_s)
            fallen_sd_frac, risen_sd_frac = self._tuning.fallen_sd_frac, self._tuning.risen_sd_frac
            if not -fallen_sd_frac * sd_req_s <= risen_req_s <= risen_sd_frac * sd_req_s:
                # Not by chance: what was steady counts no more.
                steady_span_s, steady_req = span_s, arrived_req
        moments = _moments(finished.prompt_tok, finished.output_tok)
        keep = float(np.exp(-len(finished) / self._tuning.length_memory_req))
        decode = self._decode
        # Who is about to prefill has its last answers still.
        holds = self._decodes | (state.running_req > 0.0)
        held_tok = float(state.kv_used_tok[holds].sum() + state.queue_tok[decode].sum())
        unfinished_tok = 0.0
        if memory.t_s >= 0.0:
            grown_tok = held_tok - memory.held_tok - float(state.arrived_tok[decode].sum())
            unfinished_tok = keep * memory.unfinished_tok + grown_tok + float(moments[1])
        memory = LoadMemory(
            t_s=state.t_s,
            span_s=span_s,
            arrived_req=arrived_req,
            moments=keep * memory.moments + moments,
            unfinished_tok=unfinished_tok,
            held_tok=held_tok,
            steady_span_s=steady_span_s,
            steady_req=steady_req,
            surprise_req2=surprise_req2,
            arrived_tok=arrived_tok,
        )
        if not self.changes(memory) or memory.moments[0] <= arrived_req:
            return memory
        # What finished before counts no more than what has arrived since.
        weight = arrived_req / float(memory.moments[0])
        return replace(
            memory, moments=weight * memory.moments, unfinished_tok=weight * unfinished_tok
        )

    def changes(self, memory: LoadMemory) -> bool:
        """Whether those that arrive have other prompts than those that finished, beyond chance.

        Nobody knows yet how long their answers are.

        Parameters
        ----------
        memory : LoadMemory
            What :meth:`update` returned.
        """
        count, prompt, prompt2 = memory.moments[:3]
        if count < _KNOWN_REQ or memory.arrived_req < _TELLING_REQ:
            return False
        mean = prompt / count
        sd = np.sqrt(max(0.0, prompt2 / count - mean**2) / memory.arrived_req)
        off = abs(memory.arrived_tok / memory.arrived_req - mean)
        return bool(off > max(_OTHER_SD * sd, _OTHER_FRAC * mean))

    def _sd_req_s(
        self, rate_req_s: float, arrived_req: float, surprise_req2: float, span_s: float
    ) -> float:
        """Standard deviation of a rate that rests on this time: of Poisson arrivals, or of bursts.

        ``sqrt(rate I / min(2 T, span))``, time constant ``T``, index of dispersion ``I``.
        """
        dispersion = _dispersion(surprise_req2, arrived_req)
        counted_s = max(min(2.0 * self._tuning.rate_memory_s, span_s), 1e-9)
        return float(np.sqrt(max(rate_req_s, 1.0 / counted_s) * dispersion / counted_s))

    def doubt_frac(self, memory: LoadMemory) -> float:
        """Standard deviation of the estimated arrival rate, relative; infinite of no arrivals.

        Parameters
        ----------
        memory : LoadMemory
            What :meth:`update` returned.

        Returns
        -------
        float
            Relative to the rate.
        """
        if not memory.steady_req > 0.0:
            return float("inf")
        dispersion = _dispersion(memory.surprise_req2, memory.arrived_req)
        # Of exponential weights with time constant T, those of 2 T count.
        counted = memory.steady_req * min(
            1.0, 2.0 * self._tuning.steady_memory_s / memory.steady_span_s
        )
        return float(np.sqrt(dispersion / counted))

    def load(self, memory: LoadMemory) -> Load:
        """Estimate that the memory holds.

        The arrival rate is that of the longer memory, which starts anew when the shorter one
        deviates from it by more than chance explains. Prompts are those that finished, or those
        that arrive where these are others beyond chance.

        Parameters
        ----------
        memory : LoadMemory
            What :meth:`update` returned.

        Returns
        -------
        Load
            Arrivals of the whole fleet, and the moments of the lengths.
        """
        count, prompt, prompt2, decoded, context, context2 = memory.moments + self._prior
        mean = finished_tok = prompt / count
        sd = float(np.sqrt(max(0.0, prompt2 / count - mean**2)))
        if self.changes(memory):
            mean = memory.arrived_tok / memory.arrived_req
            sd = min(sd, mean)  # that of both kinds together is neither's
        # Never below what the finished requests say: a fall of the backlog is no shorter output.
        longer = 1.0 + max(0.0, memory.unfinished_tok) / decoded
        context_tok = mean + longer * (context / decoded - finished_tok)
        square = longer**2 * (context2 / decoded - (context / decoded) ** 2)
        return Load(
            arrival_req_s=(
                memory.steady_req / memory.steady_span_s if memory.steady_span_s > 0.0 else 0.0
            ),
            lengths=Lengths(
                prompt_tok=mean,
                prompt_sd_tok=sd,
                output_tok=1.0 + longer * decoded / count,
                context_tok=max(context_tok, mean),
                context_sd_tok=float(np.sqrt(max(0.0, square))),
            ),
        )


def _dispersion(surprise_req2: float, arrived_req: float) -> float:
    """Variance of the arrivals over their mean: one of Poisson's, more of bursts, never less."""
    return max(1.0, surprise_req2 / max(arrived_req, 1.0))


def _moments(prompt_tok: F64, output_tok: F64) -> F64:
    decoded = output_tok - 1.0
    sums: F64 = np.array(
        [
            float(len(prompt_tok)),
            prompt_tok.sum(),
            (prompt_tok**2).sum(),
            decoded.sum(),
            (decoded * (prompt_tok + decoded / 2.0)).sum(),
            (decoded * (prompt_tok**2 + prompt_tok * decoded + decoded**2 / 3.0)).sum(),
        ]
    )
    return sums
