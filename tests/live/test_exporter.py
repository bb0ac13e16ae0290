"""Metrics of a running loop: true, in base units, bounded, and known to the dashboard."""

import json
import re
import urllib.request
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet

pytest.importorskip("prometheus_client", reason="needs the server extra")

from prometheus_client.parser import text_string_to_metric_families

from voltana_ctrl import (
    BackendError,
    ConfigError,
    ControlLoop,
    Decision,
    FleetState,
    MpcController,
    Observation,
    Slo,
    Status,
    TickRecord,
)
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control import StaticController
from voltana_ctrl.estimate import RequestClasses
from voltana_ctrl.live.exporter import Exporter
from voltana_ctrl.sim.plant import PlantSettings
from voltana_ctrl.sim.workload import make_workload

SLO = Slo(ttft_s=0.6, itl_s=0.06)


class Keep:
    def __init__(self):
        self.records = []

    def on_tick(self, record):
        self.records.append(record)


def families(exporter):
    return {one.name: one for one in text_string_to_metric_families(exporter.page().decode())}


def total(family, **labels):
    return sum(
        one.value
        for one in family.samples
        if labels.items() <= one.labels.items() and not one.name.endswith("_created")
    )


@pytest.fixture(scope="module")
def ran():
    workload = make_workload("sharegpt", rate_req_s=12.0, duration_s=20.0, seed=3)
    plant = SimBackend(
        fleet(), workload=workload, seed=3, settings=PlantSettings(log_iterations=4096)
    )
    exporter, keep = Exporter(fleet(), slo=SLO, window_s=10.0), Keep()
    controller = MpcController(fleet(), SLO, period_s=0.2, governed=False)
    with ControlLoop(plant, controller, observers=[exporter, keep]) as loop:
        loop.run(20.0)
    return exporter, keep.records


def test_energy_tokens_and_requests_are_the_sums(ran):
    exporter, records = ran
    found = families(exporter)
    state = records[-1].observation.state
    spent_j = state.energy_j - records[0].observation.state.energy_j
    energy = found["voltana_ctrl_energy_joules"]
    for name, energy_j in zip(fleet().ids, spent_j, strict=True):
        assert total(energy, serving_instance=name) == pytest.approx(energy_j)
    finished = [record.observation.finished for record in records]
    for name, field in (("output_tokens", "output_tok"), ("prompt_tokens", "prompt_tok")):
        expected = sum(getattr(one, field).sum() for one in finished)
        assert total(found[f"voltana_ctrl_{name}"]) == pytest.approx(expected)
    assert total(found["voltana_ctrl_requests"]) == sum(map(len, finished))


def test_energy_of_classes_is_what_was_spent_but_for_what_is_open(ran):
    exporter, records = ran
    charged_j = total(families(exporter)["voltana_ctrl_request_energy_joules"])
    spent_j = sum(record.observation.iterations.energy_j.sum() for record in records)
    assert 0.5 * spent_j < charged_j <= spent_j * 1.001


def test_attainment_and_energy_per_token_are_those_of_the_window(ran):
    exporter, records = ran
    found, last_s = families(exporter), records[-1].observation.state.t_s
    inside = [k for k in range(len(records)) if records[k].observation.state.t_s >= last_s - 10.0]
    finished = [records[k].observation.finished for k in inside]
    n = sum(map(len, finished))
    for objective, met in (
        ("ttft", sum((one.ttft_s <= SLO.ttft_s).sum() for one in finished)),
        ("itl", sum((one.itl_s <= SLO.itl_s).sum() for one in finished)),
    ):
        shown = total(found["voltana_ctrl_attainment_ratio"], objective=objective)
        assert shown == pytest.approx(met / n)
    spent_j = sum(
        (records[k].observation.state.energy_j - records[k - 1].observation.state.energy_j).sum()
        for k in inside
    )
    tok = sum(one.output_tok.sum() for one in finished)
    shown = total(found["voltana_ctrl_energy_per_output_token_joules"])
    assert shown == pytest.approx(spent_j / tok)
    assert total(found["voltana_ctrl_attainment_promise_ratio"]) == 0.99


def test_clocks_margins_and_times_are_told(ran):
    exporter, records = ran
    found, last = families(exporter), records[-1]
    shown = [
        total(found["voltana_ctrl_sm_clock_floor_hertz"], serving_instance=name)
        for name in fleet().ids
    ]
    assert shown == pytest.approx(last.applied.freq_mhz * 1e6)
    assert {one.labels["objective"] for one in found["voltana_ctrl_margin_ratio"].samples} == {
        "ttft", "itl",
    }  # fmt: skip
    times = {one.name: one for one in found["voltana_ctrl_tick_duration_seconds"].samples}
    assert times["voltana_ctrl_tick_duration_seconds_count"].value == len(records)
    assert total(found["voltana_ctrl_decisions"], status="ok") == len(records)


def record(**changes):
    wish = Decision.highest(fleet())
    made = TickRecord(
        number=0, observation=Observation(state=FleetState.idle(2)), proposed=wish, applied=wish
    )
    return replace(made, **changes)


def test_interventions_and_statuses_are_counted():
    exporter = Exporter(fleet())
    bad = replace(Decision.highest(fleet()), status=Status.INFEASIBLE)
    exporter.on_tick(record(proposed=bad, interventions=("replaced: infeasible", "shares")))
    exporter.on_tick(record(interventions=("something new",), missed=3))
    found = families(exporter)
    guard = found["voltana_ctrl_guard_interventions"]
    for kind in ("replaced: infeasible", "shares", "other"):
        assert total(guard, kind=kind) == 1
    assert total(found["voltana_ctrl_decisions"], status="infeasible") == 1
    assert total(found["voltana_ctrl_decision_status"], status="ok") == 1
    assert total(found["voltana_ctrl_decision_status"], status="infeasible") == 0
    assert total(found["voltana_ctrl_ticks_missed"]) == 3


def test_number_of_series_is_bounded():
    exporter = Exporter(fleet(), slo=SLO, classes=RequestClasses(host_classes=4))
    series = []
    for number in range(60):
        notes = {f"note {number}.{k}": 1.0 for k in range(5)}
        said = tuple(f"said {number}.{k}" for k in range(5))
        exporter.on_tick(record(notes=notes, interventions=said))
        series.append(sum(len(one.samples) for one in families(exporter).values()))
    assert series[-1] == series[20] < 250


def test_energy_counter_that_falls_or_a_clock_that_restarts_adds_nothing():
    exporter = Exporter(fleet())
    for t_s, energy_j in ((5.0, 100.0), (6.0, 130.0), (7.0, 20.0), (1.0, 50.0)):
        state = replace(FleetState.idle(2, t_s=t_s), energy_j=np.full(2, energy_j))
        exporter.on_tick(record(observation=Observation(state=state)))
    assert total(families(exporter)["voltana_ctrl_energy_joules"]) == 60.0


def test_two_exporters_know_nothing_of_each_other():
    one, other = Exporter(fleet()), Exporter(fleet())
    one.on_tick(record())
    assert total(families(one)["voltana_ctrl_ticks"]) == 1
    assert total(families(other)["voltana_ctrl_ticks"]) == 0


def test_names_follow_the_conventions(ran):
    exporter, _ = ran
    units = r"(joules|watts|hertz|seconds|ratio|tokens|requests|total|status|up|active|note)"
    for line in exporter.page().decode().splitlines():
        if not line.startswith("# TYPE"):
            continue
        _, _, name, kind = line.split()
        if name.endswith("_created"):
            continue
        assert re.fullmatch(rf"voltana_ctrl_[a-z_]*{units}", name), name
        assert name.endswith("_total") == (kind == "counter"), name


def test_served_over_http():
    exporter = Exporter(fleet())
    port = exporter.serve(0)
    try:
        exporter.on_tick(record())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"voltana_ctrl_ticks_total 1.0" in answer.read()
        with pytest.raises(BackendError, match="cannot be listened on"):
            Exporter(fleet()).serve(port)
    finally:
        exporter.close()
        exporter.close()


def test_bad_window_is_refused():
    with pytest.raises(ConfigError, match="window_s"):
        Exporter(fleet(), window_s=0.0)


def test_dashboard_asks_only_for_what_is_exported(ran):
    exporter, _ = ran
    watching = Exporter(fleet())
    watching.on_tick(record(in_force=False))
    page = exporter.page().decode() + watching.page().decode()
    exported = set(re.findall(r"^(voltana_ctrl_\w+?)(?:\{| )", page, re.MULTILINE))
    text = files("voltana_ctrl.live").joinpath("dashboard.json").read_text("utf-8")
    dashboard = json.loads(text)
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or panel["targets"]
        for target in panel.get("targets", ()):
            names = set(re.findall(r"voltana_ctrl_\w+", target["expr"]))
            assert names, target["expr"]
            assert names <= exported, f"not exported: {sorted(names - exported)}"
            asked |= names
            assert target["expr"].count("(") == target["expr"].count(")")
            labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            for label in labels:
                shown = all(f'{label}="' in line for line in page.splitlines()
                            if re.match(rf"({'|'.join(names)})[{{]", line))  # fmt: skip
                assert shown or f"by ({label})" in target["expr"]
    # And for nearly everything that is.
    plain = {name for name in exported if not name.endswith(("_created", "_count", "_sum"))}
    assert plain - asked <= set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_static_controller_without_notes_is_fine():
    workload = make_workload("fixed", rate_req_s=2.0, duration_s=3.0, seed=0)
    exporter = Exporter(fleet())
    with ControlLoop(
        SimBackend(fleet(), workload=workload), StaticController(fleet()), observers=[exporter]
    ) as loop:
        loop.run(2.0)
    assert total(families(exporter)["voltana_ctrl_ticks"]) == 20


def test_power_that_nobody_could_read_is_no_series():
    exporter = Exporter(fleet())
    told = replace(FleetState.idle(2, freq_mhz=1410.0), power_w=np.array([300.0, 250.0]))
    wish = Decision.highest(fleet())

    def page(state):
        exporter.on_tick(
            TickRecord(number=0, observation=Observation(state=state), proposed=wish, applied=wish)
        )
        return exporter.page().decode()

    text = page(told)
    assert 'voltana_ctrl_power_watts{role="decode",serving_instance="decode-0"} 250.0' in text
    text = page(replace(told, power_w=np.array([300.0, 0.0])))
    assert 'voltana_ctrl_power_watts{role="prefill",serving_instance="prefill-0"} 300.0' in text
    assert 'voltana_ctrl_power_watts{role="decode"' not in text


def test_it_tells_whose_governor_chooses_the_clock():
    exporter = Exporter(fleet(), in_engine={"prefill-0": True, "decode-0": False})
    page = exporter.page().decode()
    name = "voltana_ctrl_engine_governor_active"
    assert f'{name}{{role="prefill",serving_instance="prefill-0"}} 1.0' in page
    assert f'{name}{{role="decode",serving_instance="decode-0"}} 0.0' in page
    assert f"{name}{{" not in Exporter(fleet()).page().decode()
