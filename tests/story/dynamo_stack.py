"""NVIDIA Dynamo on this machine: a frontend and mock engines, apart or colocated."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np

from tests.helpers.paths import ROOT
from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.reader import dynamo_fpm_addresses

PROFILE = "a100-sxm-80gb/llama-3.1-8b"
START_LIMIT_S = 90.0


def environment_python() -> Path:
    """Python of Dynamo's environment, which is built if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get("VOLTANA_DYNAMO_ENV", cache / "voltana-ctrl" / "ai-dynamo-1.6.1"))
    script = ROOT / "tests" / "story" / "dynamo_env.sh"
    subprocess.run(["bash", script, folder], check=True, timeout=900)
    return folder / "bin" / "python"


def free_ports(n):
    """Free ports below 32768: Dynamo keeps that of its metrics in 16 bits with a sign."""
    found = []
    rng = np.random.default_rng()
    while len(found) < n:
        port = int(rng.integers(15_000, 32_000))
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    return list(dict.fromkeys(found))


class DynamoStack:
    """Started by ``with``; `fleet` and `endpoints` describe it to us.

    It is 2P2D, two prefill and two decode engines, or 2C, two that do both.
    """

    def __init__(
        self, folder: Path, python: Path, *, shape: str = "2P2D", model: Path | None = None
    ) -> None:
        self.folder, self.python, self.shape = folder, python, shape
        self.model = folder / "tiny" if model is None else model
        self.discovery = folder / "discovery"
        self.processes: list[subprocess.Popen] = []
        self.port, self.prefill_port, self.decode_port, *self.bootstrap = free_ports(5)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        if not self.model.exists():
            run = [self.python, ROOT / "tests" / "helpers" / "tiny_model.py", self.model]
            subprocess.run(run, check=True, timeout=120, capture_output=True)
        self.discovery.mkdir()
        mock = ["-m", "dynamo.mocker", "--model-path", self.model, "--model-name", "tiny"]
        mock += ["--num-workers", "2", "--disaggregation-mode"]
        if self.shape == "2C":
            self._launch("both", self.decode_port, [*mock, "agg"])
        else:
            ports = ",".join(map(str, self.bootstrap))
            prefill = [*mock, "prefill", "--bootstrap-ports", ports]
            self._launch("prefill", self.prefill_port, prefill)
            self._launch("decode", self.decode_port, [*mock, "decode"])
        front = ["-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", self.port]
        self._launch("frontend", None, [*front, "--router-mode", "kv"])
        until_s = time.monotonic() + START_LIMIT_S
        while not self._ready():
            ended = [one for one in self.processes if one.poll() is not None]
            if ended or time.monotonic() > until_s:
                raise AssertionError(f"Dynamo does not start: {self.log()}")
            time.sleep(0.2)

    def _launch(self, name, system_port, arguments):
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(self.discovery),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "HF_HUB_OFFLINE": "1",
        }
        if system_port is not None:
            environment["DYN_SYSTEM_PORT"] = str(system_port)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [str(part) for part in (self.python, *arguments)],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _ready(self):
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
                served = json.load(answer)["data"]
        except OSError:
            return False
        n = len(self.fleet)
        met = sum(map(len, self.workers().values())) == n
        if not (served and met and len(dynamo_fpm_addresses(self.discovery)) == n):
            return False
        try:  # the frontend may not have met all of them yet
            return self.complete([5, 6, 7], 2) is not None
        except OSError:
            return False

    def workers(self):
        """Ids of the workers, by component, from the discovery folder."""
        found = {"prefill": [], "backend": []}
        for path in sorted(self.discovery.glob("*/instances/*generate*")):
            with contextlib.suppress(ValueError):
                told = json.loads(path.read_text())
                if told["endpoint"] == "generate":
                    found[told["component"]].append(told["instance_id"])
        return {name: sorted(ids) for name, ids in found.items()}

    def complete(self, prompt, max_tokens):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens}
        asked = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return json.load(answer)

    @property
    def fleet(self):
        return FleetSpec.parse(self.shape, load_profile(PROFILE))

    @property
    def endpoints(self):
        workers = self.workers()
        ids = [*workers["prefill"], *workers["backend"]]
        return [
            Endpoint(instance=name, kind="dynamo", url=self.url, worker_id=worker)
            for name, worker in zip(self.fleet.ids, ids, strict=True)
        ]

    def counters(self):
        """Sums that the frontend counts itself."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        told = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            told[name] = value
        return {
            "prompt_tok": float(told['dynamo_frontend_input_sequence_tokens_sum{model="tiny"}']),
            "output_tok": float(told['dynamo_frontend_output_tokens_total{model="tiny"}']),
            "cached_tok": float(told['dynamo_frontend_cached_tokens_sum{model="tiny"}']),
            "requests": float(told['dynamo_frontend_input_sequence_tokens_count{model="tiny"}']),
        }

    def log(self):
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def __exit__(self, *error):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=30)


def random_prompt(rng: np.random.Generator, low: int, high: int) -> list[int]:
    return rng.integers(3, 500, size=int(rng.integers(low, high))).tolist()
