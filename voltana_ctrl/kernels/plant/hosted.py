"""Entry for Python governors, which are asked before every iteration.

A function argument costs some 12 us per call from Python, so these calls pass none; a module
of its own because it is compiled anew in each process that needs it (under a second).
"""

from voltana_ctrl.kernels.choose.base import hold_floor
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.plant.actuation import F8, I8
from voltana_ctrl.kernels.plant.advance import advance
from voltana_ctrl.kernels.plant.state import BELIEVED, FLEET
from voltana_ctrl.kernels.route.base import by_share


# Not cached: compiled code that holds addresses of functions cannot be.
@njit(I8(FLEET, BELIEVED, F8), cache=False)
def advance_by_share(fleet, believed, until_s):
    """`advance` with shares for routing and no compiled governor."""
    return advance(fleet, believed, hold_floor, by_share, by_share, until_s)
