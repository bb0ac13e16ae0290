"""Cells of the breadth tables: that they go on where they stopped, and how they are judged."""

import importlib.util
import sys

import pytest


def loaded(root, monkeypatch, name):
    path = root / "bench" / f"{name}.py"
    if not path.exists():
        pytest.skip("bench/ is not part of the source distribution")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def matrix(root, monkeypatch):
    return loaded(root, monkeypatch, "matrix")


@pytest.fixture
def adversary(root, monkeypatch):
    return loaded(root, monkeypatch, "adversary")


def test_what_is_in_the_file_is_not_run_again(matrix, tmp_path, capsys):
    results = tmp_path / "results.csv"
    few = ["--cells=reference", "--loads=0.5", "--duration=10", "--policies=static-max,dualscale"]
    assert matrix.main([str(results), *few]) == 0
    rows = results.read_text()
    assert len(rows.splitlines()) == 3
    more = [*few[:-1], "--policies=static-max,dualscale,pack"]
    assert matrix.main([str(results), *more]) == 0
    assert results.read_text().startswith(rows)
    assert len(results.read_text().splitlines()) == 4
    capsys.readouterr()
    assert matrix.main([str(results), "--table"]) == 0
    assert "| reference | 50 % |" in capsys.readouterr().out


def test_a_twin_with_noise_meets_the_same_loads_and_stands_beside_the_others(
    matrix, tmp_path, capsys
):
    plain, noisy = tmp_path / "plain.csv", tmp_path / "noisy.csv"
    few = ["--cells=reference", "--loads=0.5", "--duration=10", "--policies=dualscale,mpc"]
    assert matrix.main([str(plain), *few]) == 0
    assert matrix.main([str(noisy), *few, "--jitter=0.2"]) == 0
    (_, ours), (_, twin) = (matrix.read_rows(path) for path in (plain, noisy))
    assert (twin["rate_req_s"], twin["requests"]) == (ours["rate_req_s"], ours["requests"])
    assert twin["power_w"] != ours["power_w"]
    with pytest.raises(SystemExit):
        matrix.main([str(plain), *few, "--jitter=0.2"])
    capsys.readouterr()
    matrix.main([str(plain), "--table", f"--twin={noisy}"])
    line = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert line[6].startswith(f"{ours['power_w']:.0f};")
    assert line[9].startswith(f"{twin['power_w']:.0f};")


def test_a_cell_is_lost_to_what_is_cheaper_and_better(matrix):
    ours = [10.0, 1000.0, 0.995, 0.99]
    others = {
        "cheaper alone": [10.0, 900.0, 0.99, 0.99],
        "better alone": [10.0, 996.0, 1.0, 1.0],
        "both": [10.0, 994.0, 0.993, 0.9925],
    }
    assert matrix.lost_to({"mpc": ours, **others}) == ["both"]


CELL = "steady 45"


def row(policy, power_w, ttft=1.0, itl=1.0, *, layout="2P2D", seed=0.0):
    return {
        "kind": "steady", "cell": CELL, "policy": policy, "seed": seed, "requests": 1.0,
        "power_w": power_w, "ttft_attainment": ttft, "itl_attainment": itl,
        "over_budget_frac": float("nan"), "layout": layout,
    }  # fmt: skip


def test_a_cell_is_judged_as_given_and_with_the_layout_that_the_opponent_chose(adversary):
    rows = [
        row("mpc", 600.0, ttft=0.98),
        row("static-max", 900.0, ttft=0.98),
        row("static-best", 580.0, layout="3P1D"),
        row("ecoserve", 1200.0, layout="4C"),
    ]
    given = adversary.judge(CELL, rows)
    assert (given.given.broken, given.given.dearer, given.given.rival) == (
        True,
        True,
        "static-best",
    )
    assert given.alike is None  # not run yet
    assert list(adversary.in_other_layouts(rows)) == [(CELL, "mpc", 0, "3P1D")]
    for power_w, itl, word in (
        (570.0, 0.995, ""),
        (590.0, 0.995, "dearer"),
        (570.0, 0.98, "**broken**"),
    ):
        ours = row("mpc", power_w, itl=itl, layout="3P1D")
        alike = adversary.judge(CELL, [*rows, ours]).alike
        assert (alike.word, alike.rival, alike.layout) == (word, "static-best", "3P1D")
    text, broken = adversary.table([*rows, row("mpc", 570.0, layout="3P1D")])
    assert broken == 1  # as given it stays so
    assert "as given: of 1 cells 1 broken, 0 dearer" in text
    assert "alike: of 1 cells 0 broken, 0 dearer" in text


def test_another_layout_excuses_nothing_that_an_opponent_keeps_without_it(adversary):
    rows = [
        row("mpc", 600.0, ttft=0.98),
        row("mpc", 570.0, layout="3P1D"),
        row("static-best", 580.0, layout="3P1D"),
        row("pack", 700.0),
    ]
    alike = adversary.judge(CELL, rows).alike
    assert (alike.broken, alike.rival, alike.layout) == (True, "pack", "2P2D")
    # Broken without another layout is worse than dearer with it.
    rows[1] = row("mpc", 590.0, layout="3P1D")
    assert adversary.judge(CELL, rows).alike.broken


def test_a_layout_is_paired_seed_by_seed_and_means_decide(adversary):
    rows = []
    for seed, layout in ((0.0, "3P1D"), (1.0, "4C")):
        rows += [
            row("mpc", 600.0, seed=seed),
            row("static-best", 580.0, layout=layout, seed=seed),
            row("mpc", 560.0 + 10.0 * seed, layout=layout, seed=seed),
        ]
    verdict = adversary.judge(CELL, rows)
    assert verdict.given.dearer
    assert verdict.alike.ours[0] == pytest.approx(565.0)
    assert verdict.alike.layout == "3P1D, 4C"


def test_mishaps_strike_the_same_machine_whatever_it_does(adversary, monkeypatch):
    seen = []

    class Noted:
        def __init__(self, **what):
            seen.append(what)

        def simulate(self):
            return dict.fromkeys(
                ("requests_arrived", "mean_power_w", "ttft_attainment", "itl_attainment",
                 "over_budget_frac", "layout")
            )  # fmt: skip

    monkeypatch.setattr(adversary, "Run", Noted)
    adversary.simulate("decode fails in turn at 45", "mpc", 0, "4C")
    (what,) = seen
    assert what["fleet"].layout == "4C"
    assert {fault.instance for fault in what["faults"]} <= set(what["fleet"].ids)


@pytest.mark.slow
def test_no_baseline_is_cheaper_and_better_in_three_cells(matrix, tmp_path):
    results = tmp_path / "results.csv"
    cells = ["--cells=reference,4C,profile-20%-fast", "--loads=0.5", "--duration=60"]
    assert matrix.main([str(results), *cells]) == 0
    assert len(matrix.read_rows(results)) == 3 * 10
