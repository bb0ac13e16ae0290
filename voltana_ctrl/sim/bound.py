"""The fluid bound: an estimate of the least power at steady load.

It knows the mean load in advance and has no padding, no launch overhead of prefill and no
actuation delay, but it takes arrivals for Poisson, each instance for one clock, and the window for
long: under bursts, over short windows and with misses allowed a run can be some percent below it.
What no run can be below is :mod:`voltana_ctrl.sim.lower_bound`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.laws import length_moments
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import FleetSpec, InstanceSpec, Slo

__all__ = ["FluidLoad", "fluid_bound_w", "fluid_load"]

#: Steps in which load is split over instances; finer changes the bound by under 0.1 %.
GRID = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class FluidLoad:
    """Mean rates of work.

    Parameters
    ----------
    prefill_tok_s : float
        Prompt tokens to compute per second, cached ones left out.
    prefill_tok2_s : float
        Sum of (end^2 - start^2) of the prompts per second, for attention.
    decode_tok_s : float
        Tokens to decode per second, ``L - 1`` a request.
    context_tok : float
        Time-averaged context of a running request.
    transfer_w : float
        Mean power of KV transfers.

    Examples
    --------
    >>> FluidLoad(prefill_tok_s=1000.0, prefill_tok2_s=0.0, decode_tok_s=2000.0,
    ...           context_tok=400.0).transfer_w
    0.0
    """

    prefill_tok_s: float
    prefill_tok2_s: float
    decode_tok_s: float
    context_tok: float
    transfer_w: float = 0.0


def fluid_load(workload: Workload, from_s: float, until_s: float) -> FluidLoad:
    """Mean load of the requests that arrive in ``[from_s, until_s)``.

    Parameters
    ----------
    workload : Workload
        The requests, which arrive at times that are known (an open loop).
    from_s, until_s : float
        The window, on the clock of the arrivals.

    Returns
    -------
    FluidLoad
        Its `transfer_w` is left at 0.

    Examples
    --------
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> load = fluid_load(make_workload("fixed", rate_req_s=10.0, duration_s=100.0, seed=0,
    ...                                 prompt_tok=512, output_tok=101), 0.0, 100.0)
    >>> round(load.context_tok, 6)
    562.0
    """
    inside = (workload.arrival_s >= from_s) & (workload.arrival_s < until_s)
    span_s = until_s - from_s
    prompt = workload.prompt_tok[inside].astype(float)
    cached = workload.cached_tok[inside].astype(float)
    output = workload.output_tok[inside]
    decodes = bool(np.any(output > 1))
    return FluidLoad(
        prefill_tok_s=float((prompt - cached).sum() / span_s),
        prefill_tok2_s=float((prompt**2 - cached**2).sum() / span_s),
        decode_tok_s=float((output - 1).sum() / span_s),
        context_tok=length_moments(prompt, output).context_tok if decodes else 0.0,
    )


def fluid_bound_w(fleet: FleetSpec, load: FluidLoad, slo: Slo) -> float:
    """Least mean power of the fleet under this load, or infinity if it cannot carry it.

    Decode at ``T_eq <= SLO`` with the mean KV and batch within their limits, prefill at a
    utilisation of at most 1; both phases on one instance where it is colocated.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    load : FluidLoad
        Mean load of the fleet.
    slo : Slo
        Its ITL target bounds decode.

    Returns
    -------
    float
        Watts.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.sim.bound import FluidLoad
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = FluidLoad(prefill_tok_s=2400.0, prefill_tok2_s=0.0, decode_tok_s=2020.0,
    ...                  context_tok=434.0)
    >>> round(fluid_bound_w(fleet, load, Slo(ttft_s=0.6, itl_s=0.06)))
    372
    """
    share = np.linspace(0.0, 1.0, GRID + 1)
    if fleet.colocated:
        curves = [_power_w(one, load, share, share, slo) for one in fleet.instances]
        return _least_total_w(curves)
    none = np.zeros_like(share)
    prefill = [fleet.instances[i] for i in fleet.prefill]
    decode = [fleet.instances[i] for i in fleet.decode]
    return (
        load.transfer_w
        + _least_total_w([_power_w(one, load, share, none, slo) for one in prefill])
        + _least_total_w([_power_w(one, load, none, share, slo) for one in decode])
    )


def _power_w(
    one: InstanceSpec, load: FluidLoad, prefill_share: F64, decode_share: F64, slo: Slo
) -> F64:
    """Least power of one instance at each share of the load; infinite where it cannot."""
    rest_w = one.least_rest_w  # at most idle power: nobody rests for less
    rows: Any = one.table[:, None]
    busy_frac = prefill_share * (
        load.prefill_tok_s * rows["prefill_tok_s"] + load.prefill_tok2_s * rows["prefill_tok2_s"]
    )
    decode_tok_s = decode_share * load.decode_tok_s
    growth_s = rows["decode_req_s"] + rows["decode_kv_s"] * load.context_tok
    base_s = rows["decode_base_s"] + rows["decode_host_s"]
    spare_frac = 1.0 - busy_frac - decode_tok_s * growth_s
    # A roof makes no batch longer at a load that it can serve.
    roof_s = rows["decode_roof_s"] + rows["decode_kv_s"] * load.context_tok
    served = (spare_frac > 0.0) & (decode_tok_s * roof_s < 1.0 - busy_frac)
    with np.errstate(divide="ignore", invalid="ignore"):
        step_s = np.maximum(
            base_s / spare_frac,
            (rows["decode_floor_s"] + rows["decode_host_s"]) / (1.0 - busy_frac),
        )
        roof_base_s = rows["decode_roof_base_s"] + rows["decode_host_s"]
        step_s = np.maximum(step_s, roof_base_s / (1.0 - busy_frac - decode_tok_s * roof_s))
        running_req = decode_tok_s * step_s
        per_token_w = decode_tok_s * (rows["decode_req_j"] + load.context_tok * rows["decode_kv_j"])
        # At low load the instance also idles: the batch is negative binomial under Poisson
        # arrivals, so it is empty for this share of the time.
        rho_frac = decode_tok_s * growth_s / (1.0 - busy_frac)
        stages = base_s / growth_s + 1.0
        on_frac = -np.expm1(stages * np.log1p(-np.clip(rho_frac, 0.0, 1.0)))
        on_step_s = np.maximum(step_s, (base_s + growth_s * running_req / on_frac))
        resting_j = rows["decode_host_s"] * (rows["decode_power_w"] - rows["idle_w"])
        decode_w = (
            on_frac
            * (
                (1.0 - busy_frac) * (rows["decode_power_w"] - rest_w)
                + (rows["decode_iter_j"] - resting_j) / on_step_s
            )
            + per_token_w
        )
    beside_w = np.where(decode_share > 0.0, rows["prefill_beside_w"], 0.0)
    prefill_w = busy_frac * (rows["prefill_power_w"] + beside_w - rest_w)
    decodes = decode_tok_s > 0.0
    kv_limit = one.kv_capacity_tok / max(load.context_tok, 1e-9)
    possible = np.where(
        decodes,
        served & (step_s <= slo.itl_s) & (running_req <= min(one.max_batch, kv_limit)),
        busy_frac <= 1.0,
    )
    power_w = rest_w + prefill_w + np.where(decodes, decode_w, 0.0)
    least: F64 = np.where(possible, power_w, np.inf).min(axis=0)
    return least


def _least_total_w(curves: list[F64]) -> float:
    """Least sum over instances whose shares add up to the whole load (min-plus sums)."""
    kinds: dict[bytes, tuple[F64, int]] = {}
    for curve in curves:
        key = curve.tobytes()
        kinds[key] = (curve, kinds.get(key, (curve, 0))[1] + 1)
    total: F64 | None = None
    for curve, count in kinds.values():
        power: F64 | None = None
        square, left = curve, count
        while left:
            if left & 1:
                power = square if power is None else _min_plus(power, square)
            left >>= 1
            if left:
                square = _min_plus(square, square)
        if power is not None:
            total = power if total is None else _min_plus(total, power)
    return float("inf") if total is None else float(total[-1])


def _min_plus(first: F64, second: F64) -> F64:
    """``out[k] = min over i of first[i] + second[k - i]``."""
    from voltana_ctrl.kernels.choose.target import min_plus

    least_w = np.empty(len(first))
    left_at, right_at = np.empty((2, len(first)), dtype=np.int64)
    min_plus(first, 1.0, second, 1.0, 1.0, least_w, left_at, right_at)
    return least_w
