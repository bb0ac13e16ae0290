"""Machines with fake GPUs for the hardware tests, and programs that control them."""

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.testing import FakeNvml, build_fake_nvml

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None,
    reason="the fake driver library is built from C; needs a C compiler",
)
PROFILE = "a100-sxm-80gb/llama-3.1-8b"


@functools.cache
def library() -> Path:
    pytest.importorskip("pynvml", reason="needs the nvml extra")
    folder = Path(tempfile.mkdtemp(prefix="voltana-fake-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_fake_nvml(folder)


@contextlib.contextmanager
def machine(folder: Path, gpus: int = 2) -> Iterator[FakeNvml]:
    with FakeNvml(folder, gpus=gpus, library=library()) as fake:
        yield fake


@functools.cache
def fleet(text: str = "1P1D") -> FleetSpec:
    return FleetSpec.parse(text, load_profile(PROFILE))


def assignment(spec: FleetSpec, fake: FakeNvml) -> dict[str, list[str]]:
    return {name: [uuid] for name, uuid in zip(spec.ids, fake.uuids, strict=False)}


def open_backend(fake: FakeNvml, folder: Path, spec: FleetSpec | None = None, **settings):
    spec = spec or fleet()
    settings = {"lock_dir": folder, "library": fake.library, **settings}
    return NvmlBackend(spec, assignment(spec, fake), **settings)


def decision(*clocks_mhz: float, **changes) -> Decision:
    spec = fleet(f"{len(clocks_mhz) - 1}P1D")
    from dataclasses import replace

    made = Decision.highest(spec, floor_mhz=np.array(clocks_mhz, dtype=float))
    return replace(made, **changes)


HOST = """
import json, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np
from tests.helpers.fake_gpus import decision, fleet
from voltana_ctrl import ControlLoop, Guard
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.backends.nvml.lease import end_on_sigterm
from voltana_ctrl.types import Limits
folder, uuids = Path({folder!r}), {uuids!r}
spec = fleet()

def open_backend(**settings):
    gpus = {{name: [uuid] for name, uuid in zip(spec.ids, uuids)}}
    return NvmlBackend(spec, gpus, **{{"lock_dir": folder, **settings}})

def say(text):
    print(text, flush=True)

{body}
"""


class Host:
    """A program with the fake driver, started, spoken to, and ended by a test."""

    def __init__(self, fake: FakeNvml, folder: Path, body: str) -> None:
        program = HOST.format(
            root=str(ROOT),
            folder=str(folder),
            uuids=list(fake.uuids),
            body=body,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=fake.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def expect(self, word: str) -> str:
        """Read the next line, which starts with this word, and return the rest of it."""
        line = self.process.stdout.readline()
        if not line.startswith(word):
            self.process.kill()
            raise AssertionError(f"expected {word!r}, got {line!r}: {self.process.stderr.read()}")
        return line.removeprefix(word).strip()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        return self.process.wait(timeout=60)

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


def seconds_until(condition: Callable[[], bool], limit_s: float = 20.0) -> float:
    """How long it takes until a condition holds."""
    begin_s = time.monotonic()
    while not condition():
        if time.monotonic() - begin_s > limit_s:
            raise AssertionError(f"it does not hold after {limit_s} s")
        time.sleep(0.01)
    return time.monotonic() - begin_s


def all_given_back(fake: FakeNvml) -> bool:
    return not any(gpu.locked for gpu in fake.gpus)
