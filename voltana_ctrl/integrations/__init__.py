"""Work with serving engines: where they are, what they tell, how to measure one. Lazily loaded."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "ENGINES": "endpoints",
    "Endpoint": "endpoints",
    "Engine": "profiled_engine",
    "EngineBackend": "telemetry",
    "FinishedRequest": "traffic",
    "FpmReader": "fpm_reader",
    "LoadClient": "load_client",
    "ModelledGpus": "modelled_gpus",
    "ProfileAborted": "profiled_engine",
    "ProfilePlan": "sweep",
    "ProfilePoint": "sweep",
    "ProfileRun": "profiled_engine",
    "Reading": "reading",
    "Scraper": "scrape",
    "Sweep": "sweep",
    "Traffic": "traffic",
    "dynamo_fpm_addresses": "fpm_reader",
    "load_endpoints": "endpoints",
    "plan_profile": "sweep",
    "profile_engine": "profiler",
    "spread_clocks": "sweep",
    "write_limits": "clock_thread",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from voltana_ctrl.integrations.clock_thread import write_limits as write_limits
    from voltana_ctrl.integrations.endpoints import ENGINES as ENGINES
    from voltana_ctrl.integrations.endpoints import Endpoint as Endpoint
    from voltana_ctrl.integrations.endpoints import load_endpoints as load_endpoints
    from voltana_ctrl.integrations.fpm_reader import FpmReader as FpmReader
    from voltana_ctrl.integrations.fpm_reader import dynamo_fpm_addresses as dynamo_fpm_addresses
    from voltana_ctrl.integrations.load_client import LoadClient as LoadClient
    from voltana_ctrl.integrations.modelled_gpus import ModelledGpus as ModelledGpus
    from voltana_ctrl.integrations.profiled_engine import Engine as Engine
    from voltana_ctrl.integrations.profiled_engine import ProfileAborted as ProfileAborted
    from voltana_ctrl.integrations.profiled_engine import ProfileRun as ProfileRun
    from voltana_ctrl.integrations.profiler import profile_engine as profile_engine
    from voltana_ctrl.integrations.reading import Reading as Reading
    from voltana_ctrl.integrations.scrape import Scraper as Scraper
    from voltana_ctrl.integrations.sweep import ProfilePlan as ProfilePlan
    from voltana_ctrl.integrations.sweep import ProfilePoint as ProfilePoint
    from voltana_ctrl.integrations.sweep import Sweep as Sweep
    from voltana_ctrl.integrations.sweep import plan_profile as plan_profile
    from voltana_ctrl.integrations.sweep import spread_clocks as spread_clocks
    from voltana_ctrl.integrations.telemetry import EngineBackend as EngineBackend
    from voltana_ctrl.integrations.traffic import FinishedRequest as FinishedRequest
    from voltana_ctrl.integrations.traffic import Traffic as Traffic
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
