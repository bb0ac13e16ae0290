"""The serving engines of this machine, found by the ports that they listen at."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from voltana_ctrl.engines.endpoints import ENGINES
from voltana_ctrl.engines.fpm.reader import dynamo_fpm_addresses
from voltana_ctrl.engines.names import PAGES
from voltana_ctrl.engines.page import BadPage, read_engine_page
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.machine.pods import pod_gpus
from voltana_ctrl.machine.processes import Process, family, listeners
from voltana_ctrl.textfile import json_value

__all__ = ["FoundEngine", "find_engines"]

# Where engines listen unless told otherwise: vLLM and TensorRT-LLM, SGLang, Dynamo's workers.
_USUAL_PORTS = (*range(8000, 8011), *range(30000, 30011), *range(8081, 8091))
_LIMIT_S = 1.0
_PAGE_BYTES = 8 << 20
_MARKS = {"vllm": "vllm:", "sglang": "sglang:", "trtllm": "trtllm", "dynamo": "dynamo_"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEngine:
    """A serving engine that answers.

    Parameters
    ----------
    url : str
        Address of the engine.
    kind : {"vllm", "sglang", "trtllm", "dynamo"}
        What it is, by the names on its page of metrics.
    told : mapping of str to float
        What the page tells: queues, tokens and requests, by name.
    model : str, optional
        Name of the model that it serves.
    role : {"prefill", "decode", "colocated"}, optional
        As its command line or its server's information has it; None where neither tells.
    worker_id : int, optional
        Id of a Dynamo worker; another one at every start.
    fpm : str, optional
        Address of its forward-pass metrics, as its variables and Dynamo's discovery tell.
    bootstrap_port : int, optional
        Port where an SGLang prefill engine meets its decode engine.
    limits : str, optional
        File with the orders of the governor inside it, where it has one that acts.
    given : tuple of str
        UUIDs of the GPUs that the kubelet gave its pod.
    process : Process, optional
        Process that listens, where this user may know or Kubernetes tells.

    Examples
    --------
    >>> FoundEngine(url="http://127.0.0.1:8000", kind="vllm", told={}).gpus({1: ["GPU-1"]})
    ()
    """

    url: str
    kind: str
    told: Mapping[str, float]
    model: str | None = None
    role: str | None = None
    worker_id: int | None = None
    fpm: str | None = None
    bootstrap_port: int | None = None
    limits: str | None = None
    given: tuple[str, ...] = ()
    process: Process | None = field(default=None, repr=False)

    def gpus(self, held: Mapping[int, Iterable[str]]) -> tuple[str, ...]:
        """UUIDs of the GPUs that its processes compute on, or else that its pod was given.

        Parameters
        ----------
        held : mapping of int to iterable of str
            UUIDs by the number of the process that computes on them, as the driver tells.

        Returns
        -------
        tuple of str
            Empty where neither is known.
        """
        if self.process is None or self.process.pid is None:
            return self.given
        mine = family(self.process.pid)
        found = dict.fromkeys(uuid for pid in held if pid in mine for uuid in held[pid])
        return tuple(found) or self.given

    def read(self) -> FoundEngine:
        """Read its page of metrics anew.

        Returns
        -------
        FoundEngine
            The same engine with what the page tells now.

        Raises
        ------
        BadPage
            If it answers with something else, or not at all.
        """
        text = _get(self.url + PAGES.get(self.kind, "/metrics"))
        if text is None:
            raise BadPage(f"{self.url} does not answer")
        told = read_engine_page(self.kind, text, worker_id=self.worker_id)
        return replace(self, told=told)


def find_engines(
    urls: Iterable[str] = (), *, pods: Mapping[str, Process] | None = None
) -> list[FoundEngine]:
    """Ask those who may be engines for their page of metrics.

    Only ports are asked that a process listens at whose command line names an engine, and those
    that engines have by default.

    Parameters
    ----------
    urls : iterable of str
        Addresses to ask instead; one that does not answer is refused.
    pods : mapping of str to Process, optional
        Addresses in pods to ask besides, see :func:`~voltana_ctrl.machine.pods.read_pods`.

    Returns
    -------
    list of FoundEngine
        Those that answer with the metrics of an engine.

    Raises
    ------
    ConfigError
        If an address that was given is none, or has no page of an engine.

    Examples
    --------
    >>> find_engines(["http://127.0.0.1:9"])
    Traceback (most recent call last):
    voltana_ctrl.errors.ConfigError: url http://127.0.0.1:9: no page of vllm, sglang, trtllm or...
    """
    given = [url.rstrip("/") for url in urls]
    for url in given:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url: expected http://HOST:PORT, got {url!r}")
    here = listeners()
    ports = [
        port
        for port, process in sorted(here.items())
        if port in _USUAL_PORTS or (process is not None and process.serves)
    ]
    behind = {url: _behind(url, here) for url in given}
    if not given:
        behind = {f"http://127.0.0.1:{port}": here[port] for port in ports}
    behind |= {url: process for url, process in (pods or {}).items() if behind.get(url) is None}
    gpus = pod_gpus()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda url: _ask(url, behind[url], gpus), behind))
    for url, engine in zip(behind, found, strict=True):
        if url in given and engine is None:
            raise ConfigError(
                f"url {url}: no page of {', '.join(ENGINES[:-1])} or {ENGINES[-1]} there; is it"
                " the engine's own address, and are its metrics on?"
            )
    return [engine for engine in found if engine is not None]


def _behind(url: str, here: Mapping[int, Process | None]) -> Process | None:
    """Who listens at an address of this machine."""
    local = re.fullmatch(r"https?://(?:127\.[\d.]+|localhost|\[::1\]):(\d+)", url)
    return here.get(int(local[1])) if local else None


def _ask(
    url: str, process: Process | None, gpus: Mapping[str, tuple[str, ...]]
) -> FoundEngine | None:
    for page in ("/metrics", PAGES["trtllm"]):
        text = _get(url + page)
        # A Dynamo worker shows its engine's metrics beside its own.
        kinds = [kind for kind in ("dynamo", *_MARKS) if text and _MARKS[kind] in text]
        for kind in kinds:
            try:
                told = read_engine_page(kind, text or "")
            except BadPage:
                continue
            worker = re.search(r'worker_id="(\d+)"', text or "") if kind == "dynamo" else None
            info = _server_info(url) if kind == "sglang" else {}
            role = _role(kind, process, info)
            return FoundEngine(
                url=url,
                kind=kind,
                told=told,
                model=_model(url, text or ""),
                role=role,
                worker_id=None if worker is None else int(worker[1]),
                fpm=None if process is None else _fpm(url, kind, process),
                bootstrap_port=_bootstrap(process, info) if role == "prefill" else None,
                limits=None if process is None else _limits(process),
                given=gpus.get(process.pod, ()) if process and process.pod else (),
                process=process,
            )
    return None


def _model(url: str, page: str) -> str | None:
    try:
        return str(json_value(_get(url + "/v1/models") or "", url)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        named = re.search(r'\bmodel(?:_name)?="([^"]+)"', page)
        return None if named is None else named[1]


def _server_info(url: str) -> dict[str, Any]:
    """What SGLang's server says of itself; empty where it does not."""
    try:
        told = json_value(_get(url + "/get_server_info") or "", url)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _role(kind: str, process: Process | None, info: Mapping[str, Any]) -> str | None:
    """Prefill, decode or colocated; None where nobody tells."""
    roles = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "colocated"}
    if kind == "sglang":
        mode = info.get("disaggregation_mode")
        if mode is None and process:
            mode = process.option("--disaggregation-mode")
        return {"prefill": "prefill", "decode": "decode", "null": "colocated"}.get(str(mode))
    if process is None or not process.command:
        return None
    transfer = process.option("--kv-transfer-config")
    if transfer is None:
        mode = process.option("--disaggregation-mode") or ""
        return mode if mode in ("prefill", "decode") else "colocated"
    return next((role for word, role in roles.items() if word in transfer), None)


def _bootstrap(process: Process | None, info: Mapping[str, Any]) -> int | None:
    """Port where an SGLang prefill engine meets its decode engine."""
    told = info.get("disaggregation_bootstrap_port")
    if told is None and process is not None:
        told = process.option("--disaggregation-bootstrap-port")
    return int(str(told)) if str(told).isdigit() else None


def _limits(process: Process) -> str | None:
    """File with the orders of our plugin inside an engine, where it acts."""
    told = process.environment
    return told.get("VOLTANA_CTRL_LIMITS") if told.get("VOLTANA_CTRL_MODE") == "act" else None


def _fpm(url: str, kind: str, process: Process) -> str | None:
    """Where an engine publishes forward-pass metrics; several addresses with commas."""
    told = process.environment
    if kind == "dynamo":
        # Of all workers: messages are told apart by the id of the worker.
        return ",".join(dynamo_fpm_addresses(told.get("DYN_FILE_KV", "no-such-folder"))) or None
    address = told.get("VOLTANA_CTRL_FPM")
    if address is None and "InstrumentedScheduler" in (process.option("--scheduler-cls") or ""):
        address = f"tcp://*:{told.get('DYN_FORWARDPASS_METRIC_PORT', '20380')}"
    if address is None:
        return None
    host = re.sub(r"^https?://|:\d+$", "", url)
    return re.sub(r"^tcp://(\*|0\.0\.0\.0|\[::\])(?=:)", lambda _: f"tcp://{host}", address)


def _get(url: str) -> str | None:
    """A page, or None where there is none; nothing waits long, and no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_LIMIT_S) as answer:
            body: Any = answer.read(_PAGE_BYTES)
            return str(body.decode("utf-8", errors="replace"))
    except (OSError, ValueError, urllib.error.URLError):
        return None
