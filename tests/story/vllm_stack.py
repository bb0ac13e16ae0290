"""vLLM on this machine's CPU: servers of one tiny model, each with its own process group."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.helpers.fake_gpus import seconds_until
from tests.helpers.paths import ROOT
from tests.story.dynamo_stack import free_ports

START_LIMIT_S = 240.0


def environment_folder() -> Path:
    """Folder of the virtual environment with vLLM."""
    folder = Path(os.environ.get("VOLTANA_VLLM_ENV", "no-such-folder"))
    if not (folder / "complete").exists():
        pytest.skip("needs the folder of tests/story/vllm_env.sh in VOLTANA_VLLM_ENV")
    return folder


def make_model(venv: Path, folder: Path, width: int = 128) -> Path:
    """Write the tiny model to `folder`."""
    run = [venv / "bin" / "python", ROOT / "tests" / "helpers" / "tiny_model.py", folder]
    subprocess.run([*run, str(width)], check=True, timeout=240, capture_output=True)
    return folder


def install_package(venv: Path, folder: Path, tree: Path) -> Path:
    """Write this package with its entry points to `folder`, as pip installs it."""
    for name in ("voltana_ctrl", "pyproject.toml", "README.md", "LICENSE"):
        source, to = ROOT / name, tree / name
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to)
    run = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*run, "--target", folder, tree], check=True, timeout=300)
    return folder


class VllmServer:
    """Started by ``with``; answers once `wait` has returned. All draw the same weights."""

    def __init__(self, venv: Path, model: Path, log: Path, *options, **variables) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._environ = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            **variables,
        }  # fmt: skip
        self._command = [
            venv / "bin" / "vllm", "serve", model, "--load-format", "dummy", "--enforce-eager",
            "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16",
            "--num-gpu-blocks-override", "64", "--host", "127.0.0.1", "--port", self.port,
            "--served-model-name", "tiny", *options,
        ]  # fmt: skip

    def __enter__(self):
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(part) for part in self._command],
                env=self._environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait(self):
        def healthy():
            assert self.process.poll() is None, self._log.read_text(errors="replace")[-3000:]
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
            return False

        seconds_until(healthy, limit_s=START_LIMIT_S)

    def counters(self, *names):
        """Sums over labels of its own counters, whose names begin with ``vllm:``."""
        told = dict.fromkeys(names, 0.0)
        for line in httpx.get(f"{self.url}/metrics", trust_env=False).text.splitlines():
            name = line.partition("{")[0].removeprefix("vllm:")
            if name in told:
                told[name] += float(line.rpartition(" ")[2])
        return told

    def kill(self):
        """As a machine that dies: every process of it, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def kill_engine_core(self):
        """The process that computes; the one that answers HTTP lives on for a while."""
        children = subprocess.run(
            ["pgrep", "-g", str(self.process.pid), "-f", "EngineCore"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
