"""Files as other programs leave them: marks, encodings, packing."""

import bz2
import codecs
import gzip
import lzma
import sys
from pathlib import Path

import pytest

from voltana_ctrl import ConfigError, FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import load_endpoints
from voltana_ctrl.engines.in_engine import InEngineSettings
from voltana_ctrl.fit.tables import read_table
from voltana_ctrl.profiling.sweep import RowFile
from voltana_ctrl.sim.faults import read_faults
from voltana_ctrl.textfile import json_value, read_text, read_toml

TABLE = "phase,freq_mhz,batch_req,kv_tok,wall_ms,power_w\ndecode,1410,8,1536,45.1,261\n"
MARK = codecs.BOM_UTF8


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_fit_reads_tables_with_a_mark(tmp_path, encoding, pack):
    path = tmp_path / "table.csv"
    path.write_bytes(pack(TABLE.encode(encoding)))
    assert read_text(path) == TABLE
    assert read_table(path).wall_s.tolist() == [0.0451]


def test_fit_refuses_what_is_no_text_in_one_line_of_words(tmp_path):
    path = tmp_path / "table.csv"
    for data in (TABLE.encode("utf-16-le"), bytes(range(256)) * 9):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"expected text in UTF-8.*iconv") as caught:
            read_table(path)
        assert str(caught.value).isprintable()
        assert str(caught.value).isascii()


def test_a_quoted_line_end_is_a_part_of_its_cell(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("note," + TABLE.replace("decode", '"two\nlines\x85here",decode'), newline="")
    assert len(read_table(path)) == 1


def test_broken_bytes_that_are_few_stay_in_their_row(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(TABLE.encode() + b"decode,14\xff10,8,1536,45.1,261\n")
    with pytest.raises(ConfigError, match="'freq_mhz': expected a number"):
        read_table(path)


def test_zstandard_without_pyarrow_says_how_to_unpack(tmp_path, monkeypatch):
    path = tmp_path / "table.csv.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"0" * 20)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="zstd -d"):
        read_text(path)


# Files of ours that an editor has saved with a mark

FLEET = """[[instance]]
role = "colocated"
profile = "a100-sxm-80gb/llama-3.1-8b"
engine = { kind = "vllm", url = "http://10.0.0.1:8000" }
"""


def test_fleet_faults_and_settings_may_have_a_mark(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_bytes(MARK + FLEET.encode())
    assert len(load_endpoints(path)[1]) == 1
    path.write_bytes(MARK + FLEET.replace("engine = ", "# ").encode())
    assert len(FleetSpec.from_toml(path, load_profile)) == 1
    faults = tmp_path / "faults.toml"
    faults.write_bytes(MARK + b'[[failure]]\ninstance = "decode-0"\nfrom_s = 1.0\nuntil_s = 2.0\n')
    assert len(read_faults(faults)) == 1
    config = tmp_path / "engine.toml"
    config.write_bytes(MARK + b'worker_id = "7"\n')
    assert InEngineSettings.read({"VOLTANA_CTRL_CONFIG": str(config)}).worker_id == "7"


def test_a_token_may_have_a_mark(tmp_path):
    from voltana_ctrl.cli.running import token_of

    path = tmp_path / "token"
    path.write_bytes(MARK + b"0123456789abcdef0123456789abcdef\n")
    assert token_of(path) == "0123456789abcdef0123456789abcdef"


def test_a_table_of_ours_that_a_spreadsheet_has_saved_goes_on(tmp_path):
    header = (
        "phase,freq_mhz,batch_req,kv_tok,prefill_tok,wall_s,asked_mhz,asked_tok,steps,mean_s,"
        "seen_mhz,temperature_c,model"
    )
    path = tmp_path / "table.csv"
    path.write_bytes(
        MARK + f"{header}\ndecode,1410,1,100,0,0.02,1410,100,20,0.02,,,tiny\n".encode()
    )
    rows = RowFile(Path(path))
    assert rows.columns[0] == "phase"
    assert len(rows.points) == 1


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path, pack):
    path = tmp_path / "bomb.csv"
    path.write_bytes(pack(b"0" * (1 << 26)))
    with pytest.raises(ConfigError, match="unpack it first if it is meant"):
        read_text(path)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a = 0x" + "f" * 5000,
        "a = " + "9" * 5000,
        "a = 1__0",
        "a = 9223372036854775808",
        "[" + ".".join("a" * 3000),
        "a = '\0'",
    ],
    ids=lambda text: text[:12],
)
def test_toml_of_any_kind_has_one_error(tmp_path, text):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    for read in (read_toml, read_faults, lambda path: FleetSpec.from_toml(path, load_profile)):
        with pytest.raises(ConfigError, match=r"fleet\.toml"):
            read(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "NaN", "\ud800", b"\xff\xfe{"])
def test_json_of_any_kind_has_one_error(text):
    with pytest.raises(ConfigError, match="limits: expected JSON"):
        json_value(text, "limits")
