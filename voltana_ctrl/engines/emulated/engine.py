"""The iterations of an emulated engine in real time, at the clock that its GPU has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from voltana_ctrl.engines.emulated.batching import Batch, Job, Plan
from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.in_engine import InEngine
from voltana_ctrl.laws.iteration import kv_transfer_s
from voltana_ctrl.types import InstanceSpec
from voltana_ctrl.types.ladder import row_down

__all__ = ["Card", "EmulatedEngine", "Punctuality"]

#: Longest time between two looks at the clock while an iteration runs.
_LOOK_S = 0.02
#: An iteration is late that ends later than it should by more than this part of its length.
_LATE_FRAC = 0.1


class Card(Protocol):
    """The GPU that an emulated engine runs on: its clock is read, its power told.

    Examples
    --------
    >>> class Fixed:
    ...     clock_mhz = 1410.0
    ...     def draw(self, power_w): self.power_w = power_w
    >>> Fixed().clock_mhz
    1410.0
    """

    @property
    def clock_mhz(self) -> float:
        """SM clock in MHz that runs now."""

    def draw(self, power_w: float) -> None:
        """Draw `power_w` watts from now on."""


@dataclass(slots=True)
class Punctuality:
    """Whether an emulation kept its times.

    Parameters
    ----------
    iterations, late : int
        Iterations so far, and those that ended later than they should by more than a tenth of
        their length.

    Examples
    --------
    >>> Punctuality(iterations=100, late=6).void
    True
    """

    iterations: int = 0
    late: int = 0

    @property
    def void(self) -> bool:
        """Whether more than 5 % of the iterations were late: what was measured does not count."""
        return self.late > 0.05 * self.iterations


class EmulatedEngine:
    """Runs iteration after iteration, each as long as the profile says; in an event loop.

    Iterations follow an absolute schedule: one that is noticed late does not delay the next. The
    clock is looked at every 20 ms, and what is left of an iteration goes on at the new one.

    Parameters
    ----------
    instance : InstanceSpec
        Instance that it stands for, whose profile and limits it obeys.
    card : Card
        GPU that it runs on.
    inside : InEngine
        The plugin in it.
    slow_frac : float
        Every iteration takes so many times as long as the profile says; may be changed meanwhile.
    now_s : callable
        Returns seconds that never go back.

    Examples
    --------
    >>> import asyncio
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.engines.in_engine import InEngine, InEngineSettings
    >>> class Fixed:
    ...     clock_mhz = 1410.0
    ...     def draw(self, power_w): pass
    >>> fleet = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> inside = InEngine(InEngineSettings(), fleet.instances[0].role)
    >>> engine = EmulatedEngine(fleet.instances[0], Fixed(), inside)
    >>> async def answer():
    ...     running = asyncio.create_task(engine.run())
    ...     tokens = [k async for k in engine.generate(prompt_tok=100, output_tok=3)]
    ...     running.cancel()
    ...     return tokens
    >>> asyncio.run(answer()), engine.punctuality.iterations
    ([1, 2, 3], 3)
    """

    def __init__(
        self,
        instance: InstanceSpec,
        card: Card,
        inside: InEngine,
        *,
        slow_frac: float = 1.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        from voltana_ctrl.kernels.law import iteration_cost

        self.instance, self.card, self.inside = instance, card, inside
        self.slow_frac = slow_frac
        self.hung = False
        self.punctuality = Punctuality()
        self.batch = Batch(instance)
        self._cost = iteration_cost
        self._rows = instance.table
        self._padded = instance.profile.padded_batch(instance.max_batch)
        self._now_s = now_s
        self._news = asyncio.Event()
        self._closed = False

    async def generate(
        self, *, prompt_tok: int, output_tok: int, moved: bool = False
    ) -> Any:  # an asynchronous generator of int
        """Take a request in, and yield 1, 2 and so on as its tokens come.

        Whoever stops iterating before the last one has left: the request is dropped.

        Parameters
        ----------
        prompt_tok, output_tok : int
            Tokens of its prompt, and tokens that it is to generate.
        moved : bool
            Whether it was prefilled elsewhere; it starts when its KV cache would be here.

        Yields
        ------
        int
            Tokens that are there, up to `output_tok`.
        """
        tokens: asyncio.Queue[int] = asyncio.Queue()
        job = Job(
            prompt_tok=prompt_tok,
            output_tok=output_tok,
            arrived_s=self._now_s(),
            tell=tokens.put_nowait,
            moved=moved,
        )
        if moved and self.instance.profile.first_token == "prefill":
            job.made_tok = 1
            yield 1  # made where it was prefilled, and streamed at once
            if output_tok == 1:
                return
        elif moved:
            job.output_tok += 1  # the first one that is told is made here
        if moved:
            await asyncio.sleep(float(kv_transfer_s(self.instance.profile, prompt_tok)))
        self.batch.add(job)
        self._news.set()
        try:
            while True:
                made = await tokens.get()
                yield made if job.output_tok == output_tok else made - 1
                if made >= job.output_tok:
                    return
        finally:
            if job.made_tok < job.output_tok:
                self.batch.drop(job)

    async def run(self) -> None:
        """Iterate until cancelled, and wait where there is nothing to do."""
        begin_s = self._now_s()
        while True:
            plan = self.batch.plan()
            if plan.idle or self.hung:
                self.card.draw(self._idle_w())
                self._news.clear()
                # An idle GPU draws by its clock, too, which others may change.
                try:
                    async with asyncio.timeout(0.2):
                        await self._news.wait()
                except TimeoutError:
                    pass
                begin_s = self._now_s()
                continue
            self._ask(plan)
            begin_s, wall_s = await self._iterate(plan, begin_s)
            self.batch.finish(plan)
            self._tell(plan, wall_s)
            await asyncio.sleep(0)  # those who wait for tokens

    async def _iterate(self, plan: Plan, begin_s: float) -> tuple[float, float]:
        """Wait until the iteration that began then is done; its end, and how long it took."""
        left_frac, t_s = 1.0, begin_s
        while True:
            whole_s, power_w = self._price(plan)
            self.card.draw(power_w)
            end_s = t_s + left_frac * whole_s
            wait_s = min(_LOOK_S, end_s - self._now_s())
            if wait_s > 0.0:
                await asyncio.sleep(wait_s)
            now_s = self._now_s()
            if now_s >= end_s:
                break
            left_frac -= (now_s - t_s) / whole_s
            t_s = now_s
        self.punctuality.iterations += 1
        late_s, wall_s = now_s - end_s, end_s - begin_s
        if late_s > _LATE_FRAC * wall_s:
            self.punctuality.late += 1
        # What is far behind cannot be made up for: it would be a burst that no engine makes.
        return (end_s if late_s < wall_s else now_s), wall_s

    def _row(self) -> Any:
        return self._rows[row_down(self.instance.clocks_mhz, self.card.clock_mhz)]

    def _price(self, plan: Plan) -> tuple[float, float]:
        """Length of this iteration at the present clock, and its mean power."""
        wall_s, decode_j, prefill_j = self._cost(
            self._row(),
            float(self._padded[plan.batch_req]),
            float(plan.batch_req),
            float(plan.kv_tok),
            float(plan.chunk_tok),
            plan.chunk_tok2,
            float(plan.begun_req),
        )
        return wall_s * self.slow_frac, (decode_j + prefill_j) / wall_s

    def _idle_w(self) -> float:
        return float(self._row()["idle_w"])

    def _ask(self, plan: Plan) -> None:
        line = self.batch.prefill or self.batch.waiting
        self.inside.before(
            running_req=plan.batch_req,
            kv_used_tok=plan.kv_tok,
            waiting_tok=self.batch.queue_tok,
            batch_tok=plan.chunk_tok,
            oldest_wait_s=self._now_s() - line[0].arrived_s if line else 0.0,
        )

    def _tell(self, plan: Plan, wall_s: float) -> None:
        self.inside.after(
            ForwardPass(
                wall_s=wall_s,
                prefill_req=float(plan.chunk_req),
                prefill_tok=float(plan.chunk_tok),
                decode_req=float(plan.batch_req),
                decode_kv_tok=float(plan.kv_tok),
                queued_prefill_req=float(len(self.batch.prefill)),
                queued_prefill_tok=float(sum(job.todo_tok for job in self.batch.prefill)),
                queued_decode_req=float(len(self.batch.waiting)),
                queued_decode_kv_tok=float(sum(job.prompt_tok for job in self.batch.waiting)),
            )
        )
