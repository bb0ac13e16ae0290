"""``voltana-ctrl setter``: sets clocks for those who may not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.errors import ConfigError

EXAMPLES = ("voltana-ctrl setter --gpu GPU-8f6d0000 --uid 1000",)


def setter(
    gpu: Annotated[
        list[str] | None, typer.Option(help="UUID of a GPU it may set; repeatable.")
    ] = None,
    uid: Annotated[list[int] | None, typer.Option(help="User id that may ask; repeatable.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket to listen on.")] = None,
    low_mhz: Annotated[int, typer.Option(help="Lowest clock it sets.")] = 0,
    high_mhz: Annotated[int, typer.Option(help="Highest clock it sets.")] = 100_000,
    max_sets_s: Annotated[float, typer.Option(help="Sets per second and GPU.")] = 50.0,
    lock_dir: Annotated[
        Path | None, typer.Option(help="Of lock files, the same for all of a machine.")
    ] = None,
) -> None:
    """Run the privileged setter of this node: the one process that needs root."""
    for name, given in (("gpu UUID", gpu), ("uid NUMBER", uid)):
        if not given:
            raise ConfigError(f"setter: expected at least one --{name}, got none")
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
    from voltana_ctrl.backends.nvml.setter import run_setter
    from voltana_ctrl.backends.nvml.setter_client import SETTER_SOCKET

    run_setter(
        gpu or [],
        uid or [],
        socket or SETTER_SOCKET,
        lo_mhz=low_mhz,
        hi_mhz=high_mhz,
        max_sets_s=max_sets_s,
        lock_dir=lock_dir or LOCK_DIR,
    )
