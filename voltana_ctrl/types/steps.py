"""A number that changes at known times: prices, carbon, budgets."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from voltana_ctrl.checks import F64, not_negative
from voltana_ctrl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A function of time that is constant between its steps.

    Parameters
    ----------
    steps : tuple of (from_s, value)
        Each value holds from its time, on the loop's clock, until the next one's; times ascend
        and the first is 0. A simulated run starts at 0, its warm-up included.

    Raises
    ------
    ConfigError
        If there is no step, times do not ascend from 0, or a value is not a finite number.

    Examples
    --------
    >>> price = Steps(steps=((0.0, 0.2), (3600.0, 0.4)))
    >>> price.at(3599.0), price.at(3600.0)
    (0.2, 0.4)
    """

    steps: tuple[tuple[float, float], ...]

    #: What its option is called, what its values are, and an example of one.
    _option: ClassVar[str] = "steps"
    _unit: ClassVar[str] = "VALUE"
    _example: ClassVar[str] = "0:0.20,3600:0.40"

    def __post_init__(self) -> None:
        label = type(self).__name__
        try:
            steps = tuple((from_s, value) for from_s, value in self.steps)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{label}.steps: expected pairs (from_s, value), got {self.steps!r}"
            ) from error
        if not steps:
            raise ConfigError(f"{label}.steps: expected at least one step, got none")
        for from_s, value in steps:
            not_negative(f"{label}: time of a step [s]", from_s)
            self._check_value(value)
        times_s = [from_s for from_s, _ in steps]
        if times_s[0] != 0.0:
            raise ConfigError(
                f"{label}.steps: expected the first step at 0 s, got {times_s[0]:g} s; say"
                " what holds before it"
            )
        for before_s, after_s in pairwise(times_s):
            if not before_s < after_s:
                raise ConfigError(
                    f"{label}.steps: expected ascending times, got {after_s:g} s after"
                    f" {before_s:g} s"
                )
        numbers = tuple((float(from_s), float(value)) for from_s, value in steps)
        object.__setattr__(self, "steps", numbers)

    def _check_value(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ConfigError(f"{type(self).__name__}: expected finite numbers, got {value!r}")

    @classmethod
    def parse(cls, text: str, option: str | None = None) -> Self:
        """Steps from ``0:0.20,3600:0.40``, from one number, or from a CSV file of such pairs.

        Parameters
        ----------
        text : str
            Seconds and values; or the name of a ``.csv`` file with a pair a line and, if it has
            one, a header.
        option : str, optional
            What errors call it.

        Raises
        ------
        ConfigError
            Naming the step that does not fit.

        Examples
        --------
        >>> Steps.parse("0:0.20,3600:0.40").steps
        ((0.0, 0.2), (3600.0, 0.4))
        >>> Steps.parse("0.3").steps
        ((0.0, 0.3),)
        """
        option = option or cls._option
        if text.endswith(".csv"):
            return cls._read(Path(text), option)
        if ":" not in text and "," not in text:
            try:
                return cls(steps=((0.0, float(text)),))
            except ValueError:
                raise ConfigError(
                    f"{option}: expected {cls._unit.lower()} such as"
                    f" {cls._example.split(':')[1].split(',')[0]}, or steps SECONDS:{cls._unit},"
                    f" got {text!r}"
                ) from None
        steps = []
        for part in text.split(","):
            from_s, colon, value = part.partition(":")
            try:
                if not colon:
                    raise ValueError
                steps.append((float(from_s), float(value)))
            except ValueError:
                raise ConfigError(
                    f"{option}: expected steps SECONDS:{cls._unit} such as {cls._example}, got"
                    f" {part!r}"
                ) from None
        return cls(steps=tuple(steps))

    @classmethod
    def _read(cls, path: Path, option: str) -> Self:
        try:
            rows = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{option}: {path}: cannot be read: {error}") from error
        steps = []
        for number, row in enumerate(rows, start=1):
            try:
                from_s, value = (float(cell) for cell in row)
            except ValueError:
                if number == 1 and len(row) == 2:
                    continue  # a header
                raise ConfigError(
                    f"{option}: {path}: line {number}: expected seconds and a number, got"
                    f" {','.join(row)[:60]!r}"
                ) from None
            steps.append((from_s, value))
        try:
            return cls(steps=tuple(steps))
        except ConfigError as error:
            raise ConfigError(f"{option}: {path}: {error}") from error

    def at(self, t_s: float) -> float:
        """Value at one time; before 0 the first.

        Parameters
        ----------
        t_s : float
            Seconds on the loop's clock.

        Returns
        -------
        float
            In the unit of the values.
        """
        held = [value for from_s, value in self.steps if from_s <= t_s]
        return held[-1] if held else self.steps[0][1]

    def edges_s(self, from_s: float, until_s: float) -> F64:
        """Times at which it changes within a span, the ends of the span included.

        Parameters
        ----------
        from_s, until_s : float
            The span, in seconds on the loop's clock.

        Returns
        -------
        ndarray, shape (n_edges,)
            Seconds, ascending.

        Examples
        --------
        >>> Steps.parse("0:1,10:2,20:1").edges_s(5.0, 15.0)
        array([ 5., 10., 15.])
        """
        inside = [t_s for t_s, _ in self.steps if from_s < t_s < until_s]
        return np.array([from_s, *inside, until_s])

    def mean(self, from_s: float, until_s: float) -> float:
        """Mean over a span of time.

        Parameters
        ----------
        from_s, until_s : float
            The span, of some length.

        Returns
        -------
        float
            In the unit of the values, weighted by time.

        Examples
        --------
        >>> Steps.parse("0:1,10:3").mean(5.0, 15.0)
        2.0
        """
        edges_s = self.edges_s(from_s, until_s)
        values = np.array([self.at(float(t_s)) for t_s in edges_s[:-1]])
        return float(values @ np.diff(edges_s) / (until_s - from_s))
