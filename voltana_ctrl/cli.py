"""Command line: ``voltana-ctrl compare | policies | profiles``."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voltana_ctrl.errors import ConfigError, VoltanaError

if TYPE_CHECKING:
    from rich.console import Console

    from voltana_ctrl.experiment import Comparison

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Less energy for LLM serving at the same latency: compare control policies.",
)


def main() -> None:
    """Run the command line; bad input ends with status 2 and one line on stderr."""
    # A policy given as module:Class is looked for where the user is.
    sys.path.insert(0, os.getcwd())
    try:
        status = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except VoltanaError as error:
        _refuse(str(error))
    except Exception as error:
        # Usage errors of the parser, which come from click or from typer's copy of it.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        _refuse(message())
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> None:
    line = " ".join(message.split())
    sys.stderr.write(f"voltana-ctrl: {line}\n")
    sys.exit(2)


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{name}: expected numbers with commas between, such as 10,20, got {text!r}"
        ) from None


@app.command()
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
    actuation_ms: Annotated[float, typer.Option(help="Dead time of a clock set.")] = 5.0,
    settle_ms: Annotated[float, typer.Option(help="Then until the clock is there.")] = 20.0,
    jitter: Annotated[float, typer.Option(help="Spread of iteration times (ratio).")] = 0.0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out trace rows that cannot be read.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every figure to this file.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; 0 lets the size of the work decide.")] = 0,
) -> None:
    """Run policies on workloads against the simulated fleet; all savings are simulated."""
    from rich.console import Console

    from voltana_ctrl import experiment
    from voltana_ctrl.policies import HEADLINE
    from voltana_ctrl.types import Slo

    if jobs < 0:
        raise ConfigError(f"jobs: expected 0 or more, got {jobs}")
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise ConfigError(f"json: folder {json_path.resolve().parent} does not exist; make it")
    rates = _numbers("rate", rate)
    names = [part.strip() for part in policies.split(",")] if policies else list(HEADLINE)
    promises = Slo.parse(slo)
    settings = _settings(actuation_ms, settle_ms, jitter)
    errors = Console(stderr=True)
    with errors.status("loading the simulator (compiled once per machine)"):
        import voltana_ctrl._kernels.plant  # noqa: F401
    loads = rates or list(experiment.DEFAULT_RATES_REQ_S)
    work_s = sum(loads) * (duration + warmup) * max(1, seeds) * len(names) / 1e6
    with _progress(errors) as on_progress, _executor(jobs, work_s) as executor:
        result = experiment.compare(
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
            executor=executor,
            skip_bad_rows=skip_bad_rows,
            on_progress=on_progress,
        )
    if json_path is not None:
        result.write_json(json_path)
    print_table(result, Console())


def _settings(actuation_ms: float, settle_ms: float, jitter: float) -> Any:
    from voltana_ctrl.sim.engine import PlantSettings

    return PlantSettings(
        actuation_s=actuation_ms / 1e3, settle_s=settle_ms / 1e3, jitter_sd_frac=jitter
    )


@contextmanager
def _executor(jobs: int, work_s: float) -> Iterator[Executor | None]:
    """Processes, where the work is longer than it takes to start them."""
    if jobs == 0:
        jobs = (os.cpu_count() or 1) if work_s > 10.0 else 1
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield pool


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """Bar that appears with the first report, so that refused input stays one line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "runs",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("runs", total=None)

    def on_progress(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        if bar.live.is_started:
            bar.stop()


def print_table(result: Comparison, console: Console) -> None:
    """One line per policy and load, means over seeds; reads at 80 columns.

    Parameters
    ----------
    result : Comparison
        What to show.
    console : rich.console.Console
        Where.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"{result.fleet}  {result.profile}  {result.workload}  (simulated)",
        caption=(
            f"SLO: TTFT {result.slo.ttft_s:g} s, ITL {result.slo.itl_s:g} s, each met by"
            f" {result.slo.attainment:.1%} of requests; * misses it."
            " Saving is against static-max. Gap: way from voltanallm to the fluid bound."
        ),
    )
    for head in ("req/s", "policy", "W", "saving", "J/tok", "TTFT ok", "ITL ok", "gap"):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    groups: dict[Any, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    for run in result.runs:
        groups[run["rate_req_s"]].setdefault(run["policy"], []).append(run)
    for rate, by_policy in groups.items():
        full_w = _mean(by_policy.get("static-max", []), "mean_power_w")
        for number, (policy, runs) in enumerate(by_policy.items()):
            power_w = _mean(runs, "mean_power_w")
            saving = None if not full_w or power_w is None else 1.0 - power_w / full_w
            ttft, itl = _mean(runs, "ttft_attainment"), _mean(runs, "itl_attainment")
            table.add_row(
                "" if number else ("-" if rate is None else f"{rate:.4g}"),
                policy,
                _text(power_w, "{:.0f}"),
                "" if policy == "static-max" else _text(saving, "{:.1%}"),
                _text(_mean(runs, "energy_per_token_j"), "{:.4f}"),
                _met(ttft, result.slo.attainment),
                _met(itl, result.slo.attainment),
                _text(_mean(runs, "bound_gap_closed"), "{:.0%}"),
                end_section=number == len(by_policy) - 1,
            )
    console.print(table)


def _mean(runs: list[dict[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return sum(values) / len(values) if values else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _met(value: float | None, target: float) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}{' ' if value >= target else '*'}"


@app.command()
def policies() -> None:
    """List policies that compare can run."""
    from rich.console import Console

    from voltana_ctrl.policies import list_policies

    console = Console()
    for policy in list_policies():
        console.print(f"{policy.name}\n    {policy.summary}\n    {policy.source}", highlight=False)
    console.print("static-<MHz>\n    every instance at that clock, round robin", highlight=False)
    console.print("package.module:Class\n    your own, called with (fleet, slo)", highlight=False)


@app.command()
def profiles() -> None:
    """List profiles, and how well each is known."""
    from rich.console import Console
    from rich.table import Table

    from voltana_ctrl.profiles import list_profiles, load_profile

    table = Table()
    for head in ("profile", "GPUs", "clocks [MHz]", "status", "about"):
        table.add_column(head)
    for name in list_profiles():
        one = load_profile(name)
        clocks = f"{one.clocks_mhz[0]:g}..{one.clocks_mhz[-1]:g}"
        table.add_row(one.name, str(one.gpus), clocks, one.status, one.summary)
    Console().print(table)


if __name__ == "__main__":
    main()
