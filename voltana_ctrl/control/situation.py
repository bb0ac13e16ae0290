"""What a plan starts from and what it says; stated without the solver that finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.control.supply import Supply

__all__ = ["STEPS_S", "Plan", "PlanStatus", "Situation", "steps_to_s"]

#: Lengths of the steps [s]; two minutes in all.
STEPS_S = (1.0, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 10.0, 10.0, 20.0, 30.0, 30.0)
#: Lengths of the steps after those, where deadlines reach further; the last one again and again.
_FAR_STEPS_S = (60.0, 60.0, 120.0, 120.0, 300.0, 300.0, 300.0, 600.0, 600.0, 600.0, 1800.0)
#: Most steps of a plan: a day and more.
_MOST_STEPS = 80


class PlanStatus(Enum):
    """Whether a plan may be applied; the value is what it means.

    Examples
    --------
    >>> PlanStatus.ROUNDED.usable, PlanStatus.INFEASIBLE.usable
    (True, False)
    """

    OK = "optimal to a tenth of a percent"
    ROUNDED = "feasible, but not proved optimal: counts or the flow of what may wait are rounded"
    INFEASIBLE = "no plan keeps the power budget"
    FAILED = "the solver found no plan"

    @property
    def usable(self) -> bool:
        """Whether the plan may be applied."""
        return self in (PlanStatus.OK, PlanStatus.ROUNDED)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Situation:
    """What a plan starts from. Groups in the order of `supplies`, steps in that of the planner.

    Parameters
    ----------
    supplies : sequence of Supply, length n_groups
        What one instance of each group can carry, and what it draws.
    installed, awake, draining : ndarray, shape (n_groups,)
        Instances that are alive; those that serve; those that are parked but not empty yet.
    waking_s : sequence of ndarray
        Per group, when those that wake will serve, in seconds from now.
    backlog_req : float
        Requests that wait for prefill beyond what its promise allows.
    decode_req_s : float
        Load of decode now: the arrivals that would keep its batches as they are.
    arrival_req_s : ndarray, shape (n_steps,)
        Expected arrivals.
    reserve_req_s : ndarray, shape (n_phases, n_steps)
        Load that the capacity of each phase must be able to carry.
    residence_s : float
        Time that a request spends in decode.
    budget_w : ndarray, shape (n_steps,)
        Power that the fleet may draw; infinite without a budget.
    price_frac : ndarray, shape (n_steps,), optional
        Weight of energy, such as what it costs; 1 by default.
    come_req, due_req : ndarray, shape (n_steps,), optional
        Requests that may wait: how many are held by the end of each step, or were let in since
        now, and how many of them must have been let in by then. None by default.
    let_in_req_s : float
        Rate at which they are let in now.
    """

    supplies: Sequence[Supply]
    installed: np.ndarray
    awake: np.ndarray
    draining: np.ndarray
    waking_s: Sequence[F64]
    backlog_req: float
    decode_req_s: float
    arrival_req_s: F64
    reserve_req_s: F64
    residence_s: float
    budget_w: F64
    price_frac: F64 | None = None
    come_req: F64 | None = None
    due_req: F64 | None = None
    let_in_req_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """How many to keep awake, and what to let in of what may wait.

    Parameters
    ----------
    status : PlanStatus
        Whether it may be applied.
    end_s : ndarray, shape (n_steps,)
        When each step ends, from when the plan was made.
    on : ndarray, shape (n_groups, n_steps)
        Instances that serve or are on their way to, at each step.
    power_w : ndarray, shape (n_steps,)
        What the fleet is expected to draw.
    objective_j : float
        Cost over the horizon, energy and penalties.
    bound_j : float
        What no plan can go below: that of the relaxation.
    request_j : ndarray, shape (n_steps,)
        Price of one more request that arrives in that step.
    watt_frac : ndarray, shape (n_steps,)
        What one watt more of budget would save, in watts.
    let_in_req_s : ndarray, shape (n_steps,)
        Rate at which requests that may wait are let in.
    """

    status: PlanStatus
    end_s: F64
    on: np.ndarray
    power_w: F64
    objective_j: float
    bound_j: float
    request_j: F64
    watt_frac: F64
    let_in_req_s: F64

    def step(self, after_s: float) -> int | None:
        """Step of this time after the plan was made.

        Parameters
        ----------
        after_s : float
            Seconds since the plan was made.

        Returns
        -------
        int or None
            None beyond the horizon, and of a plan that may not be applied.
        """
        step = int(np.searchsorted(self.end_s, after_s, side="right"))
        return step if self.status.usable and step < len(self.end_s) else None

    def wanted(self, after_s: float) -> F64 | None:
        """Instances per group that should serve or wake, so long after the plan was made.

        Parameters
        ----------
        after_s : float
            Seconds since the plan was made.

        Returns
        -------
        ndarray or None
            None beyond the horizon, and of a plan that may not be applied.
        """
        step = self.step(after_s)
        if step is None:
            return None
        whole: F64 = np.ceil(self.on[:, step] - 1e-6)
        return whole


def steps_to_s(reach_s: float) -> tuple[float, ...]:
    """Lengths of the steps of a plan that reaches so far, or as far as any.

    Parameters
    ----------
    reach_s : float
        How far the plan is to reach, in seconds.

    Returns
    -------
    tuple of float
        Seconds; a whole step may end beyond what was asked for.

    Examples
    --------
    >>> from voltana_ctrl.control.situation import STEPS_S
    >>> steps_to_s(120.0) == STEPS_S, sum(steps_to_s(1800.0))
    (True, 1980.0)
    """
    steps_s, far = list(STEPS_S), 0
    while sum(steps_s) < reach_s and len(steps_s) < _MOST_STEPS:
        steps_s.append(_FAR_STEPS_S[min(far, len(_FAR_STEPS_S) - 1)])
        far += 1
    return tuple(steps_s)
