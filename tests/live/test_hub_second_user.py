"""What another user of the machine can do to what runs: read numbers, and nothing else."""

import contextlib
import json
import os
import resource
import socket
import statistics
import threading
import time

import httpx
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
from voltana_ctrl import Decision, FleetSpec, FleetState, Observation
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.fpm.publisher import FpmPublisher
from voltana_ctrl.engines.fpm.reader import FpmReader
from voltana_ctrl.experiment.tables import write_json
from voltana_ctrl.kernels import compiled
from voltana_ctrl.live.exporter import Exporter
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.hub_app import hub_app
from voltana_ctrl.live.ticklog import TickLog
from voltana_ctrl.serving.server import ServerThread

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
#: Connects to a server of ours as often as it can, says half of a head, and keeps it all open.
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
    with ServerThread(hub_app(hub, TOKEN), what="controller") as server:
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
            assert theirs.poll() is None
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


def test_metrics_are_scraped_while_they_crowd_them():
    exporter = Exporter(fleet())
    exporter.on_tick(record(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    theirs = None
    try:
        port = exporter.serve(0)
        theirs = start_as_second_user(CROWD, port)
        assert theirs.stdout.readline() == "there\n"
        time.sleep(2.0)
        threads = threading.active_count()
        until_s, answer = time.monotonic() + 30.0, None
        while answer is None and time.monotonic() < until_s:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5.0)
        assert theirs.poll() is None
        assert answer is not None
        assert answer.status_code == 200
        assert b"voltana_ctrl_ticks_total 1.0" in answer.content
        # An agent holds locks, and must be able to open files.
        with open("/dev/null"):
            assert len(os.listdir("/proc/self/fd")) < 224
        assert threading.active_count() == threads
    finally:
        exporter.close()
        if theirs is not None:
            theirs.kill()
            theirs.communicate()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


#: Takes the place of an engine that has not started, and sends what no engine would.
IMPOSTOR = """
import random
random.seed(1)
publisher = zmq.Context().socket(zmq.PUB)
publisher.setsockopt(zmq.SNDHWM, 1000)
publisher.bind("tcp://127.0.0.1:" + sys.argv[2])
print("there", flush=True)
for cycle in range(1_000_000):
    for _ in range(200):
        length = random.randrange(200)
        publisher.send_multipart([b"", random.randbytes(8), random.randbytes(length)])
        publisher.send_multipart([random.randbytes(9) for _ in range(random.randrange(1, 40))])
    if cycle % 20 == 0:
        publisher.send(b"x" * (2 << 20))  # which ends the connection of whoever listens
    time.sleep(0.01)
"""
#: Subscribes to an engine as often as it can, and reads nothing.
DEAF = """
context = zmq.Context()
context.set(zmq.MAX_SOCKETS, 4000)
held = []
for _ in range(200):
    one = context.socket(zmq.SUB)
    one.setsockopt(zmq.RCVHWM, 1)
    one.setsockopt(zmq.SUBSCRIBE, b"")
    one.connect(sys.argv[2])
    held.append(one)
raw = [socket.create_connection(("127.0.0.1", int(sys.argv[2].rpartition(":")[2])))
       for _ in range(200)]
print("there", flush=True)
time.sleep(600.0)
"""


def test_an_impostor_of_an_engine_takes_nothing_but_its_own_readings(tmp_path):
    instances = fleet()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        theirs_port = probe.getsockname()[1]
    ours = FpmPublisher("tcp://127.0.0.1:*")
    endpoints = [
        Endpoint(instance=name, kind="vllm", url=f"http://127.0.0.1:{k + 1}", fpm=address)
        for k, (name, address) in enumerate(
            zip(instances.ids, (ours.address, f"tcp://127.0.0.1:{theirs_port}"), strict=False)
        )
    ]
    theirs = start_as_second_user(IMPOSTOR, "zmq", theirs_port)
    reader = FpmReader(instances, endpoints)
    try:
        assert theirs.stdout.readline() == "there\n"
        told, until_s = [], time.monotonic() + 30.0
        while (len(told) < 20 or reader.counts.bad < 100) and time.monotonic() < until_s:
            ours.send(ForwardPass(wall_s=0.02, decode_req=3.0))
            time.sleep(0.05)
            _, iterations = reader.read(time.monotonic())
            told += iterations.instance.tolist()
        assert len(told) >= 20
        assert set(told) == {0}
        assert reader.counts.bad >= 100
    finally:
        theirs.kill()
        theirs.communicate()
        reader.close()
        ours.close()


def test_an_engine_is_not_held_up_by_subscribers_that_do_not_read():
    publisher = FpmPublisher("tcp://127.0.0.1:*")
    theirs = start_as_second_user(DEAF, "zmq", publisher.address)
    try:
        assert theirs.stdout.readline() == "there\n", theirs.stderr.read()
        reader = FpmReader(
            FleetSpec.parse("1C", fleet().instances[0].profile),
            [Endpoint(instance="colocated-0", kind="vllm", url="http://x", fpm=publisher.address)],
        )
        took_s, told, until_s = [], 0, time.monotonic() + 30.0
        while told < 200 and time.monotonic() < until_s:
            begin_s = time.thread_time()
            publisher.send(ForwardPass(wall_s=0.02, decode_req=3.0))
            took_s.append(time.thread_time() - begin_s)
            time.sleep(0.002)
            told += len(reader.read(time.monotonic())[1])
        reader.close()
        assert told >= 200
        assert statistics.median(took_s) < 0.002
    finally:
        theirs.kill()
        theirs.communicate()
        publisher.close()
