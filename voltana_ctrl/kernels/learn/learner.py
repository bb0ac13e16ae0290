"""Recursive least squares per instance and phase, compiled.

Everything is relative: a record is divided by what the prior profile says of it, so that a
right profile has scales 1 and tilts 0. Each part of a prediction has a scale and a tilt over
the clock (x runs from -1 at the lowest ladder clock to 1 at the highest, in log f)::

    decode time    base (scale, tilt), per request (..), per KV token (..)
    prefill time   base, per token
    decode energy  time x power, the rest
    prefill energy time x power

An iteration that does both takes and costs the sum of a decode and a prefill without its base.
Each of the two models then learns from what the other leaves, the less the more uncertain the
other is: the Kalman update of both at once, without the correlation that it would create.

Decode time is learned once per *tile*, a candidate for the staircase of executed batch sizes:
0 is the profile's own, t > 0 rounds up to multiples of t.
"""

import math

import numpy as np
from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import batch_j, empty_tok, row_nearest
from voltana_ctrl.kernels.layout import PROFILE_DTYPE
from voltana_ctrl.kernels.learn.predictor import (
    F8,
    F8_1,
    F8_2,
    F8_3,
    I8,
    IN_F8_1,
    IN_F8_3,
    IN_I8_1,
    IN_I8_2,
    MOST,
    TABLES,
    padded_size,
)
from voltana_ctrl.kernels.learn.rls import (
    LEAST_ERROR,
    N_TERMS,
    SCORE_FRAC2,
    doubt,
    learn_guarded,
    learn_one,
    note_alarm,
    restart,
    said,
)

F8_4, I8_1 = types.Array(F8, 4, "C"), types.Array(I8, 1, "C")

#: Candidate staircases: the profile's own, none, and fixed tiles.
TILES_REQ = (0, 1, 8, 16, 32, 64, 128, 256)
N_TILES = len(TILES_REQ)
#: Models of an instance: a decode time per tile, then these.
PREFILL_TIME, DECODE_ENERGY, PREFILL_ENERGY = N_TILES, N_TILES + 1, N_TILES + 2
N_MODELS = N_TILES + 3

# What is counted per instance
LEARNED, UNUSED, REFUSED, LAST_MHZ = range(4)
N_COUNTS = 4

#: How much smaller the discounted squared errors of a new tile must be: over 100 records, a
#: likelihood ratio of some e^12 for Gaussian errors.
BETTER = 0.8
#: Variance of an iteration that does both about the sum of its parts, in that of a record about
#: the law: that the parts add up is a simplification, so such a record counts for less.
MIXED = 9.0
#: A record this many times off the prior is no measurement.
ABSURD = 30.0


@njit(F8(F8, F8, F8))
def tilt_of(freq_mhz, low_mhz, high_mhz):
    """Where a clock lies on its ladder: -1 at the lowest, 1 at the highest, in log f."""
    if high_mhz <= low_mhz:
        return 0.0
    at = 2.0 * math.log(freq_mhz / low_mhz) / math.log(high_mhz / low_mhz) - 1.0
    return min(max(at, -1.0), 1.0)


@njit(F8(IN_I8_2, I8, I8, F8))
def executed_size(padded, i, tile, running_req):
    """Executed size of a batch under candidate staircase `tile`."""
    width = TILES_REQ[tile]
    if width == 0:
        return padded_size(padded, i, running_req)
    return math.ceil(running_req / width) * width


@njit(types.void(F8_1, I8, F8, F8))
def _part(phi, part, share_frac, tilt):
    phi[2 * part] = share_frac
    phi[2 * part + 1] = share_frac * tilt


@njit(F8(TABLES, I8, I8, F8, F8, F8, F8, F8_1))
def _decode_parts(table, i, k, tilt, size_req, kv_tok, tok, phi):
    """Prior time of a decode iteration, beside `tok` of prompts [s]; its parts' shares into `phi`.

    What prompts take themselves is not in it, but slots that stay empty in the tiles they share.
    """
    base_s = table[i, k]["decode_base_s"]
    req_s = table[i, k]["decode_req_s"] * size_req
    kv_s = table[i, k]["decode_kv_s"] * kv_tok
    roof_base_s = table[i, k]["decode_roof_base_s"]
    roof_s = table[i, k]["decode_roof_s"] * size_req
    roof_s += table[i, k]["prefill_tok_s"] * empty_tok(table[i, k], size_req + tok)
    if roof_base_s + roof_s > base_s + req_s:
        # Computing, which grows with the batch, takes longer than all else but KV.
        base_s = roof_base_s
        req_s = roof_s
    total_s = base_s + req_s + kv_s
    if total_s <= table[i, k]["decode_floor_s"]:
        # A floor is a matter of launching, as the base is: they share a scale.
        base_s = total_s = table[i, k]["decode_floor_s"]
        req_s = kv_s = 0.0
    # What the host does is a matter of launching, too.
    base_s += table[i, k]["decode_host_s"]
    total_s += table[i, k]["decode_host_s"]
    if not total_s > 0.0:
        return 0.0
    _part(phi, 0, base_s / total_s, tilt)
    _part(phi, 1, req_s / total_s, tilt)
    _part(phi, 2, kv_s / total_s, tilt)
    return total_s


@njit(F8(TABLES, I8, I8, F8, F8, F8, F8_1))
def _prefill_parts(table, i, k, tilt, tok, n_req, phi):
    """Prior time of the prefill of an iteration [s]; its parts' shares into `phi`."""
    base_s = table[i, k]["prefill_base_s"] if n_req == 0.0 else 0.0
    base_s += table[i, k]["prefill_req_s"]
    slots_tok = tok + empty_tok(table[i, k], tok) if n_req == 0.0 else tok
    tok_s = table[i, k]["prefill_tok_s"] * slots_tok
    if not base_s + tok_s > 0.0:
        return 0.0
    phi[:] = 0.0
    _part(phi, 0, base_s / (base_s + tok_s), tilt)
    _part(phi, 1, tok_s / (base_s + tok_s), tilt)
    return base_s + tok_s


@njit(F8(TABLES, IN_I8_1, IN_I8_2, I8, F8, F8, F8, F8, F8_3, I8_1, F8_1))
def _expected_s(table, n_clocks, padded, i, freq_mhz, n_req, tok, kv_tok, theta, chosen, phi):
    """Time of an iteration at a clock, as learned so far [s]."""
    k = row_nearest(table[i], n_clocks[i], freq_mhz)
    tilt = tilt_of(freq_mhz, table[i, 0]["clock_mhz"], table[i, n_clocks[i] - 1]["clock_mhz"])
    total_s = 0.0
    if n_req > 0.0:
        size_req = executed_size(padded, i, chosen[i], n_req)
        prior_s = _decode_parts(table, i, k, tilt, size_req, kv_tok, tok, phi)
        total_s = prior_s * said(theta[i, chosen[i]], phi)
    if tok > 0.0:
        prior_s = _prefill_parts(table, i, k, tilt, tok, n_req, phi)
        total_s += prior_s * said(theta[i, PREFILL_TIME], phi)
    return total_s


@njit(types.boolean(F8, F8))
def _sane(value, prior):
    return prior > 0.0 and prior / ABSURD < value < prior * ABSURD


@njit(
    types.void(
        TABLES, IN_I8_2, I8, I8, F8, F8, F8, F8, F8, F8, F8, F8_3, F8_4, F8_3, I8_1, F8, F8_1
    ))  # fmt: skip
def _learn_tiles(
    table, padded, i, k, tilt, wall_s, n_req, tok, kv_tok, beside_s, beside_sd_s,
    theta, cov, notes, chosen, forget, phi,
):  # fmt: skip
    """Learn the decode time under each staircase, and choose one.

    `beside_s` is what the rest of the iteration should take, `beside_sd_s` the spread of the
    record about that, in units of NOISE; both are 0 where the iteration does nothing else.
    """
    alarm = False
    best = chosen[i]
    for tile in range(N_TILES):
        size_req = executed_size(padded, i, tile, n_req)
        unit_s = _decode_parts(table, i, k, tilt, size_req, kv_tok, tok, phi)
        if beside_sd_s > 0.0:
            for a in range(N_TERMS):
                phi[a] *= unit_s / beside_sd_s
            unit_s = beside_sd_s
        drifted = learn_one(
            theta[i, tile], cov[i, tile], phi, notes[i, tile], wall_s / unit_s,
            beside_s / unit_s, forget,
        )  # fmt: skip
        if tile == chosen[i]:
            alarm = drifted
        if notes[i, tile, SCORE_FRAC2] < notes[i, best, SCORE_FRAC2]:
            best = tile
    least = LEAST_ERROR * LEAST_ERROR  # below this nobody is better
    if notes[i, best, SCORE_FRAC2] + least < BETTER * (notes[i, chosen[i], SCORE_FRAC2] + least):
        chosen[i] = best
    if alarm:
        for tile in range(N_TILES):
            restart(cov[i, tile])
            note_alarm(notes[i, tile])


@njit(I8(TABLES, IN_I8_2, I8, I8, F8, F8, F8, F8, F8, F8_3, F8_4, F8_3, I8_1, F8, F8_1))
def _learn_decode(
    table, padded, i, k, tilt, wall_s, n_req, kv_tok, energy_j,
    theta, cov, notes, chosen, forget, phi,
):  # fmt: skip
    """Learn from a pure decode iteration; 0 if it is absurd."""
    size_req = executed_size(padded, i, chosen[i], n_req)
    if not _sane(wall_s, _decode_parts(table, i, k, tilt, size_req, kv_tok, 0.0, phi)):
        return 0
    _learn_tiles(
        table, padded, i, k, tilt, wall_s, n_req, 0.0, kv_tok, 0.0, 0.0, theta, cov, notes,
        chosen, forget, phi,
    )  # fmt: skip
    held_j = wall_s * table[i, k]["decode_power_w"]
    rest_j = batch_j(table[i, k], n_req, kv_tok)
    if _sane(energy_j, held_j + rest_j):
        phi[:] = 0.0
        _part(phi, 0, held_j / (held_j + rest_j), tilt)
        _part(phi, 1, rest_j / (held_j + rest_j), tilt)
        m = DECODE_ENERGY
        learn_guarded(
            theta[i, m], cov[i, m], phi, notes[i, m], energy_j / (held_j + rest_j), 0.0, forget
        )
    return 1


@njit(I8(TABLES, I8, I8, F8, F8, F8, F8, F8_3, F8_4, F8_3, F8, F8_1))
def _learn_prefill(table, i, k, tilt, wall_s, tok, energy_j, theta, cov, notes, forget, phi):
    """Learn from a pure prefill iteration; 0 if it is absurd."""
    prior_s = _prefill_parts(table, i, k, tilt, tok, 0.0, phi)
    if not _sane(wall_s, prior_s):
        return 0
    m = PREFILL_TIME
    learn_guarded(theta[i, m], cov[i, m], phi, notes[i, m], wall_s / prior_s, 0.0, forget)
    prior_j = wall_s * table[i, k]["prefill_power_w"]
    if _sane(energy_j, prior_j):
        phi[:] = 0.0
        _part(phi, 0, 1.0, tilt)
        m = PREFILL_ENERGY
        learn_guarded(theta[i, m], cov[i, m], phi, notes[i, m], energy_j / prior_j, 0.0, forget)
    return 1


@njit(I8(TABLES, IN_I8_2, I8, I8, F8, F8, F8, F8, F8, F8, F8_3, F8_4, F8_3, I8_1, F8, F8_1, F8_1))
def _learn_mixed(
    table, padded, i, k, tilt, wall_s, n_req, tok, kv_tok, energy_j,
    theta, cov, notes, chosen, forget, phi, other,
):  # fmt: skip
    """Learn from an iteration that decodes and prefills; 0 if it is absurd."""
    size_req = executed_size(padded, i, chosen[i], n_req)
    decode_s = _decode_parts(table, i, k, tilt, size_req, kv_tok, tok, phi)
    prefill_s = _prefill_parts(table, i, k, tilt, tok, n_req, other)
    if not (decode_s > 0.0 and prefill_s > 0.0 and _sane(wall_s, decode_s + prefill_s)):
        return 0
    # What each says, and the variance of the record about it, before either learns.
    c, m = chosen[i], PREFILL_TIME
    noise_s2 = MIXED * (decode_s + prefill_s) ** 2
    said_d_s, said_p_s = decode_s * said(theta[i, c], phi), prefill_s * said(theta[i, m], other)
    about_d_s = math.sqrt(noise_s2 + decode_s**2 * doubt(cov[i, c], phi))
    about_p_s = math.sqrt(noise_s2 + prefill_s**2 * doubt(cov[i, m], other))
    other *= prefill_s / about_d_s
    _learn_tiles(
        table, padded, i, k, tilt, wall_s, n_req, tok, kv_tok, said_p_s, about_p_s,
        theta, cov, notes, chosen, forget, phi,
    )  # fmt: skip
    learn_guarded(
        theta[i, m],
        cov[i, m],
        other,
        notes[i, m],
        wall_s / about_d_s,
        said_d_s / about_d_s,
        forget,
    )
    # Power: the time is shared as it was expected.
    decode_frac = said_d_s / (said_d_s + said_p_s)
    held_j = decode_frac * wall_s * table[i, k]["decode_power_w"]
    rest_j = batch_j(table[i, k], n_req, kv_tok)
    prefill_w = table[i, k]["prefill_power_w"] + table[i, k]["prefill_beside_w"]
    prefill_j = (1.0 - decode_frac) * wall_s * prefill_w
    if not (prefill_j > 0.0 and _sane(energy_j, held_j + rest_j + prefill_j)):
        return 1
    d, m = DECODE_ENERGY, PREFILL_ENERGY
    phi[:] = 0.0
    _part(phi, 0, held_j, tilt)
    _part(phi, 1, rest_j, tilt)
    other[:] = 0.0
    _part(other, 0, prefill_j, tilt)
    noise_j2 = MIXED * (held_j + rest_j + prefill_j) ** 2
    said_d_j, said_p_j = said(theta[i, d], phi), said(theta[i, m], other)
    about_d_j = math.sqrt(noise_j2 + doubt(cov[i, d], phi))
    about_p_j = math.sqrt(noise_j2 + doubt(cov[i, m], other))
    phi /= about_p_j
    other /= about_d_j
    learn_guarded(
        theta[i, d], cov[i, d], phi, notes[i, d], energy_j / about_p_j, said_p_j / about_p_j, forget
    )
    learn_guarded(
        theta[i, m], cov[i, m], other, notes[i, m], energy_j / about_d_j, said_d_j / about_d_j,
        forget,
    )  # fmt: skip
    return 1


@njit(
    types.void(
        TABLES, IN_I8_1, IN_I8_2, IN_I8_1, *(IN_F8_1,) * 6,
        F8_3, F8_4, F8_3, I8_1, F8_2, F8,
    ),
    allocates=True,
)  # fmt: skip
def learn(
    table, n_clocks, padded, instance, wall_s, freq_mhz, batch_req, prefill_tok, kv_tok, energy_j,
    theta, cov, notes, chosen, counts, forget,
):  # fmt: skip
    """Learn from iteration records, in order, in place."""
    phi, other = np.zeros(N_TERMS), np.zeros(N_TERMS)
    for j in range(len(instance)):
        i = instance[j]
        if i < 0 or i >= len(n_clocks):
            continue
        n_req, tok, kv = batch_req[j], prefill_tok[j], kv_tok[j]
        readable = (
            0.0 < wall_s[j] < MOST
            and 0.0 < freq_mhz[j] < MOST
            and 0.0 <= n_req < MOST
            and 0.0 <= tok < MOST
            and 0.0 <= kv < MOST
        )
        if not readable:
            counts[i, REFUSED] += 1.0
            continue
        before_mhz, at_mhz = counts[i, LAST_MHZ], freq_mhz[j]
        counts[i, LAST_MHZ] = at_mhz
        if (n_req == 0.0 and tok == 0.0) or before_mhz == 0.0:
            counts[i, UNUSED] += 1.0
            continue
        used_j = energy_j[j]
        if before_mhz != at_mhz:
            # It ran at the one clock, at the other, or at both in turn: which is not known.
            # So it says something only where it took longer, or less, than either would.
            slow_mhz, fast_mhz = min(before_mhz, at_mhz), max(before_mhz, at_mhz)
            longest_s = _expected_s(
                table, n_clocks, padded, i, slow_mhz, n_req, tok, kv, theta, chosen, phi
            )
            shortest_s = _expected_s(
                table, n_clocks, padded, i, fast_mhz, n_req, tok, kv, theta, chosen, phi
            )
            if shortest_s <= wall_s[j] <= longest_s:
                counts[i, UNUSED] += 1.0
                continue
            at_mhz = slow_mhz if wall_s[j] > longest_s else fast_mhz
            used_j = 0.0
        k = row_nearest(table[i], n_clocks[i], at_mhz)
        tilt = tilt_of(at_mhz, table[i, 0]["clock_mhz"], table[i, n_clocks[i] - 1]["clock_mhz"])
        if n_req > 0.0 and tok > 0.0:
            used = _learn_mixed(
                table, padded, i, k, tilt, wall_s[j], n_req, tok, kv, used_j,
                theta, cov, notes, chosen, forget, phi, other,
            )  # fmt: skip
        elif n_req > 0.0:
            used = _learn_decode(
                table, padded, i, k, tilt, wall_s[j], n_req, kv, used_j,
                theta, cov, notes, chosen, forget, phi,
            )  # fmt: skip
        else:
            used = _learn_prefill(
                table, i, k, tilt, wall_s[j], tok, used_j, theta, cov, notes, forget, phi
            )
        counts[i, LEARNED if used == 1 else REFUSED] += 1.0


# Here columns of equal kind are treated alike, so that coefficients are one float64 array
# ``table[instance, clock, column]``: the records of PROFILE_DTYPE seen as plain numbers.
(
    CLOCK_MHZ,
    IDLE_W,
    DECODE_HOST_S,
    DECODE_BASE_S,
    DECODE_REQ_S,
    DECODE_KV_S,
    DECODE_FLOOR_S,
    DECODE_ROOF_S,
    DECODE_ROOF_BASE_S,
    DECODE_TILE_TOK,
    DECODE_POWER_W,
    DECODE_ITER_J,
    DECODE_REQ_J,
    DECODE_KV_J,
    PREFILL_REQ_S,
    PREFILL_BASE_S,
    PREFILL_TOK_S,
    PREFILL_TOK2_S,
    PREFILL_POWER_W,
    PREFILL_BESIDE_W,
) = range(len(PROFILE_DTYPE.names or ()))


@njit(types.void(IN_F8_3, I8, I8, I8, IN_F8_1, I8, F8, F8_3))
def _scaled(table, i, k, column, theta, part, tilt, out):
    scale = theta[2 * part] + theta[2 * part + 1] * tilt
    out[i, k, column] = table[i, k, column] * scale


@njit(types.void(IN_F8_3, IN_I8_1, IN_F8_3, IN_I8_1, F8_3), allocates=True)
def learned_table(table, n_clocks, theta, chosen, out):
    """Coefficients as learned. Times never rise with the clock, powers never fall."""
    for i in range(len(n_clocks)):
        last = n_clocks[i] - 1
        low_mhz, high_mhz = table[i, 0, CLOCK_MHZ], table[i, last, CLOCK_MHZ]
        decode = theta[i, chosen[i]]
        prefill = theta[i, PREFILL_TIME]
        decode_power = theta[i, DECODE_ENERGY]
        prefill_power = theta[i, PREFILL_ENERGY]
        for k in range(last + 1):
            tilt = tilt_of(table[i, k, CLOCK_MHZ], low_mhz, high_mhz)
            out[i, k, CLOCK_MHZ] = table[i, k, CLOCK_MHZ]
            out[i, k, IDLE_W] = table[i, k, IDLE_W]
            out[i, k, DECODE_TILE_TOK] = table[i, k, DECODE_TILE_TOK]
            _scaled(table, i, k, DECODE_HOST_S, decode, 0, tilt, out)
            _scaled(table, i, k, DECODE_BASE_S, decode, 0, tilt, out)
            _scaled(table, i, k, DECODE_FLOOR_S, decode, 0, tilt, out)
            _scaled(table, i, k, DECODE_REQ_S, decode, 1, tilt, out)
            _scaled(table, i, k, DECODE_ROOF_S, decode, 1, tilt, out)
            _scaled(table, i, k, DECODE_ROOF_BASE_S, decode, 0, tilt, out)
            _scaled(table, i, k, DECODE_KV_S, decode, 2, tilt, out)
            _scaled(table, i, k, PREFILL_REQ_S, prefill, 0, tilt, out)
            _scaled(table, i, k, PREFILL_BASE_S, prefill, 0, tilt, out)
            _scaled(table, i, k, PREFILL_TOK_S, prefill, 1, tilt, out)
            _scaled(table, i, k, PREFILL_TOK2_S, prefill, 1, tilt, out)
            _scaled(table, i, k, DECODE_POWER_W, decode_power, 0, tilt, out)
            _scaled(table, i, k, DECODE_ITER_J, decode_power, 1, tilt, out)
            _scaled(table, i, k, DECODE_REQ_J, decode_power, 1, tilt, out)
            _scaled(table, i, k, DECODE_KV_J, decode_power, 1, tilt, out)
            _scaled(table, i, k, PREFILL_POWER_W, prefill_power, 0, tilt, out)
            _scaled(table, i, k, PREFILL_BESIDE_W, prefill_power, 0, tilt, out)
        for k in range(last - 1, -1, -1):
            for column in range(DECODE_HOST_S, DECODE_ROOF_BASE_S + 1):
                out[i, k, column] = max(out[i, k, column], out[i, k + 1, column])
            for column in range(PREFILL_REQ_S, PREFILL_TOK2_S + 1):
                out[i, k, column] = max(out[i, k, column], out[i, k + 1, column])
        for k in range(1, last + 1):
            for column in range(DECODE_POWER_W, DECODE_KV_J + 1):
                out[i, k, column] = max(out[i, k, column], out[i, k - 1, column])
            out[i, k, PREFILL_POWER_W] = max(
                out[i, k, PREFILL_POWER_W], out[i, k - 1, PREFILL_POWER_W]
            )
        for k in range(last + 1, table.shape[1]):
            out[i, k] = out[i, last]
