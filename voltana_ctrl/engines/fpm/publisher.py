"""Publisher of forward-pass metrics, for engines that have none of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from voltana_ctrl.engines.fpm.messages import CLOCK_KEY, DELAY_KEY, ForwardPass
from voltana_ctrl.errors import ConfigError

__all__ = ["FpmPublisher", "encode_forward_pass"]

_HEARTBEAT_S = 1.0
# How often an engine that says nothing is looked after.
_LOOK_S = 0.25


def encode_forward_pass(one: ForwardPass, pack: Callable[[object], bytes] | None = None) -> bytes:
    """Message of a forward pass, as Dynamo, vLLM and SGLang write it (version 1).

    Variances, which nobody here reads, are left out.

    Parameters
    ----------
    one : ForwardPass
        The iteration.
    pack : callable, optional
        Packs a value as MessagePack; looked for at every call without, which takes forty
        times as long as packing where msgpack is not installed.

    Returns
    -------
    bytes
        MessagePack, the last frame of a ZeroMQ message. Counts are cut to whole numbers.

    Examples
    --------
    >>> from voltana_ctrl.engines.fpm.messages import ForwardPass, decode_forward_pass
    >>> one = ForwardPass(number=4, wall_s=0.02, decode_req=3.0)
    >>> decode_forward_pass([encode_forward_pass(one)]) == one
    True
    """
    return (pack or _packer())(_plain(one, one.worker_id, one.dp_rank, one.number))


def _plain(one: ForwardPass, worker_id: str, dp_rank: int, number: int) -> dict[str, object]:
    told = {CLOCK_KEY: one.clock_mhz, DELAY_KEY: one.delay_s}
    ours = {key: value for key, value in told.items() if value > 0.0}
    return {
        **ours,
        "version": 1,
        "worker_id": worker_id,
        "dp_rank": dp_rank,
        "counter_id": number,
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


def _packer() -> Callable[[object], bytes]:
    """Pack a value: with msgpack, else with msgspec, which vLLM and SGLang bring along."""
    try:
        packer: Callable[[object], bytes] = import_module("msgpack").packb
    except ImportError:
        packer = import_module("msgspec.msgpack").encode
    return packer


class FpmPublisher:
    """Sends forward passes as they come, and a heartbeat when there is none.

    A pass is sent in the thread that tells of it, which costs it some 10 us, and ten times that
    from cold caches: a publisher's socket never waits for a subscriber. Passes that come within
    `together_s` of the last that was sent wait for the next one after that, and all of them then
    cost 9 us each and one waking of the socket's thread, which costs more than what it sends; the
    last before a pause leaves at most a quarter of a second late.

    A thread that sends would have to take the interpreter from the engine at every iteration, and
    on a busy machine may be stopped while it has it. Only heartbeats, and what waits when the
    engine pauses, come from a thread, which sleeps while passes are sent.

    Parameters
    ----------
    address : str
        Address to listen on for subscribers, ``tcp://HOST:PORT`` or ``ipc://PATH``.
    worker_id : str
        Id that is sent with every message.
    dp_rank : int
        Data-parallel rank of this engine, sent with every message.
    together_s : float
        Passes closer to each other than this are sent together.
    keep : int
        Passes that may wait to be sent; more are dropped, oldest first.

    Raises
    ------
    ConfigError
        If pyzmq is not installed or the address cannot be had.

    Examples
    --------
    >>> from voltana_ctrl.engines.fpm.messages import ForwardPass
    >>> publisher = FpmPublisher("tcp://127.0.0.1:*")
    >>> publisher.send(ForwardPass(wall_s=0.02, decode_req=3.0))
    >>> publisher.address.startswith("tcp://127.0.0.1:")
    True
    >>> publisher.close()
    """

    def __init__(
        self,
        address: str,
        *,
        worker_id: str = "",
        dp_rank: int = 0,
        together_s: float = 0.02,
        keep: int = 4096,
    ) -> None:
        try:
            self._pack = _packer()
            zmq: Any = import_module("zmq")
        except ImportError as error:
            raise ConfigError(
                "forward-pass metrics: pyzmq or msgpack is not installed; pip install"
                " 'voltana-ctrl[server]'"
            ) from error
        self._worker_id, self._dp_rank, self._together_s = worker_id, dp_rank, together_s
        self._passes: deque[ForwardPass] = deque(maxlen=keep)
        self._number, self._sent_s = 0, time.monotonic()
        # A socket is used by one thread at a time.
        self._sending = threading.Lock()
        self._no_wait, self._refused = zmq.NOBLOCK, zmq.ZMQError
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
        """Send a forward pass, or keep it for the next one; never waits.

        Parameters
        ----------
        one : ForwardPass
            What the iteration did; its worker, rank and number are set here.
        """
        self._passes.append(one)
        if time.monotonic() - self._sent_s < self._together_s:
            return
        if self._sending.acquire(blocking=False):  # else who has it sends this one, too
            try:
                self._send_waiting()
            finally:
                self._sending.release()

    def _send_waiting(self) -> None:
        while self._passes and not self._stopping.is_set():
            self._send(self._passes.popleft())

    def _send(self, one: ForwardPass) -> None:
        with suppress(self._refused):
            self._socket.send_multipart(self._frames(one, self._number), self._no_wait)
        self._number, self._sent_s = self._number + 1, time.monotonic()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(_LOOK_S)
            with self._sending:
                while self._passes:
                    self._send(self._passes.popleft())
                if not stopping and time.monotonic() - self._sent_s >= _HEARTBEAT_S:
                    self._send(ForwardPass())
        self._context.destroy(linger=100)

    def _frames(self, one: ForwardPass, number: int) -> list[bytes]:
        message = self._pack(_plain(one, self._worker_id, self._dp_rank, number))
        return [b"", number.to_bytes(8, "big"), message]

    def close(self) -> None:
        """Send what waits, and stop; may be called twice."""
        self._stopping.set()
        self._thread.join(5.0)
