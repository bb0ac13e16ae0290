"""What a router knows of requests and no engine tells: where they went, how they ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from voltana_ctrl.checks import F64, count
from voltana_ctrl.types import RequestBatch

__all__ = ["FinishedRequest", "Traffic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """One request that has ended well; for its fields see :class:`voltana_ctrl.types.RequestBatch`.

    Parameters
    ----------
    request, request_class : int
        Number that the router gave it, and its class.
    prompt_tok, output_tok : float
        Tokens of its prompt and of its answer.
    ttft_s, itl_s : float
        Seconds to its first token; mean seconds between its tokens.
    prefill_instance, decode_instance : int
        Indices of the instances where it ran.

    Examples
    --------
    >>> FinishedRequest(request=1, prompt_tok=100, output_tok=9, ttft_s=0.2, itl_s=0.03,
    ...                 prefill_instance=0, decode_instance=2).request_class
    0
    """

    request: int
    prompt_tok: float
    output_tok: float
    ttft_s: float
    itl_s: float
    prefill_instance: int
    decode_instance: int
    request_class: int = 0


class Traffic:
    """Counts of a router, handed to an :class:`EngineBackend`; any thread may call it.

    Parameters
    ----------
    n : int
        Number of instances of the fleet.
    keep : int
        Finished requests kept until they are read; older ones are dropped.

    Examples
    --------
    >>> traffic = Traffic(2)
    >>> traffic.routed(0, prompt_tok=300)
    >>> arrived_req, arrived_tok, finished = traffic.read()
    >>> arrived_req, arrived_tok, len(finished)
    (array([1., 0.]), array([300.,   0.]), 0)
    """

    def __init__(self, n: int, *, keep: int = 65_536) -> None:
        count("Traffic.n", n)
        count("Traffic.keep", keep)
        self._lock = threading.Lock()
        self._arrived = np.zeros((2, n))
        self._finished: deque[FinishedRequest] = deque(maxlen=keep)

    def routed(self, instance: int, *, prompt_tok: float) -> None:
        """Note that a request was sent to an instance; for prefill and decode each.

        Parameters
        ----------
        instance : int
            Index in the fleet.
        prompt_tok : float
            Tokens of its prompt.
        """
        with self._lock:
            self._arrived[:, instance] += (1.0, prompt_tok)

    def finished(self, one: FinishedRequest) -> None:
        """Note that a request has ended.

        Parameters
        ----------
        one : FinishedRequest
            The request.
        """
        with self._lock:
            self._finished.append(one)

    def read(self) -> tuple[F64, F64, RequestBatch]:
        """Take out what happened since the last read.

        Returns
        -------
        arrived_req, arrived_tok : ndarray, shape (n,)
            Requests that were sent to each instance, and tokens of their prompts.
        finished : RequestBatch
            Requests that have ended well.
        """
        with self._lock:
            (arrived_req, arrived_tok), self._arrived = self._arrived, self._arrived * 0.0
            ended = list(self._finished)
            self._finished.clear()
        return arrived_req, arrived_tok, _batch(ended)


def _batch(ended: Sequence[FinishedRequest]) -> RequestBatch:
    if not ended:
        return RequestBatch.empty()
    columns = {
        field.name: np.array([getattr(one, field.name) for one in ended])
        for field in fields(FinishedRequest)
    }
    return RequestBatch(**columns)
