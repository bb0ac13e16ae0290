import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracles.naive_predict import reflected
from voltana_ctrl import Slo
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.estimate.margin import MarginTracker, track
from voltana_ctrl.types import RequestBatch

SLO = Slo(ttft_s=0.6, itl_s=0.06)


def requests(ttft_s, itl_s):
    k = np.zeros(len(ttft_s))
    return RequestBatch(
        request=k,
        request_class=k,
        prompt_tok=k + 1,
        output_tok=k + 2,
        ttft_s=ttft_s,
        itl_s=itl_s,
        prefill_instance=k,
        decode_instance=k + 1,
    )


@given(
    st.floats(-0.4, 5.0),
    st.lists(st.booleans(), max_size=200),
    st.floats(1e-4, 0.01),
    st.floats(0.001, 0.2),
)
@example(-0.4, [False] * 50 + [True], 0.01, 0.2)
def test_track_matches_its_naive_twin(start, missed, eta, miss_frac):
    got = track(start, np.array(missed, bool), eta_frac=eta, miss_frac=miss_frac, min_frac=-0.4)
    wanted = reflected(start, [eta * (m - miss_frac) for m in missed], -0.4)
    assert got == pytest.approx(wanted, abs=1e-12)


def closed_loop(tracker, error_frac, delay_req, steps):
    """Requests decided one by one at the applied margin; outcomes come late, in any order.

    `error_frac(t, margin)` is the adversary: it sees the margin, and makes the true latency
    any multiple of what was predicted. A request is decided at the largest prediction that
    the margin allows, so it misses if its error is larger than the margin.
    """
    state = tracker.init()
    due = {}
    finished_req = missed_req = 0
    history = []
    for t in range(steps):
        margin = float(tracker.applied_frac(state)[0])
        due.setdefault(t + delay_req(t), []).append(error_frac(t, margin) > margin)
        outcomes = due.pop(t, [])
        state = tracker.update_misses(state, outcomes, [])
        for missed in outcomes:
            finished_req += 1
            missed_req += missed
            history.append((finished_req, missed_req))
    return state, history


@given(
    st.integers(0, 60),
    st.lists(st.floats(-0.5, 1.0), min_size=1, max_size=30),
    st.sampled_from(["given", "always", "greedy", "bursts"]),
    st.floats(0.002, 0.01),
)
@example(60, [1.0], "always", 0.01)
@example(0, [1.0], "greedy", 0.01)
def test_miss_rate_stays_below_its_bound(late, errors, adversary, eta):
    """Any errors of at most `max_frac`; outcomes `late` requests late."""
    tracker = MarginTracker(slo=SLO, eta_frac=eta, max_frac=1.0)

    def error_frac(t, margin):
        if adversary == "always":
            return 1.0
        if adversary == "greedy":  # misses by a hair whenever it can
            return min(margin + 1e-9, 1.0)
        if adversary == "bursts":
            return 1.0 if (t // 100) % 2 else -0.5
        return errors[t % len(errors)]

    _, history = closed_loop(tracker, error_frac, lambda t: late, 400)
    for finished_req, missed_req in history:
        bound = tracker.bound_frac(finished_req=finished_req, late_req=late)
        assert missed_req / finished_req <= bound + 1e-12


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_bound_holds_when_outcomes_overtake_each_other(most_delay, seed):
    tracker = MarginTracker(slo=SLO, max_frac=0.5)
    random = np.random.default_rng(seed)
    delays = random.integers(0, most_delay + 1, 600)
    _, history = closed_loop(tracker, lambda t, margin: 0.5, lambda t: int(delays[t]), 600)
    # Of two decisions at most `most_delay` apart either may end first.
    late = 2 * most_delay
    for finished_req, missed_req in history:
        bound = tracker.bound_frac(finished_req=finished_req, late_req=late)
        assert missed_req / finished_req <= bound + 1e-12


def test_bound_is_nearly_reached():
    """Not vacuous: with late outcomes an adversary gets nine tenths of what it allows."""
    tracker = MarginTracker(slo=SLO, start_frac=-0.4, max_frac=1.0)
    _, history = closed_loop(tracker, lambda t, margin: 1.0, lambda t: 50, 400)
    finished_req, missed_req = history[-1]
    assert missed_req / finished_req > 0.9 * tracker.bound_frac(
        finished_req=finished_req, late_req=50
    )


@pytest.mark.parametrize("late", [0, 200])
def test_attainment_settles_at_the_set_point(late):
    tracker = MarginTracker(slo=SLO)
    random = np.random.default_rng(0)
    errors = np.exp(0.1 * random.standard_normal(16_000)) - 1.0
    state, history = closed_loop(tracker, lambda t, margin: errors[t], lambda t: late, 16_000)
    (n0, m0), (n1, m1) = history[4_000], history[-1]
    assert 1.0 - (m1 - m0) / (n1 - n0) == pytest.approx(0.995, abs=0.002)
    assert state.attainment[0] > 0.99


def test_clipping_above_would_break_the_promise():
    """The reason why it is not clipped: outcomes that come late, and errors in long bursts."""
    tracker = MarginTracker(slo=SLO, max_frac=0.3)

    def run(clip):
        state, late, missed = tracker.init(), [], []
        for t in range(12_000):
            margin = float(tracker.applied_frac(state)[0])
            error = 0.3 if (t // 250) % 2 else -0.5
            late.append(error > margin)
            if len(late) > 200:
                outcome = late.pop(0)
                missed.append(outcome)
                state = tracker.update_misses(state, [outcome], [])
                if clip:
                    state = type(state)(raw_frac=np.minimum(state.raw_frac, tracker.max_frac))
        return 1.0 - np.mean(missed[2000:])

    assert run(clip=False) > run(clip=True)
    assert run(clip=False) >= 0.99


def test_metrics_are_tracked_apart_and_in_order():
    tracker = MarginTracker(slo=SLO)
    batch = requests([0.7, 0.1, np.nan], [0.01, 0.061, 0.06])
    state = tracker.update(tracker.init(), batch)
    np.testing.assert_array_equal(state.missed_req, [2, 1])
    np.testing.assert_array_equal(state.finished_req, [3, 3])
    np.testing.assert_allclose(state.raw_frac, [0.1 + 0.02 - 0.00015, 0.1 + 0.01 - 0.00015])
    one_by_one = tracker.init()
    for k in range(3):
        one_by_one = tracker.update(one_by_one, requests(batch.ttft_s[[k]], batch.itl_s[[k]]))
    np.testing.assert_allclose(one_by_one.raw_frac, state.raw_frac)


def test_nothing_finished_changes_nothing():
    tracker = MarginTracker(slo=SLO)
    state = tracker.init()
    assert tracker.update(state, RequestBatch.empty()) is state
    np.testing.assert_array_equal(state.attainment, [1.0, 1.0])


def test_applied_margin_is_clipped_and_the_integrator_is_not():
    tracker = MarginTracker(slo=SLO, max_frac=0.2)
    state = tracker.update_misses(tracker.init(), [True] * 50, [False] * 50)
    assert state.raw_frac[0] == pytest.approx(0.1 + 50 * 0.01 * 0.995)
    np.testing.assert_allclose(tracker.applied_frac(state), [0.2, 0.1 - 50 * 0.01 * 0.005])
    state = tracker.update_misses(state, [], [False] * 100_000)
    assert state.raw_frac[1] == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"eta_frac": 0.02}, "eta_frac"),
        ({"eta_frac": 0.0}, "eta_frac"),
        ({"eta_frac": float("nan")}, "eta_frac"),
        ({"min_frac": -1.0}, "min_frac"),
        ({"start_frac": 2.0}, "start_frac"),
        ({"max_frac": float("inf")}, "max_frac"),
        ({"set_point_frac": 0.98}, "set_point_frac"),
        ({"set_point_frac": 1.0}, "set_point_frac"),
    ],
)
def test_settings_out_of_range_are_refused(settings, names):
    with pytest.raises(ConfigError, match=names):
        MarginTracker(slo=SLO, **settings)


def test_wrong_shapes_and_counts_are_refused():
    tracker = MarginTracker(slo=SLO)
    with pytest.raises(ShapeError, match="itl_missed"):
        tracker.update_misses(tracker.init(), [True], [[True]])
    with pytest.raises(ConfigError, match="finished_req"):
        tracker.bound_frac(finished_req=0, late_req=1)
