import numpy as np
import pytest

from voltana_ctrl import ConfigError
from voltana_ctrl.sim.arrivals import Diurnal, Gamma
from voltana_ctrl.sim.rate_steps import RateSteps
from voltana_ctrl.sim.workload import make_workload

STEPS = RateSteps.parse("0:10,100:60,160:0,200:30")


@pytest.mark.parametrize("arrivals", [None, Gamma(cv=3.0)])
def test_every_step_has_its_rate(arrivals):
    counts = np.zeros(4)
    for seed in range(20):
        drawn = make_workload("sharegpt", None, 300.0, seed, arrivals=arrivals, rate_steps=STEPS)
        counts += np.histogram(drawn.arrival_s, [0.0, 100.0, 160.0, 200.0, 300.0])[0]
    expected = 20 * np.array([1000.0, 3600.0, 0.0, 3000.0])
    spread = 5.0 * np.sqrt(expected) * (3.0 if arrivals else 1.0)
    assert np.all(np.abs(counts - expected) <= spread)


def test_a_longer_run_only_continues_a_shorter_one():
    short, long = (
        make_workload("sharegpt", None, total_s, 3, rate_steps=STEPS) for total_s in (250.0, 400.0)
    )
    n = len(short)
    assert np.array_equal(long.arrival_s[:n], short.arrival_s)
    assert np.array_equal(long.output_tok[:n], short.output_tok)


def test_the_mean_counts_silences():
    assert STEPS.mean_req_s(0.0, 200.0) == pytest.approx((1000.0 + 3600.0) / 200.0)
    assert STEPS.mean_req_s(150.0, 210.0) == pytest.approx((600.0 + 300.0) / 60.0)
    assert STEPS.highest_req_s == 60.0


def test_a_trace_is_moved_onto_the_steps_in_order():
    trace = make_workload("azure-conv", 8.0, 600.0, seed=1)
    moved = trace.stepped(STEPS)
    assert len(moved) == len(trace)
    assert np.array_equal(moved.output_tok, trace.output_tok)
    assert not np.any((moved.arrival_s > 160.0) & (moved.arrival_s < 200.0))
    before, after = np.histogram(moved.arrival_s, [0.0, 100.0, 160.0])[0]
    assert before == pytest.approx(1000, rel=0.15)
    assert after == pytest.approx(3600, rel=0.15)
    # What was left of it arrives at the last rate.
    assert moved.duration_s == pytest.approx(200.0 + (len(trace) - 4600) / 30.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("10", "SECONDS:REQ_PER_S"),
        ("5:10", "first step at 0 s"),
        ("0:10,0:20", "ascending"),
        ("0:0", "rate > 0"),
        ("0:-1", "rate of a step"),
        ("0:nan", "rate of a step"),
    ],
)
def test_what_does_not_fit_is_named(text, told):
    with pytest.raises(ConfigError, match=told):
        RateSteps.parse(text)


def test_two_loads_that_change_by_themselves_are_refused():
    with pytest.raises(ConfigError, match="diurnal"):
        make_workload("sharegpt", None, 60.0, 0, arrivals=Diurnal(), rate_steps=STEPS)
    with pytest.raises(ConfigError, match="last rate"):
        make_workload("fixed", 5.0, 60.0, 0).stepped(RateSteps.parse("0:10,50:0"))
