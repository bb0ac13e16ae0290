"""What one iteration takes and costs, compiled."""

from numba import from_dtype, njit, types

from voltana_ctrl.kernels.layout import PROFILE_DTYPE

ROW = from_dtype(PROFILE_DTYPE)
F8, I8 = types.float64, types.int64


@njit(types.UniTuple(F8, 3)(ROW, F8, F8, F8, F8, F8), cache=True)
def iteration_cost(row, padded_req, batch_req, kv_tok, chunk_tok, chunk_tok2):
    """Time [s], decode energy [J] and prefill energy [J] of one iteration.

    Decode and prefill parts follow one another; the launch cost of prefill is paid only
    when nothing decodes, since the weights are read once.
    """
    decode_s = 0.0
    decode_j = 0.0
    prefill_s = 0.0
    if batch_req > 0.0:
        decode_s = row["decode_base_s"] + row["decode_req_s"] * padded_req
        decode_s = max(decode_s, row["decode_roof_s"] * padded_req)
        decode_s = max(decode_s + row["decode_kv_s"] * kv_tok, row["decode_floor_s"])
        decode_j = (
            decode_s * row["decode_power_w"]
            + row["decode_iter_j"]
            + row["decode_req_j"] * batch_req
            + row["decode_kv_j"] * kv_tok
        )
    if chunk_tok > 0.0:
        prefill_s = row["prefill_tok_s"] * chunk_tok + row["prefill_tok2_s"] * chunk_tok2
        if batch_req == 0.0:
            prefill_s += row["prefill_base_s"]
    return decode_s + prefill_s, decode_j, prefill_s * row["prefill_power_w"]


@njit(F8(ROW, F8, F8), cache=True)
def decode_s(row, padded_req, kv_tok):
    """Time of a decode iteration [s]."""
    line = row["decode_base_s"] + row["decode_req_s"] * padded_req
    bent = max(line, row["decode_roof_s"] * padded_req)
    return max(bent + row["decode_kv_s"] * kv_tok, row["decode_floor_s"])


@njit(F8(ROW, F8, F8), cache=True)
def prefill_s(row, chunk_tok, chunk_tok2):
    """Time of a prefill iteration [s]."""
    return (
        row["prefill_base_s"]
        + row["prefill_tok_s"] * chunk_tok
        + row["prefill_tok2_s"] * chunk_tok2
    )


@njit(I8(types.Array(ROW, 1, "C"), I8, F8), cache=True)
def quantise_up(rows, n_clocks, freq_mhz):
    """Index of the lowest clock at or above `freq_mhz`; the highest if there is none."""
    low = 0
    high = n_clocks - 1
    while low < high:
        middle = (low + high) // 2
        if rows[middle]["clock_mhz"] >= freq_mhz:
            high = middle
        else:
            low = middle + 1
    return low
