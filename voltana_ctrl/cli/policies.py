"""``voltana-ctrl policies``: what compare can put side by side."""

from __future__ import annotations


def policies() -> None:
    """List policies that compare can run."""
    from rich.console import Console

    from voltana_ctrl.policies import ROUTERS, list_policies

    console = Console()
    for policy in list_policies():
        console.print(f"{policy.name}\n    {policy.summary}\n    {policy.source}", highlight=False)
    for form, meaning in (
        ("static-<MHz>", "every instance at that clock, round robin"),
        ("pack-<MHz>", "pack, planned for that clock"),
        ("package.module:Class", "your own, called with (fleet, slo)"),
        (
            "<policy>+<decode router>, <policy>+<prefill router>/<decode router>",
            f"with routers of {', '.join(ROUTERS)}",
        ),
    ):
        console.print(f"{form}\n    {meaning}", highlight=False, markup=False)
