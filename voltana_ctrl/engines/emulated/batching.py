"""What an emulated engine runs next: continuous batching with chunked prefill, without time.

The rules are those of the simulated plant (:mod:`voltana_ctrl.kernels.plant.batching`), for one
instance and in plain Python, since an engine in real time has an iteration to think them over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from voltana_ctrl.types import InstanceSpec

__all__ = ["Batch", "Job", "Plan"]

#: Share of the KV cache kept free at admission, as vLLM's watermark.
_WATERMARK_FRAC = 0.01


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request in an engine.

    Parameters
    ----------
    prompt_tok, output_tok : int
        Tokens of its prompt, and tokens that it is to generate.
    arrived_s : float
        When it came, in seconds.
    tell : callable
        Called with the number of tokens generated so far, at each new one.
    moved : bool
        Whether its prompt was prefilled elsewhere, and its KV cache has been moved here.

    Examples
    --------
    >>> Job(prompt_tok=100, output_tok=5, arrived_s=0.0, tell=print).made_tok
    0
    """

    prompt_tok: int
    output_tok: int
    arrived_s: float
    tell: Callable[[int], None]
    moved: bool = False
    made_tok: int = 0
    todo_tok: int = 0
    context_tok: int = 0
    chunk_tok: int = 0
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one iteration does.

    Parameters
    ----------
    batch_req, kv_tok : int
        Requests that decode in it, and KV tokens that all requests hold.
    chunk_req, chunk_tok, begun_req : int
        Prompts of which a part is prefilled, tokens of these parts, and prompts that begin with it.
    chunk_tok2 : float
        Squared context that these attend to: the coefficient of the quadratic time.

    Examples
    --------
    >>> Plan(batch_req=0, kv_tok=0, chunk_req=0, chunk_tok=0, begun_req=0, chunk_tok2=0.0).idle
    True
    """

    batch_req: int
    kv_tok: int
    chunk_req: int
    chunk_tok: int
    begun_req: int
    chunk_tok2: float

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.batch_req == 0 and self.chunk_tok == 0


@dataclass(slots=True, eq=False)
class Batch:
    """Queues and running requests of one engine.

    Parameters
    ----------
    instance : InstanceSpec
        Limits of the engine: batch, KV cache, prefill budget.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> batch, told = Batch(fleet.instances[0]), []
    >>> batch.add(Job(prompt_tok=300, output_tok=3, arrived_s=0.0, tell=told.append))
    >>> while not (plan := batch.plan()).idle:
    ...     batch.finish(plan)
    >>> told, batch.kv_tok
    ([1, 2, 3], 0)
    """

    instance: InstanceSpec
    prefill: deque[Job] = field(default_factory=deque)
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[int, Job] = field(default_factory=dict)
    kv_tok: int = 0

    @property
    def queue_req(self) -> int:
        """Requests that are not in the running batch."""
        return len(self.prefill) + len(self.waiting)

    @property
    def queue_tok(self) -> int:
        """Their prompt tokens that are not prefilled yet, or wait with their KV."""
        return sum(job.todo_tok for job in self.prefill) + sum(
            job.prompt_tok for job in self.waiting
        )

    def add(self, job: Job) -> None:
        """Take a request in.

        Parameters
        ----------
        job : Job
            The request; where its KV cache has been moved here it has its first token already.
        """
        if job.moved:
            job.made_tok = max(job.made_tok, 1)
            self.waiting.append(job)
        else:
            job.todo_tok = job.prompt_tok
            self.prefill.append(job)

    def drop(self, job: Job) -> None:
        """Forget a request whose client has left; noticed when the next iteration is planned.

        Parameters
        ----------
        job : Job
            The request.
        """
        job.gone = True

    def plan(self) -> Plan:
        """Admit requests, make room for them, and choose what the next iteration does.

        Returns
        -------
        Plan
            To be handed to :meth:`finish` once the iteration has run.
        """
        self._forget()
        one = self.instance
        prefilling = sum(job.context_tok > 0 for job in self.prefill)
        while (
            self.waiting
            and len(self.prefill) == prefilling
            and len(self.running) + prefilling < one.max_batch
        ):
            job = self.waiting[0]
            need_tok = job.prompt_tok + job.made_tok
            if not self._fits(need_tok):
                break
            self.waiting.popleft()
            job.context_tok = need_tok
            self.kv_tok += need_tok
            self.running[id(job)] = job
        while len(self.running) > 1 and self.kv_tok + len(self.running) > one.kv_capacity_tok:
            self._preempt(prefilling)
        batch_req = len(self.running)
        budget_tok = one.prefill_budget_tok - batch_req
        chunk_req = chunk_tok = begun_req = 0
        chunk_tok2 = 0.0
        for job in self.prefill:
            if budget_tok <= 0 or chunk_req >= one.max_prefill_req:
                break
            if job.context_tok == 0:
                need_tok = job.prompt_tok + job.made_tok
                if batch_req + prefilling >= one.max_batch or not self._fits(need_tok):
                    break
                self.kv_tok += need_tok
                job.context_tok = need_tok
                prefilling += 1
                begun_req += 1
            job.chunk_tok = min(job.todo_tok, budget_tok)
            start_tok = float(job.context_tok - job.todo_tok)
            chunk_tok2 += (start_tok + job.chunk_tok) ** 2 - start_tok**2
            chunk_tok += job.chunk_tok
            budget_tok -= job.chunk_tok
            chunk_req += 1
        return Plan(
            batch_req=batch_req,
            kv_tok=self.kv_tok,
            chunk_req=chunk_req,
            chunk_tok=chunk_tok,
            begun_req=begun_req,
            chunk_tok2=chunk_tok2,
        )

    def finish(self, plan: Plan) -> None:
        """Hand out what an iteration has made.

        Parameters
        ----------
        plan : Plan
            What :meth:`plan` returned; nothing else may have been planned since.
        """
        for job in list(self.running.values()) if plan.batch_req else ():
            self.kv_tok += 1
            job.context_tok += 1
            self._token(job)
        for _ in range(plan.chunk_req):
            job = self.prefill[0]
            job.todo_tok -= job.chunk_tok
            if job.todo_tok > 0:
                break
            self.prefill.popleft()
            self.running[id(job)] = job
            if job.made_tok == 0:  # else it was computed anew
                job.context_tok += 1
                self.kv_tok += 1
                self._token(job)

    def _token(self, job: Job) -> None:
        job.made_tok += 1
        if job.made_tok >= job.output_tok:
            del self.running[id(job)]
            self.kv_tok -= job.context_tok
        job.tell(job.made_tok)

    def _fits(self, need_tok: int) -> bool:
        if self.kv_tok == 0:
            return True
        after_tok = self.kv_tok + need_tok + len(self.running)
        return after_tok <= (1.0 - _WATERMARK_FRAC) * self.instance.kv_capacity_tok

    def _preempt(self, prefilling: int) -> None:
        """Send the latest admitted request back: its KV is dropped and recomputed later."""
        _, job = self.running.popitem()
        self.kv_tok -= job.context_tok
        job.todo_tok, job.context_tok = job.prompt_tok + job.made_tok, 0
        self.prefill.insert(prefilling, job)

    def _forget(self) -> None:
        for job in [one for one in self.running.values() if one.gone]:
            del self.running[id(job)]
            self.kv_tok -= job.context_tok
        for line in (self.prefill, self.waiting):
            for job in [one for one in line if one.gone]:
                line.remove(job)
                self.kv_tok -= job.context_tok
