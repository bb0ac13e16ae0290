"""Prediction, fleet decisions and learning: what they cost, beside what pip can install.

    pytest bench/bench_predict.py --benchmark-enable

The budgets are asserted on the fastest round: a busy machine slows the others.
"""

import itertools

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, IterationBatch, Slo, load_profile
from voltana_ctrl.estimate import (
    ArrivalEstimator,
    ClockChooser,
    FleetTables,
    InstancePredictor,
    OnlineLearner,
    predict_decode,
)
from voltana_ctrl.estimate.margin import MarginTracker
from voltana_ctrl.kernels.learn import learner as learn
from voltana_ctrl.kernels.learn import rls

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
LADDERS = {"5 clocks": (1005, 1095, 1200, 1305, 1410), "81 clocks": None}
BUDGET_US = {"5 clocks": 0.8, "81 clocks": 1.6}
N = 512


def within(benchmark, budget_us, per=1):
    """Assert the budget in microseconds per item, where anything was measured."""
    if benchmark.stats is not None:
        took_us = benchmark.stats.stats.min * 1e6 / per
        benchmark.extra_info["us_per_item"] = round(took_us, 4)
        assert took_us <= budget_us, f"{took_us:.3f} us, budget {budget_us} us"


def fleet_load(n):
    random = np.random.default_rng(0)
    half = n // 2
    return {
        "running_req": np.r_[np.zeros(half), random.integers(1, 500, half)],
        "kv_used_tok": np.r_[np.zeros(half), random.uniform(0, 4e5, half)],
        "waiting_tok": np.r_[random.uniform(0, 9000, half), np.zeros(half)],
        "oldest_wait_s": random.uniform(0, 0.5, n),
    }


@pytest.mark.parametrize("ladder", LADDERS)
def test_fleet_decision(benchmark, ladder):
    fleet = FleetSpec.pd(prefill=N // 2, decode=N // 2, profile=PROFILE)
    chooser = ClockChooser(fleet, SLO, ladder_mhz=LADDERS[ladder])
    benchmark(chooser.fleet_mhz, **fleet_load(N))
    within(benchmark, BUDGET_US[ladder], per=N)


@pytest.mark.parametrize("ladder", LADDERS)
def test_single_decision(benchmark, ladder):
    fleet = FleetSpec.parse("1P1D", PROFILE)
    chooser = ClockChooser(fleet, SLO, ladder_mhz=LADDERS[ladder])
    benchmark.pedantic(
        chooser.one_mhz, args=(1, 200.0, 90_000.0, 0.0, 0.0), rounds=200, iterations=1000
    )
    within(benchmark, 2.0)


def test_single_prediction(benchmark):
    predictor = InstancePredictor(FleetTables.of(FleetSpec.parse("1P1D", PROFILE)), 1)
    benchmark.pedantic(predictor.itl_s, args=(1005.0, 200.0, 9e4), rounds=200, iterations=1000)
    within(benchmark, 2.0)


def test_many_predictions(benchmark):
    tables = FleetTables.of(FleetSpec.parse("1P1D", PROFILE))
    random = np.random.default_rng(0)
    args = (1, random.uniform(210, 1410, 10_000), random.uniform(1, 500, 10_000), 9e4)
    benchmark(predict_decode, tables, *args)
    within(benchmark, 0.5, per=10_000)


# One update of six coefficients from one record


def regression():
    random = np.random.default_rng(0)
    phi = random.uniform(0.0, 1.0, (1000, 6))
    return phi, phi @ np.array([1.0, 0.1, 0.9, 0.0, 1.2, -0.1])


def test_rls_single(benchmark):
    phi, target = regression()
    theta, cov = np.array([1.0, 0.0] * 3), np.empty((6, 6))
    rls.restart(cov)
    benchmark.pedantic(
        rls.rls_step, args=(theta, cov, phi[0], target[0], 0.99, 1.0), rounds=200, iterations=1000
    )
    within(benchmark, 3.0)


def test_rls_batched(benchmark):
    """Records through the whole learner: eight staircases and one energy model each."""
    fleet = FleetSpec.parse("2P2D", PROFILE)
    learner = OnlineLearner(FleetTables.of(fleet))
    random = np.random.default_rng(0)
    k = np.ones(4000)
    instance = random.integers(2, 4, len(k))
    n_req = random.integers(1, 400, len(k)).astype(float)
    answer = predict_decode(learner.prior, instance, 1410.0, n_req, 400 * n_req)
    records = IterationBatch(
        instance=instance,
        t_s=k,
        wall_s=1.3 * answer.time_s,
        freq_mhz=1410 * k,
        batch_req=n_req,
        prefill_tok=0 * k,
        kv_tok=400 * n_req,
        energy_j=answer.energy_j,
    )
    state = learner.init()
    benchmark(learner.update, state, records)
    within(benchmark, 1.0, per=len(k) * (learn.N_TILES + 1))


def test_margin_update(benchmark):
    tracker = MarginTracker(slo=SLO)
    missed = np.zeros(20, bool)
    benchmark(tracker.update_misses, tracker.init(), missed, missed)


def test_arrival_update(benchmark):
    estimator = ArrivalEstimator(period_s=86_400.0)
    counts = {"arrived_req": 4, "arrived_tok": 900, "finished_req": 3, "finished_tok": 500}
    state = estimator.update(estimator.init(), t_s=1.0, **counts)
    benchmark.pedantic(
        estimator.update, args=(state,), kwargs={"t_s": 1.1, **counts}, rounds=1000, iterations=10
    )
    within(benchmark, 50.0)


def test_peer_padasip(benchmark):
    padasip = pytest.importorskip("padasip")
    phi, target = regression()
    model = padasip.filters.FilterRLS(n=6, mu=0.99)
    # One record again and again winds its covariance up to overflow.
    records = itertools.cycle(zip(target, phi, strict=True))
    benchmark(lambda: model.adapt(*next(records)))


def test_peer_river(benchmark):
    linear_model = pytest.importorskip("river.linear_model")
    phi, target = regression()
    model = linear_model.BayesianLinearRegression(smoothing=0.99)
    row = {str(i): float(value) for i, value in enumerate(phi[0])}
    benchmark(model.learn_one, row, float(target[0]))


def test_peer_scikit_learn(benchmark):
    """Stochastic gradient: it has no recursive least squares."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    phi, target = regression()
    model = linear_model.SGDRegressor()
    benchmark(model.partial_fit, phi[:1], target[:1])


def test_peer_scikit_learn_batched(benchmark):
    linear_model = pytest.importorskip("sklearn.linear_model")
    phi, target = regression()
    model = linear_model.SGDRegressor()
    benchmark(model.partial_fit, phi, target)
    within(benchmark, np.inf, per=len(phi))
