"""Prefill at equilibrium: a queue with idle gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.types._check import F64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillEquilibrium:
    """Prefill instances at steady load; ``rho_frac >= 1`` cannot be served (power inf).

    Parameters
    ----------
    rho_frac : ndarray
        Share of the time that the instance is busy.
    service_s : ndarray
        Time per request.
    power_w : ndarray
        Mean power of the instance.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> at = prefill_equilibrium(profile.table[-1], 10.0, 240.0, profile.idle_w)
    >>> isinstance(at, PrefillEquilibrium), float(at.service_s.round(4))
    (True, 0.0246)
    """

    rho_frac: F64
    service_s: F64
    power_w: F64


def prefill_equilibrium(
    rows: Any,
    arrival_req_s: ArrayLike,
    prompt_tok: ArrayLike,
    idle_w: float,
    *,
    prompt_sd_tok: ArrayLike = 0.0,
    batch_req: ArrayLike = 1.0,
) -> PrefillEquilibrium:
    """Prefill under open-loop arrivals: busy a fraction ``rho`` of the time, idle the rest.

    ``P = (1 - rho) P_idle + rho P_busy``.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Coefficients.
    arrival_req_s : array_like
        Requests per second.
    prompt_tok, prompt_sd_tok : array_like
        Mean and standard deviation of the prompt.
    idle_w : float
        Power while the queue is empty.
    batch_req : array_like
        Requests that share one iteration and its base time; ``inf`` leaves the base out, the
        least that any batching reaches.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> at = prefill_equilibrium(profile.table[[16, -1]], 10.0, 240.0, profile.idle_w)
    >>> at.rho_frac.round(3), at.power_w.round(1)
    (array([0.538, 0.246]), array([107.4, 143.6]))
    """
    tok = np.asarray(prompt_tok, dtype=np.float64)
    square = tok**2 + np.asarray(prompt_sd_tok, dtype=np.float64) ** 2
    service_s: F64 = (
        rows["prefill_base_s"] / np.asarray(batch_req, dtype=np.float64)
        + rows["prefill_tok_s"] * tok
        + rows["prefill_tok2_s"] * square
    )
    rho = np.asarray(arrival_req_s, dtype=np.float64) * service_s
    power_w = np.where(rho < 1.0, idle_w + rho * (rows["prefill_power_w"] - idle_w), np.inf)
    return PrefillEquilibrium(rho_frac=rho, service_s=service_s, power_w=power_w)


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
