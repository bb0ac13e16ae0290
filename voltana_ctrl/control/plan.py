"""The plan: how many instances to keep awake, where waking takes time. Stated once in CVXPY.

For groups of equal instances, on a grid of times that grows coarser. The least power ``p(x)`` of
one awake instance at a load ``x`` is convex, but for being on or off; of ``a`` of them that share a
load ``lambda`` it is the perspective ``a p(lambda / a)``, and with facets
``p(x) = max_l (alpha_l x + beta_l)``

    ``P >= alpha_l lambda + beta_l a``   for every facet ``l``

is linear in load and count: clock, routing and active set are chosen together. Around it: starts
that mature after the wake time, stops that drain, the fast states (prefill backlog, decode load),
a power budget, capacity for a reserve beyond what is expected, and work that may wait: what is let
in of it beside the reserve, and what its deadlines ask for. See the theory page.

Only counts of the near steps are whole numbers. HiGHS solves both: the relaxation, whose
multipliers are the prices and whose value bounds the optimum from below, and the mixed-integer
programme. Where the relaxation rounded up is as good, or the other does not end within its limit,
that is the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np

from voltana_ctrl.checks import F64, count, positive
from voltana_ctrl.control.situation import STEPS_S, Plan, PlanStatus, Situation
from voltana_ctrl.control.supply import FACETS
from voltana_ctrl.errors import ConfigError

__all__ = ["Planner"]

#: What a request costs that is made late, and what capacity costs that is missing [J/req]: some
#: hundred times what serving a request takes, so that no energy is worth it.
LATE_J_REQ = 2000.0
#: What a request costs that may wait and is let in too late [W/req]: those that wait for their
#: answer come first, unless it would be minutes.
_BEHIND_W_REQ = 15.0
#: What a change of the rate at which work is let in costs [J s/req]: next to nothing, so that of
#: plans that cost the same the calmer is taken.
_CALM_J_S_REQ = 5.0
#: What holding one costs [W/req]: next to nothing, too, so that nobody waits for nothing.
_HELD_W_REQ = 2e-4
#: Part of the capacity beside the reserve of which work that can wait is sure: the rest depends on
#: margins that are still being learnt. What it costs to let one in beyond, or out of the reserve
#: [J/req]: only where deadlines ask for it.
_CAREFUL_FRAC, _LENT_J_REQ = 0.85, 100.0
#: What it costs more to let in what leaves no such room even if no more come than are expected
#: [J/req]: backlogs are worked off evenly rather than at last.
_CROWD_J_REQ = 400.0
#: Share of a budget that is drawn with ease: the ceilings that keep it count on the worst. What
#: every joule beyond costs: it is no place for work that can wait. And for how many times that a
#: request stays it holds before a cut, and costs how much more there, so that batches and queues
#: are small when it comes: what waits then is late for long.
_EASY_FRAC, _STRAIN, _EARLY, _EARLY_STRAIN = 0.85, 20.0, 3.0, 200.0
#: Where counts are whole, costs are in kilojoules: in joules HiGHS finds integers that its own
#: tolerances do not let pass, and says so on the terminal.
_KJ = 1e-3
#: Relative gap at which a plan is as good as optimal.
_GAP_FRAC = 1e-3
#: Power above any budget.
_NO_LIMIT_W = 1e9


class Planner:
    """The programme of one fleet, compiled once; every plan changes its parameters only.

    Parameters
    ----------
    phases : sequence of int
        Phase of each group: 0 where requests start, 1 where they are decoded.
    wake_s, wake_j, idle_w, parked_w : ndarray, shape (n_groups,)
        Waking time and energy, idle and parked power of one instance of each group.
    steps_s : sequence of float
        Lengths of the steps, see :func:`~voltana_ctrl.control.situation.steps_to_s`.
    defers : bool
        Whether there are requests that may wait.
    whole_steps : int
        Steps, from the first, whose counts are whole numbers; 0 where nobody asks for counts.
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
        steps_s: Sequence[float] = STEPS_S,
        defers: bool = False,
        whole_steps: int = 6,
        max_nodes: int = 200,
        limit_s: float | None = None,
    ) -> None:
        count("Planner.max_nodes", max_nodes)
        count("Planner.whole_steps", whole_steps, minimum=0)
        self._whole_steps = min(whole_steps, len(steps_s) - 1)
        self._defers = defers
        if limit_s is not None:
            positive("Planner.limit_s", limit_s)
        self._phase = np.asarray(phases, dtype=np.int64)
        self._wake_s, self._wake_j, self._idle_w, self._parked_w = (
            np.asarray(each, dtype=np.float64) for each in (wake_s, wake_j, idle_w, parked_w)
        )
        self._limits: dict[str, Any] = {"node_limit": max_nodes}
        if limit_s is not None:
            self._limits["time_limit"] = limit_s
        self._dt_s = np.asarray(steps_s, dtype=np.float64)
        #: When each step begins and ends.
        self.end_s = np.cumsum(self._dt_s)
        self.begin_s = np.concatenate([[0.0], self.end_s[:-1]])
        self._parameters()
        #: The relaxation, and the programme with whole counts in the near steps.
        self.relaxed, self._relaxed_parts = self._stated(whole=False)
        self.mixed: cp.Problem | None = None
        if whole_steps:
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
        if self._defers:
            shapes |= {
                "come": (steps,), "due": (steps,), "easy": (steps,), "strain": (steps,),
                "room": (phases, steps), "wide": (phases, steps),
                "let_in": (1,), "left": (1,),
            }  # fmt: skip
        self._p = {name: cp.Parameter(shape, name=name) for name, shape in shapes.items()}

    def _matured(self, group: int) -> F64:
        """Who was started in step j serves in step k, shape (n_steps, n_steps)."""
        ready_s = self.begin_s + self._wake_s[group]
        # In coarse steps the middle decides; of near ones, which are applied, nothing is rounded.
        middle_s = self.begin_s + 0.5 * self._dt_s
        serves = middle_s[None, :] >= ready_s[:, None]
        near = self.begin_s[None, :] >= ready_s[:, None] - 1e-9
        serves[: self._whole_steps] = near[: self._whole_steps]
        matured: F64 = serves.astype(np.float64)
        return matured

    def _stated(self, *, whole: bool) -> tuple[cp.Problem, dict[str, Any]]:
        """The problem, with whole counts in the near steps or without, and what is read of it.

        Where counts are whole, what is let in has been decided by the relaxation.
        """
        p, dt = self._p, self._dt_s
        defers = self._defers and not whole
        groups, steps = len(self._phase), len(dt)
        phases = int(self._phase.max()) + 1

        def counts(name: str) -> Any:
            # One integer array for the near steps, one continuous for the rest.
            near = self._whole_steps if whole else 0
            far = cp.Variable((groups, steps - near), name=f"{name}_far")
            if near == 0:
                return far
            return cp.hstack([cp.Variable((groups, near), integer=True, name=f"{name}_near"), far])

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
        comes: Any = p["arrival"]
        let_in: Any = np.zeros(steps)
        follows: Any = np.zeros(steps + 1)
        lent: Any = np.zeros(steps)
        waits_j: Any = 0.0
        if defers:
            let_in, waits_j, more = self._waiting(upto)
            comes, rules = comes + let_in, rules + more
            lent = cp.Variable(steps, nonneg=True, name="lent")
            strain = cp.Variable(steps, nonneg=True, name="strain")
            crowd = cp.Variable(steps, nonneg=True, name="crowd")
            rules += [lent <= let_in, drawn + surge <= p["easy"] + strain]
            waits_j = waits_j + (_LENT_J_REQ * lent + _CROWD_J_REQ * crowd) @ dt
            waits_j = waits_j + p["strain"] @ strain
            follows = cp.Variable(steps + 1, nonneg=True, name="follows")
            follow = cp.multiply(p["stay"], follows[:-1]) + cp.multiply(p["follow"], let_in)
            rules += [follows[0] == 0.0, follows[1:] == follow]
        # Prefill works off a queue; what it has done is what decode takes in.
        done = cp.sum(load[np.flatnonzero(self._phase == 0)], axis=0)
        balance = queue[1:] == queue[:-1] + cp.multiply(dt, comes - done)
        rules += [balance, queue[0] == p["backlog"][0]]
        if phases > 1:
            rules += [
                flow[0] == p["decode"][0],
                flow[1:] == cp.multiply(p["stay"], flow[:-1]) + cp.multiply(p["follow"], done),
                cp.sum(load[np.flatnonzero(self._phase == 1)], axis=0) + over[1] == flow[1:],
            ]
        for phase in range(phases):
            able = sum(p["most_req_s"][g] * awake[g] for g in np.flatnonzero(self._phase == phase))
            # What may wait is let in beside the reserve, not out of it; decode follows.
            beside = let_in if phase == 0 else follows[1:]
            rules.append(able + short[phase] + lent >= p["reserve"][phase] + beside)
            if defers:
                rules.append(beside <= p["room"][phase] + lent)
                rules.append(beside <= p["wide"][phase] + crowd)
        late = cp.sum(queue[1:] @ dt) / 2.0 + cp.sum(over @ dt) + cp.sum(short @ dt)
        cost = cost + p["cost"] @ drawn + LATE_J_REQ * late + waits_j
        problem = cp.Problem(cp.Minimize((_KJ if whole else 1.0) * cost), rules)
        on = cp.vstack([awake[g] + waking[g] for g in range(groups)])
        parts = {"on": on, "drawn": drawn, "balance": balance, "limit": limit}
        if defers:
            beside = cp.vstack([let_in - lent, *[follows[1:] - lent] * (phases - 1)])
            parts |= {"let_in": let_in, "beside": beside, "waits_j": waits_j}
        return problem, parts

    def _waiting(self, upto: F64) -> tuple[Any, Any, list[Any]]:
        """Requests that may wait: rate at which they are let in, what that costs, and its rules.

        ``due_k <= m_k + sum_{j <= k} u_j dt_j`` and ``sum_{j <= k} u_j dt_j <= come_k``: whoever
        must be let in by the end of step k has been, or is counted among those behind, and nobody
        is let in before he came.
        """
        p, dt, steps = self._p, self._dt_s, len(self._dt_s)
        let_in = cp.Variable(steps, nonneg=True, name="let_in")
        behind = cp.Variable(steps, nonneg=True, name="behind")
        change = cp.Variable(steps, nonneg=True, name="change")
        so_far = cp.multiply(dt, let_in) @ upto
        before = cp.hstack([p["let_in"], let_in[:-1]])
        rules = [
            so_far <= p["come"], so_far + behind >= p["due"],
            change >= let_in - before, change >= before - let_in,
        ]  # fmt: skip
        held = p["come"][-1] - so_far[-1]
        costs = _BEHIND_W_REQ * (behind @ dt) + _CALM_J_S_REQ * cp.sum(change)
        costs = costs - _HELD_W_REQ * (so_far @ dt)  # and the constant of what comes
        # A parameter never multiplies a parameter: what is held at the end costs this less.
        return let_in, costs - p["left"][0] * so_far[-1], [*rules, held >= 0.0]

    # A plan

    def plan(self, situation: Situation) -> Plan:
        """Plan from this situation.

        Parameters
        ----------
        situation : Situation
            State of the fleet and what is expected.

        Returns
        -------
        Plan
            Its status says whether it may be applied, and whether its counts are the best whole
            numbers or only rounded up.
        """
        self._assign(situation)
        status = _solved(self.relaxed)
        if status is not PlanStatus.OK:
            return self._none(status)
        bound_j, parts = float(self.relaxed.value), self._relaxed_parts
        exact = replace(
            self._read(self.relaxed, parts),
            request_j=-np.asarray(parts["balance"].dual_value),
            watt_frac=np.abs(np.asarray(parts["limit"].dual_value)) / self._dt_s,
        )
        near = exact.on[:, : self._whole_steps]
        if np.all(np.abs(near - np.round(near)) < 1e-6):
            return exact
        rounded = self._rounded(situation, exact)
        if rounded.status.usable and rounded.objective_j <= bound_j + _GAP_FRAC * abs(bound_j):
            return replace(rounded, status=PlanStatus.OK)
        waits_j = 0.0
        if self._defers:
            # What is let in comes as it was planned, and needs its room.
            p, waits_j = self._p, float(parts["waits_j"].value)
            p["arrival"].value = p["arrival"].value + exact.let_in_req_s
            p["reserve"].value = np.maximum(p["reserve"].value + parts["beside"].value, 0.0)
        if self.mixed is None or _solved(self.mixed, self._limits) is not PlanStatus.OK:
            return rounded
        found = replace(
            self._read(self.mixed, self._mixed_parts), bound_j=bound_j,
            request_j=exact.request_j, watt_frac=exact.watt_frac, let_in_req_s=exact.let_in_req_s,
        )  # fmt: skip
        # Optimal for what is let in; whether another flow would do better nobody has asked.
        status = PlanStatus.ROUNDED if self._defers else PlanStatus.OK
        return replace(found, status=status, objective_j=found.objective_j + waits_j)

    def _read(self, problem: cp.Problem, parts: dict[str, Any]) -> Plan:
        """Plan of a problem that is solved; without prices, which the relaxation has."""
        steps, cost_j = len(self._dt_s), float(problem.value)
        if problem is self.mixed:
            cost_j /= _KJ
        let_in = np.maximum(parts["let_in"].value, 0.0) if "let_in" in parts else np.zeros(steps)
        return Plan(
            status=PlanStatus.OK, end_s=self.end_s, on=np.asarray(parts["on"].value),
            power_w=np.asarray(parts["drawn"].value), objective_j=cost_j, bound_j=cost_j,
            request_j=np.zeros(steps), watt_frac=np.zeros(steps), let_in_req_s=np.asarray(let_in),
        )  # fmt: skip

    def _rounded(self, situation: Situation, exact: Plan) -> Plan:
        """The relaxation with every count rounded up, if that keeps the budget."""
        on = np.minimum(np.ceil(exact.on - 1e-6), situation.installed[:, None])
        # One awake instance more draws at most its power at no load, and has to be woken.
        more_w = (on - exact.on) * (self._p["beta"].value.max(axis=1) - self._parked_w)[:, None]
        more_w = np.maximum(more_w, 0.0).sum(axis=0)
        power_w = exact.power_w + more_w
        if not np.all(power_w <= self._p["budget"].value + 1e-6):
            return self._none(PlanStatus.FAILED)
        before = (self._p["ready"].value + self._p["waking"].value)[:, :1]
        starts, woken = (
            np.maximum(np.diff(each, axis=1, prepend=before), 0.0).sum(axis=1)
            for each in (on, exact.on)
        )
        wake_j = self._wake_j + np.maximum(self._idle_w - self._parked_w, 0.0) * self._wake_s
        more_j = float(self._p["cost"].value @ more_w)
        more_j += float(wake_j @ np.maximum(starts - woken, 0.0))
        return replace(
            exact, status=PlanStatus.ROUNDED, on=on, power_w=power_w,
            objective_j=exact.bound_j + more_j,
        )  # fmt: skip

    def _left_j(self, alpha_j_req: F64, weight: F64) -> float:
        """What one costs that is held at the end: the most it can, so that nobody stays."""
        phases = range(int(self._phase.max()) + 1)
        each = [alpha_j_req[self._phase == phase].max(initial=0.0) for phase in phases]
        return float(np.sum(each) * weight.max())

    def _soon(self, limit: F64, situation: Situation) -> F64:
        """Least limit of each step, and after it as long as what it lets in is there."""
        until_s = self.end_s + _EARLY * situation.residence_s
        return np.array(
            [
                np.min(limit[k : np.searchsorted(self.begin_s, until_s[k])])
                for k in range(len(limit))
            ]
        )

    def _none(self, status: PlanStatus) -> Plan:
        groups, steps = len(self._phase), len(self._dt_s)
        return Plan(
            status=status, end_s=self.end_s, on=np.zeros((groups, steps)),
            power_w=np.zeros(steps), objective_j=np.inf, bound_j=-np.inf,
            request_j=np.zeros(steps), watt_frac=np.zeros(steps), let_in_req_s=np.zeros(steps),
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
            [[np.sum(at_s > begin_s + 1e-9) for begin_s in self.begin_s] for at_s in s.waking_s],
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
        if self._defers:
            # Nobody is due who has not come.
            come = np.zeros(len(dt)) if s.come_req is None else s.come_req
            due = np.zeros(len(dt)) if s.due_req is None else np.minimum(s.due_req, come)
            soon = self._soon(values["budget"], s)
            sure = _CAREFUL_FRAC * top[:, None]
            room = np.maximum(sure - values["reserve"], 0.0)
            values |= {
                "come": come, "due": due, "easy": _EASY_FRAC * soon, "room": room,
                "wide": np.maximum(sure - s.arrival_req_s, room),
                "strain": dt * np.where(soon < values["budget"], _EARLY_STRAIN, _STRAIN),
                "let_in": np.array([s.let_in_req_s]),
                "left": np.array([self._left_j(values["alpha"], values["cost"] / dt)]),
            }  # fmt: skip
        for name, value in values.items():
            p[name].value = np.asarray(value, dtype=np.float64)


def _solved(problem: cp.Problem, limits: dict[str, Any] | None = None) -> PlanStatus:
    """Solve with HiGHS as SciPy brings it; whether the variables hold a solution."""
    # Of some programmes without a solution the simplex method does not find out that there is none,
    # where interior points do. It does not know whole numbers.
    tries: tuple[dict[str, Any], ...] = ({}, {"method": "highs-ipm"})
    if limits is not None:
        tries = ({"mip_rel_gap": _GAP_FRAC, **limits},)
    for options in tries:
        try:
            problem.solve(solver=cp.SCIPY, enforce_dpp=True, scipy_options=options)
            break
        except cp.SolverError:
            continue
    else:
        return PlanStatus.FAILED
    # Nothing is unbounded here: no cost falls without end.
    if problem.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE, "infeasible_or_unbounded"):
        return PlanStatus.INFEASIBLE
    return PlanStatus.OK if problem.status == cp.OPTIMAL else PlanStatus.FAILED
