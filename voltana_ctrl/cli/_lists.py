"""``voltana-ctrl policies`` and ``profiles``: what there is to choose from."""

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


def profiles() -> None:
    """List profiles, and how well each is known."""
    from rich.console import Console

    from voltana_ctrl.profiles import list_profiles, load_profile

    console = Console()
    for name in list_profiles():
        one = load_profile(name)
        clocks = f"{one.clocks_mhz[0]:g}..{one.clocks_mhz[-1]:g}"
        gpus = f"{one.gpus} GPU{'s' if one.gpus > 1 else ''}"
        console.print(
            f"{one.name}\n    {gpus}, {clocks} MHz, {one.status}\n    {one.summary}",
            highlight=False, markup=False,
        )  # fmt: skip
