"""What prefill and decode engines of each kind must be told, and how their streams begin."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.errors import ConfigError

__all__ = [
    "dialect_of",
    "dynamo_pinned",
    "has_begun",
    "sglang_pair",
    "tells_failure",
    "vllm_prefill",
]

# What the prefill engine must not be asked for: it makes one token.
_DECODE_ONLY = ("stream_options", "min_tokens")


def dialect_of(endpoints: Sequence[Endpoint], *, colocated: bool) -> str:
    """How requests are handed to these engines.

    Parameters
    ----------
    endpoints : sequence of Endpoint
        Of one kind.
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


def vllm_prefill(body: dict[str, Any]) -> dict[str, Any]:
    """Request to the prefill engine of vLLM: one token, and its KV cache kept for another.

    Parameters
    ----------
    body : dict
        The client's request.

    Examples
    --------
    >>> made = vllm_prefill({"prompt": "hi", "max_tokens": 80, "stream": True})
    >>> made["max_tokens"], made["stream"], made["kv_transfer_params"]["do_remote_decode"]
    (1, False, True)
    """
    asked = {key: value for key, value in body.items() if key not in _DECODE_ONLY}
    asked |= {
        "stream": False,
        "max_tokens": 1,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    return asked


def kv_transfer_params(content: bytes) -> Any:
    """What the prefill engine of vLLM says of the KV cache it keeps; None if nothing."""
    try:
        made = json.loads(content)
    except ValueError:
        return None
    return made.get("kv_transfer_params") if isinstance(made, dict) else None


def sglang_pair(body: dict[str, Any], prefill: Endpoint) -> dict[str, Any]:
    """Request to both engines of SGLang: where and under which number they meet.

    Parameters
    ----------
    body : dict
        The client's request.
    prefill : Endpoint
        Of the prefill engine.

    Examples
    --------
    >>> end = Endpoint(instance="p0", kind="sglang", url="http://one:30000", bootstrap_port=8998)
    >>> pair = sglang_pair({"prompt": "hi"}, end)
    >>> pair["bootstrap_host"], pair["bootstrap_port"], 0 <= pair["bootstrap_room"] < 2**63
    ('one', 8998, True)
    """
    host, port = urlsplit(prefill.url).hostname, prefill.bootstrap_port
    prompts = body.get("prompt")
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        n = len(prompts)
        rooms = [random.getrandbits(63) for _ in range(n)]
        meet = {
            "bootstrap_host": [host] * n,
            "bootstrap_port": [port] * n,
            "bootstrap_room": rooms,
        }
        return {**body, **meet}
    meet_one = {
        "bootstrap_host": host,
        "bootstrap_port": port,
        "bootstrap_room": random.getrandbits(63),
    }
    return {**body, **meet_one}


def dynamo_pinned(
    body: dict[str, Any], prefill: Endpoint | None, decode: Endpoint
) -> dict[str, Any]:
    """Request to Dynamo's frontend, pinned to workers.

    Parameters
    ----------
    body : dict
        The client's request; its other `nvext` fields are kept.
    prefill : Endpoint or None
        Prefill worker; None where one worker does both.
    decode : Endpoint
        Decode worker.

    Examples
    --------
    >>> ends = [Endpoint(instance=f"w{k}", kind="dynamo", url="http://one:8000", worker_id=k)
    ...         for k in (7, 8)]
    >>> dynamo_pinned({"nvext": {"extra_fields": ["timing"]}}, *ends)["nvext"]
    {'extra_fields': ['timing'], 'prefill_worker_id': 7, 'decode_worker_id': 8}
    """
    given = body.get("nvext")
    pins: dict[str, Any] = {"backend_instance_id": decode.worker_id}
    if prefill is not None:
        pins = {"prefill_worker_id": prefill.worker_id, "decode_worker_id": decode.worker_id}
    return {**body, "nvext": {**(given if isinstance(given, dict) else {}), **pins}}


def encoded(body: dict[str, Any]) -> bytes:
    """Body as it is sent."""
    return json.dumps(body).encode()


def has_begun(head: bytes) -> bool | None:
    r"""Whether a stream has brought a token; what comes before it can be had again.

    Parameters
    ----------
    head : bytes
        The stream so far.

    Returns
    -------
    bool or None
        None if the engine tells that it failed, for no fault of the request.

    Examples
    --------
    >>> role = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}'
    >>> has_begun(role + b"\n\n")
    False
    >>> has_begun(b'data: {"choices": [{"index": 0, "text": " a"}]}\n\n')
    True
    >>> has_begun(b'data: {"error": {"message": "engine died", "code": 500}}\n\n') is None
    True
    """
    for event in head.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if not lines:
            continue
        try:
            told = json.loads(b"\n".join(lines))
        except ValueError:
            return True
        if _is_engine_failure(told):
            return None
        if not _is_prologue(told):
            return True
    return False


def tells_failure(tail: bytes) -> bool:
    r"""Whether the end of a stream tells that the engine failed, as vLLM's does when it dies.

    Parameters
    ----------
    tail : bytes
        The last events, the first of them perhaps cut.

    Examples
    --------
    >>> tells_failure(b'data: {"error": {"message": "engine died"}}\n\ndata: [DONE]\n\n')
    True
    >>> tells_failure(b'data: {"choices": [{"text": "\\"error\\""}]}\n\ndata: [DONE]\n\n')
    False
    """
    for line in tail.splitlines():
        if line.startswith(b"data:") and b'"error"' in line:
            try:
                told = json.loads(line[5:])
            except ValueError:
                continue
            if isinstance(told, dict) and told.get("error"):
                return True
    return False


def _is_engine_failure(event: Any) -> bool:
    """Whether an event tells of a failure that is not the request's own."""
    if not isinstance(event, dict) or not event.get("error"):
        return False
    error = event["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return not (isinstance(code, int) and 400 <= code < 500)


def _is_prologue(event: Any) -> bool:
    """Whether a chat event brings nothing but a role."""
    choices = event.get("choices") if isinstance(event, dict) else None
    if not (isinstance(choices, list) and choices):
        return False
    for choice in choices:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict) or "role" not in delta or choice.get("finish_reason"):
            return False
        if any(value for key, value in delta.items() if key != "role"):
            return False
    return True
