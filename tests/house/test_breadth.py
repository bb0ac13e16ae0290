"""Three cells of the breadth table, and that it goes on where it stopped."""

import importlib.util
import sys

import pytest


@pytest.fixture
def matrix(root, monkeypatch):
    path = root / "bench" / "matrix.py"
    if not path.exists():
        pytest.skip("bench/ is not part of the source distribution")
    spec = importlib.util.spec_from_file_location("matrix", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)
    spec.loader.exec_module(module)
    return module


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


def test_a_cell_is_lost_to_what_is_cheaper_and_better(matrix):
    ours = [10.0, 1000.0, 0.995, 0.99]
    others = {
        "cheaper alone": [10.0, 900.0, 0.99, 0.99],
        "better alone": [10.0, 996.0, 1.0, 1.0],
        "both": [10.0, 994.0, 0.993, 0.9925],
    }
    assert matrix.lost_to({"mpc": ours, **others}) == ["both"]


@pytest.mark.slow
def test_no_baseline_is_cheaper_and_better_in_three_cells(matrix, tmp_path):
    results = tmp_path / "results.csv"
    cells = ["--cells=reference,4C,profile-20%-fast", "--loads=0.5", "--duration=60"]
    assert matrix.main([str(results), *cells]) == 0
    assert len(matrix.read_rows(results)) == 3 * 10
