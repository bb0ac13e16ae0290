"""Controllers of a node: a policy without an engine's help, a watcher, and what advice says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.control.base import CompiledGovernor, Controller
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.estimate import FleetTables, predict_decode, predict_prefill
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.ports import Governor, Observer, controller_extras
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    PowerBudget,
    Slo,
    TickRecord,
)

__all__ = ["Advice", "PolicyController", "WatchController", "node_policy"]


class WatchController(Controller):
    """Asks for what is there: the clocks as read. For a loop that only watches.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    period_s : float
        Time between readings.

    Examples
    --------
    >>> from voltana_ctrl import FleetState, load_profile
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


class PolicyController(Controller):
    """A policy where nothing but clocks is in our hands.

    Where the policy has governors, which belong before every iteration of an engine, they are
    asked at every tick instead. What routes requests is not ours: an instance that the policy
    would park gets work all the same, and a clock by its own queue and batch alone. Prices, which
    tell a router what one more request costs where the policy has put the load, are not told:
    they are 0, since nobody puts it there.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    inner : Controller, optional
        The policy's own; `first` stands without one.
    first : Decision, optional
        What stands where there is no controller; highest clocks, or what governors choose, if
        left out.
    governors : sequence of Governor, optional
        One per instance.
    parked : sequence of Governor, optional
        Who chooses the clock of an instance that the policy would park; its highest without.
    period_s : float
        Time between decisions.

    Raises
    ------
    ConfigError
        If there are not as many governors as instances.

    Examples
    --------
    >>> from voltana_ctrl import FleetState, load_profile
    >>> from voltana_ctrl.control import StaticController
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = PolicyController(fleet, inner=StaticController(fleet, 1005))
    >>> seen = Observation(state=FleetState.idle(2))
    >>> controller.decide(seen, controller.init())[0].freq_mhz
    array([1005., 1005.])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        inner: Any = None,
        first: Decision | None = None,
        governors: Sequence[Governor] | None = None,
        parked: Sequence[Governor] | None = None,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        for name, those in (("governors", governors), ("parked", parked)):
            if those is not None and len(those) != len(fleet):
                raise ConfigError(
                    f"PolicyController.{name}: expected {len(fleet)}, one per instance, got"
                    f" {len(those)}"
                )
        self._inner = inner
        self._inner_notes = controller_extras(inner).notes
        # Governors are free over the whole range; without them the highest clock is the safe one.
        floor_mhz = fleet.max_mhz if governors is None else fleet.min_mhz
        self._first = first or Decision.highest(fleet, floor_mhz=floor_mhz)
        self._governors = governors
        self._parked = parked

    def init(self) -> Any:
        """Memory of the policy."""
        return None if self._inner is None else self._inner.init()

    def notes(self, memory: Any) -> Mapping[str, float]:
        """What the policy notes.

        Parameters
        ----------
        memory : object
            Of the latest tick.
        """
        return dict(self._inner_notes(memory))

    def _decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        state = observation.state
        if self._inner is None:
            decision = replace(self._first, t_s=state.t_s)
        else:
            decision, memory = self._inner.decide(observation, memory)
        # What the policy asks of a parked instance is for being woken by its router.
        freq_mhz = np.where(decision.active, decision.freq_mhz, self.fleet.min_mhz)
        ceiling_mhz = decision.freq_max_mhz
        for i, active in enumerate(decision.active):
            asked = self._governors if active else self._parked
            if asked is not None:
                # Compiled governors tell time by themselves, unless told; a log has its own.
                told = {"t_s": state.t_s} if isinstance(asked[i], CompiledGovernor) else {}
                clock_mhz = asked[i].step(
                    float(state.running_req[i]), float(state.kv_used_tok[i]),
                    float(state.queue_tok[i]), float(state.oldest_wait_s[i]),
                    float(freq_mhz[i]), float(ceiling_mhz[i]), **told,
                )  # fmt: skip
                freq_mhz[i] = min(max(clock_mhz, freq_mhz[i]), ceiling_mhz[i])
            elif not active:
                freq_mhz[i] = ceiling_mhz[i]
        everybody = Decision.highest(self.fleet)
        return replace(
            decision,
            freq_mhz=freq_mhz,
            active=everybody.active,
            route_frac=everybody.route_frac,
            price_j_req=everybody.price_j_req,
            limits=None,
        ), memory


def node_policy(
    fleet: FleetSpec,
    slo: Slo,
    policy: str,
    *,
    period_s: float = 0.1,
    power_budget: PowerBudget | None = None,
) -> PolicyController:
    """Shipped policy, or one's own, for a node where only clocks are in our hands.

    Parameters
    ----------
    fleet, slo
        What is controlled, and the promises.
    policy : str
        Name, see :func:`voltana_ctrl.policies.find_policy`.
    period_s : float
        Time between decisions.
    power_budget : PowerBudget, optional
        What the fleet may draw.

    Raises
    ------
    ConfigError
        If there is no such policy, or it knows no budgets and one is given.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> node_policy(fleet, Slo(ttft_s=0.6, itl_s=0.06), "mpc").period_s
    Fraction(1, 10)
    """
    found = find_policy(policy)
    if found.name == "bound":
        raise ConfigError("policy bound: it is computed and controls nothing; choose another")
    if power_budget is not None and not found.knows_budget:
        raise ConfigError(
            f"policy {policy}: it knows no power budget; choose mpc, cascade or static-budget"
        )
    setup = PolicySetup(tick_s=period_s, power_budget=power_budget, governed=False)
    parts = found.build(fleet, slo, setup)
    # A tick is how long a queue may go unseen.
    parked = [
        IterationGovernor(one, slo, delay_s=setup.delay_s + period_s) for one in fleet.instances
    ]
    return PolicyController(
        fleet,
        inner=parts.controller,
        first=parts.first,
        governors=parts.governors,
        parked=parked,
        period_s=period_s,
    )


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
        Told a line every `every_s`.
    every_s : float
        Time between two lines.
    unread : collection of str
        Ids of instances whose clock nobody reads; the line says that it is assumed.
    problems : callable
        What is wrong with the readings of instances, by id.

    Raises
    ------
    ConfigError
        If that is not positive.

    Examples
    --------
    >>> Advice.__doc__.splitlines()[0]
    'Observer that says what a policy would do, and what it expects that to save.'
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
        """Power of every instance at its present load at these clocks, shape (n,).

        Parameters
        ----------
        observation : Observation
            The load.
        freq_mhz : ndarray, shape (n,)
            Clocks.
        """
        state, tables = observation.state, self._tables
        power_w = np.array([one.idle_w for one in self._fleet.instances])
        clocks = np.clip(freq_mhz, self._fleet.min_mhz, self._fleet.max_mhz)
        for i, one in enumerate(self._fleet.instances):
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
