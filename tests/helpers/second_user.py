"""Another user of the same machine, who means no good."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

#: Whose processes try what they must not be able to.
UID = 65534
# Imported before it is that user, who may not be able to read where Python lies.
_BECOME = f"""
import encodings.idna, fcntl, glob, json, os, signal, socket, sys, time
if sys.argv[1:2] == ["zmq"]:
    import zmq
os.setgroups([])
os.setgid({UID})
os.setuid({UID})
"""


def needs_second_user() -> None:
    """Skip where this process cannot become another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    done = as_second_user("print(os.getuid(), os.geteuid())")
    if done.stdout.split() != [str(UID)] * 2:
        pytest.skip(f"cannot become another user: {done.stderr[-200:]}")


def as_second_user(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program as that user, and wait for it; fcntl, json, os, socket, time are there."""
    return subprocess.run(
        [sys.executable, "-I", "-c", _BECOME + program, *map(str, arguments)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def start_as_second_user(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start one; whoever does ends it. With `zmq` as its first argument it has that, too."""
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _BECOME + program, *map(str, arguments)],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def open_to_look_at(folder: Path) -> None:
    """Let others pass to a folder of ours and read names, as they may under /run."""
    for one in (folder, *folder.parents):
        info = one.stat()
        if info.st_uid == os.geteuid() and info.st_mode & 0o055 != 0o055:
            one.chmod(stat.S_IMODE(info.st_mode) | 0o055)
