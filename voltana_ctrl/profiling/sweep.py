"""What a profile measures: points of clock and load, their plan, and the table of rows."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from voltana_ctrl.checks import count, not_negative, positive
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.types import ActuatorSetting

__all__ = ["ProfilePlan", "ProfilePoint", "Sweep", "plan_profile", "spread_clocks"]

Phase = Literal["idle", "decode", "prefill"]
PHASES: tuple[Phase, ...] = ("idle", "decode", "prefill")
# What the plan reckons for filling a decode batch, for an iteration, and for a prefill.
_FILL_S = 2.0
_STEP_S = 0.04
_PREFILL_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """One setting of the hardware and one load at which an engine is measured.

    Parameters
    ----------
    phase : {"idle", "decode", "prefill"}
        What the engine does meanwhile.
    asked_mhz : int
        SM clock that is set; 0 leaves the clock alone.
    batch_req : int
        Requests at once; 0 when idle.
    asked_tok : int
        Prompt tokens of each request: the context that decode starts from, or what is prefilled.
    power_cap_w, mem_mhz : int
        Power cap of the engine (the sum over its GPUs) and memory clock that are set; 0 leaves them
        as they were found.

    Examples
    --------
    >>> str(ProfilePoint(phase="decode", asked_mhz=1410, batch_req=8, asked_tok=512))
    'decode 8 x 512 tok at 1410 MHz'
    """

    phase: Phase
    asked_mhz: int
    batch_req: int = 0
    asked_tok: int = 0
    power_cap_w: int = 0
    mem_mhz: int = 0

    def __str__(self) -> str:
        load = f" {self.batch_req} x {self.asked_tok} tok" if self.batch_req else ""
        clock = f" at {self.setting_text}" if self.asked_mhz else ""
        return f"{self.phase}{load}{clock}"

    @property
    def setting(self) -> ActuatorSetting | None:
        """What is set; None leaves everything as it was found."""
        if not self.asked_mhz:
            return None
        return ActuatorSetting(
            freq_mhz=float(self.asked_mhz),
            power_cap_w=float(self.power_cap_w) if self.power_cap_w else None,
            mem_mhz=float(self.mem_mhz) if self.mem_mhz else None,
        )

    @property
    def setting_text(self) -> str:
        """What is set, in words."""
        return "clock as it is" if self.setting is None else str(self.setting)

    def no_easier(self, other: ProfilePoint) -> bool:
        """Whether this point can be no faster than another: lower clock or cap, larger load.

        Parameters
        ----------
        other : ProfilePoint
            Another point of the same sweep.

        Returns
        -------
        bool
            True if all of it is as slow or slower: phase alike, no clock or cap above, no load
            below.
        """
        caps_w = [each.power_cap_w or np.inf for each in (self, other)]
        memory_mhz = [each.mem_mhz or np.inf for each in (self, other)]
        return (
            self.phase == other.phase
            and self.asked_mhz <= other.asked_mhz
            and caps_w[0] <= caps_w[1]
            and memory_mhz[0] <= memory_mhz[1]
            and self.batch_req >= other.batch_req
            and self.asked_tok >= other.asked_tok
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Clocks and loads to measure, how long, and when to stop.

    Parameters
    ----------
    clocks_mhz : tuple of int
        SM clocks to set, each supported; empty sets nothing.
    batches_req, contexts_tok : tuple of int
        Decode: every batch size at every context; empty leaves decode out.
    prompts_tok, prefill_batches_req : tuple of int
        Prefill: every prompt length in every number of simultaneous prompts; empty leaves
        prefill out.
    idle : bool
        Whether the power of the engine at rest is measured, too, once per clock.
    caps_w, mem_clocks_mhz : tuple of int
        Power caps of the engine (the sum over its GPUs) and memory clocks: each is measured at
        the highest SM clock, at the same decode and prefill loads, to be compared with clock
        locks. They need two `clocks_mhz` or more.
    output_tok : int
        Tokens that a decode stream may generate while it is measured; with the longest context
        it must fit the engine's context length.
    steady_s : float
        Seconds over which each point is measured.
    min_steps : int
        Iterations of decode that are measured at least; prefill takes at least three.
    settle_s : float
        Seconds to wait after a clock set.
    pause_s : float
        Seconds of the cooling pause before every point.
    cool_c : int, optional
        Temperature in degrees Celsius above which no GPU is when the pause ends.
    cool_limit_s : float
        Seconds of the longest cooling pause.
    temperature_limit_c : int
        Temperature in degrees Celsius above which a GPU ends the profile.
    ttft_limit_s, itl_limit_s : float, optional
        A point whose median TTFT (of prefill) or gap between tokens (of decode) is above is
        left out, and with it those that can be no faster.
    breach_limit : int
        Number of such points in a row, of those measured, that ends the profile.
    point_limit_s : float
        Seconds after which a point that is not done ends the profile.
    sample_s : float
        Seconds between two readings of the hardware meanwhile.

    Raises
    ------
    ConfigError
        If a value is outside its range, or nothing is to be measured.

    Examples
    --------
    >>> sweep = Sweep(clocks_mhz=(510, 1005, 1410), batches_req=(1, 8), contexts_tok=(200, 2000),
    ...               prompts_tok=(512, 4096))
    >>> len(sweep.points()), str(sweep.points()[1])
    (21, 'decode 1 x 200 tok at 1410 MHz')
    """

    clocks_mhz: tuple[int, ...] = ()
    batches_req: tuple[int, ...] = (1, 8, 9, 16, 17, 32, 33, 64, 65)
    contexts_tok: tuple[int, ...] = (256, 2048)
    prompts_tok: tuple[int, ...] = (128, 512, 2048, 8192)
    prefill_batches_req: tuple[int, ...] = (1,)
    idle: bool = True
    caps_w: tuple[int, ...] = ()
    mem_clocks_mhz: tuple[int, ...] = ()
    output_tok: int = 1024
    steady_s: float = 5.0
    min_steps: int = 20
    settle_s: float = 1.0
    pause_s: float = 1.0
    cool_c: int | None = None
    cool_limit_s: float = 300.0
    temperature_limit_c: int = 85
    ttft_limit_s: float | None = None
    itl_limit_s: float | None = None
    breach_limit: int = 3
    point_limit_s: float = 300.0
    sample_s: float = 0.1

    def __post_init__(self) -> None:
        for name in (
            "clocks_mhz",
            "batches_req",
            "contexts_tok",
            "prompts_tok",
            "prefill_batches_req",
            "caps_w",
            "mem_clocks_mhz",
        ):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            for value in values:
                count(f"Sweep.{name}", value)
            if len(set(values)) < len(values):
                raise ConfigError(f"Sweep.{name}: expected each value once, got {values}")
        for name in ("output_tok", "min_steps", "temperature_limit_c", "breach_limit"):
            count(f"Sweep.{name}", getattr(self, name))
        for name in ("steady_s", "cool_limit_s", "point_limit_s", "sample_s"):
            positive(f"Sweep.{name}", getattr(self, name))
        for name in ("settle_s", "pause_s"):
            not_negative(f"Sweep.{name}", getattr(self, name))
        for name in ("ttft_limit_s", "itl_limit_s", "cool_c"):
            if getattr(self, name) is not None:
                positive(f"Sweep.{name}", getattr(self, name))
        if (self.caps_w or self.mem_clocks_mhz) and len(self.clocks_mhz) < 2:
            raise ConfigError(
                "Sweep: power caps and memory clocks are compared with clock locks; give two"
                f" clocks_mhz or more, got {self.clocks_mhz}"
            )
        if not self.points():
            raise ConfigError(
                "Sweep: nothing to measure; give batches_req and contexts_tok for decode, or"
                " prompts_tok and prefill_batches_req for prefill"
            )

    def points(self) -> tuple[ProfilePoint, ...]:
        """All points in the order in which they are measured.

        Returns
        -------
        tuple of ProfilePoint
            Clocks from high to low, at each idle, decode and prefill; then power caps from high to
            low, then memory clocks, both at the highest SM clock.
        """
        points: list[ProfilePoint] = []
        for mhz in sorted(self.clocks_mhz, reverse=True) or [0]:
            if self.idle:
                points.append(ProfilePoint(phase="idle", asked_mhz=mhz))
            points += self._loads(mhz)
        for cap_w in sorted(self.caps_w, reverse=True):
            points += self._loads(max(self.clocks_mhz), power_cap_w=cap_w)
        for mem_mhz in sorted(self.mem_clocks_mhz, reverse=True):
            points += self._loads(max(self.clocks_mhz), mem_mhz=mem_mhz)
        return tuple(points)

    def _loads(self, asked_mhz: int, **other: int) -> list[ProfilePoint]:
        decode = [
            ProfilePoint(phase="decode", asked_mhz=asked_mhz, batch_req=n, asked_tok=tok, **other)
            for n in self.batches_req
            for tok in self.contexts_tok
        ]
        prefill = [
            ProfilePoint(phase="prefill", asked_mhz=asked_mhz, batch_req=n, asked_tok=tok, **other)
            for tok in self.prompts_tok
            for n in self.prefill_batches_req
        ]
        return decode + prefill

    def duration_s(self, points: Sequence[ProfilePoint]) -> float:
        """Estimated time to measure some points, before anything is known of the engine.

        Parameters
        ----------
        points : sequence of ProfilePoint
            Points of this sweep.

        Returns
        -------
        float
            Seconds.
        """
        total_s = self.settle_s * len({point.setting for point in points})
        for point in points:
            total_s += self.pause_s
            if point.phase == "decode":
                total_s += _FILL_S + max(self.steady_s, self.min_steps * _STEP_S)
            else:
                total_s += self.steady_s + (_PREFILL_S if point.phase == "prefill" else 0.0)
        return total_s


def spread_clocks(supported_mhz: Sequence[int], clocks: int = 7) -> tuple[int, ...]:
    """Clocks to measure where none are given: even steps, and one more near the top.

    The voltage bends near the top, and the fit needs two clocks above the bend.

    Parameters
    ----------
    supported_mhz : sequence of int
        SM clocks that the GPU supports.
    clocks : int
        Number of clocks, at least 3; fewer where the GPU has fewer.

    Returns
    -------
    tuple of int
        Supported clocks in MHz, ascending.

    Raises
    ------
    ConfigError
        If `clocks` is below 3, or the GPU supports none.

    Examples
    --------
    >>> spread_clocks(range(210, 1411, 15))
    (210, 450, 690, 930, 1170, 1290, 1410)
    """
    count("spread_clocks.clocks", clocks, minimum=3)
    ladder = np.unique(np.asarray(supported_mhz, dtype=np.int64))
    if len(ladder) == 0:
        raise ConfigError("spread_clocks: the GPU names no supported clock; give the clocks")
    even = np.linspace(ladder[0], ladder[-1], clocks - 1)
    wanted = np.append(even, 0.5 * (even[-2] + even[-1]))
    nearest = ladder[np.argmin(np.abs(ladder[:, None] - wanted[None, :]), axis=0)]
    return tuple(int(mhz) for mhz in np.unique(nearest))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan:
    """What a profile would measure.

    Parameters
    ----------
    points : tuple of ProfilePoint
        Points that are left to measure.
    done : int
        Points that the table holds already.
    duration_s : float
        Estimated seconds to measure those left.

    Examples
    --------
    >>> ProfilePlan(points=(), done=3, duration_s=0.0).text().splitlines()[0]
    '0 points to measure, 3 in the table already; about 0 min'
    """

    points: tuple[ProfilePoint, ...]
    done: int
    duration_s: float

    def text(self) -> str:
        """Points by clock, and how long they take, as lines of text."""
        lines = [
            f"{len(self.points)} points to measure, {self.done} in the table already; about"
            f" {self.duration_s / 60.0:.0f} min",
            "The engine must serve nobody else for so long: drain it first, so that only the"
            " profile's requests are in its batches",
        ]
        for setting in dict.fromkeys(point.setting_text for point in self.points):
            here = [point for point in self.points if point.setting_text == setting]
            loads = [
                f"{phase} {', '.join(shown)}"
                for phase in PHASES
                if (shown := [_load(point) for point in here if point.phase == phase])
            ]
            lines.append(f"{setting}: {'; '.join(loads)}")
        return "\n".join(lines)


def _load(point: ProfilePoint) -> str:
    return f"{point.batch_req}x{point.asked_tok}" if point.batch_req else "once"


def plan_profile(sweep: Sweep, out: str | Path) -> ProfilePlan:
    """What is left to measure, and how long it takes; touches neither engine nor GPU.

    Parameters
    ----------
    sweep : Sweep
        Points to measure.
    out : str or Path
        File of the table, which need not exist; points in it are not measured again.

    Returns
    -------
    ProfilePlan
        Points that the table lacks, in the order of the sweep.

    Raises
    ------
    ConfigError
        If the table exists and is not one of ours, or has no columns for what is to be set.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plan = plan_profile(Sweep(clocks_mhz=(1410,)), Path(folder, "table.csv"))
    >>> len(plan.points), plan.done
    (23, 0)
    """
    table = RowFile(Path(out))
    known = set(table.points)
    points = sweep.points()
    lacking = bool(table.columns) and not set(_OTHERS) <= set(table.columns)
    if lacking and (sweep.caps_w or sweep.mem_clocks_mhz):
        raise ConfigError(
            f"{table.path}: has no columns for power caps and memory clocks; name another file"
        )
    left = tuple(point for point in points if point not in known)
    return ProfilePlan(points=left, done=len(points) - len(left), duration_s=sweep.duration_s(left))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured point as it stands in the table.

    `freq_mhz` to `energy_j` are what the fit reads; the rest says how it came about.
    """

    phase: Phase
    freq_mhz: float
    batch_req: int
    kv_tok: float
    prefill_tok: float
    wall_s: float
    energy_j: float | None
    asked_mhz: int
    asked_tok: int
    steps: int
    mean_s: float
    seen_mhz: float | None
    temperature_c: int | None
    model: str
    wall_se_s: float | None
    power_se_w: float | None
    set_power_cap_w: int | None
    set_mem_mhz: int | None


_COLUMNS = tuple(field.name for field in fields(Row))
# What was set besides the SM clock, and standard errors: earlier tables have none of it.
_OTHERS = ("wall_se_s", "power_se_w", "set_power_cap_w", "set_mem_mhz")


class RowFile:
    """The table on disk: every row is safe there before the next point begins.

    Parameters
    ----------
    path : Path
        The CSV file; need not exist.

    Raises
    ------
    ConfigError
        If it exists and is not a table of this program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.columns: tuple[str, ...] = ()
        # Bytes of whole rows; what a power cut left behind them is overwritten.
        self._whole_bytes = 0
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        self._whole_bytes = data.rfind(b"\n") + 1
        text = data[: self._whole_bytes].decode("utf-8-sig", errors="replace")
        if not text:
            return
        reader = csv.DictReader(io.StringIO(text, newline=""))
        self.columns = tuple(reader.fieldnames or ())
        if not set(_COLUMNS) - {"energy_j", *_OTHERS} <= set(self.columns):
            raise ConfigError(
                f"{path}: exists and is not a table of `voltana-ctrl profile`; name another file"
            )
        self.rows = list(reader)

    @property
    def points(self) -> tuple[ProfilePoint, ...]:
        """Points of the rows."""
        try:
            return tuple(
                ProfilePoint(
                    phase=next(phase for phase in PHASES if phase == row["phase"]),
                    asked_mhz=int(row["asked_mhz"]),
                    batch_req=int(row["batch_req"]),
                    asked_tok=int(row["asked_tok"]),
                    power_cap_w=int(row.get("set_power_cap_w") or 0),
                    mem_mhz=int(row.get("set_mem_mhz") or 0),
                )
                for row in self.rows
            )
        except (TypeError, ValueError, StopIteration) as error:
            raise ConfigError(f"{self.path}: a row cannot be read: {error}") from error

    def check(self, model: str, energy: bool) -> None:
        """Refuse to mix models, or rows with and without energy."""
        others = {row["model"] for row in self.rows} - {model}
        if others:
            raise ConfigError(
                f"{self.path}: holds rows of model {others.pop()!r}, not of {model!r}; name"
                " another file"
            )
        if self.rows and energy != ("energy_j" in self.columns):
            has = "without energy" if energy else "with energy"
            raise ConfigError(
                f"{self.path}: holds rows {has}; name another file, or the same GPUs as before"
            )

    def append(self, row: Row) -> None:
        """Write one row, and wait until it is on the disk."""
        cells = {name: getattr(row, name) for name in _COLUMNS}
        if not self.columns:
            self.columns = tuple(
                name for name in _COLUMNS if name != "energy_j" or row.energy_j is not None
            )
        lines = [] if self._whole_bytes else [list(self.columns)]
        lines.append([_cell(cells.get(name)) for name in self.columns])
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        try:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(self._whole_bytes)
                file.truncate()
                file.write(text.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
                self._whole_bytes = file.tell()
        except OSError as error:
            raise BackendError(f"{self.path}: cannot be written: {error.strerror}") from error


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)
