"""Forward-pass metrics: the wire of three publishers, and what a reader concludes."""

import json
import time

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.messages import (
    BadMessage,
    ForwardPass,
    OtherVersion,
    decode_forward_pass,
)
from voltana_ctrl.engines.fpm.reader import FpmReader, dynamo_fpm_addresses
from voltana_ctrl.engines.fpm.state import RankState
from voltana_ctrl.engines.waiting_line import WaitingLine
from voltana_ctrl.errors import ConfigError

FLEET = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
PREFILL, DECODE = 0, 1


def message(number=0, wall_s=0.0, worker_id="", dp_rank=0, scheduled=(), queued=()):
    """Message as msgspec writes it: every field, zeros included."""
    names = (
        "num_prefill_requests", "sum_prefill_tokens", "var_prefill_length",
        "sum_prefill_kv_tokens", "num_decode_requests", "sum_decode_kv_tokens",
        "var_decode_kv_tokens",
    )  # fmt: skip
    return {
        "version": 1,
        "worker_id": worker_id,
        "dp_rank": dp_rank,
        "counter_id": number,
        "wall_time": wall_s,
        "scheduled_requests": {name: 0 for name in names} | dict(scheduled),
        "queued_requests": {name: 0 for name in names if "prefill_kv" not in name} | dict(queued),
    }


def engine_frames(told):
    """Frames of vLLM's instrumented scheduler and of SGLang."""
    return [b"", told["counter_id"].to_bytes(8, "big"), msgpack.packb(told)]


def dynamo_frames(told, publisher=2_727_408_896_027_794):
    """Frames of Dynamo's event plane: topic, publisher, sequence, framed envelope."""
    number = told["counter_id"]
    envelope = msgpack.packb(
        {
            "publisher_id": publisher,
            "sequence": number,
            "published_at": 1_795_471_836_384,
            "topic": "forward-pass-metrics",
            "payload": msgpack.packb(told),
        }
    )
    head = b"\x01" + len(envelope).to_bytes(4, "big")
    topic = b"forward-pass-metrics"
    return [topic, publisher.to_bytes(8, "big"), number.to_bytes(8, "big"), head + envelope]


BUSY = message(
    7, 0.0168, "13605343202970692438", 1,
    {"num_prefill_requests": 2, "sum_prefill_tokens": 700, "sum_prefill_kv_tokens": 64,
     "num_decode_requests": 3, "sum_decode_kv_tokens": 900},
    {"num_prefill_requests": 4, "sum_prefill_tokens": 2100, "num_decode_requests": 1,
     "sum_decode_kv_tokens": 333},
)  # fmt: skip


@pytest.mark.parametrize("frames", [engine_frames, dynamo_frames])
def test_both_wires_carry_the_same_message(frames):
    assert decode_forward_pass(frames(BUSY)) == ForwardPass(
        worker_id="13605343202970692438",
        dp_rank=1,
        number=7,
        wall_s=0.0168,
        prefill_req=2,
        prefill_tok=700,
        prefill_kv_tok=64,
        decode_req=3,
        decode_kv_tok=900,
        queued_prefill_req=4,
        queued_prefill_tok=2100,
        queued_decode_req=1,
        queued_decode_kv_tok=333,
    )


# Recorded from ai-dynamo 1.6.1: a mock decode worker, one request of 21 prompt tokens.
RECORDED = (
    b"\x87\xa7version\x01\xa9worker_id\xb413605343202970692438\xa7dp_rank\x00\xaacounter_id\x1e"
    b"\xa9wall_time\xcb?w\x83\xf5\xf6\xf0A\x89\xb2scheduled_requests\x87\xb4num_prefill_requests"
    b"\x00\xb2sum_prefill_tokens\x00\xb2var_prefill_length\xcb\x00\x00\x00\x00\x00\x00\x00\x00"
    b"\xb5sum_prefill_kv_tokens\x00\xb3num_decode_requests\x01\xb4sum_decode_kv_tokens\x15"
    b"\xb4var_decode_kv_tokens\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xafqueued_requests\x80"
)


def test_a_recorded_message():
    one = decode_forward_pass([b"", b"\0" * 8, RECORDED])
    assert (one.number, one.decode_req, one.decode_kv_tok) == (30, 1.0, 21.0)
    assert one.wall_s == pytest.approx(0.00574, abs=1e-5)


def test_missing_and_unknown_fields_are_no_reason_to_refuse():
    told = {"wall_time": 0.02, "timing_scope": "execute_model_cuda", "scheduled_requests": None}
    assert decode_forward_pass([msgpack.packb(told)]) == ForwardPass(wall_s=0.02)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, None, True])
def test_other_versions_are_told_apart(version):
    with pytest.raises(OtherVersion):
        decode_forward_pass([msgpack.packb({**BUSY, "version": version})])


@pytest.mark.parametrize(
    "told",
    [
        [],
        {},
        {"version": 1},
        {"wall_time": -1.0},
        {"wall_time": float("nan")},
        {"wall_time": float("inf")},
        {"wall_time": "0.02"},
        {"wall_time": True},
        {"wall_time": 0.02, "scheduled_requests": [1, 2]},
        {"wall_time": 0.02, "scheduled_requests": {"num_decode_requests": -1}},
        {"wall_time": 0.02, "worker_id": [1]},
        {"wall_time": 0.02, "worker_id": "x" * 1000},
        {"wall_time": 0.02, "dp_rank": 2**40},
    ],
)
def test_what_makes_no_sense_is_refused(told):
    with pytest.raises(BadMessage):
        decode_forward_pass([msgpack.packb(told)])


def test_nothing_and_too_much_are_refused():
    for frames in ([], [b""], [b"\x01\0\0\0\0"], [b"\x80" * 70_000], [b"\x01\0\0\0\x01\x80"]):
        with pytest.raises(BadMessage):
            decode_forward_pass(frames)


trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(), child, max_size=4),
    max_leaves=12,
)  # fmt: skip
nearly = st.dictionaries(st.sampled_from(sorted(BUSY)), trees).map(lambda odd: {**BUSY, **odd})
mutated = st.tuples(st.integers(0, len(RECORDED) - 1), st.binary(max_size=6)).map(
    lambda change: RECORDED[: change[0]] + change[1] + RECORDED[change[0] + len(change[1]) :]
)


@given(st.binary() | trees.map(msgpack.packb) | nearly.map(msgpack.packb) | mutated, st.booleans())
def test_any_bytes_are_decoded_or_refused(data, framed):
    if framed:
        data = b"\x01" + len(data).to_bytes(4, "big") + data
    try:
        one = decode_forward_pass([b"", data])
    except BadMessage:
        return
    amounts = [getattr(one, name) for name in ForwardPass.__slots__ if name != "worker_id"]
    assert np.isfinite(amounts).all()
    assert min(amounts) >= 0


# What a reader concludes


def reader(**changes):
    settings = {"instance": "decode-0", "kind": "vllm", "url": "http://x"} | changes
    made = FpmReader(FLEET, [])
    made._of_address = {"here": {FLEET.ids.index(settings["instance"])}}
    return made


def take(made, *messages, frames=engine_frames, begin_s=1.0, step_s=0.1):
    for k, told in enumerate(messages):
        made.take("here", frames(told), begin_s + k * step_s)


def test_state_and_iterations_of_a_decode_instance():
    made = reader()
    steps = [
        message(k, 0.02, scheduled={"num_decode_requests": 5, "sum_decode_kv_tokens": 500 + 5 * k})
        for k in range(3)
    ]
    take(made, *steps)
    reading, rows = made.read(1.25)
    assert reading.running_req[DECODE] == 5
    assert reading.kv_used_tok[DECODE] == 510
    assert reading.age_s[DECODE] == pytest.approx(0.05)
    assert np.isnan(reading.running_req[PREFILL])
    assert reading.age_s[PREFILL] == np.inf
    assert rows.instance.tolist() == [DECODE] * 3
    assert rows.wall_s.tolist() == [0.02] * 3
    assert rows.kv_tok.tolist() == [500, 505, 510]
    assert rows.t_s == pytest.approx([1.0, 1.1, 1.2])
    assert len(made.read(1.3)[1]) == 0  # told once


def test_gaps_restarts_and_garbage_are_counted():
    made = reader()
    numbers = (3, 4, 7, 8, 0, 1)
    take(made, *[message(k, 0.02) for k in numbers])
    made.take("here", [b"garbage"], 2.0)
    made.take("here", engine_frames({**message(2, 0.02), "version": 9}), 2.0)
    made.take("elsewhere", engine_frames(message(2, 0.02)), 2.0)
    made.read(2.0)
    counts = made.counts
    assert (counts.messages, counts.iterations) == (6, 6)
    assert (counts.lost, counts.restarts) == (2, 1)
    assert (counts.bad, counts.other_version, counts.strangers) == (1, 1, 1)


def test_messages_without_numbers_are_no_restarts():
    made = reader()
    take(made, *[message(0, 0.02)] * 3)
    made.read(2.0)
    assert (made.counts.lost, made.counts.restarts) == (0, 0)


def test_memory_is_bounded_where_nobody_reads():
    made = FpmReader(FLEET, [], keep=10)
    for k in range(1000):
        made.take("here", engine_frames(message(k, 0.02)), 0.0)
    assert len(made._inbox) == 10
    assert made.counts.dropped == 990


def test_ranks_are_added_up_and_the_slowest_gives_the_age():
    made = reader()
    for rank, t_s in ((0, 1.0), (1, 3.0)):
        told = message(1, 0.02, dp_rank=rank, scheduled={"num_decode_requests": 4})
        made.take("here", engine_frames(told), t_s)
    reading, _ = made.read(3.5)
    assert reading.running_req[DECODE] == 8
    assert reading.age_s[DECODE] == 2.5


def test_a_heartbeat_empties_an_engine_but_not_its_queue():
    made = reader()
    busy = message(1, 0.02, scheduled={"num_decode_requests": 4, "sum_decode_kv_tokens": 40})
    take(made, busy, message(2))
    reading, rows = made.read(1.2)
    assert (reading.running_req[DECODE], reading.kv_used_tok[DECODE], len(rows)) == (0, 0, 1)
    # A long iteration with work behind it: the engine beats, and its queue is still there.
    waits = message(3, 0.02, queued={"num_prefill_requests": 2, "sum_prefill_tokens": 9000})
    made.take("here", engine_frames(waits), 2.0)
    made.take("here", engine_frames(message(4)), 3.0)
    reading, _ = made.read(3.0)
    assert (reading.queue_req[DECODE], reading.age_s[DECODE]) == (2, 0)
    made.take("here", engine_frames(message(5)), 14.0)
    assert made.read(14.0)[0].queue_req[DECODE] == 0


class Engine:
    """Prefill engine with chunks and a queue, which knows the truth about itself."""

    def __init__(self, budget_tok):
        self.budget_tok, self.queue, self.partial, self.arrived, self.number = (
            budget_tok,
            [],
            0,
            0,
            0,
        )

    def step(self, t_s, prompts):
        self.queue += [(t_s, tok) for tok in prompts]
        self.arrived += len(prompts)
        budget, requests, done, kv = self.budget_tok, 0, 0, 0
        if self.partial:
            part = min(budget, self.partial)
            kv += self.read
            self.partial, budget, requests, done = self.partial - part, budget - part, 1, part
            self.read += part
        while self.queue and budget:
            _, tok = self.queue.pop(0)
            part = min(tok, budget)
            self.partial, self.read = tok - part, part
            budget, requests, done = budget - part, requests + 1, done + part
        self.number += 1
        return message(
            self.number, 0.1,
            scheduled={"num_prefill_requests": requests, "sum_prefill_tokens": done,
                       "sum_prefill_kv_tokens": kv},
            queued={"num_prefill_requests": len(self.queue),
                    "sum_prefill_tokens": sum(tok for _, tok in self.queue)},
        )  # fmt: skip


@given(st.lists(st.lists(st.integers(1, 3000), max_size=4), max_size=30), st.integers(300, 5000))
def test_arrivals_of_a_queue_in_order_and_its_oldest_wait(steps, budget_tok):
    engine = Engine(budget_tok)
    rank = RankState(prefills=True, decodes=False, budget_tok=budget_tok)
    tok = 0
    for k, prompts in enumerate([*steps, *[[]] * 40]):
        t_s = 1.0 + k
        rank.take(decode_forward_pass(engine_frames(engine.step(t_s, prompts))), t_s)
        tok += sum(prompts)
        oldest_s = t_s - engine.queue[0][0] if engine.queue else 0.0
        # Never too short; too long only behind a cut prompt whose rest no message tells.
        assert rank.oldest_wait_s(t_s) >= oldest_s
        assert (rank.oldest_wait_s(t_s) > 0.0) <= bool(engine.queue)
        assert rank.queue_req == len(engine.queue)
        if not engine.queue and not engine.partial:
            assert rank.arrived_tok == pytest.approx(tok)
            assert rank.arrived_req == engine.arrived


def test_the_oldest_wait_is_exact_where_no_prompt_is_cut():
    rank = RankState(prefills=True, decodes=False)
    queue: list[tuple[float, int]] = []
    oldest_s = []
    rng = np.random.default_rng(0)
    for k in range(300):
        queue += [(float(k), tok) for tok in rng.integers(50, 900, size=rng.integers(1, 4))]
        batch, queue = queue[: (k % 5)], queue[(k % 5) :]
        told = message(
            k, 0.1,
            scheduled={"num_prefill_requests": len(batch),
                       "sum_prefill_tokens": int(sum(tok for _, tok in batch))},
            queued={"num_prefill_requests": len(queue),
                    "sum_prefill_tokens": int(sum(tok for _, tok in queue))},
        )  # fmt: skip
        rank.take(decode_forward_pass(engine_frames(told)), float(k))
        oldest_s.append(k - queue[0][0] if queue else 0.0)
        assert rank.oldest_wait_s(k) == oldest_s[-1]
    assert max(oldest_s) > 2.0


def test_cached_prefixes_do_not_hide_arrivals():
    rank = RankState(prefills=True, decodes=False)
    for k in range(5):  # 1000 tokens each, of which 900 were cached
        scheduled = {"num_prefill_requests": 1, "sum_prefill_tokens": 100}
        told = message(k, 0.1, scheduled=scheduled | {"sum_prefill_kv_tokens": 900})
        rank.take(decode_forward_pass(engine_frames(told)), float(k))
    assert (rank.arrived_req, rank.arrived_tok) == (5, 5000)


def test_decode_arrivals_are_at_least_the_growth_of_the_batch():
    rank = RankState(prefills=False, decodes=True)
    for k, n in enumerate((1, 3, 2, 6)):
        told = message(k, 0.1, scheduled={"num_decode_requests": n, "sum_decode_kv_tokens": 50 * n})
        rank.take(decode_forward_pass(engine_frames(told)), float(k))
    assert rank.arrived_req == 1 + 2 + 4


def test_a_long_line_is_kept_short():
    line = WaitingLine()
    for k in range(5000):
        line.follow(float(k), waiting_tok=k + 1.0, arrived_tok=1.0)
    assert len(line._parts) <= 1024
    assert line.oldest_s(5000.0) == 5000.0


# Over real sockets


def pair(instance, **more):
    zmq = pytest.importorskip("zmq")
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    made = Endpoint(
        instance=instance, kind="dynamo", url="http://x", fpm=f"tcp://127.0.0.1:{port}", **more
    )
    return context, socket, made


def read_until(made, done, limit_s=10.0):
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < limit_s:
        reading, rows = made.read(time.monotonic())
        if done(reading):
            return reading, rows
        time.sleep(0.02)
    raise AssertionError(f"not within {limit_s} s: {made.counts}")


def test_over_sockets_by_worker_and_by_address():
    context, socket, prefill = pair("prefill-0", worker_id=111)
    other_context, other_socket, decode = pair("decode-0")
    made = FpmReader(FLEET, [prefill, decode])
    try:
        assert made.listens
        number = 0

        def heard(reading):
            nonlocal number
            number += 1
            told = message(number, 0.05, "111", scheduled={"num_prefill_requests": 1})
            socket.send_multipart(dynamo_frames(told))
            stranger = message(number, 0.05, "222")
            socket.send_multipart(dynamo_frames(stranger))
            told = message(number, 0.02, scheduled={"num_decode_requests": 9})
            other_socket.send_multipart(engine_frames(told))
            return np.isfinite(reading.age_s).all()

        reading, _ = read_until(made, heard)
        assert reading.running_req.tolist() == [0, 9]
        assert made.counts.strangers > 0
        assert made.counts.bad == 0
    finally:
        made.close()
        made.close()
        for one in (context, other_context):
            one.destroy(linger=0)


def test_a_worker_is_found_at_an_address_of_the_fleet():
    context, socket, named = pair("prefill-0")
    decode = Endpoint(instance="decode-0", kind="dynamo", url="http://x", worker_id=5)
    made = FpmReader(FLEET, [decode], addresses=[named.fpm])
    try:

        def heard(reading):
            socket.send_multipart(dynamo_frames(message(1, 0.02, "5")))
            return np.isfinite(reading.age_s[DECODE])

        read_until(made, heard)
    finally:
        made.close()
        context.destroy(linger=0)


def test_an_address_that_is_none_is_refused():
    bad = Endpoint(instance="decode-0", kind="vllm", url="http://x", fpm="tcp://nowhere")
    with pytest.raises(ConfigError, match="tcp://nowhere"):
        FpmReader(FLEET, [bad])


def test_addresses_of_dynamo_are_found_in_its_folder(tmp_path):
    folder = tmp_path / "v1" / "event_channels"
    folder.mkdir(parents=True)
    channel = {
        "type": "EventChannel",
        "topic": "forward-pass-metrics",
        "transport": {"kind": "Zmq", "config": {"endpoint": "tcp://10.0.0.2:43441"}},
    }
    (folder / "one").write_text(json.dumps(channel))
    (folder / "two").write_text(json.dumps({**channel, "topic": "kv-events"}))
    (folder / "three").write_text('{"type": "EventCha')
    assert dynamo_fpm_addresses(tmp_path) == ("tcp://10.0.0.2:43441",)
