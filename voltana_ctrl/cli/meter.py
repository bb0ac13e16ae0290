"""``voltana-ctrl meter``: what this machine draws, per token and at rest."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    engines = find_engines(url or ())
    with _told_to_end() as told:
        errors.print(f"measuring for {duration:g} s, or until Ctrl-C", highlight=False)
        use = measure(engines, duration_s=duration, stop=told.is_set)
    typer.echo(use.json() if as_json else use.text(price_kwh))
    if use.is_empty:
        raise typer.Exit(1)


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the measurement, and what was measured is told."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {
        number: signal.signal(number, lambda *_: told.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
