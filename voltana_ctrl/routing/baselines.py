"""Routers to compare against, each by one function."""

from __future__ import annotations

from collections.abc import Sequence

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.routing.base import CompiledRouter, Phase
from voltana_ctrl.types import FleetSpec, Slo

__all__ = [
    "fadr_router",
    "least_kv_router",
    "least_queue_router",
    "random_router",
    "rolling_router",
    "round_robin_router",
    "share_router",
    "shortest_router",
    "tile_aware_router",
    "tokens_by_batch_router",
    "two_choices_router",
]


def share_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """Honour the shares of the latest decision by smooth weighted round robin.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> router = share_router(fleet, "decode")
    >>> router.update(Decision.highest(fleet))
    >>> [router.route(Request(prompt_tok=9), FleetState.idle(3)) for _ in range(4)]
    [1, 2, 1, 2]
    """
    from voltana_ctrl.kernels.route.base import by_share

    return CompiledRouter(fleet, phase, by_share)


def random_router(fleet: FleetSpec, phase: Phase, *, seed: int = 0) -> CompiledRouter:
    """Uniformly at random (VoltanaLLM v0.1's choice for prefill).

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.
    seed : int
        Seed of the random numbers when a server calls it; the simulator draws its own.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("2P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> random_router(fleet, "prefill").route(Request(prompt_tok=9), FleetState.idle(3)) < 2
    True
    """
    from voltana_ctrl.kernels.route.baselines import at_random

    return CompiledRouter(fleet, phase, at_random, seed=seed)


def least_queue_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """Fewest prompt tokens waiting.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("2P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> least_queue_router(fleet, "prefill").route(Request(prompt_tok=9), FleetState.idle(3))
    0
    """
    from voltana_ctrl.kernels.route.baselines import least_queue

    return CompiledRouter(fleet, phase, least_queue)


def shortest_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """Join the shortest queue: fewest requests running or waiting, the first among equals.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, with the profiles that the policy believes in.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> shortest_router(fleet, "decode").route(Request(prompt_tok=9), FleetState.idle(3))
    1
    """
    from voltana_ctrl.kernels.route.baselines import shortest

    return CompiledRouter(fleet, phase, shortest)


def tile_aware_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """VoltanaLLM v0.1's ``tile_aware``: fill a tile of 128 before opening the next.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> tile_aware_router(fleet, "decode").route(Request(prompt_tok=9), FleetState.idle(3))
    1
    """
    from voltana_ctrl.kernels.route.baselines import tile_aware

    return CompiledRouter(fleet, phase, tile_aware)


def fadr_router(
    fleet: FleetSpec,
    phase: Phase,
    slo: Slo,
    *,
    ladder_mhz: Sequence[float] | None,
) -> CompiledRouter:
    """VoltanaLLM v0.1's ``fadr``: keep a request from pushing an instance up its ladder.

    Parameters
    ----------
    fleet : FleetSpec
        As believed; all instances must share one list of supported clocks.
    phase : {"prefill", "decode"}
        Which instances it picks from; made for decode.
    slo : Slo
        Promises; the ITL is used.
    ladder_mhz : sequence of float or None
        The governors' ladder; None for every supported clock.

    Raises
    ------
    ConfigError
        If instances differ in their supported clocks.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> router = fadr_router(fleet, "decode", Slo(ttft_s=0.6, itl_s=0.06), ladder_mhz=[1005, 1410])
    >>> router.route(Request(prompt_tok=9), FleetState.idle(3))
    1
    """
    from voltana_ctrl.kernels.route.baselines import fadr

    members = fleet.prefill if phase == "prefill" else fleet.decode
    ladders = {fleet.instances[i].clocks_mhz.tobytes() for i in members}
    if len(ladders) > 1:
        raise ConfigError(
            "fadr_router: expected one list of supported clocks for all instances, as in"
            " VoltanaLLM v0.1; use another router for this fleet"
        )
    rungs = fleet.instances[members[0]].clock_rows(ladder_mhz)
    return CompiledRouter(fleet, phase, fadr, [slo.itl_s, float(len(rungs)), *map(float, rungs)])


def round_robin_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """In turn, whatever the shares of the decision (what most proxies do by default).

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P3D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> router = round_robin_router(fleet, "decode")
    >>> [router.route(Request(prompt_tok=9), FleetState.idle(4)) for _ in range(4)]
    [1, 2, 3, 1]
    """
    from voltana_ctrl.kernels.route.baselines import round_robin

    return CompiledRouter(fleet, phase, round_robin)


def rolling_router(fleet: FleetSpec, phase: Phase, *, turn_tok: float) -> CompiledRouter:
    """One instance takes all prompts for a turn, then the next one.

    EcoServe's rolling activation (arXiv 2504.18154), a reading of its abstract: while an instance
    has its turn the others decode undisturbed. The paper ends a turn when the running requests
    have no time left to give; here it ends after so many prompt tokens, which a router can count.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.
    turn_tok : float
        Prompt tokens of a turn.

    Raises
    ------
    ConfigError
        If a turn has no tokens.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("3C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> router = rolling_router(fleet, "prefill", turn_tok=200.0)
    >>> [router.route(Request(prompt_tok=100), FleetState.idle(3)) for _ in range(5)]
    [0, 0, 1, 1, 2]
    """
    from voltana_ctrl.kernels.route.baselines import rolling

    positive("rolling_router.turn_tok", turn_tok)
    return CompiledRouter(fleet, phase, rolling, [turn_tok])


def least_kv_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """Smallest share of the KV cache in use.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> least_kv_router(fleet, "decode").route(Request(prompt_tok=9), FleetState.idle(3))
    1
    """
    from voltana_ctrl.kernels.route.baselines import least_kv

    return CompiledRouter(fleet, phase, least_kv)


def two_choices_router(fleet: FleetSpec, phase: Phase, *, seed: int = 0) -> CompiledRouter:
    """Power of two choices: the shorter queue of two drawn at random.

    M. Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12(10),
    2001. With two instances it is :func:`shortest_router`.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.
    seed : int
        Seed of the random numbers when a server calls it; the simulator draws its own.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("1P4D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> two_choices_router(fleet, "decode").route(Request(prompt_tok=9), FleetState.idle(5)) > 0
    True
    """
    from voltana_ctrl.kernels.route.baselines import two_choices

    return CompiledRouter(fleet, phase, two_choices, seed=seed)


def tokens_by_batch_router(fleet: FleetSpec, phase: Phase) -> CompiledRouter:
    """Least product of prompt tokens to prefill and batch size.

    The score of LMetric (arXiv 2603.15202) as its abstract states it: new prefill tokens if the
    request were routed there, times the current batch. A reading of a summary: we count the
    prompt tokens that already wait there and the request itself in both factors, so that an
    empty instance does not score 0 whatever the prompt. The paper routes to colocated
    instances, where the first factor carries the prefix cache; this plant's cached tokens are
    the same on every instance. On decode instances alone little is left to prefill, and it
    comes close to :func:`shortest_router`.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    phase : {"prefill", "decode"}
        Which instances it picks from.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Request, load_profile
    >>> fleet = FleetSpec.parse("2P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> tokens_by_batch_router(fleet, "prefill").route(Request(prompt_tok=9), FleetState.idle(3))
    0
    """
    from voltana_ctrl.kernels.route.baselines import tokens_by_batch

    return CompiledRouter(fleet, phase, tokens_by_batch)
