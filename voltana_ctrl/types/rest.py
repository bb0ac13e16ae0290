"""How deep a parked instance sleeps: what it draws, and what it takes to get in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from voltana_ctrl.checks import not_negative
from voltana_ctrl.errors import ConfigError

#: How deep a parked instance sleeps: drained and idle, its memory clock lowered as well, its engine
#: asleep, or stopped. Deeper ones take longer to wake.
Depth = Literal["parked", "deep_parked", "asleep", "off"]

#: Every depth, the shallowest first.
DEPTHS: tuple[Depth, ...] = get_args(Depth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """One depth of sleep of one instance.

    Parameters
    ----------
    power_w : float
        Power while it sleeps.
    wake_s, wake_j : float
        Time from being woken until it works, and energy that this takes beyond idle power.
    enter_s : float
        Time it takes to fall asleep, at idle power. Who is woken meanwhile has to get there first,
        and then wakes.

    Raises
    ------
    ConfigError
        If a value is not a finite number >= 0.

    Examples
    --------
    A measured one, of an L20 with the clocks of core and memory at their lowest:

    >>> Rest(power_w=36.0, wake_s=0.028)
    Rest(power_w=36.0, wake_s=0.028, wake_j=0.0, enter_s=0.0)
    """

    power_w: float
    wake_s: float = 0.0
    wake_j: float = 0.0
    enter_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            not_negative(f"Rest.{name}", getattr(self, name))

    @classmethod
    def parse(cls, values: Any) -> Rest:
        """Rest from a table of a TOML file.

        Parameters
        ----------
        values : object
            Its keys are the parameters; `power_w` is needed.

        Raises
        ------
        ConfigError
            Naming the key that does not fit.

        Examples
        --------
        >>> Rest.parse({"power_w": 54, "wake_s": 40}).wake_s
        40.0
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"expected a table such as {{ power_w = 54.0, wake_s = 40.0 }}, got {values!r}"
            )
        for key, value in values.items():
            if key not in cls.__slots__:
                raise ConfigError(f"unknown key {key!r}; known are {', '.join(cls.__slots__)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{key}: expected a number, got {value!r}")
        if "power_w" not in values:
            raise ConfigError("power_w: missing")
        return cls(**{key: float(value) for key, value in values.items()})


def check_rest(label: str, rest: object, idle_w: float) -> None:
    """Refuse what is no rest, or draws more than being idle.

    Parameters
    ----------
    label : str
        What errors call it.
    rest : object
        A :class:`Rest`, or None where there is no such depth.
    idle_w : float
        Idle power.

    Raises
    ------
    ConfigError
        If it does not fit.

    Examples
    --------
    >>> from voltana_ctrl.types import Rest
    >>> check_rest("off", Rest(power_w=61.0), 60.0)
    Traceback (most recent call last):
    voltana_ctrl.errors.ConfigError: off.power_w: expected at most 60, its idle_w, got 61
    """
    if rest is None:
        return
    if not isinstance(rest, Rest):
        raise ConfigError(f"{label}: expected a Rest, got {rest!r}")
    if rest.power_w > idle_w:
        raise ConfigError(
            f"{label}.power_w: expected at most {idle_w:g}, its idle_w, got {rest.power_w:g}"
        )
