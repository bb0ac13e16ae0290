"""What an agent tells people, its log and its metrics: what was read and set, and no more."""

import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet
from tests.helpers.fake_pages import Pages

pytest.importorskip("prometheus_client", reason="needs the server extra")

from voltana_ctrl import (
    ControlLoop,
    Decision,
    FleetState,
    IterationBatch,
    Observation,
    Slo,
    TickRecord,
    cli,
)
from voltana_ctrl.backends import ReplayBackend
from voltana_ctrl.backends.log import log_lines
from voltana_ctrl.engines.endpoints import load_endpoints
from voltana_ctrl.live.exporter import Exporter
from voltana_ctrl.live.governed import node_policy
from voltana_ctrl.live.node_control import Advice
from voltana_ctrl.live.ticklog import TickLog, write_parquet

PAGE = """vllm:num_requests_running{engine="0"} 4.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.01
"""


def record(t_s=0.0, **changes):
    """A tick in which decode-0 made 8 tokens."""
    state = replace(
        FleetState.idle(2, t_s=t_s, freq_mhz=1410.0),
        energy_j=np.full(2, 300.0 * t_s),
        power_w=np.full(2, 300.0),
    )
    one = np.ones(1)
    made = IterationBatch(
        instance=np.ones(1, np.int64), t_s=t_s * one, wall_s=0.02 * one, freq_mhz=1410.0 * one,
        batch_req=8.0 * one, prefill_tok=0.0 * one, kv_tok=4000.0 * one, energy_j=0.0 * one,
    )  # fmt: skip
    wish = Decision.highest(fleet(), floor_mhz=[705.0, 705.0])
    seen = Observation(state=state, iterations=made)
    return TickRecord(number=0, observation=seen, proposed=wish, applied=wish, **changes)


def working(tick):
    """The same with 8 requests that generate."""
    state = replace(
        tick.observation.state,
        running_req=np.array([0.0, 8.0]),
        kv_used_tok=np.array([0.0, 4000.0]),
    )
    return replace(tick, observation=replace(tick.observation, state=state))


def samples(exporter):
    lines = exporter.page().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


@pytest.fixture
def agent(tmp_path, monkeypatch, capsys):
    """Run `voltana-ctrl agent` on engines without GPUs; gives what it said and its log."""
    log = tmp_path / "ticks.jsonl"

    def run(url, *arguments):
        text = "".join(
            f'[[instance]]\nid = "{role}-0"\nrole = "{role}"\n'
            'profile = "a100-sxm-80gb/llama-3.1-8b"\n'
            f'engine = {{ kind = "vllm", url = "{url}" }}\n'
            for role in ("prefill", "decode")
        )
        (tmp_path / "fleet.toml").write_text(text)
        given = ["--fleet", tmp_path / "fleet.toml", "--log", log, "--duration", 1, *arguments]
        monkeypatch.setattr(sys, "argv", ["voltana-ctrl", "agent", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 0, said
        return said, [json.loads(line) for line in log.read_text().splitlines()]

    return run


def test_the_fleet_file_of_the_documentation_is_a_fleet_with_gpus(root, tmp_path):
    page = (root / "docs" / "agent.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "fleet.toml"
    path.write_text(shown)
    spec, endpoints = load_endpoints(path)
    assert spec.ids == ("prefill-0", "decode-0")
    assert all(one.gpus and one.fpm for one in endpoints)
    assert {one.node for one in spec.instances} == {"node0"}


def test_instances_without_gpus_are_named_at_the_start_and_in_the_log(agent):
    with Pages(metrics=PAGE) as pages:
        said, (header, *_) = agent(pages.url)
    warned = [line for line in said.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "no GPUs named for prefill-0, decode-0: clock assumed" in warned[0]
    assert "power unknown" in warned[0]
    assert header["unread"] == ["prefill-0", "decode-0"]


def test_what_is_not_read_is_not_exported():
    told = []
    for unread in ((), ("decode-0",)):
        exporter = Exporter(fleet(), unread=unread)
        exporter.on_tick(record(0.0))
        exporter.on_tick(record(1.0))
        told.append(shown := samples(exporter))
    assert told[0]["voltana_ctrl_energy_per_output_token_joules"] == f"{600.0 / 16.0}"
    for name in ("sm_clock_hertz", "power_watts", "energy_joules_total"):
        there = [key for key in shown if key.startswith(f"voltana_ctrl_{name}")]
        assert len(there) == 1
        assert "prefill-0" in there[0]
    assert shown["voltana_ctrl_energy_per_output_token_joules"] == "NaN"


def test_what_is_not_set_is_advised_and_not_applied(agent, tmp_path):
    with Pages(metrics=PAGE) as pages:
        _, (_, *ticks) = agent(pages.url, "--mode", "advise", "--policy", "static-705")
    assert ticks  # how many in a second a busy machine decides
    for tick in ticks:
        assert tick["applied"] is None
        assert tick["advised"]["freq_mhz"] == [705.0, 705.0]
    replay = ReplayBackend(tmp_path / "ticks.jsonl")
    policy = node_policy(replay.spec, Slo(ttft_s=0.6, itl_s=0.06), "static-705")
    with ControlLoop(replay, policy) as loop:
        for _ in range(len(replay)):
            loop.tick()
    assert replay.mismatches == ()


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="needs pyarrow")
def test_parquet_knows_advised_from_applied(tmp_path):
    path = tmp_path / "ticks.jsonl"
    with TickLog(path, fleet()) as log:
        log.on_tick(record(in_force=False))
        log.on_tick(record())
    write_parquet(path, tmp_path / "ticks.parquet")
    for file in (path, tmp_path / "ticks.parquet"):
        _, advised, applied = (values for _, values in log_lines(file))
        assert advised["applied"] is None
        assert advised["advised"]["freq_mhz"] == [705.0, 705.0]
        assert applied.get("advised") is None
        assert applied["applied"]["freq_mhz"] == [705.0, 705.0]
        assert len(ReplayBackend(file)) == 2


def test_metrics_know_advised_from_applied():
    exporter = Exporter(fleet())
    floor = 'sm_clock_floor_hertz{role="decode",serving_instance="decode-0"}'
    for in_force in (False, True, False):
        exporter.on_tick(record(in_force=in_force))
        shown = samples(exporter)
        assert (f"voltana_ctrl_{floor}" in shown) == in_force
        assert (f"voltana_ctrl_advised_{floor}" in shown) != in_force
    assert shown[f"voltana_ctrl_advised_{floor}"] == "7.05e+08"
    watching = Exporter(fleet(), decides=False)
    watching.on_tick(record(in_force=False))
    assert not any("sm_clock_floor" in name for name in samples(watching))


@pytest.mark.parametrize("unread", [(), ("decode-0",)])
def test_advice_marks_clocks_that_are_assumed(unread):
    said = []
    advice = Advice(fleet(), said.append, every_s=1e-9, unread=unread)
    for t_s in (0.0, 1.0):
        advice.on_tick(working(record(t_s)))
    assert "prefill-0 1410 -> 705 MHz" in said[-1]
    assert ("decode-0 1410 (assumed) -> 705 MHz" in said[-1]) == bool(unread)
    assert ("and the assumed clocks" in said[-1]) == bool(unread)


def test_advice_without_load_says_so_and_expects_nothing():
    said = []
    advice = Advice(fleet(), said.append, every_s=0.5)
    for t_s, tick in enumerate([record(0.0), record(1.0), working(record(2.0)), record(3.0)]):
        advice.on_tick(replace(tick, observation=at(tick.observation, float(t_s))))
    assert ["no load seen yet" in line for line in said] == [True, False, False]
    assert ["% saved" in line for line in said] == [False, True, False]
    assert said[-1].endswith("no load now")


def at(observation, t_s):
    return replace(observation, state=replace(observation.state, t_s=t_s))


def test_advice_names_who_does_not_answer_and_why():
    said = []
    why = {"decode-0": "http://10.0.0.2:8000/metrics: connection refused"}
    advice = Advice(fleet(), said.append, every_s=0.5, problems=lambda: why)
    for t_s, alive in ((0.0, [1, 0]), (1.0, [1, 0]), (2.0, [0, 0])):
        tick = working(record(t_s))
        state = replace(tick.observation.state, alive=np.array(alive, bool))
        advice.on_tick(replace(tick, observation=replace(tick.observation, state=state)))
    gone = f"decode-0 does not answer ({why['decode-0']})"
    assert "prefill-0 1410 -> 705 MHz" in said[0]
    assert all(gone in line for line in said)
    assert said[-1] == f"advice: prefill-0 does not answer (nothing heard of it); {gone}"


def test_agent_tells_the_address_and_the_error_of_an_engine_that_is_down(agent, monkeypatch):
    monkeypatch.setattr(Advice.__init__, "__kwdefaults__", {**Advice.__init__.__kwdefaults__,
                                                            "every_s": 0.4})  # fmt: skip
    said, _ = agent("http://127.0.0.1:9", "--mode", "advise", "--policy", "static-705")
    line = [line for line in said.splitlines() if "advice:" in line][-1]
    assert "prefill-0 does not answer (http://127.0.0.1:9" in line
    assert "refused" in line or "connect" in line.lower()
    assert " W" not in line
