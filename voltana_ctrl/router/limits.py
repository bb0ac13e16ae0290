"""What one client may ask of a router, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from voltana_ctrl.checks import count, positive

__all__ = ["ProxyLimits"]

_COUNTS = (
    "body_bytes", "answer_bytes", "held_bytes", "header_bytes", "in_flight_req", "connections",
    "attempts", "keep_energy_req",
)  # fmt: skip
_TIMES = (
    "header_s", "body_s", "connect_s", "first_token_s", "total_s", "stall_s", "silence_s",
    "probe_s", "drain_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyLimits:
    """What one client may ask of a router, and for how long.

    Parameters
    ----------
    body_bytes, header_bytes : int
        Bytes of the largest body and of the largest headers of a request.
    answer_bytes : int
        Bytes of the largest answer of an engine in one piece, and of the largest event of a stream.
    held_bytes : int
        Bytes of bodies and answers of all requests together, but for the first 16 KiB of each.
    in_flight_req, connections : int
        Requests at once; the next is told to come again (429). Connections at once, idle ones too.
    attempts : int
        How often a request is sent before its first token, at most.
    header_s, body_s : float
        Seconds for the headers and for the body of a request to arrive.
    connect_s : float
        Seconds for an engine to take a connection.
    first_token_s : float
        Seconds from the arrival of a request that streams until its first token, whatever the
        attempts; then it is answered with 504.
    total_s : float
        Seconds for all of an answer.
    stall_s : float
        Seconds that a client may read nothing before it is cut off.
    silence_s : float
        Seconds after which a client that waits for the first token of a stream is sent a comment.
    probe_s : float
        Seconds between two looks at whether an engine lives.
    drain_s : float
        Seconds that requests get to end after SIGTERM.
    keep_energy_req : int
        Latest requests whose energy can be asked for.

    Raises
    ------
    ConfigError
        If a limit is not positive.

    Examples
    --------
    >>> ProxyLimits(attempts=2).body_bytes
    16777216
    """

    body_bytes: int = 16 << 20
    answer_bytes: int = 32 << 20
    held_bytes: int = 64 << 20
    header_bytes: int = 32 << 10
    in_flight_req: int = 4096
    connections: int = 8192
    attempts: int = 3
    header_s: float = 10.0
    body_s: float = 30.0
    connect_s: float = 5.0
    first_token_s: float = 300.0
    total_s: float = 3600.0
    stall_s: float = 30.0
    silence_s: float = 15.0
    probe_s: float = 5.0
    drain_s: float = 60.0
    keep_energy_req: int = 10_000

    def __post_init__(self) -> None:
        for name in _COUNTS:
            count(f"ProxyLimits.{name}", getattr(self, name))
        for name in _TIMES:
            positive(f"ProxyLimits.{name}", getattr(self, name))
