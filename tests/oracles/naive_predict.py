"""Naive twins of the prediction and learning kernels: plain Python, one thing at a time."""

import math

import numpy as np


def padded_size(padded_row, running_req):
    last = len(padded_row) - 1
    if running_req >= last:
        return max(float(padded_row[last]), running_req)
    return float(padded_row[math.ceil(running_req)])


def decode(rows, padded_row, freq_mhz, running_req, kv_tok):
    """Time, energy and power of a decode iteration: evaluate each clock, then interpolate."""
    size = padded_size(padded_row, running_req)
    times, powers = [], []
    for row in rows:
        line = row["decode_base_s"] + row["decode_req_s"] * size
        bent = max(line, row["decode_roof_s"] * size) + row["decode_kv_s"] * kv_tok
        time_s = max(bent, row["decode_floor_s"]) + row["decode_host_s"]
        energy_j = (
            time_s * row["decode_power_w"]
            + row["decode_iter_j"]
            + row["decode_req_j"] * running_req
            + row["decode_kv_j"] * kv_tok
            - row["decode_host_s"] * (row["decode_power_w"] - row["idle_w"])
        )
        times.append(time_s)
        powers.append(energy_j / time_s)
    time_s = np.interp(freq_mhz, rows["clock_mhz"], times)
    power_w = np.interp(freq_mhz, rows["clock_mhz"], powers)
    return time_s, time_s * power_w, power_w


def prefill(rows, freq_mhz, new_tok, square_tok2):
    times = (
        rows["prefill_base_s"]
        + rows["prefill_tok_s"] * new_tok
        + rows["prefill_tok2_s"] * square_tok2
    )
    time_s = np.interp(freq_mhz, rows["clock_mhz"], times)
    power_w = np.interp(freq_mhz, rows["clock_mhz"], rows["prefill_power_w"])
    return time_s, time_s * power_w, power_w


def rls(theta, cov, phi, target, forget):
    """Directional forgetting by its definition: keep all but a part of what lies along phi.

    Information form: the new information is the old, less ``(1 - forget)`` of its projection
    on what the record measures, plus the record's own.
    """
    gain = cov @ phi / (1.0 + phi @ cov @ phi)
    theta = theta + gain * (target - phi @ theta)
    info = np.linalg.inv(cov)
    along = np.outer(phi, phi) / (phi @ cov @ phi)
    info = info - (1.0 - forget) * along + forget * np.outer(phi, phi)
    return theta, np.linalg.inv(info)


def reflected(start, steps, least):
    value = start
    for step in steps:
        value = max(value + step, least)
    return value
