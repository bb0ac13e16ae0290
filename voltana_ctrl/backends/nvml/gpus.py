"""Real GPUs behind the backend port: clocks set through NVML, and always given back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.backends.meter import InstanceMeter
from voltana_ctrl.backends.nvml.assignment import assigned_uuids, check_clocks
from voltana_ctrl.backends.nvml.driver import GpuLost, Nvml, whole_gpus
from voltana_ctrl.backends.nvml.giveback import FoundGpu
from voltana_ctrl.backends.nvml.held import GpuCapability, HeldGpu
from voltana_ctrl.backends.nvml.lease import Lease
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
from voltana_ctrl.backends.nvml.setter_client import SetterClient
from voltana_ctrl.backends.nvml.worker import Worker
from voltana_ctrl.checks import F64, positive
from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.ports import Backend
from voltana_ctrl.types import (
    ActuatorSetting,
    Decision,
    FleetSpec,
    FleetState,
    LimitRanges,
    Observation,
)

__all__ = ["NvmlBackend"]

_RENEW_S = 3.0


@dataclass(frozen=True, slots=True)
class _Order:
    """What one GPU shall be set to; None leaves it, or gives back what was set."""

    held: HeldGpu
    lock_mhz: int | None
    mem_mhz: int | None = None
    cap_w: float | None = None


class NvmlBackend:
    """GPUs of this machine as a plant.

    Reads clock, power and energy from NVML, and queues, batches and finished requests from
    `engine`. Sets SM clocks, and memory clocks and power caps where a decision has limits for
    them. Everything that was set is given back: on close, on any exception through ``with``,
    and by a watchdog process if this one is killed.

    Driver calls run in a thread of their own. One that hangs does not stop the loop: readings
    grow old, and the order that hangs is followed by the newest one only.

    Parameters
    ----------
    fleet : FleetSpec
        Fleet to control; the clocks of each instance must be supported by its GPUs.
    gpus : mapping of str to sequence of str
        UUIDs of the GPUs of each instance, by its id; one clock for all GPUs of an instance.
    engine : callable, optional
        Returns an Observation with the engine's side of the state; idle without.
    actuate : bool
        False opens for reading only: `apply` checks, and sets nothing.
    setter : Path, optional
        Socket of the privileged setter (``voltana-ctrl setter``), through which clocks
        are then set; without, this process needs the privilege.
    restore_lock_mhz : tuple of int, optional
        Clock lock (lowest, highest) to leave behind instead of none.
    lock_dir : Path
        Where lock files live; the same for all controllers of a machine.
    library : Path, optional
        The driver library, where it is not the system's.
    call_limit_s : float
        Seconds that a read or an apply waits for driver calls.
    hang_limit_s : float
        Seconds without an answer of the driver after which an apply raises.
    settle_s : float
        Seconds after a set before a clock that is read is compared with its lock.
    idle_s : float
        Seconds without a read or an apply after which the hardware is given back; the next apply
        sets it again.
    now_s : callable
        Returns seconds that never go back, on the clock of the control loop.

    Raises
    ------
    ConfigError
        If instances, GPUs and clocks do not fit together; MIG slices and vGPUs are refused.
    BackendError
        If there is no driver, or another controller holds a GPU.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> gpus = {"prefill-0": ["GPU-0..."], "decode-0": ["GPU-1..."]}
    >>> def lower_the_clocks():
    ...     with NvmlBackend(fleet, gpus) as backend:
    ...         backend.apply(Decision.highest(fleet, floor_mhz=[1005.0, 705.0]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        gpus: Mapping[str, Sequence[str]],
        *,
        engine: Callable[[], Observation] | None = None,
        actuate: bool = True,
        setter: Path | None = None,
        restore_lock_mhz: tuple[int, int] | None = None,
        lock_dir: Path = LOCK_DIR,
        library: Path | None = None,
        call_limit_s: float = 0.5,
        hang_limit_s: float = 30.0,
        settle_s: float = 1.0,
        idle_s: float = 30.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value_s in (("call_limit_s", call_limit_s), ("hang_limit_s", hang_limit_s)):
            positive(f"NvmlBackend.{name}", value_s)
        self._fleet = fleet
        self._engine = engine
        self._library = library
        self._restore_lock_mhz = restore_lock_mhz
        self._call_limit_s, self._hang_limit_s = call_limit_s, hang_limit_s
        self._settle_s = settle_s
        self._now_s = now_s
        self._pid = os.getpid()
        self._generation = 0
        self._closed = False
        self._held: dict[str, HeldGpu] = {}
        self._lease: Lease | None = None
        self._setter: SetterClient | None = None
        uuids = assigned_uuids(fleet, gpus)
        self._nvml = Nvml(library)
        try:
            found = dict(zip(uuids, whole_gpus(self._nvml, uuids), strict=True))
            check_clocks(fleet, gpus, found, restore_lock_mhz)
            if actuate and setter is not None:
                self._setter = SetterClient(setter, on_lost=self._forget_sets)
            elif actuate:
                self._lease = Lease(
                    uuids, lock_dir=lock_dir, idle_s=idle_s, on_given_back=self._forget_sets
                )
            self._held = {
                uuid: HeldGpu(gpu, gpu if self._setter is None else self._setter.gpu(uuid))
                for uuid, gpu in found.items()
            }
        except BaseException:
            self._give_back()
            raise
        self._groups = tuple(
            tuple(self._held[uuid] for uuid in gpus[instance.id]) for instance in fleet.instances
        )
        self._worker = Worker()

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    @property
    def actuates(self) -> bool:
        """Whether it was opened to set clocks, itself or through the setter."""
        return self._lease is not None or self._setter is not None

    @property
    def capabilities(self) -> tuple[GpuCapability, ...]:
        """What each GPU has shown so far."""
        return tuple(held.capability for held in self._held.values())

    @property
    def actuation_s(self) -> F64:
        """Median seconds that setting an instance's clock takes, shape (n,); 0 before the first.

        It is the dead time of the control model without the settling of the clock. Calls of one
        node follow one another, so those of an instance's GPUs add up.
        """
        return np.array(
            [sum(held.capability.set_call_s for held in group) for group in self._groups]
        )

    @property
    def limit_ranges(self) -> LimitRanges:
        """What may be set besides the SM clock; nothing for reading only, or by the setter.

        A cap is never set above the one that was found: that is the operator's.
        """
        ranges = LimitRanges.none(len(self._fleet))
        if self._lease is None:
            return ranges
        caps_w = [[held.settable_cap_w for held in group] for group in self._groups]
        return replace(
            ranges,
            cap_min_w=np.array([len(group) * max(lo for lo, _ in group) for group in caps_w]),
            cap_max_w=np.array([len(group) * min(hi for _, hi in group) for group in caps_w]),
            mem_clocks_mhz=tuple(
                tuple(sorted(frozenset.intersection(*(held.mem_clocks_mhz for held in group))))
                for group in self._groups
            ),
        )

    def read(self) -> Observation:
        """State of all instances now; the last one known, with its age, where a driver hangs.

        Returns
        -------
        Observation
            Clock, power and energy as the GPUs tell them, the rest from `engine`. A clock that is
            not told is the one that was set, else the highest; a power that is not told is 0.

        Raises
        ------
        BackendError
            If the backend is closed.
        """
        self._check_open("read")
        self._seen()
        # Behind a call that hangs a read would only queue up.
        if self._worker.busy_s <= self._call_limit_s:
            with suppress(TimeoutError):  # the age of the readings says so
                self._worker.run(self._read_all, limit_s=self._call_limit_s)
        told = self._engine() if self._engine is not None else None
        base = told.state if told is not None else FleetState.idle(len(self._fleet))
        t_s = self._now_s()
        seen = [InstanceMeter.of([held.meter for held in group], t_s) for group in self._groups]
        state = replace(
            base,
            t_s=max(0.0, t_s),
            alive=base.alive & [each.alive for each in seen],
            freq_mhz=np.array([self._clock_mhz(i, each) for i, each in enumerate(seen)]),
            power_w=np.array([each.power_w or 0.0 for each in seen]),
            energy_j=np.array([each.energy_j for each in seen]),
            age_s=np.maximum(base.age_s, [each.age_s for each in seen]),
        )
        return Observation(state=state) if told is None else replace(told, state=state)

    def _clock_mhz(self, instance: int, seen: InstanceMeter) -> float:
        """Clock as read; where it is not told the one that was set, else the highest."""
        if seen.clock_mhz is not None:
            return seen.clock_mhz
        locks_mhz = [held.lock_mhz or np.inf for held in self._groups[instance]]
        return float(min(*locks_mhz, self._fleet.max_mhz[instance]))

    def problems(self) -> dict[str, str]:
        """What is wrong with the readings of GPUs, in words.

        Returns
        -------
        dict of str to str
            By the id of the instance; those with which nothing is wrong are left out.
        """
        t_s = self._now_s()
        told = {
            name: InstanceMeter.of([held.meter for held in group], t_s).problem
            for name, group in zip(self._fleet.ids, self._groups, strict=True)
        }
        return {name: problem for name, problem in told.items() if problem}

    def _read_all(self) -> None:
        for held in self._held.values():
            try:
                held.take(held.gpu.read(), self._now_s(), self._settle_s)
            except BackendError as error:
                held.fail(error, self._now_s())

    def apply(self, decision: Decision) -> None:
        """Set clocks (and other limits) to those of the decision; sets only what differs.

        GPUs that do not answer are left out, as `read` shows them not alive. While a driver
        call hangs nothing is ordered; the next decision after it is.

        Raises
        ------
        ActuationDenied
            If a clock or limit is not supported (then nothing is set), or the driver refuses.
        BackendError
            If the backend is closed, or the driver hangs for longer than `hang_limit_s`.
        """
        self._check_open("apply")
        orders = self._orders(decision)
        if self.actuates:
            self._run_orders(orders)

    def set_clock(self, instance: int, freq_mhz: float) -> None:
        """Set the clock of one instance; for a governor that runs per iteration.

        Parameters
        ----------
        instance : int
            Index in the fleet.
        freq_mhz : float
            A supported clock in MHz.

        Raises
        ------
        ActuationDenied, BackendError
            As :meth:`apply`.
        """
        self._check_open("set_clock")
        orders = []
        for held in self._groups[instance]:
            mhz = self._supported(held, freq_mhz)
            orders.append(_Order(held, mhz, held.mem_mhz, held.cap_w))
        if self.actuates:
            self._run_orders(orders)

    def park_memory(self, instance: int, parked: bool) -> bool:
        """Hold the memory clock of one instance at its lowest, or give it back.

        Nothing is set where the driver lists one memory clock only.

        Parameters
        ----------
        instance : int
            Index in the fleet.
        parked : bool
            Whether it is to be held.

        Returns
        -------
        bool
            Whether that is so now. A driver that hangs, or a GPU that is lost, sets nothing: ask
            again.

        Raises
        ------
        ActuationDenied, BackendError
            As :meth:`apply`.
        """
        self._check_open("park_memory")
        clocks_mhz = self.limit_ranges.mem_clocks_mhz[instance]
        mem_mhz = int(clocks_mhz[0]) if parked and len(clocks_mhz) > 1 else None
        if self.actuates:
            self._run_orders(
                [_Order(one, None, mem_mhz, one.cap_w) for one in self._groups[instance]]
            )
        return all(one.mem_mhz == mem_mhz for one in self._groups[instance])

    def set_instance(self, instance: int, setting: ActuatorSetting) -> None:
        """Set everything of one instance; for measuring it.

        Parameters
        ----------
        instance : int
            Index in the fleet.
        setting : ActuatorSetting
            Clock lock; memory clock and power cap go back to what was found where it has none.

        Raises
        ------
        ActuationDenied, BackendError
            As :meth:`apply`.
        """
        self._check_open("set_instance")
        group = self._groups[instance]
        cap_w = np.inf if setting.power_cap_w is None else setting.power_cap_w / len(group)
        mem_mhz = np.inf if setting.mem_mhz is None else setting.mem_mhz
        if self.actuates:
            self._run_orders(
                [
                    _Order(
                        held,
                        self._supported(held, setting.freq_mhz),
                        self._supported_memory(held, mem_mhz),
                        self._supported_cap(held, cap_w),
                    )
                    for held in group
                ]
            )

    def _orders(self, decision: Decision) -> list[_Order]:
        n, limits = len(self._fleet), decision.limits
        if len(decision) != n:
            raise ConfigError(f"NvmlBackend.apply: expected {n} instances, got {len(decision)}")
        if limits is not None and limits.cpu_mhz is not None:
            raise ActuationDenied(
                "NvmlBackend.apply: GPUs have no CPU clock; wrap it in a CpufreqBackend"
            )
        orders = []
        for i, group in enumerate(self._groups):
            for held in group:
                mem_mhz = cap_w = None
                if limits is not None and limits.mem_mhz is not None:
                    mem_mhz = self._supported_memory(held, float(limits.mem_mhz[i]))
                if limits is not None and limits.power_cap_w is not None:
                    cap_w = self._supported_cap(held, float(limits.power_cap_w[i]) / len(group))
                mhz = self._supported(held, float(decision.freq_mhz[i]))
                orders.append(_Order(held, mhz, mem_mhz, cap_w))
        # First what lowers power, so that the sum never passes a budget on the way.
        orders.sort(key=lambda order: (order.lock_mhz or 0) > (order.held.lock_mhz or np.inf))
        return orders

    def _supported(self, held: HeldGpu, freq_mhz: float) -> int:
        if freq_mhz not in held.clocks_mhz:
            raise ActuationDenied(
                f"GPU {held.gpu.uuid}: {freq_mhz:g} MHz is not a supported clock"
                f" ({min(held.clocks_mhz)}..{max(held.clocks_mhz)} MHz in steps of"
                f" {held.step_mhz}); pass decisions through a Guard"
            )
        return int(freq_mhz)

    def _supported_memory(self, held: HeldGpu, mem_mhz: float) -> int | None:
        if mem_mhz == np.inf:
            return None
        if self._setter is not None or mem_mhz not in held.mem_clocks_mhz:
            known = ", ".join(map(str, sorted(held.mem_clocks_mhz))) or "none"
            reason = "not settable through the setter" if self._setter else f"known are {known}"
            raise ActuationDenied(f"GPU {held.gpu.uuid}: memory clock {mem_mhz:g} MHz: {reason}")
        return int(mem_mhz)

    def _supported_cap(self, held: HeldGpu, cap_w: float) -> float | None:
        if cap_w == np.inf:
            return None
        lowest_w, highest_w = held.cap_range_w or (np.inf, -np.inf)
        if self._setter is not None or not lowest_w <= cap_w <= highest_w:
            reason = (
                "not settable through the setter"
                if self._setter
                else f"expected {lowest_w:g}..{highest_w:g} W"
            )
            raise ActuationDenied(f"GPU {held.gpu.uuid}: power cap {cap_w:g} W: {reason}")
        return cap_w

    def _run_orders(self, orders: Sequence[_Order]) -> None:
        self._seen()
        self._generation += 1
        if self._worker.busy_s > self._hang_limit_s:
            raise BackendError(
                f"NvmlBackend: the driver has not answered for {self._worker.busy_s:.0f} s; look"
                " at the kernel log for Xid errors"
            )
        if self._worker.busy_s > self._call_limit_s:
            return  # a call hangs: order nothing on top of it
        if all(_in_force(order) for order in orders):
            return
        generation = self._generation
        try:
            self._worker.run(lambda: self._set_all(orders, generation), limit_s=self._call_limit_s)
        except TimeoutError:
            return  # the age of the readings says so; the next apply sets what differs then

    def _set_all(self, orders: Sequence[_Order], generation: int) -> None:
        failure: BackendError | None = None
        for order in orders:
            if generation != self._generation:
                return  # overtaken while a call hung: a newer decision, or the end
            try:
                self._set(order)
            except GpuLost as error:
                order.held.fail(error, self._now_s())
            except BackendError as error:
                order.held.forget_sets()
                failure = failure or error  # the other GPUs get their clocks all the same
        if failure is not None:
            raise failure

    def _set(self, order: _Order) -> None:
        if self._lease is not None and not self._lease.guarded:
            order = _without_lowering(order)
        held = order.held
        if order.lock_mhz is not None and held.lock_mhz != order.lock_mhz:
            held.lock_mhz = None  # unknown, should the call fail half-way
            with self._touch(held, replace(held.touched, clock=True)):
                begin_s = time.perf_counter()
                held.sets.lock_clock(order.lock_mhz, order.lock_mhz)
                held.calls_s.append(time.perf_counter() - begin_s)
            held.lock_mhz, held.set_s = order.lock_mhz, self._now_s()
        if held.mem_mhz != order.mem_mhz:
            with self._touch(held, replace(held.touched, memory=True)):
                if order.mem_mhz is None:
                    held.gpu.reset_memory()
                else:
                    held.gpu.lock_memory(order.mem_mhz)
            held.mem_mhz = order.mem_mhz
        if held.cap_w != order.cap_w and held.found_cap_w is not None:
            with self._touch(held, replace(held.touched, power_cap_w=held.found_cap_w)):
                held.gpu.set_power_cap(held.found_cap_w if order.cap_w is None else order.cap_w)
            held.cap_w, held.set_s = order.cap_w, self._now_s()

    @contextmanager
    def _touch(self, held: HeldGpu, record: FoundGpu) -> Iterator[None]:
        if self._lease is None:
            yield  # the setter keeps its own book
            return
        record = replace(
            record,
            library=None if self._library is None else str(self._library),
            restore_lock_mhz=self._restore_lock_mhz,
        )
        with self._lease.touch(held.gpu.uuid, record):
            yield
        held.touched = record

    def _forget_sets(self) -> None:
        for held in self._held.values():
            held.forget_sets()

    def _seen(self) -> None:
        if self._lease is not None:
            self._lease.watchdog.seen()
        if self._setter is not None and self._setter.quiet_s > _RENEW_S:
            # To the setter a peer that asks for nothing is a dead one.
            self._forget_sets()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise BackendError(f"NvmlBackend.{what}: the backend is closed; make a new one")

    def close(self, *, limit_s: float = 15.0) -> None:
        """Give the hardware back; may be called twice.

        Parameters
        ----------
        limit_s : float
            Seconds to wait for a driver that hangs.

        Raises
        ------
        ActuationDenied
            If something could not be given back, with what to do by hand.
        BackendError
            If the driver hangs; what was set is given back as soon as it answers, or by the
            watchdog when this process ends.
        """
        if self._closed or os.getpid() != self._pid:  # a forked child holds nothing
            return
        self._closed = True
        self._generation += 1  # orders that wait behind a hanging call are void
        try:
            self._worker.run(self._give_back, limit_s=limit_s)
        except TimeoutError as error:
            raise BackendError(
                f"NvmlBackend.close: the driver has not answered for {limit_s:g} s; the GPUs are"
                " given back when it does, at the latest when this process ends"
            ) from error
        finally:
            self._worker.stop()

    def _give_back(self) -> None:
        try:
            if self._setter is not None:
                self._setter.close()
            if self._lease is not None:
                self._lease.close()
        finally:
            self._nvml.close()

    def __enter__(self) -> NvmlBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _without_lowering(order: _Order) -> _Order:
    """What of an order raises: all that may be set while nobody would give it back.

    The rest stays as it is, and is ordered again by the next decision.
    """
    held = order.held
    lock_mhz = order.lock_mhz
    if lock_mhz is not None and lock_mhz < (held.lock_mhz or max(held.clocks_mhz)):
        lock_mhz = held.lock_mhz
    mem_mhz = order.mem_mhz
    if mem_mhz is not None and (held.mem_mhz is None or mem_mhz < held.mem_mhz):
        mem_mhz = held.mem_mhz
    cap_w = order.cap_w
    in_force_w = held.found_cap_w if held.cap_w is None else held.cap_w
    if cap_w is not None and (in_force_w is None or cap_w < in_force_w):
        cap_w = held.cap_w
    return _Order(held, lock_mhz, mem_mhz, cap_w)


def _in_force(order: _Order) -> bool:
    held = order.held
    wanted = (order.lock_mhz, order.mem_mhz, order.cap_w)
    return (held.lock_mhz, held.mem_mhz, held.cap_w) == wanted


if TYPE_CHECKING:
    _: type[Backend] = NvmlBackend
