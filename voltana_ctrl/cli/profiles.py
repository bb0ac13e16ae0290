"""``voltana-ctrl profiles``: the profiles that are shipped, and how well each is known."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EXAMPLES = ("voltana-ctrl profiles", "voltana-ctrl profiles --json")


def profiles(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List profiles, and how well each is known."""
    from rich.console import Console

    from voltana_ctrl.profiles import list_profiles, load_profile

    known = [load_profile(name) for name in list_profiles()]
    if as_json:
        rows = [
            {
                "name": one.name,
                "gpus": one.gpus,
                "clocks_mhz": [float(clock) for clock in one.clocks_mhz],
                "status": one.status,
                "summary": one.summary,
            }
            for one in known
        ]
        typer.echo(json.dumps({"profiles": rows}))
        return
    console = Console()
    for one in known:
        clocks = f"{one.clocks_mhz[0]:g}..{one.clocks_mhz[-1]:g}"
        gpus = f"{one.gpus} GPU{'s' if one.gpus > 1 else ''}"
        console.print(
            f"{one.name}\n    {gpus}, {clocks} MHz, {one.status}\n    {one.summary}",
            highlight=False, markup=False,
        )  # fmt: skip
