"""How fast the plant is: the whole Azure conversation trace, and a governor in Python.

Run with ``pytest bench``. Times are CPU time after compilation, medians over rounds; the
figures are printed and held against the budgets below.
"""

import json
import statistics
import subprocess
import sys
import textwrap
import time

import pytest
from reference_runs import ROOT, TRACE, fleet, voltanallm

from voltana_ctrl import Decision
from voltana_ctrl.sim.plant import Plant
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import make_workload

MOST_TRACE_CPU_S = 0.5
MOST_TRACE_RSS_MB = 200.0
LEAST_GOVERNOR_CALLS_S = 50_000.0

needs_trace = pytest.mark.skipif(not TRACE.is_file(), reason=f"needs {TRACE.name}")


def cpu_s(plant: Plant, until_s: float) -> float:
    begin_s = time.process_time()
    plant.advance(until_s)
    return time.process_time() - begin_s


@needs_trace
def test_azure_conversation_trace(benchmark) -> None:
    trace = read_trace(TRACE)
    assert len(trace) == 19_366
    voltanallm(trace.window(10.0)).advance(10.0)  # compiled or loaded
    spans_s, iterations = [], 0

    def setup():
        return (voltanallm(trace),), {}

    def run(plant: Plant) -> None:
        nonlocal iterations
        spans_s.append(cpu_s(plant, trace.duration_s + 60.0))
        iterations = int(plant.instances["iterations"].sum())
        assert plant.judged == (19_366, 0)

    benchmark.pedantic(run, setup=setup, rounds=5)
    median_s = statistics.median(spans_s)
    benchmark.extra_info.update(cpu_s=median_s, iterations_per_cpu_s=iterations / median_s)
    print(f"\n{iterations} iterations, {median_s:.3f} CPU s, {iterations / median_s:,.0f} /s")
    assert median_s <= MOST_TRACE_CPU_S


@needs_trace
def test_memory_of_the_azure_trace() -> None:
    """Peak resident memory of a process that reads the trace and runs it."""
    code = f"""
        import json, re, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]
        from reference_runs import TRACE, voltanallm
        from voltana_ctrl.sim.traces import read_trace
        trace = read_trace(TRACE)
        plant = voltanallm(trace)
        plant.advance(trace.duration_s + 60.0)
        # Not ru_maxrss, which a child inherits from the process that started it.
        peak_kb = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
        print(json.dumps([int(peak_kb) / 1024, plant.judged[1]]))
    """
    voltanallm(read_trace(TRACE).window(10.0)).advance(10.0)  # so that the child compiles nothing
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    peak_mb, left = json.loads(done.stdout)
    print(f"\npeak resident memory {peak_mb:.0f} MB")
    assert left == 0
    assert peak_mb <= MOST_TRACE_RSS_MB


class Highest:
    """The cheapest governor that Python can be: what is measured is the way there and back."""

    def step(self, *seen: float) -> float:
        return seen[-1]


def test_governor_in_python_every_iteration(benchmark) -> None:
    workload = make_workload("sharegpt", rate_req_s=40.0, duration_s=120.0, seed=0)
    spans_s, calls = [], 0

    def setup():
        plant = Plant(fleet(), workload, governors=[Highest() for _ in range(4)])
        plant.apply(Decision.highest(plant.fleet))
        plant.advance(1.0)  # compiled
        return (plant,), {}

    def run(plant: Plant) -> None:
        nonlocal calls
        before = plant.instances["iterations"].sum()
        spans_s.append(cpu_s(plant, 150.0))
        calls = int(plant.instances["iterations"].sum() - before)

    benchmark.pedantic(run, setup=setup, rounds=5)
    median_s = statistics.median(spans_s)
    benchmark.extra_info.update(cpu_s=median_s, calls_per_cpu_s=calls / median_s)
    print(f"\n{calls} calls, {median_s:.3f} CPU s, {calls / median_s:,.0f} calls/s")
    assert calls / median_s >= LEAST_GOVERNOR_CALLS_S
