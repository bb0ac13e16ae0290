"""Real vLLM on a CPU under the whole stack: controller, agent, router, and our plugin inside.

Runs with ``VOLTANA_VLLM_ENV=FOLDER pytest -m vllm tests/story/test_vllm_controller.py``, in some
five minutes. A CPU is no GPU of the profile: the controller finds that out, and clocks stay where
the power budget puts them. What the plugin costs is measured by ``bench/plugin_cost.py``: between
processes vLLM polls, so that processor time of a server tells nothing.
"""

import asyncio
import contextlib
import subprocess
import sys

import httpx
import numpy as np
import pytest

from tests.engines.test_in_engine import environment
from tests.helpers.fake_gpus import PROFILE, machine, needs_compiler, seconds_until
from tests.helpers.paths import ROOT
from tests.story.dynamo_stack import free_ports
from tests.story.test_vllm import model, site, venv
from tests.story.vllm_stack import VllmServer
from voltana_ctrl.engines.limits import read_limits

__all__ = ["model", "site", "venv"]

pytestmark = [pytest.mark.vllm, needs_compiler]

BUDGET_W = 250.0
FLEET = """
[[instance]]
id = "both-0"
role = "colocated"
node = "node0"
profile = "{profile}"
engine = {{ kind = "vllm", url = "{url}", fpm = "{fpm}", gpus = ["{gpu}"], limits = "{limits}" }}
"""


@contextlib.contextmanager
def command(folder, env, name, *arguments):
    log = folder / f"{name}.log"
    with log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "voltana_ctrl.cli", name, *arguments],
            env=env, stderr=told, start_new_session=True,
        )  # fmt: skip
    try:
        yield log
    finally:
        process.terminate()
        process.wait(60.0)


def bodies(n, output_tok=24):
    rng = np.random.default_rng(0)
    return [
        {"model": "tiny", "prompt": rng.integers(3, 500, size=int(rng.integers(20, 200))).tolist(),
         "max_tokens": output_tok, "ignore_eos": True, "temperature": 0.0}
        for _ in range(n)
    ]  # fmt: skip


def answers(url, asked, at_once=16):
    async def all_of_them():
        free = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client:

            async def one(body):
                async with free:
                    got = await client.post(f"{url}/v1/completions", json=body)
                    assert got.status_code == 200, got.text
                    return got.json()["choices"][0]["text"]

            return await asyncio.gather(*map(one, asked))

    return asyncio.run(all_of_them())


def test_orders_arrive_and_answers_are_as_before(venv, site, model, tmp_path):
    with machine(tmp_path, gpus=1) as fake:
        with contextlib.ExitStack() as ending:
            _story(ending, fake, venv, site, model, tmp_path)
        # vLLM kills all that its engine has started; our watchdog is nobody's child.
        seconds_until(lambda: not fake.gpus[0].locked, 10.0)


def _story(ending, fake, venv, site, model, tmp_path):
    fpm_port, controller_port, router_port = free_ports(3)
    fpm, limits = f"tcp://127.0.0.1:{fpm_port}", tmp_path / "orders" / "both-0.json"
    limits.parent.mkdir(mode=0o755)
    scheduler = ("--scheduler-cls", "voltana_ctrl.engines.vllm.GovernedScheduler")
    asked = bodies(48)
    state = {k: v for k, v in fake.env.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
    inside = environment(fake, tmp_path, VOLTANA_CTRL_FPM=fpm,
                         VOLTANA_CTRL_LIMITS=str(limits))  # fmt: skip
    plain = ending.enter_context(VllmServer(venv, model, tmp_path / "plain.log"))
    ours = ending.enter_context(
        VllmServer(venv, model, tmp_path / "ours.log", *scheduler, PYTHONPATH=str(site),
                   **state, **inside)
    )  # fmt: skip
    for one in (plain, ours):
        one.wait()
        answers(one.url, asked)
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET.format(profile=PROFILE, url=ours.url, fpm=fpm, limits=limits,
                                 gpu=fake.uuids[0]))  # fmt: skip
    env = {**fake.env, "PYTHONPATH": str(ROOT), "VOLTANA_CTRL_TOKEN": "0123456789abcdef-token"}
    at = f"http://127.0.0.1:{controller_port}"
    told = {}
    for name, *arguments in (
        ("controller", "--mode", "act", "--power-budget-w", f"{BUDGET_W:g}", "--port",
         str(controller_port)),
        ("agent", "--mode", "act", "--controller", at, "--lock-dir", str(tmp_path)),
        ("router", "--controller", at, "--port", str(router_port)),
    ):  # fmt: skip
        arguments = ["--fleet", str(file), *arguments]
        told[name] = ending.enter_context(command(tmp_path, env, name, *arguments))
    seconds_until(lambda: "where the controller says" in told["router"].read_text(), 120.0)

    # Orders arrive: the engine keeps the ceiling of the budget.
    def ordered():
        handed = read_limits(limits)
        return handed is not None and handed.order.ceiling_mhz < 1410.0

    seconds_until(ordered, 60.0)
    through = answers(f"http://127.0.0.1:{router_port}", asked)
    assert 0 < fake.gpus[0].lock_hi_mhz <= read_limits(limits).order.ceiling_mhz
    assert fake.gpus[0].unsupported_sets == 0
    # Answers are those of vLLM alone.
    assert through == answers(plain.url, asked)
    # The controller finds that this is not what the profile says, and tells how to mend it.
    status = httpx.get(f"{at}/v1/status", trust_env=False).json()
    assert status["latency"]["judged_req"] >= len(asked)
    assert any("voltana-ctrl fit" in event["text"] for event in status["events"]), status
    assert {one["kind"] for one in status["links"]} == {"node", "router"}
