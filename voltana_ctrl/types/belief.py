"""What was learnt about instances while they ran, beyond what their profiles say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, freeze_fields
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types.fleet import FleetSpec

__all__ = ["Belief"]

_FIELDS = (
    "ttft_margin_frac",
    "itl_margin_frac",
    "delay_s",
    "prefill_pace_frac",
    "decode_pace_frac",
    "able_mhz",
    "noise_frac",
)
_FROM_ZERO = ("delay_s", "noise_frac")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """What governors and routers should believe about each instance; travels with a decision.

    A governor keeps ``prediction <= target / (1 + margin)``, where the prediction is the profile's
    times the pace. A router expects of an instance what its pace and its highest clock allow.

    Parameters
    ----------
    ttft_margin_frac, itl_margin_frac : ndarray, shape (n,)
        Margins on TTFT and ITL, > -1.
    delay_s : ndarray, shape (n,)
        Time from asking for a clock until it runs, >= 0.
    prefill_pace_frac, decode_pace_frac : ndarray, shape (n,)
        Time of an iteration over what the profile says, > 0; 1.2 is 20 % slower.
    able_mhz : ndarray, shape (n,)
        Highest clock that the instance gets when it is asked for, > 0: below its ladder's
        highest where something clamps or throttles it.
    noise_frac : ndarray, shape (n,)
        Standard deviation of an iteration's time about what is expected, relative, >= 0; 0 by
        default.

    Raises
    ------
    ShapeError
        If the arrays differ in length.
    ConfigError
        If a number is not finite or outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.035), delay_s=0.025)
    >>> belief.able_mhz, belief.decode_pace_frac
    (array([1410., 1410.]), array([1., 1.]))
    """

    ttft_margin_frac: F64
    itl_margin_frac: F64
    delay_s: F64
    prefill_pace_frac: F64
    decode_pace_frac: F64
    able_mhz: F64
    noise_frac: F64 = None  # type: ignore[assignment]  # zeros unless told

    def __post_init__(self) -> None:
        shape = (np.asarray(self.delay_s).size,)
        if self.noise_frac is None:
            object.__setattr__(self, "noise_frac", np.zeros(shape))
        freeze_fields(self, _FIELDS, shape)
        for name in _FIELDS:
            values = getattr(self, name)
            above = -1.0 if name.endswith("margin_frac") else 0.0
            allowed = values >= above if name in _FROM_ZERO else values > above
            if not np.all(allowed & np.isfinite(values)):
                sign = ">=" if name in _FROM_ZERO else ">"
                raise ConfigError(
                    f"Belief.{name}: expected finite numbers {sign} {above:g}, got {values}"
                )

    def __len__(self) -> int:
        return len(self.delay_s)

    @classmethod
    def of_profiles(
        cls, fleet: FleetSpec, *, margin_frac: tuple[float, float], delay_s: float
    ) -> Belief:
        """Belief before anything was learnt: every profile is right.

        Parameters
        ----------
        fleet : FleetSpec
            The fleet.
        margin_frac : tuple of float
            Margins on TTFT and ITL.
        delay_s : float
            Time from asking for a clock until it runs.
        """
        one = np.ones(len(fleet))
        return cls(
            ttft_margin_frac=margin_frac[0] * one,
            itl_margin_frac=margin_frac[1] * one,
            delay_s=delay_s * one,
            prefill_pace_frac=one,
            decode_pace_frac=one,
            able_mhz=fleet.max_mhz,
            noise_frac=0.0 * one,
        )
