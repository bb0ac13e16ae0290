"""Packages whose names are imported when they are first used, as their type stubs list them.

``import voltana_ctrl`` runs inside other people's servers and may cost next to nothing. A package
that offers names from its modules therefore lists them once, in the stub ``__init__.pyi`` beside
its ``__init__.py``: type checkers read it, and so does :func:`lazy_names`. (The library
lazy_loader does the same; what runs inside an engine may need nothing but NumPy and Numba.)
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import get_data

__all__ = ["lazy_names", "listed_names"]


def listed_names(package: str) -> dict[str, str]:
    """Names that the stub of a lazy package lists, each with the module that it is imported from.

    Parameters
    ----------
    package : str
        Its ``__name__``.

    Examples
    --------
    >>> listed_names("voltana_ctrl.backends")["SimBackend"]
    'voltana_ctrl.backends.sim'
    """
    stub = get_data(package, "__init__.pyi") or b""
    return {
        alias.name: node.module or ""
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def lazy_names(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make what a lazy package consists of, from the imports in its stub.

    Parameters
    ----------
    package : str
        Its ``__name__``.

    Returns
    -------
    getattr, dir : callable
        Its ``__getattr__`` and ``__dir__``.
    names : list of str
        Its ``__all__``, sorted.

    Examples
    --------
    >>> getattr_, _, names = lazy_names("voltana_ctrl.backends")
    >>> "SimBackend" in names, getattr_("SimBackend").__module__
    (True, 'voltana_ctrl.backends.sim')
    """
    homes = listed_names(package)

    def getattr_(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # the next time it is simply there
        return value

    names = sorted(homes)
    return getattr_, lambda: sorted({*vars(sys.modules[package]), *names}), names
