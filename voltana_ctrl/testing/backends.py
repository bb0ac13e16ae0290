"""The laws of backends, and :func:`check_backend`, which holds one against them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from voltana_ctrl.errors import BackendError
from voltana_ctrl.ports import Backend
from voltana_ctrl.testing.conformance import Law, chosen_laws
from voltana_ctrl.types import Decision, FleetSpec, Observation

__all__ = ["BACKEND_LAWS", "check_backend"]

_PER_INSTANCE = (
    "queue_tok",
    "queue_req",
    "oldest_wait_s",
    "running_req",
    "kv_used_tok",
    "freq_mhz",
    "power_w",
    "energy_j",
    "age_s",
    "arrived_req",
    "arrived_tok",
)
_STALE_S = 2.0  # what the guard refuses to act on by default


def check_backend(
    make: Callable[[], Any],
    *,
    wait: Callable[[Any], None] | None = None,
    given_back: Callable[[], bool] | None = None,
    claims: Collection[str] = (),
    skip: Collection[str] = (),
) -> None:
    """Hold a backend against the contract of :class:`voltana_ctrl.ports.Backend`.

    Each law gets a fresh backend, which is closed afterwards.

    Parameters
    ----------
    make : callable
        Returns a fresh backend with at least four readings in it.
    wait : callable
        Called with a backend to let time pass for it, so that a clock settles; nothing by default.
    given_back : callable, optional
        Returns whether the hardware is as it was found; asked after close, where it is given.
    claims : collection of str
        Laws that not every backend keeps and this one claims to: ``clocks-read-back`` (a
        replay cannot), ``counts-since-read`` (needs traffic while it waits).
    skip : collection of str
        Names of laws to leave out.

    Raises
    ------
    LawBroken
        An AssertionError that names the law broken and what to mend.
    ConfigError
        If `claims` or `skip` name no law.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.backends import SimBackend
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> workload = make_workload("fixed", rate_req_s=1.0, duration_s=9.0)
    >>> check_backend(lambda: SimBackend(fleet, workload=workload),
    ...               wait=lambda backend: backend.clock.sleep_until_s(backend.clock.now_s() + 1),
    ...               claims=["clocks-read-back"])
    """
    subject = _Plant(make=make, waits=wait, given_back=given_back)
    for law in chosen_laws(BACKEND_LAWS, claims=claims, claimable=_CLAIMABLE, skip=skip):
        law.check(law, subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plant:
    """The backend under test."""

    make: Callable[[], Any]
    waits: Callable[[Any], None] | None
    given_back: Callable[[], bool] | None

    def wait(self, backend: Any) -> None:
        if self.waits is not None:
            self.waits(backend)

    @contextmanager
    def open(self, law: Law) -> Iterator[Any]:
        with law.watching("making it"):
            backend = self.make()
        try:
            yield backend
        finally:
            backend.close()


def _read(law: Law, backend: Any) -> Observation:
    with law.watching("read"):
        observation = backend.read()
    law.require(isinstance(observation, Observation), f"read returned {type(observation).__name__}")
    return observation  # type: ignore[no-any-return]


def _apply(law: Law, backend: Any, decision: Decision) -> None:
    with law.watching("apply", decision=decision):
        backend.apply(decision)


def _lowest(spec: FleetSpec) -> Decision:
    return Decision.highest(spec, floor_mhz=spec.min_mhz, ceiling_mhz=spec.min_mhz)


def _port(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        missing = [name for name in ("spec", "read", "apply") if not hasattr(backend, name)]
        law.require(not missing and isinstance(backend, Backend), f"it has no {missing}")
        law.require(isinstance(backend.spec, FleetSpec), f"spec is {backend.spec!r}")


def _reads(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        state = _read(law, backend).state
        law.require(
            len(state) == len(backend.spec),
            f"the reading has {len(state)} entries for {len(backend.spec)} instances",
        )
        for name in _PER_INSTANCE:
            value = getattr(state, name)
            law.require(
                np.all(np.isfinite(value) & (value >= 0.0)),
                f"expected that {name} is finite and >= 0, got {value}",
            )


def _fresh(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        state = _read(law, backend).state
        ages_s = state.age_s[state.alive]
        law.require(
            np.all(ages_s <= _STALE_S),
            f"instances that answer were read {ages_s} s ago, more than {_STALE_S:g} s",
        )


def _in_time(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        before_s = _read(law, backend).state.t_s
        for _ in range(2):
            subject.wait(backend)
            now_s = _read(law, backend).state.t_s
            law.require(now_s >= before_s, f"after {before_s} s it is {now_s} s")
            before_s = now_s


def _energy(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        before_j = _read(law, backend).state.energy_j
        for decision in (_lowest(backend.spec), Decision.highest(backend.spec)):
            _apply(law, backend, decision)
            subject.wait(backend)
            now_j = _read(law, backend).state.energy_j
            law.require(np.all(now_j >= before_j), f"after {before_j} J it is {now_j} J")
            before_j = now_j


def _idempotent(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        for decision in (_lowest(backend.spec), Decision.highest(backend.spec)):
            _apply(law, backend, decision)
            _apply(law, backend, decision)


def _refuses(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        n = len(backend.spec) + 1
        strange = Decision(
            t_s=0.0,
            freq_mhz=np.full(n, 1000.0),
            freq_max_mhz=np.full(n, 1000.0),
            route_frac=np.full(n, 0.5),
            active=np.ones(n, dtype=bool),
            price_j_req=np.zeros(n),
        )
        with law.watching("apply", decision=strange):
            try:
                backend.apply(strange)
            except ValueError:  # ConfigError and ShapeError are such
                return
        law.require(False, f"a decision on {n} instances was taken", decision=strange)


def _closes(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        _apply(law, backend, _lowest(backend.spec))
        for time in ("first", "second"):
            with law.watching(f"the {time} close"):
                backend.close()


def _closed(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        highest = Decision.highest(backend.spec)
        backend.close()
        with law.watching("apply after close"):
            try:
                backend.apply(highest)
            except BackendError:
                return
        law.require(False, "apply after close was taken")


def _gives_back(law: Law, subject: _Plant) -> None:
    if subject.given_back is None:
        return
    with subject.open(law) as backend:
        _apply(law, backend, _lowest(backend.spec))
        subject.wait(backend)
        backend.close()
        law.require(subject.given_back(), "after close the hardware is not as it was found")


def _reads_back(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        for decision in (_lowest(backend.spec), Decision.highest(backend.spec)):
            _apply(law, backend, decision)
            subject.wait(backend)
            got_mhz = _read(law, backend).state.freq_mhz
            law.require(
                np.all(got_mhz >= decision.freq_mhz - 1.0)
                and np.all(got_mhz <= decision.freq_max_mhz + 1.0),
                f"clocks are {got_mhz}, asked for were {decision.freq_mhz} to"
                f" {decision.freq_max_mhz}",
            )


def _counts(law: Law, subject: _Plant) -> None:
    with subject.open(law) as backend:
        _read(law, backend)
        subject.wait(backend)
        first = _read(law, backend)
        again = _read(law, backend)
        arrived_req = first.state.arrived_req.sum()
        law.require(arrived_req > 0, "nothing arrived while it waited: wait longer, or send more")
        law.require(
            again.state.arrived_req.sum() < arrived_req,
            f"{arrived_req:g} requests arrived, and on the next read, at once,"
            f" {again.state.arrived_req.sum():g} more",
        )
        twice = np.intersect1d(first.finished.request, again.finished.request)
        law.require(twice.size == 0, f"requests {twice} were told twice")


def _law(name: str, check: Callable[[Law, _Plant], None], says: str, mend: str) -> Law:
    return Law(about="backend", name=name, says=says, mend=mend, check=check)


_CLAIMABLE = ("clocks-read-back", "counts-since-read")

#: Every law of backends, in the order in which they are checked.
BACKEND_LAWS: tuple[Law, ...] = (
    _law(
        "port", _port,
        "It has spec (a FleetSpec), read, apply and close.",
        "add what is missing; see voltana_ctrl.ports.Backend",
    ),
    _law(
        "reads", _reads,
        "read returns an Observation with one entry per instance, finite and not negative.",
        "mark an instance that does not answer not alive, and keep its last reading",
    ),
    _law(
        "fresh", _fresh,
        "A reading of an instance that answers is not stale.",
        "read the instance in read(), or say it is not alive; age_s is now less the reading's time",
    ),
    _law(
        "time-forward", _in_time,
        "From read to read time does not go back.",
        "take t_s from a monotonic clock",
    ),
    _law(
        "energy-grows", _energy,
        "From read to read energy does not fall.",
        "sum up energy since the start; a counter that was reset goes on from where it was",
    ),
    _law(
        "apply-idempotent", _idempotent,
        "Applying the same decision twice is no error.",
        "set what the decision says, do not add to it",
    ),
    _law(
        "refuses-other-fleet", _refuses,
        "A decision for another fleet is refused with a ValueError.",
        "raise ShapeError where len(decision) != len(spec), before anything is set",
    ),
    _law(
        "closes-twice", _closes,
        "close may be called twice.",
        "remember that it is closed, and return",
    ),
    _law(
        "closed-refuses", _closed,
        "apply after close raises BackendError.",
        "remember that it is closed, and raise BackendError in apply",
    ),
    _law(
        "gives-back", _gives_back,
        "close leaves the hardware as it was found.",
        "keep what was set before the first apply, and set it again in close",
    ),
    _law(
        "clocks-read-back", _reads_back,
        "Once it has settled, a clock lies between floor and ceiling.",
        "read the clock after setting it; raise ActuationDenied where it cannot be set",
    ),
    _law(
        "counts-since-read", _counts,
        "Arrivals and finished requests are counted since the last read.",
        "return what is new since the last read, and start the counts anew",
    ),
)  # fmt: skip
