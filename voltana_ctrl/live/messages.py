"""Reports and orders as bytes: JSON that names its schema and the fleet it was made for.

Whatever arrives is checked before anything acts on it: what is not of the protocol, or meant for
another fleet, is refused by one error that says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, get_args

import numpy as np

from voltana_ctrl.backends.log import plain
from voltana_ctrl.checks import not_negative
from voltana_ctrl.errors import VoltanaError
from voltana_ctrl.live.orders import Orders, Report, SenderKind
from voltana_ctrl.textfile import json_value
from voltana_ctrl.types import (
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    Order,
    RequestBatch,
)

__all__ = [
    "LEAST_TOKEN",
    "MAX_BYTES",
    "MessageRefused",
    "decode_orders",
    "decode_report",
    "encode_orders",
    "encode_report",
    "fleet_digest",
]

_REPORT = "voltana-ctrl/report/1"
_ORDERS = "voltana-ctrl/orders/1"
#: A token has so many characters at least.
LEAST_TOKEN = 16
#: A longer message is refused before it is read.
MAX_BYTES = 2**20
_MOST_ROWS = 20_000
_MOST_SAID, _MOST_DELAY_S = 500, 60.0
_LARGEST = 1e15
#: What a report holds of an observation: all that nodes and routers know.
_OBSERVED = ("state", "iterations", "finished")
_Batch = TypeVar("_Batch", IterationBatch, RequestBatch)


class MessageRefused(VoltanaError, ValueError):
    """A message that is not of the protocol, or not for this fleet."""


def fleet_digest(fleet: FleetSpec) -> str:
    """Fingerprint of a fleet: the same where ids, roles and clocks are the same.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.

    Returns
    -------
    str
        16 hexadecimal digits.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> fleet_digest(FleetSpec.parse("1P1D", profile)) == fleet_digest(
    ...     FleetSpec.parse("1P2D", profile))
    False
    """
    told = [[one.id, one.role.value, one.clocks_mhz.tolist()] for one in fleet.instances]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def encode_report(report: Report, fleet: FleetSpec) -> bytes:
    """Report as bytes to be sent; what it says of problems is cut at 500 characters each.

    Parameters
    ----------
    report : Report
        The report.
    fleet : FleetSpec
        The whole fleet.

    Returns
    -------
    bytes
        JSON, which :func:`decode_report` reads.

    Raises
    ------
    MessageRefused
        If it is longer than `MAX_BYTES`, or holds a number that is not finite.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.live.orders import Report
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> report = Report(kind="node", sender="n0", start="a", number=3, ids=("decode-0",),
    ...                 observation=Observation(state=FleetState.idle(1)))
    >>> decode_report(encode_report(report, fleet), fleet).number
    3
    """
    return _encode(
        _REPORT,
        fleet,
        kind=report.kind,
        sender=report.sender,
        start=report.start,
        number=report.number,
        ids=list(report.ids),
        observation={name: plain(getattr(report.observation, name)) for name in _OBSERVED},
        problems={name: said[:_MOST_SAID] for name, said in report.problems.items()},
        delay_s=dict(report.delay_s),
    )


def decode_report(data: bytes, fleet: FleetSpec) -> Report:
    """Report from bytes that anybody may have sent.

    Parameters
    ----------
    data : bytes
        The message.
    fleet : FleetSpec
        The whole fleet.

    Returns
    -------
    Report
        All of it checked.

    Raises
    ------
    MessageRefused
        If it is not a report for this fleet, whatever it is.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decode_report(b"[]", fleet)
    Traceback (most recent call last):
    ...
    voltana_ctrl.live.messages.MessageRefused: message: expected an object, got list
    """
    keys = {"kind", "sender", "start", "number", "ids", "observation", "problems", "delay_s"}
    values = _decode(data, _REPORT, fleet, keys)
    ids, kind = values["ids"], values["kind"]
    if kind not in get_args(SenderKind):
        raise MessageRefused("kind: expected node or router")
    if not (isinstance(ids, list) and 0 < len(ids) <= len(fleet)):
        raise MessageRefused(f"ids: expected 1 to {len(fleet)} instances")
    if len({str(one) for one in ids}) != len(ids) or any(one not in fleet.ids for one in ids):
        raise MessageRefused("ids: expected instances of the fleet, each once")
    told = values["observation"]
    if not (isinstance(told, dict) and set(told) == set(_OBSERVED)):
        raise MessageRefused("observation: expected state, iterations and finished")
    try:
        state = _state(told["state"], len(ids))
        iterations = _batch(IterationBatch, told["iterations"], len(fleet))
        finished = _batch(RequestBatch, told["finished"], len(fleet))
    except (VoltanaError, TypeError, ValueError, OverflowError) as error:
        raise MessageRefused(f"observation: {error}") from error
    return Report(
        kind=kind,
        sender=_name("sender", values["sender"]),
        start=_name("start", values["start"]),
        number=_count(values["number"]),
        ids=tuple(ids),
        observation=Observation(state=state, iterations=iterations, finished=finished),
        problems=_by_id("problems", values["problems"], ids, _is_said),
        delay_s=_by_id("delay_s", values["delay_s"], ids, _is_delay),
    )


def encode_orders(orders: Orders, fleet: FleetSpec) -> bytes:
    """Orders as bytes to be sent.

    Parameters
    ----------
    orders : Orders
        The orders.
    fleet : FleetSpec
        The whole fleet.

    Returns
    -------
    bytes
        JSON, which :func:`decode_orders` reads.

    Raises
    ------
    MessageRefused
        If they are longer than `MAX_BYTES`, or hold a number that is not finite.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.live.orders import Orders
    >>> from voltana_ctrl.types import Order
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> sent = Orders(start="a", number=0, valid_s=1.0,
    ...               orders={"decode-0": Order(floor_mhz=705.0, ceiling_mhz=1410.0)})
    >>> decode_orders(encode_orders(sent, fleet), fleet) == sent
    True
    """
    return _encode(
        _ORDERS,
        fleet,
        start=orders.start,
        number=orders.number,
        valid_s=orders.valid_s,
        orders={name: order.plain() for name, order in orders.orders.items()},
        policy=orders.policy,
        state=None if orders.state is None else plain(orders.state),
    )


def decode_orders(data: bytes, fleet: FleetSpec) -> Orders:
    """Orders from bytes that anybody may have sent.

    Parameters
    ----------
    data : bytes
        The message.
    fleet : FleetSpec
        The whole fleet.

    Returns
    -------
    Orders
        All of them checked: no ceiling is above the highest clock of its instance.

    Raises
    ------
    MessageRefused
        If they are not orders for this fleet, whatever they are.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decode_orders(b"[]", fleet)
    Traceback (most recent call last):
    ...
    voltana_ctrl.live.messages.MessageRefused: message: expected an object, got list
    """
    keys = {"start", "number", "valid_s", "orders", "policy", "state"}
    values = _decode(data, _ORDERS, fleet, keys)
    told = values["orders"]
    if not (isinstance(told, dict) and told and set(told) <= set(fleet.ids)):
        raise MessageRefused("orders: expected orders by the id of their instance")
    try:
        not_negative("valid_s", values["valid_s"])
        orders = {name: Order.parse(one) for name, one in told.items()}
        state = None
        if values["state"] is not None:
            state = _state(values["state"], len(fleet)).bounded(fleet)
    except (VoltanaError, TypeError, ValueError, OverflowError) as error:
        raise MessageRefused(str(error)) from error
    for name, order in orders.items():
        highest_mhz = fleet.instances[fleet.ids.index(name)].clocks_mhz[-1]
        if max(order.ceiling_mhz, *(mhz for _, mhz in order.announced), 0.0) > highest_mhz:
            raise MessageRefused(f"{name}: a ceiling above its highest clock, {highest_mhz:g} MHz")
    return Orders(
        start=_name("start", values["start"]),
        number=_count(values["number"]),
        valid_s=float(min(values["valid_s"], _LARGEST)),
        orders=orders,
        policy=_name("policy", values["policy"]),
        state=state,
    )


def _encode(schema: str, fleet: FleetSpec, **values: Any) -> bytes:
    told = {"schema": schema, "fleet": fleet_digest(fleet), **values}
    try:
        data = json.dumps(told, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise MessageRefused(f"message: {error}") from error
    if len(data) > MAX_BYTES:
        raise MessageRefused(f"message: {len(data)} bytes, expected at most {MAX_BYTES}")
    return data


def _decode(data: bytes, schema: str, fleet: FleetSpec, keys: set[str]) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise MessageRefused(f"message: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        values = json_value(data.decode("utf-8"), "message")
    except ValueError as error:
        raise MessageRefused("message: expected JSON") from error
    if not isinstance(values, dict):
        raise MessageRefused(f"message: expected an object, got {type(values).__name__}")
    if values.get("schema") != schema:
        raise MessageRefused(f"message: expected schema {schema}; use the same version on both")
    if values.get("fleet") != fleet_digest(fleet):
        raise MessageRefused("message: for another fleet; use the same fleet file on both")
    if set(values) != keys | {"schema", "fleet"}:
        raise MessageRefused(f"message: expected the keys {', '.join(sorted(keys))}")
    return values


def _name(name: str, value: object) -> str:
    if not (isinstance(value, str) and 0 < len(value) <= 253):
        raise MessageRefused(f"{name}: expected a name of 1 to 253 characters")
    return value


def _by_id(
    name: str, values: Any, ids: list[str], fits: Callable[[object], bool]
) -> dict[str, Any]:
    if not (isinstance(values, dict) and set(values) <= set(ids)):
        raise MessageRefused(f"{name}: expected values by the id of their instance")
    if not all(fits(value) for value in values.values()):
        raise MessageRefused(f"{name}: a value that does not fit")
    return values


def _is_said(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_SAID


def _is_delay(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0.0 <= value <= _MOST_DELAY_S  # type: ignore[operator]


def _count(value: object) -> int:
    if not (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53):
        raise MessageRefused("number: expected a whole number >= 0")
    return value


def _columns(kind: type, values: Any) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if not (isinstance(values, dict) and set(values) == names):
        raise MessageRefused(f"{kind.__name__}: expected the keys {', '.join(sorted(names))}")
    for name, value in values.items():
        column = value if isinstance(value, list) else [value]
        if len(column) > _MOST_ROWS:
            raise MessageRefused(f"{kind.__name__}.{name}: more than {_MOST_ROWS} rows")
        for number in column:
            if name == "alive":
                fits = isinstance(number, bool)
            else:
                fits = isinstance(number, int | float) and not isinstance(number, bool)
                fits = fits and -_LARGEST < number < _LARGEST  # NaN does not fit either
            if not fits:
                raise MessageRefused(f"{kind.__name__}.{name}: expected numbers")
    return values


def _state(values: Any, n: int) -> FleetState:
    columns = _columns(FleetState, values)
    if isinstance(columns["t_s"], list) or not all(
        isinstance(column, list) and len(column) == n
        for name, column in columns.items()
        if name != "t_s"
    ):
        raise MessageRefused(f"FleetState: expected {n} numbers per column")
    state = FleetState(**columns)
    for field in fields(FleetState):
        if np.any(np.asarray(getattr(state, field.name), dtype=np.float64) < 0.0):
            raise MessageRefused(f"FleetState.{field.name}: expected numbers >= 0")
    return state


def _batch(kind: type[_Batch], values: Any, n: int) -> _Batch:
    columns = _columns(kind, values)
    for name, column in columns.items():
        if not isinstance(column, list):
            raise MessageRefused(f"{kind.__name__}.{name}: expected a list")
        if name.endswith("instance") and not all(
            isinstance(i, int) and -1 <= i < n for i in column
        ):
            raise MessageRefused(f"{kind.__name__}.{name}: expected -1 to {n - 1}")
    return kind(**columns)
