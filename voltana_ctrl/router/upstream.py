"""Connections to engines: a request is sent, and its answer read up to the first token."""

from __future__ import annotations

import asyncio
import errno
import json
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.router.body import usage_of
from voltana_ctrl.router.dialects import (
    dialect_of,
    dynamo_pins,
    kv_transfer_params,
    sglang_meeting,
)
from voltana_ctrl.router.events import EventReader, is_comment
from voltana_ctrl.router.fields import ROUTING_HEADERS
from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.router.messages import Answer, Call, Headers, RefusedAltered, UpstreamFailed
from voltana_ctrl.serving.asgi import Share

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Upstream"]

#: Of one connection alone.
_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"content-length", b"date", b"server",
    )
)  # fmt: skip
#: Of an answer, besides: what the router says itself.
_OURS = _HOP_BY_HOP | {b"x-request-id", b"x-client-request-id", b"x-voltana-energy"}
#: Of a request, besides: the answer is read here, and the address is the engine's.
_NOT_FORWARDED = _HOP_BY_HOP | {
    b"host", b"expect", b"accept-encoding", b"x-request-id", b"x-client-request-id",
}  # fmt: skip
# Engines close idle connections after 5 s by default; one that we close first is never sent into.
_KEEP_ALIVE_S = 3.0
# What one engine of a pair refuses, the other refuses, too, within this time.
_OTHERS_WORD_S = 2.0
_PAGE_S = 10.0
# Of a stream that its client does not read, so much stays in several places on its way.
_READ_BYTES = 1 << 14
# What connecting says where no packet comes back.
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN)
# Refusals that have nothing to do with what a request says.
_NOT_OF_THE_BODY = (401, 403, 408, 413, 429)


class Upstream:
    """Connections to the engines of a fleet; an asynchronous context manager.

    Parameters
    ----------
    endpoints : sequence of Endpoint
        One per instance, in the order of the fleet.
    colocated : bool
        Whether each instance does both phases.
    connect_s : float
        Seconds for a connection to be made.
    answer_bytes : int
        Bytes of the longest answer in one piece, and of the longest event of a stream.
    api_key : str, optional
        Bearer token that engines are sent in place of the client's.
    pass_authorization : bool
        Whether the client's own token is passed on.
    keep : bool
        Whether clients may say what otherwise only a router does, such as a rank.
    tls_ca : Path, optional
        Certificates that engines' own must be signed by, in place of the system's.

    Raises
    ------
    ConfigError
        If kinds are mixed, an engine lacks what its kind needs, or certificates cannot be read.

    Examples
    --------
    >>> from voltana_ctrl.engines.endpoints import Endpoint
    >>> ends = [Endpoint(instance=f"colocated-{k}", kind="vllm", url=f"http://10.0.0.{k}:8000")
    ...         for k in (1, 2)]
    >>> Upstream(ends, colocated=True).kind
    'plain'
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        colocated: bool,
        connect_s: float = 5.0,
        answer_bytes: int = 32 << 20,
        api_key: str | None = None,
        pass_authorization: bool = True,
        keep: bool = False,
        tls_ca: Path | None = None,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.kind = dialect_of(self.endpoints, colocated=colocated)
        self._colocated = colocated
        self._connect_s = connect_s
        self._answer_bytes = answer_bytes
        self._api_key = api_key
        self._dropped = _NOT_FORWARDED
        if api_key is not None or not pass_authorization:
            self._dropped |= {b"authorization"}
        if not keep:
            self._dropped |= frozenset(ROUTING_HEADERS)
        self._trust: ssl.SSLContext | None = None
        if tls_ca is not None:
            try:
                self._trust = ssl.create_default_context(cafile=str(tls_ca))
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"tls-ca: {tls_ca} cannot be read as certificates in PEM: {error}"
                ) from error
        self._http: aiohttp.ClientSession | None = None
        self._lingering: set[asyncio.Task[Answer]] = set()

    async def __aenter__(self) -> Upstream:
        try:
            import aiohttp
        except ImportError as error:
            raise ConfigError(
                "router: aiohttp is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        trust: Any = {} if self._trust is None else {"ssl": self._trust}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S, **trust),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_READ_BYTES,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._lingering:
            task.cancel()
        if self._http is not None:
            await self._http.close()

    def is_shared(self, call: Call) -> bool:
        """Whether a prefill and a decode engine work on a request, one after the other.

        Parameters
        ----------
        call : Call
            The request.

        Returns
        -------
        bool
            False where one engine does both phases of it.
        """
        if self._colocated or not call.is_completion:
            return False
        return self.kind != "vllm" or call.alone is None

    @property
    def sends_both(self) -> bool:
        """Whether both places must be known before anything is sent."""
        return self.kind != "vllm"

    async def begin(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        """Send a request and wait for its first token, or for all of it if it does not stream.

        Parameters
        ----------
        call : Call
            The request.
        counts : InFlight
            Told where the request is.
        prefill : int
            Index of the instance to prefill on, or to do all where it is not shared.
        pick_decode : callable
            Returns the index of the decode instance, when it is needed.

        Returns
        -------
        Answer
            All of it, or its beginning up to the first token of a stream.

        Raises
        ------
        RefusedAltered
            If an engine refused what was added to the request: it may be sent without that.
        UpstreamFailed
            If an engine failed it before its first token: it may be sent to another instance.
        """
        counts.enter_prefill(call.flight, prefill)
        if not self.is_shared(call):
            answer = await self._alone(call, counts, prefill)
        elif self.kind == "vllm":
            answer = await self._vllm(call, counts, prefill, pick_decode)
        elif self.kind == "sglang":
            answer = await self._sglang(call, counts, prefill, pick_decode)
        else:
            answer = await self._dynamo(call, counts, prefill, pick_decode)
        is_pinned = self.kind == "dynamo" and call.is_completion
        is_altered = (call.asked.options is not None or is_pinned) and not call.plain
        if is_altered and _is_refusal(answer.status):
            call.plain = True
            answer.close(is_told=False)
            raise RefusedAltered(
                f"{self._name(answer.instance)}: status {answer.status} to what was added",
                (answer.instance,),
                answer=answer,
            )
        return answer

    async def get(
        self, instance: int, path: str, headers: Headers = (), *, limit_s: float = _PAGE_S
    ) -> Answer:
        """Ask one engine for a page.

        Parameters
        ----------
        instance : int
            Index of the instance.
        path : str
            Path of the page, such as ``/v1/models``.
        headers : list of (bytes, bytes)
            Headers of the client, of which those are passed on that engines may see.
        limit_s : float
            Seconds for all of it.

        Returns
        -------
        Answer
            All of it.

        Raises
        ------
        UpstreamFailed
            If there is no answer, none in time, or one with a status of 5xx.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await self._whole(instance, "GET", path, None, self._headers(headers))
        except TimeoutError as error:
            raise UpstreamFailed(
                f"{self._name(instance)}: no answer in {limit_s:g} s",
                (instance,),
                down=True,
                is_late=True,
            ) from error

    async def _alone(self, call: Call, counts: InFlight, instance: int) -> Answer:
        """To one engine, which does both phases."""
        extra = {}
        if self.kind == "dynamo" and call.is_completion and not call.plain:
            extra = dynamo_pins(call.asked.nvext, None, self.endpoints[instance])
        if not call.asked.stream:
            # Its first token does not show.
            counts.leave_prefill(call.flight)
            counts.enter_decode(call.flight, instance)
        answer = await self._open(instance, call, call.content(extra))
        counts.leave_prefill(call.flight)
        if call.asked.stream:
            counts.enter_decode(call.flight, instance)
        return answer

    async def _dynamo(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        decode = pick_decode()
        counts.enter_decode(call.flight, decode)
        ends = self.endpoints[prefill], self.endpoints[decode]
        extra = {"nvext": call.asked.nvext} if call.asked.nvext else {}
        if not call.plain:
            extra = dynamo_pins(call.asked.nvext, *ends)
        try:
            answer = await self._open(decode, call, call.content(extra))
        except UpstreamFailed as failed:
            # The frontend does not say which of the two it was.
            failed.instances = (prefill, decode)
            raise
        counts.leave_prefill(call.flight)
        return answer

    async def _vllm(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        headers = self._headers(call.headers, call)
        made = await self._whole(prefill, "POST", call.path, call.asked.prefill, headers, call)
        if made.status != 200:
            # Its request was not the client's, so that its refusal is not for the client.
            failed = UpstreamFailed
            if _is_refusal(made.status):
                call.alone, failed = "prefill refused", RefusedAltered
            raise failed(
                f"{self._name(prefill)}: status {made.status} to a prefill", (prefill,), answer=made
            )
        counts.leave_prefill(call.flight)
        params = kv_transfer_params(made.content)
        decode = pick_decode()
        counts.enter_decode(call.flight, decode)
        # Without them the decode engine prefills for itself.
        extra = {}
        if params is not None:
            extra = {"kv_transfer_params": params}
            # What was handed over is in the cache of the decode engine, which says so.
            call.flight.cached_tok = usage_of(made.content).get("cached_tokens", 0)
        return await self._open(decode, call, call.content(extra))

    async def _sglang(
        self, call: Call, counts: InFlight, prefill: int, pick_decode: Callable[[], int]
    ) -> Answer:
        decode = pick_decode()
        counts.enter_decode(call.flight, decode)
        meeting = sglang_meeting(self.endpoints[prefill], prompts=call.asked.prompts)
        content = call.content(meeting)
        headers = self._headers(call.headers, call)
        made = asyncio.ensure_future(
            self._whole(prefill, "POST", call.path, content, headers, call)
        )
        opened = asyncio.ensure_future(self._open(decode, call, content))
        try:
            # If one fails the other waits in vain.
            await asyncio.wait({made, opened}, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done() and made.result().status != 200:
                # The client is told what the decode engine says, if it refuses as well: the
                # prefill engine may fail at an answer of one token.
                await asyncio.wait({opened}, timeout=_OTHERS_WORD_S)
                if not opened.done():
                    raise UpstreamFailed(
                        f"{self._name(prefill)}: status {made.result().status} to a prefill",
                        (prefill,),
                        answer=made.result(),
                    )
            answer = await opened
        except BaseException:
            made.cancel()
            opened.cancel()
            # Let them hang up; what they met is told by the one that failed first.
            await asyncio.gather(made, opened, return_exceptions=True)
            raise
        counts.leave_prefill(call.flight)
        answer.companion = made
        # It says a little later than decode that it is done, or never.
        self._lingering.add(made)
        made.add_done_callback(self._lingering.discard)
        made.add_done_callback(_look_away)
        return answer

    def _headers(self, headers: Headers, call: Call | None = None) -> list[tuple[str, str]]:
        named = {
            part.strip().lower()
            for name, value in headers
            if name == b"connection"
            for part in value.split(b",")
        }
        kept = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name not in self._dropped and name not in named
        ]
        kept.append(("accept-encoding", "identity"))
        if call is not None:
            kept.append(("x-request-id", call.request_id))
            if call.client_id is not None:
                kept.append(("x-client-request-id", call.client_id.decode("latin-1")))
        if self._api_key is not None:
            kept.append(("authorization", f"Bearer {self._api_key}"))
        return kept

    async def _send(
        self, instance: int, method: str, path: str, content: bytes | None, headers: Any
    ) -> aiohttp.ClientResponse:
        import aiohttp

        endpoint = self.endpoints[instance]
        if self._http is None:
            raise ConfigError("Upstream: not entered; use `async with`")
        try:
            return await self._http.request(
                method,
                endpoint.url + path,
                data=content,
                headers=headers,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._silence(instance, error) from error

    async def _whole(
        self,
        instance: int,
        method: str,
        path: str,
        content: bytes | None,
        headers: Any,
        call: Call | None = None,
    ) -> Answer:
        """Ask, and read all of the answer."""
        response = await self._send(instance, method, path, content, headers)
        return await self._read(instance, response, Share() if call is None else call.share)

    async def _open(self, instance: int, call: Call, content: bytes) -> Answer:
        """Ask, and read up to the first token of a stream."""
        headers = self._headers(call.headers, call)
        response = await self._send(instance, "POST", call.path, content, headers)
        streams = call.asked.stream and response.content_type == "text/event-stream"
        if response.status != 200 or not streams:
            return await self._read(instance, response, call.share)
        import aiohttp

        reader = EventReader(sequences=call.asked.sequences, event_bytes=self._answer_bytes)
        answer = Answer(
            status=200,
            headers=_passed_on(response),
            instance=instance,
            reader=reader,
            response=response,
        )
        begun_bytes = 0
        try:
            async for chunk in response.content.iter_any():
                for event in reader.take(chunk):
                    if not reader.has_begun and is_comment(event):
                        await call.comment(answer.headers, event)
                        continue
                    answer.begun.append(event)
                    begun_bytes += len(event)
                if reader.is_engine_failure:
                    raise UpstreamFailed(
                        f"{self._name(instance)}: failed in the stream", (instance,)
                    )
                if begun_bytes > self._answer_bytes:
                    raise ValueError("no end of events without a token")
                if reader.has_begun or reader.has_failed:
                    return answer
        except (aiohttp.ClientError, OSError, ValueError) as error:
            response.close()
            raise self._silence(instance, error) from error
        except BaseException:
            response.close()
            raise
        raise UpstreamFailed(f"{self._name(instance)}: a stream without a token", (instance,))

    async def _read(self, instance: int, response: aiohttp.ClientResponse, share: Share) -> Answer:
        import aiohttp

        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in response.content.iter_any():
                parts.append(chunk)
                size += len(chunk)
                if size > self._answer_bytes or not share.grow(len(chunk)):
                    parts.clear()
                    raise UpstreamFailed(
                        f"{self._name(instance)}: its answer is too long to be kept", (instance,)
                    )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._silence(instance, error) from error
        finally:
            response.close() if not response.content.at_eof() else response.release()
        content = b"".join(parts)
        del parts
        status = response.status
        if status != 200 and not 400 <= status < 600:
            raise UpstreamFailed(
                f"{self._name(instance)}: status {status}, which is no answer to this", (instance,)
            )
        is_framed = "content-length" in response.headers or response.headers.get(
            "transfer-encoding", ""
        ).lower().endswith("chunked")
        if status == 200 and not is_framed and not _is_json(content):
            raise UpstreamFailed(f"{self._name(instance)}: half an answer", (instance,), down=True)
        answer = Answer(
            status=status, headers=_passed_on(response), content=content, instance=instance
        )
        if status >= 500:
            raise UpstreamFailed(
                f"{self._name(instance)}: status {status}",
                (instance,),
                down=status in (502, 503, 504),
                answer=answer,
            )
        return answer

    def _silence(self, instance: int, error: Exception) -> UpstreamFailed:
        import aiohttp

        # Without a connection nothing was sent; otherwise it broke off at this request.
        nobody = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
        # A machine that refuses is there, and would reset the connections of a dead engine.
        is_unreachable = isinstance(error, aiohttp.ConnectionTimeoutError) or (
            isinstance(error, OSError) and error.errno in _NO_WAY
        )
        return UpstreamFailed(
            f"{self._name(instance)}: no answer ({type(error).__name__})",
            (instance,),
            down=True,
            is_absent=isinstance(error, nobody),
            is_unreachable=is_unreachable,
        )

    def _name(self, instance: int) -> str:
        return self.endpoints[instance].instance


def _passed_on(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower(), value) for name, value in response.raw_headers if name.lower() not in _OURS
    ]


def _is_refusal(status: int) -> bool:
    return 400 <= status < 500 and status not in _NOT_OF_THE_BODY


def _is_json(content: bytes) -> bool:
    """Whether an answer of which only the connection's end is known may be whole."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _look_away(task: asyncio.Task[Answer]) -> None:
    """Take note of an end that changes nothing any more."""
    if not task.cancelled():
        task.exception()
