"""Readers of public trace formats; :func:`read_trace` tells them apart by content.

=====================  ==========================================================================
format                 what is read
=====================  ==========================================================================
Azure LLM trace CSV    columns ``TIMESTAMP`` (ISO 8601), ``ContextTokens``, ``GeneratedTokens``
                       (2023 and 2024 files alike); others are ignored
Mooncake JSONL         ``timestamp`` (ms), ``input_length``, ``output_length`` and, where given,
                       ``hash_ids``: one id per prefix block of 512 tokens
vLLM, SGLang results   the JSON that ``vllm bench serve --save-result --save-detailed`` or
                       ``sglang.bench_serving --output-file --output-details`` writes:
                       ``input_lens``, ``output_lens`` and, where given, ``start_times`` (s);
                       else ``request_rate`` or ``max_concurrency``
request JSONL          one object a request: ``prompt_len`` (or ``input_len``, ``prompt_tokens``,
                       ``input_tokens``), ``output_len`` (or ``expected_output_len``,
                       ``output_tokens``, ``completion_tokens``) and, where given, ``arrival_s``
                       (or ``arrival_time``, ``start_time``; seconds)
=====================  ==========================================================================

A length of zero tokens is refused like any other bad value: such rows are failed or filtered
requests, and neither phase has work for them. (The Azure 2023 and Mooncake files have none.)
Rows out of order are sorted by time; times are counted from the first arrival.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, count
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.workload import Workload

__all__ = ["read_trace"]

_MAX_TOK = 2**24  # well above any context window; more is a broken row
_MAX_STAMP_S = 1e10  # three centuries since 1970
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_PROMPT_KEYS = ("prompt_len", "input_len", "prompt_tokens", "input_tokens")
_OUTPUT_KEYS = ("output_len", "expected_output_len", "output_tokens", "completion_tokens")
_TIME_KEYS = ("arrival_s", "arrival_time", "start_time")
_BLOCK_TOK = 512
_MOONCAKE_QUANTUM_MS = 3000
_LENGTHS_ALONE_REQ_S = 1.0
_LEAST_REQ_S = 1e-6
_FORMATS = (
    "an Azure LLM trace (CSV), a Mooncake trace (JSONL), a vLLM or SGLang benchmark result, or"
    " JSONL rows with prompt_len and output_len"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_DIGITS = re.compile(r"[0-9]{1,18}")

_Line = tuple[int, str]


@dataclass(frozen=True, slots=True)
class _Row:
    """One request as the file tells it; the unit of `stamp` is the format's."""

    prompt_tok: int
    output_tok: int
    stamp: float = 0.0
    blocks: Sequence[int] = ()


class _RowError(Exception):
    """A row that cannot be used: which column, what was expected, what stood there."""

    def __init__(self, column: str, expected: str, got: object) -> None:
        shown = repr(got)
        self.text = f"{column}: expected {expected}, got {shown[:60]}"
        super().__init__(self.text)


@dataclass(frozen=True, slots=True)
class _Source:
    """The file being read, for its messages, and what to do about bad rows."""

    path: str
    skip_bad_rows: bool

    def refuse(self, place: str, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {place}{what}")

    def collect(
        self, rows: Iterable[tuple[str, Any]], parse: Callable[[Any], _Row]
    ) -> tuple[list[_Row], int]:
        """Parse every row; a bad one is dropped and counted, or ends the reading."""
        kept: list[_Row] = []
        dropped = 0
        for place, raw in rows:
            try:
                kept.append(parse(raw))
            except _RowError as error:
                if not self.skip_bad_rows:
                    raise self.refuse(
                        f"{place}, ",
                        f"{error.text}; mend the row or pass skip_bad_rows=True (--skip-bad-rows)",
                    ) from error
                dropped += 1
        if not kept:
            raise self.refuse("", f"expected at least one usable row, got {dropped} bad ones")
        return kept, dropped


def read_trace(
    path: str | os.PathLike[str], *, skip_bad_rows: bool = False, seed: int = 0
) -> Workload:
    """Read a trace or benchmark file, plain or gzipped; the format is found by content.

    Mooncake's stamps are multiples of 3 s (give or take 1 ms), so its requests are spread
    uniformly over the 3 s that follow their stamp, in the order of the file: as stamped, the
    bursts would be an artefact. Its prefix blocks become `cached_tok`: the leading blocks that
    earlier requests had, as one shared and infinite cache would hold them. Files without arrival
    times get Poisson arrivals at the rate they name, or 1 req/s (see :meth:`Workload.rescaled`);
    a benchmark run with `max_concurrency` and no finite rate is a closed loop.

    Parameters
    ----------
    path : str or os.PathLike
        The file.
    skip_bad_rows : bool
        Leave unusable rows out and count them in `Workload.dropped_rows`, instead of refusing.
    seed : int
        Seed, >= 0, of the times a file does not tell.

    Returns
    -------
    Workload
        Lasting from the first arrival to one mean gap after the last (Mooncake: whole stamps).

    Raises
    ------
    ConfigError
        When the file cannot be read, is empty or of no known format, or holds a bad row; the
        message names file, line and column, what was expected and what was found.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.csv"
    >>> _ = path.write_text('''TIMESTAMP,ContextTokens,GeneratedTokens
    ... 2023-11-16 18:15:46.68,374,44
    ... 2023-11-16 18:15:50.68,396,109
    ... ''')
    >>> w = read_trace(path)
    >>> w.arrival_s.tolist(), w.prompt_tok.tolist()
    ([0.0, 4.0], [374, 396])
    """
    count("seed", seed, minimum=0)
    source = _Source(str(path), skip_bad_rows)
    text = _load(source, Path(path))
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise source.refuse("", f"expected {_FORMATS}, got an empty file")
    rng = np.random.default_rng(seed)
    header = [cell.strip(' \t\r"').lower() for cell in lines[0][1].split(",")]
    if "timestamp" in header:
        return _read_azure(source, lines, header)
    sample = _first_known(lines, text)
    if sample is None:
        raise source.refuse(
            f"line {lines[0][0]}: ", f"expected {_FORMATS}, got {lines[0][1][:60]!r}"
        )
    if "input_lens" in sample:
        return _read_result(source, lines, sample, rng)
    if "input_length" in sample:
        return _read_mooncake(source, lines, rng)
    if _key(sample, _PROMPT_KEYS) and _key(sample, _OUTPUT_KEYS):
        return _read_requests(source, lines, sample, rng)
    raise source.refuse("", _advice(sample))


def _load(source: _Source, path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise source.refuse("", "expected a file, got none of that name") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise source.refuse("", f"expected a readable file, plain or gzip; {error}") from error
    return data.decode("utf-8-sig", errors="replace")


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _RowError("row", "a JSON object", text.strip()) from error
    if not isinstance(value, dict):
        raise _RowError("row", "a JSON object", value)
    return value


def _first_known(lines: Sequence[_Line], text: str) -> dict[str, Any] | None:
    """Return the first object that tells the format; else any object; else none."""
    fallback: dict[str, Any] | None = None
    for candidate in [*(line for _, line in lines), text]:
        if candidate.lstrip()[:1] != "{":
            continue
        try:
            value = _parse_object(candidate)
        except _RowError:
            continue
        known = "input_lens" in value or "input_length" in value
        if known or (_key(value, _PROMPT_KEYS) and _key(value, _OUTPUT_KEYS)):
            return value
        fallback = fallback or value
    return fallback


def _advice(sample: Mapping[str, Any]) -> str:
    if "request_throughput" in sample:
        return (
            "expected per-request lengths, got a benchmark summary; run it again with"
            " --save-detailed (vLLM) or --output-details (SGLang)"
        )
    if "prompt" in sample or "conversations" in sample:
        return (
            "expected prompt_len and output_len in tokens, got prompts as text; count their tokens"
            " with the model's tokenizer first"
        )
    return f"expected {_FORMATS}, got JSON objects with the keys {list(sample)[:6]!r:.80}"


def _key(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _tokens(row: Mapping[str, Any], column: str) -> int:
    return _whole(column, row.get(column), 1, _MAX_TOK)


def _whole(column: str, value: object, lowest: int, highest: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise _RowError(column, f"a whole number from {lowest} to {highest}", value)
    return value


def _stamp(column: str, value: Any, per_s: float = 1.0) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0.0 <= value <= _MAX_STAMP_S * per_s):
        raise _RowError(column, f"a number from 0 to {_MAX_STAMP_S * per_s:.0e}", value)
    return float(value)


def _read_azure(source: _Source, lines: Sequence[_Line], header: Sequence[str]) -> Workload:
    missing = [name for name in _AZURE if name.lower() not in header]
    if missing:
        raise source.refuse(
            f"line {lines[0][0]}: ",
            f"expected the columns {', '.join(_AZURE)}, got none named {missing[0]}",
        )
    where = [header.index(name.lower()) for name in _AZURE]

    def parse(line: str) -> _Row:
        cells = line.split(",")
        stamp, *tokens = (cells[i].strip(' \t\r"') if i < len(cells) else "" for i in where)
        try:
            time = datetime.fromisoformat(stamp)
        except ValueError as error:
            raise _RowError(_AZURE[0], "a time like 2023-11-16 18:15:46.68", stamp) from error
        if time.tzinfo is None:
            time = time.replace(tzinfo=UTC)
        prompt_tok, output_tok = (
            _whole(name, int(cell) if _DIGITS.fullmatch(cell) else cell, 1, _MAX_TOK)
            for name, cell in zip(_AZURE[1:], tokens, strict=True)
        )
        # whole microseconds: a float of seconds since 1970 would lose some of them
        return _Row(prompt_tok, output_tok, (time - _EPOCH) // timedelta(microseconds=1))

    rows, dropped = source.collect(((f"line {i}", line) for i, line in lines[1:]), parse)
    return _timed(source, rows, dropped, unit_s=1e-6, origin="Azure LLM trace")


def _read_mooncake(source: _Source, lines: Sequence[_Line], rng: np.random.Generator) -> Workload:
    def parse(line: str) -> _Row:
        row = _parse_object(line)
        blocks = row.get("hash_ids", [])
        if not isinstance(blocks, list):
            raise _RowError("hash_ids", "a list of whole numbers", blocks)
        return _Row(
            _tokens(row, "input_length"),
            _tokens(row, "output_length"),
            _stamp("timestamp", row.get("timestamp"), 1e3),
            [_whole("hash_ids", block, 0, 2**63 - 1) for block in blocks],
        )

    rows, dropped = source.collect(((f"line {i}", line) for i, line in lines), parse)
    stamps_ms = np.array([row.stamp for row in rows])
    offset_ms = np.abs(stamps_ms - _MOONCAKE_QUANTUM_MS * np.rint(stamps_ms / _MOONCAKE_QUANTUM_MS))
    if np.any(offset_ms > 1.0):  # finer stamps than the published files have
        return _timed(source, rows, dropped, unit_s=1e-3, origin="Mooncake trace")
    stamp = np.rint(stamps_ms / _MOONCAKE_QUANTUM_MS)
    order = np.argsort(stamp, kind="stable")
    stamp -= stamp.min()
    arrival_s = np.sort(stamp + rng.random(stamp.size)) * (_MOONCAKE_QUANTUM_MS / 1000)
    return _build(
        source,
        [rows[i] for i in order],
        dropped,
        arrival_s=arrival_s,
        duration_s=float(stamp.max() + 1.0) * (_MOONCAKE_QUANTUM_MS / 1000),
        origin="Mooncake trace, 3 s stamps spread uniformly",
    )


def _read_requests(
    source: _Source, lines: Sequence[_Line], sample: Mapping[str, Any], rng: np.random.Generator
) -> Workload:
    prompt_key, output_key = _key(sample, _PROMPT_KEYS), _key(sample, _OUTPUT_KEYS)
    # one row with a time makes it a column: the rows without are bad, not untimed
    time_key = next((k for k in _TIME_KEYS if any(f'"{k}"' in line for _, line in lines)), None)

    def parse(line: str) -> _Row:
        row = _parse_object(line)
        stamp = _stamp(time_key, row.get(time_key)) if time_key else 0.0
        return _Row(_tokens(row, str(prompt_key)), _tokens(row, str(output_key)), stamp)

    rows, dropped = source.collect(((f"line {i}", line) for i, line in lines), parse)
    if time_key:
        return _timed(source, rows, dropped, unit_s=1.0, origin="request rows")
    return _untimed(source, rows, dropped, {}, rng, origin="request rows without times")


def _read_result(
    source: _Source, lines: Sequence[_Line], sample: Mapping[str, Any], rng: np.random.Generator
) -> Workload:
    if len(lines) > 1 and sum('"input_lens"' in line for _, line in lines) > 1:
        raise source.refuse("", "expected one benchmark run, got several; keep one line per file")
    columns = {"input_lens": sample["input_lens"], "output_lens": sample.get("output_lens")}
    if sample.get("start_times"):
        columns["start_times"] = sample["start_times"]
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(columns["input_lens"]):
            raise source.refuse("", f"{name}: expected a list, one entry a request")

    def parse(values: tuple[object, ...]) -> _Row:
        prompt_tok = _whole("input_lens", values[0], 1, _MAX_TOK)
        output_tok = _whole("output_lens", values[1], 1, _MAX_TOK)
        stamp = _stamp("start_times", values[2]) if len(values) > 2 else 0.0
        return _Row(prompt_tok, output_tok, stamp)

    requests = zip(*columns.values(), strict=True)
    rows, dropped = source.collect(
        ((f"request {i}", values) for i, values in enumerate(requests)), parse
    )
    if "start_times" in columns:
        return _timed(source, rows, dropped, unit_s=1.0, origin="benchmark result")
    return _untimed(source, rows, dropped, sample, rng, origin="benchmark result without times")


def _timed(
    source: _Source, rows: Sequence[_Row], dropped: int, *, unit_s: float, origin: str
) -> Workload:
    """Sort by stamp and count from the first."""
    stamps = np.array([row.stamp for row in rows])
    order = np.argsort(stamps, kind="stable")
    arrival_s = (stamps[order] - stamps[order[0]]) * unit_s
    last_s, n = float(arrival_s[-1]), len(rows)
    # the observation ends one mean gap after the last arrival; one instant alone counts as 1 s
    duration_s = last_s * n / (n - 1) if last_s > 0.0 else 1.0
    return _build(
        source,
        [rows[i] for i in order],
        dropped,
        arrival_s=arrival_s,
        duration_s=max(duration_s, last_s),
        origin=origin,
    )


def _untimed(
    source: _Source,
    rows: Sequence[_Row],
    dropped: int,
    told: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    origin: str,
) -> Workload:
    """Give lengths the arrivals their benchmark ran with, as far as it tells."""
    rate: Any = told.get("request_rate")  # a number, or "inf" for all at once
    clients = told.get("max_concurrency")
    paced = isinstance(rate, int | float) and _LEAST_REQ_S <= rate < math.inf
    rate_req_s = rate if paced else _LENGTHS_ALONE_REQ_S
    n = len(rows)
    # given their number, Poisson arrivals are uniform over the span, which the rate then fixes
    duration_s = n / rate_req_s
    arrival_s = np.sort(rng.random(n)) * duration_s
    workload = _build(
        source, rows, dropped, arrival_s=arrival_s, duration_s=duration_s, origin=origin
    )
    if not paced and isinstance(clients, int) and clients >= 1:
        return workload.closed_loop(clients)
    return workload


def _build(
    source: _Source,
    rows: Sequence[_Row],
    dropped: int,
    *,
    arrival_s: F64,
    duration_s: float,
    origin: str,
) -> Workload:
    prompt_tok = np.array([row.prompt_tok for row in rows], dtype=np.int64)
    edges = np.concatenate(([0], np.cumsum([len(row.blocks) for row in rows])))
    return Workload(
        name=Path(source.path).name,
        arrival_s=arrival_s,
        prompt_tok=prompt_tok,
        output_tok=np.array([row.output_tok for row in rows], dtype=np.int64),
        duration_s=duration_s,
        cached_tok=np.minimum(_reused_blocks(rows) * _BLOCK_TOK, prompt_tok - 1),
        block_id=np.array([block for row in rows for block in row.blocks], dtype=np.int64),
        block_offset=edges.astype(np.int64),
        block_tok=_BLOCK_TOK,
        dropped_rows=dropped,
        source=f"trace: {origin}",
    )


def _reused_blocks(rows: Sequence[_Row]) -> I64:
    """Count the leading blocks of each request that an earlier one had."""
    seen: set[int] = set()
    reused = np.zeros(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        fresh = (k for k, block in enumerate(row.blocks) if block not in seen)
        reused[i] = next(fresh, len(row.blocks))
        seen.update(row.blocks)
    return reused
