"""Everything of ours that writes, on a disk that is truly full, and on one that is read-only.

No half-written file is believed, what ran goes on, and no GPU stays locked.
"""

import logging
import signal
import time
from dataclasses import replace

import pytest

from tests.helpers.fake_gpus import (
    Host,
    all_given_back,
    decision,
    fleet,
    machine,
    needs_compiler,
    open_backend,
    seconds_until,
)
from tests.helpers.small_disk import SmallDisk
from tests.live.test_ticklog import record
from voltana_ctrl import BackendError, ConfigError
from voltana_ctrl.backends import ReplayBackend
from voltana_ctrl.engines.limits import read_limits, write_limits
from voltana_ctrl.experiment import ResultStore
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.experiment.tables import write_json, write_rows
from voltana_ctrl.files import whole_file
from voltana_ctrl.live import ticklog
from voltana_ctrl.live.state import StateFile
from voltana_ctrl.live.ticklog import TickLog
from voltana_ctrl.types import Belief, Order, Slo

HOW = pytest.mark.parametrize("how", ["full", "read-only"])


@pytest.fixture
def disk(tmp_path):
    with SmallDisk(tmp_path / "disk") as made:
        yield made


def names(disk):
    return sorted(one.name for one in disk.folder.iterdir() if one.name != "filler")


def learnt(margin_frac):
    return Belief.of_profiles(fleet(), margin_frac=(0.02, margin_frac), delay_s=0.02)


def tick(belief):
    made = record(0)
    return replace(made, applied=replace(made.applied, belief=belief))


@HOW
def test_what_was_learnt_before_is_kept(disk, how, caplog):
    state = StateFile(disk.folder / "state", fleet(), every_s=1e-9)
    state.write(learnt(0.1))
    disk.starve(how)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            state.on_tick(tick(learnt(0.3)))
    assert len(caplog.records) == 1  # said once
    assert state.read().itl_margin_frac[0] == 0.1
    assert names(disk) == ["state"]
    disk.free()
    state.on_tick(tick(learnt(0.3)))
    assert state.read().itl_margin_frac[0] == 0.3


def test_a_log_of_ticks_goes_on_when_there_is_room_again(disk, monkeypatch):
    monkeypatch.setattr(ticklog, "_RETRY_S", 0.01)
    path = disk.folder / "ticks.jsonl"
    with TickLog(path, fleet()) as log:  # an earlier run's
        log.on_tick(tick(learnt(0.1)))
    with TickLog(path, fleet(), keep=3) as log:
        log.on_tick(tick(learnt(0.1)))
        seconds_until(lambda: log.ticks == 1)
        disk.starve("full")
        dropped = 0
        while not log.dropped:  # what a file open before takes, it takes
            log.on_tick(tick(learnt(0.1)))
            seconds_until(lambda n=dropped: log.ticks + log.dropped > n)
            dropped = log.ticks + log.dropped
        for _ in range(40):  # every try to open the log anew fails
            log.on_tick(tick(learnt(0.1)))
            time.sleep(0.02)
        assert log.failure
        disk.free()
        before = log.ticks

        def goes_on():
            log.on_tick(tick(learnt(0.1)))
            return log.ticks > before

        seconds_until(goes_on)
    # What was there before is there still, and all can be read; a torn last line is left out.
    found = sorted(disk.folder.glob("ticks*.jsonl"))
    assert found[0].name == "ticks-000001.jsonl"
    assert all(len(ReplayBackend(one)) >= 1 for one in found)


@HOW
def test_results_are_whole_or_not_there(disk, how):
    run = Run(policy="static-max", fleet=fleet(), slo=Slo(ttft_s=0.6, itl_s=0.06),
              workload="sharegpt", rate_req_s=5.0)  # fmt: skip
    store = ResultStore(disk.folder, every_s=1e9)
    disk.starve(how)
    store.put(store.key(run), {"energy_per_token_j": 1.0, "text": "x" * 20_000})
    for write in (
        store.flush,
        lambda: write_json({"runs": ["x" * 20_000]}, disk.folder / "out.json"),
        lambda: write_rows([{"policy": "x" * 20_000}], disk.folder / "out.csv"),
        lambda: write_rows([{"policy": "x" * 20_000}], disk.folder / "out.parquet"),
    ):
        with pytest.raises(ConfigError, match=f"{disk.folder}.*cannot be written: "):
            write()
        assert names(disk) == []
    disk.free()
    store.flush()
    assert len(ResultStore(disk.folder)) == 1


@HOW
def test_half_a_profile_is_never_there(disk, how):
    path = disk.folder / "own.toml"
    with whole_file(path) as beside:
        beside.write_text("old")
    disk.starve(how)
    with pytest.raises(ConfigError, match="cannot be written"), whole_file(path) as beside:
        beside.write_text("x" * 20_000)
    assert names(disk) == ["own.toml"]
    assert path.read_text() == "old"


@HOW
def test_an_order_that_cannot_be_handed_lapses_toward_the_highest_clock(disk, how):
    path = disk.folder / "d0.json"
    write_limits(path, Order(floor_mhz=600.0, ceiling_mhz=1410.0, active=False))
    disk.starve(how)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_limits(path, Order(floor_mhz=900.0, ceiling_mhz=1410.0))
    handed = read_limits(path)
    assert handed.order.floor_mhz == 600.0
    alone = handed.now(handed.since_s + 1.5)
    assert (alone.floor_mhz, alone.active) == (1410.0, True)


@needs_compiler
@HOW
def test_no_clock_is_lowered_whose_record_cannot_be_written(disk, how, tmp_path):
    with machine(tmp_path) as fake:
        folder = disk.folder / "locks"
        folder.mkdir()
        disk.starve(how)
        for wanted in (folder, disk.folder / "others"):
            with pytest.raises(BackendError, match=f"{wanted}.*cannot be"):
                open_backend(fake, wanted)
        assert [gpu.sets for gpu in fake.gpus] == [0, 0]
        disk.free()
        with open_backend(fake, folder) as backend:
            backend.apply(decision(705, 900))
        assert all_given_back(fake)


@needs_compiler
@HOW
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_locked_when_the_disk_starves_is_given_back(disk, how, tmp_path, end):
    folder = disk.folder / "locks"
    body = f"""
with end_on_sigterm(), open_backend(lock_dir=Path({str(folder)!r})) as backend:
    backend.apply(decision(705, 900))
    say("set")
    sys.stdin.readline()
    try:
        backend.apply(decision(720, 915))
        say("done")
    except Exception as error:
        say(f"done {{error}}")
    time.sleep(60)
"""
    with machine(tmp_path) as fake, Host(fake, tmp_path, body) as host:
        host.expect("set")
        assert all(gpu.locked for gpu in fake.gpus)
        disk.starve(how)
        host.process.stdin.write("\n")
        host.process.stdin.flush()
        host.expect("done")
        host.send(end)
        seconds_until(lambda: all_given_back(fake))
