"""What the loss of an instance asks for: haste for who was on it, and room for another loss.

A request that is begun anew on another instance keeps its ITL if what it had decoded was at most
the share ``(ITL - T_top) / T`` of its answer: of iterations that took ``T``, repeated at the
highest clock in ``T_top``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.types import FleetState

__all__ = ["LossMemory", "after"]

#: An instance that is lost sooner than so long after another loss is part of the same trouble [s]:
#: as long as Kubernetes remembers that a container has failed.
_TROUBLE_S = 600.0
#: ITL margin for as long: with iterations half as long at the highest clock, the share above is 0.7
#: in place of 0.5.
_AHEAD_FRAC = 1.0 / 3.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossMemory:
    """Who was there at the last look, and what the losses so far ask for.

    Parameters
    ----------
    alive : ndarray of bool, shape (n,), optional
        Who was alive.
    held_req : ndarray, shape (n,), optional
        What ran on each that was.
    lost_s : float
        When an instance was lost last with requests that ran on it.
    hurries_s : float
        Time until which all decode as fast as they can, for requests whose instance was lost, or
        may be lost next.
    """

    alive: Bool | None = None
    held_req: F64 | None = None
    lost_s: float = -np.inf
    hurries_s: float = -np.inf

    def margin_frac(self, t_s: float) -> float:
        """ITL margin that leaves room to make up for another loss; 0 where none is near."""
        return _AHEAD_FRAC if t_s - self.lost_s < _TROUBLE_S else 0.0


def after(memory: LossMemory, state: FleetState, stays_s: float) -> LossMemory:
    """Memory after this look.

    Those whose instance was lost have waited for their prompts to be computed once more. At an
    iteration time near the promise they would never make up for that; at the highest clocks most of
    them do. Where instances fail in turn, the next loss is expected as long after this one as this
    came after the one before, and until twice that time has passed without one all stay ahead.

    Parameters
    ----------
    memory : LossMemory
        Memory after the last look.
    state : FleetState
        What is seen now.
    stays_s : float
        How long a request stays at the promised pace.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetState
    >>> busy = replace(FleetState.idle(2), running_req=np.array([9.0, 9.0]))
    >>> memory = after(LossMemory(), busy, 15.0)
    >>> for t_s, alive in ((10.0, [True, False]), (11.0, [True, True]), (40.0, [False, True])):
    ...     memory = after(memory, replace(busy, t_s=t_s, alive=np.array(alive)), 15.0)
    ...     print(memory.lost_s, memory.hurries_s)
    10.0 25.0
    10.0 25.0
    40.0 100.0
    """
    lost_s, hurries_s, before = memory.lost_s, memory.hurries_s, memory.held_req
    if before is not None and np.any((before > 0.0) & ~state.alive):
        since_s, lost_s = state.t_s - lost_s, state.t_s
        ahead_s = min(2.0 * since_s, _TROUBLE_S) if since_s < _TROUBLE_S else 0.0
        hurries_s = max(hurries_s, state.t_s + max(stays_s, ahead_s))
    return LossMemory(
        alive=state.alive,
        held_req=np.where(state.alive, state.running_req, 0.0),
        lost_s=lost_s,
        hurries_s=hurries_s,
    )
