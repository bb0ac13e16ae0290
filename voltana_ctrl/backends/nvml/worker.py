"""A thread of its own for driver calls, which may hang, so that the control loop does not."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Worker"]


class _Job:
    __slots__ = ("done", "error", "function", "result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            self.error = error
        self.done.set()


class Worker:
    """Runs jobs one after the other in a daemon thread.

    One thread per node is what the driver wants anyway: its set calls follow one another.

    Examples
    --------
    >>> import time
    >>> worker = Worker()
    >>> worker.run(lambda: 6 * 7, limit_s=1.0)
    42
    >>> try:
    ...     worker.run(lambda: time.sleep(0.2), limit_s=0.01)
    ... except TimeoutError:
    ...     worker.busy_s > 0.0
    True
    >>> worker.stop()
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._running: tuple[_Job, float] | None = None
        self._thread = threading.Thread(target=self._work, name="voltana-ctrl-nvml", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._running = (job, time.monotonic())
            job.run()
            self._running = None

    @property
    def busy_s(self) -> float:
        """Seconds that the job that runs now has been running; 0 if none does."""
        running = self._running
        return 0.0 if running is None else time.monotonic() - running[1]

    def run(self, function: Callable[[], Any], *, limit_s: float) -> Any:
        """Run a job and wait for it; what it raises is raised here.

        Parameters
        ----------
        function : callable
            The job, called without arguments.
        limit_s : float
            Seconds to wait for it.

        Returns
        -------
        object
            What the job returned.

        Raises
        ------
        TimeoutError
            If it is not done by then; it goes on, and later jobs wait for it.
        """
        job = _Job(function)
        self._jobs.put(job)
        if not job.done.wait(limit_s):
            raise TimeoutError(f"a driver call takes longer than {limit_s:g} s")
        if job.error is not None:
            raise job.error
        return job.result

    def stop(self) -> None:
        """End the thread after the jobs it has."""
        self._jobs.put(None)
