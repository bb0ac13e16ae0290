"""The fast layer: one instance's clock, before each of its iterations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.laws import kv_transfer_s
from voltana_ctrl.types import Belief, InstanceSpec, Profile, Role, Slo, Tuning

__all__ = ["IterationGovernor", "thrifty_row"]


def thrifty_row(profile_table: np.ndarray) -> int:
    """Row of least prefill energy per token while busy: the minimum of the U-shaped curve.

    It is no operating point (arrivals, not the clock, set the token rate) but the border up to
    which a higher clock costs next to nothing more per token, so that keeping room for a burst
    below it is nearly free.

    Parameters
    ----------
    profile_table : ndarray, dtype PROFILE_DTYPE
        Rows of an instance, ascending clocks.

    Returns
    -------
    int
        Row of `profile_table`.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(profile.clocks_mhz[thrifty_row(profile.table)])
    1140.0
    """
    per_tok_j = profile_table["prefill_power_w"] * profile_table["prefill_tok_s"]
    return int(np.argmin(per_tok_j))


class IterationGovernor(CompiledGovernor):
    """Lowest clock between floor and ceiling that this iteration or this queue needs.

    Raises at once; lowers no sooner than `dwell_s` after the last change. It never waits for
    another layer, and where it runs it alone writes the clock.

    Parameters
    ----------
    instance : InstanceSpec
        The instance whose clock it chooses.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    profile : Profile, optional
        Tables it predicts with; the instance's own by default.
    margin_frac : tuple of float, optional
        TTFT and ITL margin: a prediction times one plus this must be within the target; that of
        the tuning if left out.
    delay_s : float
        Time from asking for a clock until it runs: actuation and settling.
    dwell_s : float
        Least time between a change and a lowering.
    memory_s : float, optional
        Time constant of the arrival estimate behind it; `arrivals_ttft_frac` of the tuning, in
        promises, if left out.
    tuning : Tuning, optional
        What is chosen rather than derived; the defaults if left out.

    Raises
    ------
    ConfigError
        If a number is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> decode = FleetSpec.parse("1P1D", profile).instances[1]
    >>> governor = IterationGovernor(decode, Slo(ttft_s=0.6, itl_s=0.06))
    >>> governor.step(80, 3.5e4, 0, 0.0, 210.0, 1410.0)
    285.0
    >>> governor.step(80, 3.5e4, 0, 0.0, 210.0, 240.0)  # the ceiling comes first
    240.0
    """

    def __init__(
        self,
        instance: InstanceSpec,
        slo: Slo,
        profile: Profile | None = None,
        *,
        margin_frac: tuple[float, float] | None = None,
        delay_s: float = 0.025,
        dwell_s: float = 0.0,
        memory_s: float | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose.governor import needed_clock

        for name, value in (("delay_s", delay_s), ("dwell_s", dwell_s)):
            not_negative(f"IterationGovernor.{name}", value)
        tuning = tuning or Tuning()
        margin_frac = margin_frac or tuning.margin_frac
        memory_s = tuning.arrivals_ttft_frac * slo.ttft_s if memory_s is None else memory_s
        positive("IterationGovernor.memory_s", memory_s)
        for value in margin_frac:
            if not -1.0 < value < np.inf:
                raise ConfigError(
                    f"IterationGovernor.margin_frac: expected numbers > -1, got {margin_frac}"
                )
        profile = profile or instance.profile
        self._margin_frac = margin_frac
        self.slo = slo
        self._profile = profile
        self.instance = instance
        super().__init__(
            instance,
            profile,
            needed_clock,
            [
                *self._targets_s(margin_frac[0], margin_frac[1]),
                delay_s,
                dwell_s,
                thrifty_row(instance.table),
                tuning.late_frac * (1.0 - slo.attainment),
                0.0,
                memory_s,
                float(instance.role.prefills),
                tuning.repay_tok,
                1.0,
                1.0,
                tuning.share_itl_frac * slo.itl_s,
            ],
        )

    def _targets_s(self, ttft_margin_frac: float, itl_margin_frac: float) -> tuple[float, float]:
        """TTFT and ITL that predictions must keep."""
        ttft_s = self.slo.ttft_s / (1.0 + ttft_margin_frac)
        itl_s = self.slo.itl_s / (1.0 + itl_margin_frac)
        if self._profile.first_token == "decode" and not self.instance.role.decodes:
            # The client waits for transfer and up to two decode iterations besides.
            moved_s = float(kv_transfer_s(self._profile, self.instance.prefill_budget_tok))
            ttft_s -= moved_s + 2.0 * itl_s
        return ttft_s, itl_s

    def take_role(self, role: Role) -> None:
        """Govern an instance in another role from the next iteration on.

        Parameters
        ----------
        role : Role
            Prefill or decode.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, Role, Slo, load_profile
        >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
        >>> governor = IterationGovernor(
        ...     FleetSpec.parse("1P1D", profile).flexible().instances[1],
        ...     Slo(ttft_s=0.6, itl_s=0.06))
        >>> governor.take_role(Role.PREFILL)
        >>> governor.instance.role
        <Role.PREFILL: 'prefill'>
        """
        from voltana_ctrl.kernels.choose import governor as kernel  # loads Numba

        self.instance = replace(self.instance, role=role)
        params = self.params.copy()
        params[kernel.PREFILLS] = float(role.prefills)
        params[kernel.TTFT_S], params[kernel.ITL_S] = self._targets_s(*self._margin_frac)
        self.params = params

    def believe(self, belief: Belief, i: int) -> None:
        """Go by these margins, this delay and this pace from the next iteration on.

        Parameters
        ----------
        belief : Belief
            What was learnt about the fleet.
        i : int
            Number of this instance in the fleet.

        Examples
        --------
        >>> from dataclasses import replace
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.types import Belief
        >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
        >>> fleet = FleetSpec.parse("1P1D", profile)
        >>> governor = IterationGovernor(fleet.instances[1], Slo(ttft_s=0.6, itl_s=0.06))
        >>> governor.step(80, 3.5e4, 0, 0.0, 210.0, 1410.0)
        285.0
        >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.035), delay_s=0.025)
        >>> governor.believe(replace(belief, decode_pace_frac=[1.0, 1.5]), 1)  # two thirds as fast
        >>> governor.step(80, 3.5e4, 0, 0.0, 210.0, 1410.0)
        465.0
        """
        from voltana_ctrl.kernels.choose import governor as kernel  # loads Numba

        # A new array: who has copied the old one sees that it is another.
        params = self.params.copy()
        self._margin_frac = (float(belief.ttft_margin_frac[i]), float(belief.itl_margin_frac[i]))
        params[kernel.TTFT_S], params[kernel.ITL_S] = self._targets_s(*self._margin_frac)
        params[kernel.DELAY_S] = belief.delay_s[i]
        params[kernel.NOISE_FRAC] = belief.noise_frac[i]
        params[kernel.PREFILL_PACE_FRAC] = belief.prefill_pace_frac[i]
        params[kernel.DECODE_PACE_FRAC] = belief.decode_pace_frac[i]
        self.params = params
