"""DualScale's fast tier, as far as summaries of the paper tell it."""

from __future__ import annotations

import numpy as np

from voltana_ctrl.checks import count, fraction
from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.laws import kv_transfer_s
from voltana_ctrl.types import InstanceSpec, Profile, Slo

__all__ = ["DualScaleGovernor"]


class DualScaleGovernor(CompiledGovernor):
    """Prefill looks K = 8 batches ahead; decode takes the lowest clock that keeps the ITL.

    The fast tier of DualScale (first called BiScale, arXiv 2602.18755), read from summaries,
    not from its code. As there: prefill projects the next 8 batches from what is queued, starts
    them all at the highest of 7 clocks and mutates greedily for the least energy subject to
    TTFT; decode takes the lowest clock within the time between tokens, the highest once KV
    utilisation passes a threshold. Ours, for want of a source: the clocks are spread evenly
    over the range; a mutation is one step down where it saves most; the whole queue is counted
    as having waited as long as its oldest request; predictions are the profile's, not boosted
    trees; the KV threshold is 0.9. The slow tier (placement by integer programming every five
    minutes) is left out.

    Parameters
    ----------
    instance : InstanceSpec
        The instance whose clock it chooses.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    profile : Profile, optional
        Tables it predicts with; the instance's own by default.
    n_clocks : int
        How many clocks, from the lowest to the highest supported.
    kv_full_frac : float
        KV utilisation above which decode runs at the highest clock.

    Raises
    ------
    ConfigError
        If a setting is outside its range, or the TTFT leaves no time for prefill.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> slo = Slo(ttft_s=0.6, itl_s=0.06)
    >>> prefill, decode = (DualScaleGovernor(one, slo) for one in fleet.instances)
    >>> [prefill.step(0, 0, tok, 0.0, 210.0, 1410.0) for tok in (500, 7000)]
    [1020.0, 1215.0]
    >>> [decode.step(n, 400.0 * n, 0, 0.0, 210.0, 1410.0) for n in (10, 200, 400)]
    [210.0, 615.0, 1020.0]
    """

    def __init__(
        self,
        instance: InstanceSpec,
        slo: Slo,
        profile: Profile | None = None,
        *,
        n_clocks: int = 7,
        kv_full_frac: float = 0.9,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose.baselines import dualscale

        count("DualScaleGovernor.n_clocks", n_clocks, minimum=2)
        fraction("DualScaleGovernor.kv_full_frac", kv_full_frac)
        profile = profile or instance.profile
        ttft_s = slo.ttft_s
        if profile.first_token == "decode" and not instance.role.decodes:
            # The first token waits for the KV transfer and for one decode iteration.
            ttft_s -= float(kv_transfer_s(profile, instance.prefill_budget_tok)) + slo.itl_s
        if not ttft_s > 0.0:
            raise ConfigError(
                f"DualScaleGovernor({instance.id}): a TTFT of {slo.ttft_s:g} s leaves no time for"
                " prefill once the KV transfer and the first decode iteration are taken off"
            )
        clocks_mhz = instance.clocks_mhz
        rungs = instance.clock_rows(np.linspace(clocks_mhz[0], clocks_mhz[-1], n_clocks).tolist())
        super().__init__(
            instance,
            profile,
            dualscale,
            [
                ttft_s,
                slo.itl_s,
                kv_full_frac * instance.kv_capacity_tok,
                instance.prefill_budget_tok,
                len(rungs),
                *rungs,
            ],
        )
