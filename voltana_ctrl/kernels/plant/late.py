"""Requests that may wait: kept by deadline before they are routed, and let in as was decided.

One is let in every ``1 / admit_req_s`` seconds, the one with the earliest deadline first, and each
at the latest when its deadline is `admit_due_s` away. The queues of the engines then let those
pass that may not wait, see batching.py.
"""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.layout import DEFERRED, ROUTING
from voltana_ctrl.kernels.plant.actuation import F8, I8, NEVER, SIM
from voltana_ctrl.kernels.plant.batching import REQS
from voltana_ctrl.kernels.plant.events import SIMS, push_route


@njit(types.void(SIM, REQS, I8))
def keep_late(sim, req, r):
    """Keep a request, behind those whose deadline is no later."""
    q = req[r]
    q["state"] = DEFERRED
    before = sim["late_tail"]
    after = -1
    while before >= 0 and req[before]["deadline_s"] > q["deadline_s"]:
        after = before
        before = req[before]["prev"]
    q["prev"] = before
    q["next"] = after
    if before >= 0:
        req[before]["next"] = r
    else:
        sim["late_head"] = r
    if after >= 0:
        req[after]["prev"] = r
    else:
        sim["late_tail"] = r


@njit(F8(SIM, REQS))
def next_let_in_s(sim, req):
    """When the first of those kept is let in, at the earliest now."""
    due_s = req[sim["late_head"]]["deadline_s"] - sim["admit_due_s"]
    paced_s = sim["admit_next_s"] if sim["admit_req_s"] > 0.0 else NEVER
    return max(sim["now_s"], min(due_s, paced_s))


@njit(types.void(SIM, REQS))
def let_in(sim, req):
    """Let the first of those kept in, to be routed."""
    r = sim["late_head"]
    q = req[r]
    sim["late_head"] = q["next"]
    if q["next"] >= 0:
        req[q["next"]]["prev"] = -1
    else:
        sim["late_tail"] = -1
    if 0.0 < sim["admit_req_s"] < NEVER:
        sim["admit_next_s"] = max(sim["now_s"], sim["admit_next_s"]) + 1.0 / sim["admit_req_s"]
    q["prev"] = -1
    q["state"] = ROUTING
    q["sent_s"] = sim["now_s"]
    push_route(sim, req, r)


@njit(types.void(SIMS, F8, F8))
def order_admission(sims, rate_req_s, due_s):
    """From now on let in at this rate; what was left of the wait for the next one is kept.

    The wait shrinks or grows with the interval: ``left = left before * rate before / rate``.
    """
    sim = sims[0]
    left_s = max(0.0, sim["admit_next_s"] - sim["now_s"])
    if 0.0 < sim["admit_req_s"] < NEVER and 0.0 < rate_req_s < NEVER:
        left_s *= sim["admit_req_s"] / rate_req_s
    elif rate_req_s >= NEVER:
        left_s = 0.0
    elif rate_req_s > 0.0:
        left_s = min(left_s, 1.0 / rate_req_s)
    sim["admit_next_s"] = sim["now_s"] + left_s
    sim["admit_req_s"] = rate_req_s
    sim["admit_due_s"] = due_s
