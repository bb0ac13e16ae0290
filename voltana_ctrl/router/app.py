"""An OpenAI-compatible router in front of engines, as an ASGI application."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.router.energy import EnergyBook
from voltana_ctrl.router.exchange import Exchange, Services
from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.router.limits import ProxyLimits
from voltana_ctrl.router.messages import UpstreamFailed
from voltana_ctrl.router.metrics import RouterMetrics
from voltana_ctrl.router.offload import BodyReader
from voltana_ctrl.router.paths import COMPLETIONS, GENERATING, OTHER_POSTS, PAGES
from voltana_ctrl.router.policy import PolicyRouters, StateSource
from voltana_ctrl.router.probe import Prober
from voltana_ctrl.router.upstream import Upstream
from voltana_ctrl.serving.asgi import (
    JSON,
    RETRY_AFTER,
    ByteBudget,
    Headers,
    JsonErrors,
    Receive,
    Refused,
    Scope,
    Send,
    error_json,
    header,
    respond,
)
from voltana_ctrl.types import FleetSpec

__all__ = ["Proxy", "ProxyLimits"]

_LOG = logging.getLogger(__name__)
_METRICS = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)


class Proxy:
    """Sends each request where a policy says, and answers it exactly once.

    An ASGI application; give it to uvicorn, or mount it in an application of your own that runs
    its lifespan. A request is sent anew, elsewhere, only while its client has not seen a token.

    Its `routers` are a `Router` and its `energy` is an `Observer`: give both to a control loop,
    and give the loop to :meth:`watch`; then decisions reach the routing, and energies are
    measured. Where `is_draining` is set, new requests are told to go elsewhere (503).

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    endpoints : sequence of Endpoint
        Engines of its instances, in the order of the fleet.
    policy : str
        Policy whose routers choose, see :func:`~voltana_ctrl.policies.find_policy`.
    routers : PolicyRouters, optional
        Routers in place of those of `policy`.
    state : StateSource, optional
        Telemetry or a control loop; without it the router goes by what it sent itself.
    traffic : Traffic, optional
        Told what was sent where and how it ended, for telemetry in this process.
    limits : ProxyLimits, optional
        What one client may ask, and for how long; the defaults if left out.
    api_key : str, optional
        Bearer token that clients must show.
    engine_api_key : str, optional
        Bearer token shown to engines.
    engine_tls_ca : Path, optional
        Certificates that those of engines must be signed by, in place of the system's.
    allow_origins : sequence of str
        Origins of pages that may call from a browser, such as ``https://chat.example``; ``*`` is
        every one.
    trusts_clients : bool
        Whether clients may say what otherwise only a router does: where a KV cache lies, which
        rank or worker computes, and how engines name a request.

    Raises
    ------
    ConfigError
        If fleet and engines do not fit.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.engines import Endpoint
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> engines = [Endpoint(instance=name, kind="vllm", url=f"http://10.0.0.{k}:8000")
    ...            for k, name in enumerate(fleet.ids)]
    >>> proxy = Proxy(fleet, engines, policy="static-max+least-queue/jsq")
    >>> proxy.counts.total_req
    0
    """

    def __init__(
        self,
        fleet: FleetSpec,
        endpoints: Sequence[Endpoint],
        *,
        policy: str = "cascade",
        routers: PolicyRouters | None = None,
        state: StateSource | None = None,
        traffic: Traffic | None = None,
        limits: ProxyLimits | None = None,
        api_key: str | None = None,
        engine_api_key: str | None = None,
        engine_tls_ca: Path | None = None,
        trusts_clients: bool = False,
        allow_origins: Sequence[str] = (),
    ) -> None:
        if [endpoint.instance for endpoint in endpoints] != list(fleet.ids):
            raise ConfigError(
                f"endpoints: expected one for each of {', '.join(fleet.ids)}, in this order"
            )
        self.fleet = fleet
        self.limits = limits or ProxyLimits()
        self.routers = routers or PolicyRouters(fleet, policy)
        self.counts = InFlight(fleet, state, traffic=traffic)
        self.energy = EnergyBook(fleet, state, keep_req=self.limits.keep_energy_req)
        self.is_draining = False
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self.metrics = RouterMetrics(self.counts, self.energy, self.routers.slo)
        self._upstream = Upstream(
            endpoints,
            colocated=fleet.colocated,
            connect_s=self.limits.connect_s,
            answer_bytes=self.limits.answer_bytes,
            api_key=engine_api_key,
            pass_authorization=api_key is None,
            keep=trusts_clients,
            tls_ca=engine_tls_ca,
        )
        self._services = Services(
            routers=self.routers,
            counts=self.counts,
            energy=self.energy,
            metrics=self.metrics,
            upstream=self._upstream,
            limits=self.limits,
            keep=trusts_clients,
            bodies=BodyReader(),
            budget=ByteBudget(self.limits.held_bytes),
        )
        self._app = self._routes(allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan, as ASGI says."""
        await self._app(scope, receive, send)

    def watch(self, source: StateSource) -> None:
        """Take the state of the fleet from telemetry or a control loop from now on.

        Parameters
        ----------
        source : StateSource
            Source whose `state` is looked at for each request.
        """
        self.counts.source = self.energy.source = source

    def _routes(self, allow_origins: Sequence[str]) -> Any:
        try:
            from starlette.applications import Starlette
            from starlette.exceptions import HTTPException
            from starlette.middleware import Middleware
            from starlette.middleware.cors import CORSMiddleware
            from starlette.responses import Response
            from starlette.routing import Route
        except ImportError as error:
            raise ConfigError(
                "router: starlette is not installed; pip install 'voltana-ctrl[server]'"
            ) from error

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            del app
            prober = Prober(
                self._upstream,
                self.counts,
                every_s=self.limits.probe_s,
                told=lambda i: self.metrics.count("failures", self.fleet.ids[i]),
            )
            async with self._upstream:
                probing = asyncio.ensure_future(prober.run())
                try:
                    yield
                finally:
                    probing.cancel()
                    await asyncio.gather(probing, return_exceptions=True)
                    self._services.bodies.close()

        async def say(request: Any, error: Exception) -> Response:
            del request
            status, headers = 500, {}
            if isinstance(error, HTTPException):
                status, headers = error.status_code, dict(error.headers or {})
            kind = "server_error" if status >= 500 else "invalid_request_error"
            text = {404: "no such path", 405: "method not allowed"}.get(status, "internal error")
            content = error_json(status, kind, text)
            return Response(content, status, headers, media_type="application/json")

        pages = (
            *(("POST", path, self._complete) for path in COMPLETIONS + GENERATING + OTHER_POSTS),
            *(("GET", path, self._page) for path in PAGES),
            ("GET", "/v1/energy/{request_id}", self._energy_of),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
        )
        # Before a page calls with JSON, its browser asks whether it may, without the key.
        browsers = Middleware(
            CORSMiddleware,
            allow_origins=list(allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-voltana-energy"],
        )
        app = Starlette(
            routes=[
                Route(path, JsonErrors(handle, partial(self._tell, path)), methods=[method])
                for method, path, handle in pages
            ],
            lifespan=lifespan,
            middleware=[browsers] if allow_origins else [],
            exception_handlers={HTTPException: say, Exception: say},
        )
        app.router.redirect_slashes = False
        return app

    def _tell(self, path: str, status: int) -> None:
        self.metrics.count("requests", path, str(status))

    def _admit(self, headers: Headers) -> None:
        # A colon, a space and the end of the line besides.
        if sum(len(name) + len(value) + 4 for name, value in headers) > self.limits.header_bytes:
            raise Refused(431, "invalid_request_error", "the headers are too long")
        if self._key is None:
            return
        scheme, _, token = (header(headers, b"authorization") or b"").partition(b" ")
        is_same = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._key)
        if not (is_same and scheme.lower() == b"bearer"):
            raise Refused(
                401,
                "authentication_error",
                "expected a valid bearer token",
                [(b"www-authenticate", b"Bearer")],
            )

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._admit(scope["headers"])
        if self.is_draining:
            raise Refused(503, "server_error", "the router is shutting down", RETRY_AFTER)
        if self.counts.total_req >= self.limits.in_flight_req:
            text = "too many requests at once; come again"
            raise Refused(429, "rate_limit_error", text, RETRY_AFTER)
        await Exchange(self._services, scope, receive, send).run()

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        self._admit(scope["headers"])
        for instance in sorted(self.fleet.decode.tolist(), key=self.counts.is_down):
            try:
                answer = await self._upstream.get(instance, scope["path"], scope["headers"])
            except UpstreamFailed as failed:
                _LOG.warning("%s", failed)
                continue
            await respond(send, answer.status, answer.headers, answer.content)
            return
        raise Refused(503, "server_error", "no engine answers; come again", RETRY_AFTER)

    async def _energy_of(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        self._admit(scope["headers"])
        energy = self.energy.find(scope["path_params"]["request_id"])
        if energy is None:
            raise Refused(404, "not_found_error", "no energy is known of this request")
        await respond(send, 200, JSON, json.dumps(energy.json()).encode())

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        counts, every = self.counts, range(len(self.fleet))
        down = [i for i in every if counts.is_down(i)]
        unheard = {i for i in every if counts.heard_s(i) == -math.inf}
        phases = [set(phase.tolist()) for phase in (self.fleet.prefill, self.fleet.decode)]
        status = "ok"
        if self.is_draining:
            status = "draining"
        elif any(phase <= set(down) for phase in phases):
            status = "unavailable"
        elif any(phase <= unheard.union(down) for phase in phases):
            status = "starting"
        told = {"status": status, "down": [self.fleet.ids[i] for i in down]}
        await respond(send, 200 if status == "ok" else 503, JSON, json.dumps(told).encode())

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await respond(send, 200, _METRICS, self.metrics.page())
