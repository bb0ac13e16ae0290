"""One instance of a fleet: its role, its limits, its clocks and how it sleeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, count, not_negative
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types.ladder import row_up
from voltana_ctrl.types.profile import Profile, with_idle_w
from voltana_ctrl.types.rest import DEPTHS, Depth, Rest, check_rest


class Role(Enum):
    """What an instance does: prefill, decode, or both (colocated).

    Examples
    --------
    >>> Role("decode")
    <Role.DECODE: 'decode'>
    """

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    @property
    def prefills(self) -> bool:
        """Whether new requests start here."""
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Whether requests generate their tokens here."""
        return self is not Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InstanceSpec:
    """One engine on one or more GPUs with one clock.

    Limits left out are taken from the profile.

    Parameters
    ----------
    id : str
        Unique in the fleet.
    role : Role
        Prefill, decode or colocated.
    profile : Profile
        Latency and energy of this instance.
    clocks_mhz : ndarray, optional
        Supported clocks, ascending; a subset of the profile's ladder.
    kv_capacity_tok, max_batch, prefill_budget_tok : int, optional
        KV cache size, running-request limit, prompt tokens per iteration.
    max_prefill_req : int
        Requests that one iteration may prefill together.
    gpus : int, optional
        GPUs of the instance; must be what the profile was made for.
    idle_w : float, optional
        Power when nothing runs, at the highest clock.
    asleep_w : float, optional
        Power while it is parked and empty; what the profile says by default, and `idle_w` where
        it does not.
    wake_s, wake_j : float
        Time until a parked and empty instance works again, that of the profile by default; and
        energy that this takes beyond idle power, 0 by default.
    deep_parked, asleep, off : Rest, optional
        What it draws in deeper sleep, and what it takes to get in and out; as in the profile by
        default.
    roles : tuple of Role
        Prefill and decode, where it may change between them; empty where it may not.
    turn_s : float
        How long a change takes once it is empty, at idle power.
    rest_of_server_w : float, optional
        What its server draws besides the GPUs, as its share; that of the profile by default.
    node : str
        Clock sets are serialised among instances of one node.

    Raises
    ------
    ConfigError
        If a value is outside its range or a clock is not in the profile's ladder.

    Examples
    --------
    >>> from voltana_ctrl import Role, load_profile
    >>> decode = InstanceSpec(id="d0", role=Role.DECODE,
    ...                       profile=load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decode.kv_capacity_tok
    450000
    """

    id: str
    role: Role
    profile: Profile
    clocks_mhz: F64 = None  # type: ignore[assignment]  # filled from the profile
    kv_capacity_tok: int = None  # type: ignore[assignment]
    max_batch: int = None  # type: ignore[assignment]
    prefill_budget_tok: int = None  # type: ignore[assignment]
    max_prefill_req: int = 1_000_000
    gpus: int = None  # type: ignore[assignment]
    idle_w: float = None  # type: ignore[assignment]
    asleep_w: float | None = None
    wake_s: float = None  # type: ignore[assignment]
    wake_j: float = 0.0
    deep_parked: Rest | None = None
    asleep: Rest | None = None
    off: Rest | None = None
    roles: tuple[Role, ...] = ()
    turn_s: float = 0.03
    rest_of_server_w: float = None  # type: ignore[assignment]
    node: str = "node0"

    def __post_init__(self) -> None:
        label = f"InstanceSpec({self.id})"
        if not (isinstance(self.id, str) and self.id):
            raise ConfigError(f"InstanceSpec.id: expected a non-empty name, got {self.id!r}")
        if not isinstance(self.role, Role):
            raise ConfigError(
                f"{label}.role: expected a Role (prefill, decode, colocated), got {self.role!r}"
            )
        for name in (
            "clocks_mhz",
            "kv_capacity_tok",
            "max_batch",
            "prefill_budget_tok",
            "gpus",
            "idle_w",
            "wake_s",
            "rest_of_server_w",
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.profile, name))
        for name in ("kv_capacity_tok", "max_batch", "prefill_budget_tok", "max_prefill_req"):
            count(f"{label}.{name}", getattr(self, name))
        object.__setattr__(self, "roles", tuple(self.roles))
        both = {Role.PREFILL, Role.DECODE}
        if self.roles and not (set(self.roles) == both and self.role in both):
            raise ConfigError(
                f"{label}.roles: expected prefill and decode, its role among them, or none, got"
                f" {', '.join(str(getattr(one, 'value', one)) for one in self.roles)} and role"
                f" {self.role.value}"
            )
        for name in ("idle_w", "wake_s", "wake_j", "rest_of_server_w", "turn_s"):
            not_negative(f"{label}.{name}", getattr(self, name))
        if self.asleep_w is not None:
            not_negative(f"{label}.asleep_w", self.asleep_w)
            if self.asleep_w > self.idle_w:
                raise ConfigError(
                    f"{label}.asleep_w: expected at most {self.idle_w:g}, its idle_w, got"
                    f" {self.asleep_w:g}"
                )
        for name in DEPTHS[1:]:
            check_rest(f"{label}.{name}", getattr(self, name), self.idle_w)
        if self.gpus != self.profile.gpus:
            raise ConfigError(
                f"{label}.gpus: expected {self.profile.gpus}, the tensor parallel degree of"
                f" profile {self.profile.name}, got {self.gpus}; choose a profile made for it"
            )
        try:
            clocks_mhz = np.array(self.clocks_mhz, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"{label}.clocks_mhz: expected a list of clocks in MHz, got {self.clocks_mhz!r}"
            ) from None
        known = np.isin(clocks_mhz, self.profile.clocks_mhz)
        if clocks_mhz.ndim != 1 or clocks_mhz.size == 0 or not np.all(known):
            raise ConfigError(
                f"{label}.clocks_mhz: expected clocks of profile {self.profile.name}"
                f" ({self.profile.clocks_mhz[0]:g}..{self.profile.clocks_mhz[-1]:g} MHz),"
                f" got {clocks_mhz[~known] if clocks_mhz.ndim == 1 else clocks_mhz}"
            )
        clocks_mhz = np.unique(clocks_mhz)
        clocks_mhz.flags.writeable = False
        object.__setattr__(self, "clocks_mhz", clocks_mhz)

    @property
    def parked_w(self) -> float:
        """Power [W] while parked and empty."""
        if self.asleep_w is not None:
            return self.asleep_w
        parked_w = self.profile.parked_w
        return self.idle_w if parked_w is None else min(parked_w, self.idle_w)

    def rest(self, depth: Depth = "parked") -> Rest:
        """Sleep of this depth; where there is none, the next less deep one that there is.

        Parameters
        ----------
        depth : {"parked", "deep_parked", "asleep", "off"}
            How deep it may sleep.

        Examples
        --------
        >>> from voltana_ctrl import Role, load_profile
        >>> from voltana_ctrl.types import Rest
        >>> one = InstanceSpec(id="d0", role=Role.DECODE, off=Rest(power_w=20.0, wake_s=40.0),
        ...                    profile=load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> one.rest("asleep").power_w, one.rest("off").power_w
        (70.0, 20.0)
        """
        for name in DEPTHS[DEPTHS.index(depth) : 0 : -1]:
            found: Rest | None = getattr(self, name) or getattr(self.profile, name)
            if found is not None:
                return replace(found, power_w=min(found.power_w, self.idle_w))
        return Rest(power_w=self.parked_w, wake_s=self.wake_s, wake_j=self.wake_j)

    @property
    def least_rest_w(self) -> float:
        """Power [W] in the sleep that draws least, whatever it takes to wake from it."""
        return min(self.rest(depth).power_w for depth in DEPTHS)

    @property
    def table(self) -> Any:
        """Rows of the profile at this instance's clocks, dtype PROFILE_DTYPE."""
        rows = with_idle_w(self.profile.table, self.idle_w)
        return rows[np.isin(self.profile.clocks_mhz, self.clocks_mhz)]

    def clock_rows(self, ladder_mhz: Sequence[float] | None) -> list[int]:
        """Positions in `clocks_mhz` at or above each ladder entry, without repeats.

        None means every clock; entries above the highest become the highest.

        Returns
        -------
        list of int
            Ascending.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> fleet.instances[0].clock_rows([1005, 1006, 2000])
        [53, 54, 80]
        """
        if ladder_mhz is None:
            return list(range(len(self.clocks_mhz)))
        return sorted({row_up(self.clocks_mhz, freq_mhz) for freq_mhz in ladder_mhz})
