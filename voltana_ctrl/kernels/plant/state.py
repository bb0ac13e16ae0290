"""The arrays of a simulated fleet, by name, and what governors and routers believe of it."""

from typing import Any, NamedTuple

from numba import from_dtype, types

from voltana_ctrl.kernels.compiled import njit
from voltana_ctrl.kernels.layout import ITERATION_DTYPE
from voltana_ctrl.kernels.plant.actuation import F8_1, F8_2, I8, I8_1, I8_2, INSTS, TABLES
from voltana_ctrl.kernels.plant.batching import REQS
from voltana_ctrl.kernels.plant.events import SEENS, SIMS, remember, touch


class Fleet(NamedTuple):
    """All that the plant is; records of one row each are in :mod:`voltana_ctrl.kernels.layout`.

    Every array is changed in place. `n` instances, `m` requests.
    """

    sims: Any  # (1,) time, counters, and heads of the lists of requests
    inst: Any  # (n,) instances
    req: Any  # (m,) requests
    tables: Any  # (types, clocks) coefficients at each clock
    padded: Any  # (types, batch) batch that the engine computes for one of this size
    finish: Any  # (n, ring) first request of each list of those that finish at a step
    pending_s: Any  # (n, pending) when clocks that were asked for run
    pending_k: Any  # (n, pending) which ones
    node_free_s: Any  # (nodes,) when the next clock can be set on a node
    tree: Any  # tournament of the instances' next events
    moving_s: Any  # (m,) heap: when KV caches on their way arrive
    moving_r: Any  # (m,) of which requests
    seen: Any  # (n, seen) late states, which routers see
    shown: Any  # (fields, n) what a router is shown
    prefill: Any  # instances that may prefill
    decode: Any  # instances that may decode
    starts: Any  # (n + 1,) instances that may begin an iteration now
    done: Any  # (m,) requests in the order in which they ended
    log: Any  # (rows,) ring of iterations


class Believed(NamedTuple):
    """Settings and memories of governors and routers, and the tables that they predict with."""

    tables: Any  # (types, clocks)
    padded: Any  # (types, batch)
    governor_params: Any  # (n, params)
    governor_memory: Any  # (n, memory)
    prefill_params: Any
    prefill_memory: Any
    decode_params: Any
    decode_memory: Any


FLEET = types.NamedTuple(
    (
        SIMS, INSTS, REQS, TABLES, I8_2, I8_2, F8_2, I8_2, F8_1, F8_1, F8_1, I8_1, SEENS, F8_2,
        I8_1, I8_1, I8_1, I8_1, types.Array(from_dtype(ITERATION_DTYPE), 1, "C"),
    ),
    Fleet,
)  # fmt: skip
BELIEVED = types.NamedTuple((TABLES, I8_2, F8_2, F8_2, F8_1, F8_1, F8_1, F8_1), Believed)


@njit(types.void(FLEET, I8))
def note(fleet, i):
    """Let routers see the state of instance i, and find when it needs attention next."""
    remember(fleet.inst, fleet.tables, fleet.seen, i, fleet.sims[0]["now_s"])
    touch(fleet.inst, fleet.pending_s, fleet.tree, i)
