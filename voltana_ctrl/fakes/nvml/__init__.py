"""A driver library without a GPU behind it, which the real nvidia-ml-py loads.

The C source beside this file is compiled when a test needs it. Its GPUs live in a file that
processes share, so that a lock outlives the process that set it, as on real hardware.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from types import TracebackType

from voltana_ctrl.errors import ConfigError

__all__ = ["FakeGpu", "FakeNvml", "attached_gpu", "build_fake_nvml"]

# In the order of `enum field` of fake_nvml.c, with what an A100-SXM-80GB has.
_FIELDS: Mapping[str, float] = {
    "util_frac": 1.0,
    "idle_w": 60.0,
    "power_scale_frac": 1.0,
    "min_mhz": 210.0,
    "max_mhz": 1410.0,
    "step_mhz": 15.0,
    "mem_mhz": 1593.0,
    "mem_low_mhz": 810.0,
    "cap_w": 400.0,
    "cap_default_w": 400.0,
    "cap_min_w": 100.0,
    "cap_max_w": 400.0,
    "cap_inert": 0.0,
    "clamp_mhz": 0.0,
    "lock_lo_mhz": 0.0,
    "lock_hi_mhz": 0.0,
    "mem_lock_lo_mhz": 0.0,
    "mem_lock_hi_mhz": 0.0,
    "lost": 0.0,
    "deny_pid": 0.0,
    "hang_s": 0.0,
    "hang_calls": 0.0,
    "set_s": 0.0,
    "mig": 0.0,
    "virtualization": 0.0,
    "no_energy": 0.0,
    "no_reasons": 0.0,
    "energy_j": 0.0,
    "energy_zero_j": 0.0,
    "last_s": 0.0,
    "sets": 0.0,
    "unsupported_sets": 0.0,
    "highest_lock_mhz": 0.0,
    "temperature_c": 40.0,
    "static_w": 59.3,
    "dynamic_w": 197.3,
    "cap_gain_frac": 0.0,
    "cap_sets": 0.0,
    "told_w": 0.0,
}
_NUMBER = {name: number for number, name in enumerate(_FIELDS)}


def build_fake_nvml(folder: Path) -> Path:
    """Compile the fake driver library.

    Parameters
    ----------
    folder : Path
        Folder into which ``libnvidia-ml.so.1`` goes; an existing one is taken as it is.

    Returns
    -------
    Path
        The library.

    Raises
    ------
    ConfigError
        If there is no C compiler, or it fails.

    Examples
    --------
    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     name = build_fake_nvml(Path(folder)).name if shutil.which("cc") else None
    >>> name in ("libnvidia-ml.so.1", None)
    True
    """
    library = Path(folder) / "libnvidia-ml.so.1"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ConfigError("fake NVML: expected a C compiler (cc or gcc) on PATH, found none")
    with as_file(files(__name__) / "fake_nvml.c") as source:
        options = ["-shared", "-fPIC", "-O2", "-Wall", f"-Wl,-soname,{library.name}"]
        command = [compiler, *options, "-o", str(library), str(source), "-lm", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise ConfigError(f"fake NVML: the compiler failed: {done.stderr.strip()}")
    return library


class FakeGpu:
    """One GPU of a :class:`FakeNvml`; what a test sets up and what only a test can see.

    Attributes are numbers, read and written like any other. Set up: `util_frac`, `idle_w`,
    `power_scale_frac`, `static_w` and `dynamic_w` (the power law, per GHz), `clamp_mhz` (0:
    none), `cap_inert`, `cap_gain_frac` (how much more a power cap saves than a lock at the same
    clock), `cap_w`, `told_w` (what it draws; 0: the law says), `set_s` (duration of a set call),
    `mig`, `virtualization`, `no_energy`, `no_reasons`. Faults: `lost`, `deny_pid` (the process that
    may not set, -1: nobody may), `hang_s` for the next `hang_calls` calls, `energy_zero_j` (the
    counter restarts there). Seen:
    `lock_lo_mhz`, `lock_hi_mhz` (0: not locked), `mem_lock_hi_mhz`, `sets`, `cap_sets`,
    `unsupported_sets`, `highest_lock_mhz`, `energy_j`.

    Parameters
    ----------
    library : ctypes.CDLL
        The fake driver library.
    index : int
        Number of the GPU.
    uuid : str
        Its UUID.

    Raises
    ------
    AttributeError
        For a name that is not one of these.

    Examples
    --------
    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> if shutil.which("cc"):
    ...     with tempfile.TemporaryDirectory() as folder, FakeNvml(Path(folder)) as fake:
    ...         fake.gpus[0].util_frac = 0.5
    ...         shown = fake.gpus[0].util_frac, fake.gpus[0].locked
    ... else:
    ...     shown = 0.5, False
    >>> shown
    (0.5, False)
    """

    __slots__ = ("_index", "_library", "uuid")
    _index: int
    _library: ctypes.CDLL
    uuid: str

    def __init__(self, library: ctypes.CDLL, index: int, uuid: str) -> None:
        object.__setattr__(self, "_library", library)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "uuid", uuid)

    def __getattr__(self, name: str) -> float:
        if name not in _NUMBER:
            raise AttributeError(f"FakeGpu has no {name!r}; known are {', '.join(_NUMBER)}")
        return float(self._library.fakeNvmlGet(self._index, _NUMBER[name]))

    def __setattr__(self, name: str, value: float) -> None:
        if name not in _NUMBER:
            raise AttributeError(f"FakeGpu has no {name!r}; known are {', '.join(_NUMBER)}")
        self._library.fakeNvmlPut(self._index, _NUMBER[name], float(value))

    @property
    def clock_mhz(self) -> float:
        """SM clock in MHz that runs: the lock, or what clamp and power cap make of it."""
        return float(self._library.fakeNvmlClock(self._index))

    @property
    def locked(self) -> bool:
        """Whether a clock or memory lock, or a power cap other than the default, is in force."""
        return bool(
            self.lock_hi_mhz > 0 or self.mem_lock_hi_mhz > 0 or self.cap_w != self.cap_default_w
        )


def _loaded(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.fakeNvmlGet.restype = ctypes.c_double
    lib.fakeNvmlClock.restype = ctypes.c_double
    lib.fakeNvmlPut.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_double]
    return lib


def _uuid(number: int) -> str:
    return f"GPU-00000000-0000-4000-8000-{number:012d}"


def attached_gpu(library: Path, number: int) -> FakeGpu:
    """A fake GPU that another process made, through the file that ``FAKE_NVML_STATE`` names.

    Parameters
    ----------
    library : Path
        The fake driver library.
    number : int
        Number of the GPU, from 0.

    Raises
    ------
    ConfigError
        If there is no such file or GPU.

    Examples
    --------
    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> if shutil.which("cc"):
    ...     with tempfile.TemporaryDirectory() as folder, FakeNvml(Path(folder)) as fake:
    ...         attached_gpu(fake.library, 1).told_w = 90.0
    ...         shown = fake.gpus[1].told_w
    ... else:
    ...     shown = 90.0
    >>> shown
    90.0
    """
    lib = _loaded(library)
    if lib.nvmlInit_v2() != 0:
        raise ConfigError("fake NVML: FAKE_NVML_STATE names no file of fake GPUs")
    gpu = FakeGpu(lib, number, _uuid(number))
    if gpu.max_mhz != gpu.max_mhz:  # NaN where there is none
        raise ConfigError(f"fake NVML: no GPU {number} in {os.environ.get('FAKE_NVML_STATE')}")
    return gpu


class FakeNvml:
    """Fake GPUs of one machine, shared by this process and those it starts.

    A context manager: inside, the environment variable ``FAKE_NVML_STATE`` names the shared
    file; pass `library` to what opens NVML (``NvmlBackend(..., library=fake.library)``), or
    start programs with :attr:`env`.

    Parameters
    ----------
    folder : Path
        Folder for the compiled library and the shared file.
    gpus : int
        Number of GPUs.
    name : str
        Name of their model.
    library : Path, optional
        A library built before; compiled into `folder` by default.

    Attributes
    ----------
    gpus : tuple of FakeGpu
        The GPUs.

    Raises
    ------
    ConfigError
        If the library cannot be compiled or the file not written.

    Examples
    --------
    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl.backends.nvml.driver import Nvml
    >>> if shutil.which("cc"):
    ...     with tempfile.TemporaryDirectory() as folder, FakeNvml(Path(folder)) as fake:
    ...         with Nvml(library=fake.library) as nvml:
    ...             found = [gpu.clocks_mhz[-1] for gpu in nvml.gpus()]
    ... else:
    ...     found = [1410, 1410]
    >>> found
    [1410, 1410]
    """

    def __init__(
        self,
        folder: Path,
        *,
        gpus: int = 2,
        name: str = "NVIDIA A100-SXM4-80GB",
        library: Path | None = None,
    ) -> None:
        self.library = library or build_fake_nvml(folder)
        self._state = Path(folder) / "fake-gpus"
        self._before: str | None = None
        lib = _loaded(self.library)
        # A file of its own for every fake: whoever maps the last one keeps it.
        self._state.unlink(missing_ok=True)
        if lib.fakeNvmlCreate(str(self._state).encode(), gpus) != 0:
            raise ConfigError(f"fake NVML: {self._state} cannot be created")
        self.gpus = tuple(FakeGpu(lib, number, _uuid(number)) for number in range(gpus))
        for number, gpu in enumerate(self.gpus):
            lib.fakeNvmlName(number, gpu.uuid.encode(), name.encode())
            for field, value in _FIELDS.items():
                setattr(gpu, field, value)

    @property
    def uuids(self) -> tuple[str, ...]:
        """UUIDs of the GPUs, in order."""
        return tuple(gpu.uuid for gpu in self.gpus)

    @property
    def env(self) -> dict[str, str]:
        """Environment for a program that loads the fake as if it were the driver."""
        paths = [str(self.library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            **os.environ,
            "FAKE_NVML_STATE": str(self._state),
            "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
        }

    def __enter__(self) -> FakeNvml:
        self._before = os.environ.get("FAKE_NVML_STATE")
        os.environ["FAKE_NVML_STATE"] = str(self._state)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            os.environ.pop("FAKE_NVML_STATE", None)
        else:
            os.environ["FAKE_NVML_STATE"] = self._before
