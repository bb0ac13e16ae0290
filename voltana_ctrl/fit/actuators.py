"""Measured points of power caps, memory and CPU clocks: from a table into a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.tables import OTHERS, raw_rows, sets_other
from voltana_ctrl.laws import compare_actuators
from voltana_ctrl.types import ActuatorPoint, Profile

__all__ = ["actuator_lines", "actuators_toml", "read_actuators"]

_NEEDS = ("wall_se_s", "power_se_w", "energy_j", "asked_tok")


def read_actuators(
    tables: str | Path | Sequence[str | Path], where: Mapping[str, str] | None = None
) -> tuple[ActuatorPoint, ...]:
    r"""Points at the loads at which something besides the SM clock was set.

    Rows of the same setting and load, from one table or several, become one point, whose
    standard error is the larger of theirs and of what their difference says.

    Parameters
    ----------
    tables : str, Path or sequence of them
        Tables of ``voltana-ctrl profile``, or with its columns.
    where : mapping of str to str, optional
        Keep the rows whose column has this value.

    Returns
    -------
    tuple of ActuatorPoint
        None where nothing but clocks was set.

    Raises
    ------
    ConfigError
        If such rows lack energy or standard errors.

    Examples
    --------
    >>> from pathlib import Path
    >>> import tempfile
    >>> head = "phase,freq_mhz,batch_req,asked_tok,kv_tok,wall_s,wall_se_s,energy_j,power_se_w"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "table.csv")
    ...     _ = path.write_text(f"{head},set_power_cap_w\n"
    ...                         "decode,1410,8,512,4300,0.02,1e-5,5.0,0.5,\n"
    ...                         "decode,1410,8,512,4300,0.021,1e-5,4.2,0.5,200\n")
    ...     points = read_actuators(path)
    >>> [(str(point.setting), round(point.power_w)) for point in points]
    [('1410 MHz', 250), ('1410 MHz, power cap 200 W', 200)]
    """
    paths = [tables] if isinstance(tables, str | Path) else list(tables)
    rows = [row for path in paths for row in raw_rows(Path(path))]
    rows = [row for row in rows if all(row.get(k) == v for k, v in (where or {}).items())]
    if not any(sets_other(row) for row in rows):
        return ()
    label = ", ".join(Path(path).name for path in paths)
    if not all("phase" in row for row in rows):
        raise ConfigError(f"{label}: expected a column phase in every table, got one without")
    busy = [row for row in rows if row["phase"] != "idle"]
    loads = {_load(row) for row in busy if sets_other(row)}
    groups: dict[object, list[ActuatorPoint]] = {}
    for row in busy:
        if _load(row) in loads:
            point = _point(row, label)
            groups.setdefault((point.load, point.setting), []).append(point)
    return tuple(_together(points) for points in groups.values())


def _load(row: Mapping[str, str]) -> tuple[str | None, ...]:
    return row["phase"], row.get("batch_req"), row.get("asked_tok")


def _point(row: Mapping[str, str], label: str) -> ActuatorPoint:
    missing = [name for name in _NEEDS if not row.get(name)]
    if missing:
        raise ConfigError(
            f"{label}: {', '.join(missing)}: missing where another actuator was set, or at the"
            " same load; `voltana-ctrl profile` writes them where it measures long enough (a larger"
            " steady_s) and is given the GPUs; in rows of your own: tokens of the prompt or the"
            " context that was asked for, J of an iteration, standard errors of its seconds and"
            " of the watts"
        )
    try:
        wall_s = float(row["wall_s"])
        # set_power_cap_w -> power_cap_w, and so on.
        others = {name.removeprefix("set_"): float(row[name]) for name in OTHERS if row.get(name)}
        return ActuatorPoint(
            phase="decode" if row["phase"] == "decode" else "prefill",
            batch_req=int(float(row["batch_req"])),
            context_tok=int(float(row["asked_tok"])),
            kv_tok=float(row.get("kv_tok") or 0.0),
            freq_mhz=float(row["freq_mhz"]),
            wall_s=wall_s,
            wall_se_s=float(row["wall_se_s"]),
            power_w=float(row["energy_j"]) / wall_s,
            power_se_w=float(row["power_se_w"]),
            **others,
        )
    except (KeyError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{label}: a row with another actuator set: {error}") from error


def _together(points: Sequence[ActuatorPoint]) -> ActuatorPoint:
    if len(points) == 1:
        return points[0]
    n = len(points)
    wall_s = np.array([point.wall_s for point in points])
    power_w = np.array([point.power_w for point in points])
    wall_se_s = np.sqrt(np.mean([point.wall_se_s**2 for point in points]) / n)
    power_se_w = np.sqrt(np.mean([point.power_se_w**2 for point in points]) / n)
    return replace(
        points[0],
        wall_s=float(wall_s.mean()),
        wall_se_s=float(max(wall_se_s, wall_s.std(ddof=1) / np.sqrt(n))),
        power_w=float(power_w.mean()),
        power_se_w=float(max(power_se_w, power_w.std(ddof=1) / np.sqrt(n))),
    )


def actuators_toml(points: Iterable[ActuatorPoint], source: str) -> str:
    """Section of a profile file with these points; empty without any.

    Parameters
    ----------
    points : iterable of ActuatorPoint
        What was measured.
    source : str
        Where it comes from.

    Examples
    --------
    >>> actuators_toml((), "table.csv")
    ''
    """
    points = tuple(points)
    if not points:
        return ""
    wall = max(point.wall_se_s / point.wall_s for point in points)
    power = max(point.power_se_w / point.power_w for point in points)
    lines = [
        "",
        "[actuators]",
        'status = "measured"',
        f'source = "{source}"',
        f'error = "largest standard error {wall:.1%} of a time, {power:.1%} of a power"',
    ]
    for point in points:
        lines += ["", "[[actuators.point]]"]
        for field in fields(point):
            value = getattr(point, field.name)
            if isinstance(value, str):
                lines.append(f'{field.name} = "{value}"')
            elif value is not None:
                lines.append(f"{field.name} = {value:.9g}")
    return "\n".join(lines) + "\n"


def actuator_lines(profile: Profile) -> list[str]:
    """Per setting what it does to each load, in words.

    Parameters
    ----------
    profile : Profile
        A profile with measured points of other actuators.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> actuator_lines(load_profile("a100-sxm-80gb/llama-3.1-8b"))
    []
    """
    table = compare_actuators(profile)
    lines = []
    for column, setting in enumerate(table.settings):
        for row, (phase, batch_req, context_tok) in enumerate(table.loads):
            saving_w = table.saving_w[row, column]
            here = f"{setting}: {phase} {batch_req} x {context_tok} tok:"
            better = table.clocks_mhz[np.isfinite(saving_w)]
            if table.inert[row, column]:
                lines.append(f"{here} inert, as the clock lock alone")
            elif better.size:
                lines.append(
                    f"{here} less power than a lock at {better[0]:g}..{better[-1]:g} MHz, up to"
                    f" {saving_w.max():.3g} W surely, and no slower"
                )
            else:
                lines.append(f"{here} no better than a clock lock that is as fast")
    return lines
