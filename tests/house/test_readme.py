"""The three ways in that the README shows are short, and do what it says."""

import re
import shlex
import tomllib

import httpx
import pytest

from tests.cli.test_router import command
from tests.helpers.fake_engines import install_vllm
from tests.helpers.mock_engine import MockEngine
from voltana_ctrl.engines.in_engine import InEngineSettings


@pytest.fixture(scope="module")
def ways(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    part = text[text.index("## Three ways in") : text.index("## Layout")]
    return [body for _, body in re.findall(r"^```(\w+)\n(.*?)^```$", part, re.M | re.S)]


def test_each_way_in_takes_at_most_fifteen_lines(ways):
    assert len(ways) == 3
    assert all(len(way.splitlines()) <= 15 for way in ways)


def test_the_plugin_is_found_and_configured_as_shown(root, ways, monkeypatch):
    exported = dict(
        pair.split("=", 1)
        for line in ways[1].splitlines()
        if line.startswith("$ export ")
        for pair in shlex.split(line)[2:]
    )
    settings = InEngineSettings.read(exported)
    assert settings.mode == "act"
    assert settings.gpus == ("GPU-8f6d0000",)
    assert settings.slo is not None
    assert settings.slo.itl_s == 0.06
    plugin = install_vllm(monkeypatch)
    path = re.search(r"--scheduler-cls (\S+)", ways[1]).group(1)
    assert path == f"{plugin.__name__}.{plugin.GovernedScheduler.__name__}"
    points = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    assert points["vllm.stat_logger_plugins"] == {
        "voltana_ctrl": f"{plugin.__name__}:{plugin.StatLogger.__name__}"
    }
    assert points["sglang.srt.plugins"] == {"voltana_ctrl": "voltana_ctrl.engines.sglang:register"}


def test_the_router_answers_as_shown(root, ways):
    lines = [shlex.split(line.removeprefix("$ ")) for line in ways[2].splitlines()]
    arguments = lines[0][2 : lines[0].index("--port")]
    curl = lines[1]
    with MockEngine("p") as prefill, MockEngine("d") as decode:
        addresses = {"http://10.0.0.1:8000": prefill.url, "http://10.0.0.2:8000": decode.url}
        arguments = [addresses.get(argument, argument) for argument in arguments]
        with command(root, *arguments) as (_, url):
            answer = httpx.post(
                curl[2].replace("http://127.0.0.1:8790", url),
                headers={"content-type": "application/json"},
                content=curl[curl.index("-d") + 1],
            )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"]
    assert "source=modelled" in answer.headers["x-voltana-energy"]
