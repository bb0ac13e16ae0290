"""The compiled governor port, and the shipped governors.

A governor is a function of :data:`GOVERNOR_SIGNATURE`; it is called before each iteration and
returns the clock in MHz that the iteration should run at:

``step(rows, padded, params, memory, t_s, running_req, kv_tok, waiting_tok, batch_tok,
oldest_wait_s, floor_mhz, ceiling_mhz) -> freq_mhz``

rows : records of PROFILE_DTYPE, the believed coefficients per clock of this instance
padded : int64, executed size of every batch size
params, memory : float64, settings of this instance and what it remembers (writable)
waiting_tok : prompt tokens not prefilled yet, this iteration's `batch_tok` included
"""

from numba import njit, types

from voltana_ctrl._kernels.cost import ROW, decode_s, prefill_s

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
N_MEMORY = 10

# EcoFreq's params
ECO_PREFILL_SLO_S, ECO_DECODE_SLO_S, ECO_N_LADDER, ECO_LADDER = range(4)


@njit([GOVERNOR_SIGNATURE], cache=True)
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


@njit([GOVERNOR_SIGNATURE], cache=True)
def ecofreq(
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
    """VoltanaLLM v0.1's rules 3 to 6 (freq_manager.py): the lowest ladder clock that is enough.

    params: prefill target, decode target [s], number of ladder entries, their row indices.
    """
    n_ladder = int(params[ECO_N_LADDER])
    lowest = rows[int(params[ECO_LADDER])]["clock_mhz"]
    highest = rows[int(params[ECO_LADDER + n_ladder - 1])]["clock_mhz"]
    if waiting_tok > batch_tok:
        return highest
    if running_req == 0.0 and batch_tok == 0.0:
        return lowest
    for entry in range(n_ladder - 1):
        row = rows[int(params[ECO_LADDER + entry])]
        enough = True
        spent_s = 0.0
        if running_req > 0.0:
            spent_s = decode_s(row, padded[int(running_req)], kv_tok)
            if batch_tok > 0.0:
                spent_s += row["prefill_tok_s"] * batch_tok
            enough = spent_s <= params[ECO_DECODE_SLO_S]
        if enough and batch_tok > 0.0:
            if running_req == 0.0:
                spent_s = prefill_s(row, batch_tok, 0.0)
            enough = spent_s <= params[ECO_PREFILL_SLO_S] - oldest_wait_s
        if enough:
            return row["clock_mhz"]
    return highest
