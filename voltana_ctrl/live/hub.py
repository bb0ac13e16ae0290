"""One controller for many nodes and routers: a plant whose parts report and fetch their orders."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.engines.latency import HalvesPaired
from voltana_ctrl.errors import BackendError
from voltana_ctrl.live.messages import MessageRefused
from voltana_ctrl.live.orders import Orders, Report, new_start, orders_of
from voltana_ctrl.live.status import LinkState
from voltana_ctrl.ports import Backend
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    RequestBatch,
    joined,
)

__all__ = ["HubBackend"]

_log = logging.getLogger(__name__)

_STATE = tuple(name for name in FleetState.__slots__ if name not in ("t_s", "alive", "age_s"))
_COUNTS = ("arrived_req", "arrived_tok")
#: What a router knows of its own requests; those of all routers add up.
_IN_FLIGHT = ("queue_req", "queue_tok", "running_req", "kv_used_tok")
_MOST_ROWS = 100_000
_MOST_SENDERS = 4096


@dataclass(slots=True)
class _Sender:
    """Who reports: its start, its last number, and, of a router, its requests in flight."""

    start: str
    number: int
    heard_s: float
    columns: dict[str, Any] | None = None
    told_silent: bool = False


class HubBackend:
    """A fleet whose nodes and routers report, and fetch their orders.

    Nodes tell of engines and GPUs, routers of requests. While a router reports, arrivals and
    finished requests are those that routers tell, and the load of an instance is at least what all
    routers together have in flight there.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    policy : str
        Policy whose governors are to choose clocks between floor and ceiling; told with the
        orders.
    silent_s : float
        Seconds after which an instance that nobody has reported is not alive, and a sender that
        has not reported is gone: another start of it may then take its place.
    valid_s : float
        Seconds that an order holds without a newer one.
    budgeted : bool
        Whether ceilings are those of a power budget, see
        :func:`~voltana_ctrl.live.orders.orders_of`.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If a time is not positive.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.live.orders import Report
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> hub = HubBackend(fleet)
    >>> report = Report(kind="node", sender="n0", start="a", number=0, ids=("decode-0",),
    ...                 observation=Observation(state=FleetState.idle(1)))
    >>> hub.apply(Decision.highest(fleet, floor_mhz=[705.0, 705.0]))
    >>> hub.take(report).orders["decode-0"].floor_mhz, hub.read().state.alive
    (705.0, array([False,  True]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        policy: str = "mpc",
        silent_s: float = 2.0,
        valid_s: float = 1.0,
        budgeted: bool = True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("HubBackend.silent_s", silent_s)
        positive("HubBackend.valid_s", valid_s)
        self._fleet, self._policy = fleet, policy
        self._silent_s, self._valid_s, self._now_s = silent_s, valid_s, now_s
        self._budgeted = budgeted
        n = len(fleet)
        self._lock = threading.Lock()
        self._columns = {name: np.zeros(n) for name in _STATE}
        self._columns["freq_mhz"] = np.array(fleet.max_mhz)
        self._alive = np.zeros(n, bool)
        self._begin_s = now_s()
        self._read_s = np.full(n, -np.inf)
        self._nodes: list[str | None] = [None] * n
        self._told_problems: dict[str, str] = {}
        self._delay_s: dict[str, float] = {}
        self._senders: dict[tuple[str, str], _Sender] = {}
        self._routed = {name: np.zeros(n) for name in _COUNTS}
        self._iterations: list[IterationBatch] = []
        self._finished: dict[str, list[RequestBatch]] = {"node": [], "router": []}
        self._state: FleetState | None = None
        self._decision: Decision | None = None
        self._decided_s = 0.0
        self._start, self._number = new_start(), -1
        self._halves = HalvesPaired()
        self.repeated = 0
        self._released = False
        self._closed = False

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    def routed(self) -> bool:
        """Whether a router has reported within `silent_s`: without one nobody may be parked."""
        return bool(self._routers(self._now_s()))

    def _routers(self, t_s: float) -> list[_Sender]:
        return [
            one
            for (kind, _), one in list(self._senders.items())
            if kind == "router" and t_s - one.heard_s <= self._silent_s
        ]

    def links(self) -> list[LinkState]:
        """Nodes and routers that have reported, and how many seconds ago they did last.

        Returns
        -------
        list of LinkState
            In the order of their first report, those that have fallen silent included.
        """
        t_s = self._now_s()
        return [
            LinkState(
                kind=kind,
                name=name,
                heard_s=max(0.0, t_s - one.heard_s),
                up=t_s - one.heard_s <= self._silent_s,
            )
            for (kind, name), one in list(self._senders.items())
        ]

    def delay_s(self) -> dict[str, float]:
        """Seconds from asking for a clock until it runs, as nodes and engines measured it.

        Returns
        -------
        dict of str to float
            By the id of the instance; those whose delay nobody has measured are left out.
        """
        return dict(self._delay_s)

    def problems(self) -> dict[str, str]:
        """What is wrong with instances, in words.

        Returns
        -------
        dict of str to str
            By the id of the instance: that no node reports it, that its node has fallen silent, or
            what its node says is wrong. Those with which nothing is wrong are left out.
        """
        t_s = self._now_s()
        # A node that reports knows better what is wrong with an engine whose reading is old.
        heard_s = {
            name: one.heard_s for (kind, name), one in list(self._senders.items()) if kind == "node"
        }
        return dict(self._told_problems) | {
            name: "no node reports it" if node is None else f"node {node} has fallen silent"
            for name, node in zip(self._fleet.ids, self._nodes, strict=True)
            if node is None or t_s - heard_s.get(node, -np.inf) > self._silent_s
        }

    def take(self, report: Report) -> Orders:
        """Take what a node or a router reports, and answer with the orders for its instances.

        A report that was taken before is answered and not counted again.

        Parameters
        ----------
        report : Report
            As :func:`~voltana_ctrl.live.messages.decode_report` returned it, which has checked it.

        Returns
        -------
        Orders
            For the instances of the report; with the state of the whole fleet for a router.

        Raises
        ------
        MessageRefused
            If it is older than what its sender said last, another process reports under its
            name, or another node reports the same instances.
        BackendError
            If there are no orders: nothing is decided yet, or any more. The report was taken.
        """
        where = [self._fleet.ids.index(name) for name in report.ids]
        t_s = self._now_s()
        with self._lock:
            sender, is_new = self._known(report, t_s)
            if is_new:
                if report.kind == "node":
                    self._take_node(report, where, t_s)
                else:
                    self._take_router(report, where, sender)
                sender.number = report.number
            else:
                self.repeated += 1
            sender.heard_s = t_s
            return self._orders(report, t_s)

    def _known(self, report: Report, t_s: float) -> tuple[_Sender, bool]:
        """Who sent it, and whether it is news."""
        key = (report.kind, report.sender)
        sender = self._senders.get(key)
        if sender is None or sender.start != report.start:
            if sender is not None and t_s - sender.heard_s <= self._silent_s:
                raise MessageRefused(
                    f"{report.kind} {report.sender}: another process reports under this name; give"
                    " each one its own, or wait until the other is gone"
                )
            if sender is None and len(self._senders) >= _MOST_SENDERS:
                gone = min(self._senders, key=lambda one: self._senders[one].heard_s)
                del self._senders[gone]
            silent = sender is not None and sender.told_silent
            sender = _Sender(report.start, -1, t_s, told_silent=silent)
            self._senders[key] = sender
        if report.number < sender.number:
            raise MessageRefused(
                f"number: expected at least {sender.number}, got {report.number}, which is old"
            )
        return sender, report.number > sender.number

    def _take_node(self, report: Report, where: list[int], t_s: float) -> None:
        state = report.observation.state
        for i in where:
            if self._nodes[i] not in (None, report.sender) and (
                t_s - self._read_s[i] <= self._silent_s
            ):
                raise MessageRefused(
                    f"{self._fleet.ids[i]}: node {self._nodes[i]} reports it, too; give each"
                    " instance one agent"
                )
        for name, column in self._columns.items():
            told = getattr(state, name)
            column[where] = told + (column[where] if name in _COUNTS else 0.0)
        self._alive[where] = state.alive
        self._read_s[where] = t_s - state.age_s
        told = {name: said for name, said in self._told_problems.items() if name not in report.ids}
        self._told_problems = told | dict(report.problems)
        self._delay_s = self._delay_s | dict(report.delay_s)
        for i in where:
            self._nodes[i] = report.sender
        _keep(self._iterations, report.observation.iterations)
        _keep(self._finished["node"], report.observation.finished)

    def _take_router(self, report: Report, where: list[int], sender: _Sender) -> None:
        state, n = report.observation.state, len(self._fleet)
        for name in _COUNTS:
            self._routed[name][where] += getattr(state, name)
        sender.columns = {name: np.zeros(n) for name in (*_IN_FLIGHT, "oldest_wait_s")}
        for name, column in sender.columns.items():
            column[where] = getattr(state, name)
        _keep(self._finished["router"], report.observation.finished)

    def _orders(self, report: Report, t_s: float) -> Orders:
        held_s = t_s - self._decided_s
        left_s = self._valid_s - held_s
        if self._decision is None or self._released or left_s <= 0.0:
            raise BackendError("the controller has decided nothing, or nothing any more")
        orders = orders_of(self._decision, self._fleet, held_s=held_s, budgeted=self._budgeted)
        return Orders(
            start=self._start,
            number=self._number,
            valid_s=left_s,
            orders={name: orders[name] for name in report.ids},
            policy=self._policy,
            state=self._state if report.kind == "router" else None,
        )

    def read(self) -> Observation:
        """State of all instances as reported, and what was reported since the last read.

        Returns
        -------
        Observation
            Arrivals, iterations and finished requests are those since the last read.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("HubBackend.read: the backend is closed; make a new one")
        t_s = self._now_s()
        self._tell_silence(t_s)
        with self._lock:
            heard = np.isfinite(self._read_s)
            age_s = t_s - np.where(heard, self._read_s, self._begin_s)
            routers = self._routers(t_s)
            columns = dict(self._columns)
            if routers:
                columns.update(self._routed)
                for name in _IN_FLIGHT:
                    ours = sum(one.columns[name] for one in routers if one.columns is not None)
                    columns[name] = np.maximum(columns[name], ours)
                waits_s = [one.columns["oldest_wait_s"] for one in routers if one.columns]
                columns["oldest_wait_s"] = np.max([columns["oldest_wait_s"], *waits_s], axis=0)
            self._state = state = FleetState(
                t_s=max(0.0, t_s),
                alive=self._alive & (t_s - self._read_s <= self._silent_s),
                age_s=np.maximum(age_s, 0.0),
                **columns,
            ).bounded(self._fleet)
            for name in _COUNTS:
                self._columns[name][:] = 0.0
                self._routed[name] = np.zeros(len(self._fleet))
            iterations, self._iterations = self._iterations, []
            finished, self._finished = self._finished, {"node": [], "router": []}
        return Observation(
            state=state,
            iterations=joined(IterationBatch, iterations),
            # Of a request that a router saw to its end the engine tells nothing new.
            finished=self._halves.whole(
                t_s, joined(RequestBatch, finished["router" if routers else "node"])
            ),
        )

    def _tell_silence(self, t_s: float) -> None:
        """Log who has fallen silent, and who is back, each once."""
        for (kind, name), one in list(self._senders.items()):
            silent = t_s - one.heard_s > self._silent_s
            if silent != one.told_silent:
                one.told_silent = silent
                how = "has fallen silent" if silent else "reports again"
                _log.warning("voltana-ctrl: %s %s %s", kind, name, how)

    def apply(self, decision: Decision) -> None:
        """Keep a decision for nodes and routers to fetch.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("HubBackend.apply: the backend is closed; make a new one")
        with self._lock:
            self._decision, self._decided_s = decision, self._now_s()
            self._number += 1

    @property
    def acts(self) -> bool:
        """Whether orders are given: not after :meth:`release`."""
        return not self._released

    def release(self) -> None:
        """Give no more orders: nodes go to their highest clocks under their ceilings."""
        self._released = True

    def close(self) -> None:
        """Give no more orders, and take no more reports in; may be called twice."""
        self._released = self._closed = True


def _keep(kept: list[Any], batch: Any) -> None:
    if len(batch) and sum(map(len, kept)) < _MOST_ROWS:
        kept.append(batch)


if TYPE_CHECKING:
    _: type[Backend] = HubBackend
