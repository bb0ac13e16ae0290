"""Figures of a simulated run: energy inside the window, latencies of the judged requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.records import NEVER
from voltana_ctrl.sim.waiting import deferred_figures
from voltana_ctrl.types import Slo

if TYPE_CHECKING:
    from voltana_ctrl.sim.plant import Plant

__all__ = [
    "at_the_wall",
    "drawn_j",
    "fill_gap_closed",
    "fill_saving",
    "judged_latencies",
    "run_figures",
    "snapshot",
    "unfinished",
]

#: What energy is drawn for.
_PARTS = ("prefill", "decode", "idle", "transfer")


def snapshot(simulated: Plant) -> Any:
    """Copy of every instance's sums, brought up to now.

    Parameters
    ----------
    simulated : Plant
        Stopped at an edge of the window.

    Returns
    -------
    records of INSTANCE_DTYPE, shape (n,)
        Energies in joules, times in seconds and counts since the start, by name.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> run = Plant(fleet, make_workload("sharegpt", rate_req_s=1.0, duration_s=5.0, seed=0))
    >>> float(snapshot(run)["idle_j"].sum())
    0.0
    """
    from voltana_ctrl.kernels.plant import advance  # loads Numba

    advance.settle_accounts(simulated._arrays)
    return simulated.instances.copy()


def drawn_j(sums: Any) -> Any:
    """Energy that each instance has drawn, shape (n,): that of all its activities.

    Parameters
    ----------
    sums : records or mapping of ndarray
        What :func:`snapshot` made, or what its sums have gained.

    Returns
    -------
    ndarray, shape (n,)
        Joules.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.array([2.0])
    >>> drawn_j({"prefill_j": one, "decode_j": one, "idle_j": one, "transfer_j": one})
    array([8.])
    """
    return sum(sums[f"{part}_j"] for part in _PARTS)


def unfinished(simulated: Plant) -> tuple[int, int]:
    """Requests that have arrived and are not done, and the output tokens that they still need.

    Parameters
    ----------
    simulated : Plant
        Stopped at an edge of the window.

    Returns
    -------
    requests, tokens
        Both whole numbers, over the fleet.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> run = Plant(fleet, make_workload("fixed", rate_req_s=5.0, duration_s=20.0, seed=0))
    >>> unfinished(run)
    (0, 0)
    >>> run.advance(10.0)
    >>> requests, tokens = unfinished(run)
    >>> 0 < tokens < 128 * requests
    True
    """
    requests = simulated.requests
    rows = requests[~np.isin(requests["state"], (layout.FUTURE, layout.DONE, layout.DROPPED))]
    made_tok = rows["made_tok"].copy()
    runs = rows["state"] == layout.RUNNING
    step = simulated.instances["step"][rows["decode_at"][runs]]
    made_tok[runs] += step - rows["join_step"][runs]
    return len(rows), int((rows["output_tok"] - made_tok).sum())


def run_figures(simulated: Plant, before: Any, after: Any, window_s: float, slo: Slo) -> dict[
    str, Any
]:  # fmt: skip
    """Figures of one run, as the JSON of ``compare`` names them.

    Parameters
    ----------
    simulated : Plant
        The plant, after the run.
    before, after : snapshots
        At the edges of the window.
    window_s : float
        Length of the window.
    slo : Slo
        What attainment is judged by.

    Returns
    -------
    dict
        Energy and power over the window, latencies of the judged requests, tokens, clocks and
        counts, by name. A value that does not exist is None, never 0.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.sim.metrics import snapshot
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> run = Plant(fleet, make_workload("sharegpt", rate_req_s=1.0, duration_s=60.0, seed=0))
    >>> before = snapshot(run)
    >>> run.advance(60.0)
    >>> figures = run_figures(run, before, snapshot(run), 60.0, Slo(ttft_s=0.6, itl_s=0.06))
    >>> figures["slo_attainment"] > 0.9
    True
    """
    energy_j = _energy(before, after)
    # What a failure has undone was not delivered, and is made once more.
    tokens_lost = int(_gain(before, after, "lost_tok").sum())
    tokens_out = int(_gain(before, after, "emitted_tok").sum()) - tokens_lost
    return {
        "window_s": window_s,
        **energy_j,
        "mean_power_w": energy_j["energy_j"] / window_s,
        "energy_per_token_j": energy_j["energy_j"] / tokens_out if tokens_out > 0 else None,
        **_latencies(simulated, slo),
        "tokens_out": tokens_out,
        "tokens_lost": tokens_lost,
        **_activity(simulated, before, after, window_s),
    }


def fill_gap_closed(figures: list[dict[str, Any]]) -> None:
    """Fill in which share of the way from voltanallm's energy to the bound each run goes.

    Parameters
    ----------
    figures : list of dict
        Runs of all policies, changed in place: ``bound_gap_closed`` is set where voltanallm and
        bound ran at the same rate and seed, and lie at least 5 % of voltanallm's energy apart.
        Elsewhere it stays what it is.

    Examples
    --------
    >>> runs = [{"policy": policy, "rate_req_s": 5.0, "seed": 0, "energy_j": energy_j}
    ...         for policy, energy_j in (("voltanallm", 100.0), ("bound", 60.0), ("mine", 70.0))]
    >>> fill_gap_closed(runs)
    >>> runs[2]["bound_gap_closed"]
    0.75
    """
    energy_j = {(run["policy"], run["rate_req_s"], run["seed"]): run["energy_j"] for run in figures}
    for run in figures:
        where = (run["rate_req_s"], run["seed"])
        volta_j = energy_j.get(("voltanallm", *where))
        bound_j = energy_j.get(("bound", *where))
        if not volta_j or not bound_j or run["energy_j"] is None:
            continue
        if volta_j - bound_j >= 0.05 * volta_j:
            run["bound_gap_closed"] = (volta_j - run["energy_j"]) / (volta_j - bound_j)


def at_the_wall(figures: dict[str, Any], rest_of_server_w: float) -> dict[str, Any]:
    """Power and energy per token with the rest of the servers, which no policy changes.

    Parameters
    ----------
    figures : dict
        Figures of one run.
    rest_of_server_w : float
        What all servers of the fleet draw besides their GPUs; 0 where nobody knows.

    Returns
    -------
    dict
        ``wall_power_w`` and ``wall_per_token_j``; None where they are not known.

    Examples
    --------
    >>> at_the_wall({"mean_power_w": 300.0, "window_s": 10.0, "tokens_out": 1000}, 100.0)
    {'wall_power_w': 400.0, 'wall_per_token_j': 4.0}
    >>> at_the_wall({"mean_power_w": 300.0}, 0.0)
    {'wall_power_w': None, 'wall_per_token_j': None}
    """
    power_w, tokens = figures.get("mean_power_w"), figures.get("tokens_out")
    wall_w = None if power_w is None or not rest_of_server_w else power_w + rest_of_server_w
    token_j = None if wall_w is None or not tokens else wall_w * figures["window_s"] / tokens
    return {"wall_power_w": wall_w, "wall_per_token_j": token_j}


# What is saved, and of what: energy per token at the GPUs and at the wall.
_SAVINGS = {"saving_token_frac": "energy_per_token_j", "saving_wall_frac": "wall_per_token_j"}


def fill_saving(figures: list[dict[str, Any]]) -> None:
    """Fill in the share of energy per output token saved against static-max; None without it.

    Parameters
    ----------
    figures : list of dict
        Runs of all policies, changed in place: ``saving_token_frac`` and ``saving_wall_frac``, the
        latter None where power at the wall is not known.

    Examples
    --------
    >>> runs = [{"policy": policy, "rate_req_s": 5.0, "seed": 0, "energy_per_token_j": token_j}
    ...         for policy, token_j in (("static-max", 0.4), ("mine", 0.3), ("bound", None))]
    >>> fill_saving(runs)
    >>> [run["saving_token_frac"] for run in runs][::2], round(runs[1]["saving_token_frac"], 3)
    ([0.0, None], 0.25)
    """
    full = {
        (run["rate_req_s"], run["seed"]): run for run in figures if run["policy"] == "static-max"
    }
    for run in figures:
        reference = full.get((run["rate_req_s"], run["seed"]), {})
        for saving, key in _SAVINGS.items():
            full_j, own_j = reference.get(key), run.get(key)
            run[saving] = None if not full_j or own_j is None else 1.0 - own_j / full_j


def _gain(before: Any, after: Any, name: str) -> Any:
    return after[name] - before[name]


def _energy(before: Any, after: Any) -> dict[str, float]:
    parts = {f"energy_{part}_j": float(_gain(before, after, f"{part}_j").sum()) for part in _PARTS}
    return {"energy_j": sum(parts.values()), **parts}


def judged_latencies(simulated: Plant) -> tuple[Any, Any]:
    """TTFT and ITL [s] of every judged request that arrived; NaN where it has none yet.

    Those that may wait are left out: nothing is promised of either.

    Parameters
    ----------
    simulated : Plant
        The plant, after the run.

    Returns
    -------
    ttft_s, itl_s : ndarray, shape (n_judged,)
        The ITL of a single token is 0.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> run = Plant(fleet, make_workload("fixed", rate_req_s=1.0, duration_s=5.0, seed=0))
    >>> run.advance(100.0)
    >>> ttft_s, itl_s = judged_latencies(run)
    >>> bool(0.0 < itl_s.max() < ttft_s.max() < 1.0)
    True
    """
    rows = _judged(simulated)
    rows = rows[rows["deadline_s"] >= NEVER]
    return _latencies_of(rows)


def _latencies_of(rows: Any) -> tuple[Any, Any]:
    ttft_s = np.where(rows["first_s"] >= 0.0, rows["first_s"] - rows["arrival_s"], np.nan)
    gaps = np.maximum(rows["output_tok"] - 1, 1)
    done = rows["state"] == layout.DONE
    return ttft_s, np.where(done, (rows["done_s"] - rows["first_s"]) / gaps, np.nan)


def _judged(simulated: Plant) -> Any:
    requests = simulated.requests
    sim = simulated._sim[0]
    judged = (requests["arrival_s"] >= sim["judge_from_s"]) & (
        requests["arrival_s"] < min(sim["judge_until_s"], 1e299)
    )
    return requests[judged & (requests["state"] != layout.FUTURE)]


def _latencies(simulated: Plant, slo: Slo) -> dict[str, Any]:
    everybody = _judged(simulated)
    rows = everybody[everybody["deadline_s"] >= NEVER]
    all_ttft_s, all_itl_s = _latencies_of(rows)
    done = rows["state"] == layout.DONE
    # What is not finished in time is a miss of both; what is not known compares as false.
    ttft_met, itl_met = done & (all_ttft_s <= slo.ttft_s), all_itl_s <= slo.itl_s
    ttft_s = all_ttft_s[rows["first_s"] >= 0.0]
    itl_s = all_itl_s[done & (rows["output_tok"] > 1)]  # a single token has no gap
    residence_s = (rows["done_s"] - rows["arrival_s"])[done]
    completed = int((everybody["state"] == layout.DONE).sum())
    dropped = int((everybody["state"] == layout.DROPPED).sum())
    return {
        "ttft_attainment": _mean(ttft_met),
        "itl_attainment": _mean(itl_met),
        "slo_attainment": _mean(ttft_met & itl_met),
        "ttft_p50_s": _quantile(ttft_s, 0.5),
        "ttft_p99_s": _quantile(ttft_s, 0.99),
        "itl_p50_s": _quantile(itl_s, 0.5),
        "itl_p99_s": _quantile(itl_s, 0.99),
        "residence_mean_s": _mean(residence_s),
        "requests_arrived": len(everybody),
        "requests_completed": completed,
        "requests_in_flight": len(everybody) - completed - dropped,
        "requests_dropped": dropped,
        "preemptions": int(everybody["preemptions"].sum()),
        "retries": int(everybody["retries"].sum()),
        **deferred_figures(everybody, simulated.now_s),
    }


def _activity(simulated: Plant, before: Any, after: Any, window_s: float) -> dict[str, Any]:
    fleet = simulated.fleet
    flexible = any(one.roles for one in fleet.instances)
    changes = _gain(before, after, "role_changes")
    moved = bool(after["role_changes"].any())
    decoded = _gain(before, after, "decoded_tok").sum()
    iterations = _gain(before, after, "decode_iterations").sum()
    busy_s = _gain(before, after, "busy_s")
    busy_mhz_s = _gain(before, after, "busy_mhz_s")
    mean_batch = float(decoded / iterations) if iterations else None
    largest = max(fleet.instances[i].max_batch for i in fleet.decode)
    regime = "open_loop"
    if mean_batch is not None and mean_batch >= 0.98 * largest:
        regime = "capped_batch"
    if simulated.workload.concurrency is not None:
        regime = "closed_loop"
    return {
        "mean_batch": mean_batch,
        # Of a phase that has had other instances from time to time there are none.
        "mean_freq_prefill_mhz": None
        if moved
        else _ratio(busy_mhz_s[fleet.prefill], busy_s[fleet.prefill]),
        "mean_freq_decode_mhz": None
        if moved
        else _ratio(busy_mhz_s[fleet.decode], busy_s[fleet.decode]),
        "role_changes": int(changes.sum()) if flexible else None,
        "wakes": int(_gain(before, after, "wakes").sum()),
        "clock_changes": int(_gain(before, after, "clock_sets").sum()),
        "active_decode_mean": None
        if moved
        else float(_gain(before, after, "active_s")[fleet.decode].sum()) / window_s,
        "iterations": int(_gain(before, after, "iterations").sum()),
        "regime": regime,
    }


def _ratio(over: Any, under: Any) -> float | None:
    return float(over.sum() / under.sum()) if under.sum() > 0.0 else None


def _mean(values: Any) -> float | None:
    return float(values.mean()) if values.size else None


def _quantile(values: Any, q: float) -> float | None:
    return float(np.quantile(values, q)) if values.size else None
