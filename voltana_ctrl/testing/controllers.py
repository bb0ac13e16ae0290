"""The laws of controllers, and :func:`check_controller`, which holds one against them all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from voltana_ctrl.guard import Guard
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.ports import controller_extras
from voltana_ctrl.testing.conformance import Law, chosen_laws, same
from voltana_ctrl.testing.search import for_all, st
from voltana_ctrl.testing.strategies import observations
from voltana_ctrl.testing.subjects import (
    Subject,
    find_subjects,
    require_all_served,
    run_laws,
    short_run,
)
from voltana_ctrl.types import (
    DEPTHS,
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    Slo,
    Status,
    TickRecord,
)

__all__ = ["CONTROLLER_LAWS", "check_controller"]

_SLO = Slo(ttft_s=0.6, itl_s=0.06)
_STATE = tuple(field.name for field in fields(FleetState) if field.name != "t_s")
_LOAD = ("queue_tok", "queue_req", "oldest_wait_s", "running_req", "kv_used_tok", "arrived_req")
_SAID = ("freq_mhz", "freq_max_mhz", "route_frac", "active", "price_j_req")


def check_controller(
    make: Callable[[FleetSpec, Slo], Any],
    *,
    fleets: Sequence[FleetSpec] | None = None,
    slo: Slo = _SLO,
    claims: Collection[str] = (),
    skip: Collection[str] = (),
    examples: int = 10,
) -> None:
    """Hold a controller against the laws that the loop, the guard and replay rely on.

    Inputs are drawn by Hypothesis, the same ones every time; the simplest that breaks a law is
    reported. A policy that cannot serve a fleet says so with a ConfigError from `make` and is
    not tried on it.

    Parameters
    ----------
    make : callable (fleet, slo) -> object with init/decide
        The class of the policy, as ``compare`` takes it, or a function that builds it.
    fleets : sequence of FleetSpec, optional
        Fleets to try it on; by default disaggregated, tensor-parallel, colocated and mixed ones.
    slo : Slo
        The promises it is made for.
    claims : collection of str
        Laws that not every policy keeps and this one claims to: ``permutes``,
        ``queue-raises-clock``.
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
    >>> from voltana_ctrl import Decision
    >>> from voltana_ctrl.control import StaticController
    >>> from voltana_ctrl.testing import check_controller
    >>> check_controller(lambda fleet, slo: StaticController(fleet, 1300), examples=2)
    >>> class Forgetful:
    ...     def __init__(self, fleet, slo): self.fleet = fleet
    ...     def init(self): return None
    ...     def decide(self, observation, memory): return Decision.highest(self.fleet)
    >>> check_controller(Forgetful)
    Traceback (most recent call last):
    ...
    voltana_ctrl.testing.conformance.LawBroken: controller law 'decides' is broken: ...
    """
    laws = list(chosen_laws(CONTROLLER_LAWS, claims=claims, claimable=_CLAIMABLE, skip=skip))
    run_laws(laws, find_subjects("controller", make, fleets, slo, examples))


def _ask(law: Law, controller: Any, observation: Observation, memory: Any) -> tuple[Decision, Any]:
    with law.watching("decide", observation=observation):
        answer = controller.decide(observation, memory)
    law.require(
        isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Decision),
        f"decide returned {type(answer).__name__}, not (Decision, memory)",
        observation=observation,
    )
    decision: Decision = answer[0]
    return decision, answer[1]


def _begin(law: Law, controller: Any) -> Any:
    with law.watching("init"):
        return controller.init()


def _every(law: Law, subject: Subject, look: Callable[..., None] | None, **kind: bool) -> None:
    """Look at the first decision on every drawn observation."""
    controller = subject.new()

    def once(observation: Observation) -> None:
        decision, _ = _ask(law, controller, observation, _begin(law, controller))
        if look is not None:
            look(observation, decision)

    for_all(observations(subject.fleet, **kind), once, examples=subject.examples)


def _decides(law: Law, subject: Subject) -> None:
    fleet = subject.fleet
    n = len(fleet)
    prefills, decodes = (
        np.isin(np.arange(n), members).astype(float) for members in (fleet.prefill, fleet.decode)
    )
    plain = replace(
        FleetState.idle(n, t_s=10.0),
        queue_req=2.0 * prefills,
        queue_tok=600.0 * prefills,
        oldest_wait_s=0.05 * prefills,
        running_req=10.0 * decodes,
        kv_used_tok=4000.0 * decodes,
        freq_mhz=fleet.max_mhz,
        power_w=np.full(n, 150.0),
        energy_j=np.full(n, 1500.0),
    )
    controller = subject.new()
    _ask(law, controller, Observation(state=plain), _begin(law, controller))


def _idle(law: Law, subject: Subject) -> None:
    _every(law, subject, None, dead=False, stale=False, busy=False)


def _dead(law: Law, subject: Subject) -> None:
    _every(law, subject, None, stale=False)


def _stale(law: Law, subject: Subject) -> None:
    _every(law, subject, None, dead=False)


def _flooded(law: Law, subject: Subject) -> None:
    _every(law, subject, None, flooded=True, dead=False)


def _period(law: Law, subject: Subject) -> None:
    controller = subject.new()
    with law.watching("controller_extras(controller)"):
        seconds = controller_extras(controller).period_s
    law.require(1e-6 <= seconds < 1e9, "it is no time span", period_s=seconds)


def _fits(law: Law, subject: Subject) -> None:
    n = len(subject.fleet)

    def look(observation: Observation, decision: Decision) -> None:
        law.require(
            len(decision) == n,
            f"the decision is on {len(decision)} instances of {n}",
            observation=observation,
        )
        law.require(
            isinstance(decision.status, Status), "status is no Status", status=decision.status
        )

    _every(law, subject, look)


def _dated(law: Law, subject: Subject) -> None:
    def look(observation: Observation, decision: Decision) -> None:
        law.require(
            decision.t_s == observation.state.t_s,
            f"a decision on a reading of {observation.state.t_s} s says {decision.t_s} s",
            observation=observation,
        )

    _every(law, subject, look)


def _clocks(law: Law, subject: Subject) -> None:
    fleet = subject.fleet

    def look(observation: Observation, decision: Decision) -> None:
        for name in ("freq_mhz", "freq_max_mhz"):
            value = getattr(decision, name)
            law.require(
                np.all(value <= fleet.max_mhz),
                f"{name} {value} is above {fleet.max_mhz}",
                observation=observation,
            )
        law.require(
            np.all(decision.freq_mhz >= 0.0) and np.all(decision.freq_max_mhz >= fleet.min_mhz),
            f"no clock lies between {decision.freq_mhz} and {decision.freq_max_mhz}",
            observation=observation,
        )

    _every(law, subject, look)


def _shares(law: Law, subject: Subject) -> None:
    fleet = subject.fleet

    def look(observation: Observation, decision: Decision) -> None:
        for phase, members in (("prefill", fleet.prefill), ("decode", fleet.decode)):
            if not observation.state.alive[members].any() or decision.status is not Status.OK:
                continue
            total = decision.route_frac[members].sum()
            law.require(
                abs(total - 1.0) <= 1e-6,
                f"shares of {phase} sum to {total:.6g}",
                decision=decision,
                observation=observation,
            )

    _every(law, subject, look)


def _parked(law: Law, subject: Subject) -> None:
    def look(observation: Observation, decision: Decision) -> None:
        law.require(
            not np.any(decision.route_frac[~decision.active] > 1e-9),
            "an instance that is not active has a share",
            decision=decision,
            observation=observation,
        )

    _every(law, subject, look)


def _runs(subject: Subject, length: int = 4) -> st.SearchStrategy[list[Observation]]:
    """Observations in the order of time."""
    several = st.lists(observations(subject.fleet), min_size=length, max_size=length)
    return several.map(lambda run: sorted(run, key=lambda one: one.state.t_s))


def _sequence(law: Law, subject: Subject) -> None:
    controller = subject.new()

    def look(run: list[Observation]) -> None:
        memory = _begin(law, controller)
        for observation in run:
            _, memory = _ask(law, controller, observation, memory)

    for_all(_runs(subject), look, examples=subject.examples)


def _pure(law: Law, subject: Subject) -> None:
    controller = subject.new()

    def look(run: list[Observation]) -> None:
        start = _begin(law, controller)
        first, memory = _ask(law, controller, run[0], start)
        for observation in run[1:]:
            again, _ = _ask(law, controller, run[0], start)
            law.require(
                same(first, again),
                "asked again, it decides otherwise",
                first=first,
                again=again,
                observation=run[0],
            )
            _, memory = _ask(law, controller, observation, memory)

    for_all(_runs(subject), look, examples=subject.examples)


def _untouched(law: Law, subject: Subject) -> None:
    controller = subject.new()

    def look(run: list[Observation]) -> None:
        memory = _begin(law, controller)
        for observation in run:
            with law.watching("copying the memory", memory=memory):
                before = copy.deepcopy(memory)
            _, after = _ask(law, controller, observation, memory)
            law.require(
                same(before, memory),
                "decide changed the memory that it was given",
                observation=observation,
                before=before,
                after=memory,
            )
            memory = after

    for_all(_runs(subject, 3), look, examples=subject.examples)


def _fresh(law: Law, subject: Subject) -> None:
    controller = subject.new()
    before = copy.deepcopy(_begin(law, controller))

    def look(run: list[Observation]) -> None:
        memory = _begin(law, controller)
        for observation in run:
            _, memory = _ask(law, controller, observation, memory)
        again = _begin(law, controller)
        law.require(
            same(before, again),
            "init after some decisions is not what it was before them",
            before=before,
            again=again,
        )

    for_all(_runs(subject, 2), look, examples=max(1, subject.examples // 2))


def _alone(law: Law, subject: Subject) -> None:
    loose = replace(subject.slo, ttft_s=10.0 * subject.slo.ttft_s, itl_s=10.0 * subject.slo.itl_s)

    def look(observation: Observation) -> None:
        one = subject.new()
        before, _ = _ask(law, one, observation, _begin(law, one))
        other = subject.make(subject.other, loose)
        quiet = Observation(state=FleetState.idle(len(subject.other)))
        _ask(law, other, quiet, _begin(law, other))
        after, _ = _ask(law, one, observation, _begin(law, one))
        law.require(
            same(before, after),
            "it decides otherwise once another one was made and asked",
            before=before,
            after=after,
            observation=observation,
        )

    for_all(observations(subject.fleet), look, examples=max(1, subject.examples // 4))


def _pickles(law: Law, subject: Subject) -> None:
    controller = subject.new()

    def look(run: list[Observation]) -> None:
        _, memory = _ask(law, controller, run[0], _begin(law, controller))
        with law.watching("pickling the memory", memory=memory):
            kept = pickle.loads(pickle.dumps(memory))
        for observation in run[1:]:
            direct, memory = _ask(law, controller, observation, memory)
            replayed, kept = _ask(law, controller, observation, kept)
            law.require(
                same(direct, replayed),
                "from a stored memory it decides otherwise",
                direct=direct,
                replayed=replayed,
                observation=observation,
            )

    for_all(_runs(subject, 3), look, examples=subject.examples)


class _Watch:
    """Observer that holds what was applied against the ladder, and collects who finished."""

    def __init__(self, law: Law, fleet: FleetSpec) -> None:
        self._law = law
        self._fleet = fleet
        self._finished: list[int] = []

    def on_tick(self, record: TickRecord) -> None:
        self._finished.extend(record.observation.finished.request.tolist())
        for i, one in enumerate(self._fleet.instances):
            for freq_mhz in (record.applied.freq_mhz[i], record.applied.freq_max_mhz[i]):
                self._law.require(
                    freq_mhz in one.clocks_mhz,
                    f"{one.id} got {freq_mhz} MHz, which it does not support",
                    proposed=record.proposed,
                )

    def finished(self) -> list[int]:
        """Who finished since the last call."""
        done, self._finished = self._finished, []
        return done


def _closed_loop(law: Law, subject: Subject) -> None:
    backend = short_run(subject.fleet)
    watch = _Watch(law, subject.fleet)
    with law.watching("making the loop"):
        loop = ControlLoop(backend, subject.new(), Guard(subject.fleet), observers=[watch])

    def go(until_s: float) -> list[int]:
        with law.watching("a tick", before_s=until_s):
            loop.run(until_s)
        return [*watch.finished(), *backend.read().finished.request.tolist()]

    require_all_served(law, backend, go)


def _likes(fleet: FleetSpec) -> list[list[int]]:
    """Indices of instances that nothing tells apart."""
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(fleet.instances):
        limits = (one.kv_capacity_tok, one.max_batch, one.prefill_budget_tok)
        rest = (one.idle_w, *(one.rest(depth) for depth in DEPTHS))
        key = (one.role, id(one.profile), one.clocks_mhz.tobytes(), limits, rest)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _permutes(law: Law, subject: Subject) -> None:
    controller = subject.new()
    order = np.arange(len(subject.fleet))
    for group in _likes(subject.fleet):
        order[group] = group[::-1]

    # Ties are a matter of taste: no two instances carry the same load.
    apart = np.arange(len(subject.fleet)) * 0.0137

    def look(observation: Observation) -> None:
        state = observation.state
        state = replace(state, **{name: getattr(state, name) + apart for name in _LOAD})
        turned = replace(state, **{name: getattr(state, name)[order] for name in _STATE})
        # Iterations and finished requests name instances; without them nothing else does.
        seen, _ = _ask(law, controller, Observation(state=state), _begin(law, controller))
        there, _ = _ask(law, controller, Observation(state=turned), _begin(law, controller))
        for name in _SAID:
            a, b = getattr(seen, name)[order], getattr(there, name)
            law.require(
                np.allclose(a, b, rtol=1e-9, atol=1e-9),
                f"with equal instances swapped, {name} is {b} instead of {a}",
                observation=observation,
            )

    for_all(observations(subject.fleet, dead=False), look, examples=subject.examples)


def _raises_clock(law: Law, subject: Subject) -> None:
    controller = subject.new()
    guard = Guard(subject.fleet)
    n = len(subject.fleet)
    quiet = observations(subject.fleet, dead=False, stale=False)

    def clocks_mhz(observation: Observation) -> Any:
        decision, _ = _ask(law, controller, observation, _begin(law, controller))
        return guard.shield(decision, observation, None).freq_mhz

    def look(drawn: tuple[Observation, int, int]) -> None:
        observation, i, more_req = drawn
        state = observation.state
        longer = np.zeros(n)
        longer[i] = more_req
        grown = replace(
            state,
            queue_req=state.queue_req + longer,
            queue_tok=state.queue_tok + 500.0 * longer,
            oldest_wait_s=state.oldest_wait_s + 0.05 * longer,
        )
        before_mhz = clocks_mhz(observation)[i]
        after_mhz = clocks_mhz(replace(observation, state=grown))[i]
        law.require(
            after_mhz >= before_mhz,
            f"{more_req} more requests in the queue of instance {i} lower its clock from"
            f" {before_mhz:g} to {after_mhz:g} MHz",
            observation=observation,
        )

    drawn = st.tuples(quiet, st.sampled_from(subject.fleet.prefill.tolist()), st.integers(1, 200))
    for_all(drawn, look, examples=subject.examples)


def _law(name: str, check: Callable[[Law, Subject], None], says: str, mend: str) -> Law:
    return Law(about="controller", name=name, says=says, mend=mend, check=check)


_CLAIMABLE = ("permutes", "queue-raises-clock")

#: Every law of controllers, in the order in which they are checked.
CONTROLLER_LAWS: tuple[Law, ...] = (
    _law(
        "decides", _decides,
        "decide(observation, memory) returns (Decision, memory).",
        "return a pair, make every clock and price finite, floors at or below ceilings",
    ),
    _law(
        "survives-idle", _idle,
        "A fleet with nothing to do is decided on like any other.",
        "do not divide by queues, rates or running requests",
    ),
    _law(
        "survives-dead", _dead,
        "Dead instances, up to all of them, do not stop it.",
        "choose among observation.state.alive, and fall back to all where nobody is",
    ),
    _law(
        "survives-stale", _stale,
        "Old readings do not stop it; the guard decides what they are worth.",
        "return a decision (with Status.STALE, if you do not trust it) rather than raise",
    ),
    _law(
        "survives-flood", _flooded,
        "Queues that cannot be served in time do not stop it.",
        "return the best there is with Status.INFEASIBLE rather than raise",
    ),
    _law(
        "period", _period,
        "period_s, where it has one, is a number of seconds > 0.",
        "set period_s to the time between decisions, such as 0.1",
    ),
    _law(
        "fits-fleet", _fits,
        "A decision has one entry per instance of the fleet, and a Status.",
        "size arrays by len(fleet), not by a number of your own",
    ),
    _law(
        "dated", _dated,
        "t_s of a decision is that of the state it was made on.",
        "pass t_s=observation.state.t_s",
    ),
    _law(
        "clocks-in-range", _clocks,
        "Clocks asked for lie within what each instance supports; the guard rounds the rest.",
        "clip to fleet.min_mhz and fleet.max_mhz, per instance",
    ),
    _law(
        "shares-sum-to-one", _shares,
        "Shares of new work sum to 1 over each phase in which somebody is alive.",
        "divide by the sum over fleet.prefill, and over fleet.decode",
    ),
    _law(
        "parked-get-nothing", _parked,
        "Who is not active has no share.",
        "set route_frac to 0 where active is False, before you normalise",
    ),
    _law(
        "survives-sequence", _sequence,
        "Whatever follows whatever, it decides.",
        "look at what the memory holds from before: an instance that worked may be dead now",
    ),
    _law(
        "pure", _pure,
        "The same observation and memory give the same decision.",
        "keep what changes in the memory, not on self, in a global or in a random generator",
    ),
    _law(
        "memory-untouched", _untouched,
        "decide returns a new memory and leaves the one it was given as it was.",
        "copy before you change: dataclasses.replace, memory.copy(), {**memory}",
    ),
    _law(
        "init-is-fresh", _fresh,
        "init gives the same memory whenever it is called.",
        "build the memory inside init, from settings alone",
    ),
    _law(
        "no-shared-state", _alone,
        "Two controllers in one process know nothing of each other.",
        "keep settings on self, not on the class or in the module",
    ),
    _law(
        "memory-pickles", _pickles,
        "The memory can be stored, and a replay from it decides the same.",
        "keep data in it: no lambdas, generators, locks, open files",
    ),
    _law(
        "closed-loop", _closed_loop,
        "On the simulated plant, behind the guard, every request is served, once.",
        "look at the tick that is named; run ControlLoop on a SimBackend to see it",
    ),
    _law(
        "permutes", _permutes,
        "Swapping equal instances swaps their part of the decision.",
        "decide by what an instance is and does, not by its index",
    ),
    _law(
        "queue-raises-clock", _raises_clock,
        "A longer queue never lowers a guarded clock.",
        "make the clock grow with queue_req, queue_tok and oldest_wait_s",
    ),
)  # fmt: skip
