"""Where nothing can be written, every command still works: a private cache or none, said once."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from voltana_ctrl.kernels import compiled

SHORT = ["--rate", "5", "--duration", "5", "--warmup", "0", "--policies", "static-max,cascade"]
#: A user id that owns nothing here.
NOBODY = 54321

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root, to run as somebody without a home",
)


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    """A copy of the package without compiled code, which nobody but root can write to."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(
        root / "voltana_ctrl", folder / "voltana_ctrl", ignore=shutil.ignore_patterns("*.nb?")
    )
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture
def as_nobody(installed):
    def run(*arguments, tmp, **environment):
        """Run a command as a user without a home; what root may read, it may read."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return subprocess.run(
            ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
             "--bounding-set=-all,+dac_read_search", "--inh-caps=-all,+dac_read_search",
             "--ambient-caps=-all,+dac_read_search",
             sys.executable, "-B", "-m", "voltana_ctrl.cli", *arguments],
            env=kept | {"HOME": "/nonexistent", "PYTHONPATH": str(installed), "TMPDIR": str(tmp),
                        "COLUMNS": "80"} | environment,
            capture_output=True, text=True, cwd="/", timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def open_tmp(tmp_path):
    """A folder for temporary files as /tmp is: anybody may make one, nobody another's."""
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.mark.slow
def test_compiled_code_is_kept_in_a_private_folder_and_found_again(as_nobody, open_tmp):
    first = as_nobody("compare", *SHORT, tmp=open_tmp)
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    folder = open_tmp / f"voltana-ctrl-{NOBODY}"
    assert first.stderr.count(str(folder)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = sorted(folder.rglob("*.nbc"))
    assert len(kept) > 30
    second = as_nobody("compare", *SHORT, tmp=open_tmp)
    assert second.returncode == 0, second.stderr
    assert sorted(folder.rglob("*.nbc")) == kept
    assert "compiling" not in second.stderr


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
def test_other_commands_say_what_they_do_where_nothing_can_be_written(as_nobody, command, tmp_path):
    done = as_nobody(*command, tmp=tmp_path / "nowhere")
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "ten" in command else 0), done.stderr
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
