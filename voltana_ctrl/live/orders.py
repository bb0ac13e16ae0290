"""What nodes and their controller say to each other: small JSON messages, checked on both sides.

A node reports what it read of its instances; the answer is an order for them. Both name their
schema and the fleet they were made for, so that neither acts on what is meant for another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from voltana_ctrl.backends.log import plain
from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.errors import VoltanaError
from voltana_ctrl.types import FleetSpec, FleetState, IterationBatch, Observation, RequestBatch

__all__ = [
    "MAX_BYTES",
    "MessageRefused",
    "NodeOrder",
    "NodeReport",
    "decode_order",
    "decode_report",
    "encode_order",
    "encode_report",
    "fleet_digest",
]

_REPORT = "voltana-ctrl/node-report/1"
_ORDER = "voltana-ctrl/node-order/1"
#: A longer message is refused before it is read.
MAX_BYTES = 2**20
_MOST_ROWS = 20_000
_LARGEST = 1e15
_Batch = TypeVar("_Batch", IterationBatch, RequestBatch)


class MessageRefused(VoltanaError, ValueError):
    """A message that is not of the protocol, or not for this fleet.

    Examples
    --------
    >>> issubclass(MessageRefused, VoltanaError)
    True
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What one node read of its instances.

    Parameters
    ----------
    node : str
        Name of the node.
    number : int
        Counts the reports of one start of the agent, from 0.
    ids : tuple of str
        Its instances.
    observation : Observation
        State of these instances, in this order; iterations and finished requests name
        instances by their index in the whole fleet.

    Examples
    --------
    >>> NodeReport(node="n0", number=0, ids=("d0",),
    ...            observation=Observation(state=FleetState.idle(1))).ids
    ('d0',)
    """

    node: str
    number: int
    ids: tuple[str, ...]
    observation: Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOrder:
    """What the controller wants of one node.

    Parameters
    ----------
    number : int
        Counts the decisions of one start of the controller, from 0.
    valid_s : float
        How long from now it holds without a newer one.
    freq_mhz, freq_max_mhz : mapping of str to float
        Floor and ceiling of each instance, by id.

    Examples
    --------
    >>> NodeOrder(number=0, valid_s=1.0, freq_mhz={"d0": 705.0}, freq_max_mhz={"d0": 1410.0}).number
    0
    """

    number: int
    valid_s: float
    freq_mhz: Mapping[str, float]
    freq_max_mhz: Mapping[str, float]


def fleet_digest(fleet: FleetSpec) -> str:
    """Short name of a fleet: the same where ids, roles and clocks are the same.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> fleet_digest(FleetSpec.parse("1P1D", profile)) == fleet_digest(
    ...     FleetSpec.parse("1P2D", profile))
    False
    """
    told = [[one.id, one.role.value, one.clocks_mhz.tolist()] for one in fleet.instances]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def encode_report(report: NodeReport, fleet: FleetSpec) -> bytes:
    """Report as bytes.

    Parameters
    ----------
    report : NodeReport
        The report.
    fleet : FleetSpec
        The whole fleet.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> report = NodeReport(node="n0", number=3, ids=("decode-0",),
    ...                     observation=Observation(state=FleetState.idle(1)))
    >>> decode_report(encode_report(report, fleet), fleet).number
    3
    """
    values = {
        "schema": _REPORT,
        "fleet": fleet_digest(fleet),
        "node": report.node,
        "number": report.number,
        "ids": list(report.ids),
        "observation": plain(report.observation),
    }
    return _encode(values)


def decode_report(data: bytes, fleet: FleetSpec) -> NodeReport:
    """Report from bytes that anybody may have sent.

    Parameters
    ----------
    data : bytes
        The message.
    fleet : FleetSpec
        The whole fleet.

    Raises
    ------
    MessageRefused
        If it is not a report for this fleet, whatever it is.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decode_report(b"[]", fleet)
    Traceback (most recent call last):
    ...
    voltana_ctrl.live.orders.MessageRefused: message: expected an object, got list
    """
    values = _decode(data, _REPORT, fleet, {"node", "number", "ids", "observation"})
    node, ids = values["node"], values["ids"]
    if not (isinstance(node, str) and 0 < len(node) <= 253):
        raise MessageRefused("node: expected a name of 1 to 253 characters")
    if not (isinstance(ids, list) and 0 < len(ids) <= len(fleet)):
        raise MessageRefused(f"ids: expected 1 to {len(fleet)} instances")
    if len({str(one) for one in ids}) != len(ids) or any(one not in fleet.ids for one in ids):
        raise MessageRefused("ids: expected instances of the fleet, each once")
    told = values["observation"]
    if not (isinstance(told, dict) and set(told) == {"state", "iterations", "finished"}):
        raise MessageRefused("observation: expected state, iterations and finished")
    try:
        state = _state(told["state"], len(ids))
        iterations = _batch(IterationBatch, told["iterations"], len(fleet))
        finished = _batch(RequestBatch, told["finished"], len(fleet))
    except (VoltanaError, TypeError, ValueError, OverflowError) as error:
        raise MessageRefused(f"observation: {error}") from error
    return NodeReport(
        node=node,
        number=_count(values["number"]),
        ids=tuple(ids),
        observation=Observation(state=state, iterations=iterations, finished=finished),
    )


def encode_order(order: NodeOrder, fleet: FleetSpec) -> bytes:
    """Order as bytes.

    Parameters
    ----------
    order : NodeOrder
        The order.
    fleet : FleetSpec
        The whole fleet.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> order = NodeOrder(number=0, valid_s=1.0, freq_mhz={"decode-0": 705.0},
    ...                   freq_max_mhz={"decode-0": 1410.0})
    >>> decode_order(encode_order(order, fleet), fleet) == order
    True
    """
    values = {
        "schema": _ORDER,
        "fleet": fleet_digest(fleet),
        "number": order.number,
        "valid_s": order.valid_s,
        "freq_mhz": dict(order.freq_mhz),
        "freq_max_mhz": dict(order.freq_max_mhz),
    }
    return _encode(values)


def decode_order(data: bytes, fleet: FleetSpec) -> NodeOrder:
    """Order from bytes that anybody may have sent.

    Parameters
    ----------
    data : bytes
        The message.
    fleet : FleetSpec
        The whole fleet.

    Raises
    ------
    MessageRefused
        If it is not an order for this fleet, whatever it is.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decode_order(b"[]", fleet)
    Traceback (most recent call last):
    ...
    voltana_ctrl.live.orders.MessageRefused: message: expected an object, got list
    """
    values = _decode(data, _ORDER, fleet, {"number", "valid_s", "freq_mhz", "freq_max_mhz"})
    floors, ceilings = values["freq_mhz"], values["freq_max_mhz"]
    if not (isinstance(floors, dict) and isinstance(ceilings, dict) and floors):
        raise MessageRefused("freq_mhz, freq_max_mhz: expected clocks by instance")
    if set(floors) != set(ceilings) or not set(floors) <= set(fleet.ids):
        raise MessageRefused("freq_mhz, freq_max_mhz: expected the same instances of the fleet")
    try:
        not_negative("valid_s", values["valid_s"])
        for name in floors:
            positive(f"freq_mhz of {name}", floors[name])
            positive(f"freq_max_mhz of {name}", ceilings[name])
            if ceilings[name] > fleet.instances[fleet.ids.index(name)].clocks_mhz[-1]:
                raise MessageRefused(f"freq_max_mhz of {name}: above its highest clock")
            if floors[name] > ceilings[name]:
                raise MessageRefused(f"freq_mhz of {name}: expected at most freq_max_mhz")
    except (VoltanaError, OverflowError) as error:
        raise MessageRefused(str(error)) from error
    return NodeOrder(
        number=_count(values["number"]),
        valid_s=float(min(values["valid_s"], _LARGEST)),
        freq_mhz={name: float(mhz) for name, mhz in floors.items()},
        freq_max_mhz={name: float(mhz) for name, mhz in ceilings.items()},
    )


def _encode(values: Mapping[str, Any]) -> bytes:
    try:
        data = json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise MessageRefused(f"message: {error}") from error
    if len(data) > MAX_BYTES:
        raise MessageRefused(f"message: {len(data)} bytes, expected at most {MAX_BYTES}")
    return data


def _decode(data: bytes, schema: str, fleet: FleetSpec, keys: set[str]) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise MessageRefused(f"message: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
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


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


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
