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
from voltana_ctrl.control import MpcController
from voltana_ctrl.engines.fpm.reader import FpmReader, dynamo_fpm_addresses
from voltana_ctrl.engines.page import read_engine_page
from voltana_ctrl.engines.scrape import Scraper
from voltana_ctrl.engines.telemetry import EngineBackend
from voltana_ctrl.router.app import Proxy
from voltana_ctrl.routing import PricedRouter
from voltana_ctrl.types import Request

pytestmark = pytest.mark.dynamo

SLO = Slo(ttft_s=0.6, itl_s=0.06)


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


def test_the_controller_consolidates_and_the_router_follows(stack):
    fleet, endpoints = stack.fleet, stack.endpoints
    routers = {phase: PricedRouter(fleet, SLO, phase) for phase in ("prefill", "decode")}

    class Both:
        def update(self, decision):
            for router in routers.values():
                router.update(decision)

    backend = EngineBackend(
        fleet,
        endpoints,
        gpus=ModelledGpus(fleet),
        fpm_addresses=dynamo_fpm_addresses(stack.discovery),
    )
    records = []

    class Keep:
        def on_tick(self, record):
            records.append(record)

    rng = np.random.default_rng(4)
    sent = []
    loop = ControlLoop(backend, MpcController(fleet, SLO), router=Both(), observers=[Keep()])
    with loop:
        wait_until(lambda: backend.read().state.alive.all())
        loop.start()

        def routed():
            prompt = random_prompt(rng, 50, 300)
            request = Request(prompt_tok=len(prompt))
            picked = {phase: one.route(request, loop.state) for phase, one in routers.items()}
            sent.append((time.monotonic(), picked["decode"]))
            pins = {f"{phase}_worker_id": endpoints[i].worker_id for phase, i in picked.items()}
            return body(prompt, 16, pins)

        answers = asyncio.run(send_all(stack, [routed] * 300, 25.0))
        assert len({one["id"] for one in answers}) == 300
    served = [one["nvext"]["worker_id"]["decode_worker_id"] for one in answers]
    assert served == [endpoints[i].worker_id for _, i in sent]
    # A hundred ticks, none stale; every engine alive, and busy in front of our eyes.
    assert len(records) > 60
    states = [record.observation.state for record in records]
    assert all(state.alive.all() for state in states)
    assert max(state.running_req[fleet.decode].sum() for state in states) >= 1
    assert sum(len(record.observation.iterations) for record in records) > 300
    # So little load fits one decode instance: the other is parked, and gets nothing.
    late = records[len(records) // 2 :]
    active = np.array([record.applied.active[fleet.decode].sum() for record in late])
    assert np.median(active) == 1, active
    parked = [i for i in fleet.decode if not np.any([record.applied.active[i] for record in late])]
    begin_s = late[0].observation.state.t_s
    assert len(parked) == 1
    assert not [i for t_s, i in sent if t_s > begin_s + 0.2 and i in parked]
    # Clocks come down, and with them the power of the model.
    asked_mhz = np.array([record.applied.freq_mhz[fleet.decode].min() for record in late])
    assert np.median(asked_mhz) < 0.7 * fleet.max_mhz.max()
    assert states[-1].energy_j.sum() > states[0].energy_j.sum()


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
