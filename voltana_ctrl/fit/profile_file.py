"""A fit as the text of a profile file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.actuators import actuators_toml
from voltana_ctrl.types import Profile

if TYPE_CHECKING:
    from voltana_ctrl.fit.result import FitResult

__all__ = ["NOT_MEASURED", "profile_text"]

#: How a profile begins the error of what it takes from another.
NOT_MEASURED = "not measured here"


def profile_text(
    result: FitResult,
    name: str,
    like: Profile,
    ladder_mhz: Iterable[float] | None,
    idle_w: float | None,
) -> str:
    """Text of a profile file; see :meth:`FitResult.to_toml`.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.fit import FitResult, IterationTable, Laws
    >>> empty = IterationTable(
    ...     phase=(), freq_mhz=[], batch_req=[], kv_tok=[], prefill_tok=[], square_tok2=[],
    ...     wall_s=[], energy_j=[])
    >>> result = FitResult(
    ...     table=empty, laws=Laws(decode=None, prefill=None, power=None), held_out=())
    >>> like = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> profile_text(result, "gpu/model", like, None, None)
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: decode: the table has no decode rows; a profile needs both
    phases: measure decode iterations too
    """
    laws = result.laws
    if laws.decode is None or laws.prefill is None:
        missing = "decode" if laws.decode is None else "prefill"
        raise ConfigError(
            f"{missing}: the table has no {missing} rows; a profile needs both phases: measure"
            f" {missing} iterations too"
        )
    power = laws.power
    if power is None or not np.isfinite(power.prefill_static_w + power.decode_static_w):
        raise ConfigError(
            "energy_j: a profile needs the energy of both phases; measure with the energy"
            " counter of the GPU"
        )
    from voltana_ctrl.fit.result import foreign_lines  # which writes its profile with this

    band = result.band()
    largest_req = int(result.table.of("decode").batch_req.max())
    ladder = _ladder(result, ladder_mhz)
    decode, prefill = laws.decode, laws.prefill
    measured_idle = idle_w is not None or result.idle_w is not None
    if idle_w is None:
        idle_w = like.idle_w if result.idle_w is None else result.idle_w
    source = f"fit of {result.table.source}: {len(result.table)} rows"
    columns = dict(
        zip(
            ("decode_base", "decode_req", "decode_kv"),
            (values * np.ones(len(ladder)) for values in decode.at(ladder)),
            strict=True,
        )
    )
    columns["decode_roof"] = 1.0 / ladder
    columns |= dict(
        zip(("prefill_base", "prefill_tok", "prefill_tok2"), prefill.at(ladder), strict=True)
    )
    shape = {
        "form": "voltage",
        "slope_per_ghz": power.rise_frac,
        "knee_ghz": power.knee_mhz / 1e3,
    }
    cap_w = power.cap_w if np.isfinite(power.cap_w) else like.power_cap_w

    def provenance(phase: str, quantity: str) -> dict[str, Any]:
        return {"status": "fitted", "source": source, "error": _error(result, phase, quantity)}

    taken = {"status": "scaled", "source": f"as {like.name}", "error": NOT_MEASURED}
    file = {
        "name": name,
        "summary": f"fitted to {len(result.table)} measured iterations",
        "gpus": result.table.gpus,
        "first_token": like.first_token,
        "clocks": list(ladder),
        "decode_time": {
            **provenance("decode", "time"),
            "base_s": [{"value": 1.0, "shape": "decode_base"}],
            "req_s": [{"value": 1.0, "shape": "decode_req"}],
            "kv_s": [{"value": 1.0, "shape": "decode_kv"}],
            "floor_s": decode.floor_s,
            "host_s": decode.host_s,
            "roof_s": [{"value": decode.compute_s, "shape": "decode_roof"}],
        },
        "decode_energy": {
            **provenance("decode", "energy"),
            "power_w": [
                {"value": power.decode_static_w},
                {"value": power.decode_dynamic_w, "shape": "dynamic"},
            ],
            "iter_j": power.decode_iter_j,
            "req_j": [{"value": power.decode_req_j, "shape": "voltage"}],
            "kv_j": [{"value": power.decode_kv_j, "shape": "voltage"}],
        },
        "prefill_time": {
            **provenance("prefill", "time"),
            "base_s": [{"value": 1.0, "shape": "prefill_base"}],
            "tok_s": [{"value": 1.0, "shape": "prefill_tok"}],
            "tok2_s": [{"value": 1.0, "shape": "prefill_tok2"}],
            "req_s": prefill.req_s,
        },
        "prefill_power": {
            **provenance("prefill", "energy"),
            "power_w": [
                {"value": power.prefill_static_w},
                {"value": power.prefill_dynamic_w, "shape": "dynamic"},
            ],
        },
        "power": {
            **(taken if not measured_idle else {**taken, "status": "measured", "source": source}),
            "idle_w": idle_w,
            "power_cap_w": cap_w,
        },
        "memory": {
            **taken,
            "error": "; ".join([NOT_MEASURED, *foreign_lines(result, name, like)]),
            "kv_capacity_tok": like.kv_capacity_tok,
            "max_batch": max(1, min(like.max_batch, largest_req)),
            "prefill_budget_tok": like.prefill_budget_tok,
            "batch_steps": [list(step) for step in laws.batch_steps],
        },
        "transfer": {
            **taken,
            "kv_bytes_per_tok": like.kv_bytes_per_tok,
            "link_bytes_s": like.link_bytes_s,
            "link_latency_s": like.link_latency_s,
            "transfer_j_per_tok": like.transfer_j_per_tok,
        },
        "band": {
            "status": "fitted",
            "source": source,
            "error": "what 90 % of held-out rows stay below, over 1.645; idle power not measured",
            **{field.name: getattr(band, field.name) for field in fields(band)},
        },
        **{
            f"shapes.{key}": {"form": "points", "clock_mhz": list(ladder), "factor": list(values)}
            for key, values in columns.items()
        },
        "shapes.dynamic": {**shape, "exponent": 1.0},
        "shapes.voltage": {**shape, "exponent": 0.0},
    }
    return _toml(file) + actuators_toml(result.actuators, source)


def _ladder(result: FitResult, ladder_mhz: Iterable[float] | None) -> F64:
    measured = [np.unique(result.table.of(phase).freq_mhz) for phase in ("decode", "prefill")]
    low = max(clocks[0] for clocks in measured)
    high = min(clocks[-1] for clocks in measured)
    if ladder_mhz is None:
        both = np.unique(np.concatenate(measured))
        shared: F64 = both[(both >= low) & (both <= high)]
        return shared
    ladder: F64 = np.asarray(list(ladder_mhz), dtype=np.float64)
    if len(ladder) == 0 or not np.all((ladder >= low) & (ladder <= high)):
        raise ConfigError(
            f"ladder_mhz: expected clocks within {low:g}..{high:g} MHz, where both phases were"
            f" measured, got {ladder}; measure at the lowest and the highest clock of the ladder"
        )
    return ladder


def _error(result: FitResult, phase: str, quantity: str) -> str:
    parts = []
    by_batch = result.errors(phase, quantity, "batch")
    if by_batch is not None:
        parts.append(f"{by_batch.mape_frac:.1%} on batches held out")
    by_clock = result.errors(phase, quantity, "clock")
    if by_clock is not None:
        each = ", ".join(f"{error:.1%} at {clock:g}" for clock, error in by_clock.by.items())
        parts.append(f"between clocks up to what clocks held out err by: {each} MHz")
    return "; ".join(parts) or "too few rows to hold any out"


def _toml(file: dict[str, Any]) -> str:
    """Write plain keys first, then one table per section: the little TOML that this takes."""
    lines = [f"{key} = {_value(v)}" for key, v in file.items() if not isinstance(v, dict)]
    for section, table in file.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(v)}" for key, v in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        return f'"{escaped}"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = f"{float(value):.9g}"
    return text if any(mark in text for mark in ".en") else f"{text}.0"
