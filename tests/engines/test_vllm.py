"""vLLM's hooks with fakes of its modules: what versions tell, and what the hooks cost."""

import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.engines.test_in_engine import environment
from tests.helpers.fake_engines import install_vllm, output, request, vllm_config
from tests.helpers.fake_gpus import machine, needs_compiler
from voltana_ctrl.types import Role

# SchedulerStats of vLLM 0.28 to 0.33 with --enable-logging-iteration-details.
DETAILS = SimpleNamespace(
    iteration_index=7, num_ctx_requests=2, num_ctx_tokens=300, num_generation_requests=5,
    num_generation_tokens=5, elapsed_ms=12.5, is_dummy=False,
)  # fmt: skip
NEW = SimpleNamespace(
    num_running_reqs=7, num_waiting_reqs=3, num_skipped_waiting_reqs=1, kv_cache_usage=0.5,
    iteration_details=DETAILS,
)  # fmt: skip
COUNTS = SimpleNamespace(
    num_generation_tokens=6, num_prompt_tokens=300, time_to_first_tokens_iter=[0.1],
    inter_token_latencies_iter=[0.02] * 5,
)  # fmt: skip


@pytest.fixture
def ours(monkeypatch):
    for name in ("MODE", "CONFIG", "FPM"):
        monkeypatch.delenv(f"VOLTANA_CTRL_{name}", raising=False)
    return install_vllm(monkeypatch)


def last(logger):
    return logger.hook.engine.recent[-1]


def test_nothing_of_vllm_is_imported_before_it_is_asked_for():
    program = (
        "import sys; import voltana_ctrl.engines.vllm, voltana_ctrl.engines.sglang;"
        " print(sorted({m.partition('.')[0] for m in sys.modules} & {'vllm', 'sglang', 'zmq'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_classes_are_of_vllm_and_travel_by_name(ours):
    from tests.helpers.fake_engines import Scheduler, StatLoggerBase

    assert issubclass(ours.StatLogger, StatLoggerBase)
    assert issubclass(ours.GovernedScheduler, Scheduler)
    for made in (ours.StatLogger, ours.GovernedScheduler):
        assert pickle.loads(pickle.dumps(made)) is made
    with pytest.raises(AttributeError):
        ours.Absent  # noqa: B018


def test_the_scheduler_is_the_one_that_vllm_would_choose(ours, monkeypatch):
    """The one that runs ahead only where vLLM schedules while the batch before computes."""
    from tests.helpers.fake_engines import AsyncScheduler, Scheduler

    told = {None: Scheduler, True: AsyncScheduler, False: Scheduler}
    for ahead, base in told.items():
        config = vllm_config("kv_producer")
        if ahead is not None:  # older versions do not say
            config.scheduler_config.async_scheduling = ahead
        for scheduler in (
            ours.GovernedScheduler(vllm_config=config),
            ours.GovernedScheduler(config),
        ):
            assert isinstance(scheduler, AsyncScheduler) == (base is AsyncScheduler)
            scheduler.batches = [output({"a": 200})]
            scheduler.update_from_output(scheduler.schedule(), None)
            assert scheduler._voltana.engine.role is Role.PREFILL
            scheduler.shutdown()
            assert scheduler.shut_down
    monkeypatch.setenv("VOLTANA_CTRL_BASE", "vllm.v1.core.sched.scheduler.Scheduler")
    del vars(ours)["GovernedScheduler"]
    config.scheduler_config.async_scheduling = True
    assert not isinstance(ours.GovernedScheduler(vllm_config=config), AsyncScheduler)


def test_iteration_details_are_taken_as_they_are(ours):
    logger = ours.StatLogger(vllm_config("kv_consumer"), 0)
    logger.log_engine_initialized()
    logger.record(scheduler_stats=NEW, iteration_stats=COUNTS, mm_cache_stats=None, engine_idx=0)
    one = last(logger)
    assert (one.wall_s, one.prefill_req, one.prefill_tok, one.decode_req) == (0.0125, 2, 300, 5)
    assert (one.decode_kv_tok, one.queued_prefill_req, one.queued_prefill_tok) == (8000, 4, 600)
    assert logger.hook.engine.role is Role.DECODE
    assert logger.hook.engine.clock is None


def test_idle_and_dummy_reports_are_no_iterations(ours):
    logger = ours.StatLogger(vllm_config(), 0)
    idle = SimpleNamespace(num_running_reqs=0, num_waiting_reqs=0, kv_cache_usage=0.0)
    dummy = SimpleNamespace(**{**vars(NEW), "iteration_details": SimpleNamespace(is_dummy=True)})
    for stats, counts in ((idle, None), (None, None), (dummy, COUNTS)):
        logger.record(stats, counts)
    assert logger.hook.engine.iterations == 0


def test_older_versions_are_counted_per_iteration(ours):
    logger = ours.StatLogger(vllm_config(), 0)
    old = SimpleNamespace(num_running_reqs=7, num_waiting_reqs=3, kv_cache_usage=0.5)
    logger.record(old, COUNTS)
    time.sleep(0.03)
    logger.record(old, COUNTS)
    one = last(logger)
    assert 0.03 <= one.wall_s < 1.0
    assert (one.prefill_req, one.prefill_tok, one.decode_req) == (1, 300, 5)
    older = SimpleNamespace(num_prompt_tokens=0, time_per_output_tokens_iter=[0.02] * 4)
    logger.record(old, older)
    assert last(logger).decode_req == 4
    assert logger.hook.engine.iterations == 3


@pytest.mark.parametrize("missing", ["num_waiting_reqs", "kv_cache_usage", "iteration_details"])
def test_what_a_version_does_not_have_counts_as_nothing(ours, missing):
    stats = SimpleNamespace(**vars(NEW))
    delattr(stats, missing)
    logger = ours.StatLogger(SimpleNamespace(), 0)  # not even a cache configuration
    logger.record(stats, COUNTS)
    assert logger.hook.engine.iterations == 1
    assert logger.hook.engine.errors == 0


def test_a_report_of_another_world_never_reaches_the_engine(ours):
    logger = ours.StatLogger(vllm_config(), 0)
    engine = logger.hook.engine
    odd = SimpleNamespace(iteration_details=SimpleNamespace(elapsed_ms="soon"))
    for _ in range(20):
        logger.record(odd, None)
    assert logger.hook.engine is None  # switched off
    assert engine.errors == 10


def test_the_scheduler_passes_everything_through(ours):
    scheduler = ours.GovernedScheduler(vllm_config=vllm_config("kv_producer"))
    batch = output({"a": 200, "b": 100, "c": 1}, new=("a", "b"))
    scheduler.batches = [batch]
    assert scheduler.schedule(throttle_prefills=True) is batch
    assert scheduler.update_from_output(batch, None) == {"updated": batch}
    scheduler.shutdown()
    assert scheduler.shut_down


def test_the_scheduler_sees_what_ran(ours):
    scheduler = ours.GovernedScheduler(vllm_config=vllm_config())
    scheduler.waiting = [request(120)] * 100
    batches = [
        output({"a": 200, "b": 100, "c": 1}),
        output({"a": 1, "b": 1, "c": 1}),
        output({"a": 3, "b": 1}, drafts={"a": [1, 2]}),
        output({}),
        output({"a": 1}),
        output({"a": 1}),
    ]
    for batch in batches:
        time.sleep(0.005)
        scheduler.update_from_output(batch, None)
    seen = scheduler._voltana.engine.recent
    # The first batch, and the first after a pause, have no time of their own.
    assert [(p.prefill_req, p.prefill_tok, p.decode_req) for p in seen] == [
        (0, 0, 3), (0, 0, 2), (0, 0, 1),
    ]  # fmt: skip
    assert all(one.wall_s >= 0.005 for one in seen)
    assert seen[0].queued_prefill_tok == 12_000
    assert seen[0].decode_kv_tok == 4000


def test_versions_without_these_attributes_are_governed_by_counts(ours):
    scheduler = ours.GovernedScheduler(vllm_config=None)
    for name in ("waiting", "kv_cache_manager", "requests"):
        delattr(scheduler, name)
    batch = SimpleNamespace(num_scheduled_tokens={"a": 1})
    scheduler.batches = [batch] * 3
    for _ in range(3):
        scheduler.schedule()
        time.sleep(0.002)
        scheduler.update_from_output(batch, None)
    assert scheduler._voltana.engine.errors == 0
    assert scheduler._voltana.engine.iterations == 2


def test_the_capacity_that_the_engine_tells_comes_first(ours):
    """Of hybrid models, and of several data-parallel engines, blocks tell too much."""
    config = vllm_config()
    scheduler = ours.GovernedScheduler(vllm_config=config)
    assert scheduler._voltana._kv_tok() == 0.25 * 16_000
    config.cache_config.kv_cache_size_tokens = 4000
    assert scheduler._voltana._kv_tok() == 0.25 * 4000
    logger = ours.StatLogger(config)
    logger.record(
        SimpleNamespace(kv_cache_usage=0.5),
        SimpleNamespace(num_prompt_tokens=0, inter_token_latencies_iter=[0.01]),
    )
    assert logger.hook.engine.recent[-1].decode_kv_tok == 2000.0


def act(monkeypatch, fake, folder, **more):
    for name, value in environment(fake, folder, **more).items():
        monkeypatch.setenv(name, value)


@needs_compiler
def test_the_scheduler_sets_the_clock_before_the_batch_runs(ours, monkeypatch, tmp_path):
    with machine(tmp_path) as fake:
        act(monkeypatch, fake, tmp_path)
        scheduler = ours.GovernedScheduler(vllm_config=vllm_config("kv_consumer"))
        clock = scheduler._voltana.engine.clock
        try:
            scheduler.batches = [output({"a": 1})]
            scheduler.kv_cache_manager.usage = 0.01
            scheduler.schedule()
            assert clock.settle()
            low_mhz = fake.gpus[0].lock_hi_mhz
            scheduler.batches = [output({str(k): 1 for k in range(250)})]
            scheduler.vllm_config.cache_config.num_gpu_blocks = 25_000
            scheduler.kv_cache_manager.usage = 0.9
            scheduler.schedule()
            assert clock.settle()
            assert low_mhz < fake.gpus[0].lock_hi_mhz
        finally:
            scheduler.shutdown()
        assert not fake.gpus[0].locked


@needs_compiler
@pytest.mark.parametrize("batch_req", [16, 256])
def test_our_work_inside_schedule_is_short(ours, monkeypatch, tmp_path, batch_req):
    with machine(tmp_path) as fake:
        act(monkeypatch, fake, tmp_path)
        scheduler = ours.GovernedScheduler(vllm_config=vllm_config())
        hook = scheduler._voltana
        scheduler.waiting = [request(500, waited_s=0.01) for _ in range(200)]
        names = [f"cmpl-{k}" for k in range(batch_req)]
        decode = output(dict.fromkeys(names, 1))
        mixed = output({**dict.fromkeys(names, 1), "new": 512}, new=("new",))
        scheduler.requests["new"] = request(512)
        took_s = np.empty(4000)
        try:
            for k in range(len(took_s)):
                batch = mixed if k % 8 == 0 else decode
                begin_s = time.thread_time_ns()
                hook.scheduled(batch)
                took_s[k] = (time.thread_time_ns() - begin_s) * 1e-9
        finally:
            scheduler.shutdown()
        p50_s, p99_s = np.quantile(took_s[200:], [0.5, 0.99])
        assert hook.engine.errors == 0
        assert p99_s <= 50e-6, f"p50 {p50_s * 1e6:.1f} us, p99 {p99_s * 1e6:.1f} us"
