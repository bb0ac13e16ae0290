"""The figures by name, as files and as parts of a page; Matplotlib loads on first use."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.files import whole_file
from voltana_ctrl.report.canvas import WIDTH_IN, new_canvas, style
from voltana_ctrl.report.palette import INK, MISS
from voltana_ctrl.report.panels import (
    draw_energy,
    draw_latency,
    draw_loads,
    draw_time,
    energy_height_in,
    time_height_in,
)
from voltana_ctrl.report.study import Study, load_text

#: Files that a plot can be written to.
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: its name, what it shows, how to read it, how high it is, who draws it."""

    name: str
    title: str
    caption: str
    height_in: Callable[[Study], float]
    draw: Callable[[Any, Study, float | None], None]
    one_load: bool = False


FIGURES = (
    Figure(
        "loads",
        "Power and attainment against load",
        "Means over seeds, with the range of seeds as a bar. A hollow mark: fewer requests than"
        " promised met TTFT or ITL, so that power does not compare. The fluid bound is the least"
        " power of a clairvoyant controller without noise; no policy that keeps the SLO can lie"
        " below it. Shares are spaced by the logarithm of what is missing.",
        lambda study: 4.9 if len(study.loads) > 1 else 5.4,
        draw_loads,
    ),
    Figure(
        "energy",
        "Where the energy goes",
        "Energy of the window over its length, by what the GPUs did. The number is the total in"
        " W; * misses the SLO. The bound has no parts.",
        energy_height_in,
        draw_energy,
    ),
    Figure(
        "time",
        "Clocks, batch and power over time",
        "The first seed, means over equal intervals of the window: clocks while an instance"
        " works, batch over its decode iterations. A line is the mean of the instances, the band"
        " reaches from the lowest to the highest. A dashed line is the power budget.",
        time_height_in,
        draw_time,
        one_load=True,
    ),
    Figure(
        "latency",
        "Distribution of latency",
        "Of all requests that arrive in the window, every seed counting the same; a request that"
        " is never served never comes in. ITL is the mean gap between the tokens of a request. A"
        " policy keeps the SLO where its curve passes above and left of the crossing.",
        lambda study: 2.9,  # noqa: ARG005
        draw_latency,
        one_load=True,
    ),
)


def check_plot(path: str | Path | None = None, figures: Sequence[str] = ()) -> None:
    """Refuse what could not be drawn, before there is anything to draw.

    Parameters
    ----------
    path : str or Path, optional
        File that the figures would go to.
    figures : sequence of str
        Names of figures, see :func:`write_plot`.

    Raises
    ------
    ConfigError
        If Matplotlib is missing, or path or names do not fit.

    Examples
    --------
    >>> check_plot("out.png", ["loads", "latency"])
    """
    names = [figure.name for figure in FIGURES]
    for name in figures:
        if name not in names:
            raise ConfigError(f"figures: expected some of {', '.join(names)}, got {name!r}")
    if path is not None and Path(path).suffix not in SUFFIXES:
        raise ConfigError(
            f"plot: expected a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "report: figures need matplotlib, which is not installed;"
            " pip install 'voltana-ctrl[report]'"
        ) from None


def write_plot(study: Study, path: str | Path, figures: Sequence[str] = ()) -> None:
    """Write figures under one another as one image.

    Parameters
    ----------
    study : Study
        Comparison to show.
    path : str or Path
        File to write; its name ends in ``.png``, ``.svg`` or ``.pdf``.
    figures : sequence of str
        Some of ``loads``, ``energy``, ``time`` and ``latency``; all by default. The last two
        show the middle load, and need details.

    Raises
    ------
    ConfigError
        If Matplotlib is missing, path or names do not fit, or the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl import compare
    >>> result = compare(rates_req_s=[5.0, 9.0], duration_s=10.0, warmup_s=2.0,
    ...                  policies=["static-max", "bound"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_plot(result.to_study(), Path(folder) / "loads.svg", ["loads"])
    ...     (Path(folder) / "loads.svg").read_text()[:5]
    '<?xml'
    """
    check_plot(path, figures)
    path = Path(path)
    chosen = [figure for figure in drawable(study) if not figures or figure.name in figures]
    if not chosen:
        raise ConfigError(
            f"figures: {', '.join(figures)} need details of the runs; compare(..., detail=True)"
        )
    with style():
        page = _stacked(study, chosen)
        with whole_file(path) as beside:
            page.savefig(beside, dpi=144, metadata=_metadata(path.suffix))


def drawable(study: Study) -> list[Figure]:
    """Figures that there is data for."""
    return [figure for figure in FIGURES if any(study.details) or not figure.one_load]


def svg(study: Study, figure: Figure, rate_req_s: float | None) -> str:
    """One figure as an ``<svg>`` element, text as text."""
    stream = io.StringIO()
    with style():
        page = new_canvas((WIDTH_IN, figure.height_in(study)))
        figure.draw(page, study, rate_req_s)
        page.savefig(stream, format="svg", transparent=True, metadata=_metadata(".svg"))
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _metadata(suffix: str) -> dict[str, str | None]:
    # Without the date, the same data give the same file.
    dates = {".svg": "Date", ".pdf": "CreationDate"}
    return {dates[suffix]: None} if suffix in dates else {}


def _stacked(study: Study, figures: list[Figure]) -> Any:
    # A figure that is alone gets its title from the text around it.
    title_in, foot_in = (0.32 if len(figures) > 1 else 0.02), 0.25
    rows_in = [row for figure in figures for row in (title_in, figure.height_in(study))]
    page = new_canvas((WIDTH_IN, sum(rows_in) + foot_in))
    parts = page.subfigures(len(rows_in) + 1, 1, height_ratios=[*rows_in, foot_in])
    for head, part, figure in zip(parts[:-1:2], parts[1::2], figures, strict=True):
        where = f", {load_text(study.shown_load)}" if figure.one_load else ""
        if len(figures) > 1:
            head.text(0.01, 0.35, figure.title + where, size=10, weight="bold", va="center")
        figure.draw(part, study, study.shown_load)
    status = ", ".join(dict.fromkeys(profile.status for profile in study.profiles))
    foot = f"Simulated: {study.title}" + (f"  ·  {study.window}" if study.window else "")
    foot += f"  ·  profile {status}" if status else ""
    warns = "extrapolated" in status
    if warns:
        foot += ": do not take absolute watts from it"
    parts[-1].text(0.01, 0.5, foot, size=7, va="center", color=MISS if warns else INK)
    return page
