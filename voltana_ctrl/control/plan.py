"""The model-predictive layer: a receding-horizon quadratic programme, stated once in CVXPY.

Per slot (an instance, or the mean of a group of like instances) the states of
:mod:`voltana_ctrl.control.model`, re-linearised at every plan; clocks with dead time; routing; ITL,
KV and TTFT as soft constraints with exact penalties; the fleet's power budget as a hard one.
Everything that changes is a parameter entering affinely (disciplined parametrised
programming), so a plan updates the compiled data in place and hands it to PIQP; where PIQP is
not installed CVXPY solves the same problem with Clarabel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import cvxpy as cp
import numpy as np
from scipy import sparse

from voltana_ctrl.checks import F64, I64, count, positive
from voltana_ctrl.control.model import decode_steps, zero_order_hold
from voltana_ctrl.control.slots import Slots
from voltana_ctrl.control.target import Target
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.laws import decode_tangent
from voltana_ctrl.types import FleetSpec, FleetState, Load, Slo, Status

__all__ = ["Plan", "Planner"]

#: Parameters per decode slot.
_DECODE = (
    "a_nn", "a_nm", "a_mn", "a_mm", "b_n", "b_m", "e_n", "e_m", "c_n", "c_m", "step_n", "step_m",
    "step_f", "step_rest_s", "power_n", "power_f", "power_rest_w", "size", "n0", "m0", "f0",
    "lam_goal", "n_goal", "f_goal", "lam_max", "kv_ktok",
)  # fmt: skip
_PREFILL = ("size", "q0", "cap0", "rate_goal", "rate_max")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """First step of a plan.

    Parameters
    ----------
    status : Status
        Only OK may be applied.
    freq_mhz : ndarray, shape (n,)
        Planned clocks.
    route_frac : ndarray, shape (n,)
        Shares of the arrivals over the horizon, per phase.
    price_j_req : ndarray, shape (n,)
        First-step costate: energy and penalty that one more request would cost there.
    objective_j : float
        Cost over the horizon.
    iterations : int
        Of the solver.

    Examples
    --------
    >>> Plan.__slots__[0]
    'status'
    """

    status: Status
    freq_mhz: F64
    route_frac: F64
    price_j_req: F64
    objective_j: float
    iterations: int


class Planner:
    """The compiled programme of one fleet.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed; prefill and decode apart.
    slo : Slo
        Promises.
    horizon : int
        Steps.
    dt_s : float
        Length of a step.
    delay_s : float
        From asking for a clock until it runs; calls of one node follow one another, which the
        caller adds.
    margin_frac : tuple of float
        TTFT and ITL margin.
    slew_mhz_s : float
        Fastest planned fall of a clock.
    max_iterations : int
        The solver's budget, in iterations so that simulations are deterministic.
    solver : {"piqp", "clarabel"}, optional
        PIQP where it is installed.

    Raises
    ------
    ConfigError
        If a setting is out of range or the fleet is colocated.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> Planner(fleet, Slo(ttft_s=0.6, itl_s=0.06), horizon=2).problem.is_dpp()
    True
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        horizon: int = 10,
        dt_s: float = 0.2,
        delay_s: float = 0.025,
        margin_frac: tuple[float, float] = (0.02, 0.035),
        slew_mhz_s: float = 2000.0,
        max_iterations: int = 100,
        solver: str | None = None,
    ) -> None:
        count("Planner.horizon", horizon)
        count("Planner.max_iterations", max_iterations)
        positive("Planner.dt_s", dt_s)
        positive("Planner.slew_mhz_s", slew_mhz_s)
        if fleet.colocated:
            raise ConfigError("Planner: expected prefill and decode apart, got colocated instances")
        if solver not in (None, "piqp", "clarabel"):
            raise ConfigError(f"Planner.solver: expected 'piqp' or 'clarabel', got {solver!r}")
        self.fleet = fleet
        self.slo = slo
        self.horizon = horizon
        self.dt_s = dt_s
        self.delay_s = delay_s
        self.slew_ghz = slew_mhz_s * dt_s / 1000.0
        self.ttft_s = slo.ttft_s / (1.0 + margin_frac[0]) - delay_s
        self.itl_s = slo.itl_s / (1.0 + margin_frac[1])
        self.max_iterations = max_iterations
        self.solver = solver or ("piqp" if find_spec("piqp") else "clarabel")
        self._slots = [Slots(fleet, fleet.prefill), Slots(fleet, fleet.decode)]
        self._min_mhz, self._max_mhz = fleet.min_mhz, fleet.max_mhz
        self._kv_capacity_tok = fleet.kv_capacity_tok
        self._state_problem()
        self._compiled: Any = None
        #: Value of every parameter, by its id.
        self.values: dict[int, F64] = {}

    # The problem, stated once

    def _state_problem(self) -> None:
        prefill, decode = self._slots
        steps, dt = self.horizon, self.dt_s
        n_p, n_d = len(prefill), len(decode)
        d = {name: cp.Parameter(n_d, name=name) for name in _DECODE}
        p = {name: cp.Parameter(n_p, name=f"prefill_{name}") for name in _PREFILL}
        arrivals = cp.Parameter(2, name="arrivals")  # ktok/s of prompts, req/s
        budget_w = cp.Parameter(name="budget_w")
        # Bounds of variables cost the solver less than rows of a matrix.
        lowest, highest = (np.tile(clocks, (steps, 1)) for clocks in decode.clock_ghz)
        slowest, fastest = (np.tile(r, (steps, 1)) for r in (prefill.rate_min, prefill.rate_max))
        n, m = cp.Variable((steps + 1, n_d)), cp.Variable((steps + 1, n_d))
        f = cp.Variable((steps, n_d), bounds=[lowest, highest])
        lam = cp.Variable((steps, n_d), nonneg=True)
        q = cp.Variable((steps + 1, n_p), nonneg=True)
        cap = cp.Variable((steps, n_p), bounds=[slowest, fastest])
        mu = cp.Variable((steps, n_p), nonneg=True)
        rate = cp.Variable((steps, n_p), nonneg=True)
        power = cp.Variable((steps, n_p))
        # Variables, so that a parameter never multiplies a parameter.
        f_before, cap_before = cp.Variable(n_d), cp.Variable(n_p)
        late = cp.Variable((steps, n_d), nonneg=True)
        full = cp.Variable((steps, n_d), nonneg=True)
        slow = cp.Variable((steps, n_p), nonneg=True)
        # A clock asked for runs after a dead time: `whole` steps and a part of the next.
        whole = int(self.delay_s / dt)
        part = 1.0 - (self.delay_s / dt - whole)

        def runs(asked: cp.Variable, before: cp.Variable, k: int) -> Any:
            now = asked[k - whole] if k >= whole else before
            then = asked[k - whole - 1] if k > whole else before
            return part * now + (1.0 - part) * then

        rules: list[Any] = []
        cost: Any = 0.0
        for k in range(steps):
            clock = runs(f, f_before, k)
            rules += [
                n[k + 1]
                == cp.multiply(d["a_nn"], n[k])
                + cp.multiply(d["a_nm"], m[k])
                + cp.multiply(d["b_n"], clock)
                + cp.multiply(d["e_n"], lam[k])
                + d["c_n"],
                m[k + 1]
                == cp.multiply(d["a_mn"], n[k])
                + cp.multiply(d["a_mm"], m[k])
                + cp.multiply(d["b_m"], clock)
                + cp.multiply(d["e_m"], lam[k])
                + d["c_m"],
                q[k + 1] == q[k] + dt * (rate[k] - mu[k]),
                p["size"] @ rate[k] == arrivals[0],
                d["size"] @ lam[k] == arrivals[1],
            ]
        rules += [n[0] == d["n0"], m[0] == d["m0"], q[0] == p["q0"]]
        rules += [f_before == d["f0"], cap_before == p["cap0"]]
        for k in range(steps):
            clock = runs(f, f_before, k)
            able = runs(cap, cap_before, k)
            rules += [
                cp.multiply(d["step_n"], n[k + 1])
                + cp.multiply(d["step_m"], m[k + 1])
                + cp.multiply(d["step_f"], clock)
                <= d["step_rest_s"] + late[k],
                m[k + 1] <= d["kv_ktok"] + full[k],
                lam[k] <= d["lam_max"],
                rate[k] <= p["rate_max"],
                mu[k] <= able,
                q[k + 1] <= able * self.ttft_s + slow[k],
                f[k] >= (f[k - 1] if k else f_before) - self.slew_ghz,
            ]
            rules += [
                power[k] >= cp.multiply(slope, mu[k]) + start for slope, start in prefill.facets
            ]
            drawn = (
                d["power_n"] @ n[k]
                + d["power_f"] @ clock
                + cp.sum(d["power_rest_w"])
                + p["size"] @ power[k]
            )
            rules.append(drawn <= budget_w)
            cost = cost + dt * (
                drawn
                # Penalties beyond any multiplier that energy alone can cause: 1e5 W per second
                # of ITL is 100 W per millisecond.
                + 1e5 * cp.sum(late[k])
                + 100.0 * cp.sum(full[k])
                + 1e3 * cp.sum(slow[k])
                + 0.5 * cp.sum(cap[k])
                - 0.04 * d["lam_goal"] @ lam[k]
                - 0.04 * p["rate_goal"] @ rate[k]
                - 10.0 * d["f_goal"] @ f[k]
            )
        # Stay near the target but for a reason: squared distances, less a constant. Of whole
        # variables, which need no auxiliary ones.
        cost = cost + dt * (
            0.02 * cp.sum_squares(lam)
            + 0.02 * cp.sum_squares(rate)
            + 5.0 * cp.sum_squares(f)
            # One of the many ways to empty a queue at equal cost.
            + 0.05 * cp.sum_squares(mu)
            + 0.05 * cp.sum_squares(cap)
        )
        # What happens after the horizon: come out at the target.
        cost = cost + 0.01 * (cp.sum_squares(n[steps]) - 2.0 * d["n_goal"] @ n[steps])
        cost = cost + 10.0 * cp.sum_squares(q[steps])
        self.problem = cp.Problem(cp.Minimize(cost), rules)
        if not self.problem.is_dpp():
            raise ConfigError("Planner: the problem is no longer DPP; every tick would recompile")
        self._d, self._p, self._arrivals, self._budget_w = d, p, arrivals, budget_w
        self._f, self._lam, self._cap, self._mu, self._rate = f, lam, cap, mu, rate
        self._first = rules[:2]

    # A tick

    def plan(
        self,
        state: FleetState,
        load: Load,
        target: Target,
        *,
        budget_w: float = np.inf,
    ) -> Plan:
        """Plan from this state towards this target.

        Parameters
        ----------
        state : FleetState
            Where the fleet is.
        load : Load
            What is expected to arrive over the horizon.
        target : Target
            Where it should settle.
        budget_w : float
            Power that the fleet may draw.
        """
        self.set_parameters(state, load, target, budget_w=budget_w)
        solve = self._solve_piqp if self.solver == "piqp" else self._solve_cvxpy
        status, objective_j, iterations, prices = solve()
        if status is not Status.OK:
            n = len(self.fleet)
            return Plan(
                status=status,
                freq_mhz=np.zeros(n),
                route_frac=np.zeros(n),
                price_j_req=np.zeros(n),
                objective_j=np.inf,
                iterations=iterations,
            )
        prefill, decode = self._slots
        freq = decode.spread(1000.0 * self._f.value[0])
        freq += prefill.spread(prefill.clock_of(self._cap.value[0]))
        n_price, m_price = prices
        size = np.maximum(decode.size, 1.0)
        price = -(n_price + m_price * (load.lengths.prompt_tok + 1.0) / 1000.0) / size
        return Plan(
            status=status,
            freq_mhz=np.clip(freq, self._min_mhz, self._max_mhz),
            route_frac=decode.shares(self._lam.value) + prefill.shares(self._rate.value),
            price_j_req=decode.spread(price),
            objective_j=objective_j,
            iterations=iterations,
        )

    def set_parameters(
        self, state: FleetState, load: Load, target: Target, *, budget_w: float = np.inf
    ) -> None:
        """Put state, load and target into the problem without solving it.

        Parameters
        ----------
        state, load, target, budget_w
            As of :meth:`plan`.
        """
        lengths, dt = load.lengths, self.dt_s
        prefill, decode = self._slots
        decode.assign(target.active, state.running_req)
        prefill.assign(target.active, state.queue_tok)
        size = decode.size
        n = np.maximum(decode.mean(state.running_req + state.queue_req), 0.0)
        m = np.maximum(decode.mean(state.kv_used_tok + state.queue_tok), 0.0)
        clock = decode.mean(np.clip(state.freq_mhz, self._min_mhz, self._max_mhz))
        share = decode.mean(target.route_frac)
        # Linearised between where the fleet is and where it goes, on a batch that is not empty.
        n_at = np.maximum(n, 1.0)
        m_at = np.maximum(m, n_at * lengths.prompt_tok)
        rows, slopes = decode_tangent(*decode.rows(clock), n_at)
        a, b, e, c = decode_steps(rows, slopes, clock, n_at, m_at, lengths)
        a, held = zero_order_hold(a, np.concatenate([b, e, c[:, :, None]], axis=2), dt)
        lam_goal = load.arrival_req_s * share
        step_s = rows["decode_base_s"] + rows["decode_req_s"] * n_at + rows["decode_kv_s"] * m_at
        step_f = 1000.0 * (
            slopes["decode_base_s"] + slopes["decode_req_s"] * n_at + slopes["decode_kv_s"] * m_at
        )
        power_n, power_f, power_w = decode.power(rows, clock, n_at, lengths)
        ghz = clock / 1000.0
        active = decode.mean(target.active.astype(float)) > 0.5
        idle = n < 0.5
        on = np.where(idle & ~active, 0.0, size)
        n_goal = np.where(active, lam_goal * (lengths.output_tok - 1.0) * self.itl_s, n)
        values = {
            "a_nn": a[:, 0, 0], "a_nm": 1e3 * a[:, 0, 1], "a_mn": 1e-3 * a[:, 1, 0],
            "a_mm": a[:, 1, 1], "b_n": 1e3 * held[:, 0, 0], "b_m": held[:, 1, 0],
            "e_n": held[:, 0, 1], "e_m": 1e-3 * held[:, 1, 1],
            "c_n": held[:, 0, 2], "c_m": 1e-3 * held[:, 1, 2],
            "step_n": rows["decode_req_s"], "step_m": 1e3 * rows["decode_kv_s"],
            "step_f": step_f,
            "step_rest_s": np.where(
                idle, 1.0,
                self.itl_s - step_s + rows["decode_req_s"] * n_at
                + rows["decode_kv_s"] * m_at + step_f * ghz,
            ),
            "power_n": on * power_n, "power_f": on * power_f,
            "power_rest_w": np.where(
                on > 0.0, on * (power_w - power_n * n_at - power_f * ghz), size * decode.idle_w
            ),
            "size": size, "n0": n, "m0": m / 1e3, "f0": ghz, "lam_goal": lam_goal,
            "n_goal": n_goal, "f_goal": ghz,
            "lam_max": np.where(active, 10.0 * max(load.arrival_req_s, 1.0), 0.0),
            "kv_ktok": 0.95e-3 * decode.mean(self._kv_capacity_tok),
        }  # fmt: skip
        for name, value in values.items():
            self.values[self._d[name].id] = np.asarray(value, dtype=np.float64)
        prompts = load.arrival_req_s * lengths.prompt_tok / 1e3
        taking = prefill.mean(target.active.astype(float)) > 0.5
        for name, value in {
            "size": prefill.size,
            "q0": prefill.mean(state.queue_tok) / 1e3,
            "cap0": prefill.rate_at(prefill.mean(state.freq_mhz)),
            "rate_goal": prompts * prefill.mean(target.route_frac),
            "rate_max": np.where(taking, 10.0 * max(prompts, 1.0), 0.0),
        }.items():
            self.values[self._p[name].id] = np.asarray(value, dtype=np.float64)
        self.values[self._arrivals.id] = np.array([prompts, load.arrival_req_s])
        self.values[self._budget_w.id] = np.array(min(float(budget_w), 1e3 * len(self.fleet)))

    def _solve_cvxpy(self) -> tuple[Status, float, int, tuple[F64, F64]]:
        """The same problem through CVXPY and Clarabel."""
        empty = (np.zeros(0), np.zeros(0))
        for parameter in self.problem.parameters():
            parameter.value = self.values[parameter.id]
        try:
            self.problem.solve(solver=cp.CLARABEL, enforce_dpp=True)
        except cp.SolverError:
            return Status.INACCURATE, np.inf, 0, empty
        iterations = int(self.problem.solver_stats.num_iters or 0)
        if self.problem.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
            return Status.INFEASIBLE, np.inf, iterations, empty
        if self.problem.status != cp.OPTIMAL:
            return Status.INACCURATE, np.inf, iterations, empty
        prices = tuple(np.asarray(rule.dual_value, dtype=np.float64) for rule in self._first)
        return Status.OK, float(self.problem.value), iterations, (prices[0], prices[1])

    def _solve_piqp(self) -> tuple[Status, float, int, tuple[F64, F64]]:
        """The compiled data, updated in place, straight to PIQP."""
        if self._compiled is None:
            self._compiled = _Compiled(self.problem, self.values, self.max_iterations)
        compiled = self._compiled
        status, objective_j, iterations = compiled.solve(self.values)
        if status is Status.OK:
            for variable in (self._f, self._lam, self._cap, self._mu, self._rate):
                variable.save_value(compiled.value(variable))
        prices = (
            compiled.first_multipliers(self._d["c_n"]),
            compiled.first_multipliers(self._d["c_m"]),
        )
        return status, objective_j, iterations, prices


class _Compiled:
    """CVXPY's canonical form of the parametrised QP, re-evaluated and solved without CVXPY.

    Every entry of the constraint matrices and vectors is a linear map of the parameters, which
    CVXPY has worked out once. A tick multiplies that map by the new parameters, writes the
    values into matrices whose pattern never changes, and lets PIQP start from there.
    """

    def __init__(self, problem: cp.Problem, values: Mapping[int, F64], max_iterations: int) -> None:
        piqp = import_module("piqp")
        for parameter in problem.parameters():
            parameter.value = values[parameter.id]
        data, _, _ = problem.get_problem_data(cp.PIQP, enforce_dpp=True)
        program = data["param_prob"]
        program.reduced_A.cache()
        n, n_eq = program.x.size, program.cone_dims.zero
        indices, starts, (n_rows, _) = program.reduced_A.problem_data_index
        column = np.repeat(np.arange(n + 1), np.diff(starts))
        indices = np.asarray(indices)
        matrix = column < n
        self._map = sparse.csr_matrix(program.reduced_A.reduced_mat)
        self._cost_map = sparse.csr_matrix(program.q)
        self._of_equal = np.flatnonzero(matrix & (indices < n_eq))
        self._of_below = np.flatnonzero(matrix & (indices >= n_eq))
        self._of_rest = np.flatnonzero(~matrix)
        self._rest_row = indices[self._of_rest]
        self._n_eq, self._n_rows, self._n = n_eq, n_rows, n
        self._equal = _pattern(indices[self._of_equal], column[self._of_equal], (n_eq, n))
        self._below = _pattern(
            indices[self._of_below] - n_eq, column[self._of_below], (n_rows - n_eq, n)
        )
        self._columns = dict(program.param_id_to_col)
        self._vector = np.ones(program.total_param_size + 1)
        self._variables = dict(program.var_id_to_col)
        self._solver = piqp.SparseSolver()
        self._solver.settings.max_iter = max_iterations
        self._solver.settings.eps_abs = 1e-6
        self._solver.settings.eps_rel = 1e-7
        self._status = {
            piqp.PIQP_SOLVED: Status.OK,
            piqp.PIQP_PRIMAL_INFEASIBLE: Status.INFEASIBLE,
            piqp.PIQP_MAX_ITER_REACHED: Status.DEADLINE,
        }
        cost, b, h = self._evaluate(values)
        self._offset = 0.0
        self._solver.setup(
            sparse.csc_matrix(data["P"]), cost, self._equal, b, self._below, None, h,
            data["lower_bounds"], data["upper_bounds"],
        )  # fmt: skip
        self.multipliers: F64 = np.zeros(n_eq)
        self._x: F64 = np.zeros(n)
        self._first_rows: dict[int, I64] = {}

    def _evaluate(self, values: Mapping[int, F64]) -> tuple[F64, F64, F64]:
        for key, start in self._columns.items():
            if key in values:
                value = values[key]
                self._vector[start : start + value.size] = value.ravel(order="F")
        entries = self._map @ self._vector
        self._equal.data[:] = entries[self._of_equal]
        self._below.data[:] = -entries[self._of_below]
        rest = np.zeros(self._n_rows)
        rest[self._rest_row] = entries[self._of_rest]
        cost = self._cost_map @ self._vector
        self._offset = float(cost[-1])
        return cost[:-1], -rest[: self._n_eq], rest[self._n_eq :]

    def solve(self, values: Mapping[int, F64]) -> tuple[Status, float, int]:
        """Status, objective and iterations at these parameter values."""
        cost, b, h = self._evaluate(values)
        self._solver.update(c=cost, A=self._equal, b=b, G=self._below, h_u=h)
        status = self._status.get(self._solver.solve(), Status.INACCURATE)
        result = self._solver.result
        self._x = np.asarray(result.x)
        self.multipliers = np.asarray(result.y)
        return status, float(result.info.primal_obj) + self._offset, int(result.info.iter)

    def first_multipliers(self, parameter: cp.Parameter) -> F64:
        """Per entry, the multiplier of the first equality that has it on its right-hand side."""
        if parameter.id not in self._first_rows:
            start = self._columns[parameter.id]
            block = self._map[self._of_rest][:, start : start + parameter.size].tocoo()
            rows = np.full(parameter.size, self._n_eq)
            np.minimum.at(rows, block.col, self._rest_row[block.row])
            self._first_rows[parameter.id] = rows
        multipliers: F64 = self.multipliers[self._first_rows[parameter.id]]
        return multipliers

    def value(self, variable: cp.Variable) -> F64:
        """What the last solution gives a variable."""
        start = self._variables[variable.id]
        return self._x[start : start + variable.size].reshape(variable.shape, order="F")


def _pattern(rows: I64, columns: I64, shape: tuple[int, int]) -> Any:
    """Sparse matrix with these entries, in this order (by column)."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=shape[1]))])
    return sparse.csc_matrix((np.ones(len(rows)), rows, starts), shape=shape)
