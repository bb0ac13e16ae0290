"""Named policies: what compare puts side by side, and how a user's own gets in."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from voltana_ctrl.control.baselines import StaticController
from voltana_ctrl.control.governors import DEFAULT_LADDER_MHZ, EcoFreqGovernor
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.ports import Governor, Router
from voltana_ctrl.routing import (
    fadr_router,
    least_queue_router,
    random_router,
    share_router,
    shortest_router,
    tile_aware_router,
)
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Observation, Slo

__all__ = ["HEADLINE", "Policy", "PolicyParts", "find_policy", "list_policies"]

#: What compare runs unless told otherwise.
HEADLINE = ("static-max", "static-1005", "voltanallm", "voltanallm-full-ladder", "bound")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyParts:
    """A policy put together for one fleet.

    Parameters
    ----------
    controller : object with init/decide, optional
        Asked every tick; without one the first decision stands.
    first : Decision, optional
        Applied at the start; highest clocks if left out.
    governors : sequence of Governor, optional
        One per instance.
    prefill_router, decode_router : Router, optional
        The shares of the decision if left out.
    view_age_s : float
        How old the state is that compiled routers see.
    decode_at_arrival : bool
        Whether the decode instance is picked when the request arrives.

    Examples
    --------
    >>> PolicyParts().view_age_s
    0.0
    """

    controller: Any = None
    first: Decision | None = None
    governors: Sequence[Governor] | None = None
    prefill_router: Router | None = None
    decode_router: Router | None = None
    view_age_s: float = 0.0
    decode_at_arrival: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy by name.

    Parameters
    ----------
    name : str
        As on the command line.
    summary : str
        One line.
    source : str
        Where its rules come from.
    build : callable (fleet, slo, tick_s) -> PolicyParts
        Puts it together.

    Examples
    --------
    >>> find_policy("static-max").name
    'static-max'
    """

    name: str
    summary: str
    source: str
    build: Callable[[FleetSpec, Slo, float], PolicyParts]


def _static(freq_mhz: float | None) -> Callable[[FleetSpec, Slo, float], PolicyParts]:
    def build(fleet: FleetSpec, slo: Slo, tick_s: float) -> PolicyParts:
        del slo, tick_s
        at_rest = Observation(state=FleetState.idle(len(fleet)))
        first, _ = StaticController(fleet, freq_mhz).decide(at_rest, None)
        return PolicyParts(first=first)

    return build


def _voltanallm(
    decode: str,
    prefill: str = "random",
    ladder_mhz: Sequence[float] | None = DEFAULT_LADDER_MHZ,
) -> Callable[[FleetSpec, Slo, float], PolicyParts]:
    def build(fleet: FleetSpec, slo: Slo, tick_s: float) -> PolicyParts:
        del tick_s
        # Colocated instances take a request once, so what decode would choose chooses.
        routers: dict[str, Any] = {
            "fadr": lambda: fadr_router(fleet, "decode", slo, ladder_mhz=ladder_mhz),
            "tile": lambda: tile_aware_router(fleet, "decode"),
            "jsq": lambda: shortest_router(fleet, "decode"),
            "random": lambda: random_router(fleet, "prefill"),
            "least-queue": lambda: least_queue_router(fleet, "prefill"),
        }
        return PolicyParts(
            governors=[EcoFreqGovernor(one, slo, ladder_mhz=ladder_mhz) for one in fleet.instances],
            prefill_router=routers[decode if fleet.colocated else prefill](),
            decode_router=routers[decode](),
            view_age_s=0.02,
        )

    return build


def _shares(fleet: FleetSpec, slo: Slo, tick_s: float) -> PolicyParts:
    """Nothing to run: the fluid bound is computed, not simulated."""
    del slo, tick_s
    return PolicyParts(prefill_router=share_router(fleet, "prefill"))


_PAPER = "VoltanaLLM (arXiv 2509.04827), rules of its public code v0.1"
_SHIPPED = (
    Policy(
        name="static-max",
        summary="every instance at its highest clock, round robin",
        source="what servers do today",
        build=_static(None),
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
        build=_voltanallm("fadr", "least-queue", None),
    ),
    Policy(
        name="bound",
        summary="no controller: the clairvoyant fluid minimum",
        source="closed forms, see the theory page",
        build=_shares,
    ),
)


def list_policies() -> tuple[Policy, ...]:
    """Every shipped policy; ``static-<MHz>`` and ``package.module:Class`` come on top.

    Examples
    --------
    >>> [policy.name for policy in list_policies()][:2]
    ['static-max', 'voltanallm']
    """
    return _SHIPPED


def find_policy(name: str) -> Policy:
    """Policy of that name.

    Parameters
    ----------
    name : str
        A shipped name, ``static-<MHz>``, or ``package.module:Class`` for your own: a class
        called with (fleet, slo) whose instances have init/decide, or route (and `phase`,
        "prefill" or "decode", the latter by default).

    Raises
    ------
    ConfigError
        If there is no such policy, with the nearest names.

    Examples
    --------
    >>> find_policy("static-1005").summary
    'every instance at 1005 MHz, round robin'
    """
    for policy in _SHIPPED:
        if policy.name == name:
            return policy
    clock = re.fullmatch(r"static-(\d{1,6}(?:\.\d{1,3})?)", name)
    if clock:
        return Policy(
            name=name,
            summary=f"every instance at {clock[1]} MHz, round robin",
            source="a fixed clock",
            build=_static(float(clock[1])),
        )
    if ":" in name:
        return _own(name)
    known = [policy.name for policy in _SHIPPED]
    near = get_close_matches(name, known, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    raise ConfigError(f"policy {name!r}: no such policy{hint} (or static-<MHz>, module:Class)")


def _own(name: str) -> Policy:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(
            f"policy {name!r}: cannot import {module_name!r}: {error}; is its folder on PYTHONPATH?"
        ) from error
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"policy {name!r}: module {module_name!r} has no class {class_name!r}"
        ) from error

    def build(fleet: FleetSpec, slo: Slo, tick_s: float) -> PolicyParts:
        del tick_s
        try:
            made = found(fleet, slo)
        except TypeError as error:
            raise ConfigError(
                f"policy {name!r}: expected a class called with (fleet, slo): {error}"
            ) from error
        if callable(getattr(made, "decide", None)) and callable(getattr(made, "init", None)):
            return PolicyParts(controller=made)
        if callable(getattr(made, "route", None)) and callable(getattr(made, "update", None)):
            if getattr(made, "phase", "decode") == "prefill" or fleet.colocated:
                return PolicyParts(prefill_router=made)
            return PolicyParts(decode_router=made)
        raise ConfigError(
            f"policy {name!r}: expected an object with init/decide, or route/update,"
            f" got {type(made).__name__}"
        )

    return Policy(name=name, summary="your own", source=name, build=build)
