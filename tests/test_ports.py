"""What a host may bring besides the minimum: found once, and refused where it is something else."""

import numpy as np
import pytest

from voltana_ctrl import ConfigError, ControlLoop, FleetSpec, WallClock, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control import StaticController
from voltana_ctrl.ports import backend_extras, controller_extras, phase_of
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import LimitRanges

FLEET = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))


class Bare:
    """Brings nothing."""


class Wrapped:
    """Passes everything on to another, as a host's own wrapper does."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


def with_(**attributes):
    made = Bare()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_who_brings_nothing_gets_what_is_usual():
    extras = backend_extras(Bare())
    assert (extras.clock, extras.limit_ranges, extras.acts(), extras.problems()) == (
        None, None, True, {},
    )  # fmt: skip
    assert controller_extras(Bare()).period_s == 0.1
    assert controller_extras(Bare()).notes(object()) == {}
    assert phase_of(Bare()) == "decode"


def test_a_switch_is_asked_anew_each_time():
    backend = with_(acts=True)
    acts = backend_extras(backend).acts
    assert acts()
    backend.acts = False
    assert not acts()


def test_what_a_wrapper_passes_on_is_found():
    clock, ranges = WallClock(), LimitRanges.none(2)
    extras = backend_extras(Wrapped(with_(clock=clock, limit_ranges=ranges, acts=False)))
    assert extras.clock is clock
    assert extras.limit_ranges is ranges
    assert not extras.acts()
    told = controller_extras(Wrapped(with_(period_s=np.float64(0.5), notes=lambda memory: memory)))
    assert told.period_s == 0.5
    assert told.notes({"a": 1.0}) == {"a": 1.0}
    assert phase_of(Wrapped(with_(phase="prefill"))) == "prefill"


@pytest.mark.parametrize(
    ("look", "attributes", "words"),
    [
        (backend_extras, {"clock": 3.0}, r"Bare\.clock: expected now_s\(\)"),
        (backend_extras, {"limit_ranges": (1, 2)}, r"Bare\.limit_ranges: expected LimitRanges"),
        (backend_extras, {"problems": {}}, r"Bare\.problems: expected a method"),
        (controller_extras, {"period_s": 0.0}, r"Bare\.period_s: expected a number of seconds > 0"),
        (controller_extras, {"period_s": "soon"}, r"Bare\.period_s: .* got 'soon'"),
        (controller_extras, {"period_s": None}, r"Bare\.period_s: .* got None"),
        (controller_extras, {"notes": {"a": 1.0}}, r"Bare\.notes: expected a method"),
        (phase_of, {"phase": "both"}, r"Bare\.phase: expected 'prefill' or 'decode', got 'both'"),
    ],
)
def test_something_else_under_the_name_is_refused(look, attributes, words):
    with pytest.raises(ConfigError, match=words):
        look(with_(**attributes))


def test_the_loop_refuses_when_it_is_built_and_not_later():
    workload = make_workload("fixed", rate_req_s=1.0, duration_s=9.0)
    controller = StaticController(FLEET, 1005)
    controller.period_s = -1.0
    with pytest.raises(ConfigError, match=r"StaticController\.period_s"):
        ControlLoop(SimBackend(FLEET, workload=workload), controller)
