"""Instances that change between prefill and decode: they drain, turn, and work again.

Who is to change takes no new work where anybody else can. Empty, with no KV cache that a decode
instance has yet to fetch, it turns, which takes `turn_s` at idle power, and then has its new role.
"""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW
from voltana_ctrl.kernels.layout import HANDOFF
from voltana_ctrl.kernels.plant.actuation import (
    F8,
    F8_1,
    F8_2,
    I8,
    INST,
    INSTS,
    NEVER,
    SIM,
    TABLES,
    accrue,
)
from voltana_ctrl.kernels.plant.batching import REQS
from voltana_ctrl.kernels.plant.events import SIMS, push_route, release_held, touch

ROWS = types.Array(ROW, 1, "C")


@njit(types.void(INST, I8))
def take_role(one, role):
    """Have a role from now on; nothing for those that cannot change."""
    if one["turning"] == 0 and one["role"] == role:
        return
    one["role"] = role
    one["turning"] = 0
    one["role_changes"] += 1
    one["prefills"] = 1 - role
    one["decodes"] = role


@njit(I8(INST, ROWS, F8))
def turn(one, rows, now_s):
    """Begin to change the role if it is to and may; 1 if it has it at once."""
    if one["role"] == one["want_role"] or one["alive"] == 0 or one["asleep"] != 0:
        return 0
    if one["wake_end_s"] < NEVER or one["iterating"] != 0 or one["running_req"] > 0:
        return 0
    if one["kv_tok"] > 0 or one["prefill_req"] > 0 or one["wait_req"] > 0:
        return 0
    accrue(one, rows, now_s)
    if one["turn_s"] <= 0.0:
        take_role(one, one["want_role"])
        return 1
    one["role"] = one["want_role"]
    one["turning"] = 1
    one["prefills"] = one["decodes"] = 0
    one["wake_end_s"] = now_s + one["turn_s"]
    return 0


@njit(types.void(SIMS, INSTS, REQS, TABLES, F8_2, F8_1, I8, I8))
def order_role(sims, inst, req, tables, pending_s, tree, i, role):
    """The loop wants an instance in this role."""
    one = inst[i]
    one["want_role"] = role
    if turn(one, tables[one["type"]], sims[0]["now_s"]) != 0:
        release_held(sims[0], req)
    touch(inst, pending_s, tree, i)


@njit(types.void(SIM, REQS, I8))
def send_elsewhere(sim, req, r):
    """The KV cache came where nobody decodes any more; prefill still has it."""
    req[r]["state"] = HANDOFF
    req[r]["decode_at"] = -1
    push_route(sim, req, r)
