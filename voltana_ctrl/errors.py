"""What can go wrong, as one tree.

::

    VoltanaError
    ├── ConfigError (ValueError)      a setting, file or argument is not usable
    ├── ShapeError (ValueError)       an array has the wrong shape or type
    └── BackendError                  the plant or the hardware did not do as told
        ├── ActuationDenied           a clock or limit could not be set
        └── TelemetryStale            readings are too old to act on

Expected outcomes (an infeasible plan, a missed deadline) are values, see
:class:`voltana_ctrl.types.Status`; they are not raised.
"""

__all__ = [
    "ActuationDenied",
    "BackendError",
    "ConfigError",
    "ShapeError",
    "TelemetryStale",
    "VoltanaError",
    "missing_package",
]


class VoltanaError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(VoltanaError, ValueError):
    """A setting, file or argument is not usable.

    The message names what was wrong, what was expected, what was got and how to mend it.

    Examples
    --------
    >>> from voltana_ctrl import Slo
    >>> Slo(ttft_s=-1.0, itl_s=0.06)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: Slo.ttft_s: expected a number > 0, got -1.0
    """


class ShapeError(VoltanaError, ValueError):
    """An array has the wrong shape, length or type.

    Examples
    --------
    >>> raise ShapeError("FleetState.queue_tok: expected shape (4,), got (3,)")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ShapeError: FleetState.queue_tok: expected shape (4,), got (3,)
    """


class BackendError(VoltanaError):
    """The plant or the hardware did not do as told."""


class ActuationDenied(BackendError):
    """A clock or limit could not be set; the hardware keeps what it had.

    Examples
    --------
    >>> raise ActuationDenied("gpu 0: no permission to lock clocks")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ActuationDenied: gpu 0: no permission to lock clocks
    """


class TelemetryStale(BackendError):
    """Readings are too old to act on.

    Examples
    --------
    >>> raise TelemetryStale("decode-1: last reading 7.0 s old")
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.TelemetryStale: decode-1: last reading 7.0 s old
    """


def missing_package(error: ModuleNotFoundError) -> str:
    """Say what is not installed, and how it comes without moving what is.

    Parameters
    ----------
    error : ModuleNotFoundError
        What the import raised.

    Examples
    --------
    >>> missing_package(ModuleNotFoundError(name="zmq"))
    'pyzmq is not installed: pip install pyzmq; beside an engine, pip freeze > pins.txt before...'
    """
    name = (error.name or str(error)).partition(".")[0]
    package = {"pynvml": "nvidia-ml-py", "zmq": "pyzmq"}.get(name, name)
    return (
        f"{package} is not installed: pip install {package}; beside an engine, pip freeze >"
        f" pins.txt before it, and pip install -c pins.txt {package}"
    )
