"""Measure a live engine over clocks and loads, into a table that the fit reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.profiling.client import LoadClient
from voltana_ctrl.profiling.engine import Engine, ProfileAborted, ProfileRun
from voltana_ctrl.profiling.gpus import GpuSample, ProfiledGpus
from voltana_ctrl.profiling.sweep import ProfilePoint, Row, RowFile, Sweep, plan_profile

__all__ = ["profile_engine"]

# Tokens that every stream of a batch has sent before the batch counts as steady.
_WARM_TOK = 4
_PREFILLS = 3
# Spans of the steady part that are compared for a standard error.
_SPANS = 8
# A clock that far below the one asked for is told.
_CLOCK_SLACK_MHZ = 20.0


class _TooSlow(Exception):
    """A point broke a limit on latency."""


def profile_engine(
    engine: Engine,
    sweep: Sweep,
    out: str | Path,
    *,
    setter: Path | None = None,
    restore_lock_mhz: tuple[int, int] | None = None,
    lock_dir: Path = LOCK_DIR,
    library: Path | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> ProfileRun:
    """Measure a live engine at every point of a sweep that is not in the table yet.

    The engine must serve nobody else meanwhile. Whatever ends the profile, the clocks are given
    back, and the table holds all whole points; the same call goes on from there.

    Parameters
    ----------
    engine : Engine
        Engine that is measured.
    sweep : Sweep
        Points to measure, how long, and when to stop.
    out : str or Path
        CSV file of the table, which is appended to.
    setter, restore_lock_mhz, lock_dir, library
        See :class:`voltana_ctrl.backends.NvmlBackend`.
    on_progress : callable, optional
        Called with points done, points in all, and the point that begins.

    Returns
    -------
    ProfileRun
        Counts, and notes on clocks that were not reached.

    Raises
    ------
    ConfigError
        If engine, clocks and table do not fit together.
    ProfileAborted
        If the limit of temperature, cooling or time of a point was passed, or those of latency
        too often.
    BackendError
        If the engine or a GPU fails.

    Examples
    --------
    >>> from voltana_ctrl.profiling import Engine, Sweep
    >>> def measure():
    ...     engine = Engine(url="http://localhost:8000", gpus=("GPU-8f6d...",))
    ...     run = profile_engine(engine, Sweep(clocks_mhz=(705, 1005, 1410)), "table.csv")
    ...     return run.text()
    """
    table = RowFile(Path(out))
    plan = plan_profile(sweep, out)
    if sweep.clocks_mhz and engine.freq_mhz is not None:
        raise ConfigError(
            "profile: clocks can only be set on GPUs that are given; give gpus, or no clocks"
        )
    points = plan.points
    if engine.freq_mhz is not None:
        # Without a GPU to read there is no power at rest.
        points = tuple(point for point in points if point.phase != "idle")
    begin_s = time.monotonic()
    notes: tuple[str, ...] = ()
    measured = 0
    if points:
        groups = dict.fromkeys(engine.of(phase)[1] for phase in ("prefill", "decode"))
        with ProfiledGpus(
            tuple(group for group in groups if group),
            tuple(filter(None, (point.setting for point in sweep.points()))),
            setter=setter,
            restore_lock_mhz=restore_lock_mhz,
            lock_dir=lock_dir,
            library=library,
        ) as gpus:
            profiler = _Profiler(engine, sweep, table, gpus)
            measured = asyncio.run(profiler.run(points, plan.done, on_progress or _silent))
        notes = tuple(profiler.notes)
    return ProfileRun(
        path=table.path,
        measured=measured,
        skipped=plan.done,
        left_out=len(points) - measured,
        wall_s=time.monotonic() - begin_s,
        notes=notes,
    )


def _silent(done: int, total: int, what: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """Time of one iteration, and the hardware at both ends of the steady part."""

    wall_s: float
    mean_s: float
    se_s: float | None = None
    steps: int
    kv_tok: float = 0.0
    begin: GpuSample
    end: GpuSample


class _Profiler:
    def __init__(self, engine: Engine, sweep: Sweep, table: RowFile, gpus: ProfiledGpus) -> None:
        self.engine, self.sweep, self.table, self.gpus = engine, sweep, table, gpus
        self.clients: dict[str, LoadClient] = {}
        self.point = ProfilePoint(phase="idle", asked_mhz=0)
        self.group = 0
        self.seen_mhz: list[float] = []
        self.reading = GpuSample()
        self.next_s = 0.0
        self.limit_s = np.inf
        self.notes: list[str] = []
        self.too_slow: list[ProfilePoint] = []
        self.breaches = 0
        self.phases = {each.phase for each in table.points}
        self.looks: list[GpuSample] = []

    async def run(
        self,
        points: Sequence[ProfilePoint],
        done: int,
        on_progress: Callable[[int, int, str], None],
    ) -> int:
        """Measure what is not too slow; how many points that was."""
        total = done + len(points)
        measured = 0
        async with AsyncExitStack() as stack:
            for point in points:
                url = self.engine.of(point.phase)[0]
                if url not in self.clients:
                    self.clients[url] = await stack.enter_async_context(self._client(url))
                    await self._attend(self.clients[url].check())
            model = str(next(iter(self.clients.values())).model)
            self.table.check(model, self.gpus.there)
            for number, point in enumerate(points):
                on_progress(done + number, total, str(point))
                if any(point.no_easier(slow) for slow in self.too_slow):
                    continue
                try:
                    self.table.append(await self._row(point, model))
                except _TooSlow as error:
                    self._leave_out(point, points[number + 1 :], str(error))
                else:
                    measured += 1
                    self.breaches = 0
                    self.phases.add(point.phase)
            on_progress(total, total, "done")
        return measured

    def _leave_out(self, point: ProfilePoint, later: Sequence[ProfilePoint], why: str) -> None:
        """Go on without a point that is too slow, unless nothing comes of it."""
        self.too_slow.append(point)
        self.breaches += 1
        hopeless = all(other.no_easier(point) for other in later if other.phase == point.phase)
        nothing = hopeless and point.phase not in self.phases
        if nothing or self.breaches >= self.sweep.breach_limit:
            raise ProfileAborted(
                f"{why}; leave out this load or the lowest clocks, or raise the limit"
                + ("" if nothing else f" ({self.breaches} points in a row)")
            )
        self.notes.append(f"{why}: left out, with all that can be no faster")

    def _client(self, url: str) -> LoadClient:
        engine = self.engine
        return LoadClient(
            url,
            model=engine.model,
            words=engine.words,
            token_ids=engine.token_ids,
            timeout_s=self.sweep.point_limit_s,
            api_key=engine.api_key,
        )

    async def _row(self, point: ProfilePoint, model: str) -> Row:
        await self._begin(point)
        measure = {"idle": self._idle, "decode": self._decode, "prefill": self._prefill}
        measured = await measure[point.phase]()
        begin, end = measured.begin, measured.end
        seen_mhz = None
        if self.gpus.there:
            seen_mhz = float(np.median(self.seen_mhz or [end.freq_mhz]))
        reached_mhz = seen_mhz if seen_mhz is not None else np.inf
        expected = point.phase == "idle" or point.power_cap_w > 0
        if not expected and reached_mhz < point.asked_mhz - _CLOCK_SLACK_MHZ:
            self.notes.append(f"{point}: ran at {seen_mhz:g} MHz (power cap or clamp)")
        freq_mhz = point.asked_mhz or seen_mhz or self.engine.freq_mhz or 0.0
        energy_j = None
        if self.gpus.there:
            # Mean power of the steady part, so that stragglers weigh as in the time.
            power_w = (end.energy_j - begin.energy_j) / (end.t_s - begin.t_s)
            energy_j = power_w * measured.wall_s
        prefill = point.phase == "prefill"
        return Row(
            phase=point.phase,
            freq_mhz=float(freq_mhz),
            batch_req=point.batch_req,
            kv_tok=measured.kv_tok,
            prefill_tok=float(point.batch_req * point.asked_tok) if prefill else 0.0,
            wall_s=measured.wall_s,
            energy_j=energy_j,
            asked_mhz=point.asked_mhz,
            asked_tok=point.asked_tok,
            steps=measured.steps,
            mean_s=measured.mean_s,
            seen_mhz=seen_mhz,
            temperature_c=end.temperature_c,
            model=model,
            wall_se_s=measured.se_s,
            power_se_w=_power_se_w(self.looks, begin, end) if self.gpus.there else None,
            set_power_cap_w=point.power_cap_w or None,
            set_mem_mhz=point.mem_mhz or None,
        )

    async def _begin(self, point: ProfilePoint) -> None:
        """Set clock, cap and memory clock, let them settle, and let the GPUs cool."""
        sweep = self.sweep
        before = (self.group, self.point.setting)
        self.group = self.gpus.group_of(self.engine.of(point.phase)[1])
        self.point = point
        changed = before != (self.group, point.setting)
        begin_s = time.monotonic()
        self.limit_s = np.inf
        self._look()
        await self._attend(asyncio.sleep(sweep.pause_s + (sweep.settle_s if changed else 0.0)))
        while sweep.cool_c is not None and (self.reading.temperature_c or 0) > sweep.cool_c:
            if time.monotonic() - begin_s > sweep.cool_limit_s:
                raise ProfileAborted(
                    f"{point}: {self.reading.temperature_c} C after {sweep.cool_limit_s:g} s of"
                    f" cooling, above {sweep.cool_c} C; better cooling, or a higher cool_c"
                )
            await self._attend(asyncio.sleep(sweep.sample_s))
        self.seen_mhz.clear()
        self.looks.clear()
        self.limit_s = time.monotonic() + sweep.point_limit_s

    def _look(self) -> GpuSample:
        """Read the hardware, keep the clock set, and stop where it is too hot."""
        self.next_s = time.monotonic() + self.sweep.sample_s
        if self.gpus.there:
            self.reading = self.gpus.look(self.group, self.point.setting)
            self.looks.append(self.reading)
        else:
            self.reading = replace(self.reading, t_s=time.perf_counter())
        temperature_c = self.reading.temperature_c
        if temperature_c is not None and temperature_c > self.sweep.temperature_limit_c:
            raise ProfileAborted(
                f"{self.point}: GPU at {temperature_c} C, above temperature_limit_c"
                f" {self.sweep.temperature_limit_c}; let it cool, then run the same command again"
            )
        return self.reading

    async def _wait(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Until a task ends or the hardware is due to be looked at; raises what a task did."""
        pending = [task for task in tasks if not task.done()]
        timeout_s = max(0.0, self.next_s - time.monotonic())
        await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        if time.monotonic() >= self.next_s:
            reading = self._look()
            if self.gpus.there and not all(task.done() for task in tasks):
                self.seen_mhz.append(reading.freq_mhz)  # under load, not between two batches
        if time.monotonic() > self.limit_s:
            raise ProfileAborted(
                f"{self.point}: not measured after point_limit_s {self.sweep.point_limit_s:g} s;"
                " does the engine serve somebody else, or queue the batch?"
            )

    async def _attend(self, work: Awaitable[Any]) -> None:
        """Await something while the hardware is looked after."""
        async with _Tasks([_wrap(work)]) as tasks:
            while not all(task.done() for task in tasks):
                await self._wait(tasks)
            tasks[0].result()

    async def _idle(self) -> _Measured:
        begin = self._look()
        await self._attend(asyncio.sleep(self.sweep.steady_s))
        end = self._look()
        wall_s = end.t_s - begin.t_s
        return _Measured(wall_s=wall_s, mean_s=wall_s, steps=1, begin=begin, end=end)

    async def _decode(self) -> _Measured:
        sweep, point = self.sweep, self.point
        client = self.clients[self.engine.of("decode")[0]]
        times_s: list[list[float]] = [[] for _ in range(point.batch_req)]
        requests = [client.request(point.asked_tok, sweep.output_tok) for _ in times_s]
        streams = [
            client.stream(request, each) for request, each in zip(requests, times_s, strict=True)
        ]
        # Leaving ends the streams that still run: an engine drops a request whose client left.
        async with _Tasks(streams) as tasks:
            while not all(len(each) >= _WARM_TOK for each in times_s):
                await self._wait(tasks)
                if any(task.done() for task in tasks):
                    running = sum(bool(each) for each in times_s)
                    raise ProfileAborted(
                        f"{point}: a stream ended when {running} of {point.batch_req} had begun;"
                        " the engine does not run them all at once (its batch limit or its KV"
                        " cache): leave this load out, or raise output_tok"
                    )
            begin = self._look()
            before = [len(each) for each in times_s]
            while True:
                await self._wait(tasks)
                streams_s = _gaps_s(times_s, before)
                gaps_s = np.concatenate(streams_s)
                steps = len(gaps_s) // point.batch_req
                if sweep.itl_limit_s is not None and steps >= _WARM_TOK:
                    self._check_slo("ITL", float(np.median(gaps_s)), sweep.itl_limit_s)
                ended = any(task.done() for task in tasks)
                enough_s = time.perf_counter() - begin.t_s >= sweep.steady_s
                if ended or (enough_s and steps >= sweep.min_steps):
                    break
            end = self._look()
        if steps < sweep.min_steps:
            raise ProfileAborted(
                f"{point}: a stream ended after {steps} steady steps, fewer than min_steps"
                f" {sweep.min_steps}; raise output_tok"
            )
        after = [len(each) for each in times_s]
        context_tok = point.asked_tok + 0.5 * (np.mean(before) + np.mean(after))
        return _Measured(
            wall_s=float(np.median(gaps_s)),
            mean_s=float(np.mean(gaps_s)),
            se_s=_median_se_s(streams_s),
            steps=steps,
            kv_tok=float(point.batch_req * context_tok),
            begin=begin,
            end=end,
        )

    async def _prefill(self) -> _Measured:
        sweep = self.sweep
        await self._first_tokens_s()  # the first one may compile, or wake the GPU
        begin = self._look()
        all_s: list[float] = []
        while len(all_s) < _PREFILLS or time.perf_counter() - begin.t_s < sweep.steady_s:
            all_s.append(await self._first_tokens_s())
            if sweep.ttft_limit_s is not None and len(all_s) >= _PREFILLS:
                self._check_slo("TTFT", float(np.median(all_s)), sweep.ttft_limit_s)
        end = self._look()
        return _Measured(
            wall_s=float(np.median(all_s)),
            mean_s=float(np.mean(all_s)),
            se_s=_median_se_s([all_s]),
            steps=len(all_s),
            begin=begin,
            end=end,
        )

    async def _first_tokens_s(self) -> float:
        """Send the batch, and wait until all of it has its first token."""
        point = self.point
        client = self.clients[self.engine.of("prefill")[0]]
        times_s: list[list[float]] = [[] for _ in range(point.batch_req)]
        requests = [client.request(point.asked_tok, 1) for _ in times_s]
        begin_s = time.perf_counter()
        streams = [
            client.stream(request, each) for request, each in zip(requests, times_s, strict=True)
        ]
        async with _Tasks(streams) as tasks:
            while not all(task.done() for task in tasks):
                await self._wait(tasks)
        return max(each[0] for each in times_s) - begin_s

    def _check_slo(self, name: str, median_s: float, limit_s: float) -> None:
        if median_s > limit_s:
            raise _TooSlow(
                f"{self.point}: {name} {median_s:.3g} s in the median, above the limit"
                f" {limit_s:g} s"
            )


def _gaps_s(times_s: Sequence[Sequence[float]], before: Sequence[int]) -> list[Any]:
    """Gaps between the tokens of each stream that came after its first `before`."""
    return [np.diff(each[count - 1 :]) for each, count in zip(times_s, before, strict=True)]


def _median_se_s(streams_s: Sequence[Sequence[float] | np.ndarray[Any, Any]]) -> float:
    """Standard error of the median over all streams, from the medians of up to eight spans.

    Streams of a batch share their iterations, and a late token shortens the next gap: spans
    that follow one another show what is left of both in the median.
    """
    spans = min(_SPANS, *(len(each) for each in streams_s))
    parts = [np.array_split(each, spans) for each in streams_s]
    medians = [np.median(np.concatenate(span)) for span in zip(*parts, strict=True)]
    return float(np.std(medians, ddof=1) / np.sqrt(spans))


def _power_se_w(looks: Sequence[GpuSample], begin: GpuSample, end: GpuSample) -> float | None:
    """Standard error of the mean power, from that of up to eight spans; None of one alone."""
    inside = [look for look in looks if begin.t_s <= look.t_s <= end.t_s]
    edges = np.unique(np.linspace(0, len(inside) - 1, _SPANS + 1).astype(int))
    t_s = np.array([inside[edge].t_s for edge in edges])
    energy_j = np.array([inside[edge].energy_j for edge in edges])
    power_w = np.diff(energy_j) / np.diff(t_s)
    if len(power_w) < 2:
        return None
    return float(np.std(power_w, ddof=1) / np.sqrt(len(power_w)))


async def _wrap(work: Awaitable[Any]) -> Any:
    return await work


class _Tasks:
    """Coroutines at work; on the way out those still running are cancelled and awaited."""

    def __init__(self, works: Sequence[Coroutine[Any, Any, Any]]) -> None:
        self._works = works
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> list[asyncio.Task[Any]]:
        self._tasks = [asyncio.ensure_future(work) for work in self._works]
        return self._tasks

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
