"""Record layouts shared by the plant, governors and routers. NumPy only.

Whole numbers are int64 and everything else float64, so that one compiled signature serves.
A field that names a request or an instance holds its index, or -1 for none.
"""

import numpy as np

F8, I8 = np.float64, np.int64

#: One row per ladder clock. Times in seconds, energies in joules, powers in watts, all for
#: the whole instance (summed over its GPUs).
PROFILE_DTYPE = np.dtype(
    [
        ("clock_mhz", F8),
        ("idle_w", F8),  # holding the model, running nothing
        # decode: T = host + max(floor, max(base + req * n, roof_base + roof * n + tok * E)
        # + kv * kv_tok) with n as padded; no clock scales what the host does meanwhile. Computing
        # goes in tiles of so many tokens, of prompts and requests together; from the second on
        # E slots of the last one are empty, and take what prompt tokens take
        ("decode_host_s", F8),
        ("decode_base_s", F8),
        ("decode_req_s", F8),
        ("decode_kv_s", F8),
        ("decode_floor_s", F8),
        ("decode_roof_s", F8),
        ("decode_roof_base_s", F8),
        ("decode_tile_tok", F8),  # 0: no tiles
        # decode: E = (T - host) * power + host * idle + iter + req * n + kv * kv_tok
        ("decode_power_w", F8),
        ("decode_iter_j", F8),
        ("decode_req_j", F8),
        ("decode_kv_j", F8),
        # prefill: T = base + tok * new_tok + tok2 * (end^2 - start^2), E = T * power; and before
        # each prompt the host works for req seconds, at idle power
        ("prefill_req_s", F8),
        ("prefill_base_s", F8),
        ("prefill_tok_s", F8),
        ("prefill_tok2_s", F8),
        ("prefill_power_w", F8),
        ("prefill_beside_w", F8),  # more in an iteration that decodes, too
    ],
    align=True,
)

INSTANCE_DTYPE = np.dtype(
    [
        # what it is
        ("type", I8),  # row of the coefficient tables
        ("n_clocks", I8),
        ("prefills", I8),
        ("decodes", I8),
        # prefills and decodes follow from the role, where it may change: 0 prefill, 1 decode
        ("role", I8),  # that it has, or is about to have
        ("want_role", I8),  # that it is to have once it is empty
        ("turn_s", F8),  # how long it then takes
        ("turning", I8),
        ("role_changes", I8),
        ("node", I8),
        ("kv_capacity_tok", I8),
        ("max_batch", I8),
        ("prefill_budget_tok", I8),
        ("max_prefill_req", I8),
        ("idle_w", F8),
        # the sleep that it was told to fall into next
        ("depth", I8),
        ("asleep_w", F8),
        ("wake_s", F8),
        ("wake_j", F8),
        ("enter_s", F8),
        ("transfer_latency_s", F8),
        ("transfer_tok_s", F8),
        ("transfer_tok_j", F8),
        ("first_token_decode", I8),
        ("alternates", I8),  # prefills and decodes in turn, never both in one iteration
        ("clock_stall_s", F8),  # a change of its clock keeps it from working for so long,
        ("clock_change_j", F8),  # and takes so much
        # what may happen to it
        ("alive", I8),
        ("slow_frac", F8),  # iteration times are multiplied by it
        ("clamp_k", I8),  # a lock above this clock is silently ignored
        ("power_cap_w", F8),
        # parked and empty it sleeps, where that makes a difference
        ("sleeps", I8),
        ("asleep", I8),
        ("wake_end_s", F8),  # waking, or falling asleep, until then; NEVER when it is neither
        ("slept_depth", I8),  # the sleep that it is in, or wakes from
        ("slept_w", F8),
        ("slept_wake_s", F8),
        ("slept_wake_j", F8),
        # what it was told
        ("governed", I8),  # 0: the loop writes the clock, 1: compiled, 2: a Python governor
        ("idle_call_s", F8),  # governor is asked again after this long without work
        ("floor_mhz", F8),
        ("ceiling_mhz", F8),
        ("route_frac", F8),
        ("active", I8),
        ("prefill_pace_frac", F8),  # what routers believe: time over what the profile says
        ("decode_pace_frac", F8),
        ("able_mhz", F8),  # and the highest clock that it gets
        # clock
        ("clock_k", I8),
        ("want_k", I8),
        ("call_k", I8),
        ("run_k", I8),  # clock that the running iteration gets: clamped, throttled
        ("call_start_s", F8),
        ("call_end_s", F8),
        ("pending", I8),  # sets that are settling
        ("stall_end_s", F8),  # it works again from then on
        # work
        ("iterating", I8),
        ("prepared", I8),
        ("listed", I8),  # on the list of instances to start
        ("iter_start_s", F8),
        ("iter_end_s", F8),
        ("iter_wall_s", F8),  # length of the whole iteration at the present clock
        ("iter_ask_k", I8),  # clock that had been asked for when it began
        ("iter_start_j", F8),  # energy of prefill and decode when it began
        ("jitter_frac", F8),
        ("batch_req", I8),
        ("chunk_tok", I8),
        ("chunk_tok2", F8),
        ("chunk_req", I8),
        ("begun_req", I8),  # of these, prompts that begin in this iteration
        ("step", I8),  # decode iterations so far
        ("running_req", I8),
        ("last_admitted", I8),
        ("kv_tok", I8),
        ("prefill_head", I8),
        ("prefill_tail", I8),
        ("prefill_req", I8),
        ("prefill_tok", I8),
        ("prefilling_req", I8),  # of these, how many hold KV
        ("prefill_late", I8),  # of these, how many may wait: they stand behind the others
        ("wait_head", I8),
        ("wait_tail", I8),
        ("wait_req", I8),
        ("wait_tok", I8),
        ("wait_late", I8),  # as above
        ("idle_since_s", F8),
        # energy and counts
        ("power_w", F8),
        ("rest_w", F8),  # without an iteration: idle, asleep, waking, dead
        ("decode_power_frac", F8),
        ("last_s", F8),
        ("prefill_j", F8),
        ("decode_j", F8),
        ("idle_j", F8),
        ("transfer_j", F8),
        ("busy_s", F8),
        ("busy_mhz_s", F8),
        ("active_s", F8),
        ("running_req_s", F8),
        ("decoded_tok", I8),
        ("emitted_tok", I8),
        ("prefilled_tok", I8),
        ("iterations", I8),
        ("decode_iterations", I8),
        ("clock_sets", I8),
        ("preemptions", I8),
        ("lost_tok", I8),  # output tokens that were made and went with a failure
        ("wakes", I8),
        ("arrived_req", I8),
        ("arrived_tok", I8),
        # ring of recent states, for routers that see an old one
        ("seen", I8),  # states that were noted for routers so far
        ("shown", I8),  # which of them routers see; below -1: none yet
    ],
    align=True,
)

REQUEST_DTYPE = np.dtype(
    [
        ("arrival_s", F8),
        ("deadline_s", F8),  # NEVER where a client waits for the answer
        ("sent_s", F8),  # when it was let in to be routed: at its arrival, unless it was held
        ("prompt_tok", I8),
        ("output_tok", I8),
        ("cached_tok", I8),
        ("request_class", I8),
        ("state", I8),
        ("prefill_at", I8),
        ("decode_at", I8),
        ("first_s", F8),
        ("done_s", F8),
        ("todo_tok", I8),  # prompt tokens still to be prefilled
        ("context_tok", I8),  # KV held when it joined the running batch
        ("made_tok", I8),  # output tokens made when it joined
        ("join_step", I8),
        ("chunk_tok", I8),
        ("next", I8),  # in a queue, or among those that finish at the same step
        ("prev", I8),
        ("older", I8),  # admitted before it, on the same instance
        ("newer", I8),
        ("preemptions", I8),
        ("retries", I8),  # how often it began anew
    ],
    align=True,
)

# REQUEST_DTYPE["state"]
FUTURE, ROUTING, QUEUED, HANDOFF, MOVING, WAITING, RUNNING, DONE, DROPPED, DEFERRED = range(10)

SIM_DTYPE = np.dtype(
    [
        ("now_s", F8),
        ("next_arrival", I8),
        ("n_arrivals", I8),  # requests that come by the clock: the first ones
        ("next_release", I8),  # closed loop: what the next answered client sends
        ("n_requests", I8),
        ("route_head", I8),
        ("route_tail", I8),
        ("held_head", I8),  # to be routed once somebody lives who can take it
        ("held_tail", I8),
        # requests that may wait, by deadline, and how they are let in: one every 1 / rate, and each
        # that is due so soon
        ("late_head", I8),
        ("late_tail", I8),
        ("admit_req_s", F8),
        ("admit_due_s", F8),
        ("admit_next_s", F8),
        ("apart", I8),  # prefill and decode are different instances
        ("n_start", I8),
        ("n_moving", I8),
        ("n_done", I8),
        ("n_logged", I8),
        ("rng", np.uint64),
        ("actuation_s", F8),
        ("settle_s", F8),
        ("jitter_sd_frac", F8),
        ("view_age_s", F8),
        ("decode_at_arrival", I8),
        ("hosted_prefill", I8),
        ("hosted_decode", I8),
        ("closed_loop", I8),
        ("judge_from_s", F8),
        ("judge_until_s", F8),
        ("n_judged", I8),
        ("n_judged_left", I8),
        ("stop_when_judged", I8),
        # a question to Python, and its answer
        ("ask", I8),
        ("ask_index", I8),
        ("answered", I8),
        ("answer_mhz", F8),
        ("answer_instance", I8),
    ],
    align=True,
)

# What advance() returns, and what sim["ask"] holds
REACHED, JUDGED, ASK_GOVERNOR, ASK_PREFILL, ASK_DECODE = range(5)

ITERATION_DTYPE = np.dtype(
    [
        ("instance", I8),
        ("t_s", F8),
        ("wall_s", F8),
        ("freq_mhz", F8),
        ("batch_req", I8),
        ("prefill_tok", I8),
        ("kv_tok", I8),
        ("energy_j", F8),
        ("asked_mhz", F8),
        ("prefill_tok2", F8),
    ],
    align=True,
)

SEEN_DTYPE = np.dtype(
    [
        ("t_s", F8),
        ("queue_tok", F8),
        ("queue_req", F8),
        ("running_req", F8),
        ("kv_tok", F8),
        ("freq_mhz", F8),
    ],
    align=True,
)

#: Settling sets and remembered states kept per instance.
PENDING, SEEN = 16, 16

#: Rows of the view that a compiled router gets, one column per instance.
(
    VIEW_QUEUE_TOK,
    VIEW_QUEUE_REQ,
    VIEW_RUNNING_REQ,
    VIEW_KV_TOK,
    VIEW_FREQ_MHZ,
    VIEW_ROUTE_FRAC,
    VIEW_ELIGIBLE,
    VIEW_TYPE,
    VIEW_KV_CAPACITY_TOK,
    VIEW_PREFILL_PACE_FRAC,
    VIEW_DECODE_PACE_FRAC,
    VIEW_ABLE_MHZ,
) = range(12)
N_VIEW = 12
