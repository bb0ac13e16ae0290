"""What is learnt while running: load, lengths, pace, headroom, regime, and what a request cost.

``arrivals``
    Kalman filters of arrival rate and lengths, with forecast and bursts.
``forecast``
    What will arrive, with the reserve that its own past errors ask for.
``load``
    The load that the target layer plans for, exponentially weighted.
``lengths``
    Quantiles of output length by request class.
``predictor``, ``learner``
    Latency and energy of every instance at any clock and load: as believed, and as learned from
    iteration records.
``pace``
    Pace of each instance and phase, how late its clock answers, how high it gets.
``margin``, ``headroom``
    The margin that holds the promised attainment, and what is kept free besides.
``regime``
    Whether arrivals set the token rate, or the clock does.
``attribution``
    Energy and latency per request and class; nothing lost, nothing counted twice.

All are pure, ``update(state, ...) -> state``. Kernels are compiled once, with fixed signatures, and
are loaded on first use.
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
from voltana_ctrl.estimate.forecast import (
    Forecaster,
    ForecastMemory,
    Outlook,
    read_forecast,
)
from voltana_ctrl.estimate.headroom import HeadroomFilter, HeadroomMemory
from voltana_ctrl.estimate.learner import Learned, OnlineLearner
from voltana_ctrl.estimate.lengths import LengthEstimator, LengthState, RequestClasses
from voltana_ctrl.estimate.load import LoadFilter, LoadMemory
from voltana_ctrl.estimate.margin import MarginState, MarginTracker
from voltana_ctrl.estimate.pace import PaceFilter, PaceMemory
from voltana_ctrl.estimate.predictor import (
    FleetTables,
    InstancePredictor,
    Prediction,
    predict_decode,
    predict_prefill,
)
from voltana_ctrl.estimate.regime import Regime, RegimeFilter, RegimeMemory

__all__ = [
    "ArrivalEstimator",
    "ArrivalState",
    "EnergyLedger",
    "FleetTables",
    "Forecast",
    "ForecastMemory",
    "Forecaster",
    "HeadroomFilter",
    "HeadroomMemory",
    "InstancePredictor",
    "KalmanState",
    "Learned",
    "LedgerState",
    "LengthEstimator",
    "LengthState",
    "LoadFilter",
    "LoadMemory",
    "MarginState",
    "MarginTracker",
    "OnlineLearner",
    "Outlook",
    "PaceFilter",
    "PaceMemory",
    "Prediction",
    "Regime",
    "RegimeFilter",
    "RegimeMemory",
    "RequestClasses",
    "RequestCost",
    "kalman_step",
    "predict_decode",
    "predict_prefill",
    "read_forecast",
    "share_iterations",
    "split_iterations",
]
