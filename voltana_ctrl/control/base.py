"""What every controller is, and what every compiled governor is.

A controller decides once per tick for a fleet. A governor chooses the clock of one instance before
each of its iterations: settings around a kernel of the compiled governor port
(:data:`voltana_ctrl.kernels.choose.base.GOVERNOR_SIGNATURE`), which the simulator calls, while an
engine's own loop calls :meth:`CompiledGovernor.step`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, final

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import Decision, FleetSpec, InstanceSpec, Observation, Profile
from voltana_ctrl.types.ladder import row_up

__all__ = ["CompiledGovernor", "Controller"]


class Controller(ABC):
    """Turns observations into decisions; all it remembers is passed in and out.

    Subclasses write :meth:`init` and :meth:`_decide`. Settings live on the object, anything
    that changes (filters, margins, counters) lives in the memory, so that a run can be
    replayed and two runs never mix.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet it controls.
    period_s : float or Fraction
        Time between decisions; kept as an exact fraction of whole microseconds.

    Raises
    ------
    ConfigError
        If the period is not at least a microsecond.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, load_profile
    >>> class Highest(Controller):
    ...     def init(self): return 0
    ...     def _decide(self, observation, memory):
    ...         return Decision.highest(self.fleet, t_s=observation.state.t_s), memory + 1
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = Highest(fleet)
    >>> decision, memory = controller.decide(Observation(state=FleetState.idle(2)), 0)
    >>> decision.freq_mhz, memory
    (array([1410., 1410.]), 1)
    """

    def __init__(self, fleet: FleetSpec, *, period_s: float | Fraction = 0.1) -> None:
        period_us = round(float(period_s) * 1e6) if 0.0 < float(period_s) < 1e9 else 0
        if period_us < 1:
            raise ConfigError(
                f"{type(self).__name__}.period_s: expected at least 1e-6 s, got {period_s}"
            )
        self.fleet = fleet
        self.period_s = Fraction(period_us, 1_000_000)

    @abstractmethod
    def init(self) -> Any:
        """Memory at the start."""

    @abstractmethod
    def _decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        """Decide; must not change `memory` in place."""

    @final
    def decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        """Decision for this tick, and the memory for the next.

        Returns
        -------
        decision, memory
            What to apply, and what to pass in at the next tick.

        Raises
        ------
        ShapeError
            If observation or decision do not fit the fleet.
        ConfigError
            If the decision is not a Decision.
        """
        n = len(self.fleet)
        name = type(self).__name__
        if len(observation.state) != n:
            raise ShapeError(
                f"{name}.decide: expected the state of {n} instances, got {len(observation.state)}"
            )
        decision, after = self._decide(observation, memory)
        if not isinstance(decision, Decision):
            raise ConfigError(f"{name}._decide: expected a Decision, got {decision!r}")
        if len(decision) != n:
            raise ShapeError(
                f"{name}._decide: expected a decision on {n} instances, got {len(decision)}"
            )
        return decision, after


class CompiledGovernor:
    """A governor kernel with the settings and the memory of one instance.

    Parameters
    ----------
    instance : InstanceSpec
        The instance whose clock it chooses.
    profile : Profile
        What is believed about it; its own profile usually.
    kernel : callable
        Numba function of the governor port.
    params : sequence of float
        Settings that the kernel reads.
    idle_call_s : float
        The simulator asks again after this long without work.

    Raises
    ------
    ConfigError
        If the profile does not know the instance's clocks.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.kernels.choose.base import hold_floor
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> decode = FleetSpec.parse("1P1D", profile).instances[1]
    >>> CompiledGovernor(decode, profile, hold_floor).step(10, 4000, 0, 0.0, 600.0, 1410.0)
    600.0
    """

    def __init__(
        self,
        instance: InstanceSpec,
        profile: Profile,
        kernel: Any,
        params: Sequence[float] | F64 = (),
        *,
        idle_call_s: float = np.inf,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose.base import N_MEMORY

        known = np.isin(instance.clocks_mhz, profile.clocks_mhz)
        if not np.all(known):
            raise ConfigError(
                f"governor of {instance.id}: profile {profile.name} does not know its clocks"
                f" {instance.clocks_mhz[~known]}; give a profile of the same card"
            )
        self.instance = instance
        self.kernel = kernel
        self.params: F64 = np.ascontiguousarray(params, dtype=np.float64)
        self.idle_call_s = idle_call_s
        self.rows = np.ascontiguousarray(
            profile.table[np.isin(profile.clocks_mhz, instance.clocks_mhz)]
        )
        self.padded = profile.padded_batch(instance.max_batch)
        self.memory = np.zeros(N_MEMORY)

    def step(
        self,
        running_req: float,
        kv_used_tok: float,
        waiting_tok: float,
        oldest_wait_s: float,
        floor_mhz: float,
        ceiling_mhz: float,
        *,
        batch_tok: float | None = None,
        t_s: float | None = None,
    ) -> float:
        """Clock for the next iteration.

        Parameters
        ----------
        running_req, kv_used_tok : float
            Requests that will decode in it and the KV tokens they hold.
        waiting_tok : float
            Prompt tokens not prefilled yet, those of this iteration included.
        oldest_wait_s : float
            How long the oldest of them has waited.
        floor_mhz, ceiling_mhz : float
            Range that the controller allows.
        batch_tok : float, optional
            Prompt tokens in this iteration; by default as many as its budget allows.
        t_s : float, optional
            Time of the call; the process clock by default.

        Returns
        -------
        float
            A supported clock in MHz.
        """
        if batch_tok is None:
            # On a decode instance what waits is KV that has arrived, not prompts to prefill.
            prefills = self.instance.role.prefills
            batch_tok = min(waiting_tok, self.instance.prefill_budget_tok) if prefills else 0.0
        needed_mhz = self.kernel(
            self.rows,
            self.padded,
            self.params,
            self.memory,
            time.monotonic() if t_s is None else t_s,
            min(float(running_req), len(self.padded) - 1.0),
            float(kv_used_tok),
            float(waiting_tok),
            float(batch_tok),
            float(oldest_wait_s),
            float(floor_mhz),
            float(ceiling_mhz),
        )
        clocks_mhz = self.rows["clock_mhz"]
        return float(clocks_mhz[row_up(clocks_mhz, min(needed_mhz, ceiling_mhz))])
