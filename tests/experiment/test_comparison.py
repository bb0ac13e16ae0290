import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from voltana_ctrl import ConfigError, Decision, FleetSpec, Slo, compare, load_profile
from voltana_ctrl.experiment import SCHEMA
from voltana_ctrl.policies import HEADLINE
from voltana_ctrl.sim.workload import Workload, make_workload

SHORT = {"duration_s": 20.0, "warmup_s": 5.0}
TIMING = ("sim_wall_s", "decide_p50_s", "decide_p99_s")
#: Keys that the interface promises for a run.
PROMISED = """
policy rate_req_s seed window_s energy_j mean_power_w energy_prefill_j energy_decode_j
energy_idle_j energy_transfer_j energy_per_token_j bound_gap_closed ttft_attainment
itl_attainment slo_attainment ttft_p50_s ttft_p99_s itl_p50_s itl_p99_s requests_arrived
requests_completed requests_in_flight requests_dropped tokens_out mean_batch
mean_freq_prefill_mhz mean_freq_decode_mhz clock_changes active_decode_mean
guard_interventions decide_p50_s decide_p99_s iterations sim_wall_s regime
""".split()  # noqa: SIM905


def no_timing(runs):
    return [{k: v for k, v in run.items() if k not in TIMING} for run in runs]


@pytest.fixture(scope="module")
def result():
    return compare(rates_req_s=[10.0, 40.0], seeds=2, **SHORT)


def test_json_has_the_promised_keys_and_no_nan(result, tmp_path):
    result.write_json(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["schema"] == SCHEMA == "voltana-ctrl/compare/2"
    assert set(data) == {
        "schema",
        "version",
        "versions",
        "command",
        "complete",
        "runs_planned",
        "fleet",
        "profile",
        "workload",
        "seeds",
        "slo",
        "rate_steps_req_s",
        "settings",
        "notes",
        "arrivals",
        "faults",
        "power_budget_w",
        "budget_notice_s",
        "defer",
        "price",
        "co2",
        "roles",
        "uncertainty",
        "runs",
    }
    assert len(data["runs"]) == len(HEADLINE) * 2 * 2
    for run in data["runs"]:
        assert set(PROMISED) <= set(run)


def test_requests_conserve_and_energy_parts_sum(result):
    for run in result.runs:
        if run["policy"] == "bound":
            assert run["requests_arrived"] is None
            continue
        parts = [run[f"energy_{part}_j"] for part in ("prefill", "decode", "idle", "transfer")]
        assert sum(parts) == pytest.approx(run["energy_j"], rel=1e-12)
        assert run["requests_arrived"] == (
            run["requests_completed"] + run["requests_in_flight"] + run["requests_dropped"]
        )
        assert run["requests_arrived"] > 100
        assert run["mean_power_w"] == pytest.approx(run["energy_j"] / run["window_s"])


def test_policies_see_the_same_requests(result):
    arrived = {}
    for run in result.runs:
        if run["policy"] != "bound":
            key = run["rate_req_s"], run["seed"]
            assert arrived.setdefault(key, run["requests_arrived"]) == run["requests_arrived"]
    assert len(set(arrived.values())) > 1


def test_gap_closed_runs_from_voltanallm_to_the_bound(result):
    for run in result.runs:
        if run["policy"] == "voltanallm":
            assert run["bound_gap_closed"] == 0.0
        elif run["policy"] == "bound":
            assert run["bound_gap_closed"] == 1.0
        else:
            assert run["bound_gap_closed"] is not None
    alone = compare(rates_req_s=[10.0], policies=["static-max"], **SHORT)
    assert alone.runs[0]["bound_gap_closed"] is None


def test_same_seed_same_figures_whatever_the_executor(result):
    again = compare(rates_req_s=[10.0, 40.0], seeds=2, **SHORT)
    assert no_timing(again.runs) == no_timing(result.runs)
    with ThreadPoolExecutor(4) as threads:
        spread = compare(rates_req_s=[10.0, 40.0], seeds=2, executor=threads, **SHORT)
    assert no_timing(spread.runs) == no_timing(result.runs)


@pytest.mark.slow
def test_four_processes_give_the_figures_of_one(result):
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        spread = compare(rates_req_s=[10.0, 40.0], seeds=2, executor=pool, **SHORT)
    assert no_timing(spread.runs) == no_timing(result.runs)


def test_progress_is_told(result):
    told = []
    compare(
        rates_req_s=[10.0], policies=["static-max", "bound"],
        on_progress=lambda done, total: told.append((done, total)), **SHORT,
    )  # fmt: skip
    assert told == [(0, 2), (1, 2), (2, 2)]


class Stepping:
    """Python policy: lowers the clocks after 10 s; a router too."""

    def __init__(self, fleet, slo):
        self.fleet = fleet

    def init(self):
        return 0

    def decide(self, observation, memory):
        floor_mhz = None if observation.state.t_s < 10.0 else np.full(len(self.fleet), 900.0)
        decision = Decision.highest(
            self.fleet, t_s=observation.state.t_s, floor_mhz=floor_mhz, ceiling_mhz=floor_mhz
        )
        return decision, memory + 1


class LastInstance:
    def __init__(self, fleet, slo):
        self.last = int(fleet.decode[-1])

    def route(self, request, state):
        return self.last

    def update(self, decision):
        pass


def test_python_policies_run_unchanged():
    result = compare(
        rates_req_s=[10.0], policies=[f"{__name__}:Stepping", f"{__name__}:LastInstance"], **SHORT
    )
    stepping, routed = result.runs
    assert 900.0 < stepping["mean_freq_decode_mhz"] < 1410.0
    assert stepping["decide_p50_s"] > 0.0
    assert stepping["requests_completed"] == stepping["requests_arrived"]
    assert routed["decide_p50_s"] is None
    # All work on one of two instances: its batch is what both had together, and more.
    assert routed["mean_batch"] > 20.0
    assert routed["requests_completed"] == routed["requests_arrived"]


def test_closed_loop_has_no_rate_and_keeps_its_clients():
    result = compare(concurrency=64, policies=["static-max", "bound"], **SHORT)
    run, bound = result.runs
    assert run["regime"] == "closed_loop"
    assert run["rate_req_s"] is None
    assert 20.0 < run["mean_batch"] <= 32.0
    assert bound["energy_j"] is None


def test_a_trace_is_run_at_its_own_pace_or_rescaled():
    trace = make_workload("sharegpt", rate_req_s=20.0, duration_s=60.0, seed=3)
    own, fast = (
        compare(workload=trace, rates_req_s=rates, policies=["static-max"], **SHORT).runs[0]
        for rates in (None, [40.0])
    )
    assert own["rate_req_s"] == pytest.approx(20.0, rel=0.2)
    assert fast["rate_req_s"] == 40.0
    assert fast["requests_arrived"] > 1.5 * own["requests_arrived"]


def test_requests_that_fit_nowhere_are_dropped_and_counted():
    workload = Workload(
        name="huge", arrival_s=[0.0, 1.0, 2.0], prompt_tok=[100, 500_000, 100],
        output_tok=[10, 10, 10], duration_s=30.0,
    )  # fmt: skip
    run = compare(workload=workload, policies=["static-max"], duration_s=20.0, warmup_s=0.0).runs[0]
    assert (run["requests_arrived"], run["requests_completed"]) == (3, 2)
    assert run["requests_dropped"] == 1
    assert run["slo_attainment"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fleet": "0P1D"}, "fleet"),
        ({"fleet": "none.toml"}, "cannot be read"),
        ({"profile": "a100"}, "profile"),
        ({"workload": "none.csv"}, "workload"),
        ({"rates_req_s": []}, "rate"),
        ({"rates_req_s": [0.0]}, "rate"),
        ({"rates_req_s": [10.0], "concurrency": 4}, "both"),
        ({"concurrency": 0}, "concurrency"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"warmup_s": -1.0}, "warmup_s"),
        ({"tick_s": 0.0}, "tick_s"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 10**9}, "seeds"),
        ({"duration_s": 1e12}, "duration_s"),
        ({"rates_req_s": [1e300]}, "rate"),
        ({"tick_s": 1e-30}, "tick_s"),
        ({"fleet": "99999P99999D"}, "fleet"),
        ({"policies": []}, "policies"),
        ({"policies": ["static-max", "none"]}, "no such policy"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(change, message):
    ran = []
    with pytest.raises(ConfigError, match=message):
        compare(on_progress=lambda *told: ran.append(told), **{**SHORT, **change})
    assert ran == []


def test_a_trace_shorter_than_the_window_is_refused_with_what_would_fit():
    trace = make_workload("sharegpt", rate_req_s=20.0, duration_s=20.0, seed=3)
    with pytest.raises(ConfigError, match=r"shorten --duration to at most 15"):
        compare(workload=trace, policies=["static-max"], **SHORT)


def test_heterogeneous_fleet_from_toml(tmp_path):
    path = tmp_path / "mixed.toml"
    path.write_text(
        '[[instance]]\nrole = "prefill"\nprofile = "h100-sxm-80gb/llama-3.1-8b"\n'
        '[[instance]]\nrole = "decode"\nprofile = "a100-sxm-80gb/llama-3.1-8b-2026-11"\n'
        '[[instance]]\nrole = "decode"\nprofile = "h100-sxm-80gb/llama-3.1-8b"\n'
    )
    result = compare(
        fleet=str(path), rates_req_s=[10.0], policies=["static-max", "voltanallm-jsq", "bound"],
        **SHORT,
    )  # fmt: skip
    static, volta, bound = (run["mean_power_w"] for run in result.runs)
    assert bound < volta < static
    assert result.profile == "h100-sxm-80gb/llama-3.1-8b, a100-sxm-80gb/llama-3.1-8b-2026-11"


#: Fleet watts of an independent simulation of the reference scenario (2P2D, A100,
#: Llama-3.1-8B, sharegpt; no actuation delay; 3 seeds of 600 s), and attainment in percent.
INDEPENDENT = {
    10: {"static-max": 762, "static-1005": 585, "voltanallm": 584, "voltanallm-full-ladder": 399},
    20: {"static-max": 873, "static-1005": 655, "voltanallm": 653, "voltanallm-full-ladder": 482},
    35: {"static-max": 1032, "static-1005": 755, "voltanallm": 750, "voltanallm-full-ladder": 608},
    50: {"static-max": 1184, "static-1005": 844, "voltanallm": 838, "voltanallm-full-ladder": 740},
    65: {"static-max": 1321, "static-1005": 927, "voltanallm": 922, "voltanallm-full-ladder": 875},
    80: {"static-max": 1443, "static-1005": 990, "voltanallm": 1075,
         "voltanallm-full-ladder": 1057},
}  # fmt: skip
VOLTANALLM_TTFT = {10: 1.0, 20: 1.0, 35: 1.0, 50: 0.999, 65: 0.993, 80: 0.962}
FLUID_BOUND_FRAC = {10: 0.61, 20: 0.67, 35: 0.75, 50: 0.86, 65: 0.92, 80: 0.92}


@pytest.mark.slow
@pytest.mark.parametrize("delayed", [False, True], ids=["no-delay", "default-delay"])
def test_reference_scenario_agrees_with_an_independent_simulation(delayed):
    from voltana_ctrl.sim.plant import PlantSettings

    settings = PlantSettings() if delayed else PlantSettings(actuation_s=0.0, settle_s=0.0)
    policies = ["static-max", "static-1005", "voltanallm", "voltanallm-full-ladder", "bound"]
    result = compare(
        profile="a100-sxm-80gb/llama-3.1-8b-2026-11",  # whose coefficients the other one has
        rates_req_s=list(map(float, INDEPENDENT)), seeds=3, duration_s=600.0, warmup_s=30.0,
        policies=policies, settings=settings,
    )  # fmt: skip
    mean = {}
    for rate in INDEPENDENT:
        print(f"\n{rate} req/s")
        for policy in policies:
            runs = [r for r in result.runs if (r["policy"], r["rate_req_s"]) == (policy, rate)]
            power_w = np.mean([run["mean_power_w"] for run in runs])
            mean[rate, policy] = power_w
            if policy == "bound":
                print(f"  bound {power_w:7.1f} W {power_w / mean[rate, 'voltanallm']:.3f}")
                continue
            ttft, itl = (np.mean([r[f"{k}_attainment"] for r in runs]) for k in ("ttft", "itl"))
            mean[rate, policy, "ttft"], mean[rate, policy, "itl"] = ttft, itl
            there_w = INDEPENDENT[rate][policy]
            print(
                f"  {policy:23s} {power_w:7.1f} W (there {there_w}), saving"
                f" {1 - power_w / mean[rate, 'static-max']:6.1%}, TTFT {ttft:.4f} ITL {itl:.4f}"
            )
            ratio = power_w / mean[rate, "static-max"]
            there = there_w / INDEPENDENT[rate]["static-max"]
            assert ratio == pytest.approx(there, rel=0.03)
            assert power_w == pytest.approx(there_w, rel=0.03)
        bound_frac = mean[rate, "bound"] / mean[rate, "voltanallm"]
        assert bound_frac == pytest.approx(FLUID_BOUND_FRAC[rate], abs=0.01)
        assert mean[rate, "voltanallm", "ttft"] == pytest.approx(VOLTANALLM_TTFT[rate], abs=0.01)
        saving = 1 - mean[rate, "voltanallm"] / mean[rate, "static-max"]
        if rate <= 65:
            assert 0.20 <= saving <= 0.36
            assert mean[rate, "voltanallm", "itl"] >= 0.99
    assert mean[80, "static-1005", "itl"] < 0.5
    assert mean[80, "static-max", "itl"] >= 0.99


def test_slo_given_is_slo_reported():
    slo = Slo(ttft_s=1.0, itl_s=0.1, attainment=0.9)
    result = compare(
        fleet=FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")),
        rates_req_s=[5.0], policies=["static-max"], slo=slo, **SHORT,
    )  # fmt: skip
    assert result.to_dict()["slo"] == {"ttft_s": 1.0, "itl_s": 0.1, "attainment": 0.9}
