"""The latency and energy predictor, compiled.

Coefficients are records of PROFILE_DTYPE, ``table[instance, clock]``.
"""

import math

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, decode_j, decode_s, prefill_s, row_down

F8, I8 = types.float64, types.int64
TABLES = types.Array(ROW, 2, "C", readonly=True)
F8_1, F8_2, F8_3 = (types.Array(F8, dimension, "C") for dimension in (1, 2, 3))
# What is only read may be read-only: states and tables are frozen.
IN_F8_1, IN_F8_2, IN_F8_3 = (types.Array(F8, d, "C", readonly=True) for d in (1, 2, 3))
IN_I8_1, IN_I8_2 = (types.Array(I8, dimension, "C", readonly=True) for dimension in (1, 2))

#: Loads are clipped to [0, this], so that finite questions have finite answers.
MOST = 1e12


@njit(F8(F8))
def load_of(value):
    """A load that can be computed with: NaN and negative become 0."""
    if value > 0.0:
        return min(value, MOST)
    return 0.0


@njit(F8(IN_I8_2, I8, F8))
def padded_size(padded, i, running_req):
    """Executed size of a batch; a fraction of a request counts as a whole one."""
    last = padded.shape[1] - 1
    if running_req >= last:
        return max(float(padded[i, last]), running_req)
    return float(padded[i, math.ceil(running_req)])


@njit(types.UniTuple(F8, 2)(TABLES, I8, I8, F8, F8, F8))
def _decode_at(table, i, k, running_req, size_req, kv_tok):
    time_s = decode_s(table[i, k], size_req, kv_tok)
    return time_s, decode_j(table[i, k], time_s, running_req, kv_tok)


@njit(F8(TABLES, I8, I8, I8, F8))
def _above_frac(table, i, n_clocks, k, freq_mhz):
    """How far `freq_mhz` lies from clock k to the next; 0 beyond either end of the ladder."""
    if k + 1 >= n_clocks or not freq_mhz > table[i, k]["clock_mhz"]:
        return 0.0
    step_mhz = table[i, k + 1]["clock_mhz"] - table[i, k]["clock_mhz"]
    return (freq_mhz - table[i, k]["clock_mhz"]) / step_mhz


@njit(types.UniTuple(F8, 3)(TABLES, IN_I8_1, IN_I8_2, I8, F8, F8, F8))
def decode_one(table, n_clocks, padded, i, freq_mhz, running_req, kv_tok):
    """ITL [s], energy [J] and mean power [W] of a decode iteration, linear between clocks."""
    n_req = load_of(running_req)
    size_req = padded_size(padded, i, n_req)
    kv = load_of(kv_tok)
    k = row_down(table[i], n_clocks[i], freq_mhz)
    above = _above_frac(table, i, n_clocks[i], k, freq_mhz)
    time_s, energy_j = _decode_at(table, i, k, n_req, size_req, kv)
    power_w = energy_j / time_s if time_s > 0.0 else 0.0
    if above > 0.0:
        next_s, next_j = _decode_at(table, i, k + 1, n_req, size_req, kv)
        next_w = next_j / next_s if next_s > 0.0 else 0.0
        time_s += above * (next_s - time_s)
        power_w += above * (next_w - power_w)
        energy_j = time_s * power_w
    return time_s, energy_j, power_w


@njit(types.UniTuple(F8, 3)(TABLES, IN_I8_1, I8, F8, F8, F8))
def prefill_one(table, n_clocks, i, freq_mhz, new_tok, square_tok2):
    """Time [s], energy [J] and power [W] of a prefill iteration, linear between clocks."""
    tok = load_of(new_tok)
    tok2 = load_of(square_tok2)
    k = row_down(table[i], n_clocks[i], freq_mhz)
    above = _above_frac(table, i, n_clocks[i], k, freq_mhz)
    time_s = prefill_s(table[i, k], tok, tok2)
    power_w = table[i, k]["prefill_power_w"]
    idle_w = table[i, k]["idle_w"]
    if above > 0.0:
        time_s += above * (prefill_s(table[i, k + 1], tok, tok2) - time_s)
        power_w += above * (table[i, k + 1]["prefill_power_w"] - power_w)
        idle_w += above * (table[i, k + 1]["idle_w"] - idle_w)
    energy_j = time_s * power_w
    if table[i, k]["prefill_req_s"] > 0.0:  # the GPU idles while the host works
        energy_j -= table[i, k]["prefill_req_s"] * (power_w - idle_w)
        power_w = energy_j / time_s
    return time_s, energy_j, power_w


@njit(types.void(TABLES, IN_I8_1, IN_I8_2, IN_I8_1, IN_F8_1, IN_F8_1, IN_F8_1, F8_2))
def decode_many(table, n_clocks, padded, instance, freq_mhz, running_req, kv_tok, out):
    """`decode_one` for each row of the questions, into the rows of `out`."""
    for j in range(len(instance)):
        out[j, 0], out[j, 1], out[j, 2] = decode_one(
            table, n_clocks, padded, instance[j], freq_mhz[j], running_req[j], kv_tok[j]
        )


@njit(types.void(TABLES, IN_I8_1, IN_I8_1, IN_F8_1, IN_F8_1, IN_F8_1, F8_2))
def prefill_many(table, n_clocks, instance, freq_mhz, new_tok, square_tok2, out):
    """`prefill_one` for each row of the questions, into the rows of `out`."""
    for j in range(len(instance)):
        out[j, 0], out[j, 1], out[j, 2] = prefill_one(
            table, n_clocks, instance[j], freq_mhz[j], new_tok[j], square_tok2[j]
        )
