"""GPUs of engines as DCGM exporter and engines tell them: bounded, aged, and their faults named."""

import time

import numpy as np
import pytest

from tests.engines.test_scrape import DCGM_PAGE, DECODE, TRTLLM, VLLM, scraper, wait_for
from tests.helpers.fake_pages import Pages
from voltana_ctrl.backends.meter import FRESH_S

GPUS = ("GPU-a", "GPU-b")


def watching(pages, node, **settings):
    return scraper(pages.url, gpus=GPUS, dcgm_urls=[f"{node.url}/metrics"], **settings)


def blank(page, *fields):
    """The page with DCGM's blank values for some fields of GPU-a."""
    values = {
        "SM_CLOCK": ("1200", "2147483632"),
        "POWER_USAGE": ("250.5", "140737488355328"),
        "TOTAL_ENERGY_CONSUMPTION": ("5000000", "9223372036854775794"),
    }
    for field in fields:
        page = page.replace(f"}} {values[field][0]}\n", f"}} {values[field][1]}\n")
    return page


def test_blank_values_of_dcgm_are_not_believed():
    everything = blank(DCGM_PAGE, "SM_CLOCK", "POWER_USAGE", "TOTAL_ENERGY_CONSUMPTION")
    assert everything != DCGM_PAGE
    with Pages(metrics=everything) as node, Pages(metrics=VLLM) as pages:
        made = watching(pages, node)
        wait_for(lambda: node.fetched > 3)
        reading = made.read(time.monotonic())
        assert np.isnan(reading.power_w[DECODE])
        assert np.isnan(reading.freq_mhz[DECODE])
        assert "GPU GPU-a: clock not told, power not told" in made.problems["decode-0"]
        node.pages["/metrics"] = DCGM_PAGE
        wait_for(lambda: made.read(time.monotonic()).power_w[DECODE] == 550.5)
        before_j = made.read(time.monotonic()).energy_j[DECODE]
        node.pages["/metrics"] = everything
        seen = node.fetched
        wait_for(lambda: node.fetched > seen + 3)
        node.pages["/metrics"] = DCGM_PAGE.replace("5000000", "5100000")
        seen = node.fetched
        wait_for(lambda: node.fetched > seen + 3)
        # A hundred joules, and not nine quadrillion for good.
        assert made.read(time.monotonic()).energy_j[DECODE] - before_j < 600.0
        made.close()


def test_power_of_dcgm_follows_from_its_counter_where_it_has_none():
    page = "\n".join(line for line in DCGM_PAGE.splitlines() if "POWER" not in line)
    counts = page.replace(" 5000000", " 5@00000").replace(" 6000000", " 6@00000")
    with Pages(metrics=counts) as node, Pages(metrics=VLLM) as pages:
        made = watching(pages, node, period_s=0.3)
        wait_for(lambda: made.read(time.monotonic()).power_w[DECODE] > 50.0)
        assert made.problems == {}
        made.close()


@pytest.mark.parametrize("how", ["gone", "error", "slices", "other GPUs", "garbage"])
def test_dcgm_that_goes_leaves_the_engine_young_and_its_figures_old(how):
    now_s = [0.0]
    with Pages(metrics=DCGM_PAGE) as node, Pages(metrics=VLLM) as pages:
        made = watching(pages, node, now_s=lambda: now_s[0])
        wait_for(lambda: made.read(now_s[0]).power_w[DECODE] == 550.5 and not made.problems)
        if how == "gone":
            node.stop()
        elif how == "error":
            node.status = 500
        elif how == "slices":
            rows = [row for row in DCGM_PAGE.splitlines() if "GPU-c" not in row]
            node.pages["/metrics"] = "\n".join(rows).replace('gpu="', 'GPU_I_ID="1",gpu="')
        elif how == "other GPUs":
            node.pages["/metrics"] = DCGM_PAGE.replace("GPU-a", "GPU-x").replace("GPU-b", "GPU-y")
        else:
            node.pages["/metrics"] = "<html>"
        seen = node.fetched
        wait_for(lambda: how == "gone" or node.fetched > seen + 2)
        now_s[0] = 13.0
        word = {"gone": "Connect", "error": "answered 500", "slices": "only MIG slices",
                "other GPUs": "does not tell it", "garbage": "no GPU of DCGM"}[how]  # fmt: skip
        wait_for(lambda: word in made.problems.get("decode-0", ""))
        said = made.problems["decode-0"]
        assert "GPU GPU-a: clock not told for 13 s, power not told for 13 s" in said
        assert f"{node.url}/metrics" in said
        wait_for(lambda: made.read(now_s[0]).age_s[DECODE] == 0.0)  # the engine answers
        reading = made.read(now_s[0])
        assert np.isnan(reading.power_w[DECODE])
        assert np.isnan(reading.freq_mhz[DECODE])
        assert reading.running_req[DECODE] == 12
        made.close()


def test_a_gpu_that_no_page_knows_is_named_from_the_start():
    with Pages(metrics=DCGM_PAGE) as node, Pages(metrics=VLLM) as pages:
        made = scraper(pages.url, gpus=("GPU-a", "GPU-x"), dcgm_urls=[f"{node.url}/metrics"])
        word = "GPU GPU-x: clock not told, power not told (DCGM exporter:"
        wait_for(lambda: made.problems.get("decode-0", "").startswith(word))
        wait_for(lambda: "does not tell it" in made.problems["decode-0"])
        made.close()


def test_energy_of_an_engine_is_bounded_by_what_its_gpus_can_draw():
    with Pages(energy_metrics='{"total_energy_j": 100.0}') as pages:
        pages.pages["/prometheus/metrics"] = TRTLLM
        made = scraper(pages.url, kind="trtllm")
        wait_for(lambda: made.read(0.0).energy_j[DECODE] == 0.0)
        pages.pages["/energy_metrics"] = '{"total_energy_j": 9e9}'
        seen = pages.fetched
        wait_for(lambda: pages.fetched > seen + 4)
        reading = made.read(time.monotonic())
        assert reading.energy_j[DECODE] < 1e5
        assert not reading.power_w[DECODE] > 5000.0
        made.close()


def test_energy_that_an_engine_no_longer_tells_grows_old():
    now_s = [0.0]
    with Pages(energy_metrics='{"total_energy_j": @00.0}') as pages:
        pages.pages["/prometheus/metrics"] = TRTLLM
        made = scraper(pages.url, kind="trtllm", now_s=lambda: now_s[0])
        wait_for(lambda: made.read(now_s[0]).energy_j[DECODE] == 0.0)
        now_s[0] = 2.0
        wait_for(lambda: made.read(now_s[0]).power_w[DECODE] > 0.0)
        pages.pages["/energy_metrics"] = "null"
        seen = pages.fetched
        wait_for(lambda: pages.fetched > seen + 2)
        now_s[0] += FRESH_S + 1.0
        assert np.isnan(made.read(now_s[0]).power_w[DECODE])
        made.close()
