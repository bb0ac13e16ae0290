"""Processes of this machine, as /proc shows them: who listens where, with which command line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "family", "listeners", "names_engine"]

_PROC = Path("/proc")
_LISTENS = "0A"
# Command lines of servers that show engine metrics; matched as words of a path or a module.
_ENGINES = re.compile(r"\b(vllm|sglang|trtllm|tensorrt_llm|dynamo)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, as far as this user may look at it.

    Parameters
    ----------
    pid : int or None
        Number of the process; None of one that only its pod tells of.
    command : tuple of str
        Words of its command line.
    environment : mapping of str to str
        Variables that it was started with; empty where they are not told.
    pod : str, optional
        UID of its Kubernetes pod, as its control group names it.
    pod_name, node : str, optional
        Namespace and name of that pod, and its node, where Kubernetes tells.
    cpus : tuple of int
        CPUs that it is bound to, ascending; empty where it may run wherever we may.

    Examples
    --------
    >>> import os
    >>> Process.of(os.getpid()).pid == os.getpid()
    True
    """

    pid: int | None
    command: tuple[str, ...] = ()
    environment: dict[str, str]
    pod: str | None = None
    pod_name: str | None = None
    node: str | None = None
    cpus: tuple[int, ...] = ()

    @classmethod
    def of(cls, pid: int) -> Process:
        """Look at a process of this machine.

        Parameters
        ----------
        pid : int
            Number of the process.

        Returns
        -------
        Process
            What cannot be read is empty.
        """
        folder = _PROC / str(pid)
        pairs = [one.partition("=") for one in _words(folder / "environ")]
        pod = re.search(r"pod([0-9a-f]{8}[-_0-9a-f]{28})", _text(folder / "cgroup"))
        return cls(
            pid=pid,
            command=tuple(_words(folder / "cmdline")),
            environment={name: value for name, _, value in pairs},
            pod=None if pod is None else pod[1].replace("_", "-"),
            cpus=_bound_to(pid),
        )

    @property
    def serves(self) -> bool:
        """Whether its command line names a serving engine."""
        return names_engine(self.command)

    def option(self, name: str) -> str | None:
        """Value of an option on its command line.

        Parameters
        ----------
        name : str
            Option, such as ``--port``.

        Returns
        -------
        str or None
            Empty for an option without a value; None where it was not given.
        """
        for number, word in enumerate(self.command):
            if word == name:
                following = self.command[number + 1 : number + 2]
                return following[0] if following and not following[0].startswith("--") else ""
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None


def names_engine(words: Iterable[str]) -> bool:
    """Whether the words of a command line, or the name of an image, are those of an engine.

    Parameters
    ----------
    words : iterable of str
        Words to look through.

    Examples
    --------
    >>> names_engine(["python", "-m", "sglang.launch_server"]), names_engine(["nginx"])
    (True, False)
    """
    return any(_ENGINES.search(word) for word in words)


def listeners() -> dict[int, Process | None]:
    """TCP ports of this machine at which somebody listens.

    Returns
    -------
    dict of int to Process or None
        Who listens, by the port; None where this user may not know.

    Examples
    --------
    >>> import socket
    >>> with socket.create_server(("127.0.0.1", 0)) as server:
    ...     server.getsockname()[1] in listeners()
    True
    """
    ports = dict(_listening())
    wanted = set(ports.values())
    owners: dict[str, int] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                for link in (folder / "fd").iterdir():
                    with suppress(OSError):
                        inode = os.readlink(link).removeprefix("socket:[").removesuffix("]")
                        if inode in wanted:
                            owners.setdefault(inode, int(folder.name))
    return {
        port: Process.of(owners[inode]) if inode in owners else None
        for port, inode in ports.items()
    }


def family(pid: int) -> set[int]:
    """A process and all that descend from it, since an engine's workers hold its GPUs.

    Parameters
    ----------
    pid : int
        Number of the process.

    Returns
    -------
    set of int
        Numbers of all of them, `pid` included.
    """
    parents: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            fields = _text(folder / "stat").rpartition(")")[2].split()
            if len(fields) > 1:
                parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = set(), [pid]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo += parents.get(one, [])
    return found


def _bound_to(pid: int) -> tuple[int, ...]:
    try:
        cpus, ours = os.sched_getaffinity(pid), os.sched_getaffinity(0)
    except (OSError, AttributeError):  # it is gone, or this is no Linux
        return ()
    return () if cpus >= ours else tuple(sorted(cpus))


def _listening() -> Iterator[tuple[int, str]]:
    for table in ("tcp", "tcp6"):
        for line in _text(_PROC / "net" / table).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTENS:
                yield int(fields[1].rpartition(":")[2], 16), fields[9]


def _words(path: Path) -> list[str]:
    return [word for word in _text(path).split("\0") if word]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""
