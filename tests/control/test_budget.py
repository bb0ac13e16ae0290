"""Power budgets: the value, clocks that keep one, and what compare reports of it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import ConfigError, FleetSpec, FleetState, Observation, compare, load_profile
from voltana_ctrl.cli import app
from voltana_ctrl.control import StaticBudgetController, UniformCeiling, highest_power_w
from voltana_ctrl.laws import decode_j, decode_s
from voltana_ctrl.profiles import list_profiles
from voltana_ctrl.sim.plant import Plant
from voltana_ctrl.sim.power import PowerMeter
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import PowerBudget

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
FLEET = FleetSpec.parse("2P2D", PROFILE)
STEPS = PowerBudget.parse("0:1200,60:840,90:1000")

budgets = st.lists(
    st.tuples(st.floats(0.1, 100.0), st.floats(1.0, 5000.0)), min_size=1, max_size=6
).map(
    lambda rows: PowerBudget(
        steps=tuple(
            (float(t_s), w)
            for t_s, (_, w) in zip(
                np.cumsum([0.0] + [gap for gap, _ in rows[1:]]), rows, strict=True
            )
        )
    )
)


# The value


@given(budgets, st.floats(0.0, 500.0), st.floats(0.0, 500.0))
def test_least_is_the_lowest_limit_that_holds_in_between(budget, from_s, span_s):
    times_s = [from_s, from_s + span_s, *(t for t, _ in budget.steps)]
    inside = [t for t in times_s if from_s <= t <= from_s + span_s]
    assert budget.least_w(from_s, from_s + span_s) == min(budget.at_w(t) for t in inside)
    assert budget.lowest_w <= budget.least_w(from_s, from_s + span_s) <= budget.at_w(from_s)


@given(budgets)
def test_what_is_written_is_read_again(budget):
    text = ",".join(f"{t_s!r}:{limit_w!r}" for t_s, limit_w in budget.steps)
    assert PowerBudget.parse(text) == budget


def test_steps_hold_from_their_time_on():
    assert [STEPS.at_w(t) for t in (0.0, 59.9, 60.0, 89.9, 90.0, 1e6)] == [
        1200.0, 1200.0, 840.0, 840.0, 1000.0, 1000.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "SECONDS:WATTS"),
        ("fast", "SECONDS:WATTS"),
        ("0:1200,60", "SECONDS:WATTS"),
        ("0:1200,60:840W", "60:840W"),
        ("60:840", "first step at 0 s"),
        ("0:1200,60:840,60:800", "ascending"),
        ("0:1200,60:-5", "> 0"),
        ("0:nan", "> 0"),
        ("0:inf", "> 0"),
        ("0:1200,nan:840", ">= 0"),
        ("0:0", "> 0"),
    ],
)
def test_text_that_is_no_budget_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        PowerBudget.parse(text)


@pytest.mark.parametrize("steps", [(), ((0.0,),), 1200.0, (("0", 1200.0),), ((0.0, None),)])
def test_steps_that_are_no_budget_are_refused(steps):
    with pytest.raises(ConfigError):
        PowerBudget(steps=steps)


# Clocks under a budget


@given(
    name=st.sampled_from(list_profiles()),
    k=st.integers(0, 200),
    running_req=st.integers(1, 1024),
    kv_frac=st.floats(0.0, 1.0),
)
def test_no_batch_draws_more_than_the_worst_case(name, k, running_req, kv_frac):
    profile = load_profile(name)
    prefill, decode = FleetSpec.parse("1P1D", profile).instances
    k = min(k, len(profile.table) - 1)
    running_req = min(running_req, profile.max_batch)
    kv_tok = running_req + kv_frac * (profile.kv_capacity_tok - running_req)
    padded = profile.padded_batch()[running_req]
    row = profile.table[k]
    batch = row, running_req, kv_tok, padded
    power_w = decode_j(*batch) / decode_s(*batch)
    assert power_w <= highest_power_w(decode)[k] * (1.0 + 1e-12)
    assert row["prefill_power_w"] <= highest_power_w(prefill)[k]


mixed = FleetSpec(
    (
        *FleetSpec.parse("1P1D", PROFILE).instances,
        *(
            FleetSpec.parse("2P1D", load_profile("h100-sxm-80gb/llama-3.1-8b")).instances[k]
            for k in (1, 2)
        ),
    )[:3]
)


FLEETS = [FLEET, mixed, FleetSpec.parse("3C", PROFILE)]
CURVES = [
    (fleet, UniformCeiling(fleet), [highest_power_w(one) for one in fleet.instances])
    for fleet in FLEETS
]


@pytest.mark.parametrize(("fleet", "uniform", "worst"), CURVES, ids=["2P2D", "mixed", "3C"])
@given(limit_w=st.floats(100.0, 3000.0), busy=st.lists(st.booleans(), min_size=4, max_size=4))
def test_uniform_ceiling_is_the_highest_that_fits(fleet, uniform, worst, limit_w, busy):
    busy = np.array(busy[: len(fleet)])
    clocks_mhz = uniform.under(limit_w, busy)

    def worst_w(mhz):
        total_w = 0.0
        for i, one in enumerate(fleet.instances):
            k = max(0, int(np.searchsorted(one.clocks_mhz, mhz, side="right")) - 1)
            total_w += worst[i][k] if busy[i] else one.idle_w
        return total_w

    levels_mhz = sorted({mhz for one in fleet.instances for mhz in one.clocks_mhz})
    fits = [mhz for mhz in levels_mhz if worst_w(mhz) <= limit_w]
    expected_mhz = fits[-1] if fits else levels_mhz[0]
    for i, one in enumerate(fleet.instances):
        below = one.clocks_mhz[one.clocks_mhz <= expected_mhz]
        assert clocks_mhz[i] == (below[-1] if below.size else one.clocks_mhz[0])


def test_static_budget_obeys_a_step_before_it_begins():
    controller = StaticBudgetController(FLEET, STEPS, period_s=0.5)
    at = {}
    for t_s in (0.0, 59.0, 59.5, 60.0, 89.5, 90.0):
        observation = Observation(state=FleetState.idle(4, t_s=t_s))
        decision, _ = controller.decide(observation, None)
        assert (decision.freq_mhz == decision.freq_max_mhz).all()
        at[t_s] = decision.freq_mhz[0]
    assert at[0.0] == at[59.0] > at[59.5] == at[60.0] == at[89.5] < at[90.0] < at[0.0]
    free, _ = StaticBudgetController(FLEET, None).decide(observation, None)
    assert (free.freq_mhz == 1410.0).all()
    governed = StaticBudgetController(FLEET, STEPS, governed=True)
    decision, _ = governed.decide(observation, None)
    assert (decision.freq_mhz == 210.0).all()
    assert (decision.freq_max_mhz == at[90.0]).all()


# The meter


def test_meter_counts_samples_above_and_leaves_the_run_as_it_was():
    workload = make_workload("sharegpt", rate_req_s=20.0, duration_s=20.0, seed=0)
    metered, plain = (Plant(FLEET, workload) for _ in range(2))
    budget = PowerBudget.parse("0:900,10:2000")
    meter = PowerMeter(metered, budget, 5.0, 15.0)
    for until_s in (3.0, 5.02, 11.11, 15.0, 18.0):
        meter.advance(until_s)
    energy_j = []
    for edge_s in np.linspace(5.0, 15.0, 101):
        plain.advance(float(edge_s))
        energy_j.append(plain.read().state.energy_j.sum())
    plain.advance(18.0)
    power_w = np.diff(energy_j) / 0.1
    assert 0.0 < meter.over_budget_frac() < 0.5
    assert meter.over_budget_frac() == np.mean(power_w[:50] > 900.0) / 2.0
    assert metered.read().state.energy_j == pytest.approx(plain.read().state.energy_j, rel=1e-12)


# compare

SHORT = {"rates_req_s": [30.0], "duration_s": 10.0, "warmup_s": 5.0}
# What was measured on this machine, what the budget adds, what depends on the other policies.
OTHER = ("sim_wall_s", "decide_p50_s", "decide_p99_s", "over_budget_frac", "bound_gap_closed")


class Ceiling:
    """A policy of one's own that asks for the budget."""

    def __init__(self, fleet, slo, power_budget=None):
        self._inner = StaticBudgetController(fleet, power_budget)

    def init(self):
        return None

    def decide(self, observation, memory):
        return self._inner.decide(observation, memory)


@pytest.fixture(scope="module")
def result():
    policies = [
        "static-max", "voltanallm", "static-budget", "threshold", "pack", f"{__name__}:Ceiling",
        "bound",
    ]  # fmt: skip
    budget = PowerBudget.parse("0:1100,10:700")
    return compare(policies=policies, power_budget=budget, detail=True, **SHORT)


def test_policies_that_know_budgets_keep_them(result):
    over = {run["policy"]: run["over_budget_frac"] for run in result.runs}
    for name in ("static-budget", "threshold", "pack", f"{__name__}:Ceiling"):
        assert over[name] == 0.0, name
    # 983 W at full clocks: all of the second half is over, and some bursts of the first.
    assert 0.4 < over["static-max"] <= 1.0
    assert over["voltanallm"] > 0.0
    assert over["bound"] is None


def test_the_budget_is_in_the_json(result, tmp_path):
    result.write_json(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["power_budget_w"] == [[0.0, 1100.0], [10.0, 700.0]]
    assert all("over_budget_frac" in one for one in data["runs"])


def test_without_a_budget_nothing_is_over_and_nothing_else_changes(result):
    free = compare(policies=["static-max", "voltanallm"], **SHORT)
    assert free.to_dict()["power_budget_w"] is None
    for plain, metered in zip(free.runs, result.runs, strict=False):
        assert plain["over_budget_frac"] is None
        for key in set(plain) - set(OTHER):
            if isinstance(plain[key], float):
                assert plain[key] == pytest.approx(metered[key], rel=1e-9), key
            else:
                assert plain[key] == metered[key], key


def test_details_are_kept_along_with_the_meter(result):
    for figures, detail in zip(result.runs, result.details, strict=True):
        if detail is not None:
            spans_s = np.diff(detail.edge_s)
            energy_j = (detail.power_w.sum(axis=1) * spans_s).sum()
            assert energy_j == pytest.approx(figures["energy_j"], rel=0.02)


def test_a_budget_below_idle_is_refused_before_any_run():
    told = []
    with pytest.raises(ConfigError, match=r"280 W, which the fleet draws idle, got 279 W from 5 s"):
        compare(
            power_budget=PowerBudget.parse("0:1200,5:279"),
            on_progress=lambda *_: told.append(1),
            **SHORT,
        )
    assert told == []


def test_the_command_line_takes_a_budget(tmp_path, capsys):
    out = tmp_path / "out.json"
    short = ["compare", "--rate=10", "--duration=5", "--warmup=2", "--policies=static-budget"]
    app([*short, "--power-budget-w=0:900,4:500", f"--json={out}"], standalone_mode=False)
    assert "static-budget" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["power_budget_w"] == [[0.0, 900.0], [4.0, 500.0]]
    assert data["runs"][0]["over_budget_frac"] == 0.0
    with pytest.raises(ConfigError, match=r"got '4:5x'"):
        app([*short, "--power-budget-w=0:900,4:5x"], standalone_mode=False)
