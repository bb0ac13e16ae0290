"""Controllers and governors."""

from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.baselines import StaticController
from voltana_ctrl.control.governors import CompiledGovernor, EcoFreqGovernor

__all__ = ["CompiledGovernor", "Controller", "EcoFreqGovernor", "StaticController"]
