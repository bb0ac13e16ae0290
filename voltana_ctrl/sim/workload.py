"""What arrives at the fleet: requests with their times and lengths, and built-in generators.

:class:`Workload` is the one value that generators and trace readers make and the plant consumes.
The built-in generators draw from what :mod:`voltana_ctrl.sim.catalog` describes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, count, frozen_array, not_negative, positive
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.sim.arrivals import ArrivalProcess
from voltana_ctrl.sim.catalog import WORKLOADS, describe
from voltana_ctrl.sim.rate_steps import RateSteps

__all__ = ["WORKLOADS", "Workload", "make_closed_loop", "make_workload"]

_WHO_WAITS = 0xDEFE  # of the random stream
_SPAN_SLACK = 1.0 + 1e-9  # rescaling a span and back must not refuse the whole of it


def _no_counts() -> I64:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """Requests in order of arrival, as arrays of one length; immutable.

    Parameters
    ----------
    name : str
        What to call it in tables.
    arrival_s : ndarray, shape (n,)
        Arrival times in seconds, from 0, never falling; zeros in a closed loop.
    prompt_tok, output_tok : ndarray, shape (n,), int64
        Prompt and output lengths in tokens, >= 1.
    duration_s : float
        Span the arrivals cover, in seconds, >= the last arrival; infinite in a closed loop.
    cached_tok : ndarray, shape (n,), int64, optional
        Prompt tokens whose KV is in the cache already, ``0 <= cached_tok < prompt_tok``: the
        prefix earlier requests left behind in one shared, infinite cache. Zeros by default.
    request_class : ndarray, shape (n,), int64, optional
        Class of a request (tenant, endpoint), >= 0. Zeros by default.
    class_names : tuple of str
        What the classes are called, by their number; empty where they have no names.
    patience_s : ndarray, shape (n,), optional
        How long after its arrival a request must have its whole answer, in seconds, > 0; infinite,
        as by default, where a client waits for it, to whom TTFT and ITL are promised instead.
    block_id : ndarray, shape (m,), int64, optional
        Prefix blocks of all requests, one request after the other; equal ids hold equal KV.
    block_offset : ndarray, shape (n + 1,), int64, optional
        Request i owns ``block_id[block_offset[i]:block_offset[i + 1]]``.
    block_tok : int
        Tokens per block, >= 1.
    concurrency : int, optional
        Closed loop: this many clients, each sending the next request once its last is answered.
    dropped_rows : int
        Rows a reader left out as unusable.
    source : str
        Where the numbers come from and how far to trust them.

    Raises
    ------
    ConfigError
        When a scalar is out of range.
    ShapeError
        When arrays do not fit together or hold values out of range.

    Examples
    --------
    >>> w = Workload(name="two", arrival_s=[0.0, 1.5], prompt_tok=[100, 20], output_tok=[5, 9],
    ...              duration_s=2.0)
    >>> len(w), w.rate_req_s
    (2, 1.0)
    >>> w.rescaled(4.0).arrival_s.tolist()
    [0.0, 0.375]
    """

    name: str
    arrival_s: F64
    prompt_tok: I64
    output_tok: I64
    duration_s: float
    cached_tok: I64 = field(default_factory=_no_counts)
    request_class: I64 = field(default_factory=_no_counts)
    class_names: tuple[str, ...] = ()
    patience_s: F64 = None  # type: ignore[assignment]  # infinite unless given
    block_id: I64 = field(default_factory=_no_counts)
    block_offset: I64 = field(default_factory=_no_counts)
    block_tok: int = 512
    concurrency: int | None = None
    dropped_rows: int = 0
    source: str = "given"

    def __post_init__(self) -> None:
        n = np.size(self.arrival_s)
        self._freeze("arrival_s", (n,), np.float64)
        for name in ("prompt_tok", "output_tok"):
            self._freeze(name, (n,), np.int64)
        for name, length in (("cached_tok", n), ("request_class", n), ("block_offset", n + 1)):
            if np.size(getattr(self, name)) == 0:
                object.__setattr__(self, name, np.zeros(length, dtype=np.int64))
            self._freeze(name, (length,), np.int64)
        if self.patience_s is None:
            object.__setattr__(self, "patience_s", np.full(n, np.inf))
        self._freeze("patience_s", (n,), np.float64)
        self._freeze("block_id", (np.size(self.block_id),), np.int64)
        count("Workload.block_tok", self.block_tok)
        count("Workload.dropped_rows", self.dropped_rows, minimum=0)
        self._check_lengths()
        self._check_times()

    def _freeze(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        value = np.asarray(getattr(self, name))
        if dtype is np.int64 and value.size and value.dtype.kind not in "iu":
            raise ShapeError(f"Workload.{name}: expected whole numbers, got {value.dtype}")
        object.__setattr__(self, name, frozen_array(f"Workload.{name}", value, shape, dtype))

    def _check_lengths(self) -> None:
        for name, lowest in (("prompt_tok", 1), ("output_tok", 1), ("request_class", 0)):
            values = getattr(self, name)
            if values.size and values.min() < lowest:
                raise ShapeError(f"Workload.{name}: expected >= {lowest}, got {values.min()}")
        if np.any((self.cached_tok < 0) | (self.cached_tok >= self.prompt_tok)):
            raise ShapeError("Workload.cached_tok: expected 0 <= cached_tok < prompt_tok")
        if not np.all(self.patience_s > 0.0):  # NaN is not above 0
            raise ShapeError("Workload.patience_s: expected numbers > 0, infinite for none")
        if self.class_names and self.request_class.max(initial=0) >= len(self.class_names):
            raise ShapeError(
                "Workload.class_names: expected a name for each class, got"
                f" {len(self.class_names)} for classes up to {self.request_class.max()}"
            )
        edges = self.block_offset
        if edges[0] != 0 or edges[-1] != self.block_id.size or np.any(np.diff(edges) < 0):
            raise ShapeError(
                "Workload.block_offset: expected to rise from 0 to the number of block ids,"
                f" {self.block_id.size}"
            )

    def _check_times(self) -> None:
        if self.concurrency is not None:
            count("Workload.concurrency", self.concurrency)
            if np.isfinite(self.patience_s).any():
                raise ConfigError(
                    "Workload.patience_s: a client of a closed loop waits for its answer; expected"
                    " infinite ones"
                )
            if self.duration_s != math.inf or np.any(self.arrival_s != 0.0):
                raise ConfigError(
                    "Workload.concurrency: a closed loop has no arrival times; expected zeros and"
                    " duration_s=math.inf (use Workload.closed_loop)"
                )
            return
        positive("Workload.duration_s", self.duration_s)
        times_s = self.arrival_s
        inside = np.all((times_s >= 0.0) & (times_s <= self.duration_s))  # NaN is not inside
        if not inside or np.any(np.diff(times_s) < 0.0):
            raise ShapeError(
                "Workload.arrival_s: expected times that never fall, from 0 to duration_s"
                f" = {self.duration_s!r}"
            )

    def __len__(self) -> int:
        return int(self.arrival_s.size)

    def __reduce__(self) -> tuple[Any, ...]:
        # arrays lose their read-only flag on the way through pickle: build anew on the other side
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return functools.partial(type(self), **values), ()

    @property
    def rate_req_s(self) -> float:
        """Mean arrival rate in requests per second; NaN in a closed loop, whose rate is a result.

        Examples
        --------
        >>> make_closed_loop("fixed", concurrency=8, requests=100, seed=0).rate_req_s
        nan
        """
        return math.nan if self.concurrency is not None else len(self) / self.duration_s

    def rescaled(self, rate_req_s: float) -> Workload:
        """Run the clock faster or slower so that the mean rate is `rate_req_s`.

        Lengths, order and burstiness stay; all times are scaled by one factor.

        Parameters
        ----------
        rate_req_s : float
            Wanted mean rate in requests per second, > 0.

        Returns
        -------
        Workload
            With the same requests on another clock.

        Raises
        ------
        ConfigError
            When the rate is not a number > 0, or the workload is a closed loop or empty.

        Examples
        --------
        >>> w = make_workload("sharegpt", 10.0, 60.0, seed=0)
        >>> round(w.rescaled(20.0).rate_req_s, 9)
        20.0
        """
        positive("rate_req_s", rate_req_s)
        if self.concurrency is not None or not len(self):
            kind = "a closed loop" if self.concurrency is not None else "no requests"
            raise ConfigError(f"{self.name}: expected an arrival rate to rescale, got {kind}")
        factor = self.rate_req_s / rate_req_s
        return dataclasses.replace(
            self, arrival_s=self.arrival_s * factor, duration_s=self.duration_s * factor
        )

    def stepped(self, steps: RateSteps) -> Workload:
        """Run the clock so that requests arrive at the rates of `steps`.

        Lengths and order stay, and so does what is bursty beyond the steps.

        Parameters
        ----------
        steps : RateSteps
            Rates over time.

        Raises
        ------
        ConfigError
            When the workload is a closed loop or empty, or the steps end in a silence.

        Examples
        --------
        >>> w = make_workload("sharegpt", 10.0, 60.0, seed=0).stepped(RateSteps.parse("0:5,60:20"))
        >>> before, after = np.histogram(w.arrival_s, [0.0, 60.0, 75.0])[0]
        >>> bool(250 < before < 350), bool(250 < after < 350)
        (True, True)
        """
        if self.concurrency is not None or not len(self):
            kind = "a closed loop" if self.concurrency is not None else "no requests"
            raise ConfigError(f"{self.name}: expected arrival times to move, got {kind}")
        arrival_s, duration_s = steps.on_clock(self.arrival_s, self.rate_req_s, self.duration_s)
        return dataclasses.replace(self, arrival_s=arrival_s, duration_s=duration_s)

    def window(self, duration_s: float, *, start_s: float = 0.0) -> Workload:
        """Cut out the requests that arrive in ``[start_s, start_s + duration_s)``.

        The cut starts at time 0 again. `cached_tok` stays as it is: what arrived before the cut
        has warmed the cache. A closed loop has no clock and is returned as it is.

        Parameters
        ----------
        duration_s : float
            Length of the cut in seconds, > 0.
        start_s : float
            Its start in seconds, >= 0.

        Returns
        -------
        Workload
            With `duration_s` as asked.

        Raises
        ------
        ConfigError
            When the cut reaches beyond the workload.

        Examples
        --------
        >>> from voltana_ctrl.sim.workload import make_workload
        >>> w = make_workload("sharegpt", 10.0, 60.0, seed=0)
        >>> w.window(30.0).duration_s
        30.0
        """
        positive("duration_s", duration_s)
        not_negative("start_s", start_s)
        if self.concurrency is not None:
            return self
        end_s = start_s + duration_s
        if end_s > self.duration_s * _SPAN_SLACK:
            raise ConfigError(
                f"{self.name}: expected a window within its {self.duration_s:.6g} s, got"
                f" {start_s:.6g} to {end_s:.6g} s; shorten the run or lower the rate"
            )
        first, last = np.searchsorted(self.arrival_s, (start_s, end_s), side="left")
        cut, edges = slice(first, last), self.block_offset[first : last + 1]
        return dataclasses.replace(
            self,
            arrival_s=self.arrival_s[cut] - start_s,
            prompt_tok=self.prompt_tok[cut],
            output_tok=self.output_tok[cut],
            cached_tok=self.cached_tok[cut],
            request_class=self.request_class[cut],
            patience_s=self.patience_s[cut],
            block_id=self.block_id[edges[0] : edges[-1]],
            block_offset=edges - edges[0],
            duration_s=duration_s,
        )

    def closed_loop(self, concurrency: int) -> Workload:
        """Forget the arrival times: `concurrency` clients send these requests in order.

        Parameters
        ----------
        concurrency : int
            Number of clients, >= 1; each waits for its answer before it sends again.

        Returns
        -------
        Workload
            With zeros as arrival times and an infinite span.

        Raises
        ------
        ConfigError
            When `concurrency` is not a whole number >= 1.

        Examples
        --------
        >>> from voltana_ctrl.sim.workload import make_workload
        >>> make_workload("sharegpt", 10.0, 60.0, seed=0).closed_loop(32).concurrency
        32
        """
        return dataclasses.replace(
            self,
            arrival_s=np.zeros(len(self)),
            duration_s=math.inf,
            concurrency=concurrency,
        )

    def deferred(self, class_or_frac: float | str, deadline_s: float, *, seed: int = 0) -> Workload:
        """The same, in which some requests may wait.

        Parameters
        ----------
        class_or_frac : float or str
            Share of the requests, drawn at random (with the same seed a larger share holds every
            request of a smaller one), or the name of a class.
        deadline_s : float
            How long after their arrival they must have their answers, > 0.
        seed : int
            Seed of the draw, >= 0.

        Returns
        -------
        Workload
            With `patience_s` set for them.

        Raises
        ------
        ConfigError
            If the share is not within 0 and 1, there is no such class, or the deadline is not a
            number > 0.

        Examples
        --------
        >>> import numpy as np
        >>> from voltana_ctrl.sim.workload import make_workload
        >>> w = make_workload("sharegpt", 10.0, 60.0, seed=0).deferred(0.3, 1800.0)
        >>> bool(0.25 < np.isfinite(w.patience_s).mean() < 0.35)
        True
        """
        positive("defer: deadline", deadline_s)
        count("seed", seed, minimum=0)
        if isinstance(class_or_frac, str):
            if class_or_frac not in self.class_names:
                known = ", ".join(self.class_names) or "none"
                raise ConfigError(
                    f"defer: expected a share of the requests or a class of {self.name} ({known}),"
                    f" got {class_or_frac!r}"
                )
            chosen = self.request_class == self.class_names.index(class_or_frac)
        else:
            if not 0.0 <= class_or_frac <= 1.0:
                raise ConfigError(f"defer: expected a share from 0 to 1, got {class_or_frac!r}")
            # A stream of its own: who may wait does not change who comes.
            chosen = np.random.default_rng([seed, _WHO_WAITS]).random(len(self)) < class_or_frac
        return dataclasses.replace(self, patience_s=np.where(chosen, deadline_s, self.patience_s))

    def due_within(self, end_s: float, grace_s: float) -> Workload:
        """The same, with deadlines no later than `end_s` or `grace_s` after arrival, the later one.

        So a run cannot save energy by leaving work behind.

        Parameters
        ----------
        end_s : float
            Time in seconds by which what may wait is due.
        grace_s : float
            Time that every request has at least, in seconds, > 0.

        Returns
        -------
        Workload
            With shorter `patience_s`.
        """
        left_s = np.maximum(end_s - self.arrival_s, grace_s)
        waits = np.isfinite(self.patience_s)
        return dataclasses.replace(
            self, patience_s=np.where(waits, np.minimum(self.patience_s, left_s), np.inf)
        )

    def prefix_blocks(self, request: int) -> I64:
        """Prefix blocks of one request, for routers that ask which instance holds them.

        Parameters
        ----------
        request : int
            Index of the request, 0 to n - 1.

        Returns
        -------
        ndarray, shape (blocks,), int64
            Block ids in prompt order; empty where the source knows none.

        Examples
        --------
        >>> from voltana_ctrl.sim.workload import make_workload
        >>> make_workload("fixed", 10.0, 60.0, seed=0).prefix_blocks(0).size
        0
        """
        blocks: I64 = self.block_id[self.block_offset[request] : self.block_offset[request + 1]]
        return blocks

    def summary(self) -> dict[str, float]:
        """Describe the workload in a few numbers.

        Returns
        -------
        dict
            ``requests``, ``duration_s``, ``rate_req_s``, ``gap_cv`` (coefficient of variation of
            the gaps between arrivals), ``prompt_mean_tok``, ``output_mean_tok``, ``cached_frac``
            (of all prompt tokens) and ``dropped_rows``; NaN where there is nothing to average.

        Examples
        --------
        >>> from voltana_ctrl.sim.workload import make_workload
        >>> make_workload("fixed", 10.0, 60.0, seed=0).summary()["prompt_mean_tok"]
        512.0
        """
        n = len(self)
        gaps_s = np.diff(self.arrival_s)
        timed = gaps_s.size > 0 and bool(gaps_s.any())
        return {
            "requests": float(n),
            "duration_s": float(self.duration_s),
            "rate_req_s": self.rate_req_s,
            "gap_cv": float(gaps_s.std() / gaps_s.mean()) if timed else math.nan,
            "prompt_mean_tok": float(self.prompt_tok.mean()) if n else math.nan,
            "output_mean_tok": float(self.output_tok.mean()) if n else math.nan,
            "cached_frac": float(self.cached_tok.sum() / self.prompt_tok.sum()) if n else math.nan,
            "dropped_rows": float(self.dropped_rows),
        }


def make_workload(
    name: str,
    rate_req_s: float | None = None,
    duration_s: float = 150.0,
    seed: int = 0,
    *,
    arrivals: ArrivalProcess | None = None,
    rate_steps: RateSteps | None = None,
    prompt_tok: int = 512,
    output_tok: int = 128,
) -> Workload:
    """Generate one of the built-in workloads.

    Arrivals, prompt lengths and output lengths are drawn from three independent streams of one
    seed: request i has the same lengths at every rate and under every arrival process.

    Parameters
    ----------
    name : str
        One of :data:`WORKLOADS`: ``sharegpt`` (the reference scenario), ``lmsys``,
        ``azure-conv``, ``azure-code`` (bursts and silences), ``fixed`` (constant lengths).
    rate_req_s : float, optional
        Mean arrival rate in requests per second, > 0. By default the rate of the trace that the
        workload was fitted to (the ``azure-`` ones); the others need one.
    duration_s : float
        Span in seconds, > 0.
    seed : int
        Seed, >= 0; the same seed gives the same workload.
    arrivals : ArrivalProcess, optional
        Another arrival process than the workload's own.
    rate_steps : RateSteps, optional
        Rates over time, in place of one.
    prompt_tok, output_tok : int
        Lengths in tokens, >= 1; used by ``fixed`` alone.

    Returns
    -------
    Workload
        Possibly with no request at all, where the span falls into a silence.

    Raises
    ------
    ConfigError
        When the name is unknown, a number is out of range, or a rate is needed and not given.

    Examples
    --------
    >>> w = make_workload("sharegpt", rate_req_s=20.0, duration_s=600.0, seed=0)
    >>> bool(230 < w.prompt_tok.mean() < 250), bool(195 < w.output_tok.mean() < 212)
    (True, True)
    """
    kind = describe(name, prompt_tok=prompt_tok, output_tok=output_tok)
    arrival_rng, prompt_rng, output_rng = _streams(seed)
    if rate_steps is not None:
        arrival_s = rate_steps.sample(
            lambda rate: arrivals or kind.arrivals(rate), duration_s, arrival_rng
        )
    else:
        if rate_req_s is None:
            rate_req_s = kind.rate_req_s
        if rate_req_s is None:
            raise ConfigError(
                f"{name}: expected a rate_req_s, got none; this workload has no own rate"
            )
        arrivals = arrivals or kind.arrivals(rate_req_s)
        arrival_s = arrivals.sample(rate_req_s, duration_s, arrival_rng)
    return Workload(
        name=name,
        arrival_s=arrival_s,
        prompt_tok=kind.prompt.sample(prompt_rng, arrival_s.size),
        output_tok=kind.output.sample(output_rng, arrival_s.size),
        duration_s=duration_s,
        source=f"{kind.status}: {kind.source}",
    )


def make_closed_loop(
    name: str,
    concurrency: int,
    requests: int,
    seed: int = 0,
    *,
    prompt_tok: int = 512,
    output_tok: int = 128,
) -> Workload:
    """Generate the requests of a closed loop: lengths without arrival times.

    Parameters
    ----------
    name : str
        One of :data:`WORKLOADS`.
    concurrency : int
        Number of clients, >= 1; each waits for its answer before it sends again.
    requests : int
        Requests to draw, >= 1; take more than the run can serve.
    seed : int
        Seed, >= 0. Lengths equal those of :func:`make_workload` with this seed.
    prompt_tok, output_tok : int
        Lengths in tokens, >= 1; used by ``fixed`` alone.

    Returns
    -------
    Workload
        With `concurrency` set.

    Raises
    ------
    ConfigError
        When the name is unknown, or a number is out of range.

    Examples
    --------
    >>> w = make_closed_loop("lmsys", concurrency=64, requests=1000, seed=0)
    >>> len(w), w.concurrency
    (1000, 64)
    """
    count("requests", requests)
    kind = describe(name, prompt_tok=prompt_tok, output_tok=output_tok)
    _, prompt_rng, output_rng = _streams(seed)
    return Workload(
        name=name,
        arrival_s=np.zeros(requests),
        prompt_tok=kind.prompt.sample(prompt_rng, requests),
        output_tok=kind.output.sample(output_rng, requests),
        duration_s=math.inf,
        concurrency=concurrency,
        source=f"{kind.status}: {kind.source}",
    )


def _streams(seed: int) -> list[np.random.Generator]:
    count("seed", seed, minimum=0)
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
