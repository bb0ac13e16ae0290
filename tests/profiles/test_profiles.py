"""Profiles: the reference scenario to the digit, and files that do not fit are refused."""

import tomllib
from importlib.resources import files

import numpy as np
import pytest

from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.profiles import list_profiles, load_profile

REFERENCE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
NAMES = list_profiles()


def reference_text() -> str:
    path = files("voltana_ctrl.profiles") / "data" / f"{REFERENCE}.toml"
    return path.read_text(encoding="utf-8")


REFITTED = {
    "slope": 1.50, "knee": 1.142, "host_s": 1e-3, "idle_w": 70.0, "decode_w": (71.2, 34.0),
    "batch_j": (1.18, 0.00796, 1.23e-5), "prefill_w": (59.9, 197.0),
}  # fmt: skip
FIRST_SHIPPED = {
    "slope": 0.71, "knee": 1.106, "host_s": 0.0, "idle_w": 60.0, "decode_w": (78.0, 57.0),
    "batch_j": (0.76, 0.0078, 1.24e-5), "prefill_w": (59.3, 197.3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "law"), [("a100-sxm-80gb/llama-3.1-8b", REFITTED), (REFERENCE, FIRST_SHIPPED)]
)
def test_reference_is_the_published_scenario(name, law) -> None:
    profile = load_profile(name)
    table = profile.table
    f = np.arange(210.0, 1411.0, 15.0)
    g = f / 1e3
    v2 = (1 + law["slope"] * np.maximum(0.0, g - law["knee"])) ** 2
    points = [210, 450, 690, 930, 1170, 1410]
    phi = np.interp(f, points, [3.33, 2.0, 1.66, 1.16, 1.02, 1.0])
    phi_kv = np.interp(f, points, [3.19, 1.87, 1.43, 1.08, 1.06, 1.0])
    expected = {
        "clock_mhz": f,
        "idle_w": law["idle_w"] + 0.0 * f,
        "decode_host_s": law["host_s"] + 0.0 * f,
        "decode_base_s": (10.9e-3 - law["host_s"]) * phi,
        "decode_req_s": 1e-3 * 0.052 * 1410 / f,
        "decode_kv_s": 1e-3 * 7.7e-5 * phi_kv,
        "decode_floor_s": 0.0 * f,
        "decode_roof_s": 0.0 * f,
        "decode_roof_base_s": 0.0 * f,
        "decode_tile_tok": 0.0 * f,
        "decode_power_w": law["decode_w"][0] + law["decode_w"][1] * g * v2,
        "decode_iter_j": law["batch_j"][0] + 0.0 * f,
        "decode_req_j": law["batch_j"][1] * v2,
        "decode_kv_j": law["batch_j"][2] * v2,
        "prefill_req_s": 0.0 * f,
        "prefill_base_s": 8.5e-3 + 0.0 * f,
        "prefill_tok_s": 1e-3 * 0.067 * (1310 / np.minimum(f, 1310)) ** 0.97,
        "prefill_tok2_s": 0.0 * f,
        "prefill_power_w": np.minimum(400.0, law["prefill_w"][0] + law["prefill_w"][1] * g * v2),
        "prefill_beside_w": 0.0 * f,
    }
    assert set(expected) == set(table.dtype.names)
    for column, values in expected.items():
        np.testing.assert_allclose(table[column], values, rtol=1e-12, err_msg=column)
    assert (profile.gpus, profile.idle_w, profile.power_cap_w) == (1, law["idle_w"], 400.0)
    assert (profile.kv_capacity_tok, profile.max_batch) == (450_000, 1024)
    assert profile.prefill_budget_tok == 8192
    assert (profile.kv_bytes_per_tok, profile.link_bytes_s) == (131072.0, 230e9)
    assert (profile.link_latency_s, profile.transfer_j_per_tok) == (1.4e-6, 0.0)
    assert profile.first_token == "prefill"
    padded = profile.padded_batch()
    assert padded[[1, 8, 9, 127, 128, 129, 161, 1024]].tolist() == [
        8, 8, 16, 128, 128, 160, 192, 1024,
    ]  # fmt: skip


def test_a800_steps_are_the_line_through_the_measured_law() -> None:
    """Least squares of the relative error over batches 1 to 128, as the file says."""
    clocks_mhz = np.array([210, 450, 690, 930, 1170, 1410])
    wide_us = np.array([1589, 954, 805, 579, 506, 494])
    launch_us = np.array([659, 392, 309, 220, 193, 184])
    per_req_us = np.array([3.8, 1.7, 0.8, 0.6, 0.3, 0.2])
    n = np.array([1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128])
    profile = load_profile("a800-sxm-80gb/qwen3-32b")
    rows = profile.table[np.searchsorted(profile.clocks_mhz, clocks_mhz)]
    for k, row in enumerate(rows):
        compute_us = 4.41 * n / (clocks_mhz[k] / 1e3)
        ffn_us = (wide_us[k] ** 5.8 + compute_us**5.8) ** (1 / 5.8) + 0.38 * n
        law_s = 64e-6 * (ffn_us + launch_us[k] + per_req_us[k] * n)
        line, *_ = np.linalg.lstsq(
            np.column_stack([1 / law_s, n / law_s]), np.ones(len(n)), rcond=None
        )
        assert row["decode_base_s"] == pytest.approx(line[0], rel=1e-3)
        assert row["decode_req_s"] == pytest.approx(line[1], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_physical(name: str) -> None:
    profile = load_profile(name)
    table = profile.table
    assert profile.name == name
    for column in ("base_s", "req_s", "kv_s"):
        assert np.all(np.diff(table[f"decode_{column}"]) <= 0), column
    for column in ("prefill_base_s", "prefill_tok_s", "prefill_tok2_s"):
        assert np.all(np.diff(table[column]) <= 0), column
    for column in ("decode_power_w", "prefill_power_w"):
        assert np.all(np.diff(table[column]) >= 0), column
        assert profile.idle_w < table[column][0]
        assert table[column][-1] <= profile.power_cap_w
    decode_w = (
        table["decode_power_w"]
        + table["decode_iter_j"] / table["decode_base_s"]
    )  # fmt: skip
    assert np.all(decode_w < profile.power_cap_w)


@pytest.mark.parametrize("name", NAMES)
def test_every_group_says_where_it_comes_from(name: str) -> None:
    profile = load_profile(name)
    groups = {
        "decode_time", "decode_energy", "prefill_time", "prefill_power", "power", "memory",
        "transfer",
    }  # fmt: skip
    assert groups <= set(profile.sources) <= groups | {
        "parking", "clock_change", "server", "band",
    }  # fmt: skip
    for group, entry in profile.sources.items():
        assert entry["source"], group
        assert entry["error"], group
    if name.startswith("h100"):
        assert profile.status == "extrapolated"


def test_seven_profiles_ship() -> None:
    assert (
        "a100-sxm-80gb/llama-3-70b-tp4",
        "a100-sxm-80gb/llama-3.1-8b",
        REFERENCE,
        "a800-sxm-80gb/qwen3-32b",
        "h100-sxm-80gb/llama-3.1-70b-tp4",
        "h100-sxm-80gb/llama-3.1-8b",
        "l20/qwen2.5-7b",
    ) == NAMES


def test_own_file_is_read_by_path(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(reference_text().replace('status = "scaled"', 'status = "measured"'))
    mine = load_profile(path)
    assert mine.status == "measured"
    np.testing.assert_array_equal(mine.table, load_profile(REFERENCE).table)


def test_ladder_may_be_a_list(tmp_path) -> None:
    ladder = "clocks = { min_mhz = 210, max_mhz = 1410, step_mhz = 15 }"
    path = tmp_path / "mine.toml"
    path.write_text(reference_text().replace(ladder, "clocks = [210, 1005, 1410]"))
    reference = load_profile(REFERENCE)
    np.testing.assert_array_equal(load_profile(path).table, reference.table[[0, 53, 80]])


def test_the_weakest_group_gives_the_status(tmp_path) -> None:
    text = reference_text().replace('status = "scaled"', 'status = "fitted"', 1)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_profile(path).status == "scaled"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'h100-sxm-80gb/llama-3\.1-8b'"):
        load_profile("h100-sxm/llama-3.1-8b")
    with pytest.raises(ConfigError, match=r"expected one of a100.*got 'xyz'.*name a \.toml file"):
        load_profile("xyz")
    with pytest.raises(ConfigError, match=r"got '\.\./data'"):
        load_profile("../data")


SPOILT = {
    "unknown key 'decode_time.base_ms'; did you mean 'base_s'": ("base_s = [", "base_ms = ["),
    "missing key 'power.idle_w'": ("idle_w = 60.0\n", ""),
    "unknown key 'colour'": ("gpus = 1\n", 'gpus = 1\ncolour = "red"\n'),
    "expected one of measured, fitted": ('status = "scaled"', 'status = "guessed"'),
    "decode_time.base_s: expected a shape of": ('shape = "weights"', 'shape = "weihgts"'),
    "decode_time.base_s: expected a finite number, got nan": ("value = 10.9e-3", "value = nan"),
    "prefill_time.base_s: expected a finite number, got 'fast'": (
        "base_s = 8.5e-3",
        'base_s = "fast"',
    ),
    "unknown key 'decode_time.base_s.scale'": ('shape = "weights" }', 'scale = "weights" }'),
    "shapes.weights: expected ascending clock_mhz": ("[210, 450, 690,", "[210, 690, 450,"),
    "shapes.weights.form: expected one of points": ('form = "points"', 'form = "spline"'),
    "clocks: expected 0 < min_mhz": ("step_mhz = 15", "step_mhz = 0"),
    "power.power_cap_w: expected a number > 0": ("power_cap_w = 400.0", "power_cap_w = -1.0"),
    "memory.batch_steps: expected pairs": ("[[128, 8], [1024, 32]]", "[128, 8]"),
    "expected finite numbers >= 0": ("value = 57.0", "value = -570.0"),
    "kv_capacity_tok: expected a whole number": ("= 450000", "= 450000.5"),
    "first_token": ('first_token = "prefill"', 'first_token = "never"'),
    "expected TOML": ("[decode_time]", "[decode_time"),
}


@pytest.mark.parametrize("message", SPOILT)
def test_a_file_that_does_not_fit_is_refused(tmp_path, message: str) -> None:
    text = reference_text()
    old, new = SPOILT[message]
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises((ConfigError, ShapeError)) as caught:
        load_profile(path)
    assert message.replace("\\", "") in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("decode_time", "base_s", [3.0]),
        ("shapes", "weights", "flat"),
        ("decode_energy", "power_w", [{"shape": "dynamic"}]),
    ],
)
def test_wrong_types_inside_are_named(section: str, key: str, value: object) -> None:
    from voltana_ctrl.profiles.format import profile_from_laws

    laws = tomllib.loads(reference_text())
    laws[section][key] = value
    with pytest.raises(ConfigError, match=rf"{section}\.{key}"):
        profile_from_laws(laws)


def test_missing_file_is_a_config_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_profile(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("names", "slow"),
    [
        (["@10", "@10"], 10.0), (["@20", "@10"], 10.0), (["", "@10"], 1.0), (["", ""], 1.0),
        (["@0.5", "@0.5"], 1.0),
    ],
)  # fmt: skip
def test_how_slow_a_fleet_is_stands_in_the_names_of_its_profiles(names, slow):
    from voltana_ctrl import FleetSpec, InstanceSpec, Role
    from voltana_ctrl.profiles import dilation_of

    profiles = [load_profile(f"a100-sxm-80gb/llama-3.1-8b{name}") for name in names]
    fleet = FleetSpec(tuple(
        InstanceSpec(id=f"c{i}", role=Role.COLOCATED, profile=one) for i, one in enumerate(profiles)
    ))  # fmt: skip
    assert dilation_of(fleet) == slow


def test_a_name_in_a_file_makes_no_fleet_slow(tmp_path):
    """How long orders hold goes by it."""
    from importlib.resources import files

    data = files("voltana_ctrl.profiles") / "data" / "a100-sxm-80gb" / "llama-3.1-8b.toml"
    text, path = data.read_text("utf-8"), tmp_path / "own.toml"
    name = 'name = "a100-sxm-80gb/llama-3.1-8b'
    assert text.count(f'{name}"') == 1
    path.write_text(text.replace(f'{name}"', f'{name}@8192"'))
    with pytest.raises(ConfigError, match="expected one without a number behind an @"):
        load_profile(path)
