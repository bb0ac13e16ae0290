"""How the simulated machine behaves, apart from its profiles; loads nothing that is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from voltana_ctrl.checks import not_negative

__all__ = ["PlantSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantSettings:
    """How the simulated machine behaves, apart from its profiles.

    Parameters
    ----------
    actuation_s : float
        Dead time of a clock set; sets of one node follow one another.
    settle_s : float
        Time from the end of the call until the clock has its new value.
    view_age_s : float
        Age of the state that compiled routers see.
    decode_at_arrival : bool
        Whether the decode instance is picked when the request arrives (SGLang's P/D
        balancer) or when its prefill is done (vLLM's proxies).
    alternates : bool
        Whether a colocated instance prefills and decodes in turn: while prompts wait, its running
        requests stand still.
    jitter_sd_frac : float
        Iteration times are multiplied by a log-normal factor of mean 1; the standard deviation of
        its logarithm.
    power_noise_sd_w : float
        Standard deviation of the noise on power readings; energy sums stay exact.
    log_iterations : int
        How many iterations are kept for the next read, over the whole fleet; 0 for none.

    Raises
    ------
    ConfigError
        If a value is negative.

    Examples
    --------
    >>> PlantSettings().settle_s
    0.02
    """

    actuation_s: float = 0.005
    settle_s: float = 0.02
    view_age_s: float = 0.0
    decode_at_arrival: bool = False
    alternates: bool = False
    jitter_sd_frac: float = 0.0
    power_noise_sd_w: float = 0.0
    log_iterations: int = 0

    def __post_init__(self) -> None:
        for name in (
            "actuation_s",
            "settle_s",
            "view_age_s",
            "jitter_sd_frac",
            "power_noise_sd_w",
            "log_iterations",
        ):
            not_negative(f"PlantSettings.{name}", getattr(self, name))
