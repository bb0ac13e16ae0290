"""A disk of its own, small, that a test fills or makes read-only."""

import contextlib
import os
import subprocess

import pytest


class SmallDisk:
    """A file system of 256 KB in a folder, owned by root alone."""

    def __init__(self, folder) -> None:
        self.folder, self._bound = folder, False

    def __enter__(self) -> "SmallDisk":
        if os.geteuid() != 0:
            pytest.skip("needs root, to mount a file system")
        self.folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0755", "tmpfs", str(self.folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
        subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def starve(self, how: str) -> None:
        """Take all room, or the right to write."""
        if how == "full":
            with contextlib.suppress(OSError), (self.folder / "filler").open("wb") as filler:
                while True:
                    filler.write(b"x" * 512)
                    filler.flush()
        else:  # what is open stays open, as where a folder is mounted anew
            _mount("--bind", str(self.folder), str(self.folder))
            _mount("-o", "remount,bind,ro", str(self.folder))
            self._bound = True

    def free(self) -> None:
        """Give both back."""
        if self._bound:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
            self._bound = False
        (self.folder / "filler").unlink(missing_ok=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
