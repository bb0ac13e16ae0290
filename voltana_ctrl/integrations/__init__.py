"""Work with serving engines: what they tell, how to measure and to route. Lazily loaded."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "ENGINES": "endpoints",
    "Endpoint": "endpoints",
    "EnergyBook": "proxy_energy",
    "Engine": "profiled_engine",
    "EngineBackend": "telemetry",
    "FinishedRequest": "traffic",
    "Flight": "proxy_ledger",
    "FpmReader": "fpm_reader",
    "InFlight": "proxy_ledger",
    "LoadClient": "load_client",
    "ModelledGpus": "modelled_gpus",
    "PolicyRouters": "proxy_policy",
    "ProfileAborted": "profiled_engine",
    "ProfilePlan": "sweep",
    "ProfilePoint": "sweep",
    "ProfileRun": "profiled_engine",
    "Proxy": "proxy",
    "ProxyLimits": "proxy",
    "Reading": "reading",
    "RequestEnergy": "proxy_energy",
    "Scraper": "scrape",
    "StateSource": "proxy_policy",
    "Sweep": "sweep",
    "Traffic": "traffic",
    "dynamo_fpm_addresses": "fpm_reader",
    "load_endpoints": "endpoints",
    "plan_profile": "sweep",
    "profile_engine": "profiler",
    "proxy_server": "proxy_uvicorn",
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
    from voltana_ctrl.integrations.proxy import Proxy as Proxy
    from voltana_ctrl.integrations.proxy import ProxyLimits as ProxyLimits
    from voltana_ctrl.integrations.proxy_energy import EnergyBook as EnergyBook
    from voltana_ctrl.integrations.proxy_energy import RequestEnergy as RequestEnergy
    from voltana_ctrl.integrations.proxy_ledger import Flight as Flight
    from voltana_ctrl.integrations.proxy_ledger import InFlight as InFlight
    from voltana_ctrl.integrations.proxy_policy import PolicyRouters as PolicyRouters
    from voltana_ctrl.integrations.proxy_policy import StateSource as StateSource
    from voltana_ctrl.integrations.proxy_uvicorn import proxy_server as proxy_server
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
