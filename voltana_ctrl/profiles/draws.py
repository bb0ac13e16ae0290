"""Profiles as they may be in truth, drawn from their bands."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import DEPTHS, Band, FleetSpec, InstanceSpec, Profile

__all__ = ["draw_fleet", "draw_profile"]

_DECODE_TIME = (
    "decode_base_s",
    "decode_req_s",
    "decode_kv_s",
    "decode_floor_s",
    "decode_roof_s",
    "decode_roof_base_s",
)
_PREFILL_TIME = ("prefill_base_s", "prefill_tok_s", "prefill_tok2_s")
_DECODE_POWER = ("decode_power_w", "decode_iter_j", "decode_req_j", "decode_kv_j")
#: Octaves below the highest clock from which on the response to the clock is as far off as it gets.
_FAR_OCTAVES = 0.5


def draw_profile(profile: Profile, rng: np.random.Generator) -> Profile:
    """One profile out of the band of another.

    Log-normal factors, one for each number of the :class:`~voltana_ctrl.types.Band`: what is
    wrong with a source is wrong at all clocks. Drawn times never rise with the clock, drawn powers
    never fall and never pass the cap.

    Parameters
    ----------
    profile : Profile
        A profile with a band.
    rng : numpy.random.Generator
        Source of randomness, advanced by the call.

    Raises
    ------
    ConfigError
        If the profile has no band.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> drawn = draw_profile(profile, np.random.default_rng(0))
    >>> drawn.name == profile.name, bool(drawn.idle_w != profile.idle_w)
    (True, True)
    """
    band = profile.band
    if band is None:
        raise ConfigError(
            f"profile {profile.name}: has no section [band], so nothing is known of how far it may"
            " be from the truth; add one, or fit it anew"
        )
    by = {
        field.name: getattr(band, field.name) * rng.standard_normal() for field in fields(Band)
    }  # fmt: skip
    table = profile.table.copy()
    far = np.log2(table["clock_mhz"][-1] / table["clock_mhz"]) / _FAR_OCTAVES
    far = np.clip(far, 0.0, 1.0)

    def scale(names: tuple[str, ...], level: str, clock: str) -> None:
        factor = np.exp(by[level] + by[clock] * far)
        for name in names:
            table[name] *= factor

    scale(_DECODE_TIME, "decode_time_frac", "clock_time_frac")
    scale(_PREFILL_TIME, "prefill_time_frac", "clock_time_frac")
    scale(_DECODE_POWER, "decode_power_frac", "clock_power_frac")
    scale(("prefill_power_w",), "prefill_power_frac", "clock_power_frac")
    for name in (*_DECODE_TIME, *_PREFILL_TIME):
        table[name] = np.maximum.accumulate(table[name][::-1])[::-1]
    for name in (*_DECODE_POWER, "prefill_power_w"):
        table[name] = np.maximum.accumulate(table[name])
    for name in ("decode_power_w", "prefill_power_w"):
        table[name] = np.minimum(table[name], profile.power_cap_w)
    spare_w = profile.power_cap_w - table["prefill_power_w"]
    table["prefill_beside_w"] = np.minimum(table["prefill_beside_w"], spare_w)
    idle = float(np.exp(by["idle_frac"]))
    table["idle_w"] *= idle
    parked_w = None if profile.parked_w is None else profile.parked_w * idle
    deeper = {
        depth: replace(rest, power_w=rest.power_w * idle)
        for depth in DEPTHS[1:]
        if (rest := getattr(profile, depth)) is not None
    }
    idle_w = float(table["idle_w"][-1])
    return replace(profile, table=table, idle_w=idle_w, parked_w=parked_w, **deeper)


def draw_fleet(fleet: FleetSpec, rng: np.random.Generator) -> FleetSpec:
    """One fleet out of the bands of its profiles; instances of one profile share its draw.

    Idle power that the fleet file gives for an instance is its own, and stays.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    rng : numpy.random.Generator
        Source of randomness, advanced by the call.

    Raises
    ------
    ConfigError
        If a profile has no band.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> drawn = draw_fleet(fleet, np.random.default_rng(0))
    >>> drawn.instances[0].profile is drawn.instances[3].profile
    True
    """
    profiles = {id(one.profile): one.profile for one in fleet.instances}
    drawn = {key: draw_profile(profile, rng) for key, profile in profiles.items()}
    return FleetSpec(tuple(_with(one, drawn[id(one.profile)]) for one in fleet.instances))


def _with(one: InstanceSpec, profile: Profile) -> InstanceSpec:
    """The instance with another profile; sleep of its own draws no more than it idles at now."""
    idle_w = profile.idle_w if one.idle_w == one.profile.idle_w else one.idle_w
    deeper = {
        depth: replace(rest, power_w=min(rest.power_w, idle_w))
        for depth in DEPTHS[1:]
        if (rest := getattr(one, depth)) is not None
    }
    asleep_w = None if one.asleep_w is None else min(one.asleep_w, idle_w)
    return replace(one, profile=profile, idle_w=idle_w, asleep_w=asleep_w, **deeper)
