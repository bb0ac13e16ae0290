"""Whether arrivals set the token rate, or the clock does: which objective is right."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.types import FleetSpec, Observation, Tuning

__all__ = ["Regime", "RegimeFilter", "RegimeMemory"]


class Regime(Enum):
    """What a slower clock does; the value says it.

    Examples
    --------
    >>> Regime.OPEN.value
    'arrivals set the token rate: a slower clock grows the batch, least power is right'
    """

    OPEN = "arrivals set the token rate: a slower clock grows the batch, least power is right"
    CAPPED = "the batch is full: a slower clock grows the queue, least energy per token is right"
    CLOSED = "clients wait for answers: a slower clock slows them, least energy per token is right"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeMemory:
    """Weighted sums behind the verdict.

    Parameters
    ----------
    drift_req2 : float
        Squared difference of arrivals and departures per tick.
    flow_req : float
        Arrivals and departures.
    capped_s, span_s : float
        Time that a full batch was met by waiting requests, and time watched.
    t_s : float
        Last observation; negative before the first.

    Examples
    --------
    >>> RegimeMemory().flow_req
    0.0
    """

    drift_req2: float = 0.0
    flow_req: float = 0.0
    capped_s: float = 0.0
    span_s: float = 0.0
    t_s: float = -1.0


class RegimeFilter:
    """Tells the regimes apart.

    Open loop, arrivals do not know of departures, and the squared difference of their counts
    in a tick is about their sum. Closed loop, each departure sends an arrival, and it is about
    nothing.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    tuning : Tuning, optional
        The time constant; the default if left out.
    closed_frac : float
        Below this ratio of squared difference to sum the loop is closed.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.estimate import RegimeMemory
    >>> filter = RegimeFilter(FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")))
    >>> filter.regime(RegimeMemory())
    <Regime.OPEN: 'arrivals set the token rate: ...'>
    """

    def __init__(
        self, fleet: FleetSpec, *, tuning: Tuning | None = None, closed_frac: float = 0.2
    ) -> None:
        positive("RegimeFilter.closed_frac", closed_frac)
        self._start = np.array(fleet.prefill)
        self._decode = np.array(fleet.decode)
        self._max_batch = np.array([one.max_batch for one in fleet.instances])[self._decode]
        self._memory_s = (tuning or Tuning()).regime_memory_s
        self._closed_frac = closed_frac

    def update(self, observation: Observation, memory: RegimeMemory) -> RegimeMemory:
        """Memory after this observation.

        Parameters
        ----------
        observation : Observation
            What was read.
        memory : RegimeMemory
            Memory before this update.
        """
        state = observation.state
        if memory.t_s < 0.0 or state.t_s <= memory.t_s:
            return RegimeMemory(t_s=state.t_s)
        dt_s = state.t_s - memory.t_s
        keep = float(np.exp(-dt_s / self._memory_s))
        arrived = float(state.arrived_req[self._start].sum())
        left = float(len(observation.finished))
        full = (state.running_req >= 0.98 * _spread(self._max_batch, self._decode, len(state))) & (
            state.queue_req > 0.0
        )
        return RegimeMemory(
            drift_req2=keep * memory.drift_req2 + (arrived - left) ** 2,
            flow_req=keep * memory.flow_req + arrived + left,
            capped_s=keep * memory.capped_s + dt_s * float(full[self._decode].any()),
            span_s=keep * memory.span_s + dt_s,
            t_s=state.t_s,
        )

    def regime(self, memory: RegimeMemory) -> Regime:
        """Verdict; open loop until enough was seen to say otherwise.

        Parameters
        ----------
        memory : RegimeMemory
            What :meth:`update` returned.
        """
        if memory.span_s < 0.25 * self._memory_s or memory.flow_req < 50.0:
            return Regime.OPEN
        if memory.drift_req2 < self._closed_frac * memory.flow_req:
            return Regime.CLOSED
        if memory.capped_s > 0.5 * memory.span_s:
            return Regime.CAPPED
        return Regime.OPEN


def _spread(values: np.ndarray, members: np.ndarray, n: int) -> np.ndarray:
    out = np.full(n, np.inf)
    out[members] = values
    return out
