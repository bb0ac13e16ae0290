"""A workload from the requests that a trace held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.sim.trace_rows import Row, Source
from voltana_ctrl.sim.trace_units import NO_BLOCKS_TOK
from voltana_ctrl.sim.workload import Workload

_LENGTHS_ALONE_REQ_S = 1.0
_LEAST_REQ_S = 1e-6


def timed(
    source: Source,
    rows: Sequence[Row],
    dropped: int,
    *,
    unit_s: float,
    origin: str,
    block_tok: int = NO_BLOCKS_TOK,
) -> Workload:
    """Sort by stamp and count from the first."""
    stamps = np.array([row.stamp for row in rows])
    order = np.argsort(stamps, kind="stable")
    arrival_s = (stamps[order] - stamps[order[0]]) * unit_s
    last_s, n = float(arrival_s[-1]), len(rows)
    # the observation ends one mean gap after the last arrival; one instant alone counts as 1 s
    duration_s = last_s * n / (n - 1) if last_s > 0.0 else 1.0
    return build(
        source,
        [rows[i] for i in order],
        dropped,
        arrival_s=arrival_s,
        duration_s=max(duration_s, last_s),
        block_tok=block_tok,
        origin=origin,
    )


def untimed(
    source: Source,
    rows: Sequence[Row],
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
    workload = build(
        source, rows, dropped, arrival_s=arrival_s, duration_s=duration_s, origin=origin
    )
    if not paced and isinstance(clients, int) and clients >= 1:
        return workload.closed_loop(clients)
    return workload


def build(
    source: Source,
    rows: Sequence[Row],
    dropped: int,
    *,
    arrival_s: F64,
    duration_s: float,
    origin: str,
    block_tok: int = NO_BLOCKS_TOK,
) -> Workload:
    """Requests in the order of their arrivals, with what their prefix blocks would find cached."""
    prompt_tok = np.array([row.prompt_tok for row in rows], dtype=np.int64)
    names = tuple(sorted({row.kind for row in rows}))
    numbers = {name: number for number, name in enumerate(names)}
    edges = np.concatenate(([0], np.cumsum([len(row.blocks) for row in rows])))
    return Workload(
        name=Path(source.path).name,
        arrival_s=arrival_s,
        prompt_tok=prompt_tok,
        output_tok=np.array([row.output_tok for row in rows], dtype=np.int64),
        duration_s=duration_s,
        cached_tok=np.minimum(_reused_blocks(rows) * block_tok, prompt_tok - 1),
        request_class=np.array([numbers[row.kind] for row in rows], dtype=np.int64),
        class_names=() if names == ("",) else names,
        patience_s=np.array([row.patience_s for row in rows]),
        block_id=np.array([block for row in rows for block in row.blocks], dtype=np.int64),
        block_offset=edges.astype(np.int64),
        block_tok=block_tok,
        dropped_rows=dropped,
        source=f"trace: {origin}",
    )


def _reused_blocks(rows: Sequence[Row]) -> I64:
    """Count the leading blocks of each request that an earlier one had."""
    seen: set[int] = set()
    reused = np.zeros(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        fresh = (k for k, block in enumerate(row.blocks) if block not in seen)
        reused[i] = next(fresh, len(row.blocks))
        seen.update(row.blocks)
    return reused
