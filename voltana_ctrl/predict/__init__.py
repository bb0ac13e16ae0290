"""Latency and energy of every instance at any clock and load, as believed and as learned.

:class:`FleetTables` holds coefficients per instance; :func:`predict_decode` and
:func:`predict_prefill` answer many questions at once, :class:`InstancePredictor` one;
:class:`ClockChooser` picks the lowest clock that meets the targets, for one instance or the
fleet. :class:`OnlineLearner` turns iteration records into better tables.

Kernels are compiled once, with fixed signatures, and are loaded on first use.
"""

from __future__ import annotations

from voltana_ctrl.predict.choose import ClockChooser
from voltana_ctrl.predict.online import Learned, OnlineLearner
from voltana_ctrl.predict.tables import (
    FleetTables,
    InstancePredictor,
    Prediction,
    predict_decode,
    predict_prefill,
)

__all__ = [
    "ClockChooser",
    "FleetTables",
    "InstancePredictor",
    "Learned",
    "OnlineLearner",
    "Prediction",
    "predict_decode",
    "predict_prefill",
]
