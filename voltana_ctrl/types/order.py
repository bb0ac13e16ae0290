"""What a controller wants of one instance: the decision as it travels to nodes and routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types.belief import Belief
from voltana_ctrl.types.instance import Role
from voltana_ctrl.types.rest import DEPTHS, Depth
from voltana_ctrl.types.tuning import Tuning

_MOST_MHZ = 1e5
#: What may be told to be believed, with the range of it.
_BELIEVED: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "ttft_margin_frac": (-0.9, 10.0),
        "itl_margin_frac": (-0.9, 10.0),
        "prefill_pace_frac": (0.01, 100.0),
        "decode_pace_frac": (0.01, 100.0),
        "able_mhz": (1.0, _MOST_MHZ),
        "delay_s": (0.0, 60.0),
    }
)
_MOST_STEPS, _MOST_CLASSES, _MOST_S = 64, 64, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one instance, and who sends work to it, shall do until the next order.

    Parameters
    ----------
    floor_mhz, ceiling_mhz : float
        Between which its governor chooses the clock.
    announced : tuple of (after_s, ceiling_mhz)
        Ceilings that follow by themselves, so many seconds after the order was asked for: a power
        budget that is known ahead is kept by a node whose controller has died.
    alone_mhz : float, optional
        Ceiling once the order has lapsed. Left out it is that of the order, as under a power
        budget, which holds when nobody decides any more; a policy's own ceiling ends with it.
    ttft_margin_frac, itl_margin_frac, prefill_pace_frac, decode_pace_frac, able_mhz : optional
        What is to be believed of the instance, see :class:`~voltana_ctrl.types.Belief`; what was
        believed before where all are left out.
    delay_s : float, optional
        Time from asking for a clock until it runs; what the node has measured where it is left out.
    active : bool
        Whether the instance takes new work.
    route_frac, price_j_req : float
        Its share of the new work of its phase, and the energy that one more request costs.
    depth : {"parked", "deep_parked", "asleep", "off"}
        How deep it sleeps once it is parked and empty.
    role : Role, optional
        What it does from now on; what it did before where it is left out.
    admits : tuple of str, optional
        Classes of requests that may be sent there; all where it is left out.

    Raises
    ------
    ConfigError
        Naming the field that does not fit.

    Examples
    --------
    >>> order = Order(floor_mhz=600.0, ceiling_mhz=1410.0, announced=((30.0, 900.0),))
    >>> order.after(29.0).ceiling_mhz, order.after(30.0).ceiling_mhz
    (1410.0, 900.0)
    >>> order.alone(30.0).floor_mhz  # without a controller: the highest clock that is allowed
    900.0
    >>> Order(floor_mhz=705.0, ceiling_mhz=705.0, alone_mhz=1410.0).alone(2.0).floor_mhz
    1410.0
    """

    floor_mhz: float
    ceiling_mhz: float
    announced: tuple[tuple[float, float], ...] = ()
    alone_mhz: float | None = None
    ttft_margin_frac: float | None = None
    itl_margin_frac: float | None = None
    prefill_pace_frac: float | None = None
    decode_pace_frac: float | None = None
    able_mhz: float | None = None
    delay_s: float | None = None
    active: bool = True
    route_frac: float = 1.0
    price_j_req: float = 0.0
    depth: Depth = "parked"
    role: Role | None = None
    admits: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        positive("Order.floor_mhz", self.floor_mhz)
        positive("Order.ceiling_mhz", self.ceiling_mhz)
        if not self.floor_mhz <= self.ceiling_mhz <= _MOST_MHZ:
            raise ConfigError(
                f"Order: expected floor <= ceiling <= {_MOST_MHZ:g} MHz, got {self.floor_mhz:g} and"
                f" {self.ceiling_mhz:g}"
            )
        if self.alone_mhz is not None:
            _between("Order.alone_mhz", self.alone_mhz, self.ceiling_mhz, _MOST_MHZ)
        for name, (least, most) in _BELIEVED.items():
            if getattr(self, name) is not None:
                _between(f"Order.{name}", getattr(self, name), least, most)
        _between("Order.route_frac", self.route_frac, 0.0, 1.0 + 1e-9)
        _between("Order.price_j_req", self.price_j_req, -1e12, 1e12)
        if not isinstance(self.active, bool):
            raise ConfigError(f"Order.active: expected true or false, got {self.active!r}")
        if self.depth not in DEPTHS:
            raise ConfigError(
                f"Order.depth: expected one of {', '.join(DEPTHS)}, got {self.depth!r}"
            )
        if self.role is not None and not isinstance(self.role, Role):
            raise ConfigError(f"Order.role: expected a Role, got {self.role!r}")
        _check_announced(self.announced)
        if self.admits is not None and not (
            isinstance(self.admits, tuple)
            and len(self.admits) <= _MOST_CLASSES
            and all(isinstance(name, str) and len(name) <= 64 for name in self.admits)
        ):
            raise ConfigError(f"Order.admits: expected names of classes, got {self.admits!r}")

    def belief(self, *, delay_s: float) -> Belief | None:
        """What governors are to believe of this instance alone; None where nothing is told.

        Parameters
        ----------
        delay_s : float
            What was measured here, where the order has no delay.

        Returns
        -------
        Belief or None
            Arrays of length 1. Where only part is told, the rest are the default margins, the
            profile's pace, the ceiling, and this delay.

        Examples
        --------
        >>> order = Order(floor_mhz=600.0, ceiling_mhz=1410.0, decode_pace_frac=1.2)
        >>> order.belief(delay_s=0.02).decode_pace_frac
        array([1.2])
        """
        told = {name: getattr(self, name) for name in _BELIEVED}
        if all(value is None for value in told.values()):
            return None
        ttft_frac, itl_frac = Tuning().margin_frac
        assumed = {"ttft_margin_frac": ttft_frac, "itl_margin_frac": itl_frac}
        assumed |= {"able_mhz": self.ceiling_mhz}
        assumed |= {"prefill_pace_frac": 1.0, "decode_pace_frac": 1.0, "delay_s": delay_s}
        return Belief(
            **{
                name: np.array([assumed[name] if value is None else value])
                for name, value in told.items()
            }
        )

    def after(self, held_s: float) -> Order:
        """The order as it stands when it has been held for so long.

        Parameters
        ----------
        held_s : float
            Seconds since it was asked for.

        Returns
        -------
        Order
            Times that are left of what is announced count from then on.

        Examples
        --------
        >>> later = ((2.0, 705.0), (9.0, 600.0))
        >>> order = Order(floor_mhz=900.0, ceiling_mhz=1410.0, announced=later)
        >>> order.after(3.0).plain()
        {'floor_mhz': 705.0, 'ceiling_mhz': 705.0, 'announced': ((6.0, 600.0),)}
        """
        if not self.announced:
            return self
        due = [mhz for after_s, mhz in self.announced if after_s <= held_s]
        ceiling_mhz = due[-1] if due else self.ceiling_mhz
        return replace(
            self,
            floor_mhz=min(self.floor_mhz, ceiling_mhz),
            ceiling_mhz=ceiling_mhz,
            announced=tuple(
                (after_s - held_s, mhz) for after_s, mhz in self.announced if after_s > held_s
            ),
        )

    def alone(self, held_s: float) -> Order:
        """What holds when the order has lapsed and no other has come: fail toward latency.

        The highest clock under the ceiling, or that of `alone_mhz`, and everybody takes work; what
        was learnt of the engine and what was announced stay.

        Parameters
        ----------
        held_s : float
            Seconds since it was asked for.

        Returns
        -------
        Order
            With the highest clock that is allowed as floor and ceiling.
        """
        now = self.after(held_s)
        ceiling_mhz = now.ceiling_mhz if now.alone_mhz is None else now.alone_mhz
        return replace(
            now,
            floor_mhz=ceiling_mhz,
            ceiling_mhz=ceiling_mhz,
            active=True,
            price_j_req=0.0,
            admits=None,
        )

    def plain(self) -> dict[str, Any]:
        """Values for JSON; what stands at its default is left out.

        Returns
        -------
        dict
            Of numbers, text, tuples and truth values; :meth:`parse` reads it.

        Examples
        --------
        >>> Order(floor_mhz=600.0, ceiling_mhz=1410.0, active=False).plain()
        {'floor_mhz': 600.0, 'ceiling_mhz': 1410.0, 'active': False}
        """
        told: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                told[field.name] = value.value if isinstance(value, Role) else value
        return told

    @classmethod
    def parse(cls, values: Any) -> Order:
        """Order from plain values that anybody may have sent.

        Parameters
        ----------
        values : object
            See :meth:`plain`.

        Raises
        ------
        ConfigError
            If they are no order, whatever they are.

        Examples
        --------
        >>> Order.parse({"floor_mhz": 600, "ceiling_mhz": 1410, "announced": [[5, 900]]}).announced
        ((5.0, 900.0),)
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"order: expected an object, got {type(values).__name__}")
        names = {field.name for field in fields(cls)}
        if not {"floor_mhz", "ceiling_mhz"} <= set(values) <= names:
            raise ConfigError(f"order: expected the keys {', '.join(sorted(names))}")
        told = dict(values)
        try:
            for name, value in values.items():
                if name == "announced":
                    told[name] = tuple((_number(after_s), _number(mhz)) for after_s, mhz in value)
                elif name == "role":
                    told[name] = None if value is None else Role(value)
                elif name == "admits":
                    told[name] = None if value is None else tuple(value)
                elif name.endswith(("_mhz", "_frac", "_s", "_req")) and value is not None:
                    told[name] = _number(value)
            return cls(**told)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"order: {error}") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {type(value).__name__}")
    return float(value)


def _between(name: str, value: float, least: float, most: float) -> None:
    if not (isinstance(value, int | float) and least <= value <= most):
        raise ConfigError(f"{name}: expected {least:g} to {most:g}, got {value!r}")


def _check_announced(announced: tuple[tuple[float, float], ...]) -> None:
    if len(announced) > _MOST_STEPS:
        raise ConfigError(f"Order.announced: expected at most {_MOST_STEPS}, got {len(announced)}")
    before_s = 0.0
    for after_s, mhz in announced:
        not_negative("Order.announced: seconds", after_s)
        positive("Order.announced: MHz", mhz)
        if not before_s <= after_s <= _MOST_S or mhz > _MOST_MHZ:
            raise ConfigError(
                f"Order.announced: expected ascending times and clocks up to {_MOST_MHZ:g} MHz, got"
                f" {after_s:g} s: {mhz:g} MHz"
            )
        before_s = after_s
