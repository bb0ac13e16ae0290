"""What the router adds: latency and CPU time per request, beside SGLang's MiniLoadBalancer.

    python bench/bench_router.py [--rate 200] [--duration 10] [--streams 1000]
        [--rounds 3] [--minilb PYTHON] [--json FILE]

Mock engines, router and clients are processes of their own on this machine. Requests of 16 tokens,
5 ms apart, go straight to a decode engine, through `voltana-ctrl router` (SGLang's hand-over), and
through MiniLoadBalancer of `sglang-router`, which PYTHON must have installed; without --minilb that
row is left out. Then so many streams run at once. Beside each latency is what it is above the
direct requests of the same round; the last lines compare the least of all rounds, since other work
on the machine only adds. On a busy machine look at the CPU time per request.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS, GAP_S, FIRST_S = 16, 0.005, 0.01
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"mock","choices":'
    b'[{"index":0,"text":" a","logprobs":null,"finish_reason":null}]}\n\n'
)
LATENCIES = ("first_s_p50", "first_s_p99", "total_s_p50", "total_s_p99")
MINILB = """
import sys
from sglang_router.mini_lb import MiniLoadBalancer
from sglang_router.router_args import RouterArgs
port, prefill, *decode = sys.argv[1:]
MiniLoadBalancer(RouterArgs(host="127.0.0.1", port=int(port), pd_disaggregation=True,
    prefill_urls=[(prefill, 8998)], decode_urls=decode, policy="random", mini_lb=True)).start()
"""


def run(main):
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


# Engines


async def engines(ports):
    """Serve the prefill engine on the first port, decode engines on the others."""

    async def serve(reader, writer, tokens):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line[15:])
                body = json.loads(await reader.readexactly(length)) if length else {}
                n, gap_s = min(tokens, body.get("max_tokens", 1)), body.get("gap_s", GAP_S)
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                    b"transfer-encoding: chunked\r\n\r\n"
                )
                await asyncio.sleep(FIRST_S)
                for k in range(n):
                    if k:
                        await asyncio.sleep(gap_s)
                    writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                    await writer.drain()
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    for k, port in enumerate(ports):
        await asyncio.start_server(
            lambda r, w, k=k: serve(r, w, 1 << 20 if k else 1), "127.0.0.1", port, backlog=4096
        )
    await asyncio.Event().wait()


# Clients


class Client:
    """As little as a client can be, so that it is not what is measured."""

    def __init__(self, port, body):
        content = json.dumps(body).encode()
        self.port = port
        self.request = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        self.idle = []
        self.first_s, self.total_s, self.errors = [], [], 0

    async def one(self):
        begin_s = time.perf_counter()
        reader, writer = self.idle.pop() if self.idle else await self.connect()
        try:
            writer.write(self.request)
            head = await reader.readuntil(b"\r\n\r\n")
            told = await reader.readuntil(b"\n\n")
            first_s = time.perf_counter() - begin_s
            rest = await reader.readuntil(b"0\r\n\r\n")
            good = b" 200 " in head[:16] and told.count(EVENT) + rest.count(EVENT) == self.tokens
            self.errors += not good
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            self.errors += 1
            writer.close()
            return
        self.first_s.append(first_s)
        self.total_s.append(time.perf_counter() - begin_s)
        self.idle.append((reader, writer))

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)


async def load(port, rate_req_s, duration_s):
    client = Client(port, {"prompt": [1, 2, 3], "max_tokens": TOKENS, "stream": True})
    client.tokens = TOKENS
    for measured in (False, True):  # the first round warms up
        start_s, tasks = time.perf_counter(), []
        for k in range(int(rate_req_s * (duration_s if measured else 1.0))):
            await asyncio.sleep(max(0.0, start_s + k / rate_req_s - time.perf_counter()))
            tasks.append(asyncio.create_task(client.one()))
        await asyncio.gather(*tasks)
        if not measured:
            client.first_s, client.total_s = [], []
            print("warm", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
    return client


async def many(port, streams, tokens, gap_s):
    body = {"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True, "gap_s": gap_s}
    client = Client(port, body)
    client.tokens = tokens
    await asyncio.gather(*(client.one() for _ in range(streams)))
    return client


# The run


class Process:
    def __init__(self, *command, port, **environment):
        self.port = port
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        until_s = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > until_s or self.process.poll() is not None:
                    raise SystemExit(f"{command[:3]} did not start") from None
                time.sleep(0.1)

    def cpu_s(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def client(*arguments):
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def measure(name, port, rate, duration, process, base):
    asked = client("_load", port, rate, duration)
    asked.stdout.readline()
    before_s = process.cpu_s() if process else 0.0
    asked.stdin.write("\n")
    asked.stdin.flush()
    told = json.loads(asked.stdout.readline())
    asked.wait()
    cpu_s = (process.cpu_s() - before_s) if process else 0.0
    row = {"errors": told["errors"], "requests": len(told["total_s"])}
    row["cpu_ms_req"] = 1e3 * cpu_s / max(1, row["requests"])
    for key in ("first_s", "total_s"):
        for q in (0.5, 0.99):
            row[f"{key}_p{q * 100:.0f}"] = quantile(told[key], q)
    shown = [f"{name:16s} {row['requests']:6d} {row['errors']:3d} {row['cpu_ms_req']:8.2f}"]
    for key in ("first_s", "total_s"):
        for q in ("p50", "p99"):
            value = row[f"{key}_{q}"]
            added = f" (+{1e3 * (value - base[f'{key}_{q}']):.1f})" if base else ""
            shown.append(f"{1e3 * value:6.1f}{added}")
    print("  ".join(shown), flush=True)
    return {"name": name, **row}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--duration", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="cascade")
    parser.add_argument("--minilb", help="Python that has sglang-router")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args()
    ports = []
    holders = []
    for _ in range(5):
        holder = socket.socket()
        holder.bind(("127.0.0.1", 0))
        holders.append(holder)
        ports.append(holder.getsockname()[1])
    for holder in holders:
        holder.close()
    prefill, *decode, ours, theirs = ports
    urls = [f"http://127.0.0.1:{port}" for port in (prefill, *decode)]
    running = []
    try:
        running.append(
            Process(sys.executable, __file__, "_engines", *map(str, ports[:3]), port=prefill)
        )
        router = Process(
            sys.executable, "-m", "voltana_ctrl.cli", "router", "--engine", "sglang",
            "--prefill", f"{urls[0]},8998", "--decode", urls[1], "--decode", urls[2],
            "--port", str(ours), "--policy", given.policy, port=ours,
        )  # fmt: skip
        running.append(router)
        minilb = None
        if given.minilb:
            minilb = Process(given.minilb, "-c", MINILB, str(theirs), *urls, port=theirs)
            running.append(minilb)
        print(f"{given.rate:g} req/s, {TOKENS} tokens {1e3 * GAP_S:g} ms apart; times in ms")
        print("                    n  err  CPU/req  TTFT p50  TTFT p99  total p50  total p99")
        load = (given.rate, given.duration)
        rows, streams = [], []
        for _ in range(given.rounds):
            base = measure("direct", decode[0], *load, None, None)
            rows += [base, measure("router", ours, *load, router, base)]
            if minilb:
                rows.append(measure("MiniLoadBalancer", theirs, *load, minilb, base))
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [row for row in rows if row["name"] == name]
            if name == "direct":
                alone = mine
                continue
            least = [
                1e3 * (min(row[key] for row in mine) - min(row[key] for row in alone))
                for key in LATENCIES
            ]
            cpu_ms = min(row["cpu_ms_req"] for row in mine)
            print(
                f"{name:16s} adds: TTFT p50 {least[0]:.1f}, p99 {least[1]:.1f}; total p50"
                f" {least[2]:.1f}, p99 {least[3]:.1f} ms; CPU {cpu_ms:.2f} ms per request"
            )
        for name, process in (("router", router), ("MiniLoadBalancer", minilb)):
            if process is None:
                continue
            for _ in range(given.rounds):
                before_mb, before_s = process.memory_mb(), process.cpu_s()
                asked = client("_many", process.port, given.streams, 50, 0.1)
                told = json.loads(asked.stdout.readline())
                asked.wait()
                grown_mb = process.memory_mb() - before_mb
                streams.append({"name": name, "errors": told["errors"], "grown_mb": grown_mb})
                print(
                    f"{name:16s} {given.streams} streams at once: {told['errors']} errors,"
                    f" {before_mb:.0f} -> {process.memory_mb():.0f} MB,"
                    f" {1e3 * (process.cpu_s() - before_s) / given.streams:.1f} ms CPU per stream"
                    " of 50 tokens",
                    flush=True,
                )
        if given.json:
            given.json.write_text(json.dumps({"load": rows, "streams": streams}))
    finally:
        for process in reversed(running):
            process.end()


if __name__ == "__main__":
    mode, *rest = sys.argv[1:] or [""]
    if mode == "_engines":
        run(engines([int(port) for port in rest]))
    elif mode in ("_load", "_many"):
        numbers = [float(text) for text in rest]
        made = (
            load(int(numbers[0]), numbers[1], numbers[2])
            if mode == "_load"
            else many(int(numbers[0]), int(numbers[1]), int(numbers[2]), numbers[3])
        )
        done = run(made)
        print(json.dumps({"first_s": done.first_s, "total_s": done.total_s, "errors": done.errors}))
    else:
        main()
