"""The whole stack on machines of their own, between which the network is cut, and slow.

Controller, router and two nodes with an engine and an agent each run in network namespaces. Who is
cut off hears nothing, and is refused nothing. The delay is made by a relay on the way to the
controller.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.helpers.fake_gpus import all_given_back, needs_compiler, seconds_until
from tests.helpers.namespaces import Network, Relay, SpreadFleet

pytest.importorskip("uvicorn", reason="needs the server extra")
pytest.importorskip("pynvml", reason="needs the nvml extra")
pytest.importorskip("aiohttp", reason="the router needs aiohttp")

from tests.helpers.paths import ROOT
from voltana_ctrl.engines.limits import read_limits

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces"),
]

LIMIT_S = 90.0
TOP_MHZ = 1410.0
CONTROLLER_PORT, ROUTER_PORT = 8791, 8790


class Stack:
    """Commands in their namespaces."""

    def __init__(self, network, fleet, relay):
        self.network, self.fleet, self.processes, self.relay = network, fleet, [], relay
        common = ["--fleet", str(fleet.fleet_file), "--slo", fleet.slo_text]
        at = f"http://{network.address['controller']}:{CONTROLLER_PORT}"
        late = f"http://{network.ours}:{relay.port}"
        # A ceiling below the highest clock shows whose orders are in force.
        acts = [*common, "--mode", "act"]
        self.start("controller", "controller", *acts, "--policy", "static-1005",
                   "--host", network.address["controller"])  # fmt: skip
        for name, to in (("node0", at), ("node1", late)):
            self.start(name, "agent", *acts, "--node", name, "--controller", to,
                       "--lock-dir", str(fleet.folder / "locks"))  # fmt: skip
        self.start("router", "router", *common, "--policy", "static-max+jsq", "--controller", at,
                   "--host", network.address["router"], "--probe", "1")  # fmt: skip
        self.url = f"http://{network.address['router']}:{ROUTER_PORT}"

    def start(self, where, *arguments):
        log = (self.fleet.folder / f"{where}.log").open("ab")
        command = [sys.executable, "-m", "voltana_ctrl.cli", *arguments]
        self.processes.append(
            subprocess.Popen(
                self.network.inside(where, *command), stderr=log, start_new_session=True,
                env={**self.fleet.env, "PYTHONPATH": str(ROOT),
                     "VOLTANA_CTRL_TOKEN": "0123456789abcdef-token"},
            )
        )  # fmt: skip
        log.close()

    def said(self, where):
        return (self.fleet.folder / f"{where}.log").read_text(errors="replace")

    def ceiling_mhz(self, k):
        """What the governor in an engine may set now, by its order."""
        name = self.fleet.spec.ids[k]
        handed = read_limits(self.fleet.folder / "orders" / f"{name}.json")
        return None if handed is None else handed.now(time.monotonic()).ceiling_mhz

    def held(self, k):
        mhz = self.ceiling_mhz(k)
        return mhz is not None and mhz < TOP_MHZ

    def ask(self, output_tok=4, limit_s=60.0):
        body = {"model": "emulated", "prompt": [1] * 50, "max_tokens": output_tok, "stream": True}
        try:
            got = httpx.post(
                self.url + "/v1/completions", json=body, trust_env=False, timeout=limit_s
            )
        except httpx.HTTPError as error:
            return 0, type(error).__name__
        return got.status_code, got.text.rstrip()[-40:]

    def answers(self):
        status, end = self.ask()
        return status == 200 and end.endswith("[DONE]")

    def close(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20.0)
            process.kill()
            process.wait(10.0)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    with (
        Network("controller", "router", "node0", "node1") as network,
        Relay(network.address["controller"], CONTROLLER_PORT) as relay,
        SpreadFleet(network, ("node0", "node1"), "2C", dilation=3.0, folder=folder) as fleet,
    ):
        made = Stack(network, fleet, relay)
        try:
            seconds_until(lambda: "where the controller says" in made.said("router"), LIMIT_S)
            seconds_until(lambda: made.held(0) and made.held(1), LIMIT_S)
            yield made
        finally:
            made.close()
    seconds_until(lambda: all_given_back(fleet.fake))


def test_without_the_controller_clocks_go_up_and_requests_go_on(stack):
    assert stack.answers()
    stack.network.cut("controller")
    try:
        # Orders lapse: governors may go up to the top by themselves, and the router routes.
        took_s = seconds_until(lambda: not stack.held(0) and not stack.held(1), 30.0)
        assert took_s < 20.0
        for _ in range(4):
            assert stack.answers()
    finally:
        stack.network.join("controller")
    seconds_until(lambda: stack.held(0) and stack.held(1), LIMIT_S)


def test_orders_that_come_too_late_are_none_and_late_ones_hold_for_the_rest(stack):
    stack.relay.delay_s = 0.7  # there and back takes longer than an order holds
    seconds_until(lambda: not stack.held(1), 20.0)
    assert stack.held(0)
    assert stack.answers()
    stack.relay.delay_s = 0.1
    seconds_until(lambda: stack.held(1), LIMIT_S)
    stack.relay.delay_s = 0.0


def test_a_node_that_is_cut_off_loses_no_request_without_a_token(stack):
    got, stop, last_s = [], threading.Event(), [0.0] * 6

    def keep_asking(k):
        while not stop.is_set():
            got.append(stack.ask())
            last_s[k] = time.monotonic()

    asking = [threading.Thread(target=keep_asking, args=(k,)) for k in range(6)]
    for one in asking:
        one.start()
    time.sleep(2.0)
    stack.network.cut("node1")
    try:
        # Its own agent, alone there, has no orders: its clock goes up.
        seconds_until(lambda: not stack.held(1), 30.0)
        # Two probes meet no packet; then nobody waits any longer for what is lost.
        time.sleep(15.0)
        seconds_until(lambda: time.monotonic() - min(last_s) < 4.0, 30.0)
        assert stack.held(0)
    finally:
        stop.set()
        stack.network.join("node1")
        for one in asking:
            one.join(120.0)
    lost = [one for one in got if one[0] != 200 or not one[1].endswith("[DONE]")]
    # What had its first token ends in an error after it, told in the stream; nothing else fails.
    assert all(one[0] == 200 for one in lost), lost
    assert len(got) - len(lost) > 10
    seconds_until(lambda: stack.held(1), LIMIT_S)
    seconds_until(stack.answers, LIMIT_S)
