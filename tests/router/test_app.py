"""The router: every request answered once, handed over as each engine wants it."""

import contextlib
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from tests.helpers.mock_engine import MockEngine, endpoints_of, fleet_of, serving
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.router.app import Proxy, ProxyLimits
from voltana_ctrl.router.policy import PolicyRouters
from voltana_ctrl.router.server import proxy_server
from voltana_ctrl.types import Slo

JSQ = "static-max+least-queue/jsq"
BODY = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 4}
STREAM = {**BODY, "stream": True}
CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hello"}], "stream": True}


@contextlib.contextmanager
def router(shape, *, kind="vllm", policy=None, engines=None, limits=None, tokens=4, probe_s=3600.0,
           **options):  # fmt: skip
    """A fleet of mock engines with the router in front; yields (client, engines, proxy)."""
    fleet = fleet_of(shape)
    with contextlib.ExitStack() as stack:
        if engines is None:
            engines = [MockEngine(name, tokens=tokens) for name in fleet.ids]
        for engine in engines:
            if isinstance(engine, MockEngine) and not engine.port:
                stack.enter_context(engine)
        policy = policy or ("static-max+jsq" if fleet.colocated else JSQ)
        limits = replace(limits or ProxyLimits(), probe_s=probe_s)
        proxy = Proxy(
            fleet, endpoints_of(fleet, engines, kind), policy=policy, limits=limits, **options
        )
        server = stack.enter_context(serving(proxy))
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=20))
        yield client, engines, proxy
        until_s = time.monotonic() + 5
        while proxy.counts.total_req and time.monotonic() < until_s:
            time.sleep(0.005)
        assert proxy.counts.total_req == 0
        proxy.counts.source = None
        state = proxy.counts.state()
        for name in ("queue_req", "queue_tok", "running_req", "kv_used_tok"):
            assert not getattr(state, name).any(), name


def direct(engine, path, body, request_id):
    answer = httpx.post(engine.url + path, json=body, headers={"x-request-id": request_id})
    assert answer.status_code == 200
    return answer.content


def text_of(content):
    text = ""
    for line in content.decode().splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def all_of(raw):
    """What comes until the other side hangs up."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while part := raw.recv(65536):
            told += part
    return told


# Answers are those of the engine


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [("2C", "vllm"), ("1P2D", "vllm"), ("1P1D", "sglang"), ("1P1D", "dynamo"), ("1C", "trtllm")],
)
def test_answers_are_byte_identical_to_those_of_direct_calls(shape, kind, path, stream):
    body = {**(CHAT if "chat" in path else BODY), "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    with router(shape, kind=kind) as (client, engines, _):
        got = client.post(path, json=body, headers={"x-request-id": "r1"})
        assert got.status_code == 200
        assert got.headers["x-client-request-id"] == "r1"
        assert got.content == direct(engines[-1], path, body, got.headers["x-request-id"])
        kind_of = "text/event-stream" if stream else "application/json"
        assert got.headers["content-type"].startswith(kind_of)
        assert got.headers["x-engine"] if stream else got.headers["x-voltana-energy"]


def test_models_are_those_of_an_engine_that_lives():
    with router("1P2D") as (client, engines, _):
        engines[1].kill()
        assert client.get("/v1/models").json()["data"][0]["id"] == "mock"


@pytest.mark.parametrize("status", [400, 404, 422, 429])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_what_an_engine_refuses_is_passed_through_and_not_sent_again(status, body):
    with router("2C") as (client, engines, _):
        for engine in engines:
            engine.fail = [status, status]
        got = client.post("/v1/completions", json=body)
        assert got.status_code == status
        assert got.json()["error"]["message"].endswith(f"says {status}")
        # A stream was asked for its usage: without that wish it is refused once more.
        assert sum(len(engine.seen) for engine in engines) == 1 + (body is STREAM and status != 429)


# Hand-over


def test_vllm_prefills_one_token_and_hands_its_kv_cache_over():
    body = {**STREAM, "min_tokens": 4, "max_completion_tokens": 4, "temperature": 0.5}
    body["stream_options"] = {"include_usage": True}
    with router("1P1D") as (client, engines, _):
        client.post("/v1/completions", json=body)
        (_, prefill_headers, prefill), (_, decode_headers, decode) = (e.seen[0] for e in engines)
    assert prefill["kv_transfer_params"]["do_remote_decode"] is True
    assert prefill["kv_transfer_params"]["do_remote_prefill"] is False
    assert (prefill["max_tokens"], prefill["max_completion_tokens"]) == (1, 1)
    assert prefill["stream"] is False
    assert prefill["temperature"] == 0.5
    assert not {"min_tokens", "stream_options"} & set(prefill)
    assert decode == {
        **body,
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": "prefill-0",
            "remote_block_ids": [1],
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
        },
    }
    assert prefill_headers["x-request-id"] == decode_headers["x-request-id"]


def test_sglang_sends_the_same_to_both_and_tells_where_they_meet():
    with router("2P2D", kind="sglang") as (client, engines, _):
        for _ in range(8):
            client.post("/v1/chat/completions", json=CHAT)
        # Decode does not wait for prefill here.
        until_s = time.monotonic() + 5
        while sum(e.answered for e in engines[:2]) < 8 and time.monotonic() < until_s:
            time.sleep(0.01)
        made = [body for engine in engines[:2] for body in engine.bodies]
        opened = [body for engine in engines[2:] for body in engine.bodies]
    key = lambda body: body["bootstrap_room"]  # noqa: E731
    assert sorted(made, key=key) == sorted(opened, key=key)
    assert len({key(body) for body in made}) == 8
    for k, engine in enumerate(engines[:2]):
        for body in engine.bodies:
            assert body["bootstrap_host"] == "127.0.0.1"
            assert body["bootstrap_port"] == 8998 + k
            assert 0 <= body["bootstrap_room"] < 2**63
            assert {**CHAT, **body} == body


def test_sglang_gives_each_prompt_of_a_batch_a_room_of_its_own():
    with router("1P1D", kind="sglang") as (client, engines, _):
        client.post("/v1/completions", json={**BODY, "prompt": ["one", "two", "three"]})
        # Decode does not wait for prefill here.
        until_s = time.monotonic() + 5
        while not engines[0].bodies and time.monotonic() < until_s:
            time.sleep(0.01)
        body = engines[0].bodies[0]
    assert body["bootstrap_host"] == ["127.0.0.1"] * 3
    assert body["bootstrap_port"] == [8998] * 3
    assert len(set(body["bootstrap_room"])) == 3


def test_dynamo_is_told_which_workers_and_keeps_other_wishes():
    with MockEngine("frontend") as frontend:
        engines = [frontend] * 4
        with router("2P2D", kind="dynamo", engines=engines) as (client, _, _):
            for _ in range(4):
                wish = {**BODY, "nvext": {"extra_fields": ["timing"], "decode_worker_id": 1}}
                assert client.post("/v1/completions", json=wish).status_code == 200
        pins = [body["nvext"] for body in frontend.bodies]
    assert len(pins) == 4
    assert all(pin["extra_fields"] == ["timing"] for pin in pins)
    assert {pin["prefill_worker_id"] for pin in pins} <= {100, 101}
    assert {pin["decode_worker_id"] for pin in pins} <= {102, 103}


def test_colocated_dynamo_pins_one_worker():
    with MockEngine("frontend") as frontend:
        with router("2C", kind="dynamo", engines=[frontend] * 2) as (client, _, _):
            assert client.post("/v1/completions", json=BODY).status_code == 200
        assert frontend.bodies[0]["nvext"] in ({"backend_instance_id": k} for k in (100, 101))


def test_colocated_engines_get_the_very_bytes():
    content = b' {"prompt" : "caf\\u00e9 \xc3\xa9", "max_tokens":2,   "seed": 12345678901234567890}'
    with router("1C") as (client, engines, _):
        assert client.post("/v1/completions", content=content).status_code == 200
        _, headers, body = engines[0].seen[0]
    assert int(headers["content-length"]) == len(content)
    assert body["seed"] == 12345678901234567890


def test_headers_pass_but_for_those_of_the_connection_and_the_routers_key():
    with router("1C", api_key="secret", engine_api_key="inner") as (client, engines, _):
        headers = {"authorization": "Bearer secret", "traceparent": "00-1-2-03", "te": "trailers"}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
        _, seen, _ = engines[0].seen[0]
    assert seen["authorization"] == "Bearer inner"
    assert seen["traceparent"] == "00-1-2-03"
    assert "te" not in seen
    assert seen["host"].startswith("127.0.0.1")


# Exactly once


TROUBLE_BEFORE = [
    "hang up", 500, 503, "die before the first token", "error before the first token",
    "die after the role",
]  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE_BEFORE)
@pytest.mark.parametrize(
    ("shape", "kind", "broken"),
    [
        ("2C", "vllm", 0), ("2P1D", "vllm", 0), ("1P2D", "vllm", 1), ("2P1D", "sglang", 0),
        ("1P2D", "sglang", 1),
    ],
)  # fmt: skip
def test_before_the_first_token_a_request_is_sent_elsewhere(shape, kind, broken, trouble):
    if isinstance(trouble, str) and "P" in shape and not broken and kind == "vllm":
        trouble = "die in the body" if "die" in trouble or "error" in trouble else trouble
    if kind == "sglang" and not broken and not isinstance(trouble, int):
        trouble = "hang up"
    with router(shape, kind=kind, policy="static-max") as (client, engines, _):
        engines[broken].fail = [trouble]
        answers = [client.post("/v1/chat/completions", json=CHAT) for _ in range(4)]
        if kind == "sglang" and not broken:
            # The prefill engine that failed may come second to its decode engine's first token.
            assert all(answer.status_code == 200 for answer in answers)
            return
        assert [text_of(answer.content) for answer in answers] == [" 0 1 2 3"] * 4
        assert all(answer.content.count(b'"role"') == 1 for answer in answers)
        assert all(answer.content.endswith(b"data: [DONE]\n\n") for answer in answers)
        assert "voltana_router_retries_total 1.0" in client.get("/metrics").text


@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize("shape", ["2C", "2P1D", "1P2D"])
def test_an_engine_that_is_gone_loses_nothing(shape, body):
    with router(shape, policy="static-max") as (client, engines, proxy):
        gone = 1 if shape == "1P2D" else 0
        engines[gone].kill()
        for _ in range(6):
            assert client.post("/v1/completions", json=body).status_code == 200
        # It is passed over after the first refusal.
        assert proxy.counts.is_down(gone)
        assert "voltana_router_retries_total 1.0" in client.get("/metrics").text
        assert client.get("/health").json() == {"status": "ok", "down": [proxy.fleet.ids[gone]]}


@pytest.mark.parametrize("trouble", ["hang up", "die in the body", 500])
def test_an_answer_that_does_not_stream_is_not_lost_while_it_is_made(trouble):
    with router("2C", policy="static-max") as (client, engines, _):
        engines[0].fail = [trouble]
        got = client.post("/v1/completions", json=BODY)
        assert got.status_code == 200
        assert got.json()["choices"][0]["text"] == " 0 1 2 3"
        assert [len(engine.seen) for engine in engines] == [1, 1]


def test_each_attempt_has_an_id_of_its_own():
    with router("2C", policy="static-max") as (client, engines, _):
        engines[0].fail = [500]
        got = client.post("/v1/completions", json=BODY)
        ids = [engine.seen[0][1]["x-request-id"] for engine in engines]
    ours = got.headers["x-request-id"]
    assert ids == [ours, f"{ours}-1"]


@pytest.mark.parametrize("trouble", ["die after two tokens", "die in an event"])
@pytest.mark.parametrize(("shape", "broken"), [("2C", 0), ("1P2D", 1)])
def test_after_the_first_token_a_request_is_never_sent_again(shape, broken, trouble):
    with router(shape, policy="static-max") as (client, engines, _):
        engines[broken].fail = [trouble]
        got = client.post("/v1/completions", json=STREAM)
        # Whole events alone, and the error is one of them.
        assert got.content.count(b"\n\n") == got.content.count(b"data: ") == 3
        assert text_of(got.content) == " 0 1"
        last = got.content.decode().strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 502
        assert b"[DONE]" not in got.content
        sent = [engine for engine in engines[broken:] if engine.seen]
        assert sent == [engines[broken]]
        page = client.get("/metrics").text
        assert "voltana_router_broken_streams_total 1.0" in page
        assert "voltana_router_retries_total 0.0" in page


@pytest.mark.parametrize(("shape", "broken"), [("2C", 0), ("1P2D", 1)])
def test_an_engine_that_tells_of_its_death_in_the_stream_has_broken_it(shape, broken):
    traffic = Traffic(len(fleet_of(shape)))
    with router(shape, policy="static-max", traffic=traffic) as (client, engines, proxy):
        for _ in range(4):  # each engine tells how many tokens its events bring
            client.post("/v1/completions", json=STREAM)
        for engine in engines[broken:]:
            engine.fail = ["error after two tokens"]
            engine.gap_s = 0.05
            engine.seen.clear()
        got = client.post("/v1/completions", json=STREAM)
        # As the engine said it, and not asked of another.
        assert text_of(got.content) == " 0 1"
        assert got.content.count(b'"error"') == 1
        assert got.content.endswith(b"data: [DONE]\n\n")
        assert len([engine for engine in engines[broken:] if engine.seen]) == 1
        page = client.get("/metrics").text
        assert "voltana_router_broken_streams_total 1.0" in page
        assert "voltana_router_retries_total 0.0" in page
        # Two tokens were made and are paid for; it did not end well.
        assert proxy.energy.find(got.headers["x-request-id"]).output_tok == 2
        assert len(traffic.read()[2]) == 4


def test_attempts_are_bounded_and_the_engines_last_word_is_passed_on():
    with router("2C", limits=ProxyLimits(attempts=3)) as (client, engines, _):
        for engine in engines:
            engine.fail = [500] * 10
        got = client.post("/v1/completions", json=BODY)
        assert got.status_code == 500
        assert "says 500" in got.json()["error"]["message"]
        assert sum(len(engine.seen) for engine in engines) == 3


def test_nobody_there_is_told_with_a_time_to_come_again():
    with router("1P1D", engines=["http://127.0.0.1:1"] * 2) as (client, _, _):
        got = client.post("/v1/completions", json=STREAM)
        assert got.status_code == 503
        assert got.headers["retry-after"] == "1"
        assert got.json()["error"]["code"] == 503
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")


def test_engines_killed_one_after_the_other_lose_no_request_that_had_not_begun():
    """Requests all the time; each engine dies and comes back; every request is answered once."""
    with router("3C", policy="static-max+jsq") as (client, engines, _):
        stop = threading.Event()
        results = []

        def ask():
            while not stop.is_set():
                got = client.post("/v1/completions", json=STREAM)
                results.append((got.status_code, text_of(got.content), got.content))

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask) for _ in range(6)]
            for engine in engines:
                engine.gap_s = 0.003
                time.sleep(0.15)
                engine.kill()
                time.sleep(0.15)
                engine.__enter__()
            stop.set()
            for one in asking:
                one.result()
        begun = [one for one in results if b'"error"' in one[2]]
        whole = [one for one in results if b'"error"' not in one[2]]
        assert len(whole) > 10
        assert all(status == 200 and text == " 0 1 2 3" for status, text, _ in whole)
        # Broken off after their first token, told so, and never begun anew.
        assert all(" 0 1 2 3".startswith(text) and text for _, text, _ in begun)
        assert all(status == 200 for status, _, _ in begun)


def test_streams_are_held_to_the_objectives_by_class_of_prompt_length():
    engines = [MockEngine("e", tokens=5)]
    routers = PolicyRouters(fleet_of("1C"), "static-max", Slo(ttft_s=0.2, itl_s=0.05))

    def told(client):
        lines = client.get("/metrics").text.splitlines()
        start = "voltana_router_streams_"
        pairs = [one.removeprefix(start).rpartition(" ") for one in lines if one.startswith(start)]
        return {name: float(value) for name, _, value in pairs}

    with router("1C", engines=engines, routers=routers) as (client, _, _):
        client.post("/v1/completions", json=BODY)
        assert told(client) == {}
        asks = [(0.0, 0.0, 10), (0.4, 0.0, 10), (0.0, 0.15, 10), (0.0, 0.0, 100)]
        for engines[0].first_s, engines[0].gap_s, engines[0].prompt_tok in asks:
            client.post("/v1/completions", json=STREAM)
        engines[0].first_s, engines[0].gap_s = 0.0, 0.05
        engines[0].fail = ["error after two tokens"]
        client.post("/v1/completions", json=STREAM)
        assert told(client) == {
            'total{request_class="0-63"}': 3.0,
            'total{request_class="64-255"}': 1.0,
            'met_total{objective="both",request_class="0-63"}': 1.0,
            'met_total{objective="both",request_class="64-255"}': 1.0,
            'met_total{objective="itl",request_class="0-63"}': 2.0,
            'met_total{objective="itl",request_class="64-255"}': 1.0,
            'met_total{objective="ttft",request_class="0-63"}': 2.0,
            'met_total{objective="ttft",request_class="64-255"}': 1.0,
        }


# Time, patience, back-pressure


@pytest.mark.parametrize("shape", ["1C", "1P1D"])
@pytest.mark.parametrize("when", ["before the first token", "in the stream", "whole answer"])
def test_a_client_that_leaves_cancels_the_engine(shape, when):
    engines = [MockEngine(name) for name in fleet_of(shape).ids]
    engines[-1].tokens, engines[-1].gap_s = 1000, 0.01
    if when == "before the first token":
        engines[-1].first_s = 30.0
    body = {**STREAM, "max_tokens": 1000, "stream": when != "whole answer"}
    with router(shape, engines=engines) as (client, _, proxy):
        with (
            contextlib.suppress(httpx.ReadTimeout),
            client.stream("POST", "/v1/completions", json=body, timeout=0.3) as got,
        ):
            next(got.iter_raw())
        until_s = time.monotonic() + 5
        while not engines[-1].cancelled and time.monotonic() < until_s:
            time.sleep(0.01)
        assert engines[-1].cancelled == 1
        assert proxy.counts.total_req == 0
        page = client.get("/metrics").text
        assert "voltana_router_cancelled_total 1.0" in page
        engines[-1].first_s = 0.0
        assert client.post("/v1/completions", json={**BODY, "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_during_prefill_cancels_the_prefill_engine():
    engines = [MockEngine("p", first_s=30.0), MockEngine("d")]
    with router("1P1D", engines=engines) as (client, _, _):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=BODY, timeout=0.2)
        until_s = time.monotonic() + 5
        while not engines[0].cancelled and time.monotonic() < until_s:
            time.sleep(0.01)
        assert engines[0].cancelled == 1
        assert engines[1].seen == []
        engines[0].first_s = 0.0


def test_no_token_in_time_is_a_504_and_cancels_the_engine():
    with router("1C", limits=ProxyLimits(first_token_s=0.2)) as (client, engines, _):
        engines[0].fail = ["wait"]
        got = client.post("/v1/completions", json=STREAM)
        assert got.status_code == 504
        assert got.json()["error"]["code"] == 504
        time.sleep(0.1)
        assert engines[0].cancelled == 1


def test_a_stream_that_takes_too_long_is_ended_with_an_error():
    with router("1C", limits=ProxyLimits(total_s=0.3)) as (client, engines, _):
        engines[0].tokens, engines[0].gap_s = 1000, 0.02
        got = client.post("/v1/completions", json={**STREAM, "max_tokens": 1000})
        assert got.status_code == 200
        assert b'"code": 504' in got.content
        assert text_of(got.content).startswith(" 0 1")


def test_more_than_fit_are_told_to_come_again():
    with router("1C", limits=ProxyLimits(in_flight_req=2)) as (client, engines, _):
        engines[0].first_s = 0.5
        with ThreadPoolExecutor(5) as pool:
            got = list(pool.map(lambda _: client.post("/v1/completions", json=BODY), range(5)))
        codes = sorted(answer.status_code for answer in got)
        assert codes == [200, 200, 429, 429, 429]
        assert all(a.headers["retry-after"] == "1" for a in got if a.status_code == 429)


def test_a_slow_reader_holds_the_engine_back_and_not_the_routers_memory():
    with router("1C", tokens=200_000) as (client, engines, _):
        body = {**STREAM, "max_tokens": 200_000}
        with client.stream("POST", "/v1/completions", json=body) as got:
            chunks = got.iter_raw()
            next(chunks)
            time.sleep(1.0)
            assert engines[0].streaming == 1  # it cannot write all of it
            del chunks
    # Leaving hangs up on the engine.
    assert engines[0].answered == 0


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(ProxyLimits(stall_s=0.5), id="stall"),
        pytest.param(ProxyLimits(total_s=3.0, stall_s=5.0), id="total", marks=pytest.mark.slow),
    ],
)
def test_clients_that_do_not_read_hold_no_engine(limits):
    """They are cut off; meanwhile and afterwards the others are served."""
    content = json.dumps({**STREAM, "max_tokens": 200_000}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(content)
    )
    with (
        router("1C", tokens=200_000, limits=limits) as (client, engines, proxy),
        contextlib.ExitStack() as deaf,
    ):
        for _ in range(6):
            raw = deaf.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((client.base_url.host, client.base_url.port))
            raw.sendall(head + content)
        wait_for(lambda: len(engines[0].seen) >= 6)
        assert client.get("/health").status_code == 200
        wait_for(lambda: (proxy.counts.total_req, engines[0].streaming) == (0, 0))
        engines[0].tokens = 4
        assert client.post("/v1/completions", json=BODY).status_code == 200
        if limits.stall_s < limits.total_s:  # else some may have ended before they were full
            wait_for(lambda: "voltana_router_stalled_total 6.0" in client.get("/metrics").text)
            raw.settimeout(10.0)
            got = b"".join(iter(lambda: raw.recv(65536), b""))
            # Cut off: what is buffered comes, and no end.
            assert not got.endswith(b"\r\n0\r\n\r\n")


def wait_for(condition, limit_s=30.0):
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_draining_ends_what_runs_and_refuses_what_comes():
    engine = MockEngine("c", tokens=40, gap_s=0.02)
    fleet = fleet_of("1C")
    with engine:
        proxy = Proxy(fleet, endpoints_of(fleet, [engine]), policy="static-max")
        with serving(proxy) as server, httpx.Client(base_url=server.url, timeout=20) as client:
            body = {**STREAM, "max_tokens": 40}
            with client.stream("POST", "/v1/completions", json=body) as got:
                chunks = got.iter_raw()
                begin = next(chunks)
                # What SIGTERM does.
                server.handle_exit(15, None)
                assert proxy.is_draining
                rest = b"".join(chunks)
            assert text_of(begin + rest) == "".join(f" {k}" for k in range(40))
            told = set()
            with contextlib.suppress(httpx.TransportError):
                while len(told) < 100:
                    told.add(client.post("/v1/completions", json=BODY).status_code)
            assert told <= {503}


def test_a_router_that_drains_says_so():
    with router("1C") as (client, _, proxy):
        proxy.is_draining = True
        assert client.get("/health").status_code == 503
        got = client.post("/v1/completions", json=BODY)
        assert (got.status_code, got.headers["retry-after"]) == (503, "1")


# Who may, and how much


def test_a_bearer_token_is_asked_for_where_it_is_set():
    with router("1C", api_key="s3cret") as (client, engines, _):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic s3cret"},
            {"authorization": "Bearer s3cret2"},
        ):
            got = client.post("/v1/completions", json=BODY, headers=headers)
            assert got.status_code == 401
            assert got.json()["error"]["type"] == "authentication_error"
            assert client.get("/v1/models", headers=headers).status_code == 401
            assert client.get("/v1/energy/x", headers=headers).status_code == 401
        assert engines[0].seen == []
        good = {"authorization": "bearer s3cret"}
        assert client.post("/v1/completions", json=BODY, headers=good).status_code == 200
        assert client.get("/health").status_code == 200


def test_no_key_stands_in_a_log_or_an_answer(caplog):
    keys = ("s3cret-of-clients", "s3cret-of-engines", "s3cret-that-is-wrong")
    with (
        caplog.at_level("DEBUG"),
        router("1C", api_key=keys[0], engine_api_key=keys[1]) as (client, _, proxy),
    ):
        told = [repr(proxy)]
        for key in (keys[0], keys[2]):
            headers = {"authorization": f"Bearer {key}"}
            got = client.post("/v1/completions", json=BODY, headers=headers)
            told += [got.text, str(got.headers)]
            told.append(client.get("/metrics", headers=headers).text)
    told.append(caplog.text)
    assert [key for key in keys for text in told if key in text] == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_refused(chunked):
    with router("1C", limits=ProxyLimits(body_bytes=1000)) as (client, engines, _):
        content = b'{"prompt": "' + b"x" * 5000 + b'"}'
        sent = iter([content]) if chunked else content
        got = client.post("/v1/completions", content=sent)
        assert got.status_code == 413
        assert got.json()["error"]["code"] == 413
        assert engines[0].seen == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[]", "JSON object"),
        (b"\xff", "not valid JSON"), (b'{"x": NaN}', "NaN"), (b"[" * 100_000, "not valid JSON"),
        (b'{"stream": "yes"}', "stream"), (b'{"stream_options": 1}', "stream_options"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)  # fmt: skip
def test_a_body_that_no_engine_can_read_is_refused(content, words):
    with router("1C") as (client, engines, _):
        got = client.post("/v1/completions", content=content)
        assert got.status_code == 400
        assert words in got.json()["error"]["message"]
        assert engines[0].seen == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("GET", "/nothing", 404), ("POST", "/v1/models/", 404)],
)
def test_paths_and_methods_that_are_not_there(method, path, status):
    with router("1C") as (client, _, _):
        got = client.request(method, path)
        assert got.status_code == status
        assert got.json()["error"]["code"] == status


def test_slow_heads_and_bodies_are_not_waited_for():
    with router("1C", limits=ProxyLimits(header_s=0.2, body_s=0.2)) as (client, _, _):
        port = client.base_url.port
        for sent, status in (
            (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n", b"408"),
            (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{", b"408"),
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                raw.sendall(sent)
                told = all_of(raw)
            assert told.split(b" ")[1] == status
            assert told.lower().count(b"connection: close") == 1
            assert b'"error"' in told


def test_long_headers_are_refused():
    with router("1C") as (client, engines, _):
        for size in (40_000, 500_000):
            with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=5) as raw:
                raw.settimeout(5)
                with contextlib.suppress(OSError):
                    raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: ")
                    raw.sendall(b"y" * size)
                told = all_of(raw)
            assert told.split(b" ")[1] == b"431"
            assert b'"error"' in told
        assert engines[0].seen == []


def test_no_text_of_requests_reaches_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    with router("1C") as (client, engines, _):
        engines[0].fail = [500, "hang up", "die after two tokens"]
        for body in (BODY, STREAM):
            client.post("/v1/completions?q=TOPSECRET", json={**body, "prompt": "TOPSECRET"})
        client.post("/v1/completions", content=b"{TOPSECRET")
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert any("status 500" in record.getMessage() for record in ours)
    assert not any("TOPSECRET" in record.getMessage() for record in ours)


def test_tls(tmp_path):
    import ssl
    import subprocess

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key,
         "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=False, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    fleet = fleet_of("1C")
    with MockEngine() as engine:
        proxy = Proxy(fleet, endpoints_of(fleet, [engine]), policy="static-max")
        with serving(proxy, tls_cert=cert, tls_key=key) as server:
            trust = ssl.create_default_context(cafile=str(cert))
            got = httpx.post(f"{server.url}/v1/completions", json=BODY, verify=trust)
            assert got.status_code == 200


# Setting up


def test_what_does_not_fit_is_refused():
    fleet = fleet_of("1P1D")
    ends = endpoints_of(fleet, ["http://one", "http://two"])
    with pytest.raises(ConfigError, match="one for each of prefill-0, decode-0"):
        Proxy(fleet, ends[::-1])
    with pytest.raises(ConfigError, match="engines of one kind"):
        Proxy(fleet, [ends[0], Endpoint(instance="decode-0", kind="sglang", url="http://x")])
    with pytest.raises(ConfigError, match="worker_id"):
        Proxy(fleet, [Endpoint(instance=n, kind="dynamo", url="http://x") for n in fleet.ids])
    with pytest.raises(ConfigError, match="trtllm"):
        Proxy(fleet, endpoints_of(fleet, ["http://one", "http://two"], "trtllm"))
    with pytest.raises(ConfigError, match="attempts"):
        ProxyLimits(attempts=0)
    with pytest.raises(ConfigError, match="body_s"):
        ProxyLimits(body_s=float("nan"))
    with pytest.raises(ConfigError, match="certificate and key"):
        proxy_server(Proxy(fleet, ends, policy="static-max"), tls_cert="cert.pem")
