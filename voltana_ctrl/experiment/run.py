"""One run: a policy on a load, on the simulated fleet."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from voltana_ctrl.clock import SimClock
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.guard import Guard
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.policies import Policy, PolicyParts, PolicySetup, find_policy
from voltana_ctrl.sim.arrivals import ArrivalProcess
from voltana_ctrl.sim.bound import fluid_bound_w, fluid_load
from voltana_ctrl.sim.detail import DetailSampler
from voltana_ctrl.sim.faults import Fault, FaultSchedule
from voltana_ctrl.sim.metrics import run_figures, snapshot
from voltana_ctrl.sim.power import PowerMeter
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload
from voltana_ctrl.types import Decision, FleetSpec, PowerBudget, Slo

__all__ = ["GRACE_S", "Run"]

#: A request that is unfinished this long after the window counts as missed.
GRACE_S = 60.0


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
        The promises.
    workload : str or Workload
        Name of a generator, or a trace.
    rate_req_s : float, optional
        Rate to generate or rescale to; the trace's own if left out.
    concurrency : int, optional
        Closed loop with this many clients instead.
    seed : int
        Of workload, routing and noise.
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
    believed : FleetSpec, optional
        What the policy takes the fleet for, where its profiles are wrong.
    belief_delay_s : float
        From asking for a clock until it runs, as the policy believes before it has seen any;
        what the plant takes stands in `settings`.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
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
    believed: FleetSpec | None = None
    belief_delay_s: float = 0.025

    def simulate(self) -> dict[str, Any]:
        """Run it; figures named as in the JSON of ``compare``."""
        workload = self._requests()
        figures: dict[str, Any] = dict.fromkeys(_RUN_KEYS)
        figures.update(
            policy=self.policy if isinstance(self.policy, str) else self.policy.name,
            rate_req_s=None if self.concurrency else _number(workload.rate_req_s),
            seed=self.seed,
            window_s=self.duration_s,
        )
        if self.rate_req_s is not None:
            figures["rate_req_s"] = self.rate_req_s
        if self.policy == "bound":
            return figures | self._bound(workload)
        begin_s = time.perf_counter()
        figures.update(self._simulate(workload))
        figures["sim_wall_s"] = time.perf_counter() - begin_s
        return figures

    def _requests(self) -> Workload:
        total_s = self.warmup_s + self.duration_s + GRACE_S
        if isinstance(self.workload, str):
            if self.concurrency is not None:
                # More than can be served: nobody answers a request in under 0.2 s for long.
                requests = self.concurrency * (2 + math.ceil(total_s / 0.2))
                requests = min(requests, 2_000_000)
                return make_closed_loop(self.workload, self.concurrency, requests, self.seed)
            return make_workload(
                self.workload, self.rate_req_s, total_s, self.seed, arrivals=self.arrivals
            )
        trace = self.workload
        if self.concurrency is not None:
            return trace.closed_loop(self.concurrency)
        if self.rate_req_s is not None:
            trace = trace.rescaled(self.rate_req_s)
        needed_s = self.warmup_s + self.duration_s
        if trace.duration_s < needed_s:
            raise ConfigError(
                f"workload {trace.name}: expected at least warmup + duration = {needed_s:g} s,"
                f" got {trace.duration_s:.1f} s; shorten --duration to at most"
                f" {max(0.0, trace.duration_s - self.warmup_s):.0f}"
            )
        return trace.window(min(total_s, trace.duration_s))

    def _bound(self, workload: Workload) -> dict[str, Any]:
        if workload.concurrency is not None:
            return {"regime": "closed_loop"}
        window_s = self.warmup_s, self.warmup_s + self.duration_s
        power_w = fluid_bound_w(self.fleet, fluid_load(workload, *window_s), self.slo)
        power_w -= FaultSchedule(self.fleet, self.faults).saved_w(*window_s)
        if not math.isfinite(power_w):
            return {"regime": "open_loop"}
        return {
            "energy_j": power_w * self.duration_s,
            "mean_power_w": power_w,
            "regime": "open_loop",
        }

    def _simulate(self, workload: Workload) -> dict[str, Any]:
        from voltana_ctrl.backends.sim import SimBackend  # loads Numba

        setup = PolicySetup(
            tick_s=self.tick_s,
            power_budget=self.power_budget,
            delay_s=self.belief_delay_s,
            call_s=self.settings.actuation_s,
        )
        believed = self.believed or self.fleet
        policy = find_policy(self.policy) if isinstance(self.policy, str) else self.policy
        parts: PolicyParts = policy.build(believed, self.slo, setup)
        from_s, until_s = self.warmup_s, self.warmup_s + self.duration_s
        backend = SimBackend(
            self.fleet,
            workload=workload,
            seed=self.seed,
            settings=_with_policy(self.settings, parts, len(self.fleet)),
            governors=parts.governors,
            prefill_router=parts.prefill_router,
            decode_router=parts.decode_router,
            believed=believed,
            judged_s=(from_s, until_s),
            faults=self.faults,
        )
        plant = backend.plant
        plant.apply(parts.first or Decision.highest(self.fleet))
        times_s: list[float] = []
        sampler = DetailSampler(plant, from_s, until_s) if self.detail else None
        budget = self.power_budget
        meter = None if budget is None else PowerMeter(plant, budget, from_s, until_s)
        loop = None
        if parts.controller is not None:
            loop = ControlLoop(
                backend,
                parts.controller,
                Guard(self.fleet),
                clock=SimClock(meter or plant),
                observers=[_Stopwatch(times_s), *([sampler] if sampler else [])],
            )

        def go(to_s: float, *, stop_when_judged: bool = False) -> None:
            if loop is None:
                plant.advance(to_s, stop_when_judged=stop_when_judged)
                return
            loop.run(to_s)

        go(from_s)
        before = snapshot(plant)
        if meter is not None and loop is None:
            meter.advance(until_s, sampler)
        elif sampler is not None and loop is None:
            sampler.advance(until_s)
        go(until_s)
        if sampler is not None:
            sampler.take()
        after = snapshot(plant)
        end_s = until_s + GRACE_S
        if loop is None:
            go(end_s, stop_when_judged=True)
        while plant.judged[1] > 0 and plant.now_s < end_s:
            go(min(plant.now_s + 1.0, end_s))
        kept = {} if sampler is None else {"detail": sampler.detail()}
        return kept | {
            **run_figures(plant, before, after, self.duration_s, self.slo),
            "over_budget_frac": None if meter is None else meter.over_budget_frac(),
            "guard_interventions": 0 if loop is None else loop.interventions,
            "decide_p50_s": float(np.quantile(times_s, 0.5)) if times_s else None,
            "decide_p99_s": float(np.quantile(times_s, 0.99)) if times_s else None,
        }


class _Stopwatch:
    """Observer that keeps how long each decision took."""

    def __init__(self, times_s: list[float]) -> None:
        self._times_s = times_s

    def on_tick(self, record: Any) -> None:
        self._times_s.append(record.decide_s)


_RUN_KEYS = (
    "policy", "rate_req_s", "seed", "window_s", "energy_j", "mean_power_w",
    "energy_prefill_j", "energy_decode_j", "energy_idle_j", "energy_transfer_j",
    "energy_per_token_j", "saving_token_frac", "bound_gap_closed", "ttft_attainment",
    "itl_attainment", "slo_attainment", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s",
    "requests_arrived", "requests_completed", "requests_in_flight", "requests_dropped",
    "preemptions", "retries", "tokens_out", "tokens_lost", "mean_batch",
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
        decode_at_arrival=parts.decode_at_arrival,
        log_iterations=max(settings.log_iterations, log),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
