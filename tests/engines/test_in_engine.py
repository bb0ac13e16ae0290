"""Inside an engine: settings, the clock thread, and a clock that is always handed back."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from tests.engines.fpm.test_fpm import FLEET
from tests.helpers.fake_gpus import Host, all_given_back, machine, needs_compiler, seconds_until
from tests.story.dynamo_stack import free_ports
from voltana_ctrl.control.baselines.ecofreq import DEFAULT_LADDER_MHZ
from voltana_ctrl.engines.clock_thread import ClockThread
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.fpm.publisher import FpmPublisher
from voltana_ctrl.engines.fpm.reader import FpmReader
from voltana_ctrl.engines.in_engine import InEngine, InEngineSettings
from voltana_ctrl.engines.limits import read_limits, write_limits
from voltana_ctrl.errors import ActuationDenied, ConfigError
from voltana_ctrl.types import Order, Role

PROFILE = "a100-sxm-80gb/llama-3.1-8b"
CLOCKS_MHZ = np.arange(210.0, 1411.0, 15.0)


# Settings


def test_unconfigured_it_only_observes(monkeypatch):
    engine = InEngine(InEngineSettings.read({}), Role.DECODE)
    for _ in range(5000):
        engine.before(running_req=3, kv_used_tok=100)
        engine.after(ForwardPass(wall_s=0.01, decode_req=3.0))
    assert (engine.iterations, engine.asked_mhz, engine.clock) == (5000, None, None)
    assert len(engine.recent) == 4096  # bounded
    engine.close()


def test_a_variable_counts_more_than_the_file(tmp_path):
    path = tmp_path / "engine.toml"
    path.write_text(
        f'mode = "act"\nprofile = "{PROFILE}"\nslo = "ttft=1,itl=0.1"\ngpus = ["GPU-1", "GPU-2"]\n'
        'role = "decode"\nlimits = "limits.json"\n'
    )
    settings = InEngineSettings.read(
        {"VOLTANA_CTRL_CONFIG": str(path), "VOLTANA_CTRL_SLO": "ttft=0.6,itl=0.06"}
    )
    assert (settings.mode, settings.gpus, settings.role) == ("act", ("GPU-1", "GPU-2"), Role.DECODE)
    assert settings.slo.itl_s == 0.06
    assert InEngineSettings.read({"VOLTANA_CTRL_GPUS": "GPU-1,GPU-2"}).gpus == ("GPU-1", "GPU-2")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MODE": "drive"}, "expected observe or act"),
        ({"MODE": "act"}, "profile is missing; set VOLTANA_CTRL_PROFILE"),
        ({"MODE": "act", "PROFILE": PROFILE, "SLO": "ttft=1,itl=1"}, "gpus is missing"),
        ({"SLO": "fast"}, "slo: expected ttft"),
        ({"ROLE": "both"}, "role: expected one of"),
        ({"PARK_MEMORY": "yes"}, "park_memory: expected 0 or 1"),
        ({"CONFIG": "no-such-file"}, "no-such-file: cannot be read"),
    ],
)
def test_what_is_wrong_is_named(environment, words):
    with pytest.raises(ConfigError, match=words):
        InEngineSettings.read({f"VOLTANA_CTRL_{key}": text for key, text in environment.items()})


@pytest.mark.parametrize("text", ["colour = 3", "slo = 3", "mode = "])
def test_a_wrong_file_is_refused(tmp_path, text):
    path = tmp_path / "engine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        InEngineSettings.read({"VOLTANA_CTRL_CONFIG": str(path)})


def test_hooks_that_fail_are_switched_off_and_the_engine_goes_on():
    engine = InEngine(InEngineSettings(), Role.DECODE)
    answers = [engine.failed(ValueError("x")) for _ in range(10)]
    assert answers == [False] * 9 + [True]


# The clock thread


class Card:
    def __init__(self, block_s=0.0):
        self.block_s, self.sets, self.closed, self.refuses = block_s, [], 0, False

    def set_clock(self, instance, freq_mhz):
        time.sleep(self.block_s)
        if self.refuses:
            raise ActuationDenied("no permission")
        self.sets.append(freq_mhz)

    def close(self):
        self.closed += 1


def test_asking_never_waits_and_the_newest_wins():
    card = Card(block_s=0.05)
    clock = ClockThread(card, CLOCKS_MHZ)
    begin_s = time.perf_counter()
    for mhz in CLOCKS_MHZ:
        clock.ask(mhz)
    assert time.perf_counter() - begin_s < 0.04  # less than one set
    assert clock.settle()
    assert card.sets[-1] == 1410
    assert len(card.sets) <= 4
    clock.close()
    clock.close()
    assert card.closed == 1


def test_a_refused_set_is_tried_again():
    card = Card()
    card.refuses = True
    clock = ClockThread(card, CLOCKS_MHZ)
    clock.ask(705.0)
    assert clock.settle()
    card.refuses = False
    clock.ask(705.0)
    assert clock.settle()
    assert (card.sets, clock.refused) == ([705.0], 1)
    clock.close()


def order(floor_mhz, ceiling_mhz, **more):
    return Order(floor_mhz=floor_mhz, ceiling_mhz=ceiling_mhz, **more)


def test_orders_are_followed_and_a_controller_that_is_gone_leaves_the_ceiling(tmp_path):
    path = tmp_path / "limits"
    write_limits(path, order(705.0, 1107.0), valid_s=1.5)
    card = Card()
    clock = ClockThread(card, CLOCKS_MHZ, limits=path)
    assert (clock.floor_mhz, clock.ceiling_mhz) == (705.0, 1095.0)  # a supported clock
    # No iteration runs: the clock comes down all the same.
    seconds_until(lambda: card.sets == [1095.0], limit_s=3.0)
    clock.ask(705.0)
    gone_s = seconds_until(lambda: card.sets[-1] == 1095.0 and clock.floor_mhz == 1095.0)
    assert gone_s < 2.5
    huge = "1" + "0" * 400
    order_of = f'{{"floor_mhz": {huge}, "ceiling_mhz": {huge}}}'
    for odd in (
        "{", "[" * 50_000, "[]", "{}", " " * 70_000,
        f'{{"schema": "voltana-ctrl/limits/1", "order": {order_of}, "policy": "mpc", "since_s": 1,'
        ' "valid_s": 1}',
        '{"schema": "voltana-ctrl/limits/1", "order": {"floor_mhz": 1, "ceiling_mhz": 2},'
        ' "policy": ["mpc"], "since_s": 1, "valid_s": 1}',
    ):  # fmt: skip
        path.write_text(odd)
        time.sleep(0.2)
        assert (clock.floor_mhz, clock.ceiling_mhz) == (1095.0, 1095.0)
    write_limits(path, order(300.0, 1410.0))
    seconds_until(lambda: clock.ceiling_mhz == 1410.0)
    assert clock.floor_mhz == 300.0
    clock.close()


def test_a_ceiling_that_was_announced_comes_though_nobody_says_so_again(tmp_path):
    path = tmp_path / "limits"
    write_limits(path, order(300.0, 1410.0, announced=((0.6, 705.0),)), valid_s=0.2)
    card = Card()
    clock = ClockThread(card, CLOCKS_MHZ, limits=path)
    seconds_until(lambda: clock.floor_mhz == 1410.0)
    seconds_until(lambda: card.sets and card.sets[-1] == 705.0, limit_s=3.0)
    assert (clock.floor_mhz, clock.ceiling_mhz) == (705.0, 705.0)
    clock.close()


def test_an_idle_engine_under_orders_keeps_its_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.engines.clock_thread._RENEW_S", 0.1)
    path = tmp_path / "limits"
    write_limits(path, order(300.0, 705.0), valid_s=30.0)
    card = Card()
    clock = ClockThread(card, CLOCKS_MHZ, limits=path)
    seconds_until(lambda: len(card.sets) >= 4, limit_s=10.0)  # no iteration runs
    assert set(card.sets) == {705.0}
    clock.close()


def test_a_parked_engine_without_work_goes_down_to_its_floor(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.engines.clock_thread._RENEW_S", 0.2)
    path = tmp_path / "limits"
    write_limits(path, order(300.0, 1410.0), valid_s=30.0)
    card = Card()
    clock = ClockThread(card, CLOCKS_MHZ, limits=path)
    clock.ask(1005.0)
    time.sleep(1.0)
    assert card.sets[-1] == 1005.0  # awake, it is ready for the next request
    write_limits(path, order(300.0, 1410.0, active=False), valid_s=30.0)
    seconds_until(lambda: card.sets[-1] == 300.0)
    # Woken, it runs as its governor says.
    write_limits(path, order(600.0, 1410.0), valid_s=30.0)
    seconds_until(lambda: card.sets[-1] == 600.0)
    clock.ask(1005.0)
    seconds_until(lambda: card.sets[-1] == 1005.0)
    clock.close()


def test_before_the_first_order_the_clock_is_the_highest(tmp_path):
    clock = ClockThread(Card(), CLOCKS_MHZ, limits=tmp_path / "none-yet")
    assert (clock.floor_mhz, clock.ceiling_mhz) == (1410.0, 1410.0)
    clock.close()


def test_orders_that_others_may_have_written_are_not_believed(tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir(mode=0o755)
    path = folder / "decode-0.json"
    write_limits(path, order(300.0, 705.0))
    assert path.stat().st_mode & 0o777 == 0o644
    assert read_limits(path).order.ceiling_mhz == 705.0
    for what, mode in ((path, 0o646), (path, 0o664), (folder, 0o777), (folder, 0o775)):
        before = what.stat().st_mode
        what.chmod(mode)
        with pytest.raises(ConfigError, match="others can write it"):
            read_limits(path)
        what.chmod(before)
    link = folder / "link.json"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_limits(link)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(ConfigError, match="others can write it"):
            read_limits(path)
        assert read_limits(path, owners=(12345,)).order.ceiling_mhz == 705.0
    pipe = folder / "pipe"
    os.mkfifo(pipe, 0o644)
    with pytest.raises(ConfigError, match="expected a file"):
        read_limits(pipe)


def test_a_clock_in_use_is_renewed_and_one_that_is_not_is_let_go(monkeypatch):
    monkeypatch.setattr("voltana_ctrl.engines.clock_thread._RENEW_S", 0.1)
    card = Card()
    clock = ClockThread(card, CLOCKS_MHZ)
    until_s = time.monotonic() + 0.6
    while time.monotonic() < until_s:
        clock.ask(705.0)
        time.sleep(0.01)
    assert len(card.sets) >= 3
    time.sleep(0.4)
    idle = len(card.sets)
    time.sleep(0.4)
    assert len(card.sets) == idle
    clock.ask(705.0)  # the lease may have given it back meanwhile
    assert clock.settle()
    assert len(card.sets) == idle + 1
    clock.close()


# On a card


def environment(fake, folder, **more):
    return {
        "VOLTANA_CTRL_MODE": "act",
        "VOLTANA_CTRL_PROFILE": PROFILE,
        "VOLTANA_CTRL_SLO": "ttft=0.6,itl=0.06",
        "VOLTANA_CTRL_GPUS": fake.uuids[0],
        "VOLTANA_CTRL_LOCK_DIR": str(folder),
        "VOLTANA_CTRL_LIBRARY": str(fake.library),
        **more,
    }


@needs_compiler
def test_the_governor_sets_the_clock_of_its_card_and_hands_it_back(tmp_path):
    with machine(tmp_path) as fake:
        engine = InEngine(InEngineSettings.read(environment(fake, tmp_path)), Role.DECODE)
        try:
            engine.before(running_req=4, kv_used_tok=1000)
            assert engine.clock.settle()
            low_mhz = fake.gpus[0].lock_hi_mhz
            engine.before(running_req=250, kv_used_tok=300_000)
            assert engine.clock.settle()
            assert 0 < low_mhz < fake.gpus[0].lock_hi_mhz
            assert engine.asked_mhz == fake.gpus[0].lock_hi_mhz
            assert not fake.gpus[1].locked
        finally:
            engine.close()
        assert all_given_back(fake)


@needs_compiler
def test_the_governor_obeys_the_order_of_its_node(tmp_path):
    """Floor, ceiling, pace, margins, delay and policy of the file reach the governor."""
    path = tmp_path / "orders" / "decode-0.json"
    with machine(tmp_path) as fake:
        settings = environment(fake, tmp_path, VOLTANA_CTRL_LIMITS=str(path))
        write_limits(path, order(210.0, 1410.0), valid_s=30.0)
        engine = InEngine(InEngineSettings.read(settings), Role.DECODE)

        def clock_of(told, policy="mpc", load=(80, 35_000)):
            write_limits(path, told, policy=policy, valid_s=30.0)
            time.sleep(0.3)  # it looks ten times a second
            seconds_until(lambda: engine.policy == policy)
            engine.before(running_req=load[0], kv_used_tok=load[1])
            assert engine.clock.settle()
            return fake.gpus[0].lock_hi_mhz

        try:
            plain_mhz = clock_of(order(210.0, 1410.0))
            assert clock_of(order(600.0, 1410.0)) == 600.0 > plain_mhz
            assert clock_of(order(210.0, 240.0)) == 240.0 < plain_mhz
            slow_mhz = clock_of(order(210.0, 1410.0, decode_pace_frac=1.5))
            wary_mhz = clock_of(order(210.0, 1410.0, itl_margin_frac=0.5, decode_pace_frac=1.0))
            assert slow_mhz > plain_mhz
            assert wary_mhz > plain_mhz
            assert clock_of(order(705.0, 1410.0), policy="static-705") == 705.0
            assert engine.policy == "static-705"
            assert clock_of(order(210.0, 1410.0), policy="voltanallm") in DEFAULT_LADDER_MHZ
            # The node measures its delay: that of a call here, and what settling takes.
            assert 0.0 < engine.delay_s < 0.5
        finally:
            engine.close()
        assert all_given_back(fake)


@needs_compiler
def test_memory_sleeps_while_the_instance_is_parked_and_has_no_work(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.engines.clock_thread._RENEW_S", 0.3)
    path = tmp_path / "orders" / "decode-0.json"
    parked, awake = order(210.0, 1410.0, active=False), order(210.0, 1410.0)
    with machine(tmp_path) as fake:
        told = {"VOLTANA_CTRL_LIMITS": str(path), "VOLTANA_CTRL_PARK_MEMORY": "1"}
        write_limits(path, awake, valid_s=30.0)
        settings = InEngineSettings.read(environment(fake, tmp_path, **told))
        engine = InEngine(settings, Role.DECODE)
        try:

            def low(asleep):
                lowest_mhz = min(fake.gpus[0].mem_low_mhz, fake.gpus[0].mem_mhz)
                return fake.gpus[0].mem_lock_hi_mhz == (lowest_mhz if asleep else 0.0)

            time.sleep(0.8)
            assert low(False)  # idle and awake is not parked
            write_limits(path, parked, valid_s=30.0)
            seconds_until(lambda: low(True))
            engine.before(running_req=4, kv_used_tok=1000)  # somebody sent work all the same
            assert seconds_until(lambda: low(False)) < 2.0
            seconds_until(lambda: low(True))
            write_limits(path, awake, valid_s=30.0)
            seconds_until(lambda: low(False))
            write_limits(path, parked, valid_s=2.0)
            seconds_until(lambda: low(True))
            seconds_until(lambda: low(False))  # the controller is gone
            write_limits(path, parked, valid_s=30.0)
            seconds_until(lambda: low(True))
        finally:
            engine.close()
        assert all_given_back(fake)
    with pytest.raises(ConfigError, match="the setter sets no memory clock"):
        InEngineSettings(park_memory=True, setter=tmp_path)


def test_who_is_woken_while_its_driver_hangs_is_woken_later(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.engines.clock_thread._RENEW_S", 0.2)
    path, said = tmp_path / "limits", []

    def hangs(parked):
        said.append(parked)
        return parked or len(said) == 6

    write_limits(path, order(300.0, 1410.0, active=False), valid_s=30.0)
    clock = ClockThread(Card(), CLOCKS_MHZ, limits=path, park=hangs)
    seconds_until(lambda: said == [True])
    write_limits(path, order(300.0, 1410.0), valid_s=30.0)
    seconds_until(lambda: len(said) == 6)
    time.sleep(0.5)
    assert said == [True, *[False] * 5]
    clock.close()


def test_who_cannot_be_parked_deeper_stays_awake(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("voltana_ctrl.engines.clock_thread._RENEW_S", 0.2)
    path, said = tmp_path / "limits", []

    def refuses(parked):
        said.append(parked)
        if parked or len(said) < 4:
            raise ActuationDenied("no")
        return True

    write_limits(path, order(300.0, 1410.0, active=False), valid_s=30.0)
    clock = ClockThread(Card(), CLOCKS_MHZ, limits=path, park=refuses)
    seconds_until(lambda: len(said) == 4)
    time.sleep(0.5)
    # What one GPU of several may hold is taken back until that succeeds, and not tried again.
    assert said == [True, False, False, False]
    assert sum("cannot be parked deeper" in one for one in caplog.messages) == 1
    clock.close()


DYING = """
import os
os.environ.update({environment!r})
from voltana_ctrl.engines.in_engine import InEngine, InEngineSettings
from voltana_ctrl.types import Order, Role
engine = InEngine(InEngineSettings.read(os.environ), Role.DECODE)
engine.before(running_req=4, kv_used_tok=1000)
engine.clock.settle()
say("set")
{end}
"""


@needs_compiler
@pytest.mark.parametrize(
    ("end", "number"),
    [
        ("time.sleep(60)", signal.SIGKILL),
        ("raise SystemExit(1)", None),
        ("os._exit(1)", None),
    ],
)
def test_an_engine_that_dies_hands_its_clock_back(tmp_path, end, number):
    with machine(tmp_path) as fake:
        body = DYING.format(environment=environment(fake, tmp_path), end=end)
        with Host(fake, tmp_path, body) as host:
            host.expect("set")
            if number is not None:
                assert fake.gpus[0].locked
                host.send(number)
            host.wait()
            assert seconds_until(lambda: all_given_back(fake)) < 5.0


# Published


def test_published_passes_arrive_as_they_were_made():
    publisher = FpmPublisher("tcp://127.0.0.1:*", worker_id="7", dp_rank=2)
    engine = Endpoint(instance="decode-0", kind="vllm", url="http://x", fpm=publisher.address)
    reader = FpmReader(FLEET, [engine])
    seconds_until(lambda: (reader.read(time.monotonic()), reader.counts.messages)[1] > 0)
    heard = reader.counts.messages
    sent = [ForwardPass(wall_s=0.001 * (k + 1), decode_req=k % 9 + 1.0) for k in range(500)]
    for one in sent:
        publisher.send(one)
    rows = []

    def all_there():
        rows.extend(reader.read(time.monotonic())[1].wall_s)
        return len(rows) == len(sent)

    seconds_until(all_there)
    assert rows == [one.wall_s for one in sent]
    assert reader.counts.lost == 0
    assert reader.counts.messages >= heard + 500
    publisher.close()
    reader.close()


def test_each_rank_publishes_at_the_next_port():
    (port,) = free_ports(1)
    settings = InEngineSettings(fpm=f"tcp://127.0.0.1:{port}")
    engines = [InEngine(settings, Role.DECODE, dp_rank=rank) for rank in (0, 1)]
    addresses = [engine._publisher.address for engine in engines]
    assert addresses == [f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}"]
    with pytest.raises(ConfigError, match=str(port)):
        InEngine(settings, Role.DECODE)
    for engine in engines:
        engine.close()


def test_threads_end_with_their_owner():
    before = threading.active_count()
    engine = InEngine(InEngineSettings(fpm="tcp://127.0.0.1:*"), Role.DECODE)
    engine.close()
    assert threading.active_count() == before
