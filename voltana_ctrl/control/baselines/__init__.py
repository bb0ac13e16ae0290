"""Controllers and governors to compare against."""

from voltana_ctrl.control.baselines.adaptive import AdaptiveController
from voltana_ctrl.control.baselines.dualscale import DualScaleGovernor
from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor
from voltana_ctrl.control.baselines.packing import PackingController, PackingMemory
from voltana_ctrl.control.baselines.static import StaticBudgetController, StaticController
from voltana_ctrl.control.baselines.threshold import ThresholdGovernor
from voltana_ctrl.control.baselines.throughput import ThroughputController

__all__ = [
    "AdaptiveController",
    "DualScaleGovernor",
    "EcoFreqGovernor",
    "PackingController",
    "PackingMemory",
    "StaticBudgetController",
    "StaticController",
    "ThresholdGovernor",
    "ThroughputController",
]
