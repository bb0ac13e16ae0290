"""Identification: a table of measured iterations becomes a profile, with its errors.

:func:`fit_table` reads, detects the staircase, fits the laws, cross-validates, and refuses by
name what the table cannot support. ``docs/identification.md`` tells the format and the method.
"""

from voltana_ctrl.fit.actuators import actuator_lines, actuators_toml, read_actuators
from voltana_ctrl.fit.decode import DecodeTime, fit_decode_time
from voltana_ctrl.fit.figure import draw_diagnostics
from voltana_ctrl.fit.heldout import HeldOut, Laws, fit_laws, hold_out
from voltana_ctrl.fit.identify import fit_table
from voltana_ctrl.fit.power import PowerLaw, fit_power
from voltana_ctrl.fit.prefill import PrefillTime, fit_prefill_time
from voltana_ctrl.fit.result import FitResult
from voltana_ctrl.fit.staircase import detect_batch_steps
from voltana_ctrl.fit.tables import IterationTable, read_table

__all__ = [
    "DecodeTime",
    "FitResult",
    "HeldOut",
    "IterationTable",
    "Laws",
    "PowerLaw",
    "PrefillTime",
    "actuator_lines",
    "actuators_toml",
    "detect_batch_steps",
    "draw_diagnostics",
    "fit_decode_time",
    "fit_laws",
    "fit_power",
    "fit_prefill_time",
    "fit_table",
    "hold_out",
    "read_actuators",
    "read_table",
]
