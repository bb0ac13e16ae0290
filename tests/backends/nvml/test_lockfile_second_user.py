"""Another user of the machine can block nothing of ours, read no secret, and make nothing run."""

import contextlib
import json
import signal
import time

import pytest

from tests.backends.nvml.test_setter import Running
from tests.helpers.fake_gpus import Host, all_given_back, machine, needs_compiler, seconds_until
from tests.helpers.second_user import (
    as_second_user,
    needs_second_user,
    open_to_look_at,
    start_as_second_user,
)
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR, LockFile, restore_abandoned
from voltana_ctrl.backends.nvml.setter_client import SetterClient
from voltana_ctrl.engines.limits import read_limits, write_limits
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.files import replace_file
from voltana_ctrl.types import Order

pytestmark = needs_compiler

TRY_EVERYTHING = """
folder = sys.argv[1]
done = []
for path in glob.glob(folder + "/*"):
    for what, how in {
        "read": lambda: open(path, "rb").read(),
        "write": lambda: open(path, "r+b"),
        "lock": lambda: fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB),
        "remove": lambda: os.unlink(path),
        "rename": lambda: os.rename(path, path + "-mine"),
        "link": lambda: os.link(path, folder + "/second"),
    }.items():
        try:
            how()
        except OSError:
            continue
        done.append((what, os.path.basename(path)))
for name in ("voltana-ctrl-GPU-9.lock", "json.py", "setter.sock"):
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY))
        done.append(("put", name))
    except OSError:
        pass
print(json.dumps(done))
"""


@pytest.fixture(autouse=True)
def second_user(tmp_path):
    needs_second_user()
    open_to_look_at(tmp_path)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.backends.nvml.setter.end_on_sigterm", contextlib.nullcontext)
    with machine(tmp_path) as fake:
        yield fake


def test_nothing_in_the_folder_of_lock_files_is_theirs_to_touch(tmp_path):
    folder = tmp_path / "locks"
    held = LockFile("GPU-0", folder=folder)
    done = as_second_user(TRY_EVERYTHING, folder)
    assert done.stdout.strip() == "[]", done.stderr
    # What was locked was not kept from its owner either: it goes, and comes again.
    held.release()
    LockFile("GPU-0", folder=folder, wait_s=0.0).release()


def test_the_folder_is_not_one_that_they_can_make_first():
    # Under /run only root makes folders; /run/lock and /tmp are open to all.
    assert LOCK_DIR.parts[:2] == ("/", "run")
    assert LOCK_DIR.parts[2] == "voltana-ctrl"
    program = f"os.makedirs({str(LOCK_DIR.parent / 'theirs')!r})"
    assert "PermissionError" in as_second_user(program).stderr


def test_a_lock_folder_that_they_made_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    folder = tmp_path / "open" / "locks"
    text = '{"give_back": {"kind": "file", "path": "%s", "text": "theirs"}}'
    victim = tmp_path / "victim"
    victim.write_text("ours")
    program = (
        "os.mkdir(sys.argv[1], 0o755)\n"
        "open(sys.argv[1] + '/voltana-ctrl-GPU-0.lock', 'w').write(sys.argv[2])\n"
    )
    assert as_second_user(program, folder, text % victim).returncode == 0
    with pytest.raises(BackendError, match="others can write it"):
        LockFile("GPU-0", folder=folder)
    given_back, problems = restore_abandoned(folder)
    assert given_back == []
    assert len(problems) == 1
    assert victim.read_text() == "ours"


@pytest.mark.parametrize("lists", [True, False])
def test_the_setter_serves_its_own_while_they_knock(fake, tmp_path, monkeypatch, lists):
    if not lists:
        # On file systems without access lists anybody may knock.
        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("voltana_ctrl.backends.nvml.setter.os.setxattr", refuse)
    program = """
print("knocking", flush=True)
while True:
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(sys.argv[1])
        except OSError:
            pass
"""
    with Running(fake, tmp_path) as setter:
        knocking = [start_as_second_user(program, setter.path) for _ in range(2)]
        try:
            for one in knocking:
                assert one.stdout.readline() == "knocking\n"
            waits_s = []
            for k in range(20):
                begin_s = time.monotonic()
                client = SetterClient(setter.path)
                client.gpu(fake.uuids[0]).lock_clock(300 + 15 * k, 1200)
                client.close()
                waits_s.append(time.monotonic() - begin_s)
                time.sleep(0.01)  # it sets so many a second
        finally:
            for one in knocking:
                one.kill()
                one.communicate()
        assert sorted(waits_s)[10] < 1.0
    assert all_given_back(fake)


def test_a_setter_of_theirs_is_not_asked(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    path = tmp_path / "open" / "setter.sock"
    program = """
with socket.socket(socket.AF_UNIX) as one:
    one.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o666)
    one.listen()
    print("serving", flush=True)
    one.accept()[0].recv(100)
"""
    theirs = start_as_second_user(program, path)
    try:
        assert theirs.stdout.readline() == "serving\n"
        with pytest.raises(BackendError, match="served by another user"):
            SetterClient(path)
    finally:
        theirs.kill()
        theirs.communicate()


def test_orders_and_state_of_theirs_are_not_believed(tmp_path):
    folder = tmp_path / "orders"
    write_limits(folder / "d0.json", Order(floor_mhz=600.0, ceiling_mhz=900.0))
    replace_file(folder / "state", b"learnt", mode=0o600)
    done = as_second_user(TRY_EVERYTHING, folder)
    # The engine reads its order, whoever it runs as; nothing else can be done.
    assert sorted(json.loads(done.stdout)) == [["lock", "d0.json"], ["read", "d0.json"]]
    assert read_limits(folder / "d0.json").order.ceiling_mhz == 900.0
    program = "open(sys.argv[1], 'w').write('{}')"
    folder.chmod(0o777)
    assert as_second_user(program, folder / "d1.json").returncode == 0
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="others can write it"):
        read_limits(folder / "d1.json")


def test_what_they_left_in_the_working_directory_does_not_run(fake, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    program = "\n".join(
        f"open(sys.argv[1] + '/{name}.py', 'w').write('open(\"{theirs}/ran\", \"w\")')"
        for name in ("json", "select", "signal", "syslog", "pathlib", "pynvml", "voltana_ctrl")
    )
    assert as_second_user(program, theirs).returncode == 0
    body = f"""
import pynvml  # this program's own path is its own affair; that of our children is ours
os.chdir({str(theirs)!r})
sys.path.insert(0, "")
backend = open_backend()
backend.apply(decision(705, 900))
say("set")
time.sleep(60)
"""
    with Host(fake, tmp_path, body) as host:
        host.expect("set")
        host.send(signal.SIGKILL)
        host.wait()
        seconds_until(lambda: all_given_back(fake))
    assert not (theirs / "ran").exists()


def test_they_cannot_signal_a_watchdog_or_read_its_plan(fake, tmp_path):
    body = """
backend = open_backend()
backend.apply(decision(705, 900))
say(f"set {backend._lease.watchdog._child.pid}")
time.sleep(60)
"""
    program = """
pid = int(sys.argv[1])
for how in (
    lambda: os.kill(pid, signal.SIGSTOP),
    lambda: open(f"/proc/{pid}/environ", "rb").read(),
    lambda: os.listdir(f"/proc/{pid}/fd"),
    lambda: open(f"/proc/{pid}/mem", "r+b"),
):
    try:
        how()
        print("done")
    except OSError:
        pass
"""
    with Host(fake, tmp_path, body) as host:
        watchdog = host.expect("set")
        assert as_second_user(program, watchdog).stdout == ""
