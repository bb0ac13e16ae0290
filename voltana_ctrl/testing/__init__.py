"""What tests of programs that use this library need: strategies, checks and doubles.

Hypothesis strategies for fleets, observations, decisions and workloads; checks that hold a
controller, router or backend of one's own against what the library relies on; a double of
NVML. All loaded when first used; strategies and the checks of controllers and routers need
the extra ``test``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "BACKEND_LAWS": "backends",
    "CONTROLLER_LAWS": "controllers",
    "FakeGpu": "fake_nvml",
    "FakeNvml": "fake_nvml",
    "Law": "laws",
    "LawBroken": "laws",
    "ROUTER_LAWS": "routers",
    "build_fake_nvml": "fake_nvml",
    "check_backend": "backends",
    "check_controller": "controllers",
    "check_router": "routers",
    "decisions": "strategies",
    "example_fleets": "subjects",
    "fleet_states": "strategies",
    "fleets": "strategies",
    "instances": "strategies",
    "observations": "strategies",
    "profiles": "strategies",
    "requests": "strategies",
    "slos": "strategies",
    "workloads": "strategies",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from voltana_ctrl.testing.backends import BACKEND_LAWS as BACKEND_LAWS
    from voltana_ctrl.testing.backends import check_backend as check_backend
    from voltana_ctrl.testing.controllers import CONTROLLER_LAWS as CONTROLLER_LAWS
    from voltana_ctrl.testing.controllers import check_controller as check_controller
    from voltana_ctrl.testing.fake_nvml import FakeGpu as FakeGpu
    from voltana_ctrl.testing.fake_nvml import FakeNvml as FakeNvml
    from voltana_ctrl.testing.fake_nvml import build_fake_nvml as build_fake_nvml
    from voltana_ctrl.testing.laws import Law as Law
    from voltana_ctrl.testing.laws import LawBroken as LawBroken
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
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
