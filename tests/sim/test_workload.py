"""Workloads: the value, the generators, the arrival processes against closed forms."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.sim.arrivals import Diurnal, Gamma, MarkovModulated, Poisson
from voltana_ctrl.sim.catalog import WORKLOADS, describe
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload

PROCESSES = [
    Poisson(),
    Gamma(cv=0.3),
    Gamma(cv=4.0),
    MarkovModulated(high_s=2.0, low_s=6.0, low_rate_frac=0.1),
    Diurnal(swing_frac=0.7, period_s=50.0, peak_s=10.0),
]


def rng(seed=0):
    return np.random.default_rng(seed)


def tiny(**changes):
    values = {
        "name": "tiny",
        "arrival_s": [0.0, 1.0, 3.0],
        "prompt_tok": [10, 600, 1100],
        "output_tok": [1, 2, 3],
        "duration_s": 4.0,
    }
    return Workload(**(values | changes))


@st.composite
def workloads(draw):
    n = draw(st.integers(0, 20))
    tokens = hnp.arrays(np.int64, n, elements=st.integers(1, 10_000))
    times_s = np.sort(draw(hnp.arrays(np.float64, n, elements=st.floats(0.0, 100.0))))
    prompt_tok = draw(tokens)
    blocks = draw(st.lists(st.lists(st.integers(0, 50), max_size=4), min_size=n, max_size=n))
    return Workload(
        name="drawn",
        arrival_s=times_s,
        prompt_tok=prompt_tok,
        output_tok=draw(tokens),
        duration_s=draw(st.floats(100.0, 200.0)),
        cached_tok=prompt_tok // 2,
        block_id=[b for row in blocks for b in row],
        block_offset=np.concatenate(([0], np.cumsum([len(row) for row in blocks]))).astype(int),
    )


def same(a, b):
    names = ("arrival_s", "prompt_tok", "output_tok", "cached_tok", "block_id", "block_offset")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


# The value


def test_arrays_are_read_only_copies_of_one_type():
    arrival_s = np.array([0.0, 1.0, 3.0])
    w = tiny(arrival_s=arrival_s)
    arrival_s[0] = 99.0
    assert w.arrival_s[0] == 0.0
    assert w.prompt_tok.dtype == np.int64
    for name in ("arrival_s", "prompt_tok", "output_tok", "cached_tok", "block_offset"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(w, name)[0] = 1


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"arrival_s": [0.0, 3.0, 1.0]}, ShapeError, "never fall"),
        ({"arrival_s": [0.0, math.nan, 1.0]}, ShapeError, "never fall"),
        ({"arrival_s": [-1.0, 0.0, 1.0]}, ShapeError, "from 0"),
        ({"arrival_s": [0.0, 1.0, 4.5]}, ShapeError, "duration_s"),
        ({"arrival_s": [0.0, 1.0]}, ShapeError, "prompt_tok"),
        ({"prompt_tok": [10, 0, 5]}, ShapeError, r"prompt_tok: expected >= 1, got 0"),
        ({"output_tok": [1, 2, -3]}, ShapeError, r"output_tok: expected >= 1, got -3"),
        ({"prompt_tok": [1.5, 2.0, 3.0]}, ShapeError, "whole numbers"),
        ({"cached_tok": [10, 0, 0]}, ShapeError, "cached_tok < prompt_tok"),
        ({"cached_tok": [-1, 0, 0]}, ShapeError, "0 <= cached_tok"),
        ({"request_class": [0, -1, 0]}, ShapeError, "request_class"),
        ({"block_id": [1, 2]}, ShapeError, "block_offset"),
        ({"block_id": [1, 2], "block_offset": [0, 2, 1, 2]}, ShapeError, "block_offset"),
        ({"block_id": [1, 2], "block_offset": [0, 2]}, ShapeError, "block_offset"),
        ({"duration_s": 0.0}, ConfigError, "duration_s"),
        ({"duration_s": math.nan}, ConfigError, "duration_s"),
        ({"duration_s": math.inf}, ConfigError, "duration_s"),
        ({"block_tok": 0}, ConfigError, "block_tok"),
        ({"dropped_rows": -1}, ConfigError, "dropped_rows"),
        ({"concurrency": 4}, ConfigError, "closed loop"),
    ],
)
def test_bad_values_are_refused_by_name(changes, error, text):
    with pytest.raises(error, match=text):
        tiny(**changes)


def test_pickle_keeps_values_and_read_only_flags():
    w = make_workload("sharegpt", 5.0, 20.0, seed=1)
    copy = pickle.loads(pickle.dumps(w))
    assert same(w, copy)
    assert copy.duration_s == w.duration_s
    assert not copy.arrival_s.flags.writeable


@given(w=workloads(), rate_req_s=st.floats(1e-3, 1e3))
def test_rescaling_sets_the_rate_and_keeps_all_else(w, rate_req_s):
    if not len(w):
        with pytest.raises(ConfigError, match="no requests"):
            w.rescaled(rate_req_s)
        return
    scaled = w.rescaled(rate_req_s)
    assert scaled.rate_req_s == pytest.approx(rate_req_s)
    assert np.array_equal(scaled.prompt_tok, w.prompt_tok)
    assert np.array_equal(scaled.block_id, w.block_id)
    factor = scaled.duration_s / w.duration_s
    np.testing.assert_allclose(scaled.arrival_s, w.arrival_s * factor, rtol=1e-12)


@given(w=workloads(), cut_frac=st.floats(0.01, 0.99))
def test_two_windows_share_out_the_requests(w, cut_frac):
    cut_s = w.duration_s * cut_frac
    first = w.window(cut_s)
    second = w.window(w.duration_s - cut_s, start_s=cut_s)
    at_end = int(np.sum(w.arrival_s == w.duration_s))
    assert len(first) + len(second) + at_end == len(w)
    n = len(first)
    for part, shift in ((first, 0), (second, n)):
        for i in range(len(part)):
            assert np.array_equal(part.prefix_blocks(i), w.prefix_blocks(i + shift))
    both_tok = np.concatenate((first.prompt_tok, second.prompt_tok))
    assert np.array_equal(both_tok, w.prompt_tok[: both_tok.size])
    np.testing.assert_allclose(
        second.arrival_s, w.arrival_s[n : n + len(second)] - cut_s, rtol=0, atol=1e-12
    )


def test_window_beyond_the_end_is_refused_with_the_span():
    with pytest.raises(ConfigError, match=r"within its 4 s, got 0 to 5 s; shorten"):
        tiny().window(5.0)
    with pytest.raises(ConfigError, match="duration_s"):
        tiny().window(math.nan)


def test_window_of_a_rescaled_span_is_not_refused_for_rounding():
    w = make_workload("sharegpt", 7.0, 33.3, seed=0)
    assert len(w.rescaled(0.1).rescaled(w.rate_req_s).window(33.3)) == len(w)


def test_closed_loop_has_no_clock():
    w = tiny().closed_loop(2)
    assert w.concurrency == 2
    assert w.duration_s == math.inf
    assert not w.arrival_s.any()
    assert math.isnan(w.rate_req_s)
    assert math.isnan(w.summary()["gap_cv"])
    assert w.window(10.0) is w
    with pytest.raises(ConfigError, match="closed loop"):
        w.rescaled(3.0)
    with pytest.raises(ConfigError, match="concurrency"):
        tiny().closed_loop(0)


def test_summary_by_hand():
    s = tiny(cached_tok=[0, 512, 512], dropped_rows=7).summary()
    assert s["requests"] == 3.0
    assert s["rate_req_s"] == 0.75
    assert s["gap_cv"] == pytest.approx(0.5 / 1.5)
    assert s["prompt_mean_tok"] == pytest.approx(570.0)
    assert s["output_mean_tok"] == 2.0
    assert s["cached_frac"] == pytest.approx(1024 / 1710)
    assert s["dropped_rows"] == 7.0


def test_summary_of_nothing_is_nan_without_warning():
    empty = tiny(arrival_s=[], prompt_tok=[], output_tok=[])
    assert len(empty) == 0
    assert empty.rate_req_s == 0.0
    assert math.isnan(empty.summary()["prompt_mean_tok"])


# Arrival processes


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_expected_count_is_rate_times_span_from_the_start(process):
    # 4,000 short runs: a process that did not start in its stationary state would be off
    counts = [process.sample(3.0, 50.0, rng(seed)).size for seed in range(4000)]
    mean, error = np.mean(counts), np.std(counts) / math.sqrt(len(counts))
    assert abs(mean - 150.0) < 4.0 * error
    assert error < 1.5


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_samples_are_sorted_inside_the_span_and_seeded(process):
    times_s = process.sample(20.0, 30.0, rng(5))
    assert np.all(np.diff(times_s) >= 0.0)
    assert times_s[0] >= 0.0
    assert times_s[-1] < 30.0
    assert np.array_equal(times_s, process.sample(20.0, 30.0, rng(5)))
    assert not np.array_equal(times_s, process.sample(20.0, 30.0, rng(6)))


def test_poisson_gaps_are_exponential():
    gaps_s = np.sort(np.diff(Poisson().sample(50.0, 2000.0, rng(1))))
    n = gaps_s.size
    distance = np.abs(1.0 - np.exp(-50.0 * gaps_s) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("cv", [0.2, 1.09, 3.0])
def test_gamma_gaps_have_the_asked_cv(cv):
    gaps_s = np.diff(Gamma(cv=cv).sample(40.0, 20_000.0, rng(2)))
    assert gaps_s.mean() == pytest.approx(1 / 40.0, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.02)


def mmpp_gap_cv(process, rate_req_s):
    """Coefficient of variation of the gaps, from the matrices of the MMPP cookbook."""
    leave = np.array([1 / process.high_s, 1 / process.low_s])
    generator = np.array([[-leave[0], leave[0]], [leave[1], -leave[1]]])
    stay = np.array([leave[1], leave[0]]) / leave.sum()
    shape = np.array([1.0, process.low_rate_frac])
    intensity = np.diag(shape * rate_req_s / (stay @ shape))
    at_arrival = stay @ intensity / rate_req_s
    inverse = np.linalg.inv(intensity - generator)
    second = 2.0 * at_arrival @ inverse @ inverse @ np.ones(2)
    return math.sqrt(second * rate_req_s**2 - 1.0)


@pytest.mark.parametrize("low_rate_frac", [0.0, 0.2, 1.0])
def test_mmpp_gaps_match_the_closed_form(low_rate_frac):
    process = MarkovModulated(high_s=3.0, low_s=5.0, low_rate_frac=low_rate_frac)
    gaps_s = np.diff(process.sample(10.0, 60_000.0, rng(3)))
    assert gaps_s.mean() == pytest.approx(0.1, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(mmpp_gap_cv(process, 10.0), rel=0.03)


def test_mmpp_counts_have_the_asymptotic_dispersion():
    process = MarkovModulated(high_s=1.0, low_s=2.0, low_rate_frac=0.25)
    leave_high, leave_low = 1.0, 0.5
    high = 8.0 * 3.0 / (1.0 + 0.25 * 2.0)
    low = 0.25 * high
    total = leave_high + leave_low
    dispersion = 1.0 + 2.0 * leave_high * leave_low * (high - low) ** 2 / (
        total**2 * (high * leave_low + low * leave_high)
    )
    times_s = process.sample(8.0, 400_000.0, rng(4))
    counts, _ = np.histogram(times_s, bins=2000, range=(0.0, 400_000.0))
    assert counts.var() / counts.mean() == pytest.approx(dispersion, rel=0.1)


def test_diurnal_follows_its_cosine():
    process = Diurnal(swing_frac=0.6, period_s=100.0, peak_s=30.0)
    times_s = process.sample(200.0, 1000.0, rng(5)) % 100.0
    counts, edges = np.histogram(times_s, bins=20, range=(0.0, 100.0))
    edge_phase = 2 * np.pi * (edges - 30.0) / 100.0
    mean = 200.0 * 10 * (5.0 + 0.6 * 100 / (2 * np.pi) * np.diff(np.sin(edge_phase)))
    chi_square = np.sum((counts - mean) ** 2 / mean)
    assert chi_square < 40.0  # 20 degrees of freedom: 0.5 %


def test_loads_share_their_random_numbers():
    slow, fast = (make_workload("sharegpt", r, 100.0, seed=3) for r in (10.0, 20.0))
    np.testing.assert_allclose(slow.arrival_s / 2.0, fast.arrival_s[: len(slow)], rtol=1e-12)
    assert np.array_equal(slow.prompt_tok, fast.prompt_tok[: len(slow)])
    assert np.array_equal(slow.output_tok, fast.output_tok[: len(slow)])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Gamma(cv=0.0), "cv"),
        (lambda: Gamma(cv=1e3), "cv"),
        (lambda: Gamma(cv=math.nan), "cv"),
        (lambda: MarkovModulated(high_s=0.0, low_s=1.0), "high_s"),
        (lambda: MarkovModulated(high_s=1.0, low_s=math.inf), "low_s"),
        (lambda: MarkovModulated(high_s=1.0, low_s=1.0, low_rate_frac=1.5), "swap"),
        (lambda: Diurnal(swing_frac=1.5), "swing_frac"),
        (lambda: Diurnal(period_s=0.0), "period_s"),
        (lambda: Diurnal(peak_s=-1.0), "peak_s"),
        (lambda: Poisson().sample(math.nan, 1.0, rng()), "rate_req_s"),
        (lambda: Poisson().sample(1.0, 0.0, rng()), "duration_s"),
        (lambda: Poisson().sample(1e6, 1e6, rng()), "lower the rate"),
        (lambda: Diurnal().sample(1e6, 1e6, rng()), "lower the rate"),
        (lambda: MarkovModulated(high_s=1e-9, low_s=1e-9).sample(1.0, 10.0, rng()), "lower"),
    ],
)
def test_bad_arrival_settings_are_refused_by_name(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


# Generators


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_seed_same_workload(name):
    a, b, other = (make_workload(name, 8.0, 200.0, seed=s) for s in (4, 4, 5))
    assert same(a, b)
    assert not np.array_equal(a.arrival_s, other.arrival_s)


def test_lengths_do_not_depend_on_the_arrival_process():
    a = make_workload("azure-conv", 8.0, 200.0, seed=4)
    b = make_workload("azure-conv", 8.0, 200.0, seed=4, arrivals=Gamma(cv=5.0))
    n = min(len(a), len(b))
    assert np.array_equal(a.prompt_tok[:n], b.prompt_tok[:n])
    assert np.array_equal(a.output_tok[:n], b.output_tok[:n])
    assert not np.array_equal(a.arrival_s[:n], b.arrival_s[:n])


def test_streams_are_independent():
    w = make_workload("sharegpt", 100.0, 500.0, seed=0)
    columns = np.log(np.stack((np.diff(w.arrival_s), w.prompt_tok[1:], w.output_tok[1:])))
    off_diagonal = np.corrcoef(columns)[np.triu_indices(3, 1)]
    assert np.abs(off_diagonal).max() < 4.0 / math.sqrt(len(w))


# Mean prompt and output lengths from the source that the catalog names.
@pytest.mark.parametrize(
    ("name", "prompt_mean_tok", "output_mean_tok"),
    [
        ("sharegpt", 240.0, 203.0),
        ("lmsys", 69.5, 214.5),
        ("azure-conv", 1154.7, 211.1),
        ("azure-code", 2048.0, 28.0),
        ("fixed", 512.0, 128.0),
    ],
)
def test_mean_lengths_are_those_of_the_source(name, prompt_mean_tok, output_mean_tok):
    w = make_closed_loop(name, concurrency=1, requests=200_000, seed=0)
    assert w.prompt_tok.mean() == pytest.approx(prompt_mean_tok, rel=0.015)
    assert w.output_tok.mean() == pytest.approx(output_mean_tok, rel=0.015)


def test_sharegpt_is_the_reference_scenario():
    w = make_closed_loop("sharegpt", concurrency=1, requests=200_000, seed=1)
    for tok, median, log_sd, low, high in (
        (w.prompt_tok, 120.0, 1.2, 4, 3000),
        (w.output_tok, 140.0, 0.9, 2, 1000),
    ):
        assert tok.min() == low
        assert tok.max() == high
        quartiles = np.quantile(tok, [0.25, 0.5, 0.75])
        expected = median * np.exp(log_sd * np.array([-0.67449, 0.0, 0.67449]))
        np.testing.assert_allclose(quartiles, expected, rtol=0.015)
    gaps_s = np.diff(make_workload("sharegpt", 20.0, 5000.0, seed=1).arrival_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.02)


def test_azure_conv_generator_matches_the_trace(shared_data):
    from voltana_ctrl.sim.traces import read_trace

    trace = read_trace(shared_data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz")
    made = make_workload("azure-conv", None, 20_000.0, seed=2)
    assert made.rate_req_s == pytest.approx(trace.rate_req_s, rel=0.02)
    assert made.summary()["gap_cv"] == pytest.approx(trace.summary()["gap_cv"], rel=0.03)
    for name in ("prompt_tok", "output_tok"):
        grid = np.unique(getattr(trace, name))
        cdfs = [
            np.searchsorted(np.sort(getattr(w, name)), grid, side="right") / len(w)
            for w in (trace, made)
        ]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 0.04


def test_azure_code_is_bursty_at_any_rate():
    kind = describe("azure-code")
    for rate_req_s in (2.57, 40.0):
        assert mmpp_gap_cv(kind.arrivals(rate_req_s), rate_req_s) == pytest.approx(13.0, rel=0.01)
    w = make_workload("azure-code", None, 400_000.0, seed=0)
    assert w.rate_req_s == pytest.approx(2.57, rel=0.05)
    assert w.summary()["gap_cv"] == pytest.approx(13.0, rel=0.05)
    per_hour = np.sum(np.diff(w.arrival_s) > 120.0) / (w.duration_s / 3600.0)
    assert 1.0 < per_hour < 8.0  # silences of more than two minutes


def test_fixed_takes_its_lengths():
    w = make_workload("fixed", 5.0, 50.0, seed=0, prompt_tok=1000, output_tok=1)
    assert set(w.prompt_tok.tolist()) == {1000}
    assert set(w.output_tok.tolist()) == {1}


def test_closed_loop_has_the_lengths_of_the_open_one():
    loop = make_closed_loop("lmsys", concurrency=16, requests=50, seed=9)
    w = make_workload("lmsys", 10.0, 20.0, seed=9)
    assert np.array_equal(loop.prompt_tok, w.prompt_tok[:50])
    assert np.array_equal(loop.output_tok, w.output_tok[:50])


@pytest.mark.parametrize("name", WORKLOADS)
def test_source_tells_status_and_origin(name):
    source = make_workload(name, 5.0, 5.0, seed=0).source
    assert source.split(":")[0] in {"given", "fitted", "published"}
    assert len(source) > 15


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: make_workload("shargpt", 1.0), "sharegpt, lmsys, azure-conv"),
        (lambda: make_workload("sharegpt"), "expected a rate_req_s"),
        (lambda: make_workload("sharegpt", 0.0), "rate_req_s"),
        (lambda: make_workload("azure-conv", math.nan), "rate_req_s"),
        (lambda: make_workload("sharegpt", 1.0, -5.0), "duration_s"),
        (lambda: make_workload("sharegpt", 1.0, 5.0, -1), "seed"),
        (lambda: make_workload("fixed", 1.0, prompt_tok=0), "prompt_tok"),
        (lambda: make_workload("fixed", 1.0, output_tok=0), "output_tok"),
        (lambda: make_closed_loop("fixed", 0, 5), "concurrency"),
        (lambda: make_closed_loop("fixed", 1, 0), "requests"),
    ],
)
def test_bad_generator_settings_are_refused_by_name(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
