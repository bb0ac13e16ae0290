"""How long an engine may be silent while it works."""

from __future__ import annotations

import numpy as np

from voltana_ctrl.laws.iteration import prefill_s
from voltana_ctrl.types import InstanceSpec
from voltana_ctrl.types.ladder import row_down

__all__ = ["longest_prefill_s", "longest_prompt_tok"]


def longest_prefill_s(
    instance: InstanceSpec, prompt_tok: float, clock_mhz: float = float("nan")
) -> float:
    """Time to prefill a prompt in one iteration, by the profile.

    Parameters
    ----------
    instance : InstanceSpec
        The engine.
    prompt_tok : float
        Tokens of the prompt, which :func:`longest_prompt_tok` guesses; cut at what the KV cache
        holds.
    clock_mhz : float
        SM clock in MHz; the lowest supported one where it is NaN, not known.

    Returns
    -------
    float
        Seconds.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> [round(longest_prefill_s(fleet.instances[0], 100_000, mhz), 1) for mhz in (1410.0, 705.0)]
    [6.7, 12.2]
    """
    row = instance.table[row_down(instance.clocks_mhz, np.nan_to_num(clock_mhz))]
    return float(prefill_s(row, min(prompt_tok, float(instance.kv_capacity_tok))))


def longest_prompt_tok(queue_tok: float, kv_used_tok: float, running_req: float) -> float:
    """Longest prompt that an engine can be at, as far as its page lets one guess.

    Nobody outside knows how tokens are spread over requests: what waits may be one prompt, and
    of what is in the KV cache one request has its part. Beside requests that decode a prompt is
    prefilled in parts, and they get a token after each.

    Parameters
    ----------
    queue_tok, kv_used_tok, running_req : float
        Prompt tokens that wait, tokens in the KV cache, and running requests, as it tells.

    Returns
    -------
    float
        Tokens.

    Examples
    --------
    >>> longest_prompt_tok(5000.0, 90_000.0, 1.0), longest_prompt_tok(0.0, 90_000.0, 30.0)
    (95000.0, 3000.0)
    """
    return queue_tok + kv_used_tok / max(1.0, running_req)
