"""Any shipped policy as two functions: where to prefill a request, and where to decode it."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol, runtime_checkable

import numpy as np

from voltana_ctrl.checks import Bool
from voltana_ctrl.control import StaticController
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.ports import Router
from voltana_ctrl.routing import share_router
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Request, Slo

__all__ = ["PolicyRouters", "StateSource"]

_NONE: Set[int] = frozenset()


@runtime_checkable
class StateSource(Protocol):
    """Anything that knows how the fleet is doing: telemetry, or a running control loop."""

    @property
    def state(self) -> FleetState:
        """Latest state; `age_s` says per instance how old it is."""


class PolicyRouters:
    """Routers of a policy, for a server that sends the requests itself.

    It is a `Router` for decode and can be given to :class:`~voltana_ctrl.ControlLoop`, whose
    decisions it hands to both routers. `controller` is the one of the policy, `slo` what it was
    built for, and `decode_at_arrival` says whether the policy chooses the decode instance before
    prefill. Requests are to be routed from one thread.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    policy : str
        As on the command line, see :func:`~voltana_ctrl.policies.find_policy`.
    slo : Slo, optional
        Promises to users; TTFT 0.6 s and ITL 60 ms if left out.

    Raises
    ------
    ConfigError
        If there is no such policy, or it does not fit the fleet.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> routers = PolicyRouters(fleet, "static-max+least-queue/jsq")
    >>> request, state = Request(prompt_tok=400), FleetState.idle(4)
    >>> routers.prefill(request, state), routers.route(request, state)
    (0, 2)
    >>> routers.route(request, state, tried={2})  # it refused: somewhere else
    3
    """

    def __init__(self, fleet: FleetSpec, policy: str, slo: Slo | None = None) -> None:
        self.slo = slo or Slo(ttft_s=0.6, itl_s=0.06)
        parts = find_policy(policy).build(fleet, self.slo, PolicySetup())
        self.fleet = fleet
        self.controller = parts.controller or StaticController(fleet)
        self.decode_at_arrival = parts.decode_at_arrival
        self._members: dict[str, list[int]] = {
            "prefill": fleet.prefill.tolist(),
            "decode": fleet.decode.tolist(),
        }
        self._routers: dict[str, Router] = {
            "prefill": parts.prefill_router or share_router(fleet, "prefill"),
            "decode": parts.decode_router or share_router(fleet, "decode"),
        }
        self.update(parts.first or Decision.highest(fleet))

    def update(self, decision: Decision) -> None:
        """Take shares, active set and prices of the latest decision."""
        for router in self._routers.values():
            router.update(decision)

    def prefill(self, request: Request, state: FleetState, *, tried: Set[int] = _NONE) -> int:
        """Choose the instance to prefill on; in a colocated fleet, the one that does both phases.

        Parameters
        ----------
        request : Request
            The request.
        state : FleetState
            State of the fleet, as fresh as it is at hand.
        tried : set of int
            Instances that failed this request; used again only where no other is left.

        Returns
        -------
        int
            Index in the fleet, of an instance that is alive unless none is.
        """
        return self._pick("prefill", request, state, tried)

    def route(self, request: Request, state: FleetState, *, tried: Set[int] = _NONE) -> int:
        """Choose the instance to decode on.

        Parameters
        ----------
        request, state, tried
            See :meth:`prefill`.

        Returns
        -------
        int
            Index in the fleet, of an instance that is alive unless none is.
        """
        return self._pick("decode", request, state, tried)

    def _pick(self, phase: str, request: Request, state: FleetState, tried: Set[int]) -> int:
        members = self._members[phase]
        left = [i for i in members if i not in tried] or members
        alive = [i for i in left if state.alive[i]] or left
        if len(alive) == 1:
            return alive[0]
        if len(alive) < len(members):
            able = np.zeros(len(state), dtype=bool)
            able[alive] = True
            state = _with_alive(state, able)
        picked = int(self._routers[phase].route(request, state))
        if picked in alive:
            return picked
        if picked not in members:
            raise ConfigError(
                f"router of {phase}: expected one of the instances {members}, got {picked}"
            )
        # A router of the host's own that does not look at `alive`.
        load_req = state.running_req + state.queue_req
        return min(alive, key=lambda i: float(load_req[i]))


def _with_alive(state: FleetState, alive: Bool) -> FleetState:
    names = [name for name in FleetState.__slots__ if name != "alive"]
    return FleetState(alive=alive, **{name: getattr(state, name) for name in names})
