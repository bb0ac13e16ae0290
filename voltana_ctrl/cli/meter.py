"""``voltana-ctrl meter``: what this machine draws, per token and at rest."""

from __future__ import annotations

from typing import Annotated

import typer

from voltana_ctrl.cli.options import above_zero

EXAMPLES = (
    "voltana-ctrl meter",
    "voltana-ctrl meter --duration 60 --price-kwh 0.30",
    "voltana-ctrl meter --url http://127.0.0.1:8000 --json",
)


def meter(
    url: Annotated[
        list[str] | None,
        typer.Option(help="Address of an engine; may be repeated. [default: those found here]"),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds to measure.")] = 10.0,
    price_kwh: Annotated[
        float | None, typer.Option(help="Price of a kilowatt-hour, in any currency.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Measure joules per token and idle watts of this machine; no fleet file, sets nothing."""
    from rich.console import Console

    above_zero(duration=duration, price_kwh=price_kwh)
    from voltana_ctrl.machine import find_engines, measure

    errors = Console(stderr=True)
    with errors.status(f"measuring for {duration:g} s"):
        use = measure(find_engines(url or ()), duration_s=duration)
    typer.echo(use.json() if as_json else use.text(price_kwh))
