"""``voltana-ctrl serve``: router, controller and agent of one machine in one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana_ctrl.cli.options import above_zero, check_outputs
from voltana_ctrl.cli.running import (
    canaries,
    ceilings,
    check_actuators,
    least_mhz,
    open_node,
    own_cpus,
    own_engines,
    page_token,
    promises,
    run_agent,
    say,
    serve_page,
    state_of,
    status_board,
    unread,
    with_actuators,
)

if TYPE_CHECKING:
    import uvicorn

    from voltana_ctrl.control.base import Controller
    from voltana_ctrl.router.app import Proxy


EXAMPLES = ("voltana-ctrl serve --fleet fleet.toml --mode advise",)


def serve(
    fleet: Annotated[Path, typer.Option(help="TOML of [[instance]] tables, each with its engine.")],
    mode: Annotated[
        str, typer.Option(help="observe: reads only; advise: says what it would do; act: does it.")
    ] = "observe",
    policy: Annotated[str, typer.Option(help="See `voltana-ctrl policies`.")] = "mpc",
    slo: Annotated[str, typer.Option(help="TTFT, ITL in s, attainment.")] = "ttft=0.6,itl=0.06",
    tick_ms: Annotated[float, typer.Option(help="Control period.")] = 100.0,
    host: Annotated[str, typer.Option(help="Address to listen on, for clients.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on, for clients.")] = 8790,
    canary: Annotated[
        str | None, typer.Option(help="ID,...: only these instances are ever set.")
    ] = None,
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
    page: Annotated[
        str | None, typer.Option(help="[HOST:]PORT of the status page. [default: 8791]")
    ] = None,
    actuators: Annotated[
        bool, typer.Option("--actuators", help="Set caps, memory and CPU clocks, too, as measured.")
    ] = False,
    park_memory: Annotated[
        bool, typer.Option("--park-memory", help="Lowest memory clock where parked and idle.")
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
    gpu_power_limit: Annotated[
        list[str] | None, typer.Option(help="[ID=]W per GPU, kept; may be repeated.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable with the bearer token that clients must show.")
    ] = None,
    engine_api_key_env: Annotated[
        str | None, typer.Option(help="Variable with the bearer token shown to engines.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    lock_dir: Annotated[
        Path | None, typer.Option(help="Of lock files, the same for all of a machine.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="Set through this setter's socket.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="File that keeps what is learnt across restarts.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
) -> None:
    """Route, decide and set clocks on one machine; clients come to --host and --port."""
    asked = promises(mode, slo, tick_ms / 1000.0, power_budget_w, policy, spare, forecast)
    above_zero(switchback=switchback, duration=duration)
    check_outputs({"log": log}, suffix=".jsonl")
    token = page_token(page)
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
    from voltana_ctrl.backends.nvml.sweep import Sweep
    from voltana_ctrl.cli.router import secret_of
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.engines.traffic import Traffic
    from voltana_ctrl.live.agent import AgentSettings
    from voltana_ctrl.live.descent import Descent
    from voltana_ctrl.live.governed import node_policy
    from voltana_ctrl.live.pod_power import power_limits_w
    from voltana_ctrl.live.subscription import SubscribedRouters
    from voltana_ctrl.profiles import dilation_of
    from voltana_ctrl.router.app import Proxy
    from voltana_ctrl.router.server import proxy_server
    from voltana_ctrl.serving.server import listen

    spec, endpoints = load_endpoints(fleet)
    own = own_engines(spec, endpoints, None)
    chosen = canaries(canary, own)
    limits_w = power_limits_w(
        list(spec.ids), given=gpu_power_limit or (), annotations=None, environment=os.environ
    )
    check_actuators(actuators, park_memory, mode, bool(limits_w))
    cpus = own_cpus(spec, own) if actuators else {}
    kept, learnt = state_of(state, spec)
    with ExitStack() as ending:
        ending.enter_context(Sweep(lock_dir or LOCK_DIR))
        settings = AgentSettings(
            mode=asked.mode,
            kill_file=kill_file,
            switchback_s=None if switchback is None else 60.0 * switchback,
            seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
            power_budget=asked.budget,
            ceiling_mhz=ceilings(spec, limits_w),
            min_mhz=least_mhz(min_mhz, spec),
            unread=unread(spec, own),
        )
        traffic = Traffic(len(spec))
        routers = SubscribedRouters(spec, policy, asked.slo, valid_s=dilation_of(spec))
        proxy = Proxy(
            spec,
            endpoints,
            routers=routers,
            traffic=traffic,
            api_key=secret_of(api_key_env),
            engine_api_key=secret_of(engine_api_key_env),
        )
        server = proxy_server(proxy, host=host, port=port, tls_cert=tls_cert, tls_key=tls_key)
        listening = listen(host, port, what="serve")
        backend, delay_s, _ = open_node(
            spec, own, chosen, mode, socket=socket, lock_dir=lock_dir, policy=policy,
            slo=asked.slo, ceiling_mhz=settings.ceiling_mhz, traffic=traffic,
            actuators=actuators, park_memory=park_memory, cpus=cpus,
        )  # fmt: skip
        ending.callback(backend.close)
        backend.budgeted = bool(limits_w) or asked.budget is not None
        decides: Controller | None = None
        held_up: Callable[[], Mapping[str, str]] = dict
        if mode != "observe":
            decides = node_policy(
                spec, asked.slo, policy, period_s=asked.period_s, power_budget=asked.budget,
                delay_s=delay_s, held=backend.held, routed=lambda: asked.mode == "act",
                learnt=learnt, spare=asked.spare, forecast=asked.forecast,
            )  # fmt: skip
            if asked.mode == "act":
                decides = descent = Descent(decides, asked.slo, budgeted=asked.budget is not None)
                held_up = descent.reasons
            if actuators:
                decides = with_actuators(decides, backend)
        ending.enter_context(_in_a_thread(server, proxy, listening))
        scheme = "http" if tls_cert is None else "https"
        say(f"{policy} routes on {scheme}://{host}:{listening[0].getsockname()[1]}")
        board = status_board(
            ending, backend, asked, policy, routed=lambda: asked.mode == "act",
            held_up=held_up, unread=settings.unread,
        )  # fmt: skip
        serve_page(ending, board, page, token)
        run_agent(
            ending, backend, decides, settings, asked.slo, log=log, parquet=parquet,
            metrics=metrics, duration_s=duration, period_s=asked.period_s,
            # Who only watches or advises leaves the routing to the load.
            router=routers if asked.mode == "act" else None, observers=[proxy.energy, board],
            what="serve", watched_by=proxy, state=kept, own=own,
        )  # fmt: skip


@contextmanager
def _in_a_thread(server: uvicorn.Server, proxy: Proxy, listening: list) -> Iterator[None]:  # type: ignore[type-arg]
    """Serve beside the control loop, which has the main thread and its signals."""
    thread = threading.Thread(
        target=server.run, args=(listening,), name="voltana-ctrl-router", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        proxy.is_draining = True
        server.should_exit = True
        thread.join(proxy.limits.drain_s + 5.0)
