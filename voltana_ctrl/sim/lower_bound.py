"""A true lower bound: no run that keeps its promise draws less, whatever its policy knows.

One linear programme per load. Iterations are grouped by instance type, clock and range of batch
sizes; of each group the programme chooses how many there are, the tokens that they decode, the
context that they read and the time that they take. The laws are convex in batch and context at each
clock, so the sums over the iterations of any schedule are a feasible point (Jensen), and a clock
that changes within an iteration is a mixture of two groups. What is demanded is the least that a
promise-keeping schedule does inside the window:

- a request that arrives in the window and is due before its end is prefilled and decoded in it;
  of one that is due later, what cannot be decoded after it;
- requests spend no more time being decoded than the promised inter-token latency allows, and no
  more of them are decoded at once than can be there between arrival and due time;
- prefill iterations are as many as it takes to stab the intervals from each arrival to its promise;
- the share of requests that may miss either promise is left out, those that save most;
- of requests that may wait, which the promise does not bind, nothing is demanded.

Requests that are left out, and those that arrived before the window, may be decoded in the same
iterations, at whatever pace: that costs time and energy and delivers nothing of what is demanded.
An instance whose role changes may do both. Time without work is at the least power at rest. What
costs besides (padding, idling in wait, clock changes, recomputation) is left out, and iteration
times are taken without jitter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.laws import decode_s
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import FleetSpec, InstanceSpec, Role, Slo

__all__ = ["Demand", "least_demand", "lower_bound_w"]

#: Edges of the ranges of batch sizes; the last is more than any engine runs.
EDGES_REQ = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 1 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What any schedule that keeps its promise must do inside a window, and what bounds it there.

    Parameters
    ----------
    prompts_req, prompt_tok, prompt_tok2 : float
        At least so many prompts begun, prompt tokens computed (without those that are cached), and
        so large a sum of ``end^2 - start^2`` of their positions.
    prefills : int
        At least so many iterations that prefill.
    decode_tok, context_tok, decode_s : ndarray, shape (n,)
        Per request: tokens decoded at least, tokens of context read for them at least, and the
        most time [s] that it may spend being decoded.
    at_once_req : int
        Most requests that can be there to be decoded at the same time.
    may_miss_req : int
        Requests that may miss one of both promises, of which nothing is demanded.
    moved_tok : float
        Prompt tokens, at least, whose KV cache moves to a decode instance.

    Examples
    --------
    >>> import numpy as np
    >>> nothing = np.zeros(0)
    >>> Demand(prompts_req=0.0, prompt_tok=0.0, prompt_tok2=0.0, prefills=0, decode_tok=nothing,
    ...        context_tok=nothing, decode_s=nothing, at_once_req=0, may_miss_req=0,
    ...        moved_tok=0.0).prefills
    0
    """

    prompts_req: float
    prompt_tok: float
    prompt_tok2: float
    prefills: int
    decode_tok: F64
    context_tok: F64
    decode_s: F64
    at_once_req: int
    may_miss_req: int
    moved_tok: float


def least_demand(
    fleet: FleetSpec, workload: Workload, from_s: float, until_s: float, slo: Slo
) -> Demand:
    """What any schedule that keeps its promise must do in ``[from_s, until_s)``.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet; its fastest iteration tells what can be put off.
    workload : Workload
        The requests. They must arrive at times that are known (an open loop), which is not
        checked. Requests with a patience of their own may wait and demand nothing.
    from_s, until_s : float
        The window, in which requests that arrive are judged.
    slo : Slo
        The promise; the share of requests that its `attainment` lets miss is left out.

    Returns
    -------
    Demand
        Of the window.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = make_workload("fixed", rate_req_s=10.0, duration_s=100.0, seed=0)
    >>> demand = least_demand(fleet, load, 0.0, 100.0, Slo(ttft_s=0.6, itl_s=0.06))
    >>> bool(0.8 < demand.prompt_tok / load.prompt_tok.sum() < 1.0)
    True
    """
    arrival_s = workload.arrival_s
    prompt = workload.prompt_tok.astype(float)
    cached = workload.cached_tok.astype(float)
    decoded = workload.output_tok.astype(float) - 1.0
    due_s = arrival_s + slo.ttft_s + decoded * slo.itl_s
    judged = (arrival_s >= from_s) & (arrival_s < until_s) & ~np.isfinite(workload.patience_s)
    may_miss = math.floor((1.0 - slo.attainment) * float(judged.sum()) + 1e-9)

    begun = judged & (arrival_s + slo.ttft_s <= until_s)
    tokens = np.where(judged, decoded - np.maximum(0.0, due_s - until_s) / _fastest_s(fleet), 0.0)
    tokens = np.clip(tokens, 0.0, decoded)
    context = tokens * prompt + tokens * (tokens + 1.0) / 2.0
    # Time of each request that falls into the window, at most.
    inside_s = np.minimum(due_s, until_s) - np.maximum(arrival_s, from_s)
    inside_s = np.clip(inside_s, 0.0, decoded * slo.itl_s)
    moved = begun & (decoded > 0.0) & (due_s <= until_s)
    asked = judged & (decoded > 0.0)
    return Demand(
        prompts_req=max(0.0, float(begun.sum()) - may_miss),
        prompt_tok=_without_largest((prompt - cached)[begun], may_miss),
        prompt_tok2=_without_largest((prompt**2 - cached**2)[begun], may_miss),
        prefills=max(0, _stabs(arrival_s[begun], slo.ttft_s) - may_miss),
        decode_tok=tokens[asked],
        context_tok=context[asked],
        decode_s=inside_s[asked],
        at_once_req=_at_once(arrival_s[asked], due_s[asked]),
        # Half of them miss the one promise, half the other.
        may_miss_req=2 * may_miss,
        moved_tok=_without_largest(prompt[moved], 2 * may_miss),
    )


def _fastest_s(fleet: FleetSpec) -> float:
    """Shortest time between two tokens of a request."""
    return min(
        float(decode_s(one.table, 1.0, 0.0).min())
        for one in fleet.instances
        if _has(one, "decodes")
    )


def _has(one: InstanceSpec, does: str) -> bool:
    """Whether a role that the instance has, or may take on, `prefills` or `decodes`."""
    return any(getattr(role, does) for role in (one.role, *one.roles))


def _without_largest(values: F64, count: int) -> float:
    return float(np.sort(values)[: max(0, len(values) - count)].sum())


def _at_once(begin_s: F64, end_s: F64) -> int:
    """Largest number of intervals that share a point."""
    after = np.sort(begin_s)
    gone = np.searchsorted(np.sort(end_s), after, side="left")
    return int((np.arange(1, len(after) + 1) - gone).max(initial=0))


def _stabs(arrival_s: F64, wait_s: float) -> int:
    """Fewest points such that each interval from an arrival to its promise holds one."""
    points, last_s = 0, -math.inf
    for each_s in np.sort(arrival_s):
        if each_s > last_s:
            points += 1
            last_s = each_s + wait_s
    return points


def lower_bound_w(
    fleet: FleetSpec, workload: Workload, from_s: float, until_s: float, slo: Slo
) -> float:
    """Least mean power in a window of any run that keeps its promise; inf if none can.

    Parameters
    ----------
    fleet, workload, from_s, until_s, slo
        See :func:`least_demand`.

    Returns
    -------
    float
        Watts.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = make_workload("sharegpt", rate_req_s=10.0, duration_s=200.0, seed=0)
    >>> bound_w = lower_bound_w(fleet, load, 30.0, 150.0, Slo(ttft_s=0.6, itl_s=0.06))
    >>> bool(4 * 60.0 < bound_w < 400.0)
    True
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    demand = least_demand(fleet, workload, from_s, until_s, slo)
    span_s = until_s - from_s
    programme = _Programme(demand)
    rest_j = 0.0
    groups: dict[tuple[Any, ...], list[InstanceSpec]] = {}
    for one in fleet.instances:
        key = (id(one.profile), one.clocks_mhz.tobytes(), one.max_batch, one.role, one.roles)
        groups.setdefault((*key, one.idle_w, one.least_rest_w), []).append(one)
    for many in groups.values():
        one = many[0]
        rest_w = min(one.least_rest_w, float(one.table["idle_w"].min()))
        rest_j += len(many) * rest_w * span_s
        programme.take(one, len(many) * span_s, rest_w)
    if not (fleet.colocated or any(one.roles for one in fleet.instances)):
        rest_j += demand.moved_tok * min(
            fleet.instances[i].profile.transfer_j_per_tok for i in fleet.prefill.tolist()
        )
    found = linprog(
        np.array(programme.cost_j),
        A_ub=csr_array(
            (programme.value, (programme.row, programme.column)),
            shape=(len(programme.limit), len(programme.cost_j)),
        ),
        b_ub=np.array(programme.limit),
        method="highs",
    )
    return (float(found.fun) + rest_j) / span_s if found.status == 0 else math.inf


class _Programme:
    """Rows ``A x <= b`` of the linear programme and the cost of each variable, in joules."""

    def __init__(self, demand: Demand) -> None:
        self.at_once_req = demand.at_once_req
        self.cost_j: list[float] = []
        self.row: list[int] = []
        self.column: list[int] = []
        self.value: list[float] = []
        # What all instances must deliver together.
        wanted = (
            demand.prompt_tok, demand.prompt_tok2, demand.prefills, demand.prompts_req,
            demand.decode_tok.sum(), demand.context_tok.sum(),
        )  # fmt: skip
        self.limit: list[float] = [-float(value) for value in wanted]
        (
            self.prompt_tok, self.prompt_tok2, self.prefills, self.prompts,
            self.decode_tok, self.context,
        ) = range(len(wanted))  # fmt: skip
        self.seconds = self._limit(float(demand.decode_s.sum()))
        missing = self._limit(float(demand.may_miss_req))
        each = zip(demand.decode_tok, demand.context_tok, demand.decode_s, strict=True)
        for tok, context, time_s in each:
            # Which part of a request is left out.
            left_out = {self.decode_tok: -tok, self.context: -context, self.seconds: time_s}
            part = self._variable(0.0, {**left_out, missing: 1.0})
            self._row({part: 1.0}, 1.0)

    def _limit(self, most: float) -> int:
        self.limit.append(most)
        return len(self.limit) - 1

    def _variable(self, cost_j: float, at: dict[int, float]) -> int:
        self.cost_j.append(cost_j)
        column = len(self.cost_j) - 1
        for row, value in at.items():
            self.row.append(row)
            self.column.append(column)
            self.value.append(value)
        return column

    def _row(self, at: dict[int, float], most: float = 0.0) -> None:
        """One more row, of variables that are there."""
        row = self._limit(most)
        for column, value in at.items():
            self.row.append(row)
            self.column.append(column)
            self.value.append(value)

    def take(self, one: InstanceSpec, capacity_s: float, rest_w: float) -> None:
        """Let instances of this kind work for so many seconds, instead of resting."""
        busy = self._limit(capacity_s)
        for row in one.table:
            if _has(one, "prefills"):
                self._prefill(one, row, busy, rest_w)
            if _has(one, "decodes"):
                most_req = min(one.max_batch, self.at_once_req)
                for low, high in pairwise(EDGES_REQ):
                    if low <= most_req:
                        self._decode(row, low, min(high, most_req), busy, rest_w)

    def _prefill(self, one: InstanceSpec, row: Any, busy: int, rest_w: float) -> None:
        above_w = float(row["prefill_power_w"]) - rest_w
        parts = [("prefill_tok_s", self.prompt_tok), ("prefill_tok2_s", self.prompt_tok2)]
        for name, what in parts:
            time_s = float(row[name])
            self._variable(time_s * above_w, {what: -1.0, busy: time_s})
        # Beside decoding the weights are read once, so a colocated instance may pay no launch.
        launch_s = 0.0 if one.role is Role.COLOCATED else float(row["prefill_base_s"])
        self._variable(launch_s * above_w, {self.prefills: -1.0, busy: launch_s})
        host_s = float(row["prefill_req_s"])
        host_j = host_s * (float(row["idle_w"]) - rest_w)
        self._variable(host_j, {self.prompts: -1.0, busy: host_s})

    def _decode(self, row: Any, low: int, high: int, busy: int, rest_w: float) -> None:
        held_w = float(row["decode_power_w"])
        host_s = float(row["decode_host_s"])
        count_j = float(row["decode_iter_j"]) - host_s * (held_w - float(row["idle_w"]))
        untiled = row.copy()
        untiled["decode_tile_tok"] = 0.0  # tiles make some batches longer and none shorter
        least_s = float(decode_s(untiled, low, 0.0))
        # n T >= low T + (n - low) T(low): time of requests, from below.
        count = self._variable(count_j, {self.seconds: -low * least_s})
        tok_j = float(row["decode_req_j"])
        tok = self._variable(tok_j, {self.decode_tok: -1.0, self.seconds: least_s})
        read = self._variable(float(row["decode_kv_j"]), {self.context: -1.0})
        time = self._variable(held_w - rest_w, {busy: 1.0, self.seconds: float(low)})
        kv_s = float(row["decode_kv_s"])
        self._row({tok: -1.0, count: float(low)})
        self._row({tok: 1.0, count: -float(high)})
        for base, slope in (
            ("decode_base_s", "decode_req_s"),
            ("decode_roof_base_s", "decode_roof_s"),
        ):
            if row[base] > 0.0 or row[slope] > 0.0:
                self._row(
                    {
                        count: float(row[base]) + host_s,
                        tok: float(row[slope]),
                        read: kv_s,
                        time: -1.0,
                    }
                )
        if row["decode_floor_s"] > 0.0:
            self._row({count: float(row["decode_floor_s"]) + host_s, time: -1.0})
