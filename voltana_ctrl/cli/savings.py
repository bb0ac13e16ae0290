"""``voltana-ctrl savings``: what a policy saved, with its interval, from a switchback log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "voltana-ctrl savings ticks.jsonl",
    "voltana-ctrl savings logs/ --price-kwh 0.30 --co2-g-kwh 380 --json",
)


def savings(
    logs: Annotated[
        list[Path],
        typer.Argument(help="Log, as `agent --log` named it, or its folder; or files in order."),
    ],
    slo: Annotated[
        str | None,
        typer.Option(help="ttft=SECONDS,itl=SECONDS. [default: that of the log]"),
    ] = None,
    washout_s: Annotated[
        float | None,
        typer.Option(help="Start of each block that does not count. [default: 1/5, at most 120]"),
    ] = None,
    instances: Annotated[
        str | None, typer.Option(help="ID,...: only their energy and requests count.")
    ] = None,
    price_kwh: Annotated[
        float | None, typer.Option(help="Price of a kilowatt-hour, in any currency.")
    ] = None,
    co2_g_kwh: Annotated[
        float | None, typer.Option(help="Grams of CO2 emitted for a kilowatt-hour.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Joules per token saved in a switchback, with a 95 % interval; refuses weak evidence."""
    from voltana_ctrl.savings.proof import savings_of_log
    from voltana_ctrl.types import Slo

    found = savings_of_log(
        logs,
        slo=None if slo is None else Slo.parse(slo),
        washout_s=washout_s,
        instances=tuple(part for part in (instances or "").split(",") if part),
        price_kwh=price_kwh,
        co2_g_kwh=co2_g_kwh,
    )
    typer.echo(json.dumps(found.to_dict()) if as_json else found.text())
