"""Savings over draws of the profiles: what is drawn, what is believed, and what is said of it."""

import dataclasses

import numpy as np
import pytest

from voltana_ctrl import ConfigError, load_profile
from voltana_ctrl.experiment.grid import plan_runs
from voltana_ctrl.experiment.uncertainty import interval_lines, refuse_unknown, savings_intervals
from voltana_ctrl.types import Band, FleetSpec

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
POLICIES = ["static-max", "static-1005", "voltanallm"]


def grid_of(profile, **settings):
    return plan_runs(
        fleet=FleetSpec.parse("1P1D", profile), rates_req_s=[5.0], duration_s=10.0, warmup_s=2.0,
        policies=POLICIES, **settings,
    )  # fmt: skip


def test_without_a_band_every_draw_is_the_profile():
    known = grid_of(dataclasses.replace(PROFILE, band=Band()))
    intervals = savings_intervals(known, 3)
    assert [one["policy"] for one in intervals] == POLICIES
    figures = {done.figures["policy"]: done.figures for done in known.execute()}
    for one in intervals:
        token_j = [figures[name]["energy_per_token_j"] for name in (one["policy"], "static-max")]
        saving = 1.0 - token_j[0] / token_j[1]
        for q in (5, 50, 95):
            assert one[f"saving_p{q}_frac"] == pytest.approx(saving, abs=1e-12)
        assert one["kept_frac"] == 1.0
        assert set(one["below_frac"].values()) <= {0.0, 1.0}


def test_more_is_unknown_and_the_interval_is_wider():
    width = []
    for frac in (0.02, 0.1):
        found = savings_intervals(
            grid_of(dataclasses.replace(PROFILE, band=Band(clock_power_frac=frac))), 8
        )
        slow = found[1]
        width.append(slow["saving_p95_frac"] - slow["saving_p5_frac"])
        assert found[0]["saving_p5_frac"] == found[0]["saving_p95_frac"] == 0.0
    assert width[1] > 2.0 * width[0] > 0.0


def test_the_policy_believes_the_profile_and_the_plant_is_the_draw(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "voltana_ctrl.experiment.run.Run.simulate", lambda run: seen.append(run) or {
            "policy": run.policy, "energy_per_token_j": 1.0, "ttft_attainment": 1.0,
            "itl_attainment": 1.0,
        },
    )  # fmt: skip
    grid = grid_of(PROFILE)
    savings_intervals(grid, 2)
    assert all(run.believed is grid.spec for run in seen)
    assert len({id(run.fleet) for run in seen}) == 2
    # All policies meet the same draws, and more draws begin with them.
    first = [run.fleet for run in seen[:3]]
    assert first[0] is first[1] is first[2]
    again = [seen[0].fleet.instances[0].idle_w]
    seen.clear()
    savings_intervals(grid, 1)
    assert seen[0].fleet.instances[0].idle_w == again[0]


def test_a_profile_without_a_band_is_refused():
    unknown = grid_of(dataclasses.replace(PROFILE, band=None))
    with pytest.raises(ConfigError, match=r"\[band\]"):
        refuse_unknown(unknown, 5)
    with pytest.raises(ConfigError, match="uncertainty"):
        refuse_unknown(grid_of(PROFILE), 0)


def test_lines_name_what_is_not_sure():
    rows = [
        {
            "policy": "mpc", "rate_req_s": 10.0, "draws": 20, "saving_p5_frac": 0.41,
            "saving_p50_frac": 0.5, "saving_p95_frac": 0.58, "kept_frac": 1.0,
            "below_frac": {"static-max": 1.0, "pack": 0.6},
        }
    ]  # fmt: skip
    line = interval_lines(rows)[-1]
    assert "50% (41% to 58%)" in line
    assert "pack 60%" in line
    assert "static-max" not in line
    assert interval_lines([]) == []


def test_draws_stay_physical():
    from voltana_ctrl.profiles.draws import draw_profile

    wild = dataclasses.replace(PROFILE, band=Band(**dict.fromkeys(Band.__slots__, 0.5)))
    for seed in range(50):
        drawn = draw_profile(wild, np.random.default_rng(seed))
        for name in ("decode_base_s", "decode_req_s", "prefill_tok_s"):
            assert (np.diff(drawn.table[name]) <= 0.0).all()
        for name in ("decode_power_w", "prefill_power_w"):
            assert (np.diff(drawn.table[name]) >= 0.0).all()
            assert drawn.table[name][-1] <= PROFILE.power_cap_w
        assert drawn.idle_w == drawn.table["idle_w"][-1]
