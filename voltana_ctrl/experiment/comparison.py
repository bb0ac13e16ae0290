"""Experiments: policies x loads x seeds on the simulated fleet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltana_ctrl import __version__
from voltana_ctrl.checks import count, not_negative, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.experiment.run import GRACE_S, Run
from voltana_ctrl.policies import HEADLINE, PolicySetup, find_policy
from voltana_ctrl.profiles import load_profile
from voltana_ctrl.report import Study, write_html, write_plot
from voltana_ctrl.sim.arrivals import ArrivalProcess
from voltana_ctrl.sim.detail import RunDetail
from voltana_ctrl.sim.faults import Fault, FaultSchedule, fault_rows
from voltana_ctrl.sim.metrics import fill_gap_closed
from voltana_ctrl.sim.power import refuse_below_idle
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import WORKLOADS, Workload
from voltana_ctrl.types import FleetSpec, PowerBudget, Profile, Slo

__all__ = ["SCHEMA", "Comparison", "Run", "compare"]

#: Name and version of the JSON that :meth:`Comparison.write_json` writes.
SCHEMA = "voltana-ctrl/compare/1"
DEFAULT_PROFILE = "a100-sxm-80gb/llama-3.1-8b"
DEFAULT_RATES_REQ_S = (10.0, 20.0, 35.0, 50.0, 65.0, 80.0)
DEFAULT_SLO = Slo(ttft_s=0.6, itl_s=0.06)

# More is a slip of the hand, and would fill the memory or never end.
_MAX_SEEDS = 10_000
_MAX_REQUESTS = 20_000_000
_MAX_SPAN_S = 1e7
_MIN_TICK_S = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What :func:`compare` found.

    Parameters
    ----------
    fleet, profile, workload : str
        What was compared on.
    slo : Slo
        What attainment is judged by.
    power_budget : PowerBudget, optional
        What the fleet might draw.
    arrivals : str, optional
        Arrival process, where it was not the workload's own.
    faults : tuple of Fault
        What went wrong.
    runs : tuple of dict
        One per policy, rate and seed, in that order; keys as in the JSON.
    profiles : tuple of Profile
        Those of the fleet; not in the JSON.
    details : tuple of RunDetail or None
        One per run, where they were asked for; not in the JSON.

    Examples
    --------
    >>> Comparison(fleet="2P2D", profile="p", workload="w", slo=DEFAULT_SLO,
    ...            runs=()).to_dict()["schema"]
    'voltana-ctrl/compare/1'
    """

    fleet: str
    profile: str
    workload: str
    slo: Slo
    runs: tuple[dict[str, Any], ...]
    power_budget: PowerBudget | None = None
    arrivals: str | None = None
    faults: tuple[Fault, ...] = ()
    profiles: tuple[Profile, ...] = ()
    details: tuple[RunDetail | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as written to JSON."""
        budget = self.power_budget
        return {
            "schema": SCHEMA,
            "version": __version__,
            "fleet": self.fleet,
            "profile": self.profile,
            "workload": self.workload,
            "slo": {
                "ttft_s": self.slo.ttft_s,
                "itl_s": self.slo.itl_s,
                "attainment": self.slo.attainment,
            },
            "arrivals": self.arrivals,
            "faults": fault_rows(self.faults),
            "power_budget_w": None if budget is None else [list(step) for step in budget.steps],
            "runs": list(self.runs),
        }

    def write_json(self, path: str | Path) -> None:
        """Write the JSON of the interface.

        Raises
        ------
        ConfigError
            If the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error

    def to_study(self) -> Study:
        """As the report takes it."""
        return Study(comparison=self.to_dict(), details=self.details, profiles=self.profiles)

    def write_html(self, path: str | Path) -> None:
        """Write one self-contained page, see :func:`voltana_ctrl.report.write_html`."""
        write_html(self.to_study(), path)

    def write_plot(self, path: str | Path, figures: Sequence[str] = ()) -> None:
        """Write figures, see :func:`voltana_ctrl.report.write_plot`."""
        write_plot(self.to_study(), path, figures)


def compare(
    *,
    fleet: str | FleetSpec = "2P2D",
    profile: str = DEFAULT_PROFILE,
    workload: str | Path | Workload = "sharegpt",
    rates_req_s: Sequence[float] | None = None,
    concurrency: int | None = None,
    duration_s: float = 120.0,
    warmup_s: float = 30.0,
    seeds: int | Sequence[int] = 1,
    tick_s: float = 0.1,
    slo: Slo = DEFAULT_SLO,
    policies: Sequence[str] = HEADLINE,
    settings: PlantSettings | None = None,
    power_budget: PowerBudget | None = None,
    arrivals: ArrivalProcess | None = None,
    faults: Sequence[Fault] = (),
    executor: Executor | None = None,
    skip_bad_rows: bool = False,
    detail: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run policies on loads and seeds, all with common random numbers.

    Parameters
    ----------
    fleet : str or FleetSpec
        ``xPyD``, ``xC``, a TOML file, or a fleet.
    profile : str
        For ``xPyD`` and ``xC``; see :func:`voltana_ctrl.list_profiles`.
    workload : str, Path or Workload
        Name of a generator, a trace file, or requests.
    rates_req_s : sequence of float, optional
        Loads; 10 to 80 for generators, a trace's own rate by default.
    concurrency : int, optional
        Closed loop with this many clients instead of rates.
    duration_s, warmup_s : float
        Window that counts, and time before it.
    seeds : int or sequence of int
        How many (0, 1, ...), or which.
    tick_s : float
        Control period.
    slo : Slo
        The promises.
    policies : sequence of str
        Names, see :func:`voltana_ctrl.policies.find_policy`.
    settings : PlantSettings, optional
        Actuation and noise.
    power_budget : PowerBudget, optional
        What the fleet may draw, in time from the start of each run, warm-up included.
        Policies that know budgets honour it; `over_budget_frac` says how the others fare.
    arrivals : ArrivalProcess, optional
        Another arrival process than the generator's own, see :mod:`voltana_ctrl.sim.arrivals`.
    faults : sequence of Fault
        What goes wrong, in time from the start of each run, warm-up included; see
        :mod:`voltana_ctrl.sim.faults`.
    executor : concurrent.futures.Executor, optional
        Where runs go; this process if left out. Processes, or the workers of a cluster such as
        Dask's through ``client.get_executor()``.
    skip_bad_rows : bool
        Leave out rows of a trace that cannot be read, rather than refuse the file.
    detail : bool
        Keep what figures over time and of latencies need, see `Comparison.details`.
    on_progress : callable (done, total), optional
        Called in this thread as each run is done, wherever it ran.

    Returns
    -------
    Comparison
        The same whatever the executor, timing fields aside.

    Raises
    ------
    ConfigError
        Naming the argument that does not fit, before anything runs.

    Examples
    --------
    >>> result = compare(fleet="1P1D", rates_req_s=[5.0], duration_s=20.0, warmup_s=5.0,
    ...                  policies=["static-max", "static-1005"])
    >>> result.runs[1]["energy_j"] < result.runs[0]["energy_j"]
    True
    """
    spec, fleet_name, profile_name = _fleet(fleet, profile)
    source, name = _workload(workload, skip_bad_rows)
    rates = _rates(rates_req_s, concurrency, source)
    positive("duration_s", duration_s)
    not_negative("warmup_s", warmup_s)
    positive("tick_s", tick_s)
    _refuse_endless(rates, duration_s + warmup_s, tick_s)
    if arrivals is not None and (concurrency is not None or not isinstance(source, str)):
        raise ConfigError(
            "arrivals: expected a generator's requests in an open loop, got a trace or a closed"
            " loop, which have their own; leave it out"
        )
    FaultSchedule(spec, faults)  # refuses what does not fit
    if power_budget is not None:
        refuse_below_idle(power_budget, spec)
    if isinstance(seeds, int):
        count("seeds", seeds)
        if seeds > _MAX_SEEDS:
            raise ConfigError(f"seeds: expected at most {_MAX_SEEDS}, got {seeds}; lower it")
        seeds = range(seeds)
    if not policies:
        raise ConfigError("policies: expected at least one name, got none")
    runs = [
        Run(
            policy=policy,
            fleet=spec,
            slo=slo,
            workload=source,
            rate_req_s=rate,
            concurrency=concurrency,
            seed=int(seed),
            duration_s=duration_s,
            warmup_s=warmup_s,
            tick_s=tick_s,
            settings=settings or PlantSettings(),
            power_budget=power_budget,
            arrivals=arrivals,
            faults=tuple(faults),
            detail=detail,
        )
        for policy in dict.fromkeys(policies)
        for rate in rates
        for seed in seeds
    ]
    for policy in dict.fromkeys(policies):
        # Refuse what does not fit before any run.
        find_policy(policy).build(spec, slo, PolicySetup(tick_s=tick_s, power_budget=power_budget))
    figures = _run_all(runs, executor, on_progress)
    fill_gap_closed(figures)
    return Comparison(
        fleet=fleet_name,
        profile=profile_name,
        workload=name,
        slo=slo,
        power_budget=power_budget,
        arrivals=None if arrivals is None else repr(arrivals),
        faults=tuple(faults),
        details=tuple(run.pop("detail", None) for run in figures) if detail else (),
        runs=tuple(figures),
        profiles=tuple({i.profile.name: i.profile for i in spec.instances}.values()),
    )


def _fleet(fleet: str | FleetSpec, profile: str) -> tuple[FleetSpec, str, str]:
    if isinstance(fleet, FleetSpec):
        spec, name = fleet, f"{len(fleet)} instances"
    elif str(fleet).endswith(".toml"):
        spec, name = FleetSpec.from_toml(fleet, load_profile), Path(fleet).name
    else:
        spec, name = FleetSpec.parse(str(fleet), load_profile(profile)), str(fleet)
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


def _run_all(
    runs: list[Run],
    executor: Executor | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(done, len(runs))

    tell(0)
    if executor is None:
        figures = []
        for run in runs:
            figures.append(run.simulate())
            tell(len(figures))
        return figures
    futures = [executor.submit(run.simulate) for run in runs]
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()  # the first failure ends it
            tell(done)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
