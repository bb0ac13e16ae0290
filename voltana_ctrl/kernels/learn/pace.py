"""How fast an instance is, when its clock answers and how high it gets, compiled.

**Pace.** What an iteration took, over what the profile says, is a mixture of the paces of its two
phases: ``z = h_p a_p + h_d a_d + noise`` where ``h`` are their shares of the profile's time. The
paces ``a`` follow by a Kalman filter of two states that wander (`WANDER` per record, in units of
the noise squared, each only as far as the record says something about it), so that some twenty
records are remembered; the noise itself is tracked. Surprises of one sign restart it.

**Clock.** Of each instance the last asks are kept, ``(when, which clock)``. A clock that is read
below every ask of a while is the highest that the instance gets. The delay is the lag at which the
asks explain what is read best.
"""

import math

import numpy as np
from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW, beside_s, empty_tok, prefill_s, row_nearest

F8, I8 = types.float64, types.int64
F8_1, F8_2 = types.Array(F8, 1, "C"), types.Array(F8, 2, "C")
I8_1, I8_2 = types.Array(I8, 1, "C"), types.Array(I8, 2, "C")
IN_F8_1, IN_I8_1 = types.Array(F8, 1, "C", readonly=True), types.Array(I8, 1, "C", readonly=True)
IN_F8_2 = types.Array(F8, 2, "C", readonly=True)
IN_I8_2 = types.Array(I8, 2, "C", readonly=True)
TABLES = types.Array(ROW, 2, "C", readonly=True)
ROWS = types.Array(ROW, 1, "C", readonly=True)

# What is known of an instance
(
    PREFILL_PACE_FRAC,
    DECODE_PACE_FRAC,
    PREFILL_VAR,  # of the paces, in units of the noise squared
    BOTH_VAR,
    DECODE_VAR,
    NOISE_FRAC2,  # mean square of the relative surprise
    BIAS,  # discounted mean of the surprise in standard deviations
    LAST_MHZ,  # clock of the latest record
    ABLE_MHZ,  # highest clock that it gets
    ASKS,  # clocks asked for so far
    READINGS,  # clocks read that told lags apart
) = range(11)
N_KNOWN = 11

#: Standard deviation of a pace before the first record, and of a record, at first and at least.
FIRST_PACE, FIRST_NOISE, LEAST_NOISE = 0.3, 0.05, 0.005
#: Variance that a pace gains per record; gain settles at about its root.
WANDER = 0.0025
NOISE_RATE = 0.02
#: A surprise counts as at most so many standard deviations.
GATE = 4.0
#: Discount of their mean, and the mean that restarts the filter: 3.9 standard deviations of it.
BIAS_RATE, ALARM = 0.2, 1.3
#: Variance after a restart.
RESTART_VAR = 25.0
#: A record further from the profile than this factor is none.
ABSURD = 30.0

#: Asks that are remembered.
N_ASKS = 32
#: Lags among which the delay is chosen [s].
LAGS_S = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
N_LAGS = len(LAGS_S)
#: A clock below all asks of this time, or of three delays, is what the instance gets.
CLAMP_S = 0.3
#: Discount per reading of the part that a lag does not explain, readings before it is believed,
#: and the difference that is none.
LAG_RATE, ENOUGH_READINGS, AS_GOOD = 0.02, 50.0, 0.05
#: No time, clock or count is larger.
MOST = 1e12


@njit(types.void(F8_1, F8))
def begin(known, top_mhz):
    """Nothing is known of an instance: the profile is right, the ladder can be had."""
    known[:] = 0.0
    known[PREFILL_PACE_FRAC] = known[DECODE_PACE_FRAC] = 1.0
    known[NOISE_FRAC2] = FIRST_NOISE * FIRST_NOISE
    known[PREFILL_VAR] = known[DECODE_VAR] = FIRST_PACE * FIRST_PACE / known[NOISE_FRAC2]
    known[ABLE_MHZ] = top_mhz


@njit(types.void(F8_1, F8, F8))
def learn_pace(known, prefill_frac, took_frac):
    """Take one record: time over what the profile says, of which prefill is a part."""
    if not 1.0 / ABSURD < took_frac < ABSURD:
        return
    hp = prefill_frac
    hd = 1.0 - prefill_frac
    said = hp * known[PREFILL_PACE_FRAC] + hd * known[DECODE_PACE_FRAC]
    # The noise of a slow instance is as much larger as its times are.
    surprise_frac = took_frac / said - 1.0
    known[PREFILL_VAR] += WANDER * hp * hp
    known[DECODE_VAR] += WANDER * hd * hd
    for attempt in range(2):
        cov_p = hp * known[PREFILL_VAR] + hd * known[BOTH_VAR]
        cov_d = hp * known[BOTH_VAR] + hd * known[DECODE_VAR]
        total = hp * cov_p + hd * cov_d + 1.0
        score = surprise_frac / math.sqrt(known[NOISE_FRAC2] * total)
        if attempt == 1:
            break
        known[BIAS] += BIAS_RATE * (max(-GATE, min(GATE, score)) - known[BIAS])
        if abs(known[BIAS]) <= ALARM:
            break
        # It has changed: what was known counts for little.
        known[BIAS] = 0.0
        known[PREFILL_VAR] += RESTART_VAR * hp
        known[DECODE_VAR] += RESTART_VAR * hd
    gated = max(-GATE, min(GATE, score))
    step_frac = surprise_frac * (gated / score if score != 0.0 else 1.0) * said
    known[NOISE_FRAC2] *= 1.0 + NOISE_RATE * (gated * gated - 1.0)
    known[NOISE_FRAC2] = max(LEAST_NOISE * LEAST_NOISE, known[NOISE_FRAC2])
    gain_p, gain_d = cov_p / total, cov_d / total
    known[PREFILL_PACE_FRAC] = max(1.0 / ABSURD, known[PREFILL_PACE_FRAC] + gain_p * step_frac)
    known[DECODE_PACE_FRAC] = max(1.0 / ABSURD, known[DECODE_PACE_FRAC] + gain_d * step_frac)
    known[PREFILL_VAR] = max(1e-6, known[PREFILL_VAR] - gain_p * cov_p)
    known[DECODE_VAR] = max(1e-6, known[DECODE_VAR] - gain_d * cov_d)
    known[BOTH_VAR] -= gain_p * cov_d


@njit(types.void(F8_1, F8_1, I8_1, F8, I8))
def note_ask(known, asks_s, asks_k, t_s, k):
    """Remember that this clock was asked for at that time, if it is another than before."""
    n = int(known[ASKS])
    if n > 0 and asks_k[(n - 1) % N_ASKS] == k:
        return
    asks_s[n % N_ASKS] = t_s
    asks_k[n % N_ASKS] = k
    known[ASKS] = n + 1.0


@njit(types.void(F8_1, F8_1, I8_1, F8_1, F8, F8, I8, F8, F8))
def note_reading(known, asks_s, asks_k, lag_miss, delay_s, t_s, k, mhz, top_mhz):
    """Learn from a clock that was read: how high the instance gets, how late it answers."""
    n = int(known[ASKS])
    oldest = max(0, n - N_ASKS)
    # Lowest clock that was asked for at any time of the last while.
    since_s = t_s - max(CLAMP_S, 3.0 * delay_s)
    lowest = I8(1 << 60)
    reaches = False
    recent = 0
    among = False
    for j in range(n - 1, oldest - 1, -1):
        at_s, ask = asks_s[j % N_ASKS], asks_k[j % N_ASKS]
        if not reaches:
            lowest = min(lowest, ask)
            reaches = at_s <= since_s
        if t_s - at_s < 1.2 * LAGS_S[N_LAGS - 1]:
            recent += 1
        among = among or ask == k
        if reaches and t_s - at_s >= 1.2 * LAGS_S[N_LAGS - 1]:
            break
    if reaches and k < lowest:
        known[ABLE_MHZ] = mhz
    elif mhz > known[ABLE_MHZ]:
        known[ABLE_MHZ] = top_mhz
    if recent < 2 or not among:
        return  # no lag explains it better than another
    known[READINGS] += 1.0
    j = n - 1
    for lag in range(N_LAGS):
        while j >= oldest and asks_s[j % N_ASKS] > t_s - LAGS_S[lag]:
            j -= 1
        if j < oldest:
            break
        miss = 0.0 if asks_k[j % N_ASKS] == k else 1.0
        lag_miss[lag] += LAG_RATE * (miss - lag_miss[lag])


@njit(
    types.void(
        TABLES, IN_I8_1, IN_I8_1, IN_I8_1, types.Array(types.boolean, 1, "C", readonly=True),
        F8, IN_F8_1, IN_F8_1, types.boolean, F8_2, F8_2, I8_2, F8_2, IN_F8_1,
    ),
    allocates=True,
)  # fmt: skip
def note_all(
    tables, kind, n_clocks, silent, readable, t_s, read_mhz, asked_mhz, governed,
    known, asks_s, asks_k, lag_miss, delay_s,
):  # fmt: skip
    """Learn from the clocks that were read, then remember what is asked for now.

    Where governors may ask for more, a clock below the floor says that it cannot be had, and
    nothing of its delay.
    """
    unused = np.zeros(N_LAGS)
    for i in silent:
        rows, last = tables[kind[i]], n_clocks[i] - 1
        if readable[i]:
            at = row_nearest(rows, n_clocks[i], read_mhz[i])
            lags = unused if governed else lag_miss[i]
            note_reading(
                known[i], asks_s[i], asks_k[i], lags, delay_s[i], t_s, at,
                rows[at]["clock_mhz"], rows[last]["clock_mhz"],
            )  # fmt: skip
            if governed:
                known[i, READINGS] = 0.0
        asked = row_nearest(rows, n_clocks[i], asked_mhz[i])
        note_ask(known[i], asks_s[i], asks_k[i], t_s, asked)


@njit(types.void(IN_F8_2, IN_F8_2, IN_F8_1, F8_1))
def delays(known, lag_miss, believed, delay_s):
    """Delay that explains the readings best; of equally good ones the nearest to the belief."""
    for i in range(len(known)):
        believed_s = believed[i]
        delay_s[i] = believed_s
        if known[i, READINGS] < ENOUGH_READINGS:
            continue
        least = 1.0
        for lag in range(N_LAGS):
            least = min(least, lag_miss[i, lag])
        nearest_s = math.inf
        for lag in range(N_LAGS):
            if lag_miss[i, lag] > least + AS_GOOD:
                continue
            off_s = abs(LAGS_S[lag] - believed_s)
            # Between two lags of the grid nothing is told apart.
            if LAGS_S[max(lag - 1, 0)] < believed_s < LAGS_S[min(lag + 1, N_LAGS - 1)]:
                off_s = 0.0
            if off_s < nearest_s:
                nearest_s = off_s
                delay_s[i] = believed_s if off_s == 0.0 else LAGS_S[lag]


@njit(types.UniTuple(I8, 2)(F8_1, I8_1, I8, F8, F8, F8, I8, I8))
def between(asks_s, asks_k, n, delay_s, begin_s, end_s, slowest, fastest):
    """Rows of the lowest and highest clock that may have run from begin to end, those given too.

    From one reading to the next a clock may have been lower than at both: those that were asked
    for count too, if they can have run. A delay may be half or twice what is believed of it.
    """
    for j in range(n - 1, max(0, n - N_ASKS) - 1, -1):
        at_s, ask = asks_s[j % N_ASKS], asks_k[j % N_ASKS]
        if at_s + 0.5 * delay_s < end_s:
            slowest, fastest = min(slowest, ask), max(fastest, ask)
        if at_s + 2.0 * delay_s <= begin_s:
            break
    return slowest, fastest


@njit(
    types.void(
        TABLES, IN_I8_2, IN_I8_1, IN_I8_1, F8, IN_I8_1, *(IN_F8_1,) * 8,
        F8_2, F8_2, I8_2, F8_2, IN_F8_1,
    ),

)  # fmt: skip
def watch(
    tables, padded, kind, n_clocks, typical_tok, instance, t_s, wall_s, freq_mhz, batch_req,
    prefill_tok, prefill_tok2, kv_tok, asked_mhz, known, asks_s, asks_k, lag_miss, delay_s,
):  # fmt: skip
    """Learn from records of iterations, oldest first."""
    for j in range(len(instance)):
        i = instance[j]
        if i < 0 or i >= len(kind):
            continue
        rows, last = tables[kind[i]], n_clocks[i] - 1
        if not (0.0 < wall_s[j] < MOST and 0.0 < freq_mhz[j] < MOST and 0.0 <= kv_tok[j] < MOST):
            continue
        at = row_nearest(rows, n_clocks[i], freq_mhz[j])
        if asked_mhz[j] > 0.0:
            asked = row_nearest(rows, n_clocks[i], asked_mhz[j])
            note_ask(known[i], asks_s[i], asks_k[i], t_s[j] - wall_s[j], asked)
            note_reading(
                known[i], asks_s[i], asks_k[i], lag_miss[i], delay_s[i], t_s[j], at,
                rows[at]["clock_mhz"], rows[last]["clock_mhz"],
            )  # fmt: skip
        before = at
        if known[i, LAST_MHZ] > 0.0:
            before = row_nearest(rows, n_clocks[i], known[i, LAST_MHZ])
        known[i, LAST_MHZ] = freq_mhz[j]
        slowest, fastest = between(
            asks_s[i], asks_k[i], int(known[i, ASKS]), delay_s[i], t_s[j] - wall_s[j], t_s[j],
            min(at, before), max(at, before),
        )  # fmt: skip
        size = padded[kind[i], min(int(batch_req[j]), padded.shape[1] - 1)]
        tok2 = prefill_tok2[j]
        if tok2 <= 0.0:
            tok2 = prefill_tok[j] * min(prefill_tok[j], typical_tok)
        # Under a clock that changed meanwhile it took something between the times at the slowest
        # and the fastest: only what lies outside of them says something.
        for turn in range(2):
            k = slowest if turn == 0 else fastest
            decode, prefill = 0.0, 0.0
            if batch_req[j] > 0.0:
                decode = beside_s(rows[k], float(size), kv_tok[j], prefill_tok[j])
            if prefill_tok[j] > 0.0:
                prefill = prefill_s(rows[k], prefill_tok[j], tok2)
                if batch_req[j] > 0.0:
                    prefill -= rows[k]["prefill_base_s"]
                    prefill -= rows[k]["prefill_tok_s"] * empty_tok(rows[k], prefill_tok[j])
            if not decode + prefill > 0.0:
                break
            took_frac = wall_s[j] / (decode + prefill)
            prefill_frac = prefill / (decode + prefill)
            said = (
                prefill_frac * known[i, PREFILL_PACE_FRAC]
                + (1.0 - prefill_frac) * known[i, DECODE_PACE_FRAC]
            )
            doubt = said * 2.0 * math.sqrt(known[i, NOISE_FRAC2])
            slower_than_slow = turn == 0 and took_frac > said + doubt
            faster_than_fast = turn == 1 and took_frac < said - doubt
            if slowest == fastest or slower_than_slow or faster_than_fast:
                learn_pace(known[i], prefill_frac, took_frac)
                break
