import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_are
from scipy.stats import poisson

from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.estimate import (
    ArrivalEstimator,
    KalmanState,
    LengthEstimator,
    RequestClasses,
    kalman_step,
)
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import RequestBatch

# Kalman filter


def steady(transition, process, output, noise):
    state = KalmanState(mean=np.zeros(len(process)), covariance=np.eye(len(process)))
    for _ in range(200):
        measured = np.zeros(len(noise))
        state = kalman_step(state, transition, process, output, measured, noise)
    return state.covariance


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_steady_state_is_that_of_the_riccati_equation(seed, size, outputs):
    random = np.random.default_rng(seed)
    transition = random.normal(size=(size, size))
    transition *= 0.95 / max(1.0, np.abs(np.linalg.eigvals(transition)).max())
    root = random.normal(size=(size, size))
    process = root @ root.T + 0.1 * np.eye(size)
    output = random.normal(size=(outputs, size))
    noise = np.diag(random.uniform(0.1, 2.0, outputs))
    wanted = solve_discrete_are(transition.T, output.T, process, noise)
    np.testing.assert_allclose(
        steady(transition, process, output, noise), wanted, rtol=1e-5, atol=1e-8
    )


def test_rate_filter_settles_at_the_gain_of_dlqe():
    control = pytest.importorskip("control")
    estimator = ArrivalEstimator(rate_drift_req_s=0.5, start_req_s=20.0)
    state = estimator.init()
    for tick in range(1, 801):
        state = estimator.update(state, t_s=0.1 * tick, arrived_req=2.0)
    q, r = 0.5**2 * 20.0 * 0.1, 20.0 / 0.1
    gain, before, _ = control.dlqe(np.eye(1), np.eye(1), np.eye(1), [[q]], [[r]])
    after = (1.0 - gain[0, 0]) * before[0, 0]
    assert state.rate.covariance[0, 0] == pytest.approx(after, rel=1e-3)
    assert estimator.rate_req_s(state) == pytest.approx(20.0, rel=1e-6)


def test_without_a_measurement_it_only_predicts():
    state = KalmanState(mean=[1.0, 2.0], covariance=np.eye(2))
    turn = np.array([[0.0, 1.0], [1.0, 0.0]])
    after = kalman_step(state, turn, np.eye(2), np.eye(2), None, np.eye(2))
    np.testing.assert_array_equal(after.mean, [2.0, 1.0])
    np.testing.assert_array_equal(after.covariance, 2.0 * np.eye(2))


@given(
    st.lists(st.tuples(st.floats(0.01, 60.0), st.integers(0, 3000)), min_size=1, max_size=30),
    st.sampled_from([None, 600.0]),
)
def test_arrivals_are_filtered_as_by_the_general_filter(steps, period_s):
    estimator = ArrivalEstimator(period_s=period_s, harmonics=2)
    state = estimator.init()
    size, one = len(state.rate.mean), np.eye(1)
    for dt_s, n_req in steps:
        now_s = state.t_s + dt_s
        after = estimator.update(
            state, t_s=now_s, arrived_req=n_req, arrived_tok=300 * n_req, finished_req=n_req,
            finished_tok=170 * n_req,
        )  # fmt: skip
        row = np.ones((1, size))
        if period_s is not None:
            angle = 2 * np.pi * (now_s - dt_s / 2) / period_s * np.array([1, 2])
            row[0, 1::2], row[0, 2::2] = np.cos(angle), np.sin(angle)
        level = max(state.rate.mean[0], 1.0)
        walk = np.full(size, 0.1 * 0.1**2 * level * dt_s**2 / (period_s or 1.0))
        walk[0] = 0.1**2 * level * dt_s
        ahead = state.rate.covariance + np.diag(walk)
        expected = float((row @ state.rate.mean)[0])
        noise = state.dispersion_frac * max(expected, 1 / dt_s, 1e-9) / dt_s
        error = n_req / dt_s - expected
        surprise = error / float((row @ ahead @ row.T + noise)[0, 0]) ** 0.5
        assert after.surprise_frac == pytest.approx(surprise, rel=1e-11)
        ahead[0, 0] += error**2 if after.burst else 0.0
        wanted = kalman_step(
            KalmanState(mean=state.rate.mean, covariance=ahead), np.eye(size), 0 * ahead,
            row, np.array([n_req / dt_s]), noise * one,
        )  # fmt: skip
        # Relative to what it was made of: an opened covariance loses digits in any order.
        np.testing.assert_allclose(after.rate.mean, wanted.mean, rtol=1e-12, atol=1e-12 * level)
        np.testing.assert_allclose(
            after.rate.covariance, wanted.covariance, rtol=1e-12, atol=1e-12 * ahead.max()
        )
        mean = max(state.output.mean[0], 1.0)
        ahead_of = KalmanState(
            mean=state.output.mean,
            covariance=state.output.covariance + (0.01 * mean) ** 2 * dt_s * one,
        )
        if n_req:
            spread = (1.2 * mean) ** 2 / n_req * one
            ahead_of = kalman_step(ahead_of, one, 0 * one, one, np.array([170.0]), spread)
        np.testing.assert_allclose(after.output.mean, ahead_of.mean, rtol=1e-12)
        np.testing.assert_allclose(after.output.covariance, ahead_of.covariance, rtol=1e-12)
        state = after


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(0, 10**6)), max_size=60))
def test_arrival_states_stay_finite_and_positive_definite(steps):
    estimator = ArrivalEstimator(period_s=3600.0, harmonics=2)
    state = estimator.init()
    t_s = 0.0
    for dt_s, arrived_req in steps:
        t_s += dt_s
        state = estimator.update(
            state, t_s=t_s, arrived_req=arrived_req, arrived_tok=300 * arrived_req,
            finished_req=arrived_req, finished_tok=200 * arrived_req,
        )  # fmt: skip
        assert np.linalg.eigvalsh(state.rate.covariance).min() > 0.0
        forecast = estimator.forecast(state, horizon_s=5.0)
        assert 0.0 <= forecast.low_req_s <= forecast.mean_req_s <= forecast.high_req_s < np.inf
        assert min(estimator.lengths_tok(state)) >= 1.0


def counts(rates_req_s, dt_s, seed):
    random = np.random.default_rng(seed)
    return random.poisson(np.asarray(rates_req_s) * dt_s)


def run(estimator, arrived, dt_s=0.1):
    states = [estimator.init()]
    for tick, number in enumerate(arrived, 1):
        states.append(estimator.update(states[-1], t_s=dt_s * tick, arrived_req=float(number)))
    return states


def test_poisson_arrivals_are_tracked_within_the_filters_own_error():
    estimator = ArrivalEstimator()
    inside = 0
    for seed in range(20):
        state = run(estimator, counts(np.full(150, 30.0), 0.2, seed), dt_s=0.2)[-1]
        inside += abs(state.rate.mean[0] - 30.0) < 2.0 * state.rate.covariance[0, 0] ** 0.5
        assert state.dispersion_frac < 2.0
    # 19 of 20 expected at 95 % coverage.
    assert inside >= 17


def test_forecast_interval_covers_the_count_of_the_horizon():
    estimator = ArrivalEstimator()
    covered = []
    for seed in range(40):
        arrived = counts(np.full(110, 25.0), 0.5, seed)
        state = run(estimator, arrived[:100], dt_s=0.5)[-1]
        forecast = estimator.forecast(state, horizon_s=5.0, coverage_frac=0.9)
        rate = arrived[100:].sum() / 5.0
        covered.append(forecast.low_req_s <= rate <= forecast.high_req_s)
    # 36 of 40 expected at 90 % coverage.
    assert sum(covered) >= 31
    narrow = estimator.forecast(state, horizon_s=5.0, coverage_frac=0.5)
    assert narrow.high_req_s - narrow.low_req_s < 0.6 * (forecast.high_req_s - forecast.low_req_s)
    assert forecast.high_req_s - forecast.low_req_s < 3 * 2 * 1.645 * (25 / 5) ** 0.5


def test_a_burst_is_seen_at_once_and_followed():
    estimator = ArrivalEstimator()
    rates = np.r_[np.full(200, 10.0), np.full(20, 60.0)]
    states = run(estimator, counts(rates, 0.5, 0), dt_s=0.5)
    assert not any(state.burst for state in states[50:200])
    assert any(state.burst for state in states[201:204])
    assert estimator.rate_req_s(states[206]) > 45.0
    slow = ArrivalEstimator(burst_sigma_frac=1e9)
    assert slow.rate_req_s(run(slow, counts(rates, 0.5, 0), dt_s=0.5)[206]) < 40.0


def test_bursty_arrivals_widen_the_interval():
    estimator = ArrivalEstimator(burst_sigma_frac=50.0)
    calm = run(estimator, counts(np.full(900, 20.0), 0.1, 0))[-1]
    clumped = 10 * counts(np.full(900, 2.0), 0.1, 0)
    state = run(estimator, clumped)[-1]
    assert state.dispersion_frac == pytest.approx(10.0, rel=0.4)
    assert calm.dispersion_frac < 1.5
    widths = [
        forecast.high_req_s - forecast.low_req_s
        for forecast in (estimator.forecast(one, horizon_s=2.0) for one in (calm, state))
    ]
    assert widths[1] > 2.0 * widths[0]


def test_a_period_is_learned_and_forecast():
    period_s = 600.0
    times = np.arange(1, 1501) * 2.0
    arrived = counts(20.0 + 15.0 * np.sin(2 * np.pi * times / period_s), 2.0, 1)
    with_period = ArrivalEstimator(period_s=period_s, rate_drift_req_s=0.02)
    state = run(with_period, arrived, dt_s=2.0)[-1]
    level = ArrivalEstimator()
    flat = run(level, arrived, dt_s=2.0)[-1]
    # Half a period ahead of 3000 s, where the phase is 0, the load is a sine further on.
    for ahead_s, wanted in ((150.0, 35.0), (450.0, 5.0)):
        assert with_period.rate_req_s(state, t_s=3000.0 + ahead_s) == pytest.approx(wanted, abs=3.0)
        assert abs(level.rate_req_s(flat, t_s=3000.0 + ahead_s) - wanted) > 5.0


def test_lengths_are_tracked():
    estimator = ArrivalEstimator()
    state = estimator.init()
    random = np.random.default_rng(0)
    for tick in range(1, 601):
        n = random.poisson(5)
        state = estimator.update(
            state, t_s=0.1 * tick, arrived_req=n, arrived_tok=random.exponential(500.0, n).sum(),
            finished_req=n, finished_tok=random.exponential(80.0, n).sum(),
        )  # fmt: skip
    prompt_tok, output_tok = estimator.lengths_tok(state)
    assert prompt_tok == pytest.approx(500.0, rel=0.15)
    assert output_tok == pytest.approx(80.0, rel=0.15)


def test_update_is_pure():
    estimator = ArrivalEstimator()
    state = estimator.init()
    one = estimator.update(state, t_s=0.1, arrived_req=3)
    two = estimator.update(state, t_s=0.1, arrived_req=3)
    np.testing.assert_array_equal(one.rate.mean, two.rate.mean)
    assert state.t_s == 0.0


@pytest.mark.parametrize(
    "counts_wrong",
    [
        {"t_s": 0.0, "arrived_req": 1},
        {"t_s": -1.0, "arrived_req": 1},
        {"t_s": 1.0, "arrived_req": -1},
        {"t_s": 1.0, "arrived_req": float("nan")},
        {"t_s": float("nan"), "arrived_req": 1},
        {"t_s": 1.0, "arrived_req": 1, "finished_tok": float("inf")},
    ],
)
def test_impossible_counts_are_refused(counts_wrong):
    estimator = ArrivalEstimator()
    with pytest.raises(ConfigError):
        estimator.update(estimator.init(), **counts_wrong)


def test_forecast_of_a_known_rate_is_the_poisson_interval():
    estimator = ArrivalEstimator(rate_drift_req_s=1e-6)
    state = run(estimator, np.tile([3, 2], 1000))[-1]
    forecast = estimator.forecast(state, horizon_s=10.0, coverage_frac=0.9)
    low, high = poisson.interval(0.9, 250.0)
    assert forecast.low_req_s == pytest.approx(low / 10, rel=0.04)
    assert forecast.high_req_s == pytest.approx(high / 10, rel=0.04)


# Output length by class


def finished(prompt_tok, output_tok, request_class=None):
    k = np.zeros(len(prompt_tok))
    return RequestBatch(
        request=k,
        request_class=k if request_class is None else request_class,
        prompt_tok=prompt_tok,
        output_tok=output_tok,
        ttft_s=k,
        itl_s=k,
        prefill_instance=k,
        decode_instance=k,
    )


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 0.99])
def test_quantiles_are_exact_to_a_bin(quantile):
    workload = make_workload("sharegpt", rate_req_s=50.0, duration_s=100.0, seed=0)
    estimator = LengthEstimator(memory_req=1e9)
    state = estimator.init()
    for part in range(0, len(workload), 97):
        each = slice(part, part + 97)
        state = estimator.update(
            state, finished(workload.prompt_tok[each], workload.output_tok[each])
        )
    key = estimator.classes.of(
        request_class=np.zeros(len(workload)), prompt_tok=workload.prompt_tok
    )
    for request_class in range(4):
        lengths = workload.output_tok[key == request_class]
        wanted = np.quantile(lengths, quantile, method="inverted_cdf")
        assert estimator.quantile_tok(state, request_class, quantile) == pytest.approx(
            wanted, rel=0.04, abs=0.51
        )
        assert estimator.mean_tok(state, request_class) == pytest.approx(lengths.mean(), rel=0.03)


def test_recent_requests_count_more():
    estimator = LengthEstimator(memory_req=100.0)
    state = estimator.update(estimator.init(), finished([100] * 1000, [50] * 1000))
    state = estimator.update(state, finished([100] * 300, [400] * 300))
    assert estimator.quantile_tok(state, 1, 0.5) == pytest.approx(400, rel=0.04)


def test_a_class_with_few_requests_answers_with_all():
    estimator = LengthEstimator(least_req=10)
    state = estimator.update(estimator.init(), finished([100] * 50, [70] * 50))
    assert estimator.quantile_tok(state, 4, 0.5) == pytest.approx(70, rel=0.04)
    assert np.isnan(estimator.quantile_tok(estimator.init(), 4, 0.5))
    assert np.isnan(estimator.mean_tok(estimator.init(), 4))


@given(
    st.lists(st.integers(1, 10**7), min_size=40, max_size=80),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
    st.floats(0.0, 2e6),
)
def test_quantiles_are_monotone_finite_and_beyond_what_is_made(lengths, q1, q2, made_tok):
    estimator = LengthEstimator()
    state = estimator.update(estimator.init(), finished([10] * len(lengths), lengths))
    low, high = sorted((q1, q2))
    values = [
        estimator.quantile_tok(state, 0, quantile, made_tok=made)
        for quantile, made in ((low, 0.0), (high, 0.0), (low, made_tok))
    ]
    assert 1.0 <= values[0] <= values[1] < np.inf
    assert values[2] >= max(values[0], made_tok)


def test_senseless_lengths_are_left_out():
    estimator = LengthEstimator()
    state = estimator.update(estimator.init(), finished([10, 10, 10], [np.nan, 0.0, -5.0]))
    assert state.weight_req.sum() == 0.0


def test_host_classes_are_kept_apart():
    estimator = LengthEstimator(classes=RequestClasses(host_classes=2), least_req=1)
    state = estimator.update(
        estimator.init(), finished([10] * 4, [5, 5, 900, 900], request_class=[0, 0, 1, 1])
    )
    assert estimator.quantile_tok(state, 0, 0.9) == 5.0
    assert estimator.quantile_tok(state, 1, 0.1) == pytest.approx(900, rel=0.04)


def test_wrong_settings_and_states_are_refused():
    with pytest.raises(ConfigError, match="prompt_edges_tok"):
        RequestClasses(prompt_edges_tok=(10, 10))
    with pytest.raises(ConfigError, match="memory_req"):
        LengthEstimator(memory_req=1.0)
    with pytest.raises(ConfigError, match="least_req"):
        LengthEstimator(least_req=0.0)
    estimator = LengthEstimator()
    other = LengthEstimator(classes=RequestClasses(host_classes=2))
    with pytest.raises(ShapeError, match="2"):
        estimator.update(other.init(), RequestBatch.empty())
    with pytest.raises(ConfigError, match="request_class"):
        estimator.quantile_tok(estimator.init(), 6, 0.5)
    with pytest.raises(ConfigError, match="quantile_frac"):
        estimator.quantile_tok(estimator.init(), 0, 1.0)
