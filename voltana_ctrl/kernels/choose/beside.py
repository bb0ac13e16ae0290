"""Iterations of a colocated instance: prompts come by chance, and who falls behind catches up."""

import math
from typing import Any, NamedTuple

from numba import types

from voltana_ctrl.kernels.choose.governor import patience_s
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, batch_j, decode_s

F8, I8 = types.float64, types.int64
TABLE = types.Array(F8, 1, "C")
ROWS = types.Array(ROW, 1, "C", readonly=True)

#: Exponent from which on hardly anybody falls so far behind that a governor makes up for it.
_SURE = 30.0
#: Part of the time from which on a clock counts.
_SELDOM = 1e-4
#: A walk that goes in steps is less far from where it is reflected than one that diffuses, by this
#: part of the deviation of a step (Siegmund 1979).
_STEP = 0.5826
#: Slack of an iteration over the deviation that prompts give it, at which the table of late
#: answers begins and ends.
LEAST_SLACK, MOST_SLACK = -1.0, 4.0


class Beside(NamedTuple):
    """What a colocated instance has besides a decode station; no rows if it is none."""

    prompt_s: Any  # per row, time of a prompt
    prompt_s2: Any  # per row, mean square of it
    prompt_w: Any  # per row, power of prompts
    late_frac: Any  # share of answers that are late, by slack
    aim_s: Any  # iteration time that the governor aims at
    itl_s: Any  # iteration time that was promised
    repay_tok: Any  # tokens within which who fell behind catches up
    thrifty_k: Any  # row above which only who is far behind does


BESIDE = types.NamedTuple([TABLE] * 4 + [F8, F8, F8, I8], Beside)


@njit(types.Tuple((I8, F8, F8))(ROWS, I8, F8, F8, F8, F8, BESIDE, F8))
def at_row(rows, k, size_req, kv_tok, batch_req, within_s, prompts, arrival_req_s):
    """Row, time of its iterations with prompts, and power.

    The row is the lowest from `k` on that decodes within this time, or the top.
    """
    own_s = decode_s(rows[k], size_req, kv_tok)
    while k < len(rows) - 1 and own_s > within_s:
        k += 1
        own_s = decode_s(rows[k], size_req, kv_tok)
    row = rows[k]
    used = min(0.999, arrival_req_s * prompts.prompt_s[k])
    power_w = row["decode_power_w"] + batch_j(row, batch_req, kv_tok) / own_s
    return k, own_s / (1.0 - used), (1.0 - used) * power_w + used * prompts.prompt_w[k]


@njit(F8(F8, F8))
def _fallen(length_s, fall):
    """``int_0^length exp(-fall x) dx``."""
    if fall * length_s < 1e-9:
        return length_s
    return (1.0 - math.exp(-fall * length_s)) / fall


@njit(types.Tuple((I8, I8, F8, F8, F8))(ROWS, F8, F8, F8, BESIDE, F8, I8, I8))
def beside(rows, size_req, kv_tok, batch_req, prompts, arrival_req_s, from_k, usual_k):
    """Iterations of one batch: two rows, mean time [s] and power [W], and late answers.

    The first row is the lowest from `from_k` on that keeps pace: its iterations, prompts included,
    are within the time that is aimed at. The second is the mean row. The time is 0 where prompts
    alone take all of it.

    Prompts come by chance between tokens: in an iteration of the time ``T`` they take ``u T`` in
    the mean, with the variance ``v = lam T E[p^2]``. How far the request worst off is behind,
    ``x``, is Lindley's walk. It falls by ``g(x)`` a step, and its density is

        ``p(x) = exp(-2 / v int_0^x g) / Z``.

    Up to ``x = r s`` the slack ``s`` of the row that keeps pace is enough. From there on the
    governor makes up for ``x / r``, with ``r`` the tokens to catch up within times ``1 - u``. At
    the thrifty row, where the slack is ``h``, it stops until ``x`` is larger by its patience ``z``,
    and beyond makes up for ``(x - z) / r``. Each of these four parts has a normal or an exponential
    integral; time and power are means over them. From the thrifty row on nobody waits, and the
    second and third are empty. The first is longer by 0.58 deviations of a step: a walk in steps is
    reflected by so much less than one that diffuses.

    A row that is raised is taken to leave prompts as much time as the one that keeps pace,
    although they take less there. That makes iterations up to a tenth too short, and power about
    right, since clocks vary for other reasons, too. Answers are judged by what the governor lets
    iterations take.
    """
    top = len(rows) - 1
    k = from_k
    own_s = decode_s(rows[k], size_req, kv_tok)
    used = arrival_req_s * prompts.prompt_s[k]
    while k < top and (used >= 1.0 or own_s > prompts.aim_s * (1.0 - used)):
        k += 1
        own_s = decode_s(rows[k], size_req, kv_tok)
        used = arrival_req_s * prompts.prompt_s[k]
    if used >= 1.0:
        return k, k, 0.0, 0.0, 1.0
    _, time_s, power_w = at_row(
        rows, k, size_req, kv_tok, batch_req, math.inf, prompts, arrival_req_s
    )
    slack_s = prompts.aim_s - time_s
    # Prompts take as long as at the usual clock of a batch of about this size.
    variance_s2 = arrival_req_s * time_s * prompts.prompt_s2[max(k, usual_k)]
    mean_k, longest_s = k, time_s
    if math.isinf(slack_s) or variance_s2 <= 0.0:
        return k, mean_k, time_s, power_w, 0.0
    repay = prompts.repay_tok * (1.0 - used)
    if k < top and slack_s >= 0.0 and 2.0 * slack_s * slack_s * repay < _SURE * variance_s2:
        patience = patience_s(
            prompts.aim_s, rows[k]["clock_mhz"], rows[prompts.thrifty_k]["clock_mhz"]
        )
        width_s = math.sqrt(variance_s2 * repay)
        half_s = 0.5 * math.sqrt(math.pi) * width_s
        until_s = repay * slack_s + _STEP * math.sqrt(variance_s2)
        catching, caught_s, held, most_s = 0.0, 0.0, 0.0, slack_s
        fall = 2.0 * slack_s / variance_s2
        steady, left = _fallen(until_s, fall), math.exp(-fall * until_s)
        if k < prompts.thrifty_k:
            thrifty_s = decode_s(rows[prompts.thrifty_k], size_req, kv_tok)
            thrifty_s /= 1.0 - arrival_req_s * prompts.prompt_s[prompts.thrifty_k]
            most_s = max(slack_s, prompts.aim_s - thrifty_s)
            begin, end = repay * slack_s / width_s, repay * most_s / width_s
            norm = left * math.exp(begin * begin)
            catching = norm * half_s * (math.erf(end) - math.erf(begin))
            if catching > 0.0:
                fell = math.exp(-begin * begin) - math.exp(-end * end)
                caught_s = norm * 0.5 * variance_s2 * fell / catching
            fall = 2.0 * most_s / variance_s2
            left = norm * math.exp(-end * end)
            held = left * _fallen(patience, fall)
            left *= math.exp(-fall * patience)
        begin = repay * most_s / width_s
        # The scaled complement of the error function; beyond 5 its first term.
        tail = 0.5 * variance_s2 / most_s if begin > 5.0 else (
            half_s * math.exp(begin * begin) * math.erfc(begin)
        )  # fmt: skip
        far_s = 0.5 * variance_s2 / tail
        whole = steady
        spent_s, spent_j, rows_run = steady * time_s, steady * time_s * power_w, steady * k
        may_s = spent_s
        parts = ((catching, caught_s), (held, most_s), (left * tail, far_s))
        for part, made_s in parts:
            if part > _SELDOM * steady:
                each_k, each_s, each_w = at_row(
                    rows, k, size_req, kv_tok, batch_req,
                    (1.0 - used) * max(0.0, prompts.aim_s - made_s), prompts, arrival_req_s,
                )  # fmt: skip
                whole += part
                spent_s += part * each_s
                spent_j += part * each_s * each_w
                rows_run += part * each_k
                may_s += part * max(each_s, prompts.aim_s - made_s)
        time_s = spent_s / whole
        power_w = spent_j / spent_s
        mean_k = int(rows_run / whole + 0.5)
        longest_s = may_s / whole
    late = 0.0
    n_late = len(prompts.late_frac)
    if n_late > 0:
        slack = (prompts.itl_s - longest_s) / math.sqrt(variance_s2)
        at = (slack - LEAST_SLACK) / (MOST_SLACK - LEAST_SLACK) * (n_late - 1)
        late = prompts.late_frac[min(n_late - 1, max(0, int(at + 0.5)))]
    return k, mean_k, time_s, power_w, late
