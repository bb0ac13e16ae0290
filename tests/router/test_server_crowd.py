"""What a hostile crowd does to everybody else: their latency, and the router's memory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from tests.helpers.mock_engine import MockEngine  # noqa: F401  # skips without the server extra

BODY = {"prompt": "x", "max_tokens": 4}
BLOCKS, REQUESTS = 3, 60


@contextlib.contextmanager
def process(root, *arguments, **options):
    made = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], cwd=root, text=True,
        env={**os.environ, "PYTHONPATH": str(root)}, start_new_session=True, **options,
    )  # fmt: skip
    try:
        yield made
    finally:
        os.killpg(made.pid, signal.SIGKILL)
        made.communicate()


def peak_mb(pid):
    """Most memory of a process and its children so far."""
    total_kb = 0
    family = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    for one in [pid, *family.stdout.split()]:
        with contextlib.suppress(OSError), open(f"/proc/{one}/status", encoding="utf-8") as told:
            total_kb += next(int(line.split()[1]) for line in told if line.startswith("VmHWM"))
    return total_kb / 1024


def latencies_s(client):
    told = []
    for k in range(REQUESTS):
        body = {**BODY, "stream": bool(k % 2)}
        begin_s = time.perf_counter()
        got = client.post("/v1/completions", json=body)
        told.append(time.perf_counter() - begin_s)
        assert got.status_code == 200, got.text
        assert " 0" in got.text
        time.sleep(0.01)
    return told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_slow_readers_half_bodies_and_an_endless_engine_hurt_nobody_else(root, record_property):
    """Alternating blocks, quiet and attacked; where other work fills the machine, memory alone."""
    is_busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with process(root, "tests.helpers.crowd", "engines", **pipe) as engines:
        urls = [f"http://127.0.0.1:{port}" for port in engines.stdout.readline().split()]
        told = {"stderr": subprocess.PIPE}
        both = [word for url in urls for word in ("--both", url)]
        with process(root, "voltana_ctrl.cli", "router", *both, "--port", 0, "--stall", 3600,
                     **told) as router:  # fmt: skip
            address = router.stderr.readline().split()[-1]
            with httpx.Client(base_url=address, timeout=60.0) as client:
                latencies_s(client)
                idle_mb = peak_mb(router.pid)
                quiet, attacked = [], []
                for _ in range(BLOCKS):
                    quiet.append(latencies_s(client))
                    port = address.rpartition(":")[2]
                    with process(
                        root, "tests.helpers.crowd", "attack", port, stdin=subprocess.PIPE
                    ):
                        time.sleep(4.0)  # until nothing more fits into the buffers
                        attacked.append(latencies_s(client))
                    time.sleep(0.5)
                page = client.get("/metrics").text
            grown_mb = peak_mb(router.pid) - idle_mb
    p50, p99 = (
        [float(np.percentile(np.concatenate(part), q)) for part in (quiet, attacked)]
        for q in (50, 99)
    )
    figures = {"p50_s": p50, "p99_s": p99, "idle_mb": idle_mb, "grown_mb": grown_mb}
    sys.stderr.write(json.dumps(figures) + "\n")
    record_property("figures", json.dumps(figures))
    assert 'requests_total{path="/v1/completions",status="429"}' in page  # the crowd was felt
    assert grown_mb < 256.0
    if not is_busy:
        assert p50[1] < 2.0 * p50[0]
        assert p99[1] < 5.0 * p99[0]
