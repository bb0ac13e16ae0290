"""The compiled governor port, and the governor that runs at the floor.

A governor is a function of :data:`GOVERNOR_SIGNATURE`; it is called before each iteration and
returns the clock in MHz that the iteration should run at:

``step(rows, padded, params, memory, t_s, running_req, kv_tok, waiting_tok, batch_tok,
oldest_wait_s, floor_mhz, ceiling_mhz) -> freq_mhz``

rows : records of PROFILE_DTYPE, the believed coefficients per clock of this instance
padded : int64, executed size of every batch size
params, memory : float64, settings of this instance and what it remembers (writable)
t_s : time now
running_req, kv_tok : requests that this iteration decodes, and their tokens in the KV cache
waiting_tok : prompt tokens not prefilled yet, this iteration's `batch_tok` included
oldest_wait_s : how long the oldest of those prompts has waited
floor_mhz, ceiling_mhz : between which clocks it may choose
"""

from numba import types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.law import ROW

F8, I8 = types.float64, types.int64
ROWS = types.Array(ROW, 1, "C")
GOVERNOR_SIGNATURE = F8(
    ROWS,
    types.Array(I8, 1, "C"),
    types.Array(F8, 1, "C"),
    types.Array(F8, 1, "C"),
    *(F8,) * 8,
)
GOVERNOR = types.FunctionType(GOVERNOR_SIGNATURE)

#: Length of a governor's memory.
N_MEMORY = 13


@njit([GOVERNOR_SIGNATURE])
def hold_floor(
    rows,
    padded,
    params,
    memory,
    t_s,
    running_req,
    kv_tok,
    waiting_tok,
    batch_tok,
    oldest_wait_s,
    floor_mhz,
    ceiling_mhz,
):
    """Run at the floor that the controller set."""
    return floor_mhz
