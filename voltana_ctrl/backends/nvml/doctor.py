"""What this machine can do, in plain words and as JSON, with the mend for what is missing.

Reads only, unless asked to actuate; then every GPU is held, locked to its highest clock for a
moment, and given back.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from voltana_ctrl.backends.cpufreq import CPUFREQ_DIR, cpu_policies
from voltana_ctrl.backends.meter import IDLE, GpuMeter
from voltana_ctrl.backends.nvml.driver import Gpu, GpuLost, Nvml, NvmlMissing
from voltana_ctrl.backends.nvml.giveback import FoundGpu
from voltana_ctrl.backends.nvml.lease import Lease
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR, holder
from voltana_ctrl.backends.nvml.setter_client import SETTER_SOCKET
from voltana_ctrl.errors import BackendError, VoltanaError

__all__ = ["CpuReport", "GpuReport", "MachineReport", "examine"]

_CAP_SYS_ADMIN = 21
_READS = 20
_SETS = 5
_BUSY_FRAC = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """What one GPU can do.

    Parameters
    ----------
    uuid, name : str
        UUID and name of the GPU.
    clocks_mhz : tuple of int
        Supported SM clocks, ascending.
    mem_clocks_mhz : tuple of int
        Supported memory clocks, ascending.
    clock_mhz, power_w : float or None
        SM clock and power now; None where they are not told.
    busy_frac : float or None
        Share of time in which a kernel ran lately.
    limited_by : tuple of str or None
        What holds the clock down, as the driver says; None where it does not.
    temperature_c : int or None
        Temperature of the chip in degrees Celsius; None where it is not told.
    power_cap_w : float or None
        Power cap in force.
    power_cap_range_w : tuple of float or None
        Lowest and highest power cap that may be set; None where they are not told.
    energy_counter : bool
        Whether the board counts energy.
    covers : tuple of str
        What power and energy cover besides one tenant's work on this GPU.
    unreadable : mapping of str to str
        What the driver does not tell of this GPU, and why.
    read_call_s : float
        Median seconds that reading clock, power, energy and event reasons takes.
    shared : str or None
        Why its clock may not be set by one tenant.
    held_by : str or None
        Controller that holds it, in words; None if none does.
    lock_suspected : bool
        Whether it runs under load below its highest clock without an event reason: somebody may
        have locked it.
    settable : bool or None
        Whether a clock could be set; None if it was not tried.
    set_call_s : float or None
        Median seconds that a clock set call takes; None if it was not tried.
    clamp_mhz : float or None
        Clock kept under a lock at the highest, if lower; None if not seen or not tried.
    mends : tuple of str
        What to do about what is missing.

    Examples
    --------
    >>> GpuReport.__dataclass_fields__["settable"].default is None
    True
    """

    uuid: str
    name: str
    clocks_mhz: tuple[int, ...]
    mem_clocks_mhz: tuple[int, ...]
    clock_mhz: float | None
    power_w: float | None
    busy_frac: float | None
    limited_by: tuple[str, ...] | None
    temperature_c: int | None
    power_cap_w: float | None
    power_cap_range_w: tuple[float, float] | None
    energy_counter: bool
    read_call_s: float
    shared: str | None
    held_by: str | None
    lock_suspected: bool
    settable: bool | None = None
    set_call_s: float | None = None
    clamp_mhz: float | None = None
    covers: tuple[str, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    mends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuReport:
    """One CPU frequency policy.

    Parameters
    ----------
    name : str
        Name of the policy, such as ``policy0``.
    lowest_mhz, highest_mhz, ceiling_mhz : float
        Range, and the ceiling in force.
    writable : bool
        Whether this process may set it.

    Examples
    --------
    >>> CpuReport(name="policy0", lowest_mhz=800.0, highest_mhz=3500.0, ceiling_mhz=3500.0,
    ...           writable=False).writable
    False
    """

    name: str
    lowest_mhz: float
    highest_mhz: float
    ceiling_mhz: float
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """What this machine can do.

    Parameters
    ----------
    driver : str or None
        Version of the NVIDIA driver.
    problem : str or None
        Why there are no GPUs.
    privileged : bool
        Whether this process is root or has CAP_SYS_ADMIN.
    setter : str or None
        Socket of the privileged setter, if one serves it.
    gpus : tuple of GpuReport
        The GPUs.
    cpus : tuple of CpuReport
        CPU frequency policies.
    compiled_code : str or None
        Folder in which compiled kernels are kept; None where none can be written, or without
        Numba.
    mends : tuple of str
        What to do about what is missing on the machine.

    Examples
    --------
    >>> report = MachineReport(driver=None, problem="no driver", privileged=False, setter=None)
    >>> report.json()
    '{"schema":"voltana-ctrl/doctor/1","driver":null,"problem":"no driver",...
    >>> print(report.text())
    GPU: none: no driver
    ...
    """

    driver: str | None
    problem: str | None
    privileged: bool
    setter: str | None
    gpus: tuple[GpuReport, ...] = ()
    cpus: tuple[CpuReport, ...] = ()
    compiled_code: str | None = None
    mends: tuple[str, ...] = ()

    def json(self) -> str:
        """Everything as one line of JSON."""
        values = {"schema": "voltana-ctrl/doctor/1", **asdict(self)}
        return json.dumps(values, separators=(",", ":"))

    def text(self) -> str:
        """Everything in plain words, as lines of text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.problem is not None:
            yield f"GPU: none: {self.problem}"
        else:
            yield f"driver: {self.driver}"
            yield f"setting clocks: {self._permission()}"
        for number, gpu in enumerate(self.gpus):
            yield f"GPU {number}: {gpu.name} ({gpu.uuid})"
            for line in _gpu_lines(gpu):
                yield f"  {line}"
        if self.cpus:
            writable = sum(cpu.writable for cpu in self.cpus)
            lowest_mhz = min(cpu.lowest_mhz for cpu in self.cpus)
            highest_mhz = max(cpu.highest_mhz for cpu in self.cpus)
            yield (
                f"CPU clocks: {len(self.cpus)} policies, {lowest_mhz:g}..{highest_mhz:g} MHz,"
                f" {writable} may be set by this process"
            )
        else:
            yield "CPU clocks: the kernel shows no frequency policies (usual in virtual machines)"
        kept = "not kept" if self.compiled_code is None else f"kept in {self.compiled_code}"
        yield f"compiled code: {kept}"
        for mend in self.mends:
            yield f"mend: {mend}"
        if self.gpus:
            yield "next: voltana-ctrl meter measures what these GPUs draw, and sets nothing"
        else:
            yield "next: voltana-ctrl compare simulates, voltana-ctrl demo rehearses without a GPU"

    def _permission(self) -> str:
        if self.privileged:
            return "this process has the privilege"
        if self.setter is not None:
            return f"through the setter at {self.setter}"
        return "not permitted"


def _gpu_lines(gpu: GpuReport) -> Iterator[str]:
    if gpu.clocks_mhz:
        yield (
            f"SM clock: {_shown(gpu.clock_mhz, 'MHz')} now, {len(gpu.clocks_mhz)} supported,"
            f" {gpu.clocks_mhz[0]}..{gpu.clocks_mhz[-1]} MHz"
        )
    memory = ", ".join(map(str, gpu.mem_clocks_mhz)) or "not told"
    yield f"memory clocks: {memory} MHz"
    cap = "none" if gpu.power_cap_w is None else f"{gpu.power_cap_w:g} W"
    if gpu.power_cap_range_w is not None:
        cap += f" ({gpu.power_cap_range_w[0]:g}..{gpu.power_cap_range_w[1]:g} W)"
    yield f"power: {_shown(gpu.power_w, 'W')} now, cap {cap}"
    busy = "not told" if gpu.busy_frac is None else f"{gpu.busy_frac:.0%}"
    held = "not told" if gpu.limited_by is None else ", ".join(gpu.limited_by) or "nothing"
    yield f"busy: {busy}, clock held down by: {held}"
    yield f"energy: {_energy_source(gpu)}"
    for sentence in gpu.covers:
        yield f"mind: {sentence}"
    for name, reason in gpu.unreadable.items():
        yield f"not told: {name}: {reason}"
    yield f"one reading takes {gpu.read_call_s * 1e6:.0f} us"
    if gpu.set_call_s is not None:
        yield f"one clock set takes {gpu.set_call_s * 1e3:.2f} ms (the call; settling not included)"
    if gpu.clamp_mhz is not None:
        yield f"locks above {gpu.clamp_mhz:g} MHz are silently clamped to it"
    if gpu.held_by is not None:
        yield f"held by {gpu.held_by}"
    for mend in gpu.mends:
        yield f"mend: {mend}"


def _shown(value: float | None, unit: str) -> str:
    return "not told" if value is None else f"{value:g} {unit}"


def _energy_source(gpu: GpuReport) -> str:
    if not gpu.energy_counter:
        return "not told" if gpu.power_w is None else "integrated from power"
    return "counted by the board"


def examine(
    *,
    actuate: bool = False,
    library: Path | None = None,
    cpufreq: Path = CPUFREQ_DIR,
    setter: Path = SETTER_SOCKET,
    lock_dir: Path = LOCK_DIR,
    settle_s: float = 0.5,
) -> MachineReport:
    """Look at this machine.

    Parameters
    ----------
    actuate : bool
        Lock each GPU that nobody holds to its highest clock for a moment, to see whether that
        is permitted, how long the call takes and whether the clock is clamped. Otherwise
        nothing is set.
    library : Path, optional
        The driver library, where it is not the system's.
    cpufreq : Path
        Where the kernel shows CPU frequency policies.
    setter : Path
        Socket of the privileged setter.
    lock_dir : Path
        Where lock files live.
    settle_s : float
        Seconds for a clock to settle when actuating.

    Returns
    -------
    MachineReport
        What there is, what it can do, and what to do about what is missing.

    Raises
    ------
    ActuationDenied
        If a GPU could not be given back after actuating.

    Examples
    --------
    >>> from pathlib import Path
    >>> report = examine(library=Path("no-such-library.so"))
    >>> report.gpus, report.problem.startswith("NVML: ")
    ((), True)
    """
    privileged = _privileged()
    served = str(setter) if _serves(setter) else None
    cpus = tuple(
        CpuReport(
            name=policy.name,
            lowest_mhz=policy.lowest_khz / 1000.0,
            highest_mhz=policy.highest_khz / 1000.0,
            ceiling_mhz=policy.found_khz / 1000.0,
            writable=policy.writable,
        )
        for policy in cpu_policies(cpufreq)
    )
    driver: str | None = None
    problem: str | None = None
    gpus: tuple[GpuReport, ...] = ()
    mends: list[str] = []
    try:
        with Nvml(library) as nvml:
            driver = nvml.driver
            gpus, mends = _examine_gpus(nvml, lock_dir)
            if actuate:
                gpus = tuple(
                    _actuate(report, nvml.gpu(report.uuid), lock_dir, library, settle_s)
                    for report in gpus
                )
            if not nvml.gpu_count:
                problem = "the driver answers, but shows no GPU"
                mends.append("pass a GPU through to this machine or container")
            elif not gpus:
                problem = "the driver answers, but no GPU does"
    except NvmlMissing as error:
        problem = f"NVML: {error.problem}"
        mends.append(error.mend)
    except BackendError as error:
        problem = str(error)
    if gpus and not privileged and served is None:
        mends.append(
            "to set clocks, run `voltana-ctrl setter` as root beside the server, or run"
            " the controller as root; reading works as it is"
        )
    compiled_code, compile_mend = _compiled_code()
    mends.extend(compile_mend)
    return MachineReport(
        driver=driver,
        problem=problem,
        privileged=privileged,
        setter=served,
        gpus=gpus,
        cpus=cpus,
        compiled_code=compiled_code,
        mends=tuple(mends),
    )


def _compiled_code() -> tuple[str | None, list[str]]:
    """Where compiled kernels are kept, and what to do where they are not."""
    try:
        from voltana_ctrl.kernels.compiled import cache_folder
    except ImportError as error:
        return None, [f"{error}: pip install numba, without which no policy runs"]
    folder = cache_folder()
    if folder is not None:
        return str(folder), []
    return None, [
        "kernels are compiled in every process anew, half a minute or so; set NUMBA_CACHE_DIR to"
        " a folder that this user can write"
    ]


def _examine_gpus(nvml: Nvml, lock_dir: Path) -> tuple[tuple[GpuReport, ...], list[str]]:
    """Look at every GPU that answers; and what to do about those that do not."""
    reports, mends = [], []
    for number in range(nvml.gpu_count):
        try:
            reports.append(_examine_gpu(nvml.gpu_at(number), lock_dir))
        except BackendError as error:
            mends.append(str(error))
    return tuple(reports), mends


def _examine_gpu(gpu: Gpu, lock_dir: Path) -> GpuReport:
    reads_s = []
    meter = GpuMeter(highest_w=gpu.highest_w)
    for _ in range(_READS):
        begin_s = time.perf_counter()
        reading = gpu.read()
        reads_s.append(time.perf_counter() - begin_s)
        meter.take(begin_s, reading)
    clock_mhz, power_w = meter.clock_mhz(begin_s), meter.power_w(begin_s)
    clocks_mhz, busy_frac = gpu.clocks_mhz, gpu.busy_frac
    shared: str | None
    try:
        shared = gpu.shared
    except GpuLost:
        raise
    except BackendError as error:
        shared = f"it does not tell whether it is shared: {error}"
    held_by = holder(gpu.uuid, lock_dir)
    highest_mhz = clocks_mhz[-1] if clocks_mhz else 0
    # The driver cannot be asked for a lock; this is how one looks from outside.
    lock_suspected = (
        (busy_frac or 0.0) >= _BUSY_FRAC
        and _unlimited(reading.reasons)
        and clock_mhz is not None
        and clock_mhz < 0.98 * highest_mhz
        and held_by is None
    )
    mends = []
    if shared is not None:
        mends.append(shared)
    if lock_suspected:
        mends.append(
            f"it runs at {clock_mhz:g} of {highest_mhz} MHz under load, and the driver"
            " names no reason: a clock lock seems to be in force, or higher clocks are clamped;"
            " if nobody wants the lock, nvidia-smi --reset-gpu-clocks"
        )
    if gpu.persistent is False:
        mends.append(
            "the driver is unloaded, and settings are lost, when nobody uses the GPU; switch"
            " persistence on (nvidia-persistenced)"
        )
    if not clocks_mhz:
        mends.append("the driver tells no supported clocks; this GPU cannot be controlled")
    return GpuReport(
        uuid=gpu.uuid,
        name=gpu.name,
        clocks_mhz=clocks_mhz,
        mem_clocks_mhz=gpu.mem_clocks_mhz,
        clock_mhz=clock_mhz,
        power_w=power_w,
        busy_frac=busy_frac,
        limited_by=reading.limited_by,
        temperature_c=gpu.temperature_c,
        power_cap_w=gpu.power_cap_w,
        power_cap_range_w=gpu.power_cap_range_w,
        energy_counter=meter.counts,
        read_call_s=sorted(reads_s)[_READS // 2],
        shared=shared,
        held_by=held_by,
        lock_suspected=lock_suspected,
        covers=gpu.covers,
        unreadable=dict(gpu.unreadable),
        mends=tuple(mends),
    )


def _unlimited(reasons: int | None) -> bool:
    """Whether the driver says that nothing holds the clock down; silence says nothing."""
    return reasons is not None and reasons & ~IDLE == 0


def _actuate(
    report: GpuReport, gpu: Gpu, lock_dir: Path, library: Path | None, settle_s: float
) -> GpuReport:
    if report.shared is not None or report.held_by is not None or not report.clocks_mhz:
        return report
    highest_mhz = report.clocks_mhz[-1]
    sets_s: list[float] = []
    try:
        lease = Lease([report.uuid], lock_dir=lock_dir)
        try:
            named = None if library is None else str(library)
            with lease.touch(report.uuid, FoundGpu(uuid=report.uuid, library=named, clock=True)):
                for _ in range(_SETS):
                    begin_s = time.perf_counter()
                    gpu.lock_clock(highest_mhz, highest_mhz)
                    sets_s.append(time.perf_counter() - begin_s)
            time.sleep(settle_s)
            reading = gpu.read()
        finally:
            lease.close()
    except VoltanaError as error:
        return replace(report, settable=False, mends=(*report.mends, str(error)))
    seen_mhz, reasons = reading.clock_mhz, reading.reasons
    idle = reasons is not None and bool(reasons & IDLE) and not report.busy_frac
    below = seen_mhz is not None and seen_mhz < highest_mhz
    clamp_mhz = seen_mhz if below and _unlimited(reasons) and not idle else None
    return replace(
        report, settable=True, set_call_s=sorted(sets_s)[len(sets_s) // 2], clamp_mhz=clamp_mhz
    )


def _privileged() -> bool:
    if os.geteuid() == 0:
        return True
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def _serves(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(str(path)) == 0
