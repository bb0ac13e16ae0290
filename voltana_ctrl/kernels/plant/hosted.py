"""Entry for Python governors, which are asked before every iteration.

A function argument costs some 12 us per call from Python, so these calls pass none; a module
of its own because it is compiled anew in each process that needs it (under a second).
"""

from voltana_ctrl.kernels.choose.base import hold_floor
from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.plant.actuation import F8, I8
from voltana_ctrl.kernels.plant.advance import BELIEFS, STATE, advance
from voltana_ctrl.kernels.route.base import by_share


# Not cached: compiled code that holds addresses of functions cannot be.
@njit(I8(*STATE, *BELIEFS, F8), cache=False)
def advance_by_share(
    sims, inst, req, tables, padded, finish, pending_s, pending_k, node_free_s, tree,
    moving_s, moving_r, seen, view, prefill, decode, starts, done, log,
    believed, believed_padded, governor_params, governor_memory,
    prefill_params, prefill_memory, decode_params, decode_memory, until_s,
):  # fmt: skip
    """`advance` with shares for routing and no compiled governor."""
    return advance(
        sims, inst, req, tables, padded, finish, pending_s, pending_k, node_free_s, tree,
        moving_s, moving_r, seen, view, prefill, decode, starts, done, log,
        believed, believed_padded, governor_params, governor_memory,
        prefill_params, prefill_memory, decode_params, decode_memory,
        hold_floor, by_share, by_share, until_s,
    )  # fmt: skip
