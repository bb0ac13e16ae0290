"""What the plugin costs a real vLLM: saturation throughput with and without it, at the same time.

    tests/story/vllm_env.sh FOLDER                      # vLLM on a CPU, once
    VOLTANA_VLLM_ENV=FOLDER python -m bench.plugin_cost --out plugin.json
    VOLTANA_VLLM_ENV=FOLDER python -m bench.plugin_cost --width 1536   # iterations of some 15 ms
    VOLTANA_VLLM_ENV=FOLDER python -m bench.plugin_cost --null         # two engines without it

Two engines of one model, one as vLLM is and one with all of ours (scheduler class that acts on a
fake driver, orders in a file that are renewed, forward-pass metrics to one subscriber), share one
core and are kept saturated together: more requests at once than fit a batch. So whatever else the
machine does meets both alike, which it does not when they take turns. An engine is one process, as
on one GPU: between processes vLLM polls, and processor time then says nothing.

Told are the medians over intervals of some seconds of the ratios of tokens made in the same time
and of processor time per iteration: of all threads, and of the one that schedules and computes,
whose time is what bounds the throughput of an engine that has cores for the others. Their 95 %
intervals assume nothing of their distribution.
"""

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from scipy.stats import quantile_test

from tests.helpers.fake_gpus import machine
from tests.story.dynamo_stack import free_ports
from tests.story.vllm_stack import environment_folder, install_package, make_model
from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.reader import FpmReader
from voltana_ctrl.engines.limits import write_limits
from voltana_ctrl.types import Order

PROFILE = "a100-sxm-80gb/llama-3.1-8b"
#: Runs in vLLM's environment. Told at the end of each interval: iterations, tokens, and processor
#: seconds, of all threads and of the one that schedules and computes.
PROGRAM = """
import itertools, json, random, sys, time
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind
model, interval_s, scheduler = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
engine = LLMEngine.from_engine_args(EngineArgs(
    model=model, load_format="dummy", enforce_eager=True, dtype="float32", max_model_len=1024,
    max_num_seqs=16, num_gpu_blocks_override=64, disable_log_stats=False,
    scheduler_cls=scheduler[0] if scheduler else None))
draw, number = random.Random(0), itertools.count()
print("ready", flush=True)
sys.stdin.readline()
iterations = tok = 0
next_s = time.monotonic()
while True:
    while engine.get_num_unfinished_requests() < 32:  # 16 fit a batch
        prompt = [draw.randrange(3, 500) for _ in range(32)]
        ends = SamplingParams(max_tokens=draw.randint(64, 192), ignore_eos=True, temperature=0.0,
                              output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(next(number)), {"prompt_token_ids": prompt}, ends)
    tok += sum(len(one.outputs[0].token_ids) for one in engine.step())
    iterations += 1
    if time.monotonic() >= next_s:
        print(json.dumps([iterations, tok, time.process_time(), time.thread_time()]), flush=True)
        next_s += interval_s
"""


@contextlib.contextmanager
def followed(path, fpm):
    """The node's agent, as far as the engine notices it: orders renewed, messages read."""
    fleet = FleetSpec.parse("1C", load_profile(PROFILE))
    engine = Endpoint(instance=fleet.ids[0], kind="vllm", url="http://127.0.0.1:1", fpm=fpm)
    reader = FpmReader(fleet, [engine])
    over = threading.Event()

    def follow():
        k = 0
        while not over.wait(0.1):
            k += 1
            write_limits(path, Order(floor_mhz=210.0 + 15.0 * (k // 10 % 8), ceiling_mhz=1410.0))
            reader.read(time.monotonic())

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        reader.close()


class Engine:
    """Started by ``with``, pinned to a core; computes once told to `go`."""

    def __init__(self, venv, log, core, *arguments, **variables):
        self._log, self._core = log, core
        self._command = [venv / "bin" / "python", "-c", PROGRAM, *arguments]
        self._environ = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **variables,
        }  # fmt: skip

    def __enter__(self):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})  # children inherit it
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self._command],
                env=self._environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip
        os.sched_setaffinity(0, before)
        return self

    def line(self, starts):
        for line in self.process.stdout:  # vLLM says things, too
            if line.startswith(starts):
                return line
        raise RuntimeError(self._log.read_text(errors="replace")[-3000:])

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()


def told(did):
    """Medians over the intervals of the ratios, with their intervals, and of what makes them."""
    iterations, tok, spent_s, main_s = np.moveaxis(did, -1, 0)
    figures = {}
    for name, value in (
        ("tok", tok),
        ("cpu_ms_per_iteration", 1e3 * spent_s / iterations),
        ("engine_thread_ms_per_iteration", 1e3 * main_s / iterations),
    ):
        plain, ours = value.T
        interval = quantile_test(ours / plain, q=1.0).confidence_interval(0.95)
        figures[name] = {
            "plain": float(np.median(plain)),
            "ours": float(np.median(ours)),
            "more_frac": float(np.median(ours / plain)) - 1.0,
            "interval_frac": [float(interval.low) - 1.0, float(interval.high) - 1.0],
        }
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--intervals", type=int, default=40)
    parser.add_argument("--interval-s", type=float, default=5.0)
    parser.add_argument("--width", type=int, default=128, help="of the model's two layers")
    parser.add_argument("--null", action="store_true", help="both engines without the plugin")
    parser.add_argument("--core", type=int, default=0, help="on which both run")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    venv = environment_folder()
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        fake = ending.enter_context(machine(folder, gpus=1))
        site = install_package(venv, folder / "site", folder / "tree")
        model = make_model(venv, folder / "model", args.width)
        (port,) = free_ports(1)
        fpm, limits = f"tcp://127.0.0.1:{port}", folder / "orders" / "both-0.json"
        limits.parent.mkdir(mode=0o755)
        # Without the path of its library vLLM would take this machine for one with GPUs.
        state = {k: v for k, v in fake.env.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
        inside = {
            "MODE": "act", "PROFILE": PROFILE, "SLO": "ttft=0.6,itl=0.06", "FPM": fpm,
            "GPUS": fake.uuids[0], "LOCK_DIR": str(folder), "LIBRARY": str(fake.library),
            "LIMITS": str(limits),
        }  # fmt: skip
        inside = {f"VOLTANA_CTRL_{key}": value for key, value in inside.items()}
        alike = (model, args.interval_s)
        plain = Engine(venv, folder / "plain.log", args.core, *alike)
        scheduler = "voltana_ctrl.engines.vllm.GovernedScheduler"
        if args.null:
            ours = Engine(venv, folder / "ours.log", args.core, *alike)
        else:
            ours = Engine(venv, folder / "ours.log", args.core, *alike, scheduler,
                          PYTHONPATH=str(site), **state, **inside)  # fmt: skip
            ending.enter_context(followed(limits, fpm))
        engines = [ending.enter_context(one) for one in (plain, ours)]
        for one in engines:
            one.line("ready")
        for one in engines:
            one.go()
        # Each tells at the ends of its own intervals, which begin together.
        stood = [[json.loads(one.line("[")) for one in engines] for _ in range(args.intervals + 3)]
        sets = fake.gpus[0].sets
    did = np.diff(np.array(stood)[2:], axis=0)
    result = {**vars(args), "out": None, "clock_sets": sets, **told(did)}
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result | {"did": did.tolist()}))


if __name__ == "__main__":
    main()
