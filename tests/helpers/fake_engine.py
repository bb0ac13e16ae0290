"""An OpenAI-compatible engine without a model, whose iterations take what a profile says."""

import asyncio
import json
import time
from dataclasses import dataclass, field

import numpy as np

from tests.helpers.threaded_server import ThreadedServer
from voltana_ctrl.laws.iteration import at_clock, decode_j, decode_s, prefill_j, prefill_s


def dynamic(mhz):
    """Shape of the power over the clock, as the fake driver has it."""
    g = mhz / 1000
    return g * (1 + 0.71 * max(0.0, g - 1.106)) ** 2


@dataclass
class Stream:
    prompt_tok: int
    output_tok: int
    tokens: int = 0
    gone: bool = False
    chunks: asyncio.Queue = field(default_factory=asyncio.Queue)


class FakeEngine(ThreadedServer):
    """Server on the loopback; its clock is the lock of a fake GPU, whose power it drives.

    Iterations end at absolute times, so that what the event loop is late does not add up.
    """

    def __init__(self, profile, gpu=None, *, max_batch=256, tokens_per_chunk=1, extra_tok=0):
        self.profile, self.gpu = profile, gpu
        self.max_batch, self.tokens_per_chunk = max_batch, tokens_per_chunk
        self.extra_tok = extra_tok
        self.capped_mhz = {}  # where a cap held prefill, and decode
        self.requests = 0
        self.fail_after = None  # requests, then status 500
        self.break_after = None  # tokens of a stream, then an error in it
        self.running: list[Stream] = []
        self.waiting: list[Stream] = []

    async def _main(self, ready):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._wake = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        engine = asyncio.create_task(self._iterate())
        ready.set()
        await self._stop.wait()
        engine.cancel()
        server.close()

    async def _serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = [
                int(line.split(":")[1])
                for line in head.splitlines()
                if line.lower().startswith("content-length")
            ]
            body = json.loads(await reader.readexactly(length[0])) if length else {}
            if head.startswith("GET /v1/models"):
                self._answer(writer, 200, json.dumps({"data": [{"id": "fake"}]}))
            else:
                await self._complete(reader, writer, body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(self, writer, status, text=None):
        kind = "application/json" if text is not None else "text/event-stream"
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        head += f"Content-Length: {len(text)}\r\n" if text is not None else ""
        writer.write(f"{head}\r\n{text or ''}".encode())

    async def _complete(self, reader, writer, body):
        self.requests += 1
        if self.fail_after is not None and self.requests > self.fail_after:
            self._answer(writer, 500, '{"error": "CUDA out of memory"}')
            return
        prompt = body["prompt"]
        tok = len(prompt.split() if isinstance(prompt, str) else prompt) + self.extra_tok
        stream = Stream(tok, body["max_tokens"])
        self.waiting.append(stream)
        self._wake.set()
        self._answer(writer, 200)
        left = asyncio.create_task(reader.read(1))  # ends when the client leaves
        try:
            for number in range(stream.output_tok):
                chunk = asyncio.ensure_future(stream.chunks.get())
                await asyncio.wait({chunk, left}, return_when=asyncio.FIRST_COMPLETED)
                if not chunk.done():
                    chunk.cancel()
                    return
                if self.break_after is not None and number >= self.break_after:
                    writer.write(b'data: {"error": {"message": "engine died"}}\n\n')
                    return
                if (number + 1) % self.tokens_per_chunk == 0:
                    self._event(writer, {"choices": [{"text": " a", "finish_reason": None}]})
            usage = {"prompt_tokens": tok, "completion_tokens": stream.output_tok}
            self._event(writer, {"choices": [{"text": "", "finish_reason": "length"}]})
            self._event(writer, {"choices": [], "usage": usage})
            writer.write(b"data: [DONE]\n\n")
        finally:
            stream.gone = True
            left.cancel()

    def _event(self, writer, event):
        writer.write(f"data: {json.dumps(event)}\n\n".encode())

    def _free_mhz(self):
        if self.gpu is None:
            return 1410.0
        return self.gpu.lock_hi_mhz or self.gpu.max_mhz

    def _run(self, time_s, energy_j, *load):
        """Time of an iteration at the clock that the GPU makes of lock and power cap.

        The GPU draws what the profile says at the free clock, and at the one at which a cap held
        it last; between them its power follows the fake driver's law.
        """
        free_mhz = self._free_mhz()
        row = at_clock(self.profile, free_mhz)
        wall_s = float(time_s(row, *load))
        if self.gpu is None:
            return wall_s
        power_w = float(energy_j(row, *load)) / wall_s
        low_mhz = self.capped_mhz.get(time_s, 210.0)
        low = at_clock(self.profile, low_mhz)
        low_w = float(energy_j(low, *load) / time_s(low, *load))
        rise = dynamic(free_mhz) - dynamic(low_mhz)
        self.gpu.dynamic_w = (power_w - low_w) / rise if rise > 0.0 else 0.0
        self.gpu.static_w = power_w - self.gpu.dynamic_w * dynamic(free_mhz)
        self.gpu.util_frac = 1.0
        clock_mhz = self.gpu.clock_mhz
        if clock_mhz == free_mhz:
            return wall_s
        self.capped_mhz[time_s] = clock_mhz
        return float(time_s(at_clock(self.profile, clock_mhz), *load))

    def _rest(self):
        if self.gpu is not None:
            self.gpu.util_frac = 0.0

    async def _iterate(self):
        end_s = 0.0
        self._rest()
        while True:
            self.running = [one for one in self.running if not one.gone]
            self.waiting = [one for one in self.waiting if not one.gone]
            if not (self.running or self.waiting):
                self._rest()
                self._wake.clear()
                await self._wake.wait()
                end_s = time.perf_counter()
                await asyncio.sleep(0.001)  # requests sent together are prefilled together
            room = self.max_batch - len(self.running)
            batch = self.waiting[:room]
            if batch:
                del self.waiting[: len(batch)]
                tok = np.array([one.prompt_tok for one in batch], dtype=float)
                wall_s = self._run(prefill_s, prefill_j, tok.sum(), (tok**2).sum())
                self.running += batch
            else:
                batch = self.running
                kv_tok = sum(one.prompt_tok + one.tokens for one in batch)
                wall_s = self._run(decode_s, decode_j, len(batch), kv_tok)
            end_s = max(end_s + wall_s, time.perf_counter() - 0.05)
            await asyncio.sleep(max(0.0, end_s - time.perf_counter()))
            for one in batch:
                one.tokens += 1
                one.chunks.put_nowait(one.tokens)
                one.gone |= one.tokens >= one.output_tok
