"""What clocks must be at a state of the fleet, and what they may draw: loops over instances.

Instances are given by their type: `tables` and `padded` of
:func:`voltana_ctrl.types.packed.instance_types`, `kind` the row of each instance.
"""

import math

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, batch_j, decode_s, row_down, row_up

F8, I8 = types.float64, types.int64
TABLES = types.Array(ROW, 2, "C", readonly=True)
SIZES = types.Array(I8, 2, "C", readonly=True)
I8_1 = types.Array(I8, 1, "C", readonly=True)
F8_1 = types.Array(F8, 1, "C", readonly=True)
F8_2 = types.Array(F8, 2, "C", readonly=True)
BOOL_1 = types.Array(types.boolean, 1, "C", readonly=True)
OUT_F8_1, OUT_F8_2 = types.Array(F8, 1, "C"), types.Array(F8, 2, "C")


@njit(
    types.void(
        TABLES, SIZES, I8_1, I8_1, I8_1, I8_1, I8_1, F8_1, F8_1, F8_1, F8_1, F8_1,
        F8, F8, F8, F8_1, F8_1, F8_1, F8_1, F8_1, F8, OUT_F8_1,
    ),
)  # fmt: skip
def lowest_clocks(
    tables, padded, kind, n_clocks, prefills, decodes, max_batch, running_req, kv_used_tok,
    queue_tok, oldest_wait_s, route_frac, arrival_tok_s, typical_tok, ttft_s, prefill_pace_frac,
    decode_pace_frac, unsure, itl_s, delay_s, burst_sd_frac, needed_mhz,
):  # fmt: skip
    """Lowest clock per instance that keeps the promises; the highest if none does.

    Of TTFT only what is still to come is a prediction, and taken `unsure` times.
    """
    for i in range(len(kind)):
        top = n_clocks[i] - 1
        decoding = decodes[i] > 0 and running_req[i] > 0.0
        size_req = 0.0
        if decoding:
            size_req = float(padded[kind[i], min(int(running_req[i]), max_batch[i])])
        rate_tok_s = arrival_tok_s * route_frac[i]
        waiting_tok = queue_tok[i] + rate_tok_s * delay_s[i]
        left_s = ttft_s - delay_s[i] - oldest_wait_s[i]
        predicted = prefill_pace_frac[i] * unsure[i]
        burst_tok = burst_sd_frac * math.sqrt(rate_tok_s * typical_tok * ttft_s / 2.0)
        cycle_tok = rate_tok_s * ttft_s / 2.0 + burst_tok
        best = top
        for k in range(top):
            row = tables[kind[i], k]
            if decoding:
                # Prompts of a colocated instance take their share of the time between tokens.
                own_frac = 1.0
                if prefills[i] > 0:
                    own_frac -= rate_tok_s * prefill_pace_frac[i] * row["prefill_tok_s"]
                step_s = decode_pace_frac[i] * decode_s(row, size_req, kv_used_tok[i])
                if step_s > itl_s[i] * own_frac:
                    continue
            if prefills[i] > 0:
                base_s = predicted * row["prefill_base_s"]
                per_tok_s = row["prefill_tok_s"] + row["prefill_tok2_s"] * typical_tok
                per_tok_s *= predicted
                if base_s + per_tok_s * waiting_tok > left_s:
                    continue
                if base_s + per_tok_s * cycle_tok > ttft_s - delay_s[i]:
                    continue
            best = k
            break
        needed_mhz[i] = tables[kind[i], best]["clock_mhz"]


@njit(
    types.void(TABLES, SIZES, I8_1, I8_1, I8_1, I8_1, F8_1, F8_1, F8, F8, F8_1, OUT_F8_1),
)
def thrifty(
    tables, padded, kind, n_clocks, decodes, max_batch, running_req, kv_used_tok, prompt_tok,
    itl_s, sunk_w, thrifty_mhz,
):  # fmt: skip
    """Clock of least energy per token at the present batch; the highest if all miss ITL.

    ``argmin_f (P(f) - sunk) T(f) + E(f)``: what it draws above what is drawn anyway.
    """
    for i in range(len(kind)):
        n = max(1.0, min(running_req[i], float(max_batch[i])))
        size_req = float(padded[kind[i], int(n)])
        kv_tok = max(kv_used_tok[i], n * prompt_tok)
        best = n_clocks[i] - 1 if decodes[i] > 0 else 0
        least_j = math.inf
        for k in range(n_clocks[i]):
            row = tables[kind[i], k]
            if decodes[i] > 0:
                step_s = decode_s(row, size_req, kv_tok)
                if step_s > itl_s:
                    continue
                energy_j = step_s * (row["decode_power_w"] - sunk_w[i]) + batch_j(row, n, kv_tok)
            else:
                energy_j = (row["prefill_power_w"] - sunk_w[i]) * row["prefill_tok_s"]
            if energy_j < least_j:
                least_j = energy_j
                best = k
        thrifty_mhz[i] = tables[kind[i], best]["clock_mhz"]


@njit(
    types.void(TABLES, I8_1, I8_1, I8_1, I8_1, I8_1, F8_1, F8_1, F8_1, F8_1, BOOL_1, F8, OUT_F8_2)
)
def worst_power(
    tables, kind, n_clocks, prefills, decodes, max_batch, idle_w, running_req, queue_req,
    kv_used_tok, active, prompt_tok, power_w,
):  # fmt: skip
    """Most that each instance can draw soon, per clock, not falling with it."""
    for i in range(len(kind)):
        here_req = running_req[i] + queue_req[i]
        works = active[i] or here_req > 0.0
        n = min(1.03 * here_req + 8.0, float(max_batch[i]))
        kv_tok = max(1.03 * kv_used_tok[i], n * prompt_tok)
        worst_w = idle_w[i]
        for k in range(power_w.shape[1]):
            if k < n_clocks[i]:
                row = tables[kind[i], k]
                if works and prefills[i] > 0:
                    prompt_w = row["prefill_power_w"]
                    if decodes[i] > 0:
                        prompt_w += row["prefill_beside_w"]
                    worst_w = max(worst_w, prompt_w)
                if works and decodes[i] > 0:
                    step_s = decode_s(row, n, kv_tok)
                    drawn_w = row["decode_power_w"] + batch_j(row, n, kv_tok) / step_s
                    worst_w = max(worst_w, drawn_w)
            power_w[i, k] = worst_w


@njit(types.void(TABLES, I8_1, I8_1, F8_2, F8_1, OUT_F8_1, OUT_F8_1))
def raised(tables, kind, n_clocks, power_w, clock_mhz, raised_mhz, drawn_w):
    """Clocks raised to supported ones, and power there."""
    for i in range(len(kind)):
        k = row_up(tables[kind[i]], n_clocks[i], clock_mhz[i])
        raised_mhz[i] = tables[kind[i], k]["clock_mhz"]
        drawn_w[i] = power_w[i, k]


@njit(F8(TABLES, I8_1, I8_1, F8_2, F8_1, F8, OUT_F8_1))
def scaled(tables, kind, n_clocks, power_w, wanted_mhz, scale, clock_mhz):
    """Clocks in this proportion to those wanted, lowered to supported ones; what they draw."""
    total_w = 0.0
    for i in range(len(kind)):
        k = row_down(tables[kind[i]], n_clocks[i], scale * wanted_mhz[i])
        clock_mhz[i] = tables[kind[i], k]["clock_mhz"]
        total_w += power_w[i, k]
    return total_w
