"""Giving hardware back: what was found is written down, and anybody can restore it from that.

The controller itself does so on a clean end, the watchdog when the controller dies, the next
controller when both died (a power cut), each from the same record. A record names only what
was touched: a lock that an operator set on something we never set stays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voltana_ctrl.errors import ConfigError, VoltanaError

__all__ = ["FoundFile", "FoundGpu", "give_back", "record_from"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGpu:
    """What to do to give one GPU back.

    Clock and memory locks cannot be read from the driver, so they are reset to its default, or
    the clock to `restore_lock_mhz` where the operator wants a lock; a power cap can be read,
    and goes back to what it was.

    Parameters
    ----------
    uuid : str
        The GPU.
    library : str, optional
        The driver library, where it is not the system's.
    clock, memory : bool
        Whether we set a clock lock, a memory lock.
    restore_lock_mhz : tuple of int, optional
        Clock lock to leave behind instead of none.
    power_cap_w : float, optional
        Power cap found before we set ours.

    Examples
    --------
    >>> FoundGpu(uuid="GPU-0", clock=True).as_dict()["power_cap_w"] is None
    True
    """

    uuid: str
    library: str | None = None
    clock: bool = False
    memory: bool = False
    restore_lock_mhz: tuple[int, int] | None = None
    power_cap_w: float | None = None

    def __post_init__(self) -> None:
        cap_w = self.power_cap_w
        known = isinstance(self.uuid, str) and {type(self.clock), type(self.memory)} == {bool}
        if not known or not (cap_w is None or (type(cap_w) in (int, float) and 0 < cap_w < 1e9)):
            raise ConfigError(f"FoundGpu: expected a UUID, true or false, and watts, got {self!r}")
        # Whoever reads the record may have been started in another folder.
        if self.library is not None:
            object.__setattr__(self, "library", os.path.abspath(self.library))

    @property
    def touched(self) -> bool:
        """Whether there is anything to give back."""
        return self.clock or self.memory or self.power_cap_w is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, from which :func:`record_from` makes the record again."""
        return {"kind": "gpu", **asdict(self)}

    def restore(self) -> list[str]:
        """Give the GPU back; what fails does not keep the rest from being given back.

        Returns
        -------
        list of str
            What could not be given back, in words; empty if all was.
        """
        from voltana_ctrl.backends.nvml.driver import Nvml

        problems = []
        try:
            with Nvml(Path(self.library) if self.library else None) as nvml:
                gpu = nvml.gpu(self.uuid)
                steps = []
                if self.clock:
                    lock_mhz = self.restore_lock_mhz
                    steps.append(
                        gpu.reset_clock if lock_mhz is None else lambda: gpu.lock_clock(*lock_mhz)
                    )
                if self.memory:
                    steps.append(gpu.reset_memory)
                if self.power_cap_w is not None:
                    cap_w = self.power_cap_w
                    steps.append(lambda: gpu.set_power_cap(cap_w))
                for step in steps:
                    try:
                        step()
                    except VoltanaError as error:
                        problems.append(str(error))
        except VoltanaError as error:
            problems.append(str(error))
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """What to write to give one file of the kernel's back.

    Parameters
    ----------
    path : str
        The file, such as a ``scaling_max_freq``.
    text : str
        Its content as found.

    Examples
    --------
    >>> FoundFile(path="/sys/class/x", text="1000").as_dict()
    {'kind': 'file', 'path': '/sys/class/x', 'text': '1000'}
    """

    path: str
    text: str

    def __post_init__(self) -> None:
        if not (isinstance(self.path, str) and isinstance(self.text, str)):
            raise ConfigError(f"FoundFile: expected path and text, got {self!r}")
        # As for a GPU's library.
        object.__setattr__(self, "path", os.path.abspath(self.path))

    @property
    def touched(self) -> bool:
        """Whether there is anything to give back: always."""
        return True

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, from which :func:`record_from` makes the record again."""
        return {"kind": "file", **asdict(self)}

    def restore(self) -> list[str]:
        """Write the content back as it was found.

        Returns
        -------
        list of str
            Why it could not be written, in words; empty if it was.
        """
        try:
            Path(self.path).write_text(self.text, encoding="ascii")
        except OSError as error:
            return [f"{self.path}: cannot be written: {error.strerror}"]
        except ValueError as error:  # of a record that no controller wrote
            return [f"{self.path}: cannot be written: {error}"]
        return []


def record_from(values: Any) -> FoundGpu | FoundFile:
    """Record from its plain values.

    Parameters
    ----------
    values : mapping
        As `as_dict` gives them, perhaps through JSON.

    Returns
    -------
    FoundGpu or FoundFile
        The record.

    Raises
    ------
    ConfigError
        If they are not those of a record.

    Examples
    --------
    >>> record_from(FoundGpu(uuid="GPU-0", restore_lock_mhz=(210, 900)).as_dict())
    FoundGpu(uuid='GPU-0', library=None, clock=False, memory=False,
             restore_lock_mhz=(210, 900), power_cap_w=None)
    """
    try:
        settings = dict(values)
        kind = settings.pop("kind")
        if kind == "gpu":
            if settings.get("restore_lock_mhz") is not None:
                lo_mhz, hi_mhz = settings["restore_lock_mhz"]
                settings["restore_lock_mhz"] = (int(lo_mhz), int(hi_mhz))
            return FoundGpu(**settings)
        if kind == "file":
            return FoundFile(**settings)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"give-back record: {values!r} is not one: {error}") from error
    raise ConfigError(f"give-back record: expected kind gpu or file, got {kind!r}")


def give_back(records: Sequence[FoundGpu | FoundFile]) -> list[str]:
    """Give back everything that was touched.

    One that fails does not keep the others from being given back.

    Parameters
    ----------
    records : sequence of FoundGpu or FoundFile
        What was touched, and how it was found.

    Returns
    -------
    list of str
        What could not be given back, in words; empty if all was.

    Examples
    --------
    >>> give_back([])
    []
    """
    problems: list[str] = []
    for record in records:
        if record.touched:
            problems.extend(record.restore())
    return problems
