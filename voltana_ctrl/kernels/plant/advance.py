"""The event loop of the simulated fleet.

:func:`advance` runs until a time, until all judged requests are done, or until a Python
governor or router has to be asked; it then returns and is called again with the answer.
Order at equal times: instances by index, KV arrivals, request arrivals, requests let in.
"""

import math

import numpy as np
from numba import types

from voltana_ctrl.kernels.choose.base import GOVERNOR
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import row_up
from voltana_ctrl.kernels.layout import (
    ASK_DECODE,
    ASK_GOVERNOR,
    ASK_PREFILL,
    DROPPED,
    HANDOFF,
    JUDGED,
    MOVING,
    REACHED,
    ROUTING,
    SEEN,
    VIEW_ELIGIBLE,
    VIEW_FREQ_MHZ,
    VIEW_KV_TOK,
    VIEW_QUEUE_REQ,
    VIEW_QUEUE_TOK,
    VIEW_ROUTE_FRAC,
    VIEW_RUNNING_REQ,
)
from voltana_ctrl.kernels.plant.actuation import (
    F8,
    F8_2,
    I8,
    I8_1,
    I8_2,
    INST,
    INSTS,
    NEVER,
    SIM,
    TABLES,
    accrue,
    call_returned,
    clock_settled,
    price_iteration,
    proceed,
    request_clock,
    set_pace,
)
from voltana_ctrl.kernels.plant.batching import (
    REQS,
    complete,
    enqueue_prefill,
    enqueue_wait,
    finish_step,
    form_batch,
    join,
)
from voltana_ctrl.kernels.plant.events import (
    SEENS,
    first,
    pop_moving,
    push_moving,
    push_route,
    push_start,
    release_held,
    remember,
    touch,
)
from voltana_ctrl.kernels.plant.late import keep_late, let_in, next_let_in_s
from voltana_ctrl.kernels.plant.rest import awake, doze, rouse
from voltana_ctrl.kernels.plant.roles import send_elsewhere, take_role, turn
from voltana_ctrl.kernels.plant.state import BELIEVED, FLEET, note
from voltana_ctrl.kernels.route.base import ROUTER

#: What may happen next.
INSTANCE, KV_ARRIVAL, REQUEST_ARRIVAL, LETTING_IN = range(4)
#: No Python governor or router has to be asked.
NOTHING_ASKED = -1


@njit(F8(SIM))
def _uniform(sim):
    """Next number in [0, 1) of the simulation's own generator (xorshift64)."""
    x = sim["rng"]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    sim["rng"] = x
    return float(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(F8(SIM, F8))
def _jitter(sim, sd_frac):
    """Log-normal factor of mean 1."""
    radius = math.sqrt(-2.0 * math.log(1.0 - _uniform(sim)))
    normal = radius * math.cos(2.0 * math.pi * _uniform(sim))
    return math.exp(sd_frac * normal - 0.5 * sd_frac * sd_frac)


@njit(I8(INST, I8))
def _serves(one, decoding):
    """Whether it does this phase now; who may change its role does one of them, or turns."""
    return one["decodes"] if decoding != 0 else one["prefills"]


@njit(I8(INSTS, I8_1, I8, I8))
def _who_can_hold(inst, members, need_tok, decoding):
    """2 if somebody who lives and serves has a KV cache of this size, 1 if others, 0 if nobody."""
    found = 0
    for j in members:
        if inst[j]["kv_capacity_tok"] >= need_tok:
            found = max(found, 1 + inst[j]["alive"] * _serves(inst[j], decoding))
    return found


@njit(I8(INST, F8))
def _rank(one, lost_frac):
    """Alive before dead, active before parked, awake before asleep or waking; last who leaves.

    While the share of a dead one is nobody's, who is parked and awake stands in.
    """
    if one["role"] != one["want_role"]:
        return one["alive"]
    awake_now = 1 if one["asleep"] == 0 and one["wake_end_s"] >= NEVER else 0
    active = max(one["active"], awake_now) if lost_frac > 0.0 else one["active"]
    return one["alive"] * (4 + 2 * active + awake_now)


@njit(types.void(SIM, INSTS, SEENS, F8_2, I8_1, I8, I8))
def _look(sim, inst, seen, view, members, need_tok, decoding):
    """Fill the router's view of `members`; eligible are the best of those that can hold it.

    What changes with a decision alone is written when the decision is applied; but until then,
    those that are parked and awake have the share of who died.
    """
    lost_frac = 0.0
    for j in members:
        gone = inst[j]["active"] != 0 and inst[j]["alive"] == 0
        if gone and _serves(inst[j], decoding) != 0:
            lost_frac += view[VIEW_ROUTE_FRAC, j]
    best = 0
    stand_in = 0
    for j in members:
        if inst[j]["kv_capacity_tok"] >= need_tok and _serves(inst[j], decoding) != 0:
            rank = _rank(inst[j], lost_frac)
            if rank > best:
                best = rank
                stand_in = 0
            if rank == best and inst[j]["active"] == 0:
                stand_in += 1
    then_s = sim["now_s"] - sim["view_age_s"]
    for j in members:
        one = inst[j]
        fits = one["kv_capacity_tok"] >= need_tok and _rank(one, lost_frac) == best
        fits = fits and _serves(one, decoding) != 0
        if fits and lost_frac > 0.0 and one["active"] == 0:
            view[VIEW_ROUTE_FRAC, j] = lost_frac / stand_in
        view[VIEW_ELIGIBLE, j] = 1.0 if fits else 0.0
        # Of the states in the ring the newest that is old enough; time only goes forward.
        newest = one["seen"] - 1
        shown = max(one["shown"], min(newest, max(0, one["seen"] - SEEN)))
        while shown < newest and seen[j, (shown + 1) & (SEEN - 1)]["t_s"] <= then_s:
            shown += 1
        if shown == one["shown"]:
            continue
        one["shown"] = shown
        row = seen[j, shown & (SEEN - 1)]
        view[VIEW_QUEUE_TOK, j] = row["queue_tok"]
        view[VIEW_QUEUE_REQ, j] = row["queue_req"]
        view[VIEW_RUNNING_REQ, j] = row["running_req"]
        view[VIEW_KV_TOK, j] = row["kv_tok"]
        view[VIEW_FREQ_MHZ, j] = row["freq_mhz"]


@njit(types.void(SIM, REQS))
def _leave_route(sim, req):
    """Take the first request off the list of those to be routed."""
    sim["route_head"] = req[sim["route_head"]]["next"]
    if sim["route_head"] < 0:
        sim["route_tail"] = -1


@njit(types.void(SIM, REQS, I8))
def _hold(sim, req, r):
    """Keep a request until somebody lives who can take it; see faults.py."""
    req[r]["next"] = -1
    if sim["held_tail"] >= 0:
        req[sim["held_tail"]]["next"] = r
    else:
        sim["held_head"] = r
    sim["held_tail"] = r


@njit(types.void(FLEET, I8))
def _send(fleet, r):
    """Carry out a routing choice: into the prefill queue, or on the way to decode."""
    sim, inst, req = fleet.sims[0], fleet.inst, fleet.req
    q = req[r]
    if q["state"] == ROUTING:
        one = inst[q["prefill_at"]]
        one["arrived_req"] += 1
        one["arrived_tok"] += q["prompt_tok"]
        enqueue_prefill(one, req, r)
        remember(inst, fleet.tables, fleet.seen, q["prefill_at"], sim["now_s"])
        push_start(sim, inst, fleet.starts, q["prefill_at"])
    else:
        source = inst[q["prefill_at"]]
        inst[q["decode_at"]]["arrived_req"] += 1
        inst[q["decode_at"]]["arrived_tok"] += q["prompt_tok"]
        source["transfer_j"] += q["prompt_tok"] * source["transfer_tok_j"]
        q["state"] = MOVING
        arrives_s = (
            sim["now_s"] + source["transfer_latency_s"] + q["prompt_tok"] * source["transfer_tok_s"]
        )
        push_moving(sim, fleet.moving_s, fleet.moving_r, arrives_s, r)


@njit(types.void(FLEET, I8))
def _end_chunks(fleet, i):
    """Prompt chunks of the iteration are done; whole prompts move on."""
    sim, inst, req, finish = fleet.sims[0], fleet.inst, fleet.req, fleet.finish
    one = inst[i]
    for _ in range(one["chunk_req"]):
        r = one["prefill_head"]
        q = req[r]
        q["todo_tok"] -= q["chunk_tok"]
        one["prefill_tok"] -= q["chunk_tok"]
        one["prefilled_tok"] += q["chunk_tok"]
        if q["todo_tok"] > 0:
            break
        one["prefill_head"] = q["next"]
        if q["next"] < 0:
            one["prefill_tail"] = -1
        one["prefill_req"] -= 1
        one["prefilling_req"] -= 1
        one["prefill_late"] -= 1 if q["deadline_s"] < NEVER else 0
        if q["made_tok"] > 0:
            join(one, req, finish, i, r)  # recomputed after a preemption
            continue
        q["made_tok"] = 1
        one["emitted_tok"] += 1
        stays = one["decodes"] != 0
        tells = stays or one["first_token_decode"] == 0 or q["output_tok"] == 1
        if tells and q["first_s"] < 0.0:  # it may have been told before a failure
            q["first_s"] = sim["now_s"]
        if q["output_tok"] == 1:
            one["kv_tok"] -= q["context_tok"]
            complete(sim, req, fleet.done, r, sim["now_s"])
        elif stays:
            q["decode_at"] = i
            q["context_tok"] += 1
            one["kv_tok"] += 1
            join(one, req, finish, i, r)
        else:
            q["state"] = HANDOFF
            if q["decode_at"] >= 0 and inst[q["decode_at"]]["decodes"] == 0:
                q["decode_at"] = -1  # chosen at arrival, and it has changed its role since
            push_route(sim, req, r)


@njit(types.void(SIM, REQS, I8))
def _release(sim, req, count):
    """Closed loop: clients whose answer came send their next request at once."""
    for _ in range(count):
        r = sim["next_release"]
        if r >= sim["n_requests"]:
            return
        sim["next_release"] += 1
        q = req[r]
        q["arrival_s"] = q["sent_s"] = sim["now_s"]
        if sim["judge_from_s"] <= sim["now_s"] < sim["judge_until_s"]:
            sim["n_judged"] += 1
            sim["n_judged_left"] += 1
        q["state"] = ROUTING
        push_route(sim, req, r)


@njit(types.void(SIM, REQS, I8))
def _drop(sim, req, r):
    """Refuse a request that no instance could ever hold; its client goes on to the next."""
    q = req[r]
    q["state"] = DROPPED
    if sim["judge_from_s"] <= q["arrival_s"] < sim["judge_until_s"]:
        sim["n_judged_left"] -= 1
    if sim["closed_loop"] != 0:
        _release(sim, req, 1)


@njit(types.void(FLEET, I8))
def _end_iteration(fleet, i):
    """Instance i has ended its iteration: it is logged, and its requests go on."""
    sim, inst, req = fleet.sims[0], fleet.inst, fleet.req
    tables, log = fleet.tables, fleet.log
    one = inst[i]
    accrue(one, tables[one["type"]], sim["now_s"])
    one["iterating"] = 0
    one["iterations"] += 1
    if len(log) > 0:
        row = log[sim["n_logged"] % len(log)]
        row["instance"] = i
        row["t_s"] = sim["now_s"]
        row["wall_s"] = sim["now_s"] - one["iter_start_s"]
        row["freq_mhz"] = tables[one["type"], one["run_k"]]["clock_mhz"]
        row["batch_req"] = one["batch_req"]
        row["prefill_tok"] = one["chunk_tok"]
        row["kv_tok"] = one["kv_tok"]
        row["energy_j"] = one["prefill_j"] + one["decode_j"] - one["iter_start_j"]
        row["prefill_tok2"] = one["chunk_tok2"]
        row["asked_mhz"] = tables[one["type"], one["iter_ask_k"]]["clock_mhz"]
        sim["n_logged"] += 1
    before = sim["n_done"]
    if one["batch_req"] > 0:
        finish_step(sim, one, req, fleet.finish, fleet.done, i, sim["now_s"])
    if one["chunk_req"] > 0:
        _end_chunks(fleet, i)
    if sim["closed_loop"] != 0:
        _release(sim, req, sim["n_done"] - before)
    push_start(sim, inst, fleet.starts, i)


@njit(F8(FLEET, BELIEVED, GOVERNOR, I8))
def _needed_mhz(fleet, believed, governor, i):
    """Clock that the governor of instance i asks for."""
    sim, one, req = fleet.sims[0], fleet.inst[i], fleet.req
    oldest_s = 0.0
    if one["prefill_head"] >= 0:
        oldest_s = sim["now_s"] - req[one["prefill_head"]]["sent_s"]
    elif one["wait_head"] >= 0:
        oldest_s = sim["now_s"] - req[one["wait_head"]]["sent_s"]
    kind = one["type"]
    return governor(
        believed.tables[kind], believed.padded[kind], believed.governor_params[i],
        believed.governor_memory[i], sim["now_s"],
        float(one["batch_req"]), float(one["kv_tok"]),
        float(one["prefill_tok"] + one["wait_tok"]), float(one["chunk_tok"]), oldest_s,
        one["floor_mhz"], one["ceiling_mhz"],
    )  # fmt: skip


@njit(types.void(SIM, INST, TABLES, I8_2))
def _launch(sim, one, tables, padded):
    """Begin the prepared iteration at the present clock."""
    one["jitter_frac"] = 1.0
    if sim["jitter_sd_frac"] > 0.0:
        one["jitter_frac"] = _jitter(sim, sim["jitter_sd_frac"])
    one["iterating"] = 1
    one["iter_start_s"] = sim["now_s"]
    one["iter_ask_k"] = one["want_k"]
    one["iter_start_j"] = one["prefill_j"] + one["decode_j"]
    one["iter_wall_s"] = price_iteration(one, tables, padded)
    proceed(one, tables, sim["now_s"], one["iter_wall_s"])


@njit(types.void(FLEET, INST, F8))
def _set_clock(fleet, one, freq_mhz):
    """Ask for the lowest supported clock that is no lower, but for the ceiling."""
    sim = fleet.sims[0]
    wanted_mhz = min(freq_mhz, one["ceiling_mhz"])
    k = row_up(fleet.tables[one["type"]], one["n_clocks"], wanted_mhz)
    request_clock(sim, one, fleet.tables, fleet.padded, fleet.node_free_s, k, sim["now_s"])


@njit(I8(SIM, I8, I8))
def _ask(sim, what, index):
    """Python has to be asked: leave the loop, to come back with the answer."""
    sim["ask"] = what
    sim["ask_index"] = index
    return what


@njit(types.void(FLEET))
def settle_accounts(fleet):
    """Bring energy and time sums of all instances up to now."""
    inst = fleet.inst
    for i in range(len(inst)):
        accrue(inst[i], fleet.tables[inst[i]["type"]], fleet.sims[0]["now_s"])


@njit(types.void(FLEET, I8, F8))
def order_clock(fleet, i, freq_mhz):
    """The loop sets a clock (no governor runs on this instance)."""
    sim, one = fleet.sims[0], fleet.inst[i]
    k = row_up(fleet.tables[one["type"]], one["n_clocks"], freq_mhz)
    request_clock(sim, one, fleet.tables, fleet.padded, fleet.node_free_s, k, sim["now_s"])
    note(fleet, i)


@njit(types.void(FLEET, I8, F8))
def order_cap(fleet, i, cap_w):
    """The loop sets a power cap, which takes effect at once."""
    one = fleet.inst[i]
    set_pace(one, fleet.tables, fleet.padded, one["clock_k"], cap_w, fleet.sims[0]["now_s"])
    note(fleet, i)


@njit(I8(FLEET, BELIEVED, ROUTER, ROUTER))
def _route(fleet, believed, prefill_router, decode_router):
    """Route the first request of the list; what has to be asked, if a Python router has to be."""
    sim, inst, req, view = fleet.sims[0], fleet.inst, fleet.req, fleet.shown
    r = sim["route_head"]
    q = req[r]
    need_tok = q["prompt_tok"] + q["output_tok"]
    apart = sim["apart"] != 0
    early = sim["decode_at_arrival"] != 0
    prefill_need_tok = q["prompt_tok"] if apart else need_tok
    can_prefill = _who_can_hold(inst, fleet.prefill, prefill_need_tok, 0)
    can_decode = _who_can_hold(inst, fleet.decode, need_tok, 1)
    # Refused before any work is spent on it.
    able = can_prefill > 0 and can_decode > 0
    to_prefill = able and q["state"] == ROUTING and q["prefill_at"] < 0
    to_decode = able and apart and q["decode_at"] < 0 and (q["state"] == HANDOFF or early)
    if (to_prefill and can_prefill == 1) or (to_decode and can_decode == 1):
        _leave_route(sim, req)
        _hold(sim, req, r)
        return NOTHING_ASKED
    if to_prefill:
        _look(sim, inst, fleet.seen, view, fleet.prefill, prefill_need_tok, 0)
        if sim["hosted_prefill"] == 0:
            q["prefill_at"] = prefill_router(
                believed.tables, believed.padded, believed.prefill_params,
                believed.prefill_memory, _uniform(sim), float(q["prompt_tok"]), view,
                fleet.prefill,
            )  # fmt: skip
        elif sim["answered"] != 0:
            q["prefill_at"] = sim["answer_instance"]
            sim["answered"] = 0
        else:
            return _ask(sim, ASK_PREFILL, r)
    if to_decode:
        _look(sim, inst, fleet.seen, view, fleet.decode, need_tok, 1)
        if sim["hosted_decode"] == 0:
            q["decode_at"] = decode_router(
                believed.tables, believed.padded, believed.decode_params,
                believed.decode_memory, _uniform(sim), float(q["prompt_tok"]), view,
                fleet.decode,
            )  # fmt: skip
        elif sim["answered"] != 0:
            q["decode_at"] = sim["answer_instance"]
            sim["answered"] = 0
        else:
            return _ask(sim, ASK_DECODE, r)
    _leave_route(sim, req)
    if able:
        _send(fleet, r)
    else:
        _drop(sim, req, r)
    return NOTHING_ASKED


@njit(I8(FLEET, BELIEVED, GOVERNOR))
def _start(fleet, believed, governor):
    """Let the last instance of the list begin an iteration, or rest; what has to be asked."""
    sim, inst, req, tables = fleet.sims[0], fleet.inst, fleet.req, fleet.tables
    now_s = sim["now_s"]
    i = fleet.starts[sim["n_start"] - 1]
    one = inst[i]
    if one["prepared"] == 0:
        # form_batch may append to the list, so this instance leaves it first.
        sim["n_start"] -= 1
        one["listed"] = 0
        if one["alive"] == 0:
            return NOTHING_ASKED
        if one["asleep"] != 0 and one["prefill_req"] + one["wait_req"] > 0:
            rouse(one, tables[one["type"]], now_s)
            note(fleet, i)
        if one["wake_end_s"] < NEVER:
            return NOTHING_ASKED
        accrue(one, tables[one["type"]], now_s)
        if form_batch(sim, inst, req, fleet.finish, fleet.starts, i) == 0:
            one["idle_since_s"] = now_s
            if turn(one, tables[one["type"]], now_s) != 0:
                release_held(sim, req)
            doze(one, tables[one["type"]], now_s)
            note(fleet, i)
            return NOTHING_ASKED
        one["prepared"] = 1
        one["listed"] = 1
        fleet.starts[sim["n_start"]] = i
        sim["n_start"] += 1
    if one["governed"] == 2:
        if sim["answered"] == 0:
            return _ask(sim, ASK_GOVERNOR, i)
        sim["answered"] = 0
        _set_clock(fleet, one, sim["answer_mhz"])
    elif one["governed"] != 0:
        _set_clock(fleet, one, _needed_mhz(fleet, believed, governor, i))
    one["prepared"] = 0
    one["listed"] = 0
    sim["n_start"] -= 1
    _launch(sim, one, tables, fleet.padded)
    note(fleet, i)
    return NOTHING_ASKED


@njit(types.void(FLEET))
def _arrive(fleet):
    """The next request comes in; one that may wait is kept until it is let in."""
    sim, req = fleet.sims[0], fleet.req
    r = sim["next_arrival"]
    sim["next_arrival"] += 1
    if req[r]["deadline_s"] < NEVER:
        keep_late(sim, req, r)
    else:
        req[r]["state"] = ROUTING
        req[r]["sent_s"] = sim["now_s"]
        push_route(sim, req, r)


@njit(types.void(FLEET))
def _receive(fleet):
    """The KV cache that was first on its way has arrived at its decode instance."""
    sim, inst, req = fleet.sims[0], fleet.inst, fleet.req
    r = pop_moving(sim, fleet.moving_s, fleet.moving_r)
    i = req[r]["decode_at"]
    if inst[i]["decodes"] == 0:
        send_elsewhere(sim, req, r)
        return
    enqueue_wait(inst[i], req, r)
    remember(inst, fleet.tables, fleet.seen, i, sim["now_s"])
    push_start(sim, inst, fleet.starts, i)


@njit(types.void(FLEET, BELIEVED, GOVERNOR, I8))
def _attend(fleet, believed, governor, i):
    """What is due at instance i: a clock, the end of waking or of an iteration, an idle look."""
    sim, inst = fleet.sims[0], fleet.inst
    pending_s, pending_k = fleet.pending_s, fleet.pending_k
    now_s = sim["now_s"]
    one = inst[i]
    ended = False
    if one["call_end_s"] <= now_s:
        call_returned(
            sim, inst, fleet.tables, fleet.padded, fleet.node_free_s, pending_s, pending_k, i, now_s
        )
    elif one["pending"] > 0 and pending_s[i, 0] <= now_s:
        clock_settled(inst, fleet.tables, fleet.padded, pending_s, pending_k, i, now_s)
    elif one["wake_end_s"] <= now_s:
        awake(one, fleet.tables[one["type"]], now_s)
        if one["turning"] != 0:
            take_role(one, one["role"])
            release_held(sim, fleet.req)
        push_start(sim, inst, fleet.starts, i)
    elif one["iterating"] != 0:
        _end_iteration(fleet, i)
        ended = True  # what it starts next is what routers see
    else:
        one["idle_since_s"] = NEVER
        _set_clock(fleet, one, _needed_mhz(fleet, believed, governor, i))
    if not ended:
        remember(inst, fleet.tables, fleet.seen, i, now_s)
    touch(inst, pending_s, fleet.tree, i)


@njit(I8(FLEET, BELIEVED, GOVERNOR, ROUTER, ROUTER, F8))
def advance(fleet, believed, governor, prefill_router, decode_router, until_s):
    """Run the fleet until `until_s`; see the module for when it returns earlier."""
    sim, req = fleet.sims[0], fleet.req
    while True:
        # What happens now comes before what happens next.
        asked = NOTHING_ASKED
        if sim["route_head"] >= 0:
            asked = _route(fleet, believed, prefill_router, decode_router)
        elif sim["n_start"] > 0:
            asked = _start(fleet, believed, governor)
        else:
            if sim["stop_when_judged"] != 0 and sim["n_judged_left"] == 0:
                return JUDGED
            event = INSTANCE
            t_s = fleet.tree[1]
            if sim["n_moving"] > 0 and fleet.moving_s[0] < t_s:
                event, t_s = KV_ARRIVAL, fleet.moving_s[0]
            if sim["next_arrival"] < sim["n_arrivals"]:
                arrival_s = req[sim["next_arrival"]]["arrival_s"]
                if arrival_s < t_s:
                    event, t_s = REQUEST_ARRIVAL, arrival_s
            if sim["late_head"] >= 0:
                let_in_s = next_let_in_s(sim, req)
                if let_in_s < t_s:
                    event, t_s = LETTING_IN, let_in_s
            if t_s > until_s:
                sim["now_s"] = until_s
                return REACHED
            sim["now_s"] = t_s
            if event == KV_ARRIVAL:
                _receive(fleet)
            elif event == REQUEST_ARRIVAL:
                _arrive(fleet)
            elif event == LETTING_IN:
                let_in(sim, req)
            else:
                _attend(fleet, believed, governor, first(fleet.tree))
        if asked != NOTHING_ASKED:
            return asked
