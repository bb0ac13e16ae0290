"""What to keep in mind when reading the figures of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from voltana_ctrl.experiment.run import Run
from voltana_ctrl.fit.profile_file import NOT_MEASURED

__all__ = ["notes_on"]

#: A policy that leaves more of its tokens than this for later has worked less than it seems.
_PUSHED_FRAC = 0.05


def notes_on(figures: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> Iterator[str]:
    """Say where figures may mislead: short windows, work left for later, profiles, shared requests.

    Parameters
    ----------
    figures : sequence of mapping
        Figures of the runs that have ended, named as in the JSON.
    runs : sequence of Run
        What was asked for.

    Yields
    ------
    str
        Sentences.

    Examples
    --------
    >>> from voltana_ctrl import compare
    >>> found = compare(rates_req_s=[5.0], duration_s=2.0, warmup_s=30.0, policies=["static-max"])
    >>> found.notes[0].partition(":")[0]
    'The window of 2 s is shorter than a request takes'
    """
    served = [one for one in figures if one.get("residence_mean_s") is not None]
    if served:
        yield from _on_times(max(served, key=lambda one: one["residence_mean_s"]), runs[0])
    yield from _on_rows_left_out(runs[0])
    yield from _on_nothing_to_judge(figures)
    yield from _on_choices(figures, runs)
    yield from _on_work_left(served)
    yield from _on_seeds(figures, runs)
    yield from _on_profiles(runs[0])


def _on_times(longest: Mapping[str, Any], run: Run) -> Iterator[str]:
    residence_s = longest["residence_mean_s"]
    what = f"{residence_s:.1f} s in the mean with {longest['policy']}"
    if run.duration_s < residence_s:
        yield (
            f"The window of {run.duration_s:g} s is shorter than a request takes: {what}. Most"
            " energy of the judged requests is spent outside; take a longer duration."
        )
    if run.warmup_s < residence_s and run.concurrency is None:
        yield (
            f"The warm-up of {run.warmup_s:g} s is shorter than a request takes: {what}. The"
            " window begins while batches still grow; take a longer warm-up."
        )


def _on_rows_left_out(run: Run) -> Iterator[str]:
    if not isinstance(run.workload, str) and run.workload.dropped_rows:
        yield (
            f"{run.workload.dropped_rows} rows of {run.workload.name} were left out: they failed,"
            " or cannot be used."
        )


def _on_profiles(run: Run) -> Iterator[str]:
    """Repeat what a fit said of its own profile: memory of another model, the batches measured."""
    for profile in {one.profile.name: one.profile for one in run.fleet.instances}.values():
        error = profile.sources.get("memory", {}).get("error", "")
        said = error.partition(f"{NOT_MEASURED}; ")[2]
        if said:
            yield f"Profile {profile.name}: {said}."


def _on_choices(figures: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> Iterator[str]:
    """What was found by trial, and that others may be run on the same layout."""
    own = runs[0].fleet.layout
    chosen: dict[str, dict[str, None]] = {}
    others: dict[str, dict[str, None]] = {}
    for one in figures:
        policy, layout = str(one["policy"]), one.get("layout") or own
        if layout != own:
            others.setdefault(policy, {})[f"--fleet {layout}"] = None
        if one.get("choice") is not None:
            what = one["choice"] if layout == own else f"as {layout}, {one['choice']}"
            load = "" if one["rate_req_s"] is None else f" at {one['rate_req_s']:.4g} req/s"
            chosen.setdefault(policy, {})[f"{what}{load}"] = None
    for policy, settings in chosen.items():
        yield f"{policy} chose: {'; '.join(settings)}."
    for policy, options in others.items():
        yield (
            f"{policy} gives the machines of {own} other roles, which other policies may not. To"
            f" compare on equal terms, run {' and '.join(options)}, too (or these roles in the"
            " fleet file)."
        )


def _on_work_left(served: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Work that was pushed past the window, or a burst before it that is served in it."""
    left = _policies_beyond(served, sign=1.0)
    if left:
        yield (
            "Left for after the window, of the tokens made in it and beyond what was carried in:"
            f" {left}. Compare energy per token, not power."
        )
    carried = _policies_beyond(served, sign=-1.0)
    if carried:
        yield (
            "Carried in from before the window, of the tokens made in it and beyond what was left"
            f" for later: {carried}. Part of their energy was spent before, so that savings"
            " per token are too high, even above the bound; take a longer window."
        )


def _policies_beyond(served: Sequence[Mapping[str, Any]], *, sign: float) -> str:
    """Policies that left much more than was carried in (sign 1), or the reverse (-1)."""
    most: dict[str, float] = {}
    for one in served:
        if one["tokens_out"] > 0:
            grown_tok = sign * (one["tokens_past_window"] - one["tokens_carried_in"])
            policy = str(one["policy"])
            most[policy] = max(most.get(policy, 0.0), grown_tok / one["tokens_out"])
    return ", ".join(f"{policy} {frac:.0%}" for policy, frac in most.items() if frac > _PUSHED_FRAC)


def _on_nothing_to_judge(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if any(one.get("requests_arrived") == 0 for one in figures):
        yield (
            "In some runs no request arrived in the window: a silence of the load, or times in"
            " another unit than seconds."
        )
    dropped = max((one.get("requests_dropped") or 0 for one in figures), default=0)
    if dropped:
        yield (
            f"{dropped} of the judged requests were dropped: no instance's KV cache holds their"
            " prompt and answer. They count as late."
        )


def _on_seeds(figures: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> Iterator[str]:
    if isinstance(runs[0].workload, str) or len({run.seed for run in runs}) == 1:
        return
    begins_s = sorted({one["trace_from_s"] or 0.0 for one in figures})
    if len(begins_s) == 1:
        yield (
            "All seeds run the same requests of the trace: they differ in chance routing and noise"
            " alone, and say nothing of other requests. For other windows a trace must be longer"
            f" than warm-up, window and grace, {_needs_s(figures, runs[0]):.0f} s."
        )
        return
    apart_s = min(after - before for before, after in pairwise(begins_s))
    shared = 1.0 - apart_s / runs[0].duration_s
    if shared > 0.0:
        yield (
            "Each seed takes another window of the trace; neighbours share up to"
            f" {shared:.0%} of their requests."
        )


def _needs_s(figures: Sequence[Mapping[str, Any]], run: Run) -> float:
    """How long the requests of one run are taken from a trace."""
    grace_s = max(float(one["grace_s"]) for one in figures)
    return run.warmup_s + run.duration_s + grace_s
