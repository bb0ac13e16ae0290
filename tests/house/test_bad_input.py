"""Bad input, drawn from grammars: exit status 2 and one line that names file, place and mend."""

import gzip
import io
import json
import os
import string
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from voltana_ctrl import ConfigError, FleetSpec, load_profile
from voltana_ctrl.cli import main
from voltana_ctrl.sim.faults import FaultSchedule, read_faults
from voltana_ctrl.sim.traces import read_trace

HEAVY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
few = settings(max_examples=70, suppress_health_check=HEAVY)
some = settings(max_examples=300, suppress_health_check=HEAVY)
many = settings(max_examples=800, suppress_health_check=HEAVY)


class AcceptedError(Exception):
    """A run began: the input was taken for good."""


def run(*arguments):
    """Exit status, standard output and standard error of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("voltana_ctrl.experiment.Run.simulate", side_effect=AcceptedError),
        mock.patch.object(sys, "argv", ["voltana-ctrl", *arguments]),
        mock.patch.object(sys, "path", list(sys.path)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as left:
            status = left.code
    return status, out.getvalue(), err.getvalue()


def assert_refused(arguments, folder, *words):
    before = sorted(path.name for path in folder.iterdir())
    status, out, err = run(*arguments)
    assert status == 2, f"{arguments}: status {status}\n{out}\n{err}"
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("voltana-ctrl: ")
    assert len(err) > 30
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"
    assert sorted(path.name for path in folder.iterdir()) == before, "something was written"


# Command lines

printable = st.text(string.ascii_letters + string.digits + " .,:;=-_/\\'\"%{}[]é", max_size=12)
not_numbers = st.one_of(
    printable.filter(lambda text: not all(map(_is_float, text.split(",")))),
    st.sampled_from(["nan", "inf", "-inf", "", "1e999", "0x10", "1;2", "ten"]),
)
not_positive = st.one_of(
    st.sampled_from(["0", "-0", "-1", "nan", "inf", "-inf", "-1e-300"]),
    st.floats(max_value=0.0, allow_nan=False).map(repr),
)


def _is_float(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_int(text):
    try:
        int(text)
    except ValueError:
        return False
    return True


not_whole = st.one_of(
    printable.filter(lambda text: not _is_int(text)),
    st.floats(0.1, 9.9).filter(lambda number: not number.is_integer()).map(repr),
)
not_fleets = st.one_of(
    printable.filter(lambda text: not text.upper().strip().endswith(("D", "C", ".TOML"))),
    st.sampled_from(["0P2D", "2P0D", "0C", "2P", "D2", "2D2P", "999999P1D", "none.toml", "x.toml"]),
)
bad_slos = st.one_of(
    printable,
    st.builds(
        lambda ttft, itl, share: f"ttft={ttft},itl={itl},attainment={share}",
        st.one_of(not_positive, not_numbers),
        st.sampled_from(["0.06", "0", "x"]),
        st.sampled_from(["0.99", "1", "99", "nan"]),
    ),
    st.builds(lambda key: f"ttft=1,itl=1,{key}", printable.filter(lambda text: "=" in text)),
).filter(lambda text: "attainment=0." not in text)
bad_policies = st.one_of(
    st.text(string.ascii_lowercase + "-", min_size=1, max_size=12).map(lambda text: "zz" + text),
    st.builds(
        "zz{}:{}".format,
        st.text(string.ascii_lowercase, max_size=5),
        st.text(string.ascii_letters, max_size=5),
    ),
    st.sampled_from(["static-0", "static-99999", "static--1", "json:", ":x", "json:dumps",
                     "os:nope", "static-max,,", "voltanallm;bound", "string:Template",
                     "..:x", "a..b:c"]),
)  # fmt: skip

# Shape, parameter, number: at least one of them does not fit.
bad_arrivals = st.one_of(
    printable.filter(lambda text: text not in {"poisson", "diurnal"}),
    st.builds("poisson:{}".format, printable.filter(bool)),
    st.builds("gamma:cv={}".format, st.one_of(not_positive, not_numbers, st.just("101"))),
    st.builds("gamma:{}=2".format, printable.filter(lambda text: text != "cv")),
    st.builds("mmpp:high_s=5,low_s={}".format, st.one_of(not_positive, not_numbers)),
    st.builds("mmpp:high_s=5,low_s=5,low_rate_frac={}".format, st.floats(1.01, 1e9)),
    st.builds("diurnal:period_s={}".format, st.one_of(not_positive, not_numbers)),
    st.sampled_from(["gamma", "gamma:", "mmpp:high_s=5", "gamma:cv=2,cv=2", "gamma:cv=2,",
                     "diurnal:swing_frac=1.1", "Poisson", "gamma=2"]),
)  # fmt: skip

bad_deferrals = st.one_of(
    printable,
    st.builds("0.5:{}".format, st.one_of(not_positive, not_numbers)),
    st.builds("{}:60".format, st.one_of(st.floats(max_value=-1e-3), st.floats(min_value=1.01))),
    st.sampled_from(["0.5", ":", "0.5:", ":60", "batch:60", "nan:60", "0.5:inf"]),
)
bad_steps = st.one_of(
    printable.map(lambda text: "zz" + text),
    st.builds("0:1000,{}:900".format, st.one_of(st.floats(max_value=-1e-3), st.just("zz"))),
    st.builds("0:1000,5:{}".format, st.sampled_from(["nan", "inf", "-inf", "", "x"])),
    st.sampled_from(["0:", ":", "5:1", "0:1000,9:900,9:800", "no-such.csv", ".csv", "0:1:2"]),
)

COMMAND_LINES = st.one_of(
    st.tuples(st.just("--fleet"), not_fleets),
    st.tuples(st.just("--profile"), printable.map(lambda text: "zz" + text)),
    st.tuples(st.just("--workload"), printable.map(lambda text: "zz" + text)),
    st.tuples(st.just("--rate"), st.one_of(not_positive, not_numbers)),
    st.tuples(st.just("--rate"), not_positive.map(lambda text: f"10,{text}")),
    st.tuples(st.just("--duration"), st.one_of(not_positive, not_numbers)),
    st.tuples(st.just("--warmup"), st.sampled_from(["-1", "nan", "inf", "x", ""])),
    st.tuples(st.just("--seeds"), st.one_of(st.integers(max_value=0).map(str), not_whole)),
    st.tuples(st.just("--jobs"), st.one_of(st.integers(max_value=-1).map(str), not_whole)),
    st.tuples(st.just("--concurrency"), st.one_of(st.integers(max_value=0).map(str), not_whole)),
    st.tuples(st.just("--tick-ms"), st.one_of(not_positive, not_numbers)),
    st.tuples(st.just("--slo"), bad_slos),
    st.tuples(st.just("--policies"), bad_policies),
    st.just(("--seeds", "9" * 20)),
    st.tuples(st.just("--actuation-ms"), st.sampled_from(["-1", "nan", "inf", "fast"])),
    st.tuples(st.just("--settle-ms"), st.sampled_from(["-1", "nan", "inf", "fast"])),
    st.tuples(st.just("--arrivals"), bad_arrivals),
    st.just(("--arrivals", "poisson", "--concurrency", "4")),
    st.tuples(st.just("--defer"), bad_deferrals),
    st.just(("--defer", "0.5:60", "--concurrency", "4")),
    st.tuples(st.sampled_from(["--price-kwh", "--co2-g-kwh", "--power-budget-w"]), bad_steps),
    st.tuples(
        st.just("--power-budget-w"),
        st.just("900"),
        st.just("--budget-notice-s"),
        st.sampled_from(["-1", "nan", "soon", ""]),
    ),
    st.just(("--budget-notice-s", "60")),
    st.tuples(st.just("--roles"), printable.map(lambda text: "zz" + text)),
    st.just(("--roles", "flexible", "--fleet", "4C")),
    st.tuples(st.just("--faults"), printable.map(lambda text: "zz" + text)),
    st.tuples(st.just("--json"), st.sampled_from(["no/such/out.json", ".", "/"])),
    printable.map(lambda text: ("--zz" + text.replace("=", ""),)),
    st.just(("--rate", "10", "--concurrency", "4")),
    st.sampled_from([("--fleet",), ("--rate",), ("--json",), ("stray",)]),
)


def check_command_line(options, folder):
    assert_refused(["compare", *options], folder)


@few
@given(options=COMMAND_LINES)
def test_bad_command_lines(options, here):
    check_command_line(options, here)


@pytest.mark.slow
@many
@given(options=COMMAND_LINES)
def test_many_bad_command_lines(options, here):
    check_command_line(options, here)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# TOML fleets

GOOD_TABLE = {
    "role": "decode",
    "profile": "a100-sxm-80gb/llama-3.1-8b",
    "count": 2,
    "max_batch": 64,
}
toml_values = st.one_of(
    st.integers(-5, 5),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    printable,
    st.lists(st.one_of(st.integers(-5, 2000), printable, st.booleans()), max_size=3),
    st.just({}),
    st.sampled_from(["1979-05-27", "07:32:00"]).map(lambda text: type("Raw", (str,), {})(text)),
)
KEYS = (
    "id", "role", "profile", "count", "gpus", "node", "clocks_mhz", "kv_capacity_tok",
    "max_batch", "prefill_budget_tok", "max_prefill_req", "idle_w", "asleep_w", "wake_s", "roles",
    "turn_s", "parked", "deep_parked", "off", "color",
)  # fmt: skip


def as_toml(value):
    if type(value).__name__ == "Raw":
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True)
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, dict):
        return "{}"
    return repr(value)


def table_text(table):
    return "[[instance]]\n" + "".join(f"{key} = {as_toml(v)}\n" for key, v in table.items())


@st.composite
def toml_fleets(draw):
    """Fleets with one value, key or character that does not fit."""
    prefill = {"role": "prefill", "profile": "a100-sxm-80gb/llama-3.1-8b"}
    table = dict(GOOD_TABLE)
    how = draw(st.sampled_from(["value", "key", "drop", "text", "top", "bytes"]))
    if how == "value":
        table[draw(st.sampled_from(KEYS))] = draw(toml_values)
    elif how == "key":
        table[draw(st.text(string.ascii_lowercase, min_size=1, max_size=9))] = draw(toml_values)
    elif how == "drop":
        del table[draw(st.sampled_from(["role", "profile"]))]
    text = table_text(prefill) + table_text(table)
    if how == "text":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(printable) + text[at + draw(st.integers(0, 9)) :]
    elif how == "top":
        text = f"{draw(st.sampled_from(KEYS))} = {as_toml(draw(toml_values))}\n" + text
    data = text.encode()
    if how == "bytes":
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
    return data


def check_fleet(data, folder):
    path = folder / "fleet.toml"
    path.write_bytes(data)
    with suppress(ConfigError):
        FleetSpec.from_toml(path, load_profile)
        assume(False)  # what was drawn happens to be a fleet
    assert_refused(["compare", "--fleet", "fleet.toml"], folder, "fleet.toml")


@few
@given(data=toml_fleets())
def test_bad_fleets(data, here):
    check_fleet(data, here)


@pytest.mark.slow
@many
@given(data=toml_fleets())
def test_many_bad_fleets(data, here):
    check_fleet(data, here)


# Fault files

FAULT_KEYS = ("instance", "from_s", "until_s", "slow_frac", "clamp_mhz", "color")
GOOD_FAULTS = {
    "failure": {"instance": "decode-0", "from_s": 40.0, "until_s": 60.0},
    "slowdown": {"instance": "decode-1", "slow_frac": 1.5, "from_s": 40.0},
    "clock_clamp": {"instance": "prefill-0", "clamp_mhz": 900.0, "from_s": 0.0},
}


def faults_text(faults):
    return "".join(
        f"[[{kind}]]\n" + "".join(f"{key} = {as_toml(v)}\n" for key, v in table.items())
        for kind, table in faults.items()
    )


@st.composite
def fault_files(draw):
    """Faults with one value, key, table or character that does not fit."""
    faults = {kind: dict(table) for kind, table in GOOD_FAULTS.items()}
    kind = draw(st.sampled_from(list(faults)))
    how = draw(st.sampled_from(["value", "drop", "kind", "span", "text"]))
    if how == "value":
        faults[kind][draw(st.sampled_from(FAULT_KEYS))] = draw(toml_values)
    elif how == "drop":
        del faults[kind][draw(st.sampled_from(["instance", "from_s"]))]
    elif how == "kind":
        faults[draw(st.text(string.ascii_lowercase, min_size=1, max_size=9))] = faults.pop(kind)
    elif how == "span":
        faults[kind]["until_s"] = draw(st.floats(max_value=faults[kind]["from_s"]))
    text = faults_text(faults)
    if how == "text":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(printable) + text[at + draw(st.integers(0, 9)) :]
    return text.encode()


def check_faults(data, folder):
    path = folder / "faults.toml"
    path.write_bytes(data)
    fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    with suppress(ConfigError):
        FaultSchedule(fleet, read_faults(path))
        assume(False)  # what was drawn happens to be faults of this fleet
    assert_refused(["compare", "--faults", "faults.toml"], folder)


@few
@given(data=fault_files())
def test_bad_faults(data, here):
    check_faults(data, here)


@pytest.mark.slow
@some
@given(data=fault_files())
def test_many_bad_faults(data, here):
    check_faults(data, here)


# Trace files

json_values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(-(2**70), 2**70),
    st.floats(), printable, st.just([]), st.just({}), st.lists(st.integers(-2, 2), max_size=2),
)  # fmt: skip
bad_cells = st.sampled_from(
    ["", "0", "-1", "1.5", "nan", "ten", "1e99", "9" * 30, '"', "\N{FULLWIDTH DIGIT ONE}"]
)


def mooncake(row):
    good = {"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [1]}
    return "\n".join(json.dumps(one) for one in (good, {**good, **row}, good))


def request_rows(row):
    good = {"prompt_len": 100, "output_len": 5, "arrival_s": 1.0}
    return "\n".join(json.dumps(one) for one in (good, {**good, **row}, good))


def result(change):
    good = {"input_lens": [100, 7], "output_lens": [5, 9], "start_times": [0.5, 1.0]}
    return json.dumps({**good, **change})


def azure(cells, header="TIMESTAMP,ContextTokens,GeneratedTokens"):
    return f"{header}\n2023-11-16 18:15:46.68,374,44\n{','.join(cells)}\n"


changes = {
    mooncake: ["timestamp", "input_length", "output_length", "hash_ids"],
    request_rows: ["prompt_len", "output_len", "arrival_s"],
    result: ["input_lens", "output_lens", "start_times"],
}


@st.composite
def trace_files(draw):
    """Trace files with one cell, row, header or byte that does not fit."""
    how = draw(st.sampled_from(["json", "csv", "header", "text", "bytes", "gzip", "empty"]))
    if how == "json":
        write = draw(st.sampled_from(list(changes)))
        return write({draw(st.sampled_from(changes[write])): draw(json_values)}).encode()
    if how == "csv":
        cells = ["2023-11-16 18:15:50.68", "396", "109"]
        cells[draw(st.integers(0, 2))] = draw(bad_cells)
        return azure(cells[: draw(st.integers(1, 3))]).encode()
    if how == "header":
        names = draw(st.lists(printable, max_size=4))
        return azure(["2023-11-16 18:15:50.68", "396", "109"], ",".join(names)).encode()
    if how == "empty":
        return draw(st.sampled_from([b"", b"\n\n", b" ", b"\x00", b"\xef\xbb\xbf", b"[]", b"{}"]))
    data = draw(
        st.sampled_from([mooncake({}), request_rows({}), result({}), azure(["x"])])
    ).encode()
    if how == "gzip":
        packed = gzip.compress(data, mtime=0)
        return packed[: draw(st.integers(2, len(packed) - 1))]
    at = draw(st.integers(0, len(data)))
    junk = draw(printable).encode() if how == "text" else draw(st.binary(min_size=1, max_size=6))
    return data[:at] + junk + data[at + draw(st.integers(0, 30)) :]


def check_trace(data, folder):
    path = folder / "trace.any"
    path.write_bytes(data)
    with suppress(ConfigError):
        read_trace(path)
        assume(False)  # what was drawn happens to be a trace
    assert_refused(["compare", "--workload", "trace.any"], folder, "trace.any")


@few
@given(data=trace_files())
def test_bad_traces(data, here):
    check_trace(data, here)


@pytest.mark.slow
@many
@given(data=trace_files())
def test_many_bad_traces(data, here):
    check_trace(data, here)


@pytest.mark.parametrize("kind", ["faults", "fleet", "workload"])
def test_a_folder_in_place_of_a_file_is_refused(kind, here):
    (here / "folder.toml").mkdir()
    assert_refused(["compare", f"--{kind}", "folder.toml"], here, "folder.toml")


def test_a_file_that_may_not_be_read_is_refused(here):
    path = here / "secret.toml"
    path.write_text("")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert_refused(["compare", "--fleet", "secret.toml"], here, "secret.toml")


def test_what_is_good_is_not_refused(here):
    """The ground from which the grammars depart."""
    Path("fleet.toml").write_text(
        table_text({**GOOD_TABLE, "role": "prefill"}) + table_text(GOOD_TABLE)
    )
    assert len(FleetSpec.from_toml("fleet.toml", load_profile)) == 4
    Path("faults.toml").write_text(faults_text(GOOD_FAULTS))
    assert len(read_faults("faults.toml")) == 3
    rows = (mooncake({}), request_rows({}), result({}), azure(["2023-11-16 18:15:50.68", "1", "1"]))
    for text in rows:
        Path("trace").write_text(text)
        assert len(read_trace("trace")) >= 2
