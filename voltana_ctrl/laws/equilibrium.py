"""Decode and prefill instances at steady load: the fluid equilibrium, in closed form.

Open-loop arrivals set the tokens per second, a slower clock only grows the batch (Little's
law). With an iteration time ``T = a0 + a1 n + a2 m`` affine in running requests ``n`` and KV
tokens ``m = c n``, ``b = a1 + a2 c`` and ``rho = lam (L - 1) b``, decode settles at
``T = a0 / (1 - rho)``. A roof, to which computing bends ``T``, is a second such line: the later of
both equilibria holds, and the steeper of both bounds the load that has one. Where computing goes
in tiles, half a tile is empty on average from the second on. Prefill is a queue with idle gaps,
busy ``rho`` of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.checks import F64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeEquilibrium:
    """Decode instances at steady load; arrays of the broadcast shape of rows and loads.

    Where ``rho_frac >= 1`` the batch grows without bound: time, batch, KV and power are inf.

    Parameters
    ----------
    rho_frac : ndarray
        The load over what can be served: without a roof, the share of an iteration that grows
        with the batch.
    step_s : ndarray
        Iteration time, the ITL of every running request.
    running_req, kv_tok : ndarray
        Running requests and the KV tokens they hold.
    power_w : ndarray
        Power of the instance.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import decode_equilibrium
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> at = decode_equilibrium(profile.table[-1], 10.0, 203.0, 434.0)
    >>> isinstance(at, DecodeEquilibrium), float(at.rho_frac.round(3))
    (True, 0.173)
    """

    rho_frac: F64
    step_s: F64
    running_req: F64
    kv_tok: F64
    power_w: F64


def decode_equilibrium(
    rows: Any, arrival_req_s: ArrayLike, output_tok: ArrayLike, context_tok: ArrayLike
) -> DecodeEquilibrium:
    """Fluid equilibrium of a decode instance under open-loop arrivals.

    ``T = max(floor, a0 / (1 - rho))``, ``n = lam (L - 1) T``, ``m = n c`` and
    ``P = P_on + (E_iter - host (P_on - P_idle)) / T + lam (L - 1) (E_req + c E_kv)``: Little's law
    on the affine iteration time, without padding; while the host works the GPU idles. Power at a
    fixed token rate is this function with ``output_tok=2``.

    ``T`` is the larger of two lines in the batch, so it settles at the larger of what each
    settles at. A roof without a base moves no equilibrium, it ends them sooner: ``T`` is then
    proportional to the batch, which ``n = lam (L - 1) T`` meets at one load only.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    arrival_req_s : array_like
        Requests per second.
    output_tok : array_like
        Mean output tokens L; ``L - 1`` are decoded here.
    context_tok : array_like
        Time-averaged context c of a running request (:func:`length_moments`).

    Returns
    -------
    DecodeEquilibrium
        Arrays of the shape to which rows and loads broadcast.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> at = decode_equilibrium(profile.table[[16, -1]], 10.0, 203.0, 434.0)
    >>> at.step_s.round(4), at.running_req.round(1), at.power_w.round(1)
    (array([0.0382, 0.0132]), array([77.1, 26.6]), array([143.8, 300.6]))
    """
    rate_tok_s, context = _rate(arrival_req_s, output_tok, context_tok)
    base_s = rows["decode_base_s"] + rows["decode_host_s"]
    roof_s = rows["decode_roof_base_s"] + rows["decode_host_s"]
    rho = rate_tok_s * _steepest_s(rows, context)
    spare = 1.0 - rate_tok_s * (rows["decode_req_s"] + rows["decode_kv_s"] * context)
    spare_roof = 1.0 - rate_tok_s * (rows["decode_roof_s"] + rows["decode_kv_s"] * context)
    with np.errstate(divide="ignore", invalid="ignore"):
        later_s = np.maximum(base_s / np.maximum(0.0, spare), roof_s / np.maximum(0.0, spare_roof))
        half_s = _half_tile_tok(rows, rate_tok_s * later_s) * rows["prefill_tok_s"]
        tiled_s = (roof_s + half_s) / np.maximum(0.0, spare_roof)
        later_s = np.where(half_s > 0.0, np.maximum(later_s, tiled_s), later_s)
        settled_s = np.where(rho < 1.0, later_s, np.inf)
    step_s = np.maximum(rows["decode_floor_s"] + rows["decode_host_s"], settled_s)
    running_req = rate_tok_s * step_s
    resting_j = rows["decode_host_s"] * (rows["decode_power_w"] - rows["idle_w"])
    power_w = np.where(
        rho < 1.0,
        rows["decode_power_w"]
        + (rows["decode_iter_j"] - resting_j) / step_s
        + rate_tok_s * (rows["decode_req_j"] + context * rows["decode_kv_j"]),
        np.inf,
    )
    return DecodeEquilibrium(
        rho_frac=rho,
        step_s=step_s,
        running_req=running_req,
        kv_tok=running_req * context,
        power_w=power_w,
    )


def _rate(
    arrival_req_s: ArrayLike, output_tok: ArrayLike, context_tok: ArrayLike
) -> tuple[F64, F64]:
    decoded_tok = np.asarray(output_tok, dtype=np.float64) - 1.0
    rate_tok_s: F64 = np.asarray(arrival_req_s, dtype=np.float64) * decoded_tok
    return rate_tok_s, np.asarray(context_tok, dtype=np.float64)


def _half_tile_tok(rows: Any, tok: F64) -> F64:
    """Slots that are empty on average in the last of several tiles."""
    tile = rows["decode_tile_tok"]
    half: F64 = np.where((tile > 0.0) & (tok > tile), 0.5 * tile, 0.0)
    return half


def _steepest_s(rows: Any, context_tok: F64) -> F64:
    """Most that an iteration grows by per request: its inverse is what can be served."""
    per_req = np.maximum(rows["decode_req_s"], rows["decode_roof_s"])
    steepest: F64 = per_req + rows["decode_kv_s"] * context_tok
    return steepest


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
    >>> from voltana_ctrl.laws import prefill_equilibrium
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
    idle_w: ArrayLike,
    *,
    prompt_sd_tok: ArrayLike = 0.0,
    batch_req: ArrayLike = 1.0,
) -> PrefillEquilibrium:
    """Prefill under open-loop arrivals: busy a fraction ``rho`` of the time, idle the rest.

    ``P = (1 - rho) P_idle + rho P_busy``.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    arrival_req_s : array_like
        Requests per second.
    prompt_tok, prompt_sd_tok : array_like
        Mean and standard deviation of the prompt.
    idle_w : array_like
        Power while the queue is empty; ``rows["idle_w"]`` where it depends on the clock.
    batch_req : array_like
        Requests that share one iteration and its base time; ``inf`` leaves the base out, the
        least that any batching reaches.

    Returns
    -------
    PrefillEquilibrium
        Arrays of the shape to which rows and loads broadcast.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> at = prefill_equilibrium(profile.table[[16, -1]], 10.0, 240.0, profile.idle_w)
    >>> at.rho_frac.round(3), at.power_w.round(1)
    (array([0.538, 0.246]), array([112.3, 151.1]))
    """
    tok = np.asarray(prompt_tok, dtype=np.float64)
    square = tok**2 + np.asarray(prompt_sd_tok, dtype=np.float64) ** 2
    service_s: F64 = (
        rows["prefill_base_s"] / np.asarray(batch_req, dtype=np.float64)
        + rows["prefill_tok_s"] * (tok + _half_tile_tok(rows, tok))
        + rows["prefill_tok2_s"] * square
    )
    rate_req_s = np.asarray(arrival_req_s, dtype=np.float64)
    busy_frac = rate_req_s * service_s
    service_s = service_s + rows["prefill_req_s"]
    rho = rate_req_s * service_s
    # While the host works for a prompt the GPU idles.
    idle = np.asarray(idle_w, dtype=np.float64)
    power_w = np.where(rho < 1.0, idle + busy_frac * (rows["prefill_power_w"] - idle), np.inf)
    return PrefillEquilibrium(rho_frac=rho, service_s=service_s, power_w=power_w)
