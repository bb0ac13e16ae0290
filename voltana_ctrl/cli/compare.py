"""``voltana-ctrl compare``: policies on workloads against the simulated fleet."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Collection
from concurrent.futures import BrokenExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from voltana_ctrl.cli.complete import policy_names, workload_names
from voltana_ctrl.cli.options import above_zero, check_outputs, cores, look_here, numbers
from voltana_ctrl.errors import ConfigError, VoltanaError

if TYPE_CHECKING:
    from voltana_ctrl.experiment import Comparison, Grid
    from voltana_ctrl.policies import PolicyParts
    from voltana_ctrl.sim.workload import Workload
    from voltana_ctrl.types import PowerBudget

EXAMPLES = (
    "voltana-ctrl compare",
    "voltana-ctrl compare --fleet 4C --profile h100-sxm-80gb/llama-3.1-8b --rate 20,40",
    "voltana-ctrl compare --workload trace.csv.gz --duration 3400 --json out.json",
    "voltana-ctrl compare --policies static-max,mine:MyPolicy --seeds 5 --html out.html",
)

# Asked in Python at every tick, as is known before they are loaded.
_PYTHON_POLICIES = ("mpc", "cascade", "voltanallm-adaptive")
# Less work than this is done before a second process has helped, in seconds of one core.
_ALONE_S = 3.0


def compare(
    fleet: Annotated[
        str, typer.Option(help="xPyD such as 2P2D, xC colocated, or a TOML file.")
    ] = "2P2D",
    profile: Annotated[
        str | None,
        typer.Option(
            help="GPU and model; see `voltana-ctrl profiles`. [default: a100-sxm-80gb/llama-3.1-8b]"
        ),
    ] = None,
    workload: Annotated[
        str,
        typer.Option(
            help="sharegpt, lmsys, azure-conv, azure-code, fixed, or a trace file.",
            autocompletion=workload_names,
        ),
    ] = "sharegpt",
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: clients that wait for their answer.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Loads in req/s, 10,20,...; rescales a trace. [default: 10 to 80]"),
    ] = None,
    rate_steps: Annotated[
        str | None,
        typer.Option(help="A load that changes: steps s:req/s,... from the warm-up's start."),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds that count.")] = 120.0,
    warmup: Annotated[float, typer.Option(help="Seconds before them.")] = 30.0,
    seeds: Annotated[
        int, typer.Option(help="How many: other requests, or other windows of a trace.")
    ] = 1,
    tick_ms: Annotated[float, typer.Option(help="Control period.")] = 100.0,
    slo: Annotated[
        str, typer.Option(help="Targets in seconds, and the share that must meet each.")
    ] = "ttft=0.6,itl=0.06,attainment=0.99",
    policies: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between; see `voltana-ctrl policies`.",
            autocompletion=policy_names,
        ),
    ] = None,
    power_budget_w: Annotated[
        str | None,
        typer.Option(help="Limit on the fleet: W, or steps s:W,... from the warm-up's start."),
    ] = None,
    budget_notice_s: Annotated[
        float | None,
        typer.Option(help="How far ahead steps of the budget are known. [default: all of them]"),
    ] = None,
    defer: Annotated[
        str | None,
        typer.Option(help="SHARE:SECONDS or CLASS:SECONDS: requests that may wait so long."),
    ] = None,
    price_kwh: Annotated[
        str | None,
        typer.Option(help="Price per kWh, or steps s:PRICE,..., or a .csv file of them."),
    ] = None,
    co2_g_kwh: Annotated[
        str | None,
        typer.Option(help="Grams of CO2 per kWh, or steps s:GRAMS,..., or a .csv file of them."),
    ] = None,
    roles: Annotated[
        Literal["fixed", "flexible"],
        typer.Option(help="Whether machines may change between prefill and decode."),
    ] = "fixed",
    arrivals: Annotated[
        str | None,
        typer.Option(
            help="poisson, gamma:cv=3, mmpp:high_s=5,low_s=15 or diurnal:period_s=600 in place"
            " of the generator's own."
        ),
    ] = None,
    faults: Annotated[
        Path | None,
        typer.Option(help="TOML file of failures, slow-downs and clamped clocks."),
    ] = None,
    actuation_ms: Annotated[float, typer.Option(help="Dead time of a clock set.")] = 5.0,
    settle_ms: Annotated[float, typer.Option(help="Then until the clock is there.")] = 20.0,
    belief_delay_ms: Annotated[
        float,
        typer.Option(help="What policies take both for, until they have seen some sets."),
    ] = 25.0,
    spare: Annotated[
        float,
        typer.Option(
            help="Instances that each phase may lose and still serve: 0, 1, ... or a share of the"
            " active ones. Costs power; see the docs on policies."
        ),
    ] = 0.0,
    forecast: Annotated[
        Path | None,
        typer.Option(help="CSV of t_s,req_s: arrivals that mpc is told of ahead, where it looks."),
    ] = None,
    jitter: Annotated[float, typer.Option(help="Spread of iteration times (ratio).")] = 0.0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out trace rows that cannot be read.")
    ] = False,
    time_unit: Annotated[
        str | None,
        typer.Option(help="s, ms, us or ns: of a trace's times, where it does not tell."),
    ] = None,
    block_tok: Annotated[
        int | None,
        typer.Option(help="Tokens of a trace's prefix blocks, where it does not tell."),
    ] = None,
    server_w: Annotated[
        float | None,
        typer.Option(help="Rest of the servers, W per GPU: adds power and saving at the wall."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every figure to this file.")
    ] = None,
    csv_path: Annotated[
        Path | None, typer.Option("--csv", help="Write one row a run to this .csv.")
    ] = None,
    parquet_path: Annotated[
        Path | None, typer.Option("--parquet", help="Write one row a run to this .parquet.")
    ] = None,
    series_path: Annotated[
        Path | None,
        typer.Option(
            "--series", help="Write clocks, batches and power over time to this .csv or .parquet."
        ),
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page to this file.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write the figures to this .png, .svg or .pdf.")
    ] = None,
    figures: Annotated[
        str | None,
        typer.Option(help="Which of loads,energy,time,latency --plot shows. [default: all]"),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Keep runs in this folder as they end; those it has are not run again."),
    ] = None,
    uncertainty: Annotated[
        int, typer.Option(help="Draws from the bands of the profiles; adds intervals to savings.")
    ] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0 lets the size of the work decide.")] = 0,
) -> int:
    """Run policies on workloads against the simulated fleet; all savings are simulated."""
    above_zero(duration=duration, tick_ms=tick_ms)
    for option, value in (
        ("warmup", warmup),
        ("actuation-ms", actuation_ms),
        ("settle-ms", settle_ms),
        ("belief-delay-ms", belief_delay_ms),
        ("jitter", jitter),
        ("jobs", jobs),
    ):
        if not 0.0 <= value < math.inf:
            raise ConfigError(f"{option}: expected a number >= 0, got {value:g}")
    rates = numbers("rate", rate)
    from voltana_ctrl.estimate import read_forecast
    from voltana_ctrl.experiment.grid import plan_runs
    from voltana_ctrl.experiment.uncertainty import refuse_unknown
    from voltana_ctrl.policies import HEADLINE
    from voltana_ctrl.sim.arrivals import parse_arrivals
    from voltana_ctrl.sim.faults import read_faults
    from voltana_ctrl.sim.rate_steps import RateSteps
    from voltana_ctrl.sim.settings import PlantSettings
    from voltana_ctrl.sim.traces import read_trace
    from voltana_ctrl.types import Slo, Steps

    outputs = Outputs(
        json=json_path,
        csv=csv_path,
        parquet=parquet_path,
        series=series_path,
        html=html_path,
        plot=plot_path,
        figures=tuple(part.strip() for part in figures.split(",")) if figures else (),
    )
    outputs.check()
    if store is not None and outputs.detailed:
        raise ConfigError(
            "store: it keeps figures of runs, not what happened over time; leave out --series,"
            " --html and --plot, and draw from a run of its own"
        )
    names = [part.strip() for part in policies.split(",")] if policies else list(HEADLINE)
    look_here(names)
    source: str | Workload = workload
    if time_unit is not None or block_tok is not None:
        source = read_trace(
            workload, skip_bad_rows=skip_bad_rows, time_unit=time_unit, block_tok=block_tok
        )
    grid = plan_runs(
        fleet=fleet,
        profile=profile,
        workload=source,
        rates_req_s=rates,
        rate_steps=None if rate_steps is None else RateSteps.parse(rate_steps),
        concurrency=concurrency,
        duration_s=duration,
        warmup_s=warmup,
        seeds=seeds,
        tick_s=tick_ms / 1e3,
        slo=Slo.parse(slo),
        policies=names,
        settings=PlantSettings(
            actuation_s=actuation_ms / 1e3, settle_s=settle_ms / 1e3, jitter_sd_frac=jitter
        ),
        belief_delay_s=belief_delay_ms / 1e3,
        power_budget=_budget(power_budget_w, budget_notice_s),
        defer=None if defer is None else _defer(defer),
        price=None if price_kwh is None else Steps.parse(price_kwh, "price-kwh"),
        roles=roles,
        co2=None if co2_g_kwh is None else Steps.parse(co2_g_kwh, "co2-g-kwh"),
        spare=spare,
        forecast=None if forecast is None else read_forecast(forecast),
        arrivals=None if arrivals is None else parse_arrivals(arrivals),
        faults=() if faults is None else read_faults(faults),
        skip_bad_rows=skip_bad_rows,
        detail=outputs.detailed,
        server_w=server_w,
    )
    if uncertainty:
        refuse_unknown(grid, uncertainty)
    return _carry_out(grid, outputs, store, jobs, uncertainty)


def _budget(text: str | None, notice_s: float | None) -> PowerBudget | None:
    from voltana_ctrl.types import PowerBudget

    if text is None:
        if notice_s is not None:
            raise ConfigError("budget-notice-s: there is no budget; give --power-budget-w, too")
        return None
    budget = PowerBudget.parse(text)
    return budget if notice_s is None else replace(budget, notice_s=notice_s)


def _defer(text: str) -> tuple[float | str, float]:
    which, colon, deadline_s = text.rpartition(":")
    try:
        if not (colon and which):
            raise ValueError
        seconds = float(deadline_s)
    except ValueError:
        raise ConfigError(
            f"defer: expected SHARE:SECONDS such as 0.3:1800, or CLASS:SECONDS, got {text!r}"
        ) from None
    try:
        return float(which), seconds
    except ValueError:
        return which, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files that a comparison is written to."""

    json: Path | None
    csv: Path | None
    parquet: Path | None
    series: Path | None
    html: Path | None
    plot: Path | None
    figures: tuple[str, ...]

    @property
    def detailed(self) -> bool:
        """Whether any needs what happened over time."""
        return any(path is not None for path in (self.series, self.html, self.plot))

    def check(self) -> None:
        """Refuse what could not be written, before anything runs."""
        from voltana_ctrl.experiment.tables import check_table
        from voltana_ctrl.report import check_plot

        check_outputs({"json": self.json, "html": self.html, "plot": self.plot})
        check_outputs({"csv": self.csv}, suffix=".csv")
        check_outputs({"parquet": self.parquet}, suffix=".parquet")
        check_outputs({"series": self.series})
        for path in (self.parquet, self.series):
            if path is not None:
                check_table(path)
        if self.html is not None or self.plot is not None or self.figures:
            check_plot(self.plot, list(self.figures))

    def write(self, found: Comparison, *, draw: bool) -> None:
        """Write them all, numbers first; figures take a moment."""
        from voltana_ctrl.report import write_html, write_plot

        if self.json is not None:
            found.write_json(self.json)
        for path in (self.csv, self.parquet):
            if path is not None:
                found.write_table(path)
        if self.series is not None:
            found.write_series(self.series)
        if not draw:
            return
        if self.html is not None:
            write_html(found.to_study(), self.html)
        if self.plot is not None:
            write_plot(found.to_study(), self.plot, self.figures)


def _carry_out(
    grid: Grid, outputs: Outputs, folder: Path | None, jobs: int, uncertainty: int = 0
) -> int:
    """Run it, with rows as they are done; an exit status."""
    from rich.console import Console

    from voltana_ctrl.cli.screen import Screen, while_loading
    from voltana_ctrl.cli.workers import Stopped, stop_on_sigterm, workers
    from voltana_ctrl.experiment import Comparison, ResultStore
    from voltana_ctrl.experiment.remaining import TimeLeft
    from voltana_ctrl.experiment.uncertainty import interval_lines, savings_intervals

    errors = Console(stderr=True)
    screen: Screen | None = None
    status = 0
    intervals: list[dict[str, Any]] = []
    failed: VoltanaError | None = None
    with stop_on_sigterm():
        try:
            with nullcontext() if folder is None else ResultStore(folder) as store:
                number = _processes(grid, _PYTHON_POLICIES, jobs)
                asked = while_loading(
                    lambda: _load(grid),
                    errors,
                    kernels=_kernels(),
                    runs_s=TimeLeft(grid, _PYTHON_POLICIES, number).left_s(0.0),
                )
                number = _processes(grid, asked, jobs)
                with workers(number) as pool, Screen(grid, TimeLeft(grid, asked, number)) as screen:
                    for done in grid.execute(pool, store):
                        screen.add(done)
                    if uncertainty:
                        screen.tell_draws(0, uncertainty)
                        intervals = savings_intervals(
                            grid, uncertainty, executor=pool, on_progress=screen.tell_draws
                        )
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except Stopped:
            status = 128 + signal.SIGTERM
        except BrokenExecutor:
            status = 1
        except VoltanaError as error:
            # What is done is kept, as of one that was stopped.
            if screen is None or not screen.ended:
                raise
            failed, status = error, 2
        found = Comparison.of(grid, ()) if screen is None else screen.found()
        found = replace(found, uncertainty=tuple(intervals))
        if screen is not None:
            screen.print_foot()
        for line in interval_lines(intervals):
            typer.echo(line)
        if status:
            why = "a process was killed, perhaps for its memory" if status == 1 else "stopped"
            why = "a run failed" if failed is not None else why
            again = "" if folder is None else "; the same command goes on from there"
            if again and uncertainty and not intervals:
                again += ", and begins with the draws anew"
            errors.print(
                f"voltana-ctrl: {why}: {len(found.runs)} of {len(grid.runs)} runs are done{again}",
                highlight=False,
                soft_wrap=True,
            )
        outputs.write(found, draw=not status)
        if status and screen is None:
            # A thread may be in the middle of LLVM, where it cannot be ended.
            sys.stderr.flush()
            os._exit(status)
    if failed is not None:
        raise failed
    return status


def _processes(grid: Grid, asked: Collection[str], jobs: int) -> int:
    from voltana_ctrl.experiment.remaining import TimeLeft

    work_s = TimeLeft(grid, asked, 1).work_s
    return min(jobs or (cores() if work_s > _ALONE_S else 1), len(grid.runs))


def _kernels() -> int:
    """How many functions there are to compile, for those who wait for it."""
    folder = files("voltana_ctrl.kernels")
    return sum(
        one.read_text(encoding="utf-8").count("@njit")
        for part in ("", "choose", "learn", "plant", "route")
        for one in folder.joinpath(part).iterdir()
        if one.name.endswith(".py")
    )


def _load(grid: Grid) -> set[str]:
    """Load all that runs need, so that no process compiles it again; policies asked in Python."""
    import voltana_ctrl.backends.sim
    import voltana_ctrl.kernels.plant.hosted  # noqa: F401

    return {
        name
        for name, parts in grid.build_policies().items()
        if name != "bound" and (parts.controller is not None or _python_routers(parts))
    }


def _python_routers(parts: PolicyParts) -> bool:
    from voltana_ctrl.routing import CompiledRouter

    routers = (parts.prefill_router, parts.decode_router)
    return any(one is not None and not isinstance(one, CompiledRouter) for one in routers)
