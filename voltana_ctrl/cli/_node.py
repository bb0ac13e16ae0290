"""``voltana-ctrl doctor`` and ``agent``: what a machine can do, and what runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.errors import ConfigError


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    actuate: Annotated[
        bool,
        typer.Option("--actuate", help="Lock each free GPU to its highest clock for a moment."),
    ] = False,
) -> None:
    """Say what this machine can do: GPUs, clocks, permissions, clamps; reads only."""
    from voltana_ctrl.backends.doctor import examine

    report = examine(actuate=actuate)
    typer.echo(report.json() if as_json else report.text())


def agent(
    setter: Annotated[
        bool, typer.Option("--setter", help="Run the privileged setter of this node.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="UUID of a GPU it may set; may be repeated.")
    ] = None,
    uid: Annotated[
        list[int] | None, typer.Option(help="User id that may ask; may be repeated.")
    ] = None,
    low_mhz: Annotated[int, typer.Option(help="Lowest clock it sets.")] = 0,
    high_mhz: Annotated[int, typer.Option(help="Highest clock it sets.")] = 100_000,
    max_sets_s: Annotated[float, typer.Option(help="Sets per second and GPU.")] = 50.0,
    socket: Annotated[Path | None, typer.Option(help="Unix socket to listen on.")] = None,
) -> None:
    """Set clocks for a server that is not root; ends, and gives back, on SIGTERM or Ctrl-C."""
    if not setter:
        raise ConfigError("agent: expected --setter; other modes of the agent do not exist yet")
    for name, given in (("gpu UUID", gpu), ("uid NUMBER", uid)):
        if not given:
            raise ConfigError(f"agent --setter: expected at least one --{name}, got none")
    from voltana_ctrl.backends.setter import run_setter
    from voltana_ctrl.backends.setter_client import SETTER_SOCKET

    run_setter(
        gpu or [],
        uid or [],
        socket or SETTER_SOCKET,
        lo_mhz=low_mhz,
        hi_mhz=high_mhz,
        max_sets_s=max_sets_s,
    )
