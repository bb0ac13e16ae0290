"""Engines for the router: OpenAI-compatible servers without a model that do as they are told.

Each checks what its kind must be sent, notes every request and its end, and can be made to
refuse, to fail, to die in the middle, to wait.
"""

import asyncio
import contextlib
import json
import threading
import time

import pytest

from tests.helpers.threaded_server import ThreadedServer
from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.router.server import proxy_server

pytest.importorskip("aiohttp", reason="the router needs aiohttp")

PROFILE = "a100-sxm-80gb/llama-3.1-8b"


class MockEngine(ThreadedServer):
    """Streams `tokens` tokens, `gap_s` apart; runs in a thread of its own."""

    host, ssl = "127.0.0.1", None

    @property
    def url(self):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * bool(self.ssl)}://{host}:{self.port}"

    def __init__(self, name="e0", *, tokens=4, gap_s=0.0, first_s=0.0):
        self.name, self.tokens, self.gap_s, self.first_s = name, tokens, gap_s, first_s
        self.tok_per_event = 1
        self.prompt_tok = 7  # what it counts of any prompt
        self.tells_usage = True  # where it is asked to
        self.refuses = ()  # fields that it does not know: status 400
        self.health = 200  # status of its page of that name
        self.pings_s = None  # between comments before the first token
        self.seen = []  # (path, headers, body)
        self.answered = self.cancelled = self.streaming = 0
        self.fail = []  # what the next requests meet, see `_trouble`
        self.cached_tok = None  # told as found in the prefix cache
        self._chunks = True
        self._lock = threading.Lock()

    @property
    def bodies(self):
        return [body for _, _, body in self.seen]

    async def _main(self, ready):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._writers = set()
        server = await asyncio.start_server(
            self._serve, self.host, self.port, backlog=2048, ssl=self.ssl
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, EOFError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {}
                for line in filter(None, lines):
                    key, _, value = line.partition(":")
                    headers[key.lower()] = value.strip()
                length = int(headers.get("content-length", 0))
                content = await reader.readexactly(length) if length else b""
                method, path, _ = first.split(" ")
                if not await self._one(reader, writer, method, path, headers, content):
                    break
        self._writers.discard(writer)
        writer.close()

    async def _one(self, reader, writer, method, path, headers, content):
        if method == "GET":
            about = {"model_path": "mock", "served_model_name": "mock", "is_generation": True}
            pages = {
                "/version": {"version": "mock"},
                "/v1/models": {"object": "list", "data": [{"id": "mock", "object": "model"}]},
                # What SGLang's routers ask of a worker.
                "/health": {},
                "/server_info": about,
                "/get_server_info": about,
                "/model_info": about,
                "/get_model_info": about,
            }
            found = pages.get(path)
            if path == "/health" and self.health != 200:
                if self.health is None:
                    await self._wait(asyncio.ensure_future(reader.read(1)), 3600.0)
                    return False
                self._whole(writer, self.health, {})
                return True
            self._whole(writer, 404 if found is None else 200, found or {})
            await writer.drain()
            return True
        body = json.loads(content) if content else {}
        with self._lock:
            self.seen.append((path, headers, body))
        trouble = self.fail.pop(0) if self.fail else None
        if trouble == "hang up":
            return False
        unknown = [name for name in self.refuses if name in body]
        if unknown:
            self._whole(writer, 400, {"error": {"message": f"{unknown[0]}: not known"}})
            return True
        if trouble == "half a body until the end":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
            writer.write(b'{"choices": [{"text": " 0"}')
            return False
        if trouble == "an endless body":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"x" * 65536)
                await writer.drain()
            return False
        if isinstance(trouble, int):
            self._whole(writer, trouble, {"error": {"message": f"{self.name} says {trouble}"}})
            return True
        left = asyncio.ensure_future(reader.read(1))  # ends when the router leaves
        try:
            return await self._complete(writer, left, path, body, headers, trouble)
        finally:
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)

    async def _wait(self, left, wait_s):
        """True if the router is still there."""
        if wait_s <= 0.0:
            await asyncio.sleep(0)
            return not left.done()
        await asyncio.wait({left}, timeout=wait_s)
        return not left.done()

    async def _complete(self, writer, left, path, body, headers, trouble):
        asked = body.get("max_tokens")
        n = min(self.tokens, asked) if isinstance(asked, int) and asked > 0 else self.tokens
        wait_s = 3600.0 if trouble == "wait" else self.first_s
        if self.pings_s is None and not await self._wait(left, wait_s):
            self.cancelled += 1
            return False
        if path == "/tokenize":
            self._whole(writer, 200, {"tokens": [1, 2, 3], "count": 3})
            return True
        if not body.get("stream"):
            if not await self._wait(left, self.gap_s * n):
                self.cancelled += 1
                return False
            if trouble == "die in the body":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{")
                return False
            self._whole(writer, 200, self.answer(path, body, headers, n))
            await writer.drain()
            self.answered += 1
            return True
        self._chunks = trouble != "close after two tokens"
        framing = b"transfer-encoding: chunked\r\n" if self._chunks else b"connection: close\r\n"
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"x-engine: %s\r\n%s\r\n" % (self.name.encode(), framing)
        )
        if self.pings_s is not None:
            for _ in range(int(self.first_s / self.pings_s)):
                self._chunk(writer, b": ping\n\n")
                if not await self._wait(left, self.pings_s):
                    self.cancelled += 1
                    return False
        if trouble == "die before the first token":
            return False
        if trouble == "error before the first token":
            self._chunk(writer, b'data: {"error": {"message": "died", "code": 500}}\n\n')
            writer.write(b"0\r\n\r\n")
            return True
        self.streaming += 1
        try:
            for k, event in enumerate(self.events(path, body, headers, n)):
                if trouble == "die after the role" and k == 1:
                    return False
                if trouble == "die after two tokens" and k == 2:
                    return False
                if trouble == "close after two tokens" and k == 2:
                    return False
                if (trouble, k) in {("end after the role", 1), ("end after two tokens", 2)}:
                    break
                if trouble == "abort after two tokens" and k == 2:
                    choice = {"index": 0, "text": "", "finish_reason": "abort"}
                    self._chunk(writer, _event({"choices": [choice]}))
                    self._chunk(writer, b"data: [DONE]\n\n")
                    break
                if trouble == "die in an event" and k == 2:
                    self._chunk(writer, event[:20])
                    await writer.drain()
                    return False
                if trouble == "error after two tokens" and k == 2:
                    # As vLLM says when its engine dies behind its server.
                    self._chunk(writer, b'data: {"error": {"message": "died", "code": 500}}\n\n')
                    self._chunk(writer, b"data: [DONE]\n\n")
                    break
                if k and not await self._wait(left, self.gap_s):
                    self.cancelled += 1
                    return False
                self._chunk(writer, event)
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            self.answered += 1
        finally:
            self.streaming -= 1
        return True

    def _chunk(self, writer, event):
        writer.write(b"%x\r\n%s\r\n" % (len(event), event) if self._chunks else event)

    def _whole(self, writer, status, answer):
        content = json.dumps(answer).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (status, len(content), content)
        )

    def answer(self, path, body, headers, n):
        if path in ("/v1/embeddings", "/v1/responses", "/v1/messages"):
            usage = {"input_tokens": self.prompt_tok, "output_tokens": n}
            if path == "/v1/embeddings":
                usage = {"prompt_tokens": self.prompt_tok, "total_tokens": self.prompt_tok}
            return {"id": "x", "usage": usage}
        text = "".join(f" {k}" for k in range(n))
        choice = {"index": 0, "finish_reason": "length"}
        if "chat" in path:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        made = {
            "id": f"cmpl-{headers.get('x-request-id', 'x')}",
            "object": "chat.completion" if "chat" in path else "text_completion",
            "created": 1,
            "model": "mock",
            "choices": [choice],
            "usage": self.usage(n),
        }
        if (body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            made["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self.name,
                "remote_block_ids": [len(self.seen)],
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
            }
        return made

    def usage(self, n):
        prompt_tok = self.prompt_tok
        usage = {
            "prompt_tokens": prompt_tok, "completion_tokens": n, "total_tokens": prompt_tok + n,
        }  # fmt: skip
        if self.cached_tok is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tok}
        return usage

    def events(self, path, body, headers, n):
        if path == "/v1/responses":
            yield from _responses(n, self.prompt_tok)
            return
        if path == "/v1/messages":
            yield from _messages(n, self.prompt_tok)
            return
        base = {
            "id": f"cmpl-{headers.get('x-request-id', 'x')}",
            "object": "chat.completion.chunk" if "chat" in path else "text_completion",
            "created": 1,
            "model": "mock",
        }
        if "chat" in path:
            delta = {"role": "assistant", "content": ""}
            yield _event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        for k in range(0, n, self.tok_per_event):
            after = min(n, k + self.tok_per_event)
            text = "".join(f" {i}" for i in range(k, after))
            token = {"delta": {"content": text}} if "chat" in path else {"text": text}
            reason = "length" if after == n else None
            yield _event({**base, "choices": [{"index": 0, **token, "finish_reason": reason}]})
        if self.tells_usage and (body.get("stream_options") or {}).get("include_usage"):
            yield _event({**base, "choices": [], "usage": self.usage(n)})
        yield b"data: [DONE]\n\n"


def _event(told):
    return b"data: " + json.dumps(told).encode() + b"\n\n"


def _named(name, told):
    return b"event: " + name.encode() + b"\n" + _event({"type": name, **told})


def _responses(n, prompt_tok):
    yield _named("response.created", {"response": {"usage": None}})
    for k in range(n):
        yield _named("response.output_text.delta", {"delta": f" {k}"})
    usage = {"input_tokens": prompt_tok, "output_tokens": n}
    yield _named("response.completed", {"response": {"usage": usage}})


def _messages(n, prompt_tok):
    yield _named("message_start", {"message": {"usage": {"input_tokens": prompt_tok}}})
    for k in range(n):
        yield _named("content_block_delta", {"delta": {"text": f" {k}"}})
    yield _named("message_delta", {"usage": {"output_tokens": n}})
    yield _named("message_stop", {})


def fleet_of(text):
    return FleetSpec.parse(text, load_profile(PROFILE))


def endpoints_of(fleet, engines, kind="vllm"):
    return [
        Endpoint(
            instance=name,
            kind=kind,
            url=engine if isinstance(engine, str) else engine.url,
            bootstrap_port=8998 + k if kind == "sglang" else None,
            worker_id=100 + k if kind == "dynamo" else None,
        )
        for k, (name, engine) in enumerate(zip(fleet.ids, engines, strict=True))
    ]


@contextlib.contextmanager
def serving(proxy, **options):
    """Run the router in a thread; yields its server, whose `url` is set."""
    server = proxy_server(proxy, port=0, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until_s = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until_s
        assert thread.is_alive()
        time.sleep(0.005)
    scheme = "https" if options.get("tls_cert") else "http"
    server.url = f"{scheme}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
