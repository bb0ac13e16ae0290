"""Routers to compare against, on the compiled router port of routers.py."""

from numba import njit

from voltana_ctrl.kernels.layout import (
    VIEW_ELIGIBLE,
    VIEW_KV_CAPACITY_TOK,
    VIEW_KV_TOK,
    VIEW_QUEUE_REQ,
    VIEW_QUEUE_TOK,
    VIEW_RUNNING_REQ,
)
from voltana_ctrl.kernels.route.base import ROUTER_SIGNATURE


@njit([ROUTER_SIGNATURE], cache=True)
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


@njit([ROUTER_SIGNATURE], cache=True)
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


@njit([ROUTER_SIGNATURE], cache=True)
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


@njit([ROUTER_SIGNATURE], cache=True)
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
