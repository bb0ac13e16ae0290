"""Engines in Kubernetes pods: where they listen, which GPUs they were given, what changes."""

import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import tomllib

import pytest

from tests.machine.test_machine import engine
from voltana_ctrl import BackendError, ConfigError
from voltana_ctrl.cli import init as init_command
from voltana_ctrl.engines import load_endpoints
from voltana_ctrl.machine import draft_fleet, find_engines
from voltana_ctrl.machine import engines as engines_module
from voltana_ctrl.machine.engines import _fpm
from voltana_ctrl.machine.pods import pod_gpus, read_pods
from voltana_ctrl.machine.processes import Process

UIDS = ("0f1e2d3c-0001-4a4b-8c8d-0123456789ab", "0f1e2d3c-0002-4a4b-8c8d-0123456789ab")
BOARDS = {"GPU-1": "NVIDIA A100-SXM4-80GB", "GPU-2": "NVIDIA A100-SXM4-80GB"}
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def pod(uid, command, port, *, name="vllm-0", image="own/serving:1", ip="127.0.0.1", **more):
    """As kubectl writes one; `more` belongs to its container."""
    return {
        "metadata": {"name": name, "namespace": "llm", "uid": uid},
        "spec": {
            "nodeName": "node-7",
            "containers": [
                {"name": "sidecar", "image": "envoy", "ports": [{"containerPort": 9}]},
                {"name": "main", "image": image, "command": command,
                 "ports": [{"containerPort": port, "protocol": "TCP"}], **more},
            ],
        },
        "status": {"phase": "Running", "podIP": ip},
    }  # fmt: skip


def record(*entries):
    """The kubelet's, with other data that it keeps there."""
    return json.dumps({
        "Data": {
            "PodDeviceEntries": [
                {"PodUID": uid, "ContainerName": "main", "ResourceName": resource,
                 "DeviceIDs": devices, "AllocResp": "Cg=="}
                for uid, resource, devices in entries
            ],
            "RegisteredDevices": {"nvidia.com/gpu": ["GPU-1", "GPU-2"]},
        },
        "Checksum": 1,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "gpus"),
    [
        ({"0": ["GPU-1"], "1": ["GPU-2"]}, ("GPU-1", "GPU-2")),  # by NUMA node
        ({"-1": ["GPU-1"]}, ("GPU-1",)),
        (["GPU-1", "GPU-2"], ("GPU-1", "GPU-2")),  # before Kubernetes 1.20
        (["GPU-1::0", "GPU-1::3"], ("GPU-1",)),  # shared in turns
        (["MIG-1"], ("MIG-1",)),
        (["0", "1"], ()),  # by number: not told
    ],
)
def test_the_record_of_the_kubelet_tells_the_gpus_of_a_pod(tmp_path, devices, gpus):
    path = tmp_path / "kubelet_internal_checkpoint"
    path.write_text(record((UIDS[0], "nvidia.com/gpu", devices), (UIDS[1], "own/nic", ["x"])))
    assert pod_gpus(path) == {UIDS[0]: gpus}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"Data": {"PodDeviceEntries": [1]}}', '{"v": 2}'])
def test_a_record_of_another_form_tells_nothing(tmp_path, text):
    path = tmp_path / "record"
    path.write_text(text)
    assert pod_gpus(path) == {}
    assert pod_gpus(tmp_path / "none") == {}


def test_pods_tell_ports_command_lines_and_node(tmp_path):
    shell = ["bash", "-lc", "vllm serve m --port 8123 --kv-transfer-config '{\"kv_role\": "
             "\"kv_producer\"}'"]  # fmt: skip
    wants = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    ended = pod("u5", ["vllm"], 8005)
    ended["status"]["phase"] = "Succeeded"
    items = [
        pod(UIDS[0], shell, 8000),
        pod(UIDS[1], ["--model", "m"], 8001, image="vllm/vllm-openai:v0.9", ip="fd00::1",
            env=[{"name": "VOLTANA_CTRL_FPM", "value": "tcp://*:1"},
                 {"name": "POD", "valueFrom": {}}]),
        pod("u3", ["python", "own.py"], 8003, **wants),
        pod("u4", ["nginx"], 8004),
        ended,
    ]  # fmt: skip
    path = tmp_path / "pods.json"
    path.write_text(json.dumps({"kind": "List", "items": items}))
    found = read_pods(str(path))
    assert list(found) == [
        "http://127.0.0.1:8000", "http://127.0.0.1:8123", "http://[fd00::1]:8001",
        "http://127.0.0.1:8003",
    ]  # fmt: skip
    first = found["http://127.0.0.1:8123"]
    assert (first.pod, first.pod_name, first.node) == (UIDS[0], "llm/vllm-0", "node-7")
    assert "kv_producer" in first.option("--kv-transfer-config")
    assert found["http://[fd00::1]:8001"].environment == {"VOLTANA_CTRL_FPM": "tcp://*:1"}


@pytest.mark.parametrize("text", ["[1]", '{"items": [{"metadata": {}}]}', "kind: List"])
def test_what_is_no_list_of_pods_is_refused(tmp_path, text):
    path = tmp_path / "pods.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected what kubectl get pods -o json writes"):
        read_pods(str(path))


def test_the_fleet_file_has_roles_gpus_and_node_of_pods(tmp_path, monkeypatch):
    devices = tmp_path / "record"
    devices.write_text(record(*((uid, "nvidia.com/gpu", {"0": [gpu]})
                                for uid, gpu in zip(UIDS, BOARDS, strict=True))))  # fmt: skip
    monkeypatch.setattr(engines_module, "pod_gpus", lambda: pod_gpus(devices))
    monkeypatch.setattr(engines_module, "listeners", dict)
    with engine("vllm") as one, engine("vllm") as two:
        items = [
            pod(uid, ["vllm", "serve", "m", "--kv-transfer-config", f'{{"kv_role":"{role}"}}'],
                int(url.rpartition(":")[2]),
                env=[{"name": "VOLTANA_CTRL_FPM", "value": "tcp://*:20380"},
                     {"name": "VOLTANA_CTRL_MODE", "value": "act"},
                     {"name": "VOLTANA_CTRL_LIMITS", "value": f"/run/{role}"}])
            for uid, url, role in zip(UIDS, (one, two), ("kv_producer", "kv_consumer"), strict=True)
        ]  # fmt: skip
        (tmp_path / "pods.json").write_text(json.dumps({"items": items}))
        pods = read_pods(str(tmp_path / "pods.json"))
        found = find_engines(pods=pods)
    draft = draft_fleet(found, BOARDS, {}, node="here")
    (tmp_path / "fleet.toml").write_text(draft.text)
    fleet, endpoints = load_endpoints(tmp_path / "fleet.toml")
    assert sorted(fleet.ids) == ["decode-0", "prefill-0"]
    assert {one.node for one in fleet.instances} == {"node-7"}
    assert sorted(end.gpus for end in endpoints) == [("GPU-1",), ("GPU-2",)]
    assert {end.fpm for end in endpoints} == {"tcp://127.0.0.1:20380"}
    assert {end.limits for end in endpoints} == {"/run/kv_producer", "/run/kv_consumer"}
    assert draft.text.count("# pod llm/vllm-0") == 2
    # Without the record it is said what to mount.
    monkeypatch.setattr(engines_module, "pod_gpus", dict)
    with engine("vllm") as one:
        port = int(one.rpartition(":")[2])
        (tmp_path / "pods.json").write_text(json.dumps(pod(UIDS[0], ["vllm", "serve"], port)))
        found = find_engines(pods=read_pods(str(tmp_path / "pods.json")))
    draft = draft_fleet([*found, *found], BOARDS, {}, node="here")
    assert any("/var/lib/kubelet/device-plugins" in doubt for doubt in draft.doubts)


def test_the_api_server_is_asked_with_the_account_of_the_pod(tmp_path, monkeypatch):
    key, cert = tmp_path / "key.pem", tmp_path / "ca.crt"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key,
         "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    (tmp_path / "token").write_text("secret\n")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["authorization"]))
            allowed = self.headers["authorization"] == "Bearer secret"
            self.send_response(200 if allowed else 403)
            self.end_headers()
            self.wfile.write(json.dumps({"items": [pod(UIDS[0], ["vllm"], 8000)]}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
        monkeypatch.setenv("NODE_NAME", "node-7")
        assert list(read_pods("cluster", account=tmp_path)) == ["http://127.0.0.1:8000"]
        (tmp_path / "token").write_text("wrong")
        with pytest.raises(BackendError, match="API server does not answer: HTTP Error 403"):
            read_pods("cluster", account=tmp_path)
        server.shutdown()
        thread.join()
    assert asked[0] == ("/api/v1/pods?fieldSelector=spec.nodeName=node-7", "Bearer secret")
    with pytest.raises(BackendError, match="API server"):
        read_pods("cluster", account=tmp_path / "none")


def test_addresses_of_forward_pass_metrics_are_found(tmp_path):
    folder = tmp_path / "v1" / "event_channels"
    folder.mkdir(parents=True)
    for port in (43441, 43442):
        (folder / str(port)).write_text(json.dumps({
            "topic": "forward-pass-metrics",
            "transport": {"kind": "Zmq", "config": {"endpoint": f"tcp://10.0.0.2:{port}"}},
        }))  # fmt: skip

    def of(kind, *command, **environment):
        return _fpm("http://10.0.0.1:8000", kind, Process(
            pid=None, command=command, environment=environment))  # fmt: skip

    assert of("dynamo", DYN_FILE_KV=str(tmp_path)) == "tcp://10.0.0.2:43441,tcp://10.0.0.2:43442"
    assert of("dynamo") is None
    assert of("vllm", VOLTANA_CTRL_FPM="tcp://0.0.0.0:20380") == "tcp://10.0.0.1:20380"
    assert of("vllm", VOLTANA_CTRL_FPM="tcp://10.9.9.9:1") == "tcp://10.9.9.9:1"
    scheduler = "dynamo.vllm.instrumented_scheduler.InstrumentedScheduler"
    assert of("vllm", "vllm", "--scheduler-cls", scheduler) == "tcp://10.0.0.1:20380"
    assert of("vllm", "vllm") is None


def test_a_file_that_is_kept_fresh_outlives_a_restart(root, tmp_path):
    """An engine that is gone keeps its place; another worker id is written, and no more."""
    out = tmp_path / "fleet.toml"
    page = ('dynamo_component_inflight_requests{worker_id="%d"} 1\n'
            'dynamo_component_requests_total{worker_id="%d"} 2\n')  # fmt: skip

    class Handler(http.server.BaseHTTPRequestHandler):
        worker = 77

        def do_GET(self):
            known = self.path == "/metrics" and self.worker
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((page % (self.worker, self.worker)).encode() if known else b"")

        def log_message(self, *_):
            pass

    def worker():
        return tomllib.loads(out.read_text())["instance"][1]["engine"]["worker_id"]

    def until(condition):
        end_s = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < end_s
            assert process.poll() is None
            time.sleep(0.02)

    with (
        engine("vllm") as first,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "voltana_ctrl.cli", "init", "--url", first, "--url", url,
             "--out", str(out), "--keep-fresh", "0.1"],
            env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            until(out.exists)
            before = out.read_text()
            assert worker() == 77
            Handler.worker = None
            for line in process.stderr:
                if line.startswith("kept as it was"):
                    break
            assert out.read_text() == before
            Handler.worker = 78
            until(lambda: worker() == 78)
            assert out.read_text() == before.replace("= 77", "= 78")
        finally:
            process.kill()
            process.communicate()
            server.shutdown()


def test_standard_input_cannot_be_kept_fresh(tmp_path):
    with pytest.raises(ConfigError, match="standard input is read once"):
        init_command.init(out=tmp_path / "f.toml", pods="-", keep_fresh=1.0)
