"""``voltana-ctrl profile``: a live engine, measured over clocks and loads into a table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.cli.options import check_outputs, progress, whole
from voltana_ctrl.errors import BackendError, ConfigError

EXAMPLES = (
    "voltana-ctrl profile http://localhost:8000 --gpu GPU-8f6d0000 --dry-run",
    "voltana-ctrl profile http://localhost:8000 --gpu GPU-8f6d0000 --out table.csv",
)

#: Options of profile whose names differ from those of :class:`Engine` and :class:`Sweep`.
_FLAGS = {
    "gpus": "gpu",
    "prefill_gpus": "prefill-gpu",
    "decode_gpus": "decode-gpu",
    "freq_mhz": "freq-mhz",
    "clocks_mhz": "clocks",
    "batches_req": "batches",
    "contexts_tok": "contexts",
    "prompts_tok": "prompts",
    "prefill_batches_req": "prefill-batches",
    "caps_w": "caps",
    "mem_clocks_mhz": "mem-clocks",
    "output_tok": "output-tok",
    "steady_s": "steady",
    "pause_s": "pause",
    "cool_c": "cool-c",
    "temperature_limit_c": "max-c",
    "ttft_limit_s": "max-ttft",
    "itl_limit_s": "max-itl",
}


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
    caps: Annotated[
        str | None, typer.Option(help="Power caps of the engine in W, at the highest clock.")
    ] = None,
    mem_clocks: Annotated[
        str | None, typer.Option(help="Memory clocks in MHz, at the highest SM clock.")
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
    max_ttft: Annotated[
        float | None, typer.Option(help="Points of a longer TTFT in s are left out.")
    ] = None,
    max_itl: Annotated[
        float | None, typer.Option(help="Points of a longer ITL in s are left out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name at the engine. [default: ask]")] = None,
    words: Annotated[bool, typer.Option("--words", help="Prompts as words.")] = False,
    socket: Annotated[Path | None, typer.Option(help="Set through this setter's socket.")] = None,
    lock_dir: Annotated[
        Path | None, typer.Option(help="Of lock files, the same for all of a machine.")
    ] = None,
    restore_lock: Annotated[
        str | None, typer.Option(help="LO,HI in MHz: clock lock to leave behind.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its duration.")
    ] = False,
) -> None:
    """Measure a live engine over clocks and loads, for fit; resumable, gives the clocks back."""
    from rich.console import Console

    from voltana_ctrl.backends.nvml.lease import end_on_sigterm
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
    from voltana_ctrl.profiling.engine import Engine
    from voltana_ctrl.profiling.profiler import profile_engine
    from voltana_ctrl.profiling.sweep import Sweep, plan_profile, spread_clocks

    check_outputs({"out": out})
    with _named_by_flags():
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
        chosen = whole("clocks", clocks)
        if no_clock and chosen:
            raise ConfigError("profile: --no-clock sets nothing; leave --clocks out")
        if not (no_clock or chosen or freq_mhz is not None):
            chosen = spread_clocks(_ladder(engine.of("decode")[1][0], dry_run))
        sweep = Sweep(
            clocks_mhz=chosen,
            batches_req=whole("batches", batches),
            contexts_tok=whole("contexts", contexts),
            prompts_tok=whole("prompts", prompts),
            prefill_batches_req=whole("prefill-batches", prefill_batches),
            idle=freq_mhz is None,
            caps_w=whole("caps", caps),
            mem_clocks_mhz=whole("mem-clocks", mem_clocks),
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
    lock = whole("restore-lock", restore_lock)
    if len(lock) not in (0, 2):
        raise ConfigError(f"restore-lock: expected LO,HI such as 210,1200, got {restore_lock!r}")
    errors = Console(stderr=True)
    errors.print(plan_profile(sweep, out).text().splitlines()[0], highlight=False)
    with end_on_sigterm(), progress(errors) as on_progress:
        run = profile_engine(
            engine,
            sweep,
            out,
            setter=socket,
            lock_dir=lock_dir or LOCK_DIR,
            restore_lock_mhz=(lock[0], lock[1]) if lock else None,
            on_progress=lambda done, total, _what: on_progress(done, total),
        )
    typer.echo(run.text())


@contextmanager
def _named_by_flags() -> Iterator[None]:
    """What is refused is told by the names of the options."""
    try:
        yield
    except ConfigError as error:
        told = re.sub(r"\b(?:Engine|Sweep):", "profile:", str(error))
        for name, flag in _FLAGS.items():
            told = re.sub(rf"\b(?:(?:Engine|Sweep)\.)?{name}\b", f"--{flag}", told)
        raise ConfigError(told) from error


def _ladder(uuid: str, dry_run: bool) -> Sequence[int]:
    """Clocks of a GPU; a plan made where there is no driver takes those of an A100."""
    from voltana_ctrl.backends.nvml.driver import Nvml

    try:
        with Nvml() as nvml:
            return nvml.gpu(uuid).clocks_mhz
    except BackendError:
        if not dry_run:
            raise
    typer.echo(
        "no NVIDIA driver here, so that the GPU's clocks are not known: planned with those of an"
        " A100; give --clocks, or plan where the engine runs",
        err=True,
    )
    return range(210, 1411, 15)
