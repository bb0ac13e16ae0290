"""Requests and engines as people meet them: each kind of surprise, several members of it."""

import errno
import json
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.helpers.mock_engine import MockEngine, fleet_of
from tests.router.test_app import BODY, CHAT, STREAM, router, text_of, wait_for
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.router.body import read_request
from voltana_ctrl.router.dialects import sglang_meeting
from voltana_ctrl.router.limits import ProxyLimits
from voltana_ctrl.router.messages import UpstreamFailed

USAGE = {**STREAM, "stream_options": {"include_usage": True}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def value_of(client, name):
    """Of one line of the page of metrics."""
    found = re.search(
        rf"^voltana_router_{re.escape(name)} (\S+)$", client.get("/metrics").text, re.M
    )
    return float(found[1]) if found else 0.0


# A reference to one KV cache is for one sequence


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"prompt": ["one", "two"]}),
        ("completions", {"prompt": [[1, 2], [3, 4]]}),
        ("completions", {"prompt": "one", "n": 2}),
        ("completions", {"prompt": "one", "best_of": 2}),
        # What an engine takes for a number is one.
        ("completions", {"prompt": "one", "best_of": "2"}),
        ("completions", {"prompt": "one", "n": "2"}),
        ("completions", {"prompt": "one", "n": 2.0}),
        ("completions", {"prompt": "one", "use_beam_search": True}),
        ("completions", {"prompt": "one", "prompt_embeds": ["AA=="]}),
        ("completions", {"prompt": "one", "echo": True, "logprobs": 1}),
        ("completions", {"prompt": "one", "prompt_logprobs": 0}),
        ("completions", {"prompt": "one", "truncate_prompt_tokens": -1}),
        ("chat/completions", {"messages": CHAT["messages"], "n": 3}),
        ("chat/completions", {"messages": CHAT["messages"], "tools": [TOOL],
                              "tool_choice": "required"}),
        ("chat/completions", {"messages": CHAT["messages"], "tools": [TOOL],
                              "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)  # fmt: skip
def test_what_is_not_one_sequence_is_prefilled_by_its_decode_engine(path, fields):
    with router("1P1D") as (client, engines, proxy):
        got = client.post(f"/v1/{path}", json={"model": "mock", **fields})
        assert got.status_code == 200
        assert engines[0].seen == []
        assert engines[1].bodies == [{"model": "mock", **fields}]
        energy = client.get(f"/v1/energy/{got.headers['x-request-id']}").json()
        assert energy["prefill_instance"] == energy["decode_instance"] == "decode-0"
        assert proxy.metrics._told["decoded_alone"].total() == 1
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert len(engines[0].seen) == 1


@pytest.mark.parametrize("prompt", [["one"], [1, 2, 3], "one"])
def test_one_sequence_is_handed_over(prompt):
    with router("1P1D") as (client, engines, _):
        assert client.post("/v1/completions", json={"prompt": prompt, "n": 1}).status_code == 200
        assert engines[1].bodies[0]["kv_transfer_params"]["remote_engine_id"] == "prefill-0"


@pytest.mark.parametrize("body", [{**BODY, "n": 2}, {"prompt": ["one", "two"], "n": 2}])
def test_samples_that_sglang_would_give_one_room_are_refused(body):
    with router("1P1D", kind="sglang") as (client, engines, _):
        got = client.post("/v1/completions", json=body)
        assert got.status_code == 400
        assert got.json()["error"]["message"].startswith("n: expected 1 where prefill and decode")
        assert engines[0].seen == engines[1].seen == []
    with router("1C", kind="sglang") as (client, engines, _):
        assert client.post("/v1/completions", json=body).status_code == 200


# What constrains the answer is not for the engine that makes one token


def test_the_prefill_leg_keeps_what_shapes_the_prompt_and_drops_what_constrains_the_answer():
    shapes = {
        "messages": CHAT["messages"], "tools": [TOOL], "tool_choice": "auto",
        "response_format": {"type": "json_object"}, "chat_template_kwargs": {"x": 1},
        "add_generation_prompt": True, "cache_salt": "s", "seed": 3,
    }  # fmt: skip
    constrains = {
        "stop": ["."], "stop_token_ids": [2], "min_tokens": 3, "logprobs": True, "top_logprobs": 2,
        "structured_outputs": {"regex": "a+"}, "guided_regex": "a+", "bad_words": ["b"],
        "logit_bias": {"5": 1}, "stream_options": {"include_usage": True}, "stream_interval": 4,
        "thinking_token_budget": 5, "return_token_ids": True,
    }  # fmt: skip
    with router("1P1D") as (client, engines, _):
        body = {**shapes, **constrains, "max_tokens": 4, "stream": True}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        (prefill,), (decode,) = (engine.bodies for engine in engines)
    assert {key: prefill.pop(key) for key in shapes} == shapes
    assert set(prefill) == {"max_tokens", "stream", "kv_transfer_params"}
    decode.pop("kv_transfer_params")
    assert decode == body


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_what_a_prefill_engine_refuses_is_not_the_clients_fault(body):
    with router("1P1D") as (client, engines, _):
        engines[0].refuses = ("kv_transfer_params",)
        got = client.post("/v1/completions", json=body)
        assert got.status_code == 200
        assert "kv_transfer_params" not in engines[1].bodies[0]
        assert value_of(client, "refused_altered_total") == 1
        # What the decode engine refuses of the client's own body is.
        engines[1].fail = [422, 422]
        got = client.post("/v1/completions", json=body)
        assert (got.status_code, "decode-0 says" in got.text) == (422, True)


def test_a_prefill_engine_that_fails_at_a_request_leaves_it_to_decode():
    with router("2P1D", policy="static-max") as (client, engines, _):
        for engine in engines[:2]:
            engine.fail = [500]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert [len(engine.seen) for engine in engines] == [1, 1, 1]


def test_what_a_prefill_engine_of_sglang_says_of_one_token_is_not_the_answer():
    """It fails first, at an answer of one token; the decode engine's answer comes."""
    with router("1P1D", kind="sglang") as (client, engines, _):
        engines[0].fail, engines[1].first_s = [400], 0.3
        got = client.post("/v1/completions", json=BODY)
        assert (got.status_code, got.json()["choices"][0]["text"]) == (200, " 0 1 2 3")


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_pin_that_dynamo_refuses_is_not_the_clients_fault(status):
    with MockEngine("frontend") as frontend:
        with router("1P1D", kind="dynamo", engines=[frontend] * 2) as (client, _, _):
            frontend.fail = [status]
            body = {**BODY, "nvext": {"extra_fields": ["timing"]}}
            assert client.post("/v1/completions", json=body).status_code == 200
        pinned, plain = frontend.bodies
        assert "decode_worker_id" in pinned["nvext"]
        assert plain == body


def test_an_engine_that_does_not_know_the_wish_for_usage_is_asked_without():
    with router("1C") as (client, engines, _):
        engines[0].refuses = ("stream_options",)
        got = client.post("/v1/completions", json=STREAM)
        assert text_of(got.content) == " 0 1 2 3"
        assert engines[0].bodies[1] == STREAM


# A limit is of the event that it names


def test_an_answer_in_one_piece_may_take_longer_than_a_first_token():
    limits = ProxyLimits(first_token_s=0.2, total_s=5.0)
    for shape in ("1C", "1P1D"):
        with router(shape, limits=limits) as (client, engines, _):
            engines[-1].first_s = 0.6
            assert client.post("/v1/completions", json=BODY).status_code == 200
            assert client.post("/v1/completions", json=STREAM).status_code == 504


def test_an_answer_in_one_piece_is_bounded_by_the_total_limit():
    with router("1C", limits=ProxyLimits(total_s=0.3)) as (client, engines, _):
        engines[0].first_s = 5.0
        got = client.post("/v1/completions", json=BODY)
        assert (got.status_code, "took too long" in got.text) == (504, True)


def test_a_page_of_an_engine_that_hangs_is_not_waited_for_for_ever(monkeypatch):
    from voltana_ctrl.router.upstream import Upstream

    monkeypatch.setitem(Upstream.get.__kwdefaults__, "limit_s", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf, MockEngine("b") as other:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with router("2C", engines=[url, other]) as (client, _, _):
            assert client.get("/v1/models").json()["data"][0]["id"] == "mock"
            assert client.get("/version").json() == {"version": "mock"}


# The end of a connection is not the end of an answer


@pytest.mark.parametrize(
    "trouble", ["end after the role", "die after the role", "half a body until the end"]
)
def test_an_answer_without_an_end_is_had_again_before_its_first_token(trouble):
    body = CHAT if "role" in trouble else {**CHAT, "stream": False}
    with router("2C", policy="static-max") as (client, engines, _):
        engines[0].fail = [trouble]
        got = client.post("/v1/chat/completions", json=body)
        assert got.status_code == 200
        assert " 0 1 2 3" in (text_of(got.content) or got.text)
        assert value_of(client, "retries_total") == 1


@pytest.mark.parametrize(
    "trouble", ["end after two tokens", "close after two tokens", "abort after two tokens"]
)
def test_a_stream_without_an_end_has_broken_off(trouble):
    with router("1C") as (client, engines, proxy):
        engines[0].fail, engines[0].gap_s = [trouble], 0.05
        got = client.post("/v1/completions", json=STREAM)
        assert text_of(got.content) == " 0 1"
        # One error event, or the engine's own word of it.
        assert got.content.count(b'"error"') == (trouble != "abort after two tokens")
        assert value_of(client, "broken_streams_total") == 1
        assert proxy.metrics._told["streams"].total() == 0


@pytest.mark.parametrize("kept", ["finish_reason", "usage", "[DONE]"])
def test_any_of_the_three_signs_is_an_end(kept):
    """Engines leave out one or another of them."""
    events = {
        "finish_reason": b'data: {"choices": [{"text": " b", "finish_reason": "stop"}]}\n\n',
        "usage": b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n',
        "[DONE]": b"data: [DONE]\n\n",
    }

    class Terse(MockEngine):
        def events(self, path, body, headers, n):
            yield b'data: {"choices": [{"text": " a", "finish_reason": null}]}\n\n'
            yield events[kept]

    with router("1C", engines=[Terse("c")]) as (client, _, _):
        got = client.post(
            "/v1/completions", json={**STREAM, "stream_options": {"include_usage": True}}
        )
        assert b"error" not in got.content
        assert value_of(client, "broken_streams_total") == 0


def test_a_stream_of_several_sequences_needs_the_end_of_each():
    class Half(MockEngine):
        def events(self, path, body, headers, n):
            yield b'data: {"choices": [{"index": 0, "text": " a", "finish_reason": "stop"}]}\n\n'

    with router("1C", engines=[Half("c")]) as (client, _, _):
        got = client.post("/v1/completions", json={**STREAM, "n": 2})
        assert b'"error"' in got.content
        assert value_of(client, "broken_streams_total") == 1


@pytest.mark.parametrize("status", [600, 99, 204, 302])
def test_a_status_that_is_no_answer_is_had_again_or_told(status):
    with router("2C", policy="static-max") as (client, engines, _):
        engines[0].fail = [status]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        for engine in engines:
            engine.fail = [status] * 3
        got = client.post("/v1/completions", json=BODY)
        assert got.status_code in (502, 503)
        assert got.json()["error"]["code"] == got.status_code
        for engine in engines:
            engine.fail = []


# Events are not tokens


@pytest.mark.parametrize("shape", ["1C", "1P1D"])
def test_tokens_are_counted_by_the_engine_and_the_stream_is_as_it_was(shape):
    engines = [MockEngine(name, tokens=40) for name in fleet_of(shape).ids]
    engines[-1].tok_per_event, engines[-1].gap_s = 4, 0.02
    with router(shape, engines=engines) as (client, _, proxy):
        got = client.post("/v1/completions", json={**STREAM, "max_tokens": 40})
        assert b"usage" not in got.content
        assert got.content.count(b"data: {") == 10
        assert client.get(f"/v1/energy/{got.headers['x-request-id']}").json()["output_tok"] == 40
        # 5 ms a token, though 20 ms an event.
        page = client.get("/metrics").text
        itl_s = float(re.search(r"itl_seconds_sum\{.*\} (\S+)", page)[1])
        assert 0.004 < itl_s < 0.018
        assert (
            value_of(client, f'output_tokens_total{{serving_instance="{proxy.fleet.ids[-1]}"}}')
            == 40
        )


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"continuous": True}])
def test_usage_is_asked_for_in_the_clients_place(options):
    body = STREAM if options is None else {**STREAM, "stream_options": options}
    with router("1C") as (client, engines, _):
        got = client.post("/v1/completions", json=body)
        assert b"usage" not in got.content
        assert engines[0].bodies[0]["stream_options"] == {**(options or {}), "include_usage": True}


def test_a_stream_whose_tokens_nobody_tells_is_left_out_visibly():
    with router("1C") as (client, engines, proxy):
        engines[0].tells_usage = False
        got = client.post("/v1/completions", json=STREAM)
        assert text_of(got.content) == " 0 1 2 3"
        assert client.get(f"/v1/energy/{got.headers['x-request-id']}").status_code == 404
        assert value_of(client, "uncounted_total") == 1
        assert proxy.metrics._told["streams"].total() == 0


def test_a_broken_stream_is_charged_by_what_events_brought_before():
    engine = MockEngine("c", tokens=40)
    engine.tok_per_event = 4
    with router("1C", engines=[engine]) as (client, _, _):
        client.post("/v1/completions", json={**STREAM, "max_tokens": 40})
        engine.fail, engine.gap_s = ["die after two tokens"], 0.03
        got = client.post("/v1/completions", json={**STREAM, "max_tokens": 40})
        assert client.get(f"/v1/energy/{got.headers['x-request-id']}").json()["output_tok"] == 8


def test_comments_and_roles_are_no_tokens():
    engine = MockEngine("c", first_s=0.3)
    engine.pings_s = 0.05
    with router("1C", engines=[engine]) as (client, _, proxy):
        made = []
        take = proxy.counts.token
        proxy.counts.token = lambda flight, tok=1: made.append(tok) or take(flight, tok)
        client.post("/v1/chat/completions", json=CHAT)
        assert sum(made) == 4


# A client that waits hears something


def test_comments_of_engines_reach_the_client_before_the_first_token():
    engine = MockEngine("c", first_s=1.0)
    engine.pings_s = 0.1
    with router("1C", engines=[engine]) as (client, _, _):
        begin_s = time.monotonic()
        with client.stream("POST", "/v1/completions", json=STREAM) as got:
            chunks = got.iter_raw()
            assert b": ping" in next(chunks)
            assert time.monotonic() - begin_s < 0.6
            assert text_of(b"".join(chunks)) == " 0 1 2 3"


@pytest.mark.parametrize(("shape", "slow"), [("1C", 0), ("1P1D", 0), ("1P1D", 1)])
def test_a_router_that_waits_says_so_itself(shape, slow):
    limits = ProxyLimits(silence_s=0.1)
    with router(shape, limits=limits) as (client, engines, _):
        engines[slow].first_s = 0.6
        got = client.post("/v1/completions", json=STREAM)
        assert got.headers["content-type"].startswith("text/event-stream")
        assert got.content.startswith(b": still here\n\n")
        assert text_of(got.content) == " 0 1 2 3"
        # One in one piece is as it was.
        assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == " 0 1 2 3"


def test_a_client_that_heard_a_comment_still_loses_nothing():
    limits = ProxyLimits(silence_s=0.1, connect_s=1.0)
    with router("2C", limits=limits, policy="static-max") as (client, engines, _):
        engines[0].first_s, engines[0].fail = 0.4, ["die before the first token"]
        got = client.post("/v1/completions", json=STREAM)
        assert got.content.startswith(b": still here")
        assert text_of(got.content) == " 0 1 2 3"
        for engine in engines:
            engine.first_s, engine.fail = 0.4, ["die before the first token"] * 3
        got = client.post("/v1/completions", json=STREAM)
        assert got.status_code == 200
        last = got.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] in (502, 503)


# Hosts


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://[::1]:30000", "[::1]"),
        ("http://[2001:db8::7]:30000", "[2001:db8::7]"),
        ("http://10.0.0.1:30000", "10.0.0.1"),
        ("http://one.example:30000", "one.example"),
    ],
)
def test_a_host_is_told_as_it_stands_in_an_address(url, host):
    end = Endpoint(instance="p", kind="sglang", url=url, bootstrap_port=8998)
    assert sglang_meeting(end)["bootstrap_host"] == host
    assert sglang_meeting(end, prompts=2)["bootstrap_host"] == [host] * 2


def test_engines_and_router_on_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("needs IPv6")

    class Six(MockEngine):
        host = "::1"

    with router("1P1D", kind="sglang", engines=[Six("p"), Six("d")]) as (client, engines, _):
        assert client.post("/v1/completions", json=BODY).status_code == 200
        wait_for(lambda: engines[0].bodies)
        assert engines[0].bodies[0]["bootstrap_host"] == "[::1]"


# What only a router says


def test_a_client_cannot_say_what_only_a_router_does():
    odd = {
        "kv_transfer_params": {"remote_host": "10.0.0.9"}, "bootstrap_host": "10.0.0.9",
        "bootstrap_room": 1, "rid": "mine", "request_id": "mine", "data_parallel_rank": 3,
        "ec_transfer_params": {}, "nvext": {"backend_instance_id": 5, "extra_fields": ["timing"]},
    }  # fmt: skip
    headers = {"x-data-parallel-rank": "3", "x-prefiller-host-port": "10.0.0.9:1"}
    with router("1C") as (client, engines, _):
        client.post("/v1/completions", json={**BODY, **odd}, headers=headers)
        (_, seen, body) = engines[0].seen[0]
    assert body == {**BODY, "nvext": {"extra_fields": ["timing"]}}
    assert not set(headers) & set(seen)
    with router("1C", trusts_clients=True) as (client, engines, _):
        client.post("/v1/completions", json={**BODY, **odd}, headers=headers)
        (_, seen, body) = engines[0].seen[0]
    assert body == {**BODY, **odd}
    assert set(headers) <= set(seen)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "dynamo"])
def test_a_client_cannot_choose_where_a_cache_is_fetched(kind):
    odd = {"kv_transfer_params": {"remote_host": "10.0.0.9"}, "bootstrap_host": "10.0.0.9",
           "nvext": {"decode_worker_id": 5}}  # fmt: skip
    with router("1P1D", kind=kind, trusts_clients=True) as (client, engines, _):
        assert client.post("/v1/completions", json={**BODY, **odd}).status_code == 200
        assert all("10.0.0.9" not in json.dumps(engine.bodies) for engine in engines)
        if kind == "dynamo":
            assert engines[1].bodies[0]["nvext"]["decode_worker_id"] == 101


# Death is noticed without traffic


@pytest.mark.parametrize("how", ["killed", 503])
def test_a_death_is_known_before_a_request_meets_it(how):
    with router("2C", probe_s=0.2) as (client, engines, proxy):
        if how == "killed":
            engines[0].kill()
        else:
            engines[0].health = how
        wait_for(lambda: client.get("/health").json()["down"] == [proxy.fleet.ids[0]], 10.0)
        for _ in range(4):
            assert client.post("/v1/completions", json=BODY).status_code == 200
        assert value_of(client, "retries_total") == 0
        assert engines[0].seen == []
        # And a return, too.
        if how == "killed":
            engines[0].__enter__()
        engines[0].health = 200
        wait_for(lambda: client.get("/health").json()["down"] == [], 10.0)


@pytest.mark.parametrize("status", [404, 401])
def test_an_engine_without_the_page_lives(status):
    with router("1C", probe_s=0.05) as (client, engines, _):
        engines[0].health = status
        time.sleep(0.4)
        assert client.get("/health").json() == {"status": "ok", "down": []}


def test_an_engine_that_hangs_is_noticed_unless_its_tokens_come(monkeypatch):
    monkeypatch.setattr("voltana_ctrl.router.probe._ANSWER_S", 0.3)
    with router("1C", probe_s=0.05) as (client, engines, _):
        engines[0].tokens, engines[0].gap_s, engines[0].health = 40, 0.05, None
        done = []

        def ask():
            done.append(client.post("/v1/completions", json={**STREAM, "max_tokens": 40}))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: engines[0].streaming)
        down = []
        while not done:
            down += client.get("/health").json()["down"]
            time.sleep(0.05)
        asking.join()
        assert down == []
        wait_for(lambda: client.get("/health").json()["down"] == ["colocated-0"], 10.0)
        engines[0].health = 200


def out_of_reach(proxy, lost):
    """No packet comes back from an engine's machine any more; what is open stays open."""
    reached = proxy._upstream.get

    async def get(instance, path, headers=(), **limits):
        if instance == lost:
            raise UpstreamFailed("no packet", (lost,), down=True, is_unreachable=True)
        return await reached(instance, path, headers, **limits)

    proxy._upstream.get = get


@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize(("shape", "lost"), [("2C", 0), ("2P1D", 0), ("1P2D", 1)])
def test_what_waits_at_a_machine_out_of_reach_is_had_elsewhere(shape, lost, body, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.router.probe._AFTER_FAILURE_S", 0.05)
    with router(shape, probe_s=0.05) as (client, engines, proxy):
        engines[lost].fail = ["wait"]
        got = []
        asking = threading.Thread(
            target=lambda: got.append(client.post("/v1/completions", json=body))
        )
        asking.start()
        wait_for(lambda: engines[lost].seen)
        time.sleep(0.3)
        assert not got  # while its machine answers it is waited for
        out_of_reach(proxy, lost)
        asking.join(10.0)
        assert got[0].status_code == 200
        assert sum(len(engine.seen) for engine in engines if engine is not engines[lost]) >= 1
        assert value_of(client, "retries_total") == 1


def test_what_has_its_first_token_is_never_sent_again(monkeypatch):
    monkeypatch.setattr("voltana_ctrl.router.probe._AFTER_FAILURE_S", 0.05)
    with router("2C", policy="static-max", probe_s=0.05) as (client, engines, proxy):
        engines[0].tokens, engines[0].gap_s = 10, 2.0
        got = []
        body = {**STREAM, "max_tokens": 10}
        asking = threading.Thread(
            target=lambda: got.append(client.post("/v1/completions", json=body))
        )
        asking.start()
        wait_for(lambda: engines[0].streaming)
        time.sleep(0.3)
        out_of_reach(proxy, 0)
        asking.join(10.0)  # long before its tokens would be there
        assert "its engine is gone" in got[0].text
        assert text_of(got[0].content).startswith(" 0")
        assert engines[1].seen == []
        wait_for(lambda: engines[0].cancelled)


@pytest.mark.parametrize(
    ("error", "is_unreachable"),
    [
        ("ConnectionTimeoutError", True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        # The machine answers: a dead engine's connections were reset, a live one's go on.
        (OSError(errno.ECONNREFUSED, "refused"), False),
        ("ServerDisconnectedError", False),
    ],
)
def test_only_what_no_packet_answers_is_out_of_reach(error, is_unreachable):
    if isinstance(error, str):
        error = getattr(pytest.importorskip("aiohttp"), error)()
    with router("1C") as (_, _, proxy):
        assert proxy._upstream._silence(0, error).is_unreachable is is_unreachable


# Other paths


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(("shape", "kind"), [("1C", "vllm"), ("1P1D", "vllm"), ("1P1D", "dynamo")])
@pytest.mark.parametrize("stream", [False, True])
def test_other_ways_to_generate_are_passed_routed_and_paid_for(path, shape, kind, stream):
    body = {"model": "mock", "input": "hello", "max_output_tokens": 4, "stream": stream}
    with router(shape, kind=kind) as (client, engines, proxy):
        got = client.post(path, json=body)
        assert got.status_code == 200
        assert engines[-1].bodies == [body]
        assert got.content.count(b"event: ") in ((6, 8) if stream else (0,)) or stream
        energy = client.get(f"/v1/energy/{got.headers['x-request-id']}").json()
        assert (energy["prompt_tok"], energy["output_tok"]) == (7, 4)
        assert value_of(client, f'requests_total{{path="{path}",status="200"}}') == 1
        assert proxy.metrics._told["streams"].total() == stream


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_streams_are_had_again_and_end_as_they_should(path):
    body = {"model": "mock", "input": "hello", "stream": True}
    with router("2C", policy="static-max") as (client, engines, _):
        engines[0].fail = ["end after the role"]  # its first event says that an answer begins
        got = client.post(path, json=body)
        assert got.content.count(b"delta") >= 4
        assert value_of(client, "retries_total") == 1
        for engine in engines:
            engine.fail, engine.gap_s = ["end after two tokens"], 0.05
        got = client.post(path, json=body)
        assert b'data: {"error"' in got.content


def test_sglang_refuses_what_it_does_not_serve_apart():
    with router("1P1D", kind="sglang") as (client, engines, _):
        got = client.post("/v1/responses", json={"input": "x"})
        assert got.status_code == 400
        assert "/v1/chat/completions" in got.json()["error"]["message"]
        assert client.post("/tokenize", json={"prompt": "x"}).json()["count"] == 3
        assert engines[0].seen == []


def test_embeddings_cost_their_prompt():
    with router("1C") as (client, engines, _):
        engines[0].prompt_tok = 700
        got = client.post("/v1/embeddings", json={"model": "mock", "input": "x" * 2000})
        assert got.json()["usage"]["prompt_tokens"] == 700
        energy = client.get(f"/v1/energy/{got.headers['x-request-id']}").json()
        assert energy["prefill_j"] > 0.0
        assert (energy["decode_j"], energy["output_tok"]) == (0.0, 0)


# The page of metrics


def test_the_page_of_metrics_is_one_that_its_own_trade_reads(monkeypatch):
    import shutil
    import subprocess

    from prometheus_client.parser import text_string_to_metric_families

    from voltana_ctrl import FleetSpec, load_profile
    from voltana_ctrl.engines.endpoints import Endpoint
    from voltana_ctrl.router.app import Proxy

    names = ('a"b', "c\\d", "e\nf")
    fleet = FleetSpec.parse("3C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    object.__setattr__(fleet, "instances", tuple(
        type(one)(**{**{f: getattr(one, f) for f in one.__slots__}, "id": name})
        for one, name in zip(fleet.instances, names, strict=True)
    ))  # fmt: skip
    ends = [Endpoint(instance=name, kind="vllm", url="http://one") for name in fleet.ids]
    proxy = Proxy(fleet, ends, policy="static-max")
    page = proxy.metrics.page().decode()
    families = {one.name: one for one in text_string_to_metric_families(page)}
    assert [s.labels["serving_instance"] for s in families["voltana_router_down"].samples] == list(
        names
    )
    assert all(one.documentation for one in families.values())
    assert families["voltana_router_ttft_seconds"].type == "histogram"
    assert not any("instance" in s.labels for one in families.values() for s in one.samples)
    promtool = shutil.which("promtool")
    if promtool is not None:
        done = subprocess.run([promtool, "check", "metrics"], input=page, text=True,
                              capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_times_and_counts_are_told_by_instance():
    with router("1P2D") as (client, _, _):
        for _ in range(4):
            client.post("/v1/completions", json=STREAM)
        assert value_of(client, 'ttft_seconds_count{serving_instance="prefill-0"}') == 4
        sent = [
            value_of(client, f'sent_total{{phase="decode",serving_instance="decode-{k}"}}')
            for k in range(2)
        ]
        assert sum(sent) == 4
        ended = [
            value_of(client, f'itl_seconds_count{{serving_instance="decode-{k}"}}')
            for k in range(2)
        ]
        assert ended == sent


# Bodies


@pytest.mark.parametrize("content", [b" {}", b'{"a": 1}', b'\t{ "a" : 1 }\n', b"{\n}"])
def test_fields_are_added_and_the_rest_stays_byte_for_byte(content):
    from voltana_ctrl.router.body import spliced

    made = spliced(content, {"x": [1]})
    assert json.loads(made) == {**json.loads(content), "x": [1]}
    assert made.endswith(content[content.index(b"{") + 1 :])


def test_numbers_keep_their_digits_where_fields_are_added():
    content = b'{"prompt": "x", "seed": 12345678901234567890, "temperature": 0.10}'
    with router("1C") as (client, engines, _):
        engines[0].seen.clear()
        client.post("/v1/completions", content=content[:-1] + b', "stream": true}')
        assert engines[0].bodies[0]["seed"] == 12345678901234567890


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_reading_a_request_says_what_is_in_it(path):
    asked = read_request(b'{"prompt": ["ab", "cde"], "n": 2, "stream": true}', path=path)
    completes = path == "/v1/completions"
    assert (asked.sequences, asked.prompts, asked.chars) == (4 if completes else 1, 2, 5)
    assert (asked.options is not None) is completes


def test_a_long_body_is_read_elsewhere_to_the_same_effect():
    text = "y" * 300_000
    with router("1P1D") as (client, engines, proxy):
        for _ in range(2):
            got = client.post("/v1/completions", json={"prompt": text, "kv_transfer_params": {}})
            assert got.status_code == 200
        child = proxy._services.bodies._child
        assert child.poll() is None
        assert engines[0].bodies[0]["prompt"] == text
        assert engines[1].bodies[0]["kv_transfer_params"]["remote_engine_id"] == "prefill-0"
        assert client.post("/v1/completions", content=b"[" * 300_000).status_code == 400
        many = b'{"prompt": [' + b"[]," * 1_000_001 + b"[]]}"
        got = client.post("/v1/completions", content=many)
        assert (got.status_code, "1000000 values" in got.text) == (400, True)
        # Its death costs one request a clear word, and no other.
        child.kill()
        child.wait()
        assert client.post("/v1/completions", json={"prompt": text}).status_code == 200
    wait_for(lambda: proxy._services.bodies._child is None)


def test_long_bodies_share_a_budget_and_short_ones_pass():
    limits = ProxyLimits(held_bytes=200_000, body_s=20.0)
    with router("1C", limits=limits) as (client, _, proxy):
        address = ("127.0.0.1", client.base_url.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n"
        with socket.create_connection(address) as half:
            half.sendall(head + b'{"prompt": "' + b"x" * 190_000)
            # Whoever came meanwhile would have the share, and this one be refused.
            wait_for(lambda: proxy._services.budget.held_bytes > 170_000)
            refused = client.post("/v1/completions", json={"prompt": "y" * 100_000})
            assert refused.status_code == 429
            assert client.post("/v1/completions", json=BODY).status_code == 200
        wait_for(lambda: client.post("/v1/completions", json={"prompt": "y" * 100_000}
                                     ).status_code == 200)  # fmt: skip


@pytest.mark.parametrize("limit", [{"answer_bytes": 1 << 20}, {"held_bytes": 1 << 20}])
def test_an_answer_without_end_is_not_kept(limit):
    with router("2C", limits=ProxyLimits(**limit), policy="static-max") as (client, engines, _):
        engines[0].fail = ["an endless body"]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert value_of(client, "retries_total") == 1


def test_an_event_without_end_is_not_kept():
    class Endless(MockEngine):
        def events(self, path, body, headers, n):
            yield b'data: {"choices": [{"text": " a"}]}\n\ndata: {"'
            while True:
                yield b"x" * 65536

    limits = ProxyLimits(answer_bytes=1 << 20)
    with router("1C", engines=[Endless("c")], limits=limits) as (client, _, _):
        got = client.post("/v1/completions", json=STREAM)
        assert len(got.content) < 10_000
        assert b'"error"' in got.content


@contextmanager
def limited_to_three(opening):
    """A router that takes three connections, each of which has said this."""
    with router("1C", limits=ProxyLimits(connections=3)) as (client, _, _):
        address = ("127.0.0.1", client.base_url.port)
        client.close()
        with ExitStack() as ending:
            held = [ending.enter_context(socket.create_connection(address)) for _ in range(3)]
            for one in held:
                one.sendall(opening)
            time.sleep(0.2)
            yield address, held
        wait_for(lambda: httpx.get(f"http://{address[0]}:{address[1]}/health").status_code == 200)


def test_connections_with_requests_are_limited():
    begun = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
    with limited_to_three(begun) as (address, _):
        with socket.create_connection(address, timeout=20) as one:
            told = b"".join(iter(lambda: one.recv(65536), b""))
        assert told.split(b" ")[1] == b"503"
        assert b'"error"' in told


def heard(one):
    """What has become of a connection, after all that was sent on it."""
    try:
        while one.recv(65536):
            pass
    except TimeoutError:
        return "open"
    except ConnectionResetError:
        pass
    return "closed"


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(b"", id="nothing said"),
        pytest.param(b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", id="half a head"),
        pytest.param(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", id="idle after an answer"),
    ],
)
def test_connections_without_a_request_make_room_the_oldest_first(opening):
    with limited_to_three(opening) as (address, held):
        assert httpx.get(f"http://{address[0]}:{address[1]}/health", timeout=20).status_code == 200
        held[0].settimeout(20)
        assert heard(held[0]) == "closed"
        held[2].settimeout(0.2)
        assert heard(held[2]) == "open"


def test_an_engine_behind_a_certificate_of_ones_own(tmp_path):
    """Its authority is named, or it is not trusted."""
    import ssl
    import subprocess

    from voltana_ctrl.errors import ConfigError

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key,
         "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=False, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(cert, key)
    engine = MockEngine("c")
    engine.ssl = trust
    with router("1C", engines=[engine], engine_tls_ca=cert) as (client, _, _):
        assert client.post("/v1/completions", json=BODY).status_code == 200
        engine.seen.clear()
    with (
        engine,
        router("1C", engines=[engine]) as (client, _, _),
    ):
        assert client.post("/v1/completions", json=BODY).status_code == 503
    with (
        pytest.raises(ConfigError, match="tls-ca"),
        router("1C", engines=["http://one"], engine_tls_ca=tmp_path / "absent.pem"),
    ):
        pass
