"""Whatever becomes of the controller, the hardware is given back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_gpus import (
    Host,
    all_given_back,
    decision,
    machine,
    needs_compiler,
    open_backend,
    seconds_until,
)
from tests.helpers.paths import ROOT
from voltana_ctrl import ActuationDenied, BackendError
from voltana_ctrl.backends.nvml.giveback import FoundFile, FoundGpu, give_back, record_from
from voltana_ctrl.backends.nvml.lockfile import LockFile, holder
from voltana_ctrl.backends.nvml.process import listeners, process_state
from voltana_ctrl.backends.nvml.watchdog import Watchdog
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import Limits

pytestmark = needs_compiler
ACTS_WITHIN_S = 2.0

LOCKED = """
backend = open_backend()
backend.apply(decision(705, 900, limits=Limits(power_cap_w=[200, 200], mem_mhz=[810, 810])))
say(f"set {backend._lease.watchdog._child.pid}")
"""


@pytest.fixture
def fake(tmp_path):
    with machine(tmp_path) as fake:
        fake.gpus[0].cap_w = 333
        yield fake


def as_found(fake) -> bool:
    return [gpu.cap_w for gpu in fake.gpus] == [333, 400] and not any(
        gpu.lock_hi_mhz or gpu.mem_lock_hi_mhz for gpu in fake.gpus
    )


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = {int(child) for task in tasks for child in task.read_text().split()}
    return found.union(*map(descendants, found))


# The controller ends


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGABRT, marks=pytest.mark.slow)],
)
def test_killed_controller(fake, tmp_path, number):
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        watchdog = int(host.expect("set"))
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 900]
        assert [gpu.cap_w for gpu in fake.gpus] == [200, 200]
        host.send(number)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S
        seconds_until(lambda: not alive(watchdog))
        assert list(tmp_path.glob("*.lock")) == []


def test_ctrl_c_ends_through_the_with_block(fake, tmp_path):
    # A shell that runs the tests in the background has Ctrl-C ignored, and children inherit it.
    heeded = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    body = heeded + LOCKED + "with backend:\n    say('in')\n    time.sleep(60)"
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        host.expect("in")
        host.send(signal.SIGINT)
        assert host.wait() != 0
        assert as_found(fake)
        assert "KeyboardInterrupt" in host.process.stderr.read()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_our_programs_end_orderly_on_sigterm(fake, tmp_path, number):
    body = LOCKED + "with end_on_sigterm(), backend:\n    say('in')\n    time.sleep(60)"
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        host.expect("in")
        host.send(number)
        assert host.wait() == 128 + number
        assert as_found(fake)


@pytest.mark.slow
def test_uncaught_exception(fake, tmp_path):
    with Host(fake, tmp_path, LOCKED + "raise RuntimeError('bug')") as host:
        host.expect("set")
        assert host.wait() == 1
        seconds_until(lambda: as_found(fake), ACTS_WITHIN_S)


def test_who_kills_every_descendant_leaves_the_watchdog(fake, tmp_path):
    """As engines do with what they have started."""
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        watchdog = int(host.expect("set"))
        assert alive(watchdog)
        for pid in (*descendants(host.process.pid), host.process.pid):
            os.kill(pid, signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S


@pytest.mark.slow
def test_a_process_group_that_is_killed_leaves_the_watchdog(fake, tmp_path):
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        host.expect("set")
        os.killpg(host.process.pid, signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S


@pytest.mark.slow
def test_signals_that_end_the_controller_do_not_end_the_watchdog(fake, tmp_path):
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        watchdog = int(host.expect("set"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(watchdog, number)
        time.sleep(0.2)
        assert alive(watchdog)
        host.send(signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S


@pytest.mark.slow
def test_a_forked_child_does_not_keep_a_dead_controllers_clocks(fake, tmp_path):
    # Servers fork workers, which inherit pipes and locks; they must not count as the controller.
    body = LOCKED + (
        "child = os.fork()\n"
        "if child == 0:\n"
        "    backend.close()\n"  # not the owner: nothing happens
        "    say('child')\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "time.sleep(60)"
    )
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        host.expect("child")
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 900]
        host.send(signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S
        with open_backend(fake, tmp_path) as successor:
            successor.apply(decision(705, 705))


# The controller lives, but does nothing


def test_frozen_controller_is_given_back_and_sets_again_when_it_thaws(fake, tmp_path):
    # It stops itself between two calls: stopped within one it would hold the fake driver's lock.
    body = LOCKED + (
        "for k in range(10**6):\n"
        "    backend.apply(decision(705, 900))\n"
        "    time.sleep(0.05)\n"
        "    if k == 5:\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)"
    )
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        seconds_until(lambda: process_state(host.process.pid) == "T")
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S
        host.send(signal.SIGCONT)
        seconds_until(lambda: [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 900])
        host.send(signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S


def test_idle_controller_is_given_back_and_sets_again_when_used(fake, tmp_path):
    with open_backend(fake, tmp_path, idle_s=0.3) as backend:
        backend.apply(decision(705, 900))
        seconds_until(lambda: fake.gpus[0].lock_hi_mhz == 0, limit_s=0.3 + ACTS_WITHIN_S)

        def set_again() -> bool:
            backend.apply(decision(705, 900))
            return fake.gpus[0].lock_hi_mhz == 705

        seconds_until(set_again)
    assert as_found(fake)


# The watchdog


def test_watchdog_does_nothing_after_a_clean_close(fake, tmp_path):
    backend = open_backend(fake, tmp_path)
    backend.apply(decision(705, 900))
    child = backend._lease.watchdog._child
    backend.close()
    assert as_found(fake)
    assert not child.alive()
    fake.gpus[0].lock_hi_mhz = 900  # the operator's, later
    time.sleep(0.3)
    assert fake.gpus[0].lock_hi_mhz == 900


@pytest.mark.slow
def test_killed_watchdog_is_replaced(fake, tmp_path):
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        first = int(host.expect("set"))
        os.kill(first, signal.SIGKILL)
        seconds_until(lambda: set(listeners(host.process.pid)) - {first})
        time.sleep(1.0)  # for the new one to be told
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 900]
        host.send(signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S


def test_without_a_watchdog_nothing_is_set(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(BackendError, match="watchdog: cannot be started"):
        open_backend(fake, tmp_path)
    assert list(tmp_path.glob("*.lock")) == []


def test_watchdog_gives_back_what_the_controller_no_longer_may(fake, tmp_path):
    # The controller drops its privilege; the watchdog has kept the one it was started with.
    backend = open_backend(fake, tmp_path)
    backend.apply(decision(705, 900))
    for gpu in fake.gpus:
        gpu.deny_pid = os.getpid()
    backend.close()
    assert all(gpu.lock_hi_mhz == 0 for gpu in fake.gpus)
    assert holder(fake.uuids[0], tmp_path) is None


def test_what_cannot_be_given_back_is_said_and_tried_on(fake, tmp_path):
    backend = open_backend(fake, tmp_path)
    backend.apply(decision(705, 900))
    fake.gpus[1].lost = 1
    lease = backend._lease
    with pytest.raises(ActuationDenied, match=r"could not be given back.*nvidia-smi"):
        lease.close(watchdog_limit_s=0.3)
    assert fake.gpus[0].lock_hi_mhz == 0
    fake.gpus[1].lost = 0
    seconds_until(lambda: as_found(fake))
    backend.close()
    assert lease.watchdog._child.wait(20.0)


# Lock files


def test_second_controller_is_refused_by_name(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        with pytest.raises(BackendError, match=rf"another controller.*process {os.getpid()} "):
            open_backend(fake, tmp_path)
        assert f"process {os.getpid()}" in holder(fake.uuids[0], tmp_path)
        backend.apply(decision(705, 900))
        assert fake.gpus[1].lock_hi_mhz == 900
    assert holder(fake.uuids[0], tmp_path) is None


@pytest.mark.slow
def test_second_controller_in_another_process_is_refused(fake, tmp_path):
    body = "try:\n    open_backend()\nexcept Exception as error:\n    say(f'refused {error}')"
    with open_backend(fake, tmp_path), Host(fake, tmp_path, body) as host:
        assert str(os.getpid()) in host.expect("refused")


def test_successor_waits_for_the_watchdog_of_a_killed_controller(fake, tmp_path):
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        host.expect("set")
        host.send(signal.SIGKILL)
        host.wait()
        with open_backend(fake, tmp_path) as successor:
            successor.apply(decision(600, 600))
            time.sleep(0.3)
            # The watchdog of the dead one has acted before, not after, the successor set.
            assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [600, 600]
    assert as_found(fake)


def test_hardware_left_by_a_controller_and_its_watchdog_is_recovered(fake, tmp_path):
    with Host(fake, tmp_path, LOCKED + "time.sleep(60)") as host:
        watchdog = int(host.expect("set"))
        host.send(signal.SIGSTOP)
        os.kill(watchdog, signal.SIGKILL)
        host.send(signal.SIGKILL)
        host.wait()
    seconds_until(lambda: not alive(watchdog))
    assert [gpu.cap_w for gpu in fake.gpus] == [200, 200]
    with open_backend(fake, tmp_path) as successor:
        assert sorted(successor._lease.recovered) == sorted(fake.uuids)
        assert as_found(fake)


def test_lock_file_of_another_user_is_not_believed(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to make a file of another user")
    path = tmp_path / "voltana-ctrl-GPU-0.lock"
    path.write_text(json.dumps({"give_back": FoundFile(path="x", text="y").as_dict()}))
    os.chown(path, 65534, 65534)
    with pytest.raises(BackendError, match=r"others can write it.*got 65534"):
        LockFile("GPU-0", folder=tmp_path)


def test_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "voltana-ctrl-GPU-0.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(BackendError, match="cannot be opened"):
        LockFile("GPU-0", folder=tmp_path)
    assert not (tmp_path / "victim").exists()


def test_lock_file_with_a_second_name_is_not_believed(tmp_path):
    path = tmp_path / "voltana-ctrl-GPU-0.lock"
    path.write_text(json.dumps({"give_back": FoundFile(path="x", text="y").as_dict()}))
    os.link(path, tmp_path / "another-name")
    with pytest.raises(BackendError, match="2 links"):
        LockFile("GPU-0", folder=tmp_path)


@pytest.mark.parametrize("mode", [0o646, 0o664])
def test_lock_file_that_others_may_write_is_not_believed(tmp_path, mode):
    path = tmp_path / "voltana-ctrl-GPU-0.lock"
    path.touch()
    path.chmod(mode)
    with pytest.raises(BackendError, match="others can write it"):
        LockFile("GPU-0", folder=tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_lock_folder_that_others_may_write_is_refused(tmp_path, mode):
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(mode)
    with pytest.raises(BackendError, match="others can write it"):
        LockFile("GPU-0", folder=tmp_path / "locks")


def test_lock_folder_is_made_and_its_files_are_for_their_owner(tmp_path):
    held = LockFile("GPU-0", folder=tmp_path / "run" / "locks")
    assert (tmp_path / "run" / "locks").stat().st_mode & 0o022 == 0
    assert held.path.stat().st_mode & 0o777 == 0o600
    held.release()


def test_a_pipe_in_place_of_a_lock_file_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "voltana-ctrl-GPU-0.lock")
    assert holder("GPU-0", tmp_path) is None
    with pytest.raises(BackendError, match="expected a file"):
        LockFile("GPU-0", folder=tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"owner": {}}', '{"give_back": null}\nrest'])
def test_torn_lock_file_of_a_dead_owner_is_taken_over(tmp_path, text):
    path = tmp_path / "voltana-ctrl-GPU-0.lock"
    path.write_text(text)
    lock = LockFile("GPU-0", folder=tmp_path)
    assert not lock.recovered
    lock.release()
    assert not path.exists()


def test_strange_record_in_a_lock_file_is_refused(tmp_path):
    (tmp_path / "voltana-ctrl-GPU-0.lock").write_text('{"give_back": {"kind": "shell"}}')
    with pytest.raises(BackendError, match="remove the file"):
        LockFile("GPU-0", folder=tmp_path)


def test_unusable_folder_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"choose another.*the same lock_dir"):
        LockFile("GPU-0", folder=tmp_path / "file" / "inside")


# Records


def test_records_survive_json():
    for record in (
        FoundGpu(uuid="GPU-0", clock=True, restore_lock_mhz=(210, 900), power_cap_w=333.5),
        FoundFile(path="p", text="1"),
    ):
        assert record_from(json.loads(json.dumps(record.as_dict()))) == record


@pytest.mark.parametrize("values", [None, [], {}, {"kind": "gpu"}, {"kind": "file", "x": 1}])
def test_what_is_no_record_is_refused(values):
    with pytest.raises(ConfigError, match="give-back record"):
        record_from(values)


def test_one_failure_does_not_keep_the_others(tmp_path):
    paths = [tmp_path / "absent" / "a", tmp_path / "b"]
    problems = give_back([FoundFile(path=str(path), text="1") for path in paths])
    assert len(problems) == 1
    assert paths[1].read_text() == "1"


def test_watchdog_process_ends_with_its_controller(tmp_path):
    program = (
        "from voltana_ctrl.backends.nvml.watchdog import Watchdog\n"
        "watchdog = Watchdog([])\n"
        "print(watchdog._child.pid, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds_until(lambda: not alive(int(done.stdout)), ACTS_WITHIN_S)


def test_closing_twice_and_arming_nothing_is_fine():
    watchdog = Watchdog([])
    watchdog.arm([])
    watchdog.close()
    watchdog.close()
    assert watchdog.abandon(1.0) == []
    assert not watchdog.running


def test_all_given_back_helper_sees_a_lock(fake):
    fake.gpus[0].cap_w = 400
    assert all_given_back(fake)
    fake.gpus[1].lock_hi_mhz = 900
    assert not all_given_back(fake)


# Nothing of the current folder runs in it


EVIL = "import os; open(os.environ['MARK'], 'a').write(__name__)\n"


def test_nothing_in_the_current_folder_is_run(tmp_path):
    """The watchdog may be root, and the folder where it was started may be anybody's."""
    folder = tmp_path / "anybodys"
    folder.mkdir()
    for name in ("json", "select", "signal", "subprocess", "syslog", "ctypes", "pynvml", "numpy"):
        (folder / f"{name}.py").write_text(EVIL)
    program = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from voltana_ctrl.backends.nvml.giveback import FoundFile\n"
        "from voltana_ctrl.backends.nvml.watchdog import Watchdog\n"
        "sys.path.insert(0, '')\n"  # as `python -c` and `python -m` do
        "watchdog = Watchdog([])\n"
        "watchdog.arm([FoundFile(path='found', text='1')])\n"
        "print(watchdog.abandon(20.0))\n"
    )
    mark = tmp_path / "mark"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=folder,
        env={**os.environ, "MARK": str(mark), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"
    assert not mark.exists(), f"ran {mark.read_text()} from the current folder"
    assert (folder / "found").read_text() == "1"  # a relative record is of the controller's folder


# The record is never lost

DIES_WHILE_ITS_WATCHDOG_IS_REPLACED = """
from voltana_ctrl.backends.nvml.watchdog import Watchdog
start = Watchdog._start
def start_and_die(self):
    {before}
    child = start(self)
    os.kill(os.getpid(), signal.SIGKILL)  # before another word reaches the new one
    return child
Watchdog._start = start_and_die
os.kill(backend._lease.watchdog._child.pid, signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "before",
    [
        "pass",
        pytest.param("self._plan = type(self._plan)()", id="from the lock files alone"),
    ],
)
def test_controller_that_dies_before_its_new_watchdog_is_told(fake, tmp_path, before):
    body = LOCKED + DIES_WHILE_ITS_WATCHDOG_IS_REPLACED.format(before=before)
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        assert host.wait() == -signal.SIGKILL
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S
        seconds_until(lambda: list(tmp_path.glob("*.lock")) == [])


def test_a_record_that_was_not_carried_out_is_not_deleted(fake, tmp_path):
    body = LOCKED + (
        "lock = backend._lease._locks[uuids[0]]\n"
        'os.pwrite(lock.fd, b\'{"give_back": {"kind": "another"}}\\n\', 0)\n'
        "say('spoiled')\n"
        "time.sleep(60)"
    )
    with Host(fake, tmp_path, body) as host:
        watchdog = int(host.expect("set"))
        host.expect("spoiled")
        host.send(signal.SIGKILL)
        assert seconds_until(lambda: as_found(fake)) < ACTS_WITHIN_S  # it was told by the pipe
        seconds_until(lambda: not alive(watchdog))
        kept = [path.read_text() for path in tmp_path.glob("*.lock")]
        assert any("another" in text for text in kept)


# A guard that is frozen or dead


def test_frozen_watchdog_is_replaced_and_meanwhile_nothing_is_lowered(fake, tmp_path):
    with open_backend(fake, tmp_path) as backend:
        backend.apply(decision(900, 900))
        watchdog = backend._lease.watchdog
        frozen = watchdog._child.pid
        os.kill(frozen, signal.SIGSTOP)
        try:
            seconds_until(lambda: not watchdog.answers, 5.0)
            backend.apply(decision(705, 1200))
            if not watchdog.restarts:  # it was not replaced while we looked
                assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [900, 1200]
            seconds_until(lambda: watchdog.restarts == 1 and watchdog.answers, 10.0)
            assert not alive(frozen)  # it cannot thaw and give back under our hands
            backend.apply(decision(705, 1200))
            assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 1200]
        finally:
            if alive(frozen):
                os.kill(frozen, signal.SIGCONT)
    assert as_found(fake)


def test_nothing_is_lowered_while_the_watchdog_is_dead(fake, tmp_path, monkeypatch):
    with open_backend(fake, tmp_path) as backend:
        backend.apply(decision(900, 900, limits=Limits(power_cap_w=[300, 300])))
        watchdog = backend._lease.watchdog
        monkeypatch.setattr(type(watchdog), "answers", property(lambda self: False))
        backend.apply(decision(705, 1410, limits=Limits(power_cap_w=[200, np.inf])))
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [900, 1410]
        assert [gpu.cap_w for gpu in fake.gpus] == [300, 400]
        monkeypatch.undo()
        backend.apply(decision(705, 1410, limits=Limits(power_cap_w=[200, np.inf])))
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 1410]
        assert [gpu.cap_w for gpu in fake.gpus] == [200, 400]
    assert as_found(fake)


@pytest.mark.slow
def test_a_watchdog_that_waits_for_a_cpu_is_not_replaced(tmp_path):
    """Many who want its only CPU, it last of all: late answers, and no churn."""
    watchdog = Watchdog([])
    cpu = min(os.sched_getaffinity(0))
    pid = watchdog._child.pid
    os.sched_setaffinity(pid, {cpu})
    os.setpriority(os.PRIO_PROCESS, pid, 19)
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(12)]
    try:
        for process in busy:
            os.sched_setaffinity(process.pid, {cpu})
        until_s = time.monotonic() + 10.0
        while time.monotonic() < until_s:
            watchdog.seen()
            time.sleep(0.05)
        assert watchdog.restarts == 0
    finally:
        for process in busy:
            process.kill()
            process.wait()
        watchdog.close()
