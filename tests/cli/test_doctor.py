"""The doctor looks at the engines of a fleet, too: who answers, and what their pages can tell."""

import json

from tests.engines.test_latency import page
from tests.helpers.fake_pages import Pages
from voltana_ctrl.cli.doctor import _engines, _lines

FLEET = """
[[instance]]
id = "both-0"
role = "colocated"
profile = "a100-sxm-80gb/llama-3.1-8b"
engine = {{ kind = "vllm", url = "{url}", fpm = "tcp://127.0.0.1:9" }}

[[instance]]
id = "both-1"
role = "colocated"
profile = "a100-sxm-80gb/llama-3.1-8b"
engine = {{ kind = "vllm", url = "http://127.0.0.1:9" }}
"""


def test_engines_are_heard_or_not_and_promises_inside_a_bucket_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("voltana_ctrl.cli.doctor._ANSWER_S", 1.5)
    busy = 'vllm:num_requests_running{engine="0"} 4.0\nvllm:num_requests_waiting{engine="0"} 1.0\n'
    with Pages(metrics=busy + page("vllm", [0.2, 0.3], [0.03, 0.04])) as pages:
        (tmp_path / "fleet.toml").write_text(FLEET.format(url=pages.url))
        told = _engines(tmp_path / "fleet.toml", "ttft=0.6,itl=0.06")
    first, second = told["engines"]
    assert (first["answers"], first["running_req"], first["queue_req"]) == (True, 4.0, 1.0)
    assert not second["answers"]
    assert json.loads(json.dumps(told)) == told
    text = "\n".join(_lines(told))
    assert f"engine both-0: vllm at {pages.url} answers: 4 requests run, 1 wait" in text
    assert "engine both-1: vllm at http://127.0.0.1:9 does not answer; " in text
    assert "ITL comes from the histograms of 1 engine" in text
    assert "a request counts as missed from 0.05 s on" in text
    assert "it leaves out the router, and the hand-off" in text
    assert "no forward-pass metrics are heard" in text
