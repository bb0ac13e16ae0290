"""``voltana-ctrl agent``: looks after the engines of a node."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana_ctrl.cli.controller import run_controller
from voltana_ctrl.cli.dashboard import dashboard as print_dashboard
from voltana_ctrl.cli.options import above_zero, check_outputs
from voltana_ctrl.cli.running import (
    Once,
    canaries,
    ceilings,
    check_actuators,
    least_mhz,
    open_node,
    own_cpus,
    own_engines,
    promises,
    run_agent,
    state_of,
    token_of,
    unread,
    warn_former,
    with_actuators,
)
from voltana_ctrl.cli.setter import setter as run_setter
from voltana_ctrl.errors import ConfigError

if TYPE_CHECKING:
    from voltana_ctrl.control.base import Controller
    from voltana_ctrl.live.governed import PolicyController
    from voltana_ctrl.live.node import NodeBackend
    from voltana_ctrl.types import FleetSpec, Slo

EXAMPLES = (
    "voltana-ctrl agent --fleet fleet.toml",
    "voltana-ctrl agent --fleet fleet.toml --mode advise --log ticks.jsonl --metrics 9400",
    "voltana-ctrl agent --fleet fleet.toml --mode act --canary decode-0",
)


def agent(
    mode: Annotated[
        str, typer.Option(help="observe: reads only; advise: says what it would do; act: does it.")
    ] = "observe",
    fleet: Annotated[
        Path | None, typer.Option(help="TOML of [[instance]] tables, each with its engine.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Only instances whose node is this. [default: all]")
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="URL of the fleet's; without, decides by itself.")
    ] = None,
    policy: Annotated[str, typer.Option(help="See `voltana-ctrl policies`.")] = "mpc",
    slo: Annotated[str, typer.Option(help="TTFT, ITL in s, attainment.")] = "ttft=0.6,itl=0.06",
    tick_ms: Annotated[float, typer.Option(help="Control period.")] = 100.0,
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
        str | None, typer.Option(help="W, or steps S:W,S:W, of the fleet.")
    ] = None,
    gpu_power_limit: Annotated[
        list[str] | None, typer.Option(help="[ID=]W per GPU, kept; may be repeated.")
    ] = None,
    pod_annotations: Annotated[
        Path | None, typer.Option(help="Pod annotations of the downward API; limits in it kept.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Controller's token. [default: env VOLTANA_CTRL_TOKEN]")
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authorities that sign its certificate, if private.")
    ] = None,
    lock_dir: Annotated[
        Path | None, typer.Option(help="Of lock files, the same for all of a machine.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="Set through this setter's socket.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="File that keeps what is learnt across restarts.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
    serve: Annotated[str | None, typer.Option(hidden=True)] = None,
    tls_cert: Annotated[Path | None, typer.Option(hidden=True)] = None,
    tls_certificate: Annotated[Path | None, typer.Option(hidden=True)] = None,
    tls_key: Annotated[Path | None, typer.Option(hidden=True)] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", hidden=True)] = False,
    setter: Annotated[bool, typer.Option("--setter", hidden=True)] = False,
    gpu: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    uid: Annotated[list[int] | None, typer.Option(hidden=True)] = None,
    low_mhz: Annotated[int, typer.Option(hidden=True)] = 0,
    high_mhz: Annotated[int, typer.Option(hidden=True)] = 100_000,
    max_sets_s: Annotated[float, typer.Option(hidden=True)] = 50.0,
) -> None:
    """Watch, advise or control the engines of a node; SIGTERM ends, SIGUSR1 gives back."""
    warn_former(
        dashboard=(dashboard, "voltana-ctrl dashboard"),
        setter=(setter, "voltana-ctrl setter"),
        serve=(serve, "voltana-ctrl controller --host HOST --port PORT"),
    )
    if dashboard:
        print_dashboard()
        return
    if setter:
        run_setter(gpu, uid, socket, low_mhz, high_mhz, max_sets_s)
        return
    if fleet is None:
        raise ConfigError("agent: expected --fleet FILE.toml")
    if controller is not None and serve is not None:
        raise ConfigError("agent: expected --controller at a node or --serve, got both")
    asked = promises(mode, slo, tick_ms / 1000.0, power_budget_w, policy, spare, forecast)
    above_zero(switchback=switchback, duration=duration)
    check_outputs({"log": log}, suffix=".jsonl")
    if serve is not None:
        run_controller(
            fleet, asked, policy=policy, listen_at=serve, token_file=token_file,
            tls_cert=tls_cert or tls_certificate, tls_key=tls_key, kill_file=kill_file,
            switchback_s=None if switchback is None else 60.0 * switchback, seed=seed, log=log,
            parquet=parquet, metrics=metrics, min_mhz=min_mhz, duration_s=duration,
            state=state,
        )  # fmt: skip
        return
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
    from voltana_ctrl.backends.nvml.sweep import Sweep
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.live.agent import AgentSettings
    from voltana_ctrl.live.pod_power import power_limits_w

    spec, endpoints = load_endpoints(fleet)
    own = own_engines(spec, endpoints, node)
    chosen = canaries(canary, own)
    limits_w = power_limits_w(
        [one.instance for one in own],
        given=gpu_power_limit or (),
        annotations=pod_annotations,
        environment=os.environ,
    )
    check_actuators(actuators, park_memory, mode, bool(limits_w))
    cpus = own_cpus(spec, own) if actuators else {}
    if asked.budget is not None and controller is not None:
        raise ConfigError("power-budget-w: give it to the controller, not to its nodes")
    if state is not None and controller is not None:
        raise ConfigError("state: give it to the controller, which learns, not to its nodes")
    kept, learnt = state_of(state, spec)
    token = token_of(token_file) if controller is not None and mode != "observe" else ""
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
            obeys=controller is not None,
            unread=unread(spec, own),
        )
        backend, delay_s, notes = open_node(
            spec, own, chosen, mode, socket=socket, lock_dir=lock_dir, policy=policy,
            slo=asked.slo, ceiling_mhz=settings.ceiling_mhz, pairs=controller is None,
            actuators=actuators, park_memory=park_memory, cpus=cpus,
        )  # fmt: skip
        ending.callback(backend.close)
        limited = bool(limits_w)
        backend.budgeted = limited or asked.budget is not None
        decides: Controller | None = None
        if mode != "observe" and controller is not None:
            decides = _remote(
                ending, spec, backend, controller, token, node, [one.instance for one in own],
                asked.slo, asked.period_s, delay_s, tls_ca, limited,
            )  # fmt: skip
        elif mode != "observe":
            from voltana_ctrl.live.descent import Descent
            from voltana_ctrl.live.governed import node_policy

            decides = node_policy(
                spec, asked.slo, policy, period_s=asked.period_s, power_budget=asked.budget,
                delay_s=delay_s, held=backend.held, learnt=learnt, spare=asked.spare,
                forecast=asked.forecast,
            )  # fmt: skip
            if mode == "act":
                decides = Descent(decides, asked.slo, budgeted=asked.budget is not None)
        if actuators and decides is not None:
            decides = with_actuators(decides, backend)
        run_agent(
            ending, backend, decides, settings, asked.slo, log=log, parquet=parquet,
            metrics=metrics, duration_s=duration, period_s=asked.period_s,
            observers=[Once(notes)], state=kept, own=own,
        )  # fmt: skip


def _remote(
    ending: ExitStack,
    fleet: FleetSpec,
    backend: NodeBackend,
    url: str,
    token: str,
    node: str | None,
    ids: list[str],
    slo: Slo,
    period_s: float,
    delay_s: float,
    tls_ca: Path | None,
    limited: bool,
) -> PolicyController:
    """Controller of a node that does what another says, with governors where engines have none."""
    from voltana_ctrl.live.governed import PolicyController, node_governors
    from voltana_ctrl.live.link import ControllerLink
    from voltana_ctrl.live.remote import RemoteController
    from voltana_ctrl.profiles import dilation_of

    name = node or platform.node() or "node"
    link = ControllerLink(
        url, token, fleet, name, ids, tls_ca=tls_ca, problems=backend.problems,
        delay_s=backend.delay_s, hold_s=dilation_of(fleet),
    )  # fmt: skip
    ending.callback(link.close)

    def take_policy(policy: str) -> None:
        if policy != backend.policy or not taken:
            taken.append(policy)
            backend.policy = policy
            governed.governors = node_governors(
                fleet, slo, policy, delay_s=delay_s, period_s=period_s
            )

    def take_budget(budgeted: bool) -> None:
        # A limit of this node's own holds whatever the controller has.
        backend.budgeted = budgeted or limited

    taken: list[str] = []
    governed = PolicyController(
        fleet,
        inner=RemoteController(
            fleet, link, period_s=period_s, on_policy=take_policy, on_budget=take_budget
        ),
        held=backend.held,
        # Who is parked is the routers' to know; here it only changes what clock it needs.
        routed=lambda: True,
        delay_s=delay_s,
        period_s=period_s,
    )
    return governed
