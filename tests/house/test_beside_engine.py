"""Beside a serving engine: no pin of it moves, and what runs inside it needs NumPy and Numba."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

# Everything that may be missing where the package was installed without its dependencies.
WITHOUT = """
import sys

class Without:
    kept = {kept!r}
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in self.gone:
            raise ModuleNotFoundError(f"No module named {{top!r}}", name=top)

import importlib.metadata
tops = {{top for top, names in importlib.metadata.packages_distributions().items()
        if "voltana-ctrl" not in names}}
Without.gone = tops - set(Without.kept)
sys.meta_path.insert(0, Without())
"""
ENGINE = ["numpy", "numba", "llvmlite"]


def with_needs(*packages):
    """Modules of packages and of all that they need."""
    found, todo = set(), list(packages)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            needed = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\w.-]+", one)[0] for one in needed if "extra ==" not in one]
    return [
        top for top, names in metadata.packages_distributions().items()
        if found & {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    ]  # fmt: skip


def run(root, program, *, kept=ENGINE, **environment):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(kept=kept) + program],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_what_runs_inside_an_engine_needs_numpy_and_numba_alone(root, tmp_path):
    """The scheduler class of vLLM, told to advise, is built and asked for a clock."""
    program = """
import types, sys
def module(name, **members):
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:k]), types.ModuleType(".".join(parts[:k])))
    vars(sys.modules[name]).update(members)
module("vllm.v1.metrics.loggers", StatLoggerBase=object)
module("vllm.v1.core.sched.scheduler", Scheduler=object)
module("sglang.srt.plugins.hook_registry")
from voltana_ctrl.engines import vllm, sglang
from voltana_ctrl import IterationGovernor, Slo, load_profile
from voltana_ctrl.types import FleetSpec
assert vllm.GovernedScheduler and vllm.StatLogger
fleet = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
governor = IterationGovernor(fleet.instances[0], Slo(ttft_s=0.6, itl_s=0.06))
print(governor.step(8.0, 4096.0, 0.0, 0.0, 210.0, 1410.0))
"""
    done = run(root, program)
    assert done.returncode == 0, done.stderr
    assert 210.0 <= float(done.stdout) < 1410.0


@pytest.mark.parametrize(
    ("kept", "missing"),
    [(ENGINE, "typer"), (with_needs("numpy", "numba", "scipy", "typer", "rich"), "cvxpy")],
    ids=["the parser", "a solver"],
)
def test_what_is_missing_is_one_line_with_its_mend(root, kept, missing, tmp_path):
    # The plan is made where waking takes time, and nowhere else.
    profile = "a100-sxm-80gb/llama-3.1-8b"
    fleet = "".join(
        f'[[instance]]\nrole = "{role}"\nprofile = "{profile}"\nasleep_w = 20.0\nwake_s = 10.0\n'
        for role in ("prefill", "decode")
    )
    path = tmp_path / "sleepy.toml"
    path.write_text(fleet, encoding="utf-8")
    program = f"""
import sys
from voltana_ctrl.__main__ import main
sys.argv = ["voltana-ctrl", "compare", "--rate", "5", "--duration", "2", "--policies", "mpc",
            "--fleet", {path.as_posix()!r}]
main()
"""
    done = run(root, program, kept=kept, COLUMNS="200")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"voltana-ctrl: {missing} is not installed: pip install {missing}")
    assert "Traceback" not in done.stderr


def test_doctor_and_observation_need_no_policy_packages(root):
    kept = with_needs("numpy", "numba", "typer", "rich", "nvidia-ml-py")
    program = """
import sys
from voltana_ctrl.__main__ import main
sys.argv = ["voltana-ctrl", "doctor"]
main()
"""
    done = run(root, program, kept=kept)
    assert done.returncode == 0, done.stderr
    assert "compiled code: " in done.stdout


#: What the newest vLLM for CPUs (0.32.0) pins or resolves to, of what we need too.
PINS = """
numpy==2.3.5
numba==0.65.0
llvmlite==0.47.0
"""


def _freeze(python):
    done = subprocess.run(
        [python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    )
    return dict(
        re.split(r"==| @ ", line.strip(), maxsplit=1)
        for line in done.stdout.splitlines()
        if re.search(r"==| @ ", line)
    )


@pytest.mark.slow
def test_no_pin_of_the_engine_moves(root, tmp_path):
    """As the page says: constraints from the environment's own pip freeze."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "engine"], check=True)
    python = str(tmp_path / "engine" / "bin" / "python")
    pins = tmp_path / "engine.txt"
    pins.write_text(PINS)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "-r", pins], check=False).returncode:
        pytest.skip("no package index answers")
    before = _freeze(python)
    (tmp_path / "pins.txt").write_text(
        "".join(f"{name}=={version}\n" for name, version in before.items())
    )
    subprocess.run([*pip, "-c", tmp_path / "pins.txt", f"{root}[nvml]"], check=True)
    after = _freeze(python)
    assert {name: after.get(name) for name in before} == before
    assert "voltana-ctrl" in after
    done = subprocess.run(
        [python, "-c", "import voltana_ctrl.engines.vllm, voltana_ctrl.control.governor"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
