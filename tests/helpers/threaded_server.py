"""A server of asyncio in a thread of its own, for tests that talk to it."""

import asyncio
import threading


class ThreadedServer:
    """Subclasses bring `_main(ready)`: sets `_loop`, `_stop`, `port`; waits for `_stop`."""

    port = 0

    def __enter__(self):
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        """Die as a process does: nobody listens any more, connections break."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"
