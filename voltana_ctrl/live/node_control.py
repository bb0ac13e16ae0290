"""What sets nothing: a controller that watches, what advice says, and who answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.estimate import FleetTables, predict_decode, predict_prefill
from voltana_ctrl.ports import Observer
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    TickRecord,
)

__all__ = ["Advice", "WatchController", "WhoAnswers", "expected_power_w"]

_log = logging.getLogger(__name__)


class WatchController(Controller):
    """Asks for what is there: the clocks as read. For a loop that only watches.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    period_s : float
        Seconds between readings.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> seen = Observation(state=FleetState.idle(2, freq_mhz=705.0))
    >>> WatchController(fleet).decide(seen, None)[0].freq_mhz
    array([705., 705.])
    """

    def init(self) -> None:
        """No memory."""

    def _decide(self, observation: Observation, memory: None) -> tuple[Decision, None]:
        state, fleet = observation.state, self.fleet
        seen = np.clip(state.freq_mhz, fleet.min_mhz, fleet.max_mhz)
        return Decision.highest(fleet, t_s=state.t_s, floor_mhz=seen), memory


@dataclass(slots=True)
class _Sums:
    since_s: float = 0.0
    ticks: int = 0
    now_w: float = 0.0
    then_w: float = 0.0
    loaded: bool = False


class Advice:
    """Observer that says what a policy would do, and what it expects that to save.

    The profile predicts the power of every instance at its present load, at the clock as read
    and at the clock proposed; the difference is the expected saving. It leaves out that a
    slower decode instance runs larger batches, and what the profile does not know: prove it
    with a switchback.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    say : callable
        Called with a line every `every_s`.
    every_s : float
        Seconds between two lines.
    unread : collection of str
        Ids of instances whose clock nobody reads; the line says that it is assumed.
    problems : callable
        Returns what is wrong with the readings of instances, in words, by the id of the instance.

    Raises
    ------
    ConfigError
        If `every_s` is not positive.

    Examples
    --------
    >>> from voltana_ctrl import ControlLoop, FleetSpec, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = SimBackend(fleet, workload=make_workload("fixed", rate_req_s=4.0, duration_s=9.0))
    >>> said = []
    >>> with ControlLoop(plant, StaticController(fleet, 1005),
    ...                  observers=[Advice(fleet, said.append)]) as loop:
    ...     loop.run(8.0)
    >>> said[0].startswith("advice: prefill-0 ")
    True
    """

    def __init__(
        self,
        fleet: FleetSpec,
        say: Callable[[str], None],
        *,
        every_s: float = 5.0,
        unread: Collection[str] = (),
        problems: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        positive("Advice.every_s", every_s)
        self._problems = problems
        self._loaded = False
        self._unread = frozenset(unread)
        self._fleet, self._say, self._every_s = fleet, say, every_s
        self._tables = FleetTables.of(fleet)
        self._sums = _Sums(since_s=-np.inf)

    def on_tick(self, record: TickRecord) -> None:
        """Take one tick."""
        state = record.observation.state
        sums = self._sums
        if not sums.since_s <= state.t_s:
            sums = self._sums = _Sums(since_s=state.t_s)
        elif sums.since_s == -np.inf:
            sums.since_s = state.t_s
        sums.ticks += 1
        sums.loaded |= bool(np.any(state.alive & (state.running_req + state.queue_req > 0.0)))
        sums.now_w += float(self.power_w(record.observation, state.freq_mhz).sum())
        sums.then_w += float(self.power_w(record.observation, record.applied.freq_mhz).sum())
        if state.t_s - sums.since_s < self._every_s:
            return
        self._loaded |= sums.loaded
        self._say(f"advice: {'; '.join([*self._expected(record, sums), *self._troubles(state)])}")
        self._sums = _Sums(since_s=state.t_s)

    def _troubles(self, state: FleetState) -> list[str]:
        """Who does not answer, and what is wrong with the readings of those who do."""
        problems = self._problems()
        told = []
        for name, alive in zip(self._fleet.ids, state.alive, strict=True):
            if not alive:
                told.append(f"{name} does not answer ({problems.get(name, 'nothing heard of it')})")
            elif name in problems:
                told.append(f"{name}: {problems[name]}")
        return told

    def _expected(self, record: TickRecord, sums: _Sums) -> list[str]:
        state = record.observation.state
        moves = ", ".join(
            f"{one.id} {seen:.0f}{' (assumed)' if one.id in self._unread else ''}"
            f" -> {asked:.0f} MHz"
            for one, seen, asked, alive in zip(
                self._fleet.instances, state.freq_mhz, record.applied.freq_mhz, state.alive,
                strict=True,
            )
            if alive
        )  # fmt: skip
        guess = " and the assumed clocks" if "(assumed)" in moves else ""
        now_w, then_w = sums.now_w / sums.ticks, sums.then_w / sums.ticks
        if not moves or now_w <= 0.0:
            return [moves] if moves else []
        if not sums.loaded:
            return [moves, "no load now" if self._loaded else "no load seen yet"]
        return [
            moves,
            f"expected {now_w:.0f} W -> {then_w:.0f} W ({100.0 * (1.0 - then_w / now_w):+.1f} %"
            f" saved, by the profile{guess})",
        ]

    def power_w(self, observation: Observation, freq_mhz: F64) -> F64:
        """Power that the profile expects of every instance, see :func:`expected_power_w`.

        Parameters
        ----------
        observation : Observation
            Present load.
        freq_mhz : ndarray, shape (n,)
            Clock of each instance.

        Returns
        -------
        ndarray, shape (n,)
            Watts.
        """
        return expected_power_w(self._fleet, self._tables, observation, freq_mhz)


class WhoAnswers:
    """Observer that logs whose engine answers no more, and whose does again, each once.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> wish = Decision.highest(fleet)
    >>> seen = Observation(state=FleetState.idle(2))
    >>> WhoAnswers(fleet).on_tick(
    ...     TickRecord(number=0, observation=seen, proposed=wish, applied=wish))
    """

    def __init__(self, fleet: FleetSpec) -> None:
        self._ids = fleet.ids
        self._was = [False] * len(fleet)

    def on_tick(self, record: TickRecord) -> None:
        """Compare with the tick before; who has never answered is not missed.

        Parameters
        ----------
        record : TickRecord
            What the tick saw.
        """
        now = record.observation.state.alive.tolist()
        for name, was, is_there in zip(self._ids, self._was, now, strict=True):
            if was and not is_there:
                _log.warning("voltana-ctrl: %s does not answer; the others take its work", name)
            elif is_there and not was and record.number > 0:
                _log.warning("voltana-ctrl: %s answers", name)
        self._was = now


def expected_power_w(
    fleet: FleetSpec, tables: FleetTables, observation: Observation, freq_mhz: F64
) -> F64:
    """Power that the profile expects of every instance, under its present load at given clocks.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    tables : FleetTables
        Profiles of the fleet.
    observation : Observation
        Present load. Where an instance has both to decode and to prefill, decode counts.
    freq_mhz : ndarray, shape (n,)
        Clock of each instance, brought within what it supports.

    Returns
    -------
    ndarray, shape (n,)
        Watts; 0 of an instance that is not alive.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.estimate import FleetTables
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> idle = Observation(state=FleetState.idle(2))
    >>> watts = expected_power_w(fleet, FleetTables.of(fleet), idle, fleet.max_mhz)
    >>> bool(watts[0] == fleet.instances[0].idle_w)
    True
    """
    state = observation.state
    power_w = np.array([one.idle_w for one in fleet.instances])
    clocks = np.clip(freq_mhz, fleet.min_mhz, fleet.max_mhz)
    for i, one in enumerate(fleet.instances):
        if not state.alive[i]:
            power_w[i] = 0.0
        elif one.role.decodes and state.running_req[i] > 0.0:
            load = (state.running_req[i], state.kv_used_tok[i])
            power_w[i] = float(predict_decode(tables, i, clocks[i], *load).power_w)
        elif one.role.prefills and state.queue_tok[i] > 0.0:
            tok = min(state.queue_tok[i], one.prefill_budget_tok)
            power_w[i] = float(predict_prefill(tables, i, clocks[i], tok).power_w)
    return power_w


if TYPE_CHECKING:
    _: type[Observer] = Advice
