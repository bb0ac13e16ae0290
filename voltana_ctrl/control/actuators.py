"""Clock lock or another actuator: completes the decisions of any controller from measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.errors import ShapeError
from voltana_ctrl.laws import ActuatorTable, compare_actuators
from voltana_ctrl.ports import controller_extras
from voltana_ctrl.types import (
    ActuatorSetting,
    Decision,
    FleetState,
    InstanceSpec,
    LimitRanges,
    Observation,
    Status,
    limits_of,
)
from voltana_ctrl.types.ladder import row_up

__all__ = ["ActuatorChooser", "ActuatorMemory"]

#: Mean power this far above a cap: the GPU does not obey it.
_OVER_CAP_FRAC = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActuatorMemory:
    """What the chooser remembers between ticks.

    Parameters
    ----------
    inner : object
        Memory of the controller that it completes.
    chosen : ndarray of int, shape (n,)
        Number of the setting in force; -1 for the clock lock.
    since_s : ndarray, shape (n,)
        When it was chosen.
    mean_w : ndarray, shape (n,)
        Mean power since then, the latest weighing most.
    refused : ndarray of bool, shape (n,)
        Instances that did not obey a cap; nothing but clock locks for them.
    t_s : float
        Time of the last tick.
    """

    inner: Any
    chosen: I64
    since_s: F64
    mean_w: F64
    refused: Bool
    t_s: float = 0.0


class ActuatorChooser(Controller):
    """A controller whose clocks are replaced by what measurements show to cost less.

    For each instance the clock that `inner` asks for is compared with every setting of the
    profile's measured points (power cap, memory clock, CPU clock) at the loads around the one
    at hand. A setting is taken if at all of them it is no slower than that clock and draws
    less, each with `confidence_frac`. A tie, a load outside the measured ones, a setting
    that was not measured or that the machine cannot set: the clock lock stays. So it does where
    a power ceiling forbids the clock at which the setting was measured, and for an instance
    whose power stays above a cap that was set.

    Decisions pass unchanged, the very same object, where no profile has such points. Where
    governors choose clocks between floor and ceiling, the floor is what is compared: use it
    where the loop sets the clocks.

    Parameters
    ----------
    inner : Controller
        Chooses the clocks.
    ranges : LimitRanges, optional
        What the machine lets one set (`backend.limit_ranges`); everything by default.
    dwell_s : float
        Least time between two settings; the clock lock is returned to at once.
    confidence_frac, least_saving_frac : float
        See :func:`voltana_ctrl.laws.compare_actuators`.

    Raises
    ------
    ConfigError
        If `dwell_s` is not positive, or the confidence not between 0 and 1.
    ShapeError
        If `ranges` are of another fleet.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.control import StaticController
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> chooser = ActuatorChooser(StaticController(fleet, 1005))
    >>> decision, _ = chooser.decide(Observation(state=FleetState.idle(2)), chooser.init())
    >>> decision.freq_mhz, decision.limits
    (array([1005., 1005.]), None)
    """

    def __init__(
        self,
        inner: Controller,
        *,
        ranges: LimitRanges | None = None,
        dwell_s: float = 2.0,
        confidence_frac: float = 0.975,
        least_saving_frac: float = 0.01,
    ) -> None:
        super().__init__(inner.fleet, period_s=inner.period_s)
        positive("ActuatorChooser.dwell_s", dwell_s)
        if ranges is not None and len(ranges.mem_clocks_mhz) != len(self.fleet):
            raise ShapeError(
                f"ActuatorChooser.ranges: expected {len(self.fleet)} instances, got"
                f" {len(ranges.mem_clocks_mhz)}"
            )
        self.inner = inner
        self._inner_notes = controller_extras(inner).notes
        self.dwell_s = dwell_s
        self._choices = tuple(
            _Choice(one, i, ranges, confidence_frac, least_saving_frac)
            for i, one in enumerate(self.fleet.instances)
        )

    def init(self) -> ActuatorMemory:
        """Clock locks everywhere."""
        n = len(self.fleet)
        return ActuatorMemory(
            inner=self.inner.init(),
            chosen=np.full(n, -1),
            since_s=np.full(n, -np.inf),
            mean_w=np.zeros(n),
            refused=np.zeros(n, bool),
        )

    def notes(self, memory: ActuatorMemory) -> Mapping[str, float]:
        """What `inner` notes, and on how many instances another actuator is in force.

        Parameters
        ----------
        memory : ActuatorMemory
            What :meth:`decide` returned at the last tick.
        """
        others = float(np.count_nonzero(memory.chosen >= 0))
        return {**self._inner_notes(memory.inner), "other_actuators": others}

    def settings(self, memory: ActuatorMemory) -> tuple[ActuatorSetting | None, ...]:
        """Setting that is in force on each instance.

        Parameters
        ----------
        memory : ActuatorMemory
            What :meth:`decide` returned at the last tick.

        Returns
        -------
        tuple of ActuatorSetting or None, length n
            None where nothing but the clock lock that `inner` asks for is used. A setting may lock
            the clock, too, together with what else it sets.
        """
        return tuple(
            choice.table.settings[number] if number >= 0 else None
            for choice, number in zip(self._choices, memory.chosen, strict=True)
        )

    def _decide(
        self, observation: Observation, memory: ActuatorMemory
    ) -> tuple[Decision, ActuatorMemory]:
        decision, inner = self.inner.decide(observation, memory.inner)
        memory = replace(memory, inner=inner)
        if not any(choice.able for choice in self._choices):
            return decision, memory
        memory = self._watch(observation.state, memory)
        chosen = np.array(
            [self._choose(i, decision, observation.state, memory) for i in range(len(self.fleet))]
        )
        changed = chosen != memory.chosen
        memory = replace(
            memory,
            chosen=chosen,
            since_s=np.where(changed, observation.state.t_s, memory.since_s),
            mean_w=np.where(changed, 0.0, memory.mean_w),
        )
        settings = self.settings(memory)
        if not any(settings):
            return decision, memory
        freq_mhz = np.array(
            [
                clock if setting is None else setting.freq_mhz
                for clock, setting in zip(decision.freq_mhz, settings, strict=True)
            ]
        )
        return replace(decision, freq_mhz=freq_mhz, limits=limits_of(settings)), memory

    def _watch(self, state: FleetState, memory: ActuatorMemory) -> ActuatorMemory:
        """Power since the cap was set: a cap that is not obeyed is not used again."""
        weight = 1.0 - np.exp(-max(0.0, state.t_s - memory.t_s) / self.dwell_s)
        mean_w = memory.mean_w + weight * (state.power_w - memory.mean_w)
        cap_w = np.array(
            [
                np.inf if setting is None or setting.power_cap_w is None else setting.power_cap_w
                for setting in self.settings(memory)
            ]
        )
        settled = state.t_s - memory.since_s >= 3.0 * self.dwell_s
        over = settled & (mean_w > (1.0 + _OVER_CAP_FRAC) * cap_w)
        return replace(memory, mean_w=mean_w, refused=memory.refused | over, t_s=state.t_s)

    def _choose(self, i: int, decision: Decision, state: FleetState, memory: ActuatorMemory) -> int:
        choice = self._choices[i]
        # Limits of the controller's own are its business.
        if (
            not choice.able
            or memory.refused[i]
            or decision.status is not Status.OK
            or decision.limits is not None
        ):
            return -1
        saving_w = choice.saving_w(
            float(decision.freq_mhz[i]),
            float(decision.freq_max_mhz[i]),
            float(state.running_req[i]),
            float(state.kv_used_tok[i]),
        )
        best, held = choice.table.best(saving_w), int(memory.chosen[i])
        if best in (held, -1) or state.t_s - memory.since_s[i] >= self.dwell_s:
            return best
        return held if held >= 0 and np.all(saving_w[:, held] > 0.0) else -1


class _Choice:
    """What one instance may be set to."""

    table: ActuatorTable

    def __init__(
        self,
        instance: InstanceSpec,
        number: int,
        ranges: LimitRanges | None,
        confidence_frac: float,
        least_saving_frac: float,
    ) -> None:
        self.instance = instance
        self.table = compare_actuators(
            instance.profile,
            instance.clocks_mhz,
            confidence_frac=confidence_frac,
            least_saving_frac=least_saving_frac,
        )
        self._at_mhz = np.array([setting.freq_mhz for setting in self.table.settings])
        can = np.array(
            [
                setting.freq_mhz in instance.clocks_mhz
                and (ranges is None or ranges.allow(number, setting))
                for setting in self.table.settings
            ],
            bool,
        )
        self._saving_w = np.where(can[:, None], self.table.saving_w, -np.inf)
        #: Whether anything is ever taken.
        self.able = bool(np.isfinite(self._saving_w).any())

    def saving_w(
        self, freq_mhz: float, freq_max_mhz: float, running_req: float, kv_used_tok: float
    ) -> F64:
        """Savings at the measured loads around this one, shape (n_loads, n_settings)."""
        clocks_mhz = self.instance.clocks_mhz
        # The guard rounds up in the same way.
        clock = row_up(clocks_mhz, freq_mhz)
        loads = []
        role = self.instance.role
        if role.prefills:
            # Which prompts come is not known: a setting must be better for all that were measured.
            loads.append(self.table.of_phase("prefill"))
        if role.decodes:
            context_tok = kv_used_tok / max(1.0, running_req)
            loads.append(self.table.around("decode", running_req, context_tok))
        rows = [row for each in loads for row in each] if all(loads) else []
        allowed = self._at_mhz <= freq_max_mhz
        saving_w: F64 = np.where(allowed, self._saving_w[rows, :, clock], -np.inf)
        return saving_w
