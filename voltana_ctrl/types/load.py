"""What arrives at a fleet: requests per second, and the moments of their lengths."""

from __future__ import annotations

from dataclasses import dataclass

from voltana_ctrl.checks import not_negative

__all__ = ["Lengths", "Load"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Moments of prompt and output lengths that the closed forms need.

    Parameters
    ----------
    prompt_tok, prompt_sd_tok : float
        Mean and standard deviation of the prompt.
    output_tok : float
        Mean output; one token of it comes from prefill, ``output_tok - 1`` are decoded.
    context_tok, context_sd_tok : float
        Mean and standard deviation over *time* of the KV tokens of a running request, where
        long outputs weigh more: ``c = (E[l (L-1)] + E[(L-1)^2] / 2) / E[L-1]``.

    Examples
    --------
    >>> from voltana_ctrl.laws import length_moments
    >>> length_moments([100], [101]).context_tok
    150.0
    """

    prompt_tok: float
    prompt_sd_tok: float
    output_tok: float
    context_tok: float
    context_sd_tok: float

    @property
    def departure_context_frac(self) -> float:
        """Context of a leaving request over that of a running one, ``(l + L) / c``."""
        return (self.prompt_tok + self.output_tok) / self.context_tok


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What arrives.

    Parameters
    ----------
    arrival_req_s : float
        Requests per second, over the fleet.
    lengths : Lengths
        Their prompt and output lengths.

    Raises
    ------
    ConfigError
        If the rate is negative or not finite.

    Examples
    --------
    >>> from voltana_ctrl.laws import length_moments
    >>> Load(arrival_req_s=10.0, lengths=length_moments([100, 300], [101, 301])).arrival_req_s
    10.0
    """

    arrival_req_s: float
    lengths: Lengths

    def __post_init__(self) -> None:
        not_negative("Load.arrival_req_s", self.arrival_req_s)
