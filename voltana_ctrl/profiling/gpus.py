"""The GPUs of an engine while it is measured: clock set, power, energy and heat read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voltana_ctrl.backends.nvml.driver import Gpu, Nvml, whole_gpus
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
from voltana_ctrl.errors import BackendError, ConfigError, TelemetryStale
from voltana_ctrl.kernels.layout import PROFILE_DTYPE
from voltana_ctrl.types import ActuatorSetting, FleetSpec, InstanceSpec, Profile, Role

_STALE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One look at the GPUs of one engine, at the time `t_s` in seconds of ``time.perf_counter``.

    Energy is that of all of them since they were opened, the clock the lowest of them, the
    temperature that of the hottest.
    """

    t_s: float = 0.0
    energy_j: float = 0.0
    freq_mhz: float = 0.0
    temperature_c: int | None = None


class ProfiledGpus:
    """GPUs of one or two engines; a context manager that gives them back.

    Parameters
    ----------
    groups : sequence of tuple of str
        UUIDs of the GPUs of each engine; may be empty.
    settings : sequence of ActuatorSetting
        Everything that will be set; empty opens the GPUs for reading only.
    setter, restore_lock_mhz, lock_dir, library
        See :class:`~voltana_ctrl.backends.NvmlBackend`.

    Raises
    ------
    ConfigError
        If a GPU does not support a clock, power cap or memory clock.
    BackendError
        If there is no driver, or another controller holds a GPU.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, ...]],
        settings: Sequence[ActuatorSetting],
        *,
        setter: Path | None = None,
        restore_lock_mhz: tuple[int, int] | None = None,
        lock_dir: Path = LOCK_DIR,
        library: Path | None = None,
    ) -> None:
        clocks_mhz = sorted({round(setting.freq_mhz) for setting in settings})
        self._groups = tuple(groups)
        self._nvml: Nvml | None = None
        self._backend: NvmlBackend | None = None
        self._gpus: list[tuple[Gpu, ...]] = []
        if not self._groups:
            return
        self._nvml = Nvml(library)
        try:
            self._gpus = [whole_gpus(self._nvml, group) for group in self._groups]
            instances = [
                InstanceSpec(
                    id=f"engine-{number}",
                    role=Role.COLOCATED,
                    profile=_unmeasured(gpus, clocks_mhz),
                )
                for number, gpus in enumerate(self._gpus)
            ]
            self._backend = NvmlBackend(
                FleetSpec(tuple(instances)),
                {each.id: group for each, group in zip(instances, self._groups, strict=True)},
                actuate=bool(clocks_mhz),
                setter=setter,
                restore_lock_mhz=restore_lock_mhz,
                lock_dir=lock_dir,
                library=library,
            )
            self._check_others(settings)
        except BaseException:
            self.close()
            raise

    def _check_others(self, settings: Sequence[ActuatorSetting]) -> None:
        if self._backend is None:
            return
        ranges = self._backend.limit_ranges
        for group, uuids in enumerate(self._groups):
            for setting in settings:
                if not ranges.allow(group, setting):
                    known = ", ".join(f"{mhz:g}" for mhz in ranges.mem_clocks_mhz[group]) or "none"
                    lowest_w, highest_w = ranges.cap_min_w[group], ranges.cap_max_w[group]
                    caps = (
                        f"{lowest_w:g}..{highest_w:g} W"
                        if lowest_w <= highest_w
                        else "no power cap"
                    )
                    raise ConfigError(
                        f"GPU {', '.join(uuids)}: {setting}: cannot be set; it takes {caps}, memory"
                        f" clocks {known} MHz (the setter sets neither)"
                    )

    @property
    def there(self) -> bool:
        """Whether there are any GPUs to read."""
        return self._backend is not None

    def group_of(self, uuids: tuple[str, ...]) -> int:
        """Number of the engine with these GPUs, from 0; 0 also where there are no GPUs."""
        return self._groups.index(uuids) if self._groups else 0

    def look(self, group: int, setting: ActuatorSetting | None) -> GpuSample:
        """Keep one engine set as it shall be, and read its GPUs.

        Parameters
        ----------
        group : int
            Number of the engine, see :meth:`group_of`.
        setting : ActuatorSetting or None
            What is set where it is not yet; None leaves everything.

        Returns
        -------
        GpuSample
            As of now.

        Raises
        ------
        ActuationDenied, BackendError
            If it cannot be set, or a GPU is lost or does not answer.
        """
        if self._backend is None:
            raise BackendError("ProfiledGpus.look: there are no GPUs")
        if setting is not None:
            self._backend.set_instance(group, setting)
        state = self._backend.read().state
        uuids = ", ".join(self._groups[group])
        if not state.alive[group]:
            told = {each.uuid: each.failure for each in self._backend.capabilities}
            said = "; ".join(filter(None, (told[uuid] for uuid in self._groups[group])))
            raise BackendError(f"GPU {uuids}: does not answer: {said or 'the engine says so'}")
        if not state.age_s[group] <= _STALE_S:
            raise TelemetryStale(f"GPU {uuids}: last reading {state.age_s[group]:.0f} s old")
        counts = {each.uuid: each.energy_counter for each in self._backend.capabilities}
        if state.power_w[group] == 0.0 and not all(counts[each] for each in self._groups[group]):
            said = self._backend.problems().get(self._backend.spec.ids[group], "power is 0 W")
            raise BackendError(f"GPU {uuids}: neither power nor energy can be read: {said}")
        heat_c = [gpu.temperature_c for gpu in self._gpus[group]]
        return GpuSample(
            t_s=time.perf_counter(),
            energy_j=float(state.energy_j[group]),
            freq_mhz=float(state.freq_mhz[group]),
            temperature_c=max((each for each in heat_c if each is not None), default=None),
        )

    def close(self) -> None:
        """Give the clocks back; may be called twice."""
        try:
            if self._backend is not None:
                self._backend.close()
        finally:
            if self._nvml is not None:
                self._nvml.close()

    def __enter__(self) -> ProfiledGpus:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _unmeasured(gpus: Sequence[Gpu], clocks_mhz: Sequence[int]) -> Profile:
    """What the backend must know of an engine of which nothing is known but its clocks."""
    for gpu in gpus:
        supported = gpu.clocks_mhz
        strange = sorted(set(clocks_mhz) - set(supported))
        if strange:
            below = [mhz for mhz in supported if mhz < strange[0]]
            above = [mhz for mhz in supported if mhz > strange[0]]
            near = " or ".join(str(mhz) for mhz in (*below[-1:], *above[:1])) or "none"
            raise ConfigError(
                f"clocks: GPU {gpu.uuid} ({gpu.name}) does not support {strange[0]} MHz; next to"
                f" it {near}"
            )
    ladder_mhz = sorted(clocks_mhz) or gpus[0].clocks_mhz[-1:] or (1,)
    table = np.zeros(len(ladder_mhz), dtype=PROFILE_DTYPE)
    table["clock_mhz"] = ladder_mhz
    return Profile(
        name="unmeasured",
        table=table,
        gpus=len(gpus),
        idle_w=0.0,
        kv_capacity_tok=1,
        max_batch=1,
        kv_bytes_per_tok=1.0,
        link_bytes_s=1.0,
        power_cap_w=1.0,
        status="extrapolated",
    )
