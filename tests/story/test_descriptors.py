"""Every process of ours without a descriptor to spare: what is open stays, nothing can be opened.

Each in turn may open nothing for a while; then it may again. It does not end, what it holds is
given back when it is killed meanwhile, and when it may open again it goes on as before.
"""

import contextlib
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tests.helpers.fake_gpus import all_given_back, machine, needs_compiler, seconds_until
from tests.helpers.paths import ROOT
from voltana_ctrl.backends.nvml.setter_client import SetterClient
from voltana_ctrl.errors import BackendError

pytest.importorskip("uvicorn", reason="needs the server extra")
pytest.importorskip("pynvml", reason="needs the nvml extra")
pytest.importorskip("aiohttp", reason="the router needs aiohttp")

from voltana_ctrl.engines.emulated.fleet import EmulatedFleet, free_ports

pytestmark = [needs_compiler, pytest.mark.slow]

LIMIT_S = 60.0


class Starved:
    """While it lasts a process opens nothing."""

    def __init__(self, pid):
        self.pid = pid

    def __enter__(self):
        self._before = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        there = {int(one) for one in os.listdir(f"/proc/{self.pid}/fd")}
        free = next(number for number in itertools.count() if number not in there)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (free, self._before[1]))

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, self._before)


class Stack:
    def __init__(self, fleet):
        self.fleet, self.processes = fleet, {}
        controller, router = free_ports(2)
        at = f"http://127.0.0.1:{controller}"
        self.page, self.url = at, f"http://127.0.0.1:{router}"
        common = ["--fleet", str(fleet.fleet_file), "--slo", fleet.slo_text]
        acts = [*common, "--mode", "act"]
        self._told = {
            "controller": ["controller", *acts, "--port", str(controller)],
            "agent": ["agent", *acts, "--controller", at,
                      "--lock-dir", str(fleet.folder / "locks")],
            "router": ["router", *common, "--controller", at, "--port", str(router),
                       "--probe", "1"],
        }  # fmt: skip
        for name in self._told:
            self.start(name)

    def start(self, name):
        with (self.fleet.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "voltana_ctrl.cli", *self._told[name]], stderr=log,
                stdout=log, start_new_session=True,
                env={**self.fleet.env, "PYTHONPATH": str(ROOT),
                     "VOLTANA_CTRL_TOKEN": "0123456789abcdef-token"},
            )  # fmt: skip

    def pid(self, name):
        if name == "engine":
            return self.fleet._processes[0].pid
        return self.processes[name].pid

    def said(self, name):
        return (self.fleet.folder / f"{name}.log").read_text(errors="replace")

    def ask(self, limit_s=30.0):
        body = {"model": "emulated", "prompt": [1] * 20, "max_tokens": 2, "stream": True}
        try:
            got = httpx.post(
                self.url + "/v1/completions", json=body, trust_env=False, timeout=limit_s
            )
        except httpx.HTTPError:
            return False
        return got.status_code == 200 and got.text.rstrip().endswith("[DONE]")

    def is_controlled(self):
        return bool(self.fleet.fake.gpus[0].locked)

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait(30.0)


@pytest.fixture(scope="module")
def stack():
    # An agent that sets clocks itself, at every tick: it holds a lock, and its watchdog's pipe.
    with EmulatedFleet("1C", dilation=3.0, governed=False) as fleet:
        made = Stack(fleet)
        try:
            seconds_until(made.is_controlled, LIMIT_S)
            seconds_until(made.ask, LIMIT_S)
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("name", ["controller", "agent", "router", "engine"])
def test_it_does_not_end_and_goes_on_when_it_may_open_again(stack, name):
    with Starved(stack.pid(name)):
        for _ in range(3):
            stack.ask(limit_s=2.0)
            time.sleep(0.2)
        if name != "engine":
            assert stack.processes[name].poll() is None, stack.said(name)[-600:]
    seconds_until(stack.ask, LIMIT_S)
    seconds_until(stack.is_controlled, LIMIT_S)
    assert httpx.get(stack.page, trust_env=False, timeout=30.0).status_code == 200
    if name != "engine":
        # It says what happened in lines, not in thousands of them.
        assert len(stack.said(name).splitlines()) < 500


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_agent_that_is_ended_meanwhile_leaves_no_gpu_locked(stack, end):
    seconds_until(stack.is_controlled, LIMIT_S)
    with Starved(stack.pid("agent")):
        time.sleep(0.5)
        os.kill(stack.pid("agent"), end)
        seconds_until(lambda: all_given_back(stack.fleet.fake))
        stack.processes["agent"].wait(30.0)
    stack.start("agent")
    seconds_until(stack.is_controlled, LIMIT_S)


def test_a_setter_serves_again_and_gives_back_what_its_client_held(tmp_path):
    with machine(tmp_path) as fake:
        path = tmp_path / "setter.sock"
        program = (
            "from pathlib import Path; from voltana_ctrl.backends.nvml.setter import run_setter;"
            f"run_setter({list(fake.uuids)!r}, [{os.geteuid()}], Path({str(path)!r}),"
            f" lock_dir=Path({str(tmp_path / 'locks')!r}))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**fake.env, "PYTHONPATH": str(ROOT)}
        )
        try:
            seconds_until(path.exists, LIMIT_S)
            client = SetterClient(path)
            client.gpu(fake.uuids[0]).lock_clock(300, 1200)
            assert fake.gpus[0].locked
            with Starved(process.pid):
                knocking = []
                for _ in range(20):
                    one = socket.socket(socket.AF_UNIX)
                    one.settimeout(1.0)
                    knocking.append(one)
                    with contextlib.suppress(OSError):
                        one.connect(str(path))
                time.sleep(0.5)
                # Who is connected is served.
                client.gpu(fake.uuids[0]).lock_clock(315, 1200)
                assert process.poll() is None
                client.close()
                for one in knocking:
                    one.close()
                seconds_until(lambda: all_given_back(fake))

            def serves():
                try:
                    again = SetterClient(path)
                except BackendError:
                    return False
                again.close()
                return True

            seconds_until(serves)
        finally:
            process.terminate()
            process.wait(30.0)
