"""The bounded server: clients that read nothing, and what its event loop says of trouble."""

import asyncio
import errno
import socket
import time
from contextlib import ExitStack

import pytest

pytest.importorskip("uvicorn", reason="needs the server extra")

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.serving import server as module
from voltana_ctrl.serving.server import ServerThread, _quiet_when_full, listen


class Loop:
    """An event loop as far as the handler asks it."""

    def __init__(self):
        self.now_s, self.passed_on = 0.0, []

    def time(self):
        return self.now_s

    def default_exception_handler(self, context):
        self.passed_on.append(context)


def test_a_lack_of_descriptors_is_said_once_a_minute_and_the_rest_as_ever(caplog):
    loop, handle = Loop(), _quiet_when_full("router")
    full = {"exception": OSError(errno.EMFILE, "Too many open files")}
    for _ in range(2000):
        handle(loop, full)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "router: no file descriptor is left, so that connections wait"
    ]
    loop.now_s = 61.0
    handle(loop, full)
    assert len(caplog.records) == 2
    assert loop.passed_on == []
    other = {"exception": ValueError("other")}
    handle(loop, other)
    assert loop.passed_on == [other]


async def _long_answer(scope, receive, send):
    await receive()
    gone = asyncio.ensure_future(receive())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while not gone.done():
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch):
    bounded = module.bounded_server
    monkeypatch.setattr(module, "bounded_server", lambda *a, **kw: bounded(*a, stall_s=1.0, **kw))
    with ServerThread(_long_answer, what="page") as server, ExitStack() as ending:
        deaf, reading = (
            ending.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            for _ in range(2)
        )
        for one in (deaf, reading):
            one.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert one.recv(100)
        begin_s = time.monotonic()
        while len(server._server.server_state.connections) == 2:
            assert time.monotonic() - begin_s < 20.0
            assert reading.recv(1 << 20)
        while time.monotonic() - begin_s < 2.5:  # who reads is not cut off
            assert reading.recv(1 << 20)
        deaf.setblocking(False)
        assert _is_cut(deaf)


def _is_cut(one):
    """Whether a connection ends after what had arrived."""
    try:
        while one.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    except BlockingIOError:
        return False
    return True


def test_half_of_the_descriptors_stay_free(monkeypatch):
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (8, 8))
    with ServerThread(_long_answer, what="page") as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        until_s = time.monotonic() + 20.0
        while time.monotonic() < until_s and len(server._server.server_state.connections) != 4:
            time.sleep(0.05)
        assert len(server._server.server_state.connections) == 4
        for one in held:
            one.close()


def test_a_host_that_is_no_name_is_refused():
    with pytest.raises(ConfigError, match="router: host: expected a name or an address"):
        listen("x" * 64, 0, what="router")
