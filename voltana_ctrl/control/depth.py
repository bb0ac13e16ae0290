"""How deep instances sleep that are parked: as deep as they wake from within one period."""

from __future__ import annotations

from dataclasses import replace

from voltana_ctrl.types import DEPTHS, Depth, FleetSpec

__all__ = ["at_rest"]


def at_rest(fleet: FleetSpec, period_s: float) -> tuple[FleetSpec, tuple[Depth, ...]]:
    """Fleet whose instances, once parked, sleep in the cheapest way that nobody has to foresee.

    Of the depths from which an instance wakes within one period the one that draws least. Where
    being parked takes longer itself, it stays so: the plan foresees that. A deeper sleep that takes
    longer is left alone: it would have to be planned a depth at a time.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    period_s : float
        Time between two targets.

    Returns
    -------
    FleetSpec, tuple of Depth
        The fleet with the numbers of that sleep in the place of being parked, and its name for
        each instance.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.types import Rest
    >>> plain = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> l20 = FleetSpec(tuple(
    ...     replace(one, deep_parked=Rest(power_w=36.0, wake_s=0.03)) for one in plain.instances))
    >>> rested, depth = at_rest(l20, 1.0)
    >>> rested.instances[0].parked_w, depth
    (36.0, ('deep_parked', 'deep_parked'))
    >>> at_rest(plain, 1.0)[1]
    ('parked', 'parked')
    """
    instances, chosen = [], []
    for one in fleet.instances:
        best: Depth = DEPTHS[0]
        if one.wake_s <= period_s:
            for depth in DEPTHS[1:]:
                rest = one.rest(depth)
                if rest.wake_s <= period_s and rest.power_w < one.rest(best).power_w:
                    best = depth
        rest = one.rest(best)
        instances.append(
            one
            if best == DEPTHS[0]
            else replace(one, asleep_w=rest.power_w, wake_s=rest.wake_s, wake_j=rest.wake_j)
        )
        chosen.append(best)
    if set(chosen) == {DEPTHS[0]}:
        return fleet, tuple(chosen)
    return FleetSpec(tuple(instances)), tuple(chosen)
