"""The target layer: the least-power steady state of a fleet under its promises.

Which instances are active, each one's share of the arrivals, and its clock. The least power of
one instance at a load is computed from the closed forms of :mod:`voltana_ctrl.physics` on a
grid of loads; the fleet's is their min-plus convolution, a dynamic programme over instances
with identical ones merged. Its differences are the prices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from voltana_ctrl.control._groups import Node, equal_groups
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.physics import Lengths, mg1_wait_s
from voltana_ctrl.types import FleetSpec, InstanceSpec, Role, Slo
from voltana_ctrl.types._check import F64, I64, Bool, count, not_negative, positive

__all__ = ["Curve", "Load", "Target", "TargetOptimiser", "batch_limit_req"]

#: Prompt lengths at which the tail of the prefill wait is averaged.
_NODES = np.array([NormalDist().inv_cdf((i + 0.5) / 24) for i in range(24)])


#: Part of the power of prefill that a change of its active set must save.
_PREFILL_PAYS_FRAC = 0.05
#: Least share of the load of an instance that stays active.
_LEAST_FRAC = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What arrives.

    Parameters
    ----------
    arrival_req_s : float
        Requests per second, over the fleet.
    lengths : Lengths
        Their prompt and output lengths.

    Raises
    ------
    ConfigError
        If the rate is negative or not finite.

    Examples
    --------
    >>> from voltana_ctrl.physics import length_moments
    >>> Load(arrival_req_s=10.0, lengths=length_moments([100, 300], [101, 301])).arrival_req_s
    10.0
    """

    arrival_req_s: float
    lengths: Lengths

    def __post_init__(self) -> None:
        not_negative("Load.arrival_req_s", self.arrival_req_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """Least power of one instance against its load.

    Parameters
    ----------
    arrival_req_s : ndarray, shape (n_loads,)
        Loads.
    power_w : ndarray, shape (n_loads,)
        Least power; inf where the promises cannot be kept.
    floor_row : ndarray of int, shape (n_loads,)
        Row of the clock (of the floor, where a governor runs above it).
    miss_frac : ndarray, shape (n_loads,)
        Share of requests predicted to miss.

    Examples
    --------
    >>> Curve.__slots__[0]
    'arrival_req_s'
    """

    arrival_req_s: F64
    power_w: F64
    floor_row: I64
    miss_frac: F64


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
        Energy that a change of the active set costs per instance.
    hold_s : float
        Time over which a change must earn that back.

    Raises
    ------
    ConfigError
        If a number is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.physics import length_moments
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
        from voltana_ctrl._kernels import target as kernels

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
        self._miss_frac = 1.0 - slo.attainment
        phases = [fleet.decode] if fleet.colocated else [fleet.prefill, fleet.decode]
        self._phases = [(members, equal_groups(fleet, members)) for members in phases]

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
            self._plan_phase(load, members, groups, active, usable, pace_frac)
            for members, groups in self._phases
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
        >>> from voltana_ctrl.physics import length_moments
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> lengths = length_moments([240, 240], [200, 200])
        >>> optimiser.curve(fleet.instances[1], np.array([5.0, 80.0]), lengths).power_w.round(1)
        array([117.2,   inf])
        """
        if instance.role is Role.PREFILL:
            return self._prefill_curve(instance, loads_req_s, lengths)
        return self._decode_curve(instance, loads_req_s, lengths, pace_frac)

    def _prefill_curve(self, instance: InstanceSpec, loads_req_s: F64, lengths: Lengths) -> Curve:
        """M/G/1 with exponential tail of the wait; base time shared by those that queue.

        ``P(W > t) = rho exp(-rho t / E[W])`` with Pollaczek-Khinchine's ``E[W]`` is the
        heavy-traffic approximation of Kingman (1962), exact for M/M/1.
        """
        rows = instance.table[:, None]
        ttft_s = self.slo.ttft_s / (1.0 + self.margin_frac[0]) - self.delay_s
        prompt, sd = lengths.prompt_tok, lengths.prompt_sd_tok
        square = prompt**2 + sd**2
        work_s = rows["prefill_tok_s"] * prompt + rows["prefill_tok2_s"] * square
        # Those that arrive during one iteration share the base time of the next; the longest
        # that a cycle can be is half the promise.
        cycles_s = np.minimum(loads_req_s, 2.0 / ttft_s)
        rho = loads_req_s * work_s + cycles_s * rows["prefill_base_s"]
        power_w = np.where(
            rho < 1.0,
            instance.idle_w + rho * (rows["prefill_power_w"] - instance.idle_w),
            np.inf,
        )
        service_s = rho / np.maximum(loads_req_s, 1e-12)
        spread = math.sqrt(math.log1p((sd / prompt) ** 2))
        wait_s = mg1_wait_s(loads_req_s, service_s, work_s * sd / prompt)
        miss = np.zeros_like(rho)
        for node in _NODES:
            tok = prompt * math.exp(spread * node - spread**2 / 2.0)
            own_s = rows["prefill_base_s"] + rows["prefill_tok_s"] * tok
            left_s = ttft_s - own_s
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                tail = rho * np.exp(-rho * np.maximum(left_s, 0.0) / wait_s)
            miss += np.where((left_s > 0.0) & (rho < 1.0), tail, 1.0) / _NODES.size
        if self.governed:
            # The governor raises to the top when the queue asks for it.
            miss = np.broadcast_to(miss[-1], miss.shape)
        allowed = np.where(miss <= self._miss_frac, power_w, np.inf)
        row = np.argmin(allowed, axis=0)
        column = np.arange(len(loads_req_s))
        least_w = allowed[row, column]
        feasible = np.isfinite(least_w)
        top = len(instance.clocks_mhz) - 1
        if self.governed:
            # Slower than what arrives is to postpone work, which only a clock that answers
            # well within the promise makes up for.
            late = 3.0 * self.delay_s / self.slo.ttft_s
            row = np.count_nonzero(min(1.0, late) * rho >= 1.0, axis=0)
            row = np.minimum(row, top)
        return Curve(
            arrival_req_s=loads_req_s,
            power_w=least_w,
            floor_row=row if self.governed else np.where(feasible, row, top),
            miss_frac=miss[row, column],
        )

    def _decode_curve(
        self, instance: InstanceSpec, loads_req_s: F64, lengths: Lengths, pace_frac: float
    ) -> Curve:
        station = self.station(instance, lengths, pace_frac)
        limit_s = self.slo.itl_s / (1.0 + 1.0 / max(1.0, lengths.output_tok - 1.0))
        least_w = np.empty(len(loads_req_s))
        floor_row = np.empty(len(loads_req_s), dtype=np.int64)
        over = np.empty(len(loads_req_s))
        self._kernels.decode_curve(
            *station,
            np.ascontiguousarray(loads_req_s, dtype=np.float64),
            lengths.output_tok - 1.0,
            batch_limit_req(instance, lengths),
            limit_s,
            self._miss_frac,
            instance.idle_w,
            least_w,
            floor_row,
            over,
        )
        return Curve(
            arrival_req_s=loads_req_s, power_w=least_w, floor_row=floor_row, miss_frac=over
        )

    def station(
        self, instance: InstanceSpec, lengths: Lengths, pace_frac: float = 1.0
    ) -> tuple[Any, ...]:
        """What the kernel `station` begins with, of an instance.

        Parameters
        ----------
        instance, lengths, pace_frac
            As of :meth:`curve`.
        """
        rows = instance.table[:, None]
        sizes = np.arange(instance.max_batch + 1, dtype=np.float64)
        padded = instance.profile.padded_batch(instance.max_batch)
        kv_tok = sizes * lengths.context_tok
        step_s = np.maximum(
            rows["decode_floor_s"],
            rows["decode_base_s"] + rows["decode_req_s"] * padded + rows["decode_kv_s"] * kv_tok,
        )
        step_s = pace_frac * step_s
        power_w = (
            rows["decode_power_w"]
            + (rows["decode_iter_j"] + rows["decode_req_j"] * sizes + rows["decode_kv_j"] * kv_tok)
            / step_s
        )
        target_s = self.slo.itl_s / (1.0 + self.margin_frac[1])
        needed = np.zeros(sizes.size, dtype=np.int64)
        if self.governed:
            fast = step_s <= target_s
            needed = np.where(fast.any(axis=0), fast.argmax(axis=0), len(rows) - 1)
        prompt_s = np.zeros(len(rows))
        if instance.role is Role.COLOCATED:
            square = lengths.prompt_tok**2 + lengths.prompt_sd_tok**2
            prompt_s = (
                instance.table["prefill_tok_s"] * lengths.prompt_tok
                + instance.table["prefill_tok2_s"] * square
            )
        return (
            np.ascontiguousarray(step_s),
            np.ascontiguousarray(power_w),
            needed.astype(np.int64),
            np.ascontiguousarray(prompt_s),
            np.ascontiguousarray(instance.table["prefill_power_w"]),
        )

    # From one instance to the fleet

    def _plan_phase(
        self,
        load: Load,
        members: I64,
        groups: list[I64],
        active: Bool | None,
        usable: Bool,
        pace_frac: float,
    ) -> Target:
        groups = [group[usable[group]] for group in groups]
        groups = [group for group in groups if group.size]
        if not groups:
            groups = equal_groups(self.fleet, members)
        curves = [self._group_curve(group, load, pace_frac) for group in groups]
        free_w, free = self._split(load, groups, curves, [True] * len(groups))
        chosen = free
        if active is not None and any(np.any(active[group]) for group in groups):
            stay = [group[active[group]] for group in groups]
            keep = [k for k, group in enumerate(stay) if group.size]
            stay_w, kept = self._split(
                load, [stay[k] for k in keep], [curves[k] for k in keep], [False] * len(keep)
            )
            stay_w += sum(
                self.fleet.instances[i].idle_w for group in groups for i in group if not active[i]
            )
            changed = np.count_nonzero((free > 0.0)[members] != active[members])
            pays_w = self.wake_j * changed / self.hold_s
            if not self.fleet.instances[int(members[0])].role.decodes:
                # Idle is idle, parked or not: it is the launches saved against longer queues.
                pays_w += _PREFILL_PAYS_FRAC * stay_w
            if np.isfinite(stay_w) and stay_w - free_w <= pays_w:
                # Who stays active gets a share, be it small.
                chosen = kept
                for group in stay:
                    chosen[group] = np.maximum(kept[group], _LEAST_FRAC * load.arrival_req_s)
                chosen *= load.arrival_req_s / max(chosen.sum(), 1e-300)
        return self._target(load, members, groups, chosen, pace_frac)

    def _group_curve(self, group: I64, load: Load, pace_frac: float) -> tuple[F64, F64]:
        instance = self.fleet.instances[int(group[0])]
        # A grid that ends at the load where this instance saturates, or at the whole load.
        top_req_s = max(load.arrival_req_s, 1e-9)
        for _ in range(2):
            loads = top_req_s * np.arange(1, self.grid + 1) / self.grid
            power_w = self.curve(instance, loads, load.lengths, pace_frac).power_w
            able = int(np.isfinite(power_w).sum())
            if able >= self.grid // 2:
                break
            top_req_s *= max(able + 1, 2) / self.grid
        return loads, power_w

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
            idle_w = self.fleet.instances[int(group[0])].idle_w
            leaf_w = np.concatenate([[idle_w if park else power_w[0]], power_w])
            leaf = Node(step=grid_req_s[0], cost_w=leaf_w)
            tables.append(self._power_of(leaf, group.size, load.arrival_req_s, {}))
        root = tables[0]
        for other in tables[1:]:
            root = self._join(root, other, load.arrival_req_s)
        at = min(math.ceil(load.arrival_req_s / root.step - 1e-9), len(root.cost_w) - 1)
        reaches = at * root.step >= load.arrival_req_s * (1.0 - 1e-9)
        if not (reaches and np.isfinite(root.cost_w[at])):
            return math.inf, loads_req_s
        found: list[float] = []
        root.collect(at, found)
        start = 0
        for group in groups:
            shares = sorted(found[start : start + group.size], reverse=True)
            loads_req_s[group] = shares
            start += group.size
        total = loads_req_s.sum()
        return float(root.cost_w[at]), loads_req_s * (load.arrival_req_s / max(total, 1e-300))

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
        loads_req_s: F64,
        pace_frac: float,
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
        floor_mhz[members] = self.fleet.min_mhz[members]
        for group in groups:
            instance = self.fleet.instances[int(group[0])]
            distinct, which = np.unique(loads_req_s[group], return_inverse=True)
            # Wide enough to see past the rungs of the ladder.
            step = max(0.02 * float(distinct.max()), 1e-6)
            at = self.curve(
                instance,
                np.concatenate([np.maximum(distinct, step), np.maximum(distinct, step) + step]),
                load.lengths,
                pace_frac,
            )
            here, above = at.power_w[: distinct.size], at.power_w[distinct.size :]
            with np.errstate(invalid="ignore"):
                slope = (above - here) / step
            # Beyond what can be served, a price that nobody takes.
            known = slope[np.isfinite(slope)]
            worst = 10.0 * known.max() if known.size else 1e3
            slope = np.where(np.isfinite(slope), slope, worst)
            on = distinct > 0.0
            power = np.where(on, np.where(np.isfinite(here), here, 0.0), instance.idle_w)
            clocks = np.where(
                on, instance.clocks_mhz[at.floor_row[: distinct.size]], instance.clocks_mhz[0]
            )
            floor_mhz[group] = clocks[which]
            power_w[group] = power[which]
            price_j_req[group] = slope[which]
        return Target(
            active=active & np.isin(np.arange(n), members),
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
            return float(1.0 / (row["prefill_tok_s"] * load.lengths.prompt_tok))
        growth_s = row["decode_req_s"] + row["decode_kv_s"] * load.lengths.context_tok
        return float(1.0 / (growth_s * max(1.0, load.lengths.output_tok - 1.0)))


def batch_limit_req(instance: InstanceSpec, lengths: Lengths) -> int:
    """Largest batch whose KV tokens fit but for one time in a hundred.

    Parameters
    ----------
    instance, lengths
        As of :meth:`TargetOptimiser.curve`.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.physics import length_moments
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> batch_limit_req(fleet.instances[1], length_moments([4000, 4000], [801, 801]))
    100
    """
    sizes = np.arange(1, instance.max_batch + 1)
    kv_tok = sizes * lengths.context_tok + 2.33 * lengths.context_sd_tok * np.sqrt(sizes)
    return int(np.count_nonzero(kv_tok <= 0.99 * instance.kv_capacity_tok))
