"""Reports: what they draw and print is what the comparison says."""

import json
import re
import sys
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest

from voltana_ctrl import ConfigError, ShapeError, cli, compare, load_profile
from voltana_ctrl.report import Study, check_plot, write_html, write_plot
from voltana_ctrl.report.canvas import new_canvas, style
from voltana_ctrl.report.figures import FIGURES
from voltana_ctrl.report.page import render
from voltana_ctrl.report.palette import DARK, INK, PARTS, POLICY_COLOURS, REFERENCE_COLOUR, looks
from voltana_ctrl.sim.detail import RunDetail
from voltana_ctrl.types import PowerBudget

SHORT = {"duration_s": 20.0, "warmup_s": 5.0}
TIMING = ("sim_wall_s", "decide_p50_s", "decide_p99_s")
POLICIES = ("static-max", "voltanallm", "voltanallm-full-ladder", "bound")
BY_NAME = {figure.name: figure for figure in FIGURES}


@pytest.fixture(scope="module")
def result():
    return compare(
        rates_req_s=[10.0, 70.0], seeds=2, policies=POLICIES, detail=True, **SHORT,
        power_budget=PowerBudget.parse("0:1500,15:1200"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(result):
    return result.to_study()


@pytest.fixture(scope="module")
def page(study):
    return render(study)


def drawn(study, name, load=None):
    """Axes of a figure, laid out but not rendered."""
    with style():
        canvas = new_canvas((7.2, 5.0))
        BY_NAME[name].draw(canvas, study, study.loads[0] if load is None else load)
    return canvas.axes


def runs_of(study, policy, load):
    return [r for r in study.all_runs if r["policy"] == policy and r["rate_req_s"] == load]


# Details of a run


def test_detail_adds_up_to_the_figures(result):
    for run, detail in zip(result.runs, result.details, strict=True):
        if run["policy"] == "bound":
            assert detail is None
            continue
        length_s = np.diff(detail.edge_s)
        assert detail.edge_s[[0, -1]] == pytest.approx([5.0, 25.0])
        assert detail.power_w.sum(axis=1) @ length_s == pytest.approx(run["energy_j"], rel=1e-9)
        for phase in ("prefill", "decode"):
            clock_mhz = detail.freq_mhz[:, getattr(detail, phase)]
            mean_mhz = run[f"mean_freq_{phase}_mhz"]
            assert np.nanmin(clock_mhz) - 1e-6 <= mean_mhz <= np.nanmax(clock_mhz) + 1e-6
        batch_req = detail.batch_req[:, detail.decode]
        assert np.nanmin(batch_req) <= run["mean_batch"] <= np.nanmax(batch_req)
        assert np.isnan(detail.batch_req[:, detail.prefill]).all()


def test_distributions_pass_through_the_quantiles_and_attainments(result):
    for run, detail in zip(result.runs, result.details, strict=True):
        if detail is None:
            continue
        share = detail.quantile_frac
        assert np.all(np.diff(detail.ttft_s) >= 0.0)
        p50_s = np.interp(0.5, share, detail.ttft_s)
        assert p50_s == pytest.approx(run["ttft_p50_s"], rel=0.05)
        for name, objective_s in (("ttft", 0.6), ("itl", 0.06)):
            below = np.searchsorted(getattr(detail, f"{name}_s"), objective_s, side="right")
            low = share[below - 1] if below else 0.0
            high = share[below] if below < len(share) else 1.0
            assert low - 1e-9 <= run[f"{name}_attainment"] <= high + 1e-9


def test_detail_changes_no_figure(result):
    plain = compare(
        rates_req_s=[10.0, 70.0], seeds=2, policies=POLICIES, **SHORT,
        power_budget=PowerBudget.parse("0:1500,15:1200"),
    )  # fmt: skip
    assert plain.details == ()
    for one, other in zip(plain.runs, result.runs, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - set(TIMING):
            same = one[key] if isinstance(one[key], str | None) else pytest.approx(one[key], 1e-9)
            assert other[key] == same, key


def test_a_controller_is_recorded_without_being_disturbed(tmp_path, monkeypatch):
    (tmp_path / "swinging.py").write_text(
        "from voltana_ctrl import Decision\n"
        "class Swing:\n"
        "    period_s = 0.5\n"
        "    def __init__(self, fleet, slo): self.fleet = fleet\n"
        "    def init(self): return 0\n"
        "    def decide(self, observation, memory):\n"
        "        mhz = (900.0, 1305.0)[memory // 10 % 2]\n"
        "        floor = [mhz] * len(self.fleet)\n"
        "        return Decision.highest(self.fleet, floor_mhz=floor), memory + 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    same = {"rates_req_s": [10.0], "policies": ["swinging:Swing"], **SHORT}
    plain, kept = compare(**same), compare(**same, detail=True)
    for key in set(plain.runs[0]) - set(TIMING):
        if isinstance(plain.runs[0][key], float):
            assert kept.runs[0][key] == pytest.approx(plain.runs[0][key], rel=1e-9), key
    (detail,) = kept.details
    assert detail.power_w.sum(axis=1) @ np.diff(detail.edge_s) == pytest.approx(
        kept.runs[0]["energy_j"], rel=1e-9
    )
    decode_mhz = detail.freq_mhz[:, detail.decode]
    assert np.nanmin(decode_mhz) == pytest.approx(900.0)
    assert np.nanmax(decode_mhz) > 1200.0


def test_detail_refuses_what_does_not_fit():
    fits = {
        "edge_s": [0.0, 1.0], "freq_mhz": [[900.0]], "batch_req": [[4.0]], "power_w": [[250.0]],
        "prefill": [0], "decode": [0], "quantile_frac": [0.5], "ttft_s": [0.1], "itl_s": [0.02],
    }  # fmt: skip
    RunDetail(**fits)
    for wrong in ({"edge_s": [0.0]}, {"power_w": [[1.0, 2.0]]}, {"ttft_s": [0.1, 0.2]}):
        with pytest.raises(ShapeError, match="expected"):
            RunDetail(**fits | wrong)
    with pytest.raises(ShapeError, match="one per run"):
        Study(comparison={"runs": []}, details=(None,))


# Means


def test_study_groups_as_a_loop_would(study):
    assert study.policies == POLICIES
    assert study.loads == (10.0, 70.0)
    for load in study.loads:
        full_w = np.mean([r["mean_power_w"] for r in runs_of(study, "static-max", load)])
        bound_w = np.mean([r["mean_power_w"] for r in runs_of(study, "bound", load)])
        keeping = {}
        for policy in POLICIES:
            runs = runs_of(study, policy, load)
            power_w = np.mean([r["mean_power_w"] for r in runs])
            saving = 1 - power_w / full_w
            if policy != "bound":  # which serves no tokens
                own_j, full_j = (
                    np.mean([r["energy_per_token_j"] for r in runs_of(study, name, load)])
                    for name in (policy, "static-max")
                )
                saving = 1 - own_j / full_j
            assert study.saving_frac(policy, load) == pytest.approx(saving)
            assert study.above_bound_frac(policy, load) == pytest.approx(power_w / bound_w - 1)
            if policy == "bound":
                assert study.meets_slo(policy, load) is None
                continue
            met = all(
                np.mean([r[f"{part}_attainment"] for r in runs]) >= 0.99 for part in ("ttft", "itl")
            )
            assert study.meets_slo(policy, load) == met
            if met:
                keeping[policy] = power_w
        assert study.cheapest(load) == min(keeping, key=keeping.get)
    assert study.meets_slo("voltanallm-full-ladder", 70.0) is False


# Figures


def test_curves_show_the_json(study):
    power, distance, ttft, itl = drawn(study, "loads")
    for axis, key in ((power, "mean_power_w"), (ttft, "ttft_attainment"), (itl, "itl_attainment")):
        lines = {line.get_label(): line for line in axis.lines}
        for policy in POLICIES:
            if runs_of(study, policy, 10.0)[0][key] is None:
                assert policy not in lines
                continue
            means = [np.mean([r[key] for r in runs_of(study, policy, x)]) for x in study.loads]
            assert lines[policy].get_xdata() == pytest.approx(study.loads)
            assert lines[policy].get_ydata() == pytest.approx(means)
    zero = next(line for line in distance.lines if line.get_label() == "bound")
    assert zero.get_ydata() == pytest.approx([0.0, 0.0], abs=1e-9)


def test_hollow_marks_stand_where_the_slo_is_missed(study):
    power = drawn(study, "loads")[0]
    look = looks(study.policies)
    marks = {
        (line.get_color(), float(line.get_xdata()[0])): line.get_markerfacecolor()
        for line in power.lines
        if line.get_linestyle() == "None"
    }
    seen = set()
    for policy in POLICIES[:-1]:
        for load in study.loads:
            filled = marks[look[policy].colour, load] == look[policy].colour
            assert filled == study.meets_slo(policy, load)
            seen.add(filled)
    assert seen == {True, False}


def test_bars_add_up_to_mean_power(study):
    axes = drawn(study, "energy")
    for axis, load in zip(axes, study.loads, strict=True):
        ends_w = {bar.get_y(): 0.0 for bar in axis.patches}
        for bar in axis.patches:
            ends_w[bar.get_y()] = max(ends_w[bar.get_y()], bar.get_x() + bar.get_width())
        means_w = [
            np.mean([r["mean_power_w"] for r in runs_of(study, policy, load)])
            for policy in POLICIES
        ]
        assert [ends_w[y] for y in sorted(ends_w)] == pytest.approx(means_w)


def test_latency_curves_cross_the_objective_at_the_attainment(study):
    for axis, name, objective in zip(
        drawn(study, "latency", 70.0), ("ttft", "itl"), (0.6, 60.0), strict=True
    ):
        lines = {line.get_label(): line for line in axis.lines}
        for policy in POLICIES[:-1]:
            x, y = lines[policy].get_data()
            inside = x <= objective * (1 + 1e-12)
            share = y[inside][-1] if inside.any() else 0.0
            met = np.mean([r[f"{name}_attainment"] for r in runs_of(study, policy, 70.0)])
            # The curve is known at 300 shares.
            assert share == pytest.approx(met, abs=0.012)


def test_objectives_are_drawn(study):
    _, _, *attainment = drawn(study, "loads")
    for axis in attainment:
        (line,) = [line for line in axis.lines if line.get_label() == "objective"]
        assert line.get_ydata() == pytest.approx([0.99, 0.99])
    for axis, objective in zip(drawn(study, "latency"), (0.6, 60.0), strict=True):
        across, up = [line for line in axis.lines if line.get_label() == "objective"]
        assert across.get_ydata() == pytest.approx([0.99, 0.99])
        assert up.get_xdata() == pytest.approx([objective, objective])


def test_the_power_budget_is_drawn_over_time(study):
    axes = drawn(study, "time", 70.0)
    columns = len(POLICIES) - 1
    for axis in axes[-columns:]:
        (line,) = [line for line in axis.lines if line.get_label() == "budget"]
        assert line.get_xdata() == pytest.approx([0.0, 15.0, 25.0])
        assert line.get_ydata() == pytest.approx([1500.0, 1200.0, 1200.0])


@pytest.mark.parametrize("name", BY_NAME)
def test_every_axis_says_its_unit(study, name):
    axes = drawn(study, name)
    grid = axes[0].get_gridspec()
    for axis in axes:
        where = axis.get_subplotspec()
        ticks_below = where.is_last_row() or name == "latency"
        if ticks_below:
            assert "[" in axis.get_xlabel(), name
        shared = name in ("time", "energy") and not where.is_first_col()
        if not shared and name != "energy":  # there the names of policies stand
            assert "[" in axis.get_ylabel(), name
    assert grid.nrows * grid.ncols >= len(axes)


def without(study, **changed):
    """The same study with other runs, without details."""
    return Study(comparison={**study.comparison, **changed}, profiles=study.profiles)


@pytest.mark.parametrize("case", ["closed loop", "one policy", "only the bound", "nothing served"])
def test_odd_comparisons_are_drawn(study, case):
    first = [r for r in study.all_runs if r["rate_req_s"] == 10.0]
    odd = {
        "closed loop": [{**r, "rate_req_s": None} for r in first if r["policy"] != "bound"],
        "one policy": [r for r in study.all_runs if r["policy"] == "voltanallm"],
        "only the bound": [r for r in first if r["policy"] == "bound"],
        "nothing served": [
            {key: value if key in ("policy", "rate_req_s", "seed", "window_s") else None
             for key, value in r.items()}
            for r in first
        ],
    }[case]  # fmt: skip
    odd_study = without(study, runs=odd)
    assert len(drawn(odd_study, "loads")) == 4
    assert len(drawn(odd_study, "energy")) >= 1
    assert (odd_study.cheapest(odd_study.loads[0]) is None) == (
        case in ("only the bound", "nothing served")
    )
    if case == "closed loop":
        keeping = [p for p in POLICIES[:-1] if odd_study.meets_slo(p, None)]
        j_tok = {p: odd_study.mean(p, None, "energy_per_token_j") for p in keeping}
        assert odd_study.cheapest(None) == min(j_tok, key=j_tok.get)


def test_many_policies_with_long_names_look_different(study):
    names = [f"package.module:Policy{k}" for k in range(14)]
    one = runs_of(study, "voltanallm", 10.0)[0]
    look = looks(tuple(names))
    assert len({(each.colour, each.marker, each.dashes) for each in look.values()}) == 14
    assert drawn(without(study, runs=[{**one, "policy": name} for name in names]), "loads")


def test_names_are_taken_as_they_are(study):
    hostile = 'a$x^2$:<script>alert("1")</script>&'
    runs = [{**r, "policy": hostile} for r in runs_of(study, "voltanallm", 10.0)]
    text = render(without(study, runs=runs, workload="</script><b>$trace$.csv"))
    assert "<script>alert" not in text
    assert "<b>$trace" not in text
    read = read_page(text)
    assert read.data["runs"][0]["policy"] == hostile
    assert read.data["workload"] == "</script><b>$trace$.csv"


# Colour


MACHADO = {  # Machado, Oliveira, Fernandes 2009, table 1, severity 1.0, linear RGB
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
    "normal": np.eye(3),
}  # fmt: skip


def linear_rgb(colour):
    value = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0.0, 1.0) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours, vision):
    """Smallest CIELAB distance between two of the colours; about 2.3 is just noticeable."""
    seen = [lab(np.array(MACHADO[vision]) @ linear_rgb(colour)) for colour in colours]
    return min(np.linalg.norm(a - b) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("vision", MACHADO)
@pytest.mark.parametrize("ground", ["light", "dark"])
@pytest.mark.parametrize("kind", ["policies", "parts"])
def test_colours_are_told_apart_with_any_colour_vision(kind, ground, vision):
    colours = {
        "policies": [*POLICY_COLOURS, REFERENCE_COLOUR, INK],
        "parts": list(PARTS.values()),
    }[kind]
    if ground == "dark":
        colours = [DARK.get(colour, colour) for colour in colours]
    assert closest(colours, vision) > 10.0


def test_the_colour_check_sees_red_and_green():
    assert closest(["#cc4444", "#7d7d33"], "normal") > 40.0
    assert closest(["#cc4444", "#7d7d33"], "deutan") < 20.0


# The page


class ReadPage(HTMLParser):
    """Tables by id with (text, full value) cells, ids, figures, what would be fetched."""

    def __init__(self):
        super().__init__()
        self.tables, self.ids, self.figures, self.fetched, self.refs = {}, [], [], [], []
        self.alerts, self.data, self._table, self._cell, self._json = 0, None, None, None, False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "svg":
            self.figures.append(attrs.get("aria-label"))
        if tag == "table":
            self._table = self.tables.setdefault(attrs["id"], [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._cell = ["", attrs.get("data-value")]
            self._table[-1].append(self._cell)
        self.alerts += attrs.get("role") == "alert"
        self._json = tag == "script"
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            target = attrs.get(name, "#")
            (self.refs if target.startswith("#") else self.fetched).append(target)

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[0] += data
        if self._json and data.strip():
            self.data, self._json = json.loads(data), False


def read_page(text):
    page = ReadPage()
    page.feed(text)
    return page


def check_numbers(page, comparison):
    """Every figure of every run stands in the page, in full and as it is shown."""
    assert page.data == comparison
    head, *rows = page.tables["runs"]
    keys = [text for text, _ in head]
    assert len(rows) == len(comparison["runs"])
    for row, run in zip(rows, comparison["runs"], strict=True):
        assert set(keys) == set(run)
        for key, (shown, full) in zip(keys, row, strict=True):
            value = run[key]
            if value is None:
                assert (shown, full) == ("-", None)
                continue
            assert json.loads(full) == value
            if isinstance(value, float):
                assert float(shown) == pytest.approx(value, rel=1e-5, abs=1e-12)
            else:
                assert shown == str(value)
    assert len(rows) > 0


def test_the_page_holds_the_numbers_of_the_json(page, result):
    check_numbers(read_page(page), json.loads(json.dumps(result.to_dict())))


def test_the_summary_holds_means_over_seeds(page, study):
    head, *rows = read_page(page).tables["summary"]
    columns = [text for text, _ in head]
    assert {"power [W]", "TTFT met [%]", "over budget [%]"} <= set(columns)
    assert len(rows) == len(POLICIES) * 2
    for row in rows:
        load = float(row[0][0].removesuffix(" req/s"))
        policy = row[1][0].removesuffix(" *")
        runs = runs_of(study, policy, load)
        for label, key, scale in (
            ("power [W]", "mean_power_w", 1.0),
            ("TTFT met [%]", "ttft_attainment", 100.0),
            ("ITL p99 [ms]", "itl_p99_s", 1e3),
        ):
            shown, full = row[columns.index(label)]
            if runs[0][key] is None:
                assert (shown, full) == ("-", None)
                continue
            mean = np.mean([r[key] for r in runs])
            assert float(full) == pytest.approx(mean)
            assert float(shown) == pytest.approx(mean * scale, rel=1e-2)


def test_the_page_needs_nothing_but_itself(page):
    read = read_page(page)
    assert [one for one in read.fetched if not one.startswith("data:")] == []
    assert "url(http" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = read_page(page).ids
    assert len(set(ids)) == len(ids)
    refs = {ref[1:] for ref in read_page(page).refs if ref != "#"}
    assert refs
    assert refs <= set(ids)


def test_the_page_shows_every_figure_and_says_simulated(page):
    figures = read_page(page).figures
    titles = [FIGURES[0].title, FIGURES[1].title]
    for load in ("10 req/s", "70 req/s"):
        titles += [f"{FIGURES[2].title}, {load}", f"{FIGURES[3].title}, {load}"]
    assert figures == [f"{title} (simulated)" for title in titles]
    assert "none was\nmeasured on hardware" in page


def test_colours_of_the_page_follow_its_ground(page):
    drawings = page[page.index("<svg") : page.rindex("</svg>")]
    for colour in DARK:
        assert f"--c{colour[1:]}:" in page
        assert f": {colour}" not in drawings


def test_an_extrapolated_profile_warns(study, page):
    extrapolated = load_profile("h100-sxm-80gb/llama-3.1-8b")
    assert extrapolated.status == "extrapolated"
    runs = [r for r in study.all_runs if r["policy"] == "bound"]
    odd = Study(comparison={**study.comparison, "runs": runs}, profiles=(extrapolated,))
    text = render(odd)
    assert read_page(text).alerts == 1
    assert "Do not take absolute watts" in text
    assert read_page(page).alerts == 0
    assert f"{study.profiles[0].name} is {study.profiles[0].status}." in " ".join(page.split())


# Files


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_plots_are_files_of_their_kind(study, tmp_path, suffix, magic):
    path = tmp_path / f"out{suffix}"
    write_plot(study, path, ["latency"])
    assert path.read_bytes().startswith(magic)


def test_the_same_numbers_give_the_same_file(study, tmp_path):
    for name in ("a.svg", "b.svg"):
        write_plot(study, tmp_path / name, ["latency"])
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "Simulated: 2P2D" in text
    assert "profile scaled" in text


def test_what_cannot_be_drawn_is_refused(study, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg, \.pdf, got 'out\.gif'"):
        check_plot("out.gif")
    with pytest.raises(ConfigError, match="expected some of loads, energy, time, latency"):
        check_plot("out.png", ["power"])
    with pytest.raises(ConfigError, match="detail=True"):
        write_plot(without(study), tmp_path / "out.png", ["time"])
    with pytest.raises(ConfigError, match="cannot be written"):
        write_plot(study, tmp_path / "no" / "out.png", ["latency"])
    runs = [r for r in study.all_runs if r["policy"] == "bound"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_html(without(study, runs=runs), tmp_path / "no" / "out.html")


def test_without_matplotlib_the_extra_is_named(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for refused in (
        lambda: check_plot("out.png"),
        lambda: write_plot(study, tmp_path / "out.png"),
        lambda: write_html(study, tmp_path / "out.html"),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'voltana-ctrl\[report\]'"):
            refused()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--html out.html --json out.json", "pip install 'voltana-ctrl[report]'"),
        ("--plot out.gif", "plot: expected a file that ends in"),
        ("--plot out.png --figures power", "figures: expected some of"),
        ("--html no/such/out.html", "html: folder"),
    ],
)
def test_the_command_refuses_before_anything_runs(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds to it
    monkeypatch.setattr(sys, "argv", ["voltana-ctrl", "compare", *options.split()])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("voltana_ctrl.experiment.compare", lambda **_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_readme_shows_a_figure_and_names_its_command(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"!\[[^]]+\]\((docs/figures/[^)]+)\)", text)
    assert (root / shown).read_bytes().startswith(b"\x89PNG")
    assert (root / shown).stat().st_size < 200_000
    (command,) = re.findall(rf"^    voltana-ctrl (compare .*--plot {shown} .*)$", text, re.M)
    names = command.split("--figures ")[1].split(",")
    check_plot(shown, names)


def test_the_table_says_how_well_the_profile_is_known_and_where_nobody_keeps_the_slo():
    from rich.console import Console

    from voltana_ctrl import compare
    from voltana_ctrl.report import print_table

    result = compare(
        rates_req_s=[5.0, 400.0], duration_s=10.0, warmup_s=2.0, policies=["static-max", "bound"]
    )
    console = Console(width=100)
    with console.capture() as captured:
        print_table(result.to_study(), console)
    assert "a100-sxm-80gb/llama-3.1-8b (scaled)" in captured.get()
    assert "No policy keeps the SLO at 400 req/s:" in captured.get()
