"""Hypothesis strategies for fleets, observations, decisions and workloads.

What they draw is valid by construction, small, and shrinks to the plainest case: one
instance a phase, nothing running, everybody alive.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from voltana_ctrl.laws import decode_s
from voltana_ctrl.profiles import list_profiles, load_profile
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.testing.search import st
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    InstanceSpec,
    IterationBatch,
    Observation,
    Profile,
    Request,
    RequestBatch,
    Role,
    Slo,
    Status,
)

__all__ = [
    "decisions",
    "fleet_states",
    "fleets",
    "instances",
    "observations",
    "profiles",
    "requests",
    "slos",
    "workloads",
]

# One drawn number stands for the load of an instance, a digit to base 8 for each of: requests
# that wait, tokens of each, wait of the oldest, share of the batch that runs, share of the KV
# cache they hold. Drawing each by itself takes ten times as long.
_LEVELS = (
    (0.0, 1.0, 2.0, 5.0, 13.0, 40.0, 150.0, 400.0),
    (500.0, 1.0, 17.0, 100.0, 1000.0, 2000.0, 3000.0, 8000.0),
    (0.01, 0.0, 0.05, 0.1, 0.3, 0.7, 3.0, 10.0),
    (0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0),
    (0.1, 0.01, 0.05, 0.2, 0.5, 0.9, 0.97, 1.0),
)
_LARGEST_CODE = 8 ** len(_LEVELS) - 1
_CODES = st.integers(0, _LARGEST_CODE)


@functools.cache
def _shipped() -> tuple[Profile, ...]:
    return tuple(load_profile(name) for name in list_profiles())


def slos() -> st.SearchStrategy[Slo]:
    """Strategy for promises from tight to loose.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(slos())
    ... def test(slo):
    ...     assert slo.itl_s <= slo.ttft_s
    >>> test()
    """
    return st.builds(
        Slo,
        ttft_s=st.sampled_from([0.6, 0.2, 1.0, 4.0]),
        itl_s=st.sampled_from([0.06, 0.03, 0.1, 0.2]),
        attainment=st.sampled_from([0.99, 0.9, 0.95, 0.999]),
    )


@st.composite
def profiles(draw: Any, *, gpus: int | None = None) -> Profile:
    """Strategy for profiles cut from shipped ones.

    They have two to five of the clocks, the highest among them, take half to twice the time, and
    draw half to twice the power.

    Parameters
    ----------
    gpus : int, optional
        Tensor parallel degree, one that a shipped profile has, such as 1 or 4; any by default.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(profiles(gpus=4))
    ... def test(profile):
    ...     assert profile.gpus == 4 and 2 <= len(profile.clocks_mhz) <= 5
    >>> test()
    """
    base = draw(st.sampled_from([one for one in _shipped() if gpus in (None, one.gpus)]))
    last = len(base.table) - 1
    rows = draw(st.lists(st.integers(0, last - 1), min_size=1, max_size=4, unique=True))
    table = base.table[[*sorted(rows), last]].copy()
    slower_frac = draw(st.sampled_from([1.0, 0.5, 2.0]))
    hungrier_frac = draw(st.sampled_from([1.0, 0.5, 2.0]))
    for column in table.dtype.names:
        if column.endswith(("_s", "_j")):
            table[column] *= slower_frac
        if column.endswith(("_w", "_j")):
            table[column] *= hungrier_frac
    bend_req = draw(st.sampled_from([np.inf, 16.0, 128.0]))
    table["decode_roof_s"] = table["decode_req_s"] + table["decode_base_s"] / bend_req
    table["decode_tile_tok"] = draw(st.sampled_from([0.0, 16.0, 128.0]))
    drawn: Profile = replace(
        base,
        name="drawn/" + base.name.replace("/", "-"),
        table=table,
        idle_w=base.idle_w * hungrier_frac,
        power_cap_w=base.power_cap_w * max(1.0, hungrier_frac),
        max_batch=draw(st.sampled_from([base.max_batch, 8, 1])),
        kv_capacity_tok=draw(st.sampled_from([base.kv_capacity_tok, 20_000])),
    )
    return drawn


@st.composite
def instances(
    draw: Any, *, role: Role | None = None, profile: Profile | None = None, id: str = "one"
) -> InstanceSpec:
    """Strategy for single instances, with the limits of their profile or tighter ones.

    Parameters
    ----------
    role : Role, optional
        Role of the instance; drawn by default.
    profile : Profile, optional
        Profile of the instance; drawn by default.
    id : str
        Id of the instance.

    Examples
    --------
    >>> from hypothesis import given
    >>> from voltana_ctrl import Role
    >>> @given(instances(role=Role.DECODE))
    ... def test(instance):
    ...     assert set(instance.clocks_mhz) <= set(instance.profile.clocks_mhz)
    >>> test()
    """
    profile = profile or draw(profiles())
    role = role or draw(st.sampled_from(Role))
    tighter = draw(st.booleans())
    clocks_mhz = profile.clocks_mhz
    return InstanceSpec(
        id=id,
        role=role,
        profile=profile,
        clocks_mhz=clocks_mhz[len(clocks_mhz) // 2 :] if tighter else clocks_mhz,
        max_batch=max(1, profile.max_batch // 2) if tighter else profile.max_batch,
    )


@st.composite
def fleets(
    draw: Any,
    *,
    max_prefill: int = 3,
    max_decode: int = 3,
    colocated: bool | None = None,
    heterogeneous: bool | None = None,
) -> FleetSpec:
    """Strategy for fleets: prefill and decode apart or colocated, alike or mixed.

    Parameters
    ----------
    max_prefill, max_decode : int
        Largest number of instances of each role; a colocated fleet has up to the larger of both.
    colocated : bool, optional
        True draws colocated fleets only, False such with prefill and decode apart; None draws
        both.
    heterogeneous : bool, optional
        Whether instances may differ in profile, clocks and limits; drawn by default.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(fleets(max_decode=2, colocated=False))
    ... def test(fleet):
    ...     assert 1 <= len(fleet.decode) <= 2 and not fleet.colocated
    >>> test()
    """
    if colocated is None:
        colocated = draw(st.booleans())
    if colocated:
        roles = [Role.COLOCATED] * draw(st.integers(1, max(max_prefill, max_decode)))
    else:
        roles = [Role.PREFILL] * draw(st.integers(1, max_prefill))
        roles += [Role.DECODE] * draw(st.integers(1, max_decode))
    if heterogeneous is None:
        heterogeneous = draw(st.booleans())
    common = draw(profiles())
    members = []
    for i, role in enumerate(roles):
        if heterogeneous:
            one = draw(instances(role=role, id=f"{role.value}-{i}"))
        else:
            one = InstanceSpec(id=f"{role.value}-{i}", role=role, profile=common)
        members.append(replace(one, node=f"node{i // 2}"))
    return FleetSpec(tuple(members))


def _each(draw: Any, n: int, values: st.SearchStrategy[Any]) -> Any:
    return np.array(draw(st.lists(values, min_size=n, max_size=n)))


@st.composite
def fleet_states(
    draw: Any,
    fleet: FleetSpec,
    *,
    dead: bool = True,
    stale: bool = True,
    busy: bool = True,
    flooded: bool = False,
) -> FleetState:
    """Strategy for states that a fleet can be in.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    dead : bool
        Whether some instances, or all, may not answer.
    stale : bool
        Whether readings may be old, up to an hour; without, they are at most 1 s old.
    busy : bool
        Whether there may be work.
    flooded : bool
        Whether every instance has a queue far longer than can be served in time, and those that
        decode a full batch and a full KV cache; `busy` is then left alone.

    Examples
    --------
    >>> from hypothesis import given
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> @given(fleet_states(fleet, dead=False))
    ... def test(state):
    ...     assert state.alive.all() and (state.kv_used_tok <= fleet.kv_capacity_tok).all()
    >>> test()
    """
    n = len(fleet)
    codes = np.zeros(n, np.int64)
    if flooded:
        codes = np.full(n, _LARGEST_CODE)
    elif busy:
        codes = _each(draw, n, _CODES)
    waits, prompt_tok, wait_s, run_frac, fill_frac = (
        np.array(levels)[codes // 8**digit % 8] for digit, levels in enumerate(_LEVELS)
    )
    most_req = np.array([one.max_batch for one in fleet.instances])
    prefills, decodes = (
        np.isin(np.arange(n), members) for members in (fleet.prefill, fleet.decode)
    )
    waits = waits * (50.0 if flooded else prefills)
    runs = np.ceil(run_frac * most_req) * decodes
    freq_mhz = np.array(
        [one.clocks_mhz[-1 - draw(_CODES) % len(one.clocks_mhz)] for one in fleet.instances]
    )
    idle_w = np.array([one.idle_w for one in fleet.instances])
    t_s = draw(st.integers(0, 10_000_000)) / 100.0
    age_s = _each(draw, n, st.sampled_from([0.0, 0.05, 1.0, *([2.5, 3600.0] if stale else [])]))
    return FleetState(
        t_s=t_s,
        alive=_each(draw, n, st.sampled_from([True, False])) if dead else np.ones(n, bool),
        queue_tok=waits * prompt_tok,
        queue_req=waits,
        oldest_wait_s=np.where(waits > 0, wait_s, 0.0),
        running_req=runs,
        kv_used_tok=np.where(runs > 0, np.floor(fill_frac * fleet.kv_capacity_tok), 0.0),
        freq_mhz=freq_mhz,
        power_w=idle_w * np.where(runs + waits > 0, 2.0, 1.0),
        energy_j=idle_w * t_s,
        age_s=age_s,
        arrived_req=np.minimum(waits, 20.0),
        arrived_tok=np.minimum(waits, 20.0) * prompt_tok,
    )


@st.composite
def observations(
    draw: Any,
    fleet: FleetSpec,
    *,
    dead: bool = True,
    stale: bool = True,
    busy: bool = True,
    flooded: bool = False,
) -> Observation:
    """Strategy for readings of a fleet: its state, some iterations, some finished requests.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    dead, stale, busy, flooded : bool
        As for :func:`fleet_states`.

    Examples
    --------
    >>> from hypothesis import given
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("2C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> @given(observations(fleet, busy=False))
    ... def test(observation):
    ...     assert observation.state.queue_tok.sum() == 0 == len(observation.finished)
    >>> test()
    """
    state = draw(fleet_states(fleet, dead=dead, stale=stale, busy=busy, flooded=flooded))
    if not busy:
        return Observation(state=state)
    return Observation(
        state=state,
        iterations=_iterations(draw, fleet, state.t_s),
        finished=_finished(draw, fleet),
    )


def _iterations(draw: Any, fleet: FleetSpec, t_s: float) -> IterationBatch:
    rows = []
    for code in draw(st.lists(_CODES, max_size=4)):
        i = code % len(fleet)
        one = fleet.instances[i]
        at = one.table[-1 - code % len(one.clocks_mhz)]
        batch_req = 1 + code % one.max_batch if one.role.decodes else 0
        new_tok = 1 + code % 4000 if one.role is Role.PREFILL else 0
        kv_tok = min(200.0 * batch_req, float(one.kv_capacity_tok))
        step_s = decode_s(at, batch_req, kv_tok)
        prefill_s = at["prefill_base_s"] + at["prefill_tok_s"] * new_tok
        wall_s = (1.0, 0.9, 1.2)[code % 3] * (prefill_s if new_tok else step_s)
        power_w = at["prefill_power_w"] if new_tok else at["decode_power_w"]
        rows.append((i, t_s, wall_s, at["clock_mhz"], batch_req, new_tok, kv_tok, wall_s * power_w))
    if not rows:
        return IterationBatch.empty()
    names = ("instance", "t_s", "wall_s", "freq_mhz", "batch_req", "prefill_tok", "kv_tok")
    columns = dict(zip((*names, "energy_j"), zip(*rows, strict=True), strict=True))
    return IterationBatch(**{name: np.array(values) for name, values in columns.items()})


def _finished(draw: Any, fleet: FleetSpec) -> RequestBatch:
    codes: Any = np.array(draw(st.lists(_CODES, max_size=4)), np.int64)
    output_tok = 1 + codes % 500
    return RequestBatch(
        request=np.arange(len(codes)),
        request_class=codes % 2,
        prompt_tok=1 + codes % 4000,
        output_tok=output_tok,
        ttft_s=0.05 * (1 + codes % 64),
        itl_s=np.where(output_tok > 1, 0.005 * (1 + codes % 32), 0.0),
        prefill_instance=fleet.prefill[codes % len(fleet.prefill)],
        decode_instance=fleet.decode[codes % len(fleet.decode)],
    )


@st.composite
def decisions(
    draw: Any, fleet: FleetSpec, *, raw: bool = False, statuses: tuple[Status, ...] = (Status.OK,)
) -> Decision:
    """Strategy for decisions on a fleet.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    raw : bool
        Whether decisions are those of a careless policy, which the guard is for: clocks off the
        ladder, shares that do not sum to one, anybody parked.
    statuses : tuple of Status
        Statuses to draw from.

    Examples
    --------
    >>> from hypothesis import given
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> @given(decisions(fleet))
    ... def test(decision):
    ...     assert abs(decision.route_frac[fleet.decode].sum() - 1.0) < 1e-9
    >>> test()
    """
    n = len(fleet)
    if raw:
        ends_mhz = _each(draw, 2 * n, st.floats(0.0, 5000.0)).reshape(2, n)
        active = _each(draw, n, st.booleans())
        share = _each(draw, n, st.floats(0.0, 2.0))
    else:
        clocks = [st.sampled_from(list(one.clocks_mhz[::-1])) for one in fleet.instances]
        ends_mhz = np.array([[draw(one) for one in clocks] for _ in range(2)])
        active = _each(draw, n, st.sampled_from([True, False]))
        for members in (fleet.prefill, fleet.decode):
            if not active[members].any():
                active[draw(st.sampled_from(members.tolist()))] = True
        share = (_each(draw, n, st.integers(1, 10)) * active).astype(float)
        for members in (fleet.prefill, fleet.decode):
            share[members] /= share[members].sum()
    return Decision(
        t_s=draw(st.integers(0, 10_000_000)) / 100.0,
        freq_mhz=ends_mhz.min(axis=0),
        freq_max_mhz=ends_mhz.max(axis=0),
        route_frac=share,
        active=active,
        price_j_req=_each(draw, n, st.floats(0.0, 1e3)),
        status=draw(st.sampled_from(statuses)),
    )


@st.composite
def requests(draw: Any, *, instances: int | None = None) -> Request:
    """Strategy for requests as a router sees them.

    Parameters
    ----------
    instances : int, optional
        Number of instances; some requests then carry a `host_score` of that length, else none does.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(requests())
    ... def test(request):
    ...     assert 0 <= request.cached_tok < request.prompt_tok
    >>> test()
    """
    prompt_tok = draw(st.integers(1, 8000))
    host_score = None
    if instances is not None and draw(st.booleans()):
        host_score = _each(draw, instances, st.floats(0.0, 100.0))
    return Request(
        prompt_tok=prompt_tok,
        id=draw(st.integers(0, 1000)),
        cached_tok=draw(st.sampled_from([0, prompt_tok - 1])),
        request_class=draw(st.integers(0, 3)),
        host_score=host_score,
    )


@st.composite
def workloads(draw: Any, *, max_requests: int = 30, closed_loop: bool = True) -> Workload:
    """Strategy for short workloads, possibly without a request.

    Parameters
    ----------
    max_requests : int
        Largest number of requests.
    closed_loop : bool
        Whether some workloads are of clients that wait for an answer before they ask again.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(workloads(max_requests=5))
    ... def test(workload):
    ...     assert len(workload) <= 5
    >>> test()
    """
    n = draw(st.integers(0, max_requests))
    gaps_s = _each(draw, n, st.floats(0.0, 1.0))
    prompt_tok = _each(draw, n, st.integers(1, 3000)).astype(np.int64)
    cached_frac = draw(st.sampled_from([0.0, 0.5]))
    arrival_s = np.cumsum(gaps_s) if n else np.zeros(0)
    workload = Workload(
        name="drawn",
        arrival_s=arrival_s,
        prompt_tok=prompt_tok,
        output_tok=_each(draw, n, st.integers(1, 40)).astype(np.int64),
        duration_s=float(arrival_s[-1]) + 1.0 if n else 1.0,
        cached_tok=((prompt_tok - 1) * cached_frac).astype(np.int64),
        source="drawn at random",
    )
    if closed_loop and n and draw(st.booleans()):
        return workload.closed_loop(draw(st.integers(1, 4)))
    return workload
