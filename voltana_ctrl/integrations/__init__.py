"""Work with serving engines: what they tell, how to measure and to route. Lazily loaded."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Agent": "agent",
    "AgentSettings": "agent",
    "Block": "blocks",
    "BlockMeter": "blocks",
    "ClaimRefused": "claim",
    "ENGINES": "endpoints",
    "Endpoint": "endpoints",
    "EnergyBook": "proxy_energy",
    "Engine": "profiled_engine",
    "EngineBackend": "telemetry",
    "Exporter": "exporter",
    "FinishedRequest": "traffic",
    "Flight": "proxy_ledger",
    "FpmReader": "fpm_reader",
    "GpuMeters": "gpu_meters",
    "HubBackend": "hub",
    "InFlight": "proxy_ledger",
    "Interval": "claim",
    "LoadClient": "load_client",
    "ModelledGpus": "modelled_gpus",
    "NodeBackend": "node",
    "PolicyRouters": "proxy_policy",
    "ProfileAborted": "profiled_engine",
    "ProfilePlan": "sweep",
    "ProfilePoint": "sweep",
    "ProfileRun": "profiled_engine",
    "Proxy": "proxy",
    "ProxyLimits": "proxy",
    "Reading": "reading",
    "RequestEnergy": "proxy_energy",
    "Savings": "claim",
    "Scraper": "scrape",
    "StateSource": "proxy_policy",
    "Sweep": "sweep",
    "SwitchbackController": "switchback",
    "TickLog": "ticklog",
    "Traffic": "traffic",
    "dynamo_fpm_addresses": "fpm_reader",
    "estimate_savings": "savings",
    "load_endpoints": "endpoints",
    "node_clocks": "node",
    "plan_profile": "sweep",
    "profile_engine": "profiler",
    "proxy_server": "proxy_uvicorn",
    "read_blocks": "blocks",
    "savings_of_log": "savings",
    "spread_clocks": "sweep",
    "write_limits": "clock_thread",
    "write_parquet": "ticklog",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from voltana_ctrl.integrations.agent import Agent as Agent
    from voltana_ctrl.integrations.agent import AgentSettings as AgentSettings
    from voltana_ctrl.integrations.blocks import Block as Block
    from voltana_ctrl.integrations.blocks import BlockMeter as BlockMeter
    from voltana_ctrl.integrations.blocks import read_blocks as read_blocks
    from voltana_ctrl.integrations.claim import ClaimRefused as ClaimRefused
    from voltana_ctrl.integrations.claim import Interval as Interval
    from voltana_ctrl.integrations.claim import Savings as Savings
    from voltana_ctrl.integrations.clock_thread import write_limits as write_limits
    from voltana_ctrl.integrations.endpoints import ENGINES as ENGINES
    from voltana_ctrl.integrations.endpoints import Endpoint as Endpoint
    from voltana_ctrl.integrations.endpoints import load_endpoints as load_endpoints
    from voltana_ctrl.integrations.exporter import Exporter as Exporter
    from voltana_ctrl.integrations.fpm_reader import FpmReader as FpmReader
    from voltana_ctrl.integrations.fpm_reader import dynamo_fpm_addresses as dynamo_fpm_addresses
    from voltana_ctrl.integrations.gpu_meters import GpuMeters as GpuMeters
    from voltana_ctrl.integrations.hub import HubBackend as HubBackend
    from voltana_ctrl.integrations.load_client import LoadClient as LoadClient
    from voltana_ctrl.integrations.modelled_gpus import ModelledGpus as ModelledGpus
    from voltana_ctrl.integrations.node import NodeBackend as NodeBackend
    from voltana_ctrl.integrations.node import node_clocks as node_clocks
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
    from voltana_ctrl.integrations.savings import estimate_savings as estimate_savings
    from voltana_ctrl.integrations.savings import savings_of_log as savings_of_log
    from voltana_ctrl.integrations.scrape import Scraper as Scraper
    from voltana_ctrl.integrations.sweep import ProfilePlan as ProfilePlan
    from voltana_ctrl.integrations.sweep import ProfilePoint as ProfilePoint
    from voltana_ctrl.integrations.sweep import Sweep as Sweep
    from voltana_ctrl.integrations.sweep import plan_profile as plan_profile
    from voltana_ctrl.integrations.sweep import spread_clocks as spread_clocks
    from voltana_ctrl.integrations.switchback import SwitchbackController as SwitchbackController
    from voltana_ctrl.integrations.telemetry import EngineBackend as EngineBackend
    from voltana_ctrl.integrations.ticklog import TickLog as TickLog
    from voltana_ctrl.integrations.ticklog import write_parquet as write_parquet
    from voltana_ctrl.integrations.traffic import FinishedRequest as FinishedRequest
    from voltana_ctrl.integrations.traffic import Traffic as Traffic
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
