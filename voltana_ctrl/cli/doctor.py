"""``voltana-ctrl doctor``: what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = (
    "voltana-ctrl doctor",
    "voltana-ctrl doctor --json",
    "voltana-ctrl doctor --actuate",
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    actuate: Annotated[
        bool,
        typer.Option("--actuate", help="Lock each free GPU to its highest clock for a moment."),
    ] = False,
) -> None:
    """Say what GPUs and clocks here can do; reads only, unless told to --actuate."""
    from voltana_ctrl.backends.nvml.doctor import examine

    report = examine(actuate=actuate)
    typer.echo(report.json() if as_json else report.text())
