"""``voltana-ctrl router``: an OpenAI-compatible server in front of the engines of a fleet."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voltana_ctrl.cli.options import look_here
from voltana_ctrl.cli.running import say, token_of
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.serving.server import listen

if TYPE_CHECKING:
    from voltana_ctrl.engines.endpoints import Endpoint
    from voltana_ctrl.types import FleetSpec

EXAMPLES = (
    "voltana-ctrl router --prefill http://10.0.0.1:8000 --decode http://10.0.0.2:8000",
    "voltana-ctrl router --fleet fleet.toml --policy cascade --telemetry --port 8790",
)

#: Port where nothing else of the trade is by default, and that of before, served until 0.2.
_PORT, _OLD_PORT = 8790, 8080


def router(
    fleet: Annotated[
        Path | None, typer.Option(help="TOML file of instances with their engines.")
    ] = None,
    prefill: Annotated[
        list[str] | None,
        typer.Option(help="URL[,PORT] of a prefill engine (PORT: SGLang bootstrap); repeat it."),
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="URL of a decode engine; may be repeated.")
    ] = None,
    both: Annotated[
        list[str] | None, typer.Option(help="URL of an engine that does both; may be repeated.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="vllm, sglang, trtllm (with --both) or dynamo (with --fleet)."),
    ] = "vllm",
    profile: Annotated[
        str, typer.Option(help="GPU and model that energy is modelled by, without --fleet.")
    ] = "a100-sxm-80gb/llama-3.1-8b",
    policy: Annotated[
        str, typer.Option(help="Whose routers choose; see `voltana-ctrl policies`.")
    ] = "cascade",
    slo: Annotated[str, typer.Option(help="TTFT, ITL in s, attainment.")] = "ttft=0.6,itl=0.06",
    controller: Annotated[
        str | None, typer.Option(help="URL of the fleet's controller, which then decides.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="This router's own, for it. [default: host and port]")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Controller's token. [default: env VOLTANA_CTRL_TOKEN]")
    ] = None,
    telemetry: Annotated[
        bool,
        typer.Option("--telemetry", help="Let the policy decide from engines' metrics."),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 8790 if left out.", show_default=False)
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable with the bearer token that clients must show.")
    ] = None,
    engine_api_key_env: Annotated[
        str | None, typer.Option(help="Variable with the bearer token shown to engines.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authorities that sign those of engines and controller.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of a page that may call from a browser, or *; repeatable."),
    ] = None,
    trust_clients: Annotated[
        bool,
        typer.Option(
            "--trust-clients", help="Pass on what clients say of ranks, workers and request ids."
        ),
    ] = False,
    max_body_mb: Annotated[int, typer.Option(help="Largest request body.")] = 16,
    max_in_flight: Annotated[int, typer.Option(help="Requests at once; more get 429.")] = 4096,
    attempts: Annotated[int, typer.Option(help="Sends before the first token, at most.")] = 3,
    first_token: Annotated[float, typer.Option(help="Seconds to the first token.")] = 300.0,
    total: Annotated[float, typer.Option(help="Seconds for all of an answer.")] = 3600.0,
    stall: Annotated[float, typer.Option(help="Seconds a client may read nothing.")] = 30.0,
    silence: Annotated[
        float, typer.Option(help="Seconds until a client that waits for a stream hears a comment.")
    ] = 15.0,
    probe: Annotated[float, typer.Option(help="Seconds between looks at an engine.")] = 5.0,
    max_held_mb: Annotated[
        int, typer.Option(help="Bodies and answers of all requests together; more get 429.")
    ] = 64,
    max_answer_mb: Annotated[int, typer.Option(help="Largest answer in one piece.")] = 32,
    max_connections: Annotated[int, typer.Option(help="Connections at once; more get 503.")] = 8192,
    drain: Annotated[float, typer.Option(help="Seconds to end after SIGTERM.")] = 60.0,
) -> None:
    """Serve completions from the engines of a fleet, each where the policy says."""
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.engines.telemetry import EngineBackend
    from voltana_ctrl.engines.traffic import Traffic
    from voltana_ctrl.live.link import ControllerLink
    from voltana_ctrl.live.subscription import SubscribedRouters, Subscription
    from voltana_ctrl.loop import ControlLoop
    from voltana_ctrl.profiles import dilation_of
    from voltana_ctrl.router.app import Proxy
    from voltana_ctrl.router.limits import ProxyLimits
    from voltana_ctrl.router.policy import PolicyRouters
    from voltana_ctrl.router.server import proxy_server
    from voltana_ctrl.types import Slo

    quick = [*(prefill or []), *(decode or []), *(both or [])]
    if (fleet is None) != bool(quick):
        raise ConfigError(
            "router: expected --fleet FILE, or engines by --prefill and --decode or by --both"
            + (", not both" if quick else "")
        )
    if fleet is not None:
        spec, endpoints = load_endpoints(fleet)
    else:
        spec, endpoints = _quick(engine, profile, prefill or [], decode or [], both or [])
    look_here([policy])
    limits = ProxyLimits(
        body_bytes=max_body_mb << 20,
        in_flight_req=max_in_flight,
        attempts=attempts,
        first_token_s=first_token,
        total_s=total,
        stall_s=stall,
        silence_s=silence,
        probe_s=probe,
        held_bytes=max_held_mb << 20,
        answer_bytes=max_answer_mb << 20,
        connections=max_connections,
        drain_s=drain,
    )
    if controller is not None and telemetry:
        raise ConfigError("router: expected --controller or --telemetry, got both")
    token = "" if controller is None else token_of(token_file)
    routers: PolicyRouters
    if controller is None:
        routers = PolicyRouters(spec, policy, Slo.parse(slo))
    else:
        routers = SubscribedRouters(spec, policy, Slo.parse(slo), valid_s=dilation_of(spec))
    traffic = Traffic(len(spec)) if telemetry or controller is not None else None
    proxy = Proxy(
        spec,
        endpoints,
        routers=routers,
        traffic=traffic,
        limits=limits,
        api_key=secret_of(api_key_env),
        engine_api_key=secret_of(engine_api_key_env),
        engine_tls_ca=tls_ca,
        trusts_clients=trust_clients,
        allow_origins=allow_origin or (),
    )
    server = proxy_server(proxy, host=host, port=port or 0, tls_cert=tls_cert, tls_key=tls_key)
    listening = listen(host, _PORT if port is None else port, what="router")
    address = f"[{host}]" if ":" in host else host
    scheme = "http" if tls_cert is None else "https"
    url = f"{scheme}://{address}:{listening[0].getsockname()[1]}"
    link = None
    if controller is not None:
        sender = name or f"{platform.node() or 'router'}:{listening[0].getsockname()[1]}"
        try:
            link = ControllerLink(
                controller, token, spec, sender, spec.ids, kind="router", tls_ca=tls_ca,
                hold_s=dilation_of(spec),
            )  # fmt: skip
        except ConfigError:
            for one in listening:
                one.close()
            raise
    # Nothing that is given can be refused any more.
    whose = policy if controller is None else "the controller's policy"
    say(f"{whose} routes {len(spec)} instances on {url}")
    if port is None:
        listening += _also_where_it_was(host)
    if traffic is None:
        server.run(listening)
        return
    if isinstance(routers, SubscribedRouters) and link is not None:
        with link, Subscription(link, routers, proxy.counts, traffic, say=say) as subscription:
            proxy.watch(subscription)
            server.run(listening)
        return
    backend = EngineBackend(spec, endpoints, without_gpus="ignore", traffic=traffic)
    with ControlLoop(backend, routers.controller, router=routers, observers=[proxy.energy]) as loop:
        proxy.watch(loop)
        loop.start()
        server.run(listening)


def _also_where_it_was(host: str) -> list[socket.socket]:
    """Sockets on the default port of before, if it is free."""
    try:
        made = listen(host, _OLD_PORT, what="router")
    except BackendError:
        return []
    typer.echo(
        f"router: the default port is {_PORT} now; {_OLD_PORT} is served too until release 0.2,"
        " give --port to choose",
        err=True,
    )
    return made


def secret_of(variable: str | None) -> str | None:
    """What a variable of the environment holds, by its name; None without a name."""
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise ConfigError(f"router: variable {variable} is not set; put the token in it")
    return value


def _quick(
    engine: str, profile: str, prefill: list[str], decode: list[str], both: list[str]
) -> tuple[FleetSpec, tuple[Endpoint, ...]]:
    """Fleet of equal instances from addresses alone."""
    from voltana_ctrl.engines.endpoints import Endpoint
    from voltana_ctrl.profiles import load_profile
    from voltana_ctrl.types import FleetSpec

    if engine == "dynamo":
        raise ConfigError(
            "router: Dynamo's workers are pinned by their ids; give them in a --fleet file"
        )
    if both and (prefill or decode):
        raise ConfigError("router: expected --both, or --prefill and --decode, got both kinds")
    if not both and not (prefill and decode):
        raise ConfigError("router: expected at least one --prefill and one --decode")
    shape = f"{len(both)}C" if both else f"{len(prefill)}P{len(decode)}D"
    spec = FleetSpec.parse(shape, load_profile(profile))
    ends = []
    for name, text in zip(spec.ids, [*prefill, *decode, *both], strict=True):
        url, _, bootstrap = text.partition(",")
        if bootstrap and not bootstrap.isdigit():
            raise ConfigError(
                f"router: expected URL,PORT such as http://one:30000,8998, got {text!r}"
            )
        ends.append(
            Endpoint(
                instance=name,
                kind=engine,
                url=url,
                bootstrap_port=int(bootstrap) if bootstrap else None,
            )
        )
    return spec, tuple(ends)
