"""A slice of the campaign that kills, stops and ends controllers, watchdogs and the setter."""

import importlib.util
import sys

import pytest

from tests.helpers.fake_gpus import needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]


@pytest.fixture
def kill(root, monkeypatch):
    path = root / "bench" / "kill.py"
    if not path.exists():
        pytest.skip("bench/ is not part of the source distribution")
    pytest.importorskip("pynvml", reason="needs the nvml extra")
    spec = importlib.util.spec_from_file_location("kill", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill", module)
    spec.loader.exec_module(module)
    return module


def test_no_gpu_is_left_locked(kill):
    told = []
    events, left, took_s = kill.campaign(8, seed=1, report=told.append)
    assert events == 8
    assert left == 0, told
    assert max(took_s) < kill.LIMIT_S
