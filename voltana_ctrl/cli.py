"""Command line: ``voltana-ctrl compare | policies | profiles | fit | profile | doctor | agent``."""

from __future__ import annotations

import os
import sys
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

#: Policies that are asked at every tick, which takes longer than the simulation.
_PYTHON_POLICIES = ("mpc", "cascade", "voltanallm-adaptive")

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
    power_budget_w: Annotated[
        str | None,
        typer.Option(help="Limit on the fleet: W, or steps s:W,... from the warm-up's start."),
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

    from voltana_ctrl import experiment
    from voltana_ctrl.policies import HEADLINE
    from voltana_ctrl.report import check_plot, print_table, write_html, write_plot
    from voltana_ctrl.types import PowerBudget, Slo

    if jobs < 0:
        raise ConfigError(f"jobs: expected 0 or more, got {jobs}")
    shown = [part.strip() for part in figures.split(",")] if figures else []
    drawn = html_path is not None or plot_path is not None
    _check_outputs({"json": json_path, "html": html_path, "plot": plot_path})
    if drawn or shown:
        check_plot(plot_path, shown)
    rates = _numbers("rate", rate)
    names = [part.strip() for part in policies.split(",")] if policies else list(HEADLINE)
    promises = Slo.parse(slo)
    power_budget = None if power_budget_w is None else PowerBudget.parse(power_budget_w)
    settings = _settings(actuation_ms, settle_ms, jitter)
    errors = Console(stderr=True)
    with errors.status("loading the simulator (compiled once per machine)"):
        import voltana_ctrl._kernels.plant  # noqa: F401
    loads = rates or list(experiment.DEFAULT_RATES_REQ_S)
    span_s = (duration + warmup) * max(1, seeds)
    # A million requests or 400 decisions in Python take about a second.
    work_s = sum(loads) * span_s * len(names) / 1e6
    asked = [name for name in names if ":" in name or name in _PYTHON_POLICIES]
    work_s += len(loads) * span_s / max(tick_ms, 1e-3) * 1e3 * len(asked) / 400.0
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
            power_budget=power_budget,
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


def _check_outputs(paths: dict[str, Path | None]) -> None:
    """Refuse files that could not be written, before anything runs."""
    for name, path in paths.items():
        if path is None:
            continue
        if not path.resolve().parent.is_dir():
            raise ConfigError(f"{name}: folder {path.resolve().parent} does not exist; make it")
        if path.is_dir():
            raise ConfigError(f"{name}: expected a file, got the folder {path}")


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


@app.command()
def fit(
    tables: Annotated[list[Path], typer.Argument(help="CSV or Parquet of measured iterations.")],
    like: Annotated[
        str, typer.Option(help="Profile that tells what iterations do not: memory, KV link.")
    ] = "a100-sxm-80gb/llama-3.1-8b",
    name: Annotated[str, typer.Option(help="gpu/model of the new profile.")] = "my-gpu/my-model",
    out: Annotated[Path | None, typer.Option(help="Write the profile to this .toml.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write diagnostics to this image.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE: rows to use; may be repeated.")
    ] = None,
    fix: Annotated[
        list[str] | None, typer.Option(help="PARAMETER=VALUE: not fitted; may be repeated.")
    ] = None,
    ladder: Annotated[
        str | None, typer.Option(help="Supported clocks LOW:HIGH:STEP. [default: those measured]")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the instance.")] = None,
    freq_mhz: Annotated[
        float | None, typer.Option(help="SM clock, where the table has no column for it.")
    ] = None,
) -> None:
    """Identify a profile from measured iterations; refuses what the table cannot support."""
    from voltana_ctrl.fit import fit_table
    from voltana_ctrl.profiles import load_profile
    from voltana_ctrl.report import check_plot, write_fit_plot

    _check_outputs({"out": out, "plot": plot})
    if plot is not None:
        check_plot(plot)
    donor = load_profile(like)
    result = fit_table(
        tables,
        where=dict(_pairs("where", where)) or None,
        gpus=gpus,
        freq_mhz=freq_mhz,
        fixed={key: _number("fix", value) for key, value in _pairs("fix", fix)} or None,
    )
    if out is not None:
        result.save(out, name, donor, ladder_mhz=_ladder(ladder))
    if plot is not None:
        write_fit_plot(result, plot)
    typer.echo(result.summary())


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"{option}: expected NAME=VALUE, got {text!r}")
    return key, value


def _pairs(option: str, texts: list[str] | None) -> list[tuple[str, str]]:
    return [_pair(option, text) for text in texts or []]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: expected a number, got {text!r}") from None


def _ladder(text: str | None) -> list[float] | None:
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 3:
        raise ConfigError(f"ladder: expected LOW:HIGH:STEP such as 210:1410:15, got {text!r}")
    low, high, step = (_number("ladder", part) for part in parts)
    if not (0.0 < low <= high and step > 0.0):
        raise ConfigError(f"ladder: expected 0 < LOW <= HIGH and STEP > 0, got {text!r}")
    return [low + step * k for k in range(int((high - low) / step + 1e-9) + 1)]


@app.command()
def profile(
    url: Annotated[str, typer.Argument(help="Engine, such as http://localhost:8000.")],
    out: Annotated[Path, typer.Option(help="Table; points in it are not measured again.")] = Path(
        "table.csv"
    ),
    gpu: Annotated[
        list[str] | None, typer.Option(help="UUID of a GPU of the engine; may be repeated.")
    ] = None,
    prefill_url: Annotated[str | None, typer.Option(help="Engine for prefill.")] = None,
    decode_url: Annotated[str | None, typer.Option(help="Engine for decode.")] = None,
    prefill_gpu: Annotated[list[str] | None, typer.Option(help="Its GPUs.")] = None,
    decode_gpu: Annotated[list[str] | None, typer.Option(help="Its GPUs.")] = None,
    clocks: Annotated[
        str | None, typer.Option(help="SM clocks in MHz, 210,705,... [default: 7 of the GPU's]")
    ] = None,
    no_clock: Annotated[
        bool, typer.Option("--no-clock", help="Set nothing; measure at the clock as it is.")
    ] = False,
    freq_mhz: Annotated[
        float | None, typer.Option(help="Clock, where no GPU is given to read it from.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Decode batches.")] = "1,8,9,16,17,32,33,64,65",
    contexts: Annotated[str, typer.Option(help="Decode contexts in tokens.")] = "256,2048",
    prompts: Annotated[str, typer.Option(help="Prefill prompts in tokens.")] = "128,512,2048,8192",
    prefill_batches: Annotated[str, typer.Option(help="Prompts at once.")] = "1",
    steady: Annotated[float, typer.Option(help="Seconds per point.")] = 5.0,
    pause: Annotated[float, typer.Option(help="Cooling pause in seconds.")] = 1.0,
    output_tok: Annotated[int, typer.Option(help="Longest decode stream in tokens.")] = 1024,
    cool_c: Annotated[int | None, typer.Option(help="Pause until no GPU is hotter.")] = None,
    max_c: Annotated[int, typer.Option(help="A hotter GPU ends the profile.")] = 85,
    max_ttft: Annotated[float | None, typer.Option(help="TTFT in s that ends it.")] = None,
    max_itl: Annotated[float | None, typer.Option(help="ITL in s that ends it.")] = None,
    model: Annotated[str | None, typer.Option(help="Name at the engine. [default: ask]")] = None,
    words: Annotated[bool, typer.Option("--words", help="Prompts as words.")] = False,
    setter: Annotated[Path | None, typer.Option(help="Socket of the privileged setter.")] = None,
    restore_lock: Annotated[
        str | None, typer.Option(help="LO,HI in MHz: clock lock to leave behind.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its duration.")
    ] = False,
) -> None:
    """Measure a live engine over clocks and loads, for fit; resumable, gives the clocks back."""
    from rich.console import Console

    from voltana_ctrl.backends.lease import end_on_sigterm
    from voltana_ctrl.backends.nvml import Nvml
    from voltana_ctrl.integrations import (
        Engine,
        Sweep,
        plan_profile,
        profile_engine,
        spread_clocks,
    )

    _check_outputs({"out": out})
    engine = Engine(
        url=url,
        gpus=tuple(gpu or ()),
        prefill_url=prefill_url,
        decode_url=decode_url,
        prefill_gpus=tuple(prefill_gpu or ()),
        decode_gpus=tuple(decode_gpu or ()),
        model=model,
        words=words,
        api_key=os.environ.get("OPENAI_API_KEY"),
        freq_mhz=freq_mhz,
    )
    chosen = _whole("clocks", clocks)
    if no_clock and chosen:
        raise ConfigError("profile: --no-clock sets nothing; leave --clocks out")
    if not (no_clock or chosen or freq_mhz is not None):
        with Nvml() as nvml:
            chosen = spread_clocks(nvml.gpu(engine.of("decode")[1][0]).clocks_mhz)
    sweep = Sweep(
        clocks_mhz=chosen,
        batches_req=_whole("batches", batches),
        contexts_tok=_whole("contexts", contexts),
        prompts_tok=_whole("prompts", prompts),
        prefill_batches_req=_whole("prefill-batches", prefill_batches),
        idle=freq_mhz is None,
        output_tok=output_tok,
        steady_s=steady,
        pause_s=pause,
        cool_c=cool_c,
        temperature_limit_c=max_c,
        ttft_limit_s=max_ttft,
        itl_limit_s=max_itl,
    )
    if dry_run:
        typer.echo(plan_profile(sweep, out).text())
        return
    lock = _whole("restore-lock", restore_lock)
    if len(lock) not in (0, 2):
        raise ConfigError(f"restore-lock: expected LO,HI such as 210,1200, got {restore_lock!r}")
    errors = Console(stderr=True)
    errors.print(plan_profile(sweep, out).text().splitlines()[0], highlight=False)
    with end_on_sigterm(), _progress(errors) as on_progress:
        run = profile_engine(
            engine,
            sweep,
            out,
            setter=setter,
            restore_lock_mhz=(lock[0], lock[1]) if lock else None,
            on_progress=lambda done, total, _what: on_progress(done, total),
        )
    typer.echo(run.text())


def _whole(option: str, text: str | None) -> tuple[int, ...]:
    return tuple(int(_number(option, part)) for part in (text or "").split(",") if part.strip())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    actuate: Annotated[
        bool,
        typer.Option("--actuate", help="Lock each free GPU to its highest clock for a moment."),
    ] = False,
) -> None:
    """Say what this machine can do: GPUs, clocks, permissions, clamps; reads only."""
    from voltana_ctrl.backends.doctor import examine

    report = examine(actuate=actuate)
    typer.echo(report.json() if as_json else report.text())


@app.command()
def agent(
    setter: Annotated[
        bool, typer.Option("--setter", help="Run the privileged setter of this node.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="UUID of a GPU it may set; may be repeated.")
    ] = None,
    uid: Annotated[
        list[int] | None, typer.Option(help="User id that may ask; may be repeated.")
    ] = None,
    low_mhz: Annotated[int, typer.Option(help="Lowest clock it sets.")] = 0,
    high_mhz: Annotated[int, typer.Option(help="Highest clock it sets.")] = 100_000,
    max_sets_s: Annotated[float, typer.Option(help="Sets per second and GPU.")] = 50.0,
    socket: Annotated[Path | None, typer.Option(help="Unix socket to listen on.")] = None,
) -> None:
    """Set clocks for a server that is not root; ends, and gives back, on SIGTERM or Ctrl-C."""
    if not setter:
        raise ConfigError("agent: expected --setter; other modes of the agent do not exist yet")
    for name, given in (("gpu UUID", gpu), ("uid NUMBER", uid)):
        if not given:
            raise ConfigError(f"agent --setter: expected at least one --{name}, got none")
    from voltana_ctrl.backends.setter import run_setter
    from voltana_ctrl.backends.setter_client import SETTER_SOCKET

    run_setter(
        gpu or [],
        uid or [],
        socket or SETTER_SOCKET,
        lo_mhz=low_mhz,
        hi_mhz=high_mhz,
        max_sets_s=max_sets_s,
    )


@app.command()
def policies() -> None:
    """List policies that compare can run."""
    from rich.console import Console

    from voltana_ctrl.policies import ROUTERS, list_policies

    console = Console()
    for policy in list_policies():
        console.print(f"{policy.name}\n    {policy.summary}\n    {policy.source}", highlight=False)
    for form, meaning in (
        ("static-<MHz>", "every instance at that clock, round robin"),
        ("pack-<MHz>", "pack, planned for that clock"),
        ("package.module:Class", "your own, called with (fleet, slo)"),
        (
            "<policy>+<decode router>, <policy>+<prefill router>/<decode router>",
            f"with routers of {', '.join(ROUTERS)}",
        ),
    ):
        console.print(f"{form}\n    {meaning}", highlight=False, markup=False)


@app.command()
def profiles() -> None:
    """List profiles, and how well each is known."""
    from rich.console import Console
    from rich.table import Table

    from voltana_ctrl.profiles import list_profiles, load_profile

    table = Table()
    for head in ("profile", "GPUs", "clocks [MHz]", "status", "about"):
        table.add_column(head, no_wrap=head == "profile")
    for name in list_profiles():
        one = load_profile(name)
        clocks = f"{one.clocks_mhz[0]:g}..{one.clocks_mhz[-1]:g}"
        table.add_row(one.name, str(one.gpus), clocks, one.status, one.summary)
    Console().print(table)


if __name__ == "__main__":
    main()
