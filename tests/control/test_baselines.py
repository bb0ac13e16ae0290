"""Baseline governors, packing and routers: their laws, and what they do to a fleet."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.naive_baselines import (
    batches,
    best_plan_j,
    greedy_plan,
    least,
    lowest_feasible,
    prefill_j,
    prefill_s,
    threshold_levels,
)
from voltana_ctrl import (
    ConfigError,
    Decision,
    FleetSpec,
    FleetState,
    Observation,
    Request,
    Slo,
    compare,
    load_profile,
)
from voltana_ctrl.control import DualScaleGovernor, PackingController, ThresholdGovernor
from voltana_ctrl.kernels import layout
from voltana_ctrl.policies import ROUTERS, PolicySetup, find_policy
from voltana_ctrl.routing import (
    least_kv_router,
    round_robin_router,
    tokens_by_batch_router,
    two_choices_router,
)
from voltana_ctrl.types import PowerBudget

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("2P2D", PROFILE)
PREFILL, DECODE = FLEET.instances[0], FLEET.instances[2]
SLO = Slo(ttft_s=0.6, itl_s=0.06)
RANGE = (210.0, 1410.0)
SHORT = {"duration_s": 20.0, "warmup_s": 10.0}


# Threshold governor

loads = st.lists(st.tuples(st.floats(0.0, 20_000.0), st.integers(0, 1024)), min_size=1, max_size=20)


@given(loads)
def test_threshold_steps_as_its_twin(sequence):
    governor = ThresholdGovernor(DECODE)
    clocks_mhz = [1005.0, 1095.0, 1200.0, 1305.0, 1410.0]
    tok_steps, req_steps = [1024.0, 2048.0, 4096.0, 8192.0], [64.0, 128.0, 256.0, 512.0]
    levels = threshold_levels(sequence, tok_steps, req_steps, 0.75)
    for (waiting_tok, running_req), level in zip(sequence, levels, strict=True):
        chosen_mhz = governor.step(running_req, 0.0, waiting_tok, 0.0, *RANGE, batch_tok=0.0)
        assert chosen_mhz == clocks_mhz[level]


def test_threshold_does_not_flutter_within_its_band():
    governor = ThresholdGovernor(DECODE)
    chosen_mhz = {governor.step(n, 0.0, 0.0, 0.0, *RANGE) for n in (130, 125, 131, 120, 129, 100)}
    assert chosen_mhz == {1200.0}
    assert governor.step(96, 0.0, 0.0, 0.0, *RANGE) == 1095.0


@pytest.mark.parametrize("make", [ThresholdGovernor, lambda one: DualScaleGovernor(one, SLO)])
def test_governors_stay_between_floor_and_ceiling(make):
    governor = make(DECODE)
    for running_req, waiting_tok in ((0, 0), (5, 0), (1000, 0), (0, 9000), (800, 9000)):
        args = (running_req, 300.0 * running_req, waiting_tok, 0.1)
        assert 600.0 <= governor.step(*args, 600.0, 900.0) <= 900.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_frac": [0.5, 1.0]}, "4 ascending numbers"),
        ({"batch_frac": [0.1, 0.3, 0.2, 0.5]}, "ascending"),
        ({"batch_frac": [0.0, 0.1, 0.2, 0.5]}, "ascending"),
        ({"keep_frac": 1.0}, "fraction"),
    ],
)
def test_bad_thresholds_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ThresholdGovernor(DECODE, **settings)


# DualScale


def ladder(governor):
    first = 5
    n_ladder = int(governor.params[4])
    return [governor.rows[int(k)] for k in governor.params[first : first + n_ladder]]


prompts = st.tuples(
    st.integers(1, 40_000), st.integers(1, 8192), st.floats(0.0, 0.7), st.sampled_from([0.3, 2.0])
)


@given(prompts)
def test_dualscale_prefill_plans_as_its_twin_and_keeps_the_ttft_where_it_can(case):
    waiting_tok, batch_tok, wait_s, ttft_s = case
    batch_tok = min(waiting_tok, batch_tok)
    governor = DualScaleGovernor(PREFILL, Slo(ttft_s=ttft_s, itl_s=0.06))
    rows = ladder(governor)
    assert len(rows) == 7
    sizes = batches(waiting_tok, batch_tok, PREFILL.prefill_budget_tok)
    levels, spent_s, spent_j = greedy_plan(rows, sizes, wait_s, ttft_s)
    chosen_mhz = governor.step(0, 0, waiting_tok, wait_s, *RANGE, batch_tok=float(batch_tok))
    assert chosen_mhz == rows[levels[0]]["clock_mhz"]
    top_s = wait_s + sum(prefill_s(rows[-1], tok) for tok in sizes)
    assert spent_s <= max(ttft_s, top_s) + 1e-12
    assert spent_j <= sum(prefill_j(rows[-1], tok) for tok in sizes) + 1e-9


@given(st.lists(st.integers(100, 8192), min_size=1, max_size=3), st.floats(0.0, 0.5))
def test_greedy_look_ahead_is_near_the_best_plan(sizes, wait_s):
    rows = ladder(DualScaleGovernor(PREFILL, SLO))
    best_j = best_plan_j(rows, sizes, wait_s, SLO.ttft_s)
    if best_j is None:
        return
    _, _, greedy_j = greedy_plan(rows, sizes, wait_s, SLO.ttft_s)
    # One batch has a U-shaped energy, which steps down find; several compete for the slack.
    assert best_j - 1e-9 <= greedy_j <= best_j * (1.0 + 1e-9 if len(sizes) == 1 else 1.1)


@given(st.integers(1, 1024), st.floats(10.0, 800.0))
def test_dualscale_decode_takes_the_lowest_feasible_clock(running_req, context_tok):
    governor = DualScaleGovernor(DECODE, SLO)
    rows = ladder(governor)
    kv_tok = running_req * context_tok
    level = lowest_feasible(rows, governor.padded[running_req], kv_tok, SLO.itl_s)
    if kv_tok > 0.9 * DECODE.kv_capacity_tok:
        level = len(rows) - 1
    assert governor.step(running_req, kv_tok, 0, 0.0, *RANGE) == rows[level]["clock_mhz"]


def test_dualscale_refuses_a_ttft_that_the_hand_off_uses_up():
    h100 = load_profile("h100-sxm-80gb/llama-3.1-8b")
    prefill = FleetSpec.parse("1P1D", h100).instances[0]
    with pytest.raises(ConfigError, match="n_clocks"):
        DualScaleGovernor(prefill, SLO, n_clocks=1)
    if h100.first_token == "decode":
        with pytest.raises(ConfigError, match="no time for prefill"):
            DualScaleGovernor(prefill, Slo(ttft_s=0.05, itl_s=0.06))


# Packing

BIG = FleetSpec.parse("1P4D", PROFILE)


def state(t_s, running_req, *, freq_mhz=1410.0, context_tok=400.0, alive=None):
    n = len(BIG)
    zeros = np.zeros(n)
    running = np.array([0.0, *running_req], dtype=float)
    return FleetState(
        t_s=t_s, alive=np.ones(n, bool) if alive is None else alive, queue_tok=zeros,
        queue_req=zeros, oldest_wait_s=zeros, running_req=running,
        kv_used_tok=context_tok * running, freq_mhz=np.full(n, freq_mhz), power_w=zeros,
        energy_j=zeros, age_s=zeros, arrived_req=zeros, arrived_tok=zeros,
    )  # fmt: skip


def settle(controller, running_req, **options):
    memory = controller.init()
    for t_s in np.arange(0.0, 12.0, 3.0):
        observation = Observation(state=state(float(t_s), running_req, **options))
        decision, memory = controller.decide(observation, memory)
    return decision, memory


def test_packing_parks_late_and_wakes_at_once():
    controller = PackingController(BIG, SLO)
    decision, memory = settle(controller, [20, 20, 20, 20])
    assert decision.active.tolist() == [True, True, False, False, False]
    assert decision.route_frac.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    burst = Observation(state=state(12.0, [500, 500, 500, 0]))
    decision, memory = controller.decide(burst, memory)
    assert decision.active.sum() == 5
    # Fewer would do now, but not for long enough yet.
    for t_s in (12.5, 15.0, 17.0):
        calm = Observation(state=state(t_s, [20, 20, 20, 20]))
        decision, memory = controller.decide(calm, memory)
        assert decision.active.sum() == 5
    decision, _ = controller.decide(Observation(state=state(17.5, [20, 20, 20, 20])), memory)
    assert decision.active.sum() == 2


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.floats(50.0, 2000.0))
def test_packed_instances_hold_the_load_or_all_are_active(running_req, context_tok):
    controller = PackingController(BIG, SLO)
    decision, _ = settle(controller, running_req, context_tok=context_tok)
    active = decision.active[1:]
    assert 1 <= active.sum() <= 4
    if not active.all():
        # Their share of the tokens in flight fits, at the ITL target, into those left.
        total_req = sum(running_req) / active.sum()
        row, padded = PROFILE.table[-1], PROFILE.padded_batch()
        step_s = max(
            row["decode_floor_s"],
            row["decode_base_s"]
            + row["decode_req_s"] * padded[int(total_req)]
            + row["decode_kv_s"] * context_tok * total_req,
        )
        assert step_s <= SLO.itl_s
        assert context_tok * total_req <= 0.9 * DECODE.kv_capacity_tok


def test_more_load_never_packs_tighter():
    controller = PackingController(BIG, SLO)
    counts = [settle(controller, [n] * 4)[0].active.sum() for n in range(0, 400, 25)]
    assert counts == sorted(counts)
    assert counts[0] == 2
    assert counts[-1] == 5


def test_planning_for_a_lower_clock_keeps_more_active():
    low = PackingController(BIG, SLO, plan_mhz=600.0)
    assert settle(low, [20] * 4)[0].active.sum() > 2
    assert settle(PackingController(BIG, SLO), [20] * 4)[0].active.sum() == 2
    with pytest.raises(ConfigError, match="plan_mhz"):
        PackingController(BIG, SLO, plan_mhz=100.0)


def test_packing_passes_over_the_dead_and_leaves_colocated_fleets_alone():
    alive = np.array([True, False, True, True, True])
    decision, _ = settle(PackingController(BIG, SLO), [10] * 4, alive=alive)
    assert decision.active.tolist() == [True, False, True, False, False]
    fleet = FleetSpec.parse("3C", PROFILE)
    controller = PackingController(fleet, SLO)
    memory = controller.init()
    for t_s in (0.0, 6.0, 12.0):
        at_t = Observation(state=FleetState.idle(3, t_s=t_s, freq_mhz=1410.0))
        decision, memory = controller.decide(at_t, memory)
    assert decision.active.all()


def test_under_a_budget_packing_counts_what_the_ceiling_leaves():
    tight = PackingController(BIG, SLO, power_budget=PowerBudget.parse("700"))
    decision, _ = settle(tight, [20] * 4)
    assert (decision.freq_max_mhz < 1410.0).all()
    assert (decision.freq_mhz <= decision.freq_max_mhz).all()


# Routers

N_DECODE = 4
views = st.lists(
    st.tuples(
        st.integers(0, 50),  # queue_req
        st.integers(0, 9000),  # queue_tok
        st.integers(0, 500),  # running_req
        st.integers(0, 400_000),  # kv_tok
        st.booleans(),  # eligible
    ),
    min_size=N_DECODE,
    max_size=N_DECODE,
).filter(lambda rows: any(row[4] for row in rows))


def pick(router, rows, uniform=0.5, prompt_tok=100.0):
    """Ask the kernel itself, with this view of the decode instances 1 .. 4."""
    view = np.zeros((layout.N_VIEW, N_DECODE + 1))
    view[layout.VIEW_KV_CAPACITY_TOK] = 450_000.0
    for j, (queue_req, queue_tok, running_req, kv_tok, eligible) in enumerate(rows, start=1):
        view[layout.VIEW_QUEUE_REQ, j] = queue_req
        view[layout.VIEW_QUEUE_TOK, j] = queue_tok
        view[layout.VIEW_RUNNING_REQ, j] = running_req
        view[layout.VIEW_KV_TOK, j] = kv_tok
        view[layout.VIEW_ELIGIBLE, j] = eligible
    members = np.arange(1, N_DECODE + 1)
    return router.kernel(
        router._tables, router._padded, np.zeros(1), router.memory, uniform, prompt_tok, view,
        members,
    )  # fmt: skip


def eligible(rows):
    return [j for j, row in enumerate(rows, start=1) if row[4]]


@given(views, st.floats(0.0, 1.0, exclude_max=True))
def test_every_router_by_name_picks_an_eligible_instance(rows, uniform):
    for name, make in ROUTERS.items():
        router = make(BIG, "decode", SLO)
        if name == "fadr":  # reads settings that the others do not have
            continue
        assert pick(router, rows, uniform) in eligible(rows), name


@given(views, st.integers(1, 5000))
def test_score_routers_pick_the_least_score(rows, prompt_tok):
    able = eligible(rows)
    assert pick(least_kv_router(BIG, "decode"), rows) == least(able, lambda j: rows[j - 1][3])
    assert pick(tokens_by_batch_router(BIG, "decode"), rows, prompt_tok=float(prompt_tok)) == least(
        able,
        lambda j: (rows[j - 1][1] + prompt_tok) * (rows[j - 1][0] + rows[j - 1][2] + 1),
    )


def test_least_kv_goes_by_the_share_of_the_capacity():
    large = load_profile("a100-sxm-80gb/llama-3.1-8b")
    fleet = FleetSpec.parse("1P2D", large)
    router = least_kv_router(fleet, "decode")
    router._view[layout.VIEW_KV_CAPACITY_TOK, 1:] = [100_000.0, 400_000.0]
    zeros = np.zeros(3)
    used = FleetState(
        t_s=0.0, alive=[True] * 3, queue_tok=zeros, queue_req=zeros, oldest_wait_s=zeros,
        running_req=zeros, kv_used_tok=[0.0, 50_000.0, 100_000.0], freq_mhz=zeros, power_w=zeros,
        energy_j=zeros, age_s=zeros, arrived_req=zeros, arrived_tok=zeros,
    )  # fmt: skip
    assert router.route(Request(prompt_tok=10), used) == 2


@pytest.mark.parametrize("n_able", [1, 2, 3, 4])
def test_two_choices_draws_every_pair_equally_often(n_able):
    # Instance j has j requests, so that the pick tells the shorter of the pair.
    rows = [(0, 0, j, 0, j <= n_able) for j in range(1, N_DECODE + 1)]
    router = two_choices_router(BIG, "decode")
    cells = max(1, n_able * (n_able - 1))
    picks = Counter(pick(router, rows, (k + 0.5) / cells) for k in range(cells))
    # Of the ordered pairs, j is the shorter one in 2 (n - j).
    expected = {j: 2 * (n_able - j) for j in range(1, n_able)} or {1: 1}
    assert picks == expected


@given(st.lists(views, min_size=1, max_size=10))
def test_round_robin_takes_turns(sequence):
    router = round_robin_router(BIG, "decode")
    last = 0
    for rows in sequence:
        able = eligible(rows)
        expected = min(able, key=lambda j: (j - last - 1) % N_DECODE)
        last = pick(router, rows)
        assert last == expected


def test_round_robin_ignores_shares():
    router = round_robin_router(BIG, "decode")
    decision = Decision.highest(BIG)
    object.__setattr__(decision, "route_frac", np.array([1.0, 0.7, 0.1, 0.1, 0.1]))
    router.update(decision)
    idle = FleetState.idle(5)
    assert [router.route(Request(prompt_tok=9), idle) for _ in range(5)] == [1, 2, 3, 4, 1]


# Policies with routers of their own


def test_a_router_after_a_plus_replaces_the_policys_own():
    setup = PolicySetup()
    parts = find_policy("dualscale+least-kv").build(FLEET, SLO, setup)
    assert parts.decode_router.kernel is least_kv_router(FLEET, "decode").kernel
    plain = find_policy("dualscale").build(FLEET, SLO, setup)
    assert parts.prefill_router.kernel is plain.prefill_router.kernel
    both = find_policy("static-1005+random/two-choices").build(FLEET, SLO, setup)
    assert both.prefill_router.phase == "prefill"
    assert both.decode_router.kernel is two_choices_router(FLEET, "decode").kernel
    colocated = FleetSpec.parse("2C", PROFILE)
    once = find_policy("static-max+tokens-x-batch").build(colocated, SLO, setup)
    assert once.prefill_router.kernel is tokens_by_batch_router(FLEET, "decode").kernel
    assert once.decode_router is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("static-max+least_kv", "did you mean least-kv"),
        ("static-max+", "no router ''"),
        ("static-max+jsq/jsq/jsq", r"\+PREFILL/DECODE"),
        ("static-mx+jsq", "no such policy"),
        ("bound+jsq", "routes nothing"),
    ],
)
def test_routers_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_policy(name)


def test_a_colocated_fleet_takes_one_router():
    policy = find_policy("static-max+jsq/least-kv")
    with pytest.raises(ConfigError, match="give one router"):
        policy.build(FleetSpec.parse("2C", PROFILE), SLO, PolicySetup())


# On the simulated fleet


@pytest.fixture(scope="module")
def runs():
    names = ["static-max", "threshold", "dualscale", "pack", "static-max+round-robin", "bound"]
    result = compare(rates_req_s=[20.0], policies=names, **SHORT)
    return {run["policy"]: run for run in result.runs}


def test_baselines_save_energy_within_the_slo(runs):
    full_w = runs["static-max"]["mean_power_w"]
    for name in ("threshold", "dualscale", "pack"):
        assert runs[name]["slo_attainment"] >= 0.99, name
        assert runs["bound"]["mean_power_w"] < runs[name]["mean_power_w"] < 0.85 * full_w, name
    assert runs["pack"]["active_decode_mean"] == 1.0
    assert runs["pack"]["mean_power_w"] < runs["dualscale"]["mean_power_w"]
    # One clock for all, equal instances: turns and shares route alike.
    assert runs["static-max+round-robin"]["mean_power_w"] == pytest.approx(full_w, rel=0.01)


def test_colocated_fleets_run_every_baseline():
    names = ["threshold", "dualscale", "pack", "static-max+tokens-x-batch"]
    result = compare(fleet="2C", rates_req_s=[10.0], policies=names, **SHORT)
    for run in result.runs:
        assert run["requests_completed"] == run["requests_arrived"] > 100
