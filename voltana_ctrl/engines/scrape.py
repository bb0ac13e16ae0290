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

from voltana_ctrl.checks import positive
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.names import PAGES
from voltana_ctrl.engines.page import BadPage, read_dcgm_page, read_engine_page
from voltana_ctrl.engines.reading import EngineReading
from voltana_ctrl.engines.waiting_line import WaitingLine
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.types import FleetSpec

__all__ = ["Scraper"]

_log = logging.getLogger(__name__)
# More joules than a counter can have come to.
_MOST_J = 1e15
_MAX_BYTES = 8 << 20
# Prompts of an engine that has not finished one.
_PRIOR_PROMPT_TOK = 500.0
# An engine without energy metrics is not asked for them all the time.
_ENERGY_RETRY_S = 60.0
_STOP_LIMIT_S = 5.0


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
        From the end of a fetch to the next.
    limit_s : float
        Longest time of a fetch.
    now_s : callable
        Time that never goes back.

    Raises
    ------
    ConfigError
        If httpx or prometheus-client is not installed.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
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
        self._period_s, self._limit_s, self._now_s = period_s, limit_s, now_s
        self._engines: dict[int, _Engine] = {}
        for endpoint in endpoints:
            i = fleet.ids.index(endpoint.instance)
            self._engines[i] = _Engine(endpoint, fleet.instances[i].kv_capacity_tok)
        self._gpus: dict[str, tuple[float, dict[str, float]]] = {}
        self._dcgm_urls = tuple(dcgm_urls)
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
        """What went wrong at the last fetch of each engine, by instance; empty where nothing."""
        with self._lock:
            return {
                engine.endpoint.instance: engine.problem
                for engine in self._engines.values()
                if engine.problem
            }

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
            told = read_engine_page(engine.endpoint.kind, text, worker_id=engine.endpoint.worker_id)
            t_s = self._now_s()
            energy_j = await self._energy_j(client, engine, t_s)
            with self._lock:
                engine.take(told, t_s)
                engine.take_energy(energy_j, t_s)
        except (BackendError, TimeoutError, OSError, ValueError) as error:
            problem = f"{engine.url}: {str(error) or type(error).__name__}"
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            problem = f"{engine.url}: {type(error).__name__}: {error}"
        except Exception as error:
            problem = f"{engine.url}: {type(error).__name__}: {error}"
            raise
        finally:
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
        try:
            status, text = await self._get(client, url)
            if status == 200:
                gpus = read_dcgm_page(text)
                t_s = self._now_s()
                with self._lock:
                    self._gpus.update({uuid: (t_s, told) for uuid, told in gpus.items()})
        except (BackendError, TimeoutError, OSError, self._httpx.HTTPError, self._httpx.InvalidURL):
            return  # the readings of its GPUs grow old

    async def _get(self, client: Any, url: str) -> tuple[int, str]:
        async with asyncio.timeout(self._limit_s), client.stream("GET", url) as answer:
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > _MAX_BYTES:
                    raise BadPage(f"the page is longer than {_MAX_BYTES} bytes")
            return answer.status_code, body.decode("utf-8", errors="replace")

    def read(self, t_s: float) -> EngineReading:
        """What was told last, and how long ago.

        Parameters
        ----------
        t_s : float
            Time of the reading.
        """
        told = {name: np.full(self._n, np.nan) for name in _FIELDS}
        age_s = np.full(self._n, np.inf)
        with self._lock:
            for i, engine in self._engines.items():
                if engine.seen_s is not None:
                    age_s[i] = max(0.0, t_s - engine.seen_s)
                    for name, value in engine.told(t_s).items():
                        told[name][i] = value
                hardware = self._hardware(engine.endpoint.gpus)
                for name, value in hardware.items():
                    told[name][i] = value
        return EngineReading.silent(self._n, age_s=age_s, **told)

    def _hardware(self, uuids: Sequence[str]) -> dict[str, float]:
        """Sum over the GPUs of an instance; nothing unless all of them are told."""
        gpus = [self._gpus[uuid][1] for uuid in uuids if uuid in self._gpus]
        if not gpus or len(gpus) < len(uuids):
            return {}
        shown = {
            name for name in ("freq_mhz", "power_w", "energy_j") if all(name in g for g in gpus)
        }
        return {
            name: (min if name == "freq_mhz" else sum)(gpu[name] for gpu in gpus) for name in shown
        }

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


class _Engine:
    """What the pages of one engine have told so far."""

    def __init__(self, endpoint: Endpoint, kv_capacity_tok: float) -> None:
        self.endpoint = endpoint
        self._kv_capacity_tok = kv_capacity_tok
        self.url = _page_url(endpoint)
        self.energy_url = f"{endpoint.url}/energy_metrics" if endpoint.kind == "trtllm" else None
        self.no_energy_until_s = 0.0
        self.problem = "no answer yet"
        self.seen_s: float | None = None
        self._last: dict[str, float] = {}
        self._arrived_req = 0.0
        self._line = WaitingLine()
        self._energy: tuple[float, float, float] | None = None  # time, counter, power

    def take(self, told: dict[str, float], t_s: float) -> None:
        before, self._last = self._last, told
        if not self._stuck(before, told):
            self.seen_s = t_s
        arrived_req = 0.0
        if "finished_req" in told:
            if told["finished_req"] >= before.get("finished_req", np.inf):
                arrived_req = max(0.0, _total_req(told) - _total_req(before))
            self._arrived_req += arrived_req
        self._line.follow(t_s, waiting_tok=told.get("queue_req", 0.0), arrived_tok=arrived_req)

    def _stuck(self, before: dict[str, float], told: dict[str, float]) -> bool:
        """Whether a batch runs and nothing came of it: the server answers, the engine hangs.

        Of vLLM's alone counters move with every iteration.
        """
        if self.endpoint.kind != "vllm" or told.get("running_req", 0.0) == 0.0:
            return False
        moving = ("prompt_tok", "output_tok", "finished_req")
        return "output_tok" in told and all(told.get(n) == before.get(n) for n in moving)

    def take_energy(self, energy_j: float | None, t_s: float) -> None:
        if energy_j is None:
            return
        power_w = 0.0
        if self._energy is not None and energy_j >= self._energy[1] and t_s > self._energy[0]:
            power_w = (energy_j - self._energy[1]) / (t_s - self._energy[0])
        self._energy = (t_s, energy_j, power_w)

    def told(self, t_s: float) -> dict[str, float]:
        """Fields of a reading; arrivals are told once."""
        last = self._last
        prompt_tok = _PRIOR_PROMPT_TOK
        if last.get("finished_req", 0.0) > 0.0 and "prompt_tok" in last:
            prompt_tok = last["prompt_tok"] / last["finished_req"]
        told: dict[str, float] = {}
        for name in ("queue_req", "running_req"):
            if name in last:
                told[name] = last[name]
        if "queue_req" in last:
            told["queue_tok"] = last.get("queue_tok", last["queue_req"] * prompt_tok)
            told["oldest_wait_s"] = self._line.oldest_s(t_s)
        if "kv_used_tok" in last:
            told["kv_used_tok"] = last["kv_used_tok"]
        elif "kv_frac" in last:
            capacity_tok = last.get("kv_capacity_tok", self._kv_capacity_tok)
            told["kv_used_tok"] = last["kv_frac"] * capacity_tok
        if "finished_req" in last:
            told["arrived_req"] = self._arrived_req
            told["arrived_tok"] = self._arrived_req * prompt_tok
            self._arrived_req = 0.0
        if self._energy is not None:
            told["energy_j"], told["power_w"] = self._energy[1], self._energy[2]
        return told


def _total_energy_j(text: str) -> float | None:
    """Energy in an answer of TensorRT-LLM; None where it tells none, or no number that can be."""
    try:
        energy_j = json.loads(text)["total_energy_j"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    known = isinstance(energy_j, int | float) and 0.0 <= energy_j <= _MOST_J
    return float(energy_j) if known else None


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
