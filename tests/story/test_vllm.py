"""Real vLLM on CPU with a tiny model: every iteration arrives, clocks are set before it runs.

Build the environment with ``tests/story/vllm_env.sh FOLDER``, then
``VOLTANA_VLLM_ENV=FOLDER pytest -m vllm``; takes three to six minutes. Where
``VOLTANA_DYNAMO_ENV`` names a built environment of Dynamo, its instrumented scheduler runs
under ours, and its messages are read, too.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.engines.test_in_engine import environment
from tests.helpers.fake_gpus import machine, needs_compiler, seconds_until
from tests.helpers.paths import ROOT
from tests.story.dynamo_stack import free_ports
from tests.story.vllm_stack import VllmServer, environment_folder, install_package, make_model
from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.reader import FpmReader
from voltana_ctrl.engines.scrape import Scraper

pytestmark = pytest.mark.vllm

FLEET = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
COUNTERS = ("iteration_tokens_total_count", "prompt_tokens_total", "generation_tokens_total")


@pytest.fixture(scope="module")
def venv():
    return environment_folder()


@pytest.fixture(scope="module")
def site(venv, tmp_path_factory):
    """Folder with this package and its entry points, as pip installs them."""
    return install_package(venv, tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("tree"))


def test_installed_as_the_page_says_no_pin_of_vllm_moves(venv, tmp_path):
    """What pip would install, held to what is there: nothing that is there is among it."""
    pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    (tmp_path / "pins.txt").write_text(frozen)
    planned = [*pip, "install", "--quiet", "--dry-run", "--report", tmp_path / "report.json"]
    subprocess.run([*planned, "-c", tmp_path / "pins.txt", f"{ROOT}[nvml]"], check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    added = {re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower() for one in report["install"]}
    there = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in frozen.split()}
    assert "voltana-ctrl" in added
    assert "numba" in there
    assert not added & there


@pytest.fixture(scope="module")
def model(venv, tmp_path_factory):
    return make_model(venv, tmp_path_factory.mktemp("model") / "tiny")


@contextlib.contextmanager
def served(venv, site, model, folder, *options, **variables):
    variables = {"PYTHONPATH": str(site), **variables}
    options = ("--enable-logging-iteration-details", *options)
    with VllmServer(venv, model, folder / "vllm.log", *options, **variables) as server:
        server.wait()
        yield server


def load(url, requests=60, output_tok=12):
    rng = np.random.default_rng(0)

    async def all_of_them():
        async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:

            async def one(k):
                await asyncio.sleep(0.03 * k)
                prompt = rng.integers(3, 500, size=int(rng.integers(20, 200))).tolist()
                body = {"model": "tiny", "prompt": prompt, "max_tokens": output_tok}
                answer = await client.post(
                    f"{url}/v1/completions", json={**body, "ignore_eos": True}
                )
                return answer.json()["usage"]["prompt_tokens"]

            return await asyncio.gather(*(one(k) for k in range(requests)))

    prompt_tok = sum(asyncio.run(all_of_them()))
    time.sleep(0.5)
    return prompt_tok


@contextlib.contextmanager
def listening(url, fpm):
    engine = Endpoint(instance=FLEET.ids[0], kind="vllm", url=url, fpm=fpm)
    reader = FpmReader(FLEET, [engine])
    try:
        seconds_until(lambda: np.isfinite(reader.read(time.monotonic())[0].age_s[0]))
        yield engine, reader
    finally:
        reader.close()


def test_the_stat_logger_is_loaded_by_its_entry_point_and_sees_every_iteration(
    venv, site, model, tmp_path
):
    (port,) = free_ports(1)
    fpm = f"tcp://127.0.0.1:{port}"
    with (
        served(venv, site, model, tmp_path, VOLTANA_CTRL_FPM=fpm) as server,
        listening(server.url, fpm) as (engine, reader),
    ):
        before = server.counters(*COUNTERS)
        prompt_tok = load(server.url)
        grown = {name: value - before[name] for name, value in server.counters(*COUNTERS).items()}
        reading, rows = reader.read(time.monotonic())
        assert reader.counts.lost == reader.counts.bad == 0
        assert len(rows) == grown["iteration_tokens_total_count"]
        assert rows.prefill_tok.sum() == grown["prompt_tokens_total"] == prompt_tok
        # The first token of a request comes with its prefill.
        assert rows.batch_req.sum() == grown["generation_tokens_total"] - 60
        # Reports tell how many prompts wait, not how long they are.
        assert reading.arrived_req[0] == pytest.approx(60, abs=4)
        assert 1e-4 < np.median(rows.wall_s) < 1.0
        scraper = Scraper(FLEET, [engine], period_s=0.1)
        seconds_until(lambda: not scraper.problems)
        state = scraper.read(time.monotonic())
        assert (state.running_req[0], state.queue_req[0], state.kv_used_tok[0]) == (0, 0, 0)
        scraper.close()


@needs_compiler
def test_the_scheduler_class_sets_clocks_and_hands_them_back(venv, site, model, tmp_path):
    (port,) = free_ports(1)
    fpm = f"tcp://127.0.0.1:{port}"
    scheduler = "voltana_ctrl.engines.vllm.GovernedScheduler"
    with machine(tmp_path) as fake:
        # Without the path of its library vLLM would take this machine for one with GPUs.
        state = {k: v for k, v in fake.env.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
        variables = {**state, **environment(fake, tmp_path, VOLTANA_CTRL_FPM=fpm)}
        options = ("--scheduler-cls", scheduler)
        with served(venv, site, model, tmp_path, *options, **variables) as server:
            with listening(server.url, fpm) as (_, reader):
                before = server.counters(*COUNTERS)
                prompt_tok = load(server.url)
                grown = server.counters(*COUNTERS)["iteration_tokens_total_count"]
                grown -= before["iteration_tokens_total_count"]
                _, rows = reader.read(time.monotonic())
                # The first batch after a pause has no time of its own.
                assert 0.7 * grown <= len(rows) <= grown
                assert rows.prefill_tok.sum() <= prompt_tok
                assert reader.counts.lost == 0
            assert fake.gpus[0].sets > 1
            assert fake.gpus[0].locked
            assert fake.gpus[0].unsupported_sets == 0
            server.kill_engine_core()
            assert seconds_until(lambda: not fake.gpus[0].locked) < 5.0


def test_messages_of_dynamos_scheduler_under_ours(venv, site, model, tmp_path):
    dynamo = sorted(
        Path(os.environ.get("VOLTANA_DYNAMO_ENV", "no-such-folder")).glob("lib/*/site-packages")
    )
    if not dynamo:
        pytest.skip("needs the folder of tests/story/dynamo_env.sh in VOLTANA_DYNAMO_ENV")
    only_dynamo = tmp_path / "dynamo-only"
    only_dynamo.mkdir()
    (only_dynamo / "dynamo").symlink_to(dynamo[0] / "dynamo")
    (port,) = free_ports(1)
    fpm = f"tcp://127.0.0.1:{port}"
    variables = {
        "PYTHONPATH": f"{site}{os.pathsep}{only_dynamo}",
        "DYN_FORWARDPASS_METRIC_PORT": str(port),
        "VOLTANA_CTRL_BASE": "dynamo.vllm.instrumented_scheduler.InstrumentedScheduler",
    }
    options = ("--scheduler-cls", "voltana_ctrl.engines.vllm.GovernedScheduler")
    with (
        served(venv, site, model, tmp_path, *options, **variables) as server,
        listening(server.url, fpm) as (_, reader),
    ):
        before = server.counters(*COUNTERS)
        prompt_tok = load(server.url)
        grown = {name: value - before[name] for name, value in server.counters(*COUNTERS).items()}
        reading, rows = reader.read(time.monotonic())
        assert reader.counts.lost == reader.counts.bad == 0
        assert len(rows) == grown["iteration_tokens_total_count"]
        assert rows.prefill_tok.sum() == prompt_tok
        assert rows.batch_req.sum() == grown["generation_tokens_total"] - 60
        assert rows.kv_tok[rows.batch_req > 0].min() > 0
        assert reading.arrived_req[0] == 60
