"""Closed forms of queueing theory that the plant and the controllers are held against.

Decode under Poisson arrivals is a processor-sharing station whose speed depends on its batch, so
the distribution of the batch follows from detailed balance; prefill is a queue with one server.
Equations and their derivations: docs/theory.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.checks import F64
from voltana_ctrl.laws import decode_s
from voltana_ctrl.laws.equilibrium import DecodeEquilibrium


def batch_moments_req(
    rows: Any, arrival_req_s: ArrayLike, output_tok: ArrayLike, context_tok: ArrayLike
) -> tuple[F64, F64]:
    """Mean and variance of the decode batch under Poisson arrivals.

    Without padding, floor and roof it is negative binomial with ``r = a0 / b + 1``: mean
    ``r rho / (1 - rho)``, variance mean / ``(1 - rho)``; inf where ``rho >= 1``.
    :func:`batch_pmf` is the distribution with all three.

    Parameters
    ----------
    rows, arrival_req_s, output_tok, context_tok
        As of :func:`decode_equilibrium`.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> mean, variance = batch_moments_req(profile.table[-1], 10.0, 203.0, 434.0)
    >>> float(mean.round(1)), float(variance.round(1))
    (24.4, 29.5)
    """
    rate_tok_s, context = _rate(arrival_req_s, output_tok, context_tok)
    growth_s = rows["decode_req_s"] + rows["decode_kv_s"] * context
    rho = rate_tok_s * growth_s
    with np.errstate(divide="ignore"):
        # r rho / (1 - rho) with r rho = rate a0 + rho
        spare = np.maximum(0.0, 1.0 - rho)
        mean = np.where(rho < 1.0, (rate_tok_s * rows["decode_base_s"] + rho) / spare, np.inf)
        variance = np.where(rho < 1.0, mean / spare, np.inf)
    return mean, variance


def batch_pmf(
    rows: Any,
    arrival_req_s: ArrayLike,
    output_tok: ArrayLike,
    context_tok: ArrayLike,
    padded_batch: ArrayLike,
) -> F64:
    """Distribution of the decode batch under Poisson arrivals, padding included.

    Decode is a processor-sharing station, insensitive to the distribution of output lengths,
    so detailed balance gives ``p(n) / p(n-1) = lam (L-1) T(n) / n`` for any iteration time
    ``T(n)``. With an affine ``T`` without padding this is the negative binomial distribution
    with ``r = a0 / b + 1`` and success ``1 - rho``: mean ``r rho / (1 - rho)`` and variance
    mean / ``(1 - rho)``.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Coefficients.
    arrival_req_s, output_tok, context_tok : array_like
        As of :func:`decode_equilibrium`.
    padded_batch : array_like, shape (n_max + 1,)
        Executed size of every batch: ``profile.padded_batch()``, or ``arange`` for none. The
        distribution ends at ``n_max``, where further requests are lost.

    Returns
    -------
    ndarray, shape (..., n_max + 1)

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> pmf = batch_pmf(profile.table[-1], 10.0, 203.0, 434.0, profile.padded_batch())
    >>> pmf.shape, float((pmf @ np.arange(1025)).round(1))
    ((1025,), 27.3)
    """
    padded = np.asarray(padded_batch, dtype=np.float64)
    sizes = np.arange(1, padded.size, dtype=np.float64)
    rate_tok_s, context = _rate(arrival_req_s, output_tok, context_tok)
    step_s = _steps_s(rows, context, padded)
    with np.errstate(divide="ignore"):
        growth = np.log(rate_tok_s[..., None] * step_s / sizes)
    log_p = np.concatenate([np.zeros((*growth.shape[:-1], 1)), np.cumsum(growth, axis=-1)], axis=-1)
    weight = np.exp(log_p - log_p.max(axis=-1, keepdims=True))
    pmf: F64 = weight / weight.sum(axis=-1, keepdims=True)
    return pmf


def decode_stationary(
    rows: Any,
    arrival_req_s: ArrayLike,
    output_tok: ArrayLike,
    context_tok: ArrayLike,
    padded_batch: ArrayLike,
    idle_w: float,
) -> DecodeEquilibrium:
    """Mean of a decode instance over the batch distribution: padding and idle times included.

    Where :func:`decode_equilibrium` is a fluid that never runs dry, this averages over
    :func:`batch_pmf`: `step_s` is the mean time between tokens, ``E[n] / (lam (L-1))``, and
    an empty instance draws `idle_w`. Without padding the rate of iterations has the closed
    form ``(1 - rho - p(0)) / a0``.

    Parameters
    ----------
    rows, arrival_req_s, output_tok, context_tok, padded_batch
        As of :func:`batch_pmf`.
    idle_w : float
        Power while no request runs.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> at = decode_stationary(profile.table[[16, -1]], 10.0, 203.0, 434.0,
    ...                        profile.padded_batch(), profile.idle_w)
    >>> at.step_s.round(4), at.power_w.round(1)
    (array([0.0396, 0.0135]), array([143.4, 306.3]))
    """
    padded = np.asarray(padded_batch, dtype=np.float64)
    sizes = np.arange(padded.size, dtype=np.float64)
    rate_tok_s, context = _rate(arrival_req_s, output_tok, context_tok)
    pmf = batch_pmf(rows, arrival_req_s, output_tok, context_tok, padded)
    step_s = _steps_s(rows, context, padded)
    running_req = pmf @ sizes
    iterations_s = (pmf[..., 1:] / step_s).sum(axis=-1)
    served_tok_s = (pmf[..., 1:] * sizes[1:] / step_s).sum(axis=-1)
    power_w = (
        pmf[..., 0] * idle_w
        + (1.0 - pmf[..., 0]) * rows["decode_power_w"]
        + iterations_s * rows["decode_iter_j"]
        + served_tok_s * (rows["decode_req_j"] + context * rows["decode_kv_j"])
    )
    steepest_s = np.maximum(rows["decode_req_s"], rows["decode_roof_s"]) + (
        rows["decode_kv_s"] * context
    )
    rho = rate_tok_s * steepest_s
    mean_s = np.where(served_tok_s > 0.0, running_req / np.maximum(served_tok_s, 1e-300), 0.0)
    return DecodeEquilibrium(
        rho_frac=rho,
        step_s=np.where(served_tok_s > 0.0, mean_s, step_s[..., 0]),
        running_req=running_req,
        kv_tok=running_req * context,
        power_w=power_w,
    )


def padded_mean_req(pmf: ArrayLike, padded_batch: ArrayLike) -> F64:
    """Mean executed batch: what padding makes of the distribution of :func:`batch_pmf`.

    Parameters
    ----------
    pmf : array_like, shape (..., n_max + 1)
        Of :func:`batch_pmf`.
    padded_batch : array_like, shape (n_max + 1,)
        Executed size of every batch, of :meth:`voltana_ctrl.types.Profile.padded_batch`.

    Examples
    --------
    >>> padded_mean_req([0.5, 0.5], [0, 8]).item()
    4.0
    """
    mean: F64 = np.asarray(pmf, dtype=np.float64) @ np.asarray(padded_batch, dtype=np.float64)
    return mean


def batch_quantile_req(pmf: ArrayLike, quantile_frac: float) -> F64:
    """Least batch with at least this probability at or below it.

    Parameters
    ----------
    pmf : array_like, shape (..., n_max + 1)
        Of :func:`batch_pmf`.
    quantile_frac : float
        Between 0 and 1, for example the attainment.

    Returns
    -------
    ndarray, shape (...)
        ``n_max`` means: this large or larger.

    Examples
    --------
    >>> batch_quantile_req([0.5, 0.4, 0.1], 0.9).item()
    1.0
    """
    below = np.cumsum(np.asarray(pmf, dtype=np.float64), axis=-1) < quantile_frac - 1e-12
    quantile: F64 = np.minimum(below.sum(axis=-1), below.shape[-1] - 1).astype(np.float64)
    return quantile


def kv_quantile_tok(
    pmf: ArrayLike, quantile_frac: float, context_tok: float, context_sd_tok: float
) -> F64:
    """Quantile of the KV tokens in use.

    The contexts of running requests are independent of each other and of their number, so
    ``var m = E[n] sd^2 + c^2 var n``; the skew is taken from the batch: the quantile lies as
    many standard deviations above the mean as that of the batch does.

    Parameters
    ----------
    pmf : array_like, shape (..., n_max + 1)
        Of :func:`batch_pmf`.
    quantile_frac : float
        Between 0 and 1.
    context_tok, context_sd_tok : float
        Mean and standard deviation over time of the context (:func:`length_moments`).

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> pmf = batch_pmf(profile.table[-1], 10.0, 203.0, 434.0, profile.padded_batch())
    >>> float(kv_quantile_tok(pmf, 0.99, 434.0, 350.0).round(-2))
    19800.0
    """
    weight = np.asarray(pmf, dtype=np.float64)
    sizes = np.arange(weight.shape[-1], dtype=np.float64)
    mean = weight @ sizes
    variance = weight @ sizes**2 - mean**2
    spread = np.sqrt(context_tok**2 + context_sd_tok**2 * mean / np.maximum(variance, 1e-300))
    excess = batch_quantile_req(weight, quantile_frac) - mean
    quantile: F64 = mean * context_tok + np.where(variance > 0.0, excess * spread, 0.0)
    return quantile


def _rate(
    arrival_req_s: ArrayLike, output_tok: ArrayLike, context_tok: ArrayLike
) -> tuple[F64, F64]:
    decoded_tok = np.asarray(output_tok, dtype=np.float64) - 1.0
    rate_tok_s: F64 = np.asarray(arrival_req_s, dtype=np.float64) * decoded_tok
    return rate_tok_s, np.asarray(context_tok, dtype=np.float64)


def _steps_s(rows: Any, context_tok: F64, padded: F64) -> F64:
    """Time of an iteration of 1 .. n_max requests, on a new last axis."""
    sizes = np.arange(1, padded.size, dtype=np.float64)
    return decode_s(rows[..., None], sizes, context_tok[..., None] * sizes, padded[1:])


def mg1_wait_s(arrival_req_s: ArrayLike, service_s: ArrayLike, service_sd_s: ArrayLike) -> F64:
    """Mean wait before service of a single server with Poisson arrivals, first come first served.

    Pollaczek-Khinchine: ``W = lam E[S^2] / (2 (1 - rho))``; inf where ``rho >= 1``.

    Parameters
    ----------
    arrival_req_s : array_like
        Requests per second.
    service_s, service_sd_s : array_like
        Mean and standard deviation of the service time.

    Examples
    --------
    >>> mg1_wait_s(5.0, 0.1, 0.1).round(6).item()  # M/M/1: rho S / (1 - rho)
    0.1
    """
    arrival = np.asarray(arrival_req_s, dtype=np.float64)
    mean = np.asarray(service_s, dtype=np.float64)
    square = mean**2 + np.asarray(service_sd_s, dtype=np.float64) ** 2
    idle = 1.0 - arrival * mean
    with np.errstate(divide="ignore"):
        wait: F64 = np.where(idle > 0.0, arrival * square / (2.0 * np.maximum(idle, 0.0)), np.inf)
    return wait
