"""A saturation gate: work that may wait is let in while the engines have room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from voltana_ctrl.checks import count, fraction
from voltana_ctrl.control.base import Controller
from voltana_ctrl.types import Admission, Decision, FleetSpec, Observation

__all__ = ["SaturationGate"]


class SaturationGate(Controller):
    """Lets in as many as there are free places in the queues, and nobody who would find none.

    In the manner of the gateway of llm-d and Kubernetes: an engine has room while no more than
    `queue_req` requests wait there and no more than `kv_frac` of its KV cache is used (their
    defaults, for whoever may be turned away). Here they are held and not turned away, and nobody
    looks at deadlines before they are near. Clocks, shares and the active set are another
    controller's, or the highest and equal.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    inner : Controller, optional
        Decides all but the admission.
    first : Decision, optional
        What stands without one; the highest clocks by default.
    queue_req : int
        Requests that may wait at an engine.
    kv_frac : float
        Share of its KV cache that may be used.
    due_s : float
        A request whose deadline is so near, in seconds, is let in all the same.
    period_s : float
        Time between decisions.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> gate = SaturationGate(fleet, period_s=0.5)
    >>> idle = FleetState.idle(2)
    >>> gate.decide(Observation(state=idle), gate.init())[0].admission.rate_req_s
    12.0
    >>> busy = replace(idle, queue_req=[6.0, 0.0])
    >>> gate.decide(Observation(state=busy), gate.init())[0].admission.rate_req_s
    0.0
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        inner: Controller | None = None,
        first: Decision | None = None,
        queue_req: int = 5,
        kv_frac: float = 0.8,
        due_s: float = 60.0,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s if inner is None else inner.period_s)
        count("SaturationGate.queue_req", queue_req)
        fraction("SaturationGate.kv_frac", kv_frac)
        Admission(due_s=due_s)  # refuses what does not fit
        self._inner = inner
        self._first = first or Decision.highest(fleet)
        self._queue_req = queue_req
        self._kv_frac = kv_frac
        self._due_s = due_s

    def init(self) -> Any:
        """As the inner controller has it."""
        return None if self._inner is None else self._inner.init()

    def _decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        if self._inner is None:
            decision = replace(self._first, t_s=observation.state.t_s)
        else:
            decision, memory = self._inner.decide(observation, memory)
        rate_req_s = self._places_req(observation, decision) / float(self.period_s)
        admission = Admission(rate_req_s=rate_req_s, due_s=self._due_s)
        return replace(decision, admission=admission), memory

    def _places_req(self, observation: Observation, decision: Decision) -> float:
        """Free places in the queues of those that have room, in the phase that has fewer."""
        state = observation.state
        free_req = self._queue_req + 1.0 - state.queue_req
        kv_most_tok = self._kv_frac * self.fleet.kv_capacity_tok
        room = state.alive & decision.active & (free_req > 0.0) & (state.kv_used_tok <= kv_most_tok)
        return min(
            float(free_req[members][room[members]].sum())
            for members in (self.fleet.prefill, self.fleet.decode)
        )
