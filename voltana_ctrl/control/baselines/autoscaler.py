"""An autoscaler: as many engines as the load of the last interval needs, and no word on energy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import I64, fraction, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.batches import Batches
from voltana_ctrl.laws import decode_s, prefill_s
from voltana_ctrl.types import DEPTHS, Decision, FleetSpec, FleetState, Observation, Slo

__all__ = ["AutoscalerController", "AutoscalerMemory"]

#: KV utilisation up to which an engine counts as able.
_KV_FRAC = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerMemory:
    """What the autoscaler remembers between ticks.

    Parameters
    ----------
    engines : tuple of int
        Engines that prefill and that decode, or that do both.
    least : tuple of int
        How few the slow loop allows.
    planned_s, looked_s : float
        When the slow and the fast loop last decided.
    came_req, came_tok, done_req, done_tok : float
        Requests and prompt tokens that came since the slow loop last decided, and requests and
        answer tokens that were finished.

    Examples
    --------
    >>> AutoscalerMemory(engines=(2, 2), least=(1, 1), planned_s=0.0, looked_s=0.0).came_req
    0.0
    """

    engines: tuple[int, ...]
    least: tuple[int, ...]
    planned_s: float
    looked_s: float
    came_req: float = 0.0
    came_tok: float = 0.0
    done_req: float = 0.0
    done_tok: float = 0.0


class AutoscalerController(Controller):
    """Counts of engines by predicted load over measured capacity, and by latency in between.

    In the manner of the planner of NVIDIA Dynamo, after its public guide (docs of version 1.2),
    with both of its loops and their default intervals. The slow one takes the load of its last
    interval for that of the next: prompt tokens per second over what one engine prefills, answer
    tokens per second over what one engine decodes within ITL at the mean context, both rounded up.
    The fast one adds an engine to a phase all of whose engines would miss its promise, and takes
    one away where all would keep it with room to spare, but none of those that the slow one asks
    for. Corrections by measured latency, which its guide allows to switch off, are left out: the
    profile is what it measures. Engines run at the highest clock; those that are not needed are
    stopped, which is the deepest sleep that they have.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed; of a colocated one the engines are counted once.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    interval_s, look_s : float
        Time between two decisions of the slow and of the fast loop.
    down_frac : float
        An engine is taken away below this share of the promise.
    period_s : float
        Time between two ticks.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> autoscaler = AutoscalerController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> memory = autoscaler.init()
    >>> for t_s in (0.0, 100.0, 200.0):
    ...     idle = Observation(state=FleetState.idle(4, t_s=t_s))
    ...     decision, memory = autoscaler.decide(idle, memory)
    >>> decision.active
    array([ True, False,  True, False])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        interval_s: float = 180.0,
        look_s: float = 5.0,
        down_frac: float = 0.8,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        positive("AutoscalerController.interval_s", interval_s)
        positive("AutoscalerController.look_s", look_s)
        fraction("AutoscalerController.down_frac", down_frac)
        #: One phase of a colocated fleet, whose engines do both in turn.
        self._phases = [fleet.decode] if fleet.colocated else [fleet.prefill, fleet.decode]
        self.slo = slo
        self._interval_s = interval_s
        self._look_s = look_s
        self._down_frac = down_frac
        self._top = [one.table[-1] for one in fleet.instances]
        self._batches = Batches(fleet, slo.itl_s)
        self._depth = (DEPTHS[-1],) * len(fleet)

    def init(self) -> AutoscalerMemory:
        """Everybody runs until an interval has been watched."""
        engines = tuple(len(members) for members in self._phases)
        return AutoscalerMemory(engines=engines, least=engines, planned_s=0.0, looked_s=0.0)

    def _decide(
        self, observation: Observation, memory: AutoscalerMemory
    ) -> tuple[Decision, AutoscalerMemory]:
        state, finished = observation.state, observation.finished
        starts = self.fleet.prefill
        memory = replace(
            memory,
            came_req=memory.came_req + float(state.arrived_req[starts].sum()),
            came_tok=memory.came_tok + float(state.arrived_tok[starts].sum()),
            done_req=memory.done_req + len(finished),
            done_tok=memory.done_tok + float(finished.output_tok.sum()),
        )
        if state.t_s - memory.planned_s >= self._interval_s - 1e-9:
            least = self._needed(memory, state.t_s - memory.planned_s)
            # It sets the counts; the fast loop only adds to them.
            memory = AutoscalerMemory(
                engines=least, least=least, planned_s=state.t_s, looked_s=state.t_s
            )
        elif state.t_s - memory.looked_s >= self._look_s - 1e-9:
            memory = replace(memory, engines=self._adjusted(state, memory), looked_s=state.t_s)
        active = np.zeros(len(self.fleet), bool)
        for members, engines in zip(self._phases, memory.engines, strict=True):
            active[_running(state, members, engines)] = True
        share = np.where(active, 1.0, 0.0)
        for members in self._phases:
            share[members] /= share[members].sum()
        decision = Decision.highest(self.fleet, t_s=state.t_s)
        return replace(decision, active=active, route_frac=share, depth=self._depth), memory

    def _needed(self, memory: AutoscalerMemory, span_s: float) -> tuple[int, ...]:
        """Engines for the load of the last interval."""
        if memory.came_req == 0.0:
            return (1,) * len(self._phases)
        if memory.done_req == 0.0:
            # Nobody knows yet how long answers are.
            return memory.engines
        prompt_tok = memory.came_tok / memory.came_req
        answer_tok = memory.done_tok / memory.done_req
        # Time that an engine takes for the load of a second, by phase.
        prefill = np.array([float(prefill_s(row, prompt_tok)) / prompt_tok for row in self._top])
        context_tok = prompt_tok + 0.5 * answer_tok
        held_req = self._batches.holds_req(self.fleet.max_mhz, context_tok)
        steps_s = [
            float(decode_s(row, held, held * context_tok))
            for row, held in zip(self._top, held_req, strict=True)
        ]
        decode = np.array(steps_s) / np.maximum(held_req, 1e-9)
        prefill *= memory.came_tok / span_s
        decode *= memory.came_req * answer_tok / span_s
        loads = [prefill + decode] if self.fleet.colocated else [prefill, decode]
        needed = []
        for members, load in zip(self._phases, loads, strict=True):
            enough = np.cumsum(1.0 / np.maximum(load[members], 1e-9)) >= 1.0
            needed.append(int(np.argmax(enough)) + 1 if enough.any() else len(members))
        return tuple(needed)

    def _adjusted(self, state: FleetState, memory: AutoscalerMemory) -> tuple[int, ...]:
        """One engine more or less of each phase, by what its engines would promise now."""
        counts = []
        for phase, members in enumerate(self._phases):
            count = memory.engines[phase]
            running = _running(state, members, count)
            frac = np.zeros(len(running))
            if phase == 0:
                frac = np.array([self._prefill_frac(state, memory, i) for i in running])
            if phase == len(self._phases) - 1:
                frac = np.maximum(frac, [self._decode_frac(state, i) for i in running])
            if frac.min() > 1.0:
                count = min(count + 1, len(members))
            elif frac.max() < self._down_frac:
                count = max(count - 1, memory.least[phase], 1)
            counts.append(count)
        return tuple(counts)

    def _prefill_frac(self, state: FleetState, memory: AutoscalerMemory, i: int) -> float:
        """Time until a prompt that comes now is done, over TTFT."""
        prompt_tok = memory.came_tok / memory.came_req if memory.came_req > 0.0 else 1.0
        waits_s = float(state.queue_tok[i]) * float(self._top[i]["prefill_tok_s"])
        return (waits_s + float(prefill_s(self._top[i], prompt_tok))) / self.slo.ttft_s

    def _decode_frac(self, state: FleetState, i: int) -> float:
        """Time of an iteration, over ITL; none where the KV cache has no room."""
        crowd_req = float(state.running_req[i] + state.queue_req[i])
        if crowd_req == 0.0:
            return 0.0
        if state.kv_used_tok[i] > _KV_FRAC * self.fleet.instances[i].kv_capacity_tok:
            return math.inf
        step_s = float(decode_s(self._top[i], crowd_req, float(state.kv_used_tok[i])))
        return step_s / self.slo.itl_s


def _running(state: FleetState, members: I64, count: int) -> I64:
    """The first so many that are alive; everybody of a phase in which nobody is."""
    alive = members[state.alive[members]]
    return alive[:count] if alive.size else members
