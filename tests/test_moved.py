"""Old import paths work for one release, and each names the new one."""

import importlib
import re
import subprocess
import sys
import warnings

import pytest

import voltana_ctrl
from tests.helpers.paths import ROOT
from voltana_ctrl import loop, moved


def public_name(module: str) -> str:
    """Return a name that a module makes public."""
    new = importlib.import_module(f"voltana_ctrl.{module}")
    own = [
        name
        for name, value in vars(new).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("voltana_ctrl")
    ]
    return sorted(getattr(new, "__all__", own))[0]


OLD = sorted(
    {
        f"{old}.{name}"
        for old, homes in moved.NAMES.items()
        for names in homes.values()
        for name in names
    }
    | {".".join(pair) for pair in moved._RENAMED}
    | {f"{old}.{public_name(new)}" for old, new in moved.MODULES.items()}
)


@pytest.mark.parametrize("path", OLD)
def test_old_path_gives_the_new_object_and_names_its_place(path):
    module, _, name = path.rpartition(".")
    old = importlib.import_module(f"voltana_ctrl.{module}")
    with pytest.warns(FutureWarning, match=rf"voltana_ctrl\.{re.escape(path)} is now ") as told:
        value = getattr(old, name)
    new = re.search(r"is now (\S+);", str(told[0].message))[1]
    new_module, _, new_name = new.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(importlib.import_module(new_module), new_name) is value


def test_the_wall_clock_is_still_in_the_loop():
    assert loop.WallClock is voltana_ctrl.WallClock


def test_every_old_module_is_tried():
    tried = {path.rpartition(".")[0] for path in OLD}
    assert set(moved.MODULES) | set(moved.NAMES) <= tried


@pytest.mark.parametrize(
    "name", ["voltana_ctrl.integrations.absent", "voltana_ctrl.absent", "absent_package"]
)
def test_what_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


@pytest.mark.parametrize("module", ["control", "loop", "integrations", "physics"])
def test_a_name_that_never_was_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="absent"):
        _ = importlib.import_module(f"voltana_ctrl.{module}").absent


def test_a_start_script_sees_the_warning_once_and_by_default():
    """As a server resolves ``--scheduler-cls``: a module by its path, then an attribute of it."""
    program = (
        "from importlib import import_module\n"
        "for _ in range(2):\n"
        "    getattr(import_module('voltana_ctrl.integrations.vllm'), 'StatHook')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("FutureWarning") == 1
    assert "voltana_ctrl.integrations.vllm.StatHook is now voltana_ctrl.engines.vllm" in done.stderr
