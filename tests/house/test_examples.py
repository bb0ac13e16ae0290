"""Every example runs as it is, and stays short enough to be read."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = {path.stem for path in EXAMPLES}


def execute(path, *arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_promised_examples_exist():
    assert {
        "heterogeneous_fleet", "own_lqr", "own_policy", "own_router", "power_budget", "quickstart",
        "starlette_router", "sweep_on_dask", "sweep_on_mpi", "sweep_on_ray", "trace_replay",
    } == NAMES  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_stand_alone(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    tree = ast.parse(text)
    assert f"python examples/{path.name}" in (ast.get_docstring(tree) or "")
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & NAMES


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    printed = execute(path, cwd=tmp_path)
    assert "(simulated)" in printed or " is not installed" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_trace_replay_brings_a_trace_where_none_lies(tmp_path):
    # From a folder that has no data two levels up.
    alone = tmp_path / "checkout" / "examples" / "trace_replay.py"
    alone.parent.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "trace_replay.py", alone)
    assert "trace.csv on 2P2D" in execute(alone, cwd=tmp_path)


@pytest.mark.slow
def test_sweep_on_dask_says_so_where_dask_is_absent(tmp_path):
    (tmp_path / "distributed.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    printed = execute(ROOT / "examples" / "sweep_on_dask.py", cwd=tmp_path, PYTHONPATH=path)
    assert printed.startswith("Dask is not installed; pip install")


@pytest.mark.slow
def test_a_dask_cluster_gives_the_figures_of_one_process(tmp_path):
    pytest.importorskip("distributed", reason="needs Dask: pip install '.[dask]'")
    program = """
from distributed import Client, LocalCluster
from voltana_ctrl import compare
TIMING = ("sim_wall_s", "decide_p50_s", "decide_p99_s")
SETUP = {"rates_req_s": [20.0, 40.0], "seeds": 2, "duration_s": 10.0, "warmup_s": 2.0,
         "policies": ["static-max", "pack", "bound"]}
def plain(result):
    return [{k: v for k, v in run.items() if k not in TIMING} for run in result.runs]
if __name__ == "__main__":
    told = []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            spread = compare(executor=client.get_executor(), **SETUP,
                             on_progress=lambda done, total: told.append((done, total)))
    assert plain(spread) == plain(compare(**SETUP))
    assert told == [(done, 12) for done in range(13)], told
    print("same")
"""
    script = tmp_path / "sweep.py"
    script.write_text(program)
    assert execute(script, cwd=tmp_path) == "same\n"
