"""Instances and GPUs that fit together, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from voltana_ctrl.backends.nvml.driver import Gpu
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import FleetSpec


def assigned_uuids(fleet: FleetSpec, gpus: Mapping[str, Sequence[str]]) -> list[str]:
    """UUIDs of the GPUs of all instances, in the order of the fleet.

    Raises
    ------
    ConfigError
        If an instance has not as many GPUs as its profile, or two share one.
    """
    unknown = sorted(set(gpus) - set(fleet.ids))
    if unknown:
        raise ConfigError(
            f"NvmlBackend.gpus: expected instances of the fleet ({', '.join(fleet.ids)}), got"
            f" {unknown[0]!r}"
        )
    uuids: list[str] = []
    for instance in fleet.instances:
        named = gpus.get(instance.id, ())
        if isinstance(named, str) or len(named) != instance.gpus:
            raise ConfigError(
                f"NvmlBackend.gpus: {instance.id}: expected a list of {instance.gpus} GPU"
                f" UUID(s), the tensor parallel degree of its profile, got {named!r}"
            )
        uuids.extend(named)
    twice = sorted({uuid for uuid in uuids if uuids.count(uuid) > 1})
    if twice:
        raise ConfigError(f"NvmlBackend.gpus: expected each GPU once, got {twice[0]} twice")
    return uuids


def check_clocks(
    fleet: FleetSpec,
    gpus: Mapping[str, Sequence[str]],
    found: Mapping[str, Gpu],
    restore_lock_mhz: tuple[int, int] | None,
) -> None:
    """Refuse clocks that the GPU of an instance does not support."""
    for instance in fleet.instances:
        for uuid in gpus[instance.id]:
            supported = found[uuid].clocks_mhz
            strange = sorted(set(instance.clocks_mhz.tolist()) - set(supported))
            if strange:
                known = f"{supported[0]}..{supported[-1]} MHz" if supported else "none"
                raise ConfigError(
                    f"NvmlBackend: {instance.id}: GPU {uuid} ({found[uuid].name}) supports"
                    f" {known}, not {strange[0]:g} MHz of profile {instance.profile.name}; give"
                    " the instance clocks_mhz of its GPU, or choose a profile of this GPU"
                )
            if restore_lock_mhz is not None:
                lo_mhz, hi_mhz = restore_lock_mhz
                if not (lo_mhz in supported and hi_mhz in supported and lo_mhz <= hi_mhz):
                    raise ConfigError(
                        f"NvmlBackend.restore_lock_mhz: expected two clocks that GPU {uuid}"
                        f" supports, lowest first, got {restore_lock_mhz}"
                    )
