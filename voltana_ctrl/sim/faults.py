"""What goes wrong in a simulated fleet, and when: failures, slow-downs, clamped clocks.

Each is a value with a span ``[from_s, until_s)``, without an end if `until_s` is left out.
What an instance is like at a time follows from all spans that hold it: dead if any failure
does, slowed down by the product of the slow-downs, clamped to the lowest of the clamps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, not_negative, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import read_toml
from voltana_ctrl.types import FleetSpec
from voltana_ctrl.types.ladder import row_down

__all__ = [
    "ClockClamp",
    "Failure",
    "Fault",
    "FaultSchedule",
    "Slowdown",
    "fault_rows",
    "read_faults",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An instance is gone with all that it holds, and comes back empty.

    Parameters
    ----------
    instance : str
        Id in the fleet.
    from_s, until_s : float
        When it fails, and when it serves again: restart and loading the model included.

    Raises
    ------
    ConfigError
        If the span is negative or not a number.

    Examples
    --------
    >>> Failure(instance="decode-0", from_s=10.0, until_s=40.0).until_s
    40.0
    """

    instance: str
    from_s: float
    until_s: float = math.inf

    def __post_init__(self) -> None:
        _check_span(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """Iterations of an instance take longer, at the same power.

    Parameters
    ----------
    instance : str
        Id in the fleet.
    slow_frac : float
        Iteration times are multiplied by it; 1 or more.
    from_s, until_s : float
        When it begins and ends, in the middle of iterations too.

    Raises
    ------
    ConfigError
        If the factor is below 1, or the span negative or not a number.

    Examples
    --------
    >>> Slowdown(instance="decode-0", slow_frac=1.3, from_s=10.0).until_s
    inf
    """

    instance: str
    slow_frac: float
    from_s: float
    until_s: float = math.inf

    def __post_init__(self) -> None:
        _check_span(self)
        positive("Slowdown.slow_frac", self.slow_frac)
        if self.slow_frac < 1.0:
            raise ConfigError(
                f"Slowdown.slow_frac: expected a factor of iteration times >= 1, got"
                f" {self.slow_frac:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockClamp:
    """An instance runs no faster than this, whatever it is set to; no call fails.

    So do cards above the highest lock that they support, and hot ones.

    Parameters
    ----------
    instance : str
        Id in the fleet.
    clamp_mhz : float
        Highest clock that it runs; rounded down to a supported one.
    from_s, until_s : float
        When it begins and ends, in the middle of iterations too.

    Raises
    ------
    ConfigError
        If the clock is not positive, or the span negative or not a number.

    Examples
    --------
    >>> ClockClamp(instance="prefill-1", clamp_mhz=1200.0, from_s=0.0).clamp_mhz
    1200.0
    """

    instance: str
    clamp_mhz: float
    from_s: float
    until_s: float = math.inf

    def __post_init__(self) -> None:
        _check_span(self)
        positive("ClockClamp.clamp_mhz", self.clamp_mhz)


#: Anything that can go wrong.
Fault = Failure | Slowdown | ClockClamp

# Table of a file -> what it says.
_KINDS: Mapping[str, type[Fault]] = MappingProxyType(
    {"failure": Failure, "slowdown": Slowdown, "clock_clamp": ClockClamp}
)


def _check_span(fault: Fault) -> None:
    kind = type(fault).__name__
    not_negative(f"{kind}.from_s", fault.from_s)
    if fault.until_s != math.inf:
        not_negative(f"{kind}.until_s", fault.until_s)
    if not fault.until_s > fault.from_s:
        raise ConfigError(
            f"{kind}.until_s: expected a time after from_s, {fault.from_s:g}, got {fault.until_s:g}"
        )


class FaultSchedule:
    """What every instance of a fleet is like in the course of time.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    faults : iterable of Fault
        In any order; spans may overlap.

    Raises
    ------
    ConfigError
        If an instance is not in the fleet, or a clamp lies below its lowest clock.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.faults import Failure, Slowdown
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> schedule = FaultSchedule(fleet, [
    ...     Failure(instance="decode-0", from_s=10.0, until_s=40.0),
    ...     Slowdown(instance="decode-0", slow_frac=1.5, from_s=30.0),
    ... ])
    >>> schedule.edges_s
    (10.0, 30.0, 40.0)
    >>> alive, slow_frac, clamp_k = schedule.at(30.0)
    >>> alive, slow_frac
    (array([ True, False]), array([1. , 1.5]))
    """

    def __init__(self, fleet: FleetSpec, faults: Iterable[Fault]) -> None:
        self._fleet = fleet
        self._faults = tuple(faults)
        for number, fault in enumerate(self._faults, start=1):
            if not isinstance(fault, Fault):
                raise ConfigError(
                    f"faults: expected Failure, Slowdown or ClockClamp, got {fault!r}"
                )
            if fault.instance not in fleet.ids:
                raise ConfigError(
                    f"faults: number {number}, {type(fault).__name__}: expected an instance of"
                    f" the fleet ({', '.join(fleet.ids)}), got {fault.instance!r}"
                )
            lowest_mhz = fleet.min_mhz[fleet.ids.index(fault.instance)]
            if isinstance(fault, ClockClamp) and fault.clamp_mhz < lowest_mhz:
                raise ConfigError(
                    f"faults: number {number}, ClockClamp: expected clamp_mhz of at least"
                    f" {lowest_mhz:g}, the lowest clock of {fault.instance}, got"
                    f" {fault.clamp_mhz:g}"
                )
        times_s = {t_s for fault in self._faults for t_s in (fault.from_s, fault.until_s)}
        self._edges_s = tuple(float(t_s) for t_s in sorted(times_s) if t_s < math.inf)

    @property
    def edges_s(self) -> tuple[float, ...]:
        """Times at which anything begins or ends, ascending."""
        return self._edges_s

    def at(self, t_s: float) -> tuple[Bool, F64, I64]:
        """State from `t_s` on.

        Parameters
        ----------
        t_s : float
            Simulated time.

        Returns
        -------
        alive : ndarray of bool, shape (n,)
            Whether each instance lives.
        slow_frac : ndarray, shape (n,)
            Factors of iteration times.
        clamp_k : ndarray of int, shape (n,)
            Position in `clocks_mhz` of the highest clock that runs.
        """
        alive = np.ones(len(self._fleet), dtype=bool)
        slow_frac = np.ones(len(self._fleet))
        clamp_mhz = self._fleet.max_mhz
        for fault in self._faults:
            if fault.from_s <= t_s < fault.until_s:
                i = self._fleet.ids.index(fault.instance)
                if isinstance(fault, Failure):
                    alive[i] = False
                elif isinstance(fault, Slowdown):
                    slow_frac[i] *= fault.slow_frac
                else:
                    clamp_mhz[i] = min(clamp_mhz[i], fault.clamp_mhz)
        clamp_k = [
            row_down(one.clocks_mhz, mhz)
            for one, mhz in zip(self._fleet.instances, clamp_mhz, strict=True)
        ]
        return alive, slow_frac, np.array(clamp_k, dtype=np.int64)

    def saved_w(self, from_s: float, until_s: float) -> float:
        """Mean power over a window that the dead do not draw and the parked would.

        What the fluid bound of a fleet that never fails must be lowered by.

        Parameters
        ----------
        from_s, until_s : float
            The window.

        Returns
        -------
        float
            Watts.
        """
        edges_s = np.unique(np.clip([from_s, *self.edges_s, until_s], from_s, until_s))
        dead_s = np.zeros(len(self._fleet))
        for begin_s, end_s in pairwise(edges_s):
            dead_s += np.where(self.at(float(begin_s))[0], 0.0, end_s - begin_s)
        rest_w = np.array([one.least_rest_w for one in self._fleet.instances])
        return float(dead_s @ rest_w / (until_s - from_s))


def fault_rows(faults: Iterable[Fault]) -> list[dict[str, Any]]:
    """Faults as they stand in the JSON of ``compare``; an end that never comes is None.

    Parameters
    ----------
    faults : iterable of Fault
        What goes wrong.

    Examples
    --------
    >>> from voltana_ctrl.sim.faults import Slowdown
    >>> fault_rows([Slowdown(instance="decode-0", slow_frac=1.5, from_s=30.0)])
    [{'fault': 'slowdown', 'instance': 'decode-0', 'slow_frac': 1.5, 'from_s': 30.0,
      'until_s': None}]
    """
    names = {kind: name for name, kind in _KINDS.items()}
    rows = [{"fault": names[type(fault)], **asdict(fault)} for fault in faults]
    return [
        {key: None if value == math.inf else value for key, value in row.items()} for row in rows
    ]


def read_faults(path: str | Path) -> tuple[Fault, ...]:
    """Faults from a TOML file of ``[[failure]]``, ``[[slowdown]]``, ``[[clock_clamp]]`` tables.

    Keys of a table are the parameters of :class:`Failure`, :class:`Slowdown` and
    :class:`ClockClamp`.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    ConfigError
        Naming file, table and key, if the file cannot be read or does not fit.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> text = '''
    ... [[failure]]
    ... instance = "decode-0"
    ... from_s = 60.0
    ... until_s = 90.0
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "faults.toml"
    ...     _ = path.write_text(text)
    ...     read_faults(path)
    (Failure(instance='decode-0', from_s=60.0, until_s=90.0),)
    """
    data = read_toml(path)
    known = ", ".join(f"[[{kind}]]" for kind in _KINDS)
    if not data:
        raise ConfigError(f"{path}: expected {known} tables, got none")
    faults: list[Fault] = []
    for name, tables in data.items():
        if name not in _KINDS or not isinstance(tables, list) or not tables:
            raise ConfigError(f"{path}: expected {known} tables only, got {name!r}")
        for number, table in enumerate(tables, start=1):
            try:
                faults.append(_fault_of(_KINDS[name], table))
            except ConfigError as error:
                raise ConfigError(f"{path}: {name} {number}: {error}") from error
    return tuple(faults)


def _fault_of(kind: type[Fault], table: Any) -> Fault:
    if not isinstance(table, dict):
        raise ConfigError(f"expected a table, got {table!r}")
    known = list(kind.__dataclass_fields__)
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r}; known are {', '.join(known)}")
        if isinstance(value, str) != (key == "instance"):
            raise ConfigError(f"{key}: wrong type, got {value!r}")
    missing = [key for key in known if key not in table and key != "until_s"]
    if missing:
        raise ConfigError(f"{missing[0]}: missing")
    return kind(**table)
