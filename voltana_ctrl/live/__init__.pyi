from voltana_ctrl.live.agent import Agent as Agent
from voltana_ctrl.live.agent import AgentSettings as AgentSettings
from voltana_ctrl.live.exporter import Exporter as Exporter
from voltana_ctrl.live.hub import HubBackend as HubBackend
from voltana_ctrl.live.node import NodeBackend as NodeBackend
from voltana_ctrl.live.node import node_clocks as node_clocks
from voltana_ctrl.live.ticklog import TickLog as TickLog
from voltana_ctrl.live.ticklog import write_parquet as write_parquet
