"""Tables of measured iterations: our own format, and readers of published ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, Bool, count, freeze_fields
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.published import from_published, numbers
from voltana_ctrl.textfile import is_parquet, parquet_rows, read_text

__all__ = ["IterationTable", "read_table"]

# Power of one GPU outside these bounds, or a clock, is a unit gone wrong.
POWER_W = (5.0, 2500.0)
CLOCK_MHZ = (50.0, 5000.0)
# Same clock and load, yet this far apart: two units in one column.
SPREAD = 20.0

# Column -> (names it may have, factor to our unit).
_COLUMNS: dict[str, dict[str, float]] = {
    "freq_mhz": {"freq_mhz": 1.0, "sm_mhz": 1.0, "clock_mhz": 1.0},
    "batch_req": {"batch_req": 1.0, "batch": 1.0},
    "kv_tok": {"kv_tok": 1.0},
    "prefill_tok": {"prefill_tok": 1.0, "prompt_tok": 1.0, "new_tok": 1.0},
    "square_tok2": {"square_tok2": 1.0},
    "wall_s": {
        "wall_s": 1.0,
        "latency_s": 1.0,
        "wall_ms": 1e-3,
        "latency_ms": 1e-3,
    },
    "host_s": {"host_s": 1.0, "host_ms": 1e-3},
    "energy_j": {"energy_j": 1.0, "energy_mj": 1e-3},
    "power_w": {"power_w": 1.0, "power_mw": 1e-3},
}
_PHASES = ("decode", "prefill", "idle")
# Columns that say what was set besides the SM clock; empty where nothing was.
OTHERS = ("set_power_cap_w", "set_mem_mhz", "set_cpu_mhz")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IterationTable:
    """Measured iterations of one instance, one row each.

    Parameters
    ----------
    phase : tuple of {"decode", "prefill", "idle"}
        What ran. An idle row gives the power of an instance that holds the model.
    freq_mhz : ndarray, shape (n,)
        SM clock at which it ran.
    batch_req : ndarray, shape (n,)
        Requests in the batch, >= 1 (0 when idle).
    kv_tok : ndarray, shape (n,)
        Tokens in the KV cache that a decode iteration reads; 0 for prefill.
    prefill_tok : ndarray, shape (n,)
        Prompt tokens that a prefill iteration processes; 0 for decode.
    square_tok2 : ndarray, shape (n,)
        Sum over the prompts of ``end^2 - start^2`` of the positions processed.
    wall_s : ndarray, shape (n,)
        Duration of the iteration.
    energy_j : ndarray, shape (n,)
        Energy of the whole instance; NaN where it was not measured.
    gpus : int
        GPUs of the instance.
    source : str
        Where the rows come from.
    host_s : ndarray, shape (n,)
        Part of `wall_s` in which the GPU waits for the host; NaN where it was not measured, which
        is everywhere if it is left out.

    Raises
    ------
    ConfigError
        Naming the column and the first row, if a value is not physical or units are mixed.
    ShapeError
        If columns differ in length.

    Examples
    --------
    >>> table = IterationTable(
    ...     phase=("decode", "decode"), freq_mhz=[1410, 1410], batch_req=[1, 8],
    ...     kv_tok=[192, 1536], prefill_tok=[0, 0], square_tok2=[0, 0],
    ...     wall_s=[0.0425, 0.0451], energy_j=[11.3, 11.8])
    >>> len(table), table.of("prefill").wall_s.shape
    (2, (0,))
    """

    phase: tuple[str, ...]
    freq_mhz: F64
    batch_req: F64
    kv_tok: F64
    prefill_tok: F64
    square_tok2: F64
    wall_s: F64
    energy_j: F64
    gpus: int = 1
    source: str = "measured"
    host_s: F64 | None = None

    def __post_init__(self) -> None:
        if self.host_s is None:
            object.__setattr__(self, "host_s", np.full(len(self.phase), np.nan))
        fields = [*self._arrays()]
        freeze_fields(self, fields, (len(self.phase),))
        count("table.gpus", self.gpus)
        for row, phase in enumerate(self.phase):
            if phase not in _PHASES:
                raise ConfigError(
                    f"table.phase: expected one of {', '.join(_PHASES)}, got {phase!r} in row"
                    f" {row + 1}"
                )
        busy = np.array([phase != "idle" for phase in self.phase], dtype=bool)
        decode = np.array([phase == "decode" for phase in self.phase], dtype=bool)
        prefill = busy & ~decode
        low, high = CLOCK_MHZ
        within = (self.freq_mhz >= low) & (self.freq_mhz <= high)
        self._check("freq_mhz", within, f"{low:g}..{high:g} MHz")
        self._check("wall_s", (self.wall_s > 0.0) & (self.wall_s < 3600.0), "seconds > 0")
        waits = np.isnan(self.waited_s) | ((self.waited_s >= 0.0) & (self.waited_s < self.wall_s))
        self._check("host_s", waits, "seconds >= 0 and below wall_s")
        self._check("batch_req", (self.batch_req >= 1.0) | ~busy, "at least one request")
        self._check("kv_tok", self.kv_tok >= 0.0, "tokens >= 0")
        self._check("kv_tok", (self.kv_tok < np.inf) | ~decode, "finite tokens")
        self._check("prefill_tok", (self.prefill_tok >= 1.0) | ~prefill, "at least one token")
        self._check("square_tok2", self.square_tok2 >= 0.0, "square tokens >= 0")
        known = ~np.isnan(self.energy_j)
        self._check("energy_j", (self.energy_j > 0.0) | ~known, "joules > 0")
        power_w = self.energy_j / self.wall_s / self.gpus
        low, high = POWER_W
        self._check(
            "energy_j",
            ((power_w >= low) & (power_w <= high)) | ~known,
            f"{low:g}..{high:g} W per GPU from energy over time: is one of them in another unit?",
        )
        self._check_spread(busy)

    def __len__(self) -> int:
        return len(self.phase)

    def _arrays(self) -> tuple[str, ...]:
        return (
            "freq_mhz",
            "batch_req",
            "kv_tok",
            "prefill_tok",
            "square_tok2",
            "wall_s",
            "energy_j",
            "host_s",
        )

    @property
    def waited_s(self) -> F64:
        """Time in which the GPU waits for the host, shape (n,): the column `host_s`, never None."""
        assert self.host_s is not None  # noqa: S101
        return self.host_s

    def _check(self, column: str, good: Bool, expected: str) -> None:
        if not np.all(good):
            row = int(np.argmin(good))
            value = getattr(self, column)[row]
            raise ConfigError(
                f"table.{column}: expected {expected}, got {value:g} in row {row + 1}"
            )

    def _check_spread(self, busy: Bool) -> None:
        load = np.stack([self.freq_mhz, self.batch_req, self.kv_tok, self.prefill_tok], axis=1)
        same, group = np.unique(load[busy], axis=0, return_inverse=True)
        wall_s = self.wall_s[busy]
        least, most = np.full(len(same), np.inf), np.zeros(len(same))
        np.minimum.at(least, group.ravel(), wall_s)
        np.maximum.at(most, group.ravel(), wall_s)
        if len(same) and not np.all(most < SPREAD * least):
            worst = int(np.argmax(most / least))
            freq_mhz, batch_req, *_ = same[worst]
            raise ConfigError(
                f"table.wall_s: {least[worst]:g} and {most[worst]:g} s at the same load"
                f" ({freq_mhz:g} MHz, batch {batch_req:g}): mixed units? write seconds throughout"
            )

    def of(self, phase: str) -> IterationTable:
        """Rows of one phase.

        Examples
        --------
        >>> IterationTable(
        ...     phase=("idle",), freq_mhz=[1410], batch_req=[0], kv_tok=[0], prefill_tok=[0],
        ...     square_tok2=[0], wall_s=[1.0], energy_j=[60.0]).of("idle").energy_j
        array([60.])
        """
        return self.rows(np.array([each == phase for each in self.phase], dtype=bool))

    def rows(self, mask: Bool) -> IterationTable:
        """Rows where `mask` is true.

        Parameters
        ----------
        mask : ndarray of bool, shape (n,)
            True for each row that is kept.

        Examples
        --------
        >>> import numpy as np
        >>> table = IterationTable(
        ...     phase=("idle",), freq_mhz=[1410], batch_req=[0], kv_tok=[0], prefill_tok=[0],
        ...     square_tok2=[0], wall_s=[1.0], energy_j=[60.0])
        >>> len(table.rows(np.array([False])))
        0
        """
        kept = {name: getattr(self, name)[mask] for name in self._arrays()}
        phase = tuple(each for each, keep in zip(self.phase, mask, strict=True) if keep)
        return IterationTable(phase=phase, gpus=self.gpus, source=self.source, **kept)


def read_table(
    path: str | Path | Sequence[str | Path],
    *,
    where: Mapping[str, str] | None = None,
    gpus: int | None = None,
    freq_mhz: float | None = None,
) -> IterationTable:
    r"""Read measured iterations from CSV, or Parquet where pyarrow is installed.

    The format is told by its columns: our own (see ``docs/identification.md``), the A800
    clock sweep, the stage profiles of Perseus, and the ML.ENERGY runs.

    Parameters
    ----------
    path : str, Path or sequence of them
        Files of one format; their rows are joined.
    where : mapping of str to str, optional
        Keep the rows whose column has this value, before anything else is read; for example
        ``{"tp": "1"}``.
    gpus : int, optional
        GPUs of the instance; default from the table, else 1.
    freq_mhz : float, optional
        Clock of all rows, for a table without a clock column.

    Returns
    -------
    IterationTable
        In seconds, joules, megahertz.

    Raises
    ------
    ConfigError
        Naming the file, column and row, if it cannot be read as any of the formats.

    Examples
    --------
    >>> from pathlib import Path
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "table.csv")
    ...     _ = path.write_text("phase,freq_mhz,batch_req,kv_tok,wall_ms,power_w\n"
    ...                         "decode,1410,8,1536,45.1,261\n")
    ...     table = read_table(path)
    >>> table.wall_s, table.energy_j.round(2)
    (array([0.0451]), array([11.77]))
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    rows = [row for each in paths for row in raw_rows(Path(each))]
    label = ", ".join(Path(each).name for each in paths)
    for column, value in (where or {}).items():
        if rows and column not in rows[0]:
            has = ", ".join(rows[0])
            raise ConfigError(f"{label}: no column {column!r} to select by; has {has}")
        rows = [row for row in rows if row[column] == value]
    if not rows:
        chosen = f" where {dict(where)}" if where else ""
        raise ConfigError(f"{label}: no rows{chosen}")
    # With another actuator set an iteration says nothing of clocks; see fit.actuators.
    plain = [row for row in rows if not sets_other(row)]
    if not plain:
        raise ConfigError(f"{label}: no rows of plain clock locks, with nothing else set")
    rows = plain
    published = from_published(rows, label, freq_mhz)
    columns = published or _own_columns(rows, label, freq_mhz)
    found_gpus = columns.pop("gpus", 1)
    try:
        return IterationTable(gpus=gpus or found_gpus, source=label, **columns)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error


def sets_other(row: Mapping[str, str]) -> bool:
    """Whether a row of `voltana-ctrl profile` was measured with another actuator set."""
    return any(row.get(name) for name in OTHERS)


def raw_rows(path: Path) -> list[dict[str, str]]:
    """Cells of a table by column, as text."""
    if path.suffix == ".parquet" or is_parquet(path):
        return [{key: str(value) for key, value in row.items()} for row in parquet_rows(path)]
    text = read_text(path)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path}: expected CSV with a header line: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ConfigError(f"{path}: row {number} has more or fewer cells than the header")
    return rows


def _own_columns(rows: list[dict[str, str]], label: str, freq_mhz: float | None) -> dict[str, Any]:
    has = set(rows[0])
    if "phase" not in has:
        raise ConfigError(f"{label}: missing column 'phase' (decode, prefill or idle)")
    phase = tuple(row["phase"] for row in rows)
    data: dict[str, F64] = {}
    for name, spellings in _COLUMNS.items():
        given = [spelling for spelling in spellings if spelling in has]
        if len(given) > 1:
            raise ConfigError(
                f"{label}: columns {' and '.join(given)} say the same in different units or"
                " names; keep one"
            )
        if given:
            data[name] = spellings[given[0]] * numbers(rows, given[0], label)
    if freq_mhz is not None and "freq_mhz" not in data:
        data["freq_mhz"] = np.full(len(rows), freq_mhz)
    need = ["freq_mhz", "wall_s"]
    if any(each != "idle" for each in phase):
        need.append("batch_req")
    if "decode" in phase:
        need.append("kv_tok")
    if "prefill" in phase:
        need.append("prefill_tok")
    for name in need:
        if name not in data:
            known = ", ".join(_COLUMNS[name])
            raise ConfigError(f"{label}: missing column {name!r} (or one of {known})")
    if "energy_j" in data and "power_w" in data:
        raise ConfigError(f"{label}: both energy and power; keep energy_j, it is measured")
    if "power_w" in data:
        data["energy_j"] = data.pop("power_w") * data["wall_s"]
    zero = np.zeros(len(rows))
    data.setdefault("energy_j", np.full(len(rows), np.nan))
    data.setdefault("host_s", np.full(len(rows), np.nan))
    decode = np.array([each == "decode" for each in phase])
    prefill = np.array([each == "prefill" for each in phase])
    data["batch_req"] = data.get("batch_req", zero)
    data["kv_tok"] = np.where(decode, data.get("kv_tok", zero), 0.0)
    tok = np.where(prefill, data.get("prefill_tok", zero), 0.0)
    data["prefill_tok"] = tok
    # Prompts of equal length, processed whole, unless the table says otherwise.
    equal = tok**2 / np.maximum(data["batch_req"], 1.0)
    data["square_tok2"] = np.where(prefill, data.get("square_tok2", equal), 0.0)
    return {"phase": phase, **data}
