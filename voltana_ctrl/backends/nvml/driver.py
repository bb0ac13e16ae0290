"""NVIDIA's management library in our units and our errors; the only module that talks to it.

Everything else sees watts, joules, megahertz and the exceptions of
:mod:`voltana_ctrl.errors`. Reading needs no privilege; setting needs root or CAP_SYS_ADMIN.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from voltana_ctrl.backends.meter import MOST_W, GpuReading
from voltana_ctrl.checks import within
from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.units import j_from_mj, w_from_mw

__all__ = ["Gpu", "GpuLost", "GpuReader", "GpuReading", "Nvml", "NvmlMissing"]

_VIRTUAL_GUEST = 2
_FIGURES = ("clock", "power", "energy")


class GpuLost(BackendError):
    """The GPU no longer answers (fell off the bus, reset required)."""


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
    >>> from voltana_ctrl import BackendError
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
        """GPU by its number.

        Parameters
        ----------
        number : int
            Number of the GPU, as ``nvidia-smi`` counts, from 0.

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
        """GPU by its UUID, with all that may be set on it.

        Raises
        ------
        ConfigError
            If there is none, naming those there are; or if it is a MIG slice.
        """
        return Gpu(self, self._handle(uuid), uuid)

    def reader(self, uuid: str) -> GpuReader:
        """GPU by its UUID, as something that can only be read.

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
                    " through `voltana-ctrl setter`"
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
    """

    def __init__(self, nvml: Nvml, handle: Any, uuid: str = "of unknown UUID") -> None:
        self._nvml = nvml
        self._handle = handle
        self.uuid = uuid
        self.number: int | None = None
        #: What could not be read at the last try, and why.
        self.unreadable: dict[str, str] = {}
        self.uuid = str(self._get(nvml.pynvml.nvmlDeviceGetUUID))
        self.number = self._told("number", nvml.pynvml.nvmlDeviceGetIndex)
        self.name = str(self._told("name", nvml.pynvml.nvmlDeviceGetName) or "of unknown name")

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

    def _told(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Value of a getter that control can do without; None, and the reason noted, if it fails.

        Raises
        ------
        GpuLost
            If the GPU is lost.
        """
        nvml = self._nvml.pynvml
        try:
            value = function(self._handle, *arguments)
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                with self._nvml._ours(self._label):
                    raise
            self.unreadable[what] = str(error)
            return None
        self.unreadable.pop(what, None)
        return value

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
        return tuple(sorted(self._told("supported clocks", get, memory[-1]) or ()))

    @property
    def mem_clocks_mhz(self) -> tuple[int, ...]:
        """Supported memory clocks, ascending; empty where they are not told."""
        get = self._nvml.pynvml.nvmlDeviceGetSupportedMemoryClocks
        return tuple(sorted(self._told("memory clocks", get) or ()))

    @property
    def power_cap_w(self) -> float | None:
        """Power cap in force; None where there is none or it cannot be read."""
        get = self._nvml.pynvml.nvmlDeviceGetPowerManagementLimit
        cap_mw = self._told("power cap", get)
        return None if cap_mw is None else within(w_from_mw(cap_mw), MOST_W)

    @property
    def power_cap_range_w(self) -> tuple[float, float] | None:
        """Lowest and highest power cap that may be set; None where they cannot be read."""
        get = self._nvml.pynvml.nvmlDeviceGetPowerManagementLimitConstraints
        range_mw = self._told("power cap range", get) or (None, None)
        lowest_w, highest_w = (
            None if each_mw is None else within(w_from_mw(each_mw), MOST_W) for each_mw in range_mw
        )
        return None if lowest_w is None or highest_w is None else (lowest_w, highest_w)

    @property
    def highest_w(self) -> float:
        """More than this board draws: twice its highest power cap, for telling blank values."""
        range_w = self.power_cap_range_w
        return MOST_W if range_w is None or range_w[1] == 0.0 else 2.0 * range_w[1]

    @property
    def temperature_c(self) -> int | None:
        """Temperature of the chip in degrees Celsius."""
        nvml = self._nvml.pynvml
        heat = self._told("temperature", nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
        return None if heat is None else int(heat)

    @property
    def busy_frac(self) -> float | None:
        """Share of the last sampling period in which a kernel ran; None where it is not told."""
        rates = self._told("utilization", self._nvml.pynvml.nvmlDeviceGetUtilizationRates)
        return None if rates is None else rates.gpu / 100.0

    @property
    def persistent(self) -> bool | None:
        """Whether the driver stays loaded, and with it settings, when unused; None if not told."""
        mode = self._told("persistence mode", self._nvml.pynvml.nvmlDeviceGetPersistenceMode)
        return None if mode is None else bool(mode)

    @property
    def compute_pids(self) -> tuple[int, ...]:
        """Numbers of the processes that compute on it, as the driver's own namespace counts."""
        nvml = self._nvml.pynvml
        try:
            found = self._told("processes", nvml.nvmlDeviceGetComputeRunningProcesses)
        except nvml.NVMLLibraryMismatchError:  # a driver older than its Python module
            found = None
        return tuple(int(one.pid) for one in found or ())

    @property
    def power_profiles(self) -> tuple[str, ...]:
        """Workload power profiles in force, such as ``MAX_Q``; none where the board has none."""
        nvml = self._nvml.pynvml
        ask = getattr(nvml, "nvmlDeviceWorkloadPowerProfileGetCurrentProfiles", None)
        if ask is None:
            return ()
        asked = nvml.c_nvmlWorkloadPowerProfileCurrentProfiles_v1_t()
        if self._told("power profiles", ask, asked) is None:
            return ()
        words = list(asked.enforcedProfilesMask.mask)
        prefix = "NVML_POWER_PROFILE_"
        return tuple(
            name.removeprefix(prefix)
            for name, bit in vars(nvml).items()
            if name.startswith(prefix)
            and "OPERATION" not in name
            and words[bit // 32] >> (bit % 32) & 1
        )

    @property
    def covers_module(self) -> bool:
        """Whether its energy counter is that of a module with a CPU, as on Grace Hopper."""
        return re.search(r"\b(GH|GB)\d", self.name) is not None

    @property
    def covers(self) -> tuple[str, ...]:
        """What its readings cover besides one tenant's work on this GPU, as sentences."""
        told = []
        try:
            shared = self.shared
        except GpuLost:
            raise
        except BackendError:  # the doctor says why it is not told
            shared = None
        if shared is not None:
            told.append(f"{shared}; power and energy are those of all its tenants together")
        if self.covers_module:
            told.append(
                "the energy counter may be the whole module's, its CPU and memory included, while"
                " power is the GPU's"
            )
        return tuple(told)

    def read(self) -> GpuReading:
        """Clock, power, energy counter and clock event reasons now; each fails on its own.

        Raises
        ------
        GpuLost
            If the GPU is lost.
        BackendError
            If it tells neither clock nor power nor energy.
        """
        nvml = self._nvml.pynvml
        get = self._told
        counter_mj = get("energy", nvml.nvmlDeviceGetTotalEnergyConsumption)
        reasons = self._reasons()
        clock_mhz = get("clock", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
        power_mw = get("power", nvml.nvmlDeviceGetPowerUsage)
        problems = tuple(
            f"{name}: {self.unreadable[name]}" for name in _FIGURES if name in self.unreadable
        )
        if clock_mhz is None and power_mw is None and counter_mj is None:
            raise BackendError(f"{self._label}: {'; '.join(problems)}")
        return GpuReading(
            clock_mhz=None if clock_mhz is None else float(clock_mhz),
            power_w=None if power_mw is None else w_from_mw(power_mw),
            counter_j=None if counter_mj is None else j_from_mj(counter_mj),
            reasons=reasons,
            problems=problems,
        )

    def _reasons(self) -> int | None:
        """Clock event reasons; drivers before 535 tell them by another name, some not at all."""
        nvml = self._nvml.pynvml
        for name in ("EventReasons", "ThrottleReasons"):
            function = getattr(nvml, f"nvmlDeviceGetCurrentClocks{name}", None)
            if function is not None:
                with contextlib.suppress(nvml.NVMLError):
                    return int(function(self._handle))
        return None


class Gpu(GpuReader):
    """One whole GPU, with all that may be set on it.

    Parameters
    ----------
    nvml : Nvml
        The open library.
    handle : object
        The library's handle.
    uuid : str, optional
        See :class:`GpuReader`.
    """

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._nvml._ours(self._label):
            return function(self._handle, *arguments)

    def lock_clock(self, lo_mhz: int, hi_mhz: int) -> None:
        """Hold the SM clock between two supported clocks, in MHz.

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
        """Hold the memory clock at a supported one, in MHz."""
        self._call(self._nvml.pynvml.nvmlDeviceSetMemoryLockedClocks, mhz, mhz)

    def reset_memory(self) -> None:
        """Give the memory clock back to the driver."""
        self._call(self._nvml.pynvml.nvmlDeviceResetMemoryLockedClocks)

    def set_power_cap(self, cap_w: float) -> None:
        """Set the power cap, in watts."""
        self._call(self._nvml.pynvml.nvmlDeviceSetPowerManagementLimit, round(cap_w * 1000.0))


def whole_gpus(nvml: Nvml, uuids: Sequence[str]) -> tuple[Gpu, ...]:
    """GPUs of these UUIDs, each of which may be controlled; else a ConfigError."""
    gpus = tuple(nvml.gpu(uuid) for uuid in uuids)
    for gpu in gpus:
        reason = gpu.shared
        if reason is not None:
            raise ConfigError(f"GPU {gpu.uuid} ({gpu.name}): cannot be controlled: {reason}")
    return gpus
