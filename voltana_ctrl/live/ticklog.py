"""Log of ticks for programs that run for weeks: written beside the loop, rotated, bounded.

The files are those that :class:`~voltana_ctrl.backends.ReplayBackend` and ``voltana-ctrl
savings`` read. Nothing that happens to a disk reaches the loop: ticks are handed to a thread,
and what cannot be written is dropped and counted.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.backends.log import (
    PARQUET_KEY,
    LogFile,
    log_header,
    log_line,
    log_lines,
    log_tick,
    put_aside,
)
from voltana_ctrl.checks import count
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.ports import Observer
from voltana_ctrl.types import (
    Admission,
    Decision,
    FleetSpec,
    FleetState,
    Limits,
    Observation,
    Role,
    Slo,
    TickRecord,
)

__all__ = ["TickLog", "write_parquet"]

_QUEUED = 4096
_RETRY_S = 5.0
_CLOSE_S = 30.0


class TickLog:
    """Observer that writes every tick to a file, in a thread of its own.

    The present file keeps its name; a full one becomes ``NAME-000001.jsonl`` and so on, with a
    header of its own, or Parquet where that is asked for. A file that is there at the start is
    put aside in the same way. `ticks` and `dropped` count what was written and what was not;
    `failure` says what went wrong last.

    Parameters
    ----------
    path : Path
        The present file, such as ``ticks.jsonl``.
    fleet : FleetSpec
        The fleet, for the header.
    slo : Slo, optional
        What attainment is judged by, for the header.
    mode : str, optional
        Mode of the agent, for the header.
    unread : sequence of str
        Ids of instances whose GPUs nobody reads, for the header: their clock is assumed, and
        their power and energy are 0.
    max_bytes : int
        A file that would grow beyond is put aside.
    keep : int
        Files put aside that are kept; the oldest beyond are removed.
    parquet : bool
        Turn files that are put aside, the last one among them, into Parquet.

    Raises
    ------
    ConfigError
        If the file cannot be written at all, or Parquet needs pyarrow.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl import ControlLoop, FleetSpec, load_profile
    >>> from voltana_ctrl.backends import ReplayBackend, SimBackend
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = SimBackend(fleet, workload=make_workload("fixed", rate_req_s=1.0, duration_s=9.0))
    >>> policy = StaticController(fleet, 1005)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "ticks.jsonl"
    ...     with TickLog(path, fleet) as log, ControlLoop(plant, policy, observers=[log]) as loop:
    ...         loop.run(1.0)
    ...     len(ReplayBackend(path)), log.dropped
    (10, 0)
    """

    def __init__(
        self,
        path: Path,
        fleet: FleetSpec,
        *,
        slo: Slo | None = None,
        mode: str | None = None,
        unread: Sequence[str] = (),
        max_bytes: int = 64 * 2**20,
        keep: int = 32,
        parquet: bool = False,
    ) -> None:
        count("TickLog.max_bytes", max_bytes)
        count("TickLog.keep", keep)
        if parquet:
            _pyarrow()
        self.ticks = 0
        self.dropped = 0
        self.failure: str | None = None
        self._path = Path(path)
        told = {"slo": None if slo is None else asdict(slo), "mode": mode, "unread": list(unread)}
        self._header = log_header(fleet, **told)
        self._max_bytes, self._keep, self._parquet = max_bytes, keep, parquet
        self._file: LogFile | None = None
        self._retry_s = 0.0
        try:
            self._put_aside()
            self._open()
        except OSError as error:
            raise ConfigError(f"log {path}: cannot be written: {error.strerror}") from error
        self._queue: queue.Queue[TickRecord | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._write_all, name="voltana-ctrl-log")
        self._thread.daemon = True
        self._thread.start()

    def on_tick(self, record: TickRecord) -> None:
        """Hand one tick to the writer."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            self.failure = "the disk is too slow: ticks wait to be written"

    def close(self) -> None:
        """Write what waits, and end; may be called twice."""
        if self._thread.is_alive():
            # A disk that hangs must not hang the end of the program either.
            with suppress(queue.Full):
                self._queue.put(None, timeout=_CLOSE_S)
            self._thread.join(_CLOSE_S)

    def __enter__(self) -> TickLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write_all(self) -> None:
        while (record := self._queue.get()) is not None:
            self._write(record)
        try:
            self._shut()
            if self._parquet:
                self._put_aside()
        except OSError as error:
            self._fail(error)

    def _write(self, record: TickRecord) -> None:
        line = log_line(log_tick(record))
        try:
            if self._file is None:
                if time.monotonic() < self._retry_s:
                    self.dropped += 1
                    return
                self._put_aside()  # what was torn stays at the end of its file
                self._open()
            elif self._file.bytes + len(line) > self._max_bytes:
                self._shut()
                self._put_aside()
                self._open()
            self._append(line)
        except OSError as error:
            self.dropped += 1
            self._fail(error)
        else:
            self.ticks += 1

    def _open(self) -> None:
        self._file = LogFile(self._path, self._header)

    def _append(self, line: bytes) -> None:
        if self._file is not None:
            self._file.append(line)

    def _shut(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _fail(self, error: OSError) -> None:
        self.failure = f"{self._path}: {error.strerror or error}; {self.dropped} ticks dropped"
        self._retry_s = time.monotonic() + _RETRY_S
        with suppress(OSError):  # what a full disk would not take is refused once more
            self._shut()

    def _put_aside(self) -> None:
        if not self._path.exists():
            return
        if self._path.stat().st_size == 0:
            # Of no use, and in its place an older one with ticks would be removed.
            self._path.unlink()
            return
        aside = put_aside(self._path)
        number = int(aside[-1].stem.rpartition("-")[2]) + 1 if aside else 1
        target = self._path.with_name(f"{self._path.stem}-{number:06d}.jsonl")
        self._path.rename(target)
        if self._parquet:
            try:
                write_parquet(target, target.with_suffix(".parquet"))
            except ConfigError as error:
                self.failure = f"{error}; kept as it is"
            else:
                target.unlink()
        for old in put_aside(self._path)[: -self._keep]:
            old.unlink()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("log: Parquet needs pyarrow; pip install pyarrow") from error
    return pyarrow, parquet


def write_parquet(source: Path, target: Path) -> None:
    """Turn a log of lines of JSON into Parquet: a row per tick, nested columns, every number kept.

    Parameters
    ----------
    source, target : Path
        The log, and the file to write; it appears whole or not at all.

    Raises
    ------
    ConfigError
        If pyarrow is missing, `source` is no log or `target` cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> write_parquet(Path("no-such.jsonl"), Path("no-such.parquet"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: log no-such.jsonl: cannot be read: No such file or directory
    """
    arrow, parquet = _pyarrow()
    lines = log_lines(Path(source))
    _, header = next(lines, (0, None))
    if header is None:
        raise ConfigError(f"log {source}: expected a first line with the fleet, got none")
    schema = _schema(arrow).with_metadata({PARQUET_KEY: json.dumps(header).encode()})
    part = Path(target).with_name(Path(target).name + ".part")
    try:
        with parquet.ParquetWriter(part, schema, compression="zstd") as writer:
            rows = []
            for _, values in lines:
                rows.append({**values, "notes": list(values.get("notes", {}).items())})
                if len(rows) == 1024:
                    writer.write_table(arrow.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(arrow.Table.from_pylist(rows, schema))
        part.rename(target)
    except (OSError, arrow.ArrowException) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise ConfigError(f"log {target}: cannot be written: {error}") from error


def _schema(arrow: Any) -> Any:
    """Schema of a tick, taken from the types themselves."""
    one = np.ones(1)
    limits = Limits(mem_mhz=one, power_cap_w=one, cpu_mhz=one)
    decision = Decision(
        t_s=0.0, freq_mhz=one, freq_max_mhz=one, route_frac=one, active=one > 0.0,
        price_j_req=one, limits=limits, depth=("parked",), roles=(Role.DECODE,),
        admission=Admission(),
    )  # fmt: skip
    record = TickRecord(
        number=0,
        observation=Observation(state=FleetState.idle(1), roles=(Role.DECODE,)),
        proposed=decision,
        applied=decision,
        interventions=("",),
    )
    columns = {field.name: _type(arrow, getattr(record, field.name)) for field in fields(record)}
    del columns["in_force"]  # told by which of both is there
    return arrow.schema({**columns, "advised": columns["applied"]}.items())


def _type(arrow: Any, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return arrow.list_(arrow.from_numpy_dtype(value.dtype))
    if isinstance(value, tuple):
        return arrow.list_(arrow.string())
    if isinstance(value, dict):
        return arrow.map_(arrow.string(), arrow.float64())
    if is_dataclass(value):
        return arrow.struct(
            [(field.name, _type(arrow, getattr(value, field.name))) for field in fields(value)]
        )
    for kind, made in ((int, arrow.int64()), (float, arrow.float64())):
        if isinstance(value, kind):
            return made
    return arrow.string()


if TYPE_CHECKING:
    _: type[Observer] = TickLog
