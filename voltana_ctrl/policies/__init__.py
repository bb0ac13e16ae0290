"""Named policies: what compare puts side by side, and how a user's own gets in."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import numpy as np

from voltana_ctrl import control, routing
from voltana_ctrl.control.depth import at_rest
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.policies.parts import Policy, PolicyParts, PolicySetup, Trials, balanced
from voltana_ctrl.policies.static_best import static_best
from voltana_ctrl.ports import Governor, phase_of
from voltana_ctrl.routing.base import Phase
from voltana_ctrl.types import (
    DEPTHS,
    Decision,
    Depth,
    FleetSpec,
    FleetState,
    Observation,
    Role,
    Slo,
)

__all__ = [
    "HEADLINE",
    "ROUTERS",
    "Policy",
    "PolicyParts",
    "PolicySetup",
    "Trials",
    "find_policy",
    "list_policies",
]

#: What compare runs unless told otherwise.
HEADLINE = (
    "static-max",
    "static-1005",
    "voltanallm",
    "voltanallm-full-ladder",
    "mpc",
    "bound",
)


#: What classes of a user's own are told of the run, where they have such a parameter.
_TOLD = ("power_budget", "price", "co2")

_Build = Callable[[FleetSpec, Slo, PolicySetup], PolicyParts]


def _ladder_mhz() -> Sequence[float]:
    """Clocks of EcoFreq, which are looked up where a policy is built and not before."""
    from voltana_ctrl.control.baselines.ecofreq import DEFAULT_LADDER_MHZ

    return DEFAULT_LADDER_MHZ


#: Routers by the name that follows a ``+``; called with (fleet, phase, slo).
ROUTERS: Mapping[str, Callable[[FleetSpec, Phase, Slo], routing.CompiledRouter]] = MappingProxyType(
    {
        "round-robin": lambda fleet, phase, _: routing.round_robin_router(fleet, phase),
        "random": lambda fleet, phase, _: routing.random_router(fleet, phase),
        "jsq": lambda fleet, phase, _: routing.shortest_router(fleet, phase),
        "least-queue": lambda fleet, phase, _: routing.least_queue_router(fleet, phase),
        "least-kv": lambda fleet, phase, _: routing.least_kv_router(fleet, phase),
        "two-choices": lambda fleet, phase, _: routing.two_choices_router(fleet, phase),
        "tokens-x-batch": lambda fleet, phase, _: routing.tokens_by_batch_router(fleet, phase),
        "tile-aware": lambda fleet, phase, _: routing.tile_aware_router(fleet, phase),
        "fadr": lambda fleet, phase, slo: routing.fadr_router(
            fleet, phase, slo, ladder_mhz=_ladder_mhz()
        ),
        "share": lambda fleet, phase, _: routing.share_router(fleet, phase),
    }
)


def _static(freq_mhz: float | None) -> _Build:
    def build(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
        del slo, setup
        if freq_mhz is not None:
            _refuse_between(fleet, freq_mhz)
        at_rest = Observation(state=FleetState.idle(len(fleet)))
        first, _ = control.StaticController(fleet, freq_mhz).decide(at_rest, None)
        return PolicyParts(first=first)

    return build


def _refuse_between(fleet: FleetSpec, freq_mhz: float) -> None:
    """Refuse a clock between two of the ladder: results would bear the name of another clock."""
    ladder_mhz = np.unique(np.concatenate([one.clocks_mhz for one in fleet.instances]))
    k = int(np.searchsorted(ladder_mhz, freq_mhz))
    if 0 < k < len(ladder_mhz) and ladder_mhz[k] != freq_mhz:
        raise ConfigError(
            f"policy static-{freq_mhz:g}: no instance has that clock; choose"
            f" static-{ladder_mhz[k - 1]:g} or static-{ladder_mhz[k]:g}"
        )


def _voltanallm(
    decode: str,
    prefill: str = "random",
    *,
    full_ladder: bool = False,
    above_floor: bool = False,
) -> _Build:
    def build(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
        del setup
        ladder_mhz = None if full_ladder else _ladder_mhz()
        # Colocated instances take a request once, so what decode would choose chooses.
        routers: dict[str, Any] = {
            "fadr": lambda: routing.fadr_router(fleet, "decode", slo, ladder_mhz=ladder_mhz),
            "tile": lambda: routing.tile_aware_router(fleet, "decode"),
            "jsq": lambda: routing.shortest_router(fleet, "decode"),
            "random": lambda: routing.random_router(fleet, "prefill"),
            "least-queue": lambda: routing.least_queue_router(fleet, "prefill"),
        }
        return PolicyParts(
            governors=[
                control.EcoFreqGovernor(one, slo, ladder_mhz=ladder_mhz, above_floor=above_floor)
                for one in fleet.instances
            ],
            prefill_router=routers[decode if fleet.colocated else prefill](),
            decode_router=routers[decode](),
            view_age_s=0.02,
        )

    return build


def _voltanallm_thresholds(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    return replace(
        _voltanallm("fadr", above_floor=True)(fleet, slo, setup),
        first=Decision.highest(fleet, floor_mhz=fleet.min_mhz),
        controller=control.ThroughputController(
            fleet, slo, ladder_mhz=_ladder_mhz(), period_s=setup.tick_s
        ),
    )


def _ecoserve(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    del setup
    mixed = fleet.in_roles([Role.COLOCATED] * len(fleet))
    # A turn that ends within half of the promise leaves the other half to wait for it.
    turn_tok = 0.5 * slo.ttft_s / float(mixed.instances[0].table["prefill_tok_s"][-1])
    return PolicyParts(
        prefill_router=routing.rolling_router(mixed, "prefill", turn_tok=turn_tok),
        fleet=mixed,
        alternates=True,
    )


def _static_budget(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    del slo
    return PolicyParts(
        controller=control.StaticBudgetController(fleet, setup.power_budget, period_s=setup.tick_s)
    )


def _threshold(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    del slo
    return balanced(
        fleet,
        [control.ThresholdGovernor(one) for one in fleet.instances],
        # Without a budget nothing changes from tick to tick.
        controller=None
        if setup.power_budget is None
        else control.StaticBudgetController(
            fleet, setup.power_budget, governed=True, period_s=setup.tick_s
        ),
    )


def _dualscale(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    del setup
    return balanced(fleet, [control.DualScaleGovernor(one, slo) for one in fleet.instances])


def _own_governors(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> list[Governor]:
    on_node = Counter(one.node for one in fleet.instances)
    return [
        control.IterationGovernor(
            one,
            slo,
            delay_s=setup.delay_s,
            # What lowers clocks must not keep the node busy when another has to raise.
            dwell_s=setup.call_s * on_node[one.node],
        )
        for one in fleet.instances
    ]


def _governors(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    return balanced(fleet, _own_governors(fleet, slo, setup))


def _gate(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    return balanced(
        fleet,
        _own_governors(fleet, slo, setup),
        controller=control.SaturationGate(
            fleet,
            first=Decision.highest(fleet, floor_mhz=fleet.min_mhz),
            period_s=setup.tick_s,
        ),
    )


def _autoscaler(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    return replace(
        balanced(
            fleet, (), controller=control.AutoscalerController(fleet, slo, period_s=setup.tick_s)
        ),
        first=Decision.highest(fleet),
        governors=None,
    )


def _roles(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    return balanced(
        fleet,
        _own_governors(fleet, slo, setup),
        controller=control.RoleController(fleet, slo, period_s=setup.tick_s),
    )


def _pack(plan_mhz: float | None = None, depth: Depth = "parked") -> _Build:
    def build(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
        return balanced(
            fleet,
            [control.DualScaleGovernor(one, slo) for one in fleet.instances],
            controller=control.PackingController(
                fleet,
                slo,
                plan_mhz=plan_mhz,
                depth=depth,
                power_budget=setup.power_budget,
                period_s=setup.tick_s,
            ),
        )

    return build


def _shares(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    """Nothing to run: the fluid bound is computed, not simulated."""
    del slo, setup
    return PolicyParts(prefill_router=routing.share_router(fleet, "prefill"))


def _adaptive(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    controller = control.AdaptiveController(fleet, slo, period_s=setup.tick_s)
    decode = routing.fadr_router(fleet, "decode", slo, ladder_mhz=None)
    return PolicyParts(
        controller=controller,
        governors=controller.governors,
        prefill_router=decode if fleet.colocated else routing.least_queue_router(fleet, "prefill"),
        decode_router=decode,
        view_age_s=0.02,
    )


def _cascade(*, mpc: bool) -> Callable[[FleetSpec, Slo, PolicySetup], PolicyParts]:
    def build(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
        def make(fixed: FleetSpec) -> control.CascadeController:
            rested, _ = at_rest(fixed, 1.0)
            target = control.TargetOptimiser(
                rested, slo, delay_s=setup.delay_s, governed=setup.governed, spare=setup.spare
            )
            names = ("price", "co2", "forecast", "beside") if mpc else ()
            ahead = {name: getattr(setup, name) for name in names}
            return (control.MpcController if mpc else control.CascadeController)(
                fixed,
                slo,
                **ahead,
                target=target,
                period_s=setup.tick_s,
                governed=setup.governed,
                delay_s=setup.delay_s,
                measured_delay_s=setup.measured_delay_s,
                learnt=setup.learnt,
                power_budget_w=setup.power_budget,
            )

        turns = mpc and any(one.roles for one in fleet.instances)
        return PolicyParts(
            controller=control.FlexibleController(fleet, slo, make) if turns else make(fleet),
            governors=_own_governors(fleet, slo, setup) if setup.governed else None,
            prefill_router=routing.PricedRouter(fleet, slo, "prefill"),
            decode_router=routing.PricedRouter(fleet, slo),
        )

    return build


_PAPER = "VoltanaLLM (arXiv 2509.04827), rules of its public code v0.1"
_SHIPPED = (
    Policy(
        name="static-max",
        summary="every instance at its highest clock, round robin",
        source="what servers do today",
        build=_static(None),
    ),
    Policy(
        name="static-budget",
        summary="the highest uniform clock whose worst case keeps the power budget, round robin",
        source="the profile's worst-case power per clock; static-max without a budget",
        build=_static_budget,
        knows_budget=True,
    ),
    Policy(
        name="threshold",
        summary="five clocks, stepped by queue and batch with hysteresis; least queue, then JSQ",
        source="textbook on-demand governor; thresholds double, none is tuned",
        build=_threshold,
        knows_budget=True,
    ),
    Policy(
        name="dualscale",
        summary="prefill looks 8 batches ahead on 7 clocks, decode the lowest feasible clock",
        source="DualScale (arXiv 2602.18755), fast tier, a reading of summaries; textbook routers",
        build=_dualscale,
    ),
    Policy(
        name="pack",
        summary="decode on the fewest instances that hold the load, the rest parked",
        source="consolidation heuristic; clocks as dualscale",
        build=_pack(),
        knows_budget=True,
    ),
    Policy(
        name="voltanallm",
        summary="EcoFreq on five clocks, prefill at random, decode by fadr, state 20 ms old",
        source=_PAPER + "; without its two throughput thresholds, margin 0",
        build=_voltanallm("fadr"),
    ),
    Policy(
        name="voltanallm-tile",
        summary="voltanallm with the tile-aware decode router",
        source=_PAPER,
        build=_voltanallm("tile"),
    ),
    Policy(
        name="voltanallm-jsq",
        summary="voltanallm with least-queue prefill and join-shortest-queue decode",
        source="EcoFreq as above; textbook routers",
        build=_voltanallm("jsq", "least-queue"),
    ),
    Policy(
        name="voltanallm-full-ladder",
        summary="voltanallm on every supported clock, least-queue prefill",
        source="EcoFreq as above; the stronger baseline",
        build=_voltanallm("fadr", "least-queue", full_ladder=True),
    ),
    Policy(
        name="voltanallm-adaptive",
        summary="voltanallm-full-ladder with tables that learn and margins that hold the SLO",
        source="EcoFreq as above; recursive least squares and attainment tracking, see the docs",
        build=_adaptive,
    ),
    Policy(
        name="voltanallm-thresholds",
        summary="voltanallm with its two throughput thresholds: the highest clock above either",
        source=_PAPER + ", whose public demo sets both out of reach; here what the clock below"
        " the highest can serve",
        build=_voltanallm_thresholds,
    ),
    Policy(
        name="static-best",
        summary="the best roles, active instances and one clock per phase, by trial on a seed",
        source="what an operator finds by hand; at most 20 trials, screened by the steady model",
        build=static_best,
        searched=True,
    ),
    Policy(
        name="ecoserve",
        summary="mixed instances that prefill and decode in turn, at the highest clock",
        source="EcoServe (arXiv 2504.18154), temporal alternation: a reading of its abstract",
        build=_ecoserve,
    ),
    Policy(
        name="governors",
        summary="the project's governors alone: everybody awake, no plan; textbook routers",
        source="this project; what mpc is without its controller",
        build=_governors,
    ),
    Policy(
        name="gate",
        summary="governors, and work that may wait is let in while the queues have room",
        source="saturation gate in the manner of llm-d, queue 5 and KV 80 % as its defaults",
        build=_gate,
    ),
    Policy(
        name="autoscaler",
        summary="as many engines as the load needs, at the highest clock; no word on energy",
        source="in the manner of NVIDIA Dynamo's planner, loops of 180 s and 5 s as in its guide",
        build=_autoscaler,
    ),
    Policy(
        name="roles",
        summary="governors, and machines change between prefill and decode by rule",
        source="in the manner of role-switching schedulers; needs --roles flexible",
        build=_roles,
    ),
    Policy(
        name="cascade",
        summary="equilibrium targets, per-iteration governors, priced routing; no MPC",
        source="this project, see the theory page",
        build=_cascade(mpc=False),
        knows_budget=True,
    ),
    Policy(
        name="mpc",
        summary="cascade that looks ahead where waking takes time: forecast, reserve, plan",
        source="this project, see the theory page",
        build=_cascade(mpc=True),
        knows_budget=True,
    ),
    Policy(
        name="bound",
        summary="no controller: a fluid estimate of the least at steady load",
        source="closed forms, see the theory page",
        build=_shares,
    ),
)


def list_policies() -> tuple[Policy, ...]:
    """Every shipped policy.

    ``static-<MHz>``, ``pack-<MHz>``, ``pack-<depth>`` and ``package.module:Class`` come on top, and
    each with other routers, ``<policy>+<decode router>``; see :func:`find_policy`.

    Examples
    --------
    >>> [policy.name for policy in list_policies()][:2]
    ['static-max', 'static-budget']
    """
    return _SHIPPED


def find_policy(name: str) -> Policy:
    """Policy of that name.

    Parameters
    ----------
    name : str
        A shipped name, ``static-<MHz>``, ``pack-<MHz>`` (packed so that the active instances
        could carry the load at this clock), ``pack-<depth>`` (``deep_parked``, ``asleep`` or
        ``off``: how deep the parked ones sleep), or ``package.module:Class`` for your own: a class
        called with (fleet, slo), and power_budget, price and co2 if it has such parameters, whose
        instances have init/decide, or route/update (and `phase`, "prefill" or "decode", the latter
        by default). Any of them followed by ``+ROUTER`` uses that router of :data:`ROUTERS` for
        decode (for both phases of a colocated fleet, which picks once); ``+ROUTER/ROUTER`` one
        for prefill and one for decode.

    Raises
    ------
    ConfigError
        If there is no such policy, with the nearest names; no such router; or no such module or
        class.

    Examples
    --------
    >>> find_policy("static-1005").summary
    'every instance at 1005 MHz, round robin'
    >>> find_policy("static-max+least-kv").summary
    'static-max with router least-kv'
    """
    base, plus, routers = name.partition("+")
    if plus:
        return _routed(find_policy(base), name, routers)
    for policy in _SHIPPED:
        if policy.name == name:
            return policy
    clock = re.fullmatch(r"(static|pack)-(\d{1,6}(?:\.\d{1,3})?)", name)
    if clock and clock[1] == "static":
        return Policy(
            name=name,
            summary=f"every instance at {clock[2]} MHz, round robin",
            source="a fixed clock",
            build=_static(float(clock[2])),
        )
    if clock:
        return Policy(
            name=name,
            summary=f"pack, planned for {clock[2]} MHz",
            source="consolidation heuristic; clocks as dualscale",
            build=_pack(float(clock[2])),
            knows_budget=True,
        )
    if name.startswith("pack-") and name[5:] in DEPTHS[1:]:
        return Policy(
            name=name,
            summary=f"pack, and those that are parked sleep as deep as {name[5:]}",
            source="consolidation heuristic; clocks as dualscale",
            build=_pack(depth=DEPTHS[DEPTHS.index(name[5:])]),
            knows_budget=True,
        )
    if ":" in name:
        return _own(name)
    known = [policy.name for policy in _SHIPPED]
    near = get_close_matches(name, known, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    raise ConfigError(f"policy {name!r}: no such policy{hint} (or static-<MHz>, module:Class)")


def _routed(base: Policy, name: str, text: str) -> Policy:
    """Policy `base` with the routers named in `text` in place of its own."""
    names = text.split("/")
    for one in names:
        if one not in ROUTERS:
            near = get_close_matches(one, list(ROUTERS), n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(ROUTERS)}"
            raise ConfigError(f"policy {name!r}: no router {one!r}; {hint}")
    if len(names) > 2:
        raise ConfigError(
            f"policy {name!r}: expected +DECODE or +PREFILL/DECODE, got {len(names)} routers"
        )
    if base.name == "bound":
        raise ConfigError(f"policy {name!r}: the bound is computed and routes nothing; leave it")

    def build(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
        parts = base.build(fleet, slo, setup)
        if fleet.colocated:
            if len(names) == 2:
                raise ConfigError(
                    f"policy {name!r}: a colocated fleet picks an instance once; give one router"
                )
            return replace(parts, prefill_router=ROUTERS[names[0]](fleet, "prefill", slo))
        parts = replace(parts, decode_router=ROUTERS[names[-1]](fleet, "decode", slo))
        if len(names) == 2:
            parts = replace(parts, prefill_router=ROUTERS[names[0]](fleet, "prefill", slo))
        return parts

    return Policy(
        name=name,
        summary=f"{base.name} with router {text}",
        source=base.source,
        build=build,
        knows_budget=base.knows_budget,
    )


def _own(name: str) -> Policy:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(
            f"policy {name!r}: cannot import {module_name!r}: {error}; is its folder on PYTHONPATH?"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"policy {name!r}: module {module_name!r} has no class {class_name!r}"
        ) from error
    try:
        asked = [name for name in _TOLD if name in inspect.signature(found).parameters]
    except (TypeError, ValueError):  # no class, or one that does not tell
        asked = []

    def build(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
        told = {name: getattr(setup, name) for name in asked}
        try:
            made = found(fleet, slo, **told)
        except TypeError as error:
            expected = "expected a class called with (fleet, slo)"
            raise ConfigError(f"policy {name!r}: {expected}: {error}") from error
        if callable(getattr(made, "decide", None)) and callable(getattr(made, "init", None)):
            return PolicyParts(controller=made)
        if callable(getattr(made, "route", None)) and callable(getattr(made, "update", None)):
            if phase_of(made) == "prefill" or fleet.colocated:
                return PolicyParts(prefill_router=made)
            return PolicyParts(decode_router=made)
        expected = "expected an object with init/decide, or route/update"
        raise ConfigError(f"policy {name!r}: {expected}, got {type(made).__name__}")

    return Policy(
        name=name,
        summary="your own",
        source=name,
        build=build,
        knows_budget="power_budget" in asked,
    )
