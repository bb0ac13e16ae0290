"""Room for the loss of instances: how many may go, and who is kept active for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, not_negative
from voltana_ctrl.control.curve import LeastPower
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import Lengths

__all__ = ["spare_count", "speeds_req_s", "with_spare"]


def spare_count(spare: float, n_active: int = 1) -> int:
    """How many of the active instances may be lost.

    Parameters
    ----------
    spare : float
        A whole number, or below 1 a share of the active ones.
    n_active : int
        How many are active.

    Returns
    -------
    int
        How many; a share is rounded up.

    Raises
    ------
    ConfigError
        If it is neither.

    Examples
    --------
    >>> spare_count(0.0), spare_count(1.0, 4), spare_count(0.1, 4), spare_count(0.1, 24)
    (0, 1, 1, 3)
    """
    not_negative("spare", spare)
    if spare >= 1.0 and spare != int(spare):
        raise ConfigError(
            f"spare: expected a whole number of instances or a share below 1, got {spare:g}"
        )
    return int(spare) if spare >= 1.0 else math.ceil(spare * n_active)


def speeds_req_s(n: int, known: Iterable[tuple[I64, LeastPower]], lengths: Lengths) -> F64:
    """What each of `n` instances serves at its highest clock, shape (n,); 0 for the others.

    Parameters
    ----------
    n : int
        Instances of the fleet.
    known : iterable of (numbers, LeastPower)
        Groups of equal instances.
    lengths : Lengths
        Prompt and output lengths of the requests.
    """
    speed_req_s = np.zeros(n)
    for group, least in known:
        speed_req_s[group] = least.speed_req_s(lengths)
    return speed_req_s


def with_spare(spare: float, wanted: Bool, speed_req_s: F64, serves: Callable[[F64], bool]) -> Bool:
    """Those wanted, and as many more as it takes to serve without the fastest of them.

    Parameters
    ----------
    spare : float
        See :func:`spare_count`.
    wanted : ndarray of bool, shape (n,)
        Who is needed while nobody is lost.
    speed_req_s : ndarray, shape (n,)
        What each instance serves at its highest clock; 0 for those that cannot be used.
    serves : callable
        Whether those marked by 1 in an ndarray of shape (n,) serve the load.

    Returns
    -------
    ndarray of bool, shape (n,)
        Everybody that can be used, where no fewer are enough.

    Examples
    --------
    >>> import numpy as np
    >>> two_serve = lambda rest: rest.sum() >= 2
    >>> wanted = np.array([True, True, False, False, False])
    >>> with_spare(1.0, wanted, np.array([5.0, 5.0, 5.0, 9.0, 0.0]), two_serve)
    array([ True,  True, False,  True, False])
    """
    usable = np.flatnonzero(speed_req_s > 0.0)
    # Who is wanted already comes first, then the fastest.
    order = usable[np.lexsort((-speed_req_s[usable], ~wanted[usable]))]
    active = np.zeros(len(wanted), dtype=bool)
    for n_active in range(max(1, int(wanted.sum())), len(order) + 1):
        active[order[:n_active]] = True
        awake = order[:n_active]
        slowest_last = awake[np.argsort(-speed_req_s[awake], kind="stable")]
        rest = np.zeros(len(wanted))
        rest[slowest_last[spare_count(spare, n_active) :]] = 1.0
        if rest.any() and serves(rest):
            break
    return active
