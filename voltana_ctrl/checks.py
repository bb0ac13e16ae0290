"""Checks and freezing shared by the value types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voltana_ctrl.errors import ConfigError, ShapeError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


def positive(name: str, value: float) -> None:
    """Refuse what is not a finite number > 0 (NaN and text included)."""
    if not (_is_number(value) and 0.0 < value < np.inf):
        raise ConfigError(f"{name}: expected a number > 0, got {value!r}")


def not_negative(name: str, value: float) -> None:
    """Refuse what is not a finite number >= 0."""
    if not (_is_number(value) and 0.0 <= value < np.inf):
        raise ConfigError(f"{name}: expected a number >= 0, got {value!r}")


def fraction(name: str, value: float) -> None:
    """Refuse what does not lie strictly between 0 and 1."""
    if not (_is_number(value) and 0.0 < value < 1.0):
        raise ConfigError(
            f"{name}: expected a fraction between 0 and 1, both excluded, got {value!r}"
            " (write 0.99, not 99)"
        )


def count(name: str, value: int, *, minimum: int = 1) -> None:
    """Refuse what is not a whole number of at least `minimum`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and value >= minimum):
        raise ConfigError(f"{name}: expected a whole number >= {minimum}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def frozen_array(name: str, value: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> Any:
    """Copy `value` into a read-only, contiguous array of `shape`; refuse anything else."""
    try:
        array = np.array(value, dtype=dtype, order="C", copy=True)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name}: expected numbers of shape {shape}, got {value!r}") from error
    if array.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, got {array.shape}")
    array.flags.writeable = False
    return array


def freeze_fields(
    owner: Any, names: Sequence[str], shape: tuple[int, ...], dtype: Any = np.float64
) -> None:
    """Replace array fields of a frozen dataclass by checked read-only copies."""
    label = type(owner).__name__
    for name in names:
        frozen = frozen_array(f"{label}.{name}", getattr(owner, name), shape, dtype)
        object.__setattr__(owner, name, frozen)
