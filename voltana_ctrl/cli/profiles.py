"""``voltana-ctrl profiles``: the profiles that are shipped, and how well each is known."""

from __future__ import annotations


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
