"""What publishing costs an engine: nothing is waited for, nobody takes the interpreter from it."""

import itertools
import threading
import time

import pytest
import zmq

from voltana_ctrl.engines.fpm.messages import ForwardPass, decode_forward_pass
from voltana_ctrl.engines.fpm.publisher import FpmPublisher


class Subscriber:
    def __init__(self, address):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(address)

    def next(self, limit_s):
        if not self.socket.poll(int(1000 * limit_s)):
            return None
        return decode_forward_pass(self.socket.recv_multipart())

    def close(self):
        self.context.destroy(linger=0)


@pytest.fixture
def alone(monkeypatch):
    """A publisher whose thread has not begun: what is sent is sent by the engine's own."""
    with monkeypatch.context() as for_a_while:
        for_a_while.setattr(threading.Thread, "start", lambda self: None)
        publisher = FpmPublisher("tcp://127.0.0.1:*", worker_id="7")
    subscriber = Subscriber(publisher.address)
    yield publisher, subscriber
    subscriber.close()
    publisher._thread.start()
    publisher.close()


def test_a_pass_needs_no_other_thread(alone):
    publisher, subscriber = alone
    got, begin_s = None, time.monotonic()
    while got is None:
        assert time.monotonic() - begin_s < 20.0
        publisher.send(ForwardPass(wall_s=0.02, decode_req=3.0))
        got = subscriber.next(0.05)
    assert (got.worker_id, got.decode_req) == ("7", 3.0)


def test_a_pass_that_comes_during_a_heartbeat_is_sent_after_it(alone):
    publisher, subscriber = alone
    begin_s = time.monotonic()
    while subscriber.next(0.05) is None:  # connected
        assert time.monotonic() - begin_s < 20.0
        publisher.send(ForwardPass(wall_s=0.02))
    while subscriber.next(0.05) is not None:
        pass
    with publisher._sending:
        publisher.send(ForwardPass(wall_s=0.5))  # does not wait
        assert subscriber.next(0.1) is None  # by now the next one is sent at once
    publisher.send(ForwardPass(wall_s=0.6))
    assert [subscriber.next(5.0).wall_s for _ in range(2)] == [0.5, 0.6]


def test_numbers_have_no_gaps_and_silence_has_a_heartbeat():
    publisher = FpmPublisher("tcp://127.0.0.1:*")
    subscriber = Subscriber(publisher.address)
    try:
        first = subscriber.next(20.0)  # a heartbeat finds everybody
        assert first.is_heartbeat
        for _ in range(50):
            publisher.send(ForwardPass(wall_s=0.01))
        told = [subscriber.next(5.0) for _ in range(50)]
        assert [one.number for one in told if not one.is_heartbeat] == sorted(
            {one.number for one in told if not one.is_heartbeat}
        )
        assert all(b.number - a.number == 1 for a, b in itertools.pairwise(told))
    finally:
        subscriber.close()
        publisher.close()
    publisher.send(ForwardPass(wall_s=0.01))  # after the end nothing is sent, and nothing fails


def test_short_iterations_are_sent_together(alone, monkeypatch):
    """Fifty times a second, however short they are; in order, and none is lost."""
    publisher, subscriber = alone
    begin_s = time.monotonic()
    while subscriber.next(0.05) is None:  # connected
        assert time.monotonic() - begin_s < 20.0
        publisher.send(ForwardPass(wall_s=0.02))
    while subscriber.next(0.05) is not None:
        pass
    clock_s = [time.monotonic() + 1.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock_s[0])
    batches = []
    inner = publisher._send_waiting
    publisher._send_waiting = lambda: (batches.append(len(publisher._passes)), inner())
    for k in range(100):
        clock_s[0] += 0.0015
        publisher.send(ForwardPass(wall_s=0.001 * (k + 1)))
    clock_s[0] += 1.0
    publisher.send(ForwardPass(wall_s=1.0))
    assert batches[0] == 1
    assert all(count == 14 for count in batches[1:-1])
    assert sum(batches) == 101
    monkeypatch.undo()
    told = [subscriber.next(5.0).wall_s for _ in range(101)]
    assert told == pytest.approx([0.001 * (k + 1) for k in range(100)] + [1.0])


def test_what_waits_when_the_engine_pauses_is_sent_by_the_thread():
    publisher = FpmPublisher("tcp://127.0.0.1:*")
    subscriber = Subscriber(publisher.address)
    try:
        while not subscriber.next(20.0).is_heartbeat:
            pass
        publisher.send(ForwardPass(wall_s=0.5))
        publisher.send(ForwardPass(wall_s=0.6))  # and then nothing
        told = []
        while 0.6 not in told:
            told.append(subscriber.next(20.0).wall_s)
        assert [one for one in told if one] == [0.5, 0.6]
    finally:
        subscriber.close()
        publisher.close()


def test_the_packer_is_looked_for_once(alone, monkeypatch):
    """Without msgpack, as in vLLM's environment, every look scans all of sys.path."""
    from voltana_ctrl.engines.fpm import publisher as module

    publisher, _ = alone
    looked = []
    monkeypatch.setattr(module, "import_module", lambda name: looked.append(name))
    for _ in range(10):
        publisher.send(ForwardPass(wall_s=0.004))
    assert looked == []


def test_an_engine_at_work_wakes_nobody():
    """The thread sleeps while passes are sent; it used to wake two hundred times a second."""
    publisher = FpmPublisher("tcp://127.0.0.1:*")
    looks = []
    inner = publisher._stopping.wait

    def counted(timeout=None):
        looks.append(timeout)
        return inner(timeout)

    publisher._stopping.wait = counted
    end_s = time.monotonic() + 1.0
    while time.monotonic() < end_s:
        publisher.send(ForwardPass(wall_s=0.004))
        time.sleep(0.004)
    publisher.close()
    assert len(looks) <= 8
