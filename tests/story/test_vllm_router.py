"""The router in front of real vLLM servers on a CPU: same bytes, nothing lost, KV caches handed on.

Run like ``tests/story/test_vllm.py``; takes three to four minutes.
"""

import asyncio
import contextlib
import json
import re
from dataclasses import dataclass

import httpx
import pytest

from tests.helpers.mock_engine import endpoints_of, fleet_of, serving
from tests.story.dynamo_stack import free_ports
from tests.story.vllm_stack import VllmServer, environment_folder, make_model
from voltana_ctrl.router.app import Proxy, ProxyLimits

pytestmark = pytest.mark.vllm

PATHS = {True: "/v1/chat/completions", False: "/v1/completions"}
# Of the same request with the same id, all that two answers of vLLM differ in.
CREATED = re.compile(rb'"created":\d+')
# Where a prompt was found differs with who prefilled it.
DETAILS = re.compile(rb',"prompt_tokens_details":(null|\{[^}]*\})')
LONG_TOK = 900
NIXL = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}


@dataclass(frozen=True)
class Ask:
    """A request, and what makes it the same one when it is asked again."""

    number: int
    chat: bool
    stream: bool
    max_tokens: int = 12
    seed: int | None = None

    @property
    def body(self):
        text = f"{self.number} the clock of a card falls and its power falls faster " * 3
        body = {"model": "tiny", "max_tokens": self.max_tokens, "ignore_eos": True}
        body |= {"stream": self.stream, "temperature": 0.0}
        if self.seed is not None:
            body |= {"temperature": 0.8, "seed": self.seed}
        if self.stream and self.number % 2:
            body["stream_options"] = {"include_usage": True}
        if self.chat:
            return {**body, "messages": [{"role": "user", "content": text}]}
        return {**body, "prompt": text}

    @property
    def name(self):
        return f"ask-{self.number}"


@dataclass(frozen=True)
class Told:
    status: int
    content: bytes
    headers: httpx.Headers

    @property
    def broke_off(self):
        return b'data: {"error"' in self.content


async def tell(client, url, ask, begun=None):
    """An answer; the request is in `begun` from its first byte to its last."""
    request = {"json": ask.body, "headers": {"x-request-id": ask.name}}
    content = b""
    async with client.stream("POST", url + PATHS[ask.chat], **request) as got:
        async for part in got.aiter_raw():
            if begun is not None:
                begun.add(ask)
            content += part
    if begun is not None:
        begun.discard(ask)
    # The router names requests itself, and vLLM puts the name into its answer.
    ours = got.headers.get("x-request-id", ask.name)
    content = content.replace(ours.encode(), ask.name.encode())
    return Told(got.status_code, CREATED.sub(b'"created":0', content), got.headers)


def gist(content):
    """Text of a stream, and all it tells besides, however vLLM has cut it into events.

    Tokens that are there when vLLM comes to write are sent as one event.
    """
    text, rest = "", []
    for event in content.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            # On a busy machine the router may have told that it waits.
            rest += [event.decode()] * (not event.startswith(b":"))
            continue
        told = json.loads(event[6:])
        is_told = not told.get("choices")
        for choice in told.get("choices", ()):
            part = choice.get("delta", choice)
            text += part.pop("text", "") or part.pop("content", "")
            is_told = is_told or choice["finish_reason"] is not None or "role" in part
        if is_told:
            rest.append(told)
    return text, rest


def client_of(**options):
    limits = httpx.Limits(max_connections=200, **options)
    return httpx.AsyncClient(timeout=120.0, trust_env=False, limits=limits)


def ask_all(url, asks, *, at_once=8):
    """Answers in order."""

    async def run():
        turn = asyncio.Semaphore(at_once)
        # vLLM closes idle connections after 5 s, httpx, too: one may be used as it closes.
        async with client_of(max_keepalive_connections=0) as client:

            async def one(ask):
                async with turn:
                    return await tell(client, url, ask)

            return await asyncio.gather(*map(one, asks))

    return asyncio.run(run())


@contextlib.contextmanager
def routed(shape, servers):
    """The router with patience for a busy machine; yields its address, and who decodes what."""
    fleet = fleet_of(shape)
    limits = ProxyLimits(connect_s=60.0, header_s=60.0)
    proxy = Proxy(fleet, endpoints_of(fleet, servers), policy="static-max", limits=limits)
    places, names = {}, {}
    begin, enter = proxy._upstream.begin, proxy.counts.enter_decode

    def named_begin(call, *others):
        names[call.flight.id] = (call.client_id or b"").decode()
        return begin(call, *others)

    def enter_decode(flight, instance):
        places[names[flight.id]] = instance
        enter(flight, instance)

    proxy._upstream.begin, proxy.counts.enter_decode = named_begin, enter_decode
    with serving(proxy) as server:
        yield server.url, places
        assert proxy.counts.total_req == 0


def router_counts(url):
    page = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = [line for line in page.splitlines() if line.startswith("voltana_router_")]
    pairs = [line.removeprefix("voltana_router_").rpartition(" ") for line in lines]
    return {name: float(value) for name, _, value in pairs}


@pytest.fixture(scope="module")
def venv():
    return environment_folder()


@pytest.fixture(scope="module")
def model(venv, tmp_path_factory):
    return make_model(venv, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def servers(venv, model, tmp_path_factory):
    """Three that do both phases; two of them are killed, one by one test each."""
    folder = tmp_path_factory.mktemp("colocated")
    with contextlib.ExitStack() as stack:
        made = [VllmServer(venv, model, folder / f"{k}.log") for k in range(3)]
        for server in made:
            stack.enter_context(server)
        for server in made:
            server.wait()
        yield made


def test_answers_through_the_router_are_byte_identical_to_direct_ones(servers):
    asks = [
        Ask(4 * k + 2 * chat + stream, chat, stream, seed=k if k % 2 else None)
        for k in range(20)
        for chat in (False, True)
        for stream in (False, True)
    ]
    direct = ask_all(servers[0].url, asks)
    before = [server.counters("request_success_total") for server in servers[:2]]
    with routed("2C", servers[:2]) as (url, _):
        through = ask_all(url, asks)
        after = [server.counters("request_success_total") for server in servers[:2]]
        pages = [httpx.get(f"{one}/v1/models", trust_env=False) for one in (url, servers[0].url)]
        refused = [
            httpx.post(
                f"{one}/v1/completions", json={"model": "no", "prompt": "a"}, trust_env=False
            )
            for one in (url, servers[0].url)
        ]
        for ask, one, other in zip(asks, through, direct, strict=True):
            assert one.status == other.status == 200
            assert one.headers["content-type"] == other.headers["content-type"]
            assert one.headers["x-client-request-id"] == ask.name
            assert ("x-voltana-energy" in one.headers) is not ask.stream
            if not ask.stream:
                assert one.content == other.content
                continue
            assert gist(one.content) == gist(other.content)
            assert one.content.endswith(b"data: [DONE]\n\n")
            # Cut into events otherwise by chance: the next time it is not.
            for _ in range(20):
                if one.content == other.content:
                    break
                one, other = (ask_all(to, [ask])[0] for to in (url, servers[0].url))
            assert one.content == other.content
    # Each was answered once, and both servers had work.
    grown = [
        now["request_success_total"] - then["request_success_total"]
        for now, then in zip(after, before, strict=True)
    ]
    assert sum(grown) == 80
    assert min(grown) >= 30
    assert [page.json()["data"][0]["id"] for page in pages] == ["tiny"] * 2
    assert refused[0].status_code == refused[1].status_code == 404
    assert refused[0].content == refused[1].content


def killed_while_asked(url, asks, places, victim, kill):
    """Answers to requests that keep coming; the victim dies amid streams and waiting requests."""
    told, begun = {}, set()
    long = [ask for ask in asks if ask.max_tokens == LONG_TOK]
    short = [ask for ask in asks if ask.max_tokens != LONG_TOK]

    async def run():
        async with client_of() as client:

            async def one(ask, after_s=0.0):
                await asyncio.sleep(after_s)
                told[ask] = await tell(client, url, ask, begun)

            tasks = [asyncio.ensure_future(one(ask)) for ask in long]
            while sum(places[ask.name] == victim for ask in begun) < 2:
                assert len(told) < len(long)
                await asyncio.sleep(0.005)
            waits_s = [0.03 * max(0, k - 16) for k in range(len(short))]
            tasks += [
                asyncio.ensure_future(one(*each)) for each in zip(short, waits_s, strict=True)
            ]

            def waiting(ask):
                return places.get(ask.name) == victim and ask not in begun and ask not in told

            while sum(map(waiting, short)) < 3:
                assert len(told) < len(asks)
                await asyncio.sleep(0.001)
            await asyncio.to_thread(kill)
            await asyncio.gather(*tasks)

    asyncio.run(run())
    return told


def mixed_asks(n, first):
    """Short requests of all sorts after eight long streams, which go to all servers in turn."""
    long = [Ask(first + k, chat=k < 4, stream=True, max_tokens=LONG_TOK) for k in range(8)]
    sorts = [(chat, stream) for chat in (False, True) for stream in (True, True, False)]
    return long + [Ask(first + k, *sorts[k % 6], max_tokens=40) for k in range(8, n)]


def lost_nothing(told, expected, *, error_code):
    """Hold answers to those of a server that lived; how many broke off, how many were retried."""
    broken = retried = 0
    for ask, whole in expected.items():
        got = told[ask]
        assert got.status == 200, got
        # Every further attempt has an id of its own, which vLLM puts into its answer.
        content, ids = re.subn(rf"{ask.name}-\d".encode(), ask.name.encode(), got.content)
        retried += ids > 0
        if not got.broke_off:
            same = gist if ask.stream else bytes
            assert same(content) == same(whole.content)
            continue
        # It had begun. What came is the beginning of the answer, and then one error.
        broken += 1
        begun, besides = gist(content)
        assert ask.stream
        assert gist(whole.content)[0].startswith(begun)
        errors = [event["error"]["code"] for event in besides if "error" in event]
        assert errors == [error_code]
    return broken, retried


@pytest.mark.parametrize("how", ["engine core", "whole server"])
def test_a_server_killed_mid_run_loses_no_request_that_had_not_begun(servers, how):
    alive, victim = servers[0], servers[1 if how == "whole server" else 2]
    kill = victim.kill if how == "whole server" else victim.kill_engine_core
    asks = mixed_asks(120, 1000)
    with routed("2C", [alive, victim]) as (url, places):
        told = killed_while_asked(url, asks, places, 1, kill)
        counts = router_counts(url)
        health = httpx.get(f"{url}/health", trust_env=False)
        # And those that come later.
        later = ask_all(url, [Ask(5000 + k, chat=False, stream=True) for k in range(8)])
    assert len(told) == 120
    expected = dict(zip(asks, ask_all(alive.url, asks), strict=True))
    # The server of a dead engine tells of it itself.
    code = 500 if how == "engine core" else 502
    broken, retried = lost_nothing(told, expected, error_code=code)
    # How many of each is chance: a busy server may send a long stream all at once, at its end.
    assert broken + retried >= 2
    assert counts["retries_total"] >= retried
    assert counts["broken_streams_total"] == broken
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert all(one.status == 200 and not one.broke_off for one in later)


@pytest.fixture(scope="module")
def apart(venv, model, tmp_path_factory):
    """One that prefills and two that decode, KV caches going over NIXL."""
    if not list(venv.glob("lib/*/site-packages/nixl")):
        pytest.skip("needs nixl in the environment of vLLM; build it anew")
    folder = tmp_path_factory.mktemp("apart")
    with contextlib.ExitStack() as stack:
        made = []
        for k, port in enumerate(free_ports(3)):
            role = "kv_producer" if k == 0 else "kv_consumer"
            options = (
                "--kv-transfer-config", json.dumps({**NIXL, "kv_role": role}),
                "--no-enable-prefix-caching", "--enable-prompt-tokens-details",
                "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
            )  # fmt: skip
            variables = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), "UCX_TLS": "tcp,self"}
            server = VllmServer(venv, model, folder / f"{k}.log", *options, **variables)
            made.append(stack.enter_context(server))
        for server in made:
            server.wait()
        yield made


def prompt_sources(server):
    """Prompt tokens by where their KV cache came from."""
    told = {}
    for line in httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines():
        found = re.match(r'vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)', line)
        if found:
            told[found[1]] = told.get(found[1], 0.0) + float(found[2])
    return told


def test_kv_caches_go_from_prefill_to_decode_and_answers_stay_the_same(apart):
    decode = apart[1]
    # Odd ones tell their usage in streams, too.
    asks = [Ask(101 + 2 * k, chat=k % 2 < 1, stream=k % 4 < 2) for k in range(40)]
    with routed("1P2D", apart) as (url, _):
        through = ask_all(url, asks)
        energies = [
            httpx.get(f"{url}/v1/energy/{one.headers['x-request-id']}", trust_env=False).json()
            for one in through
        ]
    sources = [prompt_sources(server) for server in apart]
    prompt_tok = sum(energy["prompt_tok"] for energy in energies)
    # Every prompt was computed in the prefill engine, and every token of it handed over. (On a
    # busy machine a decode engine may fail to fetch it; the request is then sent anew.)
    assert sources[0]["local_compute"] >= prompt_tok
    assert [source["local_compute"] for source in sources[1:]] == [0, 0]
    moved = [source["external_kv_transfer"] for source in sources[1:]]
    assert sum(moved) == prompt_tok
    assert min(moved) > 0.3 * prompt_tok
    # A prompt whose KV cache came over the network was not found in a cache: it is paid for.
    assert all(energy["prefill_j"] > 0 for energy in energies)
    # A decode engine asked directly prefills for itself, and says the same.
    direct = ask_all(decode.url, asks)
    for ask, one, other in zip(asks, through, direct, strict=True):
        assert one.status == other.status == 200
        same = gist if ask.stream else bytes
        assert same(DETAILS.sub(b"", one.content)) == same(DETAILS.sub(b"", other.content))


SCHEMA = {
    "type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}]
WORDS = "the clock of a card falls and its power falls faster " * 3
CHATS = {"messages": [{"role": "user", "content": WORDS}]}
#: What is said besides, and whether one KV cache can be handed over for it.
FORMS = {
    "texts": ({"prompt": [WORDS, WORDS + "many", "prompts wait"]}, False),
    "token ids": ({"prompt": [[5, 6, 7, 8] * 9, [9, 8, 7] * 9]}, False),
    "a list of one": ({"prompt": [WORDS]}, True),
    "two samples": ({"prompt": WORDS, "n": 2, "temperature": 0.8, "seed": 4}, False),
    "samples of texts": ({"prompt": [WORDS, "wait"], "n": 2, "temperature": 0.8, "seed": 4}, False),
    "two chats": ({**CHATS, "n": 2, "temperature": 0.8, "seed": 4}, False),
    "beams": ({"prompt": WORDS, "n": 2, "use_beam_search": True}, False),
    "echo": ({"prompt": WORDS, "echo": True, "logprobs": 1}, False),
    "logprobs of the prompt": ({"prompt": WORDS, "prompt_logprobs": 1}, False),
    "cut prompt": ({"prompt": WORDS * 40, "truncate_prompt_tokens": -1}, False),
    "logprobs": ({"prompt": WORDS, "logprobs": 2}, True),
    "logprobs of a chat": ({**CHATS, "logprobs": True, "top_logprobs": 2}, True),
    "stop": ({"prompt": WORDS, "stop": ["a", "e"], "min_tokens": 2}, True),
    "bias": ({"prompt": WORDS, "logit_bias": {"70": 100}, "bad_words": ["the"]}, True),
    "tools": ({**CHATS, "tools": TOOLS, "tool_choice": "none"}, True),
    "tool required": ({**CHATS, "tools": TOOLS, "tool_choice": "required"}, False),
    "tool named": ({**CHATS, "tools": TOOLS,
                    "tool_choice": {"type": "function", "function": {"name": "pick"}}}, False),
    "JSON": ({**CHATS, "response_format": {"type": "json_object"}}, True),
    "schema": ({**CHATS, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": SCHEMA}}}, True),
    "choice": ({"prompt": WORDS, "structured_outputs": {"choice": ["one", "two"]}}, True),
}  # fmt: skip
RANDOM_IDS = re.compile(r'"(chatcmpl-tool|call|cmpl|chatcmpl)-[\w-]+"')


def normal(got):
    """Of an answer or all events of a stream, what two answers to the same have in common."""
    text = DETAILS.sub(b"", CREATED.sub(b'"created":0', got.content)).decode()
    return RANDOM_IDS.sub('"id"', text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_requests_of_every_form_are_answered_as_by_one_engine(form, stream, apart):
    fields, is_handed_over = FORMS[form]
    if stream and ("use_beam_search" in fields or "prompt_logprobs" in fields):
        pytest.skip("vLLM does not stream it")
    body = {"model": "tiny", "max_tokens": 24, "temperature": 0.0, **fields, "stream": stream}
    path = PATHS["messages" in fields]
    with routed("1P1D", apart[:2]) as (url, _):
        before = [prompt_sources(server) for server in apart[:2]]
        through = httpx.post(url + path, json=body, trust_env=False, timeout=60.0)
        after = [prompt_sources(server) for server in apart[:2]]
    direct = httpx.post(apart[1].url + path, json=body, trust_env=False, timeout=60.0)
    assert through.status_code == direct.status_code == 200, through.text
    if not stream:
        assert normal(through) == normal(direct)
    else:
        assert _texts(through) == _texts(direct)
        assert b"usage" not in through.content
    grown = [
        {key: now[key] - then.get(key, 0.0) for key in now}
        for then, now in zip(before, after, strict=True)
    ]
    # One cache was handed over, or the prefill engine was not asked.
    assert (grown[1].get("external_kv_transfer", 0) > 0) is is_handed_over
    assert (grown[0].get("local_compute", 0) > 0) is is_handed_over


def _texts(got):
    """Text, calls and end of each sequence of a stream, however it is cut into events."""
    told = {}
    for event in got.text.split("\n\n"):
        if not event.startswith("data: {"):
            continue
        for choice in json.loads(event[6:]).get("choices", ()):
            one = told.setdefault(choice["index"], ["", "", None])
            part = choice.get("delta", choice)
            one[0] += part.get("text") or part.get("content") or ""
            for call in part.get("tool_calls") or ():
                one[1] += call["function"].get("arguments") or ""
            one[2] = choice.get("finish_reason") or one[2]
    return told


def test_a_decode_engine_killed_mid_run_loses_no_request_that_had_not_begun(apart):
    prefill, alive, victim = apart
    asks = mixed_asks(90, 2000)
    with routed("1P2D", apart) as (url, places):
        told = killed_while_asked(url, asks, places, 2, victim.kill)
        counts = router_counts(url)
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok"
        expected = {}
        for ask, whole in zip(asks, ask_all(alive.url, asks), strict=True):
            expected[ask] = Told(whole.status, DETAILS.sub(b"", whole.content), whole.headers)
            told[ask] = Told(
                told[ask].status, DETAILS.sub(b"", told[ask].content), told[ask].headers
            )
        broken, retried = lost_nothing(told, expected, error_code=502)
        # Which of the two is chance: prompts may be handed over late, when long streams have ended.
        assert broken + retried >= 2
        assert counts["broken_streams_total"] == broken
        # Without its only prefill engine it says so.
        prefill.kill()
        (none,) = ask_all(url, [Ask(3000, chat=False, stream=True)])
        assert none.status == 503
        assert none.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 503
