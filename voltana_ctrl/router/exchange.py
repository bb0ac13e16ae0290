"""One request through the router: sent until its first token comes, then never again."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from voltana_ctrl.router.body import Asked, BadBody, PromptLengths, usage_of
from voltana_ctrl.router.energy import EnergyBook, RequestEnergy
from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.router.limits import ProxyLimits
from voltana_ctrl.router.messages import Answer, Call, RefusedAltered, UpstreamFailed
from voltana_ctrl.router.metrics import RouterMetrics
from voltana_ctrl.router.offload import BodyReader
from voltana_ctrl.router.paths import COMPLETIONS, GENERATING
from voltana_ctrl.router.policy import PolicyRouters
from voltana_ctrl.router.upstream import Upstream
from voltana_ctrl.serving.asgi import (
    ABORT,
    RETRY_AFTER,
    ByteBudget,
    ClientGone,
    Headers,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    error_json,
    header,
    read_body,
    respond,
)
from voltana_ctrl.types import Request

__all__ = ["ENERGY_HEADER", "Exchange", "Services"]

#: Header that tells the energy of a request in its answer. Sent with a request that streams,
#: with the value ``usage``, it asks for the energy in the last usage chunk.
ENERGY_HEADER = "x-voltana-energy"

_LOG = logging.getLogger(__name__)
_ENERGY = ENERGY_HEADER.encode()
_CLIENT_ID = re.compile(rb"[\w.:-]{1,128}\Z")
_EVENT_STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"),)
_STILL_HERE = b": still here\n\n"
# Before an instance is asked a second time.
_PAUSE_S = 0.1
_LEARN_FRAC = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Services:
    """What exchanges share.

    Parameters
    ----------
    routers : PolicyRouters
        Routers that choose instances.
    counts : InFlight
        Requests in flight, by instance.
    energy : EnergyBook
        Energy of requests that have ended.
    metrics : RouterMetrics
        Counts for Prometheus.
    upstream : Upstream
        Connections to the engines.
    limits : ProxyLimits
        What one client may ask.
    keep : bool
        Whether clients may say what otherwise only a router does.
    bodies : BodyReader
        Reads bodies.
    budget : ByteBudget
        Memory for bodies and answers of all requests.
    lengths : PromptLengths
        Guesses the lengths of prompts.
    tok_per_event : dict of int to float
        Mean tokens per event of an instance's streams, by its index, where it told its usage.

    Examples
    --------
    >>> Services.__dataclass_fields__["tok_per_event"].type
    'dict[int, float]'
    """

    routers: PolicyRouters
    counts: InFlight
    energy: EnergyBook
    metrics: RouterMetrics
    upstream: Upstream
    limits: ProxyLimits
    keep: bool
    bodies: BodyReader
    budget: ByteBudget
    lengths: PromptLengths = field(default_factory=PromptLengths)
    tok_per_event: dict[int, float] = field(default_factory=dict)


class Exchange:
    """A request and its answer.

    Parameters
    ----------
    services : Services
        What all exchanges share.
    scope, receive, send
        The request, as ASGI hands it to an application.

    Examples
    --------
    >>> callable(Exchange.run)
    True
    """

    def __init__(self, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        self._services = services
        self._scope, self._receive, self._send = scope, receive, send
        # Ids of clients repeat; an engine may refuse the second, and energies would overwrite
        # each other. Theirs is kept beside ours.
        self._ids = [(b"x-request-id", uuid.uuid4().hex.encode())]
        for name in (b"x-client-request-id", b"x-request-id"):
            given = header(scope["headers"], name)
            if given is not None and _CLIENT_ID.match(given):
                self._ids.append((b"x-client-request-id", given))
                break
        # Counted while its body arrives, too: bodies take memory.
        self._flight = services.counts.begin(self._ids[0][1].decode(), prompt_tok=1)
        self._share = services.budget.share()
        self._asked = Asked(content=b"")
        self._energy: RequestEnergy | None = None
        self._has_started = self._has_ended = False
        self._put_s = math.inf  # since when the client is waited for
        self._looks: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Answer the request.

        Raises
        ------
        Refused
            If there is nothing but an error to tell.
        ClientGone
            If the client left.
        """
        try:
            await self._watched(await self._read())
        finally:
            self._end()
            self._share.release()

    async def _read(self) -> Call:
        services, scope = self._services, self._scope
        content = await read_body(
            scope,
            self._receive,
            limit_bytes=services.limits.body_bytes,
            limit_s=services.limits.body_s,
            share=self._share,
        )
        kind = services.upstream.kind
        try:
            self._asked = await services.bodies.read(
                content, path=scope["path"], kind=kind, keep=services.keep
            )
        except BadBody as bad:
            raise Refused(400, "invalid_request_error", str(bad)) from None
        del content
        size = {"chars": self._asked.chars, "tok": self._asked.tok}
        self._flight.prompt_tok = services.lengths.estimate(**size)
        call = Call(
            path=scope["path"],
            asked=self._asked,
            headers=scope["headers"],
            flight=self._flight,
            share=self._share,
            comment=self._comment,
            client_id=self._ids[-1][1] if len(self._ids) > 1 else None,
        )
        if kind == "vllm" and call.is_completion and call.alone is not None:
            services.metrics.count("decoded_alone", call.alone)
        return call

    async def _watched(self, call: Call) -> None:
        """Answer, unless the client leaves meanwhile; then hang up on the engines at once."""
        task = asyncio.current_task()
        watch = asyncio.ensure_future(self._receive())
        has_left = is_deaf = False

        def leave() -> None:
            nonlocal has_left
            if not has_left:
                has_left = True
                task.cancel()  # type: ignore[union-attr]  # runs in a task

        def hear(done: asyncio.Future[Any]) -> None:
            if not done.cancelled():
                leave()

        def cut_off() -> None:
            nonlocal is_deaf
            is_deaf = True
            leave()

        watch.add_done_callback(hear)
        self._look(cut_off)
        try:
            await self._answer(call)
        except asyncio.CancelledError:
            if not has_left:
                raise
            task.uncancel()  # type: ignore[union-attr]
            self._services.metrics.count("cancelled", by=not is_deaf)
            raise ClientGone from None
        finally:
            watch.remove_done_callback(hear)
            watch.cancel()
            if self._looks is not None:
                self._looks.cancel()

    async def _answer(self, call: Call) -> None:
        deadline_s = asyncio.get_running_loop().time() + self._services.limits.total_s
        try:
            if call.asked.stream:
                answer = await self._begin_alive(call, deadline_s)
            else:
                answer = await self._begin(call, deadline_s)
        except Refused as refused:
            if not self._has_started:
                raise
            # The client has read status 200 and comments.
            await self._end_stream(error_json(refused.status, refused.kind, str(refused)))
            return
        is_told = False
        try:
            if answer.is_whole:
                await self._tell(answer)
                is_told = answer.status == 200
            else:
                # It is never sent again.
                call.asked = replace(call.asked, content=b"", prefill=None)
                self._share.release()
                is_told = await self._stream(call, answer, deadline_s)
        finally:
            answer.close(is_told=is_told)

    async def _begin_alive(self, call: Call, deadline_s: float) -> Answer:
        """Send a request that streams; its client hears from us while it waits."""
        begun = asyncio.ensure_future(self._begin(call, deadline_s))
        try:
            while not (await asyncio.wait({begun}, timeout=self._services.limits.silence_s))[0]:
                await self._comment(_EVENT_STREAM, _STILL_HERE)
            return begun.result()
        except BaseException:
            begun.cancel()
            done = await asyncio.gather(begun, return_exceptions=True)
            if isinstance(done[0], Answer):
                done[0].close(is_told=False)
            raise

    async def _begin(self, call: Call, deadline_s: float) -> Answer:
        """Send it until an engine begins to answer."""
        services, counts = self._services, self._services.counts
        limits, metrics = services.limits, services.metrics
        limit_s = deadline_s
        if call.asked.stream:
            # An answer in one piece has no first token of its own.
            first_s = asyncio.get_running_loop().time() + limits.first_token_s
            limit_s = min(deadline_s, first_s)
        tried: set[int] = set()
        failure: UpstreamFailed | None = None
        try:
            async with asyncio.timeout_at(limit_s):
                while call.attempt < limits.attempts:
                    try:
                        answer = await self._attempt(call, tried)
                    except RefusedAltered as refused:
                        # Sent anew without our changes, which takes no attempt of its own.
                        counts.retract(self._flight)
                        metrics.count("refused_altered")
                        _LOG.info("request %s: %s", self._flight.id, refused)
                        continue
                    except UpstreamFailed as failed:
                        counts.retract(self._flight)
                        failure = failed
                        call.attempt += 1
                        _LOG.warning("request %s: %s", self._flight.id, failed)
                        metrics.count("retries", by=call.attempt < limits.attempts)
                        for instance in failed.instances:
                            metrics.count("failures", counts.fleet.ids[instance])
                            if failed.down:
                                counts.failed(instance)
                        if tried.issuperset(failed.instances):
                            await asyncio.sleep(_PAUSE_S * 2 ** (call.attempt - 1))
                        tried.update(failed.instances)
                        if self._prefill_is_hopeless(failed, tried):
                            call.alone = "prefill failed"
                        continue
                    for instance in (self._flight.prefill, self._flight.decode):
                        if instance >= 0:
                            counts.succeeded(instance)
                    return answer
        except TimeoutError:
            text = "no token came in time" if call.asked.stream else "it took too long"
            raise Refused(504, "server_error", text) from None
        if failure is not None and failure.answer is not None:
            return failure.answer
        if failure is not None and not failure.is_absent:
            raise Refused(502, "server_error", "no engine gives a whole answer")
        raise Refused(503, "server_error", "no engine answers; come again", RETRY_AFTER)

    def _prefill_is_hopeless(self, failed: UpstreamFailed, tried: set[int]) -> bool:
        """Whether prefill engines fail at what they are asked, so that decode is to do both."""
        prefill = set(self._services.counts.fleet.prefill.tolist())
        told = failed.answer is not None and failed.answer.status >= 500 and not failed.down
        return (
            self._services.upstream.kind == "vllm"
            and told
            and prefill.issuperset(failed.instances)
            and len(tried & prefill) >= min(2, len(prefill))
        )

    async def _attempt(self, call: Call, tried: set[int]) -> Answer:
        """Send it once; it is not waited for where its engine turns out to be gone."""
        gone: list[int] = []
        try:
            async with asyncio.timeout(None) as patience:

                def give_up(instance: int) -> None:
                    gone.append(instance)
                    patience.reschedule(asyncio.get_running_loop().time())

                self._flight.give_up = give_up
                return await self._sent(call, tried)
        except TimeoutError:
            if not patience.expired():
                raise
            name = self._services.counts.fleet.ids[gone[0]]
            raise UpstreamFailed(
                f"{name}: gone while it was waited for", tuple(gone), down=True
            ) from None
        finally:
            self._flight.give_up = None

    async def _sent(self, call: Call, tried: set[int]) -> Answer:
        services, counts = self._services, self._services.counts
        request = Request(prompt_tok=self._flight.prompt_tok)
        routers, upstream, state = services.routers, services.upstream, counts.state()
        ids = counts.fleet.ids

        def sent(phase: str, instance: int) -> int:
            services.metrics.count("sent", ids[instance], phase)
            return instance

        if not upstream.is_shared(call):
            choose = routers.prefill if counts.fleet.colocated else routers.route
            one = sent("both", choose(request, state, tried=tried))
            return await upstream.begin(call, counts, one, lambda: one)
        prefill = sent("prefill", routers.prefill(request, state, tried=tried))
        if upstream.sends_both or routers.decode_at_arrival:
            decode = routers.route(request, state, tried=tried)
            return await upstream.begin(call, counts, prefill, lambda: sent("decode", decode))

        def pick_decode() -> int:
            return sent("decode", routers.route(request, counts.state(), tried=tried))

        return await upstream.begin(call, counts, prefill, pick_decode)

    async def _tell(self, answer: Answer) -> None:
        """Give an answer that is all there."""
        if self._has_started:
            # A stream was promised, and there is none.
            text = f"the engine answered with status {answer.status}"
            await self._end_stream(error_json(answer.status, "server_error", text))
            return
        headers = [*answer.headers, *self._ids]
        if answer.status == 200:
            self._end(usage_of(answer.content), is_whole=True)
            if self._energy is not None:
                headers.append((_ENERGY, self._energy.header.encode()))
        await respond(self._put, answer.status, headers, answer.content)

    async def _start(self, headers: Headers) -> None:
        if not self._has_started:
            self._has_started = True
            headers = [*headers, *self._ids]
            await self._put({"type": "http.response.start", "status": 200, "headers": headers})

    async def _comment(self, headers: Headers, comment: bytes) -> None:
        """Keep a client's connection alive before its first token; it reads nothing of it."""
        await self._start(headers)
        await self._put({"type": "http.response.body", "body": comment, "more_body": True})

    async def _end_stream(self, error: bytes) -> None:
        await self._put({"type": "http.response.body", "body": b"data: " + error + b"\n\n"})

    async def _put(self, message: Message) -> None:
        """Send to the client, while :meth:`_look` sees that it reads."""
        self._put_s = time.monotonic()
        try:
            await self._send(message)
        finally:
            self._put_s = math.inf

    def _look(self, leave: Callable[[], None]) -> None:
        """Cut a client off that has taken nothing for `stall_s`; else look again in time."""
        stall_s = self._services.limits.stall_s
        waited_s = time.monotonic() - self._put_s
        if waited_s >= stall_s:
            self._services.metrics.count("stalled")
            abort = (self._scope.get("extensions") or {}).get(ABORT)
            if abort is not None:
                abort()
            leave()
        else:
            left_s = stall_s - max(0.0, waited_s)
            self._looks = asyncio.get_running_loop().call_later(left_s, self._look, leave)

    async def _stream(self, call: Call, answer: Answer, deadline_s: float) -> bool:
        """Pass a stream on; False if it broke off."""
        counts, flight, reader = self._services.counts, self._flight, answer.reader
        assert reader is not None  # noqa: S101  # of an answer that is not whole
        await self._start(answer.headers)
        wants_energy = header(call.headers, _ENERGY) == b"usage"
        strips_usage = call.asked.options is not None and not call.plain
        seen = 0
        rest = b""
        gone: list[int] = []
        try:
            async with asyncio.timeout_at(deadline_s) as limit:

                def give_up(instance: int) -> None:
                    gone.append(instance)
                    limit.reschedule(asyncio.get_running_loop().time())

                flight.give_up = give_up
                async for events in answer.events():
                    counts.token(flight, reader.tokens - seen)
                    seen = reader.tokens
                    if reader.usage and (wants_energy or strips_usage):
                        events = [self._of_usage(e, answer, strips_usage) for e in events]
                    body = b"".join(events)
                    if body:
                        message = {"type": "http.response.body", "body": body, "more_body": True}
                        await self._put(message)
            rest = reader.rest
        except UpstreamFailed as failed:
            # Its first token is out: sent again, the client would read it twice.
            _LOG.warning("request %s: %s", flight.id, failed)
            self._broke(answer)
            if failed.down:
                counts.failed(answer.instance)
            # Half an event would spoil the error.
            rest = b"data: " + error_json(502, "server_error", str(failed)) + b"\n\n"
        except TimeoutError:
            status, text = (502, "its engine is gone") if gone else (504, "it took too long")
            rest = b"data: " + error_json(status, "server_error", text) + b"\n\n"
            if gone:
                self._broke(answer)
        finally:
            flight.give_up = None
        if reader.has_failed:
            _LOG.warning("request %s: the engine failed in the stream", flight.id)
            self._broke(answer)
        is_whole = reader.is_whole
        if not self._has_ended:
            self._end(reader.usage, is_whole=is_whole)
        # The engine is done with, however long the client takes to read the rest.
        answer.close(is_told=is_whole)
        await self._put({"type": "http.response.body", "body": rest})
        return is_whole

    def _broke(self, answer: Answer) -> None:
        self._services.metrics.count("broken_streams")
        self._services.metrics.count("failures", self._services.counts.fleet.ids[answer.instance])

    def _of_usage(self, event: bytes, answer: Answer, strips: bool) -> bytes:
        """Events as they are; of that with the usage nothing, or the energy besides."""
        reader = answer.reader
        told = None if reader is None else reader.is_usage(event)
        if reader is None or told is None:
            return event
        if strips:
            return b""
        self._end(reader.usage, is_whole=True)
        if self._energy is None:
            return event
        told["usage"]["energy"] = self._energy.usage()
        line_end = b"\r\n" if event.endswith(b"\r\n") else b"\n"
        return b"data: " + json.dumps(told).encode() + line_end * 2

    def _end(self, usage: dict[str, int] | None = None, *, is_whole: bool = False) -> None:
        """Take it off the books, once."""
        if self._has_ended:
            return
        self._has_ended = True
        services, flight = self._services, self._flight
        told = usage or {}
        prompt_tok, output_tok = told.get("prompt_tokens"), told.get("completion_tokens")
        is_counted = output_tok is not None
        if prompt_tok is not None:
            size = {"chars": self._asked.chars, "tok": self._asked.tok}
            services.lengths.learn(**size, prompt_tok=prompt_tok)
        if self._asked.stream and flight.output_tok:
            # An event may bring several tokens, and only engines know how many.
            ratio = services.tok_per_event.get(flight.decode)
            if output_tok is not None and is_whole:
                seen = output_tok / flight.output_tok
                ratio = seen if ratio is None else ratio + _LEARN_FRAC * (seen - ratio)
                services.tok_per_event[flight.decode] = ratio
            elif output_tok is None:
                output_tok = 0 if ratio is None or is_whole else round(ratio * flight.output_tok)
        services.counts.made(flight, prompt_tok=prompt_tok, output_tok=output_tok)
        services.counts.end(flight)
        generates = self._scope["path"] in COMPLETIONS + GENERATING
        if generates and (is_whole or flight.first_s < flight.last_s) and not output_tok:
            services.metrics.count("uncounted")
        if flight.output_tok or (is_whole and prompt_tok):
            cached_tok = flight.cached_tok
            if cached_tok is None:
                cached_tok = told.get("cached_tokens", 0)
            self._energy = services.energy.charge(flight, cached_tok=cached_tok)
            instance = services.counts.fleet.ids[flight.decode]
            services.metrics.count("output_tokens", instance, by=flight.output_tok)
        if is_whole and is_counted and flight.output_tok:
            services.counts.ended_well(flight)
            if self._asked.stream:
                services.metrics.judge(flight)
