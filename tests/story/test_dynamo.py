"""Against NVIDIA Dynamo itself: its messages, its metrics, its workers pinned by us.

``pytest -m dynamo``. The first run builds a virtual environment of its own (about a minute and
0.5 GB, kept in the cache folder or where ``VOLTANA_DYNAMO_ENV`` says); a run takes half a
minute more.
"""

import asyncio
import contextlib
import json
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest

from tests.helpers.mock_engine import serving
from tests.story.dynamo_stack import DynamoStack, environment_python, random_prompt
from voltana_ctrl import ControlLoop, Slo
from voltana_ctrl.backends.modelled import ModelledGpus
from voltana_ctrl.engines.fpm.reader import FpmReader, dynamo_fpm_addresses
from voltana_ctrl.engines.page import read_engine_page
from voltana_ctrl.engines.scrape import Scraper
from voltana_ctrl.engines.telemetry import EngineBackend
from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.live.governed import PolicyController, fleet_policy, node_governors
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.hub_app import hub_app
from voltana_ctrl.live.link import ControllerLink
from voltana_ctrl.live.remote import RemoteController
from voltana_ctrl.live.subscription import SubscribedRouters, Subscription
from voltana_ctrl.router.app import Proxy
from voltana_ctrl.serving.server import ServerThread

pytestmark = pytest.mark.dynamo

SLO = Slo(ttft_s=0.6, itl_s=0.06)
TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with DynamoStack(tmp_path_factory.mktemp("dynamo"), environment_python()) as made:
        yield made


@pytest.fixture(scope="module")
def colocated(stack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colocated")
    with DynamoStack(folder, stack.python, shape="2C", model=stack.model) as made:
        yield made


@contextlib.contextmanager
def listening(stack):
    made = FpmReader(stack.fleet, stack.endpoints, addresses=dynamo_fpm_addresses(stack.discovery))
    wait_until(lambda: np.isfinite(made.read(time.monotonic())[0].age_s).all())
    yield made
    made.close()


@pytest.fixture
def reader(stack):
    with listening(stack) as made:
        yield made


def wait_until(condition, limit_s=20.0):
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < limit_s
        time.sleep(0.05)


def body(prompt, max_tokens, pins=None):
    nvext = {"extra_fields": ["worker_id"], **(pins or {})}
    return {
        "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True,
        "nvext": nvext,
    }  # fmt: skip


async def send_all(stack, bodies, rate_req_s):
    """Answers in order; one a body, sent at a steady rate."""
    async with httpx.AsyncClient(timeout=30.0, trust_env=False) as client:

        async def send(k, make):
            await asyncio.sleep(k / rate_req_s)
            answer = await client.post(f"{stack.url}/v1/completions", json=make())
            assert answer.status_code == 200, answer.text
            return answer.json()

        return await asyncio.gather(*(send(k, make) for k, make in enumerate(bodies)))


def drained(reader):
    """All iterations until every engine has been idle for a while."""
    rows = []

    def idle():
        reading, new = reader.read(time.monotonic())
        rows.append(new)
        return not len(new) and reading.queue_req.sum() == reading.running_req.sum() == 0

    time.sleep(0.3)
    wait_until(lambda: idle() and all(not len(new) for new in rows[-5:]) and len(rows) > 5)
    names = ("instance", "wall_s", "batch_req", "prefill_tok", "kv_tok")
    return {name: np.concatenate([getattr(one, name) for one in rows]) for name in names}


def test_forward_passes_add_up_to_what_dynamo_counts(stack, reader):
    rng = np.random.default_rng(1)
    lost_before = reader.counts.lost
    reader.read(time.monotonic())
    before = stack.counters()
    prompts = [random_prompt(rng, 8, 400) for _ in range(300)]
    lengths = rng.integers(2, 24, size=300)
    answers = asyncio.run(
        send_all(
            stack,
            [lambda p=p, n=n: body(p, int(n)) for p, n in zip(prompts, lengths, strict=True)],
            60.0,
        )
    )
    rows = drained(reader)
    after = stack.counters()
    counted = {name: after[name] - before[name] for name in after}
    assert counted["requests"] == len({one["id"] for one in answers}) == 300
    assert counted["output_tok"] == lengths.sum()
    assert counted["prompt_tok"] == sum(len(prompt) for prompt in prompts)
    fleet = stack.fleet
    prefill, decode = (np.isin(rows["instance"], part) for part in (fleet.prefill, fleet.decode))
    # Every message arrived: prompt tokens were computed once, output tokens decoded once.
    assert reader.counts.lost == lost_before
    assert (reader.counts.bad, reader.counts.other_version, reader.counts.strangers) == (0, 0, 0)
    assert rows["prefill_tok"][prefill].sum() == counted["prompt_tok"] - counted["cached_tok"]
    assert rows["batch_req"][decode].sum() == counted["output_tok"]
    assert (rows["wall_s"] > 0).all()
    assert rows["prefill_tok"][decode].sum() == 0
    # Each request decodes over its prompt and what it has written.
    kv_tok = sum(
        len(prompt) * n + n * (n - 1) / 2 for prompt, n in zip(prompts, lengths, strict=True)
    )
    assert rows["kv_tok"][decode].sum() == pytest.approx(kv_tok, rel=0.01)


def test_arrivals_are_counted_from_the_balance(stack, reader):
    rng = np.random.default_rng(2)
    fleet = stack.fleet
    reader.read(time.monotonic())
    arrived = np.zeros(len(fleet))

    async def load():
        task = asyncio.ensure_future(
            send_all(stack, [lambda: body(random_prompt(rng, 50, 300), 4)] * 100, 50.0)
        )
        while not task.done():
            arrived[:] += reader.read(time.monotonic())[0].arrived_req
            await asyncio.sleep(0.1)
        await task

    asyncio.run(load())
    time.sleep(0.3)
    arrived += reader.read(time.monotonic())[0].arrived_req
    assert arrived[fleet.prefill].sum() == 100
    assert arrived[fleet.decode].sum() <= 100


def test_pins_of_our_router_are_obeyed(stack):
    fleet, endpoints = stack.fleet, stack.endpoints
    rng = np.random.default_rng(3)
    wanted, bodies = [], []
    for _ in range(60):
        prefill, decode = (
            endpoints[int(rng.choice(part))].worker_id for part in (fleet.prefill, fleet.decode)
        )
        wanted.append((prefill, decode))
        pins = {"prefill_worker_id": prefill, "decode_worker_id": decode}
        bodies.append(lambda pins=pins: body(random_prompt(rng, 8, 60), 3, pins))
    answers = asyncio.run(send_all(stack, bodies, 60.0))
    served = [one["nvext"]["worker_id"] for one in answers]
    assert [(one["prefill_worker_id"], one["decode_worker_id"]) for one in served] == wanted


def ask_the_router(stack, policy, prompts, lengths):
    """Events of the answers, every other one streamed; energies, with places; the metrics page."""
    proxy = Proxy(stack.fleet, stack.endpoints, policy=policy)
    ids = {}

    async def run(url):
        async with httpx.AsyncClient(base_url=url, timeout=30.0, trust_env=False) as client:

            async def one(k):
                await asyncio.sleep(k / 60.0)
                asked = body(prompts[k], int(lengths[k]))
                if k % 2:
                    asked |= {"stream": True, "stream_options": {"include_usage": True}}
                got = await client.post("/v1/completions", json=asked)
                assert got.status_code == 200, got.text
                ids[k] = got.headers["x-request-id"]
                if not k % 2:
                    return [got.json()]
                *events, done, rest = got.text.split("\n\n")
                assert (done, rest) == ("data: [DONE]", "")
                return [json.loads(event.removeprefix("data: ")) for event in events]

            answers = await asyncio.gather(*map(one, range(len(prompts))))
            spent = [(await client.get(f"/v1/energy/{ids[k]}")).json() for k in range(len(prompts))]
            return answers, spent, (await client.get("/metrics")).text

    with serving(proxy) as server:
        return asyncio.run(run(server.url))


@pytest.mark.parametrize("shape", ["2P2D", "2C"])
def test_our_router_answers_once_from_the_workers_it_pinned(shape, stack, request):
    if shape == "2C":
        stack = request.getfixturevalue("colocated")
    rng = np.random.default_rng(6)
    n = 200
    prompts = [random_prompt(rng, 8, 200) for _ in range(n)]
    lengths = rng.integers(2, 16, size=n)
    with listening(stack) as reader:
        drained(reader)
        before = stack.counters()
        policy = "static-max" if shape == "2C" else "static-max+least-queue/jsq"
        answers, spent, page = ask_the_router(stack, policy, prompts, lengths)
        rows = drained(reader)
        counted = {name: value - before[name] for name, value in stack.counters().items()}
        assert reader.counts.lost == 0
    # Once each, as far as client, router and Dynamo can tell.
    assert len({events[0]["id"] for events in answers}) == n
    assert counted["requests"] == n
    assert counted["output_tok"] == lengths.sum()
    assert counted["prompt_tok"] == sum(map(len, prompts))
    usages = [events[-1]["usage"] for events in answers]
    assert [usage["prompt_tokens"] for usage in usages] == [len(prompt) for prompt in prompts]
    assert [usage["completion_tokens"] for usage in usages] == lengths.tolist()
    assert 'requests_total{path="/v1/completions",status="200"} 200.0' in page
    for name in ("retries", "broken_streams", "cancelled"):
        assert f"voltana_router_{name}_total 0.0" in page
    # A stream is one: its tokens come one by one.
    assert all(len(answers[k]) > lengths[k] for k in range(1, n, 2))
    # Where the router wanted each, as the frontend says ...
    index = {name: i for i, name in enumerate(stack.fleet.ids)}
    wanted = {
        phase: np.array([index[one[f"{phase}_instance"]] for one in spent])
        for phase in ("prefill", "decode")
    }
    for phase, places in wanted.items():
        served = [events[0]["nvext"]["worker_id"][f"{phase}_worker_id"] for events in answers]
        assert served == [stack.endpoints[i].worker_id for i in places]
    # ... and as the workers' own messages say.
    sizes = np.array([len(prompt) for prompt in prompts])
    for i in range(len(stack.fleet)):
        mine = rows["instance"] == i
        prompt_tok = sizes[wanted["prefill"] == i].sum()
        assert rows["prefill_tok"][mine].sum() == prompt_tok
        # Where a worker does both, the first token comes with its prefill.
        output_tok = (lengths - (shape == "2C"))[wanted["decode"] == i].sum()
        assert rows["batch_req"][mine].sum() == output_tok
        assert prompt_tok + output_tok > 0


class Keep:
    def __init__(self):
        self.records = []

    def on_tick(self, record):
        self.records.append(record)


@contextlib.contextmanager
def one_controller(stack):
    """Controller, node and router, each on its end of HTTP; what the controller decided."""
    fleet, kept = stack.fleet, Keep()
    with contextlib.ExitStack() as ending:
        hub = HubBackend(fleet)
        server = ending.enter_context(ServerThread(hub_app(hub, TOKEN), what="controller"))
        at = f"http://127.0.0.1:{server.port}"
        reads = EngineBackend(
            fleet, stack.endpoints, gpus=ModelledGpus(fleet), pairs=False,
            fpm_addresses=dynamo_fpm_addresses(stack.discovery),
        )  # fmt: skip
        wait_until(lambda: reads.read().state.alive.all())
        link = ending.enter_context(ControllerLink(at, TOKEN, fleet, "n0", fleet.ids))
        obeys = PolicyController(
            fleet, inner=RemoteController(fleet, link), routed=lambda: True,
            governors=node_governors(fleet, SLO, "mpc"),
        )  # fmt: skip
        node = ending.enter_context(ControlLoop(reads, obeys))
        decides = ending.enter_context(
            ControlLoop(hub, fleet_policy(fleet, SLO, "mpc", routed=hub.routed), observers=[kept])
        )
        for loop in (node, decides):
            loop.start()
        routers, traffic = SubscribedRouters(fleet, "mpc", SLO), Traffic(len(fleet))
        proxy = Proxy(fleet, stack.endpoints, routers=routers, traffic=traffic)
        line = ControllerLink(at, TOKEN, fleet, "r0", fleet.ids, kind="router")
        ending.enter_context(line)
        told = ending.enter_context(Subscription(line, routers, proxy.counts, traffic))
        proxy.watch(told)
        yield ending.enter_context(serving(proxy)), kept.records, routers


def test_one_controller_consolidates_and_the_router_follows(stack):
    fleet, endpoints = stack.fleet, stack.endpoints
    rng = np.random.default_rng(4)
    asked = {}

    async def send(url):
        async with httpx.AsyncClient(base_url=url, timeout=30.0, trust_env=False) as client:

            async def one(k):
                await asyncio.sleep(k / 25.0)
                sent_s = time.monotonic()
                got = await client.post(
                    "/v1/completions", json=body(random_prompt(rng, 50, 300), 16)
                )
                assert got.status_code == 200, got.text
                asked[got.headers["x-request-id"]] = sent_s, got.json()

            await asyncio.gather(*map(one, range(300)))
            return {name: (await client.get(f"/v1/energy/{name}")).json() for name in asked}

    with one_controller(stack) as (server, records, routers):
        wait_until(lambda: not routers.alone)
        begin_s, first = time.monotonic(), len(records)
        spent = asyncio.run(send(server.url))
        ran_s = time.monotonic() - begin_s
        records = records[first:]
    # Every answer once, from the workers that our router pinned.
    assert len({answer["id"] for _, answer in asked.values()}) == 300
    index = {name: i for i, name in enumerate(fleet.ids)}
    decoded = {name: index[one["decode_instance"]] for name, one in spent.items()}
    for name, (_, answer) in asked.items():
        served = answer["nvext"]["worker_id"]
        assert served["decode_worker_id"] == endpoints[decoded[name]].worker_id
        prefilled = index[spent[name]["prefill_instance"]]
        assert served["prefill_worker_id"] == endpoints[prefilled].worker_id
    # Every engine alive, none stale, and busy in front of the controller's eyes.
    assert len(records) > 40
    states = [record.observation.state for record in records]
    assert all(state.alive.all() for state in states)
    assert sum(len(record.observation.iterations) for record in records) > 300
    assert sum(len(record.observation.finished) for record in records) > 250
    # So little load fits one decode instance: the other is parked, and gets nothing.
    late = records[len(records) // 2 :]
    active = np.array([record.applied.active[fleet.decode].sum() for record in late])
    assert np.median(active) == 1, active
    parked = [i for i in fleet.decode if not np.any([record.applied.active[i] for record in late])]
    assert len(parked) == 1
    since_s = begin_s + ran_s / 2.0 + 1.0
    late_ids = [name for name, (sent_s, _) in asked.items() if sent_s > since_s]
    assert len(late_ids) > 50
    assert not [name for name in late_ids if decoded[name] in parked]


def test_live_pages_are_read(stack):
    fleet, url = stack.fleet, stack.url
    asyncio.run(send_all(stack, [lambda: body([5] * 100, 8)] * 20, 40.0))
    page = httpx.get(f"http://127.0.0.1:{stack.decode_port}/metrics", trust_env=False).text
    told = read_engine_page("dynamo", page)
    assert {"running_req", "queue_req", "kv_frac"} <= set(told), told
    assert told["running_req"] == 0
    with_urls = [replace(endpoint, metrics_url=f"{url}/metrics") for endpoint in stack.endpoints]
    scraper = Scraper(fleet, with_urls, period_s=0.1)
    wait_until(lambda: not scraper.problems)
    reading = scraper.read(time.monotonic())
    assert (reading.age_s < 1.0).all()
    assert (reading.kv_used_tok == 0).all()
    scraper.close()


def test_killed_engines_are_seen_dead_and_delay_nobody(stack):
    # The last test: it kills both decode engines.
    fleet = stack.fleet
    addresses = dynamo_fpm_addresses(stack.discovery)
    backend = EngineBackend(
        fleet, stack.endpoints, gpus=ModelledGpus(fleet), fpm_addresses=addresses, scrape=False,
        alive_s=3.0,
    )  # fmt: skip
    wait_until(lambda: backend.read().state.alive.all())
    stack.processes[1].kill()
    took_s = []

    def seen():
        begin_s = time.perf_counter()
        alive = backend.read().state.alive
        took_s.append(time.perf_counter() - begin_s)
        return not alive[fleet.decode].any() and alive[fleet.prefill].all()

    wait_until(seen)
    assert np.median(took_s) < 0.02
    backend.close()
