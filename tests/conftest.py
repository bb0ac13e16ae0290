"""Hypothesis profiles and the fixtures that every test file may use."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.paths import ROOT

# No deadline anywhere: the first call of a kernel compiles it. Continuous integration draws
# the same examples every time; `HYPOTHESIS_PROFILE=nightly` searches wide.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of published measurements and traces; skip where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the repository")
    return path
