"""``voltana-ctrl dashboard``: the Grafana dashboard."""

from __future__ import annotations

from importlib.resources import files

import typer

EXAMPLES = ("voltana-ctrl dashboard > voltana-ctrl.json",)


def dashboard() -> None:
    """Print the Grafana dashboard of the metrics that `agent` and `controller` export."""
    typer.echo(files("voltana_ctrl.live").joinpath("dashboard.json").read_text("utf-8"))
