"""Clock, power and energy of a node's GPUs, read and never set."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.backends.meter import GpuMeter, InstanceMeter
from voltana_ctrl.backends.nvml.driver import GpuLost, GpuReader, Nvml
from voltana_ctrl.backends.nvml.worker import Worker
from voltana_ctrl.checks import positive
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.ports import Backend
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Observation

__all__ = ["GpuMeters"]


class GpuMeters:
    """GPUs as a plant that can be watched: nothing in it is able to set anything.

    An instance without GPUs here is taken to run at its highest clock, and its power is not
    told; so is one whose GPUs do not tell theirs, and `problems` says why. Of a GPU that several
    instances share each gets an equal part of power and energy. Driver calls run in a thread of
    their own, as in :class:`~voltana_ctrl.backends.NvmlBackend`.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    gpus : mapping of str to sequence of str
        UUIDs of the GPUs of this node's instances, by id.
    library : Path, optional
        The driver library, where it is not the system's.
    call_limit_s : float
        Seconds that a read waits for the driver.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If an instance or a GPU is not there.
    BackendError
        If there is no driver.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> with GpuMeters(fleet, {}) as meters:  # no GPUs: not even a driver is looked for
    ...     meters.read().state.freq_mhz
    array([1410., 1410.])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        gpus: Mapping[str, Sequence[str]],
        *,
        library: Path | None = None,
        call_limit_s: float = 0.5,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("GpuMeters.call_limit_s", call_limit_s)
        unknown = sorted(set(gpus) - set(fleet.ids))
        if unknown:
            raise ConfigError(
                f"GpuMeters.gpus: expected instances of the fleet ({', '.join(fleet.ids)}), got"
                f" {unknown[0]!r}"
            )
        self._fleet = fleet
        self._call_limit_s = call_limit_s
        self._now_s = now_s
        self._closed = False
        self._worker = Worker()
        self._nvml = Nvml(library) if any(gpus.values()) else None
        # A GPU that several instances name is read once.
        self._gpus: dict[str, tuple[GpuReader, GpuMeter]] = {}
        self._uuids = {i: tuple(gpus[name]) for i, name in enumerate(fleet.ids) if gpus.get(name)}
        try:
            for uuid in {uuid: None for group in self._uuids.values() for uuid in group}:
                if self._nvml is not None:
                    reader = self._nvml.reader(uuid)
                    self._gpus[uuid] = reader, GpuMeter(highest_w=reader.highest_w)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    @property
    def caps_w(self) -> dict[str, float]:
        """Power caps that somebody set below the highest of the board, in watts by UUID."""
        found = {}
        for uuid, (gpu, _) in self._gpus.items():
            cap_w, range_w = gpu.power_cap_w, gpu.power_cap_range_w
            if cap_w is not None and range_w is not None and cap_w < range_w[1]:
                found[uuid] = cap_w
        return found

    @property
    def covers(self) -> dict[str, tuple[str, ...]]:
        """What readings cover besides one tenant's GPU (MIG, vGPU, modules), in words by UUID."""
        told = {uuid: gpu.covers for uuid, (gpu, _) in self._gpus.items()}
        return {uuid: sentences for uuid, sentences in told.items() if sentences}

    def problems(self) -> dict[str, str]:
        """What is wrong with the readings of GPUs, in words.

        Returns
        -------
        dict of str to str
            By the id of the instance; those with which nothing is wrong are left out.
        """
        told = {self._fleet.ids[i]: seen.problem for i, seen in self._seen(self._now_s()).items()}
        return {name: problem for name, problem in told.items() if problem}

    def _seen(self, t_s: float) -> dict[int, InstanceMeter]:
        users = Counter(uuid for uuids in self._uuids.values() for uuid in uuids)
        return {
            i: InstanceMeter.of(
                [self._gpus[uuid][1] for uuid in uuids], t_s, [1.0 / users[uuid] for uuid in uuids]
            )
            for i, uuids in self._uuids.items()
        }

    def read(self) -> Observation:
        """Clock, power and energy now; the last ones with their age where a driver hangs.

        Returns
        -------
        Observation
            All else is told as idle.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("GpuMeters.read: it is closed; make a new one")
        # Behind a call that hangs a read would only queue up.
        if self._gpus and self._worker.busy_s <= self._call_limit_s:
            with suppress(TimeoutError):  # the age of the readings says so
                self._worker.run(self._read_all, limit_s=self._call_limit_s)
        n, t_s = len(self._fleet), self._now_s()
        alive, age_s = np.ones(n, bool), np.zeros(n)
        freq_mhz, power_w, energy_j = np.array(self._fleet.max_mhz), np.zeros(n), np.zeros(n)
        for i, seen in self._seen(t_s).items():
            alive[i], age_s[i], energy_j[i] = seen.alive, seen.age_s, seen.energy_j
            power_w[i] = seen.power_w or 0.0
            if seen.clock_mhz is not None:  # else it may be the highest
                freq_mhz[i] = seen.clock_mhz
        state = replace(
            FleetState.idle(n, t_s=max(0.0, t_s)),
            alive=alive, age_s=age_s, freq_mhz=freq_mhz, power_w=power_w, energy_j=energy_j,
        )  # fmt: skip
        return Observation(state=state)

    def _read_all(self) -> None:
        for gpu, meter in self._gpus.values():
            t_s = self._now_s()
            try:
                meter.take(t_s, gpu.read())
            except BackendError as error:
                meter.fail(t_s, str(error), lost=isinstance(error, GpuLost))

    def apply(self, decision: Decision) -> None:
        """Do nothing: there is nothing here to set with.

        Parameters
        ----------
        decision : Decision
            Not looked at.
        """

    def close(self) -> None:
        """Leave the driver; may be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            # In the thread that reads: the library must not go away under a call that hangs.
            if self._nvml is not None:
                with suppress(TimeoutError):  # it is left as soon as the driver answers
                    self._worker.run(self._nvml.close, limit_s=self._call_limit_s)
        finally:
            self._worker.stop()

    def __enter__(self) -> GpuMeters:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


if TYPE_CHECKING:
    _: type[Backend] = GpuMeters
