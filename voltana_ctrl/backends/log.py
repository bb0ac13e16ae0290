"""The log of ticks as a file: what a line holds, how it is written and read back.

One JSON object per line: first the fleet, then a tick each, with numbers written so that they
come back to the last bit; or the same as Parquet, a row per tick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import json_value
from voltana_ctrl.types import (
    DEPTHS,
    PROFILE_DTYPE,
    ActuatorPoint,
    Admission,
    Backlog,
    Belief,
    Decision,
    FleetSpec,
    FleetState,
    InstanceSpec,
    IterationBatch,
    Limits,
    Observation,
    Profile,
    RequestBatch,
    Rest,
    Role,
    Status,
    TickRecord,
)

__all__ = [
    "PARQUET_KEY",
    "LogFile",
    "log_applied",
    "log_decision",
    "log_files",
    "log_fleet",
    "log_header",
    "log_line",
    "log_lines",
    "log_observation",
    "log_tick",
    "plain",
    "put_aside",
]

_SCHEMA = "voltana-ctrl/log/1"
# Between the stem of a log and the suffix of a file that was put aside.
_ASIDE = r"-\d{6,}"
#: Key of the header in the metadata of a Parquet file.
PARQUET_KEY = b"voltana-ctrl"


def plain(value: Any) -> Any:
    """Value of this package as values that JSON can hold.

    Parameters
    ----------
    value : object
        Anything of :mod:`voltana_ctrl.types`.

    Returns
    -------
    object
        Arrays become lists, tables a list for each column, dataclasses dicts, members of an enum
        their names. Other values come back as they are.

    Examples
    --------
    >>> from voltana_ctrl import FleetState
    >>> plain(FleetState.idle(2))["queue_tok"]
    [0.0, 0.0]
    """
    if isinstance(value, np.ndarray):
        if value.dtype.names:
            return {name: value[name].tolist() for name in value.dtype.names}
        return value.tolist()
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def log_header(fleet: FleetSpec, **more: Any) -> dict[str, Any]:
    """First line of a log: schema, fleet, and what else should be known.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    **more
        Further values of JSON.

    Returns
    -------
    dict
        Values for :func:`log_line`.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> log_header(FleetSpec.parse("4C", load_profile("a100-sxm-80gb/llama-3.1-8b")))["schema"]
    'voltana-ctrl/log/1'
    """
    return {"schema": _SCHEMA, "fleet": [plain(one) for one in fleet.instances], **more}


def log_tick(record: TickRecord) -> dict[str, Any]:
    """One tick as plain values of JSON.

    A decision that nobody carried out is not `applied`, which is null, but `advised`.

    Parameters
    ----------
    record : TickRecord
        The tick.

    Returns
    -------
    dict
        Values for :func:`log_line`: the fields of the record, and `applied` or `advised`.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState
    >>> from voltana_ctrl import Observation, TickRecord, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> wish = Decision.highest(fleet)
    >>> record = TickRecord(number=0, observation=Observation(state=FleetState.idle(2)),
    ...                     proposed=wish, applied=wish)
    >>> log_tick(record)["applied"]["freq_mhz"]
    [1410.0, 1410.0]
    """
    values = {field.name: plain(getattr(record, field.name)) for field in fields(record)}
    in_force = values.pop("in_force")
    return values if in_force else {**values, "applied": None, "advised": values["applied"]}


class LogFile:
    r"""One file of a log, being written: a header, then a line for every tick.

    Parameters
    ----------
    path : Path
        The file; an existing one is replaced.
    header : mapping
        What :func:`log_header` made.

    Raises
    ------
    OSError
        If it cannot be written; what was torn stays at its end. One that does not even take the
        header is removed.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = LogFile(Path(folder, "ticks.jsonl"), {"schema": "x"})
    ...     file.append(log_line({"number": 0}))
    ...     file.close()
    ...     file.bytes, Path(folder, "ticks.jsonl").read_text()
    (28, '{"schema":"x"}\n{"number":0}\n')
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._file: BinaryIO | None = Path(path).open("wb")  # noqa: SIM115
        self.bytes = 0
        try:
            self.append(log_line(header))
        except OSError:
            with suppress(OSError):  # what a full disk would not take is refused once more
                self.close()
            with suppress(OSError):
                Path(path).unlink()  # there is nothing in it
            raise

    def append(self, line: bytes) -> None:
        """Write one line, and hand it to the system.

        Parameters
        ----------
        line : bytes
            What :func:`log_line` made.
        """
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            self.bytes += len(line)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def log_line(values: Mapping[str, Any]) -> bytes:
    r"""Line of a log, as it stands in the file.

    Parameters
    ----------
    values : mapping
        What :func:`log_header` or :func:`log_tick` made.

    Returns
    -------
    bytes
        One line of JSON with its line end.

    Examples
    --------
    >>> log_line({"number": 0})
    b'{"number":0}\n'
    """
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def log_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Header and ticks of a log with their numbers, from lines of JSON or from Parquet.

    Parameters
    ----------
    path : Path
        The file; ``.parquet`` by its name.

    Yields
    ------
    number : int
        Line in the file, counted from 1; the first is the header.
    values : dict
        What stands there. A last line without its end is left out: its writer died.

    Raises
    ------
    ConfigError
        If it cannot be read, naming the line.

    Examples
    --------
    >>> from pathlib import Path
    >>> next(log_lines(Path("no-such.jsonl")))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: log no-such.jsonl: cannot be read: No such file or directory
    """
    number = 0
    try:
        for number, values in enumerate(_rows(Path(path)), start=1):
            if not isinstance(values, dict):
                raise ValueError("expected an object")
            yield number, values
    except OSError as error:
        raise ConfigError(f"log {path}: cannot be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"log {path}: line {number + 1}: not of a log of ticks: {error}"
        ) from error


def log_files(path: Path) -> list[Path]:
    """Files of a log in the order in which they were written, those put aside among them.

    Parameters
    ----------
    path : Path
        The log's name, such as ``ticks.jsonl``, or the folder of one log. A file that was put
        aside stands for itself.

    Returns
    -------
    list of Path
        Oldest first. Where there is none, the name alone, which then cannot be read.

    Raises
    ------
    ConfigError
        If a folder holds no log, or several, or cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("ticks.jsonl", "ticks-000002.jsonl", "ticks-000001.parquet"):
    ...         Path(folder, name).touch()
    ...     [one.name for one in log_files(Path(folder))]
    ['ticks-000001.parquet', 'ticks-000002.jsonl', 'ticks.jsonl']
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return [*put_aside(path), path] if path.exists() else put_aside(path) or [path]
        logs = [one for one in path.iterdir() if one.suffix in (".jsonl", ".parquet")]
    except OSError as error:
        raise ConfigError(f"log {path}: cannot be read: {error.strerror or error}") from error
    names = sorted({re.sub(rf"{_ASIDE}$", "", one.stem) for one in logs})
    if len(names) != 1:
        raise ConfigError(
            f"log {path}: expected a folder with one log, got"
            f" {', '.join(f'{name}.jsonl' for name in names) or 'none'}; name the log"
        )
    return log_files(path / f"{names[0]}.jsonl")


def put_aside(path: Path) -> list[Path]:
    """Files that a log put aside when they were full, oldest first.

    Parameters
    ----------
    path : Path
        The log's name.

    Returns
    -------
    list of Path
        Files named as the log with a number, such as ``ticks-000001.jsonl``.

    Raises
    ------
    OSError
        If its folder cannot be read.

    Examples
    --------
    >>> from pathlib import Path
    >>> put_aside(Path("no-such.jsonl"))
    []
    """
    form = re.compile(re.escape(path.stem) + _ASIDE + r"\.(jsonl|parquet)")
    found = [one for one in path.parent.iterdir() if form.fullmatch(one.name)]
    return sorted(found, key=lambda one: int(one.stem.rpartition("-")[2]))


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # torn: the host died
            yield json_value(line, f"log {path}, line {number}", constants=True)


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"log {path}: Parquet needs pyarrow; pip install pyarrow") from error
    with parquet.ParquetFile(path) as file:
        header = (file.schema_arrow.metadata or {}).get(PARQUET_KEY)
        if header is None:
            raise ValueError("Parquet, but not of a log")
        yield json.loads(header)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield {**row, "notes": dict(row["notes"])}


def log_fleet(header: Mapping[str, Any]) -> FleetSpec:
    """Fleet that a log is of.

    Parameters
    ----------
    header : mapping
        Values of the first line: the second item of what :func:`log_lines` yields first.

    Returns
    -------
    FleetSpec
        With the profiles that were in force.

    Raises
    ------
    ConfigError, KeyError, TypeError, ValueError
        If it is not the first line of a log.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> log_fleet(log_header(fleet)).ids
    ('prefill-0', 'decode-0')
    """
    if header["schema"] != _SCHEMA:
        raise ConfigError(f"expected schema {_SCHEMA}, got {header['schema']!r}")
    return FleetSpec(tuple(_instance(one) for one in header["fleet"]))


def _instance(values: Mapping[str, Any]) -> InstanceSpec:
    settings = dict(values)
    profile = dict(settings.pop("profile"))
    columns = profile.pop("table")
    table = np.zeros(len(columns["clock_mhz"]), dtype=PROFILE_DTYPE)
    for name, column in columns.items():
        table[name] = column
    steps = tuple((upto, step) for upto, step in profile.pop("batch_steps"))
    role = Role[settings.pop("role")]
    settings["roles"] = tuple(Role[name] for name in settings.get("roles", ()))
    points = tuple(ActuatorPoint(**point) for point in profile.pop("actuators", ()))
    for depth in DEPTHS[1:]:
        for told in (settings, profile):
            if told.get(depth) is not None:
                told[depth] = Rest(**told[depth])
    made = Profile(table=table, batch_steps=steps, actuators=points, **profile)
    return InstanceSpec(role=role, profile=made, **settings)


def log_observation(values: Mapping[str, Any]) -> Observation:
    """Observation from its plain values.

    Parameters
    ----------
    values : mapping
        As :func:`plain` gives them.

    Returns
    -------
    Observation
        What was read at that tick.

    Raises
    ------
    ShapeError, KeyError, TypeError
        If they are not those of an observation.

    Examples
    --------
    >>> from voltana_ctrl import FleetState, Observation
    >>> len(log_observation(plain(Observation(state=FleetState.idle(3)))).state)
    3
    """
    return Observation(
        state=FleetState(**values["state"]),
        iterations=IterationBatch(**values["iterations"]),
        finished=RequestBatch(**values["finished"]),
        **_told_since(values),
    )


def _told_since(values: Mapping[str, Any]) -> dict[str, Any]:
    """What logs of before did not hold."""
    told = {"ready_s": values["ready_s"]} if "ready_s" in values else {}
    if values.get("roles") is not None:
        told["roles"] = tuple(Role[name] for name in values["roles"])
    if "backlog" in values:
        told["backlog"] = Backlog(**values["backlog"])
    return told


def log_applied(values: Mapping[str, Any]) -> Decision:
    """Decision of a tick: the one that was applied, or advised where nothing is set.

    Parameters
    ----------
    values : mapping
        Values of the tick: the second item of what :func:`log_lines` yields.

    Returns
    -------
    Decision
        As it was before it was written.

    Raises
    ------
    ConfigError, ShapeError, KeyError, TypeError
        If it holds none.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> told = {"applied": None, "advised": plain(Decision.highest(fleet))}
    >>> log_applied(told).freq_mhz
    array([1410., 1410.])
    """
    applied = values["applied"]
    return log_decision(values["advised"] if applied is None else applied)


def log_decision(values: Mapping[str, Any]) -> Decision:
    """Decision from its plain values.

    Parameters
    ----------
    values : mapping
        As :func:`plain` gives them.

    Returns
    -------
    Decision
        As it was before it was written.

    Raises
    ------
    ConfigError, ShapeError, KeyError, TypeError
        If they are not those of a decision.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> log_decision(plain(Decision.highest(fleet))).freq_mhz
    array([1410., 1410.])
    """
    settings = dict(values)
    limits = settings.pop("limits")
    # Logs of before decisions told what to believe have none.
    belief = settings.pop("belief", None)
    admission = settings.pop("admission", None)
    roles = settings.pop("roles", None)
    return Decision(
        status=Status[settings.pop("status")],
        admission=None if admission is None else Admission(**admission),
        roles=None if roles is None else tuple(Role[name] for name in roles),
        limits=None if limits is None else Limits(**limits),
        belief=None if belief is None else Belief(**belief),
        **settings,
    )
