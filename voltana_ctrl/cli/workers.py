"""Processes that runs go to, ended with their parent however it ends; and being told to stop."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """SIGTERM has come; not an error, and so nobody's to catch on the way."""


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into :class:`Stopped`, so that what was done is kept, as at Ctrl-C."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """Processes to run in; none is left when the block ends, and none outlives this process.

    This process does none of the work itself, so that it answers Ctrl-C at once, whatever a
    compiled kernel is in the middle of. On Linux they are forks of it: what was imported and
    compiled before is there.
    """
    # Elsewhere forks are unsafe under threads of the system's libraries.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(number, context, initializer=_begin, initargs=(os.getpid(),))
    try:
        # All are started now, before anything here starts a thread.
        pool.submit(_nothing).result()
        yield pool
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        # Waited for, since the interpreter must not end while the pool's own thread does.
        pool.shutdown(wait=True, cancel_futures=True)


def _nothing() -> None:
    pass


def _begin(parent: int) -> None:
    # The terminal sends Ctrl-C to them too; the parent is who answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it went before we could ask
            os._exit(1)
