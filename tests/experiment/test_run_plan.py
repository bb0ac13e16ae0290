"""Runs with work that may wait, prices, announced budgets and sleep: what `compare` counts."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import (
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    Slo,
    compare,
    control,
    load_profile,
)
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.policies import Policy, PolicyParts, find_policy
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Admission, PowerBudget, Rest, Steps

A100 = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
FLEET = FleetSpec.parse("1P2D", A100)
SLO = Slo(ttft_s=0.6, itl_s=0.06)
TIMING = ("sim_wall_s", "decide_p50_s", "decide_p99_s")


def run(policy: str | Policy, **more) -> dict:
    told = {
        "fleet": FLEET, "slo": SLO, "workload": "sharegpt", "rate_req_s": 15.0,
        "duration_s": 40.0, "warmup_s": 5.0, **more,
    }  # fmt: skip
    figures = Run(policy=policy, **told).simulate()
    return {key: value for key, value in figures.items() if key not in TIMING}


def held(rate_req_s: float) -> Policy:
    """Lets in so many a second from the start, and nothing else."""

    def build(fleet, slo, setup) -> PolicyParts:
        first = Decision.highest(fleet)
        return PolicyParts(
            first=replace(first, admission=Admission(rate_req_s=rate_req_s, due_s=20.0))
        )

    return Policy(name="held", summary="", source="", build=build)


def test_cost_is_energy_times_price_block_by_block() -> None:
    plain = run("static-max")
    assert plain["cost"] is plain["co2_g"] is plain["deadline_missed"] is None
    flat = run("static-max", price=Steps.parse("0.36"), co2=Steps.parse("400"))
    assert flat["cost"] == pytest.approx(flat["energy_j"] / 3.6e6 * 0.36)
    assert flat["co2_g"] == pytest.approx(flat["energy_j"] / 3.6e6 * 400.0)
    # Telling the price changes nothing else, and a block has its own energy.
    for key in ("energy_j", "ttft_p99_s", "iterations"):
        assert flat[key] == pytest.approx(plain[key], rel=1e-12)
    blocks = [f"{t}:{int(t in (15, 30))}" for t in (0, 15, 30)]
    later = run("static-max", price=Steps.parse(",".join(blocks)))
    first = run("static-max", price=Steps.parse("0:1,15:0"))
    assert later["cost"] + first["cost"] == pytest.approx(plain["energy_j"] / 3.6e6)
    # Under a control loop, with a budget and details, the same.
    for more in ({"power_budget": PowerBudget.parse("0:2000,20:1900")}, {"detail": True}):
        for policy in ("governors", "pack"):
            told = run(policy, price=Steps.parse("0:2,13:2"), **more)
            assert told["cost"] == pytest.approx(2.0 * told["energy_j"] / 3.6e6)


def test_who_waits_is_due_within_the_window_and_judged_by_that() -> None:
    at_once = run(held(np.inf), defer=(0.4, 1800.0))
    assert at_once["deferred_arrived"] > 100
    assert at_once["deferred_completed"] == at_once["deferred_arrived"]
    assert at_once["deadline_missed"] == at_once["deferred_in_flight"] == 0
    assert at_once["requests_arrived"] == at_once["requests_completed"]
    slow = run(held(0.0), defer=(0.4, 1800.0))
    assert slow["deadline_missed"] == 0
    assert slow["deferred_completed"] == slow["deferred_arrived"] == at_once["deferred_arrived"]
    # Clients get nothing but better by it.
    assert slow["ttft_p99_s"] <= at_once["ttft_p99_s"]
    # Nobody who waits: nothing changes.
    assert run("static-max", defer=(0.0, 60.0)) == run("static-max")
    assert run("bound", defer=(0.4, 60.0))["energy_j"] is None
    waits = Run(
        policy="static-max", fleet=FLEET, slo=SLO, workload="sharegpt", rate_req_s=15.0,
        duration_s=40.0, warmup_s=5.0, defer=(1.0, 1800.0),
    )  # fmt: skip
    due, _ = waits._requests()
    latest_s = np.maximum(45.0, due.arrival_s + waits.grace_s(due))
    assert (due.arrival_s + due.patience_s <= latest_s + 1e-9).all()


def test_the_gate_lets_in_while_there_is_room() -> None:
    fleet = FleetSpec.parse("2P2D", A100)
    inner = control.PackingController(fleet, SLO, period_s=0.2)
    gate = control.SaturationGate(fleet, inner=inner, due_s=30.0)
    idle = FleetState.idle(4)

    def rate(**state) -> float:
        seen = Observation(state=replace(idle, **state))
        decision, _ = gate.decide(seen, gate.init())
        assert decision.admission.due_s == 30.0
        return round(decision.admission.rate_req_s * 0.2, 9)

    assert rate() == 12.0
    assert rate(queue_req=[6.0, 4.0, 0.0, 0.0]) == 2.0
    assert rate(queue_req=[0.0, 0.0, 9.0, 3.0]) == 3.0
    assert rate(kv_used_tok=[0.0, 0.0, 400e3, 400e3]) == 0.0
    assert rate(alive=[True, True, True, False]) == 6.0
    figures = run("gate", rate_req_s=30.0, defer=(0.5, 1800.0))
    assert figures["deferred_completed"] == figures["deferred_arrived"] > 0
    assert figures["deadline_missed"] == 0


def test_a_cut_that_nobody_announced_is_exceeded_for_a_moment() -> None:
    cut = PowerBudget.parse("0:1500,25:420")
    known = run("static-budget", rate_req_s=30.0, power_budget=cut)
    surprise = run("static-budget", rate_req_s=30.0, power_budget=replace(cut, notice_s=0.0))
    assert known["over_budget_frac"] == 0.0
    assert 0.0 < surprise["over_budget_frac"] < 0.05
    near = run("static-budget", rate_req_s=30.0, power_budget=replace(cut, notice_s=1.0))
    assert near["over_budget_frac"] == 0.0


def test_deep_sleep_pays_where_waking_is_free() -> None:
    rests = {"deep_parked": Rest(power_w=36.0), "off": Rest(power_w=20.0, wake_s=5.0)}
    fleet = FleetSpec(tuple(replace(one, **rests) for one in FLEET.instances))
    more = {"rate_req_s": 5.0, "warmup_s": 40.0, "duration_s": 20.0}
    names = ("pack", "pack-deep_parked", "pack-off")
    parked, deep, off = (run(name, fleet=fleet, **more)["energy_j"] for name in names)
    # One decode instance is empty by then, and sleeps for the whole window.
    assert parked - deep == pytest.approx(20.0 * 24.0)
    assert parked - off == pytest.approx(20.0 * 40.0)
    assert find_policy("pack-asleep").knows_budget
    assert run("bound", fleet=fleet)["energy_j"] < run("bound")["energy_j"]


def test_the_command_and_its_json(tmp_path) -> None:
    path = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "voltana_ctrl.cli", "compare", "--fleet", "1P1D", "--rate", "5",
        "--duration", "10", "--warmup", "2", "--policies", "static-max", "--jobs", "1",
        "--roles", "flexible", "--defer", "0.5:60", "--price-kwh", "0:0.2,6:0.4",
        "--co2-g-kwh", "300",
        "--power-budget-w", "0:900,8:500", "--budget-notice-s", "3", "--json", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for head in ("late", "cost", "CO2 [g]"):
        assert head in done.stdout
    found = json.loads(path.read_text())
    assert found["defer"] == [0.5, 60.0]
    assert (found["roles"], found["runs"][0]["role_changes"]) == ("flexible", 0)
    assert found["price"] == [[0.0, 0.2], [6.0, 0.4]]
    assert (found["co2"], found["budget_notice_s"]) == ([[0.0, 300.0]], 3.0)
    assert found["runs"][0]["deadline_missed"] == 0
    assert found["runs"][0]["cost"] > 0.0


def test_a_trace_names_classes_and_patience(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrival_s,prompt_tok,output_tok,service_tier,patience_s\n"
        "0,10,5,flex,600\n1,10,5,default,\n2,10,5,flex,\n"
    )
    trace = read_trace(path)
    assert trace.class_names == ("default", "flex")
    assert trace.request_class.tolist() == [1, 0, 1]
    assert trace.patience_s.tolist() == [600.0, np.inf, np.inf]
    assert trace.deferred("flex", 60.0).patience_s.tolist() == [60.0, np.inf, 60.0]
    path.write_text(
        '{"prompt_len": 3, "output_len": 4, "arrival_s": 0, "class": "batch", "deadline_s": 9}\n'
        '{"prompt_len": 3, "output_len": 4, "arrival_s": 1}\n'
    )
    trace = read_trace(path)
    assert trace.class_names == ("", "batch")
    assert trace.patience_s.tolist() == [9.0, np.inf]
    # A file without such columns is as it was.
    path.write_text("arrival_s,prompt_tok,output_tok\n0,10,5\n1,10,5\n")
    assert read_trace(path).class_names == ()
    for cell, words in (("-1", "patience_s"), ("0", "seconds > 0"), ("soon", "patience_s")):
        path.write_text(f"arrival_s,prompt_tok,output_tok,patience_s\n0,10,5,{cell}\n")
        with pytest.raises(ConfigError, match=words):
            read_trace(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"defer": ("batch", 60.0)}, "class of sharegpt"),
        ({"defer": (2.0, 60.0)}, "share from 0 to 1"),
        ({"defer": (0.5, -1.0)}, "deadline"),
        ({"defer": (0.5, 60.0), "concurrency": 4}, "closed loop wait"),
    ],
)
def test_refuses_before_anything_runs(options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        compare(policies=["static-max"], **options)
    load = make_workload("sharegpt", rate_req_s=5.0, duration_s=100.0, seed=0)
    with pytest.raises(ConfigError, match="class of sharegpt"):
        compare(policies=["static-max"], workload=load, defer=("mail", 60.0))
