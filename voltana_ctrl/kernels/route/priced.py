"""The routers that go with the target layer, compiled.

Queues are balanced in proportion to the shares rather than requests dealt out by count: both
honour the shares, and the queue also answers to prompts that turned out long.
"""

import math

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROWS, decode_s, row_down
from voltana_ctrl.kernels.layout import (
    VIEW_ABLE_MHZ,
    VIEW_DECODE_PACE_FRAC,
    VIEW_ELIGIBLE,
    VIEW_KV_CAPACITY_TOK,
    VIEW_KV_TOK,
    VIEW_PREFILL_PACE_FRAC,
    VIEW_QUEUE_REQ,
    VIEW_QUEUE_TOK,
    VIEW_ROUTE_FRAC,
    VIEW_RUNNING_REQ,
    VIEW_TYPE,
)
from voltana_ctrl.kernels.route.base import F8, I8, ROUTER_SIGNATURE

#: params
(
    ITL_S,  # promised latency between tokens
    KV_FULL_FRAC,  # an instance this full counts as full
    PREFILLS,  # 1 if prompts are prefilled where they are decoded
) = range(3)


@njit(F8(ROWS, F8, F8, F8))
def prefilled_s(rows, able_mhz, pace_frac, tok):
    """Time of so many prompt tokens at the highest clock that an instance gets, at its pace."""
    return pace_frac * rows[row_down(rows, len(rows), able_mhz)]["prefill_tok_s"] * tok


@njit([ROUTER_SIGNATURE])
def soonest(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Prefill: where the prompt would be done first at the highest clock, among the shared.

    As far as is known: at the highest clock that the instance gets, and at its pace.

    Ties go to the one picked longest ago.
    """
    total = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            total += view[VIEW_ROUTE_FRAC, j]
    best = -1
    best_s = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] == 0.0 or (total > 0.0 and view[VIEW_ROUTE_FRAC, j] <= 0.0):
            continue
        done_s = prefilled_s(
            tables[int(view[VIEW_TYPE, j])], view[VIEW_ABLE_MHZ, j],
            view[VIEW_PREFILL_PACE_FRAC, j], view[VIEW_QUEUE_TOK, j] + prompt_tok,
        )  # fmt: skip
        if best < 0 or done_s < best_s or (done_s == best_s and memory[j] < memory[best]):
            best = j
            best_s = done_s
    newest = 0.0
    for j in members:
        newest = max(newest, memory[j])
    memory[best] = newest + 1.0
    return best


@njit([ROUTER_SIGNATURE])
def by_target(tables, padded, params, memory, uniform, prompt_tok, view, members):
    """Decode: the instance furthest below its share of the running requests.

    Passed over, unless all are: those whose KV cache is full, those without a share, and those that
    one more request would push over the latency target even at the highest clock that they get.
    So are, where prompts are prefilled, those whose prompts take longer than elsewhere by more than
    that target: in a burst first tokens are due, whoever runs few.
    """
    total = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] > 0.0:
            total += view[VIEW_ROUTE_FRAC, j]
    soon_s = math.inf
    if params[PREFILLS] > 0.0:
        for j in members:
            if view[VIEW_ELIGIBLE, j] > 0.0 and (total == 0.0 or view[VIEW_ROUTE_FRAC, j] > 0.0):
                done_s = prefilled_s(
                    tables[int(view[VIEW_TYPE, j])], view[VIEW_ABLE_MHZ, j],
                    view[VIEW_PREFILL_PACE_FRAC, j], view[VIEW_QUEUE_TOK, j] + prompt_tok,
                )  # fmt: skip
                soon_s = min(soon_s, done_s)
    best = -1
    best_rank = 4
    best_load = 0.0
    for j in members:
        if view[VIEW_ELIGIBLE, j] == 0.0:
            continue
        share = view[VIEW_ROUTE_FRAC, j] if total > 0.0 else 1.0
        kind = int(view[VIEW_TYPE, j])
        after_req = view[VIEW_RUNNING_REQ, j] + view[VIEW_QUEUE_REQ, j] + 1.0
        after_tok = view[VIEW_KV_TOK, j] + view[VIEW_QUEUE_TOK, j] + prompt_tok
        size_req = float(padded[kind, min(int(after_req), padded.shape[1] - 1)])
        rows = tables[kind]
        row = rows[row_down(rows, len(rows), view[VIEW_ABLE_MHZ, j])]
        after_s = view[VIEW_DECODE_PACE_FRAC, j] * decode_s(row, size_req, after_tok)
        rank = 0
        if after_tok > params[KV_FULL_FRAC] * view[VIEW_KV_CAPACITY_TOK, j]:
            rank = 3
        elif share <= 0.0:
            # Without a share it is there but not ready: work would wait for it.
            rank = 2
        elif after_s > params[ITL_S]:
            rank = 1
        elif params[PREFILLS] > 0.0:
            done_s = prefilled_s(
                rows, view[VIEW_ABLE_MHZ, j], view[VIEW_PREFILL_PACE_FRAC, j],
                view[VIEW_QUEUE_TOK, j] + prompt_tok,
            )  # fmt: skip
            if done_s > soon_s + params[ITL_S]:
                rank = 1
        load = after_req / share if share > 0.0 else after_req
        if (
            best < 0
            or rank < best_rank
            or (
                rank == best_rank
                and (load < best_load or (load == best_load and memory[j] < memory[best]))
            )
        ):
            best = j
            best_rank = rank
            best_load = load
    newest = 0.0
    for j in members:
        newest = max(newest, memory[j])
    memory[best] = newest + 1.0
    return best


@njit(
    I8(
        types.Array(F8, 2, "C"),
        types.Array(I8, 1, "C"),
        types.Array(F8, 1, "C", readonly=True),
        types.Array(F8, 1, "C", readonly=True),
        I8,
    )
)
def worth_more(view, members, score_j, price_j_req, picked):
    """The eligible instance where a request is worth most, if that is more than where picked."""
    best = picked
    best_j = score_j[picked] - price_j_req[picked]
    for j in members:
        worth_j = score_j[j] - price_j_req[j]
        if view[VIEW_ELIGIBLE, j] > 0.0 and worth_j > best_j:
            best = j
            best_j = worth_j
    return best
