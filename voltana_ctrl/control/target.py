"""The target layer: the least-power steady state of a fleet under its promises.

Which instances are active, each one's share of the arrivals, and its clock. The least power of
one instance at a load is computed from the closed forms of :mod:`voltana_ctrl.laws` on a
grid of loads; the fleet's is their min-plus convolution, a dynamic programme over instances
with identical ones merged. Its differences are the prices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, count, not_negative, positive
from voltana_ctrl.control.curve import Curve, LeastPower, Target
from voltana_ctrl.control.groups import Node, equal_groups, everybody_on, joined, many
from voltana_ctrl.control.near import near
from voltana_ctrl.control.spare import spare_count, speeds_req_s, with_spare
from voltana_ctrl.control.supply import FACETS, Supply, drain_of, leaving_j, supply_of
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import (
    Belief,
    FleetSpec,
    FleetState,
    InstanceSpec,
    Lengths,
    Load,
    Role,
    Slo,
    Tuning,
)

__all__ = ["Curve", "Target", "TargetOptimiser"]

_CurveOf = Callable[[F64], Curve]

#: Beliefs that differ less are planned as one: paces by this factor, margins and delays by these
#: steps. Else no two instances would be alike.
_PACE_STEP, _MARGIN_STEP, _DELAY_STEP_S = 1.05, 0.005, 0.005
#: Settings by belief that are kept.
_KEPT = 256


class TargetOptimiser:
    """Least-power active set, shares and clocks for a steady load.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promises; as many misses as `attainment` allows are planned for.
    margin_frac : tuple of float, optional
        TTFT and ITL margin, see :class:`voltana_ctrl.control.IterationGovernor`.
    delay_s : float
        Time from asking for a clock until it runs.
    governed : bool
        Whether governors run: the floor may then lie below what bursts need.
    grid : int
        Loads per instance and group at which power is evaluated.
    tuning : Tuning, optional
        What is chosen rather than derived; the defaults if left out.
    spare : float
        Instances that each phase may lose and still keep the promises on those that stay active:
        a whole number, or below 1 a share of the active ones, rounded up. Where the fleet has not
        so many, all are active.
    period_s : float
        Time between two targets.

    Raises
    ------
    ConfigError
        If a number is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> target = optimiser.plan(load)
    >>> target.active, target.route_frac
    (array([ True, False,  True, False]), array([1., 0., 1., 0.]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        margin_frac: tuple[float, float] | None = None,
        delay_s: float = 0.025,
        governed: bool = True,
        grid: int = 128,
        tuning: Tuning | None = None,
        spare: float = 0.0,
        period_s: float = 1.0,
    ) -> None:
        count("TargetOptimiser.grid", grid, minimum=8)
        not_negative("TargetOptimiser.delay_s", delay_s)
        spare_count(spare)
        positive("TargetOptimiser.period_s", period_s)
        self.tuning = tuning or Tuning()
        margin_frac = margin_frac or self.tuning.margin_frac
        if not min(margin_frac) > -1.0:
            raise ConfigError(
                f"TargetOptimiser.margin_frac: expected numbers > -1, got {margin_frac}"
            )
        self.fleet = fleet
        self.slo = slo
        self.margin_frac = margin_frac
        self.delay_s = delay_s
        self.governed = governed
        self.grid = grid
        self.spare = spare
        self.period_s = period_s
        self._parked_w = np.array([one.parked_w for one in fleet.instances], dtype=np.float64)
        self._wake_j = np.array([one.wake_j for one in fleet.instances], dtype=np.float64)
        self._min_mhz = fleet.min_mhz
        phases = [fleet.decode] if fleet.colocated else [fleet.prefill, fleet.decode]
        self._groups = [equal_groups(fleet, members) for members in phases]
        self._least = lru_cache(maxsize=_KEPT)(self._least_power)

    def plan(
        self,
        load: Load,
        *,
        active: Bool | None = None,
        usable: Bool | None = None,
        belief: Belief | None = None,
        forgone_j: Sequence[float] | F64 = (0.0, 0.0),
        lasted_s: float = 30.0,
        doubt_frac: float = 0.0,
        state: FleetState | None = None,
        fixed: bool = False,
    ) -> Target:
        """Least-power target at this load.

        The active set changes when it has cost as much more than the best one as the change costs
        (the rule of ski rental, Karlin et al. 1988: for one change at a steady load, no more than
        twice the least is spent); once it is the best, what it has cost is forgotten. A change
        costs the wake-up, and a tail: while running requests are served to their end on the old
        set, half of what the two sets differ in is lost. A smaller set for prefill has longer
        queues, and must save a part of the power besides. A set that cannot keep the promises, or
        has too few spare, changes at once. Who joins to decode must earn that it will drain one
        day, before somebody leaves again.

        Parameters
        ----------
        load : Load
            Arrivals and lengths.
        active : ndarray of bool, shape (n,), optional
            Who is active now; kept unless a change pays.
        usable : ndarray of bool, shape (n,), optional
            Who can serve; all by default. A phase without any is planned as if all could.
        belief : Belief, optional
            What was learnt about the instances; what the profiles say by default.
        forgone_j : sequence of float
            `forgone_j` of the last target, one number [J] per phase; infinite where the set that
            is active came about by chance, and a better one is to be taken at once.
        lasted_s : float
            Seconds since the last target.
        doubt_frac : float
            How uncertain the load is: a set that drops an instance must serve so much more.
        state : FleetState, optional
            State of the fleet now. What waits or runs tells how long one stays (Little's law;
            without, as long as is promised), and how large the batches can be that a floor is for.
        fixed : bool
            Whether all that are usable stay active: who is on is decided elsewhere.

        Returns
        -------
        Target
        """
        n = len(self.fleet)
        usable = np.ones(n, bool) if usable is None else np.asarray(usable, bool)
        rest = (lasted_s, doubt_frac, state, fixed)
        parts = [
            self._plan_phase(
                load, self._known(groups, belief), active, usable, forgone_j[phase], *rest
            )
            for phase, groups in enumerate(self._groups)
        ]
        return Target(
            active=np.sum([part.active for part in parts], axis=0) > 0,
            route_frac=np.sum([part.route_frac for part in parts], axis=0),
            floor_mhz=np.sum([part.floor_mhz for part in parts], axis=0),
            power_w=np.sum([part.power_w for part in parts], axis=0),
            price_j_req=np.sum([part.price_j_req for part in parts], axis=0),
            feasible=all(part.feasible for part in parts),
            forgone_j=np.concatenate([part.forgone_j for part in parts]),
        )

    def curve(
        self,
        instance: InstanceSpec,
        loads_req_s: F64,
        lengths: Lengths,
    ) -> Curve:
        """Least power of one instance at each load.

        Parameters
        ----------
        instance : InstanceSpec
            One of the fleet.
        loads_req_s : ndarray, shape (n_loads,)
            Arrivals per second at this instance, > 0.
        lengths : Lengths
            Prompt and output lengths of the requests.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> lengths = length_moments([240, 240], [200, 200])
        >>> optimiser.curve(fleet.instances[1], np.array([5.0, 80.0]), lengths).power_w.round(1)
        array([111.8,   inf])
        """
        least = self._least_power(self.fleet.instances.index(instance), None)
        return least.at(lengths)(np.ascontiguousarray(loads_req_s, dtype=np.float64))

    @property
    def phases(self) -> list[list[I64]]:
        """Groups of equal instances (their numbers) by phase: prefill, decode; or one for both."""
        return self._groups

    def supplies(self, lengths: Lengths, belief: Belief | None = None) -> list[Supply] | None:
        """What one instance of each group carries and draws; None if one can carry nothing.

        In the order of :attr:`phases`; a group is taken for as fast as its slowest.

        Parameters
        ----------
        lengths : Lengths
            Prompt and output lengths of the requests.
        belief : Belief, optional
            What was learnt about the instances.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> supplies = optimiser.supplies(length_moments([240, 240], [200, 200]))
        >>> [round(each.most_req_s) for each in supplies]
        [54, 49]
        """
        supplies = []
        more = Load(arrival_req_s=1e4, lengths=lengths)
        for group in (group for groups in self._groups for group in groups):
            curves = [
                self._grid_curve(least.at(lengths), more)
                for _, least in self._known([group], belief)
            ]
            most_req_s = [loads[np.isfinite(power)].max(initial=0.0) for loads, power in curves]
            slowest = int(np.argmin(most_req_s))
            if most_req_s[slowest] == 0.0:
                return None
            first = self.fleet.instances[int(group[0])]
            stays_s = self._stays_s(first.role, lengths)
            # Who is let go has what one of two has that could carry all.
            held_req = 0.5 * most_req_s[slowest] * stays_s
            drains = first.role.decodes
            time_s, energy_j = (
                drain_of(first, held_req, lengths, self.slo.itl_s) if drains else (stays_s, None)
            )
            supplies.append(
                supply_of(
                    *curves[slowest], facets=FACETS, drain_s=time_s, drain_j=energy_j,
                    drain_req=held_req,
                )
            )  # fmt: skip
        return supplies

    def overload_frac(
        self,
        load: Load,
        route_frac: F64,
        belief: Belief | None = None,
        state: FleetState | None = None,
    ) -> float:
        """ITL margin on top of the governors' own that pays where promises cannot be kept; 0 else.

        The largest of any decode instance, see :meth:`LeastPower.overload_frac`; 0 while its batch
        is too small for it, and will be until there is time to catch up.

        Parameters
        ----------
        load, belief, state
            See :meth:`plan`.
        route_frac : ndarray, shape (n,)
            Share of the arrivals.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> load = Load(arrival_req_s=40.0, lengths=length_moments([240, 240], [200, 200]))
        >>> optimiser.overload_frac(load, np.ones(2))
        0.0
        """
        rates_req_s = load.arrival_req_s * route_frac
        by_then = near(self.fleet, self.slo, load, rates_req_s, state, self.tuning.catch_up_s)
        found_frac = 0.0
        for group, least in self._known(self._groups[-1], belief):
            rate_req_s, most_req = (float(x[group].max()) for x in (rates_req_s, by_then.most_req))
            if math.isinf(most_req) or not least.keeps(rate_req_s, by_then.lengths, most_req):
                found_frac = max(found_frac, least.overload_frac(rate_req_s, load.lengths))
        return found_frac

    def _known(self, groups: Sequence[I64], belief: Belief | None) -> list[tuple[I64, LeastPower]]:
        """Groups of instances that are equal, and are believed to be, with their least power."""
        if belief is None:
            return [(group, self._least(int(group[0]), None)) for group in groups]
        keys = np.stack(
            [
                np.rint(np.log(belief.prefill_pace_frac) / math.log(_PACE_STEP)),
                np.rint(np.log(belief.decode_pace_frac) / math.log(_PACE_STEP)),
                belief.able_mhz,
                np.rint(belief.ttft_margin_frac / _MARGIN_STEP),
                np.rint(belief.itl_margin_frac / _MARGIN_STEP),
                np.rint(belief.delay_s / _DELAY_STEP_S),
            ],
            axis=1,
        )
        known = []
        for group in groups:
            kinds, which = np.unique(keys[group], axis=0, return_inverse=True)
            for k, kind in enumerate(kinds):
                part = group[which.reshape(-1) == k]
                known.append((part, self._least(int(group[0]), tuple(kind.tolist()))))
        return known

    def _least_power(self, i: int, kind: tuple[float, ...] | None) -> LeastPower:
        instance = self.fleet.instances[i]
        believed: dict[str, Any] = {"margin_frac": self.margin_frac, "delay_s": self.delay_s}
        if kind is not None:
            prefill, decode, able_mhz, ttft, itl, delay = kind
            believed = {
                "pace_frac": (_PACE_STEP**prefill, _PACE_STEP**decode),
                "able_mhz": able_mhz,
                "margin_frac": (_MARGIN_STEP * ttft, _MARGIN_STEP * itl),
                "delay_s": _DELAY_STEP_S * delay,
            }
        return LeastPower(
            instance, self.slo, governed=self.governed, tuning=self.tuning, **believed
        )

    # From one instance to the fleet

    def _plan_phase(
        self,
        load: Load,
        known: Sequence[tuple[I64, LeastPower]],
        active: Bool | None,
        usable: Bool,
        forgone_j: float,
        lasted_s: float,
        doubt_frac: float,
        state: FleetState | None,
        fixed: bool,
    ) -> Target:
        left = [(group[usable[group]], least) for group, least in known]
        # Where nobody is left, the plan is for when they are back.
        left = [(group, least) for group, least in left if group.size] or list(known)
        groups = [group for group, _ in left]
        members = np.concatenate([group for group, _ in known])
        curve_of = [least.at(load.lengths) for _, least in left]
        curves = [self._grid_curve(curve, load) for curve in curve_of]
        free_w, free = self._split(load, groups, curves, [not fixed] * len(groups))
        wanted = free > 0.0
        if self.spare and not fixed:
            wanted = with_spare(
                self.spare,
                wanted,
                speeds_req_s(len(self.fleet), left, load.lengths),
                lambda rest: self._serves(load, groups, curve_of, rest, 1.0),
            )
            if wanted.sum() > (free > 0.0).sum():
                free_w, free = self._keeping(load, groups, curves, wanted)
        chosen, now_forgone_j = free, 0.0
        present_req = None
        if state is not None:
            present_req = float((state.running_req + state.queue_req)[members].sum())
        if fixed and np.isfinite(free_w):
            chosen = everybody_on(free, groups, load.arrival_req_s)
        elif active is not None and any(np.any(active[group]) for group in groups):
            stay = [group[active[group]] for group in groups]
            stay_w, kept = self._keeping(load, groups, curves, active)
            if self.spare and active[members].sum() < wanted.sum():
                stay_w = math.inf
            changed = members[(free > 0.0)[members] != active[members]]
            role = self.fleet.instances[int(members[0])].role
            shrinks = bool(np.any(active[members] & (free <= 0.0)[members]))
            saved_w = stay_w - free_w
            if shrinks and not role.decodes:
                saved_w -= self.tuning.prefill_pays_frac * stay_w
            if shrinks and not self._serves(load, groups, curve_of, free, 1.0 + doubt_frac):
                saved_w = 0.0
            if saved_w > 0.0:
                now_forgone_j = forgone_j + saved_w * lasted_s
            now_forgone_j = now_forgone_j or min(0.0, forgone_j)  # what is owed stays so
            change_j = self._change_j(changed, stay_w - free_w, role, load, present_req)
            if np.isfinite(stay_w) and now_forgone_j <= change_j:
                chosen = everybody_on(kept, stay, load.arrival_req_s)
            else:
                stays_s, lengths = self._stays_s(role, load.lengths), load.lengths
                now_forgone_j = -sum(
                    come
                    * leaving_j(self.fleet.instances[group[0]], *curve, stays_s, lengths, self.slo)
                    for group, curve in zip(groups, curves, strict=True)
                    if (come := np.count_nonzero(~active[group] & (free[group] > 0.0)))
                )
        return self._target(load, members, left, curve_of, chosen, now_forgone_j, state)

    def _keeping(
        self,
        load: Load,
        groups: Sequence[I64],
        curves: Sequence[tuple[F64, F64]],
        active: Bool,
    ) -> tuple[float, F64]:
        """Cheapest loads with exactly these active, and what all draw; inf if they do not serve."""
        stay = [group[active[group]] for group in groups]
        keep = [k for k, group in enumerate(stay) if group.size]
        power_w, loads_req_s = self._split(
            load, [stay[k] for k in keep], [curves[k] for k in keep], [False] * len(keep)
        )
        parked_w = sum(float(self._parked_w[group[~active[group]]].sum()) for group in groups)
        return power_w + parked_w, loads_req_s

    def _serves(
        self,
        load: Load,
        groups: Sequence[I64],
        curve_of: Sequence[_CurveOf],
        loads_req_s: F64,
        factor: float,
    ) -> bool:
        """Whether those that have a load could also serve so many times all of it."""
        more = replace(load, arrival_req_s=factor * load.arrival_req_s)
        awake = [
            (group[loads_req_s[group] > 0.0], curve)
            for group, curve in zip(groups, curve_of, strict=True)
        ]
        awake = [(group, curve) for group, curve in awake if group.size]
        if not awake:
            return load.arrival_req_s == 0.0
        curves = [self._grid_curve(curve, more) for _, curve in awake]
        power_w, _ = self._split(more, [group for group, _ in awake], curves, [False] * len(awake))
        return math.isfinite(power_w)

    def _change_j(
        self, changed: I64, saved_w: float, role: Role, load: Load, present_req: float | None
    ) -> float:
        """Energy that a change of the active set costs: wake-ups, and what runs to its end."""
        stays_s = self._stays_s(role, load.lengths)
        if present_req is not None and load.arrival_req_s > 0.0:
            stays_s = min(stays_s, present_req / load.arrival_req_s)
        wake_j = float(np.maximum(self.tuning.wake_j, self._wake_j[changed]).sum())
        return wake_j + 0.5 * stays_s * max(0.0, saved_w)

    def _stays_s(self, role: Role, lengths: Lengths) -> float:
        """Time that a request spends on an instance."""
        decodes_s = max(0.0, lengths.output_tok - 1.0) * self.slo.itl_s if role.decodes else 0.0
        return self.slo.ttft_s + decodes_s

    def _grid_curve(self, curve: _CurveOf, load: Load) -> tuple[F64, F64]:
        """Least power on a grid that ends where the instance saturates, or at the whole load."""
        parts = np.arange(1, self.grid + 1) / self.grid
        top_req_s = max(load.arrival_req_s, 1e-9)
        # Each round narrows the grid up to 64 times: enough for any fleet.
        for _ in range(3):
            low, high = 0, self.grid // 2
            if _served(curve, top_req_s * parts[high - 1]):
                break
            while high - low > 1:
                middle = (low + high) // 2
                if _served(curve, top_req_s * parts[middle - 1]):
                    low = middle
                else:
                    high = middle
            top_req_s *= max(low + 1, 2) / self.grid
        loads = top_req_s * parts
        return loads, curve(loads).power_w

    def _split(
        self,
        load: Load,
        groups: Sequence[I64],
        curves: Sequence[tuple[F64, F64]],
        may_park: Sequence[bool],
    ) -> tuple[float, F64]:
        """Cheapest loads of all instances, shape (n,), and what they draw; inf if none."""
        loads_req_s = np.zeros(len(self.fleet))
        tables: list[Node] = []
        for group, (grid_req_s, power_w), park in zip(groups, curves, may_park, strict=True):
            parked_w = self._parked_w[group[0]]
            leaf_w = np.concatenate([[parked_w if park else power_w[0]], power_w])
            leaf = Node(step=grid_req_s[0], cost_w=leaf_w)
            tables.append(many(leaf, group.size, self.grid, load.arrival_req_s))
        root = tables[0]
        for other in tables[1:]:
            root = joined(root, other, self.grid, load.arrival_req_s)
        at = min(math.ceil(load.arrival_req_s / root.step - 1e-9), len(root.cost_w) - 1)
        reaches = at * root.step >= load.arrival_req_s * (1.0 - 1e-9)
        if not (reaches and np.isfinite(root.cost_w[at])):
            return math.inf, loads_req_s
        cost_w = float(root.cost_w[at])
        for group, table in zip(reversed(groups), reversed(tables), strict=True):
            here = at
            if table is not root:
                (root, at), (_, here) = root.children(at)
            loads_req_s[group] = table.loads(here)
        total = loads_req_s.sum()
        return cost_w, loads_req_s * (load.arrival_req_s / max(total, 1e-300))

    def _target(
        self,
        load: Load,
        members: I64,
        known: Sequence[tuple[I64, LeastPower]],
        curve_of: Sequence[_CurveOf],
        loads_req_s: F64,
        forgone_j: float,
        state: FleetState | None,
    ) -> Target:
        """Floors, powers and prices at these loads; everybody in proportion if there are none."""
        n = len(self.fleet)
        groups = [group for group, _ in known]
        feasible = load.arrival_req_s == 0.0 or loads_req_s[members].sum() > 0.0
        if not feasible:
            weight = speeds_req_s(n, known, load.lengths)
            loads_req_s = load.arrival_req_s * weight / weight.sum()
        active = loads_req_s > 0.0
        if not active.any():
            active[groups[0][0]] = True
        route_frac = np.zeros(n)
        if loads_req_s.sum() > 0.0:
            route_frac = loads_req_s / loads_req_s.sum()
        else:
            route_frac[active] = 1.0 / active.sum()
        floor_mhz = np.zeros(n)
        power_w = np.zeros(n)
        price_j_req = np.zeros(n)
        floor_mhz[members] = self._min_mhz[members]
        by_then = near(self.fleet, self.slo, load, loads_req_s, state, self.period_s)
        for (group, least), curve in zip(known, curve_of, strict=True):
            instance = self.fleet.instances[int(group[0])]
            distinct, one, which = np.unique(
                loads_req_s[group], return_index=True, return_inverse=True
            )
            # Wide enough to see past the rungs of the ladder.
            step = max(0.02 * float(distinct.max()), 1e-6)
            loads = np.where(distinct > 0.0, distinct, step)
            at = curve(np.concatenate([loads, loads + step]))
            here, above = at.power_w[: distinct.size], at.power_w[distinct.size :]
            with np.errstate(invalid="ignore"):
                slope = (above - here) / step
            # Beyond what can be served, a price that nobody takes.
            told = slope[np.isfinite(slope)]
            worst = 10.0 * told.max() if told.size else 1e3
            slope = np.where(np.isfinite(slope), slope, worst)
            on = distinct > 0.0
            power = np.where(on, np.where(np.isfinite(here), here, 0.0), instance.parked_w)
            rows = at.floor_row[: distinct.size]
            if self.governed and state is not None and instance.role is Role.DECODE:
                ends = zip(loads, by_then.most_req[group[one]], strict=True)
                rows = np.array([least.floor_row(x, by_then.lengths, most) for x, most in ends])
            clocks = np.where(on, instance.clocks_mhz[rows], instance.clocks_mhz[0])
            floor_mhz[group] = clocks[which]
            power_w[group] = power[which]
            price_j_req[group] = slope[which]
        return Target(
            active=active,
            route_frac=route_frac,
            floor_mhz=floor_mhz,
            power_w=power_w,
            price_j_req=price_j_req,
            feasible=bool(feasible),
            forgone_j=np.array([forgone_j]),
        )


def _served(curve: _CurveOf, load_req_s: float) -> bool:
    return math.isfinite(curve(np.array([load_req_s])).power_w[0])
