"""Command line: ``voltana-ctrl compare | profile | fit | agent | router``, and more."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import voltana_ctrl
from voltana_ctrl.cli import (
    agent,
    compare,
    controller,
    dashboard,
    demo,
    doctor,
    emulate,
    fit,
    init,
    meter,
    policies,
    profile,
    profiles,
    restore,
    router,
    savings,
    serve,
    setter,
)
from voltana_ctrl.cli.config import configurable
from voltana_ctrl.cli.workers import Stopped
from voltana_ctrl.errors import VoltanaError, missing_package


class _Command(TyperCommand):
    """A command whose help shows square brackets as they are written, not as Rich's markup."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.markup import escape

        for option in self.params:
            text = getattr(option, "help", None)
            if text:
                option.help = escape(text)  # type: ignore[attr-defined]
        self.epilog = escape(self.epilog or "")
        super().format_help(ctx, formatter)


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Less energy for LLM serving within the SLO: compare control policies.",
)
for _command in (
    compare.compare,
    fit.fit,
    profile.profile,
    doctor.doctor,
    meter.meter,
    init.init,
    agent.agent,
    controller.controller,
    router.router,
    serve.serve,
    emulate.emulate,
    demo.demo,
    setter.setter,
    restore.restore,
    dashboard.dashboard,
    savings.savings,
    policies.policies,
    profiles.profiles,
):
    _examples = sys.modules[_command.__module__].EXAMPLES
    # Rich keeps paragraphs, and joins lines.
    app.command(cls=_Command, epilog="\n\n".join(["Examples:", *_examples]))(configurable(_command))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"voltana-ctrl {voltana_ctrl.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; bad input ends with status 2 and one line on stderr."""
    # As a library the package is silent.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        status = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped:
        sys.exit(143)
    except VoltanaError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        # Of an installation without its dependencies, as it is made beside an engine.
        if (error.name or "").startswith("voltana_ctrl"):
            raise
        _refuse(missing_package(error))
    except Exception as error:
        # Usage errors of the parser, which come from click or from typer's copy of it.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        # Without a command the help is printed already, and nothing is left to say.
        if not message().strip():
            sys.exit(2)
        _refuse(message())
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> None:
    line = " ".join(message.split())
    sys.stderr.write(f"voltana-ctrl: {line}\n")
    sys.exit(2)
