"""``voltana-ctrl controller``: one for the nodes and routers of a fleet."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana_ctrl.cli.options import above_zero, check_outputs
from voltana_ctrl.cli.running import (
    Promises,
    address,
    least_mhz,
    page_url,
    promises,
    run_agent,
    say,
    since_start,
    state_of,
    status_board,
    token_of,
)

EXAMPLES = ("voltana-ctrl controller --fleet fleet.toml --mode advise",)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from voltana_ctrl.control.base import Controller


def controller(
    fleet: Annotated[Path, typer.Option(help="TOML of [[instance]] tables, each with its engine.")],
    mode: Annotated[
        str, typer.Option(help="observe: reads only; advise: says what it would do; act: does it.")
    ] = "observe",
    policy: Annotated[str, typer.Option(help="See `voltana-ctrl policies`.")] = "mpc",
    slo: Annotated[str, typer.Option(help="TTFT, ITL in s, attainment.")] = "ttft=0.6,itl=0.06",
    tick_ms: Annotated[float, typer.Option(help="Control period.")] = 100.0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8791,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Token that they must show. [default: env VOLTANA_CTRL_TOKEN]"),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    min_mhz: Annotated[str | None, typer.Option(help="MHZ or ID=MHZ,...: never lower.")] = None,
    kill_file: Annotated[
        Path | None, typer.Option(help="When this file appears, all is given back.")
    ] = None,
    switchback: Annotated[
        float | None, typer.Option(help="Minutes: alternate policy and highest clock.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of its order. [default: drawn]")] = None,
    log: Annotated[Path | None, typer.Option(help="Write ticks to this .jsonl.")] = None,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Full log files become Parquet.")
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(help="[HOST:]PORT for Prometheus to scrape.")
    ] = None,
    spare: Annotated[
        float, typer.Option(help="Instances that each phase may lose and still serve.")
    ] = 0.0,
    forecast: Annotated[
        Path | None,
        typer.Option(help="CSV of t_s,req_s: arrivals from the start on that mpc is told of."),
    ] = None,
    power_budget_w: Annotated[
        str | None, typer.Option(help="W, or steps S:W,S:W from the start on, of the fleet.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="File that keeps what is learnt across restarts.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
) -> None:
    """Decide for a whole fleet, whose nodes run `agent --controller`, its clients `router`."""
    asked = promises(mode, slo, tick_ms / 1000.0, power_budget_w, policy, spare, forecast)
    above_zero(switchback=switchback, duration=duration)
    check_outputs({"log": log}, suffix=".jsonl")
    run_controller(
        fleet, asked, policy=policy, listen_at=f"{host}:{port}", token_file=token_file,
        tls_cert=tls_cert, tls_key=tls_key, kill_file=kill_file,
        switchback_s=None if switchback is None else 60.0 * switchback, seed=seed, log=log,
        parquet=parquet, metrics=metrics, min_mhz=min_mhz, duration_s=duration,
        state=state,
    )  # fmt: skip


def run_controller(
    fleet: Path,
    asked: Promises,
    *,
    policy: str,
    listen_at: str,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    kill_file: Path | None,
    switchback_s: float | None,
    seed: int | None,
    log: Path | None,
    parquet: bool,
    metrics: str | None,
    min_mhz: str | None,
    duration_s: float | None,
    state: Path | None = None,
) -> None:
    """Listen for nodes and routers, and decide until told to end."""
    from voltana_ctrl.backends.nvml.sweep import Sweep
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.live.agent import AgentSettings
    from voltana_ctrl.live.descent import Descent
    from voltana_ctrl.live.governed import fleet_policy
    from voltana_ctrl.live.hub import HubBackend
    from voltana_ctrl.live.hub_app import hub_app
    from voltana_ctrl.live.status_page import StatusPage, is_loopback
    from voltana_ctrl.profiles import dilation_of
    from voltana_ctrl.serving.server import ServerThread

    spec, _ = load_endpoints(fleet)
    host, port = address("serve", listen_at)
    token = token_of(token_file)
    slow = dilation_of(spec)
    hub = HubBackend(
        spec, policy=policy, budgeted=asked.budget is not None, valid_s=slow, silent_s=2.0 * slow,
        now_s=since_start(),
    )  # fmt: skip
    kept, learnt = state_of(state, spec)
    decides: Controller | None = None
    held_up: Callable[[], Mapping[str, str]] = dict
    if asked.mode != "observe":
        decides = fleet_policy(
            spec, asked.slo, policy, period_s=asked.period_s, power_budget=asked.budget,
            measured_delay_s=hub.delay_s, routed=hub.routed, learnt=learnt,
            spare=asked.spare, forecast=asked.forecast,
        )  # fmt: skip
        if asked.mode == "act":
            decides = descent = Descent(decides, asked.slo, budgeted=asked.budget is not None)
            held_up = descent.reasons
    if asked.mode != "act":
        hub.release()
    settings = AgentSettings(
        mode=asked.mode,
        kill_file=kill_file,
        switchback_s=switchback_s,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
        power_budget=asked.budget,
        min_mhz=least_mhz(min_mhz, spec),
    )
    with ExitStack() as ending:
        ending.enter_context(Sweep())
        board = status_board(
            ending, hub, asked, policy, links=hub.links, routed=hub.routed, held_up=held_up,
            unread=(),
        )  # fmt: skip
        is_open, secure = is_loopback(host), tls_cert is not None
        page = StatusPage(board, token=None if is_open else token, secure=secure)
        app = hub_app(hub, token, page=page)
        server = ServerThread(
            app, host, port, what="controller", tls_cert=tls_cert, tls_key=tls_key
        )
        ending.callback(server.close)
        ending.callback(page.close)
        say(f"controller of {len(spec)} instances on {host}:{server.port}")
        say(f"status page: {page_url(host, server.port, secure=secure)}")
        run_agent(
            ending, hub, decides, settings, asked.slo, log=log, parquet=parquet,
            metrics=metrics, duration_s=duration_s, period_s=asked.period_s, what="controller",
            observers=[board], state=kept,
        )  # fmt: skip
