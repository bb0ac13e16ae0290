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


def compare(page, root, stem, made):
    text = (root / "docs" / "validation" / f"{stem}.md").read_text(encoding="utf-8")
    kept = page("page").tables_of(text)
    for name, rows in made.items():
        assert page("page").unlike(kept[name], rows) == [], f"run python -m bench.validation {stem}"


def test_l20(page, root):
    l20 = page("l20")
    believed = l20.load_profile(l20.NAME)
    made = {"l20-boost": l20.boost_table(believed), "l20-ratio": l20.ratio_table(believed)}
    made["l20-controlled"] = l20.controlled_table(believed)
    compare(page, root, "l20", made)


def test_l20_is_predicted(page):
    """Rows that were not fitted: watts within 7 %, TPOT within 15 %; the ratio within 0.04.

    On ShareGPT TPOT is 15.1 % high, as its clock is a mean that was higher while prompts were
    there (docs/validation/l20.md).
    """
    l20 = page("l20")
    believed = l20.load_profile(l20.NAME)
    boost_w = {tuple(row[:3]): row[3] for row in l20.FACTS["boost"]["rows"]}
    for data, rate, on, mhz, power_w, _, tpot_ms, _ in l20.FACTS["controlled"]["rows"][:2]:
        watts, _, tpot, _ = l20.served(believed, data, rate, "8C", on, mhz)
        assert watts == pytest.approx(power_w, rel=0.07)
        assert tpot == pytest.approx(tpot_ms, rel={"sharegpt": 0.16, "alpaca": 0.15}[data])
        all_on = l20.served(believed, data, rate, "8C")[0]
        measured = power_w / boost_w[data, rate, "8C"]
        assert watts / all_on == pytest.approx(measured, abs=0.04)


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
    compare(page, root, "l20", {"l20-control": l20.control_table(l20.load_profile(l20.NAME))})
