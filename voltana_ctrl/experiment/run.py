"""One run: a policy on a load, on the simulated fleet."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.clock import SimClock
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.estimate.forecast import OwnForecast
from voltana_ctrl.guard import Guard
from voltana_ctrl.laws import length_moments
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.policies import Policy, PolicyParts, PolicySetup, find_policy
from voltana_ctrl.sim.arrivals import ArrivalProcess
from voltana_ctrl.sim.bill import Bill
from voltana_ctrl.sim.bound import fluid_bound_w, fluid_load
from voltana_ctrl.sim.catalog import describe
from voltana_ctrl.sim.detail import DetailSampler
from voltana_ctrl.sim.faults import Fault, FaultSchedule
from voltana_ctrl.sim.metrics import at_the_wall, run_figures, snapshot, unfinished
from voltana_ctrl.sim.power import PowerMeter
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload
from voltana_ctrl.types import Decision, FleetSpec, Load, PowerBudget, Slo, Steps

if TYPE_CHECKING:
    from voltana_ctrl.backends import SimBackend

__all__ = ["BELIEF_DELAY_S", "GRACE_S", "TRIAL_SEEDS", "Run"]

#: From asking for a clock until it runs, as policies believe before they have seen any.
BELIEF_DELAY_S = 0.025

#: A request that is unfinished this long after the window counts as missed, or later where the
#: longest answer takes longer, see :meth:`Run.grace_s`.
GRACE_S = 60.0

#: Seeds of the requests of trial runs, which no comparison judges.
TRIAL_SEEDS = (1_000_003, 1_000_004, 1_000_005)

# Where the windows of seeds begin in a trace: this irrational share, taken again and again, spreads
# any number of them evenly.
_SHIFT_FRAC = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy on one load with one seed; what a worker gets.

    Parameters
    ----------
    policy : str or Policy
        Name, see :func:`voltana_ctrl.policies.find_policy`, or one put together by hand.
    fleet : FleetSpec
        The fleet.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    workload : str or Workload
        Name of a generator, or a trace.
    rate_req_s : float, optional
        Rate to generate or rescale to; the trace's own if left out.
    rate_steps : RateSteps, optional
        Rates over time, from the start of the warm-up on, in place of one.
    concurrency : int, optional
        Closed loop with this many clients instead.
    seed : int
        Seed of workload, routing and noise. Of a trace that is longer than the run, seed 0 takes
        the beginning, and each other one a window of its own.
    duration_s, warmup_s, tick_s : float
        Window, time before it, control period.
    settings : PlantSettings
        Actuation and noise.
    power_budget : PowerBudget, optional
        What the fleet may draw, from the start of the warm-up on.
    arrivals : ArrivalProcess, optional
        When requests of a generator arrive; as it has it if left out.
    faults : tuple of Fault
        What goes wrong, in time from the start of the warm-up.
    detail : bool
        Keep a :class:`~voltana_ctrl.sim.detail.RunDetail` under the key ``detail``.
    defer : tuple of (which, deadline_s), optional
        Requests that may wait, as :meth:`voltana_ctrl.sim.workload.Workload.deferred` takes them.
        All work of the window is due within it, or a grace of 60 s after it came.
    price, co2 : Steps, optional
        What energy costs per kWh, and grams of CO2 per kWh, from the start of the warm-up on.
    believed : FleetSpec, optional
        What the policy takes the fleet for, where its profiles are wrong.
    belief_delay_s : float
        Time from asking for a clock until it runs, as the policy believes before it has seen any;
        what the plant takes stands in `settings`.
    spare : float
        How many active instances of each phase the policy should be able to lose.
    forecast : callable, optional
        A forecast of the arrivals that the policy is given, see
        :func:`voltana_ctrl.estimate.read_forecast`; in time from the start of the warm-up.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> slo = Slo(ttft_s=0.6, itl_s=0.06)
    >>> run = Run(policy="static-max", fleet=fleet, slo=slo, workload="sharegpt",
    ...           rate_req_s=4.0, duration_s=20.0, warmup_s=2.0)
    >>> figures = run.simulate()
    >>> figures["requests_completed"] == figures["requests_arrived"]
    True
    """

    policy: str | Policy
    fleet: FleetSpec
    slo: Slo
    workload: str | Workload
    rate_req_s: float | None = None
    rate_steps: RateSteps | None = None
    concurrency: int | None = None
    seed: int = 0
    duration_s: float = 120.0
    warmup_s: float = 30.0
    tick_s: float = 0.1
    settings: PlantSettings = field(default_factory=PlantSettings)
    power_budget: PowerBudget | None = None
    arrivals: ArrivalProcess | None = None
    faults: tuple[Fault, ...] = ()
    detail: bool = False
    defer: tuple[float | str, float] | None = None
    price: Steps | None = None
    co2: Steps | None = None
    believed: FleetSpec | None = None
    belief_delay_s: float = BELIEF_DELAY_S
    spare: float = 0.0
    forecast: OwnForecast | None = None

    def simulate(self) -> dict[str, Any]:
        """Run it; figures named as in the JSON of ``compare``."""
        workload, trace_from_s = self._requests()
        figures: dict[str, Any] = dict.fromkeys(_RUN_KEYS)
        figures.update(
            policy=self.policy if isinstance(self.policy, str) else self.policy.name,
            rate_req_s=self._load_req_s(workload),
            seed=self.seed,
            window_s=self.duration_s,
            grace_s=self.grace_s(workload),
            trace_from_s=trace_from_s,
        )
        if self.policy == "bound":
            figures.update(self._bound(workload))
        else:
            begin_s = time.perf_counter()
            figures.update(self._simulate(workload))
            figures["sim_wall_s"] = time.perf_counter() - begin_s
        return figures | at_the_wall(figures, self.fleet.rest_of_server_w)

    def _load_req_s(self, workload: Workload) -> float | None:
        """Load that the run stands for, the same for all seeds; None of a closed loop."""
        if self.concurrency is not None:
            return None
        if self.rate_req_s is not None:
            return self.rate_req_s
        if self.rate_steps is not None:
            return self.rate_steps.mean_req_s(*self._window_s)
        if isinstance(self.workload, Workload):
            # A trace at its own pace: windows of one trace are one load.
            return _number(self.workload.rate_req_s)
        return describe(self.workload).rate_req_s or _number(workload.rate_req_s)

    @property
    def _window_s(self) -> tuple[float, float]:
        """Edges of the window that counts."""
        return self.warmup_s, self.warmup_s + self.duration_s

    def grace_s(self, workload: Workload) -> float:
        """Time after the window by which every request that keeps both promises is done.

        A minute at least; more where the longest answer of a request that arrives in the window
        may take longer, one ITL per token.

        Parameters
        ----------
        workload : Workload
            The requests.

        Returns
        -------
        float
            Seconds.
        """
        output_tok = workload.output_tok
        if workload.concurrency is None:
            first, last = np.searchsorted(workload.arrival_s, self._window_s)
            output_tok = output_tok[first:last]
        longest_tok = int(output_tok.max()) if output_tok.size else 1
        return max(GRACE_S, self.slo.ttft_s + (longest_tok - 1) * self.slo.itl_s)

    def _requests(self) -> tuple[Workload, float | None]:
        """Requests of the run, and where they begin in a trace."""
        requests, from_s = self._drawn(GRACE_S)
        grace_s = self.grace_s(requests)
        if grace_s > GRACE_S:
            # Load goes on until the last judged request may be done; what came before is the same.
            requests, from_s = self._drawn(grace_s)
        if self.defer is not None:
            requests = requests.deferred(*self.defer, seed=self.seed)
        if np.isfinite(requests.patience_s).any():
            requests = requests.due_within(self._window_s[1], grace_s)
        return requests, from_s

    def _drawn(self, grace_s: float) -> tuple[Workload, float | None]:
        total_s = self.warmup_s + self.duration_s + grace_s
        if isinstance(self.workload, str):
            if self.concurrency is not None:
                # More than can be served: nobody answers a request in under 0.2 s for long.
                requests = self.concurrency * (2 + math.ceil(total_s / 0.2))
                requests = min(requests, 2_000_000)
                drawn = make_closed_loop(self.workload, self.concurrency, requests, self.seed)
            else:
                drawn = make_workload(
                    self.workload,
                    self.rate_req_s,
                    total_s,
                    self.seed,
                    arrivals=self.arrivals,
                    rate_steps=self.rate_steps,
                )
            return drawn, None
        trace = self.workload
        if self.concurrency is not None:
            return trace.closed_loop(self.concurrency), None
        if self.rate_steps is not None:
            trace = trace.stepped(self.rate_steps)
        elif self.rate_req_s is not None:
            trace = trace.rescaled(self.rate_req_s)
        needed_s = self.warmup_s + self.duration_s
        if trace.duration_s < needed_s:
            raise ConfigError(
                f"workload {trace.name}: expected at least warmup + duration = {needed_s:g} s,"
                f" got {trace.duration_s:.1f} s; shorten --duration to at most"
                f" {max(0, math.floor(trace.duration_s - self.warmup_s))}"
            )
        # Steps of a load stand at their times, so that the trace cannot be moved under them.
        spare_s = 0.0 if self.rate_steps is not None else max(0.0, trace.duration_s - total_s)
        from_s = spare_s * (self.seed * _SHIFT_FRAC % 1.0)
        length_s = min(total_s, trace.duration_s - from_s)
        return trace.window(length_s, start_s=from_s), from_s

    def _bound(self, workload: Workload) -> dict[str, Any]:
        if workload.concurrency is not None:
            return {"regime": "closed_loop"}
        if np.isfinite(workload.patience_s).any():
            return {"regime": "open_loop"}  # it knows of no work that may wait
        power_w = fluid_bound_w(self.fleet, fluid_load(workload, *self._window_s), self.slo)
        power_w -= FaultSchedule(self.fleet, self.faults).saved_w(*self._window_s)
        if not math.isfinite(power_w):
            return {"regime": "open_loop"}
        return {
            "energy_j": power_w * self.duration_s,
            "mean_power_w": power_w,
            "regime": "open_loop",
        }

    def _built(self, workload: Workload) -> tuple[PolicyParts, SimBackend]:
        """The policy, and the plant that it is to run, with its first decision applied."""
        from voltana_ctrl.backends.sim import SimBackend  # loads Numba

        setup = PolicySetup(
            tick_s=self.tick_s,
            power_budget=self.power_budget,
            delay_s=self.belief_delay_s,
            spare=self.spare,
            forecast=self.forecast,
            call_s=self.settings.actuation_s,
            trials=_Trials(self),
            price=self.price,
            co2=self.co2,
        )
        policy = find_policy(self.policy) if isinstance(self.policy, str) else self.policy
        parts: PolicyParts = policy.build(self.believed or self.fleet, self.slo, setup)
        # Machines that the policy arranges anew are what they are, not what is believed of them.
        fleet = self.fleet
        if parts.fleet is not None:
            fleet = fleet.in_roles([one.role for one in parts.fleet.instances])
        believed = parts.fleet or self.believed or fleet
        backend = SimBackend(
            fleet,
            workload=workload,
            seed=self.seed,
            settings=_with_policy(self.settings, parts, len(fleet)),
            governors=parts.governors,
            prefill_router=parts.prefill_router,
            decode_router=parts.decode_router,
            believed=believed,
            judged_s=self._window_s,
            faults=self.faults,
        )
        backend.plant.apply(parts.first or Decision.highest(fleet))
        return parts, backend

    def _simulate(self, workload: Workload) -> dict[str, Any]:
        parts, backend = self._built(workload)
        plant, (from_s, until_s) = backend.plant, self._window_s
        # Each stops on its way what stands behind it: loop or sampler, meter, plant.
        budget = self.power_budget
        meter = None if budget is None else PowerMeter(plant, budget, from_s, until_s)
        sampler = DetailSampler(plant, from_s, until_s, meter) if self.detail else None
        times_s: list[float] = []
        loop = None
        if parts.controller is not None:
            loop = ControlLoop(
                backend,
                parts.controller,
                Guard(backend.spec),
                clock=SimClock(meter or plant),
                observers=[_Stopwatch(times_s), *([sampler] if sampler else [])],
            )

        go = loop.run if loop is not None else (sampler or meter or plant).advance
        go(from_s)
        before = snapshot(plant)
        _, carried_in_tok = unfinished(plant)
        bill = Bill(plant, self.price, self.co2, from_s, until_s)
        for edge_s in bill.edges_s[1:]:
            go(edge_s)
            bill.take()
        if sampler is not None:
            sampler.take()
        after = snapshot(plant)
        past_req, past_tok = unfinished(plant)
        end_s = until_s + self.grace_s(workload)
        if loop is None:
            plant.advance(end_s, stop_when_judged=True)
        while plant.judged[1] > 0 and plant.now_s < end_s:
            go(min(plant.now_s + 1.0, end_s))
        kept = {} if sampler is None else {"detail": sampler.detail()}
        return kept | {
            **run_figures(plant, before, after, self.duration_s, self.slo),
            "layout": backend.spec.layout,
            "choice": parts.choice,
            "requests_past_window": past_req,
            "tokens_past_window": past_tok,
            "tokens_carried_in": carried_in_tok,
            **bill.figures(),
            "over_budget_frac": None if meter is None else meter.over_budget_frac(),
            "guard_interventions": 0 if loop is None else loop.interventions,
            "decide_p50_s": float(np.quantile(times_s, 0.5)) if times_s else None,
            "decide_p99_s": float(np.quantile(times_s, 0.99)) if times_s else None,
        }


class _Trials:
    """Runs on requests of other seeds, which are not judged; on the fleet as it is."""

    def __init__(self, run: Run) -> None:
        self._run = replace(run, seed=TRIAL_SEEDS[0], detail=False)

    @property
    def load(self) -> Load:
        workload, _ = self._run._requests()
        if workload.concurrency is not None:
            raise ConfigError(
                f"policy {self._run.policy}: is chosen for a load, which a closed loop has not; run"
                " it at a rate"
            )
        first, last = np.searchsorted(workload.arrival_s, self._run._window_s)
        lengths = length_moments(workload.prompt_tok[first:last], workload.output_tok[first:last])
        return Load(arrival_req_s=(last - first) / self._run.duration_s, lengths=lengths)

    def run(self, policy: Policy) -> list[dict[str, Any]]:
        return [replace(self._run, policy=policy, seed=seed).simulate() for seed in TRIAL_SEEDS]


class _Stopwatch:
    """Observer that keeps how long each decision took."""

    def __init__(self, times_s: list[float]) -> None:
        self._times_s = times_s

    def on_tick(self, record: Any) -> None:
        self._times_s.append(record.decide_s)


_RUN_KEYS = (
    "policy", "layout", "choice", "rate_req_s", "seed", "window_s", "grace_s", "trace_from_s",
    "energy_j", "mean_power_w",
    "energy_prefill_j", "energy_decode_j", "energy_idle_j", "energy_transfer_j",
    "energy_per_token_j", "saving_token_frac", "wall_power_w", "wall_per_token_j",
    "saving_wall_frac", "bound_gap_closed", "ttft_attainment",
    "itl_attainment", "slo_attainment", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s",
    "residence_mean_s", "requests_arrived", "requests_completed", "requests_in_flight",
    "requests_dropped", "requests_past_window", "deferred_arrived", "deferred_completed",
    "deferred_in_flight", "deferred_dropped", "deadline_missed", "cost", "co2_g", "role_changes",
    "preemptions", "retries", "tokens_out", "tokens_lost", "tokens_carried_in",
    "tokens_past_window", "mean_batch",
    "mean_freq_prefill_mhz", "mean_freq_decode_mhz", "clock_changes", "wakes",
    "active_decode_mean", "over_budget_frac", "guard_interventions", "decide_p50_s",
    "decide_p99_s", "iterations", "sim_wall_s", "regime",
)  # fmt: skip


def _with_policy(settings: PlantSettings, parts: PolicyParts, n: int) -> PlantSettings:
    """Settings of the plant that belong to the policy: what its routers see, what it reads."""
    # Enough for the iterations between two ticks, from which controllers learn.
    log = 0 if parts.controller is None else max(4096, 64 * n)
    return replace(
        settings,
        view_age_s=parts.view_age_s,
        alternates=parts.alternates,
        decode_at_arrival=parts.decode_at_arrival,
        log_iterations=max(settings.log_iterations, log),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
