"""What users saw, where no router of ours tells: TTFT and ITL from the histograms of engines.

A histogram says how many requests ended between two edges, not when each did. A request counts as
if it had taken the upper edge of its bucket: where the promise lies inside of one, misses are
counted from its lower edge on, and nobody is told better than it was. An engine's TTFT leaves out
what happens before and after it, the router and, of prefill and decode apart, the hand-off.

Prefill and decode engines know one half each of a request. :class:`HalvesPaired` puts halves
together in the order in which they come, so that every finished request counts once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.types import RequestBatch, Slo

__all__ = ["HalvesPaired", "Histogram", "LatencyDeltas", "judged_edge_s"]

_MOST_PENDING = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """A histogram as a page has it, since the engine's start.

    Parameters
    ----------
    edges_s : tuple of float
        Upper edges of the buckets in seconds, ascending; the last is infinite.
    counts : tuple of float
        How many values lie at or below each edge, as Prometheus counts; so the last is all.
    total_s : float
        Sum of all values in seconds.

    Examples
    --------
    >>> Histogram(edges_s=(0.1, float("inf")), counts=(3.0, 4.0), total_s=0.5).counts[-1]
    4.0
    """

    edges_s: tuple[float, ...]
    counts: tuple[float, ...]
    total_s: float

    def since(self, before: Histogram | None) -> list[tuple[float, int]]:
        """How many values each bucket has got since an earlier page.

        Parameters
        ----------
        before : Histogram, optional
            The same histogram on an earlier page.

        Returns
        -------
        list of (edge_s, count)
            Upper edge in seconds and number of values, for buckets that got some. Twice the last
            finite edge stands for what lies beyond it. Empty where there is no earlier page, the
            edges are others, or a count fell because the engine has started anew.

        Examples
        --------
        >>> edges = (0.1, 0.2, float("inf"))
        >>> first = Histogram(edges_s=edges, counts=(1.0, 1.0, 1.0), total_s=0.1)
        >>> Histogram(edges_s=edges, counts=(2.0, 3.0, 4.0), total_s=1.0).since(first)
        [(0.1, 1), (0.2, 1), (0.4, 1)]
        """
        if before is None or before.edges_s != self.edges_s:
            return []
        grown = np.diff(np.subtract(self.counts, before.counts), prepend=0.0)
        if (grown < 0.0).any():
            return []
        finite = [edge for edge in self.edges_s if math.isfinite(edge)]
        beyond_s = 2.0 * finite[-1] if finite else 0.0
        return [
            (edge if math.isfinite(edge) else beyond_s, round(float(more)))
            for edge, more in zip(self.edges_s, grown, strict=True)
            if more >= 1.0
        ]


def judged_edge_s(histogram: Histogram, promised_s: float) -> float:
    """Longest time that a histogram can show to be within a promise.

    Parameters
    ----------
    histogram : Histogram
        TTFT or ITL of an engine.
    promised_s : float
        The promise in seconds.

    Returns
    -------
    float
        The highest edge at or below the promise, in seconds; 0 if there is none. A request whose
        bucket ends above it counts as missed, one whose bucket ends there as kept.

    Examples
    --------
    >>> told = Histogram(edges_s=(0.05, 0.075, float("inf")), counts=(1.0, 1.0, 1.0), total_s=0.1)
    >>> judged_edge_s(told, 0.06)
    0.05
    """
    return max((edge for edge in histogram.edges_s if edge <= promised_s), default=0.0)


class LatencyDeltas:
    """Requests of one engine that ended between pages, as halves of finished requests.

    Parameters
    ----------
    prefills, decodes : bool
        Whether TTFT and whether ITL of its instance count: by what its role does.

    Examples
    --------
    >>> deltas = LatencyDeltas(prefills=True, decodes=True)
    >>> edges = (0.1, float("inf"))
    >>> for n in (1.0, 3.0):
    ...     told = Histogram(edges_s=edges, counts=(n, n), total_s=0.05 * n)
    ...     deltas.take({"ttft": told, "itl": told}, {"finished_req": n})
    >>> batch = deltas.finished(0)
    >>> batch.ttft_s[batch.prefill_instance >= 0], batch.itl_s[batch.decode_instance >= 0]
    (array([0.1, 0.1]), array([0.1, 0.1]))
    """

    def __init__(self, *, prefills: bool, decodes: bool) -> None:
        self._prefills, self._decodes = prefills, decodes
        self.latest: dict[str, Histogram] = {}
        self._finished_req = math.nan
        self._lengths_tok = (1.0, 1.0)
        self._ttft_s: deque[float] = deque(maxlen=_MOST_PENDING)
        self._itl_s: deque[float] = deque(maxlen=_MOST_PENDING)

    def take(self, told: Mapping[str, Histogram], page: Mapping[str, float]) -> None:
        """Follow one page.

        Parameters
        ----------
        told : mapping of str to Histogram
            ``ttft``; ``itl``, of requests; ``token_itl``, of tokens, which counts where there is
            no other: the mean gap then stands for every request that finished.
        page : mapping of str to float
            Other numbers of the page: ``finished_req``, ``prompt_tok`` and ``output_tok`` count.
        """
        finished_req = page.get("finished_req", math.nan)
        if finished_req > 0.0:
            self._lengths_tok = (
                max(1.0, page.get("prompt_tok", 1.0) / finished_req),
                max(1.0, page.get("output_tok", 1.0) / finished_req),
            )
        if self._prefills and "ttft" in told:
            self._add(self._ttft_s, told["ttft"].since(self.latest.get("ttft")))
        if self._decodes and "itl" in told:
            self._add(self._itl_s, told["itl"].since(self.latest.get("itl")))
        elif self._decodes and "token_itl" in told:
            more_req = finished_req - self._finished_req
            gap_s = _mean_gap_s(told["token_itl"], self.latest.get("token_itl"))
            if gap_s is not None and more_req >= 1.0:
                self._add(self._itl_s, [(gap_s, round(more_req))])
        self._finished_req = finished_req
        self.latest = dict(told)

    @staticmethod
    def _add(pending: deque[float], more: list[tuple[float, int]]) -> None:
        for value_s, count in more:
            pending.extend([value_s] * min(count, _MOST_PENDING))

    def finished(self, instance: int) -> RequestBatch:
        """Halves of requests since the last call.

        Parameters
        ----------
        instance : int
            Index of the engine in the fleet.

        Returns
        -------
        RequestBatch
            First the halves with a TTFT, whose `decode_instance` is -1, then those with an ITL,
            whose `prefill_instance` is -1. What a half does not know is 0; lengths are the mean of
            all requests since the engine's start.
        """
        ttft_s, itl_s = list(self._ttft_s), list(self._itl_s)
        self._ttft_s.clear()
        self._itl_s.clear()
        k, m = len(ttft_s), len(itl_s)
        prompt_tok, output_tok = self._lengths_tok
        return RequestBatch(
            request=np.zeros(k + m, np.int64),
            request_class=np.zeros(k + m, np.int64),
            prompt_tok=np.full(k + m, prompt_tok),
            output_tok=np.array([1.0] * k + [output_tok] * m),
            ttft_s=np.array(ttft_s + [0.0] * m),
            itl_s=np.array([0.0] * k + itl_s),
            prefill_instance=np.array([instance] * k + [-1] * m),
            decode_instance=np.array([-1] * k + [instance] * m),
        )

    def edges(self, slo: Slo) -> dict[str, float]:
        """Longest times that still count as kept, see :func:`judged_edge_s`.

        Parameters
        ----------
        slo : Slo
            The promises.

        Returns
        -------
        dict of str to float
            ``ttft`` and ``itl`` in seconds; without those whose histogram no page has shown.
        """
        return {
            name: judged_edge_s(self.latest[name], promised_s)
            for name, promised_s, asked in (
                ("ttft", slo.ttft_s, self._prefills), ("itl", slo.itl_s, self._decodes)
            )
            if asked and name in self.latest
        }  # fmt: skip


def _mean_gap_s(now: Histogram, before: Histogram | None) -> float | None:
    if before is None:
        return None
    more, total_s = now.counts[-1] - before.counts[-1], now.total_s - before.total_s
    return total_s / more if more >= 1.0 and total_s >= 0.0 else None


class HalvesPaired:
    """Puts halves of finished requests together, in the order in which they come.

    A half that finds no other within `wait_s` is told alone: where engines of one phase have no
    histograms, those of the other still count.

    Parameters
    ----------
    wait_s : float
        Seconds that a half waits for its other.

    Raises
    ------
    ConfigError
        If that is not positive.

    Examples
    --------
    >>> deltas = LatencyDeltas(prefills=True, decodes=True)
    >>> edges = (0.1, float("inf"))
    >>> for n in (1.0, 3.0):
    ...     told = Histogram(edges_s=edges, counts=(n, n), total_s=0.05 * n)
    ...     deltas.take({"ttft": told, "itl": told}, {"finished_req": n})
    >>> whole = HalvesPaired().whole(0.0, deltas.finished(0))
    >>> len(whole), whole.ttft_s, whole.itl_s
    (2, array([0.1, 0.1]), array([0.1, 0.1]))
    """

    def __init__(self, *, wait_s: float = 10.0) -> None:
        positive("HalvesPaired.wait_s", wait_s)
        self._wait_s = wait_s
        self._waiting: tuple[deque[_Half], deque[_Half]] = (
            deque(maxlen=_MOST_PENDING), deque(maxlen=_MOST_PENDING),
        )  # fmt: skip

    def whole(self, t_s: float, finished: RequestBatch) -> RequestBatch:
        """Take whole requests and halves in, and hand out what is done.

        Parameters
        ----------
        t_s : float
            Time now, in seconds; the same clock at every call.
        finished : RequestBatch
            Whole requests, and halves as :meth:`LatencyDeltas.finished` makes them.

        Returns
        -------
        RequestBatch
            Requests that came whole, then pairs of halves, then halves that waited too long.
        """
        half = (finished.prefill_instance < 0) != (finished.decode_instance < 0)
        first, second = self._waiting
        if not (half.any() or first or second):
            return finished
        rows = {name: getattr(finished, name) for name in RequestBatch.__slots__}
        for k in np.flatnonzero(half):
            row = {name: float(column[k]) for name, column in rows.items()}
            (second if row["prefill_instance"] < 0 else first).append((t_s, row))
        made = []
        while first and second:
            made.append({**second.popleft()[1], **_of_prefill(first.popleft()[1])})
        for waiting in (first, second):
            while waiting and t_s - waiting[0][0] > self._wait_s:
                made.append(waiting.popleft()[1])
        return RequestBatch(
            **{
                name: np.append(column[~half], [one[name] for one in made])
                for name, column in rows.items()
            }
        )


#: When a half came, and its row.
_Half = tuple[float, dict[str, float]]


def _of_prefill(row: Mapping[str, float]) -> dict[str, float]:
    return {name: row[name] for name in ("ttft_s", "prefill_instance", "prompt_tok")}
