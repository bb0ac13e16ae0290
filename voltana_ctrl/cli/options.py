"""What options of several commands share: how they are read, refused and shown."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voltana_ctrl.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_MOST_WHOLE, _MOST_CLOCKS = 2**53, 10_000


def numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers with commas between; None where the option was left out."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{name}: expected numbers with commas between, such as 10,20, got {text!r}"
        ) from None


def number(option: str, text: str) -> float:
    """One number."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: expected a number, got {text!r}") from None


def whole(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers with commas between; none where the option was left out."""
    found = [number(option, part) for part in (text or "").split(",") if part.strip()]
    for one in found:
        if not abs(one) <= _MOST_WHOLE:
            raise ConfigError(f"{option}: expected whole numbers, got {one:g}")
    return tuple(int(one) for one in found)


def ladder_mhz(text: str | None) -> list[float] | None:
    """Clocks of LOW:HIGH:STEP, both ends included; None where the option was left out."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 3:
        raise ConfigError(f"ladder: expected LOW:HIGH:STEP such as 210:1410:15, got {text!r}")
    low, high, step = (number("ladder", part) for part in parts)
    if not (0.0 < low <= high < math.inf and step > 0.0):
        raise ConfigError(f"ladder: expected 0 < LOW <= HIGH and STEP > 0, got {text!r}")
    if not (high - low) / step < _MOST_CLOCKS:
        raise ConfigError(f"ladder: expected at most {_MOST_CLOCKS} clocks, got {text!r}")
    return [low + step * k for k in range(int((high - low) / step + 1e-9) + 1)]


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"{option}: expected NAME=VALUE, got {text!r}")
    return key, value


def pairs(option: str, texts: list[str] | None) -> list[tuple[str, str]]:
    """Names and values of an option that is given as NAME=VALUE, any number of times."""
    return [_pair(option, text) for text in texts or []]


def look_here(policies: Iterable[str]) -> None:
    """Let a policy given as module:Class be found where the user is, after everywhere else.

    Without one the current folder is never looked into: it may be anybody's, and we may be root.
    """
    if any(":" in policy for policy in policies) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def above_zero(**options: float | None) -> None:
    """Refuse numbers that are not above 0, by the names of their options."""
    for name, value in options.items():
        if value is not None and not 0.0 < value < math.inf:
            option = name.replace("_", "-")
            raise ConfigError(f"{option}: expected a number > 0, got {value:g}")


def check_outputs(paths: dict[str, Path | None], suffix: str | None = None) -> None:
    """Refuse files that could not be written, or not be read again, before anything runs."""
    for name, path in paths.items():
        if path is None:
            continue
        if suffix is not None and path.suffix != suffix:
            raise ConfigError(f"{name}: expected a {suffix} file, got {path}")
        if not path.resolve().parent.is_dir():
            raise ConfigError(f"{name}: folder {path.resolve().parent} does not exist; make it")
        if path.is_dir():
            raise ConfigError(f"{name}: expected a file, got the folder {path}")


def cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def progress(console: Console) -> Iterator[Any]:
    """Bar that appears with the first report, so that refused input stays one line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "runs",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("runs", total=None)

    def on_progress(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        if bar.live.is_started:
            bar.stop()
