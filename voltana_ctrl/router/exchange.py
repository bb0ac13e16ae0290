"""One request through the router: sent until its first token comes, then never again."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from voltana_ctrl.estimate import RequestClasses
from voltana_ctrl.router.body import BadBody, PromptLengths, parse_body, usage_of
from voltana_ctrl.router.dialects import tells_failure
from voltana_ctrl.router.energy import EnergyBook, RequestEnergy
from voltana_ctrl.router.ledger import Flight, InFlight
from voltana_ctrl.router.policy import PolicyRouters
from voltana_ctrl.router.upstream import Answer, Call, Upstream, UpstreamFailed
from voltana_ctrl.serving.asgi import (
    ABORT,
    RETRY_AFTER,
    ClientGone,
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
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}\Z")
# Of a stream, what is kept to find the usage at its end.
_TAIL_BYTES = 4096
# Before an instance is asked a second time.
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Services:
    """What exchanges share.

    Parameters
    ----------
    routers : PolicyRouters
        Choose instances.
    counts : InFlight
        Who is where.
    energy : EnergyBook
        What it cost.
    upstream : Upstream
        The engines.
    attempts : int
        How often a request is sent before its first token, at most.
    body_bytes : int
        Largest body.
    body_s, first_token_s, total_s, stall_s : float
        Time for the body, for the first token, for all of it, and for a client to read on.
    lengths : PromptLengths
        Guesses the lengths of prompts.
    seen : dict of str to float
        Events, for the metrics.
    judged : Counter
        Streams that ended well, by objective that they met (``any``: all of them) and class.
    classes : RequestClasses
        Of prompt lengths.

    Examples
    --------
    >>> Services.__dataclass_fields__["seen"].type
    'dict[str, float]'
    """

    routers: PolicyRouters
    counts: InFlight
    energy: EnergyBook
    upstream: Upstream
    attempts: int
    body_bytes: int
    body_s: float
    first_token_s: float
    total_s: float
    stall_s: float
    lengths: PromptLengths = field(default_factory=PromptLengths)
    seen: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    judged: Counter[tuple[str, str]] = field(default_factory=Counter)
    classes: RequestClasses = field(default_factory=RequestClasses)

    def judge(self, flight: Flight) -> None:
        """Hold a stream that ended well to the objectives; only of streams both are seen.

        Parameters
        ----------
        flight : Flight
            With its times and lengths.
        """
        slo = self.routers.slo
        further_tok = flight.output_tok - 1
        itl_s = (flight.last_s - flight.first_s) / further_tok if further_tok > 0 else 0.0
        met = {"ttft": flight.first_s - flight.begin_s <= slo.ttft_s, "itl": itl_s <= slo.itl_s}
        kind = int(self.classes.of(request_class=[0], prompt_tok=[flight.prompt_tok])[0])
        name = self.classes.names[kind]
        for objective, is_met in {"any": True, **met, "both": all(met.values())}.items():
            self.judged[objective, name] += is_met


class Exchange:
    """A request and its answer.

    Parameters
    ----------
    services : Services
        Shared.
    scope, receive, send
        Of ASGI.

    Examples
    --------
    >>> callable(Exchange.run)
    True
    """

    def __init__(self, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        self._services = services
        self._scope, self._receive, self._send = scope, receive, send
        given = header(scope["headers"], b"x-request-id")
        if given is None or not _REQUEST_ID.match(given):
            given = uuid.uuid4().hex.encode()
        self._id = (b"x-request-id", given)
        # Counted while its body arrives, too: bodies take memory.
        self._flight = services.counts.begin(given.decode(), prompt_tok=1)
        self._body: dict[str, Any] = {}
        self._energy: RequestEnergy | None = None
        self._has_ended = False
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

    async def _read(self) -> Call:
        services = self._services
        content = await read_body(
            self._scope,
            self._receive,
            limit_bytes=services.body_bytes,
            limit_s=services.body_s,
        )
        try:
            self._body = parse_body(content)
        except BadBody as bad:
            raise Refused(400, "invalid_request_error", str(bad)) from None
        self._flight.prompt_tok = services.lengths.estimate(self._body)
        return Call(
            path=self._scope["path"],
            content=content,
            body=self._body,
            headers=self._scope["headers"],
            stream=bool(self._body.get("stream")),
            flight=self._flight,
        )

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
            self._services.seen["cancelled"] += not is_deaf
            raise ClientGone from None
        finally:
            watch.remove_done_callback(hear)
            watch.cancel()
            if self._looks is not None:
                self._looks.cancel()

    async def _answer(self, call: Call) -> None:
        deadline_s = asyncio.get_running_loop().time() + self._services.total_s
        answer = await self._begin(call, deadline_s)
        is_told = False
        try:
            if answer.is_whole:
                await self._tell(call, answer)
                is_told = answer.status == 200
            else:
                is_told = await self._stream(call, answer, deadline_s)
        finally:
            answer.close(is_told=is_told)

    async def _begin(self, call: Call, deadline_s: float) -> Answer:
        """Send it until an engine begins to answer."""
        services, counts = self._services, self._services.counts
        now_s = asyncio.get_running_loop().time()
        tried: set[int] = set()
        failure: UpstreamFailed | None = None
        try:
            async with asyncio.timeout_at(min(deadline_s, now_s + services.first_token_s)):
                for attempt in range(services.attempts):
                    call.attempt = attempt
                    try:
                        answer = await self._attempt(call, tried)
                    except UpstreamFailed as failed:
                        counts.retract(self._flight)
                        failure = failed
                        _LOG.warning("request %s: %s", self._flight.id, failed)
                        services.seen["retries"] += attempt + 1 < services.attempts
                        if failed.down:
                            for instance in failed.instances:
                                counts.failed(instance)
                        if tried.issuperset(failed.instances):
                            await asyncio.sleep(_PAUSE_S * 2**attempt)
                        tried.update(failed.instances)
                        continue
                    for instance in (self._flight.prefill, self._flight.decode):
                        if instance >= 0:
                            counts.succeeded(instance)
                    return answer
        except TimeoutError:
            raise Refused(504, "server_error", "no token came in time") from None
        if failure is not None and failure.answer is not None:
            return failure.answer
        raise Refused(503, "server_error", "no engine answers; come again", RETRY_AFTER)

    async def _attempt(self, call: Call, tried: set[int]) -> Answer:
        services, counts = self._services, self._services.counts
        request = Request(prompt_tok=self._flight.prompt_tok)
        routers, upstream, state = services.routers, services.upstream, counts.state()
        prefill = routers.prefill(request, state, tried=tried)
        if upstream.sends_both or routers.decode_at_arrival:
            decode = prefill
            if not counts.fleet.colocated:
                decode = routers.route(request, state, tried=tried)
            return await upstream.begin(call, counts, prefill, lambda: decode)

        def pick_decode() -> int:
            return routers.route(request, counts.state(), tried=tried)

        return await upstream.begin(call, counts, prefill, pick_decode)

    async def _tell(self, call: Call, answer: Answer) -> None:
        """Give an answer that is all there."""
        headers = [*answer.headers, self._id]
        if answer.status == 200:
            self._end(usage_of(answer.head, stream=call.stream))
            if self._energy is not None:
                headers.append((_ENERGY, self._energy.header.encode()))
        await respond(self._put, answer.status, headers, answer.head)

    async def _put(self, message: Message) -> None:
        """Send to the client, while :meth:`_look` sees that it reads."""
        self._put_s = time.monotonic()
        try:
            await self._send(message)
        finally:
            self._put_s = math.inf

    def _look(self, leave: Callable[[], None]) -> None:
        """Cut a client off that has taken nothing for `stall_s`; else look again in time."""
        stall_s = self._services.stall_s
        waited_s = time.monotonic() - self._put_s
        if waited_s >= stall_s:
            self._services.seen["stalled"] += 1
            abort = (self._scope.get("extensions") or {}).get(ABORT)
            if abort is not None:
                abort()
            leave()
        else:
            left_s = stall_s - max(0.0, waited_s)
            self._looks = asyncio.get_running_loop().call_later(left_s, self._look, leave)

    async def _stream(self, call: Call, answer: Answer, deadline_s: float) -> bool:
        """Pass a stream on; False if it broke off."""
        counts, flight = self._services.counts, self._flight
        headers = [*answer.headers, self._id]
        await self._put({"type": "http.response.start", "status": 200, "headers": headers})
        wants_energy = header(call.headers, _ENERGY) == b"usage"
        tail = held = b""
        is_whole = False
        try:
            async with asyncio.timeout_at(deadline_s):
                async for chunk in _chain(answer):
                    tail = (tail + chunk)[-_TAIL_BYTES:]
                    passed, held = _whole_events(held + chunk)
                    if passed:
                        counts.token(flight, _count_events(passed))
                        if wants_energy:
                            passed = self._with_energy(passed)
                        message = {"type": "http.response.body", "body": passed, "more_body": True}
                        await self._put(message)
            is_whole = True
        except UpstreamFailed as failed:
            # Its first token is out: sent again, the client would read it twice.
            _LOG.warning("request %s: %s", flight.id, failed)
            self._services.seen["broken_streams"] += 1
            if failed.down:
                counts.failed(answer.instance)
            # Half an event would spoil the error.
            held = b"data: " + error_json(502, "server_error", str(failed)) + b"\n\n"
        except TimeoutError:
            held = b"data: " + error_json(504, "server_error", "it took too long") + b"\n\n"
        has_failed = tells_failure(tail)
        if has_failed:
            _LOG.warning("request %s: the engine failed in the stream", flight.id)
            self._services.seen["broken_streams"] += 1
            is_whole = False
        if not self._has_ended:
            # Neither is a token.
            ends = (b"[DONE]" in tail) + has_failed
            flight.output_tok = max(1, flight.output_tok - ends)
            self._end(usage_of(tail, stream=True) if is_whole else None)
        # The engine is done with, however long the client takes to read the rest.
        answer.close(is_told=is_whole)
        await self._put({"type": "http.response.body", "body": held})
        return is_whole

    def _with_energy(self, events: bytes) -> bytes:
        """Events with the energy added to the last usage."""
        if b'"usage"' not in events:
            return events
        lines = events.split(b"\n")
        for k, line in enumerate(lines):
            told = _last_usage(line)
            if told is not None:
                self._end(usage_of(line, stream=True))
                if self._energy is not None:
                    told["usage"]["energy"] = self._energy.usage()
                    ending = b"\r" if line.endswith(b"\r") else b""
                    lines[k] = b"data: " + json.dumps(told).encode() + ending
        return b"\n".join(lines)

    def _end(self, usage: dict[str, int] | None = None) -> None:
        """Take it off the books, once."""
        if self._has_ended:
            return
        self._has_ended = True
        services, flight = self._services, self._flight
        told = usage or {}
        prompt_tok = told.get("prompt_tokens")
        if prompt_tok is not None:
            services.lengths.learn(self._body, prompt_tok=prompt_tok)
        services.counts.made(
            flight, prompt_tok=prompt_tok, output_tok=told.get("completion_tokens")
        )
        services.counts.end(flight)
        if flight.output_tok:
            cached_tok = flight.cached_tok
            if cached_tok is None:
                cached_tok = told.get("cached_tokens", 0)
            self._energy = services.energy.charge(flight, cached_tok=cached_tok)
            services.seen["output_tokens"] += flight.output_tok
            if not math.isnan(flight.first_s):
                services.seen["ttft_seconds"] += flight.first_s - flight.begin_s
        if usage is not None and flight.output_tok:
            services.counts.ended_well(flight)
            if self._body.get("stream"):
                services.judge(flight)


async def _chain(answer: Answer) -> Any:
    yield answer.head
    async for chunk in answer.rest():
        yield chunk


def _whole_events(content: bytes) -> tuple[bytes, bytes]:
    """Whole events, and the beginning of the next."""
    end = max(content.rfind(b"\n\n") + 2, content.rfind(b"\r\n\r\n") + 4)
    return (b"", content) if end < 4 else (content[:end], content[end:])


def _count_events(content: bytes) -> int:
    """Number of whole events: text in JSON holds no bare line ends."""
    return content.count(b"\n\n") or content.count(b"\r\n\r\n")


def _last_usage(line: bytes) -> dict[str, Any] | None:
    """Event that brings the usage of the whole request and no token."""
    if not line.startswith(b"data:") or b'"usage"' not in line:
        return None
    try:
        told = json.loads(line[5:])
    except ValueError:
        return None
    is_last = (
        isinstance(told, dict) and not told.get("choices") and isinstance(told.get("usage"), dict)
    )
    return told if is_last else None
