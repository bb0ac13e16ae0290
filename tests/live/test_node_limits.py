"""Power caps and memory clocks on a node that runs: where they were measured, and of who sleeps."""

from dataclasses import replace

import numpy as np
import pytest

from tests.control.test_actuators import CAP_W, Asks, capped, fleet_of, locks
from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler
from voltana_ctrl import ConfigError, Decision, FleetState, Observation
from voltana_ctrl.cli.running import check_actuators, with_actuators
from voltana_ctrl.live.agent import Agent, AgentSettings
from voltana_ctrl.live.node import NodeBackend, node_clocks

pytestmark = needs_compiler


class Reads:
    """Engines whose load a test says."""

    def __init__(self, spec):
        self.spec, self.state = spec, FleetState.idle(len(spec), freq_mhz=1410.0)

    def load(self, **columns):
        self.state = replace(self.state, **{k: np.array(v, float) for k, v in columns.items()})

    def read(self):
        return Observation(state=self.state)

    def apply(self, decision):
        raise AssertionError("it only reads")

    def close(self):
        pass


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        yield fake
        assert all_given_back(fake), "a clock was not given back"
        assert all(gpu.mem_lock_hi_mhz == 0.0 for gpu in fake.gpus), "nor a memory clock"
        assert all(gpu.unsupported_sets == 0 for gpu in fake.gpus)


def node(fake, folder, spec=None, names=("prefill-0", "decode-0"), **settings):
    spec = spec or fleet()
    gpus = {name: [uuid] for name, uuid in zip(spec.ids, fake.uuids, strict=True) if name in names}
    sets = node_clocks(spec, gpus, lock_dir=folder, library=fake.library)
    return NodeBackend(Reads(spec), sets, **settings)


def parked(i, spec=None):
    active = np.ones(2, bool)
    active[i] = False
    return replace(Decision.highest(spec or fleet()), active=active)


def test_memory_is_lowered_of_who_is_parked_and_empty_alone(fake, tmp_path):
    lowest = min(fake.gpus[0].mem_low_mhz, fake.gpus[0].mem_mhz)
    with node(fake, tmp_path, park_memory=True) as backend:
        reads = backend._reads

        def locked(decision, **load):
            reads.load(**load)
            backend.read()
            backend.apply(decision)
            return [gpu.mem_lock_hi_mhz for gpu in fake.gpus]

        # It finishes what it has before its memory slows down.
        assert locked(parked(1), running_req=[0, 3]) == [0.0, 0.0]
        assert locked(parked(1), running_req=[0, 0], queue_req=[0, 1]) == [0.0, 0.0]
        assert locked(parked(1), queue_req=[0, 0]) == [0.0, lowest]
        # Idle and awake is not parked.
        assert locked(Decision.highest(fleet())) == [0.0, 0.0]
        assert locked(parked(1)) == [0.0, lowest]
        assert fake.gpus[1].cap_sets == 0
    assert fake.gpus[1].mem_lock_hi_mhz == 0.0


def test_without_being_asked_for_nothing_but_clocks_is_set(fake, tmp_path):
    with node(fake, tmp_path) as backend:
        assert backend.limit_ranges is None
        backend.read()
        backend.apply(parked(1))
        assert [gpu.mem_lock_hi_mhz for gpu in fake.gpus] == [0.0, 0.0]


def test_what_only_reads_has_no_ranges(fake):
    assert NodeBackend(Reads(fleet()), actuators=True, park_memory=True).limit_ranges is None


def test_ranges_are_those_of_the_instances_that_are_set_here(fake, tmp_path):
    with node(fake, tmp_path, names=("decode-0",), actuators=True) as backend:
        ranges = backend.limit_ranges
        assert ranges.mem_clocks_mhz[0] == ()
        assert len(ranges.mem_clocks_mhz[1]) > 1
        assert ranges.cap_min_w[0] > ranges.cap_max_w[0]
        assert ranges.cap_min_w[1] < ranges.cap_max_w[1]


def test_a_measured_cap_takes_the_place_of_a_lock_and_is_given_back(fake, tmp_path):
    spec = fleet_of(*locks(), *capped())
    found_w = [gpu.cap_w for gpu in fake.gpus]
    backend = node(fake, tmp_path, spec, actuators=True)
    backend._reads.load(running_req=[16, 16], kv_used_tok=[8000, 8000])
    controller = with_actuators(Asks(spec, 810.0), backend)
    with Agent(backend, controller, AgentSettings(mode="act")) as agent:
        agent.run(duration_s=0.5)
        # Points of decode alone were measured: prefill keeps its lock.
        assert (fake.gpus[1].cap_w, fake.gpus[1].lock_hi_mhz) == (CAP_W, 1410.0)
        assert (fake.gpus[0].cap_w, fake.gpus[0].lock_hi_mhz) == (found_w[0], 810.0)
        # Killed, all is given back at once.
        agent.kill()
        assert agent._kill.wait(10.0)
        assert [gpu.cap_w for gpu in fake.gpus] == found_w
    assert [gpu.cap_w for gpu in fake.gpus] == found_w


def test_profiles_without_measurements_leave_clocks_alone(fake, tmp_path, capsys):
    with node(fake, tmp_path, actuators=True) as backend:
        controller = Asks(fleet(), 810.0)
        assert with_actuators(controller, backend) is controller
    assert "no profile has measured points" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [((True, False, "advise", False), "expected --mode act"),
     ((False, True, "observe", False), "expected --mode act"),
     ((True, False, "act", True), "two undo each other")],
)  # fmt: skip
def test_other_actuators_are_refused_where_they_could_not_be_given_back(given, said):
    with pytest.raises(ConfigError, match=said):
        check_actuators(*given)
    check_actuators(True, True, "act", False)
    check_actuators(False, False, "observe", True)
