"""What arrives, how long it gets, and what it cost: estimates from counts and records.

``arrivals``
    Kalman filters of arrival rate and lengths, with forecast and bursts.
``lengths``
    Quantiles of output length by request class.
``attribution``
    Energy and latency per request and class; nothing lost, nothing counted twice.

All are pure: ``update(state, ...) -> state``.
"""

from __future__ import annotations

from voltana_ctrl.estimate.arrivals import (
    ArrivalEstimator,
    ArrivalState,
    Forecast,
    KalmanState,
    kalman_step,
)
from voltana_ctrl.estimate.attribution import (
    EnergyLedger,
    LedgerState,
    RequestCost,
    share_iterations,
    split_iterations,
)
from voltana_ctrl.estimate.lengths import LengthEstimator, LengthState, RequestClasses

__all__ = [
    "ArrivalEstimator",
    "ArrivalState",
    "EnergyLedger",
    "Forecast",
    "KalmanState",
    "LedgerState",
    "LengthEstimator",
    "LengthState",
    "RequestClasses",
    "RequestCost",
    "kalman_step",
    "share_iterations",
    "split_iterations",
]
