"""CPU clocks through Linux cpufreq, as an actuator around any other backend.

The ceiling of a frequency policy, ``scaling_max_freq``, is set and put back to what it was
(Linux kernel documentation, "CPU Performance Scaling", sysfs interface). It can be read, so the
value found is restored exactly.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.backends.nvml.giveback import FoundFile
from voltana_ctrl.backends.nvml.lease import Lease
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.ports import Backend, backend_extras
from voltana_ctrl.types import Decision, FleetSpec, LimitRanges, Observation

__all__ = ["CPUFREQ_DIR", "CpuPolicy", "CpufreqBackend", "cpu_policies", "policies_of"]

_log = logging.getLogger(__name__)

#: Where the kernel shows its frequency policies.
CPUFREQ_DIR = Path("/sys/devices/system/cpu/cpufreq")


class CpuPolicy:
    """One frequency policy: CPUs that share a clock.

    Parameters
    ----------
    folder : Path
        Folder of the policy, such as ``/sys/devices/system/cpu/cpufreq/policy0``.

    Raises
    ------
    ConfigError
        If it is not a policy.

    Examples
    --------
    >>> CpuPolicy(Path("no-such-policy"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: CPU policy no-such-policy: expected cpuinfo_min_freq, ...
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        try:
            self.lowest_khz, self.highest_khz, self.found_khz = (
                self._khz(name)
                for name in ("cpuinfo_min_freq", "cpuinfo_max_freq", "scaling_max_freq")
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"CPU policy {folder}: expected cpuinfo_min_freq, cpuinfo_max_freq and"
                f" scaling_max_freq with numbers in it: {error}; see {CPUFREQ_DIR}"
            ) from error
        self.set_khz: int | None = None

    def _khz(self, name: str) -> int:
        return int((self.folder / name).read_text(encoding="ascii"))

    @property
    def path(self) -> Path:
        """File that is written to set the ceiling."""
        return self.folder / "scaling_max_freq"

    @property
    def clock_mhz(self) -> float:
        """Ceiling in force, in MHz."""
        return self._khz("scaling_max_freq") / 1000.0

    @property
    def writable(self) -> bool:
        """Whether this process may set it."""
        return os.access(self.path, os.W_OK)

    def supported(self, cpu_mhz: float) -> int:
        """Clock in kilohertz, if it lies within the range of the policy.

        Parameters
        ----------
        cpu_mhz : float
            Clock in MHz.

        Returns
        -------
        int
            The same in kHz, as the kernel wants it.

        Raises
        ------
        ActuationDenied
            If it lies outside of the range.
        """
        khz = round(cpu_mhz * 1000.0)
        if not self.lowest_khz <= khz <= self.highest_khz:
            raise ActuationDenied(
                f"CPU {self.name}: expected {self.lowest_khz / 1000:g}.."
                f"{self.highest_khz / 1000:g} MHz, got {cpu_mhz:g}"
            )
        return khz

    def set(self, khz: int) -> None:
        """Set the ceiling, and see that it took.

        Parameters
        ----------
        khz : int
            Clock in kilohertz.

        Raises
        ------
        ActuationDenied
            If the kernel refuses, or keeps a higher one; the one found is then in force again.
        BackendError
            If what it keeps cannot be read, or that one not be put back.
        """
        self.set_khz = None
        try:
            self.path.write_text(str(khz), encoding="ascii")
        except OSError as error:
            raise ActuationDenied(
                f"CPU {self.name}: {self.path} cannot be set: {error.strerror}; run as root"
            ) from error
        try:
            kept_khz = self._khz("scaling_max_freq")
            # The driver may round down to a clock that it has, never up. What it keeps then may
            # still be lower than what was found: that is our doing, and is taken back.
            if kept_khz > khz:
                self.path.write_text(str(self.found_khz), encoding="ascii")
        except (OSError, ValueError) as error:
            raise BackendError(
                f"CPU {self.name}: {self.path} was set to {khz / 1000:g} MHz, and can neither be"
                f" read nor put back now: {error}"
            ) from error
        if kept_khz > khz:
            raise ActuationDenied(
                f"CPU {self.name}: asked for {khz / 1000:g} MHz, the kernel keeps"
                f" {kept_khz / 1000:g} MHz; is another program setting it?"
            )
        self.set_khz = khz


def cpu_policies(root: Path = CPUFREQ_DIR) -> tuple[CpuPolicy, ...]:
    """Frequency policies of this machine whose clocks can be read.

    Parameters
    ----------
    root : Path
        Folder in which the kernel shows them.

    Returns
    -------
    tuple of CpuPolicy
        In the order of their numbers; empty where the kernel shows none. Those whose CPUs are
        offline, or that have no clocks, are left out.

    Examples
    --------
    >>> cpu_policies(Path("no-such-folder"))
    ()
    """
    found = []
    for folder in _folders(root):
        with suppress(ConfigError):
            found.append(CpuPolicy(folder))
    return tuple(found)


def _folders(root: Path) -> list[Path]:
    folders = [path for path in root.glob("policy*") if path.name.removeprefix("policy").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("policy")))


def _related_cpus(folder: Path) -> tuple[int, ...]:
    """Numbers of the CPUs that share the clock of a policy, those that are offline among them."""
    told = (folder / "related_cpus").read_text(encoding="ascii").split()
    return tuple(int(one) for one in told)


def policies_of(
    cpus: Mapping[str, Sequence[int]], root: Path | None = None
) -> dict[str, tuple[Path, ...]]:
    """Frequency policies of the CPUs on which engines run.

    Parameters
    ----------
    cpus : mapping of str to sequence of int
        Numbers of the CPUs of each instance, by its id.
    root : Path, optional
        Folder in which the kernel shows policies; :data:`CPUFREQ_DIR` by default.

    Returns
    -------
    dict of str to tuple of Path
        Folders for :class:`CpufreqBackend`, by the id of the instance.

    Raises
    ------
    ConfigError
        If the kernel shows no policies or none of such a CPU, a policy has a single clock, cannot
        be read or may not be set by this user, or CPUs that nobody named, or another instance did,
        share it. Policies of CPUs that nobody named are not looked at.

    Examples
    --------
    >>> policies_of({"decode-0": [0, 1]}, Path("no-such-folder"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: engine.cpus: decode-0: no CPU clock can be set here: ...
    """
    root = CPUFREQ_DIR if root is None else root
    named = {cpu: name for name, numbers in cpus.items() for cpu in numbers}
    found: dict[str, tuple[Path, ...]] = {}
    cpus_of: dict[Path, tuple[int, ...]] = {}
    unreadable = ""
    for folder in _folders(root):
        try:
            cpus_of[folder] = _related_cpus(folder)
        except (OSError, ValueError) as error:  # it may well be of CPUs that nobody named
            unreadable = f"; {folder / 'related_cpus'} cannot be read: {error}"
    by_cpu = {cpu: folder for folder, those in cpus_of.items() for cpu in those}
    for name, numbers in cpus.items():
        where = f"engine.cpus: {name}"
        if not by_cpu:
            raise ConfigError(
                f"{where}: no CPU clock can be set here: the kernel shows no frequency policies in"
                f" {root}, as in most virtual machines; leave engine.cpus out{unreadable}"
            )
        strange = sorted(set(numbers) - set(by_cpu))
        if strange:
            raise ConfigError(
                f"{where}: expected CPUs of this machine that have a frequency policy"
                f" (0 to {max(by_cpu)}), got {strange[0]}{unreadable}"
            )
        folders = dict.fromkeys(by_cpu[cpu] for cpu in numbers)
        for policy in map(CpuPolicy, folders):
            others = sorted(cpu for cpu in cpus_of[policy.folder] if named.get(cpu) != name)
            if others:
                owner = named.get(others[0])
                whose = "nobody names" if owner is None else f"{owner} names, too"
                raise ConfigError(
                    f"{where}: {policy.name} clocks CPU {others[0]}, which {whose}: CPUs that"
                    " share a clock belong to one instance"
                )
            if policy.lowest_khz >= policy.found_khz:
                raise ConfigError(
                    f"{where}: {policy.name} cannot be set below its {policy.found_khz / 1000:g}"
                    " MHz; leave engine.cpus out"
                )
            if not policy.writable:
                raise ConfigError(
                    f"{where}: {policy.path} may not be set by this user; run as root, or let the"
                    " user write it (the setter sets GPUs alone)"
                )
        found[name] = tuple(folders)
    return found


class CpufreqBackend:
    """A backend whose decisions may limit CPU clocks, too.

    Passes everything on to `inner`, and takes `Decision.limits.cpu_mhz` for itself. Infinity
    there gives an instance's CPUs back as they were found.

    A policy that refuses once (its CPUs were taken offline, the kernel rounds up, another program
    sets it) is given back and not limited again; a warning says so, and the rest goes on.

    Parameters
    ----------
    inner : Backend
        Backend that reads the fleet and carries out all but CPU clocks; closed with this one.
    policies : mapping of str to sequence of Path
        Folders of the frequency policies on which each instance's processes run, by its id;
        instances without one are left alone.
    lock_dir : Path
        Where lock files live; the same for all controllers of a machine.
    idle_s : float
        Seconds without a read or an apply after which clocks are given back; the next apply sets
        them again.

    Raises
    ------
    ConfigError
        If a policy does not exist or is named twice.
    BackendError
        If another controller holds one.

    Examples
    --------
    >>> import tempfile
    >>> from dataclasses import replace
    >>> from pathlib import Path
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> from voltana_ctrl.backends import CpufreqBackend, SimBackend
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> from voltana_ctrl.types import Limits
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = SimBackend(fleet, workload=make_workload("fixed", rate_req_s=1.0, duration_s=9.0))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     policy = Path(root) / "policy0"
    ...     policy.mkdir()
    ...     for name, khz in (("cpuinfo_min_freq", "800000"), ("cpuinfo_max_freq", "3500000"),
    ...                       ("scaling_max_freq", "3500000")):
    ...         _ = (policy / name).write_text(khz)
    ...     backend = CpufreqBackend(plant, {"decode-0": [policy]}, lock_dir=Path(root))
    ...     backend.apply(replace(Decision.highest(fleet), limits=Limits(cpu_mhz=[3500.0, 1200.0])))
    ...     during = (policy / "scaling_max_freq").read_text()
    ...     backend.close()
    ...     during, (policy / "scaling_max_freq").read_text()
    ('1200000', '3500000')
    """

    def __init__(
        self,
        inner: Backend,
        policies: Mapping[str, Sequence[Path]],
        *,
        lock_dir: Path = LOCK_DIR,
        idle_s: float = 30.0,
    ) -> None:
        self._inner = inner
        ids = inner.spec.ids
        unknown = sorted(set(policies) - set(ids))
        if unknown:
            raise ConfigError(
                f"CpufreqBackend.policies: expected instances of the fleet ({', '.join(ids)}),"
                f" got {unknown[0]!r}"
            )
        self._groups = tuple(
            tuple(CpuPolicy(folder) for folder in policies.get(name, ())) for name in ids
        )
        names = [policy.name for group in self._groups for policy in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"CpufreqBackend.policies: expected each policy once, got {twice[0]} twice"
            )
        self._refused: set[CpuPolicy] = set()
        self._pid = os.getpid()
        self._closed = False
        self._setting = threading.Lock()
        self.clock = backend_extras(inner).clock  # a simulated plant brings its own time
        self._lease = Lease(
            [str(policy.folder) for group in self._groups for policy in group],
            lock_dir=lock_dir,
            idle_s=idle_s,
            on_given_back=self._forget_sets,
        )

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._inner.spec

    @property
    def limit_ranges(self) -> LimitRanges:
        """What may be set besides the SM clock: here the CPU clock, the rest by `inner`.

        As with power caps, no ceiling above the one that was found.
        """
        ranges = backend_extras(self._inner).limit_ranges or LimitRanges.none(len(self.spec))
        lowest_khz = [max((p.lowest_khz for p in group), default=np.inf) for group in self._groups]
        highest_khz = [min((p.found_khz for p in group), default=0) for group in self._groups]
        return replace(
            ranges,
            cpu_min_mhz=np.array(lowest_khz) / 1000.0,
            cpu_max_mhz=np.array(highest_khz) / 1000.0,
        )

    def read(self) -> Observation:
        """Observation of the inner backend.

        Raises
        ------
        BackendError
            If the backend is closed.
        """
        if self._closed:
            raise BackendError("CpufreqBackend.read: the backend is closed; make a new one")
        self._lease.watchdog.seen()
        return self._inner.read()

    def apply(self, decision: Decision) -> None:
        """Set CPU clocks that differ, then let the inner backend apply the rest.

        Raises
        ------
        ActuationDenied
            If a clock is outside a policy's range (then nothing is set).
        BackendError
            If the backend is closed.
        """
        if self._closed:
            raise BackendError("CpufreqBackend.apply: the backend is closed; make a new one")
        self._lease.watchdog.seen()
        limits = decision.limits
        cpu_mhz = None if limits is None else limits.cpu_mhz
        orders = []
        for i, group in enumerate(self._groups):
            for policy in group:
                if cpu_mhz is not None and cpu_mhz[i] != np.inf and policy not in self._refused:
                    orders.append((policy, policy.supported(float(cpu_mhz[i]))))
                elif self._lease.touched(str(policy.folder)):  # also where a set failed half-way
                    orders.append((policy, policy.found_khz))
        self._set_all(orders)
        if limits is not None:
            left = replace(limits, cpu_mhz=None)
            used = left.mem_mhz is not None or left.power_cap_w is not None
            decision = replace(decision, limits=left if used else None)
        self._inner.apply(decision)

    def _set_all(self, orders: Sequence[tuple[CpuPolicy, int]]) -> None:
        """Set what differs; one that fails does not keep the others from being set."""
        guarded = self._lease.guarded
        # A kill switch gives back in another thread: nothing is set behind its back.
        with self._setting:
            for policy, khz in () if self._closed else orders:
                lowers = khz < (policy.found_khz if policy.set_khz is None else policy.set_khz)
                if policy.set_khz == khz or (lowers and not guarded):
                    continue
                try:
                    self._set(policy, khz)
                except BackendError as error:
                    self._refuse(policy, error)

    def _set(self, policy: CpuPolicy, khz: int) -> None:
        found = FoundFile(path=str(policy.path), text=str(policy.found_khz))
        with self._lease.touch(str(policy.folder), found):
            policy.set(khz)

    def _refuse(self, policy: CpuPolicy, error: BackendError) -> None:
        """Limit it no more; what cannot be lifted now is tried with every decision to come."""
        if policy in self._refused:
            return
        self._refused.add(policy)
        _log.warning("voltana-ctrl: %s; its clock is not limited any more", error)
        if self._lease.touched(str(policy.folder)):
            with suppress(BackendError):
                self._set(policy, policy.found_khz)

    def _forget_sets(self) -> None:
        for group in self._groups:
            for policy in group:
                policy.set_khz = None

    def close(self) -> None:
        """Give the CPU clocks and the inner backend back; may be called twice.

        Raises
        ------
        ActuationDenied
            If something could not be given back.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            with self._setting:
                self._lease.close()
        finally:
            self._inner.close()

    def __enter__(self) -> CpufreqBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


if TYPE_CHECKING:
    _: type[Backend] = CpufreqBackend
