"""Numbers that change at known times: prices and budgets, and how far ahead they are known."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.policies import PolicySetup
from voltana_ctrl.types import PowerBudget, Steps


@st.composite
def steps(draw) -> Steps:
    gaps = draw(st.lists(st.floats(0.5, 50.0), max_size=6))
    values = draw(st.lists(st.floats(-5.0, 500.0), min_size=len(gaps) + 1, max_size=len(gaps) + 1))
    return Steps(steps=tuple(zip([0.0, *np.cumsum(gaps).tolist()], values, strict=True)))


@given(steps(), st.floats(0.0, 100.0), st.floats(0.1, 100.0), st.floats(0.01, 0.99))
def test_means_over_parts_make_the_mean_of_the_whole(signal, from_s, span_s, part) -> None:
    middle_s, until_s = from_s + part * span_s, from_s + span_s
    parts = signal.mean(from_s, middle_s) * part + signal.mean(middle_s, until_s) * (1.0 - part)
    assert parts == pytest.approx(signal.mean(from_s, until_s), abs=1e-6)
    fine = np.linspace(from_s, until_s, 20_001)
    coarse = np.mean([signal.at(float(t)) for t in (fine[1:] + fine[:-1]) / 2.0][::100])
    spread = np.ptp([value for _, value in signal.steps])
    assert abs(coarse - signal.mean(from_s, until_s)) <= 0.06 * spread + 1e-6


def test_read_from_text_and_file(tmp_path) -> None:
    path = tmp_path / "price.csv"
    path.write_text("time_s,price\n0,0.2\n3600,-0.1\n")
    assert Steps.parse(str(path)).steps == Steps.parse("0:0.2,3600:-0.1").steps
    assert PowerBudget.parse("1200").steps == ((0.0, 1200.0),)
    for text, words in (
        ("x", "price: expected value such as 0.20, or steps SECONDS:VALUE, got 'x'"),
        ("0:1,2", "price: expected steps SECONDS:VALUE such as .* got '2'"),
        ("1:1", "first step at 0 s, got 1 s"),
        ("0:1,5:2,5:3", "ascending times, got 5 s after 5 s"),
        ("0:nan", "finite numbers"),
        (str(tmp_path / "none.csv"), "price: .*none.csv: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            Steps.parse(text, "price")
    path.write_text("0,0.2\nlater,0.3\n")
    with pytest.raises(ConfigError, match=r"price\.csv: line 2: expected seconds and a number"):
        Steps.parse(str(path), "price")
    path.write_text("")
    with pytest.raises(ConfigError, match=r"price\.csv: .*at least one step"):
        Steps.parse(str(path), "price")


def test_a_budget_is_known_from_its_notice_on() -> None:
    whole = PowerBudget.parse("0:1000,100:600,200:900")
    assert whole.known(0.0).steps == whole.steps
    assert whole.least_w(50.0, 150.0) == 600.0
    told = dataclasses.replace(whole, notice_s=30.0)
    assert told.known(69.9).steps == ((0.0, 1000.0),)
    assert told.known(70.0).steps == ((0.0, 1000.0), (100.0, 600.0))
    assert told.known(170.0).steps == whole.steps
    assert told.least_w(60.0, 150.0) == 1000.0
    assert told.least_w(75.0, 150.0) == 600.0
    surprise = dataclasses.replace(whole, notice_s=0.0)
    assert surprise.least_w(99.95, 100.2) == 1000.0
    assert surprise.least_w(100.0, 100.2) == 600.0
    # Policies see no more than what was announced.
    limits = [PolicySetup(power_budget=one).limit_w(99.95) for one in (whole, told, surprise)]
    assert limits == [600.0, 600.0, 1000.0]
    assert pickle.loads(pickle.dumps(told)) == told
    for bad in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="notice_s"):
            dataclasses.replace(whole, notice_s=bad)
