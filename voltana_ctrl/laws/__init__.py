"""Time, energy and equilibrium of one instance at (clock, load): NumPy, in closed form.

Every function takes `rows`: one row or an array of rows of ``PROFILE_DTYPE``, such as
``profile.table`` (all clocks), ``instance.table`` (the clocks of an instance) or
:func:`at_clock` (between two). Rows and loads broadcast against each other. The compiled twin of
the time and energy of an iteration is :mod:`voltana_ctrl.kernels.law`.
"""

from __future__ import annotations

from voltana_ctrl.laws.actuators import ActuatorTable, compare_actuators
from voltana_ctrl.laws.equilibrium import (
    DecodeEquilibrium,
    PrefillEquilibrium,
    decode_equilibrium,
    prefill_equilibrium,
)
from voltana_ctrl.laws.iteration import (
    at_clock,
    batch_j,
    decode_j,
    decode_s,
    decode_tangent,
    empty_tok,
    kv_transfer_s,
    paced,
    prefill_j,
    prefill_s,
)
from voltana_ctrl.laws.lengths import length_moments

__all__ = [
    "ActuatorTable",
    "DecodeEquilibrium",
    "PrefillEquilibrium",
    "at_clock",
    "batch_j",
    "compare_actuators",
    "decode_equilibrium",
    "decode_j",
    "decode_s",
    "decode_tangent",
    "empty_tok",
    "kv_transfer_s",
    "length_moments",
    "paced",
    "prefill_equilibrium",
    "prefill_j",
    "prefill_s",
]
