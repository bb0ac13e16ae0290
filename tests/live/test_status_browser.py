"""The status page in a real browser: the figures of the API, on a phone, without a complaint."""

import pytest

from tests.helpers.browser import Browser
from tests.live.test_status import HELD_UP, TOKEN, full_board, record

pytest.importorskip("starlette", reason="needs the server extra")
pytest.importorskip("uvicorn", reason="needs the server extra")

from voltana_ctrl.live.status_page import StatusPage, page_app
from voltana_ctrl.serving.server import ServerThread

pytestmark = pytest.mark.slow

SHOWN = "window.shown !== undefined && window.shown.number === "
TEXTS = """JSON.stringify(Array.from(document.querySelectorAll("main [data-show]"),
  one => [one.dataset.show, one.dataset.as || "", one.textContent.trim()]))"""
FORMATS = {
    "w": lambda x: f"{x:.0f} W", "mhz": lambda x: f"{x:.0f} MHz", "n": lambda x: f"{x:.0f}",
    "pct": lambda x: f"{100 * x:.1f} %", "s": lambda x: f"{x:.2f} s",
    "ms": lambda x: f"{1000 * x:.0f} ms", "words": str, "": str,
    "force": lambda x: "in force" if x else "not carried out",
    "awake": lambda x: "awake" if x else "parked", "alive": lambda x: "yes" if x else "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def served():
    board = full_board()
    with ServerThread(page_app(StatusPage(board)), what="page") as server:
        yield board, f"http://127.0.0.1:{server.port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def test_every_figure_is_that_of_the_api_and_nothing_is_complained_of(served, browser):
    import json

    board, url = served
    browser.open(url, until=SHOWN + "4")
    told = board.status()
    texts = json.loads(browser.run(TEXTS))
    of_instances = [dict(one) for one in told["instances"]]
    seen, k = set(), -1
    for path, form, text in texts:
        if path == "id":
            k += 1
        value = of_instances[k].get(path) if k >= 0 else told
        if k < 0:
            for key in path.split("."):
                value = value[key]
        seen.add(path)
        if value is None:
            assert text in ("not known", "")
        elif path != "age_s":  # it grows while we look
            assert text == FORMATS[form](value), path
    assert k + 1 == len(of_instances)
    assert {"power.now_w", "latency.ttft_attainment", "clock_mhz", "why", "clock_why"} <= seen
    body = browser.run("document.body.innerText")
    for word in ("0 of 1 decode", "1 of 1 prefill", "Budget 700 W in 60 s", "node n0: heard",
                 "the guard changed the decision: shares", "it coughs", HELD_UP,
                 "its governor chooses between 600 and 1410 MHz"):  # fmt: skip
        assert word in body
    assert browser.run("document.querySelectorAll('#chart polyline').length") == 2
    assert browser.complaints() == []
    assert all(one.startswith((url, "data:")) for one in browser.asked())


def test_it_follows_the_fleet_and_says_when_the_loop_stands_still(served, browser):
    board, url = served
    browser.open(url, until=SHOWN + "4")
    board.on_tick(record(number=5, power_w=(100.0, 150.0)))
    browser.wait(SHOWN + "5")
    shown = "document.querySelector('[data-show=\"power.now_w\"]').textContent"
    assert browser.run(shown) == "250 W"
    browser.wait("document.getElementById('line').textContent.includes('STANDS STILL')")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(served, browser, width):
    _, url = served
    browser.open(url, until="window.shown !== undefined", width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_elsewhere_one_logs_in_once(browser):
    with ServerThread(page_app(StatusPage(full_board(), token=TOKEN)), what="page") as server:
        url = f"http://127.0.0.1:{server.port}/"
        browser.open(url, until="document.querySelector('input[name=token]') !== null")
        browser.run(f"document.querySelector('input').value = '{TOKEN}';"
                    " document.querySelector('form').submit(); 1")  # fmt: skip
        browser.wait("window.shown !== undefined && window.shown.number === 4")
        assert browser.run("document.cookie") == ""
