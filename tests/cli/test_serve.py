"""``voltana-ctrl serve`` on one machine: router, controller, agent, and the page of all of it."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

from tests.helpers.fake_gpus import needs_compiler, seconds_until
from tests.helpers.paths import ROOT

pytest.importorskip("uvicorn", reason="needs the server extra")
pytest.importorskip("pynvml", reason="needs the nvml extra")

from voltana_ctrl.engines.emulated.fleet import EmulatedFleet, free_ports

pytestmark = [needs_compiler, pytest.mark.slow]


def get(url):
    try:
        return httpx.get(url, trust_env=False, timeout=10.0)
    except httpx.HTTPError:
        return None


def test_it_serves_clients_and_the_page_and_ends_with_the_gpus_as_they_were():
    port, page_port = free_ports(2)
    with EmulatedFleet("2C", dilation=5.0) as fleet:
        log = fleet.folder / "serve.log"
        with log.open("wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "voltana_ctrl.cli", "serve", "--mode", "act", "--fleet",
                 str(fleet.fleet_file), "--slo", fleet.slo_text, "--port", str(port), "--page",
                 str(page_port), "--lock-dir", str(fleet.folder / "locks"), "--power-budget-w",
                 "0:500,3600:300"],
                env={**os.environ, **fleet.env, "PYTHONPATH": str(ROOT)}, stderr=told,
                start_new_session=True,
            )  # fmt: skip
        try:
            at = f"http://127.0.0.1:{page_port}"
            seconds_until(lambda: (got := get(f"{at}/v1/status")) and got.json()["number"], 120.0)
            assert "text/html" in get(at).headers["content-type"]
            body = {"model": "emulated", "prompt": [1] * 200, "max_tokens": 20}
            for _ in range(3):
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body,
                                    trust_env=False, timeout=60.0)  # fmt: skip
                assert answer.status_code == 200

            def judged():
                return get(f"{at}/v1/status").json()["latency"]["judged_req"] >= 3

            seconds_until(judged, 30.0)
            told = get(f"{at}/v1/status").json()
            assert told["power"]["budget_w"] == 500.0
            (step,) = told["plan"]["budget_steps"]
            assert step["limit_w"] == 300.0
            assert 3400.0 < step["in_s"] < 3600.0
            # What the page says of a GPU is what the GPU says.
            clocks = [one["clock_mhz"] for one in told["instances"]]
            assert all(clock in fleet.spec.instances[0].clocks_mhz for clock in clocks)
            assert told["plan"]["awake"] == {"colocated": [2, 2]}
        finally:
            process.send_signal(signal.SIGTERM)
            ended = process.wait(60.0)
        assert ended in (0, 128 + signal.SIGTERM, -signal.SIGTERM), log.read_text()
    assert not any(gpu.locked for gpu in fleet.fake.gpus)


def test_a_page_that_needs_a_token_is_refused_before_clients_are_served(tmp_path):
    (tmp_path / "fleet.toml").write_text(
        '[[instance]]\nrole = "colocated"\nprofile = "a100-sxm-80gb/llama-3.1-8b"\n'
        'engine = { kind = "vllm", url = "http://127.0.0.1:9" }\n'
    )
    ended = subprocess.run(
        [sys.executable, "-m", "voltana_ctrl.cli", "serve", "--fleet", "fleet.toml", "--port", "0",
         "--page", "0.0.0.0:0"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "VOLTANA_CTRL_TOKEN": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "token: expected one in --token-file or VOLTANA_CTRL_TOKEN" in ended.stderr
    assert "routes on" not in ended.stderr
