"""Compiled functions as arguments of compiled functions, looked up once.

Numba looks a function argument up by its signature at every call, which takes it some 20 us, and
makes a type of it, which takes 10 more. What :func:`resolved` returns carries both.
"""

from typing import Any

from numba.core.dispatcher import Dispatcher
from numba.core.types.function_type import CompileResultWAP, FunctionType


class _Resolved(CompileResultWAP):
    """A compiled function with its address and its type."""

    def __init__(self, compiled: Any) -> None:
        super().__init__(compiled)
        self._numba_type_ = FunctionType(self.signature())


def resolved(function: Any, signature: Any) -> Any:
    """Make a compiled function ready to be passed many times.

    Parameters
    ----------
    function : Dispatcher
        What ``numba.njit`` made; a plain function, as there is with compilation switched off,
        is returned as it is.
    signature : numba signature
        What it is called with.
    """
    if not isinstance(function, Dispatcher):
        return function
    return _Resolved(function.get_compile_result(signature))
