"""SGLang's hook with fakes of its modules."""

import time
from types import SimpleNamespace

import pytest

from tests.engines.test_in_engine import environment
from tests.helpers.fake_engines import module
from tests.helpers.fake_gpus import machine, needs_compiler
from voltana_ctrl.engines.sglang import BatchHook, register
from voltana_ctrl.types import Role


class ForwardMode:
    def __init__(self, value):
        self.value = value

    def is_extend(self):
        return self.value == 1


def batch(n, *, prefill_tok=0, seq_lens_sum=900):
    return SimpleNamespace(
        reqs=[SimpleNamespace(queue_time_start=time.perf_counter() - 0.2)] * n,
        forward_mode=ForwardMode(1 if prefill_tok else 2),
        extend_num_tokens=prefill_tok,
        seq_lens_sum=seq_lens_sum,
    )


def scheduler(mode="null", **more):
    waiting = [SimpleNamespace(origin_input_ids=[1] * 50)] * 4
    return SimpleNamespace(
        disaggregation_mode=SimpleNamespace(value=mode), waiting_queue=waiting, tp_rank=0, **more
    )


def run(hook, one, of, wall_s=0.004):
    def run_batch(self, batch, *args, **kwargs):
        time.sleep(wall_s)
        return "result", args, kwargs

    return hook.around(run_batch, one, of, 3, x=4)


def test_it_registers_around_every_batch(monkeypatch):
    registered = []
    registry = SimpleNamespace(register=lambda *args: registered.append(args))
    module(
        monkeypatch,
        "sglang.srt.plugins.hook_registry",
        HookRegistry=registry,
        HookType=SimpleNamespace(AROUND="around"),
    )
    register()
    (target, hook, kind), = registered  # fmt: skip
    assert target == "sglang.srt.managers.scheduler.Scheduler.run_batch"
    assert kind == "around"
    assert hook.__func__ is BatchHook.around


def test_batches_are_seen_and_passed_through():
    hook = BatchHook()
    one = scheduler("decode")
    assert run(hook, one, batch(5)) == ("result", (3,), {"x": 4})
    run(hook, one, batch(2, prefill_tok=300))
    decode, prefill = hook.engine.recent
    assert (decode.decode_req, decode.decode_kv_tok, decode.prefill_req) == (5, 900, 0)
    assert (prefill.prefill_req, prefill.prefill_tok, prefill.decode_req) == (2, 300, 0)
    assert (prefill.queued_prefill_req, prefill.queued_prefill_tok) == (4, 200)
    assert decode.wall_s >= 0.004
    assert hook.engine.role is Role.DECODE
    assert hook.engine.clock is None


def test_overlapped_batches_are_timed_from_one_to_the_next():
    hook = BatchHook()
    one = scheduler(enable_overlap=True)
    for _ in range(3):
        time.sleep(0.01)
        run(hook, one, batch(5), wall_s=0.0)
    assert len(hook.engine.recent) == 2  # the first has no time
    assert all(p.wall_s >= 0.01 for p in hook.engine.recent)


def test_a_version_without_anything_of_it_still_runs():
    hook = BatchHook()
    assert run(hook, SimpleNamespace(), SimpleNamespace(reqs=[1]))[0] == "result"
    assert (hook.engine.errors, hook.engine.iterations) == (0, 1)
    for _ in range(20):
        assert run(hook, SimpleNamespace(), SimpleNamespace(reqs=3), wall_s=0.0)[0] == "result"
    assert hook._off


def test_an_error_of_the_engine_is_its_own():
    def fails(self, batch):
        raise RuntimeError("out of memory")

    hook = BatchHook()
    with pytest.raises(RuntimeError, match="out of memory"):
        hook.around(fails, scheduler(), batch(1))
    assert hook.engine.errors == 0


@pytest.mark.parametrize(
    ("ranks", "speaks"),
    [
        ({"tp_rank": 0, "pp_rank": 0}, True),
        ({"tp_rank": 1, "pp_rank": 0}, False),
        ({"tp_rank": 0, "pp_rank": 1}, False),
        # Data-parallel attention: tensor rank 3 is the first of its own group.
        ({"tp_rank": 3, "attn_tp_rank": 0, "attn_cp_rank": 0, "dp_rank": 3}, True),
        ({"tp_rank": 3, "attn_tp_rank": 1, "attn_cp_rank": 0, "dp_rank": 1}, False),
        # Context parallel: every rank is the first of its tensor group, and runs the same batch.
        ({"tp_rank": 3, "attn_tp_rank": 0, "attn_cp_rank": 3}, False),
    ],
)
def test_one_rank_speaks_for_those_that_run_the_same_batch(monkeypatch, tmp_path, ranks, speaks):
    monkeypatch.setenv("VOLTANA_CTRL_FPM", f"ipc://{tmp_path}/fpm")
    hook = BatchHook()
    run(hook, SimpleNamespace(**ranks), batch(1), wall_s=0.0)
    published = hook.engine._publisher is not None
    hook.engine.close()
    assert published == speaks


@needs_compiler
def test_the_first_rank_alone_acts(monkeypatch, tmp_path):
    with machine(tmp_path) as fake:
        for name, value in environment(fake, tmp_path).items():
            monkeypatch.setenv(name, value)
        second = BatchHook()
        run(second, SimpleNamespace(tp_rank=1), batch(1))
        assert second.engine.clock is None
        hook = BatchHook()
        try:
            run(hook, scheduler("decode"), batch(4))
            assert hook.engine.clock.settle()
            assert fake.gpus[0].locked
        finally:
            hook.engine.close()
        assert not fake.gpus[0].locked
