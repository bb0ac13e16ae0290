"""The fast layer: the clock that this iteration, or this queue, needs.

One kernel for every role. It remembers per instance the clock it asked for and what it saw
arrive, so that it needs nothing from the slower layers but a floor and a ceiling.
"""

import math

from numba import types

from voltana_ctrl.kernels.choose.base import F8, GOVERNOR_SIGNATURE
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, decode_s, prefill_s

#: params
(
    TTFT_S,  # time to first token to keep, margin taken off
    ITL_S,  # inter-token latency to keep, margin taken off
    DELAY_S,  # from asking for a clock until it runs
    DWELL_S,  # least time from a change of clock to the next lowering
    THRIFTY_K,  # row of least prefill energy per token while busy
    RESERVE_SD,  # standard deviations of arrivals that the thrifty clock must still absorb
    URGENT_SD,  # standard deviations of arrivals that the ceiling must still absorb
    MEMORY_S,  # time constant of the arrival estimate
    PREFILLS,  # 1 if prompts are prefilled here, 0 if they only wait for their KV
    REPAY_TOK,  # decoded tokens within which a request that fell behind catches up
    PREFILL_PACE_FRAC,  # time of what is prefilled over what the rows say
    DECODE_PACE_FRAC,  # the same of a decode iteration
) = range(12)

#: memory
(
    ASKED_K,  # row asked for, plus one; 0: nothing yet
    CHANGED_S,
    CALLED_S,
    LEFT_TOK,  # prompt tokens that the last iteration left waiting
    SPAN_S,  # time that the estimate rests on, forgetting included
    ARRIVED_TOK,  # prompt tokens in that time
    SPREAD_TOK2,  # squared surprise in that time
    BEHIND_S,  # how far the request worst off is behind its latency target
    LONG_TOK,  # prompt that takes more than one iteration; 0: none waits
    AHEAD_TOK,  # tokens to prefill until it is done
) = range(10)

#: Iterations that what arrives at once must fill to be taken for one prompt with no doubt.
_SURELY_ONE = 4.0


@njit(F8(ROW, F8, F8, F8))
def batch_s(row, pace_frac, tok, typical_tok):
    """Time of a prefill iteration of `tok` prompt tokens in prompts of typical length."""
    return pace_frac * prefill_s(row, tok, tok * min(tok, typical_tok))


@njit(F8(F8, F8, F8, F8))
def squared_tok(waiting_tok, ahead_tok, long_tok, typical_tok):
    """Squared context that is left to attend to: the coefficient of the quadratic time.

    Of the prompts that wait, the first `ahead_tok` tokens end with one of `long_tok`, whose
    last tokens cost most; the others have typical length.
    """
    ahead_tok = min(ahead_tok, waiting_tok)
    total_tok2 = 0.0
    if ahead_tok > 0.0:
        own_tok = min(ahead_tok, long_tok)
        total_tok2 = own_tok * (2.0 * long_tok - own_tok)
    for tok in (max(0.0, ahead_tok - long_tok), waiting_tok - max(0.0, ahead_tok)):
        total_tok2 += tok * min(tok, typical_tok)
    return total_tok2


@njit(F8(F8, F8, F8))
def until_done_s(present_s, asked_s, delay_s):
    """Time of work that takes `present_s` at the present clock, `asked_s` at the one asked for."""
    if present_s <= delay_s:
        return present_s
    return delay_s + (1.0 - delay_s / present_s) * asked_s


@njit(types.void(types.Array(F8, 1, "C"), types.Array(F8, 1, "C"), F8, F8, F8, F8))
def _watch(params, memory, t_s, running_req, waiting_tok, batch_tok):
    """Update the arrival estimate: rate, and its index of dispersion."""
    span_s = t_s - memory[CALLED_S]
    arrived_tok = max(0.0, waiting_tok - memory[LEFT_TOK])
    if memory[AHEAD_TOK] <= 0.0:
        memory[LONG_TOK] = 0.0
    if arrived_tok > max(batch_tok, memory[LONG_TOK]):
        # One prompt, as far as can be seen.
        memory[LONG_TOK] = arrived_tok
        memory[AHEAD_TOK] = waiting_tok
    if memory[ASKED_K] > 0.0 and span_s > 0.0:
        expected_tok = arrived_tok
        if memory[SPAN_S] > 0.0:
            expected_tok = span_s * memory[ARRIVED_TOK] / memory[SPAN_S]
        keep = math.exp(-span_s / params[MEMORY_S])
        surprise_tok = arrived_tok - expected_tok
        memory[SPAN_S] = keep * memory[SPAN_S] + span_s
        memory[ARRIVED_TOK] = keep * memory[ARRIVED_TOK] + arrived_tok
        memory[SPREAD_TOK2] = keep * memory[SPREAD_TOK2] + surprise_tok * surprise_tok
        if memory[BEHIND_S] >= 0.0:
            # Of all that run, the one that began at the worst moment: Lindley's recursion.
            memory[BEHIND_S] = max(0.0, memory[BEHIND_S] + span_s - params[ITL_S])
    # Tells the next call that this iteration decodes.
    if params[PREFILLS] == 0.0 or running_req == 0.0:
        memory[BEHIND_S] = -1.0
    elif memory[BEHIND_S] < 0.0:
        memory[BEHIND_S] = 0.0
    memory[CALLED_S] = t_s
    memory[LEFT_TOK] = waiting_tok - batch_tok
    memory[AHEAD_TOK] -= batch_tok


@njit([GOVERNOR_SIGNATURE])
def needed_clock(
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
    """Lowest clock between floor and ceiling at which this iteration keeps the targets.

    Decode: the iteration is within the ITL target. Prefill: the oldest prompt is done within
    the TTFT target, and so is all that waits behind it; and so is a prompt that arrives the
    moment this iteration starts, served in the next one at the ceiling together with what is
    expected to arrive by then. Up to the thrifty clock the same must hold of the thrifty clock
    and of a burst: below it a clock saves next to nothing per token, above it every token costs
    more. Actuation delay counts.
    """
    _watch(params, memory, t_s, running_req, waiting_tok, batch_tok)
    behind_s = max(0.0, memory[BEHIND_S]) / params[REPAY_TOK]
    top = len(rows) - 1
    while top > 0 and rows[top]["clock_mhz"] > ceiling_mhz:
        top -= 1
    k = 0
    while k < top and rows[k]["clock_mhz"] < floor_mhz:
        k += 1
    asked = int(memory[ASKED_K]) - 1
    present = rows[asked if asked >= 0 else len(rows) - 1]
    rate_tok_s = 0.0
    spread_tok2_s = 0.0
    typical_tok = batch_tok
    if memory[SPAN_S] > 0.0:
        rate_tok_s = memory[ARRIVED_TOK] / memory[SPAN_S]
        spread_tok2_s = memory[SPREAD_TOK2] / memory[SPAN_S]
        if rate_tok_s > 0.0:
            # Of a compound Poisson stream this is E[l^2] / E[l].
            typical_tok = spread_tok2_s / rate_tok_s
    # Of a prompt longer than an iteration only a part is in this one, and the last parts take
    # longest.
    long_tok, ahead_tok = memory[LONG_TOK], memory[AHEAD_TOK] + batch_tok
    left_tok2 = squared_tok(waiting_tok - batch_tok, ahead_tok - batch_tok, long_tok, typical_tok)
    waiting_tok2 = squared_tok(waiting_tok, ahead_tok, long_tok, typical_tok)
    head_tok = min(waiting_tok, max(batch_tok, typical_tok))
    if ahead_tok <= long_tok:
        head_tok = min(waiting_tok, max(head_tok, ahead_tok))
    head_tok2 = waiting_tok2
    head_tok2 -= squared_tok(waiting_tok - head_tok, ahead_tok - head_tok, long_tok, typical_tok)
    batch_tok2 = waiting_tok2 - left_tok2
    thrifty = min(int(params[THRIFTY_K]), top)
    size_req = float(padded[int(running_req)])
    # One that no clock serves in time any more is served at least energy per token, unless what
    # arrives behind it needs more. Fewer parts may be a burst of short prompts, some in time.
    doomed = False
    if 0.0 < ahead_tok <= long_tok and long_tok > _SURELY_ONE * batch_tok:
        rest_s = params[PREFILL_PACE_FRAC] * prefill_s(rows[top], head_tok, head_tok2)
        doomed = oldest_wait_s + rest_s > params[TTFT_S]
    if doomed:
        k = max(k, thrifty)
    delay_s = params[DELAY_S]
    pace_frac = params[PREFILL_PACE_FRAC]
    while k < top:
        row = rows[k]
        enough = True
        step_s = 0.0
        if running_req > 0.0:
            step_s = params[DECODE_PACE_FRAC] * decode_s(row, size_req, kv_tok)
            # Prompts of a colocated instance take their share of the time between tokens.
            own_frac = 1.0 - params[PREFILLS] * rate_tok_s * pace_frac * row["prefill_tok_s"]
            enough = step_s + behind_s <= params[ITL_S] * own_frac
        if enough and batch_tok > 0.0:
            done_s = step_s + until_done_s(
                pace_frac * prefill_s(present, batch_tok, batch_tok2),
                pace_frac * prefill_s(row, batch_tok, batch_tok2),
                delay_s,
            )
            head_s = step_s + until_done_s(
                pace_frac * prefill_s(present, head_tok, head_tok2),
                pace_frac * prefill_s(row, head_tok, head_tok2),
                delay_s,
            )
            enough = doomed or oldest_wait_s + head_s <= params[TTFT_S]
            if enough and not doomed and waiting_tok > batch_tok:
                # What is behind this iteration may have waited as long.
                left_s = pace_frac * prefill_s(
                    rows[max(k, thrifty)], waiting_tok - batch_tok, left_tok2
                )
                enough = oldest_wait_s + done_s + left_s <= params[TTFT_S]
            mean_tok = waiting_tok - batch_tok + rate_tok_s * done_s
            sd_tok = math.sqrt(spread_tok2_s * done_s)
            if enough:
                tok = mean_tok + params[URGENT_SD] * sd_tok
                next_s = until_done_s(
                    batch_s(row, pace_frac, tok, typical_tok),
                    batch_s(rows[top], pace_frac, tok, typical_tok),
                    delay_s,
                )
                enough = done_s + next_s <= params[TTFT_S]
            if enough and k < thrifty:
                # Nearly free, so it is kept for all that arrives until the head is done.
                tok = waiting_tok - head_tok + rate_tok_s * head_s
                tok += params[RESERVE_SD] * math.sqrt(spread_tok2_s * head_s)
                next_s = until_done_s(
                    batch_s(row, pace_frac, tok, typical_tok),
                    batch_s(rows[thrifty], pace_frac, tok, typical_tok),
                    delay_s,
                )
                enough = head_s + next_s <= params[TTFT_S]
        if enough:
            break
        k += 1
    if k < asked <= top and t_s - memory[CHANGED_S] < params[DWELL_S]:
        k = asked
    if k != asked:
        memory[CHANGED_S] = t_s
    memory[ASKED_K] = k + 1.0
    return rows[k]["clock_mhz"]
