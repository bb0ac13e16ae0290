"""When what happens next: the tree of instances, KV on its way, and what is to be done now."""

from numba import from_dtype, types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.layout import SEEN, SEEN_DTYPE
from voltana_ctrl.kernels.plant.actuation import F8, F8_1, F8_2, I8, I8_1, INSTS, SIM, TABLES
from voltana_ctrl.kernels.plant.batching import REQS

SIMS = types.Array(SIM, 1, "C")
SEENS = types.Array(from_dtype(SEEN_DTYPE), 2, "C")


@njit(types.void(F8_1, I8, F8))
def _set_next(tree, i, t_s):
    """Tournament tree: leaf i becomes `t_s`, parents their minimum."""
    node = len(tree) // 2 + i
    tree[node] = t_s
    node //= 2
    while node >= 1:
        tree[node] = min(tree[2 * node], tree[2 * node + 1])
        node //= 2


@njit(I8(F8_1))
def first(tree):
    """Leaf that holds the minimum; the lowest index on a tie."""
    half = len(tree) // 2
    node = 1
    while node < half:
        node *= 2
        if tree[node] > tree[node + 1]:
            node += 1
    return node - half


@njit(types.void(INSTS, F8_2, F8_1, I8))
def touch(inst, pending_s, tree, i):
    """Recompute when instance i needs attention next."""
    one = inst[i]
    t_s = min(one["call_end_s"], one["wake_end_s"])
    if one["pending"] > 0:
        t_s = min(t_s, pending_s[i, 0])
    if one["iterating"] != 0:
        t_s = min(t_s, one["iter_end_s"])
    elif one["governed"] == 1:
        t_s = min(t_s, one["idle_since_s"] + one["idle_call_s"])
    _set_next(tree, i, t_s)


@njit(types.void(SIM, F8_1, I8_1, F8, I8))
def push_moving(sim, moving_s, moving_r, t_s, r):
    """Add a request whose KV cache arrives at `t_s` to the heap of transfers."""
    k = sim["n_moving"]
    sim["n_moving"] += 1
    while k > 0:
        parent = (k - 1) // 2
        if moving_s[parent] < t_s or (moving_s[parent] == t_s and moving_r[parent] < r):
            break
        moving_s[k] = moving_s[parent]
        moving_r[k] = moving_r[parent]
        k = parent
    moving_s[k] = t_s
    moving_r[k] = r


@njit(I8(SIM, F8_1, I8_1))
def pop_moving(sim, moving_s, moving_r):
    """Take the request whose KV cache arrives first off the heap of transfers."""
    top = moving_r[0]
    sim["n_moving"] -= 1
    n = sim["n_moving"]
    t_s = moving_s[n]
    r = moving_r[n]
    k = 0
    while 2 * k + 1 < n:
        child = 2 * k + 1
        right = child + 1
        if right < n and (
            moving_s[right] < moving_s[child]
            or (moving_s[right] == moving_s[child] and moving_r[right] < moving_r[child])
        ):
            child = right
        if t_s < moving_s[child] or (t_s == moving_s[child] and r < moving_r[child]):
            break
        moving_s[k] = moving_s[child]
        moving_r[k] = moving_r[child]
        k = child
    moving_s[k] = t_s
    moving_r[k] = r
    return top


@njit(types.void(SIM, REQS, I8))
def push_route(sim, req, r):
    """Append a request to the list of those that wait to be routed."""
    req[r]["next"] = -1
    if sim["route_tail"] >= 0:
        req[sim["route_tail"]]["next"] = r
    else:
        sim["route_head"] = r
    sim["route_tail"] = r


@njit(types.void(SIM, REQS))
def release_held(sim, req):
    """Those held back are routed once more, before all others."""
    r = sim["held_head"]
    sim["held_head"] = sim["held_tail"] = -1
    while r >= 0:
        after = req[r]["next"]
        push_route(sim, req, r)
        r = after


@njit(types.void(SIM, INSTS, I8_1, I8))
def push_start(sim, inst, starts, i):
    """List an idle instance among those that may begin an iteration now, once."""
    if inst[i]["iterating"] == 0 and inst[i]["listed"] == 0:
        inst[i]["listed"] = 1
        starts[sim["n_start"]] = i
        sim["n_start"] += 1


@njit(types.void(INSTS, TABLES, SEENS, I8, F8))
def remember(inst, tables, seen, i, now_s):
    """Note the state of instance i for routers that see an old one."""
    one = inst[i]
    row = seen[i, one["seen"] & (SEEN - 1)]
    row["t_s"] = now_s
    row["queue_tok"] = one["prefill_tok"] + one["wait_tok"]
    row["queue_req"] = one["prefill_req"] + one["wait_req"]
    row["running_req"] = one["running_req"]
    row["kv_tok"] = one["kv_tok"]
    k = one["run_k"] if one["iterating"] != 0 else min(one["clock_k"], one["clamp_k"])
    row["freq_mhz"] = tables[one["type"], k]["clock_mhz"]
    one["seen"] += 1
