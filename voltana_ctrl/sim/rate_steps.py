"""A load that changes in steps: so many requests per second from these seconds on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from voltana_ctrl.checks import F64, not_negative
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.arrivals import ArrivalProcess, Diurnal

__all__ = ["RateSteps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSteps:
    """Steps of the rate at which requests arrive.

    Parameters
    ----------
    steps : tuple of (from_s, rate_req_s)
        Each rate holds from its time until the next one's; times ascend and the first is 0, which
        is the start of the warm-up. A rate of 0 is a silence.

    Raises
    ------
    ConfigError
        If there is no step, times do not ascend from 0, a rate is negative, or all are 0.

    Examples
    --------
    >>> steps = RateSteps(steps=((0.0, 10.0), (100.0, 60.0)))
    >>> steps.mean_req_s(50.0, 150.0)
    35.0
    """

    steps: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        try:
            steps = tuple((float(from_s), float(rate)) for from_s, rate in self.steps)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"RateSteps.steps: expected pairs (from_s, rate_req_s), got {self.steps!r}"
            ) from error
        for from_s, rate in steps:
            not_negative("rate-steps: time of a step [s]", from_s)
            not_negative("rate-steps: rate of a step [req/s]", rate)
        times_s = [from_s for from_s, _ in steps]
        if not steps or times_s[0] != 0.0:
            first = f"{times_s[0]:g} s" if steps else "no step"
            raise ConfigError(
                f"rate-steps: expected the first step at 0 s, got {first}; say what holds before it"
            )
        for before_s, after_s in pairwise(times_s):
            if not before_s < after_s:
                raise ConfigError(
                    f"rate-steps: expected ascending times, got {after_s:g} s after {before_s:g} s"
                )
        if not any(rate for _, rate in steps):
            raise ConfigError("rate-steps: expected a rate > 0 in at least one step, got none")
        object.__setattr__(self, "steps", steps)

    @classmethod
    def parse(cls, text: str) -> RateSteps:
        """Steps from ``0:10,100:60``, in seconds and requests per second.

        Raises
        ------
        ConfigError
            Naming the step that does not fit.

        Examples
        --------
        >>> RateSteps.parse("0:10,100:60").steps
        ((0.0, 10.0), (100.0, 60.0))
        """
        steps = []
        for part in text.split(","):
            from_s, _, rate = part.partition(":")
            try:
                steps.append((float(from_s), float(rate)))
            except ValueError:
                raise ConfigError(
                    "rate-steps: expected steps SECONDS:REQ_PER_S such as 0:10,100:60, got"
                    f" {part!r}"
                ) from None
        return cls(steps=tuple(steps))

    @property
    def highest_req_s(self) -> float:
        """Highest rate of all steps."""
        return max(rate for _, rate in self.steps)

    def pieces(self, until_s: float) -> Iterator[tuple[float, float, float]]:
        """Begin, end [s] and rate [req/s] of every step that begins before `until_s`."""
        edges_s = [*(from_s for from_s, _ in self.steps[1:]), np.inf]
        for (from_s, rate), end_s in zip(self.steps, edges_s, strict=True):
            if from_s < until_s:
                yield from_s, min(end_s, until_s), rate

    def mean_req_s(self, from_s: float, until_s: float) -> float:
        """Mean rate between two times.

        Parameters
        ----------
        from_s, until_s : float
            Seconds from the start of the warm-up, the second one later.

        Returns
        -------
        float
            Requests per second.
        """
        expected = self._expected(np.array([from_s, until_s]))
        return float((expected[1] - expected[0]) / (until_s - from_s))

    def _expected(self, t_s: F64) -> F64:
        """Mean number of arrivals from 0 to each of these times."""
        total = np.zeros_like(t_s)
        for from_s, end_s, rate in self.pieces(float(np.max(t_s))):
            total += rate * np.clip(t_s - from_s, 0.0, end_s - from_s)
        return total

    def sample(
        self,
        process: Callable[[float], ArrivalProcess],
        duration_s: float,
        rng: np.random.Generator,
    ) -> F64:
        """Draw arrival times in ``[0, duration_s)``: in every step a process of its own.

        Every process starts in its stationary state, so each step has its rate in the mean.

        Parameters
        ----------
        process : callable (rate_req_s) -> ArrivalProcess
            What arrives at a rate.
        duration_s : float
            Span in seconds, > 0.
        rng : numpy.random.Generator
            Source of randomness, advanced by the call.

        Returns
        -------
        ndarray, shape (n_requests,)
            Seconds from the start, ascending.

        Raises
        ------
        ConfigError
            For :class:`~voltana_ctrl.sim.arrivals.Diurnal`, which has its own rate over time.

        Examples
        --------
        >>> import numpy as np
        >>> from voltana_ctrl.sim.arrivals import Poisson
        >>> steps = RateSteps.parse("0:10,100:60")
        >>> arrival_s = steps.sample(lambda _: Poisson(), 200.0, np.random.default_rng(0))
        >>> before, after = np.histogram(arrival_s, [0.0, 100.0, 200.0])[0]
        >>> bool(900 < before < 1100), bool(5800 < after < 6200)
        (True, True)
        """
        drawn = [np.zeros(0)]
        for from_s, end_s, rate in self.pieces(duration_s):
            if rate == 0.0:
                continue
            at_rate = process(rate)
            if isinstance(at_rate, Diurnal):
                raise ConfigError(
                    "rate-steps and arrivals diurnal: expected one of them, since both say how the"
                    " rate changes over time; leave one out"
                )
            drawn.append(from_s + at_rate.sample(rate, end_s - from_s, rng))
        return np.concatenate(drawn)

    def on_clock(self, arrival_s: F64, rate_req_s: float, duration_s: float) -> tuple[F64, float]:
        """Move arrivals of a mean rate onto the clock of these steps, order kept.

        Parameters
        ----------
        arrival_s : ndarray, shape (n,)
            Times in ``[0, duration_s]``.
        rate_req_s : float
            Their mean rate.
        duration_s : float
            Span that they cover.

        Returns
        -------
        arrival_s : ndarray, shape (n,)
            Arrival times on the new clock.
        duration_s : float
            Span that they cover now.

        Raises
        ------
        ConfigError
            If the last step is a silence, which would never end.

        Examples
        --------
        >>> import numpy as np
        >>> steps = RateSteps.parse("0:1,10:4")
        >>> arrival_s, duration_s = steps.on_clock(np.array([0.0, 4.0, 10.0]), 2.0, 10.0)
        >>> arrival_s.tolist(), duration_s
        ([0.0, 8.0, 12.5], 12.5)
        """
        begins_s, rates = np.array(self.steps).T
        if rates[-1] == 0.0:
            raise ConfigError(
                "rate-steps: expected a last rate > 0 for a trace, whose requests would never all"
                " arrive otherwise, got 0"
            )
        reached = self._expected(begins_s)
        wanted = np.append(arrival_s, duration_s) * rate_req_s
        piece = np.searchsorted(reached, wanted, side="right") - 1
        moved_s: F64 = begins_s[piece] + (wanted - reached[piece]) / rates[piece]
        return moved_s[:-1], float(moved_s[-1])
