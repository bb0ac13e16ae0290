"""What every figure shares: type, lines, axes for shares and loads, legends."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from voltana_ctrl.report.palette import GRID, INK, MISS, PAPER, Look
from voltana_ctrl.report.study import Study

WIDTH_IN = 7.2  # across two columns of a paper
OBJECTIVE = {"color": MISS, "linewidth": 1.0, "linestyle": (0, (4, 2))}

# Shares are drawn so that 99 % stands as far from 90 % as that from 0; the scale ends here.
_RESOLUTION = 1e-3
_TICKS_FRAC = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)

_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.ymargin": 0.1,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.4,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.0,
    "figure.facecolor": PAPER,
    "text.parse_math": False,  # names are taken as they are
    "svg.fonttype": "none",
    "svg.hashsalt": "voltana-ctrl",
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """Settings of all figures; the user's own come back after."""
    import matplotlib

    with matplotlib.rc_context(cast("Any", _SETTINGS)):
        yield


def new_canvas(size_in: tuple[float, float]) -> Any:
    """Empty figure that belongs to no window and to no list."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05)
    return Figure(figsize=size_in, layout=layout)


def letter(axis: Any, number: int, title: str) -> None:
    """Title of a panel, with its letter."""
    axis.set_title(f"({chr(ord('a') + number)}) {title}", loc="left")


def wrapped(policy: str, width: int = 15) -> str:
    """Name of a policy on as many lines as it needs."""
    return "\n".join(textwrap.wrap(policy.replace(":", ": "), width))


def share_axis(axis: Any, label: str, target_frac: float) -> None:
    """Ordinate for shares close to 1, with a line at the share that is promised."""
    axis.set_yscale("function", functions=(_nines, _from_nines))
    axis.set_ylim(0.0, _from_nines(3.12))
    axis.set_yticks(_TICKS_FRAC, [f"{100.0 * tick:g}" for tick in _TICKS_FRAC])
    axis.set_ylabel(label)
    axis.axhline(target_frac, label="objective", **OBJECTIVE)


def _nines(share_frac: Any) -> Any:
    return -np.log10(np.maximum(1.0 - np.asarray(share_frac, dtype=float) + _RESOLUTION, 1e-9))


def _from_nines(nines: Any) -> Any:
    return 1.0 + _RESOLUTION - 10.0 ** -np.asarray(nines, dtype=float)


def series(axis: Any, study: Study, policy: str, look: Look, values: Mapping[Any, Any]) -> None:
    """Draw what a policy does at each load; hollow marks where it misses the SLO.

    With a single load there is no curve: policies stand side by side.
    """
    loads = [rate_req_s for rate_req_s in study.loads if values.get(rate_req_s) is not None]
    if not loads:
        return
    mean = [float(np.mean(values[rate_req_s])) for rate_req_s in loads]
    if policy == "bound" and len(study.loads) == 1:
        axis.axhline(mean[0], color=look.colour, linestyle=look.dashes, label=policy)
        return
    at = loads if len(study.loads) > 1 else [columns(study).index(policy)]
    axis.plot(at, mean, color=look.colour, linestyle=look.dashes, label=policy)
    ends = [(min(values[rate_req_s]), max(values[rate_req_s])) for rate_req_s in loads]
    if any(low < high for low, high in ends):
        axis.vlines(at, *zip(*ends, strict=True), color=look.colour, linewidth=1.0)
    if not look.marker:
        return
    for x, y, rate_req_s in zip(at, mean, loads, strict=True):
        misses = study.meets_slo(policy, rate_req_s) is False
        axis.plot(
            [x], [y], marker=look.marker, linestyle="", color=look.colour, clip_on=False,
            markerfacecolor=PAPER if misses else look.colour, zorder=3,
        )  # fmt: skip


def columns(study: Study) -> list[str]:
    """Policies that run, in order: all but the bound."""
    return [policy for policy in study.policies if policy != "bound"]


def load_axis(axis: Any, study: Study) -> None:
    """Abscissa of :func:`series`."""
    if len(study.loads) > 1:
        axis.set_xlabel("Load [req/s]")
        return
    names = columns(study)
    axis.set_xlim(-0.5, max(len(names), 1) - 0.5)
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor")


def legend(
    page: Any, looks: Mapping[str, Look], extra: Mapping[str, Any], *, marks: bool = True
) -> None:
    """Keys of policies, and of what else is drawn, above the figure."""
    keys = {
        policy: sign(color=look.colour, marker=look.marker if marks else "", linestyle=look.dashes)
        for policy, look in looks.items()
    } | dict(extra)
    # A letter takes about 0.06 in, the sign before it half an inch.
    widest_in = 0.06 * max(map(len, keys)) + 0.5
    fit = max(1, min(len(keys), int(WIDTH_IN / widest_in)))
    rows = -(-len(keys) // fit)
    page.legend(
        list(keys.values()),
        list(keys),
        loc="outside upper center",
        ncols=-(-len(keys) // rows),
        handlelength=2.4,
        columnspacing=1.6,
    )


def sign(**look: Any) -> Any:
    """Key of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)
