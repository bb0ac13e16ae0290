"""Controllers and governors."""

from voltana_ctrl.control.actuators import ActuatorChooser, ActuatorMemory
from voltana_ctrl.control.adaptive import AdaptiveController
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.baselines import StaticController
from voltana_ctrl.control.budget import StaticBudgetController, UniformCeiling, highest_power_w
from voltana_ctrl.control.cascade import CascadeController, CascadeMemory, MpcController
from voltana_ctrl.control.dualscale import DualScaleGovernor
from voltana_ctrl.control.governor import IterationGovernor, thrifty_row
from voltana_ctrl.control.governors import CompiledGovernor, EcoFreqGovernor
from voltana_ctrl.control.load import LoadFilter, LoadMemory
from voltana_ctrl.control.packing import PackingController, PackingMemory
from voltana_ctrl.control.regime import Regime, RegimeFilter, RegimeMemory
from voltana_ctrl.control.target import Curve, Load, Target, TargetOptimiser
from voltana_ctrl.control.threshold import ThresholdGovernor

__all__ = [
    "ActuatorChooser",
    "ActuatorMemory",
    "AdaptiveController",
    "CascadeController",
    "CascadeMemory",
    "CompiledGovernor",
    "Controller",
    "Curve",
    "DualScaleGovernor",
    "EcoFreqGovernor",
    "IterationGovernor",
    "Load",
    "LoadFilter",
    "LoadMemory",
    "MpcController",
    "PackingController",
    "PackingMemory",
    "Regime",
    "RegimeFilter",
    "RegimeMemory",
    "StaticBudgetController",
    "StaticController",
    "Target",
    "TargetOptimiser",
    "ThresholdGovernor",
    "UniformCeiling",
    "highest_power_w",
    "thrifty_row",
]
