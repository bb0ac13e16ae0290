"""Packing: decode on as few instances as can carry it, the rest parked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, not_negative, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.batches import CONTEXT_TOK, Batches, context_tok
from voltana_ctrl.control.budget import UniformCeiling
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import (
    Decision,
    Depth,
    FleetSpec,
    FleetState,
    Observation,
    PowerBudget,
    Slo,
)

__all__ = ["PackingController", "PackingMemory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingMemory:
    """What packing remembers between ticks.

    Parameters
    ----------
    n_active : int
        Decode instances that take new work.
    below_since_s : float, optional
        Time since which fewer would have been enough; None while they are not.

    Examples
    --------
    >>> PackingMemory(n_active=2).below_since_s is None
    True
    """

    n_active: int
    below_since_s: float | None = None


class PackingController(Controller):
    """Fewest decode instances that hold the batch and its KV at one clock; governors do the rest.

    A heuristic of our own in the manner of consolidating autoscalers, which it is to be compared
    with. The token rate is read off the running batches and the iteration time that the profile
    gives them; at the ITL target it needs a batch of rate x target (Little's law), which the
    instances must hold within ITL, KV and batch limit. An instance wakes at once and is parked
    after `park_after_s` in which fewer were enough. Prefill stays active; so does a colocated
    fleet, whose instances cannot give up one phase alone.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Its ITL target bounds the batch.
    plan_mhz : float, optional
        Clock at which the instances must hold the load; each one's highest by default. A lower
        one keeps more of them active, each at less power.
    power_budget : PowerBudget, optional
        Ceilings keep the worst case of those active, and the idle power of the rest, under it.
    headroom_frac : float
        Load is planned for with this much on top.
    depth : {"parked", "deep_parked", "asleep", "off"}
        How deep those sleep that are parked.
    park_after_s, lead_s, period_s : float
        Time before parking; how long before a step of the budget it is obeyed; time between
        decisions.

    Raises
    ------
    ConfigError
        If a setting is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> packing = PackingController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> memory = packing.init()
    >>> for t_s in (0.0, 5.0, 10.0):
    ...     idle = Observation(state=FleetState.idle(3, t_s=t_s, freq_mhz=1410.0))
    ...     decision, memory = packing.decide(idle, memory)
    >>> decision.active
    array([ True,  True, False])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        plan_mhz: float | None = None,
        power_budget: PowerBudget | None = None,
        headroom_frac: float = 0.25,
        depth: Depth = "parked",
        park_after_s: float = 5.0,
        lead_s: float = 0.1,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        not_negative("PackingController.headroom_frac", headroom_frac)
        not_negative("PackingController.park_after_s", park_after_s)
        not_negative("PackingController.lead_s", lead_s)
        self._plan_mhz = fleet.max_mhz
        if plan_mhz is not None:
            positive("PackingController.plan_mhz", plan_mhz)
            if plan_mhz < fleet.min_mhz.max():
                raise ConfigError(
                    "PackingController.plan_mhz: expected at least"
                    f" {fleet.min_mhz.max():g} MHz, which all instances support, got {plan_mhz:g}"
                )
            self._plan_mhz = np.minimum(fleet.max_mhz, plan_mhz)
        self.slo = slo
        self._budget = power_budget
        self._headroom_frac = headroom_frac
        self._depth = None if depth == "parked" else (depth,) * len(fleet)
        self._park_after_s = park_after_s
        self._lead_s = lead_s
        self._uniform = UniformCeiling(fleet)
        self._batches = Batches(fleet, slo.itl_s)
        # Those that carry most per watt of idle power come first; equals in fleet order.
        held = self._batches.holds_req(fleet.max_mhz, CONTEXT_TOK)
        idle_w = np.array([max(one.idle_w, 1.0) for one in fleet.instances])
        self._order = fleet.decode[np.argsort(-(held / idle_w)[fleet.decode], kind="stable")]

    def init(self) -> PackingMemory:
        """Everybody active."""
        return PackingMemory(n_active=len(self._order))

    def _decide(
        self, observation: Observation, memory: PackingMemory
    ) -> tuple[Decision, PackingMemory]:
        state = observation.state
        order = self._order[state.alive[self._order]]
        if self.fleet.colocated or order.size == 0:
            order = self.fleet.decode
            memory = PackingMemory(n_active=len(order))
        else:
            memory = self._count(state, order, memory)
        active = self._active(order, memory.n_active)
        ceiling_mhz = self._ceiling_mhz(state, active)
        held_req = self._batches.holds_req(ceiling_mhz, context_tok(state, order))
        route_frac = np.where(active, 1.0, 0.0)
        route_frac[self.fleet.decode] *= np.maximum(held_req, 1.0)[self.fleet.decode]
        for members in (self.fleet.prefill, self.fleet.decode):
            route_frac[members] /= route_frac[members].sum()
        return Decision(
            t_s=state.t_s,
            freq_mhz=self.fleet.min_mhz,
            freq_max_mhz=ceiling_mhz,
            route_frac=route_frac,
            active=active,
            price_j_req=np.zeros(len(self.fleet)),
            depth=self._depth,
        ), memory

    def _count(self, state: FleetState, order: I64, memory: PackingMemory) -> PackingMemory:
        """How many to keep active: up at once, down after a while."""
        wanted_req = (1.0 + self._headroom_frac) * float(
            self._batches.at_target_req(state)[self.fleet.decode].sum()
        )
        mean_tok = context_tok(state, order)
        needed = len(order)
        for n_active in range(1, len(order)):
            ceiling_mhz = self._ceiling_mhz(state, self._active(order, n_active))
            held_req = self._batches.holds_req(np.minimum(self._plan_mhz, ceiling_mhz), mean_tok)
            if held_req[order[:n_active]].sum() >= wanted_req:
                needed = n_active
                break
        if needed >= memory.n_active:
            return PackingMemory(n_active=needed)
        since_s = state.t_s if memory.below_since_s is None else memory.below_since_s
        if state.t_s - since_s >= self._park_after_s:
            return PackingMemory(n_active=needed)
        return PackingMemory(n_active=memory.n_active, below_since_s=since_s)

    def _active(self, order: I64, n_active: int) -> Bool:
        active = np.zeros(len(self.fleet), dtype=bool)
        active[self.fleet.prefill] = True
        active[order[:n_active]] = True
        return active

    def _ceiling_mhz(self, state: FleetState, active: Bool) -> F64:
        if self._budget is None:
            return self.fleet.max_mhz
        until_s = state.t_s + float(self.period_s) + self._lead_s
        busy = active | (state.running_req + state.queue_req > 0.0)
        return self._uniform.under(self._budget.least_w(state.t_s, until_s), busy)
