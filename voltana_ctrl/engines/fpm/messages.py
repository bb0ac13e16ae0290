"""Forward-pass metrics: one message per engine iteration, read from ZeroMQ.

Dynamo, vLLM under Dynamo's instrumented scheduler and SGLang publish the same message, a
MessagePack map of version 1. An engine sends it as the last frame of three (topic, sequence,
message); Dynamo's event plane as the last of four (topic, publisher, sequence, envelope), where
the envelope is a one-byte version, a four-byte length and a map whose ``payload`` is the
message. Neither Dynamo nor msgspec is needed to read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from voltana_ctrl.errors import BackendError, ConfigError

__all__ = [
    "CLOCK_KEY",
    "DELAY_KEY",
    "BadMessage",
    "ForwardPass",
    "OtherVersion",
    "decode_forward_pass",
]

_VERSION = 1
_MAX_BYTES = 65_536
_MAX_COUNT = 1e15
_MAX_WALL_S = 86_400.0
_MAX_DELAY_S, _MAX_MHZ = 60.0, 1e5
#: What our plugin says beyond the messages of others, who leave it alone.
CLOCK_KEY, DELAY_KEY = "voltana_ctrl_clock", "voltana_ctrl_delay"
_MAX_RANK = 65_535
_MAX_NUMBER = 2**63
_MAX_ID = 200


class BadMessage(BackendError):
    """Bytes that are no forward-pass message."""


class OtherVersion(BadMessage):
    """A forward-pass message of a version that is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """One iteration of an engine, and what waits behind it; all counts are 0 unless told.

    Parameters
    ----------
    worker_id : str
        Dynamo's id of the worker; empty outside Dynamo.
    dp_rank : int
        Data-parallel rank; each has a scheduler of its own.
    number : int
        Counts the messages of a rank upwards, so that lost ones are noticed.
    wall_s : float
        Seconds that the iteration took; 0 in a heartbeat.
    prefill_req, prefill_tok, prefill_kv_tok : float
        Requests prefilled, prompt tokens computed for them, KV tokens read for them.
    decode_req, decode_kv_tok : float
        Requests that decoded, and the tokens that they hold in the KV cache.
    queued_prefill_req, queued_prefill_tok : float
        Prompts that wait for prefill, and their tokens.
    queued_decode_req, queued_decode_kv_tok : float
        Requests that wait with KV, preempted or in transfer from prefill, and its tokens.
    clock_mhz : float
        Clock that our plugin asked for before the iteration; 0 where it did not.
    delay_s : float
        Seconds from asking for a clock until it runs, as our plugin measured it; 0 where nobody
        did.

    Examples
    --------
    >>> ForwardPass().is_heartbeat
    True
    """

    worker_id: str = ""
    dp_rank: int = 0
    number: int = 0
    wall_s: float = 0.0
    prefill_req: float = 0.0
    prefill_tok: float = 0.0
    prefill_kv_tok: float = 0.0
    decode_req: float = 0.0
    decode_kv_tok: float = 0.0
    queued_prefill_req: float = 0.0
    queued_prefill_tok: float = 0.0
    queued_decode_req: float = 0.0
    queued_decode_kv_tok: float = 0.0
    clock_mhz: float = 0.0
    delay_s: float = 0.0

    @property
    def is_heartbeat(self) -> bool:
        """Whether no iteration ran: the engine only says that it lives."""
        return self.wall_s == 0.0


def decode_forward_pass(frames: Sequence[bytes]) -> ForwardPass:
    """Forward pass from the frames of a ZeroMQ message.

    The message is the last frame, either alone or within the envelope of Dynamo's event plane,
    which is taken off. Numbers that it does not hold count as 0, fields that are not known are left
    alone, and a message without a version counts as one of version 1.

    Parameters
    ----------
    frames : sequence of bytes
        As received from an engine or from Dynamo.

    Returns
    -------
    ForwardPass
        The iteration; a heartbeat where it took no time.

    Raises
    ------
    OtherVersion
        If the message is of a version that is not known here.
    BadMessage
        If it is longer than 64 KiB, is no MessagePack map, has neither ``wall_time`` nor
        ``scheduled_requests``, or holds a value of the wrong kind or size.
    ConfigError
        If msgpack is not installed.

    Examples
    --------
    >>> import msgpack
    >>> message = {"version": 1, "wall_time": 0.02, "counter_id": 7,
    ...            "scheduled_requests": {"num_decode_requests": 3, "sum_decode_kv_tokens": 900}}
    >>> one = decode_forward_pass([b"", (7).to_bytes(8, "big"), msgpack.packb(message)])
    >>> one.wall_s, one.decode_req, one.decode_kv_tok, one.queued_prefill_req
    (0.02, 3.0, 900.0, 0.0)
    """
    if not frames:
        raise BadMessage("forward-pass metrics: a message without frames")
    data = bytes(frames[-1])
    if len(data) > _MAX_BYTES:
        raise BadMessage(f"forward-pass metrics: {len(data)} bytes, more than {_MAX_BYTES}")
    if data[:1] == b"\x01" and int.from_bytes(data[1:5], "big") == len(data) - 5:
        data = _unpacked(data[5:]).get("payload", b"")
        if not isinstance(data, bytes):
            raise BadMessage("forward-pass metrics: an envelope without a payload")
    told = _unpacked(data)
    version = told.get("version", _VERSION)
    if type(version) is not int or version != _VERSION:
        raise OtherVersion(
            f"forward-pass metrics: version {str(version)[:20]}, known is {_VERSION}; update"
            " voltana-ctrl"
        )
    if "wall_time" not in told and "scheduled_requests" not in told:
        raise BadMessage("forward-pass metrics: neither wall_time nor scheduled_requests")
    worker_id = told.get("worker_id", "")
    if type(worker_id) not in (str, int) or len(str(worker_id)) > _MAX_ID:
        raise BadMessage("forward-pass metrics: worker_id: expected text")
    scheduled, queued = _part(told, "scheduled_requests"), _part(told, "queued_requests")
    return ForwardPass(
        worker_id=str(worker_id),
        dp_rank=int(_number(told, "dp_rank", _MAX_RANK)),
        number=int(_number(told, "counter_id", _MAX_NUMBER)),
        wall_s=float(_number(told, "wall_time", _MAX_WALL_S)),
        prefill_req=_amount(scheduled, "num_prefill_requests"),
        prefill_tok=_amount(scheduled, "sum_prefill_tokens"),
        prefill_kv_tok=_amount(scheduled, "sum_prefill_kv_tokens"),
        decode_req=_amount(scheduled, "num_decode_requests"),
        decode_kv_tok=_amount(scheduled, "sum_decode_kv_tokens"),
        queued_prefill_req=_amount(queued, "num_prefill_requests"),
        queued_prefill_tok=_amount(queued, "sum_prefill_tokens"),
        queued_decode_req=_amount(queued, "num_decode_requests"),
        queued_decode_kv_tok=_amount(queued, "sum_decode_kv_tokens"),
        clock_mhz=float(_number(told, CLOCK_KEY, _MAX_MHZ)),
        delay_s=float(_number(told, DELAY_KEY, _MAX_DELAY_S)),
    )


def _unpacked(data: bytes) -> Mapping[str, Any]:
    try:
        import msgpack
    except ImportError as error:
        raise ConfigError(
            "forward-pass metrics: msgpack is not installed; pip install 'voltana-ctrl[server]'"
        ) from error
    try:
        told = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise BadMessage(f"forward-pass metrics: not MessagePack: {error}") from error
    if not isinstance(told, dict):
        raise BadMessage(f"forward-pass metrics: expected a map, got {type(told).__name__}")
    return told


def _part(told: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = told.get(key)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise BadMessage(f"forward-pass metrics: {key}: expected a map")
    return part


def _number(told: Mapping[str, Any], key: str, highest: float) -> float:
    value = told.get(key)
    if value is None:
        return 0
    if type(value) not in (int, float) or not 0 <= value <= highest or math.isnan(value):
        raise BadMessage(f"forward-pass metrics: {key}: expected 0 to {highest:g}")
    return value  # type: ignore[no-any-return]


def _amount(told: Mapping[str, Any], key: str) -> float:
    return float(_number(told, key, _MAX_COUNT))
