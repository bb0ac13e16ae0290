r"""Proof of savings: what a policy saved, from a log of alternating blocks, with its interval.

The design is a switchback (Bojinov, Simchi-Levi and Zhao, Design and Analysis of Switchback
Experiments, arXiv:2009.00148): one fleet, blocks of equal length, and in every pair of adjacent
blocks one under the policy and one at the highest clock, in random order. Before and after
compares two days; two halves of a fleet compares two loads; this compares neighbours.

**Estimate.** With ``y`` the logarithm of joules per output token of a block after its washout,
pair ``p`` gives ``d[p] = y[p, policy] - y[p, highest]``, and the saving is ``1 - exp(mean d)``.

**Interval.** Write ``y[b] = mu + u[b] + tau z[b] + e[b]``, where ``z`` is 1 under the policy,
``u`` is whatever the load and the machine room do by themselves (it may drift, and be correlated
over hours), and ``e`` is noise with a memory shorter than a block. Then

    ``d[p] = tau + s[p] (u[2p] - u[2p+1]) + e[p, policy] - e[p, highest]``,

where ``s[p] = +1`` or ``-1`` is the order within the pair. The orders are drawn independently of
``u`` and of each other, so that ``E s[p] = 0`` and ``E s[p] s[q] = 0``: however strongly drifts
of neighbouring pairs are correlated, the differences ``d`` are not. Their mean is unbiased,
their sample variance over ``n`` estimates that of the mean without bias, and

    ``mean d +- t[n-1, 0.975] sd(d) / sqrt(n)``

is the interval; exact for normal differences, and close for the means of a dozen. Its ends are
carried through ``1 - exp``. Correlation of ``e`` across borders, requests that live through
one among it, is what the washout is for (burn-in: Hu and Wager, Switchback Experiments under
Geometric Mixing, arXiv:2209.00197).

**Left out.** A pair in which a block was idle has no joules per token. Leaving out by tokens would
be leaving out by outcome: a policy that stalls has none. So a pair is left out by what clients did,
where nobody asked for anything in one of its blocks, and nobody waited for an answer, from the end
of its washout to as long before its end. (Clients that wait for answers before they ask again ask
nothing of a policy that stalls.) How many, the result says. A block in which requests arrived, or
were in flight, and no tokens came is no idle one; such a log is refused.

**Refused.** A log that cannot carry a claim is refused by name: see :class:`EvidenceRefused`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.backends.log import log_files
from voltana_ctrl.checks import F64, not_negative
from voltana_ctrl.savings.blocks import Block, BlockMeter, read_blocks
from voltana_ctrl.savings.evidence import EvidenceRefused, Interval, Savings
from voltana_ctrl.types import Slo

__all__ = ["estimate_savings", "savings_of_log"]

#: With fewer pairs not even the exact test on the order within pairs reaches 5 %.
_LEAST_PAIRS = 6
_LOAD_GAP_FRAC = 0.10
_LOAD_GAP_MOST_FRAC = 0.20
_J_PER_KWH = 3.6e6


def _paired_interval(differences: F64) -> Interval:
    """Mean of the differences of at least two pairs, with its 95 % t interval."""
    from scipy.special import stdtrit

    n = len(differences)
    mean = float(np.mean(differences))
    half = float(stdtrit(n - 1, 0.975) * np.std(differences, ddof=1) / math.sqrt(n))
    return Interval(value=mean, low=mean - half, high=mean + half)


def savings_of_log(
    paths: Sequence[Path] | Path,
    *,
    slo: Slo | None = None,
    washout_s: float | None = None,
    instances: Sequence[str] = (),
    price_kwh: float | None = None,
    co2_g_kwh: float | None = None,
) -> Savings:
    """What a policy saved against the highest clock, from the log of a switchback.

    Parameters
    ----------
    paths : Path or sequence of Path
        Logs by their names, such as ``ticks.jsonl``, with what they put aside; folders of one
        log; or single files, in the order in which they were written.
    slo : Slo, optional
        What attainment is judged by; that of the log, where it has one, by default.
    washout_s : float, optional
        Seconds at the start of each block that do not count; a fifth of the block, at most 120 s,
        by default.
    instances : sequence of str
        Ids of instances, where only their energy and the requests that they served shall count; all
        by default.
    price_kwh, co2_g_kwh : float, optional
        Price of a kilowatt-hour in any currency, and grams of CO2 emitted for it.

    Returns
    -------
    Savings
        Estimates with their 95 % intervals.

    Raises
    ------
    EvidenceRefused
        If the log cannot carry a claim: fewer than six pairs of blocks, for instance.
    ConfigError
        If it cannot be read, is of several fleets, or has no such instance.

    Examples
    --------
    >>> from pathlib import Path
    >>> savings_of_log(Path("no-such.jsonl"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: log no-such.jsonl: cannot be read: No such file or directory
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    # A file that is named, and belongs to a log that is named, counts once.
    found = list(dict.fromkeys(file for path in given for file in log_files(Path(path))))
    meter = read_blocks(found, slo=slo, washout_s=washout_s, instances=instances)
    return estimate_savings(meter, price_kwh=price_kwh, co2_g_kwh=co2_g_kwh)


def estimate_savings(
    meter: BlockMeter, *, price_kwh: float | None = None, co2_g_kwh: float | None = None
) -> Savings:
    """What a policy saved against the highest clock, from the blocks of a meter.

    Parameters
    ----------
    meter : BlockMeter
        Blocks as a running loop filled them, or :func:`~voltana_ctrl.savings.read_blocks` did.
    price_kwh, co2_g_kwh : float, optional
        See :func:`savings_of_log`.

    Returns
    -------
    Savings
        Estimates with their 95 % intervals.

    Raises
    ------
    EvidenceRefused
        If the blocks cannot carry a claim.

    Examples
    --------
    >>> from voltana_ctrl.savings import BlockMeter
    >>> estimate_savings(BlockMeter())
    Traceback (most recent call last):
    ...
    voltana_ctrl.savings.evidence.EvidenceRefused: no switchback: ...
    """
    for name, value in (("price_kwh", price_kwh), ("co2_g_kwh", co2_g_kwh)):
        if value is not None:
            not_negative(name, value)
    blocks = meter.blocks
    pairs, idle_pairs = _worked(_pairs(blocks))
    _refuse(meter, blocks, pairs, idle_pairs)
    energy_j = np.array([[block.energy_j for block in pair] for pair in pairs])
    output_tok = _tokens(pairs)
    span_s = np.array([[block.span_s for block in pair] for pair in pairs])
    log_j_tok = np.log(energy_j / output_tok)
    log_tok = np.log(output_tok / span_s)
    load = _exp(_paired_interval(log_tok[:, 0] - log_tok[:, 1]))
    _refuse_unequal(load)
    ratio = _exp(_paired_interval(log_j_tok[:, 0] - log_j_tok[:, 1]))
    saving = Interval(value=-ratio.value, low=-ratio.high, high=-ratio.low)
    (policy_j, highest_j), (policy_s, highest_s) = energy_j.sum(axis=0), span_s.sum(axis=0)
    policy_tok, highest_tok = output_tok.sum(axis=0)
    # What the policy's energy would have been at the highest clock, less what it was.
    saved_kwh = Interval(
        value=policy_j * (1.0 / (1.0 - saving.value) - 1.0) / _J_PER_KWH,
        low=policy_j * (1.0 / (1.0 - saving.low) - 1.0) / _J_PER_KWH,
        high=policy_j * (1.0 / (1.0 - saving.high) - 1.0) / _J_PER_KWH,
    )
    day = saving.scaled(highest_j / highest_s * 86_400.0 / _J_PER_KWH)
    judged = _judged(pairs) if meter.slo is not None else {}
    used = {id(block) for pair in pairs for block in pair}
    return Savings(
        pairs=len(pairs),
        left_out=sum(id(block) not in used for block in blocks),
        idle_pairs=idle_pairs,
        block_s=pairs[0][0].length_s,
        washout_s=pairs[0][0].washout_s,
        saving_frac=saving,
        policy_j_tok=policy_j / policy_tok,
        highest_j_tok=highest_j / highest_tok,
        policy_w=policy_j / policy_s,
        highest_w=highest_j / highest_s,
        load_gap_frac=load,
        saved_kwh=saved_kwh,
        saved_kwh_day=day,
        saved_cost_day=None if price_kwh is None else day.scaled(price_kwh),
        saved_co2_g_day=None if co2_g_kwh is None else day.scaled(co2_g_kwh),
        **judged,
    )


def _exp(log: Interval) -> Interval:
    return Interval(value=math.expm1(log.value), low=math.expm1(log.low), high=math.expm1(log.high))


def _pairs(blocks: Sequence[Block]) -> list[tuple[Block, Block]]:
    """Whole pairs, the block of the policy first."""
    whole = {(block.run, block.number): block for block in blocks if block.spoiled is None}
    pairs = []
    for (run, number), first in whole.items():
        second = whole.get((run, number + 1))
        if number % 2 or second is None or first.at_policy == second.at_policy:
            continue
        pairs.append((first, second) if first.at_policy else (second, first))
    return pairs


def _worked(
    pairs: Sequence[tuple[Block, Block]],
) -> tuple[Sequence[tuple[Block, Block]], int]:
    """Pairs in both blocks of which requests arrived or were in flight, and how many others.

    Where no arrivals are told at all, nothing is known of who was idle.
    """
    worked = [
        pair for pair in pairs if all(one.arrived_req + one.in_flight_req > 0.0 for one in pair)
    ]
    told = any(block.arrived_req > 0.0 for pair in pairs for block in pair)
    return (worked, len(pairs) - len(worked)) if told else (pairs, 0)


def _refuse(
    meter: BlockMeter,
    blocks: Sequence[Block],
    pairs: Sequence[tuple[Block, Block]],
    idle_pairs: int,
) -> None:
    if not blocks:
        raise EvidenceRefused(
            "no switchback",
            "expected ticks marked as blocks of a switchback, got none; record with"
            " `voltana-ctrl agent --mode act --switchback MINUTES --log FILE`",
        )
    dark = meter.without_energy()
    if dark:
        raise EvidenceRefused(
            "missing power",
            f"the energy of {', '.join(dark)} never moved; give its GPUs in the fleet file, so"
            " that the agent can read them, and record anew (or leave it out with --instances)",
        )
    if len(pairs) < _LEAST_PAIRS:
        reasons = sorted({block.spoiled for block in blocks if block.spoiled is not None})
        if idle_pairs:
            reasons.append(f"in {idle_pairs} nobody asked for anything in one of the blocks")
        because = f" (left out: {'; '.join(reasons)})" if reasons else ""
        raise EvidenceRefused(
            "too few blocks",
            f"expected at least {_LEAST_PAIRS} whole pairs of blocks, got {len(pairs)}{because};"
            " let the switchback run longer, or with shorter blocks",
        )


def _refuse_unequal(load: Interval) -> None:
    gap = abs(load.value)
    if gap > _LOAD_GAP_MOST_FRAC or (gap > _LOAD_GAP_FRAC and 0.0 not in load):
        raise EvidenceRefused(
            "unequal load",
            f"tokens per second under the policy differ by {100.0 * load.value:+.1f} % from those"
            " at the highest clock, so that joules per token compare different services; record"
            " more pairs, or, if clients wait for answers or the fleet is overloaded, at a fixed"
            " request rate that it can serve",
        )


def _tokens(pairs: Sequence[tuple[Block, Block]]) -> F64:
    """Tokens of each block: of finished requests where those are told, else of iterations."""
    for name in ("finished_tok", "iterated_tok"):
        found = np.array([[getattr(block, name) for block in pair] for pair in pairs])
        if found.any():
            break
    if not np.all(found > 0.0):
        raise EvidenceRefused(
            "no requests",
            "a block in which requests arrived, or might have, has no output tokens, and so no"
            " joules per token; use longer blocks, record while there is load, and give the"
            " engines' forward-pass metrics (`fpm` in the fleet file) where no router tells of"
            " finished requests",
        )
    return found


def _judged(pairs: Sequence[tuple[Block, Block]]) -> Mapping[str, Any]:
    told = [pair for pair in pairs if all(block.judged_req > 0 for block in pair)]
    if len(told) < 2:
        return {}
    met = np.array([[block.met_req / block.judged_req for block in pair] for pair in told])
    policy, highest = (
        sum(pair[k].met_req for pair in told) / sum(pair[k].judged_req for pair in told)
        for k in (0, 1)
    )
    return {
        "policy_attainment_frac": policy,
        "highest_attainment_frac": highest,
        "attainment_gap_frac": _paired_interval(met[:, 0] - met[:, 1]),
    }
