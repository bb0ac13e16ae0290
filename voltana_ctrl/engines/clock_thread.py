"""Clock sets of a governor, on a thread of their own: a set can block for milliseconds."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import median
from typing import Protocol

from voltana_ctrl.checks import F64
from voltana_ctrl.engines.limits import Handed, read_limits
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.types import Order
from voltana_ctrl.types.ladder import row_down, row_up

__all__ = ["ClockThread", "SetsOneClock"]

_log = logging.getLogger("voltana_ctrl")
_LOOK_S = 0.1
# A backend that is not used for long gives the clock back; an engine at work keeps it.
_RENEW_S = 5.0
# Latest sets whose durations count.
_SETS_KEPT = 64


class SetsOneClock(Protocol):
    """What a clock thread needs of a backend."""

    def set_clock(self, instance: int, freq_mhz: float) -> None:
        """Set the clock of one instance."""

    def close(self) -> None:
        """Give the hardware back."""


class ClockThread:
    """Sets the clock that was asked for last; :meth:`ask` never waits.

    Parameters
    ----------
    backend : SetsOneClock
        Of one instance; closed together with this, at the latest when the process ends. That
        a process which is killed gives its clock back is the backend's watchdog's to see to.
    clocks_mhz : ndarray
        Supported clocks, ascending.
    limits : Path, optional
        File of :func:`~voltana_ctrl.engines.write_limits`. Where its order has lapsed the
        controller is gone: the floor rises to the ceiling that holds then.
    owners : collection of int
        User ids besides root and our own that may have written the file.
    on_handed : callable, optional
        Called in this thread with the order that holds and the name of its policy, whenever one
        of them changes.
    park : callable, optional
        Called in this thread with True once the instance is parked and has had nothing to do for a
        while, and with False when it takes work again, or has some, until it returns that this is
        so.

    Examples
    --------
    >>> import numpy as np
    >>> class Card:
    ...     def set_clock(self, instance, freq_mhz): print("set", freq_mhz)
    ...     def close(self): print("given back")
    >>> clock = ClockThread(Card(), np.array([210.0, 1410.0]))
    >>> clock.ask(1410.0)
    >>> clock.settle()
    set 1410.0
    True
    >>> clock.close()
    given back
    """

    def __init__(
        self,
        backend: SetsOneClock,
        clocks_mhz: F64,
        *,
        limits: Path | None = None,
        owners: Collection[int] = (),
        on_handed: Callable[[Order, str], None] = lambda *_: None,
        park: Callable[[bool], bool] | None = None,
    ) -> None:
        self._backend = backend
        self._park, self._sleeps, self._stays_awake = park, False, park is None
        self._limits, self._owners, self._on_handed = limits, owners, on_handed
        self._handed: Handed | None = None
        self._told: tuple[Order, str] | None = None
        self._problem = ""
        self._asked_s = 0.0
        self._took_s: deque[float] = deque(maxlen=_SETS_KEPT)
        #: Median seconds from asking until a set has returned, of the last 64; 0 before any.
        self.set_s = 0.0
        self._clocks_mhz = clocks_mhz
        self.floor_mhz, self.ceiling_mhz = float(clocks_mhz[0]), float(clocks_mhz[-1])
        self.asked_mhz = self.ceiling_mhz
        self.sets = 0
        self.refused = 0
        self._done_mhz: float | None = None
        # Counted by who asks; the thread remembers up to which it knows.
        self._asks = self._known_asks = 0
        self._asked = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._stopping = False
        self._closing = threading.Lock()
        self._closed = False
        if limits is not None:
            self._look()
        self._thread = threading.Thread(target=self._run, name="voltana-ctrl-clock", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def ask(self, freq_mhz: float) -> None:
        """Have this clock set soon; one that was asked for before and is not set yet is dropped.

        Parameters
        ----------
        freq_mhz : float
            A supported clock in MHz.
        """
        self._asks += 1
        if freq_mhz != self.asked_mhz or self._done_mhz is None:
            self.asked_mhz = freq_mhz
            self._asked_s = time.monotonic()
            self._idle.clear()
            self._asked.set()
        elif self._sleeps:
            self._asked.set()

    def settle(self, limit_s: float = 5.0) -> bool:
        """Wait until the clock that was asked for last has been set, or refused.

        Parameters
        ----------
        limit_s : float
            Seconds to wait at most.

        Returns
        -------
        bool
            False if that took longer than `limit_s`. True says that it was tried, not that it
            succeeded: `refused` counts the failures.
        """
        return self._idle.wait(limit_s)

    def _run(self) -> None:
        looked_s = renewed_s = time.monotonic()
        while not self._stopping:
            asked = self._asked.wait(_LOOK_S)
            if self._stopping:
                return
            now_s = time.monotonic()
            if self._limits is not None and now_s - looked_s >= _LOOK_S:
                looked_s = now_s
                self._look()
            asks = self._asks
            works = asks != self._known_asks
            if self._sleeps and (works or self._stays_awake or not self._parked(now_s)):
                self._sleep(False)
            if now_s - renewed_s >= _RENEW_S:
                renewed_s = now_s
                # Who is under orders keeps its clock idle, too: a budget counts idle power as well.
                in_use = works or self._handed is not None
                asked |= in_use
                if not in_use:
                    self._done_mhz = None  # may be given back before the next iteration
                if not works:
                    self._rest(now_s)
                self._known_asks = asks
            if asked:
                self._asked.clear()
                self._set(self.asked_mhz)
                if not self._asked.is_set():
                    self._idle.set()

    def _set(self, freq_mhz: float) -> None:
        try:
            self._backend.set_clock(0, freq_mhz)
            self.sets += 1
            self._done_mhz = freq_mhz
            if self._asked_s:
                self._took_s.append(time.monotonic() - self._asked_s)
                self.set_s = median(self._took_s)
                self._asked_s = 0.0
        except BackendError as error:
            self._done_mhz = None  # tried again with the next iteration
            self.refused += 1
            if self.refused == 1:
                _log.warning("voltana-ctrl: the clock cannot be set: %s", error)

    def _look(self) -> None:
        """Take over what was handed over last, as it stands now."""
        try:
            handed = (
                None if self._limits is None else read_limits(self._limits, owners=self._owners)
            )
            self._problem = ""
        except ConfigError as error:
            handed = None
            if str(error) != self._problem:
                self._problem = str(error)
                _log.warning("voltana-ctrl: %s; the last order stays", error)
        self._handed = handed = handed or self._handed
        if handed is None:  # no word yet: the highest clock
            self.floor_mhz = self.ceiling_mhz
        else:
            order = handed.now(time.monotonic())
            self.ceiling_mhz = self._at_most(order.ceiling_mhz)
            self.floor_mhz = min(self._at_least(order.floor_mhz), self.ceiling_mhz)
            if (order, handed.policy) != self._told:
                self._told = order, handed.policy
                self._on_handed(order, handed.policy)
        # An engine that does not iterate follows, too: a power budget does not wait.
        allowed_mhz = min(max(self.asked_mhz, self.floor_mhz), self.ceiling_mhz)
        if allowed_mhz != self.asked_mhz:
            self.asked_mhz = allowed_mhz
            self._asked.set()

    def _rest(self, t_s: float) -> None:
        """Go down to the floor where the instance is parked and has had nothing to do for a while.

        Governors choose clocks of iterations alone: the last one would stand for as long as it
        sleeps. Who is parked and still has work has a floor that lets it finish.
        """
        if self._parked(t_s):
            self.asked_mhz = min(self.asked_mhz, self.floor_mhz)
            if not self._sleeps and not self._stays_awake:
                self._sleep(True)

    def _parked(self, t_s: float) -> bool:
        """Whether an order in force says so."""
        return self._handed is not None and not self._handed.now(t_s).active

    def _sleep(self, sleeps: bool) -> None:
        """Park, or take back what was done for it; who was refused once stays awake."""
        if self._park is None:
            return
        self._sleeps = True  # of several GPUs one may have been set before another refuses
        try:
            self._sleeps = not self._park(sleeps) or sleeps
        except BackendError as error:
            if not self._stays_awake:
                _log.warning("voltana-ctrl: it cannot be parked deeper: %s", error)
            self._stays_awake = True

    def _at_most(self, freq_mhz: float) -> float:
        return float(self._clocks_mhz[row_down(self._clocks_mhz, freq_mhz)])

    def _at_least(self, freq_mhz: float) -> float:
        return float(self._clocks_mhz[row_up(self._clocks_mhz, freq_mhz)])

    def close(self) -> None:
        """Give the clock back; may be called twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._stopping = True
        self._asked.set()
        self._thread.join(5.0)
        atexit.unregister(self.close)
        self._backend.close()
