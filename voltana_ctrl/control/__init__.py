"""Controllers and governors: what decides clocks, shares and who is active.

``base``
    What every controller is, and every compiled governor.
``model``
    Queues and batches as a linear state-space system.
``assess``
    What a clock must be at a state of the fleet, and what it may draw.
``curve``, ``groups``, ``target``
    The least-power steady state of the fleet under its promises.
``spare``, ``depth``
    Instances that may be lost; how deep those sleep that are parked.
``supply``, ``standby``, ``deferral``, ``situation``, ``plan``, ``lookahead``
    The model-predictive layer: what an instance can carry, who is on, work that may wait, what a
    plan starts from, the programme in CVXPY, and the look ahead that joins them.
``governor``
    The clock of one instance before each of its iterations.
``cascade``, ``ahead``
    All of them together: the controller, without and with the look ahead.
``flexible``
    The same on machines that change between prefill and decode.
``budget``, ``actuators``
    Clocks within a power budget; clock lock or another actuator.
``batches``
    Decode batches from states and profiles, for baselines and roles.
``baselines``
    What to compare with.
"""

from voltana_ctrl.lazy import lazy_names
from voltana_ctrl.moved import forward

_listed, __dir__, __all__ = lazy_names(__name__)
_moved = forward(__name__)


def __getattr__(name: str) -> object:
    return (_listed if name in __all__ else _moved)(name)
