"""Plain-Python twins of the control kernels, and brute force for the target layer."""

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
