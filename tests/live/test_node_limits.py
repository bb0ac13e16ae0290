"""Power caps and memory clocks on a node that runs: where they were measured, and of who sleeps."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.control.test_actuators import CAP_W, PROFILE, Asks, capped, fleet_of, locks
from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler, seconds_until
from tests.helpers.fake_pages import Pages
from tests.helpers.paths import ROOT
from voltana_ctrl import ConfigError, Decision, FleetState, Observation
from voltana_ctrl.backends import CpufreqBackend
from voltana_ctrl.cli.running import check_actuators, own_cpus, with_actuators
from voltana_ctrl.engines.endpoints import Endpoint, load_endpoints
from voltana_ctrl.fit.actuators import actuators_toml
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


# CPU clocks


CPU_MHZ = 1800.0


def cpu_tree(folder):
    """Four CPUs that look like the kernel's, two to a clock; gives their ceilings in MHz."""
    files = []
    for number in (0, 2):
        policy = folder / "cpufreq" / f"policy{number}"
        policy.mkdir(parents=True)
        for name, text in (
            ("cpuinfo_min_freq", "800000"), ("cpuinfo_max_freq", "3500000"),
            ("scaling_max_freq", "3000000"), ("related_cpus", f"{number} {number + 1}"),
        ):  # fmt: skip
            (policy / name).write_text(text)
        files.append(policy / "scaling_max_freq")
    return lambda: [int(file.read_text() or 0) / 1000.0 for file in files]


def test_a_measured_cpu_clock_is_set_and_given_back_by_a_kill(fake, tmp_path):
    ceilings_mhz = cpu_tree(tmp_path)
    spec = fleet_of(*locks(), *capped(cpu_mhz=CPU_MHZ))
    gpus = {name: [uuid] for name, uuid in zip(spec.ids, fake.uuids, strict=True)}
    sets = node_clocks(spec, gpus, lock_dir=tmp_path, library=fake.library)
    policies = {"decode-0": [tmp_path / "cpufreq" / "policy2"]}
    reads = Reads(spec)
    reads.load(running_req=[16, 16], kv_used_tok=[8000, 8000])
    both = CpufreqBackend(sets, policies, lock_dir=tmp_path)
    backend = NodeBackend(reads, both, actuators=True)
    controller = with_actuators(Asks(spec, 810.0), backend)
    with Agent(backend, controller, AgentSettings(mode="act")) as agent:
        agent.run(duration_s=0.5)
        assert ceilings_mhz() == [3000.0, CPU_MHZ]
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [810.0, 1410.0]
        agent.kill()
        assert agent._kill.wait(10.0)
        assert ceilings_mhz() == [3000.0, 3000.0]
        agent.run(duration_s=0.5)
    assert ceilings_mhz() == [3000.0, 3000.0]


def test_cpu_clocks_that_nobody_named_or_measured(fake, tmp_path, capsys):
    spec = fleet_of(*locks(), *capped(cpu_mhz=CPU_MHZ), *capped())
    with node(fake, tmp_path, spec, actuators=True) as backend:
        with_actuators(Asks(spec, 810.0), backend)
    assert "decode-0: its profile has measured CPU clocks, which are not set" in (
        capsys.readouterr().err
    )
    engine = Endpoint(instance="decode-0", kind="vllm", url="http://127.0.0.1:1", cpus=(2, 3))
    assert own_cpus(spec, [engine]) == {"decode-0": (2, 3)}
    assert "left alone" not in capsys.readouterr().err
    for nothing in ((), locks()):
        with pytest.raises(ConfigError, match=r"decode-0: .*has no measured points of CPU clocks"):
            own_cpus(fleet_of(*nothing), [engine])


@pytest.mark.parametrize("others", [{"power_cap_w": CAP_W}, {"mem_mhz": 810.0}])
def test_named_cpus_do_not_keep_measured_caps_and_memory_clocks_from_being_used(others, capsys):
    engine = Endpoint(instance="decode-0", kind="vllm", url="http://127.0.0.1:1", cpus=(2, 3))
    assert own_cpus(fleet_of(*locks(), *capped(**others)), [engine]) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert "decode-0: its CPU clock is left alone" in line


def test_cpus_of_a_fleet_file(tmp_path):
    def read(cpus):
        (tmp_path / "fleet.toml").write_text(
            f'[[instance]]\nrole = "colocated"\nprofile = "{PROFILE}"\n'
            f'engine = {{ kind = "vllm", url = "http://10.0.0.1:8000", cpus = {cpus} }}\n'
        )
        (one,) = load_endpoints(tmp_path / "fleet.toml")[1]
        return one.cpus

    assert read('"0-3, 8,16-17"') == (0, 1, 2, 3, 8, 16, 17)
    for wrong in ('"0-"', '"3-1"', '"-1"', '""', '"0-9999999999"', "[0, 1]", "3"):
        with pytest.raises(ConfigError, match=r"engine: cpus: expected"):
            read(wrong)


COMMAND = """
import sys
from pathlib import Path
from voltana_ctrl.backends import cpufreq
from voltana_ctrl.cli import main
cpufreq.CPUFREQ_DIR = Path(sys.argv.pop(1))
main()
"""
WORKING = """vllm:num_requests_running{engine="0"} 16.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.02
"""


def test_a_command_that_is_killed_leaves_no_cpu_clock_behind(fake, tmp_path):
    ceilings_mhz = cpu_tree(tmp_path)
    shipped = (ROOT / "voltana_ctrl" / "profiles" / "data" / f"{PROFILE}.toml").read_text()
    # Better than every lock, so that it does not matter which one the policy asks for.
    points = (*locks(), *capped(saves_frac=0.9, as_fast_mhz=1410.0, cpu_mhz=CPU_MHZ))
    (tmp_path / "mine.toml").write_text(shipped + actuators_toml(points, "table.csv"))
    with Pages(metrics=WORKING) as pages:
        (tmp_path / "fleet.toml").write_text("".join(
            f'[[instance]]\nid = "{role}-0"\nrole = "{role}"\nprofile = "mine.toml"\n'
            f'engine = {{ kind = "vllm", url = "{pages.url}", gpus = ["{uuid}"], '
            f'cpus = "{cpus}" }}\n'
            for role, uuid, cpus in zip(("prefill", "decode"), fake.uuids, ("0-1", "2-3"),
                                        strict=True)
        ))  # fmt: skip
        given = (tmp_path / "cpufreq", "agent", "--fleet", "fleet.toml", "--mode", "act",
                 "--policy", "mpc", "--actuators", "--lock-dir", tmp_path)  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, given)], cwd=tmp_path,
            env={**fake.env, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            seconds_until(lambda: process.poll() is not None or CPU_MHZ in ceilings_mhz(), 60.0)
            assert process.poll() is None, process.stderr.read()
            # Points of decode alone were measured.
            assert ceilings_mhz() == [3000.0, CPU_MHZ]
            os.kill(process.pid, signal.SIGKILL)
            seconds_until(lambda: ceilings_mhz() == [3000.0, 3000.0])
            seconds_until(lambda: all_given_back(fake))
        finally:
            process.kill()
            said = process.communicate()[1]
    assert re.search("decode-0: the clock of its 2 CPUs is limited where that was measured", said)
