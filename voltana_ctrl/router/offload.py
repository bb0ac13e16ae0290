"""Long bodies are read by a process of their own: JSON is parsed in one piece, and nobody waits."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, BinaryIO

from voltana_ctrl.router.body import Asked, BadBody, read_request

__all__ = ["BodyReader", "main"]

_LOG = logging.getLogger(__name__)
# The worst of this size takes about two milliseconds.
_INLINE_BYTES = 1 << 16
_LIMIT_S = 20.0
_MEMORY_BYTES = 256 << 20
_SIZE_BYTES = 8
# Isolated: neither the working folder nor PYTHON* variables say what runs.
_FLAGS = ("-I", "-S")
_PROGRAM = (
    "import sys; sys.path += sys.argv[1:]; from voltana_ctrl.router.offload import main; main()"
)


class BodyReader:
    """Reads bodies, long ones in a child process that starts with the first of them.

    Examples
    --------
    >>> import asyncio
    >>> reader = BodyReader()
    >>> asyncio.run(reader.read(b'{"prompt": "hi"}')).chars
    2
    >>> reader.close()
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="voltana-bodies")

    async def read(self, content: bytes, **options: Any) -> Asked:
        """Read a request.

        Parameters
        ----------
        content : bytes
            The body.
        **options
            See :func:`~voltana_ctrl.router.body.read_request`.

        Returns
        -------
        Asked
            What a router must know of it.

        Raises
        ------
        BadBody
            See :func:`~voltana_ctrl.router.body.read_request`; or if it takes more than 20 s.
        """
        if len(content) <= _INLINE_BYTES:
            return read_request(content, **options)
        loop = asyncio.get_running_loop()
        told = await loop.run_in_executor(self._thread, self._ask, content, options)
        if isinstance(told, BadBody):
            raise told
        return told

    def close(self) -> None:
        """End the child process, if there is one."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _ask(self, content: bytes, options: dict[str, Any]) -> Asked | BadBody:
        child = self._child
        if child is None or child.poll() is not None:
            self._end()
            child = self._child = subprocess.Popen(
                [sys.executable, *_FLAGS, "-c", _PROGRAM, *filter(None, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
            )
        patience = threading.Timer(_LIMIT_S, child.kill)
        patience.start()
        try:
            _put(child.stdin, pickle.dumps(options))
            _put(child.stdin, content)
            told = pickle.loads(_get(child.stdout))
        except (OSError, EOFError):
            _LOG.warning("the process that reads long bodies ended; the next one starts it anew")
            self._end()
            return BadBody("the body takes too much time or memory to read")
        finally:
            patience.cancel()
        if isinstance(told, Asked) and not told.content:
            return replace(told, content=content)
        return told  # type: ignore[no-any-return]  # the other end is this module

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def main() -> None:
    """Read bodies from standard input until it ends."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    with suppress(AttributeError, OSError):
        os.nice(10)  # whoever waits for a token goes first
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            options = pickle.loads(_get(source))
            content = _get(source)
            try:
                told: Asked | BadBody = read_request(content, **options)
            except BadBody as bad:
                told = bad
            except MemoryError:
                told = BadBody("the body takes too much memory to read")
            if isinstance(told, Asked) and told.content is content:
                told = replace(told, content=b"")  # the other end has it
            del content
            _put(sink, pickle.dumps(told, protocol=5))
            del told


def _put(sink: BinaryIO | Any, packed: bytes) -> None:
    sink.write(len(packed).to_bytes(_SIZE_BYTES, "big"))
    sink.write(packed)
    sink.flush()


def _get(source: BinaryIO | Any) -> bytes:
    head = source.read(_SIZE_BYTES)
    if len(head) < _SIZE_BYTES:
        raise EOFError
    packed: bytes = source.read(int.from_bytes(head, "big"))
    return packed
