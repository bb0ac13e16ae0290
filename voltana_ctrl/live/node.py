"""One node as a plant: telemetry from one side, clocks to the other, and a switch between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.backends.cpufreq import CpufreqBackend
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.control.budget import highest_power_w
from voltana_ctrl.engines.limits import write_limits
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.guard import Guard
from voltana_ctrl.live.orders import orders_of
from voltana_ctrl.ports import Backend, backend_extras
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    LimitRanges,
    Limits,
    Observation,
    Order,
    Role,
)

__all__ = ["CappedGuard", "KillSwitch", "NodeBackend", "node_clocks", "power_ceilings_mhz"]


def node_clocks(
    fleet: FleetSpec,
    gpus: Mapping[str, Sequence[str]],
    *,
    setter: Path | None = None,
    lock_dir: Path = LOCK_DIR,
    library: Path | None = None,
) -> NvmlBackend:
    """Backend that sets the clocks of some instances of a fleet, and of no others.

    Parameters
    ----------
    fleet : FleetSpec
        The whole fleet.
    gpus : mapping of str to sequence of str
        UUIDs of the GPUs of those instances, by the id of the instance.
    setter, lock_dir, library
        See :class:`~voltana_ctrl.backends.NvmlBackend`.

    Returns
    -------
    NvmlBackend
        For those instances alone, in the order of the fleet. It holds their GPUs until it is
        closed.

    Raises
    ------
    ConfigError, BackendError
        If no instance is named, or one that the fleet has not; else see
        :class:`~voltana_ctrl.backends.NvmlBackend`.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> def lower(uuid):
    ...     with node_clocks(fleet, {"decode-0": [uuid]}) as clocks:
    ...         return clocks.spec.ids
    """
    chosen = [one for one in fleet.instances if one.id in gpus]
    if len(chosen) != len(gpus) or not chosen:
        raise ConfigError(
            f"node_clocks: expected instances of the fleet ({', '.join(fleet.ids)}), got"
            f" {', '.join(gpus) or 'none'}"
        )
    # To a driver all instances are alike; a part of a fleet need not serve both phases.
    part = FleetSpec(tuple(replace(one, role=Role.COLOCATED) for one in chosen))
    return NvmlBackend(part, gpus, setter=setter, lock_dir=lock_dir, library=library)


def power_ceilings_mhz(fleet: FleetSpec, limit_w: Mapping[str, float]) -> F64:
    """Highest clocks whose worst-case power stays within a limit per GPU.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    limit_w : mapping of str to float
        Power limit in watts of each GPU of an instance, by the id of the instance; those left out
        have none.

    Returns
    -------
    ndarray, shape (n,)
        MHz. The highest clock of instances without a limit. The lowest one where even that may
        draw more: the limit itself is then the driver's to keep.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> power_ceilings_mhz(fleet, {"prefill-0": 300.0})
    array([1155., 1410.])
    """
    ceilings = np.array(fleet.max_mhz)
    for i, one in enumerate(fleet.instances):
        if one.id in limit_w:
            fits = np.flatnonzero(highest_power_w(one) <= limit_w[one.id] * one.gpus)
            ceilings[i] = one.clocks_mhz[fits[-1] if fits.size else 0]
    return ceilings


class CappedGuard(Guard):
    """A guard that knows ceilings and floors of its own, whatever the controller asks for.

    Parameters
    ----------
    spec : FleetSpec
        The fleet.
    ceiling_mhz : ndarray, shape (n,)
        Clocks that are never passed; see :func:`power_ceilings_mhz`.
    min_mhz : ndarray, shape (n,), optional
        Clocks below which no decision goes, unless a ceiling is lower still; the lowest supported
        ones by default.
    obeys : bool
        Whether decisions come from a controller that sees the whole fleet. Their shares and active
        set are then left alone: a node that sees its own part only would find the rest dead.
    ranges : LimitRanges, optional
        What may be set besides SM clocks.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> guard = CappedGuard(fleet, np.array([1155.0, 1410.0]))
    >>> idle = Observation(state=FleetState.idle(2))
    >>> guard.shield(Decision.highest(fleet), idle, None).freq_mhz
    array([1155., 1410.])
    """

    def __init__(
        self,
        spec: FleetSpec,
        ceiling_mhz: F64,
        *,
        min_mhz: F64 | None = None,
        obeys: bool = False,
        ranges: LimitRanges | None = None,
    ) -> None:
        super().__init__(spec, ranges=ranges)
        self.obeys = obeys
        self.ceiling_mhz = ceiling_mhz
        self.min_mhz = spec.min_mhz if min_mhz is None else min_mhz

    def shield(
        self, proposed: Decision, observation: Observation, last: Decision | None
    ) -> Decision:
        """Bring a decision within ceilings and floors, then shield it as the guard does.

        Parameters
        ----------
        proposed, observation, last
            As for :meth:`voltana_ctrl.guard.Guard.shield`.

        Returns
        -------
        Decision
            The one that may be applied.
        """
        shielded = super().shield(self._within(proposed), observation, last)
        if not self.obeys:
            return shielded
        return replace(shielded, active=proposed.active, route_frac=proposed.route_frac)

    def changes(self, proposed: Decision, applied: Decision) -> tuple[str, ...]:
        """What :meth:`shield` changed beyond the ceilings and floors that are known."""
        return super().changes(self._within(proposed), applied)

    def _within(self, proposed: Decision) -> Decision:
        """A decision within ceilings and floors."""
        highest = np.minimum(proposed.freq_max_mhz, self.ceiling_mhz)
        floor = np.maximum(proposed.freq_mhz, self.min_mhz)
        return replace(proposed, freq_mhz=np.minimum(floor, highest), freq_max_mhz=highest)


class NodeBackend:
    """Telemetry read from `reads`; clocks of some instances set through `sets`, if there is one.

    Without `sets` and `hands` there is no object in it that could set anything. With `sets`, only
    those instances are set that it was opened for, and only their SM clocks, unless `actuators` or
    `park_memory` ask for more: power caps belong to whoever set them. The instances of `hands` have
    a governor inside their engine, which holds their GPUs and is handed floor, ceiling and the
    rest as a file.

    Parameters
    ----------
    reads : Backend
        State of the whole fleet.
    sets : NvmlBackend or CpufreqBackend, optional
        What :func:`node_clocks` returned, perhaps within a
        :class:`~voltana_ctrl.backends.CpufreqBackend`; without it no clock is set from here.
    hands : mapping of str to Path, optional
        File of :func:`~voltana_ctrl.engines.write_limits` that the engine of an instance reads.
    policy : str
        Policy whose governor is to choose clocks in those engines.
    valid_s : float
        Seconds that an order in such a file holds without a newer one.
    actuators : bool
        Whether power caps, memory and CPU clocks of a decision are set, too.
    park_memory : bool
        Whether the memory clock of a parked instance without work is held at its lowest, where the
        driver lists several; it goes back to what it was when the instance takes work again.
    set_delay_s : float, optional
        Seconds from asking for a clock until it runs, as measured with `sets`; told by
        :meth:`delay_s` for its instances.

    Raises
    ------
    ConfigError
        If `sets` or `hands` have instances that the fleet has not, or share one.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> from voltana_ctrl.backends.nvml.meters import GpuMeters
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> with NodeBackend(GpuMeters(fleet, {})) as node:
    ...     node.apply(Decision.highest(fleet, floor_mhz=fleet.min_mhz))
    ...     node.acts
    False
    """

    def __init__(
        self,
        reads: Backend,
        sets: NvmlBackend | CpufreqBackend | None = None,
        *,
        hands: Mapping[str, Path] | None = None,
        policy: str = "mpc",
        valid_s: float = 1.0,
        actuators: bool = False,
        park_memory: bool = False,
        set_delay_s: float | None = None,
    ) -> None:
        self._reads = reads
        extras = backend_extras(reads)
        self._read_problems, self._read_delay_s = extras.problems, extras.delay_s
        self._sets, self._hands = sets, dict(hands or {})
        #: Whose governor chooses clocks in engines; may be changed while it runs.
        self.policy = policy
        #: Whether ceilings are those of a power budget, which outlive this process; likewise.
        self.budgeted = True
        self._valid_s = valid_s
        self._released = False
        self._handing = threading.Lock()
        ids = reads.spec.ids
        set_ids = () if sets is None else sets.spec.ids
        for name, those in (("sets", set_ids), ("hands", tuple(self._hands))):
            strange = sorted(set(those) - set(ids))
            if strange:
                raise ConfigError(
                    f"NodeBackend.{name}: expected instances of {', '.join(ids)}, got"
                    f" {strange[0]!r}"
                )
        both = sorted(set(set_ids) & set(self._hands))
        if both:
            raise ConfigError(
                f"NodeBackend: {both[0]}: expected one to set its clock, got two: the governor in"
                " its engine and this process; leave out engine.limits or the GPU"
            )
        self._chosen = [ids.index(name) for name in set_ids]
        self._idle: Bool = np.zeros(len(ids), bool)
        self._actuators = actuators and sets is not None
        # As it was found: what is set later does not change what may be set.
        ranges = LimitRanges.none(0) if sets is None else sets.limit_ranges
        self._ranges = _of_fleet(ranges, self._chosen, len(ids))
        self._parked_mem_mhz = np.full(len(ids), np.inf)
        for i, clocks_mhz in enumerate(self._ranges.mem_clocks_mhz):
            if park_memory and len(clocks_mhz) > 1:
                self._parked_mem_mhz[i] = min(clocks_mhz)
        self._set_delay_s = {} if set_delay_s is None else dict.fromkeys(set_ids, set_delay_s)

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._reads.spec

    @property
    def acts(self) -> bool:
        """Whether clocks are set or handed over: not without hardware, nor after release."""
        return (self._sets is not None or bool(self._hands)) and not self._released

    @property
    def held(self) -> tuple[str, ...]:
        """Instances whose clock the governor in their engine chooses."""
        return tuple(self._hands)

    def problems(self) -> dict[str, str]:
        """Why instances do not answer, in words, as far as `reads` knows.

        Returns
        -------
        dict of str to str
            By the id of the instance; those that answer are left out.
        """
        return dict(self._read_problems())

    @property
    def limit_ranges(self) -> LimitRanges | None:
        """What decisions may set besides SM clocks; None where they may set nothing else."""
        return self._ranges if self._actuators else None

    def delay_s(self) -> dict[str, float]:
        """Seconds from asking for a clock until it runs, as measured here and in engines.

        Returns
        -------
        dict of str to float
            By the id of the instance; those whose delay nobody has measured are left out.
        """
        return {**self._read_delay_s(), **self._set_delay_s}

    def read(self) -> Observation:
        """State of the whole fleet now, and what happened since the last read, from `reads`."""
        if self._sets is not None:
            self._unless_released(self._sets.read)  # it notices locks that somebody else reset
        seen = self._reads.read()
        self._idle = seen.state.running_req + seen.state.queue_req == 0.0
        return seen

    def _unless_released(self, call: Callable[[], object]) -> None:
        if self._released:
            return
        try:
            call()
        except BackendError:
            if not self._released:  # by another thread, meanwhile
                raise

    def apply(self, decision: Decision) -> None:
        """Set the clocks of the chosen instances, and hand the others' orders to their engines.

        Raises
        ------
        ActuationDenied, BackendError
            See :class:`~voltana_ctrl.backends.NvmlBackend`.
        ConfigError
            If an order cannot be written.
        """
        if self._hands:
            self._hand(orders_of(decision, self.spec, budgeted=self.budgeted))
        if self._sets is None:
            return
        chosen = self._chosen
        ones: Bool = np.ones(len(chosen), bool)
        part = Decision(
            t_s=decision.t_s,
            freq_mhz=decision.freq_mhz[chosen],
            freq_max_mhz=decision.freq_max_mhz[chosen],
            route_frac=np.full(len(chosen), 1.0 / len(chosen)),
            active=ones,
            price_j_req=decision.price_j_req[chosen],
            limits=self._limits(decision, chosen),
        )
        sets = self._sets
        self._unless_released(lambda: sets.apply(part))

    def _limits(self, decision: Decision, chosen: list[int]) -> Limits | None:
        """Limits of the chosen instances: those of the decision, and memory of who sleeps."""
        told = decision.limits if self._actuators else None
        sleeps = ~decision.active & self._idle
        mem_mhz = np.where(sleeps, self._parked_mem_mhz, np.inf)
        if told is not None and told.mem_mhz is not None:
            mem_mhz = np.minimum(mem_mhz, told.mem_mhz)
        if told is None and not np.isfinite(mem_mhz).any():
            return None
        cap_w, cpu_mhz = (None, None) if told is None else (told.power_cap_w, told.cpu_mhz)
        return Limits(
            mem_mhz=mem_mhz[chosen],
            power_cap_w=None if cap_w is None else cap_w[chosen],
            cpu_mhz=None if cpu_mhz is None else cpu_mhz[chosen],
        )

    def _hand(self, orders: Mapping[str, Order], *, last: bool = False) -> None:
        with self._handing:
            if self._released and not last:
                return
            for name, path in self._hands.items():
                write_limits(path, orders[name], policy=self.policy, valid_s=self._valid_s)

    def release(self) -> None:
        """Give the hardware back and set nothing any more; from any thread, also twice.

        Governors in engines are told to run at the highest clock.

        Raises
        ------
        ActuationDenied, BackendError
            See :meth:`voltana_ctrl.backends.NvmlBackend.close`.
        """
        if not self._released:
            self._released = True
            if self._hands:
                highest = Decision.highest(self.spec)
                with suppress(ConfigError):  # the order in force lapses all the same
                    self._hand(orders_of(highest, self.spec), last=True)
        if self._sets is not None:
            self._sets.close()

    def close(self) -> None:
        """Give the hardware back and stop reading; may be called twice."""
        try:
            self.release()
        finally:
            self._reads.close()

    def __enter__(self) -> NodeBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _of_fleet(ranges: LimitRanges, chosen: Sequence[int], n: int) -> LimitRanges:
    """Ranges of a whole fleet, of which some instances can be set."""
    nothing = LimitRanges.none(n)
    columns = {
        name: np.array(getattr(nothing, name))
        for name in ("cap_min_w", "cap_max_w", "cpu_min_mhz", "cpu_max_mhz")
    }
    memory = list(nothing.mem_clocks_mhz)
    for part, i in enumerate(chosen):
        memory[i] = ranges.mem_clocks_mhz[part]
        for name, column in columns.items():
            column[i] = getattr(ranges, name)[part]
    return LimitRanges(mem_clocks_mhz=tuple(memory), **columns)


class KillSwitch:
    """Releases the hardware when a file appears, or when it is told to.

    A thread of its own looks every `period_s`, so that neither a loop that hangs nor a
    controller that computes keeps the hardware. Once released it stays so.

    Parameters
    ----------
    release : callable
        Gives the hardware back; called once, in the thread.
    file : Path, optional
        File whose appearance releases the hardware.
    on_killed : callable, optional
        Called with one line that says why, after `release` has returned or raised.
    period_s : float
        Seconds between two looks for the file.

    Raises
    ------
    ConfigError
        If the file is there from the start.

    Examples
    --------
    >>> import threading
    >>> done = threading.Event()
    >>> with KillSwitch(done.set) as switch:
    ...     switch.kill("a signal")
    ...     done.wait(5.0), switch.wait(5.0), switch.reason
    (True, True, 'a signal')
    """

    def __init__(
        self,
        release: Callable[[], None],
        *,
        file: Path | None = None,
        on_killed: Callable[[str], None] | None = None,
        period_s: float = 0.1,
    ) -> None:
        if file is not None and file.exists():
            raise ConfigError(f"kill file {file}: it is there; remove it to act again")
        self.reason: str | None = None
        self.failure: Exception | None = None
        self._release, self._file, self._on_killed = release, file, on_killed
        self._period_s = period_s
        self._told = threading.Event()
        self._closed = threading.Event()
        self._killed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="voltana-ctrl-kill", daemon=True)
        self._thread.start()

    def kill(self, reason: str) -> None:
        """Release the hardware; returns at once, also within a signal handler.

        Parameters
        ----------
        reason : str
            Why, in words; the first reason stays.
        """
        self.reason = self.reason or reason
        self._told.set()

    def wait(self, limit_s: float) -> bool:
        """Wait until the hardware was released.

        Parameters
        ----------
        limit_s : float
            Seconds to wait at most.

        Returns
        -------
        bool
            Whether `release` has returned or raised; `failure` holds what it raised.
        """
        return self._killed.wait(limit_s)

    def _watch(self) -> None:
        while not self._told.wait(self._period_s):
            if self._closed.is_set():
                return
            if self._file is not None and self._file.exists():
                self.kill(f"the file {self._file} appeared")
        try:
            self._release()
        except Exception as error:  # noqa: BLE001  the watchdog goes on; it is told below
            self.failure = error
        self._killed.set()
        if self._on_killed is not None:
            done = "the hardware is given back" if self.failure is None else str(self.failure)
            self._on_killed(f"killed, because of {self.reason}: {done}")

    def close(self) -> None:
        """Stop looking; may be called twice."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def __enter__(self) -> KillSwitch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


if TYPE_CHECKING:
    _: type[Backend] = NodeBackend
