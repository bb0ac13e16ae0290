"""Running engines as a backend: sources merged, dead engines, GPUs beneath."""

import re
import time

import numpy as np
import pytest

from tests.engines.fpm.test_fpm import engine_frames, message
from tests.engines.test_scrape import DCGM_PAGE, VLLM, wait_for
from tests.helpers.fake_gpus import all_given_back, fleet, machine, needs_compiler, open_backend
from tests.helpers.fake_pages import Pages
from voltana_ctrl import ControlLoop, Decision
from voltana_ctrl.backends.modelled import ModelledGpus
from voltana_ctrl.control import StaticController
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.messages import CLOCK_KEY
from voltana_ctrl.engines.telemetry import EngineBackend
from voltana_ctrl.engines.traffic import FinishedRequest, Traffic
from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.testing import check_backend

PREFILL, DECODE = 0, 1


def engines(url, other=None, **more):
    urls = (url, other or url)
    return [
        Endpoint(instance=name, kind="vllm", url=one, **more)
        for name, one in zip(fleet().ids, urls, strict=True)
    ]


def open_engines(endpoints, **settings):
    return EngineBackend(
        fleet(), endpoints, **{"scrape_period_s": 0.02, "scrape_limit_s": 5.0, **settings}
    )


def heard(backend):
    wait_for(lambda: backend.read().state.alive.all())
    return backend


def test_it_keeps_the_laws_of_backends():
    with Pages(metrics=VLLM) as pages:
        check_backend(
            lambda: heard(open_engines(engines(pages.url), gpus=ModelledGpus(fleet()))),
            claims=["clocks-read-back"],
        )
        check_backend(lambda: heard(open_engines(engines(pages.url), without_gpus="ignore")))


@needs_compiler
def test_it_keeps_the_laws_on_gpus_and_gives_them_back(tmp_path):
    with machine(tmp_path) as fake, Pages(metrics=VLLM) as pages:
        for gpu in fake.gpus:
            gpu.power_scale_frac = 0.5
        check_backend(
            lambda: heard(open_engines(engines(pages.url), gpus=open_backend(fake, tmp_path))),
            wait=lambda _: time.sleep(0.02),
            given_back=lambda: all_given_back(fake),
            claims=["clocks-read-back"],
        )
        with open_engines(engines(pages.url), gpus=open_backend(fake, tmp_path)) as backend:
            state = heard(backend).read().state
            assert state.running_req.tolist() == [12, 12]
            assert (state.power_w > 0).all()


def test_a_dead_engine_delays_nobody_and_is_not_alive():
    with Pages(metrics=VLLM) as pages, Pages(metrics=VLLM) as hangs:
        backend = open_engines(
            engines(pages.url, hangs.url), gpus=ModelledGpus(fleet()), scrape_limit_s=0.3
        )
        heard(backend)
        hangs.hang_s = 5.0
        backend._alive_s = 1.0
        took_s = []
        begin_s = time.monotonic()
        while backend.read().state.alive[DECODE]:
            before_s = time.perf_counter()
            state = backend.read().state
            took_s.append(time.perf_counter() - before_s)
            assert state.alive[PREFILL]
            assert time.monotonic() - begin_s < 10.0
            time.sleep(0.02)
        state = backend.read().state
        assert state.age_s[DECODE] > 1.0
        assert state.age_s[PREFILL] < 0.5
        assert state.running_req[DECODE] == 12  # what it said last
        # No read waits for the engine that hangs (its limit is 0.3 s).
        assert np.median(took_s) < 0.05
        hangs.hang_s = 0.0
        wait_for(lambda: backend.read().state.alive.all())
        backend.close()


def test_engines_that_were_never_heard_are_dead_from_the_start():
    with open_engines(engines("http://127.0.0.1:9"), without_gpus="ignore") as backend:
        state = backend.read().state
        assert not state.alive.any()
        assert np.isfinite(state.age_s).all()
        wait_for(lambda: len(backend.problems()) == 2)


def test_forward_passes_come_first_and_pages_fill_the_rest():
    with Pages(metrics=VLLM) as pages:
        backend = open_engines(engines(pages.url), gpus=ModelledGpus(fleet()))
        heard(backend)
        backend.apply(Decision.highest(fleet(), floor_mhz=[1005.0, 705.0]))
        backend._fpm._of_address = {"here": {DECODE}}
        told = message(1, 0.02, scheduled={"num_decode_requests": 3, "sum_decode_kv_tokens": 777})
        backend._fpm.take("here", engine_frames(told), time.monotonic())
        observation = backend.read()
        assert observation.state.running_req.tolist() == [12, 3]
        assert observation.state.kv_used_tok.tolist() == [6_000, 777]
        assert observation.iterations.freq_mhz.tolist() == [705]
        # When they stop the page takes over.
        backend._alive_s = 0.2
        wait_for(lambda: backend.read().state.running_req[DECODE] == 12)
        assert backend.read().state.alive.all()
        backend.close()


def test_a_long_iteration_is_seen_on_the_page():
    with Pages(metrics=VLLM) as pages:
        backend = open_engines(engines(pages.url), gpus=ModelledGpus(fleet()))
        heard(backend)
        backend._fpm._of_address = {"here": {PREFILL}}
        backend._fpm.take("here", engine_frames(message(1)), time.monotonic())  # as if idle
        assert backend.read().state.running_req[PREFILL] == 12
        idle = VLLM.replace("} 5.0", "} 0.0").replace("} 7.0", "} 0.0").replace("} 2.0", "} 0.0")
        pages.pages["/metrics"] = idle
        wait_for(lambda: backend.read().state.running_req.tolist() == [0, 0])
        backend.close()


def test_without_gpus_a_decision_is_refused_or_by_choice_ignored():
    highest = Decision.highest(fleet())
    with open_engines([]) as backend, pytest.raises(ActuationDenied, match="without_gpus"):
        backend.apply(highest)
    with open_engines([], without_gpus="ignore") as backend:
        backend.apply(highest)
        assert backend.read().state.freq_mhz.tolist() == [1410, 1410]


def test_energy_from_dcgm_never_falls():
    with Pages(metrics=DCGM_PAGE) as node, Pages(metrics=VLLM) as pages:
        endpoints = [
            Endpoint(instance=name, kind="vllm", url=pages.url, gpus=(gpu,))
            for name, gpu in zip(fleet().ids, ("GPU-a", "GPU-b"), strict=True)
        ]
        url = f"{node.url}/metrics"
        with open_engines(endpoints, dcgm_urls=[url], without_gpus="ignore") as backend:
            heard(backend)
            wait_for(lambda: backend.read().state.power_w.all())
            assert backend.read().state.freq_mhz.tolist() == [1200, 1410]
            assert backend.read().state.energy_j.tolist() == [0, 0]
            node.pages["/metrics"] = DCGM_PAGE.replace("5000000", "5002500")
            wait_for(lambda: backend.read().state.energy_j[0] == 2.5)
            node.pages["/metrics"] = DCGM_PAGE.replace("5000000", "100")  # it was restarted
            seen = node.fetched
            wait_for(lambda: node.fetched > seen + 3)
            # Over the interval of the restart power is integrated.
            after_j = backend.read().state.energy_j[0]
            assert 2.5 < after_j < 2.5 + 250.5 * 5.0
            assert backend.read().state.energy_j[1] == 0.0
            node.pages["/metrics"] = DCGM_PAGE.replace("5000000", "1100")
            wait_for(lambda: backend.read().state.energy_j[0] == pytest.approx(after_j + 1.0))


def test_a_router_in_this_process_counts_exactly():
    traffic = Traffic(2)
    with open_engines([], without_gpus="ignore", traffic=traffic) as backend:
        traffic.routed(0, prompt_tok=100)
        traffic.routed(0, prompt_tok=50)
        traffic.routed(1, prompt_tok=100)
        traffic.finished(
            FinishedRequest(
                request=4, prompt_tok=100, output_tok=20, ttft_s=0.3, itl_s=0.02,
                prefill_instance=0, decode_instance=1,
            )
        )  # fmt: skip
        observation = backend.read()
        assert observation.state.arrived_req.tolist() == [2, 1]
        assert observation.state.arrived_tok.tolist() == [150, 100]
        assert observation.finished.output_tok.tolist() == [20]
        again = backend.read()
        assert (again.state.arrived_req.sum(), len(again.finished)) == (0, 0)


def test_modelled_gpus_draw_more_under_load_and_less_at_a_lower_clock():
    gpus = ModelledGpus(fleet())
    idle_w = gpus.read().state.power_w[DECODE]
    with Pages(metrics=VLLM) as pages, open_engines(engines(pages.url), gpus=gpus) as backend:
        heard(backend)
        fast_w = backend.read().state.power_w[DECODE]
        backend.apply(Decision.highest(fleet(), floor_mhz=[705.0, 705.0]))
        slow_w = backend.read().state.power_w[DECODE]
        assert idle_w < slow_w < fast_w
        before_j = backend.read().state.energy_j[DECODE]
        time.sleep(0.05)
        assert backend.read().state.energy_j[DECODE] > before_j


def test_a_loop_ticks_on_engines():
    with Pages(metrics=VLLM) as pages:
        backend = heard(open_engines(engines(pages.url), gpus=ModelledGpus(fleet())))
        with ControlLoop(backend, StaticController(fleet(), 1005)) as loop:
            for _ in range(3):
                record = loop.tick()
        assert record.applied.freq_mhz.tolist() == [1005, 1005]
        with pytest.raises(BackendError):
            backend.read()


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (["decode-9"], {}, "expected instances of the fleet"),
        (["decode-0", "decode-0"], {}, "decode-0: expected once"),
        ([], {"without_gpus": "maybe"}, "expected 'refuse' or 'ignore'"),
        ([], {"alive_s": 0.0}, "alive_s"),
        ([], {"gpus": ModelledGpus(fleet("2P1D"))}, "expected the GPUs of prefill-0, decode-0"),
    ],
)
def test_what_does_not_fit_is_refused(names, settings, words):
    endpoints = [Endpoint(instance=name, kind="vllm", url="http://x") for name in names]
    with pytest.raises(ConfigError, match=words):
        EngineBackend(fleet(), endpoints, **settings)


def test_the_example_of_the_page_runs(root, capsys):
    page = (root / "docs" / "serving-stacks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    assert "[False False]" in capsys.readouterr().out


def test_problems_are_those_of_engines_and_of_gpus():
    class Gpus(ModelledGpus):
        def problems(self):
            return {"decode-0": "power not told for 13 s (power: Unknown Error)"}

    with Pages(metrics=VLLM) as pages:
        backend = heard(open_engines(engines(pages.url), gpus=Gpus(fleet())))
        assert backend.problems() == {"decode-0": "power not told for 13 s (power: Unknown Error)"}
        pages.stop()
        # Each engine is asked in its own time.
        at = f"{pages.url}/metrics: "
        wait_for(lambda: {k for k, why in backend.problems().items() if why.startswith(at)}
                 == {"prefill-0", "decode-0"})  # fmt: skip
        said = backend.problems()
        assert said["decode-0"].endswith("power not told for 13 s (power: Unknown Error)")
        backend.close()


def test_a_governor_that_is_not_heard_in_its_engine_is_told_of():
    with Pages(metrics=VLLM) as pages:
        ours = engines(pages.url, limits="/run/voltana-ctrl/order.json")
        backend = open_engines(ours, gpus=ModelledGpus(fleet()))
        heard(backend)
        backend._fpm._of_address = {"here": {DECODE}}

        def iterate(numbers, clock_mhz=0.0):
            for number in numbers:
                told = message(number, 0.02) | {CLOCK_KEY: clock_mhz}
                backend._fpm.take("here", engine_frames(told), time.monotonic())
            backend.read()
            return backend.problems().get("decode-0")

        assert iterate(range(1, 40)) is None  # an engine that begins
        assert "no governor is heard in its engine" in iterate([40])
        assert iterate([41], clock_mhz=705.0) is None
        backend.close()
