"""How long the oldest in a queue has waited, where only its length is told."""

from __future__ import annotations

from collections import deque

__all__ = ["WaitingLine"]

_MAX_PARTS = 1024


class WaitingLine:
    """First come, first served: what waits are the latest arrivals.

    Amounts are of any unit (requests, tokens). Memory is bounded: in a long line neighbours
    are counted as the older one.

    Examples
    --------
    >>> line = WaitingLine()
    >>> line.follow(1.0, waiting_tok=3.0, arrived_tok=3.0)
    >>> line.follow(2.0, waiting_tok=2.0, arrived_tok=1.0)  # two were served, one came
    >>> line.oldest_s(5.0)
    4.0
    >>> line.follow(3.0, waiting_tok=1.0, arrived_tok=0.0)  # the two of the first second are gone
    >>> line.oldest_s(5.0)
    3.0
    """

    def __init__(self) -> None:
        self._parts: deque[tuple[float, float]] = deque()

    def follow(self, t_s: float, *, waiting_tok: float, arrived_tok: float) -> None:
        """Take what waits now and what came since the last call.

        Parameters
        ----------
        t_s : float
            Time now, in seconds.
        waiting_tok, arrived_tok : float
            Tokens, or requests where only they are told; more waiting than is accounted for
            counts as arrived.
        """
        known = sum(part for _, part in self._parts) + arrived_tok
        new = arrived_tok + max(0.0, waiting_tok - known)
        if new > 0.0:
            if len(self._parts) == _MAX_PARTS:
                last_s, last = self._parts.pop()
                self._parts.append((last_s, last + new))
            else:
                self._parts.append((t_s, new))
        served = max(0.0, known - waiting_tok)
        while self._parts and served > 0.0:
            since_s, part = self._parts.popleft()
            if part > served:
                self._parts.appendleft((since_s, part - served))
            served -= part
        if waiting_tok == 0.0:
            self._parts.clear()  # what rounding left

    def oldest_s(self, t_s: float) -> float:
        """Seconds that the oldest has waited; 0 where nobody waits.

        Parameters
        ----------
        t_s : float
            Time now, in seconds.
        """
        return max(0.0, t_s - self._parts[0][0]) if self._parts else 0.0
