import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from unittest.mock import patch

import pytest
import typer
from typer.testing import CliRunner

import voltana_ctrl
from voltana_ctrl import BackendError
from voltana_ctrl.backends.nvml.driver import Nvml
from voltana_ctrl.cli import app, main

TIMING = ("sim_wall_s", "decide_p50_s", "decide_p99_s")
SHORT = ["--duration", "10", "--warmup", "2", "--rate", "10"]


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "voltana_ctrl.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def environment(root):
    return {"PYTHONPATH": str(root)}


def test_compare_prints_a_table_that_reads_at_80_columns(tmp_path, environment):
    done = run("compare", *SHORT, "--json", "out.json", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    assert "simulated" in done.stdout
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    for one in runs:
        assert one["policy"] in done.stdout
        assert f"{one['mean_power_w']:.0f}" in done.stdout


def test_a_policy_of_ones_own_is_found_in_the_working_folder(tmp_path, environment):
    (tmp_path / "mine.py").write_text(
        "from voltana_ctrl.control import StaticController\n"
        "class Slow(StaticController):\n"
        "    def __init__(self, fleet, slo): super().__init__(fleet, 900)\n"
    )
    done = run("compare", *SHORT, "--policies", "mine:Slow", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "mine:Slow" in done.stdout


def test_nothing_else_in_the_working_folder_is_run(tmp_path, root):
    """The folder may be anybody's, and who runs the command may be root."""
    folder, script, mark = tmp_path / "anybodys", tmp_path / "voltana-ctrl", tmp_path / "mark"
    folder.mkdir()
    evil = "import os; open(os.environ['MARK'], 'a').write(__name__ + ' ')\n"
    for name in ("csv", "ctypes", "glob", "importlib_metadata", "numba", "statistics", "tomllib"):
        (folder / f"{name}.py").write_text(evil)
    script.write_text("from voltana_ctrl.cli import main; main()\n")
    for command in ("profiles", "policies", "doctor"):
        subprocess.run(
            [sys.executable, script, command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(root), "MARK": str(mark)},
            capture_output=True,
            check=True,
            timeout=120,
        )
    assert not mark.exists(), mark.read_text()


@pytest.mark.slow
def test_processes_give_the_same_figures(tmp_path, environment):
    figures = []
    for jobs in ("1", "4"):
        done = run(
            "compare", *SHORT, "--json", "o.json", "--jobs", jobs, cwd=tmp_path, **environment
        )
        assert done.returncode == 0, done.stderr
        runs = json.loads((tmp_path / "o.json").read_text())["runs"]
        figures.append([{k: v for k, v in one.items() if k not in TIMING} for one in runs])
    assert figures[0] == figures[1]


def test_the_row_of_a_trace_has_its_load_and_its_figures(tmp_path, environment):
    """Its load is known only once it has been read."""
    arrivals = "".join(f"{0.2 * k},100,20\n" for k in range(200))
    (tmp_path / "own.csv").write_text(f"arrival_s,prompt_tok,output_tok\n{arrivals}")
    done = run(
        "compare", "--workload", "own.csv", "--duration", "20", "--warmup", "2",
        "--policies", "static-max", cwd=tmp_path, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "static-max" in line).split()
    assert float(row[0]) == pytest.approx(5.0, rel=0.02)
    assert float(row[2]) > 200.0


@pytest.mark.slow
def test_the_azure_trace_runs_from_the_command_line(tmp_path, environment, shared_data):
    trace = shared_data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz"
    done = run(
        "compare", "--workload", str(trace), "--duration", "3400", "--policies",
        "static-max,static-1005,voltanallm", "--json", "out.json", cwd=tmp_path, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for one in json.loads((tmp_path / "out.json").read_text())["runs"]:
        parts = sum(one[f"energy_{p}_j"] for p in ("prefill", "decode", "idle", "transfer"))
        assert parts == pytest.approx(one["energy_j"], rel=1e-12)
        assert one["requests_arrived"] == (
            one["requests_completed"] + one["requests_in_flight"] + one["requests_dropped"]
        )
        assert one["requests_arrived"] > 18_000
        assert one["requests_dropped"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--rate", "ten"], "rate: expected numbers"),
        (["compare", "--rate", "-5"], "rate: expected a number > 0"),
        (["compare", "--fleet", "2X2D"], "fleet: expected xPyD"),
        (["compare", "--profile", "h100"], "profile: expected one of"),
        (["compare", "--workload", "nothing.csv"], "workload 'nothing.csv'"),
        (["compare", "--slo", "ttft=1"], "slo: itl is missing"),
        (["compare", "--policies", "voltana"], "did you mean voltanallm"),
        (["compare", "--seeds", "0"], "seeds"),
        (["compare", "--seeds", "x"], "seeds"),
        (["compare", "--jobs", "-1"], "jobs"),
        (["compare", "--actuation-ms", "-1"], "actuation-ms"),
        (["compare", "--json", "no/such/folder/o.json"], "does not exist"),
        (["compare", "--nothing"], "--nothing"),
        (["compare", "--power-budget-w", "1200W"], "got '1200W'"),
        (["compare", "--csv", "out.txt"], "csv: expected a .csv file"),
        (["compare", "--series", "out.txt"], "expected a .csv or .parquet file"),
        (["compare", "--store", "kept", "--plot", "out.png"], "store: it keeps figures of runs"),
        (["compare", "--config", "none.toml"], "config none.toml: cannot be read"),
        (["fit", "none.csv"], "expected a file, got none of that name"),
        (["fit", "none.csv", "--fix", "rise_frac"], "expected NAME=VALUE"),
        (["fit", "none.csv", "--like", "a100"], "profile: expected one of"),
        (["agent"], "expected --fleet"),
        (["setter"], "--gpu"),
        (["controller"], "--fleet"),
        (["serve", "--fleet", "none.toml"], "none.toml"),
        (["serve", "--fleet", "f.toml", "--mode", "play"], "mode: expected one of"),
        (["agent", "--fleet", "f.toml", "--tick-ms", "0"], "tick-ms: expected a number > 0"),
        (["agent", "--fleet", "f.toml", "--log", "ticks.txt"], "log: expected a .jsonl file"),
        (["fit", "none.csv", "--out", "mine.txt"], "out: expected a .toml file"),
        (["compare", "--policies", "static-1000"], "choose static-990 or static-1005"),
        (["profile", "http://127.0.0.1:9"], "profile: expected either --gpu, whose clock"),
        (["profile", "http://127.0.0.1:9", "--no-clock", "--dry-run"], "or --freq-mhz"),
        (["profile", "http://127.0.0.1:9", "--freq-mhz", "9", "--steady", "0"], "--steady: exp"),
        (["compare", "--forecast", "none.csv"], "forecast none.csv: cannot be read"),
        (["agent", "--fleet", "f.toml", "--forecast", "n.csv"], "forecast n.csv: cannot be read"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["voltana-ctrl", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert words in told.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "ten"], ["--policies", "voltana"], ["--slo", "ttft=1"], ["--fleet", "2X2D"],
        ["--profile", "h100"], ["--workload", "nothing.csv"], ["--power-budget-w", "1200W"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_mistyped_option_is_told_before_the_simulator_is_loaded(arguments, environment):
    program = (
        "import sys; from voltana_ctrl.cli import main\n"
        f"sys.argv = ['voltana-ctrl', 'compare', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, *{'numba', 'scipy', 'cvxpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["2"]


def test_the_module_is_the_command(environment):
    done = subprocess.run(
        [sys.executable, "-m", "voltana_ctrl", "--version"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["voltana-ctrl", voltana_ctrl.__version__]


def test_lists_are_told_to_programs_too(environment):
    policies = json.loads(run("policies", "--json", **environment).stdout)
    assert {"static-max", "mpc", "bound"} <= {one["name"] for one in policies["policies"]}
    profiles = json.loads(run("profiles", "--json", **environment).stdout)["profiles"]
    assert all(one["clocks_mhz"] and one["status"] for one in profiles)


def test_the_shell_completes_policies_in_a_list(environment):
    program = "import sys; from voltana_ctrl.cli import main; sys.argv = ['voltana-ctrl']; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ, **environment, "_VOLTANA_CTRL_COMPLETE": "complete_bash",
            "COMP_WORDS": "voltana-ctrl compare --policies static-max,voltanallm-f",
            "COMP_CWORD": "3",
        },
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["static-max,voltanallm-full-ladder"]


def test_policies_and_profiles_are_listed(environment):
    listed = run("policies", **environment)
    assert listed.returncode == 0
    assert "voltanallm-full-ladder" in listed.stdout
    known = run("profiles", **environment)
    assert known.returncode == 0
    lines = known.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 5 * sum("/" in line and not line.startswith(" ") for line in lines)
    assert "extrapolated" in known.stdout
    assert "a100-sxm-80gb/llama-3.1-8b" in known.stdout


def test_fit_writes_a_profile_that_compare_runs(tmp_path, environment, shared_data):
    tables = [str(path) for path in sorted(shared_data.glob("a800_qwen3_32b_dvfs_*.csv"))]
    done = run(
        "fit", *tables, "--where", "tp=1", "--like", "a800-sxm-80gb/qwen3-32b",
        "--name", "mine/32b", "--out", "mine.toml", "--plot", "fit.png",
        cwd=tmp_path, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    compared = run(
        "compare", "--profile", "mine.toml", "--rate", "1", "--duration", "10", "--warmup", "2",
        "--policies", "static-max", cwd=tmp_path, **environment,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert "mine/32b" in compared.stdout


def test_doctor_says_in_one_line_what_the_machine_can_do(environment):
    done = run("doctor", "--json", **environment)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["schema"] == "voltana-ctrl/doctor/1"


def test_a_dry_run_plans_without_a_driver(tmp_path, environment):
    with suppress(BackendError), Nvml():
        pytest.skip("a driver answers here")
    given = ["profile", "http://127.0.0.1:9", "--dry-run"]
    done = run(*given, "--gpu", "GPU-1", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA driver here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.startswith("161 points to measure")
    assert len(re.findall(r"^\d+ MHz: ", done.stdout, re.MULTILINE)) == 7
    done = run(*given, "--no-clock", "--freq-mhz", "1410", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "22 points" in done.stdout
    assert done.stderr == ""


def test_the_limits_of_profiling_are_told_by_options_there_are(root):
    page = (root / "docs" / "profiling.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    there = {name for of in ("profile", "fit") for one in commands[of].params for name in one.opts}
    named = set(re.findall(r"`[^`\n]*?(--[\w-]+)", page))
    assert {"--max-c", "--cool-c", "--max-ttft", "--max-itl", "--no-clock"} <= named <= there


@pytest.mark.parametrize("name", ["controller", "router", "serve"])
def test_certificates_are_given_by_the_same_options(name):
    options = {one: of for of in typer.main.get_command(app).commands[name].params
               for one in of.opts}  # fmt: skip
    assert not options["--tls-cert"].hidden
    assert not options["--tls-key"].hidden


def test_what_went_to_commands_of_its_own_is_hidden_and_there():
    options = {one: of for of in typer.main.get_command(app).commands["agent"].params
               for one in of.opts}  # fmt: skip
    former = ["--setter", "--dashboard", "--serve", "--tls-cert", "--tls-certificate", "--gpu"]
    assert all(options[name].hidden for name in former)


def test_help_names_the_commands(environment):
    for arguments in (["--help"], []):
        shown = run(*arguments, **environment)
        assert shown.returncode in (0, 2)
        assert "compare" in shown.stdout + shown.stderr
        assert "voltana-ctrl:" not in shown.stderr


def test_help_shows_every_bracket():
    """Rich takes [words] for markup, and leaves them out, unless they are escaped."""
    commands = typer.main.get_command(app).commands
    assert len(commands) > 5
    bracketed = 0
    for name, one in commands.items():
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        words = " ".join(shown.replace("│", " ").split())
        assert "[]" not in words
        for option in one.params:
            if "[" in (getattr(option, "help", None) or ""):
                bracketed += 1
                assert option.help in words, name
    assert bracketed > 10


def test_the_version_is_that_of_the_package(environment):
    done = run("--version", **environment)
    assert done.returncode == 0
    assert done.stdout.split() == ["voltana-ctrl", voltana_ctrl.__version__]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--duration", "0"),
        ("--tick-ms", "nan"),
        ("--warmup", "-1"),
        ("--actuation-ms", "inf"),
        ("--settle-ms", "-2"),
        ("--jitter", "nan"),
        ("--jobs", "-1"),
    ],
)
def test_a_number_out_of_range_is_refused_by_the_name_of_its_option(option, value, capsys):
    with (
        pytest.raises(SystemExit) as ended,
        patch.object(sys, "argv", ["voltana-ctrl", "compare", option, value]),
    ):
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"voltana-ctrl: {option[2:]}: expected a number")


def test_what_is_the_same_has_one_name_in_every_command():
    """Of these, some commands once had another name."""
    names = {name for one in typer.main.get_command(app).commands.values() for of in one.params
             if not getattr(of, "hidden", False) for name in of.opts}  # fmt: skip
    assert {"--socket", "--price-kwh", "--co2-g-kwh", "--tls-cert"} <= names
    assert not {"--setter", "--price", "--co2", "--tls-certificate"} & names
