"""Routers against a plain statement of their rules, in the port and in the plant."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import Decision, FleetSpec, FleetState, Request, Slo, load_profile
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.routing import (
    fadr_router,
    least_queue_router,
    random_router,
    share_router,
    shortest_router,
    tile_aware_router,
)
from voltana_ctrl.routing.base import CompiledRouter
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import make_workload

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
FLEET = FleetSpec.parse("1P4D", REFERENCE)
DECODE = [1, 2, 3, 4]
LADDER = [1005.0, 1095.0, 1200.0, 1305.0, 1410.0]

five = st.integers(0, 900)


@st.composite
def states(draw) -> FleetState:
    n = len(FLEET)

    def column(values):
        return np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=float)

    alive = np.array(draw(st.lists(st.sampled_from([True, True, True, False]), min_size=n,
                                   max_size=n)))  # fmt: skip
    running = column(st.one_of(st.integers(0, 4), st.integers(100, 140), st.integers(0, 900)))
    return dataclasses.replace(
        FleetState.idle(n),
        alive=alive,
        queue_tok=column(st.integers(0, 3)),
        queue_req=column(st.integers(0, 3)),
        running_req=running,
        kv_used_tok=running * column(st.sampled_from([10.0, 430.0, 700.0])),
        freq_mhz=column(st.sampled_from(LADDER)),
    )


def eligible(state: FleetState, prompt_tok: int, active=(True,) * 5) -> list[int]:
    """Alive, active and with room; failing that less of it."""
    room = state.kv_used_tok + prompt_tok <= 450_000
    for able in (state.alive & active & room, state.alive & room, state.alive):
        found = [j for j in DECODE if able[j]]
        if found:
            return found
    return DECODE


prompts = st.integers(1, 3000)


@given(state=states(), prompt=prompts)
def test_least_queue(state, prompt) -> None:
    expected = min(eligible(state, prompt), key=lambda j: (state.queue_tok[j], j))
    router = least_queue_router(FLEET, "decode")
    assert router.route(Request(prompt_tok=prompt), state) == expected


@given(state=states(), prompt=prompts)
def test_shortest(state, prompt) -> None:
    load = state.running_req + state.queue_req
    expected = min(eligible(state, prompt), key=lambda j: (load[j], j))
    router = shortest_router(FLEET, "decode")
    assert router.route(Request(prompt_tok=prompt), state) == expected


@given(state=states(), prompt=prompts)
def test_tile_aware_fills_a_tile_before_the_next(state, prompt) -> None:
    n = state.running_req
    key = lambda j: (np.ceil(n[j] / 128), -n[j], j)  # noqa: E731
    router = tile_aware_router(FLEET, "decode")
    expected = min(eligible(state, prompt), key=key)
    assert router.route(Request(prompt_tok=prompt), state) == expected


def naive_fadr(state, prompt, members, ladder_mhz) -> int:
    """VoltanaLLM v0.1's ``fadr``, rule by rule as published."""
    n, kv = state.running_req, state.kv_used_tok
    if max(n[j] for j in members) < 128:
        return min(members, key=lambda j: (state.freq_mhz[j], n[j], j))
    padded = REFERENCE.padded_batch()

    def lowest(batch, tok) -> float:
        for mhz in ladder_mhz[:-1]:
            row = REFERENCE.table[REFERENCE.clocks_mhz == mhz][0]
            size = padded[int(min(batch, padded.size - 1))]
            linear_s = row["decode_base_s"] + row["decode_req_s"] * size + row["decode_kv_s"] * tok
            if max(linear_s, row["decode_floor_s"]) <= SLO.itl_s:
                return mhz
        return ladder_mhz[-1]

    now = {j: lowest(n[j], kv[j] + 2 * n[j]) for j in members}
    then = {j: lowest(n[j] + 1, kv[j] + prompt + 50 * n[j]) for j in members}
    score = {
        j: then[j] if then[j] > now[j] or then[j] == ladder_mhz[-1] else -now[j] for j in members
    }
    levels = [ladder_mhz.index(now[j]) for j in members]
    if max(levels) - min(levels) > 1:
        score = {j: abs(value) for j, value in score.items()}
    return min(members, key=lambda j: (score[j], np.ceil(n[j] / 128), -n[j], j))


@given(state=states(), prompt=prompts, ladder=st.sampled_from([LADDER, [1005.0, 1410.0]]))
def test_fadr(state, prompt, ladder) -> None:
    router = fadr_router(FLEET, "decode", SLO, ladder_mhz=ladder)
    expected = naive_fadr(state, prompt, eligible(state, prompt), ladder)
    assert router.route(Request(prompt_tok=prompt), state) == expected


def test_fadr_examples_take_both_branches() -> None:
    """So that the property above cannot pass by looking at one branch alone."""
    idle = FleetState.idle(5, freq_mhz=1005.0)
    low = dataclasses.replace(idle, running_req=[0, 5, 3, 9, 3])
    assert (
        fadr_router(FLEET, "decode", SLO, ladder_mhz=LADDER).route(Request(prompt_tok=10), low) == 2
    )
    # Past 128 the fuller of two that stay on their clock is taken.
    high = dataclasses.replace(
        idle, running_req=[0, 130, 140, 150, 129], kv_used_tok=[0, 5e4, 5e4, 5e4, 5e4]
    )
    assert (
        fadr_router(FLEET, "decode", SLO, ladder_mhz=LADDER).route(Request(prompt_tok=10), high)
        == 3
    )


@given(state=states(), prompt=prompts, seed=st.integers(0, 1000))
def test_random_takes_the_eligible_alone(state, prompt, seed) -> None:
    router = random_router(FLEET, "decode", seed=seed)
    for _ in range(5):
        assert router.route(Request(prompt_tok=prompt), state) in eligible(state, prompt)


def test_random_is_even() -> None:
    router = random_router(FLEET, "decode", seed=1)
    picks = [router.route(Request(prompt_tok=9), FleetState.idle(5)) for _ in range(4000)]
    counts = np.bincount(picks, minlength=5)[1:]
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 0.1 % point at 3 degrees of freedom


def shares_of(weights) -> Decision:
    share = np.array([1.0, *weights])
    return dataclasses.replace(Decision.highest(FLEET), route_frac=share)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any), st.integers(1, 60))
def test_shares_are_honoured_within_one_request_at_any_time(weights, picks: int) -> None:
    share = np.array(weights) / sum(weights)
    router = share_router(FLEET, "decode")
    router.update(shares_of(share))
    counts = np.zeros(5)
    for k in range(1, picks + 1):
        counts[router.route(Request(prompt_tok=9), FleetState.idle(5))] += 1
        # Smooth: the largest lead and lag of smooth weighted round robin is below n - 1.
        assert np.all(np.abs(counts[1:] - k * share) < 3.0)
        assert np.all(counts[1:][share == 0] == 0)


def test_two_equal_shares_alternate_and_three_to_one_is_smooth() -> None:
    router = share_router(FLEET, "decode")
    router.update(shares_of([0.75, 0.25, 0.0, 0.0]))
    picks = [router.route(Request(prompt_tok=9), FleetState.idle(5)) for _ in range(8)]
    assert picks == [1, 1, 2, 1, 1, 1, 2, 1]


def test_without_shares_who_was_away_does_not_get_a_burst() -> None:
    """Nobody decided: evenly over whoever is there, without a debt to make up."""
    router = share_router(FLEET, "decode")
    away = dataclasses.replace(FleetState.idle(5), alive=[True, True, True, True, False])
    for _ in range(300):
        router.route(Request(prompt_tok=9), away)
    back = [router.route(Request(prompt_tok=9), FleetState.idle(5)) for _ in range(40)]
    assert np.bincount(back, minlength=5)[1:].tolist() == [10, 10, 10, 10]


def test_inactive_and_dead_are_passed_over() -> None:
    router = shortest_router(FLEET, "decode")
    # The dead one has no share any more, else who is parked would have it.
    router.update(
        dataclasses.replace(
            Decision.highest(FLEET),
            active=[True, False, True, True, True],
            route_frac=[1.0, 0.0, 0.0, 0.5, 0.5],
        )
    )
    state = dataclasses.replace(FleetState.idle(5), alive=[True, True, False, True, True])
    assert router.route(Request(prompt_tok=9), state) == 3
    full = dataclasses.replace(state, kv_used_tok=[0, 0, 0, 449_999, 0])
    assert router.route(Request(prompt_tok=9), full) == 4


def test_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="'prefill' or 'decode'"):
        share_router(FLEET, "both")
    one, other = FLEET.instances[1], FLEET.instances[2]
    mixed = FleetSpec((FLEET.instances[0], one,
                       dataclasses.replace(other, clocks_mhz=[210.0, 1410.0])))  # fmt: skip
    with pytest.raises(ConfigError, match="one list of supported clocks"):
        fadr_router(mixed, "decode", SLO, ladder_mhz=LADDER)


# ---- asked from Python, called compiled: the same -----------------------------------------


class Hosted:
    """A compiled router that the plant cannot recognise, and so asks."""

    def __init__(self, router: CompiledRouter) -> None:
        self.router = router
        self.asked = 0

    def route(self, request, state):
        self.asked += 1
        return self.router.route(request, state)

    def update(self, decision):
        self.router.update(decision)


@pytest.mark.parametrize(
    "make",
    [
        share_router,
        least_queue_router,
        shortest_router,
        tile_aware_router,
        lambda fleet, phase: fadr_router(fleet, phase, SLO, ladder_mhz=LADDER),
    ],
    ids=["share", "least-queue", "shortest", "tile", "fadr"],
)
@pytest.mark.parametrize("actuation_s", [0.0, 0.005])
def test_python_routers_decide_as_compiled_ones(make, actuation_s) -> None:
    from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor

    fleet = FleetSpec.parse("2P2D", REFERENCE)
    workload = make_workload("sharegpt", rate_req_s=70.0, duration_s=4.0, seed=1)
    runs = []
    for wrap in (lambda router: router, Hosted):
        prefill, decode = (wrap(make(fleet, phase)) for phase in ("prefill", "decode"))
        plant = Plant(
            fleet,
            workload,
            PlantSettings(actuation_s=actuation_s, settle_s=4 * actuation_s),
            governors=[EcoFreqGovernor(one, SLO) for one in fleet.instances],
            prefill_router=prefill,
            decode_router=decode,
        )
        if wrap is Hosted:  # compiled governors with Python routers: still compiled
            assert (plant.instances["governed"] == 1).all()
        plant.apply(Decision.highest(fleet))
        plant.advance(40.0)
        runs.append(plant)
    compiled, hosted = runs
    assert decode.asked == len(workload)
    for name in ("prefill_at", "decode_at", "first_s", "done_s"):
        np.testing.assert_array_equal(compiled.requests[name], hosted.requests[name])


def test_a_router_that_names_a_stranger_is_refused() -> None:
    class First:
        def route(self, request, state):
            return 0

        def update(self, decision):
            pass

    fleet = FleetSpec.parse("1P1D", REFERENCE)
    workload = make_workload("sharegpt", rate_req_s=5.0, duration_s=5.0, seed=0)
    plant = Plant(fleet, workload, decode_router=First())
    with pytest.raises(ConfigError, match=r"First\.route: expected one of the instances \[1\]"):
        plant.advance(5.0)
