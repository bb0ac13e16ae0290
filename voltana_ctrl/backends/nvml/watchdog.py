"""A small process that outlives its controller and gives the hardware back when it dies.

The controller hands over what it has touched so far when it starts the process, and writes to a
pipe: what it is about to touch, before it does; a beat four times a second, which is answered; a
farewell when it has given everything back itself. The pipe's end without a farewell (the
controller was killed) or silence (it is frozen) makes the watchdog act: it gives back what it was
told of, and what the controller's lock files tell. It holds these open, so that no successor can
start in between.

Guards are watched in turn. A watchdog that does not answer for a second is killed, unless it only
waits for a CPU, and a new one is started; meanwhile nothing is lowered (:attr:`Watchdog.answers`).

It is nobody's child: engines end by killing every descendant of theirs, and a watchdog among them
would leave a clock locked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import syslog
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any

from voltana_ctrl.backends.nvml.giveback import FoundFile, FoundGpu, give_back, record_from
from voltana_ctrl.backends.nvml.lockfile import LockFile, read_record, remove_if_ours
from voltana_ctrl.backends.nvml.process import process_start, process_state
from voltana_ctrl.errors import BackendError, ConfigError

__all__ = ["Watchdog"]

_log = logging.getLogger(__name__)

_BEAT_S = 0.25
_SILENCE_S = 1.5
_START_LIMIT_S = 30.0
_RETRY_S = 0.2
_GIVE_UP_S = 60.0
# A watchdog that has not answered for so long is taken for frozen.
_ANSWER_S = 1.0
# The child may run as root wherever it was started: it is isolated (no current folder, no
# PYTHON* variables, no user's packages), begins with the standard library alone, and then finds
# this package and the driver's binding where the host found them.
_FLAGS = ("-I", "-S")
_PROGRAM = (
    "import json, sys; settings = json.loads(sys.argv[1]); sys.path += settings['path'];"
    " from voltana_ctrl.backends.nvml.watchdog import main; main(settings)"
)


class _Orphan:
    """A process that is no child of this one, known by its number and the time it started."""

    def __init__(self, pid: int, stdin: IO[bytes] | None, stdout: IO[bytes] | None) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._started = process_start(pid)

    def alive(self) -> bool:
        return self._started is not None and process_start(self.pid) == self._started

    def kill(self) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, limit_s: float = math.inf) -> bool:
        """Wait until it has ended; whether it has."""
        until_s = time.monotonic() + limit_s
        while self.alive():
            if time.monotonic() >= until_s:
                return False
            time.sleep(0.01)
        return True


class Watchdog:
    """Starts a process that gives the hardware back if this one dies or falls silent.

    Parameters
    ----------
    locks : sequence of LockFile
        Lock files of the hardware. The other process keeps them open until it ends: after the
        farewell of :meth:`close`, or, if this process dies, once it has given the hardware back
        or has tried for 60 s.
    idle_s : float
        Seconds without a call of :meth:`seen` after which no beat is sent any more. The
        watchdog takes that for death, and acts 1.5 s after the last beat.
    on_acted : callable, optional
        Called, in a thread, when the watchdog gave the hardware back although this process lives,
        because it was frozen or idle: what was set is no longer in force.

    Raises
    ------
    BackendError
        If the process does not start.

    Examples
    --------
    >>> watchdog = Watchdog([])
    >>> watchdog.arm([])
    >>> watchdog.close()
    >>> watchdog.running
    False
    """

    def __init__(
        self,
        locks: Sequence[LockFile],
        *,
        idle_s: float = 30.0,
        on_acted: Callable[[], None] | None = None,
    ) -> None:
        self._locks = tuple(locks)
        self._idle_s = idle_s
        self._on_acted = on_acted
        self._pid = os.getpid()
        self._plan: list[dict[str, Any]] = []
        self._asked_s: float | None = None  # the first beat that is not answered yet
        self._restarts = 0
        self._seen_s = time.monotonic()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._child = self._start()
        self._beats = threading.Thread(target=self._beat, name="voltana-ctrl-beat", daemon=True)
        self._beats.start()
        leave = weakref.WeakMethod(self._leave_in_fork)
        os.register_at_fork(after_in_child=lambda: _call_if_there(leave))

    @property
    def running(self) -> bool:
        """Whether the watchdog process lives."""
        return self._child.alive()

    @property
    def answers(self) -> bool:
        """Whether it lives, and has answered within 1 s: only then may a clock be lowered."""
        asked_s = self._asked_s
        return self.running and (asked_s is None or time.monotonic() - asked_s < _ANSWER_S)

    @property
    def restarts(self) -> int:
        """How often it had to be replaced because it was dead or frozen."""
        return self._restarts

    def _start(self) -> _Orphan:
        settings = {
            "path": _package_path(),
            "locks": [[lock.fd, str(lock.path)] for lock in self._locks],
            "plan": self._plan,
        }
        try:
            child = subprocess.Popen(
                [sys.executable, *_FLAGS, "-c", _PROGRAM, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=[lock.fd for lock in self._locks],
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise BackendError(f"watchdog: cannot be started: {error}") from error
        said = _line(child, _START_LIMIT_S).split()
        if not said or said[0] != "ready":
            child.kill()
            child.wait()
            _let_go(child)
            raise BackendError(
                f"watchdog: {sys.executable} did not start it within {_START_LIMIT_S:g} s;"
                " without a watchdog nothing is set"
            )
        child.wait()  # it has left the watchdog to itself
        return _Orphan(int(said[1]), child.stdin, child.stdout)

    def arm(self, records: Sequence[FoundGpu | FoundFile]) -> None:
        """Tell the watchdog what is about to be touched, before it is touched.

        Parameters
        ----------
        records : sequence of FoundGpu or FoundFile
            How everything touched so far, and what is new, is to be given back.

        Raises
        ------
        BackendError
            If the watchdog cannot be told; then the hardware must not be touched.
        """
        self._plan = [record.as_dict() for record in records]
        self._send(json.dumps(self._plan).encode() + b"\n")

    def seen(self) -> None:
        """Note that the controller is at work."""
        self._seen_s = time.monotonic()

    def _send(self, line: bytes) -> None:
        with self._writing:
            try:
                _write(self._child, line)
            except OSError:
                # Somebody killed it. The hardware is ours still, and needs a new one.
                self._replace()

    def _replace(self) -> None:
        """Start a new one, which is told everything, once the old one can do nothing more."""
        self._child.kill()
        _reap(self._child)
        self._restarts += 1
        self._child = self._start()
        self._asked_s = None

    def _beat(self) -> None:
        while not self._closing.wait(_BEAT_S):
            if time.monotonic() - self._seen_s < self._idle_s:
                # Without a watchdog arm() fails at the next touch; a beat has nobody to tell.
                with contextlib.suppress(BackendError):
                    self._send(b"beat\n")
                    self._asked_s = self._asked_s or time.monotonic()
            self._hear()
            if self.running and not self.answers and process_state(self._child.pid) != "R":
                # Stopped, or stuck in a call; one that waits for a CPU will answer when it gets it.
                self._hear()
                if not self.answers:
                    _log.warning("voltana-ctrl: the watchdog did not answer and is replaced")
                    with contextlib.suppress(BackendError), self._writing:
                        self._replace()

    def _hear(self) -> None:
        """Take what it has said."""
        while said := _line(self._child, 0.0):
            self._asked_s = None
            if said == "acted" and self._on_acted is not None:
                self._on_acted()

    def _stop_beating(self) -> None:
        self._closing.set()
        if self._beats is not threading.current_thread():
            self._beats.join()

    def close(self) -> None:
        """Dismiss the watchdog, since the hardware is given back; may be called twice.

        In a forked child it does nothing.
        """
        if os.getpid() != self._pid or self._closing.is_set():
            return
        self._stop_beating()
        with contextlib.suppress(OSError):  # it is dead already, and not needed
            _write(self._child, b"bye\n")
        _reap(self._child)

    def abandon(self, limit_s: float) -> list[str]:
        """Let the watchdog give the hardware back, as if this process had died.

        Parameters
        ----------
        limit_s : float
            Seconds to wait for it; it goes on afterwards.

        Returns
        -------
        list of str
            What could not be given back within that time, in words; empty if all was, or
            if the watchdog was dismissed before.
        """
        if os.getpid() != self._pid or self._closing.is_set():
            return []
        self._stop_beating()
        child = self._child
        if child.stdin is not None:
            child.stdin.close()
        said, until_s = "", time.monotonic() + limit_s
        # Its last word counts: earlier ones answer beats, or are about a silence.
        while line := _line(child, max(0.0, until_s - time.monotonic())):
            said = line
        if said == "acted":
            _reap(child)
            return []
        if child.stdout is not None:
            child.stdout.close()
        return [said or f"the watchdog (process {child.pid}) is still trying"]

    def _leave_in_fork(self) -> None:
        """In a forked child: close our ends, or the watchdog would not see the parent die."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for lock in self._locks:
            lock.forget()


def _call_if_there(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    function = method()
    if function is not None:
        function()


def _package_path() -> list[str]:
    """Folders that hold this package and the driver's binding, as the host finds them.

    Nothing else that a watchdog imports is outside the standard library. A relative entry of the
    host's path, such as the empty one for the current folder, is not looked into: it may be
    anybody's.
    """
    folders = [str(Path(__file__).absolute().parents[3])]
    binding = PathFinder.find_spec("pynvml", [each for each in sys.path if os.path.isabs(each)])
    if binding is not None and binding.origin is not None:
        above = 2 if binding.submodule_search_locations else 1
        folders.append(str(Path(binding.origin).parents[above - 1]))
    return folders


def _write(child: _Orphan, line: bytes) -> None:
    if child.stdin is None or child.stdin.closed:
        raise BrokenPipeError("its pipe is closed")
    child.stdin.write(line)
    child.stdin.flush()


def _line(child: subprocess.Popen[bytes] | _Orphan, limit_s: float) -> str:
    """Next line that the watchdog says within the limit; empty if none."""
    stream = child.stdout
    try:
        if stream is None or not select.select([stream], [], [], limit_s)[0]:
            return ""
        return stream.readline().decode().strip()
    except (OSError, ValueError):
        return ""  # closed by another thread: the watchdog was replaced or dismissed


def _let_go(child: subprocess.Popen[bytes] | _Orphan) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _reap(child: _Orphan) -> None:
    _let_go(child)
    if not child.wait(5.0):
        child.kill()
        child.wait(5.0)  # if not even then: it is in the kernel, and runs no more


# The watchdog process


def main(settings: Mapping[str, Any]) -> None:
    """Watch standard input; act when it ends or falls silent without a farewell."""
    if os.fork():
        os._exit(0)  # who started it waits for this; the watchdog is left to itself
    # What ends the controller (Ctrl-C, a service manager) must not end its watchdog.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(1, False)  # a controller that does not listen must not hold it up
    plan = [record_from(values) for values in settings["plan"]]
    locks = [(fd, Path(path)) for fd, path in settings["locks"]]
    _say(f"ready {os.getpid()}")
    if _watch(plan, locks):
        for fd, path in locks:
            remove_if_ours(fd, path)


def _watch(records: list[FoundGpu | FoundFile], locks: Sequence[tuple[int, Path]]) -> bool:
    """Whether the controller died and everything was given back."""
    rest = b""
    acted = False
    while True:
        if not select.select([0], [], [], _SILENCE_S)[0]:
            if not acted and not _act(records, locks, give_up_s=0.0):
                acted = True
                _say("acted")
            continue
        data = os.read(0, 65536)
        if not data:
            problems = _act(records, locks, give_up_s=_GIVE_UP_S)
            _say(problems[0].replace("\n", " ") if problems else "acted")
            return not problems
        *lines, rest = (rest + data).split(b"\n")
        acted = False
        for line in lines:
            if line == b"bye":
                return False
            if line.startswith(b"["):
                records = [record_from(values) for values in json.loads(line)]
        _say("alive")


def _written(locks: Sequence[tuple[int, Path]]) -> tuple[list[FoundGpu | FoundFile], list[str]]:
    """Records in the controller's lock files, and what is wrong with those that hold none."""
    found: list[FoundGpu | FoundFile] = []
    problems: list[str] = []
    for fd, path in locks:
        try:
            record = read_record(fd)
        except (ConfigError, OSError) as error:
            problems.append(f"lock file {path}: {error}")
        else:
            found += [] if record is None else [record]
    return found, problems


def _act(
    told: Sequence[FoundGpu | FoundFile], locks: Sequence[tuple[int, Path]], *, give_up_s: float
) -> list[str]:
    """Give everything back; what could not be, in words."""
    until_s = time.monotonic() + give_up_s
    written, unreadable = _written(locks)
    records = [*told, *(record for record in written if record not in told)]
    while problems := give_back(records):
        if time.monotonic() >= until_s:
            break
        time.sleep(_RETRY_S)
    problems += unreadable
    level = syslog.LOG_ERR if problems else syslog.LOG_WARNING
    outcome = "; ".join(problems) or f"{len(records)} given back"
    syslog.syslog(level, f"voltana-ctrl: the controller is gone or silent: {outcome}")
    return problems


def _say(text: str) -> None:
    # The controller may be dead: then nobody reads it.
    with contextlib.suppress(OSError):
        os.write(1, text.encode() + b"\n")
