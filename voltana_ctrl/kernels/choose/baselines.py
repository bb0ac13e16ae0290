"""Governors to compare against, on the compiled governor port of base.py."""

from numba import types

from voltana_ctrl.kernels.choose.base import GOVERNOR_SIGNATURE, N_MEMORY
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, decode_s, prefill_s

F8, I8 = types.float64, types.int64
ROWS = types.Array(ROW, 1, "C")
SETTINGS = types.Array(F8, 1, "C")

# EcoFreq's params
ECO_PREFILL_SLO_S, ECO_DECODE_SLO_S, ECO_N_LADDER, ECO_LADDER = range(4)

# threshold's params; ladder rows, then prompt-token and batch thresholds between them
STEP_N_LADDER, STEP_KEEP_FRAC, STEP_LADDER = range(3)

# dualscale's params
DUAL_TTFT_S, DUAL_ITL_S, DUAL_KV_FULL_TOK, DUAL_BUDGET_TOK, DUAL_N_LADDER, DUAL_LADDER = range(6)

#: Batches that dualscale looks ahead; their planned levels are its memory.
DUAL_AHEAD = N_MEMORY


@njit([GOVERNOR_SIGNATURE])
def ecofreq(
    rows,
    padded,
    params,
    memory,
    t_s,
    running_req,
    kv_tok,
    waiting_tok,
    batch_tok,
    oldest_wait_s,
    floor_mhz,
    ceiling_mhz,
):
    """VoltanaLLM v0.1's rules 3 to 6 (freq_manager.py): the lowest ladder clock that is enough.

    params: prefill target, decode target [s], number of ladder entries, their row indices.
    """
    n_ladder = int(params[ECO_N_LADDER])
    lowest = rows[int(params[ECO_LADDER])]["clock_mhz"]
    highest = rows[int(params[ECO_LADDER + n_ladder - 1])]["clock_mhz"]
    if waiting_tok > batch_tok:
        return highest
    if running_req == 0.0 and batch_tok == 0.0:
        return lowest
    for entry in range(n_ladder - 1):
        row = rows[int(params[ECO_LADDER + entry])]
        enough = True
        spent_s = 0.0
        if running_req > 0.0:
            spent_s = decode_s(row, padded[int(running_req)], kv_tok)
            if batch_tok > 0.0:
                spent_s += row["prefill_tok_s"] * batch_tok
            enough = spent_s <= params[ECO_DECODE_SLO_S]
        if enough and batch_tok > 0.0:
            if running_req == 0.0:
                spent_s = prefill_s(row, batch_tok, 0.0)
            enough = spent_s <= params[ECO_PREFILL_SLO_S] - oldest_wait_s
        if enough:
            return row["clock_mhz"]
    return highest


@njit([GOVERNOR_SIGNATURE])
def ecofreq_above_floor(
    rows,
    padded,
    params,
    memory,
    t_s,
    running_req,
    kv_tok,
    waiting_tok,
    batch_tok,
    oldest_wait_s,
    floor_mhz,
    ceiling_mhz,
):
    """EcoFreq, and at least the floor, by which a controller adds the rules on throughput."""
    clock_mhz = ecofreq(
        rows, padded, params, memory, t_s, running_req, kv_tok, waiting_tok, batch_tok,
        oldest_wait_s, floor_mhz, ceiling_mhz,
    )  # fmt: skip
    return min(max(clock_mhz, floor_mhz), ceiling_mhz)


@njit([GOVERNOR_SIGNATURE])
def threshold(
    rows,
    padded,
    params,
    memory,
    t_s,
    running_req,
    kv_tok,
    waiting_tok,
    batch_tok,
    oldest_wait_s,
    floor_mhz,
    ceiling_mhz,
):
    """Clock steps by queue and batch: up past a threshold, down well below it."""
    n_ladder = int(params[STEP_N_LADDER])
    first_tok = STEP_LADDER + n_ladder
    first_req = first_tok + n_ladder - 1
    level = int(memory[0])
    for _ in range(n_ladder - 1):
        if level < n_ladder - 1 and (
            waiting_tok > params[first_tok + level] or running_req > params[first_req + level]
        ):
            level += 1
    for _ in range(n_ladder - 1):
        if (
            level > 0
            and waiting_tok <= params[STEP_KEEP_FRAC] * params[first_tok + level - 1]
            and running_req <= params[STEP_KEEP_FRAC] * params[first_req + level - 1]
        ):
            level -= 1
    memory[0] = level
    clock_mhz = rows[int(params[STEP_LADDER + level])]["clock_mhz"]
    return min(max(clock_mhz, floor_mhz), ceiling_mhz)


@njit(F8(SETTINGS, I8, F8, F8))
def _ahead_tok(params, batch, batch_tok, waiting_tok):
    """Prompt tokens of a batch of the look-ahead; 0 where the queue is empty by then."""
    if batch == 0:
        return batch_tok
    left_tok = waiting_tok - batch_tok - (batch - 1) * params[DUAL_BUDGET_TOK]
    return max(0.0, min(left_tok, params[DUAL_BUDGET_TOK]))


@njit(I8(ROWS, SETTINGS, SETTINGS, F8, F8, F8))
def _plan_prefill(rows, params, memory, waiting_tok, batch_tok, oldest_wait_s):
    """Level for the first of the next batches.

    From all-highest, the single step down that saves most, again and again, as long as one
    saves energy and the whole look-ahead ends within the TTFT of the oldest request.
    """
    top = int(params[DUAL_N_LADDER]) - 1
    spent_s = oldest_wait_s
    for batch in range(DUAL_AHEAD):
        memory[batch] = top
        tok = _ahead_tok(params, batch, batch_tok, waiting_tok)
        if tok > 0.0:
            spent_s += prefill_s(rows[int(params[DUAL_LADDER + top])], tok, 0.0)
    for _ in range(DUAL_AHEAD * top):
        best = -1
        best_j = 0.0
        best_s = 0.0
        for batch in range(DUAL_AHEAD):
            tok = _ahead_tok(params, batch, batch_tok, waiting_tok)
            level = int(memory[batch])
            if tok == 0.0 or level == 0:
                continue
            now = rows[int(params[DUAL_LADDER + level])]
            then = rows[int(params[DUAL_LADDER + level - 1])]
            now_s = prefill_s(now, tok, 0.0)
            then_s = prefill_s(then, tok, 0.0)
            saved_j = now_s * now["prefill_power_w"] - then_s * then["prefill_power_w"]
            if saved_j > best_j and spent_s + then_s - now_s <= params[DUAL_TTFT_S]:
                best = batch
                best_j = saved_j
                best_s = then_s - now_s
        if best < 0:
            break
        memory[best] -= 1.0
        spent_s += best_s
    return int(memory[0])


@njit([GOVERNOR_SIGNATURE])
def dualscale(
    rows,
    padded,
    params,
    memory,
    t_s,
    running_req,
    kv_tok,
    waiting_tok,
    batch_tok,
    oldest_wait_s,
    floor_mhz,
    ceiling_mhz,
):
    """DualScale's fast tier: prefill by look-ahead, decode by the lowest feasible clock."""
    top = int(params[DUAL_N_LADDER]) - 1
    level = 0
    if batch_tok > 0.0:
        level = _plan_prefill(rows, params, memory, waiting_tok, batch_tok, oldest_wait_s)
    if running_req > 0.0:
        if kv_tok > params[DUAL_KV_FULL_TOK]:
            level = top
        while level < top:
            row = rows[int(params[DUAL_LADDER + level])]
            step_s = decode_s(row, padded[int(running_req)], kv_tok)
            if step_s + row["prefill_tok_s"] * batch_tok <= params[DUAL_ITL_S]:
                break
            level += 1
    clock_mhz = rows[int(params[DUAL_LADDER + level])]["clock_mhz"]
    return min(max(clock_mhz, floor_mhz), ceiling_mhz)
