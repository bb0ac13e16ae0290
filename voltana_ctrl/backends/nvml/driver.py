"""NVIDIA's management library in our units and our errors; the only module that talks to it.

Everything else sees watts, joules, megahertz and the exceptions of
:mod:`voltana_ctrl.errors`. Reading needs no privilege; setting needs root or CAP_SYS_ADMIN.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.units import j_from_mj, w_from_mw

__all__ = ["Gpu", "GpuLost", "GpuReader", "GpuReading", "Nvml", "NvmlMissing"]

# Bits of the clock event reasons (NVML API reference, nvmlClocksEventReasons).
IDLE = 0x1
POWER_CAP = 0x4
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display",
}
_VIRTUAL_GUEST = 2


class GpuLost(BackendError):
    """The GPU no longer answers (fell off the bus, reset required).

    Examples
    --------
    >>> issubclass(GpuLost, BackendError)
    True
    """


class NvmlMissing(BackendError):
    """The library, its Python binding or a driver is not there.

    Parameters
    ----------
    problem : str
        What is missing.
    mend : str
        What to do about it.

    Examples
    --------
    >>> str(NvmlMissing("no driver", "install it"))
    'NVML: no driver; install it'
    """

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"NVML: {problem}; {mend}")
        self.problem, self.mend = problem, mend


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One reading of one GPU.

    Parameters
    ----------
    clock_mhz : float
        SM clock now.
    power_w : float
        Power of the board.
    counter_j : float or None
        Energy counter since the driver was loaded; None where there is none.
    reasons : int
        Clock event reasons as bits; 0 where they are not told.

    Examples
    --------
    >>> GpuReading(clock_mhz=1410.0, power_w=300.0, counter_j=None, reasons=4).limited_by
    ('power cap',)
    """

    clock_mhz: float
    power_w: float
    counter_j: float | None
    reasons: int

    @property
    def limited_by(self) -> tuple[str, ...]:
        """What holds the clock down, in words."""
        return tuple(word for bit, word in _REASONS.items() if self.reasons & bit)


class Nvml:
    """The library, opened; a context manager.

    Parameters
    ----------
    library : Path, optional
        The shared library, where it is not the system's ``libnvidia-ml.so.1``.

    Raises
    ------
    NvmlMissing
        If nvidia-ml-py, the library or a driver is missing, with the mend.

    Examples
    --------
    >>> try:
    ...     nvml = Nvml()
    ... except BackendError as error:
    ...     found = 0
    ... else:
    ...     found = len(nvml.gpus()); nvml.close()
    >>> found >= 0
    True
    """

    def __init__(self, library: Path | None = None) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise NvmlMissing(
                "nvidia-ml-py is not installed", "pip install 'voltana-ctrl[nvml]'"
            ) from error
        self.pynvml: Any = pynvml
        if library is not None:
            self._load(str(library))
        try:
            pynvml.nvmlInitWithFlags(0)
        except pynvml.NVMLError as error:
            raise NvmlMissing(
                f"no NVIDIA driver answers ({error})",
                "on a machine with a GPU install or load the driver (nvidia-smi must work), in a"
                " container pass the GPU through",
            ) from error
        self._open = True

    def _load(self, path: str) -> None:
        # nvidia-ml-py looks the library up by name alone, once, and keeps function pointers.
        if getattr(self.pynvml.nvmlLib, "_name", None) == path:
            return
        try:
            self.pynvml.nvmlLib = ctypes.CDLL(path)
        except OSError as error:
            raise NvmlMissing(
                f"{path} cannot be loaded: {error}", "name the driver library of this machine"
            ) from error
        self.pynvml._nvmlGetFunctionPointer_cache.clear()

    def close(self) -> None:
        """Leave the library; may be called twice."""
        if self._open:
            self._open = False
            # A driver that is gone cannot be left, and need not be.
            with contextlib.suppress(self.pynvml.NVMLError):
                self.pynvml.nvmlShutdown()

    def __enter__(self) -> Nvml:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def driver(self) -> str:
        """Version of the driver."""
        with self._ours("driver"):
            return str(self.pynvml.nvmlSystemGetDriverVersion())

    @property
    def gpu_count(self) -> int:
        """How many GPUs this machine has, those that do not answer included."""
        with self._ours("GPUs"):
            return int(self.pynvml.nvmlDeviceGetCount())

    def gpu_at(self, number: int) -> Gpu:
        """GPU of this number.

        Parameters
        ----------
        number : int
            As `nvidia-smi` counts.

        Raises
        ------
        GpuLost, BackendError
            If it does not answer.
        """
        with self._ours(f"GPU number {number}"):
            handle = self.pynvml.nvmlDeviceGetHandleByIndex(number)
        return Gpu(self, handle, f"number {number}")

    def gpus(self) -> tuple[Gpu, ...]:
        """All GPUs of this machine."""
        return tuple(self.gpu_at(number) for number in range(self.gpu_count))

    def gpu(self, uuid: str) -> Gpu:
        """GPU of this UUID.

        Raises
        ------
        ConfigError
            If there is none, naming those there are; or if it is a MIG slice.
        """
        return Gpu(self, self._handle(uuid), uuid)

    def reader(self, uuid: str) -> GpuReader:
        """GPU of this UUID as something that can only be read.

        Raises
        ------
        ConfigError
            As :meth:`gpu`.
        """
        return GpuReader(self, self._handle(uuid), uuid)

    def _handle(self, uuid: str) -> Any:
        if uuid.startswith("MIG-"):
            raise ConfigError(
                f"GPU {uuid}: expected a whole GPU, got a MIG slice, whose clock is shared with"
                " its neighbours; switch MIG off (nvidia-smi -mig 0) or leave this GPU out"
            )
        handle = None
        with (
            self._ours(f"GPU {uuid}"),
            contextlib.suppress(self.pynvml.NVMLError_NotFound),
            contextlib.suppress(self.pynvml.NVMLError_InvalidArgument),
        ):
            handle = self.pynvml.nvmlDeviceGetHandleByUUID(uuid)
        if handle is None:
            known = ", ".join(gpu.uuid for gpu in self.gpus()) or "none"
            raise ConfigError(f"GPU {uuid}: no such GPU in this machine; there are {known}")
        return handle

    @contextlib.contextmanager
    def _ours(self, what: str) -> Iterator[None]:
        """Turn the vendor's errors into ours."""
        nvml = self.pynvml
        try:
            yield
        except nvml.NVMLError as error:
            code = error.value
            if code in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                raise GpuLost(
                    f"{what}: {error}; the kernel log (dmesg, Xid) says why; reset the GPU once"
                    " nothing uses it (nvidia-smi --gpu-reset -i UUID), or reboot the node"
                ) from error
            if code == nvml.NVML_ERROR_NO_PERMISSION:
                raise ActuationDenied(
                    f"{what}: no permission to set; run as root or with CAP_SYS_ADMIN, or set"
                    " through `voltana-ctrl agent --setter`"
                ) from error
            if code in (nvml.NVML_ERROR_INVALID_ARGUMENT, nvml.NVML_ERROR_NOT_SUPPORTED):
                raise ActuationDenied(f"{what}: refused by the driver: {error}") from error
            raise BackendError(f"{what}: {error}") from error


class GpuReader:
    """One whole GPU, for reading: there is no method that sets anything.

    Parameters
    ----------
    nvml : Nvml
        The open library.
    handle : object
        The library's handle.
    uuid : str, optional
        Its UUID or number, where it is known already; for errors while it is asked for.

    Examples
    --------
    >>> [name for name in ("read", "lock_clock", "reset_clock") if hasattr(GpuReader, name)]
    ['read']
    """

    def __init__(self, nvml: Nvml, handle: Any, uuid: str = "of unknown UUID") -> None:
        self._nvml = nvml
        self._handle = handle
        self.uuid = uuid
        self.number: int | None = None
        self._has_counter = True
        self._has_reasons = True
        self.uuid = str(self._get(nvml.pynvml.nvmlDeviceGetUUID))
        self.number = self._get(nvml.pynvml.nvmlDeviceGetIndex)
        self.name = str(self._get(nvml.pynvml.nvmlDeviceGetName))

    @property
    def _label(self) -> str:
        return f"GPU {self.uuid}" + ("" if self.number is None else f" (number {self.number})")

    def _get(self, function: Callable[..., Any], *arguments: Any, missing: Any = None) -> Any:
        """Value of a getter; `missing` where this GPU or driver has no such thing."""
        nvml = self._nvml.pynvml
        with self._nvml._ours(self._label):
            try:
                return function(self._handle, *arguments)
            except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
                return missing

    @property
    def shared(self) -> str | None:
        """Why this GPU's clock is not one tenant's to set; None if it is."""
        nvml = self._nvml.pynvml
        mig = self._get(nvml.nvmlDeviceGetMigMode, missing=[0, 0])
        if mig[0]:
            return "MIG is on: its slices share one clock; switch it off (nvidia-smi -mig 0)"
        mode = self._get(nvml.nvmlDeviceGetVirtualizationMode, missing=0)
        if mode == _VIRTUAL_GUEST:
            return "it is a vGPU: the clock belongs to the host; run the controller there"
        return None

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """Supported SM clocks at the highest memory clock, ascending."""
        memory = self.mem_clocks_mhz
        if not memory:
            return ()
        get = self._nvml.pynvml.nvmlDeviceGetSupportedGraphicsClocks
        return tuple(sorted(self._get(get, memory[-1], missing=())))

    @property
    def mem_clocks_mhz(self) -> tuple[int, ...]:
        """Supported memory clocks, ascending; empty where they are not told."""
        get = self._nvml.pynvml.nvmlDeviceGetSupportedMemoryClocks
        return tuple(sorted(self._get(get, missing=())))

    @property
    def power_cap_w(self) -> float | None:
        """Power cap in force; None where there is none."""
        cap_mw = self._get(self._nvml.pynvml.nvmlDeviceGetPowerManagementLimit)
        return None if cap_mw is None else w_from_mw(cap_mw)

    @property
    def power_cap_range_w(self) -> tuple[float, float] | None:
        """Lowest and highest power cap that may be set."""
        range_mw = self._get(self._nvml.pynvml.nvmlDeviceGetPowerManagementLimitConstraints)
        return None if range_mw is None else (w_from_mw(range_mw[0]), w_from_mw(range_mw[1]))

    @property
    def temperature_c(self) -> int | None:
        """Temperature of the chip in degrees Celsius."""
        nvml = self._nvml.pynvml
        return self._get(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)  # type: ignore[no-any-return]

    @property
    def busy_frac(self) -> float:
        """Share of the last sampling period in which a kernel ran; 0 where it is not told."""
        rates = self._get(self._nvml.pynvml.nvmlDeviceGetUtilizationRates)
        return 0.0 if rates is None else rates.gpu / 100.0

    @property
    def persistent(self) -> bool:
        """Whether the driver stays loaded, and with it the settings, while nobody uses it."""
        return bool(self._get(self._nvml.pynvml.nvmlDeviceGetPersistenceMode, missing=0))

    def read(self) -> GpuReading:
        """Clock, power, energy counter and clock event reasons now.

        Raises
        ------
        GpuLost, BackendError
            If the GPU does not answer.
        """
        nvml, handle = self._nvml.pynvml, self._handle
        counter_j = None
        reasons = 0
        if self._has_counter:
            counter_mj = self._get(nvml.nvmlDeviceGetTotalEnergyConsumption)
            self._has_counter = counter_mj is not None
            counter_j = None if counter_mj is None else j_from_mj(counter_mj)
        if self._has_reasons:
            told = self._get(nvml.nvmlDeviceGetCurrentClocksEventReasons)
            self._has_reasons = told is not None
            reasons = told or 0
        with self._nvml._ours(self._label):
            clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            power_mw = nvml.nvmlDeviceGetPowerUsage(handle)
        return GpuReading(
            clock_mhz=float(clock_mhz),
            power_w=w_from_mw(power_mw),
            counter_j=counter_j,
            reasons=int(reasons),
        )


class Gpu(GpuReader):
    """One whole GPU, with all that may be set on it.

    Parameters
    ----------
    nvml : Nvml
        The open library.
    handle : object
        The library's handle.
    uuid : str, optional
        As of :class:`GpuReader`.

    Examples
    --------
    >>> [name for name in ("read", "lock_clock", "reset_clock") if hasattr(Gpu, name)]
    ['read', 'lock_clock', 'reset_clock']
    """

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._nvml._ours(self._label):
            return function(self._handle, *arguments)

    def lock_clock(self, lo_mhz: int, hi_mhz: int) -> None:
        """Hold the SM clock between two supported clocks.

        Raises
        ------
        ActuationDenied, GpuLost
            If it cannot be set.
        """
        self._call(self._nvml.pynvml.nvmlDeviceSetGpuLockedClocks, lo_mhz, hi_mhz)

    def reset_clock(self) -> None:
        """Give the SM clock back to the driver."""
        self._call(self._nvml.pynvml.nvmlDeviceResetGpuLockedClocks)

    def lock_memory(self, mhz: int) -> None:
        """Hold the memory clock at a supported one."""
        self._call(self._nvml.pynvml.nvmlDeviceSetMemoryLockedClocks, mhz, mhz)

    def reset_memory(self) -> None:
        """Give the memory clock back to the driver."""
        self._call(self._nvml.pynvml.nvmlDeviceResetMemoryLockedClocks)

    def set_power_cap(self, cap_w: float) -> None:
        """Set the power cap."""
        self._call(self._nvml.pynvml.nvmlDeviceSetPowerManagementLimit, round(cap_w * 1000.0))


def whole_gpus(nvml: Nvml, uuids: Sequence[str]) -> tuple[Gpu, ...]:
    """GPUs of these UUIDs, each of which may be controlled; else a ConfigError."""
    gpus = tuple(nvml.gpu(uuid) for uuid in uuids)
    for gpu in gpus:
        reason = gpu.shared
        if reason is not None:
            raise ConfigError(f"GPU {gpu.uuid} ({gpu.name}): cannot be controlled: {reason}")
    return gpus
