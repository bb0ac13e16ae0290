"""Reports and orders: what nodes, routers and their controller say to each other.

A node reports what it read of its instances, a router what it sent where and how it ended; the
answer is an order for each of the instances. Both carry the start id of their sender and a number
that counts up, so that a message that comes twice, or late, is known for what it is. As bytes
they are written and checked in :mod:`voltana_ctrl.live.messages`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from voltana_ctrl.types import (
    Belief,
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    Order,
    Role,
    Tuning,
)

__all__ = ["Orders", "Report", "SenderKind", "decision_of", "new_start", "orders_of"]

#: What is to be believed of an instance; its delay the node measures itself.
_BELIEVED = (
    "ttft_margin_frac",
    "itl_margin_frac",
    "prefill_pace_frac",
    "decode_pace_frac",
    "able_mhz",
)
#: Who reports.
SenderKind = Literal["node", "router"]


def new_start() -> str:
    """Id of one start of a sender: another one each time.

    Examples
    --------
    >>> len(new_start())
    16
    """
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one node read of its instances, or what one router did with them.

    Parameters
    ----------
    kind : {"node", "router"}
        Who reports.
    sender : str
        Its name, which no other of its kind has.
    start : str
        What :func:`new_start` returned.
    number : int
        Counts the reports of one start, from 0. A report that is sent again keeps its number.
    ids : tuple of str
        The instances reported.
    observation : Observation
        State of these instances, in this order; iterations and finished requests name
        instances by their index in the whole fleet. A router tells of its own requests alone.
    problems : mapping of str to str
        What is wrong with instances, in words, by the id of the instance.
    delay_s : mapping of str to float
        Seconds from asking for a clock until it runs, as measured, by the id of the instance.

    Examples
    --------
    >>> from voltana_ctrl import FleetState, Observation
    >>> Report(kind="node", sender="n0", start="a", number=0, ids=("d0",),
    ...        observation=Observation(state=FleetState.idle(1))).ids
    ('d0',)
    """

    kind: SenderKind
    sender: str
    start: str
    number: int
    ids: tuple[str, ...]
    observation: Observation
    problems: Mapping[str, str] = field(default_factory=dict)
    delay_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the controller wants of the instances that somebody reported.

    Parameters
    ----------
    start : str
        What :func:`new_start` returned.
    number : int
        Counts the decisions of one start of the controller, from 0.
    valid_s : float
        Seconds from now that they hold without newer ones.
    orders : mapping of str to Order
        The order for each instance, by its id.
    policy : str
        Policy whose governors choose clocks between floor and ceiling.
    state : FleetState, optional
        State of the whole fleet, for routers: what all of them and all engines told, merged.

    Examples
    --------
    >>> from voltana_ctrl.types import Order
    >>> Orders(start="a", number=0, valid_s=1.0,
    ...        orders={"d0": Order(floor_mhz=705.0, ceiling_mhz=1410.0)}).orders["d0"].active
    True
    """

    start: str
    number: int
    valid_s: float
    orders: Mapping[str, Order]
    policy: str = "mpc"
    state: FleetState | None = None


def orders_of(
    decision: Decision, fleet: FleetSpec, *, held_s: float = 0.0, budgeted: bool = True
) -> dict[str, Order]:
    """A decision as orders, one an instance.

    Parameters
    ----------
    decision : Decision
        Decision for the whole fleet.
    fleet : FleetSpec
        The fleet.
    held_s : float
        Seconds since it was made: ceilings announced with it are so much nearer.
    budgeted : bool
        Whether its ceilings are those of a power budget, which hold on when nobody decides any
        more. Those of a policy end with it: then an instance may go up to its highest clock.

    Returns
    -------
    dict of str to Order
        One for each instance of the fleet, by its id.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> orders_of(Decision.highest(fleet), fleet)["decode-0"].floor_mhz
    1410.0
    """
    belief, made, most_mhz = decision.belief, {}, fleet.max_mhz
    for i, name in enumerate(fleet.ids):
        believed: dict[str, Any] = {}
        if belief is not None:
            believed = {column: float(getattr(belief, column)[i]) for column in _BELIEVED}
        made[name] = Order(
            floor_mhz=float(decision.freq_mhz[i]),
            ceiling_mhz=float(decision.freq_max_mhz[i]),
            announced=tuple((after_s, float(mhz[i])) for after_s, mhz in decision.announced),
            alone_mhz=None if budgeted else float(max(most_mhz[i], decision.freq_max_mhz[i])),
            active=bool(decision.active[i]),
            route_frac=float(decision.route_frac[i]),
            price_j_req=float(decision.price_j_req[i]),
            role=None if decision.roles is None else decision.roles[i],
            depth="parked" if decision.depth is None else decision.depth[i],
            **believed,
        ).after(held_s)
    return made


def decision_of(orders: Mapping[str, Order], fleet: FleetSpec, *, t_s: float = 0.0) -> Decision:
    """Orders as a decision; instances without one are to run at their highest clocks.

    Parameters
    ----------
    orders : mapping of str to Order
        The order for each instance, by its id.
    fleet : FleetSpec
        The fleet.
    t_s : float
        Time in seconds at which the decision counts as made.

    Returns
    -------
    Decision
        For the whole fleet. It has a belief, roles or depths only where an order names them.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.types import Order
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> given = {"decode-0": Order(floor_mhz=705.0, ceiling_mhz=1410.0)}
    >>> decision_of(given, fleet).freq_mhz
    array([1410.,  705.])
    """
    highest = Decision.highest(fleet)
    columns: dict[str, Any] = {
        "freq_mhz": np.array(highest.freq_mhz),
        "freq_max_mhz": np.array(highest.freq_max_mhz),
        "route_frac": np.array(highest.route_frac),
        "active": np.array(highest.active),
        "price_j_req": np.zeros(len(fleet)),
    }
    profiles = Belief.of_profiles(fleet, margin_frac=Tuning().margin_frac, delay_s=0.025)
    believed = {name: np.array(getattr(profiles, name)) for name in (*_BELIEVED, "delay_s")}
    has_belief = False
    times_s = sorted({after_s for one in orders.values() for after_s, _ in one.announced})
    later = [(after_s, np.array(highest.freq_max_mhz)) for after_s in times_s]
    for i, name in enumerate(fleet.ids):
        order = orders.get(name)
        if order is None:
            continue
        columns["freq_mhz"][i] = order.floor_mhz
        columns["freq_max_mhz"][i] = order.ceiling_mhz
        for column in ("route_frac", "active", "price_j_req"):
            columns[column][i] = getattr(order, column)
        told = order.belief(delay_s=0.025)
        if told is not None:
            for column in (*_BELIEVED, "delay_s"):
                believed[column][i] = getattr(told, column)[0]
            has_belief = True
        for after_s, ceiling_mhz in later:
            ceiling_mhz[i] = order.after(after_s).ceiling_mhz
    belief = Belief(**believed) if has_belief else None
    depth = tuple(orders[name].depth if name in orders else "parked" for name in fleet.ids)
    return Decision(
        t_s=t_s,
        belief=belief,
        announced=tuple(later),
        roles=_roles(orders, fleet),
        depth=None if set(depth) == {"parked"} else depth,
        **columns,
    )


def _roles(orders: Mapping[str, Order], fleet: FleetSpec) -> tuple[Role, ...] | None:
    """Roles that were ordered; None where no order names one."""
    told = [orders[name].role if name in orders else None for name in fleet.ids]
    if not any(told):
        return None
    return tuple(role or one.role for role, one in zip(told, fleet.instances, strict=True))
