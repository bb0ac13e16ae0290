"""Iterations in real time: as long as the profile says at the clock that runs."""

import asyncio
import time

import pytest

pytest.importorskip("prometheus_client", reason="needs the server extra")
pytest.importorskip("uvicorn", reason="needs the server extra")

import json
import threading

import httpx

from voltana_ctrl import load_profile
from voltana_ctrl.engines.emulated.app import EngineApp
from voltana_ctrl.engines.emulated.engine import EmulatedEngine, Punctuality
from voltana_ctrl.engines.in_engine import InEngine, InEngineSettings
from voltana_ctrl.engines.page import read_engine_page
from voltana_ctrl.laws import decode_s
from voltana_ctrl.serving.server import bounded_server, listen
from voltana_ctrl.types import InstanceSpec, Role

SLOW = "a100-sxm-80gb/llama-3.1-8b@20"


class Card:
    """A GPU whose clock a test sets."""

    def __init__(self, clock_mhz=1410.0):
        self.clock_mhz, self.drawn_w = clock_mhz, []

    def draw(self, power_w):
        self.drawn_w.append(power_w)


def engine_of(card, role=Role.COLOCATED, profile=SLOW, **settings):
    instance = InstanceSpec(id="e0", role=role, profile=load_profile(profile))
    return EmulatedEngine(instance, card, InEngine(InEngineSettings(), role), **settings)


def timed(engine, *, output_tok, at=()):
    """When each token came; `at` is (seconds, action) that happen meanwhile."""

    async def run():
        running = asyncio.create_task(engine.run())
        loop, begin_s = asyncio.get_running_loop(), time.monotonic()
        for after_s, action in at:
            loop.call_later(after_s, action)
        tokens = engine.generate(prompt_tok=50, output_tok=output_tok)
        times = [time.monotonic() - begin_s async for _ in tokens]
        running.cancel()
        return times

    return asyncio.run(run())


def step_s(engine, clock_mhz):
    one = engine.instance
    row = one.table[one.clocks_mhz == clock_mhz]
    return float(decode_s(row, 1.0, 60.0)[0])


def test_a_token_takes_what_the_profile_says_at_the_clock():
    spans = {}
    for clock_mhz in (1410.0, 705.0):
        engine = engine_of(Card(clock_mhz))
        times = timed(engine, output_tok=6)
        spans[clock_mhz] = (times[-1] - times[0]) / 5.0
        assert spans[clock_mhz] == pytest.approx(step_s(engine, clock_mhz), rel=0.15)
        assert engine.inside.iterations == engine.punctuality.iterations == 6
    assert spans[705.0] > 1.1 * spans[1410.0]


def test_what_is_left_of_an_iteration_goes_on_at_the_new_clock():
    card = Card(1410.0)
    engine = engine_of(card, profile="a100-sxm-80gb/llama-3.1-8b@100")
    fast_s, slow_s = step_s(engine, 1410.0), step_s(engine, 210.0)

    def lower():
        card.clock_mhz = 210.0

    times = timed(engine, output_tok=2, at=[(0.5 * fast_s, lower)])
    whole_s = times[-1]
    assert whole_s > 0.5 * fast_s + 0.5 * slow_s
    assert len(set(card.drawn_w)) >= 3  # prefill, decode, and decode at the lower clock


def test_an_engine_that_is_slower_than_its_profile_or_hangs():
    engine = engine_of(Card(), slow_frac=3.0)
    times = timed(engine, output_tok=4)
    assert (times[-1] - times[0]) / 3.0 == pytest.approx(3.0 * step_s(engine, 1410.0), rel=0.15)
    engine = engine_of(Card())
    engine.hung = True

    def thaw():
        engine.hung = False

    assert timed(engine, output_tok=1, at=[(0.8, thaw)])[0] > 0.8


def test_the_verdict_on_punctuality():
    assert not Punctuality(iterations=100, late=5).void
    assert Punctuality(iterations=100, late=6).void


@pytest.fixture
def served():
    engine = engine_of(Card(), profile="a100-sxm-80gb/llama-3.1-8b")
    server = bounded_server(EngineApp(engine), what="emulate", lifespan=True, drain_s=1.0)
    listening = listen("127.0.0.1", 0, what="emulate")
    thread = threading.Thread(target=server.run, args=(listening,), daemon=True)
    thread.start()
    yield engine, f"http://127.0.0.1:{listening[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20.0)


def post(url, path, body):
    return httpx.post(url + path, json=body, trust_env=False, timeout=60.0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_openai_api_whole_and_as_a_stream(served, path):
    _, url = served
    body = {"model": "x", "max_tokens": 5}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "one two three"}]
    else:
        body["prompt"] = [1, 2, 3]
    whole = post(url, path, body).json()
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in post(url, path, asked).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    assert events[-1]["usage"] == whole["usage"]
    choices = [one["choices"][0] for one in events if one["choices"]]
    assert [one.get("finish_reason") for one in choices][-1] == "length"
    assert len(choices) == 5 + ("chat" in path)
    page = read_engine_page("vllm", httpx.get(url + "/metrics", trust_env=False).text)
    assert (page["finished_req"], page["output_tok"], page["prompt_tok"]) == (2.0, 10.0, 6.0)
    assert page["running_req"] == page["queue_req"] == 0.0
    assert page["kv_capacity_tok"] == 450_000.0


def test_a_kv_cache_is_handed_over_as_vllm_does(served):
    _, url = served
    asked = {"prompt": [1] * 9, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    told = post(url, "/v1/completions", asked).json()["kv_transfer_params"]
    assert told["do_remote_prefill"] is True
    decode = {"prompt": [1] * 9, "max_tokens": 4, "kv_transfer_params": told}
    assert post(url, "/v1/completions", decode).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    "body", [{"max_tokens": -1}, {"max_tokens": "many"}, {"max_tokens": 10**9}, {"prompt": []}, []]
)
def test_what_does_not_fit_is_refused_in_json(served, body):
    _, url = served
    told = {"prompt": "a b", **body} if isinstance(body, dict) else body
    answer = post(url, "/v1/completions", told)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_faults_are_rehearsed_over_http(served):
    engine, url = served
    told = {"slow_frac": 2.5, "hung": True}
    assert post(url, "/emulate", told).json() == told
    for wrong in ({"slow_frac": 0}, {"slow_frac": True}, {"hung": "no"}, {"sloow_frac": 2.0}):
        assert post(url, "/emulate", wrong).status_code == 400
    assert (engine.slow_frac, engine.hung) == (2.5, True)
    told_now = httpx.get(url + "/emulate", trust_env=False).json()
    assert told_now["void"] is False
    assert (told_now["slow_frac"], told_now["hung"]) == (2.5, True)
