"""Clocks that keep a fleet within a power budget whatever its load."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.control.assess import Assessment
from voltana_ctrl.control.target import Target
from voltana_ctrl.laws import batch_j, decode_s
from voltana_ctrl.types import FleetSpec, InstanceSpec, Load
from voltana_ctrl.types.ladder import row_down

__all__ = [
    "UniformCeiling",
    "ceilings_within",
    "highest_power_w",
    "target_within",
]


def highest_power_w(instance: InstanceSpec) -> F64:
    """Highest power that an instance can draw at each of its clocks.

    The largest over prefill and over decode at every batch it can run, with as few KV tokens
    as that batch can have and with as many as fit (power is a ratio of functions affine in KV,
    so nothing between them is larger).

    Parameters
    ----------
    instance : InstanceSpec
        The instance, as believed.

    Returns
    -------
    ndarray, shape (n_clocks,)
        Watts, in the order of ``instance.clocks_mhz``.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> highest_power_w(fleet.instances[0])[[0, -1]].round(1)
    array([101.3, 400. ])
    """
    rows = instance.table[:, None]
    worst = np.full(len(rows), instance.idle_w)
    if instance.role.prefills:
        prompt_w = rows["prefill_power_w"][:, 0]
        if instance.role.decodes:
            prompt_w = prompt_w + rows["prefill_beside_w"][:, 0]
        worst = np.maximum(worst, prompt_w)
    if instance.role.decodes:
        running_req = np.arange(1.0, instance.max_batch + 1.0)
        for kv_tok in (running_req, float(instance.kv_capacity_tok)):
            step_s = decode_s(rows, running_req, kv_tok)
            power_w = rows["decode_power_w"] + batch_j(rows, running_req, kv_tok) / step_s
            worst = np.maximum(worst, power_w.max(axis=1))
    return worst


class UniformCeiling:
    """Highest common clock at which the fleet cannot draw more than a limit, whatever its load.

    An instance that does not support the clock takes its next lower one, or its lowest. Where even
    the lowest clocks may draw more than the limit, it is those.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> UniformCeiling(fleet).under(1200.0)
    array([1185., 1185., 1185., 1185.])
    """

    def __init__(self, fleet: FleetSpec) -> None:
        levels_mhz = np.unique(np.concatenate([one.clocks_mhz for one in fleet.instances]))
        self._idle_w = np.array([one.idle_w for one in fleet.instances])
        self._clocks_mhz = np.zeros((len(levels_mhz), len(fleet)))
        self._worst_w = np.zeros_like(self._clocks_mhz)
        for i, one in enumerate(fleet.instances):
            rows = [row_down(one.clocks_mhz, level_mhz) for level_mhz in levels_mhz]
            self._clocks_mhz[:, i] = one.clocks_mhz[rows]
            self._worst_w[:, i] = highest_power_w(one)[rows]

    def under(self, limit_w: float, busy: Bool | None = None) -> F64:
        """Clock of each instance; the lowest where even that may exceed the limit.

        Parameters
        ----------
        limit_w : float
            What the fleet may draw.
        busy : ndarray of bool, shape (n,), optional
            Who may have work; the others count with their idle power. All by default.

        Returns
        -------
        ndarray, shape (n,)
            Supported clocks in MHz.
        """
        drawn_w = self._worst_w if busy is None else np.where(busy, self._worst_w, self._idle_w)
        fits = np.flatnonzero(drawn_w.sum(axis=1) <= limit_w)
        level = int(fits[-1]) if fits.size else 0
        clocks: F64 = self._clocks_mhz[level].copy()
        return clocks


def ceilings_within(
    budget_w: float,
    now: Assessment,
    wanted_mhz: F64,
    before_mhz: F64 | None,
    *,
    prefills: Bool,
    max_mhz: F64,
    governed: bool,
) -> F64:
    """Ceilings under a budget; nobody rises before those that must fall have fallen.

    A governor is asked when an iteration begins, so what prefills keeps its clock until its
    iteration ends, whatever the ceiling says: the others have what that leaves.

    Parameters
    ----------
    budget_w : float
        What the fleet may draw.
    now : Assessment
        The fleet at this tick.
    wanted_mhz : ndarray, shape (n,)
        Clocks that decode needs.
    before_mhz : ndarray, shape (n,), optional
        Ceilings of the last tick; None at the first.
    prefills : ndarray of bool, shape (n,)
        Who prefills.
    max_mhz : ndarray, shape (n,)
        Highest clocks.
    governed : bool
        Whether governors choose the clocks of iterations.

    Returns
    -------
    ndarray, shape (n,)
        Supported clocks in MHz; see :meth:`~voltana_ctrl.control.assess.Assessor.decode_first_mhz`.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
    >>> from voltana_ctrl.control.assess import Assessment, Assessor
    >>> from voltana_ctrl.laws import length_moments
    >>> from voltana_ctrl.types import Belief, Load
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.035), delay_s=0.1)
    >>> now = Assessment(
    ...     by=Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06)), state=FleetState.idle(2), load=load,
    ...     route_frac=np.ones(2), active=np.ones(2, bool), belief=belief)
    >>> ceilings_within(
    ...     500.0, now, now.needed_mhz, None, prefills=np.array([True, False]),
    ...     max_mhz=fleet.max_mhz, governed=True)
    array([1245.,  210.])
    """
    assessor, state = now.by, now.state
    ceiling, _ = assessor.decode_first_mhz(now.worst_w, wanted_mhz, budget_w)
    before = max_mhz if before_mhz is None else before_mhz
    # What may still run: the clock that is seen, and one asked for a moment ago. Of those that
    # do not prefill it is gone with their next iteration.
    stays = (before <= ceiling) | (prefills & (state.queue_req > 0.0) & governed)
    running = np.maximum(state.freq_mhz, np.where(stays, before, 0.0))
    held = np.maximum(ceiling, running)
    held_w = assessor.power_at_w(now.worst_w, held)
    if held_w.sum() <= budget_w:
        return ceiling
    stuck = prefills & (state.queue_req > 0.0) & (running > ceiling)
    if governed and stuck.any():
        kept_w = np.where(stuck[:, None], held_w[:, None], now.worst_w)
        rest, _ = assessor.decode_first_mhz(kept_w, wanted_mhz, budget_w)
        ceiling = np.where(stuck, ceiling, np.minimum(rest, ceiling))
    return np.minimum(ceiling, before)


def target_within(
    budget_w: float, load: Load, target: Target, plan: Callable[[Load], Target]
) -> Target:
    """Target for as much of the load as the budget can carry.

    Parameters
    ----------
    budget_w : float
        What the fleet may draw; infinite without a budget.
    load : Load
        All that arrives.
    target : Target
        Target for all that arrives.
    plan : callable
        Plans for a part of it.

    Returns
    -------
    Target
        The one given, unless the budget binds.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.control import TargetOptimiser
    >>> from voltana_ctrl.laws import length_moments
    >>> from voltana_ctrl.types import Load
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> load = Load(arrival_req_s=60.0, lengths=length_moments([240, 240], [200, 200]))
    >>> whole = optimiser.plan(load)
    >>> part = target_within(500.0, load, whole, optimiser.plan)
    >>> bool(whole.power_w.sum() > 500.0 >= part.power_w.sum()), int(part.active[2:].sum())
    (True, 1)
    """

    def kept(part: Target) -> bool:
        return part.feasible and float(part.power_w.sum()) <= budget_w

    if not np.isfinite(budget_w) or kept(target):
        return target
    low, high, best, binds = 0.0, 1.0, None, target.feasible
    for _ in range(8):
        middle = (low + high) / 2.0
        part = plan(Load(arrival_req_s=middle * load.arrival_req_s, lengths=load.lengths))
        if kept(part):
            low, best = middle, part
        else:
            # Where capacity and not the budget sets the limit, nothing may be held back for it.
            high, binds = middle, part.feasible
    return best if best is not None and binds else target
