"""VoltanaLLM's rules with tables that learn and margins that hold the promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, not_negative
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor
from voltana_ctrl.errors import ShapeError
from voltana_ctrl.estimate import (
    FleetTables,
    Learned,
    LengthEstimator,
    LengthState,
    OnlineLearner,
    RequestClasses,
    predict_prefill,
)
from voltana_ctrl.estimate.margin import MarginState, MarginTracker
from voltana_ctrl.types import Decision, FleetSpec, Observation, Slo

__all__ = ["AdaptiveController", "AdaptiveMemory"]

#: At most this part of the TTFT is kept for a prompt that arrives while another is served; it
#: is also what is kept before prompts are known.
_MOST_RESERVE_FRAC, _FIRST_RESERVE_FRAC = 0.75, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveMemory:
    """What the controller knows; replaced at every tick.

    Parameters
    ----------
    learned : Learned
        Coefficients of every instance.
    margins : MarginState
        Margins of TTFT and ITL.
    prompts : LengthState
        Prompt lengths seen.
    """

    learned: Learned
    margins: MarginState
    prompts: LengthState


class AdaptiveController(Controller):
    """EcoFreq whose tables are learned from iterations and whose margins track attainment.

    The clock is chosen before each iteration by `governors`, one per instance. Every tick the
    controller learns from the iterations and requests finished since the last one, and gives
    each governor new tables and targets: the SLO divided by one plus the margin of its phase,
    and by one plus a widening while the law of the instance is uncertain. Of the TTFT, a
    reserve is taken off first: a long prompt (the attainment quantile of those seen) that
    arrives just after a batch has started must still be served in time, at the highest clock
    and after the delay of setting it.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    believed : FleetSpec, optional
        Profiles to start from, instance by instance; the fleet's own by default.
    ladder_mhz : sequence of float, optional
        Clocks that governors choose from; every supported one if left out.
    learner : OnlineLearner, optional
        Settings of learning.
    tracker : MarginTracker, optional
        Settings of the margins. By default each metric may use a quarter of the allowed misses,
        so that both together hold the promise with half of it to spare.
    actuation_s : float
        Time from asking for a clock until it holds.
    learn : bool
        False keeps the tables and adapts the margins alone.
    period_s : float
        Time between decisions.

    Raises
    ------
    ShapeError
        If `believed` or `learner` are not of this fleet.
    ConfigError
        If `actuation_s` is negative.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = AdaptiveController(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> observation = Observation(state=FleetState.idle(2))
    >>> decision, memory = controller.decide(observation, controller.init())
    >>> decision.freq_max_mhz, memory.margins.raw_frac
    (array([1410., 1410.]), array([0.1, 0.1]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        believed: FleetSpec | None = None,
        ladder_mhz: Sequence[float] | None = None,
        learner: OnlineLearner | None = None,
        tracker: MarginTracker | None = None,
        actuation_s: float = 0.025,
        learn: bool = True,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        start = believed or fleet
        self.learner = learner or OnlineLearner(FleetTables.of(start))
        for name, length in (("believed", len(start)), ("learner", len(self.learner.prior))):
            if length != len(fleet):
                raise ShapeError(
                    f"AdaptiveController.{name}: expected {len(fleet)} instances, got {length}"
                )
        not_negative("AdaptiveController.actuation_s", actuation_s)
        self.slo = slo
        self.actuation_s = actuation_s
        # The estimator of output lengths serves for prompts: one class, told below.
        self._prompts = LengthEstimator(classes=RequestClasses(prompt_edges_tok=()))
        quarter = 1.0 - (1.0 - slo.attainment) / 4.0
        self.tracker = tracker or MarginTracker(slo=slo, set_point_frac=quarter)
        self.learn = learn
        self.governors = tuple(
            EcoFreqGovernor(one, slo, other.profile, ladder_mhz=ladder_mhz)
            for one, other in zip(fleet.instances, start.instances, strict=True)
        )

    def init(self) -> AdaptiveMemory:
        """Prior tables, margins at their start; the governors are told so."""
        memory = AdaptiveMemory(
            learned=self.learner.init(),
            margins=self.tracker.init(),
            prompts=self._prompts.init(),
        )
        self._tell(memory)
        return memory

    def _decide(
        self, observation: Observation, memory: AdaptiveMemory
    ) -> tuple[Decision, AdaptiveMemory]:
        learned = memory.learned
        if self.learn:
            learned = self.learner.update(learned, observation.iterations)
        finished = observation.finished
        after = AdaptiveMemory(
            learned=learned,
            margins=self.tracker.update(memory.margins, finished),
            prompts=self._prompts.update(
                memory.prompts, replace(finished, output_tok=finished.prompt_tok)
            ),
        )
        self._tell(after)
        decision = Decision.highest(
            self.fleet, t_s=observation.state.t_s, floor_mhz=self.fleet.min_mhz
        )
        return decision, after

    def notes(self, memory: AdaptiveMemory) -> dict[str, float]:
        """What observers of the loop may want to see: margins on TTFT and ITL.

        Parameters
        ----------
        memory : AdaptiveMemory
            Memory after the last tick.
        """
        ttft, itl = self.tracker.applied_frac(memory.margins)
        return {"margin_ttft_frac": float(ttft), "margin_itl_frac": float(itl)}

    def margin_frac(self, memory: AdaptiveMemory) -> F64:
        """Margins in force per instance, of TTFT and ITL, shape (n, 2)."""
        applied = np.broadcast_to(self.tracker.applied_frac(memory.margins), (len(self.fleet), 2))
        if not self.learn:
            return applied.copy()
        widened = self.learner.widening_frac(memory.learned)
        return (1.0 + applied) * (1.0 + widened) - 1.0

    def reserve_s(self, memory: AdaptiveMemory, tables: FleetTables) -> F64:
        """Part of the TTFT kept for a long prompt that has to wait, per instance, shape (n,)."""
        prompt_tok = self._prompts.quantile_tok(memory.prompts, 0, self.slo.attainment)
        if np.isnan(prompt_tok):
            return np.full(len(self.fleet), _FIRST_RESERVE_FRAC * self.slo.ttft_s)
        every = np.arange(len(self.fleet))
        served_s = predict_prefill(tables, every, self.fleet.max_mhz, prompt_tok).time_s
        reserve: F64 = np.minimum(self.actuation_s + served_s, _MOST_RESERVE_FRAC * self.slo.ttft_s)
        return reserve

    def _tell(self, memory: AdaptiveMemory) -> None:
        """Give every governor its tables and targets; new arrays, so that a plant sees them."""
        prior = self.learner.prior
        tables = self.learner.tables(memory.learned) if self.learn else prior
        target_s = np.full((len(self.fleet), 2), [self.slo.ttft_s, self.slo.itl_s])
        target_s[:, 0] -= self.reserve_s(memory, tables)
        target_s /= 1.0 + self.margin_frac(memory)
        for i, governor in enumerate(self.governors):
            if tables is not prior:
                governor.rows = tables.rows(i).copy()
                governor.padded = tables.padded_req[i, : len(governor.padded)].copy()
            governor.params = np.concatenate([target_s[i], governor.params[2:]])
