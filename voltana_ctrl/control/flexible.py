"""How many machines prefill and how many decode, where they may change between the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.batches import Batches, context_tok
from voltana_ctrl.control.cascade import CascadeController, CascadeMemory
from voltana_ctrl.control.plan import LATE_J_REQ
from voltana_ctrl.control.supply import Supply
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    Load,
    Observation,
    Role,
    Slo,
    Tuning,
)

__all__ = ["FlexibleController", "FlexibleMemory", "Split"]

_ROLES = (Role.PREFILL, Role.DECODE)
#: Numbers of machines that are tried to turn at once, at most, in either direction.
_TRIED = 24
#: How far ahead batches are taken to grow as they do: who turns to decode is there by then.
_SOON_S = 2.0
#: So many more of the requests must be in time, or nobody turns for them.
_LITTLE_FRAC = 0.05
#: How much more must be carried while lengths change.
_CHANGING_FRAC = 0.5
#: Controllers that are kept, one for each arrangement.
_KEPT = 16


class Split:
    """What the machines of a fleet could do in either role, and whether to turn some.

    The cost of an arrangement is its least power at the load at hand, and for every request a
    second that it cannot carry what late requests cost. Turning a machine costs the power that it
    draws while it drains and turns. An arrangement that carries the load is left when it has cost
    as much more than the best one as the change to that costs (the rule of ski rental, Karlin et
    al. 1988: for one change at a steady load, no more than twice the least is spent), as in
    :meth:`voltana_ctrl.control.TargetOptimiser.plan`. One that does not carry it is left at once.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed; who may change its role says so.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    tuning : Tuning, optional
        Settings that the controllers have, too; the defaults if left out.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, FleetState, Role, Slo, load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> from voltana_ctrl.types import Load
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> split = Split(FleetSpec.parse("2P2D", profile).flexible(), Slo(ttft_s=0.6, itl_s=0.06))
    >>> heavy = Load(arrival_req_s=60.0, lengths=length_moments([200], [400]))
    >>> roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    >>> busy = replace(FleetState.idle(4), running_req=[0.0, 0.0, 900.0, 900.0])
    >>> better, _ = split.better(roles, busy, heavy)
    >>> sum(role is Role.DECODE for role in better)
    3
    """

    def __init__(self, fleet: FleetSpec, slo: Slo, *, tuning: Tuning | None = None) -> None:
        self._fleet = fleet
        self._slo = slo
        self._catch_up_s = (tuning or Tuning()).catch_up_s
        self._may = np.array([bool(one.roles) for one in fleet.instances])
        self._rest_w = np.array([one.parked_w for one in fleet.instances])
        self._turn_s = np.array([one.turn_s for one in fleet.instances])
        # Every machine once in either role, so that one look tells what it could do in both.
        n = len(fleet)
        both = [
            replace(one, id=f"{one.id} {role.value}", role=role, roles=())
            for role in _ROLES
            for one in fleet.instances
        ]
        self._batches = Batches(fleet, slo.itl_s)
        self._both = TargetOptimiser(FleetSpec(tuple(both)), slo, tuning=tuning)
        self._groups = [
            (phase, group % n) for phase, groups in enumerate(self._both.phases) for group in groups
        ]

    def better(
        self,
        roles: tuple[Role, ...],
        state: FleetState,
        load: Load,
        *,
        doubt_frac: float = 0.0,
        changes: bool = False,
        grown_req: float = 0.0,
    ) -> tuple[tuple[Role, ...], tuple[float, float]]:
        """The best arrangement, and what it saves [W] and its change costs [J].

        The cost is 0 where the present one does not carry the load and the best is less short.

        Parameters
        ----------
        roles : tuple of Role
            What each machine does, or is about to do.
        state : FleetState
            State of the fleet now.
        load : Load
            Arrivals and their lengths.
        doubt_frac : float
            How much more than that another arrangement must carry: 0.1 for 10 %.
        changes : bool
            Whether lengths are changing, so that nobody knows how long new answers are. Then
            decode must carry the batches of those that stay with it and not all that run: who
            turns keeps its own to the end, and is taken back at once if answers prove long. And
            both phases must carry half as much again.
        grown_req : float
            By how many requests all batches together are going to grow soon.

        Returns
        -------
        roles, (saved_w, change_j)
            Who should do what, the power that it saves and the energy that the change takes; the
            present roles and zeros where none is better.
        """
        supplies = self._both.supplies(load.lengths)
        decodes = np.array([role is Role.DECODE for role in roles])
        if supplies is None:
            return roles, (0.0, 0.0)
        rate = load.arrival_req_s
        waits_req = float(state.queue_req[~decodes].sum()) - rate * self._slo.ttft_s
        prefill_req_s = rate + min(rate, max(0.0, waits_req) / self._catch_up_s)
        batch_req = self._batches.at_target_req(state)
        batch_req[~decodes & (state.running_req == 0.0)] = 0.0
        held_req = self._batches.holds_req(
            self._fleet.max_mhz, context_tok(state, np.arange(len(state)))
        )

        def busy(decodes: Bool, more: float) -> tuple[float, float]:
            """Load of each phase over what it carries within its promise."""
            counted = batch_req[decodes] if changes else batch_req
            held = float(held_req[decodes & state.alive].sum())
            able = self._able_req_s(supplies, 0, ~decodes & state.alive)
            return (
                more * prefill_req_s / max(able, 1e-9),
                more * (float(counted.sum()) + grown_req) / max(held, 1e-9),
            )

        more = 1.0 + (_CHANGING_FRAC if changes else 0.0)
        now_w, short_w = self._cost_w(supplies, decodes, state.alive, busy(decodes, more), rate)
        best, best_turned = decodes, np.zeros(0, np.int64)
        best_w = now_w + short_w - (_LITTLE_FRAC * LATE_J_REQ * rate if short_w > 0.0 else 0.0)
        for turned in self._candidates(decodes, state):
            other = decodes.copy()
            other[turned] = ~other[turned]
            doubted = busy(other, max(more, 1.0 + doubt_frac))
            cost_w = sum(self._cost_w(supplies, other, state.alive, doubted, rate))
            if cost_w < best_w:
                best, best_w, best_turned = other, cost_w, turned
        if best is decodes:
            return roles, (0.0, 0.0)
        change_j = 0.0 if short_w > 0.0 else self._change_j(supplies, decodes, best_turned)
        return tuple(_ROLES[int(at)] for at in best), (now_w + short_w - best_w, change_j)

    def _able_req_s(self, supplies: list[Supply], phase: int, members: Bool) -> float:
        """Load that these instances carry in a phase."""
        return sum(
            supply.most_req_s * float(np.count_nonzero(members[group]))
            for supply, (of, group) in zip(supplies, self._groups, strict=True)
            if of == phase
        )

    def _candidates(self, decodes: Bool, state: FleetState) -> list[I64]:
        """Who might turn together, never the last of a phase.

        To decode first those that have not finished leaving it: they are taken back at once. Else
        those with least to do.
        """
        found = []
        leaves = np.where(decodes, 0.0, -state.running_req)
        work = state.queue_tok + state.kv_used_tok
        for leave in (False, True):
            alive = (decodes == leave) & state.alive
            able = np.flatnonzero(alive & self._may)
            able = able[np.lexsort((work[able], leaves[able]))]
            most = min(len(able), int(alive.sum()) - 1)
            if most < 1:
                continue
            sizes = np.unique(np.rint(np.geomspace(1, most, _TRIED)).astype(int))
            found.extend([able[:size] for size in sizes])
        return found

    def _cost_w(
        self,
        supplies: list[Supply],
        decodes: Bool,
        alive: Bool,
        busy: tuple[float, float],
        rate_req_s: float,
    ) -> tuple[float, float]:
        """Power of an arrangement, and the price of what it is short of."""
        total_w, short_w = 0.0, 0.0
        for phase, frac in enumerate(busy):
            # Of a load beyond what is carried, the part beyond is late.
            short_w += LATE_J_REQ * rate_req_s * max(0.0, 1.0 - 1.0 / max(frac, 1e-9))
            for supply, (of, group) in zip(supplies, self._groups, strict=True):
                at = group[(decodes[group] == bool(phase)) & alive[group]]
                if of == phase and len(at):
                    rest_w = float(self._rest_w[at].mean())
                    load_req_s = min(1.0, frac) * supply.most_req_s
                    total_w += _least_w(supply, len(at), load_req_s, rest_w)
        return total_w, short_w

    def _change_j(self, supplies: list[Supply], decodes: Bool, turned: I64) -> float:
        """What those who turn draw while they drain and turn."""
        total_j = 0.0
        for supply, (phase, group) in zip(supplies, self._groups, strict=True):
            who = np.intersect1d(turned[decodes[turned] == bool(phase)], group)
            total_j += float((supply.drain_s + self._turn_s[who]).sum()) * supply.drain_w
        return total_j


def _least_w(supply: Supply, n: int, mean_req_s: float, rest_w: float) -> float:
    """Least power of `n` equal instances with this mean load, counts relaxed.

    An instance does best at the load at which a request costs least beyond resting,
    ``(p(x) - rest) / x``; fewer are awake so that each has it.
    """
    corners = np.append(_corners(supply), supply.most_req_s)
    power = np.array([supply.power_w(x) for x in corners])
    best_req_s = corners[int(np.argmin((power - rest_w) / corners))]
    awake = min(n, max(1.0, n * mean_req_s / best_req_s))
    return float(awake * supply.power_w(n * mean_req_s / awake) + (n - awake) * rest_w)


def _corners(supply: Supply) -> F64:
    """Loads at which one facet follows another."""
    alpha, beta = supply.alpha_j_req, supply.beta_w
    steeper = np.flatnonzero(np.diff(alpha) > 1e-12)
    at: F64 = (beta[steeper] - beta[steeper + 1]) / (alpha[steeper + 1] - alpha[steeper])
    return at[(at > 0.0) & (at < supply.most_req_s)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlexibleMemory:
    """What the controller remembers between ticks.

    Parameters
    ----------
    roles : tuple of Role
        What each machine was last told to be.
    inner : CascadeMemory
        Memory of the controller for this arrangement.
    looked_s, changed_s : float
        When the arrangement was last looked at, and when it was last changed.
    forgone_j : float
        Energy that it has cost more than the best one since it was the best itself.
    running_req : float
        Requests that ran at the last look.
    """

    roles: tuple[Role, ...]
    inner: CascadeMemory
    looked_s: float = -np.inf
    changed_s: float = -np.inf
    forgone_j: float = 0.0
    running_req: float = 0.0


class FlexibleController(Controller):
    """Another controller, on machines that change between prefill and decode.

    Once in a target period it looks whether another arrangement serves the load at hand at less
    cost, draining and turning included (:class:`Split`), and orders it. Everything else, from
    estimates to clocks, is the controller's for the arrangement that is ordered; what was learnt
    is handed on. Where nobody tells what machines do (``Observation.roles``), nobody can turn
    them either, and none is asked to.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed; see ``FleetSpec.flexible``.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    make : callable (fleet) -> CascadeController
        Makes the controller of a fleet whose roles stay.
    hold_s : float
        Least time between two changes that only save power.
    tuning : Tuning, optional
        Settings that the controllers have, too; the defaults if left out.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> from voltana_ctrl.control import MpcController
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> fleet, slo = FleetSpec.parse("1P2D", profile).flexible(), Slo(ttft_s=0.6, itl_s=0.06)
    >>> controller = FlexibleController(fleet, slo, lambda fixed: MpcController(fixed, slo))
    >>> seen = Observation(state=FleetState.idle(3), roles=[one.role for one in fleet.instances])
    >>> decision, _ = controller.decide(seen, controller.init())
    >>> [role.value for role in decision.roles]
    ['prefill', 'decode', 'decode']
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        make: Callable[[FleetSpec], CascadeController],
        *,
        hold_s: float = 10.0,
        tuning: Tuning | None = None,
    ) -> None:
        positive("FlexibleController.hold_s", hold_s)
        self._split = Split(fleet, slo, tuning=tuning)
        self._hold_s = hold_s
        self._doubt_sd = (tuning or Tuning()).doubt_sd_frac

        def of(roles: tuple[Role, ...]) -> CascadeController:
            return make(fleet.in_roles(roles))

        self._of = lru_cache(maxsize=_KEPT)(of)
        self._first = tuple(one.role for one in fleet.instances)
        super().__init__(fleet, period_s=self._of(self._first).period_s)

    def init(self) -> FlexibleMemory:
        """Roles as the fleet has them; nothing seen."""
        return FlexibleMemory(roles=self._first, inner=self._of(self._first).init())

    def notes(self, memory: FlexibleMemory) -> Mapping[str, float]:
        """What observers may want to see: as of the inner controller, and how many prefill.

        Parameters
        ----------
        memory : FlexibleMemory
            Memory after the last tick.
        """
        prefill = sum(role is Role.PREFILL for role in memory.roles)
        return {**self._of(memory.roles).notes(memory.inner), "prefill_instances": float(prefill)}

    def _decide(
        self, observation: Observation, memory: FlexibleMemory
    ) -> tuple[Decision, FlexibleMemory]:
        state = observation.state
        period_s = self._of(memory.roles).target_period_s
        told = observation.roles is not None
        if told and state.t_s - memory.looked_s >= period_s - 1e-9:
            memory = self._looked(state, memory)
        decision, inner = self._of(memory.roles).decide(observation, memory.inner)
        return (
            replace(decision, roles=memory.roles if told else None),
            replace(memory, inner=inner),
        )

    def _looked(self, state: FleetState, memory: FlexibleMemory) -> FlexibleMemory:
        """Memory after a look at the arrangement, changed if that pays."""
        lasted_s = min(state.t_s - memory.looked_s, self._hold_s)
        memory = replace(memory, looked_s=state.t_s)
        controller = self._of(memory.roles)
        load, doubt_frac, changes = controller.estimate(memory.inner)
        if not load.arrival_req_s > 0.0 or not np.isfinite(doubt_frac):
            return memory
        running_req = float(state.running_req.sum())
        roles, (saves_w, change_j) = self._split.better(
            memory.roles,
            state,
            load,
            doubt_frac=self._doubt_sd * doubt_frac,
            changes=changes,
            grown_req=max(0.0, running_req - memory.running_req) / lasted_s * _SOON_S,
        )
        memory = replace(memory, running_req=running_req)
        if roles == memory.roles:
            return replace(memory, forgone_j=0.0)
        forgone_j = memory.forgone_j + saves_w * lasted_s
        held = change_j > 0.0 and state.t_s - memory.changed_s < self._hold_s
        if forgone_j < change_j or held:
            return replace(memory, forgone_j=forgone_j)
        return FlexibleMemory(
            roles=roles, inner=self._of(roles).taken_over(memory.inner), looked_s=state.t_s,
            changed_s=state.t_s, running_req=running_req,
        )  # fmt: skip
