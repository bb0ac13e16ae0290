"""A law is a small check with a name; broken, it says which, on what input, what to mend."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import Decision, FleetState, Observation, Request

__all__ = ["Law", "LawBroken"]


class LawBroken(AssertionError):
    """What a check found: the law that does not hold, on what input, and what to mend.

    Parameters
    ----------
    law : str
        Name of the law, as listed by ``CONTROLLER_LAWS`` and its like.
    message : str
        All of it in words.

    Examples
    --------
    >>> found = LawBroken("pure", "controller law 'pure' is broken: ...")
    >>> found.law, str(found)
    ('pure', "controller law 'pure' is broken: ...")
    """

    def __init__(self, law: str, message: str) -> None:
        super().__init__(law, message)
        self.law = law
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """One thing that every controller, router or backend does.

    Parameters
    ----------
    about : str
        ``controller``, ``router`` or ``backend``.
    name : str
        Short and unique among those.
    says : str
        What holds, in a sentence.
    mend : str
        What to change where it does not.
    check : callable (law, subject) -> None
        Tries the object under test, and calls :meth:`require` with what must hold.

    Examples
    --------
    >>> law = Law(about="router", name="whole", says="Route returns a whole number.",
    ...           mend="return int(i)", check=lambda law, subject: None)
    >>> law.require(False, "got 'decode-1'", request=7)
    Traceback (most recent call last):
    ...
    voltana_ctrl.testing.conformance.LawBroken: router law 'whole' is broken: got 'decode-1'.
    It says: Route returns a whole number. Mend: return int(i). Input: request=7.
    """

    about: str
    name: str
    says: str
    mend: str
    check: Callable[[Law, Any], None]

    def require(self, holds: object, seen: str, **given: object) -> None:
        """Raise unless something holds.

        Parameters
        ----------
        holds : bool
            Whether what the law says holds here.
        seen : str
            What was seen where it does not, for the message.
        **given : object
            The input, for the message.

        Raises
        ------
        LawBroken
            If `holds` is not true.
        """
        if not holds:
            raise LawBroken(self.name, self._told(seen, given))

    @contextmanager
    def watching(self, what: str, **given: object) -> Iterator[None]:
        """Context for code of the object under test: whatever it raises breaks the law.

        Parameters
        ----------
        what : str
            What is being called.
        **given : object
            The input, for the message.

        Raises
        ------
        LawBroken
            From the exception, if there was one.
        """
        try:
            yield
        except LawBroken:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            seen = f"{what} raised {type(error).__name__}: {text}"
            raise LawBroken(self.name, self._told(seen, given)) from error

    def _told(self, seen: str, given: Mapping[str, object]) -> str:
        shown = "; ".join(f"{name}={show(value)}" for name, value in given.items())
        text = f"{self.about} law {self.name!r} is broken: {seen}. It says: {self.says}"
        return f"{text} Mend: {self.mend}." + (f" Input: {shown}." if shown else "")

    def __str__(self) -> str:
        return self.name


def chosen_laws(
    laws: Sequence[Law],
    *,
    claims: Collection[str],
    claimable: Collection[str],
    skip: Collection[str],
) -> Iterator[Law]:
    """Laws to check: without those skipped, and of the claimable ones only those claimed.

    Parameters
    ----------
    laws : sequence of Law
        All laws.
    claims, skip : collection of str
        Names that the user claims, and names to leave out.
    claimable : collection of str
        Names of laws that not everybody keeps.

    Yields
    ------
    Law
        In the order of `laws`.

    Raises
    ------
    ConfigError
        If a name is no law.
    """
    names = [law.name for law in laws]
    for option, given, known in (("skip", skip, names), ("claims", claims, sorted(claimable))):
        for name in given:
            if name not in known:
                raise ConfigError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    for law in laws:
        if law.name not in skip and (law.name in claims or law.name not in claimable):
            yield law


def show(value: object) -> str:
    """Input in one line: of a state or decision only what is not zero."""
    if isinstance(value, Observation):
        extra = f", {len(value.iterations)} iterations, {len(value.finished)} finished"
        return show(value.state) + extra
    if isinstance(value, FleetState | Decision | Request):
        told = []
        for field in fields(value):
            one = getattr(value, field.name)
            if one is not None and np.any(one):
                told.append(f"{field.name}={show(one)}")
        return f"{type(value).__name__}({', '.join(told)})"
    if isinstance(value, np.ndarray):
        return np.array2string(value, separator=", ", max_line_width=10_000, precision=6)
    return " ".join(repr(value).split())


def same(a: Any, b: Any) -> bool:
    """Whether two memories or decisions hold the same, arrays and nested values included."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        numeric = a.dtype.kind in "fc"
        return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=numeric))
    if isinstance(a, float):
        return a == b or (a != a and b != b)
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if "__eq__" in {name for kind in type(a).__mro__[:-1] for name in vars(kind)}:
        return bool(a == b)
    if hasattr(a, "__dict__"):
        return same(vars(a), vars(b))
    return pickle.dumps(a) == pickle.dumps(b)
