"""Target layer: naive twins, brute force, a mixed-integer program, invariances, the plant."""

import dataclasses

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import naive_control
from voltana_ctrl import ConfigError, Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.control.curve import LeastPower
from voltana_ctrl.control.governor import IterationGovernor
from voltana_ctrl.control.groups import Node
from voltana_ctrl.control.spare import spare_count
from voltana_ctrl.control.target import TargetOptimiser
from voltana_ctrl.kernels.choose import target as kernels
from voltana_ctrl.laws import length_moments
from voltana_ctrl.types import FleetState, Load, Tuning

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
#: Attention makes its long prompts take longer per token.
BENT = load_profile("a100-sxm-80gb/llama-3-70b-tp4")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
FLEET = FleetSpec.parse("2P2D", PROFILE)


def sharegpt():
    from voltana_ctrl.sim.workload import make_workload

    load = make_workload("sharegpt", rate_req_s=50.0, duration_s=400.0, seed=1)
    return length_moments(load.prompt_tok, load.output_tok)


LENGTHS = sharegpt()
OPTIMISER = TargetOptimiser(FLEET, SLO)


def least_power(instance, governed=True):
    return LeastPower(instance, SLO, margin_frac=(0.02, 0.035), delay_s=0.025, governed=governed)


LEAST = least_power(FLEET.instances[2])


@pytest.mark.parametrize("arrival", [0.5, 10.0, 30.0, 45.0])
@pytest.mark.parametrize("floor_k", [0, 40, 80])
def test_station_against_the_naive_sum(arrival, floor_k):
    one = LEAST.station(LENGTHS)
    ours = kernels.station(one, arrival, LENGTHS.output_tok - 1.0, 800, 0.0597, floor_k)
    step_s, power_w, needed = naive_control.fill_station(
        PROFILE.table, PROFILE.padded_batch(), LENGTHS.context_tok, 0.06 / 1.035
    )
    theirs = naive_control.station(
        step_s,
        power_w,
        needed,
        arrival,
        LENGTHS.output_tok - 1.0,
        800,
        0.0597,
        floor_k,
        PROFILE.idle_w,
    )
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6, abs=1e-11)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-9)


@given(
    steps=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=3),
    context=st.floats(1.0, 2000.0),
    target_s=st.floats(0.005, 0.2),
)
def test_times_and_needed_rows_against_the_twin(steps, context, target_s):
    """Executed sizes that fall from one batch to the next included."""
    steps = tuple((sum(each[0] for each in steps[: i + 1]), step) for i, (_, step) in
                  enumerate(steps))  # fmt: skip
    profile = dataclasses.replace(PROFILE, batch_steps=steps, max_batch=200)
    padded = profile.padded_batch()
    needed, step_s, power_w = np.empty(201, np.int64), np.empty(201), np.empty(201)
    kernels.governed_batches(PROFILE.table, padded, context, target_s, needed, step_s, power_w)
    all_s, all_w, row = naive_control.fill_station(PROFILE.table, padded, context, target_s)
    np.testing.assert_array_equal(needed, row)
    np.testing.assert_allclose(step_s, all_s[row, np.arange(201)], rtol=1e-12)
    np.testing.assert_allclose(power_w, all_w[row, np.arange(201)], rtol=1e-12)


@pytest.mark.parametrize("governed", [True, False])
@pytest.mark.parametrize("name", [PROFILE.name, "h100-sxm-80gb/llama-3.1-8b"])
def test_least_floor_against_every_floor(name, governed):
    """Loads up to beyond what can be served, in any order."""
    profile = dataclasses.replace(load_profile(name), max_batch=400)
    rungs = profile.clocks_mhz[::6]
    decode = FleetSpec.parse("1P1D", profile).instances[1]
    least = least_power(dataclasses.replace(decode, clocks_mhz=rungs), governed)
    step_s, power_w, needed = naive_control.fill_station(
        profile.table[::6], profile.padded_batch(), LENGTHS.context_tok,
        0.06 / 1.035 if governed else np.inf,
    )  # fmt: skip
    loads = np.concatenate([np.linspace(1.0, 60.0, 12), [30.0, 5.0, 41.0]])
    power, floor = np.empty(15), np.empty(15, np.int64)
    over = np.empty(15)
    decoded_tok = LENGTHS.output_tok - 1.0
    kernels.decode_curve(
        least.station(LENGTHS), loads, decoded_tok, 380, 0.0597, 0.01, power, floor, over
    )
    theirs = [
        naive_control.least_floor(
            step_s, power_w, needed, load, decoded_tok, 380, 0.0597, 0.01, profile.idle_w
        )
        for load in loads
    ]
    assert power == pytest.approx([each[0] for each in theirs], rel=1e-9)
    # Floors below what every likely batch needs draw the same to the last digit.
    for g, load in enumerate(loads):
        if floor[g] != theirs[g][1]:
            at = [
                naive_control.station(step_s, power_w, needed, load, decoded_tok, 380, 0.0597,
                                      int(k), profile.idle_w)[0]
                for k in (floor[g], theirs[g][1])
            ]  # fmt: skip
            assert at[0] == pytest.approx(at[1], rel=1e-11)
    assert over == pytest.approx([each[2] for each in theirs], rel=1e-6, abs=1e-9)
    assert 0 < np.isinf(power).sum() < len(power)


@given(
    load=st.floats(0.1, 150.0), prompt=st.floats(20.0, 1000.0), cv=st.floats(0.0, 2.0),
    ttft_s=st.floats(0.05, 1.0), governed=st.booleans(), deaf_frac=st.floats(0.0, 1.0),
    table=st.sampled_from([PROFILE.table, BENT.table]),
)  # fmt: skip
def test_prefill_curve_against_the_twin(load, prompt, cv, ttft_s, governed, deaf_frac, table):
    typical = prompt * np.array([0.3, 0.8, 1.0, 2.0])
    power, row, late = np.empty(1), np.empty(1, np.int64), np.empty(1)
    kernels.prefill_curve(
        table, np.array([load]), prompt, cv * prompt, ttft_s, 0.01, governed,
        deaf_frac, typical, power, row, late,
    )  # fmt: skip
    theirs = naive_control.prefill_least(
        table,
        load,
        prompt,
        cv * prompt,
        ttft_s,
        table["idle_w"],
        0.01,
        governed,
        deaf_frac,
        typical,
    )
    assert power[0] == pytest.approx(theirs[0])
    assert row[0] == theirs[1]
    assert late[0] == pytest.approx(theirs[2])


@given(size=st.integers(1, 40), at=st.integers(0, 16), seed=st.integers(0, 99))
def test_loads_of_all_leaves(size, at, seed):
    """Split by halves as the optimiser does; counted, not walked."""
    rng = np.random.default_rng(seed)
    leaf = Node(step=1.0, cost_w=np.ones(17))

    def tree(n):
        if n == 1:
            return leaf
        parts = rng.integers(0, 17, size=(2, 17))
        return Node(step=1.0, cost_w=np.ones(17), left=tree(n - n // 2), right=tree(n // 2),
                    left_at=parts[0], right_at=parts[1])  # fmt: skip

    def walk(node, here):
        parts = node.children(here)
        return [load for part in parts for load in walk(*part)] if parts else [float(here)]

    root = tree(size)
    assert root.loads(at) == sorted(walk(root, at), reverse=True)
    assert len(root.loads(at)) == size


@given(
    left=st.lists(st.floats(0.0, 100.0), min_size=9, max_size=9),
    right=st.lists(st.floats(0.0, 100.0), min_size=9, max_size=9),
)
def test_min_plus_against_the_double_loop(left, right):
    left, right = np.sort(left), np.sort(right)
    out, a, b = np.empty(9), np.empty(9, np.int64), np.empty(9, np.int64)
    kernels.min_plus(left, 1.0, right, 1.0, 1.0, out, a, b)
    # The kernel may take more than asked for; with costs that do not fall it never pays.
    assert out == pytest.approx(naive_control.min_plus(left, right))
    assert left[a] + right[b] == pytest.approx(out)


@pytest.mark.parametrize("rate", [10.0, 35.0, 42.0, 50.0, 65.0, 80.0])
def test_decode_split_against_brute_force(rate):
    decode = FLEET.instances[2]

    def curve(load):
        return float(OPTIMISER.curve(decode, np.array([load]), LENGTHS).power_w[0])

    best = naive_control.best_split(curve, PROFILE.idle_w, rate, 200)
    planned = OPTIMISER.plan(Load(arrival_req_s=rate, lengths=LENGTHS)).power_w[2:].sum()
    assert planned <= best * 1.01


@pytest.mark.parametrize("rate", [20.0, 60.0])
def test_against_a_mixed_integer_program(rate):
    fleet = FleetSpec.parse("1P3D", PROFILE)
    optimiser = TargetOptimiser(fleet, SLO)
    loads = rate * np.arange(1, 61) / 60
    power = optimiser.curve(fleet.instances[1], loads, LENGTHS).power_w
    able = np.isfinite(power)
    loads, power = np.append(loads[able], 0.0), np.append(power[able], PROFILE.idle_w)
    pick = cp.Variable((3, len(loads)), boolean=True)
    problem = cp.Problem(
        cp.Minimize(cp.sum(pick @ power)),
        [cp.sum(pick, axis=1) == 1, cp.sum(pick @ loads) >= rate * (1 - 1e-9)],
    )
    problem.solve(solver=cp.HIGHS)
    planned = optimiser.plan(Load(arrival_req_s=rate, lengths=LENGTHS))
    assert planned.power_w[1:].sum() == pytest.approx(problem.value, rel=0.01)


@given(rate=st.floats(0.0, 120.0))
@settings(max_examples=25)
def test_shares_are_shares_and_parked_get_none(rate):
    target = OPTIMISER.plan(Load(arrival_req_s=rate, lengths=LENGTHS))
    for members in (FLEET.prefill, FLEET.decode):
        assert target.route_frac[members].sum() == pytest.approx(1.0)
        assert target.active[members].any()
    assert np.all(target.route_frac[~target.active] == 0.0)
    assert np.all(np.isfinite(target.price_j_req))


def test_more_load_never_costs_less():
    powers = [
        OPTIMISER.plan(Load(arrival_req_s=rate, lengths=LENGTHS)).power_w.sum()
        for rate in np.arange(5.0, 85.0, 5.0)
    ]
    assert np.all(np.diff(powers) > 0.0)


def test_equal_instances_may_change_places():
    mixed = FleetSpec(
        (
            *FLEET.instances[:2],
            dataclasses.replace(FLEET.instances[2], kv_capacity_tok=60_000),
            FLEET.instances[3],
        )
    )
    swapped = FleetSpec((*mixed.instances[:2], mixed.instances[3], mixed.instances[2]))
    load = Load(arrival_req_s=30.0, lengths=LENGTHS)
    one = TargetOptimiser(mixed, SLO).plan(load)
    other = TargetOptimiser(swapped, SLO).plan(load)
    assert one.route_frac[[0, 1, 3, 2]] == pytest.approx(other.route_frac, abs=0.01)


@given(order=st.permutations(range(7)), rate=st.floats(5.0, 120.0))
@settings(max_examples=25)
def test_any_order_of_the_instances(order, rate):
    """Power and price do not depend on how instances are numbered."""
    plain = FleetSpec.parse("3P4D", PROFILE).instances
    small = dataclasses.replace(plain[4], kv_capacity_tok=90_000, idle_w=45.0)
    coarse = dataclasses.replace(plain[1], clocks_mhz=PROFILE.clocks_mhz[::4])
    fleet = (plain[0], coarse, plain[2], plain[3], small, *plain[5:])
    load = Load(arrival_req_s=rate, lengths=LENGTHS)
    one = TargetOptimiser(FleetSpec(fleet), SLO).plan(load)
    other = TargetOptimiser(FleetSpec(tuple(fleet[i] for i in order)), SLO).plan(load)
    assert other.power_w.sum() == pytest.approx(one.power_w.sum(), rel=2e-3)
    assert other.feasible == one.feasible
    assert other.route_frac.sum() == pytest.approx(2.0)


@given(rate=st.floats(2.0, 120.0), scale=st.floats(0.1, 10.0), governed=st.booleans())
@settings(max_examples=25)
def test_the_unit_of_time_does_not_matter(rate, scale, governed):
    """All times and energies times a factor, rates over it: the same clocks and watts."""
    table = PROFILE.table.copy()
    for name in table.dtype.names:
        if name.endswith(("_s", "_j")):
            table[name] *= scale
    slower = FleetSpec.parse("2P2D", dataclasses.replace(PROFILE, table=table))
    slo = Slo(ttft_s=0.6 * scale, itl_s=0.06 * scale)
    same = TargetOptimiser(FLEET, SLO, governed=governed)
    scaled = TargetOptimiser(slower, slo, governed=governed, delay_s=0.025 * scale)
    one = same.plan(Load(arrival_req_s=rate, lengths=LENGTHS))
    other = scaled.plan(Load(arrival_req_s=rate / scale, lengths=LENGTHS))
    assert other.feasible == one.feasible
    # Splits that cost the same may differ, their sum may not.
    assert other.power_w.sum() == pytest.approx(one.power_w.sum(), rel=1e-6)
    loads = np.array([0.3, 0.5, 1.0]) * rate
    for i in (0, 2):
        first = same.curve(FLEET.instances[i], loads, LENGTHS)
        second = scaled.curve(slower.instances[i], loads / scale, LENGTHS)
        assert second.power_w == pytest.approx(first.power_w, rel=1e-9)
        assert second.miss_frac == pytest.approx(first.miss_frac, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("size", [8, 100, 400])
def test_large_fleets_keep_their_grid(size):
    """As many times the fleet and the load, as many times the power."""
    small = TargetOptimiser(FleetSpec.parse("1P2D", PROFILE), SLO)
    large = TargetOptimiser(FleetSpec.parse(f"{size}P{2 * size}D", PROFILE), SLO)
    one = small.plan(Load(arrival_req_s=38.0, lengths=LENGTHS)).power_w.sum()
    many = large.plan(Load(arrival_req_s=38.0 * size, lengths=LENGTHS)).power_w.sum()
    # A whole fleet can also mix active sets, so it may do a little better.
    assert 0.96 * size * one <= many <= 1.002 * size * one


def test_active_set_is_kept_unless_a_change_pays():
    load = Load(arrival_req_s=10.0, lengths=LENGTHS)
    everybody = np.ones(4, bool)
    held = TargetOptimiser(FLEET, SLO, tuning=Tuning(wake_j=1e6)).plan(load, active=everybody)
    assert held.active.all()
    moved = TargetOptimiser(FLEET, SLO, tuning=Tuning(wake_j=0.0)).plan(load, active=everybody)
    assert moved.active.sum() < 4


def held(each_req, context_tok=400.0):
    """A fleet on which so many requests run on every instance."""
    running_req = np.full(len(FLEET), each_req)
    return dataclasses.replace(
        FleetState.idle(len(FLEET)), running_req=running_req, kv_used_tok=context_tok * running_req
    )


def test_a_floor_is_for_the_batch_that_can_be_there_by_the_next_target():
    """While batches fill the governor is enough; once they are full the floor is the old one."""
    # With iterations of 0.2 s the largest batch is the limit, and takes a minute to fill.
    optimiser = TargetOptimiser(FLEET, Slo(ttft_s=2.0, itl_s=0.2))
    load = Load(arrival_req_s=70.0, lengths=LENGTHS)
    at_rest = optimiser.plan(load).floor_mhz[2:]
    assert at_rest.min() > 700.0
    for filling in (held(0.0), held(100.0), held(500.0)):
        assert optimiser.plan(load, state=filling).floor_mhz[2:].max() < 300.0
    full = held(1000.0, LENGTHS.context_tok)
    np.testing.assert_array_equal(optimiser.plan(load, state=full).floor_mhz[2:], at_rest)


def test_answers_of_unknown_length_raise_no_clock_before_their_batch_is_there():
    """No clock serves answers so long for good, and a batch that small needs none now."""
    longer = dataclasses.replace(LENGTHS, output_tok=4000.0, context_tok=2200.0)
    load, halves = Load(arrival_req_s=10.0, lengths=longer), np.array([0.5, 0.5, 0.5, 0.5])
    assert not OPTIMISER.plan(load).feasible
    assert OPTIMISER.overload_frac(load, halves) > 0.0
    assert OPTIMISER.overload_frac(load, halves, state=held(100.0)) == 0.0
    assert OPTIMISER.overload_frac(load, halves, state=held(400.0, 2200.0)) > 0.0


def test_an_empty_fleet_changes_at_once_and_a_full_one_when_it_has_paid():
    """The tail of a change lasts as long as requests stay: those present over what arrives."""
    load = Load(arrival_req_s=10.0, lengths=LENGTHS)
    active = np.ones(len(FLEET), bool)

    def shrinks(present_req):
        target = OPTIMISER.plan(
            load, active=active, forgone_j=(100.0, 100.0), lasted_s=1.0, state=held(present_req)
        )
        return not target.active.all()

    assert shrinks(0.0)
    assert not shrinks(1e4)  # at most as long as was promised
    np.testing.assert_array_equal(
        OPTIMISER.plan(load, active=active, state=held(1e4)).active,
        OPTIMISER.plan(load, active=active).active,
    )


def test_who_came_last_leaves_when_that_has_paid_for_draining():
    """A load that swings does not have an instance drain in every trough."""
    one_decode = np.array([True, True, True, False])
    grown = OPTIMISER.plan(Load(arrival_req_s=60.0, lengths=LENGTHS), active=one_decode)
    assert grown.active.all()
    assert grown.forgone_j[1] < -100.0
    low = Load(arrival_req_s=5.0, lengths=LENGTHS)
    present = held(10.0)
    target, active, seconds = grown, grown.active, 0
    while target.active[2:].all() and seconds < 1000:
        target = OPTIMISER.plan(
            low, active=active, forgone_j=target.forgone_j, lasted_s=1.0, state=present
        )
        active, seconds = target.active, seconds + 1
    at_once = OPTIMISER.plan(
        low, active=np.ones(4, bool), forgone_j=(0.0, 0.0), lasted_s=60.0, state=present
    )
    assert not at_once.active[2:].all()
    assert 10 < seconds < 500
    # A load in which everybody is needed does not clear the account.
    again = OPTIMISER.plan(
        Load(arrival_req_s=60.0, lengths=LENGTHS), active=np.ones(4, bool),
        forgone_j=grown.forgone_j, lasted_s=1.0,
    )  # fmt: skip
    assert again.forgone_j[1] == grown.forgone_j[1]


def test_a_larger_prefill_set_needs_no_saving_beyond_its_own():
    """Queues get shorter by it; only who shrinks has to save a part of the power."""
    one_prefill = np.array([True, False, True, True])
    load = Load(arrival_req_s=40.0, lengths=LENGTHS)
    everybody = OPTIMISER.plan(load)
    assert everybody.active[:2].all()
    stays = OPTIMISER.plan(load, active=one_prefill, lasted_s=1.0)
    assert not stays.active[:2].all()
    assert stays.forgone_j[0] > 0.0
    # Nothing is gained by a wait where the set came about by a loss.
    at_once = OPTIMISER.plan(load, active=one_prefill, lasted_s=1.0, forgone_j=(np.inf, 0.0))
    assert at_once.active[:2].all()
    assert np.isfinite(at_once.forgone_j).all()
    kept = OPTIMISER.plan(load, active=everybody.active, forgone_j=(np.inf, np.inf))
    np.testing.assert_array_equal(kept.active, everybody.active)


@pytest.mark.parametrize(
    ("rate", "simulated"), [(40.0, 0.0050), (42.0, 0.0088), (45.0, 0.024), (48.0, 0.052)]
)
def test_prompts_wait_for_the_iteration_that_runs_and_all_that_came_with_them(rate, simulated):
    """Share that waits longer than 0.6 s at the highest clock: two runs of 20,000 requests."""
    profile = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
    prefill = FleetSpec.parse("1P1D", profile).instances[0]
    least = LeastPower(prefill, SLO, margin_frac=(0.0, 0.0), delay_s=0.0, governed=True)
    late_frac = least.at(LENGTHS)(np.array([rate])).miss_frac[0]
    assert simulated / 2.0 < late_frac < 2.0 * simulated


def test_the_dead_are_not_planned_with():
    usable = np.array([True, True, False, True])
    target = OPTIMISER.plan(Load(arrival_req_s=10.0, lengths=LENGTHS), usable=usable)
    assert not target.active[2]
    assert target.route_frac[3] == pytest.approx(1.0)


def test_beyond_capacity_everybody_helps():
    target = OPTIMISER.plan(Load(arrival_req_s=200.0, lengths=LENGTHS))
    assert not target.feasible
    assert target.active.all()
    assert target.floor_mhz[2:].min() > 1000.0


def test_predicted_power_and_batch_on_the_plant():
    """The governed station is what the plant does."""
    from voltana_ctrl.sim.plant import Plant, PlantSettings
    from voltana_ctrl.sim.workload import make_workload

    fleet = FleetSpec.parse("1P1D", PROFILE)
    load = make_workload("sharegpt", rate_req_s=25.0, duration_s=1300.0, seed=2)
    lengths = length_moments(load.prompt_tok, load.output_tok)
    target = TargetOptimiser(fleet, SLO).plan(Load(arrival_req_s=25.0, lengths=lengths))
    plant = Plant(fleet, load, PlantSettings(),
                  governors=[IterationGovernor(one, SLO) for one in fleet.instances])  # fmt: skip
    plant.apply(Decision.highest(fleet, floor_mhz=target.floor_mhz))
    plant.advance(100.0)
    start = plant.state().energy_j
    plant.advance(1300.0)
    mean_w = (plant.state().energy_j - start) / 1200.0
    assert mean_w[1] == pytest.approx(target.power_w[1], rel=0.02)
    assert mean_w[0] == pytest.approx(target.power_w[0], rel=0.06)


@given(rate=st.floats(1.0, 40.0))
@settings(max_examples=20)
def test_without_a_governor_the_clock_holds_the_tail(rate):
    """A static clock must be enough for the quantile, so it lies above the governed floor."""
    static = TargetOptimiser(FLEET, SLO, governed=False)
    one = FLEET.instances[2]
    loads = np.array([rate])
    slow = OPTIMISER.curve(one, loads, LENGTHS)
    fast = static.curve(one, loads, LENGTHS)
    assert fast.floor_row[0] >= slow.floor_row[0]
    if np.isfinite(fast.power_w[0]):
        assert fast.miss_frac[0] <= 0.01


# Room for the loss of an instance


@pytest.mark.parametrize("fleet", ["2P2D", "4P4D", "6C"])
@pytest.mark.parametrize("spare", [1.0, 2.0, 0.3])
def test_who_stays_active_can_lose_so_many_and_still_serve(fleet, spare):
    spec = FleetSpec.parse(fleet, load_profile("a100-sxm-80gb/llama-3.1-8b"))
    load = Load(arrival_req_s=20.0, lengths=length_moments([240, 240], [200, 200]))
    least, roomy = (
        TargetOptimiser(spec, Slo(ttft_s=0.6, itl_s=0.06), spare=s) for s in (0.0, spare)
    )
    target = roomy.plan(load)
    phases = [spec.decode] if spec.colocated else [spec.prefill, spec.decode]
    for members in phases:
        awake = members[target.active[members]]
        lost = spare_count(spare, len(awake))
        left = np.ones(len(spec), bool)
        left[awake[:lost]] = False
        left[np.setdiff1d(members, awake)] = False
        # All of them, or enough without those that are lost.
        if len(awake) < len(members):
            assert least.plan(load, usable=left).feasible
            assert len(awake) > lost
    assert target.power_w.sum() > least.plan(load).power_w.sum()
    # A set that has no room grows at once, and one that has stays.
    grown = roomy.plan(load, active=least.plan(load).active)
    assert np.array_equal(grown.active, target.active)
    assert np.array_equal(roomy.plan(load, active=target.active).active, target.active)


@pytest.mark.parametrize("spare", [-1.0, 1.5, float("nan"), float("inf")])
def test_a_spare_that_is_no_count_and_no_share_is_refused(spare):
    with pytest.raises(ConfigError, match="spare"):
        spare_count(spare)
