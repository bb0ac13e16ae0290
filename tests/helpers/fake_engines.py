"""Stand-ins for the modules of vLLM and SGLang that the plugins look at."""

import sys
import time
import types
from abc import ABC, abstractmethod
from types import SimpleNamespace


def module(monkeypatch, path, **names):
    """A module that can be imported, with its parents."""
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, value in names.items():
        setattr(sys.modules[path], name, value)
    return sys.modules[path]


class StatLoggerBase(ABC):
    @abstractmethod
    def __init__(self, vllm_config, engine_index=0): ...

    @abstractmethod
    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0): ...

    @abstractmethod
    def log_engine_initialized(self): ...


def vllm_config(kv_role=None, **more):
    return SimpleNamespace(
        kv_transfer_config=None if kv_role is None else SimpleNamespace(kv_role=kv_role),
        cache_config=SimpleNamespace(num_gpu_blocks=1000, block_size=16),
        parallel_config=SimpleNamespace(data_parallel_rank=0),
        scheduler_config=SimpleNamespace(scheduler_cls=None, max_num_seqs=256),
        **more,
    )


class Scheduler:
    """Schedules what a test put into `batches`."""

    def __init__(self, vllm_config=None, **_):
        self.vllm_config = vllm_config
        self.batches = []
        self.waiting = []
        self.running = []
        self.requests = {}
        self.kv_cache_manager = SimpleNamespace(usage=0.25)
        self.shut_down = False

    def schedule(self, throttle_prefills=False):
        return self.batches.pop(0)

    def update_from_output(self, scheduler_output, model_runner_output):
        return {"updated": scheduler_output}

    def shutdown(self):
        self.shut_down = True


class AsyncScheduler(Scheduler):
    pass


def output(tokens, new=(), drafts=None):
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
        scheduled_spec_decode_tokens=drafts or {},
    )


def request(num_tokens=100, waited_s=0.0):
    return SimpleNamespace(num_tokens=num_tokens, arrival_time=time.time() - waited_s)


def install_vllm(monkeypatch):
    module(monkeypatch, "vllm.v1.metrics.loggers", StatLoggerBase=StatLoggerBase)
    module(monkeypatch, "vllm.v1.core.sched.scheduler", Scheduler=Scheduler)
    module(monkeypatch, "vllm.v1.core.sched.async_scheduler", AsyncScheduler=AsyncScheduler)
    import voltana_ctrl.engines.vllm as ours

    for name in ("StatLogger", "GovernedScheduler"):
        monkeypatch.delitem(vars(ours), name, raising=False)
        monkeypatch.setitem(vars(ours), name, None)
        del vars(ours)[name]
    return ours
