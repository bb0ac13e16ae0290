"""``voltana-ctrl emulate``: engines without a model on GPUs that are none, for rehearsals."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from voltana_ctrl.cli.options import above_zero
from voltana_ctrl.cli.running import say

EXAMPLES = ("voltana-ctrl emulate --fleet 2P2D", "voltana-ctrl emulate --fleet 4C --nodes 2")


def emulate(
    fleet: Annotated[str, typer.Option(help="xPyD or xC of equal instances.")] = "2P2D",
    profile: Annotated[
        str, typer.Option(help="GPU and model that they are like; see `voltana-ctrl profiles`.")
    ] = "a100-sxm-80gb/llama-3.1-8b",
    dilation: Annotated[
        float, typer.Option(help="How many times as long everything takes, promises too.")
    ] = 10.0,
    slo: Annotated[
        str, typer.Option(help="TTFT and ITL in s, before they are stretched.")
    ] = "ttft=0.6,itl=0.06",
    folder: Annotated[
        Path | None, typer.Option(help="Where its files go. [default: one that goes with it]")
    ] = None,
    governed: Annotated[
        bool, typer.Option(help="Whether engines host governors; else agents choose at ticks.")
    ] = True,
    nodes: Annotated[int, typer.Option(help="Machines that they are spread over, in turn.")] = 1,
    faults: Annotated[
        Path | None, typer.Option(help="As of compare: TOML of failures, slow-downs, clamps.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
) -> None:
    """Start a fleet of emulated engines, and say how to run the other commands on it."""
    above_zero(dilation=dilation, duration=duration, nodes=nodes)
    from voltana_ctrl.backends.nvml.lease import end_on_sigterm
    from voltana_ctrl.cli.faults import fault_schedule, faults_played
    from voltana_ctrl.engines.emulated.fleet import EmulatedFleet

    schedule = fault_schedule(faults, fleet, profile)
    with (
        end_on_sigterm(),
        EmulatedFleet(
            fleet, profile=profile, dilation=dilation, slo=slo, folder=folder, governed=governed,
            nodes=nodes,
        ) as running,
    ):  # fmt: skip
        say(f"{len(running.spec)} emulated engines serve, {dilation:g} times as slow as real ones")
        for name, url in zip(running.spec.ids, running.urls, strict=True):
            say(f"{name}: {url}")
        library = running.fake.library.parent
        typer.echo(f"export FAKE_NVML_STATE={running.env['FAKE_NVML_STATE']}")
        typer.echo(f"export LD_LIBRARY_PATH={library}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")
        common = f"--fleet {running.fleet_file} --slo {running.slo_text}"
        locks = f"--lock-dir {running.folder / 'locks'}"
        if nodes == 1:
            say("all in one process, in another shell; clients ask the address that it names:")
            typer.echo(f"voltana-ctrl serve --mode act {common} {locks}")
            say("or each part by itself, with one token for all of them:")
        else:
            say("several nodes are several agents, with one token for all parts:")
        typer.echo(
            "export VOLTANA_CTRL_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex())')"
        )
        at = "--controller http://127.0.0.1:8791"
        typer.echo(f"voltana-ctrl controller --mode act {common} --port 8791")
        for node in (f"node{k}" for k in range(min(nodes, len(running.spec)))):
            typer.echo(f"voltana-ctrl agent --mode act {common} {locks} --node {node} {at}")
        typer.echo(f"voltana-ctrl router {common} {at}")
        ended = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, lambda *_: ended.set())
        with faults_played(running, schedule, dilation):
            ended.wait(duration)
