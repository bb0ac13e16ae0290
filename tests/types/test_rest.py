"""Depths of sleep: as a fleet says them, and what it refuses."""

import pickle
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.backends.log import log_decision, log_fleet, log_header, plain
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.live.orders import decision_of, orders_of
from voltana_ctrl.profiles import dilated
from voltana_ctrl.profiles.draws import draw_fleet
from voltana_ctrl.types import DEPTHS, Admission, Rest, Role

A100 = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")
OFF = Rest(power_w=54.0, wake_s=40.0, wake_j=100.0, enter_s=5.0)
FLEET = """
[[instance]]
role = "prefill"
profile = "a100-sxm-80gb/llama-3.1-8b-2026-11"

[[instance]]
role = "decode"
profile = "a100-sxm-80gb/llama-3.1-8b-2026-11"
idle_w = 80.0
"""


def written(tmp_path, text: str) -> FleetSpec:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET + text)
    return FleetSpec.from_toml(path, load_profile)


def test_a_fleet_file_says_each_depth(tmp_path) -> None:
    fleet = written(
        tmp_path,
        "parked = { power_w = 70, wake_s = 0.1, wake_j = 2 }\n"
        "deep_parked = { power_w = 60.0, wake_s = 0.03 }\n"
        "off = { power_w = 54.0, wake_s = 40.0, wake_j = 100.0, enter_s = 5.0 }\n",
    )
    one = fleet.instances[1]
    assert (one.parked_w, one.wake_s, one.wake_j) == (70.0, 0.1, 2.0)
    assert [one.rest(depth).power_w for depth in DEPTHS] == [70.0, 60.0, 60.0, 54.0]
    assert one.rest("off") == OFF
    assert one.least_rest_w == 54.0
    # The other has nothing but what it had: parking at idle power.
    assert {fleet.instances[0].rest(depth) for depth in DEPTHS} == {Rest(power_w=60.0)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("off = 3\n", "off: wrong type"),
        ("off = { wake_s = 3.0 }\n", "off: power_w: missing"),
        ("off = { power_w = 3.0, wake = 3.0 }\n", "off: unknown key 'wake'"),
        ("off = { power_w = true }\n", "off: power_w: expected a number"),
        ("off = { power_w = -1 }\n", "off: Rest.power_w"),
        ("off = { power_w = nan }\n", "off: Rest.power_w"),
        ("off = { power_w = 80.5 }\n", "off.power_w: expected at most 80, its idle_w, got 80.5"),
        ("parked = { power_w = 70, enter_s = 1 }\n", "parked.enter_s"),
        ("parked = { power_w = 70 }\nwake_s = 1.0\n", "parked: expected it or wake_s"),
    ],
)
def test_refuses_a_depth_that_makes_no_sense(tmp_path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        written(tmp_path, text)
    assert "fleet.toml: instance 2" in str(caught.value)


def test_a_fleet_file_says_who_may_change_its_role(tmp_path) -> None:
    fleet = written(tmp_path, 'roles = ["prefill", "decode"]\nturn_s = 0.2\n')
    assert fleet.may_prefill.tolist() == [0, 1]
    assert fleet.may_decode.tolist() == [1]
    assert fleet.instances[1].turn_s == 0.2
    assert log_fleet(log_header(fleet)).instances[1].roles == fleet.instances[1].roles
    for text, words in (
        ('roles = ["prefill"]\n', "roles: expected prefill and decode"),
        ('roles = ["colocated", "decode"]\n', "roles: expected prefill and decode"),
        ('roles = ["both"]\n', "roles: expected names out of"),
        ("roles = 3\n", "roles: wrong type"),
        ('roles = ["prefill", "decode"]\nturn_s = -1.0\n', "turn_s"),
    ):
        with pytest.raises(ConfigError, match=words):
            written(tmp_path, text)


def test_the_profile_speaks_where_the_instance_does_not() -> None:
    profile = replace(A100, off=Rest(power_w=50.0, wake_s=30.0))
    fleet = FleetSpec.parse("1P1D", profile)
    assert fleet.instances[0].rest("off").power_w == 50.0
    assert replace(fleet.instances[0], off=OFF).rest("off") == OFF
    # Nobody sleeps above what it idles at.
    assert replace(fleet.instances[0], idle_w=40.0).rest("off").power_w == 40.0
    with pytest.raises(ConfigError, match=r"Profile.*off\.power_w: expected at most 60"):
        replace(A100, off=Rest(power_w=61.0))
    with pytest.raises(ConfigError, match=r"asleep: expected a Rest, got 3"):
        replace(A100, asleep=3)
    slow = dilated(profile, 10.0)
    assert (slow.off.power_w, slow.off.wake_s) == (50.0, 300.0)


def test_what_is_drawn_from_a_band_sleeps_as_far_below_its_idle_power() -> None:
    """Also where the instance has sleep of its own, which must not exceed what it idles at."""
    profile = replace(A100, off=Rest(power_w=59.0))
    own = replace(FleetSpec.parse("1P1D", profile).instances[1], asleep=Rest(power_w=59.0))
    fleet = FleetSpec((FleetSpec.parse("1P1D", profile).instances[0], own))
    for seed in range(5):
        drawn = draw_fleet(fleet, np.random.default_rng(seed))
        one = drawn.instances[1]
        assert drawn.instances[0].rest("off").power_w == pytest.approx(one.idle_w * 59.0 / 60.0)
        assert one.rest("asleep").power_w == pytest.approx(min(59.0, one.idle_w))


def test_decisions_carry_depths_to_nodes_logs_and_workers() -> None:
    fleet = FleetSpec.parse("1P2D", replace(A100, off=OFF))
    told = replace(Decision.highest(fleet), depth=["parked", "off", "deep_parked"])
    assert told.depth == ("parked", "off", "deep_parked")
    orders = orders_of(told, fleet)
    assert [orders[name].depth for name in fleet.ids] == list(told.depth)
    assert decision_of(orders, fleet).depth == told.depth
    assert decision_of(orders_of(Decision.highest(fleet), fleet), fleet).depth is None
    assert log_decision(plain(told)).depth == told.depth
    roles = (Role.DECODE, Role.PREFILL, Role.DECODE)
    turned = replace(told, roles=roles, admission=Admission(rate_req_s=2.0))
    assert log_decision(plain(turned)).roles == roles
    assert log_decision(plain(turned)).admission == turned.admission
    assert decision_of(orders_of(turned, fleet), fleet).roles == roles
    again = log_fleet(log_header(fleet)).instances[1]
    assert again.rest("off") == OFF
    assert pickle.loads(pickle.dumps(fleet)).instances[1].rest("off") == OFF
    with pytest.raises(ShapeError, match=r"Decision\.depth"):
        replace(told, depth=("off",))
    with pytest.raises(ConfigError, match=r"Decision.depth: .* got 'on'"):
        replace(told, depth=("parked", "on", "off"))


def test_a_profile_file_says_each_depth_with_its_source(tmp_path) -> None:
    text = (files("voltana_ctrl.profiles") / "data/l20/qwen2.5-7b.toml").read_text()
    known = 'status = "measured"\nsource = "somebody"\nerror = "one reading"\n'
    path = tmp_path / "mine.toml"
    path.write_text(f"{text}\n[off]\n{known}power_w = 35.5\nwake_s = 45.0\n")
    profile = load_profile(str(path))
    assert profile.off == Rest(power_w=35.5, wake_s=45.0)
    assert profile.sources["off"]["source"] == "somebody"
    assert profile.asleep is None
    for section, words in (
        (f"[off]\n{known}wake_s = 45.0\n", "missing key 'off.power_w'"),
        ("[off]\npower_w = 35.5\n", "missing key 'off.status'"),
        (f"[off]\n{known}power_w = 35.5\nwake = 45.0\n", r"unknown key 'off\.wake'"),
        (f'[off]\n{known}power_w = "low"\n', r"off\.power_w: expected a finite number"),
        (f"[off]\n{known}power_w = 500.0\n", r"off\.power_w: expected at most"),
    ):
        path.write_text(f"{text}\n{section}")
        with pytest.raises(ConfigError, match=words):
            load_profile(str(path))
