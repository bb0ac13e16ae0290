"""Kernels of the target layer: least power of one instance against load, and of several."""

import math

from numba import types

from voltana_ctrl.kernels.choose.beside import BESIDE, beside
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, batch_j, decode_s, prefill_s

F8, I8 = types.float64, types.int64

F8_1 = types.Array(F8, 1, "C", readonly=True)
I8_1 = types.Array(I8, 1, "C", readonly=True)
ROWS = types.Array(ROW, 1, "C", readonly=True)
#: A decode station: coefficients, executed sizes, KV tokens per request; of
#: :func:`governed_batches` rows, times and powers; what a colocated instance has besides.
STATION = types.Tuple((ROWS, I8_1, F8, I8_1, F8_1, F8_1, BESIDE))
OUT_F8_1, OUT_I8_1 = types.Array(F8, 1, "C"), types.Array(I8, 1, "C")

#: Weights are scaled down when they pass this, so that no batch overflows.
_LARGE = 1e250


@njit(types.void(ROWS, I8_1, F8, F8, OUT_I8_1, OUT_F8_1, OUT_F8_1))
def governed_batches(rows, padded, context_tok, target_s, needed_k, step_s, power_w):
    """Row that a governor picks for each batch, time and power there.

    A batch of n holds ``n * context_tok`` KV tokens. The row is the lowest within `target_s`,
    the top where none is; it does not fall with the executed size, so one walk finds them all.
    """
    k = 0
    for n in range(len(padded)):
        if n > 0 and padded[n] < padded[n - 1]:
            k = 0
        size_req, kv_tok = float(padded[n]), n * context_tok
        time_s = decode_s(rows[k], size_req, kv_tok)
        while k < len(rows) - 1 and time_s > target_s:
            k += 1
            time_s = decode_s(rows[k], size_req, kv_tok)
        row = rows[k]
        needed_k[n] = k
        step_s[n] = time_s
        power_w[n] = row["decode_power_w"] + batch_j(row, float(n), kv_tok) / time_s


@njit(types.UniTuple(F8, 3)(STATION, F8, F8, I8, F8, I8))
def station(one, arrival_req_s, decoded_tok, batch_limit_req, limit_s, floor_k):
    """Stationary power [W], share of arrivals that miss, and batch of one station.

    Detailed balance ``p(n) / p(n-1) = lam (L-1) T(n) / n`` with the governor inside: ``T(n)``
    is the time at the higher of the floor and the clock that a batch of n needs
    (:func:`governed_batches`), on a colocated instance what it is beside prompts
    (:func:`~voltana_ctrl.kernels.choose.beside.beside`). A miss is who joins a batch over the
    limits, or whose answer prompts make late by chance.
    """
    rows, padded, context_tok, needed_k, governed_s, governed_w, prompts = one
    rate_tok_s = arrival_req_s * decoded_tok
    weight = 1.0
    total = 1.0
    over = 0.0
    batch = 0.0
    row = rows[floor_k]
    mixed = len(prompts.prompt_s) > 0
    used = 0.0
    energy = row["idle_w"]
    if mixed:
        used = arrival_req_s * prompts.prompt_s[floor_k]
        energy = (1.0 - used) * row["idle_w"] + used * prompts.prompt_w[floor_k]
    if used >= 1.0:
        return math.inf, 1.0, math.inf
    time_s, drawn_w, late = 0.0, 0.0, 0.0
    block_req, base_k, usual_k = 0, floor_k, floor_k
    for n in range(1, len(padded)):
        if mixed:
            if n > block_req:
                # A few batches are like the one in their middle.
                middle = min(len(padded) - 1, n + n // 32)
                block_req = n + n // 16
                if padded[middle] < padded[n - 1]:
                    base_k = floor_k
                base_k, usual_k, time_s, drawn_w, late = beside(
                    rows, float(padded[middle]), middle * context_tok, float(middle), prompts,
                    arrival_req_s, base_k, usual_k,
                )  # fmt: skip
                if time_s <= 0.0:
                    return math.inf, 1.0, math.inf
        elif needed_k[n] > floor_k:
            time_s = governed_s[n]
            drawn_w = governed_w[n]
        else:
            kv_tok = n * context_tok
            time_s = decode_s(row, float(padded[n]), kv_tok)
            drawn_w = row["decode_power_w"] + batch_j(row, float(n), kv_tok) / time_s
        # The arrival that finds n - 1.
        over += weight if n > batch_limit_req or time_s > limit_s else late * weight
        weight *= rate_tok_s * time_s / n
        total += weight
        batch += weight * n
        energy += weight * drawn_w
        if weight > _LARGE:
            weight /= _LARGE
            total /= _LARGE
            over /= _LARGE
            batch /= _LARGE
            energy /= _LARGE
        elif weight < 1e-12 * total and n > batch / total:
            return energy / total, over / total, batch / total
    if batch_limit_req < len(padded):
        over += weight
    return energy / total, over / total, batch / total


@njit(types.Tuple((I8, F8, F8))(STATION, F8, F8, I8, F8, F8, I8))
def _least_floor(one, arrival_req_s, decoded_tok, batch_limit_req, limit_s, allowed, guess):
    """Lowest floor with few enough arrivals over the limits, the top if none; its figures.

    A higher floor never misses more. The search leaves `guess` by doubling steps until the
    answer lies between two floors, then halves.
    """
    top = len(one[0]) - 1
    low, high = 0, top
    found_k = -1
    found_w = 0.0
    found_over = 0.0
    at = min(guess, max(0, top - 1))
    stride = 1
    while low < high:
        power, over, _ = station(one, arrival_req_s, decoded_tok, batch_limit_req, limit_s, at)
        if over <= allowed:
            high = found_k = at
            found_w, found_over = power, over
        else:
            low = at + 1
        if low == 0:
            at = max(0, high - stride)
        elif high == top:
            at = min(top - 1, low + stride - 1)
        else:
            at = (low + high) // 2
        stride *= 2
    if found_k != low:
        found_w, found_over, _ = station(
            one, arrival_req_s, decoded_tok, batch_limit_req, limit_s, low
        )
    return low, found_w, found_over


@njit(types.void(STATION, F8_1, F8, I8, F8, F8, OUT_F8_1, OUT_I8_1, OUT_F8_1))
def decode_curve(
    one,
    arrival_req_s,
    decoded_tok,
    batch_limit_req,
    limit_s,
    miss_frac,
    least_w,
    floor_k,
    over_frac,
):
    """Least power over floors at which few enough arrivals are over the limits, per load.

    Writes power (inf where none is), the row of the floor and the share over the limits. Where
    no floor will do it is the lowest that misses hardly more than the top.
    """
    top = len(one[0]) - 1
    mixed = len(one[6].prompt_s) > 0
    guess = 0
    for g in range(len(arrival_req_s)):
        low, best_w, best_over = _least_floor(
            one, arrival_req_s[g], decoded_tok, batch_limit_req, limit_s, miss_frac, guess
        )
        # The next load needs about the same.
        guess = low
        if miss_frac < best_over <= 10.0 * miss_frac:
            # Where even the top misses somewhat more, nothing is spent that buys no attainment.
            low, best_w, best_over = _least_floor(
                one,
                arrival_req_s[g],
                decoded_tok,
                batch_limit_req,
                limit_s,
                best_over + miss_frac,
                low,
            )
        best_k = low
        # Power rises with the floor almost everywhere; where it does not, climb. Beside prompts the
        # law of power is not exact enough for that: shares would follow its dips.
        for k in range(low + 1, top + 1):
            if mixed or best_over > miss_frac:
                break
            above_w, above_over, _ = station(
                one, arrival_req_s[g], decoded_tok, batch_limit_req, limit_s, k
            )
            if above_w >= best_w:
                break
            best_w, best_over, best_k = above_w, above_over, k
        least_w[g] = best_w if best_over <= miss_frac else math.inf
        floor_k[g] = best_k
        over_frac[g] = best_over


@njit(F8(ROW, F8, F8, F8, F8, F8, F8, F8_1))
def _late_frac(row, load_req_s, cycles_s, prompt_tok, prompt_sd_tok, square_tok2, ttft_s, typical):
    """Share of prompts that wait too long: an exponential tail of Pollaczek-Khinchine's mean.

    Who comes waits for the iteration that runs, and is served with all that came during it: in
    the middle of an iteration, ``1 + rho / (1 + rho)`` times the work that is left.
    """
    work_s = row["prefill_tok_s"] * prompt_tok + row["prefill_tok2_s"] * square_tok2
    work_s += row["prefill_req_s"]
    rho = load_req_s * work_s + cycles_s * row["prefill_base_s"]
    if rho >= 1.0:
        return 1.0
    service_s = rho / max(load_req_s, 1e-12)
    spread_s = work_s * prompt_sd_tok / prompt_tok
    wait_s = (
        load_req_s * (service_s * service_s + spread_s * spread_s)
        / (2.0 * (1.0 - load_req_s * service_s))
    )  # fmt: skip
    wait_s *= 1.0 + rho / (1.0 + rho)
    late = 0.0
    for tok in typical:
        left_s = ttft_s - prefill_s(row, tok, tok * tok)
        if left_s > 0.0 and wait_s > 0.0:
            late += rho * math.exp(-rho * left_s / wait_s)
        elif left_s <= 0.0:
            late += 1.0
    return late / len(typical)


@njit(types.void(ROWS, F8_1, F8, F8, F8, F8, types.boolean, F8, F8_1, OUT_F8_1, OUT_I8_1, OUT_F8_1))
def prefill_curve(
    rows, arrival_req_s, prompt_tok, prompt_sd_tok, ttft_s, miss_frac, governed, deaf_frac,
    typical, least_w, best_k, late_frac,
):  # fmt: skip
    """Least power over clocks at which few enough prompts wait too long, per load.

    `typical` are prompt lengths, each as likely, over which the tail of the wait is averaged.
    Governed, the top clock is there when the queue asks for it, and its tail counts for all.
    Its floor is the lowest at which less than what arrives is postponed in the share `deaf_frac`
    of the time. Writes power (inf where none is), the row of clock or floor and the share that
    is late; where no clock will do, the top row.
    """
    square = prompt_tok * prompt_tok + prompt_sd_tok * prompt_sd_tok
    top = len(rows) - 1
    for g in range(len(arrival_req_s)):
        load = arrival_req_s[g]
        # Those that arrive during one iteration share the base time of the next; the longest
        # that a cycle can be is half the promise.
        cycles = min(load, 2.0 / ttft_s)
        least_w[g] = math.inf
        best_k[g] = 0
        late_frac[g] = 1.0
        for k in range(len(rows)):
            row = rows[k]
            work_s = row["prefill_tok_s"] * prompt_tok + row["prefill_tok2_s"] * square
            rho = load * work_s + cycles * row["prefill_base_s"]
            power_w = math.inf
            # While the host works for a prompt the GPU idles.
            busy_frac = rho
            rho += load * row["prefill_req_s"]
            if rho < 1.0:
                power_w = row["idle_w"] + busy_frac * (row["prefill_power_w"] - row["idle_w"])
            if k > 0 and not power_w < least_w[g]:
                continue
            if k == 0 or not governed:
                late = _late_frac(rows[top if governed else k], load, cycles, prompt_tok,
                                  prompt_sd_tok, square, ttft_s, typical)  # fmt: skip
            if k == 0:
                late_frac[g] = late
            if late <= miss_frac and power_w < least_w[g]:
                least_w[g] = power_w
                best_k[g] = k
                late_frac[g] = late
        if governed:
            best_k[g] = top
            for k in range(top):
                row = rows[k]
                work_s = row["prefill_tok_s"] * prompt_tok + row["prefill_tok2_s"] * square
                rho = load * (work_s + row["prefill_req_s"]) + cycles * row["prefill_base_s"]
                if deaf_frac * rho < 1.0:
                    best_k[g] = k
                    break
        elif math.isinf(least_w[g]):
            best_k[g] = top
            late_frac[g] = _late_frac(rows[top], load, cycles, prompt_tok, prompt_sd_tok, square,
                                      ttft_s, typical)  # fmt: skip


@njit(types.void(F8_1, F8, F8_1, F8, F8, OUT_F8_1, OUT_I8_1, OUT_I8_1))
def min_plus(left_w, left_step, right_w, right_step, step, sum_w, left_at, right_at):
    """Cheapest split of each load between two groups: ``min a(y) + b(x - y)``.

    Each group has its own grid; the right one takes at least the rest, to the next grid point.
    """
    per_step = 1.0 / right_step
    for i in range(len(sum_w)):
        load = i * step
        best_w = math.inf
        best_left = -1
        best_right = -1
        for j in range(len(left_w)):
            rest = load - j * left_step
            k = 0
            if rest > 0.0:
                points = rest * per_step - 1e-9
                k = int(points)
                if k < points:
                    k += 1
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
