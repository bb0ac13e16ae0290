"""The order for the governor inside an engine, as a file that the node's agent writes.

The directory is the agent's (mode 0755); the engine reads what is in it and trusts it only where
nobody but the agent, root or the engine's own user can have written it. In Kubernetes it is a
mount of the engine's pod, and the agent's user is named by ``VOLTANA_CTRL_LIMITS_UID``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from voltana_ctrl.checks import positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.files import read_ours, replace_file
from voltana_ctrl.textfile import json_value
from voltana_ctrl.types import Order

__all__ = ["Handed", "read_limits", "write_limits"]

_SCHEMA = "voltana-ctrl/limits/1"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """An order as it was handed to an engine.

    Parameters
    ----------
    order : Order
        The order.
    policy : str
        Policy whose governor chooses the clock between floor and ceiling.
    since_s : float
        Time at which it was asked for, in seconds of ``time.monotonic()``, which all processes of a
        machine share.
    valid_s : float
        Seconds that it holds from then on.

    Examples
    --------
    >>> from voltana_ctrl.types import Order
    >>> handed = Handed(order=Order(floor_mhz=600.0, ceiling_mhz=1410.0), policy="mpc",
    ...                 since_s=100.0, valid_s=1.0)
    >>> handed.now(100.5).floor_mhz, handed.now(101.5).floor_mhz
    (600.0, 1410.0)
    """

    order: Order
    policy: str
    since_s: float
    valid_s: float

    def now(self, t_s: float) -> Order:
        """The order as it stands at a time.

        Parameters
        ----------
        t_s : float
            Time on the same clock.

        Returns
        -------
        Order
            While it is in force, with ceilings announced for before `t_s` taken over. Once it has
            lapsed, what an instance does without a controller: its floor is its ceiling.
        """
        held_s = max(0.0, t_s - self.since_s)
        # A time ahead of now is of another boot: nobody knows how old the order is.
        in_force = 0.0 <= t_s - self.since_s <= self.valid_s
        return self.order.after(held_s) if in_force else self.order.alone(held_s)


def write_limits(
    path: str | Path,
    order: Order,
    *,
    policy: str = "mpc",
    valid_s: float = 1.0,
    since_s: float | None = None,
) -> None:
    """Hand an order to the governor inside an engine; anew before it lapses.

    Parameters
    ----------
    path : str or Path
        The file, replaced as a whole; its directory is made if it is not there.
    order : Order
        What the controller decided for this instance.
    policy : str
        Policy whose governor is to choose the clock.
    valid_s : float
        Seconds that it holds from `since_s` on; readers take 60 for more.
    since_s : float, optional
        Time of ``time.monotonic()`` from which on it holds; now if left out.

    Raises
    ------
    ConfigError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl.types import Order
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "decode-0.json")
    ...     write_limits(path, Order(floor_mhz=600.0, ceiling_mhz=1410.0))
    ...     read_limits(path).order.floor_mhz
    600.0
    """
    told = {
        "schema": _SCHEMA,
        "order": order.plain(),
        "policy": policy,
        "since_s": time.monotonic() if since_s is None else since_s,
        "valid_s": valid_s,
    }
    try:
        replace_file(path, json.dumps(told).encode())
    except OSError as error:
        raise ConfigError(f"limits {path}: cannot be written: {error.strerror}") from error


def read_limits(path: str | Path, *, owners: Collection[int] = ()) -> Handed | None:
    """Read the order that was handed over in a file.

    Parameters
    ----------
    path : str or Path
        File that :func:`write_limits` wrote.
    owners : collection of int
        User ids besides root and our own that may have written it.

    Returns
    -------
    Handed or None
        None while there is no such file.

    Raises
    ------
    ConfigError
        If somebody else may have written it, or it is no order.

    Examples
    --------
    >>> read_limits("no-such-file") is None
    True
    """
    data = read_ours(path, "limits", _MAX_BYTES, owners=owners)
    return None if data is None else _parsed(Path(path), data)


def _parsed(path: Path, data: bytes) -> Handed:
    told = json_value(data, f"limits {path}")
    if not (isinstance(told, dict) and told.get("schema") == _SCHEMA):
        raise ConfigError(f"limits {path}: expected schema {_SCHEMA}")
    try:
        since_s, valid_s, policy = told["since_s"], told["valid_s"], told["policy"]
        positive("since_s", since_s)
        positive("valid_s", valid_s)
        if not (isinstance(policy, str) and len(policy) <= 253):
            raise ConfigError("policy: expected a name")
        return Handed(
            order=Order.parse(told["order"]),
            policy=policy,
            since_s=float(since_s),
            valid_s=float(min(valid_s, 60.0)),
        )
    except (LookupError, OverflowError, ConfigError) as error:
        raise ConfigError(f"limits {path}: {error}") from error
