"""A policy on a fleet that runs: its decisions, and governors where no engine hosts them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.control.base import CompiledGovernor, Controller
from voltana_ctrl.control.budget import UniformCeiling
from voltana_ctrl.engines.governors import governor_of_policy
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.estimate.forecast import OwnForecast
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.ports import Governor, believe_of, controller_extras
from voltana_ctrl.types import Belief, Decision, FleetSpec, Observation, PowerBudget, Slo

__all__ = ["PolicyController", "fleet_policy", "node_governors", "node_policy"]

#: Steps of a budget are announced so long before they begin.
_AHEAD_S = 3600.0


class PolicyController(Controller):
    """A policy whose governors run here, at every tick, unless an engine hosts them.

    Where no router sends requests as decided, an instance that the policy would park gets work all
    the same. Everybody then counts as active with equal shares, prices are 0, and such an instance
    gets a clock by its own queue and batch alone.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    inner : Controller, optional
        Controller of the policy, or a :class:`~voltana_ctrl.live.remote.RemoteController`.
    first : Decision, optional
        Decision that stands at every tick where there is no `inner`. If left out, clocks are the
        highest, or, with `governors` or `held`, any that the instance supports.
    governors : sequence of Governor, optional
        One per instance: each chooses its clock between the floor and the ceiling of the decision.
    parked : sequence of Governor, optional
        Who chooses the clock of an instance that the policy would park: one per instance. Without
        them `governors` do, and without those it runs at its ceiling.
    held : collection of str
        Ids of instances whose clock somebody else chooses between floor and ceiling, such as the
        governor inside the engine: their floors are left as they are.
    routed : callable
        Returns whether a router sends requests as decided, now.
    power_budget : PowerBudget, optional
        Budget whose steps of the next hour are announced as ceilings with every decision, for nodes
        that outlive this controller. `inner` keeps the budget itself.
    delay_s : float
        Seconds from asking for a clock until it runs, as measured here.
    period_s : float
        Seconds between decisions.

    Raises
    ------
    ConfigError
        If there are governors, and not as many as instances.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.control import StaticController
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = PolicyController(fleet, inner=StaticController(fleet, 1005))
    >>> seen = Observation(state=FleetState.idle(2))
    >>> controller.decide(seen, controller.init())[0].freq_mhz
    array([1005., 1005.])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        *,
        inner: Any = None,
        first: Decision | None = None,
        governors: Sequence[Governor] | None = None,
        parked: Sequence[Governor] | None = None,
        held: Collection[str] = (),
        routed: Callable[[], bool] = lambda: False,
        power_budget: PowerBudget | None = None,
        delay_s: float = 0.025,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        for name, those in (("governors", governors), ("parked", parked)):
            if those is not None and len(those) != len(fleet):
                raise ConfigError(
                    f"PolicyController.{name}: expected {len(fleet)}, one per instance, got"
                    f" {len(those)}"
                )
        self._inner = inner
        self._inner_notes = controller_extras(inner).notes
        # Governors are free over the whole range; without them the highest clock is the safe one.
        floor_mhz = fleet.max_mhz if governors is None and not held else fleet.min_mhz
        self._first = first or Decision.highest(fleet, floor_mhz=floor_mhz)
        self.governors, self.parked = governors, parked
        self._held = np.array([name in held for name in fleet.ids])
        self._routed, self._delay_s = routed, delay_s
        self._budget = power_budget
        self._ceiling = None if power_budget is None else UniformCeiling(fleet)
        self._everybody = Decision.highest(fleet)
        self._belief: Belief | None = None

    def init(self) -> Any:
        """Memory of `inner` before its first decision; None without one."""
        return None if self._inner is None else self._inner.init()

    def notes(self, memory: Any) -> Mapping[str, float]:
        """What the policy notes about its latest decision.

        Parameters
        ----------
        memory : object
            What the latest decision returned.

        Returns
        -------
        mapping of str to float
            Names and numbers; empty where `inner` notes nothing.
        """
        return dict(self._inner_notes(memory))

    def _decide(self, observation: Observation, memory: Any) -> tuple[Decision, Any]:
        state = observation.state
        if self._inner is None:
            decision = replace(self._first, t_s=state.t_s)
        else:
            decision, memory = self._inner.decide(observation, memory)
        decision = replace(decision, limits=None, announced=self._announced(decision, state.t_s))
        decision = replace(decision, freq_mhz=self._clocks(decision, observation))
        if not self._routed():
            everybody = self._everybody
            decision = replace(
                decision,
                active=everybody.active,
                route_frac=everybody.route_frac,
                # What one more request costs is of use to who sends it where the policy says.
                price_j_req=everybody.price_j_req,
            )
        return decision, memory

    def _clocks(self, decision: Decision, observation: Observation) -> F64:
        """Clocks of instances whose governors run here; floors of the others."""
        state, routed = observation.state, self._routed()
        belief, before, self._belief = decision.belief, self._belief, decision.belief
        freq_mhz, ceiling_mhz = np.array(decision.freq_mhz), decision.freq_max_mhz
        if not routed:
            # What the policy asks of a parked instance is for being woken by its router.
            freq_mhz = np.where(decision.active, freq_mhz, self.fleet.min_mhz)
        for i, active in enumerate(decision.active):
            if self._held[i]:
                continue
            asked = self.governors if active or self.parked is None else self.parked
            if asked is None:
                if not active and not routed:
                    freq_mhz[i] = ceiling_mhz[i]
                continue
            governor, told = asked[i], {}
            if isinstance(governor, CompiledGovernor):
                # Compiled governors tell time by themselves, unless told; a log has its own.
                told = {"t_s": state.t_s}
            believe = believe_of(governor)
            if belief is not None and belief is not before and believe is not None:
                # A queue that is seen at ticks alone may have begun a whole period ago.
                delay_s = self._delay_s + float(self.period_s)
                believe(replace(belief, delay_s=np.full(len(belief), delay_s)), i)
            clock_mhz = governor.step(
                float(state.running_req[i]), float(state.kv_used_tok[i]),
                float(state.queue_tok[i]), float(state.oldest_wait_s[i]),
                float(freq_mhz[i]), float(ceiling_mhz[i]), **told,
            )  # fmt: skip
            freq_mhz[i] = min(max(clock_mhz, freq_mhz[i]), ceiling_mhz[i])
        return freq_mhz

    def _announced(self, decision: Decision, t_s: float) -> tuple[tuple[float, F64], ...]:
        """Ceilings under the budget's next steps, whatever the load."""
        if self._budget is None or self._ceiling is None:
            return decision.announced
        return tuple(
            (from_s - t_s, self._ceiling.under(limit_w))
            for from_s, limit_w in self._budget.steps
            if 0.0 < from_s - t_s <= _AHEAD_S
        )


def node_governors(
    fleet: FleetSpec, slo: Slo, policy: str, *, delay_s: float = 0.025, period_s: float = 0.1
) -> list[CompiledGovernor] | None:
    """Governors of a policy, one per instance, for a node that asks them at every tick.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    slo : Slo
        Promises on TTFT and ITL.
    policy : str
        Policy whose governors they are.
    delay_s : float
        Seconds from asking for a clock until it runs.
    period_s : float
        Seconds between two ticks: a queue may go unseen for so long, which is added to the delay.

    Returns
    -------
    list of CompiledGovernor or None
        None where the policy has no governor that runs apart from it: its floors are then the
        clocks.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> len(node_governors(fleet, Slo(ttft_s=0.6, itl_s=0.06), "mpc"))
    2
    """
    made = [
        governor_of_policy(policy, one, slo, delay_s=delay_s + period_s) for one in fleet.instances
    ]
    return None if None in made else [one for one in made if one is not None]


def _parts(
    fleet: FleetSpec, slo: Slo, policy: str, period_s: float, power_budget: PowerBudget | None,
    delay_s: float, learnt: Belief | None,
    measured_delay_s: Callable[[], Mapping[str, float]] = dict, spare: float = 0.0,
    forecast: OwnForecast | None = None,
) -> Any:  # fmt: skip
    found = find_policy(policy)
    if found.name == "bound":
        raise ConfigError("policy bound: it is computed and controls nothing; choose another")
    if power_budget is not None and not found.knows_budget:
        raise ConfigError(
            f"policy {policy}: it knows no power budget; choose mpc, cascade or static-budget"
        )
    setup = PolicySetup(
        tick_s=period_s, power_budget=power_budget, delay_s=delay_s,
        measured_delay_s=measured_delay_s, learnt=learnt, spare=spare, forecast=forecast,
        beside=True,  # a tick waits for no solver
    )  # fmt: skip
    return found.build(fleet, slo, setup)


def node_policy(
    fleet: FleetSpec,
    slo: Slo,
    policy: str,
    *,
    period_s: float = 0.1,
    power_budget: PowerBudget | None = None,
    delay_s: float = 0.025,
    held: Collection[str] = (),
    routed: Callable[[], bool] = lambda: False,
    learnt: Belief | None = None,
    spare: float = 0.0,
    forecast: OwnForecast | None = None,
) -> PolicyController:
    """Controller of a policy for GPUs whose clocks are set from this process.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    slo : Slo
        Promises on TTFT and ITL.
    policy : str
        Name of a shipped policy, or of one's own, see :func:`voltana_ctrl.policies.find_policy`.
    period_s : float
        Seconds between decisions.
    power_budget : PowerBudget, optional
        What the fleet may draw, in watts over time.
    delay_s : float
        Seconds from asking for a clock until it runs, as measured.
    held : collection of str
        Ids of instances whose governor runs inside their engine.
    routed : callable
        Returns whether a router sends requests as decided, now.
    learnt : Belief, optional
        What an earlier run of the same fleet has learnt, see
        :class:`~voltana_ctrl.live.state.StateFile`.
    spare : float
        Room for the loss of instances, see :class:`voltana_ctrl.policies.PolicySetup`.
    forecast : callable, optional
        One's own forecast of arrivals, see :class:`voltana_ctrl.estimate.Forecaster`.

    Returns
    -------
    PolicyController
        For a :class:`~voltana_ctrl.ControlLoop` or an :class:`~voltana_ctrl.live.Agent`.

    Raises
    ------
    ConfigError
        If there is no such policy, it is ``bound``, which controls nothing, or it knows no budgets
        and one is given.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> node_policy(fleet, Slo(ttft_s=0.6, itl_s=0.06), "mpc").period_s
    Fraction(1, 10)
    """
    parts = _parts(
        fleet, slo, policy, period_s, power_budget, delay_s, learnt, spare=spare, forecast=forecast
    )
    governors = node_governors(fleet, slo, policy, delay_s=delay_s, period_s=period_s)
    return PolicyController(
        fleet,
        inner=parts.controller,
        first=parts.first,
        governors=parts.governors if governors is None else governors,
        parked=governors or node_governors(fleet, slo, "mpc", delay_s=delay_s, period_s=period_s),
        held=held,
        routed=routed,
        power_budget=power_budget,
        delay_s=delay_s,
        period_s=period_s,
    )


def fleet_policy(
    fleet: FleetSpec,
    slo: Slo,
    policy: str,
    *,
    period_s: float = 0.1,
    power_budget: PowerBudget | None = None,
    delay_s: float = 0.025,
    measured_delay_s: Callable[[], Mapping[str, float]] = dict,
    routed: Callable[[], bool] = lambda: False,
    learnt: Belief | None = None,
    spare: float = 0.0,
    forecast: OwnForecast | None = None,
) -> PolicyController:
    """Controller of a policy for nodes elsewhere, which host the governors or leave it to engines.

    Parameters
    ----------
    fleet, slo, policy, period_s, power_budget, delay_s, routed, learnt, spare, forecast
        See :func:`node_policy`.
    measured_delay_s : callable
        Returns the delays in seconds that nodes have measured, by the id of the instance.

    Returns
    -------
    PolicyController
        Its clocks are floors where the policy has governors: those choose between it and the
        ceiling.

    Raises
    ------
    ConfigError
        See :func:`node_policy`; and if the policy's governors cannot run apart from it.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> fleet_policy(fleet, Slo(ttft_s=0.6, itl_s=0.06), "voltanallm-adaptive")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: policy voltanallm-adaptive: its governors learn inside the...
    """
    parts = _parts(
        fleet,
        slo,
        policy,
        period_s,
        power_budget,
        delay_s,
        learnt,
        measured_delay_s,
        spare,
        forecast,
    )
    has_governors = node_governors(fleet, slo, policy) is not None
    if parts.governors is not None and not has_governors:
        raise ConfigError(
            f"policy {policy}: its governors learn inside the controller, and cannot run in other"
            " processes; choose another, or control one node with `agent` or `serve`"
        )
    return PolicyController(
        fleet,
        inner=parts.controller,
        first=parts.first,
        held=fleet.ids if has_governors else (),
        routed=routed,
        power_budget=power_budget,
        delay_s=delay_s,
        period_s=period_s,
    )
