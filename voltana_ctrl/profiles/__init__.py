"""Profiles: what one instance of a (GPU, model, engine) does at each clock.

Every profile is a TOML file of laws: a few coefficients and the shapes with which they depend
on the clock, each section with its `status`, `source` and `error`. :func:`load_profile`
evaluates the laws on the card's ladder of supported clocks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.profiles.format import profile_from_laws
from voltana_ctrl.textfile import parse_toml
from voltana_ctrl.types import DEPTHS, FleetSpec, Profile

__all__ = ["dilated", "dilation_of", "list_profiles", "load_profile"]

_FACTOR = re.compile(r"\d{1,4}(\.\d{1,3})?")


def list_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted.

    Examples
    --------
    >>> "a100-sxm-80gb/llama-3.1-8b" in list_profiles()
    True
    """
    gpus = (folder for folder in (files(__name__) / "data").iterdir() if folder.is_dir())
    names = [
        f"{gpu.name}/{model.name.removesuffix('.toml')}"
        for gpu in gpus
        for model in gpu.iterdir()
        if model.name.endswith(".toml")
    ]
    return tuple(sorted(names))


def load_profile(name: str | Path) -> Profile:
    """Profile by name, or from a TOML file of one's own.

    Parameters
    ----------
    name : str or Path
        One of :func:`list_profiles`, or the path of a file that ends in ``.toml``. With ``@10``
        behind it everything takes ten times as long and as much energy, see :func:`dilated`.

    Returns
    -------
    Profile
        With one row of its table per supported clock.

    Raises
    ------
    ConfigError
        If there is no such profile, or the file cannot be read or does not fit the format.

    Examples
    --------
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> len(profile.table), profile.kv_capacity_tok
    (81, 450000)
    >>> load_profile("a100-sxm-80gb/llama-3-8b")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: profile: expected one of ..., got
    'a100-sxm-80gb/llama-3-8b'; did you mean 'a100-sxm-80gb/llama-3.1-8b'?
    """
    text = str(name)
    base, at, factor = text.rpartition("@")
    if at and _FACTOR.fullmatch(factor):
        return dilated(load_profile(base), float(factor))
    if text.endswith(".toml"):
        return _read(text, Path(text).read_bytes)
    known = list_profiles()
    if text not in known:
        close = difflib.get_close_matches(text, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else "; or name a .toml file"
        raise ConfigError(f"profile: expected one of {', '.join(known)}, got {text!r}{hint}")
    return _read(text, (files(__name__) / "data" / f"{text}.toml").read_bytes)


def dilated(profile: Profile, dilation: float) -> Profile:
    """The same instance in slow motion: times and energies stretched, powers as they were.

    What holds of a fleet at its load holds of the dilated one at a load so much smaller, if its
    promises are so much longer. An emulated engine has time for it that a real one has not.

    Parameters
    ----------
    profile : Profile
        At its true speed.
    dilation : float
        How many times as long everything takes.

    Raises
    ------
    ConfigError
        If the dilation is not positive.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> one = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> ten = dilated(one, 10.0)
    >>> ten.name, bool((ten.table["decode_base_s"] == 10.0 * one.table["decode_base_s"]).all())
    ('a100-sxm-80gb/llama-3.1-8b@10', True)
    """
    positive("dilation", dilation)
    table = profile.table.copy()
    for column in table.dtype.names or ():
        if column.endswith(("_s", "_j")):
            table[column] *= dilation
    deeper = {
        depth: replace(
            rest,
            wake_s=rest.wake_s * dilation,
            wake_j=rest.wake_j * dilation,
            enter_s=rest.enter_s * dilation,
        )
        for depth in DEPTHS[1:]
        if (rest := getattr(profile, depth)) is not None
    }
    return replace(
        profile,
        name=f"{profile.name}@{dilation:g}",
        table=table,
        link_bytes_s=profile.link_bytes_s / dilation,
        link_latency_s=profile.link_latency_s * dilation,
        transfer_j_per_tok=profile.transfer_j_per_tok * dilation,
        wake_s=profile.wake_s * dilation,
        clock_stall_s=profile.clock_stall_s * dilation,
        clock_change_j=profile.clock_change_j * dilation,
        **deeper,
    )


def dilation_of(fleet: FleetSpec) -> float:
    """How many times as long everything takes on a fleet in slow motion.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.

    Returns
    -------
    float
        The factor with which its profiles were :func:`dilated`, of several the least; 1 where
        one of them was not. How long orders hold goes by it, so in doubt it is short.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> dilation_of(FleetSpec.parse("2C", load_profile("a100-sxm-80gb/llama-3.1-8b@10")))
    10.0
    """
    factors = [_factor(one.profile.name) for one in fleet.instances]
    return max(1.0, min(factors))


def _factor(name: str) -> float:
    """What stands behind the ``@`` of a profile in slow motion; 1 of any other."""
    _, at, factor = name.rpartition("@")
    return float(factor) if at and _FACTOR.fullmatch(factor) else 1.0


def _read(where: str, read_bytes: Callable[[], bytes]) -> Profile:
    try:
        text = read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"profile {where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"profile {where}: expected TOML: {error}") from error
    laws = parse_toml(text, f"profile {where}")
    try:
        profile = profile_from_laws(laws)
    except ConfigError as error:
        raise ConfigError(f"profile {where}: {error}") from error
    if _factor(profile.name) != 1.0:
        raise ConfigError(
            f"profile {where}: name: expected one without a number behind an @, which is for slow"
            f" motion, got {profile.name!r}"
        )
    return profile
