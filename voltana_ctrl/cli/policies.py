"""``voltana-ctrl policies``: what compare can put side by side."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EXAMPLES = ("voltana-ctrl policies", "voltana-ctrl policies --json")

_FORMS = (
    ("static-<MHz>", "every instance at that clock, round robin"),
    ("pack-<MHz>", "pack, planned for that clock"),
    ("package.module:Class", "your own, called with (fleet, slo)"),
)


def policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List policies that compare can run."""
    from rich.console import Console

    from voltana_ctrl.policies import HEADLINE, ROUTERS, list_policies

    if as_json:
        rows = [
            {
                "name": one.name,
                "summary": one.summary,
                "source": one.source,
                "knows_budget": one.knows_budget,
                "headline": one.name in HEADLINE,
            }
            for one in list_policies()
        ]
        forms = [{"form": form, "meaning": meaning} for form, meaning in _FORMS]
        typer.echo(json.dumps({"policies": rows, "forms": forms, "routers": list(ROUTERS)}))
        return
    console = Console()
    for policy in list_policies():
        console.print(f"{policy.name}\n    {policy.summary}\n    {policy.source}", highlight=False)
    routers = (
        "<policy>+<decode router>, <policy>+<prefill router>/<decode router>",
        f"with routers of {', '.join(ROUTERS)}",
    )
    for form, meaning in (*_FORMS, routers):
        console.print(f"{form}\n    {meaning}", highlight=False, markup=False)
