"""``voltana-ctrl restore``: gives back what dead processes left locked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.errors import BackendError

EXAMPLES = ("voltana-ctrl restore",)


def restore(
    lock_dir: Annotated[
        Path | None, typer.Option(help="Of lock files, the same for all of a machine.")
    ] = None,
) -> None:
    """Give back every GPU that a dead process left with a clock of ours; for start scripts."""
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR, restore_abandoned

    given_back, problems = restore_abandoned(lock_dir or LOCK_DIR)
    for name in given_back:
        typer.echo(f"{name}: given back")
    if not given_back and not problems:
        typer.echo("nothing to give back")
    if problems:
        raise BackendError(f"restore: {'; '.join(problems)}")
