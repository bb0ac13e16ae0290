"""Controllers and governors: what decides clocks, shares and who is active.

``base``
    What every controller is, and every compiled governor.
``model``
    Queues and batches as a linear state-space system.
``assess``
    What a clock must be at a state of the fleet, and what it may draw.
``curve``, ``groups``, ``target``
    The least-power steady state of the fleet under its promises.
``slots``, ``plan``
    The model-predictive layer, in CVXPY.
``governor``
    The clock of one instance before each of its iterations.
``cascade``
    All of them together: the controller.
``budget``, ``actuators``
    Clocks within a power budget; clock lock or another actuator.
``baselines``
    What to compare with.
"""

from voltana_ctrl.control.actuators import ActuatorChooser, ActuatorMemory
from voltana_ctrl.control.base import CompiledGovernor, Controller
from voltana_ctrl.control.baselines.adaptive import AdaptiveController
from voltana_ctrl.control.baselines.dualscale import DualScaleGovernor
from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor
from voltana_ctrl.control.baselines.packing import PackingController, PackingMemory
from voltana_ctrl.control.baselines.static import StaticBudgetController, StaticController
from voltana_ctrl.control.baselines.threshold import ThresholdGovernor
from voltana_ctrl.control.budget import UniformCeiling, highest_power_w
from voltana_ctrl.control.cascade import CascadeController, CascadeMemory, MpcController
from voltana_ctrl.control.governor import IterationGovernor, thrifty_row
from voltana_ctrl.control.target import Curve, Target, TargetOptimiser
from voltana_ctrl.moved import forward

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
    "MpcController",
    "PackingController",
    "PackingMemory",
    "StaticBudgetController",
    "StaticController",
    "Target",
    "TargetOptimiser",
    "ThresholdGovernor",
    "UniformCeiling",
    "highest_power_w",
    "thrifty_row",
]

__getattr__ = forward(__name__)
