"""Results leave as data frames, CSV, Parquet and series, with every figure in full."""

import csv
import json
import sys

import pytest

from voltana_ctrl import ConfigError, compare


@pytest.fixture(scope="module")
def found():
    return compare(
        rates_req_s=[5.0, 9.0], duration_s=12.0, warmup_s=2.0, seeds=2, detail=True,
        policies=["static-max", "static-1005", "bound"],
    )  # fmt: skip


def test_a_data_frame_has_one_row_a_run(found):
    frame = found.to_dataframe()
    assert len(frame) == 12
    assert list(frame["policy"].unique()) == ["static-max", "static-1005", "bound"]
    assert frame.groupby("policy")["energy_j"].mean()["static-1005"] > 0.0
    assert frame["saving_token_frac"][:4].tolist() == [0.0] * 4


def test_csv_and_parquet_hold_what_the_json_holds(found, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the tables extra")
    found.write_table(tmp_path / "runs.csv")
    found.write_table(tmp_path / "runs.parquet")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["energy_j"]) for row in rows] == [run["energy_j"] for run in found.runs]
    assert rows[-1]["ttft_p99_s"] == ""  # what does not exist is empty, and no 0
    table = parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    assert table == list(found.runs)


def test_series_add_up_to_the_energy_of_the_run(found, tmp_path):
    found.write_series(tmp_path / "series.csv")
    with (tmp_path / "series.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    run = found.runs[0]
    energy_j = sum(
        float(row["power_w"]) * (float(row["until_s"]) - float(row["from_s"]))
        for row in rows
        if (row["policy"], float(row["rate_req_s"]), int(row["seed"])) == ("static-max", 5.0, 0)
    )
    assert energy_j == pytest.approx(run["energy_j"], rel=1e-6)
    assert {row["role"] for row in rows} == {"prefill", "decode"}


def test_savings_are_per_token_against_static_max(found):
    for run in found.runs:
        full = next(
            one for one in found.runs
            if (one["policy"], one["rate_req_s"], one["seed"])
            == ("static-max", run["rate_req_s"], run["seed"])
        )  # fmt: skip
        if run["policy"] == "bound":
            assert run["saving_token_frac"] is None
        else:
            expected = 1.0 - run["energy_per_token_j"] / full["energy_per_token_j"]
            assert run["saving_token_frac"] == pytest.approx(expected)


def test_without_details_series_are_refused(tmp_path):
    plain = compare(rates_req_s=[5.0], duration_s=5.0, warmup_s=0.0, policies=["static-max"])
    with pytest.raises(ConfigError, match="detail=True"):
        plain.write_series(tmp_path / "series.csv")


def test_what_is_missing_is_told_with_its_mend(found, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pandas; pip install 'voltana-ctrl\[tables\]'"):
        found.to_dataframe()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow; pip install"):
        found.write_table(tmp_path / "runs.parquet")


def test_a_json_is_replaced_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text('{"old": true}')
    monkeypatch.setattr("voltana_ctrl.experiment.tables.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.write_json(path)
    assert json.loads(path.read_text()) == {"old": True}


def test_the_page_explains_every_key_of_the_json(found, root):
    page = (root / "docs" / "results.md").read_text(encoding="utf-8")
    told = found.to_dict()
    keys = {*told, *told["runs"][0]}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
