"""What the loss of an instance asks for: haste for who was on it, and room for another loss.

A request that is begun anew on another instance keeps its ITL if what it had decoded was at most
the share ``(ITL - T_top) / T`` of its answer: of iterations that took ``T``, repeated at the
highest clock in ``T_top``.

An engine whose page was silent for some seconds looks lost as well, but comes back with what it
held. Then nothing was lost, and nothing is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
#: Who comes back with at least so much of what ran on it before that could end was only silent: a
#: restarted engine is empty.
_KEPT_FRAC = 0.5


def _nobody() -> F64:
    return np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossMemory:
    """Who was there at the last look, and what the losses so far ask for.

    Parameters
    ----------
    alive : ndarray of bool, shape (n,), optional
        Who was alive.
    held_req : ndarray, shape (n,), optional
        What ran on each when it was last seen alive.
    lost_at_s : ndarray, shape (n,), optional
        When each was lost last with requests that ran on it; minus infinity where it never was.
    hurries_until_s : ndarray, shape (n,), optional
        Time until which that loss has all decode as fast as they can.
    before_s : ndarray, shape (2, n), optional
        The two as they were before the last loss, for who turns out to have been silent only.
    """

    alive: Bool = field(default_factory=lambda: np.zeros(0, bool))
    held_req: F64 = field(default_factory=_nobody)
    lost_at_s: F64 = field(default_factory=_nobody)
    hurries_until_s: F64 = field(default_factory=_nobody)
    before_s: F64 = field(default_factory=_nobody)

    @property
    def lost_s(self) -> float:
        """When an instance was lost last with requests that ran on it [s]."""
        return float(self.lost_at_s.max(initial=-np.inf))

    @property
    def hurries_s(self) -> float:
        """Until when all decode as fast as they can, for who was lost or may be next [s]."""
        return float(self.hurries_until_s.max(initial=-np.inf))

    def margin_frac(self, t_s: float) -> float:
        """ITL margin that leaves room to make up for another loss; 0 where none is near."""
        return _AHEAD_FRAC if t_s - self.lost_s < _TROUBLE_S else 0.0


def after(memory: LossMemory, state: FleetState, stays_s: float) -> LossMemory:
    """Memory after this look.

    Those whose instance was lost have waited for their prompts to be computed once more. At an
    iteration time near the promise they would never make up for that; at the highest clocks most of
    them do. Where instances fail in turn, the next loss is expected as long after this one as this
    came after the one before, and until twice that time has passed without one all stay ahead.
    The loss of an instance that comes back with what it held is forgotten.

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
    -inf -inf
    40.0 55.0
    """
    if not memory.alive.size:
        never = np.full(state.alive.size, -np.inf)
        return LossMemory(
            alive=state.alive,
            held_req=np.where(state.alive, state.running_req, 0.0),
            lost_at_s=never,
            hurries_until_s=never,
            before_s=np.stack((never, never)),
        )
    lost_at_s, hurries_until_s, before_s = memory.lost_at_s, memory.hurries_until_s, memory.before_s
    busy = memory.held_req > 0.0
    silent = busy & ~memory.alive & state.alive
    silent &= state.running_req >= _KEPT_FRAC * memory.held_req
    # After longer than a request stays, what runs there is new.
    silent &= state.t_s - lost_at_s < stays_s
    if np.any(silent):
        lost_at_s = np.where(silent, before_s[0], lost_at_s)
        hurries_until_s = np.where(silent, before_s[1], hurries_until_s)
    gone = busy & memory.alive & ~state.alive
    if np.any(gone):
        before_s = np.where(gone, np.stack((lost_at_s, hurries_until_s)), before_s)
        since_s = state.t_s - lost_at_s.max()
        ahead_s = min(2.0 * since_s, _TROUBLE_S) if since_s < _TROUBLE_S else 0.0
        lost_at_s = np.where(gone, state.t_s, lost_at_s)
        hurries_until_s = np.where(gone, state.t_s + max(stays_s, ahead_s), hurries_until_s)
    return LossMemory(
        alive=state.alive,
        held_req=np.where(state.alive, state.running_req, memory.held_req),
        lost_at_s=lost_at_s,
        hurries_until_s=hurries_until_s,
        before_s=before_s,
    )
