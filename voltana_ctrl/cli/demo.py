"""``voltana-ctrl demo``: the whole of it on emulated engines, on a laptop."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from voltana_ctrl.cli.options import above_zero
from voltana_ctrl.cli.running import TOKEN_VARIABLE, say

if TYPE_CHECKING:
    from voltana_ctrl.engines.emulated.fleet import EmulatedFleet
    from voltana_ctrl.types import Slo

EXAMPLES = ("voltana-ctrl demo", "voltana-ctrl demo --fleet 4C --policy cascade --rate 20")

PROFILE = "a100-sxm-80gb/llama-3.1-8b"
_EVERY_S = 5.0
#: Answers that attainment is told of: those that were asked for within this time.
_WINDOW_S = 120.0


def demo(
    fleet: Annotated[str, typer.Option(help="xPyD or xC of equal instances.")] = "2P2D",
    policy: Annotated[str, typer.Option(help="See `voltana-ctrl policies`.")] = "mpc",
    rate: Annotated[float, typer.Option(help="req/s, as if at true speed.")] = 12.0,
    dilation: Annotated[
        float, typer.Option(help="How many times as long everything takes, promises too.")
    ] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    faults: Annotated[
        Path | None, typer.Option(help="As of compare: TOML of failures, slow-downs, clamps.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
) -> None:
    """Start emulated engines, controller, agent, router and load; no GPU. Ctrl-C ends all."""
    above_zero(rate=rate, dilation=dilation, duration=duration)
    from voltana_ctrl.backends.nvml.lease import end_on_sigterm
    from voltana_ctrl.cli.faults import fault_schedule, faults_played
    from voltana_ctrl.engines.emulated.fleet import EmulatedFleet

    schedule = fault_schedule(faults, fleet, PROFILE)
    with end_on_sigterm(), ExitStack() as ending:
        say("starting emulated engines")
        running = ending.enter_context(EmulatedFleet(fleet, profile=PROFILE, dilation=dilation))
        stack = ending.enter_context(stack_on(running, policy))
        say(f"status page: {stack.page_url}/")
        say(f"requests begin: everything takes {dilation:g} times as long as on a GPU")
        ending.enter_context(faults_played(running, schedule, dilation))
        try:
            asyncio.run(_watch(running, stack.url, rate, seed, duration))
        except KeyboardInterrupt:
            say("ending; all GPUs are given back")


class Stack(NamedTuple):
    """Where a started stack is found: its router, and its controller with the status page."""

    url: str
    page_url: str


@contextmanager
def stack_on(
    running: EmulatedFleet, policy: str, *, routed: bool = True, controls: Sequence[str] = ()
) -> Iterator[Stack]:
    """Controller, agent and router on emulated engines.

    Without `routed` the router goes by load, and obeys nobody; `controls` are more options of the
    controller.
    """
    from voltana_ctrl.engines.emulated.fleet import free_ports

    controller, router = free_ports(2)
    at = f"http://127.0.0.1:{controller}"
    common = ["--fleet", str(running.fleet_file), "--slo", running.slo_text]
    acts = [*common, "--mode", "act"]
    routes = ["--policy", policy, "--controller", at] if routed else ["--policy", "static-max+jsq"]
    with ExitStack() as ending:
        for told in (
            ["controller", *acts, "--policy", policy, "--port", str(controller), *controls],
            ["agent", *acts, "--controller", at, "--lock-dir", str(running.folder / "locks")],
            ["router", *common, *routes, "--port", str(router)],
        ):
            ending.enter_context(_command(running, told))
        yield Stack(url=f"http://127.0.0.1:{router}", page_url=at)


@contextmanager
def _command(running: EmulatedFleet, told: list[str]) -> Iterator[None]:
    """One of our own commands in a process of its own, on the fake driver."""
    secret = os.environ.setdefault(TOKEN_VARIABLE, secrets.token_urlsafe(32))
    log = (running.folder / f"{told[0]}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "voltana_ctrl.cli", *told],
        env={**running.env, TOKEN_VARIABLE: secret},
        stderr=log,
        # Ctrl-C is ours to act on: they end when they are told to, in order.
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


async def answers(url: str, limit_s: float) -> bool:
    """Wait until a server answers."""
    until_s = time.monotonic() + limit_s
    port = int(url.rpartition(":")[2])
    while time.monotonic() < until_s:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.2)
            continue
        writer.close()
        return True
    return False


async def _watch(
    running: EmulatedFleet, url: str, rate_req_s: float, seed: int, duration_s: float | None
) -> None:
    """Send requests, and say every few seconds what the fleet does."""
    from voltana_ctrl.engines.emulated.load import play
    from voltana_ctrl.errors import BackendError
    from voltana_ctrl.sim.workload import make_workload
    from voltana_ctrl.types import Slo

    dilation = float(running.profile.rpartition("@")[2]) if "@" in running.profile else 1.0
    slo = Slo.parse(running.slo_text)
    if not await answers(url, 120.0):
        log = (running.folder / "router.log").read_text(encoding="utf-8", errors="replace")
        raise BackendError(f"demo: the router does not answer: {log[-300:]}")
    begin_s = last_s = time.monotonic()
    energy_j = before_j = _energy_j(running)
    span_s = duration_s or 24 * 3600.0
    work = make_workload("sharegpt", rate_req_s=rate_req_s, duration_s=span_s / dilation, seed=seed)
    told: list[tuple[float, float, float]] = []
    playing = asyncio.create_task(
        play(url, work, dilation=dilation, on_answer=lambda *one: told.append(one))
    )
    try:
        while time.monotonic() - begin_s < span_s and not playing.done():
            await asyncio.sleep(_EVERY_S)
            now_s, energy_j = time.monotonic(), _energy_j(running)
            power_w = (energy_j - before_j) / (now_s - last_s)
            last_s, before_j = now_s, energy_j
            recent = [one for one in told if now_s - one[0] <= _WINDOW_S]
            del told[: len(told) - len(recent)]
            say(_line(running, now_s - begin_s, power_w, recent, slo))
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


def _energy_j(running: EmulatedFleet) -> float:
    return sum(gpu.energy_j for gpu in running.fake.gpus)


def _line(
    running: EmulatedFleet,
    span_s: float,
    power_w: float,
    recent: list[tuple[float, float, float]],
    slo: Slo,
) -> str:
    clocks = " ".join(f"{gpu.clock_mhz:.0f}" for gpu in running.fake.gpus)
    met = "no answers yet"
    if recent:
        ttft = sum(one[1] <= slo.ttft_s for one in recent) / len(recent)
        itl = sum(one[2] <= slo.itl_s for one in recent) / len(recent)
        met = f"TTFT {100 * ttft:.1f} %, ITL {100 * itl:.1f} % of {len(recent)} answers in time"
    return f"{span_s:5.0f} s  {power_w:5.0f} W  {clocks} MHz  {met}"
