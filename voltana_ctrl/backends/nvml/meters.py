"""Clock, power and energy of a node's GPUs, read and never set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.backends.meter import EnergyMeter
from voltana_ctrl.backends.nvml.driver import GpuReader, GpuReading, Nvml
from voltana_ctrl.backends.nvml.worker import Worker
from voltana_ctrl.checks import positive
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.ports import Backend
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Observation

__all__ = ["GpuMeters"]


class _Meter:
    """One GPU and what it said last."""

    def __init__(self, gpu: GpuReader) -> None:
        self.gpu = gpu
        most_w = (gpu.power_cap_range_w or (0.0, 1000.0))[1]
        self.energy = EnergyMeter(highest_w=2.0 * most_w)
        self.reading = GpuReading(clock_mhz=0.0, power_w=0.0, counter_j=None, reasons=0)
        self.read_s = 0.0
        self.alive = False

    def read(self, t_s: float) -> None:
        try:
            self.reading = self.gpu.read()
        except BackendError:
            self.alive = False
            return
        self.read_s, self.alive = t_s, True
        self.energy.add(t_s, self.reading.power_w, self.reading.counter_j)


class GpuMeters:
    """GPUs as a plant that can be watched: nothing in it is able to set anything.

    An instance without GPUs here is taken to run at its highest clock, and its power is not
    told. Driver calls run in a thread of their own, as in
    :class:`~voltana_ctrl.backends.NvmlBackend`.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    gpus : mapping of str to sequence of str
        UUIDs of the GPUs of this node's instances, by id.
    library : Path, optional
        The driver library, where it is not the system's.
    call_limit_s : float
        How long a read waits for the driver.
    now_s : callable
        Time that never goes back.

    Raises
    ------
    ConfigError
        If an instance or a GPU is not there.
    BackendError
        If there is no driver.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
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
        self._meters: dict[int, tuple[_Meter, ...]] = {}
        try:
            for i, name in enumerate(fleet.ids):
                if self._nvml is not None and gpus.get(name):
                    readers = [self._nvml.reader(uuid) for uuid in gpus[name]]
                    self._meters[i] = tuple(_Meter(gpu) for gpu in readers)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    @property
    def caps_w(self) -> dict[str, float]:
        """Power caps in force below the highest of the board, by GPU: somebody set them."""
        found = {}
        for meters in self._meters.values():
            for meter in meters:
                cap_w, range_w = meter.gpu.power_cap_w, meter.gpu.power_cap_range_w
                if cap_w is not None and range_w is not None and cap_w < range_w[1]:
                    found[meter.gpu.uuid] = cap_w
        return found

    def read(self) -> Observation:
        """Clock, power and energy now; the last ones with their age where a driver hangs.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("GpuMeters.read: it is closed; make a new one")
        # Behind a call that hangs a read would only queue up.
        if self._meters and self._worker.busy_s <= self._call_limit_s:
            with suppress(TimeoutError):  # the age of the readings says so
                self._worker.run(self._read_all, limit_s=self._call_limit_s)
        n, t_s = len(self._fleet), self._now_s()
        alive, age_s = np.ones(n, bool), np.zeros(n)
        freq_mhz, power_w, energy_j = np.array(self._fleet.max_mhz), np.zeros(n), np.zeros(n)
        for i, meters in self._meters.items():
            alive[i] = all(meter.alive for meter in meters)
            age_s[i] = max(0.0, *(t_s - meter.read_s for meter in meters))
            freq_mhz[i] = min(meter.reading.clock_mhz for meter in meters)
            power_w[i] = sum(meter.reading.power_w for meter in meters)
            energy_j[i] = sum(meter.energy.energy_j for meter in meters)
        state = replace(
            FleetState.idle(n, t_s=max(0.0, t_s)),
            alive=alive, age_s=age_s, freq_mhz=freq_mhz, power_w=power_w, energy_j=energy_j,
        )  # fmt: skip
        return Observation(state=state)

    def _read_all(self) -> None:
        for meters in self._meters.values():
            for meter in meters:
                meter.read(self._now_s())

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
