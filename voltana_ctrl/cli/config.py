"""``--config FILE.toml``: every option of a command in a file; what is typed comes first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import read_toml

_HELP = "TOML file with options by their names, such as rate = [10, 20]; typed ones come first."


def configurable(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option ``--config``.

    Parameters
    ----------
    command : callable
        As Typer takes it.
    """

    @wraps(command)
    def with_config(*, config: Path | None = None, **options: Any) -> Any:  # noqa: ARG001  read before
        return command(**options)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option("--config", help=_HELP, is_eager=True, callback=_read, show_default=False),
        ],
    )
    taken = [*signature.parameters.values(), option]
    with_config.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]
    with_config.__annotations__ = {one.name: one.annotation for one in taken}
    return with_config


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make what the file says the defaults of the other options."""
    if path is None or ctx.resilient_parsing:
        return path
    try:
        values = read_toml(path)
    except ConfigError as error:
        raise ConfigError(f"config {error}") from error
    options = {
        name.removeprefix("--"): one
        for one in ctx.command.params
        for name in one.opts
        if one.name not in ("config", "help")
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in options:
            near = get_close_matches(name, options, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"config {path}: {ctx.command.name} has no option {key!r}{hint}")
        several = options[name].multiple or options[name].nargs == -1
        defaults[str(options[name].name)] = _as_typed(value, several=several)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _as_typed(value: Any, *, several: bool) -> Any:
    """Value as it would be typed: lists with commas between, tables as name=value."""
    if isinstance(value, list) and several:
        return [_as_typed(one, several=False) for one in value]
    if isinstance(value, list):
        return ",".join(str(_as_typed(one, several=False)) for one in value)
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    return value
