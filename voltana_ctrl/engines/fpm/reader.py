"""Subscriber of forward-pass metrics: the state of every instance, and its iterations."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import count
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.messages import (
    BadMessage,
    ForwardPass,
    OtherVersion,
    decode_forward_pass,
)
from voltana_ctrl.engines.fpm.state import RankState
from voltana_ctrl.engines.patience import longest_prefill_s
from voltana_ctrl.engines.reading import EngineReading
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import json_value
from voltana_ctrl.types import FleetSpec, IterationBatch

__all__ = ["FpmCounts", "FpmReader", "dynamo_fpm_addresses"]

_MAX_RANKS = 4096
_MAX_FRAME_BYTES = 1 << 20
_POLL_MS = 100
_BURST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class FpmCounts:
    """What an :class:`FpmReader` has seen since its start.

    Parameters
    ----------
    messages, iterations : int
        Messages taken, and those of them that tell of an iteration.
    lost : int
        Numbers missing between messages of a rank.
    restarts : int
        Times that a rank counted anew: its engine was restarted.
    bad, other_version : int
        Messages refused that are no forward-pass messages, or of a version that is not known.
    strangers : int
        Messages refused that are of no instance of this fleet.
    dropped : int
        Messages dropped since nobody called :meth:`FpmReader.read` in time.

    Examples
    --------
    >>> FpmCounts().lost
    0
    """

    messages: int = 0
    iterations: int = 0
    lost: int = 0
    restarts: int = 0
    bad: int = 0
    other_version: int = 0
    strangers: int = 0
    dropped: int = 0


class FpmReader:
    """Listens to the engines' forward-pass metrics in a thread of its own.

    A message belongs to the instance whose ``worker_id`` it carries, else to the instance
    that names the address it came from.

    Parameters
    ----------
    fleet : FleetSpec
        The instances.
    endpoints : sequence of Endpoint
        Their engines; those with ``fpm`` are listened to. Several addresses (one per
        data-parallel rank) are separated by commas.
    addresses : sequence of str
        More addresses to listen to, where messages are told apart by ``worker_id``; see
        :func:`dynamo_fpm_addresses`.
    keep : int
        Messages kept until they are read; older ones are dropped, and counted.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If pyzmq is not installed, or an address is not one.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.engines import Endpoint
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> engine = Endpoint(instance="decode-0", kind="vllm", url="http://localhost:8000",
    ...                   fpm="tcp://127.0.0.1:20380")
    >>> reader = FpmReader(fleet, [engine])
    >>> reading, iterations = reader.read(0.0)
    >>> reading.age_s, len(iterations)
    (array([inf, inf]), 0)
    >>> reader.close()
    """

    def __init__(
        self,
        fleet: FleetSpec,
        endpoints: Sequence[Endpoint],
        *,
        addresses: Sequence[str] = (),
        keep: int = 16_384,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        count("FpmReader.keep", keep)
        self._fleet = fleet
        self._now_s = now_s
        self._counts = dict.fromkeys((field.name for field in fields(FpmCounts)), 0)
        self._ranks: dict[tuple[int, int], RankState] = {}
        #: Seconds from asking for a clock until it runs, by instance id, as plugins measured it.
        self.delay_s: dict[str, float] = {}
        self._of_worker: dict[str, int] = {}
        self._of_address: dict[str, set[int]] = {address: set() for address in addresses}
        for endpoint in endpoints:
            i = fleet.ids.index(endpoint.instance)
            if endpoint.worker_id is not None:
                self._of_worker[str(endpoint.worker_id)] = i
            for address in endpoint.fpm.split(",") if endpoint.fpm else ():
                found = self._of_address.setdefault(address.strip(), set())
                if endpoint.worker_id is None:
                    found.add(i)
        self._inbox: deque[tuple[float, str, list[bytes]]] = deque(maxlen=keep)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if self._of_address:
            sockets = _subscribe(self._of_address)
            self._thread = threading.Thread(
                target=self._listen, args=(sockets,), name="voltana-ctrl-fpm", daemon=True
            )
            self._thread.start()

    @property
    def counts(self) -> FpmCounts:
        """Messages seen, lost and refused so far."""
        return FpmCounts(**self._counts)

    @property
    def listens(self) -> bool:
        """Whether there is any address to listen to."""
        return self._thread is not None

    def _listen(self, sockets: tuple[Any, dict[Any, str]]) -> None:
        zmq: Any = import_module("zmq")
        context, address_of = sockets
        poller = zmq.Poller()
        for socket in address_of:
            poller.register(socket, zmq.POLLIN)
        while not self._stopping.is_set():
            for socket, _ in poller.poll(_POLL_MS):
                # A burst of one engine must not keep the others waiting.
                with suppress(zmq.ZMQError):
                    for _ in range(_BURST):
                        frames = socket.recv_multipart(zmq.NOBLOCK)
                        self.take(address_of[socket], frames, self._now_s())
        context.destroy(linger=0)

    def take(self, address: str, frames: Sequence[bytes], t_s: float) -> None:
        """Take one message as if it had come from `address`.

        Parameters
        ----------
        address : str
            ZeroMQ address that it came from.
        frames : sequence of bytes
            Frames of the message.
        t_s : float
            Time at which it came, in seconds.
        """
        if len(self._inbox) == self._inbox.maxlen:
            self._counts["dropped"] += 1
        self._inbox.append((t_s, address, list(frames)))

    def read(self, t_s: float) -> tuple[EngineReading, IterationBatch]:
        """State now, and the iterations since the last read, without energy.

        Their clock is what our plugin asked for; 0 where none did.

        Parameters
        ----------
        t_s : float
            Time of the reading, on the clock of `now_s`.

        Returns
        -------
        reading : EngineReading
            State of every instance, without clock, power and energy. Arrivals are those since the
            last read.
        iterations : IterationBatch
            A row for each message of an iteration.
        """
        rows: list[tuple[int, float, ForwardPass]] = []
        for _ in range(len(self._inbox)):
            arrived_s, address, frames = self._inbox.popleft()
            try:
                one = decode_forward_pass(frames)
            except OtherVersion:
                self._counts["other_version"] += 1
                continue
            except BadMessage:
                self._counts["bad"] += 1
                continue
            i = self._instance(address, one)
            if i is None:
                self._counts["strangers"] += 1
                continue
            self._follow(i, one, arrived_s)
            if not one.is_heartbeat:
                rows.append((i, arrived_s, one))
        self._counts["iterations"] += len(rows)
        return self._reading(t_s), _batch(rows)

    def _instance(self, address: str, one: ForwardPass) -> int | None:
        named = self._of_worker.get(one.worker_id)
        if named is not None:
            return named
        there = self._of_address.get(address, set())
        return next(iter(there)) if len(there) == 1 else None

    def _follow(self, i: int, one: ForwardPass, t_s: float) -> None:
        self._counts["messages"] += 1
        rank = self._ranks.get((i, one.dp_rank))
        if rank is None:
            if len(self._ranks) >= _MAX_RANKS:
                self._counts["strangers"] += 1
                return
            instance = self._fleet.instances[i]
            rank = self._ranks[i, one.dp_rank] = RankState(
                prefills=instance.role.prefills,
                decodes=instance.role.decodes,
                budget_tok=instance.prefill_budget_tok,
                longest_s=partial(longest_prefill_s, instance),
            )
        missing = rank.missing(one)
        if missing < 0:
            self._counts["restarts"] += 1
            rank.now = ForwardPass()
        else:
            self._counts["lost"] += missing
        rank.take(one, t_s)
        if one.delay_s > 0.0:
            self.delay_s[self._fleet.ids[i]] = one.delay_s

    def _reading(self, t_s: float) -> EngineReading:
        n = len(self._fleet)
        told = {name: np.zeros(n) for name in _SUMMED}
        age_s, oldest_s = np.full(n, -1.0), np.zeros(n)
        for (i, _), rank in self._ranks.items():
            age_s[i] = max(age_s[i], t_s - rank.seen_s, 0.0)
            oldest_s[i] = max(oldest_s[i], rank.oldest_wait_s(t_s))
            for name in _SUMMED:
                told[name][i] += getattr(rank, name)
            rank.arrived_req = rank.arrived_tok = 0.0
        silent = age_s < 0.0
        told = {name: np.where(silent, np.nan, value) for name, value in told.items()}
        return EngineReading.silent(
            n,
            age_s=np.where(silent, np.inf, age_s),
            oldest_wait_s=np.where(silent, np.nan, oldest_s),
            **told,
        )

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()


_SUMMED = ("queue_req", "queue_tok", "running_req", "kv_used_tok", "arrived_req", "arrived_tok")


def _subscribe(addresses: Sequence[str] | dict[str, Any]) -> tuple[Any, dict[Any, str]]:
    try:
        import_module("msgpack")  # read() needs it, and must not fail
        zmq: Any = import_module("zmq")
    except ImportError as error:
        raise ConfigError(
            "forward-pass metrics: pyzmq or msgpack is not installed; pip install"
            " 'voltana-ctrl[server]'"
        ) from error
    context = zmq.Context()
    address_of = {}
    for address in addresses:
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            raise ConfigError(
                f"forward-pass metrics: {address}: expected tcp://HOST:PORT or ipc://PATH: {error}"
            ) from error
        address_of[socket] = address
    return context, address_of


def _batch(rows: list[tuple[int, float, ForwardPass]]) -> IterationBatch:
    if not rows:
        return IterationBatch.empty()
    instance, t_s, passes = zip(*rows, strict=True)
    columns = np.array(
        [
            (
                one.wall_s,
                one.decode_req,
                one.prefill_tok,
                one.decode_kv_tok + one.prefill_kv_tok,
                one.clock_mhz,
            )
            for one in passes
        ]
    ).T
    none = np.zeros(len(rows))
    return IterationBatch(
        instance=np.array(instance),
        t_s=np.array(t_s),
        wall_s=columns[0],
        batch_req=columns[1],
        prefill_tok=columns[2],
        kv_tok=columns[3],
        freq_mhz=columns[4],
        energy_j=none,
    )


def dynamo_fpm_addresses(folder: str | Path) -> tuple[str, ...]:
    """Addresses at which Dynamo's workers publish, from its file-backed discovery.

    With ``DYN_DISCOVERY_BACKEND=file`` and ``DYN_EVENT_PLANE=zmq`` every worker writes where it
    publishes under the folder ``DYN_FILE_KV``. Ports change with every start.

    Parameters
    ----------
    folder : str or Path
        Folder that ``DYN_FILE_KV`` names.

    Returns
    -------
    tuple of str
        ZeroMQ addresses; empty where there is no such folder, or no worker.

    Examples
    --------
    >>> dynamo_fpm_addresses("no-such-folder")
    ()
    """
    found = []
    for path in sorted(Path(folder).glob("*/event_channels/*")):
        try:
            channel = json_value(path.read_bytes(), str(path))
            transport = channel["transport"]
            if channel["topic"] == "forward-pass-metrics" and transport["kind"] == "Zmq":
                found.append(str(transport["config"]["endpoint"]))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # being written, or of another version
    return tuple(found)
