"""Tables: each format is read, and a bad one is refused by the name of what is wrong."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.kernel_tables import Transformer, read_kernels
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.fit import (
    IterationTable,
    fit_decode_time,
    fit_prefill_time,
    fit_table,
    read_table,
)

CLOCKS_MHZ = (600, 800, 1000, 1200, 1300, 1400)


def good_rows() -> list[dict[str, object]]:
    """A table that can be fitted: two contexts, four batches, prompts in one and in two."""
    rows: list[dict[str, object]] = []
    for f in CLOCKS_MHZ:
        g = f / 1e3
        volt = (1 + 0.7 * max(0.0, g - 1.1)) ** 2
        power_w = 60 + 190 * g * volt
        for n in (1, 8, 32, 64):
            for context in (200, 2000):
                wall_s = 10e-3 / g + 1e-4 / g * n + 8e-8 * n * context
                energy_j = wall_s * (0.5 * power_w + 40) + 0.5 + 0.01 * n * volt
                rows.append(row("decode", f, n, n * context, 0, wall_s, energy_j))
        for tok, prompts in ((128, 1), (1024, 1), (4096, 1), (1024, 4), (4096, 4)):
            wall_s = 8e-3 + 9e-5 / g * tok + 3e-10 / g * tok**2 / prompts
            rows.append(row("prefill", f, prompts, 0, tok, wall_s, wall_s * power_w))
    return rows


def row(phase, f, n, kv, tok, wall_s, energy_j):
    values = (phase, f, n, kv, tok, wall_s, energy_j)
    names = ("phase", "freq_mhz", "batch_req", "kv_tok", "prefill_tok", "wall_s", "energy_j")
    return dict(zip(names, values, strict=True))


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def renamed(rows, old, new, factor=1.0):
    return [
        {(new if k == old else k): (v * factor if k == old else v) for k, v in each.items()}
        for each in rows
    ]


# Formats


def test_own_format_is_read_and_fitted(tmp_path):
    result = fit_table(write(tmp_path / "table.csv", good_rows()))
    assert result.table.source == "table.csv"
    np.testing.assert_allclose(result.laws.decode.base_s, 10 / np.array(CLOCKS_MHZ), rtol=1e-3)
    np.testing.assert_allclose(result.laws.prefill.base_s, 8e-3, rtol=1e-2)
    assert result.laws.power.prefill_static_w == pytest.approx(60.0, rel=0.02)


@pytest.mark.parametrize(
    ("old", "new", "factor"),
    [
        ("wall_s", "latency_s", 1.0),
        ("wall_s", "latency_ms", 1e3),
        ("freq_mhz", "sm_mhz", 1),
        ("batch_req", "batch", 1),
        ("prefill_tok", "prompt_tok", 1),
        ("energy_j", "energy_mj", 1e3),
    ],
)
def test_other_names_and_units_of_a_column(tmp_path, old, new, factor):
    plain = read_table(write(tmp_path / "a.csv", good_rows()))
    other = read_table(write(tmp_path / "b.csv", renamed(good_rows(), old, new, factor)))
    for name in ("freq_mhz", "batch_req", "prefill_tok", "wall_s", "energy_j", "square_tok2"):
        np.testing.assert_allclose(getattr(other, name), getattr(plain, name), rtol=1e-12)


def test_power_stands_for_energy(tmp_path):
    rows = [
        {**{k: v for k, v in each.items() if k != "energy_j"}, "power_w": 250.0}
        for each in good_rows()
    ]
    table = read_table(write(tmp_path / "table.csv", rows))
    np.testing.assert_allclose(table.energy_j, 250.0 * table.wall_s)


def test_files_join_and_rows_are_selected(tmp_path):
    rows = [{**each, "run": "a" if each["freq_mhz"] < 1100 else "b"} for each in good_rows()]
    path = write(tmp_path / "table.csv", rows)
    assert len(read_table([path, path])) == 2 * len(rows)
    assert set(read_table(path, where={"run": "a"}).freq_mhz) == {600.0, 800.0, 1000.0}
    with pytest.raises(ConfigError, match="no column 'day' to select by"):
        read_table(path, where={"day": "1"})
    with pytest.raises(ConfigError, match=r"no rows where \{'run': 'c'\}"):
        read_table(path, where={"run": "c"})


def test_parquet_is_read_alike(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(good_rows()), tmp_path / "table.parquet")
    plain = read_table(write(tmp_path / "table.csv", good_rows()))
    np.testing.assert_array_equal(read_table(tmp_path / "table.parquet").wall_s, plain.wall_s)
    (tmp_path / "broken.parquet").write_bytes(b"PAR?")
    with pytest.raises(ConfigError, match=r"broken\.parquet: cannot be read as Parquet"):
        read_table(tmp_path / "broken.parquet")


def test_unequal_columns_are_a_shape_error():
    with pytest.raises(ShapeError, match=r"IterationTable\.wall_s"):
        IterationTable(
            phase=("decode",), freq_mhz=[1], batch_req=[1], kv_tok=[1], prefill_tok=[0],
            square_tok2=[0], wall_s=[1, 2], energy_j=[1],
        )  # fmt: skip


def test_a_missing_file_and_one_that_is_no_table(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv: expected a file, got none of that name"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("phase,freq_mhz\n")
    with pytest.raises(ConfigError, match=r"empty\.csv: no rows"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "ragged.csv").write_text("phase,freq_mhz\ndecode\n")
    with pytest.raises(ConfigError, match="row 1 has more or fewer cells"):
        read_table(tmp_path / "ragged.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfa\x00" * 9)
    with pytest.raises(ConfigError, match="expected text in UTF-8"):
        read_table(tmp_path / "binary.csv")


# Published tables


def a800(data):
    return [data / f"a800_qwen3_32b_dvfs_{part}.csv" for part in ("subset", "longctx")]


def test_a800_tables_are_read(shared_data):
    with pytest.raises(ConfigError, match=r"'tp' mixes 1, 2; select one"):
        read_table(a800(shared_data))
    table = read_table(a800(shared_data), where={"tp": "1"})
    assert (len(table.of("decode")), len(table.of("prefill")), table.gpus) == (174, 36, 1)
    assert table.wall_s[0] == pytest.approx(0.147)
    assert table.kv_tok[0] == 192.0
    # (59.45 + 199.68) mJ per layer, 64 layers
    assert table.energy_j[0] == pytest.approx(16.584, abs=1e-3)
    assert read_table(a800(shared_data), where={"tp": "2"}).gpus == 2


def test_perseus_tables_are_read(shared_data):
    path = shared_data / "perseus_sosp24" / "stage_profile_gpt3-175b_a100_sxm_bf16.csv"
    table = read_table(path, where={"stage": "0"})
    assert set(table.phase) == {"prefill"}
    assert (len(table), table.freq_mhz.min(), table.freq_mhz.max()) == (38, 855.0, 1410.0)
    with pytest.raises(ConfigError, match="no rows with instruction 'forward'"):
        read_table(path, where={"instruction": "backward"})
    with pytest.raises(ConfigError, match="prefill_tok_s: 1 number"):
        fit_table(path, where={"stage": "0"})


def test_mlenergy_runs_are_read_and_too_little_for_a_profile(shared_data):
    path = shared_data / "mlenergy_v3" / "llm_runs.csv"
    which = {
        "gpu_model": "H100",
        "model_id": "meta-llama/Llama-3.1-8B-Instruct",
        "task": "lm-arena-chat",
    }
    with pytest.raises(ConfigError, match=r"no clock column; .*freq_mhz=1980"):
        read_table(path, where=which)
    with pytest.raises(ConfigError, match=r"'model_id' mixes Qwen.*select one"):
        read_table(path, freq_mhz=1980)
    table = read_table(path, where=which, freq_mhz=1980)
    law = fit_decode_time(table, "line", kv_s=0.0)
    # About what docs/identification.md quotes: 6.67 + 0.0758 n ms.
    assert law.base_s[0] == pytest.approx(6.67e-3, rel=0.06)
    assert law.req_s[0] == pytest.approx(7.58e-5, rel=0.06)
    predicted_s = law.time_s(table.freq_mhz, table.batch_req, table.kv_tok)
    assert np.mean(np.abs(predicted_s / table.wall_s - 1.0)) < 0.02
    with pytest.raises(ConfigError, match=r"freq_mhz: decode was measured at 1 clock"):
        fit_table(table)


LLAMA_8B = Transformer(
    layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
)
A100_KERNELS = "a100_sxm_vllm-0.14.0"


def test_kernel_tables_are_put_together(shared_data):
    folder = shared_data / "nvidia_aiconfigurator"
    table = read_kernels(folder, A100_KERNELS, LLAMA_8B, freq_mhz=1410)
    assert np.all(np.isnan(table.energy_j))
    decode = table.of("decode")
    serving = (decode.batch_req <= 256) & (decode.kv_tok <= 450_000)
    decode = decode.rows(serving & (decode.kv_tok >= 63 * decode.batch_req))
    # 16 GB of weights cannot be read faster than 2.04 TB/s allows
    assert decode.wall_s.min() > 15e9 / 2.04e12
    law = fit_decode_time(decode, "line")
    # 7.7e-8 s per KV token and 9.9 ms per step were found from the same kernels
    assert law.kv_s[0] == pytest.approx(7.7e-8, rel=0.06)
    assert law.base_s[0] == pytest.approx(9.9e-3, rel=0.11)
    predicted_s = law.time_s(decode.freq_mhz, decode.batch_req, decode.kv_tok)
    assert np.mean(np.abs(predicted_s / decode.wall_s - 1.0)) < 0.05
    prefill = table.of("prefill")
    prefill = prefill.rows(prefill.prefill_tok >= 128)
    fitted = fit_prefill_time(prefill)
    predicted_s = fitted.time_s(prefill.freq_mhz, prefill.prefill_tok, prefill.square_tok2)
    assert np.mean(np.abs(predicted_s / prefill.wall_s - 1.0)) < 0.04
    # 2 x 7.5e9 FLOP per token cannot be done faster than 312 TFLOP/s
    assert fitted.tok_s[0] > 1.5e10 / 312e12


def test_a_model_that_no_kernel_fits_is_refused(shared_data):
    with pytest.raises(ConfigError, match="no bfloat16 rows with 7 heads"):
        read_kernels(
            shared_data / "nvidia_aiconfigurator",
            A100_KERNELS,
            replace(LLAMA_8B, heads=7),
            freq_mhz=1410,
        )


# Bad tables


def drop(column):
    return lambda rows: [{k: v for k, v in each.items() if k != column} for each in rows]


def spoil(column, value, keep=lambda each: True):
    """Replace one value of a column, in a row that a strategy picks."""

    def change(rows, pick):
        rows = [dict(each) for each in rows]
        candidates = [each for each in rows if keep(each)]
        chosen = candidates[pick % len(candidates)]
        chosen[column] = value(chosen[column]) if callable(value) else value
        return rows

    return change


def decodes(each):
    return each["phase"] == "decode"


def prefills(each):
    return each["phase"] == "prefill"


WHOLE = {
    "missing column 'phase'": drop("phase"),
    "missing column 'freq_mhz'": drop("freq_mhz"),
    "missing column 'batch_req'": drop("batch_req"),
    "missing column 'kv_tok'": drop("kv_tok"),
    "missing column 'prefill_tok'": drop("prefill_tok"),
    "missing column 'wall_s'": drop("wall_s"),
    "columns wall_s and wall_ms say the same": lambda rows: [
        {**each, "wall_ms": 1e3 * each["wall_s"]} for each in rows
    ],
    "both energy and power": lambda rows: [{**each, "power_w": 200.0} for each in rows],
    "table.freq_mhz: expected 50..5000 MHz": lambda rows: renamed(
        rows, "freq_mhz", "freq_mhz", 1e-3
    ),
    "W per GPU from energy over time": lambda rows: renamed(rows, "energy_j", "energy_j", 1e3),
    "energy_j: expected 5..2500 W per GPU": lambda rows: renamed(rows, "wall_s", "wall_s", 1e3),
    "measured at 1 clock(s) only (1000 MHz)": lambda rows: [
        each for each in rows if each["freq_mhz"] == 1000
    ],
    "prefill was measured at 2 clock(s) only (600, 800 MHz)": lambda rows: [
        each for each in rows if decodes(each) or each["freq_mhz"] < 900
    ],
    "decode_req_s: 2 batch size(s)": lambda rows: [
        each for each in rows if prefills(each) or each["batch_req"] <= 8
    ],
    "decode_kv_s: KV tokens grow with the batch alone": lambda rows: [
        each for each in rows if prefills(each) or each["kv_tok"] == 200 * each["batch_req"]
    ],
    "prefill_tok2_s: the square of the prompts follows": lambda rows: [
        {**each, "square_tok2": 512 * each["prefill_tok"]} for each in rows
    ],
    "no decode and no prefill rows": lambda rows: [{**each, "phase": "idle"} for each in rows],
}
ONE = {
    "column 'wall_s': expected a finite number, got nan": spoil("wall_s", "nan"),
    "column 'energy_j': expected a finite number, got inf": spoil("energy_j", "inf"),
    "column 'freq_mhz': expected a number, got ''": spoil("freq_mhz", ""),
    "column 'wall_s': expected a number, got '12 ms'": spoil("wall_s", "12 ms"),
    "table.energy_j: expected joules > 0": spoil("energy_j", lambda v: -v),
    "table.wall_s: expected seconds > 0": spoil("wall_s", lambda v: -v),
    "table.freq_mhz: expected 50..5000 MHz": spoil("freq_mhz", lambda v: v * 1e6),
    "table.batch_req: expected at least one request": spoil("batch_req", 0),
    "table.kv_tok: expected tokens >= 0": spoil("kv_tok", lambda v: -v, decodes),
    "table.prefill_tok: expected at least one token": spoil("prefill_tok", 0, prefills),
    "table.phase: expected one of decode, prefill, idle": spoil("phase", "train"),
    # seconds in a column of milliseconds, or the other way round, shows in the power
    "W per GPU from energy over time": spoil("wall_s", lambda v: v * 1e-3),
}


@pytest.mark.parametrize("message", WHOLE)
def test_a_table_bad_as_a_whole_is_refused_by_name(tmp_path, message):
    path = write(tmp_path / "table.csv", WHOLE[message](good_rows()))
    with pytest.raises(ConfigError) as caught:
        fit_table(path)
    assert message in str(caught.value)


@given(message=st.sampled_from(sorted(ONE)), pick=st.integers(0, 10_000))
def test_one_bad_cell_is_refused_by_name_and_row(tmp_path_factory, message, pick):
    path = tmp_path_factory.mktemp("bad") / "table.csv"
    write(path, ONE[message](good_rows(), pick))
    with pytest.raises(ConfigError) as caught:
        fit_table(path)
    assert message in str(caught.value)
    assert "table.csv" in str(caught.value)
    assert "in row" in str(caught.value)


def test_mixed_units_without_energy_show_as_spread(tmp_path):
    rows = drop("energy_j")(good_rows()) * 2
    rows[3] = {**rows[3], "wall_s": 1e3 * rows[3]["wall_s"]}
    with pytest.raises(ConfigError, match=r"same load \(600 MHz, batch 8\): mixed units"):
        fit_table(write(tmp_path / "table.csv", rows))


@given(keep=st.sets(st.integers(0, 77), max_size=20))
def test_too_few_rows_are_refused_with_what_to_measure(tmp_path_factory, keep):
    rows = [each for number, each in enumerate(good_rows()) if number in keep]
    path = tmp_path_factory.mktemp("few") / "table.csv"
    write(path, rows or [dict.fromkeys(good_rows()[0], "")])
    with pytest.raises(ConfigError, match=r"measure|expected a number"):
        fit_table(path)
