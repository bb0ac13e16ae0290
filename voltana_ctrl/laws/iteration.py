"""One iteration of an instance: time and energy, and the transfer of its KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import PROFILE_DTYPE, Profile


def at_clock(profile: Profile, freq_mhz: ArrayLike) -> Any:
    """Coefficients at any clock of the ladder's range, linear between ladder clocks.

    Parameters
    ----------
    profile : Profile
        Profile of the instance.
    freq_mhz : array_like
        Clocks, any shape.

    Returns
    -------
    ndarray, dtype PROFILE_DTYPE
        Of the shape of `freq_mhz`.

    Raises
    ------
    ConfigError
        If a clock lies outside the ladder.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(at_clock(profile, 217.5)["decode_base_s"].round(5))
    0.03256
    """
    freq = np.asarray(freq_mhz, dtype=np.float64)
    ladder = profile.clocks_mhz
    if not np.all((freq >= ladder[0]) & (freq <= ladder[-1])):
        raise ConfigError(
            f"freq_mhz: expected {ladder[0]:g}..{ladder[-1]:g} MHz, the ladder of profile"
            f" {profile.name}, got {freq_mhz!r}"
        )
    rows = np.zeros(freq.shape, dtype=PROFILE_DTYPE)
    for column in PROFILE_DTYPE.names or ():
        rows[column] = np.interp(freq, ladder, profile.table[column])
    return rows


def empty_tok(rows: Any, tok: ArrayLike) -> F64:
    """Slots that stay empty in the last tile of an iteration of so many tokens.

    ``E(m) = ceil(m / tile) tile - m`` from the second tile on: below, smaller tiles are to be
    had. It is 0 where the profile knows of no tiles.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    tok : array_like
        Prompt tokens and running requests of the iteration, together.

    Returns
    -------
    ndarray
        Tokens.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> row = load_profile("a100-sxm-80gb/llama-3.1-8b").table[-1].copy()
    >>> row["decode_tile_tok"] = 64.0
    >>> empty_tok(row, [60, 64, 65, 128, 200])
    array([ 0.,  0., 63.,  0., 56.])
    """
    tile, tok = np.broadcast_arrays(rows["decode_tile_tok"], np.asarray(tok, dtype=np.float64))
    filled = (tile <= 0.0) | (tok <= tile)
    empty: F64 = np.where(filled, 0.0, np.ceil(tok / np.where(filled, 1.0, tile)) * tile - tok)
    return empty


def decode_s(
    rows: Any,
    running_req: ArrayLike,
    kv_tok: ArrayLike,
    padded_req: ArrayLike | None = None,
    prompt_tok: ArrayLike = 0.0,
) -> F64:
    """Time [s] of one decode iteration.

    ``host + max(floor, max(base + req n, roof_base + roof n + tok E(n + p)) + kv K)``: weights are
    streamed whatever the batch, and each request adds to that; once computing, which grows faster
    with the batch from less, takes longer, it counts instead. Computing goes in whole tiles, see
    :func:`voltana_ctrl.laws.empty_tok`. What the host does between two iterations no clock of the
    GPU scales.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    running_req, kv_tok : array_like
        Requests in the batch and their tokens in the KV cache.
    padded_req : array_like, optional
        Executed size of the batch (``profile.padded_batch()[n]``); without it `running_req`.
    prompt_tok : array_like
        Prompt tokens that the same iteration computes. They share its tiles; the time that they
        take themselves, `prefill_tok_s` each, is not in it.

    Returns
    -------
    ndarray
        Seconds.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(decode_s(profile.table[-1], 60, 60 * 434).round(5))
    0.01603
    """
    size = np.asarray(running_req if padded_req is None else padded_req, dtype=np.float64)
    line = rows["decode_base_s"] + rows["decode_req_s"] * size
    roof = rows["decode_roof_base_s"] + rows["decode_roof_s"] * size
    slots = size + np.asarray(prompt_tok, dtype=np.float64)
    bent = np.maximum(line, roof + rows["prefill_tok_s"] * empty_tok(rows, slots))
    kv = rows["decode_kv_s"] * np.asarray(kv_tok, dtype=np.float64)
    step_s: F64 = np.maximum(rows["decode_floor_s"], bent + kv) + rows["decode_host_s"]
    return step_s


def decode_tangent(rows: Any, slopes: Any, size_req: ArrayLike) -> tuple[Any, Any]:
    """Coefficients of the straight line that decode iterations follow around a batch.

    Below the roof they are the profile's; above it base and requests take what the roof says,
    and slots of a tile that stay empty are in the base, as is the time of the host.

    Parameters
    ----------
    rows, slopes : ndarray, dtype PROFILE_DTYPE, shape (n,)
        Coefficients, and their change per MHz.
    size_req : array_like, shape (n,)
        Executed size of the batch.

    Returns
    -------
    rows, slopes : ndarray, dtype PROFILE_DTYPE, shape (n,)
        The same where no batch is above its roof.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> rows = load_profile("a100-sxm-80gb/llama-3.1-8b").table[-1:].copy()
    >>> rows["decode_roof_s"] = 1e-4
    >>> line, _ = decode_tangent(rows, rows, [300])
    >>> line["decode_base_s"].item(), line["decode_req_s"].item()
    (0.001, 0.0001)
    """
    size = np.asarray(size_req, dtype=np.float64)
    empty = empty_tok(rows, size)
    lower_s = rows["decode_base_s"] - rows["decode_roof_base_s"] - rows["prefill_tok_s"] * empty
    above = (rows["decode_roof_s"] - rows["decode_req_s"]) * size > lower_s
    if not (above.any() or rows["decode_host_s"].any()):
        return rows, slopes
    rows, slopes = rows.copy(), slopes.copy()
    for each in (rows, slopes):
        empty_s = each["prefill_tok_s"][above] * empty[above]
        each["decode_base_s"][above] = each["decode_roof_base_s"][above] + empty_s
        each["decode_req_s"][above] = each["decode_roof_s"][above]
        each["decode_base_s"] += each["decode_host_s"]
        each["decode_host_s"] = 0.0
    return rows, slopes


def decode_j(
    rows: Any,
    running_req: ArrayLike,
    kv_tok: ArrayLike,
    padded_req: ArrayLike | None = None,
    prompt_tok: ArrayLike = 0.0,
) -> F64:
    """Energy of one decode iteration: ``T P_on + iter + req n + kv K - host (P_on - P_idle)``.

    Parameters
    ----------
    rows, running_req, kv_tok, padded_req, prompt_tok
        See :func:`decode_s`.

    Returns
    -------
    ndarray
        Joules.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import decode_s
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> power_w = decode_j(profile.table, 60, 26040) / decode_s(profile.table, 60, 26040)
    >>> power_w[[0, -1]].round(1)
    array([110.5, 331. ])
    """
    time_s = decode_s(rows, running_req, kv_tok, padded_req, prompt_tok)
    held_j = time_s * rows["decode_power_w"]
    energy_j: F64 = held_j + batch_j(rows, running_req, kv_tok)
    return energy_j


def batch_j(rows: Any, running_req: ArrayLike, kv_tok: ArrayLike) -> F64:
    """Energy that one decode iteration takes besides what is drawn all the time.

    ``iter + req n + kv K - host (P_on - P_idle)``, since the GPU idles while the host works; the
    mean power of an iteration of time ``T`` is ``P_on`` plus this over ``T``.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    running_req, kv_tok : array_like
        Requests in the batch and their tokens in the KV cache.

    Returns
    -------
    ndarray
        Joules.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import decode_s
    >>> row = load_profile("a100-sxm-80gb/llama-3.1-8b").table[-1]
    >>> power_w = row["decode_power_w"] + batch_j(row, 60, 26040) / decode_s(row, 60, 26040)
    >>> float(power_w.round(1))
    331.0
    """
    energy_j: F64 = (
        rows["decode_iter_j"]
        + rows["decode_req_j"] * np.asarray(running_req, dtype=np.float64)
        + rows["decode_kv_j"] * np.asarray(kv_tok, dtype=np.float64)
    ) - rows["decode_host_s"] * (rows["decode_power_w"] - rows["idle_w"])
    return energy_j


def prefill_s(
    rows: Any,
    new_tok: ArrayLike,
    square_tok2: ArrayLike | None = None,
    prompts_req: ArrayLike = 1.0,
) -> F64:
    """Time [s] of one prefill iteration that runs alone.

    ``prefill_base_s + prefill_tok_s (new_tok + E(new_tok)) + prefill_tok2_s square_tok2
    + prefill_req_s prompts_req``: a launch, work for each slot of whole tiles (see
    :func:`voltana_ctrl.laws.empty_tok`), attention to all that stands before a token, and what
    the host does for each prompt.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    new_tok : array_like
        Prompt tokens processed, summed over the batch.
    square_tok2 : array_like, optional
        Sum over the batch of ``end^2 - start^2`` of the positions processed. The default,
        ``new_tok^2``, is right for one whole prompt and for nothing else.
    prompts_req : array_like
        Prompts that begin in the iteration.

    Returns
    -------
    ndarray
        Seconds.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(prefill_s(profile.table[-1], 1000).round(4))
    0.0755
    """
    tok = np.asarray(new_tok, dtype=np.float64)
    square = tok**2 if square_tok2 is None else np.asarray(square_tok2, dtype=np.float64)
    time_s: F64 = (
        rows["prefill_base_s"]
        + rows["prefill_tok_s"] * (tok + empty_tok(rows, tok))
        + rows["prefill_tok2_s"] * square
        + rows["prefill_req_s"] * np.asarray(prompts_req, dtype=np.float64)
    )
    return time_s


def prefill_j(
    rows: Any,
    new_tok: ArrayLike,
    square_tok2: ArrayLike | None = None,
    prompts_req: ArrayLike = 1.0,
) -> F64:
    """Energy [J] of a prefill iteration that runs alone; idle power while the host works.

    Prompts that run beside decode draw `prefill_beside_w` more, which is not in it.

    Parameters
    ----------
    rows, new_tok, square_tok2, prompts_req
        See :func:`prefill_s`.

    Returns
    -------
    ndarray
        Joules.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(prefill_j(profile.table[-1], 1000).round(1))
    30.2
    """
    host_s = rows["prefill_req_s"] * np.asarray(prompts_req, dtype=np.float64)
    computing_s = prefill_s(rows, new_tok, square_tok2, 0.0)
    energy_j: F64 = computing_s * rows["prefill_power_w"] + host_s * rows["idle_w"]
    return energy_j


def kv_transfer_s(profile: Profile, prompt_tok: ArrayLike) -> F64:
    """Time to move the KV cache of a prompt from a prefill to a decode instance.

    Parameters
    ----------
    profile : Profile
        The link's latency and bandwidth, and the bytes of KV cache per token, are taken from it.
    prompt_tok : array_like
        Tokens of the prompt.

    Returns
    -------
    ndarray
        Seconds.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(kv_transfer_s(profile, 1000).round(6))
    0.000571
    """
    moved_bytes = np.asarray(prompt_tok, dtype=np.float64) * profile.kv_bytes_per_tok
    transfer_s: F64 = profile.link_latency_s + moved_bytes / profile.link_bytes_s
    return transfer_s


def paced(rows: Any, prefill_frac: float, decode_frac: float) -> Any:
    """Coefficients of an instance whose iterations take longer, or less, than they say.

    The power stays what it is, as where an instance waits for something: the energy of a batch
    grows with the time.

    Parameters
    ----------
    rows : ndarray, dtype PROFILE_DTYPE
        Rows of the `table` of a profile, or of :func:`voltana_ctrl.laws.at_clock`.
    prefill_frac, decode_frac : float
        Time of prefill and of a decode iteration over what the rows say.

    Returns
    -------
    ndarray, dtype PROFILE_DTYPE
        Of the same shape.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import decode_s
    >>> rows = load_profile("a100-sxm-80gb/llama-3.1-8b").table
    >>> slow = paced(rows, 1.0, 1.3)
    >>> bool(np.allclose(decode_s(slow, 64.0, 25_000.0), 1.3 * decode_s(rows, 64.0, 25_000.0)))
    True
    """
    changed = np.array(rows)
    for name in changed.dtype.names or ():
        if name.endswith(("_s", "_j")):
            changed[name] *= prefill_frac if name.startswith("prefill") else decode_frac
    return changed
