"""Actuators besides the SM clock: what was measured of them, and what a machine lets one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voltana_ctrl.checks import F64, count, freeze_fields, not_negative, positive
from voltana_ctrl.errors import ConfigError

_ACTUATORS = ("power_cap_w", "mem_mhz", "cpu_mhz")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActuatorSetting:
    """What all actuators of an instance are set to.

    Parameters
    ----------
    freq_mhz : float
        Clock that the SM clock is locked at.
    power_cap_w, mem_mhz, cpu_mhz : float, optional
        Power cap of the instance (all its GPUs), memory clock lock, CPU clock; None leaves them
        as they were found.

    Raises
    ------
    ConfigError
        If a value is not positive.

    Examples
    --------
    >>> str(ActuatorSetting(freq_mhz=1410.0, power_cap_w=250.0))
    '1410 MHz, power cap 250 W'
    """

    freq_mhz: float
    power_cap_w: float | None = None
    mem_mhz: float | None = None
    cpu_mhz: float | None = None

    def __post_init__(self) -> None:
        positive("ActuatorSetting.freq_mhz", self.freq_mhz)
        for name in _ACTUATORS:
            if getattr(self, name) is not None:
                positive(f"ActuatorSetting.{name}", getattr(self, name))

    @property
    def lock_only(self) -> bool:
        """Whether nothing but the SM clock is set."""
        return all(getattr(self, name) is None for name in _ACTUATORS)

    def __str__(self) -> str:
        parts = [f"{self.freq_mhz:g} MHz"]
        if self.power_cap_w is not None:
            parts.append(f"power cap {self.power_cap_w:g} W")
        if self.mem_mhz is not None:
            parts.append(f"memory {self.mem_mhz:g} MHz")
        if self.cpu_mhz is not None:
            parts.append(f"CPU {self.cpu_mhz:g} MHz")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActuatorPoint:
    """One setting at one load, measured.

    Points that differ in the setting alone tell which actuator costs less at the same latency;
    those of plain clock locks are part of it.

    Parameters
    ----------
    phase : {"decode", "prefill"}
        What ran.
    batch_req : int
        Requests at once.
    context_tok : int
        Prompt of each: the context that decode started from, or what was prefilled.
    kv_tok : float
        Tokens in the KV cache meanwhile; 0 for prefill.
    freq_mhz, power_cap_w, mem_mhz, cpu_mhz
        See :class:`ActuatorSetting`.
    wall_s, wall_se_s : float
        Time of an iteration and its standard error.
    power_w, power_se_w : float
        Mean power of the instance and its standard error.

    Raises
    ------
    ConfigError
        If a value is outside its range.

    Examples
    --------
    >>> point = ActuatorPoint(phase="decode", batch_req=32, context_tok=512, kv_tok=20_000.0,
    ...                       freq_mhz=1410.0, power_cap_w=250.0, wall_s=0.02, wall_se_s=1e-5,
    ...                       power_w=248.0, power_se_w=0.5)
    >>> point.load, point.setting.lock_only
    (('decode', 32, 512), False)
    """

    phase: Literal["decode", "prefill"]
    batch_req: int
    context_tok: int
    kv_tok: float = 0.0
    freq_mhz: float
    power_cap_w: float | None = None
    mem_mhz: float | None = None
    cpu_mhz: float | None = None
    wall_s: float
    wall_se_s: float
    power_w: float
    power_se_w: float

    def __post_init__(self) -> None:
        if self.phase not in ("decode", "prefill"):
            raise ConfigError(f"ActuatorPoint.phase: expected decode or prefill, got {self.phase}")
        count("ActuatorPoint.batch_req", self.batch_req)
        count("ActuatorPoint.context_tok", self.context_tok)
        for name in ("wall_s", "power_w"):
            positive(f"ActuatorPoint.{name}", getattr(self, name))
        for name in ("kv_tok", "wall_se_s", "power_se_w"):
            not_negative(f"ActuatorPoint.{name}", getattr(self, name))
        _ = self.setting  # checks the rest

    @property
    def setting(self) -> ActuatorSetting:
        """What was set."""
        return ActuatorSetting(
            freq_mhz=self.freq_mhz,
            power_cap_w=self.power_cap_w,
            mem_mhz=self.mem_mhz,
            cpu_mhz=self.cpu_mhz,
        )

    @property
    def load(self) -> tuple[str, int, int]:
        """Phase, requests and context."""
        return self.phase, self.batch_req, self.context_tok


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Limits:
    """What actuators besides the SM clock are set to, per instance.

    Our own controllers set them only where the profile holds measurements that speak for it.

    Parameters
    ----------
    mem_mhz, power_cap_w, cpu_mhz : ndarray, shape (n,), optional
        Memory clock, power cap of the instance, CPU clock; infinity leaves an instance as it
        was found.

    Examples
    --------
    >>> Limits(power_cap_w=[300.0, 300.0]).power_cap_w
    array([300., 300.])
    """

    mem_mhz: F64 | None = None
    power_cap_w: F64 | None = None
    cpu_mhz: F64 | None = None

    def __post_init__(self) -> None:
        for name in ("mem_mhz", "power_cap_w", "cpu_mhz"):
            value = getattr(self, name)
            if value is None:
                continue
            freeze_fields(self, (name,), (np.asarray(value).size,))
            if not np.all(getattr(self, name) > 0.0):
                raise ConfigError(f"Limits.{name}: expected numbers > 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LimitRanges:
    """What a machine lets one set besides the SM clock, per instance.

    Told by a backend (`limit_ranges`); the guard holds every decision to it.

    Parameters
    ----------
    cap_min_w, cap_max_w : ndarray, shape (n,)
        Range of the power cap; the lowest above the highest where it cannot be set.
    cpu_min_mhz, cpu_max_mhz : ndarray, shape (n,)
        Range of the CPU clock, likewise.
    mem_clocks_mhz : tuple of tuple of float
        Memory clocks of each instance; empty where they cannot be set.

    Raises
    ------
    ShapeError, ConfigError
        If the lengths differ.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.types import ActuatorSetting, Limits
    >>> ranges = LimitRanges(cap_min_w=[100.0, np.inf], cap_max_w=[400.0, 0.0],
    ...                      cpu_min_mhz=[np.inf] * 2, cpu_max_mhz=[0.0] * 2,
    ...                      mem_clocks_mhz=((810.0, 1593.0), ()))
    >>> ranges.allow(0, ActuatorSetting(freq_mhz=1410.0, power_cap_w=90.0))
    False
    >>> ranges.held(Limits(power_cap_w=[90.0, 90.0])).power_cap_w
    array([100.,  inf])
    """

    cap_min_w: F64
    cap_max_w: F64
    cpu_min_mhz: F64
    cpu_max_mhz: F64
    mem_clocks_mhz: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        names = ("cap_min_w", "cap_max_w", "cpu_min_mhz", "cpu_max_mhz")
        freeze_fields(self, names, (len(self.mem_clocks_mhz),))
        for name in names:
            if np.isnan(getattr(self, name)).any():
                raise ConfigError(f"LimitRanges.{name}: expected numbers, got NaN")

    @classmethod
    def none(cls, n: int) -> LimitRanges:
        """Nothing can be set on any of `n` instances."""
        never, zero = np.full(n, np.inf), np.zeros(n)
        return cls(
            cap_min_w=never,
            cap_max_w=zero,
            cpu_min_mhz=never,
            cpu_max_mhz=zero,
            mem_clocks_mhz=((),) * n,
        )

    def allow(self, instance: int, setting: ActuatorSetting) -> bool:
        """Whether an instance can be set so.

        Parameters
        ----------
        instance : int
            Index in the fleet.
        setting : ActuatorSetting
            What is wished for.
        """
        cap_w, cpu_mhz, mem_mhz = setting.power_cap_w, setting.cpu_mhz, setting.mem_mhz
        caps = cap_w is None or self.cap_min_w[instance] <= cap_w <= self.cap_max_w[instance]
        cpus = (
            cpu_mhz is None or self.cpu_min_mhz[instance] <= cpu_mhz <= self.cpu_max_mhz[instance]
        )
        return bool(caps and cpus and (mem_mhz is None or mem_mhz in self.mem_clocks_mhz[instance]))

    def held(self, limits: Limits | None) -> Limits | None:
        """Limits that can be set, as near as there are to what is asked for.

        A cap or CPU clock outside its range becomes the nearest end of it, a memory clock the next
        higher one. What cannot be set at all, such as a memory clock above the highest, is left as
        it was found (infinity).

        Parameters
        ----------
        limits : Limits, optional
            What is asked for.

        Returns
        -------
        Limits or None
            None where nothing is left that can be set.
        """
        if limits is None:
            return None
        kept = {
            "power_cap_w": _within(limits.power_cap_w, self.cap_min_w, self.cap_max_w),
            "cpu_mhz": _within(limits.cpu_mhz, self.cpu_min_mhz, self.cpu_max_mhz),
            "mem_mhz": self._memory(limits.mem_mhz),
        }
        set_at_all = {
            name: value
            for name, value in kept.items()
            if value is not None and np.isfinite(value).any()
        }
        return Limits(**set_at_all) if set_at_all else None

    def _memory(self, wanted_mhz: F64 | None) -> F64 | None:
        if wanted_mhz is None:
            return None
        return np.array(
            [
                min((mhz for mhz in clocks if mhz >= wanted), default=np.inf)
                for clocks, wanted in zip(self.mem_clocks_mhz, wanted_mhz, strict=True)
            ]
        )


def _within(wanted: F64 | None, lowest: F64, highest: F64) -> F64 | None:
    if wanted is None:
        return None
    settable = np.isfinite(wanted) & (lowest <= highest)
    return np.where(settable, np.minimum(np.maximum(wanted, lowest), highest), np.inf)


def limits_of(settings: Sequence[ActuatorSetting | None]) -> Limits | None:
    """Limits of a decision that sets instances so; None leaves an instance as it was found.

    Parameters
    ----------
    settings : sequence of ActuatorSetting or None
        One per instance.

    Examples
    --------
    >>> from voltana_ctrl.types import ActuatorSetting
    >>> limits_of([None, ActuatorSetting(freq_mhz=1410.0, power_cap_w=250.0)]).power_cap_w
    array([ inf, 250.])
    >>> limits_of([None, ActuatorSetting(freq_mhz=1410.0)]) is None
    True
    """
    values: dict[str, F64] = {}
    for name in _ACTUATORS:
        told = [None if one is None else getattr(one, name) for one in settings]
        if any(value is not None for value in told):
            values[name] = np.array([np.inf if value is None else value for value in told])
    return Limits(**values) if values else None
