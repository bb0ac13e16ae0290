"""What the router says of itself and of engines that fail, and to pages in a browser."""

import pytest

from tests.router.test_app import BODY, router, wait_for


def test_health_is_told_only_of_engines_that_have_answered():
    with router("2C", probe_s=3600.0) as (client, _, _):
        # The first look is at the start, not a period later.
        wait_for(lambda: client.get("/health").status_code == 200, 10.0)
    with router("1P1D", engines=["http://127.0.0.1:1"] * 2) as (client, _, proxy):
        proxy.counts.clock = lambda: 1e9  # after every rest: nobody is known to be down
        got = client.get("/health")
        assert (got.status_code, got.json()["status"]) == (503, "starting")


def test_a_request_at_which_every_engine_breaks_off_is_not_worth_another_try():
    with router("2C") as (client, engines, _):
        for engine in engines:
            engine.fail = ["hang up"] * 10
        got = client.post("/v1/completions", json=BODY)
        assert got.status_code == 502
        assert "retry-after" not in got.headers


@pytest.mark.parametrize("allowed", [(), ("https://chat.example",), ("*",)])
def test_a_page_in_a_browser_may_call_from_origins_that_are_named(allowed):
    asks = {"origin": "https://chat.example", "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    with router("1C", api_key="k", allow_origins=allowed) as (client, _, _):
        told = client.options("/v1/chat/completions", headers=asks)
        other = client.options("/v1/chat/completions", headers=asks | {"origin": "https://evil"})
        shown = {"origin": asks["origin"], "authorization": "Bearer k"}
        got = client.post("/v1/completions", json=BODY, headers=shown)
    assert got.status_code == 200
    if not allowed:
        assert told.status_code == 405
        assert "access-control-allow-origin" not in got.headers
        return
    assert told.status_code == 200
    assert got.headers["access-control-allow-origin"] in ("*", asks["origin"])
    assert "x-voltana-energy" in got.headers["access-control-expose-headers"]
    assert (other.status_code == 200) == (allowed == ("*",))
