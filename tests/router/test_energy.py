"""What a request cost, where it is told, and what the router knows of the fleet."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.mock_engine import MockEngine, fleet_of
from tests.router.test_app import BODY, CHAT, JSQ, STREAM, router
from voltana_ctrl import Decision, FleetState, Request, Slo
from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.laws.iteration import at_clock, decode_j, prefill_j
from voltana_ctrl.router.body import usage_of
from voltana_ctrl.router.energy import EnergyBook
from voltana_ctrl.router.ledger import Flight, InFlight
from voltana_ctrl.router.policy import PolicyRouters
from voltana_ctrl.types import IterationBatch, Observation, TickRecord

USAGE = {**STREAM, "stream_options": {"include_usage": True}}
ASK = {"x-voltana-energy": "usage"}


def last_usage(content):
    events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
    return json.loads(events[-1])["usage"]


# Where it is told


@pytest.mark.parametrize("shape", ["1C", "1P1D"])
def test_energy_is_in_a_header_of_an_answer_that_does_not_stream(shape):
    with router(shape) as (client, _, proxy):
        got = client.post("/v1/completions", json=BODY, headers={"x-request-id": "r1"})
        told = dict(part.split("=") for part in got.headers["x-voltana-energy"].split(", "))
        assert told.pop("source") == "modelled"
        parts = {key: float(value) for key, value in told.items()}
        assert set(parts) == {"prefill", "decode", "idle"}
        assert parts["prefill"] > 0.0
        assert parts["decode"] > 0.0
        page = client.get(f"/v1/energy/{got.headers['x-request-id']}").json()
        assert page["id"] == got.headers["x-request-id"]
        assert (page["prompt_tok"], page["output_tok"], page["source"]) == (7, 4, "modelled")
        assert page["prefill_j"] == pytest.approx(parts["prefill"], abs=1e-4)
        assert page["total_j"] == pytest.approx(sum(parts.values()), abs=3e-4)
        assert page["decode_instance"] == proxy.fleet.ids[-1]
        metrics = client.get("/metrics").text
        total = re.search(r'energy_joules_total{part="decode"} (\S+)', metrics)[1]
        assert float(total) == pytest.approx(page["decode_j"])


@pytest.mark.parametrize("shape", ["1C", "1P1D"])
def test_a_stream_is_the_engines_own_unless_energy_is_asked_for(shape):
    with router(shape) as (client, _, _):
        plain = client.post("/v1/completions", json=USAGE)
        asked = client.post("/v1/completions", json=USAGE, headers=ASK)
        assert "energy" not in plain.text
        usage = last_usage(asked.content)
        energy = usage.pop("energy")
        assert usage == last_usage(plain.content)
        assert energy["source"] == "modelled"
        parts = energy["prefill_j"] + energy["decode_j"] + energy["idle_j"]
        assert energy["total_j"] == pytest.approx(parts, abs=2e-4)
        # Nothing but the usage event differs, and the id.
        own = plain.headers["x-request-id"], asked.headers["x-request-id"]
        lines = zip(
            plain.text.replace(own[0], "").splitlines(),
            asked.text.replace(own[1], "").splitlines(),
            strict=True,
        )
        assert sum(a != b for a, b in lines) == 1
        # Without usage in the stream there is nothing to add to; the page has it.
        bare = client.post("/v1/completions", json=STREAM, headers=ASK)
        assert "usage" not in bare.text
        assert client.get(f"/v1/energy/{bare.headers['x-request-id']}").json()["output_tok"] == 4


@pytest.mark.parametrize("shape", ["1C", "1P1D"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_kv_cache_that_was_handed_over_was_not_found_in_a_cache(shape, stream):
    engines = [MockEngine(name) for name in fleet_of(shape).ids]
    body = USAGE if stream else BODY
    with router(shape, engines=engines) as (client, _, _):

        def prefill_j(name):
            got = client.post("/v1/completions", json=body, headers={"x-request-id": name})
            ours = got.headers["x-request-id"]
            return client.get(f"/v1/energy/{ours}").json()["prefill_j"]

        cold_j = prefill_j("cold")
        # vLLM's decode engine counts what came over the network as cached.
        engines[-1].cached_tok = 7
        assert (prefill_j("decode") < cold_j) is (shape == "1C")
        engines[0].cached_tok = 7
        assert prefill_j("prefill") < cold_j


def test_what_is_not_known_is_404_and_memory_is_bounded():
    book = EnergyBook(fleet_of("1P1D"), keep_req=10)
    for k in range(25):
        book.charge(Flight(id=f"r{k}", prompt_tok=10, begin_s=0.0, prefill=0, decode=1))
    assert [book.find(f"r{k}") is not None for k in range(25)] == [False] * 15 + [True] * 10
    with router("1C") as (client, _, _):
        assert client.get("/v1/energy/nothing").status_code == 404
    with pytest.raises(ConfigError, match="keep_req"):
        EnergyBook(fleet_of("1P1D"), keep_req=0)


def test_ids_are_our_own_and_the_clients_are_kept_beside():
    with router("1C") as (client, engines, _):
        first, again = (
            client.post("/v1/completions", json=BODY, headers={"x-request-id": "r1"})
            for _ in range(2)
        )
        assert first.headers["x-request-id"] != again.headers["x-request-id"]
        assert first.headers["x-client-request-id"] == again.headers["x-client-request-id"] == "r1"
        for got, (_, headers, _) in zip((first, again), engines[0].seen, strict=True):
            ours = got.headers["x-request-id"]
            assert re.fullmatch("[0-9a-f]{32}", ours)
            assert headers["x-request-id"] == ours
            assert headers["x-client-request-id"] == "r1"
            assert client.get(f"/v1/energy/{ours}").json()["id"] == ours
        assert client.get("/v1/energy/r1").status_code == 404
        for bad in ("a b", 'x"} 1', "../../x", "y" * 129):
            got = client.post("/v1/completions", json=BODY, headers={"x-request-id": bad})
            assert "x-client-request-id" not in got.headers
            assert "x-client-request-id" not in engines[0].seen[-1][1]


def test_a_request_that_failed_costs_nothing_that_is_told():
    with router("1C") as (client, engines, proxy):
        engines[0].fail = [400]
        got = client.post("/v1/completions", json=BODY, headers={"x-request-id": "r1"})
        assert "x-voltana-energy" not in got.headers
        assert proxy.energy.find("r1") is None


# What it is


def test_modelled_energy_is_that_of_the_profile():
    fleet = fleet_of("1P1D")
    row = at_clock(fleet.instances[0].profile, 1410.0)
    flight = Flight(
        id="a", prompt_tok=900, begin_s=0.0, prefill=0, decode=1, output_tok=101,
        batch_req=16.0, kv_tok=20_000.0, idle_j=2.0,
    )  # fmt: skip
    energy = EnergyBook(fleet).charge(flight)
    padded = fleet.instances[1].profile.padded_batch(64)[16]
    assert energy.prefill_j == pytest.approx(float(prefill_j(row, 900)))
    assert energy.decode_j == pytest.approx(float(decode_j(row, 16, 20_000, padded)) / 16 * 100)
    assert energy.idle_j == 2.0
    cached = EnergyBook(fleet).charge(flight, cached_tok=800)
    assert 0.0 < cached.prefill_j < 0.3 * energy.prefill_j


class Slow:
    """Telemetry of a fleet at its lowest clock."""

    def __init__(self, fleet, **fields):
        idle = FleetState.idle(len(fleet), freq_mhz=float(fleet.min_mhz[0]))
        told = {name: getattr(idle, name) for name in FleetState.__slots__}
        self.state = FleetState(**{**told, **fields})


def test_modelled_energy_follows_the_clocks_that_telemetry_tells():
    fleet = fleet_of("1P1D")
    flight = Flight(id="a", prompt_tok=900, begin_s=0.0, prefill=0, decode=1, output_tok=1)
    slow = EnergyBook(fleet, Slow(fleet)).charge(flight)
    row = at_clock(fleet.instances[0].profile, fleet.min_mhz[0])
    assert slow.prefill_j == pytest.approx(float(prefill_j(row, 900)))


def tick(now_s, **columns):
    iterations = IterationBatch.empty()
    if columns:
        iterations = IterationBatch(**{k: np.array(v) for k, v in columns.items()})
    state = FleetState.idle(2, t_s=now_s)
    decision = Decision.highest(fleet_of("1P1D"))
    return TickRecord(
        number=0,
        observation=Observation(state=state, iterations=iterations),
        proposed=decision,
        applied=decision,
    )


def test_measured_iterations_replace_the_model_and_no_energy_is_lost():
    book = EnergyBook(fleet_of("1P1D"))
    # Two requests of 100 tokens were prefilled together and decoded ten steps together.
    steps = {
        "instance": [0] + [1] * 10, "t_s": [0.1, *np.linspace(0.2, 1.1, 10)],
        "wall_s": [0.1] * 11, "freq_mhz": [1410.0] * 11, "batch_req": [0] + [2] * 10,
        "prefill_tok": [200] + [0] * 10, "kv_tok": [0.0] + [200.0] * 10,
        "energy_j": [50.0] + [30.0] * 10,
    }  # fmt: skip
    book.on_tick(tick(1.2, **steps))
    for name in "ab":
        flight = Flight(
            id=name, prompt_tok=100, begin_s=0.0, prefill=0, decode=1, output_tok=11,
            first_s=0.1, last_s=1.1,
        )  # fmt: skip
        first = book.charge(flight)
        assert first.source == "measured"
    book.on_tick(tick(1.2))
    total_j = 0.0
    for name in "ab":
        energy = book.find(name)
        assert energy.source == "measured"
        total_j += energy.prefill_j + energy.decode_j
    assert total_j == pytest.approx(50.0 + 300.0)


def test_iterations_without_energy_leave_the_model():
    book = EnergyBook(fleet_of("1P1D"))
    book.on_tick(tick(1.0))
    flight = Flight(id="a", prompt_tok=9, begin_s=0.0, prefill=0, decode=1, output_tok=5)
    assert book.charge(flight).source == "modelled"


class Time:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_idle_power_is_shared_by_who_is_there():
    fleet, time = fleet_of("1P2D"), Time()
    counts = InFlight(fleet, clock=time)
    idle_w = fleet.instances[0].idle_w
    time.now_s = 100.0  # nobody is there: nobody's
    a = counts.begin("a", prompt_tok=10)
    counts.enter_prefill(a, 0)
    time.now_s += 1.0  # two instances rest, a bears it alone
    b = counts.begin("b", prompt_tok=10)
    counts.leave_prefill(a)
    counts.enter_decode(a, 1)
    counts.enter_prefill(b, 0)
    time.now_s += 1.0  # one rests, shared by two
    counts.end(a)
    counts.end(b)
    assert a.idle_j == pytest.approx(2.5 * idle_w)
    assert b.idle_j == pytest.approx(0.5 * idle_w)


def test_the_batch_of_a_request_is_its_mean_over_time():
    time = Time()
    counts = InFlight(fleet_of("1P1D"), clock=time)
    a, b = counts.begin("a", prompt_tok=100), counts.begin("b", prompt_tok=300)
    counts.enter_decode(a, 1)
    time.now_s = 1.0
    counts.enter_decode(b, 1)
    time.now_s = 2.0
    counts.end(b)
    counts.end(a)
    assert (a.batch_req, b.batch_req) == (1.5, 2.0)
    assert (a.kv_tok, b.kv_tok) == (250.0, 400.0)


# What is known of the fleet


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=60))
def test_counts_come_back_to_nothing(steps):
    fleet, time = fleet_of("2P2D"), Time()
    counts = InFlight(fleet, clock=time)
    flights = []
    for what, which in steps:
        time.now_s += 0.1
        if what == 0:
            flight = counts.begin(f"r{len(flights)}", prompt_tok=10 * which)
            counts.enter_prefill(flight, which % 2)
            flights.append(flight)
        elif flights:
            flight = flights[which % len(flights)]
            if what == 1 and flight.decode < 0:
                counts.leave_prefill(flight)
                counts.enter_decode(flight, 2 + which % 2)
            elif what == 2:
                counts.token(flight, which)
            elif what == 3:
                counts.retract(flight)
                counts.enter_prefill(flight, which % 2)
        state = counts.state()
        assert (state.queue_req >= 0).all()
        assert state.queue_req.sum() + state.running_req.sum() <= 2 * len(flights)
        assert counts.total_req == len(flights)
    for flight in flights:
        flight.prompt_tok += 5  # the engine counted differently
        counts.end(flight)
    state = counts.state()
    for name in ("queue_req", "queue_tok", "running_req", "kv_used_tok", "oldest_wait_s"):
        assert not getattr(state, name).any()
    assert counts._resting_w == pytest.approx(sum(one.idle_w for one in fleet.instances))


def test_telemetry_adds_what_others_send_and_old_telemetry_nothing():
    fleet = fleet_of("1P1D")
    source = Slow(fleet, running_req=[0, 7], queue_req=[1, 0], alive=[True, False])
    counts = InFlight(fleet, source)
    flight = counts.begin("a", prompt_tok=5)
    counts.enter_decode(flight, 1)
    state = counts.state()
    assert state.running_req.tolist() == [0, 7]
    assert state.alive.tolist() == [True, False]
    counts.source = Slow(fleet, running_req=[0, 7], age_s=[60.0, 60.0], alive=[True, False])
    state = counts.state()
    assert state.running_req.tolist() == [0, 1]
    assert state.alive.all()


def test_a_source_that_has_stopped_grows_old():
    fleet, time = fleet_of("1P1D"), Time()
    counts = InFlight(fleet, Slow(fleet, running_req=[0, 7]), clock=time)
    assert counts.state().running_req.tolist() == [0, 7]
    time.now_s = 1.5
    assert counts.state().age_s.tolist() == [1.5, 1.5]
    assert counts.state().running_req.tolist() == [0, 7]
    time.now_s = 3.0
    assert counts.state().running_req.tolist() == [0, 0]


@pytest.mark.parametrize("shape", ["1P1D", "1C"])
def test_telemetry_is_told_what_was_sent_and_what_ended_well(shape):
    n = len(fleet_of(shape))
    traffic = Traffic(n)
    with router(shape, traffic=traffic) as (client, engines, _):
        for _ in range(2):
            client.post("/v1/completions", json=STREAM)
        client.post("/v1/completions", json=BODY)
        engines[-1].fail = ["die after two tokens"]
        client.post("/v1/completions", json=STREAM)
        arrived_req, arrived_tok, finished = traffic.read()
    assert arrived_req.tolist() == [4.0] * n
    assert arrived_tok.tolist() == [12.0] * n
    assert finished.request.tolist() == [1, 2, 3]
    assert finished.output_tok.tolist() == [4, 4, 4]
    assert finished.decode_instance.tolist() == [n - 1] * 3
    assert (finished.ttft_s > 0).all()


def test_who_fails_rests_longer_each_time_and_is_trusted_after_a_success():
    time = Time()
    counts = InFlight(fleet_of("1P1D"), clock=time)
    rests = []
    for _ in range(6):
        counts.failed(1)
        begin_s = time.now_s
        while counts.is_down(1):
            time.now_s += 0.25
        rests.append(time.now_s - begin_s)
    assert rests == [1, 2, 4, 8, 15, 15]
    counts.succeeded(1)
    counts.failed(1)
    time.now_s += 1.0
    assert not counts.is_down(1)


# Policies


@pytest.mark.parametrize(
    "policy", ["static-max", "voltanallm", "cascade", "pack", JSQ, "static-max+fadr"]
)
@pytest.mark.parametrize("shape", ["2P2D", "3C"])
def test_any_policy_routes_within_its_phase(policy, shape):
    fleet = fleet_of(shape)
    if fleet.colocated and "/" in policy:
        policy = "static-max+jsq"
    routers = PolicyRouters(fleet, policy, Slo(ttft_s=0.6, itl_s=0.06))
    state = FleetState.idle(len(fleet))
    for _ in range(5):
        assert routers.prefill(Request(prompt_tok=99), state) in fleet.prefill
        assert routers.route(Request(prompt_tok=99), state) in fleet.decode


@pytest.mark.parametrize("policy", ["static-max", "cascade", JSQ, f"{__name__}:Stubborn"])
def test_who_was_tried_or_is_dead_is_passed_over_as_long_as_another_is_left(policy):
    fleet = fleet_of("1P3D")
    routers = PolicyRouters(fleet, policy)
    request, state = Request(prompt_tok=9), FleetState.idle(4)
    assert routers.route(request, state, tried={1, 3}) == 2
    assert routers.route(request, state, tried={1, 2, 3}) in (1, 2, 3)
    dead = Slow(fleet, alive=[True, False, False, True]).state
    assert routers.route(request, dead) == 3
    assert routers.route(request, dead, tried={3}) in (1, 2)


class Stubborn:
    """A router that looks at nothing."""

    def __init__(self, fleet, slo):
        self.picks = 1

    def route(self, request, state):
        return self.picks

    def update(self, decision):
        pass


def test_a_router_that_leaves_its_phase_is_told():
    fleet = fleet_of("1P3D")
    routers = PolicyRouters(fleet, f"{__name__}:Stubborn")
    routers._routers["decode"].picks = 0
    with pytest.raises(ConfigError, match="expected one of the instances"):
        routers.route(Request(prompt_tok=9), FleetState.idle(4))


def test_decisions_of_a_loop_reach_the_routing():
    with router("1P2D", policy="static-max") as (client, engines, proxy):
        decision = Decision.highest(proxy.fleet)
        proxy.routers.update(
            Decision(
                t_s=0.0,
                freq_mhz=decision.freq_mhz,
                freq_max_mhz=decision.freq_max_mhz,
                route_frac=[1.0, 0.0, 1.0],
                active=[True, False, True],
                price_j_req=decision.price_j_req,
            )
        )
        for _ in range(4):
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert [len(engine.seen) for engine in engines] == [4, 0, 4]


def test_telemetry_reaches_the_routing():
    with router("2C") as (client, engines, proxy):
        proxy.watch(Slow(proxy.fleet, running_req=[50, 0]))
        for _ in range(3):
            client.post("/v1/completions", json=BODY)
        assert [len(engine.seen) for engine in engines] == [0, 3]


# Small things


@pytest.mark.parametrize("content", [b"", b"{", b'{"usage": 1}', b'"usage"', b'[{"usage": {}}]'])
def test_usage_that_is_none(content):
    assert usage_of(content) == {}
