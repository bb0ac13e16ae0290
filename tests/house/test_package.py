"""The package's face: exported names, version, metadata, logging."""

import ast
import importlib
import logging
import re
import tomllib
from pathlib import Path

import pytest

import voltana_ctrl


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


# Packages that list their names in a stub, from which they are imported when they are used.
STUBS = sorted(Path(voltana_ctrl.__path__[0]).rglob("__init__.pyi"))


def imported(stub: Path) -> list[tuple[str, str, str | None]]:
    """Module, name and alias of each import in a stub."""
    return [
        (node.module, alias.name, alias.asname)
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_every_listed_name_is_the_one_its_module_makes_public(stub):
    path = stub.parent.relative_to(Path(voltana_ctrl.__path__[0]).parent)
    package = importlib.import_module(".".join(path.parts))
    names = imported(stub)
    for module, name, alias in names:
        assert name == alias, "a type checker takes only `name as name` for an export"
        home = importlib.import_module(module)
        assert getattr(package, name) is getattr(home, name)
        assert name in home.__all__
    assert package.__all__ == sorted(name for _, name, _ in names)


def test_the_lazy_packages_are_these():
    assert {stub.parent.name for stub in STUBS} == {
        "backends", "control", "engines", "live", "machine", "profiling", "router",
        "routing", "savings", "testing", "voltana_ctrl",
    }  # fmt: skip


def test_exported_names_are_sorted_and_listed():
    assert voltana_ctrl.__all__ == sorted(set(voltana_ctrl.__all__))
    assert set(voltana_ctrl.__all__) <= set(dir(voltana_ctrl))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Controler'"):
        _ = voltana_ctrl.Controler


def test_star_import_brings_the_exported_names():
    namespace: dict[str, object] = {}
    exec("from voltana_ctrl import *", namespace)
    assert set(voltana_ctrl.__all__) == set(namespace) - {"__builtins__"}


def test_version_is_a_release_or_pre_release():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", voltana_ctrl.__version__)


def test_the_library_is_silent_until_the_host_configures_logging():
    handlers = logging.getLogger("voltana_ctrl").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]


def test_the_command_points_at_a_callable(project):
    module, function = project["project"]["scripts"]["voltana-ctrl"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_package_is_marked_as_typed(root):
    assert (root / "voltana_ctrl" / "py.typed").is_file()


def test_extras_are_the_promised_ones(project):
    assert set(project["project"]["optional-dependencies"]) == {
        "test",
        "docs",
        "nvml",
        "server",
        "report",
        "dask",
        "tables",
        "theory",
        "dev",
    }


def test_dependencies_carry_no_upper_bound(project):
    # An upper bound here would fight the serving engine's own pins.
    capped = [line for line in project["project"]["dependencies"] if re.search(r"<|==|~=", line)]
    assert capped == []
