"""Traces as people have them: units that keys do not name, other tables, packed files."""

import bz2
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.traces import read_trace

reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder, text, name="trace", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def keyed(n=400, *, rate_req_s=1.2, unit_s=1.0, block_tok=16, seed=0, **more):
    """Lines with Mooncake's keys, in a unit and block size of their own."""
    rng = np.random.default_rng(seed)
    at_s = np.sort(rng.random(n)) * n / rate_req_s
    prompts = rng.integers(20, 6000, n)
    lines = []
    for k in range(n):
        blocks = list(range(1000 * k, 1000 * k + int(-(-prompts[k] // block_tok))))
        blocks[0] = 0  # a system prompt, one block long
        stamp = at_s[k] / unit_s
        lines.append(
            json.dumps(
                {"timestamp": round(stamp, 3) if unit_s == 1.0 else round(stamp),
                 "input_length": int(prompts[k]), "output_length": 50, "hash_ids": blocks, **more}
            )
        )  # fmt: skip
    return "\n".join(lines)


# Units


def test_bailian_traces_are_in_seconds_and_blocks_of_sixteen(tmp_path):
    """Read as Mooncake's they were 1,196 req/s, and 0.89 of their prompts cached."""
    w = read_trace(write(tmp_path, keyed(chat_id=5, parent_chat_id=-1, type="text", turn=1)))
    assert w.rate_req_s == pytest.approx(1.2, rel=0.1)
    assert w.block_tok == 16
    assert w.cached_tok.max() == 16
    assert w.summary()["cached_frac"] < 0.01


@pytest.mark.parametrize("block_tok", [16, 64, 128, 512, 1024])
@pytest.mark.parametrize(("unit_s", "rate_req_s"), [(1.0, 3.0), (1e-3, 3.0), (1e-3, 20.0)])
def test_the_same_keys_in_any_unit_and_block_are_told_by_content(
    tmp_path, unit_s, rate_req_s, block_tok
):
    w = read_trace(
        write(tmp_path, keyed(unit_s=unit_s, rate_req_s=rate_req_s, block_tok=block_tok))
    )
    assert w.rate_req_s == pytest.approx(rate_req_s, rel=0.1)
    assert w.block_tok == block_tok
    assert w.cached_tok.max() <= block_tok


def test_stamps_that_do_not_tell_are_refused_until_somebody_does(tmp_path):
    path = write(tmp_path, keyed(unit_s=1e-3, rate_req_s=200.0))
    with pytest.raises(ConfigError, match=r"200 req/s if they are milliseconds and .*--time-unit"):
        read_trace(path)
    assert read_trace(path, time_unit="ms").rate_req_s == pytest.approx(200.0, rel=0.1)
    assert read_trace(path, time_unit="s").rate_req_s == pytest.approx(0.2, rel=0.1)


def test_blocks_that_fit_no_length_are_refused_until_somebody_says_their_size(tmp_path):
    path = write(tmp_path, keyed(unit_s=1e-3, rate_req_s=5.0, block_tok=50))
    with pytest.raises(ConfigError, match=r"about 49.\d tokens a block.*--block-tok"):
        read_trace(path)
    w = read_trace(path, block_tok=50)
    assert (w.block_tok, w.cached_tok.max()) == (50, 50)


def test_full_blocks_alone_tell_their_size_too(tmp_path):
    rows = [
        json.dumps({"timestamp": 3000 * k, "input_length": 100 * k + 130, "output_length": 5,
                    "hash_ids": list(range((100 * k + 130) // 128))})
        for k in range(50)
    ]  # fmt: skip
    assert read_trace(write(tmp_path, "\n".join(rows))).block_tok == 128


@pytest.mark.parametrize("name", ["arrival_time", "timestamp", "start_time"])
def test_seconds_that_would_be_one_request_in_minutes_are_refused(tmp_path, name):
    """An epoch in milliseconds under a name that is of seconds elsewhere."""
    rows = [
        json.dumps({name: 1_700_000_000_000 + 250 * k, "prompt_len": 9, "output_len": 4})
        for k in range(40)
    ]
    path = write(tmp_path, "\n".join(rows))
    with pytest.raises(ConfigError, match="--time-unit"):
        read_trace(path)
    assert read_trace(path, time_unit="ms").rate_req_s == pytest.approx(4.0)


def test_a_unit_in_the_name_is_believed(tmp_path):
    slow = "arrival_s,prompt_tok,output_tok\n0,10,5\n100,20,5\n"
    assert read_trace(write(tmp_path, slow)).arrival_s.tolist() == [0.0, 100.0]
    fast = "arrival_ms,prompt_tok,output_tok\n0,10,5\n100,20,5\n"
    assert read_trace(write(tmp_path, fast)).arrival_s.tolist() == [0.0, 0.1]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"time_unit": "min"}, "expected one of s, ms, us, ns"), ({"block_tok": 0}, "block_tok")],
)
def test_units_that_are_none_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        read_trace(write(tmp_path, keyed()), **options)


# Tables


def test_our_own_names_are_read(tmp_path):
    text = "arrival_s,prompt_tok,output_tok\n0.5,100,7\n0.0,50,3\n"
    w = read_trace(write(tmp_path, text))
    assert w.arrival_s.tolist() == [0.0, 0.5]
    assert (w.prompt_tok.tolist(), w.output_tok.tolist()) == ([50, 100], [3, 7])
    rows = '{"arrival_s": 0.5, "prompt_tok": 100, "output_tok": 7}\n'
    assert read_trace(write(tmp_path, rows)).prompt_tok.tolist() == [100]


def test_commas_between_thousands_are_no_columns(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        '2023-11-16 18:15:46.68,"2,162",44\n'
        '2023-11-16 18:15:50.68,396,"1,044"\n'
    )
    w = read_trace(write(tmp_path, text))
    assert (w.prompt_tok.tolist(), w.output_tok.tolist()) == ([2162, 396], [44, 1044])
    # Where they stand elsewhere nobody knows what is meant.
    bad = text.replace('"2,162"', '"21,62"')
    with pytest.raises(ConfigError, match=r"line 2, ContextTokens: expected .* got '21,62'"):
        read_trace(write(tmp_path, bad))


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,891,251\n",
        "arrival_s,prompt_tok,output_tok\n0.3,1,100,20\n",
    ],
)
def test_a_row_with_more_cells_than_columns_is_not_shifted(tmp_path, text):
    with pytest.raises(ConfigError, match="line 2, row: expected 3 cells, as the header has"):
        read_trace(write(tmp_path, text))
    # An end mark of a line is no cell.
    assert len(read_trace(write(tmp_path, "arrival_s,prompt_tok,output_tok,\n0.3,1,100,\n"))) == 1


def test_a_unit_that_contradicts_the_name_is_refused(tmp_path):
    text = "arrival_s,prompt_tok,output_tok\n0,10,5\n100,20,5\n"
    with pytest.raises(ConfigError, match=r"arrival_s: expected the unit that its name says"):
        read_trace(write(tmp_path, text), time_unit="ms")
    assert len(read_trace(write(tmp_path, text), time_unit="s")) == 2


def test_microseconds_are_not_taken_for_milliseconds(tmp_path):
    rows = [
        json.dumps({"timestamp": 2_000_000 * k + k, "input_length": 100, "output_length": 10,
                    "hash_ids": [k]})
        for k in range(40)
    ]  # fmt: skip
    path = write(tmp_path, "\n".join(rows))
    with pytest.raises(ConfigError, match="'us'"):
        read_trace(path)
    assert read_trace(path, time_unit="us").rate_req_s == pytest.approx(0.5, rel=0.1)


def test_quotes_and_line_ends_of_any_writer(tmp_path):
    text = '"a ""quoted"" name";"TIMESTAMP";ContextTokens;GeneratedTokens\r\n'
    text += '"x; y";"2023-11-16 18:15:46.68";374;44\r\n"";2023-11-16 18:15:47.68;20;4\r\n'
    w = read_trace(write(tmp_path, text))
    assert (w.prompt_tok.tolist(), w.arrival_s.tolist()) == ([374, 20], [0.0, 1.0])


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path):
    rows = [f"2023-11-16 18:15:{10 + k},{100 + k},5" for k in range(20)]
    rows[3] = '2023-11-16 18:15:13,"103,5'
    text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])
    w = read_trace(write(tmp_path, text), skip_bad_rows=True)
    assert (len(w), w.dropped_rows) == (19, 1)


BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,1.0,2.5,ChatGPT,472,18,490,Conversation log\n"
    "45,2.0,0.1,ChatGPT,1087,0,1087,API log\n"
    "118,1.0,3.1,GPT-4,417,276,693,Conversation log\n"
)


def test_burstgpt_is_read_and_its_failures_counted(tmp_path):
    w = read_trace(write(tmp_path, BURST))
    assert w.arrival_s.tolist() == [0.0, 113.0]
    assert (w.prompt_tok.tolist(), w.output_tok.tolist()) == ([472, 417], [18, 276])
    assert w.dropped_rows == 1
    assert w.source == "trace: BurstGPT"
    with pytest.raises(ConfigError, match="line 3, Request tokens: expected"):
        read_trace(write(tmp_path, BURST.replace("1087,0", "x,0")))


def test_azure_files_of_2024_and_of_images(tmp_path):
    text = (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
        "2024-10-15 00:00:00.036000+00:00,2,1500,44\n"
        "2024-10-15 00:00:01.036000+00:00,0,396,109\n"
    )
    w = read_trace(write(tmp_path, text))
    assert (w.prompt_tok.tolist(), w.arrival_s.tolist()) == ([1500, 396], [0.0, 1.0])


@pytest.mark.parametrize(
    "header",
    [
        "arrived_at,num_prefill_tokens,num_decode_tokens",  # Vidur
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size",
        "start_time,prompt_tokens,completion_tokens",
        "Arrival_Time,Input_Len,Output_Len",
    ],
)
def test_tables_of_other_programs(tmp_path, header):
    names = header.split(",")
    first = ["0.0"] * (len(names) - 3) + ["0.5", "374", "44"]
    if "arrival_timestamp" in names:  # Splitwise
        first = ["1", "2", "3", "0.5", "1", "374", "44"]
    second = ["1.5" if cell == "0.5" else cell for cell in first]
    w = read_trace(write(tmp_path, "\n".join([header, ",".join(first), ",".join(second)])))
    assert w.arrival_s.tolist() == [0.0, 1.0]
    assert (w.prompt_tok.tolist(), w.output_tok.tolist()) == ([374, 374], [44, 44])


def test_a_table_that_lacks_a_column_is_told_which(tmp_path):
    with pytest.raises(ConfigError, match="expected the columns arrival_s, prompt_tok, output"):
        read_trace(write(tmp_path, "arrival_s,prompt_tok,answer\n0,5,3\n"))


def test_parquet_tables(tmp_path):
    stamps = np.array(["2024-05-10T00:00:01.5", "2024-05-10T00:00:00"], dtype="datetime64[us]")
    dated = pa.table({"TIMESTAMP": stamps, "ContextTokens": [30, 40], "GeneratedTokens": [5, 6]})
    pyarrow.parquet.write_table(dated, tmp_path / "dated")
    w = read_trace(tmp_path / "dated")
    assert (w.arrival_s.tolist(), w.prompt_tok.tolist()) == ([0.0, 1.5], [40, 30])
    ours = pa.table({"arrival_s": [0.0, 2.0], "prompt_tok": [7, 8], "output_tok": [1, 0]})
    pyarrow.parquet.write_table(ours, tmp_path / "ours.parquet")
    with pytest.raises(ConfigError, match="row 2, output_tok: expected"):
        read_trace(tmp_path / "ours.parquet")
    assert read_trace(tmp_path / "ours.parquet", skip_bad_rows=True).dropped_rows == 1


# Packed, and in other encodings

TABLE = "arrival_s,prompt_tok,output_tok\n0.0,50,3\n0.5,100,7\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_obeyed(tmp_path, encoding):
    assert read_trace(write(tmp_path, TABLE, encoding=encoding)).prompt_tok.tolist() == [50, 100]


@pytest.mark.parametrize(
    "pack",
    [bz2.compress, lzma.compress, lambda data: pa.compress(data, "zstd", asbytes=True)],
    ids=["bz2", "xz", "zst"],
)
def test_packed_files_are_read(tmp_path, pack):
    path = write(tmp_path, pack(TABLE.encode()))
    assert read_trace(path).prompt_tok.tolist() == [50, 100]
    torn = write(tmp_path, pack(TABLE.encode() * 999)[:-30])
    with pytest.raises(ConfigError) as caught:
        read_trace(torn)
    assert "\n" not in str(caught.value)


def test_text_in_an_unknown_encoding_is_refused_with_what_to_do(tmp_path):
    path = write(tmp_path, TABLE, encoding="utf-16-le")  # without a mark
    with pytest.raises(ConfigError, match=r"UTF-16 without a mark\?.*iconv") as caught:
        read_trace(path)
    assert str(caught.value).isascii()  # no garbage in the message


@reuse_folder
@given(
    rows=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 9999), st.integers(1, 9999)),
                  min_size=1, max_size=12),
    delimiter=st.sampled_from([",", ";", "\t"]),
    grouped=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    order=st.permutations(["arrival_ms", "prompt_tok", "output_tok", "note"]),
)  # fmt: skip
def test_any_table_comes_back(tmp_path, rows, delimiter, grouped, encoding, order):
    lines = [delimiter.join(order)]
    for at_ms, prompt_tok, output_tok in rows:
        cells = {
            "arrival_ms": str(at_ms),
            "prompt_tok": f"{prompt_tok:,}" if grouped else str(prompt_tok),
            "output_tok": str(output_tok),
            "note": f"a{delimiter}b",
        }
        lines.append(delimiter.join(f'"{cells[name]}"' for name in order))
    w = read_trace(write(tmp_path, "\n".join(lines), encoding=encoding))
    rows.sort(key=lambda row: row[0])
    assert w.prompt_tok.tolist() == [row[1] for row in rows]
    assert w.output_tok.tolist() == [row[2] for row in rows]
    expected_s = [(row[0] - rows[0][0]) / 1e3 for row in rows]
    np.testing.assert_allclose(w.arrival_s, expected_s, atol=1e-9)


@pytest.mark.parametrize(("told", "given"), [(16, 512), (512, 16), (16, 17), (128, 50)])
def test_a_block_size_that_the_prompts_contradict_is_refused(tmp_path, told, given):
    path = write(tmp_path, keyed(block_tok=told))
    assert read_trace(path, block_tok=told).block_tok == told
    with pytest.raises(ConfigError, match=rf"of {told} tokens, got {given}; leave it out"):
        read_trace(path, block_tok=given)
