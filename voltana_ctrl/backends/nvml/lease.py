"""Borrowed hardware: locked against others, watched, and given back in every way it can end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from voltana_ctrl.backends.nvml.giveback import FoundFile, FoundGpu, give_back
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR, LockFile
from voltana_ctrl.backends.nvml.watchdog import Watchdog
from voltana_ctrl.errors import ActuationDenied

__all__ = ["Lease", "end_on_sigterm"]


class Lease:
    """A hold on hardware, from the first lock file to the last reset.

    Parameters
    ----------
    hardware : sequence of str
        UUIDs of GPUs, and folders of CPU frequency policies.
    lock_dir : Path
        Where lock files live, the same for all controllers of a machine.
    idle_s : float
        Seconds after which the hardware of a controller that does nothing is given back.
    on_given_back : callable, optional
        Called when the watchdog gave it back while this process lives.

    Raises
    ------
    BackendError
        If another controller holds a part of it.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl.backends.nvml.giveback import FoundFile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "scaling_max_freq"
    ...     _ = path.write_text("3000000")
    ...     lease = Lease(["cpu0"], lock_dir=Path(folder))
    ...     with lease.touch("cpu0", FoundFile(path=str(path), text="3000000")):
    ...         _ = path.write_text("1000000")
    ...     lease.close()
    ...     path.read_text()
    '3000000'
    """

    def __init__(
        self,
        hardware: Sequence[str],
        *,
        lock_dir: Path = LOCK_DIR,
        idle_s: float = 30.0,
        on_given_back: Callable[[], None] | None = None,
    ) -> None:
        self._records: dict[str, FoundGpu | FoundFile] = {}
        self._closed = False
        with ExitStack() as undo:
            self._locks: dict[str, LockFile] = {}
            for name in sorted(set(hardware)):  # one order for all, so that two never deadlock
                self._locks[name] = LockFile(name, folder=lock_dir)
                undo.callback(self._locks[name].release)
            self.watchdog = Watchdog(
                list(self._locks.values()), idle_s=idle_s, on_acted=on_given_back
            )
            undo.pop_all()

    @property
    def guarded(self) -> bool:
        """Whether somebody answers who would give it back: while nobody does, lower nothing."""
        return self.watchdog.answers

    @property
    def recovered(self) -> tuple[str, ...]:
        """Hardware that a dead controller had left changed, and that was given back first."""
        return tuple(name for name, lock in self._locks.items() if lock.recovered)

    def touched(self, name: str) -> bool:
        """Whether something of it may differ from how it was found.

        Parameters
        ----------
        name : str
            Name of the hardware.
        """
        return name in self._records

    @contextmanager
    def touch(self, name: str, record: FoundGpu | FoundFile) -> Iterator[None]:
        """Context in which something is set for the first time: writes down how it was found.

        Parameters
        ----------
        name : str
            Name of the hardware, one of those that are held.
        record : FoundGpu or FoundFile
            How to give it back. Struck out again if the set inside is denied: then there is
            nothing to give back, and no way to.

        Raises
        ------
        BackendError
            If it cannot be written down; then it must not be set.
        """
        before = self._records.get(name)
        self._write(name, record)
        try:
            yield
        except ActuationDenied:
            self._write(name, before)
            raise

    def _write(self, name: str, record: FoundGpu | FoundFile | None) -> None:
        if self._records.get(name) == record:
            return
        records = {key: value for key, value in self._records.items() if key != name}
        if record is not None:
            records[name] = record
        self.watchdog.arm(list(records.values()))
        self._locks[name].write(record)
        self._records = records

    def close(self, *, watchdog_limit_s: float = 5.0) -> None:
        """Give everything back; may be called twice.

        Parameters
        ----------
        watchdog_limit_s : float
            Seconds to wait for the watchdog where this process itself cannot give it back.

        Raises
        ------
        ActuationDenied
            If something could not be given back, with what to do by hand.
        """
        if self._closed:
            return
        self._closed = True
        problems = give_back(list(self._records.values()))
        if not problems:
            self.watchdog.close()
            for lock in self._locks.values():
                lock.release()
            return
        # The watchdog has the privilege with which we started, and goes on trying.
        left = self.watchdog.abandon(watchdog_limit_s)
        for lock in self._locks.values():
            lock.forget()
        if left:
            raise ActuationDenied(
                f"the hardware could not be given back: {problems[0]}; {left[0]}; by hand:"
                " nvidia-smi --reset-gpu-clocks, --reset-memory-clocks, --power-limit"
            )


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program the way Ctrl-C does, through every `with`.

    For programs whose main thread is ours; inside a host's server the host's handlers stay,
    and the watchdog sees to the rest.

    Examples
    --------
    >>> with end_on_sigterm():
    ...     pass
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
