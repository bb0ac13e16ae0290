"""Hardware of the dead: whoever of us lives on a machine gives back what others left changed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from voltana_ctrl.backends.nvml.giveback import give_back
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR, left_by_the_lost, restore_abandoned

__all__ = ["Sweep"]

_log = logging.getLogger(__name__)


class Sweep:
    """Looks at the lock files of a machine once a second, and carries out what the dead wrote down.

    A watchdog does so for its own controller. Where both have died nobody is left to; where one
    is frozen and the other dead, the frozen one keeps the lock: then this gives the hardware back.
    Setting the same twice does no harm, and a controller that thaws sees its lock gone and sets it
    again.

    Parameters
    ----------
    folder : Path
        Folder of the lock files; where there is no such folder there are none.
    every_s : float
        Seconds between two looks.
    patience : int
        Looks at which an owner must have been dead or stopped while somebody holds on to the lock.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder, Sweep(Path(folder)) as sweep:
    ...     sweep.look()
    []
    """

    def __init__(self, folder: Path = LOCK_DIR, *, every_s: float = 1.0, patience: int = 4) -> None:
        self._folder, self._every_s, self._patience = Path(folder), every_s, patience
        self._seen: dict[tuple[str, str], int] = {}
        self._back: set[tuple[str, str]] = set()
        self._said: set[str] = set()
        self._looking = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="voltana-ctrl-sweep", daemon=True)

    def look(self) -> list[str]:
        """Give back once what dead controllers left.

        Where the lock is still held, only after `patience` looks.

        Returns
        -------
        list of str
            Names in the lock files of the hardware that was given back now for the first time. A
            new problem is logged once.
        """
        with self._looking:
            given_back, problems = restore_abandoned(self._folder)
            held = left_by_the_lost(self._folder)
            self._seen = {key: self._seen.get(key, 0) + 1 for key in held}
            self._back &= set(held)
            for key, looks in self._seen.items():
                if looks < self._patience:
                    continue
                failed = give_back([held[key]])
                problems += failed
                if not failed and key not in self._back:  # and again each time, in silence
                    self._back.add(key)
                    given_back.append(key[0])
        for name in given_back:
            _log.warning("voltana-ctrl: %s: its controller is dead; given back", name)
        for problem in set(problems) - self._said:
            _log.error("voltana-ctrl: left by a dead controller: %s", problem)
        self._said = set(problems)
        return given_back

    def _run(self) -> None:
        while not self._ending.wait(self._every_s):
            try:
                self.look()
            except Exception:  # noqa: BLE001  a look that fails is not the last one
                _log.exception("voltana-ctrl: looking for what the dead left failed")

    def __enter__(self) -> Sweep:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join(5.0)
