"""The unprivileged end of the setter: clocks are set by asking for it on a Unix socket."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from voltana_ctrl.errors import ActuationDenied, BackendError

__all__ = ["SETTER_SOCKET", "SetterClient"]

#: Where the setter listens unless told otherwise.
SETTER_SOCKET = Path("/run/voltana-ctrl/setter.sock")


_AGAIN_S = 0.005
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket, as the kernel says."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(raw)[1])


class SetterClient:
    """The unprivileged end: sets clocks through the setter.

    Parameters
    ----------
    path : Path
        Socket on which the setter listens.
    on_lost : callable, optional
        Called when the connection broke: the setter has then given everything back.
    limit_s : float
        Seconds to wait for an answer.

    Raises
    ------
    BackendError
        If nobody serves the socket.

    Examples
    --------
    >>> SetterClient(Path("no-such-socket"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.BackendError: setter: nobody serves no-such-socket: ...
    """

    def __init__(
        self,
        path: Path = SETTER_SOCKET,
        *,
        on_lost: Callable[[], None] | None = None,
        limit_s: float = 10.0,
    ) -> None:
        self._path = Path(path)
        self._on_lost = on_lost
        self._limit_s = limit_s
        self._asked_s = time.monotonic()
        self._connection: socket.socket | None = self._connect()

    @property
    def quiet_s(self) -> float:
        """Seconds since anything was asked."""
        return time.monotonic() - self._asked_s

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._limit_s)
        give_up_s = time.monotonic() + self._limit_s
        try:
            while True:
                try:
                    connection.connect(str(self._path))
                    break
                except BlockingIOError:  # its line is full at the moment
                    if time.monotonic() > give_up_s:
                        raise
                    time.sleep(_AGAIN_S)
        except PermissionError as error:
            connection.close()
            raise BackendError(
                f"setter: {self._path}: user {os.geteuid()} may not set clocks; start it with"
                f" --uid {os.geteuid()}"
            ) from error
        except OSError as error:
            connection.close()
            raise BackendError(
                f"setter: nobody serves {self._path}: {error.strerror or error}; start"
                " `voltana-ctrl setter` as root"
            ) from error
        if peer_uid(connection) not in (0, os.geteuid()):
            connection.close()
            raise BackendError(f"setter: {self._path} is served by another user, not by root")
        return connection

    def gpu(self, uuid: str) -> _RemoteGpu:
        """Setter of the clock of one GPU, by its UUID: `lock_clock` and `reset_clock`."""
        return _RemoteGpu(self, uuid)

    def ask(self, **request: str | int) -> None:
        """Send one request and wait for the answer.

        Parameters
        ----------
        **request
            The keys of :func:`voltana_ctrl.backends.nvml.setter.parse_request`.

        Raises
        ------
        ActuationDenied
            If the setter refuses, or does not answer.
        """
        line = json.dumps(request).encode() + b"\n"
        try:
            answer = self._answer(line)
        except (OSError, ValueError):
            # It was restarted, or took us for dead: what was set is given back. Once more.
            self.close()
            if self._on_lost is not None:
                self._on_lost()
            try:
                answer = self._answer(line)
            except (OSError, ValueError, BackendError) as error:
                self.close()
                raise ActuationDenied(f"setter: the connection broke: {error}") from error
        if answer.get("ok") is not True:
            raise ActuationDenied(str(answer.get("error", "setter: unclear answer")))

    def _answer(self, line: bytes) -> Mapping[str, Any]:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.sendall(line)
        self._asked_s = time.monotonic()
        return self._receive(self._connection)

    def _receive(self, connection: socket.socket) -> Mapping[str, Any]:
        data = b""
        while not data.endswith(b"\n"):
            part = connection.recv(4096)
            if not part:
                raise ConnectionError("it hung up")
            data += part
        answer = json.loads(data)
        return answer if isinstance(answer, dict) else {}

    def close(self) -> None:
        """End the connection, upon which the setter gives back what was set through it."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
                # It resets first and hangs up then: once that is seen, all is given back.
                while self._connection.recv(4096):
                    pass
            self._connection.close()
            self._connection = None


class _RemoteGpu:
    def __init__(self, client: SetterClient, uuid: str) -> None:
        self._client = client
        self._uuid = uuid

    def lock_clock(self, lo_mhz: int, hi_mhz: int) -> None:
        """Hold the SM clock between two supported clocks."""
        self._client.ask(verb="lock", gpu=self._uuid, lo_mhz=lo_mhz, hi_mhz=hi_mhz)

    def reset_clock(self) -> None:
        """Give the SM clock back to the driver."""
        self._client.ask(verb="reset", gpu=self._uuid)
