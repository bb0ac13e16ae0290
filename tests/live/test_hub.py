"""One controller, many nodes: messages that nobody can break, and nodes that survive it."""

import json
import socket
import threading
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler, seconds_until
from tests.live.test_agent import meters, setting

pytest.importorskip("starlette", reason="needs the server extra")
pytest.importorskip("uvicorn", reason="needs the server extra")

from voltana_ctrl import BackendError, ConfigError, ControlLoop, Decision, FleetState, Observation
from voltana_ctrl.control import StaticController
from voltana_ctrl.live.agent import Agent, AgentSettings
from voltana_ctrl.live.hub import HubBackend, HubServer, hub_app
from voltana_ctrl.live.link import ControllerLink, RemoteController
from voltana_ctrl.live.node import NodeBackend
from voltana_ctrl.live.orders import (
    MAX_BYTES,
    MessageRefused,
    NodeOrder,
    NodeReport,
    decode_order,
    decode_report,
    encode_order,
    encode_report,
)
from voltana_ctrl.types import IterationBatch, RequestBatch

TOKEN = "0123456789abcdef-token"


def report(ids=("decode-0",), node="n0", number=0, **state):
    made = replace(FleetState.idle(len(ids), freq_mhz=1410.0), **state)
    return NodeReport(node=node, number=number, ids=ids, observation=Observation(state=made))


def order(**changes):
    made = NodeOrder(
        number=0, valid_s=1.0, freq_mhz={"decode-0": 705.0}, freq_max_mhz={"decode-0": 1410.0}
    )
    return replace(made, **changes)


# Messages

finite = st.floats(0.0, 1e12)


@given(
    numbers=st.lists(finite, min_size=13, max_size=13),
    rows=st.lists(st.tuples(st.integers(0, 1), finite, finite), max_size=5),
    node=st.text(min_size=1, max_size=20),
)
def test_what_is_encoded_comes_back(numbers, rows, node):
    names = [name for name in FleetState.__slots__ if name not in ("t_s", "alive")]
    columns = {name: [value] for name, value in zip(names, numbers, strict=False)}
    state = FleetState(t_s=numbers[-1], alive=[True], **columns)
    instance = [row[0] for row in rows]
    wall_s, energy_j = ([row[k] for row in rows] for k in (1, 2))
    none = np.zeros(len(rows))
    iterations = IterationBatch(
        instance=instance, t_s=none, wall_s=wall_s, freq_mhz=none, batch_req=none,
        prefill_tok=none, kv_tok=none, energy_j=energy_j,
    )  # fmt: skip
    sent = NodeReport(
        node=node, number=7, ids=("decode-0",),
        observation=Observation(state=state, iterations=iterations),
    )  # fmt: skip
    got = decode_report(encode_report(sent, fleet()), fleet())
    assert (got.node, got.number, got.ids) == (node, 7, ("decode-0",))
    for part in ("state", "iterations", "finished"):
        one, other = getattr(sent.observation, part), getattr(got.observation, part)
        for name in one.__slots__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
    | st.sampled_from([10**400, -(10**400), 10**4000, 1e300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=20,
)  # fmt: skip
GOOD = {
    "report": json.loads(encode_report(report(), fleet())),
    "order": json.loads(encode_order(order(), fleet())),
}


def paths(value, before=()):
    yield before
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from paths(inside, (*before, key))
    elif isinstance(value, list):
        for k, inside in enumerate(value):
            yield from paths(inside, (*before, k))


def changed(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


@given(data=st.data(), kind=st.sampled_from(["report", "order"]))
def test_a_message_with_anything_in_any_place_is_taken_or_refused(data, kind):
    path = data.draw(st.sampled_from(list(paths(GOOD[kind]))))
    value = changed(GOOD[kind], path, data.draw(json_values))
    decode = decode_report if kind == "report" else decode_order
    try:
        got = decode(json.dumps(value).encode(), fleet())
    except MessageRefused:
        return
    # What is taken is safe to act on, and goes through the controller's plant.
    if kind == "order":
        assert all(
            0.0 < got.freq_mhz[name] <= got.freq_max_mhz[name] < np.inf for name in got.freq_mhz
        )
        return
    hub = HubBackend(fleet())
    hub.apply(Decision.highest(fleet()))
    hub.take(got)
    hub.read()


@given(st.binary(max_size=200))
def test_bytes_are_refused(data):
    for decode in (decode_report, decode_order):
        with pytest.raises(MessageRefused):
            decode(data, fleet())


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b" " * (MAX_BYTES + 1),
        b'{"schema": NaN}',
        json.dumps({**GOOD["report"], "number": 10**400}).encode(),
        json.dumps({**GOOD["report"], "more": 1}).encode(),
        json.dumps({**GOOD["report"], "fleet": "another"}).encode(),
        json.dumps({**GOOD["report"], "schema": "voltana-ctrl/node-report/2"}).encode(),
        json.dumps({**GOOD["report"], "ids": ["decode-0", "decode-0"]}).encode(),
        json.dumps({**GOOD["report"], "ids": [["decode-0"]]}).encode(),
    ],
    ids=range(10),
)
def test_hostile_messages_are_refused(data):
    for decode in (decode_report, decode_order):
        with pytest.raises(MessageRefused):
            decode(data, fleet())


def test_messages_are_small():
    assert len(encode_report(report(), fleet())) < 1500
    assert len(encode_order(order(), fleet())) < 300
    full = np.zeros(100_000)
    batch = RequestBatch(
        request=full, request_class=full, prompt_tok=full, output_tok=full, ttft_s=full,
        itl_s=full, prefill_instance=full, decode_instance=full,
    )  # fmt: skip
    crowded = replace(report(), observation=replace(report().observation, finished=batch))
    with pytest.raises(MessageRefused, match="bytes"):
        encode_report(crowded, fleet())


# The controller's plant


def test_parts_become_the_fleet_and_records_are_told_once():
    clock = [10.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    hub.apply(Decision.highest(fleet()))
    done = RequestBatch.empty()
    for k in range(2):
        told = report(arrived_req=np.array([3.0]), energy_j=np.array([50.0]), age_s=np.array([0.2]))
        told = replace(told, number=k, observation=replace(told.observation, finished=done))
        hub.take(told)
    clock[0] = 10.5
    state = hub.read().state
    assert state.alive.tolist() == [False, True]
    assert state.energy_j.tolist() == [0.0, 50.0]
    assert state.arrived_req.tolist() == [0.0, 6.0]
    assert state.age_s[1] == pytest.approx(0.7)
    assert hub.read().state.arrived_req.tolist() == [0.0, 0.0]
    clock[0] = 13.0
    assert not hub.read().state.alive.any()


def test_orders_end_with_the_loop_that_gives_them():
    clock = [0.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    with pytest.raises(BackendError, match="decided nothing"):
        hub.take(report())
    hub.apply(Decision.highest(fleet(), floor_mhz=np.array([705.0, 900.0])))
    clock[0] = 0.4
    got = hub.take(report())
    assert got.freq_mhz == {"decode-0": 900.0}
    assert got.valid_s == pytest.approx(0.6)
    clock[0] = 1.1  # the loop hangs
    with pytest.raises(BackendError, match="any more"):
        hub.take(report())
    hub.apply(Decision.highest(fleet()))
    hub.release()
    with pytest.raises(BackendError):
        hub.take(report())
    hub.close()
    with pytest.raises(BackendError, match="closed"):
        hub.apply(Decision.highest(fleet()))


def test_two_nodes_cannot_report_the_same_instance():
    clock = [0.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    hub.apply(Decision.highest(fleet()))
    hub.take(report(node="n0"))
    with pytest.raises(MessageRefused, match="node n0 reports it"):
        hub.take(report(node="n1"))
    clock[0] = 0.9
    hub.apply(Decision.highest(fleet()))
    hub.take(report(node="n0"))
    clock[0] = 3.5  # n0 is gone: the instance has moved
    hub.apply(Decision.highest(fleet()))
    hub.take(report(node="n1"))


# Over HTTP


@pytest.fixture
def served():
    hub = HubBackend(fleet())
    hub.apply(Decision.highest(fleet(), floor_mhz=np.array([705.0, 705.0])))
    with HubServer(hub_app(hub, TOKEN)) as server:
        yield hub, f"http://127.0.0.1:{server.port}"


def post(url, data, token=TOKEN):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.post(f"{url}/v1/report", content=data, headers=headers, trust_env=False)


def test_statuses_and_json_errors(served):
    hub, url = served
    good = encode_report(report(), fleet())
    hub.apply(Decision.highest(fleet()))
    assert post(url, good).status_code == 200
    for answer, status in (
        (post(url, good, token=None), 401),
        (post(url, good, token="wrong"), 401),
        (post(url, good, token="wröng".encode()), 401),
        (post(url, b"{}"), 422),
        (post(url, b"x" * (MAX_BYTES + 1)), 413),
        (httpx.get(f"{url}/v1/report", trust_env=False), 405),
        (httpx.get(f"{url}/other", trust_env=False), 404),
    ):
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
    assert httpx.get(f"{url}/v1/health", trust_env=False).json() == {"status": "ok"}
    hub.release()
    assert post(url, good).status_code == 503


def test_short_tokens_and_taken_ports_are_refused(served):
    hub, url = served
    with pytest.raises(ConfigError, match="16 characters"):
        hub_app(hub, "short")
    with pytest.raises(BackendError, match="cannot be listened on"):
        HubServer(hub_app(hub, TOKEN), port=int(url.rpartition(":")[2]))


def linked(url, token=TOKEN, **settings):
    return ControllerLink(url, token, fleet(), "n0", ["decode-0"], **settings)


def test_link_fetches_orders_and_tells_what_happened(served):
    hub, url = served
    with linked(url) as link:
        state = replace(FleetState.idle(2), arrived_req=np.array([9.0, 2.0]))
        for _ in range(3):
            link.tell(Observation(state=state))
        hub.apply(Decision.highest(fleet(), floor_mhz=np.array([705.0, 900.0])))
        link.tell(Observation(state=state))
        seconds_until(lambda: link.order() is not None)
        assert link.order().freq_mhz == {"decode-0": 900.0}
        assert link.failure is None
        seconds_until(lambda: not link._pending)
        time.sleep(0.1)
        # Of its own instance only, and each arrival once.
        assert hub.read().state.arrived_req.tolist() == [0.0, 8.0]


def test_link_says_what_is_wrong(served):
    _, url = served
    for made, word in (
        (linked(url, token="wrong"), "401"),
        (linked("http://127.0.0.1:1"), "Connect"),
    ):
        with made as link:
            link.tell(Observation(state=FleetState.idle(2)))
            seconds_until(lambda link=link, word=word: link.failure and word in link.failure)
            assert link.order() is None
    with pytest.raises(ConfigError, match="instances of"):
        ControllerLink(url, TOKEN, fleet(), "n0", ["decode-9"])
    with pytest.raises(ConfigError, match=r"at most 0\.5 s"):
        RemoteController(fleet(), None, period_s=1.0)


def test_an_error_that_nobody_thought_of_does_not_end_the_line(served, monkeypatch):
    from voltana_ctrl.live import link as link_module

    hub, url = served
    hub.apply(Decision.highest(fleet()))
    with linked(url) as link:
        with monkeypatch.context() as for_a_while:
            for_a_while.setattr(link_module, "decode_order", lambda *_: 1 // 0)
            link.tell(Observation(state=FleetState.idle(2)))
            seconds_until(lambda: "ZeroDivisionError" in (link.failure or ""))
        link.tell(Observation(state=FleetState.idle(2)))
        seconds_until(lambda: link.order() is not None)
        assert link.failure is None


def test_a_controller_that_answers_nonsense_is_as_good_as_gone():
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                body = b'{"schema": "voltana-ctrl/node-order/1"}'
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                    % (len(body), body)
                )

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        with linked(f"http://127.0.0.1:{listener.getsockname()[1]}") as link:
            link.tell(Observation(state=FleetState.idle(2)))
            seconds_until(lambda: link.failure is not None)
            assert "fleet" in link.failure
            assert link.order() is None
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5.0)


def test_ceiling_of_the_last_valid_order_outlives_the_controller():
    orders = [order(freq_max_mhz={"decode-0": 900.0}), None]

    class Line:
        def tell(self, observation):
            pass

        def order(self):
            return orders.pop(0) if orders else None

    controller = RemoteController(fleet(), Line())
    memory = controller.init()
    seen = Observation(state=FleetState.idle(2))
    decision, memory = controller.decide(seen, memory)
    assert decision.freq_mhz[1] == 705.0
    assert controller.notes(memory) == {"controller_gone": 0.0}
    for _ in range(2):
        decision, memory = controller.decide(seen, memory)
        assert decision.freq_mhz.tolist() == [1410.0, 900.0]
        assert controller.notes(memory) == {"controller_gone": 1.0}


@needs_compiler
@pytest.mark.parametrize("end", ["killed", "frozen", "hung"])
def test_node_without_its_controller_is_at_its_ceiling_within_two_seconds(tmp_path, end):
    """The whole of it: two agents' worth of HTTP, real threads, GPUs of a fake driver."""
    hub = HubBackend(fleet())

    class Capped(StaticController):
        def _decide(self, observation, memory):
            wish, memory = super()._decide(observation, memory)
            ceiling = np.array([1200.0, 1005.0])
            return replace(wish, freq_mhz=np.full(2, 705.0), freq_max_mhz=ceiling), memory

    controller = ControlLoop(hub, Capped(fleet(), 705))
    with machine(tmp_path) as fake, HubServer(hub_app(hub, TOKEN)) as server:
        link = linked(f"http://127.0.0.1:{server.port}")
        backend = NodeBackend(meters(fake), setting(fake, tmp_path, ("decode-0",)))
        with (
            link,
            Agent(backend, RemoteController(fleet(), link), AgentSettings(mode="act")) as agent,
        ):
            controller.start()
            agent.loop.start()
            seconds_until(lambda: fake.gpus[1].lock_hi_mhz == 705.0)
            assert hub.read().state.power_w[1] > 60.0
            if end == "killed":
                server.close()
            elif end == "frozen":
                hub.take = lambda report: time.sleep(5.0)
            else:
                hub.apply = lambda decision: None  # its loop decides nothing any more
            took_s = seconds_until(lambda: fake.gpus[1].lock_hi_mhz == 1005.0)
            assert took_s < 2.0
            assert fake.gpus[0].sets == 0.0
            agent.loop.stop()
        controller.stop()
        assert all_given_back(fake)
