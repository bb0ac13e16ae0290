"""What a fleet does now and did in the last hour, as plain values for people to look at."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.estimate import FleetTables
from voltana_ctrl.live.node_control import expected_power_w
from voltana_ctrl.live.reasons import clock_reason
from voltana_ctrl.ports import Observer
from voltana_ctrl.types import Decision, FleetSpec, Observation, PowerBudget, Slo, TickRecord

__all__ = ["SCHEMA", "LinkState", "StatusBoard"]

SCHEMA = "voltana-ctrl/status/1"
#: A point of the history is the mean of so long; so many are kept, an hour of them.
_POINT_S, _POINTS = 5.0, 720
# Points of the last minute.
_RECENT_POINTS = 12
_EVENTS = 60
_MOST_JUDGED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """One node or router, and when it was heard last.

    Parameters
    ----------
    kind : {"node", "router"}
        Whether it is a node or a router.
    name : str
        Name that it reports under.
    heard_s : float
        Seconds since it was heard last.
    up : bool
        Whether that is so recent that it counts as there.

    Examples
    --------
    >>> LinkState(kind="router", name="r0", heard_s=0.1, up=True).up
    True
    """

    kind: str
    name: str
    heard_s: float
    up: bool


class StatusBoard(logging.Handler):
    """Observer that keeps what a person wants to see of a fleet; any thread may ask for it.

    It is a logging handler besides: what other parts warn of, such as why an instance returned
    to its highest clock, stands among the events.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    slo : Slo
        The promises.
    mode, policy : str
        Mode of the agent and name of the policy, shown as they are.
    power_budget : PowerBudget, optional
        What the fleet may draw.
    problems : callable
        Returns what is wrong with instances, in words, by the id of the instance.
    links : callable
        Returns a :class:`LinkState` for every node and router that reports.
    routed : callable
        Returns whether a router sends requests as decided.
    held_up : callable
        Returns what keeps instances from coming down, in words, by the id of the instance.
    unread : collection of str
        Instances whose GPUs nobody reads: their clock and power are not told.
    window_s : float
        Seconds for which a finished request counts for attainment.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If the window is not positive.

    Examples
    --------
    >>> from voltana_ctrl import ControlLoop, FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = SimBackend(fleet, workload=make_workload("fixed", rate_req_s=4.0, duration_s=9.0))
    >>> board = StatusBoard(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> with ControlLoop(plant, StaticController(fleet, 1005), observers=[board]) as loop:
    ...     loop.run(8.0)
    >>> told = board.status()
    >>> [one["clock_mhz"] for one in told["instances"]], told["latency"]["judged_req"] > 20
    ([1005.0, 1005.0], True)
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        mode: str = "act",
        policy: str = "mpc",
        power_budget: PowerBudget | None = None,
        problems: Callable[[], Mapping[str, str]] = dict,
        links: Callable[[], list[LinkState]] = list,
        routed: Callable[[], bool] = lambda: True,
        held_up: Callable[[], Mapping[str, str]] = dict,
        unread: tuple[str, ...] = (),
        window_s: float = 600.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(logging.WARNING)
        positive("StatusBoard.window_s", window_s)
        self._fleet, self._slo, self._mode, self._policy = fleet, slo, mode, policy
        self._budget, self._problems, self._links = power_budget, problems, links
        self._routed, self._unread = routed, frozenset(unread)
        self._held_up = held_up
        self._window_s, self._now_s = window_s, now_s
        self._tables = FleetTables.of(fleet)
        self._lock_board = threading.Lock()
        self._record: TickRecord | None = None
        self._seen_s = now_s()
        self._highest_w, self._highest_s = 0.0, -np.inf
        self._sums = np.zeros(3)  # ticks, power, power at the highest clocks
        self._point_s = -np.inf
        self._history: deque[tuple[float, float, float]] = deque(maxlen=_POINTS)
        self._judged: deque[tuple[float, float, float, bool, bool]] = deque(maxlen=_MOST_JUDGED)
        self._events: dict[str, dict[str, Any]] = {}

    def on_tick(self, record: TickRecord) -> None:
        """Take one tick."""
        now_s = self._now_s()
        if now_s - self._highest_s >= 1.0:  # it is no use to predict it more often
            self._highest_s = now_s
            self._highest_w = self._at_highest_w(record.observation)
        power_w = self._drawn_w(record.observation)
        with self._lock_board:
            self._record, self._seen_s = record, now_s
            self._sums += (1.0, power_w, self._highest_w)
            if now_s - self._point_s >= _POINT_S:
                ticks, total_w, highest_w = self._sums
                self._history.append((now_s, total_w / ticks, highest_w / ticks))
                self._sums[:], self._point_s = 0.0, now_s
            done = record.observation.finished
            for row in zip(
                done.ttft_s.tolist(), done.itl_s.tolist(), done.prefill_instance.tolist(),
                done.decode_instance.tolist(), strict=True,
            ):  # fmt: skip
                self._judged.append((now_s, row[0], row[1], row[2] >= 0, row[3] >= 0))
            while self._judged and now_s - self._judged[0][0] > self._window_s:
                self._judged.popleft()
        for said in record.interventions:
            self.note(f"the guard changed the decision: {said}")

    def emit(self, record: logging.LogRecord) -> None:
        """Take a warning that another part of the program logged."""
        self.note(record.getMessage().removeprefix("voltana-ctrl: "))

    def note(self, text: str) -> None:
        """Keep an event; what is said again is counted, wherever else came between.

        Parameters
        ----------
        text : str
            What happened, in words; cut at 500 characters.
        """
        text, now_s = text[:500], self._now_s()
        with self._lock_board:
            # Taken out and put at the end: events stand in the order in which they were last seen.
            event = self._events.pop(text, {"text": text, "times": 0})
            self._events[text] = event | {"times": event["times"] + 1, "last_s": now_s}
            if len(self._events) > _EVENTS:
                self._events.pop(next(iter(self._events)))

    def _drawn_w(self, observation: Observation) -> float:
        read = np.array([name not in self._unread for name in self._fleet.ids])
        return float(observation.state.power_w[read].sum())

    def _at_highest_w(self, observation: Observation) -> float:
        return float(
            expected_power_w(self._fleet, self._tables, observation, self._fleet.max_mhz).sum()
        )

    def history(self) -> list[list[float]]:
        """Power of the last hour, a point for every 5 s.

        Returns
        -------
        list of [ago_s, power_w, highest_w]
            Seconds before now, mean power drawn, and what the profile expects at the highest clocks
            under the same load, in watts; oldest first.
        """
        now_s = self._now_s()
        with self._lock_board:
            points = list(self._history)
        return [[round(now_s - t_s, 1), round(w, 1), round(high_w, 1)] for t_s, w, high_w in points]

    def status(self) -> dict[str, Any]:
        """What a person wants to see of the fleet now.

        Returns
        -------
        dict
            Plain values for JSON, under the schema `SCHEMA`; what is not known is None.
        """
        now_s = self._now_s()
        with self._lock_board:
            record, seen_s = self._record, self._seen_s
            judged, events = list(self._judged), [dict(one) for one in self._events.values()]
        for event in events:
            event["ago_s"] = round(now_s - event.pop("last_s"), 1)
        told: dict[str, Any] = {
            "schema": SCHEMA,
            "mode": self._mode,
            "policy": self._policy,
            "number": None if record is None else record.number,
            "age_s": round(now_s - seen_s, 2),
            "in_force": False if record is None else record.in_force,
            "slo": {
                "ttft_s": self._slo.ttft_s,
                "itl_s": self._slo.itl_s,
                "attainment": self._slo.attainment,
            },
            "latency": self._latency(judged),
            "links": [
                {"kind": one.kind, "name": one.name, "heard_s": round(one.heard_s, 1),
                 "up": one.up}
                for one in self._links()
            ],
            "events": events[::-1],
            "power": None, "margins": None, "plan": None, "instances": [],
        }  # fmt: skip
        if record is not None:
            told["power"] = self._power(record)
            told["margins"] = {
                name: record.notes.get(f"margin_{name}") for name in ("ttft_frac", "itl_frac")
            }
            told["plan"] = self._plan(record)
            told["instances"] = self._instances(record)
        return told

    def _latency(self, judged: list[tuple[float, float, float, bool, bool]]) -> dict[str, Any]:
        told: dict[str, Any] = {"judged_req": len(judged), "window_s": self._window_s}
        for k, (name, promised_s) in enumerate(
            (("ttft", self._slo.ttft_s), ("itl", self._slo.itl_s))
        ):
            values_s = np.array([one[1 + k] for one in judged if one[3 + k]])
            known = len(values_s) > 0
            told[f"{name}_attainment"] = (
                round(float((values_s <= promised_s).mean()), 5) if known else None
            )
            finite = values_s[np.isfinite(values_s)]
            for percent in (50, 99):
                told[f"{name}_p{percent}_s"] = (
                    round(float(np.percentile(finite, percent)), 5) if finite.size else None
                )
        return told

    def _power(self, record: TickRecord) -> dict[str, Any]:
        # Moments of one and of the other do not belong together: a batch ends between them.
        with self._lock_board:
            points = [point[1:] for point in list(self._history)[-_RECENT_POINTS:]]
            if not points and self._sums[0]:
                points.append(tuple(self._sums[1:] / self._sums[0]))
        drawn_w, expected_w = np.mean(points, axis=0) if points else (0.0, 0.0)
        return {
            "now_w": round(self._drawn_w(record.observation), 1),
            "highest_clock_w": round(self._highest_w, 1),
            "below_frac": round(1.0 - drawn_w / expected_w, 4) if expected_w > 0.0 else None,
            "budget_w": None if self._budget is None else self._budget.at_w(self._t_s(record)),
        }

    @staticmethod
    def _t_s(record: TickRecord) -> float:
        return float(record.observation.state.t_s)

    def _plan(self, record: TickRecord) -> dict[str, Any]:
        state, decision, fleet = record.observation.state, record.applied, self._fleet
        phases = {"prefill": fleet.prefill, "decode": fleet.decode}
        if fleet.colocated:
            phases = {"colocated": np.arange(len(fleet))}
        t_s = self._t_s(record)
        steps = () if self._budget is None else self._budget.steps
        return {
            "awake": {
                name: [int(decision.active[members].sum()), len(members)]
                for name, members in phases.items()
            },
            "backlog_req": round(float(state.queue_req.sum()), 1),
            "budget_steps": [
                {"in_s": round(from_s - t_s, 1), "limit_w": limit_w}
                for from_s, limit_w in steps
                if from_s > t_s
            ],
            "status": decision.status.name.lower(),
            "notes": {name: round(float(value), 5) for name, value in record.notes.items()},
        }

    def _instances(self, record: TickRecord) -> list[dict[str, Any]]:
        state, decision = record.observation.state, record.applied
        problems, routed, held_up = self._problems(), self._routed(), self._held_up()
        told = []
        for i, one in enumerate(self._fleet.instances):
            dark = one.id in self._unread
            problem = problems.get(one.id, "" if state.alive[i] else "it does not answer")
            told.append(
                {
                    "id": one.id,
                    "role": one.role.value,
                    "node": one.node,
                    "alive": bool(state.alive[i]),
                    "problem": problem or None,
                    "clock_mhz": None if dark else float(state.freq_mhz[i]),
                    "floor_mhz": float(decision.freq_mhz[i]),
                    "ceiling_mhz": float(decision.freq_max_mhz[i]),
                    "power_w": None if dark else round(float(state.power_w[i]), 1),
                    "running_req": round(float(state.running_req[i]), 1),
                    "queue_req": round(float(state.queue_req[i]), 1),
                    "kv_frac": round(float(state.kv_used_tok[i] / one.kv_capacity_tok), 4),
                    "active": bool(decision.active[i]),
                    "share_frac": round(float(decision.route_frac[i]), 4),
                    "clock_why": clock_reason(
                        i,
                        record,
                        self._fleet,
                        mode=self._mode,
                        held_up=held_up,
                        budgeted=self._budget is not None,
                    ),
                    "why": _why(i, decision, state.running_req, state.alive, routed),
                    "age_s": round(float(min(state.age_s[i], 1e6)), 2),
                }
            )
        return told


def _why(i: int, decision: Decision, running_req: F64, alive: Any, routed: bool) -> str:
    """Why an instance takes work or does not, in words."""
    if not alive[i]:
        return "gone: the others take its work"
    if decision.active[i]:
        return "takes work" if routed else "takes work: no router of ours obeys"
    if running_req[i] > 0.0:
        return f"{running_req[i]:.0f} requests left to finish"
    return "the others carry the load"


if TYPE_CHECKING:
    _: type[Observer] = StatusBoard
