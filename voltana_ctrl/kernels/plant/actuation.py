"""Clock actuation: dead time, serialised sets, settling.

A set call takes `actuation_s`, calls of one node follow one another, and the clock has its
new value `settle_s` after the call returned: a pure delay, up and down.
"""

from numba import from_dtype, types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, iteration_cost
from voltana_ctrl.kernels.layout import INSTANCE_DTYPE, PENDING, SIM_DTYPE

F8, I8 = types.float64, types.int64
SIM = from_dtype(SIM_DTYPE)
INST = from_dtype(INSTANCE_DTYPE)
INSTS = types.Array(INST, 1, "C")
TABLES = types.Array(ROW, 2, "C")
F8_1, F8_2 = types.Array(F8, 1, "C"), types.Array(F8, 2, "C")
I8_1, I8_2 = types.Array(I8, 1, "C"), types.Array(I8, 2, "C")
NEVER = 1e300


@njit(F8(INST, types.Array(ROW, 1, "C")))
def _resting_w(one, rows):
    """Power without an iteration: awake, it depends on the clock that is held meanwhile.

    ``rest + P_idle(f) - P_idle(f_max)``
    """
    if one["asleep"] != 0 or one["alive"] == 0:
        return one["rest_w"]
    k = min(one["clock_k"], one["clamp_k"])
    return one["rest_w"] + (rows[k]["idle_w"] - rows[one["n_clocks"] - 1]["idle_w"])


@njit(types.void(INST, types.Array(ROW, 1, "C"), F8))
def accrue(one, rows, now_s):
    """Add up energy and time of one instance until `now_s`; power is constant since."""
    span_s = now_s - one["last_s"]
    if span_s <= 0.0:
        return
    one["last_s"] = now_s
    one["running_req_s"] += one["running_req"] * span_s
    if one["active"] != 0 and one["alive"] != 0:
        one["active_s"] += span_s
    if one["iterating"] != 0:
        energy_j = one["power_w"] * span_s
        decode_j = energy_j * one["decode_power_frac"]
        one["decode_j"] += decode_j
        one["prefill_j"] += energy_j - decode_j
        one["busy_s"] += span_s
        one["busy_mhz_s"] += rows[one["run_k"]]["clock_mhz"] * span_s
    else:
        one["idle_j"] += _resting_w(one, rows) * span_s


@njit(F8(INST, TABLES, I8_2))
def price_iteration(one, tables, padded):
    """Length [s] of the present iteration at the present clock; notes the clock and the power.

    A power cap below what the clock would draw throttles: the iteration runs at the highest clock
    within the cap, or at the lowest of all if none is. Written are `run_k` (row of that clock),
    `power_w` and `decode_power_frac` (decode's share of the energy). The length contains
    `slow_frac` and `jitter_frac`, but no stall after a clock change, which :func:`proceed` adds.
    """
    kind = one["type"]
    k = min(one["clock_k"], one["clamp_k"])
    batch = one["batch_req"]
    size = float(padded[kind, batch])
    slow = one["slow_frac"] * one["jitter_frac"]
    wall_s, decode_j, prefill_j = iteration_cost(
        tables[kind, k], size, float(batch), float(one["kv_tok"]),
        float(one["chunk_tok"]), one["chunk_tok2"], float(one["begun_req"]),
    )  # fmt: skip
    while k > 0 and decode_j + prefill_j > one["power_cap_w"] * wall_s:
        k -= 1
        wall_s, decode_j, prefill_j = iteration_cost(
            tables[kind, k], size, float(batch), float(one["kv_tok"]),
            float(one["chunk_tok"]), one["chunk_tok2"], float(one["begun_req"]),
        )  # fmt: skip
    energy_j = decode_j + prefill_j
    one["run_k"] = k
    one["power_w"] = energy_j / wall_s
    one["decode_power_frac"] = decode_j / energy_j if energy_j > 0.0 else 0.0
    return wall_s * slow


@njit(types.void(INST, TABLES, F8, F8))
def proceed(one, tables, now_s, left_s):
    """The iteration has `left_s` of work left, and begins with it once its clock is stable.

    Until then it draws idle power: the mean over both is what it draws from now on.
    """
    one["iter_end_s"] = now_s + left_s
    stall_s = one["stall_end_s"] - now_s
    if stall_s > 0.0:
        idle_w = tables[one["type"], one["run_k"]]["idle_w"]
        drawn_j = one["power_w"] * left_s + idle_w * stall_s
        one["power_w"] = drawn_j / (left_s + stall_s)
        one["iter_end_s"] += stall_s


@njit(F8(INST, F8))
def _left_frac(one, now_s):
    """How much of the present iteration is still to be done; a stall does none of it."""
    return (one["iter_end_s"] - max(now_s, one["stall_end_s"])) / one["iter_wall_s"]


@njit(types.void(INST, TABLES, I8_2, F8, F8))
def _go_on(one, tables, padded, now_s, left_frac):
    """What is left of the present iteration goes on as things are now."""
    wall_s = price_iteration(one, tables, padded)
    one["iter_wall_s"] = wall_s
    proceed(one, tables, now_s, left_frac * wall_s)


@njit(types.void(INST, TABLES, I8_2, F8))
def repace(one, tables, padded, now_s):
    """What is left of a running iteration goes on as things are now."""
    if one["iterating"] != 0:
        _go_on(one, tables, padded, now_s, _left_frac(one, now_s))


@njit(types.void(INST, TABLES, I8_2, I8, F8, F8))
def set_pace(one, tables, padded, k, cap_w, now_s):
    """Clock and power cap take effect; what is left of an iteration goes on at the new pace."""
    if k == one["clock_k"] and cap_w == one["power_cap_w"]:
        return
    accrue(one, tables[one["type"]], now_s)
    # Before the next stall begins: what is left of an earlier one ends with it.
    left_frac = _left_frac(one, now_s) if one["iterating"] != 0 else 0.0
    if k != one["clock_k"] and one["alive"] != 0:
        one["idle_j"] += one["clock_change_j"]
        if one["clock_stall_s"] > 0.0:
            one["stall_end_s"] = now_s + one["clock_stall_s"]
    one["clock_k"] = k
    one["power_cap_w"] = cap_w
    if one["iterating"] != 0:
        _go_on(one, tables, padded, now_s, left_frac)


@njit(types.void(SIM, INST, F8_1, F8))
def _begin_call(sim, one, node_free_s, now_s):
    start_s = max(now_s, node_free_s[one["node"]])
    one["call_k"] = one["want_k"]
    one["call_start_s"] = start_s
    one["call_end_s"] = start_s + sim["actuation_s"]
    node_free_s[one["node"]] = one["call_end_s"]
    one["clock_sets"] += 1


@njit(types.void(SIM, INST, TABLES, I8_2, F8_1, I8, F8))
def request_clock(sim, one, tables, padded, node_free_s, k, now_s):
    """Ask for a clock. Idempotent; while a call runs only the latest wish is kept."""
    if k == one["want_k"]:
        return
    one["want_k"] = k
    if sim["actuation_s"] == 0.0 and sim["settle_s"] == 0.0:
        one["clock_sets"] += 1
        set_pace(one, tables, padded, k, one["power_cap_w"], now_s)
    elif one["call_end_s"] >= NEVER:
        _begin_call(sim, one, node_free_s, now_s)
    elif one["call_start_s"] > now_s:
        one["call_k"] = k  # still queued behind other calls of the node


@njit(types.void(SIM, INSTS, TABLES, I8_2, F8_1, F8_2, I8_2, I8, F8))
def call_returned(sim, inst, tables, padded, node_free_s, pending_s, pending_k, i, now_s):
    """A set call came back: the clock settles; a newer wish starts the next call."""
    one = inst[i]
    one["call_end_s"] = NEVER
    if sim["settle_s"] == 0.0:
        set_pace(one, tables, padded, one["call_k"], one["power_cap_w"], now_s)
    else:
        # Full only if sets come faster than settle_s / PENDING: the latest wins.
        slot = min(one["pending"], PENDING - 1)
        pending_s[i, slot] = now_s + sim["settle_s"]
        pending_k[i, slot] = one["call_k"]
        one["pending"] = slot + 1
    if one["want_k"] != one["call_k"]:
        _begin_call(sim, one, node_free_s, now_s)


@njit(types.void(INSTS, TABLES, I8_2, F8_2, I8_2, I8, F8))
def clock_settled(inst, tables, padded, pending_s, pending_k, i, now_s):
    """The oldest settling set takes effect."""
    one = inst[i]
    k = pending_k[i, 0]
    for slot in range(one["pending"] - 1):
        pending_s[i, slot] = pending_s[i, slot + 1]
        pending_k[i, slot] = pending_k[i, slot + 1]
    one["pending"] -= 1
    set_pace(one, tables, padded, k, one["power_cap_w"], now_s)
