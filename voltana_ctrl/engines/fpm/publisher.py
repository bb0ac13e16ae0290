"""Publisher of forward-pass metrics, for engines that have none of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import Any

from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.errors import ConfigError

__all__ = ["FpmPublisher", "encode_forward_pass"]

_HEARTBEAT_S = 1.0
_WAIT_S = 0.005


def encode_forward_pass(one: ForwardPass) -> bytes:
    """Message of a forward pass, as Dynamo, vLLM and SGLang write it (version 1).

    Variances, which nobody here reads, are left out.

    Parameters
    ----------
    one : ForwardPass
        The iteration.

    Examples
    --------
    >>> from voltana_ctrl.engines.fpm.messages import decode_forward_pass
    >>> one = ForwardPass(number=4, wall_s=0.02, decode_req=3.0)
    >>> decode_forward_pass([encode_forward_pass(one)]) == one
    True
    """
    return _packer()(
        {
            "version": 1,
            "worker_id": one.worker_id,
            "dp_rank": one.dp_rank,
            "counter_id": one.number,
            "wall_time": one.wall_s,
            "scheduled_requests": {
                "num_prefill_requests": int(one.prefill_req),
                "sum_prefill_tokens": int(one.prefill_tok),
                "sum_prefill_kv_tokens": int(one.prefill_kv_tok),
                "num_decode_requests": int(one.decode_req),
                "sum_decode_kv_tokens": int(one.decode_kv_tok),
            },
            "queued_requests": {
                "num_prefill_requests": int(one.queued_prefill_req),
                "sum_prefill_tokens": int(one.queued_prefill_tok),
                "num_decode_requests": int(one.queued_decode_req),
                "sum_decode_kv_tokens": int(one.queued_decode_kv_tok),
            },
        }
    )


def _packer() -> Callable[[object], bytes]:
    """Pack a value: with msgpack, else with msgspec, which vLLM and SGLang bring along."""
    try:
        packer: Callable[[object], bytes] = import_module("msgpack").packb
    except ImportError:
        packer = import_module("msgspec.msgpack").encode
    return packer


class FpmPublisher:
    """Sends forward passes from a thread of its own, and a heartbeat when there is none.

    Parameters
    ----------
    address : str
        Where to listen for subscribers, ``tcp://HOST:PORT`` or ``ipc://PATH``.
    worker_id : str
        Sent with every message.
    dp_rank : int
        Of this engine.
    keep : int
        Passes that wait for the thread; more are dropped, oldest first.

    Raises
    ------
    ConfigError
        If pyzmq is not installed or the address cannot be had.

    Examples
    --------
    >>> publisher = FpmPublisher("tcp://127.0.0.1:*")
    >>> publisher.send(ForwardPass(wall_s=0.02, decode_req=3.0))
    >>> publisher.address.startswith("tcp://127.0.0.1:")
    True
    >>> publisher.close()
    """

    def __init__(
        self, address: str, *, worker_id: str = "", dp_rank: int = 0, keep: int = 4096
    ) -> None:
        try:
            _packer()
            zmq: Any = import_module("zmq")
        except ImportError as error:
            raise ConfigError(
                "forward-pass metrics: pyzmq or msgpack is not installed; pip install"
                " 'voltana-ctrl[server]'"
            ) from error
        self._worker_id, self._dp_rank = worker_id, dp_rank
        self._passes: deque[ForwardPass] = deque(maxlen=keep)
        self._stopping = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"forward-pass metrics: {address}: {error}") from error
        #: Where it listens, with the port that was found for ``tcp://HOST:*``.
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="voltana-ctrl-fpm", daemon=True)
        self._thread.start()

    def send(self, one: ForwardPass) -> None:
        """Send a forward pass soon; never waits.

        Parameters
        ----------
        one : ForwardPass
            Its worker, rank and number are set here.
        """
        self._passes.append(one)

    def _run(self) -> None:
        number, sent_s = 0, time.monotonic()
        while True:
            stopping = self._stopping.wait(_WAIT_S)
            due: list[ForwardPass] = []
            while self._passes:
                due.append(self._passes.popleft())
            if not due and time.monotonic() - sent_s >= _HEARTBEAT_S:
                due.append(ForwardPass())
            for one in due:
                self._socket.send_multipart(self._frames(one, number))
                number, sent_s = number + 1, time.monotonic()
            if stopping:
                break
        self._context.destroy(linger=100)

    def _frames(self, one: ForwardPass, number: int) -> list[bytes]:
        named = ForwardPass(
            **{
                **{name: getattr(one, name) for name in ForwardPass.__slots__},
                "worker_id": self._worker_id,
                "dp_rank": self._dp_rank,
                "number": number,
            }
        )
        return [b"", number.to_bytes(8, "big"), encode_forward_pass(named)]

    def close(self) -> None:
        """Send what waits, and stop; may be called twice."""
        self._stopping.set()
        self._thread.join(5.0)
