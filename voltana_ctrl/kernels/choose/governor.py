"""The fast layer: the clock that this iteration, or this queue, needs.

One kernel for every role. It remembers per instance the clock it asked for and what it saw
arrive, so that it needs nothing from the slower layers but a floor and a ceiling.
"""

import math
from typing import Any, NamedTuple

from numba import types

from voltana_ctrl.kernels.choose.base import F8, GOVERNOR_SIGNATURE, I8, ROWS
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, decode_s, prefill_s

#: params
(
    TTFT_S,  # time to first token to keep, margin taken off
    ITL_S,  # inter-token latency to keep, margin taken off
    DELAY_S,  # from asking for a clock until it runs
    DWELL_S,  # least time from a change of clock to the next lowering
    THRIFTY_K,  # row of least prefill energy per token while busy
    MISS_FRAC,  # part of the requests that may come late
    NOISE_FRAC,  # standard deviation of an iteration's time about what is expected
    MEMORY_S,  # time constant of the arrival estimate
    PREFILLS,  # 1 if prompts are prefilled here, 0 if they only wait for their KV
    REPAY_TOK,  # decoded tokens within which a request that fell behind catches up
    PREFILL_PACE_FRAC,  # time of what is prefilled over what the rows say
    DECODE_PACE_FRAC,  # the same of a decode iteration
    SHARE_MEMORY_S,  # time constant of the estimate of the share that prompts take
) = range(13)

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
    RECENT_S,  # time that the recent share of prompts rests on
    RECENT_TOK,  # prompt tokens in that time
    WATCHED_S,  # time that has been watched, nothing forgotten
) = range(13)

#: Below the thrifty clock room costs next to nothing, so only this part of the misses is allowed.
_NEARLY_NONE = 0.1
#: Times of the TTFT promise for which arrivals are watched before a clock rests on how they come.
_WATCHED = 8.0
#: Part of the TTFT target that is aimed at where nothing has been watched yet, and times of the
#: promise after which all of it is: how unlike prompts are is known later than how many come.
_FIRST_FRAC, _FAMILIAR = 0.4, 80.0
#: That time is enough where so many requests may be predicted late, which is one in a hundred with
#: `late_frac` of the tuning, and for stricter promises. Where more may be, a quantile so much less
#: rare is known from fewer.
_RARE_FRAC = 0.015
#: Iterations that what arrives at once must fill to be taken for one prompt with no doubt.
_SURELY_ONE = 4.0
#: ITL targets that a request may be behind before a clock above the thrifty one serves it, if the
#: clock that keeps pace lies below the thrifty one by this part of it. In proportion less where it
#: is nearer: there is then little else to catch up with.
_FAR_BEHIND, _ROOM_FRAC = 4.0, 0.25
#: Mean gaps without arrivals that chance does not explain: but for one in a thousand, as gaps
#: between clusters are exponential.
_PAUSE = 7.0


@njit(F8(F8, F8, F8))
def patience_s(itl_s, clock_mhz, thrifty_mhz):
    """How far behind a request may be before a clock above the thrifty one serves it.

    `clock_mhz` is what keeps pace without catching up.
    """
    room_frac = 1.0 - clock_mhz / thrifty_mhz
    return _FAR_BEHIND * itl_s * min(1.0, max(0.0, room_frac / _ROOM_FRAC))


@njit(F8(ROW, F8, F8, F8))
def batch_s(row, pace_frac, tok, typical_tok):
    """Time of a prefill iteration of `tok` prompt tokens in prompts of typical length."""
    return pace_frac * prefill_s(row, tok, tok * min(tok, typical_tok))


@njit(F8(F8, F8, F8, F8))
def squared_tok(waiting_tok, ahead_tok, long_tok, typical_tok):
    """Squared context that is left to attend to: the coefficient of the quadratic time.

    The last ``a`` tokens of a prompt of ``l`` attend to ``l^2 - (l - a)^2 = a (2 l - a)``.

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


@njit(F8(F8, F8, F8, F8))
def late_frac(slack_s, sd_s, over_s, skew_frac):
    """Bound on the part of requests that are late; it may exceed 1.

    Requests come evenly over `over_s`. The first of them has `slack_s` left, and one that comes a
    part ``u`` of the span later has ``slack + u over``. What all of them wait for varies by
    ``sd Z``, where ``Z`` has mean 0 and variance 1. The part that is late is

        ``int_0^1 P(sd Z > slack + u over) du <= (sd / over) L(slack / sd)``

    with the unit loss ``L(z) = E[max(0, Z - z)]``. For a normal ``Z`` it is
    ``phi(z) - z (1 - Phi(z))``. What comes in clusters is nearer to an exponential one less its
    mean, whose loss is ``exp(-1 - z)`` above ``z = -1`` and ``-z`` below; that has the weight
    `skew_frac`.
    """
    if not over_s > 0.0:
        return 0.0 if slack_s >= 0.0 else 1.0
    if sd_s <= 1e-6 * over_s:
        return max(0.0, -slack_s) / over_s
    z = slack_s / sd_s
    if z > 20.0:
        return 0.0
    normal = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    normal -= 0.5 * z * math.erfc(z / math.sqrt(2.0))
    skewed = math.exp(-1.0 - z) if z > -1.0 else -z
    return sd_s / over_s * (skew_frac * skewed + (1.0 - skew_frac) * normal)


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
        counted_s, squared_tok2 = span_s, 0.0
        if memory[SPAN_S] > 0.0:
            rate_tok_s = memory[ARRIVED_TOK] / memory[SPAN_S]
            spread_tok2_s = memory[SPREAD_TOK2] / memory[SPAN_S]
            squared_tok2 = (arrived_tok - span_s * rate_tok_s) ** 2
            pause_s = math.inf
            if arrived_tok > 0.0 and rate_tok_s > 0.0:
                # Clusters of ``spread / rate`` tokens come one after another, or as large a one as
                # this: so what comes after a long time always speaks for a lower rate.
                cluster_tok = max(spread_tok2_s / rate_tok_s, arrived_tok)
                pause_s = _PAUSE * cluster_tok / rate_tok_s
            if span_s > pause_s:
                # Nothing was sent here: that says little of what comes now, and nothing of how
                # evenly it comes.
                counted_s, squared_tok2 = pause_s, pause_s * spread_tok2_s
        keep = math.exp(-span_s / params[MEMORY_S])
        memory[SPAN_S] = keep * memory[SPAN_S] + counted_s
        memory[ARRIVED_TOK] = keep * memory[ARRIVED_TOK] + arrived_tok
        memory[SPREAD_TOK2] = keep * memory[SPREAD_TOK2] + squared_tok2
        memory[WATCHED_S] += span_s
        keep = math.exp(-span_s / params[SHARE_MEMORY_S])
        memory[RECENT_S] = keep * memory[RECENT_S] + span_s
        memory[RECENT_TOK] = keep * memory[RECENT_TOK] + arrived_tok
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


@njit(F8(types.Array(F8, 1, "C"), ROW, ROW, F8, F8, F8, F8, F8, F8))
def _next_late_frac(
    params, row, next_row, ttft_s, done_s, left_tok, rate_tok_s, spread_tok2_s, typical_tok
):  # fmt: skip
    """Part of those that arrive in this iteration that the next one, at `next_row`, serves late."""
    pace_frac = params[PREFILL_PACE_FRAC]
    arrived_tok = rate_tok_s * done_s
    sd_tok = math.sqrt(spread_tok2_s * done_s)
    mean_tok = left_tok + arrived_tok
    next_s = until_done_s(
        batch_s(row, pace_frac, mean_tok, typical_tok),
        batch_s(next_row, pace_frac, mean_tok, typical_tok),
        params[DELAY_S],
    )
    more_s = until_done_s(
        batch_s(row, pace_frac, mean_tok + sd_tok, typical_tok),
        batch_s(next_row, pace_frac, mean_tok + sd_tok, typical_tok),
        params[DELAY_S],
    )
    noise_s = params[NOISE_FRAC] * (done_s + next_s)
    sd_s = math.sqrt((more_s - next_s) * (more_s - next_s) + noise_s * noise_s)
    # Less than one cluster is expected where the spread is larger than the mean. With more of them
    # their sum becomes normal: the weight falls with the square of their number.
    skew_frac = 1.0
    if arrived_tok > sd_tok:
        skew_frac = (sd_tok / arrived_tok) ** 4
    return late_frac(ttft_s - done_s - next_s, sd_s, done_s, skew_frac)


class Waiting(NamedTuple):
    """What waits to be prefilled, and what arrives.

    A squared length is the coefficient of the quadratic time of attention, see
    :func:`squared_tok`.
    """

    oldest_s: Any  # how long the oldest prompt has waited
    batch_tok: Any  # in this iteration
    batch_tok2: Any
    head_tok: Any  # until the oldest prompt is done
    head_tok2: Any
    left_tok: Any  # behind this iteration
    left_tok2: Any
    after_tok: Any  # behind the oldest prompt
    typical_tok: Any  # length of a prompt as arriving tokens meet it
    rate_tok_s: Any  # arrivals
    spread_tok2_s: Any  # their variance, per second


F8_1 = types.Array(F8, 1, "C")
WAITING = types.NamedUniTuple(F8, 11, Waiting)


@njit(WAITING(F8_1, F8, F8, F8))
def _what_waits(memory, waiting_tok, batch_tok, oldest_s):
    """Sort what waits into this iteration, the rest of the oldest prompt, and all behind it."""
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
    after_tok2 = squared_tok(waiting_tok - head_tok, ahead_tok - head_tok, long_tok, typical_tok)
    return Waiting(
        oldest_s, batch_tok, waiting_tok2 - left_tok2, head_tok, waiting_tok2 - after_tok2,
        waiting_tok - batch_tok, left_tok2, waiting_tok - head_tok, typical_tok, rate_tok_s,
        spread_tok2_s,
    )  # fmt: skip


@njit(types.boolean(F8_1, F8_1, ROW, WAITING))
def _doomed(params, memory, top_row, waiting):
    """Whether the oldest prompt is one that no clock serves in time any more.

    It is then served at least energy per token, unless what arrives behind it needs more. Fewer
    parts than are asked for here may be a burst of short prompts, some of them in time.
    """
    long_tok, ahead_tok = memory[LONG_TOK], memory[AHEAD_TOK] + waiting.batch_tok
    if not 0.0 < ahead_tok <= long_tok or long_tok <= _SURELY_ONE * waiting.batch_tok:
        return False
    rest_s = prefill_s(top_row, waiting.head_tok, waiting.head_tok2)
    return waiting.oldest_s + params[PREFILL_PACE_FRAC] * rest_s > params[TTFT_S]


@njit(types.boolean(ROWS, F8_1, WAITING, F8, I8, I8, I8, F8, types.boolean))
def _in_time(rows, params, waiting, ttft_s, k, thrifty, top, step_s, doomed):
    """Whether prefill at clock `k` is late no more often than the promise allows.

    Three kinds of requests are asked about: the oldest that waits and what waits behind it; what
    arrives during this iteration and is served in the next, at the highest clock; and, up to
    the thrifty clock, what arrives until the oldest prompt is done, served at the thrifty clock.
    """
    row = rows[k]
    pace_frac, noise_frac = params[PREFILL_PACE_FRAC], params[NOISE_FRAC]
    miss_frac = params[MISS_FRAC]
    # Taken to run at this clock at once. Where the delay is longer than the iteration no clock
    # changes it, and to ask for the highest would be late for this work and too much for the next.
    # That the answer is late counts where what arrives meanwhile is to be served.
    done_s = step_s + pace_frac * prefill_s(row, waiting.batch_tok, waiting.batch_tok2)
    head_s = step_s + pace_frac * prefill_s(row, waiting.head_tok, waiting.head_tok2)
    if not doomed:
        # As if what waits had come evenly over the time that it takes to serve.
        left_s = ttft_s - waiting.oldest_s
        if late_frac(left_s - head_s, noise_frac * head_s, head_s, 0.0) > miss_frac:
            return False
        if waiting.left_tok > 0.0:
            # What is behind this iteration may have waited as long.
            all_s = done_s + pace_frac * prefill_s(
                rows[max(k, thrifty)], waiting.left_tok, waiting.left_tok2
            )
            if late_frac(left_s - all_s, noise_frac * all_s, all_s, 0.0) > miss_frac:
                return False
    late = _next_late_frac(
        params, row, rows[top], ttft_s, done_s, waiting.left_tok, waiting.rate_tok_s,
        waiting.spread_tok2_s, waiting.typical_tok,
    )  # fmt: skip
    if late > miss_frac:
        return False
    if k >= thrifty:
        return True
    # Nearly free, so it is kept for all that arrives until the head is done.
    late = _next_late_frac(
        params, row, rows[thrifty], ttft_s, head_s, waiting.after_tok, waiting.rate_tok_s,
        waiting.spread_tok2_s, waiting.typical_tok,
    )  # fmt: skip
    return late <= _NEARLY_NONE * miss_frac


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
    """Lowest clock [MHz] at which this iteration keeps the targets; updates `memory`.

    It is at least the floor and at most the ceiling, and the ceiling if no clock is enough. The
    arguments are those of :data:`~voltana_ctrl.kernels.choose.base.GOVERNOR_SIGNATURE`.

    Decode: the iteration, and the part of earlier lateness that it is to make up for, take no
    longer than the ITL target less the share of the time that prompts take on a colocated
    instance. Above the thrifty clock only lateness of more than four targets counts, or less where
    what keeps pace is near it.

    Prefill (:func:`_in_time`): the oldest prompt is done within the TTFT target, and so is what
    waits behind it, served at this clock or the thrifty one, whichever is higher. So are prompts
    that arrive while this iteration runs, served in the next one at the ceiling, once the delay
    until a clock runs is over, but for the part that the promise allows (:func:`late_frac`).
    A clock below the thrifty one saves next to nothing, so it must pass a stricter test: of what
    arrives until the oldest prompt is done, a tenth of that part may be late at the thrifty clock.

    Of the TTFT target two fifths are aimed at first, and all of it once arrivals have been watched
    for long: until then few prompts have told how unlike they are. Where more may be late it is
    sooner.

    Of both, this iteration is taken to run at its clock at once.

    A long prompt that no clock serves in time any more asks for the thrifty clock only. A clock
    that was raised stays for the dwell time.
    """
    _watch(params, memory, t_s, running_req, waiting_tok, batch_tok)
    behind_s = max(0.0, memory[BEHIND_S]) / params[REPAY_TOK]
    recent_tok_s = 0.0
    if memory[RECENT_S] > 0.0:
        recent_tok_s = memory[RECENT_TOK] / memory[RECENT_S]
    top = len(rows) - 1
    while top > 0 and rows[top]["clock_mhz"] > ceiling_mhz:
        top -= 1
    k = 0
    while k < top and rows[k]["clock_mhz"] < floor_mhz:
        k += 1
    asked = int(memory[ASKED_K]) - 1
    thrifty = min(int(params[THRIFTY_K]), top)
    size_req = float(padded[int(running_req)])
    far_s = -1.0
    waiting = _what_waits(memory, waiting_tok, batch_tok, oldest_wait_s)
    doomed = _doomed(params, memory, rows[top], waiting)
    works = batch_tok > 0.0 or (params[PREFILLS] > 0.0 and running_req > 0.0)
    watched = memory[WATCHED_S] / params[TTFT_S]
    ttft_s = params[TTFT_S]
    if not doomed:
        common = max(1.0, params[MISS_FRAC] / _RARE_FRAC)
        familiar = _WATCHED + (_FAMILIAR - _WATCHED) / common
        ttft_s *= min(1.0, _FIRST_FRAC + (1.0 - _FIRST_FRAC) * watched / familiar)
    if doomed or (works and watched < _WATCHED):
        # Of what arrives too little is known yet, and room for a burst is nearly free. So it is
        # between prompts, where both run: from a clock that goes to and fro no pace is learnt.
        k = max(k, thrifty)
    while k < top:
        row = rows[k]
        enough = True
        step_s = 0.0
        if running_req > 0.0:
            step_s = params[DECODE_PACE_FRAC] * decode_s(row, size_req, kv_tok)
            # Prompts of a colocated instance take their share of the time between tokens. A load
            # that rises is followed within seconds: what is late by then is short answers.
            prompts_frac = recent_tok_s * params[PREFILL_PACE_FRAC] * row["prefill_tok_s"]
            own_frac = 1.0 - params[PREFILLS] * prompts_frac
            enough = step_s <= params[ITL_S] * own_frac
            if enough and far_s < 0.0:
                near_s = patience_s(params[ITL_S], row["clock_mhz"], rows[thrifty]["clock_mhz"])
                far_s = max(0.0, memory[BEHIND_S] - near_s) / params[REPAY_TOK]
            # Above the thrifty clock the voltage rises, and catching up is dear.
            late_s = behind_s if k < thrifty else far_s
            enough = enough and step_s + late_s <= params[ITL_S] * own_frac
        if enough and batch_tok > 0.0:
            enough = _in_time(rows, params, waiting, ttft_s, k, thrifty, top, step_s, doomed)
        if enough:
            break
        k += 1
    if k < asked <= top and t_s - memory[CHANGED_S] < params[DWELL_S]:
        k = asked
    if k != asked:
        memory[CHANGED_S] = t_s
    memory[ASKED_K] = k + 1.0
    return rows[k]["clock_mhz"]
