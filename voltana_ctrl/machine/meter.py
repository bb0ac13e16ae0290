"""Joules per token, per request and at rest: what a machine draws, and what would draw less.

Reads only, and needs no fleet file: GPUs are the driver's, engines those that answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voltana_ctrl.backends.nvml.driver import Nvml
from voltana_ctrl.checks import positive
from voltana_ctrl.errors import BackendError
from voltana_ctrl.machine.engines import FoundEngine

__all__ = ["EngineUse", "GpuUse", "MachineUse", "measure"]

_PERIOD_S = 0.5
_HOURS_A_YEAR = 8766.0
# A GPU that rests, and whose clock is above this share, is boosted for nothing.
_BOOSTED_FRAC = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """What one GPU drew.

    Parameters
    ----------
    uuid, name : str
        UUID and name of the GPU.
    energy_j : float or None
        Joules over the measurement; None where neither energy nor power can be read.
    idle_w : float or None
        Mean watts at the moments at which nothing ran on it; None where there was none.
    idle_frac : float
        Share of the moments at which nothing ran.
    hints : tuple of str
        What would draw less, or why something is not told.

    Examples
    --------
    >>> GpuUse(uuid="GPU-1", name="A100", energy_j=500.0, idle_w=60.0, idle_frac=0.5).year_kwh
    525.96
    """

    uuid: str
    name: str
    energy_j: float | None
    idle_w: float | None
    idle_frac: float
    hints: tuple[str, ...] = ()

    @property
    def year_kwh(self) -> float | None:
        """Kilowatt-hours of a year at rest; None where no rest was seen."""
        return None if self.idle_w is None else self.idle_w * _HOURS_A_YEAR / 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """What one engine made of what its GPUs drew.

    Parameters
    ----------
    url, kind : str
        Address and kind of the engine.
    model, pod : str or None
        Model that it serves, and UID of its Kubernetes pod; None where they are not told.
    gpus : tuple of str
        UUIDs of the GPUs that it computes on; empty where that is not known.
    output_tok, finished_req : float or None
        Output tokens and finished requests meanwhile; None where they are not told.
    energy_j : float or None
        Joules of its GPUs meanwhile; None where it is not known which they are.
    hints : tuple of str
        What would draw less, or why something is not told.

    Examples
    --------
    >>> use = EngineUse(url="http://127.0.0.1:8000", kind="vllm", model=None, pod=None,
    ...                 gpus=("GPU-1",), output_tok=2000.0, finished_req=10.0, energy_j=500.0)
    >>> use.token_j, use.request_j
    (0.25, 50.0)
    """

    url: str
    kind: str
    model: str | None
    pod: str | None
    gpus: tuple[str, ...]
    output_tok: float | None
    finished_req: float | None
    energy_j: float | None
    hints: tuple[str, ...] = ()

    @property
    def token_j(self) -> float | None:
        """Joules per output token; None where there was none."""
        return (
            None
            if self.energy_j is None or not self.output_tok
            else self.energy_j / self.output_tok
        )

    @property
    def request_j(self) -> float | None:
        """Joules per finished request; None where there was none."""
        return (
            None
            if self.energy_j is None or not self.finished_req
            else self.energy_j / self.finished_req
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineUse:
    """What the machine drew, and for what.

    Parameters
    ----------
    duration_s : float
        Seconds that were measured.
    gpus : tuple of GpuUse
        Every GPU that answers.
    engines : tuple of EngineUse
        Every engine that answers.
    problems : tuple of str
        What could not be read.

    Examples
    --------
    >>> use = MachineUse(duration_s=1.0, gpus=(), engines=(), problems=("no driver",))
    >>> use.is_empty
    True
    >>> print(use.text())
    no GPU was read
    no engine was found: start one here, or give its address with --url http://HOST:PORT
    not read: no driver
    next: voltana-ctrl doctor says what this machine can do; voltana-ctrl demo needs no GPU
    """

    duration_s: float
    gpus: tuple[GpuUse, ...]
    engines: tuple[EngineUse, ...]
    problems: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to measure."""
        return not self.gpus and not self.engines

    def json(self) -> str:
        """All figures as one line of JSON."""
        values = {
            "schema": "voltana-ctrl/meter/1",
            "duration_s": self.duration_s,
            "gpus": [{**asdict(one), "year_kwh": one.year_kwh} for one in self.gpus],
            "engines": [
                {**asdict(one), "token_j": one.token_j, "request_j": one.request_j}
                for one in self.engines
            ],
            "problems": self.problems,
        }
        return json.dumps(values, separators=(",", ":"))

    def text(self, price_kwh: float | None = None) -> str:
        """The figures in plain words, as lines of text.

        Parameters
        ----------
        price_kwh : float, optional
            Price of a kilowatt-hour, in any currency, for the cost of a year at rest.
        """
        return "\n".join(self._lines(price_kwh))

    def _lines(self, price_kwh: float | None) -> Iterator[str]:
        if not self.gpus:
            yield "no GPU was read"
        for number, gpu in enumerate(self.gpus):
            drawn = "power not told"
            if gpu.energy_j is not None:
                drawn = f"{gpu.energy_j / self.duration_s:.0f} W over {self.duration_s:.0f} s"
            yield f"GPU {number} ({gpu.name}, {gpu.uuid}): {drawn}"
            if gpu.year_kwh is not None:
                cost = "" if price_kwh is None else f", {gpu.year_kwh * price_kwh:.0f} in money"
                yield (
                    f"  at rest {gpu.idle_w:.0f} W ({gpu.idle_frac:.0%} of the time):"
                    f" {gpu.year_kwh:.0f} kWh a year if it rests{cost}"
                )
            for hint in gpu.hints:
                yield f"  hint: {hint}"
        if not self.engines:
            yield (
                "no engine was found: start one here, or give its address with"
                " --url http://HOST:PORT"
            )
        for engine in self.engines:
            yield from _engine_lines(engine)
        for problem in self.problems:
            yield f"not read: {problem}"
        if self.is_empty:
            yield (
                "next: voltana-ctrl doctor says what this machine can do; voltana-ctrl demo needs"
                " no GPU"
            )


def _engine_lines(engine: EngineUse) -> Iterator[str]:
    pod = "" if engine.pod is None else f", pod {engine.pod}"
    yield f"{engine.kind} at {engine.url} ({engine.model or 'model not told'}{pod})"
    made = (
        "tokens not told" if engine.output_tok is None else f"{engine.output_tok:.0f} output tokens"
    )
    done = "" if engine.finished_req is None else f", {engine.finished_req:.0f} requests finished"
    yield f"  {made}{done}"
    if engine.token_j is not None:
        per_request = "" if engine.request_j is None else f", {engine.request_j:.1f} J a request"
        yield f"  {engine.token_j:.4f} J a token{per_request} ({len(engine.gpus)} GPUs)"
    elif engine.energy_j is not None:
        yield f"  {engine.energy_j:.0f} J, and no token: nothing to divide by"
    for hint in engine.hints:
        yield f"  hint: {hint}"


def measure(
    engines: Sequence[FoundEngine],
    *,
    duration_s: float = 10.0,
    library: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
    now_s: Callable[[], float] = time.monotonic,
    stop: Callable[[], bool] = lambda: False,
) -> MachineUse:
    """Measure what GPUs draw and what engines make of it; sets nothing.

    Parameters
    ----------
    engines : sequence of FoundEngine
        Engines of this machine, see :func:`~voltana_ctrl.machine.find_engines`.
    duration_s : float
        Seconds to measure.
    library : Path, optional
        The driver library, where it is not the system's.
    sleep, now_s : callable
        Waits for some seconds, and returns the time in seconds.
    stop : callable
        Asked after each sleep whether to end with what is measured so far.

    Returns
    -------
    MachineUse
        What could not be read is named in its `problems`.

    Raises
    ------
    ConfigError
        If the duration is not a number above 0.

    Examples
    --------
    >>> from pathlib import Path
    >>> use = measure([], duration_s=0.01, library=Path("no-such-library.so"))
    >>> use.gpus, len(use.problems)
    ((), 1)
    """
    positive("duration_s", duration_s)
    problems: list[str] = []
    with ExitStack() as ending:
        gpus: list[_Gpu] = []
        try:
            nvml = ending.enter_context(Nvml(library))
            gpus = [_Gpu(nvml.reader(one.uuid)) for one in nvml.gpus()]
        except BackendError as error:
            problems.append(str(error))
        begin_s, stopped = now_s(), False
        while True:
            for gpu in gpus:
                gpu.sample(now_s())
            left_s = begin_s + duration_s - now_s()
            if left_s <= 0.0 or stopped or not (gpus or engines):
                break
            sleep(min(_PERIOD_S, left_s))
            stopped = stop()
        took_s = now_s() - begin_s
        after: list[FoundEngine | None] = []
        for engine in engines:
            try:
                after.append(engine.read())
            except BackendError as error:
                after.append(None)
                problems.append(str(error))
        used = tuple(gpu.use() for gpu in gpus)
        held: dict[int, list[str]] = {}
        for gpu in gpus:
            for pid in gpu.reader.compute_pids:
                held.setdefault(pid, []).append(gpu.reader.uuid)
        return MachineUse(
            duration_s=took_s,
            gpus=used,
            engines=tuple(
                _engine_use(one, now, used, held, alone=len(engines) == 1)
                for one, now in zip(engines, after, strict=True)
            ),
            problems=tuple(problems),
        )


class _Gpu:
    """Samples of one GPU."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self._counters: list[float] = []
        self._power: list[tuple[float, float]] = []
        self._idle_w: list[float] = []
        self._seen = self._idle = self._boosted = 0
        self._highest_mhz = max(reader.clocks_mhz, default=0)

    def sample(self, t_s: float) -> None:
        reading, busy_frac = self.reader.read(), self.reader.busy_frac
        if reading.counter_j is not None:
            self._counters.append(reading.counter_j)
        if reading.power_w is not None:
            self._power.append((t_s, reading.power_w))
        self._seen += 1
        if busy_frac == 0.0 and reading.power_w is not None:
            self._idle += 1
            self._idle_w.append(reading.power_w)
            clock_mhz = reading.clock_mhz or 0.0
            self._boosted += clock_mhz > _BOOSTED_FRAC * self._highest_mhz > 0.0

    def use(self) -> GpuUse:
        return GpuUse(
            uuid=self.reader.uuid,
            name=self.reader.name,
            energy_j=self._energy_j(),
            idle_w=sum(self._idle_w) / len(self._idle_w) if self._idle_w else None,
            idle_frac=self._idle / max(1, self._seen),
            hints=tuple(self._hints()),
        )

    def _energy_j(self) -> float | None:
        """By the board's counter, else the power integrated."""
        rising = all(a <= b for a, b in zip(self._counters, self._counters[1:], strict=False))
        if len(self._counters) == self._seen > 1 and rising:
            return self._counters[-1] - self._counters[0]
        pairs = list(zip(self._power, self._power[1:], strict=False))
        if not pairs:
            return None
        return sum(0.5 * (a_w + b_w) * (b_s - a_s) for (a_s, a_w), (b_s, b_w) in pairs)

    def _hints(self) -> Iterator[str]:
        gpu = self.reader
        yield from gpu.covers
        if self._boosted and self._boosted >= 0.5 * self._idle:
            yield (
                "it keeps a high clock though nothing runs: start the engine with"
                " CUDA_DISABLE_PERF_BOOST=1 (driver 580 or newer), which needs no privilege"
            )
        if gpu.persistent is False:
            yield (
                "persistence mode is off: clock locks and power caps are lost whenever nobody uses"
                " the GPU (nvidia-persistenced)"
            )
        cap_w, range_w = gpu.power_cap_w, gpu.power_cap_range_w
        if cap_w is not None and range_w is not None and cap_w < range_w[1] - 0.5:
            yield f"a power cap of {cap_w:g} W is set, of {range_w[1]:g} W: on purpose?"
        profiles = gpu.power_profiles
        if profiles:
            yield (
                f"workload power profile in force: {', '.join(profiles)}; it bounds the clocks"
                " before any of ours"
            )


def _engine_use(
    before: FoundEngine,
    after: FoundEngine | None,
    gpus: Sequence[GpuUse],
    held: dict[int, list[str]],
    *,
    alone: bool,
) -> EngineUse:
    mine = before.gpus(held)
    hints = list(_engine_hints(before))
    if not mine and alone and gpus:
        mine = tuple(one.uuid for one in gpus)
        hints.append("its GPUs could not be told; as the only engine it is taken to use all")
    elif not mine and gpus:
        hints.append(
            "which GPUs are its own could not be told (run this as root, in the host's process"
            " namespace), so that its energy is not known"
        )
    energies = [one.energy_j for one in gpus if one.uuid in mine]
    known = [energy_j for energy_j in energies if energy_j is not None]
    return EngineUse(
        url=before.url,
        kind=before.kind,
        model=before.model,
        pod=before.process.pod if before.process else None,
        gpus=mine,
        output_tok=_gain(before, after, "output_tok"),
        finished_req=_gain(before, after, "finished_req"),
        energy_j=sum(known) if known and len(known) == len(energies) else None,
        hints=tuple(hints),
    )


def _engine_hints(engine: FoundEngine) -> Iterator[str]:
    process = engine.process
    if process is None or not process.command:
        return
    if engine.kind == "sglang" and process.option("--sleep-on-idle") is None:
        yield "its scheduler turns while there is nothing to do: --sleep-on-idle lets the CPU rest"
    if engine.kind == "vllm" and process.environment.get("VLLM_SLEEP_WHEN_IDLE") == "0":
        yield "VLLM_SLEEP_WHEN_IDLE=0 keeps a CPU core busy while there is nothing to do"


def _gain(before: FoundEngine, after: FoundEngine | None, name: str) -> float | None:
    if after is None or name not in before.told or name not in after.told:
        return None
    return max(0.0, after.told[name] - before.told[name])
