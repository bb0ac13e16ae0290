"""What failures, recoveries, slow-downs and clamps do to the plant, between two events.

A request that was on a failed instance begins anew, as an engine has no copy of its KV cache;
one whose KV is still held by the prefill instance is only routed anew.
"""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.layout import HANDOFF, MOVING, QUEUED, ROUTING, RUNNING, WAITING
from voltana_ctrl.kernels.plant.actuation import (
    F8,
    F8_1,
    I8,
    I8_1,
    INST,
    INSTS,
    NEVER,
    SIM,
    accrue,
    repace,
)
from voltana_ctrl.kernels.plant.batching import REQS, enqueue_wait
from voltana_ctrl.kernels.plant.events import (
    push_moving,
    push_route,
    push_start,
    release_held,
    remember,
)
from voltana_ctrl.kernels.plant.roles import take_role
from voltana_ctrl.kernels.plant.state import FLEET, note


@njit(types.void(INST, REQS, I8))
def _begin_anew(one, req, r):
    """All that was done for a request is lost; its client keeps the tokens it has."""
    q = req[r]
    made_tok = q["made_tok"]
    if q["state"] == RUNNING:
        made_tok += one["step"] - q["join_step"]
    one["lost_tok"] += made_tok
    q["state"] = ROUTING
    q["prefill_at"] = q["decode_at"] = -1
    q["made_tok"] = q["context_tok"] = 0
    q["todo_tok"] = q["prompt_tok"] - q["cached_tok"]
    q["retries"] += 1


@njit(types.void(INSTS, REQS, I8, I8))
def _forget_waiting(inst, req, d, i):
    """Leave out of the decode queue of instance d those whose KV cache was held by i."""
    one = inst[d]
    r = one["wait_head"]
    one["wait_head"] = one["wait_tail"] = -1
    one["wait_req"] = one["wait_tok"] = one["wait_late"] = 0
    while r >= 0:
        after = req[r]["next"]
        if d != i and req[r]["prefill_at"] != i:
            enqueue_wait(one, req, r)
        r = after


@njit(types.void(SIM, REQS, F8_1, I8_1, I8))
def _forget_moving(sim, req, moving_s, moving_r, i):
    """Leave out of what is on its way all that comes from instance i or goes there."""
    n = sim["n_moving"]
    sim["n_moving"] = 0
    for k in range(n):
        t_s = moving_s[k]
        r = moving_r[k]
        if req[r]["prefill_at"] != i and req[r]["decode_at"] != i:
            push_moving(sim, moving_s, moving_r, t_s, r)


@njit(types.void(SIM, INST, REQS, I8, I8))
def _send_on(sim, one, req, r, i):
    """What becomes of request r when instance i, which is `one`, fails."""
    q = req[r]
    state = q["state"]
    listed = state == HANDOFF  # held back, or of another failure at the same time
    if state == QUEUED:
        # A preempted request is queued where it decodes.
        here = q["prefill_at"] == i if q["made_tok"] == 0 else q["decode_at"] == i
        kv_at = -1
    elif state == RUNNING:
        here = q["decode_at"] == i
        kv_at = -1
    elif state in (HANDOFF, MOVING, WAITING):
        here = q["prefill_at"] == i
        kv_at = q["prefill_at"]
    else:
        return
    if here:
        _begin_anew(one, req, r)
    elif q["decode_at"] == i and kv_at >= 0:
        q["state"] = HANDOFF
        q["decode_at"] = -1
    else:
        if state == QUEUED and q["made_tok"] == 0 and q["decode_at"] == i:
            q["decode_at"] = -1  # chosen at arrival; to be chosen anew
        return
    if not listed:
        push_route(sim, req, r)


@njit(types.void(FLEET, I8))
def fail(fleet, i):
    """Instance i is gone, with all that it held; it draws nothing."""
    sim, inst, req, tables = fleet.sims[0], fleet.inst, fleet.req, fleet.tables
    one = inst[i]
    accrue(one, tables[one["type"]], sim["now_s"])
    release_held(sim, req)
    for d in range(len(inst)):
        if inst[d]["wait_head"] >= 0:
            _forget_waiting(inst, req, d, i)
            remember(inst, tables, fleet.seen, d, sim["now_s"])
    _forget_moving(sim, req, fleet.moving_s, fleet.moving_r, i)
    for r in range(len(req)):
        _send_on(sim, one, req, r, i)
    one["alive"] = 0
    # It starts anew in the role that it was to have.
    take_role(one, one["want_role"])
    one["rest_w"] = 0.0
    one["asleep"] = 0
    one["wake_end_s"] = one["idle_since_s"] = NEVER
    one["iterating"] = 0
    one["batch_req"] = one["chunk_tok"] = one["chunk_req"] = 0
    one["chunk_tok2"] = 0.0
    one["running_req"] = one["kv_tok"] = 0
    one["prefill_req"] = one["prefill_tok"] = one["prefilling_req"] = one["prefill_late"] = 0
    one["last_admitted"] = one["prefill_head"] = one["prefill_tail"] = -1
    fleet.finish[i, :] = -1
    note(fleet, i)


@njit(types.void(FLEET, I8))
def recover(fleet, i):
    """Instance i is back, empty and with the clock it was last set to."""
    sim, inst = fleet.sims[0], fleet.inst
    one = inst[i]
    accrue(one, fleet.tables[one["type"]], sim["now_s"])
    one["alive"] = 1
    one["rest_w"] = one["idle_w"]
    release_held(sim, fleet.req)
    push_start(sim, inst, fleet.starts, i)
    remember(inst, fleet.tables, fleet.seen, i, sim["now_s"])


@njit(types.void(FLEET, I8, F8, I8))
def hinder(fleet, i, slow_frac, clamp_k):
    """Instance i takes `slow_frac` times as long from now on, and runs no faster than its clamp."""
    now_s = fleet.sims[0]["now_s"]
    one = fleet.inst[i]
    accrue(one, fleet.tables[one["type"]], now_s)
    one["slow_frac"] = slow_frac
    one["clamp_k"] = clamp_k
    repace(one, fleet.tables, fleet.padded, now_s)
    note(fleet, i)
