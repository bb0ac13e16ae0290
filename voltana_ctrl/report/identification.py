"""Diagnostics of a fit, as an image."""

from __future__ import annotations

from pathlib import Path

from voltana_ctrl.files import whole_file
from voltana_ctrl.fit import FitResult, draw_diagnostics
from voltana_ctrl.report.canvas import new_canvas, style
from voltana_ctrl.report.figures import check_plot


def write_fit_plot(result: FitResult, path: str | Path) -> None:
    """Write residuals, power and held-out errors of a fit as one image.

    Parameters
    ----------
    result : FitResult
        What :func:`voltana_ctrl.fit.fit_table` made.
    path : str or Path
        Ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises
    ------
    ConfigError
        If Matplotlib is missing, or the file cannot be written.

    Examples
    --------
    >>> write_fit_plot(result=None, path="out.txt")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: plot: expected a file that ends in .png, .svg, .pdf, got
    'out.txt'
    """
    check_plot(path)
    with style():
        page = new_canvas((10.0, 8.0))
        draw_diagnostics(result, page)
        with whole_file(path) as beside:
            page.savefig(beside, dpi=144)
