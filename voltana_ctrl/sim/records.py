"""The records that the kernel of the plant starts from."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import DEPTHS, Depth, FleetSpec, InstanceSpec, Rest, Role

__all__ = ["NEVER", "starting_instances", "starting_requests", "tell_depth"]

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
    >>> from voltana_ctrl import FleetSpec, load_profile
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
        one["role"] = one["want_role"] = spec.role is Role.DECODE
        one["turn_s"] = spec.turn_s
        for name in ("kv_capacity_tok", "max_batch", "prefill_budget_tok", "max_prefill_req"):
            one[name] = getattr(spec, name)
        one["idle_w"] = one["rest_w"] = spec.idle_w
        tell_depth(one, spec, "parked")
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
    inst["shown"] = -2
    for name in ("slow_frac", "prefill_pace_frac", "decode_pace_frac"):
        inst[name] = 1.0
    inst["jitter_frac"] = 1.0
    return inst


def tell_depth(one: Any, spec: InstanceSpec, depth: Depth) -> None:
    """Tell an instance how deep to sleep from now on; one that is asleep is as it was.

    Parameters
    ----------
    one : record of INSTANCE_DTYPE
        The instance.
    spec : InstanceSpec
        What its sleep is like.
    depth : {"parked", "deep_parked", "asleep", "off"}
        How deep it is to sleep.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.records import starting_instances
    >>> fleet = FleetSpec.parse("1P1D", load_profile("l20/qwen2.5-7b"))
    >>> one = starting_instances(fleet, [0, 0])[1]
    >>> float(one["asleep_w"]), bool(one["sleeps"])
    (36.0, True)
    """
    rest = spec.rest(depth)
    one["depth"] = DEPTHS.index(depth)
    one["asleep_w"], one["enter_s"] = rest.power_w, rest.enter_s
    one["wake_s"], one["wake_j"] = rest.wake_s, rest.wake_j
    one["sleeps"] = rest != Rest(power_w=spec.idle_w)


def starting_requests(workload: Workload) -> Any:
    """Records of all requests, none of which has arrived.

    Parameters
    ----------
    workload : Workload
        What arrives.

    Examples
    --------
    >>> from voltana_ctrl.sim.workload import Workload
    >>> workload = Workload(name="one", arrival_s=[0.0], prompt_tok=[9], output_tok=[5],
    ...                     duration_s=1.0)
    >>> starting_requests(workload)["todo_tok"]
    array([9])
    """
    req = np.zeros(len(workload), dtype=layout.REQUEST_DTYPE)
    for name in ("arrival_s", "prompt_tok", "output_tok", "cached_tok", "request_class"):
        req[name] = getattr(workload, name)
    req["sent_s"] = req["arrival_s"]
    req["deadline_s"] = np.minimum(workload.arrival_s + workload.patience_s, NEVER)
    req["todo_tok"] = req["prompt_tok"] - req["cached_tok"]
    for name in ("prefill_at", "decode_at", "next", "prev", "older", "newer"):
        req[name] = -1
    for name in ("first_s", "done_s"):
        req[name] = -1.0
    return req
