"""What the closed forms need to know of prompt and output lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import Lengths


def length_moments(prompt_tok: ArrayLike, output_tok: ArrayLike) -> Lengths:
    """Moments of a sample of requests.

    A request that decodes ``d = L - 1`` tokens holds ``l + x`` tokens at a time that is
    uniform in ``0 <= x <= d``, and is met in proportion to ``d``.

    Parameters
    ----------
    prompt_tok, output_tok : array_like, shape (n,)
        Lengths of each request.

    Returns
    -------
    Lengths
        Moments over the requests; those of the context are over time.

    Raises
    ------
    ShapeError
        If the two differ in shape.
    ConfigError
        If no request decodes a token or a prompt is empty.

    Examples
    --------
    >>> lengths = length_moments([100, 300], [101, 301])
    >>> lengths.output_tok, lengths.context_tok, round(lengths.departure_context_frac, 3)
    (201.0, 375.0, 1.069)
    """
    prompt = np.asarray(prompt_tok, dtype=np.float64)
    output = np.asarray(output_tok, dtype=np.float64)
    if prompt.shape != output.shape or prompt.ndim != 1:
        raise ShapeError(
            "length_moments: expected prompt_tok and output_tok of one shape (n,), got"
            f" {prompt.shape} and {output.shape}"
        )
    decoded = output - 1.0
    if not (prompt.size and np.all(prompt > 0) and np.all(decoded >= 0) and decoded.sum() > 0):
        raise ConfigError(
            "length_moments: expected prompts > 0 and outputs >= 1 of which one is > 1, got"
            f" {prompt.size} requests, least prompt {prompt.min(initial=np.inf):g}, outputs"
            f" {output.min(initial=np.inf):g}..{output.max(initial=-np.inf):g}"
        )
    weight = decoded / decoded.sum()
    context = float(weight @ (prompt + decoded / 2.0))
    square = float(weight @ (prompt**2 + prompt * decoded + decoded**2 / 3.0))
    return Lengths(
        prompt_tok=float(prompt.mean()),
        prompt_sd_tok=float(prompt.std()),
        output_tok=float(output.mean()),
        context_tok=context,
        context_sd_tok=float(np.sqrt(max(0.0, square - context**2))),
    )
