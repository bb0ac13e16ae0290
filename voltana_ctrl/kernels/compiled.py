"""Numba's ``njit`` with a cache wherever there is one: a home that cannot be written stops nobody.

Numba keeps compiled code beside the source or in the user's cache folder. Where neither can be
written (an installation that is read-only, a user without a home, as containers and systemd's
``DynamicUser`` have it) it refuses to compile. Then the code is kept in a private folder for
temporary files, or else is compiled in each process anew.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import config
from numba.core.cpu import CPUTargetOptions

__all__ = ["cache_folder", "njit"]

_log = logging.getLogger("voltana_ctrl")

# Memory that containers with a read-only root can write to.
_SHARED_MEMORY = Path("/dev/shm")


def njit(*signature: Any, cache: bool = True, allocates: bool = False) -> Callable[[Any], Any]:
    """``numba.njit`` that is cached where compiled code can be kept.

    Parameters
    ----------
    *signature
        As Numba takes it.
    cache : bool
        Whether to keep the compiled code at all.
    allocates : bool
        Whether it makes arrays of its own. Where none is made Numba need not count who refers to
        those that are handed on, which takes the simulator twice as long as all else it does. A
        function that makes some without saying so does not compile.

    Examples
    --------
    >>> @njit("float64(float64)", cache=False)
    ... def half(value):
    ...     return value / 2.0
    >>> half(3.0)
    1.5
    """
    options: dict[str, Any] = {"cache": cache and _KEPT}
    if not allocates and hasattr(CPUTargetOptions, "_nrt"):
        options["_nrt"] = False  # nothing is counted; to allocate would not compile
    decorated: Callable[[Any], Any] = numba.njit(*signature, **options)
    return decorated


def cache_folder() -> Path | None:
    """Where compiled code of this package is kept; None where it cannot be kept.

    Examples
    --------
    >>> folder = cache_folder()
    >>> folder is None or folder.is_dir()
    True
    """
    try:
        return Path(numba.njit(cache=True)(_probe)._cache.cache_path)
    except RuntimeError:  # Numba's word for: no folder can be written
        return None


def _probe() -> None:
    """Nothing; what would be kept of it shows where."""


def _find_cache() -> bool:
    """See that there is a cache, with a private one where Numba finds none; said once."""
    if cache_folder() is not None:
        return True
    before = config.CACHE_DIR
    for folder in _private_folders():
        config.CACHE_DIR = str(folder)
        if cache_folder() is not None:
            # Processes that this one starts find it, and have nothing to say.
            os.environ["NUMBA_CACHE_DIR"] = str(folder)
            _log.warning(
                "no folder of this user keeps compiled code; it is kept in %s. Set"
                " NUMBA_CACHE_DIR to a folder that lasts, and the next start is faster",
                folder,
            )
            return True
    config.CACHE_DIR = before
    _log.warning(
        "no folder can be written, so that kernels are compiled in every process anew; set"
        " NUMBA_CACHE_DIR to one that can"
    )
    return False


def _private_folders() -> Iterator[Path]:
    """Folders that nobody else can write to: what lies in a cache is run."""
    try:
        roots = [Path(tempfile.gettempdir()), _SHARED_MEMORY]
    except FileNotFoundError:
        roots = [_SHARED_MEMORY]
    for root in roots:
        folder = root / f"voltana-ctrl-{os.geteuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if ours and not found.st_mode & 0o077:
            yield folder


_KEPT = _find_cache()
