"""The whole stack in processes of its own: one controller, two agents, a router, four engines.

Engines are emulated, on GPUs of the fake driver; each hosts the real governor. Times leave room
for a machine that does much else besides.
"""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.helpers.fake_gpus import needs_compiler, seconds_until

pytest.importorskip("uvicorn", reason="needs the server extra")
pytest.importorskip("pynvml", reason="needs the nvml extra")

from tests.helpers.paths import ROOT
from voltana_ctrl.engines.emulated.fleet import EmulatedFleet, free_ports
from voltana_ctrl.engines.limits import read_limits
from voltana_ctrl.engines.page import read_engine_page

pytestmark = [needs_compiler, pytest.mark.slow]

LIMIT_S = 90.0
BUDGET_W, DILATION = 900.0, 10.0


class Stack:
    """The commands on an emulated fleet, as a person would start them."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.processes, self.logs = {}, {}
        self.controller_port, self.router_port = free_ports(2)
        self.common = ["--fleet", str(fleet.fleet_file), "--slo", fleet.slo_text]
        self.at = f"http://127.0.0.1:{self.controller_port}"

    def start(self, name, command, *arguments):
        log = self.fleet.folder / f"{name}.log"
        self.logs[name] = log
        with log.open("ab") as told:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "voltana_ctrl.cli", command, *self.common, *arguments],
                env={**self.fleet.env, "PYTHONPATH": str(ROOT),
                     "VOLTANA_CTRL_TOKEN": "0123456789abcdef-token"},
                stderr=told, start_new_session=True,
            )  # fmt: skip

    def start_controller(self):
        port, budget = str(self.controller_port), str(BUDGET_W)
        self.start("controller", "controller", "--mode", "act", "--policy", "pack",
                   "--power-budget-w", budget, "--port", port)  # fmt: skip

    def start_all(self):
        self.start_controller()
        for node in ("node0", "node1"):
            self.start(node, "agent", "--mode", "act", "--node", node, "--controller", self.at,
                       "--lock-dir", str(self.fleet.folder / "locks"))  # fmt: skip
        self.start("router", "router", "--policy", "pack", "--controller", self.at,
                   "--port", str(self.router_port))  # fmt: skip

    def told(self, name):
        return self.logs[name].read_text(encoding="utf-8", errors="replace")

    def order(self, name):
        handed = read_limits(self.fleet.folder / "orders" / f"{name}.json")
        return None if handed is None else handed.now(time.monotonic())

    def page(self, i):
        text = httpx.get(self.fleet.urls[i] + "/metrics", trust_env=False, timeout=30.0).text
        return read_engine_page("vllm", text)

    def requests_of(self, i):
        page = self.page(i)
        return page["finished_req"] + page["running_req"] + page["queue_req"]

    def ask(self, output_tok=4):
        body = {"model": "emulated", "prompt": [1] * 200, "max_tokens": output_tok, "stream": True}
        url = f"http://127.0.0.1:{self.router_port}/v1/completions"
        answer = httpx.post(url, json=body, trust_env=False, timeout=120.0)
        return answer.status_code == 200 and answer.text.rstrip().endswith("[DONE]")

    def end(self, name):
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(60.0)

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait(30.0)


@pytest.fixture(scope="module")
def stack():
    with EmulatedFleet("2P2D", dilation=DILATION, nodes=2) as fleet:
        made = Stack(fleet)
        try:
            made.start_all()
            seconds_until(lambda: "where the controller says" in made.told("router"), LIMIT_S)
            yield made
        finally:
            made.close()


def test_the_whole_life_of_a_fleet(stack):
    fleet, gpus = stack.fleet, stack.fleet.fake.gpus
    ids = fleet.spec.ids

    # Floors and ceilings of the plan reach the governors in the engines.
    seconds_until(lambda: all(stack.order(name) is not None for name in ids), LIMIT_S)
    seconds_until(lambda: all(stack.order(name).ceiling_mhz < 1410.0 for name in ids), LIMIT_S)
    ceilings = [stack.order(name).ceiling_mhz for name in ids]
    seconds_until(
        lambda: all(0 < gpu.lock_hi_mhz <= mhz for gpu, mhz in zip(gpus, ceilings, strict=True)),
        LIMIT_S,
    )

    # A parked instance gets no request from one second after its order on.
    assert stack.ask()
    parked = []

    def somebody_is_parked():
        assert stack.ask()
        parked[:] = [i for i, name in enumerate(ids) if not stack.order(name).active]
        return len(parked) == 1

    seconds_until(somebody_is_parked, LIMIT_S)
    time.sleep(1.0)
    before = [stack.requests_of(i) for i in range(4)]
    for _ in range(6):
        assert stack.ask()
    after = [stack.requests_of(i) for i in range(4)]
    assert after[parked[0]] == before[parked[0]]
    assert sum(after) - sum(before) == 12  # each is prefilled here and decoded there

    # Step by step somebody comes down below its ceiling.
    def somebody_is_below():
        # An engine without work leaves its clock where it was, and one whose profile was not
        # compared with forty iterations where it is highest.
        assert stack.ask(output_tok=30)
        locks = [gpu.lock_hi_mhz for gpu in gpus]
        return any(0 < lock < mhz for lock, mhz in zip(locks, ceilings, strict=True))

    seconds_until(somebody_is_below, LIMIT_S)

    # Killed: the highest clock under the last ceilings; the routing goes on.
    stack.processes["controller"].kill()
    stack.processes["controller"].wait(30.0)
    killed_s = time.monotonic()

    def at_the_last_ceilings():
        now = [stack.order(name) for name in ids]
        locks = [gpu.lock_hi_mhz for gpu in gpus]
        return all(
            lock == one.floor_mhz == one.ceiling_mhz for lock, one in zip(locks, now, strict=True)
        )

    seconds_until(at_the_last_ceilings, 40.0)
    ceilings = [stack.order(name).ceiling_mhz for name in ids]
    assert max(ceilings) < 1410.0
    # An order holds for a second, which the fleet in slow motion stretches as all else.
    assert time.monotonic() - killed_s < DILATION * 1.0 + 1.0 + 3.0  # and what a busy machine takes
    seconds_until(lambda: "requests go by load" in stack.told("router").splitlines()[-1], LIMIT_S)
    assert stack.ask()

    # Restarted, it takes over.
    stack.start_controller()
    seconds_until(
        lambda: "where the controller says" in stack.told("router").splitlines()[-1], LIMIT_S
    )
    seconds_until(somebody_is_below, LIMIT_S)

    # An engine that dies gives its clock back, and is met again without a restart of ours.
    fleet.kill(2)
    seconds_until(lambda: not gpus[2].locked, LIMIT_S)
    assert stack.ask()
    fleet.restart(2)
    seconds_until(lambda: 0 < gpus[2].lock_hi_mhz <= ceilings[2], LIMIT_S)
    assert stack.ask()

    # The end: every GPU as it was found.
    for name in ("router", "node0", "node1", "controller"):
        assert stack.end(name) in (0, 128 + signal.SIGTERM, -signal.SIGTERM), stack.told(name)
    for name in ids:
        order = json.loads((fleet.folder / "orders" / f"{name}.json").read_text())["order"]
        assert order["floor_mhz"] == 1410.0
    fleet.close()
    assert not any(gpu.locked for gpu in gpus)
    assert not list((fleet.folder / "locks").glob("*")) or os.environ.get("KEEP")
