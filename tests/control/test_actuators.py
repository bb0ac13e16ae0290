"""Clock lock or power cap: what was measured decides, GPU by GPU, and nothing is assumed."""

import math
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_gpus import PROFILE, all_given_back, machine, needs_compiler
from tests.helpers.paths import ROOT
from voltana_ctrl import (
    ConfigError,
    Controller,
    ControlLoop,
    Decision,
    FleetSpec,
    FleetState,
    Guard,
    InstanceSpec,
    MpcController,
    Observation,
    Role,
    ShapeError,
    Slo,
    Status,
    load_profile,
)
from voltana_ctrl.backends import CpufreqBackend, NvmlBackend, Recorder, ReplayBackend
from voltana_ctrl.cli import app
from voltana_ctrl.control import ActuatorChooser
from voltana_ctrl.fit import actuator_lines, actuators_toml, fit_table, read_actuators
from voltana_ctrl.laws import compare_actuators
from voltana_ctrl.laws.iteration import at_clock, decode_j, decode_s, prefill_s
from voltana_ctrl.profiling.engine import Engine
from voltana_ctrl.profiling.profiler import profile_engine
from voltana_ctrl.profiling.sweep import Sweep, plan_profile
from voltana_ctrl.types import ActuatorPoint, ActuatorSetting, LimitRanges, Limits, limits_of

REFERENCE = replace(load_profile(PROFILE), batch_steps=())
LOADS = [(8, 256), (8, 1024), (32, 256), (32, 1024)]
LOCKS_MHZ = (510.0, 810.0, 1110.0, 1410.0)
CAP_W = 180.0


def point(load, freq_mhz, wall_s, power_w, error_frac=1e-3, **others):
    batch_req, context_tok = load
    return ActuatorPoint(
        phase="decode",
        batch_req=batch_req,
        context_tok=context_tok,
        kv_tok=float(batch_req * context_tok),
        freq_mhz=freq_mhz,
        wall_s=wall_s,
        wall_se_s=error_frac * wall_s,
        power_w=power_w,
        power_se_w=error_frac * power_w,
        **others,
    )


def law(load, freq_mhz):
    row, (batch_req, context_tok) = at_clock(REFERENCE, freq_mhz), load
    wall_s = float(decode_s(row, batch_req, batch_req * context_tok))
    return wall_s, float(decode_j(row, batch_req, batch_req * context_tok)) / wall_s


def locks(loads=LOADS):
    return [point(load, mhz, *law(load, mhz)) for load in loads for mhz in LOCKS_MHZ]


def capped(saves_frac=0.2, as_fast_mhz=900.0, loads=LOADS, **others):
    """Points of a cap at the highest clock that is as fast as a lock, and draws less."""
    others = others or {"power_cap_w": CAP_W}
    made = []
    for load in loads:
        wall_s, power_w = law(load, as_fast_mhz)
        made.append(point(load, 1410.0, wall_s, (1.0 - saves_frac) * power_w, **others))
    return made


def fleet_of(*points, role="1P1D"):
    return FleetSpec.parse(role, replace(REFERENCE, actuators=tuple(points)))


def state(running_req=16.0, context_tok=500.0, t_s=10.0, power_w=0.0, n=2):
    return replace(
        FleetState.idle(n, t_s=t_s),
        running_req=np.full(n, running_req),
        kv_used_tok=np.full(n, running_req * context_tok),
        power_w=np.full(n, power_w),
    )


class Asks(Controller):
    """Asks for one clock under ceilings of its own."""

    def __init__(self, fleet, clock_mhz, ceiling_mhz=None):
        super().__init__(fleet)
        self.clock_mhz = clock_mhz
        self.ceiling_mhz = fleet.max_mhz if ceiling_mhz is None else ceiling_mhz

    def init(self):
        return None

    def _decide(self, observation, memory):
        return Decision.highest(
            self.fleet,
            t_s=observation.state.t_s,
            floor_mhz=np.full(len(self.fleet), self.clock_mhz),
            ceiling_mhz=self.ceiling_mhz,
        ), memory


def chosen(fleet, clock_mhz=810.0, seen=None, **settings):
    chooser = ActuatorChooser(Asks(fleet, clock_mhz), **settings)
    observation = Observation(state=seen or state(n=len(fleet)))
    return chooser.decide(observation, chooser.init())[0]


# The choice


def test_a_cap_that_was_measured_to_save_is_taken():
    decision = chosen(fleet_of(*locks(), *capped()))
    assert decision.freq_mhz.tolist() == [810.0, 1410.0]  # nothing was measured of prefill
    assert decision.limits.power_cap_w.tolist() == [np.inf, CAP_W]
    assert decision.limits.mem_mhz is None
    assert decision.limits.cpu_mhz is None


@pytest.mark.parametrize(
    ("fleet", "seen", "why"),
    [
        (fleet_of(*locks(), *capped(saves_frac=0.0)), None, "a tie"),
        (fleet_of(*locks(), *capped(saves_frac=0.008)), None, "less than a percent"),
        (fleet_of(*locks(), *capped(saves_frac=-0.1)), None, "the lock draws less"),
        (fleet_of(*locks(), *capped(as_fast_mhz=800.0)), None, "the cap is slower"),
        (fleet_of(*locks(), *capped(as_fast_mhz=1410.0, saves_frac=0.0)), None, "inert"),
        (fleet_of(*capped()), None, "no clock lock was measured"),
        (fleet_of(*locks(LOADS[:3]), *capped()), None, "nor at one of the loads"),
        (fleet_of(*locks(), *capped(loads=LOADS[1:])), None, "nor the cap"),
        (
            fleet_of(*(p for p in locks() if p.freq_mhz > 810.0), *capped(saves_frac=0.6)),
            None,
            "no lock as slow was measured",
        ),
        (fleet_of(*locks(), *capped()), state(running_req=7.0), "below the loads measured"),
        (fleet_of(*locks(), *capped()), state(running_req=33.0), "above them"),
        (fleet_of(*locks(), *capped()), state(context_tok=1025.0), "longer contexts"),
        (fleet_of(*locks(), *capped()), state(running_req=0.0), "idle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_otherwise_the_clock_lock_stays(fleet, seen, why):
    decision = chosen(fleet, seen=seen)
    assert decision.limits is None
    assert decision.freq_mhz.tolist() == [810.0, 810.0]


def test_measurements_that_are_too_rough_are_a_tie():
    rough = [replace(each, power_se_w=0.1 * each.power_w) for each in capped(saves_frac=0.15)]
    assert chosen(fleet_of(*locks(), *rough)).limits is None
    slow = [replace(each, wall_se_s=0.12 * each.wall_s) for each in capped()]
    assert chosen(fleet_of(*locks(), *slow)).limits is None
    # The same doubt, believed: less confidence takes it.
    assert chosen(fleet_of(*locks(), *rough), confidence_frac=0.75).limits is not None


def test_a_cap_must_pay_at_every_load_around_and_at_no_other():
    bad = [each for each in capped(saves_frac=-0.1) if each.load[1:] == (32, 1024)]
    good = [each for each in capped() if each.load[1:] != (32, 1024)]
    fleet = fleet_of(*locks(), *good, *bad)
    assert chosen(fleet).limits is None
    # At a batch of 8 the loads of 32 do not matter.
    assert chosen(fleet, seen=state(running_req=8.0)).limits is not None


def test_the_setting_that_saves_most_is_taken():
    deep = capped(saves_frac=0.3, as_fast_mhz=850.0, power_cap_w=150.0)
    # The deep cap is as fast as a lock at 850 MHz only.
    fleet = fleet_of(*locks(), *capped(), *deep)
    assert chosen(fleet, 810.0).limits.power_cap_w[1] == 150.0
    assert chosen(fleet, 885.0).limits.power_cap_w[1] == CAP_W
    assert chosen(fleet, 915.0).limits is None


def test_memory_and_cpu_clocks_are_chosen_in_the_same_way():
    both = capped(mem_mhz=810.0, cpu_mhz=1800.0)
    decision = chosen(fleet_of(*locks(), *both))
    assert decision.limits.mem_mhz.tolist() == [np.inf, 810.0]
    assert decision.limits.cpu_mhz.tolist() == [np.inf, 1800.0]
    assert decision.limits.power_cap_w is None


def test_colocated_instances_need_both_phases():
    decode = [*locks(), *capped()]
    prefill = [
        replace(each, phase="prefill", kv_tok=0.0, wall_s=4.0 * each.wall_s) for each in decode
    ]
    seen = state(n=1)
    assert chosen(fleet_of(*decode, role="1C"), seen=seen).limits is None
    assert chosen(fleet_of(*prefill, role="1C"), seen=seen).limits is None
    assert chosen(fleet_of(*decode, *prefill, role="1C"), seen=seen).limits is not None


def test_a_power_ceiling_comes_first():
    fleet = fleet_of(*locks(), *capped())

    for ceiling_mhz, taken in ((1410.0, True), (1395.0, False)):
        chooser = ActuatorChooser(Asks(fleet, 810.0, np.array([1410.0, ceiling_mhz])))
        decision, _ = chooser.decide(Observation(state=state()), chooser.init())
        assert (decision.limits is not None) == taken
        applied = Guard(fleet).shield(decision, Observation(state=state()), None)
        assert np.all(applied.freq_mhz <= applied.freq_max_mhz)


def test_what_the_machine_cannot_set_is_not_chosen():
    fleet = fleet_of(*locks(), *capped())
    able = replace(
        LimitRanges.none(2), cap_min_w=np.array([100.0] * 2), cap_max_w=np.array([400.0] * 2)
    )
    assert chosen(fleet, ranges=able).limits is not None
    too_low = replace(able, cap_min_w=np.array([200.0] * 2))
    for ranges in (LimitRanges.none(2), too_low):
        assert chosen(fleet, ranges=ranges).limits is None
    with pytest.raises(ShapeError, match="expected 2 instances, got 3"):
        chosen(fleet, ranges=LimitRanges.none(3))
    # Nor a clock that the instance may not use.
    decode = InstanceSpec(
        id="d", role=Role.DECODE, profile=fleet.instances[1].profile, clocks_mhz=[210.0, 810.0]
    )
    low = FleetSpec((fleet.instances[0], decode))
    assert chosen(low).limits is None


def test_decisions_that_are_not_ok_or_have_limits_pass():
    fleet = fleet_of(*locks(), *capped())
    asked = Decision.highest(fleet, floor_mhz=np.full(2, 810.0))
    told = [
        replace(asked, status=Status.INFEASIBLE),
        replace(asked, limits=Limits(power_cap_w=[300.0, 300.0])),
    ]

    class Says(Controller):
        def init(self):
            return 0

        def _decide(self, observation, memory):
            return told[memory], memory + 1

    chooser = ActuatorChooser(Says(fleet))
    memory = chooser.init()
    for decision in told:
        got, memory = chooser.decide(Observation(state=state()), memory)
        assert got is decision
    assert (
        ActuatorChooser(Asks(fleet, 810.0))
        .decide(Observation(state=state()), chooser.init())[0]
        .limits
        is not None
    )  # it was not for want of a setting


def test_without_measurements_decisions_are_the_same_objects():
    fleet = FleetSpec.parse("1P1D", load_profile(PROFILE))
    inner = MpcController(fleet, Slo(ttft_s=0.6, itl_s=0.06), governed=False)
    given_out = []
    decide = inner._decide

    def note(observation, memory):
        given_out.append(decide(observation, memory))
        return given_out[-1]

    inner._decide = note
    chooser = ActuatorChooser(inner)
    assert chooser.period_s == inner.period_s
    memory = chooser.init()
    for number in range(40):
        decision, memory = chooser.decide(Observation(state=state(t_s=0.1 * number)), memory)
        assert decision is given_out[-1][0]
        assert memory.inner is given_out[-1][1]


def test_settings_dwell_and_the_lock_is_returned_to_at_once():
    deep = capped(saves_frac=0.3, as_fast_mhz=850.0, power_cap_w=150.0)
    fleet = fleet_of(*locks(), *capped(), *deep)

    inner = Asks(fleet, 885.0)
    chooser = ActuatorChooser(inner, dwell_s=2.0)
    memory = chooser.init()
    caps_w = []
    for t_s, inner.clock_mhz in (
        (0.0, 885.0),  # the shallow cap
        (1.0, 810.0),  # the deep one would save more, but it is too early
        (2.0, 810.0),
        (2.5, 885.0),  # the deep one is too slow now, and no other may follow yet: the lock
        (3.0, 885.0),
        (4.6, 885.0),
        (5.0, 1000.0),  # no cap is as fast
    ):
        decision, memory = chooser.decide(Observation(state=state(t_s=t_s)), memory)
        caps_w.append(None if decision.limits is None else decision.limits.power_cap_w[1])
    assert caps_w == [CAP_W, CAP_W, 150.0, None, None, CAP_W, None]


def test_a_cap_that_the_gpu_does_not_obey_is_given_up():
    fleet = fleet_of(*locks(), *capped())
    chooser = ActuatorChooser(Asks(fleet, 810.0), dwell_s=2.0)
    for drawn_w, kept in ((1.04 * CAP_W, True), (1.5 * CAP_W, False)):
        memory = chooser.init()
        for t_s in np.arange(0.0, 20.0, 0.1):
            seen = Observation(state=state(t_s=t_s, power_w=drawn_w))
            decision, memory = chooser.decide(seen, memory)
            if t_s < 6.0:  # what was drawn before the cap took hold does not count
                assert decision.limits is not None
        assert (decision.limits is not None) == kept
        assert memory.refused.tolist() == [False, not kept]


# Against a naive twin


def naive_lock(profile, load, clock_mhz):
    """Time and power of a lock between two measured, one number at a time; None outside."""
    known = sorted(
        (each for each in profile.actuators if each.load == load and each.setting.lock_only),
        key=lambda each: each.freq_mhz,
    )
    for low, high in pairwise(known):
        if low.freq_mhz <= clock_mhz <= high.freq_mhz:
            part = (clock_mhz - low.freq_mhz) / (high.freq_mhz - low.freq_mhz)
            made = []
            for index, name in enumerate(("wall_s", "power_w")):
                ratios = [getattr(p, name) / law(load[1:], p.freq_mhz)[index] for p in (low, high)]
                value = law(load[1:], clock_mhz)[index] * (
                    (1 - part) * ratios[0] + part * ratios[1]
                )
                errors = [
                    getattr(p, name.replace("_", "_se_")) / getattr(p, name) for p in (low, high)
                ]
                made.append((value, value * ((1 - part) * errors[0] + part * errors[1])))
            return made
    return None


def naive_saving_w(profile, each, clock_mhz):
    lock = naive_lock(profile, each.load, clock_mhz)
    if lock is None:
        return -math.inf
    (lock_s, lock_se_s), (lock_w, lock_se_w) = lock
    if lock_s - each.wall_s < 1.959964 * math.hypot(lock_se_s, each.wall_se_s):
        return -math.inf
    sure_w = lock_w - each.power_w - 1.959964 * math.hypot(lock_se_w, each.power_se_w)
    return sure_w if sure_w > 0.01 * lock_w else -math.inf


@given(
    clock_mhz=st.sampled_from([210.0, 510.0, 660.0, 810.0, 1005.0, 1410.0]),
    caps=st.lists(
        st.tuples(st.floats(-0.2, 0.4), st.floats(500.0, 1410.0), st.floats(0.0, 0.03)),
        min_size=1,
        max_size=4,
    ),
    off=st.lists(st.floats(0.9, 1.1), min_size=16, max_size=16),
    running_req=st.floats(1.0, 40.0),
    context_tok=st.floats(100.0, 1500.0),
)
def test_choice_is_that_of_a_naive_search(clock_mhz, caps, off, running_req, context_tok):
    measured = [
        replace(each, wall_s=each.wall_s * factor, power_w=each.power_w / factor)
        for each, factor in zip(locks(), off, strict=True)
    ]
    for number, (saves_frac, as_fast_mhz, error_frac) in enumerate(caps):
        measured += [
            replace(each, wall_se_s=error_frac * each.wall_s, power_se_w=error_frac * each.power_w)
            for each in capped(saves_frac, as_fast_mhz, power_cap_w=200.0 + number)
        ]
    fleet = fleet_of(*measured)
    profile = fleet.instances[1].profile
    around = []
    if 8 <= running_req <= 32 and 256 <= context_tok <= 1024:
        around = [
            (n, tok)
            for n in {8 if running_req < 32 else 32, 32 if running_req > 8 else 8}
            for tok in {256 if context_tok < 1024 else 1024, 1024 if context_tok > 256 else 256}
        ]
    best, best_w = None, 0.0
    for number in range(len(caps)):
        savings_w = [
            naive_saving_w(profile, each, clock_mhz)
            for each in measured
            if each.power_cap_w == 200.0 + number and each.load[1:] in around
        ]
        if savings_w and min(savings_w) > best_w + 1e-6:
            best, best_w = 200.0 + number, min(savings_w)
    decision = chosen(fleet, clock_mhz, seen=state(running_req, context_tok))
    got = None if decision.limits is None else decision.limits.power_cap_w[1]
    assert got == best


# Guard


RANGES = LimitRanges(
    cap_min_w=np.array([100.0, np.inf]),
    cap_max_w=np.array([300.0, 0.0]),
    cpu_min_mhz=np.array([800.0, 800.0]),
    cpu_max_mhz=np.array([3000.0, 2000.0]),
    mem_clocks_mhz=((810.0, 1593.0), ()),
)


def shielded(limits, **changes):
    fleet = fleet_of()
    guard = Guard(fleet, ranges=RANGES)
    wish = replace(Decision.highest(fleet), limits=limits, **changes)
    applied = guard.shield(wish, Observation(state=state()), None)
    again = guard.shield(applied, Observation(state=state()), applied)
    assert guard.changes(applied, again) == ()
    return applied.limits, guard.changes(wish, applied)


def test_guard_holds_limits_to_what_can_be_set():
    limits, said = shielded(
        Limits(power_cap_w=[50.0, 250.0], mem_mhz=[811.0, 810.0], cpu_mhz=[100.0, 9000.0])
    )
    assert limits.power_cap_w.tolist() == [100.0, np.inf]
    assert limits.mem_mhz.tolist() == [1593.0, np.inf]
    assert limits.cpu_mhz.tolist() == [800.0, 2000.0]
    assert said == ("limits",)
    limits, said = shielded(Limits(power_cap_w=[999.0, np.inf]))
    assert limits.power_cap_w.tolist() == [300.0, np.inf]
    fine = Limits(power_cap_w=[200.0, np.inf], mem_mhz=[810.0, np.inf])
    assert shielded(fine)[1] == ()
    assert shielded(None) == (None, ())
    # Nothing is left of limits that cannot be set at all.
    assert shielded(Limits(power_cap_w=[np.inf, 200.0])) == (None, ("limits",))


@given(
    cap_w=st.floats(1.0, 1e4) | st.just(np.inf),
    mem_mhz=st.floats(1.0, 1e4) | st.just(np.inf),
    cpu_mhz=st.floats(1.0, 1e4) | st.just(np.inf),
)
def test_guarded_limits_are_supported_and_stay(cap_w, mem_mhz, cpu_mhz):
    limits = Limits(power_cap_w=[cap_w] * 2, mem_mhz=[mem_mhz] * 2, cpu_mhz=[cpu_mhz] * 2)
    held = RANGES.held(limits)
    again = RANGES.held(held)
    for i in range(2):
        finite = {
            name: float(getattr(held, name)[i])
            for name in ("power_cap_w", "mem_mhz", "cpu_mhz")
            if held is not None
            and getattr(held, name) is not None
            and np.isfinite(getattr(held, name)[i])
        }
        assert RANGES.allow(i, ActuatorSetting(freq_mhz=1410.0, **finite))
    for name in ("power_cap_w", "mem_mhz", "cpu_mhz"):
        before, after = getattr(held, name, None), getattr(again, name, None)
        assert (before is None and after is None) or np.array_equal(before, after)


def test_a_cap_outlives_one_bad_plan_and_no_more():
    fleet = fleet_of()
    guard = Guard(fleet, hold_s=1.0, ranges=RANGES)
    cap = replace(Decision.highest(fleet, t_s=10.0), limits=Limits(power_cap_w=[200.0, np.inf]))
    last = guard.shield(cap, Observation(state=state(t_s=10.0)), None)
    bad = Decision.highest(fleet, t_s=10.5, status=Status.INACCURATE)
    held = guard.shield(bad, Observation(state=state(t_s=10.5)), last)
    assert held.limits.power_cap_w[0] == 200.0
    late = guard.shield(bad, Observation(state=state(t_s=12.0)), last)
    assert late.limits is None  # latency first: the highest clock, uncapped


def test_guard_refuses_ranges_of_another_fleet():
    with pytest.raises(ShapeError, match=r"Guard\.ranges: expected 2 instances, got 3"):
        Guard(fleet_of(), ranges=LimitRanges.none(3))


# Profile files


def test_points_come_back_from_a_file(tmp_path):
    points = (*locks(), *capped(), *capped(mem_mhz=810.0), *capped(cpu_mhz=1800.0))
    source = ROOT / "voltana_ctrl" / "profiles" / "data" / f"{PROFILE}.toml"
    path = tmp_path / "mine.toml"
    path.write_text(source.read_text() + actuators_toml(points, "table.csv"))
    profile = load_profile(path)
    assert [each.setting for each in profile.actuators] == [each.setting for each in points]
    assert np.allclose(
        [(each.wall_s, each.power_se_w) for each in profile.actuators],
        [(each.wall_s, each.power_se_w) for each in points],
    )
    assert profile.sources["actuators"]["source"] == "table.csv"
    assert np.array_equal(profile.table, load_profile(PROFILE).table)
    assert profile.status == load_profile(PROFILE).status


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("power_cap_w", "power_cap"), r"unknown key 'actuators\.point 5\.power_cap'; did you"),
        (("batch_req = 8\n", ""), r"missing key 'actuators\.point 1\.batch_req'"),
        (("power_se_w = ", "power_se_w = -"), "power_se_w: expected a number >= 0"),
        (("freq_mhz = 1410", "freq_mhz = 1980"), "actuators: expected clocks within 210..1410"),
        (('phase = "decode"', 'phase = "idle"'), "expected decode or prefill, got idle"),
        (('status = "measured"\n', ""), r"missing key 'actuators\.status'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    source = ROOT / "voltana_ctrl" / "profiles" / "data" / f"{PROFILE}.toml"
    section = actuators_toml((*locks(LOADS[:1]), *capped(loads=LOADS[:1])), "table.csv")
    path = tmp_path / "mine.toml"
    path.write_text(source.read_text() + section.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_a_recorded_log_keeps_the_points_and_reproduces_the_choice(tmp_path):
    fleet = fleet_of(*locks(), *capped())

    class Plant:
        spec = fleet
        number = 0

        def read(self):
            self.number += 1
            return Observation(state=state(t_s=0.1 * self.number))

        def apply(self, decision):
            pass

        def close(self):
            pass

    log = Recorder(tmp_path / "log.jsonl", fleet)
    with ControlLoop(Plant(), ActuatorChooser(Asks(fleet, 810.0)), observers=[log]) as loop:
        for _ in range(5):
            loop.tick()
    log.close()
    backend = ReplayBackend(tmp_path / "log.jsonl")
    controller = ActuatorChooser(Asks(backend.spec, 810.0))
    with ControlLoop(backend, controller) as loop:
        for _ in range(5):
            assert loop.tick().applied.limits.power_cap_w[1] == CAP_W
        assert backend.mismatches == ()


# Tables


HEAD = "phase,freq_mhz,batch_req,asked_tok,kv_tok,wall_s,wall_se_s,energy_j,power_se_w"


def write_table(path, *rows, head=f"{HEAD},set_power_cap_w,set_cpu_mhz"):
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_rows_with_a_cap_do_not_enter_the_laws(tmp_path):
    loads = [(n, tok) for n in (1, 8, 32) for tok in (256, 2048)]
    rows = []
    for mhz in (510, 810, 1110, 1260, 1335, 1410):
        for n, tok in loads:
            wall_s, power_w = law((n, tok), mhz)
            rows.append(f"decode,{mhz},{n},{tok},{n * tok},{wall_s},1e-5,{wall_s * power_w},0.1,,")
    caps = [f"decode,1410,{n},{tok},{n * tok},0.2,1e-5,30.0,0.1,150," for n, tok in loads]
    cpus = [f"decode,1410,{n},{tok},{n * tok},0.2,1e-5,30.0,0.1,,1800" for n, tok in loads]
    without = fit_table(write_table(tmp_path / "without.csv", *rows))
    result = fit_table(write_table(tmp_path / "with.csv", *rows, *caps, *cpus))
    assert without.actuators == ()
    assert np.array_equal(result.laws.decode.base_s, without.laws.decode.base_s)
    assert len(result.table) == len(rows)
    settings = {each.setting for each in result.actuators}
    assert ActuatorSetting(freq_mhz=1410.0, power_cap_w=150.0) in settings
    assert ActuatorSetting(freq_mhz=1410.0, cpu_mhz=1800.0) in settings
    assert len(result.actuators) == len(rows) + len(caps) + len(cpus)


def test_repeated_measurements_become_one_whose_error_shows_their_difference(tmp_path):
    first = write_table(
        tmp_path / "a.csv",
        "decode,1410,8,512,4300,0.020,1e-6,5.0,0.1,,",
        "decode,1410,8,512,4300,0.030,1e-6,6.0,0.1,200,",
    )
    second = write_table(
        tmp_path / "b.csv",
        "decode,1410,8,512,4300,0.020,1e-6,5.0,0.1,,",
        "decode,1410,8,512,4300,0.032,1e-6,6.4,0.1,200,",
    )
    lock, cap = read_actuators([first, second])
    assert (lock.wall_s, lock.power_se_w) == pytest.approx((0.020, 0.1 / math.sqrt(2.0)))
    assert (cap.wall_s, cap.wall_se_s, cap.power_w) == pytest.approx((0.031, 0.001, 200.0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("decode,1410,8,512,4300,0.02,,5.0,0.1,200,", "wall_se_s: missing where another actuator"),
        ("decode,1410,8,512,4300,0.02,1e-6,,0.1,200,", "energy_j: missing"),
        ("decode,1410,8,512,4300,x,1e-6,5.0,0.1,200,", "could not convert"),
        ("decode,1410,8,512,4300,0.02,1e-6,5.0,0.1,-200,", "power_cap_w: expected a number > 0"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        read_actuators(write_table(tmp_path / "t.csv", row))


def test_what_was_found_is_told():
    inert = [replace(each, power_cap_w=CAP_W) for each in locks() if each.freq_mhz == 1410.0]
    profile = replace(REFERENCE, actuators=(*locks(), *inert))
    assert compare_actuators(profile).inert.all()
    assert all("inert" in line for line in actuator_lines(profile))
    better = actuator_lines(replace(REFERENCE, actuators=(*locks(), *capped())))
    assert all(re.search(r"less power than a lock at 6\d\d\.\.885 MHz", line) for line in better)
    worse = [replace(each, wall_s=10.0 * each.wall_s) for each in capped()]
    lines = actuator_lines(replace(REFERENCE, actuators=(*locks(), *worse)))
    assert all("no better than a clock lock" in line for line in lines)


# The whole path: measured on a GPU, chosen, set on it, given back


SWEEP = Sweep(
    clocks_mhz=(705, 930, 1410),
    batches_req=(2, 6),
    contexts_tok=(64, 192),
    prompts_tok=(),
    idle=False,
    caps_w=(150,),
    steady_s=0.4,
    min_steps=8,
    settle_s=0.02,
    pause_s=0.0,
    sample_s=0.02,
)
ASKED_MHZ = 750.0
#: Iterations long enough that what a busy machine is late does not count.
SLOW = replace(
    REFERENCE,
    table=np.array(
        [
            tuple(
                4.0 * value if name.startswith("decode") and not name.endswith("_w") else value
                for name, value in zip(REFERENCE.table.dtype.names, row, strict=True)
            )
            for row in REFERENCE.table.tolist()
        ],
        dtype=REFERENCE.table.dtype,
    ),
)


@contextmanager
def lateness():
    """How late the machine wakes a thread that sleeps, in seconds, over and over."""
    late_s, done = [0.0], threading.Event()

    def sleep():
        while not done.is_set():
            begin_s = time.perf_counter()
            time.sleep(0.02)
            late_s.append(time.perf_counter() - begin_s - 0.02)

    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    try:
        yield late_s
    finally:
        done.set()
        thread.join()


def measured_on(fake, folder, sweep=SWEEP):
    with FakeEngine(SLOW, fake.gpus[1]) as live, lateness() as late_s:
        engine = Engine(url=live.url, gpus=fake.uuids[1:])
        run = profile_engine(
            engine, sweep, folder / "table.csv", lock_dir=folder, library=fake.library
        )
    # The engine's iterations are sleeps of some 50 ms: later than a fiftieth of that they tell
    # how busy the machine is, and nothing of clocks and caps.
    if np.mean(late_s) > 0.001:
        pytest.skip(f"the machine is {np.mean(late_s) * 1e3:.1f} ms late on average: too busy")
    assert run.measured == len(sweep.points())
    assert not any("power cap" in note for note in run.notes)  # it is meant to hold the clock
    assert all_given_back(fake)
    return folder / "table.csv"


def controlled(fake, folder, profile):
    """A few ticks with the chooser, and what is set during the last."""
    fleet = FleetSpec.parse("1P1D", profile)

    def engine():
        return Observation(state=state(running_req=4.0, context_tok=100.0))

    gpus = {"prefill-0": fake.uuids[:1], "decode-0": fake.uuids[1:]}
    backend = NvmlBackend(fleet, gpus, engine=engine, lock_dir=folder, library=fake.library)
    controller = ActuatorChooser(Asks(fleet, ASKED_MHZ), ranges=backend.limit_ranges, dwell_s=0.01)
    before = fake.gpus[1].cap_sets
    with ControlLoop(backend, controller) as loop:
        for _ in range(3):
            record = loop.tick()
        assert record.interventions == ()
        seen = [(gpu.lock_hi_mhz, gpu.cap_w) for gpu in fake.gpus]
    assert all_given_back(fake)
    return seen, fake.gpus[1].cap_sets - before


@needs_compiler
def test_a_gpu_whose_decode_prefers_a_cap_gets_one(tmp_path):
    pytest.importorskip("httpx", reason="needs the server extra")
    with machine(tmp_path) as fake:
        for gpu in fake.gpus:
            gpu.cap_gain_frac = 0.5
        points = read_actuators(measured_on(fake, tmp_path))
        seen, cap_sets = controlled(fake, tmp_path, replace(SLOW, actuators=points))
        assert seen == [(ASKED_MHZ, 400.0), (1410.0, 150.0)]
        assert cap_sets == 2  # set once, and put back
        assert fake.gpus[0].cap_sets == 0


@needs_compiler
def test_a_gpu_whose_caps_are_inert_keeps_its_clock_lock(tmp_path):
    pytest.importorskip("httpx", reason="needs the server extra")
    with machine(tmp_path) as fake:
        for gpu in fake.gpus:
            gpu.cap_gain_frac, gpu.cap_inert = 0.5, 1.0
        points = read_actuators(measured_on(fake, tmp_path))
        profile = replace(SLOW, actuators=points)
        # One in ten may look different by chance.
        assert compare_actuators(profile).inert.sum() >= 2
        seen, cap_sets = controlled(fake, tmp_path, profile)
        assert seen == [(ASKED_MHZ, 400.0), (ASKED_MHZ, 400.0)]
        assert cap_sets == 0


@needs_compiler
@pytest.mark.slow
def test_a_cap_that_is_no_better_than_a_lock_leaves_the_lock(tmp_path):
    pytest.importorskip("httpx", reason="needs the server extra")
    with machine(tmp_path) as fake:
        profile = replace(SLOW, actuators=read_actuators(measured_on(fake, tmp_path)))
        assert not compare_actuators(profile).inert.any()
        seen, cap_sets = controlled(fake, tmp_path, profile)
        assert (seen[1], cap_sets) == ((ASKED_MHZ, 400.0), 0)


@needs_compiler
@pytest.mark.slow
def test_the_same_through_fit_and_a_profile_file(tmp_path):
    pytest.importorskip("httpx", reason="needs the server extra")
    sweep = replace(
        SWEEP,
        clocks_mhz=(510, 705, 930, 1110, 1260, 1410),
        batches_req=(2, 4, 6),
        contexts_tok=(64, 512),
        prompts_tok=(128, 512, 1536),
        idle=True,
        steady_s=0.3,
    )
    with machine(tmp_path) as fake:
        for gpu in fake.gpus:
            gpu.cap_gain_frac = 0.5
            gpu.cap_w = gpu.cap_default_w = gpu.cap_max_w = 500.0
        result = fit_table(measured_on(fake, tmp_path, sweep), batch_steps=((1, 1),))
        ladder_mhz = range(510, 1411, 15)
        path = tmp_path / "mine.toml"
        result.save(path, "fake/slow", load_profile(PROFILE), ladder_mhz=ladder_mhz)
        profile = load_profile(path)
        print("\n".join(actuator_lines(profile)))
        seen, _ = controlled(fake, tmp_path, profile)
        assert seen[1] == (1410.0, 150.0)
        assert seen[0] in ((ASKED_MHZ, 500.0), (1410.0, 150.0))  # prefill was measured, too


@needs_compiler
def test_memory_clocks_are_swept_and_given_back(tmp_path):
    pytest.importorskip("httpx", reason="needs the server extra")
    sweep = replace(
        SWEEP, caps_w=(), mem_clocks_mhz=(810,), clocks_mhz=(705, 1410), contexts_tok=(64,),
        batches_req=(2,), steady_s=0.2, min_steps=3,
    )  # fmt: skip
    with machine(tmp_path) as fake:
        points = read_actuators(measured_on(fake, tmp_path, sweep))
    assert {each.setting.mem_mhz for each in points} == {None, 810.0}


@needs_compiler
def test_what_cannot_be_set_is_refused_before_anything_is_measured(tmp_path):
    pytest.importorskip("httpx", reason="needs the server extra")
    with machine(tmp_path) as fake:
        for change, message in (
            ({"caps_w": (50,)}, "power cap 50 W: cannot be set; it takes 100..400 W"),
            ({"mem_clocks_mhz": (900,)}, "memory 900 MHz: .* memory clocks 810, 1593 MHz"),
        ):
            with pytest.raises(ConfigError, match=message):
                measured_on(fake, tmp_path, replace(SWEEP, **change))
        assert [gpu.sets for gpu in fake.gpus] == [0.0, 0.0]
    with pytest.raises(ConfigError, match="compared with clock locks; give two"):
        replace(SWEEP, clocks_mhz=(1410,))


def test_a_table_without_columns_for_it_takes_no_caps(tmp_path):
    old = "phase,freq_mhz,batch_req,kv_tok,prefill_tok,wall_s,energy_j,asked_mhz,asked_tok,steps"
    path = tmp_path / "table.csv"
    path.write_text(f"{old},mean_s,seen_mhz,temperature_c,model\n")
    with pytest.raises(ConfigError, match="no columns for power caps and memory clocks"):
        plan_profile(SWEEP, path)
    assert plan_profile(replace(SWEEP, caps_w=()), path).done == 0


def test_the_plan_tells_the_caps(tmp_path):
    plan = plan_profile(SWEEP, tmp_path / "table.csv")
    assert "1410 MHz, power cap 150 W: decode 2x64, 2x192, 6x64, 6x192" in plan.text()
    assert str(plan.points[-1]) == "decode 6 x 192 tok at 1410 MHz, power cap 150 W"


def test_the_command_line_plans_caps_and_tells_what_fit_found(tmp_path):
    asked = ["http://localhost:1", "--gpu", "GPU-0", "--out", str(tmp_path / "t.csv"), "--dry-run"]
    done = CliRunner().invoke(
        app, ["profile", *asked, "--clocks", "705,1410", "--caps", "200", "--mem-clocks", "810"]
    )
    assert "1410 MHz, power cap 200 W: decode 1x256" in done.output
    assert "1410 MHz, memory 810 MHz: decode 1x256" in done.output
    rows = []
    for mhz in (510, 810, 1110, 1260, 1335, 1410):
        row = at_clock(REFERENCE, mhz)
        for n, tok in ((n, tok) for n in (1, 8, 32) for tok in (256, 2048)):
            wall_s, power_w = law((n, tok), mhz)
            rows.append(
                f"decode,{mhz},{n},{tok},{n * tok},{wall_s},1e-5,{wall_s * power_w},0.1,,,0"
            )
        for tok in (128, 512, 2048, 4096):
            wall_s = float(prefill_s(row, tok))
            energy_j = wall_s * float(row["prefill_power_w"])
            rows.append(f"prefill,{mhz},1,{tok},0,{wall_s},1e-5,{energy_j},0.1,,,{tok}")
    for n, tok in ((n, tok) for n in (8, 32) for tok in (256, 2048)):
        wall_s, power_w = law((n, tok), 900.0)
        rows.append(
            f"decode,1410,{n},{tok},{n * tok},{wall_s},1e-5,{0.8 * wall_s * power_w},0.1,180,,0"
        )
    table = write_table(
        tmp_path / "t.csv", *rows, head=f"{HEAD},set_power_cap_w,set_cpu_mhz,prefill_tok"
    )
    out = tmp_path / "mine.toml"
    done = CliRunner().invoke(
        app, ["fit", str(table), "--out", str(out), "--ladder", "510:1410:15"]
    )
    assert done.exit_code == 0, done.output
    assert "1410 MHz, power cap 180 W: decode 8 x 256 tok: less power than a lock" in done.output
    fleet = FleetSpec.parse("1P1D", load_profile(out))
    assert chosen(fleet).limits.power_cap_w.tolist() == [np.inf, 180.0]


# Backends


@needs_compiler
def test_ranges_come_from_the_driver_and_from_the_cap_that_was_found(tmp_path):
    fleet = fleet_of()
    gpus = None
    with machine(tmp_path) as fake:
        fake.gpus[1].cap_w = 300.0  # the operator's: never raised
        gpus = {name: [uuid] for name, uuid in zip(fleet.ids, fake.uuids, strict=True)}
        settings = {"lock_dir": tmp_path, "library": fake.library}
        with NvmlBackend(fleet, gpus, **settings) as backend:
            ranges = backend.limit_ranges
            assert ranges.cap_min_w.tolist() == [100.0, 100.0]
            assert ranges.cap_max_w.tolist() == [400.0, 300.0]
            assert ranges.mem_clocks_mhz == ((810, 1593), (810, 1593))
            assert np.all(ranges.cpu_max_mhz == 0.0)
            loop = ControlLoop(backend, Asks(fleet, 810.0))
            assert loop.guard.ranges is not None
        with NvmlBackend(fleet, gpus, actuate=False, **settings) as backend:
            assert not any(backend.limit_ranges.mem_clocks_mhz)
            assert np.all(backend.limit_ranges.cap_max_w == 0.0)


@needs_compiler
def test_the_gpus_of_an_instance_share_its_cap(tmp_path):
    two = replace(REFERENCE, gpus=2, actuators=(*locks(), *capped(power_cap_w=300.0)))
    fleet = FleetSpec.parse("1P1D", two)
    with machine(tmp_path, gpus=4) as fake:
        gpus = {"prefill-0": fake.uuids[:2], "decode-0": fake.uuids[2:]}
        backend = NvmlBackend(
            fleet,
            gpus,
            engine=lambda: Observation(state=state()),
            lock_dir=tmp_path,
            library=fake.library,
        )
        ranges = backend.limit_ranges
        assert ranges.cap_min_w.tolist() == [200.0, 200.0]
        assert ranges.cap_max_w.tolist() == [800.0, 800.0]
        with ControlLoop(backend, ActuatorChooser(Asks(fleet, 810.0), ranges=ranges)) as loop:
            loop.tick()
            assert [gpu.cap_w for gpu in fake.gpus] == [400.0, 400.0, 150.0, 150.0]
            assert [gpu.lock_hi_mhz for gpu in fake.gpus] == [810, 810, 1410, 1410]
        assert all_given_back(fake)


def test_cpu_clocks_reach_the_kernel_and_go_back(tmp_path):
    policy = tmp_path / "policy0"
    policy.mkdir()
    for name, khz in (
        ("cpuinfo_min_freq", "800000"),
        ("cpuinfo_max_freq", "3500000"),
        ("scaling_max_freq", "3000000"),
    ):
        (policy / name).write_text(khz)
    fleet = fleet_of(*locks(), *capped(cpu_mhz=1800.0))

    class Plant:
        spec = fleet
        running_req = 16.0

        def read(self):
            return Observation(state=state(running_req=self.running_req))

        def apply(self, decision):
            assert decision.limits is None  # taken by the wrapper

        def close(self):
            pass

    plant = Plant()
    backend = CpufreqBackend(plant, {"decode-0": [policy]}, lock_dir=tmp_path)
    ranges = backend.limit_ranges
    assert (ranges.cpu_min_mhz.tolist(), ranges.cpu_max_mhz.tolist()) == (
        [np.inf, 800.0],
        [0.0, 3000.0],
    )
    controller = ActuatorChooser(Asks(fleet, 810.0), ranges=ranges, dwell_s=0.01)
    with ControlLoop(backend, controller) as loop:
        loop.tick()
        assert (policy / "scaling_max_freq").read_text() == "1800000"
        plant.running_req = 99.0  # outside what was measured
        loop.tick()
        assert (policy / "scaling_max_freq").read_text() == "3000000"
    assert limits_of([None, None]) is None
