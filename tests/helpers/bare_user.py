"""A user who owns nothing here: no home, and an installation that is read-only."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: A user id that owns nothing here.
NOBODY = 54321

needs_bare_user = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root, to run as somebody without a home",
)


def read_only_copy(root: Path, folder: Path) -> Path:
    """Copy the package without compiled code, so that nobody but root can write to it."""
    shutil.copytree(
        root / "voltana_ctrl", folder / "voltana_ctrl", ignore=shutil.ignore_patterns("*.nb?")
    )
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def as_bare_user(installed: Path, *arguments: object, tmp: Path, **environment: str):
    """Command line and settings of one of our commands as that user, for `subprocess`.

    What root may read, that user may read: Python itself may lie in root's home.
    """
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    command = [
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
        "--bounding-set=-all,+dac_read_search", "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
        # The loader drops the path of libraries where it sees more rights than its caller's.
        "env", *(f"{name}={value}" for name, value in environment.items()),
        sys.executable, "-B", "-m", "voltana_ctrl.cli", *map(str, arguments),
    ]  # fmt: skip
    home = {"HOME": "/nonexistent", "PYTHONPATH": str(installed), "TMPDIR": str(tmp)}
    return command, {"env": kept | home | {"COLUMNS": "80"}, "cwd": "/", "text": True}


def run_as_bare_user(installed: Path, *arguments: object, tmp: Path, **environment: str):
    """Run it, and wait for its end."""
    command, settings = as_bare_user(installed, *arguments, tmp=tmp, **environment)
    return subprocess.run(command, **settings, capture_output=True, timeout=300, check=False)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that everybody may pass to; pytest shuts its own whenever another one begins."""
    with tempfile.TemporaryDirectory(prefix="voltana-open-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
