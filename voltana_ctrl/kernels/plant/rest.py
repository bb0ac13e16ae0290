"""Sleep of parked instances: what they draw, and what it takes to wake them.

An instance that is parked and holds nothing sleeps. It wakes when it is active again, or when
work comes to it, and does nothing until it is awake. All of it is idle energy.
"""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW
from voltana_ctrl.kernels.plant.actuation import (
    F8,
    F8_1,
    F8_2,
    I8,
    INST,
    INSTS,
    NEVER,
    TABLES,
    accrue,
)
from voltana_ctrl.kernels.plant.events import SIMS, touch

ROWS = types.Array(ROW, 1, "C")


@njit(types.void(INST, ROWS, F8))
def doze(one, rows, now_s):
    """Put an instance to sleep if it may: alive, parked, empty, with a difference to make."""
    if one["sleeps"] == 0 or one["alive"] == 0 or one["active"] != 0:
        return
    if one["asleep"] != 0 or one["wake_end_s"] < NEVER or one["iterating"] != 0:
        return
    if one["kv_tok"] > 0 or one["prefill_req"] > 0 or one["wait_req"] > 0:
        return
    accrue(one, rows, now_s)
    one["asleep"] = 1
    one["rest_w"] = one["asleep_w"]


@njit(types.void(INST, ROWS, F8))
def rouse(one, rows, now_s):
    """Begin to wake; what waking costs comes on top of idle power, evenly over its time."""
    if one["asleep"] == 0:
        return
    accrue(one, rows, now_s)
    one["asleep"] = 0
    one["wakes"] += 1
    one["rest_w"] = one["idle_w"]
    if one["wake_s"] > 0.0:
        one["wake_end_s"] = now_s + one["wake_s"]
        one["rest_w"] += one["wake_j"] / one["wake_s"]
    else:
        one["idle_j"] += one["wake_j"]


@njit(types.void(INST, ROWS, F8))
def awake(one, rows, now_s):
    """Be there again."""
    accrue(one, rows, now_s)
    one["wake_end_s"] = NEVER
    one["rest_w"] = one["idle_w"]


@njit(types.void(SIMS, INSTS, TABLES, F8_2, F8_1, I8))
def order_rest(sims, inst, tables, pending_s, tree, i):
    """The loop has made an instance active or parked it."""
    one = inst[i]
    if one["active"] != 0:
        rouse(one, tables[one["type"]], sims[0]["now_s"])
    else:
        doze(one, tables[one["type"]], sims[0]["now_s"])
    touch(inst, pending_s, tree, i)
