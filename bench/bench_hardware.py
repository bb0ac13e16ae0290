"""Cost of one tick's read and apply on hardware; and, on a machine with GPUs, of reading them.

``pytest bench/bench_hardware.py --benchmark-enable`` measures on eight fake GPUs, whose driver
calls take microseconds: what is measured is this library, not a driver.
``python bench/bench_hardware.py [SECONDS]`` reads the real GPUs of a machine and sets nothing:
idle or busy power, cost of a reading, energy counter against integrated power.
"""

import shutil
import sys
import time
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.backends.meter import EnergyMeter
from voltana_ctrl.backends.nvml.driver import Nvml
from voltana_ctrl.backends.nvml.gpus import NvmlBackend
from voltana_ctrl.errors import BackendError
from voltana_ctrl.testing import FakeNvml
from voltana_ctrl.types import Limits

BUDGET_S = 0.002


@pytest.mark.skipif(shutil.which("cc") is None, reason="the fake driver is built from C")
@pytest.mark.parametrize("change", ["nothing", "all clocks", "all clocks and caps"])
def test_tick_on_eight_gpus(benchmark, tmp_path, change):
    fleet = FleetSpec.parse("4P4D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    clocks_mhz = (705.0, 705.0) if change == "nothing" else (705.0, 720.0)
    made = [Decision.highest(fleet, floor_mhz=np.full(8, mhz)) for mhz in clocks_mhz]
    if change == "all clocks and caps":
        made[0] = replace(made[0], limits=Limits(power_cap_w=np.full(8, 250.0)))
    decisions = cycle(made)
    with FakeNvml(tmp_path, gpus=8) as fake:
        gpus = {name: [uuid] for name, uuid in zip(fleet.ids, fake.uuids, strict=True)}
        with NvmlBackend(fleet, gpus, library=fake.library, lock_dir=tmp_path) as backend:

            def tick():
                backend.read()
                backend.apply(next(decisions))

            benchmark(tick)
    if benchmark.enabled:
        assert benchmark.stats.stats.median <= BUDGET_S


def read_gpus(span_s: float) -> None:
    """Read every GPU every 20 ms and print what was seen."""
    with Nvml() as nvml:
        gpus = nvml.gpus()
        if not gpus:
            raise BackendError("the driver answers, but shows no GPU")
        counted = [EnergyMeter(highest_w=2000.0) for _ in gpus]
        integrated = [EnergyMeter(highest_w=2000.0) for _ in gpus]
        powers_w = [[] for _ in gpus]
        costs_s = []
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < span_s:
            for number, gpu in enumerate(gpus):
                before_s = time.perf_counter()
                reading = gpu.read()
                costs_s.append(time.perf_counter() - before_s)
                t_s = time.monotonic()
                counted[number].add(t_s, reading.power_w, reading.counter_j)
                integrated[number].add(t_s, reading.power_w, None)
                powers_w[number].append(reading.power_w)
            time.sleep(0.02)
        print(f"driver {nvml.driver}, {span_s:g} s")
        for number, gpu in enumerate(gpus):
            by_counter_j, by_power_j = counted[number].energy_j, integrated[number].energy_j
            print(
                f"{gpu.name}: power {np.min(powers_w[number]):.0f} .."
                f" {np.mean(powers_w[number]):.0f} .. {np.max(powers_w[number]):.0f} W"
                f" (least, mean, most); counter {by_counter_j:.0f} J, integrated"
                f" {by_power_j:.0f} J ({by_counter_j / by_power_j - 1.0:+.1%})"
            )
        print(
            f"one reading of one GPU: median {np.median(costs_s) * 1e3:.3f} ms,"
            f" p99 {np.quantile(costs_s, 0.99) * 1e3:.3f} ms"
        )


if __name__ == "__main__":
    try:
        read_gpus(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0)
    except BackendError as error:
        sys.exit(f"nothing to read: {error}")
