"""``voltana-ctrl compare``: policies on workloads against the simulated fleet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from voltana_ctrl.cli.options import (
    above_zero,
    check_outputs,
    look_here,
    numbers,
    processes,
    progress,
)
from voltana_ctrl.errors import ConfigError

#: Policies that are asked at every tick, which takes longer than the simulation.
_PYTHON_POLICIES = ("mpc", "cascade", "voltanallm-adaptive")


def compare(
    fleet: Annotated[
        str, typer.Option(help="xPyD such as 2P2D, xC colocated, or a TOML file.")
    ] = "2P2D",
    profile: Annotated[
        str, typer.Option(help="GPU and model; see `voltana-ctrl profiles`.")
    ] = "a100-sxm-80gb/llama-3.1-8b",
    workload: Annotated[
        str,
        typer.Option(help="sharegpt, lmsys, azure-conv, azure-code, fixed, or a trace file."),
    ] = "sharegpt",
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: clients that wait for their answer.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Loads in req/s, 10,20,...; rescales a trace. [default: 10 to 80]"),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds that count.")] = 120.0,
    warmup: Annotated[float, typer.Option(help="Seconds before them.")] = 30.0,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    tick_ms: Annotated[float, typer.Option(help="Control period.")] = 100.0,
    slo: Annotated[
        str, typer.Option(help="Targets in seconds, and the share that must meet each.")
    ] = "ttft=0.6,itl=0.06,attainment=0.99",
    policies: Annotated[
        str | None,
        typer.Option(help="Names with commas between; see `voltana-ctrl policies`."),
    ] = None,
    power_budget_w: Annotated[
        str | None,
        typer.Option(help="Limit on the fleet: W, or steps s:W,... from the warm-up's start."),
    ] = None,
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
    jitter: Annotated[float, typer.Option(help="Spread of iteration times (ratio).")] = 0.0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out trace rows that cannot be read.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every figure to this file.")
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
    jobs: Annotated[int, typer.Option(help="Processes; 0 lets the size of the work decide.")] = 0,
) -> None:
    """Run policies on workloads against the simulated fleet; all savings are simulated."""
    from rich.console import Console

    from voltana_ctrl.experiment import comparison
    from voltana_ctrl.policies import HEADLINE
    from voltana_ctrl.report import check_plot, print_table, write_html, write_plot
    from voltana_ctrl.sim.arrivals import parse_arrivals
    from voltana_ctrl.sim.faults import read_faults
    from voltana_ctrl.types import PowerBudget, Slo

    above_zero(duration=duration, tick_ms=tick_ms)
    for option, value in (
        ("warmup", warmup),
        ("actuation-ms", actuation_ms),
        ("settle-ms", settle_ms),
        ("jitter", jitter),
        ("jobs", jobs),
    ):
        if not 0.0 <= value < math.inf:
            raise ConfigError(f"{option}: expected a number >= 0, got {value:g}")
    shown = [part.strip() for part in figures.split(",")] if figures else []
    drawn = html_path is not None or plot_path is not None
    check_outputs({"json": json_path, "html": html_path, "plot": plot_path})
    if drawn or shown:
        check_plot(plot_path, shown)
    rates = numbers("rate", rate)
    names = [part.strip() for part in policies.split(",")] if policies else list(HEADLINE)
    look_here(names)
    promises = Slo.parse(slo)
    power_budget = None if power_budget_w is None else PowerBudget.parse(power_budget_w)
    process = None if arrivals is None else parse_arrivals(arrivals)
    wrong = () if faults is None else read_faults(faults)
    settings = _settings(actuation_ms, settle_ms, jitter)
    errors = Console(stderr=True)
    with errors.status("loading the simulator (compiled once per machine)"):
        import voltana_ctrl.kernels.plant.advance  # noqa: F401
    loads = rates or list(comparison.DEFAULT_RATES_REQ_S)
    span_s = (duration + warmup) * max(1, seeds)
    # A million requests or 400 decisions in Python take about a second.
    work_s = sum(loads) * span_s * len(names) / 1e6
    asked = [name for name in names if ":" in name or name in _PYTHON_POLICIES]
    work_s += len(loads) * span_s / max(tick_ms, 1e-3) * 1e3 * len(asked) / 400.0
    with progress(errors) as on_progress, processes(jobs, work_s) as executor:
        result = comparison.compare(
            fleet=fleet,
            profile=profile,
            workload=workload,
            rates_req_s=rates,
            concurrency=concurrency,
            duration_s=duration,
            warmup_s=warmup,
            seeds=seeds,
            tick_s=tick_ms / 1e3,
            slo=promises,
            policies=names,
            settings=settings,
            power_budget=power_budget,
            arrivals=process,
            faults=wrong,
            executor=executor,
            skip_bad_rows=skip_bad_rows,
            detail=drawn,
            on_progress=on_progress,
        )
    if json_path is not None:
        result.write_json(json_path)
    study = result.to_study()
    if drawn:
        with errors.status("drawing"):
            if html_path is not None:
                write_html(study, html_path)
            if plot_path is not None:
                write_plot(study, plot_path, shown)
    print_table(study, Console())


def _settings(actuation_ms: float, settle_ms: float, jitter: float) -> Any:
    from voltana_ctrl.sim.plant import PlantSettings

    return PlantSettings(
        actuation_s=actuation_ms / 1e3, settle_s=settle_ms / 1e3, jitter_sd_frac=jitter
    )
