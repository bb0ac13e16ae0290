"""Requests that may wait: how many come, by when they must be let in, and what a plan needs of it.

A request must be let in so long before its deadline that a long answer is done by then. What is
held is known one by one; what will come is expected at the rate of the last minutes, with as much
time as the newest have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, freeze_fields
from voltana_ctrl.types import Backlog

__all__ = ["Deferral", "DeferralMemory"]

#: How long the rate at which they come is remembered.
_MEMORY_S = 300.0
#: How long it is remembered how deadlines went.
_DUE_MEMORY_S = 60.0
#: A plan lets in so many mean answers before the deadline: of exponential lengths one in 20,000 is
#: longer. Whatever it says, and whoever suffers from it, the last chance is shorter.
_LONGEST, _LAST = 10.0, 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeferralMemory:
    """What was seen of requests that may wait.

    Parameters
    ----------
    t_s : float
        Time of the last look; negative until there was any such request.
    span_s, arrived_req : float
        Seconds since the first look, and requests that came after it, both discounted with a time
        constant of 300 s.
    allowed_s : float
        Time that a request is expected to have when it comes: at the last look at which any had
        come, how long it was until the latest deadline of all that were held. 0 before.
    moves_frac : float
        Seconds by which a request that comes a second later is due later: 1 where each has as much
        time as the others, 0 where all are due at one time.
    newest_s, came_s : float
        That latest deadline, and the time of that look; negative before there was any.
    deadline_s : ndarray, shape (k,)
        Times by which those that are held are due, ascending.

    Examples
    --------
    >>> from voltana_ctrl.control.deferral import Deferral
    >>> Deferral().init().allowed_s
    0.0
    """

    t_s: float
    span_s: float
    arrived_req: float
    allowed_s: float
    deadline_s: F64
    moves_frac: float = 1.0
    newest_s: float = -1.0
    came_s: float = -1.0

    def __post_init__(self) -> None:
        freeze_fields(self, ("deadline_s",), (np.asarray(self.deadline_s).size,))

    @property
    def rate_req_s(self) -> float:
        """Requests that may wait and come per second; 0 until a second look."""
        return self.arrived_req / self.span_s if self.span_s > 0.0 else 0.0


class Deferral:
    """Keeps track of requests that may wait.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.types import Backlog
    >>> deferral = Deferral()
    >>> backlog = Backlog(deadline_s=[600.0, 900.0], prompt_tok=[100.0, 100.0], arrived_req=2.0)
    >>> memory = deferral.count(deferral.init(), 0.0, backlog)
    >>> come, due = deferral.flows(memory, np.array([300.0, 600.0, 900.0]), lead_s=100.0)
    >>> come, due
    (array([2., 2., 2.]), array([0., 1., 2.]))
    >>> deferral.pace_req_s(memory, lead_s=100.0)  # two in 800 s
    0.0025
    """

    def init(self) -> DeferralMemory:
        """Nothing seen yet."""
        return DeferralMemory(
            t_s=-1.0, span_s=0.0, arrived_req=0.0, allowed_s=0.0, deadline_s=np.zeros(0)
        )

    def count(self, memory: DeferralMemory, t_s: float, backlog: Backlog) -> DeferralMemory:
        """Memory after a look at what is held and what came.

        Parameters
        ----------
        memory : DeferralMemory
            What is known before this update; it is not changed.
        t_s : float
            Time of this look.
        backlog : Backlog
            What is held, and what came since the last look.

        Returns
        -------
        DeferralMemory
            The same memory as long as nothing was ever held. What came before the first look does
            not count toward the rate: nobody knows in what time it came.
        """
        if memory.t_s < 0.0 and backlog.arrived_req == 0.0 and not len(backlog):
            return memory
        span_s, arrived_req = memory.span_s, memory.arrived_req
        if memory.t_s >= 0.0:
            dt_s = t_s - memory.t_s
            kept = math.exp(-dt_s / _MEMORY_S)
            span_s, arrived_req = kept * span_s + dt_s, kept * arrived_req + backlog.arrived_req
        memory = replace(
            memory, t_s=t_s, span_s=span_s, arrived_req=arrived_req, deadline_s=backlog.deadline_s
        )
        if backlog.arrived_req == 0.0 or not len(backlog):
            return memory
        newest_s, moves_frac = float(backlog.deadline_s[-1]), memory.moves_frac
        if t_s > memory.came_s >= 0.0:
            passed_s = t_s - memory.came_s
            moved_frac = min(1.0, max(0.0, (newest_s - memory.newest_s) / passed_s))
            moves_frac += -math.expm1(-passed_s / _DUE_MEMORY_S) * (moved_frac - moves_frac)
        return replace(
            memory, allowed_s=max(0.0, newest_s - t_s), moves_frac=moves_frac, newest_s=newest_s,
            came_s=t_s,
        )  # fmt: skip

    def lead_s(self, ttft_s: float, residence_s: float, *, last: bool = False) -> float:
        """How long before its deadline a request must be let in.

        Parameters
        ----------
        ttft_s : float
            Time to the first token that is promised to others.
        residence_s : float
            Mean time of a request in decode.
        last : bool
            Whether it is the last chance that is asked for, and not the plan.

        Returns
        -------
        float
            Seconds: `ttft_s` and ten times `residence_s`, at the last chance five times.
        """
        return ttft_s + (_LAST if last else _LONGEST) * residence_s

    def flows(self, memory: DeferralMemory, end_s: F64, *, lead_s: float) -> tuple[F64, F64]:
        """How many will have come, and how many of them must have been let in, by these times.

        Parameters
        ----------
        memory : DeferralMemory
            What :meth:`count` returned.
        end_s : ndarray, shape (n_steps,)
            Seconds from now, ascending.
        lead_s : float
            What :meth:`lead_s` returned.

        Returns
        -------
        come_req, due_req : ndarray, shape (n_steps,)
            Requests since now by each time, those that are held now among them: how many will
            have come, and how many of those must have been let in.
        """
        rate_req_s, held = memory.rate_req_s, float(len(memory.deadline_s))
        left_s = memory.deadline_s - memory.t_s - lead_s
        due = np.searchsorted(left_s, end_s, side="right").astype(np.float64)
        after_s = np.maximum(end_s - max(0.0, memory.allowed_s - lead_s), 0.0)
        # Who comes u seconds from now is due `moves u` after the newest.
        due += rate_req_s * np.minimum(after_s / max(memory.moves_frac, 1e-3), end_s)
        come = held + rate_req_s * end_s
        return come, np.minimum(due, come)

    def pace_req_s(self, memory: DeferralMemory, *, lead_s: float) -> float:
        """Lowest steady rate [req/s] at which all that are held are let in in time; without a plan.

        Parameters
        ----------
        memory, lead_s
            See :meth:`flows`.

        Returns
        -------
        float
            Requests per second; where none is held, the rate at which they come.
        """
        if not len(memory.deadline_s):
            return memory.rate_req_s
        left_s = np.maximum(memory.deadline_s - memory.t_s - lead_s, 1.0)
        return float(np.max(np.arange(1.0, len(left_s) + 1.0) / left_s))
