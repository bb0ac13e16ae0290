"""vLLM from inside: a stat logger that observes, a scheduler that chooses clocks.

The stat logger is found by its entry point (group ``vllm.stat_logger_plugins``) once this
package is installed; it sees every iteration after it ran, and never sets a clock. The
scheduler class (``--scheduler-cls voltana_ctrl.engines.vllm.GovernedScheduler``) sees it
before it runs, and sets the clock where ``VOLTANA_CTRL_MODE=act``. Both are configured as
:mod:`voltana_ctrl.engines.in_engine` says.

vLLM calls neither interface stable: whatever is missing in a version counts as 0. Batch and
time of an iteration are exact from 0.28 with ``--enable-logging-iteration-details``; before,
the batch is counted from its tokens and the time is that between two reports.

Nothing here imports vLLM before one of the two classes is asked for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from importlib import import_module
from typing import Any

from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.in_engine import InEngine, seconds_since, settings_of_process
from voltana_ctrl.types import Role
from voltana_ctrl.units import s_from_ms

__all__ = ["SchedulerHook", "StatHook", "role_of"]

# As vLLM chooses them, by whether it schedules while the batch before computes.
_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
_AHEAD = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
_STAT_LOGGER = "vllm.v1.metrics.loggers.StatLoggerBase"
# Of a long queue the rest is taken to be like its head.
_LOOKED_AT = 16
# A pause is no iteration.
_MAX_WALL_S = 60.0


def role_of(vllm_config: Any) -> Role:
    """What an engine does, from its KV transfer configuration.

    Parameters
    ----------
    vllm_config : VllmConfig
        Configuration of the engine, as vLLM hands it to its plugins.

    Returns
    -------
    Role
        Prefill for ``kv_producer``, decode for ``kv_consumer``, else colocated.
    """
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    roles = {"kv_producer": Role.PREFILL, "kv_consumer": Role.DECODE}
    return roles.get(getattr(transfer, "kv_role", None) or "", Role.COLOCATED)


def _capacity_tok(vllm_config: Any) -> float:
    """Tokens that the KV cache of one engine holds: as it says itself, else by its blocks.

    Blocks are those of all data-parallel engines in the server's process, and say nothing of
    models with layers of several kinds.
    """
    cache = getattr(vllm_config, "cache_config", None)
    own_tok = getattr(cache, "kv_cache_size_tokens", None)
    if own_tok:
        return float(own_tok)
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    return float(blocks or 0) * float(size or 0)


def _dp_rank(vllm_config: Any) -> int:
    parallel = getattr(vllm_config, "parallel_config", None)
    return int(getattr(parallel, "data_parallel_rank", None) or 0)


class StatHook:
    """Counts, and publishes, the iterations that vLLM's statistics tell of; sets no clock.

    It publishes only where the scheduler is not ours, which else does.

    Parameters
    ----------
    vllm_config : VllmConfig
        Configuration of the engine.
    engine_index : int
        Its data-parallel rank.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        settings = settings_of_process()
        # Only one of the two classes may publish: the scheduler, where it is ours.
        scheduler = getattr(getattr(vllm_config, "scheduler_config", None), "scheduler_cls", None)
        ours = "GovernedScheduler" in str(scheduler)
        self.engine: InEngine | None = InEngine(
            settings, role_of(vllm_config), dp_rank=engine_index, acts=False, publishes=not ours
        )
        self._vllm_config = vllm_config
        self._last_s: float | None = None
        self._prompts_req = self._prompts_tok = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Take one report; reports of an idle engine are no iterations.

        Parameters
        ----------
        scheduler_stats, iteration_stats : object or None
            As vLLM hands them to a stat logger.
        """
        if self.engine is None:
            return
        try:
            one = self._pass(scheduler_stats, iteration_stats)
            if one is not None:
                self.engine.after(one)
        except Exception as error:  # noqa: BLE001  the engine must not fail by being observed
            if self.engine.failed(error):
                self.engine = None

    def _pass(self, scheduler_stats: Any, iteration_stats: Any) -> ForwardPass | None:
        now_s = time.monotonic()
        since_s = 0.0 if self._last_s is None else min(now_s - self._last_s, _MAX_WALL_S)
        details = getattr(scheduler_stats, "iteration_details", None)
        if details is not None:
            if getattr(details, "is_dummy", False):
                return None
            batch = _batch_of_details(details)
        elif iteration_stats is not None:
            batch = _batch_of_counts(iteration_stats, since_s)
        else:
            batch = {}
        if not any(batch.get(name) for name in ("prefill_req", "decode_req", "prefill_tok")):
            self._last_s = now_s
            return None
        self._last_s = now_s
        used_frac = getattr(scheduler_stats, "kv_cache_usage", None) or 0.0
        kv_tok = used_frac * _capacity_tok(self._vllm_config)
        waiting = _number(scheduler_stats, "num_waiting_reqs")
        waiting += _number(scheduler_stats, "num_skipped_waiting_reqs")
        self._prompts_req += batch["prefill_req"]
        self._prompts_tok += batch["prefill_tok"]
        return ForwardPass(
            **batch,  # type: ignore[arg-type]
            decode_kv_tok=kv_tok,
            queued_prefill_req=waiting,
            # Their lengths are not told: they are taken to be like those before.
            queued_prefill_tok=waiting * self._prompts_tok / max(1.0, self._prompts_req),
        )

    def close(self) -> None:
        """Stop publishing."""
        if self.engine is not None:
            self.engine.close()


def _number(stats: Any, name: str) -> float:
    return float(getattr(stats, name, None) or 0.0)


def _batch_of_details(details: Any) -> dict[str, float]:
    return {
        "wall_s": s_from_ms(_number(details, "elapsed_ms")),
        "prefill_req": _number(details, "num_ctx_requests"),
        "prefill_tok": _number(details, "num_ctx_tokens"),
        "decode_req": _number(details, "num_generation_requests"),
    }


def _batch_of_counts(stats: Any, since_s: float) -> dict[str, float]:
    """Batch from what its requests got: a first token is a prefill, a later one a decode."""
    firsts = len(getattr(stats, "time_to_first_tokens_iter", None) or ())
    laters = len(getattr(stats, "inter_token_latencies_iter", None) or ())
    if not laters:  # named otherwise before 0.11
        laters = len(getattr(stats, "time_per_output_tokens_iter", None) or ())
    return {
        "wall_s": since_s,
        "prefill_req": float(firsts),
        "prefill_tok": _number(stats, "num_prompt_tokens"),
        "decode_req": float(laters),
    }


class SchedulerHook:
    """What our scheduler class does beside vLLM's own: it chooses clocks and publishes iterations.

    Parameters
    ----------
    scheduler : object
        vLLM's scheduler, whose queue and KV cache are looked at.
    vllm_config : VllmConfig
        Configuration of the engine.
    """

    def __init__(self, scheduler: Any, vllm_config: Any) -> None:
        self.engine: InEngine | None = InEngine(
            settings_of_process(), role_of(vllm_config), dp_rank=_dp_rank(vllm_config)
        )
        self._scheduler = scheduler
        self._vllm_config = vllm_config
        self._updated_s: float | None = None

    def scheduled(self, output: Any) -> None:
        """Choose the clock of a batch that is about to run.

        Parameters
        ----------
        output : SchedulerOutput
            What vLLM has just scheduled.
        """
        engine = self.engine
        if engine is None or engine.clock is None:
            return
        try:
            _, prefill_tok, decode_req = _batch_of_output(output)
            waiting_tok, oldest_wait_s = self._waiting(output)
            engine.before(
                running_req=decode_req,
                kv_used_tok=self._kv_tok(),
                waiting_tok=prefill_tok + waiting_tok,
                batch_tok=prefill_tok,
                oldest_wait_s=oldest_wait_s,
            )
        except Exception as error:  # noqa: BLE001  the engine must not fail by being governed
            if engine.failed(error):
                self.engine = None

    def updated(self, output: Any) -> None:
        """Take a batch that has run.

        Parameters
        ----------
        output : SchedulerOutput
            What vLLM scheduled for this batch.
        """
        engine = self.engine
        if engine is None:
            return
        try:
            prefill_req, prefill_tok, decode_req = _batch_of_output(output)
            now_s = time.monotonic()
            if not (prefill_req or decode_req):
                self._updated_s = None  # what follows an empty batch is measured anew
                return
            wall_s = 0.0 if self._updated_s is None else now_s - self._updated_s
            self._updated_s = now_s
            if 0.0 < wall_s < _MAX_WALL_S:
                engine.after(self._pass(wall_s, prefill_req, prefill_tok, decode_req))
        except Exception as error:  # noqa: BLE001  the engine must not fail by being observed
            if engine.failed(error):
                self.engine = None

    def _pass(
        self, wall_s: float, prefill_req: float, prefill_tok: float, decode_req: float
    ) -> ForwardPass:
        waiting = getattr(self._scheduler, "waiting", None) or ()
        tok = _estimated_tok(waiting)
        return ForwardPass(
            wall_s=wall_s,
            prefill_req=prefill_req,
            prefill_tok=prefill_tok,
            decode_req=decode_req,
            decode_kv_tok=self._kv_tok(),
            queued_prefill_req=float(len(waiting)),
            queued_prefill_tok=tok,
        )

    def _kv_tok(self) -> float:
        manager = getattr(self._scheduler, "kv_cache_manager", None)
        used_frac = getattr(manager, "usage", None) or 0.0
        return used_frac * _capacity_tok(self._vllm_config)

    def _waiting(self, output: Any) -> tuple[float, float]:
        """Prompt tokens that wait behind this batch; age of the oldest prompt in both."""
        waiting = getattr(self._scheduler, "waiting", None) or ()
        new = getattr(output, "scheduled_new_reqs", None) or ()
        oldest: Any = None
        if new:
            requests = getattr(self._scheduler, "requests", None) or {}
            oldest = requests.get(getattr(new[0], "req_id", None))
        elif waiting:
            oldest = next(iter(waiting), None)
        return _estimated_tok(waiting), seconds_since(getattr(oldest, "arrival_time", None))

    def close(self) -> None:
        """Give the clock back and stop publishing."""
        if self.engine is not None:
            self.engine.close()


def _batch_of_output(output: Any) -> tuple[float, float, float]:
    """Prompts in a batch, their tokens, and requests that decode."""
    tokens = getattr(output, "num_scheduled_tokens", None) or {}
    total = getattr(output, "total_num_scheduled_tokens", None)
    if total == len(tokens):  # a token each: all of them decode, but for prompts of one token
        return 0.0, 0.0, float(total)
    drafts = getattr(output, "scheduled_spec_decode_tokens", None) or {}
    prompts = [n for name, n in tokens.items() if n > 1 and name not in drafts]
    return float(len(prompts)), float(sum(prompts)), float(len(tokens) - len(prompts))


def _estimated_tok(waiting: Collection[Any]) -> float:
    """Prompt tokens in a queue, of which only the head is looked at."""
    head = [
        getattr(request, "num_tokens", None) or 0
        for request in itertools.islice(waiting, _LOOKED_AT)
    ]
    if not head:
        return 0.0
    return float(sum(head)) * len(waiting) / len(head)


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _governed_scheduler() -> type:
    """Scheduler class on top of the one that the settings name, or of vLLM's own choice.

    vLLM chooses by its configuration, which is known when a scheduler is made, not yet when
    this class is asked for.
    """
    named = settings_of_process().base
    if named:
        return _public(_governed(_resolved(named)))

    class GovernedScheduler(_governed(_resolved(_SCHEDULER))):  # type: ignore[misc]
        """vLLM's scheduler with clocks chosen before each iteration."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            config = kwargs.get("vllm_config") or next(iter(args), None)
            scheduling = getattr(config, "scheduler_config", None)
            if getattr(scheduling, "async_scheduling", None):
                return _governed(_resolved(_AHEAD))(*args, **kwargs)
            return super().__new__(cls)

    return _public(GovernedScheduler)


def _governed(base: type) -> type:
    """Scheduler class on top of another."""

    class GovernedScheduler(base):  # type: ignore[misc]
        """A scheduler with clocks chosen before each iteration."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            config = getattr(self, "vllm_config", None) or kwargs.get("vllm_config")
            self._voltana = SchedulerHook(self, config)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            self._voltana.scheduled(output)
            return output

        def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            updated = super().update_from_output(scheduler_output, *args, **kwargs)
            self._voltana.updated(scheduler_output)
            return updated

        def shutdown(self) -> None:
            self._voltana.close()
            super().shutdown()

    return GovernedScheduler


def _stat_logger() -> type:
    base = _resolved(_STAT_LOGGER)

    class StatLogger(base):  # type: ignore[misc, valid-type]
        """Observer of every iteration, in vLLM's server process."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self.hook = StatHook(vllm_config, engine_index)

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            self.hook.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to log: the settings were told."""

    return _public(StatLogger)


def _public(made: type) -> type:
    """The class as if it stood in this module: processes hand it on by name."""
    made.__module__, made.__qualname__ = __name__, made.__name__
    return made


def __getattr__(name: str) -> Any:
    makers = {"GovernedScheduler": _governed_scheduler, "StatLogger": _stat_logger}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, makers[name]())
