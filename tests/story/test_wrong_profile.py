"""Engines that do not do what their profile says, under the whole stack: found out, and said.

The engines are emulated, the commands real; the page of the controller tells the story.
"""

import asyncio
import threading
import time

import httpx
import pytest

from tests.helpers.fake_gpus import needs_compiler, seconds_until

pytest.importorskip("uvicorn", reason="needs the server extra")
pytest.importorskip("pynvml", reason="needs the nvml extra")

from voltana_ctrl.cli.demo import answers, stack_on
from voltana_ctrl.engines.emulated.fleet import EmulatedFleet
from voltana_ctrl.engines.emulated.load import play
from voltana_ctrl.sim.workload import make_workload

pytestmark = [needs_compiler, pytest.mark.slow]

LIMIT_S = 120.0
DILATION = 3.0
HIGHEST_MHZ = 1410.0


class Load:
    """Requests that go on until the end, in a thread."""

    def __init__(self, url):
        self._ended = False
        work = make_workload("sharegpt", rate_req_s=8.0, duration_s=600.0, seed=0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._play(url, work)))

    async def _play(self, url, work):
        assert await answers(url, LIMIT_S)
        await play(url, work, dilation=DILATION, stop=lambda: self._ended)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended = True
        self._thread.join(30.0)


def set_pace(fleet, slow_frac):
    for url in fleet.urls:
        httpx.post(f"{url}/emulate", json={"slow_frac": slow_frac}, trust_env=False, timeout=30.0)


def status(stack):
    try:
        return httpx.get(f"{stack.page_url}/v1/status", trust_env=False, timeout=30.0).json()
    except httpx.HTTPError:
        return {"instances": [], "events": [], "plan": None}


def said(stack, text):
    return sum(text in event["text"] for event in status(stack)["events"])


def floors(stack):
    return [one["floor_mhz"] for one in status(stack)["instances"]]


def test_a_wrong_profile_is_refused_and_a_drift_is_answered():
    with EmulatedFleet("2C", dilation=DILATION) as fleet:
        # A quarter slower from the start: nothing is lowered on the word of such a profile.
        set_pace(fleet, 1.25)
        with stack_on(fleet, "mpc") as stack, Load(stack.url):
            lowest_mhz = []

            def is_refused():
                lowest_mhz.extend(mhz for mhz in floors(stack) if status(stack)["plan"])
                return said(stack, "times what the profile") >= 2

            seconds_until(is_refused, LIMIT_S)
            until_s = time.monotonic() + 4.0
            while time.monotonic() < until_s:
                lowest_mhz.extend(floors(stack))
                time.sleep(0.1)
            told = status(stack)
            events = [event["text"] for event in told["events"]]
            assert any("fit a profile with `voltana-ctrl fit`" in text for text in events)
            assert told["plan"]["notes"]["profile_not_believed"] == 2.0
            assert set(lowest_mhz[len(lowest_mhz) // 2 :]) == {HIGHEST_MHZ}
            log = (fleet.folder / "controller.log").read_text()
            assert "its decode iterations take 1.2" in log

            # It becomes what the profile says: now clocks come down.
            set_pace(fleet, 1.0)
            seconds_until(lambda: floors(stack) and max(floors(stack)) < 1200.0, LIMIT_S)
            assert said(stack, "says again") >= 2
            clocks = [one["clock_mhz"] for one in status(stack)["instances"]]
            assert min(clocks) < HIGHEST_MHZ

            # And while clocks are low it drifts.
            set_pace(fleet, 1.3)
            begin_s = time.monotonic()
            seconds_until(lambda: set(floors(stack)) == {HIGHEST_MHZ}, 60.0 * DILATION)
            assert time.monotonic() - begin_s < 60.0 * DILATION
            assert said(stack, "times what the profile") >= 4
            assert status(stack)["plan"]["notes"]["returned_to_highest"] >= 2.0
    assert not any(gpu.locked for gpu in fleet.fake.gpus)
