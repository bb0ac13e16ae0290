"""Plain twins of the control kernels, and brute force for target layer and plan."""

import itertools
import math

import numpy as np


def iteration_s(row, size_req, kv_tok):
    line = row["decode_base_s"] + row["decode_req_s"] * size_req
    linear = max(line, row["decode_roof_s"] * size_req) + row["decode_kv_s"] * kv_tok
    return max(float(linear), float(row["decode_floor_s"]))


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
    step_s = np.maximum(
        rows["decode_floor_s"],
        rows["decode_base_s"] + rows["decode_req_s"] * padded + rows["decode_kv_s"] * kv_tok,
    )
    batch_j = rows["decode_iter_j"] + rows["decode_req_j"] * sizes + rows["decode_kv_j"] * kv_tok
    power_w = rows["decode_power_w"] + batch_j / step_s
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
        batch_j = row["decode_iter_j"] + row["decode_req_j"] * n + row["decode_kv_j"] * kv_tok
        step_j = step_s * (row["decode_power_w"] - sunk_w) + batch_j
        if step_s <= itl_s and step_j < best_j:
            best_j, best = step_j, float(row["clock_mhz"])
    return best


def worst_power_w(one, n, kv_tok, prompt_tok, active):
    worst, out = one.idle_w, []
    works = active or n > 0.0
    n, kv_tok = min(1.1 * n + 8.0, one.max_batch), 1.1 * kv_tok
    kv_tok = max(kv_tok, n * prompt_tok)
    for row in one.table:
        if works and one.role.prefills:
            worst = max(worst, row["prefill_power_w"])
        if works and one.role.decodes:
            batch_j = row["decode_iter_j"] + row["decode_req_j"] * n + row["decode_kv_j"] * kv_tok
            worst = max(worst, row["decode_power_w"] + batch_j / iteration_s(row, n, kv_tok))
        out.append(worst)
    return out


# The plan's problem, written out


def plan_cost(planner, f, lam, cap, mu, rate):
    """Cost of these controls, each of shape (many, steps, slots); inf where a rule is broken."""
    d = {name: planner.values[each.id] for name, each in planner._d.items()}
    p = {name: planner.values[each.id] for name, each in planner._p.items()}
    prompts, requests = planner.values[planner._arrivals.id]
    budget_w = float(planner.values[planner._budget_w.id])
    dt, part = planner.dt_s, 1.0 - planner.delay_s / planner.dt_s
    prefill, decode = planner._slots
    ranges = [
        (cap, prefill.rate_min, prefill.rate_max),
        (f, *decode.clock_ghz),
        (lam, 0.0, d["lam_max"]),
        (rate, 0.0, p["rate_max"]),
        (mu, 0.0, np.inf),
    ]
    broken = np.zeros(len(f), bool)
    for values, low, high in ranges:
        outside = (values < low - 1e-6) | (values > high + 1e-6)
        broken |= outside.any(axis=(1, 2))
    n, m = (np.broadcast_to(d[k], (len(f), len(d[k]))) for k in ("n0", "m0"))
    q = np.broadcast_to(p["q0"], (len(f), len(p["q0"])))
    cost = np.zeros(len(f))
    for k in range(planner.horizon):
        before = f[:, k - 1] if k else d["f0"]
        clock = part * f[:, k] + (1.0 - part) * before
        able = part * cap[:, k] + (1.0 - part) * (cap[:, k - 1] if k else p["cap0"])
        broken |= (f[:, k] < before - planner.slew_ghz - 1e-6).any(axis=1)
        broken |= np.abs(lam[:, k] @ d["size"] - requests) > 1e-4
        broken |= np.abs(rate[:, k] @ p["size"] - prompts) > 1e-4
        broken |= (mu[:, k] > able + 1e-6).any(axis=1)
        busy_w = np.max([slope * mu[:, k] + start for slope, start in prefill.facets], axis=0)
        drawn_w = n @ d["power_n"] + clock @ d["power_f"] + d["power_rest_w"].sum()
        drawn_w = drawn_w + busy_w @ p["size"]
        broken |= drawn_w > budget_w + 1e-6
        n, m, q = (
            d["a_nn"] * n + d["a_nm"] * m + d["b_n"] * clock + d["e_n"] * lam[:, k] + d["c_n"],
            d["a_mn"] * n + d["a_mm"] * m + d["b_m"] * clock + d["e_m"] * lam[:, k] + d["c_m"],
            q + dt * (rate[:, k] - mu[:, k]),
        )
        broken |= (q < -1e-6).any(axis=1)
        late = d["step_n"] * n + d["step_m"] * m + d["step_f"] * clock - d["step_rest_s"]
        full, slow = m - d["kv_ktok"], q - able * planner.ttft_s
        penalty = sum(
            weight * np.maximum(0.0, excess).sum(axis=1)
            for weight, excess in ((1e5, late), (100.0, full), (1e3, slow))
        )
        cost += dt * (drawn_w + penalty + 0.5 * cap[:, k].sum(axis=1))
        cost -= dt * (0.04 * lam[:, k] @ d["lam_goal"] + 0.04 * rate[:, k] @ p["rate_goal"])
        cost -= dt * 10.0 * f[:, k] @ d["f_goal"]
        for weight, values in ((0.02, lam), (0.02, rate), (5.0, f), (0.05, mu), (0.05, cap)):
            cost += dt * weight * (values[:, k] ** 2).sum(axis=1)
    cost += 0.01 * ((n**2).sum(axis=1) - 2.0 * n @ d["n_goal"]) + 10.0 * (q**2).sum(axis=1)
    return np.where(broken, np.inf, cost)


def zoomed_search(cost_of, low, high, points, rounds):
    """Least of a convex function over a box: grids, each around the best of the last."""
    low, high = np.array(low, dtype=float), np.array(high, dtype=float)
    best, least = None, math.inf
    for _ in range(rounds):
        axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        if best is not None:
            grid = np.vstack([grid, best])
        costs = cost_of(grid)
        least, best = float(costs.min()), grid[int(np.argmin(costs))]
        reach = 0.3 * (high - low)  # slowly: the valley may be narrow and askew
        low, high = np.maximum(low, best - reach), np.minimum(high, best + reach)
    return least, best
