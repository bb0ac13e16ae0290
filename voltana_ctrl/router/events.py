"""Streams of engines, event by event: what is a token, what is the end, what is a failure."""

from __future__ import annotations

import json
import re
from typing import Any

from voltana_ctrl.router.body import usage_of

__all__ = ["EventReader", "is_comment"]

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
# Text inside a JSON string has its quotes escaped, so that none of these is found in it.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(\w+)"')
_TYPE = re.compile(rb'"type"\s*:\s*"(response\.\w+|message_\w+|error)"')
_ABORTED = frozenset((b"abort", b"error"))
_LAST_TYPES = frozenset((b"response.completed", b"response.incomplete", b"message_stop"))
_FAILED_TYPES = frozenset((b"response.failed", b"error"))
#: Events of the Responses and Messages interfaces that bring no token yet.
_OPENINGS = frozenset(
    (
        "response.created", "response.queued", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
        "message_start", "content_block_start", "ping",
    )
)  # fmt: skip


class EventReader:
    r"""Cuts a stream into whole events and keeps count of what they told.

    The end of a connection is not the end of an answer: a stream is whole once it told
    ``[DONE]``, the usage of all of it, or a finish reason for every sequence that was asked for.

    Parameters
    ----------
    sequences : int
        How many sequences were asked for: prompts times samples.
    event_bytes : int
        Bytes of the longest event that is taken.

    Attributes
    ----------
    has_begun : bool
        Whether a token came; what comes before it can be had again from another engine.
    has_failed : bool
        Whether the engine told that it failed or gave up.
    is_whole : bool
        Whether all of the answer came.
    tokens : int
        Events that brought tokens. An event may bring several: only `usage` counts them.
    usage : dict
        See :func:`~voltana_ctrl.router.body.usage_of`; empty where none was told.

    Examples
    --------
    >>> reader = EventReader(sequences=1)
    >>> reader.take(b'data: {"choices": [{"index": 0, "text": " a"}]}\n\ndata: {"cho')
    [b'data: {"choices": [{"index": 0, "text": " a"}]}\n\n']
    >>> reader.has_begun, reader.is_whole
    (True, False)
    >>> _ = reader.take(b'ices": [{"index": 0, "text": " b", "finish_reason": "stop"}]}\n\n')
    >>> reader.tokens, reader.is_whole
    (2, True)
    """

    def __init__(self, *, sequences: int = 1, event_bytes: int = 4 << 20) -> None:
        self.has_begun = self.has_failed = False
        self.is_engine_failure = False
        self.tokens = 0
        self.usage: dict[str, int] = {}
        self._sequences = sequences
        self._event_bytes = event_bytes
        self._finished = 0
        self._has_ended = False
        self._held = bytearray()

    @property
    def is_whole(self) -> bool:
        """Whether all of the answer came."""
        return (self._has_ended or self._finished >= self._sequences) and not self.has_failed

    @property
    def rest(self) -> bytes:
        """Bytes that came behind the last whole event."""
        return bytes(self._held)

    def take(self, chunk: bytes) -> list[bytes]:
        """Take bytes of the stream in, and give out the events that are whole now.

        Parameters
        ----------
        chunk : bytes
            What came next, cut anywhere.

        Returns
        -------
        list of bytes
            Events with the blank line that ends them; each is given out once.

        Raises
        ------
        ValueError
            If an event grows beyond `event_bytes`.
        """
        held = self._held
        # An event's end may be cut, too; what was looked through is not looked through again.
        start = max(0, len(held) - 3)
        held += chunk
        events, begin = [], 0
        for found in _BLANK_LINE.finditer(held, start):
            events.append(bytes(held[begin : found.end()]))
            begin = found.end()
        if begin:
            del held[:begin]
        if len(held) > self._event_bytes:
            raise ValueError(f"an event is longer than {self._event_bytes} bytes")
        for event in events:
            self._read(event)
        return events

    def is_usage(self, event: bytes) -> dict[str, Any] | None:
        """Read an event that may bring the usage of the whole request and no token.

        Parameters
        ----------
        event : bytes
            A whole event.

        Returns
        -------
        dict or None
            The JSON object of such an event; None of any other.
        """
        if not _USAGE.search(event):
            return None
        told = _object(event)
        brings_more = told is None or told.get("choices") or "type" in told
        return None if brings_more else told

    def _read(self, event: bytes) -> None:
        if is_comment(event):
            return
        if b"[DONE]" in event and _data(event) == b"[DONE]":
            self._has_ended = True
            return
        named = _TYPE.search(event)
        kind = named[1] if named else b""
        if _USAGE.search(event):
            self.usage |= usage_of(_data(event))
            if self.is_usage(event) is not None:
                self._has_ended = True
                return
        if b'"error"' in event or kind in _FAILED_TYPES:
            told = _object(event)
            if told is not None and (told.get("error") or kind in _FAILED_TYPES):
                self.has_failed = True
                self.is_engine_failure = _is_engine_failure(told)
                return
        if kind in _LAST_TYPES:
            self._has_ended = True
        reasons = _FINISH.findall(event)
        self._finished += len(reasons)
        if not _ABORTED.isdisjoint(reasons):
            # The engine gave up; what it made so far is not what was asked for.
            self.has_failed = self.is_engine_failure = True
            return
        if not self.has_begun:
            self.has_begun = not _is_opening(_object(event))
        self.tokens += self.has_begun


def is_comment(event: bytes) -> bool:
    r"""Whether an event brings no data, such as the comments that keep a connection alive.

    Parameters
    ----------
    event : bytes
        A whole event.

    Examples
    --------
    >>> is_comment(b": ping\n\n"), is_comment(b"data: 1\n\n")
    (True, False)
    """
    return not any(line.startswith(b"data:") for line in event.splitlines())


def _data(event: bytes) -> bytes:
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


def _object(event: bytes) -> dict[str, Any] | None:
    try:
        told = json.loads(_data(event))
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def _is_engine_failure(told: dict[str, Any]) -> bool:
    """Whether an error is not the request's own."""
    error = told.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return not (isinstance(code, int) and 400 <= code < 500)


def _is_opening(told: dict[str, Any] | None) -> bool:
    """Whether an event brings nothing but a role, or that an answer begins."""
    if told is None:
        return False
    if told.get("type") in _OPENINGS:
        return True
    choices = told.get("choices")
    if not (isinstance(choices, list) and choices):
        return False
    for choice in choices:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict) or "role" not in delta or choice.get("finish_reason"):
            return False
        if any(value for key, value in delta.items() if key != "role"):
            return False
    return True
