"""Faults of a file, played on a fleet of emulated engines as ``compare`` simulates them."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.cli.running import say
from voltana_ctrl.errors import BackendError

if TYPE_CHECKING:
    from voltana_ctrl.engines.emulated.fleet import EmulatedFleet
    from voltana_ctrl.sim.faults import FaultSchedule


def fault_schedule(path: Path | None, fleet: str, profile: str) -> FaultSchedule | None:
    """What a file says goes wrong with a fleet; None without a file."""
    if path is None:
        return None
    from voltana_ctrl.profiles import load_profile
    from voltana_ctrl.sim.faults import FaultSchedule, read_faults
    from voltana_ctrl.types import FleetSpec

    return FaultSchedule(FleetSpec.parse(fleet, load_profile(profile)), read_faults(path))


@contextmanager
def faults_played(
    running: EmulatedFleet, schedule: FaultSchedule | None, stretch_frac: float
) -> Iterator[None]:
    """Context in which faults come and go, at `stretch_frac` times their times from now on."""
    if schedule is None:
        yield
        return
    ended = threading.Event()
    player = threading.Thread(
        target=_play, args=(running, schedule, stretch_frac, ended), name="voltana-ctrl-faults"
    )
    player.start()
    try:
        yield
    finally:
        ended.set()
        player.join()


def _play(
    running: EmulatedFleet, schedule: FaultSchedule, stretch_frac: float, ended: threading.Event
) -> None:
    begin_s, n = time.monotonic(), len(running.spec)
    before: tuple[Any, Any, Any] = (np.ones(n, bool), np.ones(n), running.spec.max_mhz)
    for edge_s in schedule.edges_s:
        if ended.wait(max(0.0, begin_s + stretch_frac * edge_s - time.monotonic())):
            return
        alive, slow_frac, clamp_k = schedule.at(edge_s)
        clocks = [one.clocks_mhz[k] for one, k in zip(running.spec.instances, clamp_k, strict=True)]
        now = alive, slow_frac, np.array(clocks)
        for i in range(n):
            try:
                _bring_about(running, i, *(column[i] for column in (*before, *now)))
            except (BackendError, OSError, subprocess.SubprocessError) as error:
                # The others get theirs all the same, and so does it at its next change.
                say(f"fault: {running.spec.ids[i]}: cannot be brought about: {error}")
        before = now


def _bring_about(
    running: EmulatedFleet, i: int, was_alive: bool, was_slow_frac: float, was_mhz: float,
    alive: bool, slow_frac: float, clamp_mhz: float,
) -> None:  # fmt: skip
    """Make one engine what it is to be from now on, and say what changes."""
    name, highest_mhz = running.spec.ids[i], running.spec.max_mhz[i]
    if clamp_mhz != was_mhz:
        for k in running.settings[i].gpus:
            running.fake.gpus[k].clamp_mhz = 0.0 if clamp_mhz >= highest_mhz else clamp_mhz
        say(f"fault: {name}: its GPUs reach {clamp_mhz:g} MHz at most")
    if was_alive and not alive:
        say(f"fault: {name}: killed")
        running.kill(i)
    elif alive and not was_alive:
        say(f"fault: {name}: started again")
        running.restart(i)
    if alive and (slow_frac != was_slow_frac or (slow_frac != 1.0 and not was_alive)):
        say(f"fault: {name}: its iterations take {slow_frac:g} times as long")
        running.slow(i, float(slow_frac))
