"""The runs of a comparison: policies x loads x seeds, checked, and carried out wherever told."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from voltana_ctrl.checks import count, not_negative, positive
from voltana_ctrl.control.spare import spare_count
from voltana_ctrl.errors import ConfigError, VoltanaError
from voltana_ctrl.estimate.forecast import OwnForecast
from voltana_ctrl.experiment.run import BELIEF_DELAY_S, GRACE_S, Run
from voltana_ctrl.policies import HEADLINE, PolicyParts, PolicySetup, find_policy
from voltana_ctrl.profiles import load_profile
from voltana_ctrl.sim.arrivals import ArrivalProcess
from voltana_ctrl.sim.faults import Fault, FaultSchedule
from voltana_ctrl.sim.power import refuse_below_idle
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import WORKLOADS, Workload, make_workload
from voltana_ctrl.types import FleetSpec, PowerBudget, Slo, Steps

if TYPE_CHECKING:
    from voltana_ctrl.experiment.store import ResultStore

__all__ = ["Done", "Grid"]

DEFAULT_PROFILE = "a100-sxm-80gb/llama-3.1-8b"
DEFAULT_RATES_REQ_S = (10.0, 20.0, 35.0, 50.0, 65.0, 80.0)
DEFAULT_SLO = Slo(ttft_s=0.6, itl_s=0.06)

# What savings and gaps are counted from; run first at each load, so that its rows can be told.
_REFERENCES = ("static-max", "voltanallm", "bound")

# More is a slip of the hand, and would fill the memory or never end.
_MAX_SEEDS = 10_000
_MAX_REQUESTS = 20_000_000
_MAX_SPAN_S = 1e7
_MIN_TICK_S = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A run that has ended.

    Parameters
    ----------
    index : int
        Position of the run in `runs` of the grid.
    figures : dict
        Named as in the JSON of ``compare``; ``detail`` too, where it was asked for.
    took_s : float
        How long it ran where it ran; 0 for one that the store had.

    Examples
    --------
    >>> Done(index=0, figures={"policy": "bound"}, took_s=0.1).figures["policy"]
    'bound'
    """

    index: int
    figures: dict[str, Any]
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Runs that were checked and not carried out yet; made by :func:`plan_runs`.

    Parameters
    ----------
    fleet, profile, workload : str
        What they run on, as reports name it.
    spec : FleetSpec
        The fleet.
    runs : tuple of Run
        One per policy, rate and seed, in that order.

    Examples
    --------
    >>> from voltana_ctrl.experiment.grid import plan_runs
    >>> grid = plan_runs(rates_req_s=[5.0, 9.0], policies=["static-max", "bound"], duration_s=9.0)
    >>> len(grid.runs), grid.profile
    (4, 'a100-sxm-80gb/llama-3.1-8b')
    >>> done = next(grid.execute())
    >>> done.index, done.figures["policy"]
    (0, 'static-max')
    """

    fleet: str
    profile: str
    workload: str
    spec: FleetSpec
    runs: tuple[Run, ...]

    @property
    def policies(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(dict.fromkeys(str(run.policy) for run in self.runs))

    def build_policies(self) -> dict[str, PolicyParts]:
        """Put every policy together once, which loads what is compiled; refuses what does not fit.

        Raises
        ------
        ConfigError
            Of a policy that cannot serve this fleet.
        """
        one = self.runs[0]
        setup = PolicySetup(
            tick_s=one.tick_s, power_budget=one.power_budget, delay_s=one.belief_delay_s
        )
        built = {}
        for name in self.policies:
            policy = find_policy(name)
            # What is chosen by trial is put together when its run begins; it is as fixed as this.
            policy = find_policy("static-max") if policy.searched else policy
            built[name] = policy.build(self.spec, one.slo, setup)
        return built

    def order(self) -> list[int]:
        """Indices in the order in which runs are begun: load by load, references first."""
        loads = list(dict.fromkeys(run.rate_req_s for run in self.runs))
        return sorted(
            range(len(self.runs)),
            key=lambda k: (
                loads.index(self.runs[k].rate_req_s),
                self.runs[k].policy not in _REFERENCES,
            ),
        )

    def execute(
        self, executor: Executor | None = None, store: ResultStore | None = None
    ) -> Iterator[Done]:
        """Carry the runs out, and give each as it ends.

        Parameters
        ----------
        executor : concurrent.futures.Executor, optional
            Where runs go; this process if left out.
        store : ResultStore, optional
            Keeps every run, and has those of earlier tries, which are not run again.

        Yields
        ------
        Done
            Every run once, in the order in which they end.
        """
        left = []
        keys = {} if store is None else {k: store.key(self.runs[k]) for k in self.order()}
        for index in self.order():
            figures = None if store is None else store.get(keys[index])
            if figures is None:
                left.append(index)
            else:
                yield Done(index=index, figures=figures, took_s=0.0)
        for done in self._carry_out(left, executor):
            if store is not None:
                store.put(keys[done.index], done.figures)
            yield done
        if store is not None:
            store.flush()

    def _carry_out(self, left: Sequence[int], executor: Executor | None) -> Iterator[Done]:
        if executor is None:
            for index in left:
                yield _carry_out(index, self.runs[index])
            return
        futures = [executor.submit(_carry_out, index, self.runs[index]) for index in left]
        try:
            for future in as_completed(futures):
                yield future.result()  # the first failure ends it
        finally:
            for future in futures:
                future.cancel()


def _carry_out(index: int, run: Run) -> Done:
    begin_s = time.perf_counter()
    try:
        figures = run.simulate()
    except VoltanaError:
        raise
    except Exception as error:
        if ":" not in str(run.policy):
            raise  # a mistake of ours
        raise ConfigError(f"policy {run.policy!r}: {_told(error)}") from error
    return Done(index=index, figures=figures, took_s=time.perf_counter() - begin_s)


def _told(error: Exception) -> str:
    """What was raised, and by which line of the user's."""
    package = str(Path(__file__).parents[1])
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((package, sys.prefix, sys.base_prefix))
    ]
    where = "" if not theirs else f" ({theirs[-1].filename}, line {theirs[-1].lineno})"
    return f"{type(error).__name__}: {error}{where}"


def plan_runs(
    *,
    fleet: str | FleetSpec = "2P2D",
    profile: str | None = None,
    workload: str | Path | Workload = "sharegpt",
    rates_req_s: Sequence[float] | None = None,
    rate_steps: RateSteps | None = None,
    concurrency: int | None = None,
    duration_s: float = 120.0,
    warmup_s: float = 30.0,
    seeds: int | Sequence[int] = 1,
    tick_s: float = 0.1,
    slo: Slo = DEFAULT_SLO,
    policies: Sequence[str] = HEADLINE,
    settings: PlantSettings | None = None,
    belief_delay_s: float = BELIEF_DELAY_S,
    spare: float = 0.0,
    forecast: OwnForecast | None = None,
    power_budget: PowerBudget | None = None,
    arrivals: ArrivalProcess | None = None,
    faults: Sequence[Fault] = (),
    defer: tuple[float | str, float] | None = None,
    price: Steps | None = None,
    co2: Steps | None = None,
    roles: Literal["fixed", "flexible"] = "fixed",
    skip_bad_rows: bool = False,
    detail: bool = False,
    server_w: float | None = None,
) -> Grid:
    """Check what :func:`~voltana_ctrl.compare` was asked for, before anything compiled is loaded.

    Its parameters are those of that function, and so are its errors.
    """
    spec, fleet_name, profile_name = _fleet(fleet, profile)
    if server_w is not None:
        not_negative("server_w", server_w)
        spec = FleetSpec(
            tuple(replace(one, rest_of_server_w=server_w * one.gpus) for one in spec.instances)
        )
    if roles not in ("fixed", "flexible"):
        raise ConfigError(f"roles: expected fixed or flexible, got {roles!r}")
    if roles == "flexible":
        spec = spec.flexible()
    source, name = _workload(workload, skip_bad_rows)
    positive("duration_s", duration_s)
    not_negative("warmup_s", warmup_s)
    positive("tick_s", tick_s)
    not_negative("belief_delay_s", belief_delay_s)
    spare_count(spare)
    if rate_steps is not None:
        if rates_req_s is not None or concurrency is not None:
            raise ConfigError(
                "rate-steps: expected no rate and no concurrency besides, got one; leave it out"
            )
        rates: Sequence[float | None] = [rate_steps.mean_req_s(warmup_s, warmup_s + duration_s)]
        if rates[0] == 0.0:
            raise ConfigError(
                f"rate-steps: expected requests between {warmup_s:g} and"
                f" {warmup_s + duration_s:g} s, which count, got a rate of 0"
            )
        _refuse_endless([rate_steps.highest_req_s], duration_s + warmup_s, tick_s)
    else:
        rates = _rates(rates_req_s, concurrency, source)
        _refuse_endless(rates, duration_s + warmup_s, tick_s)
    if arrivals is not None and (concurrency is not None or not isinstance(source, str)):
        raise ConfigError(
            "arrivals: expected a generator's requests in an open loop, got a trace or a closed"
            " loop, which have their own; leave it out"
        )
    FaultSchedule(spec, faults)  # refuses what does not fit
    if power_budget is not None:
        refuse_below_idle(power_budget, spec)
    if defer is not None:
        _refuse_defer(defer, concurrency, source)
    if isinstance(seeds, int):
        count("seeds", seeds)
        if seeds > _MAX_SEEDS:
            raise ConfigError(f"seeds: expected at most {_MAX_SEEDS}, got {seeds}; lower it")
        seeds = range(seeds)
    if not policies:
        raise ConfigError("policies: expected at least one name, got none")
    for policy in policies:
        find_policy(policy)  # refuses a name that there is not
    runs = tuple(
        Run(
            policy=policy,
            fleet=spec,
            slo=slo,
            workload=source,
            rate_req_s=rate,
            rate_steps=rate_steps,
            concurrency=concurrency,
            seed=int(seed),
            duration_s=duration_s,
            warmup_s=warmup_s,
            tick_s=tick_s,
            settings=settings or PlantSettings(),
            power_budget=power_budget,
            arrivals=arrivals,
            faults=tuple(faults),
            defer=defer,
            price=price,
            co2=co2,
            detail=detail,
            belief_delay_s=belief_delay_s,
            spare=spare,
            forecast=forecast,
        )
        for policy in dict.fromkeys(policies)
        for rate in rates
        for seed in seeds
    )
    return Grid(fleet=fleet_name, profile=profile_name, workload=name, spec=spec, runs=runs)


def _refuse_defer(
    defer: tuple[float | str, float], concurrency: int | None, source: str | Workload
) -> None:
    if concurrency is not None:
        raise ConfigError("defer: clients of a closed loop wait for their answer; leave it out")
    if isinstance(source, str):  # of a generator any requests will do
        source = make_workload(source, rate_req_s=1.0, duration_s=1.0)
    source.deferred(*defer)


def _fleet(fleet: str | FleetSpec, profile: str | None) -> tuple[FleetSpec, str, str]:
    written = isinstance(fleet, FleetSpec) or str(fleet).endswith(".toml")
    if written and profile is not None:
        raise ConfigError(
            f"profile: the fleet names the profile of each instance, got {profile!r} besides;"
            " leave it out, or give --fleet as xPyD"
        )
    if isinstance(fleet, FleetSpec):
        spec, name = fleet, f"{len(fleet)} instances"
    elif str(fleet).endswith(".toml"):
        spec, name = FleetSpec.from_toml(fleet, load_profile), Path(fleet).name
    else:
        spec, name = (
            FleetSpec.parse(str(fleet), load_profile(profile or DEFAULT_PROFILE)),
            str(fleet),
        )
    used = dict.fromkeys(instance.profile.name for instance in spec.instances)
    return spec, name, ", ".join(used)


def _workload(workload: str | Path | Workload, skip_bad_rows: bool) -> tuple[str | Workload, str]:
    if isinstance(workload, Workload):
        return workload, workload.name
    if isinstance(workload, str) and workload in WORKLOADS:
        return workload, workload
    if not Path(workload).exists():
        raise ConfigError(
            f"workload {str(workload)!r}: expected one of {', '.join(WORKLOADS)} or a trace"
            " file, got neither"
        )
    return read_trace(workload, skip_bad_rows=skip_bad_rows), Path(workload).name


def _rates(
    rates_req_s: Sequence[float] | None, concurrency: int | None, source: str | Workload
) -> Sequence[float | None]:
    if concurrency is not None:
        count("concurrency", concurrency)
        if rates_req_s is not None:
            raise ConfigError("rate and concurrency: expected one of them, got both")
        return (None,)
    if rates_req_s is None:
        return DEFAULT_RATES_REQ_S if isinstance(source, str) else (None,)
    if not len(rates_req_s):
        raise ConfigError("rate: expected at least one number, got none")
    for rate in rates_req_s:
        positive("rate", rate)
    return rates_req_s


def _refuse_endless(rates: Sequence[float | None], span_s: float, tick_s: float) -> None:
    """Refuse what would fill the memory or never end."""
    if span_s > _MAX_SPAN_S:
        raise ConfigError(
            f"duration_s: expected warm-up and duration of at most {_MAX_SPAN_S:g} s,"
            f" got {span_s:g}; shorten it"
        )
    if not _MIN_TICK_S <= tick_s <= _MAX_SPAN_S:
        raise ConfigError(f"tick_s: expected {_MIN_TICK_S:g} to {_MAX_SPAN_S:g} s, got {tick_s:g}")
    most = max((rate for rate in rates if rate is not None), default=0.0) * (span_s + GRACE_S)
    if most > _MAX_REQUESTS:
        raise ConfigError(
            f"rate: expected at most {_MAX_REQUESTS} requests a run, got about {most:.3g};"
            " lower the rate or shorten the duration"
        )
