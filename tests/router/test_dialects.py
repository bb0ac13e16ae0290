"""SGLang's own routers and ours tell the same workers the same things.

Assessor `sglang-router` in an environment of its own, named by the variable SGLANG_ROUTER_PYTHON:

    python -m venv sglang
    sglang/bin/pip install sglang-router==0.3.2 fastapi uvicorn aiohttp orjson
    SGLANG_ROUTER_PYTHON=$PWD/sglang/bin/python pytest -m external tests/router/test_dialects.py
"""

import contextlib
import os
import socket
import subprocess
import time

import httpx
import pytest

from tests.helpers.mock_engine import MockEngine, endpoints_of, fleet_of, serving
from voltana_ctrl.router.app import Proxy

PYTHON = os.environ.get("SGLANG_ROUTER_PYTHON")
pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(PYTHON is None, reason="needs SGLANG_ROUTER_PYTHON, see this file"),
]

REQUESTS = [
    ("/v1/completions", {"model": "mock", "prompt": "one", "max_tokens": 3}),
    ("/v1/completions", {"model": "mock", "prompt": "one", "max_tokens": 3, "stream": True}),
    ("/v1/completions", {"model": "mock", "prompt": ["one", "two"], "max_tokens": 3}),
    ("/v1/chat/completions", {"model": "mock", "messages": [{"role": "user", "content": "x"}]}),
]
MINILB = """
import sys
from sglang_router.mini_lb import MiniLoadBalancer
from sglang_router.router_args import RouterArgs
port, prefill, decode = sys.argv[1:]
MiniLoadBalancer(RouterArgs(host="127.0.0.1", port=int(port), pd_disaggregation=True,
    prefill_urls=[(prefill, 8998)], decode_urls=[decode], policy="random", mini_lb=True)).start()
"""


@contextlib.contextmanager
def theirs(kind, prefill, decode):
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, metrics_port = free.getsockname()[1], other.getsockname()[1]
    command = [PYTHON, "-c", MINILB, str(port), prefill.url, decode.url]
    if kind == "sglang-router":
        command = [
            PYTHON, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--prefill",
            prefill.url, "8998", "--decode", decode.url, "--policy", "round_robin", "--host",
            "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port),
        ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until_s = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def ours(kind, prefill, decode):
    fleet = fleet_of("1P1D")
    proxy = Proxy(fleet, endpoints_of(fleet, [prefill, decode], "sglang"), policy="static-max")
    with serving(proxy) as server:
        yield server.url


def told(route, kind):
    """What both workers are told of each request, the random room replaced by its type."""
    seen = []
    with MockEngine("p") as prefill, MockEngine("d") as decode, route(kind, prefill, decode) as url:
        for path, body in REQUESTS:
            prefill.seen.clear()
            decode.seen.clear()
            got = httpx.post(url + path, json=body, timeout=30)
            assert got.status_code == 200, got.text
            (first_path, _, first), (second_path, _, second) = prefill.seen[0], decode.seen[0]
            assert first_path == second_path == path
            assert first == second
            rooms = first.pop("bootstrap_room")
            for room in rooms if isinstance(rooms, list) else [rooms]:
                assert isinstance(room, int)
                assert 0 <= room < 2**63
            kinds = len(rooms) if isinstance(rooms, list) else "one"
            text = got.json()["choices"][0] if not body.get("stream") else got.text.count("data: {")
            seen.append((first, kinds, text))
    return seen


@pytest.mark.parametrize("kind", ["MiniLoadBalancer", "sglang-router"])
def test_workers_are_told_what_sglangs_own_router_tells_them(kind):
    for (their, their_rooms, their_text), (our, our_rooms, our_text) in zip(
        told(theirs, kind), told(ours, kind), strict=True
    ):
        assert our_text == their_text
        if kind == "MiniLoadBalancer" and isinstance(our.get("prompt"), list):
            # It gives a batch one room, which SGLang counts up; its full router gives one each.
            assert their["bootstrap_host"] == our["bootstrap_host"][0]
            continue
        assert our["bootstrap_host"] == their["bootstrap_host"]
        assert our["bootstrap_port"] == their["bootstrap_port"]
        assert our_rooms == their_rooms
        # Their parser may add fields with defaults, and leave none out.
        assert {key: their[key] for key in our} == our
