"""Energy-optimal, SLO-bound control of disaggregated LLM serving.

Clocks, routing and the set of active instances are chosen so that time to first token (TTFT)
and inter-token latency (ITL) stay within their objectives at the least power.

Every name below is imported when it is first used, so that ``import voltana_ctrl`` inside a
serving engine costs next to nothing.

Examples
--------
>>> import voltana_ctrl
>>> slo = voltana_ctrl.Slo(ttft_s=0.6, itl_s=0.06)
>>> slo.attainment
0.99
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from voltana_ctrl.moved import find_moved

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it. The block for type checkers below says the same;
# a test holds the two together.
_HOME = {
    "ActuationDenied": "errors",
    "BackendError": "errors",
    "ConfigError": "errors",
    "Controller": "control",
    "ControlLoop": "loop",
    "Decision": "types",
    "FleetSpec": "types",
    "FleetState": "types",
    "Guard": "guard",
    "InstanceSpec": "types",
    "IterationGovernor": "control",
    "IterationBatch": "types",
    "MpcController": "control",
    "Observation": "types",
    "PowerBudget": "types",
    "PricedRouter": "routing",
    "Profile": "types",
    "Request": "types",
    "RequestBatch": "types",
    "Role": "types",
    "ShapeError": "errors",
    "SimClock": "clock",
    "Slo": "types",
    "Status": "types",
    "TelemetryStale": "errors",
    "TickRecord": "types",
    "VoltanaError": "errors",
    "WallClock": "clock",
    "compare": "experiment",
    "list_profiles": "profiles",
    "load_profile": "profiles",
}

__all__ = sorted(_HOME)

find_moved()

# The host owns logging; without a handler of its own the library stays silent.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from voltana_ctrl.clock import SimClock as SimClock
    from voltana_ctrl.clock import WallClock as WallClock
    from voltana_ctrl.control import Controller as Controller
    from voltana_ctrl.control import IterationGovernor as IterationGovernor
    from voltana_ctrl.control import MpcController as MpcController
    from voltana_ctrl.errors import ActuationDenied as ActuationDenied
    from voltana_ctrl.errors import BackendError as BackendError
    from voltana_ctrl.errors import ConfigError as ConfigError
    from voltana_ctrl.errors import ShapeError as ShapeError
    from voltana_ctrl.errors import TelemetryStale as TelemetryStale
    from voltana_ctrl.errors import VoltanaError as VoltanaError
    from voltana_ctrl.experiment import compare as compare
    from voltana_ctrl.guard import Guard as Guard
    from voltana_ctrl.loop import ControlLoop as ControlLoop
    from voltana_ctrl.profiles import list_profiles as list_profiles
    from voltana_ctrl.profiles import load_profile as load_profile
    from voltana_ctrl.routing import PricedRouter as PricedRouter
    from voltana_ctrl.types import Decision as Decision
    from voltana_ctrl.types import FleetSpec as FleetSpec
    from voltana_ctrl.types import FleetState as FleetState
    from voltana_ctrl.types import InstanceSpec as InstanceSpec
    from voltana_ctrl.types import IterationBatch as IterationBatch
    from voltana_ctrl.types import Observation as Observation
    from voltana_ctrl.types import PowerBudget as PowerBudget
    from voltana_ctrl.types import Profile as Profile
    from voltana_ctrl.types import Request as Request
    from voltana_ctrl.types import RequestBatch as RequestBatch
    from voltana_ctrl.types import Role as Role
    from voltana_ctrl.types import Slo as Slo
    from voltana_ctrl.types import Status as Status
    from voltana_ctrl.types import TickRecord as TickRecord
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
