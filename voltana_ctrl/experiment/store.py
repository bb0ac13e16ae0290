"""Results that outlive the machine they were made on: runs by key, in Parquet files of a folder."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from voltana_ctrl import __version__
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.experiment.tables import arrow_table, load_pyarrow
from voltana_ctrl.files import whole_file

__all__ = ["ResultStore"]

_KEY = "run_key"


class ResultStore:
    """Folder of Parquet files that every run is written to as it ends, and looked for before.

    A sweep that was stopped goes on where it was: the runs that the folder has are not run again.
    A run is known by all that decides its figures: policy, fleet with its coefficients, workload,
    load, seed, settings, the version of this package, and the file of a policy of your own. Any
    Parquet reader takes the folder as one table.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.
    every_s : float
        Runs are written to a new file this often, and when the store is closed; those since are
        lost with the process, and run again.

    Raises
    ------
    ConfigError
        If pyarrow is missing, or the folder cannot be made or read.

    Examples
    --------
    >>> import tempfile
    >>> from voltana_ctrl import compare
    >>> asked = {"rates_req_s": [5.0], "duration_s": 9.0, "policies": ["static-max"]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ResultStore(folder) as store:
    ...         first = compare(**asked, store=store)
    ...     with ResultStore(folder) as store:
    ...         again = compare(**asked, store=store)
    ...         len(store), again.runs == first.runs
    (1, True)
    """

    def __init__(self, folder: str | Path, *, every_s: float = 5.0) -> None:
        pyarrow, parquet = load_pyarrow()
        self._folder = Path(folder)
        self._every_s = every_s
        self._due_s = time.monotonic() + every_s
        self._kept: dict[str, dict[str, Any]] = {}
        self._new: list[dict[str, Any]] = []
        if self._folder.is_file():
            raise ConfigError(f"store {folder}: expected a folder, got a file")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # What another process is writing at this moment is hidden.
            files = sorted(
                one for one in self._folder.glob("*.parquet") if not one.name.startswith(".")
            )
        except OSError as error:
            raise ConfigError(f"store {folder}: {error.strerror}") from error
        for file in files:
            try:
                rows = parquet.read_table(file).to_pylist()
                self._kept |= {row.pop(_KEY): row for row in rows}
            except (OSError, KeyError, pyarrow.ArrowException) as error:
                raise ConfigError(
                    f"store: {file} holds no runs of ours ({error}); move it away"
                ) from error

    def __len__(self) -> int:
        return len(self._kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.flush()

    def key(self, run: Run) -> str:
        """Name of a run, the same on every machine.

        Raises
        ------
        ConfigError
            If the run keeps details, which the store does not.
        """
        if run.detail:
            raise ConfigError(
                "store: it keeps figures, not details; leave out what is drawn over time"
            )
        digest = hashlib.sha256(__version__.encode())
        _feed(digest, run)
        if isinstance(run.policy, str) and ":" in run.policy:
            digest.update(_source(run.policy))
        return digest.hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """Figures of a run, or None if it is not there."""
        return self._kept.get(key)

    def put(self, key: str, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a run."""
        self._kept[key] = dict(figures)
        self._new.append({_KEY: key, **figures})
        if time.monotonic() >= self._due_s:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet.

        Raises
        ------
        ConfigError
            If that cannot be done.
        """
        self._due_s = time.monotonic() + self._every_s
        if not self._new:
            return
        _, parquet = load_pyarrow()
        # Named by its first run: no two processes that share a folder write the same file.
        path = self._folder / f"runs-{self._new[0][_KEY]}.parquet"
        with whole_file(path) as beside:
            parquet.write_table(arrow_table(self._new, list(self._new[0])), beside)
        self._new = []


def _source(policy: str) -> bytes:
    """The file of a policy of the user's own: another text is another policy."""
    module = importlib.import_module(policy.partition("+")[0].partition(":")[0])
    try:
        return Path(inspect.getfile(module)).read_bytes()
    except (OSError, TypeError):
        return b""


def _feed(digest: Any, value: Any) -> None:
    """Put a value into a digest, by what it says and not by where it lies in memory."""
    digest.update(f"{type(value).__name__}(".encode())
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value):
        for field in fields(value):
            digest.update(f"{field.name}=".encode())
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(f"{name}=".encode())
            _feed(digest, value[name])
    elif isinstance(value, (tuple, list)):
        for one in value:
            _feed(digest, one)
    elif isinstance(value, Enum):
        digest.update(value.name.encode())
    elif value is None or isinstance(value, (str, int, float, np.generic)):
        digest.update(repr(value).encode())
    else:
        raise ConfigError(
            f"store: a run with a {type(value).__name__} has no name that lasts; leave the store"
            " out, or name the policy"
        )
    digest.update(b")")
