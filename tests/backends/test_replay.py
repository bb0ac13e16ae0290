"""A recorded log drives a controller, which must decide as it did."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_gpus import fleet
from voltana_ctrl import (
    BackendError,
    ConfigError,
    Controller,
    ControlLoop,
    Decision,
    FleetState,
    Observation,
    TickRecord,
)
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.backends.replay import Recorder, ReplayBackend
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Limits


class ByLoad(Controller):
    """Reacts to what it sees and remembers, so that a wrong reading would show."""

    gain_mhz = 7.3

    def init(self):
        return 0.0

    def _decide(self, observation, memory):
        state = observation.state
        load = state.queue_tok + 3.0 * state.running_req + len(observation.finished)
        memory = 0.9 * memory + 0.1 * load.sum()
        floor_mhz = np.clip(210.0 + self.gain_mhz * (load + memory), 210.0, 1410.0)
        return Decision.highest(self.fleet, t_s=state.t_s, floor_mhz=floor_mhz), memory


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("log") / "ticks.jsonl"
    workload = make_workload("sharegpt", rate_req_s=12.0, duration_s=8.0, seed=3)
    plant = SimBackend(fleet(), workload=workload, seed=3)
    with (
        Recorder(path, fleet()) as recorder,
        ControlLoop(plant, ByLoad(fleet()), observers=[recorder]) as loop,
    ):
        loop.run(8.0)
    assert recorder.ticks == 80
    return path


def replayed(path: Path, controller: Controller) -> tuple[ReplayBackend, ControlLoop]:
    backend = ReplayBackend(path)
    loop = ControlLoop(backend, controller)
    for _ in range(len(backend)):
        loop.tick()
    return backend, loop


def test_same_controller_decides_the_same_to_the_last_bit(log):
    backend, loop = replayed(log, ByLoad(fleet()))
    assert len(backend) == 80
    assert backend.mismatches == ()
    # It was a run with something to decide.
    assert len(set(loop.state.power_w)) > 1
    clocks = {
        tuple(json.loads(line)["applied"]["freq_mhz"]) for line in log.read_text().splitlines()[1:]
    }
    assert len(clocks) > 10


def test_other_controller_is_told_apart(log):
    class Other(ByLoad):
        gain_mhz = 7.4

    backend, _ = replayed(log, Other(fleet()))
    assert {mismatch.name for mismatch in backend.mismatches} == {"freq_mhz"}


def test_fleet_comes_back_whole(log):
    spec, again = fleet(), ReplayBackend(log).spec
    assert again.ids == spec.ids
    for before, after in zip(spec.instances, again.instances, strict=True):
        assert after.profile.table.tobytes() == before.profile.table.tobytes()
        assert after.profile.batch_steps == before.profile.batch_steps
        assert dict(after.profile.sources) == dict(before.profile.sources)
        assert (after.role, after.node, after.idle_w) == (before.role, before.node, before.idle_w)


@given(
    values=st.lists(st.floats(0.0, 1e12), min_size=2, max_size=2),
    cap_w=st.one_of(st.none(), st.lists(st.floats(1.0, 1e4), min_size=2, max_size=2)),
)
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, values, cap_w):
    path = tmp_path_factory.mktemp("log") / "one.jsonl"
    state = FleetState.idle(2, t_s=values[0])
    limits = None if cap_w is None else Limits(power_cap_w=np.array(cap_w))
    applied = Decision(
        t_s=values[1],
        freq_mhz=np.array(values),
        freq_max_mhz=np.array(values),
        route_frac=np.array([0.1, 0.2]),
        active=np.array([True, False]),
        price_j_req=np.array(values),
        limits=limits,
    )
    record = TickRecord(
        number=0, observation=Observation(state=state), proposed=applied, applied=applied
    )
    with Recorder(path, fleet()) as recorder:
        recorder.on_tick(record)
    backend = ReplayBackend(path)
    assert backend.read().state.t_s == values[0]
    backend.apply(applied)
    assert backend.mismatches == ()


def test_end_of_the_log_says_so(log):
    backend, _ = replayed(log, ByLoad(fleet()))
    with pytest.raises(BackendError, match="ended after 80 ticks"):
        backend.read()


def test_torn_last_line_is_left_out(log, tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_text(log.read_text()[:-40])
    assert len(ReplayBackend(path)) == 79


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a first line"),
        ("{}\n", "line 1: .*schema"),
        ('{"schema": "other/1"}\n', "line 1: .*expected schema"),
        ("not json\n", "line 1"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        ReplayBackend(path)


def test_wrong_tick_is_named_by_its_line(log, tmp_path):
    lines = log.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"queue_tok":[', '"queue_tok":[1.0,')
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(lines))
    with pytest.raises(ConfigError, match=r"line 4: .*queue_tok"):
        ReplayBackend(path)


def test_unwritable_log_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        Recorder(tmp_path / "absent" / "log", fleet())
