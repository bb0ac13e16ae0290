"""What an awake instance can carry, and what it draws for it: facets of a convex curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.laws import batch_j, decode_s
from voltana_ctrl.types import InstanceSpec, Lengths, Slo

__all__ = ["FACETS", "Supply", "drain_of", "leaving_j", "lower_hull", "supply_of"]

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
        How far the curve lies above its hull at most.
    drain_s : float
        Time from the last new request until the instance is empty, on average.
    drain_w : float
        Mean power meanwhile, less what serving the same requests would take elsewhere.

    Examples
    --------
    >>> from voltana_ctrl.control.supply import supply_of
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

        Returns
        -------
        float
            Watts.
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
    >>> import numpy as np
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
    drain_j: float | None = None,
    drain_req: float = 0.0,
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
    drain_j, drain_req : float, optional
        Energy that is drawn meanwhile, and requests that are served by it; by default it is up
        with next to no load.

    Raises
    ------
    ConfigError
        If no load can be carried.

    Examples
    --------
    >>> import numpy as np
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
    idle_w = float(np.max(beta))
    drain_w = float(np.max(alpha * 0.05 * most + beta))
    if drain_j is not None and drain_s > 0.0:
        # The load of those requests is counted where it is planned to be.
        served_j = drain_req * float(alpha[np.argmax(alpha * 0.5 * most + beta)])
        drain_w = max(idle_w, (drain_j - served_j) / drain_s)
    return Supply(
        most_req_s=most,
        alpha_j_req=alpha,
        beta_w=beta,
        gap_w=gap_w,
        drain_s=drain_s,
        drain_w=drain_w,
    )


def drain_of(
    instance: InstanceSpec, running_req: float, lengths: Lengths, itl_s: float
) -> tuple[float, float]:
    """Mean time until the last of so many running requests is done, and the energy until then.

    Answers have no memory: of `n` that run one is done after ``output / n`` iterations of ``T(n)``,
    so that the time is ``sum_n output T(n) / n``. The clock is that of least energy per token
    above rest, as :meth:`voltana_ctrl.control.assess.Assessor.thrifty_mhz` has it for who drains.

    Parameters
    ----------
    instance : InstanceSpec
        One that decodes.
    running_req : float
        Requests that run there.
    lengths : Lengths
        Prompt and output lengths of the requests.
    itl_s : float
        Time between tokens that is promised.

    Returns
    -------
    time_s, energy_j
        Seconds, and all that the instance draws in them, in joules.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> decode = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")).instances[1]
    >>> time_s, energy_j = drain_of(decode, 100.0, length_moments([240], [200]), 0.06)
    >>> round(time_s, 1), round(energy_j / time_s)
    (44.0, 112)
    """
    rows = instance.table[:, None]
    n_req = np.arange(1.0, max(1.0, min(running_req, float(instance.max_batch))) + 0.5)
    size_req = instance.profile.padded_batch()[n_req.astype(np.int64)]
    kv_tok = n_req * lengths.context_tok
    step_s = decode_s(rows, size_req, kv_tok)
    drawn_j = step_s * rows["decode_power_w"] + batch_j(rows, n_req, kv_tok)
    above_j = np.where(step_s <= itl_s, drawn_j - step_s * instance.parked_w, np.inf)
    # Where no clock keeps the promise it is the highest.
    above_j[-1] = np.where(np.isinf(above_j).all(axis=0), 0.0, above_j[-1])
    best = np.argmin(above_j, axis=0)
    each = np.arange(n_req.size)
    iterations = lengths.output_tok / n_req
    time_s, energy_j = (float(iterations @ values[best, each]) for values in (step_s, drawn_j))
    return time_s, energy_j


def leaving_j(
    instance: InstanceSpec,
    loads_req_s: F64,
    power_w: F64,
    stays_s: float,
    lengths: Lengths,
    slo: Slo,
) -> float:
    """What an instance draws above rest while it drains, from half of the most that it carries.

    Without what serving the same requests would take where more run at once; what only prefills
    is empty at once.

    Parameters
    ----------
    instance, lengths
        See :func:`drain_of`.
    loads_req_s, power_w : ndarray, shape (n,)
        Loads of the instance and its least power at each, infinite where promises are not kept.
    stays_s : float
        Time that a request spends there at most.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.

    Returns
    -------
    float
        Joules, at least 0.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> decode = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")).instances[1]
    >>> lengths = length_moments([240], [200])
    >>> curve = np.array([1.0, 20.0, 40.0]), np.array([110.0, 180.0, 260.0])
    >>> slo = Slo(ttft_s=0.6, itl_s=0.06)
    >>> [round(leaving_j(decode, *curve, stays_s, lengths, slo)) for stays_s in (2.0, 12.0)]
    [1235, 1666]
    """
    able = np.flatnonzero(np.isfinite(power_w))
    if not able.size or not instance.role.decodes:
        return 0.0
    half = able[able.size // 2]
    held_req = float(loads_req_s[half] * stays_s)
    time_s, energy_j = drain_of(instance, held_req, lengths, slo.itl_s)
    slope_j = (power_w[half] - power_w[0]) / max(loads_req_s[half] - loads_req_s[0], 1e-9)
    return max(0.0, float(energy_j - instance.parked_w * time_s - held_req * slope_j))
