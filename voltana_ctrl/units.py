"""Units live in names; this is the list, and the converters for the boundary.

Inside the library every quantity is in the unit of its suffix. Vendor units (milliwatts,
millijoules, milliseconds) are converted once, where they enter.
"""

__all__ = ["SUFFIXES", "j_from_mj", "s_from_ms", "w_from_mw"]

#: Suffix of a name -> what it means. Compound suffixes come first in a look-up.
SUFFIXES: dict[str, str] = {
    "_req_s": "requests per second",
    "_tok_s": "tokens per second",
    "_bytes_s": "bytes per second",
    "_j_req": "joules per request",
    "_j_tok": "joules per token",
    "_g_kwh": "grams per kilowatt-hour",
    "_kwh": "kilowatt-hours; of a price, per kilowatt-hour",
    "_s": "seconds",
    "_mhz": "megahertz",
    "_w": "watts",
    "_j": "joules",
    "_tok": "tokens",
    "_req": "requests",
    "_bytes": "bytes",
    "_frac": "a ratio; 1 is the whole, never percent",
}


def w_from_mw(power_mw: float) -> float:
    """Watts from milliwatts.

    Parameters
    ----------
    power_mw : float
        Power in milliwatts.

    Examples
    --------
    >>> w_from_mw(250_000)
    250.0
    """
    return power_mw / 1000.0


def j_from_mj(energy_mj: float) -> float:
    """Joules from millijoules.

    Parameters
    ----------
    energy_mj : float
        Energy in millijoules.

    Examples
    --------
    >>> j_from_mj(1500)
    1.5
    """
    return energy_mj / 1000.0


def s_from_ms(time_ms: float) -> float:
    """Seconds from milliseconds.

    Parameters
    ----------
    time_ms : float
        Time in milliseconds.

    Examples
    --------
    >>> s_from_ms(60)
    0.06
    """
    return time_ms / 1000.0
