"""Queues and batches of one instance: admission, chunked prefill, preemption, completion.

Requests that finish at the same decode step of an instance form a doubly linked list, found
by step modulo the ring's length; the running batch is a second list in order of admission.
So an iteration costs the same whatever its batch.

In a queue, requests that may wait for their answer stand behind those that may not.
"""

from numba import from_dtype, types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.layout import DONE, QUEUED, REQUEST_DTYPE, RUNNING, WAITING
from voltana_ctrl.kernels.plant.actuation import F8, I8, I8_1, I8_2, INST, INSTS, NEVER, SIM

REQ = from_dtype(REQUEST_DTYPE)
REQS = types.Array(REQ, 1, "C")

#: Share of the KV cache kept free at admission, as vLLM's watermark.
WATERMARK_FRAC = 0.01


@njit(types.boolean(INST, I8))
def _fits(one, need_tok):
    """Whether `need_tok` more tokens fit, with one more token for each running request."""
    after_tok = one["kv_tok"] + need_tok + one["running_req"]
    if one["kv_tok"] == 0:
        return True  # it was checked at arrival that each request fits alone
    return after_tok <= (1.0 - WATERMARK_FRAC) * one["kv_capacity_tok"]


@njit(I8(REQS, I8, I8))
def _last_before_late(req, head, skipped):
    """Last request of a queue that stands before those that may wait; -1 for none.

    The first `skipped` stay where they are, whatever they are.
    """
    last = -1
    r = head
    while r >= 0 and (skipped > 0 or req[r]["deadline_s"] >= NEVER):
        skipped -= 1
        last = r
        r = req[r]["next"]
    return last


@njit(types.void(INST, REQS, I8))
def enqueue_prefill(one, req, r):
    """Put a request at the end of the prefill queue, or before those that may wait."""
    q = req[r]
    q["state"] = QUEUED
    q["context_tok"] = 0
    after = one["prefill_tail"]
    if q["deadline_s"] < NEVER:
        one["prefill_late"] += 1
    elif one["prefill_late"] > 0:
        # Who holds KV is not overtaken.
        after = _last_before_late(req, one["prefill_head"], one["prefilling_req"])
    if after >= 0:
        q["next"] = req[after]["next"]
        req[after]["next"] = r
    else:
        q["next"] = one["prefill_head"]
        one["prefill_head"] = r
    if q["next"] < 0:
        one["prefill_tail"] = r
    one["prefill_req"] += 1
    one["prefill_tok"] += q["todo_tok"]


@njit(types.void(INST, REQS, I8))
def enqueue_wait(one, req, r):
    """Put a request whose KV has arrived at the end of the decode queue, or as above."""
    q = req[r]
    q["state"] = WAITING
    after = one["wait_tail"]
    if q["deadline_s"] < NEVER:
        one["wait_late"] += 1
    elif one["wait_late"] > 0:
        after = _last_before_late(req, one["wait_head"], 0)
    if after >= 0:
        q["next"] = req[after]["next"]
        req[after]["next"] = r
    else:
        q["next"] = one["wait_head"]
        one["wait_head"] = r
    if q["next"] < 0:
        one["wait_tail"] = r
    one["wait_req"] += 1
    one["wait_tok"] += q["prompt_tok"]


@njit(types.void(INST, REQS, I8_2, I8, I8))
def join(one, req, finish, i, r):
    """Add a request to the running batch; its KV is counted already."""
    q = req[r]
    q["state"] = RUNNING
    q["join_step"] = one["step"]
    slot = (one["step"] + q["output_tok"] - q["made_tok"]) & (finish.shape[1] - 1)
    first = finish[i, slot]
    q["next"] = first
    q["prev"] = -1
    if first >= 0:
        req[first]["prev"] = r
    finish[i, slot] = r
    q["older"] = one["last_admitted"]
    q["newer"] = -1
    if q["older"] >= 0:
        req[q["older"]]["newer"] = r
    one["last_admitted"] = r
    one["running_req"] += 1


@njit(types.void(INST, REQS, I8))
def _leave(one, req, r):
    """Take a request out of the running batch."""
    q = req[r]
    if q["newer"] >= 0:
        req[q["newer"]]["older"] = q["older"]
    else:
        one["last_admitted"] = q["older"]
    if q["older"] >= 0:
        req[q["older"]]["newer"] = q["newer"]
    one["running_req"] -= 1
    one["kv_tok"] -= q["context_tok"] + one["step"] - q["join_step"]


@njit(types.void(SIM, REQS, I8_1, I8, F8))
def complete(sim, req, done, r, now_s):
    """A request has its last token."""
    q = req[r]
    q["state"] = DONE
    q["done_s"] = now_s
    q["made_tok"] = q["output_tok"]
    done[sim["n_done"]] = r
    sim["n_done"] += 1
    if sim["judge_from_s"] <= q["arrival_s"] < sim["judge_until_s"]:
        sim["n_judged_left"] -= 1


@njit(I8(SIM, INST, REQS, I8_2, I8_1, I8, F8))
def finish_step(sim, one, req, finish, done, i, now_s):
    """Every running request got a token; complete those for which it was the last.

    Returns how many completed.
    """
    one["step"] += 1
    n = one["batch_req"]
    one["kv_tok"] += n
    one["decoded_tok"] += n
    one["emitted_tok"] += n
    one["decode_iterations"] += 1
    if one["first_token_decode"] != 0:
        r = one["last_admitted"]
        while r >= 0 and req[r]["join_step"] == one["step"] - 1:
            if req[r]["first_s"] < 0.0:
                req[r]["first_s"] = now_s
            r = req[r]["older"]
    slot = one["step"] & (finish.shape[1] - 1)
    r = finish[i, slot]
    finish[i, slot] = -1
    completed = 0
    while r >= 0:
        after = req[r]["next"]
        _leave(one, req, r)
        complete(sim, req, done, r, now_s)
        completed += 1
        r = after
    return completed


@njit(types.void(INST, REQS, I8_2, I8))
def _preempt_last(one, req, finish, i):
    """Send the latest admitted request back: its KV is dropped and recomputed later."""
    r = one["last_admitted"]
    q = req[r]
    slot = (q["join_step"] + q["output_tok"] - q["made_tok"]) & (finish.shape[1] - 1)
    if q["prev"] >= 0:
        req[q["prev"]]["next"] = q["next"]
    else:
        finish[i, slot] = q["next"]
    if q["next"] >= 0:
        req[q["next"]]["prev"] = q["prev"]
    _leave(one, req, r)
    q["made_tok"] += one["step"] - q["join_step"]
    q["todo_tok"] = q["prompt_tok"] + q["made_tok"]
    q["context_tok"] = 0
    q["preemptions"] += 1
    q["state"] = QUEUED
    # Behind those that hold KV for their prefill, before all others.
    held = -1
    after = one["prefill_head"]
    for _ in range(one["prefilling_req"]):
        held = after
        after = req[after]["next"]
    q["next"] = after
    if held >= 0:
        req[held]["next"] = r
    else:
        one["prefill_head"] = r
    if after < 0:
        one["prefill_tail"] = r
    one["prefill_req"] += 1
    one["prefill_late"] += 1 if q["deadline_s"] < NEVER else 0
    one["prefill_tok"] += q["todo_tok"]
    one["preemptions"] += 1


@njit(types.void(INST, REQS))
def _release_prefilling(one, req):
    """Give up all partly done prefills: their KV is needed by the running requests."""
    r = one["prefill_head"]
    for _ in range(one["prefilling_req"]):
        q = req[r]
        one["kv_tok"] -= q["context_tok"]
        whole_tok = q["context_tok"]
        one["prefill_tok"] += whole_tok - q["todo_tok"]
        q["todo_tok"] = whole_tok
        q["context_tok"] = 0
        r = q["next"]
    one["prefilling_req"] = 0


@njit(I8(SIM, INSTS, REQS, I8_2, I8_1, I8))
def form_batch(sim, inst, req, finish, starts, i):
    """Admit, make room, and choose the prompt chunks of the next iteration of instance i.

    Prefill instances whose KV is set free by an admission are appended to `starts`.
    Returns 1 if there is anything to do.
    """
    one = inst[i]
    # Those preempted here are older than those whose KV has arrived, and go first.
    while (
        one["wait_head"] >= 0
        and one["prefill_req"] == one["prefilling_req"]
        and one["running_req"] + one["prefilling_req"] < one["max_batch"]
    ):
        r = one["wait_head"]
        q = req[r]
        need_tok = q["prompt_tok"] + q["made_tok"]
        if not _fits(one, need_tok):
            break
        one["wait_head"] = q["next"]
        if q["next"] < 0:
            one["wait_tail"] = -1
        one["wait_req"] -= 1
        one["wait_late"] -= 1 if q["deadline_s"] < NEVER else 0
        one["wait_tok"] -= q["prompt_tok"]
        one["kv_tok"] += need_tok
        q["context_tok"] = need_tok
        source = inst[q["prefill_at"]]
        source["kv_tok"] -= q["prompt_tok"]
        # It has room for its queue again, or may sleep, or turn.
        may_sleep = source["sleeps"] != 0 and source["active"] == 0
        may_turn = source["role"] != source["want_role"]
        again = source["prefill_head"] >= 0 or may_sleep or may_turn
        if again and source["iterating"] == 0 and source["listed"] == 0:
            source["listed"] = 1
            starts[sim["n_start"]] = q["prefill_at"]
            sim["n_start"] += 1
        join(one, req, finish, i, r)
    while one["running_req"] > 1 and one["kv_tok"] + one["running_req"] > one["kv_capacity_tok"]:
        _preempt_last(one, req, finish, i)
    if one["running_req"] > 0 and one["kv_tok"] + one["running_req"] > one["kv_capacity_tok"]:
        _release_prefilling(one, req)
    # Who alternates lets running requests stand still while there are prompts to compute.
    stands = one["alternates"] != 0 and one["prefill_head"] >= 0
    one["batch_req"] = 0 if stands else one["running_req"]
    budget_tok = one["prefill_budget_tok"] - one["batch_req"]
    one["chunk_tok"] = 0
    one["chunk_tok2"] = 0.0
    one["chunk_req"] = 0
    one["begun_req"] = 0
    r = one["prefill_head"]
    while r >= 0 and budget_tok > 0 and one["chunk_req"] < one["max_prefill_req"]:
        q = req[r]
        if q["context_tok"] == 0:
            need_tok = q["prompt_tok"] + q["made_tok"]
            if one["running_req"] + one["prefilling_req"] >= one["max_batch"] or not _fits(
                one, need_tok
            ):
                break
            one["kv_tok"] += need_tok
            one["prefilling_req"] += 1
            one["begun_req"] += 1
            q["context_tok"] = need_tok
        chunk_tok = min(q["todo_tok"], budget_tok)
        start_tok = float(q["context_tok"] - q["todo_tok"])
        end_tok = start_tok + chunk_tok
        q["chunk_tok"] = chunk_tok
        one["chunk_tok"] += chunk_tok
        one["chunk_tok2"] += end_tok * end_tok - start_tok * start_tok
        one["chunk_req"] += 1
        budget_tok -= chunk_tok
        r = q["next"]
    if one["chunk_tok"] == 0:  # no prompt fits beside what runs
        one["batch_req"] = one["running_req"]
    return 1 if one["batch_req"] > 0 or one["chunk_tok"] > 0 else 0
