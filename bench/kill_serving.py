"""Everything that serves, killed, stopped and ended by ones and twos, with requests in flight.

    python bench/kill_serving.py                      # 300 events on emulated engines
    python bench/kill_serving.py --events 40 --seed 3

Three emulated engines whose governors hold the clocks of fake GPUs, a router, a controller and an
agent, each a process of its own and started by its command; a client streams answers through the
router all the while. An event sends SIGKILL, SIGTERM or SIGSTOP to one or two of them, or to the
watchdog of an engine, up to 0.3 s apart, and what was stopped goes on after a while. All ordered
pairs of victims come before one comes again.

Counted are GPUs still locked whose engine is dead or frozen, requests that were taken and ended
without a token though the router and an engine lived, requests that an engine was sent after their
client had seen a token, and how long it took until a request sent after the event had its first
token. What a router breaks that is killed, and what one that ends or is dead does not take, is
counted apart. Exit status 1 where one of the first three is not zero.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
from kill import let_go_on, until

from voltana_ctrl.backends.nvml.lease import end_on_sigterm
from voltana_ctrl.backends.nvml.process import listeners
from voltana_ctrl.cli.running import TOKEN_VARIABLE
from voltana_ctrl.engines.emulated.fleet import EmulatedFleet, free_ports

ENGINES = 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
COMMANDS = ("controller", "agent", "router")
VICTIMS = (*(f"engine {k}" for k in range(ENGINES)), "engine 0's watchdog", *COMMANDS)
#: Within which the clocks of a dead or frozen engine must be given back.
LIMIT_S = 15.0
#: Requests a second, their tokens, and how much slower than a GPU the engines are.
RATE_REQ_S, OUTPUT_TOK, DILATION = 6.0, 12, 3.0
#: An emulated engine that notes when it is sent which request; the time is that of the machine.
NOTING = """
import os, sys, time
from voltana_ctrl.engines.emulated import fleet

class Noting(fleet.EngineApp):
    async def _body(self, scope, receive):
        body = await super()._body(scope, receive)
        if "prompt" in body:
            line = f"{time.monotonic()} {body['prompt'][0]}\\n"
            os.write(notes, line.encode())
        return body

notes = os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
fleet.EngineApp = Noting
fleet.run_engine(sys.argv[1])
"""


class NotingFleet(EmulatedFleet):
    """Engines that note what they are sent, in `notes` of their folder."""

    def _spawn(self, settings):
        told = {name: getattr(settings, name) for name in type(settings).__slots__}
        return subprocess.Popen(
            [sys.executable, "-c", NOTING, json.dumps(told), str(self.folder / "notes")],
            env={**self.env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def process(self, instance):
        """The process of an engine."""
        return self._processes[instance]


@dataclass
class Asked:
    """What came of one request."""

    sent_s: float
    first_s: float = np.inf
    end_s: float = np.inf
    tokens: int = 0
    how: str = "under way"


class Client(threading.Thread):
    """Streams answers through the router until told to end."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self.asked, self._ending = url, {}, threading.Event()

    def run(self) -> None:
        """Ask, at an even pace."""
        asyncio.run(self._play())

    def finish(self, limit_s: float) -> None:
        """Ask no more, and wait for what was asked."""
        self._ending.set()
        self.join(limit_s)

    async def _play(self) -> None:
        timeout = aiohttp.ClientTimeout(total=90.0)
        # A connection each: what a router that ends does to kept ones is the client's affair.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            tasks = set()
            for number in itertools.count(1):
                if self._ending.is_set():
                    break
                task = asyncio.create_task(self._ask(session, number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(1.0 / RATE_REQ_S)
            await asyncio.gather(*tasks)

    async def _ask(self, session, number: int) -> None:
        one = self.asked[number] = Asked(time.monotonic())
        body = {"model": "emulated", "prompt": [number] * 60, "max_tokens": OUTPUT_TOK,
                "stream": True}  # fmt: skip
        try:
            async with session.post(f"{self._url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    one.how = f"status {answer.status}"
                    return
                async for line in answer.content:
                    if b'"error"' in line:
                        one.how = "error event"
                        return
                    if line.startswith(b"data: {") and b'"choices"' in line:
                        one.tokens += 1
                        one.first_s = min(one.first_s, time.monotonic())
            one.how = "whole" if one.tokens >= OUTPUT_TOK else "cut off"
        except aiohttp.ClientConnectorError:
            one.how = "not taken"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            one.how = type(error).__name__
        finally:
            one.end_s = time.monotonic()


class Stack:
    """The processes."""

    def __init__(self, folder: Path) -> None:
        self.fleet = NotingFleet(f"{ENGINES}C", dilation=DILATION, folder=folder)
        self.folder = folder
        controller, router = free_ports(2)
        at = f"http://127.0.0.1:{controller}"
        self.url = f"http://127.0.0.1:{router}"
        common = ["--fleet", str(self.fleet.fleet_file), "--slo", self.fleet.slo_text]
        acts = [*common, "--mode", "act"]
        self._told = {
            "controller": ["controller", *acts, "--policy", "mpc", "--port", str(controller)],
            "agent": ["agent", *acts, "--controller", at, "--lock-dir", str(folder / "locks")],
            "router": ["router", *common, "--policy", "mpc", "--controller", at, "--probe", "1",
                       "--drain", "10", "--port", str(router)],
        }  # fmt: skip
        self._env = {**self.fleet.env, TOKEN_VARIABLE: secrets.token_urlsafe(32),
                     "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
        self.processes: dict[str, subprocess.Popen] = {}
        self._stopped: set[int] = set()

    def process(self, name: str) -> subprocess.Popen | None:
        """Of an engine or a command."""
        if name.startswith("engine"):
            return self.fleet.process(int(name[7]))
        return self.processes.get(name)

    def runs(self, name: str) -> bool:
        """Whether it lives."""
        process = self.process(name)
        return process is not None and process.poll() is None

    def lost(self, name: str) -> bool:
        """Whether it is dead or frozen."""
        return not self.runs(name) or self.process(name).pid in self._stopped

    def start(self, name: str) -> None:
        """Start a command or an engine that does not run; an engine is waited for."""
        if name.startswith("engine"):
            self.fleet.restart(int(name[7]))
            return
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "voltana_ctrl.cli", *self._told[name]], env=self._env,
                stderr=log, stdout=log, start_new_session=True,
            )  # fmt: skip

    def strike(self, victim: str, number: signal.Signals) -> None:
        """Send one signal to a process, or to the watchdog of an engine."""
        name = victim.removesuffix("'s watchdog")
        if not self.runs(name):
            return
        pids = [self.process(name).pid] if name == victim else listeners(self.process(name).pid)
        for pid in pids[:1]:
            os.kill(pid, number)
            if number is signal.SIGSTOP:
                self._stopped.add(pid)

    def thaw(self) -> None:
        """Let what was stopped go on."""
        let_go_on(self._stopped)

    def left_locked(self) -> int:
        """GPUs that are locked though their engine is dead or frozen."""
        gpus = self.fleet.fake.gpus
        return sum(self.lost(f"engine {k}") and bool(gpus[k].locked) for k in range(ENGINES))

    def recover(self) -> None:
        """Start what died, and wait until the router takes requests and engines hold clocks."""
        for name in (*VICTIMS[:ENGINES], *COMMANDS):
            if not self.runs(name):
                self.start(name)
        if until(self._listens, 90.0) is None:
            raise RuntimeError((self.folder / "router.log").read_text()[-600:])
        # Where the agent is starting still, an engine has no orders, and locks nothing.
        until(lambda: all(gpu.locked for gpu in self.fleet.fake.gpus), 8.0)

    def _listens(self) -> bool:
        import socket

        try:
            port = int(self.url.rpartition(":")[2])
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End all."""
        self.thaw()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.fleet.close()


def plans(rng: random.Random):
    """Who is struck: every victim alone and every ordered pair, again and again, shuffled."""
    while True:
        of = [(one,) for one in VICTIMS] + list(itertools.permutations(VICTIMS, 2))
        rng.shuffle(of)
        yield from of


@dataclass
class Told:
    """What a campaign found."""

    events: int = 0
    left_locked: int = 0
    requests: int = 0
    whole: int = 0
    lost: int = 0
    doubled: int = 0
    cut_off: int = 0
    by_router: int = 0
    free_s: tuple[float, ...] = ()
    service_s: tuple[float, ...] = ()
    router_s: tuple[float, ...] = ()

    def rows(self) -> str:
        """As a table."""

        def spread(times_s) -> str:
            if not times_s:
                return "none"
            of = np.array(times_s)
            return (f"{np.median(of):.2f} s in the median, {np.quantile(of, 0.99):.1f} s at the"
                    f" 99th percentile, {of.max():.1f} s at most, of {len(of)}")  # fmt: skip

        return "\n".join([
            f"events                                   {self.events}",
            f"GPUs left locked                         {self.left_locked}",
            f"requests                                 {self.requests}, {self.whole} whole",
            f"lost before the first token              {self.lost}",
            f"sent again after the first token         {self.doubled}",
            f"cut off after it, with their engine      {self.cut_off}",
            f"broken or not taken by a lost router     {self.by_router}",
            f"clocks of a lost engine given back       {spread(self.free_s)}",
            f"next first token, the router alive       {spread(self.service_s)}",
            f"next first token, the router struck      {spread(self.router_s)}",
        ])  # fmt: skip


def campaign(events: int, seed: int, report=print) -> Told:
    """Strike, and count."""
    rng, told = random.Random(seed), Told()
    struck: list[tuple[float, float, dict[str, str]]] = []
    with tempfile.TemporaryDirectory(prefix="voltana-kill-") as made:
        stack = Stack(Path(made))
        client = Client(stack.url)
        try:
            stack.recover()
            client.start()
            for number, victims in zip(range(events), plans(rng), strict=False):
                stack.recover()
                time.sleep(rng.uniform(0.2, 0.6))
                begin_s, said = time.monotonic(), {}
                for k, victim in enumerate(victims):
                    what = rng.choice(SIGNALS)
                    time.sleep(rng.uniform(0.0, 0.3) if k else 0.0)
                    stack.strike(victim, what)
                    said[victim] = what.name
                time.sleep(rng.uniform(0.05, 0.5))
                if any(stack.lost(f"engine {k}") for k in range(ENGINES)):
                    took_s = until(lambda: not stack.left_locked(), LIMIT_S)
                    told.free_s += (LIMIT_S if took_s is None else took_s,)
                left = stack.left_locked()
                told.left_locked += left
                stack.thaw()
                # Ended by SIGTERM: what it has begun comes to its end first.
                for one, what in said.items():
                    if what == "SIGTERM" and "watchdog" not in one:
                        took_s = until(lambda one=one: not stack.runs(one), 90.0)
                        if took_s is None or took_s > 30.0:
                            report(f"event {number}: {said}: {one} took {took_s} s to end")
                stack.recover()
                struck.append((begin_s, time.monotonic(), said))
                told.events += 1
                if left:
                    report(f"event {number}: {said}: {left} GPUs left locked")
                if told.events % 25 == 0:
                    report(f"{told.events} events, {told.left_locked} GPUs left locked,"
                           f" {len(client.asked)} requests")  # fmt: skip
            client.finish(100.0)
        finally:
            stack.close()
        _judge(told, client.asked, struck, (stack.folder / "notes").read_text(), report)
    return told


def _judge(told: Told, asked: dict[int, Asked], struck, notes: str, report) -> None:
    """Count what became of requests."""
    told.requests, how = len(asked), Counter()
    for number, one in sorted(asked.items()):
        told.whole += one.how == "whole"
        if one.how == "whole":
            continue
        how[one.how, one.tokens > 0] += 1
        near = [said for from_s, to_s, said in struck if one.sent_s <= to_s and one.end_s >= from_s]
        router = {said.get("router") for said in near}
        # What one that ends has begun, it ends; one that is frozen goes on.
        untaken = one.how in ("not taken", "ClientOSError", "status 503")
        if "SIGKILL" in router or ("SIGTERM" in router and untaken):
            told.by_router += 1
        elif one.tokens:
            told.cut_off += 1
        else:
            told.lost += 1
            report(f"lost: request {number}: {one.how} after {one.end_s - one.sent_s:.1f} s,"
                   f" while {near}")  # fmt: skip
    for line in notes.splitlines():
        at_s, number = line.split()
        one = asked.get(int(number))
        if one is not None and float(at_s) > one.first_s:
            told.doubled += 1
            report(f"sent again: request {number}, {float(at_s) - one.first_s:.2f} s after its"
                   " first token")  # fmt: skip
    for from_s, _, said in struck:
        firsts = [one.first_s for one in asked.values() if one.sent_s >= from_s]
        took_s = min(firsts, default=np.inf) - from_s
        if np.isfinite(took_s):
            name = "router_s" if "router" in said else "service_s"
            setattr(told, name, (*getattr(told, name), took_s))
    report(f"ends of requests that were not whole: {dict(how)}")


def main(arguments: list[str] | None = None) -> int:
    """Strike, and print what was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    begin_s = time.monotonic()
    with end_on_sigterm():
        told = campaign(asked.events, asked.seed, report=lambda text: print(text, flush=True))
    print(told.rows())
    print(f"{time.monotonic() - begin_s:.0f} s")
    return int(bool(told.left_locked or told.lost or told.doubled))


if __name__ == "__main__":
    sys.exit(main())
