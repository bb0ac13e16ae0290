"""JSON Schema of fleet files, for editors; made from what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voltana_ctrl.engines import endpoints
from voltana_ctrl.engines.endpoints import ENGINES
from voltana_ctrl.profiles import list_profiles
from voltana_ctrl.types import Role, fleet

__all__ = ["fleet_schema"]

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}


def fleet_schema() -> dict[str, Any]:
    """JSON Schema of the file that :func:`~voltana_ctrl.engines.load_endpoints` reads.

    Returns
    -------
    dict
        Plain values for JSON, of draft 7.

    Examples
    --------
    >>> instance = fleet_schema()["properties"]["instance"]["items"]
    >>> instance["required"], instance["properties"]["role"]["enum"]
    (['role', 'profile'], ['prefill', 'decode', 'colocated'])
    """
    engine = _properties(endpoints._KEYS)
    engine["kind"] = {"enum": list(ENGINES)}
    engine["gpus"] = {"type": "array", "items": {"type": "string"}}
    instance = _properties(fleet._TOML_KEYS)
    instance["role"] = {"enum": [role.value for role in Role]}
    instance["profile"] = {
        "type": "string",
        "description": "A shipped profile, or a .toml of your own.",
        "examples": list(list_profiles()),
    }
    instance["engine"] = _table(engine, ["kind", "url"])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Fleet of voltana-ctrl",
        **_table(
            {"instance": {"type": "array", "minItems": 1, "items": _table(
                instance, ["role", "profile"]
            )}},
            ["instance"],
        ),
    }  # fmt: skip


def _table(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _properties(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Each key with the JSON types of the Python ones that it may have."""
    found: dict[str, Any] = {}
    for key, kinds in keys.items():
        names = [_TYPES[one] for one in (kinds if isinstance(kinds, tuple) else (kinds,))
                 if one in _TYPES]  # fmt: skip
        found[key] = {"type": names[0] if len(names) == 1 else names} if names else {}
    return found
