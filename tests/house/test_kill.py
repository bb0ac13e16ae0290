"""Slices of the campaigns that kill, stop and end processes, and that they see what is lost."""

import importlib.util
import sys

import pytest

from tests.helpers.fake_gpus import needs_compiler

pytestmark = needs_compiler


def of_bench(name, root, monkeypatch):
    """A script of bench/, with those beside it to import from."""
    path = root / "bench" / f"{name}.py"
    if not path.exists():
        pytest.skip("bench/ is not part of the source distribution")
    pytest.importorskip("pynvml", reason="needs the nvml extra")
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kill(root, monkeypatch):
    return of_bench("kill", root, monkeypatch)


@pytest.mark.slow
def test_no_gpu_is_left_locked(kill):
    told = []
    events, left, took_s = kill.campaign(8, seed=1, report=told.append)
    assert events == 8
    assert left == 0, told
    assert max(took_s) < kill.LIMIT_S


@pytest.fixture
def serving(root, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs the server extra")
    return of_bench("kill_serving", root, monkeypatch)


@pytest.mark.slow
def test_no_request_is_lost_or_sent_twice(serving):
    said = []
    told = serving.campaign(4, seed=5, report=said.append)
    assert told.events == 4
    assert (told.left_locked, told.lost, told.doubled) == (0, 0, 0), said
    assert told.whole > 20


def test_what_is_lost_and_what_is_sent_twice_is_seen(serving):
    """The judge itself, on requests that ended in every way there is."""
    asked = {
        1: serving.Asked(10.0, 10.5, 11.0, 12, "whole"),
        2: serving.Asked(10.0, 10.5, 11.0, 3, "error event"),  # its engine died in its stream
        3: serving.Asked(10.0, end_s=11.0, how="status 503"),
        4: serving.Asked(20.5, end_s=20.5, how="not taken"),
        5: serving.Asked(20.5, end_s=21.0, how="ServerDisconnectedError"),
        6: serving.Asked(30.5, end_s=31.0, how="not taken"),
        7: serving.Asked(40.5, end_s=41.0, how="ServerDisconnectedError"),
    }
    struck = [
        (9.0, 12.0, {"engine 0": "SIGKILL"}),
        (20.0, 22.0, {"router": "SIGKILL"}),
        (30.0, 32.0, {"router": "SIGTERM", "engine 1": "SIGSTOP"}),
        # What is taken by one that ends comes to its end.
        (40.0, 42.0, {"router": "SIGTERM"}),
    ]
    told, said = serving.Told(), []
    notes = "10.1 1\n10.6 1\n10.1 2\n10.1 3\n10.4 3\n"
    serving._judge(told, asked, struck, notes, said.append)
    assert (told.whole, told.cut_off, told.by_router) == (1, 1, 3)
    assert (told.lost, told.doubled) == (2, 1)
    assert [line.split(":")[1].split()[1] for line in said[:3]] == ["3", "7", "1,"]
