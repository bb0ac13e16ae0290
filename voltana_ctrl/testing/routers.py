"""The laws of routers, and :func:`check_router`, which holds one against them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import I64, Bool
from voltana_ctrl.ports import phase_of
from voltana_ctrl.testing.conformance import Law, chosen_laws
from voltana_ctrl.testing.search import for_all, st
from voltana_ctrl.testing.strategies import decisions, fleet_states, requests
from voltana_ctrl.testing.subjects import (
    Subject,
    find_subjects,
    require_all_served,
    run_laws,
    short_run,
)
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Request, Slo

__all__ = ["ROUTER_LAWS", "check_router"]

_SLO = Slo(ttft_s=0.6, itl_s=0.06)


def check_router(
    make: Callable[[FleetSpec, Slo], Any],
    *,
    fleets: Sequence[FleetSpec] | None = None,
    slo: Slo = _SLO,
    claims: Collection[str] = (),
    skip: Collection[str] = (),
    examples: int = 20,
) -> None:
    """Hold a router against the laws that a server in front of it relies on.

    Parameters
    ----------
    make : callable (fleet, slo) -> object with route/update
        The class of the router, as ``compare`` takes it, or a function that builds it. Its
        attribute `phase` says which instances it picks from, "decode" where it has none.
    fleets : sequence of FleetSpec, optional
        Fleets to try it on; by default disaggregated, tensor-parallel, colocated and mixed ones.
    slo : Slo
        The promises it is made for.
    claims : collection of str
        Laws that not every router keeps and this one claims to: ``honours-shares``.
    skip : collection of str
        Names of laws to leave out.
    examples : int
        Inputs drawn per law and fleet.

    Raises
    ------
    LawBroken
        An AssertionError that names the law broken, the input and what to mend.
    ConfigError
        If `claims` or `skip` name no law.

    Examples
    --------
    >>> from voltana_ctrl.routing import shortest_router
    >>> from voltana_ctrl.testing import check_router
    >>> check_router(lambda fleet, slo: shortest_router(fleet, "decode"), examples=2)
    >>> class First:
    ...     def __init__(self, fleet, slo): pass
    ...     def route(self, request, state): return 0
    ...     def update(self, decision): pass
    >>> check_router(First)
    Traceback (most recent call last):
    ...
    voltana_ctrl.testing.conformance.LawBroken: router law 'picks-a-member' is broken: ...
    """
    laws = list(chosen_laws(ROUTER_LAWS, claims=claims, claimable=_CLAIMABLE, skip=skip))
    run_laws(laws, find_subjects("router", make, fleets, slo, examples))


def _members(router: Any, fleet: FleetSpec) -> I64:
    return fleet.prefill if phase_of(router) == "prefill" else fleet.decode


def _ask(law: Law, router: Any, request: Request, state: FleetState) -> int:
    with law.watching("route", request=request, state=state):
        picked = router.route(request, state)
    law.require(
        isinstance(picked, int | np.integer) and not isinstance(picked, bool),
        f"route returned {picked!r}, no index",
        request=request,
        state=state,
    )
    return int(picked)


def _tell(law: Law, router: Any, decision: Decision) -> None:
    with law.watching("update", decision=decision):
        router.update(decision)


def _member(law: Law, subject: Subject) -> None:
    fleet = subject.fleet

    def look(drawn: tuple[Request, FleetState, Decision]) -> None:
        request, state, decision = drawn
        router = subject.new()
        members = _members(router, fleet)
        for told in (False, True):
            if told:
                _tell(law, router, decision)
            picked = _ask(law, router, request, state)
            law.require(
                picked in members,
                f"it picked {picked}, expected one of {members.tolist()}",
                request=request,
                state=state,
                updated=told,
            )

    for_all(
        st.tuples(
            requests(instances=len(fleet)), fleet_states(fleet, dead=False), decisions(fleet)
        ),
        look,
        examples=subject.examples,
    )


def _passed_over(
    law: Law, subject: Subject, spoil: Callable[[FleetState, Decision, Bool], Any], what: str
) -> None:
    """Nobody who is spoilt is picked while another is left."""
    fleet = subject.fleet
    n = len(fleet)

    def look(drawn: tuple[list[bool], Request, FleetState]) -> None:
        spoilt, request, state = np.array(drawn[0]), drawn[1], drawn[2]
        state = replace(state, kv_used_tok=np.zeros(n), age_s=np.zeros(n))
        router = subject.new()
        members = _members(router, fleet)
        if spoilt[members].all():
            spoilt[members[-1]] = False
        state, decision = spoil(state, Decision.highest(fleet), spoilt)
        _tell(law, router, decision)
        for _ in range(2 * len(members)):
            picked = _ask(law, router, request, state)
            law.require(
                picked not in np.flatnonzero(spoilt),
                f"it picked {picked}, which is {what}, while"
                f" {members[~spoilt[members]].tolist()} are left",
                request=request,
                state=state,
            )

    some = st.lists(st.booleans(), min_size=n, max_size=n)
    state = fleet_states(fleet, dead=False, stale=False)
    for_all(st.tuples(some, requests(), state), look, examples=subject.examples)


def _dead(law: Law, subject: Subject) -> None:
    def spoil(state: FleetState, decision: Decision, spoilt: Bool) -> Any:
        return replace(state, alive=~spoilt), decision

    _passed_over(law, subject, spoil, "dead")


def _parked(law: Law, subject: Subject) -> None:
    def spoil(state: FleetState, decision: Decision, spoilt: Bool) -> Any:
        share = np.where(spoilt, 0.0, decision.route_frac)
        for members in (subject.fleet.prefill, subject.fleet.decode):
            share[members] /= max(share[members].sum(), 1e-12)
        return state, replace(decision, active=~spoilt, route_frac=share)

    _passed_over(law, subject, spoil, "parked")


def _full(law: Law, subject: Subject) -> None:
    def spoil(state: FleetState, decision: Decision, spoilt: Bool) -> Any:
        used_tok = np.where(spoilt, subject.fleet.kv_capacity_tok, 0.0)
        return replace(state, kv_used_tok=used_tok), decision

    _passed_over(law, subject, spoil, "KV-full")


def _nobody(law: Law, subject: Subject) -> None:
    fleet = subject.fleet
    n = len(fleet)

    def look(drawn: tuple[Request, FleetState]) -> None:
        request, state = drawn
        router = subject.new()
        highest = Decision.highest(fleet)
        cases = (
            (replace(state, alive=np.zeros(n, bool)), highest),
            (replace(state, kv_used_tok=fleet.kv_capacity_tok), highest),
            (state, replace(highest, active=np.zeros(n, bool), route_frac=np.zeros(n))),
        )
        for hopeless, decision in cases:
            _tell(law, router, decision)
            picked = _ask(law, router, request, hopeless)
            law.require(
                picked in _members(router, fleet),
                f"it picked {picked}",
                request=request,
                state=hopeless,
                decision=decision,
            )

    for_all(st.tuples(requests(), fleet_states(fleet)), look, examples=subject.examples)


def _tour(subject: Subject) -> st.SearchStrategy[Any]:
    """A decision, and requests that follow one another with the states they meet."""
    fleet = subject.fleet
    steps = st.lists(st.tuples(requests(), fleet_states(fleet)), min_size=3, max_size=6)
    return st.tuples(decisions(fleet), steps)


def _deterministic(law: Law, subject: Subject) -> None:
    def look(drawn: Any) -> None:
        decision, steps = drawn
        tours = []
        for _ in range(2):
            router = subject.new()
            _tell(law, router, decision)
            tours.append([_ask(law, router, *step) for step in steps])
        law.require(
            tours[0] == tours[1], f"the same requests went to {tours[0]}, then to {tours[1]}",
            decision=decision,
        )  # fmt: skip

    for_all(_tour(subject), look, examples=subject.examples)


def _alone(law: Law, subject: Subject) -> None:
    other_highest = Decision.highest(subject.other)
    quiet = FleetState.idle(len(subject.other))

    def look(drawn: Any) -> None:
        decision, steps = drawn
        alone, watched = subject.new(), subject.new()
        for router in (alone, watched):
            _tell(law, router, decision)
        expected = [_ask(law, alone, *step) for step in steps]
        picks = []
        for step in steps:
            other = subject.make(subject.other, subject.slo)
            _tell(law, other, other_highest)
            _ask(law, other, step[0], quiet)
            picks.append(_ask(law, watched, *step))
        law.require(
            picks == expected, f"with another one at work it picks {picks}, alone {expected}",
            decision=decision,
        )  # fmt: skip

    for_all(_tour(subject), look, examples=max(1, subject.examples // 4))


def _idempotent(law: Law, subject: Subject) -> None:
    def look(drawn: Any) -> None:
        decision, steps = drawn
        tours = []
        for times in (1, 2):
            router = subject.new()
            picks = []
            for step in steps:
                for _ in range(times):
                    _tell(law, router, decision)
                picks.append(_ask(law, router, *step))
            tours.append(picks)
        law.require(
            tours[0] == tours[1],
            f"told once it picks {tours[0]}, told the same twice {tours[1]}",
            decision=decision,
        )

    for_all(_tour(subject), look, examples=subject.examples)


def _honours(law: Law, subject: Subject) -> None:
    fleet = subject.fleet
    state = FleetState.idle(len(fleet))
    rounds = 100

    def look(decision: Decision) -> None:
        router = subject.new()
        members = _members(router, fleet)
        _tell(law, router, decision)
        request = Request(prompt_tok=100)
        picks = [_ask(law, router, request, state) for _ in range(rounds)]
        got = np.bincount(picks, minlength=len(fleet))[members]
        wanted = rounds * decision.route_frac[members]
        law.require(
            np.all(np.abs(got - wanted) <= len(members)),
            f"of {rounds} requests {got.tolist()} went where {np.round(wanted, 1).tolist()} should",
            decision=decision,
        )

    skewed = np.zeros(len(fleet))
    for members in (fleet.prefill, fleet.decode):
        skewed[members] = np.arange(1.0, len(members) + 1.0) / np.arange(1, len(members) + 1).sum()
    look(replace(Decision.highest(fleet), route_frac=skewed))
    for_all(decisions(fleet), look, examples=subject.examples)


def _closed_loop(law: Law, subject: Subject) -> None:
    fleet = subject.fleet
    router = subject.new()
    # Colocated instances take a request once, at prefill.
    slot = "prefill_router" if phase_of(router) == "prefill" or fleet.colocated else "decode_router"
    backend = short_run(fleet, **{slot: router})
    backend.apply(Decision.highest(fleet))

    def go(until_s: float) -> list[int]:
        with law.watching("the run", before_s=until_s):
            backend.clock.sleep_until_s(until_s)
        done: list[int] = backend.read().finished.request.tolist()
        return done

    require_all_served(law, backend, go)


def _law(name: str, check: Callable[[Law, Subject], None], says: str, mend: str) -> Law:
    return Law(about="router", name=name, says=says, mend=mend, check=check)


_CLAIMABLE = ("honours-shares",)

#: Every law of routers, in the order in which they are checked.
ROUTER_LAWS: tuple[Law, ...] = (
    _law(
        "picks-a-member", _member,
        "route returns the index of an instance of its phase, before the first update too.",
        "choose among fleet.prefill or fleet.decode, and set phase to say which",
    ),
    _law(
        "passes-over-dead", _dead,
        "A dead instance gets nothing while another of the phase is alive.",
        "leave out members where state.alive is False",
    ),
    _law(
        "passes-over-parked", _parked,
        "A parked instance gets nothing while another of the phase is active.",
        "keep decision.active in update, and leave out members where it is False",
    ),
    _law(
        "passes-over-full", _full,
        "An instance without room for the prompt gets nothing while another has room.",
        "leave out members where kv_used_tok + prompt_tok exceeds fleet.kv_capacity_tok",
    ),
    _law(
        "nobody-left", _nobody,
        "Where all are dead, parked or full it still picks a member of its phase.",
        "fall back to all members rather than take the minimum of nothing",
    ),
    _law(
        "deterministic", _deterministic,
        "Two of them, made alike and asked alike, pick alike.",
        "seed random numbers in the constructor; break ties by index",
    ),
    _law(
        "update-idempotent", _idempotent,
        "Being told the same decision twice changes nothing.",
        "set what update takes, do not add to it or start anew",
    ),
    _law(
        "no-shared-state", _alone,
        "Two routers in one process know nothing of each other.",
        "keep counters on self, not on the class or in the module",
    ),
    _law(
        "closed-loop", _closed_loop,
        "On the simulated plant every request is served, once.",
        "run it on a SimBackend as prefill_router or decode_router to see where it ends",
    ),
    _law(
        "honours-shares", _honours,
        "Over many requests each instance gets its share, give or take the number of members.",
        "use smooth weighted round robin on decision.route_frac",
    ),
)  # fmt: skip
