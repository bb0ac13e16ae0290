"""One controller, many nodes: messages that nobody can break, and nodes that survive it."""

import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler, seconds_until
from tests.live.test_agent import SLO, meters, setting

pytest.importorskip("starlette", reason="needs the server extra")
pytest.importorskip("uvicorn", reason="needs the server extra")

from voltana_ctrl import BackendError, ConfigError, ControlLoop, Decision, FleetState, Observation
from voltana_ctrl.backends.nvml.meters import GpuMeters
from voltana_ctrl.control import StaticController
from voltana_ctrl.control.budget import highest_power_w
from voltana_ctrl.engines.limits import read_limits
from voltana_ctrl.live.agent import Agent, AgentSettings
from voltana_ctrl.live.governed import PolicyController, fleet_policy
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.hub_app import hub_app
from voltana_ctrl.live.link import ControllerLink
from voltana_ctrl.live.messages import (
    MAX_BYTES,
    MessageRefused,
    decode_orders,
    decode_report,
    encode_orders,
    encode_report,
)
from voltana_ctrl.live.node import NodeBackend
from voltana_ctrl.live.orders import Orders, Report, decision_of
from voltana_ctrl.live.remote import RemoteController
from voltana_ctrl.serving.server import ServerThread
from voltana_ctrl.types import IterationBatch, Order, PowerBudget, RequestBatch

TOKEN = "0123456789abcdef-token"


COUNT = itertools.count()


def report(ids=("decode-0",), sender="n0", number=None, kind="node", start="a", **state):
    made = replace(FleetState.idle(len(ids), freq_mhz=1410.0), **state)
    return Report(
        kind=kind, sender=sender, start=start, number=next(COUNT) if number is None else number,
        ids=ids, observation=Observation(state=made),
    )  # fmt: skip


def orders(number=0, start="c", valid_s=1.0, **changes):
    told = {"floor_mhz": 705.0, "ceiling_mhz": 1410.0, **changes}
    return Orders(start=start, number=number, valid_s=valid_s, orders={"decode-0": Order(**told)})


# Messages

finite = st.floats(0.0, 1e12)


@given(
    numbers=st.lists(finite, min_size=13, max_size=13),
    rows=st.lists(st.tuples(st.integers(0, 1), finite, finite), max_size=5),
    sender=st.text(min_size=1, max_size=20),
)
def test_what_is_encoded_comes_back(numbers, rows, sender):
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
    sent = Report(
        kind="router", sender=sender, start="s", number=7, ids=("decode-0",),
        observation=Observation(state=state, iterations=iterations),
    )  # fmt: skip
    got = decode_report(encode_report(sent, fleet()), fleet())
    assert (got.sender, got.number, got.ids) == (sender, 7, ("decode-0",))
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
    "orders": json.loads(
        encode_orders(
            replace(
                orders(announced=((3.0, 900.0),), decode_pace_frac=1.1, admits=("chat",)),
                state=FleetState.idle(2),
            ),
            fleet(),
        )
    ),
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


@given(data=st.data(), kind=st.sampled_from(["report", "orders"]))
def test_a_message_with_anything_in_any_place_is_taken_or_refused(data, kind):
    path = data.draw(st.sampled_from(list(paths(GOOD[kind]))))
    value = changed(GOOD[kind], path, data.draw(json_values))
    decode = decode_report if kind == "report" else decode_orders
    try:
        got = decode(json.dumps(value).encode(), fleet())
    except MessageRefused:
        return
    # What is taken is safe to act on, and goes through the controller's plant.
    if kind == "orders":
        for one in got.orders.values():
            assert 0.0 < one.floor_mhz <= one.ceiling_mhz <= 1410.0
            assert one.alone(5.0).floor_mhz <= 1410.0
        decision_of(got.orders, fleet())
        return
    hub = HubBackend(fleet())
    hub.apply(Decision.highest(fleet()))
    hub.take(got)
    hub.read()


@given(st.binary(max_size=200))
def test_bytes_are_refused(data):
    for decode in (decode_report, decode_orders):
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
        json.dumps({**GOOD["report"], "schema": "voltana-ctrl/report/2"}).encode(),
        json.dumps({**GOOD["report"], "ids": ["decode-0", "decode-0"]}).encode(),
        json.dumps({**GOOD["report"], "ids": [["decode-0"]]}).encode(),
    ],
    ids=range(10),
)
def test_hostile_messages_are_refused(data):
    for decode in (decode_report, decode_orders):
        with pytest.raises(MessageRefused):
            decode(data, fleet())


def test_messages_are_small():
    assert len(encode_report(report(), fleet())) < 1500
    assert len(encode_orders(orders(), fleet())) < 300
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
    for _ in range(2):
        told = report(arrived_req=np.array([3.0]), energy_j=np.array([50.0]), age_s=np.array([0.2]))
        told = replace(told, observation=replace(told.observation, finished=done))
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
    assert got.orders["decode-0"].floor_mhz == 900.0
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
    hub.take(report(sender="n0"))
    with pytest.raises(MessageRefused, match="node n0 reports it"):
        hub.take(report(sender="n1"))
    clock[0] = 0.9
    hub.apply(Decision.highest(fleet()))
    hub.take(report(sender="n0"))
    clock[0] = 3.5  # n0 is gone: the instance has moved
    hub.apply(Decision.highest(fleet()))
    hub.take(report(sender="n1"))


def done(n=1, ttft_s=0.2):
    one = np.ones(n)
    return RequestBatch(
        request=np.arange(n), request_class=0 * one, prompt_tok=100 * one, output_tok=9 * one,
        ttft_s=ttft_s * one, itl_s=0.03 * one, prefill_instance=0 * one, decode_instance=one,
    )  # fmt: skip


def with_finished(told, batch):
    return replace(told, observation=replace(told.observation, finished=batch))


def test_a_report_that_comes_twice_counts_once_and_an_older_one_is_refused():
    hub = HubBackend(fleet())
    hub.apply(Decision.highest(fleet()))
    told = with_finished(report(number=5, arrived_req=np.array([3.0])), done(2))
    assert hub.take(told).orders == hub.take(told).orders
    seen = hub.read()
    assert (seen.state.arrived_req[1], len(seen.finished), hub.repeated) == (3.0, 2, 1)
    with pytest.raises(MessageRefused, match="which is old"):
        hub.take(report(number=4))


def test_another_start_takes_over_once_the_first_has_fallen_silent():
    clock = [0.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    hub.apply(Decision.highest(fleet()))
    hub.take(report(number=9, start="a"))
    with pytest.raises(MessageRefused, match="another process reports under this name"):
        hub.take(report(number=0, start="b"))
    clock[0] = 2.5
    hub.apply(Decision.highest(fleet()))
    assert hub.take(report(number=0, start="b")).orders


def test_who_falls_silent_and_who_is_back_is_logged_once(caplog):
    clock = [0.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    hub.apply(Decision.highest(fleet()))
    hub.take(report(number=1, start="a", sender="n0"))
    for t_s in (1.0, 2.5, 3.0, 60.0):
        clock[0] = t_s
        hub.read()
    hub.apply(Decision.highest(fleet()))
    hub.take(report(number=0, start="b", sender="n0"))
    hub.read()
    hub.read()
    told = [one.getMessage() for one in caplog.records]
    assert told == [
        "voltana-ctrl: node n0 has fallen silent",
        "voltana-ctrl: node n0 reports again",
    ]


def test_an_engine_that_does_not_answer_is_no_node_that_has_fallen_silent():
    clock = [100.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    hub.apply(Decision.highest(fleet()))
    gone = report(alive=np.array([False]), age_s=np.array([60.0]))
    hub.take(replace(gone, problems={"decode-0": "connection refused"}))
    assert hub.problems() == {
        "decode-0": "connection refused", "prefill-0": "no node reports it"
    }  # fmt: skip
    clock[0] = 103.0
    assert hub.problems()["decode-0"] == "node n0 has fallen silent"


def test_a_node_says_when_its_controller_is_gone_and_when_it_obeys(caplog):
    line = Line(orders())
    controller = RemoteController(fleet(), line)
    seen, memory = Observation(state=FleetState.idle(2)), controller.init()
    for held_s in (0.1, 0.2, 1.1, 5.0, 0.1):
        line.held_s = held_s
        _, memory = controller.decide(seen, memory)
    told = [one.getMessage().removeprefix("voltana-ctrl: ") for one in caplog.records]
    assert [one.split(":")[0] for one in told] == [
        "the controller's orders are in force", "no controller",
        "the controller's orders are in force",
    ]  # fmt: skip


def routed(sender="r0", **state):
    return report(ids=fleet().ids, sender=sender, kind="router", **state)


def test_what_routers_have_in_flight_adds_up_and_their_requests_go_first():
    clock = [0.0]
    hub = HubBackend(fleet(), now_s=lambda: clock[0])
    hub.apply(Decision.highest(fleet()))
    assert not hub.routed()
    node = report(running_req=np.array([5.0]), arrived_req=np.array([50.0]))
    hub.take(with_finished(node, done(7)))
    for sender, running in (("r0", 4.0), ("r1", 3.0)):
        two = {"running_req": np.array([0.0, running]), "arrived_req": np.array([1.0, 2.0])}
        got = hub.take(with_finished(routed(sender, **two), done(1)))
    assert hub.routed()
    assert set(got.orders) == set(fleet().ids)
    seen = hub.read()
    assert seen.state.running_req.tolist() == [0.0, 7.0]
    assert seen.state.arrived_req.tolist() == [2.0, 4.0]
    assert len(seen.finished) == 2
    assert hub.take(routed("r0")).state.running_req[1] == 7.0
    # Both gone: what engines tell counts again, and nobody may be parked.
    clock[0] = 3.0
    hub.apply(Decision.highest(fleet()))
    hub.take(with_finished(replace(node, number=10**6), done(7)))
    seen = hub.read()
    assert not hub.routed()
    assert (seen.state.running_req[1], seen.state.arrived_req[1]) == (5.0, 50.0)
    assert len(seen.finished) == 7


def test_nobody_is_parked_where_no_router_obeys():
    class Parks(StaticController):
        def _decide(self, observation, memory):
            wish = Decision.highest(self.fleet, floor_mhz=self.fleet.min_mhz)
            active = np.array([True, True, False])
            return replace(wish, active=active, route_frac=np.array([1.0, 1.0, 0.0])), memory

    spec, obeyed = fleet("1P2D"), [False]
    controller = PolicyController(spec, inner=Parks(spec), held=spec.ids, routed=lambda: obeyed[0])
    seen = Observation(state=FleetState.idle(3))
    assert controller.decide(seen, None)[0].active.all()
    obeyed[0] = True
    decision = controller.decide(seen, None)[0]
    assert decision.active.tolist() == [True, True, False]
    assert decision.route_frac.tolist() == [1.0, 1.0, 0.0]


def test_steps_of_a_budget_are_announced_and_come_nearer():
    clock = [0.0]
    spec = fleet("2P2D")
    hub = HubBackend(spec, now_s=lambda: clock[0])
    budget = PowerBudget.parse("0:1600,60:900")
    controller = fleet_policy(spec, SLO, "mpc", power_budget=budget)
    seen = Observation(state=FleetState.idle(4, t_s=10.0))
    hub.apply(controller.decide(seen, controller.init())[0])
    clock[0] = 0.5
    (step,) = hub.take(report(ids=("decode-1",))).orders["decode-1"].announced
    assert step[0] == pytest.approx(49.5)
    worst_w = [highest_power_w(one)[one.clocks_mhz.tolist().index(step[1])]
               for one in spec.instances]  # fmt: skip
    assert sum(worst_w) <= 900.0


# Over HTTP


@pytest.fixture
def served():
    hub = HubBackend(fleet())
    hub.apply(Decision.highest(fleet(), floor_mhz=np.array([705.0, 705.0])))
    with ServerThread(hub_app(hub, TOKEN), what="controller") as server:
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
        ServerThread(hub_app(hub, TOKEN), port=int(url.rpartition(":")[2]), what="controller")


def test_another_token_is_said_on_both_sides_from_the_first_report_on(served, caplog):
    _, url = served
    with caplog.at_level("WARNING"), linked(url, token="another-token-altogether") as link:
        controller = RemoteController(fleet(), link)
        memory = controller.init()

        def told(words):
            nonlocal memory
            _, memory = controller.decide(Observation(state=FleetState.idle(2)), memory)
            return [one for one in caplog.messages if words in one]

        seconds_until(lambda: told("no controller (controller: status 401"))
        for _ in range(20):
            assert len(told("no controller")) == 1  # it is not news any more
    assert len(told("a report from 127.0.0.1 was refused, it shows another token")) == 1
    with pytest.raises(ConfigError, match="token: expected at least 16 characters, got 5"):
        linked(url, token="short")


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
        seconds_until(lambda: link.orders() is not None)
        assert link.orders().orders["decode-0"].floor_mhz == 900.0
        assert link.failure is None
        seconds_until(lambda: not link._pending)
        time.sleep(0.1)
        # Of its own instance only, and each arrival once.
        assert hub.read().state.arrived_req.tolist() == [0.0, 8.0]


def test_no_token_stands_in_a_log_an_error_or_a_text_of_an_object(caplog):
    wrong = "wrong-token-0123456789"
    with caplog.at_level("DEBUG"):
        hub = HubBackend(fleet())
        hub.apply(Decision.highest(fleet()))
        told = []
        with ServerThread(hub_app(hub, TOKEN), what="controller") as server:
            url = f"http://127.0.0.1:{server.port}"
            told += [post(url, b"[]", token=each).text for each in (TOKEN, wrong, None)]
            told.append(httpx.get(f"{url}/?token={wrong}", trust_env=False).text)
            for token in (TOKEN, wrong):
                with linked(url, token=token) as link:
                    link.tell(Observation(state=FleetState.idle(2)))
                    seconds_until(lambda link=link: link.failure or link.orders() is not None)
                    told += [repr(link), str(link.failure), repr(server), repr(hub)]
    told.append(caplog.text)
    assert "httpx" in caplog.text  # what is said of the requests was listened to
    for text in told:
        assert TOKEN not in text
    assert not any(wrong in text for text in told[:-1])
    # A client that puts it into its address says it itself; a header it does not.
    assert f"Bearer {wrong}" not in caplog.text


def test_link_says_what_is_wrong(served):
    _, url = served
    for made, word in (
        (linked(url, token="the-wrong-token-altogether"), "401"),
        (linked("http://127.0.0.1:1"), "Connect"),
    ):
        with made as link:
            link.tell(Observation(state=FleetState.idle(2)))
            seconds_until(lambda link=link, word=word: link.failure and word in link.failure)
            assert link.orders() is None
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
            for_a_while.setattr(link_module, "decode_orders", lambda *_: 1 // 0)
            link.tell(Observation(state=FleetState.idle(2)))
            seconds_until(lambda: "ZeroDivisionError" in (link.failure or ""))
        link.tell(Observation(state=FleetState.idle(2)))
        seconds_until(lambda: link.orders() is not None)
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
                body = b'{"schema": "voltana-ctrl/orders/1"}'
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
            assert link.orders() is None
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5.0)


def test_a_report_whose_answer_is_lost_is_sent_again_as_the_same(served):
    hub, url = served
    hub.apply(Decision.highest(fleet()))
    state = replace(FleetState.idle(2), arrived_req=np.array([0.0, 3.0]))
    with linked(url) as link:
        post, lost = link._client.post, []

        def loses_one(*args, **kwargs):
            answer = post(*args, **kwargs)
            if not lost:
                lost.append(answer)
                raise httpx.ReadTimeout("lost on the way")
            return answer

        link._client.post = loses_one
        link.tell(Observation(state=state))
        seconds_until(lambda: link.orders() is not None)
    assert hub.repeated == 1
    assert hub.read().state.arrived_req[1] == 3.0


def test_two_controllers_cannot_take_turns():
    clock = [0.0]
    with linked("http://127.0.0.1:1", now_s=lambda: clock[0]) as link:
        link._take(orders(number=7, start="a"), 0.0)
        link._take(orders(number=6, start="a", floor_mhz=300.0), 0.0)  # overtaken on the way
        assert link.orders().number == 7
        with pytest.raises(MessageRefused, match="two controllers"):
            link._take(orders(number=99, start="b"), 0.0)
        clock[0] = 1.5
        assert link.orders() is None
        link._take(orders(number=0, start="b"), 1.5)
        assert link.orders().start == "b"


def test_a_controller_with_a_certificate_of_ones_own(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout",
               key, "-out", certificate, "-subj", "/CN=localhost", "-addext",
               "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=60)
    hub = HubBackend(fleet(), valid_s=60.0)
    hub.apply(Decision.highest(fleet()))
    app = hub_app(hub, TOKEN)
    with ServerThread(app, what="controller", tls_cert=certificate, tls_key=key) as server:
        url = f"https://127.0.0.1:{server.port}"
        with linked(url, limit_s=5.0) as stranger, linked(
            url, tls_ca=certificate, limit_s=5.0, hold_s=60.0
        ) as friend:  # fmt: skip
            stranger._sender = "n1"
            for link in (stranger, friend):
                link.tell(Observation(state=FleetState.idle(2)))
            seconds_until(lambda: friend.orders() is not None)
            seconds_until(lambda: "certificate" in (stranger.failure or "").lower())
    with pytest.raises(ConfigError, match="cannot be read as certificates"):
        linked(url, tls_ca=key)
    with pytest.raises(ConfigError, match="cannot be read as certificates"):
        linked(url, tls_ca=tmp_path / "none.pem")


class Line:
    """A link whose orders and clock a test sets."""

    failure = None

    def __init__(self, told):
        self.told, self.held_s = told, 0.0

    def tell(self, observation):
        pass

    def orders(self):
        return self.told if self.held_s <= self.told.valid_s else None

    def last(self):
        return self.told, self.held_s


def test_ceilings_of_the_last_orders_and_those_announced_outlive_the_controller():
    line = Line(orders(ceiling_mhz=900.0, announced=((30.0, 600.0), (60.0, 1410.0))))
    controller = RemoteController(fleet(), line)
    memory = controller.init()
    seen = Observation(state=FleetState.idle(2))
    decision, memory = controller.decide(seen, memory)
    assert (decision.freq_mhz[1], decision.freq_max_mhz[1]) == (705.0, 900.0)
    assert controller.notes(memory) == {"controller_gone": 0.0}
    for held_s, clock_mhz in ((1.1, 900.0), (29.0, 900.0), (31.0, 600.0), (61.0, 1410.0)):
        line.held_s = held_s
        decision, memory = controller.decide(seen, memory)
        assert decision.freq_mhz.tolist() == [1410.0, clock_mhz]
        assert controller.notes(memory) == {"controller_gone": 1.0}


def test_a_policy_s_own_ceiling_ends_with_its_controller_and_a_budget_s_does_not():
    wish = Decision.highest(fleet(), floor_mhz=np.full(2, 705.0), ceiling_mhz=np.full(2, 705.0))
    seen = Observation(state=FleetState.idle(2))
    for budgeted, clock_mhz in ((False, 1410.0), (True, 705.0)):
        hub = HubBackend(fleet(), budgeted=budgeted)
        hub.apply(wish)
        told = []
        line = Line(hub.take(report()))
        controller = RemoteController(fleet(), line, on_budget=told.append)
        decision, memory = controller.decide(seen, controller.init())
        assert decision.freq_max_mhz[1] == 705.0
        line.held_s = 1.1
        decision, _ = controller.decide(seen, memory)
        assert decision.freq_mhz[1] == decision.freq_max_mhz[1] == clock_mhz
        assert told == [budgeted, budgeted]


@pytest.mark.parametrize("budgeted", [False, True])
def test_what_an_engine_was_told_last_ends_likewise(tmp_path, budgeted):
    path = tmp_path / "d0.json"
    with NodeBackend(GpuMeters(fleet(), {}), hands={"decode-0": path}) as node:
        node.budgeted = budgeted
        node.apply(
            Decision.highest(fleet(), floor_mhz=np.full(2, 705.0), ceiling_mhz=np.full(2, 705.0))
        )
        handed = read_limits(path)
        assert handed.now(handed.since_s + 0.5).ceiling_mhz == 705.0
        alone = handed.now(handed.since_s + 2.0)
        assert alone.floor_mhz == alone.ceiling_mhz == (705.0 if budgeted else 1410.0)


def test_a_policy_is_told_on_and_a_step_that_is_due_holds_at_once():
    told = []
    line = Line(orders(announced=((0.5, 600.0),)))
    controller = RemoteController(fleet(), line, on_policy=told.append)
    line.held_s = 0.6
    decision, _ = controller.decide(Observation(state=FleetState.idle(2)), controller.init())
    assert decision.freq_mhz[1] == decision.freq_max_mhz[1] == 600.0
    assert told == ["mpc"]


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
    with machine(tmp_path) as fake, ServerThread(hub_app(hub, TOKEN), what="controller") as server:
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
