"""The compiled router port, and the router that goes by the shares of the decision.

A router is a function of :data:`ROUTER_SIGNATURE`; it is called per request and returns the
index of an instance among `members`:

``pick(tables, padded, params, memory, uniform, prompt_tok, view, members) -> instance``

tables, padded : believed coefficients and batch sizes per instance type
params, memory : float64, settings and what it remembers (writable, one entry per instance)
uniform : a random number in [0, 1)
view : float64, rows VIEW_* of layout.py, one column per instance
members : int64, the instances of this phase; at least one is eligible
"""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW
from voltana_ctrl.kernels.layout import (
    VIEW_ELIGIBLE,
    VIEW_FREQ_MHZ,
    VIEW_KV_CAPACITY_TOK,
    VIEW_KV_TOK,
    VIEW_QUEUE_REQ,
    VIEW_QUEUE_TOK,
    VIEW_ROUTE_FRAC,
    VIEW_RUNNING_REQ,
)

F8, I8 = types.float64, types.int64
ROUTER_SIGNATURE = I8(
    types.Array(ROW, 2, "C"),
    types.Array(I8, 2, "C"),
    types.Array(F8, 1, "C"),
    types.Array(F8, 1, "C"),
    F8,
    F8,
    types.Array(F8, 2, "C"),
    types.Array(I8, 1, "C"),
)
ROUTER = types.FunctionType(ROUTER_SIGNATURE)

_F8_1 = types.Array(F8, 1, "C", readonly=True)
_BOOL_1 = types.Array(types.boolean, 1, "C", readonly=True)


@njit(
    types.void(
        types.Array(F8, 2, "C"), types.Array(I8, 1, "C"), _BOOL_1, _BOOL_1, _BOOL_1,
        _F8_1, _F8_1, _F8_1, _F8_1, _F8_1, F8,
    ))  # fmt: skip
def look(
    view, members, alive, active, wakes, queue_tok, queue_req, running_req, kv_used_tok, freq_mhz,
    prompt_tok,
):  # fmt: skip
    """Copy the state of the members into the view, and mark who is eligible.

    Those alive, active and with room for the prompt; if none, those alive with room; if none,
    those alive; if none, all. While the share of a dead one is nobody's, parked ones that wake at
    once stand in as active, and have that share: the next decision is yet to come.
    """
    lost_frac = 0.0
    for j in members:
        if active[j] and not alive[j]:
            lost_frac += view[VIEW_ROUTE_FRAC, j]
    best = 0.0
    stand_in = 0.0
    for j in members:
        view[VIEW_QUEUE_TOK, j] = queue_tok[j]
        view[VIEW_QUEUE_REQ, j] = queue_req[j]
        view[VIEW_RUNNING_REQ, j] = running_req[j]
        view[VIEW_KV_TOK, j] = kv_used_tok[j]
        view[VIEW_FREQ_MHZ, j] = freq_mhz[j]
        rank = 0.0
        if alive[j]:
            rank = 1.0
            if kv_used_tok[j] + prompt_tok <= view[VIEW_KV_CAPACITY_TOK, j]:
                rank = 3.0 if active[j] else 2.0
                if lost_frac > 0.0 and wakes[j] and not active[j]:
                    rank = 3.0
                    stand_in += 1.0
        view[VIEW_ELIGIBLE, j] = rank
        best = max(best, rank)
    for j in members:
        view[VIEW_ELIGIBLE, j] = 1.0 if view[VIEW_ELIGIBLE, j] == best else 0.0
        if stand_in > 0.0 and not active[j] and view[VIEW_ELIGIBLE, j] > 0.0:
            view[VIEW_ROUTE_FRAC, j] = lost_frac / stand_in


@njit([ROUTER_SIGNATURE])
def by_share(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Smooth weighted round robin on the shares of the decision; deterministic."""
    total = 0.0
    count = 0
    best = -1
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            total += view[VIEW_ROUTE_FRAC, j]
            count += 1
    # Shares of zero everywhere mean that nobody decided: spread evenly.
    decided = total > 0.0
    for j in members:
        share = view[VIEW_ROUTE_FRAC, j] if decided else 1.0
        if view[VIEW_ELIGIBLE, j] > 0.0 and share > 0.0:
            memory[j] += share
            if best < 0 or memory[j] > memory[best]:
                best = j
    memory[best] -= total if decided else float(count)
    return best
