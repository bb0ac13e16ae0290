"""``voltana-ctrl init``: a fleet file from what stands on this machine."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana_ctrl.cli.options import above_zero, check_outputs
from voltana_ctrl.errors import BackendError, ConfigError, VoltanaError
from voltana_ctrl.files import whole_file

if TYPE_CHECKING:
    from voltana_ctrl.machine import FoundEngine

EXAMPLES = (
    "voltana-ctrl init",
    "voltana-ctrl init --url http://10.0.0.1:8000 --url http://10.0.0.2:8000 --out fleet.toml",
    "voltana-ctrl init --force --keep-fresh 10",
    "voltana-ctrl init --pods pods.json",
    "voltana-ctrl init --pods cluster --keep-fresh 10 --force",
)


#: Written beside the fleet file, which names it in its first line for editors.
_SCHEMA = "fleet.schema.json"


def init(
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("fleet.toml"),
    url: Annotated[
        list[str] | None,
        typer.Option(help="Address of an engine; may be repeated. [default: those found here]"),
    ] = None,
    pods: Annotated[
        str | None,
        typer.Option(
            help="Engines in pods, too: what `kubectl get pods -o json` wrote, - for standard"
            " input, or cluster: the API server."
        ),
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
    if pods == "-" and keep_fresh is not None:
        raise ConfigError("pods: standard input is read once; name a file, or no --keep-fresh")
    name = node or platform.node() or "node"
    known: dict[str, FoundEngine] = {}
    before = told = None
    while True:
        try:
            known = _look(url or [], pods, known)
        except VoltanaError as error:
            if before is None:
                raise
            # Whoever starts anew answers soon; what the file has of it holds until then.
            if str(error) != told:
                told = str(error)
                typer.echo(f"kept as it was: {told}", err=True)
            time.sleep(keep_fresh or 0.0)
            continue
        text, doubts = _draft(list(known.values()), name)
        told = None
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


def _look(
    urls: list[str], pods: str | None, known: dict[str, FoundEngine]
) -> dict[str, FoundEngine]:
    """Engines by address; who does not answer for a while keeps its place, and so its name."""
    from voltana_ctrl.machine import find_engines
    from voltana_ctrl.machine.pods import read_pods

    servers = {} if pods is None else read_pods(pods)
    found = {one.url: one for one in find_engines(urls, pods=servers)}
    # Another pod has another address: of a pod that is gone nothing is left to wait for.
    kept = {
        url: one
        for url, one in known.items()
        if one.process is None or one.process.pid is not None or url in servers
    }
    return kept | found


def _draft(engines: list[FoundEngine], node: str) -> tuple[str, tuple[str, ...]]:
    from voltana_ctrl.backends.nvml.driver import Nvml
    from voltana_ctrl.machine import draft_fleet

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
    draft = draft_fleet(engines, names, held, node=node, schema=f"./{_SCHEMA}")
    return draft.text, (*trouble, *draft.doubts)


def _write(out: Path, text: str) -> None:
    """Write it whole: an agent that reads it meanwhile finds the old file or the new one."""
    with whole_file(out) as beside:
        beside.write_text(text, encoding="utf-8")
