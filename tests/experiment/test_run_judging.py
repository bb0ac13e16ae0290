"""How runs are judged: grace, work left for later, windows of a trace, what is said about them."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from voltana_ctrl import ConfigError, FleetSpec, Slo, compare, load_profile
from voltana_ctrl.experiment import Comparison, Run
from voltana_ctrl.experiment.grid import plan_runs
from voltana_ctrl.experiment.uncertainty import interval_lines, savings_intervals
from voltana_ctrl.policies import find_policy
from voltana_ctrl.report import print_table
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.traces import read_trace
from voltana_ctrl.sim.workload import Workload, make_workload

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("1P1D", PROFILE)
SLO = Slo(ttft_s=0.6, itl_s=0.06)
RUN = Run(policy="static-max", fleet=FLEET, slo=SLO, workload="sharegpt", rate_req_s=8.0,
          duration_s=60.0)  # fmt: skip


def long_answers(output_tok, total_s=151.0):
    arrival_s = np.arange(0.0, total_s, 5.0)
    return Workload(
        name="long", arrival_s=arrival_s, prompt_tok=np.full(len(arrival_s), 100),
        output_tok=np.full(len(arrival_s), output_tok), duration_s=total_s,
    )  # fmt: skip


def test_who_keeps_both_promises_is_never_too_late_for_the_judge():
    # 6,000 tokens at 30 ms each take three minutes: within the promise, and not within a minute.
    slow = dataclasses.replace(
        RUN, policy="static-480", workload=long_answers(6000), rate_req_s=None, warmup_s=30.0
    )
    figures = slow.simulate()
    assert figures["itl_p99_s"] < SLO.itl_s
    assert figures["residence_mean_s"] > 61.0
    assert figures["grace_s"] == pytest.approx(0.6 + 5999 * 0.06)
    assert figures["requests_in_flight"] == 0
    assert figures["slo_attainment"] == 1.0
    assert RUN.simulate()["grace_s"] >= 60.0


def test_what_is_left_for_later_is_counted():
    figures = {name: dataclasses.replace(RUN, policy=name).simulate()
               for name in ("static-max", "static-480")}  # fmt: skip
    fast, slow = figures["static-max"], figures["static-480"]
    assert 0 < fast["requests_past_window"] < slow["requests_past_window"]
    assert 0 < fast["tokens_past_window"] < slow["tokens_past_window"]
    # Little's law: what is inside is the rate times the time that a request takes.
    assert slow["requests_past_window"] == pytest.approx(8.0 * slow["residence_mean_s"], rel=0.4)
    # Tokens are made in the window, or carried over one of its edges.
    arrived_tok = _output_of_judged(RUN)
    for one in figures.values():
        made_tok = one["tokens_past_window"] - one["tokens_carried_in"] + one["tokens_out"]
        assert made_tok == pytest.approx(arrived_tok, rel=0.01)


def _output_of_judged(run):
    drawn = make_workload("sharegpt", 8.0, 160.0, run.seed)
    inside = (drawn.arrival_s >= run.warmup_s) & (drawn.arrival_s < run.warmup_s + run.duration_s)
    return drawn.output_tok[inside].sum()


def test_short_windows_and_work_left_are_said():
    found = compare(fleet="1P1D", rates_req_s=[8.0], duration_s=5.0, warmup_s=2.0,
                    policies=["static-max", "static-480"])  # fmt: skip
    said = " ".join(found.notes)
    assert "window of 5 s is shorter" in said
    assert "warm-up of 2 s is shorter" in said
    assert "Left for after the window" in said
    assert "static-480" in said
    assert found.to_dict()["notes"] == list(found.notes)
    usual = compare(fleet="1P1D", rates_req_s=[8.0], duration_s=60.0, warmup_s=30.0,
                    policies=["static-max"])  # fmt: skip
    assert usual.notes == ()


def test_what_was_chosen_by_trial_is_said_and_how_to_run_the_others_on_that_layout():
    found = compare(
        fleet="4C", rates_req_s=[40.0], duration_s=20.0, policies=["static-best", "static-max"]
    )
    best, highest = found.runs
    assert highest["layout"] == "4C"
    assert best["layout"] == "3P1D"
    said = " ".join(found.notes)
    assert f"static-best chose: as 3P1D, {best['choice']} at 40 req/s." in said
    assert "static-best gives the machines of 4C other roles" in said
    assert "--fleet 3P1D" in said
    alone = compare(fleet="1P1D", rates_req_s=[5.0], duration_s=20.0, policies=["static-best"])
    layouts = {run["layout"] for run in alone.runs}
    assert any(note.startswith("static-best chose") for note in alone.notes)
    assert ("--fleet" in " ".join(alone.notes)) == (layouts != {"1P1D"})


def test_what_a_profile_takes_from_another_model_is_repeated():
    memory = "memory: 450000 KV tokens are of llama-3.1-8b, not of own; max_batch: 128, the largest"
    fitted = dataclasses.replace(
        PROFILE, name="gpu/own", sources={"memory": {"error": f"not measured here; {memory}"}}
    )
    usual = {"rates_req_s": [2.0], "duration_s": 30.0, "warmup_s": 30.0, "policies": ["static-max"]}
    said = compare(fleet=FleetSpec.parse("1P1D", fitted), **usual).notes
    assert said == (f"Profile gpu/own: {memory}.",)
    assert compare(fleet=FleetSpec.parse("1P1D", PROFILE), **usual).notes == ()


def test_seeds_take_other_windows_of_a_trace():
    trace = make_workload("azure-conv", 5.0, 1000.0, seed=3)
    asked = {"fleet": "1P1D", "workload": trace, "duration_s": 100.0, "warmup_s": 20.0,
             "policies": ["static-max"]}  # fmt: skip
    found = compare(seeds=4, **asked)
    begins_s = [run["trace_from_s"] for run in found.runs]
    assert begins_s[0] == 0.0
    assert np.diff(sorted(begins_s)).min() > 100.0
    assert len({run["requests_arrived"] for run in found.runs}) > 1
    assert found.notes == ()
    for run in found.runs:
        begin_s = run["trace_from_s"] + 20.0
        inside = (trace.arrival_s >= begin_s) & (trace.arrival_s < begin_s + 100.0)
        assert run["requests_arrived"] == inside.sum()
    whole = compare(seeds=2, **(asked | {"workload": trace.window(140.0)}))
    assert any("same requests" in note for note in whole.notes)
    assert len({run["requests_arrived"] for run in whole.runs}) == 1
    crowded = compare(seeds=9, **asked)
    assert any("share up to" in note for note in crowded.notes)


def test_a_load_in_steps_runs_and_is_named():
    steps = RateSteps.parse("0:4,60:12")
    found = compare(fleet="1P1D", rate_steps=steps, duration_s=60.0, warmup_s=30.0,
                    policies=["static-max", "static-1005"])  # fmt: skip
    assert [run["rate_req_s"] for run in found.runs] == [8.0, 8.0]
    assert found.runs[0]["requests_arrived"] == pytest.approx(480, abs=110)
    assert found.runs[1]["saving_token_frac"] > 0.1
    assert found.to_dict()["rate_steps_req_s"] == [[0.0, 4.0], [60.0, 12.0]]
    assert "12 req/s from 60 s" in found.to_study().conditions
    with pytest.raises(ConfigError, match="no rate and no concurrency"):
        compare(rate_steps=steps, rates_req_s=[5.0])
    with pytest.raises(ConfigError, match="which count"):
        compare(rate_steps=RateSteps.parse("0:5,10:0"), duration_s=30.0, warmup_s=30.0)


def test_policies_believe_another_delay_than_the_plant_has_and_the_table_says_both(monkeypatch):
    told = []
    policy = find_policy("mpc")
    monkeypatch.setattr(
        "voltana_ctrl.experiment.run.find_policy",
        lambda _: dataclasses.replace(
            policy,
            build=lambda fleet, slo, setup: (
                told.append(setup.delay_s) or policy.build(fleet, slo, setup)
            ),
        ),
    )
    found = compare(fleet="1P1D", rates_req_s=[4.0], duration_s=10.0, warmup_s=2.0,
                    policies=["mpc"], settings=PlantSettings(settle_s=0.2),
                    belief_delay_s=0.05)  # fmt: skip
    assert told == [0.05]
    assert found.to_dict()["settings"]["belief_delay_s"] == 0.05
    shown = io.StringIO()
    print_table(found.to_study(), Console(file=shown, width=200))
    said = " ".join(shown.getvalue().split())
    assert "runs 205 ms after" in said
    assert "believe 50 ms" in said


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_the_share_that_meets_both(width):
    found = compare(rates_req_s=[80.0], duration_s=20.0, warmup_s=5.0,
                    policies=["static-1005", "voltanallm-full-ladder"])  # fmt: skip
    shown = io.StringIO()
    print_table(found.to_study(), Console(file=shown, width=width))
    lines = shown.getvalue().splitlines()
    head = next(line for line in lines if "policy" in line)
    assert len(head) <= width
    assert head.split()[-4:-1] == ["TTFT", "ITL", "both"] or head.split()[-3:] == [
        "TTFT", "ITL", "both",
    ]  # fmt: skip
    row = next(line for line in lines if "static-1005" in line)
    assert f"{100.0 * found.runs[0]['slo_attainment']:.1f}" in row.split()


def bursty_trace(tmp_path, seconds=160):
    """Rows of a trace with a burst of 4 s in every 20."""
    path = tmp_path / "bursty.csv"
    rows = [
        f"{second + k / 12:.3f},200,{150 + k}"
        for second in range(seconds)
        for k in range(12 if second % 20 < 4 else 1)
    ]
    path.write_text("arrival_s,prompt_tok,output_tok\n" + "\n".join(rows) + "\n", "utf-8")
    return path


def test_windows_of_a_trace_at_its_own_pace_are_one_load(tmp_path):
    path = bursty_trace(tmp_path)
    found = compare(
        fleet="1P1D", workload=path, duration_s=20.0, warmup_s=5.0, seeds=3,
        policies=["static-max"],
    )  # fmt: skip
    assert len({one["trace_from_s"] for one in found.runs}) == 3
    loads = {one["rate_req_s"] for one in found.runs}
    assert loads == {read_trace(path).rate_req_s}
    assert found.to_study().loads == tuple(loads)


def test_intervals_of_a_trace_bear_the_load_of_its_table(tmp_path):
    grid = plan_runs(
        fleet="1P1D", workload=bursty_trace(tmp_path), duration_s=10.0, warmup_s=5.0,
        policies=["static-max", "static-1005"],
    )  # fmt: skip
    found = savings_intervals(grid, 2)
    assert {one["rate_req_s"] for one in found} == {
        Comparison.of(grid, grid.execute()).runs[0]["rate_req_s"]
    }
    assert "Fewer than 20 draws" in "\n".join(interval_lines(found))


def test_a_burst_that_is_carried_in_is_told(tmp_path):
    path = tmp_path / "burst.csv"
    rows = [f"{8.0 + k / 100:.3f},300,400" for k in range(150)]
    rows += [f"{10 + second},300,100" for second in range(80)]
    path.write_text("arrival_s,prompt_tok,output_tok\n" + "\n".join(rows) + "\n", "utf-8")
    found = compare(
        fleet="1P1D", workload=path, duration_s=12.0, warmup_s=10.0, policies=["static-705"]
    )
    assert any(note.startswith("Carried in from before the window") for note in found.notes)


def test_what_can_never_be_served_and_a_silence_are_told(tmp_path):
    path = tmp_path / "large.csv"
    rows = ["arrival_s,prompt_tok,output_tok", *(f"{k},200,50" for k in range(40)), "41,900000,50"]
    path.write_text("\n".join(rows) + "\n", "utf-8")
    large = compare(
        fleet="1P1D", workload=path, duration_s=30.0, warmup_s=11.5, policies=["static-max"]
    )
    assert any("1 of the judged requests were dropped" in note for note in large.notes)
    path.write_text("\n".join([*rows[:3], "900,200,50"]) + "\n", "utf-8")
    silent = compare(
        fleet="1P1D", workload=path, duration_s=30.0, warmup_s=100.0, policies=["static-max"]
    )
    assert any("no request arrived in the window" in note for note in silent.notes)
