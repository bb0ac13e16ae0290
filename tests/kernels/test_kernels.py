"""Kernels that stand alone: costs, the event tree, the heap of transfers, random numbers."""

import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit, types
from numba.core.errors import NumbaError

from voltana_ctrl import load_profile
from voltana_ctrl.kernels import compiled, law, layout
from voltana_ctrl.kernels.plant import advance, events
from voltana_ctrl.kernels.plant.functions import resolved
from voltana_ctrl.laws import batch_j, decode_j, decode_s, empty_tok, prefill_s
from voltana_ctrl.profiles import list_profiles
from voltana_ctrl.types import ladder

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b")
names = st.sampled_from(list_profiles())


# ---- cost ---------------------------------------------------------------------------------


@given(name=names, k=st.integers(0, 80), n=st.integers(0, 300), context=st.floats(0.0, 3000.0),
       chunk=st.integers(0, 8192), start=st.integers(0, 4000))  # fmt: skip
def test_an_iteration_is_its_two_parts(name, k, n, context, chunk, start) -> None:
    profile = load_profile(name)
    row = profile.table[k]
    padded = int(profile.padded_batch(300)[n])
    kv_tok = n * context
    tok2 = (start + chunk) ** 2 - start**2
    wall_s, decoded_j, prefilled_j = law.iteration_cost(row, padded, n, kv_tok, chunk, tok2, 0.0)
    apart_s = float(prefill_s(row, chunk, tok2)) if chunk else 0.0
    if chunk and n:
        # The weights are read once; who decodes pays for what is empty in the tiles of both.
        apart_s -= row["prefill_base_s"] + row["prefill_tok_s"] * float(empty_tok(row, chunk))
    expected_s = (float(decode_s(row, n, kv_tok, padded, chunk)) if n else 0.0) + apart_s
    assert wall_s == pytest.approx(expected_s, rel=1e-12)
    expected_j = float(decode_j(row, n, kv_tok, padded, chunk)) if n else 0.0
    assert decoded_j == pytest.approx(expected_j, rel=1e-12)
    beside_w = row["prefill_beside_w"] if n else 0.0
    drawn_w = row["prefill_power_w"] + beside_w
    assert prefilled_j == pytest.approx(apart_s * drawn_w, rel=1e-12)


@given(name=names, k=st.integers(0, 80), n=st.integers(1, 1000), kv_tok=st.floats(0.0, 4e5))
def test_times_of_one_phase_are_the_laws(name, k, n, kv_tok) -> None:
    row = load_profile(name).table[k]
    assert law.decode_s(row, n, kv_tok) == pytest.approx(float(decode_s(row, n, kv_tok)))
    assert law.prefill_s(row, n, kv_tok) == pytest.approx(float(prefill_s(row, n, kv_tok)))


@given(name=names, k=st.integers(0, 80), n=st.floats(0.0, 1000.0), kv_tok=st.floats(0.0, 5e5))
def test_energy_of_a_batch_is_that_of_the_laws(name, k, n, kv_tok) -> None:
    row = load_profile(name).table[k]
    assert law.batch_j(row, n, kv_tok) == pytest.approx(float(batch_j(row, n, kv_tok)))
    step_s = law.decode_s(row, n, kv_tok)
    assert law.decode_j(row, step_s, n, kv_tok) == pytest.approx(float(decode_j(row, n, kv_tok)))


@given(
    freq_mhz=st.one_of(st.floats(0.0, 3000.0), st.integers(14, 94).map(lambda k: 15.0 * k)),
    n_clocks=st.integers(1, 81),
)
def test_rounding_to_a_clock_is_as_its_words_say(freq_mhz, n_clocks) -> None:
    rows, clocks_mhz = REFERENCE.table.copy(), REFERENCE.clocks_mhz[:n_clocks]
    enough = [k for k, mhz in enumerate(clocks_mhz) if mhz >= freq_mhz]
    below = [k for k, mhz in enumerate(clocks_mhz) if mhz <= freq_mhz]
    up, down = enough[0] if enough else n_clocks - 1, below[-1] if below else 0
    assert law.row_up(rows, n_clocks, freq_mhz) == ladder.row_up(clocks_mhz, freq_mhz) == up
    assert law.row_down(rows, n_clocks, freq_mhz) == ladder.row_down(clocks_mhz, freq_mhz) == down
    nearest = int(np.argmin(np.abs(clocks_mhz - freq_mhz)))
    assert law.row_nearest(rows, n_clocks, freq_mhz) == nearest


# ---- the event tree and the heap ----------------------------------------------------------


@given(
    leaves=st.sampled_from([1, 2, 4, 8, 16]),
    writes=st.lists(st.tuples(st.integers(0, 15), st.sampled_from([0.5, 1.0, 2.0, 1e300]))),
)
def test_tree_finds_the_earliest_and_the_lowest_index_on_a_tie(leaves, writes) -> None:
    tree = np.full(2 * leaves, 1e300)
    times_s = [1e300] * leaves
    for i, t_s in writes:
        events._set_next(tree, i % leaves, t_s)
        times_s[i % leaves] = t_s
    assert tree[1] == min(times_s)
    assert events.first(tree) == times_s.index(min(times_s))


@given(st.lists(st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0])), max_size=60))
def test_transfers_arrive_in_order_of_time_then_number(steps) -> None:
    sim = np.zeros(1, dtype=layout.SIM_DTYPE)
    moving_s, moving_r = np.zeros(60), np.zeros(60, dtype=np.int64)
    inside: list[tuple[float, int]] = []
    for r, t_s in enumerate(steps):
        if t_s is not None:
            events.push_moving(sim[0], moving_s, moving_r, t_s, 60 - r)
            inside.append((t_s, 60 - r))
        elif inside:
            first = min(inside)
            assert (moving_s[0], moving_r[0]) == first
            assert events.pop_moving(sim[0], moving_s, moving_r) == first[1]
            inside.remove(first)
    assert sim[0]["n_moving"] == len(inside)


# ---- random numbers -----------------------------------------------------------------------


def generator(seed: int) -> np.ndarray:
    sim = np.zeros(1, dtype=layout.SIM_DTYPE)
    sim["rng"] = (2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64  # as Plant does
    return sim


def test_uniform_numbers_are_uniform_and_seeds_are_unlike() -> None:
    n = 20_000
    drawn = np.array(
        [[advance._uniform(sim[0]) for _ in range(n)] for sim in map(generator, (0, 1))]
    )
    assert np.all((drawn >= 0.0) & (drawn < 1.0))
    for row in drawn:
        counts = np.histogram(row, bins=20, range=(0.0, 1.0))[0]
        chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum()
        assert chi2 < 43.8  # 0.1 % point at 19 degrees of freedom
        assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(*drawn)[0, 1]) < 4 / np.sqrt(n)


def test_jitter_has_mean_one_and_the_spread_asked_for() -> None:
    sim = generator(7)
    drawn = np.array([advance._jitter(sim[0], 0.3) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(1.0, abs=4 * 0.307 / np.sqrt(20_000))
    assert np.log(drawn).std() == pytest.approx(0.3, rel=0.03)


def test_records_are_of_two_kinds_of_number() -> None:
    """One compiled signature serves as long as fields are float64 or int64."""
    for dtype in (layout.INSTANCE_DTYPE, layout.REQUEST_DTYPE, layout.PROFILE_DTYPE,
                  layout.ITERATION_DTYPE, layout.SEEN_DTYPE):  # fmt: skip
        kinds = {dtype[name].str for name in dtype.names}
        assert kinds <= {"<f8", "<i8"}


def test_padded_sizes_never_shrink_a_batch() -> None:
    for name in list_profiles():
        profile = load_profile(name)
        padded = profile.padded_batch()
        assert np.all(padded >= np.arange(padded.size))
        assert np.all(np.diff(padded) >= 0)
    assert dataclasses.replace(REFERENCE, batch_steps=()).padded_batch(9).tolist() == [*range(10)]


# ---- functions as arguments ---------------------------------------------------------------


def test_a_resolved_function_is_looked_up_no_more() -> None:
    signature = types.float64(types.float64)
    of_function = types.FunctionType(signature)

    @njit(signature)
    def twice(x):
        return 2.0 * x

    @njit(types.float64(of_function, types.float64))
    def applied(function, x):
        return function(x)

    once = resolved(twice, signature)
    assert applied(once, 3.0) == applied(twice, 3.0) == 6.0
    with mock.patch.object(type(twice), "get_compile_result", side_effect=AssertionError):
        assert applied(once, 4.0) == 8.0
        with pytest.raises(AssertionError):
            applied(twice, 4.0)
    assert len(applied.signatures) == 1


def test_what_is_not_compiled_is_passed_on_as_it_is() -> None:
    assert resolved(len, None) is len


def test_a_kernel_that_makes_arrays_says_so_or_does_not_compile():
    def doubled(value):
        both = np.empty(2)
        both[:] = value
        return both[0] + both[1]

    signature = types.float64(types.float64)
    assert compiled.njit(signature, cache=False, allocates=True)(doubled)(2.0) == 4.0
    with pytest.raises(NumbaError):
        compiled.njit(signature, cache=False)(doubled)


def test_arrays_that_are_handed_on_are_neither_freed_nor_kept():
    """Nobody counts references within a kernel, so its caller's count is all there is."""

    @compiled.njit(types.float64(types.Array(types.float64, 1, "C")), cache=False)
    def total(values):
        sum_ = 0.0
        for value in values[1:]:
            sum_ += value
        return sum_

    values = np.arange(1e5)
    before = sys.getrefcount(values)
    for _ in range(1000):
        assert total(values) == values.sum()
    assert sys.getrefcount(values) == before
