"""Controllers, watchdogs and the setter killed, stopped and ended, one and two at a time.

    python bench/kill.py                      # 500 events on GPUs of the fake driver
    python bench/kill.py --events 40 --seed 3

Two controllers hold two fake GPUs each, one by itself, one through the setter; a third process of
ours only looks after the dead. An event sends SIGKILL, SIGTERM or SIGSTOP to one or two of them or
of the watchdogs, in either order, up to 0.3 s apart. What a dead or frozen holder had locked must
be given back while it is dead or frozen, by whoever is left; then what was stopped goes on, and
what died is started again. Counted are GPUs still locked after the limit, and the time that it
took. Exit status 1 if one was left.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from voltana_ctrl.backends.nvml.process import listeners
from voltana_ctrl.testing import FakeNvml

ROOT = Path(__file__).resolve().parents[1]
#: Within which everything must be given back: a frozen watchdog is noticed after 1.3 s, a frozen
#: controller after 2 s, and a pair of which one is frozen after four looks of a second each.
LIMIT_S = 15.0
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.backends.nvml.lease import end_on_sigterm
from voltana_ctrl.backends.nvml.setter import run_setter
from voltana_ctrl.backends.nvml.sweep import Sweep
from voltana_ctrl.errors import VoltanaError
folder, uuids = Path({folder!r}), {uuids!r}

def hold(uuids, **settings):
    spec = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    gpus = {{name: [uuid] for name, uuid in zip(spec.ids, uuids)}}
    with end_on_sigterm(), NvmlBackend(spec, gpus, lock_dir=folder, **settings) as backend:
        k = 0
        while True:
            k += 1
            try:
                backend.read()
                backend.apply(Decision.highest(spec, floor_mhz=[705.0, 705.0 + 15 * (k // 20 % 2)],
                                               ceiling_mhz=[705.0, 720.0]))
            except VoltanaError:
                pass  # the setter is gone, or does not let it: tried again
            time.sleep(0.1)

{body}
"""
BODIES = {
    "agent": "hold(uuids[:2])",
    "setter": 'run_setter(uuids[2:], [0], folder / "setter.sock", lock_dir=folder)',
    "client": 'hold(uuids[2:], setter=folder / "setter.sock")',
    "sweeper": "with end_on_sigterm(), Sweep(folder):\n    time.sleep(1e6)",
}
#: Who can be struck; a watchdog reads from a pipe of its controller.
VICTIMS = ("agent", "agent's watchdog", "setter", "setter's watchdog", "client", "sweeper")


class Machine:
    """The processes, and the fake GPUs that they hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake = FakeNvml(folder, gpus=4)
        self.processes: dict[str, subprocess.Popen] = {}
        self._stopped: set[int] = set()

    def start(self, name: str) -> None:
        """Start one that does not run."""
        program = PROGRAM.format(
            root=str(ROOT), folder=str(self.folder), uuids=list(self.fake.uuids), body=BODIES[name]
        )
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-c", program], env=self.fake.env, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def runs(self, name: str) -> bool:
        """Whether it lives."""
        return name in self.processes and self.processes[name].poll() is None

    def all_hold(self) -> bool:
        """Whether every GPU is locked by whom it should be."""
        return all(gpu.locked for gpu in self.fake.gpus)

    def pid(self, victim: str) -> int | None:
        """Process of a victim, None where it has none now."""
        name = victim.removesuffix("'s watchdog")
        if not self.runs(name):
            return None
        pid = self.processes[name].pid
        if victim == name:
            return pid
        found = listeners(pid)
        return found[0] if found else None

    def strike(self, victim: str, number: signal.Signals) -> None:
        """Send one signal."""
        pid = self.pid(victim)
        if pid is None:
            return
        os.kill(pid, number)
        if number is signal.SIGSTOP:
            self._stopped.add(pid)

    def thaw(self) -> None:
        """Let what was stopped go on."""
        let_go_on(self._stopped)

    def lost(self, name: str) -> bool:
        """Whether it is dead or frozen."""
        return not self.runs(name) or self.processes[name].pid in self._stopped

    def must_be_free(self) -> list[int]:
        """GPUs whose holder is dead or frozen."""
        free = [0, 1] if self.lost("agent") else []
        return free + ([2, 3] if self.lost("client") or self.lost("setter") else [])

    def close(self) -> None:
        """End all, and wait."""
        self.thaw()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def let_go_on(stopped: set[int]) -> None:
    """Continue stopped processes, as far as they are still there, and forget them."""
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    stopped.clear()


def until(condition, limit_s: float) -> float | None:
    """How long it took; None where it did not come."""
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < limit_s:
        if condition():
            return time.monotonic() - begin_s
        time.sleep(0.02)
    return None


def event(machine: Machine, rng: random.Random) -> tuple[str, float, int]:
    """One event: what was done, how long the recovery took, how many GPUs were left locked."""
    victims = rng.sample(VICTIMS, rng.choice((1, 2, 2)))
    told = []
    for k, victim in enumerate(victims):
        number = rng.choice(SIGNALS)
        time.sleep(rng.uniform(0.0, 0.3) if k else 0.0)
        machine.strike(victim, number)
        told.append(f"{victim} {number.name}")
    # SIGTERM takes a while to end a program; what it leaves is looked at then.
    time.sleep(0.05)
    begin_s = time.monotonic()

    def free() -> bool:
        ended = all(
            machine.lost(victim) for victim, what in zip(victims, told, strict=True)
            if what.endswith("SIGTERM") and "watchdog" not in victim
        )  # fmt: skip
        return ended and not any(machine.fake.gpus[i].locked for i in machine.must_be_free())

    took_s = until(free, LIMIT_S)
    left = 0
    if took_s is None:
        left = sum(bool(machine.fake.gpus[i].locked) for i in machine.must_be_free())
    took_s = time.monotonic() - begin_s
    machine.thaw()
    return " + ".join(told), took_s, left


def recover(machine: Machine) -> bool:
    """Start what died, and wait until all hold again."""
    for name in BODIES:
        if not machine.runs(name):
            machine.start(name)

    def held() -> bool:
        for name in BODIES:  # a client that came before its setter ends, and comes again
            if not machine.runs(name):
                machine.start(name)
                time.sleep(0.5)
        return machine.all_hold()

    return until(held, 60.0) is not None


def campaign(events: int, seed: int, report=print) -> tuple[int, int, list[float]]:
    """Events done, GPUs left locked, recovery times."""
    rng, took, left = random.Random(seed), [], 0
    by_kind: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="voltana-kill-") as made:
        machine = Machine(Path(made))
        try:
            for k in range(events):
                if not recover(machine):
                    logs = {name: (machine.folder / f"{name}.log").read_text()[-300:]
                            for name in BODIES}  # fmt: skip
                    raise RuntimeError(f"event {k}: they do not come back: {logs}")
                time.sleep(rng.uniform(0.0, 0.3))
                told, took_s, locked = event(machine, rng)
                took.append(took_s)
                left += locked
                by_kind[told.count("+") + 1] += 1
                if locked:
                    report(f"event {k}: {told}: {locked} GPUs left locked after {took_s:.1f} s")
                if (k + 1) % 50 == 0:
                    report(
                        f"{k + 1} events, {left} GPUs left locked, recovery"
                        f" {np.median(took):.2f} s in the median, {max(took):.1f} s at most"
                    )
        finally:
            machine.close()
        until(lambda: not any(gpu.locked for gpu in machine.fake.gpus), LIMIT_S)
        behind = sum(bool(gpu.locked) for gpu in machine.fake.gpus)
        left += behind
        if behind:
            report(f"at the end: {behind} GPUs left locked")
    return len(took), left, took


def main(arguments: list[str] | None = None) -> int:
    """Strike, and print what was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    begin_s = time.monotonic()
    events, left, took = campaign(
        asked.events, asked.seed, report=lambda text: print(text, flush=True)
    )
    print(
        f"{events} events in {time.monotonic() - begin_s:.0f} s: {left} GPUs left locked; recovery"
        f" {np.median(took):.2f} s in the median, {np.quantile(took, 0.99):.1f} s at the 99th"
        f" percentile, {max(took):.1f} s at most"
    )
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
