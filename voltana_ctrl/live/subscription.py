"""A router that obeys a controller, and knows how to route without one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.live.link import ControllerLink
from voltana_ctrl.live.orders import decision_of
from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.router.policy import PolicyRouters, StateSource
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    Order,
    Request,
    Slo,
)

__all__ = ["SubscribedRouters", "Subscription"]

#: So deep an instance does not answer when a request comes.
_DEEP = ("asleep", "off")


class SubscribedRouters(PolicyRouters):
    """Routers of a policy that follow a controller, and route by load while it says nothing.

    Who is parked gets nothing as long as another instance of its phase lives. Without a decision
    that holds, a request goes to the least loaded of those that are neither asleep nor off.

    Parameters
    ----------
    fleet, policy, slo
        See :class:`~voltana_ctrl.router.policy.PolicyRouters`.
    valid_s : float
        Seconds that a decision holds without a newer one.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        See :class:`~voltana_ctrl.router.policy.PolicyRouters`.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> routers = SubscribedRouters(fleet, "mpc")
    >>> routers.alone
    True
    >>> parked = replace(Decision.highest(fleet), active=[True, False, True], route_frac=[1, 0, 1])
    >>> routers.update(parked)
    >>> request, state = Request(prompt_tok=400), FleetState.idle(3)
    >>> routers.alone, {routers.route(request, state) for _ in range(9)}
    (False, {2})
    """

    def __init__(
        self,
        fleet: FleetSpec,
        policy: str,
        slo: Slo | None = None,
        *,
        valid_s: float = 1.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._valid_s, self._now_s = valid_s, now_s
        self._updated_s = -np.inf
        self._able = np.ones(len(fleet), bool)
        self._awake = np.ones(len(fleet), bool)
        by_load = "static-max+jsq" if fleet.colocated else "static-max+least-queue/jsq"
        self._by_load = PolicyRouters(fleet, by_load, slo)
        super().__init__(fleet, policy, slo)
        self.policy = policy
        self._updated_s = -np.inf  # what it starts with is no word of a controller

    @property
    def alone(self) -> bool:
        """Whether no decision holds: routing goes by load alone."""
        return self._now_s() - self._updated_s > self._valid_s

    def use_policy(self, policy: str) -> None:
        """Route as another policy does, from the next request on.

        Parameters
        ----------
        policy : str
            Name of the other policy.
        """
        if policy != self.policy:
            made = PolicyRouters(self.fleet, policy, self.slo)
            self._routers, self.decode_at_arrival = made._routers, made.decode_at_arrival
            self.policy = policy

    def update(self, decision: Decision) -> None:
        """Take shares, active set and prices of the latest decision."""
        super().update(decision)
        self._able = np.array(decision.active)
        self._updated_s = self._now_s()

    def rest(self, deep: Collection[int]) -> None:
        """Take who is so deep asleep that nothing may be sent there, controller or not.

        Parameters
        ----------
        deep : collection of int
            Indices of these instances.
        """
        awake = np.ones(len(self.fleet), bool)
        awake[list(deep)] = False
        self._awake = awake

    def _pick(self, phase: str, request: Request, state: FleetState, tried: Set[int]) -> int:
        alone = self.alone
        able = self._awake if alone else self._awake & self._able
        left = [i for i in self._members[phase] if able[i] and state.alive[i]]
        if left and len(left) < len(self._members[phase]):
            state = replace(state, alive=state.alive & able)
        if alone:
            return self._by_load._pick(phase, request, state, tried)
        return super()._pick(phase, request, state, tried)


class Subscription:
    """The line of a router to its controller: reports requests, takes orders, in a thread.

    Parameters
    ----------
    link : ControllerLink
        The line, of kind "router".
    routers : SubscribedRouters
        Routers that obey the orders.
    counts : InFlight
        Requests that the router has in flight.
    traffic : Traffic
        Requests that it has sent, by instance, and how they ended; read here alone.
    period_s : float
        Seconds between two reports.
    say : callable
        Called with a line when a controller is lost or found.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.engines import Traffic
    >>> from voltana_ctrl.live.link import ControllerLink
    >>> from voltana_ctrl.router import InFlight
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> routers, traffic = SubscribedRouters(fleet, "mpc"), Traffic(len(fleet))
    >>> counts = InFlight(fleet, traffic=traffic)
    >>> with (ControllerLink("http://127.0.0.1:9", "0123456789abcdef", fleet, "r0", fleet.ids,
    ...                      kind="router") as link,
    ...       Subscription(link, routers, counts, traffic)):
    ...     routers.alone  # nobody answers there: requests go by load
    True
    """

    def __init__(
        self,
        link: ControllerLink,
        routers: SubscribedRouters,
        counts: InFlight,
        traffic: Traffic,
        *,
        period_s: float = 0.1,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._link, self._routers = link, routers
        self._counts, self._traffic = counts, traffic
        self._period_s, self._say = period_s, say
        self._state = FleetState.idle(len(routers.fleet))
        self._number: tuple[str, int] | None = None
        self._was_alone = True
        self._said: set[str | None] = set()  # each failure once, until the controller is back
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="voltana-ctrl-route", daemon=True)
        self._thread.start()

    @property
    def state(self) -> FleetState:
        """State of the fleet as the controller told it last."""
        return self._state

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            self.exchange()

    def exchange(self) -> None:
        """Report once, and take over what has come."""
        arrived_req, arrived_tok, finished = self._traffic.read()
        own = self._counts.own(arrived_req=arrived_req, arrived_tok=arrived_tok)
        self._link.tell(Observation(state=own, finished=finished))
        orders = self._link.orders()
        if orders is not None and (orders.start, orders.number) != self._number:
            self._number = orders.start, orders.number
            self._routers.use_policy(orders.policy)
            self._routers.rest(_resting(orders.orders, self._routers.fleet))
            self._routers.update(decision_of(orders.orders, self._routers.fleet))
            if orders.state is not None:
                self._state = orders.state
        alone = self._routers.alone
        failure = self._link.failure if alone else None
        # At the start nobody is missed yet, unless the line says that something is wrong with it.
        if alone and (failure not in (None, *self._said) or not self._was_alone):
            self._said.add(failure)
            why = "" if failure is None else f" ({failure})"
            self._say(f"router: no controller{why}; requests go by load")
        elif self._was_alone and not alone:
            self._said.clear()
            self._say("router: requests go where the controller says")
        self._was_alone = alone

    def close(self) -> None:
        """Stop reporting; may be called twice."""
        self._closed.set()
        self._thread.join(5.0)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _resting(orders: Mapping[str, Order], fleet: FleetSpec) -> list[int]:
    deep = {name for name, one in orders.items() if not one.active and one.depth in _DEEP}
    return [i for i, name in enumerate(fleet.ids) if name in deep]


if TYPE_CHECKING:
    _: type[StateSource] = Subscription
