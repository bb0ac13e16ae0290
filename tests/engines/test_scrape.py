"""Metrics pages of each engine, as documented, and their background reader."""

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_pages import Pages
from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.backends.meter import GpuReading
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.names import TABLES
from voltana_ctrl.engines.page import BadPage, read_dcgm_page, read_engine_page
from voltana_ctrl.engines.scrape import Scraper

FLEET = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
DECODE = 1

VLLM = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 5.0
vllm:num_requests_running{engine="1",model_name="tiny"} 7.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="1000"} 1.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 3000.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 900@
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 4.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 6.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="tiny"} 0.0
"""

# A small batch, and nothing moves.
STILL = (
    VLLM.replace("@", ".0")
    .replace('engine="0",model_name="tiny"} 0.5', 'engine="0",model_name="tiny"} 0.002')
    .replace('engine="1",model_name="tiny"} 0.25', 'engine="1",model_name="tiny"} 0.002')
    .replace('engine="0",model_name="tiny"} 2.0', 'engine="0",model_name="tiny"} 0.0')
)

SGLANG = """
sglang:num_running_reqs{engine_type="decode",model_name="tiny",tp_rank="0",pp_rank="0"} 8.0
sglang:num_running_reqs{engine_type="decode",model_name="tiny",tp_rank="1",pp_rank="0"} 8.0
sglang:num_queue_reqs{model_name="tiny",tp_rank="0"} 3.0
sglang:num_decode_prealloc_queue_reqs{model_name="tiny",tp_rank="0"} 1.0
sglang:num_decode_transfer_queue_reqs{model_name="tiny",tp_rank="0"} 2.0
sglang:num_used_tokens{model_name="tiny",tp_rank="0"} 4100.0
sglang:token_usage{model_name="tiny",tp_rank="0"} 0.41
sglang:max_total_num_tokens{model_name="tiny",tp_rank="0"} 10000.0
# TYPE sglang:num_requests_total counter
sglang:num_requests_total{is_streaming="true",model_name="tiny"} 20.0
sglang:num_requests_total{is_streaming="false",model_name="tiny"} 5.0
sglang:prompt_tokens_total{model_name="tiny"} 5000.0
sglang:generation_tokens_total{model_name="tiny"} 7000.0
"""

TRTLLM = """
trtllm_num_requests_running{model_name="tiny",engine_type="trtllm"} 9.0
trtllm_num_generation_requests{model_name="tiny",engine_type="trtllm"} 6.0
trtllm_num_requests_waiting{model_name="tiny",engine_type="trtllm"} 1.0
trtllm_kv_cache_utilization{model_name="tiny",engine_type="trtllm"} 0.125
trtllm_kv_cache_used_blocks{model_name="tiny",engine_type="trtllm"} 100.0
trtllm_kv_cache_max_blocks{model_name="tiny",engine_type="trtllm"} 800.0
trtllm_kv_cache_tokens_per_block{model_name="tiny",engine_type="trtllm"} 32.0
trtllm_prompt_tokens_total{model_name="tiny",engine_type="trtllm"} 640.0
trtllm_generation_tokens_total{model_name="tiny",engine_type="trtllm"} 77.0
trtllm_request_success_total{model_name="tiny",engine_type="trtllm",finished_reason="stop"} 2.0
"""

# From a frontend and a mock decode worker of ai-dynamo 1.6.1.
FRONTEND = """
dynamo_frontend_inflight_requests{model="tiny"} 4
dynamo_frontend_model_kv_cache_block_size{model="tiny"} 64
dynamo_frontend_model_total_kv_blocks{model="tiny"} 16384
dynamo_frontend_worker_active_decode_blocks{dp_rank="0",worker_id="12357007330098674068"} 3
dynamo_frontend_worker_active_decode_blocks{dp_rank="0",worker_id="13605343202970692438"} 10
dynamo_frontend_worker_active_prefill_tokens{dp_rank="0",worker_id="12357007330098674068"} 210
dynamo_frontend_worker_active_prefill_tokens{dp_rank="0",worker_id="13605343202970692438"} 0
"""
WORKER = """
dynamo_component_inflight_requests{dynamo_component="backend",worker_id="bccfe38f1457eb56"} 6
dynamo_component_requests_total{dynamo_component="backend",worker_id="bccfe38f1457eb56"} 30
dynamo_work_handler_queue_depth 1
"""
DCGM_PAGE = """
# HELP DCGM_FI_DEV_SM_CLOCK SM clock frequency (in MHz).
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-a",device="nvidia0",Hostname="node",pod="decode-0"} 1200
DCGM_FI_DEV_SM_CLOCK{gpu="1",UUID="GPU-b",device="nvidia1",Hostname="node"} 1410
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a",device="nvidia0",Hostname="node"} 250.5
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-b",device="nvidia1",Hostname="node"} 300
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-a",device="nvidia0"} 5000000
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="1",UUID="GPU-b",device="nvidia1"} 6000000
DCGM_FI_DEV_SM_CLOCK{gpu="2",UUID="GPU-c",GPU_I_ID="1",GPU_I_PROFILE="1g.10gb"} 900
"""


def test_vllm_ranks_are_added_up():
    assert read_engine_page("vllm", VLLM.replace("@", ".0")) == {
        "running_req": 12.0,
        "queue_req": 2.0,
        "kv_frac": 0.375,
        "kv_capacity_tok": 16_000.0,  # of which vLLM shows the sum in the row of each engine
        "prompt_tok": 3000.0,
        "output_tok": 900.0,
        "finished_req": 10.0,
    }


def test_older_vllm_names_its_cache_otherwise():
    old = 'vllm:gpu_cache_usage_perc{model_name="tiny"} 0.5\nvllm:num_requests_running 1\n'
    assert read_engine_page("vllm", old) == {"running_req": 1.0, "kv_frac": 0.5}


def test_sglang_tensor_ranks_count_once_and_all_its_queues():
    told = read_engine_page("sglang", SGLANG)
    assert (told["running_req"], told["queue_req"]) == (8.0, 6.0)
    assert (told["kv_used_tok"], told["finished_req"]) == (4100.0, 25.0)


@pytest.mark.parametrize("prefix", ["trtllm_", "trtllm:"])
def test_tensorrt_llm_blocks_become_tokens(prefix):
    told = read_engine_page("trtllm", TRTLLM.replace("trtllm_", prefix))
    assert (told["running_req"], told["queue_req"]) == (6.0, 1.0)
    assert (told["kv_used_tok"], told["kv_capacity_tok"]) == (3200.0, 25_600.0)


@pytest.mark.parametrize(
    ("worker_id", "kv_tok", "queue_tok"),
    [(12357007330098674068, 192.0, 210.0), (13605343202970692438, 640.0, 0.0)],
)
def test_dynamo_frontend_tells_of_each_worker(worker_id, kv_tok, queue_tok):
    told = read_engine_page("dynamo", FRONTEND, worker_id=worker_id)
    assert (told["kv_used_tok"], told["queue_tok"]) == (kv_tok, queue_tok)


def test_dynamo_worker_is_known_by_its_hexadecimal_id_and_shows_its_engine():
    told = read_engine_page("dynamo", WORKER, worker_id=0xBCCFE38F1457EB56)
    assert (told["running_req"], told["queue_req"], told["finished_req"]) == (6.0, 1.0, 30.0)
    assert "running_req" not in read_engine_page("dynamo", WORKER, worker_id=1)
    assert read_engine_page("dynamo", WORKER + VLLM.replace("@", ".0"))["running_req"] == 12.0


def test_dcgm_by_uuid_without_slices():
    gpus = read_dcgm_page(DCGM_PAGE)
    assert gpus["GPU-a"] == GpuReading(clock_mhz=1200.0, power_w=250.5, counter_j=5000.0)
    assert sorted(gpus) == ["GPU-a", "GPU-b"]


@pytest.mark.parametrize("text", ["", "<html>", "vllm:num_requests_running", "a{b 1", FRONTEND])
def test_a_page_of_something_else_is_refused(text):
    with pytest.raises(BadPage):
        read_engine_page("trtllm", text)
    with pytest.raises(BadPage):
        read_dcgm_page(text)


names = sorted({m.names[0] for table in TABLES.values() for ms in table.values() for m in ms})
lines = st.tuples(st.sampled_from(names), st.text(max_size=30)).map("".join)
numbers = st.tuples(st.sampled_from(names), st.floats().map(str) | st.integers().map(str))


@given(
    st.sampled_from(sorted(TABLES)),
    st.lists(lines | numbers.map(" ".join), max_size=12).map("\n".join),
)
def test_any_page_is_read_or_refused(kind, text):
    try:
        told = read_engine_page(kind, text)
    except BadPage:
        return
    assert all(math.isfinite(value) and value >= 0.0 for value in told.values())


# The reader in the background


def scraper(url, kind="vllm", gpus=(), **settings):
    endpoint = Endpoint(instance="decode-0", kind=kind, url=url, gpus=gpus)
    return Scraper(FLEET, [endpoint], **{"period_s": 0.02, "limit_s": 5.0, **settings})


def wait_for(condition, limit_s=10.0):
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < limit_s
        time.sleep(0.01)


def test_a_live_page_becomes_state():
    with Pages(metrics=VLLM) as pages:
        made = scraper(pages.url)
        wait_for(lambda: not made.problems)
        reading = made.read(time.monotonic())
        assert reading.running_req[DECODE] == 12
        assert reading.queue_tok[DECODE] == 2 * 300  # prompts of this engine are 300 on average
        assert reading.kv_used_tok[DECODE] == 6_000
        assert reading.age_s[DECODE] < 1.0
        assert np.isnan(reading.running_req[0])
        made.close()
        made.close()


def test_a_cache_of_another_size_than_planned_is_told_once(caplog):
    """The fleet plans with 450,000 tokens; this engine is full at 16,000."""
    with Pages(metrics=VLLM) as pages:
        made = scraper(pages.url)
        wait_for(lambda: pages.fetched > 4)
        made.close()
    told = [one for one in caplog.messages if "kv_capacity_tok" in one]
    assert len(told) == 1
    assert "decode-0: its KV cache holds 16000 tokens, by the fleet 450000" in told[0]


def test_arrivals_follow_from_counters_and_are_told_once():
    with Pages(metrics=VLLM) as pages:
        made = scraper(pages.url)
        wait_for(lambda: not made.problems)
        assert made.read(time.monotonic()).arrived_req[DECODE] == 0
        grown = VLLM.replace('"length",model_name="tiny"} 6.0', '"length",model_name="tiny"} 9.0')
        pages.pages["/metrics"] = grown.replace(
            'waiting{engine="0",model_name="tiny"} 2.0', 'waiting{engine="0",model_name="tiny"} 4.0'
        )
        arrived = 0.0

        def came():
            nonlocal arrived
            arrived += made.read(time.monotonic()).arrived_req[DECODE]
            return arrived >= 5

        wait_for(came)
        seen = pages.fetched
        wait_for(lambda: pages.fetched > seen + 3)
        assert made.read(time.monotonic()).arrived_req[DECODE] == 0
        pages.pages["/metrics"] = VLLM  # restarted: counters fall, nothing arrived
        seen = pages.fetched
        wait_for(lambda: pages.fetched > seen + 3)
        reading = made.read(time.monotonic())
        assert (reading.arrived_req[DECODE], arrived) == (0, 5)
        assert reading.oldest_wait_s[DECODE] > 0.0
        made.close()


def test_an_engine_that_stops_grows_old_and_says_why():
    with Pages(metrics=VLLM) as pages:
        made = scraper(pages.url)
        wait_for(lambda: not made.problems)
        pages.stop()
        wait_for(lambda: made.problems)
        first = made.read(time.monotonic())
        time.sleep(0.2)
        second = made.read(time.monotonic())
        assert second.age_s[DECODE] >= first.age_s[DECODE] + 0.2
        assert second.running_req[DECODE] == 12
        assert "Connect" in made.problems["decode-0"]
        made.close()


class Watched:
    """A lock; whenever it is let go, what a reader may now see is looked at."""

    def __init__(self, look):
        self._lock, self._look = threading.Lock(), look
        self.seen = []

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *error):
        self.seen.append(self._look())
        self._lock.release()


def test_nobody_sees_a_page_together_with_the_problem_before_it():
    with Pages(metrics=DCGM_PAGE) as node, Pages(metrics=VLLM) as pages:
        pages.status = node.status = 503
        url = f"{node.url}/metrics"
        made = scraper(pages.url, gpus=("GPU-a",), dcgm_urls=[url])
        engine, gpu = made._engines[DECODE], made._gpus["GPU-a"]
        wait_for(lambda: "503" in engine.problem and "503" in made._dcgm_problems[url])
        made._lock = Watched(
            lambda: (
                (engine.page_s is not None, engine.problem == ""),
                (not gpu.problem(made._now_s()), made._dcgm_problems[url] == ""),
            )
        )
        pages.status = node.status = 200
        wait_for(lambda: not made.problems)
        assert all(came == fine for seen in made._lock.seen for came, fine in seen)
        assert made._lock.seen[-1] == ((True, True), (True, True))
        made.close()


def test_a_batch_that_does_not_move_is_a_hang_behind_a_server_that_answers():
    with Pages(metrics=VLLM) as pages:
        made = scraper(pages.url)
        wait_for(lambda: not made.problems)
        # As little in queue and cache as a prefill of 0.1 s.
        pages.pages["/metrics"] = STILL
        time.sleep(0.5)
        assert made.read(time.monotonic()).age_s[DECODE] > 0.15
        assert made.problems == {}
        pages.pages["/metrics"] = VLLM
        wait_for(lambda: made.read(time.monotonic()).age_s[DECODE] < 0.1)
        made.close()


@pytest.mark.parametrize(
    ("page", "status", "words"),
    [
        (VLLM, 503, "answered 503"),
        ("<html>", 200, "nothing of vllm"),
        ("x" * 9_000_000, 200, "longer"),
    ],
)
def test_wrong_answers_are_no_reading(page, status, words):
    with Pages(metrics=page) as pages:
        pages.status = status
        made = scraper(pages.url)
        wait_for(lambda: words in made.problems.get("decode-0", ""))
        assert made.read(time.monotonic()).age_s[DECODE] == np.inf
        made.close()


def test_tensorrt_llm_and_its_energy():
    page = TRTLLM
    with Pages(energy_metrics='{"total_energy_j": 100.0, "query_time": 1.0}') as pages:
        pages.pages["/prometheus/metrics"] = page
        made = scraper(pages.url, kind="trtllm")
        wait_for(lambda: made.read(0.0).energy_j[DECODE] == 0.0)
        pages.pages["/energy_metrics"] = '{"total_energy_j": 130.0}'
        wait_for(lambda: made.read(0.0).power_w[DECODE] > 0.0)
        assert made.read(0.0).energy_j[DECODE] == 30.0
        made.close()


@pytest.mark.parametrize(
    "odd",
    ["[]", "3", "null", '"x"', '{"total_energy_j": []}', '{"total_energy_j": -1}',
     '{"total_energy_j": NaN}', '{"total_energy_j": 1e300}', "[" * 100_000,
     '{"total_energy_j": 1' + "0" * 400 + "}", '{"total_energy_j": 1' + "0" * 5000 + "}"],
    ids=lambda odd: odd[:24],
)  # fmt: skip
def test_an_odd_energy_blinds_nobody(odd):
    with Pages(energy_metrics=odd) as pages:
        pages.pages["/prometheus/metrics"] = TRTLLM
        made = scraper(pages.url, kind="trtllm")
        wait_for(lambda: not made.problems)
        pages.pages["/prometheus/metrics"] = TRTLLM.replace(" 6.0", " 5.0")
        wait_for(lambda: made.read(time.monotonic()).running_req[DECODE] == 5)
        assert np.isnan(made.read(time.monotonic()).energy_j[DECODE])
        made.close()


def test_what_nobody_thought_of_is_told_and_read_again(monkeypatch, caplog):
    from voltana_ctrl.engines import scrape

    def broken(*_arguments, **_options):
        raise RuntimeError("never thought of")

    with Pages(metrics=VLLM) as pages:
        made = scraper(pages.url)
        wait_for(lambda: not made.problems)
        with monkeypatch.context() as for_a_while:
            for_a_while.setattr(scrape, "read_engine_page", broken)
            wait_for(lambda: "RuntimeError: never thought of" in made.problems.get("decode-0", ""))
        wait_for(lambda: not made.problems)  # it goes on
        made.close()
    assert "could not be read" in caplog.text


def test_tensorrt_llm_without_energy_is_asked_once():
    with Pages() as pages:
        pages.pages["/prometheus/metrics"] = TRTLLM
        made = scraper(pages.url, kind="trtllm")
        wait_for(lambda: pages.fetched > 6)
        reading = made.read(time.monotonic())
        assert reading.running_req[DECODE] == 6
        assert np.isnan(reading.energy_j[DECODE])
        assert "/energy_metrics" in made._engines[DECODE].energy_url
        assert made._engines[DECODE].no_energy_until_s > 0.0
        made.close()


def test_gpus_of_an_instance_from_dcgm():
    with Pages(metrics=DCGM_PAGE) as node, Pages(metrics=VLLM) as pages:
        made = scraper(pages.url, gpus=("GPU-a", "GPU-b"), dcgm_urls=[f"{node.url}/metrics"])
        wait_for(lambda: not np.isnan(made.read(0.0).power_w[DECODE]))
        reading = made.read(0.0)
        assert reading.freq_mhz[DECODE] == 1200
        assert reading.power_w[DECODE] == 550.5
        assert reading.energy_j[DECODE] == 0.0  # since it was first read
        made.close()
