"""Roles by rule: a machine goes to the phase whose promise is in danger."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.laws import decode_s
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Observation, Role, Slo

__all__ = ["RoleController", "RoleMemory"]

#: From this share of a promise on it is in danger, and below the other there is plenty of room.
_TIGHT_FRAC, _LOOSE_FRAC = 0.7, 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleMemory:
    """What the rule remembers between ticks.

    Parameters
    ----------
    roles : tuple of Role
        What each instance was last told to be.
    changed_s : float
        When that was last changed.

    Examples
    --------
    >>> from voltana_ctrl import Role
    >>> RoleMemory(roles=(Role.PREFILL, Role.DECODE)).changed_s
    -inf
    """

    roles: tuple[Role, ...]
    changed_s: float = -np.inf


class RoleController(Controller):
    """Moves one machine at a time to where TTFT or ITL is in danger; governors do the rest.

    In the manner of schedulers that switch roles by load. How near each promise is, at the highest
    clocks: prompt tokens that wait per prefill instance times the time of one, over TTFT; the time
    of the mean decode iteration over ITL. Where one is beyond 0.7 and the other below 0.4, the
    machine with least to do changes; then nothing changes for `hold_s`.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed; who may change its role says so.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    hold_s, period_s : float
        Least time between two changes; time between decisions.

    Raises
    ------
    ConfigError
        If a time is not positive.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> fleet = FleetSpec.parse("1P2D", profile).flexible()
    >>> rule = RoleController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> crowded = replace(FleetState.idle(3), queue_tok=[9000.0, 0.0, 0.0])
    >>> decision, _ = rule.decide(Observation(state=crowded), rule.init())
    >>> [role.value for role in decision.roles]
    ['prefill', 'prefill', 'decode']
    """

    def __init__(
        self, fleet: FleetSpec, slo: Slo, *, hold_s: float = 10.0, period_s: float = 0.1
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        positive("RoleController.hold_s", hold_s)
        self.slo = slo
        self._hold_s = hold_s
        self._top = [one.table[-1] for one in fleet.instances]

    def init(self) -> RoleMemory:
        """Roles as the fleet has them."""
        return RoleMemory(roles=tuple(one.role for one in self.fleet.instances))

    def _decide(self, observation: Observation, memory: RoleMemory) -> tuple[Decision, RoleMemory]:
        state = observation.state
        if state.t_s - memory.changed_s >= self._hold_s:
            roles = self._moved(state, memory.roles)
            if roles != memory.roles:
                memory = RoleMemory(roles=roles, changed_s=state.t_s)
        decision = Decision.highest(self.fleet, t_s=state.t_s, floor_mhz=self.fleet.min_mhz)
        share = np.zeros(len(self.fleet))
        for phase in (Role.PREFILL, Role.DECODE):
            members = _having(memory.roles, phase)
            share[members] = 1.0 / max(1, len(members))
        if self.fleet.colocated:
            share[:] = 1.0 / len(share)
            return replace(decision, route_frac=share), memory
        return replace(decision, route_frac=share, roles=memory.roles), memory

    def _moved(self, state: FleetState, roles: tuple[Role, ...]) -> tuple[Role, ...]:
        prefill, decode = (_having(roles, phase) for phase in (Role.PREFILL, Role.DECODE))
        near = {
            Role.PREFILL: self._prefill_frac(state, prefill),
            Role.DECODE: self._decode_frac(state, decode),
        }
        for to, members in ((Role.PREFILL, decode), (Role.DECODE, prefill)):
            leave = Role.DECODE if to is Role.PREFILL else Role.PREFILL
            able = [i for i in members if to in self.fleet.instances[i].roles and state.alive[i]]
            if near[to] < _TIGHT_FRAC or near[leave] > _LOOSE_FRAC or len(members) < 2 or not able:
                continue
            work = state.queue_tok + state.kv_used_tok
            least = min(able, key=lambda i: (work[i], i))
            return tuple(to if i == least else role for i, role in enumerate(roles))
        return roles

    def _prefill_frac(self, state: FleetState, members: list[int]) -> float:
        waits_s = [state.queue_tok[i] * self._top[i]["prefill_tok_s"] for i in members]
        return float(np.mean(waits_s)) / self.slo.ttft_s if members else 0.0

    def _decode_frac(self, state: FleetState, members: list[int]) -> float:
        steps_s: list[F64] = []
        for i in members:
            crowd_req = float(state.running_req[i] + state.queue_req[i])
            if crowd_req > 0.0:
                steps_s.append(decode_s(self._top[i], crowd_req, float(state.kv_used_tok[i])))
        return float(np.mean(steps_s)) / self.slo.itl_s if steps_s else 0.0


def _having(roles: tuple[Role, ...], role: Role) -> list[int]:
    return [i for i, one in enumerate(roles) if one is role]
