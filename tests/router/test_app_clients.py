"""Clients that people have, unchanged, through the router."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.helpers.mock_engine import MockEngine
from tests.router.test_app import router
from tests.story.vllm_stack import environment_folder, make_model
from voltana_ctrl.router.app import ProxyLimits

openai = pytest.importorskip("openai", reason="needs the openai package")

MESSAGES = [{"role": "user", "content": "count"}]
TEXT = " 0 1 2 3"


def sync_client(http, **options):
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="key", max_retries=0, **options)


def async_client(http, **options):
    return openai.AsyncOpenAI(
        base_url=f"{http.base_url}/v1", api_key="key", max_retries=0, **options
    )


def until(condition, limit_s=5.0):
    end_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize(("shape", "kind"), [("2C", "vllm"), ("1P1D", "vllm"), ("1P1D", "sglang")])
def test_openai_completions_and_chat(shape, kind):
    with router(shape, kind=kind, api_key="key") as (http, _, _), sync_client(http) as client:
        assert client.models.list().data[0].id == "mock"
        made = client.completions.create(model="mock", prompt="x")
        assert made.choices[0].text == TEXT
        assert made.usage.completion_tokens == 4
        chat = client.chat.completions.create(model="mock", messages=MESSAGES)
        assert chat.choices[0].message.content == TEXT
        parts = list(client.completions.create(model="mock", prompt="x", stream=True))
        assert "".join(part.choices[0].text for part in parts) == TEXT
        options = {"stream": True, "stream_options": {"include_usage": True}}
        parts = list(client.chat.completions.create(model="mock", messages=MESSAGES, **options))
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == TEXT
        assert parts[-1].usage.completion_tokens == 4


def test_openai_sees_the_energy_it_asks_for():
    with router("1P1D") as (http, _, _), sync_client(http) as client:
        raw = client.completions.with_raw_response.create(model="mock", prompt="x")
        assert "source=modelled" in raw.headers["x-voltana-energy"]
        parts = client.completions.create(
            model="mock",
            prompt="x",
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-voltana-energy": "usage"},
        )
        assert list(parts)[-1].usage.energy["source"] == "modelled"


def test_openai_async_streams_at_once():
    async def main(http):
        async with async_client(http) as client:

            async def one():
                parts = await client.chat.completions.create(
                    model="mock", messages=MESSAGES, stream=True
                )
                return "".join([p.choices[0].delta.content or "" async for p in parts])

            return await asyncio.gather(*(one() for _ in range(60)))

    engines = [MockEngine(name, gap_s=0.01) for name in "pdd"]
    with router("1P2D", engines=engines) as (http, engines, _):
        assert asyncio.run(main(http)) == [TEXT] * 60
        made, *shared = (len(engine.seen) for engine in engines)
        assert made == sum(shared) == 60
        assert min(shared) >= 20


def test_openai_timeout_cancels_the_engine():
    engine = MockEngine("c", first_s=30.0)
    with router("1C", engines=[engine]) as (http, _, _):
        with sync_client(http, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
            client.completions.create(model="mock", prompt="x", stream=True)
        until(lambda: engine.cancelled == 1)


def test_openai_leaving_a_stream_cancels_the_engine():
    engine = MockEngine("c", tokens=1000, gap_s=0.01)
    with router("1C", engines=[engine]) as (http, _, _):
        with sync_client(http) as client:
            parts = client.completions.create(model="mock", prompt="x", stream=True)
            next(iter(parts))
            parts.close()
            until(lambda: engine.cancelled == 1)

        async def leave():
            async with async_client(http) as client:
                task = asyncio.create_task(client.completions.create(model="mock", prompt="x"))
                await asyncio.sleep(0.3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(leave())
        until(lambda: engine.cancelled == 2)


def test_openai_raises_its_own_errors():
    limits = ProxyLimits(body_bytes=2000)
    with router("1C", api_key="key", limits=limits) as (http, engines, proxy):
        wrong = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="no", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="mock", prompt="x")
        with sync_client(http) as client:
            engines[0].fail = [400]
            with pytest.raises(openai.BadRequestError, match="says 400"):
                client.completions.create(model="mock", prompt="x")
            with pytest.raises(openai.APIStatusError, match="over 2000 bytes"):
                client.completions.create(model="mock", prompt="x" * 3000)
            engines[0].fail = ["die after two tokens"]
            parts = client.completions.create(model="mock", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="broke off"):
                list(parts)
            proxy.is_draining = True
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                client.completions.create(model="mock", prompt="x")


def test_openai_comes_again_when_told_to():
    engine = MockEngine("c", first_s=0.3)
    limits = ProxyLimits(in_flight_req=1)

    async def main(http):
        client = openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="k", max_retries=5)
        async with client:
            asked = [client.completions.create(model="mock", prompt="x") for _ in range(3)]
            return [made.choices[0].text for made in await asyncio.gather(*asked)]

    with router("1C", engines=[engine], limits=limits) as (http, _, _):
        assert asyncio.run(main(http)) == [TEXT] * 3
        assert engine.answered == 3


@pytest.mark.vllm
@pytest.mark.parametrize("shape", ["2C", "1P1D"])
def test_the_load_generator_of_vllm_finds_no_failure(shape, tmp_path):
    """``vllm bench serve``, from the environment of tests/story/vllm_env.sh, at mock engines."""
    venv = environment_folder()
    model = make_model(venv, tmp_path / "tiny")
    with router(shape, tokens=12) as (http, _, _):
        command = [
            venv / "bin" / "vllm", "bench", "serve", "--backend", "openai", "--base-url",
            http.base_url, "--model", "tiny", "--tokenizer", model, "--dataset-name", "random",
            "--random-input-len", "60", "--random-output-len", "12", "--num-prompts", "60",
            "--request-rate", "20", "--ignore-eos", "--save-result", "--result-filename",
            tmp_path / "told.json",
        ]  # fmt: skip
        done = subprocess.run(
            [str(part) for part in command], env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        page = http.get("/metrics").text
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["completed"], told["total_output_tokens"]) == (60, 60 * 12)
    assert 'requests_total{path="/v1/completions",status="200"} 60.0' in page
    # It asks for the length of its prompts.
    assert 'requests_total{path="/tokenize",status="200"}' in page
    assert "voltana_router_uncounted_total 0.0" in page


@pytest.mark.slow
def test_locust_finds_no_failure(root, tmp_path):
    locust = os.environ.get("LOCUST") or shutil.which("locust")
    if locust is None:
        pytest.skip("needs Locust: pip install locust, or LOCUST=/path/to/locust")
    with router("1P2D", tokens=16) as (http, engines, _):
        done = subprocess.run(
            [locust, "-f", root / "bench" / "locustfile.py", "--headless", "--host",
             str(http.base_url), "-u", "20", "-r", "20", "-t", "10s", "--only-summary", "--json"],
            capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        )  # fmt: skip
        sys.stderr.write(done.stderr[-2000:])
        assert done.returncode == 0
        rows = json.loads(re.search(r"\[.*\]", done.stdout, re.DOTALL)[0])
        asked = sum(row["num_requests"] for row in rows)
        assert asked > 100
        assert sum(row["num_failures"] for row in rows) == 0
        assert abs(engines[0].answered + engines[0].cancelled - asked) <= 40  # those at the end
