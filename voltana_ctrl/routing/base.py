"""Compiled routers: settings and memory around a kernel of the compiled router port.

The simulator calls the kernel, a server calls :meth:`CompiledRouter.route`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.kernels import layout
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Request
from voltana_ctrl.types.packed import instance_types

__all__ = ["CompiledRouter", "Phase"]

Phase = Literal["prefill", "decode"]


class CompiledRouter:
    """A router kernel for one phase of a fleet.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.
    kernel : callable
        Numba function of :data:`voltana_ctrl.kernels.route.base.ROUTER_SIGNATURE`.
    params : sequence of float
        Settings that the kernel reads.
    seed : int
        Seed of the random numbers that the kernel gets when a server calls it; the simulator
        draws its own.

    Raises
    ------
    ConfigError
        If the phase is neither.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> from voltana_ctrl.kernels.route.baselines import shortest
    >>> fleet = FleetSpec.parse("1P3D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> router = CompiledRouter(fleet, "decode", shortest)
    >>> router.route(Request(prompt_tok=100), FleetState.idle(4))
    1
    """

    def __init__(
        self,
        fleet: FleetSpec,
        phase: Phase,
        kernel: Any,
        params: tuple[float, ...] | list[float] = (),
        *,
        seed: int = 0,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.route.base import look

        if phase not in ("prefill", "decode"):
            raise ConfigError(f"router phase: expected 'prefill' or 'decode', got {phase!r}")
        self.fleet = fleet
        self.phase = phase
        self.kernel = kernel
        self._look = look
        self.params: F64 = np.array(params, dtype=np.float64)
        self.memory = np.zeros(len(fleet))
        # A copy, since a fleet's arrays are read-only and kernels take writable ones.
        self._members = np.array(fleet.prefill if phase == "prefill" else fleet.decode)
        self._tables, self._padded, kind = instance_types(fleet)
        self._view = np.zeros((layout.N_VIEW, len(fleet)))
        self._view[layout.VIEW_TYPE] = kind
        self._view[layout.VIEW_KV_CAPACITY_TOK] = fleet.kv_capacity_tok
        self._view[layout.VIEW_PREFILL_PACE_FRAC] = self._view[layout.VIEW_DECODE_PACE_FRAC] = 1.0
        self._view[layout.VIEW_ABLE_MHZ] = fleet.max_mhz
        self._active = np.ones(len(fleet), dtype=bool)
        self._at_once = np.array([one.wake_s == 0.0 for one in fleet.instances])
        self._wakes = self._at_once
        self._random = np.random.default_rng(seed)

    def update(self, decision: Decision) -> None:
        """Take shares, active set and belief of the latest decision."""
        self._view[layout.VIEW_ROUTE_FRAC] = decision.route_frac
        if decision.belief is not None:
            self._view[layout.VIEW_PREFILL_PACE_FRAC] = decision.belief.prefill_pace_frac
            self._view[layout.VIEW_DECODE_PACE_FRAC] = decision.belief.decode_pace_frac
            self._view[layout.VIEW_ABLE_MHZ] = decision.belief.able_mhz
        self._active = decision.active
        shallow = decision.depth is None or np.array(decision.depth) == "parked"
        self._wakes = self._at_once & shallow

    def route(self, request: Request, state: FleetState) -> int:
        """Index in the fleet of the instance that this request goes to.

        Dead, parked and KV-full instances are passed over as long as another is left. Until the
        next decision, parked ones that wake at once have the share of who died.

        Raises
        ------
        ShapeError
            If the state is not that of this fleet.
        """
        if len(state) != len(self.fleet):
            raise ShapeError(
                f"{type(self).__name__}.route: expected the state of {len(self.fleet)} instances,"
                f" got {len(state)}"
            )
        self._look(
            self._view,
            self._members,
            state.alive,
            self._active,
            self._wakes,
            state.queue_tok,
            state.queue_req,
            state.running_req,
            state.kv_used_tok,
            state.freq_mhz,
            float(request.prompt_tok),
        )
        return int(
            self.kernel(
                self._tables,
                self._padded,
                self.params,
                self.memory,
                self._random.random(),
                float(request.prompt_tok),
                self._view,
                self._members,
            )
        )
