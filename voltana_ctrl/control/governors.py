"""Governors: the clock of one instance, chosen before each of its iterations.

A compiled governor is settings around a kernel of the compiled governor port
(:data:`voltana_ctrl._kernels.governors.GOVERNOR_SIGNATURE`): the simulator calls the kernel,
an engine's own loop calls :meth:`CompiledGovernor.step`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import InstanceSpec, Profile, Slo
from voltana_ctrl.types._check import F64

__all__ = ["DEFAULT_LADDER_MHZ", "CompiledGovernor", "EcoFreqGovernor"]

#: VoltanaLLM's profiling ladder (its public code, v0.1).
DEFAULT_LADDER_MHZ = (1005.0, 1095.0, 1200.0, 1305.0, 1410.0)


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
    >>> from voltana_ctrl._kernels.governors import hold_floor
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
        from voltana_ctrl._kernels.governors import N_MEMORY

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
        wanted_mhz = min(needed_mhz, ceiling_mhz)
        k = min(int(np.searchsorted(clocks_mhz, wanted_mhz)), len(clocks_mhz) - 1)
        return float(clocks_mhz[k])


class EcoFreqGovernor(CompiledGovernor):
    """VoltanaLLM v0.1's EcoFreq: the lowest clock of a short ladder that meets the target.

    Rules 3 to 6 of its ``freq_manager.py`` (arXiv 2509.04827, code f7789acf) without the two
    throughput thresholds: top clock if anything waits behind this batch; otherwise the first
    ladder clock whose predicted latency is within the target less the time already waited;
    the bottom clock after 5 s without work.

    Parameters
    ----------
    instance : InstanceSpec
        The instance whose clock it chooses.
    slo : Slo
        Its targets.
    profile : Profile, optional
        Tables it predicts with; the instance's own by default.
    ladder_mhz : sequence of float, optional
        Clocks it may choose; each is raised to the next supported one. None: the whole ladder.
    margin_frac : float
        Targets are multiplied by one plus this (a positive margin loosens, as in the code).

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> decode = FleetSpec.parse("1P1D", profile).instances[1]
    >>> eco = EcoFreqGovernor(decode, Slo(ttft_s=0.6, itl_s=0.06))
    >>> eco.step(10, 4000, 0, 0.0, 210.0, 1410.0), eco.step(700, 3e5, 0, 0.0, 210.0, 1410.0)
    (1005.0, 1410.0)
    """

    def __init__(
        self,
        instance: InstanceSpec,
        slo: Slo,
        profile: Profile | None = None,
        *,
        ladder_mhz: Sequence[float] | None = DEFAULT_LADDER_MHZ,
        margin_frac: float = 0.0,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl._kernels.governors import ecofreq

        if not -1.0 < margin_frac < np.inf:
            raise ConfigError(
                f"EcoFreqGovernor.margin_frac: expected a number > -1, got {margin_frac}"
            )
        rungs = instance.clock_rows(ladder_mhz)
        scale = 1.0 + margin_frac
        super().__init__(
            instance,
            profile or instance.profile,
            ecofreq,
            [slo.ttft_s * scale, slo.itl_s * scale, len(rungs), *rungs],
            idle_call_s=5.0,
        )
