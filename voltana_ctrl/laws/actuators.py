"""Clock lock against power cap, memory clock and CPU clock, from measurements alone.

Published evidence points in opposite directions: on B200 a power cap saved more than any clock
lock in decode (arXiv 2609.11133), on H200 caps never bound there (arXiv 2605.11999). So nothing
is assumed. A setting is compared with clock locks that were measured at the same load.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from voltana_ctrl.checks import F64, Bool, fraction
from voltana_ctrl.laws.iteration import at_clock, decode_j, decode_s, prefill_j, prefill_s
from voltana_ctrl.types import ActuatorPoint, ActuatorSetting, Profile

__all__ = ["ActuatorTable", "compare_actuators"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActuatorTable:
    """What each measured setting saves against each clock lock.

    Parameters
    ----------
    settings : tuple of ActuatorSetting
        Those that set more than the SM clock.
    loads : tuple of (phase, batch_req, context_tok)
        Loads at which they were measured.
    clocks_mhz : ndarray, shape (n_clocks,)
        Clock locks that they are compared with.
    saving_w : ndarray, shape (n_loads, n_settings, n_clocks)
        Power that the setting surely saves against the lock while it is surely no slower: the
        lower bound of its confidence interval, not its mean. Minus infinity where it is not surely
        so, where the saving is too small to count, and where either was not measured.
    inert : ndarray of bool, shape (n_loads, n_settings)
        Whether the setting makes no difference to a lock at its clock.

    Examples
    --------
    Measured with 8 and with 32 requests: it speaks for 20 requests, not for 40.

    >>> import numpy as np
    >>> loads = (("decode", 8, 512), ("decode", 32, 512))
    >>> table = ActuatorTable(settings=(), loads=loads, clocks_mhz=np.array([705.0]),
    ...                       saving_w=np.empty((2, 0, 1)), inert=np.empty((2, 0), bool))
    >>> table.around("decode", 20.0, 512.0), table.around("decode", 40.0, 512.0)
    ([0, 1], [])
    """

    settings: tuple[ActuatorSetting, ...]
    loads: tuple[tuple[str, int, int], ...]
    clocks_mhz: F64
    saving_w: F64
    inert: Bool

    def best(self, saving_w: F64) -> int:
        """Number of the setting that saves most at every one of these loads; -1 for the lock.

        Parameters
        ----------
        saving_w : ndarray, shape (n_loads_at_hand, n_settings)
            Savings against the lock in question: rows of the table's `saving_w` at its clock.

        Returns
        -------
        int
            Place in `settings` of the one whose least saving is largest; -1 if none saves at all
            of the loads, or no load is given.
        """
        if saving_w.size == 0:
            return -1
        least_w = saving_w.min(axis=0)
        best = int(np.argmax(least_w))
        return best if least_w[best] > 0.0 else -1

    def around(self, phase: str, batch_req: float, context_tok: float) -> list[int]:
        """Numbers of the measured loads around a load; none where it lies outside them.

        A measurement speaks for loads between two at which it was made, not beyond: a cap that
        does nothing at small batches slows large ones down.

        Parameters
        ----------
        phase : {"decode", "prefill"}
            What runs.
        batch_req, context_tok : float
            Requests at once, and tokens of context of each.

        Returns
        -------
        list of int
            Places in `loads`.
        """
        here = [k for k, load in enumerate(self.loads) if load[0] == phase]
        found: list[int] = []
        for batch in _beside(sorted({self.loads[k][1] for k in here}), batch_req):
            row = [k for k in here if self.loads[k][1] == batch]
            beside = _beside(sorted(self.loads[k][2] for k in row), context_tok)
            if not beside:
                return []
            found += [k for k in row if self.loads[k][2] in beside]
        return found

    def of_phase(self, phase: str) -> list[int]:
        """Numbers of all loads of a phase.

        Parameters
        ----------
        phase : {"decode", "prefill"}
            What runs.

        Returns
        -------
        list of int
            Places in `loads`.
        """
        return [k for k, load in enumerate(self.loads) if load[0] == phase]


def _beside(values: list[int], value: float) -> list[int]:
    """Nearest of ascending values at or below and at or above; none if one is missing."""
    below = [each for each in values if each <= value]
    above = [each for each in values if each >= value]
    return sorted({below[-1], above[0]}) if below and above else []


def compare_actuators(
    profile: Profile,
    clocks_mhz: F64 | None = None,
    *,
    confidence_frac: float = 0.975,
    least_saving_frac: float = 0.01,
) -> ActuatorTable:
    """Compare all measured settings with clock locks at equal latency.

    Between two clocks that were measured, time and power of a lock follow the law of the
    profile, scaled to hit both measurements.

    Parameters
    ----------
    profile : Profile
        A profile with measured points of other actuators.
    clocks_mhz : ndarray, optional
        Clock locks to compare with; those of the profile by default.
    confidence_frac : float
        Probability with which a setting must be no slower, and with which it must draw less.
    least_saving_frac : float
        Part of the lock's power below which a saving counts as a tie, which the lock wins.

    Returns
    -------
    ActuatorTable
        Empty where the profile has no points.

    Raises
    ------
    ConfigError
        If the confidence is not between 0 and 1.

    Examples
    --------
    A cap that holds 20 ms at 200 W, where the lock that is as fast draws 250 W.

    >>> from dataclasses import replace
    >>> import numpy as np
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.types import ActuatorPoint
    >>> def point(freq_mhz, wall_s, power_w, cap_w=None):
    ...     return ActuatorPoint(phase="decode", batch_req=32, context_tok=512, kv_tok=18e3,
    ...                          freq_mhz=freq_mhz, power_cap_w=cap_w, wall_s=wall_s,
    ...                          wall_se_s=1e-5, power_w=power_w, power_se_w=0.5)
    >>> measured = (point(1410.0, 0.018, 300.0), point(1005.0, 0.020, 250.0),
    ...             point(705.0, 0.028, 160.0), point(1410.0, 0.0199, 200.0, cap_w=200.0))
    >>> profile = replace(load_profile("a100-sxm-80gb/llama-3.1-8b"), actuators=measured)
    >>> table = compare_actuators(profile, np.array([705.0, 1005.0]))
    >>> str(table.settings[0]), table.saving_w[0, 0].round(1)
    ('1410 MHz, power cap 200 W', array([-inf, 48.6]))
    """
    fraction("compare_actuators.confidence_frac", confidence_frac)
    sure_sd = NormalDist().inv_cdf(confidence_frac)
    clocks = profile.clocks_mhz if clocks_mhz is None else np.asarray(clocks_mhz)
    points = profile.actuators
    loads = tuple(sorted({point.load for point in points}))
    settings = tuple(
        dict.fromkeys(point.setting for point in points if not point.setting.lock_only)
    )
    saving_w = np.full((len(loads), len(settings), len(clocks)), -np.inf)
    inert = np.zeros((len(loads), len(settings)), bool)
    for row, load in enumerate(loads):
        here = [point for point in points if point.load == load]
        locks = sorted(
            (point for point in here if point.setting.lock_only), key=lambda point: point.freq_mhz
        )
        if len(locks) < 2:
            continue
        lock = _Lock(profile, locks, clocks)
        for point in here:
            if point.setting.lock_only:
                continue
            column = settings.index(point.setting)
            faster_s = lock.wall_s - point.wall_s
            less_w = lock.power_w - point.power_w
            sure_w = less_w - sure_sd * np.hypot(lock.power_se_w, point.power_se_w)
            no_slower = faster_s >= sure_sd * np.hypot(lock.wall_se_s, point.wall_se_s)
            pays = sure_w > least_saving_frac * lock.power_w
            saving_w[row, column] = np.where(no_slower & pays & lock.measured, sure_w, -np.inf)
            inert[row, column] = any(
                _same(point, other, sure_sd, least_saving_frac)
                for other in locks
                if other.freq_mhz == point.freq_mhz
            )
    return ActuatorTable(
        settings=settings, loads=loads, clocks_mhz=clocks, saving_w=saving_w, inert=inert
    )


class _Lock:
    """Time and power of clock locks at one load, at each clock."""

    def __init__(self, profile: Profile, locks: list[ActuatorPoint], clocks_mhz: F64) -> None:
        known_mhz = np.array([point.freq_mhz for point in locks])
        self.measured = (clocks_mhz >= known_mhz[0]) & (clocks_mhz <= known_mhz[-1])
        law_s, law_w = _law(profile, locks[0], known_mhz)
        at_s, at_w = _law(profile, locks[0], clocks_mhz)
        wall_s = np.array([point.wall_s for point in locks])
        power_w = np.array([point.power_w for point in locks])
        self.wall_s = at_s * np.interp(clocks_mhz, known_mhz, wall_s / law_s)
        self.power_w = at_w * np.interp(clocks_mhz, known_mhz, power_w / law_w)
        wall_se_s = np.array([point.wall_se_s for point in locks])
        power_se_w = np.array([point.power_se_w for point in locks])
        self.wall_se_s = self.wall_s * np.interp(clocks_mhz, known_mhz, wall_se_s / wall_s)
        self.power_se_w = self.power_w * np.interp(clocks_mhz, known_mhz, power_se_w / power_w)


def _law(profile: Profile, point: ActuatorPoint, clocks_mhz: F64) -> tuple[F64, F64]:
    """Time and power that the profile expects of this load at each clock."""
    rows = at_clock(profile, clocks_mhz)
    if point.phase == "decode":
        wall_s = decode_s(rows, point.batch_req, point.kv_tok)
        return wall_s, decode_j(rows, point.batch_req, point.kv_tok) / wall_s
    tok = float(point.batch_req * point.context_tok)
    square_tok2 = float(point.batch_req * point.context_tok**2)
    wall_s = prefill_s(rows, tok, square_tok2)
    return wall_s, prefill_j(rows, tok, square_tok2) / wall_s


def _same(
    point: ActuatorPoint, other: ActuatorPoint, sure_sd: float, least_saving_frac: float
) -> bool:
    """Whether two measurements cannot be told apart."""
    slack_s = max(
        sure_sd * float(np.hypot(point.wall_se_s, other.wall_se_s)),
        least_saving_frac * other.wall_s,
    )
    slack_w = max(
        sure_sd * float(np.hypot(point.power_se_w, other.power_se_w)),
        least_saving_frac * other.power_w,
    )
    return (
        abs(point.wall_s - other.wall_s) <= slack_s
        and abs(point.power_w - other.power_w) <= slack_w
    )
