"""An emulated engine over HTTP: the OpenAI API, and vLLM's metrics page."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from voltana_ctrl.engines.emulated.engine import EmulatedEngine
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.serving.asgi import (
    JSON,
    ClientGone,
    JsonErrors,
    Receive,
    Refused,
    Scope,
    Send,
    read_body,
    respond,
)

__all__ = ["EngineApp"]

_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
_TEXT = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)
_BODY_BYTES = 1 << 20
_MOST_TOK = 1_000_000
_BLOCK_TOK = 16
#: Upper edges of vLLM's histograms.
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip


class EngineApp:
    """ASGI application of an emulated engine.

    A prompt of text has as many tokens as words, a list as many as it has items, whether these are
    token ids or texts. Answers are numbers counted up, one a token.

    Prefill and decode are handed over as in vLLM, by ``kv_transfer_params``. With
    ``do_remote_decode`` the answer, if it is no stream, brings the parameters for the decode
    engine, and has as many tokens as asked for. A request with ``do_remote_prefill`` is not
    prefilled again: its first token, which the prefill engine made, comes at once where the profile
    says so, and the rest once its KV cache would be here.

    ``POST /emulate`` with ``slow_frac`` or ``hung`` rehearses a slow or a hung engine, and
    ``GET /emulate`` tells which are in force, and whether the emulation keeps its times.

    The engine iterates only within the lifespan of the application, so that a server must run
    with it, as uvicorn does by default.

    Parameters
    ----------
    engine : EmulatedEngine
        The engine, which is run by this application.
    model : str
        Name of the model, as clients see it.

    Raises
    ------
    ConfigError
        If prometheus-client is not installed.

    Examples
    --------
    >>> import uvicorn
    >>> # where `engine` was made as the example of EmulatedEngine makes one
    >>> uvicorn.run(EngineApp(engine), port=8000)  # doctest: +SKIP
    """

    def __init__(self, engine: EmulatedEngine, *, model: str = "emulated") -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise ConfigError(
                "emulate: prometheus-client is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        self._engine, self._model = engine, model
        self._handle = JsonErrors(self._route, _not_counted)
        self._running: asyncio.Task[None] | None = None
        self._registry = registry = CollectorRegistry()
        named: dict[str, Any] = {"labelnames": ("model_name", "engine"), "registry": registry}
        told = (model, "0")

        def counter(name: str) -> Any:
            return Counter(f"vllm:{name}", name, **named).labels(*told)

        self._gauges = {
            name: Gauge(f"vllm:{name}", name, **named).labels(*told)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        self._prompt_tok, self._output_tok = counter("prompt_tokens"), counter("generation_tokens")
        done = Counter(
            "vllm:request_success", "done", ("model_name", "engine", "finished_reason"),
            registry=registry,
        )  # fmt: skip
        self._done = done.labels(*told, "length")
        self._ttft = Histogram(
            "vllm:time_to_first_token_seconds", "TTFT", buckets=_TTFT_S, **named
        ).labels(*told)
        self._itl = Histogram(
            "vllm:inter_token_latency_seconds", "ITL", buckets=_ITL_S, **named
        ).labels(*told)
        self._tpot = Histogram(
            "vllm:request_time_per_output_token_seconds", "ITL of a request", buckets=_ITL_S,
            **named,
        ).labels(*told)  # fmt: skip
        blocks = engine.instance.kv_capacity_tok // _BLOCK_TOK
        Gauge("vllm:cache_config_info", "cache", ("num_gpu_blocks", "block_size"),
              registry=registry).labels(str(blocks), str(_BLOCK_TOK)).set(1.0)  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan, as ASGI says."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._handle(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._running = asyncio.create_task(self._engine.run())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._running.cancel()
        self._engine.inside.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if method == "POST" and path in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(scope, receive, send)
        elif method == "POST" and path == "/emulate":
            await self._change(scope, receive, send)
        elif method == "GET" and path == "/metrics":
            await respond(send, 200, _TEXT, self.page())
        elif method == "GET" and path == "/emulate":
            late = self._engine.punctuality
            told: dict[str, Any] = {
                "iterations": late.iterations,
                "late": late.late,
                "void": late.void,
                **self._in_force(),
            }
            await respond(send, 200, JSON, json.dumps(told).encode())
        elif method == "GET" and path == "/v1/models":
            told = {"object": "list", "data": [{"id": self._model, "object": "model"}]}
            await respond(send, 200, JSON, json.dumps(told).encode())
        elif method == "GET" and path == "/health":
            await respond(send, 200, JSON, b"{}")
        else:
            raise Refused(404, "not_found_error", "no such path")

    def page(self) -> bytes:
        """Metrics page as it is now, in Prometheus' text format."""
        from prometheus_client import generate_latest

        batch = self._engine.batch
        self._gauges["num_requests_running"].set(len(batch.running))
        self._gauges["num_requests_waiting"].set(batch.queue_req)
        self._gauges["kv_cache_usage_perc"].set(
            batch.kv_tok / self._engine.instance.kv_capacity_tok
        )
        return bytes(generate_latest(self._registry))

    async def _body(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        data = await read_body(scope, receive, limit_bytes=_BODY_BYTES, limit_s=30.0)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refused(400, "invalid_request_error", "expected a JSON object")
        return body

    async def _change(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive)
        slow = body.get("slow_frac", self._engine.slow_frac)
        hung = body.get("hung", self._engine.hung)
        if not set(body) <= {"slow_frac", "hung"}:
            raise Refused(400, "invalid_request_error", "expected slow_frac, hung or both")
        number = isinstance(slow, int | float) and not isinstance(slow, bool)
        if not (number and 0.01 <= slow <= 1000.0):
            raise Refused(400, "invalid_request_error", "slow_frac: expected 0.01 to 1000")
        if not isinstance(hung, bool):
            raise Refused(400, "invalid_request_error", "hung: expected true or false")
        self._engine.slow_frac, self._engine.hung = float(slow), hung
        await respond(send, 200, JSON, json.dumps(self._in_force()).encode())

    def _in_force(self) -> dict[str, Any]:
        return {"slow_frac": self._engine.slow_frac, "hung": self._engine.hung}

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive)
        chat = "chat" in scope["path"]
        prompt_tok = _prompt_tok(body)
        output_tok = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        for name, value in (("prompt", prompt_tok), ("max_tokens", output_tok)):
            if not (isinstance(value, int) and 0 < value <= _MOST_TOK):
                raise Refused(400, "invalid_request_error", f"{name}: expected 1 to {_MOST_TOK}")
        if prompt_tok + output_tok > self._engine.instance.kv_capacity_tok:
            raise Refused(400, "invalid_request_error", "longer than the KV cache")
        params = body.get("kv_transfer_params")
        moved = isinstance(params, dict) and bool(params.get("do_remote_prefill"))
        answer = _Answer(self, body, chat=chat, prompt_tok=prompt_tok, output_tok=output_tok)
        watch = asyncio.ensure_future(_left(receive))
        work = asyncio.ensure_future(answer.give(send, moved=moved))
        try:
            await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            await work
        finally:
            for task in (watch, work):
                task.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)


def _not_counted(_status: int) -> None:
    """Statuses stand in no metric of vLLM's."""


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _prompt_tok(body: dict[str, Any]) -> int:
    """Length of a prompt: token ids, or words."""
    prompt = body.get("prompt")
    if prompt is None:
        messages = body.get("messages")
        texts = [str(one.get("content", "")) for one in messages or () if isinstance(one, dict)]
        return max(1, sum(len(text.split()) for text in texts))
    if isinstance(prompt, list):
        return len(prompt)
    return max(1, len(str(prompt).split()))


class _Answer:
    """One answer, whole or as a stream."""

    def __init__(
        self, app: EngineApp, body: dict[str, Any], *, chat: bool, prompt_tok: int, output_tok: int
    ) -> None:
        self._app, self._engine, self._body, self._chat = app, app._engine, body, chat
        self._prompt_tok, self._output_tok = prompt_tok, output_tok
        self._begin_s = self._first_s = self._last_s = time.monotonic()
        self._base: dict[str, Any] = {
            "id": "cmpl-0",
            "object": ("chat.completion" if chat else "text_completion"),
            "created": int(time.time()),
            "model": app._model,
        }

    async def give(self, send: Send, *, moved: bool) -> None:
        tokens = self._engine.generate(
            prompt_tok=self._prompt_tok, output_tok=self._output_tok, moved=moved
        )
        if self._body.get("stream"):
            await self._stream(send, tokens)
        else:
            async for k in tokens:
                self._count(k)
            await respond(send, 200, JSON, json.dumps(self._whole()).encode())
        self._ended()

    async def _stream(self, send: Send, tokens: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})
        base = {**self._base, "object": "chat.completion.chunk"} if self._chat else self._base
        if self._chat:
            delta = {"role": "assistant", "content": ""}
            await self._event(send, {**base, "choices": [{"index": 0, "delta": delta}]})
        async for k in tokens:
            self._count(k)
            token = {"delta": {"content": f" {k}"}} if self._chat else {"text": f" {k}"}
            reason = "length" if k >= self._output_tok else None
            await self._event(
                send, {**base, "choices": [{"index": 0, **token, "finish_reason": reason}]}
            )
        if (self._body.get("stream_options") or {}).get("include_usage"):
            await self._event(send, {**base, "choices": [], "usage": self._usage()})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _event(self, send: Send, told: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _count(self, k: int) -> None:
        now_s = time.monotonic()
        if k == 1:
            self._first_s = now_s
            self._app._ttft.observe(now_s - self._begin_s)
        else:
            self._app._itl.observe(now_s - self._last_s)
        self._last_s = now_s
        self._app._output_tok.inc()

    def _ended(self) -> None:
        self._app._prompt_tok.inc(self._prompt_tok)
        self._app._done.inc()
        if self._output_tok > 1:
            self._app._tpot.observe((self._last_s - self._first_s) / (self._output_tok - 1))

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tok + self._output_tok
        return {
            "prompt_tokens": self._prompt_tok,
            "completion_tokens": self._output_tok,
            "total_tokens": total,
        }

    def _whole(self) -> dict[str, Any]:
        text = "".join(f" {k + 1}" for k in range(self._output_tok))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        made: dict[str, Any] = {**self._base, "choices": [choice], "usage": self._usage()}
        params = self._body.get("kv_transfer_params")
        if isinstance(params, dict) and params.get("do_remote_decode"):
            made["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": "emulated",
                "remote_block_ids": [1],
                "remote_host": "127.0.0.1",
                "remote_port": 1,
            }
        return made
