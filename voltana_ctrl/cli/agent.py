"""``voltana-ctrl agent``: per node, or the controller of many nodes."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voltana_ctrl.cli.options import above_zero, check_outputs, look_here
from voltana_ctrl.errors import ConfigError

if TYPE_CHECKING:
    from voltana_ctrl.control.base import Controller
    from voltana_ctrl.engines.endpoints import Endpoint
    from voltana_ctrl.live.agent import AgentSettings, Switchable
    from voltana_ctrl.types import FleetSpec, PowerBudget, Slo

_TOKEN_VARIABLE = "VOLTANA_CTRL_TOKEN"


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
    policy: Annotated[str, typer.Option(help="See `voltana-ctrl policies`.")] = "mpc",
    slo: Annotated[str, typer.Option(help="TTFT and ITL in s.")] = "ttft=0.6,itl=0.06",
    tick_ms: Annotated[float, typer.Option(help="Control period.")] = 100.0,
    canary: Annotated[
        str | None, typer.Option(help="ID,...: only these instances are ever set.")
    ] = None,
    kill_file: Annotated[
        Path | None, typer.Option(help="When this file appears, all is given back.")
    ] = None,
    switchback: Annotated[
        float | None, typer.Option(help="Minutes: alternate policy and highest clock.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the order of the switchback. [default: drawn]")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Write ticks to this .jsonl.")] = None,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Full log files become Parquet.")
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(help="[HOST:]PORT for Prometheus to scrape.")
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
    controller: Annotated[
        str | None, typer.Option(help="URL of the controller of many nodes.")
    ] = None,
    serve: Annotated[str | None, typer.Option(help="[HOST:]PORT: be that controller.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Bearer token between them. [default: env VOLTANA_CTRL_TOKEN]"),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain, with --serve, for HTTPS.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(hidden=True, help="Former name of --tls-cert.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    lock_dir: Annotated[
        Path | None, typer.Option(help="Of lock files, the same for all of a machine.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Print the Grafana dashboard and end.")
    ] = False,
    setter: Annotated[
        bool, typer.Option("--setter", help="Run the privileged setter of this node.")
    ] = False,
    gpu: Annotated[
        list[str] | None, typer.Option(help="--setter: UUID of a GPU it may set; repeatable.")
    ] = None,
    uid: Annotated[
        list[int] | None, typer.Option(help="--setter: user id that may ask; repeatable.")
    ] = None,
    low_mhz: Annotated[int, typer.Option(help="--setter: lowest clock it sets.")] = 0,
    high_mhz: Annotated[int, typer.Option(help="--setter: highest clock it sets.")] = 100_000,
    max_sets_s: Annotated[float, typer.Option(help="--setter: sets per second and GPU.")] = 50.0,
    socket: Annotated[
        Path | None, typer.Option(help="Setter's Unix socket: to listen on, or to set through.")
    ] = None,
) -> None:
    """Watch, advise or control the engines of a node; SIGTERM ends, SIGUSR1 gives back."""
    if dashboard:
        typer.echo(files("voltana_ctrl.live").joinpath("dashboard.json").read_text("utf-8"))
        return
    if setter:
        _run_setter(gpu, uid, socket, low_mhz, high_mhz, max_sets_s)
        return
    if fleet is None:
        raise ConfigError("agent: expected --fleet FILE.toml (or --setter, or --dashboard)")
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.live.agent import MODES, AgentSettings
    from voltana_ctrl.live.pod_power import power_limits_w
    from voltana_ctrl.types import PowerBudget, Slo

    if mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if controller is not None and serve is not None:
        raise ConfigError("agent: expected --controller at a node or --serve, got both")
    above_zero(tick_ms=tick_ms, switchback=switchback, duration=duration)
    look_here([policy])
    check_outputs({"log": log}, suffix=".jsonl")
    certificate = tls_cert or tls_certificate
    spec, endpoints = load_endpoints(fleet)
    own = _own(spec, endpoints, node)
    chosen = _canary(canary, own)
    limits_w = power_limits_w(
        [one.instance for one in own],
        given=gpu_power_limit or (),
        annotations=pod_annotations,
        environment=os.environ,
    )
    promised, period_s = Slo.parse(slo), tick_ms / 1000.0
    budget = None if power_budget_w is None else PowerBudget.parse(power_budget_w)
    with ExitStack() as ending:
        settings = AgentSettings(
            mode=mode,
            kill_file=kill_file,
            switchback_s=None if switchback is None else 60.0 * switchback,
            seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
            power_budget=budget,
            ceiling_mhz=_ceilings(spec, limits_w),
            unread=_unread(spec, own),
        )
        if serve is not None:
            backend: Switchable = _serve(
                ending, spec, serve, _token(token_file), certificate, tls_key, mode
            )
        else:
            backend = _node(spec, own, chosen, mode, socket, lock_dir)
        decides = None
        if mode != "observe" and controller is not None:
            decides = _remote(
                ending, spec, controller, _token(token_file), node, chosen, period_s, budget
            )
        elif mode != "observe":
            decides = _policy(spec, promised, policy, period_s, budget)
        _run(ending, backend, decides, settings, promised, log, parquet, metrics, duration,
             period_s)  # fmt: skip


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def _run_setter(
    gpu: list[str] | None,
    uid: list[int] | None,
    socket: Path | None,
    low_mhz: int,
    high_mhz: int,
    max_sets_s: float,
) -> None:
    for name, given in (("gpu UUID", gpu), ("uid NUMBER", uid)):
        if not given:
            raise ConfigError(f"agent --setter: expected at least one --{name}, got none")
    from voltana_ctrl.backends.nvml.setter import run_setter
    from voltana_ctrl.backends.nvml.setter_client import SETTER_SOCKET

    run_setter(
        gpu or [],
        uid or [],
        socket or SETTER_SOCKET,
        lo_mhz=low_mhz,
        hi_mhz=high_mhz,
        max_sets_s=max_sets_s,
    )


def _own(fleet: FleetSpec, endpoints: Sequence[Endpoint], node: str | None) -> list[Endpoint]:
    """Engines of this node."""
    nodes = sorted({one.node for one in fleet.instances})
    if node is not None and node not in nodes:
        raise ConfigError(f"node: expected one of {', '.join(nodes)}, got {node!r}")
    here = {one.id for one in fleet.instances if node in (None, one.node)}
    return [endpoint for endpoint in endpoints if endpoint.instance in here]


def _canary(canary: str | None, own: Sequence[Endpoint]) -> dict[str, tuple[str, ...]]:
    """GPUs of the instances that may be set, by instance."""
    known = {endpoint.instance: endpoint.gpus for endpoint in own}
    if canary is None:
        return {name: gpus for name, gpus in known.items() if gpus}
    names = [name.strip() for name in canary.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"canary: expected instances of {', '.join(known)}, got {name!r}")
        if not known[name]:
            raise ConfigError(f"canary: {name}: no GPUs in the fleet file; give engine.gpus")
    if not names:
        raise ConfigError("canary: expected at least one instance, got none")
    return {name: known[name] for name in names}


def _unread(fleet: FleetSpec, own: Sequence[Endpoint]) -> tuple[str, ...]:
    """Instances whose GPUs are not read here; says so of those that are looked after here."""
    dark = [endpoint.instance for endpoint in own if not endpoint.gpus]
    if dark:
        _say(
            f"warning: no GPUs named for {', '.join(dark)}: clock assumed to be the highest, power"
            " unknown; give engine.gpus in the fleet file"
        )
    read = {endpoint.instance for endpoint in own if endpoint.gpus}
    return tuple(name for name in fleet.ids if name not in read)


def _ceilings(fleet: FleetSpec, limits_w: Mapping[str, float]) -> Any:
    if not limits_w:
        return None
    from voltana_ctrl.live.node import power_ceilings_mhz

    told = ", ".join(f"{name} {limit_w:g} W" for name, limit_w in limits_w.items())
    _say(f"power limits per GPU in force: {told}; clocks stay within them, caps are not set")
    return power_ceilings_mhz(fleet, limits_w)


def _node(
    fleet: FleetSpec,
    own: Sequence[Endpoint],
    chosen: Mapping[str, tuple[str, ...]],
    mode: str,
    socket: Path | None,
    lock_dir: Path | None,
) -> Switchable:
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
    from voltana_ctrl.backends.nvml.meters import GpuMeters
    from voltana_ctrl.engines.telemetry import EngineBackend
    from voltana_ctrl.live.node import NodeBackend, node_clocks

    meters = GpuMeters(fleet, {one.instance: one.gpus for one in own})
    for uuid, cap_w in meters.caps_w.items():
        _say(f"a power cap of {cap_w:g} W is in force on GPU {uuid}; it is left as it is")
    reads = EngineBackend(fleet, own, gpus=meters)
    if mode != "act":
        return NodeBackend(reads)
    try:
        if not chosen:
            raise ConfigError("agent: mode act: no instance has GPUs; give engine.gpus")
        return NodeBackend(
            reads, node_clocks(fleet, chosen, setter=socket, lock_dir=lock_dir or LOCK_DIR)
        )
    except BaseException:
        reads.close()
        raise


def _serve(
    ending: ExitStack,
    fleet: FleetSpec,
    address: str,
    token: str,
    certificate: Path | None,
    key: Path | None,
    mode: str,
) -> Switchable:
    from voltana_ctrl.live.hub import HubBackend, HubServer, hub_app

    host, port = _address("serve", address)
    hub = HubBackend(fleet)
    if mode != "act":
        hub.release()
    server = HubServer(
        hub_app(hub, token),
        host,
        port,
        tls_cert=certificate,
        tls_key=key,
    )
    ending.callback(server.close)
    _say(f"controller of {len(fleet)} instances on {host}:{server.port}")
    return hub


def _remote(
    ending: ExitStack,
    fleet: FleetSpec,
    url: str,
    token: str,
    node: str | None,
    chosen: Mapping[str, tuple[str, ...]],
    period_s: float,
    budget: PowerBudget | None,
) -> Controller:
    from voltana_ctrl.live.link import ControllerLink, RemoteController

    if budget is not None:
        raise ConfigError("power-budget-w: give it to the controller, not to its nodes")
    name = node or platform.node() or "node"
    link = ControllerLink(url, token, fleet, name, list(chosen))
    ending.callback(link.close)
    return RemoteController(fleet, link, period_s=period_s)


def _policy(
    fleet: FleetSpec, slo: Slo, policy: str, period_s: float, budget: PowerBudget | None
) -> Controller:
    from voltana_ctrl.live.node_control import node_policy

    return node_policy(fleet, slo, policy, period_s=period_s, power_budget=budget)


def _run(
    ending: ExitStack,
    backend: Switchable,
    controller: Controller | None,
    settings: AgentSettings,
    slo: Slo,
    log: Path | None,
    parquet: bool,
    metrics: str | None,
    duration: float | None,
    period_s: float,
) -> None:
    from voltana_ctrl.backends.nvml.lease import end_on_sigterm
    from voltana_ctrl.live.agent import Agent
    from voltana_ctrl.live.exporter import Exporter
    from voltana_ctrl.live.ticklog import TickLog

    ending.callback(backend.close)
    ending.enter_context(end_on_sigterm())
    observers: list[Any] = []
    if log is not None:
        ticks = TickLog(log, backend.spec, slo=slo, mode=settings.mode, unread=settings.unread,
                        parquet=parquet)  # fmt: skip
        ending.callback(ticks.close)
        observers.append(ticks)
    if metrics is not None:
        exporter = Exporter(
            backend.spec, slo=slo, unread=settings.unread, decides=settings.mode != "observe"
        )
        host, port = _address("metrics", metrics)
        _say(f"metrics on {host}:{exporter.serve(port, host)}")
        ending.callback(exporter.close)
        observers.append(exporter)
    agent = ending.enter_context(
        Agent(backend, controller, settings, observers=observers, period_s=period_s, say=_say)
    )
    ending.enter_context(agent.killed_by_signal())
    hint = f"; kill -USR1 {os.getpid()} gives the hardware back" if settings.mode == "act" else ""
    _say(f"agent: mode {settings.mode}, {len(backend.spec)} instances{hint}")
    agent.run(duration_s=float("inf") if duration is None else duration)


def _address(name: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"{name}: expected [HOST:]PORT such as 127.0.0.1:8791, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _token(path: Path | None) -> str:
    if path is None:
        token = os.environ.get(_TOKEN_VARIABLE, "").strip()
    else:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"token-file {path}: cannot be read: {error.strerror}") from error
    if not token:
        raise ConfigError(f"agent: expected a token; give --token-file or {_TOKEN_VARIABLE}")
    return token
