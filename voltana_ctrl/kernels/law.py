"""What one iteration takes and costs, and the clock ladder, compiled.

The twin of :mod:`voltana_ctrl.laws.iteration` and :mod:`voltana_ctrl.types.ladder`.
"""

import math

from numba import from_dtype, types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.layout import PROFILE_DTYPE

ROW = from_dtype(PROFILE_DTYPE)
F8, I8 = types.float64, types.int64
#: Rows of one instance, ascending clocks; only read.
ROWS = types.Array(ROW, 1, "C", readonly=True)


@njit(F8(ROW, F8))
def empty_tok(row, tok):
    """Slots of the last tile that stay empty, from the second tile on: ``ceil(m / t) t - m``."""
    tile_tok = row["decode_tile_tok"]
    if tile_tok > 0.0 and tok > tile_tok:
        return math.ceil(tok / tile_tok) * tile_tok - tok
    return 0.0


@njit(F8(ROW, F8, F8, F8))
def beside_s(row, padded_req, kv_tok, chunk_tok):
    """Time of the decode part of an iteration that computes so many prompt tokens, too [s].

    ``T = host + max(floor, max(base + req n, roof_base + roof n + tok E(n + p)) + kv K)``; the
    prompts' own ``tok p`` is not in it.
    """
    line = row["decode_base_s"] + row["decode_req_s"] * padded_req
    roof = row["decode_roof_base_s"] + row["decode_roof_s"] * padded_req
    roof += row["prefill_tok_s"] * empty_tok(row, padded_req + chunk_tok)
    bent = max(line, roof)
    return max(bent + row["decode_kv_s"] * kv_tok, row["decode_floor_s"]) + row["decode_host_s"]


@njit(F8(ROW, F8, F8))
def decode_s(row, padded_req, kv_tok):
    """Time of a decode iteration [s].

    ``T = host + max(floor, max(base + req n, roof_base + roof n + tok E(n)) + kv K)``
    """
    return beside_s(row, padded_req, kv_tok, 0.0)


@njit(F8(ROW, F8, F8))
def batch_j(row, batch_req, kv_tok):
    """Energy that a decode iteration takes besides what is drawn all the time [J].

    ``E = iter + req n + kv K - host (P_on - P_idle)``: its mean power is ``P_on + E / T``.
    """
    energy_j = row["decode_iter_j"] + row["decode_req_j"] * batch_req + row["decode_kv_j"] * kv_tok
    return energy_j - row["decode_host_s"] * (row["decode_power_w"] - row["idle_w"])


@njit(F8(ROW, F8, F8, F8))
def decode_j(row, time_s, batch_req, kv_tok):
    """Energy of a decode iteration of this length [J].

    ``E = T P_on + iter + req n + kv K - host (P_on - P_idle)``
    """
    energy_j = (
        time_s * row["decode_power_w"]
        + row["decode_iter_j"]
        + row["decode_req_j"] * batch_req
        + row["decode_kv_j"] * kv_tok
    )
    return energy_j - row["decode_host_s"] * (row["decode_power_w"] - row["idle_w"])


@njit(F8(ROW, F8, F8))
def prefill_s(row, chunk_tok, chunk_tok2):
    """Time of a prefill iteration of one prompt [s]: ``req + base + tok (N + E) + tok2 Q``."""
    return (
        row["prefill_base_s"]
        + row["prefill_tok_s"] * (chunk_tok + empty_tok(row, chunk_tok))
        + row["prefill_tok2_s"] * chunk_tok2
        + row["prefill_req_s"]
    )


@njit(types.UniTuple(F8, 3)(ROW, F8, F8, F8, F8, F8, F8))
def iteration_cost(row, padded_req, batch_req, kv_tok, chunk_tok, chunk_tok2, begun_req):
    """Time [s], decode energy [J] and prefill energy [J] of one iteration.

    Decode and prefill parts follow one another; the launch cost of prefill is paid only
    when nothing decodes, since the weights are read once. Beside decoding, prompts draw more. They
    share their tiles with what decodes, whose part pays for the slots that stay empty. For each
    prompt that begins the host works, while the GPU idles.
    """
    step_s = 0.0
    step_j = 0.0
    chunk_s = 0.0
    if batch_req > 0.0:
        step_s = beside_s(row, padded_req, kv_tok, chunk_tok)
        step_j = decode_j(row, step_s, batch_req, kv_tok)
    if chunk_tok > 0.0:
        chunk_s = row["prefill_tok_s"] * chunk_tok + row["prefill_tok2_s"] * chunk_tok2
        if batch_req == 0.0:
            chunk_s += row["prefill_base_s"]
            chunk_s += row["prefill_tok_s"] * empty_tok(row, chunk_tok)
    host_s = begun_req * row["prefill_req_s"]
    prefill_w = row["prefill_power_w"]
    if batch_req > 0.0:
        prefill_w += row["prefill_beside_w"]
    return step_s + chunk_s + host_s, step_j, chunk_s * prefill_w + host_s * row["idle_w"]


@njit(I8(ROWS, I8, F8))
def row_up(rows, n_clocks, freq_mhz):
    """Row of the lowest clock at or above this one; the highest if there is none."""
    low = 0
    high = n_clocks - 1
    while low < high:
        middle = (low + high) // 2
        if rows[middle]["clock_mhz"] >= freq_mhz:
            high = middle
        else:
            low = middle + 1
    return low


@njit(I8(ROWS, I8, F8))
def row_nearest(rows, n_clocks, freq_mhz):
    """Row of the clock nearest to this one; of two equally near the lower."""
    low = 0
    high = n_clocks - 1
    while low < high:
        middle = (low + high) // 2
        if 0.5 * (rows[middle]["clock_mhz"] + rows[middle + 1]["clock_mhz"]) >= freq_mhz:
            high = middle
        else:
            low = middle + 1
    return low


@njit(I8(ROWS, I8, F8))
def row_down(rows, n_clocks, freq_mhz):
    """Row of the highest clock at or below this one; the lowest if there is none."""
    low = 0
    high = n_clocks - 1
    while low < high:
        middle = (low + high + 1) // 2
        if rows[middle]["clock_mhz"] <= freq_mhz:
            low = middle
        else:
            high = middle - 1
    return low
