"""Rows of a trace: what columns are called, how cells become numbers, what is refused."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from voltana_ctrl.errors import ConfigError

MOST_TOK = 2**24  # well above any context window; more is a broken row
_MOST_STAMP_S = 1e10  # three centuries since 1970
#: Names of a column, ours first, compared without regard to case, spaces and underscores.
PROMPT_NAMES = (
    "prompt_tok", "prompt_len", "input_len", "input_length", "prompt_tokens", "input_tokens",
    "ContextTokens", "Request tokens", "num_prefill_tokens", "prompt_size",
)  # fmt: skip
OUTPUT_NAMES = (
    "output_tok", "output_len", "expected_output_len", "output_length", "output_tokens",
    "completion_tokens", "GeneratedTokens", "Response tokens", "num_decode_tokens", "token_size",
)  # fmt: skip
TIME_NAMES = (
    "arrival_s", "arrival_ms", "arrival_time", "start_time", "arrived_at", "arrival_timestamp",
    "timestamp",
)  # fmt: skip
CLASS_NAMES = ("request_class", "class", "service_tier")
PATIENCE_NAMES = ("patience_s", "deadline_s")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHOLE = re.compile(r"[0-9]{1,18}(\.0{1,18})?")
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3}){1,5}")
_DELIMITERS = (",", ";", "\t")


#: A time in the unit of the file.
Stamp = float


@dataclass(frozen=True, slots=True)
class Row:
    """One request as the file tells it; the unit of `stamp` is the format's."""

    prompt_tok: int
    output_tok: int
    stamp: Stamp = 0.0
    blocks: Sequence[int] = ()
    kind: str = ""
    patience_s: float = math.inf


class RowError(Exception):
    """A row that cannot be used: which column, what was expected, what stood there."""

    def __init__(self, column: str, expected: str, got: object) -> None:
        shown = repr(got)
        self.text = f"{column}: expected {expected}, got {shown[:60]}"
        super().__init__(self.text)


@dataclass(frozen=True, slots=True)
class Source:
    """The file being read, for its messages, and what the caller said of it."""

    path: str
    skip_bad_rows: bool = False
    time_unit: str | None = None
    block_tok: int | None = None

    def refuse(self, place: str, what: str) -> ConfigError:
        """Error that names the file."""
        return ConfigError(f"{self.path}: {place}{what}")

    def collect(
        self, rows: Iterable[tuple[str, Any]], parse: Callable[[Any], Row | None]
    ) -> tuple[list[Row], int]:
        """Parse every row; a bad one is dropped and counted, or ends the reading.

        A row that parses to None is one that the format itself marks as failed: it is counted.
        """
        kept: list[Row] = []
        dropped = 0
        for place, raw in rows:
            try:
                row = parse(raw)
            except RowError as error:
                if not self.skip_bad_rows:
                    raise self.refuse(
                        f"{place}, ",
                        f"{error.text}; mend the row or pass skip_bad_rows=True (--skip-bad-rows)",
                    ) from error
                row = None
            if row is None:
                dropped += 1
            else:
                kept.append(row)
        if not kept:
            raise self.refuse("", f"expected at least one usable row, got {dropped} bad ones")
        return kept, dropped


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("_", "")


def found_name(names: Iterable[str], known: Sequence[str]) -> str | None:
    """Which of a file's names is one of those that are known; the first in their order."""
    there = {_plain(name): name for name in reversed(list(names))}
    return next((there[_plain(name)] for name in known if _plain(name) in there), None)


def cells_of(line: str, delimiter: str) -> list[str]:
    """Cells of one line of CSV, quotes obeyed."""
    row = next(csv.reader([line.rstrip("\r")], delimiter=delimiter, skipinitialspace=True), [])
    return [cell.strip() for cell in row]


def header_of(line: str) -> tuple[list[str], str] | None:
    """Column names and delimiter of a line that is the header of a table of requests."""
    for delimiter in _DELIMITERS:
        try:
            names = cells_of(line, delimiter)
        except csv.Error:
            continue
        known = [found_name(names, each) for each in (PROMPT_NAMES, OUTPUT_NAMES, TIME_NAMES)]
        if sum(name is not None for name in known) >= 2 and len(names) > 1:
            return names, delimiter
    return None


def whole(column: str, value: object, lowest: int, highest: int) -> int:
    """A whole number within bounds, from JSON."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise RowError(column, f"a whole number from {lowest} to {highest}", value)
    return value


def tokens_of(column: str, cell: object, *, lowest: int = 1) -> int:
    """Tokens from a cell: a number, or its text, with commas between thousands."""
    value = cell
    if isinstance(cell, str):
        if _THOUSANDS.fullmatch(cell):
            value = int(cell.replace(",", ""))
        elif _WHOLE.fullmatch(cell):
            value = int(cell.partition(".")[0])
    return whole(column, value, lowest, MOST_TOK)


def stamp_of(column: str, cell: object, per_s: float = 1.0) -> Stamp:
    """Number of a time stamp, in a unit of which `per_s` are a second."""
    value: object = cell
    if isinstance(cell, str):
        try:
            value = float(cell) if cell.isascii() and "_" not in cell else cell
        except ValueError:
            value = cell
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0.0 <= value <= _MOST_STAMP_S * per_s):  # type: ignore[operator]
        raise RowError(column, f"a number from 0 to {_MOST_STAMP_S * per_s:.0e}", cell)
    return float(value)  # type: ignore[arg-type]


def kind_of(column: str, cell: object) -> str:
    """Name of a class; whole numbers will do."""
    if isinstance(cell, bool) or not isinstance(cell, str | int) or len(str(cell).strip()) > 64:
        raise RowError(column, "the name of a class", cell)
    return str(cell).strip()


def patience_of(column: str, cell: object) -> float:
    """Seconds after its arrival until a request must be answered; infinite where there are none."""
    if cell is None or cell == "":
        return math.inf
    seconds = stamp_of(column, cell)
    if seconds == 0.0:
        raise RowError(column, "seconds > 0, or nothing where a client waits", cell)
    return seconds


def time_us(column: str, cell: object) -> int:
    """Microseconds since 1970 of a time with a date; whole: a float would lose some of them."""
    time = cell
    if isinstance(cell, str):
        try:
            time = datetime.fromisoformat(cell)
        except ValueError as error:
            raise RowError(column, "a time like 2023-11-16 18:15:46.68", cell) from error
    if not isinstance(time, datetime):
        raise RowError(column, "a time like 2023-11-16 18:15:46.68", cell)
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return (time - _EPOCH) // timedelta(microseconds=1)
