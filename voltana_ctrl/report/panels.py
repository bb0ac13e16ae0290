"""The four figures of a study, each drawn onto a canvas that it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.report.canvas import (
    OBJECTIVE,
    WIDTH_IN,
    columns,
    legend,
    letter,
    load_axis,
    series,
    share_axis,
    sign,
    wrapped,
)
from voltana_ctrl.report.palette import INK, MISS, PAPER, PARTS, looks
from voltana_ctrl.report.study import Study, load_text
from voltana_ctrl.sim.detail import RunDetail

MAX_LOADS = 6  # side by side; more are thinned evenly
MAX_LATENCY = 20.0  # abscissa ends at so many times the objective


# Power and attainment against load


def draw_loads(page: Any, study: Study, rate_req_s: float | None) -> None:  # noqa: ARG001
    """Power, distance to the bound, TTFT and ITL attainment."""
    look = looks(study.policies)
    axes = page.subplots(2, 2, sharex=True)
    power, distance, ttft, itl = axes.flat
    with_bound = [each for each in study.loads if study.above_bound_frac("bound", each) is not None]
    for policy in study.policies:

        def draw(axis: Any, key: str, policy: str = policy) -> None:
            values = {each: study.values(policy, each, key) or None for each in study.loads}
            series(axis, study, policy, look[policy], values)

        draw(power, "mean_power_w")
        draw(ttft, "ttft_attainment")
        draw(itl, "itl_attainment")
        if with_bound:
            above = {each: _percent(study.above_bound_frac(policy, each)) for each in with_bound}
            series(distance, study, policy, look[policy], above)
        else:
            draw(distance, "energy_per_token_j")
    slo = study.comparison["slo"]
    share_axis(ttft, f"TTFT ≤ {slo['ttft_s']:g} s [% of requests]", study.target_frac)
    share_axis(itl, f"ITL ≤ {slo['itl_s'] * 1e3:g} ms [% of requests]", study.target_frac)
    power.set(ylabel="Mean power [W]", ylim=(0.0, None))
    distance.set_ylabel("Power above the bound [%]" if with_bound else "Energy [J/token]")
    if not with_bound:
        distance.set_ylim(bottom=0.0)
    titles = [
        "Fleet power",
        "Distance to the fluid bound" if with_bound else "Energy per output token",
        "TTFT attainment",
        "ITL attainment",
    ]
    for number, (axis, title) in enumerate(zip(axes.flat, titles, strict=True)):
        letter(axis, number, title)
    for axis in axes[1]:
        load_axis(axis, study)
    legend(
        page,
        look,
        {
            "misses the SLO": sign(color=INK, marker="o", linestyle="", markerfacecolor=PAPER),
            f"SLO: {_share(study.target_frac)} of requests": sign(**OBJECTIVE),
        },
    )


def _percent(value_frac: float | None) -> list[float] | None:
    return None if value_frac is None else [100.0 * value_frac]


def _share(share_frac: float) -> str:
    return f"{100.0 * share_frac:.4g} %"


# Energy split


def energy_height_in(study: Study) -> float:
    """Height: a row of panels for three loads, a bar for each policy."""
    rows = -(-len(_thinned(study.loads)) // 3)
    return 0.75 + rows * (0.42 + 0.21 * len(study.policies))


def _thinned(loads: tuple[float | None, ...]) -> list[float | None]:
    chosen = np.linspace(0, len(loads) - 1, min(MAX_LOADS, len(loads))).round().astype(int)
    return [loads[k] for k in dict.fromkeys(chosen.tolist())]


def draw_energy(page: Any, study: Study, rate_req_s: float | None) -> None:  # noqa: ARG001
    """Mean power by part, policies under one another, a panel for each load."""
    from matplotlib.patches import Patch

    shown = _thinned(study.loads)
    wide = min(3, len(shown))
    axes = page.subplots(-(-len(shown) // wide), wide, sharex=True, sharey=True, squeeze=False)
    at = np.arange(len(study.policies))
    for number, axis in enumerate(axes.flat):
        if number >= len(shown):
            axis.set_axis_off()
            continue
        each = shown[number]
        letter(axis, number, load_text(each))
        left_w = np.zeros(len(at))
        for part, colour in PARTS.items():
            width_w = np.array([_part_w(study, policy, each, part) for policy in study.policies])
            axis.barh(at, width_w, left=left_w, height=0.7, color=colour, label=part)
            left_w += width_w
        for k, policy in enumerate(study.policies):
            power_w = study.mean(policy, each, "mean_power_w")
            if power_w is None:
                continue
            if policy == "bound":
                axis.barh(
                    k, power_w, height=0.7, facecolor="none", edgecolor=INK, linestyle="--",
                    linewidth=0.9,
                )  # fmt: skip
            misses = study.meets_slo(policy, each) is False
            axis.annotate(
                f"{power_w:.0f}{' *' if misses else ''}", (power_w, k), (3, 0), size=7,
                textcoords="offset points", va="center", color=MISS if misses else INK,
            )  # fmt: skip
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("Mean power [W]" if number + wide >= len(shown) else "")
        axis.tick_params(labelbottom=number + wide >= len(shown))
    axes[0, 0].set_yticks(at, [wrapped(policy, 16) for policy in study.policies])
    axes[0, 0].invert_yaxis()
    axes[0, 0].margins(x=0.16, y=0.02)
    page.legend(
        [Patch(color=colour) for colour in PARTS.values()],
        [f"{part} (KV)" if part == "transfer" else part for part in PARTS],
        loc="outside upper center",
        ncols=len(PARTS),
        handlelength=1.2,
    )


def _part_w(study: Study, policy: str, rate_req_s: float | None, part: str) -> float:
    energy_j = study.mean(policy, rate_req_s, f"energy_{part}_j")
    window_s = study.mean(policy, rate_req_s, "window_s")
    return energy_j / window_s if energy_j is not None and window_s else 0.0


# Clocks, batch and power over time


def time_height_in(study: Study) -> float:
    """Height: a row for each quantity, titles of as many lines as the longest name."""
    lines = max((wrapped(policy).count("\n") for policy in columns(study)), default=0)
    return 4.6 + 0.13 * lines


def draw_time(page: Any, study: Study, rate_req_s: float | None) -> None:
    """Clocks, decode batch and fleet power over the window, a column for each policy."""
    look = looks(study.policies)
    kept = {policy: study.detail(policy, rate_req_s) for policy in columns(study)}
    first = {policy: details[0] for policy, details in kept.items() if details}
    if not first:
        return
    one = next(iter(first.values()))
    colocated = np.array_equal(one.prefill, one.decode)
    rows = {"Clock\n[MHz]" if colocated else "Decode clock\n[MHz]": _decode_clock}
    if not colocated:
        rows["Prefill clock\n[MHz]"] = _prefill_clock
    rows |= {"Decode batch\n[req]": _batch, "Fleet power\n[W]": _power}
    axes = page.subplots(len(rows), len(first), sharex=True, sharey="row", squeeze=False)
    width_in = (WIDTH_IN - 0.8) / len(first)
    for column, (policy, detail) in enumerate(first.items()):
        middle_s = 0.5 * (detail.edge_s[1:] + detail.edge_s[:-1])
        axes[0, column].set_title(wrapped(policy), size=7.5)
        for axis, quantity in zip(axes[:, column], rows.values(), strict=True):
            values = np.ma.masked_invalid(quantity(detail))
            colour = look[policy].colour
            if values.shape[1] > 1:
                axis.fill_between(
                    middle_s, values.min(axis=1).filled(np.nan), values.max(axis=1).filled(np.nan),
                    color=colour, alpha=0.28, linewidth=0,
                )  # fmt: skip
            axis.plot(middle_s, values.mean(axis=1).filled(np.nan), color=colour, linewidth=1.1)
        axes[-1, column].set_xlabel("Time [s]")
        _draw_budget(axes[-1, column], study, detail)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label)
        axis.yaxis.set_label_coords(-0.5 / width_in, 0.5)  # under one another
    axes[-2, 0].set_ylim(bottom=0.0)
    axes[-1, 0].set_ylim(bottom=0.0)


def _decode_clock(detail: RunDetail) -> Any:
    return detail.freq_mhz[:, detail.decode]


def _prefill_clock(detail: RunDetail) -> Any:
    return detail.freq_mhz[:, detail.prefill]


def _batch(detail: RunDetail) -> Any:
    return detail.batch_req[:, detail.decode]


def _power(detail: RunDetail) -> Any:
    return detail.power_w.sum(axis=1, keepdims=True)


def _draw_budget(axis: Any, study: Study, detail: RunDetail) -> None:
    if not study.power_budget_w:
        return
    from_s, budget_w = zip(*study.power_budget_w, strict=True)
    end_s = float(detail.edge_s[-1])
    axis.step(
        [*from_s, end_s], [*budget_w, budget_w[-1]], where="post", label="budget", **OBJECTIVE
    )
    axis.set_xlim(float(detail.edge_s[0]), end_s)


# Latency


def draw_latency(page: Any, study: Study, rate_req_s: float | None) -> None:
    """Cumulative distributions of TTFT and ITL over all requests, with the objectives."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    look = looks(study.policies)
    slo = study.comparison["slo"]
    kept = {policy: study.detail(policy, rate_req_s) for policy in columns(study)}
    axes = page.subplots(1, 2)
    for number, (axis, name, objective_s, unit, scale) in enumerate(
        (
            (axes[0], "ttft", slo["ttft_s"], "s", 1.0),
            (axes[1], "itl", slo["itl_s"], "ms", 1e3),
        )
    ):
        smallest_s, largest_s = objective_s / 3.0, objective_s * 2.0
        for policy, details in kept.items():
            if not details:
                continue
            latency_s, share_frac = _distribution(details, name)
            axis.plot(
                latency_s * scale, share_frac, drawstyle="steps-post", color=look[policy].colour,
                linestyle=look[policy].dashes, label=policy, linewidth=1.3,
            )  # fmt: skip
            known_s = latency_s[latency_s > 0.0]
            if known_s.size:
                smallest_s = min(smallest_s, float(known_s[0]))
                largest_s = max(largest_s, float(known_s[-1]))
        axis.set_xscale("log")
        axis.set_xlim(
            0.9 * smallest_s * scale, 1.1 * min(largest_s, MAX_LATENCY * objective_s) * scale
        )
        share_axis(axis, "Within [% of requests]", study.target_frac)
        axis.axvline(objective_s * scale, label="objective", **OBJECTIVE)
        axis.annotate(
            f"SLO {objective_s * scale:g} {unit}", (objective_s * scale, 0.0), (3, 4), color=MISS,
            xycoords=("data", "axes fraction"), textcoords="offset points", size=7,
        )  # fmt: skip
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_xlabel(f"{name.upper()} [{unit}]")
        letter(axis, number, "Time to first token" if name == "ttft" else "Inter-token latency")
    legend(
        page,
        {policy: look[policy] for policy, details in kept.items() if details},
        {f"SLO ({_share(study.target_frac)} of requests)": sign(**OBJECTIVE)},
        marks=False,
    )


def _distribution(details: list[RunDetail], name: str) -> tuple[Any, Any]:
    """Latencies, and the share of requests within each; every seed counts the same."""
    curves_s = [getattr(detail, f"{name}_s") for detail in details]
    latency_s = np.unique(np.concatenate(curves_s))
    latency_s = latency_s[np.isfinite(latency_s)]
    shares_frac = [
        np.concatenate([[0.0], detail.quantile_frac])[
            np.searchsorted(curve_s, latency_s, side="right")
        ]
        for detail, curve_s in zip(details, curves_s, strict=True)
    ]
    return latency_s, np.mean(shares_frac, axis=0)
