"""Latency, power and equilibrium of one instance at (clock, load): the closed forms.

Every function takes `rows`: one row or an array of rows of ``PROFILE_DTYPE``, such as
``profile.table`` (all clocks), ``instance.table`` (the clocks of an instance) or
:func:`at_clock` (between two). Rows and loads broadcast against each other.

Open-loop arrivals set the tokens per second, a slower clock only grows the batch (Little's
law). With an iteration time ``T = a0 + a1 n + a2 m`` affine in running requests ``n`` and KV
tokens ``m = c n``, ``b = a1 + a2 c`` and ``rho = lam (L - 1) b``, the equilibrium is
``T = a0 / (1 - rho)`` and the batch is negative binomial with ``r = a0 / b + 1``. A roof, the
slope to which computing bends ``T``, moves no equilibrium but bounds the load that has one.
"""

from __future__ import annotations

from voltana_ctrl.physics.actuators import ActuatorTable, compare_actuators
from voltana_ctrl.physics.decode import (
    DecodeEquilibrium,
    batch_moments_req,
    batch_pmf,
    batch_quantile_req,
    decode_equilibrium,
    decode_stationary,
    kv_quantile_tok,
    padded_mean_req,
)
from voltana_ctrl.physics.iteration import (
    at_clock,
    decode_j,
    decode_s,
    decode_tangent,
    highest_clock_under,
    kv_transfer_s,
    prefill_j,
    prefill_s,
)
from voltana_ctrl.physics.lengths import Lengths, length_moments
from voltana_ctrl.physics.prefill import PrefillEquilibrium, mg1_wait_s, prefill_equilibrium

__all__ = [
    "ActuatorTable",
    "DecodeEquilibrium",
    "Lengths",
    "PrefillEquilibrium",
    "at_clock",
    "batch_moments_req",
    "batch_pmf",
    "batch_quantile_req",
    "compare_actuators",
    "decode_equilibrium",
    "decode_j",
    "decode_s",
    "decode_stationary",
    "decode_tangent",
    "highest_clock_under",
    "kv_quantile_tok",
    "kv_transfer_s",
    "length_moments",
    "mg1_wait_s",
    "padded_mean_req",
    "prefill_equilibrium",
    "prefill_j",
    "prefill_s",
]
