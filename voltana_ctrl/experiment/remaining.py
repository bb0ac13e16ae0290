"""How long the rest of a comparison will take, from what its runs have taken so far."""

from __future__ import annotations

from collections.abc import Collection

from voltana_ctrl.experiment.grid import Done, Grid
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.sim.workload import Workload

__all__ = ["TimeLeft"]

# Measured on one core of a server; only their ratios matter once a run has ended.
_RUN_S, _REQUEST_S, _TICK_S = 0.02, 2e-6, 1.5e-3


class TimeLeft:
    """Estimate of the time left, right within a factor of two from the first tenth on.

    A run is expected to take what its requests and its decisions in Python cost on a usual core,
    times how much more the ended runs of its policy have taken; before one has ended, of policies
    of its kind. A run that takes longer than that makes those like it longer, too.

    Parameters
    ----------
    grid : Grid
        What is carried out.
    asked : collection of str
        Policies that are asked in Python at every tick.
    workers : int
        How many runs go on at the same time.

    Examples
    --------
    >>> from voltana_ctrl.experiment import Done
    >>> from voltana_ctrl.experiment.grid import plan_runs
    >>> grid = plan_runs(rates_req_s=[5.0, 9.0], policies=["static-max"], duration_s=9.0)
    >>> left = TimeLeft(grid, (), 1)
    >>> left.add(Done(index=0, figures={}, took_s=3.0))
    >>> 2.0 < left.left_s(3.0) < 4.0
    True
    """

    def __init__(self, grid: Grid, asked: Collection[str], workers: int) -> None:
        self._workers = workers
        self._asked = frozenset(asked)
        self._policy = [str(run.policy) for run in grid.runs]
        self._prior_s = [_prior_s(run, str(run.policy) in self._asked) for run in grid.runs]
        self._open = dict.fromkeys(grid.order())
        self._took_s: dict[int, float] = {}

    @property
    def work_s(self) -> float:
        """What is not done yet, in seconds of one core."""
        return sum(self._prior_s[k] * self._ratio(self._policy[k]) for k in self._open)

    def add(self, done: Done) -> None:
        """Learn from a run that has ended."""
        self._open.pop(done.index, None)
        if done.took_s > 0.0:
            self._took_s[done.index] = done.took_s

    def left_s(self, since_s: float) -> float:
        """Seconds left.

        Parameters
        ----------
        since_s : float
            Seconds since the runs were begun.

        Returns
        -------
        float
            Seconds until all runs have ended.
        """
        spent_s = max(0.0, self._workers * since_s - sum(self._took_s.values()))
        expected_s = {k: self._prior_s[k] * self._ratio(self._policy[k]) for k in self._open}
        running = list(expected_s)[: self._workers]
        running_s = sum(expected_s[k] for k in running)
        if spent_s > running_s > 0.0:  # longer than expected, and so will be those like them
            like = {self._policy[k] for k in running}
            factor = 1.3 * spent_s / running_s
            expected_s = {
                k: s * factor if self._policy[k] in like else s for k, s in expected_s.items()
            }
        left_s = max(0.0, sum(expected_s.values()) - spent_s)
        longest_s = max(expected_s.values(), default=0.0)
        return max(left_s / self._workers, min(longest_s, left_s))

    def _ratio(self, policy: str) -> float:
        """How much longer runs of a policy take than was thought."""
        for like in (
            [k for k in self._took_s if self._policy[k] == policy],
            [
                k
                for k in self._took_s
                if (self._policy[k] in self._asked) == (policy in self._asked)
            ],
            list(self._took_s),
        ):
            if like:
                return sum(self._took_s[k] for k in like) / sum(self._prior_s[k] for k in like)
        return 1.0


def _prior_s(run: Run, asked: bool) -> float:
    span_s = run.duration_s + run.warmup_s
    rate = run.rate_req_s
    if rate is None:
        rate = run.workload.rate_req_s if isinstance(run.workload, Workload) else 0.0
    if run.concurrency is not None:
        rate = run.concurrency / 5.0  # an answer takes some seconds
    requests = rate * span_s if rate == rate else 0.0  # no rate, no number
    # A decision looks at every instance, most of it at once.
    tick_s = _TICK_S * (1.0 + len(run.fleet) / 64.0)
    return _RUN_S + _REQUEST_S * requests + (tick_s * span_s / run.tick_s if asked else 0.0)
