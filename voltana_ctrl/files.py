"""Files and folders of ours: nobody else may have written them, and none is ever half there."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from voltana_ctrl.errors import ConfigError

__all__ = ["check_ours", "own_folder", "read_ours", "replace_file", "whole_file"]

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_ours(what: str, info: os.stat_result, *, owners: Collection[int] = ()) -> None:
    """Refuse a file or folder that somebody else can write, or could have put there.

    Parameters
    ----------
    what : str
        What the error calls it.
    info : os.stat_result
        Of its open descriptor, or of a folder.
    owners : collection of int
        User ids besides root and our own that may own it.

    Raises
    ------
    ConfigError
        If it belongs to somebody else, others may write it, or it is a file that has a second
        name: then it lies in a folder of somebody else's as well.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     os.link(file.name, file.name + "-2")
    ...     try:
    ...         check_ours("lock file a", os.fstat(file.fileno()))
    ...     except ConfigError as error:
    ...         str(error)
    ...     os.unlink(file.name + "-2")
    'lock file a: expected one name of it, got 2 links; remove it'
    """
    trusted = {0, os.geteuid(), *owners}
    if info.st_uid not in trusted or info.st_mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(
            f"{what}: others can write it: expected an owner of {sorted(trusted)} and mode"
            f" {0o755 if stat.S_ISDIR(info.st_mode) else 0o644:04o}, got {info.st_uid} and"
            f" {stat.S_IMODE(info.st_mode):04o}; if nobody else uses it, remove it, or chown and"
            " chmod go-w"
        )
    if stat.S_ISDIR(info.st_mode):
        return
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{what}: expected a file; remove what is there")
    if info.st_nlink > 1:
        raise ConfigError(f"{what}: expected one name of it, got {info.st_nlink} links; remove it")


def own_folder(path: str | Path, what: str) -> Path:
    """Folder in which nobody but us and root can put, move or remove anything; made if missing.

    Parameters
    ----------
    path : str or Path
        The folder.
    what : str
        What it is for, for the error: ``lock files``.

    Returns
    -------
    Path
        The same.

    Raises
    ------
    ConfigError
        If it cannot be made, is no folder, or others can write it.

    Examples
    --------
    >>> own_folder("/tmp", "lock files")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: folder of lock files /tmp: others can write it: expected...
    """
    path = Path(path)
    label = f"folder of {what} {path}"
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        # A link counts as well: whoever owns it leads us where they like.
        found = path.lstat(), path.stat()
    except OSError as error:
        raise ConfigError(
            f"{label}: cannot be made or read: {error.strerror}; choose another, or make it:"
            f" install -d -o USER {path}"
        ) from error
    for info in found:
        if stat.S_ISLNK(info.st_mode):
            if info.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"{label}: a link of user {info.st_uid}; choose another")
        else:
            check_ours(label, info)
    return path


def read_ours(
    path: str | Path, what: str, most_bytes: int, *, owners: Collection[int] = ()
) -> bytes | None:
    """Content of a file that only we or root may have written; None where there is none.

    Parameters
    ----------
    path : str or Path
        The file; a link is refused, and so is a pipe, which would hold us up.
    what : str
        What the error calls it.
    most_bytes : int
        A longer one is refused.
    owners : collection of int
        User ids besides root and our own that may have written it.

    Raises
    ------
    ConfigError
        If it cannot be read, is longer, or somebody else may have written it or put it into its
        folder.

    Examples
    --------
    >>> read_ours("no-such-file", "state", 100) is None
    True
    """
    label = f"{what} {path}"
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{label}: cannot be read: {error}; expected a file of ours") from error
    try:
        check_ours(label, os.fstat(file), owners=owners)
        check_ours(f"{label}: its folder", Path(path).parent.stat(), owners=owners)
        with os.fdopen(os.dup(file), "rb") as opened:
            data = opened.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror}") from error
    finally:
        os.close(file)
    if len(data) > most_bytes:
        raise ConfigError(f"{label}: expected at most {most_bytes} bytes")
    return data


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Let somebody else's code write a file that appears as a whole, or not at all.

    Parameters
    ----------
    path : str or Path
        The file; a pipe or ``/dev/stdout``, which cannot be replaced, is written as it is.

    Yields
    ------
    Path
        Where to write: hidden, in the same folder, with the same suffix.

    Raises
    ------
    ConfigError
        If it cannot be written; then the old one is as it was, and nothing lies beside it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder, "out.csv")) as beside:
    ...         _ = beside.write_text("policy")
    ...     [one.name for one in Path(folder).iterdir()]
    ['out.csv']
    """
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        try:
            yield beside
            beside.replace(path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def replace_file(
    path: str | Path, data: bytes, *, mode: int = 0o644, durable: bool = False
) -> None:
    """Write a file as a whole: whoever reads it sees the old content or the new one.

    Parameters
    ----------
    path : str or Path
        The file; its folder is made if it is not there.
    data : bytes
        Its new content.
    mode : int
        Who may read it.
    durable : bool
        Whether it must be on the disk before this returns, and survive a power cut.

    Raises
    ------
    OSError
        If it cannot be written; then the old one is as it was, and nothing lies beside it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "state")
    ...     replace_file(path, b"new")
    ...     path.read_bytes(), len(list(Path(folder).iterdir()))
    (b'new', 1)
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        beside.unlink()
    # Made anew, never followed: nobody can have put a link there.
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(data)
            out.flush()
            if durable:
                os.fsync(file)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
