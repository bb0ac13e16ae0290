"""The public checks: what is shipped passes, what is broken is caught by the right law."""

import dataclasses
import itertools
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import (
    BackendError,
    ConfigError,
    Decision,
    FleetSpec,
    Guard,
    Observation,
    Slo,
    Status,
    load_profile,
    testing,
)
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control import RoleController, SaturationGate, StaticController
from voltana_ctrl.control.baselines.adaptive import AdaptiveController
from voltana_ctrl.control.cascade import CascadeController
from voltana_ctrl.routing import (
    fadr_router,
    least_queue_router,
    random_router,
    share_router,
    shortest_router,
    tile_aware_router,
)
from voltana_ctrl.routing.priced import PricedRouter
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.testing import (
    BACKEND_LAWS,
    CONTROLLER_LAWS,
    ROUTER_LAWS,
    LawBroken,
    check_backend,
    check_controller,
    check_router,
)

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11"))
SLO = Slo(ttft_s=0.6, itl_s=0.06)


# What is shipped


def test_shipped_controllers_keep_the_laws():
    claims = ["permutes", "queue-raises-clock"]
    check_controller(lambda fleet, slo: StaticController(fleet), claims=claims, examples=3)


def test_controllers_of_roles_and_of_work_that_may_wait_keep_the_laws():
    check_controller(RoleController, examples=3)
    check_controller(lambda fleet, slo: SaturationGate(fleet), examples=3)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AdaptiveController, CascadeController])
def test_shipped_learning_and_planning_controllers_keep_the_laws(make):
    check_controller(make, examples=4)


@pytest.mark.parametrize(
    ("make", "claims"),
    [
        (lambda fleet, slo: share_router(fleet, "decode"), ["honours-shares"]),
        (lambda fleet, slo: share_router(fleet, "prefill"), ["honours-shares"]),
        (lambda fleet, slo: random_router(fleet, "prefill"), []),
        (lambda fleet, slo: least_queue_router(fleet, "prefill"), []),
        (lambda fleet, slo: shortest_router(fleet, "decode"), []),
        (lambda fleet, slo: tile_aware_router(fleet, "decode"), []),
        (lambda fleet, slo: fadr_router(fleet, "decode", slo, ladder_mhz=None), []),
        (PricedRouter, []),
        (lambda fleet, slo: PricedRouter(fleet, slo, "prefill"), []),
    ],
    ids=[
        "share-decode",
        "share-prefill",
        "random",
        "least-queue",
        "jsq",
        "tile",
        "fadr",
        "priced-decode",
        "priced-prefill",
    ],
)
def test_shipped_routers_keep_the_laws(make, claims):
    check_router(make, claims=claims, examples=3)


def simulated(fleet=FLEET):
    workload = make_workload("fixed", rate_req_s=20.0, duration_s=30.0, seed=1)
    return SimBackend(fleet, workload=workload)


def half_a_second(backend):
    backend.clock.sleep_until_s(backend.clock.now_s() + 0.5)


def test_the_simulated_backend_keeps_the_laws():
    opened = []

    def make():
        opened.append(simulated())
        return opened[-1]

    check_backend(
        make,
        wait=half_a_second,
        given_back=lambda: bool((opened[-1].plant.instances["floor_mhz"] == 1410.0).all()),
        claims=["clocks-read-back", "counts-since-read"],
    )


# Broken controllers


class Good:
    """Half the ladder, equal shares; each class below breaks one thing."""

    period_s = 0.1

    def __init__(self, fleet, slo):
        self.fleet = fleet
        self.slo = slo

    def init(self):
        return 0

    def decide(self, observation, memory):
        return self.say(observation), memory + 1

    def say(self, observation, **other):
        highest = Decision.highest(self.fleet, t_s=observation.state.t_s)
        return dataclasses.replace(highest, **other)


class NoPair(Good):
    def decide(self, observation, memory):
        return self.say(observation)


class NanPrice(Good):
    def decide(self, observation, memory):
        return self.say(observation, price_j_req=np.full(len(self.fleet), np.nan)), memory


class FloorAboveCeiling(Good):
    def decide(self, observation, memory):
        return self.say(observation, freq_max_mhz=self.fleet.min_mhz), memory


class NoPeriod(Good):
    period_s = -1.0


class FourInstances(Good):
    def decide(self, observation, memory):
        return Decision.highest(SMALL, t_s=observation.state.t_s), memory


class NoStatus(Good):
    def decide(self, observation, memory):
        return self.say(observation, status="ok"), memory


class AlwaysNow(Good):
    def decide(self, observation, memory):
        return Decision.highest(self.fleet), memory


class Overclocks(Good):
    def decide(self, observation, memory):
        most_mhz = np.full(len(self.fleet), 9999.0)
        return self.say(observation, freq_mhz=most_mhz, freq_max_mhz=most_mhz), memory


class HalfTheShares(Good):
    def decide(self, observation, memory):
        decision = self.say(observation)
        return dataclasses.replace(decision, route_frac=0.5 * decision.route_frac), memory


class FeedsTheParked(Good):
    def decide(self, observation, memory):
        active = np.zeros(len(self.fleet), bool)
        active[self.fleet.prefill[0]] = active[self.fleet.decode[0]] = True
        return self.say(observation, active=active), memory


class DividesByLoad(Good):
    def decide(self, observation, memory):
        state = observation.state
        busy = int(state.queue_req.sum() + state.running_req.sum())
        if len(observation.finished) == 0 and busy == 0:
            1 // busy
        return self.say(observation), memory


class CountsOnTheLiving(Good):
    def decide(self, observation, memory):
        for members in (self.fleet.prefill, self.fleet.decode):
            np.argmin(observation.state.queue_tok[members][observation.state.alive[members]])
        return self.say(observation), memory


class TrustsNothingOld(Good):
    def decide(self, observation, memory):
        if (observation.state.age_s > 2.0).any():
            raise TimeoutError("stale")
        return self.say(observation), memory


class GivesUp(Good):
    def decide(self, observation, memory):
        if observation.state.queue_req.max() > 10_000:
            raise RuntimeError("no feasible plan")
        return self.say(observation), memory


class Mourns(Good):
    """Fails where an instance that was alive is dead on the next tick."""

    def init(self):
        return np.zeros(len(self.fleet), bool)

    def decide(self, observation, memory):
        if (memory & ~observation.state.alive).any():
            raise KeyError("where did it go")
        return self.say(observation), observation.state.alive


class Dices(Good):
    def decide(self, observation, memory):
        floor_mhz = self.fleet.min_mhz if random.random() < 0.5 else self.fleet.max_mhz
        return self.say(observation, freq_mhz=floor_mhz), memory


class CountsOnSelf(Good):
    def __init__(self, fleet, slo):
        super().__init__(fleet, slo)
        self.ticks = 0

    def decide(self, observation, memory):
        self.ticks += 1
        even = self.ticks % 2 == 0
        floor_mhz = self.fleet.min_mhz if even else self.fleet.max_mhz
        return self.say(observation, freq_mhz=floor_mhz), memory


class WritesInPlace(Good):
    def init(self):
        return {"ticks": 0}

    def decide(self, observation, memory):
        memory["ticks"] += 1
        return self.say(observation), memory


class NeverTheSame(Good):
    def __init__(self, fleet, slo):
        super().__init__(fleet, slo)
        self.numbers = itertools.count()

    def init(self):
        return next(self.numbers)


class OneForAll(Good):
    """Keeps the promises of the one made last."""

    newest = None

    def __init__(self, fleet, slo):
        super().__init__(fleet, slo)
        type(self).newest = slo

    def decide(self, observation, memory):
        floor_mhz = self.fleet.min_mhz if self.newest.itl_s > 0.1 else self.fleet.max_mhz
        return self.say(observation, freq_mhz=floor_mhz), memory


class KeepsALambda(Good):
    def init(self):
        return lambda: 0

    def decide(self, observation, memory):
        return self.say(observation), memory


class Tires(Good):
    def decide(self, observation, memory):
        if memory > 8:
            raise OverflowError("too many ticks")
        return self.say(observation), memory + 1


class PrefersTheFirst(Good):
    def decide(self, observation, memory):
        floor_mhz = self.fleet.max_mhz
        floor_mhz[0] = self.fleet.min_mhz[0]
        return self.say(observation, freq_mhz=floor_mhz), memory


class RestsWhenPressed(Good):
    def decide(self, observation, memory):
        pressed = observation.state.queue_req > 20
        floor_mhz = np.where(pressed, self.fleet.min_mhz, self.fleet.max_mhz)
        return self.say(observation, freq_mhz=floor_mhz), memory


BROKEN_CONTROLLERS = {
    NoPair: "decides",
    NanPrice: "decides",
    FloorAboveCeiling: "decides",
    NoPeriod: "period",
    FourInstances: "fits-fleet",
    NoStatus: "fits-fleet",
    AlwaysNow: "dated",
    Overclocks: "clocks-in-range",
    HalfTheShares: "shares-sum-to-one",
    FeedsTheParked: "parked-get-nothing",
    DividesByLoad: "survives-idle",
    CountsOnTheLiving: "survives-dead",
    TrustsNothingOld: "survives-stale",
    GivesUp: "survives-flood",
    Mourns: "survives-sequence",
    Dices: "pure",
    CountsOnSelf: "pure",
    WritesInPlace: "memory-untouched",
    NeverTheSame: "init-is-fresh",
    OneForAll: "no-shared-state",
    KeepsALambda: "memory-pickles",
    Tires: "closed-loop",
    PrefersTheFirst: "permutes",
    RestsWhenPressed: "queue-raises-clock",
}


def laws_before(laws, name):
    """Names up to and with that law; the ones after it need not be looked at."""
    names = [law.name for law in laws]
    return names[: names.index(name) + 1]


def hold(check, laws, make, law, **options):
    """Hold it against every law up to the one that it breaks."""
    skip = set(map(str, laws)) - set(laws_before(laws, law))
    claimable = {"permutes", "queue-raises-clock", "honours-shares"} & {law}
    claimable |= {"clocks-read-back", "counts-since-read"} & {law}
    check(make, claims=claimable, skip=skip, **options)


@pytest.mark.parametrize(
    ("make", "law"), BROKEN_CONTROLLERS.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_controller_is_caught_by_the_law_it_breaks(make, law):
    with pytest.raises(LawBroken) as caught:
        hold(check_controller, CONTROLLER_LAWS, make, law, fleets=[FLEET], examples=4)
    assert caught.value.law == law, str(caught.value)
    assert f"controller law {law!r} is broken" in str(caught.value)
    assert "Mend: " in str(caught.value)


SMALL = FleetSpec.parse("1P2D", load_profile("h100-sxm-80gb/llama-3.1-8b"))


def test_every_law_of_controllers_can_be_broken():
    assert set(BROKEN_CONTROLLERS.values()) == {law.name for law in CONTROLLER_LAWS}


# Broken routers


class GoodRouter:
    """Round robin over who can; each class below breaks one thing."""

    phase = "decode"

    def __init__(self, fleet, slo):
        self.fleet = fleet
        self.turn = 0
        self.active = np.ones(len(fleet), bool)
        self.members = list(fleet.decode)

    def update(self, decision):
        self.active = decision.active

    def able(self, request, state):
        full = state.kv_used_tok + request.prompt_tok > self.fleet.kv_capacity_tok
        for able in (state.alive & self.active & ~full, state.alive & ~full, state.alive):
            if able[self.members].any():
                return [i for i in self.members if able[i]]
        return self.members

    def route(self, request, state):
        self.turn += 1
        able = self.able(request, state)
        return able[self.turn % len(able)]


class WrongPhase(GoodRouter):
    def route(self, request, state):
        return 0


class ByName(GoodRouter):
    def route(self, request, state):
        return self.fleet.ids[super().route(request, state)]


class NeedsADecision(GoodRouter):
    def __init__(self, fleet, slo):
        super().__init__(fleet, slo)
        del self.active


class FeedsTheDead(GoodRouter):
    def able(self, request, state):
        return super().able(request, dataclasses.replace(state, alive=np.ones(len(state), bool)))


class WakesTheParked(GoodRouter):
    def update(self, decision):
        pass


class Overfills(GoodRouter):
    def able(self, request, state):
        empty = np.zeros(len(state))
        return super().able(request, dataclasses.replace(state, kv_used_tok=empty))


class NeedsTheLiving(GoodRouter):
    def able(self, request, state):
        able = [i for i in super().able(request, state) if state.alive[i]]
        return [min(able, key=lambda i: state.running_req[i])]


class Unseeded(GoodRouter):
    def route(self, request, state):
        return random.choice(self.able(request, state))


class StartsAnew(GoodRouter):
    """Every update adds a turn."""

    def update(self, decision):
        super().update(decision)
        self.turn += 1


class SharedTurn(GoodRouter):
    turns = itertools.count()

    def __init__(self, fleet, slo):
        super().__init__(fleet, slo)
        type(self).turns = itertools.count()

    def route(self, request, state):
        able = self.able(request, state)
        return able[next(self.turns) % len(able)]


class BreaksDown(GoodRouter):
    def route(self, request, state):
        if self.turn > 7:
            raise MemoryError("log is full")
        return super().route(request, state)


class EqualShares(GoodRouter):
    pass


BROKEN_ROUTERS = {
    WrongPhase: "picks-a-member",
    ByName: "picks-a-member",
    NeedsADecision: "picks-a-member",
    FeedsTheDead: "passes-over-dead",
    WakesTheParked: "passes-over-parked",
    Overfills: "passes-over-full",
    NeedsTheLiving: "nobody-left",
    Unseeded: "deterministic",
    StartsAnew: "update-idempotent",
    SharedTurn: "no-shared-state",
    BreaksDown: "closed-loop",
    EqualShares: "honours-shares",
}


@pytest.mark.parametrize(
    ("make", "law"), BROKEN_ROUTERS.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_router_is_caught_by_the_law_it_breaks(make, law):
    with pytest.raises(LawBroken) as caught:
        hold(check_router, ROUTER_LAWS, make, law, fleets=[FLEET], examples=6)
    assert caught.value.law == law, str(caught.value)
    assert f"router law {law!r} is broken" in str(caught.value)


def test_every_law_of_routers_can_be_broken():
    assert set(BROKEN_ROUTERS.values()) == {law.name for law in ROUTER_LAWS}


# Broken backends


class Wrapped:
    """The simulated backend; each class below breaks one thing."""

    def __init__(self):
        self.inner = simulated()
        self.clock = self.inner.clock
        self.spec = self.inner.spec
        self.reads = 0

    def read(self):
        self.reads += 1
        seen = self.inner.read()
        return dataclasses.replace(seen, state=self.seen(seen.state))

    def seen(self, state):
        return state

    def apply(self, decision):
        self.inner.apply(decision)

    def close(self):
        self.inner.close()


class NoSpec(Wrapped):
    def __init__(self):
        super().__init__()
        self.spec = None


class HalfAReading(Wrapped):
    def read(self):
        state = super().read().state
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        short = {name: v if np.ndim(v) == 0 else v[:2] for name, v in fields.items()}
        return Observation(state=type(state)(**short))


class InfinitePower(Wrapped):
    def seen(self, state):
        return dataclasses.replace(state, power_w=np.full(len(state), np.inf))


class LooksAway(Wrapped):
    def seen(self, state):
        return dataclasses.replace(state, age_s=np.full(len(state), 60.0))


class ClockGoesBack(Wrapped):
    def seen(self, state):
        return dataclasses.replace(state, t_s=100.0 - self.reads)


class CounterWraps(Wrapped):
    def seen(self, state):
        return dataclasses.replace(state, energy_j=state.energy_j % 97.0)


class TwiceIsTooMuch(Wrapped):
    last = None

    def apply(self, decision):
        if decision is self.last:
            raise BackendError("set already")
        self.last = decision
        super().apply(decision)


class TakesAnything(Wrapped):
    def apply(self, decision):
        if len(decision) == len(self.spec):
            super().apply(decision)


class ClosesOnce(Wrapped):
    closed = 0

    def close(self):
        self.closed += 1
        if self.closed == 2:
            raise BackendError("closed already")
        super().close()


class NeverCloses(Wrapped):
    def close(self):
        pass


class KeepsTheClocks(Wrapped):
    closed = False

    def apply(self, decision):
        if self.closed:
            raise BackendError("closed")
        super().apply(decision)

    def close(self):
        self.closed = True


class SaysButDoesNot(Wrapped):
    def apply(self, decision):
        if len(decision) != len(self.spec):
            super().apply(decision)
        if self.inner._closed:
            raise BackendError("closed")


class CountsEver(Wrapped):
    total = 0.0

    def seen(self, state):
        self.total = self.total + state.arrived_req
        return dataclasses.replace(state, arrived_req=self.total)


BROKEN_BACKENDS = {
    NoSpec: "port",
    HalfAReading: "reads",
    InfinitePower: "reads",
    LooksAway: "fresh",
    ClockGoesBack: "time-forward",
    CounterWraps: "energy-grows",
    TwiceIsTooMuch: "apply-idempotent",
    TakesAnything: "refuses-other-fleet",
    ClosesOnce: "closes-twice",
    NeverCloses: "closed-refuses",
    KeepsTheClocks: "gives-back",
    SaysButDoesNot: "clocks-read-back",
    CountsEver: "counts-since-read",
}


@pytest.mark.parametrize(
    ("kind", "law"), BROKEN_BACKENDS.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_backend_is_caught_by_the_law_it_breaks(kind, law):
    opened = []

    def make():
        opened.append(kind())
        return opened[-1]

    def given_back():
        return bool((opened[-1].inner.plant.instances["floor_mhz"] == 1410.0).all())

    with pytest.raises(LawBroken) as caught:
        hold(check_backend, BACKEND_LAWS, make, law, wait=half_a_second, given_back=given_back)
    assert caught.value.law == law, str(caught.value)
    assert f"backend law {law!r} is broken" in str(caught.value)


def test_every_law_of_backends_can_be_broken():
    assert set(BROKEN_BACKENDS.values()) == {law.name for law in BACKEND_LAWS}


# The checks themselves


def test_what_the_broken_ones_are_made_from_is_good():
    check_controller(Good, fleets=[SMALL, FLEET], examples=4)
    check_router(GoodRouter, fleets=[SMALL, FLEET], examples=4)
    check_backend(Wrapped, wait=half_a_second, claims=["clocks-read-back", "counts-since-read"])


def test_a_policy_may_refuse_a_fleet_but_not_every_one():
    class Only(Good):
        def __init__(self, fleet, slo):
            super().__init__(fleet, slo)
            if fleet.colocated:
                raise ConfigError("Only.fleet: expected prefill and decode apart")

    colocated = FleetSpec.parse("2C", load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11"))
    check_controller(Only, fleets=[colocated, FLEET], examples=1)
    with pytest.raises(LawBroken, match="every fleet was refused; the last refusal: Only"):
        check_controller(Only, fleets=[colocated], examples=1)


def test_a_policy_that_cannot_be_made_is_caught():
    with pytest.raises(LawBroken, match=r"'made' is broken: make\(fleet, slo\) raised TypeError"):
        check_controller(lambda fleet: Good(fleet, SLO))


@pytest.mark.parametrize("option", ["skip", "claims"])
def test_a_law_that_does_not_exist_is_refused(option):
    with pytest.raises(ConfigError, match=f"{option}: expected some of .*got 'puer'"):
        check_controller(Good, **{option: ["puer"]})


def test_the_message_names_the_input_and_the_exception_stays_the_cause():
    with pytest.raises(LawBroken) as caught:
        check_controller(DividesByLoad, fleets=[FLEET], examples=5)
    assert "raised ZeroDivisionError" in str(caught.value)
    assert "Input: observation=FleetState(" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.law, str(again)) == (caught.value.law, str(caught.value))


def test_laws_have_names_of_their_own_and_say_what_to_mend():
    for laws in (CONTROLLER_LAWS, ROUTER_LAWS, BACKEND_LAWS):
        names = [law.name for law in laws]
        assert len(set(names)) == len(names)
        for law in laws:
            assert law.says.endswith(".")
            assert law.mend
            assert not law.mend.endswith(".")


def test_names_are_loaded_when_used():
    assert "check_controller" in testing.__all__
    with pytest.raises(AttributeError, match="has no attribute 'check_contoller'"):
        _ = testing.check_contoller


def test_without_hypothesis_the_extra_is_named():
    program = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from voltana_ctrl import ConfigError, testing\n"
        "testing.check_backend, testing.LawBroken, testing.example_fleets\n"
        "for name in ('check_controller', 'check_router', 'fleets'):\n"
        "    try: getattr(testing, name)\n"
        "    except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("pip install 'voltana-ctrl[test]'" in line for line in lines)


# What the strategies draw


@given(st.data())
def test_drawn_values_fit_together(data):
    fleet = data.draw(testing.fleets(max_prefill=2, max_decode=2))
    observation = data.draw(testing.observations(fleet))
    decision = data.draw(testing.decisions(fleet))
    assert len(observation.state) == len(decision) == len(fleet)
    for one in observation.iterations.instance:
        assert 0 <= one < len(fleet)
    assert np.isin(observation.finished.decode_instance, fleet.decode).all()
    applied = Guard(fleet).shield(decision, Observation(state=observation.state), None)
    if (
        observation.state.alive.all()
        and (observation.state.age_s < 2.0).all()
        and (observation.state.kv_used_tok < 0.9 * fleet.kv_capacity_tok).all()
    ):
        for name in ("freq_mhz", "freq_max_mhz", "active"):
            assert np.array_equal(getattr(applied, name), getattr(decision, name))
        assert np.allclose(applied.route_frac, decision.route_frac)


@given(st.data())
def test_the_guard_makes_any_proposal_safe_on_any_fleet(data):
    fleet = data.draw(testing.fleets(max_prefill=2, max_decode=3))
    observation = data.draw(testing.observations(fleet))
    proposed = data.draw(testing.decisions(fleet, raw=True, statuses=tuple(Status)))
    guard = Guard(fleet)
    applied = guard.shield(proposed, observation, None)
    for i, one in enumerate(fleet.instances):
        assert applied.freq_mhz[i] in one.clocks_mhz
        assert applied.freq_max_mhz[i] in one.clocks_mhz
    assert (applied.freq_mhz <= applied.freq_max_mhz).all()
    for members in (fleet.prefill, fleet.decode):
        assert applied.route_frac[members].sum() == pytest.approx(1.0)
    again = guard.shield(applied, observation, None)
    assert np.allclose(again.route_frac, applied.route_frac)
    assert np.array_equal(again.freq_mhz, applied.freq_mhz)


@given(st.data())
def test_drawn_workloads_run_and_every_request_ends_once(data):
    fleet = data.draw(testing.fleets(max_prefill=2, max_decode=2))
    workload = data.draw(testing.workloads(max_requests=10))
    backend = SimBackend(fleet, workload=workload)
    backend.clock.sleep_until_s(600.0)
    finished = backend.read().finished.request
    assert sorted(finished) == list(range(len(workload)))
