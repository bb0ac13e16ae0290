"""TTFT and ITL from the histograms of engines: what counts as a miss, and every request once."""

import time

import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet
from tests.helpers.fake_pages import Pages

pytest.importorskip("httpx", reason="needs the server extra")
pytest.importorskip("prometheus_client", reason="needs the server extra")

from voltana_ctrl import Slo
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.latency import HalvesPaired, Histogram, LatencyDeltas
from voltana_ctrl.engines.page import read_histograms
from voltana_ctrl.engines.telemetry import EngineBackend
from voltana_ctrl.estimate.margin import MarginTracker
from voltana_ctrl.types import joined

SLO = Slo(ttft_s=0.6, itl_s=0.06)
INF = float("inf")
#: Names of the three engines: TTFT, ITL of requests, ITL of tokens.
NAMES = {
    "vllm": ("vllm:time_to_first_token_seconds", "vllm:request_time_per_output_token_seconds",
             "vllm:inter_token_latency_seconds"),
    "sglang": ("sglang:time_to_first_token_seconds", None, "sglang:inter_token_latency_seconds"),
    "trtllm": ("trtllm_time_to_first_token_seconds", "trtllm_time_per_output_token_seconds", None),
}  # fmt: skip
DONE = {
    "vllm": 'vllm:request_success_total{finished_reason="stop"} %d\n'
            "vllm:prompt_tokens_total %d\nvllm:generation_tokens_total %d\n",
    "sglang": "sglang:num_requests_total %d\nsglang:prompt_tokens_total %d\n"
              "sglang:generation_tokens_total %d\n",
    "trtllm": "trtllm_request_success_total %d\ntrtllm_prompt_tokens_total %d\n"
              "trtllm_generation_tokens_total %d\n",
}  # fmt: skip


def lines(name, values, edges=(0.025, 0.05, 0.075, 0.5, 0.75)):
    """Lines of a histogram that has seen these values."""
    values = np.asarray(values, dtype=float)
    told = [f'{name}_bucket{{engine="0",le="{edge}"}} {int((values <= edge).sum())}'
            for edge in edges]  # fmt: skip
    told.append(f'{name}_bucket{{engine="0",le="+Inf"}} {len(values)}')
    return "\n".join([*told, f'{name}_sum{{engine="0"}} {values.sum()}\n'])


def page(kind, ttft_s, itl_s, gaps=20):
    first, request, token = NAMES[kind]
    text = lines(first, ttft_s) + DONE[kind] % (len(itl_s), 300 * len(itl_s), gaps * len(itl_s))
    if request:
        text += lines(request, itl_s)
    if token:
        text += lines(token, np.repeat(itl_s, gaps))
    return text


@pytest.mark.parametrize("kind", NAMES)
def test_every_engine_tells_its_histograms(kind):
    told = read_histograms(kind, page(kind, [0.2, 0.9], [0.03, 0.2]))
    assert told["ttft"].edges_s[-1] == INF
    assert told["ttft"].counts[-1] == 2.0
    assert told["ttft"].total_s == pytest.approx(1.1)
    assert ("itl" in told) == (NAMES[kind][1] is not None)
    assert ("token_itl" in told) == (NAMES[kind][2] is not None)
    # A Dynamo worker shows its engine's.
    assert read_histograms("dynamo", page(kind, [0.2], [0.03]))["ttft"].counts[-1] == 1.0


def test_a_page_without_histograms_tells_none():
    assert read_histograms("vllm", "vllm:num_requests_running 3\n") == {}
    broken = 'vllm:time_to_first_token_seconds_bucket{le="x"} 3\n'
    assert read_histograms("vllm", broken) == {}
    # Without the last bucket nobody knows how many there were.
    assert read_histograms("vllm", broken.replace('"x"', '"0.5"')) == {}


def test_data_parallel_engines_add_up_and_ranks_that_repeat_do_not():
    one = lines("vllm:time_to_first_token_seconds", [0.1])
    both = read_histograms("vllm", one + one.replace('engine="0"', 'engine="1"'))
    assert both["ttft"].counts[-1] == 2.0
    ranks = one.replace('engine="0"', 'engine="0",tp_rank="0"')
    ranks += one.replace('engine="0"', 'engine="0",tp_rank="1"')
    assert read_histograms("vllm", ranks)["ttft"].counts[-1] == 1.0


def taken(kind, *pages, prefills=True, decodes=True):
    deltas = LatencyDeltas(prefills=prefills, decodes=decodes)
    for ttft_s, itl_s in pages:
        text = page(kind, ttft_s, itl_s)
        deltas.take(read_histograms(kind, text), {
            "finished_req": float(len(itl_s)), "prompt_tok": 300.0 * len(itl_s),
            "output_tok": 20.0 * len(itl_s),
        })  # fmt: skip
    return deltas


@pytest.mark.parametrize("kind", NAMES)
def test_what_was_there_at_the_start_counts_for_nothing_and_what_comes_counts_once(kind):
    first = ([0.2] * 5, [0.03] * 5)
    second = ([0.2] * 5 + [0.4, 2.0], [0.03] * 5 + [0.04, 0.3])
    deltas = taken(kind, first)
    assert len(deltas.finished(0)) == 0
    deltas = taken(kind, first, second)
    batch = HalvesPaired().whole(0.0, deltas.finished(0))
    assert len(batch) == 2
    assert batch.ttft_s.tolist() == [0.5, 1.5]  # upper edges; twice the last one
    if NAMES[kind][1]:
        assert batch.itl_s.tolist() == [0.05, 0.5]
    else:
        assert batch.itl_s == pytest.approx([0.17, 0.17])  # the mean gap of both
    assert batch.output_tok.tolist() == [20.0, 20.0]
    assert batch.prompt_tok.tolist() == [300.0, 300.0]
    assert len(deltas.finished(0)) == 0


def test_an_engine_that_starts_anew_tells_nothing_wrong():
    deltas = taken("vllm", ([0.2] * 5, [0.03] * 5), ([0.2] * 2, [0.03] * 2))
    assert len(deltas.finished(0)) == 0


def test_where_the_promise_lies_inside_a_bucket_misses_count_from_its_lower_edge():
    deltas = taken("vllm", ([], []), ([0.55, 0.49], [0.055, 0.049]))
    batch = HalvesPaired().whole(0.0, deltas.finished(0))
    # Both of the first kept the promise; nobody can tell from the page.
    assert sorted((batch.ttft_s > SLO.ttft_s).tolist()) == [False, True]
    assert sorted((batch.itl_s > SLO.itl_s).tolist()) == [False, True]
    assert deltas.edges(SLO) == {"ttft": 0.5, "itl": 0.05}
    tracker = MarginTracker(slo=SLO)
    after = tracker.update(tracker.init(), batch)
    assert after.missed_req.tolist() == [1.0, 1.0]
    assert after.finished_req.tolist() == [2.0, 2.0]


def test_halves_of_prefill_and_decode_become_whole_requests_in_order():
    prefill = taken("vllm", ([], []), ([0.2, 0.7], []), decodes=False)
    decode = taken("vllm", ([], []), ([9.0, 9.0, 9.0], [0.03] * 3), prefills=False)
    pairing = HalvesPaired(wait_s=10.0)
    halves = [prefill.finished(0), decode.finished(1)]
    batch = pairing.whole(0.0, joined(type(halves[0]), halves))
    assert batch.ttft_s.tolist() == [0.5, 0.75]
    assert batch.prefill_instance.tolist() == [0, 0]
    assert batch.decode_instance.tolist() == [1, 1]
    # The third waits for the other half, and is told alone when it does not come.
    none = halves[0].empty()
    assert len(pairing.whole(5.0, none)) == 0
    left = pairing.whole(10.5, none)
    assert left.decode_instance.tolist() == [1]
    assert left.prefill_instance.tolist() == [-1]
    assert len(pairing.whole(30.0, none)) == 0


def test_whole_requests_are_left_as_they_are():
    deltas = taken("vllm", ([], []), ([0.2], [0.03]))
    whole = HalvesPaired().whole(0.0, deltas.finished(0))
    assert HalvesPaired().whole(0.0, whole) is whole


def test_counts_of_a_histogram_that_fall_or_change_their_edges_are_none():
    before = Histogram(edges_s=(0.1, INF), counts=(3.0, 3.0), total_s=0.1)
    assert Histogram(edges_s=(0.1, INF), counts=(2.0, 4.0), total_s=0.2).since(before) == []
    assert Histogram(edges_s=(0.2, INF), counts=(4.0, 4.0), total_s=0.2).since(before) == []


def test_a_backend_without_a_router_tells_what_the_pages_tell():
    first = page("vllm", [0.2] * 5, [0.03] * 5)
    second = page("vllm", [0.2] * 5 + [0.7] * 3, [0.03] * 5 + [0.2] * 3)
    with Pages(metrics=first) as prefill, Pages(metrics=first) as decode:
        engines = [Endpoint(instance=name, kind="vllm", url=one.url)
                   for name, one in zip(fleet().ids, (prefill, decode), strict=True)]  # fmt: skip
        with EngineBackend(fleet(), engines, scrape_period_s=0.02) as backend:
            until_s = time.monotonic() + 10.0
            while time.monotonic() < until_s and min(prefill.fetched, decode.fetched) < 3:
                assert len(backend.read().finished) == 0
                time.sleep(0.02)
            for one in (prefill, decode):
                one.pages["/metrics"] = second
            seen = []
            while time.monotonic() < until_s and sum(map(len, seen)) < 3:
                seen.append(backend.read().finished)
                time.sleep(0.02)
            batch = joined(type(seen[0]), seen)
            assert backend.judged_edges_s(SLO) == {"prefill-0": {"ttft": 0.5},
                                                   "decode-0": {"itl": 0.05}}  # fmt: skip
    assert batch.ttft_s.tolist() == [0.75] * 3
    assert batch.itl_s.tolist() == [0.5] * 3
    assert set(batch.prefill_instance) == {0}
    assert set(batch.decode_instance) == {1}
