"""Benchmarks measure: plain `pytest` leaves them out, and `pytest bench` runs them."""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Undo `--benchmark-disable`, which keeps plain test runs quick."""
    config.option.benchmark_disable = False


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take files named bench_*.py; one that is named on the command line is taken anyway."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None
