"""The numbers of the controller that neither a promise nor a profile nor a measurement gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.errors import ConfigError

__all__ = ["Tuning"]

#: What zero leaves out; all other numbers are positive.
_MAY_BE_ZERO = (
    "prefill_pays_frac", "hand_off_spare_frac", "beside_spare_frac", "free_frac", "doubt_sd_frac",
    "wake_j",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was chosen rather than derived, in one place, with the reason for each choice.

    Everything else follows from the SLO, the profile, the measured delay, or what is learnt while
    running. What half and twice of each number costs on the reference scenario is measured in
    :doc:`/ablation`. The compiled filters of :mod:`voltana_ctrl.kernels.learn` keep their gains
    beside their formulas, and the plan keeps its own in :mod:`voltana_ctrl.control.plan`.

    Parameters
    ----------
    margin_frac : tuple of float
        TTFT and ITL margin of the governors before any request has finished: a prediction times
        one plus this must lie within the target. The ITL margin pays for the wait at the hand-off
        from prefill, which is spread over the tokens of an answer of usual length.
    late_frac : float
        Late requests that a governor may predict, over those that the promise allows. It takes
        each iteration to run at its limit, while the ladder of clocks is coarse and most
        iterations leave more, so that fewer are late than predicted.
    arrivals_ttft_frac : float
        Time constant of a governor's estimate of arrivals, in TTFT promises: what may arrive
        within one promise is then known to about a fifth.
    repay_tok : float
        Decoded tokens within which a request that prompts on a colocated instance have delayed is
        back at its ITL target. Shorter reacts to every prompt, longer is too late for short
        answers.
    share_itl_frac : float
        Time constant of a governor's estimate of the time that prompts take beside what decodes,
        in ITL promises. Longer is late where the load rises, shorter follows chance.
    doubt_sd_frac : float
        Standard deviations of the estimated load that a smaller active set must be able to serve
        besides, since it would have to grow again at once.
    catch_up_s : float
        Time in which a backlog should be gone.
    prefill_pays_frac : float
        Part of the power of prefill that a smaller active set must save. It mostly saves the
        launch of iterations, at the price of longer queues.
    wake_j : float
        Energy that waking an instance costs at least, where its profile says less: caches that
        are cold, and a clock that is asked for again.
    pace_news_frac, margin_news_frac, delay_news_s : float
        How far a pace (relative), a margin or a delay must move before governors and routers are
        told. Below this they would be told at every tick, about noise.
    probe_every_s, probe_s : float
        How often, and for how long, an instance that was clamped is asked for its highest clock,
        which tells whether it still is.
    free_frac : float
        Power that is not worth a miss: where the promise cannot be kept, this much more is spent
        on whatever serves more requests in time.
    rate_memory_s, steady_memory_s : float
        Time constants of the arrival rate: of the one that notices a change, and of the one that
        counts as long as there is none.
    risen_sd_frac, fallen_sd_frac : float
        Standard deviations by which the shorter memory may lie above and below the longer one by
        chance. That more comes is believed sooner than that less does.
    length_memory_req : float
        Finished requests that the estimates of lengths remember.
    length_prior_req : float
        Requests that the lengths believed at the start count for.
    regime_memory_s : float
        Time constant of the verdict whether clients wait for their answers.
    miss_step_frac : float
        Step of a margin for each missed request. Outcomes come as many requests late as are
        running; larger steps would swing.
    miss_frac : float
        Part of the allowed misses at which the margins stand still.
    hand_off_spare_frac : float
        How far the ITL margin may fall below what the hand-off asks for: the closed form takes
        every iteration to run at its limit, while the ladder is coarse.
    beside_spare_frac : float
        How far the ITL margin of a colocated fleet may fall below its least where hardly any
        request misses: who fell behind is served faster until it has caught up, so that most
        of what runs is ahead of the limit.
    max_margin_frac : float
        Largest margin that misses may add.

    Raises
    ------
    ConfigError
        If a number is outside its range.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> from voltana_ctrl.control import CascadeController
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> careful = CascadeController(
    ...     fleet, Slo(ttft_s=0.6, itl_s=0.06), tuning=Tuning(margin_frac=(0.1, 0.1)))
    >>> decision, _ = careful.decide(Observation(state=FleetState.idle(2)), careful.init())
    >>> decision.belief.itl_margin_frac
    array([0.1, 0.1])
    """

    margin_frac: tuple[float, float] = (0.02, 0.035)
    late_frac: float = 1.5
    arrivals_ttft_frac: float = 25.0
    repay_tok: float = 10.0
    share_itl_frac: float = 60.0
    doubt_sd_frac: float = 3.0
    catch_up_s: float = 5.0
    prefill_pays_frac: float = 0.05
    wake_j: float = 100.0
    pace_news_frac: float = 0.02
    margin_news_frac: float = 0.003
    delay_news_s: float = 0.004
    probe_every_s: float = 10.0
    probe_s: float = 0.5
    free_frac: float = 0.002
    rate_memory_s: float = 10.0
    steady_memory_s: float = 120.0
    risen_sd_frac: float = 2.5
    fallen_sd_frac: float = 3.0
    length_memory_req: float = 2000.0
    length_prior_req: float = 20.0
    regime_memory_s: float = 20.0
    miss_step_frac: float = 0.004
    miss_frac: float = 0.8
    hand_off_spare_frac: float = 0.02
    beside_spare_frac: float = 0.05
    max_margin_frac: float = 0.5

    def __post_init__(self) -> None:
        if len(self.margin_frac) != 2 or not all(-1.0 < one < math.inf for one in self.margin_frac):
            raise ConfigError(
                f"Tuning.margin_frac: expected two numbers > -1, got {self.margin_frac}"
            )
        for one in fields(self):
            if one.name != "margin_frac":
                check = not_negative if one.name in _MAY_BE_ZERO else positive
                check(f"Tuning.{one.name}", getattr(self, one.name))
