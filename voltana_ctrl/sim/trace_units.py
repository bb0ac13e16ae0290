"""Units that a trace does not name: told by its content, by the caller, or refused."""

from __future__ import annotations

import numpy as np

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.trace_rows import Source

#: Times in the unit of the file.
Stamps = F64
#: Names of units of time, and their seconds.
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
#: Stamps of Mooncake's published traces are multiples of it.
QUANTUM_MS = 3000
# The same stamps are a thousand times as many requests per second in milliseconds as in seconds.
# Up to the first rate they are milliseconds, from the second on seconds, between nobody knows.
_SURELY_MS_REQ_S = 30.0
_SURELY_S_REQ_S = 1000.0
# A request in half a minute or less often is not what a trace in seconds has.
_RAREST_REQ_S = 0.03
#: Mooncake's block, and what stands where no prompt has any.
NO_BLOCKS_TOK = 512
_BLOCKS_TOK = (NO_BLOCKS_TOK, 16, 32, 64, 128, 256, 1024, 2048, 4096)
_FITTING_FRAC = 0.99


def on_quanta(stamps: Stamps) -> bool:
    """Whether all stamps, read as milliseconds, are within 1 ms of a multiple of 3 s.

    So are those of Mooncake's published traces, which tells their unit.

    Parameters
    ----------
    stamps : ndarray, shape (n,)
        As the file has them.

    Examples
    --------
    >>> import numpy as np
    >>> on_quanta(np.array([0.0, 3000.0, 5999.0])), on_quanta(np.array([0.0, 1500.0]))
    (True, False)
    """
    return bool(np.all(np.abs(stamps - QUANTUM_MS * np.rint(stamps / QUANTUM_MS)) <= 1.0))


def unit_s_of(source: Source, stamps: Stamps, *, usually_s: bool = False) -> float:
    """Seconds of the unit of some stamps.

    Parameters
    ----------
    source : Source
        The file; a `time_unit` that it was given comes first.
    stamps : ndarray
        As the file has them.
    usually_s : bool
        Whether such files are in seconds unless they are strange.

    Returns
    -------
    float
        Such as 0.001 for milliseconds.

    Raises
    ------
    ConfigError
        If they do not tell.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.sim.trace_rows import Source
    >>> bailian = 0.8 * np.arange(100)  # seconds
    >>> unit_s_of(Source("trace"), bailian), unit_s_of(Source("trace"), 1000.0 * bailian)
    (1.0, 0.001)
    """
    if source.time_unit is not None:
        return UNITS_S[source.time_unit]
    span = float(np.ptp(stamps))
    rate_ms = (len(stamps) - 1) / span * 1e3 if span > 0.0 else 0.0
    if usually_s:
        if span > 0.0 and rate_ms / 1e3 < _RAREST_REQ_S:
            raise _unclear(source, rate_ms)
        return UNITS_S["s"]
    if span > 0.0 and rate_ms < _RAREST_REQ_S:
        raise _unclear(source, rate_ms)  # of microseconds, perhaps
    if span == 0.0 or on_quanta(stamps) or rate_ms <= _SURELY_MS_REQ_S:
        return UNITS_S["ms"]
    if rate_ms >= _SURELY_S_REQ_S:
        return UNITS_S["s"]
    raise _unclear(source, rate_ms)


def _unclear(source: Source, rate_ms_req_s: float) -> ConfigError:
    return source.refuse(
        "",
        f"expected stamps that tell their unit, got {rate_ms_req_s:.3g} req/s if they are"
        f" milliseconds and {rate_ms_req_s / 1e3:.3g} req/s if seconds; say which: time_unit='s',"
        " 'ms', 'us' or 'ns' (--time-unit)",
    )


def block_tok_of(source: Source, prompt_tok: I64, blocks: I64) -> int:
    """Tokens of a prefix block, from the blocks that prompts of these lengths have.

    A prompt of L tokens has L / b blocks, rounded up (the last one partly filled, as Mooncake and
    Bailian have it) or down (full ones only).

    Parameters
    ----------
    source : Source
        The file; the `block_tok` that it was given is taken where the prompts do not tell another.
    prompt_tok, blocks : ndarray of int
        Lengths, and how many blocks each has.

    Raises
    ------
    ConfigError
        If no size fits, or another one than the source says.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.sim.trace_rows import Source
    >>> lengths = np.array([30, 1000, 6758])
    >>> block_tok_of(Source("trace"), lengths, -(-lengths // 16))
    16
    """
    told = blocks > 0
    if not told.any():
        return source.block_tok or NO_BLOCKS_TOK
    tok, n = prompt_tok[told], blocks[told]
    found_tok = next((one for one in _BLOCKS_TOK if _fits(one, tok, n)), None)
    if source.block_tok is not None:
        if found_tok is not None and not _fits(source.block_tok, tok, n):
            raise source.refuse(
                "",
                f"block_tok: the prompts have as many blocks as there are of {found_tok} tokens,"
                f" got {source.block_tok}; leave it out (--block-tok)",
            )
        return source.block_tok
    if found_tok is not None:
        return found_tok
    each_tok = float(np.median(tok / n))
    raise source.refuse(
        "",
        "hash_ids: expected blocks of one size, of which the prompts tell how many there are, got"
        f" about {each_tok:.3g} tokens a block; say the size: block_tok=... (--block-tok)",
    )


def _fits(size_tok: int, prompt_tok: I64, blocks: I64) -> bool:
    """Whether prompts of these lengths have so many blocks of a size, rounded up or down."""
    up, down = -(-prompt_tok // size_tok), np.maximum(prompt_tok // size_tok, 1)
    return any(float((blocks == one).mean()) >= _FITTING_FRAC for one in (up, down))
