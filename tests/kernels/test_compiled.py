"""Where nothing can be written, every command still works: a private cache or none, said once."""

import os
from pathlib import Path

import pytest

from tests.helpers.bare_user import NOBODY, needs_bare_user, read_only_copy, run_as_bare_user
from voltana_ctrl.kernels import compiled

pytestmark = needs_bare_user


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    return read_only_copy(root, tmp_path_factory.mktemp("installed"))


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["policies"],
        ["profiles"],
        ["compare", "--rate", "ten"],
        ["meter", "--duration", "0.2"],
    ],
    ids=lambda command: command[0],
)
def test_other_commands_say_what_they_do_where_nothing_can_be_written(installed, command, tmp_path):
    done = run_as_bare_user(installed, *command, tmp=tmp_path / "nowhere")
    assert "Traceback" not in done.stderr
    # Bad input is 2; 1 is a meter that found nothing to measure.
    expected = {2} if "ten" in command else {0, 1} if command[0] == "meter" else {0}
    assert done.returncode in expected, done.stderr
    if command == ["doctor"]:
        assert "compiled code" in done.stdout


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    """Whoever can write to the cache decides what runs."""
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(compiled, "_SHARED_MEMORY", tmp_path / "nowhere")
    planted = tmp_path / f"voltana-ctrl-{os.geteuid()}"
    planted.mkdir(mode=0o777)
    planted.chmod(0o777)
    assert list(compiled._private_folders()) == []
    planted.chmod(0o700)
    assert list(compiled._private_folders()) == [planted]
    os.chown(planted, NOBODY, NOBODY)
    assert list(compiled._private_folders()) == []
    planted.rmdir()
    planted.symlink_to(tmp_path)
    assert list(compiled._private_folders()) == []


def test_without_any_folder_kernels_are_compiled_and_not_kept(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "cache_folder", lambda: None)
    monkeypatch.setattr(compiled, "_private_folders", lambda: iter([Path("/nowhere")]))
    before = compiled.config.CACHE_DIR
    assert compiled._find_cache() is False
    assert before == compiled.config.CACHE_DIR
    assert "NUMBA_CACHE_DIR" in caplog.text
    monkeypatch.setattr(compiled, "_KEPT", False)
    doubled = compiled.njit("float64(float64)")(lambda value: 2.0 * value)
    assert doubled(2.0) == 4.0


def test_no_kernel_goes_past_the_cache(root):
    """A bare ``numba.njit(cache=True)`` refuses to load where nothing can be written."""
    bare = [
        path.name
        for path in (root / "voltana_ctrl").rglob("*.py")
        if path.name != "compiled.py" and "import njit" in path.read_text()
        and "from voltana_ctrl.kernels.compiled import njit" not in path.read_text()
    ]  # fmt: skip
    assert bare == []
