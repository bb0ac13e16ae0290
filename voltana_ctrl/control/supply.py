"""What an awake instance can carry, and what it draws for it: facets of a convex curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError

__all__ = ["FACETS", "Supply", "drain_time_s", "lower_hull", "supply_of"]

#: Facets of the power of an instance against its load.
FACETS = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Supply:
    """Power of one awake instance against its load, ``max_l (alpha_l x + beta_l)``.

    Parameters
    ----------
    most_req_s : float
        Largest load within the promises.
    alpha_j_req, beta_w : ndarray, shape (n_facets,)
        Slope and intercept of each facet.
    gap_w : float
        By how much the curve lies above its hull at most.
    drain_s : float
        Time from the last new request until the instance is empty, on average.
    drain_w : float
        Power meanwhile.

    Examples
    --------
    >>> supply = supply_of([1.0, 2.0, 3.0], [70.0, 85.0, 110.0], facets=3)
    >>> supply.most_req_s, supply.power_w(2.5)
    (3.0, 97.5)
    """

    most_req_s: float
    alpha_j_req: F64
    beta_w: F64
    gap_w: float
    drain_s: float
    drain_w: float

    def power_w(self, load_req_s: float) -> float:
        """Power at a load, by the facets.

        Parameters
        ----------
        load_req_s : float
            Requests per second at this instance.
        """
        return float(np.max(self.alpha_j_req * load_req_s + self.beta_w))


def lower_hull(x: F64, y: F64) -> list[int]:
    """Indices of the points on the lower convex hull, ascending `x`.

    Parameters
    ----------
    x, y : ndarray, shape (n,)
        Points, `x` ascending.

    Examples
    --------
    >>> lower_hull(np.array([0.0, 1.0, 2.0]), np.array([0.0, 3.0, 2.0]))
    [0, 2]
    """
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def supply_of(
    loads_req_s: F64 | list[float],
    power_w: F64 | list[float],
    *,
    facets: int,
    drain_s: float = 0.0,
) -> Supply:
    """Supply from a curve of least power, infinite where the promises cannot be kept.

    Parameters
    ----------
    loads_req_s, power_w : array_like, shape (n,)
        The curve, loads ascending.
    facets : int
        How many to keep, those that are closest to the curve.
    drain_s : float
        See :class:`Supply`.

    Raises
    ------
    ConfigError
        If no load can be carried.

    Examples
    --------
    >>> supply_of([1.0, 2.0], [70.0, np.inf], facets=2).alpha_j_req
    array([0., 0.])
    """
    loads, power = np.asarray(loads_req_s, np.float64), np.asarray(power_w, np.float64)
    able = np.isfinite(power)
    if not able.any():
        raise ConfigError(
            "supply_of: expected a load within the promises, got none; relax the SLO or take a"
            " faster instance"
        )
    # A batch of one keeps an instance as busy as a large one: the power jumps as soon as there is
    # any load, and the curve starts where its first chord meets no load.
    x, y = loads[able], power[able]
    slope = (y[1] - y[0]) / (x[1] - x[0]) if len(x) > 1 else 0.0
    x, y = np.append(0.0, x), np.append(max(0.0, y[0] - slope * x[0]), y)
    corners = lower_hull(x, y)
    hull_x, hull_w = x[corners], y[corners]
    gap_w = float(np.max(y - np.interp(x, hull_x, hull_w)))
    # Chords lie on the hull or above it; a corner is added where they are furthest off.
    at = np.array([0, len(corners) - 1])
    while at.size <= facets:
        above_w = np.interp(hull_x, hull_x[at], hull_w[at]) - hull_w
        if above_w.max() <= 1e-9:
            break
        at = np.sort(np.append(at, np.argmax(above_w)))
    alpha = np.diff(hull_w[at]) / np.diff(hull_x[at])
    beta = hull_w[at][:-1] - alpha * hull_x[at][:-1]
    missing = facets - alpha.size
    alpha, beta = np.pad(alpha, (0, missing), "edge"), np.pad(beta, (0, missing), "edge")
    most = float(x[-1])
    # What drains is up with a small batch for most of that time; its load is counted where it is.
    return Supply(
        most_req_s=most,
        alpha_j_req=alpha,
        beta_w=beta,
        gap_w=gap_w,
        drain_s=drain_s,
        drain_w=float(np.max(alpha * 0.05 * most + beta)),
    )


def drain_time_s(running_req: float, residence_s: float) -> float:
    """Mean time until the last of so many requests is done, each for an exponential time.

    ``residence_s`` times the harmonic number.

    Parameters
    ----------
    running_req : float
        How many run.
    residence_s : float
        Mean time of each.

    Examples
    --------
    >>> round(drain_time_s(50.0, 10.0), 1)
    45.0
    """
    n = max(1.0, running_req)
    return residence_s * (math.log(n) + 0.5772156649 + 0.5 / n)
