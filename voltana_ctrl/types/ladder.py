"""The clock ladder of an instance: its supported clocks, ascending, and how to round to one.

Clocks are rounded up where latency comes first and down under a ceiling. The compiled twin is in
:mod:`voltana_ctrl.kernels.law`.
"""

from __future__ import annotations

import numpy as np

from voltana_ctrl.checks import F64

__all__ = ["row_down", "row_nearest", "row_up"]


def row_up(clocks_mhz: F64, freq_mhz: float) -> int:
    """Row of the lowest clock at or above this one; the highest if there is none.

    Parameters
    ----------
    clocks_mhz : ndarray, shape (n_clocks,)
        The ladder, ascending.
    freq_mhz : float
        Any clock.

    Returns
    -------
    int
        Position in `clocks_mhz`.

    Examples
    --------
    >>> import numpy as np
    >>> ladder_mhz = np.array([210.0, 705.0, 1410.0])
    >>> [row_up(ladder_mhz, mhz) for mhz in (100.0, 705.0, 706.0, 2000.0)]
    [0, 1, 2, 2]
    """
    return min(int(clocks_mhz.searchsorted(freq_mhz)), len(clocks_mhz) - 1)


def row_down(clocks_mhz: F64, freq_mhz: float) -> int:
    """Row of the highest clock at or below this one; the lowest if there is none.

    Parameters
    ----------
    clocks_mhz : ndarray, shape (n_clocks,)
        The ladder, ascending.
    freq_mhz : float
        Any clock.

    Returns
    -------
    int
        Position in `clocks_mhz`.

    Examples
    --------
    >>> import numpy as np
    >>> ladder_mhz = np.array([210.0, 705.0, 1410.0])
    >>> [row_down(ladder_mhz, mhz) for mhz in (100.0, 704.0, 705.0, 2000.0)]
    [0, 0, 1, 2]
    """
    return max(int(clocks_mhz.searchsorted(freq_mhz, side="right")) - 1, 0)


def row_nearest(clocks_mhz: F64, freq_mhz: float) -> int:
    """Row of the clock nearest to this one; of two equally near the lower.

    Parameters
    ----------
    clocks_mhz : ndarray, shape (n_clocks,)
        The ladder, ascending.
    freq_mhz : float
        Any clock, such as one that was read.

    Returns
    -------
    int
        Position in `clocks_mhz`.

    Examples
    --------
    >>> import numpy as np
    >>> row_nearest(np.array([210.0, 300.0, 390.0]), 260.0)
    1
    """
    return int(np.argmin(np.abs(clocks_mhz - freq_mhz)))
