"""Import paths that start scripts may hold, from before the rooms: each names the new one.

They are kept for release 0.1, and this module goes with 0.2. Until then a finder stands at the
very end of Python's list of finders, where it is asked for what nobody else has found. An old
module that it makes holds nothing: a name that is taken from it comes from its new place, with a
warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "voltana_ctrl"

#: Old module and the new one, which has its names.
MODULES = {
    "backends.assignment": "backends.nvml.assignment",
    "backends.dead_time": "backends.nvml.dead_time",
    "backends.doctor": "backends.nvml.doctor",
    "backends.giveback": "backends.nvml.giveback",
    "backends.gpus": "backends.nvml.gpus",
    "backends.held": "backends.nvml.held",
    "backends.lease": "backends.nvml.lease",
    "backends.lockfile": "backends.nvml.lockfile",
    "backends.logfile": "backends.log",
    "backends.setter": "backends.nvml.setter",
    "backends.setter_client": "backends.nvml.setter_client",
    "backends.watchdog": "backends.nvml.watchdog",
    "backends.worker": "backends.nvml.worker",
    "control.adaptive": "control.baselines.adaptive",
    "control.dualscale": "control.baselines.dualscale",
    "control.governors": "control.baselines.ecofreq",
    "control.headroom": "estimate.headroom",
    "control.load": "estimate.load",
    "control.mpc": "control.plan",
    "control.needs": "control.assess",
    "control.packing": "control.baselines.packing",
    "control.regime": "estimate.regime",
    "control.threshold": "control.baselines.threshold",
    "integrations.agent": "live.agent",
    "integrations.blocks": "savings.blocks",
    "integrations.claim": "savings.evidence",
    "integrations.clock_thread": "engines.clock_thread",
    "integrations.endpoints": "engines.endpoints",
    "integrations.exporter": "live.exporter",
    "integrations.fpm": "engines.fpm.messages",
    "integrations.fpm_publisher": "engines.fpm.publisher",
    "integrations.fpm_reader": "engines.fpm.reader",
    "integrations.fpm_state": "engines.fpm.state",
    "integrations.gpu_meters": "backends.nvml.meters",
    "integrations.hub": "live.hub",
    "integrations.in_engine": "engines.in_engine",
    "integrations.link": "live.link",
    "integrations.load_client": "profiling.client",
    "integrations.messages": "live.orders",
    "integrations.metric_names": "engines.names",
    "integrations.metrics_page": "engines.page",
    "integrations.modelled_gpus": "backends.modelled",
    "integrations.node": "live.node",
    "integrations.nodecontrol": "live.node_control",
    "integrations.pod_power": "live.pod_power",
    "integrations.profiled_engine": "profiling.engine",
    "integrations.profiled_gpus": "profiling.gpus",
    "integrations.profiler": "profiling.profiler",
    "integrations.proxy": "router.app",
    "integrations.proxy_body": "router.body",
    "integrations.proxy_dialects": "router.dialects",
    "integrations.proxy_energy": "router.energy",
    "integrations.proxy_exchange": "router.exchange",
    "integrations.proxy_ledger": "router.ledger",
    "integrations.proxy_policy": "router.policy",
    "integrations.proxy_upstream": "router.upstream",
    "integrations.proxy_uvicorn": "router.server",
    "integrations.reading": "engines.reading",
    "integrations.savings": "savings.proof",
    "integrations.scrape": "engines.scrape",
    "integrations.sglang": "engines.sglang",
    "integrations.sweep": "profiling.sweep",
    "integrations.switchback": "savings.switchback",
    "integrations.telemetry": "engines.telemetry",
    "integrations.ticklog": "live.ticklog",
    "integrations.traffic": "engines.traffic",
    "integrations.vllm": "engines.vllm",
    "integrations.waiting_line": "engines.waiting_line",
    "margin": "estimate.margin",
    "model": "control.model",
    "physics": "laws",
    "physics.actuators": "laws.actuators",
    "physics.decode": "laws.equilibrium",
    "physics.iteration": "laws.iteration",
    "physics.lengths": "laws.lengths",
    "physics.prefill": "laws.equilibrium",
    "predict": "estimate",
    "predict.online": "estimate.learner",
    "predict.tables": "estimate.predictor",
    "profiles.laws": "profiles.format",
    "sim.clock": "clock",
    "sim.engine": "sim.plant",
    "sim.meter": "sim.power",
    "testing.fake_nvml": "fakes.nvml",
    "testing.laws": "testing.conformance",
}
#: Old module, and its names by the new module that each is in.
NAMES: dict[str, dict[str, Sequence[str]]] = {
    "backends.nvml": {
        "backends.nvml.driver": (
            "Gpu",
            "GpuLost",
            "GpuReader",
            "GpuReading",
            "Nvml",
            "NvmlMissing",
        ),
    },
    "control": {
        "estimate": ("LoadFilter", "LoadMemory", "Regime", "RegimeFilter", "RegimeMemory"),
        "types": ("Load",),
    },
    "integrations": {
        "backends": (
            "GpuMeters",
            "ModelledGpus",
        ),
        "engines": (
            "ENGINES",
            "Endpoint",
            "EngineBackend",
            "FinishedRequest",
            "FpmReader",
            "Scraper",
            "Traffic",
            "dynamo_fpm_addresses",
            "load_endpoints",
            "write_limits",
        ),
        "live": (
            "Agent",
            "AgentSettings",
            "Exporter",
            "HubBackend",
            "NodeBackend",
            "TickLog",
            "node_clocks",
            "write_parquet",
        ),
        "profiling": (
            "Engine",
            "LoadClient",
            "ProfileAborted",
            "ProfilePlan",
            "ProfilePoint",
            "ProfileRun",
            "Sweep",
            "plan_profile",
            "profile_engine",
            "spread_clocks",
        ),
        "router": (
            "EnergyBook",
            "Flight",
            "InFlight",
            "PolicyRouters",
            "Proxy",
            "ProxyLimits",
            "RequestEnergy",
            "StateSource",
            "proxy_server",
        ),
        "savings": (
            "Block",
            "BlockMeter",
            "Interval",
            "Savings",
            "SwitchbackController",
            "estimate_savings",
            "read_blocks",
            "savings_of_log",
        ),
    },
    "control.governors": {"control.base": ("CompiledGovernor",)},
    "integrations.clock_thread": {"engines.limits": ("write_limits",)},
    "loop": {"clock": ("SimClock",)},
    "physics": {"types": ("Lengths",)},
    "physics.lengths": {"types": ("Lengths",)},
}
#: Old packages, whose modules are looked for behind them.
_OLD_PACKAGES = ("integrations", "physics", "predict")
#: Names that changed besides.
_RENAMED = {
    ("integrations.claim", "ClaimRefused"): ("savings", "EvidenceRefused"),
    ("integrations.reading", "Reading"): ("engines", "EngineReading"),
    ("sim.detail", "Recorder"): ("sim.detail", "DetailSampler"),
    ("integrations", "ClaimRefused"): ("savings", "EvidenceRefused"),
    ("integrations", "Reading"): ("engines", "EngineReading"),
}


def _home(old: str, name: str) -> tuple[str, str] | None:
    """Module and name that an old name has now."""
    if (old, name) in _RENAMED:
        return _RENAMED[old, name]
    for module, names in NAMES.get(old, {}).items():
        if name in names:
            return module, name
    return (MODULES[old], name) if old in MODULES else None


def forward(module: str) -> Callable[[str], object]:
    """Make the ``__getattr__`` of a module that names have moved out of.

    Parameters
    ----------
    module : str
        Its ``__name__``.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     forward("voltana_ctrl.loop")("SimClock").__module__
    'voltana_ctrl.clock'
    >>> str(told[0].message)
    'voltana_ctrl.loop.SimClock is now voltana_ctrl.clock.SimClock; the old path goes with 0.2'
    """
    old = module.removeprefix(f"{_PACKAGE}.")

    def old_name(name: str) -> object:
        home = None if name.startswith("__") else _home(old, name)
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(import_module(f"{_PACKAGE}.{home[0]}"), home[1])
        # Seen by default, as users do not read the warnings meant for developers.
        warnings.warn(
            f"{module}.{name} is now {_PACKAGE}.{'.'.join(home)}; the old path goes with 0.2",
            FutureWarning,
            stacklevel=2,
        )
        return value

    return old_name


class _MovedFinder(MetaPathFinder, Loader):
    """Finds old modules, and makes each an empty one that forwards its names."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{_PACKAGE}.")
        if old == fullname or not (old in MODULES or old in NAMES):
            return None
        del path, target  # no file is looked for
        return ModuleSpec(fullname, self, is_package=old in _OLD_PACKAGES)

    def create_module(self, spec: ModuleSpec) -> None:
        del spec  # an ordinary module will do

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = forward(module.__name__)  # type: ignore[method-assign]


def find_moved() -> None:
    """Let Python find old modules, after everything else.

    Examples
    --------
    >>> find_moved()  # done by the package itself; once is enough
    >>> from importlib.util import find_spec
    >>> find_spec("voltana_ctrl.physics") is not None
    True
    """
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
