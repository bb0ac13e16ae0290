"""Logs of a control loop: written tick by tick, and read back as a plant.

One JSON object per line: first the fleet, then a tick each, with numbers written so that they
come back to the last bit. A replayed controller must therefore decide exactly as it did.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from voltana_ctrl.backends.log import (
    LogFile,
    log_applied,
    log_fleet,
    log_header,
    log_line,
    log_lines,
    log_observation,
    log_tick,
    plain,
)
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.ports import Backend
from voltana_ctrl.types import Decision, FleetSpec, Observation, TickRecord

__all__ = ["Mismatch", "Recorder", "ReplayBackend", "ReplayClock"]


class Recorder:
    """Observer that writes every tick to a file.

    A log must never stop the control: where the disk is full, writing ends, and `failure` says
    so.

    Parameters
    ----------
    path : Path
        The file; an existing one is replaced.
    fleet : FleetSpec
        The fleet, for the replay.

    Raises
    ------
    ConfigError
        If the file cannot be written at all.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl import ControlLoop, FleetSpec, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = SimBackend(fleet, workload=make_workload("fixed", rate_req_s=1.0, duration_s=9.0))
    >>> policy = StaticController(fleet, 1005)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "ticks.jsonl"
    ...     with Recorder(path, fleet) as log, ControlLoop(plant, policy, observers=[log]) as loop:
    ...         loop.run(1.0)
    ...     replay = ReplayBackend(path)
    ...     with ControlLoop(replay, policy) as loop:
    ...         for _ in range(len(replay)):
    ...             _ = loop.tick()
    >>> len(replay), replay.mismatches
    (10, ())
    """

    def __init__(self, path: Path, fleet: FleetSpec) -> None:
        self.failure: str | None = None
        self.ticks = 0
        try:
            self._file: LogFile | None = LogFile(path, log_header(fleet))
        except OSError as error:
            raise ConfigError(f"log {path}: cannot be written: {error.strerror}") from error

    def on_tick(self, record: TickRecord) -> None:
        """Write one tick."""
        if self._file is None:
            return
        try:
            self._file.append(log_line(log_tick(record)))
            self.ticks += 1
        except OSError as error:
            self.failure = f"the log ends after {self.ticks} ticks: {error.strerror}"
            self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            # What a full disk would not take stays in the buffer, and is refused once more.
            with suppress(OSError):
                file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A decision that differs from the recorded one.

    Parameters
    ----------
    tick : int
        Number of the tick, counted from 0.
    name : str
        Field of the decision that differs.
    recorded, got : str
        Its value in the log, and in the decision that was applied.

    Examples
    --------
    >>> Mismatch(tick=3, name="freq_mhz", recorded="[1005.]", got="[1020.]").tick
    3
    """

    tick: int
    name: str
    recorded: str
    got: str


class ReplayClock:
    """Time as recorded: that of the latest reading; sleeping takes none.

    Parameters
    ----------
    t_s : float
        Seconds that it shows at the start.

    Examples
    --------
    >>> ReplayClock(2.0).now_s()
    2.0
    """

    def __init__(self, t_s: float) -> None:
        self._t_s = t_s

    def now_s(self) -> float:
        """Seconds on the recorded clock: those of the latest reading."""
        return self._t_s

    def sleep_until_s(self, t_s: float) -> None:
        """Go on to `t_s` at once."""
        self._t_s = max(self._t_s, t_s)


class ReplayBackend:
    """A recorded log as a plant: tells what was read, compares what is applied.

    Parameters
    ----------
    path : Path
        Written by :class:`Recorder` or :class:`~voltana_ctrl.live.TickLog`, lines of
        JSON or Parquet; a torn last line (the host died) is left out.

    Raises
    ------
    ConfigError
        If it cannot be read or is not such a log, naming the line.

    Examples
    --------
    See :class:`Recorder`.

    >>> from pathlib import Path
    >>> ReplayBackend(Path("no-such.jsonl"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: log no-such.jsonl: cannot be read: No such file or directory
    """

    def __init__(self, path: Path) -> None:
        self._fleet, self._ticks = _parse(path)
        self._next = 0
        self._closed = False
        self._mismatches: list[Mismatch] = []
        first_s = self._ticks[0][0].state.t_s if self._ticks else 0.0
        self.clock = ReplayClock(first_s)

    def __len__(self) -> int:
        return len(self._ticks)

    @property
    def spec(self) -> FleetSpec:
        """The recorded fleet."""
        return self._fleet

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """Where applied decisions differed from the recorded ones so far."""
        return tuple(self._mismatches)

    def read(self) -> Observation:
        """The next recorded observation.

        Raises
        ------
        BackendError
            If the log has ended or the backend is closed.
        """
        if self._closed or self._next >= len(self._ticks):
            reason = "is closed" if self._closed else f"ended after {len(self._ticks)} ticks"
            raise BackendError(f"ReplayBackend.read: the log {reason}")
        observation = self._ticks[self._next][0]
        self.clock.sleep_until_s(observation.state.t_s)
        self._next += 1
        return observation

    def apply(self, decision: Decision) -> None:
        """Compare a decision with the recorded one of the latest tick.

        Raises
        ------
        ConfigError
            If it is for a fleet of another size.
        BackendError
            If the backend is closed.
        """
        if self._closed:
            raise BackendError("ReplayBackend.apply: the backend is closed; make a new one")
        if len(decision) != len(self._fleet):
            raise ConfigError(
                f"ReplayBackend.apply: expected {len(self._fleet)} instances, got {len(decision)}"
            )
        if self._next == 0:
            return  # set before the first reading: nothing was recorded to compare with
        recorded = self._ticks[self._next - 1][1]
        for field in fields(Decision):
            ours, theirs = (
                plain(getattr(decision, field.name)),
                plain(getattr(recorded, field.name)),
            )
            if ours != theirs:
                self._mismatches.append(
                    Mismatch(
                        tick=self._next - 1, name=field.name, recorded=str(theirs), got=str(ours)
                    )
                )

    def close(self) -> None:
        """End the replay; may be called twice."""
        self._closed = True


def _parse(path: Path) -> tuple[FleetSpec, list[tuple[Observation, Decision]]]:
    fleet: FleetSpec | None = None
    ticks: list[tuple[Observation, Decision]] = []
    for number, values in log_lines(path):
        try:
            if fleet is None:
                fleet = log_fleet(values)
            else:
                ticks.append((log_observation(values["observation"]), log_applied(values)))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"log {path}: line {number}: not of a log of ticks: {error}"
            ) from error
    if fleet is None:
        raise ConfigError(f"log {path}: expected a first line with the fleet, got none")
    return fleet, ticks


if TYPE_CHECKING:
    _: type[Backend] = ReplayBackend
