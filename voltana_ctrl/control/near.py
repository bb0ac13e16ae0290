"""What decode batches can be by the next target.

A load comes to its equilibrium only after requests have stayed as long as they stay: from an empty
fleet that takes seconds where answers are short, and minutes where they are long. A governor raises
the clock with the batch by itself, so a floor need only be for the batches that can be there before
floors are chosen again. That asks for nothing that is not seen: how long the answers are that are
longer than any that has finished, nobody knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.types import FleetSpec, FleetState, Lengths, Load, Slo

__all__ = ["Near", "near"]

#: Standard deviations by which more may arrive than is expected: once in 700 times.
_CHANCE_SD = 3.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Near:
    """Batches that decode instances can have by the next target.

    Parameters
    ----------
    most_req : ndarray, shape (n,)
        Largest batch of each instance; infinite where nothing is said.
    lengths : Lengths
        Lengths with the context that running requests can have by then.
    """

    most_req: F64
    lengths: Lengths


def near(
    fleet: FleetSpec,
    slo: Slo,
    load: Load,
    loads_req_s: F64,
    state: FleetState | None,
    ahead_s: float,
) -> Near:
    """What the batches of a fleet of separate phases can be so much later.

    Of ``n`` requests on an instance, with arrivals at the rate ``lam``, it becomes by the model
    ``n(t + dt) = n + dt (lam - n / S)`` no more than ``n + lam dt`` however long they stay, and
    by chance (Poisson) three times ``sqrt(lam dt)`` more. Each of them holds what it holds now, and
    one token more for every iteration at the promised pace.

    Nothing is said of colocated instances, whose floors keep prompts in time, too.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    slo : Slo
        The promises.
    load : Load
        Arrivals and lengths.
    loads_req_s : ndarray, shape (n,)
        Load of each instance.
    state : FleetState, optional
        State of the fleet now; without, nothing is said.
    ahead_s : float
        Time until the next target.

    Examples
    --------
    From an empty fleet 20 requests per second become no batch of 200 within a second.

    >>> from dataclasses import replace
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = Load(arrival_req_s=20.0, lengths=length_moments([240, 240], [200, 200]))
    >>> state = FleetState.idle(2)
    >>> slo, rates_req_s = Slo(ttft_s=0.6, itl_s=0.06), np.array([20.0, 20.0])
    >>> near(fleet, slo, load, rates_req_s, state, 1.0).most_req.round(1)
    array([ inf, 33.4])
    >>> state = replace(state, running_req=np.array([0.0, 190.0]))
    >>> near(fleet, slo, load, rates_req_s, state, 1.0).most_req.round(1)
    array([  inf, 223.4])
    """
    most_req = np.full(len(fleet), np.inf)
    if state is None or fleet.colocated:
        return Near(most_req=most_req, lengths=load.lengths)
    decode = np.array(fleet.decode)
    rates_req_s = loads_req_s[decode]
    # The router keeps what runs in proportion to the shares.
    present_req = float((state.running_req + state.queue_req)[decode].sum())
    share = rates_req_s / max(float(rates_req_s.sum()), 1e-9)
    come_req = ahead_s * rates_req_s
    # Until it does, who has more keeps it.
    here_req = np.maximum(share * present_req, (state.running_req + state.queue_req)[decode])
    most_req[decode] = here_req + come_req + _CHANCE_SD * np.sqrt(come_req)
    running_req = float(state.running_req[decode].sum())
    lengths = load.lengths
    if running_req > 0.0 and state.kv_used_tok[decode].any():
        seen_tok = float(state.kv_used_tok[decode].sum()) / running_req + ahead_s / slo.itl_s
        if seen_tok < lengths.context_tok:
            lengths = replace(lengths, context_tok=seen_tok, context_sd_tok=0.0)
    return Near(most_req=most_req, lengths=lengths)
