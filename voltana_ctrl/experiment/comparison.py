"""Experiments: policies x loads x seeds on the simulated fleet."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from voltana_ctrl import __version__
from voltana_ctrl.estimate.forecast import OwnForecast
from voltana_ctrl.experiment.grid import DEFAULT_SLO, Done, Grid, plan_runs
from voltana_ctrl.experiment.notes import notes_on
from voltana_ctrl.experiment.run import BELIEF_DELAY_S, Run
from voltana_ctrl.experiment.tables import series_rows, write_json, write_rows
from voltana_ctrl.policies import HEADLINE
from voltana_ctrl.report import Study, write_html, write_plot
from voltana_ctrl.sim.arrivals import ArrivalProcess
from voltana_ctrl.sim.detail import RunDetail
from voltana_ctrl.sim.faults import Fault, fault_rows
from voltana_ctrl.sim.metrics import fill_gap_closed, fill_saving
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import FleetSpec, PowerBudget, Profile, Slo, Steps

if TYPE_CHECKING:
    from pandas import DataFrame

    from voltana_ctrl.experiment.store import ResultStore

__all__ = ["SCHEMA", "Comparison", "Run", "compare"]

#: Name and version of the JSON that :meth:`Comparison.write_json` writes.
SCHEMA = "voltana-ctrl/compare/2"

#: Libraries whose versions may show in the figures.
_LIBRARIES = ("numpy", "numba", "scipy", "cvxpy")


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
    defer : tuple of (which, deadline_s), optional
        Requests that might wait.
    price, co2 : Steps, optional
        What energy cost per kWh, and its grams of CO2.
    roles : {"fixed", "flexible"}
        Whether instances might change between prefill and decode.
    runs : tuple of dict
        One per policy, rate and seed, in that order; keys as in the JSON.
    rate_steps : RateSteps, optional
        Rates over time, where there was not one.
    settings : mapping
        How it was simulated: warm-up, control period, and of a clock set the delay that the
        fleet has and the one that policies believe at first.
    notes : tuple of str
        What to keep in mind when reading the figures, as sentences.
    seeds : tuple of int
        Seeds of the runs that were asked for.
    planned : int, optional
        How many runs were asked for; more than there are if it was stopped before its end.
    command : tuple of str
        The command line, where there was one.
    profiles : tuple of Profile
        Profiles of the fleet; not in the JSON.
    uncertainty : tuple of dict
        Savings with their intervals, where they were asked for; see
        :func:`voltana_ctrl.experiment.uncertainty.savings_intervals`.
    details : tuple of RunDetail or None
        One per run, where they were asked for; not in the JSON.

    Examples
    --------
    >>> from voltana_ctrl.experiment.grid import DEFAULT_SLO
    >>> found = Comparison(fleet="2P2D", profile="p", workload="w", slo=DEFAULT_SLO, runs=())
    >>> found.to_dict()["schema"], found.complete
    ('voltana-ctrl/compare/2', True)
    """

    fleet: str
    profile: str
    workload: str
    slo: Slo
    runs: tuple[dict[str, Any], ...]
    rate_steps: RateSteps | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    power_budget: PowerBudget | None = None
    arrivals: str | None = None
    faults: tuple[Fault, ...] = ()
    defer: tuple[float | str, float] | None = None
    price: Steps | None = None
    co2: Steps | None = None
    roles: str = "fixed"
    seeds: tuple[int, ...] = ()
    planned: int | None = None
    command: tuple[str, ...] = ()
    profiles: tuple[Profile, ...] = ()
    uncertainty: tuple[dict[str, Any], ...] = ()
    details: tuple[RunDetail | None, ...] = ()

    @classmethod
    def of(cls, grid: Grid, done: Iterable[Done], command: Sequence[str] = ()) -> Comparison:
        """Put together what was done of a grid: all of it, or the part there is.

        Parameters
        ----------
        grid : Grid
            What was asked for.
        done : iterable of Done
            Runs that have ended, in any order.
        command : sequence of str
            The command line, to be kept with the figures.
        """
        ended = sorted(done, key=lambda one: one.index)
        figures = [dict(one.figures) for one in ended]
        fill_gap_closed(figures)
        fill_saving(figures)
        details = tuple(run.pop("detail", None) for run in figures)
        asked = grid.runs[0]
        return cls(
            fleet=grid.fleet,
            profile=grid.profile,
            workload=grid.workload,
            slo=asked.slo,
            rate_steps=asked.rate_steps,
            settings={
                "duration_s": asked.duration_s,
                "warmup_s": asked.warmup_s,
                "tick_s": asked.tick_s,
                "actuation_s": asked.settings.actuation_s,
                "settle_s": asked.settings.settle_s,
                "belief_delay_s": asked.belief_delay_s,
                "spare": asked.spare,
                "jitter_sd_frac": asked.settings.jitter_sd_frac,
            },
            notes=tuple(notes_on(figures, grid.runs)),
            power_budget=asked.power_budget,
            arrivals=None if asked.arrivals is None else repr(asked.arrivals),
            faults=asked.faults,
            defer=asked.defer,
            price=asked.price,
            co2=asked.co2,
            roles="flexible" if any(one.roles for one in asked.fleet.instances) else "fixed",
            seeds=tuple(dict.fromkeys(run.seed for run in grid.runs)),
            planned=len(grid.runs),
            command=tuple(command),
            runs=tuple(figures),
            profiles=tuple({i.profile.name: i.profile for i in grid.spec.instances}.values()),
            details=details if asked.detail else (),
        )

    @property
    def complete(self) -> bool:
        """Whether every run that was asked for is there."""
        return self.planned is None or len(self.runs) == self.planned

    def to_dict(self) -> dict[str, Any]:
        """Everything, as written to JSON."""
        budget = self.power_budget
        return {
            "schema": SCHEMA,
            "version": __version__,
            "versions": _versions(),
            "command": list(self.command) or None,
            "complete": self.complete,
            "runs_planned": len(self.runs) if self.planned is None else self.planned,
            "fleet": self.fleet,
            "profile": self.profile,
            "workload": self.workload,
            "seeds": list(self.seeds),
            "slo": {
                "ttft_s": self.slo.ttft_s,
                "itl_s": self.slo.itl_s,
                "attainment": self.slo.attainment,
            },
            "rate_steps_req_s": None
            if self.rate_steps is None
            else [list(step) for step in self.rate_steps.steps],
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "arrivals": self.arrivals,
            "faults": fault_rows(self.faults),
            "power_budget_w": _pairs(budget),
            "budget_notice_s": None
            if budget is None or not math.isfinite(budget.notice_s)
            else budget.notice_s,
            "defer": None if self.defer is None else list(self.defer),
            "roles": self.roles,
            "price": _pairs(self.price),
            "co2": _pairs(self.co2),
            "uncertainty": list(self.uncertainty) or None,
            "runs": list(self.runs),
        }

    def to_dataframe(self) -> DataFrame:
        """One row a run, with the columns of the JSON; needs pandas.

        Raises
        ------
        ConfigError
            If pandas is not installed.
        """
        from voltana_ctrl.experiment.tables import dataframe

        return dataframe(self.runs)

    def write_json(self, path: str | Path) -> None:
        """Write the JSON of the interface.

        Raises
        ------
        ConfigError
            If the file cannot be written.
        """
        write_json(self.to_dict(), path)

    def write_table(self, path: str | Path) -> None:
        """Write one row a run to a .csv or .parquet file.

        Raises
        ------
        ConfigError
            If the file cannot be written, or Parquet is asked for without pyarrow.
        """
        write_rows(self.runs, path)

    def write_series(self, path: str | Path) -> None:
        """Write clock, batch and power of every instance over time, to a .csv or .parquet file.

        Raises
        ------
        ConfigError
            If details were not kept (``compare(..., detail=True)``), or as for `write_table`.
        """
        write_rows(series_rows(self.runs, self.details), path)

    def to_study(self) -> Study:
        """What the functions of :mod:`voltana_ctrl.report` take."""
        return Study(comparison=self.to_dict(), details=self.details, profiles=self.profiles)

    def write_html(self, path: str | Path) -> None:
        """Write one self-contained page, see :func:`voltana_ctrl.report.write_html`."""
        write_html(self.to_study(), path)

    def write_plot(self, path: str | Path, figures: Sequence[str] = ()) -> None:
        """Write figures, see :func:`voltana_ctrl.report.write_plot`."""
        write_plot(self.to_study(), path, figures)


def _pairs(steps: Steps | None) -> list[list[float]] | None:
    return None if steps is None else [list(step) for step in steps.steps]


def compare(
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
    executor: Executor | None = None,
    store: ResultStore | None = None,
    skip_bad_rows: bool = False,
    detail: bool = False,
    server_w: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run policies on loads and seeds, all with common random numbers.

    Parameters
    ----------
    fleet : str or FleetSpec
        ``xPyD``, ``xC``, a TOML file, or a fleet.
    profile : str, optional
        For ``xPyD`` and ``xC``, an A100 with Llama-3.1-8B by default; see
        :func:`voltana_ctrl.list_profiles`. A fleet in a file names its own.
    workload : str, Path or Workload
        Name of a generator, a trace file, or requests.
    rates_req_s : sequence of float, optional
        Loads; 10 to 80 for generators, a trace's own rate by default.
    rate_steps : RateSteps, optional
        One load that changes over time, in place of rates; see
        :class:`~voltana_ctrl.sim.rate_steps.RateSteps`.
    concurrency : int, optional
        Closed loop with this many clients instead of rates.
    duration_s, warmup_s : float
        Window that counts, and time before it.
    seeds : int or sequence of int
        How many (0, 1, ...), or which. Each draws other requests from a generator, and takes
        another window of a trace that is longer than the run; where there is none, the notes of
        the result say so.
    tick_s : float
        Time between two decisions.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    policies : sequence of str
        Names, see :func:`voltana_ctrl.policies.find_policy`.
    settings : PlantSettings, optional
        Actuation and noise.
    belief_delay_s : float
        Time from asking for a clock until it runs, as policies believe before they have seen any;
        what it takes stands in `settings`.
    spare : float
        Instances that each phase should be able to lose: a whole number, or below 1 a share of
        the active ones. Known to `cascade` and `mpc`.
    forecast : callable, optional
        A forecast of the arrivals in time from the start of each run, for `mpc` where it looks
        ahead: ``forecast(t_s, lead_s)`` gives requests per second; see
        :func:`voltana_ctrl.estimate.read_forecast` for a file.
    power_budget : PowerBudget, optional
        What the fleet may draw, in time from the start of each run, warm-up included.
        Policies that know budgets honour it; `over_budget_frac` says how the others fare.
    arrivals : ArrivalProcess, optional
        Another arrival process than the generator's own, see :mod:`voltana_ctrl.sim.arrivals`.
    faults : sequence of Fault
        What goes wrong, in time from the start of each run, warm-up included; see
        :mod:`voltana_ctrl.sim.faults`.
    defer : tuple of (which, deadline_s), optional
        So many of the requests, or those of this class of a trace, may wait so long for their
        answers: they are let in as the policy says, stand behind the others in every queue, and
        are judged by their deadlines alone. All work of the window is due within it, or 60 s after
        it came.
    price, co2 : Steps, optional
        What energy costs per kWh, and grams of CO2 per kWh, in time from the start of each run.
    roles : {"fixed", "flexible"}
        Whether prefill and decode instances may change between the two, as the policy says.
    executor : concurrent.futures.Executor, optional
        Where runs go; this process if left out. Processes, or the workers of a cluster such as
        Dask's through ``client.get_executor()``.
    store : ResultStore, optional
        Keeps each run as it ends, and has those of earlier tries: what was stopped goes on.
    skip_bad_rows : bool
        Leave out rows of a trace that cannot be read, rather than refuse the file.
    detail : bool
        Keep what figures over time and of latencies need, see `Comparison.details`.
    server_w : float, optional
        What servers draw besides their GPUs, per GPU, for power and saving at the wall; as
        fleet and profiles say if left out.
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
    grid = plan_runs(
        fleet=fleet,
        profile=profile,
        workload=workload,
        rates_req_s=rates_req_s,
        rate_steps=rate_steps,
        concurrency=concurrency,
        duration_s=duration_s,
        warmup_s=warmup_s,
        seeds=seeds,
        tick_s=tick_s,
        slo=slo,
        policies=policies,
        settings=settings,
        belief_delay_s=belief_delay_s,
        spare=spare,
        forecast=forecast,
        power_budget=power_budget,
        arrivals=arrivals,
        faults=faults,
        defer=defer,
        price=price,
        co2=co2,
        roles=roles,
        skip_bad_rows=skip_bad_rows,
        detail=detail,
        server_w=server_w,
    )
    grid.build_policies()
    if on_progress is not None:
        on_progress(0, len(grid.runs))
    ended: list[Done] = []
    for done in grid.execute(executor, store):
        ended.append(done)
        if on_progress is not None:
            on_progress(len(ended), len(grid.runs))
    return Comparison.of(grid, ended)


def _versions() -> dict[str, str]:
    """Of Python, and of the libraries whose versions may show in the figures."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
