"""The plan: how many instances to keep awake, where waking takes time. Stated once in CVXPY.

For groups of equal instances, on a grid of times that grows coarser. The least power ``p(x)`` of
one awake instance at a load ``x`` is convex, but for being on or off; of ``a`` of them that share a
load ``lambda`` it is the perspective ``a p(lambda / a)``, and with facets
``p(x) = max_l (alpha_l x + beta_l)``

    ``P >= alpha_l lambda + beta_l a``   for every facet ``l``

is linear in load and count: clock, routing and active set are chosen together. Around it: starts
that mature after the wake time, stops that drain, the fast states (prefill backlog, decode load),
a power budget, and capacity for a reserve beyond what is expected. See the theory page.

Only counts of the near steps are whole numbers. HiGHS solves both: the relaxation, whose
multipliers are the prices and whose value bounds the optimum from below, and the mixed-integer
programme. Where that does not end within its limit, the relaxation rounded up is the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import cvxpy as cp
import numpy as np

from voltana_ctrl.checks import F64, count, positive
from voltana_ctrl.control.supply import FACETS, Supply
from voltana_ctrl.errors import ConfigError

__all__ = ["Plan", "PlanStatus", "Planner", "Situation"]

#: Lengths of the steps [s]; two minutes in all.
STEPS_S = (1.0, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 10.0, 10.0, 20.0, 30.0, 30.0)
#: What a request costs that is made late, and what capacity costs that is missing [J/req]: some
#: hundred times what serving a request takes, so that no energy is worth it.
_LATE_J_REQ = 2000.0
#: Relative gap at which a plan is as good as optimal.
_GAP_FRAC = 1e-3
#: Power above any budget.
_NO_LIMIT_W = 1e9


class PlanStatus(Enum):
    """Whether a plan may be applied; the value is what it means.

    Examples
    --------
    >>> PlanStatus.ROUNDED.usable, PlanStatus.INFEASIBLE.usable
    (True, False)
    """

    OK = "optimal to a tenth of a percent"
    ROUNDED = "feasible, but not proved optimal: the relaxation, rounded up"
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
        What the groups can do.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """How many to keep awake.

    Parameters
    ----------
    status : PlanStatus
        Whether it may be applied.
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
    """

    status: PlanStatus
    on: np.ndarray
    power_w: F64
    objective_j: float
    bound_j: float
    request_j: F64
    watt_frac: F64

    def wanted(self, after_s: float) -> F64 | None:
        """Instances per group that should serve or wake, so long after the plan was made.

        Parameters
        ----------
        after_s : float
            Seconds.

        Returns
        -------
        ndarray or None
            None beyond the horizon, and of a plan that may not be applied.
        """
        step = int(np.searchsorted(np.cumsum(STEPS_S), after_s, side="right"))
        if not self.status.usable or step >= len(STEPS_S):
            return None
        whole: F64 = np.ceil(self.on[:, step] - 1e-6)
        return whole


class Planner:
    """The programme of one fleet, compiled once; every plan changes its parameters only.

    Parameters
    ----------
    phases : sequence of int
        Phase of each group: 0 where requests start, 1 where they are decoded.
    wake_s, wake_j, idle_w, parked_w : ndarray, shape (n_groups,)
        Of the instances of each group.
    whole_steps : int
        Steps, from the first, whose counts are whole numbers.
    max_nodes : int
        Branch-and-bound nodes after which the relaxation is rounded up: a limit that is the same
        on every machine.
    limit_s : float, optional
        The same in seconds, for a fleet that runs.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> planner = Planner([0, 1], wake_s=[10.0, 10.0], wake_j=[0.0, 0.0], idle_w=[60.0, 60.0],
    ...                   parked_w=[20.0, 20.0])
    >>> planner.relaxed.is_dpp()
    True
    """

    def __init__(
        self,
        phases: Sequence[int],
        *,
        wake_s: Sequence[float] | F64,
        wake_j: Sequence[float] | F64,
        idle_w: Sequence[float] | F64,
        parked_w: Sequence[float] | F64,
        whole_steps: int = 6,
        max_nodes: int = 200,
        limit_s: float | None = None,
    ) -> None:
        count("Planner.max_nodes", max_nodes)
        count("Planner.whole_steps", whole_steps)
        self._whole_steps = min(whole_steps, len(STEPS_S) - 1)
        if limit_s is not None:
            positive("Planner.limit_s", limit_s)
        self._phase = np.asarray(phases, dtype=np.int64)
        self._wake_s, self._wake_j, self._idle_w, self._parked_w = (
            np.asarray(each, dtype=np.float64) for each in (wake_s, wake_j, idle_w, parked_w)
        )
        self._limits: dict[str, Any] = {"node_limit": max_nodes}
        if limit_s is not None:
            self._limits["time_limit"] = limit_s
        self._dt_s = np.array(STEPS_S)
        self._begin_s = np.concatenate([[0.0], np.cumsum(self._dt_s)[:-1]])
        self._parameters()
        #: The relaxation, and the programme with whole counts in the near steps.
        self.relaxed, self._relaxed_parts = self._stated(whole=False)
        self.mixed, self._mixed_parts = self._stated(whole=True)
        if not self.relaxed.is_dpp():
            raise ConfigError("Planner: the problem is no longer DPP; every plan would recompile")

    def _parameters(self) -> None:
        groups, steps, phases = len(self._phase), len(self._dt_s), int(self._phase.max()) + 1
        shapes: dict[str, tuple[int, ...]] = {
            "alpha": (groups, FACETS), "beta": (groups, FACETS), "most_req_s": (groups,),
            "installed": (groups,), "ready": (groups, steps), "waking": (groups, steps),
            "draining": (groups,), "kept": (groups, steps), "drain_w": (groups,),
            "arrival": (steps,), "reserve": (phases, steps), "backlog": (1,), "decode": (1,),
            "follow": (steps,), "stay": (steps,), "budget": (steps,), "cost": (steps,),
        }  # fmt: skip
        self._p = {name: cp.Parameter(shape, name=name) for name, shape in shapes.items()}

    def _matured(self, group: int) -> F64:
        """Who was started in step j serves in step k, shape (n_steps, n_steps)."""
        ready_s = self._begin_s + self._wake_s[group]
        # In coarse steps the middle decides; of near ones, which are applied, nothing is rounded.
        middle_s = self._begin_s + 0.5 * self._dt_s
        serves = middle_s[None, :] >= ready_s[:, None]
        near = self._begin_s[None, :] >= ready_s[:, None] - 1e-9
        serves[: self._whole_steps] = near[: self._whole_steps]
        matured: F64 = serves.astype(np.float64)
        return matured

    def _stated(self, *, whole: bool) -> tuple[cp.Problem, dict[str, Any]]:
        """The problem, with whole counts in the near steps or without."""
        p, dt = self._p, self._dt_s
        groups, steps = len(self._phase), len(dt)
        phases = int(self._phase.max()) + 1

        def counts(name: str) -> Any:
            # One integer array for the near steps, one continuous for the rest.
            near = cp.Variable((groups, self._whole_steps), integer=whole, name=f"{name}_near")
            far = cp.Variable((groups, steps - self._whole_steps), name=f"{name}_far")
            return cp.hstack([near, far])

        start, stop, back = counts("start"), counts("stop"), cp.Variable(groups, name="back")
        load = cp.Variable((groups, steps), nonneg=True, name="load")
        power = cp.Variable((groups, steps), name="power")
        drain = cp.Variable((groups, steps), nonneg=True, name="drain")
        queue = cp.Variable(steps + 1, nonneg=True, name="queue")
        flow = cp.Variable(steps + 1, nonneg=True, name="flow")
        over = cp.Variable((phases, steps), nonneg=True, name="over")
        short = cp.Variable((phases, steps), nonneg=True, name="short")
        # A variable, so that a parameter never multiplies a parameter.
        awake = cp.Variable((groups, steps), nonneg=True, name="awake")
        rules: list[Any] = [start >= 0, stop >= 0, back >= 0, back <= p["draining"]]
        waking = []
        upto = np.triu(np.ones((steps, steps)))  # x @ upto sums over the steps so far
        for g in range(groups):
            matured = start[g] @ self._matured(g)
            waking.append(p["waking"][g] + start[g] @ upto - matured)
            rules += [
                awake[g] == p["ready"][g] + back[g] + matured - stop[g] @ upto,
                drain[g, 0] == p["draining"][g] - back[g] + stop[g, 0],
                drain[g, 1:] == cp.multiply(p["kept"][g, :-1], drain[g, :-1]) + stop[g, 1:],
                # An instance that drains is up for a while beside those that serve and wake.
                awake[g] + waking[g] <= p["installed"][g],
                load[g] <= p["most_req_s"][g] * awake[g],
            ]
            rules += [
                power[g] >= p["alpha"][g, f] * load[g] + p["beta"][g, f] * awake[g]
                for f in range(FACETS)
            ]
        draws: Any = 0.0
        surge: Any = 0.0
        cost: Any = 0.0
        for g in range(groups):
            rest_w, wake_w = self._parked_w[g], self._idle_w[g] - self._parked_w[g]
            draws = (
                draws
                + power[g] - rest_w * awake[g]
                + wake_w * waking[g]
                + p["drain_w"][g] * drain[g]
                + rest_w * p["installed"][g]
            )  # fmt: skip
            surge = surge + self._wake_j[g] / max(self._wake_s[g], 1.0) * waking[g]
            # In coarse steps a start is done within its own: its time is charged at once.
            within_j = wake_w * self._wake_s[g] * np.diag(self._matured(g))
            cost = cost + (self._wake_j[g] + within_j) @ start[g]
        drawn = cp.Variable(steps, name="drawn")
        rules.append(drawn == draws)
        limit = drawn + surge <= p["budget"]
        rules.append(limit)
        # Prefill works off a queue; what it has done is what decode takes in.
        done = cp.sum(load[np.flatnonzero(self._phase == 0)], axis=0)
        balance = queue[1:] == queue[:-1] + cp.multiply(dt, p["arrival"] - done)
        rules += [balance, queue[0] == p["backlog"][0]]
        if phases > 1:
            rules += [
                flow[0] == p["decode"][0],
                flow[1:] == cp.multiply(p["stay"], flow[:-1]) + cp.multiply(p["follow"], done),
                cp.sum(load[np.flatnonzero(self._phase == 1)], axis=0) + over[1] == flow[1:],
            ]
        for phase in range(phases):
            able = sum(p["most_req_s"][g] * awake[g] for g in np.flatnonzero(self._phase == phase))
            rules.append(able + short[phase] >= p["reserve"][phase])
        late = cp.sum(queue[1:] @ dt) / 2.0 + cp.sum(over @ dt) + cp.sum(short @ dt)
        cost = cost + p["cost"] @ drawn + _LATE_J_REQ * late
        problem = cp.Problem(cp.Minimize(cost), rules)
        on = cp.vstack([awake[g] + waking[g] for g in range(groups)])
        return problem, {"on": on, "drawn": drawn, "balance": balance, "limit": limit}

    # A plan

    def plan(self, situation: Situation) -> Plan:
        """Plan from this situation.

        Parameters
        ----------
        situation : Situation
            Where the fleet is and what is expected.
        """
        self._assign(situation)
        parts = self._relaxed_parts
        status = _solved(self.relaxed)
        if status is not PlanStatus.OK:
            return self._none(status)
        dt = self._dt_s
        bound_j = float(self.relaxed.value)
        request_j = -np.asarray(parts["balance"].dual_value)
        watt = np.abs(np.asarray(parts["limit"].dual_value)) / dt
        found = _solved(self.mixed, self._limits)
        if found is PlanStatus.OK:
            mixed = self._mixed_parts
            return Plan(
                status=found, on=np.asarray(mixed["on"].value),
                power_w=np.asarray(mixed["drawn"].value), objective_j=float(self.mixed.value),
                bound_j=bound_j, request_j=request_j, watt_frac=watt,
            )  # fmt: skip
        return self._rounded(situation, bound_j, request_j, watt)

    def _rounded(self, situation: Situation, bound_j: float, request_j: F64, watt: F64) -> Plan:
        """The relaxation with every count rounded up, if that keeps the budget."""
        parts = self._relaxed_parts
        exact = np.asarray(parts["on"].value)
        on = np.minimum(np.ceil(exact - 1e-6), situation.installed[:, None])
        # One awake instance more draws at most its power at no load.
        more_w = (on - exact) * (self._p["beta"].value.max(axis=1) - self._parked_w)[:, None]
        power_w = np.asarray(parts["drawn"].value) + np.maximum(more_w, 0.0).sum(axis=0)
        fits = bool(np.all(power_w <= self._p["budget"].value + 1e-6))
        if not fits:
            return self._none(PlanStatus.FAILED)
        cost = self._p["cost"].value
        return Plan(
            status=PlanStatus.ROUNDED, on=on, power_w=power_w,
            objective_j=bound_j + float(cost @ np.maximum(more_w, 0.0).sum(axis=0)),
            bound_j=bound_j, request_j=request_j, watt_frac=watt,
        )  # fmt: skip

    def _none(self, status: PlanStatus) -> Plan:
        groups, steps = len(self._phase), len(self._dt_s)
        return Plan(
            status=status, on=np.zeros((groups, steps)), power_w=np.zeros(steps),
            objective_j=np.inf, bound_j=-np.inf, request_j=np.zeros(steps),
            watt_frac=np.zeros(steps),
        )  # fmt: skip

    def _assign(self, situation: Situation) -> None:
        """Put a situation into the parameters."""
        p, dt, s = self._p, self._dt_s, situation
        supplies = list(s.supplies)
        drain_s = np.array([each.drain_s for each in supplies])
        follow = -np.expm1(-dt / max(s.residence_s, 1e-3))
        # Of those that wake already, how many do so still when a step begins.
        n_waking = np.array([len(at_s) for at_s in s.waking_s], dtype=np.float64)
        waking = np.array(
            [[np.sum(at_s > begin_s + 1e-9) for begin_s in self._begin_s] for at_s in s.waking_s],
            dtype=np.float64,
        )
        # Nobody can hold more in reserve than there is.
        able = np.array([each.most_req_s for each in supplies]) * s.installed
        top = np.array([able[self._phase == phase].sum() for phase in range(len(s.reserve_req_s))])
        values = {
            "alpha": np.array([each.alpha_j_req for each in supplies]),
            "beta": np.array([each.beta_w for each in supplies]),
            "most_req_s": np.array([each.most_req_s for each in supplies]),
            "installed": s.installed,
            "ready": s.awake[:, None] + n_waking[:, None] - waking,
            "waking": waking,
            "draining": np.minimum(s.draining, np.maximum(s.installed - s.awake, 0.0)),
            "kept": np.exp(-dt[None, :] / np.maximum(drain_s, 1e-3)[:, None]),
            "drain_w": np.array([each.drain_w for each in supplies]) - self._parked_w,
            "arrival": s.arrival_req_s,
            "reserve": np.minimum(s.reserve_req_s, top[:, None]),
            "backlog": np.array([max(0.0, s.backlog_req)]),
            "decode": np.array([max(0.0, s.decode_req_s)]),
            "follow": follow, "stay": 1.0 - follow,
            "budget": np.minimum(s.budget_w, _NO_LIMIT_W),
            "cost": dt if s.price_frac is None else dt * s.price_frac,
        }  # fmt: skip
        for name, value in values.items():
            p[name].value = np.asarray(value, dtype=np.float64)


def _solved(problem: cp.Problem, limits: dict[str, Any] | None = None) -> PlanStatus:
    """Solve with HiGHS as SciPy brings it; whether the variables hold a solution."""
    options: dict[str, Any] = {} if limits is None else {"mip_rel_gap": _GAP_FRAC, **limits}
    try:
        problem.solve(solver=cp.SCIPY, enforce_dpp=True, scipy_options=options)
    except cp.SolverError:
        return PlanStatus.FAILED
    if problem.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
        return PlanStatus.INFEASIBLE
    return PlanStatus.OK if problem.status == cp.OPTIMAL else PlanStatus.FAILED
