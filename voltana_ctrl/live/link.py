"""A node's end of the line to its controller, and what the node does when it goes dead."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.live.orders import (
    MAX_BYTES,
    MessageRefused,
    NodeOrder,
    NodeReport,
    decode_order,
    encode_report,
)
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    RequestBatch,
)

__all__ = ["ControllerLink", "RemoteController", "RemoteMemory"]

_log = logging.getLogger(__name__)

_MOST_BATCHES = 200


class ControllerLink:
    """Sends reports and receives orders, in a thread of its own.

    Parameters
    ----------
    url : str
        The controller, such as ``http://10.0.0.1:8791``.
    token : str
        Its bearer token.
    fleet : FleetSpec
        The whole fleet.
    node : str
        Name of this node.
    ids : sequence of str
        Its instances.
    limit_s : float
        How long an answer may take.
    hold_s : float
        Longest that an order holds without a newer one, whatever it says.
    now_s : callable
        Time that never goes back.

    Raises
    ------
    ConfigError
        If httpx is not installed, the URL is none, or an instance is not of the fleet.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> with ControllerLink("http://127.0.0.1:9", "0123456789abcdef", fleet, "n0",
    ...                     ["decode-0"]) as link:
    ...     link.order() is None
    True
    """

    def __init__(
        self,
        url: str,
        token: str,
        fleet: FleetSpec,
        node: str,
        ids: Sequence[str],
        *,
        limit_s: float = 0.5,
        hold_s: float = 1.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("ControllerLink.limit_s", limit_s)
        positive("ControllerLink.hold_s", hold_s)
        strange = sorted(set(ids) - set(fleet.ids))
        if strange or not ids:
            raise ConfigError(
                f"ControllerLink.ids: expected instances of {', '.join(fleet.ids)}, got"
                f" {strange[0] if strange else 'none'!r}"
            )
        try:
            import httpx
        except ImportError as error:
            raise ConfigError(
                "controller: httpx is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        self._errors = (httpx.HTTPError, httpx.InvalidURL)
        try:
            self._client = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {token}"},
                timeout=limit_s,
                trust_env=False,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(
                f"controller: expected http://HOST:PORT, got {url!r}: {error}"
            ) from error
        self._fleet, self._node, self._ids = fleet, node, tuple(ids)
        self._where = [fleet.ids.index(name) for name in ids]
        self._hold_s, self._now_s = hold_s, now_s
        self.failure: str | None = None
        self._number = 0
        self._pending: list[Observation] = []
        self._received: tuple[NodeOrder, float] | None = None
        self._lock = threading.Lock()
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="voltana-ctrl-link", daemon=True)
        self._thread.start()

    def tell(self, observation: Observation) -> None:
        """Report this as soon as the line is free; returns at once.

        Parameters
        ----------
        observation : Observation
            Of the whole fleet; only this node's part is sent.
        """
        with self._lock:
            self._pending = [*self._pending[-_MOST_BATCHES:], observation]
        self._news.set()

    def order(self) -> NodeOrder | None:
        """The order in force; None where there is none, or none any more."""
        received = self._received
        if received is None:
            return None
        order, from_s = received
        held_s = self._now_s() - from_s
        return order if 0.0 <= held_s <= min(order.valid_s, self._hold_s) else None

    def _run(self) -> None:
        while not self._closed.is_set():
            self._news.wait()
            self._news.clear()
            with self._lock:
                pending, self._pending = self._pending, []
            if pending and not self._closed.is_set() and not self._reported(pending):
                with self._lock:  # what happened is told with the next report
                    self._pending = [*pending, *self._pending][-_MOST_BATCHES:]
                self._closed.wait(0.1)

    def _reported(self, pending: Sequence[Observation]) -> bool:
        """Report once; whatever goes wrong with it, the line stays open for the next."""
        try:
            return self._report(pending)
        except Exception as error:  # noqa: BLE001  the next report may well be heard
            self.failure = f"controller: {type(error).__name__}: {error}"
            _log.exception("voltana-ctrl: a report to the controller failed")
            return True  # the same report would fail again

    def _report(self, pending: Sequence[Observation]) -> bool:
        sent_s = self._now_s()
        try:
            report = NodeReport(
                node=self._node,
                number=self._number,
                ids=self._ids,
                observation=_part(pending, self._where),
            )
            self._number += 1
            answer = self._client.post(
                "/v1/report",
                content=encode_report(report, self._fleet),
                headers={"Content-Type": "application/json"},
            )
            if answer.status_code == 503:
                self.failure = f"controller: {answer.text[:200]}"
                return True  # it took the report, and has no order
            if answer.status_code != 200:
                self.failure = f"controller: status {answer.status_code}: {answer.text[:200]}"
                return False
            if len(answer.content) > MAX_BYTES:
                raise MessageRefused("the answer is too long")
            order = decode_order(answer.content, self._fleet)
            if set(order.freq_mhz) != set(self._ids):
                raise MessageRefused("the order is for other instances")
        except MessageRefused as error:
            self.failure = f"controller: {error}"
            return True  # the same report would be refused again
        except self._errors as error:
            self.failure = f"controller: {type(error).__name__}: {error}"
            return False
        self.failure = None
        # From when it was asked for: what the answer was made of is no younger.
        self._received = (order, sent_s)
        return True

    def close(self) -> None:
        """Hang up; may be called twice."""
        self._closed.set()
        self._news.set()
        self._thread.join(5.0)
        self._client.close()

    def __enter__(self) -> ControllerLink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _part(pending: Sequence[Observation], where: Sequence[int]) -> Observation:
    """Latest state of this node's instances, and all that happened to them."""
    state = pending[-1].state
    columns: dict[str, Any] = {
        name: getattr(state, name)[where] for name in FleetState.__slots__ if name != "t_s"
    }
    for name in ("arrived_req", "arrived_tok"):
        columns[name] = np.sum([getattr(one.state, name)[where] for one in pending], axis=0)
    iterations = [one.iterations for one in pending if len(one.iterations)]
    finished = [one.finished for one in pending if len(one.finished)]
    return Observation(
        state=FleetState(t_s=state.t_s, **columns),
        iterations=_rows(IterationBatch, iterations, where, ("instance",)),
        finished=_rows(RequestBatch, finished, where, ("prefill_instance", "decode_instance")),
    )


def _rows(kind: Any, batches: Sequence[Any], where: Sequence[int], names: Sequence[str]) -> Any:
    """Rows of all batches that concern these instances, and hold numbers only."""
    if not batches:
        return kind.empty()
    columns = {
        name: np.concatenate([getattr(one, name) for one in batches]) for name in kind.__slots__
    }
    ours = np.any([np.isin(columns[name], where) for name in names], axis=0)
    for column in columns.values():
        ours &= np.isfinite(column)
    return kind(**{name: column[ours][-5000:] for name, column in columns.items()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemoteMemory:
    """What the node remembers of its controller.

    Parameters
    ----------
    ceiling_mhz : ndarray, shape (n,)
        Ceilings of the last valid order; the highest clocks before the first.
    gone : bool
        Whether there is no order in force.

    Examples
    --------
    >>> RemoteMemory(ceiling_mhz=np.ones(2), gone=True).gone
    True
    """

    ceiling_mhz: F64
    gone: bool


class RemoteController(Controller):
    """Does what a controller elsewhere says; without it, the highest clock under its ceiling.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    link : ControllerLink
        The line to it.
    period_s : float
        Time between decisions.

    Raises
    ------
    ConfigError
        If the period is longer than 0.5 s, and a dead controller would be noticed too late.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> class Dead:
    ...     def tell(self, observation): pass
    ...     def order(self): return None
    >>> controller = RemoteController(fleet, Dead())
    >>> seen = Observation(state=FleetState.idle(2))
    >>> controller.decide(seen, controller.init())[0].freq_mhz
    array([1410., 1410.])
    """

    def __init__(self, fleet: FleetSpec, link: ControllerLink, *, period_s: float = 0.1) -> None:
        super().__init__(fleet, period_s=period_s)
        if period_s > 0.5:
            raise ConfigError(
                f"RemoteController.period_s: expected at most 0.5 s, got {period_s:g}; a node"
                " must notice within 2 s that its controller is gone"
            )
        self._link = link

    def init(self) -> RemoteMemory:
        """No order yet."""
        return RemoteMemory(ceiling_mhz=self.fleet.max_mhz, gone=True)

    def notes(self, memory: RemoteMemory) -> Mapping[str, float]:
        """Whether the controller is gone.

        Parameters
        ----------
        memory : RemoteMemory
            Of the latest tick.
        """
        return {"controller_gone": float(memory.gone)}

    def _decide(
        self, observation: Observation, memory: RemoteMemory
    ) -> tuple[Decision, RemoteMemory]:
        self._link.tell(observation)
        order, t_s = self._link.order(), observation.state.t_s
        if order is None:
            highest = Decision.highest(self.fleet, t_s=t_s, ceiling_mhz=memory.ceiling_mhz)
            return highest, replace(memory, gone=True)
        floor, ceiling = np.array(self.fleet.max_mhz), np.array(self.fleet.max_mhz)
        for i, name in enumerate(self.fleet.ids):
            if name in order.freq_mhz:
                floor[i], ceiling[i] = order.freq_mhz[name], order.freq_max_mhz[name]
        decision = Decision.highest(self.fleet, t_s=t_s, floor_mhz=floor, ceiling_mhz=ceiling)
        return decision, RemoteMemory(ceiling_mhz=ceiling, gone=False)
