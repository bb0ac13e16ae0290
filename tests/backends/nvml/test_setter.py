"""The privileged setter: what it lets through, and what it never does."""

import contextlib
import json
import os
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.fake_gpus import (
    Host,
    decision,
    machine,
    needs_compiler,
    open_backend,
    seconds_until,
)
from voltana_ctrl import ActuationDenied, BackendError, ConfigError
from voltana_ctrl.backends.nvml.setter import SetterPolicy, TokenBucket, parse_request, run_setter
from voltana_ctrl.backends.nvml.setter_client import SetterClient
from voltana_ctrl.types import Limits

pytestmark = needs_compiler
CLOCKS_MHZ = frozenset(range(210, 1411, 15))
POLICY = SetterPolicy(
    clocks_mhz={"GPU-a": CLOCKS_MHZ, "GPU-b": CLOCKS_MHZ},
    uids=frozenset({1000}),
    lo_mhz=300,
    hi_mhz=1200,
)


def line(**request: object) -> bytes:
    return json.dumps(request).encode()


LOCK = {"verb": "lock", "gpu": "GPU-a", "lo_mhz": 300, "hi_mhz": 1200}


# The language


def test_the_two_verbs():
    request = parse_request(line(**LOCK), POLICY)
    assert (request.gpu, request.lo_mhz, request.hi_mhz) == ("GPU-a", 300, 1200)
    request = parse_request(line(verb="reset", gpu="GPU-b"), POLICY)
    assert (request.gpu, request.lo_mhz, request.hi_mhz) == ("GPU-b", None, None)


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """Draw a request that differs from a valid one in at least one way that matters."""
    request = dict(LOCK) if draw(st.booleans()) else {"verb": "reset", "gpu": "GPU-b"}
    scalars = st.one_of(
        st.none(), st.booleans(), st.floats(), st.text(max_size=8), st.integers(-(10**9), 10**18)
    )
    values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
    kind = draw(st.sampled_from(["verb", "gpu", "clock", "extra", "missing", "twice", "bytes"]))
    if kind == "verb":
        request["verb"] = draw(
            st.one_of(
                values.filter(lambda v: v not in ("lock", "reset")),
                st.sampled_from(["LOCK", "lock ", "set_power_cap", "exec", "unlock", "memory"]),
            )
        )
    elif kind == "gpu":
        strange = st.sampled_from(["GPU-c", "GPU-a ", "gpu-a", "", "*", "GPU-a\n", "../GPU-a"])
        request["gpu"] = draw(
            st.one_of(values.filter(lambda v: v not in ("GPU-a", "GPU-b")), strange)
        )
    elif kind == "clock":
        request = dict(LOCK)
        unsupported = st.integers(-2000, 3000).filter(
            lambda v: v not in CLOCKS_MHZ or not 300 <= v <= 1200
        )
        wrong = st.one_of(values.filter(lambda v: type(v) is not int), unsupported, st.just(300.0))
        which = draw(st.sampled_from(["lo_mhz", "hi_mhz", "swapped"]))
        if which == "swapped":
            request["lo_mhz"], request["hi_mhz"] = 1200, 300
        else:
            request[which] = draw(wrong)
    elif kind == "extra":
        name = draw(st.text(string.ascii_letters, min_size=1).filter(lambda n: n not in LOCK))
        request[name] = draw(values)
    elif kind == "missing":
        del request[draw(st.sampled_from(sorted(request)))]
    text = json.dumps(request)
    if kind == "twice":
        text = text[:-1] + ', "gpu": "GPU-a"}'
    data = text.encode()
    if kind == "bytes":
        action = draw(st.sampled_from(["cut", "append", "noise", "wrap", "long"]))
        if action == "cut":
            data = data[: draw(st.integers(0, len(data) - 1))]
        elif action == "append":
            data += draw(st.sampled_from([b"}", b"x", b"{}", b"\xff", b", 1", data]))
        elif action == "noise":
            data = draw(st.binary(max_size=80).filter(lambda b: b.strip()[:1] != b"{"))
        elif action == "wrap":
            data = b"[" + data + b"]"
        else:
            data = data[:-1] + b" " * 600 + b"}"
    return data


@example(data=b"[" * 500)
@example(data=b'{"verb": "lock", "gpu": "GPU-a", "lo_mhz": NaN, "hi_mhz": 1200}')
@example(data=b'{"verb": "lock", "gpu": "GPU-a", "lo_mhz": true, "hi_mhz": 1200}')
@given(data=forged())
def test_forged_and_malformed_requests_are_refused(data):
    with pytest.raises(ConfigError):
        parse_request(data, POLICY)


@pytest.mark.slow
@settings(max_examples=2500, suppress_health_check=[HealthCheck.too_slow])
@given(data=forged())
def test_thousands_of_forged_requests_are_refused(data):
    with pytest.raises(ConfigError):
        parse_request(data, POLICY)


@given(lo_mhz=st.sampled_from(sorted(CLOCKS_MHZ)), hi_mhz=st.sampled_from(sorted(CLOCKS_MHZ)))
def test_exactly_the_clocks_in_range_pass(lo_mhz, hi_mhz):
    data = line(verb="lock", gpu="GPU-a", lo_mhz=lo_mhz, hi_mhz=hi_mhz)
    if 300 <= lo_mhz <= hi_mhz <= 1200:
        assert parse_request(data, POLICY).hi_mhz == hi_mhz
    else:
        with pytest.raises(ConfigError, match="300 <= lo_mhz <= hi_mhz <= 1200"):
            parse_request(data, POLICY)


@given(
    rate_req_s=st.floats(0.5, 100.0),
    burst=st.integers(1, 20),
    steps_s=st.lists(st.floats(-0.1, 2.0), min_size=1, max_size=100),
)
def test_rate_limit_holds_over_every_span(rate_req_s, burst, steps_s):
    now_s = [0.0]
    bucket = TokenBucket(rate_req_s, burst, now_s=lambda: now_s[0])
    times_s = []
    for step_s in steps_s:
        now_s[0] += step_s
        if bucket.take():
            times_s.append(now_s[0])
    highest_s = 0.0
    clock_s = [highest_s := max(highest_s, t_s) for t_s in times_s]
    for first, begin_s in enumerate(clock_s):
        for last in range(first, len(clock_s)):
            span_s = clock_s[last] - begin_s
            assert last - first + 1 <= burst + rate_req_s * span_s + 1e-6


@pytest.mark.parametrize(
    "change", [{"clocks_mhz": {}}, {"uids": frozenset()}, {"lo_mhz": 1300}, {"max_sets_s": 0.0}]
)
def test_policy_must_allow_something(change):
    values = {"clocks_mhz": POLICY.clocks_mhz, "uids": POLICY.uids, "lo_mhz": 300, "hi_mhz": 1200}
    with pytest.raises(ConfigError, match="SetterPolicy"):
        SetterPolicy(**{**values, **change})


# The program


class Running:
    """A setter in a thread, with the fake driver."""

    def __init__(self, fake, folder: Path, **changes: object) -> None:
        self.path = folder / "setter.sock"
        self.failure: Exception | None = None
        self._ending = threading.Event()
        self._folder, self._fake = folder, fake
        self._changes = {"uids": [os.getuid()], "max_sets_s": 1000.0, **changes}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        from voltana_ctrl.backends.nvml import setter

        try:
            setter.run_setter(
                self._fake.uuids,
                path=self.path,
                lock_dir=self._folder,
                library=self._fake.library,
                stop=self._ending.is_set,
                **self._changes,
            )
        except Exception as error:  # noqa: BLE001  looked at by the test
            self.failure = error

    def __enter__(self) -> "Running":
        self._thread.start()
        seconds_until(lambda: connects(self.path) or self.failure is not None)
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join(timeout=30)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    # Signal handlers belong to the main thread, in which the setter runs otherwise.
    monkeypatch.setattr("voltana_ctrl.backends.nvml.setter.end_on_sigterm", contextlib.nullcontext)
    with machine(tmp_path) as fake:
        yield fake


def test_controller_sets_through_it_and_all_is_given_back(fake, tmp_path):
    with Running(fake, tmp_path) as setter:
        backend = open_backend(fake, tmp_path, setter=setter.path)
        backend.apply(decision(705, 900))
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 900]
        assert backend.actuation_s.min() > 0.0
        backend.close()
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [0, 0]


def test_it_sets_nothing_but_sm_clocks(fake, tmp_path):
    with (
        Running(fake, tmp_path) as setter,
        open_backend(fake, tmp_path, setter=setter.path) as backend,
    ):
        for limits in (Limits(power_cap_w=[200, 200]), Limits(mem_mhz=[810, 810])):
            with pytest.raises(ActuationDenied, match="not settable through the setter"):
                backend.apply(decision(705, 900, limits=limits))
    assert [gpu.sets for gpu in fake.gpus] == [0, 0]


def test_a_peer_that_dies_gives_back_what_it_held(fake, tmp_path):
    with Running(fake, tmp_path) as setter:
        program = (
            "import json, os, socket, sys\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "s.sendall(sys.argv[2].encode() + b'\\n')\n"
            "print(s.recv(100).decode()); sys.stdout.flush()\n"
            "os.kill(os.getpid(), 9)\n"
        )
        request = json.dumps({**LOCK, "gpu": fake.uuids[0]})
        done = subprocess.run(
            [sys.executable, "-c", program, str(setter.path), request],
            capture_output=True,
            text=True,
            check=False,
        )
        assert json.loads(done.stdout) == {"ok": True}
        assert fake.gpus[0].highest_lock_mhz == 1200
        seconds_until(lambda: fake.gpus[0].lock_hi_mhz == 0, limit_s=2.0)


def test_refusals_do_not_set_and_do_not_end_it(fake, tmp_path):
    gpu = fake.uuids[0]
    with Running(fake, tmp_path, lo_mhz=300, hi_mhz=1200) as setter:
        client = SetterClient(setter.path)
        for request in (
            {"verb": "lock", "gpu": gpu, "lo_mhz": 210, "hi_mhz": 1200},
            {"verb": "lock", "gpu": gpu, "lo_mhz": 300, "hi_mhz": 301},
            {"verb": "set_power_cap", "gpu": gpu},
            {"verb": "lock", "gpu": "GPU-of-another", "lo_mhz": 300, "hi_mhz": 1200},
        ):
            with pytest.raises(ActuationDenied, match="setter: "):
                client.ask(**request)
        assert fake.gpus[0].sets == 0
        client.gpu(gpu).lock_clock(300, 300)
        assert fake.gpus[0].lock_hi_mhz == 300
        client.gpu(gpu).reset_clock()
        assert fake.gpus[0].lock_hi_mhz == 0
        client.close()


def test_an_endless_line_ends_the_connection(fake, tmp_path):
    with Running(fake, tmp_path) as setter, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(setter.path))
        peer.sendall(b"x" * 5000)
        peer.settimeout(5.0)
        with pytest.raises((ConnectionError, AssertionError)):
            # An orderly end or a reset: either way nothing is heard any more.
            assert peer.recv(100) != b""


def test_peer_of_another_user_is_refused(fake, tmp_path):
    with Running(fake, tmp_path, uids=[os.getuid() + 1]) as setter:
        client = SetterClient(setter.path)
        with pytest.raises(ActuationDenied, match=rf"user {os.getuid()} may not|broke"):
            client.gpu(fake.uuids[0]).lock_clock(300, 300)
        client.close()
    assert fake.gpus[0].sets == 0


def test_process_of_another_user_is_refused(fake, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    program = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); os.setgid(65534); os.setuid(65534)\n"
        "s.connect(sys.argv[1]); print(s.recv(500).decode())\n"
    )
    # Relative and in an open folder, so that the other user gets as far as the question.
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    with Running(fake, tmp_path) as setter:
        done = subprocess.run(
            [sys.executable, "-c", program, str(setter.path)],
            capture_output=True,
            text=True,
            check=False,
        )
        # By the access list of the socket, or by its answer where there are no such lists.
        refused = "PermissionError" in done.stderr or "user 65534 may not set" in done.stdout
        assert refused, done
    assert fake.gpus[0].sets == 0


def test_two_peers_do_not_share_a_gpu(fake, tmp_path):
    with Running(fake, tmp_path) as setter:
        first, second = SetterClient(setter.path), SetterClient(setter.path)
        first.gpu(fake.uuids[0]).lock_clock(300, 300)
        with pytest.raises(ActuationDenied, match="another peer holds"):
            second.gpu(fake.uuids[0]).lock_clock(600, 600)
        second.gpu(fake.uuids[1]).lock_clock(600, 600)
        second.close()
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [300, 0]
        first.close()


def test_rate_limit_holds_on_the_socket(fake, tmp_path):
    with Running(fake, tmp_path, max_sets_s=20.0) as setter:
        client = SetterClient(setter.path)
        gpu = client.gpu(fake.uuids[0])
        begin_s, passed, refused, reasons = time.monotonic(), 0, 0, set()
        while time.monotonic() - begin_s < 0.5:
            try:
                gpu.lock_clock(300 + 15 * (passed % 2), 600)
                passed += 1
            except ActuationDenied as error:
                reasons.add(str(error))
                refused += 1
        span_s = time.monotonic() - begin_s
        client.close()
        assert refused > 0
        assert all("more than 20 sets per second" in reason for reason in reasons)
        assert 10 <= passed <= 10 + 20.0 * span_s + 1


def test_a_second_setter_is_refused_and_the_first_goes_on(fake, tmp_path):
    with Running(fake, tmp_path) as setter:
        with Running(fake, tmp_path) as second:
            seconds_until(lambda: second.failure is not None)
            assert isinstance(second.failure, BackendError)
        SetterClient(setter.path).close()


def test_restarted_setter_is_used_again(fake, tmp_path):
    with Running(fake, tmp_path) as setter:
        backend = open_backend(fake, tmp_path, setter=setter.path)
        backend.apply(decision(705, 900))
    assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [0, 0]
    with pytest.raises(ActuationDenied, match="connection broke"):
        backend.apply(decision(720, 900))
    with Running(fake, tmp_path):
        backend.apply(decision(720, 900))
        # What was set before it went is set again, though the decision is the same.
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [720, 900]
        backend.close()


def test_frozen_controller_is_given_back_and_sets_again(fake, tmp_path):
    with Running(fake, tmp_path, silence_s=0.3) as setter:
        backend = open_backend(fake, tmp_path, setter=setter.path)
        backend.apply(decision(705, 900))
        seconds_until(lambda: fake.gpus[0].lock_hi_mhz == 0, limit_s=3.0)
        backend.apply(decision(720, 900))  # hears that it was sent away, and comes again
        backend.apply(decision(720, 900))
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [720, 900]
        backend.close()
        assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [0, 0]


def test_controller_renews_what_it_wants(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.backends.nvml.gpus._RENEW_S", 0.1)
    with Running(fake, tmp_path, silence_s=0.5) as setter:
        backend = open_backend(fake, tmp_path, setter=setter.path)
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < 1.5:
            backend.apply(decision(705, 900))
            assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [705, 900]
            time.sleep(0.02)
        backend.close()


def test_reset_that_fails_is_tried_again(fake, tmp_path):
    with Running(fake, tmp_path) as setter:
        client = SetterClient(setter.path)
        client.gpu(fake.uuids[0]).lock_clock(300, 300)
        fake.gpus[0].lost = 1
        client.close()
        time.sleep(0.3)
        fake.gpus[0].lost = 0
        seconds_until(lambda: fake.gpus[0].lock_hi_mhz == 0, limit_s=3.0)


def test_operators_lock_is_left_behind(fake, tmp_path):
    with Running(fake, tmp_path, restore_lock_mhz=(210, 1200)) as setter:
        client = SetterClient(setter.path)
        client.gpu(fake.uuids[0]).lock_clock(300, 300)
        client.close()
        assert (fake.gpus[0].lock_lo_mhz, fake.gpus[0].lock_hi_mhz) == (210, 1200)


def test_socket_that_nobody_serves_is_replaced(fake, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "setter.sock"))
    with Running(fake, tmp_path) as setter:
        seconds_until(lambda: connects(setter.path))


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_too_many_connections_are_refused(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.backends.nvml.setter._PEERS", 2)
    with Running(fake, tmp_path) as setter:
        clients = [SetterClient(setter.path) for _ in range(3)]
        for client, uuid in zip(clients, fake.uuids, strict=False):
            client.gpu(uuid).lock_clock(300, 300)
        with pytest.raises(ActuationDenied, match=r"too many connections|broke"):
            clients[2].gpu(fake.uuids[1]).lock_clock(300, 300)
        for client in clients:
            client.close()


def test_one_user_does_not_take_all_connections(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.backends.nvml.setter._PEERS_OF_UID", 2)
    monkeypatch.setattr("voltana_ctrl.backends.nvml.setter._PEERS", 3)
    uids = iter([*[1000] * 4, os.getuid()])  # the first is the probe of whoever starts it
    monkeypatch.setattr("voltana_ctrl.backends.nvml.setter.peer_uid", lambda _: next(uids))
    with Running(fake, tmp_path, uids=[os.getuid(), 1000]) as setter:
        greedy = [SetterClient(setter.path) for _ in range(3)]
        other = SetterClient(setter.path)
        other.gpu(fake.uuids[0]).lock_clock(300, 300)
        assert fake.gpus[0].lock_hi_mhz == 300
        for client in (*greedy, other):
            client.close()


def test_peers_that_do_not_read_hold_up_nobody(fake, tmp_path):
    with Running(fake, tmp_path) as setter, contextlib.ExitStack() as closing:
        holding = SetterClient(setter.path)
        holding.gpu(fake.uuids[0]).lock_clock(300, 300)
        deaf = []
        for _ in range(14):
            one = closing.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(str(setter.path))
            one.setblocking(False)
            deaf.append(one)
        for one in deaf:
            with contextlib.suppress(OSError):
                while True:
                    one.send(b"\n" * 4096)
        begin_s = time.monotonic()
        holding._connection.close()  # it dies
        seconds_until(lambda: fake.gpus[0].lock_hi_mhz == 0)
        assert time.monotonic() - begin_s < 3.0  # with waits of a second each it was 25 s


def test_a_connection_that_is_gone_before_it_is_taken_does_not_end_it(fake, tmp_path, monkeypatch):
    with Running(fake, tmp_path) as setter:
        real, failures = socket.socket.accept, iter([OSError(24, "Too many open files")] * 3)

        def accept(self):
            for failure in failures:
                raise failure
            return real(self)

        monkeypatch.setattr(socket.socket, "accept", accept)
        client = SetterClient(setter.path)
        client.gpu(fake.uuids[0]).lock_clock(300, 300)
        assert next(failures, None) is None
        client.close()


def test_a_socket_folder_that_others_may_write_is_refused(fake, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    with pytest.raises(ConfigError, match=r"setter's socket.*others can write it"):
        run_setter(fake.uuids, [0], tmp_path / "open" / "s", lock_dir=tmp_path,
                   library=fake.library)  # fmt: skip


@pytest.mark.slow
def test_killed_setter_gives_back(fake, tmp_path):
    body = (
        "from voltana_ctrl.backends.nvml.setter import run_setter\n"
        "run_setter(uuids, [os.getuid()], folder / 'setter.sock', lock_dir=folder)\n"
    )
    with Host(fake, tmp_path, body) as host:
        seconds_until(lambda: connects(tmp_path / "setter.sock"))
        client = SetterClient(tmp_path / "setter.sock")
        client.gpu(fake.uuids[0]).lock_clock(300, 300)
        host.send(signal.SIGKILL)
        assert seconds_until(lambda: fake.gpus[0].lock_hi_mhz == 0) < 2.0
        client.close()


@pytest.mark.slow
def test_setter_ends_orderly_on_sigterm(fake, tmp_path):
    body = (
        "from voltana_ctrl.backends.nvml.setter import run_setter\n"
        "run_setter(uuids, [os.getuid()], folder / 'setter.sock', lock_dir=folder)\n"
    )
    with Host(fake, tmp_path, body) as host:
        seconds_until(lambda: connects(tmp_path / "setter.sock"))
        client = SetterClient(tmp_path / "setter.sock")
        client.gpu(fake.uuids[0]).lock_clock(300, 300)
        host.send(signal.SIGTERM)
        assert host.wait() == 128 + signal.SIGTERM
        assert fake.gpus[0].lock_hi_mhz == 0
        assert not (tmp_path / "setter.sock").exists()
        client.close()


def test_it_needs_a_gpu_that_exists(fake, tmp_path):
    with pytest.raises(ConfigError, match="no such GPU"):
        run_setter(["GPU-x"], [0], tmp_path / "s", lock_dir=tmp_path, library=fake.library)


def test_nothing_is_lowered_while_its_watchdog_does_not_answer(fake, tmp_path, monkeypatch):
    from voltana_ctrl.backends.nvml.watchdog import Watchdog

    with Running(fake, tmp_path) as setter:
        client = SetterClient(setter.path)
        gpu = client.gpu(fake.uuids[0])
        gpu.lock_clock(900, 900)
        with monkeypatch.context() as frozen:
            frozen.setattr(Watchdog, "answers", property(lambda self: False))
            with pytest.raises(BackendError, match="watchdog does not answer"):
                gpu.lock_clock(705, 705)
            assert fake.gpus[0].lock_hi_mhz == 900
            gpu.lock_clock(1200, 1200)  # up is always let through, and so is giving back
            assert fake.gpus[0].lock_hi_mhz == 1200
            gpu.reset_clock()
            assert fake.gpus[0].lock_hi_mhz == 0
        gpu.lock_clock(705, 705)
        assert fake.gpus[0].lock_hi_mhz == 705
        client.close()
