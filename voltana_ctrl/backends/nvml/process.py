"""What the kernel says of other processes: when one started, whether it can run, whom it hears."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["listeners", "process_start", "process_state"]


def process_start(pid: int) -> str | None:
    """When a process started, so that a reused number is not taken for the same process.

    Parameters
    ----------
    pid : int
        Number of the process.

    Returns
    -------
    str or None
        Clock ticks since boot; None where no such process lives.

    Examples
    --------
    >>> import os
    >>> process_start(os.getpid()) == process_start(os.getpid())
    True
    """
    fields = _fields(pid)
    return None if not fields or fields[0] in ("Z", "X") else fields[19]


def process_state(pid: int) -> str:
    """Letter of its state (proc(5)): R runs or waits for a CPU, S sleeps, T is stopped, Z is dead.

    Parameters
    ----------
    pid : int
        Number of the process.

    Returns
    -------
    str
        One letter; empty where no such process is left.

    Examples
    --------
    >>> import os
    >>> process_state(os.getpid())
    'R'
    """
    fields = _fields(pid)
    return fields[0] if fields else ""


def listeners(pid: int) -> list[int]:
    """Processes whose standard input is a pipe that this one holds, such as its watchdog.

    What it writes as its own output does not count: whoever reads that was not started by it.

    Parameters
    ----------
    pid : int
        Number of the process.

    Returns
    -------
    list of int
        Numbers of those processes, ascending.

    Examples
    --------
    >>> import os, subprocess
    >>> with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as reader:
    ...     found = listeners(os.getpid())
    >>> reader.pid in found
    True
    """

    def pipe(of: Path) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(of)
        return ""

    held = {pipe(each) for each in Path(f"/proc/{pid}/fd").glob("*") if int(each.name) > 2}
    held = {each for each in held if each.startswith("pipe:")}
    others = (each for each in Path("/proc").glob("[0-9]*") if int(each.name) != pid)
    return sorted(int(each.name) for each in others if pipe(each / "fd" / "0") in held)


def _fields(pid: int) -> list[str]:
    """Fields of its status from the third on; the second, its name, may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
