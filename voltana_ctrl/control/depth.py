"""How deep instances sleep: as they wake from within one period, or as a plan foresees."""

from __future__ import annotations

from dataclasses import replace

from voltana_ctrl.types import DEPTHS, Depth, FleetSpec

__all__ = ["at_rest", "planned_rest"]

#: Time that a sleep is taken to last where one is chosen that a plan has to foresee [s]: how far
#: plans look.
_LASTS_S = 120.0


def at_rest(fleet: FleetSpec, period_s: float) -> tuple[FleetSpec, tuple[Depth, ...]]:
    """Fleet whose instances, once parked, sleep in the cheapest way that nobody has to foresee.

    Of the depths from which an instance wakes within one period the one that draws least. Where
    being parked takes longer itself, it stays so: the plan foresees that. A deeper sleep that takes
    longer is for a plan to choose, see :func:`planned_rest`.

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


def planned_rest(fleet: FleetSpec, period_s: float) -> tuple[FleetSpec, tuple[Depth, ...] | None]:
    """Fleet whose instances sleep in a way that a plan has to foresee, beside being parked.

    Where everybody who is parked is back within one period, a deeper sleep that takes longer is one
    more choice: who is awake may be parked by the target, and who is not needed for long sleeps
    deeper by the plan. Of several such depths the one that saves most in two minutes, which is how
    far plans look: the power saved in the time that is left of them once it has fallen asleep and
    is awake again, less what waking costs.

    Parameters
    ----------
    fleet : FleetSpec
        What :func:`at_rest` returned.
    period_s : float
        Time between two targets.

    Returns
    -------
    FleetSpec, tuple of Depth or None
        The fleet with the numbers of that sleep in the place of being parked, and its name for
        each instance; the fleet as it is and None where there is nothing to choose.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.types import Rest
    >>> plain = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> stops = FleetSpec(tuple(
    ...     replace(one, off=Rest(power_w=54.0, wake_s=40.0)) for one in plain.instances))
    >>> planned, depth = planned_rest(stops, 1.0)
    >>> planned.instances[0].parked_w, planned.instances[0].wake_s, depth
    (54.0, 40.0, ('off', 'off'))
    >>> planned_rest(plain, 1.0)[1] is None
    True
    """
    if any(one.wake_s > period_s for one in fleet.instances):
        return fleet, None
    instances, chosen = [], []
    for one in fleet.instances:
        best, most_j = DEPTHS[0], 0.0
        for depth in DEPTHS[1:]:
            rest = one.rest(depth)
            asleep_s = _LASTS_S - rest.enter_s - rest.wake_s
            saved_j = (one.parked_w - rest.power_w) * asleep_s - rest.wake_j
            if rest.wake_s > period_s and asleep_s > 0.0 and saved_j > most_j:
                best, most_j = depth, saved_j
        if best != DEPTHS[0]:
            rest = one.rest(best)
            # Who is woken while it falls asleep has to get there first.
            wake_s = rest.enter_s + rest.wake_s
            one = replace(one, asleep_w=rest.power_w, wake_s=wake_s, wake_j=rest.wake_j)
        instances.append(one)
        chosen.append(best)
    if set(chosen) == {DEPTHS[0]}:
        return fleet, None
    return FleetSpec(tuple(instances)), tuple(chosen)
