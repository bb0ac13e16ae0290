"""Checks of numbers and arrays, with one clear error each, and the freezing of values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voltana_ctrl.errors import ConfigError, ShapeError

__all__ = [
    "F64",
    "I64",
    "Bool",
    "count",
    "fraction",
    "freeze_fields",
    "frozen_array",
    "not_negative",
    "positive",
    "within",
]

# Finite; a whole number of Python may lie beyond every float.
_LARGEST = sys.float_info.max
_MOST_COUNT = 2**63 - 1

#: Array of float64.
F64 = NDArray[np.float64]
#: Array of int64.
I64 = NDArray[np.int64]
#: Array of booleans.
Bool = NDArray[np.bool_]


def positive(name: str, value: float) -> None:
    """Refuse what is not a finite number > 0; NaN and text are refused, too.

    Parameters
    ----------
    name : str
        What the error calls it, such as ``Slo.ttft_s``.
    value : float
        In any unit.

    Raises
    ------
    ConfigError
        If it is not.

    Examples
    --------
    >>> positive("Slo.ttft_s", -1.0)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: Slo.ttft_s: expected a number > 0, got -1.0
    """
    if not (_is_number(value) and 0.0 < value <= _LARGEST):
        raise ConfigError(f"{name}: expected a number > 0, got {value!r}")


def not_negative(name: str, value: float) -> None:
    """Refuse what is not a finite number >= 0.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : float
        In any unit.

    Raises
    ------
    ConfigError
        If it is not.

    Examples
    --------
    >>> not_negative("wait_s", float("nan"))
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: wait_s: expected a number >= 0, got nan
    """
    if not (_is_number(value) and 0.0 <= value <= _LARGEST):
        raise ConfigError(f"{name}: expected a number >= 0, got {value!r}")


def within(value: float | None, most: float) -> float | None:
    """The value, or None where it is none that can be: blank, negative, NaN or above `most`.

    Parameters
    ----------
    value : float or None
        What was told.
    most : float
        Highest that can be.

    Examples
    --------
    >>> within(250.0, 5000.0), within(1.4e14, 5000.0), within(float("nan"), 5000.0)
    (250.0, None, None)
    """
    return value if value is not None and 0.0 <= value <= most else None


def fraction(name: str, value: float) -> None:
    """Refuse what does not lie strictly between 0 and 1.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : float
        The fraction.

    Raises
    ------
    ConfigError
        If it does not.

    Examples
    --------
    >>> fraction("Slo.attainment", 99)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: Slo.attainment: expected a fraction between 0 and 1, both
    excluded, got 99 (write 0.99, not 99)
    """
    if not (_is_number(value) and 0.0 < value < 1.0):
        raise ConfigError(
            f"{name}: expected a fraction between 0 and 1, both excluded, got {value!r}"
            " (write 0.99, not 99)"
        )


def count(name: str, value: int, *, minimum: int = 1) -> None:
    """Refuse what is not a whole number of at least `minimum`.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : int
        The count; True and False are no counts.
    minimum : int
        Least that is accepted.

    Raises
    ------
    ConfigError
        If it is not.

    Examples
    --------
    >>> count("repeats", 2.5)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: repeats: expected a whole number >= 1, got 2.5
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and value >= minimum):
        raise ConfigError(f"{name}: expected a whole number >= {minimum}, got {value!r}")
    if value > _MOST_COUNT:
        raise ConfigError(f"{name}: expected a whole number <= {_MOST_COUNT}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def frozen_array(name: str, value: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> Any:
    """Copy `value` into a read-only, contiguous array of `shape`, unless it is one already.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : array_like
        What is copied; anything that is no such array is refused.
    shape : tuple of int
        Shape that it must have.
    dtype : dtype
        Type of the copy.

    Returns
    -------
    ndarray
        Read-only, in C order; one that is so already is returned itself.

    Raises
    ------
    ShapeError
        If it is not of that shape, or not numbers.

    Examples
    --------
    >>> frozen_array("load_req_s", [1, 2], (2,)).flags.writeable
    False
    """
    if type(value) is np.ndarray and value.dtype == dtype and value.shape == shape:
        # One that its owner has frozen needs no copy.
        flags = value.flags
        if not flags.writeable and flags.owndata and flags.c_contiguous:
            return value
    try:
        array = np.array(value, dtype=dtype, order="C", copy=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise ShapeError(f"{name}: expected numbers of shape {shape}, got {value!r}") from error
    if array.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, got {array.shape}")
    array.flags.writeable = False
    return array


def freeze_fields(
    owner: Any, names: Sequence[str], shape: tuple[int, ...], dtype: Any = np.float64
) -> None:
    """Replace array fields of a frozen dataclass by checked read-only copies.

    Parameters
    ----------
    owner : object
        The dataclass, in its ``__post_init__``.
    names : sequence of str
        Names of its array fields.
    shape : tuple of int
        Shape that each must have.
    dtype : dtype
        Type of the copies.

    Raises
    ------
    ShapeError
        If one is not of that shape, or not numbers.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from voltana_ctrl.checks import F64
    >>> @dataclass(frozen=True)
    ... class Power:
    ...     power_w: F64
    ...     def __post_init__(self): freeze_fields(self, ["power_w"], (2,))
    >>> Power([60.0, 400.0]).power_w
    array([ 60., 400.])
    """
    label = type(owner).__name__
    for name in names:
        frozen = frozen_array(f"{label}.{name}", getattr(owner, name), shape, dtype)
        object.__setattr__(owner, name, frozen)
