"""Compiled functions as arguments of compiled functions, looked up once.

Numba looks a function argument up by its signature at every call, which takes it some 20 us. What
:func:`resolved` returns carries its address.
"""

from typing import Any

from numba.core.dispatcher import Dispatcher
from numba.core.types.function_type import CompileResultWAP


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
    return CompileResultWAP(function.get_compile_result(signature))
