"""What was learnt about a fleet, in a file that outlives the process that learnt it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.files import read_ours, replace_file
from voltana_ctrl.textfile import json_value
from voltana_ctrl.types import Belief, FleetSpec, Order, TickRecord

__all__ = ["StateFile"]

_log = logging.getLogger(__name__)
_SCHEMA = "voltana-ctrl/state/1"
_MOST_BYTES = 1 << 22
_DELAY_S = 0.025
#: What of a belief is kept: what an order can tell, within the ranges of an order.
_KEPT = tuple(
    one.name
    for one in fields(Belief)
    if one.name in {each.name for each in fields(Order)} - {"delay_s"}  # measured at every start
)


class StateFile:
    """Keeps margins, paces and highest clocks across restarts; an observer of the loop.

    The file is written as a whole, with a checksum. One that is torn, foreign or of another version
    is set aside beside it, with a word in the log, and nothing of it is used. What it says of an
    instance counts where the fleet still has that instance with the same profile.

    Parameters
    ----------
    path : str or Path
        File to read and write, which need not exist.
    fleet : FleetSpec
        The fleet.
    every_s : float
        Seconds between two writings.
    now_s : callable
        Returns seconds that never go back.

    Raises
    ------
    ConfigError
        If the time is not positive.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> learnt = Belief.of_profiles(fleet, margin_frac=(0.02, 0.2), delay_s=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state = StateFile(Path(folder, "state.json"), fleet)
    ...     state.write(learnt)
    ...     state.read().itl_margin_frac
    array([0.2, 0.2])
    """

    def __init__(
        self,
        path: str | Path,
        fleet: FleetSpec,
        *,
        every_s: float = 30.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("StateFile.every_s", every_s)
        self._path, self._fleet = Path(path), fleet
        self._every_s, self._now_s = every_s, now_s
        self._written_s = now_s()
        self._latest: Belief | None = None
        self._fails = False

    def read(self) -> Belief | None:
        """What an earlier run has learnt.

        Returns
        -------
        Belief or None
            Margins are the largest of any instance; the rest is each one's own, and by its profile
            where the file says nothing of it. None where nothing can be used.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> StateFile("no-such-file", fleet).read() is None
        True
        """
        try:
            data = read_ours(self._path, "state", _MOST_BYTES)
            found = {} if data is None else self._parsed(data)
        except ConfigError as error:
            aside = self._path.with_name(f"{self._path.name}.set-aside")
            try:
                self._path.replace(aside)
                where = f"set aside as {aside}"
            except OSError as problem:
                where = f"left where it is: {problem.strerror}"
            _log.warning("voltana-ctrl: %s; %s, and nothing of it is used", error, where)
            return None
        if not found:
            return None
        # Margins are a fleet's; the rest is each instance's own.
        margins = [
            max(getattr(one, name)[0] for one in found.values())
            for name in ("ttft_margin_frac", "itl_margin_frac")
        ]
        base = Belief.of_profiles(
            self._fleet, margin_frac=(margins[0], margins[1]), delay_s=_DELAY_S
        )
        columns = {name: np.array(getattr(base, name)) for name in _KEPT}
        for i, one in found.items():
            for name in ("prefill_pace_frac", "decode_pace_frac"):
                columns[name][i] = getattr(one, name)[0]
            columns["able_mhz"][i] = min(one.able_mhz[0], self._fleet.max_mhz[i])
        return replace(base, **columns)

    def _parsed(self, data: bytes) -> dict[int, Belief]:
        told = json_value(data, f"state {self._path}")
        if not (isinstance(told, dict) and told.get("schema") == _SCHEMA):
            raise ConfigError(f"state {self._path}: expected schema {_SCHEMA}")
        learnt = told.get("learnt")
        if told.get("sha256") != _checksum(learnt):
            raise ConfigError(f"state {self._path}: torn, its checksum does not fit")
        if not isinstance(learnt, dict):
            raise ConfigError(f"state {self._path}: expected what was learnt by instance")
        found = {}
        for i, one in enumerate(self._fleet.instances):
            values = learnt.get(one.id)
            if not isinstance(values, dict) or values.get("profile") != one.profile.name:
                continue
            kept = {name: values.get(name) for name in _KEPT}
            try:
                order = Order.parse({"floor_mhz": 1.0, "ceiling_mhz": 1.0, **kept})
            except ConfigError as error:
                raise ConfigError(f"state {self._path}: {one.id}: {error}") from error
            if None in kept.values():
                raise ConfigError(f"state {self._path}: {one.id}: expected {', '.join(_KEPT)}")
            belief = order.belief(delay_s=_DELAY_S)
            if belief is not None:
                found[i] = belief
        return found

    def write(self, belief: Belief) -> None:
        """Keep a belief, now.

        Parameters
        ----------
        belief : Belief
            What is believed of every instance of the fleet.

        Raises
        ------
        OSError
            If the file cannot be written; the old one is then as it was.
        """
        learnt: Mapping[str, Mapping[str, Any]] = {
            one.id: {
                "profile": one.profile.name,
                **{name: float(getattr(belief, name)[i]) for name in _KEPT},
            }
            for i, one in enumerate(self._fleet.instances)
        }
        told = {"schema": _SCHEMA, "learnt": learnt, "sha256": _checksum(learnt)}
        data = json.dumps(told, indent=1).encode() + b"\n"
        replace_file(self._path, data, mode=0o600, durable=True)

    def on_tick(self, record: TickRecord) -> None:
        """Take what a decision told, and write it when it is due.

        Parameters
        ----------
        record : TickRecord
            A tick of the control loop.
        """
        if record.applied.belief is not None:
            self._latest = record.applied.belief
        if self._now_s() - self._written_s >= self._every_s:
            self._flush()

    def close(self) -> None:
        """Write what was told last; may be called twice."""
        self._flush()

    def _flush(self) -> None:
        self._written_s = self._now_s()
        if self._latest is None:
            return
        try:
            self.write(self._latest)
        except OSError as error:
            # A full disk ends no control; it is said once.
            if not self._fails:
                _log.warning("voltana-ctrl: state %s: cannot be written: %s", self._path, error)
            self._fails = True
        else:
            self._fails = False
            self._latest = None


def _checksum(learnt: Any) -> str:
    return hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()
