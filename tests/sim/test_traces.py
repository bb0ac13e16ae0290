"""Readers of public trace formats: real files, round trips, and bad rows refused by name."""

import gzip
import json
import math
import time
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.traces import read_trace

# Hypothesis draws many files for one temporary folder; each is written anew.
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
START = datetime(2023, 11, 16, 18, 15, 46)
TOKENS = st.integers(1, 2**24)
BAD_TOKENS = [
    "0",
    "-5",
    "nan",
    "inf",
    "1.5",
    "1e3",
    "",
    "x",
    str(2**24 + 1),
    "9" * 5000,
    "1_0",
    "٣",
]
BAD_JSON_TOKENS = [
    "0",
    "-5",
    "NaN",
    "Infinity",
    "1.5",
    "null",
    "true",
    '"7"',
    "[1]",
    "1e300",
    "9" * 400,
]
BAD_JSON_STAMPS = ["-1", "NaN", "-Infinity", "null", "true", '"7"', "1e14", "9" * 400]
NOT_OBJECTS = [
    "[1, 2]",
    "7",
    "null",
    '{"timestamp": 1',
    "{]",
    "9" * 5000,
    "[" * 100_000,
    "\x00",
    "garbage",
]


def azure_line(at_us, prompt_tok, output_tok):
    stamp = START + timedelta(microseconds=at_us)
    return f"{stamp.isoformat(sep=' ', timespec='microseconds')}0,{prompt_tok},{output_tok}"


def mooncake_line(stamp_ms, prompt_tok, output_tok, blocks=()):
    row = {"timestamp": stamp_ms, "input_length": prompt_tok, "output_length": output_tok}
    return json.dumps(row | {"hash_ids": list(blocks)})


def request_line(at_s, prompt_tok, output_tok):
    return json.dumps({"arrival_s": at_s, "prompt_len": prompt_tok, "output_len": output_tok})


def write(folder, lines, *, zipped=False, newline="\n", name="trace"):
    data = (newline.join(lines) + newline).encode()
    path = folder / name
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    return path


def good_lines(kind, n=4):
    """Valid file of one kind, its header included, and the number of its first data line."""
    if kind == "azure":
        return [HEADER, *(azure_line(i * 10**6, 100 + i, 10 + i) for i in range(n))], 2
    line = mooncake_line if kind == "mooncake" else request_line
    return [line(i * 1000, 100 + i, 10 + i) for i in range(n)], 1


def bad_line(draw, kind):
    """One unusable data line of a kind, and the column that the message has to name."""
    column = draw(st.integers(0, 2))
    if kind == "azure":
        cells = azure_line(5, 7, 8).split(",")
        bad = ["", "yesterday", "2023-13-01 00:00:00", "12", "nan"] if column == 0 else BAD_TOKENS
        cells[column] = draw(st.sampled_from(bad))
        if draw(st.booleans()) and column:
            cells = cells[:column]  # torn off in the middle
        return ",".join(cells), HEADER.split(",")[column]
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(NOT_OBJECTS)), "row"
    names = (
        ["timestamp", "input_length", "output_length"]
        if kind == "mooncake"
        else ["arrival_s", "prompt_len", "output_len"]
    )
    bad = BAD_JSON_TOKENS if column else BAD_JSON_STAMPS
    values = ["5", "7", "8"]
    values[column] = draw(st.sampled_from(bad))
    pairs = [f'"{name}": {value}' for name, value in zip(names, values, strict=True)]
    if draw(st.booleans()):
        del pairs[column]
    return "{" + ", ".join(pairs) + "}", names[column]


KINDS = st.sampled_from(["azure", "mooncake", "requests"])


# The real files


def test_azure_conversation_trace(shared_data):
    start_s = time.process_time()
    w = read_trace(shared_data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert time.process_time() - start_s < 3.0  # twice what it takes while others compute
    s = w.summary()
    assert len(w) == 19_366
    assert w.rate_req_s == pytest.approx(5.53, abs=0.005)
    assert s["gap_cv"] == pytest.approx(1.09, abs=0.005)
    assert np.quantile(w.prompt_tok, [0.5, 0.9]) == pytest.approx([1020, 2734.5])
    assert np.quantile(w.output_tok, [0.5, 0.9]) == pytest.approx([129, 424])
    assert w.arrival_s[0] == 0.0
    assert w.arrival_s[1] == pytest.approx(4.314579, abs=1e-9)
    assert w.dropped_rows == 0
    assert w.prompt_tok.min() == 2  # the file holds no zero lengths
    assert w.output_tok.min() == 7


def test_mooncake_first_half_hour(shared_data):
    w = read_trace(shared_data / "mooncake_fast25" / "conversation_first30min.jsonl.gz")
    assert len(w) == 5719
    assert w.duration_s == 1800.0
    assert w.rate_req_s == pytest.approx(5719 / 1800)
    assert (w.prompt_tok[0], w.output_tok[0]) == (6758, 500)
    assert w.prefix_blocks(0).tolist() == list(range(14))
    assert w.block_id.size == np.sum(-(-w.prompt_tok // 512))
    # spread, the arrivals look Poisson; stamped, 600 instants would hold about ten each
    assert 0.95 < w.summary()["gap_cv"] < 1.1
    per_stamp, _ = np.histogram(w.arrival_s, bins=600, range=(0.0, 1800.0))
    assert per_stamp[:2].tolist() == [10, 16]
    assert 1.0 < per_stamp.var() / per_stamp.mean() < 1.2
    # requests 1, 2, ... share their first block (a system prompt) with request 0
    assert w.cached_tok[:3].tolist() == [0, 512, 512]
    assert 0.30 < w.summary()["cached_frac"] < 0.38


def test_mooncake_cache_equals_a_naive_one(shared_data):
    w = read_trace(shared_data / "mooncake_fast25" / "conversation_first30min.jsonl.gz")
    for i in range(0, 600, 7):
        known = set(w.block_id[: w.block_offset[i]].tolist())
        run = 0
        for block in w.prefix_blocks(i).tolist():
            if block not in known:
                break
            run += 1
        assert w.cached_tok[i] == min(512 * run, w.prompt_tok[i] - 1)


# Round trips

ROWS = st.lists(st.tuples(st.integers(0, 10**10), TOKENS, TOKENS), min_size=1, max_size=20)


@reuse_folder
@given(rows=ROWS, zipped=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]))
def test_azure_round_trip(tmp_path, rows, zipped, newline):
    path = write(
        tmp_path, [HEADER, *(azure_line(*row) for row in rows)], zipped=zipped, newline=newline
    )
    w = read_trace(path)
    rows.sort(key=lambda row: row[0])
    assert w.prompt_tok.tolist() == [row[1] for row in rows]
    assert w.output_tok.tolist() == [row[2] for row in rows]
    expected_s = (np.array([row[0] for row in rows]) - rows[0][0]) * 1e-6
    np.testing.assert_allclose(w.arrival_s, expected_s, rtol=1e-12, atol=1e-12)
    assert not w.cached_tok.any()
    if w.arrival_s[-1] > 0:
        assert w.rate_req_s == pytest.approx((len(rows) - 1) / w.arrival_s[-1])


@reuse_folder
@given(rows=ROWS, zipped=st.booleans(), blocks=st.data())
def test_mooncake_round_trip(tmp_path, rows, zipped, blocks):
    ids = st.lists(st.integers(0, 9), max_size=5)
    rows = [(*row, blocks.draw(ids)) for row in rows]
    rows.append((1234, 700, 5, [3, 4]))  # not a multiple of 3 s: stamps are taken as they are
    path = write(tmp_path, [mooncake_line(*row) for row in rows], zipped=zipped)
    w = read_trace(path, time_unit="ms", block_tok=512)
    rows.sort(key=lambda row: row[0])
    assert w.prompt_tok.tolist() == [row[1] for row in rows]
    expected_s = (np.array([row[0] for row in rows]) - rows[0][0]) * 1e-3
    np.testing.assert_allclose(w.arrival_s, expected_s, rtol=1e-12, atol=1e-12)
    assert [w.prefix_blocks(i).tolist() for i in range(len(w))] == [row[3] for row in rows]
    seen = set()
    for i, (_, prompt_tok, _, row_blocks) in enumerate(rows):
        run = 0
        while run < len(row_blocks) and row_blocks[run] in seen:
            run += 1
        assert w.cached_tok[i] == min(512 * run, prompt_tok - 1)
        seen.update(row_blocks)


@reuse_folder
@given(rows=ROWS, zipped=st.booleans())
def test_request_rows_round_trip(tmp_path, rows, zipped):
    rows = [(at_us * 1e-6, prompt_tok, output_tok) for at_us, prompt_tok, output_tok in rows]
    w = read_trace(write(tmp_path, [request_line(*row) for row in rows], zipped=zipped))
    rows.sort(key=lambda row: row[0])
    assert w.prompt_tok.tolist() == [row[1] for row in rows]
    assert w.output_tok.tolist() == [row[2] for row in rows]
    np.testing.assert_allclose(w.arrival_s, [row[0] - rows[0][0] for row in rows], atol=1e-9)


@reuse_folder
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=20).filter(any),
    jitter_ms=st.sampled_from([0, 1, -1]),
    seed=st.integers(0, 2**32),
)
def test_mooncake_stamps_are_spread_over_their_three_seconds(tmp_path, counts, jitter_ms, seed):
    stamps_ms = [
        max(3000 * k + jitter_ms, 0) for k, count in enumerate(counts) for _ in range(count)
    ]
    lines = [mooncake_line(ms, 100 + i, 5) for i, ms in enumerate(stamps_ms)]
    w = read_trace(write(tmp_path, lines), seed=seed)
    first = next(k for k, count in enumerate(counts) if count)
    per_stamp, _ = np.histogram(w.arrival_s, bins=len(counts), range=(0.0, 3.0 * len(counts)))
    assert per_stamp.tolist() == counts[first:] + [0] * first
    assert w.prompt_tok.tolist() == list(range(100, 100 + len(stamps_ms)))  # order of the file
    last = max(k for k, count in enumerate(counts) if count)
    assert w.duration_s == 3.0 * (last - first + 1)
    assert np.array_equal(w.arrival_s, read_trace(tmp_path / "trace", seed=seed).arrival_s)


# What benchmarks write


def result(**changes):
    values = {
        "backend": "vllm",
        "request_rate": 4.0,
        "max_concurrency": None,
        "request_throughput": 3.9,
        "input_lens": [10, 20, 30],
        "output_lens": [1, 2, 3],
        "ttfts": [0.1, 0.2, 0.1],
    }
    return {key: value for key, value in (values | changes).items() if value != "absent"}


@pytest.mark.parametrize("indent", [None, 2])
def test_result_with_start_times(tmp_path, indent):
    values = result(start_times=[105.5, 100.0, 101.0])
    w = read_trace(write(tmp_path, [json.dumps(values, indent=indent)]))
    assert w.arrival_s.tolist() == [0.0, 1.0, 5.5]
    assert w.prompt_tok.tolist() == [20, 30, 10]
    assert w.output_tok.tolist() == [2, 3, 1]


def test_result_without_times_runs_at_its_rate(tmp_path):
    values = result(input_lens=[7] * 4000, output_lens=[5] * 4000)
    path = write(tmp_path, [json.dumps(values)])
    w = read_trace(path)
    assert w.rate_req_s == pytest.approx(4.0)
    assert w.summary()["gap_cv"] == pytest.approx(1.0, abs=0.05)
    assert np.array_equal(w.arrival_s, read_trace(path).arrival_s)
    assert not np.array_equal(w.arrival_s, read_trace(path, seed=1).arrival_s)


@pytest.mark.parametrize("rate", ["inf", math.inf, None, "absent"])
def test_result_of_a_closed_loop(tmp_path, rate):
    values = result(request_rate=rate, max_concurrency=64)
    w = read_trace(write(tmp_path, [json.dumps(values)]))
    assert w.concurrency == 64
    assert w.prompt_tok.tolist() == [10, 20, 30]


def test_result_with_a_rate_and_a_cap_stays_open(tmp_path):
    w = read_trace(write(tmp_path, [json.dumps(result(max_concurrency=64))]))
    assert w.concurrency is None
    assert w.rate_req_s == pytest.approx(4.0)


def test_lengths_alone_get_one_request_a_second(tmp_path):
    lines = [json.dumps({"input_tokens": 9, "output_tokens": 4, "prompt": "x"})] * 50
    w = read_trace(write(tmp_path, lines))
    assert w.rate_req_s == pytest.approx(1.0)
    assert w.rescaled(20.0).rate_req_s == pytest.approx(20.0)


def test_failed_requests_are_refused_or_counted(tmp_path):
    path = write(tmp_path, [json.dumps(result(output_lens=[1, 0, 3]))])
    with pytest.raises(ConfigError, match=r"request 1, output_lens: .*1 to 16777216, got 0;"):
        read_trace(path)
    w = read_trace(path, skip_bad_rows=True)
    assert (len(w), w.dropped_rows) == (2, 1)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([json.dumps(result(input_lens="absent"))], "--save-detailed"),
        ([json.dumps(result())] * 2, "one line per file"),
        ([json.dumps(result(output_lens=[1]))], "output_lens: expected a list"),
        ([json.dumps(result(output_lens="absent"))], "output_lens: expected a list"),
        ([json.dumps(result(input_lens=3))], "input_lens: expected a list"),
        ([json.dumps(result(start_times=[1.0]))], "start_times: expected a list"),
        ([json.dumps(result(input_lens=[], output_lens=[]))], "at least one usable row"),
        ([json.dumps({"prompt": "What is the capital of India?"})], "tokenizer"),
        ([json.dumps({"conversations": []})], "tokenizer"),
        ([json.dumps({"a": 1, "b\n": 2})], r"keys \['a', 'b\\n'\]"),
        (["[]"], "expected a table .CSV. .* an Azure LLM trace"),
        (["TIMESTAMP,ContextTokens", "1,2"], "got none named GeneratedTokens"),
        (["time,in,out", "1,2,3"], r"line 1: expected a table .CSV. .* got 'time,in,out'"),
        ([""], "got an empty file"),
        (["", "  ", "\t"], "got an empty file"),
        ([HEADER], "at least one usable row, got 0"),
        ([HEADER, "x,y,z"], "line 2, TIMESTAMP"),
    ],
)
def test_unusable_files_are_refused_with_advice(tmp_path, lines, text):
    path = write(tmp_path, lines)
    with pytest.raises(ConfigError, match=text) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused_in_one_line(tmp_path):
    missing = tmp_path / "missing.csv"
    torn = tmp_path / "torn.gz"
    torn.write_bytes(gzip.compress(b"x" * 10_000)[:-20])
    spoilt = tmp_path / "spoilt.gz"
    spoilt.write_bytes(b"\x1f\x8b" + b"\x00" * 50)
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)) * 4)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    for path in (missing, torn, spoilt, binary, empty, tmp_path):
        for skip in (False, True):
            with pytest.raises(ConfigError) as caught:
                read_trace(path, skip_bad_rows=skip)
            assert str(caught.value).startswith(str(path))
            assert "\n" not in str(caught.value)


# Bad rows


@st.composite
def spoilt_files(draw):
    kind = draw(KINDS)
    lines, first = good_lines(kind, draw(st.integers(1, 6)))
    good = len(lines) - first + 1
    bad = []
    for _ in range(draw(st.integers(1, 4))):
        line, column = bad_line(draw, kind)
        lines.insert(draw(st.integers(first - 1, len(lines))), line)
        bad.append((line, column))
    where = [(i, column) for i, line in enumerate(lines, 1) for text, column in bad if line == text]
    # So few stamps tell their unit by nothing else.
    return lines, good, len(bad), where[0], "ms" if kind == "mooncake" else None


@reuse_folder
@given(spoilt=spoilt_files(), zipped=st.booleans(), blanks=st.booleans())
def test_bad_rows_are_refused_by_line_or_counted(tmp_path, spoilt, zipped, blanks):
    lines, good, bad, (number, column), unit = spoilt
    path = write(tmp_path, [*lines, "", "  "] if blanks else lines, zipped=zipped)
    with pytest.raises(ConfigError) as caught:
        read_trace(path, time_unit=unit)
    message = str(caught.value)
    assert message.startswith(f"{path}: line {number}, {column}: expected ")
    assert ", got " in message
    assert message.endswith("pass skip_bad_rows=True (--skip-bad-rows)")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    w = read_trace(path, skip_bad_rows=True, time_unit=unit)
    assert (len(w), w.dropped_rows) == (good, bad)
    assert np.all(w.prompt_tok >= 100)  # what was kept are the good rows


@reuse_folder
@given(kind=KINDS, draw=st.data())
def test_nothing_but_bad_rows_is_refused(tmp_path, kind, draw):
    lines = [HEADER] if kind == "azure" else [request_line(-1.0, 5, 5)]
    lines += [bad_line(draw.draw, kind)[0] for _ in range(3)]
    with pytest.raises(ConfigError):
        read_trace(write(tmp_path, lines), skip_bad_rows=True)


@pytest.mark.parametrize("blocks", ["7", '["a"]', "[-1]", "[1.5]", f"[{2**63}]", "null", "[true]"])
def test_bad_block_ids_are_refused(tmp_path, blocks):
    row = '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": ' + blocks + "}"
    with pytest.raises(ConfigError, match="line 1, hash_ids: expected"):
        read_trace(write(tmp_path, [row]))


def test_azure_files_of_both_years_and_other_writers(tmp_path):
    lines = [
        "\ufeff" + '"GeneratedTokens","extra","TIMESTAMP","ContextTokens"',
        '"5","a","2024-05-10 00:00:01+00:00","30"',
        "6,b,2024-05-10 00:00:00.009930+00:00,40",
        "7,c,2024-05-10 00:00:02.5, 50 ",
    ]
    w = read_trace(write(tmp_path, lines))
    assert w.prompt_tok.tolist() == [40, 30, 50]
    assert w.output_tok.tolist() == [6, 5, 7]
    np.testing.assert_allclose(w.arrival_s, [0.0, 0.99007, 2.49007], atol=1e-9)


def test_whole_floats_pass_as_tokens(tmp_path):
    w = read_trace(write(tmp_path, ['{"prompt_len": 5.0, "output_len": 3, "arrival_s": 0}']))
    assert (w.prompt_tok[0], w.duration_s, w.rate_req_s) == (5, 1.0, 1.0)


def test_bad_seed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="seed"):
        read_trace(write(tmp_path, good_lines("azure")[0]), seed=-1)
