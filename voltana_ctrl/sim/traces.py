"""Readers of public trace formats; :func:`read_trace` tells them apart by content.

=====================  ==========================================================================
format                 what is read
=====================  ==========================================================================
table of requests      CSV (commas, semicolons or tabs) or Parquet with a column of prompt lengths
                       (``prompt_tok``, ``prompt_len``, ``input_len``, ``prompt_tokens``,
                       ``input_tokens``, ``num_prefill_tokens``, ``prompt_size``), one of output
                       lengths (``output_tok``, ``output_len``, ``output_tokens``,
                       ``completion_tokens``, ``num_decode_tokens``, ``token_size``) and, where
                       given, of times (``arrival_s``, ``arrival_ms``, ``arrival_time``,
                       ``start_time``, ``arrived_at``, ``arrival_timestamp``, ``timestamp``:
                       seconds unless named otherwise, or times with a date)
Azure LLM and LMM      the table with ``TIMESTAMP`` (ISO 8601), ``ContextTokens``,
traces                 ``GeneratedTokens`` (2023 to 2025 alike); other columns are ignored
BurstGPT               the table with ``Timestamp`` (s), ``Request tokens``, ``Response tokens``;
                       rows of 0 response tokens are its failed requests: left out, and counted
Mooncake JSONL         ``timestamp`` (ms), ``input_length``, ``output_length`` and, where given,
                       ``hash_ids``: one id per prefix block of 512 tokens
Bailian JSONL          the same keys beside ``chat_id``, in seconds and blocks of 16 tokens
vLLM, SGLang results   the JSON that ``vllm bench serve --save-result --save-detailed`` or
                       ``sglang.bench_serving --output-file --output-details`` writes:
                       ``input_lens``, ``output_lens`` and, where given, ``start_times`` (s);
                       else ``request_rate`` or ``max_concurrency``
request JSONL          one object a request, with names as of the table of requests
=====================  ==========================================================================

A table, and rows of JSON, may have a column of classes (``request_class``, ``class``,
``service_tier``: names), and one of seconds within which a request that may wait has to be answered
(``patience_s``, ``deadline_s``: empty where a client waits for the answer).

Files may be packed (gzip, bzip2, xz, Zstandard) and carry a byte-order mark. Units that a format's
keys do not name are told by content: the size of prefix blocks by how many the prompts have, the
unit of Mooncake's keys by the stamps. Where they do not tell, the file is refused until
`time_unit` or `block_tok` say it.

A length of zero tokens is refused like any other bad value: such rows are failed or filtered
requests, and neither phase has work for them. (The Azure 2023 and Mooncake files have none.)
Rows out of order are sorted by time; times are counted from the first arrival.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import count
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.trace_build import build, timed, untimed
from voltana_ctrl.sim.trace_rows import (
    CLASS_NAMES,
    MOST_TOK,
    OUTPUT_NAMES,
    PATIENCE_NAMES,
    PROMPT_NAMES,
    TIME_NAMES,
    Row,
    RowError,
    Source,
    cells_of,
    found_name,
    header_of,
    kind_of,
    patience_of,
    stamp_of,
    time_us,
    tokens_of,
    whole,
)
from voltana_ctrl.sim.trace_units import (
    QUANTUM_MS,
    UNITS_S,
    block_tok_of,
    on_quanta,
    unit_s_of,
)
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.textfile import is_parquet, parquet_rows, read_text

__all__ = ["read_trace"]

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_FORMATS = (
    "a table (CSV) with columns such as arrival_s, prompt_tok and output_tok, an Azure LLM trace or"
    " BurstGPT, a Mooncake or Bailian trace (JSONL), a vLLM or SGLang benchmark result, or JSONL"
    " rows with prompt_len and output_len"
)

_Line = tuple[int, str]


def read_trace(
    path: str | os.PathLike[str],
    *,
    skip_bad_rows: bool = False,
    seed: int = 0,
    time_unit: str | None = None,
    block_tok: int | None = None,
) -> Workload:
    """Read a trace or benchmark file, plain or packed; the format is found by content.

    Mooncake's stamps are multiples of 3 s (give or take 1 ms), so its requests are spread
    uniformly over the 3 s that follow their stamp, in the order of the file: as stamped, the
    bursts would be an artefact. Prefix blocks become `cached_tok`: the leading blocks that
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
    time_unit : {"s", "ms", "us", "ns"}, optional
        Unit of its times, where neither keys nor stamps tell.
    block_tok : int, optional
        Tokens of a prefix block, where the lengths do not tell.

    Returns
    -------
    Workload
        Lasting from the first arrival to one mean gap after the last (Mooncake: whole stamps).

    Raises
    ------
    ConfigError
        When the file cannot be read, is empty or of no known format, does not tell a unit, or
        holds a bad row; the message names file, line and column, what was expected and what was
        found.

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
    if time_unit is not None and time_unit not in UNITS_S:
        raise ConfigError(f"time_unit: expected one of {', '.join(UNITS_S)}, got {time_unit!r}")
    if block_tok is not None:
        count("block_tok", block_tok)
    source = Source(str(path), skip_bad_rows, time_unit, block_tok)
    rng = np.random.default_rng(seed)
    if is_parquet(Path(path)):
        rows = parquet_rows(Path(path))
        placed = [(f"row {i}", row) for i, row in enumerate(rows, start=1)]
        return _read_table(source, placed, list(rows[0]) if rows else [], rng)
    text = read_text(Path(path))
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise source.refuse("", f"expected {_FORMATS}, got an empty file")
    header = None if lines[0][1].lstrip()[:1] in "{[" else header_of(lines[0][1])
    if header is not None:
        names, delimiter = header
        parse = partial(_cells, names, delimiter)
        cells = [(f"line {i}", parse(line)) for i, line in lines[1:]]
        return _read_table(source, cells, names, rng, where=f"line {lines[0][0]}: ")
    sample = _first_known(lines, text)
    if sample is None:
        raise source.refuse(
            f"line {lines[0][0]}: ", f"expected {_FORMATS}, got {lines[0][1][:60]!r}"
        )
    if "input_lens" in sample:
        return _read_result(source, lines, sample, rng)
    if "input_length" in sample and "timestamp" in sample:
        return _read_mooncake(source, lines, sample, rng)
    if found_name(sample, PROMPT_NAMES) and found_name(sample, OUTPUT_NAMES):
        return _read_requests(source, lines, sample, rng)
    raise source.refuse("", _advice(sample))


#: Key of a line that has more cells than there are columns.
_MORE = "\0more"


def _cells(names: Sequence[str], delimiter: str, line: str) -> Mapping[str, str]:
    try:
        cells = cells_of(line, delimiter)
    except csv.Error:
        return {}
    row = dict(zip(names, cells, strict=False))
    if any(cells[len(names) :]):
        # Such as commas between thousands without quotes: nobody knows which cell is which.
        row[_MORE] = line
    return row


def _read_table(
    source: Source,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    where: str = "",
) -> Workload:
    prompt = found_name(names, PROMPT_NAMES)
    output = found_name(names, OUTPUT_NAMES)
    if prompt is None or output is None:
        if prompt == _AZURE[1] or output == _AZURE[2]:
            missing = _AZURE[1] if prompt is None else _AZURE[2]
            wanted = ", ".join(_AZURE)
        else:
            missing = PROMPT_NAMES[0] if prompt is None else OUTPUT_NAMES[0]
            wanted = "arrival_s, prompt_tok, output_tok"
        raise source.refuse(
            where,
            f"expected the columns {wanted}, got none named {missing}, nor any of"
            f" {', '.join((PROMPT_NAMES if prompt is None else OUTPUT_NAMES)[1:])} (there are"
            f" {', '.join(names)[:80]})",
        )
    origin = {_AZURE[1]: "Azure LLM trace", "Request tokens": "BurstGPT"}.get(prompt, "table")
    return _timed_rows(
        source, rows, names, rng, prompt=prompt, output=output, origin=origin,
        failures=origin == "BurstGPT",  # of which a request that failed has no response
    )  # fmt: skip


def _timed_rows(
    source: Source,
    rows: Sequence[tuple[str, Any]],
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    prompt: str,
    output: str,
    origin: str,
    failures: bool = False,
    read: Callable[[Any], Mapping[Any, Any]] | None = None,
) -> Workload:
    """Requests of named columns, with their times if there is such a column.

    What `read` makes of a row are values of JSON; without it cells may be text.
    """
    time = found_name(names, TIME_NAMES)
    kind, patience = found_name(names, CLASS_NAMES), found_name(names, PATIENCE_NAMES)
    named_unit = {"arrival_s": "s", "arrival_ms": "ms"}.get(str(time).lower())
    if named_unit is not None and source.time_unit not in (None, named_unit):
        raise source.refuse(
            "",
            f"column {time}: expected the unit that its name says, got time_unit="
            f"{source.time_unit!r}; leave it out (--time-unit), or rename the column",
        )
    if origin == "BurstGPT":
        named_unit = "s"
    dated = time == _AZURE[0] or any(
        _dated(row.get(time)) for _, row in rows[:50] if time is not None and read is None
    )
    # In any unit that it may turn out to be, for a start.
    per_s = 1.0 / UNITS_S[source.time_unit or named_unit or "ms"]

    def parse(raw: Any) -> Row | None:
        row: Mapping[Any, Any] = raw if read is None else read(raw)
        if read is None and _MORE in row:
            raise RowError("row", f"{len(names)} cells, as the header has", row[_MORE])
        cells = [row.get(name, "" if read is None else None) for name in (prompt, output, time)]
        if read is not None:
            cells = [None if isinstance(cell, str) else cell for cell in cells]
        stamp = 0.0
        if time is not None:
            stamp = time_us(time, cells[2]) if dated else stamp_of(time, cells[2], per_s)
        prompt_tok = tokens_of(prompt, cells[0])
        output_tok = tokens_of(output, cells[1], lowest=0 if failures else 1)
        if not output_tok:
            return None
        return Row(
            prompt_tok,
            output_tok,
            stamp,
            kind="" if kind is None else kind_of(kind, row.get(kind, "")),
            patience_s=patience_of(patience or "", row.get(patience)),
        )

    kept, dropped = source.collect(rows, parse)
    if time is None:
        return untimed(source, kept, dropped, {}, rng, origin=f"{origin} without times")
    if dated:
        unit_s = UNITS_S["us"]
    elif named_unit is not None and source.time_unit is None:
        unit_s = UNITS_S[named_unit]
    else:
        unit_s = unit_s_of(source, np.array([row.stamp for row in kept]), usually_s=True)
    return timed(source, kept, dropped, unit_s=unit_s, origin=origin)


def _dated(cell: object) -> bool:
    if isinstance(cell, datetime):
        return True
    return isinstance(cell, str) and cell.count("-") == 2 and ":" in cell


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("row", "a JSON object", text.strip()) from error
    if not isinstance(value, dict):
        raise RowError("row", "a JSON object", value)
    return value


def _first_known(lines: Sequence[_Line], text: str) -> dict[str, Any] | None:
    """Return the first object that tells the format; else any object; else none."""
    fallback: dict[str, Any] | None = None
    for candidate in [*(line for _, line in lines), text]:
        if candidate.lstrip()[:1] != "{":
            continue
        try:
            value = _parse_object(candidate)
        except RowError:
            continue
        known = "input_lens" in value or "input_length" in value
        if known or (found_name(value, PROMPT_NAMES) and found_name(value, OUTPUT_NAMES)):
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


def _read_mooncake(
    source: Source, lines: Sequence[_Line], sample: Mapping[str, Any], rng: np.random.Generator
) -> Workload:
    per_s = 1.0 / UNITS_S[source.time_unit or "ms"]

    def parse(line: str) -> Row:
        row = _parse_object(line)
        blocks = row.get("hash_ids", [])
        if not isinstance(blocks, list):
            raise RowError("hash_ids", "a list of whole numbers", blocks)
        return Row(
            whole("input_length", row.get("input_length"), 1, MOST_TOK),
            whole("output_length", row.get("output_length"), 1, MOST_TOK),
            _number("timestamp", row.get("timestamp"), per_s),
            [whole("hash_ids", block, 0, 2**63 - 1) for block in blocks],
        )

    rows, dropped = source.collect(((f"line {i}", line) for i, line in lines), parse)
    stamps = np.array([row.stamp for row in rows])
    # Bailian's traces have Mooncake's keys, in seconds.
    is_bailian = "chat_id" in sample
    seconds = is_bailian and source.time_unit is None
    unit_s = UNITS_S["s"] if seconds else unit_s_of(source, stamps)
    block_tok = block_tok_of(
        source,
        np.array([row.prompt_tok for row in rows], dtype=np.int64),
        np.array([len(row.blocks) for row in rows], dtype=np.int64),
    )
    if unit_s != UNITS_S["ms"] or not on_quanta(stamps):  # finer than the published files have
        return timed(
            source, rows, dropped, unit_s=unit_s, block_tok=block_tok,
            origin="Bailian trace" if is_bailian else "Mooncake trace",
        )  # fmt: skip
    stamp = np.rint(stamps / QUANTUM_MS)
    order = np.argsort(stamp, kind="stable")
    stamp -= stamp.min()
    arrival_s = np.sort(stamp + rng.random(stamp.size)) * (QUANTUM_MS / 1000)
    return build(
        source,
        [rows[i] for i in order],
        dropped,
        arrival_s=arrival_s,
        duration_s=float(stamp.max() + 1.0) * (QUANTUM_MS / 1000),
        block_tok=block_tok,
        origin="Mooncake trace, 3 s stamps spread uniformly",
    )


def _number(column: str, value: Any, per_s: float = 1.0) -> float:
    """A stamp of JSON, where text is none."""
    return stamp_of(column, None if isinstance(value, str) else value, per_s)


def _read_requests(
    source: Source, lines: Sequence[_Line], sample: Mapping[str, Any], rng: np.random.Generator
) -> Workload:
    prompt, output = found_name(sample, PROMPT_NAMES), found_name(sample, OUTPUT_NAMES)
    # One row with a time makes it a column: the rows without are bad, not untimed.
    names = [*sample, *(n for n in TIME_NAMES if any(f'"{n}"' in line for _, line in lines))]
    return _timed_rows(
        source, [(f"line {i}", line) for i, line in lines], names, rng,
        prompt=str(prompt), output=str(output), origin="request rows", read=_parse_object,
    )  # fmt: skip


def _read_result(
    source: Source, lines: Sequence[_Line], sample: Mapping[str, Any], rng: np.random.Generator
) -> Workload:
    if len(lines) > 1 and sum('"input_lens"' in line for _, line in lines) > 1:
        raise source.refuse("", "expected one benchmark run, got several; keep one line per file")
    columns = {"input_lens": sample["input_lens"], "output_lens": sample.get("output_lens")}
    if sample.get("start_times"):
        columns["start_times"] = sample["start_times"]
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(columns["input_lens"]):
            raise source.refuse("", f"{name}: expected a list, one entry a request")

    def parse(values: tuple[object, ...]) -> Row:
        prompt_tok = whole("input_lens", values[0], 1, MOST_TOK)
        output_tok = whole("output_lens", values[1], 1, MOST_TOK)
        stamp = _number("start_times", values[2]) if len(values) > 2 else 0.0
        return Row(prompt_tok, output_tok, stamp)

    requests = zip(*columns.values(), strict=True)
    rows, dropped = source.collect(
        ((f"request {i}", values) for i, values in enumerate(requests)), parse
    )
    if "start_times" in columns:
        return timed(source, rows, dropped, unit_s=1.0, origin="benchmark result")
    return untimed(source, rows, dropped, sample, rng, origin="benchmark result without times")
