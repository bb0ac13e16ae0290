"""The script that compares a vLLM with and without the plugin: its arithmetic."""

import numpy as np
import pytest


@pytest.fixture
def bench(root):
    if not (root / "bench" / "plugin_cost.py").exists():
        pytest.skip("bench/ is not part of the source distribution")
    from bench import plugin_cost

    return plugin_cost


def test_ratios_are_of_the_same_interval_and_an_interval_that_others_disturbed_counts_once(bench):
    busy = np.array([1.0, 1.1, 3.0, 1.0, 1.2, 0.9, 1.0, 1.4, 1.0, 1.0])  # what others took
    plain = np.stack([100.0 / busy, 1600.0 / busy, np.full(10, 1.0), np.full(10, 0.9)], axis=1)
    ours = plain / [1.02, 1.02, 1.0, 1.0]
    ours[3] = plain[3] / [5.0, 5.0, 1.0, 1.0]
    found = bench.told(np.stack([plain, ours], axis=1))
    assert found["tok"]["more_frac"] == pytest.approx(1.0 / 1.02 - 1.0)
    assert found["cpu_ms_per_iteration"]["more_frac"] == pytest.approx(0.02)
    assert found["engine_thread_ms_per_iteration"]["plain"] == pytest.approx(9.0)
    low, high = found["cpu_ms_per_iteration"]["interval_frac"]
    assert low == pytest.approx(0.02)
    assert high == pytest.approx(0.02)
