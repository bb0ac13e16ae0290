"""The log of ticks: read back by replay, rotated, bounded, and never in the loop's way."""

import time
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet
from voltana_ctrl import ConfigError, ControlLoop, Decision, FleetState, Observation, TickRecord
from voltana_ctrl.backends import Recorder, ReplayBackend, SimBackend
from voltana_ctrl.control import StaticController
from voltana_ctrl.live.ticklog import TickLog, write_parquet
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Limits


def record(number: int, **changes) -> TickRecord:
    wish = Decision.highest(fleet())
    observation = Observation(state=FleetState.idle(2, t_s=0.1 * number))
    made = TickRecord(number=number, observation=observation, proposed=wish, applied=wish)
    return replace(made, **changes)


def driven(*observers, seconds=6.0):
    workload = make_workload("sharegpt", rate_req_s=12.0, duration_s=seconds, seed=3)
    plant = SimBackend(fleet(), workload=workload, seed=3)
    controller = StaticController(fleet(), 1005)
    with ControlLoop(plant, controller, observers=observers) as loop:
        loop.run(seconds)


def replayed(path) -> ReplayBackend:
    backend = ReplayBackend(path)
    with ControlLoop(backend, StaticController(fleet(), 1005)) as loop:
        for _ in range(len(backend)):
            loop.tick()
    return backend


def test_says_what_the_recorder_says(tmp_path):
    recorder = Recorder(tmp_path / "a.jsonl", fleet())
    with TickLog(tmp_path / "b.jsonl", fleet()) as log, recorder:
        driven(log, recorder)
    a, b = ((tmp_path / name).read_text().splitlines()[1:] for name in ("a.jsonl", "b.jsonl"))
    assert a == b
    assert log.ticks == 60
    assert replayed(tmp_path / "b.jsonl").mismatches == ()


def test_parquet_holds_every_bit(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "ticks.jsonl"
    with TickLog(path, fleet()) as log:
        driven(log)
        odd = replace(Decision.highest(fleet()), limits=Limits(power_cap_w=[0.1 + 0.2, np.inf]))
        log.on_tick(record(60, applied=odd, interventions=("shares",), notes={"margin": 0.1}))
    write_parquet(path, tmp_path / "ticks.parquet")
    backends = [ReplayBackend(one) for one in (path, tmp_path / "ticks.parquet")]
    assert len(backends[0]) == len(backends[1]) == 61
    for _ in range(61):
        one, other = (backend.read() for backend in backends)
        for part in ("state", "iterations", "finished"):
            first, second = getattr(one, part), getattr(other, part)
            for name in first.__slots__:
                np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    backends[1].apply(odd)
    assert backends[1].mismatches == ()


def test_full_files_are_put_aside_and_the_oldest_removed(tmp_path):
    path = tmp_path / "ticks.jsonl"
    header = len(_lines_of_an_empty_log(tmp_path))
    with TickLog(path, fleet(), max_bytes=header + 20_000, keep=3) as log:
        for number in range(100):
            log.on_tick(record(number))
    files = sorted(tmp_path.glob("ticks*.jsonl"))
    assert len(files) == 4
    assert files[-1] == path
    assert all(one.stat().st_size <= header + 20_000 for one in files)
    # Each is a log of its own, they follow each other, and the newest tick is in the last.
    times_s = [t for one in files for t in _times_s(one)]
    assert times_s == sorted(times_s)
    assert times_s[-1] == pytest.approx(9.9)
    assert log.ticks == 100


def test_parquet_replaces_what_is_put_aside(tmp_path):
    pytest.importorskip("pyarrow")
    header = len(_lines_of_an_empty_log(tmp_path))
    with TickLog(tmp_path / "ticks.jsonl", fleet(), max_bytes=header + 20_000, parquet=True) as log:
        for number in range(60):
            log.on_tick(record(number))
    assert not list(tmp_path.glob("ticks*.jsonl"))
    files = sorted(tmp_path.glob("ticks*.parquet"))
    assert len(files) > 2
    times_s = [t for one in files for t in _times_s(one)]
    assert times_s == pytest.approx([0.1 * number for number in range(60)])


def test_log_of_the_run_before_is_kept(tmp_path):
    path = tmp_path / "ticks.jsonl"
    for number in range(3):
        with TickLog(path, fleet()) as log:
            log.on_tick(record(number))
    found = sorted(tmp_path.glob("ticks*.jsonl"))
    assert [_times_s(one) for one in found] == [pytest.approx([0.1 * k]) for k in range(3)]


class FullDisk:
    """A file that takes so many bytes, and half a line."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        if len(data) > self.left:
            self.file.write(data[: self.left])
            self.file.flush()
            raise OSError(28, "No space left on device")
        self.left -= len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


def test_full_disk_costs_ticks_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "ticks.jsonl"
    monkeypatch.setattr("voltana_ctrl.live.ticklog._RETRY_S", 0.2)
    with TickLog(path, fleet()) as log:
        log.on_tick(record(0))
        _until(lambda: log.ticks == 1)
        log._file._file = FullDisk(log._file._file, 3000)
        for number in range(1, 21):
            log.on_tick(record(number))
        _until(lambda: log.ticks + log.dropped == 21)
        assert log.dropped > 10
        assert "No space left" in log.failure
        time.sleep(0.3)  # somebody makes room
        log.on_tick(record(21))
        _until(lambda: path.exists() and log.ticks + log.dropped == 22)
    # Both files are whole: the torn line is at the end of the first.
    before, after = sorted(tmp_path.glob("ticks*.jsonl"))
    assert len(ReplayBackend(before)) == log.ticks - 1
    assert _times_s(after) == pytest.approx([2.1])


def test_slow_disk_does_not_stop_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.live.ticklog._QUEUED", 8)
    log = TickLog(tmp_path / "ticks.jsonl", fleet())

    class Hangs(FullDisk):
        def write(self, data):
            time.sleep(0.2)
            return self.file.write(data)

    log._file._file = Hangs(log._file._file, 0)
    begin_s = time.monotonic()
    for number in range(100):
        log.on_tick(record(number))
    assert time.monotonic() - begin_s < 0.2
    assert log.dropped >= 90
    assert "too slow" in log.failure
    log.close()
    log.close()
    assert log.ticks + log.dropped == 100


def test_unwritable_log_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        TickLog(tmp_path / "absent" / "ticks.jsonl", fleet())
    with pytest.raises(ConfigError, match=r"TickLog\.keep"):
        TickLog(tmp_path / "ticks.jsonl", fleet(), keep=0)


def test_what_is_no_log_becomes_no_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    source = tmp_path / "x.jsonl"
    source.write_text("not json\n")
    with pytest.raises(ConfigError, match="line 1"):
        write_parquet(source, tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == [source]
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"y\.parquet"):
        ReplayBackend(tmp_path / "y.parquet")


def _until(condition, limit_s=20.0):
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < limit_s
        time.sleep(0.01)


def _times_s(path) -> list[float]:
    backend = ReplayBackend(path)
    return [backend.read().state.t_s for _ in range(len(backend))]


def _lines_of_an_empty_log(tmp_path) -> bytes:
    path = tmp_path / "empty.jsonl"
    TickLog(path, fleet()).close()
    return path.read_bytes()
