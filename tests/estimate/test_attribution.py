import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import Decision, FleetSpec, IterationBatch, load_profile
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.estimate import EnergyLedger, RequestClasses, share_iterations, split_iterations
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import RequestBatch

energies = st.floats(0.0, 1e6)
counts = st.integers(0, 1000)


def iterations(rows):
    """Rows of (instance, decoding requests, prompt tokens, energy)."""
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 4).T
    k = np.ones(len(rows))
    return IterationBatch(
        instance=columns[0],
        t_s=k,
        wall_s=k,
        freq_mhz=k,
        batch_req=columns[1],
        prefill_tok=columns[2],
        kv_tok=k,
        energy_j=columns[3],
    )


@given(
    st.lists(st.tuples(st.just(0), counts, counts, energies), max_size=50),
    st.floats(-1.0, 2.0),
)
def test_both_parts_are_the_whole(rows, frac):
    batch = iterations(rows)
    for parts in (split_iterations(batch), split_iterations(batch, np.full(len(rows), frac))):
        decode_j, prefill_j = parts
        np.testing.assert_allclose(decode_j + prefill_j, batch.energy_j, rtol=1e-12)
        assert (decode_j >= 0.0).all()
        assert (prefill_j >= 0.0).all()
        assert (decode_j[(batch.batch_req == 0) & (batch.prefill_tok > 0)] == 0.0).all()
        assert (prefill_j[batch.prefill_tok == 0] == 0.0).all()


@given(
    st.lists(energies, min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 19), st.integers(1, 5000)), max_size=100),
)
def test_each_iterations_energy_is_shared_whole(energy_j, members):
    which = np.array([member[0] % len(energy_j) for member in members], dtype=int)
    n_tok = np.array([member[1] for member in members], dtype=float)
    share = share_iterations(energy_j, which, n_tok)
    back = np.bincount(which, weights=share, minlength=len(energy_j))
    served = np.isin(np.arange(len(energy_j)), which)
    np.testing.assert_allclose(back[served], np.array(energy_j)[served], rtol=1e-12, atol=1e-300)
    assert (share >= 0.0).all()


def test_wrong_members_are_refused():
    with pytest.raises(ShapeError, match="expected iterations 0 to 1"):
        share_iterations([1.0, 2.0], [2], [1])
    with pytest.raises(ShapeError, match="tokens"):
        share_iterations([1.0], [0, 0], [1])
    with pytest.raises(ShapeError, match="prefill_frac"):
        split_iterations(iterations([(0, 1, 1, 1.0)]), [0.5, 0.5])


finished_rows = st.tuples(
    st.integers(-1, 3), st.integers(-1, 3), st.integers(1, 5000), st.integers(1, 900),
    st.floats(0.0, 30.0), st.floats(0.0, 0.5),
)  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(-1, 3), counts, counts, energies), max_size=8),
            st.lists(finished_rows, max_size=5),
        ),
        max_size=12,
    )
)
def test_spent_is_charged_plus_open_whatever_is_told(ticks):
    ledger = EnergyLedger(instances=3, sample_s=0.25)
    state = ledger.init()
    told_j, costs_j, requests = 0.0, 0.0, 0
    for tick, (rows, done) in enumerate(ticks, 1):
        batch = iterations(rows)
        columns = np.array(done, dtype=np.float64).reshape(len(done), 6).T
        ends = RequestBatch(
            request=np.arange(len(done)),
            request_class=np.zeros(len(done)),
            prefill_instance=columns[0],
            decode_instance=columns[1],
            prompt_tok=columns[2],
            output_tok=columns[3],
            ttft_s=columns[4],
            itl_s=columns[5],
        )
        state, cost = ledger.update(state, t_s=0.1 * tick, iterations=batch, finished=ends)
        worked = (batch.batch_req > 0) | (batch.prefill_tok > 0)
        known = (batch.instance >= 0) & (batch.instance < 3)
        told_j += float(batch.energy_j[known].sum())
        assert worked.shape == known.shape
        assert (cost.energy_j >= 0.0).all()
        assert np.isfinite(cost.energy_j).all()
        costs_j += float(cost.energy_j.sum())
        requests += len(done)
    scale = max(told_j, costs_j, 1.0)
    assert state.spent_j == pytest.approx(told_j, abs=1e-9 * scale)
    assert state.charged_j == pytest.approx(costs_j, abs=1e-9 * scale)
    assert state.open_j == pytest.approx(told_j - costs_j, abs=1e-9 * scale)
    per_class = state.per_class()
    assert per_class["finished_req"].sum() == requests
    by_class_j = (per_class["energy_j_req"] * per_class["finished_req"]).sum()
    assert by_class_j == pytest.approx(costs_j, abs=1e-9 * scale)


def test_ledger_of_a_simulated_fleet_adds_up():
    """All energy of iterations ends up with requests; longer ones pay more."""
    fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    plant = Plant(
        fleet,
        make_workload("sharegpt", rate_req_s=20.0, duration_s=40.0, seed=0),
        PlantSettings(log_iterations=4096),
    )
    plant.apply(Decision.highest(fleet, floor_mhz=fleet.max_mhz))
    ledger = EnergyLedger(instances=4, classes=RequestClasses(prompt_edges_tok=(100, 1000)))
    state = ledger.init()
    costs, output_tok, prompt_tok = [], [], []
    for tick in range(1, 701):
        plant.advance(0.1 * tick)
        seen = plant.read()
        before = state
        state, cost = ledger.update(
            state, t_s=seen.state.t_s, iterations=seen.iterations, finished=seen.finished
        )
        assert state.spent_j >= before.spent_j
        costs.append(cost)
        output_tok.append(seen.finished.output_tok)
        prompt_tok.append(seen.finished.prompt_tok)
    inst = plant.instances
    assert state.spent_j == pytest.approx(
        inst["prefill_j"].sum() + inst["decode_j"].sum(), rel=1e-6
    )
    # Everybody is done: what is open is the error of times known to a tick, and the hand-off.
    assert abs(state.open_j) < 0.03 * state.spent_j
    prefill_j = np.concatenate([cost.prefill_j for cost in costs])
    decode_j = np.concatenate([cost.decode_j for cost in costs])
    assert prefill_j.sum() == pytest.approx(inst["prefill_j"].sum(), rel=0.05)
    assert decode_j.sum() == pytest.approx(inst["decode_j"].sum(), rel=0.05)
    # While the load is steady; the last requests of a run share an iteration with nobody.
    steady = slice(100, 600)
    for cost_j, n_tok in ((prefill_j, prompt_tok), (decode_j, output_tok)):
        assert np.corrcoef(cost_j[steady], np.concatenate(n_tok)[steady])[0, 1] > 0.8
    per_class = state.per_class()
    assert (np.diff(per_class["energy_j_req"]) > 0.0).all()
    assert per_class["finished_req"].sum() == len(plant.requests)
    assert (per_class["ttft_s"] > 0.0).all()


def test_update_is_pure_and_memory_is_bounded():
    ledger = EnergyLedger(instances=1, sample_s=1.0, keep_s=10.0)
    state = ledger.init()
    batch = iterations([(0, 2, 0, 5.0)])
    for tick in range(1, 1001):
        copy = state.past.copy()
        after, _ = ledger.update(
            state, t_s=0.1 * tick, iterations=batch, finished=RequestBatch.empty()
        )
        np.testing.assert_array_equal(state.past, copy)
        state = after
    assert len(state.past_s) <= 14
    assert state.spent_j == pytest.approx(5000.0)
    with pytest.raises(ConfigError, match="t_s"):
        ledger.update(state, t_s=1.0, iterations=batch, finished=RequestBatch.empty())


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="keep_s"):
        EnergyLedger(instances=1, sample_s=2.0, keep_s=1.0)
    with pytest.raises(ConfigError, match="instances"):
        EnergyLedger(instances=0)
