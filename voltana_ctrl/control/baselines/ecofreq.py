"""EcoFreq, the governor of VoltanaLLM: the lowest clock of a short ladder that is fast enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import InstanceSpec, Profile, Slo

__all__ = ["DEFAULT_LADDER_MHZ", "EcoFreqGovernor"]

#: VoltanaLLM's profiling ladder (its public code, v0.1).
DEFAULT_LADDER_MHZ = (1005.0, 1095.0, 1200.0, 1305.0, 1410.0)


class EcoFreqGovernor(CompiledGovernor):
    """VoltanaLLM v0.1's EcoFreq: the lowest clock of a short ladder that meets the target.

    Rules 3 to 6 of its ``freq_manager.py`` (arXiv 2509.04827, code f7789acf) without the two
    throughput thresholds. If anything waits behind this batch, it is the top clock. Otherwise it is
    the first of the ladder at which an iteration is predicted to take no longer than the ITL target
    where it decodes, and than the TTFT target less the time already waited where it
    prefills; the top clock if none is enough. Without work it is the bottom clock, for which an
    engine asks after 5 s.

    Parameters
    ----------
    instance : InstanceSpec
        The instance whose clock it chooses.
    slo : Slo
        Promised TTFT and ITL; how many must meet them plays no part.
    profile : Profile, optional
        Tables it predicts with; the instance's own by default.
    ladder_mhz : sequence of float, optional
        Clocks it may choose, by default those of the paper's A100, 1005 to 1410 MHz; give others
        for another card. Each is raised to the next supported one, or lowered to the highest. None:
        the whole ladder.
    margin_frac : float
        Targets are divided by one plus this. The paper's code multiplies by one plus its own m,
        which is a margin of ``1 / (1 + m) - 1`` here.
    above_floor : bool
        Whether a controller's floor counts, as that of
        :class:`~voltana_ctrl.control.ThroughputController`, which has the two other rules. The
        ceiling always holds.

    Raises
    ------
    ConfigError
        If the margin is not above -1, or the profile lacks clocks of the instance.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> decode = FleetSpec.parse("1P1D", profile).instances[1]
    >>> eco = EcoFreqGovernor(decode, Slo(ttft_s=0.6, itl_s=0.06))
    >>> # requests, KV tokens, prompt tokens that wait, how long they have, floor and ceiling
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
        above_floor: bool = False,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose.baselines import ecofreq, ecofreq_above_floor

        if not -1.0 < margin_frac < np.inf:
            raise ConfigError(
                f"EcoFreqGovernor.margin_frac: expected a number > -1, got {margin_frac}"
            )
        rungs = instance.clock_rows(ladder_mhz)
        scale = 1.0 / (1.0 + margin_frac)
        super().__init__(
            instance,
            profile or instance.profile,
            ecofreq_above_floor if above_floor else ecofreq,
            [slo.ttft_s * scale, slo.itl_s * scale, len(rungs), *rungs],
            idle_call_s=5.0,
        )
