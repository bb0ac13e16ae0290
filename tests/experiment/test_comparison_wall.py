"""Power and saving at the wall: the GPUs', and what no policy changes."""

from dataclasses import replace

import pytest
from rich.console import Console

from voltana_ctrl import ConfigError, FleetSpec, compare, load_profile
from voltana_ctrl.report.page import render
from voltana_ctrl.report.terminal import print_table

SHORT = {
    "rates_req_s": [10.0],
    "duration_s": 20.0,
    "warmup_s": 5.0,
    "policies": ["static-max", "static-1005", "bound"],
}
DEFAULT_PROFILE = "a100-sxm-80gb/llama-3.1-8b"
WALL = ("wall_power_w", "wall_per_token_j", "saving_wall_frac")


@pytest.fixture(scope="module")
def plain():
    return compare(**SHORT)


@pytest.fixture(scope="module")
def walled():
    return compare(**SHORT, server_w=150.0)


def test_the_wall_adds_what_servers_draw_and_changes_nothing_else(plain, walled):
    full = walled.runs[0]
    for before, after in zip(plain.runs, walled.runs, strict=True):
        assert all(before[key] is None for key in WALL)
        others = {key: value for key, value in after.items() if key not in WALL}
        assert {k: v for k, v in others.items() if k != "sim_wall_s"} == {
            k: v for k, v in before.items() if k not in (*WALL, "sim_wall_s")
        }
        assert after["wall_power_w"] == pytest.approx(before["mean_power_w"] + 4 * 150.0)
        if after["policy"] == "bound":
            assert after["saving_wall_frac"] is None
            continue
        token_j = (before["energy_j"] + 4 * 150.0 * 20.0) / before["tokens_out"]
        assert after["wall_per_token_j"] == pytest.approx(token_j)
        saving_frac = 1.0 - token_j / full["wall_per_token_j"]
        assert after["saving_wall_frac"] == pytest.approx(saving_frac)
    assert 0.0 < walled.runs[1]["saving_wall_frac"] < walled.runs[1]["saving_token_frac"]


def test_profiles_and_fleet_files_say_it_per_instance(tmp_path, walled):
    profile = replace(load_profile(DEFAULT_PROFILE), rest_of_server_w=100.0)
    fleet = FleetSpec.parse("1P1D", profile)
    assert fleet.rest_of_server_w == 200.0
    path = tmp_path / "fleet.toml"
    path.write_text(
        f'[[instance]]\nrole = "colocated"\nprofile = "{DEFAULT_PROFILE}"\n'
        "rest_of_server_w = 130\ncount = 3\n"
    )
    assert FleetSpec.from_toml(path, load_profile).rest_of_server_w == 390.0
    assert FleetSpec.parse("2C", load_profile(DEFAULT_PROFILE)).rest_of_server_w == 0.0
    with pytest.raises(ConfigError, match=r"server_w.*-1"):
        compare(**SHORT, server_w=-1.0)


@pytest.mark.parametrize("width", [80, 200])
def test_table_and_page_show_it_where_it_is_known(plain, walled, width):
    shown = {}
    for name, found in (("plain", plain), ("walled", walled)):
        console = Console(width=width)
        with console.capture() as captured:
            print_table(found.to_study(), console)
        shown[name] = captured.get()
        assert max(map(len, shown[name].splitlines())) <= width
    assert "wall" not in shown["plain"].lower()
    run = walled.runs[1]
    row = next(line for line in shown["walled"].splitlines() if "static-1005" in line)
    assert f"{run['wall_power_w']:.0f} " in row
    assert f" {run['saving_wall_frac']:.1%}" in row
    if width == 80:
        assert "at the wall" in render(walled.to_study())
        assert "at the wall" not in render(plain.to_study())


def test_the_page_shows_the_intervals(plain):
    row = {
        "policy": "static-1005", "rate_req_s": 10.0, "draws": 20, "saving_p5_frac": 0.191,
        "saving_p50_frac": 0.233, "saving_p95_frac": 0.277, "kept_frac": 0.9,
        "below_frac": {"static-max": 1.0, "<other>": 0.85},
    }  # fmt: skip
    page = render(replace(plain, uncertainty=(row,)).to_study())
    assert "20 draws" in page
    for told in (">23.3<", ">19.1<", ">27.7<", ">90<", "&lt;other&gt; 85%"):
        assert told in page
    assert "<other>" not in page.partition("<script")[0]
    assert 'id="intervals"' not in render(plain.to_study())
