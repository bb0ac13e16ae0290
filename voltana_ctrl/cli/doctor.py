"""``voltana-ctrl doctor``: what this machine can do, and what is heard of a fleet's engines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = (
    "voltana-ctrl doctor",
    "voltana-ctrl doctor --fleet fleet.toml",
    "voltana-ctrl doctor --json",
    "voltana-ctrl doctor --actuate",
)

#: Seconds to wait for engines that do not answer at once, and then for what they send unasked.
_ANSWER_S, _SENDS_S = 5.0, 1.5


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    actuate: Annotated[
        bool,
        typer.Option("--actuate", help="Lock each free GPU to its highest clock for a moment."),
    ] = False,
    fleet: Annotated[
        Path | None, typer.Option(help="TOML of a fleet, whose engines are looked at, too.")
    ] = None,
    slo: Annotated[str, typer.Option(help="TTFT, ITL in s, attainment.")] = "ttft=0.6,itl=0.06",
) -> None:
    """Say what GPUs and clocks here can do; reads only, unless told to --actuate."""
    from voltana_ctrl.backends.nvml.doctor import examine

    report = examine(actuate=actuate)
    engines = None if fleet is None else _engines(fleet, slo)
    if not as_json:
        typer.echo("\n".join([report.text(), *([] if engines is None else _lines(engines))]))
    elif engines is None:
        typer.echo(report.json())
    else:
        told = {**json.loads(report.json()), **engines}
        typer.echo(json.dumps(told, separators=(",", ":")))


def _engines(path: Path, slo: str) -> dict[str, Any]:
    """What is heard of the engines of a fleet."""
    from voltana_ctrl.cli.running import judged_lines
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.engines.telemetry import EngineBackend
    from voltana_ctrl.types import Slo

    promised = Slo.parse(slo)
    spec, endpoints = load_endpoints(path)
    with EngineBackend(spec, endpoints, without_gpus="ignore") as reads:
        until_s = time.monotonic() + _ANSWER_S
        while time.monotonic() < until_s and not reads.read().state.alive.all():
            time.sleep(0.1)
        time.sleep(_SENDS_S)
        state, problems = reads.read().state, reads.problems()
        notes = judged_lines(reads.judged_edges_s(promised), promised)
        passes_heard = reads.fpm_counts.messages
    if any(one.fpm is not None for one in endpoints) and not passes_heard:
        notes.append(
            "no forward-pass metrics are heard: does fpm name where engines publish them? Without"
            " them no profile is held against its engine"
        )
    return {
        "engines": [
            {
                "id": one.instance,
                "kind": one.kind,
                "url": one.url,
                "answers": bool(state.alive[i]),
                "problem": problems.get(one.instance),
                "running_req": float(state.running_req[i]),
                "queue_req": float(state.queue_req[i]),
            }
            for i, one in enumerate(endpoints)
        ],
        "notes": notes,
    }


def _lines(told: dict[str, Any]) -> list[str]:
    lines = []
    for one in told["engines"]:
        how = f"answers: {one['running_req']:g} requests run, {one['queue_req']:g} wait"
        if not one["answers"]:
            how = "does not answer"
        problem = f"; {one['problem']}" if one["problem"] else ""
        lines.append(f"engine {one['id']}: {one['kind']} at {one['url']} {how}{problem}")
    return [*lines, *(f"mind: {note}" for note in told["notes"])]
