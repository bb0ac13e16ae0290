import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import (
    ConfigError,
    Decision,
    FleetSpec,
    FleetState,
    InstanceSpec,
    Observation,
    Request,
    Role,
    ShapeError,
    Slo,
    load_profile,
)
from voltana_ctrl.types import Limits

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
not_positive = st.one_of(
    st.floats(max_value=0.0), st.just(float("nan")), st.just(float("inf")), st.just("1"), st.none()
)


@given(value=not_positive, name=st.sampled_from(["ttft_s", "itl_s"]))
def test_slo_refuses_what_is_not_a_positive_number(value, name):
    with pytest.raises(ConfigError, match=name):
        Slo(**{"ttft_s": 1.0, "itl_s": 1.0, name: value})


@pytest.mark.parametrize("attainment", [0.0, 1.0, 99, -0.1, float("nan")])
def test_slo_refuses_an_attainment_that_is_no_fraction(attainment):
    with pytest.raises(ConfigError, match=r"attainment.*write 0\.99, not 99"):
        Slo(ttft_s=1.0, itl_s=1.0, attainment=attainment)


def test_slo_in_milliseconds_is_refused():
    """Taken as seconds it would let the clocks fall to the floor."""
    with pytest.raises(ConfigError, match=r"itl_s: expected seconds.*say 0\.06"):
        Slo.parse("ttft=600,itl=60")
    with pytest.raises(ConfigError, match=r"ttft_s: expected seconds.*say 0\.8"):
        Slo(ttft_s=800.0, itl_s=0.06)


@given(ttft_s=st.floats(1e-3, 600.0), itl_s=st.floats(1e-3, 5.0), share=st.floats(0.01, 0.999))
def test_slo_text_round_trip(ttft_s, itl_s, share):
    slo = Slo(ttft_s=ttft_s, itl_s=itl_s, attainment=share)
    assert Slo.parse(f"ttft={ttft_s!r}, itl={itl_s!r},attainment={share!r}") == slo


@pytest.mark.parametrize("text", ["", "ttft=1", "itl=1", "ttft=1,itl=x", "ttft=1,itl=1,p99=2"])
def test_slo_text_that_does_not_fit_is_refused(text):
    with pytest.raises(ConfigError, match=r"slo: |Slo\."):
        Slo.parse(text)


@given(prefill=st.integers(1, 20), decode=st.integers(1, 20))
def test_fleet_text_gives_that_many_of_each_with_unique_ids(prefill, decode):
    fleet = FleetSpec.parse(f"{prefill}P{decode}D", PROFILE)
    assert len(fleet.prefill) == prefill
    assert len(fleet.decode) == decode
    assert len(set(fleet.ids)) == len(fleet) == prefill + decode
    per_node: dict[str, int] = {}
    for one in fleet.instances:
        per_node[one.node] = per_node.get(one.node, 0) + one.gpus
    assert max(per_node.values()) <= 8


@given(text=st.text(max_size=8).filter(lambda t: not any(c in t.upper() for c in "PC")))
def test_fleet_text_that_does_not_fit_is_refused(text):
    with pytest.raises(ConfigError, match="2P2D"):
        FleetSpec.parse(text, PROFILE)


def test_tensor_parallel_instances_share_a_node_by_their_gpus():
    fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3-70b-tp4"))
    assert [one.node for one in fleet.instances] == ["node0", "node0", "node1", "node1"]


def test_colocated_instances_are_in_both_phases():
    fleet = FleetSpec.parse("3C", PROFILE)
    assert fleet.colocated
    assert fleet.prefill.tolist() == fleet.decode.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([Role.PREFILL], "can decode"),
        ([Role.DECODE], "can prefill"),
        ([Role.COLOCATED, Role.PREFILL], "a mix"),
    ],
)
def test_fleet_without_a_phase_or_with_a_mix_is_refused(roles, message):
    instances = [
        InstanceSpec(id=f"i{k}", role=role, profile=PROFILE) for k, role in enumerate(roles)
    ]
    with pytest.raises(ConfigError, match=message):
        FleetSpec(tuple(instances))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clocks_mhz": [1000.0]}, "clocks of profile"),
        ({"clocks_mhz": []}, "clocks of profile"),
        ({"gpus": 2}, "tensor parallel degree"),
        ({"max_batch": 0}, "max_batch"),
        ({"kv_capacity_tok": 2.5}, "kv_capacity_tok"),
        ({"idle_w": -1.0}, "idle_w"),
        ({"id": ""}, "non-empty"),
        ({"role": "decode"}, "expected a Role"),
    ],
)
def test_instance_refuses_what_does_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        InstanceSpec(**{"id": "a", "role": Role.DECODE, "profile": PROFILE, **change})


TOML = """
[[instance]]
role = "prefill"
profile = "a100-sxm-80gb/llama-3.1-8b"

[[instance]]
role = "decode"
profile = "h100-sxm-80gb/llama-3.1-8b"
id = "fast"
count = 2
clocks_mhz = [1200, 1980]
max_batch = 64
"""


def test_heterogeneous_fleet_from_toml(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(TOML)
    fleet = FleetSpec.from_toml(path, load_profile)
    assert fleet.ids == ("prefill-0", "fast-0", "fast-1")
    assert fleet.instances[2].max_batch == 64
    assert fleet.max_mhz.tolist() == [1410.0, 1980.0, 1980.0]
    assert [row["clock_mhz"] for row in fleet.instances[1].table] == [1200.0, 1980.0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('role = "prefill"', 'role = "both"', "instance 1: role: expected one of prefill"),
        ('role = "prefill"', "", "instance 1: role: missing"),
        ("count = 2", "count = 0", "instance 2: count"),
        ("count = 2", 'count = "2"', "instance 2: count: wrong type"),
        ("max_batch = 64", "max_batsch = 64", "unknown key 'max_batsch'"),
        ("1200, 1980", "1201", "clocks of profile"),
        ("h100-sxm-80gb/llama-3.1-8b", "h100", "profile"),
        ("[[instance]]", "[instance", "expected TOML"),
        ('id = "fast"\ncount = 2', 'id = "prefill-0"', "unique ids"),
    ],
)
def test_toml_errors_name_file_and_place(tmp_path, old, new, message):
    path = tmp_path / "fleet.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        FleetSpec.from_toml(path, load_profile)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_toml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        FleetSpec.from_toml(tmp_path / "none.toml", load_profile)


def test_fleets_and_profiles_travel_between_processes():
    fleet = FleetSpec.parse("2P2D", PROFILE)
    again = pickle.loads(pickle.dumps(fleet))
    assert again.ids == fleet.ids
    assert np.array_equal(again.instances[0].table, fleet.instances[0].table)


def test_arrays_are_copied_and_read_only():
    mine = np.zeros(2)
    state = dataclasses.replace(FleetState.idle(2), queue_tok=mine)
    mine[0] = 7.0
    assert state.queue_tok[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        state.queue_tok[0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        PROFILE.table["clock_mhz"][0] = 1.0


@pytest.mark.parametrize("name", ["queue_tok", "power_w", "age_s"])
def test_state_refuses_wrong_shapes_and_nan(name):
    idle = FleetState.idle(3)
    with pytest.raises(ShapeError, match=name):
        dataclasses.replace(idle, **{name: np.zeros(2)})
    with pytest.raises(ShapeError, match=name):
        dataclasses.replace(idle, **{name: [0.0, np.nan, 0.0]})


def test_observation_is_empty_where_the_engine_does_not_tell():
    seen = Observation(state=FleetState.idle(1))
    assert len(seen.iterations) == len(seen.finished) == 0


FLEET = FleetSpec.parse("2P2D", PROFILE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"freq_mhz": [1410.0] * 3}, ShapeError, "shape"),
        ({"freq_max_mhz": [900.0] * 4}, ConfigError, "floor at or below"),
        ({"route_frac": [-0.1, 1.1, 0.5, 0.5]}, ConfigError, "shares >= 0"),
        ({"price_j_req": [np.nan] * 4}, ShapeError, "finite"),
        ({"t_s": -1.0}, ConfigError, "t_s"),
    ],
)
def test_decision_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(Decision.highest(FLEET), **change)


def test_limits_refuse_what_is_not_positive():
    with pytest.raises(ConfigError, match="power_cap_w"):
        Limits(power_cap_w=[300.0, 0.0])


def test_request_refuses_an_empty_prompt():
    with pytest.raises(ConfigError, match="prompt_tok"):
        Request(prompt_tok=0)


@given(st.lists(st.floats(100.0, 3000.0), min_size=1, max_size=6))
def test_clock_rows_round_up_and_stay_on_the_ladder(ladder_mhz):
    one = FLEET.instances[0]
    rows = one.clock_rows(ladder_mhz)
    assert rows == sorted(set(rows))
    for want_mhz in ladder_mhz:
        reach = [one.clocks_mhz[row] for row in rows if one.clocks_mhz[row] >= want_mhz]
        assert reach or one.clocks_mhz[rows[-1]] == one.clocks_mhz[-1]
