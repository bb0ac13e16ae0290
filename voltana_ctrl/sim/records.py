"""The records that the kernel of the plant starts from."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import FleetSpec

__all__ = ["NEVER", "starting_instances", "starting_requests"]

#: A time that does not come, and a power cap that does not bind.
NEVER = 1e300


def starting_instances(fleet: FleetSpec, kind: Any) -> Any:
    """Records of all instances: empty, awake, at their highest clock.

    Parameters
    ----------
    fleet : FleetSpec
        What is simulated.
    kind : ndarray of int, shape (n,)
        Row of each instance in the coefficient tables.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> starting_instances(fleet, [0, 0])["clock_k"]
    array([80, 80])
    """
    inst = np.zeros(len(fleet), dtype=layout.INSTANCE_DTYPE)
    inst["type"] = kind
    for i, spec in enumerate(fleet.instances):
        one, profile = inst[i], spec.profile
        one["n_clocks"] = len(spec.clocks_mhz)
        one["prefills"] = spec.role.prefills
        one["decodes"] = spec.role.decodes
        for name in ("kv_capacity_tok", "max_batch", "prefill_budget_tok", "max_prefill_req"):
            one[name] = getattr(spec, name)
        one["idle_w"] = one["rest_w"] = spec.idle_w
        one["asleep_w"], one["wake_s"], one["wake_j"] = spec.parked_w, spec.wake_s, spec.wake_j
        one["sleeps"] = spec.parked_w < spec.idle_w or spec.wake_s > 0.0 or spec.wake_j > 0.0
        one["transfer_latency_s"] = profile.link_latency_s
        one["transfer_tok_s"] = profile.kv_bytes_per_tok / profile.link_bytes_s
        one["transfer_tok_j"] = profile.transfer_j_per_tok
        one["clock_stall_s"] = profile.clock_stall_s
        one["clock_change_j"] = profile.clock_change_j
        one["first_token_decode"] = profile.first_token == "decode"
        one["clock_k"] = one["want_k"] = one["call_k"] = len(spec.clocks_mhz) - 1
        one["clamp_k"] = len(spec.clocks_mhz) - 1
        one["floor_mhz"] = one["ceiling_mhz"] = one["able_mhz"] = spec.clocks_mhz[-1]
    for name in ("last_admitted", "prefill_head", "prefill_tail", "wait_head", "wait_tail"):
        inst[name] = -1
    for name in ("alive", "active", "seen"):
        inst[name] = 1
    for name in ("power_cap_w", "call_end_s", "idle_call_s", "wake_end_s"):
        inst[name] = NEVER
    for name in ("slow_frac", "prefill_pace_frac", "decode_pace_frac"):
        inst[name] = 1.0
    inst["jitter_frac"] = 1.0
    return inst


def starting_requests(workload: Workload) -> Any:
    """Records of all requests, none of which has arrived.

    Parameters
    ----------
    workload : Workload
        What arrives.

    Examples
    --------
    >>> workload = Workload(name="one", arrival_s=[0.0], prompt_tok=[9], output_tok=[5],
    ...                     duration_s=1.0)
    >>> starting_requests(workload)["todo_tok"]
    array([9])
    """
    req = np.zeros(len(workload), dtype=layout.REQUEST_DTYPE)
    for name in ("arrival_s", "prompt_tok", "output_tok", "cached_tok", "request_class"):
        req[name] = getattr(workload, name)
    req["todo_tok"] = req["prompt_tok"] - req["cached_tok"]
    for name in ("prefill_at", "decode_at", "next", "prev", "older", "newer"):
        req[name] = -1
    for name in ("first_s", "done_s"):
        req[name] = -1.0
    return req
