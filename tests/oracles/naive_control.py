"""Plain twins of the control kernels, and brute force for the target layer."""

import itertools
import math

import numpy as np

from tests.oracles.naive_baselines import empty_tok


def iteration_s(row, size_req, kv_tok):
    line = row["decode_base_s"] + row["decode_req_s"] * size_req
    roof = row["decode_roof_base_s"] + row["decode_roof_s"] * size_req
    roof += row["prefill_tok_s"] * empty_tok(row, size_req)
    linear = max(line, roof) + row["decode_kv_s"] * kv_tok
    return max(float(linear), float(row["decode_floor_s"])) + float(row["decode_host_s"])


def batch_j(row, n, kv_tok):
    spent_j = row["decode_iter_j"] + row["decode_req_j"] * n + row["decode_kv_j"] * kv_tok
    return spent_j - row["decode_host_s"] * (row["decode_power_w"] - row["idle_w"])


def station(step_s, power_w, needed_k, arrival_req_s, decoded_tok, limit_req, limit_s, floor_k,
            idle_w):  # fmt: skip
    """Power, share of arrivals over the limits, mean batch: in logarithms, no short cuts."""
    n_max = step_s.shape[1] - 1
    log_p = [0.0]
    for n in range(1, n_max + 1):
        k = max(floor_k, int(needed_k[n]))
        log_p.append(log_p[-1] + math.log(arrival_req_s * decoded_tok * step_s[k, n] / n))
    top = max(log_p)
    p = np.exp(np.array(log_p) - top)
    p /= p.sum()
    power = p[0] * idle_w
    over = p[n_max]
    for n in range(1, n_max + 1):
        k = max(floor_k, int(needed_k[n]))
        power += p[n] * power_w[k, n]
        if n > limit_req or step_s[k, n] > limit_s:
            over += p[n - 1]
    return power, over, float(p @ np.arange(n_max + 1))


def min_plus(left_w, right_w):
    """Cheapest split on one common grid."""
    out = np.full(len(left_w), math.inf)
    for i, j in itertools.product(range(len(left_w)), repeat=2):
        if i + j < len(out):
            out[i + j] = min(out[i + j], left_w[i] + right_w[j])
    return out


def best_split(curve_w, parked_w, total, points):
    """Least power of two instances over a fine grid of splits; either may be parked."""

    def cost(load):
        return parked_w if load == 0.0 else curve_w(load)

    return min(cost(total * i / points) + cost(total * (1 - i / points)) for i in range(points + 1))


def decode_clock(rows, padded, running_req, kv_tok, target_s, floor_mhz, ceiling_mhz):
    """Lowest clock within [floor, ceiling] that keeps the target; the ceiling if none."""
    allowed = [row for row in rows if row["clock_mhz"] <= ceiling_mhz] or [rows[0]]
    for row in allowed[:-1]:
        if row["clock_mhz"] < floor_mhz:
            continue
        if iteration_s(row, padded[running_req], kv_tok) <= target_s:
            return float(row["clock_mhz"])
    return float(allowed[-1]["clock_mhz"])


def fill_station(rows, padded, context_tok, target_s):
    """Time and power per clock and batch, and the lowest row within the target."""
    rows = rows[:, None]
    sizes = np.arange(len(padded), dtype=float)
    kv_tok = sizes * context_tok
    step_s = (
        np.maximum(
            rows["decode_floor_s"],
            rows["decode_base_s"] + rows["decode_req_s"] * padded + rows["decode_kv_s"] * kv_tok,
        )
        + rows["decode_host_s"]
    )
    power_w = rows["decode_power_w"] + batch_j(rows, sizes, kv_tok) / step_s
    fast = step_s <= target_s
    return step_s, power_w, np.where(fast.any(axis=0), fast.argmax(axis=0), len(rows) - 1)


def least_floor(step_s, power_w, needed_k, arrival_req_s, decoded_tok, limit_req, limit_s,
                miss_frac, idle_w):  # fmt: skip
    """Least power, its floor and its share over the limits, by trying floor after floor."""
    found = [
        station(step_s, power_w, needed_k, arrival_req_s, decoded_tok, limit_req, limit_s, k,
                idle_w)
        for k in range(len(step_s))
    ]  # fmt: skip
    over = [each[1] for each in found]
    if over[-1] > miss_frac:
        allowed = over[-1] + miss_frac if over[-1] <= 10.0 * miss_frac else -1.0
        k = next((k for k, each in enumerate(over) if each <= allowed), len(over) - 1)
        return math.inf, k, over[k]
    k = next(k for k, each in enumerate(over) if each <= miss_frac)
    while k + 1 < len(found) and found[k + 1][0] < found[k][0]:
        k += 1
    return found[k][0], k, over[k]


def prefill_least(rows, load_req_s, prompt_tok, prompt_sd_tok, ttft_s, idle_w, miss_frac,
                  governed, deaf_frac, typical):  # fmt: skip
    """Least power, row and late share over all clocks at once."""
    work_s = rows["prefill_tok_s"] * prompt_tok + rows["prefill_tok2_s"] * (
        prompt_tok**2 + prompt_sd_tok**2
    )
    rho = load_req_s * work_s + min(load_req_s, 2.0 / ttft_s) * rows["prefill_base_s"]
    service_s, spread_s = rho / load_req_s, work_s * prompt_sd_tok / prompt_tok
    late = np.ones(len(rows))
    stable = rho < 1.0
    wait_s = load_req_s * (service_s**2 + spread_s**2)[stable] / (2.0 * (1.0 - rho[stable]))
    wait_s = wait_s * (1.0 + rho[stable] / (1.0 + rho[stable]))
    left_s = ttft_s - rows["prefill_base_s"] - np.outer(typical, rows["prefill_tok_s"])
    left_s -= np.outer(typical**2, rows["prefill_tok2_s"])
    tail = rho[stable] * np.exp(-rho[stable] * np.maximum(left_s[:, stable], 0.0) / wait_s)
    late[stable] = np.where(left_s[:, stable] > 0.0, tail, 1.0).mean(axis=0)
    if governed:
        late[:] = late[-1]
    power_w = np.where(stable, idle_w + rho * (rows["prefill_power_w"] - idle_w), np.inf)
    allowed = np.where(late <= miss_frac, power_w, np.inf)
    k = int(np.argmin(allowed)) if np.isfinite(allowed).any() else len(rows) - 1
    if governed:
        floor = min(np.count_nonzero(deaf_frac * rho >= 1.0), len(rows) - 1)
        return allowed[k], floor, late[k]
    return allowed[k], k, late[k]


# What clocks must be, one instance at a time


def needed_mhz(one, n, kv_tok, queue_tok, wait_s, rate_tok_s, typical_tok, slo, margin_frac,
               delay_s, burst_sd_frac):  # fmt: skip
    ttft_s, itl_s = slo.ttft_s, slo.itl_s / (1.0 + margin_frac[1])
    unsure = 1.0 + margin_frac[0]
    burst_tok = burst_sd_frac * math.sqrt(rate_tok_s * typical_tok * ttft_s / 2.0)
    for row in one.table:
        if one.role.decodes and n > 0:
            size = one.profile.padded_batch(one.max_batch)[min(int(n), one.max_batch)]
            prompts_frac = rate_tok_s * row["prefill_tok_s"] if one.role.prefills else 0.0
            if iteration_s(row, size, kv_tok) > itl_s * (1.0 - prompts_frac):
                continue
        if one.role.prefills:
            per_tok_s = row["prefill_tok_s"] + row["prefill_tok2_s"] * typical_tok
            queue_s = row["prefill_base_s"] + per_tok_s * (queue_tok + rate_tok_s * delay_s)
            queue_s *= unsure
            cycle_tok = rate_tok_s * ttft_s / 2.0 + burst_tok
            cycle_s = unsure * (row["prefill_base_s"] + per_tok_s * cycle_tok)
            if queue_s > ttft_s - delay_s - wait_s or cycle_s > ttft_s - delay_s:
                continue
        return float(row["clock_mhz"])
    return float(one.clocks_mhz[-1])


def decoding_tok_s(one, n, kv_tok, freq_mhz):
    n = min(int(n), one.max_batch)
    if not one.role.decodes or n == 0:
        return 0.0
    rows = [row for row in one.table if row["clock_mhz"] >= freq_mhz] or [one.table[-1]]
    return n / iteration_s(rows[0], one.profile.padded_batch(one.max_batch)[n], kv_tok)


def thrifty_mhz(one, n, kv_tok, prompt_tok, itl_s, sunk_w):
    if not one.role.decodes:
        joules = (one.table["prefill_power_w"] - sunk_w) * one.table["prefill_tok_s"]
        return float(one.clocks_mhz[np.argmin(joules)])
    n = max(1.0, min(n, one.max_batch))
    kv_tok = max(kv_tok, n * prompt_tok)
    best_j, best = math.inf, float(one.clocks_mhz[-1])
    for row in one.table:
        step_s = iteration_s(row, one.profile.padded_batch(one.max_batch)[int(n)], kv_tok)
        step_j = step_s * (row["decode_power_w"] - sunk_w) + batch_j(row, n, kv_tok)
        if step_s <= itl_s and step_j < best_j:
            best_j, best = step_j, float(row["clock_mhz"])
    return best


def worst_power_w(one, n, kv_tok, prompt_tok, active):
    worst, out = one.idle_w, []
    works = active or n > 0.0
    n, kv_tok = min(1.03 * n + 8.0, one.max_batch), 1.03 * kv_tok
    kv_tok = max(kv_tok, n * prompt_tok)
    for row in one.table:
        if works and one.role.prefills:
            worst = max(worst, row["prefill_power_w"])
        if works and one.role.decodes:
            joules = batch_j(row, n, kv_tok)
            worst = max(worst, row["decode_power_w"] + joules / iteration_s(row, n, kv_tok))
        out.append(worst)
    return out
