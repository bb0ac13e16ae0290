"""Savings with their uncertainty.

The plant is a draw from the bands of its profiles, the policy believes the profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import count
from voltana_ctrl.experiment.grid import Grid
from voltana_ctrl.profiles.draws import draw_fleet

__all__ = ["REFERENCE", "interval_lines", "refuse_unknown", "savings_intervals"]

#: What savings are counted from.
REFERENCE = "static-max"
_LOW_FRAC, _HIGH_FRAC = 0.05, 0.95
#: Of so many draws one is beyond each end.
_FEW_DRAWS = 20


def refuse_unknown(grid: Grid, draws: int) -> None:
    """Refuse draws that there cannot be, before anything runs.

    Parameters
    ----------
    grid : Grid
        The grid whose fleet is drawn from.
    draws : int
        How many are asked for.

    Raises
    ------
    ConfigError
        If a profile has no band, or `draws` is no positive number.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.experiment.grid import plan_runs
    >>> own = replace(load_profile("a100-sxm-80gb/llama-3.1-8b"), name="gpu/own", band=None)
    >>> refuse_unknown(plan_runs(fleet=FleetSpec.parse("1P1D", own)), 10)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: profile gpu/own: has no section [band], so nothing is known of
    how far it may be from the truth; add one, or fit it anew
    """
    count("uncertainty", draws)
    draw_fleet(grid.spec, np.random.default_rng(0))


def savings_intervals(
    grid: Grid,
    draws: int,
    *,
    executor: Executor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Savings per output token of every policy over draws of the fleet's profiles.

    Every draw is one fleet, the same for all policies, loads and seeds, over which it is averaged:
    what other requests would do is not in the interval. Policies believe the fleet of the grid.
    Draws come from a seed of their own, so more of them add to the same ones.

    Parameters
    ----------
    grid : Grid
        Runs of the fleet as believed; one of them ``static-max``.
    draws : int
        How many fleets.
    executor : concurrent.futures.Executor, optional
        Where runs go; this process if left out.
    on_progress : callable (done, total), optional
        Called as each draw is done.

    Returns
    -------
    list of dict
        One per policy and load: `policy`, `rate_req_s`, `draws`, `saving_p5_frac`,
        `saving_p50_frac`, `saving_p95_frac`, `kept_frac` (share of draws in which it keeps the
        promise), and `below_frac`: per other policy the share of draws in which it draws less
        per token.

    Raises
    ------
    ConfigError
        If a profile has no band, or `draws` is no positive number.

    Examples
    --------
    >>> from voltana_ctrl.experiment.grid import plan_runs
    >>> grid = plan_runs(fleet="1P1D", rates_req_s=[5.0], duration_s=10.0, warmup_s=2.0,
    ...                  policies=["static-max", "static-1005"])
    >>> found = savings_intervals(grid, 4)
    >>> found[1]["policy"], found[1]["saving_p5_frac"] < found[1]["saving_p95_frac"]
    ('static-1005', True)
    """
    refuse_unknown(grid, draws)
    token_j: dict[tuple[str, float | None], list[float]] = {}
    kept: dict[tuple[str, float | None], list[bool]] = {}
    for draw in range(draws):
        fleet = draw_fleet(grid.spec, np.random.default_rng([draw, 7]))
        runs = tuple(
            replace(run, fleet=fleet, believed=grid.spec, detail=False)
            for run in grid.runs
            if run.policy != "bound"
        )
        by: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
        for done in replace(grid, runs=runs).execute(executor):
            run = runs[done.index]
            key = str(run.policy), done.figures.get("rate_req_s", run.rate_req_s)
            by.setdefault(key, []).append(done.figures)
        slo = grid.runs[0].slo
        for key, figures in by.items():
            each = [one["energy_per_token_j"] or np.nan for one in figures]
            token_j.setdefault(key, []).append(float(np.mean(each)))
            met = [
                np.mean([one[name] or 0.0 for one in figures])
                for name in ("ttft_attainment", "itl_attainment")
            ]
            kept.setdefault(key, []).append(bool(min(met) >= slo.attainment))
        if on_progress is not None:
            on_progress(draw + 1, draws)
    loads = dict.fromkeys(load for _, load in token_j)
    asked = [(policy, load) for load in loads for policy in grid.policies]
    return [_interval(key, token_j, kept[key]) for key in asked if key in token_j]


def interval_lines(intervals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table for a terminal.

    Parameters
    ----------
    intervals : sequence of mapping
        What :func:`savings_intervals` made.

    Examples
    --------
    >>> row = {"policy": "mpc", "rate_req_s": 10.0, "draws": 20, "saving_p5_frac": 0.41,
    ...        "saving_p50_frac": 0.5, "saving_p95_frac": 0.58, "kept_frac": 0.9,
    ...        "below_frac": {"static-max": 1.0, "pack": 0.85}}
    >>> print(interval_lines([row])[-1])
       10  mpc       50% (41% to 58%)    90%  pack 85%
    """
    if not intervals:
        return []
    longest = max(len(str(one["policy"])) for one in intervals)
    lines = [
        f"If the fleet is what its profiles may be ({intervals[0]['draws']} draws from their bands;"
        " policies believe the profiles), median saving per token over all seeds:",
        f"req/s  {'policy':<{max(longest, 8)}}  saving (5 to 95 %)  keeps  undecided: draws in"
        " which it draws less than",
    ]
    if intervals[0]["draws"] < _FEW_DRAWS:
        lines.insert(
            1, f"Fewer than {_FEW_DRAWS} draws: the ends are the outermost of them, and say little."
        )
    for one in intervals:
        low, middle, high = (one[f"saving_p{q}_frac"] for q in (5, 50, 95))
        saving = "" if middle is None else f"{middle:.0%} ({low:.0%} to {high:.0%})"
        rate = "-" if one["rate_req_s"] is None else f"{one['rate_req_s']:.4g}"
        unsure = ", ".join(
            f"{name} {frac:.0%}" for name, frac in one["below_frac"].items() if 0.05 < frac < 0.95
        )
        lines.append(
            f"{rate:>5}  {one['policy']:<{max(longest, 8)}}  {saving:<16}  {one['kept_frac']:>5.0%}"
            f"  {unsure}".rstrip()
        )
    return lines


def _interval(
    key: tuple[str, float | None],
    token_j: dict[tuple[str, float | None], list[float]],
    kept: list[bool],
) -> dict[str, Any]:
    policy, rate_req_s = key
    own_j = np.array(token_j[key])
    saving: list[float | None] = [None, None, None]
    reference = token_j.get((REFERENCE, rate_req_s))
    if reference is not None:
        shares = 1.0 - own_j / np.array(reference)
        saving = [float(np.nanquantile(shares, q)) for q in (_LOW_FRAC, 0.5, _HIGH_FRAC)]
    others = [name for name, rate in token_j if rate == rate_req_s and name != policy]
    return {
        "policy": policy,
        "rate_req_s": rate_req_s,
        "draws": len(own_j),
        "saving_p5_frac": saving[0],
        "saving_p50_frac": saving[1],
        "saving_p95_frac": saving[2],
        "kept_frac": float(np.mean(kept)),
        "below_frac": {
            name: float(np.mean(own_j < np.array(token_j[name, rate_req_s]))) for name in others
        },
    }
