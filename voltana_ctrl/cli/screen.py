"""What a person sees while ``compare`` works: that it loads, rows as they are done, time left."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self, TypeVar

from rich.console import Console

from voltana_ctrl.experiment import Comparison, Done, Grid, TimeLeft
from voltana_ctrl.report.terminal import RowPrinter

_T = TypeVar("_T")
# What cannot be cached is compiled in every process; it is one function.
_FEW = 4


def while_loading(load: Callable[[], _T], errors: Console, *, kernels: int, runs_s: float) -> _T:
    """Load what is compiled, in a thread, so that Ctrl-C is heard while LLVM is at work.

    Parameters
    ----------
    load : callable
        What takes long; its error is raised here.
    errors : rich.console.Console
        Where to say what goes on.
    kernels : int
        How many functions there are to compile, where none is in the cache.
    runs_s : float
        How long the runs will take once it is loaded.
    """
    found: list[Any] = []
    failed: list[BaseException] = []
    compiled: list[object] = []

    def run() -> None:
        from numba.core import event

        class Counts(event.Listener):  # type: ignore[misc]
            def on_start(self, event: object) -> None:
                compiled.append(event)

            def on_end(self, event: object) -> None:
                pass

        try:
            with event.install_listener("numba:compile", Counts()):
                found.append(load())
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    begin_s = time.monotonic()
    told = False
    with errors.status("loading the simulator") as status:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if len(compiled) < _FEW:
                continue
            line = "compiling the simulator, once on this machine"
            took_s = time.monotonic() - begin_s
            left_s = runs_s + took_s * max(0, kernels - len(compiled)) / len(compiled)
            if not told and not errors.is_terminal:
                errors.print(f"{line}; about {_shown(left_s)} for everything", highlight=False)
            told = True
            status.update(f"{line}: {len(compiled)} functions; about {_shown(left_s)} left in all")
    if failed:
        raise failed[0]
    result: _T = found[0]
    return result


class Screen:
    """Rows on standard output as they are done, and on the terminal how long the rest will take.

    Parameters
    ----------
    grid : Grid
        What is carried out.
    left : TimeLeft
        Estimate of the time left.
    """

    def __init__(self, grid: Grid, left: TimeLeft) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._grid, self._left = grid, left
        self._out = Console()
        self._rows = RowPrinter(
            self._out,
            grid.policies,
            gap={"voltanallm", "bound"} <= set(grid.policies) and None not in self._loads,
            budget=grid.runs[0].power_budget is not None,
            extras=_extras(grid),
        )
        self.ended: list[Done] = []
        self._by_load: dict[float | None, list[Done]] = {load: [] for load in self._loads}
        self._waiting = [(policy, load) for load in self._loads for policy in grid.policies]
        self._missing = Counter((str(run.policy), run.rate_req_s) for run in grid.runs)
        self._headed = False
        errors = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=errors,
            transient=True,
            disable=not errors.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=len(grid.runs), left="")
        self._stopping = threading.Event()
        self._draws_s: float | None = None
        self._begin_s = time.monotonic()

    @property
    def _loads(self) -> list[float | None]:
        return list(dict.fromkeys(run.rate_req_s for run in self._grid.runs))

    def __enter__(self) -> Self:
        self._begin_s = time.monotonic()
        self._tell()
        self._bar.start()
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._bar.stop()

    def add(self, done: Done) -> None:
        """Take in a run that has ended, and print the rows that are whole now."""
        self.ended.append(done)
        self._left.add(done)
        run = self._grid.runs[done.index]
        self._by_load[run.rate_req_s].append(done)
        self._missing[str(run.policy), run.rate_req_s] -= 1
        self._bar.update(self._task, completed=len(self.ended))
        self._tell()
        while self._waiting and self._whole(*self._waiting[0]):
            self._print(*self._waiting.pop(0))

    def tell_draws(self, done: int, total: int) -> None:
        """Show how many draws of the profiles are done; the first call begins them."""
        now_s = time.monotonic()
        if self._draws_s is None:
            self._draws_s = now_s
            self._bar.update(self._task, total=total)
        left_s = (now_s - self._draws_s) * (total - done) / max(1, done)
        told = f"draws; about {_shown(left_s)} left" if done else "draws of the profiles"
        self._bar.update(self._task, completed=done, left=told)

    def found(self) -> Comparison:
        """Give the comparison as far as it got."""
        return Comparison.of(self._grid, self.ended, ("voltana-ctrl", *sys.argv[1:]))

    def print_foot(self) -> None:
        """Print rows that are whole and wait for others, and what the columns mean."""
        for policy, load in self._waiting:
            if not self._missing[policy, load]:
                self._print(policy, load)
        if self._headed:
            self._rows.foot(self.found().to_study())

    def _whole(self, policy: str, load: float | None) -> bool:
        """Whether a row is done, and what its savings are counted from."""
        return not any(
            self._missing.get((name, load))
            for name in (policy, "static-max", "voltanallm", "bound")
        )

    def _print(self, policy: str, load: float | None) -> None:
        study = Comparison.of(self._grid, self._by_load[load]).to_study()
        moving = self._bar.live.is_started
        if moving:  # the bar makes way, since both may be on the same terminal
            self._bar.stop()
        if not self._headed:
            self._headed = True
            self._rows.head(study)
        # A trace is asked for without a load; its runs tell the one that it has.
        for rate_req_s in study.loads:
            self._rows.row(study, policy, rate_req_s)
        self._out.file.flush()
        if moving:
            self._bar.start()

    def _tick(self) -> None:
        while not self._stopping.wait(0.5):
            self._tell()

    def _tell(self) -> None:
        left_s = self._left.left_s(time.monotonic() - self._begin_s)
        if self._draws_s is None:
            self._bar.update(self._task, left=f"runs; about {_shown(left_s)} left")


def _shown(duration_s: float) -> str:
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _extras(grid: Grid) -> list[str]:
    """Figures that there will be in this comparison, and not in every one."""
    run = grid.runs[0]
    waits = run.defer is not None
    if not isinstance(run.workload, str):
        waits = waits or bool((run.workload.patience_s < math.inf).any())
    asked = {
        "wall_power_w": grid.spec.rest_of_server_w > 0.0,
        "deadline_missed": waits,
        "cost": run.price is not None,
        "co2_g": run.co2 is not None,
    }
    return [name for name, wanted in asked.items() if wanted]
