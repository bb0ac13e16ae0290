"""The documentation says what the code does, and says it of everything public."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import voltana_ctrl
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
# `voltana-ctrl --help` is the reference of the one; the other goes with the next release.
UNCHECKED = {"voltana_ctrl.cli", "voltana_ctrl.moved"}


def public_modules() -> list[ModuleType]:
    """Modules that declare what is public, and that no package around them speaks for."""
    names = [
        info.name
        for info in pkgutil.walk_packages(voltana_ctrl.__path__, "voltana_ctrl.")
        if "._" not in info.name and info.name not in UNCHECKED
    ]
    modules = {name: importlib.import_module(name) for name in names}
    declaring = {name for name, module in modules.items() if hasattr(module, "__all__")}
    return [modules[name] for name in sorted(declaring) if not spoken_for(name, declaring)]


def spoken_for(name: str, declaring: set[str]) -> bool:
    """Whether a package around a module, but for the whole one, says what is public of it."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in declaring for length in range(2, len(parts)))


MODULES = public_modules()
NAMES = [(module.__name__, name) for module in MODULES for name in module.__all__]
OBJECTS = {f"{module}.{name}": getattr(sys.modules[module], name) for module, name in NAMES}
# Each once, however often it is re-exported. A constant has no docstring at run time; Sphinx
# reads the comment above it.
DOCUMENTED = {
    f"{value.__module__}.{value.__qualname__}": value
    for value in OBJECTS.values()
    if inspect.isclass(value) or inspect.isroutine(value)
}


def section(docstring: str, title: str) -> str:
    """Text of a section of a NumPy docstring; empty where there is none."""
    pattern = rf"^{title}\n-{{{len(title)}}}\n(.*?)(?=^\w[\w ]*\n-{{3,}}$|\Z)"
    found = re.search(pattern, docstring, flags=re.MULTILINE | re.DOTALL)
    return found.group(1) if found else ""


def documented_parameters(docstring: str) -> set[str]:
    # A result that nobody constructs by hand lists its fields as attributes.
    text = section(docstring, "Parameters") + section(docstring, "Attributes")
    heads = re.findall(r"^(\*{0,2}\w.*?)(?: : .*)?$", text, re.MULTILINE)
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def parameters(value: object) -> set[str]:
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            return {field.name for field in dataclasses.fields(value) if field.init}
        if "__init__" not in vars(value) or getattr(value, "_is_protocol", False):
            return set()
    signature = inspect.signature(value)
    return {name for name in signature.parameters if name not in {"self", "cls"}}


def test_every_public_module_says_what_is_public():
    silent = [
        info.name
        for info in pkgutil.iter_modules(voltana_ctrl.__path__, "voltana_ctrl.")
        if "._" not in info.name
        and info.name not in UNCHECKED
        and not info.ispkg  # a package may leave it to its modules
        and not hasattr(importlib.import_module(info.name), "__all__")
    ]
    assert silent == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_names_exist_and_are_told_once(module):
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", DOCUMENTED)
def test_docstring_names_every_parameter(path):
    docstring = inspect.getdoc(DOCUMENTED[path]) or ""
    missing = parameters(DOCUMENTED[path]) - documented_parameters(docstring)
    assert missing == set(), f"{path}: not under Parameters or Attributes: {sorted(missing)}"


@pytest.mark.parametrize("path", DOCUMENTED)
def test_docstring_names_no_parameter_that_is_gone(path):
    value = DOCUMENTED[path]
    docstring = inspect.getdoc(value) or ""
    gone = documented_parameters(docstring) - parameters(value)
    assert gone == set(), f"{path}: documented but not taken: {sorted(gone)}"


def behaves(value: object) -> bool:
    """Whether there is something to show: records, errors and protocols only say what they hold."""
    if not inspect.isclass(value):
        return True
    if issubclass(value, BaseException) or getattr(value, "_is_protocol", False):
        return False
    own = [name for name, one in vars(value).items() if inspect.isroutine(one) and name[0] != "_"]
    return bool(own) or not dataclasses.is_dataclass(value)


@pytest.mark.parametrize("path", [path for path, value in DOCUMENTED.items() if behaves(value)])
def test_docstring_runs_an_example(path):
    docstring = inspect.getdoc(DOCUMENTED[path]) or ""
    assert ">>> " in section(docstring, "Examples"), f"{path}: no example"


def test_no_example_shows_the_source_in_place_of_behaviour():
    shows_nothing = re.compile(r">>> .*(__doc__|__slots__|__name__|hasattr\(|issubclass\()")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(Path(voltana_ctrl.__path__[0]).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if shows_nothing.search(line)
    ]
    assert found == []


def test_the_parameter_check_sees_what_is_missing():
    def wait(delay_s: float, limit_s: float) -> None:
        """Wait.

        Parameters
        ----------
        delay_s, extra_s : float
            How long.

        Examples
        --------
        >>> wait(1.0, 2.0)
        """

    docstring = inspect.getdoc(wait)
    assert documented_parameters(docstring) == {"delay_s", "extra_s"}
    assert parameters(wait) == {"delay_s", "limit_s"}
    assert section(docstring, "Examples") == ">>> wait(1.0, 2.0)"


def test_reference_lists_every_public_module():
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^   (voltana_ctrl[\w.]*)$", reference, re.MULTILINE))
    # What a package re-exports is documented there.
    shown = {id(OBJECTS[path]) for path in OBJECTS if path.rpartition(".")[0] in listed}
    assert [path for path in OBJECTS if id(OBJECTS[path]) not in shown] == []
    gone = [name for name in sorted(listed) if importlib.util.find_spec(name) is None]
    assert gone == []


def test_reference_lists_every_exported_name():
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"\{py:obj\}`~voltana_ctrl\.(\w+)`", reference)
    assert sorted(listed) == voltana_ctrl.__all__


@pytest.mark.slow
def test_built_reference_holds_every_public_name(tmp_path):
    pytest.importorskip("sphinx", reason="needs the docs extra")
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", tmp_path / "trees"]
    subprocess.run([*command, DOCS, tmp_path / "html"], cwd=ROOT, check=True, timeout=600)
    with (tmp_path / "html" / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", os.path.join)
    built = {name for role, names in inventory.items() if role.startswith("py:") for name in names}
    shown = {id(OBJECTS[path]) for path in OBJECTS if path in built}
    assert [path for path in OBJECTS if id(OBJECTS[path]) not in shown] == []


def code_names(page: Path) -> list[str]:
    """Names of this package that a page gives in code font."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`~?(voltana_ctrl(?:\.\w+)+)(?:\(\))?`", text)


PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_names_in_pages_exist(page):
    gone = [name for name in code_names(page) if not exists(name)]
    assert gone == [], f"{page.name} names what the code does not have"


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one at any depth."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_the_name_check_tells_present_from_absent():
    assert exists("voltana_ctrl.types.FleetSpec.pd")
    assert not exists("voltana_ctrl.types.FleetSpec.px")
    assert not exists("voltana_ctrl.absent")


def equations(text: str) -> tuple[int, set[str], set[str]]:
    """Count displayed equations; their labels; the labels that a table row gives code for."""
    displayed = re.findall(r"^\$\$.*?\$\$[ \t]*(?:\(([\w-]+)\))?[ \t]*$", text, re.M | re.S)
    rows = re.findall(r"^\|.*`~?voltana_ctrl\..*\|$", text, re.MULTILINE)
    coded = {label for row in rows for label in re.findall(r"\{eq\}`([\w-]+)`", row)}
    return len(displayed), set(displayed) - {""}, coded


def test_theory_names_the_code_of_its_equations():
    page = DOCS / "theory.md"
    if not page.is_file():
        pytest.skip("the theory page is not written yet")
    displayed, labels, coded = equations(page.read_text(encoding="utf-8"))
    assert displayed > 0
    assert displayed == len(labels), "an equation without a label, or a label used twice"
    assert labels == coded, "a labelled equation without a table row that names its code"


def test_the_equation_check_sees_what_is_missing():
    text = (
        "$$ a = b $$ (eq-first)\n\n$$\nc = d\n$$ (eq-second)\n\n$$\ne = f\n$$\n\n"
        "| {eq}`eq-first` | {py:func}`~voltana_ctrl.laws.first` |\n"
    )
    assert equations(text) == (3, {"eq-first", "eq-second"}, {"eq-first"})


def test_changelog_opens_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d{2}-\d{2})$", text, re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == voltana_ctrl.__version__
    is_release = ".dev" not in voltana_ctrl.__version__
    assert is_release == (newest.group(2) != "unreleased")


def test_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}(pip install .*?)\s*(?:#.*)?$", text, re.MULTILINE)[:2]
    assert commands == [
        "pip install . && voltana-ctrl compare",
        "pip install '.[test]' && pytest",
    ]


def test_readme_examples_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
