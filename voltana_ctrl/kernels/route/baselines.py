"""Routers to compare against, on the compiled router port of base.py."""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, decode_s
from voltana_ctrl.kernels.layout import (
    VIEW_ELIGIBLE,
    VIEW_FREQ_MHZ,
    VIEW_KV_CAPACITY_TOK,
    VIEW_KV_TOK,
    VIEW_QUEUE_REQ,
    VIEW_QUEUE_TOK,
    VIEW_RUNNING_REQ,
    VIEW_TYPE,
)
from voltana_ctrl.kernels.route.base import F8, I8, ROUTER_SIGNATURE

#: VoltanaLLM's tile: decode batches are filled to multiples of this.
TILE_REQ = 128.0

# fadr's params
FADR_SLO_S, FADR_N_LADDER, FADR_LADDER = range(3)


@njit([ROUTER_SIGNATURE])
def round_robin(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """The eligible in turn, whatever the shares of the decision."""
    # The position after the latest pick, kept where the first member has its memory.
    start = int(memory[members[0]])
    for step in range(len(members)):
        position = (start + step) % len(members)
        j = members[position]
        if view[VIEW_ELIGIBLE, j] > 0.0:
            memory[members[0]] = position + 1
            return j
    return members[0]


@njit([ROUTER_SIGNATURE])
def rolling(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """EcoServe's rolling activation: one instance takes all prompts for a while, then the next.

    params: prompt tokens of a turn. The position and what it got are the memory of the first two
    members; with one there is nothing to pick.
    """
    n = len(members)
    if n == 1:
        return members[0]
    start = int(memory[members[0]]) % n
    if view[VIEW_ELIGIBLE, members[start]] <= 0.0 or memory[members[1]] >= params[0]:
        start += 1
        memory[members[1]] = 0.0
    for step in range(n):
        position = (start + step) % n
        j = members[position]
        if view[VIEW_ELIGIBLE, j] > 0.0:
            memory[members[0]] = position
            memory[members[1]] += prompt_tok
            return j
    return members[0]


@njit([ROUTER_SIGNATURE])
def least_kv(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Smallest share of the KV cache in use; ties to the lower index."""
    best = -1
    least = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            used = view[VIEW_KV_TOK, j] / view[VIEW_KV_CAPACITY_TOK, j]
            if best < 0 or used < least:
                best = j
                least = used
    return best


@njit([ROUTER_SIGNATURE])
def two_choices(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """The shorter queue of two eligible instances drawn at random."""
    count = 0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            count += 1
    # One uniform number gives both: its leading digits the first, the rest the second.
    first = min(int(uniform * count), count - 1)
    second = first
    if count > 1:
        second = min(int((uniform * count - first) * (count - 1)), count - 2)
        if second >= first:
            second += 1
    best = -1
    least = 0.0
    seen = 0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            if seen in (first, second):
                load = view[VIEW_RUNNING_REQ, j] + view[VIEW_QUEUE_REQ, j]
                if best < 0 or load < least:
                    best = j
                    least = load
            seen += 1
    return best


@njit([ROUTER_SIGNATURE])
def tokens_by_batch(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """LMetric: least product of prompt tokens to prefill and batch, this request included."""
    best = -1
    least = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            tokens = view[VIEW_QUEUE_TOK, j] + prompt_tok
            batch = view[VIEW_RUNNING_REQ, j] + view[VIEW_QUEUE_REQ, j] + 1.0
            if best < 0 or tokens * batch < least:
                best = j
                least = tokens * batch
    return best


@njit([ROUTER_SIGNATURE])
def at_random(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Uniformly at random among the eligible."""
    count = 0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            count += 1
    pick = int(uniform * count)
    best = -1
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            best = j
            if pick == 0:
                break
            pick -= 1
    return best


@njit([ROUTER_SIGNATURE])
def least_queue(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Fewest prompt tokens waiting or in service; ties to the lower index."""
    best = -1
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0 and (
            best < 0 or view[VIEW_QUEUE_TOK, j] < view[VIEW_QUEUE_TOK, best]
        ):
            best = j
    return best


@njit([ROUTER_SIGNATURE])
def shortest(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Join the shortest queue: fewest requests running or waiting."""
    best = -1
    least = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            load = view[VIEW_RUNNING_REQ, j] + view[VIEW_QUEUE_REQ, j]
            if best < 0 or load < least:
                best = j
                least = load
    return best


@njit(types.boolean(F8, F8, F8, F8, F8, F8))
def _before(a1, a2, a3, b1, b2, b3):
    if a1 != b1:
        return a1 < b1
    if a2 != b2:
        return a2 < b2
    return a3 < b3


@njit([ROUTER_SIGNATURE])
def tile_aware(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """VoltanaLLM v0.1: fill a tile of 128 before the next is opened (echo_lb_new.py)."""
    best = -1
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            n = view[VIEW_RUNNING_REQ, j]
            if best < 0:
                best = j
                continue
            m = view[VIEW_RUNNING_REQ, best]
            tile = -(-n // TILE_REQ)
            best_tile = -(-m // TILE_REQ)
            if _before(tile, -n, 0.0, best_tile, -m, 0.0):
                best = j
    return best


@njit(I8(types.Array(ROW, 1, "C"), types.Array(I8, 1, "C"), types.Array(F8, 1, "C"), F8, F8))
def _fadr_level(rows, padded, params, running_req, kv_tok):
    n_ladder = int(params[FADR_N_LADDER])
    size = padded[min(int(running_req), len(padded) - 1)]
    # By bisection: iteration times never rise with the clock.
    low = 0
    high = n_ladder - 1
    while low < high:
        middle = (low + high) // 2
        row = rows[int(params[FADR_LADDER + middle])]
        if decode_s(row, size, kv_tok) <= params[FADR_SLO_S]:
            high = middle
        else:
            low = middle + 1
    return low


@njit([ROUTER_SIGNATURE])
def fadr(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """VoltanaLLM v0.1's frequency-aware decode router (echo_lb_new.py).

    params: decode target [s], number of ladder entries, their row indices.
    """
    n_ladder = int(params[FADR_N_LADDER])
    most = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            most = max(most, view[VIEW_RUNNING_REQ, j])
    best = -1
    if most < TILE_REQ:
        for j in members:
            if view[VIEW_ELIGIBLE, j] > 0.0 and (
                best < 0
                or _before(
                    view[VIEW_FREQ_MHZ, j],
                    view[VIEW_RUNNING_REQ, j],
                    0.0,
                    view[VIEW_FREQ_MHZ, best],
                    view[VIEW_RUNNING_REQ, best],
                    0.0,
                )
            ):
                best = j
        return best
    lowest = n_ladder
    highest = -1
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            kind = int(view[VIEW_TYPE, j])
            n = view[VIEW_RUNNING_REQ, j]
            kv_tok = view[VIEW_KV_TOK, j]
            level = _fadr_level(tables[kind], padded[kind], params, n, kv_tok + 2.0 * n)
            lowest = min(lowest, level)
            highest = max(highest, level)
    spread = highest - lowest > 1
    best_score = 0.0
    best_tile = 0.0
    best_n = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] == 0.0:
            continue
        kind = int(view[VIEW_TYPE, j])
        rows = tables[kind]
        n = view[VIEW_RUNNING_REQ, j]
        kv_tok = view[VIEW_KV_TOK, j]
        now = _fadr_level(rows, padded[kind], params, n, kv_tok + 2.0 * n)
        then = _fadr_level(rows, padded[kind], params, n + 1.0, kv_tok + prompt_tok + 50.0 * n)
        score = rows[int(params[FADR_LADDER + then])]["clock_mhz"]
        if then <= now and then < n_ladder - 1:
            score = -rows[int(params[FADR_LADDER + now])]["clock_mhz"]
        if spread:
            score = abs(score)
        tile = -(-n // TILE_REQ)
        if best < 0 or _before(score, tile, -n, best_score, best_tile, -best_n):
            best = j
            best_score = score
            best_tile = tile
            best_n = n
    return best
