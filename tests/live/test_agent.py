"""The agent: unable to set where it only observes, gone within a second where it is killed."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.fake_gpus import (
    all_given_back,
    assignment,
    fleet,
    machine,
    needs_compiler,
    seconds_until,
)
from tests.helpers.fake_pages import Pages
from voltana_ctrl import ConfigError, Decision, FleetState, Observation, PowerBudget, Slo
from voltana_ctrl.backends import ReplayBackend
from voltana_ctrl.backends.nvml import meters as gpu_meters
from voltana_ctrl.backends.nvml.driver import GpuReader, Nvml
from voltana_ctrl.backends.nvml.meters import GpuMeters
from voltana_ctrl.control import StaticController
from voltana_ctrl.live.agent import Agent, AgentSettings
from voltana_ctrl.live.governed import PolicyController, node_policy
from voltana_ctrl.live.node import (
    CappedGuard,
    KillSwitch,
    NodeBackend,
    node_clocks,
    power_ceilings_mhz,
)
from voltana_ctrl.live.node_control import Advice, WhoAnswers
from voltana_ctrl.savings.switchback import BLOCK_NOTE
from voltana_ctrl.types import TickRecord

pytestmark = needs_compiler
SLO = Slo(ttft_s=0.6, itl_s=0.06)
SETS = {
    "lock_clock", "reset_clock", "lock_memory", "reset_memory", "set_power_cap", "set_clock",
    "touch", "ask",
}  # fmt: skip


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        yield fake
        assert all_given_back(fake), "the hardware was not given back"
        assert all(gpu.unsupported_sets == 0 for gpu in fake.gpus)


def meters(fake, spec=None):
    spec = spec or fleet()
    return GpuMeters(spec, assignment(spec, fake), library=fake.library)


def setting(fake, folder, names=("prefill-0", "decode-0")):
    gpus = {name: uuids for name, uuids in assignment(fleet(), fake).items() if name in names}
    return node_clocks(fleet(), gpus, lock_dir=folder, library=fake.library)


def acting(fake, folder, clock_mhz=1005, names=("prefill-0", "decode-0"), **settings):
    backend = NodeBackend(meters(fake), setting(fake, folder, names))
    controller = StaticController(fleet(), clock_mhz)
    try:
        return Agent(backend, controller, AgentSettings(mode="act", **settings))
    except ConfigError:
        backend.close()
        raise


class Keep:
    def __init__(self):
        self.records = []

    def on_tick(self, record):
        self.records.append(record)


def reachable(root):
    """Objects of this package that can be reached from one."""
    seen, todo, found = set(), [root], []
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen.add(id(one))
        if type(one).__module__.startswith("voltana_ctrl"):
            found.append(one)
        inside = isinstance(one, dict | list | tuple | set | types.MethodType | types.CellType)
        # Globals of a function are its module, not what it holds.
        if isinstance(one, types.FunctionType):
            todo += [*(one.__closure__ or ()), *(one.__defaults__ or ())]
        elif inside or type(one).__module__.startswith(("voltana_ctrl", "threading", "functools")):
            todo += gc.get_referents(one)
    return found


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_observe_and_advise_hold_nothing_that_can_set(fake, mode):
    controller = StaticController(fleet(), 705) if mode == "advise" else None
    with Agent(NodeBackend(meters(fake)), controller, AgentSettings(mode=mode)) as agent:
        agent.run(duration_s=0.5)
        held = reachable(agent)
        able = {(type(one).__name__, name) for one in held for name in SETS if hasattr(one, name)}
        assert able == set()
        kinds = {type(one) for one in held}
        assert {GpuReader, Nvml, GpuMeters, NodeBackend} <= kinds, "the walk sees nothing"
    assert [gpu.sets for gpu in fake.gpus] == [0.0, 0.0]


def test_the_walk_would_see_what_can_set(fake, tmp_path):
    with acting(fake, tmp_path) as agent:
        held = reachable(agent)
        able = {name for one in held for name in SETS if hasattr(one, name)}
        assert {"lock_clock", "set_clock", "touch"} <= able


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_the_command_builds_nothing_that_can_set(fake, tmp_path, engines, monkeypatch, mode):
    from voltana_ctrl.cli.running import open_node
    from voltana_ctrl.engines.endpoints import load_endpoints
    from voltana_ctrl.engines.telemetry import EngineBackend

    monkeypatch.setattr(gpu_meters, "Nvml", lambda _=None: Nvml(fake.library))
    spec, endpoints = load_endpoints(fleet_file(tmp_path, fake, engines))
    chosen = {one.instance: one.gpus for one in endpoints}
    backend, _, _ = open_node(
        spec, endpoints, chosen, mode, socket=None, lock_dir=tmp_path, policy="mpc",
        slo=SLO,
    )  # fmt: skip
    controller = node_policy(spec, SLO, "mpc") if mode == "advise" else None
    with Agent(backend, controller, AgentSettings(mode=mode)) as agent:
        agent.run(duration_s=0.5)
        held = reachable(agent)
        able = {(type(one).__name__, name) for one in held for name in SETS if hasattr(one, name)}
        assert able == set()
        assert {EngineBackend, GpuReader} <= {type(one) for one in held}
    assert [gpu.sets for gpu in fake.gpus] == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_every_call_that_sets_is_closed_in_observe(fake, mode, monkeypatch):
    import pynvml

    def forbidden(*arguments):
        raise AssertionError("a set call")

    closed = [name for name in dir(pynvml) if name.startswith(("nvmlDeviceSet", "nvmlDeviceReset"))]
    assert "nvmlDeviceSetGpuLockedClocks" in closed
    for name in closed:
        monkeypatch.setattr(pynvml, name, forbidden)
    controller = StaticController(fleet(), 705) if mode == "advise" else None
    with Agent(NodeBackend(meters(fake)), controller, AgentSettings(mode=mode)) as agent:
        agent.run(duration_s=0.5)
        agent.kill()
        agent.loop.tick()
        agent.loop.backend.apply(Decision.highest(fleet(), floor_mhz=fleet().min_mhz))
        agent.loop.backend.release()
        agent.loop.tick()


def test_a_mode_takes_no_backend_that_can_do_more_or_less(fake, tmp_path):
    with NodeBackend(meters(fake), setting(fake, tmp_path)) as backend:
        for mode in ("observe", "advise"):
            with pytest.raises(ConfigError, match="can set clocks"):
                Agent(backend, None, AgentSettings(mode=mode))
    with NodeBackend(meters(fake)) as backend:
        with pytest.raises(ConfigError, match="nothing to set clocks with"):
            Agent(backend, StaticController(fleet(), 705), AgentSettings(mode="act"))
        with pytest.raises(ConfigError, match="expected no controller"):
            Agent(backend, StaticController(fleet(), 705))
        with pytest.raises(ConfigError, match="expected a controller"):
            Agent(backend, None, AgentSettings(mode="advise"))
    with pytest.raises(ConfigError, match="mode"):
        AgentSettings(mode="play")
    with pytest.raises(ConfigError, match="proves nothing"):
        AgentSettings(mode="advise", switchback_s=60.0)


def test_act_sets_and_gives_back(fake, tmp_path):
    with acting(fake, tmp_path) as agent:
        agent.run(duration_s=0.3)
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [1005.0, 1005.0]
        state = agent.loop.state
        assert state.power_w.min() > 60.0
        assert state.freq_mhz.tolist() == [1005.0, 1005.0] or agent.loop.ticks < 3
    assert all_given_back(fake)


def test_only_canaries_are_set(fake, tmp_path):
    with acting(fake, tmp_path, names=("decode-0",)) as agent:
        agent.run(duration_s=0.3)
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [0.0, 1005.0]
        able = [one for one in reachable(agent.loop.backend) if hasattr(one, "lock_clock")]
        assert {one.uuid for one in able} == {fake.uuids[1]}
    assert fake.gpus[0].sets == 0.0


def test_kill_gives_back_within_a_second_and_goes_on_reading(fake, tmp_path):
    with acting(fake, tmp_path) as agent:
        agent.loop.start()
        seconds_until(lambda: fake.gpus[0].locked and fake.gpus[1].locked)
        begin_s = time.monotonic()
        agent.kill("a test")
        seconds_until(lambda: all_given_back(fake))
        assert time.monotonic() - begin_s < 1.0
        ticks, sets = agent.loop.ticks, [gpu.sets for gpu in fake.gpus]
        seconds_until(lambda: agent.loop.ticks > ticks + 3)
        assert [gpu.sets for gpu in fake.gpus] == sets
        assert agent.killed == "a test"
        agent.loop.stop()


def test_kill_file_gives_back_within_a_second(fake, tmp_path):
    file = tmp_path / "kill"
    with acting(fake, tmp_path, kill_file=file) as agent:
        agent.loop.start()
        seconds_until(lambda: all(gpu.locked for gpu in fake.gpus))
        file.touch()
        assert seconds_until(lambda: all_given_back(fake)) < 1.0
        assert "kill" in agent.killed
        agent.loop.stop()
    with pytest.raises(ConfigError, match="remove it"):
        acting(fake, tmp_path, kill_file=file)


def test_kill_does_not_wait_for_a_controller_that_computes(fake, tmp_path):
    class Thinks(StaticController):
        def _decide(self, observation, memory):
            if observation.state.t_s > self.until_s:
                time.sleep(3.0)
            return super()._decide(observation, memory)

    controller = Thinks(fleet(), 1005)
    controller.until_s = time.monotonic() + 0.3
    backend = NodeBackend(meters(fake), setting(fake, tmp_path))
    with Agent(backend, controller, AgentSettings(mode="act")) as agent:
        agent.loop.start()
        seconds_until(lambda: all(gpu.locked for gpu in fake.gpus))
        time.sleep(0.5)  # it thinks now
        agent.kill()
        assert seconds_until(lambda: all_given_back(fake)) < 1.0
        agent.loop.stop()
        assert all_given_back(fake), "the decision that was under way was carried out"


def test_kill_that_fails_says_so():
    def release():
        raise RuntimeError("the driver hangs")

    said = []
    with KillSwitch(release, on_killed=said.append) as switch:
        switch.kill("a test")
        assert switch.wait(5.0)
    assert "the driver hangs" in said[0]


def test_switchback_alternates_and_a_kill_ends_its_marks(fake, tmp_path):
    keep = Keep()
    backend = NodeBackend(meters(fake), setting(fake, tmp_path))
    with Agent(
        backend,
        StaticController(fleet(), 705, period_s=0.05),
        AgentSettings(mode="act", switchback_s=0.5, seed=1),
        observers=[keep],
    ) as agent:
        agent.run(duration_s=2.1)
        clocks = {tuple(record.applied.freq_mhz) for record in keep.records}
        assert clocks == {(705.0, 705.0), (1410.0, 1410.0)}
        assert {record.notes[BLOCK_NOTE] for record in keep.records} >= {0.0, 1.0, 2.0, 3.0}
        agent.kill()
        seconds_until(lambda: all_given_back(fake))
        assert BLOCK_NOTE not in agent.loop.tick().notes


def test_limits_per_gpu_bind_every_clock(fake, tmp_path):
    ceiling = power_ceilings_mhz(fleet(), {"prefill-0": 300.0})
    assert 210.0 < ceiling[0] < 1410.0 == ceiling[1]
    with acting(fake, tmp_path, clock_mhz=1410, ceiling_mhz=ceiling) as agent:
        agent.run(duration_s=0.3)
        assert [gpu.highest_lock_mhz for gpu in fake.gpus] == ceiling.tolist()
    assert all(gpu.cap_w == gpu.cap_default_w for gpu in fake.gpus)


def test_ceilings_of_a_node_hold_whatever_is_asked():
    ceiling = np.array([705.0, 900.0])
    guard = CappedGuard(fleet(), ceiling)
    for status_s in (0.0, 100.0):
        state = replace(FleetState.idle(2, t_s=5.0), age_s=np.full(2, status_s))
        shielded = guard.shield(Decision.highest(fleet()), Observation(state=state), None)
        assert np.all(shielded.freq_mhz <= ceiling)
        assert np.all(shielded.freq_max_mhz <= ceiling)
        again = guard.shield(shielded, Observation(state=state), None)
        assert again.freq_mhz.tolist() == shielded.freq_mhz.tolist()


def test_a_floor_of_its_own_is_no_change_of_the_decision():
    guard = CappedGuard(fleet(), fleet().max_mhz, min_mhz=np.array([600.0, 210.0]))
    asked = Decision.highest(fleet(), floor_mhz=np.array([450.0, 450.0]))
    seen = Observation(state=FleetState.idle(2))
    applied = guard.shield(asked, seen, None)
    assert applied.freq_mhz.tolist() == [600.0, 450.0]
    assert guard.changes(asked, applied) == ()
    held = replace(applied, freq_mhz=np.array([600.0, 900.0]))
    assert guard.changes(asked, held) == ("floor held by slew",)


def test_who_answers_no_more_and_who_does_again_is_logged_once_each(caplog):
    there, gone = (
        TickRecord(
            number=7,
            observation=Observation(state=replace(FleetState.idle(2), alive=np.array(alive))),
            proposed=Decision.highest(fleet()),
            applied=Decision.highest(fleet()),
        )
        for alive in ([True, False], [False, False])
    )
    looks = WhoAnswers(fleet())
    for tick in (replace(there, number=0), there, gone, gone, there, there):
        looks.on_tick(tick)
    assert [one.removeprefix("voltana-ctrl: ") for one in caplog.messages] == [
        "prefill-0 does not answer; the others take its work", "prefill-0 answers"
    ]  # fmt: skip


def test_power_caps_of_others_are_seen_and_left(fake, tmp_path):
    fake.gpus[0].cap_w = 250.0
    found = meters(fake)
    assert found.caps_w == {fake.uuids[0]: 250.0}
    found.close()
    with acting(fake, tmp_path) as agent:
        agent.run(duration_s=0.2)
    assert fake.gpus[0].cap_w == 250.0
    fake.gpus[0].cap_w = fake.gpus[0].cap_default_w


def test_meters_read_what_the_driver_says_and_grow_old_where_it_hangs(fake):
    with meters(fake) as found:
        state = found.read().state
        assert np.all((state.freq_mhz > 1200.0) & (state.freq_mhz <= 1410.0))
        assert state.power_w.min() > 100.0
        time.sleep(0.2)
        assert found.read().state.energy_j.min() > 0.0
        fake.gpus[1].lost = 1
        assert found.read().state.alive.tolist() == [True, False]
        fake.gpus[1].lost = 0
        fake.gpus[0].hang_s, fake.gpus[0].hang_calls = 1.0, 1
        found.read()
        assert found.read().state.age_s[0] > 0.3


def test_meters_leave_a_driver_that_hangs_only_when_it_has_answered(fake):
    found = meters(fake)
    left = threading.Event()
    shutdown = found._nvml.close
    found._nvml.close = lambda: (shutdown(), left.set())
    fake.gpus[0].hang_s, fake.gpus[0].hang_calls = 1.5, 1
    began_s = time.monotonic()
    found.read()
    found.close()
    assert not left.is_set()
    assert time.monotonic() - began_s < 1.4
    assert left.wait(10.0)
    assert time.monotonic() - began_s >= 1.5


# Policies without engine's help


def busy(running=20.0, kv=8000.0, queue=0.0):
    return replace(
        FleetState.idle(2, t_s=1.0, freq_mhz=1410.0),
        running_req=np.array([0.0, running]), kv_used_tok=np.array([0.0, kv]),
        queue_tok=np.array([queue, 0.0]), queue_req=np.array([queue / 500.0, 0.0]),
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["voltanallm-full-ladder", "threshold", "mpc", "cascade"])
def test_policies_choose_clocks_by_load_and_park_nobody(policy):
    controller = node_policy(fleet(), SLO, policy)
    clocks = []
    for running in (1.0, 150.0):
        memory = controller.init()
        for k in range(30):
            state = replace(busy(running, 400.0 * running), t_s=0.1 * k)
            decision, memory = controller.decide(Observation(state=state), memory)
        assert decision.active.all()
        assert decision.limits is None
        clocks.append(decision.freq_mhz[1])
    assert clocks[0] < clocks[1], "a fuller batch needs a higher clock"
    assert set(clocks) <= set(fleet().instances[1].clocks_mhz)


def test_parked_instances_keep_a_clock_for_what_they_get():
    class Parks(StaticController):
        def _decide(self, observation, memory):
            wish = Decision.highest(self.fleet, floor_mhz=self.fleet.min_mhz)
            active = np.array([True, True, False])
            return replace(wish, active=active, route_frac=np.array([1.0, 1.0, 0.0])), memory

    spec = fleet("1P2D")
    controller = PolicyController(spec, inner=Parks(spec))
    decision, _ = controller.decide(Observation(state=FleetState.idle(3)), None)
    assert decision.freq_mhz.tolist() == [210.0, 210.0, 1410.0]
    assert decision.active.all()


@pytest.mark.parametrize("policy", ["mpc", "cascade"])
def test_engines_that_are_loaded_alike_are_advised_alike(policy):
    """A policy that would pack all on one engine, where it does not route."""
    spec = fleet("1P2D")
    decodes = np.array([one.role.decodes for one in spec.instances])
    controller = node_policy(spec, SLO, policy)
    memory, freq_mhz, parked = controller.init(), spec.max_mhz, False
    for k in range(900):
        running = 40.0 if k < 600 else 0.0  # and then no load at all
        state = replace(
            FleetState.idle(3, t_s=0.1 * k),
            freq_mhz=freq_mhz,
            running_req=np.where(decodes, running, 0.0),
            kv_used_tok=np.where(decodes, 800.0 * running, 0.0),
            arrived_req=np.full(3, running / 100.0),
            arrived_tok=np.full(3, 5.0 * running),
        )
        decision, memory = controller.decide(Observation(state=state), memory)
        freq_mhz = decision.freq_mhz
        first_mhz, second_mhz = freq_mhz[decodes]
        if k in (599, 899):
            assert abs(first_mhz - second_mhz) <= 0.3 * max(first_mhz, second_mhz)
        assert decision.price_j_req.tolist() == [0.0, 0.0, 0.0]
        parked = parked or not memory.target.active.all() if memory.target else parked
    assert parked, "the policy would have parked one of them"


def test_advice_names_what_is_wrong_with_engines_that_answer():
    said = []
    told = {"decode-0": "GPU GPU-1: power not told for 13 s"}
    advice = Advice(fleet(), said.append, every_s=1.0, problems=lambda: told)

    class Record:
        applied = Decision.highest(fleet())

    for k in range(12):
        state = replace(busy(), t_s=0.1 * k)
        Record.observation = Observation(state=state)
        advice.on_tick(Record)
    (line,) = said
    assert "decode-0: GPU GPU-1: power not told for 13 s" in line
    assert "does not answer" not in line


def test_policies_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="bound"):
        node_policy(fleet(), SLO, "bound")
    with pytest.raises(ConfigError, match="no power budget"):
        node_policy(fleet(), SLO, "voltanallm", power_budget=PowerBudget.parse("700"))
    with pytest.raises(ConfigError, match="one per instance"):
        PolicyController(fleet(), governors=[])


def test_advice_expects_what_the_profile_says():
    said, advice = [], None
    advice = Advice(fleet(), said.append, every_s=1.0)
    observation = Observation(state=busy())
    low = Decision.highest(fleet(), floor_mhz=np.array([705.0, 705.0]))

    class Record:
        applied = low

    for k in range(12):
        Record.observation = replace(observation, state=replace(observation.state, t_s=0.1 * k))
        advice.on_tick(Record)
    (line,) = said
    assert "decode-0 1410 -> 705 MHz" in line
    now_w = advice.power_w(observation, np.full(2, 1410.0)).sum()
    then_w = advice.power_w(observation, np.full(2, 705.0)).sum()
    assert f"{now_w:.0f} W -> {then_w:.0f} W" in line
    assert 0.2 < 1.0 - then_w / now_w < 0.7


# The command

PAGE = """vllm:num_requests_running{engine="0"} 4.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.01
vllm:prompt_tokens_total{engine="0"} 1000.0
vllm:generation_tokens_total{engine="0"} 2000.0
vllm:request_success_total{engine="0"} 10.0
"""


class Working(dict):
    """Pages of an engine that makes tokens: one that says the same for long counts as hung."""

    made_tok = 0

    def get(self, path, default=None):
        self.made_tok += 50
        return self[path].replace("2000.0", f"{2000.0 + self.made_tok}")


@pytest.fixture
def engines():
    with Pages(metrics=PAGE) as pages:
        pages.pages = Working(pages.pages)
        yield pages


def fleet_file(folder, fake, engines):
    text = ""
    for name, uuid in zip(("prefill", "decode"), fake.uuids, strict=True):
        text += f"""
[[instance]]
id = "{name}-0"
role = "{name}"
profile = "a100-sxm-80gb/llama-3.1-8b"
engine = {{ kind = "vllm", url = "{engines.url}", gpus = ["{uuid}"] }}
"""
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def alone(folder):
    """Lock files of its own: fake GPUs of other tests have the same names."""
    return "--lock-dir", folder


class Command:
    def __init__(self, fake, root, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "voltana_ctrl.cli", "agent", *map(str, arguments)],
            env={**fake.env, "PYTHONPATH": str(root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=60)

    def alive(self):
        assert self.process.poll() is None, self.process.communicate()[1]
        return True

    def told(self, text):
        """What it wrote on stderr until `text` came, or it ended."""
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if text in line:
                break
        return "".join(lines)

    def end(self):
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


def test_command_observes_by_default(fake, tmp_path, root, engines):
    log = tmp_path / "ticks.jsonl"
    with Command(fake, root, "--fleet", fleet_file(tmp_path, fake, engines), "--duration", 4,
                 "--log", log, "--metrics", 0) as command:  # fmt: skip
        code, _, errors = command.end()
    assert code == 0, errors
    assert "mode observe" in errors
    assert "metrics on 127.0.0.1:" in errors
    assert [gpu.sets for gpu in fake.gpus] == [0.0, 0.0]
    assert json.loads(log.read_text().splitlines()[0])["mode"] == "observe"
    backend = ReplayBackend(log)
    states = [backend.read().state for _ in range(len(backend))]
    assert states[-1].alive.all()
    assert states[-1].running_req.tolist() == [4.0, 4.0]
    assert states[-1].power_w.min() > 60.0


def test_command_acts_is_killed_by_signal_and_ends_by_sigterm(fake, tmp_path, root, engines):
    acting = ["--mode", "act", "--policy", "static-1005", "--canary", "decode-0"]
    path = fleet_file(tmp_path, fake, engines)
    with Command(fake, root, "--fleet", path, *acting, *alone(tmp_path)) as command:
        seconds_until(lambda: command.alive() and fake.gpus[1].lock_hi_mhz == 1005.0, 60.0)
        command.process.send_signal(signal.SIGUSR1)
        assert seconds_until(lambda: all_given_back(fake)) < 1.0
        time.sleep(0.3)
        command.alive()
        command.process.terminate()
        code, _, errors = command.end()
    assert code == 128 + signal.SIGTERM
    assert "killed, because of SIGUSR1: the hardware is given back" in errors
    assert fake.gpus[0].sets == 0.0


def test_command_advises(fake, tmp_path, root, engines, monkeypatch):
    with Command(fake, root, "--fleet", fleet_file(tmp_path, fake, engines), "--mode", "advise",
                 "--policy", "static-1005", "--gpu-power-limit", "300",
                 "--duration", 60) as command:  # fmt: skip
        errors = command.told("decode-0 1305 -> 1005 MHz; expected")
        command.process.terminate()
        code, _, _ = command.end()
    assert code == 128 + signal.SIGTERM
    assert "power limits per GPU in force: prefill-0 300 W, decode-0 300 W" in errors
    assert "decode-0 1305 -> 1005 MHz; expected" in errors
    assert [gpu.sets for gpu in fake.gpus] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--fleet"),
        (("--fleet", "absent.toml"), "absent.toml"),
        (("--mode", "play"), "mode"),
        (("--canary", "decode-7", "--mode", "act"), "canary"),
        (("--node", "nowhere"), "node"),
        (("--switchback", "10"), "proves nothing"),
        (("--controller", "http://127.0.0.1:1", "--mode", "act"), "token"),
        (("--serve", "here"), "HOST"),
        (("--gpu-power-limit", "decode-0=much"), "whole watts"),
        (("--metrics", "x:y"), "metrics"),
        (("--policy", "nonsense", "--mode", "advise"), "policy"),
    ],
)
def test_command_refuses_in_one_line(fake, tmp_path, engines, monkeypatch, capsys, arguments,
                                     message):  # fmt: skip
    from voltana_ctrl import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOLTANA_CTRL_TOKEN", "")
    for name, value in fake.env.items():
        monkeypatch.setitem(os.environ, name, value)
    if arguments and "--fleet" not in arguments:
        if "--serve" in arguments:
            monkeypatch.setenv("VOLTANA_CTRL_TOKEN", "0123456789abcdef")
        arguments = ("--fleet", fleet_file(tmp_path, fake, engines), *arguments, *alone(tmp_path))

    monkeypatch.setattr(gpu_meters, "Nvml", lambda _=None: Nvml(fake.library))
    monkeypatch.setattr(sys, "argv", ["voltana-ctrl", "agent", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told
    assert told.startswith("voltana-ctrl: ")


@pytest.mark.parametrize("arguments", [["dashboard"], ["agent", "--dashboard"]])
def test_command_prints_the_dashboard(monkeypatch, capsys, arguments):
    from voltana_ctrl import cli

    monkeypatch.setattr(sys, "argv", ["voltana-ctrl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["uid"] == "voltana-ctrl"


def test_commands_of_a_controller_and_a_node(fake, tmp_path, root, engines):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    common = ["--fleet", fleet_file(tmp_path, fake, engines), "--mode", "act", "--token-file",
              token, "--policy", "voltanallm-full-ladder", *alone(tmp_path)]  # fmt: skip
    with Command(fake, root, *common, "--serve", "127.0.0.1:0") as controller:
        told = controller.told("controller of")
        assert "--serve goes with the next release" in told
        port = told.rpartition(":")[2].strip()
        assert port.isdigit(), told
        with Command(fake, root, *common, "--controller", f"http://127.0.0.1:{port}") as node:
            seconds_until(
                lambda: node.alive() and all(0 < gpu.lock_hi_mhz < 1410 for gpu in fake.gpus), 60.0
            )
            controller.process.kill()
            took_s = seconds_until(lambda: all(gpu.lock_hi_mhz == 1410 for gpu in fake.gpus))
            assert took_s < 2.0
            node.process.terminate()
            code, _, errors = node.end()
            assert code == 128 + signal.SIGTERM, errors
