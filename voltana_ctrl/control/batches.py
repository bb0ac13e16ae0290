"""How large batches may become within ITL, and how large they would be at it."""

from __future__ import annotations

import numpy as np

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.laws import decode_s
from voltana_ctrl.types import FleetSpec, FleetState
from voltana_ctrl.types.ladder import row_up

__all__ = ["Batches"]

#: KV utilisation that batches may reach.
_KV_FRAC = 0.9
#: Context assumed while nothing runs.
CONTEXT_TOK = 512.0


class Batches:
    """Decode batches of a fleet, told from states and profiles; no rate and no length is estimated.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    itl_s : float
        Time that an iteration may take.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> Batches(fleet, 0.06).holds_req(fleet.max_mhz, context_tok=400.0)
    array([576., 576.])
    """

    def __init__(self, fleet: FleetSpec, itl_s: float) -> None:
        self._fleet = fleet
        self._itl_s = itl_s
        self._padded = [one.profile.padded_batch(one.max_batch) for one in fleet.instances]
        self._tables = [one.table for one in fleet.instances]

    def at_target_req(self, state: FleetState) -> F64:
        """Batch and queue of each instance if every iteration took as long as it may, shape (n,).

        By Little's law: as many tokens are to be decoded a second, and those who wait longer for
        each are more.

        Parameters
        ----------
        state : FleetState
            State of the fleet now.

        Returns
        -------
        ndarray, shape (n,)
            Requests.
        """
        found = np.array(state.queue_req, dtype=np.float64)
        for i in np.flatnonzero(state.running_req > 0.0).tolist():
            running_req = float(state.running_req[i])
            row = self._row(i, float(state.freq_mhz[i]))
            padded = self._padded[i]
            size = float(padded[min(int(running_req), len(padded) - 1)])
            step_s = float(decode_s(row, running_req, float(state.kv_used_tok[i]), size))
            found[i] += running_req * max(1.0, self._itl_s / step_s)
        return found

    def holds_req(self, freq_mhz: F64, context_tok: float) -> F64:
        """Largest batch of each instance within ITL, KV cache and batch limit, shape (n,).

        Parameters
        ----------
        freq_mhz : ndarray, shape (n,)
            At these clocks.
        context_tok : float
            Tokens of a request, on average.

        Returns
        -------
        ndarray, shape (n,)
            Requests; 0 where not even one keeps the ITL.
        """
        held = np.zeros(len(self._fleet))
        known: dict[tuple[int, float, int, int], float] = {}
        for i, one in enumerate(self._fleet.instances):
            key = (id(one.profile), float(freq_mhz[i]), one.max_batch, one.kv_capacity_tok)
            if key not in known:
                sizes = np.arange(1.0, one.max_batch + 1.0)
                row = self._row(i, float(freq_mhz[i]))
                step_s = decode_s(row, sizes, context_tok * sizes, self._padded[i][1:])
                inside = (step_s <= self._itl_s) & (
                    context_tok * sizes <= _KV_FRAC * one.kv_capacity_tok
                )
                known[key] = float(np.count_nonzero(inside))
            held[i] = known[key]
        return held

    def _row(self, i: int, freq_mhz: float) -> np.ndarray:
        table = self._tables[i]
        row: np.ndarray = table[row_up(table["clock_mhz"], freq_mhz)]
        return row


def context_tok(state: FleetState, members: I64) -> float:
    """Tokens of a running request, on average over these instances."""
    running_req = float(state.running_req[members].sum())
    if running_req == 0.0:
        return CONTEXT_TOK
    return max(1.0, float(state.kv_used_tok[members].sum()) / running_req)
