"""Prediction and learning: what they cost, beside what pip can install.

    pytest bench/bench_predict.py --benchmark-enable

The budgets are asserted on the fastest round: a busy machine slows the others.
"""

import itertools

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, IterationBatch, Slo, load_profile
from voltana_ctrl.estimate import (
    ArrivalEstimator,
    FleetTables,
    InstancePredictor,
    OnlineLearner,
    predict_decode,
)
from voltana_ctrl.estimate.margin import MarginTracker
from voltana_ctrl.kernels.learn import rls

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def within(benchmark, budget_us, per=1):
    """Assert the budget in microseconds per item, where anything was measured."""
    if benchmark.stats is not None:
        took_us = benchmark.stats.stats.min * 1e6 / per
        benchmark.extra_info["us_per_item"] = round(took_us, 4)
        assert took_us <= budget_us, f"{took_us:.3f} us, budget {budget_us} us"


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
    within(benchmark, 1.0, per=len(k) * (learner.N_TILES + 1))


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
