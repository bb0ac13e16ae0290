"""The format of a profile file, and the evaluation of its laws on the clock ladder.

A coefficient is a number, or a list of terms ``{ value = ..., shape = "..." }`` whose sum it
is; a term without a shape does not depend on the clock. A shape is a factor of the clock
``f`` in MHz, with ``g = f / 1000``, in one of three forms:

``points``
    linear between (`clock_mhz`, `factor`), and level outside;
``power``
    ``(ref_mhz / min(f, upto_mhz)) ** exponent``;
``voltage``
    ``g ** exponent * (1 + slope_per_ghz * max(0, g - knee_ghz)) ** 2``: dynamic power is
    clock times voltage squared, and the voltage rises above the knee.

Sections that may be left out: ``parking`` (what a parked and empty instance draws, and how long
it takes to wake), ``deep_parked``, ``asleep`` and ``off`` (deeper sleep: fields of
:class:`voltana_ctrl.types.Rest`), ``clock_change`` (what a change of its clock costs), ``server``
(what the rest of its server draws, per instance), ``band`` (how far all of it may be from the
truth: fields of :class:`voltana_ctrl.types.Band`) and ``actuators``. Within the others a
coefficient that may be left out is 0: time of the host per decode step (``decode_time.host_s``)
and per prompt (``prefill_time.req_s``), what prompts draw on top in an iteration that decodes, too
(``prefill_power.beside_w``), the line to which computing bends the step time
(``decode_time.roof_base_s``, ``roof_s``), and the tokens of a tile in which prompts and running
requests are computed together (``tile_tok``): from the second tile on, slots of the last that stay
empty take as long as prompt tokens.

The section ``actuators`` holds measured points of power caps, memory and CPU clocks beside those
of clock locks at the same loads: fields of :class:`voltana_ctrl.types.ActuatorPoint`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import DEPTHS, PROFILE_DTYPE, ActuatorPoint, Band, Profile, Rest

_PROVENANCE = ("status", "source", "error")
_STATUS_BEST_FIRST = ("measured", "fitted", "scaled", "extrapolated")

# Section -> its keys other than the provenance; every one is required.
_LAWS = {
    "decode_time": ("base_s", "req_s", "kv_s", "floor_s"),
    "decode_energy": ("power_w", "iter_j", "req_j", "kv_j"),
    "prefill_time": ("base_s", "tok_s", "tok2_s"),
    "prefill_power": ("power_w",),
}
# Section -> keys that may be left out: 0.
_OPTIONAL = {
    "decode_time": ("roof_s", "roof_base_s", "tile_tok", "host_s"),
    "prefill_time": ("req_s",),
    "prefill_power": ("beside_w",),
}
_SETTINGS = {
    "memory": ("kv_capacity_tok", "max_batch", "prefill_budget_tok", "batch_steps"),
    "power": ("idle_w", "power_cap_w"),  # idle_w may depend on the clock
    "transfer": ("kv_bytes_per_tok", "link_bytes_s", "link_latency_s", "transfer_j_per_tok"),
}
# Section that may be left out -> its keys -> what the profile calls them.
_EXTRAS = {
    "parking": {"parked_w": "parked_w", "wake_s": "wake_s"},
    "clock_change": {"stall_s": "clock_stall_s", "energy_j": "clock_change_j"},
    "server": {"rest_w": "rest_of_server_w"},
}
_SHAPES = {
    "points": ("clock_mhz", "factor"),
    "power": ("ref_mhz", "exponent", "upto_mhz"),
    "voltage": ("exponent", "slope_per_ghz", "knee_ghz"),
}
_TOP = ("name", "summary", "gpus", "first_token", "clocks", "shapes", *_SETTINGS, *_LAWS)
# Measurements of other actuators; a profile without them leaves those alone.
_ACTUATORS = "actuators"
# How far the profile may be from the truth: fields of Band.
_BAND = "band"
_POINT_OPTIONAL = ("kv_tok", "power_cap_w", "mem_mhz", "cpu_mhz")
_POINT = tuple(field.name for field in fields(ActuatorPoint) if field.name not in _POINT_OPTIONAL)


def profile_from_laws(laws: Mapping[str, Any]) -> Profile:
    """Evaluate the laws of a profile file.

    Parameters
    ----------
    laws : mapping
        The parsed file.

    Returns
    -------
    Profile
        Its status is the weakest of the sections'.

    Raises
    ------
    ConfigError
        Naming section and key, if one is missing, unknown or not physical.

    Examples
    --------
    >>> profile_from_laws({})
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: missing key 'name'
    """
    _check_keys("", laws, _TOP, optional=(_ACTUATORS, _BAND, *_EXTRAS, *DEPTHS[1:]))
    sources = {}
    for section, keys in (_LAWS | _SETTINGS).items():
        optional = _OPTIONAL.get(section, ())
        table = _check_keys(section, laws[section], (*keys, *_PROVENANCE), optional=optional)
        sources[section] = _provenance(section, table)
    extras: dict[str, Any] = {}
    if _BAND in laws:
        keys = tuple(field.name for field in fields(Band))
        table = _check_keys(_BAND, laws[_BAND], _PROVENANCE, optional=keys)
        sources[_BAND] = _provenance(_BAND, table)
        given = {key: _number(f"{_BAND}.{key}", table[key]) for key in keys if key in table}
        extras["band"] = Band(**given)
    for section, names in _EXTRAS.items():
        if section in laws:
            table = _check_keys(section, laws[section], (*names, *_PROVENANCE))
            sources[section] = _provenance(section, table)
            for key, name in names.items():
                extras[name] = _number(f"{section}.{key}", table[key])
    for depth in DEPTHS[1:]:
        if depth in laws:
            optional = tuple(field.name for field in fields(Rest) if field.name != "power_w")
            table = _check_keys(depth, laws[depth], ("power_w", *_PROVENANCE), optional=optional)
            sources[depth] = _provenance(depth, table)
            told = {key: value for key, value in table.items() if key not in _PROVENANCE}
            extras[depth] = Rest(
                **{key: _number(f"{depth}.{key}", value) for key, value in told.items()}
            )
    clocks_mhz = _ladder(laws["clocks"])
    shapes = {
        name: _shape(f"shapes.{name}", shape, clocks_mhz)
        for name, shape in _mapping("shapes", laws["shapes"]).items()
    }
    rows = np.zeros(len(clocks_mhz), dtype=PROFILE_DTYPE)
    rows["clock_mhz"] = clocks_mhz
    for section, keys in _LAWS.items():
        phase = section.partition("_")[0]
        for key in (*keys, *_OPTIONAL.get(section, ())):
            terms = laws[section].get(key, 0.0)
            rows[f"{phase}_{key}"] = _coefficient(f"{section}.{key}", terms, shapes)
    power_cap_w = laws["power"]["power_cap_w"]
    positive("power.power_cap_w", power_cap_w)
    for column in ("decode_power_w", "prefill_power_w"):
        rows[column] = np.minimum(rows[column], power_cap_w)
    spare_w = power_cap_w - rows["prefill_power_w"]
    rows["prefill_beside_w"] = np.minimum(rows["prefill_beside_w"], spare_w)
    rows["idle_w"] = _coefficient("power.idle_w", laws["power"]["idle_w"], shapes)
    settings = {key: laws[section][key] for section, keys in _SETTINGS.items() for key in keys}
    settings["idle_w"] = float(rows["idle_w"][-1])
    settings["batch_steps"] = _steps(settings["batch_steps"])
    stated = [entry["status"] for section, entry in sources.items() if section != _BAND]
    weakest = max(stated, key=_STATUS_BEST_FIRST.index)
    actuators: tuple[ActuatorPoint, ...] = ()
    if _ACTUATORS in laws:
        table = _check_keys(_ACTUATORS, laws[_ACTUATORS], ("point", *_PROVENANCE))
        sources[_ACTUATORS] = {key: str(table[key]) for key in _PROVENANCE}
        actuators = _points(table["point"])
    return Profile(
        name=str(laws["name"]),
        summary=str(laws["summary"]),
        gpus=laws["gpus"],
        first_token=laws["first_token"],
        table=rows,
        status=weakest,  # type: ignore[arg-type]  # one of the four, checked above
        sources=sources,
        actuators=actuators,
        **settings,
        **extras,
    )


def _provenance(section: str, table: Mapping[str, Any]) -> dict[str, str]:
    if table["status"] not in _STATUS_BEST_FIRST:
        raise ConfigError(
            f"{section}.status: expected one of {', '.join(_STATUS_BEST_FIRST)},"
            f" got {table['status']!r}"
        )
    return {key: str(table[key]) for key in _PROVENANCE}


def _check_keys(
    where: str, table: Any, expected: Iterable[str], optional: Iterable[str] = ()
) -> Mapping[str, Any]:
    keys = tuple(expected)
    known = (*keys, *optional)
    dot = f"{where}." if where else ""
    for key in _mapping(where, table):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown key '{dot}{key}'; {hint}")
    for key in keys:
        if key not in table:
            raise ConfigError(f"missing key '{dot}{key}'")
    return _mapping(where, table)


def _mapping(where: str, table: Any) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table, got {table!r}")
    return table


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value!r}")
    return float(value)


def _numbers(where: str, values: Any) -> F64:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: expected a list of numbers, got {values!r}")
    return np.array([_number(where, value) for value in values])


def _ladder(clocks: Any) -> F64:
    """`clocks_mhz` is the list itself, or lowest, highest and step."""
    if isinstance(clocks, list):
        return _numbers("clocks", clocks)
    keys = ("min_mhz", "max_mhz", "step_mhz")
    table = _check_keys("clocks", clocks, keys)
    low, high, step = (_number(f"clocks.{key}", table[key]) for key in keys)
    if not (0 < low <= high and step > 0 and (high - low) / step <= 10_000):
        raise ConfigError(
            f"clocks: expected 0 < min_mhz <= max_mhz and step_mhz > 0, got {low:g}, {high:g},"
            f" {step:g}"
        )
    count = int((high - low) / step + 1e-9) + 1
    return low + step * np.arange(count, dtype=np.float64)


def _shape(where: str, shape: Any, clocks_mhz: F64) -> F64:
    form = _mapping(where, shape).get("form")
    if form not in _SHAPES:
        raise ConfigError(f"{where}.form: expected one of {', '.join(_SHAPES)}, got {form!r}")
    _check_keys(where, shape, ("form", *_SHAPES[form]))
    if form == "points":
        known_mhz = _numbers(f"{where}.clock_mhz", shape["clock_mhz"])
        factor = _numbers(f"{where}.factor", shape["factor"])
        if len(known_mhz) != len(factor) or np.any(np.diff(known_mhz) <= 0):
            raise ConfigError(
                f"{where}: expected ascending clock_mhz and as many factors, got"
                f" {len(known_mhz)} and {len(factor)}"
            )
        return np.interp(clocks_mhz, known_mhz, factor)
    values = {key: _number(f"{where}.{key}", shape[key]) for key in _SHAPES[form]}
    if form == "power":
        reached_mhz = np.minimum(clocks_mhz, values["upto_mhz"])
        factors: F64 = (values["ref_mhz"] / reached_mhz) ** values["exponent"]
        return factors
    g = clocks_mhz / 1e3
    volt = 1.0 + values["slope_per_ghz"] * np.maximum(0.0, g - values["knee_ghz"])
    dynamic: F64 = g ** values["exponent"] * volt**2
    return dynamic


def _coefficient(where: str, terms: Any, shapes: Mapping[str, F64]) -> F64 | float:
    if not isinstance(terms, list):
        return _number(where, terms)
    total: F64 | float = 0.0
    for term in terms:
        if "shape" not in _mapping(where, term):
            _check_keys(where, term, ("value",))
            total = total + _number(where, term["value"])
            continue
        _check_keys(where, term, ("value", "shape"))
        if term["shape"] not in shapes:
            raise ConfigError(
                f"{where}: expected a shape of [shapes] ({', '.join(shapes)}),"
                f" got {term['shape']!r}"
            )
        total = total + _number(where, term["value"]) * shapes[term["shape"]]
    return total


def _points(points: Any) -> tuple[ActuatorPoint, ...]:
    if not isinstance(points, list):
        raise ConfigError(f"actuators.point: expected [[actuators.point]] tables, got {points!r}")
    made = []
    for number, point in enumerate(points, start=1):
        where = f"actuators.point {number}"
        _check_keys(where, point, _POINT, optional=_POINT_OPTIONAL)
        try:
            made.append(ActuatorPoint(**point))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return tuple(made)


def _steps(steps: Any) -> tuple[tuple[int, int], ...]:
    pairs = isinstance(steps, list) and all(
        isinstance(step, list) and len(step) == 2 for step in steps
    )
    if not pairs:
        raise ConfigError(f"memory.batch_steps: expected pairs [upto_req, step_req], got {steps!r}")
    return tuple((upto, step) for upto, step in steps)
