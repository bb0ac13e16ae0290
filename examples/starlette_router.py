"""A router of your own that asks a policy where to send each request.

The policy and the counts of requests in flight are plain objects: here behind Starlette and httpx,
as well in FastAPI or any other server. `voltana-ctrl router` does more (both hand-overs of prefill
to decode, retries, limits); this is for those who have a router already.

Run: python examples/starlette_router.py
"""

import asyncio

import httpx
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from voltana_ctrl import FleetSpec, Request, load_profile
from voltana_ctrl.router.energy import EnergyBook
from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.router.policy import PolicyRouters

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")


def make_app(fleet: FleetSpec, urls: list[str], policy: str, transport=None) -> Starlette:
    routers = PolicyRouters(fleet, policy)  # also give it to a ControlLoop as its router
    counts = InFlight(fleet)  # with telemetry: InFlight(fleet, loop)
    energy = EnergyBook(fleet)

    async def complete(http: HttpRequest) -> Response:
        body = await http.json()
        flight = counts.begin("any id", prompt_tok=len(body["prompt"]))
        instance = routers.prefill(Request(prompt_tok=flight.prompt_tok), counts.state())
        counts.enter_prefill(flight, instance)
        try:
            got = await engines.post(f"{urls[instance]}/v1/completions", json=body)
            counts.leave_prefill(flight)
            counts.enter_decode(flight, instance)
            counts.made(
                flight, prompt_tok=None, output_tok=got.json()["usage"]["completion_tokens"]
            )
        finally:
            counts.end(flight)
        headers = {"x-energy": energy.charge(flight).header, "x-instance": fleet.ids[instance]}
        return Response(got.content, got.status_code, headers, media_type="application/json")

    engines = httpx.AsyncClient(transport=transport)
    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


async def engine(http: HttpRequest) -> Response:
    """Stand in for engines, so that the example runs anywhere."""
    tok = (await http.json())["max_tokens"]
    await asyncio.sleep(0.02)
    return JSONResponse({"choices": [{"text": " a" * tok}], "usage": {"completion_tokens": tok}})


async def main() -> None:
    engines = Starlette(routes=[Route("/v1/completions", engine, methods=["POST"])])
    fleet = FleetSpec.parse("3C", PROFILE)
    urls = [f"http://engine-{k}:8000" for k in range(3)]
    app = make_app(fleet, urls, "static-max+jsq", httpx.ASGITransport(engines))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")
    body = {"prompt": [1] * 400, "max_tokens": 64}
    answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6)))
    for got in answers:
        print(f"{got.headers['x-instance']}: joules {got.headers['x-energy']}  (simulated)")


if __name__ == "__main__":
    asyncio.run(main())
