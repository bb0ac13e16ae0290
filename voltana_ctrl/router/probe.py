"""Engines are asked whether they live, so that a death is known before a request meets it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.router.messages import UpstreamFailed
from voltana_ctrl.router.upstream import Upstream

__all__ = ["Prober"]

_LOG = logging.getLogger(__name__)
# Some engines generate a token to answer, behind whatever they compute at the moment.
_ANSWER_S = 20.0
_AFTER_FAILURE_S = 1.0
# Probes in a row that no packet answered, after which nothing is waited for any longer.
_GONE_AFTER = 2


class Prober:
    """Asks each engine for ``/health``: at the start, then slowly, quicker after a failure.

    Any answer but 5xx is life, since not every engine has the page. An engine that does not
    answer in time is taken for gone only if no token of it came meanwhile, either. Where no
    packet comes back at all, twice in a row, its machine or the network to it is lost without a
    word, and what waits there for its first token is sent to another.

    Parameters
    ----------
    upstream : Upstream
        The engines.
    counts : InFlight
        Told which instances failed and which are back.
    every_s : float
        Seconds between two probes while all is well; at most 1 s after a failure.
    told : callable, optional
        Called with the index of the instance at each probe that failed.

    Examples
    --------
    >>> callable(Prober.run)
    True
    """

    def __init__(
        self,
        upstream: Upstream,
        counts: InFlight,
        *,
        every_s: float = 5.0,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self._upstream, self._counts = upstream, counts
        self._every_s, self._told = every_s, told

    async def run(self) -> None:
        """Ask until cancelled."""
        groups: dict[str, list[int]] = {}
        for i, endpoint in enumerate(self._upstream.endpoints):
            groups.setdefault(endpoint.url, []).append(i)
        await asyncio.gather(*(self._watch(instances) for instances in groups.values()))

    async def _watch(self, instances: list[int]) -> None:
        """Ask one address, behind which there may be several workers."""
        unanswered = 0
        while True:
            unanswered = 0 if await self._ask(instances) else unanswered + 1
            if unanswered >= _GONE_AFTER:
                for i in instances:
                    self._counts.abandon(i)
            failing = any(self._counts.failures(i) for i in instances)
            await asyncio.sleep(min(self._every_s, _AFTER_FAILURE_S) if failing else self._every_s)

    async def _ask(self, instances: list[int]) -> bool:
        """Whether a packet came back."""
        begin_s = self._counts.clock()
        try:
            await self._upstream.get(instances[0], "/health", limit_s=_ANSWER_S)
        except UpstreamFailed as failed:
            heard = [i for i in instances if self._counts.heard_s(i) > begin_s]
            if heard and failed.is_late:
                return True
            for i in instances:
                if not self._counts.is_down(i):
                    _LOG.warning("asked for its health, %s", failed)
                # It must not be trusted while it is being asked once more.
                self._counts.failed(i, at_least_s=(_ANSWER_S + 5.0) * failed.is_late)
                if self._told is not None:
                    self._told(i)
            return not failed.is_unreachable
        else:
            for i in instances:
                self._counts.succeeded(i)
            return True
