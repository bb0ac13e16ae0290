"""Engines' metrics pages, fetched in the background, as the state of a fleet.

Each engine is fetched by a task of its own, with a limit on time and size. One that does not
answer keeps its last numbers, and its age grows; no other waits for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from voltana_ctrl.backends.meter import (
    MOST_COUNTED_J,
    MOST_W,
    GpuMeter,
    GpuReading,
    InstanceMeter,
)
from voltana_ctrl.checks import F64, positive, within
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.latency import LatencyDeltas
from voltana_ctrl.engines.names import PAGES
from voltana_ctrl.engines.page import (
    BadPage,
    read_dcgm_page,
    read_engine_page,
    read_histograms,
)
from voltana_ctrl.engines.patience import longest_prefill_s, longest_prompt_tok
from voltana_ctrl.engines.reading import EngineReading
from voltana_ctrl.engines.waiting_line import WaitingLine
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.types import FleetSpec, InstanceSpec, RequestBatch, Slo, joined

__all__ = ["Scraper"]

_log = logging.getLogger(__name__)
_MAX_BYTES = 8 << 20
# Prompts of an engine that has not finished one.
_PRIOR_PROMPT_TOK = 500.0
# An engine without energy metrics is not asked for them all the time.
_ENERGY_RETRY_S = 60.0
_STOP_LIMIT_S = 5.0
# Further apart is another cache than was planned with.
_CAPACITY_FRAC = 0.1


class Scraper:
    """Fetches the metrics page of every engine, and DCGM exporter's of every node.

    Parameters
    ----------
    fleet : FleetSpec
        The instances.
    endpoints : sequence of Endpoint
        Their engines.
    dcgm_urls : sequence of str
        Pages of DCGM exporter, whose GPUs are those that endpoints name.
    period_s : float
        Seconds from the end of a fetch to the next.
    limit_s : float
        Seconds that a fetch may take.
    latency : bool
        Whether histograms of TTFT and ITL are read, too; of a page that speaks of one engine.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If httpx or prometheus-client is not installed.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.engines import Endpoint
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> engine = Endpoint(instance="decode-0", kind="vllm", url="http://127.0.0.1:9")
    >>> scraper = Scraper(fleet, [engine])
    >>> scraper.read(0.0).age_s  # nobody has answered
    array([inf, inf])
    >>> scraper.close()
    """

    def __init__(
        self,
        fleet: FleetSpec,
        endpoints: Sequence[Endpoint],
        *,
        dcgm_urls: Sequence[str] = (),
        period_s: float = 0.5,
        limit_s: float = 2.0,
        latency: bool = True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("Scraper.period_s", period_s)
        positive("Scraper.limit_s", limit_s)
        try:
            self._httpx: Any = import_module("httpx")
            import_module("prometheus_client.parser")
        except ImportError as error:
            raise ConfigError(
                "metrics: httpx or prometheus-client is not installed; pip install"
                " 'voltana-ctrl[server]'"
            ) from error
        self._n = len(fleet)
        self._latency = latency
        self._period_s, self._limit_s, self._now_s = period_s, limit_s, now_s
        self._engines: dict[int, _Engine] = {}
        for endpoint in endpoints:
            i = fleet.ids.index(endpoint.instance)
            self._engines[i] = _Engine(endpoint, fleet.instances[i])
        self._dcgm_urls = tuple(dcgm_urls)
        self._dcgm_problems = dict.fromkeys(self._dcgm_urls, "no answer yet")
        named = {uuid for endpoint in endpoints for uuid in endpoint.gpus}
        self._gpus = {uuid: GpuMeter() for uuid in named if self._dcgm_urls}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if self._engines or self._dcgm_urls:
            ready = threading.Event()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._run(ready)),
                name="voltana-ctrl-scrape",
                daemon=True,
            )
            self._thread.start()
            ready.wait(_STOP_LIMIT_S)

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong with each instance's readings, by its id; empty where nothing is.

        Its engine's page comes first; then DCGM exporter's, where it has a GPU of the instance.
        """
        t_s = self._now_s()
        with self._lock:
            told = {
                engine.endpoint.instance: [engine.problem, self._gpu_problem(engine, t_s)]
                for engine in self._engines.values()
            }
        return {name: "; ".join(filter(None, said)) for name, said in told.items() if any(said)}

    def _gpu_problem(self, engine: _Engine, t_s: float) -> str:
        told = [
            f"GPU {uuid}: {problem}"
            for uuid in engine.endpoint.gpus
            if uuid in self._gpus and (problem := self._gpus[uuid].problem(t_s))
        ]
        if not told:
            return ""
        failed = [f"{url}: {said}" for url, said in self._dcgm_problems.items() if said]
        why = "; ".join(failed) or f"{', '.join(self._dcgm_urls)} does not tell it"
        return f"{'; '.join(told)} (DCGM exporter: {why})"

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        httpx = self._httpx
        async with httpx.AsyncClient(
            timeout=self._limit_s, trust_env=False, limits=httpx.Limits(max_connections=None)
        ) as client:
            fetches = [partial(self._fetch_engine, client, one) for one in self._engines.values()]
            fetches += [partial(self._fetch_dcgm, client, url) for url in self._dcgm_urls]
            tasks = [asyncio.create_task(self._repeat(fetch)) for fetch in fetches]
            await self._stop.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(self, fetch: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await fetch()
            except Exception:  # noqa: BLE001  an odd answer must not end the reading of an engine
                _log.exception("voltana-ctrl: a metrics page could not be read")
            await asyncio.sleep(self._period_s)

    async def _fetch_engine(self, client: Any, engine: _Engine) -> None:
        problem = ""
        try:
            status, text = await self._get(client, engine.url)
            if status != 200:
                raise BadPage(f"the engine answered {status}")
            kind = engine.endpoint.kind
            told = read_engine_page(kind, text, worker_id=engine.endpoint.worker_id)
            t_s = self._now_s()
            energy_j = await self._energy_j(client, engine, t_s)
            alone = self._latency and engine.endpoint.worker_id is None
            histograms = read_histograms(kind, text) if alone else {}
            with self._lock:
                engine.take(told, t_s)
                engine.latency.take(histograms, told)
                engine.take_energy(energy_j, t_s)
                # At once with the page: nobody may see an engine that lives and never answered.
                engine.problem = ""
        except (BackendError, TimeoutError, OSError, ValueError) as error:
            problem = f"{engine.url}: {str(error) or type(error).__name__}"
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            problem = f"{engine.url}: {type(error).__name__}: {error}"
        except Exception as error:
            problem = f"{engine.url}: {type(error).__name__}: {error}"
            raise
        finally:
            if problem:
                with self._lock:
                    engine.problem = problem

    async def _energy_j(self, client: Any, engine: _Engine, t_s: float) -> float | None:
        """Energy since the start of TensorRT-LLM, where it was asked to measure it."""
        if engine.energy_url is None or t_s < engine.no_energy_until_s:
            return None
        status, text = await self._get(client, engine.energy_url)
        energy_j = _total_energy_j(text) if status == 200 else None
        if energy_j is None:
            engine.no_energy_until_s = t_s + _ENERGY_RETRY_S
        return energy_j

    async def _fetch_dcgm(self, client: Any, url: str) -> None:
        problem = ""
        try:
            status, text = await self._get(client, url)
            if status != 200:
                raise BadPage(f"it answered {status}")
            gpus = read_dcgm_page(text)
            t_s = self._now_s()
            with self._lock:
                for uuid in self._gpus.keys() & gpus.keys():
                    self._gpus[uuid].take(t_s, gpus[uuid])
                self._dcgm_problems[url] = ""
        except (BackendError, TimeoutError, OSError, ValueError) as error:
            problem = str(error) or type(error).__name__
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            problem = f"{type(error).__name__}: {error}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            if problem:
                with self._lock:
                    self._dcgm_problems[url] = problem

    async def _get(self, client: Any, url: str) -> tuple[int, str]:
        async with asyncio.timeout(self._limit_s), client.stream("GET", url) as answer:
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > _MAX_BYTES:
                    raise BadPage(f"the page is longer than {_MAX_BYTES} bytes")
            return answer.status_code, body.decode("utf-8", errors="replace")

    def read(self, t_s: float, freq_mhz: F64 | None = None) -> EngineReading:
        """What was told last, and how long ago.

        Parameters
        ----------
        t_s : float
            Time of the reading, on the clock of `now_s`.
        freq_mhz : ndarray, shape (n,), optional
            Clocks by which a long prefill is told from a hang; those of DCGM exporter, else the
            lowest, without.

        Returns
        -------
        EngineReading
            Arrivals are those since the last call.
        """
        told = {name: np.full(self._n, np.nan) for name in _FIELDS}
        age_s = np.full(self._n, np.inf)
        with self._lock:
            for i, engine in self._engines.items():
                gpus = self._hardware(engine, t_s) or engine.measured(t_s)
                if gpus is not None:
                    for name, value in _shown(gpus).items():
                        told[name][i] = value
                clock_mhz = told["freq_mhz"][i] if freq_mhz is None else freq_mhz[i]
                if engine.page_s is not None:
                    age_s[i] = max(0.0, t_s - engine.life_s(clock_mhz))
                    for name, value in engine.told(t_s).items():
                        told[name][i] = value
        return EngineReading.silent(self._n, age_s=age_s, **told)

    def finished(self) -> RequestBatch:
        """Halves of requests that finished since the last call, as histograms tell them.

        Returns
        -------
        RequestBatch
            See :meth:`~voltana_ctrl.engines.latency.LatencyDeltas.finished`.
        """
        with self._lock:
            told = [engine.latency.finished(i) for i, engine in self._engines.items()]
        some = [one for one in told if len(one)]
        return joined(RequestBatch, some)

    def judged_edges_s(self, slo: Slo) -> dict[str, dict[str, float]]:
        """Longest times that still count as kept where histograms tell.

        See :func:`~voltana_ctrl.engines.latency.judged_edge_s`.

        Parameters
        ----------
        slo : Slo
            The promises.

        Returns
        -------
        dict of str to dict of str to float
            By the id of an instance, then ``ttft`` and ``itl``, in seconds.
        """
        with self._lock:
            return {
                engine.endpoint.instance: edges
                for engine in self._engines.values()
                if (edges := engine.latency.edges(slo))
            }

    def _hardware(self, engine: _Engine, t_s: float) -> InstanceMeter | None:
        """The GPUs of an instance, as DCGM exporter tells them; None where it is not asked."""
        gpus = [self._gpus[uuid] for uuid in engine.endpoint.gpus if uuid in self._gpus]
        return InstanceMeter.of(gpus, t_s) if gpus else None

    def close(self) -> None:
        """Stop fetching; may be called twice."""
        if self._closed or self._thread is None:
            return
        self._closed = True
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_STOP_LIMIT_S)


_FIELDS = (
    "queue_req",
    "queue_tok",
    "oldest_wait_s",
    "running_req",
    "kv_used_tok",
    "arrived_req",
    "arrived_tok",
    "freq_mhz",
    "power_w",
    "energy_j",
)


def _shown(gpus: InstanceMeter) -> dict[str, float]:
    told = {"freq_mhz": gpus.clock_mhz, "power_w": gpus.power_w, "energy_j": gpus.energy_j}
    return {name: value for name, value in told.items() if value is not None}


class _Engine:
    """What the pages of one engine have told so far."""

    def __init__(self, endpoint: Endpoint, instance: InstanceSpec) -> None:
        self.endpoint = endpoint
        self._instance = instance
        self.url = _page_url(endpoint)
        self.energy_url = f"{endpoint.url}/energy_metrics" if endpoint.kind == "trtllm" else None
        self.no_energy_until_s = 0.0
        self.problem = "no answer yet"
        self.page_s: float | None = None
        self._moved_s = 0.0
        self._last: dict[str, float] = {}
        self._arrived_req = 0.0
        self._line = WaitingLine()
        role = instance.role
        self.latency = LatencyDeltas(prefills=role.prefills, decodes=role.decodes)
        self._energy: GpuMeter | None = None

    def take(self, told: dict[str, float], t_s: float) -> None:
        before, self._last, self.page_s = self._last, told, t_s
        if "kv_capacity_tok" in told and "kv_capacity_tok" not in before:
            self._compare_capacity(told["kv_capacity_tok"])
        if not self._still(before, told):
            self._moved_s = t_s
        arrived_req = 0.0
        if "finished_req" in told:
            if told["finished_req"] >= before.get("finished_req", np.inf):
                arrived_req = max(0.0, _total_req(told) - _total_req(before))
            self._arrived_req += arrived_req
        self._line.follow(t_s, waiting_tok=told.get("queue_req", 0.0), arrived_tok=arrived_req)

    def _compare_capacity(self, own_tok: float) -> None:
        """Say so where "full" is another number to the engine than to whoever controls it."""
        planned_tok = self._instance.kv_capacity_tok
        if abs(own_tok - planned_tok) > _CAPACITY_FRAC * planned_tok:
            _log.warning(
                "voltana-ctrl: %s: its KV cache holds %.0f tokens, by the fleet %d; give"
                " kv_capacity_tok in the fleet file",
                self.endpoint.instance, own_tok, planned_tok,
            )  # fmt: skip

    def _still(self, before: dict[str, float], told: dict[str, float]) -> bool:
        """Whether a batch runs and no number moves: a long iteration, or an engine that hangs.

        Of vLLM's alone counters move with every iteration.
        """
        running = self.endpoint.kind == "vllm" and told.get("running_req", 0.0) > 0.0
        return running and "output_tok" in told and told == before

    def life_s(self, clock_mhz: float) -> float:
        """When the engine was known to live: at its last page, unless that shows it hanging.

        A batch may stand still while it prefills the longest prompt there can be, at this clock.
        """
        page_s = self.page_s or 0.0
        last = self._last
        queue_tok = last.get("queue_tok", last.get("queue_req", 0.0) * self._prompt_tok())
        prompt_tok = longest_prompt_tok(
            queue_tok, self._kv_used_tok() or 0.0, last.get("running_req", 0.0)
        )
        return min(page_s, self._moved_s + longest_prefill_s(self._instance, prompt_tok, clock_mhz))

    def _prompt_tok(self) -> float:
        """Mean prompt of this engine."""
        last = self._last
        if last.get("finished_req", 0.0) > 0.0 and "prompt_tok" in last:
            return last["prompt_tok"] / last["finished_req"]
        return _PRIOR_PROMPT_TOK

    def _kv_used_tok(self) -> float | None:
        last = self._last
        if "kv_used_tok" in last:
            return last["kv_used_tok"]
        if "kv_frac" not in last:
            return None
        return last["kv_frac"] * last.get("kv_capacity_tok", float(self._instance.kv_capacity_tok))

    def take_energy(self, energy_j: float | None, t_s: float) -> None:
        if energy_j is None:
            return
        if self._energy is None:
            self._energy = GpuMeter(highest_w=MOST_W * self._instance.gpus)
        self._energy.take(t_s, GpuReading(counter_j=energy_j))

    def measured(self, t_s: float) -> InstanceMeter | None:
        """Energy and power as the engine measures them itself; None where it does not."""
        return None if self._energy is None else InstanceMeter.of([self._energy], t_s)

    def told(self, t_s: float) -> dict[str, float]:
        """Fields of a reading; arrivals are told once."""
        last, prompt_tok = self._last, self._prompt_tok()
        told: dict[str, float] = {}
        for name in ("queue_req", "running_req"):
            if name in last:
                told[name] = last[name]
        if "queue_req" in last:
            told["queue_tok"] = last.get("queue_tok", last["queue_req"] * prompt_tok)
            told["oldest_wait_s"] = self._line.oldest_s(t_s)
        kv_used_tok = self._kv_used_tok()
        if kv_used_tok is not None:
            told["kv_used_tok"] = kv_used_tok
        if "finished_req" in last:
            told["arrived_req"] = self._arrived_req
            told["arrived_tok"] = self._arrived_req * prompt_tok
            self._arrived_req = 0.0
        return told


def _total_energy_j(text: str) -> float | None:
    """Energy in an answer of TensorRT-LLM; None where it tells none, or no number that can be."""
    try:
        energy_j = json.loads(text)["total_energy_j"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    known = isinstance(energy_j, int | float)
    return within(energy_j, MOST_COUNTED_J) if known else None


def _total_req(told: dict[str, float]) -> float:
    return sum(told.get(name, 0.0) for name in ("finished_req", "running_req", "queue_req"))


def _page_url(endpoint: Endpoint) -> str:
    """Where the page is: `metrics_url` unless that is only the default of another engine."""
    default = f"{endpoint.url}/metrics"
    url = endpoint.metrics_url or default
    path = PAGES.get(endpoint.kind)
    if path is not None and url == default:
        parts = urlsplit(endpoint.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + path, "", ""))
    return url
