"""Who serves, who wakes, who drains and who sleeps: kept track of, and ordered by count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, freeze_fields
from voltana_ctrl.control.spare import spare_count
from voltana_ctrl.control.supply import Supply
from voltana_ctrl.types import FleetSpec, FleetState

__all__ = ["Standby", "StandbyMemory"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StandbyMemory:
    """What was ordered, and what follows from it.

    Parameters
    ----------
    on : ndarray of bool, shape (n,)
        Who serves or is on the way to.
    asleep : ndarray of bool, shape (n,)
        Who is parked and has been seen empty.
    ready_s : ndarray, shape (n,)
        Time from which on an instance that was woken serves.

    Examples
    --------
    >>> StandbyMemory(on=[True], asleep=[False], ready_s=[0.0]).on
    array([ True])
    """

    on: Bool
    asleep: Bool
    ready_s: F64

    def __post_init__(self) -> None:
        n = len(np.asarray(self.on))
        freeze_fields(self, ("on", "asleep"), (n,), bool)
        freeze_fields(self, ("ready_s",), (n,))


class Standby:
    """Turns counts per group into instances, and knows how long each takes to be there.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    groups : sequence of ndarray of int
        Instances that are alike.
    phases : sequence of int
        Phase of each group.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, FleetState, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> standby = Standby(fleet, [np.array([0]), np.array([1, 2])], [0, 1])
    >>> state = FleetState.idle(3)
    >>> memory = standby.order(standby.init(), state, [1, 1])
    >>> memory.on, standby.look(memory, state).asleep
    (array([ True,  True, False]), array([False, False,  True]))
    """

    def __init__(self, fleet: FleetSpec, groups: Sequence[I64], phases: Sequence[int]) -> None:
        self.groups = list(groups)
        self._phases = list(phases)
        self._wake_s = np.array([one.wake_s for one in fleet.instances])

    def init(self) -> StandbyMemory:
        """Everybody serves."""
        n = len(self._wake_s)
        return StandbyMemory(
            on=np.ones(n, bool), asleep=np.zeros(n, bool), ready_s=np.full(n, -np.inf)
        )

    def look(self, memory: StandbyMemory, state: FleetState) -> StandbyMemory:
        """Memory after a look at the fleet: what is parked and empty has gone to sleep.

        Parameters
        ----------
        memory : StandbyMemory
            What is known before this update; it is not changed.
        state : FleetState
            State of the fleet now.
        """
        empty = (state.running_req + state.queue_req) <= 0.0
        asleep = ~memory.on & (empty | memory.asleep)
        if np.array_equal(asleep, memory.asleep):
            return memory
        return replace(memory, asleep=asleep)

    def serving(self, memory: StandbyMemory, state: FleetState) -> Bool:
        """Who can take new work now.

        Parameters
        ----------
        memory : StandbyMemory
            What :meth:`look` returned.
        state : FleetState
            State of the fleet now.

        Returns
        -------
        ndarray of bool, shape (n,)
            Who is on, awake and alive.
        """
        serves: Bool = memory.on & (memory.ready_s <= state.t_s + 1e-9)
        return serves & state.alive

    def order(
        self, memory: StandbyMemory, state: FleetState, wanted: Sequence[float] | np.ndarray
    ) -> StandbyMemory:
        """Memory after an order of how many of each group are to be on.

        Those that serve come first, then those that are awake soonest. Of equals the fuller stays
        on, so that what is parked is empty soon.

        Parameters
        ----------
        memory : StandbyMemory
            What :meth:`look` returned.
        state : FleetState
            State of the fleet now.
        wanted : sequence of float, length n_groups
            How many should serve or wake.
        """
        on = memory.on.copy()
        ready_s = memory.ready_s.copy()
        serving = self.serving(memory, state)
        for group, count in zip(self.groups, wanted, strict=True):
            waits_s = np.where(
                memory.on[group],
                np.maximum(ready_s[group] - state.t_s, 0.0),
                np.where(memory.asleep[group], self._wake_s[group], 0.0),
            )
            busy = state.running_req[group] + state.queue_req[group]
            # Most wanted first: alive, serving, soonest, fullest.
            order = np.lexsort((group, -busy, waits_s, ~serving[group], ~state.alive[group]))
            chosen = np.zeros(len(group), bool)
            chosen[order[: int(np.clip(count, 0, len(group)))]] = True
            # What is dead is on when it is back: it may be needed.
            chosen |= ~state.alive[group]
            woken = chosen & ~memory.on[group]
            ready_s[group] = np.where(woken, state.t_s + waits_s, ready_s[group])
            on[group] = chosen
        if np.array_equal(on, memory.on):
            return memory
        return StandbyMemory(on=on, asleep=memory.asleep & ~on, ready_s=ready_s)

    def enough(
        self,
        state: FleetState,
        supplies: Sequence[Supply],
        reserve: Callable[[float], F64],
        spare: float = 0.0,
    ) -> F64:
        """Fewest of each group that hold the reserve, however late one could wake more.

        No solver: for every time that something takes to wake, what will serve by then is
        compared with what may come then, and where it is too little, more are woken.

        Parameters
        ----------
        state : FleetState
            State of the fleet now.
        supplies : sequence of Supply, length n_groups
            What one instance of each group carries.
        reserve : callable
            ``reserve(lead_s)`` gives the load of each phase that must be carried then.
        spare : float
            How many of each phase may be lost besides; below 1 a share of those that are on.

        Returns
        -------
        ndarray, shape (n_groups,)
        """
        needed = np.zeros(len(self.groups))
        alive = [group[state.alive[group]] for group in self.groups]
        leads_s = sorted({0.0, *(float(self._wake_s[group].max()) for group in self.groups)})
        for phase in sorted(set(self._phases)):
            members = [g for g, of in enumerate(self._phases) if of == phase]
            for lead_s in leads_s:
                missing = float(reserve(lead_s)[phase])
                for g in members:
                    missing -= needed[g] * supplies[g].most_req_s
                for g in sorted(members, key=lambda g: -supplies[g].most_req_s):
                    each = supplies[g].most_req_s
                    free = len(alive[g]) - needed[g]
                    more = free if not np.isfinite(missing) else np.ceil(missing / each - 1e-9)
                    more = min(max(more, 0.0), free)
                    needed[g] += more
                    missing -= more * each
            if all(needed[g] == 0.0 for g in members):
                # Somebody serves, whatever is expected.
                first = next((g for g in members if len(alive[g])), members[0])
                needed[first] = 1.0
            # The fastest may be lost, so that as many of the fastest are added.
            lost = 0
            for g in sorted(members, key=lambda g: -supplies[g].most_req_s):
                while lost < spare_count(spare, int(needed[members].sum())) and (
                    needed[g] < len(alive[g])
                ):
                    needed[g] += 1.0
                    lost += 1
        return needed
