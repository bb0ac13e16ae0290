"""What a clock must be at this state, and what it would draw: for all instances at once."""

from __future__ import annotations

import numpy as np

from voltana_ctrl.control.target import Load
from voltana_ctrl.types import FleetSpec, FleetState, Role, Slo
from voltana_ctrl.types._check import F64, Bool

__all__ = ["ceilings_mhz", "decoding_tok_s", "needed_mhz", "thrifty_mhz", "worst_power_w"]


def needed_mhz(
    fleet: FleetSpec,
    state: FleetState,
    load: Load,
    slo: Slo,
    route_frac: F64,
    *,
    margin_frac: tuple[float, float],
    delay_s: float,
    burst_sd_frac: float = 3.0,
) -> F64:
    """Lowest clocks that keep the promises at this state, shape (n,); the highest if none.

    Decode: the iteration is within ITL. Prefill: what is queued, and what arrives until the
    clock runs, is done when the oldest prompt is due; and one that arrives now is, if all that
    comes until then is served at the same clock.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    state : FleetState
        Queues and batches.
    load : Load
        What arrives.
    slo : Slo
        Promises.
    route_frac : ndarray, shape (n,)
        Share of the arrivals.
    margin_frac : tuple of float
        TTFT and ITL margin.
    delay_s : float
        Until a clock decided now runs, and until the next can.
    burst_sd_frac : float
        Standard deviations of arrivals that prefill keeps room for.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.physics import length_moments
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> needed_mhz(fleet, FleetState.idle(2), load, Slo(ttft_s=0.6, itl_s=0.06),
    ...            np.ones(2), margin_frac=(0.02, 0.035), delay_s=0.1)
    array([345., 210.])
    """
    # Of TTFT only what is still to come is a prediction.
    ttft_s, unsure = slo.ttft_s, 1.0 + margin_frac[0]
    itl_s = slo.itl_s / (1.0 + margin_frac[1])
    lengths = load.lengths
    typical_tok = lengths.prompt_tok + lengths.prompt_sd_tok**2 / lengths.prompt_tok
    needed = np.empty(len(fleet))
    for i, one in enumerate(fleet.instances):
        rows = one.table
        enough = np.ones(len(rows), bool)
        if one.role.decodes and state.running_req[i] > 0.0:
            n = min(int(state.running_req[i]), one.max_batch)
            size = float(one.profile.padded_batch(one.max_batch)[n])
            step_s = np.maximum(
                rows["decode_floor_s"],
                rows["decode_base_s"]
                + rows["decode_req_s"] * size
                + rows["decode_kv_s"] * state.kv_used_tok[i],
            )
            own_frac = 1.0
            if one.role.prefills:
                # Prompts of a colocated instance take their share of the time between tokens.
                rate_tok_s = load.arrival_req_s * route_frac[i] * lengths.prompt_tok
                own_frac = 1.0 - rate_tok_s * rows["prefill_tok_s"]
            enough &= step_s <= itl_s * own_frac
        if one.role.prefills:
            rate_tok_s = load.arrival_req_s * route_frac[i] * lengths.prompt_tok
            queue_tok = state.queue_tok[i] + rate_tok_s * delay_s
            per_tok_s = unsure * (rows["prefill_tok_s"] + rows["prefill_tok2_s"] * typical_tok)
            base_s = unsure * rows["prefill_base_s"]
            left_s = ttft_s - delay_s - state.oldest_wait_s[i]
            burst_tok = burst_sd_frac * np.sqrt(rate_tok_s * typical_tok * ttft_s / 2.0)
            cycle_tok = rate_tok_s * ttft_s / 2.0 + burst_tok
            enough &= base_s + per_tok_s * queue_tok <= left_s
            enough &= base_s + per_tok_s * cycle_tok <= ttft_s - delay_s
        clocks = one.clocks_mhz
        needed[i] = clocks[int(np.argmax(enough))] if enough.any() else clocks[-1]
    return needed


def decoding_tok_s(fleet: FleetSpec, state: FleetState) -> float:
    """Tokens per second that the fleet should be decoding, by its profiles.

    Parameters
    ----------
    fleet, state
        As of :func:`needed_mhz`.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decoding_tok_s(fleet, FleetState.idle(2))
    0.0
    """
    total = 0.0
    for i in fleet.decode:
        one = fleet.instances[int(i)]
        n = min(int(state.running_req[i]), one.max_batch)
        if n == 0:
            continue
        clocks = one.clocks_mhz
        row = one.table[min(int(np.searchsorted(clocks, state.freq_mhz[i])), len(clocks) - 1)]
        size = float(one.profile.padded_batch(one.max_batch)[n])
        step_s = (
            row["decode_base_s"]
            + row["decode_req_s"] * size
            + row["decode_kv_s"] * state.kv_used_tok[i]
        )
        total += n / max(float(step_s), float(row["decode_floor_s"]))
    return total


def thrifty_mhz(
    fleet: FleetSpec, state: FleetState, load: Load, slo: Slo, *, rests: bool = False
) -> F64:
    """Clocks of least energy per token at the present batch: the U-shaped curve's minimum.

    The right floor where clients wait for their answers or the batch is capped, since there the
    clock does set the token rate. Never slower than the ITL promise allows.

    Parameters
    ----------
    fleet, state, load, slo
        As of :func:`needed_mhz`.
    rests : bool
        Whether it idles when it is done, so that only what it draws above idle power counts.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.physics import length_moments
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> thrifty_mhz(fleet, FleetState.idle(2), load, Slo(ttft_s=0.6, itl_s=0.06))
    array([1095., 1095.])
    """
    best = np.empty(len(fleet))
    for i, one in enumerate(fleet.instances):
        rows = one.table
        if one.role is Role.PREFILL:
            sunk_w = one.idle_w if rests else 0.0
            per_tok_j = (rows["prefill_power_w"] - sunk_w) * rows["prefill_tok_s"]
            best[i] = one.clocks_mhz[int(np.argmin(per_tok_j))]
            continue
        n = max(1.0, min(float(state.running_req[i]), float(one.max_batch)))
        kv_tok = max(float(state.kv_used_tok[i]), n * load.lengths.prompt_tok)
        size = float(one.profile.padded_batch(one.max_batch)[int(n)])
        step_s = np.maximum(
            rows["decode_floor_s"],
            rows["decode_base_s"] + rows["decode_req_s"] * size + rows["decode_kv_s"] * kv_tok,
        )
        drawn_w = rows["decode_power_w"] - (one.idle_w if rests else 0.0)
        per_step_j = step_s * drawn_w + rows["decode_iter_j"]
        per_step_j = per_step_j + rows["decode_req_j"] * n + rows["decode_kv_j"] * kv_tok
        allowed = np.where(step_s <= slo.itl_s, per_step_j, np.inf)
        row = int(np.argmin(allowed)) if np.isfinite(allowed).any() else len(rows) - 1
        best[i] = one.clocks_mhz[row]
    return best


def worst_power_w(fleet: FleetSpec, state: FleetState, load: Load, active: Bool) -> list[F64]:
    """Most that each instance can draw before the next decision, per clock, not falling.

    Prefill: busy. Decode: the present batch and a tenth more. Idle where nothing runs and
    nothing is sent.

    Parameters
    ----------
    fleet, state, load
        As of :func:`needed_mhz`.
    active : ndarray of bool, shape (n,)
        Who may get new work.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.physics import length_moments
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> power_w = worst_power_w(fleet, FleetState.idle(2), load, np.array([True, False]))
    >>> float(power_w[0][-1]), float(power_w[1][-1])
    (400.0, 60.0)
    """
    curves = []
    for i, one in enumerate(fleet.instances):
        rows = one.table
        power = np.full(len(rows), one.idle_w)
        works = active[i] or state.running_req[i] + state.queue_req[i] > 0.0
        if works and one.role.prefills:
            power = np.maximum(power, rows["prefill_power_w"])
        if works and one.role.decodes:
            n = min(1.1 * (state.running_req[i] + state.queue_req[i]) + 8.0, one.max_batch)
            kv_tok = max(1.1 * state.kv_used_tok[i], n * load.lengths.prompt_tok)
            step_s = np.maximum(
                rows["decode_floor_s"],
                rows["decode_base_s"] + rows["decode_req_s"] * n + rows["decode_kv_s"] * kv_tok,
            )
            per_step_j = rows["decode_iter_j"] + rows["decode_req_j"] * n
            per_step_j = per_step_j + rows["decode_kv_j"] * kv_tok
            power = np.maximum(power, rows["decode_power_w"] + per_step_j / step_s)
        curves.append(np.maximum.accumulate(power))
    return curves


def ceilings_mhz(
    fleet: FleetSpec, curves_w: list[F64], wanted_mhz: F64, budget_w: float
) -> tuple[F64, bool]:
    """Highest clocks, in proportion to those wanted, that cannot draw more than the budget.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    curves_w : list of ndarray
        Of :func:`worst_power_w`.
    wanted_mhz : ndarray, shape (n,)
        Clocks that the plan asks for.
    budget_w : float
        Power that the fleet may draw.

    Returns
    -------
    ceilings : ndarray, shape (n,)
        The lowest clocks where even those may draw more.
    kept : bool
        Whether the budget is certain to be kept.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> curves = [one.table["prefill_power_w"] for one in fleet.instances]
    >>> ceilings_mhz(fleet, curves, np.array([1000.0, 500.0]), 400.0)
    (array([945., 465.]), True)
    """

    def at(scale: float) -> tuple[F64, float]:
        clocks = np.empty(len(fleet))
        total_w = 0.0
        for i, (one, curve) in enumerate(zip(fleet.instances, curves_w, strict=True)):
            ladder = one.clocks_mhz
            k = int(np.searchsorted(ladder, scale * wanted_mhz[i], side="right")) - 1
            k = max(k, 0)
            clocks[i] = ladder[k]
            total_w += float(curve[k])
        return clocks, total_w

    high = float(np.max(fleet.max_mhz / wanted_mhz)) * 1.001
    clocks, total_w = at(high)
    if total_w <= budget_w:
        return clocks, True
    low = float(np.min(fleet.min_mhz / wanted_mhz)) * 0.999
    clocks, total_w = at(low)
    if total_w > budget_w:
        return clocks, False
    for _ in range(30):
        middle = (low * high) ** 0.5
        trial, total_w = at(middle)
        if total_w <= budget_w:
            low, clocks = middle, trial
        else:
            high = middle
    return clocks, True
