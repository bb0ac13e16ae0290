"""Floor and ceiling that a controller gives the governor inside an engine, as a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

__all__ = ["write_limits"]


def write_limits(path: str | Path, *, floor_mhz: float, ceiling_mhz: float) -> None:
    """Tell the governor in an engine its floor and ceiling; at least once a second.

    Parameters
    ----------
    path : str or Path
        The file, replaced as a whole.
    floor_mhz, ceiling_mhz : float
        What the controller decided for this instance.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_limits(Path(folder, "limits"), floor_mhz=600.0, ceiling_mhz=1410.0)
    ...     sorted(json.loads(Path(folder, "limits").read_text()))
    ['ceiling_mhz', 'floor_mhz', 't_s']
    """
    # The clock since boot is the same for all processes of a machine, and never set back.
    told = {"floor_mhz": floor_mhz, "ceiling_mhz": ceiling_mhz, "t_s": time.monotonic()}
    path = Path(path)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(told), encoding="utf-8")
    new.replace(path)
