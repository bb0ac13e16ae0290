"""The fleet: instances, their roles, and how a fleet is written down."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, count, not_negative
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import read_toml
from voltana_ctrl.types.ladder import row_up
from voltana_ctrl.types.profile import Profile, with_idle_w
from voltana_ctrl.types.rest import DEPTHS, Depth, Rest, check_rest

_MOST_INSTANCES = 4096


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
        Time until a parked and empty instance works again, that of the profile by default, and
        energy that this takes beyond idle power.
    deep_parked, asleep, off : Rest, optional
        What it draws in deeper sleep, and what it takes to get in and out; as in the profile by
        default.
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
    >>> from voltana_ctrl import load_profile
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
        for name in ("idle_w", "wake_s", "wake_j", "rest_of_server_w"):
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
        """Power while parked and empty."""
        if self.asleep_w is not None:
            return self.asleep_w
        parked_w = self.profile.parked_w
        return self.idle_w if parked_w is None else min(parked_w, self.idle_w)

    def rest(self, depth: Depth = "parked") -> Rest:
        """Sleep of this depth, or of the deepest there is above it.

        Parameters
        ----------
        depth : {"parked", "deep_parked", "asleep", "off"}
            How deep it may sleep.

        Examples
        --------
        >>> from voltana_ctrl import load_profile
        >>> from voltana_ctrl.types import Rest
        >>> one = InstanceSpec(id="d0", role=Role.DECODE, off=Rest(power_w=20.0, wake_s=40.0),
        ...                    profile=load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> one.rest("asleep").power_w, one.rest("off").power_w
        (60.0, 20.0)
        """
        for name in DEPTHS[DEPTHS.index(depth) : 0 : -1]:
            found: Rest | None = getattr(self, name) or getattr(self.profile, name)
            if found is not None:
                return replace(found, power_w=min(found.power_w, self.idle_w))
        return Rest(power_w=self.parked_w, wake_s=self.wake_s, wake_j=self.wake_j)

    @property
    def least_rest_w(self) -> float:
        """Power in the sleep that draws least, whatever it takes to wake from it."""
        return min(self.rest(depth).power_w for depth in DEPTHS)

    @property
    def table(self) -> Any:
        """Rows of the profile at this instance's clocks, dtype PROFILE_DTYPE."""
        rows = with_idle_w(self.profile.table, self.idle_w)
        return rows[np.isin(self.profile.clocks_mhz, self.clocks_mhz)]

    def clock_rows(self, ladder_mhz: Sequence[float] | None) -> list[int]:
        """Positions in `clocks_mhz` at or above each ladder entry, without repeats.

        None means every clock; entries above the highest become the highest.

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


@dataclass(frozen=True, slots=True, eq=False)
class FleetSpec:
    """The instances that serve one model.

    Parameters
    ----------
    instances : tuple of InstanceSpec
        At least one that prefills and one that decodes; ids unique.

    Raises
    ------
    ConfigError
        If a phase has no instance, ids repeat, roles mix colocated with others, or there are more
        than 4,096 instances.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> fleet = FleetSpec.parse("2P2D", profile)
    >>> fleet.prefill, fleet.decode, fleet.ids
    (array([0, 1]), array([2, 3]), ('prefill-0', 'prefill-1', 'decode-0', 'decode-1'))
    """

    instances: tuple[InstanceSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "instances", tuple(self.instances))
        for instance in self.instances:
            if not isinstance(instance, InstanceSpec):
                raise ConfigError(f"FleetSpec: expected InstanceSpec, got {instance!r}")
        _check_size(len(self.instances))
        times = Counter(instance.id for instance in self.instances)
        repeated = sorted(name for name, count in times.items() if count > 1)
        if repeated:
            raise ConfigError(f"FleetSpec: expected unique ids, got {repeated} more than once")
        for phase, members in (("prefill", self.prefill), ("decode", self.decode)):
            if len(members) == 0:
                raise ConfigError(
                    f"FleetSpec: expected an instance that can {phase}, got none;"
                    f" add one with role {phase} or colocated"
                )
        colocated = [instance.role is Role.COLOCATED for instance in self.instances]
        if any(colocated) and not all(colocated):
            raise ConfigError(
                "FleetSpec: expected either all instances colocated or none, got a mix;"
                " describe two fleets instead"
            )

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the instances, in order."""
        return tuple(instance.id for instance in self.instances)

    @property
    def prefill(self) -> I64:
        """Indices of instances where requests start."""
        return _indices(self.instances, lambda role: role.prefills)

    @property
    def decode(self) -> I64:
        """Indices of instances where requests generate."""
        return _indices(self.instances, lambda role: role.decodes)

    @property
    def colocated(self) -> bool:
        """Whether both phases share the instances."""
        return self.instances[0].role is Role.COLOCATED

    @property
    def min_mhz(self) -> F64:
        """Lowest supported clock per instance, shape (n,)."""
        return np.array([instance.clocks_mhz[0] for instance in self.instances])

    @property
    def max_mhz(self) -> F64:
        """Highest supported clock per instance, shape (n,)."""
        return np.array([instance.clocks_mhz[-1] for instance in self.instances])

    @property
    def kv_capacity_tok(self) -> F64:
        """KV cache size per instance, shape (n,)."""
        return np.array([instance.kv_capacity_tok for instance in self.instances], np.float64)

    @property
    def rest_of_server_w(self) -> float:
        """What all servers draw besides their GPUs; 0 where nobody knows."""
        return float(sum(instance.rest_of_server_w for instance in self.instances))

    @classmethod
    def pd(
        cls, *, prefill: int = 2, decode: int = 2, profile: Profile, gpus_per_node: int = 8
    ) -> FleetSpec:
        """Fleet of equal prefill and decode instances.

        Parameters
        ----------
        prefill, decode : int
            How many of each, >= 1.
        profile : Profile
            Of every instance.
        gpus_per_node : int
            Instances are packed onto nodes of this many GPUs, in order.

        Examples
        --------
        >>> from voltana_ctrl import load_profile
        >>> len(FleetSpec.pd(prefill=1, decode=3,
        ...                  profile=load_profile("a100-sxm-80gb/llama-3.1-8b")))
        4
        """
        count("FleetSpec.pd(prefill)", prefill)
        count("FleetSpec.pd(decode)", decode)
        _check_size(prefill + decode)
        roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
        return cls(_equal_instances(roles, profile, gpus_per_node))

    @classmethod
    def parse(cls, text: str, profile: Profile, *, gpus_per_node: int = 8) -> FleetSpec:
        """Fleet from ``2P2D`` (prefill, decode) or ``4C`` (colocated).

        Raises
        ------
        ConfigError
            If the text is neither.

        Examples
        --------
        >>> from voltana_ctrl import load_profile
        >>> FleetSpec.parse("4C", load_profile("a100-sxm-80gb/llama-3.1-8b")).colocated
        True
        """
        # Digits of ASCII, and so many that a larger number is a slip of the hand.
        split = re.fullmatch(r"([0-9]{1,9})P([0-9]{1,9})D", text.strip().upper())
        if split and int(split[1]) and int(split[2]):
            prefill, decode = int(split[1]), int(split[2])
            _check_size(prefill + decode)
            return cls.pd(
                prefill=prefill, decode=decode, profile=profile, gpus_per_node=gpus_per_node
            )
        both = re.fullmatch(r"([0-9]{1,9})C", text.strip().upper())
        if both and int(both[1]):
            _check_size(int(both[1]))
            roles = [Role.COLOCATED] * int(both[1])
            return cls(_equal_instances(roles, profile, gpus_per_node))
        raise ConfigError(
            f"fleet: expected xPyD such as 2P2D, xC such as 4C, or a TOML file, got {text!r}"
        )

    @classmethod
    def from_toml(cls, path: str | Path, load_profile: Callable[[str], Profile]) -> FleetSpec:
        """Heterogeneous fleet from a TOML file of ``[[instance]]`` tables.

        Keys of a table: `role`, `profile`, and optionally `id`, `count`, `gpus`, `node`,
        `clocks_mhz`, `kv_capacity_tok`, `max_batch`, `prefill_budget_tok`,
        `max_prefill_req`, `idle_w`, `asleep_w`, `wake_s`, `wake_j`, `rest_of_server_w`, and a
        table each for `parked`, `deep_parked`, `asleep` and `off`: `power_w`, `wake_s`, `wake_j`,
        `enter_s`. A table `engine` says where the running engine of an instance is; it is read by
        :func:`voltana_ctrl.engines.load_endpoints` and means nothing here.

        Parameters
        ----------
        path : str or Path
            The file.
        load_profile : callable
            Name of a profile to :class:`Profile`; :func:`voltana_ctrl.load_profile` usually.

        Raises
        ------
        ConfigError
            Naming file, instance and key, if the file cannot be read or does not fit.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> from voltana_ctrl import load_profile
        >>> text = '''
        ... [[instance]]
        ... role = "prefill"
        ... profile = "a100-sxm-80gb/llama-3.1-8b"
        ... [[instance]]
        ... role = "decode"
        ... profile = "a100-sxm-80gb/llama-3.1-8b"
        ... count = 2
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "fleet.toml"
        ...     _ = path.write_text(text)
        ...     FleetSpec.from_toml(path, load_profile).ids
        ('prefill-0', 'decode-0', 'decode-1')
        """
        data = read_toml(path)
        unknown = sorted(set(data) - {"instance"})
        tables = data.get("instance")
        if unknown or not isinstance(tables, list) or not tables:
            got = f"unknown key {unknown[0]!r}" if unknown else "none"
            raise ConfigError(f"{path}: expected [[instance]] tables only, got {got}")
        instances: list[InstanceSpec] = []
        for number, table in enumerate(tables, start=1):
            try:
                instances.extend(_instances_of(table, instances, load_profile))
            except ConfigError as error:
                raise ConfigError(f"{path}: instance {number}: {error}") from error
        try:
            return cls(tuple(instances))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


_TOML_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "id": str,
    "role": str,
    "profile": str,
    "count": int,
    "gpus": int,
    "node": str,
    "clocks_mhz": list,
    "kv_capacity_tok": int,
    "max_batch": int,
    "prefill_budget_tok": int,
    "max_prefill_req": int,
    "idle_w": (int, float),
    "asleep_w": (int, float),
    "wake_s": (int, float),
    "wake_j": (int, float),
    "parked": dict,
    "deep_parked": dict,
    "asleep": dict,
    "off": dict,
    "rest_of_server_w": (int, float),
    "engine": dict,
}


def _instances_of(
    table: Any, before: list[InstanceSpec], load_profile: Callable[[str], Profile]
) -> list[InstanceSpec]:
    if not isinstance(table, dict):
        raise ConfigError(f"expected a table, got {table!r}")
    for key, value in table.items():
        if key not in _TOML_KEYS:
            raise ConfigError(f"unknown key {key!r}; known are {', '.join(_TOML_KEYS)}")
        if not isinstance(value, _TOML_KEYS[key]) or isinstance(value, bool):
            raise ConfigError(f"{key}: wrong type, got {value!r}")
    for key in ("role", "profile"):
        if key not in table:
            raise ConfigError(f"{key}: missing")
    settings = {key: value for key, value in table.items() if key != "engine"}
    settings |= _rests(table)
    settings.pop("parked", None)
    roles = {role.value: role for role in Role}
    name = settings.pop("role")
    if name not in roles:
        raise ConfigError(f"role: expected one of {', '.join(roles)}, got {name!r}")
    role = roles[name]
    copies = settings.pop("count", 1)
    if not copies >= 1:
        raise ConfigError(f"count: expected at least 1, got {copies}")
    _check_size(len(before) + copies)
    profile = load_profile(settings.pop("profile"))
    stem = settings.pop("id", None)
    first = sum(instance.role is role for instance in before)
    if stem is not None and copies == 1:
        return [InstanceSpec(id=stem, role=role, profile=profile, **settings)]
    return [
        InstanceSpec(
            id=f"{stem or role.value}-{(0 if stem else first) + copy}",
            role=role,
            profile=profile,
            **settings,
        )
        for copy in range(copies)
    ]


def _check_size(instances: int) -> None:
    """Refuse a fleet beyond what is tried, before anything is built."""
    if instances > _MOST_INSTANCES:
        raise ConfigError(
            f"fleet: expected at most {_MOST_INSTANCES} instances, got {instances}; describe it as"
            " several fleets"
        )


def _rests(table: Mapping[str, Any]) -> dict[str, Any]:
    """Depths of sleep as an instance takes them; "parked" is three numbers of its own."""
    found: dict[str, Any] = {}
    for depth in DEPTHS:
        if depth not in table:
            continue
        try:
            found[depth] = Rest.parse(table[depth])
        except ConfigError as error:
            raise ConfigError(f"{depth}: {error}") from error
    if "parked" not in found:
        return found
    twice = [name for name in ("asleep_w", "wake_s", "wake_j") if name in table]
    if twice:
        raise ConfigError(f"parked: expected it or {twice[0]}, which says the same, got both")
    parked = found.pop("parked")
    if parked.enter_s:
        raise ConfigError(
            f"parked.enter_s: expected none, who is empty is parked, got {parked.enter_s:g}; it"
            " belongs to a deeper sleep"
        )
    return found | {
        "asleep_w": parked.power_w,
        "wake_s": parked.wake_s,
        "wake_j": parked.wake_j,
    }


def _equal_instances(
    roles: list[Role], profile: Profile, gpus_per_node: int
) -> tuple[InstanceSpec, ...]:
    instances: list[InstanceSpec] = []
    seen: dict[Role, int] = {}
    per_node = max(1, gpus_per_node // profile.gpus)
    for position, role in enumerate(roles):
        number = seen.get(role, 0)
        seen[role] = number + 1
        instances.append(
            InstanceSpec(
                id=f"{role.value}-{number}",
                role=role,
                profile=profile,
                node=f"node{position // per_node}",
            )
        )
    return tuple(instances)


def _indices(instances: tuple[InstanceSpec, ...], keep: Callable[[Role], bool]) -> I64:
    found = np.array([i for i, one in enumerate(instances) if keep(one.role)], dtype=np.int64)
    found.flags.writeable = False
    return found
