"""Requests of a simulated fleet that may wait, as controllers see them and as they are judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.records import NEVER
from voltana_ctrl.types import Backlog

__all__ = ["Waiting", "deferred_figures"]


class Waiting:
    """Reads the requests that are held, and counts what has moved between two reads.

    Parameters
    ----------
    requests : records of REQUEST_DTYPE, shape (n,)
        All requests of the run, which the kernel changes.

    Examples
    --------
    >>> from voltana_ctrl.sim.records import starting_requests
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> load = make_workload("fixed", rate_req_s=5.0, duration_s=5.0, seed=0).deferred(1.0, 60.0)
    >>> len(Waiting(starting_requests(load)).read(0))
    0
    """

    def __init__(self, requests: Any) -> None:
        self._requests = requests
        self._who = np.flatnonzero(requests["deadline_s"] < NEVER)
        self._tok = np.concatenate([[0.0], np.cumsum(requests["prompt_tok"][self._who])])
        self._nothing = Backlog.empty()
        self._arrived = 0
        self._admitted_req = 0.0
        self._admitted_tok = 0.0

    def read(self, next_arrival: int) -> Backlog:
        """What is held now.

        Parameters
        ----------
        next_arrival : int
            The first request that has not arrived.
        """
        if self._who.size == 0:
            return self._nothing
        arrived = int(np.searchsorted(self._who, next_arrival))
        come = self._who[:arrived]
        held = come[self._requests["state"][come] == layout.DEFERRED]
        deadline_s = self._requests["deadline_s"][held]
        order = np.argsort(deadline_s, kind="stable")
        prompt_tok = self._requests["prompt_tok"][held][order].astype(np.float64)
        admitted_req = float(arrived - held.size)
        admitted_tok = float(self._tok[arrived] - prompt_tok.sum())
        found = Backlog(
            deadline_s=deadline_s[order],
            prompt_tok=prompt_tok,
            arrived_req=float(arrived - self._arrived),
            arrived_tok=float(self._tok[arrived] - self._tok[self._arrived]),
            admitted_req=admitted_req - self._admitted_req,
            admitted_tok=admitted_tok - self._admitted_tok,
        )
        self._arrived = arrived
        self._admitted_req, self._admitted_tok = admitted_req, admitted_tok
        return found


def deferred_figures(rows: Any, end_s: float) -> dict[str, int | None]:
    """Figures of those judged that might wait, as the JSON of ``compare`` names them.

    Parameters
    ----------
    rows : records of REQUEST_DTYPE
        Judged requests.
    end_s : float
        Time until which they were watched.

    Returns
    -------
    dict
        None where there was nobody who might wait.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.kernels import layout
    >>> rows = np.zeros(3, dtype=layout.REQUEST_DTYPE)
    >>> rows["state"] = layout.DONE, layout.DONE, layout.DEFERRED
    >>> rows["deadline_s"], rows["done_s"] = 60.0, [50.0, 70.0, -1.0]
    >>> deferred_figures(rows, 65.0)["deadline_missed"]
    2
    """
    late = rows[rows["deadline_s"] < NEVER]
    names = ("arrived", "completed", "in_flight", "dropped")
    if late.size == 0:
        return dict.fromkeys([*(f"deferred_{name}" for name in names), "deadline_missed"])
    done, dropped = late["state"] == layout.DONE, late["state"] == layout.DROPPED
    in_time = done & (late["done_s"] <= late["deadline_s"])
    # Who is not done is missed once the deadline is over; who was refused will never be done.
    open_still = ~done & ~dropped & (late["deadline_s"] > end_s)
    counts = (late.size, done.sum(), (~done & ~dropped).sum(), dropped.sum())
    return {
        **{f"deferred_{name}": int(number) for name, number in zip(names, counts, strict=True)},
        "deadline_missed": int((~in_time & ~open_still).sum()),
    }
