"""A node that does what a controller elsewhere says, and knows what to do without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from voltana_ctrl.control.base import Controller
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.live.link import ControllerLink
from voltana_ctrl.live.orders import decision_of
from voltana_ctrl.types import Decision, FleetSpec, Observation

__all__ = ["RemoteController", "RemoteMemory"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteMemory:
    """What the node remembers of its controller.

    Parameters
    ----------
    gone : bool
        Whether there are no orders in force.

    Examples
    --------
    >>> RemoteMemory(gone=True).gone
    True
    """

    gone: bool


class RemoteController(Controller):
    """Does what a controller elsewhere says; without it, the highest clock under its ceilings.

    The ceilings are those of the last orders that held, and those that they announced for later:
    a power budget that begins after the controller's death is kept. Where there is no budget, a
    ceiling of the policy ends with the orders.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    link : ControllerLink
        Line to the controller; whoever made it closes it.
    period_s : float
        Seconds between decisions, at most 0.5.
    on_policy : callable, optional
        Called at every tick after the first orders with the name of the policy whose governors are
        to choose clocks.
    on_budget : callable, optional
        Called at those ticks with whether the ceilings hold on when nobody decides.

    Raises
    ------
    ConfigError
        If the period is longer than 0.5 s, and a dead controller would be noticed too late.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> class Dead:
    ...     failure = None
    ...     def tell(self, observation): pass
    ...     def orders(self): return None
    ...     def last(self): return None
    >>> controller = RemoteController(fleet, Dead())
    >>> seen = Observation(state=FleetState.idle(2))
    >>> controller.decide(seen, controller.init())[0].freq_mhz
    array([1410., 1410.])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        link: ControllerLink,
        *,
        period_s: float = 0.1,
        on_policy: Callable[[str], None] = lambda _: None,
        on_budget: Callable[[bool], None] = lambda _: None,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        if period_s > 0.5:
            raise ConfigError(
                f"RemoteController.period_s: expected at most 0.5 s, got {period_s:g}; a node"
                " must notice within 2 s that its controller is gone"
            )
        self._link, self._on_policy, self._on_budget = link, on_policy, on_budget
        self._said: set[str | None] = set()  # each failure once, until the controller is back

    def init(self) -> RemoteMemory:
        """Memory before the first decision, when there are no orders yet."""
        return RemoteMemory(gone=True)

    def notes(self, memory: RemoteMemory) -> Mapping[str, float]:
        """Whether the controller is gone.

        Parameters
        ----------
        memory : RemoteMemory
            What the latest decision returned.

        Returns
        -------
        mapping of str to float
            ``controller_gone``: 1 while no orders are in force, else 0.
        """
        return {"controller_gone": float(memory.gone)}

    def _decide(
        self, observation: Observation, memory: RemoteMemory
    ) -> tuple[Decision, RemoteMemory]:
        self._link.tell(observation)
        in_force, last, t_s = self._link.orders(), self._link.last(), observation.state.t_s
        was_gone, memory = memory.gone, RemoteMemory(gone=in_force is None)
        # At the start nobody is missed yet, unless the line says that something is wrong with it.
        failure = self._link.failure if memory.gone else None
        if memory.gone and (failure not in (None, *self._said) or not was_gone):
            self._said.add(failure)
            _log.warning(
                "voltana-ctrl: no controller%s: the highest clock under its last ceilings until it"
                " is back", "" if failure is None else f" ({failure})",
            )  # fmt: skip
        elif was_gone and not memory.gone:
            self._said.clear()
            _log.warning("voltana-ctrl: the controller's orders are in force")
        if last is None:
            return Decision.highest(self.fleet, t_s=t_s), memory
        orders, held_s = last
        self._on_policy(orders.policy)
        self._on_budget(all(one.alone_mhz is None for one in orders.orders.values()))
        told = {
            name: order.alone(held_s) if memory.gone else order.after(held_s)
            for name, order in orders.orders.items()
        }
        return decision_of(told, self.fleet, t_s=t_s), memory
