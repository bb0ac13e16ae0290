"""Long runs: nothing grows, nothing is missed, nothing drifts.

    python bench/long.py week                 # seven simulated days of 16 instances, ticks of 1 s
    python bench/long.py soak --minutes 30    # the control loop in real time, on fake GPUs

`week`: 4 prefill and 12 decode instances of the embedded profile under `cascade`, a load that
swings by the day between 0.3 and 1.7 of its mean, answers of 3,000 tokens on average. Printed four
times a day: iterations so far, requests, resident memory, the largest deviation of what was learnt
from what is true (the profile is exact, so the truth is a pace of 1), and the attainment so far.

`soak`: a controller with its watchdog, lock files and governors holds four GPUs of the fake driver
and ticks ten times a second. Printed each minute: resident memory, descriptors, threads, deadlines
missed, and the machine's load, without which those say nothing. Exit status 1 where memory grew by
more than 5 % or 16 MB after the first fifth, descriptors or threads grew at all, or a pace drifted
by more than 5 %.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from voltana_ctrl import FleetSpec, Guard, Slo, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import Decision

# The tables of docs/safety.md were made with the reference as first shipped.
PROFILE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
SLO = Slo(ttft_s=0.6, itl_s=0.04)
DAY_S = 86_400.0


@dataclass
class Watched:
    """What was seen of this process, at even times."""

    rss_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self) -> str:
        """Look once, and say it."""
        fields = Path("/proc/self/statm").read_text().split()
        self.rss_mb.append(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.descriptors.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(len(os.listdir("/proc/self/task")))
        return (
            f"{self.rss_mb[-1]:7.1f} MB, {self.descriptors[-1]} descriptors,"
            f" {self.threads[-1]} threads"
        )

    def grew(self) -> list[str]:
        """What did not stay flat after the first fifth."""
        settled = len(self.rss_mb) // 5
        found = []
        before_mb, after_mb = max(self.rss_mb[: settled + 1]), self.rss_mb[-1]
        if after_mb > before_mb + max(16.0, 0.05 * before_mb):
            found.append(f"memory grew from {before_mb:.1f} to {after_mb:.1f} MB")
        for name in ("descriptors", "threads"):
            seen = getattr(self, name)
            if seen[-1] > max(seen[: settled + 1]):
                found.append(f"{name} grew from {max(seen[: settled + 1])} to {seen[-1]}")
        return found


def diurnal(days: float, mean_req_s: float, seed: int, output_tok: int = 3000) -> Workload:
    """Requests whose rate swings by the day, with long answers, which iterate most."""
    rng = np.random.default_rng(seed)
    total_s = days * DAY_S
    expected = int(2.0 * mean_req_s * total_s)
    times_s = np.sort(rng.uniform(0.0, total_s, rng.poisson(expected)))
    keep = rng.random(len(times_s)) < 0.5 * (1.0 - 0.7 * np.cos(2.0 * np.pi * times_s / DAY_S))
    times_s = times_s[keep]
    n = len(times_s)
    return Workload(
        name="week", arrival_s=times_s, prompt_tok=rng.integers(200, 800, n),
        output_tok=rng.integers(output_tok // 2, output_tok * 3 // 2, n), duration_s=total_s,
    )  # fmt: skip


def week(days: float = 7.0, *, seed: int = 0, mean_req_s: float = 4.8, report=print) -> list[str]:
    """The simulated week; what was not as it should be."""
    fleet = FleetSpec.parse("4P12D", load_profile(PROFILE))
    parts = find_policy("cascade").build(fleet, SLO, PolicySetup(tick_s=1.0))
    backend = SimBackend(
        fleet, workload=diurnal(days, mean_req_s, seed), seed=seed,
        settings=PlantSettings(log_iterations=4096, jitter_sd_frac=0.03),
        governors=parts.governors, prefill_router=parts.prefill_router,
        decode_router=parts.decode_router,
    )  # fmt: skip
    plant = backend.plant
    plant.apply(Decision.highest(fleet))
    missed, finished, watched, problems = np.zeros(2), np.zeros(2), Watched(), []

    class Counts:
        """Attainment of the requests that finished."""

        def on_tick(self, record) -> None:
            done = record.observation.finished
            finished[:] += len(done)
            missed[:] += (done.ttft_s > SLO.ttft_s).sum(), (done.itl_s > SLO.itl_s).sum()

    loop = ControlLoop(backend, parts.controller, Guard(fleet), observers=[Counts()], raises=True)
    begin_s, drift = time.process_time(), 0.0
    steps = max(1, round(4.0 * days))
    for k in range(1, steps + 1):
        loop.run(k * days * DAY_S / steps)
        seen = watched.look()
        belief = loop.applied.belief
        if belief is not None:
            paces = np.stack([belief.prefill_pace_frac, belief.decode_pace_frac])
            drift = float(np.abs(paces - 1.0).max())
        met = 100.0 * (1.0 - missed / np.maximum(finished, 1.0))
        report(
            f"day {k * days / steps:.2f}: {plant.instances['iterations'].sum() / 1e6:.1f} M"
            f" iterations, {int(finished[0])} requests, TTFT {met[0]:.2f} % ITL {met[1]:.2f} %,"
            f" {seen}, pace off by {100 * drift:.1f} % at most,"
            f" {time.process_time() - begin_s:.0f} CPU s"
        )
        if drift > 0.05:
            problems.append(f"a pace drifted by {100 * drift:.1f} %")
    return [*problems, *watched.grew()]


def soak(minutes: float = 30.0, *, period_s: float = 0.1, report=print) -> list[str]:
    """The loop in real time; what was not as it should be."""
    from voltana_ctrl.backends.nvml.gpus import NvmlBackend
    from voltana_ctrl.backends.nvml.sweep import Sweep
    from voltana_ctrl.live.governed import node_policy
    from voltana_ctrl.testing import FakeNvml
    from voltana_ctrl.types import Observation

    fleet = FleetSpec.parse("2P2D", load_profile(PROFILE))
    watched = Watched()
    with tempfile.TemporaryDirectory(prefix="voltana-soak-") as made:
        folder = Path(made)
        with FakeNvml(folder, gpus=4) as fake:
            gpus = {name: [uuid] for name, uuid in zip(fleet.ids, fake.uuids, strict=True)}
            requests = diurnal(max(1.0, minutes) / 1440.0 + 0.01, 6.0, 0, output_tok=800)
            sim = SimBackend(fleet, workload=requests)
            began_s = time.monotonic()

            def engines() -> Observation:
                sim.plant.advance(time.monotonic() - began_s)
                return sim.read()

            with (
                Sweep(folder),
                NvmlBackend(
                    fleet, gpus, lock_dir=folder, library=fake.library, engine=engines
                ) as backend,
                ControlLoop(backend, node_policy(fleet, SLO, "mpc", period_s=period_s)) as loop,
            ):
                missed = 0

                class Missed:
                    def on_tick(self, record) -> None:
                        nonlocal missed
                        missed += record.missed

                loop.observers = (Missed(),)
                for k in range(1, round(minutes) + 1):
                    loop.run(began_s + 60.0 * k)
                    report(
                        f"minute {k}: {loop.ticks} ticks, {missed} deadlines missed,"
                        f" {loop.failures} failures, {watched.look()}, load"
                        f" {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
                    )
            locked = sum(bool(gpu.locked) for gpu in fake.gpus)
    return [*watched.grew(), *([f"{locked} GPUs left locked"] if locked else [])]


def main(arguments: list[str] | None = None) -> int:
    """Run one of them, and say what was not flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("week", "soak"))
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    asked = parser.parse_args(arguments)

    def report(text: str) -> None:
        print(text, flush=True)

    problems = (
        week(asked.days, report=report) if asked.what == "week"
        else soak(asked.minutes, report=report)
    )  # fmt: skip
    for problem in problems:
        print(f"FAILED {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
