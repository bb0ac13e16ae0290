"""The router that goes with the controller: shares of the decision, and its prices."""

from __future__ import annotations

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ShapeError
from voltana_ctrl.routing.base import CompiledRouter, Phase
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Request, Slo
from voltana_ctrl.types.fleet import KV_FULL_FRAC

__all__ = ["PricedRouter"]


class PricedRouter(CompiledRouter):
    """Honours the shares of the latest decision, and overrides them where that pays.

    Decode: the instance furthest below its share of the running requests. Prefill: among the
    active, where the prompt is done first. Passed over as long as another is left: dead, parked
    and KV-full instances, those without a share, and those that would miss the ITL target. A
    host's score (prefix-cache hits, affinity) overrides the pick where it is worth more than the
    difference in price. Deterministic.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promises; the ITL is used.
    phase : {"prefill", "decode"}
        Which instances it picks from.
    kv_full_frac : float
        An instance this full counts as full.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Request, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> router = PricedRouter(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> router.update(Decision.highest(fleet))
    >>> [router.route(Request(prompt_tok=9), FleetState.idle(3)) for _ in range(3)]
    [1, 2, 1]
    >>> hit = Request(prompt_tok=9, host_score=[0.0, 5.0, 0.0])  # joules that a cache hit saves
    >>> router.route(hit, FleetState.idle(3))
    1
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        phase: Phase = "decode",
        *,
        kv_full_frac: float = KV_FULL_FRAC,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.route.priced import by_target, soonest, worth_more

        kernel = soonest if phase == "prefill" and not fleet.colocated else by_target
        prefills = float(fleet.colocated)
        super().__init__(fleet, phase, kernel, [slo.itl_s, kv_full_frac, prefills])
        self._worth_more = worth_more
        self._price_j_req: F64 = np.zeros(len(fleet))

    def update(self, decision: Decision) -> None:
        """Take shares, active set and prices of the latest decision."""
        super().update(decision)
        self._price_j_req = decision.price_j_req

    def route(self, request: Request, state: FleetState) -> int:
        """Index in the fleet of the instance that this request goes to.

        Parameters
        ----------
        request : Request
            With `host_score` in joules that serving it there saves, if the host knows.
        state : FleetState
            State of the fleet, as fresh as it is at hand.

        Raises
        ------
        ShapeError
            If state or score are not of this fleet.
        """
        picked = super().route(request, state)
        if request.host_score is None:
            return picked
        score_j = np.ascontiguousarray(request.host_score, dtype=np.float64)
        if score_j.shape != self._price_j_req.shape:
            raise ShapeError(
                f"Request.host_score: expected one number per instance, shape"
                f" {self._price_j_req.shape}, got {score_j.shape}"
            )
        return int(self._worth_more(self._view, self._members, score_j, self._price_j_req, picked))
