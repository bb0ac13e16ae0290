"""What another user of the machine can do to what runs: read numbers, and nothing else."""

import json
import time

import pytest

pytest.importorskip("starlette", reason="needs the server extra")
pytest.importorskip("uvicorn", reason="needs the server extra")

from tests.helpers.fake_gpus import fleet
from tests.helpers.second_user import (
    as_second_user,
    needs_second_user,
    open_to_look_at,
    start_as_second_user,
)
from tests.live.test_hub import TOKEN, linked
from tests.live.test_ticklog import record
from voltana_ctrl import Decision, FleetState, Observation
from voltana_ctrl.experiment.tables import write_json
from voltana_ctrl.kernels import compiled
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.hub_app import HubServer, hub_app
from voltana_ctrl.live.ticklog import TickLog

TOUCH = """
done = []
for path in glob.glob(sys.argv[1] + "/*"):
    for what, how in {
        "write": lambda: open(path, "r+b"),
        "remove": lambda: os.unlink(path),
        "rename": lambda: os.rename(path, path + "-mine"),
        "link": lambda: os.link(path, sys.argv[1] + "/second"),
    }.items():
        try:
            how()
        except OSError:
            continue
        done.append((what, os.path.basename(path)))
try:
    os.mkdir(os.path.join(sys.argv[1], "theirs"))
    done.append(("put", "theirs"))
except OSError:
    pass
print(json.dumps(done))
"""
#: Connects to a controller as often as it can, says half of a head, and keeps it all open.
CROWD = """
held = []
print("there", flush=True)
while True:
    try:
        one = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1.0)
        one.sendall(b"POST /v1/report HTTP/1.1\\r\\nhost: x\\r\\nx: ")
        held.append(one)
    except OSError:
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def second_user(tmp_path):
    needs_second_user()
    open_to_look_at(tmp_path)


def test_logs_and_results_are_ours_to_change_alone(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o755)
    with TickLog(folder / "ticks.jsonl", fleet()) as log:
        log.on_tick(record(0))
        write_json({"runs": []}, folder / "out.json")
        assert json.loads(as_second_user(TOUCH, folder).stdout) == []


def test_a_cache_of_compiled_code_that_they_made_is_not_run(tmp_path, monkeypatch):
    theirs = tmp_path / "tmp"
    theirs.mkdir()
    theirs.chmod(0o1777)
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(theirs))
    monkeypatch.setattr(compiled, "_SHARED_MEMORY", tmp_path / "nowhere")
    (ours,) = compiled._private_folders()
    assert json.loads(as_second_user(TOUCH, theirs).stdout) == [["put", "theirs"]]
    ours.rmdir()
    program = "os.mkdir(sys.argv[1], 0o700)"
    assert as_second_user(program, ours).returncode == 0
    assert list(compiled._private_folders()) == []


def test_a_controller_serves_its_nodes_while_they_crowd_it():
    hub = HubBackend(fleet())
    with HubServer(hub_app(hub, TOKEN)) as server:
        theirs = start_as_second_user(CROWD, server.port)
        try:
            assert theirs.stdout.readline() == "there\n"
            time.sleep(2.0)
            with linked(f"http://127.0.0.1:{server.port}") as link:
                until_s = time.monotonic() + 30.0
                while link.orders() is None and time.monotonic() < until_s:
                    hub.apply(Decision.highest(fleet()))
                    link.tell(Observation(state=FleetState.idle(2, t_s=time.monotonic())))
                    time.sleep(0.1)
                assert link.orders() is not None
        finally:
            theirs.kill()
            theirs.communicate()
        program = """
import urllib.request, urllib.error
for token in ("", "Bearer guess"):
    asked = urllib.request.Request(
        f"http://127.0.0.1:{sys.argv[1]}/v1/report", data=b"{}", headers={"authorization": token}
    )
    try:
        urllib.request.urlopen(asked, timeout=10.0)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
        assert set(as_second_user(program, server.port).stdout.split()) <= {"401", "403", "404"}
