"""The privileged setter: the one program that runs as root, and all it can do is set clocks.

It listens on a Unix socket, asks the kernel who the peer is, and takes two verbs, `lock` and
`reset`, one JSON object per line, for GPUs on its list, clocks in its range, so many a second.
A connection is a hold: when it ends, however it ends, what was set through it is given back.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voltana_ctrl.backends.nvml.driver import Gpu, Nvml, whole_gpus
from voltana_ctrl.backends.nvml.giveback import FoundGpu
from voltana_ctrl.backends.nvml.lease import Lease, end_on_sigterm
from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
from voltana_ctrl.backends.nvml.setter_client import SETTER_SOCKET, peer_uid
from voltana_ctrl.backends.nvml.sweep import Sweep
from voltana_ctrl.errors import BackendError, ConfigError, VoltanaError
from voltana_ctrl.files import own_folder

__all__ = [
    "ClockRequest",
    "Setter",
    "SetterPolicy",
    "TokenBucket",
    "parse_request",
    "run_setter",
]

_LINE_BYTES = 512
# Entries of a POSIX access list, as the kernel numbers them (linux/posix_acl.h).
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NOBODY = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
_PEERS, _PEERS_OF_UID = 64, 16
_BACKLOG = 128
_RETRY_S = 0.2
_BREATH_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SetterPolicy:
    """What the setter lets its peers do.

    Parameters
    ----------
    clocks_mhz : mapping of str to frozenset of int
        Supported clocks of each GPU on the allow-list, by UUID.
    uids : frozenset of int
        Users that may ask.
    lo_mhz, hi_mhz : int
        Range that clocks must lie in.
    max_sets_s : float
        Sets per second and GPU, over the long run.
    burst : int
        Sets of one GPU that may follow at once after a pause.

    Raises
    ------
    ConfigError
        If nothing would be allowed, or a value is not positive.

    Examples
    --------
    >>> SetterPolicy(clocks_mhz={"GPU-0": frozenset({210, 225})}, uids=frozenset({1000})).burst
    10
    """

    clocks_mhz: Mapping[str, frozenset[int]]
    uids: frozenset[int]
    lo_mhz: int = 0
    hi_mhz: int = 100_000
    max_sets_s: float = 50.0
    burst: int = 10

    def __post_init__(self) -> None:
        if not self.clocks_mhz:
            raise ConfigError("SetterPolicy.clocks_mhz: expected at least one GPU, got none")
        if not self.uids:
            raise ConfigError("SetterPolicy.uids: expected at least one user id, got none")
        if not 0 <= self.lo_mhz <= self.hi_mhz:
            raise ConfigError(
                f"SetterPolicy: expected 0 <= lo_mhz <= hi_mhz, got {self.lo_mhz}, {self.hi_mhz}"
            )
        if not (self.max_sets_s > 0 and self.burst >= 1):
            raise ConfigError(
                f"SetterPolicy: expected max_sets_s > 0 and burst >= 1, got {self.max_sets_s},"
                f" {self.burst}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockRequest:
    """One request that a policy allows.

    Parameters
    ----------
    gpu : str
        UUID of the GPU.
    lo_mhz, hi_mhz : int or None
        Clocks to hold it between; None gives its clock back to the driver.

    Examples
    --------
    >>> ClockRequest(gpu="GPU-0", lo_mhz=None, hi_mhz=None).hi_mhz is None
    True
    """

    gpu: str
    lo_mhz: int | None
    hi_mhz: int | None


def parse_request(line: bytes, policy: SetterPolicy) -> ClockRequest:
    """Request of one line, if it is well formed and the policy allows it.

    Parameters
    ----------
    line : bytes
        ``{"verb": "lock", "gpu": UUID, "lo_mhz": int, "hi_mhz": int}`` or
        ``{"verb": "reset", "gpu": UUID}``; nothing more, nothing less.
    policy : SetterPolicy
        What is allowed.

    Returns
    -------
    ClockRequest
        What is to be set.

    Raises
    ------
    ConfigError
        Saying why it is refused.

    Examples
    --------
    >>> policy = SetterPolicy(clocks_mhz={"GPU-0": frozenset({210, 225})}, uids=frozenset({0}))
    >>> parse_request(b'{"verb": "lock", "gpu": "GPU-0", "lo_mhz": 210, "hi_mhz": 225}', policy)
    ClockRequest(gpu='GPU-0', lo_mhz=210, hi_mhz=225)
    >>> parse_request(b'{"verb": "cap", "gpu": "GPU-0"}', policy)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: setter: expected verb lock or reset, got 'cap'
    """
    if len(line) > _LINE_BYTES:
        raise ConfigError(f"setter: expected at most {_LINE_BYTES} bytes, got {len(line)}")
    try:
        request = json.loads(line.decode("ascii"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ConfigError("setter: expected one JSON object per line, in ASCII") from None
    if not isinstance(request, dict):
        raise ConfigError(f"setter: expected a JSON object, got {type(request).__name__}")
    verb, gpu = request.get("verb"), request.get("gpu")
    keys = {"lock": {"verb", "gpu", "lo_mhz", "hi_mhz"}, "reset": {"verb", "gpu"}}
    if not isinstance(verb, str) or verb not in keys:
        raise ConfigError(f"setter: expected verb lock or reset, got {verb!r}")
    if set(request) != keys[verb]:
        raise ConfigError(f"setter: {verb}: expected exactly the keys {sorted(keys[verb])}")
    if not isinstance(gpu, str) or gpu not in policy.clocks_mhz:
        raise ConfigError("setter: that GPU is not on the list")
    if verb == "reset":
        return ClockRequest(gpu=gpu, lo_mhz=None, hi_mhz=None)
    lo_mhz, hi_mhz = request["lo_mhz"], request["hi_mhz"]
    for value_mhz in (lo_mhz, hi_mhz):
        # Of type int exactly: a bool is not a clock.
        if type(value_mhz) is not int or value_mhz not in policy.clocks_mhz[gpu]:
            raise ConfigError("setter: expected whole, supported clocks in MHz")
    if not policy.lo_mhz <= lo_mhz <= hi_mhz <= policy.hi_mhz:
        raise ConfigError(
            f"setter: expected {policy.lo_mhz} <= lo_mhz <= hi_mhz <= {policy.hi_mhz},"
            f" got {lo_mhz}, {hi_mhz}"
        )
    return ClockRequest(gpu=gpu, lo_mhz=lo_mhz, hi_mhz=hi_mhz)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key is given twice")
    return keys


class TokenBucket:
    """Rate limit: over any span, at most ``burst + rate * span`` are let through.

    Parameters
    ----------
    rate_req_s : float
        Requests let through per second over the long run.
    burst : int
        Requests let through at once after a pause.
    now_s : callable
        Returns seconds that never go back.

    Examples
    --------
    >>> bucket = TokenBucket(10.0, 2, now_s=iter([0.0, 0.0, 0.0, 0.0, 0.1]).__next__)
    >>> [bucket.take() for _ in range(4)]
    [True, True, False, True]
    """

    __slots__ = ("_burst", "_now_s", "_rate_req_s", "_t_s", "_tokens")

    def __init__(
        self, rate_req_s: float, burst: int, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate_req_s, self._burst, self._now_s = rate_req_s, burst, now_s
        self._tokens = float(burst)
        self._t_s = now_s()

    def take(self) -> bool:
        """Let one more pass, or not: True if it may, which then counts."""
        t_s = self._now_s()
        gained = self._rate_req_s * max(0.0, t_s - self._t_s)
        self._tokens = min(float(self._burst), self._tokens + gained)
        self._t_s = max(t_s, self._t_s)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


@dataclass(slots=True, eq=False)
class _Peer:
    """One connection and what it holds."""

    connection: socket.socket
    uid: int
    heard_s: float
    rest: bytes = b""
    gpus: set[str] = field(default_factory=set)


class Setter:
    """Serves clock sets to peers on a Unix socket; :func:`run_setter` makes one and runs it.

    Parameters
    ----------
    policy : SetterPolicy
        Who may ask, and for which clocks.
    gpus : mapping of str to Gpu
        The GPUs on the policy's list, by UUID.
    lease : Lease
        Hold on these GPUs.
    path : Path
        Socket to serve; one that nobody serves is replaced.
    library : Path, optional
        The driver library, where it is not the system's.
    restore_lock_mhz : tuple of int, optional
        Clock lock to leave behind instead of none.
    silence_s : float
        Seconds after which a peer that asks for nothing is sent away, and its GPUs given back.

    Raises
    ------
    ConfigError, BackendError
        If the socket cannot be made, others may write its folder, or another setter serves it.

    Examples
    --------
    >>> Setter(policy, gpus, lease).serve()  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: SetterPolicy,
        gpus: Mapping[str, Gpu],
        lease: Lease,
        path: Path = SETTER_SOCKET,
        *,
        library: Path | None = None,
        restore_lock_mhz: tuple[int, int] | None = None,
        silence_s: float = 10.0,
    ) -> None:
        self.policy = policy
        self._gpus = gpus
        self._lease = lease
        self._path = Path(path)
        self._library = library
        self._restore_lock_mhz = restore_lock_mhz
        self._silence_s = silence_s
        self._buckets = {
            gpu: TokenBucket(policy.max_sets_s, policy.burst) for gpu in policy.clocks_mhz
        }
        self._owners: dict[str, _Peer] = {}
        self._held_mhz: dict[str, int] = {}
        self._to_reset: set[str] = set()
        self._listener = _listen(self._path, policy.uids)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Answer peers until `stop` says so.

        Parameters
        ----------
        stop : callable
            Asked several times a second.
        """
        while not stop():
            for key, _ in self._selector.select(_RETRY_S):
                if key.data is None:
                    self._accept_all()
                else:
                    self._hear(key.data)
            self._lease.watchdog.seen()
            self._dismiss_silent()
            for gpu in sorted(self._to_reset):
                self._reset(gpu)

    def close(self) -> None:
        """Send all peers away and give back what they hold."""
        for peer in self._peers():
            self._dismiss(peer)
        self._selector.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _peers(self) -> list[_Peer]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _accept_all(self) -> None:
        # All that wait: a crowd that is taken one a turn keeps the others out.
        for _ in range(_BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # Gone again, or no descriptor is left: then it waits in line, and we go on.
                time.sleep(_BREATH_S)
                return
            self._accept(connection)

    def _accept(self, connection: socket.socket) -> None:
        # A peer that does not read must not hold up the others, nor what the dead left.
        connection.setblocking(False)
        uid = peer_uid(connection)
        peer = _Peer(connection, uid, time.monotonic())
        peers = self._peers()
        if uid not in self.policy.uids:
            refusal = f"setter: user {uid} may not set clocks; start it with --uid {uid}"
        elif sum(one.uid == uid for one in peers) >= _PEERS_OF_UID or len(peers) >= _PEERS:
            refusal = f"setter: too many connections, {_PEERS_OF_UID} at most of one user"
        else:
            self._selector.register(connection, selectors.EVENT_READ, peer)
            return
        self._answer(peer, {"error": refusal})
        connection.close()

    def _hear(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.heard_s = time.monotonic()
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        for line in lines:
            if not self._answer(peer, self._do(peer, line)):
                data = b""
                break
        if not data or len(peer.rest) > _LINE_BYTES:
            self._dismiss(peer)

    def _do(self, peer: _Peer, line: bytes) -> dict[str, Any]:
        try:
            request = parse_request(line, self.policy)
            owner = self._owners.get(request.gpu, peer)
            if owner is not peer:
                raise BackendError(f"setter: another peer holds GPU {request.gpu}")
            if not self._buckets[request.gpu].take():
                raise BackendError(
                    f"setter: more than {self.policy.max_sets_s:g} sets per second of GPU"
                    f" {request.gpu}"
                )
            self._set(peer, request)
        except VoltanaError as error:
            return {"error": str(error)}
        return {"ok": True}

    def _set(self, peer: _Peer, request: ClockRequest) -> None:
        gpu = self._gpus[request.gpu]
        self._owners[request.gpu] = peer
        peer.gpus.add(request.gpu)
        if request.lo_mhz is None or request.hi_mhz is None:
            self._give_back(request.gpu)
            return
        record = FoundGpu(
            uuid=request.gpu,
            library=None if self._library is None else str(self._library),
            clock=True,
            restore_lock_mhz=self._restore_lock_mhz,
        )
        highest_mhz = self._held_mhz.get(request.gpu, max(gpu.clocks_mhz))
        if request.hi_mhz < highest_mhz and not self._lease.guarded:
            raise BackendError(
                f"setter: its watchdog does not answer, so that GPU {request.gpu} may not be set"
                f" below {highest_mhz} MHz until it does"
            )
        self._to_reset.discard(request.gpu)
        self._held_mhz[request.gpu] = request.hi_mhz
        with self._lease.touch(request.gpu, record):
            gpu.lock_clock(request.lo_mhz, request.hi_mhz)

    def _answer(self, peer: _Peer, answer: Mapping[str, Any]) -> bool:
        line = json.dumps(answer).encode() + b"\n"
        try:
            # A part of an answer is none: a peer that does not listen is sent away.
            return peer.connection.send(line) == len(line)
        except OSError:
            return False

    def _dismiss(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        for gpu in peer.gpus:
            del self._owners[gpu]
            self._reset(gpu)
        peer.connection.close()

    def _dismiss_silent(self) -> None:
        # A controller renews what it wants every few seconds; a frozen one must not hold on.
        for peer in self._peers():
            if time.monotonic() - peer.heard_s > self._silence_s:
                self._dismiss(peer)

    def _reset(self, gpu: str) -> None:
        try:
            self._give_back(gpu)
        except BackendError:
            self._to_reset.add(gpu)  # tried again at every turn, and by the lease at the end
        else:
            self._to_reset.discard(gpu)

    def _give_back(self, gpu: str) -> None:
        self._held_mhz.pop(gpu, None)
        if self._restore_lock_mhz is None:
            self._gpus[gpu].reset_clock()
        else:
            self._gpus[gpu].lock_clock(*self._restore_lock_mhz)


def _let_in(path: Path, uids: Collection[int]) -> None:
    """Let these users connect, and no other: who cannot knock cannot crowd out who may.

    Where the file system keeps no access lists anybody may knock, and whose knock is answered is
    asked of the kernel, as it is anyway.
    """
    entries = [
        (_USER_OBJ, 6, _NOBODY),
        *((_USER, 6, uid) for uid in sorted(uids)),
        (_GROUP_OBJ, 0, _NOBODY),
        (_MASK, 6, _NOBODY),
        (_OTHER, 0, _NOBODY),
    ]
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", listed)
    except OSError:
        path.chmod(0o666)


def _listen(path: Path, uids: Collection[int]) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        own_folder(path.parent, "the setter's socket")
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise BackendError(f"setter: another one serves {path}; stop it first")
            path.unlink()
        listener.bind(str(path))
        _let_in(path, uids)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise BackendError(f"setter: {path} cannot be made: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def run_setter(
    uuids: Sequence[str],
    uids: Sequence[int],
    path: Path = SETTER_SOCKET,
    *,
    lo_mhz: int = 0,
    hi_mhz: int = 100_000,
    max_sets_s: float = 50.0,
    restore_lock_mhz: tuple[int, int] | None = None,
    silence_s: float = 10.0,
    lock_dir: Path = LOCK_DIR,
    library: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Be the setter until SIGTERM or Ctrl-C; in the main thread of a program.

    Parameters
    ----------
    uuids : sequence of str
        GPUs on the allow-list.
    uids : sequence of int
        Users that may ask.
    path : Path
        Socket to serve.
    lo_mhz, hi_mhz : int
        Range that clocks must lie in.
    max_sets_s : float
        Sets per second and GPU.
    restore_lock_mhz : tuple of int, optional
        Clock lock to leave behind instead of none.
    silence_s : float
        Seconds after which a peer that asks for nothing is sent away, and its GPUs given back.
    lock_dir : Path
        Where lock files live.
    library : Path, optional
        The driver library, where it is not the system's.
    stop : callable
        Asked several times a second whether to end.

    Raises
    ------
    ConfigError, BackendError
        If GPUs, range or socket are not usable.

    Examples
    --------
    >>> run_setter([], [1000])
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: SetterPolicy.clocks_mhz: expected at least one GPU, got none
    """
    if not uuids:
        raise ConfigError("SetterPolicy.clocks_mhz: expected at least one GPU, got none")
    with ExitStack() as ending:
        ending.enter_context(end_on_sigterm())
        nvml = ending.enter_context(Nvml(library))
        gpus = {gpu.uuid: gpu for gpu in whole_gpus(nvml, uuids)}
        policy = SetterPolicy(
            clocks_mhz={uuid: frozenset(gpu.clocks_mhz) for uuid, gpu in gpus.items()},
            uids=frozenset(uids),
            lo_mhz=lo_mhz,
            hi_mhz=hi_mhz,
            max_sets_s=max_sets_s,
        )
        ending.enter_context(Sweep(lock_dir))
        lease = Lease(uuids, lock_dir=lock_dir)
        ending.callback(lease.close)
        setter = Setter(
            policy,
            gpus,
            lease,
            path,
            library=library,
            restore_lock_mhz=restore_lock_mhz,
            silence_s=silence_s,
        )
        ending.callback(setter.close)
        with suppress(KeyboardInterrupt):
            setter.serve(stop)
