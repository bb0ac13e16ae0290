"""What the commands share that run on a fleet: `agent`, `controller`, `router` and `serve`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from voltana_ctrl.errors import ConfigError

if TYPE_CHECKING:
    from voltana_ctrl.backends.nvml.gpus import NvmlBackend
    from voltana_ctrl.checks import F64
    from voltana_ctrl.control.base import Controller
    from voltana_ctrl.engines.endpoints import Endpoint
    from voltana_ctrl.engines.traffic import Traffic
    from voltana_ctrl.estimate.forecast import OwnForecast
    from voltana_ctrl.live.agent import AgentSettings, Mode, Switchable
    from voltana_ctrl.live.node import NodeBackend
    from voltana_ctrl.live.state import StateFile
    from voltana_ctrl.live.status import LinkState, StatusBoard
    from voltana_ctrl.ports import Router
    from voltana_ctrl.router.app import Proxy
    from voltana_ctrl.types import (
        Belief,
        FleetSpec,
        InstanceSpec,
        PowerBudget,
        Slo,
        TickRecord,
    )

TOKEN_VARIABLE = "VOLTANA_CTRL_TOKEN"
#: Where `serve` shows the status page, as the controller of a fleet does.
PAGE_PORT = "8791"


def say(line: str) -> None:
    """Tell people, with the time."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def warn_former(**given: tuple[object, str]) -> None:
    """Say what is used instead of options that go with the next release."""
    for name, (value, instead) in given.items():
        if value:
            option = name.replace("_", "-")
            say(f"warning: --{option} goes with the next release; use {instead}")


def own_engines(
    fleet: FleetSpec, endpoints: Sequence[Endpoint], node: str | None
) -> list[Endpoint]:
    """Engines of a node; all where none is named."""
    nodes = sorted({one.node for one in fleet.instances})
    if node is not None and node not in nodes:
        raise ConfigError(f"node: expected one of {', '.join(nodes)}, got {node!r}")
    here = {one.id for one in fleet.instances if node in (None, one.node)}
    return [endpoint for endpoint in endpoints if endpoint.instance in here]


def canaries(canary: str | None, own: Sequence[Endpoint]) -> dict[str, tuple[str, ...]]:
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


def unread(fleet: FleetSpec, own: Sequence[Endpoint]) -> tuple[str, ...]:
    """Instances whose GPUs are not read here; says so of those that are looked after here."""
    dark = [endpoint.instance for endpoint in own if not endpoint.gpus]
    if dark:
        say(
            f"warning: no GPUs named for {', '.join(dark)}: clock assumed to be the highest, power"
            " unknown; give engine.gpus in the fleet file"
        )
    read = {endpoint.instance for endpoint in own if endpoint.gpus}
    return tuple(name for name in fleet.ids if name not in read)


def ceilings(fleet: FleetSpec, limits_w: Mapping[str, float]) -> F64 | None:
    """Clocks under the power limits of others; None where there are none."""
    if not limits_w:
        return None
    from voltana_ctrl.live.node import power_ceilings_mhz

    told = ", ".join(f"{name} {limit_w:g} W" for name, limit_w in limits_w.items())
    say(f"power limits per GPU in force: {told}; clocks stay within them, caps are not set")
    return power_ceilings_mhz(fleet, limits_w)


def least_mhz(text: str | None, fleet: FleetSpec) -> F64 | None:
    """Lowest clocks of MHZ or ID=MHZ,...; None where the option was left out."""
    if text is None:
        return None
    from voltana_ctrl.cli.options import number

    least = fleet.min_mhz
    for part in text.split(","):
        name, equals, mhz = part.rpartition("=")
        if equals and name not in fleet.ids:
            raise ConfigError(f"min-mhz: expected MHZ, or ID=MHZ of {', '.join(fleet.ids)}")
        where = slice(None) if not equals else fleet.ids.index(name)
        least[where] = number("min-mhz", mhz)
    if (least > fleet.max_mhz).any() or not (least > 0.0).all():
        raise ConfigError(
            f"min-mhz: expected clocks up to the highest of each instance, got {text}"
        )
    return least


def with_actuators(controller: Controller, backend: NodeBackend) -> Controller:
    """The same with other actuators in place of clock locks, where they were measured."""
    import numpy as np

    from voltana_ctrl.control.actuators import ActuatorChooser

    fleet = backend.spec
    told = [one.id for one in fleet.instances if one.profile.actuators]
    if not told:
        say("warning: actuators: no profile has measured points of them; clocks alone are set")
        return controller
    held = [name for name in told if name in backend.held]
    if held:
        say(f"actuators: {', '.join(held)}: the governor in the engine sets clocks alone")
    ranges = backend.limit_ranges
    for i, one in enumerate(fleet.instances):
        if _cpus_measured(one) and (ranges is None or ranges.cpu_min_mhz[i] == np.inf):
            say(
                f"actuators: {one.id}: its profile has measured CPU clocks, which are not set: they"
                " need engine.cpus in the fleet file, and a clock that this process sets"
            )
    return ActuatorChooser(controller, ranges=ranges)


def _cpus_measured(instance: InstanceSpec) -> bool:
    return any(point.cpu_mhz is not None for point in instance.profile.actuators)


def own_cpus(fleet: FleetSpec, own: Sequence[Endpoint]) -> dict[str, tuple[int, ...]]:
    """CPUs of the instances whose clock may be limited; refused where nothing was measured.

    Where other actuators were, these are what was asked for, and the CPUs are left alone.
    """
    cpus = {}
    for endpoint in own:
        one = fleet.instances[fleet.ids.index(endpoint.instance)]
        if not endpoint.cpus:
            continue
        if _cpus_measured(one):
            cpus[one.id] = endpoint.cpus
        elif any(point.power_cap_w or point.mem_mhz for point in one.profile.actuators):
            say(
                f"actuators: {one.id}: its CPU clock is left alone: its profile"
                f" {one.profile.name} has no measured points of CPU clocks"
            )
        else:
            raise ConfigError(
                f"actuators: {one.id}: engine.cpus is given, and its profile {one.profile.name} has"
                " no measured points of CPU clocks: measure them (a column set_cpu_mhz, and an"
                " energy that includes the CPU's), fit a profile, or leave engine.cpus out"
            )
    return cpus


def check_actuators(actuators: bool, park_memory: bool, mode: str, limited: bool) -> None:
    """Refuse other actuators where nothing is set, or where others set them."""
    if (actuators or park_memory) and mode != "act":
        raise ConfigError(f"actuators, park-memory: expected --mode act, got {mode}")
    if actuators and limited:
        raise ConfigError(
            "actuators: a power limit of others is given, whose program sets caps, too, and two"
            " undo each other; leave out --actuators or the limit"
        )


def since_start() -> Callable[[], float]:
    """Time since now, which is what the steps of a budget count from."""
    begin_s = time.monotonic()
    return lambda: time.monotonic() - begin_s


def open_node(
    fleet: FleetSpec,
    own: Sequence[Endpoint],
    chosen: Mapping[str, tuple[str, ...]],
    mode: str,
    *,
    socket: Path | None,
    lock_dir: Path | None,
    policy: str,
    slo: Slo,
    ceiling_mhz: F64 | None = None,
    traffic: Traffic | None = None,
    pairs: bool = True,
    actuators: bool = False,
    park_memory: bool = False,
    cpus: Mapping[str, tuple[int, ...]] | None = None,
) -> OpenedNode:
    """Open a node as a plant; where it acts, the delay of its clock sets is measured."""
    from voltana_ctrl.backends.cpufreq import CpufreqBackend, policies_of
    from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
    from voltana_ctrl.backends.nvml.meters import GpuMeters
    from voltana_ctrl.engines.telemetry import EngineBackend
    from voltana_ctrl.live.node import NodeBackend, node_clocks
    from voltana_ctrl.profiles import dilation_of

    meters = GpuMeters(fleet, {one.instance: one.gpus for one in own})
    for uuid, sentences in meters.covers.items():
        for sentence in sentences:
            say(f"GPU {uuid}: {sentence}")
    for uuid, cap_w in meters.caps_w.items():
        say(f"a power cap of {cap_w:g} W is in force on GPU {uuid}; it is left as it is")
    reads = EngineBackend(
        fleet, own, gpus=meters, traffic=traffic, pairs=pairs, now_s=since_start()
    )

    def notes() -> list[str]:
        return judged_lines(reads.judged_edges_s(slo), slo)

    if mode != "act":
        say_who_sets(own, chosen, mode)
        return OpenedNode(NodeBackend(reads), 0.025, notes)
    sets: NvmlBackend | CpufreqBackend | None = None
    delay_s = 0.025
    try:
        if not chosen:
            raise ConfigError("agent: mode act: no instance has GPUs; give engine.gpus")
        hands = {
            one.instance: Path(one.limits)
            for one in own
            if one.limits is not None and one.instance in chosen
        }
        free = {name: gpus for name, gpus in chosen.items() if name not in hands}
        limited = {name: those for name, those in (cpus or {}).items() if name in free}
        folders = policies_of(limited) if limited else {}  # refused before anything is set
        if free:
            gpu_sets = node_clocks(fleet, free, setter=socket, lock_dir=lock_dir or LOCK_DIR)
            sets = gpu_sets
            delay_s = _measured_delay_s(fleet, gpu_sets, ceiling_mhz)
            if limited:
                sets = CpufreqBackend(gpu_sets, folders, lock_dir=lock_dir or LOCK_DIR)
                for name, those in limited.items():
                    told = f"{len(those)} CPUs" if len(those) > 1 else "CPU"
                    say(f"{name}: the clock of its {told} is limited where that was measured")
        say_who_sets(own, chosen, mode)
        measured_s = None if sets is None else delay_s
        node = NodeBackend(
            reads, sets, hands=hands, policy=policy, set_delay_s=measured_s, actuators=actuators,
            park_memory=park_memory, valid_s=dilation_of(fleet),
        )  # fmt: skip
        return OpenedNode(node, delay_s, notes)
    except BaseException:
        if sets is not None:
            sets.close()
        reads.close()
        raise


def say_who_sets(own: Sequence[Endpoint], chosen: Collection[str], mode: str) -> None:
    """Say of every instance who chooses its clock, or would, and what the difference costs."""
    if mode == "observe":
        return
    is_set = "is" if mode == "act" else "would be"
    in_engine = [one.instance for one in own if one.limits is not None and one.instance in chosen]
    for name in chosen:
        who = "the governor in its engine" if name in in_engine else "this process, at every tick"
        say(f"{name}: its clock {is_set} set by {who}")
    if len(in_engine) < len(chosen):
        say(
            "a governor in the engine chooses before every iteration: ticks alone took 17 % more"
            " energy per token on emulated engines (2P2D, 65 req/s); give engine.limits"
        )


def judged_lines(edges_s: Mapping[str, Mapping[str, float]], slo: Slo) -> list[str]:
    """What is to be known of TTFT and ITL that come from histograms, in words."""
    told = []
    for name, promised_s in (("ttft", slo.ttft_s), ("itl", slo.itl_s)):
        found_s = [edges[name] for edges in edges_s.values() if name in edges]
        if not found_s:
            continue
        least_s = min(found_s)
        count = f"{len(found_s)} engine" + "s" * (len(found_s) != 1)
        line = f"{name.upper()} comes from the histograms of {count} where no router tells it"
        if least_s < promised_s:
            line += (
                f", whose buckets do not end at the promise of {promised_s:g} s: a request counts"
                f" as missed from {least_s:g} s on"
            )
        if name == "ttft":
            line += "; it leaves out the router, and the hand-off between prefill and decode"
        told.append(line)
    return told


class OpenedNode(NamedTuple):
    """A node, how late its clocks come, and what is to be said of its readings once known."""

    backend: NodeBackend
    delay_s: float
    notes: Callable[[], list[str]]


class Once:
    """Observer that says what is to be known once, as soon as it is.

    Where engines are met after the start it is known later.
    """

    def __init__(self, notes: Callable[[], list[str]]) -> None:
        self._notes, self._said = notes, False

    def on_tick(self, record: TickRecord) -> None:
        """Look whether there is anything to say by now."""
        if not self._said and record.number % 20 == 19:
            lines = self._notes()
            self._said = bool(lines)
            for line in lines:
                say(line)


def _measured_delay_s(fleet: FleetSpec, sets: NvmlBackend, ceiling_mhz: F64 | None) -> float:
    from voltana_ctrl.backends.nvml.dead_time import measure_dead_time

    highest = fleet.max_mhz if ceiling_mhz is None else ceiling_mhz
    ours = highest[[fleet.ids.index(name) for name in sets.spec.ids]]
    dead = measure_dead_time(sets, ceiling_mhz=ours, repeats=3)
    delay_s = dead.delay_s()
    say(f"a clock runs {1e3 * delay_s:.0f} ms after it is asked for, as measured now")
    return delay_s


def run_agent(
    ending: ExitStack,
    backend: Switchable,
    controller: Controller | None,
    settings: AgentSettings,
    slo: Slo,
    *,
    log: Path | None,
    parquet: bool,
    metrics: str | None,
    duration_s: float | None,
    period_s: float,
    router: Router | None = None,
    observers: Sequence[Any] = (),
    what: str = "agent",
    watched_by: Proxy | None = None,
    own: Sequence[Endpoint] = (),
    state: StateFile | None = None,
) -> None:
    """Run a loop in one of the modes until it is told to end, with log and metrics."""
    from voltana_ctrl.backends.nvml.lease import end_on_sigterm
    from voltana_ctrl.live.agent import Agent
    from voltana_ctrl.live.exporter import Exporter
    from voltana_ctrl.live.node_control import WhoAnswers
    from voltana_ctrl.live.ticklog import TickLog

    ending.callback(backend.close)
    ending.enter_context(end_on_sigterm())
    watching = [*observers, WhoAnswers(backend.spec)]
    if state is not None:
        ending.callback(state.close)
        watching.append(state)
    if log is not None:
        ticks = TickLog(log, backend.spec, slo=slo, mode=settings.mode, unread=settings.unread,
                        parquet=parquet)  # fmt: skip
        ending.callback(ticks.close)
        watching.append(ticks)
    if metrics is not None:
        exporter = Exporter(
            backend.spec, slo=slo, unread=settings.unread, decides=settings.mode != "observe",
            in_engine={one.instance: one.limits is not None for one in own},
        )  # fmt: skip
        host, port = address("metrics", metrics)
        say(f"metrics on {host}:{exporter.serve(port, host)}")
        ending.callback(exporter.close)
        watching.append(exporter)
    agent = ending.enter_context(
        Agent(
            backend,
            controller,
            settings,
            observers=watching,
            period_s=period_s,
            say=say,
            router=router,
        )
    )
    if watched_by is not None:
        watched_by.watch(agent.loop)
    ending.enter_context(agent.killed_by_signal())
    hint = f"; kill -USR1 {os.getpid()} gives the hardware back" if settings.mode == "act" else ""
    say(f"{what}: mode {settings.mode}, {len(backend.spec)} instances{hint}")
    agent.run(duration_s=float("inf") if duration_s is None else duration_s)


def state_of(path: Path | None, fleet: FleetSpec) -> tuple[StateFile | None, Belief | None]:
    """What an earlier run learnt, and where this one keeps what it learns."""
    if path is None:
        return None, None
    from voltana_ctrl.cli.options import check_outputs
    from voltana_ctrl.live.state import StateFile

    check_outputs({"state": path})
    state = StateFile(path, fleet)
    learnt = state.read()
    say(f"state {path}: {'nothing learnt before' if learnt is None else 'goes on from there'}")
    return state, learnt


def status_board(
    ending: ExitStack,
    backend: Switchable,
    asked: Promises,
    policy: str,
    *,
    unread: tuple[str, ...],
    links: Callable[[], list[LinkState]] = list,
    routed: Callable[[], bool] = lambda: True,
    held_up: Callable[[], Mapping[str, str]] = dict,
) -> StatusBoard:
    """Board behind the status page, which hears the warnings of the whole program."""
    import logging

    from voltana_ctrl.live.status import StatusBoard
    from voltana_ctrl.ports import backend_extras

    board = StatusBoard(
        backend.spec, asked.slo, mode=asked.mode, policy=policy, power_budget=asked.budget,
        problems=backend_extras(backend).problems, links=links, routed=routed, held_up=held_up,
        unread=unread,
    )  # fmt: skip
    logger = logging.getLogger("voltana_ctrl")
    logger.addHandler(board)
    ending.callback(logger.removeHandler, board)
    return board


def page_url(host: str, port: int, *, secure: bool) -> str:
    """Where a browser finds the status page."""
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{name}:{port}/"


def page_token(text: str | None) -> str | None:
    """Token that a status page on [HOST:]PORT asks for; None where it is on loopback."""
    from voltana_ctrl.live.status_page import is_loopback

    host, _ = address("page", PAGE_PORT if text is None else text)
    return None if is_loopback(host) else token_of(None)


def serve_page(ending: ExitStack, board: StatusBoard, text: str | None, token: str | None) -> None:
    """Serve the status page on a port of its own, [HOST:]PORT.

    Where nobody asked for a port and the usual one is taken, there is no page.
    """
    from voltana_ctrl.errors import BackendError
    from voltana_ctrl.live.status_page import StatusPage, page_app
    from voltana_ctrl.serving.server import ServerThread

    host, port = address("page", PAGE_PORT if text is None else text)
    page = StatusPage(board, token=token)
    try:
        server = ServerThread(page_app(page), host, port, what="page")
    except BackendError as error:
        if text is not None:
            raise
        say(f"warning: no status page: {error}; give --page PORT")
        return
    ending.callback(server.close)
    ending.callback(page.close)
    say(f"status page: {page_url(host, server.port, secure=False)}")


def address(name: str, text: str) -> tuple[str, int]:
    """Host and port of [HOST:]PORT."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise ConfigError(f"{name}: expected [HOST:]PORT such as 127.0.0.1:8791, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def token_of(path: Path | None) -> str:
    """Bearer token from a file, else from the environment."""
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
    else:
        try:
            token = path.read_text(encoding="utf-8-sig").strip()
        except OSError as error:
            raise ConfigError(f"token-file {path}: cannot be read: {error.strerror}") from error
    if not token:
        raise ConfigError(
            f"token: expected one in --token-file or {TOKEN_VARIABLE}; make one with"
            ' python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What the options of all of them say alike, read once."""

    mode: Mode
    slo: Slo
    period_s: float
    budget: PowerBudget | None
    spare: float
    forecast: OwnForecast | None = None


def promises(
    mode: str, slo: str, tick_s: float, power_budget_w: str | None, policy: str, spare: float,
    forecast: Path | None = None,
) -> Promises:  # fmt: skip
    """Mode, promises, period and budget from their options."""
    from voltana_ctrl.cli.options import above_zero, look_here
    from voltana_ctrl.control.spare import spare_count
    from voltana_ctrl.estimate import read_forecast
    from voltana_ctrl.live.agent import MODES
    from voltana_ctrl.policies import find_policy
    from voltana_ctrl.types import PowerBudget, Slo

    if mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    above_zero(tick_ms=1000.0 * tick_s)
    look_here([policy])
    find_policy(policy)  # refuses a name that there is not
    spare_count(spare)
    return Promises(
        mode=mode,
        slo=Slo.parse(slo),
        period_s=tick_s,
        budget=None if power_budget_w is None else PowerBudget.parse(power_budget_w),
        spare=spare,
        forecast=None if forecast is None else read_forecast(forecast),
    )
