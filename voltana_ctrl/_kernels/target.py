"""Kernels of the target layer: a governed decode station, and the min-plus convolution."""

import math

from numba import njit, types

F8, I8 = types.float64, types.int64

F8_1 = types.Array(F8, 1, "C", readonly=True)
F8_2 = types.Array(F8, 2, "C", readonly=True)
I8_1 = types.Array(I8, 1, "C", readonly=True)
OUT_F8_1, OUT_I8_1 = types.Array(F8, 1, "C"), types.Array(I8, 1, "C")

#: Weights are scaled down when they pass this, so that no batch overflows.
_LARGE = 1e250


@njit(types.UniTuple(F8, 3)(F8_2, F8_2, I8_1, F8_1, F8_1, F8, F8, I8, F8, I8, F8), cache=True)
def station(
    step_s, power_w, needed_k, prompt_s, prompt_w, arrival_req_s, decoded_tok, batch_limit_req,
    limit_s, floor_k, idle_w,
):  # fmt: skip
    """Stationary power [W], share of arrivals over the limits, and batch of one station.

    Detailed balance ``p(n) / p(n-1) = lam (L-1) T(n) / n`` with the governor inside: ``T(n)``
    is the time at the higher of the floor and the clock that a batch of n needs. A colocated
    instance spends the share ``u = lam * prompt_s`` of its time on prompts.
    """
    rate_tok_s = arrival_req_s * decoded_tok
    weight = 1.0
    total = 1.0
    over = 0.0
    batch = 0.0
    used = arrival_req_s * prompt_s[floor_k]
    if used >= 1.0:
        return math.inf, 1.0, math.inf
    energy = (1.0 - used) * idle_w + used * prompt_w[floor_k]
    last = step_s.shape[1] - 1
    for n in range(1, last + 1):
        k = max(floor_k, needed_k[n])
        used = arrival_req_s * prompt_s[k]
        if used >= 1.0:
            return math.inf, 1.0, math.inf
        time_s = step_s[k, n] / (1.0 - used)
        if n > batch_limit_req or time_s > limit_s:
            over += weight  # the arrival that finds n - 1
        weight *= rate_tok_s * time_s / n
        total += weight
        batch += weight * n
        energy += weight * ((1.0 - used) * power_w[k, n] + used * prompt_w[k])
        if weight > _LARGE:
            weight /= _LARGE
            total /= _LARGE
            over /= _LARGE
            batch /= _LARGE
            energy /= _LARGE
        elif weight < 1e-12 * total and n > batch / total:
            return energy / total, over / total, batch / total
    over += weight
    return energy / total, over / total, batch / total


@njit(
    types.void(
        F8_2, F8_2, I8_1, F8_1, F8_1, F8_1, F8, I8, F8, F8, F8, OUT_F8_1, OUT_I8_1, OUT_F8_1
    ),
    cache=True,
)
def decode_curve(
    step_s, power_w, needed_k, prompt_s, prompt_w, arrival_req_s, decoded_tok, batch_limit_req,
    limit_s, miss_frac, idle_w, least_w, floor_k, over_frac,
):  # fmt: skip
    """Least power over floors at which few enough arrivals are over the limits, per load.

    Writes power (inf where none is), the row of the floor and the share over the limits. Where
    no floor will do it is the lowest that misses hardly more than the top.
    """
    top = step_s.shape[0] - 1
    for g in range(len(arrival_req_s)):
        # Where even the top misses somewhat more, nothing is spent that buys no attainment.
        _, top_over, _ = station(
            step_s, power_w, needed_k, prompt_s, prompt_w, arrival_req_s[g], decoded_tok,
            batch_limit_req, limit_s, top, idle_w,
        )  # fmt: skip
        allowed = miss_frac if top_over <= miss_frac else top_over + miss_frac
        low, high = 0, top
        if top_over > 10.0 * miss_frac:
            low = top
        while low < high:
            middle = (low + high) // 2
            _, over, _ = station(
                step_s, power_w, needed_k, prompt_s, prompt_w, arrival_req_s[g], decoded_tok,
                batch_limit_req, limit_s, middle, idle_w,
            )  # fmt: skip
            if over <= allowed:
                high = middle
            else:
                low = middle + 1
        best_w, best_over, _ = station(
            step_s, power_w, needed_k, prompt_s, prompt_w, arrival_req_s[g], decoded_tok,
            batch_limit_req, limit_s, low, idle_w,
        )  # fmt: skip
        best_k = low
        # Power rises with the floor almost everywhere; where it does not, climb.
        for k in range(low + 1, top + 1):
            if best_over > miss_frac:
                break
            above_w, above_over, _ = station(
                step_s, power_w, needed_k, prompt_s, prompt_w, arrival_req_s[g], decoded_tok,
                batch_limit_req, limit_s, k, idle_w,
            )  # fmt: skip
            if above_w >= best_w:
                break
            best_w, best_over, best_k = above_w, above_over, k
        least_w[g] = best_w if best_over <= miss_frac else math.inf
        floor_k[g] = best_k
        over_frac[g] = best_over


@njit(types.void(F8_1, F8, F8_1, F8, F8, OUT_F8_1, OUT_I8_1, OUT_I8_1), cache=True)
def min_plus(left_w, left_step, right_w, right_step, step, sum_w, left_at, right_at):
    """Cheapest split of each load between two groups: ``min a(y) + b(x - y)``.

    Each group has its own grid; the right one takes at least the rest, to the next grid point.
    """
    for i in range(len(sum_w)):
        load = i * step
        best_w = math.inf
        best_left = -1
        best_right = -1
        for j in range(len(left_w)):
            rest = load - j * left_step
            k = 0
            if rest > 0.0:
                k = math.ceil(rest / right_step - 1e-9)
            if k < len(right_w):
                both_w = left_w[j] + right_w[k]
                if both_w < best_w:
                    best_w = both_w
                    best_left = j
                    best_right = k
            if rest <= 0.0:
                break
        sum_w[i] = best_w
        left_at[i] = best_left
        right_at[i] = best_right
