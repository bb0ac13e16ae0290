"""One regression: recursive least squares, guarded, compiled.

A model has N_TERMS terms, a scale and a tilt for each of up to three parts; its target is
relative to a prior, so that a right prior has scales 1 and tilts 0.
"""

import numpy as np
from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.learn.predictor import F8, F8_1, F8_2

#: Scale and tilt of up to three parts.
N_TERMS = 6

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
#: Discount of the squared errors by which tiles are compared.
SCORE_RATE = 0.01
#: Drift detector: mean errors of bias that are tolerated, and their sum that is an alarm.
ALLOWANCE, ALARM = 1.0, 25.0
#: Added to the diagonal at each update: keeps the covariance positive definite in floating point.
RIPPLE = 1e-6
#: Never less certain than the prior: its trace.
MOST_TRACE = (
    (SHARED_SCALE**2 + OWN_SCALE**2 + SHARED_TILT**2 + OWN_TILT**2) * (N_TERMS / 2) / NOISE**2
)


@njit(types.void(F8_2))
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


@njit(types.void(F8_1))
def keep_physical(theta):
    """Scales within a factor of the profile, tilts that leave every coefficient positive."""
    for a in range(0, N_TERMS, 2):
        scale = min(max(theta[a], 1.0 / FARTHEST), FARTHEST)
        theta[a] = scale
        theta[a + 1] = min(max(theta[a + 1], -STEEPEST * scale), STEEPEST * scale)


@njit(F8(F8_1, F8_2, F8_1, F8, F8, F8), allocates=True)
def rls_step(theta, cov, phi, target, forget, limit):
    """Update `theta` and `cov` in place by one record; returns the error before the update.

    Recursive least squares with directional forgetting (Kulhavy; Bittanti, Bolzern & Campi,
    Automatica 26 (1990)): old information is discounted only along `phi`, so that what a
    record says nothing about is kept and the covariance cannot wind up. `theta` and `phi` have
    shape (N_TERMS,), `cov` (N_TERMS, N_TERMS).

    The step is taken with the error clipped to plus or minus `limit`, in the unit of `target`;
    the error that is returned is not clipped. Nothing changes where `cov` leaves no spread along
    `phi`. For numerical safety the diagonal of `cov` grows by RIPPLE at each update, all of it is
    scaled down to the trace MOST_TRACE, and `theta` is kept physical.
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


@njit(types.boolean(F8_1, F8_2, F8_1, F8_1, F8, F8, F8))
def learn_one(theta, cov, phi, notes, target, beside, forget):
    """Update by one record and note its error; True if the errors say that the machine drifted.

    In the update an error counts as at most GATE mean errors. `beside` is what another model says
    of its part of the target.
    """
    predicted = beside
    for a in range(N_TERMS):
        predicted += theta[a] * phi[a]
    scale = max(notes[ERROR_FRAC], LEAST_ERROR)
    limit = GATE * scale * predicted
    error = rls_step(theta, cov, phi, target - beside, forget, limit) / predicted
    off = min(abs(error), 1.0)
    if beside == 0.0:  # an error of the rest would be put down to the staircase
        notes[SCORE_FRAC2] += SCORE_RATE * (off * off - notes[SCORE_FRAC2])
    notes[ERROR_FRAC] += ERROR_RATE * (min(off, GATE * scale) - notes[ERROR_FRAC])
    notes[SINCE] += 1.0
    z = min(max(error / scale, -GATE), GATE)
    notes[CUSUM_UP] = max(0.0, notes[CUSUM_UP] + z - ALLOWANCE)
    notes[CUSUM_DOWN] = max(0.0, notes[CUSUM_DOWN] - z - ALLOWANCE)
    return notes[CUSUM_UP] > ALARM or notes[CUSUM_DOWN] > ALARM


@njit(types.void(F8_1))
def note_alarm(notes):
    """Begin both sums of the change detector anew, after it has raised the alarm."""
    notes[CUSUM_UP] = 0.0
    notes[CUSUM_DOWN] = 0.0
    notes[SINCE] = 0.0
    notes[ALARMS] += 1.0


@njit(F8(F8_1, F8_1))
def said(theta, phi):
    """Prediction of a model for its part of the target, ``theta . phi``, relative to the prior."""
    total = 0.0
    for a in range(N_TERMS):
        total += theta[a] * phi[a]
    return total


@njit(F8(F8_2, F8_1))
def doubt(cov, phi):
    """Variance of a model's prediction, in units of the variance of one record (NOISE squared)."""
    total = 0.0
    for a in range(N_TERMS):
        for b in range(N_TERMS):
            total += phi[a] * cov[a, b] * phi[b]
    return total


@njit(types.void(F8_1, F8_2, F8_1, F8_1, F8, F8, F8))
def learn_guarded(theta, cov, phi, notes, target, beside, forget):
    """:func:`learn_one`; after an alarm the covariance goes back to the prior, `theta` stays."""
    if learn_one(theta, cov, phi, notes, target, beside, forget):
        restart(cov)
        note_alarm(notes)
