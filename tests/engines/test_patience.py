"""Healthy silence is not death: a long prefill against an engine that hangs."""

import numpy as np
import pytest

from tests.engines.fpm.test_fpm import engine_frames, message
from tests.engines.test_scrape import DECODE, FLEET, STILL, scraper, wait_for
from tests.helpers.fake_pages import Pages
from voltana_ctrl.backends.modelled import ModelledGpus
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.patience import longest_prefill_s
from voltana_ctrl.engines.telemetry import EngineBackend

# One prompt of which nothing is told but that it is there: 0.3 of 450,000 tokens.
LONG = (
    'vllm:num_requests_running{engine="0"} 1.0\n'
    'vllm:num_requests_waiting{engine="0"} 0.0\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0.3\n'
    'vllm:prompt_tokens_total{engine="0"} 3000.0\n'
    'vllm:generation_tokens_total{engine="0"} 900.0\n'
    'vllm:request_success_total{engine="0"} 10.0\n'
)
LONG_TOK = 0.3 * 450_000


def aged(pages, page, spans_s, freq_mhz=None):
    """Age of a reading after spans of a page on which nothing moves."""
    now_s = [0.0]
    pages.pages["/metrics"] = page
    made = scraper(pages.url, now_s=lambda: now_s[0])
    wait_for(lambda: made.problems == {})
    ages_s = []
    for span_s in spans_s:
        now_s[0] += span_s
        seen = pages.fetched
        wait_for(lambda seen=seen: pages.fetched > seen + 2)
        ages_s.append(float(made.read(now_s[0], freq_mhz).age_s[DECODE]))
    made.close()
    return ages_s


def test_the_longest_prefill_is_waited_for_and_a_hang_is_not():
    clocks_mhz = np.array([1410.0, 1410.0])
    long_s = longest_prefill_s(FLEET.instances[DECODE], LONG_TOK, 1410.0)
    assert 8.0 < long_s < 20.0
    with Pages() as pages:
        early, late = aged(pages, LONG, [long_s - 1.0, 9.0], clocks_mhz)
        assert early == 0.0
        assert late == pytest.approx(8.0)
        # At a lower clock it takes longer.
        assert aged(pages, LONG, [long_s + 1.0], np.array([705.0, 705.0])) == [0.0]
        # A small batch has no such excuse.
        (still,) = aged(pages, STILL, [long_s - 1.0], clocks_mhz)
        assert still > long_s - 2.0


def test_any_number_that_moves_is_life():
    """A chunked prefill: counters stand still, the KV cache fills."""
    with Pages() as pages:
        moving = STILL.replace('model_name="tiny"} 0.002', 'model_name="tiny"} 0.002@')
        assert moving != STILL
        (age_s,) = aged(pages, moving, [600.0])
        assert age_s == 0.0


def test_an_engine_in_a_long_prefill_stays_alive_in_the_fleet():
    now_s = [0.0]
    with Pages(metrics=LONG) as pages:
        endpoint = Endpoint(instance="decode-0", kind="vllm", url=pages.url)
        backend = EngineBackend(
            FLEET, [endpoint], gpus=ModelledGpus(FLEET), scrape_period_s=0.02,
            now_s=lambda: now_s[0],
        )  # fmt: skip
        wait_for(lambda: backend.read().state.alive[DECODE])
        alive = []
        for _ in range(12):
            now_s[0] += 3.0
            seen = pages.fetched
            wait_for(lambda seen=seen: pages.fetched > seen + 2)
            alive.append(bool(backend.read().state.alive[DECODE]))
        backend.close()
    long_s = longest_prefill_s(FLEET.instances[DECODE], LONG_TOK, 1410.0)
    expected = [3.0 * (k + 1) <= long_s + 5.0 for k in range(12)]
    assert alive == expected
    assert alive[2]  # 9 s
    assert not alive[-1]


def test_forward_passes_alone_leave_a_long_prefill_its_time():
    now_s = [0.0]
    backend = EngineBackend(
        FLEET, [], gpus=ModelledGpus(FLEET), scrape=False, now_s=lambda: now_s[0]
    )
    backend._fpm._of_address = {"here": {0}}
    queued = {"num_prefill_requests": 1, "sum_prefill_tokens": 100_000}
    told = message(1, 0.02, scheduled={"num_prefill_requests": 1}, queued=queued)
    backend._fpm.take("here", engine_frames(told), 0.0)
    assert backend.read().state.alive[0]
    now_s[0] = 9.0
    assert backend.read().state.alive[0]
    # Heartbeats while it runs do not empty its queue.
    for beat in range(2, 12):
        backend._fpm.take("here", engine_frames(message(beat)), 9.0 + beat / 10.0)
    now_s[0] = 10.5
    assert backend.read().state.queue_tok[0] == 100_000
    now_s[0] = 60.0
    assert not backend.read().state.alive[0]
    backend.close()


def test_an_idle_engine_that_falls_silent_is_dead_after_the_limit():
    now_s = [0.0]
    backend = EngineBackend(
        FLEET, [], gpus=ModelledGpus(FLEET), scrape=False, now_s=lambda: now_s[0]
    )
    backend._fpm._of_address = {"here": {0}}
    backend._fpm.take("here", engine_frames(message(1)), 0.0)
    assert backend.read().state.alive[0]
    now_s[0] = 5.5
    assert not backend.read().state.alive[0]
    backend.close()


def test_heartbeats_of_an_iteration_longer_than_ten_seconds_are_no_idleness():
    from voltana_ctrl.engines.fpm.messages import ForwardPass
    from voltana_ctrl.engines.fpm.state import RankState

    rank = RankState(prefills=True, decodes=False, longest_s=lambda tok: tok / 5000.0)
    rank.take(ForwardPass(wall_s=0.1, queued_prefill_req=1.0, queued_prefill_tok=1e5), t_s=1.0)
    rank.take(ForwardPass(number=1), t_s=15.0)
    assert rank.queue_tok == 1e5
    rank.take(ForwardPass(number=2), t_s=22.0)
    assert rank.queue_tok == 0.0
