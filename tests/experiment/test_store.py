"""A sweep goes on where it was stopped: no run is lost, doubled, or taken for another."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from voltana_ctrl import ConfigError, Slo, compare
from voltana_ctrl.experiment import ResultStore
from voltana_ctrl.experiment.grid import plan_runs

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the tables extra")

ASKED = {
    "rates_req_s": [5.0], "duration_s": 3.0, "warmup_s": 0.0, "policies": ["static-max", "bound"],
}  # fmt: skip


def kept(folder):
    return [
        row for file in folder.glob("*.parquet") for row in parquet.read_table(file).to_pylist()
    ]


def test_what_was_stopped_goes_on(tmp_path):
    grid = plan_runs(**ASKED, seeds=5)
    with ResultStore(tmp_path) as store:
        first = [done for done, _ in zip(grid.execute(store=store), range(4), strict=False)]
    with ResultStore(tmp_path) as store:
        assert len(store) >= 4
        again = list(grid.execute(store=store))
    assert len(again) == 10
    assert sum(done.took_s == 0.0 for done in again) >= 4
    known = {done.index: done.figures for done in again}
    assert all(known[done.index]["energy_j"] == done.figures["energy_j"] for done in first)
    rows = [
        row for file in tmp_path.glob("*.parquet") for row in parquet.read_table(file).to_pylist()
    ]
    assert len(rows) == len({row["run_key"] for row in rows}) == 10


def test_a_key_tells_every_difference_and_no_other(tmp_path):
    store = ResultStore(tmp_path)
    run = plan_runs(**ASKED).runs[0]
    same = plan_runs(**ASKED).runs[0]
    assert store.key(run) == store.key(same)
    others = [
        replace(run, seed=1),
        replace(run, policy="static-1005"),
        replace(run, rate_req_s=5.5),
        replace(run, duration_s=4.0),
        replace(run, tick_s=0.2),
        replace(run, slo=Slo(ttft_s=0.7, itl_s=0.06)),
        replace(run, settings=replace(run.settings, jitter_sd_frac=0.1)),
        plan_runs(**ASKED, fleet="2P1D").runs[0],
        plan_runs(**ASKED, profile="h100-sxm-80gb/llama-3.1-8b").runs[0],
        plan_runs(**ASKED, workload="lmsys").runs[0],
    ]
    assert len({store.key(one) for one in [run, *others]}) == len(others) + 1


def test_the_text_of_ones_own_policy_is_part_of_its_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "own_for_store.py"
    source.write_text("from voltana_ctrl.control import StaticController\nclass Mine:\n    pass\n")
    store = ResultStore(tmp_path / "store")
    run = plan_runs(**(ASKED | {"policies": ["own_for_store:Mine"]})).runs[0]
    before = store.key(run)
    source.write_text(source.read_text() + "# another text\n")
    assert store.key(run) != before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "other.parquet").write_text("not ours")
    with pytest.raises(ConfigError, match=r"other.parquet holds no runs of ours"):
        ResultStore(tmp_path)


def test_details_are_not_kept_and_that_is_said(tmp_path):
    with pytest.raises(ConfigError, match="figures, not details"), ResultStore(tmp_path) as store:
        compare(**ASKED, detail=True, store=store)


SWEEP = """
import os, runpy, sys, tempfile
from contextlib import contextmanager
from voltana_ctrl import compare
from voltana_ctrl.experiment import ResultStore

@contextmanager
def on_dask():
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None,
                      worker_dashboard_address=None) as cluster, Client(cluster) as client:
        yield client.get_executor(), list(client.run(os.getpid).values())

@contextmanager
def on_ray():
    import ray
    example = runpy.run_path(sys.argv[3])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    executor = example["RayExecutor"](ray)
    yield executor, [executor.submit(os.getpid).result()]
    ray.shutdown()

if __name__ == "__main__":
    told = lambda done, total: print(done, flush=True)
    cluster = {"dask": on_dask, "ray": on_ray}[sys.argv[1]]
    with cluster() as (executor, pids), ResultStore(sys.argv[2], every_s=0.5) as store:
        print("pids", *pids, flush=True)
        found = compare(rates_req_s=[4.0], duration_s=2.0, warmup_s=0.0, seeds=500,
                        policies=["static-max", "static-1005"],
                        executor=executor, store=store, on_progress=told)
        print("runs", len(found.runs), found.complete, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cluster", "module"), [("dask", "distributed"), ("ray", "ray")])
def test_a_thousand_runs_survive_a_worker_that_is_killed(tmp_path, root, cluster, module):
    """One worker of the cluster is killed; the sweep completes, none is lost or doubled."""
    pytest.importorskip(module, reason=f"needs {cluster}")
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    process = subprocess.Popen(
        [sys.executable, str(script), cluster, str(tmp_path / "store"),
         str(root / "examples" / "sweep_on_ray.py")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    pids, killed, last = [], False, ""
    end_s = time.monotonic() + 300.0
    with process:
        for line in process.stdout:
            assert time.monotonic() < end_s
            if line.startswith("pids"):
                pids = [int(pid) for pid in line.split()[1:]]
            elif line.strip().isdigit() and int(line) >= 200 and not killed:
                os.kill(pids[0], 9)
                killed = True
            if line.startswith("runs"):
                last = line
    assert process.returncode == 0
    assert killed
    assert last.split() == ["runs", "1000", "True"]
    rows = kept(tmp_path / "store")
    assert len({row["run_key"] for row in rows}) == len(rows) == 1000
    assert len({(row["policy"], row["seed"]) for row in rows}) == 1000
