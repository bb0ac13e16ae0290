"""One controller per piece of hardware: lock files with an owner and a way to recover.

The kernel holds the lock (``flock``) and drops it when the last process that has the file open
is gone; the content says who holds it and how to give the hardware back, for whoever finds it
after both the controller and its watchdog have died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from voltana_ctrl.backends.nvml.giveback import FoundFile, FoundGpu, give_back, record_from
from voltana_ctrl.backends.nvml.process import process_start, process_state
from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.files import check_ours, own_folder
from voltana_ctrl.textfile import json_value

__all__ = ["LOCK_DIR", "LockFile", "restore_abandoned"]

#: Where lock files live: a folder of our own, since whoever can put one there keeps us out, that a
#: reboot empties, since a reboot gives everything back.
LOCK_DIR = Path("/run/voltana-ctrl/locks")


class LockFile:
    """Exclusive hold on one piece of hardware.

    Parameters
    ----------
    hardware : str
        Name of it: the UUID of a GPU, the folder of a CPU frequency policy.
    folder : Path
        Where lock files live, made if it is not there; the same for all controllers of a machine.
    wait_s : float
        Seconds to wait for the watchdog of an owner that has just died.

    Raises
    ------
    BackendError
        If another controller holds it, naming its process; or if the folder is not usable.
    ActuationDenied
        If a stale one was found and the hardware could not be given back.

    Examples
    --------
    >>> import tempfile
    >>> from voltana_ctrl import BackendError
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     held = LockFile("GPU-0", folder=Path(folder))
    ...     try:
    ...         LockFile("GPU-0", folder=Path(folder))
    ...     except BackendError as error:
    ...         text = str(error)
    ...     held.release()
    >>> "another controller" in text
    True
    """

    def __init__(self, hardware: str, *, folder: Path = LOCK_DIR, wait_s: float = 3.0) -> None:
        self.hardware = hardware
        name = re.sub(r"[^\w.-]", "_", hardware)
        try:
            # Absolute, as processes of ours that start elsewhere are told of it.
            folder = own_folder(Path(folder).absolute(), "lock files")
        except ConfigError as error:
            raise BackendError(f"{error}; the same lock_dir for all of this machine") from error
        self.path = folder / f"voltana-ctrl-{name}.lock"
        self.recovered = False
        self.fd = self._acquire(wait_s)
        try:
            self._recover()
            self.write(None)
        except BaseException:
            os.close(self.fd)
            raise

    def _acquire(self, wait_s: float) -> int:
        give_up_s = time.monotonic() + wait_s
        while True:
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _read(fd).get("owner", {})
                os.close(fd)
                # A dead owner's watchdog keeps the lock until it has given the hardware back.
                if _alive(owner) or time.monotonic() > give_up_s:
                    raise BackendError(self._refusal(owner)) from None
                time.sleep(0.05)
                continue
            if _same_file(fd, self.path):
                return fd
            os.close(fd)  # removed by its owner between our open and our lock

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            # For us alone: whoever can read a file can lock it, and keep it locked.
            fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise BackendError(
                f"lock file {self.path}: cannot be opened: {error.strerror}; choose another"
                " lock_dir, the same for all controllers of this machine"
            ) from error
        try:
            # What it says is acted on with our privilege.
            check_ours(f"lock file {self.path}", os.fstat(fd))
            os.fchmod(fd, 0o600)
        except (ConfigError, OSError) as error:
            os.close(fd)
            raise BackendError(
                f"{error}; make sure first that nobody else controls the hardware"
            ) from error
        return fd

    def _refusal(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid', '?')} ({owner.get('command', 'unknown')})"
        return (
            f"{self.hardware}: another controller holds it: {who}; stop that one first"
            f" (lock file {self.path})"
        )

    def _recover(self) -> None:
        try:
            record = read_record(self.fd)
        except ConfigError as error:
            raise BackendError(f"lock file {self.path}: {error}; remove the file") from error
        if record is None:
            return
        problems = give_back([record])
        if problems:
            raise ActuationDenied(
                f"{self.hardware}: its last controller died and left it changed, and it could not"
                f" be given back: {problems[0]}"
            )
        self.recovered = True

    def write(self, record: FoundGpu | FoundFile | None) -> None:
        """Say who holds it and how to give it back.

        Raises
        ------
        BackendError
            If it cannot be written; then the hardware must not be touched.
        """
        content = {
            "owner": _owner(),
            "give_back": record.as_dict() if record is not None and record.touched else None,
        }
        text = json.dumps(content).encode()
        try:
            os.pwrite(self.fd, text + b"\n", 0)
            os.ftruncate(self.fd, len(text) + 1)
        except OSError as error:
            raise BackendError(
                f"lock file {self.path}: cannot be written: {error.strerror}"
            ) from error

    def release(self) -> None:
        """Give the hold up after the hardware was given back; may be called twice."""
        if self.fd >= 0:
            remove_if_ours(self.fd, self.path)
            os.close(self.fd)
            self.fd = -1

    def forget(self) -> None:
        """Close our copy without giving up the hold, which the watchdog keeps."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def restore_abandoned(folder: Path = LOCK_DIR) -> tuple[list[str], list[str]]:
    """Give back all hardware whose controller and watchdog are both gone.

    Parameters
    ----------
    folder : Path
        Where lock files live.

    Returns
    -------
    given_back, problems : list of str
        Lock files whose hardware was given back, and what could not be, in words. What somebody
        holds is left alone.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     restore_abandoned(Path(folder))
    ([], [])
    """
    given_back, problems = [], []
    for path in sorted(Path(folder).glob("voltana-ctrl-*.lock")):
        name = path.name.removeprefix("voltana-ctrl-").removesuffix(".lock")
        if holder(name, folder) is not None:
            continue
        try:
            # Taking hold of abandoned hardware gives it back.
            held = LockFile(name, folder=folder, wait_s=0.0)
        except (BackendError, ActuationDenied) as error:
            problems.append(str(error))
            continue
        if held.recovered:
            given_back.append(name)
        held.release()
    return given_back, problems


def left_by_the_lost(folder: Path = LOCK_DIR) -> dict[tuple[str, str], FoundGpu | FoundFile]:
    """Records of owners that are dead or stopped, while they or their watchdog hold the lock.

    Parameters
    ----------
    folder : Path
        Where lock files live.

    Returns
    -------
    dict of (hardware, owner) to FoundGpu or FoundFile
        What is to be given back, unless the watchdog is about to.

    Examples
    --------
    >>> left_by_the_lost(Path("no-such-folder"))
    {}
    """
    found = {}
    for path in sorted(Path(folder).glob("voltana-ctrl-*.lock")):
        with contextlib.suppress(OSError, ConfigError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                check_ours(f"lock file {path}", os.fstat(fd))
                owner, record = _read(fd).get("owner"), read_record(fd)
                if record is None or not isinstance(owner, dict) or _works(owner) or _free(fd):
                    continue
                name = path.name.removeprefix("voltana-ctrl-").removesuffix(".lock")
                found[name, f"{owner.get('pid')} {owner.get('start')}"] = record
            finally:
                os.close(fd)
    return found


def _free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_record(fd: int) -> FoundFile | FoundGpu | None:
    """How a lock file says that its hardware is given back.

    Parameters
    ----------
    fd : int
        Descriptor of the open lock file.

    Returns
    -------
    FoundFile or FoundGpu or None
        None where nothing was touched.

    Raises
    ------
    ConfigError
        If what it says is not a record.
    """
    found = _read(fd).get("give_back")
    return None if found is None else record_from(found)


def remove_if_ours(fd: int, path: Path) -> None:
    """Remove a lock file through whose descriptor we hold it."""
    if _same_file(fd, path):
        with contextlib.suppress(OSError):
            path.unlink()


def holder(hardware: str, folder: Path = LOCK_DIR) -> str | None:
    """Process that holds a piece of hardware, in words; None if nobody does."""
    name = re.sub(r"[^\w.-]", "_", hardware)
    path = Path(folder) / f"voltana-ctrl-{name}.lock"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return f"a process of another user, unless it died (lock file {path})"
    except OSError:
        return None
    try:
        if _free(fd):
            return None
        owner = _read(fd).get("owner", {})
        return f"process {owner.get('pid', '?')} ({owner.get('command', 'unknown')})"
    finally:
        os.close(fd)


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _read(fd: int) -> dict[str, Any]:
    try:
        # The first line: a rest of a longer content may follow where a writer died in between.
        content = json_value(os.pread(fd, 65536, 0).partition(b"\n")[0] or b"{}", "lock file")
    except ConfigError:
        return {}  # its owner died while writing it, before touching the hardware
    return content if isinstance(content, dict) else {}


def _owner() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "start": process_start(pid), "command": " ".join(sys.argv[:3])[:200]}


def _works(owner: dict[str, Any]) -> bool:
    """Whether it lives and is not stopped, by a signal or a debugger."""
    return _alive(owner) and process_state(owner["pid"]) not in ("T", "t")


def _alive(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    started = process_start(pid) if isinstance(pid, int) else None
    return started is not None and started == owner.get("start")
