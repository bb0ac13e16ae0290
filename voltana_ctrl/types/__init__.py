"""The values that pass between rooms: fleets, observations, decisions.

All are frozen. Arrays are ``float64`` unless said otherwise, one entry per instance, shape
``(n,)``, and read-only.
"""

from voltana_ctrl.kernels.layout import PROFILE_DTYPE
from voltana_ctrl.types.actuators import (
    ActuatorPoint,
    ActuatorSetting,
    LimitRanges,
    Limits,
    limits_of,
)
from voltana_ctrl.types.backlog import Admission, Backlog
from voltana_ctrl.types.belief import Belief
from voltana_ctrl.types.budget import PowerBudget
from voltana_ctrl.types.decision import Decision, Slo, Status, TickRecord
from voltana_ctrl.types.fleet import FleetSpec
from voltana_ctrl.types.instance import InstanceSpec, Role
from voltana_ctrl.types.load import Lengths, Load
from voltana_ctrl.types.observation import (
    FleetState,
    IterationBatch,
    Observation,
    Request,
    RequestBatch,
    joined,
)
from voltana_ctrl.types.order import Order
from voltana_ctrl.types.profile import Band, Profile
from voltana_ctrl.types.rest import DEPTHS, Depth, Rest
from voltana_ctrl.types.steps import Steps
from voltana_ctrl.types.tuning import Tuning

__all__ = [
    "DEPTHS",
    "PROFILE_DTYPE",
    "ActuatorPoint",
    "ActuatorSetting",
    "Admission",
    "Backlog",
    "Band",
    "Belief",
    "Decision",
    "Depth",
    "FleetSpec",
    "FleetState",
    "InstanceSpec",
    "IterationBatch",
    "Lengths",
    "LimitRanges",
    "Limits",
    "Load",
    "Observation",
    "Order",
    "PowerBudget",
    "Profile",
    "Request",
    "RequestBatch",
    "Rest",
    "Role",
    "Slo",
    "Status",
    "Steps",
    "TickRecord",
    "Tuning",
    "joined",
    "limits_of",
]
