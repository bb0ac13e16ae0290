"""What prefill and decode engines of each kind must be told."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.errors import ConfigError

__all__ = ["dialect_of", "dynamo_pins", "kv_transfer_params", "sglang_meeting"]


def dialect_of(endpoints: Sequence[Endpoint], *, colocated: bool) -> str:
    """How requests are handed to these engines.

    Parameters
    ----------
    endpoints : sequence of Endpoint
        Engines of one kind.
    colocated : bool
        Whether each instance does both phases.

    Returns
    -------
    {"plain", "vllm", "sglang", "dynamo"}
        Plain: the request as it is, to one of them.

    Raises
    ------
    ConfigError
        If kinds are mixed, or an engine lacks what its kind needs.

    Examples
    --------
    >>> from voltana_ctrl.engines import Endpoint
    >>> dialect_of([Endpoint(instance="c0", kind="trtllm", url="http://one:8000")], colocated=True)
    'plain'
    """
    kinds = sorted({endpoint.kind for endpoint in endpoints})
    if len(kinds) != 1:
        raise ConfigError(f"endpoints: expected engines of one kind, got {kinds}")
    kind = kinds[0]
    if kind == "dynamo":
        for endpoint in endpoints:
            if endpoint.worker_id is None:
                raise ConfigError(
                    f"{endpoint.instance}: worker_id: missing; a Dynamo worker is pinned by it"
                )
        return kind
    if colocated:
        return "plain"
    if kind == "trtllm":
        raise ConfigError(
            "kind: expected vllm, sglang or dynamo where prefill and decode are apart, got trtllm"
        )
    return kind


def kv_transfer_params(content: bytes) -> Any:
    """Reference to the KV cache that the prefill engine of vLLM keeps for a request.

    Parameters
    ----------
    content : bytes
        Answer of the prefill engine.

    Returns
    -------
    object or None
        What the decode engine is sent as ``kv_transfer_params``; None if the answer has none.

    Examples
    --------
    >>> kv_transfer_params(b'{"choices": [], "kv_transfer_params": {"remote_port": 5600}}')
    {'remote_port': 5600}
    """
    try:
        made = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return made.get("kv_transfer_params") if isinstance(made, dict) else None


def sglang_meeting(prefill: Endpoint, *, prompts: int | None = None) -> dict[str, Any]:
    """Fields that tell both engines of SGLang where and under which number they meet.

    Parameters
    ----------
    prefill : Endpoint
        Endpoint of the prefill engine.
    prompts : int, optional
        How many prompts, where the request brings a list of them: each has a number of its own.

    Returns
    -------
    dict
        Fields to add to the request; lists where `prompts` is given.

    Examples
    --------
    >>> from voltana_ctrl.engines import Endpoint
    >>> end = Endpoint(instance="p0", kind="sglang", url="http://[::1]:30000", bootstrap_port=8998)
    >>> pair = sglang_meeting(end)
    >>> pair["bootstrap_host"], pair["bootstrap_port"], 0 <= pair["bootstrap_room"] < 2**63
    ('[::1]', 8998, True)
    """
    host, port = urlsplit(prefill.url).hostname or "", prefill.bootstrap_port
    if ":" in host:  # SGLang writes host, colon and port one after the other
        host = f"[{host}]"
    if prompts is None:
        room = random.getrandbits(63)
        return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}
    return {
        "bootstrap_host": [host] * prompts,
        "bootstrap_port": [port] * prompts,
        "bootstrap_room": [random.getrandbits(63) for _ in range(prompts)],
    }


def dynamo_pins(
    nvext: dict[str, Any] | None, prefill: Endpoint | None, decode: Endpoint
) -> dict[str, Any]:
    """Fields that pin a request to workers at Dynamo's frontend.

    Parameters
    ----------
    nvext : dict or None
        The client's other wishes, which are kept.
    prefill : Endpoint or None
        Prefill worker; None where one worker does both.
    decode : Endpoint
        Decode worker.

    Returns
    -------
    dict
        Field ``nvext`` to add to the request.

    Examples
    --------
    >>> from voltana_ctrl.engines import Endpoint
    >>> ends = [Endpoint(instance=f"w{k}", kind="dynamo", url="http://one:8000", worker_id=k)
    ...         for k in (7, 8)]
    >>> dynamo_pins({"extra_fields": ["timing"]}, *ends)["nvext"]
    {'extra_fields': ['timing'], 'prefill_worker_id': 7, 'decode_worker_id': 8}
    """
    pins: dict[str, Any] = {"backend_instance_id": decode.worker_id}
    if prefill is not None:
        pins = {"prefill_worker_id": prefill.worker_id, "decode_worker_id": decode.worker_id}
    return {"nvext": {**(nvext or {}), **pins}}
