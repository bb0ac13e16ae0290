"""Terms that a profile may leave out: host time, idle power by clock, cost of a clock change."""

import dataclasses
from importlib.resources import files

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, compare, load_profile
from voltana_ctrl.control.budget import highest_power_w
from voltana_ctrl.kernels import law
from voltana_ctrl.laws import (
    batch_j,
    decode_equilibrium,
    decode_j,
    decode_s,
    decode_tangent,
    prefill_equilibrium,
    prefill_j,
    prefill_s,
)
from voltana_ctrl.sim.arrivals import MarkovModulated
from voltana_ctrl.sim.metrics import snapshot
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import Limits

DATED = "a100-sxm-80gb/llama-3.1-8b-2026-11"
#: Figures of a run that differ from machine to machine.
OF_THE_MACHINE = ("decide_p50_s", "decide_p99_s", "sim_wall_s")
PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")


def with_terms(**scalars):
    """The reference with every term that may be left out."""
    table = PROFILE.table.copy()
    g = table["clock_mhz"] / 1e3
    table["idle_w"] = 50.0 + 20.0 * g
    table["decode_host_s"] = 3e-3
    table["decode_roof_base_s"] = 4e-3
    table["decode_roof_s"] = 3.0 * table["decode_req_s"]
    table["prefill_req_s"] = 13e-3
    table["prefill_beside_w"] = 30.0
    return dataclasses.replace(
        PROFILE, table=table, idle_w=float(table["idle_w"][-1]), name="a100/terms", **scalars
    )


FULL = with_terms()


@pytest.mark.parametrize("tile_tok", [0.0, 48.0, 256.0])
@pytest.mark.parametrize("n", [0.0, 1.0, 24.0, 90.0, 400.0])
@pytest.mark.parametrize("tok", [0.0, 5.0, 24.0, 700.0])
def test_prompts_and_requests_share_their_tiles(tile_tok, n, tok):
    """Slots of an iteration, one by one: what is computed is rounded up once, together."""
    if n + tok == 0.0:
        return
    slots = tile_tok
    while slots < n + tok:
        slots += tile_tok or n + tok
    slots = slots if n + tok > tile_tok else n + tok
    for row in FULL.table[::16].copy():
        row["decode_tile_tok"] = tile_tok
        if n:
            line = row["decode_base_s"] + row["decode_req_s"] * n + row["prefill_tok_s"] * tok
            roof = row["decode_roof_base_s"] + row["decode_roof_s"] * n
            roof += row["prefill_tok_s"] * (slots - n)
            expected_s = max(line, roof) + row["decode_kv_s"] * 300 * n + row["decode_host_s"]
        else:
            expected_s = row["prefill_base_s"] + row["prefill_tok_s"] * slots
        wall_s, step_j, chunk_j = law.iteration_cost(row, n, n, 300 * n, tok, 0.0, 0.0)
        assert wall_s == pytest.approx(expected_s, rel=1e-12)
        alone = decode_s(row, n, 300 * n, prompt_tok=tok) if n else prefill_s(row, tok, 0.0, 0.0)
        assert wall_s == pytest.approx(alone + row["prefill_tok_s"] * tok * (n > 0), rel=1e-12)
        # Nothing that is empty is paid for by a request: its energy is the time's.
        held_j = (alone if n else 0.0) * row["decode_power_w"]
        assert step_j == pytest.approx(held_j + batch_j(row, n, 300 * n) if n else 0.0, rel=1e-12)
        assert chunk_j >= 0.0


@pytest.mark.parametrize("n", [1.0, 24.0, 90.0, 400.0])
def test_the_compiled_laws_agree_with_the_others(n):
    kv_tok, tok, tok2, begun = 400.0 * n, 700.0, 4e5, 2.0
    for row in FULL.table[::16]:
        step_s = float(decode_s(row, n, kv_tok))
        assert law.decode_s(row, n, kv_tok) == pytest.approx(step_s, rel=1e-12)
        step_j = float(decode_j(row, n, kv_tok))
        assert law.decode_j(row, step_s, n, kv_tok) == pytest.approx(step_j, rel=1e-12)
        assert law.batch_j(row, n, kv_tok) == pytest.approx(batch_j(row, n, kv_tok), rel=1e-12)
        assert step_j == pytest.approx(step_s * row["decode_power_w"] + batch_j(row, n, kv_tok))
        got = law.iteration_cost(row, n, 0.0, 0.0, tok, tok2, begun)
        assert got[0] == pytest.approx(prefill_s(row, tok, tok2, begun), rel=1e-12)
        assert got[2] == pytest.approx(prefill_j(row, tok, tok2, begun), rel=1e-12)
        both = law.iteration_cost(row, n, n, kv_tok, tok, tok2, begun)
        host_s = begun * row["prefill_req_s"]
        chunk_s = row["prefill_tok_s"] * tok + row["prefill_tok2_s"] * tok2
        assert both[0] == pytest.approx(step_s + chunk_s + host_s, rel=1e-12)
        beside_w = row["prefill_power_w"] + row["prefill_beside_w"]
        assert both[2] == pytest.approx(chunk_s * beside_w + host_s * row["idle_w"], rel=1e-12)


def test_the_gpu_idles_while_the_host_works():
    """Time and energy of the host come on top of a profile without it, at idle power."""
    bare = FULL.table.copy()
    bare["decode_host_s"] = bare["prefill_req_s"] = 0.0
    n, kv_tok = 60.0, 26_000.0
    np.testing.assert_allclose(decode_s(FULL.table, n, kv_tok), decode_s(bare, n, kv_tok) + 3e-3)
    np.testing.assert_allclose(
        decode_j(FULL.table, n, kv_tok), decode_j(bare, n, kv_tok) + 3e-3 * FULL.table["idle_w"]
    )
    np.testing.assert_allclose(
        prefill_j(FULL.table, 500.0), prefill_j(bare, 500.0) + 13e-3 * FULL.table["idle_w"]
    )


@pytest.mark.parametrize("rate_req_s", [1.0, 10.0, 20.0])
def test_the_equilibrium_is_the_fixed_point(rate_req_s):
    """``n = r T(n)``, found by brute force from an empty batch, with power from the energy."""
    rows = FULL.table[::10]
    at = decode_equilibrium(rows, rate_req_s, 203.0, 434.0)
    for k, row in enumerate(rows):
        n = 0.0
        for _ in range(200_000):
            after = rate_req_s * 202.0 * float(decode_s(row, n, 434.0 * n))
            if after > 1e6 or abs(after - n) < 1e-10:
                break
            n = after
        if after > 1e6:
            assert np.isinf(at.step_s[k])
            continue
        assert at.running_req[k] == pytest.approx(n, rel=1e-6)
        drawn_w = decode_j(row, n, 434.0 * n) / decode_s(row, n, 434.0 * n)
        assert at.power_w[k] == pytest.approx(drawn_w, rel=1e-6)


def test_prompts_wait_for_the_host():
    busy = prefill_equilibrium(FULL.table, 10.0, 240.0, FULL.table["idle_w"])
    bare = prefill_equilibrium(PROFILE.table, 10.0, 240.0, FULL.table["idle_w"])
    np.testing.assert_allclose(busy.rho_frac, bare.rho_frac + 10.0 * 13e-3)
    stable = busy.rho_frac < 1.0
    np.testing.assert_allclose(busy.power_w[stable], bare.power_w[stable])


@pytest.mark.parametrize("n", [4.0, 30.0, 300.0])
def test_the_tangent_touches_the_law(n):
    rows = FULL.table[::10]
    line, _ = decode_tangent(rows, rows, np.full(len(rows), n))
    touching_s = line["decode_base_s"] + line["decode_req_s"] * n + line["decode_kv_s"] * 1e4
    np.testing.assert_allclose(touching_s, decode_s(rows, n, 1e4))


def run(profile, fleet="2P2D", *, rate_req_s=8.0, clocks_mhz=None, settings=None):
    """Sums of a run of 20 s; the clock alternates between two, once a second."""
    spec = FleetSpec.parse(fleet, profile)
    workload = make_workload("sharegpt", rate_req_s=rate_req_s, duration_s=20.0, seed=1)
    plant = Plant(spec, workload, settings or PlantSettings(actuation_s=0.0, settle_s=0.0))
    for second in range(20):
        low_mhz = (clocks_mhz or (1410.0, 1410.0))[second % 2]
        plant.apply(Decision.highest(spec, ceiling_mhz=np.full(len(spec), low_mhz)))
        plant.advance(second + 1.0)
    return plant, snapshot(plant)


def total_j(sums):
    return sum(float(sums[f"{part}_j"].sum()) for part in ("prefill", "decode", "idle", "transfer"))


@pytest.mark.parametrize("fleet", ["2P2D", "3C"])
def test_energy_is_what_iterations_and_idle_time_add_up_to(fleet):
    """Each iteration priced anew from its record, each second between them at idle power."""
    settings = PlantSettings(actuation_s=0.0, settle_s=0.0, log_iterations=1_000_000)
    plant, sums = run(FULL, fleet, settings=settings)
    rows = FULL.table[-1]
    log = plant.read().iterations
    assert len(log.wall_s) > 500
    decoding = log.batch_req > 0
    pure = decoding & (log.prefill_tok == 0)
    size = FULL.padded_batch()[log.batch_req.astype(int)]
    expected_s = decode_s(rows, log.batch_req, log.kv_tok, size)
    np.testing.assert_allclose(log.wall_s[pure], expected_s[pure], rtol=1e-9)
    expected_j = expected_s * rows["decode_power_w"] + batch_j(rows, log.batch_req, log.kv_tok)
    np.testing.assert_allclose(log.energy_j[pure], expected_j[pure], rtol=1e-9)
    # What is under way has no record yet.
    under_way_j = np.where(
        sums["iterating"] == 1, sums["prefill_j"] + sums["decode_j"] - sums["iter_start_j"], 0.0
    )
    worked_j = float((sums["prefill_j"] + sums["decode_j"] - under_way_j).sum())
    assert worked_j == pytest.approx(float(log.energy_j.sum()), rel=1e-9)
    idle_s = 20.0 * len(sums) - float(sums["busy_s"].sum())
    assert float(sums["idle_j"].sum()) == pytest.approx(FULL.idle_w * idle_s, rel=1e-9)


def test_an_idle_instance_draws_what_its_clock_says():
    spec = FleetSpec.parse("1P1D", FULL)
    none = Workload(name="none", arrival_s=[], prompt_tok=[], output_tok=[], duration_s=10.0)
    plant = Plant(spec, none, PlantSettings(actuation_s=0.0, settle_s=0.0))
    plant.apply(Decision.highest(spec, ceiling_mhz=np.array([210.0, 1410.0])))
    plant.advance(10.0)
    state = plant.state()
    np.testing.assert_allclose(state.power_w, [50.0 + 20.0 * 0.21, 50.0 + 20.0 * 1.41])
    np.testing.assert_allclose(state.energy_j, 10.0 * state.power_w)


def test_a_parked_instance_draws_what_its_profile_says():
    spec = FleetSpec.parse("1P2D", with_terms(parked_w=20.0, wake_s=0.5))
    none = Workload(name="none", arrival_s=[], prompt_tok=[], output_tok=[], duration_s=10.0)
    plant = Plant(spec, none, PlantSettings(actuation_s=0.0, settle_s=0.0))
    parked = np.array([True, True, False])
    plant.apply(dataclasses.replace(Decision.highest(spec), active=parked))
    plant.advance(10.0)
    assert plant.state().energy_j[2] == pytest.approx(200.0)
    assert spec.instances[2].wake_s == 0.5


def test_a_clock_change_stalls_and_costs():
    """As many joules as changes, and iterations that are longer by the stalls alone."""
    clocks = (1410.0, 1005.0)
    plain, _ = run(PROFILE, clocks_mhz=clocks)
    _, before = plain, snapshot(plain)
    _, costly = run(dataclasses.replace(PROFILE, clock_change_j=2.0), clocks_mhz=clocks)
    changes = int(costly["clock_sets"].sum())
    assert changes == 4 * 19
    assert total_j(costly) - total_j(before) == pytest.approx(2.0 * changes)
    _, stalled = run(dataclasses.replace(PROFILE, clock_stall_s=0.05), clocks_mhz=clocks)
    assert stalled["decode_iterations"].sum() < before["decode_iterations"].sum()
    assert stalled["emitted_tok"].sum() <= before["emitted_tok"].sum()


def test_one_stall_delays_one_request_by_its_length():
    one = Workload(name="one", arrival_s=[0.0], prompt_tok=[200], output_tok=[100], duration_s=9.0)
    done_s = {}
    for stall_s in (0.0, 0.3):
        spec = FleetSpec.parse("1C", dataclasses.replace(PROFILE, clock_stall_s=stall_s))
        plant = Plant(spec, one, PlantSettings(actuation_s=0.0, settle_s=0.0))
        plant.apply(Decision.highest(spec))
        plant.advance(0.5)
        plant.apply(Decision.highest(spec, ceiling_mhz=np.array([1395.0])))
        plant.advance(9.0)
        done_s[stall_s] = float(plant.requests["done_s"][0])
        busy_s = float(snapshot(plant)["busy_s"][0])
        assert busy_s == pytest.approx(done_s[stall_s])
    assert done_s[0.3] - done_s[0.0] == pytest.approx(0.3)


@pytest.mark.parametrize("second", ["clock", "cap"])
def test_a_change_within_a_stall_costs_no_time_twice(second):
    """What is left of a stall is no work: changed again half-way, an iteration ends as late.

    A prompt alone: `work` of it is left when the first change comes; a second one 0.05 s into the
    stall of 0.1 s begins a stall of its own, a cap that binds nothing changes nothing.
    """
    one = Workload(name="one", arrival_s=[0.0], prompt_tok=[3000], output_tok=[1], duration_s=9.0)
    profile = dataclasses.replace(PROFILE, clock_stall_s=0.1)
    spec = FleetSpec.parse("1C", profile)
    plant = Plant(spec, one, PlantSettings(actuation_s=0.0, settle_s=0.0))
    plant.apply(Decision.highest(spec, ceiling_mhz=np.array([1395.0])))
    plant.advance(0.15)  # the stall of this first change is over
    first = Decision.highest(spec, ceiling_mhz=np.array([1410.0]))
    plant.apply(first)
    plant.advance(0.2)
    if second == "clock":
        plant.apply(Decision.highest(spec, ceiling_mhz=np.array([1395.0])))
    else:
        cap = Limits(power_cap_w=np.array([10_000.0]))
        plant.apply(dataclasses.replace(first, limits=cap))
    plant.advance(9.0)
    # 0.05 s of work are done by 0.15 s, the rest follows the last stall.
    slow, fast = profile.table[-2], profile.table[-1]
    left_frac = 1.0 - 0.05 / float(prefill_s(slow, 3000.0))
    rest_s = left_frac * float(prefill_s(slow if second == "clock" else fast, 3000.0))
    begin_s = 0.3 if second == "clock" else 0.25
    assert float(plant.requests["done_s"][0]) == pytest.approx(begin_s + rest_s, rel=1e-9)


def test_what_is_zero_changes_no_figure(tmp_path):
    """A profile that says 0 of every term beside one that leaves them out, policy by policy."""
    text = (files("voltana_ctrl.profiles") / f"data/{DATED}.toml").read_text()
    said = {
        "decode_time": ("host_s", "roof_s", "roof_base_s", "tile_tok"), "prefill_time": ("req_s",),
        "prefill_power": ("beside_w",), "transfer": ("transfer_j_per_tok",),
    }  # fmt: skip
    for section, keys in said.items():
        own = text.split(f"[{section}]")[1].split("\n[")[0]
        zeros = "".join(f"{key} = 0.0\n" for key in keys if f"\n{key} =" not in own)
        text = text.replace(f"[{section}]\n", f"[{section}]\n{zeros}")
    words = 'status = "extrapolated"\nsource = "none"\nerror = "none"\n'
    text += f"\n[clock_change]\n{words}stall_s = 0.0\nenergy_j = 0.0\n"
    text += f"\n[server]\n{words}rest_w = 0.0\n"
    path = tmp_path / "zero.toml"
    path.write_text(text)
    figures = []
    for profile in (DATED, path):
        runs = compare(
            profile=str(profile), rates_req_s=[20.0], duration_s=20.0, warmup_s=5.0,
            policies=["static-max", "pack", "voltanallm", "mpc"],
        ).runs  # fmt: skip
        figures.append([{k: v for k, v in run.items() if k not in OF_THE_MACHINE} for run in runs])
    assert figures[0] == figures[1]


@pytest.mark.parametrize("name", [PROFILE.name, "l20/qwen2.5-7b"])
@pytest.mark.parametrize("fleet", ["1P1D", "2C"])
def test_no_iteration_passes_the_power_of_its_clock(name, fleet):
    """Bursts of prompts between silences, at a clock in the middle: each iteration on its own."""
    profile = load_profile(name)
    spec = FleetSpec.parse(fleet, profile)
    middle = len(profile.clocks_mhz) // 2
    bursts = make_workload(
        "azure-code", rate_req_s=3.0, duration_s=40.0, seed=3,
        arrivals=MarkovModulated(high_s=0.2, low_s=2.0),
    )  # fmt: skip
    plant = Plant(spec, bursts, PlantSettings(settle_s=0.0, log_iterations=100_000))
    ceiling_mhz = np.full(len(spec), profile.clocks_mhz[middle])
    plant.apply(Decision.highest(spec, ceiling_mhz=ceiling_mhz))
    plant.advance(1.0)  # the clock is there
    plant.read()
    plant.advance(40.0)
    log = plant.read().iterations
    assert (log.freq_mhz == profile.clocks_mhz[middle]).all()
    most_w = np.array([highest_power_w(one)[middle] for one in spec.instances])
    drawn_w = log.energy_j / log.wall_s
    assert len(drawn_w) > 100
    assert (drawn_w <= most_w[log.instance.astype(int)] * (1.0 + 1e-9)).all()
    assert drawn_w.max() > 0.7 * most_w.max()
