"""What a policy is made of, and what it is told when it is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from voltana_ctrl import routing
from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.estimate.forecast import OwnForecast
from voltana_ctrl.ports import Governor, Router
from voltana_ctrl.types import Belief, Decision, FleetSpec, Load, PowerBudget, Slo, Steps

__all__ = ["Policy", "PolicyParts", "PolicySetup", "Trials", "balanced"]


class Trials(Protocol):
    """Trial runs on requests that are not judged, for policies that are chosen by them.

    Examples
    --------
    >>> class NoLoad:
    ...     load = None
    ...     def run(self, policy): return [{"energy_per_token_j": 1.0}]
    >>> trials: Trials = NoLoad()
    """

    @property
    def load(self) -> Load:
        """Mean load of the trials' requests."""
        ...

    def run(self, policy: Policy) -> Sequence[Mapping[str, Any]]:
        """Figures of runs of `policy`, one per seed, named as in the JSON of ``compare``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySetup:
    """What a policy may know of the run besides fleet and SLO.

    Parameters
    ----------
    tick_s : float
        Time between two decisions.
    power_budget : PowerBudget, optional
        What the fleet may draw. Policies that know budgets honour it, the others do not.
    delay_s : float
        Time from asking for a clock until it runs, as measured on the machine.
    governed : bool
        Whether something runs before every iteration of an engine; without, policies that can
        choose clocks by themselves bring no governors.
    call_s : float
        How long one call that sets a clock takes; calls of one node follow one another.
    measured_delay_s : callable
        Delays that were measured since, by the id of the instance.
    price, co2 : Steps, optional
        What energy costs per kWh, and grams of CO2 per kWh, known ahead.
    learnt : Belief, optional
        What an earlier run of the same fleet has learnt; policies that learn begin with it.
    forecast : callable, optional
        The host's own forecast of arrivals, see :class:`voltana_ctrl.estimate.Forecaster`.
    beside : bool
        Whether plans are made in a thread beside the ticks, where a fleet runs; in simulation
        they are not, so that runs are the same every time.
    spare : float
        How many active instances of each phase may be lost, see
        :class:`voltana_ctrl.control.TargetOptimiser`.
    trials : Trials, optional
        Runs to choose by, where there can be any.

    Raises
    ------
    ConfigError
        If the period is not positive or the delay negative.

    Examples
    --------
    >>> from voltana_ctrl import PowerBudget
    >>> setup = PolicySetup(power_budget=PowerBudget.parse("0:1200,60:840"))
    >>> setup.limit_w(59.0), setup.limit_w(59.9), PolicySetup().limit_w(0.0)
    (1200.0, 840.0, inf)
    """

    tick_s: float = 0.1
    power_budget: PowerBudget | None = None
    delay_s: float = 0.025
    governed: bool = True
    call_s: float = 0.005
    measured_delay_s: Callable[[], Mapping[str, float]] = dict
    price: Steps | None = None
    co2: Steps | None = None
    learnt: Belief | None = None
    forecast: OwnForecast | None = None
    beside: bool = False
    spare: float = 0.0
    trials: Trials | None = None

    def __post_init__(self) -> None:
        positive("PolicySetup.tick_s", self.tick_s)
        not_negative("PolicySetup.delay_s", self.delay_s)
        not_negative("PolicySetup.call_s", self.call_s)

    def limit_w(self, t_s: float) -> float:
        """Power that a decision made now must obey until the next one has taken effect.

        The least of the budget, as far as it has been announced, up to 100 ms past the next tick;
        infinite without a budget.

        Parameters
        ----------
        t_s : float
            Time of the decision.

        Returns
        -------
        float
            Watts.
        """
        if self.power_budget is None:
            return float("inf")
        return self.power_budget.least_w(t_s, t_s + self.tick_s + 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyParts:
    """A policy put together for one fleet.

    Parameters
    ----------
    controller : object with init/decide, optional
        Asked every tick; without one the first decision stands.
    first : Decision, optional
        Applied at the start; highest clocks if left out.
    governors : sequence of Governor, optional
        One per instance.
    prefill_router, decode_router : Router, optional
        The shares of the decision if left out.
    view_age_s : float
        How old the state is that compiled routers see.
    decode_at_arrival : bool
        Whether the decode instance is picked when the request arrives.
    fleet : FleetSpec, optional
        The same machines in other roles, where the policy arranges them anew.
    alternates : bool
        Whether a colocated instance prefills and decodes in turn, never both in one iteration.
    choice : str, optional
        What was chosen by trial, in words.

    Examples
    --------
    >>> PolicyParts().view_age_s
    0.0
    """

    controller: Any = None
    first: Decision | None = None
    governors: Sequence[Governor] | None = None
    prefill_router: Router | None = None
    decode_router: Router | None = None
    view_age_s: float = 0.0
    decode_at_arrival: bool = False
    fleet: FleetSpec | None = None
    alternates: bool = False
    choice: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy by name.

    Parameters
    ----------
    name : str
        As on the command line.
    summary : str
        What it does, in one line.
    source : str
        Where its rules come from.
    build : callable (fleet, slo, setup) -> PolicyParts
        Puts it together.
    knows_budget : bool
        Whether it honours a power budget.
    searched : bool
        Whether it is chosen by trial runs, see :class:`Trials`.

    Examples
    --------
    >>> from voltana_ctrl.policies import find_policy
    >>> find_policy("static-max").name
    'static-max'
    """

    name: str
    summary: str
    source: str
    build: Callable[[FleetSpec, Slo, PolicySetup], PolicyParts]
    knows_budget: bool = False
    searched: bool = False


def balanced(
    fleet: FleetSpec, governors: Sequence[Governor], controller: Any = None
) -> PolicyParts:
    """Governors free over the whole range, behind textbook routers.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    governors : sequence of Governor
        One per instance.
    controller : object with init/decide, optional
        Asked every tick.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> balanced(fleet, []).first.freq_mhz
    array([210., 210.])
    """
    prefill = routing.shortest_router if fleet.colocated else routing.least_queue_router
    return PolicyParts(
        controller=controller,
        first=Decision.highest(fleet, floor_mhz=fleet.min_mhz),
        governors=governors,
        prefill_router=prefill(fleet, "prefill"),
        decode_router=routing.shortest_router(fleet, "decode"),
    )
