"""Where the running engines of a fleet are, read from the file that describes the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import read_toml
from voltana_ctrl.types import FleetSpec

__all__ = ["ENGINES", "Endpoint", "load_endpoints"]

#: Engines that are known by name.
ENGINES = ("vllm", "sglang", "trtllm", "dynamo")
#: As many as Linux can be built for.
_MOST_CPUS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Running engine of one instance: its address, its GPUs, its telemetry.

    Parameters
    ----------
    instance : str
        Id of the instance in the fleet.
    kind : {"vllm", "sglang", "trtllm", "dynamo"}
        Engine, which decides how metrics are named and how prefill hands over to decode.
    url : str
        Address of the engine, such as ``http://10.0.0.1:8000``.
    gpus : tuple of str, optional
        UUIDs of its GPUs; none where clocks are not to be set or read.
    metrics_url : str, optional
        Page of its Prometheus metrics; ``url`` + ``/metrics`` by default.
    fpm : str, optional
        ZeroMQ address of its forward-pass metrics, such as ``tcp://10.0.0.1:20380``.
    bootstrap_port : int, optional
        Port where an SGLang prefill engine meets its decode engine.
    worker_id : int, optional
        Id of a Dynamo worker, by which a request is pinned to it.
    limits : str, optional
        File through which the governor inside the engine is given its orders
        (``VOLTANA_CTRL_LIMITS`` there). It says that this governor holds the GPUs and sets their
        clock; without it the node's agent does.
    cpus : tuple of int, optional
        CPUs of the node that run this engine and nothing else that matters, whose clock may be
        limited where the profile has measurements of it (``--actuators``). In a fleet file as
        Linux writes them: ``"0-15,64-79"``.

    Raises
    ------
    ConfigError
        If a value is of the wrong form.

    Examples
    --------
    >>> endpoint = Endpoint(instance="decode-0", kind="vllm", url="http://10.0.0.1:8000/")
    >>> endpoint.url, endpoint.metrics_url
    ('http://10.0.0.1:8000', 'http://10.0.0.1:8000/metrics')
    """

    instance: str
    kind: str
    url: str
    gpus: tuple[str, ...] = ()
    metrics_url: str | None = None
    fpm: str | None = None
    bootstrap_port: int | None = None
    worker_id: int | None = None
    limits: str | None = None
    cpus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ENGINES:
            raise ConfigError(f"kind: expected one of {', '.join(ENGINES)}, got {self.kind!r}")
        object.__setattr__(self, "url", _http_url("url", self.url))
        metrics_url = self.metrics_url or f"{self.url}/metrics"
        object.__setattr__(self, "metrics_url", _http_url("metrics_url", metrics_url))
        if self.fpm is not None and not self.fpm.startswith(("tcp://", "ipc://")):
            raise ConfigError(f"fpm: expected tcp://HOST:PORT or ipc://PATH, got {self.fpm!r}")
        if self.bootstrap_port is not None and not 0 < self.bootstrap_port < 65536:
            raise ConfigError(f"bootstrap_port: expected 1 to 65535, got {self.bootstrap_port}")


def load_endpoints(path: str | Path) -> tuple[FleetSpec, tuple[Endpoint, ...]]:
    """Fleet and running engines from one TOML file.

    The file is that of :meth:`FleetSpec.from_toml`, where each ``[[instance]]`` has a table
    ``engine`` with the fields of :class:`Endpoint`.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    fleet : FleetSpec
        The fleet.
    endpoints : tuple of Endpoint
        One per instance, in the order of the fleet.

    Raises
    ------
    ConfigError
        Naming file, instance and key, if something is missing or does not fit.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> text = '''
    ... [[instance]]
    ... id = "p0"
    ... role = "prefill"
    ... profile = "a100-sxm-80gb/llama-3.1-8b"
    ... engine = { kind = "vllm", url = "http://10.0.0.1:8000", gpus = ["GPU-1"] }
    ... [[instance]]
    ... id = "d0"
    ... role = "decode"
    ... profile = "a100-sxm-80gb/llama-3.1-8b"
    ... engine = { kind = "vllm", url = "http://10.0.0.2:8000", gpus = ["GPU-2"] }
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "fleet.toml"
    ...     _ = path.write_text(text)
    ...     fleet, endpoints = load_endpoints(path)
    >>> fleet.ids, endpoints[1].url
    (('p0', 'd0'), 'http://10.0.0.2:8000')
    """
    from voltana_ctrl.profiles import load_profile

    fleet = FleetSpec.from_toml(path, load_profile)
    tables = read_toml(path)["instance"]
    endpoints = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}: instance {number}"
        if "engine" not in table:
            raise ConfigError(f"{where}: engine: missing; give kind and url of the running engine")
        if table.get("count", 1) != 1:
            raise ConfigError(f"{where}: count: expected 1 where an engine is given; repeat it")
        try:
            endpoints.append(_endpoint(fleet.ids[number - 1], table["engine"]))
        except ConfigError as error:
            raise ConfigError(f"{where}: engine: {error}") from error
    return fleet, tuple(endpoints)


_KEYS: Mapping[str, type] = {
    "kind": str,
    "url": str,
    "gpus": list,
    "metrics_url": str,
    "fpm": str,
    "bootstrap_port": int,
    "worker_id": int,
    "limits": str,
    "cpus": str,
}


def _endpoint(instance: str, table: Mapping[str, Any]) -> Endpoint:
    for key, value in table.items():
        if key not in _KEYS:
            raise ConfigError(f"unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise ConfigError(f"{key}: expected {_KEYS[key].__name__}, got {value!r}")
    for key in ("kind", "url"):
        if key not in table:
            raise ConfigError(f"{key}: missing")
    gpus = tuple(table.get("gpus", ()))
    if not all(isinstance(gpu, str) for gpu in gpus):
        raise ConfigError(f"gpus: expected UUIDs in quotes, got {list(gpus)!r}")
    return Endpoint(
        instance=instance, **{**table, "gpus": gpus, "cpus": _cpu_list(table.get("cpus"))}
    )


def _cpu_list(text: str | None) -> tuple[int, ...]:
    """Numbers of CPUs from ranges such as 0-3,8, as Linux writes them."""
    found: set[int] = set()
    for part in () if text is None else text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
            raise ConfigError(f"cpus: expected numbers and ranges such as 0-15,64-79, got {text!r}")
        if not int(first) <= int(last) < _MOST_CPUS:
            raise ConfigError(f"cpus: expected ranges that rise, below {_MOST_CPUS}, got {text!r}")
        found.update(range(int(first), int(last) + 1))
    return tuple(sorted(found))


def _http_url(name: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError as error:  # of brackets that hold no address, or of none around one
        raise ConfigError(
            f"{name}: expected http://HOST:PORT, an IPv6 address in brackets, got {text!r}: {error}"
        ) from error
    if parts.scheme not in ("http", "https") or not named:
        raise ConfigError(
            f"{name}: expected http://HOST:PORT, an IPv6 address in brackets, got {text!r}"
        )
    url = text.rstrip("/")
    # What clients call the base URL; paths that begin with it are appended.
    return url.removesuffix("/v1").rstrip("/") if name == "url" else url
