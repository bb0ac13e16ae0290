"""The rooms, their walls, and the rules that hold for every module."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from tests.helpers.paths import ROOT
from voltana_ctrl.units import SUFFIXES

PACKAGE = ROOT / "voltana_ctrl"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600
IMPORT_BUDGET_S = 0.050
HEAVY = {
    "control",
    "cvxpy",
    "httpx",
    "matplotlib",
    "numba",
    "pandas",
    "pyarrow",
    "pynvml",
    "rich",
    "scipy",
    "starlette",
    "typer",
    "uvicorn",
}
VALUES = ("FleetSpec", "Observation", "Decision", "Slo", "VoltanaError")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Walls


def test_rooms_import_only_downwards(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capfd.readouterr().out


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines: split it by purpose"


# The cost of an import


def in_a_fresh_interpreter(program: str) -> str:
    # Bytecode is written by the first run; the budget is for every later one.
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


def test_import_costs_numpy_and_little_more():
    # CPU time, and the least of several runs: neither sees what else the machine is doing.
    program = (
        "import time, numpy\n"
        "start_s = time.process_time()\n"
        "import voltana_ctrl\n"
        "print(time.process_time() - start_s)"
    )
    extra_s = min(float(in_a_fresh_interpreter(program)) for _ in range(6))
    assert extra_s <= IMPORT_BUDGET_S, f"{extra_s * 1e3:.0f} ms over numpy"


@pytest.mark.parametrize(
    "statement",
    ["import voltana_ctrl", f"from voltana_ctrl import {', '.join(VALUES)}"],
    ids=["package", "values"],
)
def test_import_loads_nothing_heavy(statement):
    program = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    assert set(in_a_fresh_interpreter(program).split()) & HEAVY == set()


# Units in names

# Known by these names: `cv` is a coefficient of variation, `pmf` a probability mass function,
# a batch is counted in requests.
WITHOUT_UNIT = {"attainment", "cv", "host_score", "padded_batch", "pmf"}
# Where numbers are of any unit, or enter in the units of vendors.
BOUNDARY = {"checks.py", "control/slots.py", "fit/robust.py", "units.py"}
FLOATS = {"float", "ArrayLike", "F64", "NDArray[np.float64]"}
SUFFIX = re.compile(r"(^|_)(" + "|".join(suffix[1:] for suffix in SUFFIXES) + r")\d?$")


def float_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each public field and parameter annotated as float."""

    def is_float(annotation: ast.expr | None) -> bool:
        if annotation is None:
            return False
        parts = {part.strip() for part in ast.unparse(annotation).split("|")}
        return bool(parts & FLOATS)

    def walk(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and is_float(field.annotation):
                        yield field.lineno, ast.unparse(field.target)
                yield from walk(node.body)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = node.args
                for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs:
                    if is_float(argument.annotation):
                        yield argument.lineno, argument.arg

    yield from walk(ast.parse(path.read_text(encoding="utf-8")).body)


PUBLIC = [
    path
    for path in MODULES
    if path.relative_to(PACKAGE).as_posix() not in BOUNDARY
    and not any(part.startswith("_") for part in path.relative_to(PACKAGE).parts)
]


@pytest.mark.parametrize("path", PUBLIC, ids=relative)
def test_public_quantities_carry_their_unit(path):
    bare = [
        f"{relative(path)}:{line}: {name}"
        for line, name in float_names(path)
        if not name.startswith("_") and name not in WITHOUT_UNIT and not SUFFIX.search(name)
    ]
    assert bare == [], f"no unit suffix of voltana_ctrl.units.SUFFIXES: {bare}"


def test_the_unit_check_sees_a_bare_name(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def wait(delay: float, queue_tok: float | None) -> None: ...\n")
    names = [name for _, name in float_names(path)]
    assert names == ["delay", "queue_tok"]
    assert [name for name in names if not SUFFIX.search(name)] == ["delay"]


# The repository speaks of the project alone

MACHINE_PATH = re.compile(r"/(?:work|root|home|Users)/|/tmp/\w")
TEXT = {".cfg", ".csv", ".ini", ".json", ".md", ".py", ".rst", ".sh", ".toml", ".txt", ".yaml", ""}
SKIPPED = {"_build", "generated", "build", "dist", "venv", "__pycache__"}


def repository_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if path.is_file() and not hidden and not SKIPPED & set(parts) and path.suffix in TEXT:
            yield path


def test_no_machine_paths_in_the_repository():
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_machine_path_check_sees_one():
    assert MACHINE_PATH.search("see /" + "home/someone/trace.csv")
    assert not MACHINE_PATH.search("../shared/data and docs/homework/")
