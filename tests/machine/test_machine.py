"""Joules per token and idle watts, on fake GPUs and engines whose truth is known."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.helpers.fake_gpus import machine, needs_compiler
from voltana_ctrl import ConfigError
from voltana_ctrl.engines import load_endpoints
from voltana_ctrl.machine import draft_fleet, find_engines, fleet_schema, measure
from voltana_ctrl.machine.engines import FoundEngine
from voltana_ctrl.machine.processes import Process, family, listeners

PAGES = {
    "vllm": "vllm:num_requests_running{{model_name=\"m\"}} 1\n"
    "vllm:generation_tokens_total{{model_name=\"m\"}} {tokens}\n"
    "vllm:request_success_total{{model_name=\"m\"}} {done}\n",
    "sglang": "sglang:num_running_reqs 1\nsglang:generation_tokens_total {tokens}\n"
    "sglang:num_requests_total {done}\n",
    "trtllm": "trtllm_num_requests_running 1\ntrtllm_generation_tokens_total {tokens}\n"
    "trtllm_request_success_total {done}\n",
    "dynamo": 'dynamo_component_inflight_requests{{worker_id="77"}} 1\n'
    'vllm:generation_tokens_total{{worker_id="77"}} {tokens}\n'
    'dynamo_component_requests_total{{worker_id="77"}} {done}\n',
}  # fmt: skip


@contextmanager
def engine(kind, model="meta-llama/Llama-3.1-8B-Instruct", mode="null"):
    """An engine's pages, whose tokens grow by 100 and requests by 2 at every look."""
    looks = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = None
            if self.path == ("/prometheus/metrics" if kind == "trtllm" else "/metrics"):
                looks[0] += 1
                body = PAGES[kind].format(tokens=100 * looks[0], done=2 * looks[0])
            elif self.path == "/v1/models":
                body = json.dumps({"data": [{"id": model}]})
            elif self.path == "/get_server_info" and kind == "sglang":
                body = json.dumps({"disaggregation_mode": mode})
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("kind", list(PAGES))
def test_an_engine_is_known_by_its_page(kind):
    with engine(kind) as url:
        (found,) = find_engines([url])
    assert (found.kind, found.model) == (kind, "meta-llama/Llama-3.1-8B-Instruct")
    assert found.told["output_tok"] == 100.0 or kind == "trtllm"
    assert found.process.pid == os.getpid()
    assert found.worker_id == (77 if kind == "dynamo" else None)


def test_the_role_of_an_engine_is_what_it_says_of_itself():
    with engine("sglang", mode="prefill") as url:
        assert find_engines([url])[0].role == "prefill"
    for command, role in (
        (("vllm", "serve", "m"), "colocated"),
        (("vllm", "serve", "--kv-transfer-config", '{"kv_role":"kv_producer"}'), "prefill"),
        (("vllm", "--kv-transfer-config={\"kv_role\": \"kv_consumer\"}"), "decode"),
    ):  # fmt: skip
        from voltana_ctrl.machine.engines import _role

        process = Process(pid=1, command=command, environment={})
        assert _role("vllm", process, {}) == role


@needs_compiler
def test_energy_is_divided_by_the_tokens_that_were_made(tmp_path):
    with machine(tmp_path) as fake, engine("vllm") as url:
        engines = find_engines([url])
        use = measure(engines, duration_s=1.0, library=fake.library)
    assert [gpu.uuid for gpu in use.gpus] == list(fake.uuids)
    (one,) = use.engines
    assert (one.output_tok, one.finished_req) == (100.0, 2.0)
    # The only engine is taken to use every GPU, and that is said.
    assert one.energy_j == pytest.approx(sum(gpu.energy_j for gpu in use.gpus))
    assert one.token_j == pytest.approx(one.energy_j / 100.0)
    assert any("only engine" in hint for hint in one.hints)
    assert "J a token" in use.text()
    told = json.loads(use.json())
    assert told["schema"] == "voltana-ctrl/meter/1"
    assert told["engines"][0]["token_j"] == one.token_j


@needs_compiler
def test_a_gpu_at_rest_is_told_with_what_it_costs_and_what_would_help(tmp_path):
    with machine(tmp_path, gpus=1) as fake:
        gpu = fake.gpus[0]
        gpu.util_frac = 0.0
        use = measure([], duration_s=0.3, library=fake.library).gpus[0]
    assert use.idle_frac == 1.0
    assert use.idle_w > 0.0
    assert use.year_kwh == pytest.approx(use.idle_w * 8.766)


def test_hints_name_what_is_left_on():
    from voltana_ctrl.machine.meter import _engine_hints, _Gpu

    class Reader:
        uuid, name, persistent = "GPU-1", "A100", False
        covers = ("MIG is on: ...; those of all its tenants",)
        clocks_mhz, power_cap_w, power_cap_range_w = (210, 1410), 300.0, (100.0, 400.0)
        power_profiles, busy_frac = ("MAX_Q",), 0.0

        def read(self):
            from voltana_ctrl.backends.meter import GpuReading

            return GpuReading(clock_mhz=1410.0, power_w=80.0, counter_j=None)

    gpu = _Gpu(Reader())
    gpu.sample(0.0)
    gpu.sample(2.0)
    use = gpu.use()
    assert use.energy_j == 160.0
    said = " ".join(use.hints)
    for word in ("CUDA_DISABLE_PERF_BOOST=1", "persistence", "300 W", "MAX_Q", "MIG"):
        assert word in said
    process = Process(pid=1, command=("python", "-m", "sglang.launch_server"), environment={})
    idle = FoundEngine(url="http://x:1", kind="sglang", told={}, process=process)
    assert any("--sleep-on-idle" in hint for hint in _engine_hints(idle))


def test_an_address_without_an_engine_is_refused():
    with pytest.raises(ConfigError, match="no page of vllm"):
        find_engines(["http://127.0.0.1:9"])
    with pytest.raises(ConfigError, match="expected http://"):
        find_engines(["127.0.0.1:8000"])


def test_listeners_know_ports_and_who_holds_them():
    with engine("vllm") as url:
        port = int(url.rpartition(":")[2])
        assert listeners()[port].pid == os.getpid()
    assert os.getpid() in family(os.getppid())


def test_the_fleet_file_is_one_that_commands_read(tmp_path):
    engines = [
        FoundEngine(url="http://127.0.0.1:8000", kind="vllm", told={}, role="prefill",
                    model="meta-llama/Llama-3.1-8B", process=Process.of(os.getpid())),
        FoundEngine(url="http://127.0.0.1:8001", kind="vllm", told={}, role="decode",
                    model="meta-llama/Llama-3.1-8B"),
    ]  # fmt: skip
    boards = {"GPU-1": "NVIDIA A100-SXM4-80GB", "GPU-2": "NVIDIA H100 80GB HBM3"}
    draft = draft_fleet(engines, boards, {os.getpid(): ["GPU-1"]}, node="n0")
    path = tmp_path / "fleet.toml"
    path.write_text(draft.text)
    fleet, endpoints = load_endpoints(path)
    assert fleet.ids == ("prefill-0", "decode-0")
    assert fleet.instances[0].profile.name == "a100-sxm-80gb/llama-3.1-8b"
    assert endpoints[0].gpus == ("GPU-1",)
    assert endpoints[1].gpus == ()
    # What could not be found is said, and stands in the file.
    assert any("decode-0: its GPUs could not be told" in doubt for doubt in draft.doubts)
    assert "# its GPUs could not be told" in draft.text


def test_a_model_that_no_profile_is_of_is_not_passed_off_as_one():
    one = FoundEngine(url="http://x:1", kind="vllm", told={}, role="colocated", model="own/model")
    draft = draft_fleet([one], {"GPU-1": "NVIDIA L4"}, {}, node="n0")
    assert any("NVIDIA L4 with model own/model" in doubt for doubt in draft.doubts)


def test_the_schema_knows_what_the_reader_knows(tmp_path):
    """A key that the schema has is read; one that it has not is refused."""
    instance = fleet_schema()["properties"]["instance"]["items"]
    engine_keys = instance["properties"]["engine"]["properties"]
    assert {"role", "profile", "gpus", "engine"} <= set(instance["properties"])
    assert {"kind", "url", "gpus", "worker_id"} <= set(engine_keys)
    path = tmp_path / "fleet.toml"
    path.write_text('[[instance]]\nrole = "decode"\nnonsense = 1\n')
    with pytest.raises(ConfigError) as refused:
        load_endpoints(path)
    assert all(key in str(refused.value) for key in instance["properties"])


def test_where_nothing_is_found_that_is_said_at_once():
    draft = draft_fleet([], {}, {}, node="n0")
    assert len(draft.doubts) == 1
    assert "no engine was found" in draft.doubts[0]

    def never(_s):
        raise AssertionError("there is nothing to wait for")

    use = measure([], duration_s=3600.0, library="no-such-library.so", sleep=never)
    assert use.is_empty
    assert "next: " in use.text()


def test_cpus_that_an_engine_alone_is_bound_to_are_for_a_person_to_add(tmp_path):
    def engine(port, cpus):
        process = Process(pid=port, command=("vllm",), environment={}, cpus=cpus)
        return FoundEngine(url=f"http://127.0.0.1:{port}", kind="vllm", told={}, process=process)

    engines = [engine(1, (0, 1, 2, 3, 8)), engine(2, (4, 5)), engine(3, (5, 6)), engine(4, ())]
    draft = draft_fleet(engines, {}, {}, node="n0")
    note = r'# .*see that nothing else runs on .*add to engine: (cpus = "0-3,8")\n'
    (told,) = re.findall(note, draft.text)
    assert draft.text.count("cpus = ") == 1

    def cpus(text):
        (tmp_path / "fleet.toml").write_text(text)
        return [one.cpus for one in load_endpoints(tmp_path / "fleet.toml")[1]]

    # As drafted nothing is claimed of any CPU; what the note says to add is read as it stands.
    assert cpus(draft.text) == [(), (), (), ()]
    added = draft.text.replace(" }\n", f", {told} }}\n", 1)
    assert cpus(added) == [(0, 1, 2, 3, 8), (), (), ()]


def test_a_process_that_is_bound_to_some_cpus_is_told_from_one_that_is_not():
    ours = sorted(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{ours[0]}]); print(flush=True); input()"
    bound = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        bound.stdout.readline()
        assert Process.of(bound.pid).cpus == ((ours[0],) if len(ours) > 1 else ())
    finally:
        bound.communicate(b"\n")
    assert Process.of(os.getpid()).cpus == ()
