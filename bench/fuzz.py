"""Whatever is read from outside, fed with what nobody would write: only errors of ours come back.

    python bench/fuzz.py                                # a million inputs over all parsers
    python bench/fuzz.py --inputs 20000 --seed 3
    python bench/fuzz.py --only body --show             # one parser, with every odd input

Each input is a valid one of its parser, changed a few times: bits, pieces cut, doubled and put
elsewhere, numbers in place of others, and what parsers stumble over (depth, thousands of digits,
NaN, marks, quotes that do not end). It is drawn from the seed, the parser's name and its number
alone, so that a finding is repeated by `--only NAME --at NUMBER`.

A parser *fails* where it raises what is no error of ours, where one input takes more than 1 CPU s,
or where the process grows by more than 256 MB. Exit status 1 if one does.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.backends import ReplayBackend, SimBackend
from voltana_ctrl.backends.nvml.giveback import record_from
from voltana_ctrl.backends.nvml.lockfile import read_record
from voltana_ctrl.backends.nvml.setter import SetterPolicy, parse_request
from voltana_ctrl.backends.replay import Recorder
from voltana_ctrl.cli import options
from voltana_ctrl.cli.running import address
from voltana_ctrl.control import StaticController
from voltana_ctrl.engines.endpoints import load_endpoints
from voltana_ctrl.engines.fpm.messages import decode_forward_pass
from voltana_ctrl.engines.in_engine import InEngineSettings
from voltana_ctrl.engines.limits import read_limits, write_limits
from voltana_ctrl.engines.page import read_dcgm_page, read_engine_page, read_histograms
from voltana_ctrl.errors import VoltanaError
from voltana_ctrl.estimate import read_forecast
from voltana_ctrl.fit.actuators import read_actuators
from voltana_ctrl.fit.tables import read_table
from voltana_ctrl.live.messages import decode_orders, decode_report, encode_orders, encode_report
from voltana_ctrl.live.orders import Orders, Report
from voltana_ctrl.live.pod_power import annotated_limit_w
from voltana_ctrl.live.state import StateFile
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.machine.pods import read_pods
from voltana_ctrl.router.body import BadBody, read_request, usage_of
from voltana_ctrl.router.dialects import kv_transfer_params
from voltana_ctrl.router.events import EventReader
from voltana_ctrl.savings.blocks import read_blocks
from voltana_ctrl.sim.arrivals import parse_arrivals
from voltana_ctrl.sim.faults import read_faults
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.textfile import json_value
from voltana_ctrl.types import Belief, FleetState, Observation, Order, PowerBudget, Role
from voltana_ctrl.types.steps import Steps

PROFILE = "a100-sxm-80gb/llama-3.1-8b"
#: What a parser may answer with. A body's own error is told to the client in words.
OURS = (VoltanaError, BadBody)
MOST_CPU_S, MOST_BYTES = 1.0, 256 << 20
MOST_INPUT_BYTES = 1 << 16
_ROOM_BYTES, _GIVE_UP_S = 2 << 30, 10.0
_NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?")
#: What parsers stumble over.
ODD = (
    b"9" * 5000, b"-1", b"0", b"1e400", b"-1e400", b"1e308", b"1e-320", b"NaN", b"nan", b"Infinity",
    b"-inf", b"18446744073709551616", b"9223372036854775808", b"0x" + b"f" * 4000, b"1_0",
    b"[" * 3000, b'{"a":' * 1500, b"[[" * 200 + b"]]" * 200, b"a." * 1500, b"\x00", b"\xff\xfe",
    b"\xef\xbb\xbf", "\u0661\u0662".encode(), b"\xed\xa0\x80", b"\\u0000", b"\\ud800", b"true",
    b"null", b"[]", b"{}", b'"', b"'", b'"""', b"'''", b"\\", b"\n", b"\r", b"\x85", b",,,,", b";",
    b"\t", b"=", b"#", b":", b"{", b"}", b"[", b"]", b"(", b" " * 300, b"x" * 3000, b"../../../etc",
    b"%s%n", b"1970-01-01T00:00:00+99:99", b"9999-12-31 23:59:59.999999", b"0001-01-01 00:00:00",
    b"\x1f\x8b\x08\x00", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PAR1", b"\xc1",
    b"\xdf" * 9,
)  # fmt: skip


@dataclass(frozen=True)
class Parser:
    """One place where foreign bytes become values."""

    name: str
    take: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    #: Of the inputs, against the others: more where one costs less.
    weight: float = 1.0


@dataclass
class Findings:
    """What came of so many inputs."""

    inputs: int = 0
    refused: int = 0
    slowest_cpu_s: float = 0.0
    slowest: str = ""
    grown_bytes: int = 0
    failures: dict[str, tuple[str, int, bytes]] = field(default_factory=dict)
    times: Counter = field(default_factory=Counter)

    @property
    def failed(self) -> bool:
        return bool(self.failures) or self.grown_bytes > MOST_BYTES


def mutated(parser: Parser, seed: int, number: int) -> bytes:
    """Input number so and so of a parser."""
    rng = random.Random(f"{seed}/{parser.name}/{number}")
    data = bytearray(rng.choice(parser.seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        at = rng.randrange(len(data) + 1)
        until = min(len(data), at + rng.choice((1, 1, 2, 8, 40, 400)))
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:until]
        elif kind == 2:
            data[at:at] = data[at:until] * rng.choice((1, 1, 2, 50))
        elif kind == 3:
            piece = data[at:until]
            del data[at:until]
            to = rng.randrange(len(data) + 1)
            data[to:to] = piece
        elif kind == 4:
            data[at:at] = rng.choice(ODD)
        elif kind in (5, 6):
            numbers = list(_NUMBER.finditer(data))
            if numbers:
                found = rng.choice(numbers)
                told = rng.choice(ODD) if kind == 5 else str(rng.randint(-9, 10**9)).encode()
                data[found.start() : found.end()] = told
        elif kind == 7:
            other = rng.choice(parser.seeds)
            data[at:until] = other[rng.randrange(len(other) + 1) :][:400]
        else:
            del data[at:]
        del data[MOST_INPUT_BYTES:]
    return bytes(data)


def _text(take: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: take(data.decode("utf-8", errors="replace"))


def _file(folder: Path, suffix: str, take: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = folder / f"input{suffix}"

    def through_a_file(data: bytes) -> object:
        path.write_bytes(data)
        return take(path)

    return through_a_file


def _events(data: bytes) -> object:
    reader, found = EventReader(event_bytes=4096), []
    for begin in range(0, len(data), 100):
        try:
            found += reader.take(data[begin : begin + 100])
        except ValueError as error:
            if "an event is longer" not in str(error):
                raise
            break
    return [reader.is_usage(event) for event in found]


def parsers(folder: Path) -> list[Parser]:
    """Every parser, with inputs that it takes."""
    profile = load_profile(PROFILE)
    fleet = FleetSpec.parse("1P1D", profile)
    instance = f'[[instance]]\nrole = "{{}}"\nprofile = "{PROFILE}"\ncount = 1\n'
    engine = 'engine = {{ kind = "vllm", url = "http://10.0.0.{}:8000", gpus = ["GPU-1"] }}\n'
    fleet_file = "".join(instance.format(role) for role in ("prefill", "decode"))
    fleet_file += "clocks_mhz = [210, 705.0, 1410]\nidle_w = 60.0\nwake_s = 1e1\n"
    depths_file = "".join(
        f'[[instance]]\nrole = "{role}"\nprofile = "{PROFILE}"\nroles = ["prefill", "decode"]\n'
        "turn_s = 0.1\nrest_of_server_w = 100\nparked = {power_w = 20, wake_s = 5.0, wake_j = 9}\n"
        "off = {power_w = 5.0, wake_s = 60, wake_j = 1e3, enter_s = 2}\n"
        for role in ("prefill", "decode")
    )
    engines_file = "".join(
        instance.format(role) + engine.format(k) for k, role in enumerate(("prefill", "decode"))
    )
    profiles = Path(sys.modules["voltana_ctrl"].__file__).parent / "profiles" / "data"
    report = Report(kind="node", sender="n0", start="a", number=3, ids=("decode-0",),
                    observation=Observation(state=FleetState.idle(1)))  # fmt: skip
    order = Order(floor_mhz=705.0, ceiling_mhz=1410.0, announced=((5.0, 900.0),), delay_s=0.02,
                  itl_margin_frac=0.1, admits=("batch",), role=Role.DECODE, depth="off",
                  alone_mhz=1410.0)  # fmt: skip
    orders = Orders(start="a", number=0, valid_s=1.0, orders={"decode-0": order})
    write_limits(folder / "limits.json", order)
    limits = (folder / "limits.json").read_bytes()
    log = folder / "log.jsonl"
    workload = make_workload("fixed", rate_req_s=2.0, duration_s=4.0)
    with (
        Recorder(log, fleet) as recorder,
        ControlLoop(SimBackend(fleet, workload=workload), StaticController(fleet, 1005),
                    observers=[recorder]) as loop,
    ):  # fmt: skip
        loop.run(0.3)
    kept = log.read_bytes()
    policy = SetterPolicy(clocks_mhz={"GPU-0": frozenset(range(210, 1411, 15))},
                          uids=frozenset({0}))  # fmt: skip
    lock = b'{"verb": "lock", "gpu": "GPU-0", "lo_mhz": 210, "hi_mhz": 1410}'
    pages = {
        "vllm": b'vllm:num_requests_running{engine="0",model_name="m"} 3.0\n'
        b'vllm:num_requests_waiting{engine="0"} 2\nvllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        b'vllm:prompt_tokens_total{engine="0"} 1e6\nvllm:request_success_total{x="a"} 7\n',
        "sglang": b'sglang:num_running_reqs{tp_rank="0"} 3\nsglang:num_queue_reqs 2\n'
        b"sglang:token_usage 0.5\nsglang:max_total_num_tokens 1000\n",
        "dynamo": b'dynamo_component_inflight_requests{worker_id="1f"} 3\n'
        b'dynamo_work_handler_queue_depth{worker_id="1f"} 2\n'
        b'dynamo_frontend_worker_active_decode_blocks{worker_id="31"} 10\n'
        b"dynamo_frontend_model_kv_cache_block_size 16\n",
        "trtllm": b'{"total_energy_j": 12.5}\ntrtllm_kv_cache_utilization 0.5\n',
    }
    body = json.dumps({
        "model": "m", "prompt": [1, 2, 3], "max_tokens": 16, "stream": True, "n": 2, "best_of": 2,
        "stream_options": {"include_usage": False}, "logprobs": 1, "kv_transfer_params": {},
        "nvext": {"backend_instance_id": 7}, "temperature": 0.5,
    }).encode()  # fmt: skip
    chat = json.dumps({
        "messages": [{"role": "user", "content": "hi"},
                     {"role": "user", "content": [{"type": "text", "text": "yo"}]}],
        "max_completion_tokens": 5, "tools": [{"type": "function", "function": {"name": "f"}}],
    }).encode()  # fmt: skip
    usage = b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}'
    stream = (
        b'data: {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}\n\n'
        b'data: {"choices": [{"index": 0, "text": " a"}]}\n\n: ping\n\ndata: ' + usage
        + b'\n\ndata: {"error": {"message": "x", "code": 500}}\n\ndata: [DONE]\n\n'
    )  # fmt: skip
    responses = b'{"model": "m", "input": [{"role": "user", "content": "hi"}], "stream": true,' \
                b' "max_output_tokens": 4, "previous_response_id": "r"}'  # fmt: skip
    messages = b'{"model": "m", "max_tokens": 4, "system": "s", "messages": [{"role": "user",' \
               b' "content": [{"type": "text", "text": "hi"}]}]}'  # fmt: skip
    classes = b"arrival_s,prompt_tok,output_tok,class,deadline_s\n0.5,100,20,chat,\n" \
              b"1.5,200,10,batch,600\n2,7,7,batch,1e3\n"  # fmt: skip
    histograms = b"".join(
        b'vllm:time_to_first_token_seconds_bucket{engine="0",le="%s"} %d\n' % pair
        for pair in ((b"0.1", 1), (b"0.5", 4), (b"+Inf", 5))
    ) + b'vllm:time_to_first_token_seconds_count{engine="0"} 5\n' \
        b'vllm:time_to_first_token_seconds_sum{engine="0"} 1.5\n'  # fmt: skip
    actuators = b"phase,freq_mhz,batch_req,asked_tok,kv_tok,wall_s,wall_se_s,energy_j,power_se_w," \
                b"set_power_cap_w\ndecode,1410,8,512,4300,0.02,1e-5,5.0,0.5,\n" \
                b"decode,1410,8,512,4300,0.021,1e-5,4.2,0.5,200\n"  # fmt: skip
    pods = json.dumps({"items": [{
        "metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": {"containers": [{
            "name": "vllm", "command": ["vllm", "serve", "m"], "args": ["--port", "8000"],
            "ports": [{"containerPort": 8000}], "env": [{"name": "A", "value": "b"}],
        }]}, "status": {"podIP": "10.0.0.1", "phase": "Running"},
    }]}).encode()  # fmt: skip
    StateFile(folder / "state.json", fleet).write(
        Belief.of_profiles(fleet, margin_frac=(0.02, 0.1), delay_s=0.02)
    )
    state = (folder / "state.json").read_bytes()
    azure = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n" \
            b"2023-11-16 18:15:50.68,396,109\n2023-11-16 18:15:51,20,7\n"  # fmt: skip
    table = b"arrival_s,prompt_tok,output_tok\n0.5,100,20\n1.5,200,10\n2,7,7\n"
    mooncake = b"".join(
        b'{"timestamp": %d, "input_length": 1100, "output_length": 20, "hash_ids": [0, %d, 9]}\n'
        % (3000 * k, k) for k in range(4)
    )  # fmt: skip
    bench = b'{"input_lens": [10, 20], "output_lens": [5, 6], "start_times": [0.0, 1.0],' \
            b' "request_rate": 2.0, "max_concurrency": 4}'  # fmt: skip
    rows = b"phase,freq_mhz,batch_req,kv_tok,prefill_tok,wall_ms,power_w\n" \
           b"decode,1410,8,1536,0,45.1,261\nprefill,1005,1,0,512,60,300\n" \
           b"idle,1410,0,0,0,1000,60\n"  # fmt: skip
    import msgpack

    fpm = msgpack.packb({
        "version": 1, "wall_time": 0.02, "counter_id": 7, "worker_id": "a", "dp_rank": 0,
        "scheduled_requests": {"num_decode_requests": 3, "sum_decode_kv_tokens": 900},
        "queued_requests": {"num_prefill_requests": 1},
    })  # fmt: skip
    record = b'{"kind": "gpu", "uuid": "GPU-0", "library": null, "clock": true, "memory": false,' \
             b' "restore_lock_mhz": [210, 900], "power_cap_w": 300.0}'  # fmt: skip
    settings_file = f'mode = "act"\nprofile = "{PROFILE}"\nslo = "ttft=0.6,itl=0.06"\n' \
                    'gpus = ["GPU-1"]\nrole = "decode"\nlimits_uid = 5\n'  # fmt: skip

    def page(kind: str) -> Callable[[bytes], object]:
        return _text(lambda text: read_engine_page(kind, text, worker_id=31))

    def of_path(suffix: str, take: Callable[[Path], object]) -> Callable[[bytes], object]:
        return _file(folder, suffix, take)

    def environment(text: str) -> object:
        names = ("SLO", "ROLE", "GPUS", "LIMITS_UID", "MODE", "POLICY")
        told = dict(zip(names, text.split("\n"), strict=False))
        return InEngineSettings.read({f"VOLTANA_CTRL_{k}": v for k, v in told.items()})

    def learnt(data: bytes) -> object:
        told = json_value(data, "state")
        if isinstance(told, dict) and "learnt" in told:  # else nearly all end at the checksum
            text = json.dumps(told["learnt"], sort_keys=True).encode()
            data = json.dumps({**told, "sha256": hashlib.sha256(text).hexdigest()}).encode()
        return StateFile(folder / "state.json", fleet)._parsed(data)

    def locked(path: Path) -> object:
        with path.open("rb") as file:
            return read_record(file.fileno())

    def configured(path: Path) -> object:
        return InEngineSettings.read({"VOLTANA_CTRL_CONFIG": str(path)})

    return [
        Parser("fleet text", _text(lambda text: FleetSpec.parse(text, profile)),
               (b"2P2D", b"4C", b"1P3D"), 0.5),
        Parser("fleet file", of_path(".toml", lambda path: FleetSpec.from_toml(path, _profile)),
               (fleet_file.encode(), depths_file.encode()), 0.5),
        Parser("engines file", of_path(".toml", load_endpoints), (engines_file.encode(),), 0.1),
        Parser("faults", of_path(".toml", read_faults),
               (b'[[failure]]\ninstance = "d"\nfrom_s = 1.0\nuntil_s = 2.0\n[[slowdown]]\n'
                b'instance = "d"\nslow_frac = 1.5\nfrom_s = 1\n[[clock_clamp]]\ninstance = "d"\n'
                b"clamp_mhz = 600\nfrom_s = 1\n",)),
        Parser("profile", of_path(".toml", load_profile),
               tuple(path.read_bytes() for path in sorted(profiles.glob("*/*.toml"))[:4]), 0.1),
        Parser("slo", _text(Slo.parse), (b"ttft=0.6,itl=0.06,attainment=0.99",), 2),
        Parser("budget", _text(PowerBudget.parse), (b"0:1200,60:840", b"900"), 2),
        Parser("arrivals", _text(parse_arrivals),
               (b"gamma:cv=3", b"mmpp:high_s=5,low_s=15,low_rate_frac=0.2", b"diurnal"), 2),
        Parser("numbers", _text(lambda text: (options.numbers("rate", text))), (b"10,20,35.5",), 2),
        Parser("whole numbers", _text(lambda text: options.whole("seed", text)), (b"10,20",), 2),
        Parser("ladder", _text(options.ladder_mhz), (b"210:1410:15",), 2),
        Parser("address", _text(lambda text: address("metrics", text)),
               (b"127.0.0.1:8791", b"[::1]:80"), 2),
        Parser("trace", of_path(".csv", lambda path: read_trace(path, skip_bad_rows=False)),
               (azure, table, classes, mooncake, bench, gzip.compress(table)), 2),
        Parser("trace, bad rows skipped",
               of_path(".csv", lambda path: read_trace(path, skip_bad_rows=True)),
               (azure, table, classes, mooncake, bench, gzip.compress(azure)), 2),
        Parser("iteration table", of_path(".csv", read_table), (rows, gzip.compress(rows)), 1),
        Parser("log, replayed", of_path(".jsonl", ReplayBackend), (kept,), 0.2),
        Parser("log, for savings", of_path(".jsonl", lambda path: read_blocks([path])),
               (kept,), 0.2),
        Parser("report", lambda data: decode_report(data, fleet),
               (encode_report(report, fleet),), 2),
        Parser("orders", lambda data: decode_orders(data, fleet),
               (encode_orders(orders, fleet),), 2),
        Parser("order", lambda data: Order.parse(json_value(data, "order")),
               (json.dumps(order.plain()).encode(),), 2),
        Parser("limits", of_path(".json", read_limits), (limits,), 1),
        *(Parser(f"page of {kind}", page(kind), (text,), 1) for kind, text in pages.items()),
        Parser("page of DCGM", _text(read_dcgm_page),
               (b'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-1"} 2500\n'
                b'DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-1",GPU_I_ID="1"} 1410\n',), 1),
        Parser("forward pass", lambda data: decode_forward_pass([b"", bytes(8), data]), (fpm,), 3),
        *(Parser(f"body, {kind}", lambda data, kind=kind: read_request(data, kind=kind),
                 (body, chat), 2) for kind in ("plain", "vllm", "sglang", "dynamo")),
        Parser("chat body", lambda data: read_request(data, path="/v1/chat/completions"),
               (chat,), 2),
        Parser("usage", usage_of, (usage,), 2),
        Parser("hand-over", kv_transfer_params,
               (b'{"kv_transfer_params": {"remote_host": "h", "remote_port": 5}}',), 2),
        Parser("events", _events, (stream,), 2),
        Parser("setter", lambda data: parse_request(data, policy),
               (lock, b'{"verb": "reset", "gpu": "GPU-0"}'), 3),
        Parser("give-back record", lambda data: record_from(json_value(data, "record")),
               (record,), 2),
        Parser("settings file in an engine", of_path(".toml", configured),
               (settings_file.encode(),), 1),
        Parser("settings in its environment", _text(environment),
               (b"ttft=0.6,itl=0.06\ndecode\nGPU-1 GPU-2\n1000\nobserve\nmpc",), 1),
        Parser("state", learnt, (state,), 1),
        Parser("lock file", of_path(".lock", locked),
               (b'{"owner": {"pid": 7, "command": "x"}, "give_back": ' + record + b"}",), 1),
        Parser("forecast", of_path(".csv", read_forecast), (b"t_s,req_s\n0,10\n100,30\n",), 1),
        Parser("price", _text(Steps.parse), (b"0:0.20,3600:0.40", b"0.3"), 1),
        Parser("budget file", of_path(".csv", lambda path: PowerBudget.parse(str(path))),
               (b"from_s,limit_w\n0,1200\n60,840\n",), 1),
        Parser("rate steps", _text(RateSteps.parse), (b"0:10,100:60,200:5",), 1),
        Parser("pairs", _text(lambda text: options.pairs("gpu-power-limit", [text])),
               (b"GPU-1=300", b"300"), 1),
        Parser("histograms", _text(lambda text: read_histograms("vllm", text)), (histograms,), 1),
        Parser("actuator table", of_path(".csv", read_actuators), (actuators,), 0.5),
        Parser("pods", of_path(".json", lambda path: read_pods(str(path))), (pods,), 1),
        Parser("responses body", lambda data: read_request(data, path="/v1/responses"),
               (responses,), 1),
        Parser("messages body", lambda data: read_request(data, path="/v1/messages"),
               (messages,), 1),
        Parser("pod annotations", _text(annotated_limit_w),
               (b'app="x"\ndynamo.nvidia.com/gpu-power-limit="300"\n',), 1),
    ]  # fmt: skip


def _profile(name: str):
    """Read each profile of ours once: fleets are tried, not profiles."""
    if name not in _PROFILES:
        _PROFILES[name] = load_profile(name)
    return _PROFILES[name]


_PROFILES: dict = {}


def feed(parser: Parser, data: bytes, label: str, findings: Findings, number: int) -> None:
    """Give one input to a parser, and keep what is odd about its answer."""
    begin_s = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, _GIVE_UP_S)
    try:
        parser.take(data)
    except OURS:
        findings.refused += 1
    except Exception as error:  # noqa: BLE001  what is looked for
        ours = [one for one in traceback.extract_tb(error.__traceback__)
                if "voltana_ctrl" in one.filename]  # fmt: skip
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        found = f"{parser.name}: {type(error).__name__} at {where}"
        findings.times[found] += 1
        findings.failures.setdefault(found, (str(error)[:200], number, data))
    spent_s = time.process_time() - begin_s
    findings.inputs += 1
    if spent_s > findings.slowest_cpu_s:
        findings.slowest_cpu_s, findings.slowest = spent_s, label
    if spent_s > MOST_CPU_S:
        findings.failures.setdefault(f"{parser.name}: {spent_s:.1f} CPU s", ("", number, data))


def fuzz(inputs: int, seed: int, *, only: str = "", at: int | None = None, report=None) -> Findings:
    """Feed all parsers, and count."""
    findings = Findings()
    with (
        tempfile.TemporaryDirectory(dir=_memory()) as made,
        warnings.catch_warnings(),
        contextlib.ExitStack() as limits,
    ):
        warnings.simplefilter("ignore")
        chosen = [one for one in parsers(Path(made)) if only in one.name]
        for parser in chosen:
            for data in parser.seeds:
                with contextlib.suppress(*OURS):
                    parser.take(data)
        idle_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = sum(parser.weight for parser in chosen)
        limits.enter_context(_limited((idle_kb << 10) + _ROOM_BYTES))
        for parser in chosen:
            begin_s, before = time.process_time(), findings.refused
            share = max(1, round(inputs * parser.weight / total))
            for number in range(share) if at is None else (at,):
                data = mutated(parser, seed, number)
                feed(parser, data, f"{parser.name} {number}", findings, number)
            if report is not None:
                refused = (findings.refused - before) / share
                report(parser.name, share, refused, time.process_time() - begin_s)
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle_kb
    findings.grown_bytes = grown_kb << 10
    return findings


@contextlib.contextmanager
def _limited(most_bytes: int):
    """Let what would take the machine's memory, or go on for ever, raise instead."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {_GIVE_UP_S:g} CPU s")

    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, handler)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(arguments: list[str] | None = None) -> int:
    """Feed, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only parsers whose name has this in it")
    parser.add_argument("--at", type=int, help="one input by its number")
    parser.add_argument("--show", action="store_true", help="print the odd inputs")
    asked = parser.parse_args(arguments)

    def report(name: str, inputs: int, refused: float, cpu_s: float) -> None:
        print(f"{name:32} {inputs:8} {100 * refused:6.1f} % refused {cpu_s:8.1f} CPU s", flush=True)

    found = fuzz(asked.inputs, asked.seed, only=asked.only, at=asked.at, report=report)
    print(
        f"{found.inputs} inputs, {found.refused} refused, {len(found.failures)} kinds of failure;"
        f" slowest {found.slowest_cpu_s:.3f} CPU s ({found.slowest}); grown by"
        f" {found.grown_bytes / 2**20:.0f} MB"
    )
    for name, (text, number, data) in found.failures.items():
        print(f"FAILED {found.times[name]} times: {name}: {text} (number {number})")
        if asked.show:
            print(f"    {data[:300]!r}")
    return int(found.failed)


if __name__ == "__main__":
    sys.exit(main())
