"""What tests of programs that use this library need: strategies, checks and doubles.

Hypothesis strategies for fleets, observations, decisions and workloads; checks that hold a
controller, router or backend of one's own against what the library relies on; a double of
NVML. All loaded when first used; strategies and the checks of controllers and routers need
the extra ``test``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "BACKEND_LAWS": "testing.backends",
    "CONTROLLER_LAWS": "testing.controllers",
    "FakeGpu": "fakes.nvml",
    "FakeNvml": "fakes.nvml",
    "Law": "testing.conformance",
    "LawBroken": "testing.conformance",
    "ROUTER_LAWS": "testing.routers",
    "build_fake_nvml": "fakes.nvml",
    "check_backend": "testing.backends",
    "check_controller": "testing.controllers",
    "check_router": "testing.routers",
    "decisions": "testing.strategies",
    "example_fleets": "testing.subjects",
    "fleet_states": "testing.strategies",
    "fleets": "testing.strategies",
    "instances": "testing.strategies",
    "observations": "testing.strategies",
    "profiles": "testing.strategies",
    "requests": "testing.strategies",
    "slos": "testing.strategies",
    "workloads": "testing.strategies",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from voltana_ctrl.fakes.nvml import FakeGpu as FakeGpu
    from voltana_ctrl.fakes.nvml import FakeNvml as FakeNvml
    from voltana_ctrl.fakes.nvml import build_fake_nvml as build_fake_nvml
    from voltana_ctrl.testing.backends import BACKEND_LAWS as BACKEND_LAWS
    from voltana_ctrl.testing.backends import check_backend as check_backend
    from voltana_ctrl.testing.conformance import Law as Law
    from voltana_ctrl.testing.conformance import LawBroken as LawBroken
    from voltana_ctrl.testing.controllers import CONTROLLER_LAWS as CONTROLLER_LAWS
    from voltana_ctrl.testing.controllers import check_controller as check_controller
    from voltana_ctrl.testing.routers import ROUTER_LAWS as ROUTER_LAWS
    from voltana_ctrl.testing.routers import check_router as check_router
    from voltana_ctrl.testing.strategies import decisions as decisions
    from voltana_ctrl.testing.strategies import fleet_states as fleet_states
    from voltana_ctrl.testing.strategies import fleets as fleets
    from voltana_ctrl.testing.strategies import instances as instances
    from voltana_ctrl.testing.strategies import observations as observations
    from voltana_ctrl.testing.strategies import profiles as profiles
    from voltana_ctrl.testing.strategies import requests as requests
    from voltana_ctrl.testing.strategies import slos as slos
    from voltana_ctrl.testing.strategies import workloads as workloads
    from voltana_ctrl.testing.subjects import example_fleets as example_fleets
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"voltana_ctrl.{_HOME[name]}"), name)
        globals()[name] = value
        return value
