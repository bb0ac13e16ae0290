"""The target layer: the least-power steady state of a fleet under its promises.

Which instances are active, each one's share of the arrivals, and its clock. The least power of
one instance at a load is computed from the closed forms of :mod:`voltana_ctrl.laws` on a
grid of loads; the fleet's is their min-plus convolution, a dynamic programme over instances
with identical ones merged. Its differences are the prices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, count, not_negative, positive
from voltana_ctrl.control.curve import Curve, LeastPower
from voltana_ctrl.control.groups import Node, equal_groups
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import FleetSpec, InstanceSpec, Lengths, Load, Role, Slo

__all__ = ["Curve", "Target", "TargetOptimiser"]

_CurveOf = Callable[[F64], Curve]

#: Part of the power of prefill that a change of its active set must save.
_PREFILL_PAYS_FRAC = 0.05
#: Least share of the load of an instance that stays active.
_LEAST_FRAC = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """Where the fleet should settle.

    Parameters
    ----------
    active : ndarray of bool, shape (n,)
        Who takes new work.
    route_frac : ndarray, shape (n,)
        Share of the arrivals of its phase.
    floor_mhz : ndarray, shape (n,)
        Lowest clock; the clock itself where no governor runs.
    power_w : ndarray, shape (n,)
        Predicted mean power.
    price_j_req : ndarray, shape (n,)
        Marginal energy of one more request there.
    feasible : bool
        Whether the promises can be kept; if not, everybody is active and fast.

    Examples
    --------
    >>> Target.__slots__[0]
    'active'
    """

    active: Bool
    route_frac: F64
    floor_mhz: F64
    power_w: F64
    price_j_req: F64
    feasible: bool


class TargetOptimiser:
    """Least-power active set, shares and clocks for a steady load.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promises; as many misses as `attainment` allows are planned for.
    margin_frac : tuple of float
        TTFT and ITL margin, as of :class:`voltana_ctrl.control.IterationGovernor`.
    delay_s : float
        From asking for a clock until it runs.
    governed : bool
        Whether governors run: the floor may then lie below what bursts need.
    grid : int
        Loads per instance and group at which power is evaluated.
    wake_j : float
        Energy that a change of the active set costs per instance, if its own is not more.
    hold_s : float
        Time over which a change must earn that back.

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
        margin_frac: tuple[float, float] = (0.02, 0.035),
        delay_s: float = 0.025,
        governed: bool = True,
        grid: int = 128,
        wake_j: float = 100.0,
        hold_s: float = 30.0,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose import target as kernels

        count("TargetOptimiser.grid", grid, minimum=8)
        not_negative("TargetOptimiser.wake_j", wake_j)
        not_negative("TargetOptimiser.delay_s", delay_s)
        positive("TargetOptimiser.hold_s", hold_s)
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
        self.wake_j = wake_j
        self.hold_s = hold_s
        self._kernels = kernels
        self._parked_w = np.array([one.parked_w for one in fleet.instances], dtype=np.float64)
        self._wake_j = np.array([one.wake_j for one in fleet.instances], dtype=np.float64)
        self._min_mhz = fleet.min_mhz
        phases = [fleet.decode] if fleet.colocated else [fleet.prefill, fleet.decode]
        self._phases = [
            [(group, self._least_power(fleet.instances[int(group[0])])) for group in groups]
            for groups in (equal_groups(fleet, members) for members in phases)
        ]

    def plan(
        self,
        load: Load,
        *,
        active: Bool | None = None,
        usable: Bool | None = None,
        pace_frac: float = 1.0,
    ) -> Target:
        """Least-power target at this load.

        Parameters
        ----------
        load : Load
            Arrivals and lengths.
        active : ndarray of bool, shape (n,), optional
            Who is active now; kept unless a change pays.
        usable : ndarray of bool, shape (n,), optional
            Who is alive; all by default.
        pace_frac : float
            Decode iterations take so many times what profiles say.

        Returns
        -------
        Target
        """
        n = len(self.fleet)
        usable = np.ones(n, bool) if usable is None else np.asarray(usable, bool)
        parts = [
            self._plan_phase(load, groups, active, usable, pace_frac) for groups in self._phases
        ]
        return Target(
            active=np.sum([part.active for part in parts], axis=0) > 0,
            route_frac=np.sum([part.route_frac for part in parts], axis=0),
            floor_mhz=np.sum([part.floor_mhz for part in parts], axis=0),
            power_w=np.sum([part.power_w for part in parts], axis=0),
            price_j_req=np.sum([part.price_j_req for part in parts], axis=0),
            feasible=all(part.feasible for part in parts),
        )

    def curve(
        self,
        instance: InstanceSpec,
        loads_req_s: F64,
        lengths: Lengths,
        pace_frac: float = 1.0,
    ) -> Curve:
        """Least power of one instance at each load.

        Parameters
        ----------
        instance : InstanceSpec
            Which.
        loads_req_s : ndarray, shape (n_loads,)
            Arrivals per second at this instance, > 0.
        lengths : Lengths
            Of the requests.
        pace_frac : float
            As of :meth:`plan`.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> lengths = length_moments([240, 240], [200, 200])
        >>> optimiser.curve(fleet.instances[1], np.array([5.0, 80.0]), lengths).power_w.round(1)
        array([117.2,   inf])
        """
        least = self._least_power(instance)
        return least.at(lengths, pace_frac)(np.ascontiguousarray(loads_req_s, dtype=np.float64))

    def overload_frac(self, load: Load, route_frac: F64, pace_frac: float = 1.0) -> float:
        """ITL margin, on top of the governors' own, that pays where promises cannot be kept.

        The most of any decode instance, see :meth:`LeastPower.overload_frac`.

        Parameters
        ----------
        load, pace_frac
            As of :meth:`plan`.
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
        return max(
            least.overload_frac(
                load.arrival_req_s * float(route_frac[group].max()), load.lengths, pace_frac
            )
            for group, least in self._phases[-1]
        )

    def _least_power(self, instance: InstanceSpec) -> LeastPower:
        return LeastPower(
            instance,
            self.slo,
            margin_frac=self.margin_frac,
            delay_s=self.delay_s,
            governed=self.governed,
        )

    # From one instance to the fleet

    def _plan_phase(
        self,
        load: Load,
        known: Sequence[tuple[I64, LeastPower]],
        active: Bool | None,
        usable: Bool,
        pace_frac: float,
    ) -> Target:
        left = [(group[usable[group]], least) for group, least in known]
        # Where nobody is left, the plan is for when they are back.
        left = [(group, least) for group, least in left if group.size] or list(known)
        groups = [group for group, _ in left]
        members = np.concatenate([group for group, _ in known])
        curve_of = [least.at(load.lengths, pace_frac) for _, least in left]
        curves = [self._grid_curve(curve, load) for curve in curve_of]
        free_w, free = self._split(load, groups, curves, [True] * len(groups))
        chosen = free
        if active is not None and any(np.any(active[group]) for group in groups):
            stay = [group[active[group]] for group in groups]
            keep = [k for k, group in enumerate(stay) if group.size]
            stay_w, kept = self._split(
                load, [stay[k] for k in keep], [curves[k] for k in keep], [False] * len(keep)
            )
            stay_w += sum(float(self._parked_w[group[~active[group]]].sum()) for group in groups)
            changed = members[(free > 0.0)[members] != active[members]]
            change_j = float(np.maximum(self.wake_j, self._wake_j[changed]).sum())
            pays_w = change_j / self.hold_s
            if not self.fleet.instances[int(members[0])].role.decodes:
                # Mostly the launches saved, at the price of longer queues.
                pays_w += _PREFILL_PAYS_FRAC * stay_w
            if np.isfinite(stay_w) and stay_w - free_w <= pays_w:
                # Who stays active gets a share, be it small.
                chosen = kept
                for group in stay:
                    chosen[group] = np.maximum(kept[group], _LEAST_FRAC * load.arrival_req_s)
                chosen *= load.arrival_req_s / max(chosen.sum(), 1e-300)
        return self._target(load, members, groups, curve_of, chosen)

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
            tables.append(self._power_of(leaf, group.size, load.arrival_req_s, {}))
        root = tables[0]
        for other in tables[1:]:
            root = self._join(root, other, load.arrival_req_s)
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

    def _power_of(self, leaf: Node, size: int, limit: float, known: dict[int, Node]) -> Node:
        """`size` equal instances, by halves."""
        if size == 1:
            return leaf
        if size not in known:
            left = self._power_of(leaf, size - size // 2, limit, known)
            right = self._power_of(leaf, size // 2, limit, known)
            known[size] = self._join(left, right, limit)
        return known[size]

    def _join(self, left: Node, right: Node, limit: float) -> Node:
        reach = min(left.reach + right.reach, limit)
        points = self.grid
        step = max(reach / points, 1e-300)
        cost_w = np.empty(points + 1)
        left_at = np.empty(points + 1, dtype=np.int64)
        right_at = np.empty(points + 1, dtype=np.int64)
        self._kernels.min_plus(
            left.cost_w, left.step, right.cost_w, right.step, step, cost_w, left_at, right_at
        )
        return Node(
            step=step, cost_w=cost_w, left=left, right=right, left_at=left_at, right_at=right_at
        )

    def _target(
        self,
        load: Load,
        members: I64,
        groups: Sequence[I64],
        curve_of: Sequence[_CurveOf],
        loads_req_s: F64,
    ) -> Target:
        """Floors, powers and prices at these loads; everybody in proportion if there are none."""
        n = len(self.fleet)
        feasible = load.arrival_req_s == 0.0 or loads_req_s[members].sum() > 0.0
        if not feasible:
            loads_req_s = np.zeros(n)
            weight = np.concatenate(
                [np.full(len(group), self._speed(int(group[0]), load)) for group in groups]
            )
            loads_req_s[np.concatenate(groups)] = load.arrival_req_s * weight / weight.sum()
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
        for group, curve in zip(groups, curve_of, strict=True):
            instance = self.fleet.instances[int(group[0])]
            distinct, which = np.unique(loads_req_s[group], return_inverse=True)
            # Wide enough to see past the rungs of the ladder.
            step = max(0.02 * float(distinct.max()), 1e-6)
            loads = np.maximum(distinct, step)
            at = curve(np.concatenate([loads, loads + step]))
            here, above = at.power_w[: distinct.size], at.power_w[distinct.size :]
            with np.errstate(invalid="ignore"):
                slope = (above - here) / step
            # Beyond what can be served, a price that nobody takes.
            known = slope[np.isfinite(slope)]
            worst = 10.0 * known.max() if known.size else 1e3
            slope = np.where(np.isfinite(slope), slope, worst)
            on = distinct > 0.0
            power = np.where(on, np.where(np.isfinite(here), here, 0.0), instance.parked_w)
            clocks = np.where(
                on, instance.clocks_mhz[at.floor_row[: distinct.size]], instance.clocks_mhz[0]
            )
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
        )

    def _speed(self, i: int, load: Load) -> float:
        """Requests per second that instance i serves at its highest clock, about."""
        instance = self.fleet.instances[i]
        row = instance.table[-1]
        if instance.role is Role.PREFILL:
            prompt_s = row["prefill_tok_s"] * load.lengths.prompt_tok + row["prefill_req_s"]
            return float(1.0 / prompt_s)
        per_req_s = max(row["decode_req_s"], row["decode_roof_s"])
        growth_s = per_req_s + row["decode_kv_s"] * load.lengths.context_tok
        return float(1.0 / (growth_s * max(1.0, load.lengths.output_tok - 1.0)))


def _served(curve: _CurveOf, load_req_s: float) -> bool:
    return bool(np.isfinite(curve(np.array([load_req_s])).power_w[0]))
