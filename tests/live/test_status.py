"""The status page: its numbers are those of the API, and nobody else may look."""

import json
import logging
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import httpx
import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet

pytest.importorskip("starlette", reason="needs the server extra")
pytest.importorskip("uvicorn", reason="needs the server extra")

from voltana_ctrl import Decision, FleetState, Observation, Slo
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.hub_app import hub_app
from voltana_ctrl.live.orders import Report
from voltana_ctrl.live.reasons import clock_reason
from voltana_ctrl.live.status import LinkState, StatusBoard
from voltana_ctrl.live.status_page import StatusPage, is_loopback, page_app
from voltana_ctrl.serving.server import ServerThread
from voltana_ctrl.types import PowerBudget, RequestBatch, Status, TickRecord

SLO = Slo(ttft_s=0.6, itl_s=0.06)
TOKEN = "0123456789abcdef-token"


class Clock:
    def __init__(self):
        self.t_s = 100.0

    def __call__(self):
        return self.t_s


def record(number=0, t_s=0.0, power_w=(200.0, 300.0), done=None, said=(), **changes):
    state = replace(
        FleetState.idle(2, t_s=t_s), power_w=np.array(power_w), freq_mhz=np.array([705.0, 1410.0]),
        running_req=np.array([0.0, 7.0]), queue_req=np.array([2.0, 0.0]),
        kv_used_tok=np.array([0.0, 0.25 * fleet().instances[1].kv_capacity_tok]), **changes,
    )  # fmt: skip
    decided = replace(
        Decision.highest(fleet(), floor_mhz=[600.0, 900.0]), active=[True, False],
        route_frac=[1.0, 0.0],
    )  # fmt: skip
    return TickRecord(
        number=number, observation=Observation(state=state, finished=done), proposed=decided,
        applied=decided, interventions=said,
        notes={"margin_ttft_frac": 0.02, "margin_itl_frac": 0.05},
    )  # fmt: skip


def finished(ttft_s, itl_s):
    ones = np.ones(len(ttft_s))
    return RequestBatch(
        request=0 * ones, request_class=0 * ones, prompt_tok=9 * ones, output_tok=9 * ones,
        ttft_s=ttft_s, itl_s=itl_s, prefill_instance=0 * ones, decode_instance=ones,
    )  # fmt: skip


HELD_UP = "its profile is compared with its engine first"


def full_board(clock=None):
    """A board with something in every field."""
    budget = PowerBudget(steps=((0.0, 900.0), (60.0, 700.0)))
    board = StatusBoard(
        fleet(), SLO, power_budget=budget, problems=lambda: {"prefill-0": "it coughs"},
        links=lambda: [LinkState(kind="node", name="n0", heard_s=0.2, up=True)],
        held_up=lambda: {"decode-0": HELD_UP}, now_s=clock or time.monotonic,
    )  # fmt: skip
    board.on_tick(record(number=4, done=finished([0.2, 0.9, 0.3], [0.02, 0.03, 0.03]),
                         said=("shares",)))  # fmt: skip
    return board


def test_a_board_tells_what_was_seen_and_decided():
    told = full_board().status()
    assert told["power"]["now_w"] == 500.0
    assert told["power"]["budget_w"] == 900.0
    assert told["power"]["highest_clock_w"] > 100.0
    assert told["latency"]["ttft_attainment"] == pytest.approx(2 / 3, abs=1e-4)
    assert told["latency"]["itl_attainment"] == 1.0
    assert told["latency"]["judged_req"] == 3
    assert told["margins"] == {"ttft_frac": 0.02, "itl_frac": 0.05}
    assert told["plan"]["awake"] == {"prefill": [1, 1], "decode": [0, 1]}
    assert told["plan"]["budget_steps"] == [{"in_s": 60.0, "limit_w": 700.0}]
    assert told["events"][0]["text"] == "the guard changed the decision: shares"
    first, second = told["instances"]
    assert (first["clock_mhz"], first["floor_mhz"], first["ceiling_mhz"]) == (705.0, 600.0, 1410.0)
    assert (first["problem"], second["problem"]) == ("it coughs", None)
    assert second["kv_frac"] == 0.25
    assert second["why"] == "7 requests left to finish"
    assert second["clock_why"] == HELD_UP
    assert "its governor chooses between 600 and 1410 MHz" in first["clock_why"]
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def asked(clock_mhz, ceiling_mhz=1410.0, status=Status.OK, **changes):
    """A tick that asks for this of everybody."""
    decided = Decision.highest(
        fleet(), floor_mhz=np.full(2, clock_mhz), ceiling_mhz=np.full(2, ceiling_mhz)
    )
    applied = replace(decided, status=status)
    return replace(record(), proposed=decided, applied=applied, **changes)


LEAST = replace(asked(600.0), proposed=asked(450.0).applied)
GONE = replace(record(), observation=record(alive=np.array([True, False])).observation)


@pytest.mark.parametrize(
    ("tick", "told", "words"),
    [
        (asked(1410.0), {}, "the policy asks for the highest clock at its load"),
        (asked(600.0), {}, "its governor chooses between 600 and 1410 MHz, by its batch"),
        (asked(600.0), {"held_up": {"decode-0": HELD_UP}}, HELD_UP),
        (LEAST, {"held_up": {"decode-0": HELD_UP}}, "between 600 and 1410 MHz; `--min-mhz` keeps"),
        (asked(600.0), {"mode": "advise"}, "mode advise: nothing is set"),
        (asked(600.0, in_force=False), {}, "the hardware was given back"),
        (asked(1410.0, status=Status.STALE), {}, "no decision could be made: .*readings are too"),
        (asked(900.0, 900.0), {"budgeted": True}, "held to 900 MHz at most by the power budget"),
        (asked(900.0, 900.0), {}, "held to 900 MHz at most by a power limit, or by the policy"),
        (asked(600.0, 900.0), {}, "its governor chooses between 600 and 900 MHz"),
        (asked(600.0, notes={"clamped_decode-0_mhz": 1200.0}), {}, "its GPU reaches 1200 MHz at"),
        (asked(1410.0, notes={"switchback_policy": 0.0}), {}, "this block of the switchback"),
        (GONE, {}, "it does not answer"),
    ],
)
def test_why_an_instance_has_its_clock_is_told_in_words(tick, told, words):
    assert re.search(words, clock_reason(1, tick, fleet(), **told))


def test_what_full_clock_would_draw_more_is_told_of_a_minute_and_not_of_a_moment():
    """A batch that ends between reading and prediction says nothing of what is saved."""
    clock = Clock()
    board = StatusBoard(fleet(), SLO, now_s=clock)
    seen = record()
    state = seen.observation.state
    shares = []
    for k in range(400):
        power_w = np.array([100.0, 100.0 if k % 2 else 300.0])
        seen = replace(seen, observation=replace(
            seen.observation, state=replace(state, power_w=power_w)))  # fmt: skip
        board.on_tick(seen)
        power = board.status()["power"]
        shares.append((power["below_frac"], 1.0 - power["now_w"] / power["highest_clock_w"]))
        clock.t_s += 0.5
    told, moments = np.array(shares[200:]).T
    assert np.ptp(moments) > 0.2
    assert np.ptp(told) < 0.02
    assert told.mean() == pytest.approx(moments.mean(), abs=0.01)


def test_history_attainment_and_events_forget_the_old():
    clock = Clock()
    board = StatusBoard(fleet(), SLO, window_s=60.0, now_s=clock)
    for k in range(9000):
        board.on_tick(record(number=k, done=finished([2.0], [0.01]) if k == 0 else None))
        clock.t_s += 0.5
    points = board.history()
    assert len(points) == 720
    assert points[0][0] == pytest.approx(3600.0, abs=10.0)
    assert {point[1] for point in points} == {500.0}
    assert board.status()["latency"]["judged_req"] == 0
    assert board.status()["latency"]["ttft_attainment"] is None
    for k in range(200):
        board.note(f"event {k // 100}")
    assert [one["times"] for one in board.status()["events"]] == [100, 100]


def test_events_that_take_turns_do_not_push_out_the_others():
    board = StatusBoard(fleet(), SLO)
    board.note("an engine restarted")
    for k in range(400):
        board.note("replaced: stale" if k % 2 else "x" * 600)
    told = [(one["text"][:15], one["times"]) for one in board.status()["events"]]
    assert told == [("replaced: stale", 200), ("x" * 15, 200), ("an engine resta", 1)]
    for k in range(100):
        board.note(f"event {k}")
    told = board.status()["events"]
    assert [one["text"] for one in told] == [f"event {k}" for k in range(99, 39, -1)]


def test_warnings_of_other_parts_are_events():
    board = StatusBoard(fleet(), SLO)
    logger = logging.getLogger("voltana_ctrl.live.descent")
    logging.getLogger("voltana_ctrl").addHandler(board)
    try:
        logger.warning("voltana-ctrl: %s: back to the highest clock", "decode-0")
        logger.info("not worth it")
    finally:
        logging.getLogger("voltana_ctrl").removeHandler(board)
    (event,) = board.status()["events"]
    assert event["text"] == "decode-0: back to the highest clock"


def test_clock_and_power_that_nobody_reads_are_not_told():
    board = StatusBoard(fleet(), SLO, unread=("decode-0",))
    board.on_tick(record())
    told = board.status()
    assert told["power"]["now_w"] == 200.0
    assert (told["instances"][1]["clock_mhz"], told["instances"][1]["power_w"]) == (None, None)


class Shown(HTMLParser):
    """What the page binds to the API: paths at the top, and paths of an instance."""

    def __init__(self):
        super().__init__()
        self.top, self.instance, self.inside = set(), set(), False
        self.links = []

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.inside |= tag == "template"
        if "data-show" in told:
            (self.instance if self.inside else self.top).add(told["data-show"])
        self.links += [told[name] for name in ("src", "href") if name in told]

    def handle_endtag(self, tag):
        self.inside &= tag != "template"


def page_text():
    return files("voltana_ctrl.live").joinpath("status.html").read_text(encoding="utf-8")


def test_the_page_shows_what_the_api_tells_and_nothing_else():
    shown = Shown()
    shown.feed(page_text())
    told = full_board().status()
    for path in shown.top:
        value = told
        for key in path.split("."):
            value = value[key]
        assert value is not None, path
    assert shown.instance == set(told["instances"][0])
    top = {f"{part}.{key}" for part in ("power", "latency", "slo", "margins") for key in told[part]}
    assert top <= shown.top
    script = re.search(r"<script>(.*?)</script>", page_text(), re.DOTALL)[1]
    for part in set(told) - {"schema"}:
        assert f"told.{part}" in script or any(one.split(".")[0] == part for one in shown.top), part
    # It fetches nothing from elsewhere.
    assert shown.links == ["data:,"]
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")


def get(server, path="/", **headers):
    url = f"http://127.0.0.1:{server.port}{path}"
    return httpx.get(url, headers=headers, trust_env=False, timeout=10.0)


def test_on_loopback_everybody_may_look_by_a_name_of_loopback():
    with ServerThread(page_app(StatusPage(full_board())), what="page") as server:
        answer = get(server)
        assert answer.status_code == 200
        assert answer.text == page_text()
        assert "script-src 'sha256-" in answer.headers["content-security-policy"]
        told = get(server, "/v1/status").json()
        assert told["power"]["now_w"] == 500.0
        assert len(get(server, "/v1/history").json()) == 1
        # A name of elsewhere that leads here is another page's way in.
        for path in ("/", "/v1/status", "/v1/history", "/v1/events"):
            assert get(server, path, host="evil.example:80").status_code == 403
        assert get(server, host=f"localhost:{server.port}").status_code == 200


def test_elsewhere_the_token_becomes_a_cookie_that_scripts_cannot_read():
    page = StatusPage(full_board(), token=TOKEN)
    with ServerThread(page_app(page), what="page") as server:
        base = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=base, trust_env=False, timeout=10.0) as client:
            answer = client.get("/")
            assert (answer.status_code, answer.headers["location"]) == (303, "/login")
            for path in ("/v1/status", "/v1/history", "/v1/events"):
                assert client.get(path).status_code == 401
            assert client.post("/login", data={"token": "guessed"}).status_code == 401
            assert client.post("/login", content=b"x" * 5000).status_code == 413
            answer = client.post("/login", data={"token": TOKEN})
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            cookie = answer.headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=strict" in cookie
            assert TOKEN not in cookie
            assert client.get("/").status_code == 200
            assert client.get("/v1/status").json()["policy"] == "mpc"
        assert get(server, "/v1/status", authorization=f"Bearer {TOKEN}").status_code == 200
        # Nothing here changes anything.
        assert httpx.put(f"{base}/v1/status", trust_env=False).status_code == 405


def test_events_follow_one_another_and_end_with_the_page():
    page = StatusPage(full_board())
    with ServerThread(page_app(page), what="page") as server:
        url = f"http://127.0.0.1:{server.port}/v1/events"
        with httpx.stream("GET", url, trust_env=False, timeout=10.0) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = (line for line in answer.iter_lines() if line)
            for _ in range(2):
                told = json.loads(next(lines).removeprefix("data: "))
                assert told["instances"][0]["id"] == "prefill-0"
            page.close()
            assert len(list(lines)) <= 1
        assert httpx.get(url, trust_env=False, timeout=10.0).text == ""


def test_a_controller_serves_the_page_beside_its_reports():
    hub = HubBackend(fleet())
    hub.apply(Decision.highest(fleet()))
    board = StatusBoard(fleet(), SLO, problems=hub.problems, links=hub.links, routed=hub.routed)
    hub.take(
        Report(kind="node", sender="n0", start="a", number=0, ids=("decode-0",),
               observation=Observation(state=FleetState.idle(1)),
               problems={"decode-0": "its page is late"}, delay_s={"decode-0": 0.04})
    )  # fmt: skip
    assert hub.delay_s() == {"decode-0": 0.04}
    seen = hub.read()
    decided = Decision.highest(fleet())
    board.on_tick(TickRecord(number=0, observation=seen, proposed=decided, applied=decided))
    with ServerThread(hub_app(hub, TOKEN, page=StatusPage(board)), what="controller") as server:
        told = get(server, "/v1/status").json()
        assert get(server, "/v1/health").status_code == 200
    assert told["links"][0]["name"] == "n0"
    assert [one["problem"] for one in told["instances"]] == ["no node reports it",
                                                             "its page is late"]  # fmt: skip
    assert "no router of ours obeys" in told["instances"][1]["why"]


@pytest.mark.parametrize(("host", "ours"), [("127.0.0.1", True), ("::1", True), ("[::1]", True),
                                            ("localhost", True), ("0.0.0.0", False),
                                            ("localhost.evil.example", False)])  # fmt: skip
def test_loopback_is_told_from_elsewhere(host, ours):
    assert is_loopback(host) == ours
