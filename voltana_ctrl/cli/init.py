"""``voltana-ctrl init``: a fleet file from what stands on this machine."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.cli.options import above_zero, check_outputs
from voltana_ctrl.errors import BackendError, ConfigError

EXAMPLES = (
    "voltana-ctrl init",
    "voltana-ctrl init --url http://10.0.0.1:8000 --url http://10.0.0.2:8000 --out fleet.toml",
    "voltana-ctrl init --force --keep-fresh 10",
)


#: Written beside the fleet file, which names it in its first line for editors.
_SCHEMA = "fleet.schema.json"


def init(
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("fleet.toml"),
    url: Annotated[
        list[str] | None,
        typer.Option(help="Address of an engine; may be repeated. [default: those found here]"),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Name of this machine. [default: its own]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    keep_fresh: Annotated[
        float | None,
        typer.Option(help="Look again every so many seconds, and write where something changed."),
    ] = None,
) -> None:
    """Write fleet.toml from the driver and the engines' pages; says what it could not find."""
    from voltana_ctrl.machine.schema import fleet_schema

    check_outputs({"out": out}, suffix=".toml")
    above_zero(keep_fresh=keep_fresh)
    if out.exists() and not force:
        raise ConfigError(f"out: {out} is there already; give another --out, or --force")
    name = node or platform.node() or "node"
    before = None
    while True:
        text, doubts = _draft(url or [], name)
        if text != before:
            _write(out, text)
            _write(out.with_name(_SCHEMA), json.dumps(fleet_schema(), indent=1) + "\n")
            typer.echo(f"wrote {out}", err=True)
            for doubt in doubts:
                typer.echo(f"not found: {doubt}", err=True)
        if keep_fresh is None:
            return
        before = text
        time.sleep(keep_fresh)


def _draft(urls: list[str], node: str) -> tuple[str, tuple[str, ...]]:
    from voltana_ctrl.backends.nvml.driver import Nvml
    from voltana_ctrl.machine import draft_fleet, find_engines

    names: dict[str, str] = {}
    held: dict[int, list[str]] = {}
    trouble: tuple[str, ...] = ()
    try:
        with Nvml() as nvml:
            for gpu in nvml.gpus():
                names[gpu.uuid] = gpu.name
                for pid in gpu.compute_pids:
                    held.setdefault(pid, []).append(gpu.uuid)
    except BackendError as error:
        trouble = (str(error),)
    draft = draft_fleet(find_engines(urls), names, held, node=node, schema=f"./{_SCHEMA}")
    return draft.text, (*trouble, *draft.doubts)


def _write(out: Path, text: str) -> None:
    """Write it whole: an agent that reads it meanwhile finds the old file or the new one."""
    beside = out.with_name(f".{out.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written: {error.strerror}") from error
