"""The tables of the validation pages are what their command makes."""

import importlib
import sys

import pytest


@pytest.fixture
def page(root, monkeypatch):
    if not (root / "bench" / "validation").is_dir():
        pytest.skip("bench/ is not part of the source distribution")
    monkeypatch.syspath_prepend(str(root))
    yield lambda name: importlib.import_module(f"bench.validation.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        del sys.modules[name]


#: Tables of what controllers do, which learn more often than the plant does: five units apart.
OF_CONTROLLERS = ("l20-control", "l20-headline", "refit-headline")


def compare(page, root, stem, made):
    text = (root / "docs" / "validation" / f"{stem}.md").read_text(encoding="utf-8")
    kept = page("page").tables_of(text)
    for name, rows in made.items():
        units = 5 if name in OF_CONTROLLERS else 1
        unlike = page("page").unlike(kept[name], rows, units)
        assert unlike == [], f"run python -m bench.validation {stem}"


def test_l20(page, root):
    l20 = page("l20")
    believed = l20.load_profile(l20.NAME)
    made = {"l20-boost": l20.boost_table(believed), "l20-ratio": l20.ratio_table(believed)}
    made["l20-static"] = l20.static_table(believed)
    made["l20-dynamic"] = l20.dynamic_table(believed)
    compare(page, root, "l20", made)


def test_l20_is_predicted(page):
    """Rows that were not fitted: watts within 7 %, TPOT within 15 %; the ratio within 0.05.

    Not the TPOT of rows whose iterations have more than 128 tokens or whose long prompts wait in
    turn, nor the watts of four rows, nor where prompts draw nothing beside decoding a ratio more
    than 0.04 off (docs/validation/l20.md).
    """
    l20 = page("l20")
    believed = l20.load_profile(l20.NAME)
    full = {("alpaca", "5C"), ("alpaca", "3C", 71.98), ("sharegpt", "3C", 13.117)}
    full |= {("alpaca", "3C", 89.94), ("longbench", "3C", 2.416), ("longbench", "3C", 3.798)}
    far = {("alpaca", 53.95): 0.10, ("alpaca", 89.94): 0.20}
    for row in l20.FACTS["static"]["rows"]:
        (watts, _, tpot, _), power_w, tpot_ms = l20.served_static(believed, row), row[5], row[7]
        within = far.get((row[0], row[1]), 0.07) if row[2] == "3C" else 0.07
        assert watts == pytest.approx(power_w, rel=within), row
        if tpot_ms and not full & {(row[0], row[2]), (row[0], row[2], row[1])}:
            assert tpot == pytest.approx(tpot_ms, rel=0.15), row
    for row in l20.FACTS["dynamic"]["rows"]:
        watts, _, tpot, _ = l20.served_dynamic(believed, row)
        outside = row[-1] == "DynamoLLM port" and row[1] in (1.483, 3.108)
        assert watts == pytest.approx(row[7], rel=0.11 if outside else 0.07), row
        assert tpot == pytest.approx(row[9], rel=0.15), row
    for row in l20.best_static():
        measured = row[5] / l20.boost_rows()[row[0], row[1], "8C"][0]
        for one, near in ((believed, 0.05), (l20.without_beside(believed), 0.04)):
            all_on_w = l20.served(one, row[0], row[1], "8C")[0]
            assert l20.served_static(one, row)[0] / all_on_w == pytest.approx(measured, abs=near)


def test_l20_clocks_follow_from_the_published_means(page):
    """A parked GPU counts 210 MHz in the mean of all eight."""
    fleet = page("l20_fleet")
    for on, mean_mhz, own_mhz in ((5, 1391, 2100), (5, 1204, 1800)):
        assert (8 * mean_mhz - (8 - on) * fleet.PARKED_MHZ) / on == pytest.approx(own_mhz, abs=1.0)
    (boost_s, _, _), (_, on, low_mhz) = fleet.states(5, 0, 0, 0.67, 1443.0)
    share = boost_s / 300.0
    assert (8 * share + on * (1 - share)) / 8 == pytest.approx(0.67)
    lower_mhz = (on * low_mhz + (8 - on) * fleet.PARKED_MHZ) / 8
    assert share * 2520 + (1 - share) * lower_mhz == pytest.approx(1443.0)
    turns = fleet.states(8, 900, 19, 1.0, 2041.0)
    assert sum(length_s for length_s, *_ in turns) >= fleet.SPAN_S
    mean_mhz = sum(length_s * mhz for length_s, _, mhz in turns[:2]) / sum(
        length_s for length_s, *_ in turns[:2]
    )
    assert mean_mhz == pytest.approx(2041.0)


def test_l20_profile_is_what_the_fit_makes(page, root):
    """Two numbers, fitted to the rows at boost alone."""
    l20 = page("l20")
    (held, token), sd = l20.fit()
    text = l20.profile_text(held, token, sd)
    path = root / "voltana_ctrl" / "profiles" / "data" / "l20" / "qwen2.5-7b.toml"
    shipped = path.read_text(encoding="utf-8")
    assert page("page").unlike(text.splitlines(), shipped.splitlines()) == []


def test_points(page, root):
    compare(page, root, "points", page("points").tables())


@pytest.mark.slow
def test_sources(page, root, shared_data):
    """Every public table: held-out errors, coverage, and what no profile was made from."""
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    sources = page("sources")
    assert shared_data == sources.DATA
    compare(page, root, "sources", sources.tables())


@pytest.mark.slow
def test_refit(page, root):
    compare(page, root, "refit", page("refit").tables())


@pytest.mark.slow
def test_l20_control(page, root):
    l20 = page("l20")
    believed = l20.load_profile(l20.NAME)
    made = {"l20-control": l20.control_table(believed), "l20-within": l20.within_table(believed)}
    made["l20-further"] = l20.boost_table(believed, "further")
    made["l20-headline"] = l20.headline_table()
    compare(page, root, "l20", made)
