"""Recursive least squares per instance and phase, compiled.

Everything is relative: a record is divided by what the prior profile says of it, so that a
right profile has scales 1 and tilts 0. Each part of a prediction has a scale and a tilt over
the clock (x runs from -1 at the lowest ladder clock to 1 at the highest, in log f)::

    decode time    base (scale, tilt), per request (..), per KV token (..)
    prefill time   base, per token
    decode energy  time x power, the rest
    prefill energy time x power

Decode time is learned once per *tile*, a candidate for the staircase of executed batch sizes:
0 is the profile's own, t > 0 rounds up to multiples of t.
"""

import math

import numpy as np
from numba import njit, types

from voltana_ctrl._kernels.predict import (
    CLOCK_MHZ,
    DECODE_BASE_S,
    DECODE_FLOOR_S,
    DECODE_ITER_J,
    DECODE_KV_J,
    DECODE_KV_S,
    DECODE_POWER_W,
    DECODE_REQ_J,
    DECODE_REQ_S,
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
    PREFILL_BASE_S,
    PREFILL_POWER_W,
    PREFILL_TOK2_S,
    PREFILL_TOK_S,
    padded_size,
)

F8_4, I8_1 = types.Array(F8, 4, "C"), types.Array(I8, 1, "C")

#: Scale and tilt of up to three parts.
N_TERMS = 6
#: Candidate staircases: the profile's own, none, and fixed tiles.
TILES_REQ = (0, 1, 8, 16, 32, 64, 128, 256)
N_TILES = len(TILES_REQ)
#: Models of an instance: a decode time per tile, then these.
PREFILL_TIME, DECODE_ENERGY, PREFILL_ENERGY = N_TILES, N_TILES + 1, N_TILES + 2
N_MODELS = N_TILES + 3

# What is noted per model
(
    ERROR_FRAC,  # discounted mean of the absolute error, one step ahead
    SCORE_FRAC2,  # the same of its square
    CUSUM_UP,  # drift detectors
    CUSUM_DOWN,
    SINCE,  # records since the last alarm (or the start)
    ALARMS,
) = range(6)
N_NOTES = 6

# What is counted per instance
LEARNED, UNUSED, REFUSED, LAST_MHZ = range(4)
N_COUNTS = 4

#: Prior belief, as standard deviations of scales and tilts: what all parts share, and each.
SHARED_SCALE, OWN_SCALE, SHARED_TILT, OWN_TILT = 0.5, 0.3, 0.15, 0.1
#: Standard deviation of a record about the law, relative; covariances are in units of its square.
NOISE = 0.01
#: A physical coefficient is not further than this factor from the profile's; a tilt is at most
#: this part of its scale.
FARTHEST, STEEPEST = 12.0, 0.9
#: An error counts as at most this many mean errors.
GATE = 5.0
#: Discount of the mean error, and its limits.
ERROR_RATE, LEAST_ERROR, FIRST_ERROR = 0.05, 0.002, 0.05
#: Discount of the squared errors by which tiles are compared, and how much smaller those of a
#: new tile must be: over 100 records, a likelihood ratio of some e^12 for Gaussian errors.
SCORE_RATE, BETTER = 0.01, 0.8
#: Drift detector: mean errors of bias that are tolerated, and their sum that is an alarm.
ALLOWANCE, ALARM = 1.0, 25.0
#: Added to the diagonal at each update: keeps the covariance positive definite in floating point.
RIPPLE = 1e-6
#: Never less certain than the prior: its trace.
MOST_TRACE = (
    (SHARED_SCALE**2 + OWN_SCALE**2 + SHARED_TILT**2 + OWN_TILT**2) * (N_TERMS / 2) / NOISE**2
)
#: A record this many times off the prior is no measurement.
ABSURD = 30.0


@njit(types.void(F8_2), cache=True)
def restart(cov):
    """The prior: covariance of a fresh model; scales of parts move together."""
    for a in range(N_TERMS):
        for b in range(N_TERMS):
            value = 0.0
            if a % 2 == b % 2:
                shared, own = SHARED_SCALE, OWN_SCALE
                if a % 2 == 1:
                    shared, own = SHARED_TILT, OWN_TILT
                value = shared * shared
                if a == b:
                    value += own * own
            cov[a, b] = value / (NOISE * NOISE)


@njit(types.void(F8_1), cache=True)
def keep_physical(theta):
    """Scales within a factor of the profile, tilts that leave every coefficient positive."""
    for a in range(0, N_TERMS, 2):
        scale = min(max(theta[a], 1.0 / FARTHEST), FARTHEST)
        theta[a] = scale
        theta[a + 1] = min(max(theta[a + 1], -STEEPEST * scale), STEEPEST * scale)


@njit(F8(F8_1, F8_2, F8_1, F8, F8, F8), cache=True)
def rls_step(theta, cov, phi, target, forget, limit):
    """One update in place; returns the error before it.

    Recursive least squares with directional forgetting (Kulhavy; Bittanti, Bolzern & Campi,
    Automatica 26 (1990)): old information is discounted only along `phi`, so that what a
    record says nothing about is kept and the covariance cannot wind up. An error counts as at
    most `limit` times the spread that the covariance allows for it.
    """
    gain = np.empty(N_TERMS)
    spread = 0.0
    error = target
    for a in range(N_TERMS):
        total = 0.0
        for b in range(N_TERMS):
            total += cov[a, b] * phi[b]
        gain[a] = total
        spread += phi[a] * total
        error -= theta[a] * phi[a]
    if not spread > 1e-9:
        return error
    counted = min(max(error, -limit), limit)
    step = counted / (1.0 + spread)
    # Positive definite: 1 - shrink * spread = forgotten / (1 + spread) > 0 in every case.
    shrink = (forget - (1.0 - forget) / spread) / (forget * (1.0 + spread))
    trace = 0.0
    for a in range(N_TERMS):
        theta[a] += gain[a] * step
        for b in range(a):
            value = cov[a, b] - shrink * gain[a] * gain[b]
            cov[a, b] = value
            cov[b, a] = value
        cov[a, a] += RIPPLE - shrink * gain[a] * gain[a]
        trace += cov[a, a]
    if trace > MOST_TRACE:
        for a in range(N_TERMS):
            for b in range(N_TERMS):
                cov[a, b] *= MOST_TRACE / trace
    keep_physical(theta)
    return error


@njit(types.boolean(F8_1, F8_2, F8_1, F8_1, F8, F8), cache=True)
def _learn_one(theta, cov, phi, notes, target, forget):
    """Gate, update, and note the error; True if the error says that the machine drifted."""
    predicted = 0.0
    for a in range(N_TERMS):
        predicted += theta[a] * phi[a]
    scale = max(notes[ERROR_FRAC], LEAST_ERROR)
    error = rls_step(theta, cov, phi, target, forget, GATE * scale * predicted) / predicted
    off = min(abs(error), 1.0)
    notes[SCORE_FRAC2] += SCORE_RATE * (off * off - notes[SCORE_FRAC2])
    notes[ERROR_FRAC] += ERROR_RATE * (min(off, GATE * scale) - notes[ERROR_FRAC])
    notes[SINCE] += 1.0
    z = min(max(error / scale, -GATE), GATE)
    notes[CUSUM_UP] = max(0.0, notes[CUSUM_UP] + z - ALLOWANCE)
    notes[CUSUM_DOWN] = max(0.0, notes[CUSUM_DOWN] - z - ALLOWANCE)
    return notes[CUSUM_UP] > ALARM or notes[CUSUM_DOWN] > ALARM


@njit(types.void(F8_1), cache=True)
def _note_alarm(notes):
    notes[CUSUM_UP] = 0.0
    notes[CUSUM_DOWN] = 0.0
    notes[SINCE] = 0.0
    notes[ALARMS] += 1.0


@njit(F8(F8, F8, F8), cache=True)
def tilt_of(freq_mhz, low_mhz, high_mhz):
    """Where a clock lies on its ladder: -1 at the lowest, 1 at the highest, in log f."""
    if high_mhz <= low_mhz:
        return 0.0
    at = 2.0 * math.log(freq_mhz / low_mhz) / math.log(high_mhz / low_mhz) - 1.0
    return min(max(at, -1.0), 1.0)


@njit(F8(IN_I8_2, I8, I8, F8), cache=True)
def executed_size(padded, i, tile, running_req):
    """Executed size of a batch under candidate staircase `tile`."""
    width = TILES_REQ[tile]
    if width == 0:
        return padded_size(padded, i, running_req)
    return math.ceil(running_req / width) * width


@njit(I8(IN_F8_3, I8, I8, F8), cache=True)
def _nearest(table, i, n_clocks, freq_mhz):
    low = 0
    high = n_clocks - 1
    while low < high:
        middle = (low + high) // 2
        if 0.5 * (table[i, middle, CLOCK_MHZ] + table[i, middle + 1, CLOCK_MHZ]) >= freq_mhz:
            high = middle
        else:
            low = middle + 1
    return low


@njit(types.void(F8_1, I8, F8, F8), cache=True)
def _part(phi, part, share_frac, tilt):
    phi[2 * part] = share_frac
    phi[2 * part + 1] = share_frac * tilt


@njit(F8(IN_F8_3, I8, I8, F8, F8, F8, F8_1), cache=True)
def _decode_parts(table, i, k, tilt, size_req, kv_tok, phi):
    """Prior time of a decode iteration [s]; its parts' shares into `phi`."""
    base_s = table[i, k, DECODE_BASE_S]
    req_s = table[i, k, DECODE_REQ_S] * size_req
    kv_s = table[i, k, DECODE_KV_S] * kv_tok
    total_s = base_s + req_s + kv_s
    if total_s <= table[i, k, DECODE_FLOOR_S]:
        # A floor is a matter of launching, as the base is: they share a scale.
        base_s = total_s = table[i, k, DECODE_FLOOR_S]
        req_s = kv_s = 0.0
    if not total_s > 0.0:
        return 0.0
    _part(phi, 0, base_s / total_s, tilt)
    _part(phi, 1, req_s / total_s, tilt)
    _part(phi, 2, kv_s / total_s, tilt)
    return total_s


@njit(F8(IN_F8_3, I8, I8, F8, F8, F8_1), cache=True)
def _prefill_parts(table, i, k, tilt, tok, phi):
    """Prior time of a prefill iteration [s]; its parts' shares into `phi`."""
    base_s = table[i, k, PREFILL_BASE_S]
    tok_s = table[i, k, PREFILL_TOK_S] * tok
    if not base_s + tok_s > 0.0:
        return 0.0
    phi[:] = 0.0
    _part(phi, 0, base_s / (base_s + tok_s), tilt)
    _part(phi, 1, tok_s / (base_s + tok_s), tilt)
    return base_s + tok_s


@njit(
    F8(IN_F8_3, IN_I8_1, IN_I8_2, I8, F8, F8, F8, F8, F8_3, I8_1, F8_1),
    cache=True,
)
def _expected_s(table, n_clocks, padded, i, freq_mhz, n_req, tok, kv_tok, theta, chosen, phi):
    """Time of a pure iteration at a clock, as learned so far [s]."""
    k = _nearest(table, i, n_clocks[i], freq_mhz)
    tilt = tilt_of(freq_mhz, table[i, 0, CLOCK_MHZ], table[i, n_clocks[i] - 1, CLOCK_MHZ])
    if n_req > 0.0:
        size_req = executed_size(padded, i, chosen[i], n_req)
        prior_s = _decode_parts(table, i, k, tilt, size_req, kv_tok, phi)
        terms = theta[i, chosen[i]]
    else:
        prior_s = _prefill_parts(table, i, k, tilt, tok, phi)
        terms = theta[i, PREFILL_TIME]
    total = 0.0
    for a in range(N_TERMS):
        total += terms[a] * phi[a]
    return prior_s * total


@njit(types.boolean(F8, F8), cache=True)
def _sane(value, prior):
    return prior > 0.0 and prior / ABSURD < value < prior * ABSURD


@njit(
    I8(IN_F8_3, IN_I8_2, I8, I8, F8, F8, F8, F8, F8, F8_3, F8_4, F8_3, I8_1, F8, F8_1),
    cache=True,
)
def _learn_decode(
    table, padded, i, k, tilt, wall_s, n_req, kv_tok, energy_j,
    theta, cov, notes, chosen, forget, phi,
):  # fmt: skip
    """Learn from a pure decode iteration; 0 if it is absurd."""
    size_req = executed_size(padded, i, chosen[i], n_req)
    if not _sane(wall_s, _decode_parts(table, i, k, tilt, size_req, kv_tok, phi)):
        return 0
    alarm = False
    best = chosen[i]
    for tile in range(N_TILES):
        size_req = executed_size(padded, i, tile, n_req)
        prior_s = _decode_parts(table, i, k, tilt, size_req, kv_tok, phi)
        drifted = _learn_one(
            theta[i, tile], cov[i, tile], phi, notes[i, tile], wall_s / prior_s, forget
        )
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
            _note_alarm(notes[i, tile])
    held_j = wall_s * table[i, k, DECODE_POWER_W]
    rest_j = (
        table[i, k, DECODE_ITER_J]
        + table[i, k, DECODE_REQ_J] * n_req
        + table[i, k, DECODE_KV_J] * kv_tok
    )
    if _sane(energy_j, held_j + rest_j):
        phi[:] = 0.0
        _part(phi, 0, held_j / (held_j + rest_j), tilt)
        _part(phi, 1, rest_j / (held_j + rest_j), tilt)
        m = DECODE_ENERGY
        if _learn_one(
            theta[i, m], cov[i, m], phi, notes[i, m], energy_j / (held_j + rest_j), forget
        ):
            restart(cov[i, m])
            _note_alarm(notes[i, m])
    return 1


@njit(
    I8(IN_F8_3, I8, I8, F8, F8, F8, F8, F8_3, F8_4, F8_3, F8, F8_1),
    cache=True,
)
def _learn_prefill(table, i, k, tilt, wall_s, tok, energy_j, theta, cov, notes, forget, phi):
    """Learn from a pure prefill iteration; 0 if it is absurd."""
    prior_s = _prefill_parts(table, i, k, tilt, tok, phi)
    if not _sane(wall_s, prior_s):
        return 0
    m = PREFILL_TIME
    if _learn_one(theta[i, m], cov[i, m], phi, notes[i, m], wall_s / prior_s, forget):
        restart(cov[i, m])
        _note_alarm(notes[i, m])
    prior_j = wall_s * table[i, k, PREFILL_POWER_W]
    if _sane(energy_j, prior_j):
        phi[:] = 0.0
        _part(phi, 0, 1.0, tilt)
        m = PREFILL_ENERGY
        if _learn_one(theta[i, m], cov[i, m], phi, notes[i, m], energy_j / prior_j, forget):
            restart(cov[i, m])
            _note_alarm(notes[i, m])
    return 1


@njit(
    types.void(
        IN_F8_3, IN_I8_1, IN_I8_2, IN_I8_1, *(IN_F8_1,) * 6,
        F8_3, F8_4, F8_3, I8_1, F8_2, F8,
    ),
    cache=True,
)  # fmt: skip
def learn(
    table, n_clocks, padded, instance, wall_s, freq_mhz, batch_req, prefill_tok, kv_tok, energy_j,
    theta, cov, notes, chosen, counts, forget,
):  # fmt: skip
    """Learn from iteration records, in order, in place."""
    phi = np.zeros(N_TERMS)
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
        if (n_req > 0.0) == (tok > 0.0) or before_mhz == 0.0:
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
        k = _nearest(table, i, n_clocks[i], at_mhz)
        tilt = tilt_of(at_mhz, table[i, 0, CLOCK_MHZ], table[i, n_clocks[i] - 1, CLOCK_MHZ])
        if n_req > 0.0:
            used = _learn_decode(
                table, padded, i, k, tilt, wall_s[j], n_req, kv, used_j,
                theta, cov, notes, chosen, forget, phi,
            )  # fmt: skip
        else:
            used = _learn_prefill(
                table, i, k, tilt, wall_s[j], tok, used_j, theta, cov, notes, forget, phi
            )
        counts[i, LEARNED if used == 1 else REFUSED] += 1.0


@njit(types.void(IN_F8_3, I8, I8, I8, IN_F8_1, I8, F8, F8_3), cache=True)
def _scaled(table, i, k, column, theta, part, tilt, out):
    scale = theta[2 * part] + theta[2 * part + 1] * tilt
    out[i, k, column] = table[i, k, column] * scale


@njit(types.void(IN_F8_3, IN_I8_1, IN_F8_3, IN_I8_1, F8_3), cache=True)
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
            _scaled(table, i, k, DECODE_BASE_S, decode, 0, tilt, out)
            _scaled(table, i, k, DECODE_FLOOR_S, decode, 0, tilt, out)
            _scaled(table, i, k, DECODE_REQ_S, decode, 1, tilt, out)
            _scaled(table, i, k, DECODE_KV_S, decode, 2, tilt, out)
            _scaled(table, i, k, PREFILL_BASE_S, prefill, 0, tilt, out)
            _scaled(table, i, k, PREFILL_TOK_S, prefill, 1, tilt, out)
            _scaled(table, i, k, PREFILL_TOK2_S, prefill, 1, tilt, out)
            _scaled(table, i, k, DECODE_POWER_W, decode_power, 0, tilt, out)
            _scaled(table, i, k, DECODE_ITER_J, decode_power, 1, tilt, out)
            _scaled(table, i, k, DECODE_REQ_J, decode_power, 1, tilt, out)
            _scaled(table, i, k, DECODE_KV_J, decode_power, 1, tilt, out)
            _scaled(table, i, k, PREFILL_POWER_W, prefill_power, 0, tilt, out)
        for k in range(last - 1, -1, -1):
            for column in range(DECODE_BASE_S, DECODE_FLOOR_S + 1):
                out[i, k, column] = max(out[i, k, column], out[i, k + 1, column])
            for column in range(PREFILL_BASE_S, PREFILL_TOK2_S + 1):
                out[i, k, column] = max(out[i, k, column], out[i, k + 1, column])
        for k in range(1, last + 1):
            for column in range(DECODE_POWER_W, DECODE_KV_J + 1):
                out[i, k, column] = max(out[i, k, column], out[i, k - 1, column])
            out[i, k, PREFILL_POWER_W] = max(
                out[i, k, PREFILL_POWER_W], out[i, k - 1, PREFILL_POWER_W]
            )
        for k in range(last + 1, table.shape[1]):
            out[i, k] = out[i, last]
