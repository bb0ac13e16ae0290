"""The governor of a policy for one engine, which knows nothing of the rest of its fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.control.baselines.dualscale import DualScaleGovernor
from voltana_ctrl.control.baselines.ecofreq import DEFAULT_LADDER_MHZ, EcoFreqGovernor
from voltana_ctrl.control.baselines.threshold import ThresholdGovernor
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.types import InstanceSpec, Slo

__all__ = ["governor_of_policy"]

_Make = Callable[[InstanceSpec, Slo, float, float], CompiledGovernor]


def _iteration(
    instance: InstanceSpec, slo: Slo, delay_s: float, dwell_s: float
) -> CompiledGovernor:
    return IterationGovernor(instance, slo, delay_s=delay_s, dwell_s=dwell_s)


def _ecofreq(instance: InstanceSpec, slo: Slo, *_: float) -> CompiledGovernor:
    return EcoFreqGovernor(instance, slo, ladder_mhz=DEFAULT_LADDER_MHZ)


def _ecofreq_above(instance: InstanceSpec, slo: Slo, *_: float) -> CompiledGovernor:
    return EcoFreqGovernor(instance, slo, ladder_mhz=DEFAULT_LADDER_MHZ, above_floor=True)


def _ecofreq_whole(instance: InstanceSpec, slo: Slo, *_: float) -> CompiledGovernor:
    return EcoFreqGovernor(instance, slo, ladder_mhz=None)


def _dualscale(instance: InstanceSpec, slo: Slo, *_: float) -> CompiledGovernor:
    return DualScaleGovernor(instance, slo)


def _threshold(instance: InstanceSpec, *_: object) -> CompiledGovernor:
    return ThresholdGovernor(instance)


#: Policies whose governors need nothing but their instance. A test holds it against what the
#: policies build themselves.
_MAKERS: Mapping[str, _Make] = MappingProxyType(
    {
        "mpc": _iteration,
        "cascade": _iteration,
        "governors": _iteration,
        "gate": _iteration,
        "roles": _iteration,
        "voltanallm": _ecofreq,
        "voltanallm-tile": _ecofreq,
        "voltanallm-jsq": _ecofreq,
        "voltanallm-thresholds": _ecofreq_above,
        "voltanallm-full-ladder": _ecofreq_whole,
        "dualscale": _dualscale,
        "pack": _dualscale,
        "threshold": _threshold,
    }
)


def governor_of_policy(
    policy: str, instance: InstanceSpec, slo: Slo, *, delay_s: float, dwell_s: float = 0.0
) -> CompiledGovernor | None:
    """Governor that a policy puts into one engine, where it chooses the clock of each iteration.

    Parameters
    ----------
    policy : str
        Name, with or without routers: ``mpc`` or ``mpc+jsq``.
    instance : InstanceSpec
        The engine.
    slo : Slo
        Promises on TTFT and ITL.
    delay_s : float
        Seconds from asking for a clock until it runs. Governors that plan for no delay leave it
        alone, and `dwell_s` too.
    dwell_s : float
        Least seconds from a change of the clock to the next lowering.

    Returns
    -------
    CompiledGovernor or None
        None where the policy has no such governor, or where its name is not known: the engine
        then runs at the floor that the policy asks for.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> slo = Slo(ttft_s=0.6, itl_s=0.06)
    >>> governor = governor_of_policy("mpc+jsq", fleet.instances[1], slo, delay_s=0.02)
    >>> # 80 requests run with 35,000 tokens in the KV cache; none waits; 210 to 1410 MHz allowed
    >>> governor.step(80, 3.5e4, 0, 0.0, 210.0, 1410.0)
    285.0
    >>> governor_of_policy("static-1005", fleet.instances[1], slo, delay_s=0.02) is None
    True
    """
    base = policy.partition("+")[0]
    make = _MAKERS.get("pack" if base.startswith("pack-") else base)
    return None if make is None else make(instance, slo, delay_s, dwell_s)
