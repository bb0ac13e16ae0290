"""SGLang from inside: a plugin around every batch of its scheduler.

Found by its entry point (group ``sglang.srt.plugins``) once this package is installed, and
configured as :mod:`voltana_ctrl.engines.in_engine` says. It runs in the scheduler's
process, before and after ``Scheduler.run_batch``. With overlapped scheduling the batch has
only been launched when that returns; its time is then that between two batches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.in_engine import InEngine, seconds_since, settings_of_process
from voltana_ctrl.types import Role

__all__ = ["BatchHook", "register"]

_TARGET = "sglang.srt.managers.scheduler.Scheduler.run_batch"
_LOOKED_AT = 16
# Longer between two batches of an overlapped scheduler is a pause.
_MAX_WALL_S = 60.0


def register() -> None:
    """Entry point: put ourselves around every batch."""
    hooks: Any = import_module("sglang.srt.plugins.hook_registry")
    hook = BatchHook()
    hooks.HookRegistry.register(_TARGET, hook.around, hooks.HookType.AROUND)


class BatchHook:
    """What happens around a batch; set up at the first one, in the scheduler's process."""

    def __init__(self) -> None:
        self.engine: InEngine | None = None
        self._off = False
        self._ended_s: float | None = None

    def around(
        self, run_batch: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a batch, with the clock chosen before and its time taken after.

        Parameters
        ----------
        run_batch : callable
            SGLang's own ``Scheduler.run_batch``.
        scheduler, batch : object
            SGLang's scheduler, and the batch that is to run.
        *args, **kwargs
            Passed on to `run_batch`.

        Returns
        -------
        object
            What `run_batch` returned.
        """
        if self._off:
            return run_batch(scheduler, batch, *args, **kwargs)
        if self.engine is None:
            # A setting that is wrong stops the engine here, at its first batch.
            self.engine = InEngine(
                settings_of_process(),
                role_of(scheduler),
                dp_rank=int(getattr(scheduler, "dp_rank", None) or 0),
                acts=_is_first_rank(scheduler),
                publishes=_is_first_rank(scheduler),
            )
        self._guarded(self._before, scheduler, batch)
        begin_s = time.monotonic()
        result = run_batch(scheduler, batch, *args, **kwargs)
        self._guarded(self._after, scheduler, batch, begin_s)
        return result

    def _guarded(self, hook: Callable[..., None], *args: Any) -> None:
        if self.engine is None or self._off:
            return
        try:
            hook(self.engine, *args)
        except Exception as error:  # noqa: BLE001  the engine must not fail by being observed
            self._off = self.engine.failed(error)

    def _before(self, engine: InEngine, scheduler: Any, batch: Any) -> None:
        if engine.clock is None:
            return
        prefill_tok = _prefill_tok(batch)
        waiting = getattr(scheduler, "waiting_queue", None) or ()
        requests = getattr(batch, "reqs", None) or ()
        oldest = next(iter(requests if prefill_tok else waiting), None)
        engine.before(
            running_req=0.0 if prefill_tok else float(len(requests)),
            kv_used_tok=_kv_tok(batch),
            waiting_tok=prefill_tok + _estimated_tok(waiting),
            batch_tok=prefill_tok,
            oldest_wait_s=_waited_s(oldest),
        )

    def _after(self, engine: InEngine, scheduler: Any, batch: Any, begin_s: float) -> None:
        now_s = time.monotonic()
        wall_s = now_s - begin_s
        before_s, self._ended_s = self._ended_s, now_s
        if getattr(scheduler, "enable_overlap", False):
            if before_s is None or now_s - before_s > _MAX_WALL_S:
                return
            wall_s = now_s - before_s
        requests = float(len(getattr(batch, "reqs", None) or ()))
        prefill_tok = _prefill_tok(batch)
        waiting = getattr(scheduler, "waiting_queue", None) or ()
        if not requests:
            return
        engine.after(
            ForwardPass(
                wall_s=wall_s,
                prefill_req=requests if prefill_tok else 0.0,
                prefill_tok=prefill_tok,
                decode_req=0.0 if prefill_tok else requests,
                decode_kv_tok=0.0 if prefill_tok else _kv_tok(batch),
                queued_prefill_req=float(len(waiting)),
                queued_prefill_tok=_estimated_tok(waiting),
            )
        )


def role_of(scheduler: Any) -> Role:
    """What an engine does, from its disaggregation mode: colocated where it has none."""
    mode = getattr(scheduler, "disaggregation_mode", None)
    roles = {"prefill": Role.PREFILL, "decode": Role.DECODE}
    return roles.get(str(getattr(mode, "value", mode)), Role.COLOCATED)


def _is_first_rank(scheduler: Any) -> bool:
    """Ranks of one model run the same batch; the first one speaks and acts for all.

    With data-parallel attention each group has a batch, and a first rank, of its own.
    """
    tensor = "tp_rank" if getattr(scheduler, "attn_tp_rank", None) is None else "attn_tp_rank"
    return not any(getattr(scheduler, name, None) for name in (tensor, "attn_cp_rank", "pp_rank"))


def _prefill_tok(batch: Any) -> float:
    mode = getattr(batch, "forward_mode", None)
    is_extend = getattr(mode, "is_extend", None)
    extends = is_extend() if callable(is_extend) else getattr(mode, "value", mode) == 1
    return float(getattr(batch, "extend_num_tokens", None) or 0) if extends else 0.0


def _kv_tok(batch: Any) -> float:
    total = getattr(batch, "seq_lens_sum", None)
    return float(total) if isinstance(total, int | float) else 0.0


def _estimated_tok(waiting: Any) -> float:
    """Prompt tokens in a queue, of which only the head is looked at."""
    head = [
        len(getattr(request, "origin_input_ids", None) or ())
        for request in itertools.islice(waiting, _LOOKED_AT)
    ]
    return sum(head) * len(waiting) / len(head) if head else 0.0


def _waited_s(request: Any) -> float:
    stats = getattr(request, "time_stats", None)
    for owner, name in ((request, "queue_time_start"), (stats, "wait_queue_entry_time")):
        t_s = getattr(owner, name, None)
        if isinstance(t_s, int | float) and t_s > 0.0:
            # SGLang keeps it on the performance counter.
            return max(0.0, time.perf_counter() - t_s)
    return seconds_since(getattr(request, "arrival_time", None))
