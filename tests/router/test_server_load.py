"""Many requests at once through the router as a process: no errors, no growth."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_thousand_streams_at_once_leave_no_errors_and_no_memory_behind(root, tmp_path):
    resource = pytest.importorskip("resource")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most not in (-1, resource.RLIM_INFINITY) and most < 8192:
        pytest.skip(f"needs 8192 open files, the limit is {most}")
    path = tmp_path / "figures.json"
    command = [sys.executable, root / "bench" / "bench_router.py", "--json", path]
    subprocess.run(
        [*command, "--rate", "100", "--duration", "3", "--rounds", "4", "--streams", "1000"],
        check=True,
        timeout=280,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8192, most)),
    )
    figures = json.loads(path.read_text())
    figures["load"] = [row for row in figures["load"] if row["name"] == "router"]
    assert [row["errors"] for row in figures["load"]] == [0] * 4
    assert [row["requests"] for row in figures["load"]] == [300] * 4
    # In CPU time, which does not see what else the machine does; 2 ms where it is idle.
    assert min(row["cpu_ms_req"] for row in figures["load"]) < 8.0
    assert [row["errors"] for row in figures["streams"]] == [0] * 4
    # Two rounds fill pools; two thousand streams more must find room in them.
    assert sum(row["grown_mb"] for row in figures["streams"][2:]) < 20.0
