"""A headless browser of the Chromium family, spoken to over a pipe: no driver, no port."""

import json
import os
import select
import shutil
import subprocess
import time

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


def find_browser():
    """Path of the first browser there is; the test is left out where there is none."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"needs one of {', '.join(BROWSERS)} on PATH (Debian: apt install chromium)")
    return found[0]


class Browser:
    """One page in a browser; a context manager ends it."""

    def __init__(self, folder):
        out, their_out = os.pipe()
        their_in, into = os.pipe()
        high = [os.dup(fd) for fd in (their_in, their_out)]
        for fd in (their_in, their_out):
            os.close(fd)

        def as_three_and_four():
            # Both ends may lie on 3 and 4 already: first out of the way.
            for fd, wanted in zip([os.dup(fd) for fd in high], (3, 4), strict=True):
                os.dup2(fd, wanted)

        self.process = subprocess.Popen(
            [find_browser(), *QUIET, f"--user-data-dir={folder}", "--remote-debugging-pipe",
             "about:blank"],
            stderr=subprocess.DEVNULL, preexec_fn=as_three_and_four, pass_fds=(3, 4),
        )  # fmt: skip
        for fd in high:
            os.close(fd)
        self._into, self._out = into, out
        self._rest, self._number = b"", 0
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        told = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = told["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session = None

    def call(self, method, **params):
        self._number += 1
        told = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            told["sessionId"] = self._session
        os.write(self._into, json.dumps(told).encode() + b"\0")
        until_s = time.monotonic() + 60.0
        while True:
            one = self._next(until_s)
            if one.get("id") == self._number:
                assert "error" not in one, one
                return one["result"]
            self.events.append(one)

    def _next(self, until_s):
        while b"\0" not in self._rest:
            left_s = until_s - time.monotonic()
            ready, _, _ = select.select([self._out], [], [], max(0.0, left_s))
            assert ready, "the browser does not answer"
            self._rest += os.read(self._out, 1 << 20)
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def run(self, expression):
        """What an expression in the page gives."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                         awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def open(self, url, until="document.readyState === 'complete'", width=1280):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.call("Page.navigate", url=url)
        self.wait(until)

    def wait(self, until, limit_s=60.0):
        until_s = time.monotonic() + limit_s
        while not self.run(until):
            assert time.monotonic() < until_s, until
            time.sleep(0.05)

    def complaints(self):
        """Console messages, exceptions and log entries so far."""
        self.run("1")
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [one["params"] for one in self.events if one.get("method") in kinds]

    def asked(self):
        """Addresses that were asked for."""
        return [one["params"]["request"]["url"] for one in self.events
                if one.get("method") == "Network.requestWillBeSent"]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(30.0)
        os.close(self._into)
        os.close(self._out)
