"""The fleet: instances, their roles, and how a fleet is written down."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, count
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import read_toml
from voltana_ctrl.types.instance import InstanceSpec, Role
from voltana_ctrl.types.profile import Profile
from voltana_ctrl.types.rest import DEPTHS, Rest

_MOST_INSTANCES = 4096
#: A KV cache beyond this fraction is full: it is given out in blocks, and every request that runs
#: takes another token with each iteration.
KV_FULL_FRAC = 0.98


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
    def may_prefill(self) -> I64:
        """Indices of instances where requests start, or might after a change of role."""
        return _indices(self.instances, lambda role: role.prefills, roles=True)

    @property
    def may_decode(self) -> I64:
        """Indices of instances where requests generate, or might after a change of role."""
        return _indices(self.instances, lambda role: role.decodes, roles=True)

    def flexible(self) -> FleetSpec:
        """The same fleet, all of whose prefill and decode instances may change between the two.

        Returns
        -------
        FleetSpec
            A new one; this one stays as it is.

        Raises
        ------
        ConfigError
            If its instances do both at once already.

        Examples
        --------
        >>> from voltana_ctrl import load_profile
        >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
        >>> FleetSpec.parse("1P2D", profile).flexible().may_prefill
        array([0, 1, 2])
        """
        if self.colocated:
            raise ConfigError(
                "roles: expected prefill and decode instances, got colocated ones, which do both"
            )
        both = (Role.PREFILL, Role.DECODE)
        return FleetSpec(tuple(replace(one, roles=both) for one in self.instances))

    def in_roles(self, roles: Sequence[Role]) -> FleetSpec:
        """The same machines in other roles; they keep their names.

        Parameters
        ----------
        roles : sequence of Role
            One per instance.

        Returns
        -------
        FleetSpec
            A new one; this one stays as it is.

        Examples
        --------
        >>> from voltana_ctrl import Role, load_profile
        >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
        >>> FleetSpec.parse("2P1D", profile).in_roles([Role.COLOCATED] * 3).colocated
        True
        """
        return FleetSpec(
            tuple(replace(one, role=role) for one, role in zip(self.instances, roles, strict=True))
        )

    def check_roles(self, roles: Sequence[Role]) -> None:
        """Refuse roles that its instances cannot have, or that leave a phase to nobody.

        Parameters
        ----------
        roles : sequence of Role
            One per instance.

        Raises
        ------
        ConfigError
            Naming the instance or the phase.

        Examples
        --------
        >>> from voltana_ctrl import Role, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> fleet.check_roles([Role.DECODE, Role.DECODE])
        Traceback (most recent call last):
        voltana_ctrl.errors.ConfigError: roles: prefill-0 is prefill for good, got decode; ...
        """
        if len(roles) != len(self):
            raise ConfigError(f"roles: expected one of {len(self)} instances each, got {roles!r}")
        for one, role in zip(self.instances, roles, strict=True):
            if role is not one.role and role not in one.roles:
                raise ConfigError(
                    f"roles: {one.id} is {one.role.value} for good, got {role.value}; give it"
                    ' roles = ["prefill", "decode"]'
                )
        for phase in ("prefill", "decode"):
            if not any(getattr(role, f"{phase}s") for role in roles):
                raise ConfigError(f"roles: expected somebody to {phase}, got nobody")

    @property
    def colocated(self) -> bool:
        """Whether both phases share the instances."""
        return self.instances[0].role is Role.COLOCATED

    @property
    def layout(self) -> str:
        """How many instances have which role, as :meth:`parse` reads it: ``2P2D`` or ``4C``.

        Examples
        --------
        >>> from voltana_ctrl import Role, load_profile
        >>> fleet = FleetSpec.parse("4C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> fleet.layout, fleet.in_roles([Role.PREFILL] * 3 + [Role.DECODE]).layout
        ('4C', '3P1D')
        """
        if self.colocated:
            return f"{len(self)}C"
        return f"{len(self.prefill)}P{len(self.decode)}D"

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
            Profile of every instance.
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

        Parameters
        ----------
        text : str
            So many instances of either kind, each at least 1; small letters will do.
        profile : Profile
            Profile of every instance.
        gpus_per_node : int
            Instances are packed onto nodes of this many GPUs, in order.

        Raises
        ------
        ConfigError
            If the text is neither, or asks for more than 4,096 instances.

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
        `max_prefill_req`, `idle_w`, `asleep_w`, `wake_s`, `wake_j`, `rest_of_server_w`, `roles`,
        `turn_s`, and a table each for `parked`, `deep_parked`, `asleep` and `off`: `power_w`,
        `wake_s`, `wake_j`, `enter_s`. A table `engine` says where the running engine of an
        instance is; it is read by
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
    "roles": list,
    "turn_s": (int, float),
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
    for name in settings.get("roles", ()):
        if not isinstance(name, str) or name not in roles:
            raise ConfigError(f"roles: expected names out of {', '.join(roles)}, got {name!r}")
    if "roles" in settings:
        settings["roles"] = tuple(roles[name] for name in settings["roles"])
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


def _indices(
    instances: tuple[InstanceSpec, ...], keep: Callable[[Role], bool], *, roles: bool = False
) -> I64:
    found = np.array(
        [
            i
            for i, one in enumerate(instances)
            if any(keep(role) for role in ((one.role, *one.roles) if roles else (one.role,)))
        ],
        dtype=np.int64,
    )
    found.flags.writeable = False
    return found
