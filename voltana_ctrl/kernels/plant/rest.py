"""Sleep of parked instances: what they draw, and what it takes to wake them.

An instance that is parked and holds nothing falls asleep, as deep as it was told. It wakes when it
is active again, when work comes to it, or when it is told to sleep less deep, and does nothing
until it is awake. All of it is idle energy.
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


@njit(types.void(INST, F8))
def _sink(one, now_s):
    """Begin to fall asleep as deep as was told; until it is there it draws what it drew."""
    one["slept_depth"] = one["depth"]
    one["slept_w"] = one["asleep_w"]
    one["slept_wake_s"] = one["wake_s"]
    one["slept_wake_j"] = one["wake_j"]
    if one["enter_s"] > 0.0:
        one["wake_end_s"] = now_s + one["enter_s"]
    else:
        one["rest_w"] = one["asleep_w"]


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
    _sink(one, now_s)


@njit(types.void(INST, ROWS, F8))
def rouse(one, rows, now_s):
    """Begin to wake; what waking costs comes on top of idle power, evenly over its time."""
    if one["asleep"] == 0:
        return
    accrue(one, rows, now_s)
    # Who is still falling asleep has to get there first.
    left_s = one["wake_end_s"] - now_s if one["wake_end_s"] < NEVER else 0.0
    wake_s = left_s + one["slept_wake_s"]
    one["asleep"] = 0
    one["wakes"] += 1
    one["rest_w"] = one["idle_w"]
    if wake_s > 0.0:
        one["wake_end_s"] = now_s + wake_s
        one["rest_w"] += one["slept_wake_j"] / wake_s
    else:
        one["idle_j"] += one["slept_wake_j"]


@njit(types.void(INST, ROWS, F8))
def awake(one, rows, now_s):
    """Be there: awake again, or asleep."""
    accrue(one, rows, now_s)
    one["wake_end_s"] = NEVER
    one["rest_w"] = one["slept_w"] if one["asleep"] != 0 else one["idle_w"]


@njit(types.void(SIMS, INSTS, TABLES, F8_2, F8_1, I8))
def order_rest(sims, inst, tables, pending_s, tree, i):
    """The loop has made an instance active or parked it, or wants another depth of sleep."""
    one = inst[i]
    rows = tables[one["type"]]
    now_s = sims[0]["now_s"]
    if one["active"] != 0 or (one["asleep"] != 0 and one["depth"] < one["slept_depth"]):
        rouse(one, rows, now_s)
    elif one["asleep"] == 0:
        doze(one, rows, now_s)
    elif one["depth"] > one["slept_depth"] and one["wake_end_s"] >= NEVER:
        accrue(one, rows, now_s)
        _sink(one, now_s)
    touch(inst, pending_s, tree, i)
