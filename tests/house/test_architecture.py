"""The rooms, their walls, and the rules that hold for every module."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_rooms_import_only_downwards():
    # In a process of its own: it configures logging, which would silence our loggers here.
    program = (
        "from importlinter.cli import lint_imports\nraise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines: split it by purpose"


# Tests mirror the rooms

TESTS = ROOT / "tests"
#: Folders of tests that are no room of the package.
BESIDE = {"contract", "helpers", "house", "oracles", "story"}


def mirrored(path: Path, package: Path = PACKAGE) -> bool:
    """Whether a test file is named after a module, a room, or a module and what it is about.

    Such as ``router/test_app.py`` and ``router/test_app_hostile.py`` of ``router/app.py``, or
    ``report/test_report.py`` of the room ``report``.
    """
    room = package / path.parent
    words = path.stem.removeprefix("test_").split("_")
    names = ["_".join(words[:length]) for length in range(len(words), 0, -1)]
    return room.is_dir() and any(
        (room / f"{name}.py").is_file() or (room / name).is_dir() or name == room.name
        for name in names
    )


TEST_FILES = [
    path.relative_to(TESTS)
    for path in sorted(TESTS.rglob("test_*.py"))
    if path.relative_to(TESTS).parts[0] not in BESIDE
]


@pytest.mark.parametrize("path", TEST_FILES, ids=str)
def test_test_files_stand_where_the_code_stands(path):
    assert mirrored(path), f"tests/{path} mirrors nothing in voltana_ctrl/{path.parent}"


def test_every_room_has_its_tests():
    without = {"serving", "fakes"}  # exercised by those who use them: router, live, backends
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    tested = {path.parts[0] for path in TEST_FILES}
    assert rooms - without <= tested
    assert {path.parts[0] for path in TEST_FILES if len(path.parts) > 1} <= rooms


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("router/test_app.py", True),
        ("router/test_app_hostile.py", True),
        ("backends/nvml/test_gpus.py", True),
        ("report/test_report.py", True),
        ("test_guard.py", True),
        ("router/test_guard.py", False),
        ("nowhere/test_app.py", False),
        ("test_nothing.py", False),
    ],
)
def test_the_mirror_check_tells_right_from_wrong(path, right):
    assert mirrored(Path(path)) == right


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
# `spare` is a number of instances, or a share of them; a `covariance` is of several units.
WITHOUT_UNIT = {"attainment", "covariance", "cv", "host_score", "padded_batch", "pmf", "spare"}
# Where numbers are of any unit, or enter in the units of vendors.
BOUNDARY = {"checks.py", "control/supply.py", "fit/robust.py", "units.py"}
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
