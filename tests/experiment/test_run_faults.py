"""Policies, loop and figures of runs in which something fails."""

import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from voltana_ctrl import (
    ControlLoop,
    Decision,
    FleetSpec,
    Guard,
    MpcController,
    PricedRouter,
    Slo,
    compare,
    load_profile,
)
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control import TargetOptimiser
from voltana_ctrl.control.baselines.ecofreq import EcoFreqGovernor
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.experiment import Run
from voltana_ctrl.kernels import layout
from voltana_ctrl.laws import length_moments
from voltana_ctrl.report import print_table
from voltana_ctrl.sim.arrivals import Gamma, parse_arrivals
from voltana_ctrl.sim.faults import ClockClamp, Failure, Slowdown
from voltana_ctrl.sim.plant import Plant
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import Load

FLEET = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11"))
SLO = Slo(ttft_s=0.6, itl_s=0.06)
# Each is gone for a while, never two of a phase at once.
BOTH = (
    Failure(instance="decode-1", from_s=5.0, until_s=8.0),
    Failure(instance="decode-0", from_s=8.5, until_s=11.0),
    Failure(instance="prefill-0", from_s=6.0, until_s=7.5),
    Failure(instance="prefill-1", from_s=9.0, until_s=10.0),
)
DECODE_DEAD_S, PREFILL_DEAD_S = 5.5, 2.5
PARTS = ("prefill", "decode", "idle", "transfer")


def run(policy: str, **changes):
    values = {"rate_req_s": 20.0, "duration_s": 12.0, "warmup_s": 3.0, "faults": BOTH} | changes
    return Run(policy=policy, fleet=FLEET, slo=SLO, workload="sharegpt", **values).simulate()


@pytest.mark.parametrize("policy", ["static-max", "voltanallm", "pack", "cascade", "mpc"])
def test_policies_keep_serving(policy: str) -> None:
    """20 req/s are within what the other of each phase can do."""
    figures = run(policy)
    assert figures["requests_completed"] == figures["requests_arrived"] > 200
    assert figures["requests_in_flight"] == figures["requests_dropped"] == 0
    assert figures["retries"] > 0
    assert figures["tokens_lost"] > 0
    parts = [figures[f"energy_{part}_j"] for part in PARTS]
    assert sum(parts) == pytest.approx(figures["energy_j"], rel=1e-12)
    # Policies that need one instance lose all they have with it; still no more miss a promise
    # than had to begin anew.
    for promise in ("ttft_attainment", "itl_attainment"):
        assert (1.0 - figures[promise]) * figures["requests_arrived"] <= figures["retries"]


class ByAge:
    """A router in Python: whoever lives and has been picked longest ago."""

    def __init__(self, members) -> None:
        self.members = [int(i) for i in members]

    def route(self, request, state) -> int:
        alive = [i for i in self.members if state.alive[i]]
        chosen = alive[0]
        self.members.remove(chosen)
        self.members.append(chosen)
        return chosen

    def update(self, decision) -> None:
        pass


class Plain:
    """A governor in Python."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def step(self, *known: float) -> float:
        return self.inner.step(*known)


def test_python_routers_and_governors_live_through_failures() -> None:
    plant = Plant(
        FLEET,
        make_workload("sharegpt", rate_req_s=20.0, duration_s=15.0, seed=0),
        governors=[Plain(EcoFreqGovernor(one, SLO)) for one in FLEET.instances],
        prefill_router=ByAge(FLEET.prefill),
        decode_router=ByAge(FLEET.decode),
        faults=[*BOTH, Failure(instance="prefill-0", from_s=9.0, until_s=9.9)],
    )
    plant.apply(Decision.highest(FLEET))
    plant.advance(9.9 - 1e-9)
    # Both prefill instances are dead: nobody is asked, and requests are held back.
    assert (plant.requests["state"] == layout.ROUTING).sum() > 10
    plant.advance(80.0)
    assert (plant.requests["state"] == layout.DONE).all()
    assert plant.requests["retries"].sum() > 0


def test_a_request_sent_to_a_dead_instance_waits_there() -> None:
    """A router that does not look: its requests are served when the instance is back."""

    class Stubborn(ByAge):
        def route(self, request, state) -> int:
            return self.members[0]

    plant = Plant(
        FLEET,
        make_workload("sharegpt", rate_req_s=5.0, duration_s=10.0, seed=0),
        decode_router=Stubborn(FLEET.decode),
        faults=[Failure(instance="decode-0", from_s=0.0, until_s=8.0)],
    )
    plant.advance(7.9)
    assert plant.state().queue_req[2] > 10
    assert plant.instances["iterations"][2] == 0
    plant.advance(100.0)
    assert (plant.requests["state"] == layout.DONE).all()
    assert plant.requests["retries"].sum() == 0


def test_the_loop_sends_nothing_to_the_dead() -> None:
    records = []
    backend = SimBackend(
        FLEET,
        workload=make_workload("sharegpt", rate_req_s=20.0, duration_s=15.0, seed=0),
        prefill_router=PricedRouter(FLEET, SLO, "prefill"),
        decode_router=PricedRouter(FLEET, SLO),
        faults=BOTH,
    )

    class Keep:
        def on_tick(self, record) -> None:
            records.append(record)

    loop = ControlLoop(
        backend, MpcController(FLEET, SLO), Guard(FLEET), clock=backend.clock, observers=[Keep()]
    )
    loop.run(15.0)
    dead = np.array([~record.observation.state.alive for record in records])
    share = np.array([record.applied.route_frac for record in records])
    active = np.array([record.applied.active for record in records])
    assert dead.any(axis=0).all()
    assert not share[dead].any()
    assert not active[dead].any()
    for members in (FLEET.prefill, FLEET.decode):
        np.testing.assert_allclose(share[:, members].sum(axis=1), 1.0)
    arrived = np.array([record.observation.state.arrived_req for record in records])
    # What the tick reads was counted since the one before it.
    assert not arrived[1:][dead[1:] & dead[:-1]].any()
    backend.close()
    backend.plant.advance(100.0)
    assert (backend.plant.requests["state"] == layout.DONE).all()


def test_power_and_energy_of_a_run_with_failures_agree() -> None:
    """Per token delivered, not per token made."""
    plain, failing = run("static-max", faults=()), run("static-max")
    assert plain["tokens_lost"] == plain["retries"] == plain["wakes"] == 0
    # The dead draw nothing.
    assert failing["energy_j"] < plain["energy_j"]
    assert failing["energy_per_token_j"] == failing["energy_j"] / failing["tokens_out"]
    assert failing["active_decode_mean"] == pytest.approx(2.0 - DECODE_DEAD_S / 12.0)


def test_the_bound_stays_below_runs_with_failures() -> None:
    bound = run("bound")
    assert bound["mean_power_w"] == pytest.approx(
        run("bound", faults=())["mean_power_w"] - 60.0 * (DECODE_DEAD_S + PREFILL_DEAD_S) / 12.0
    )
    for policy in ("voltanallm", "pack", "cascade"):
        assert run(policy)["energy_j"] > bound["energy_j"]


def test_the_bound_stays_below_runs_that_sleep() -> None:
    fleet = FleetSpec(
        tuple(
            dataclasses.replace(one, asleep_w=10.0, wake_s=1.0, wake_j=50.0)
            for one in FLEET.instances
        )
    )
    # Long enough a warm-up for the parked one to drain.
    common = {"rate_req_s": 10.0, "warmup_s": 80.0, "duration_s": 30.0, "tick_s": 0.5}
    bound, pack, awake = (
        Run(policy=policy, fleet=spec, slo=SLO, workload="sharegpt", **common).simulate()
        for policy, spec in (("bound", fleet), ("pack", fleet), ("pack", FLEET))
    )
    assert bound["energy_j"] < pack["energy_j"] < awake["energy_j"]
    assert pack["itl_attainment"] > 0.99
    # One decode instance sleeps all the time, which saves 50 W.
    assert awake["mean_power_w"] - pack["mean_power_w"] == pytest.approx(50.0, rel=1e-6)


def test_the_target_layer_counts_what_sleep_saves_and_waking_costs() -> None:
    lengths = length_moments([240, 240], [200, 200])

    def plan(active=None, rate_req_s=14.0, **changes):
        fleet = FleetSpec(tuple(dataclasses.replace(one, **changes) for one in FLEET.instances))
        load = Load(arrival_req_s=rate_req_s, lengths=lengths)
        return TargetOptimiser(fleet, SLO).plan(load, active=active)

    # A second prefill instance saves a little, unless it could save all of its idle power.
    awake, asleep = plan(), plan(asleep_w=0.0)
    assert awake.active.tolist() == [True, True, True, False]
    assert asleep.active.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(awake.power_w[~awake.active], 60.0)
    np.testing.assert_array_equal(asleep.power_w[~asleep.active], 0.0)
    # All are active, and parking pays only if waking once more costs little.
    everybody = np.ones(4, dtype=bool)
    assert plan(everybody, asleep_w=0.0).active.sum() == 2
    assert plan(everybody, asleep_w=0.0, wake_j=1e5).active.all()


def test_compare_takes_faults_and_arrivals_and_says_so(tmp_path) -> None:
    faults = [
        *BOTH,
        Slowdown(instance="decode-0", slow_frac=1.2, from_s=4.0),
        ClockClamp(instance="prefill-1", clamp_mhz=1200.0, from_s=1.0, until_s=8.0),
    ]
    options = {
        "rates_req_s": [10.0],
        "duration_s": 8.0,
        "warmup_s": 3.0,
        "policies": ["static-max", "voltanallm"],
        "faults": faults,
        "arrivals": Gamma(cv=2.0),
    }
    result = compare(**options)
    result.write_json(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["arrivals"] == "Gamma(cv=2.0)"
    assert data["faults"][4:] == [
        {"fault": "slowdown", "instance": "decode-0", "slow_frac": 1.2, "from_s": 4.0,
         "until_s": None},
        {"fault": "clock_clamp", "instance": "prefill-1", "clamp_mhz": 1200.0, "from_s": 1.0,
         "until_s": 8.0},
    ]  # fmt: skip
    assert data["runs"][0]["retries"] > 0
    from rich.console import Console

    for told, words in (
        (faults[:1], "Arrivals: Gamma(cv=2.0). Failure of decode-1 from 5 s to 8 s."),
        (faults[4:5], "Slowdown of decode-0 by 1.2 from 4 s."),
        (faults[5:], "Clock clamp of prefill-1 to 1200 MHz from 1 s to 8 s."),
        (faults, "6 faults, named in the JSON."),
    ):
        console = Console(width=80)
        with console.capture() as captured:
            print_table(dataclasses.replace(result, faults=tuple(told)).to_study(), console)
        assert words in " ".join(captured.get().split())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        again = compare(**options, executor=pool)
    timing = ("sim_wall_s", "decide_p50_s", "decide_p99_s")
    for here, there in zip(result.runs, again.runs, strict=True):
        assert {**here, **dict.fromkeys(timing)} == {**there, **dict.fromkeys(timing)}


def test_arrivals_change_when_and_nothing_else() -> None:
    bursts = run("static-max", faults=(), arrivals=parse_arrivals("mmpp:high_s=1,low_s=3"))
    smooth = run("static-max", faults=())
    assert bursts["ttft_p99_s"] > 1.3 * smooth["ttft_p99_s"]
    assert run("static-max", faults=(), arrivals=parse_arrivals("poisson"))["energy_j"] == (
        pytest.approx(smooth["energy_j"], rel=1e-12)
    )


def test_refuses_faults_and_arrivals_that_do_not_fit(tmp_path) -> None:
    short = {"rates_req_s": [5.0], "duration_s": 5.0, "warmup_s": 0.0, "policies": ["static-max"]}
    with pytest.raises(ConfigError, match="'decode-9'"):
        compare(**short, faults=[Failure(instance="decode-9", from_s=1.0)])
    trace = make_workload("sharegpt", rate_req_s=5.0, duration_s=20.0, seed=0)
    with pytest.raises(ConfigError, match=r"arrivals: .*a trace or a closed loop"):
        compare(**short, arrivals=Gamma(cv=2.0), workload=trace)
    with pytest.raises(ConfigError, match=r"arrivals: .*a trace or a closed loop"):
        compare(**{**short, "rates_req_s": None}, arrivals=Gamma(cv=2.0), concurrency=4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weibull", "poisson, gamma, mmpp, diurnal"),
        ("gamma", "expected cv, such as gamma:cv=5"),
        ("gamma:cv", "expected cv, each a number and once, got 'cv'"),
        ("gamma:cv=x", "got 'cv=x'"),
        ("gamma:cv=1,cv=2", "got 'cv=2'"),
        ("gamma:cv=0", "Gamma.cv"),
        ("mmpp:high_s=5", "expected low_s"),
        ("mmpp:high_s=5,low_s=5,low_rate_frac=2", "swap the two states"),
        ("poisson:cv=1", "no parameters"),
        ("diurnal:swing_frac=2", "0 to 1"),
    ],
)
def test_arrivals_as_text_name_what_does_not_fit(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_arrivals(text)
    assert parse_arrivals("diurnal").period_s == 86_400.0
