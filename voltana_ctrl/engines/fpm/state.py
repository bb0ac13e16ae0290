"""State of one scheduler, concluded from its forward-pass messages one after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.waiting_line import WaitingLine

__all__ = ["RankState"]

# An engine also beats while a long iteration runs; work that was queued is still there then. So
# long at least, and as long as its profile gives to a prefill of all that it holds.
_LONG_ITERATION_S = 10.0


class RankState:
    """Queue, batch and KV cache of one data-parallel rank, and what arrived at it.

    Messages tell what an iteration did and what waited after it. Arrivals follow by balance;
    on a decode instance, where requests leave unseen, they are a lower bound. The age of the
    queue follows because it is served in order: what waits are the latest arrivals.

    Parameters
    ----------
    prefills, decodes : bool
        Whether its instance prefills, and whether it decodes.
    budget_tok : float
        Tokens of its largest iteration; a prompt is cut where an iteration is full.
    longest_s : callable, optional
        Returns the seconds that an iteration may take that prefills a given number of tokens.

    Examples
    --------
    >>> from voltana_ctrl.engines.fpm.messages import ForwardPass
    >>> rank = RankState(prefills=True, decodes=False)
    >>> rank.take(ForwardPass(wall_s=0.1, prefill_req=1.0, prefill_tok=500.0,
    ...                       queued_prefill_req=2.0, queued_prefill_tok=900.0), t_s=1.0)
    >>> rank.queue_tok, rank.arrived_req, rank.arrived_tok, rank.oldest_wait_s(1.5)
    (900.0, 3.0, 1400.0, 0.5)
    """

    def __init__(
        self,
        *,
        prefills: bool,
        decodes: bool,
        budget_tok: float = np.inf,
        longest_s: Callable[[float], float] = lambda _: 0.0,
    ) -> None:
        self._longest_s = longest_s
        self.prefills, self.decodes = prefills, decodes
        self.last: ForwardPass | None = None
        self.now = ForwardPass()
        self.seen_s = self.worked_s = 0.0
        self.arrived_req = self.arrived_tok = 0.0
        self._partial_tok = 0.0
        self._budget_tok = budget_tok
        self._line = WaitingLine()

    def missing(self, one: ForwardPass) -> int:
        """Number of messages lost before this one; -1 where the engine counts anew."""
        last = self.last
        if last is None or one.number == last.number == 0:  # the first, or never numbered
            return 0
        if one.worker_id != last.worker_id or one.number <= last.number:
            return -1
        return one.number - last.number - 1

    def take(self, one: ForwardPass, t_s: float) -> None:
        """Follow one message.

        Parameters
        ----------
        one : ForwardPass
            The message.
        t_s : float
            Time at which it came, in seconds.
        """
        self.last, self.seen_s = one, t_s
        if one.is_heartbeat:
            queued = self.now.queued_prefill_req + self.now.queued_decode_req
            if queued > 0.0 and t_s - self.worked_s < self._long_s():
                return
        else:
            self.worked_s = t_s
        before, self.now = self.now, one
        arrived_tok = self._count_prompts(before, one) if self.prefills else 0.0
        if not self.prefills:
            self._count_decodes(before, one)
        self._line.follow(t_s, waiting_tok=self.waiting_tok, arrived_tok=arrived_tok)

    def _long_s(self) -> float:
        held_tok = self.now.queued_prefill_tok + self.now.prefill_tok + self.now.prefill_kv_tok
        return max(_LONG_ITERATION_S, self._longest_s(held_tok))

    def _count_prompts(self, before: ForwardPass, one: ForwardPass) -> float:
        """Arrivals by balance: what is queued and computed now, less what was queued before.

        A prompt that is prefilled in parts has left the queue with its first part; the rest
        of it is remembered, so that it does not count as an arrival. Of a prompt that never
        queued the rest is not known: only an iteration that was full may have left one.
        """
        full = before.prefill_tok + before.decode_req >= self._budget_tok
        left_tok = before.queued_prefill_tok - one.queued_prefill_tok
        unseen = full and one.prefill_kv_tok > 0.0
        continued = one.prefill_req > 0.0 and (self._partial_tok > 0.0 or unseen)
        rest_tok = self._partial_tok if continued else 0.0
        # KV read for a first part is a cached prefix; for a later part it is the earlier ones.
        done_tok = one.prefill_tok + (0.0 if continued else one.prefill_kv_tok)
        balance_tok = done_tok - rest_tok - left_tok
        self._partial_tok = max(0.0, -balance_tok) if one.prefill_req > 0.0 else 0.0
        self.arrived_tok += max(0.0, balance_tok)
        self.arrived_req += max(
            0.0,
            one.queued_prefill_req + one.prefill_req - continued - before.queued_prefill_req,
        )
        # What may be the unseen rest of a prompt stands behind nobody.
        return 0.0 if continued else max(0.0, balance_tok)

    def _count_decodes(self, before: ForwardPass, one: ForwardPass) -> None:
        """Arrivals of prefilled requests: at least by how many there are more."""
        grown_tok = _held_tok(one) - _held_tok(before) - before.decode_req
        self.arrived_req += max(0.0, _held_req(one) - _held_req(before))
        self.arrived_tok += max(0.0, grown_tok)

    def oldest_wait_s(self, t_s: float) -> float:
        """Seconds that the oldest in the queue has waited at the time `t_s`; 0 without a queue."""
        return self._line.oldest_s(t_s)

    @property
    def waiting_tok(self) -> float:
        """Tokens in the queue whose age counts: prompts, or on decode KV that has arrived."""
        return self.now.queued_prefill_tok if self.prefills else self.now.queued_decode_kv_tok

    @property
    def queue_req(self) -> float:
        """Requests that wait, for prefill or with KV for decode."""
        return self.now.queued_prefill_req + self.now.queued_decode_req

    @property
    def queue_tok(self) -> float:
        """Prompt tokens that wait, and KV tokens of requests that wait for decode."""
        return self.now.queued_prefill_tok + self.now.queued_decode_kv_tok

    @property
    def running_req(self) -> float:
        """Requests that generate, those that have just been prefilled included."""
        return self.now.decode_req + (self.now.prefill_req if self.decodes else 0.0)

    @property
    def kv_used_tok(self) -> float:
        """Tokens in the KV cache of running requests."""
        return self.now.decode_kv_tok + self.now.prefill_kv_tok + self.now.prefill_tok


def _held_req(one: ForwardPass) -> float:
    return one.decode_req + one.prefill_req + one.queued_decode_req


def _held_tok(one: ForwardPass) -> float:
    return one.decode_kv_tok + one.prefill_kv_tok + one.prefill_tok + one.queued_decode_kv_tok
